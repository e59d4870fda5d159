"""The linear path and its solvers, against closed forms and scipy."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from detok_pipe.generators import flow
from detok_pipe.latents.errors import ConfigError, NonFiniteError


def test_path_runs_from_noise_to_data_along_its_velocity():
    x, eps = torch.randn(2, 3, 5, 4)
    assert torch.equal(flow.path(x, eps, torch.zeros(3)), eps)
    assert torch.equal(flow.path(x, eps, torch.ones(3)), x)
    before, after = (flow.path(x, eps, torch.full((3,), t)) for t in (0.25, 0.75))
    torch.testing.assert_close((after - before) / 0.5, flow.velocity_target(x, eps))


def test_times():
    np.testing.assert_allclose(flow.times(5), [0, 0.25, 0.5, 0.75, 1])
    warped = flow.times(250, shift=0.3)
    assert warped[[0, -1]].tolist() == [0, 1]
    assert (np.diff(warped) > 0).all()
    np.testing.assert_allclose(warped[83], 0.3 / 2.3)  # t = 1/3
    with pytest.raises(ConfigError, match="steps 1"):
        flow.times(1)


def test_euler_takes_the_left_end_of_each_interval():
    seen = []

    def velocity(x, t, rows):
        seen.append(t[0])
        return torch.full_like(x, t[0])

    x = flow.euler(velocity, torch.zeros(2, 1, 1), np.array([0.0, 0.25, 1.0]))
    assert seen == [0.0, 0.25]
    torch.testing.assert_close(x, torch.full((2, 1, 1), 0.75 * 0.25))


def rotation(x, t, rows):
    """Circles at a speed that depends on the image and the time."""
    speed = torch.as_tensor((1 + 3 * t) * (1 + rows.numpy()), dtype=x.dtype).view(-1, 1, 1)
    return torch.stack([-x[..., 1], x[..., 0]], -1) * speed


@pytest.mark.parametrize("per_image", [True, False])
def test_dopri5_follows_a_known_solution(per_image):
    start = torch.tensor([[[1.0, 0.0]]] * 3, dtype=torch.float64)
    end = flow.dopri5(rotation, start, rtol=1e-8, atol=1e-8, per_image=per_image)
    angle = 2.5 * torch.arange(1, 4, dtype=torch.float64)
    exact = torch.stack([angle.cos(), angle.sin()], -1).view(3, 1, 2)
    torch.testing.assert_close(end, exact, atol=1e-6, rtol=0)


def test_dopri5_starts_like_scipy():
    """First step size against scipy's RK45. (The later steps differ: our error estimate is 2/3
    of scipy's, and scipy also shrinks after an accepted step. The golden file pins ours.)"""
    seen = []

    def velocity(x, t, rows):
        seen.append(t[0])
        return torch.cos(3 * x) * float(np.exp(t[0]))

    start = torch.linspace(-1, 1, 12, dtype=torch.float64).view(1, 3, 4)
    end = flow.dopri5(velocity, start)
    reference = solve_ivp(
        lambda t, y: np.cos(3 * y) * np.exp(t),
        (0, 3),
        start.numpy().ravel(),
        method="RK45",
        rtol=1e-3,
        atol=1e-6,
        dense_output=True,
    )
    assert np.abs(np.array(seen) - reference.t[1]).min() < 1e-12
    np.testing.assert_allclose(end.numpy().ravel(), reference.sol(1.0), atol=2e-3)


def test_embedded_formula_is_of_fourth_order():
    """Shampine's weights, from the published fractions."""
    embedded = [1951 / 21600, 0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60]
    np.testing.assert_allclose(np.append(flow._STAGES[-1], 0) - embedded, flow._ERROR, atol=1e-15)


def test_dopri5_per_image_does_not_see_the_batch():
    start = torch.randn(5, 4, 2, dtype=torch.float64)

    def velocity_of(rows):
        return lambda x, t, inner: rotation(x, t, rows[inner])

    together = flow.dopri5(velocity_of(torch.arange(5)), start)
    for i in range(5):
        alone = flow.dopri5(velocity_of(torch.tensor([i])), start[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-12, rtol=0)
        # One image is a batch: both kinds of control are then the same rule.
        whole = flow.dopri5(velocity_of(torch.tensor([i])), start[i : i + 1], per_image=False)
        assert torch.equal(whole, alone)
    # The whole-batch control moves images by their neighbours, within the error allowed.
    shared = flow.dopri5(velocity_of(torch.arange(5)), start, per_image=False)
    assert 0 < (shared - together).abs().max() < 0.05


def test_finished_images_leave_the_batch():
    sizes = []

    def velocity(x, t, rows):
        sizes.append(len(rows))
        return rotation(x, t, rows * 5)

    flow.dopri5(velocity, torch.randn(3, 4, 2))
    assert (sizes[0], sizes[-1]) == (3, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dopri5_refuses_a_velocity_that_is_not_finite(value):
    with pytest.raises(NonFiniteError, match="dopri5"):
        flow.dopri5(lambda x, t, rows: torch.full_like(x, value), torch.zeros(1, 2, 2))
