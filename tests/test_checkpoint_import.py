"""Released checkpoints: names, shapes, damage, hostile files, and the way back."""

import argparse
import os
import pickle

import pytest
import torch

from detok_pipe.generators.checkpoint_import import (
    import_generator,
    read_released,
    released_form,
)
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.state_dicts import fitted
from detok_pipe.latents.errors import CheckpointError, ConfigError

TINY = {"width": 32, "depth": 2, "heads": 2}
LATENTS = {"grid": (4, 4), "channels": 4, "num_classes": 10}
HEADS = {"head_width": 24, "head_depth": 3}
CASES = {
    "mar-l": {**HEADS, "buffer": 5},
    "random-ar-b": HEADS,
    "raster-ar-b": HEADS,
    "dit-b": {},
    "sit-xl": {},
    "lightningdit-b": {"qk_norm": True},
}


class Runs:
    """Unpickled, it makes a folder: what a hostile file would do."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def written(tmp_path, content, **options):
    path = tmp_path / "released.pth"
    torch.save(content, path, **options)
    return path


def states(name, **options):
    """(a module, its weights, other weights for its average, as parameters only)."""
    module = build_generator(name, **LATENTS, **TINY, **options)
    model = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    rope = {key: value for key, value in module.state_dict().items() if key.startswith("rope.")}
    model.update(rope)
    ema = {key: torch.randn_like(value) for key, value in model.items() if key not in rope}
    return module, model, ema


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("name", "options"), CASES.items())
def test_round_trip_is_exact(tmp_path, name, options):
    _, model, ema = states(name, **options)
    args = argparse.Namespace(lr=1e-4)
    path = written(tmp_path, {"model": model, "model_ema": ema, "args": args, "epoch": 9})
    released = read_released(path)
    assert released.args == {"lr": 1e-4}
    taken = import_generator(name, released, **TINY)
    assert (taken.grid, taken.channels, taken.num_classes) == ((4, 4), 4, 10)
    assert options.items() <= taken.options.items()
    assert same(taken.model, model)
    assert {key: value for key, value in taken.ema.items() if key in ema}.keys() == ema.keys()
    assert all(torch.equal(taken.ema[key], ema[key]) for key in ema)
    rebuilt = build_generator(
        name,
        grid=taken.grid,
        channels=taken.channels,
        num_classes=taken.num_classes,
        **taken.options,
    )
    rebuilt.load_state_dict(taken.ema)

    back = released_form(rebuilt, taken.model, taken.ema, {"lr": 1e-4})
    assert same(back["model"], model)
    assert same(back["model_ema"], ema)
    again = read_released(written(tmp_path, back))
    assert same(import_generator(name, again, **TINY).ema, taken.ema)
    assert again.args == released.args


def test_importing_leaves_the_random_state_alone(tmp_path):
    _, model, _ = states("sit-b")
    released = read_released(written(tmp_path, model))
    before = torch.get_rng_state()
    import_generator("sit-b", released, **TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_bare_state_dict_serves_as_both(tmp_path):
    _, model, _ = states("dit-b")
    taken = import_generator("dit-b", read_released(written(tmp_path, model)), **TINY)
    assert same(taken.model, model)
    assert same(taken.ema, model)


def test_forms_that_shapes_tell(tmp_path):
    """Patch size, a sequence, and a grid that is no square."""
    for grid, patch_size in (((4, 6), 2), ((12,), 1)):
        module = build_generator(
            "sit-b", grid=grid, channels=3, num_classes=7, patch_size=patch_size, **TINY
        )
        released = read_released(written(tmp_path, module.state_dict()))
        with pytest.raises(CheckpointError, match="give the latent grid"):
            import_generator("sit-b", released, **TINY)
        with pytest.raises(CheckpointError, match="the grid 1000000x1000000 makes"):
            import_generator("sit-b", released, grid=(10**6, 10**6), **TINY)
        taken = import_generator("sit-b", released, grid=grid, **TINY)
        assert (taken.channels, taken.options["patch_size"]) == (3, patch_size)


def test_wrong_size_names_both(tmp_path):
    _, model, _ = states("sit-b")
    released = read_released(written(tmp_path, model))
    with pytest.raises(CheckpointError, match="width 32, sit-l has 1024"):
        import_generator("sit-l", released)


def test_wrong_family_lists_keys(tmp_path):
    _, model, _ = states("sit-b")
    released = read_released(written(tmp_path, model))
    with pytest.raises(
        CheckpointError, match=r"missing keys: fake_latent.*unexpected keys: pos_embed"
    ):
        import_generator("mar-b", released, **TINY)
    with pytest.raises(
        CheckpointError, match=r"final_layer\.linear\.weight \[4, 32\] instead of \[8"
    ):
        import_generator("dit-b", released, **TINY)


def test_missing_unknown_and_reshaped_keys_are_listed():
    module = torch.nn.Linear(3, 2)
    state = {"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        fitted(module, state, "x.pth")
    for part in ("missing keys: bias", "unexpected keys: scale", "weight [2, 4] instead of [2, 3]"):
        assert part in str(error.value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, legacy, share):
    path = written(tmp_path, states("sit-b")[1], _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=r"released\.pth"):
        import_generator("sit-b", read_released(path), **TINY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds a dict"),
        ({"model": 3}, "model is no state dict but a int"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, "no tensors: b"),
        ({"epoch": 3}, "no tensors: epoch"),
    ],
)
def test_other_contents(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_released(written(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_released(tmp_path / "none.pth")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "within", "in args"])
def test_hostile_checkpoint_runs_nothing(tmp_path, place, legacy):
    trap = Runs(tmp_path / "ran")
    weights = {"a": torch.zeros(1)}
    content = {
        "beside": {"model": weights, "extra": trap},
        "within": {"model": {**weights, "b": trap}},
        "in args": {"model": weights, "args": argparse.Namespace(hook=trap)},
    }[place]
    path = written(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"mkdir.*was not loaded"):
        read_released(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_pickle_is_refused(tmp_path):
    path = tmp_path / "released.pth"
    path.write_bytes(pickle.dumps({"model": Runs(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match=r"released\.pth"):
        read_released(path)
    assert not (tmp_path / "ran").exists()


def test_options_are_checked_before_the_shapes(tmp_path):
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="patch_size must be a whole number, at least 1, got 0"):
        import_generator("mar-b", read_released(tmp_path / "a.pth"), patch_size=0)
