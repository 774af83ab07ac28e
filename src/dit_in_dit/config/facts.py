"""Properties of built-in choices that config rules need, without torch; a test compares them with the classes."""

CROSSES_PATCHES = {"patch": False, "window": True, "image": True, "conv": True, "compact": True, "none": False}
KEEPS_OUTER = {"add": True, "gate": True, "replace": False}
READS_OUTER = {name: name != "image" for name in ("image", "patch", "sub_patch")}
READS_OUTER |= dict.fromkeys(("outer", "outer_sub_patch", "outer_per_block"), True)
READS_TIME = {name: name.startswith("outer") for name in READS_OUTER}
