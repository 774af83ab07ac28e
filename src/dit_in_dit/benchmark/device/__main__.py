"""`python -m dit_in_dit.benchmark.device --seconds 520 --out DIR`: the device check (docs/gpu.md)."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
import tempfile
import zipfile
from importlib import import_module
from pathlib import Path

import dit_in_dit
from dit_in_dit.benchmark.device.cases import Cases, NotHere
from dit_in_dit.benchmark.device.check import DeviceCheck
from dit_in_dit.benchmark.device.plan import DEVICE_PARTS, Part
from dit_in_dit.config.errors import UserError

MODULE = "dit_in_dit.benchmark.device"
NAMES = [part.name for part in DEVICE_PARTS]


def run_device_check(arguments: list[str] | None = None) -> int:
    """Run the check, or one process of a part; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="measure and test on a GPU")
    parser.add_argument("--seconds", type=float, default=520, help="the whole check ends within this time")
    parser.add_argument("--out", type=Path, required=True, help="new folder for results")
    parser.add_argument("--parts", default=",".join(NAMES), help=f"some of {','.join(NAMES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a dry run of the check itself, for a CPU")
    parser.add_argument("--wheels", type=Path, help="folder of wheels (diffusers) for packages that are missing here")
    for hidden, kind in (("process", int), ("limit", float)):  # given to the processes of a part
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    chosen = args.parts.split(",")
    if unknown := [name for name in chosen if name not in NAMES]:
        parser.error(f"--parts must be some of {','.join(NAMES)}: got {','.join(unknown)}")
    parts = [part for part in DEVICE_PARTS if part.name in chosen]
    if args.process is not None:
        return _process(args, parts[0])
    try:
        return _check(args, parts)
    except (UserError, zipfile.BadZipFile, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def processes_of(part: Part, *, tiny: bool) -> int:
    """Number of processes of a part."""
    return part.tiny_processes if tiny else part.processes


def _check(args: argparse.Namespace, parts: list[Part]) -> int:
    def command(part: Part, number: int, seconds: float, limit: float) -> list[str]:
        how = ["--out", str(args.out), "--parts", part.name, "--device", args.device, *["--tiny"] * args.tiny]
        return [sys.executable, "-m", MODULE, *how, f"--seconds={seconds}", f"--limit={limit}", f"--process={number}"]

    check = DeviceCheck(args.out, args.seconds, command, lambda part: processes_of(part, tiny=args.tiny))
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels:
            for wheel in args.wheels.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(folder)
        places = [str(Path(dit_in_dit.__file__).parents[1]), os.environ.get("PYTHONPATH"), folder]
        os.environ |= {"PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1"}
        try:
            code = 0 if check.run(parts) else 1
        except KeyboardInterrupt:
            code = 130
        sys.stdout.write("\n".join(check.table()) + "\n")
    return code


def _process(args: argparse.Namespace, part: Part) -> int:
    """Run one process of a part. If it hangs, it prints where, and ends shortly before it would be killed."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(args.limit - 2, 1), exit=True)
    share = args.process, processes_of(part, tiny=args.tiny)
    path = args.out / "cases.jsonl"
    cases = Cases(path, part.name, args.device, args.seconds, tiny=args.tiny, share=share)
    try:
        measure = getattr(import_module(f"{MODULE}.{part.module}"), f"measure_{part.name}")
        cases.device  # noqa: B018  # NotHere if it is not there
        gc.freeze()  # collections after each case then take no time
        measure(cases)
    except (ImportError, NotHere) as error:
        cases.skip(error)
    return 0


if __name__ == "__main__":
    sys.exit(run_device_check())
