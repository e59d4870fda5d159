"""The cache's commands, as a user types them: exit codes, messages, resumption."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from cache_making import plan_of, tree, write_cache
from PIL import Image

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.place import Place
from detok_pipe.pipelines import commands_cache
from detok_pipe.pipelines.cli import main
from detok_pipe.pipelines.config import TokenizerConfig, to_json
from detok_pipe.pipelines.decode import MAX_PIXELS
from detok_pipe.pipelines.run_directory import open_run
from detok_pipe.pipelines.trained import build_tokenizer

COUNT = 22


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    config = TokenizerConfig(
        image_size=16, patch_size=8, channels=4, encoder="32,1,2", decoder="32,1,2"
    )
    torch.manual_seed(0)
    weights = build_tokenizer(config).state_dict()
    path = tmp_path_factory.mktemp("runs") / "tok"
    with open_run(path, kind="tokenizer", config=to_json(config), inputs={}, keep=1) as run:
        run.save_checkpoint(1, {"model": weights, "ema": weights}, {})
    return path


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        file = tmp_path / "images" / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(file)
    return tmp_path / "images"


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def encode(tokenizer, images, out, *more) -> int:
    form = ("--shards", 3, "--rows-per-record", 4, "--batch-size", 4, "--quiet")
    return run("encode", "--tokenizer", tokenizer, "--data", images, "--out", out, *form, *more)


def test_encode_info_verify_convert(tokenizer, images, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert encode(tokenizer, images, cache) == 0
    assert "22 images, fingerprint" in capsys.readouterr().out
    assert run("info", cache, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == COUNT
    assert run("info", cache) == 0
    assert "classes" in capsys.readouterr().out
    assert run("verify", cache) == 0
    assert run("convert", cache, "--format", "zarr", "--out", tmp_path / "zarr") == 0
    one, other = open_cache(cache), open_cache(tmp_path / "zarr")
    everything = np.arange(COUNT)
    for view in ("image", "mirror"):
        assert (one.rows(everything, view) == other.rows(everything, view)).all()
    assert encode(tokenizer, images, cache) == 0


def test_images_from_lists_and_tars(tokenizer, images, tmp_path):
    files = sorted(images.rglob("*.png"))
    labels = [int(file.parent.name[-1]) for file in files]
    (tmp_path / "list.txt").write_text(
        "".join(
            f"{file.relative_to(images)} {label}\n"
            for file, label in zip(files, labels, strict=True)
        )
    )
    (tmp_path / "tars").mkdir()
    with wds.TarWriter(str(tmp_path / "tars" / "0.tar")) as sink:
        for number, (file, label) in enumerate(zip(files, labels, strict=True)):
            sink.write({"__key__": f"{number:04}", "png": file.read_bytes(), "cls": label})
    assert encode(tokenizer, images, tmp_path / "a") == 0
    assert encode(tokenizer, tmp_path / "list.txt", tmp_path / "b", "--data-root", images) == 0
    assert encode(tokenizer, tmp_path / "tars", tmp_path / "c") == 0
    caches = [open_cache(tmp_path / name) for name in "abc"]
    assert caches[0].fingerprint == caches[1].fingerprint != caches[2].fingerprint
    rows = [cache.rows(np.argsort(cache.source_ids), "mirror", "std") for cache in caches]
    for cache, found in zip(caches[1:], rows[1:], strict=True):
        np.testing.assert_array_equal(found, rows[0])
        assert cache.labels[np.argsort(cache.source_ids)].tolist() == labels


@pytest.mark.soak
def test_two_real_processes_write_what_one_writes(tokenizer, images, tmp_path):
    def started(out, *share):
        form = ("--shards", "5", "--rows-per-record", "4", "--batch-size", "4", "--threads", "1")
        command = [sys.executable, "-m", "detok_pipe.pipelines.cli", "encode", "--device", "cpu"]
        which = ("--tokenizer", tokenizer, "--data", images, "--out", out)
        return subprocess.Popen([*command, *map(str, which), *form, *share, "--quiet"])

    both = [started(tmp_path / "two", "--rank", str(rank), "--world", "2") for rank in (0, 1)]
    assert [process.wait() for process in (*both, started(tmp_path / "one"))] == [0, 0, 0]
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert open_cache(tmp_path / "one").num_rows == COUNT


def test_processes_by_environment_then_finalize(tokenizer, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert encode(tokenizer, images, tmp_path / "cache") == 0
    assert "22 images" in capsys.readouterr().out
    assert run("finalize", tmp_path / "cache", "-q") == 0


def test_unfinished_caches_say_how_to_go_on(tokenizer, images, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert encode(tokenizer, images, cache, "--rank", 0, "--world", 2) == 0
    for command in (("finalize", cache), ("verify", cache)):
        assert run(*command) == 2
        assert "run the same encode command again" in capsys.readouterr().err
    assert run("info", cache, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["finished"], facts["missing"]) == (False, 1)


def test_quarantine_has_its_own_exit_code(tokenizer, images, tmp_path, capsys):
    (images / "class0" / "bad.png").write_bytes(b"bad")
    assert encode(tokenizer, images, tmp_path / "cache") == 3
    assert "1 images were unreadable" in capsys.readouterr().err
    assert encode(tokenizer, images, tmp_path / "cache") == 3
    assert encode(tokenizer, images, tmp_path / "strict", "--strict") == 2
    assert "bad.png" in capsys.readouterr().err


def test_damage_is_found_and_mended(tokenizer, images, tmp_path, capsys):
    cache = tmp_path / "cache"
    encode(tokenizer, images, cache)
    tar = next(cache.glob("image/*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    out = ("--out", tmp_path / "gen", "--device", "cpu")
    assert run("train-gen", "sit-s", "--latents", cache, "--verify", *out) == 2
    assert f"is damaged: image/{tar.name} has a wrong checksum" in capsys.readouterr().err
    assert not (tmp_path / "gen").exists()
    assert run("verify", cache) == 2
    assert tar.name in capsys.readouterr().out
    assert run("verify", cache, "--repair") == 2
    assert "--repair needs --tokenizer and --data" in capsys.readouterr().err
    mend = ("verify", cache, "--repair", "--tokenizer", tokenizer, "--quiet", "--data")
    (images / "class0" / "more.png").write_bytes(b"")
    assert run(*mend, images) == 2
    assert "another sources" in capsys.readouterr().err
    (images / "class0" / "more.png").unlink()
    assert run(*mend, images) == 0
    assert tar.read_bytes() == whole
    assert run("verify", cache) == 0


def test_check_cache(tokenizer, images, tmp_path, capsys):
    cache, picture = tmp_path / "cache", tmp_path / "check.png"
    encode(tokenizer, images, cache)
    check = ("check-cache", cache, "--tokenizer", tokenizer, "--out", picture, "-n", 4)
    capsys.readouterr()
    assert run(*check, "--data", images) == 0
    assert "over 4 images" in capsys.readouterr().out
    assert Image.open(picture).width > 4 * 16
    for path in images.rglob("*.png"):  # the same names and sizes, other pixels
        size = path.stat().st_size
        for seed in range(200):
            rng = np.random.default_rng([seed, size])
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
            if path.stat().st_size <= size:
                break
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert run(*check, "--data", images) == 2
    assert "does not hold the latents of its images" in capsys.readouterr().err


def test_encode_with_statistics_of_another_cache(tokenizer, images, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    encode(tokenizer, images, first, "--no-mirror")
    assert encode(tokenizer, images, second, "--stats", first / "manifest.json") == 0
    assert open_cache(second).stats.same_transform(open_cache(first).stats)
    assert open_cache(second).stats.source == "given"
    assert encode(tokenizer, images, tmp_path / "c", "--stats", "published") == 2
    assert "no normalisation is published" in capsys.readouterr().err
    assert encode(tokenizer, images, tmp_path / "c", "--stats", "gone.pkl") == 2
    assert "there are no statistics at gone.pkl" in capsys.readouterr().err


def test_import_cache(tokenizer, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(9):
        path = tmp_path / "mar" / f"class{number % 3}" / f"{number}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = rng.standard_normal((2, 8, 3, 3)).astype(np.float32)
        np.savez(path, moments=moments[0], moments_flip=moments[1])
    out = tmp_path / "cache"
    assert run("import-cache", tmp_path / "mar", "--out", out, "--format", "zarr") == 0
    captured = capsys.readouterr()
    assert "9 images, fingerprint" in captured.out
    assert "9 items of mar" in captured.err
    assert open_cache(out).manifest.format == "zarr"
    assert run("verify", out) == 0
    out = tmp_path / "x"
    assert run("import-cache", tmp_path / "mar", "--tokenizer", tokenizer, "--out", out) == 2
    message = re.escape("lie on a grid of (3, 3), those of --tokenizer") + r".* on one of \(2, 2\)"
    assert re.search(message, capsys.readouterr().err)
    path.write_bytes(b"cut")
    assert run("import-cache", tmp_path / "mar", "--out", tmp_path / "other", "-q") == 3
    assert run("import-cache", tmp_path, "--out", tmp_path / "other", "-q") == 2
    assert run("import-cache", tmp_path / "nowhere", "--out", tmp_path / "x") == 2


def test_caches_and_images_at_urls(tokenizer, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    url, far = f"file://{tmp_path}/far/cache", tmp_path / "far" / "cache"
    assert encode(tokenizer, f"file://{images}", url) == 0
    assert f"{url}: 22 images" in capsys.readouterr().out
    assert encode(tokenizer, images, tmp_path / "near") == 0
    assert (far / "manifest.json").read_bytes() == (tmp_path / "near/manifest.json").read_bytes()
    assert encode(tokenizer, images, url) == 0
    shutil.rmtree(tmp_path / "staging")
    assert run("verify", url) == 0
    assert run("convert", url, "--format", "zarr", "--out", f"{url}-zarr", "-q") == 0
    assert open_cache(tmp_path / "far" / "cache-zarr").manifest.format == "zarr"
    assert run("info", f"{url}-none") == 2
    assert "no finished latent cache at" in capsys.readouterr().err


def test_info_of_a_url_fetches_no_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    write_cache(tmp_path / "cache", plan_of(), bad=(3,))
    assert run("info", tmp_path / "cache", "--json") == 0
    facts = capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache" / "image")
    assert run("info", f"file://{tmp_path}/cache", "--json") == 0
    assert capsys.readouterr().out == facts
    assert not (tmp_path / "staging").exists()


def flip(file):
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("staged", [True, False])
def test_damage_at_a_url_is_found_and_mended(tokenizer, images, tmp_path, capsys, staged):
    url, far = f"file://{tmp_path}/far", tmp_path / "far"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
        encode(tokenizer, images, far)
        before = tree(far)
        if staged:
            assert run("verify", url) == 0
            assert "of those at file://" in capsys.readouterr().out
        first, second = sorted(far.glob("mirror/*.tar"))[:2]
        second.unlink()
        (far / "index.npy").write_bytes(b"short")
        if not staged:  # the size is the same: only a new copy tells
            flip(first)
        (far / "image" / "other.tar").write_bytes(b"")
        assert run("verify", url) == 2
        printed = capsys.readouterr().out
        assert f"mirror/{second.name} is missing at {url}" in printed
        assert f"index.npy has 5 bytes at {url} instead of" in printed
        assert f"image/other.tar at {url} is not part of the cache" in printed
        assert (f"mirror/{first.name} had a wrong checksum at {url}" in printed) == (not staged)
        assert "is missing\n" not in printed
        (far / "image" / "other.tar").unlink()
        mend = ("verify", url, "--repair", "--tokenizer", tokenizer, "--data", images, "-q")
        assert run(*mend) == 0
        assert tree(far) == before
        assert run("verify", url) == 0
        second.unlink()
        assert encode(tokenizer, images, url) == 0
        assert tree(far) == before


def test_what_is_no_cache_is_named_by_info_as_by_verify(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        messages = []
        for command in ("info", "verify"):
            assert run(command, tmp_path / name) == 2
            messages.append(capsys.readouterr().err)
        assert messages[0] == messages[1]
        assert f"no latent cache{' at' * (name == 'nowhere')}" in messages[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--out", ""), "Invalid value for '--out': the path is empty"),
        (("--data", ""), "Invalid value for '--data': the path is empty"),
        (("--out", os.fsdecode(b"cache\xff")), "is no UTF-8"),
    ],
)
def test_paths_that_cannot_be_used(tokenizer, images, tmp_path, capsys, change, message):
    assert encode(tokenizer, images, tmp_path / "cache", *change) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("check-cache", "cache", "--out", ""), "the path is empty"),
        (("train-gen", "sit-s", "--latents", "cache", "--out", ""), "the path is empty"),
        (
            ("train-gen", "sit-s", "--latents", "cache", "--out", os.fsdecode(b"\xff")),
            "is no UTF-8",
        ),
    ],
)
def test_paths_of_other_commands(capsys, command, message):
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert "Invalid value for '--out'" in error
    assert message in error


def test_a_cache_at_a_url_is_finished_where_encode_was_killed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    url = f"file://{tmp_path}/far/cache"
    assert run("finalize", url, "-q") == 2
    assert "is no latent cache" in capsys.readouterr().err
    write_cache(Place(url).folder, plan_of(), bad=(3,), finalize=False)
    assert run("finalize", url, "-q") == 3
    assert f"{url}: 36 images" in capsys.readouterr().out
    assert open_cache(tmp_path / "far" / "cache").num_rows == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data", "nowhere"), "nowhere does not exist"),
        (("--tokenizer", "nowhere"), "nowhere is no run directory"),
        (("--device", "quantum"), "--device quantum cannot be used here"),
        (("--data-root", "nowhere"), "--data-root nowhere is for the paths of a list file"),
    ],
)
def test_bad_options(tokenizer, images, tmp_path, capsys, change, message):
    assert encode(tokenizer, images, tmp_path / "cache", *change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_encode_says_how_it_understood_the_images(tokenizer, images, tmp_path, capsys):
    arguments = ("encode", "--tokenizer", tokenizer, "--shards", 1)
    assert run(*arguments, "--data", images, "--out", tmp_path / "a") == 0
    assert "22 images, 2 classes, 1 shards of 256" in capsys.readouterr().err
    assert run(*arguments, "--data", images / "class0", "--out", tmp_path / "b") == 0
    assert "11 images, unlabelled, 1 shards of 256" in capsys.readouterr().err


def test_a_bad_number_of_a_launcher_names_its_variable(
    tokenizer, images, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert encode(tokenizer, images, tmp_path / "cache") == 2
    assert "'--world' (env var: 'WORLD_SIZE'): 'abc' is not" in capsys.readouterr().err


def test_another_setting_is_refused(tokenizer, images, tmp_path, capsys):
    encode(tokenizer, images, tmp_path / "cache", "--world", 2)
    assert encode(tokenizer, images, tmp_path / "cache", "--seed", 1) == 2
    assert "begun with another seed: 0 there, 1 now" in capsys.readouterr().err


def test_plan(capsys):
    from detok_pipe.pipelines import estimate, tokenizer_presets

    tokenizer_presets.TOKENIZER_PRESETS["small-for-test"] = lambda: TokenizerConfig(
        image_size=16, patch_size=8, channels=4, encoder="32,1,2", decoder="32,1,2"
    )
    seconds, estimate._TRIAL_SECONDS = estimate._TRIAL_SECONDS, 0.0
    try:
        shape = ("--images", 1000, "--shards", 2, "--preset", "small-for-test")
        assert run("plan", *shape, "--device", "cpu", "--batch-size", 2) == 0
    finally:
        estimate._TRIAL_SECONDS = seconds
        del tokenizer_presets.TOKENIZER_PRESETS["small-for-test"]
    printed = capsys.readouterr().out
    assert "(128,000 bytes)" in printed  # 1000 rows of 4 x 4 fp16, 2 views, mean and std
    values = dict(re.split(r"  +", line, maxsplit=1) for line in printed.splitlines())
    assert (values["images"], values["shards"]) == ("1,000", "2")
    assert int(values["files"]) >= 4  # a tar a shard and view
    assert float(values["time, estimated"].split(" hours")[0]) >= 0


def test_the_limit_of_pixels_is_that_of_decoding():
    (option,) = [o for o in commands_cache.encode.params if o.name == "max_pixels"]
    assert option.default == MAX_PIXELS


def test_modules_of_the_command_line_are_light():
    code = (
        "import sys, detok_pipe.pipelines.commands_cache, detok_pipe.pipelines.commands_check; "
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment)
    assert done.returncode == 0
