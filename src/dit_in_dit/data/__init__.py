"""Sources of images: folders, archives, arrays, latents, and the procedural `mosaic`."""
