"""Config keys of loss terms beside the objective's loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dit_in_dit.config.schema import Section, key


@dataclass(frozen=True)
class TermsConfig(Section):
    """A key with the name of a term is its weight in the sum that is minimised; at 0 the term is off."""

    prefix: ClassVar[str] = "train.terms"
    internal: float = key(
        0.0,
        "weight of the weak head's loss, for internal guidance (its authors: 0.5); 0: off",
        low=0,
        high=1e6,
        added=4,
    )
    sra: float = key(0.0, "weight of self-alignment (SRA); its authors take 0.2; 0: off", low=0, high=1e6, added=4)
    sra_blocks: tuple[int, int] | None = key(
        None,
        "sra: outer blocks (from 0) of the model and of its average; null: at 2/7 and 5/7 of the depth",
        low=0,
        high=999,
        added=4,
    )
    sra_gap: float = key(0.2, "sra: the average sees an image at t - k, with k from 0 to this", low=0, high=1, added=4)
    sra_distance: Literal["smooth_l1", "cosine"] = key(
        "smooth_l1", "sra: smooth_l1 (the paper), cosine (its authors' later advice, with weight 0.5)", added=4
    )
    repa: float = key(
        0.0, "weight of alignment with DINOv2 (REPA); its authors take 0.5; 0: off", low=0, high=1e6, added=4
    )
    repa_encoder: str | None = key(
        None,
        "repa: folder of a DINOv2 such as facebook/dinov2-base, config.json and model.safetensors; null for latents",
        added=4,
    )
    repa_block: int | None = key(
        None, "repa: outer block (from 0) that is aligned; null: at 2/7 of the depth", low=0, high=999, added=4
    )
    repa_width: int = key(2048, "repa: width of the two hidden layers of the projector", low=1, high=65536, added=4)
