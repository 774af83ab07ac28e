"""The results of a benchmark as JSON and as plots: subjects, parts, sweeps, and ratios with their goals."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch

from dit_in_dit import __version__
from dit_in_dit.benchmark.parts import SHOWN_PARTS, table_parts
from dit_in_dit.benchmark.subjects import Measurements, measurements_dict
from dit_in_dit.benchmark.sweep import Sweep
from dit_in_dit.reporting.plots import COLOURS, figure, figure_png, panel_grid
from dit_in_dit.runs import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PACKAGES = ("torch", "diffusers", "numpy", "triton", "timm")


@dataclass(frozen=True)
class Ratio:
    """A ratio, measured in each round, and its goal."""

    name: str
    how: str  # what was measured
    rounds: tuple[float, ...]
    limit: float | None = None  # the largest median that meets the goal; None: no goal
    at_least: bool = False  # whether `limit` is the smallest instead

    @property
    def value(self) -> float:
        """The median over the rounds."""
        return median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile."""
        if len(self.rounds) == 1:
            return self.value, self.value
        low, _, high = quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        judged = {"goal": self.limit, "at_least": self.at_least, "met": self.met, "rounds": list(self.rounds)}
        return {"name": self.name, "how": self.how, "ratio": self.value, "quartiles": list(self.quartiles), **judged}


@dataclass(frozen=True)
class Parts:
    """A training step by part, for the whole batch: seconds, MACs, and seconds of each kind of operation."""

    precision: str
    seconds: Mapping[str, float]
    macs: Mapping[str, int]
    kinds: Mapping[str, Mapping[str, float]]


@dataclass
class BenchmarkReport:
    """All measurements of a benchmark; subjects, parts and sweeps by name."""

    command: str  # repeats the benchmark
    device: torch.device
    products: dict[str, float] = field(default_factory=dict)  # MACs per second of the best matrix product, by precision
    ratios: list[Ratio] = field(default_factory=list)
    subjects: dict[str, Measurements] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # caveats for a reader

    def share(self, measured: Measurements) -> float:
        """MACs per second in training, divided by the MACs per second of the best matrix product."""
        return measured.macs_per_second / self.products[measured.precision]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {
            "command": self.command,
            "hardware": hardware(self.device),
            "versions": versions(),
            "product_macs_per_second": self.products,
            "ratios": [ratio.to_dict() for ratio in self.ratios],
            "subjects": {name: {**measurements_dict(m), "share": self.share(m)} for name, m in self.subjects.items()},
            "parts": {
                name: {"seconds": parts.seconds, "macs": parts.macs, "kinds": parts.kinds}
                for name, parts in self.parts.items()
            },
            "sweeps": {name: sweep.to_dict() for name, sweep in self.sweeps.items()},
            "notes": self.notes,
        }


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine's processor, accelerator and other properties on which times depend."""
    known: dict[str, Any] = {
        "device": str(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {"accelerator": properties.name, "accelerator_bytes": properties.total_memory}
    return known


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Versions of the installed packages on which times depend."""
    known = {"dit-in-dit": __version__, "python": platform.python_version(), "system": platform.system()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def draw_benchmark(report: BenchmarkReport, out: Path) -> list[Path]:
    """Write parts.png, throughput.png and sweeps.png, each if it was measured; UserError without matplotlib."""
    plots = {
        "parts.png": (report.parts, _draw_parts),
        "throughput.png": (report.subjects, _draw_throughput),
        "sweeps.png": (report.sweeps, _draw_sweeps),
    }
    pages = {out / name: draw(report) for name, (measurements, draw) in plots.items() if measurements}
    for path, page in pages.items():
        atomic.write_atomic(path, figure_png(page))
    return list(pages)


def _draw_parts(report: BenchmarkReport) -> Figure:
    """Plot the time of each part as a bar, and the part's share of the time divided by its share of the MACs."""
    rows = {name: table_parts(parts.seconds) for name, parts in report.parts.items()}
    page, axes = figure(1, 2, width=5.0, height=1.2 + 0.5 * len(rows))
    colour = dict(zip(SHOWN_PARTS, (*COLOURS, "#BBBBBB"), strict=True))
    for at, (name, row) in enumerate(rows.items()):
        macs, left = table_parts(report.parts[name].macs), 0.0
        time, count = sum(row.values()), sum(macs.values())
        for part, seconds in row.items():
            axes[0, 0].barh(at, seconds / time, left=left, color=colour[part], label=part)
            left += seconds / time
            if macs.get(part, 0) > 0.005 * count:
                axes[0, 1].plot(seconds / time / (macs[part] / count), at, "o", color=colour[part])
    for axis in axes[0]:
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
    axes[0, 0].set_xlabel("share of a training step's time")
    axes[0, 1].set_xlabel("share of the time / share of the MACs")
    axes[0, 1].axvline(1, color="grey", linewidth=0.8)
    _log(axes[0, 1], "x")
    shown_once = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    page.legend(list(shown_once.values()), list(shown_once), loc="outside lower center", ncols=5)
    return page


def _draw_throughput(report: BenchmarkReport) -> Figure:
    page, axes = figure(1, 1, width=8.0, height=4.5)
    for number, (name, measured) in enumerate(report.subjects.items()):
        at = measured.macs / 1e6, measured.macs_per_second / 1e9
        marker = "os^Dv*PX"[number // len(COLOURS) % 8]
        axes[0, 0].plot(*at, marker, color=COLOURS[number % len(COLOURS)], label=f"{name}, {measured.precision}")
    for dtype, speed in report.products.items():
        axes[0, 0].axhline(speed / 1e9, color="grey", linewidth=0.8)
        axes[0, 0].annotate(f"best matrix product, {dtype}", (0.01, speed / 1e9), xycoords=("axes fraction", "data"))
    _log(axes[0, 0], "x")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_xlabel("millions of MACs per image, forward")
    axes[0, 0].set_ylabel("training, 10^9 MACs per second")
    page.legend(loc="outside right upper", fontsize=7)
    return page


def _draw_sweeps(report: BenchmarkReport) -> Figure:
    page, axes = panel_grid(len(report.sweeps), min(2, len(report.sweeps)))
    for axis, (name, sweep) in zip(axes, report.sweeps.items(), strict=True):
        values, sizes = sweep.to_dict(), [point.size for point in sweep.points]
        for number, (what, label) in enumerate((("step", "step"), ("inner", "inner path"))):
            if what in values["exponents"]:
                seconds = [1000 * median(getattr(point, what)) for point in sweep.points]
                power = f"{label}: exponent {values['exponents'][what]:.2f}"
                axis.plot(sizes, seconds, "o-", color=COLOURS[number], label=power)
        _log(axis, "x")
        _log(axis, "y")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(values["label"])
        axis.legend(fontsize=8)
    axes[0].set_ylabel("milliseconds of a training step")
    return page


def _log(axes: Axes, which: str) -> None:
    """Set a logarithmic scale with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    scale = axes.xaxis if which == "x" else axes.yaxis
    scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    scale.set_minor_formatter(NullFormatter())
