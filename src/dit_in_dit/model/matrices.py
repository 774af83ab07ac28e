"""The weight matrices of blocks: which weights are matrices that map tokens, and how many a fused weight stacks."""

from __future__ import annotations

from torch import nn

from dit_in_dit.config.errors import UserError


def block_matrices(model: nn.Module) -> dict[str, int]:
    """By parameter name, the number of matrices in each 2-D weight of the mixers and MLPs of all blocks.

    A fused weight stacks matrices with equal numbers of rows: queries, keys and values, or the two halves of SwiGLU.
    Its module states how many, in `stacked`; 0 leaves a weight out. Modulation, norms, and everything outside the
    blocks are left out.

    Raises:
        UserError: the rows of a weight cannot be divided by the number in `stacked`.
    """
    counts = {}
    for name, weight in model.named_parameters():
        level, *inside = name.split(".")
        if not level.endswith("_blocks") or inside[1:2] != ["branches"] or weight.ndim != 2:
            continue
        owner, _, layer = name.removesuffix(".weight").rpartition(".")
        count = getattr(model.get_submodule(owner), "stacked", {}).get(layer, 1)
        if count and len(weight) % count:
            raise UserError(f"{name}: `stacked` must divide the {len(weight)} rows of the weight: got {count}")
        if count:
            counts[name] = count
    return counts
