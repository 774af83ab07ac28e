"""The time of each model part and of each kind of operation in a training step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from dit_in_dit.benchmark.subjects import BenchmarkSubject
from dit_in_dit.benchmark.timing import WARM_UP, clock, synchronize
from dit_in_dit.config.run import RunConfig
from dit_in_dit.inspection import cost
from dit_in_dit.inspection.hooks import forward_hooks
from dit_in_dit.model.nested import NestedDiT

INNER = ("inner_embed", "inner_blocks", "aggregate", "spread", "inner_head")  # the inner path
OUTER = ("outer_embed", "outer_blocks", "outer_head")
SHOWN_PARTS = {  # rows of the table, and the parts that each sums
    "outer blocks": ("outer_blocks",),
    "inner blocks": ("inner_blocks",),
    "aggregate": ("aggregate",),
    "spread": ("spread",),
    "heads": ("outer_head", "inner_head"),
    "embeddings": ("outer_embed", "inner_embed", "time_embed"),
    "loss": ("loss",),
    "optimizer": ("optimizer",),
    "rest": ("rest",),
}
KINDS = {  # kinds of operations, by names in torch's profiler; the first match counts
    "attention": r"scaled_dot|attention|softmax",
    "products": r"mm\b|mm_|linear|matmul|einsum",
    "convolutions": r"conv",
    "norms": r"layer_norm|rms_norm",
    "optimizer": r"adam",
    "copies": r"copy_|clone|contiguous|::cat|_to_copy|index|embedding|fill|zero|empty",
    "compiled": r"triton|graph_|CompiledFx|Compiled",
    "elementwise": r"add|mul|div|sub|gelu|silu|sum|mean|mse|sin|cos|exp|pow|neg",
}


class PartClock:
    """The moments at which parts of a step begin, on the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.now = device, clock(device)
        self.seen: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        """Mark the beginning of `part`."""
        with record_function(f"part {part}"):  # for the profiler
            if self.device.type == "cuda":
                moment: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                moment.record()
            else:
                synchronize(self.device)
                moment = self.now()
            self.seen.append((part, moment))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part between the first mark and the last; the last mark begins no part."""
        synchronize(self.device)
        sums: dict[str, float] = defaultdict(float)
        for (part, began), (_, ended) in pairwise(self.seen):
            sums[part] += began.elapsed_time(ended) / 1000 if self.device.type == "cuda" else ended - began
        return dict(sums)


def parts_of(model: NestedDiT) -> list[tuple[str, nn.Module]]:
    """The model's modules in the order in which they run, each with the part of `cost.macs` that it belongs to."""
    named = [(name, getattr(model, name)) for name in ("outer_embed", "inner_embed", "time_embed")]
    named += [("time_embed", part) for part in (model.label_embed, model.tokens, model.shared_modulation) if part]
    for stage in model.stages:
        level, starred, _ = str(stage.name).partition("*")
        named.append((f"{level}_blocks" if starred else level, stage))
    return named + [(head.name.replace(" ", "_"), head) for head in model.heads]


@contextmanager
def mark_parts(model: NestedDiT, mark: Callable[[str], None]) -> Iterator[None]:
    """Within a `with` block, call `mark` when a part begins, in the forward pass and in the backward pass.

    The backward pass runs the parts in reverse order.
    """

    def begin(part: str, *arguments: object) -> None:
        mark(part)

    def end(part: str, module: nn.Module, inputs: tuple[Tensor], output: object) -> None:
        mark("rest")
        passed = (*inputs, *inputs[0]) if isinstance(inputs[0], tuple) else inputs  # a stage's state passes through
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.grad_fn and all(tensor is not given for given in passed):
                tensor.grad_fn.register_prehook(lambda gradients: mark(part))  # the part's backward pass begins here

    parts = parts_of(model)
    after = [(module, partial(end, part)) for part, module in parts]
    with forward_hooks(after, [(module, partial(begin, part)) for part, module in parts], compiled=True):
        yield


def subject_for_parts(run: RunConfig, device: torch.device) -> BenchmarkSubject:
    """A warmed-up subject for `part_seconds`."""
    subject = BenchmarkSubject(run, device)
    for _ in range(WARM_UP):
        part_seconds(subject)
    return subject


def part_seconds(subject: BenchmarkSubject) -> dict[str, float]:
    """Seconds of a `subject_for_parts` subject's training step by part: parts of `cost.macs`, loss, optimizer, rest."""
    assert isinstance(subject.model, NestedDiT)
    marks = PartClock(subject.device)
    with mark_parts(subject.model, marks):
        synchronize(subject.device)
        marks("rest")
        subject.step(marks)
        marks("end")
    return marks.seconds()


def part_macs(subject: BenchmarkSubject) -> dict[str, int]:
    """MACs of a training step by part, for the whole batch."""
    macs = cost.training_macs(subject.run.model, subject.run.token_drop)
    macs["inner_blocks"] += macs.pop("condition")  # inner blocks compute it
    macs["time_embed"] += macs.pop("shared_modulation", 0)
    return {part: subject.run.train.batch_size * number for part, number in macs.items() if part != "total"}


def table_parts(parts: Mapping[str, float]) -> dict[str, float]:
    """The sum of the parts in each row of the table; sums of zero are left out."""
    sums = {row: sum(parts.get(part, 0) for part in members) for row, members in SHOWN_PARTS.items()}
    return {name: value for name, value in sums.items() if value}


def seconds_per_mac(seconds: Mapping[str, float], macs: Mapping[str, int], parts: tuple[str, ...]) -> float:
    """The total seconds of several parts, divided by their total MACs."""
    return sum(seconds.get(part, 0.0) for part in parts) / sum(macs[part] for part in parts)


def profile_by_part(subject: BenchmarkSubject, steps: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of a `subject_for_parts` subject's step, by part and kind of operation, from torch's profiler.

    Kinds are those of `KINDS`, and `other`. On CUDA, the seconds are device time.
    """
    assert isinstance(subject.model, NestedDiT)
    on_cuda = subject.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    marks = PartClock(subject.device)
    with mark_parts(subject.model, marks), profile(activities=activities) as profiler:
        for _ in range(steps):
            marks("rest")
            subject.step(marks)
        synchronize(subject.device)
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    part = "rest"
    events = [event for event in profiler.events() if event.device_type.name == "CPU"]
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith("part "):
            part = event.name.removeprefix("part ")
            continue
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        seconds[part][operation_kind(event.name)] += taken / 1e6 / steps
    return seconds


def operation_kind(operation: str) -> str:
    """The kind of an operation, from its name in the profiler."""
    return next((kind for kind, names in KINDS.items() if re.search(names, operation)), "other")


def table_kinds(kinds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Seconds by kind of operation for each row of the table."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row, parts in SHOWN_PARTS.items():
        for kind, seconds in chain.from_iterable(kinds.get(part, {}).items() for part in parts):
            sums[row][kind] += seconds
    return sums
