"""Inside: the maps of one image, held out, one's own or drawn by the model."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_in_dit.api.model import Model
from dit_in_dit.attention_maps.page import page
from dit_in_dit.attention_maps.record import Views, choose, record_maps
from dit_in_dit.config.errors import UserError, check_whole
from dit_in_dit.data.labels import class_numbers
from dit_in_dit.data.picture import UNREADABLE, as_float, resize_and_crop
from dit_in_dit.data.run_data import open_source_of
from dit_in_dit.runtime.seeding import generator
from dit_in_dit.sampling.numbered import sample

TIMES = tuple(round(0.1 * k, 1) for k in range(1, 10))


def held_out_view(model: Model, number: int, classes: str) -> Views:
    """The `number`-th held-out image of the classes; an empty text stands for all. Raises UserError."""
    source = open_source_of(model.folder, model.config)
    check_whole(number, "image", 0, 10**6)
    wanted = class_numbers(classes, model.classes) if classes else []
    views = choose(source, model.config, number + 1, TIMES, wanted)
    if number >= len(views.numbers):
        raise UserError(f"image must be below {len(views.numbers)}, the number of {views.split} images: got {number}")
    return _one(views.split, views.numbers[number], views.labels[number], views.images[number])


def own_view(model: Model, picture: NDArray[np.uint8], label: str) -> Views:
    """One's own picture, cropped and scaled as images of a folder are. Raises UserError."""
    shape = model.config.model
    if model.config.data.vae is not None or shape.channels not in (1, 3):
        raise UserError("an own picture needs a model of pixels: choose a held-out or a drawn image")
    try:
        pixels = resize_and_crop(Image.fromarray(picture), shape.image_size, shape.channels)
    except UNREADABLE as error:
        raise UserError(f"the picture cannot be used: {error}") from None
    return _one("own", 0, _label(model, label), as_float(pixels.transpose(2, 0, 1)))


def drawn_view(model: Model, seed: int, label: str) -> Views:
    """Sample 0 of a seed and a class. Raises UserError."""
    check_whole(seed, "seed", 0, 2**63 - 1)
    number = _label(model, label)
    image = sample(model.net, model.config, 1, seed=seed, classes=[number])[0]
    return _one("drawn", 0, number, image.clamp(-1, 1).numpy())


def inside_page(model: Model, views: Views) -> Iterator[tuple[int, int] | str]:
    """Record the maps: (done, total) after each pass, at last the page as HTML. Raises UserError."""
    steps = model.config.sample.steps
    total, said = len(views.times) + 2 * steps, SimpleQueue[Any]()

    ended = Event()

    def advance() -> None:
        if ended.is_set():
            raise InterruptedError
        said.put(None)

    def work() -> None:
        try:
            maps = record_maps(model.net, model.config, views, samples=1, classes=views.labels, advance=advance)
            said.put(page(maps, model.classes, model.folder.resolve().name, model.step))
        except BaseException as error:
            said.put(error)

    thread, done = Thread(target=work, daemon=True), 0
    thread.start()
    try:
        while (news := said.get()) is None:
            done = min(done + 1, total)
            yield done, total
    finally:
        ended.set()  # the generator may be closed early: nothing may still hook into the model after that
        thread.join()
    if isinstance(news, BaseException):
        raise news
    yield news


def _label(model: Model, label: str) -> int:
    return class_numbers(label, model.classes)[0] if label and model.config.model.num_classes else 0


def _one(split: str, number: int, label: int, image: NDArray[np.float32]) -> Views:
    noise = generator(0, "held_out", number).standard_normal(image.shape, np.float32)
    return Views(split, (number,), (label,), image[None].astype(np.float32), noise[None], TIMES)
