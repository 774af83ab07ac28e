"""`study list`, `show` and `plan`: print studies, and the costs of their matched arms; nothing is trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_in_dit.cli.options import Commands, add_device, print_table
from dit_in_dit.config.program import format_stages

if TYPE_CHECKING:
    import torch

    from dit_in_dit.study.plan import Arm, Plan, StudyConfig


def add(study: Commands) -> None:
    """Add the subcommands."""
    study.add("list", _list, "list the studies that come with the package")
    show = study.add("show", _show, "print a study, as a start for your own study")
    show.add_argument("study", metavar="NAME|FILE")
    add_study(study.add("plan", _plan, "match the arms and print the cost of each arm; nothing is trained"))


def add_study(command: argparse.ArgumentParser) -> None:
    """Add the arguments that name a study and a device."""
    command.add_argument("study", metavar="NAME|FILE", help="a shipped study (see `study list`) or a YAML file")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as budget.steps=400")
    add_device(command)


def _list(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_study_config, shipped_studies

    for name in shipped_studies():
        study = read_study_config(name)
        many = f"{study.trials} trials" if study.search else f"{len(study.arms)} arms x {len(study.seeds)} seeds"
        print(f"{name:<12} {study.question}\n{'':<12} from {study.base}, {many}, equal {study.match}")


def _show(options: argparse.Namespace) -> None:
    from dit_in_dit.study.plan import read_study_config, shipped_studies

    read_study_config(options.study)  # an invalid study raises and is not printed
    print(shipped_studies().get(options.study, Path(options.study)).read_text(), end="")


def _plan(options: argparse.Namespace) -> None:
    from dit_in_dit.runtime.device import pick_device
    from dit_in_dit.study.plan import read_study_config

    print_costs(plan_named(options, read_study_config(options.study, options.set), pick_device(options.device)))


def plan_named(options: argparse.Namespace, study: StudyConfig, device: torch.device) -> Plan:
    """Plan the study that the command line names, with a spinner on stderr."""
    from rich.console import Console

    from dit_in_dit.study.planning import plan_study

    with Console(stderr=True).status("matching the arms and timing a step of each"):
        return plan_study(Path(options.study).stem, study, device)


def print_costs(plan: Plan) -> None:
    """Print each arm's cost and the keys that matching changed."""
    study = plan.study
    print(f"{plan.name}: {study.question}")
    held = "nothing is matched" if study.match == "none" else f"equal {study.match} within {study.tolerance:.1%}"
    steps = sorted({arm.config.train.steps for arm in plan.arms})
    span = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else steps[0]
    print(f"  {held}; {span} steps; seeds {', '.join(map(str, study.seeds))}")
    print_table(
        ["", "stages", "D", "E", "MMACs", "", "M params", "", "ms/step", "", "matched"],
        [_arm_row(arm) for arm in plan.arms],
    )


def _arm_row(arm: Arm) -> list[Any]:
    """An arm's model size, its costs with gaps to the arm it is compared with, and the keys that matching changed."""
    model = arm.config.model
    gap = {name: "" if arm.against == arm.name else f"{value:+.1%}" for name, value in arm.gap.items()}
    return [
        arm.name,
        format_stages(model.program),
        model.outer.width,
        model.inner.width if model.blocks("inner") else None,
        f"{arm.cost['macs'] / 1e6:.2f}",
        gap.get("macs", ""),
        f"{arm.cost['params'] / 1e6:.3f}",
        gap.get("params", ""),
        f"{1e3 * arm.cost['time']:.1f}" if "time" in arm.cost else None,
        gap.get("time", ""),
        "\n".join(f"{name} {before} -> {after}" for name, (before, after) in arm.matched.items()),
    ]
