"""The screen *Data*: what `dit-in-dit data` shows, and samples with their nearest training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import gradio as gr

from dit_in_dit.app import data
from dit_in_dit.app.drawing import ALL, Settings, Way, draw_way
from dit_in_dit.app.events import StopFlag, Updates, connect_work
from dit_in_dit.app.library import Library
from dit_in_dit.app.markup import html_table, note, picture, picture_row, progress
from dit_in_dit.app.run_menu import run_menu
from dit_in_dit.data.summary import NearPairs, Summary, search_pairs
from dit_in_dit.reporting.images import Pixels

MOST = 4  # samples


class DataScreen:
    """The screen's fields and events, added to the page that is being built."""

    def __init__(self, library: Library) -> None:
        self.library = library
        with gr.Row():
            place = gr.Textbox(
                "emoji", label="Source", info="a folder, .zip, .npz, .tar shards, hf:NAME, emoji, mosaic"
            )
            sets = gr.Textbox("", label="Config keys", info="KEY=VALUE, separated by spaces")
            go = gr.Button("Show the data", variant="primary", elem_id="data-go")
            end = gr.Button("Stop", elem_id="data-stop")
        self.message = gr.HTML(elem_id="data-message")
        self.facts = gr.HTML(elem_id="data-facts")
        gr.Markdown("### Samples and the training images nearest to them")
        with gr.Row():
            model = run_menu(library, "data-model")
            classes = gr.Textbox(ALL, label="Class")
            seed = gr.Number(0, label="Seed", precision=0)
            near = gr.Button("Draw and search", elem_id="data-near")
            stop = gr.Button("Stop")
        self.told = gr.HTML(elem_id="data-told")
        self.found = gr.HTML(elem_id="data-found")
        source, fields = [place, sets], [model, classes, seed]
        show, flag = [go.click, place.submit], gr.State(StopFlag())
        connect_work(show, end, flag, self.message, self.show, inputs=source, outputs=[self.facts])
        flag = gr.State(StopFlag())
        connect_work([near.click], stop, flag, self.told, self.search, inputs=fields, outputs=[self.found])

    def show(self, place: str, sets: str) -> Iterator[Updates]:
        """Show a source: pictures and counts of the classes, choices, then copies and near pairs."""
        yield {self.message: note("reading ...")}
        summary = data.summary_of(place, sets)
        source = summary.source
        size = f"{source.train_size or 'endless'} training images, {source.held_out_size} held out"
        remarks = [size, *source.notes, *(f"cannot be read: {name}" for name in source.skipped[: data.MOST_CLASSES])]
        html = "".join(map(note, remarks)) + picture(data.pictures_of(summary), "training images of each class")
        html += html_table(("class", "training images"), data.class_counts(summary))
        html += html_table(("chosen", "", "why", "to change it"), summary.choices)
        yield {self.facts: html, self.message: note("searching for copies ...")}
        for news in search_pairs(source):
            if isinstance(news, NearPairs):
                yield {self.facts: html + _copies(summary, news), self.message: ""}
            else:
                said = "searching for copies: {} of {} images".format(*news)
                yield {self.message: progress(said, news[0] / max(news[1], 1))}

    def search(self, name: str, label: str, seed: int) -> Iterator[Updates]:
        """Draw samples, and show each beside its nearest training images."""
        model = self.library.model(name)
        how = model.config.sample
        settings = Settings(label, seed, how.guidance, how.steps, how.sampler, min(MOST, how.micro_batch))
        for each in draw_way(model, settings):
            if not isinstance(each, Way):
                yield {self.told: progress(f"drawing, t = {each[0]:.2f}", 1 - each[0])}
                continue
            for news in data.nearest_training(model, each.estimate[-1]):
                if isinstance(news, tuple):
                    yield {self.told: progress("searching: {} of {} training images".format(*news), news[0] / news[1])}
                else:
                    yield {self.found: _pairs(each, news), self.told: ""}


def _copies(summary: Summary, found: NearPairs) -> str:
    """HTML: numbers of copies in both parts, and held-out images above their nearest training images."""
    parts = (
        "training images equal an earlier one",
        "held-out images equal a training image or an earlier held-out one",
    )
    counts = zip(found.copies, found.searched, parts, strict=True)
    html = "".join(note(f"{copies} of {searched} {said}") for copies, searched, said in counts)
    pairs = data.pairs_picture(summary, found)
    return html + (picture(pairs, "held-out images above their nearest training images") if pairs else "")


def _pairs(way: Way, found: Sequence[tuple[Pixels, list[str]]]) -> str:
    """HTML of samples, each beside its nearest training images."""
    rows = []
    for number, (images, titles) in enumerate(found):
        own = picture_row(f"sample {number}", way.estimate[-1][number : number + 1], way.labels[number : number + 1])
        rows.append(f'<div class="pair">{own}{picture_row("nearest training images", images, titles)}</div>')
    return "".join(rows)
