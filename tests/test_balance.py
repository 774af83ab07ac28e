"""data.balance=class: every class equally often, every image of a class once before any repeats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.files import override
from dit_in_dit.config.run import RunConfig
from dit_in_dit.config.schema import to_hash
from dit_in_dit.data.coerce import as_source
from dit_in_dit.data.sources import open_source
from dit_in_dit.training.balance import BalancedOrder, balanced_order
from dit_in_dit.training.batches import Examples, load_batches


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 2**63 - 1), st.data())
def test_classes_and_images_are_shown_equally_often(labels, seed, data):
    order, labels = BalancedOrder(seed, labels), np.array(labels)
    shown = [order(i) for i in range(200)]
    classes = np.unique(labels)
    for end in range(1, 200):
        counts = [int((labels[shown[:end]] == c).sum()) for c in classes]
        assert max(counts) - min(counts) <= 1
    for c in classes:
        images = [image for image in shown if labels[image] == c]
        size = int((labels == c).sum())
        for start in range(0, len(images), size):
            assert len(set(images[start : start + size])) == len(images[start : start + size])
    some = data.draw(st.lists(st.integers(0, 199), max_size=20))
    fresh = BalancedOrder(seed, labels)
    assert [fresh(i) for i in some] == [shown[i] for i in some], "a function of seed and number, in any order"


def test_seeds_and_rounds_differ():
    labels = np.arange(30) % 10
    orders = [[BalancedOrder(seed, labels)(i) for i in range(60)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0][:30] != orders[0][30:]
    assert sorted(orders[0][:30]) == sorted(orders[0][30:]) == list(range(30))


def uneven(config):
    images = [(np.full((8, 8, 3), 10 * n, np.uint8), 0 if n < 12 else 1) for n in range(15)]
    return as_source(images, config)


def balanced():
    keys = ["model.image_size=8", "model.patch_size=4", "model.num_classes=2", "data.balance=class", "data.held_out=0"]
    return override(RunConfig(), [*keys, "train.batch_size=8", "train.label_drop=0", "train.accumulate=2"])


def test_batches_are_balanced_whatever_the_processes_and_workers():
    config = balanced()
    source = uneven(config)
    whole = Examples(source, config)
    first = [whole.packed(number) for number in range(4)]
    for batch in first:
        assert batch.y.bincount().tolist() == [4, 4]
    shares = [[Examples(source, config, rank, 2).packed(number) for number in range(4)] for rank in range(2)]
    for number in range(4):
        images = [image for share in shares for image in share[number].image.tolist()]
        assert images == first[number].image.tolist()
    loaded = list(load_batches(whole, 0, 4, 2, pin=False))
    assert [batch.image.tolist() for batch in loaded] == [batch.image.tolist() for batch in first]
    assert whole.image_of(3) == first[0].image[3]


def test_default_order_is_as_before():
    config = override(balanced(), ["data.balance=none"])
    assert balanced_order(config, uneven(config)) is None
    assert "balance" not in to_hash(config)["data"]
    assert to_hash(balanced())["data"]["balance"] == "class"


def test_what_balance_needs_is_said_in_one_line():
    with pytest.raises(UserError, match=r"^data.balance=class needs labels: set model.num_classes=auto, or"):
        override(RunConfig(), ["data.balance=class"])
    endless = override(RunConfig(), ["data.source=mosaic", "model.num_classes=4", "data.balance=class"])
    with pytest.raises(UserError, match=r"class needs data with an end, and mosaic has none: set it"):
        balanced_order(endless, open_source(endless.data, replace(endless.model, num_classes=0)))
