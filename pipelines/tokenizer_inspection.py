"""How a tokenizer is looked at while it trains: pictures, and scores on a validation set."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.config import TokenizerConfig
from detok_pipe.pipelines.corruption_study import study_corruption
from detok_pipe.pipelines.images import ImageSource, open_images
from detok_pipe.pipelines.inspection import Inspection, save_picture
from detok_pipe.pipelines.pictures import labelled_grid
from detok_pipe.pipelines.processes import Processes
from detok_pipe.pipelines.reconstruct import (
    evaluate_tokenizer,
    evenly_spaced,
    load_squares,
    open_measures,
    reconstruction_picture,
)
from detok_pipe.tokenizer.model import LDeTok

_IMAGES = 16
_SIDE = 128
_LEVELS, _HIDDEN = (0.0, 1.0, 2.0), (0.0, 0.3, 0.7)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a tokenizer in training is looked at with; nothing in it changes the training.

    Attributes:
        every: steps between two looks; there is one after the last step as well.
        data: images for the pictures and the scores, best held-out ones; None: no scores, and
            pictures of training images.
        limit: score only so many of them.
        features: network of the Fréchet distance, a name for ``load_extractor``, or "none".
        resolution: of efficientnet-lite2's input.
        lpips: score LPIPS too. weights_dir: where published weights lie.
    """

    every: int = 5000
    data: Path | None = None
    limit: int | None = None
    features: str = "inception"
    resolution: int | None = None
    lpips: bool = False
    weights_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"--eval-every must be positive, and is {self.every}")


def inspections(
    validation: Validation,
    config: TokenizerConfig,
    model: LDeTok,
    training_images: ImageSource,
    *,
    accelerator: Accelerator,
    out: Path,
) -> list[Inspection]:
    """Pictures of what ``model``, the EMA, rebuilds, and its scores where there are images.

    The pictures are ``samples/step-XXXXXXXX-reconstructions.png``, originals above what is
    rebuilt, and ``...-corrupted.png``, rebuilt from noisy and partly hidden latents. The scores
    are those of `evaluate_tokenizer`, named "val/psnr" and so on.

    Raises:
        InputError: no image is readable. WeightsError: weights of a score are not to be had.
    """
    images = training_images if validation.data is None else open_images(validation.data)
    pictures = _pictures(validation, config, model, images, accelerator, out)
    if validation.data is None:
        return [pictures]
    return [pictures, _scores(validation, config, model, images, accelerator)]


def _pictures(
    validation: Validation,
    config: TokenizerConfig,
    model: LDeTok,
    images: ImageSource,
    accelerator: Accelerator,
    out: Path,
) -> Inspection:
    bf16 = config.precision == "bf16"
    device = accelerator.device
    pixels, _ = load_squares(images, evenly_spaced(len(images), _IMAGES), config.image_size)

    def draw(step: int) -> Mapping[str, float]:
        if accelerator.is_main_process:
            grid = reconstruction_picture(model, pixels, device=device, bf16=bf16, side=_SIDE)
            save_picture(accelerator, out, "reconstructions", grid, step)
            some = pixels[: _IMAGES // 2]
            study = study_corruption(
                model,
                some,
                levels=_LEVELS,
                ratios=_HIDDEN,
                gamma=config.blended_gamma,
                device=device,
                bf16=bf16,
            )
            grid = labelled_grid(study.rows(some), side=_SIDE)
            save_picture(accelerator, out, "corrupted", grid, step)
        return {}

    return Inspection(validation.every, draw)


def _scores(
    validation: Validation,
    config: TokenizerConfig,
    model: LDeTok,
    images: ImageSource,
    accelerator: Accelerator,
) -> Inspection:
    measures = open_measures(
        Processes(accelerator),
        features=validation.features,
        resolution=validation.resolution,
        lpips=validation.lpips,
        weights_dir=validation.weights_dir,
    )

    def score(step: int) -> Mapping[str, float]:
        scores = evaluate_tokenizer(
            model,
            images,
            image_size=config.image_size,
            **measures,
            device=accelerator.device,
            bf16=config.precision == "bf16",
            limit=validation.limit,
            accelerator=accelerator,
            quiet=True,
        )
        scores["unreadable"] = len(scores["unreadable"])
        scores.pop("feature dimensions", None)
        return {f"val/{name}": float(value) for name, value in scores.items()}

    return Inspection(validation.every, score)
