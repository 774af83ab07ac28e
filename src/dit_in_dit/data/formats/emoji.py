"""The embedded emoji: Noto in nine classes, or chosen styles in Unicode's subgroups."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from dit_in_dit.config.emoji import named_styles
from dit_in_dit.config.run import DataConfig, ModelConfig
from dit_in_dit.config.strict_json import parse_json
from dit_in_dit.data.files import ImageFiles
from dit_in_dit.data.formats.images import ImageSource
from dit_in_dit.data.groups import family
from dit_in_dit.data.source import Source

FOLDER = Path(str(files("dit_in_dit.data")))
SUBGROUPS = "subgroups.json"  # subgroup -> stems FAMILY~VARIANT of all emoji, those of skin tones too


class StyleFiles(ImageFiles):
    """Emoji of chosen styles as STYLE/SUBGROUP/FAMILY~VARIANT.webp: Noto's are those of emoji.zip.

    The classes are all of Unicode's subgroups, whatever the styles, so that models of different styles have the same
    labels.
    """

    def __init__(self, styles: tuple[str, ...], tones: bool) -> None:
        """`tones`: whether to include skin tones."""
        super().__init__(FOLDER / "emoji-styles.zip")
        self.noto = ImageFiles(FOLDER / "emoji.zip")
        index: dict[str, list[str]] = parse_json(self.content(SUBGROUPS), SUBGROUPS)
        subgroups = {stem: subgroup for subgroup, stems in index.items() for stem in stems}
        self.subgroups, self.notes = tuple(sorted(index)), []
        self.stored: dict[str, tuple[bool, str]] = {}  # name -> whether it is Noto's, and its name in the archive
        for archive in (self.noto, self):
            for member in archive.names:
                stem = Path(member).stem
                style = "noto" if archive is self.noto else member.partition("/")[0]
                if style in styles and (tones or "skin-tone" not in stem):
                    self.stored[f"{style}/{subgroups[stem]}/{stem}.webp"] = (archive is self.noto, member)
        self.names = sorted(self.stored)

    def content(self, name: str) -> bytes:
        """The stored bytes of one file."""
        in_noto, member = self.stored[name] if name != SUBGROUPS else (False, name)
        return self.noto.content(member) if in_noto else super().content(member)

    def sizes(self) -> list[int]:
        """The size of each file in bytes, in order."""
        return [len(self.content(name)) for name in self.names]

    def about(self, names: list[str]) -> tuple[tuple[str, ...], list[int], list[str]]:
        """The subgroups, and the labels and families of `names`."""
        labels = [self.subgroups.index(name.split("/")[1]) for name in names]
        return self.subgroups, labels, [family(name) for name in names]


class EmojiSource(ImageSource):
    """The embedded emoji: `emoji`, or `emoji:STYLE+STYLE` (config/emoji.py).

    Images of several styles train one model. Their styles are labels of the network, zero for the first style, in which
    it samples. So the held-out images are of the first style only. No image of a held-out family is trained on. A
    subgroup whose images would all be held out is trained on instead.
    """

    name = "emoji"
    by_path = rest_is_path = False

    @classmethod
    def recognises(cls, source: str, name: str) -> bool:
        """Whether `source` is the kind's name, alone or with styles."""
        return source.partition(":")[0] == name

    @classmethod
    def open(cls, data: DataConfig, model: ModelConfig) -> Source:
        """The images, decoded once per process: decoding takes seconds."""
        return cls._decode(data.source, model.image_size, model.channels, data.held_out)

    @classmethod
    @lru_cache(maxsize=2)
    def _decode(cls, source: str, size: tuple[int, int], channels: int, held_out: float) -> Source:
        model = ModelConfig(image_size=size, channels=channels, patch_size=1)
        return cls(DataConfig(source=source, held_out=held_out), model)

    def __init__(self, data: DataConfig, model: ModelConfig) -> None:
        super().__init__(data, model)
        styles, _ = named_styles(data.source)
        if not styles:
            return
        labels, families = np.array(self._labels), np.array(self.families)
        held = np.isin(np.arange(len(labels)), self._held)
        untrained = np.isin(labels, labels[~held], invert=True)  # keycap is one family
        held &= ~np.isin(families, families[untrained])
        numbers = np.array([styles.index(name.partition("/")[0]) for name in self.names])
        self._set_split(np.flatnonzero(~held), np.flatnonzero(held & (numbers == 0)), labels)
        if len(styles) > 1:
            self.styles = numbers[self._train]

    @classmethod
    def list_files(cls, data: DataConfig, num_classes: int) -> ImageFiles:
        """The members of the embedded .zip files."""
        styles, tones = named_styles(data.source)
        return StyleFiles(styles, tones) if styles else ImageFiles(FOLDER / "emoji.zip", num_classes)
