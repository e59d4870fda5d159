"""RandomAR and RasterAR against the recorded numbers, the cache, batches and learning."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.generators import ardiff
from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise, ReplayNoise

GOLDEN = Path(__file__).parent / "data" / "ardiff_golden.npz"
TINY = {"width": 64, "depth": 2, "heads": 4, "head_width": 32, "head_depth": 2}
LINEAR = Sampling(guidance_scale=3.0, guidance_schedule="linear", steps=5)
BOTH = pytest.mark.parametrize("order", ["random", "raster"])


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.fixture
def model(golden_weights, order):
    tiny = ARDiff(order=order, grid=(4, 4), channels=4, num_classes=10, **TINY)
    return golden_weights(tiny).requires_grad_(False)


def rows(z):
    """(B, C, h, w) -> (B, N, C)."""
    return z.flatten(2).transpose(1, 2)


@BOTH
def test_transformer(model, golden, order):
    places = golden[f"{order}_orders"]
    tokens = rows(golden[f"{order}_latent"]).gather(1, places[..., None].expand(-1, -1, 4))
    out = model.transform(tokens, places, golden[f"{order}_labels"])
    torch.testing.assert_close(out, golden[f"{order}_transformer_output"], rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("key", ["sample_cfg1", "sample_cfg3_linear"])
def test_samples(model, golden, golden_draw, order, key):
    sampling = Sampling(steps=5) if key == "sample_cfg1" else LINEAR
    draws = [golden_draw(k, (2, 4)) for k in range(16 * 6)]
    noise = ReplayNoise(2, draws, {"order": golden[f"{order}_orders"].argsort(dim=1)})
    out = model.sample(golden[f"{order}_labels"], sampling, noise)
    expected = rows(golden[f"{order}_{key}"])
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)


@BOTH
def test_cache_equals_full_computation(model, order):
    """Recompute the whole prefix for each token: the same tokens, guidance on late steps off."""
    labels, noise = torch.tensor([1, 2, 3]), Noise(0, [5, 6, 7])
    sampling = Sampling(guidance_scale=2.0, guidance_interval=(0.2, 0.6), steps=5, clip=3.0)
    places = model.places(noise, labels.device)
    tokens = torch.zeros(3, 16, 4)
    head = model.diffloss.sampler(sampling)
    for i in range(16):
        scale = 2.0 if 0.2 <= i / 16 <= 0.6 else 1.0
        cond = model.transform(tokens, places, labels)[:, i]
        null = model.transform(tokens, places, torch.full_like(labels, -1))[:, i]
        draws = noise.normal_steps(f"head/{i}", 6, (4,))
        both = cond if scale == 1.0 else torch.cat((cond, null))
        tokens[:, i] = head(both, draws, scale)
    expected = torch.empty_like(tokens)
    expected.scatter_(1, places[..., None].expand_as(tokens), tokens)
    out = model.sample(labels, sampling, noise)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@pytest.mark.soak
@BOTH
def test_cache_equals_full_computation_at_base_size(order):
    """The head's conditions of all 256 positions, conditional and null, for random tokens."""
    latents = {"grid": (16, 16), "channels": 16, "num_classes": 1000}
    torch.manual_seed(0)
    model = build_generator(f"{order}-ar-b", **latents).eval().requires_grad_(False)
    for parameter in model.parameters():  # which begin such that the blocks change nothing
        torch.nn.init.normal_(parameter, std=0.05)
    labels, places = torch.tensor([7]), model.places(Noise(0, [3]), torch.device("cpu"))
    tokens = torch.randn(1, 256, 16)
    null = torch.full_like(labels, -1)
    expected = torch.cat([model.transform(tokens, places, given) for given in (labels, null)])
    decoder = ardiff._CachedDecoder(model, labels, places, guided=True)
    previous = [None, *tokens.unbind(1)]
    found = torch.stack([decoder.step(i, previous[i], halves=2) for i in range(256)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.1


@BOTH
def test_future_tokens_do_not_show(model, order):
    places = model.places(Noise(0, [0]), torch.device("cpu"))
    tokens = torch.randn(1, 16, 4)
    changed = tokens.clone()
    changed[:, 9:] += 1.0
    before, after = (model.transform(t, places, torch.tensor([3])) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(dim=-1).all()


@BOTH
def test_batch_size_does_not_show(model, order):
    """fp32, to 2e-5 of the largest value: sums may be added up in another order."""
    sampling = Sampling(guidance_scale=3.0, guidance_schedule="linear", steps=5, clip=3.0)
    labels, ids = torch.arange(64) % 10, torch.arange(1000, 1064)
    whole = model.sample(labels, sampling, Noise(5, ids))
    atol = 2e-5 * float(whole.abs().max())
    for part in (slice(3, 4), slice(7, 14), slice(57, 64)):
        out = model.sample(labels[part], sampling, Noise(5, ids[part]))
        torch.testing.assert_close(out, whole[part], rtol=0, atol=atol)


@BOTH
@pytest.mark.parametrize(("grid", "patch_size"), [((4, 6), 2), ((3, 5), 1), ((7,), 1)])
def test_any_grid(order, grid, patch_size):
    model = ARDiff(order=order, grid=grid, channels=3, num_classes=4, patch_size=patch_size, **TINY)
    z, labels = torch.randn(2, math.prod(grid), 3), torch.tensor([1, -1])
    loss = model(z, labels, Noise(0, [0, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    used = Sampling(steps=2, clip=3.0, guidance_scale=2.0)
    assert model.sample(labels, used, Noise(0, [0, 1])).shape == z.shape


def test_orders():
    random = ARDiff(order="random", grid=(4, 4), channels=4, num_classes=10, **TINY)
    places = random.places(Noise(0, range(20)), torch.device("cpu"))
    assert (places.sort(dim=1).values == torch.arange(16)).all()
    assert len({tuple(row) for row in places.tolist()}) == 20
    with pytest.raises(ConfigError, match="random or raster"):
        ARDiff(order="spiral", grid=(4, 4), channels=4, num_classes=10, **TINY)


@BOTH
def test_learns_eight_latents(order, one_thread):
    torch.manual_seed(0)
    model = ARDiff(
        **{**TINY, "head_width": 96},
        order=order,
        grid=(4, 4),
        channels=4,
        num_classes=8,
        label_drop=0.0,
    )
    steps, labels = {"random": 320, "raster": 140}[order], torch.arange(8)
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
    out = model.eval().sample(labels, Sampling(steps=50, clip=4.0), Noise(1, range(8)))
    nearest = torch.cdist(out.flatten(1), z.flatten(1)).argmin(dim=1)
    assert nearest.tolist() == labels.tolist()
