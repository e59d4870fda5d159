"""Image grids with readable labels: reconstructions, samples by class, samples by scale.

The same rows serve two readers. :func:`labelled_grid` draws them as one picture for a file;
``report.ImageGrid`` shows them as separate images with the labels as text.
"""

import io
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines.theme import LIGHT, Theme

_GAP = 4
_MARGIN = 16
_CELL = 96  # small images are enlarged by a whole factor to at least this many pixels


@dataclass(frozen=True)
class ImageRow:
    """One labelled row. Each cell is a stack of images, the first one on top."""

    label: str
    cells: Sequence[Sequence[Image.Image]]


def to_images(batch: Tensor | np.ndarray) -> list[Image.Image]:
    """RGB images of a batch.

    Args:
        batch: uint8, a tensor (B, 3, H, W) or an array (B, H, W, 3).

    Raises:
        InputError: another type or shape.
    """
    if isinstance(batch, Tensor):
        pixels = batch.detach().cpu().permute(0, 2, 3, 1).numpy() if batch.ndim == 4 else None
    else:
        pixels = batch
    if pixels is None or pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise InputError(
            f"images must be uint8 of shape (B, 3, H, W) as a tensor or (B, H, W, 3) as an array; "
            f"got {batch.dtype} {tuple(batch.shape)}"
        )
    return [Image.fromarray(np.ascontiguousarray(image)) for image in pixels]


def reconstruction_rows(
    originals: Sequence[Image.Image], rebuilt: Sequence[Image.Image], label: str = ""
) -> list[ImageRow]:
    """One row of pairs, the original above what the tokenizer makes of it."""
    pairs = zip(originals, rebuilt, strict=True)
    return [ImageRow(label, [(above, below) for above, below in pairs])]


def class_rows(
    images: Sequence[Image.Image],
    labels: Sequence[int],
    class_names: Sequence[str],
    *,
    per_class: int,
) -> list[ImageRow]:
    """One row a class that occurs, in class order, of its first ``per_class`` images.

    Args:
        images: as many as ``labels``.
        labels: class of each image; -1 (no class) makes a row "no class" at the end.
        class_names: name of each class; a class without one is called by its number.
    """
    by_class: dict[int, list[tuple[Image.Image]]] = {}
    for image, label in zip(images, labels, strict=True):
        row = by_class.setdefault(int(label), [])
        if len(row) < per_class:
            row.append((image,))
    rows = []
    for label in sorted(by_class, key=lambda label: (label < 0, label)):
        if label < 0:
            name = "no class"
        else:
            name = class_names[label] if label < len(class_names) else f"class {label}"
        rows.append(ImageRow(name, by_class[label]))
    return rows


def scale_rows(images: Sequence[tuple[float, Sequence[Image.Image]]]) -> list[ImageRow]:
    """One row a guidance scale, ascending; columns share class and noise, so they compare."""
    ordered = sorted(images, key=lambda pair: pair[0])
    return [ImageRow(f"scale {scale:g}", [(image,) for image in row]) for scale, row in ordered]


def labelled_grid(
    rows: Sequence[ImageRow],
    *,
    columns: int | None = None,
    side: int | None = None,
    theme: Theme = LIGHT,
) -> Image.Image:
    """Draw rows as one picture, each row's label at its left.

    Args:
        rows: images of one size throughout; every cell of one height.
        columns: cells a line; a longer row goes on below. None: the longest row's length.
        side: pixels to which the short side of larger images is shrunk; None: as they are.

    Raises:
        InputError: there is no image, or images differ in size.
    """
    sizes = {image.size for row in rows for cell in row.cells for image in cell}
    if len(sizes) != 1:
        found = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)) or "none"
        raise InputError(f"a grid needs images of one size; found {found}")
    (width, height) = next(iter(sizes))
    zoom: float = max(1, -(-_CELL // min(width, height)))
    scaling = Image.Resampling.NEAREST
    if side is not None and side < min(width, height):
        zoom, scaling = side / min(width, height), Image.Resampling.LANCZOS
    width, height = round(width * zoom), round(height * zoom)
    depth = max(len(cell) for row in rows for cell in row.cells)
    columns = columns or max(len(row.cells) for row in rows)

    font = _font(max(13, min(22, height // 6)))
    names = [_printable(row.label) for row in rows]
    limit = max(2 * width, 340)
    label_width = min(limit, max(math.ceil(font.getlength(name)) for name in names))
    left = _MARGIN + (label_width + _MARGIN if label_width else 0)
    line_height = depth * height + (depth - 1) * _GAP // 2
    # Lines of a stack stand apart from the next stack; single images form an even grid.
    step = line_height + (_GAP if depth == 1 else 4 * _GAP)
    lines = [max(1, -(-len(row.cells) // columns)) for row in rows]
    canvas = Image.new(
        "RGB",
        (
            left + columns * (width + _GAP) - _GAP + _MARGIN,
            2 * _MARGIN + sum(lines) * step - (step - line_height),
        ),
        theme.paper,
    )
    draw = ImageDraw.Draw(canvas)
    top = _MARGIN
    for name, row, count in zip(names, rows, lines, strict=True):
        if name:
            draw.text(
                (_MARGIN, top + line_height // 2),
                _shortened(name, font, label_width),
                fill=theme.ink,
                font=font,
                anchor="lm",
            )
        for index, cell in enumerate(row.cells):
            x = left + (index % columns) * (width + _GAP)
            y = top + (index // columns) * step
            for level, image in enumerate(cell):
                scaled = image.convert("RGB").resize((width, height), scaling)
                canvas.paste(scaled, (x, y + level * (height + _GAP // 2)))
        top += count * step
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save(path: Path, image: Image.Image) -> Path:
    """Write an image as PNG, whole (temporary name, then rename).

    Raises:
        StorageError: the disk is full or read-only.
    """
    atomic.write_bytes(path, png_bytes(image))
    return path


def _font(size: int) -> ImageFont.FreeTypeFont:
    # The font that matplotlib brings: the same as in the plots, and wide in its alphabets.
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size
    )


def _printable(label: str) -> str:
    """The label on one line: control characters become spaces."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in label).strip()


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
