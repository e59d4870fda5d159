"""Every published tokenizer with every kind of generator: images to scores, by the commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from baseline_making import LATENTS, SIDES, write_small
from PIL import Image

from detok_pipe.latents.cache import open_cache
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.published_tokenizers import PUBLISHED_TOKENIZERS

NETWORK = ("--features", "efficientnet-lite2", "--resolution", "64", "--quiet")
WIDTH = ("--set", "model.width=16", "--set", "model.depth=1", "--set", "model.heads=2")
HEAD = ("--set", "model.head_width=16", "--set", "model.head_depth=1")
SHORT = ("--set", "global_batch=4", "--set", "duration=2 steps", "--set", "precision=fp32")
GENERATORS = {
    "raster-ar-b": (*WIDTH, *HEAD),
    "mar-b": (*WIDTH, *HEAD, "--set", "model.buffer=2"),
    "dit-b": WIDTH,
    "sit-b": WIDTH,
}
PAIRS = [
    # One generator a tokenizer in each run of the tests, all pairs in the long ones.
    pytest.param(name, generator, marks=() if i == j else pytest.mark.soak)
    for i, name in enumerate(PUBLISHED_TOKENIZERS)
    for j, generator in enumerate(GENERATORS)
]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(12):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 64)).save(file)
    for size in (32, 64):
        reference = folder.parent / f"reference-{size}.npz"
        assert run("fid-stats", folder, "--out", reference, "--size", size, *NETWORK) == 0
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, tuple[Path, Path]]:
    """By tokenizer, its small weights and a cache that was encoded with them."""
    root = tmp_path_factory.mktemp("sources")
    made = {}
    for name in PUBLISHED_TOKENIZERS:
        weights, cache = write_small(name, root / name), root / f"cache-{name}"
        encode = ("encode", "--tokenizer", name, "--weights", weights, "--data", images)
        assert run(*encode, "--out", cache, "--device", "cpu", "--quiet") == 0
        made[name] = weights, cache
    return made


@pytest.mark.parametrize("name", PUBLISHED_TOKENIZERS)
def test_caches_have_the_published_normalisation_and_form(sources, images, tmp_path, name, capsys):
    weights, path = sources[name]
    cache = open_cache(path)
    assert (cache.grid, cache.channels) == LATENTS[name]
    assert cache.stats.source == "published"
    assert cache.tokenizer["name"] == name
    assert cache.fields == (("mean",) if name == "maetok" else ("mean", "std"))
    assert cache.is_exact == (name == "maetok")
    measure = ("eval-tok", name, "--weights", weights, "--data", images, "--features", "none")
    picture = tmp_path / "rebuilt.png"
    assert run(*measure, "--picture", picture, "--quiet") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["images"] == 12
    assert scores["psnr"] > 3
    assert picture.stat().st_size > 1000


def test_statistics_of_the_set_are_a_choice(sources, images, tmp_path):
    weights, _ = sources["maetok"]
    encode = ("encode", "--tokenizer", "maetok", "--weights", weights, "--data", images)
    cache = tmp_path / "cache"
    assert run(*encode, "--out", cache, "--device", "cpu", "--stats", "dataset", "--quiet") == 0
    assert open_cache(cache).stats.source == "dataset"


def test_imported_caches_have_the_published_normalisation(sources, tmp_path, capsys):
    rng = np.random.default_rng(0)
    grid, channels = LATENTS["mar-vae"]
    for folder, count in (("mar", channels), ("other", channels + 1)):
        (tmp_path / folder / "a").mkdir(parents=True)
        moments = rng.standard_normal((2, 2 * count, *grid)).astype(np.float32)
        np.savez(tmp_path / folder / "a/0.npz", moments=moments[0], moments_flip=moments[1])
    weights, encoded = sources["mar-vae"]
    command = ("import-cache", tmp_path / "mar", "--quiet")
    known = (*command, "--tokenizer", "mar-vae", "--weights", weights)
    assert run(*known, "--out", tmp_path / "published") == 0
    stats = open_cache(tmp_path / "published").stats
    assert stats.source == "published"
    assert stats.same_transform(open_cache(encoded).stats)
    assert run(*known, "--out", tmp_path / "own", "--stats", "dataset") == 0
    assert open_cache(tmp_path / "own").stats.source == "dataset"
    assert run(*command, "--out", tmp_path / "given", "--stats", tmp_path / "own") == 0
    assert open_cache(tmp_path / "given").stats.same_transform(open_cache(tmp_path / "own").stats)
    capsys.readouterr()
    assert run(*command, "--out", tmp_path / "no", "--stats", "published") == 2
    assert "published with a cache without --tokenizer" in capsys.readouterr().err
    assert run("import-cache", tmp_path / "other", *known[2:], "--out", tmp_path / "no") == 2
    wanted = f"{channels + 1} channels, those of --tokenizer mar-vae {channels};"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(("name", "generator"), PAIRS)
def test_train_sample_and_score(sources, images, tmp_path, capsys, name, generator):
    weights, cache = sources[name]
    trained, samples = tmp_path / "run", tmp_path / "samples"
    patch = ("--set", "model.patch_size=2") if name == "sd-vae" else ()
    train = ("train-gen", generator, "--latents", cache, "--out", trained, "--device", "cpu")
    assert run(*train, *GENERATORS[generator], *SHORT, *patch, "--quiet") == 0
    draw = ("sample", trained, "--num", 4, "--steps", 2, "--out", samples, "--device", "cpu")
    fast = ("--method", "euler") if generator == "sit-b" else ("--clip", 3)
    assert run(*draw, *fast, "--quiet") == 0
    reference = images.parent / f"reference-{SIDES[name]}.npz"
    score = ("score", samples, "--ref", reference, "--device", "cpu", *NETWORK)
    assert run(*score, "--weights", weights) == 0
    record = json.loads((samples / "scores.jsonl").read_text())
    assert np.isfinite(record["metrics"]["FD-EffLite2@64"]["value"])
    export = ("export-images", samples, "--out", tmp_path / "png", "--quiet")
    assert run(*export, "--tokenizer", name, "--weights", weights) == 0
    assert Image.open(tmp_path / "png" / "000003.png").size == (SIDES[name],) * 2


def test_what_does_not_belong_together_is_named(sources, images, tmp_path, capsys):
    _, cache = sources["mar-vae"]
    other, _ = sources["va-vae"]
    encode = ("encode", "--data", images, "--out", cache, "--device", "cpu", "--quiet")
    assert run(*encode, "--tokenizer", "va-vae", "--weights", other) == 2
    assert "channels: 4 there, 6 now" in capsys.readouterr().err
    trained, samples = tmp_path / "run", tmp_path / "samples"
    train = ("train-gen", "sit-b", "--latents", cache, "--out", trained, "--device", "cpu")
    assert run(*train, *WIDTH, *SHORT, "--quiet") == 0
    assert run("sample", trained, "--num", 2, "--steps", 2, "--out", samples, "--quiet") == 0
    score = ("score", samples, "--ref", images.parent / "reference-64.npz", *NETWORK)
    capsys.readouterr()
    for arguments, words in (
        (("--tokenizer", "va-vae", "--weights", other), "its name is 'va-vae'"),
        (("--weights", other / "missing"), "no such file or folder"),
        (("--tokenizer", tmp_path / "run"), "generator"),
    ):
        assert run(*score, *arguments) == 2
        assert words in capsys.readouterr().err
