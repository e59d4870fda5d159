"""Every generator by name: keys and sizes of the published ones, options, errors."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from detok_pipe.generators.registry import (
    build_generator,
    default_sampling,
    generator_names,
)
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise

FAMILIES = sorted({name.rpartition("-")[0] for name in generator_names()})
# Number of parameters on 16 x 16 latents with 16 channels and 1000 classes.
PUBLISHED = {
    "mar-b": ({}, 192_174_624, "MAR_base diffloss_d=3 diffloss_w=1024"),
    "mar-b 6 x 1024": ({"head_depth": 6}, 207_924_768, "MAR_base diffloss_d=6 diffloss_w=1024"),
    "mar-l 8 x 1280": (
        {"head_depth": 8, "head_width": 1280},
        478_326_304,
        "MAR_large diffloss_d=8 diffloss_w=1280",
    ),
    "random-ar-b": ({}, 150_133_536, "ARDiff_base diffloss_d=3 diffloss_w=1024"),
    "raster-ar-b": ({}, 150_133_536, "ARDiff_base diffloss_d=3 diffloss_w=1024"),
}


def build(name, **overrides):
    with torch.device("meta"):
        return build_generator(name, grid=(16, 16), channels=16, num_classes=1000, **overrides)


@pytest.mark.parametrize("published", PUBLISHED)
def test_parameter_counts(published):
    overrides, count, _ = PUBLISHED[published]
    model = build(published.split()[0], **overrides)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("published", PUBLISHED)
def test_state_dicts(published):
    """Keys and shapes of the released checkpoints, where the list of them is at hand."""
    folder = Path(__file__).parents[1] / ".." / "shared" / "reference"
    file = Path(os.environ.get("DETOK_REFERENCE", folder)) / "state_dicts.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    overrides, _, key = PUBLISHED[published]
    state = build(published.split()[0], **overrides).state_dict()
    expected = json.loads(file.read_text())[key]["state_dict"]
    assert {key: list(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family):
    """Loss and samples of each kind, with a null label among the conditions."""
    torch.manual_seed(0)
    model = build_generator(
        f"{family}-b", grid=(4, 4), channels=4, num_classes=10, width=32, depth=1, heads=2
    )
    assert (model.tokens, model.channels, model.num_classes) == (16, 4, 10)
    z, condition, noise = torch.randn(2, 16, 4), torch.tensor([3, -1]), Noise(0, [0, 1])
    loss = model(z, condition, noise)
    assert loss.shape == ()
    loss.backward()
    # One process must not wait for another's gradient: every parameter takes part in every loss.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    sampling = default_sampling(f"{family}-b")
    quick = dataclasses.replace(sampling, **model.used({"steps": 3, "clip": 3.0}))
    out = model.eval().sample(condition, quick, noise)
    assert out.shape == z.shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


CHANGED = Sampling(
    guidance_scale=2.0,
    guidance_schedule="linear",
    guidance_interval=(0.5, 0.9),
    guided_channels=2,
    temperature=0.5,
    clip=2.0,
    steps=4,
    iterations=4,
    method="euler",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(Sampling)])
def test_each_sampling_option_has_an_effect_or_is_refused(family, option, golden_weights):
    model = golden_weights(
        build_generator(
            f"{family}-b", grid=(4, 4), channels=4, num_classes=10, width=32, depth=1, heads=2
        )
    )

    def draw(sampling):
        return model.sample(torch.tensor([3, 5]), sampling, Noise(0, [0, 1]))

    usual = dataclasses.replace(
        Sampling(), **model.used({"guidance_scale": 3.0, "steps": 3, "clip": 4.0})
    )
    changed = dataclasses.replace(usual, **{option: getattr(CHANGED, option)})
    if option not in model.sampling_options:
        with pytest.raises(ConfigError, match=rf"{option} .*{model.title} does not use"):
            draw(changed)
    elif option != "method":  # Euler's method is the usual one
        assert not torch.equal(draw(changed), draw(usual))


def test_options_without_effect_are_refused():
    model = build_generator(
        "sit-b", grid=(4, 4), channels=4, num_classes=10, width=32, depth=1, heads=2
    )
    with pytest.raises(ConfigError, match="steps 3: dopri5"):
        model.check_sampling(Sampling(method="dopri5", steps=3))
    with pytest.raises(ConfigError, match="guided_channels 5: the latents have 4"):
        model.check_sampling(Sampling(guided_channels=5))


@pytest.mark.parametrize("family", FAMILIES)
def test_options_are_resolved_to_all_that_samples_depend_on(family):
    model = build(f"{family}-b")
    options = model.resolved(Sampling())
    usual = {
        "steps": 100 if "ar" in family else 250,
        "iterations": 256 if family == "mar" else None,
        "method": "euler" if family in ("sit", "lightningdit") else None,
    }
    assert options == Sampling(**usual)
    assert model.resolved(options) == options
    if "steps" in model.sampling_options:
        assert model.resolved(Sampling(steps=7)).steps == 7
    if family == "mar":
        with pytest.raises(ConfigError, match="takes 1 to that many, got 257"):
            model.resolved(Sampling(iterations=257))
    if "method" in model.sampling_options:
        assert model.resolved(Sampling(method="dopri5")) == Sampling(method="dopri5")
    else:
        with pytest.raises(ConfigError, match="1 to 1000 steps, got 1001"):
            model.resolved(Sampling(steps=1001))


def test_published_sampling_options():
    assert default_sampling("mar-b") == Sampling(guidance_scale=3.9, guidance_schedule="linear")
    assert default_sampling("mar-l").guidance_scale == 3.4
    for name, temperature in (("mar-b", 0.95), ("mar-l", 0.97), ("mar-h", 1.0)):
        assert default_sampling(name, 2.0).temperature == 1.0
        assert default_sampling(name, 1.0) == Sampling(
            temperature=temperature, guidance_schedule="linear"
        )


@pytest.mark.parametrize("name", generator_names())
def test_every_name_builds(name):
    assert sum(p.numel() for p in build(name).parameters()) > 2e7


def test_errors():
    with pytest.raises(ConfigError, match="did you mean mar-b"):
        build("marb")
    with pytest.raises(ConfigError, match="has no option 'layers'"):
        build("mar-b", layers=3)
    with pytest.raises(ConfigError, match="no option 'order'"):
        build("random-ar-b", order="raster")
    with pytest.raises(ConfigError, match="no multiple of heads"):
        build("mar-b", width=100)
    for option, value in (("heads", 0), ("depth", "two"), ("label_drop", 2.0), ("qk_norm", 1)):
        with pytest.raises(ConfigError, match=f"{option} must be .*, got {value!r}"):
            build("lightningdit-b", **{option: value})
    with pytest.raises(ConfigError, match="does not divide"):
        build_generator("mar-b", grid=(5, 4), channels=4, num_classes=2, patch_size=2)
