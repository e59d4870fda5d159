"""Released checkpoints become runs that sample, and come back as they were."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from baseline_making import write_small
from safetensors.torch import save_file

from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.errors import CheckpointError, ConfigError, MismatchError
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.published_tokenizers import TokenizerChoice
from detok_pipe.pipelines.released import export_checkpoint, import_checkpoint
from detok_pipe.pipelines.runs import find_runs
from detok_pipe.pipelines.trained import load_generator, load_tokenizer
from detok_pipe.tokenizer.model import LDeTok

TOKENIZER = ("image_size=32", "patch_size=8", "channels=4", "encoder=16,1,2", "decoder=16,1,2")
GENERATOR = ("model.width=32", "model.depth=1", "model.heads=2")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Released files of a tiny tokenizer and a tiny MAR, and the latents' statistics."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tokenizer = LDeTok(image_size=32, patch_size=8, channels=4, encoder="16,1,2", decoder="16,1,2")
    weights = tokenizer.state_dict()
    torch.save(
        {"model": weights, "model_ema": {k: v + 1 for k, v in weights.items()}},
        folder / "tok.pth",
    )
    generator = build_generator(
        "mar-b",
        grid=(4, 4),
        channels=4,
        num_classes=10,
        width=32,
        depth=1,
        heads=2,
        head_width=16,
        head_depth=2,
        buffer=3,
    )
    torch.save({"model": generator.state_dict()}, folder / "mar.pth")
    stats = {"imagenet": {"channel": (torch.arange(8.0), torch.arange(8.0) + 1)}}
    (folder / "stats.pkl").write_bytes(pickle.dumps(stats))
    return folder


def test_a_generator_comes_back_and_its_run_loads(released, tmp_path):
    import_checkpoint(released / "tok.pth", "detok-bb", tmp_path / "tok", overrides=TOKENIZER)
    import_checkpoint(
        released / "mar.pth",
        "mar-b",
        tmp_path / "mar",
        overrides=GENERATOR,
        stats=released / "stats.pkl",
        tokenizer=tmp_path / "tok",
    )
    generator = load_generator(tmp_path / "mar")
    assert (generator.grid, len(generator.class_names)) == ((4, 4), 10)
    assert generator.stats.std.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert (
        generator.identity["tokenizer"] == load_tokenizer(tmp_path / "tok").identity["fingerprint"]
    )
    made_from = {run.name: run.made_from for run in find_runs(tmp_path)}
    assert made_from == {"mar": "import of mar.pth", "tok": "import of tok.pth"}
    export_checkpoint(tmp_path / "mar", tmp_path / "again.pth")
    first = torch.load(released / "mar.pth", weights_only=True)["model"]
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_a_tokenizer_comes_back_with_its_averaged_weights(released, tmp_path):
    import_checkpoint(released / "tok.pth", "detok-bb", tmp_path / "tok", overrides=TOKENIZER)
    export_checkpoint(tmp_path / "tok", tmp_path / "again.pth")
    first = torch.load(released / "tok.pth", weights_only=True)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    used = load_tokenizer(tmp_path / "tok").model.state_dict()
    torch.testing.assert_close(used, first["model_ema"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("file", "name", "words"),
    [
        ("nowhere.pth", "detok-bb", ["nowhere.pth", "no such file"]),
        ("mar.pth", "detok-bb", ["missing keys", "encoder"]),
        ("tok.pth", "detok-bbb", ["detok-bbb", "did you mean detok-bb"]),
    ],
)
def test_a_wrong_file_or_name_says_so_and_leaves_nothing(released, tmp_path, file, name, words):
    with pytest.raises((CheckpointError, ConfigError)) as error:
        import_checkpoint(released / file, name, tmp_path / "out", overrides=TOKENIZER)
    assert all(word in str(error.value) for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("grid", ["16x²", "16x", "0x4", "-4"])
def test_a_grid_that_is_none_is_refused(released, tmp_path, capsys, grid):
    file, out = str(released / "mar.pth"), str(tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        main(["import-checkpoint", file, "--as", "mar-b", "--out", out, "--grid", grid])
    assert stopped.value.code == 2
    assert f"--grid {grid}: write it as 16x16" in capsys.readouterr().err


def test_a_generator_needs_its_tokenizer_and_one_that_fits(released, tmp_path):
    with pytest.raises(ConfigError, match="--stats"):
        import_checkpoint(released / "mar.pth", "mar-b", tmp_path / "mar", overrides=GENERATOR)
    other = ("image_size=16", *TOKENIZER[1:])
    file = tmp_path / "other.pth"
    model = LDeTok(image_size=16, patch_size=8, channels=4, encoder="16,1,2", decoder="16,1,2")
    torch.save(model.state_dict(), file)
    import_checkpoint(file, "detok-bb", tmp_path / "tok", overrides=other)
    with pytest.raises(MismatchError, match=r"\(4, 4\)"):
        import_checkpoint(
            released / "mar.pth",
            "mar-b",
            tmp_path / "mar",
            overrides=GENERATOR,
            stats=released / "stats.pkl",
            tokenizer=tmp_path / "tok",
        )


def test_a_published_tokenizer_brings_its_statistics(released, tmp_path):
    weights = write_small("mar-vae", tmp_path / "weights")
    import_checkpoint(
        released / "mar.pth",
        "mar-b",
        tmp_path / "mar",
        overrides=GENERATOR,
        tokenizer=TokenizerChoice("mar-vae", weights),
    )
    generator = load_generator(tmp_path / "mar")
    np.testing.assert_allclose(generator.stats.std, 1 / 0.2325)
    assert generator.record["tokenizer"]["name"] == "mar-vae"
    import_checkpoint(released / "tok.pth", "detok-bb", tmp_path / "tok", overrides=TOKENIZER)
    with pytest.raises(ConfigError, match=r"no published statistics.*--stats"):
        import_checkpoint(
            released / "mar.pth",
            "mar-b",
            tmp_path / "other",
            overrides=GENERATOR,
            tokenizer=tmp_path / "tok",
        )


def test_an_import_over_another_names_what_differs(released, tmp_path):
    import_checkpoint(released / "tok.pth", "detok-bb", tmp_path / "tok", overrides=TOKENIZER)

    def import_with(std: float, grid: tuple[int, ...] | None = None) -> None:
        stats = {"mean": torch.zeros(4), "std": torch.full((4,), std)}
        save_file(stats, tmp_path / "stats.safetensors")
        import_checkpoint(
            released / "mar.pth",
            "mar-b",
            tmp_path / "mar",
            overrides=GENERATOR,
            stats=tmp_path / "stats.safetensors",
            tokenizer=tmp_path / "tok",
            grid=grid,
        )

    import_with(1.0)
    import_with(1.0, (4, 4))  # the same again
    with pytest.raises(MismatchError, match=r"stats\S* \[?1\.0.* there, \[?5\.0.* now.*--out"):
        import_with(5.0)
    record = json.loads((tmp_path / "mar" / "config.json").read_text())
    assert record["latents"]["stats"]["std"] == [1.0] * 4
    assert record["inputs"]["grid"] == [4, 4]


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--stats", {"stats": Path("nowhere")}),
        ("--grid", {"grid": (3, 3)}),
        ("--tokenizer", {"tokenizer": TokenizerChoice("nowhere")}),
        ("--weights", {"tokenizer": TokenizerChoice(None, Path("nowhere"))}),
    ],
)
def test_a_tokenizer_takes_no_options_of_generators(released, tmp_path, option, given):
    with pytest.raises(ConfigError, match=f"^{option} is for generators, and detok-bb is"):
        import_checkpoint(
            released / "tok.pth", "detok-bb", tmp_path / "tok", overrides=TOKENIZER, **given
        )
    assert not (tmp_path / "tok").exists()
