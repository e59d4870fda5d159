"""The colours that plots, pictures and the report share, in light and in dark.

A figure is drawn on the page's own paper colour, so that it joins the page without a frame.
Text and line colours keep a contrast of at least 4.5 against their paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours as ``#rrggbb``. ``series`` tells runs, metrics or classes apart, in order of use."""

    name: str
    paper: str
    panel: str
    ink: str
    muted: str
    rule: str
    series: tuple[str, ...]


LIGHT = Theme(
    name="light",
    paper="#fcfbf8",
    panel="#f3f1ec",
    ink="#1f2226",
    muted="#666b73",
    rule="#dcd8cf",
    series=("#2a5d8f", "#b1512d", "#4b7a3f", "#7a4f8f", "#8a6d1f", "#3f7f86"),
)
DARK = Theme(
    name="dark",
    paper="#15171a",
    panel="#1e2125",
    ink="#e6e3dc",
    muted="#9a9ea6",
    rule="#343840",
    series=("#86b4e3", "#e8976f", "#93c482", "#c39bd8", "#d6b95e", "#7fc4cc"),
)
