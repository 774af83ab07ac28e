"""Saved states are restored bit for bit, and stopping anywhere, any number of times, equals not stopping."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import with_train
from dit_in_dit.config.files import override
from dit_in_dit.config.run import DataConfig, RunConfig
from dit_in_dit.runs import checkpoint
from dit_in_dit.runs.folder import create_run
from dit_in_dit.runs.tensors import load_tensors
from dit_in_dit.training.loop import train

STEPS = 8
CONFIG = override(
    RunConfig(data=DataConfig(source="mosaic")),
    [
        *("model.image_size=8", "model.patch_size=4", "model.num_classes=9", "model.stages=outer inner"),
        *("model.outer.width=16", "model.outer.num_heads=2", "model.inner.width=8", "model.inner.num_heads=1"),
        "model.inner.sub_patch=2",
    ],
)
CONFIG = with_train(
    CONFIG, steps=STEPS, batch_size=2, precision="float32", evaluate_every=0, sample_every=0, checkpoint_every=3
)


def ended(run: Path) -> tuple:
    return checkpoint.newest(run).manifest["sha256"], (run / "log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    list(train(CONFIG, run, device="cpu"))
    return ended(run)


@given(
    stops=st.lists(st.tuples(st.integers(1, STEPS), st.booleans()), max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_stopping_anywhere_equals_not_stopping(unbroken, stops):
    with tempfile.TemporaryDirectory() as folder:
        run, resume = Path(folder) / "run", False
        for step, politely in sorted(stops):
            if politely:  # asked to: with a checkpoint there
                list(train(CONFIG, run, device="cpu", resume=resume, until=step))
            else:  # dropped, as by a kill
                facts = train(CONFIG, run, device="cpu", resume=resume)
                for fact in facts:
                    if fact.kind == "step" and fact.step >= step:
                        break
                facts.close()
            resume = True
        list(train(CONFIG, run, device="cpu", resume=resume))
        assert ended(run) == unbroken


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**31)),
        max_size=6,
    ),
    step=st.integers(1, 10**9),
)
@settings(max_examples=40, deadline=None)
def test_a_saved_state_is_restored_bit_for_bit(shapes, step):
    tensors = {}
    for name, (kind, shape, seed) in shapes.items():
        draw = torch.Generator().manual_seed(seed)
        size = torch.empty(shape, dtype=kind)
        top = 2 if kind == torch.bool else 256  # any bits: NaN, infinities and denormals too
        raw = torch.randint(0, top, (size.numel() * size.element_size(),), generator=draw, dtype=torch.uint8)
        tensors[name] = raw.view(kind).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        create_run(run, RunConfig())
        checkpoint.save(run, RunConfig(), step, tensors, {}, ("a",))
        found = checkpoint.newest(run)
        back = load_tensors(found.folder / checkpoint.STATE)
        assert found.manifest["step"] == step
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype
            assert back[name].shape == tensor.shape
            assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
