"""Block mode's reads ahead: the system fetches the rows of a window while another is in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detok_pipe.latents.order import BLOCK_ROWS, LANES, WINDOW_BLOCKS, BlockOrder
from detok_pipe.latents.row_reader import RowReader


class BlockReads:
    """Asks for blocks ahead of one process's stream.

    Args:
        reader, arrays: of the cache, and the arrays ("view/field") that are read.
        order: of the samples.
        subset: row numbers that ``order`` counts, or None for all.
        rank, world: this process and their number.
    """

    def __init__(
        self,
        reader: RowReader,
        arrays: Sequence[str],
        order: BlockOrder,
        subset: np.ndarray | None,
        rank: int,
        world: int,
    ) -> None:
        self._reader = reader
        self._arrays = arrays
        self._order = order
        self._subset = subset
        self._rank = rank
        self._world = world
        self._asked: tuple[int, int] | None = None

    def advance(self, position: int) -> None:
        """Tells where the stream is. Whenever it has moved on by a block a lane, one block of
        each of this process's lanes is asked for, a window ahead; at the beginning, the window
        in use comes first."""
        epoch, offset = divmod(position, self._order.n)
        step = epoch, offset // (LANES * BLOCK_ROWS)
        if step == self._asked:
            return
        window, block = divmod(step[1], WINDOW_BLOCKS)
        if self._asked is None:
            for part in range(WINDOW_BLOCKS):
                self._ask(epoch, window, part)
        self._asked = step
        last = (self._order.n // LANES) // (WINDOW_BLOCKS * BLOCK_ROWS)
        epoch, window = (epoch, window + 1) if window < last else (epoch + 1, 0)
        self._ask(epoch, window, block)

    def _ask(self, epoch: int, window: int, block: int) -> None:
        lanes = np.arange(LANES // self._world) * self._world + self._rank - epoch * self._order.n
        columns = self._order.window(epoch, window)
        for lane in (lanes % LANES).tolist():
            rows = columns[:, lane]
            rows = np.sort(rows[rows >= 0])[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
            if self._subset is not None:
                rows = self._subset[rows]
            if len(rows):
                for array in self._arrays:
                    self._reader.will_need(array, rows)
