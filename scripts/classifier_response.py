"""How the classifier's two scores answer to damaged real images and to models after more and more training.

    python scripts/classifier_response.py --models runs/emoji runs/emoji-dit runs/short@500 runs/short@2000 --out docs

Held-out emoji at 32x32 are damaged: blurred, cut into patches of 8 pixels that change places, labels permuted, four of
nine classes replaced by the others, one image repeated. Models are sampled without guidance (`--guidance` for another
scale), of runs on the nine groups, with the classes as frequent as in the held-out images. Writes
classifier-response.json and .png.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from corruptions import CORRUPTIONS
from dit_in_dit.config import presets
from dit_in_dit.data.sources import open_source
from dit_in_dit.interop.resolve import open_guide
from dit_in_dit.metrics.classifier import Classifier, LabelledImages, find_classifier, held_out_part
from dit_in_dit.metrics.classifier_scores import classifier_scores
from dit_in_dit.metrics.score import Score
from dit_in_dit.reporting import plots
from dit_in_dit.reporting.images import Pixels, to_pixels
from dit_in_dit.runs import atomic
from dit_in_dit.sampling.numbered import sample_batches

PATCH = 8


def shuffle_patches(images: Pixels) -> Pixels:
    """Each image's patches in a random order."""
    draw = np.random.default_rng(0)
    n, height, width, channels = images.shape
    rows, columns = height // PATCH, width // PATCH
    cut = images.reshape(n, rows, PATCH, columns, PATCH, channels).swapaxes(2, 3)
    cut = cut.reshape(n, rows * columns, PATCH, PATCH, channels)
    cut = np.stack([each[draw.permutation(rows * columns)] for each in cut])
    return cut.reshape(n, rows, columns, PATCH, PATCH, channels).swapaxes(2, 3).reshape(images.shape)


def damaged(real: LabelledImages) -> dict[str, LabelledImages]:
    """The real images after each damage."""
    draw, images, labels = np.random.default_rng(0), real.images, real.labels
    blurred = {f"blur {s:g} pixels": replace(real, images=CORRUPTIONS["blur"](images, s)) for s in (0.8, 2.0)}
    kept = np.flatnonzero(labels % 2 == 0)
    wrong = np.where(labels % 2 == 0, np.arange(len(labels)), kept[draw.integers(len(kept), size=len(labels))])
    return {
        "held-out real images": real,
        **blurred,
        "patches change places": replace(real, images=shuffle_patches(images)),
        "labels permuted": replace(real, labels=draw.permutation(labels)),
        "four classes missing": replace(real, images=images[wrong]),
        "one image repeated": replace(real, images=np.repeat(images[:1], len(images), axis=0)),
    }


def samples(model: str, labels: NDArray[np.int64], guidance: float) -> LabelledImages:
    """Samples of a run, RUN@STEP or pretrained model, of these classes."""
    weights = open_guide(model, torch.device("cpu"))
    config = replace(weights.config, sample=replace(weights.config.sample, guidance=guidance))
    batches = sample_batches(weights.net, config, range(len(labels)), seed=0, classes=labels.tolist())
    return LabelledImages(np.concatenate([to_pixels(x) for _, x in batches]), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["emoji", "emoji-dit"])
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    preset = presets.get("emoji")
    source = open_source(preset.data, preset.model)
    *_, classifier = find_classifier(source, (32, 32, 3), flip=preset.data.flip)
    assert isinstance(classifier, Classifier)
    real = held_out_part(source)
    sets = damaged(real) | {Path(name).name: samples(name, real.labels, options.guidance) for name in options.models}
    scores = {name: classifier_scores(classifier, images, real) for name, images in sets.items()}
    table = {name: {key: asdict(score) for key, score in found.items()} for name, found in scores.items()}
    about = {"images": len(real.labels), "guidance": options.guidance, "classifier": classifier.identity}
    (options.out / "classifier-response.json").write_text(json.dumps({**about, "scores": table}, indent=1) + "\n")
    draw(scores, options.out / "classifier-response.png")
    for name, found in scores.items():
        print(f"{name:24}", *(f"{key} {score.value:.3f}" for key, score in found.items()))


def draw(scores: dict[str, dict[str, Score]], path: Path) -> None:
    """A panel for each score, with intervals, and real images' own score as a line."""
    made, axes = plots.figure(1, 2, width=4.6, height=3.6)
    names = list(scores)
    for axis, key in zip(axes[0], ("classifier.accuracy", "classifier.frechet"), strict=True):
        found = [scores[name][key] for name in names]
        values = np.array([score.value for score in found])
        reach = np.array([[score.value - (score.low or 0), (score.high or 0) - score.value] for score in found]).T
        axis.barh(range(len(names)), values, xerr=np.abs(reach), color=plots.COLOURS[0], height=0.6)
        axis.axvline(found[0].floor or 0, color=plots.COLOURS[6], linestyle="--", linewidth=1)
        axis.set_yticks(range(len(names)), names if axis is axes[0, 0] else [""] * len(names))
        axis.invert_yaxis()
        axis.set_title(f"{key} (dashed: real images)")
    axes[0, 1].set_xscale("log")
    axes[0, 1].set_xlim(left=0.5)
    atomic.write_atomic(path, plots.figure_png(made))


if __name__ == "__main__":
    main()
