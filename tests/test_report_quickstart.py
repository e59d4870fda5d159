"""The quickstart's page tells all that it must, whatever the names."""

import json

import pytest
from report_making import EVIL, HOSTILE, METRICS, checked, picture, rows, sweep

from detok_pipe.pipelines import report, report_quickstart
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.plots import Curve, Measured
from detok_pipe.pipelines.report_parts import ScoreRow


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
        "imagenet-256",
        "my-images/train",
    ):
        assert fact in page.words, fact
    assert json.loads(page.script)["scores"][0]["metrics"]["FD-EffLite2@128"]["value"] == 203.4
    assert len(page.all("section")) == 9
    assert all("open" not in attributes for attributes in page.all("details"))


@pytest.mark.parametrize("name", [HOSTILE[0], HOSTILE[1], EVIL])
def test_it_stands_any_name(name) -> None:
    made = report_quickstart.quickstart_page(quickstart_facts(name))
    assert checked(report.render(made)).words.count(" ".join(name.split())) >= 8
