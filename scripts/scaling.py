"""Print the tables of docs/scaling.md: memory, traffic and checkpoints of three presets on 8 to 512 H100.

    python scripts/scaling.py

Each row is one of `dit-in-dit recipe PRESET --gpus N --set train.batch_size=B --json`, with B as in the table.
"""

from __future__ import annotations

from collections.abc import Iterator

from dit_in_dit.config import presets
from dit_in_dit.config.files import override
from dit_in_dit.inspection.launch_plan import Recipe, recipe

PRESETS = ("dit-xl2", "dit-in-dit-xl2", "dit-in-dit-xl16")
BATCHES = {8: 256, 64: 1024, 512: 4096}  # GPUs: examples of a step
HEAD = (
    "| preset | GPUs | layout | batch | images a GPU x passes | recompute | state, GB | activations, GB | step, s | "
    "NVLink, GB | network, GB | links / step | images/s | checkpoint, GB | write, s |"
)


def plans() -> Iterator[tuple[str, Recipe]]:
    """The plan of each preset on each number of GPUs."""
    for name in PRESETS:
        for gpus, batch in BATCHES.items():
            setting = f"train.batch_size={batch}"
            yield name, recipe(name, override(presets.get(name), [setting]), gpus, settings=[setting])


def row(name: str, plan: Recipe) -> str:
    """A line of the table."""
    layout = f"HSDP {plan.shard} x {plan.gpus // plan.shard}" if plan.shard else "DDP"
    cells = [name, plan.gpus, layout, plan.rows * plan.accumulate * plan.gpus, f"{plan.rows} x {plan.accumulate}"]
    cells += [plan.recompute, f"{plan.state / 1e9:.1f}", f"{(plan.memory - plan.state) / 1e9:.1f}", f"{plan.step:.2f}"]
    cells += [f"{plan.inside / 1e9:.1f}", f"{plan.outside / 1e9:.2f}", f"{plan.links / plan.step:.0%}"]
    cells += [f"{plan.images:,.0f}", f"{plan.checkpoint / 1e9:.1f}", f"{plan.save:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def table() -> str:
    """The table in Markdown."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    return "\n".join([*lines, *(row(name, plan) for name, plan in plans())])


if __name__ == "__main__":
    print(table())
