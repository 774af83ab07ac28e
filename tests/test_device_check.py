"""The device check loses no result, ends in time, and its parts run on a CPU with small sizes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from conftest import small_model
from dit_in_dit.benchmark.device import rates, right, running, steps
from dit_in_dit.benchmark.device.__main__ import run_device_check
from dit_in_dit.benchmark.device.cases import NO_GPU, Cases, NotHere
from dit_in_dit.benchmark.device.check import DeviceCheck
from dit_in_dit.benchmark.device.plan import DEVICE_PARTS, GOALS, Part
from dit_in_dit.benchmark.device.table import WIDTH, describe, table_lines
from dit_in_dit.config.errors import UserError
from dit_in_dit.model.nested import NestedDiT
from test_model import EVERY_CHOICE

SRC = Path(rates.__file__).parents[3]
DONE = """
cases.add("row", "first", lambda: {"says": "first 1"})
cases.add("row", "second", lambda: {"says": "second 2", "passed": True})
"""
# What a process of a part does, without the second that PyTorch's import takes.
BODIES = {
    "good": DONE,
    "failing": DONE + 'cases.add("row", "third", lambda: 1 / 0)\ncases.add("row", "4th", lambda: {"passed": False})',
    "crashing": DONE + 'cases.add("row", "third", lambda: os.kill(os.getpid(), signal.SIGSEGV))',
    "exiting": "sys.exit('no luck')",
    "hanging": DONE
    + "child = subprocess.Popen(['sleep', '600']); open(out + '/child', 'w').write(str(child.pid))\n"
    + 'cases.add("row", "third", lambda: time.sleep(600))',
    "stuck": 'faulthandler.dump_traceback_later(0.2, exit=True)\ncases.add("row", "third", lambda: time.sleep(600))',
    "broken": DONE + 'cases.add("row", "third", broken)\ncases.add("row", "4th", lambda: {"says": "never"})',
    "no gpu": "cases.skip(NotHere(NO_GPU))",
    "absent": 'cases.add("row", "first", lambda: __import__("no_such_package"))\n'
    'cases.add("row", "late", lambda: {}, needs=1e9)',
}
HEAD = """
import faulthandler, os, signal, subprocess, sys, time
from pathlib import Path
from dit_in_dit.benchmark.device.cases import NO_GPU, Cases, NotHere
part, number, out, seconds = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
cases = Cases(Path(out) / "cases.jsonl", part, "cpu", seconds, share=(number, 2))
def broken():
    raise RuntimeError("CUDA error: an illegal memory access")
"""


def check_in(out: Path, seconds: float = 60.0) -> DeviceCheck:
    def command(part: Part, number: int, planned: float, limit: float) -> list[str]:
        code = HEAD + BODIES[part.name]
        return [sys.executable, "-c", code, part.name, str(number), str(out), str(planned)]

    return DeviceCheck(out, seconds, command, lambda part: part.processes)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SRC))


def is_gone(process: int) -> bool:
    """Whether a process has ended; it may still wait for its parent."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def states(check: DeviceCheck) -> dict[str, str]:
    return {line["case"]: line["state"] for line in read(check.cases) if line["state"] != "begun"}


def test_results_before_a_crash_stay_and_the_crash_is_one_line(tmp_path):
    check = check_in(tmp_path / "out")
    assert not check.run([Part(name, "", 20, 3) for name in ("crashing", "failing", "exiting", "good")])
    ends = {line["part"]: (line["state"], line.get("why")) for line in read(check.parts)}
    assert ends["good"] == ("done", None)
    assert ends["failing"] == ("done", None)
    assert ends["crashing"] == ("failed", "process 0 ended with -11")
    assert ends["exiting"] == ("failed", "process 0 ended with 1")
    lines = read(check.cases)
    assert [line["case"] for line in lines if line["part"] == "crashing" and line["state"] == "done"] == [
        "first",
        "second",
    ]
    (crash,) = [line for line in lines if line["part"] == "crashing" and line["state"] == "crashed"]
    assert (crash["case"], crash["row"]) == ("third", "row")
    (silent,) = [line for line in lines if line["part"] == "exiting"]
    assert silent["why"] == "the process ended with 1: no luck"
    failed = [line["why"] for line in lines if line["state"] == "failed" and "why" in line]
    assert failed == ["ZeroDivisionError: division by zero"]
    assert "no luck" in (tmp_path / "out" / "log.txt").read_text()


def test_a_part_that_hangs_is_killed_with_its_children_and_the_next_runs(tmp_path):
    check = check_in(tmp_path / "out")
    began = time.monotonic()
    assert not check.run([Part("hanging", "", 2, 3, processes=2), Part("good", "", 20, 3)])
    assert time.monotonic() - began < 30
    assert [line["state"] for line in read(check.parts)] == ["killed", "done"]
    child = int((tmp_path / "out" / "child").read_text())
    assert is_gone(child)
    (crash, _) = [line for line in read(check.cases) if line["state"] == "crashed"]
    assert (crash["case"], crash["why"]) == ("third", "killed: out of time")


def test_a_process_that_ends_itself_because_it_hangs_says_where(tmp_path):
    check = check_in(tmp_path / "out")
    assert not check.run([Part("stuck", "", 20, 3)])
    assert read(check.parts)[0]["state"] == "killed"
    (crash,) = [line for line in read(check.cases) if line["state"] == "crashed"]
    assert "out of time in File" in crash["why"]
    assert "<lambda>" in crash["why"]


def test_a_cuda_error_ends_the_process_after_its_line(tmp_path):
    check = check_in(tmp_path / "out")
    assert not check.run([Part("broken", "", 20, 3)])
    assert states(check) == {"first": "done", "second": "done", "third": "failed"}


def test_the_check_ends_in_time_and_names_what_it_skipped(tmp_path):
    check = check_in(tmp_path / "out", seconds=8)  # of which four are kept
    began = time.monotonic()
    check.run([Part("good", "", 1, 3), Part("hanging", "", 10, 3), Part("good", "", 1, 3)])
    assert time.monotonic() - began < 12
    assert [line["state"] for line in read(check.parts)] == ["done", "killed", "skipped"]
    assert "no time left" in read(check.parts)[-1]["why"]


def test_without_a_gpu_the_other_parts_are_skipped_in_one_line_each(tmp_path):
    check = check_in(tmp_path / "out")
    assert not check.run([Part("no gpu", "", 20, 3), Part("good", "", 20, 3)])
    assert [(line["state"], line.get("why")) for line in read(check.parts)] == [("skipped", None), ("skipped", NO_GPU)]


def test_missing_packages_and_missing_time_are_skipped_cases(tmp_path):
    check = check_in(tmp_path / "out")
    assert not check.run([Part("absent", "", 20, 3)])  # nothing was measured
    assert describe([line for line in read(check.cases) if line["state"] != "begun"]) == (
        "2 skipped (no_such_package is not installed, no time left)"
    )


def test_an_interrupt_leaves_lines_and_a_table_and_no_process(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_device_check import check_in, Part
check_in(Path({str(tmp_path / "out")!r})).run([Part("hanging", "", 60, 3), Part("good", "", 60, 3)])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "child").exists() or '"third"' not in (tmp_path / "out" / "cases.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert [line["state"] for line in read(tmp_path / "out" / "parts.jsonl")] == ["interrupted"]
    assert len((tmp_path / "out" / "table.txt").read_text().splitlines()) > 10
    assert is_gone(int((tmp_path / "out" / "child").read_text()))


def test_a_folder_with_results_is_refused(tmp_path, capsys):
    check_in(tmp_path)
    with pytest.raises(UserError, match="give another folder"):
        check_in(tmp_path)
    assert run_device_check(["--out", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: --out: ")


# ------------------------------------------------------------------------------------------ table


def case(part: str, row: str, name: str, **values) -> dict:
    return {"part": part, "process": 0, "row": row, "case": name, "device": "cuda", "state": "done", **values}


def test_the_table_has_at_most_40_lines_whatever_happened():
    many = [
        case(part.name, f"row {row}", f"{number}", **kind, why="because " * 50)
        for part in DEVICE_PARTS
        for row in range(9)
        for number, kind in enumerate(({"says": "x" * 90}, {"error": 0.1}, {"state": "failed"}, {"state": "crashed"}))
    ]
    parts = [{"part": part.name, "state": "killed", "seconds": 1.0, "why": "after 1 s"} for part in DEVICE_PARTS]
    for lines in (table_lines(parts, many), table_lines([], [])):
        assert len(lines) <= 40
        assert max(map(len, lines)) <= WIDTH
    assert table_lines([], [])[-1].endswith("not measured")


def test_rows_say_failures_first_then_results_then_what_was_skipped():
    some = [
        case("right", "eager", "a", error=1e-6),
        case("right", "eager", "b", error=3e-6),
        case("right", "eager", "c", state="failed", why="error 2.0e-01 of output"),
        case("right", "eager", "d", state="skipped", why="no time left"),
    ]
    assert describe(some) == (
        "FAILED; c (error 2.0e-01 of output); 2 agree, largest error 3.0e-06 (b); 1 skipped (no time left)"
    )


def test_goals_are_decided_by_the_cases_of_a_gpu():
    speeds = {"dit-b16": 300.0, "dit-in-dit-b16": 240.0}
    cases = [case("pixels", row, "compiled", images_per_second=speed) for row, speed in speeds.items()]
    cases.append(case("pixels", "dit-in-dit-b16", "own kernels", images_per_second=250.0))
    cases += [
        case("beside", "dit-xl2", "ours, compiled", images_per_second=400.0),
        case("beside", "dit-xl2", "ours, eager", images_per_second=900.0),
        case("beside", "dit-xl2", "diffusers, eager", images_per_second=240.0),
        case("latents", "dit-xl2", "compiled", share=0.55),
        case("pieces", "attention in groups", "4 tokens", share=0.6),
        case("pieces", "attention in groups", "16 tokens", share=0.9),
    ]
    values = [goal.value(cases) for goal in GOALS]
    assert values == [pytest.approx(0.6), pytest.approx(1.2), None, 0.55, None, 0.6]
    assert [value is not None and goal.met(value) for goal, value in zip(GOALS, values, strict=True)] == [
        *(True, True, False, True, False, False)
    ]
    assert all(goal.value([{**line, "device": "cpu"} for line in cases]) is None for goal in GOALS)


# ------------------------------------------------------------------------------------------ parts


def test_the_choices_of_the_check_are_those_of_all_tests():
    checked = {repr(config.model) for config in right.every_choice().values()}
    wanted = {
        repr(small_model("inner outer*2 inner", **choice))
        for choice in EVERY_CHOICE
        if all(isinstance(value, dict) for value in choice.values()) and not any(len(v) > 1 for v in choice.values())
    }
    assert len(wanted) > 40
    assert wanted <= checked
    for key, values in (("predict", 4), ("weight", 5)):
        assert len({getattr(config.diffusion, key) for config in right.every_choice().values()}) == values


def cases_in(tmp_path: Path, part: str, share: tuple[int, int] = (0, 1)) -> Cases:
    return Cases(tmp_path / "cases.jsonl", part, "cpu", 1000, tiny=True, share=share)


def ended(cases: Cases) -> list[dict]:
    lines = [line for line in read(cases.path) if line["state"] != "begun"]
    assert [line for line in lines if line["state"] not in ("done", "skipped")] == []
    return lines


def test_every_choice_agrees_with_float64_in_both_precisions(full):
    configs = list(right.every_choice().items())
    for name, config in configs if full else configs[::12]:
        for precision in right.MOST:
            found = right._compare(config, torch.device("cpu"), precision, "eager", True)
            assert found["passed"], (name, found)


def test_a_wrong_gradient_is_found(monkeypatch):
    exact = right._exact(config := right.every_choice()["defaults"])
    name = next(name for name in exact if "modulation" in name)
    monkeypatch.setattr(right, "_exact", lambda config: {**exact, name: 1.002 * exact[name]})
    found = right._compare(config, torch.device("cpu"), "float32", "eager", True)
    assert not found["passed"]
    assert found["worst"] == name
    monkeypatch.setattr(right, "_exact", lambda config: {**exact, "lost": exact[name]})
    with pytest.raises(KeyError):
        right._compare(config, torch.device("cpu"), "float32", "eager", True)


def test_attention_that_is_wrong_in_its_last_sequences_is_found():
    q, k, v = (torch.randn(512, 2, 4, 8) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert rates._compared((out,), (q, k, v), None)["passed"]
    out[-1] = 0
    assert not rates._compared((out,), (q, k, v), None)["passed"]
    out[-1] = torch.nan
    assert not rates._compared((out,), (q, k, v), None)["passed"]


def test_steps_run_in_each_way_and_smaller_batches_are_tried(tmp_path, monkeypatch):
    cases, refused = cases_in(tmp_path, "pixels"), []
    run = steps.bfloat16_run("dit-in-dit-b16", tiny=True)

    class Heavy(NestedDiT):
        def forward(self, x, t, y=None):
            if len(x) > 2:
                refused.append(len(x))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, t, y)

    def make(run):
        return Heavy(run.model)

    monkeypatch.setattr(steps, "BATCHES", (4, 2))
    cases.tiny = False
    cases.add("row", "eager", lambda: steps._step(cases, run, "eager", make, "eager", 1e9))
    (line,) = ended(cases)
    assert refused == [4]
    assert (line["batch"], line["peak_bytes"]) == (2, None)
    assert line["share"] == pytest.approx(3 * line["macs"] * line["images_per_second"] / 1e9)
    monkeypatch.setattr(steps, "BATCHES", (4,))
    with pytest.raises(NotHere):
        steps._step(cases, run, "eager", make, "eager")


def test_runs_and_feeding_are_measured(tmp_path):
    cases = cases_in(tmp_path, "runs")
    running.measure_runs(cases)
    running.measure_feeding(cases)
    lines = {line["case"]: line for line in ended(cases)}
    assert lines["deterministic"]["says"].endswith("equal")
    assert lines["noise=host, 0 workers"]["images_per_second"] > 0


@pytest.mark.parametrize("part", [part.name for part in DEVICE_PARTS])
def test_the_whole_check_runs_dry(part, tmp_path, full):
    """Each part in its processes, started without the package installed."""
    if not full and part != "limits":
        pytest.skip("with --full")
    out = tmp_path / "out"
    how = ["--device", "cpu", "--tiny", "--parts", part, "--seconds", "600", "--out", str(out)]
    command = [sys.executable, "-m", "dit_in_dit.benchmark.device", *how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) <= 40
    assert done.stdout == (out / "table.txt").read_text()
    assert [line["state"] for line in read(out / "parts.jsonl")] == ["done"]
