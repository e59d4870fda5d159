"""Looks at a model in training that leave no trace in the training: pictures, scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines import pictures
from detok_pipe.pipelines.config import Execution


@dataclass(frozen=True)
class Inspection:
    """Something done after each ``every`` steps of a training, and after the last.

    Attributes:
        run: called with the number of finished steps, on all processes. The numbers that it
            returns go to ``metrics.jsonl`` and to the trackers.
    """

    every: int
    run: Callable[[int], Mapping[str, float]]

    def due(self, step: int, steps: int) -> bool:
        """Whether it is to be done after ``step`` of ``steps`` steps."""
        return step == steps or step % self.every == 0


def inspect(inspections: Sequence[Inspection], step: int, steps: int) -> dict[str, float]:
    """The numbers of all inspections that are due after ``step`` of ``steps`` steps.

    They may draw random numbers: ``fit`` seeds torch anew before each step.
    """
    found: dict[str, float] = {}
    for each in inspections:
        if each.due(step, steps):
            found.update(each.run(step))
    return found


def check_scores_meet_checkpoints(option: str, every: int, execution: Execution) -> None:
    """Check that each score of ``--keep-best score`` belongs to a checkpoint.

    Args:
        option: what the steps ``every`` are called on the command line.

    Raises:
        ConfigError: some fall between the checkpoints.
    """
    if every % execution.checkpoint_every:
        raise ConfigError(
            f"--keep-best score: {option} {every} is no multiple of --checkpoint-every "
            f"{execution.checkpoint_every}, so some scores would belong to no checkpoint; change "
            "one of the two"
        )


def samples_folder(run: Path) -> Path:
    """Where a run's pictures lie."""
    return run / "samples"


def save_picture(
    accelerator: Accelerator, run: Path, name: str, picture: Image.Image, step: int
) -> None:
    """Write ``samples/step-XXXXXXXX-<name>.png`` of a run, and show it in the trackers.

    For the main process only.
    """
    pictures.save(samples_folder(run) / f"step-{step:08d}-{name}.png", picture)
    log_picture(accelerator, name, picture, step)


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Hand a picture to those trackers that take pictures (TensorBoard, W&B, ...)."""
    pixels = np.asarray(picture.convert("RGB"))[None]  # (1, H, W, 3)
    for tracker in accelerator.trackers:
        if not hasattr(tracker, "log_images"):
            continue
        # TensorBoard has to be told how the axes lie; the others know pictures.
        more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: list(pixels) if not more else pixels}, step=step, **more)
