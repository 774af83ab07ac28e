"""What was seen, in sentences with numbers; and why a part is missing."""

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
    """Three or four sentences: entropy and locality, what attention depends on, contribution, inner on and off."""
    said = _attention("Inner", maps.inner, maps) if maps.inner else _attention("Outer", maps.outer, maps)
    if maps.inner and maps.inner.tokens.per_patch > 1:
        said.append(_dependence(maps.inner))
    if AGGREGATORS[maps.config.model.inner.aggregate].weights_depend_on == "tokens":
        said += [_aggregation(name, found.maps, maps) for name, found in list(maps.aggregation.items())[-1:]]
    said += [_contribution(name, share, maps) for name, share in list(maps.contribution.items())[-1:]]
    if maps.without is not None:
        said.append(_on_off(maps.estimate, maps.without, maps))
    return said


def missing_parts(model: ModelConfig) -> dict[str, str]:
    """Why a part is not shown, by part: inner, aggregation, contribution, without."""
    inner, why = model.inner, {}
    ends_inner = model.program[-1][0] == "inner"
    if not model.blocks("inner"):
        plain = "this is a plain DiT: it has no inner path"
        return dict.fromkeys(("inner", "aggregation", "contribution", "without"), plain)
    mixer = MIXERS[inner.mixer]
    if mixer is None:
        why["inner"] = f"mixer={inner.mixer}: inner tokens do not see each other"
    elif not mixer.length(model):
        why["inner"] = f"mixer={inner.mixer}: {mixer.why_no_attention}"
    joins = not (len(model.program) == 2 and ends_inner)
    if not joins:
        why["aggregation"] = "the program ends in inner blocks, which draw the image themselves: nothing is aggregated"
    elif AGGREGATORS[inner.aggregate].weights_depend_on == "nothing":
        why["aggregation"] = f"aggregate={inner.aggregate}: each of the {model.sub_patches} sub-patches weighs the same"
    if joins and not FUSIONS[inner.fuse].keeps_outer:
        why["without"] = f"fuse={inner.fuse}: without the inner path nothing is left"
    return why


def not_shown(model: ModelConfig) -> list[str]:
    """What is missing, a sentence for each reason."""
    names = {
        "inner": "inner attention",
        "aggregation": "aggregation weights",
        "contribution": "share of the inner path",
        "without": "pictures without the inner path",
    }
    why = missing_parts(model)
    return [f"No {_list([names[part] for part in why if why[part] == r])}: {r}." for r in dict.fromkeys(why.values())]


def _ends(values: Array, maps: Maps, form: str = ".0%", unit: str = "") -> str:
    """Values (K,) at the first and the last time, and the extreme between them if it stands out from both."""
    times, last = maps.views.times, len(values) - 1
    turns = {int(values.argmin()), int(values.argmax())} - {0, last}
    far = {k for k in turns if min(abs(values[k] - values[0]), abs(values[k] - values[last])) > 0.02 * abs(values[k])}
    chosen = sorted({0, last} | far)
    form = ".2%" if form == ".0%" and max(values[chosen]) < 0.01 else form
    seen, when = [format(values[k], form) for k in chosen], [f"{times[k]:g}" for k in chosen]
    return f"{_list(seen)}{unit} at t = {_list(when)}"


def _list(items: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _attention(name: str, level: LevelAttention, maps: Maps) -> list[str]:
    entropy, own, distance = (x.mean((0, 2, 3, 4)) for x in (level.entropy, level.own, level.distance))
    token = "sub-patch" if name == "Inner" else "patch"
    seen = level.tokens.length
    even = format(1 / seen, ".1%" if seen < 100 else ".2%")
    if seen == 1:
        return [f"{name} attention: a {token} sees itself alone."]
    return [
        f"{name} attention has an entropy of {_ends(entropy, maps)}, where 100% is all {seen} alike: "
        f"a {token} gives itself {_ends(own, maps)} (all alike: {even}) and looks on average "
        f"{_ends(distance, maps, '.2f', f' {token}es away')} (all alike: {level.tokens.even_distance:.2f})."
    ]


def _dependence(level: LevelAttention) -> str:
    parts = level.variance()
    if not any(parts.values()):
        return "All inner attention weights are alike."
    most = max(parts, key=lambda name: parts[name])
    name = {"content": "what the patch holds", "position": "the positions", "time": "the time"}[most]
    return (
        f"Who sees whom depends most on {name}: of the variance of the inner weights, {parts['content']:.0%} lies "
        f"between patches and images, {parts['position']:.0%} between pairs of positions and {parts['time']:.1%} "
        "between times."
    )


def _aggregation(name: str, weights: Array, maps: Maps) -> str:
    heaviest = weights.max(-1).mean((0, 2)) * weights.shape[-1]
    return (
        f"Where a patch's token is made ({name}), the heaviest of its sub-patches weighs "
        f"{_ends(heaviest, maps, '.2f', ' times the mean')}."
    )


def _contribution(name: str, share: Array, maps: Maps) -> str:
    of = "the pixels that the two heads draw" if name == "inner_head" else f"a patch's token where it joins ({name})"
    return f"By norm, the inner path's share of {of} is {_ends(share.mean((0, 2)), maps)}."


def _on_off(on: Array, off: Array, maps: Maps) -> str:
    change = on - off  # N K C H W
    rms = np.sqrt(np.square(change).mean((0, 2, 3, 4)))
    if not rms.any():
        return "Without the inner path the image estimate is the same."
    said = (
        "Without the inner path the image estimate changes by a root mean square of "
        f"{_ends(rms, maps, '.2f')} (images lie in [-1, 1]); "
    )
    k = len(maps.views.times) // 2
    return said + (
        f"at t = {maps.views.times[k]:g}, {fine_share(change[:, k]):.0%} of the change is finest detail "
        f"(lost in 2x2 averages), of the estimate itself {fine_share(on[:, k]):.0%}, "
        f"of what is left {fine_share(off[:, k]):.0%}."
    )


def fine_share(images: Array) -> float:
    """Share of the variance within images (N, C, H, W) that 2x2 averages lose: the finest Haar level."""
    x = torch.from_numpy(images)
    centred = x - x.mean((2, 3), keepdim=True)
    return float(high_frequencies(x).square().sum() / centred.square().sum().clamp(min=1e-12))
