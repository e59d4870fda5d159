"""Parts of pages: curves, sweeps and score tables."""

import math

import pytest
from report_making import METRICS, sweep

from detok_pipe.pipelines import report_parts
from detok_pipe.pipelines.plots import Curve, Measured
from detok_pipe.pipelines.report import Figure, Table, Text
from detok_pipe.pipelines.report_parts import ScoreRow


def test_a_plot_has_a_version_for_each_window_and_scheme() -> None:
    figure = report_parts.curve_figure([Curve("a", [1, 2], [2.0, 1.0])], caption="c")
    assert isinstance(figure, Figure)
    assert len({figure.image, *(address for _, address in figure.sources)}) == 4
    assert "2 at step 1" in figure.alt
    empty = report_parts.curve_figure([Curve("a", [1], [math.nan])], caption="c")
    assert isinstance(empty, Text)


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
