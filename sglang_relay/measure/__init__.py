"""The measuring room: real servers, agent-chain tasks, and how far a policy's answers are from full prefill."""
