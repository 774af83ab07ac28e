"""Looking inside a trained run: what its inner and outer attention see, and what the inner path draws."""
