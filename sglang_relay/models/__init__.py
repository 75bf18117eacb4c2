"""Models the project fetches by name: where their weights lie, and how they become a Hugging Face checkpoint."""
