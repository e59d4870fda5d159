"""train-tok and eval-tok as a user types them."""

import json
from pathlib import Path

import pytest
from image_making import random_images
from PIL import Image

from detok_pipe.pipelines.cli import main

TINY = (
    *("image_size=32", "patch_size=8", "channels=4", "encoder=16,1,2", "decoder=16,1,2"),
    *("perceptual=none", "duration=3 steps", "global_batch=4", "precision=fp32"),
)
QUIET = ("--quiet", "--device", "cpu")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def settings(values: tuple[str, ...]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return random_images(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def tokenizer(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tok"
    network = ("--features", "efficientnet-lite2", "--resolution", 64)
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                *map(str, ("train-tok", "detok-sb", "--data", images, "--val-data", images)),
                *map(str, ("--val-limit", 10, "--eval-every", 2, *network, "--out", out)),
                *(*settings(TINY), *QUIET),
            ]
        )
    assert stopped.value.code == 0
    return out


def test_training_is_scored_and_pictured(tokenizer: Path) -> None:
    lines = [json.loads(line) for line in (tokenizer / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "val/psnr" in line]
    assert [line["step"] for line in scored] == [2, 3]
    assert {"val/ssim", "val/rFD-EffLite2@64", "val/is", "val/images"} <= scored[0].keys()
    assert len(list((tokenizer / "samples").glob("*-corrupted.png"))) == 2
    # The trackers have the numbers and the pictures.
    events = b"".join(file.read_bytes() for file in tokenizer.rglob("events.out.*"))
    for word in (b"val/psnr", b"reconstructions", b"corrupted", b"PNG"):
        assert word in events


def test_evaluation_with_the_study_of_corruption(tokenizer, images, tmp_path, capsys) -> None:
    code, out, _ = run(
        capsys,
        *("eval-tok", tokenizer, "--data", images, "--features", "none"),
        *("--picture", tmp_path / "rebuilt.png", "--corruption", tmp_path / "corrupted.png"),
        *("--noise-levels", "0,1.5", "--hidden", "0,0.5", *QUIET),
    )
    assert code == 0
    scores = json.loads(out)
    cells = scores["corruption"]["cells"]
    assert [(cell["noise"], cell["hidden"]) for cell in cells] == [
        (0.0, 0.0),
        (0.0, 0.5),
        (1.5, 0.0),
        (1.5, 0.5),
    ]
    assert cells[0]["psnr"] == pytest.approx(scores["psnr"], abs=0.01)
    assert cells[2]["sigma"] == pytest.approx(1.5 * scores["corruption"]["latent std"])
    for name in ("rebuilt", "corrupted"):
        assert Image.open(tmp_path / f"{name}.png").width > 200


def test_images_at_a_url(tokenizer, images, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    rebuild = ("eval-tok", tokenizer, "--features", "none", *QUIET, "--data")
    _, here, _ = run(capsys, *rebuild, images)
    code, far, _ = run(capsys, *rebuild, f"file://{images}")
    assert code == 0
    assert json.loads(far) == json.loads(here)


def test_bad_input_is_one_clear_error(tokenizer, images, tmp_path, capsys) -> None:
    train = ("train-tok", "--data", images, "--out", tmp_path / "out", *QUIET)
    tune = (*train, "detok-decoder", "--finetune-decoder")
    check = ("eval-tok", tokenizer, "--data", images, "--features", "none", *QUIET)
    missing = tmp_path / "nowhere"
    for arguments, words in (
        ((*train, "detok-decoder"), ["--finetune-decoder"]),
        ((*train, "detok-sb", "--finetune-decoder", tokenizer), ["trains the encoder too"]),
        ((*tune, missing), [str(missing), "no run directory"]),
        ((*tune, tokenizer, "--set", "encoder=large"), ["encoder=large", "leave it out"]),
        ((*train, "detok-sb", "--set", "adversarial_start=soon"), ["soon", "100 epochs"]),
        ((*train, "detok-sb", *settings(TINY), "--val-data", missing), [str(missing)]),
        ((*train, "detok-sb", "--val-limit", 5), ["--val-limit 5", "--val-data"]),
        ((*train, "detok-sb", "--seed", 5, "--set", "seed=7"), ["--seed 5", "--set seed=7"]),
        (
            (*train, "detok-sb", "--perceptual", "none", "--set", "perceptual=lpips"),
            ["--perceptual none", "--set perceptual=lpips"],
        ),
        ((*check, "--resolution", 32), ["--resolution", "64<=x<=1024"]),
        ((*check, "--picture", tokenizer / "config.json" / "x.png"), ["config.json"]),
        ((*check, "--corruption", images), [str(images), "is a folder"]),
        ((*check, "--corruption", "c.png", "--hidden", "1"), ["--hidden", "below 1"]),
        ((*check, "--corruption", "c.png", "--noise-levels", "x"), ["--noise-levels", "commas"]),
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 2, (arguments, err)
        assert all(word in err for word in words), (arguments, err)
        assert not (tmp_path / "out").exists()
