"""MAR against the recorded numbers, its schedule, batch independence and learning."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from detok_pipe.generators.mar import MAR, mask_ratio, reveal_counts
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise, ReplayNoise

GOLDEN = Path(__file__).parent / "data" / "mar_golden.npz"
TINY = {"width": 64, "depth": 2, "heads": 4, "head_width": 32, "head_depth": 2, "buffer": 4}
LINEAR = Sampling(guidance_scale=3.0, guidance_schedule="linear", steps=5, iterations=6)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture(scope="module")
def model(golden_weights):
    tiny = MAR(grid=(4, 4), channels=4, num_classes=10, **TINY)
    return golden_weights(tiny).requires_grad_(False)


def rows(z):
    """(B, C, h, w) -> (B, N, C)."""
    return z.flatten(2).transpose(1, 2)


def close(ours, golden):
    atol = 1e-6 * float(golden.abs().max())
    torch.testing.assert_close(ours, golden, rtol=0, atol=atol)


def test_networks(model, golden):
    z, mask = rows(golden["latent"]), golden["mask"].bool()
    places = torch.arange(16).expand(2, -1)
    known, masked = places[~mask].view(2, -1), places[mask].view(2, -1)
    tokens = z.gather(1, known[..., None].expand(-1, -1, 4))
    inputs = model.embed_buffer(golden["labels"]), model.embed_tokens(tokens, known)
    encoded = model.encode(torch.cat(inputs, dim=1))
    torch.testing.assert_close(encoded, golden["encoder_output"], rtol=0, atol=1e-5)
    positions = model.decoder_positions(torch.cat((known, masked), dim=1))
    decoded = model.decode(encoded, positions, masked)
    expected = golden["decoder_output"].gather(1, masked[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


def replay(golden, golden_draw):
    """The recorded noise, from raster order within an iteration to the order of revelation."""
    order, draws, known, k = golden["orders"].flip(1), [], 0, 0
    for count in reveal_counts(16, 6):
        rank = order[:, known : known + count].argsort(dim=1).argsort(dim=1)
        for _ in range(6):
            draw = golden_draw(k, (2, count, 4))
            draws.append(draw.gather(1, rank[..., None].expand(-1, -1, 4)))
            k += 1
        known += count
    return ReplayNoise(2, draws, {"order": golden["orders"].argsort(dim=1)})


def test_samples(model, golden, golden_draw):
    plain = Sampling(temperature=0.95, steps=5, iterations=6)
    out = model.sample(golden["labels"], plain, replay(golden, golden_draw))
    close(out, rows(golden["sample_cfg1_temperature095"]))
    out = model.sample(golden["labels"], LINEAR, replay(golden, golden_draw))
    close(out, rows(golden["sample_cfg3_linear"]))


def test_reveal_counts():
    assert reveal_counts(16, 6) == [1, 2, 2, 3, 4, 4]
    assert reveal_counts(16, 16) == [1] * 16
    assert reveal_counts(5, 1) == [5]
    for tokens, iterations in ((256, 64), (256, 256), (128, 100), (64, 10)):
        counts = reveal_counts(tokens, iterations)
        assert len(counts) == iterations
        assert sum(counts) == tokens
        assert min(counts) >= 1
    with pytest.raises(ConfigError, match="iterations"):
        reveal_counts(4, 5)


def test_mask_ratio():
    """The inverse of the truncated normal's distribution function, by scipy."""
    u = np.linspace(0, 1, 101)
    expected = stats.truncnorm.ppf(u, -1.2, 0.0, loc=1.0, scale=0.25)
    np.testing.assert_allclose([mask_ratio(x) for x in u], expected, atol=1e-9)


@pytest.mark.parametrize("sampling", [LINEAR, Sampling(steps=5, iterations=6)])
def test_batch_size_does_not_show(model, sampling):
    """fp32, to 2e-5 of the largest value: sums may be added up in another order."""
    sampling = Sampling(**{**sampling.__dict__, "clip": 3.0})
    labels, ids = torch.arange(64) % 10, torch.arange(1000, 1064)
    whole = model.sample(labels, sampling, Noise(5, ids))
    atol = 2e-5 * float(whole.abs().max())
    for part in (slice(3, 4), slice(7, 14), slice(57, 64)):
        out = model.sample(labels[part], sampling, Noise(5, ids[part]))
        torch.testing.assert_close(out, whole[part], rtol=0, atol=atol)


def test_guidance_outside_its_interval_is_none(model):
    labels, noise = torch.tensor([1, 2]), Noise(0, [0, 1])
    plain = Sampling(steps=5, iterations=6, clip=3.0)
    scaled = {**plain.__dict__, "guidance_scale": 4.0}
    off = Sampling(**{**scaled, "guidance_interval": (0.0, 0.0)})
    on = Sampling(**scaled)
    late = Sampling(**{**scaled, "guidance_interval": (0.7, 1.0)})
    unguided = model.sample(labels, plain, noise)
    assert torch.equal(model.sample(labels, off, noise), unguided)
    guided = model.sample(labels, on, noise)
    assert (model.sample(labels, late, noise) != guided).any()
    # Tokens known before the interval begins are those of the unguided sample.
    first = noise.uniform("order", (16,)).argsort(1).flip(1)[:, :5]
    at = first[..., None].expand(-1, -1, 4)
    sampled = model.sample(labels, late, noise)
    torch.testing.assert_close(sampled.gather(1, at), unguided.gather(1, at))


@pytest.mark.parametrize(("grid", "patch_size"), [((4, 6), 2), ((3, 5), 1), ((7,), 1)])
def test_any_grid(grid, patch_size):
    model = MAR(grid=grid, channels=3, num_classes=4, patch_size=patch_size, **TINY)
    z, labels = torch.randn(2, math.prod(grid), 3), torch.tensor([1, -1])
    loss = model(z, labels, Noise(0, [0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    used = Sampling(steps=2, iterations=3, clip=3.0, guidance_scale=2.0)
    assert model.sample(labels, used, Noise(0, [0, 1])).shape == z.shape


def test_loss_is_repeatable_and_drops_labels(model):
    z, labels = torch.randn(64, 16, 4), torch.arange(64) % 10
    noise = Noise(3, range(64), step=4)
    assert model(z, labels, noise) == model(z, labels, noise)
    tiny = MAR(grid=(4, 4), channels=4, num_classes=10, label_drop=0.25, **TINY)
    seen = []
    tiny.embed_buffer = lambda condition: (
        seen.append(condition) or MAR.embed_buffer(tiny, condition)
    )
    tiny(z, labels, noise)
    dropped = noise.uniform("label_drop", ()) < 0.25
    assert torch.equal(seen[0], torch.where(dropped, -1, labels))


def test_learns_eight_latents(one_thread):
    torch.manual_seed(0)
    model = MAR(**{**TINY, "head_width": 96}, grid=(4, 4), channels=4, num_classes=8, dropout=0.0)
    steps, labels = 180, torch.arange(8)
    z = torch.randn(8, 16, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, 2 * (1 - s / steps)))
    for step in range(steps):
        noise = Noise(0, range(16 * step, 16 * step + 16), step=step)
        loss = model(z.repeat(2, 1, 1), labels.repeat(2), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    sampling = Sampling(steps=50, iterations=8, clip=4.0)
    out = model.eval().sample(labels, sampling, Noise(1, range(8)))
    nearest = torch.cdist(out.flatten(1), z.flatten(1)).argmin(dim=1)
    assert nearest.tolist() == labels.tolist()


def test_tokens_are_revealed_one_at_a_time_up_to_256_iterations():
    for grid, wanted in (((6,), 6), ((3, 2), 6), ((72,), 72), ((18, 15), 256)):
        torch.manual_seed(0)
        model = MAR(grid=grid, channels=2, num_classes=2, width=16, depth=1, heads=2, head_width=16)
        model.eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        labels, noise = torch.tensor([0]), Noise(0, [0])
        usual = model.sample(labels, Sampling(steps=2, clip=3.0), noise)
        stated = model.sample(labels, Sampling(steps=2, clip=3.0, iterations=wanted), noise)
        fewer = model.sample(labels, Sampling(steps=2, clip=3.0, iterations=wanted - 1), noise)
        assert torch.equal(usual, stated)
        assert not torch.equal(usual, fewer)
