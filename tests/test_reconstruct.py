"""Scores and pictures of a tokenizer's reconstructions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from detok_pipe.evaluation.frechet import FrechetReference, feature_stats
from detok_pipe.latents.errors import InputError, NonFiniteError
from detok_pipe.pipelines.images import ImageSource, open_images
from detok_pipe.pipelines.reconstruct import (
    evaluate_tokenizer,
    evenly_spaced,
    load_squares,
    mean_image_psnr,
    reconstruction_picture,
)

SIZE = 16


class Quantiser:
    """A tokenizer whose latents are the pixels, and whose decoder is off by ``error`` levels."""

    channels = 3

    def __init__(self, error: float = 0) -> None:
        self.error = error

    def encode_moments(self, images: Tensor) -> Tensor:
        z = images.flatten(2).transpose(1, 2)
        return torch.cat([z, torch.full_like(z, 9.0)], dim=-1)

    def decode(self, z: Tensor) -> Tensor:
        images = z.transpose(1, 2).unflatten(2, (SIZE, SIZE))
        return images + self.error / 127.5


class MeanColour:
    """A feature network: two features, three logits."""

    name = "FD-mean"
    dimensions = 2

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        means = images.float().mean((2, 3))
        return {"features": means[:, :2], "logits": means / 50}


class MeanGap(nn.Module):
    """In place of LPIPS."""

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return (reconstruction - images).mean()


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    generator = np.random.default_rng(0)
    for number in range(11):
        folder = tmp_path / "images" / f"class{number // 6}"
        folder.mkdir(parents=True, exist_ok=True)
        # Levels 10 ... 240: an error of a few levels is not clamped.
        pixels = generator.integers(10, 240, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return open_images(tmp_path / "images")


def test_scores_of_a_known_error(source: ImageSource) -> None:
    scores = evaluate_tokenizer(
        Quantiser(error=5),
        source,
        image_size=SIZE,
        extractor=MeanColour(),
        lpips=MeanGap(),
        batch_size=4,
        quiet=True,
    )
    assert scores["images"] == 11
    assert scores["unreadable"] == []
    assert scores["psnr"] == pytest.approx(20 * np.log10(255 / 5))
    assert 0.9 < scores["ssim"] < 1
    assert scores["lpips"] == pytest.approx(5 / 255)
    # All features move by 5, and nothing else changes.
    assert scores["rFD-mean"] == pytest.approx(2 * 25, rel=1e-4)
    assert scores["feature dimensions"] == 2
    assert scores["is"] >= 1
    pixels, _ = load_squares(source, range(11), SIZE)
    assert scores["psnr of the mean image"] == pytest.approx(mean_image_psnr(pixels))


def test_the_distance_is_that_of_the_images_features(source: ImageSource) -> None:
    scores = evaluate_tokenizer(
        Quantiser(), source, image_size=SIZE, extractor=MeanColour(), quiet=True
    )
    pixels, _ = load_squares(source, range(11), SIZE)
    features = MeanColour()(torch.from_numpy(pixels).permute(0, 3, 1, 2))["features"].numpy()
    expected = FrechetReference(feature_stats(features)).distance(feature_stats(features))
    assert scores["rFD-mean"] == pytest.approx(expected, abs=1e-6)
    assert scores["psnr"] == 100
    assert scores["ssim"] == pytest.approx(1)
    assert "lpips" not in scores


def test_shares_of_processes_add_up(source: ImageSource, monkeypatch) -> None:
    class Process:
        num_processes = 2

        def __init__(self, rank: int) -> None:
            self.process_index = rank

    shares = []

    def collect(share: list) -> list:
        shares.extend(share)
        return list(shares)

    monkeypatch.setattr("detok_pipe.pipelines.reconstruct.gather_object", collect)
    arguments = {"image_size": SIZE, "extractor": MeanColour(), "quiet": True}
    evaluate_tokenizer(Quantiser(3), source, accelerator=Process(1), **arguments)
    both = evaluate_tokenizer(Quantiser(3), source, accelerator=Process(0), **arguments)
    alone = evaluate_tokenizer(Quantiser(3), source, **arguments)
    for name in ("images", "psnr", "ssim", "rFD-mean", "is", "is std"):
        assert both[name] == pytest.approx(alone[name])


def test_unreadable_images_are_named_and_left_out(source: ImageSource, tmp_path: Path) -> None:
    (tmp_path / "images" / "class0" / "03.png").write_bytes(b"no image")
    scores = evaluate_tokenizer(Quantiser(), source, image_size=SIZE, quiet=True)
    assert scores["images"] == 10
    assert len(scores["unreadable"]) == 1
    assert "03.png" in scores["unreadable"][0]
    with pytest.raises(InputError, match=r"03\.png"):
        load_squares(source, [3], SIZE)


def test_a_broken_decoder_is_no_black_image(source: ImageSource) -> None:
    with pytest.raises(NonFiniteError, match="NaN"):
        evaluate_tokenizer(Quantiser(np.nan), source, image_size=SIZE, quiet=True)


def test_a_limit_takes_evenly_spaced_images(source: ImageSource) -> None:
    assert evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert evenly_spaced(3, 5).tolist() == [0, 1, 2]
    scores = evaluate_tokenizer(Quantiser(), source, image_size=SIZE, limit=4, quiet=True)
    assert scores["images"] == 4


def test_mean_image_psnr() -> None:
    pixels = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (100, 120)])
    assert mean_image_psnr(pixels) == pytest.approx(20 * np.log10(255 / 10))


def test_picture_has_originals_above_rebuilt(source: ImageSource) -> None:
    pixels, _ = load_squares(source, range(5), SIZE)
    picture = np.asarray(reconstruction_picture(Quantiser(error=10), pixels, columns=5))
    zoom = 6  # 16 pixels are enlarged to 96
    column = picture[:, 16].astype(int)
    top = np.flatnonzero((column == pixels[0, 0, 0]).all(1))[0]
    assert (column[top : top + zoom] == pixels[0, 0, 0]).all()
    below = top + SIZE * zoom
    assert any((column[below + gap] == pixels[0, 0, 0].astype(int) + 10).all() for gap in range(8))
