"""Generator recipes by name; each docstring gives its exact command and what to expect.

The paper is "Latent Denoising Makes Good Visual Tokenizers", arXiv 2507.15856; figures are
FID with guidance on ImageNet 256 x 256 as published, not measured by this project.
"""

from collections.abc import Callable

from detok_pipe.generators.registry import generator_names
from detok_pipe.pipelines.config import GeneratorConfig, unknown_name

GENERATOR_PRESETS: dict[str, Callable[[], GeneratorConfig]] = {}


def _generator(recipe: Callable[[], GeneratorConfig]) -> Callable[[], GeneratorConfig]:
    GENERATOR_PRESETS[recipe.__name__.replace("_", "-")] = recipe
    return recipe


def generator_preset(name: str) -> GeneratorConfig:
    """The configuration of a generator recipe; any registered generator has the common one.

    Raises:
        ConfigError: unknown name; near names are listed.
    """
    if name in GENERATOR_PRESETS:
        return GENERATOR_PRESETS[name]()
    if name in generator_names():
        return GeneratorConfig(generator=name)
    raise unknown_name("generator preset", name, [*GENERATOR_PRESETS, *generator_names()])


@_generator
def mar_b() -> GeneratorConfig:
    """MAR-B of the system comparison: head of 6 x 1024, 800 epochs.

    detok-pipe train-gen mar-b --latents cache --out runs/mar-b

    Published: FID 1.55 at guidance scale 3.9 (IS 291.0).
    """
    return GeneratorConfig(
        generator="mar-b",
        model={"head_depth": 6, "head_width": 1024},
        duration="800 epochs",
    )


@_generator
def mar_b_ablation() -> GeneratorConfig:
    """MAR-B of the ablations: head of 3 x 1024, the common recipe of 100 epochs.

    detok-pipe train-gen mar-b-ablation --latents cache --out runs/mar-b-ablation

    Published: FID 2.43 on l-DeTok latents, 3.31 without noise in the tokenizer's training, 3.71
    on those of MAR-VAE.
    """
    return GeneratorConfig(generator="mar-b")


@_generator
def mar_l() -> GeneratorConfig:
    """MAR-L of the system comparison: head of 8 x 1280, 800 epochs.

    detok-pipe train-gen mar-l --latents cache --out runs/mar-l

    Published: FID 1.35; the released weights 1.32 at guidance scale 3.4 (IS 304.1).
    """
    return GeneratorConfig(
        generator="mar-l",
        model={"head_depth": 8, "head_width": 1280},
        duration="800 epochs",
    )


@_generator
def random_ar_b() -> GeneratorConfig:
    """RandomAR-B: decoder-only in random order, the common recipe of 100 epochs.

    detok-pipe train-gen random-ar-b --latents cache --out runs/random-ar-b

    Published: FID 5.22; 11.78 on latents of MAR-VAE.
    """
    return GeneratorConfig(generator="random-ar-b")


@_generator
def raster_ar_b() -> GeneratorConfig:
    """RasterAR-B: decoder-only in raster order, the common recipe of 100 epochs.

    detok-pipe train-gen raster-ar-b --latents cache --out runs/raster-ar-b

    Published: FID 4.46; 7.99 on latents of MAR-VAE.
    """
    return GeneratorConfig(generator="raster-ar-b")


@_generator
def sit_b() -> GeneratorConfig:
    """SiT-B: flow matching, the common recipe of 100 epochs.

    detok-pipe train-gen sit-b --latents cache --out runs/sit-b

    Published: FID 5.13; 6.97 without noise in the tokenizer's training.
    """
    return GeneratorConfig(generator="sit-b")


@_generator
def dit_b() -> GeneratorConfig:
    """DiT-B: diffusion with learned variance, the common recipe of 100 epochs.

    detok-pipe train-gen dit-b --latents cache --out runs/dit-b

    Published: no figure that this project knows of. benchmarks/six_generators.py compares it with
    the others on one small cache.
    """
    return GeneratorConfig(generator="dit-b")


@_generator
def lightningdit_b() -> GeneratorConfig:
    """LightningDiT-B: flow matching, rotary embedding, SwiGLU; the common recipe of 100 epochs.

    detok-pipe train-gen lightningdit-b --latents cache --out runs/lightningdit-b

    Published: no figure that this project knows of. benchmarks/six_generators.py compares it with
    the others on one small cache.
    """
    return GeneratorConfig(generator="lightningdit-b")


@_generator
def mar_h() -> GeneratorConfig:
    """MAR-H: a head of 12 x 1536, 800 epochs; it outgrows small GPUs.

    accelerate launch --num_processes 8 -m detok_pipe.pipelines.cli train-gen mar-h \\
      --latents cache --out runs/mar-h --fsdp --activation-checkpointing

    Published: nothing on l-DeTok latents.
    """
    return GeneratorConfig(
        generator="mar-h",
        model={"head_depth": 12, "head_width": 1536},
        duration="800 epochs",
    )
