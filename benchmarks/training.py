"""Training speed against a plain loop of the same model, and the wait for data at high demand.

    python benchmarks/training.py                       # MAR and SiT, small, on a CPU
    python benchmarks/training.py --size published --device cuda --batch 256 --steps 60

Both loops take the same batches of one latent cache. The plain loop is the usual one: autocast,
AdamW as torch has it by default, an EMA updated parameter by parameter, the loss read in each
step. Ours is the trainer itself, with its metrics. They take turns; the ratio is the median over
the turns. Memory is the peak of a GPU's; on a CPU both run in one process and it is not told.

The wait for data is the share of its time that a consumer waits who takes 256 rows of 256 x 16
numbers and then sleeps 51.2 ms: 5,000 images/s. On a CPU the consumer takes batches as they go
to a device (posteriors are drawn on the device).
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from cache import write_cache
from torch import nn

from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.cache import LatentCache, open_cache
from detok_pipe.latents.loader import LatentLoader
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.config import Execution, GeneratorConfig
from detok_pipe.pipelines.devices import resolve_device, resolve_precision
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.train_generator import train_generator

SMALL: dict[str, dict[str, Any]] = {
    "mar-b": {"width": 192, "depth": 2, "heads": 6, "head_width": 256, "head_depth": 2},
    "sit-b": {"width": 192, "depth": 4, "heads": 6},
}
_WINDOW = 5  # steps between two readings of the clock; the first is for warming up
_ROWS, _SLEEP = 256, 0.0512


def plain_steps(
    config: GeneratorConfig, cache: LatentCache, device: torch.device
) -> Iterator[float]:
    """A plain training loop; yields the loss of each step, when the step is done."""
    torch.manual_seed(0)
    model: nn.Module = build_generator(
        config.generator,
        grid=cache.grid,
        channels=cache.channels,
        num_classes=cache.num_classes,
        **config.model,
    ).to(device)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    bf16 = resolve_precision("auto", device) == "bf16"
    for step, batch in enumerate(LatentLoader(cache, config.global_batch, 0, device=device)):
        noise = Noise(0, batch.ids, step=step, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = model(batch.z, batch.condition, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average, parameter in zip(ema, model.parameters(), strict=True):
            average.mul_(config.ema).add_(parameter.detach(), alpha=1 - config.ema)
        yield loss.item()


def plain_speed(
    config: GeneratorConfig, cache: LatentCache, device: torch.device, steps: int
) -> float:
    """Images a second, after the first window."""
    loop = plain_steps(config, cache, device)
    for _ in range(_WINDOW):
        next(loop)
    start = time.perf_counter()
    for _ in range(steps - _WINDOW):
        next(loop)
    seconds = time.perf_counter() - start
    loop.close()  # type: ignore[attr-defined]
    return config.global_batch * (steps - _WINDOW) / seconds


def our_speed(config: GeneratorConfig, cache: LatentCache, device: str | None) -> float:
    """Images a second of the trainer, after the first window."""
    with tempfile.TemporaryDirectory() as folder:
        execution = Execution(
            device=device, trackers=(), quiet=True, log_every=_WINDOW, checkpoint_every=10**9
        )
        train_generator(config, cache.path, Path(folder) / "run", execution)
        windows = read_metrics(Path(folder) / "run")[1:]
    return len(windows) / sum(1 / window["images_per_second"] for window in windows)


def peak_gib(device: torch.device) -> str:
    """The most memory that tensors took since the last call, on a GPU."""
    if device.type != "cuda":
        return "-"
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return f"{peak:.1f} GiB"


def data_wait(cache: LatentCache, device: torch.device, seconds: float = 5.0) -> float:
    """The share of its time for which a consumer of 5,000 images a second waits for data."""
    loader = LatentLoader(cache, _ROWS, 0, device=device)
    stream = iter(loader) if device.type == "cuda" else loader.host_batches()
    next(stream)
    waited, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        time.sleep(_SLEEP)
        before = time.perf_counter()
        next(stream)
        waited += time.perf_counter() - before
    return waited / (time.perf_counter() - start)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--size", type=click.Choice(["small", "published"]), default="small")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--steps", type=click.IntRange(2 * _WINDOW), default=20, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True)
@click.option("--rows", type=click.IntRange(_ROWS), default=10_240, show_default=True)
@click.option("--device", default=None)
def main(
    names: tuple[str, ...],
    size: str,
    batch: int,
    steps: int,
    repeat: int,
    rows: int,
    device: str | None,
) -> None:
    """Measure the generators NAMES (mar-b and sit-b)."""
    where = resolve_device(device)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder) / "cache", rows, 2048, ("mean", "std"))
        cache = open_cache(Path(folder) / "cache")
        wait = data_wait(cache, where)
        click.echo(f"wait for data at 5,000 images/s: {wait:.2%} of the time")
        for name in names or tuple(SMALL):
            config = GeneratorConfig(
                generator=name,
                model=SMALL.get(name, {}) if size == "small" else {},
                global_batch=batch,
                duration=f"{steps} steps",
            )
            turns = []
            for _ in range(repeat):
                plain = plain_speed(config, cache, where, steps)
                plain_memory = peak_gib(where)
                ours = our_speed(config, cache, device)
                turns.append((ours, plain, plain_memory, peak_gib(where)))
            ratio = statistics.median(ours / plain for ours, plain, *_ in turns)
            ours, plain = (statistics.median(turn[i] for turn in turns) for i in (0, 1))
            click.echo(
                f"{name:16} ours {ours:9.1f} images/s, plain {plain:9.1f} images/s, ratio "
                f"{ratio:5.2f}; memory {turns[-1][3]}, plain {turns[-1][2]}"
            )


if __name__ == "__main__":
    main()
