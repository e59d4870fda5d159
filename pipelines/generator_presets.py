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

    Published: FID 1.55 at guidance scale 3.9 (IS 291.0); after 100 epochs with a head of
    3 x 1024 (--set model.head_depth=3 --set "duration=100 epochs"): 2.43.
    """
    return GeneratorConfig(
        generator="mar-b",
        model={"head_depth": 6, "head_width": 1024},
        duration="800 epochs",
    )


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

    Published: FID 5.22.
    """
    return GeneratorConfig(generator="random-ar-b")


@_generator
def raster_ar_b() -> GeneratorConfig:
    """RasterAR-B: decoder-only in raster order, the common recipe of 100 epochs.

    detok-pipe train-gen raster-ar-b --latents cache --out runs/raster-ar-b

    Published: FID 4.46.
    """
    return GeneratorConfig(generator="raster-ar-b")


@_generator
def sit_b() -> GeneratorConfig:
    """SiT-B: flow matching, the common recipe of 100 epochs.

    detok-pipe train-gen sit-b --latents cache --out runs/sit-b

    Published: FID 5.13.
    """
    return GeneratorConfig(generator="sit-b")
