"""What `doctor` checks about the model at work: non-finite numbers, activations, attention, the inner path,
the null class and seams. A check measures, then judges what it measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dit_in_dit.config.choices import crosses_patches
from dit_in_dit.config.run import ModelConfig
from dit_in_dit.diffusion.objective import EVALUATION_TIMES
from dit_in_dit.doctor.data_checks import CHUNK, CheckResult, Patient, batches, forward_budget, take_examples
from dit_in_dit.inspection.hooks import (
    forward_hooks,
    watch_aggregation,
    watch_attention,
    watch_blocks,
    watch_contribution,
)
from dit_in_dit.model.aggregate import Gate
from dit_in_dit.model.embed import EMBEDS
from dit_in_dit.model.mixers import MIXERS
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.training.batches import Batch, Examples
from dit_in_dit.training.optimizer import touched
from dit_in_dit.training.trainer import learning_rate

LABEL_TIME = 0.7  # where the class tells most that the noisy image does not: .65 on mosaic, .8 on emoji
SEAM_TIME = 0.5  # estimates are neither copies of the input nor a mean image
SEAM_IMAGES = 64
ROWS = 12  # classes tried on every held-out image
ATTENTION_BYTES = 2**28


# ------------------------------------------------------------------------------------------ non-finite


@contextmanager
def watch_finite(model: NestedDiT, images: int) -> Iterator[list[tuple[str, int]]]:
    """The first module whose output is not finite in a forward pass of `images` images, by name, and the image."""
    found: list[tuple[str, int]] = []

    def hook(name: str, module: nn.Module, given: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in tensors if not found else ():
            bad = ~torch.isfinite(tensor)
            if bad.any():  # rows are images, or groups of tokens of image after image
                row = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
                found.append((name, row * images // len(tensor)))

    with forward_hooks((module, partial(hook, name)) for name, module in model.named_modules()):
        yield found


@torch.no_grad()
def finite(patient: Patient) -> CheckResult:
    """Parameters, and a forward pass on the examples that training would see next."""
    section, trainer = CheckResult("finite"), patient.trainer
    bad = {
        f"{name} ({which})": int((~torch.isfinite(parameter)).sum())
        for which, model in (("trained", trainer.model), ("averaged", trainer.ema.model))
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter).all()
    }
    first = trainer.step * patient.config.global_batch
    count = min(len(patient.examples.x), forward_budget(patient.config, trainer.device))
    batch = take_examples(Examples(trainer.source, patient.config), first, count)
    model, where = (trainer.model, "trained") if bad else (trainer.ema.model, "averaged")
    seen: list[tuple[str, int]] = []
    for number, part in enumerate(batches(batch)):
        x, noise, t, y, _ = (tensor.to(trainer.device) for tensor in part)
        with watch_finite(model, len(x)) as found, trainer.autocast():
            model(trainer.objective.noisy(x, noise, t), t, y)
        seen += [(name, first + number * CHUNK + row) for name, row in found]
        if seen:
            break
    section.rows["finite"] = {
        "examples": len(batch.x),
        "non-finite parameters": len(bad),
        "non-finite outputs": len(seen),
    }
    layer = (
        f"; {seen[0][0]} ({where}) is the first layer whose output is not finite, at example {seen[0][1]}"
        if seen
        else ""
    )
    if bad:
        name, number = next(iter(bad.items()))
        what = f"{len(bad)} parameters are not finite, the first is {name}: {number} of its numbers"
        advice = (
            "go back to an earlier checkpoint; lower train.learning_rate"
            if patient.trained
            else "begin with another train.init"
        )
        section.find("fault", "non-finite", what + layer, advice)
    elif seen:
        half = patient.config.train.precision != "float32"
        advice = f"{'set train.precision=float32, or ' if half else ''}look at that example's image"
        section.find("fault", "non-finite", f"all parameters are finite{layer}", advice)
    return section


# ------------------------------------------------------------------------------------------ inside


@dataclass
class Observation:
    """What hooks saw at one time t: tokens by block, attention and aggregation weights, the inner path's share."""

    blocks: dict[str, Tensor]
    attention: dict[str, Tensor]
    aggregation: dict[str, Tensor]
    contribution: dict[str, Tensor]


@torch.no_grad()
def observe(patient: Patient) -> dict[float, Observation]:
    """The averaged model on some held-out images, at the times of the held-out error."""
    model, device = patient.trainer.ema.model, patient.trainer.device
    config = patient.config.model
    mixer = MIXERS[config.inner.mixer]
    longest = max(config.patches, mixer.length(config) if mixer else 0)
    heads = config.outer.num_heads * config.blocks("outer") + config.inner.num_heads * config.blocks("inner")
    most = max(1, ATTENTION_BYTES // (4 * heads * longest**2))
    count = min(16, most, forward_budget(patient.config, device))
    x, noise, _, y, _ = (part[:: max(1, len(part) // count)][:count].to(device) for part in patient.held)
    seen = {}
    for t in EVALUATION_TIMES:
        times = patient.trainer.objective.path.snap(torch.full((len(x),), t, device=device))
        with (
            watch_blocks(model) as blocks,
            watch_attention(model) as attention,
            watch_aggregation(model) as aggregation,
            watch_contribution(model) as contribution,
        ):
            model(patient.trainer.objective.noisy(x, noise, times), times, y)
        seen[t] = Observation(blocks, attention, aggregation, contribution)
    return seen


def activations(patient: Patient, seen: dict[float, Observation]) -> CheckResult:
    """Size and shape of every block's tokens."""
    section, middle = CheckResult("activations"), list(seen.values())[len(seen) // 2].blocks
    for name in middle:
        tokens = torch.stack([o.blocks[name].float() for o in seen.values()])
        rms = tokens.flatten(1).square().mean(1).sqrt()
        size, spread = (
            tokens.square().mean().sqrt(),
            tokens.flatten(0, -2).std(0),
        )  # of each channel over times, images and tokens
        section.rows[name] = {
            **{f"rms t={t:g}": value for t, value in zip(seen, rms.tolist(), strict=True)},
            "max": tokens.abs().max().item(),
            "kurtosis": (tokens / size).pow(4).mean().item(),
            "dead": (spread < 1e-3 * size).float().mean().item(),
        }
    large = [name for name, row in section.rows.items() if row["max"] > 3e4]
    if large:  # half precision ends at 65504; bfloat16 steps there are 128 wide
        what = f"values up to {max(section.rows[name]['max'] for name in large):.3g} in {', '.join(large)}"
        decay = "raise" if patient.config.train.weight_decay else "add"
        section.find("warning", "activations", what, f"lower train.learning_rate; {decay} train.weight_decay")
    dead = [name for name, row in section.rows.items() if row["dead"] > 0.5]
    if dead and patient.trained:  # half of the width is paid for and carries nothing
        what = f"over half of the channels are the same for every token, image and time in {', '.join(dead)}"
        section.find("warning", "activations", what, "make that level narrower, or lower train.learning_rate")
    return section


def attention(patient: Patient, seen: dict[float, Observation]) -> CheckResult:
    """Entropy of the attention over log(length), of every block: 0 is one token, 1 is all alike."""
    section = CheckResult("attention entropy / log(length)")
    for name in next(iter(seen.values())).attention:
        weights = torch.stack([o.attention[name] for o in seen.values()])  # times N groups heads L L
        length = weights.shape[-1]
        if length == 1:
            continue
        entropy = torch.special.entr(weights).sum(-1) / math.log(length)
        heads = entropy.movedim(3, 0).flatten(1).mean(1)
        section.rows[name] = {
            "length": length,
            "mean": heads.mean().item(),
            "lowest head": heads.min().item(),
            "highest head": heads.max().item(),
        }
    # Below 0.02 every query of every head gives 99.9% to one token.
    collapsed = [name for name, row in section.rows.items() if row["highest head"] < 0.02]
    if collapsed:
        what = f"every head looks at one token in {', '.join(collapsed)}"
        section.find("warning", "attention", what, "lower train.learning_rate; lengthen train.warmup")
    # Nearer to 1 than float32 rounds: keys and queries do nothing at all.
    alike = [name for name, row in section.rows.items() if row["lowest head"] > 1 - 1e-6]
    if alike and patient.trained:
        what = f"every head weighs all tokens alike in {', '.join(alike)}"
        inner = all(name.startswith("inner_blocks.") for name in alike)
        section.find("warning", "attention", what, f"{'use inner.mixer=none, or ' if inner else ''}train longer")
    return section


def inner_path(patient: Patient, seen: dict[float, Observation]) -> CheckResult:
    """Weights of the sub-patch positions, gates, and the inner path's share of the outer tokens' norm."""
    section, model = CheckResult("inner path"), patient.trainer.ema.model
    for name in next(iter(seen.values())).aggregation:
        weights = torch.stack([o.aggregation[name] for o in seen.values()]).abs().flatten(0, 3).mean(0)
        share = weights * len(weights) / weights.sum().clamp(min=1e-12)
        section.rows[f"{name}: weight x S"] = {"least": share.min().item(), "most": share.max().item()}
        section.series[name] = share.tolist()
        dead = (share < 0.01).nonzero().flatten().tolist()  # a hundredth of an even share, over all patches and times
        if dead and patient.trained:
            what = f"{name}: sub-patch positions {dead} of {len(share)} weigh nothing"
            section.find("warning", "aggregation", what, "use inner.aggregate=mean, or a larger inner.sub_patch")
    for name in next(iter(seen.values())).contribution:
        shares = {t: o.contribution[name].mean().item() for t, o in seen.items()}
        section.rows[f"{name}: share"] = {f"t={t:g}": share for t, share in shares.items()}
    gates = {name: module.gate.abs() for name, module in model.named_modules() if isinstance(module, Gate)}
    for number, (name, gate) in enumerate(gates.items()):
        section.rows[name] = {"mean |gate|": gate.mean().item(), "max |gate|": gate.max().item()}
        # Adam can move a weight by the learning rate a step: a hundredth of that way is no use of it.
        train = patient.config.train
        way = train.lr_scale.inner * sum(learning_rate(train, step) for step in range(patient.trainer.step))
        if gate.max() < 0.01 * way:
            _judge_share(
                section, patient, f"aggregates.{number}", "gate", f"{name}: the largest gate is {gate.max():.2g}"
            )
    for name in next(iter(seen.values())).contribution if not gates else ():
        _judge_share(section, patient, name, "inner path", name)
    return section


def _judge_share(section: CheckResult, patient: Patient, name: str, check: str, where: str) -> None:
    """A fault where the inner path adds less than bfloat16 rounds away (1/256, and a margin of four)."""
    share = max(section.rows[f"{name}: share"].values())
    if patient.trained and share < 1e-3:
        seen = f"{where}; the inner path is {share:.2g} of the norm of what it joins"
        other = ", or use inner.fuse=add" if check == "gate" else ""
        advice = f"train longer with a higher train.learning_rate{other}"
        section.find("fault" if check == "gate" else "warning", check, seen, advice)


# ------------------------------------------------------------------------------------------ null class


@torch.no_grad()
def null_class(patient: Patient) -> CheckResult:
    """Whether the label table's last row means "no class": it has moved, is no copy, and belongs to no class.

    The last by what a row does: row k must fit images of class k better, against the null row, than it fits
    others. A difference of differences, so that it does not matter how well each row is trained.
    """
    section, config, trainer = CheckResult("null class"), patient.config, patient.trainer
    null, name = config.model.num_classes, "label_embed.table.weight"
    if not null or not patient.trained:
        return section
    if not config.train.label_drop:
        section.find("note", "null class", "no label is dropped", "set train.label_drop above 0 to use guidance")
        return section
    table, initial = trainer.ema.model.label_embed.table.weight.cpu(), patient.initial[name]
    reached = touched(trainer.optimizer, trainer.model.label_embed.table.weight)
    advice = f"labels must be dropped to {null} (model.num_classes); train anew"
    if torch.equal(table[-1], initial[-1]) or (reached is not None and not reached[-1].any()):
        section.find("fault", "null class", "the null class's row never moved from its initial value", advice)
        return section
    copies = (table[:-1] == table[-1]).all(1).nonzero().flatten().tolist()
    if copies:
        section.find("fault", "null class", f"the null class's row is that of class {copies[0]}", advice)
        return section
    _judge_rows(section, patient)
    return section


def _judge_rows(section: CheckResult, patient: Patient) -> None:
    trainer, null = patient.trainer, patient.config.model.num_classes
    names, present = trainer.source.classes, sorted(set(patient.held.y.tolist()))
    if len(present) < 2:
        return  # no image has a wrong class to be compared with
    tried = present if len(present) <= ROWS else present[:: -(-len(present) // ROWS)]
    images = min(len(patient.held.y), 5 * forward_budget(patient.config, trainer.device) // (len(tried) + 2))
    keep = torch.linspace(0, len(patient.held.y) - 1, max(images, 2)).long()
    x, noise, y = patient.held.x[keep], patient.held.noise[keep], patient.held.y[keep]

    def errors(labels: Tensor) -> Tensor:
        parts = batches(Batch(x, noise, torch.zeros(len(x)), labels, labels))
        device, model = trainer.device, trainer.ema.model
        return torch.cat([
            trainer.objective.denoising_error(
                model, part.x.to(device), part.noise.to(device), LABEL_TIME, part.y.to(device)
            )[0].cpu().double()
            for part in parts
        ])  # fmt: skip

    right, none = errors(y), errors(torch.full_like(y, null))
    rows = {k: errors(torch.full_like(y, k)) for k in tried}
    wrong = torch.stack([torch.where(y == k, torch.nan, rows[k]) for k in tried]).nanmean(0)
    gap = (wrong - right)[~wrong.isnan()]
    strength = _score(gap)
    section.rows[f"held-out error, t={LABEL_TIME:g}"] = {
        "right class": right.mean().item(),
        "null class": none.mean().item(),
        "wrong class": wrong.nanmean().item(),
    }
    # Four standard errors: once in 30,000 by chance.
    if strength < -4:
        section.find(
            "fault", "labels", f"the right class gives larger errors than a wrong one ({strength:.1f} standard errors)",
            "class numbers have changed since training: compare the data's class names with the checkpoint's",
        )  # fmt: skip
    for k in tried:
        own, difference = y == k, rows[k] - none
        if min(int(own.sum()), int((~own).sum())) < 3:
            continue
        contrast = difference[~own].mean() - difference[own].mean()
        error = (difference[~own].var() / (~own).sum() + difference[own].var() / own.sum()).sqrt()
        section.rows.setdefault("contrast with the null row", {})[names[k]] = (contrast / error.clamp(min=1e-30)).item()
    # Three here, where the classes are known to matter: every contrast of a healthy run is above zero.
    contrasts = section.rows.get("contrast with the null row", {})
    if abs(strength) >= 4 and contrasts and min(contrasts.values()) < -3:
        worst = min(contrasts, key=lambda name: contrasts[name])
        section.find(
            "fault", "null class",
            f"the null class fits images of class {worst!r} better than that class's own row does, and other images "
            f"worse ({contrasts[worst]:.1f} standard errors)",
            f"rows of the label table are swapped or shifted: the null class must be row {null}, the last",
        )  # fmt: skip
    elif abs(strength) < 4:
        section.find(
            "note", "null class", f"right and wrong classes give the same error ({strength:.1f} standard errors)",
            "the null class cannot be judged; train longer if the class should matter",
        )  # fmt: skip


def _score(values: Tensor) -> float:
    """Mean over its standard error."""
    return (values.mean() / (values.std() / math.sqrt(len(values))).clamp(min=1e-30)).item() if len(values) > 1 else 0.0


# ------------------------------------------------------------------------------------------ seams


def seam_peaks(images: Tensor, period: int) -> Tensor:
    """Log of the mean |difference of neighbours| by position mod `period`, down and across, (2, period).

    Entry period - 1 is the step over the border between two cells. Needs images larger than the period.
    """
    profiles = []
    for axis in (2, 3):
        steps = images.diff(dim=axis).abs().movedim(axis, 0).flatten(1).mean(1)
        cells = torch.nn.functional.pad(steps, (0, -len(steps) % period), value=torch.nan).view(-1, period)
        profiles.append(cells.nanmean(0))
    return torch.stack(profiles).clamp(min=1e-12).log()


def pattern(errors: Tensor, period: int) -> float:
    """The part of errors (N, C, H, W) that repeats every `period` pixels, rms over that of the errors."""
    cells = errors.unfold(2, period, period).unfold(3, period, period).mean((0, 2, 3))  # C period period
    repeats = cells - cells.mean((1, 2), keepdim=True)
    return (repeats.square().mean() / errors.square().mean().clamp(min=1e-30)).sqrt().item()


@torch.no_grad()
def seams(patient: Patient) -> CheckResult:
    """Traces of the patch and sub-patch grid in image estimates of held-out images, against the images' own."""
    section, trainer, config = (
        CheckResult(f"seams, estimates at t={SEAM_TIME:g}"),
        patient.trainer,
        patient.config.model,
    )
    if not patient.trained:
        return section
    count = min(SEAM_IMAGES, len(patient.held.x), forward_budget(patient.config, trainer.device))
    keep = torch.linspace(0, len(patient.held.x) - 1, count).long()
    estimates, real = [], patient.held.x[keep]
    for part in batches(Batch(*(column[keep] for column in patient.held))):
        x, noise, _, y, _ = (tensor.to(trainer.device) for tensor in part)
        t = trainer.objective.path.snap(torch.full((len(x),), SEAM_TIME, device=trainer.device))
        estimates.append(trainer.objective.estimate(trainer.ema.model, x, noise, t, y)[1].cpu())
    images = torch.cat(estimates)
    inner = {config.inner.sub_patch: "sub-patch"} if config.blocks("inner") else {}
    for period, what in ({**inner, config.patch_size: "patch"}).items():
        if period == 1 or period >= min(config.image_size):
            continue
        ratio = seam_peaks(images, period) - seam_peaks(real, period)
        profile = ratio - ratio.mean(1, keepdim=True)
        peak, repeats = profile.abs().max().item(), pattern(images - real, period)
        section.rows[f"{what}, period {period}"] = {"seam peak": peak, "repeating share of the error": repeats}
        section.series[f"{what} profile"] = profile.mean(0).tolist()
        cells = count * real[0, 0].numel() / period**2
        _judge_seams(section, config, what, peak, repeats, cells)
        if section.findings:
            break  # what repeats with every sub-patch repeats with every patch
    return section


def _judge_seams(
    section: CheckResult, model: ModelConfig, what: str, peak: float, repeats: float, cells: float
) -> None:
    # Errors that know nothing of the grid average to 1/sqrt(cells); healthy runs show twice that, since errors of
    # neighbours go together. A quarter of the error is a pattern that everyone sees.
    if repeats > max(0.25, 5 / math.sqrt(cells)):
        seen = f"{repeats:.0%} of the estimates' error repeats with every {what}"
        head = "inner" if what == "sub-patch" and model.program[-1][0] == "inner" else "outer"
        section.find("fault", "seams", seen, f"look at the bias of the {head} head; train longer")
    elif peak > 1:  # a step over the border e times that inside; healthy runs of a few minutes show 0.2 to 0.4
        seen = f"steps between neighbours deviate by a factor of {math.exp(peak):.1f} along each {what}"
        section.find("warning", "seams", seen, _see_further(model))


def _see_further(model: ModelConfig) -> str:
    """What would let a model draw over the borders of patches, as far as it does not do so yet."""
    if not model.blocks("inner"):
        return "train longer, or use smaller patches"
    further = [] if EMBEDS[model.inner.embed].crosses_patches else ["inner.embed=conv"]
    further += [] if crosses_patches(model.inner.mixer) else ["inner.mixer=window"]
    return f"let the inner level see past its patch: {', '.join(further)}" if further else "train longer"
