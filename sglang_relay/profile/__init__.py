"""The offline profiler: in which layers reused KV deviates, and where a model's layer range lies."""
