"""The rule that the weights of golden files follow."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def rule_weight(key: str, shape: Sequence[int]) -> Tensor:
    """A golden file's weight: it follows from its name."""
    rng = np.random.default_rng(zlib.crc32(f"weight/{key}".encode()))
    value = rng.standard_normal(tuple(shape)) * 0.05
    if key.endswith("weight") and len(shape) == 1:
        value = value + 1.0
    return torch.from_numpy(value.astype(np.float32))
