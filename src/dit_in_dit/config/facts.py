"""Properties of built-in choices that config rules need, without torch; a test compares them with the classes."""

CROSSES_PATCHES = {"patch": False, "window": True, "image": True, "conv": True, "compact": True, "none": False}
KEEPS_OUTER = {"add": True, "gate": True, "replace": False}
READS_OUTER = {
    "image": False,
    "patch": True,
    "sub_patch": True,
    "outer": True,
    "outer_sub_patch": True,
    "outer_per_block": True,
}
