"""The config of a run: keys with meanings, ranges and rules; no torch."""
