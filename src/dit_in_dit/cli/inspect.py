"""`presets`, `config` and `inspect`: presets, configs, and the cost of a model before it is trained."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import groupby
from typing import Any

from dit_in_dit.cli.options import Commands, add_config, chosen_config, print_table, whole_number
from dit_in_dit.config import presets
from dit_in_dit.config.field import FAMILIES, PUBLISHED
from dit_in_dit.config.files import from_file, to_yaml
from dit_in_dit.config.program import format_stages
from dit_in_dit.config.run import ModelConfig, RunConfig
from dit_in_dit.config.terms import TermsConfig
from dit_in_dit.config.token_drop import TokenDrop
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.runs.pretrained import ROOM, pretrained_models
from dit_in_dit.runtime.process import gc_paused

HEADINGS = {  # groups of presets, by the beginning of their names
    "dit-in-dit-": "nested models around the sizes of DiT",
    "dit-": "DiT (Peebles & Xie 2023), compared in tests with the official code facebookresearch/DiT: models.py",
    "emoji": "small models of equal MACs for the embedded emoji",
    "": "for own images: a nested model and its plain twin",
}


def add(commands: Commands) -> None:
    """Add the commands."""
    listed = commands.add("presets", _presets, "list the presets, and the trained models that ship with the package")
    listed.add_argument(
        "--family", type=str.lower, choices=FAMILIES, help="one family of published models, with parameters"
    )
    add_config(commands.add("config", _config, "print a resolved config, each key with its meaning"))
    inspect = commands.add("inspect", _inspect, "shapes, tokens, parameters, MACs and memory of a model")
    add_config(inspect)
    inspect.add_argument("--batch", type=whole_number, default=1, help="images per batch (default 1)")
    inspect.add_argument("--json", action="store_true", help="print JSON")


def _heading(name: str) -> str:
    """Heading of a preset's group."""
    if name in PUBLISHED:
        family = FAMILIES[PUBLISHED[name][0]]
        return f"{family.title} ({family.paper}), compared in docs/field.md with the official code {family.code}"
    return next(text for prefix, text in HEADINGS.items() if name.startswith(prefix))


def _presets(options: argparse.Namespace) -> None:
    names = [name for name in presets.NAMES if options.family in (None, PUBLISHED.get(name, ("",))[0])]
    for heading, group in groupby(names, _heading):
        print(f"# {heading}")
        for name in group:
            _print_model(name, presets.get(name).model, parameters=options.family is not None)
    if options.family:
        return
    print("\nTrained models, for commands that take a run (write models/NAME where NAME is also a preset):")
    for name, run in sorted(pretrained_models().items()):
        _print_model(f"{ROOM}/{name}", from_file(run / "config.yaml").model)


def _print_model(name: str, model: ModelConfig, *, parameters: bool = False) -> None:
    from dit_in_dit.inspection import cost  # imports torch

    millions = f"{cost.parameters(model)['total'] / 1e6:.1f}M " if parameters else ""  # builds the model: half a second
    size = "x".join(map(str, (*model.image_size, model.channels)))
    gmacs, stages = f"{cost.macs(model)['total'] / 1e9:.3f}", format_stages(model.program)
    print(f"{name:<24} {size:<12} p={model.patch_size:<3} D={model.outer.width:<5} {millions}{gmacs:>8} GMAC  {stages}")


def _config(options: argparse.Namespace) -> None:
    print(to_yaml(chosen_config(options), meanings=True), end="")


def _inspect(options: argparse.Namespace) -> None:
    with gc_paused():
        from dit_in_dit.inspection.cost import FORWARDS_PER_STEP
        from dit_in_dit.inspection.trace import inspect

        config = chosen_config(options)
        drop = config.token_drop
        how: Any = {"batch": options.batch, "recompute": config.train.recompute, "token_drop": drop}
        traced = inspect(config.model, **how)  # imports torch._dynamo
        without = replace(config.model, use_inner=False, internal_head=0)
        plain = inspect(without, **how)
        if config.train.optimizer == "muon":
            _add_optimizer(traced, config.model)
            _add_optimizer(plain, without)
        terms, averages = _terms_cost(config), _averages(config.train, 4 * traced["parameters"]["total"])
    if options.json:
        further = {name: part for name, part in (("terms", terms), ("averages", averages)) if part}
        print(json.dumps({**traced, **further, "plain": plain}, indent=1))
        return
    print(f"flow, batch {options.batch}")
    print_table([], [[row["name"], tuple(row["shape"])] for row in traced["flow"]])
    _print_beside(traced, plain)
    if terms:
        print("\nloss terms, per image and training step")
        step = traced["training_macs"]["total"] if drop else FORWARDS_PER_STEP * traced["macs"]["total"]
        rows = [
            [name, f"{n['parameters']:,}", f"{n['macs']:,}", f"{n['macs'] / step:.3f}"] for name, n in terms.items()
        ]
        print_table(["", "parameters", "MACs", "of the model's step"], rows)
        if size := terms.get("repa", {}).get("feature_bytes"):
            print(f"repa reads {size:,} bytes of features per image")
    print_table([], [[what, f"{size:,}"] for what, size in averages.items()], title="averages beside the first")
    if drop:
        print(f"\n{_about(drop, config.model)}")


def _print_beside(traced: dict[str, Any], plain: dict[str, Any]) -> None:
    """Print each count beside that of the plain DiT."""
    for name, what in (
        ("tokens", "per image"),
        ("token_layers", "per image: a token in a block"),
        ("parameters", ""),
        ("macs", "per image, forward"),
        ("training_macs", "per image, a step with token dropping"),
        ("activation_bytes", "kept for the backward pass, float32, whole batch"),
        ("moments", "numbers that muon and AdamW keep"),
        ("optimizer_macs", "per step, whatever the batch: muon on all matrices"),
    ):
        if name not in plain:
            continue
        large, scale = next((unit, s) for unit, s in (("G", 1e9), ("M", 1e6), ("", 1)) if plain[name]["total"] >= s)
        print(f"\n{name.replace('_', ' ')}{f', {what}' if what else ''}{f', in {large}' if large else ''}")
        rows = []
        for part in sorted({**traced[name], **plain[name]}, key="total".__eq__):  # the total comes last
            this, baseline = traced[name].get(part, 0), plain[name].get(part, 0)
            if this or baseline:
                amounts = (f"{amount / scale:,.{3 if large else 0}f}" for amount in (this, baseline))
                rows.append([part.replace("_", " "), *amounts, f"{this / baseline:.3f}" if baseline else None])
        print_table(["", "this", "plain DiT", "ratio"], rows)


def _add_optimizer(inspection: dict[str, Any], model: ModelConfig) -> None:
    """Add Muon's memory and work to the inspection of a model."""
    from dit_in_dit.inspection import optimizer_cost

    inspection["moments"] = optimizer_cost.moments(model, "muon")
    inspection["optimizer_macs"] = {"total": optimizer_cost.step_macs(model, "muon")}


def _terms_cost(config: RunConfig) -> dict[str, dict[str, int]]:
    if config.train.terms == TermsConfig():
        return {}
    from dit_in_dit.training.terms import terms_cost  # imports the training loop's libraries

    return terms_cost(config)


def _averages(train: TrainConfig, size: int) -> dict[str, int]:
    """Memory and files of the averages beside the first, for weights of `size` bytes; empty without any."""
    further, every = len(train.further_averages), train.ema_snapshot_every
    memory = {"averages": further, "bytes in memory and in each checkpoint": further * size} if further else {}
    if not every:
        return memory
    count, one = train.steps // every, len(train.ema_lengths or ()) * size
    return {**memory, "snapshots": count, "bytes of a snapshot": one, "bytes of all snapshots": count * one}


def _about(drop: TokenDrop, model: ModelConfig) -> str:
    """Line about the cost of a training step with token dropping."""
    from dit_in_dit.inspection.cost import training_macs

    share = training_macs(model, drop)["total"] / training_macs(model)["total"]
    return (
        f"token dropping in training: outer blocks {drop.first} to {drop.last} see {drop.kept} of {model.patches} "
        f"patches; a step has {share:.3f} of the dense step's MACs; activations are those of such a step"
    )
