"""Maps as one HTML page that needs no network. The page embeds the arrays as text; the script of `page.html.j2`
plots them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image

from dit_in_dit.attention_maps.attention import LevelAttention
from dit_in_dit.attention_maps.findings import findings, missing_parts, not_shown
from dit_in_dit.attention_maps.inner_figures import spectra
from dit_in_dit.attention_maps.plan import PICTURE_PIXELS, evenly_chosen, left_out_sentences
from dit_in_dit.attention_maps.record import Maps
from dit_in_dit.config.program import format_stages
from dit_in_dit.data.picture import Array
from dit_in_dit.model.aggregate import AGGREGATORS
from dit_in_dit.reporting.images import to_image, to_pixels
from dit_in_dit.reporting.templates import render

STRIP = 9  # most sampler steps in a strip


def page(maps: Maps, classes: tuple[str, ...], title: str, step: int) -> str:
    """HTML of the page."""
    return render("attention_maps", "page.html.j2", data=payload(maps, classes, title, step))


def payload(maps: Maps, classes: tuple[str, ...], title: str, step: int) -> dict[str, Any]:
    """Data for the script of the page, with the keys that the script reads."""
    model, plan, views = maps.config.model, maps.plan, maps.views
    n, k = list(plan.images), list(plan.times)
    names = [classes[y] if model.num_classes and y < len(classes) else "" for y in views.labels]
    pictures = [maps.noisy, maps.estimate] + ([] if maps.without is None else [maps.without])
    return {
        "title": title,
        "about": f"{format_stages(model.program)}, step {step:,}: {model.patches} patches"
        + (f" of {model.sub_patches} sub-patches" if model.blocks("inner") else "")
        + f", {views.split} images, no guidance",
        "findings": findings(maps),
        "left_out": left_out_sentences(model, plan, len(views.images), len(views.times)),
        "missing": missing_parts(model),
        "not_shown": not_shown(model),
        "times": [views.times[j] for j in k],
        "all_times": list(views.times),
        "images": [{"name": names[i], "number": views.numbers[i]} for i in n],
        "grid": list(model.grid),
        "sub_grid": model.sub_grid,
        "clean": _sheet(views.images[n][None]),
        "pictures": [_sheet(np.stack([kind[i, k] for kind in pictures])) for i in n],
        "inner": None if maps.inner is None else _level(maps.inner, n, k),
        "outer": _level(maps.outer, n, k),
        "aggregation": {
            name: {"kind": model.inner.aggregate, "maps": _bytes(weights.maps[np.ix_(n, k)], 2)}
            for name, weights in maps.aggregation.items()
            if AGGREGATORS[model.inner.aggregate].weights_depend_on == "tokens"
        },
        "weighted": {
            name: _rounded(weights.position[0, 0])
            for name, weights in maps.aggregation.items()
            if AGGREGATORS[model.inner.aggregate].weights_depend_on == "position"
        },
        "contribution": {name: _floats(share[np.ix_(n, k)]) for name, share in maps.contribution.items()},
        "contribution_curves": {name: _rounded(share.mean((0, 2))) for name, share in maps.contribution.items()},
        **_draws(maps, classes),
    }


def _level(level: LevelAttention, n: list[int], k: list[int]) -> dict[str, Any]:
    layers, patches = list(level.plan.layers), level.tokens.patches
    statistics = {"entropy": level.entropy, "own": level.own, "distance": level.distance}  # N K layers heads T

    def per_patch(values: Array) -> dict[str, Any]:
        kept = values[np.ix_(n, k, layers)]
        return _floats(kept if level.plan.heads else kept.mean(3, keepdims=True))

    return {
        "blocks": level.blocks,
        "layers": layers,
        "heads": level.entropy.shape[3],
        "each_head": level.plan.heads,
        "per_patch": level.tokens.per_patch,
        "seen": level.tokens.length,
        "even_distance": level.tokens.even_distance,
        "grid": level.tokens.grid,
        "places": level.tokens.places.ravel().tolist() if level.reach.size else [],
        "group": (np.argsort(patches.ravel()) // patches.shape[1]).tolist(),  # of each patch
        **{name: per_patch(values) for name, values in statistics.items()},
        "received": _bytes(level.received, 1),
        "inside": _bytes(level.inside, 2) if level.inside.size else None,
        "reach": _bytes(level.reach, 1) if level.reach.size else None,
        "curves": {name: _rounded(values.mean((0, 4)).transpose(1, 2, 0)) for name, values in statistics.items()},
    }


def _draws(maps: Maps, classes: tuple[str, ...]) -> dict[str, Any]:
    """Data on the samples: trajectories, and samples with the inner path on and off."""
    samples, how = maps.draws, maps.config.sample
    labels = [classes[y] if maps.config.model.num_classes and y < len(classes) else "" for y in samples.labels]
    calls = list(evenly_chosen(range(len(samples.times)), STRIP))
    data: dict[str, Any] = {
        "sampler": f"{how.sampler}, {how.steps} steps, guidance {how.guidance:g}",
        "labels": labels,
        "strip_times": [samples.times[c] for c in calls],
        "strips": [
            _sheet(np.stack([x[calls, i] for x in (samples.noisy, samples.estimate)]))
            for i in range(samples.noisy.shape[1])
        ],
    }
    if samples.off is not None and maps.without is not None:
        rows = {"inner on": samples.on, "inner off": samples.off, "difference": samples.on - samples.off}
        data["on_off"] = _sheet(np.stack(list(rows.values())))
        data["spectra"] = {name: _rounded(spectra(images[:, None])[1][0]) for name, images in rows.items()}
        frequency, power = spectra(maps.estimate - maps.without)
        data["frequency"], data["change"] = _rounded(frequency), _rounded(power[list(maps.plan.times)])
    return data


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _floats(values: Array) -> dict[str, Any]:
    """An array as little-endian float32, base64."""
    return {"shape": values.shape, "floats": _text(values.astype("<f4").tobytes())}


def _bytes(values: Array, axes: int) -> dict[str, Any]:
    """An array as one byte per value, and the maxima: each block (the last `axes` axes) is scaled by its maximum."""
    blocks = tuple(range(values.ndim - axes, values.ndim))
    most = values.max(blocks, keepdims=True, initial=0)
    levels = np.rint(values / np.maximum(most, 1e-30) * 255).astype(np.uint8)
    return {"shape": values.shape, "bytes": _text(levels.tobytes()), "most": _text(most.astype("<f4").tobytes())}


def _rounded(values: NDArray[Any]) -> Any:
    """Nested lists of numbers with five digits."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda text: float(f"{float(text):.5g}"))


def _sheet(images: Array) -> dict[str, Any]:
    """Pictures (rows, columns, C, H, W) as one image in base64, and the size of each picture.

    The image is a PNG. If pictures are larger than `PICTURE_PIXELS`, they are scaled down and the image is a JPEG.
    """
    rows, columns = images.shape[:2]
    tiles = [to_image(pixels) for pixels in to_pixels(torch.from_numpy(images.reshape(-1, *images.shape[2:])))]
    width, height = tiles[0].size
    if small := max(width, height) > PICTURE_PIXELS:
        scale = PICTURE_PIXELS / max(width, height)
        width, height = max(1, round(width * scale)), max(1, round(height * scale))
        tiles = [tile.resize((width, height), Image.Resampling.LANCZOS) for tile in tiles]
    pixels = np.stack([np.asarray(tile.convert("RGB")) for tile in tiles])
    sheet = Image.fromarray(rearrange(pixels, "(r c) h w n -> (r h) (c w) n", r=rows, c=columns))
    file, kind = io.BytesIO(), "JPEG" if small else "PNG"
    sheet.save(file, kind, quality=90)
    return {"uri": f"data:image/{kind.lower()};base64,{_text(file.getvalue())}", "width": width, "height": height}
