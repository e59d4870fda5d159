"""Classifier-free guidance (Ho and Salimans 2022): the scale at a moment, and the combination."""

from torch import Tensor

from detok_pipe.generators.sampling import Sampling


def scale_at(sampling: Sampling, progress: float) -> float:
    """Guidance scale at `progress` in [0, 1]; 1 means that the null half is not needed.

    Progress is the share of known tokens (MAR, RandomAR, RasterAR) or the time from noise to
    data (DiT, SiT, LightningDiT). Outside of the interval the scale is 1; the linear schedule
    is 1 + (s - 1) progress.
    """
    low, high = sampling.guidance_interval
    if not low <= progress <= high:
        return 1.0
    if sampling.guidance_schedule == "linear":
        return 1.0 + (sampling.guidance_scale - 1.0) * progress
    return sampling.guidance_scale


def combine(
    cond: Tensor, null: Tensor, scale: float | Tensor, guided_channels: int | None = None
) -> Tensor:
    """null + scale (cond - null) over the last dimension's first `guided_channels` (None: all).

    The other channels are those of `cond`. Shapes (..., C); `scale` is one number, or
    broadcasts.
    """
    if guided_channels is None or guided_channels >= cond.shape[-1]:
        return null + scale * (cond - null)
    out = cond.clone()
    part = slice(0, guided_channels)
    out[..., part] = null[..., part] + scale * (cond[..., part] - null[..., part])
    return out
