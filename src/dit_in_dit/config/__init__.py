"""What a run is: keys with meanings, ranges and rules; no torch."""
