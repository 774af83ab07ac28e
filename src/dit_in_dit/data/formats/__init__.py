"""Formats of images and latents. Each file has a subclass of `Source`, whose `name` is its key in SOURCES."""
