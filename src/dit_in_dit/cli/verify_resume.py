"""`verify-resume`: test with a run whether stopping and resuming leaves every bit of the result unchanged."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from dit_in_dit.cli.options import Commands, add_device, whole_number
from dit_in_dit.config import plugins
from dit_in_dit.config.errors import UserError
from dit_in_dit.runs.pretrained import find_run


def add(commands: Commands) -> None:
    """Add the command."""
    about = "train a run's config twice for a few steps, stop and resume the second time, and compare every hash"
    verify = commands.add("verify-resume", _verify, about)
    verify.add_argument(
        "run_folder", type=find_run, metavar="RUN", help="the run whose config is trained; the run does not change"
    )
    verify.add_argument("--steps", type=whole_number, default=20, help="steps of the run without a stop (default 20)")
    verify.add_argument(
        "--stop", type=whole_number, metavar="STEP", help="the step at which the second run stops (default: half way)"
    )
    verify.add_argument(
        "--keep", type=Path, metavar="DIR", help="folder that keeps both runs (default: a temporary folder)"
    )
    add_device(verify)


def _verify(options: argparse.Namespace) -> None:
    from dit_in_dit.data.run_data import find_moved_data
    from dit_in_dit.runs.checkpoint import recorded_data
    from dit_in_dit.runs.folder import read_config

    config = read_config(options.run_folder)
    data = find_moved_data(config.data, recorded_data(options.run_folder))
    steps = min(options.steps, config.train.steps)
    stop = options.stop or steps // 2
    if not 0 < stop < steps:
        raise UserError(f"--stop must lie between 0 and {steps}, the last step: got {stop}")
    with tempfile.TemporaryDirectory() as temporary:
        place = options.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        start = ["--config", str(options.run_folder / "config.yaml"), "--set", f"data.source={data.source}"]
        for name, until, how in (
            ("unbroken", steps, start),
            ("stopped", stop, start),
            ("stopped", steps, ["--resume"]),
        ):
            where = ["--out", str(place / name), "--device", options.device, "--deterministic"]
            _train([*how, *where, "--until", str(until)])
        compared = _compare(place / "unbroken", place / "stopped")
    for name, (one, other) in compared.items():
        print(f"{'same' if one == other else 'DIFFERENT':<10} {name:<20} {one[:16]}  {other[:16]}")
    print(f"{steps} steps, and {stop} steps + a stop + {steps - stop} steps, on {options.device}")
    if any(one != other for one, other in compared.values()):
        print("dit-in-dit: a stopped and resumed run does NOT end as an unbroken one here", file=sys.stderr)
        sys.exit(1)


def _train(arguments: list[str]) -> None:
    """Train in a separate process, so that runs share no state."""
    command = [sys.executable, "-m", "dit_in_dit", "train", *arguments, *plugins.plugin_arguments()]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["without a message"]
        raise UserError(f"training ended with code {done.returncode}: {lines[-1]}")


def _compare(one: Path, other: Path) -> dict[str, tuple[str, str]]:
    """By file name, the SHA-256 in both runs: weights and optimizer moments, averaged weights, and the log."""
    from dit_in_dit.runs.checkpoint import newest
    from dit_in_dit.runs.integrity import file_sha256

    by_run = [{**newest(run).manifest["sha256"], "log.jsonl": file_sha256(run / "log.jsonl")} for run in (one, other)]
    return {name: (by_run[0][name], by_run[1].get(name, "missing")) for name in sorted(by_run[0])}
