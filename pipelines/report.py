"""A page as plain data, rendered by one template into one self-contained HTML file.

A :class:`Report` is sections of blocks; a block is text, a figure, a grid of images, a
table, key-values, code, or a disclosure that holds other blocks. Blocks carry plain
strings: the template (``report.html.j2``, autoescape on) is the only place where HTML is
written. Text between backticks is set as code; there is no other markup.

The file needs nothing beside it: styles are inline, images are ``data:`` addresses, and a
content security policy in the page forbids everything else.
"""

import base64
import functools
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2
from PIL import Image, ImageOps

from detok_pipe.latents import atomic
from detok_pipe.pipelines.pictures import ImageRow, png_bytes
from detok_pipe.pipelines.plots import Measured
from detok_pipe.pipelines.theme import DARK, LIGHT, Theme

Cell = str | bool | int | float | Measured | Path | None
_LOSSLESS_UP_TO = 128  # pixels; larger photographs go into the page as JPEG
_ENLARGED_TO = 128  # smaller images get whole pixels repeated, so that no browser blurs them
_LINE, _LABELLED_LINE, _NARROW_LINE = 848, 710, 340  # CSS pixels that a line of images has


@dataclass(frozen=True)
class Text:
    """A paragraph, or a note set apart (``kind`` "note" or "warning")."""

    kind: ClassVar[str] = "text"
    text: str
    tone: Literal["plain", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Figure:
    """One picture. ``sources`` are (media query, image address) tried before ``image``."""

    kind: ClassVar[str] = "figure"
    image: str
    alt: str
    caption: str
    sources: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class ImageGrid:
    """Rows of small images with their labels as text; see :class:`pictures.ImageRow`.

    ``size`` is the width of a cell in CSS pixels where there is room; ``levels`` names the
    images of a stack, top to bottom.
    """

    kind: ClassVar[str] = "grid"
    rows: Sequence[ImageRow]
    alt: str
    caption: str
    size: int = 88
    levels: Sequence[str] = ()

    def columns(self, narrow: bool) -> int:
        """Cells a line, so that the longest row breaks into lines of nearly equal length."""
        longest = max((len(row.cells) for row in self.rows), default=1)
        if narrow:
            room, least = _NARROW_LINE, max(56.0, 0.5 * self.size)
        else:
            labelled = any(row.label for row in self.rows)
            room, least = _LABELLED_LINE if labelled else _LINE, 0.72 * self.size
        lines = max(1, math.ceil(longest * least / room))
        return max(1, math.ceil(longest / lines))


@dataclass(frozen=True)
class Table:
    """``highlight`` is the row to stress. All columns of numbers but the first align right."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    highlight: int | None = None

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers only."""
        return [
            all(row[i] is None or isinstance(row[i], int | float | Measured) for row in self.rows)
            for i in range(len(self.columns))
        ]


@dataclass(frozen=True)
class KeyValues:
    """A list of names and values; nested mappings become dotted names."""

    kind: ClassVar[str] = "keys"
    items: Mapping[str, Any]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The flattened (name, text) pairs."""
        return flattened(self.items)


@dataclass(frozen=True)
class Code:
    """Commands or program text, as typed."""

    kind: ClassVar[str] = "code"
    text: str
    caption: str = ""


@dataclass(frozen=True)
class Disclosure:
    """Blocks behind a summary line, closed unless ``open``."""

    kind: ClassVar[str] = "disclosure"
    summary: str
    blocks: "Sequence[Block]"
    open: bool = False


Block = Text | Figure | ImageGrid | Table | KeyValues | Code | Disclosure


@dataclass(frozen=True)
class Section:
    """A numbered part of the page."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """The whole page.

    Attributes:
        title: heading of the page and of the window.
        lead: what the page shows, in a sentence or two.
        headline: (name, value) pairs shown large under the lead; at most six read well.
        sections: in reading order.
        data: the numbers of the page for programs; kept in the page as JSON.
        footer: provenance in one line.
    """

    title: str
    lead: str
    sections: Sequence[Section]
    headline: Sequence[tuple[str, Cell]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    footer: str = ""


def render(report: Report) -> str:
    """The page as HTML. The same report gives the same bytes."""
    return _template().render(report=report, themes=(LIGHT, DARK))


def write_report(path: Path, report: Report) -> Path:
    """Render and write the page whole (temporary name, then rename).

    Raises:
        StorageError: the disk is full or read-only.
    """
    atomic.write_text(path, render(report))
    return path


def plot_figure(draw: Callable[..., bytes], *, alt: str, caption: str) -> Figure:
    """A plot drawn four times: for light and dark pages, wide and narrow windows.

    Args:
        draw: called with ``theme`` and ``narrow``, returns PNG (see ``plots``).
    """

    def address(theme: Theme, narrow: bool) -> str:
        return data_address(draw(theme=theme, narrow=narrow), "image/png")

    narrow, dark = "(max-width: 560px)", "(prefers-color-scheme: dark)"
    return Figure(
        image=address(LIGHT, False),
        alt=alt,
        caption=caption,
        sources=(
            (f"{narrow} and {dark}", address(DARK, True)),
            (narrow, address(LIGHT, True)),
            (dark, address(DARK, False)),
        ),
    )


def data_address(content: bytes, media_type: str) -> str:
    """A ``data:`` address of these bytes."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def image_address(image: Image.Image) -> str:
    """A ``data:`` address of an image: PNG where small, else JPEG of high quality."""
    image = image.convert("RGB")
    if max(image.size) <= _LOSSLESS_UP_TO:
        image = ImageOps.scale(
            image, max(1, -(-_ENLARGED_TO // max(image.size))), Image.Resampling.NEAREST
        )
        return data_address(png_bytes(image), "image/png")
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=92, subsampling=0)
    return data_address(buffer.getvalue(), "image/jpeg")


def cell_text(value: Any) -> str:
    """A value as the page shows it: four significant digits, thousands separated."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Measured):
        return _measured(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def flattened(items: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, text) pairs of a nested mapping, in order; numbers keep every digit."""
    pairs: list[tuple[str, str]] = []
    for name, value in items.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            pairs.extend(flattened(value, f"{key}."))
        elif isinstance(value, float):
            pairs.append((key, f"{value:.10g}"))
        elif isinstance(value, int) and not isinstance(value, bool):
            pairs.append((key, str(value)))
        else:
            pairs.append((key, cell_text(value)))
    return pairs


def duration(seconds: float) -> str:
    """Seconds as people say them: ``0.4 s``, ``41 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and (size < 1e-4 or size >= 1e7):
        text = f"{value:.3e}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−")


def _measured(measured: Measured) -> str:
    """The value with as many decimals as two digits of its error support."""
    value, error = measured.value, measured.error
    if error is None or not math.isfinite(error) or error <= 0 or not math.isfinite(value):
        return _number(value)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{_number(value)} ± {_number(error)}"
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def _segments(text: str) -> list[tuple[bool, str]]:
    """(is code, text) pieces: what stands between backticks is code."""
    pieces = re.split(r"`([^`\n]+)`", text)
    return [(index % 2 == 1, piece) for index, piece in enumerate(pieces) if piece]


def _script_json(data: Any) -> str:
    """JSON that can stand inside a ``<script>`` element: it holds no ``<`` at all."""
    text = json.dumps(_plain_data(data), ensure_ascii=False, indent=1, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _plain_data(value: Any) -> Any:
    if isinstance(value, Measured):
        return _plain_data(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        cell=cell_text, segments=_segments, image=image_address, script_json=_script_json
    )
    source = resources.files("detok_pipe.pipelines").joinpath("report.html.j2")
    return environment.from_string(source.read_text(encoding="utf-8"))
