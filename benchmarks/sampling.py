"""Sampling speed against a plain reading of the papers, in one run.

    python benchmarks/sampling.py                            # all six, small, CPU, fp32
    python benchmarks/sampling.py mar-b --dtype bf16         # CPUs with AMX
    python benchmarks/sampling.py --size base                # MAR-B and RandomAR-B, minutes
    python benchmarks/sampling.py --size large --device cuda --compile

For each generator: images/s of the package and of the plain loop below with the same weights and
noise, their ratio, for models with a diffusion head also the ratio of the rest (the transformer),
and the largest difference relative to the largest value. The plain loops compute everything again
at each step, with both guidance halves all the way; under bf16 they run in autocast, with its
cache of cast weights. The roofline is the share of the package's time that its multiplications
would take at the rate of a large matrix product on the same device.

On a CPU at size base, the plain autoregressive loop would take the better part of an hour.
There its step is timed at some positions, on the package's own tokens, and its sum follows by
interpolation: a step's cost is a constant, a part that grows with the position, and a small part
that grows with its square. MAR takes 8 iterations and 2 images there.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.diffusion import schedule
from detok_pipe.generators.dit import DiT
from detok_pipe.generators.generator import Generator
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.head_net import HeadNet
from detok_pipe.generators.head_sampler import HeadSampler
from detok_pipe.generators.mar import MAR, reveal_counts
from detok_pipe.generators.packed_linear import pack_linears
from detok_pipe.generators.registry import FAMILIES, build_generator, default_sampling
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.sit import SiT
from detok_pipe.generators.token_generator import TokenGenerator, pick
from detok_pipe.latents.noise import Noise

Sampler = Callable[[Any, Tensor, Sampling, Noise], Tensor]

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


def plain_chain(
    network: Callable[[Tensor, Tensor], Tensor],
    name: str,
    draws: Tensor,
    scale: float,
    temperature: float,
) -> Tensor:
    """DDPM over [conditional, null] rows; draws (S + 1, R, ...), channels last -> (R, ...)."""
    table = schedule(name, len(draws) - 1)  # type: ignore[arg-type]
    kept = torch.tensor(table.alphas_cumprod, device=draws.device)
    betas = torch.tensor(table.betas, device=draws.device)
    low = torch.tensor(table.posterior_log_variance_clipped, device=draws.device)
    numbers = torch.tensor(table.timestep_map, device=draws.device)
    rows = draws.shape[1]
    x = torch.cat((draws[0], draws[0]))
    for k, i in enumerate(reversed(range(len(betas)))):
        x = torch.cat((x[:rows], x[:rows]))
        out = network(x, numbers[i].expand(len(x))).float()
        eps, v = out.chunk(2, dim=-1)
        eps_cond, eps_null = eps.chunk(2)
        guided = eps_null + scale * (eps_cond - eps_null)
        eps = torch.cat((guided, guided))
        before = kept[i - 1] if i else torch.ones_like(kept[0])
        x_0 = (x - (1 - kept[i]).sqrt().float() * eps) / kept[i].sqrt().float()
        mean = (before.sqrt() * betas[i] / (1 - kept[i])).float() * x_0
        mean = mean + ((1 - betas[i]).sqrt() * (1 - before) / (1 - kept[i])).float() * x
        log_variance = (v + 1) / 2 * betas[i].log().float() + (1 - v) / 2 * low[i].float()
        draw = torch.cat((draws[k + 1], draws[k + 1]))
        x = mean + (i > 0) * temperature * torch.exp(0.5 * log_variance) * draw
    return x[:rows]


def plain_head(net: HeadNet, condition: Tensor, draws: Tensor, scale: float, heat: float) -> Tensor:
    """The head over (2R, Z) conditions: time embedding, projection, modulation at each step."""
    return plain_chain(lambda x, t: net(x, t, condition), "cosine", draws, scale, heat)


def plain_labels(model: TokenGenerator, condition: Tensor) -> Tensor:
    """Class embeddings of the conditional rows, then of as many null rows."""
    null = model.fake_latent.expand(len(condition), -1)
    return torch.cat((model.class_emb(condition), null))


def plain_mar(model: MAR, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """All positions in raster order, found by nonzero; the decoder gives all of them."""
    batch, tokens_count = len(condition), model.tokens
    order = noise.uniform("order", (tokens_count,)).argsort(dim=1)
    label = plain_labels(model, condition)[:, None].expand(-1, model.buffer, -1)
    tokens = torch.zeros(batch, tokens_count, model.channels, device=condition.device)
    masked = tokens_count
    counts = reveal_counts(tokens_count, sampling.iterations or min(64, tokens_count))
    for k, count in enumerate(counts):
        mask = torch.zeros(batch, tokens_count, device=condition.device)
        mask = mask.scatter(1, order[:, :masked], 1.0).bool()
        next_mask = torch.zeros_like(mask).scatter(1, order[:, : masked - count], True)
        twice = torch.cat((mask, mask))
        x = torch.cat((label, model.z_proj(torch.cat((tokens, tokens)))), dim=1)
        x = model.z_proj_ln(x + model.encoder_pos_embed_learned)
        seen = torch.cat((torch.zeros_like(twice[:, :1]).expand(-1, model.buffer), twice), dim=1)
        x = x[(~seen).nonzero(as_tuple=True)].view(2 * batch, -1, x.shape[-1])
        for block in model.encoder_blocks:
            x = block(x)
        x = model.decoder_embed(model.encoder_norm(x))
        full = model.mask_token.to(x.dtype).repeat(2 * batch, model.buffer + tokens_count, 1)
        full[(~seen).nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = full + model.decoder_pos_embed_learned
        for block in model.decoder_blocks:
            x = block(x)
        x = model.decoder_norm(x)[:, model.buffer :] + model.diffusion_pos_embed_learned
        now = mask & ~next_mask
        where = torch.cat((now, now)).nonzero(as_tuple=True)
        # The draws come in the order of revelation; raster order within an image here.
        shape = count, model.channels
        draws = noise.normal_steps(f"head/{k}", (sampling.steps or 100) + 1, shape)
        rank = order[:, masked - count : masked].flip(1).argsort(dim=1)[None, :, :, None]
        draws = draws.gather(2, rank.expand_as(draws)).flatten(1, 2)
        masked -= count
        known = min(tokens_count - masked, tokens_count - 1)
        scale = scale_at(sampling, known / tokens_count)
        new = plain_head(model.diffloss.net, x[where], draws, scale, sampling.temperature)
        tokens[now.nonzero(as_tuple=True)] = new
    return tokens


def plain_ar_step(
    model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise, order: Tensor, known: Tensor
) -> Tensor:
    """Token i (B, c) from the i known ones (B, i, c): the whole prefix again, both halves."""
    i = known.shape[1]
    label = plain_labels(model, condition)[:, None]
    places = torch.cat((order, order))
    start = (model.bos_token + model.pos_embed[:, :1]).expand(len(places), -1, -1)
    x = model.x_embedder(torch.cat((known, known))) + model.pos_embed[0, 1:][places[:, :i]]
    x = torch.cat((start, x), dim=1) + model.target_pos_embed[0][places[:, : i + 1]]
    x = model.ln_pre(x)
    steps = label + model.timesteps_embeddings[:, : i + 1]
    for block in model.blocks:
        x = block(x, block.adaLN_modulation(steps), causal=True)
    x = model.final_layer(x, model.final_layer.adaLN_modulation(label))[:, -1]
    draws = noise.normal_steps(f"head/{i}", (sampling.steps or 100) + 1, (model.channels,))
    scale = scale_at(sampling, i / model.tokens)
    return plain_head(model.diffloss.net, x, draws, scale, sampling.temperature)


def plain_ardiff(model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    order = model.places(noise, condition.device)
    tokens = torch.zeros(len(condition), 0, model.channels, device=condition.device)
    for _ in range(model.tokens):
        new = plain_ar_step(model, condition, sampling, noise, order, tokens)
        tokens = torch.cat((tokens, new[:, None]), dim=1)
    return model.assembled(tokens, order)


def plain_dit(model: DiT, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """Two halves of states through the whole chain."""
    steps, shape = sampling.steps or 250, (model.places, model.channels)
    names = ["start", *(f"step/{i}" for i in reversed(range(steps)))]
    draws = torch.stack([noise.normal(name, shape) for name in names])
    both = torch.cat((condition, torch.full_like(condition, -1)))
    scale = sampling.guidance_scale
    return plain_chain(
        lambda x, t: model.network(x, t, both), "linear", draws, scale, sampling.temperature
    )


def plain_flow(model: SiT, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """Two halves of states; the null half is evaluated where guidance is off, too."""
    t = torch.linspace(0, 1, sampling.steps or 250, device=condition.device)
    t = model.shift * t / (1 - t + model.shift * t)
    start = noise.normal("start", (model.places, model.channels))
    both = torch.cat((condition, torch.full_like(condition, -1)))
    x = torch.cat((start, start))
    for now, then in itertools.pairwise(t):
        cond, null = model.network(x, now.expand(len(x)), both).float().chunk(2)
        guided = null + scale_at(sampling, float(now)) * (cond - null)
        x = x + (then - now) * torch.cat((guided, guided))
    return x[: len(condition)]


PLAIN: dict[str, Sampler] = {
    "mar": plain_mar,
    "random-ar": plain_ardiff,
    "raster-ar": plain_ardiff,
    "dit": plain_dit,
    "sit": plain_flow,
    "lightningdit": plain_flow,
}


def build(name: str, size: str, device: torch.device) -> Generator:
    """A generator with random weights everywhere, so that no layer is the identity or zero."""
    overrides: dict[str, Any] = {}
    if size == "small":
        overrides = SMALL | (SMALL_HEAD if PLAIN[family(name)] in (plain_mar, plain_ardiff) else {})
    grid = (8, 8) if size == "small" else (16, 16)
    torch.manual_seed(0)
    model = build_generator(name, grid=grid, channels=16, num_classes=1000, **overrides)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device).eval()


def family(name: str) -> str:
    return name.rpartition("-")[0]


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    clock = Clock(device)
    for _ in range(3):
        a @ a
    start = clock.now()
    for _ in range(10):
        a @ a
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
            plain_ar_step, model, condition, sampling, noise, order, tokens[:, :i].contiguous()
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
    repeats: int,
    rate: float,
) -> str:
    """One line of the table; ``rate`` is the device's FLOP/s in a matrix product."""
    model = build(name, size, device)
    fast = copy.deepcopy(model).to(torch.bfloat16 if bf16 else torch.float32)
    pack_linears(fast)
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
            run = PLAIN[family(name)]
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
        mock.patch.dict(globals(), plain_head=clock.watch(plain_head)),
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
            repeats=repeats,
            rate=rate,
        )
        click.echo(line)


if __name__ == "__main__":
    main()
