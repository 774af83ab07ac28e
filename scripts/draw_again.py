"""Measure a study's trials under another sampling: `python scripts/draw_again.py STUDY --out FILE.csv --guidance 1`.

What follows FILE goes to `dit-in-dit evaluate` as it is; FILE has the columns of results.csv. Trials that were measured
before, with the same words, are not drawn again.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from dit_in_dit.study.plan import read_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1)
    options, words = parser.parse_known_args()
    trials = read_plan(options.study).trials
    name = f"again-{sha256(' '.join(words).encode()).hexdigest()[:8]}"

    def measure(run: Path) -> dict:
        out = run / "evaluation" / name
        if not (out / "metrics.json").exists():
            command = [sys.executable, "-m", "dit_in_dit", "evaluate", str(run), *words, "--out", str(out)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((out / "metrics.json").read_text())

    with ThreadPoolExecutor(options.workers) as pool:
        found = list(pool.map(measure, [options.study / "runs" / trial.key for trial in trials]))
    with options.out.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("arm", "seed", "state", "step", "metric", "value", "floor"))
        for trial, result in zip(trials, found, strict=True):
            for metric, score in sorted(result["scores"].items()):
                floor = "" if score["floor"] is None else score["floor"]
                rows.writerow((trial.arm, trial.seed, "done", result["subject"]["step"], metric, score["value"], floor))
    print(f"{len(trials)} trials in {options.out}")


if __name__ == "__main__":
    main()
