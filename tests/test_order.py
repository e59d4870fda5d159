from collections import Counter

import numpy as np
import pytest

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.order import (
    BLOCK_ROWS,
    EPOCH_ORDER,
    LANES,
    WINDOW_BLOCKS,
    BlockOrder,
    SampleOrder,
    permutation,
)

ORDERS = [SampleOrder, BlockOrder]
SIZES = [1, 2, 63, 64, 65, 1000, 70_001]
PINNED_8 = [5, 4, 7, 0, 1, 2, 6, 3]
PINNED = [848693, 478453, 738577, 820534, 161043]
BLOCKS = [1025264, 1079903, 34851, 562330, 53119]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", SIZES)
def test_each_epoch_is_a_permutation(order, n):
    made = order(n, seed=3)
    for epoch in (0, 1, 7):
        rows = made.at(np.arange(epoch * n, (epoch + 1) * n))
        assert np.array_equal(np.sort(rows), np.arange(n))


@pytest.mark.parametrize("order", ORDERS)
def test_depends_on_position_and_seed_alone(order):
    n = 1000
    positions = np.arange(5 * n)
    straight = order(n, seed=5).at(positions)
    shuffled = np.random.default_rng(0).permutation(positions)
    assert np.array_equal(order(n, seed=5).at(shuffled), straight[shuffled])
    pieces = order(n, seed=5)
    assert np.array_equal(
        np.concatenate([pieces.at(p) for p in np.split(positions, [1, 999, 1001, 3456])]), straight
    )
    assert not np.array_equal(order(n, seed=6).at(positions), straight)
    assert not np.array_equal(straight[:n], straight[n : 2 * n])


def test_version_1_is_pinned():
    assert permutation(8, 0, EPOCH_ORDER).tolist() == PINNED_8
    assert SampleOrder(1_281_167, 42).at(np.array([0, 1, 2, 1_281_167, 10**12])).tolist() == PINNED
    assert BlockOrder(1_281_167, 42).at(np.array([0, 1, 2, 1_281_167, 10**12])).tolist() == BLOCKS


def test_permutations_are_uniform():
    # 24 permutations of 4 rows over 4,800 epochs: chi-square with 23 degrees of freedom.
    counts = Counter(tuple(permutation(4, 1, EPOCH_ORDER, e)) for e in range(4800))
    chi = sum((c - 200) ** 2 / 200 for c in counts.values())
    assert len(counts) == 24
    assert chi < 49.7  # 0.999 quantile


def test_block_order_stays_local():
    n = 300_000
    order = BlockOrder(n, 0)
    for world in (1, 4):
        mine = order.at(np.arange(0, LANES * WINDOW_BLOCKS * BLOCK_ROWS, world))
        blocks = np.unique(mine // BLOCK_ROWS)
        # A lane's first window touches its 4 blocks and at most one more, cut by the lanes' ends.
        assert len(blocks) <= (WINDOW_BLOCKS + 1) * LANES // world


def test_no_rows_is_an_error():
    for order in ORDERS:
        with pytest.raises(ConfigError, match="no rows"):
            order(0, 0)
