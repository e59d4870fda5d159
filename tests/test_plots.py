"""Loss curves and sweeps: they draw any finite data, whole images, and the same bytes again."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines import plots
from detok_pipe.pipelines.plots import Curve, Measured, Metric, Sweep, SweepPoint
from detok_pipe.pipelines.theme import DARK, LIGHT

FD, KD = Metric("FD"), Metric("KD")


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def differs(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where pixels are far from a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels - wanted).sum(-1) > 60


def is_colour(pixels: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(pixels - wanted).sum(-1) < 12


def sweep(best: float | None = 2.0, error: float | None = 1.0) -> Sweep:
    points = [
        SweepPoint(s, {"FD": Measured(10 + (s - 2) ** 2, error), "KD": Measured(s)})
        for s in (3.0, 1.0, 2.0)
    ]
    return Sweep("mar", points, best)


def test_smoothing_keeps_a_constant_and_has_no_start_up_bias() -> None:
    assert np.allclose(plots.smoothed(np.full(500, 3.0)), 3.0)
    assert plots.smoothed(np.arange(1.0, 1000.0))[0] == 1.0


def test_smoothing_is_the_weighted_mean_of_the_past() -> None:
    values = np.random.default_rng(0).normal(size=200)
    keep = 1 - 1 / (0.05 * 200)
    for end in (1, 7, 200):
        weights = keep ** np.arange(end)[::-1]
        expected = np.average(values[:end], weights=weights)
        assert plots.smoothed(values, 0.05)[end - 1] == pytest.approx(expected)


def test_short_curves_are_not_smoothed() -> None:
    values = np.array([5.0, 1.0, 9.0])
    assert np.array_equal(plots.smoothed(values), values)


def test_curves_come_from_the_records_that_have_the_key() -> None:
    records = [{"step": 1, "loss": 2}, {"step": 2, "note": "x"}, {"step": 3, "loss": 1.5, "kl": 4}]
    (loss,) = plots.curves_from_metrics("mar", records)
    assert (loss.name, list(loss.steps), list(loss.values)) == ("mar", [1.0, 3.0], [2.0, 1.5])
    both = plots.curves_from_metrics("mar", records, ["loss", "kl", "absent"])
    assert [c.name for c in both] == ["mar loss", "mar kl"]


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_curve_is_drawn_on_the_page_s_colour(theme, narrow) -> None:
    steps = np.arange(300)
    pixels = decoded(
        plots.loss_curve([Curve("a", steps, np.exp(-steps / 90))], theme=theme, narrow=narrow)
    )
    assert not differs(pixels[:, :3], theme.paper).any()
    assert is_colour(pixels, theme.series[0]).sum() > 200
    assert pixels.shape[1] == (780 if narrow else 1520)


def test_the_same_numbers_give_the_same_bytes() -> None:
    curve = Curve("a", [1, 2, 3, 4], [4.0, 3.0, 2.0, 1.0])
    assert plots.loss_curve([curve]) == plots.loss_curve([curve])
    assert plots.sweep_curve([sweep()], [FD]) == plots.sweep_curve([sweep()], [FD])


def test_values_that_are_not_finite_are_left_out() -> None:
    clean = Curve("a", [1, 2, 4], [4.0, 3.0, 1.0])
    dirty = Curve("a", [1, 2, 3, 4, 5], [4.0, 3.0, math.nan, 1.0, math.inf])
    assert plots.loss_curve([dirty]) == plots.loss_curve([clean])


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_nothing_finite_is_an_error_that_says_so(values) -> None:
    with pytest.raises(InputError, match="no finite value"):
        plots.loss_curve([Curve("a", range(len(values)), values)])
    with pytest.raises(InputError, match="sweep-cfg"):
        plots.sweep_curve([Sweep("a", [SweepPoint(1.0, {"FD": Measured(math.nan)})])], [FD])


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.0, 0.0, 0.0], [-3.0, -1.0, -2.0]])
def test_awkward_curves_are_drawn(values) -> None:
    assert decoded(plots.loss_curve([Curve("a", range(len(values)), values)])).size


def test_a_wide_span_gets_a_log_axis_and_a_zero_does_not() -> None:
    curve = Curve("a", [1, 2, 3], [1000.0, 10.0, 0.1])
    assert plots.loss_curve([curve]) == plots.loss_curve([curve], log=True)
    assert plots.loss_curve([curve]) != plots.loss_curve([curve], log=False)
    zero = Curve("a", [1, 2, 3], [1000.0, 10.0, 0.0])
    assert plots.loss_curve([zero]) == plots.loss_curve([zero], log=False)


@pytest.mark.parametrize("name", ["$x_{", "_private", "</svg>", "漢字 é", "a\nb", r"\frac", ""])
def test_any_name_can_stand_in_a_legend(name) -> None:
    curve = Curve(name, [1, 2, 3], [3.0, 2.0, 1.0])
    assert decoded(plots.loss_curve([curve, Curve("b", [1, 2], [1.0, 2.0])])).size
    runs = [sweep(), Sweep(name, sweep().points, 1.0)]
    assert decoded(plots.sweep_curve(runs, [FD, Metric(name)])).size


def test_a_legend_names_runs_whose_names_start_with_an_underscore() -> None:
    plain = [Curve("run", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("", [1, 2], [2.0, 2.0])]
    hidden = [Curve("_run", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("", [1, 2], [2.0, 2.0])]
    assert decoded(plots.loss_curve(hidden)).sum() < decoded(plots.loss_curve(plain)).sum()


def test_a_sweep_has_one_panel_a_metric_that_was_measured() -> None:
    one = decoded(plots.sweep_curve([sweep()], [FD]))
    two = decoded(plots.sweep_curve([sweep()], [FD, KD]))
    assert two.shape[0] > 1.5 * one.shape[0]
    assert np.array_equal(decoded(plots.sweep_curve([sweep()], [FD, Metric("absent")])), one)


def test_the_best_scale_and_the_error_bars_are_seen() -> None:
    plain = plots.sweep_curve([sweep(best=None, error=None)], [FD])
    assert plots.sweep_curve([sweep(best=2.0, error=None)], [FD]) != plain
    assert plots.sweep_curve([sweep(best=None, error=1.0)], [FD]) != plain


def test_points_may_come_in_any_order() -> None:
    ordered = Sweep("mar", sorted(sweep().points, key=lambda p: p.scale), 2.0)
    assert plots.sweep_curve([ordered], [FD]) == plots.sweep_curve([sweep()], [FD])


def test_a_label_points_towards_better_and_breaks_only_at_spaces() -> None:
    assert Metric("FD", "lower").label.endswith("↓")
    assert Metric("IS", "higher").label.endswith("↑")
    assert "-" not in Metric("FD-EffLite2@128").label


def test_a_saved_figure_replaces_the_old_one_and_leaves_nothing_else(tmp_path) -> None:
    png = plots.loss_curve([Curve("a", [1, 2], [2.0, 1.0])])
    target = tmp_path / "new" / "loss.png"
    plots.save(target, b"old")
    plots.save(target, png)
    assert target.read_bytes() == png
    assert list(target.parent.iterdir()) == [target]
