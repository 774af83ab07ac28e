"""Training curves, from synthetic logs with known results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import small_model
from dit_in_dit.cli import curves as command
from dit_in_dit.cli.options import Commands, Parser
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override, to_yaml
from dit_in_dit.config.run import RunConfig, SampleConfig
from dit_in_dit.config.training import TrainConfig
from dit_in_dit.curves.arms import RunGroup, arms, notes
from dit_in_dit.curves.convergence import convergence_tables, errors_by_seed, stability, steps_to_reach
from dit_in_dit.curves.logs import Curve, read_run
from dit_in_dit.curves.plots import draw_curves
from dit_in_dit.inspection import cost
from dit_in_dit.reporting.plots import COLOURS
from dit_in_dit.runs.folder import lock_run
from dit_in_dit.runs.lock import is_locked, lock_file

CONFIG = RunConfig(
    model=small_model("outer*2 inner*1"),
    train=TrainConfig(steps=400, batch_size=4, accumulate=3, clip=1.0),
    sample=SampleConfig(guidance=1.0),
)


def lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def steps(count: int = 400, **columns: Callable[[int], float]) -> list[dict]:
    """A log line for each step from 1; loss and gradient norm are 0.5 unless given."""
    made = {"loss": lambda step: 0.5, "grad_norm": lambda step: 0.5, **columns}
    return [{"step": step, **{name: value(step) for name, value in made.items()}} for step in range(1, count + 1)]


def evaluations(errors: dict[int, float], t: str = "0.5") -> list[dict]:
    """A log line of held-out errors for each step; the error of high frequencies is half the error."""
    return [{"step": step, "held_out": {t: {"whole": error, "high": error / 2}}} for step, error in errors.items()]


def write(run: Path, rows: list[dict], *assignments: str, seed: int = 0, seconds: float | None = 1.0) -> Path:
    """A run folder whose steps took `seconds` each (None: no timing), with a clock reading at every tenth."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(override(replace(CONFIG, seed=seed), assignments)))
    (run / "log.jsonl").write_text(lines(rows))
    last = max((row["step"] for row in rows), default=0)
    if seconds:
        read = range(10, last + 10, 10)
        (run / "timing.jsonl").write_text(lines({"step": s, "seconds": s * seconds} for s in read))
    return run


def read_arms(*runs: Path) -> list[RunGroup]:
    return arms([read_run(run) for run in runs])


def run_command(*arguments: object) -> None:
    parser = Parser(prog="dit-in-dit")
    command.add(Commands(parser))
    options = parser.parse_args(["curves", *map(str, arguments)])
    options.run(options)


# -------------------------------------------------------------------------------------------- logs


def test_a_run_is_read_as_it_was_written(tmp_path: Path):
    rows = steps(30, loss=lambda s: 1 / s, **{"grad_norm.inner_head": lambda s: 2.0 * s})
    rows[9:9] = evaluations({9: 0.25})
    curve = read_run(write(tmp_path / "run", rows))
    assert curve.step.tolist() == list(range(1, 31))
    assert curve.loss.tolist() == [1 / s for s in range(1, 31)]
    assert curve.parts.keys() == {"inner_head"}
    assert curve.parts["inner_head"][29] == 60
    assert curve.evaluated.tolist() == [9]
    assert {key: values.tolist() for key, values in curve.held_out.items()} == {
        (0.5, "whole"): [0.25],
        (0.5, "high"): [0.125],
    }


def test_a_log_longer_than_a_chunk_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dit_in_dit.curves.logs.CHUNK_BYTES", 500)
    rows = steps(300, loss=lambda s: s / 7)
    for row in rows[200:]:
        row["grad_norm.spread"] = 3.0  # a part that is logged from here on
    curve = read_run(write(tmp_path / "run", rows + evaluations({300: 0.1})))
    assert curve.loss.tolist() == [s / 7 for s in range(1, 301)]
    assert np.isnan(curve.parts["spread"][:200]).all()
    assert (curve.parts["spread"][200:] == 3).all()
    assert curve.evaluated.tolist() == [300]


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_an_incomplete_last_line_is_ignored(tmp_path: Path, cut: int):
    run = write(tmp_path / "run", steps(20))
    for name in ("log.jsonl", "timing.jsonl"):
        whole = (run / name).read_text()
        (run / name).write_text(whole[:-cut])
    curve = read_run(run)
    assert len(curve.step) == 19
    assert len(curve.timed) == (1 if cut <= 20 else 0)


def test_a_damaged_line_gives_an_error_that_names_the_file(tmp_path: Path):
    run = write(tmp_path / "run", steps(20))
    for damage in ('{"step": 21, \n', "17\n", '{"step": 21}, {"step": 22}\n', '{"loss": 1.0}\n'):
        (run / "log.jsonl").write_text(lines(steps(20)) + damage + lines([{"step": 30}]))
        with pytest.raises(UserError, match=r"log\.jsonl"):
            read_run(run)


def test_a_log_of_two_runs_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="goes back from step 20"):
        read_run(write(tmp_path / "run", steps(20) + steps(20)))


def test_training_macs_are_three_forward_passes_per_image(tmp_path: Path):
    curve = read_run(write(tmp_path / "run", steps(30)))
    images = 17 * 4 * 3  # steps, batch_size, accumulate
    assert curve.macs(np.array([17.0])) == 3 * cost.macs(CONFIG.model)["total"] * images


def test_hours_are_interpolated_between_clock_readings(tmp_path: Path):
    curve = read_run(write(tmp_path / "run", steps(30), seconds=36.0))
    assert curve.hours(np.array([0.0, 5.0, 25.0, 30.0])) == pytest.approx([0, 0.05, 0.25, 0.3])
    assert math.isnan(curve.hours(np.array([31.0]))[0])


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path: Path):
    run = write(tmp_path / "run", steps(60))
    clock = [(20, 20), (40, 40), (50, 50), (30, 60), (45, 75), (55, 85), (60, 90)]  # killed after 50, resumed from 20
    (run / "timing.jsonl").write_text(lines({"step": step, "seconds": seconds} for step, seconds in clock))
    curve = read_run(run)
    assert 3600 * curve.hours(np.array([20.0, 50.0, 55.0, 60.0])) == pytest.approx([20, 50, 55, 60])


# -------------------------------------------------------------------------------------------- arms


def test_runs_that_differ_only_in_the_seed_are_one_arm(tmp_path: Path):
    paths = [write(tmp_path / f"a{seed}", steps(20), seed=seed) for seed in range(3)]
    paths.insert(1, write(tmp_path / "plain", steps(20), "model.stages=outer*3"))
    first, plain = read_arms(*paths)
    assert first.label == "stages=outer*2 inner*1 (3 seeds)"
    assert [curve.config.seed for curve in first.curves] == [0, 1, 2]
    assert plain.label == "stages=outer*3 (1 seed)"


def test_the_fewest_distinguishing_keys_name_an_arm_but_all_are_listed(tmp_path: Path):
    paths = [
        write(tmp_path / "a", steps(20), "train.learning_rate=0.1", "train.warmup=1"),
        write(tmp_path / "b", steps(20), "train.learning_rate=0.2", "train.warmup=1", "train.ema=0.5"),
        write(tmp_path / "c", steps(20), "train.learning_rate=0.1", "train.warmup=2"),
    ]
    found = read_arms(*paths)
    assert [arm.name for arm in found] == [
        "train.learning_rate=0.1, train.warmup=1",
        "train.learning_rate=0.2, train.warmup=1",
        "train.learning_rate=0.1, train.warmup=2",
    ]
    assert found[1].differs == {"train.learning_rate": 0.2, "train.warmup": 1, "train.ema": 0.5}


def test_keys_that_a_plain_dit_ignores_do_not_distinguish_arms(tmp_path: Path):
    plain = [write(tmp_path / f"{n}", steps(9), "model.stages=outer*2", f"model.inner.width={16 * n}", seed=n) for n in
             (1, 2)]  # fmt: skip
    (arm,) = read_arms(*plain)
    assert len(arm.curves) == 2


def test_arms_with_long_names_are_named_by_their_folders(tmp_path: Path):
    interleaved = "model.stages=(inner outer)*4 inner"
    paths = [write(tmp_path / "zig", steps(9), interleaved), write(tmp_path / "zag", steps(9))]
    assert [arm.name for arm in read_arms(*paths)] == ["zig", "zag"]


def test_a_program_and_its_named_order_are_one_arm(tmp_path: Path):
    named = write(tmp_path / "a", steps(9), "model.stages=last", "model.depth=2", "model.inner.depth_ratio=0.5")
    spelled = write(tmp_path / "b", steps(9), seed=1)
    assert len(read_arms(named, spelled)) == 1


def test_the_same_seed_twice_is_refused(tmp_path: Path):
    paths = [write(tmp_path / name, steps(20)) for name in "ab"]
    with pytest.raises(UserError, match="have the same config and seed"):
        read_arms(*paths)


def test_a_run_without_a_logged_step_is_left_out_with_a_note(tmp_path: Path):
    paths = [write(tmp_path / "a", steps(20)), write(tmp_path / "b", [], seed=1, seconds=None)]
    (paths[1] / "log.jsonl").unlink()
    curves = [read_run(path) for path in paths]
    assert len(arms(curves)[0].curves) == 1
    assert f"{paths[1]}: no step logged yet, left out" in notes(curves)
    assert f"{paths[0]}: 20 of 400 steps so far" in notes(curves)
    with pytest.raises(UserError, match="no step is logged yet"):
        arms(curves[1:])


# ------------------------------------------------------------------------------- held-out and reach


def test_a_band_is_the_range_of_the_seeds(tmp_path: Path):
    levels = {0: 0.3, 1: 0.1, 2: 0.2}
    paths = [
        write(tmp_path / str(seed), steps(90) + evaluations({30: 1 + level, 60: level}), seed=seed)
        for seed, level in levels.items()
    ]
    (arm,) = read_arms(*paths)
    at, rows = errors_by_seed(arm, 0.5, "high")
    assert at.tolist() == [30, 60]
    assert (rows.min(0), rows.mean(0), rows.max(0)) == (
        pytest.approx([0.55, 0.05]),
        pytest.approx([0.6, 0.1]),
        pytest.approx([0.65, 0.15]),
    )


def test_seeds_are_compared_at_common_evaluations(tmp_path: Path):
    short = write(tmp_path / "a", steps(40) + evaluations({30: 0.4}))
    long = write(tmp_path / "b", steps(90) + evaluations({30: 0.2, 60: 0.1}), seed=1)
    at, rows = errors_by_seed(read_arms(short, long)[0], 0.5, "whole")
    assert at.tolist() == [30]
    assert rows.tolist() == [[0.4], [0.2]]


def test_the_step_at_which_an_error_is_reached_is_interpolated(tmp_path: Path):
    quick = write(tmp_path / "a", steps() + evaluations({100: 0.5, 200: 0.3, 300: 0.4, 400: 0.1}))
    slow = write(tmp_path / "b", steps() + evaluations({100: 0.8, 200: 0.6, 400: 0.2}), "model.stages=outer*3")
    first, second = steps_to_reach(read_arms(quick, slow), [(0.5, 0.35)])
    assert first.needed["steps"].mean == pytest.approx(175)  # 3/4 of the way from 0.5 to 0.3; up again counts no more
    assert second.needed["steps"].mean == pytest.approx(325)  # 5/8 of the way from 0.6 to 0.2
    assert second.ratio["steps"] == pytest.approx(325 / 175)
    assert second.needed["hours"].mean == pytest.approx(325 / 3600)
    per_image = {name: 3 * cost.macs(replace(CONFIG.model, stages=name))["total"] for name in (
        "outer*2 inner*1", "outer*3")}  # fmt: skip
    assert first.needed["macs"].mean == pytest.approx(175 * 12 * per_image["outer*2 inner*1"])
    assert second.ratio["macs"] == pytest.approx(325 * per_image["outer*3"] / (175 * per_image["outer*2 inner*1"]))


def test_each_seed_reaches_an_error_at_its_own_step(tmp_path: Path):
    paths = [
        write(tmp_path / str(seed), steps() + evaluations({100: 0.4, 200: end}), seed=seed)
        for seed, end in enumerate((0.2, 0.0, 0.3))
    ]
    (early,) = steps_to_reach(read_arms(*paths), [(0.5, 0.35)])
    steps_needed = early.needed["steps"]
    assert (steps_needed.low, steps_needed.mean, steps_needed.high) == (
        pytest.approx(112.5),
        pytest.approx((125 + 112.5 + 150) / 3),
        pytest.approx(150),
    )
    (late,) = steps_to_reach(read_arms(*paths), [(0.5, 0.25)])
    assert (late.reached, late.seeds, late.needed, late.best) == (2, 3, {}, 0.0)  # a mean over two would flatter


def test_every_run_reaches_the_default_error(tmp_path: Path):
    good = write(tmp_path / "a", steps() + evaluations({100: 0.5, 300: 0.1}))
    bad = write(tmp_path / "b", steps() + evaluations({100: 0.9, 300: 0.3}), "model.stages=outer*3")
    first, second = steps_to_reach(read_arms(good, bad))
    assert first.error == 0.3
    assert first.needed["steps"].mean == pytest.approx(200)
    assert second.needed["steps"].mean == 300


def test_an_error_reached_before_the_first_evaluation_gives_a_bound_and_no_ratio(tmp_path: Path):
    good = write(tmp_path / "a", steps() + evaluations({100: 0.2, 300: 0.1}))
    bad = write(tmp_path / "b", steps() + evaluations({100: 0.9, 300: 0.3}), "model.stages=outer*3")
    first, second = steps_to_reach(read_arms(good, bad))
    assert first.bound
    assert first.needed["steps"].mean == 100
    assert not second.bound
    assert second.ratio == {}


def test_a_time_that_was_not_logged_is_refused(tmp_path: Path):
    found = read_arms(write(tmp_path / "a", steps() + evaluations({100: 0.2})))
    with pytest.raises(UserError, match=r"t=0\.3: choose from 0\.5"):
        steps_to_reach(found, [(0.3, 0.1)])


@pytest.mark.parametrize(
    "assignment",
    ["data.source=mosaic", "data.held_out=0.2", "model.image_size=[16, 16]", "diffusion.path=ddpm"],
)
def test_different_held_out_sets_or_noise_are_refused(tmp_path: Path, assignment: str):
    rows = steps() + evaluations({100: 0.2})
    euler = ("sample.sampler=ddim",)  # a sampler that every path has
    ours = write(tmp_path / "a", rows, *euler)
    theirs = write(tmp_path / "b", rows, assignment, *euler)
    mixed = read_arms(ours, theirs)
    for use in (lambda: steps_to_reach(mixed), lambda: convergence_tables(mixed), lambda: draw_curves(mixed, tmp_path)):
        with pytest.raises(UserError, match=assignment.split("=", maxsplit=1)[0]):
            use()


def test_different_predictions_are_compared_by_held_out_error_but_not_by_loss(tmp_path: Path):
    rows = steps() + evaluations({100: 0.2})
    paths = [write(tmp_path / "a", rows), write(tmp_path / "b", rows, "diffusion.predict=image")]
    assert len(steps_to_reach(read_arms(*paths))) == 2
    assert any("not comparable" in note for note in notes([read_run(path) for path in paths]))


def test_cosine_schedules_of_different_lengths_give_a_note(tmp_path: Path):
    def said(schedule: str) -> bool:
        lengths = [(f"train.schedule={schedule}", f"train.steps={n}") for n in (400, 800)]
        runs = [write(tmp_path / schedule / f"{n}", steps(20), *set_) for n, set_ in enumerate(lengths)]
        return any("train.schedule" in note for note in notes([read_run(run) for run in runs]))

    assert said("cosine")
    assert not said("constant")


# ---------------------------------------------------------------------------------------- stability


def curve_of(tmp_path: Path, rows: list[dict], *assignments: str) -> Curve:
    return read_run(write(tmp_path / "run", rows, *assignments))


def test_planted_spikes_are_counted(tmp_path: Path):
    losses = {
        100: 9.0,
        150: 1.51,
        200: 1.49,
        250: 2.0,
        251: 3.0,
        252: 2.0,
    }  # before step 101; above 1.5; below; one of 3
    norms = {160: 5.1, 162: 5.1, 170: 4.9}  # two above 5; below
    found = stability(
        curve_of(tmp_path, steps(loss=lambda s: losses.get(s, 0.5), grad_norm=lambda s: norms.get(s, 0.5)))
    )
    assert (found.loss_spikes, found.gradient_spikes) == (2, 2)
    assert (found.largest_gradient, found.largest_at) == (5.1, 160)
    assert found.clipped == 3 / 400
    assert (found.skipped, found.non_finite) == (0, 0)


def test_a_spike_is_relative_to_the_steps_before_it(tmp_path: Path):
    falling = stability(curve_of(tmp_path, steps(loss=lambda s: 100 * 0.98**s)))
    rising = stability(curve_of(tmp_path / "rising", steps(loss=lambda s: 0.01 * 1.05**s)))
    assert falling.loss_spikes == 0
    assert rising.loss_spikes == 1  # 1.05^50 = 11 times the median: one stretch from step 101 on


def test_the_running_median_covers_the_previous_hundred_steps(tmp_path: Path):
    draw_ = np.random.default_rng(0).lognormal(0, 1.5, 400)
    found = stability(curve_of(tmp_path, steps(loss=lambda s: draw_[s - 1])))
    above = [draw_[i] > 3 * np.median(draw_[i - 100 : i]) for i in range(100, 400)]
    starts = sum(now and not before for before, now in zip([False, *above], above, strict=False))
    assert 20 < starts == found.loss_spikes


@pytest.mark.parametrize(("at", "spikes"), [(201, 0), (202, 1)])
def test_the_median_drops_when_most_of_the_previous_hundred_are_low(tmp_path: Path, at: int, spikes: int):
    """At step 201, 50 of the previous hundred losses are high: the median is 0.55. One step later the median is 0.1."""
    found = curve_of(tmp_path, steps(loss=lambda s: 1.2 if s == at else 1.0 if s <= 150 else 0.1))
    assert stability(found).loss_spikes == spikes


def test_skipped_and_non_finite_steps_are_counted_but_not_as_spikes(tmp_path: Path):
    rows = steps()
    rows[199] |= {"loss": math.nan, "grad_norm": math.inf, "skipped": True}
    rows[299] |= {"loss": math.inf, "skipped": True}
    rows[399] |= {"loss": None, "skipped": False}
    found = stability(curve_of(tmp_path, rows))
    assert (found.skipped, found.non_finite, found.loss_spikes, found.gradient_spikes) == (2, 3, 0, 0)
    assert found.largest_gradient == 0.5


def test_without_clipping_there_is_no_clipped_share(tmp_path: Path):
    assert stability(curve_of(tmp_path, steps(20), "train.clip=0")).clipped is None


# ------------------------------------------------------------------------------- figures and command


def pixels_of(colour: str, path: Path) -> int:
    """Number of pixels that have a line's colour, up to anti-aliasing."""
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    picture = np.asarray(Image.open(path).convert("RGB"), int)
    return int((np.abs(picture - wanted).max(-1) < 8).sum())


def test_the_command_prints_tables_and_writes_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture):
    def rows(level: float) -> list[dict]:
        parts = {f"grad_norm.{part}": lambda s: level for part in ("inner_blocks", "outer_blocks", "outer_head")}
        return steps(loss=lambda s: level / s, **parts) + evaluations({100: 2 * level, 300: level})

    paths = [write(tmp_path / f"a{seed}", rows(0.3 + seed / 100), seed=seed) for seed in range(3)]
    paths.append(write(tmp_path / "b", rows(0.2), "model.stages=outer*3", seconds=2.0))
    out = tmp_path / "out"
    run_command(*paths, "--out", out, "--reach", "0.5:0.35")
    names = ("loss.png", "held-out.png", "gradients.png", "throughput.png")
    assert {path.name for path in out.iterdir()} == {*names, "curves.json"}
    for name in names:
        assert min(pixels_of(colour, out / name) for colour in COLOURS[:2]) > 500, name
        assert pixels_of(COLOURS[2], out / name) == 0, name
    found = json.loads((out / "curves.json").read_text())
    first, second = found["reach"]
    assert (first["arm"], first["reached"]) == ("stages=outer*2 inner*1", 3)
    assert second["needed"]["steps"]["mean"] == pytest.approx(150)
    assert second["needed"]["hours"]["mean"] == pytest.approx(300 / 3600)
    assert found["arms"][1]["runs"][0]["images_per_second"] == pytest.approx(6)  # 12 images in 2 s
    assert len(found["stability"]) == 4
    printed = capsys.readouterr().out
    for text in ("stages=outer*3", "by 3 of 3 seeds", "150  x0.55", "loss spikes"):
        assert text in printed


def test_curves_of_an_untimed_run_show_no_hours_and_are_in_its_folder(tmp_path: Path):
    run = write(tmp_path / "run", steps(200), seconds=None)  # still training, and not evaluated yet
    run_command(run)
    assert {path.name for path in (run / "curves").iterdir()} == {"loss.png", "gradients.png", "curves.json"}
    assert "no hours" in " ".join(json.loads((run / "curves" / "curves.json").read_text())["notes"])


def test_a_short_run_is_plotted_beside_a_long_run(tmp_path: Path):
    found = read_arms(write(tmp_path / "a", steps()), write(tmp_path / "b", steps(1), "model.stages=outer*3"))
    assert {path.name for path in draw_curves(found, tmp_path)} == {"loss.png", "gradients.png", "throughput.png"}


def test_several_runs_need_an_out_folder(tmp_path: Path):
    with pytest.raises(UserError, match="--out"):
        run_command(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("text", ["0.5", "0.5:", "2:0.1", "0.5:nan", "0.5:-1", "half:0.1"])
def test_an_invalid_target_is_refused(tmp_path: Path, text: str):
    with pytest.raises(UserError, match="must be T:ERROR"):
        run_command(tmp_path, "--reach", text)


def test_smoothed_loss_is_the_mean_of_equal_windows(tmp_path: Path):
    found = read_arms(*(write(tmp_path / str(n), steps(1000, loss=lambda s, n=n: s + n), seed=n) for n in (0, 1)))
    shown = []

    def keep(page, **_) -> bytes:
        shown.append(page)
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_in_dit.curves.plots.figure_png", keep)
        draw_curves(found, tmp_path)
    page = shown[0]
    assert "mean of 5 steps" in page.get_suptitle()
    (line,) = page.axes[0].lines
    assert len(line.get_xdata()) == 200
    assert line.get_xdata()[:2].tolist() == [3, 8]
    assert line.get_ydata()[:2].tolist() == [3.5, 8.5]  # mean of s over 1..5, and of the two seeds
    (band,) = page.axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (3, 999)


# ------------------------------------------------------------------------------- a run that is being trained


def test_a_run_in_training_says_its_step_until_it_ends(tmp_path: Path):
    run = write(tmp_path / "run", steps(20))
    with lock_run(run):
        assert read_arms(run)[0].label == "stages=outer*2 inner*1 (1 seed; running, step 20 of 400)"
    assert read_arms(run)[0].label == "stages=outer*2 inner*1 (1 seed)"
    done = write(tmp_path / "done", steps(400))
    with lock_run(done):
        assert "running" not in read_arms(done)[0].label
    slow = write(tmp_path / "slow", steps(7), seed=1)
    with lock_run(slow):
        assert "(2 seeds; running, step 7 of 400)" in read_arms(run, slow)[0].label


def test_the_lock_of_a_run_can_be_taken_after_it_was_looked_at(tmp_path: Path):
    assert not is_locked(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").write_text("")
    assert not is_locked(tmp_path / "lock")
    with lock_file(tmp_path / "lock", "it"):
        assert is_locked(tmp_path / "lock")
    with lock_file(tmp_path / "lock", "it"):
        pass


@pytest.mark.parametrize("share", [0.001, 0.03, 0.6])
def test_logs_cut_anywhere_are_drawn_or_have_no_step_yet(tmp_path: Path, share: float):
    whole = write(tmp_path / "whole", steps(12) + evaluations({5: 0.5, 10: 0.4}))
    run = tmp_path / "live"
    run.mkdir()
    for name in ("config.yaml", "log.jsonl", "timing.jsonl"):
        content = (whole / name).read_bytes()
        (run / name).write_bytes(content if name == "config.yaml" else content[: int(share * len(content))])
    if share < 0.1:
        with pytest.raises(UserError, match="no step is logged yet in "):
            run_command(run)
        return
    run_command(run)
    assert (run / "curves/loss.png").stat().st_size > 1000
    (run / "log.jsonl").write_bytes((whole / "log.jsonl").read_bytes())  # later
    run_command(run)
    assert (run / "curves/held-out.png").exists()
