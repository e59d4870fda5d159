"""Random numbers as a pure function of (seed, id, name, index).

Every Gaussian or uniform number that training or sampling uses for a row of a batch comes from
here. A row is known by its id (the number of a sample, or a position in the stream of training
samples), so its numbers do not depend on the batch size, on the number of processes or on a
restart. The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) in integer tensor operations, so the integers are the same on every device.

The 128-bit counter is (block, crc32(name), id low, id high), the 64-bit key is the seed: two
names, two ids or two blocks never share a counter. One block gives four numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
# Blocks worked on at a time: on a CPU the temporaries then stay in its cache; elsewhere the bound
# only limits memory.
_CHUNK_CPU = 1 << 15
_CHUNK_OTHER = 1 << 24


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox 4x32-10.

    Args:
        counter: four int64 tensors of one shape, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of that shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # An int64 product wraps modulo 2**64, which keeps all 64 bits of the unsigned product;
        # the mask removes the sign that the shift drags in. The odd words are used by xor only,
        # so their high halves may stay dirty until the end.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = p1, p0
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def _normals(words: tuple[Tensor, ...], out: Tensor) -> None:
    """Box-Muller: four words (n) -> out (n, 4), fp32. The largest magnitude is about 6.8."""
    for pair in (0, 2):
        # u in (0, 1]; the half keeps the logarithm finite.
        u = words[pair].to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
        radius = u.log_().mul_(-2.0).sqrt_()
        # An angle in [-pi, pi) is rounded more finely than one in [0, 2 pi).
        angle = (words[pair + 1] - (1 << 31)).to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
        torch.mul(radius, angle.cos(), out=out[:, pair])
        torch.mul(radius, angle.sin_(), out=out[:, pair + 1])


def _uniforms(words: tuple[Tensor, ...], out: Tensor) -> None:
    """Four words (n) -> out (n, 4), fp32 multiples of 2**-24 in [0, 1)."""
    for j, word in enumerate(words):
        torch.mul((word >> 8).to(torch.float32), 2.0**-24, out=out[:, j])


class Noise:
    """Counter-based random numbers for the rows of a batch.

    Asking again for a name gives the same numbers; another name gives independent ones. A draw
    of a larger shape begins with the numbers of the smaller one (in flattened order).

    Args:
        seed: any integer; its low 64 bits are used.
        ids: (B,) int64, the row's sample number or its position in the sample stream.
        step: training step, used by `shared_uniform` only.
        device: where the numbers are made and returned.
    """

    def __init__(
        self,
        seed: int,
        ids: Tensor | np.ndarray | Sequence[int],
        *,
        step: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed = int(seed)
        self.step = int(step)
        self.device = torch.device(device)
        self.ids = torch.as_tensor(ids, dtype=torch.int64).to(self.device, non_blocking=True)
        if self.ids.ndim != 1:
            raise ConfigError(
                f"noise: ids must be one number a row, got shape {(*self.ids.shape,)}"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) fp32 standard normals."""
        return self._draw(name, shape, _normals)

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        """(B, *shape) fp32 uniforms in [0, 1)."""
        return self._draw(name, shape, _uniforms)

    def normal_steps(self, name: str, steps: int, shape: Sequence[int]) -> Tensor:
        """(steps, B, *shape) fp32 standard normals: the draws of a whole chain in one call."""
        return self.normal(name, (steps, *shape)).transpose(0, 1)

    def shared_uniform(self, name: str, shape: Sequence[int] = ()) -> np.ndarray:
        """float64 uniforms in [0, 1) for the batch as a whole, from (seed, step, name).

        Made on the host, the same on all processes.
        """
        key = np.array([self.seed & (2**64 - 1), zlib.crc32(name.encode())], dtype=np.uint64)
        counter = np.array([0, self.step, 0, 0], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(math.prod(shape))
        return ((np.asarray(words, dtype=np.uint64) >> 11) * 2.0**-53).reshape(tuple(shape))

    def take(self, rows: slice | Tensor | Sequence[int]) -> Noise:
        """The same numbers for some of the rows (a slice or indices)."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, dtype=torch.int64).to(self.device)
        return Noise(self.seed, self.ids[rows], step=self.step, device=self.device)

    def _draw(
        self,
        name: str,
        shape: Sequence[int],
        convert: Callable[[tuple[Tensor, ...], Tensor], None],
    ) -> Tensor:
        count = math.prod(shape)
        blocks = -(-count // 4)
        total = len(self.ids) * blocks
        out = torch.empty(total, 4, dtype=torch.float32, device=self.device)
        row_low = self.ids & _LOW
        row_high = (self.ids >> 32) & _LOW
        key = (self.seed & _LOW, (self.seed >> 32) & _LOW)
        chunk = _CHUNK_CPU if self.device.type == "cpu" else _CHUNK_OTHER
        for start in range(0, total, chunk):
            position = torch.arange(start, min(start + chunk, total), device=self.device)
            row = position // blocks
            block = position - row * blocks
            stream = torch.full_like(block, zlib.crc32(name.encode()))
            words = philox((block, stream, row_low[row], row_high[row]), key)
            convert(words, out[start : start + chunk])
        return out.view(len(self.ids), 4 * blocks)[:, :count].reshape(len(self.ids), *shape)


class ReplayNoise:
    """`Noise` that hands out recorded numbers.

    Args:
        rows: B.
        draws: Gaussian draws in the order in which they are asked for. A draw may hold more
            numbers than a request for (B, *shape); its first ones are used.
        named: numbers by name, for any kind of request; a named request takes none of `draws`.
    """

    def __init__(
        self,
        rows: int,
        draws: Iterable[Tensor] = (),
        named: Mapping[str, Tensor | np.ndarray] | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows = rows
        self.draws = iter(draws)
        self.named = dict(named or {})
        self.device = torch.device(device)

    def __len__(self) -> int:
        return self.rows

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """The next recorded draw, as (B, *shape) fp32."""
        if name in self.named:
            return self.uniform(name, shape)
        draw = next(self.draws, None)
        if draw is None:
            raise ConfigError(f"replayed noise: no recorded draw left for {name!r}")
        return self._shaped(draw, name, shape)

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        """The numbers recorded under `name`, as (B, *shape) fp32."""
        if name not in self.named:
            raise ConfigError(f"replayed noise: nothing recorded under {name!r}")
        return self._shaped(torch.as_tensor(self.named[name]), name, shape)

    def normal_steps(self, name: str, steps: int, shape: Sequence[int]) -> Tensor:
        """The next `steps` recorded draws, as (steps, B, *shape) fp32."""
        return torch.stack([self.normal(name, shape) for _ in range(steps)])

    def shared_uniform(self, name: str, shape: Sequence[int] = ()) -> np.ndarray:
        """The float64 numbers recorded under `name`."""
        if name not in self.named:
            raise ConfigError(f"replayed noise: nothing recorded under {name!r}")
        return np.asarray(self.named[name], dtype=np.float64).reshape(tuple(shape))

    def take(self, rows: slice | Tensor | Sequence[int]) -> ReplayNoise:
        """Refused: recorded draws belong to the whole batch."""
        raise ConfigError("replayed noise belongs to the whole batch and cannot be split")

    def _shaped(self, draw: Tensor, name: str, shape: Sequence[int]) -> Tensor:
        count = self.rows * math.prod(shape)
        if draw.numel() < count:
            raise ConfigError(
                f"replayed noise: {name!r} asks for {count} numbers, recorded {draw.numel()}"
            )
        flat = draw.reshape(-1)[:count].to(self.device, torch.float32)
        return flat.view(self.rows, *shape)
