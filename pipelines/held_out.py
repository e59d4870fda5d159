"""The loss of a generator in training on rows that it does not train on."""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from detok_pipe.generators.generator import Generator
from detok_pipe.latents.cache import LatentCache
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.config import GeneratorConfig

_BATCH = 64


def drawn_rows(
    cache: LatentCache, rows: np.ndarray, view: str, noise: Noise, *, sample_posterior: bool
) -> Tensor:
    """Normalised latents (B, N, C) fp32 on the noise's device, of rows (B,).

    Args:
        noise: of the rows; its "posterior" draws from their posteriors.
        sample_posterior: else the means.
    """

    def stored(field: str) -> Tensor:
        return torch.from_numpy(cache.rows(rows, view, field)).to(noise.device, torch.float32)

    if not sample_posterior:
        return stored("mean")
    return stored("mean") + noise.normal("posterior", cache.manifest.row_shape) * stored("std")


@torch.inference_mode()
def held_out_loss(
    model: Generator,
    cache: LatentCache,
    rows: np.ndarray,
    config: GeneratorConfig,
    accelerator: Accelerator,
) -> float:
    """Mean loss of ``model``, in evaluation mode, on rows (R,), with the same noise each time.

    Labels are not dropped. The processes share the batches, which are the same for any number of
    them; every process calls, and gets the mean of all.
    """
    view = (config.views or cache.views)[0]
    sums = {}
    for number, start in enumerate(range(0, len(rows), _BATCH)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        some = rows[start : start + _BATCH]
        noise = Noise(config.seed, some, step=number, device=accelerator.device)
        draw = config.sample_posterior and not cache.is_exact
        z = drawn_rows(cache, some, view, noise, sample_posterior=draw)
        labels = torch.from_numpy(cache.labels[some].astype(np.int64)).to(accelerator.device)
        with accelerator.autocast():
            sums[number] = float(model(z, labels, noise)) * len(some)
    shares = gather_object([sums]) if accelerator.num_processes > 1 else [sums]
    merged = {number: value for share in shares for number, value in share.items()}
    return sum(merged[number] for number in sorted(merged)) / len(rows)
