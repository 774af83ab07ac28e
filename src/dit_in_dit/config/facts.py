"""Facts of the package's own choices that the rules of a config need, without torch; tests compare the classes."""

CROSSES_PATCHES = {"patch": False, "window": True, "image": True, "conv": True, "none": False}
KEEPS_OUTER = {"add": True, "gate": True, "replace": False}
READS_OUTER = {"image": False, "patch": True, "sub_patch": True}
