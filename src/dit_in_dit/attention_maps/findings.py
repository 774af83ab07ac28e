"""Findings of `maps` as sentences with numbers, and the reasons why a part is missing."""

from __future__ import annotations

import numpy as np
import torch

from dit_in_dit.attention_maps.attention import LevelAttention
from dit_in_dit.attention_maps.record import Maps
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.data.picture import Array
from dit_in_dit.diffusion.objective import high_frequencies
from dit_in_dit.model.aggregate import AGGREGATORS, FUSIONS
from dit_in_dit.model.mixers import MIXERS


def findings(maps: Maps) -> list[str]:
    """Sentences on attention, variance of inner weights, aggregation, contribution and effect of the inner path."""
    sentences = [_attention("Inner", maps.inner, maps) if maps.inner else _attention("Outer", maps.outer, maps)]
    for name, level in (("inner", maps.inner), ("outer", maps.outer)):
        if level and level.beside:
            sentences.append(
                f"In {name} blocks that see tokens of time and class, these get {level.beside:.0%} of the others' "
                "attention. The maps and all other numbers are of the attention among patches, divided by its sum."
            )
    if maps.inner and maps.inner.tokens.per_patch > 1:
        sentences.append(_dependence(maps.inner))
    if AGGREGATORS[maps.config.model.inner.aggregate].weights_depend_on == "tokens" and maps.aggregation:
        name, weights = list(maps.aggregation.items())[-1]
        heaviest = weights.maps.max(-1).mean((0, 2)) * weights.maps.shape[-1]
        sentences.append(
            f"In the aggregation ({name}), the largest weight of a sub-patch in its patch is "
            f"{_ends(heaviest, maps, '.2f', ' times the mean')}."
        )
    if maps.contribution:
        name, share = list(maps.contribution.items())[-1]
        at_head = name == "inner_head"
        of = "the pixels that the heads predict" if at_head else f"a patch token at the fusion ({name})"
        sentences.append(f"By norm, the inner path's share of {of} is {_ends(share.mean((0, 2)), maps)}.")
    if maps.without is not None:
        sentences.append(_on_off(maps.estimate, maps.without, maps))
    return sentences


def missing_parts(model: ModelConfig) -> dict[str, str]:
    """Reasons why parts are missing, by name of the part: inner, aggregation, contribution, without."""
    inner, why = model.inner, {}
    ends_inner = model.program[-1][0] == "inner"
    if not model.blocks("inner"):
        plain = "this is a plain DiT: it has no inner path"
        return dict.fromkeys(("inner", "aggregation", "contribution", "without"), plain)
    mixer = MIXERS[inner.mixer]
    if mixer is None:
        why["inner"] = f"mixer={inner.mixer}: inner tokens do not attend to each other"
    elif not mixer.length(model):
        why["inner"] = f"mixer={inner.mixer}: {mixer.why_no_attention}"
    joins = not (len(model.program) == 2 and ends_inner)
    if not joins:
        why["aggregation"] = "the program ends in inner blocks, which predict the image: nothing is aggregated"
    elif AGGREGATORS[inner.aggregate].weights_depend_on == "nothing":
        why["aggregation"] = f"aggregate={inner.aggregate}: all {model.sub_patches} sub-patches have the same weight"
    if joins and not FUSIONS[inner.fuse].keeps_outer:
        why["without"] = f"fuse={inner.fuse}: without the inner path nothing is left"
    return why


def not_shown(model: ModelConfig) -> list[str]:
    """The missing parts, one sentence per reason."""
    names = {
        "inner": "inner attention",
        "aggregation": "aggregation weights",
        "contribution": "share of the inner path",
        "without": "pictures without the inner path",
    }
    why = missing_parts(model)
    return [f"No {_list([names[part] for part in why if why[part] == r])}: {r}." for r in dict.fromkeys(why.values())]


def _ends(values: Array, maps: Maps, form: str = ".0%", unit: str = "") -> str:
    """Text of the values (K,) at the first and last time, and of extremes between them, over 2% from both."""
    times, last = maps.views.times, len(values) - 1
    extremes = {int(values.argmin()), int(values.argmax())} - {0, last}
    distinct = {k for k in extremes if np.abs(values[k] - values[[0, last]]).min() > 0.02 * abs(values[k])}
    chosen = sorted({0, last} | distinct)
    form = ".2%" if form == ".0%" and max(values[chosen]) < 0.01 else form
    numbers, when = [format(values[k], form) for k in chosen], [f"{times[k]:g}" for k in chosen]
    return f"{_list(numbers)}{unit} at t = {_list(when)}"


def _list(items: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _attention(name: str, level: LevelAttention, maps: Maps) -> str:
    entropy, own, distance = (x.mean((0, 2, 3, 4)) for x in (level.entropy, level.own, level.distance))
    token = "sub-patch" if name == "Inner" else "patch"
    length = level.tokens.length
    even = format(1 / length, ".1%" if length < 100 else ".2%")
    if length == 1:
        return f"{name} attention: a {token} attends to itself alone."
    return (
        f"{name} attention has an entropy of {_ends(entropy, maps)}, where 100% is uniform attention to {length} "
        f"{token}es. The weight of a {token} on itself is {_ends(own, maps)} (uniform: {even}). The mean distance to "
        f"what it attends to is {_ends(distance, maps, '.2f', f' {token}es')} (uniform: "
        f"{level.tokens.even_distance:.2f})."
    )


def _dependence(level: LevelAttention) -> str:
    parts = level.variance()
    if not any(parts.values()):
        return "All inner attention weights are equal."
    most = max(parts, key=lambda name: parts[name])
    name = {"content": "the content of the patch", "position": "position", "time": "time"}[most]
    return (
        f"Inner attention depends most on {name}: of the variance of its weights, {parts['content']:.0%} lies "
        f"between patches and images, {parts['position']:.0%} between pairs of positions and {parts['time']:.1%} "
        "between times."
    )


def _on_off(on: Array, off: Array, maps: Maps) -> str:
    change = on - off  # N K C H W
    rms = np.sqrt(np.square(change).mean((0, 2, 3, 4)))
    if not rms.any():
        return "Without the inner path the image estimate is the same."
    sentence = (
        "Without the inner path the image estimate changes by a root mean square of "
        f"{_ends(rms, maps, '.2f')} (images lie in [-1, 1]); "
    )
    k = len(maps.views.times) // 2
    fine = [f"{fine_detail_share(images[:, k]):.0%}" for images in (change, on, off)]
    return sentence + (
        f"at t = {maps.views.times[k]:g}, the finest detail (removed by 2x2 averaging) is {fine[0]} "
        f"of the change, {fine[1]} of the estimate with the inner path "
        f"and {fine[2]} of the estimate without it."
    )


def fine_detail_share(images: Array) -> float:
    """Share of the variance within images (N, C, H, W) that 2x2 averaging removes: the finest Haar level."""
    x = torch.from_numpy(images)
    centred = x - x.mean((2, 3), keepdim=True)
    return float(high_frequencies(x).square().sum() / centred.square().sum().clamp(min=1e-12))
