"""The report: every string escaped, nothing loaded from outside, both pages complete."""

import base64
import dataclasses
import io
import json
import math
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from detok_pipe.latents.errors import CheckpointError
from detok_pipe.pipelines import report, report_parts, report_quickstart, report_run
from detok_pipe.pipelines.commands_score import sweep_cfg
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Curve, Measured, Metric, Sweep, SweepPoint
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
from detok_pipe.pipelines.report_parts import ScoreRow

HOSTILE = (
    "<img onerror=1>",
    "</script><script>alert(1)</script>",
    "\"' onload='x' style=\"",
    "</style></title>&amp;",
    "]]> <!-- {{ 7*7 }} {% raw %}",
    "漢字 – ñ \u202e \u2028",
)
EVIL = " ".join(HOSTILE)
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "div", "header", "main", "section"),
    *("footer", "nav", "ol", "li", "a", "h1", "h2", "span", "p", "code", "figure", "picture"),
    *("source", "img", "figcaption", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt"),
    *("dd", "pre", "details", "summary", "script"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "name", "class", "href", "id", "src", "srcset"),
    *("alt", "media", "width", "height", "style", "role", "aria-label", "tabindex", "scope"),
    *("open", "type"),
}


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.script = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, "elements are closed in the order in which they opened"

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        elif "style" not in self.open:
            self.text.append(data)

    def handle_comment(self, data) -> None:
        raise AssertionError(f"a comment slipped in: {data}")

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def checked(html: str) -> Page:
    """Parse a page and hold it to what every page promises."""
    page = Page(html)
    assert not page.open
    assert {tag for tag, _ in page.elements} <= TAGS
    for _, attributes in page.elements:
        assert set(attributes) <= ATTRIBUTES
    assert page.all("script") in (
        [],
        [{"type": "application/json", "id": "report-data"}],
    )
    for attributes in page.all("img") + page.all("source"):
        address = attributes.get("src") or attributes["srcset"]
        head, _, body = address.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as image:
            image.load()
            assert image.format is not None
            assert image.format.lower() in head
    assert all(attributes.get("alt") for attributes in page.all("img"))
    for attributes in page.all("a"):
        assert attributes["href"].startswith("#section-")
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    policy = next(a for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    return page


def picture(size: int = 8) -> Image.Image:
    return Image.linear_gradient("L").resize((size, size)).convert("RGB")


def rows(label: str = "cat", count: int = 3) -> list[ImageRow]:
    return [ImageRow(label, [(picture(),)] * count)]


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (14_123_456, "14.1 MB"), (42e9, "42 GB")]
)
def test_sizes_read_well(count, text) -> None:
    assert report.byte_size(int(count)) == text


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


def test_a_plot_has_a_version_for_each_window_and_scheme() -> None:
    figure = report_parts.curve_figure([Curve("a", [1, 2], [2.0, 1.0])], caption="c")
    assert isinstance(figure, Figure)
    assert len({figure.image, *(address for _, address in figure.sources)}) == 4
    assert "2 at step 1" in figure.alt
    empty = report_parts.curve_figure([Curve("a", [1], [math.nan])], caption="c")
    assert isinstance(empty, Text)


METRICS = (Metric("FD-EffLite2@128"), Metric("KD"))


def sweep(best: float | None = 2.0, name: str = "mar") -> Sweep:
    points = [
        SweepPoint(s, {"FD-EffLite2@128": Measured(10 + s, 1.0), "KD": Measured(s)})
        for s in (3.0, 1.0, 2.0)
    ]
    return Sweep(name, points, best)


@pytest.mark.parametrize("best", [1.0, 2.0, None])
def test_a_sweep_s_table_is_in_order_and_marks_the_best(best) -> None:
    blocks = report_parts.sweep_blocks([sweep(best)], METRICS, ["the best is at the edge"])
    assert Text("The best is at the edge", tone="warning") in blocks
    table = next(b for b in blocks if isinstance(b, Table))
    assert [row[0] for row in table.rows] == [1.0, 2.0, 3.0]
    assert table.highlight == (None if best is None else int(best) - 1)


def test_curves_of_a_sweep_are_told_apart_and_only_the_first_decides() -> None:
    blocks = report_parts.sweep_blocks([sweep(3.0, "100 samples"), sweep(None, "50")], METRICS)
    table = next(b for b in blocks if isinstance(b, Table))
    assert [row[1] for row in table.rows] == ["100 samples"] * 3 + ["50"] * 3
    assert table.highlight == 2


def test_metrics_that_nobody_has_take_no_column() -> None:
    table = report_parts.score_table(
        [ScoreRow("a", 10, {"KD": Measured(1.0)})], METRICS, caption="c"
    )
    assert list(table.columns) == ["Images", METRICS[1].label, "Count"]


def quickstart_facts(name: str = "cat") -> report_quickstart.QuickstartFacts:
    curve = Curve(name, [1, 2, 3], [3.0, 2.0, 1.0])
    pairs = [ImageRow("", [(picture(), picture())] * 4)]
    return report_quickstart.QuickstartFacts(
        preset=name,
        device="2 CPU cores",
        data=report_quickstart.DataFacts(
            name, f"credit {name}", 48, {name: (90, 10), "dog": (45, 5)}, rows(name)
        ),
        tokenizer=report_quickstart.TokenizerFacts(
            parameters=3_000_000,
            grid=(8, 8),
            channels=16,
            curves=[curve],
            reconstructions=pairs,
            psnr=Measured(21.8, 0.2),
            psnr_mean_image=Measured(11.0, 0.2),
            rfd=Measured(88.0, 2.0),
            rfd_name="FD-EffLite2@128",
            images=15,
        ),
        cache=report_quickstart.CacheFacts({"path": name}, f"all well {name}", {"format": "zarr"}),
        generator=report_quickstart.GeneratorFacts(
            name,
            5_000_000,
            [curve],
            sweep(name=name),
            {1.0: rows(name), 2.0: rows(name)},
            rows(name),
        ),
        probe=report_quickstart.ProbeFacts(0.41, 0.68, 0.5),
        metrics=METRICS,
        feature_dimensions=1280,
        scores=[
            ScoreRow(f"trained {name}", 512, {"FD-EffLite2@128": Measured(203.4, 3.9)}, name),
            ScoreRow("untrained", 512, {"FD-EffLite2@128": Measured(611.0, 7.0)}),
        ],
        timings=[("tokenizer", 231.0), (name, 30.0)],
        settings={name: {name: name}, "Empty": {}},
        commands=[f"detok-pipe quickstart --out {name}"],
        footer=name,
    )


def test_the_quickstart_page_tells_all_it_must() -> None:
    page = checked(report.render(report_quickstart.quickstart_page(quickstart_facts())))
    for fact in (
        "150 images of 2 classes",
        "credit cat",
        "21.80 ± 0.20",
        "11.00 ± 0.20",
        "88.0 ± 2.0",
        "all well cat",
        "best scale is 2",
        "203.4 ± 3.9",
        "611.0 ± 7.0",
        "not an FID",
        "With 512 images and 1,280 feature dimensions it is strongly biased",
        "unbiased",
        "41 %",
        "68 %",
        "50 %",
        "4 min 21 s",
        "demonstration",
        "detok-pipe quickstart --out cat",
        "adm_in256_stats.npz",
        "my-images/train",
    ):
        assert fact in page.words, fact
    assert json.loads(page.script)["scores"][0]["metrics"]["FD-EffLite2@128"]["value"] == 203.4
    assert len(page.all("section")) == 9
    assert all("open" not in attributes for attributes in page.all("details"))


def run_facts(name: str = "mar-b") -> report_run.RunFacts:
    return report_run.RunFacts(
        name=name,
        record={
            "config": {"generator": name, "lr": 2e-4},
            "inputs": {"cache": f"c0ffee {name}", "tokenizer": "beef"},
            "latents": {
                "path": name,
                "grid": [16, 16],
                "channels": 16,
                "class_names": [name],
                "stats": {"mean": [0.5]},
            },
            "tokenizer": {"encoder": name},
            "steps": 1000,
            "parameters": 208_000_000,
            "versions": {"torch": name},
        },
        curves=[Curve(name, [1, 500], [2.0, 1.0])],
        speed=[Curve("images a second", [1, 500], [20.0, 21.0])],
        sweeps=[sweep(name=name)],
        warnings=[name],
        sweep_settings={name: name},
        metrics=METRICS,
        scores=[ScoreRow(name, 50_000, {"FD-EffLite2@128": Measured(5.2, 0.05)})],
        notes=[name],
        samples=[(name, rows(name))],
        commands=[name],
        footer=name,
    )


def test_the_run_page_tells_all_it_must() -> None:
    page = checked(report.render(report_run.run_page(run_facts())))
    for fact in ("c0ffee", "beef", "5.200 ± 0.050", "50,000", "208,000,000", "best guidance scale"):
        assert fact in page.words, fact
    assert "steps done of 1,000" in page.words


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], EVIL])
def test_both_pages_stand_any_name(name) -> None:
    visible = " ".join(name.split())
    for made in (
        report_quickstart.quickstart_page(quickstart_facts(name)),
        report_run.run_page(run_facts(name)),
    ):
        assert checked(report.render(made)).words.count(visible) >= 8


def test_a_run_that_has_just_begun_has_a_page() -> None:
    bare = report_run.RunFacts("new", {"config": {}})
    page = checked(report.render(report_run.run_page(bare)))
    assert "No loss has been logged yet" in page.words
    assert "No sweep yet" in page.words
    assert "No final score yet" in page.words


def sweep_result(network: str, ema: bool) -> dict:
    sampling = {
        "guidance_scale": 1.0,
        "guidance_schedule": "linear",
        "guidance_interval": [0.0, 1.0],
        "guided_channels": None,
        "temperature": 0.9,
        "steps": 25,
        "iterations": None,
        "method": None,
        "clip": 4.0,
    }
    value = {"KD": {"value": 3.0, "error": 0.5}}
    final = {
        "metrics": value,
        "notes": ["a note"],
        "settings": {"count": 50, "samples": {"sampling": sampling | {"guidance_scale": 2.5}}},
    }
    return {
        "generator": {"ema": ema},
        "plan": {
            "scales": [1.0, 2.5],
            "sampling": sampling,
            "unguided": sampling | {"temperature": 0.95},
            "count": 20,
            "search": "halving",
            "final_count": 50,
            "seed": 7,
            "precision": "fp32",
        },
        "metrics": [{"name": "KD", "better": "lower"}],
        "rungs": [{"count": n, "points": [{"scale": 2.5, "metrics": value}]} for n in (10, 20)],
        "best": 2.5,
        "final": [final],
        "warnings": ["a warning"],
        "settings": {"network": {"name": network}},
        "reference": "my ref.npz",
        "tokenizer": "tok",
    }


@pytest.mark.parametrize(("network", "ema"), [("FID", True), ("FD-EffLite2@128", False)])
def test_a_sweep_joins_the_page_with_a_command_that_the_program_takes(network, ema) -> None:
    facts = dataclasses.replace(run_facts(), commands=["train", "report"])
    swept = report_run.with_sweep(
        facts, Path("my run"), sweep_result(network, ema), rows("scale 2.5")
    )
    assert (swept.commands[0], swept.commands[2]) == ("train", "report")
    words = shlex.split(swept.commands[1])
    assert words[:3] == ["detok-pipe", "sweep-cfg", "my run"]
    options = {p.opts[0]: p for p in sweep_cfg.params} | {"--no-ema": None}
    given = [word for word in words[3:] if word.startswith("--")]
    assert set(given) <= set(options)
    assert ("--no-ema" in given) != ema
    assert words[words.index("--ref") + 1] == "my ref.npz"
    assert words[words.index("--unguided-temperature") + 1] == "0.95"
    assert words[words.index("--interval") + 1 :][:2] == ["0.0", "1.0"]
    assert ("--resolution" in given) == (network != "FID")
    page = checked(report.render(report_run.run_page(swept)))
    for fact in ("guidance scale 2.5", "3.00 ± 0.50", "A warning", "a note", "20 samples"):
        assert fact in page.words, fact


def test_a_run_directory_is_read(tmp_path) -> None:
    run = tmp_path / "my run"
    run.mkdir()
    record = {
        "kind": "generator",
        "config": {"generator": "mar-b"},
        "inputs": {},
        "versions": {"torch": "2"},
        "command": ["/usr/bin/detok-pipe", "train-gen", "mar-b", "--out", "my run"],
    }
    (run / "config.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0, "images_per_second": 9}\n{"step": 2, "loss": 1.5}\n{"step": 3, "l'
    )
    facts = report_run.read_run(run)
    assert facts.commands[0] == "detok-pipe train-gen mar-b --out 'my run'"
    assert facts.commands[1].startswith("detok-pipe report ")
    assert list(facts.curves[0].values) == [2.0, 1.5]
    assert list(facts.speed[0].values) == [9.0]
    assert "mar-b" in checked(report.render(report_run.run_page(facts))).words
    with pytest.raises(CheckpointError, match="no run directory"):
        report_run.read_run(tmp_path)
