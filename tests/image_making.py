"""Image files of random pixels."""

from pathlib import Path

import numpy as np
from PIL import Image


def random_images(folder: Path, count: int, size: tuple[int, int] = (32, 32)) -> Path:
    """Write ``count`` PNG files 0.png, 1.png, ... of (height, width) pixels; returns ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
