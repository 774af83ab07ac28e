"""Class-balanced order of training examples (data.balance=class), a function of the seed and the example's number."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_in_dit.config.errors import UserError
from dit_in_dit.config.run import RunConfig
from dit_in_dit.data.source import Source
from dit_in_dit.runtime.seeding import generator


class BalancedOrder:
    """A function from the number of an example to the number of its training image.

    Consecutive rounds have one example of each class that has images, in a new random order. So after any number of
    examples, two classes differ by at most one example. A class shows its images in a random order, each once before
    any repeats, then in a new order.
    """

    def __init__(self, seed: int, labels: ArrayLike) -> None:
        labels = np.asarray(labels)
        by_class = np.argsort(labels, kind="stable")
        self.members = np.split(by_class, np.flatnonzero(np.diff(labels[by_class])) + 1)
        self.seed, self.known = seed, dict[int, tuple[int, NDArray[np.int64]]]()

    def __call__(self, example: int) -> int:
        turn, place = divmod(example, len(self.members))
        chosen = int(self._permutation(0, turn, len(self.members))[place])
        images = self.members[chosen]
        epoch, place = divmod(turn, len(images))
        return int(images[self._permutation(1 + chosen, epoch, len(images))[place]])

    def _permutation(self, row: int, epoch: int, size: int) -> NDArray[np.int64]:
        """Order of the classes in a round (row 0), or of a class's images in an epoch of that class."""
        if row not in self.known or self.known[row][0] != epoch:
            stream = generator(self.seed, "balance", epoch * (1 + len(self.members)) + row)
            self.known[row] = epoch, stream.permutation(size)
        return self.known[row][1]


def balanced_order(config: RunConfig, source: Source) -> BalancedOrder | None:
    """The order of a run with data.balance=class, else None. UserError if the source is endless: its labels are not
    known before the images are made."""
    if config.data.balance == "none":
        return None
    if source.train_size is None:
        raise UserError(f"data.balance=class needs data with an end, and {config.data.source} has none: set it to none")
    return BalancedOrder(config.seed, source.labels)
