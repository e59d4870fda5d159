"""Linear flow: path, velocity target, and the ODE solvers that SiT and LightningDiT sample with.

Time runs from 0 (noise) to 1 (data): x_t = t x + (1 - t) eps, velocity x - eps (Liu et al. 2023,
"Flow straight and fast"; Ma et al. 2024, "SiT"). A solver knows the model only as a function
``velocity(x, t, rows)``:

    x     (b, N, C) fp32, some images of the batch
    t     (b,) float64 on the host, each image's time
    rows  (b,) int64 on x's device, the images' places in the batch

It returns (b, N, C) fp32. Times stay on the host so that the model can decide without waiting
for the device which rows to guide.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import RK45
from torch import Tensor

from detok_pipe.latents.errors import ConfigError, NonFiniteError

Velocity = Callable[[Tensor, np.ndarray, Tensor], Tensor]

# Dormand and Prince (1980), "A family of embedded Runge-Kutta formulae", as scipy tabulates it,
# with Shampine's (1986) fourth-order formulas, "Some practical Runge-Kutta formulas": his midpoint,
# which scipy has too, and his embedded solution, whose error is -2/3 of Dormand and Prince's. Row i
# holds the weights of stage i; the last row is the fifth-order solution, so its stage is the next
# step's first.
_NODES = [*RK45.C[1:], 1.0]
_STAGES = [*(RK45.A[i, :i] for i in range(1, 6)), RK45.B]
_ERROR = RK45.E * (-2 / 3)
_MIDPOINT = RK45.P @ 0.5 ** np.arange(1, 5)
_SAFETY, _GROW, _SHRINK = 0.9, 10.0, 0.2


def path(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = t x + (1 - t) eps. Shapes (B, N, C), (B, N, C), (B,)."""
    t = t.view(-1, 1, 1)
    return t * x + (1 - t) * eps


def velocity_target(x: Tensor, eps: Tensor) -> Tensor:
    """d x_t / dt = x - eps, (B, N, C)."""
    return x - eps


def times(points: int, shift: float = 1.0) -> np.ndarray:
    """``points`` float64 times from 0 to 1, t' = shift t / (1 - t + shift t).

    A shift below 1 moves them towards 0 (LightningDiT: 0.3); 1 spaces them evenly.

    Raises:
        ConfigError: fewer than two points.
    """
    if points < 2:
        raise ConfigError(f"steps {points}: an ODE needs at least 2 points (one step)")
    t = np.linspace(0.0, 1.0, points)
    return shift * t / (1 - t + shift * t)


def euler(velocity: Velocity, x: Tensor, t: np.ndarray) -> Tensor:
    """Euler's method from ``x`` (B, N, C) at t[0] to t[-1]: one evaluation for each interval."""
    rows = torch.arange(len(x), device=x.device)
    for now, then in itertools.pairwise(t):
        x = x + float(then - now) * velocity(x, np.full(len(x), now), rows)
    return x


def dopri5(
    velocity: Velocity,
    x: Tensor,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    per_image: bool = True,
) -> Tensor:
    """Adaptive fifth-order Runge-Kutta from ``x`` (B, N, C) at t = 0 to t = 1.

    The step size follows Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I",
    II.4. The last step passes t = 1 (the model sees times slightly above it) and the result is
    read off the quartic interpolant, as the published samples were made.

    Args:
        velocity: see the module.
        x: start, (B, N, C) fp32.
        rtol, atol: error allowed in a step, atol + rtol |x|.
        per_image: each image has its own step size, from the error's root mean square over that
            image, so that its result does not depend on the rest of the batch; finished images
            leave the batch. False: one step size from the whole batch (the reference).

    Raises:
        NonFiniteError: the velocity is not finite, or a step becomes too small to advance.
    """

    def size(value: Tensor) -> np.ndarray:
        """Root mean square, (b,) float64: of each image, or of the batch, repeated."""
        square = value.square().mean(dim=(1, 2) if per_image else None)
        return square.sqrt().cpu().double().numpy() * np.ones(len(value))

    def advanced(start: Tensor, step: np.ndarray, weights: np.ndarray, slopes: Tensor) -> Tensor:
        factors = torch.as_tensor(weights, dtype=start.dtype, device=start.device)
        return start + _column(step, start) * torch.tensordot(factors, slopes, 1)

    result = torch.empty_like(x)
    rows = torch.arange(len(x), device=x.device)
    t = np.zeros(len(x))
    f = velocity(x, t, rows)
    h = _first_step(velocity, x, f, rows, rtol, atol, size)
    while len(t):
        slopes = x.new_empty(7, *x.shape)  # (7, b, N, C)
        slopes[0] = f
        for i, (node, weights) in enumerate(zip(_NODES, _STAGES, strict=True), start=1):
            ahead = advanced(x, h, weights, slopes[:i])
            slopes[i] = velocity(ahead, t + node * h, rows)
        allowed = atol + rtol * torch.maximum(x.abs(), ahead.abs())
        ratio = size(advanced(torch.zeros_like(x), h, _ERROR, slopes) / allowed)
        if not np.isfinite(ratio).all() or (t + h <= t).any():
            raise NonFiniteError(
                f"dopri5: the velocity near t = {t.max():.4f} is not finite or too rough to "
                "follow; check the checkpoint, or use the euler method"
            )
        accepted = ratio <= 1.0
        finished = accepted & (t + h >= 1.0)
        if finished.any():
            done = torch.as_tensor(finished, device=x.device)
            middle = advanced(x, h, _MIDPOINT, slopes)
            quartic = _interpolated(
                x[done], middle[done], ahead[done], slopes[0][done], slopes[6][done],
                h[finished], ((1.0 - t) / h)[finished],
            )  # fmt: skip
            result[rows[done]] = quartic
        # Keep what goes on; an image whose step was refused starts again from the same place.
        going = torch.as_tensor(~finished, device=x.device)
        moved = torch.as_tensor(accepted[~finished], device=x.device).view(-1, 1, 1)
        x = torch.where(moved, ahead[going], x[going])
        f = torch.where(moved, slopes[6][going], slopes[0][going])
        rows = rows[going]
        t, h = _next_steps(t, h, ratio, accepted)
        t, h = t[~finished], h[~finished]
    return result


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """(b,) on the host -> (b, 1, 1) beside ``like``."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _next_steps(
    t: np.ndarray, h: np.ndarray, ratio: np.ndarray, accepted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Time and step size after a step with error ``ratio``; an accepted step never shrinks."""
    with np.errstate(divide="ignore"):
        factor = np.clip(_SAFETY * ratio**-0.2, np.where(ratio < 1.0, 1.0, _SHRINK), _GROW)
    return np.where(accepted, t + h, t), h * factor


def _first_step(
    velocity: Velocity,
    x: Tensor,
    f: Tensor,
    rows: Tensor,
    rtol: float,
    atol: float,
    size: Callable[[Tensor], np.ndarray],
) -> np.ndarray:
    """Starting step sizes (b,), from the sizes of x, of f and of the change of f."""
    scale = atol + rtol * x.abs()
    d0, d1 = size(x / scale), size(f / scale)
    tiny = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = np.where(tiny, 1e-6, 0.01 * d0 / np.where(tiny, 1.0, d1))
    change = velocity(x + _column(h0, x) * f, h0, rows) - f
    d2 = size(change / scale) / h0
    steepest = np.maximum(d1, d2)
    flat = steepest <= 1e-15
    h1 = np.where(flat, np.maximum(1e-6, 1e-3 * h0), (0.01 / np.where(flat, 1.0, steepest)) ** 0.2)
    return np.minimum(100 * h0, h1)


def _interpolated(
    x0: Tensor,
    middle: Tensor,
    x1: Tensor,
    f0: Tensor,
    f1: Tensor,
    h: np.ndarray,
    fraction: np.ndarray,
) -> Tensor:
    """The quartic through x0, middle, x1 with end slopes f0, f1, at ``fraction`` of the step."""
    s, step = _column(fraction, x0), _column(h, x0)
    # In s in [0, 1], from the five conditions: x0 + s h f0 + a s^2 + b s^3 + c s^4.
    rise, bend = x1 - x0, middle - x0
    a = step * (f1 - 4 * f0) - 5 * rise + 16 * bend
    b = step * (5 * f0 - 3 * f1) + 14 * rise - 32 * bend
    c = step * 2 * (f1 - f0) - 8 * rise + 16 * bend
    return x0 + s * (step * f0 + s * (a + s * (b + s * c)))
