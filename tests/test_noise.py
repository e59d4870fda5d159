"""The counter-based generator: published vectors, independence, distribution, replay."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise, ReplayNoise, philox

MASK = 0xFFFFFFFF


def reference_philox(counter, key):
    """Philox 4x32-10 on Python's integers, from the paper's definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK, MASK), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(counter, key, words):
    out = philox([torch.tensor([c]) for c in counter], key)
    assert [f"{int(word):08x}" for word in out] == words.split()


def test_random_counters_against_python_integers():
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 1 << 32, (4, 50))
    key = (0x9ABCDEF0, 0x12345678)
    out = torch.stack(philox([torch.tensor(c) for c in counters], key))
    expected = [reference_philox(map(int, column), key) for column in counters.T]
    assert out.T.tolist() == expected


def test_numbers_are_pinned():
    """A change here changes every training run and every sample ever made with a seed."""
    noise = Noise(7, [0, 5, 2**40])
    uniform = noise.uniform("t", (2,))
    words = reference_philox((0, 0x856A5AA8, 5, 0), (7, 0))
    assert uniform[1].tolist() == [(word >> 8) / 2**24 for word in words[:2]]
    words = reference_philox((1, 0x856A5AA8, 0, 256), (7, 0))
    radius = math.sqrt(-2 * math.log((words[0] + 0.5) / 2**32))
    angle = 2 * math.pi * (words[1] / 2**32 - 0.5)
    normal = noise.normal("t", (6,))[2, 4:]
    expected = torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
    torch.testing.assert_close(normal, expected, rtol=0, atol=1e-6)
    assert noise.shared_uniform("x") == Noise(7, [9], device="cpu").shared_uniform("x")


def test_rows_do_not_depend_on_the_batch():
    whole = Noise(3, torch.arange(100, 164))
    for size in (1, 7):
        for start in range(0, 64, size):
            ids = torch.arange(100, 164)[start : start + size]
            part = Noise(3, ids)
            expected = whole.normal("a", (5, 3))[start : start + size]
            assert torch.equal(part.normal("a", (5, 3)), expected)
    rows = torch.tensor([3, 1, 60])
    assert torch.equal(whole.take(rows).uniform("b", (4,)), whole.uniform("b", (4,))[rows])
    assert torch.equal(whole.take(slice(2, 9)).normal("b", ()), whole.normal("b", ())[2:9])


def test_chunks_do_not_show(monkeypatch):
    whole = Noise(3, range(10)).normal("a", (7, 9))
    monkeypatch.setattr("detok_pipe.latents.noise._CHUNK_CPU", 5)
    assert torch.equal(Noise(3, range(10)).normal("a", (7, 9)), whole)


def test_names_seeds_ids_and_repetition():
    noise = Noise(1, [4, 5])
    a = noise.normal("a", (8,))
    assert torch.equal(a, noise.normal("a", (8,)))
    assert torch.equal(noise.normal("a", (3,)), a[:, :3])
    others = (noise.normal("b", (8,)), Noise(2, [4, 5]).normal("a", (8,)), a.flip(0))
    for other in (*others, Noise(1 << 32 | 1, [4, 5]).normal("a", (8,))):
        assert not (a == other).any()
    steps = noise.normal_steps("a", 2, (4,))
    assert torch.equal(steps[1], a[:, 4:])


def test_shared_numbers_follow_the_step_not_the_rows():
    one, two = Noise(1, [0], step=3), Noise(1, [7, 8, 9], step=3)
    assert one.shared_uniform("m", (4,)).tolist() == two.shared_uniform("m", (4,)).tolist()
    assert one.take([0]).shared_uniform("m") == one.shared_uniform("m")
    drawn = [float(Noise(1, [0], step=step).shared_uniform("m")) for step in range(2000)]
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_distribution():
    normal = Noise(11, range(400)).normal("z", (5, 100)).double().flatten()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    count = len(normal)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = float((normal**power).mean() - moment)
        assert abs(error) < 5 * math.sqrt(variance / count)
    uniform = Noise(11, range(400)).uniform("u", (500,)).double()
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1


def test_independence():
    """Rows, columns and names are uncorrelated, in value and in square."""
    a = Noise(5, range(256)).normal("a", (256,)).double()
    b = Noise(5, range(256)).normal("b", (256,)).double()
    for x, y in (
        (a, b),
        (a[1:], a[:-1]),
        (a[:, 1:], a[:, :-1]),
        (a[:, ::4], a[:, 1::4]),  # sine and cosine of one angle
        (a[:, ::4], a[:, 2::4]),  # two pairs of one block
    ):
        for power in (1, 2):
            u, v = (x**power).flatten(), (y**power).flatten()
            correlation = float(torch.corrcoef(torch.stack((u, v)))[0, 1])
            assert abs(correlation) < 5 / math.sqrt(len(u))


def test_empty_and_wrong_requests():
    assert Noise(0, []).normal("a", (3,)).shape == (0, 3)
    assert Noise(0, [1]).normal("a", (0, 3)).shape == (1, 0, 3)
    with pytest.raises(ConfigError, match="one number a row"):
        Noise(0, torch.zeros(2, 2, dtype=torch.int64))


def test_replay():
    draws = [torch.arange(8.0).view(4, 2), torch.arange(4.0)]
    noise = ReplayNoise(2, draws, {"order": torch.tensor([[0.5], [0.25]]), "m": 0.75})
    assert noise.normal("x", (2,)).tolist() == [[0, 1], [2, 3]]
    assert noise.uniform("order", (1,)).tolist() == [[0.5], [0.25]]
    assert float(noise.shared_uniform("m")) == 0.75
    assert noise.normal_steps("x", 1, (2,)).tolist() == [[[0, 1], [2, 3]]]
    with pytest.raises(ConfigError, match="no recorded draw left"):
        noise.normal("x", (2,))
    with pytest.raises(ConfigError, match="nothing recorded"):
        noise.uniform("t", ())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_numbers_on_a_gpu():
    cpu, gpu = Noise(3, range(64)), Noise(3, range(64), device="cuda")
    assert torch.equal(cpu.uniform("u", (1001,)), gpu.uniform("u", (1001,)).cpu())
    difference = cpu.normal("z", (10_001,)) - gpu.normal("z", (10_001,)).cpu()
    assert float(difference.abs().max()) < 1e-6
    words = [torch.randint(0, 1 << 32, (1000,)) for _ in range(4)]
    on_gpu = philox([word.to("cuda") for word in words], (1, 2))
    for a, b in zip(philox(words, (1, 2)), on_gpu, strict=True):
        assert torch.equal(a, b.cpu())
