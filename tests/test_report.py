"""The template: every string escaped, nothing loaded from outside, values that read well."""

import base64
import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image
from report_making import HOSTILE, checked, picture, rows

from detok_pipe.pipelines import report
from detok_pipe.pipelines.plots import Measured
from detok_pipe.pipelines.report import (
    Code,
    Disclosure,
    Figure,
    ImageGrid,
    KeyValues,
    Report,
    Section,
    Table,
    Text,
)


def every_block(text: str) -> list[report.Block]:
    return [
        Text(text),
        Text(text, tone="warning"),
        Figure(report.image_address(picture()), alt=text, caption=text),
        ImageGrid(rows(text), alt=text, caption=text, levels=(text,)),
        Table(columns=[text, "n"], rows=[[text, 1], [Path(text), None]], caption=text),
        KeyValues({text: {text: [text]}}),
        Code(text, caption=text),
        Disclosure(text, [Text(text)]),
    ]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_string_arrives_as_text(text) -> None:
    made = Report(
        title=text,
        lead=text,
        headline=[(text, text)],
        sections=[Section(text, every_block(text))],
        data={text: text},
        footer=text,
    )
    page = checked(report.render(made))
    visible = " ".join(text.split())
    assert page.words.count(visible) >= 20
    assert any(a["alt"] == text for a in page.all("img"))
    assert json.loads(page.script) == {text: text}


def test_the_embedded_numbers_hold_no_angle_bracket_and_read_back() -> None:
    data = {"</script>": ["<!--", Measured(1.5, math.nan)], "n": (1, None, True), "p": Path("a")}
    html = report.render(Report("t", "l", [], data=data))
    block = html.split('id="report-data">')[1].split("</script>")[0]
    assert "<" not in block
    assert json.loads(block) == {
        "</script>": ["<!--", {"value": 1.5, "error": None}],
        "n": [1, None, True],
        "p": "a",
    }


def test_backticks_set_code_and_nothing_else() -> None:
    html = report.render(Report("t", "run `detok-pipe <x>` now ` alone", []))
    assert "run <code>detok-pipe &lt;x&gt;</code> now ` alone" in html.replace("\n", "")


def test_the_same_report_gives_the_same_bytes() -> None:
    made = Report("t", "l", [Section("s", every_block("x"))])
    assert report.render(made) == report.render(made)


def test_a_page_replaces_the_old_one_whole(tmp_path) -> None:
    target = tmp_path / "new" / "report.html"
    report.write_report(target, Report("old", "l", []))
    report.write_report(target, Report("naïve 漢", "l", []))
    assert "<title>naïve 漢</title>" in target.read_text(encoding="utf-8")
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (True, "yes"),
        (1234567, "1,234,567"),
        (-3, "−3"),
        (3.14159, "3.142"),
        (1234.5, "1,234"),
        (1.5e-7, "1.500e−07"),
        (math.nan, "not finite"),
        (Measured(203.44, 3.91), "203.4 ± 3.9"),
        (Measured(-0.2, 0.913), "−0.20 ± 0.91"),
        (Measured(1234.0, 56.0), "1,234 ± 56"),
        (Measured(2.5), "2.5"),
        (Measured(2.5, math.nan), "2.5"),
        (Measured(math.inf, 1.0), "not finite"),
        (Path("a/b"), "a/b"),
        ([1, "é"], '[1, "é"]'),
    ],
)
def test_values_read_well(value, text) -> None:
    assert report.cell_text(value) == text


def test_settings_keep_every_digit() -> None:
    items = {"lr": 2e-4, "seed": 1234567, "loss": {"kl": 1e-6, "parts": {}}, "compile": False}
    assert report.flattened(items) == [
        ("lr", "0.0002"),
        ("seed", "1234567"),
        ("loss.kl", "1e-06"),
        ("loss.parts", "{}"),
        ("compile", "no"),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (41.4, "41 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds, text) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize("count", [1, 5, 9, 10, 16, 40])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_row_of_images_breaks_into_even_lines(count, narrow) -> None:
    columns = ImageGrid(rows(count=count), alt="a", caption="c").columns(narrow)
    lines = math.ceil(count / columns)
    assert columns == math.ceil(count / lines)
    assert columns * 56 <= (340 if narrow else 900)


def test_small_images_keep_their_pixels_and_large_ones_their_size() -> None:
    small = report.image_address(picture(48))
    assert small.startswith("data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(small.partition(",")[2]))) as image:
        assert image.size == (144, 144)
        assert image.resize((48, 48), Image.Resampling.NEAREST).tobytes() == picture(48).tobytes()
    large = report.image_address(picture(256))
    assert large.startswith("data:image/jpeg")
