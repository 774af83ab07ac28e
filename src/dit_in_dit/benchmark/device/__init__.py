"""The device check: what only a GPU can tell, in parts that end within a time limit (docs/gpu.md)."""
