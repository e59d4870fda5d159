"""What the tests of pages share: a browser's view of a page, hostile names, small blocks."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Measured, Metric, Sweep, SweepPoint

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


METRICS = (Metric("FD-EffLite2@128"), Metric("KD"))


def sweep(best: float | None = 2.0, name: str = "mar") -> Sweep:
    points = [
        SweepPoint(s, {"FD-EffLite2@128": Measured(10 + s, 1.0), "KD": Measured(s)})
        for s in (3.0, 1.0, 2.0)
    ]
    return Sweep(name, points, best)
