"""The machine: device, precision, memory, seeds."""
