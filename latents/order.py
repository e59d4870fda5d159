"""The order of samples: a pure function of (seed, position).

Position p of an endless stream lies in epoch p // n; each epoch is a permutation of the n rows.
The permutation sorts keys from Philox4x64, whose stream numpy guarantees (as it does not for
``permutation``); a sort of distinct integers has one answer on every machine. Any change in the
numbers needs a new ``ORDER_VERSION``, or interrupted runs would go on in another order; the tests
pin literal values.

Two kinds of order: ``SampleOrder`` shuffles all rows of an epoch, ``BlockOrder`` keeps reads local
for caches larger than memory.
"""

from __future__ import annotations

import numpy as np

from detok_pipe.latents.errors import ConfigError

ORDER_VERSION = 1

# Purposes keep permutations with the same (seed, number) apart.
WRITE_ORDER, EPOCH_ORDER, BLOCK_ORDER, WINDOW_ORDER = range(4)

LANES = 64
BLOCK_ROWS = 256
# Rows are stored in random order already, so a window of 4 blocks a lane (65,536 rows in all) mixes
# as well as a larger one and keeps two windows of a 256 x 16 cache with both fields in 2 GB.
WINDOW_BLOCKS = 4

_WORD = (1 << 64) - 1


def permutation(n: int, seed: int, purpose: int, number: int = 0) -> np.ndarray:
    """A uniformly random permutation of range(n), int64, from (seed, purpose, number)."""
    if n < 2:
        return np.zeros(n, np.int64)
    generator = np.random.Philox(
        key=np.array([seed & _WORD, ORDER_VERSION << 32 | purpose], np.uint64),
        counter=np.array([0, 0, number, 0], np.uint64),
    )
    # The low bits hold the row number: it breaks ties and comes along with the sorted key.
    mask = np.uint64((1 << (n - 1).bit_length()) - 1)
    keys = generator.random_raw(n)
    keys &= ~mask
    keys |= np.arange(n, dtype=np.uint64)
    keys.sort()
    keys &= mask
    return keys.astype(np.int64)


def _check(n: int) -> None:
    if n < 1:
        raise ConfigError("there are no rows to order: the cache, or the subset of it, is empty")


class SampleOrder:
    """A new permutation of all n rows every epoch.

    Args:
        n: number of rows.
        seed: any integer, taken modulo 2^64.

    Raises:
        ConfigError: n is 0.
    """

    def __init__(self, n: int, seed: int) -> None:
        _check(n)
        self.n = n
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def _epoch(self, epoch: int) -> np.ndarray:
        found = self._epochs.get(epoch)
        if found is None:
            found = permutation(self.n, self.seed, EPOCH_ORDER, epoch)
            # A batch straddles two epochs (many, when the set is tiny); older ones are dropped.
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = found
        return found

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Rows (B,) int64 at stream positions (B,) int64 >= 0."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.n)
        if len(epochs) and epochs.min() == epochs.max():  # nearly always
            return self._epoch(int(epochs[0]))[offsets]
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch(int(epoch))[offsets[here]]
        return rows


class BlockOrder:
    """Shuffled reads that stay local: for caches larger than memory.

    In each epoch the blocks of 256 consecutive rows are permuted and their rows dealt, in that
    sequence, to 64 lanes of equal length (within one row). A lane is cut into windows of 4 blocks'
    rows, each window shuffled. Position e of the epoch is entry e // 64 of lane e % 64, so that a
    process that takes every W-th position touches only 64 / W lanes of an epoch.

    Args:
        n: number of rows.
        seed: any integer, taken modulo 2^64.

    Raises:
        ConfigError: n is 0.
    """

    def __init__(self, n: int, seed: int) -> None:
        _check(n)
        self.n = n
        self.seed = seed
        # Lane l holds the entries e of an epoch with e % 64 == l.
        sizes = (n - np.arange(LANES) + LANES - 1) // LANES
        self._starts = np.concatenate([[0], np.cumsum(np.maximum(sizes, 0))])
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permuted blocks and the place where each begins in the dealt sequence."""
        found = self._blocks.get(epoch)
        if found is None:
            blocks = permutation(-(-self.n // BLOCK_ROWS), self.seed, BLOCK_ORDER, epoch)
            rows = np.minimum(self.n - blocks * BLOCK_ROWS, BLOCK_ROWS)
            found = blocks, np.concatenate([[0], np.cumsum(rows)[:-1]])
            while len(self._blocks) > 1:
                del self._blocks[min(self._blocks)]
            self._blocks[epoch] = found
        return found

    def window(self, epoch: int, window: int) -> np.ndarray:
        """The rows (W, 64) int64 of one window of all lanes, in the order they are read out; -1
        behind the end of the last window."""
        found = self._windows.get((epoch, window))
        if found is None:
            length = WINDOW_BLOCKS * BLOCK_ROWS
            blocks, begins = self._sequence(epoch)
            found = np.full((length, LANES), -1, np.int64)
            for lane in range(LANES):
                start = self._starts[lane] + window * length
                places = np.arange(start, min(start + length, self._starts[lane + 1]))
                block = np.searchsorted(begins, places, side="right") - 1
                rows = blocks[block] * BLOCK_ROWS + places - begins[block]
                number = (epoch * LANES + lane) << 24 | window
                mixed = permutation(len(rows), self.seed, WINDOW_ORDER, number)
                found[: len(rows), lane] = rows[mixed]
            while len(self._windows) > 2:
                del self._windows[next(iter(self._windows))]
            self._windows[epoch, window] = found
        return found

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Rows (B,) int64 at stream positions (B,) int64 >= 0."""
        positions = np.asarray(positions, np.int64)
        epochs, offsets = np.divmod(positions, self.n)
        windows, within = np.divmod(offsets, LANES * WINDOW_BLOCKS * BLOCK_ROWS)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            for window in np.unique(windows[epochs == epoch]).tolist():
                here = (epochs == epoch) & (windows == window)
                # Entry e // 64 of lane e % 64, in a table of 64 columns, is number e.
                rows[here] = self.window(epoch, window).reshape(-1)[within[here]]
        return rows
