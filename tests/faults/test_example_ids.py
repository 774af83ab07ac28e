"""Which image every step sees, in order: no worker, stop or resume changes this order, and no image is left out or
repeated.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import with_train
from dit_in_dit.config.run import RunConfig
from dit_in_dit.training import loop
from dit_in_dit.training.batches import shuffled_index

IMAGES = 30
STEPS = 9


@pytest.fixture
def config(run_config) -> RunConfig:
    """Nine steps, each of two micro-batches of five, on thirty images: an epoch is three steps."""
    config = with_train(run_config, steps=STEPS, batch_size=5, accumulate=2, checkpoint_every=1, evaluate_every=0)
    return replace(config, data=replace(config.data, held_out=0))


class Recorder:
    """Image numbers of every optimizer step that is taken, in the order in which they are taken."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, list[int]]] = []
        self.crash: int | None = None  # the step that fails, once
        update = loop.Trainer.update

        def recorded(trainer, batches, *rest, **more):
            if trainer.step == self.crash:
                self.crash = None
                raise InterruptedError
            self.seen.append((trainer.step, [int(i) for batch in batches for i in batch.image]))
            return update(trainer, batches, *rest, **more)

        patch.setattr(loop.Trainer, "update", recorded)

    def train(self, config: RunConfig, run: Path, workers: int, stops: tuple[int, ...] = ()) -> list[int]:
        """The image numbers of a run that is stopped after each checkpoint of `stops` and resumed."""
        self.seen.clear()
        config = replace(config, data=replace(config.data, workers=workers))
        for life, stop in enumerate((*stops, None)):
            facts = loop.train(config, run, resume=life > 0, device="cpu")
            for fact in facts:
                if (fact.kind, fact.step) == ("checkpoint", stop):
                    facts.close()
        return [image for _, images in self.seen for image in images]


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    return Recorder(monkeypatch)


def test_stops_and_workers_do_not_change_the_images_of_a_step(config, recorder, tmp_path, full):
    whole = recorder.train(config, tmp_path / "whole", workers=0)
    assert len(whole) == STEPS * 10
    for epoch in range(3):  # each image once an epoch, in another order
        assert sorted(whole[epoch * IMAGES : (epoch + 1) * IMAGES]) == list(range(IMAGES))
    assert whole[:IMAGES] != whole[IMAGES : 2 * IMAGES]

    three_places, epoch_end, twice_in_one_epoch = (1, 5, 7), (3,), (4, 5)
    for workers in (0, 2):
        for stops in (three_places, epoch_end, twice_in_one_epoch, ()) if full else (three_places, twice_in_one_epoch):
            found = recorder.train(config, tmp_path / f"{workers}{stops}", workers, stops)
            assert [step for step, _ in recorder.seen] == list(range(STEPS))  # none skipped, none taken again
            assert found == whole, (workers, stops)


def test_a_step_that_was_not_saved_is_taken_again_with_the_same_images(config, recorder, tmp_path):
    config = with_train(config, checkpoint_every=4)
    whole = recorder.train(config, tmp_path / "whole", workers=0)
    recorder.seen.clear()
    recorder.crash = 6  # two steps after the checkpoint
    with pytest.raises(InterruptedError):
        list(loop.train(config, tmp_path / "left", device="cpu"))
    list(loop.train(config, tmp_path / "left", resume=True, device="cpu"))
    assert [step for step, _ in recorder.seen] == [*range(6), *range(4, STEPS)]
    for step, images in recorder.seen:
        assert images == whole[step * 10 : (step + 1) * 10]


@given(
    seed=st.integers(0, 2**63 - 1),
    size=st.integers(1, 300),
    rows=st.integers(1, 16),
    world=st.integers(1, 4),
    epoch=st.integers(0, 10**6),
)
def test_the_ranks_together_see_each_image_once_per_epoch(seed, size, rows, world, epoch):
    """Rank r of W holds rows [rB/W, (r+1)B/W) of each global batch of B; an epoch may begin and end within a batch."""
    batch = rows * world
    first, last = epoch * size // batch, -(-(epoch + 1) * size // batch)
    shares = [
        {step * batch + row for step in range(first, last) for row in range(rank * rows, (rank + 1) * rows)}
        for rank in range(world)
    ]
    of_epoch = [sorted(i for i in share if i // size == epoch) for share in shares]
    images = [shuffled_index(seed, i, size) for share in of_epoch for i in share]
    assert sorted(images) == list(range(size))


@given(seed=st.integers(0, 2**63 - 1), size=st.integers(1, 200), start=st.integers(0, 10**9))
def test_an_example_does_not_depend_on_where_a_run_starts(seed, size, start):
    from_start = [shuffled_index(seed, i, size) for i in range(start, start + 3 * size)]
    middle = start + size // 2
    assert [shuffled_index(seed, i, size) for i in range(middle, start + 3 * size)] == from_start[size // 2 :]
    in_whole_epochs = np.array(from_start[-start % size :][: 2 * size]).reshape(2, size)
    assert (np.sort(in_whole_epochs, 1) == np.arange(size)).all()
