"""The run folder: checkpoints, their integrity, logs, locks, atomic files."""
