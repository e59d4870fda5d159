"""Patches: the two channel orders, against a convolution and plain indexing."""

import pytest
import torch

from detok_pipe.generators.patch import default_patch_size, patchify, token_grid, unpatchify
from detok_pipe.latents.errors import ConfigError


@pytest.mark.parametrize("order", ["crq", "rqc"])
@pytest.mark.parametrize(("grid", "p"), [((4, 6), 2), ((6, 3), 3), ((5, 2), 1), ((7,), 1)])
def test_round_trip(grid, p, order):
    z = torch.randn(2, torch.Size(grid).numel(), 5)
    tokens = patchify(z, grid, p, order)
    assert tokens.shape == (2, torch.Size(token_grid(grid, p)).numel(), 5 * p ** len(grid))
    assert torch.equal(unpatchify(tokens, grid, p, order), z)


def test_channel_orders_by_plain_indexing():
    rows, columns, channels, p = 4, 6, 3, 2
    z = torch.arange(rows * columns * channels).reshape(1, rows * columns, channels)
    image = z.reshape(rows, columns, channels)
    crq = patchify(z, (rows, columns), p, "crq")[0]
    rqc = patchify(z, (rows, columns), p, "rqc")[0]
    for token in range(6):
        i, j = divmod(token, columns // p)
        patch = image[i * p : (i + 1) * p, j * p : (j + 1) * p]  # (r, q, C)
        assert crq[token].tolist() == [
            int(patch[r, q, c]) for c in range(channels) for r in range(p) for q in range(p)
        ]
        assert rqc[token].tolist() == patch.flatten().tolist()


def test_channel_first_order_is_a_strided_convolution():
    z = torch.randn(2, 24, 3)
    convolution = torch.nn.Conv2d(3, 8, 2, stride=2)
    image = z.transpose(1, 2).reshape(2, 3, 4, 6)
    expected = convolution(image).flatten(2).transpose(1, 2)
    weight = convolution.weight.flatten(1)
    found = torch.nn.functional.linear(patchify(z, (4, 6), 2, "crq"), weight, convolution.bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("grid", "p"), [((4, 5), 2), ((8,), 2), ((4, 4, 4), 1), ((4, 4), 0)])
def test_bad_sizes_are_named(grid, p):
    with pytest.raises(ConfigError, match=str(grid[0])):
        token_grid(grid, p)


def test_the_usual_patch_size_follows_from_the_grid():
    usual = {(16, 16): 1, (32, 32): 2, (64, 64): 2, (128,): 1, (1024,): 1, (17, 31): 1, (4, 4): 1}
    assert {grid: default_patch_size(grid) for grid in usual} == usual
