"""Sampling speed against a plain reading of the papers, in one run.

    python benchmarks/sampling.py                       # all generators, small, CPU fp32
    python benchmarks/sampling.py mar-b random-ar-b --size published --batch 8
    python benchmarks/sampling.py mar-b --size published --device cuda --dtype bf16 --batch 256

For each generator: images/s of the package and of the plain loop below with the same weights and
noise, their ratio, for autoregressive models also the ratio without the diffusion head, and the
largest difference relative to the largest value. The plain loops compute everything again at each
step, with both guidance halves all the way; they run under autocast where --dtype is bf16. The
roofline is the time that the package's multiplications would take at the rate of a large matrix
product on the same device.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.backbone import Backbone
from detok_pipe.generators.diffusion import schedule
from detok_pipe.generators.dit import DiT
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.head import HeadNet, HeadSampler
from detok_pipe.generators.mar import MAR, reveal_counts
from detok_pipe.generators.registry import build_generator, default_sampling
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.sit import FlowTransformer
from detok_pipe.latents.noise import Noise

Sampler = Callable[[Any, Tensor, Sampling, Noise], Tensor]

SMALL = {"width": 192, "depth": 4, "heads": 6}
SMALL_HEAD = {"head_width": 256, "head_depth": 3}


class Clock:
    """Seconds spent inside one function, with the device's work included."""

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


def plain_mar(model: MAR, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """All positions in raster order, found by nonzero; the decoder gives all of them."""
    batch, tokens_count = len(condition), model.tokens
    order = noise.uniform("order", (tokens_count,)).argsort(dim=1)
    both = torch.cat((condition, torch.full_like(condition, -1)))
    tokens = torch.zeros(batch, tokens_count, model.channels, device=condition.device)
    counts = reveal_counts(tokens_count, sampling.iterations or min(64, tokens_count))
    masked = tokens_count
    for k, count in enumerate(counts):
        mask = torch.zeros(batch, tokens_count, device=condition.device)
        mask = mask.scatter(1, order[:, :masked], 1.0).bool()
        next_mask = torch.zeros_like(mask).scatter(1, order[:, : masked - count], True)
        twice = torch.cat((mask, mask))
        x = model.z_proj(torch.cat((tokens, tokens)))
        label = torch.where(
            both[:, None] < 0, model.fake_latent, model.class_emb(both.clamp_min(0))
        )
        x = torch.cat((label[:, None].expand(-1, model.buffer, -1), x), dim=1)
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
        draws = noise.normal_steps(
            f"head/{k}", (sampling.steps or 100) + 1, (count, model.channels)
        )
        rank = order[:, masked - count : masked].flip(1).argsort(dim=1)[None, :, :, None]
        draws = draws.gather(2, rank.expand_as(draws)).flatten(1, 2)
        masked -= count
        known = min(tokens_count - masked, tokens_count - 1)
        scale = scale_at(sampling, known / tokens_count)
        new = plain_head(model.diffloss.net, x[where], draws, scale, sampling.temperature)
        tokens[now.nonzero(as_tuple=True)] = new
    return tokens


def plain_ardiff(model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """The whole prefix again for each token, both halves to the end."""
    order = model.places(noise, condition.device)
    both = torch.cat((condition, torch.full_like(condition, -1)))
    label = torch.where(both[:, None] < 0, model.fake_latent, model.class_emb(both.clamp_min(0)))
    label = label[:, None]
    twice = torch.cat((order, order))
    tokens = torch.zeros(len(both), 0, model.channels, device=condition.device)
    for i in range(model.tokens):
        start = (model.bos_token + model.pos_embed[:, :1]).expand(len(both), -1, -1)
        known = model.x_embedder(tokens) + model.pos_embed[0, 1:][twice[:, :i]]
        x = torch.cat((start, known), dim=1) + model.target_pos_embed[0][twice[:, : i + 1]]
        x = model.ln_pre(x)
        steps = label + model.timesteps_embeddings[:, : i + 1]
        for block in model.transformer["blocks"]:
            x = block(x, block.adaLN_modulation(steps), causal=True)
        x = model.final_layer(x, model.final_layer.adaLN_modulation(label))[:, -1]
        draws = noise.normal_steps(f"head/{i}", (sampling.steps or 100) + 1, (model.channels,))
        scale = scale_at(sampling, i / model.tokens)
        new = plain_head(model.diffloss.net, x, draws, scale, sampling.temperature)
        tokens = torch.cat((tokens, torch.cat((new, new))[:, None]), dim=1)
    z = tokens[: len(condition)]
    return torch.empty_like(z).scatter_(1, order[..., None].expand_as(z), z)


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


def plain_flow(
    model: FlowTransformer, condition: Tensor, sampling: Sampling, noise: Noise
) -> Tensor:
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


def build(name: str, size: str, device: torch.device) -> nn.Module:
    """A generator with random weights everywhere, so that no layer is the identity or zero."""
    overrides: dict[str, Any] = {}
    if size == "small":
        overrides = SMALL | (
            SMALL_HEAD if name.rpartition("-")[0] in ("mar", "random-ar", "raster-ar") else {}
        )
    grid = (8, 8) if size == "small" else (16, 16)
    torch.manual_seed(0)
    model = build_generator(name, grid=grid, channels=16, num_classes=1000, **overrides)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device).eval().requires_grad_(False)


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


def timed(run: Callable[[], Tensor], clock: Clock, repeats: int) -> tuple[Tensor, float, float]:
    """(output, seconds, seconds in the watched function) of the fastest of `repeats` runs."""
    best = (math.inf, 0.0)
    for _ in range(repeats):
        clock.seconds = 0.0
        start = clock.now()
        out = run()
        best = min(best, (clock.now() - start, clock.seconds))
    return out, *best


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
    """One line of the table; `rate` is the device's FLOP/s in a matrix product."""
    model = build(name, size, device)
    fast = build(name, size, device).to(torch.bfloat16 if bf16 else torch.float32)
    plain_sample = PLAIN[name.rpartition("-")[0]]
    sampling = replace(default_sampling(name), steps=steps, iterations=iterations)
    condition = (torch.arange(batch, device=device) * 37) % 1000
    noise = Noise(0, range(batch), device=device)

    def ours() -> Tensor:
        return fast.sample(condition, sampling, noise)

    def plain() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return plain_sample(model, condition, sampling, noise)

    with FlopCounterMode(display=False) as counter:
        ours()
    if compiled and isinstance(fast, Backbone):
        fast.network = torch.compile(fast.network)  # type: ignore[method-assign]
        ours()
    clock = Clock(device)
    with (
        torch.no_grad(),
        mock.patch.object(HeadSampler, "__call__", clock.watch(HeadSampler.__call__)),
        mock.patch.dict(globals(), plain_head=clock.watch(plain_head)),
    ):
        z, seconds, head = timed(ours, clock, repeats)
        plain_z, plain_seconds, slow_head = timed(plain, clock, repeats)
    rest = (plain_seconds - slow_head) / (seconds - head)
    bound = counter.get_total_flops() / rate / seconds
    difference = float((z - plain_z).abs().max() / plain_z.abs().max())
    return (
        f"{name:16}{batch / seconds:12.3f}{batch / plain_seconds:12.3f}"
        f"{plain_seconds / seconds:7.1f}x{rest:9.1f}x{bound:10.0%}{difference:12.1e}"
    )


@click.command(help=__doc__.splitlines()[0])
@click.argument("names", nargs=-1)
@click.option("--size", type=click.Choice(["small", "published"]), default="small")
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", type=int, help="Head, diffusion or ODE steps. [default: the model's]")
@click.option("--iterations", type=int, help="MAR's iterations. [default: the model's]")
@click.option("--compile", "compile_", is_flag=True, help="torch.compile DiT's and SiT's networks.")
@click.option("--repeats", default=1, show_default=True, help="Runs of which the best counts.")
def main(
    names: tuple[str, ...],
    size: str,
    device: str,
    dtype: str,
    batch: int,
    steps: int | None,
    iterations: int | None,
    compile_: bool,
    repeats: int,
) -> None:
    place, bf16 = torch.device(device), dtype == "bf16"
    rate = matrix_rate(place, torch.bfloat16 if bf16 else torch.float32)
    click.echo(
        f"torch {torch.__version__}, {device}, {dtype}, {size}, batch {batch}, "
        f"{torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s in a matrix product"
    )
    click.echo(
        f"{'generator':16}{'ours img/s':>12}{'plain img/s':>12}{'ratio':>8}"
        f"{'w/o head':>10}{'roofline':>10}{'difference':>12}"
    )
    for name in names or [f"{family}-b" for family in PLAIN]:
        line = compare(
            name,
            size,
            place,
            bf16=bf16,
            batch=batch,
            steps=steps,
            iterations=iterations,
            compiled=compile_,
            repeats=repeats,
            rate=rate,
        )
        click.echo(line)


if __name__ == "__main__":
    main()
