"""Checks of the trained model: non-finite numbers, activations, attention, the inner path, the null class and seams.

Each check judges an observation (see `observe`). The reason for each threshold is beside the threshold.
"""

from __future__ import annotations

import math

import torch

from dit_in_dit.config.choices import crosses_patches
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.doctor import observe
from dit_in_dit.doctor.data_checks import CheckResult, DoctorSubject
from dit_in_dit.doctor.observe import LABEL_TIME, SEAM_TIME, LabelErrors, Observation
from dit_in_dit.model.aggregate import Gate
from dit_in_dit.model.embed import EMBEDS
from dit_in_dit.training.optimizer import learning_rate, reached_by_gradient


@torch.no_grad()
def check_finite_weights(patient: DoctorSubject) -> CheckResult:
    """Check that all parameters are finite, and all outputs on the examples that training would take next."""
    section, bad = CheckResult("finite"), observe.non_finite_parameters(patient)
    model, which = (patient.trainer.model, "trained") if bad else (patient.trainer.ema.model, "averaged")
    failures, examples = observe.non_finite_outputs(patient, model)
    counts = {"non-finite parameters": len(bad), "non-finite outputs": len(failures)}
    section.rows["finite"] = {"examples": examples, **counts}
    layer = ""
    if failures:
        name, example = failures[0]
        layer = f"; {name} ({which}) is the first layer whose output is not finite, at example {example}"
    if bad:
        name, number = next(iter(bad.items()))
        seen = f"{len(bad)} parameters are not finite; non-finite numbers in the first, {name}: {number}"
        earlier = "go back to an earlier checkpoint; lower train.learning_rate"
        advice = earlier if patient.trained else "start from another train.init"
        section.find("fault", "non-finite", seen + layer, advice)
    elif failures:
        half = patient.config.train.precision != "float32"
        advice = f"{'set train.precision=float32, or ' if half else ''}look at that example's image"
        section.find("fault", "non-finite", f"all parameters are finite{layer}", advice)
    return section


def check_activations(patient: DoctorSubject, observations: dict[float, Observation]) -> CheckResult:
    """Check the size and the variation of every block's tokens."""
    section, middle = CheckResult("activations"), list(observations.values())[len(observations) // 2].blocks
    for name in middle:
        tokens = torch.stack([o.blocks[name].float() for o in observations.values()])
        rms = tokens.flatten(1).square().mean(1).sqrt()
        size = tokens.square().mean().sqrt()
        deviation = tokens.flatten(0, -2).std(0)  # of each channel over times, images and tokens
        section.rows[name] = {
            **{f"rms t={t:g}": value for t, value in zip(observations, rms.tolist(), strict=True)},
            "max": tokens.abs().max().item(),
            "kurtosis": (tokens / size).pow(4).mean().item(),
            "dead": (deviation < 1e-3 * size).float().mean().item(),
        }
    large = [name for name, row in section.rows.items() if row["max"] > 3e4]
    if large:  # float16 ends at 65504; numbers of bfloat16 are 128 apart there
        seen = f"values up to {max(section.rows[name]['max'] for name in large):.3g} in {', '.join(large)}"
        decay = "raise" if patient.config.train.weight_decay else "add"
        section.find("warning", "activations", seen, f"lower train.learning_rate; {decay} train.weight_decay")
    dead = [name for name, row in section.rows.items() if row["dead"] > 0.5]
    if dead and patient.trained:  # half of the width costs compute and carries nothing
        seen = f"in {', '.join(dead)}, over half of the channels have the same value for every token, image and time"
        section.find("warning", "activations", seen, "reduce the width of that level, or lower train.learning_rate")
    return section


def check_attention(patient: DoctorSubject, observations: dict[float, Observation]) -> CheckResult:
    """Check every block's attention entropy, divided by log(length): 0 is all weight on one token, 1 is uniform."""
    section = CheckResult("attention entropy / log(length)")
    for name in next(iter(observations.values())).attention:
        weights = torch.stack([o.attention[name] for o in observations.values()])  # times N groups heads L L
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
    # Below 0.02 every query of every head gives 99.9% of its weight to one token.
    collapsed = [name for name, row in section.rows.items() if row["highest head"] < 0.02]
    if collapsed:
        seen = f"every head attends to a single token in {', '.join(collapsed)}"
        section.find("warning", "attention", seen, "lower train.learning_rate; lengthen train.warmup")
    # Closer to 1 than the rounding of float32: keys and queries have no effect.
    uniform = [name for name, row in section.rows.items() if row["lowest head"] > 1 - 1e-6]
    if uniform and patient.trained:
        seen = f"attention is uniform in every head of {', '.join(uniform)}"
        inner = all(name.startswith("inner_blocks.") for name in uniform)
        section.find("warning", "attention", seen, f"{'use inner.mixer=none, or ' if inner else ''}train longer")
    return section


def check_inner_path(patient: DoctorSubject, observations: dict[float, Observation]) -> CheckResult:
    """Check the gates, the weight of each sub-patch position, and the inner path's share of the tokens' norm."""
    section, first = CheckResult("inner path"), next(iter(observations.values()))
    for name in first.aggregation:
        weights = torch.stack([o.aggregation[name] for o in observations.values()]).abs().flatten(0, 3).mean(0)
        share = weights * len(weights) / weights.sum().clamp(min=1e-12)
        section.rows[f"{name}: weight x S"] = {"least": share.min().item(), "most": share.max().item()}
        section.series[name] = share.tolist()
        dead = (share < 0.01).nonzero().flatten().tolist()  # a hundredth of an equal share, over all patches and times
        if dead and patient.trained:
            seen = f"{name}: sub-patch positions {dead} of {len(share)} have almost no weight"
            section.find("warning", "aggregation", seen, "use inner.aggregate=mean, or a larger inner.sub_patch")
    for name in first.contribution:
        shares = {t: o.contribution[name].mean().item() for t, o in observations.items()}
        section.rows[f"{name}: share"] = {f"t={t:g}": share for t, share in shares.items()}
    modules = patient.trainer.ema.model.named_modules()
    gates = {name: module.gate.abs() for name, module in modules if isinstance(module, Gate)}
    # Adam can move a weight by the learning rate per step. A gate within a hundredth of that distance is unused.
    train = patient.config.train
    way = train.lr_scale.inner * sum(learning_rate(train, step) for step in range(patient.trainer.step))
    for number, (name, gate) in enumerate(gates.items()):
        section.rows[name] = {"mean |gate|": gate.mean().item(), "max |gate|": gate.max().item()}
        if gate.max() < 0.01 * way:
            where = f"{name}: the largest gate is {gate.max():.2g}"
            _judge_share(section, patient, f"aggregates.{number}", "gate", where)
    for name in first.contribution if not gates else ():
        _judge_share(section, patient, name, "inner path", name)
    return section


def _judge_share(section: CheckResult, patient: DoctorSubject, name: str, check: str, where: str) -> None:
    """Report an inner path that adds less than a quarter of 1/256, the rounding of bfloat16."""
    share = max(section.rows[f"{name}: share"].values())
    if patient.trained and share < 1e-3:
        seen = f"{where}; the inner path adds {share:.2g} of the norm of the tokens that it joins"
        other = ", or use inner.fuse=add" if check == "gate" else ""
        advice = f"train longer with a higher train.learning_rate{other}"
        section.find("fault" if check == "gate" else "warning", check, seen, advice)


@torch.no_grad()
def check_null_class(patient: DoctorSubject) -> CheckResult:
    """Check that the label table's last row means "no class": it has been trained, is no copy, and belongs to no class.

    Contrasts show whether the row belongs to a class. Row k must fit images of class k better, relative to the null
    row, than it fits other images. A difference of differences does not depend on how well each row is trained.
    """
    section, config, trainer = CheckResult("null class"), patient.config, patient.trainer
    null, own = config.model.num_classes, not config.model.tokens.adaln and config.model.tokens.rows == "own"
    name = "tokens.own.table.weight" if own else "label_embed.table.weight"
    if not null or not patient.trained:
        return section
    if not config.train.label_drop:
        section.find("note", "null class", "no label is dropped", "set train.label_drop above 0 to use guidance")
        return section
    table, initial = trainer.ema.model.get_parameter(name).cpu(), patient.initial[name]
    reached = reached_by_gradient(trainer.optimizer, trainer.model.get_parameter(name))
    advice = f"a dropped label must become {null} (model.num_classes); train again"
    if torch.equal(table[-1], initial[-1]) or (reached is not None and not reached[-1].any()):
        section.find("fault", "null class", "the null class's row never moved from its initial value", advice)
        return section
    copies = (table[:-1] == table[-1]).all(1).nonzero().flatten().tolist()
    if copies:
        section.find("fault", "null class", f"the null class's row equals that of class {copies[0]}", advice)
        return section
    if errors := observe.errors_by_label(patient):
        strength = _judge_labels(section, errors)
        _judge_contrasts(section, patient, errors, strength)
    return section


def _judge_labels(section: CheckResult, errors: LabelErrors) -> float:
    """Compare the errors under wrong and right classes; returns the mean difference in standard errors."""
    gap = (errors.wrong - errors.right)[~errors.wrong.isnan()]
    strength = (gap.mean() / (gap.std() / math.sqrt(len(gap))).clamp(min=1e-30)).item() if len(gap) > 1 else 0.0
    section.rows[f"held-out error, t={LABEL_TIME:g}"] = {
        "right class": errors.right.mean().item(),
        "null class": errors.null.mean().item(),
        "wrong class": errors.wrong.nanmean().item(),
    }
    if strength < -4:  # four standard errors: once in 30,000 by chance
        section.find(
            "fault", "labels", f"the right class gives larger errors than a wrong one ({strength:.1f} standard errors)",
            "class numbers have changed since training: compare the data's class names with the checkpoint's",
        )  # fmt: skip
    return strength


def _judge_contrasts(section: CheckResult, patient: DoctorSubject, errors: LabelErrors, strength: float) -> None:
    """Judge each class's row against the null row, in standard errors."""
    contrasts: dict[str, float] = {}
    for k, of_class in errors.by_class.items():
        own, difference = errors.y == k, of_class - errors.null
        if min(int(own.sum()), int((~own).sum())) < 3:
            continue
        contrast = difference[~own].mean() - difference[own].mean()
        error = (difference[~own].var() / (~own).sum() + difference[own].var() / own.sum()).sqrt()
        contrasts[patient.trainer.source.classes[k]] = (contrast / error.clamp(min=1e-30)).item()
    if contrasts:
        section.rows["contrast with the null row"] = contrasts
    if abs(strength) < 4:
        section.find(
            "note", "null class", f"right and wrong classes give the same error ({strength:.1f} standard errors)",
            "the null class cannot be judged; train longer if the class should matter",
        )  # fmt: skip
    # Three standard errors suffice where the classes matter: every contrast of a healthy run is above zero.
    elif contrasts and min(contrasts.values()) < -3:
        worst = min(contrasts, key=lambda name: contrasts[name])
        section.find(
            "fault", "null class",
            f"the null class fits images of class {worst!r} better than that class's own row does, and other images "
            f"worse ({contrasts[worst]:.1f} standard errors)",
            f"rows of the label table are swapped or shifted: the null class must be row "
            f"{patient.config.model.num_classes}, the last",
        )  # fmt: skip


@torch.no_grad()
def check_sampling_start(patient: DoctorSubject) -> CheckResult:
    """Check image estimates at t = 1, where sampling starts: the best ones have the mean of the images.

    Logit-normal times are hardly ever close to 1, so that a network may have to extrapolate there.
    """
    section = CheckResult("start of sampling, estimates at t=1")
    if not patient.trained or patient.config.diffusion.predict == "noise":  # noise at t = 1 tells nothing of the image
        return section
    images, real = observe.estimates(patient, 1.0, len(patient.held.x))
    deviation = real.std((0, 2, 3)).clamp(min=0.01)  # a channel may be constant
    excess = (images - real).mean((2, 3)) / deviation  # N C
    mean, error = excess.mean(0), excess.std(0) / math.sqrt(len(excess))
    section.rows["mean less that of the images / deviation"] = {
        f"channel {number}": value for number, value in enumerate(mean.tolist())
    }
    # Runs whose time embedding is smooth up to t = 1 show at most 0.1. Four standard errors: once in 30,000 by chance.
    far = (mean.abs() > 0.2) & (mean.abs() > 4 * error)
    if far.any():
        worst = mean[far][mean[far].abs().argmax()].item()
        seen = (
            f"the mean of the estimates deviates by {worst:+.2f} standard deviations of the images, and so will samples"
        )
        section.find("warning", "sampling start", seen, _reach_the_start(patient.config))
    return section


def _reach_the_start(config: RunConfig) -> str:
    """Advice on what lets a model know the times close to t = 1."""
    if config.diffusion.time == "logit_normal" and config.model.time_embed in ("dit", "diffusers"):
        return "train with model.time_embed=ddt, which is smooth up to t = 1"
    return "train longer" if config.diffusion.time == "uniform" else "raise diffusion.time_mean, or train longer"


@torch.no_grad()
def check_seams(patient: DoctorSubject) -> CheckResult:
    """Check image estimates for traces of the patch and sub-patch grid, relative to the images themselves."""
    section, model = CheckResult(f"seams, estimates at t={SEAM_TIME:g}"), patient.config.model
    if not patient.trained:
        return section
    images, real = observe.estimates(patient, SEAM_TIME)
    inner = {model.inner.sub_patch: "sub-patch"} if model.blocks("inner") else {}
    for period, what in ({**inner, model.patch_size: "patch"}).items():
        if period == 1 or period >= min(model.image_size):
            continue
        ratio = observe.seam_peaks(images, period) - observe.seam_peaks(real, period)
        profile = ratio - ratio.mean(1, keepdim=True)
        peak, repeats = profile.abs().max().item(), observe.periodic_share(images - real, period)
        section.rows[f"{what}, period {period}"] = {"seam peak": peak, "repeating share of the error": repeats}
        section.series[f"{what} profile"] = profile.mean(0).tolist()
        cells = real[:, 0].numel() / period**2
        _judge_seams(section, model, what, peak, repeats, cells)
        if section.findings:
            break  # a pattern that repeats with every sub-patch also repeats with every patch
    return section


def _judge_seams(
    section: CheckResult, model: ModelConfig, what: str, peak: float, repeats: float, cells: float
) -> None:
    # Errors independent of the grid average to 1/sqrt(cells). Healthy runs show twice that, since errors of
    # neighbours are correlated. A quarter of the error is a visible pattern.
    if repeats > max(0.25, 5 / math.sqrt(cells)):
        seen = f"{repeats:.0%} of the estimates' error repeats with every {what}"
        head = "inner" if what == "sub-patch" and model.program[-1][0] == "inner" else "outer"
        section.find("fault", "seams", seen, f"look at the bias of the {head} head; train longer")
    elif peak > 1:  # a jump over the border e times those inside; healthy runs of a few minutes show 0.2 to 0.4
        seen = f"differences between neighbouring pixels deviate by a factor of {math.exp(peak):.1f} along each {what}"
        section.find("warning", "seams", seen, _see_further(model))


def _see_further(model: ModelConfig) -> str:
    """Advice on changes, not yet in the config, that would let a model see past the borders of patches."""
    if not model.blocks("inner"):
        return "train longer, or use smaller patches"
    further = [] if EMBEDS[model.inner.embed].crosses_patches else ["inner.embed=conv"]
    further += [] if crosses_patches(model.inner.mixer) else ["inner.mixer=window"]
    return f"let the inner level see past its patch: {', '.join(further)}" if further else "train longer"
