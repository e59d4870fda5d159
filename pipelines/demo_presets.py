"""Sizes of the quickstart, chosen by measurement for a machine of each kind."""

import dataclasses
from dataclasses import dataclass

from detok_pipe.generators.sampling import Sampling
from detok_pipe.pipelines.config import GeneratorConfig, TokenizerConfig


@dataclass(frozen=True)
class Demo:
    """Everything that one quickstart does.

    Attributes:
        classes: categories that the generator learns; the tokenizer sees all.
        scales: guidance scales of the sweep. sweep_count: samples at each.
        final_count: samples at the best scale, and of each thing it is compared with.
        resolution: side in pixels at which EfficientNet-lite2 sees images.
    """

    tokenizer: TokenizerConfig
    generator: GeneratorConfig
    sampling: Sampling
    scales: tuple[float, ...]
    sweep_count: int
    final_count: int
    resolution: int = 128


_CLASSES = ("Flags", "People & Body", "Smileys & Emotion", "Symbols")

CPU = Demo(
    tokenizer=TokenizerConfig(
        image_size=64,
        patch_size=8,
        encoder="192,3,6",
        decoder="192,4,6",
        identity_output=True,
        gamma=1.0,
        mask_ratio=0.3,
        perceptual="none",
        global_batch=32,
        duration="800 steps",
        base_lr=1.6e-2,
        warmup=0.1,
        ema=0.99,
        ema_warmup=True,
        flip=True,
    ),
    generator=GeneratorConfig(
        generator="mar-b",
        model={
            "width": 192,
            "depth": 3,
            "heads": 6,
            "head_width": 256,
            "head_depth": 3,
            "buffer": 4,
            "dropout": 0.0,
            "head_draws": 2,
        },
        global_batch=32,
        duration="1000 steps",
        lr=1e-3,
        lr_schedule="cosine",
        warmup=0.05,
        clip=3.0,
        ema=0.995,
        ema_warmup=True,
        classes=_CLASSES,
    ),
    sampling=Sampling(
        guidance_schedule="linear", temperature=0.8, clip=4.0, steps=25, iterations=16
    ),
    scales=(1.0, 1.5, 2.0, 3.0),
    sweep_count=200,
    final_count=400,
)

# Processors without bf16 products take about 1.7 times as long a step.
CPU_FP32 = dataclasses.replace(
    CPU,
    tokenizer=dataclasses.replace(CPU.tokenizer, duration="550 steps"),
    generator=dataclasses.replace(CPU.generator, duration="650 steps"),
)

FAST = dataclasses.replace(
    CPU,
    tokenizer=dataclasses.replace(
        CPU.tokenizer, encoder="128,2,4", decoder="128,3,4", duration="120 steps"
    ),
    generator=dataclasses.replace(CPU.generator, duration="80 steps"),
    sampling=dataclasses.replace(CPU.sampling, steps=12, iterations=8),
    scales=(1.0, 2.0),
    sweep_count=40,
    final_count=60,
)

GPU = Demo(
    tokenizer=TokenizerConfig(
        encoder="small",
        decoder="small",
        identity_output=True,
        perceptual="efficientnet-lite2",
        global_batch=128,
        duration="6000 steps",
        base_lr=4e-4,
        warmup=0.1,
        ema_warmup=True,
    ),
    generator=GeneratorConfig(
        generator="mar-b",
        model={"width": 512, "depth": 8, "heads": 8},
        global_batch=256,
        duration="10000 steps",
        lr=4e-4,
        lr_schedule="cosine",
        warmup=0.05,
        clip=3.0,
        ema=0.999,
        ema_warmup=True,
        classes=_CLASSES,
    ),
    sampling=Sampling(guidance_schedule="linear", clip=4.0),
    scales=(1.0, 1.5, 2.0, 3.0, 4.0),
    sweep_count=1000,
    final_count=2000,
    resolution=260,
)

DEMOS = {"cpu": CPU, "cpu-fp32": CPU_FP32, "fast": FAST, "gpu": GPU}
