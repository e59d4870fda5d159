"""Sampling speed against a plain reading of the papers, in one run.

    python benchmarks/sampling.py                            # all six, small, CPU, fp32
    python benchmarks/sampling.py mar-b --dtype bf16         # CPUs that multiply in bf16
    python benchmarks/sampling.py --size base                # MAR-B and RandomAR-B, minutes
    python benchmarks/sampling.py --size large --device cuda --compile

For each generator: images/s of the package and of a plain loop with the same weights and noise,
their ratio, for models with a diffusion head also the ratio of the rest (the transformer), and the
largest difference relative to the largest value. The plain loops (`plain_samplers.py`) compute
everything again at each step; under bf16 they run in autocast, with its cache of cast weights. The
roofline is the share of the package's time that its multiplications would take at the rate of a
large matrix product on the same device.

On a CPU at size base, the plain autoregressive loop would take the better part of an hour.
There its step is timed at some positions, on the package's own tokens, and its sum follows by
interpolation: a step's cost is a constant, a part that grows with the position, and a small part
that grows with its square. MAR takes 8 iterations and 2 images there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import click
import numpy as np
import plain_samplers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.generator import Generator
from detok_pipe.generators.head_sampler import HeadSampler
from detok_pipe.generators.packed_linear import frozen_linear, pack_linears
from detok_pipe.generators.registry import FAMILIES, build_generator, default_sampling
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.token_generator import pick
from detok_pipe.latents.noise import Noise

SMALL = {"width": 192, "depth": 4, "heads": 6}
SMALL_HEAD = {"head_width": 256, "head_depth": 3}
POSITIONS = 5  # at which the plain autoregressive step is timed, the first and the last included


class Clock:
    """Seconds spent inside the functions that it watches, with the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any) -> Tensor:
            start = self.now()
            out = function(*args)
            self.seconds += self.now() - start
            return out

        return watched


def build(name: str, size: str, device: torch.device) -> Generator:
    """A generator with random weights everywhere, so that no layer is the identity or zero."""
    overrides: dict[str, Any] = {}
    if size == "small":
        with_head = family(name) in ("mar", "random-ar", "raster-ar")
        overrides = SMALL | (SMALL_HEAD if with_head else {})
    grid = (8, 8) if size == "small" else (16, 16)
    torch.manual_seed(0)
    model = build_generator(name, grid=grid, channels=16, num_classes=1000, **overrides)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device).eval()


def family(name: str) -> str:
    return name.rpartition("-")[0]


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    product, clock = frozen_linear(a, a[0]), Clock(device)
    for _ in range(3):
        product(a)
    start = clock.now()
    for _ in range(10):
        product(a)
    return 10 * 2 * size**3 / (clock.now() - start)


def counted(run: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products and attentions in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def sampler_flops(model: nn.Module, batch: int, sampling: Sampling) -> int:
    """FLOPs of ``model.sample``, counted on tensors without values."""
    model = copy.deepcopy(model).to("meta")
    condition, noise = (
        torch.zeros(batch, dtype=torch.int64, device="meta"),
        Noise(0, range(batch), device="meta"),
    )
    if isinstance(model, Backbone):
        rows: list[int] = []
        out = torch.zeros(1, model.places, model.outputs * model.channels, device="meta")

        def no_network(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            rows.append(len(x))
            return out.repeat(len(x), 1, 1)

        with mock.patch.object(model, "network", no_network):
            model.sample(condition, sampling, noise)
        x, t = out[..., : model.channels], torch.zeros(1, device="meta")
        return sum(rows) * counted(lambda: model.network(x, t, condition[:1]))
    steps = sampling.steps or 100
    one, two = (
        counted(lambda n=n: model.sample(condition, replace(sampling, steps=n), noise))
        for n in (1, 2)
    )
    return one + (steps - 1) * (two - one)


@dataclass
class Timing:
    """One sampler's result and its seconds, in all and in the diffusion head."""

    z: Tensor
    seconds: float
    head: float


def timed(run: Callable[[], Tensor], clock: Clock) -> Timing:
    clock.seconds, start = 0.0, clock.now()
    z = run()
    return Timing(z, clock.now() - start, clock.seconds)


def interpolated_ar(
    model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise, z: Tensor, clock: Clock
) -> Timing:
    """The plain loop's time from some of its positions, on the tokens of ``z`` (B, N, C)."""
    order = model.places(noise, condition.device)
    tokens = pick(z, order)
    replayed = tokens.clone()
    positions = np.linspace(0, model.tokens - 1, POSITIONS).round().astype(int)
    costs = []
    for i in positions:
        step = partial(
            plain_samplers.plain_ar_step,
            model,
            condition,
            sampling,
            noise,
            order,
            tokens[:, :i].contiguous(),
        )
        timing = timed(step, clock)
        replayed[:, i] = timing.z
        costs.append((timing.seconds, timing.head))
    seconds, head = (
        float(np.interp(range(model.tokens), positions, column).sum())
        for column in zip(*costs, strict=True)
    )
    return Timing(model.assembled(replayed, order), seconds, head)


def compare(
    name: str,
    size: str,
    device: torch.device,
    *,
    bf16: bool,
    batch: int,
    steps: int | None,
    iterations: int | None,
    compiled: bool,
    same_products: bool,
    repeats: int,
    rate: float,
) -> str:
    """One line of the table; ``rate`` is the device's FLOP/s in a matrix product."""
    model = build(name, size, device)
    fast = copy.deepcopy(model).to(torch.bfloat16 if bf16 else torch.float32)
    pack_linears(fast)
    if same_products:
        pack_linears(model)
    changes = model.used({"steps": steps, "iterations": iterations})
    sampling = replace(default_sampling(name), **changes)
    condition = (torch.arange(batch, device=device) * 37) % 1000
    noise = Noise(0, range(batch), device=device)
    clock = Clock(device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    sampled_only = isinstance(model, ARDiff) and size != "small" and device.type == "cpu"

    def ours() -> Tensor:
        return fast.sample(condition, sampling, noise)

    def plain(z: Tensor) -> Timing:
        with autocast():
            if sampled_only:
                return interpolated_ar(model, condition, sampling, noise, z, clock)
            run = plain_samplers.PLAIN[family(name)]
            return timed(partial(run, model, condition, sampling, noise), clock)

    with torch.no_grad(), watched_heads(clock):
        flops = sampler_flops(fast, batch, sampling)
        if compiled:
            fast.compile_sampler()
        if compiled or device.type == "cuda":
            ours()
        pairs = []
        for _ in range(repeats):
            mine = timed(ours, clock)
            pairs.append((mine, plain(mine.z)))
    mine = min((pair[0] for pair in pairs), key=lambda timing: timing.seconds)
    other = min((pair[1] for pair in pairs), key=lambda timing: timing.seconds)
    rest = (other.seconds - other.head) / (mine.seconds - mine.head)
    difference = float((mine.z - other.z).abs().max() / mine.z.abs().max())
    return (
        f"{name:16}{batch:6}{batch / mine.seconds:12.3f}{batch / other.seconds:12.4f}"
        f"{other.seconds / mine.seconds:7.1f}x"
        + (f"{rest:11.1f}x" if other.head else f"{'':12}")
        + f"{flops / rate / mine.seconds:10.0%}{difference:12.1e}"
        + ("  plain: interpolated" if sampled_only else "")
    )


@contextmanager
def watched_heads(clock: Clock) -> Iterator[None]:
    """Lets the clock see the diffusion heads of the package and of the plain loops."""
    with (
        mock.patch.object(HeadSampler, "__call__", clock.watch(HeadSampler.__call__)),
        mock.patch.object(plain_samplers, "plain_head", clock.watch(plain_samplers.plain_head)),
    ):
        yield


def noise_line(device: torch.device) -> str:
    """Speed of the counter-based normals beside torch's own, for the draws of one head chain."""
    clock, noise, shape = Clock(device), Noise(0, range(64), device=device), (101, 64, 16)

    def best(run: Callable[[], Tensor]) -> float:
        return min(timed(run, clock).seconds for _ in range(5))

    ours = best(lambda: noise.normal("draws", shape))
    torchs = best(lambda: torch.randn(64, *shape, device=device))
    count = 64 * 101 * 64 * 16
    return (
        f"normals: {count / ours / 1e6:.0f} M/s counter-based, {count / torchs / 1e6:.0f} M/s "
        f"torch.randn, {ours / torchs:.1f} times its time"
    )


@click.command(help=__doc__.splitlines()[0])
@click.argument("names", nargs=-1)
@click.option("--size", type=click.Choice(["small", "base", "large"]), default="small")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="[default: bf16 on CUDA]")
@click.option("--batch", type=int, help="[default: 256 on CUDA, else 8]")
@click.option("--steps", type=int, help="Head, diffusion or ODE steps. [default: the model's]")
@click.option("--num-iter", type=int, help="MAR's iterations. [default: the model's]")
@click.option("--compile", "compiled", is_flag=True, help="Compile the package's samplers.")
@click.option(
    "--same-products",
    is_flag=True,
    help="Let the plain loops use the package's linear layers on a CPU, too.",
)
@click.option("--repeats", default=1, show_default=True, help="Runs of which the best counts.")
def main(
    names: tuple[str, ...],
    size: str,
    device: str,
    dtype: str | None,
    batch: int | None,
    steps: int | None,
    num_iter: int | None,
    compiled: bool,
    same_products: bool,
    repeats: int,
) -> None:
    place = torch.device(device)
    cuda = place.type == "cuda"
    bf16 = cuda if dtype is None else dtype == "bf16"
    if not names:
        families = FAMILIES if cuda or size == "small" else ("mar", "random-ar")
        names = tuple(f"{kind}-{'l' if size == 'large' else 'b'}" for kind in families)
    rate = matrix_rate(place, torch.bfloat16 if bf16 else torch.float32)
    machine = torch.cuda.get_device_name(place) if cuda else f"{torch.get_num_threads()} threads"
    click.echo(
        f"torch {torch.__version__}, {device} ({machine}), {'bf16' if bf16 else 'fp32'}, size "
        f"{size}{', compiled' if compiled else ''}, {rate / 1e9:.0f} GFLOP/s in a matrix product"
    )
    click.echo(noise_line(place))
    click.echo(
        f"{'generator':16}{'batch':>6}{'ours img/s':>12}{'plain img/s':>12}{'ratio':>8}"
        f"{'transformer':>12}{'roofline':>10}{'difference':>12}"
    )
    for name in names:
        short = size != "small" and not cuda and family(name) == "mar"
        line = compare(
            name,
            size,
            place,
            bf16=bf16,
            batch=batch or (256 if cuda else 2 if short else 8),
            steps=steps,
            iterations=num_iter or (8 if short else None),
            compiled=compiled,
            same_products=same_products,
            repeats=repeats,
            rate=rate,
        )
        click.echo(line)


if __name__ == "__main__":
    main()
