"""Formats of images and latents: a file each, with a class of `data.source.Source` whose `name` puts it in SOURCES."""
