"""Where images come from: folders, archives, arrays, and the procedural `mosaic`."""
