"""Build the embedded emoji image sets, 64x64 WebP images in two .zip files.

emoji.zip has Noto Color Emoji as CLASS/FAMILY.webp or CLASS/FAMILY~VARIANT.webp. A family holds the variants of one
drawing (skin tone, gender, hair, direction, colour), so that a split by family puts no near-duplicates on both sides.
emoji-styles.zip has the same emoji of other sets, without skin tones, as STYLE/FAMILY~VARIANT.webp, and
subgroups.json with the stems of each of Unicode's subgroups.

Needs Pillow with raqm (its wheels have it), the font, Unicode's emoji-test.txt, and what emoji_styles.py names.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from emoji_styles import STYLES, TONE, near_pairs, render_styles

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
OUT = Path(__file__).resolve().parents[1] / "src/dit_in_dit/data"
STRIKE, CANVAS, SIZE = 109, 136, 64  # the font's only bitmap size, its glyphs' advance, the side of an image

CLASSES = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
# These fly another country's flag: they come last, so that the image is kept under that country.
BORROWED = re.compile("flag: (Bouvet Island|Ceuta & Melilla|Clipperton Island|Diego Garcia|Svalbard.*|U.S. .*)")

# Emoji presentation, skin tone, "joined with a gender sign", hair.
MODIFIER = re.compile("\ufe0f|[\U0001f3fb-\U0001f3ff]|\u200d[\u2640\u2642]|\u200d?[\U0001f9b0-\U0001f9b3]")
# Man, woman -> person; boy, girl -> child; old man, old woman -> older person.
NEUTRAL = str.maketrans("\U0001f468\U0001f469\U0001f466\U0001f467\U0001f474\U0001f475", "🧑🧑🧒🧒🧓🧓")
COLOUR = "(red|pink|orange|yellow|green|(light )?blue|purple|brown|black|grey|white)"
# Families that code points do not tell: full names, up to a colon, of the same drawing mirrored, rotated,
# recoloured or told apart by a detail.
TWINS = {
    "person": "person|man|woman",
    "family": "family",
    "kiss": "kiss",
    "couple-with-heart": "couple with heart",
    "people-holding-hands": "(people|men|women|woman and man) holding hands",
    "handshake": "handshake",
    "person-with-crown": "prince|princess|person with crown",
    "person-dancing": "(man|woman) dancing",
    "pregnant-person": "pregnant (man|woman|person)",
    "santa-claus": "(Santa|Mrs.|mx) [Cc]laus",
    "backhand-index-pointing": "backhand index pointing .*",
    "thumbs": "thumbs (up|down)",
    "raised-hand": "raised (back of )?hand",
    "grinning-face": "grinning face( with big eyes)?",
    "anguished-face": "(anguished|fearful) face|frowning face with open mouth",
    "angry-face": "(angry|enraged) face",
    "heart": f"{COLOUR} heart",
    "bird": "(black )?bird",
    "apple": "(red|green) apple",
    "clock-face": r"\w+(-thirty| o.clock)",
    "moon": "(new|full) moon",
    "moon-face": "(new|full) moon face",
    "cityscape": "cityscape( at dusk)?",
    "traffic-light": "(horizontal|vertical) traffic light",
    "snowman": "snowman( without snow)?",
    "umbrella": "umbrella( with rain drops)?",
    "beach-umbrella": "beach with umbrella|umbrella on ground",
    "hourglass": "hourglass.*",
    "medal": r"(sports|\w+ place) medal",
    "baseball": "baseball|softball",
    "glasses": "(sun)?glasses",
    "optical-disk": "optical disk|dvd",
    "magnifying-glass": "magnifying glass.*",
    "speaker": r"speaker \w+ volume",
    "lock": "(un)?locked",
    "book": "(closed|green|blue|orange) book",
    "banknote": r"\w+ banknote",
    "tray": "(inbox|outbox) tray",
    "mailbox": "(closed|open) mailbox.*",
    "calendar": "(tear-off )?calendar",
    "camera": "camera( with flash)?",
    "mobile-phone": "mobile phone|vibration mode",
    "circle": f"{COLOUR} circle",
    "square": f"{COLOUR} ((large|medium|medium-small|small) )?square",
    "square-button": "(white|black) square button",
    "diamond": r"\w+ (orange|blue) diamond",
    "red-triangle": "red triangle pointed .*",
    "arrow": "((up|down)(-left|-right)?|left|right) arrow",
    "two-way-arrow": "(up-down|left-right) arrow",
    "curving-arrow": r"(left|right) arrow curving \w+",
    "play-button": "(play|reverse|upwards|downwards) button",
    "bright-button": "(dim|bright) button",
    "fast-button": "fast.(forward|reverse|up|down) button",
    "track-button": "(next|last) track button",
    "question-mark": "(red|white) question mark",
    "exclamation-mark": "(red|white) exclamation mark",
    "keycap": "keycap",
    "plain-flag": "(black|white) flag",
    "flag-indonesia": "flag: (Indonesia|Monaco)",
    "flag-netherlands": "flag: (Netherlands|Luxembourg|Paraguay)",
    "flag-ireland": "flag: (Ireland|Côte d.Ivoire)",
    "flag-mali": "flag: (Mali|Guinea)",
}


class Emoji(NamedTuple):
    """One sequence of emoji-test.txt: its characters, its full name, its class and its subgroup."""

    text: str
    name: str
    label: str
    subgroup: str


def read_emoji_test(path: Path) -> list[Emoji]:
    """Every fully-qualified sequence of the nine classes, in Unicode's order."""
    emoji, group, subgroup = [], "", ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        if line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        match = re.match(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)", line)
        if match and group in CLASSES:
            text = "".join(chr(int(code, 16)) for code in match[1].split())
            emoji.append(Emoji(text, match[2], CLASSES[group], subgroup))
    return sorted(emoji, key=lambda e: bool(BORROWED.fullmatch(e.name)))


def render(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The glyph in the middle of a white square, at 64x64; None where the font has no single glyph for it."""
    left, top, right, bottom = font.getbbox(text)
    if right - left > CANVAS or bottom - top == 0:  # several glyphs side by side; the empty .notdef
        return None
    image = Image.new("RGB", (CANVAS, CANVAS), "white")
    corner = ((CANVAS - left - right) // 2, (CANVAS - top - bottom) // 2)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)  # BOX is uneven at 136/64


def slug(name: str) -> str:
    """The name in lower-case ascii letters, digits and hyphens."""
    name = name.replace("#", "hash").replace("*", "asterisk").replace("\u2019", "")
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def families(emoji: list[Emoji], images: list[Image.Image], names: dict[str, str]) -> list[str]:
    """A family name for each image; `names` gives the name of a bare base sequence."""
    parent = list(range(len(emoji)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    titles, first = [], {}
    for i, e in enumerate(emoji):
        base = MODIFIER.sub("", e.text).translate(NEUTRAL)
        twin = next((t for t, rule in TWINS.items() if re.fullmatch(f"({rule})(:.*)?", e.name)), None)
        titles.append(twin or slug(names.get(base, e.name)))
        for key in filter(None, (base, twin)):
            parent[root(i)] = root(first.setdefault(key, i))
    for distance, i, j in near_pairs(images):
        if root(i) != root(j):
            print(f"near {distance:.3f}: {emoji[i].name} = {emoji[j].name}")
            parent[root(j)] = root(i)
    votes: dict[int, Counter[str]] = {}
    for i, title in enumerate(titles):
        votes.setdefault(root(i), Counter())[title] += 1
    chosen = {r: count.most_common(1)[0][0] for r, count in votes.items()}
    if clash := [name for name, n in Counter(chosen.values()).items() if n > 1]:
        raise ValueError(f"two families have one name: {clash}")
    return [chosen[root(i)] for i in range(len(emoji))]


def encode(image: Image.Image) -> bytes:
    """A lossless WebP file."""
    data = io.BytesIO()  # quality is effort here: 100 takes five minutes more to save 2 %
    image.save(data, "WEBP", lossless=True, quality=80, method=6, exact=True)
    return data.getvalue()


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Files, stored in order with fixed dates and permissions: the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name)  # dated 1980-01-01
            info.create_system, info.external_attr = 3, 0o100644 << 16
            archive.writestr(info, files[name])
    print(f"{path}: {path.stat().st_size:,} bytes")


def render_noto(sequences: list[Emoji], font: ImageFont.FreeTypeFont) -> tuple[list[Emoji], list[Image.Image]]:
    """The sequences that the font draws, each image once, and their images."""
    kept: dict[bytes, tuple[Emoji, Image.Image]] = {}
    missing, same = [], []
    for e in sequences:
        image = render(e.text, font)
        if image is None:
            missing.append(e.name)
        elif image.tobytes() in kept:
            same.append(e.name)
        else:
            kept[image.tobytes()] = (e, image)
    print(f"{len(sequences)} sequences; skipped, no single glyph: {len(missing)} {missing}")
    print(f"skipped, equal to an earlier image: {len(same)} {same}")
    emoji, images = map(list, zip(*kept.values(), strict=True))
    return emoji, images


def print_counts(rows: dict[str, list[str]], columns: dict[str, set[str]]) -> None:
    """A table of rows (name -> stems): how many of the stems each column has, and of how many families."""
    print(f"{'':20}" + "".join(f"{column:>10}" for column in columns) + f"{'families':>10}")
    everything = {"total": [stem for stems in rows.values() for stem in stems]}
    for name, stems in (rows | everything).items():
        counts = [len(known.intersection(stems)) for known in columns.values()]
        counts.append(len({stem.split("~")[0] for stem in stems}))
        print(f"{name:20}" + "".join(f"{count:10}" for count in counts))


def main() -> int:
    """Parse the command line, build both .zip files and print what is in them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf with bitmaps")
    parser.add_argument("--emoji-test", type=Path, default=EMOJI_TEST, help="Unicode's emoji-test.txt")
    parser.add_argument("--modules", type=Path, default=Path("node_modules"), help="folder of the npm packages")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write to")
    args = parser.parse_args()
    needed = {"fonts-noto-color-emoji (Debian)": args.font, "unicode-data (Debian)": args.emoji_test}
    needed |= {f"{style.package} (npm)": args.modules / style.package for style in STYLES.values()}
    for package, path in needed.items():
        if not path.exists():
            print(f"{path}: no such file; package {package} has it", file=sys.stderr)
            return 2
    if not features.check("raqm"):
        print("Pillow without raqm cannot join emoji sequences; Debian's package libraqm0", file=sys.stderr)
        return 2

    sequences = read_emoji_test(args.emoji_test)
    bare = {e.text.replace("\ufe0f", ""): e.name for e in sequences}
    emoji, images = render_noto(sequences, ImageFont.truetype(args.font, STRIKE))
    noto, texts = dict[str, Image.Image](), dict[str, str]()
    classes: dict[str, list[str]] = {label: [] for label in CLASSES.values()}
    subgroups: dict[str, list[str]] = {}
    for e, image, family in zip(emoji, images, families(emoji, images, bare), strict=True):
        variant = slug(e.name)
        stem = family + (f"~{variant}" if variant != family else "")
        if stem in noto:
            raise ValueError(f"two images have one name: {stem}")
        noto[stem], texts[stem] = image, e.text
        classes[e.label].append(stem)
        subgroups.setdefault(slug(e.subgroup), []).append(stem)
    folders = {stem: label for label, stems in classes.items() for stem in stems}
    write_zip(args.out / "emoji.zip", {f"{folders[stem]}/{stem}.webp": encode(image) for stem, image in noto.items()})
    print_counts(classes, {"images": set(noto)})

    styles = {f"{name}.webp": encode(image) for name, image in render_styles(args.modules, noto, texts).items()}
    index = json.dumps({name: sorted(stems) for name, stems in subgroups.items()}, indent=0)
    write_zip(args.out / "emoji-styles.zip", styles | {"subgroups.json": index.encode()})
    has = {"noto": {stem for stem in noto if not TONE.search(texts[stem])}}
    has |= {style: {Path(name).stem for name in styles if name.startswith(f"{style}/")} for style in STYLES}
    print_counts(subgroups, has)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
