"""The table of a device check: at most 40 lines, whatever happened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dit_in_dit.benchmark.device.plan import DEVICE_PARTS, GOALS, CaseLine

WIDTH = 200  # of a line


def table_lines(parts: Sequence[CaseLine], cases: Sequence[CaseLine]) -> list[str]:
    """The lines of the table, from the lines of `parts.jsonl` and `cases.jsonl`: parts with their rows, then goals.

    Rows with failures come first. Rows above a part's number are counted in its line.
    """
    ended = {line["part"]: line for line in parts}
    lines = ["device check: a part, its state, its seconds; share: of the rate of products or of a copy, measured here"]
    for part in DEVICE_PARTS:
        line = ended.get(part.name, {"state": "not run", "seconds": 0})
        own = [case for case in cases if case["part"] == part.name and case["state"] != "begun"]
        rows: dict[str, list[CaseLine]] = {}
        for case in own:
            rows.setdefault(case["row"], []).append(case)
        texts = [(_order(some), f"  {row}: {describe(some)}") for row, some in rows.items()]
        shown = [text for _, text in sorted(texts, key=lambda pair: pair[0])][: part.rows]
        more = f", {len(rows) - len(shown)} rows in cases.jsonl" if len(rows) > len(shown) else ""
        why = f": {line['why']}" if "why" in line else ""
        lines += [f"{part.name:8} {line['state']:11} {line['seconds']:5.1f} s{more}{why}", *shown]
    for goal in GOALS:
        value = goal.value(cases)
        met = "not measured" if value is None else f"{value:.3g}, {'met' if goal.met(value) else 'not met'}"
        lines.append(f"goal     {goal}: {met}")
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]


def _order(cases: Iterable[CaseLine]) -> int:
    """Rows with failures first, rows without any result last."""
    states = {case["state"] for case in cases}
    return 0 if states & {"failed", "crashed"} else 1 if "done" in states else 2


def describe(cases: Sequence[CaseLine]) -> str:
    """The cases of a row in one line: failures, then results, then how many agree, then how many were skipped."""
    states: dict[str, list[CaseLine]] = {}
    for case in cases:
        states.setdefault(case["state"], []).append(case)
    bad = [case for case in cases if case["state"] in ("failed", "crashed")]
    pieces = [f"{len(bad)} FAILED"] if len(bad) > 1 else ["FAILED"] if bad else []
    pieces += [f"{case['case']} ({case.get('why') or case.get('says') or _error(case)})" for case in bad]
    done = states.get("done", [])
    pieces += [case["says"] for case in done if "says" in case]
    if tested := [case for case in done if "says" not in case]:
        worst = max(tested, key=lambda case: case.get("error", 0.0))
        pieces.append(f"{len(tested)} agree, largest error {_error(worst)} ({worst['case']})")
    if skipped := states.get("skipped", []):
        reasons = ", ".join(dict.fromkeys(case["why"] for case in skipped))
        pieces.append(f"{len(skipped)} skipped ({reasons})")
    return "; ".join(pieces)


def _error(case: CaseLine) -> str:
    return f"{case.get('error', 0.0):.1e}"
