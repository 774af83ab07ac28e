"""Maps: measures match the attention weights, figures and findings match the measures, the page is self-contained."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import inputs, perturbed, small_model
from dit_in_dit.attention_maps import attention, record
from dit_in_dit.attention_maps.attention import measure_attention
from dit_in_dit.attention_maps.figures import figures
from dit_in_dit.attention_maps.findings import findings, fine_detail_share, missing_parts, not_shown
from dit_in_dit.attention_maps.page import page, payload
from dit_in_dit.attention_maps.plan import MOST_BYTES, evenly_chosen, joining, left_out_sentences, plan_maps, size
from dit_in_dit.attention_maps.record import Maps, Views, choose, record_maps
from dit_in_dit.attention_maps.samples import draw_on_and_off
from dit_in_dit.attention_maps.tokens import inner_tokens, outer_tokens
from dit_in_dit.cli import maps as command
from dit_in_dit.cli.options import Commands, Parser
from dit_in_dit.config.errors import UserError
from dit_in_dit.config.presets import get
from dit_in_dit.config.run import DiffusionConfig, InnerConfig, ModelConfig, RunConfig, SampleConfig
from dit_in_dit.data.sources import open_source
from dit_in_dit.inspection.hooks import watch_attention, watch_contribution, watch_heads
from dit_in_dit.model.nested import NestedDiT
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.sampling.numbered import sample
from dit_in_dit.training.batches import held_out_batch

TIMES = (0.1, 0.5, 0.9)
WIDE = (16, 24)  # 4x6 patches: the order of windows is not its own inverse


def views(model: ModelConfig, images: int = 2, times: tuple[float, ...] = TIMES) -> Views:
    draw = np.random.default_rng(0)
    shape = (images, *model.image_shape)
    pictures, noise = draw.uniform(-1, 1, shape).astype(np.float32), draw.standard_normal(shape).astype(np.float32)
    labels = tuple(i if model.num_classes else 0 for i in range(images))
    return Views("held-out", tuple(range(images)), labels, pictures, noise, times)


def run_of(model: ModelConfig, **diffusion) -> RunConfig:
    sampler = "ddim" if diffusion.get("path") == "ddpm" else "euler"
    return RunConfig(
        model=model, diffusion=DiffusionConfig(**diffusion), sample=SampleConfig(sampler=sampler, steps=4, guidance=2)
    )


def maps_of(stages: str = "inner*2 outer", /, *, diffusion: dict | None = None, **keys) -> Maps:
    config = run_of(small_model(stages, **keys), **(diffusion or {}))
    torch.manual_seed(0)
    return record_maps(perturbed(NestedDiT(config.model)), config, views(config.model), samples=2)


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("mixer", ["patch", "window", "image"])
@pytest.mark.parametrize("chunk", [2**24, 100])
def test_measures_match_the_attention_weights(monkeypatch, mixer, chunk):
    monkeypatch.setattr(attention, "MOST_WEIGHTS", chunk)  # the small value takes some queries or some groups at a time
    model = perturbed(NestedDiT(small_model("inner outer", image_size=WIDE, inner={"mixer": mixer})))
    x, t, y = inputs(model.config, batch=1)
    heads = {}
    with (
        torch.no_grad(),
        watch_attention(model) as seen,
        watch_heads(model, lambda name, q, k: heads.update({name: (q[0], k[0])})),
    ):
        model(x, t, y)
    tokens = inner_tokens(model.config, model.inner_blocks[0].branches["mix"])
    measures = measure_attention(*heads["inner_blocks.0"], tokens)
    weights = seen["inner_blocks.0"][0].numpy()  # groups heads L L
    groups, _, length, _ = weights.shape
    for patch in range(24):
        group, block = np.argwhere(tokens.patches == patch)[0]
        rows = slice(block * 4, block * 4 + 4)
        w = weights[group, 1, rows]  # 4 L
        places = tokens.places[group]
        entropy = np.mean([stats.entropy(row) for row in w]) / np.log(length)
        distance = np.mean([np.sum(row * away(places[q], places)) for q, row in enumerate(w, rows.start)])
        assert measures.entropy[1, patch] == pytest.approx(entropy, rel=1e-4)
        assert measures.own[1, patch] == pytest.approx(np.mean([w[i, rows.start + i] for i in range(4)]), rel=1e-4)
        assert measures.distance[1, patch] == pytest.approx(distance, rel=1e-4)
        np.testing.assert_allclose(measures.inside[1, patch], w[:, rows], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(measures.reach[1, patch], w.mean(0), rtol=1e-4, atol=1e-6)
    received = np.zeros(96)
    for group in range(groups):
        received[tokens.places[group]] += weights[group, 1].sum(0)
    np.testing.assert_allclose(measures.received[1], received, rtol=1e-4)
    np.testing.assert_allclose(measures.average, measures.inside.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(measures.squares, np.square(measures.inside).mean((1, 2, 3)), rtol=1e-4)


def away(place: int, places: np.ndarray, columns: int = 12) -> np.ndarray:
    """Distances between the 8x12 sub-patches of a WIDE image."""
    return np.hypot(places // columns - place // columns, places % columns - place % columns)


@pytest.mark.parametrize(("mixer", "groups"), [("patch", 24), ("window", 6), ("image", 1)])
def test_tokens_are_grouped_with_their_patch(mixer, groups):
    model = NestedDiT(small_model("inner outer", image_size=WIDE, inner={"mixer": mixer}))
    tokens = inner_tokens(model.config, model.inner_blocks[0].branches["mix"])
    assert tokens.grid == (8, 12)
    assert tokens.places.shape == (groups, 96 // groups)
    assert sorted(tokens.places.ravel()) == list(range(96))
    rows, columns = tokens.places // 12, tokens.places % 12
    owners = (rows // 2) * 6 + columns // 2
    assert np.array_equal(owners, np.repeat(tokens.patches, 4, axis=1))


def test_uniform_attention_has_maximal_entropy_and_mean_distance():
    tokens = outer_tokens(small_model())
    zeros = torch.zeros(1, 2, 8, 4)
    measures = measure_attention(zeros, zeros, tokens)
    np.testing.assert_allclose(measures.entropy, 1, rtol=1e-5)
    np.testing.assert_allclose(measures.own, 1 / 8, rtol=1e-5)
    points = np.array([(r, c) for r in range(4) for c in range(2)], float)
    assert measures.distance.mean() == pytest.approx(np.linalg.norm(points[:, None] - points, axis=-1).mean(), rel=1e-5)
    assert tokens.even_distance == pytest.approx(measures.distance.mean(), rel=1e-5)


def test_attention_to_itself_has_zero_entropy_and_zero_distance():
    alone = 100 * torch.eye(8).expand(1, 1, 8, 8)
    measures = measure_attention(alone, alone, outer_tokens(small_model()))
    assert measures.entropy.max() < 1e-5
    assert measures.own.min() > 1 - 1e-5
    assert measures.distance.max() < 1e-5


@pytest.mark.parametrize("planted", ["position", "time", "content"])
def test_variance_is_attributed_to_the_planted_cause(planted):
    draw = np.random.default_rng(1)
    shape = {"position": (1, 1, 4, 4), "time": (3, 1, 1, 1), "content": (1, 50, 1, 1)}[planted]
    moved = draw.random(shape).astype(np.float32)
    weights = np.broadcast_to(moved, (3, 50, 4, 4))  # times, images and patches, who, whom
    level = maps_of("inner outer").inner
    level = replace(
        level, average=weights.mean(1)[:, None, None], squares=np.square(weights).mean(keepdims=True)[0, :, :1, 0]
    )
    shares = level.variance()
    assert shares[planted] == pytest.approx(1, abs=1e-4)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


# ------------------------------------------------------------------------------------------ record


def test_recordings_match_the_hooks():
    config = run_of(small_model("inner outer*2 inner"), predict="image")
    model, seen = perturbed(NestedDiT(config.model)), views(config.model)
    maps = record_maps(model, config, seen, samples=2)
    x, noise = torch.from_numpy(seen.images[1:]), torch.from_numpy(seen.noise[1:])
    t = torch.tensor([0.5])
    x_t = 0.5 * x + 0.5 * noise
    with torch.no_grad(), watch_attention(model) as weights, watch_contribution(model) as share:
        estimate = model(x_t, t, torch.tensor([1]))
    np.testing.assert_allclose(maps.noisy[1, 1], x_t[0], atol=1e-6)
    np.testing.assert_allclose(maps.estimate[1, 1], estimate[0], rtol=1e-4, atol=1e-5)
    for level, name, layer in ((maps.inner, "inner_blocks.1", 1), (maps.outer, "outer_blocks.0", 0)):
        own = weights[name][0].diagonal(dim1=-2, dim2=-1).numpy()  # groups heads L
        per_patch = own.mean(-1).T if name.startswith("inner") else own[0]
        np.testing.assert_allclose(level.own[1, 1, layer], per_patch, rtol=1e-4)
    inside = weights["inner_blocks.1"][0].transpose(0, 1).numpy()
    np.testing.assert_allclose(maps.inner.inside[1, 1, 1], inside, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(maps.outer.reach[1, 1, 0], weights["outer_blocks.0"][0, 0].numpy(), rtol=1e-4, atol=1e-6)
    for name in ("aggregates.0", "inner_head"):
        np.testing.assert_allclose(maps.contribution[name][1, 1], share[name][0], rtol=1e-4)


CASES = {
    "window": {"inner": {"mixer": "window", "condition": "patch"}},
    "image": {"inner": {"mixer": "image", "condition": "sub_patch"}},
    "conv": {"inner": {"mixer": "conv", "aggregate": "weighted"}},
    "none": {"inner": {"mixer": "none", "fuse": "replace"}},
    "one sub-patch": {"inner": {"sub_patch": 4, "aggregate": "concat"}},
    "latents": {"channels": 4, "num_classes": 0, "inner": {"aggregate": "attention"}},
    "ddpm noise": {"diffusion": {"path": "ddpm", "predict": "noise"}},
    "tokens of class and time": {"tokens": {"label": 2, "time": 1}},
    "compact": {"inner": {"mixer": "compact"}},
    "split": {"diffusion": {"predict": "split", "split_rank": 4}},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model_is_recorded(case):
    maps = maps_of("inner outer", **CASES[case])
    assert np.isfinite(maps.estimate).all()
    assert (maps.inner is None) == (case in ("conv", "none", "compact"))
    for level in filter(None, (maps.inner, maps.outer)):
        np.testing.assert_allclose(level.received.mean(-1), 1, rtol=1e-4)
        assert level.own.min() >= 0
        assert level.entropy.max() <= 1 + 1e-5
    shown = payload(maps, ("a", "b"), "run", 1)
    assert json.dumps(shown, allow_nan=False)
    assert ("without" in missing_parts(maps.config.model)) == (maps.without is None) == (case == "none")
    assert all(sentence.endswith(".") for sentence in findings(maps))


def test_a_model_with_nan_output_is_refused():
    config = run_of(small_model("inner outer"))
    model = NestedDiT(config.model)
    torch.nn.init.constant_(model.outer_head.final.linear.bias, float("nan"))
    with pytest.raises(UserError, match=r"not finite at t=0\.1"):
        record_maps(model, config, views(config.model), samples=1)


def test_samples_match_the_sampler_and_the_plain_dit():
    config = run_of(small_model("inner outer", inner={"fuse": "gate"}))
    model = perturbed(NestedDiT(config.model))
    drawn = draw_on_and_off(model, config, 3, seed=5)
    np.testing.assert_allclose(drawn.on, sample(model, config, 3, seed=5), rtol=1e-4, atol=1e-4)
    plain = replace(config, model=replace(config.model, use_inner=False))
    outer = NestedDiT(plain.model)
    outer.load_state_dict(model.state_dict(), strict=False)
    np.testing.assert_allclose(drawn.off, sample(outer, plain, 3, seed=5), rtol=1e-4, atol=1e-4)
    assert drawn.labels == (0, 1, 2)
    assert drawn.times == pytest.approx((1, 0.75, 0.5, 0.25))
    np.testing.assert_allclose(drawn.noisy[0, 1], views_noise(5, 1, config.model), atol=1e-6)


def views_noise(seed: int, index: int, model: ModelConfig) -> np.ndarray:
    from dit_in_dit.runtime.seeding import generator

    return generator(seed, "sample", index).standard_normal(model.image_shape, np.float32)


def test_chosen_images_have_different_classes_and_the_noise_of_the_held_out_error(run_config):
    source = open_source(run_config.data, run_config.model)
    chosen = choose(source, run_config, 3, TIMES)
    assert sorted(chosen.labels) == [0, 1, 2]
    batch = held_out_batch(source, run_config.model, source.held_out_size)
    for number, image, noise, label in zip(chosen.numbers, chosen.images, chosen.noise, chosen.labels, strict=True):
        assert np.array_equal(image, batch.x[number])
        assert np.array_equal(noise, batch.noise[number])
        assert label == batch.y[number]
    assert set(choose(source, run_config, 3, TIMES, classes=[2]).labels) == {2}
    assert len(choose(source, run_config, 99, TIMES).numbers) == source.held_out_size


def test_training_images_are_used_if_none_is_held_out(run_config):
    config = replace(run_config, data=replace(run_config.data, held_out=0.0))
    chosen = choose(open_source(config.data, config.model), config, 2, TIMES)
    assert chosen.split == "training"
    assert len(chosen.images) == 2


# -------------------------------------------------------------------------------------------- plan

LARGE = {
    "XL/2 reference": get("dit-in-dit-xl2").model,
    "256 sub-patches of 256 patches": ModelConfig(
        image_size=(256, 256), patch_size=16, stages="outer*12 inner*4", inner=InnerConfig(sub_patch=1)
    ),
    "4096 tokens see each other": ModelConfig(
        image_size=(64, 64), patch_size=4, stages="inner*4 outer*4", inner=InnerConfig(sub_patch=1, mixer="image")
    ),
    "4096 patches": ModelConfig(image_size=(128, 128), channels=4, patch_size=2, stages="outer*28"),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_model_fits_a_page_that_lists_what_is_left_out(name):
    plan = plan_maps(LARGE[name], 6, 9)
    assert size(LARGE[name], plan) <= MOST_BYTES
    assert plan.images
    assert len(plan.times) >= 3
    assert left_out_sentences(LARGE[name], plan, 6, 9)


def test_a_small_model_is_kept_in_full():
    model = get("emoji").model
    plan = plan_maps(model, 6, 9)
    assert plan.images == tuple(range(6))
    assert left_out_sentences(model, plan, 6, 9) == []


def test_the_size_of_a_plan_matches_the_arrays():
    for keys in ({"inner": {"aggregate": "attention"}}, {"inner": {"mixer": "image", "aggregate": "concat"}}):
        maps = maps_of("inner*2 outer", **keys)
        levels = [level for level in (maps.inner, maps.outer) if level]
        weights = sum(level.received.size + level.inside.size + level.reach.size for level in levels)
        floats = 3 * 4 * sum(level.entropy.size for level in levels)
        floats += 4 * sum(share.size for share in maps.contribution.values())
        pooled = sum(aggregation.maps.size for aggregation in maps.aggregation.values())
        pictures = 3 * (maps.noisy.size + maps.estimate.size + maps.estimate.size)
        assert size(maps.config.model, maps.plan) == weights + floats + pooled + pictures // 3


def test_a_plan_that_drops_heads_keeps_their_mean(monkeypatch):
    full = maps_of("inner*2 outer")
    monkeypatch.setattr(record, "plan_maps", lambda *a: replace(full.plan, inner=replace(full.plan.inner, heads=False)))
    mean = maps_of("inner*2 outer")
    np.testing.assert_allclose(mean.inner.inside[:, :, :, 0], full.inner.inside.mean(3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mean.inner.entropy, full.inner.entropy)


def test_evenly_chosen_items_include_both_ends():
    assert evenly_chosen((1, 2, 3, 4, 5, 6, 7, 8, 9), 5) == (1, 3, 5, 7, 9)
    assert evenly_chosen((4, 5), 3) == (4, 5)
    assert evenly_chosen((4, 5, 6), 1) == (4,)


@pytest.mark.parametrize("stages", ["inner outer", "(inner outer)*2", "outer inner", "inner outer inner", "outer"])
def test_joining_places_match_the_contributions(stages):
    model = NestedDiT(small_model(stages))
    with torch.no_grad(), watch_contribution(model) as seen:
        model(*inputs(model.config))
    assert joining(model.config) == list(seen)


# ------------------------------------------------------------------------------------------ findings


def test_fine_share_separates_a_checkerboard_from_a_ramp():
    y, x = np.mgrid[0:16, 0:16].astype(np.float32)
    checkers, ramp = ((x + y) % 2)[None, None], (x / 16)[None, None]
    assert fine_detail_share(checkers) == pytest.approx(1, abs=1e-5)
    assert fine_detail_share(ramp) < 0.05


def test_findings_contain_the_numbers():
    maps = maps_of("inner outer")
    text = " ".join(findings(maps))
    assert f"{maps.inner.entropy[:, 0].mean():.0%}" in text
    assert f"{maps.contribution['aggregates.0'][:, -1].mean():.0%}" in text
    assert "t = 0.1" in text
    assert f"{maps.inner.variance()['time']:.1%} between times" in text


def test_missing_parts_are_reported_once():
    assert not_shown(small_model("outer*2")) == [
        "No inner attention, aggregation weights, share of the inner path and pictures without the inner path: "
        "this is a plain DiT: it has no inner path."
    ]
    assert "3x3" in " ".join(not_shown(small_model("inner outer", inner={"mixer": "conv"})))
    assert "nothing is aggregated" in " ".join(not_shown(small_model("outer inner")))
    assert "nothing is left" in " ".join(not_shown(small_model("inner outer", inner={"fuse": "replace"})))
    assert not_shown(small_model("inner outer", inner={"aggregate": "attention"})) == []


# ---------------------------------------------------------------------------------------- the page


def test_packed_weights_are_exact_to_one_level_of_255():
    maps = maps_of("inner outer")
    packed = payload(maps, (), "run", 1)["inner"]["inside"]
    levels = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8).reshape(packed["shape"])
    most = np.frombuffer(base64.b64decode(packed["most"]), "<f4").reshape(packed["shape"][:-2])
    back = levels / 255 * most[..., None, None]
    assert np.abs(back - maps.inner.inside).max() <= 0.5 / 255 * most.max() + 1e-6


def test_the_page_loads_nothing_and_escapes_names():
    text = page(maps_of("inner outer"), ("</script><b>", "b"), "</script>", 1)
    assert text.count("</script>") == 1
    assert not re.search(r"https?://|//cdn|@import|\bfetch\(", text)
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)


def shown(tmp_path: Path, text: str, fragment: str) -> str:
    """DOM of the page after its script ran, in a browser without network access."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    (tmp_path / "maps.html").write_text(text)
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    ran = subprocess.run(
        [
            *(
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                *quiet,
                f"--user-data-dir={tmp_path / 'profile'}",
            ),
            *("--virtual-time-budget=30000", "--enable-logging=stderr", "--dump-dom"),
            f"file://{tmp_path / 'maps.html'}#{fragment}",
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "CONSOLE" not in ran.stderr, ran.stderr
    return ran.stdout


@pytest.mark.slow
def test_a_browser_shows_the_chosen_patch_with_its_numbers(tmp_path):
    maps = maps_of("inner*2 outer*2", inner={"mixer": "window", "aggregate": "attention"})
    dom = shown(tmp_path, page(maps, ("red", "blue"), "run", 7), "image=1&t=2&patch=5&layer=0&head=1&sub=3")
    body = dom[: dom.index("<script>")]
    assert 'data-ready="yes"' in dom
    assert "data-error" not in dom
    numbers = {key: float(value) for key, value in re.findall(r'data-key="([\w.-]+)" data-value="([^"]+)"', body)}
    for name in ("entropy", "own", "distance"):
        assert numbers[f"inner-{name}"] == pytest.approx(getattr(maps.inner, name)[1, 2, 0, 1, 5], rel=1e-5)
        assert numbers[f"outer-{name}"] == pytest.approx(getattr(maps.outer, name)[1, 2, 1, :, 5].mean(), rel=1e-5)
    assert numbers["aggregates.0"] == pytest.approx(maps.contribution["aggregates.0"][1, 2, 5], rel=1e-5)
    assert "Patch 5: row 2, column 1 of image 1 (blue), t = 0.9" in body
    weights = maps.inner.inside[1, 2, 0, 1, 5, 3]
    place = divmod(int(weights.argmax()), 2)
    most = re.search(r"Sub-patch \(1, 1\) gives \((\d), (\d)\) ([\d.]+)% of its weight", body)
    assert (int(most[1]), int(most[2])) == place
    assert float(most[3]) == pytest.approx(100 * weights.max(), abs=0.3)  # the page stores one byte per weight


@pytest.mark.slow
def test_a_browser_shows_a_plain_dit(tmp_path):
    maps = maps_of("outer*2")
    dom = shown(tmp_path, page(maps, ("red", "blue"), "run", 7), "patch=99&t=-1&layer=nothing")
    assert 'data-ready="yes"' in dom
    assert "Patch 7" in dom  # the last patch
    assert "this is a plain DiT" in dom[: dom.index("<script>")]


# ------------------------------------------------------------------------------------- the command


def run_command(*arguments: str) -> None:
    parser = Parser(prog="dit-in-dit")
    command.add(Commands(parser))
    options = parser.parse_args(["maps", *arguments])
    options.run(options)


def saved(run: Path, config: RunConfig) -> Path:
    """A run folder with one checkpoint of a model whose output is not zero."""
    create_run(run, config)
    state = perturbed(NestedDiT(config.model)).state_dict()
    names = open_source(config.data, config.model).classes
    checkpoint.save(run, config, 3, {f"model.{name}": value for name, value in state.items()}, state, names)
    return run


@pytest.mark.slow
def test_the_command_writes_the_page_and_every_figure(tmp_path, run_config, capsys):
    run = saved(tmp_path / "run", run_config)
    run_command(str(run), "--num", "2", "--times", "0.9,0.2", "--steps", "2", "--device", "cpu")
    printed = capsys.readouterr().out
    written = {path.name for path in (run / "maps").iterdir()}
    assert written == {
        *("maps.html", "attention-over-t.png", "contribution.png", "inner-attention.png", "inner-attention-images.png"),
        *("inner-draws.png", "inner-on-off.png", "outer-attention.png", "trajectories.png"),
    }
    for name in written:
        assert f"{run / 'maps' / name}  " in printed
    assert "at t = 0.2 and 0.9" in printed
    assert "No aggregation weights" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("error:constrained_layout not applied")  # warned if a title leaves no room for pictures
def test_every_figure_is_drawn_for_one_image_at_one_time(tmp_path, run_config):
    run = saved(tmp_path / "run", run_config)
    run_command(str(run), "--num", "1", "--times", "0.5", "--steps", "2", "--device", "cpu")


def test_a_large_image_and_all_aggregates_are_drawn(tmp_path):
    for keys in (
        {"inner": {"aggregate": "weighted", "mixer": "conv"}},
        {"inner": {"aggregate": "concat"}},
        {"channels": 4},
    ):
        maps = maps_of("(inner outer)*2", image_size=(128, 64), patch_size=16, **{"inner": {"sub_patch": 8}, **keys})
        names = [name for name, _, _ in figures(maps, ("a",))]
        assert ("aggregation.png" in names) == (keys.get("inner", {}).get("aggregate") is not None)
        tile = payload(maps, ("a",), "run", 1)["clean"]
        assert (tile["width"], tile["height"]) == (48, 96)  # scaled down, with the same aspect


@pytest.mark.parametrize("given", ["", "0", "1", "0.5,x", "0.5,1.2", "nan"])
def test_invalid_times_are_refused(tmp_path, given):
    with pytest.raises(UserError, match="must be times above 0 and below 1"):
        run_command(str(tmp_path), "--times", given)


def test_the_error_names_a_class_without_images(run_config):
    source = open_source(replace(run_config.data, held_out=0.0), run_config.model)
    with pytest.raises(UserError, match="no training image"):
        choose(source, run_config, 2, TIMES, classes=[7])
