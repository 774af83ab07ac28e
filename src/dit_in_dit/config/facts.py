"""Properties of built-in choices that config rules need, without torch; a test compares them with the classes."""

CROSSES_PATCHES = {"patch": False, "window": True, "image": True, "conv": True, "compact": True, "none": False}
KEEPS_OUTER = {"add": True, "gate": True, "replace": False}
READS_OUTER = {"image": False}
READS_OUTER |= dict.fromkeys(("patch", "sub_patch", "outer", "outer_sub_patch", "outer_per_block"), True)
READS_TIME = {name: name.startswith("outer") for name in READS_OUTER}
