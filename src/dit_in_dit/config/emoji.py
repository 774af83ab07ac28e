"""Styles of the embedded emoji that `data.source` names: `emoji:noto+twemoji`, `emoji:styles`, `emoji:noto+tones`."""

from __future__ import annotations

from dit_in_dit.config.errors import UserError, did_you_mean

STYLES = {  # with the licences of the images
    "noto": "Noto Color Emoji, copyright Google Inc. (OFL 1.1)",
    "twemoji": "Twemoji, copyright Twitter, Inc and other contributors (CC-BY 4.0), rendered to 64x64",
    "fluent": "Fluent Emoji, copyright Microsoft Corporation (MIT)",
}
ALL, TONES = "styles", "tones"  # words for all styles, and for the skin tones, which only Noto has here


def named_styles(source: str) -> tuple[tuple[str, ...], bool]:
    """The styles in a `data.source`, in its order, and whether it names skin tones; no styles for other sources.

    Raises:
        UserError: a word is unknown or repeated, or there are skin tones without Noto.
    """
    name, colon, rest = source.partition(":")
    if name != "emoji" or not colon:
        return (), False
    words = rest.split("+")
    for word in words:
        if word not in (known := (*STYLES, ALL, TONES)):
            raise UserError(
                f"data.source={source}: emoji has no style {word!r}{did_you_mean(word, known)}; join styles with +"
            )
    styles = [style for word in words if word != TONES for style in (STYLES if word == ALL else (word,))]
    if len(set(styles)) < len(styles) or words.count(TONES) > 1:
        raise UserError(f"data.source={source} names a style twice: name each once")
    if TONES in words and "noto" not in styles:
        raise UserError(f"data.source={source}: only Noto has skin tones here: add noto, or remove {TONES}")
    return tuple(styles), TONES in words
