"""What DiT, SiT and LightningDiT have in common: names, forms of latents, guidance, learning."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch

from detok_pipe.generators.backbone import sincos_positions
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("DETOK_REFERENCE", ROOT.parent / "shared" / "reference"))
NAMES = ["dit-b", "sit-b", "lightningdit-b"]
TINY = {"width": 64, "depth": 2, "heads": 4}


def tiny(name, *, grid=(4, 4), channels=4, num_classes=10, **options):
    torch.manual_seed(0)
    return build_generator(
        name, grid=grid, channels=channels, num_classes=num_classes, **{**TINY, **options}
    )


@pytest.mark.parametrize(
    ("name", "published", "parameters", "keys"),
    [
        ("dit-b", "DiT_base", 130_315_808, 2274128721),
        ("sit-b", "SiT_base", 130_303_504, 2998800154),
        ("lightningdit-b", "LightningDiT_base", 130_531_600, 2079974222),
    ],
)
def test_published_names_and_sizes(name, published, parameters, keys):
    with torch.device("meta"):
        model = build_generator(name, grid=(16, 16), channels=16, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    lines = "".join(f"{key} {shape}\n" for key, shape in sorted(shapes.items()))
    assert zlib.crc32(lines.encode()) == keys
    if (REFERENCE / "state_dicts.json").exists():
        record = json.loads((REFERENCE / "state_dicts.json").read_text())[published]
        assert shapes == record["state_dict"]
        assert round(parameters / 1e6, 3) == record["parameters_M"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("grid", "channels", "patch_size"),
    [((4, 4), 4, 1), ((4, 6), 3, 2), ((3, 5), 16, 1), ((7,), 32, 1)],
)
def test_any_form_of_latents(name, grid, channels, patch_size):
    model = tiny(name, grid=grid, channels=channels, patch_size=patch_size)
    places = torch.Size(grid).numel()
    assert model.tokens == places // patch_size**2
    noise = Noise(0, [5, 6])
    loss = model.loss(torch.randn(2, places, channels), torch.tensor([1, -1]), noise)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    z = model.eval().sample(torch.tensor([1, 2]), Sampling(steps=3), noise)
    assert z.shape == (2, places, channels)
    assert z.dtype == torch.float32
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("name", NAMES)
def test_sequences_learn_their_positions(name):
    model = tiny(name, grid=(9,))
    position = dict(model.named_parameters())["pos_embed"]
    assert position.shape == (1, 9, 64)
    assert 0.015 < position.std() < 0.025


def test_fixed_positions():
    """By the formula, one entry at a time."""
    table = sincos_positions((2, 3), 8)[0]
    assert table.shape == (6, 8)
    row, column, frequency = 1, 2, 10_000.0**-0.5
    expected = torch.tensor([column, column * frequency, row, row * frequency], dtype=torch.float64)
    found = table[row * 3 + column].double()
    torch.testing.assert_close(found[[0, 1, 4, 5]], expected.sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[[2, 3, 6, 7]], expected.cos(), atol=1e-6, rtol=0)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="patch_size 3"):
        tiny("sit-b", patch_size=3)
    with pytest.raises(ConfigError, match="width 66"):
        tiny("sit-b", width=66, heads=3)


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_dropped_in_training_only(name):
    model = tiny(name, label_drop=0.5)
    seen = []
    losses = model.losses
    model.losses = lambda z, condition, *rest: seen.append(condition) or losses(z, condition, *rest)
    z, condition, noise = torch.zeros(64, 16, 4), torch.full((64,), 3), Noise(0, range(64))
    model.train().loss(z, condition, noise)
    model.eval().loss(z, condition, noise)
    assert 16 < (seen[0] == -1).sum() < 48
    assert torch.equal(seen[1], condition)


@pytest.mark.parametrize(
    ("name", "options"), [*((n, {"steps": 6}) for n in NAMES), ("sit-b", {"method": "dopri5"})]
)
def test_images_do_not_depend_on_the_batch(name, options, golden_weights, one_thread):
    """fp32, to 1e-5 of the largest value (matrix products round differently by batch size)."""
    model = golden_weights(tiny(name))
    sampling = Sampling(guidance_scale=1.5, guidance_interval=(0.1, 0.8), **options)
    labels = torch.arange(64) % 10

    def sample(ids):
        return model.sample(labels[ids], sampling, Noise(3, ids))

    everything = sample(torch.arange(64))
    largest = everything.abs().max()
    seven = torch.arange(21, 28)
    for ids in (seven, torch.tensor([25]), seven.flip(0)):
        assert (sample(ids) - everything[ids]).abs().max() < 1e-5 * largest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "doubled"),
    [
        ({"guidance_scale": 1.0}, 0),
        ({"guidance_scale": 2.0}, 8),
        ({"guidance_scale": 2.0, "guidance_interval": (0.99, 1.0)}, 0),
        ({"guidance_scale": 2.0, "guidance_interval": (0.0, 0.0)}, 1),
    ],
)
def test_null_half_is_evaluated_only_where_guidance_is_on(name, options, doubled):
    model = tiny(name).eval()
    rows = []
    network = model.network
    model.network = lambda x, t, condition: rows.append(condition) or network(x, t, condition)
    steps = 8 if name == "dit-b" else 9  # points: 8 intervals
    model.sample(torch.tensor([1, 2, 3]), Sampling(steps=steps, **options), Noise(0, range(3)))
    assert len(rows) == 8
    assert sum(len(condition) == 6 for condition in rows) == doubled
    assert sum(int((condition == -1).sum()) for condition in rows) == 3 * doubled


@pytest.mark.parametrize("name", NAMES)
def test_scales_share_their_start(name):
    """At scale 1, guidance or not is the same chain; noise does not move with the scale."""
    draws = {}

    class Spy(Noise):
        def normal(self, name, shape):
            draws.setdefault(name, []).append(super().normal(name, shape))
            return draws[name][-1]

    model = tiny(name).eval()
    for scale in (1.0, 2.0):
        model.sample(torch.tensor([1]), Sampling(guidance_scale=scale, steps=3), Spy(0, [4]))
    assert all(len(pair) == 2 and torch.equal(*pair) for pair in draws.values())


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_weights(name, golden_weights):
    """Weights cast once to bfloat16: fp32 states, results near those of fp32."""
    model = golden_weights(tiny(name))
    x, t, condition = torch.randn(4, 16, 4), torch.full((4,), 0.5), torch.arange(4)
    full = model.network(x, t, condition)
    half = model.to(torch.bfloat16).network(x, t, condition)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("name", NAMES)
def test_learns_eight_latents(name, one_thread):
    model = tiny(name, grid=(2, 2), num_classes=8, label_drop=0.0)
    targets = torch.randn(8, 4, 4)
    labels = torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    steps = 400
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    first = last = 0.0
    for step in range(steps):
        noise = Noise(0, torch.arange(32) + 32 * step)
        loss = model.loss(targets.repeat(4, 1, 1), labels.repeat(4), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        first, last = first or loss.item(), loss.item()
    assert last < first / 2
    z = model.eval().sample(labels, Sampling(steps=50), Noise(1, range(8)))
    distances = (z[:, None] - targets[None]).flatten(2).norm(dim=2)
    assert distances.argmin(dim=1).tolist() == list(range(8))
