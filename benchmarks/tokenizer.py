"""Speed of the tokenizer's trainer, as a ratio to a plain loop of the same losses in one run.

    python benchmarks/tokenizer.py                    # small tokenizer: under 3 minutes on 2 cores
    python benchmarks/tokenizer.py --device cuda      # BB at 256 pixels, batch 128
    python benchmarks/tokenizer.py --device cuda --perceptual lpips+convnext --compile

The plain loop is what one would write by hand: images that are already on the device, torch's own
random numbers, no checkpoints, no log, no averaged weights but one foreach operation. The trainer
does all that it always does: it decodes JPEG files, logs and saves. Both run the whole time that is
measured; the plain loop runs before and after the trainer. Expected: a ratio of at least 0.9, and
a data wait under 2 %.
"""

import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detok_pipe.pipelines.config import Execution, TokenizerConfig
from detok_pipe.pipelines.devices import resolve_device, resolve_precision
from detok_pipe.pipelines.ema import Ema
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.perceptual import perceptual_term
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.sharding import compile_blocks
from detok_pipe.pipelines.train_tokenizer import train_tokenizer
from detok_pipe.pipelines.trained import build_tokenizer
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import discriminator_losses, reconstruction_losses
from detok_pipe.tokenizer.model import parameter_groups

SMALL = TokenizerConfig(
    image_size=64, patch_size=8, encoder="192,3,6", decoder="192,4,6", global_batch=16
)
BB = TokenizerConfig(global_batch=128)


class TorchNoise:
    """Random numbers as a plain loop draws them, for `LDeTok.forward`."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(self.rows, *shape, device=self.device)

    def uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(self.rows, *shape, device=self.device)

    def shared_uniform(self, name: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        return np.random.default_rng().random(shape)


class PlainLoop:
    """One optimizer step after another on a batch of images that stays on the device."""

    def __init__(self, config: TokenizerConfig, images: Tensor, compiled: bool) -> None:
        device = images.device
        self.config, self.images = config, images
        self.model = build_tokenizer(config).to(device)
        self.ema = Ema(self.model)
        if compiled:
            compile_blocks(self.model)
        self.optimizer = self._optimizer(self.model)
        self.perceptual = perceptual_term(config.perceptual, config.image_size, device)
        self.critic: nn.Module | None = None
        if config.adversarial_start is not None:
            self.critic = PatchDiscriminator().to(device)
            self.critic_optimizer = self._optimizer(self.critic)

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        groups = parameter_groups(network, self.config.weight_decay)
        return torch.optim.AdamW(groups, lr=1e-4, betas=self.config.betas, fused=True)

    def step(self, done: Callable[[str], None] = lambda stage: None) -> None:
        """One step; ``done`` is called with the name of each stage as it ends."""
        config, images = self.config, self.images
        noise: Any = TorchNoise(len(images), images.device)
        bf16 = config.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(images, noise, gamma=config.gamma, mask_ratio=config.mask_ratio)
        done("tokenizer, forward")
        loss = reconstruction_losses(
            images,
            output.reconstruction,
            output.posterior,
            perceptual=self.perceptual,
            discriminator=self.critic,
        )["loss"]
        done("losses, forward")
        loss.backward()
        done("backward")
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, config.ema)
        done("optimizer and EMA")
        if self.critic is not None:
            discriminator_losses(self.critic, images, output.reconstruction)["loss"].backward()
            nn.utils.clip_grad_norm_(self.critic.parameters(), config.clip)
            self.critic_optimizer.step()
            self.critic_optimizer.zero_grad(set_to_none=True)
            done("discriminator's step")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain_speed(loop: PlainLoop, steps: int) -> float:
    """Images a second."""
    device = loop.images.device
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        loop.step()
    synchronise(device)
    return steps * len(loop.images) / (time.perf_counter() - start)


def stages(loop: PlainLoop, steps: int) -> dict[str, float]:
    """Share of each stage in the time of a step, with a wait for the device after each."""
    spent: dict[str, float] = defaultdict(float)
    last = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal last
        synchronise(loop.images.device)
        now = time.perf_counter()
        spent[stage] += now - last
        last = now

    for _ in range(steps):
        last = time.perf_counter()
        loop.step(done)
    total = sum(spent.values())
    return {stage: seconds / total for stage, seconds in spent.items()}


def trainer_speed(
    config: TokenizerConfig, data: Path, out: Path, device: str, steps: int, compiled: bool
) -> tuple[float, float]:
    """Images a second and the share of waiting for data, after as many steps of warming up."""
    execution = Execution(device=device, trackers=(), quiet=True, log_every=steps, compile=compiled)
    train_tokenizer(
        dataclasses.replace(config, duration=f"{2 * steps} steps"), data, out, execution
    )
    last = read_metrics(out)[-1]
    return last["images_per_second"], last["data_wait"]


def step_flops(loop: PlainLoop) -> int:
    """Floating-point operations of a step."""
    with FlopCounterMode(display=False) as counter:
        loop.step()
    return counter.get_total_flops()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ b
        synchronise(device)
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - start))
    return best


def make_images(folder: Path, count: int, size: int) -> Path:
    """JPEG files of smooth random colours, a little larger than the tokenizer's images."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        pixels.resize((size + size // 4, size + size // 8)).save(folder / f"{number:05d}.jpg")
    return folder


@click.command(help=__doc__.splitlines()[0])
@click.option("--device", help="Default: a GPU where there is one.")
@click.option("--steps", type=click.IntRange(2), default=12, show_default=True)
@click.option("--images", type=click.IntRange(1), default=2048, help="JPEG files to decode.")
@click.option("--perceptual", default="efficientnet-lite2", show_default=True)
@click.option("--compile", "compiled", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    device: str | None, steps: int, images: int, perceptual: str, compiled: bool, as_json: bool
) -> None:
    target = resolve_device(device)
    base = BB if target.type == "cuda" else SMALL
    base = dataclasses.replace(
        base, perceptual=perceptual, precision=resolve_precision("auto", target)
    )
    name = torch.cuda.get_device_name(target) if target.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if base.precision == "bf16" else torch.float32
    rate = matrix_rate(target, dtype)
    results: dict[str, Any] = {"device": name, "matrix rate (TFLOP/s)": rate / 1e12}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "images"
        data.mkdir()
        make_images(data, images, base.image_size)
        for start in (None, "0 steps"):
            config = dataclasses.replace(base, adversarial_start=start)
            loader = ImageLoader(
                open_images(data), config.image_size, config.global_batch, 0, device=target
            )
            loop = PlainLoop(config, next(iter(loader)).images, compiled)
            plain_speed(loop, 2)
            before = plain_speed(loop, steps)
            ours, waited = trainer_speed(
                config, data, Path(folder) / f"run-{start}", str(target), steps, compiled
            )
            plain = (before + plain_speed(loop, steps)) / 2
            flops = step_flops(loop) / config.global_batch
            results["with adversary" if start else "without adversary"] = {
                "trainer, images/s": ours,
                "plain loop, images/s": plain,
                "ratio": ours / plain,
                "data wait": waited,
                "GFLOP an image": flops / 1e9,
                "share of the matrix rate": ours * flops / rate,
                "stages": stages(loop, max(2, steps // 4)),
            }
    if as_json:
        click.echo(json.dumps(results, indent=1))
        return
    click.echo(f"{name}, {base.precision}, {rate / 1e12:.2f} TFLOP/s in a matrix product")
    for case in ("without adversary", "with adversary"):
        found = results[case]
        click.echo(
            f"\n{case}: {found['trainer, images/s']:.1f} images/s, plain loop "
            f"{found['plain loop, images/s']:.1f} (ratio {found['ratio']:.2f}); data wait "
            f"{found['data wait']:.1%}; {found['share of the matrix rate']:.0%} of the matrix rate "
            f"at {found['GFLOP an image']:.1f} GFLOP an image"
        )
        for stage, share in found["stages"].items():
            click.echo(f"  {share:6.1%}  {stage}")


if __name__ == "__main__":
    main()
