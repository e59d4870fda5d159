"""Reference statistics: the images' own, whatever the batches and processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from score_making import TinyFeatures

from detok_pipe.evaluation.reference import read_reference
from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.pipelines.decode import center_crop
from detok_pipe.pipelines.fid_stats import fid_stats, fid_stats_of_npz, image_batches
from detok_pipe.pipelines.images import open_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(23):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def _crops(folder: Path) -> np.ndarray:
    source = open_images(folder)
    return np.stack([center_crop(source.load(i), 16) for i in range(len(source))])


def test_statistics_of_the_exact_crops(folder: Path, tmp_path: Path) -> None:
    source = open_images(folder)
    images = torch.from_numpy(_crops(folder)).permute(0, 3, 1, 2)
    features = TinyFeatures()(images)["features"].numpy().astype(np.float64)
    for batch in (4, 64):
        reference = fid_stats(
            source,
            TinyFeatures(),
            tmp_path / f"{batch}.npz",
            size=16,
            keep_features=5,
            batch_size=batch,
            quiet=True,
        )
        assert reference.stats is not None
        assert reference.features is not None
        assert reference.stats.count == 23
        np.testing.assert_allclose(reference.stats.mu, features.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            reference.stats.sigma, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-8
        )
        np.testing.assert_allclose(reference.features, features[[0, 5, 11, 16, 22]], rtol=1e-5)
        assert (reference.extractor, reference.image_size) == ("FD-EffLite2@32", 16)
        assert reference.made_from["source"]["crop"] == "adm-center"


def test_images_of_an_npz(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", _crops(folder))
    images = read_reference(tmp_path / "images.npz")
    ours = fid_stats_of_npz(images, TinyFeatures(), tmp_path / "a.npz", batch_size=5, quiet=True)
    theirs = fid_stats(open_images(folder), TinyFeatures(), tmp_path / "b.npz", size=16, quiet=True)
    assert ours.stats is not None
    assert theirs.stats is not None
    np.testing.assert_allclose(ours.stats.sigma, theirs.stats.sigma, rtol=1e-5, atol=1e-9)
    assert ours.image_size == 16


def test_chosen_rows_and_bad_input(folder: Path, tmp_path: Path) -> None:
    source = open_images(folder)
    (batch,) = image_batches(source, 16, 8, rows=np.array([3, 1]))
    np.testing.assert_array_equal(batch.permute(0, 2, 3, 1).numpy(), _crops(folder)[[3, 1]])
    with pytest.raises(ConfigError, match="must be positive"):
        fid_stats(source, TinyFeatures(), tmp_path / "x.npz", size=0)
    (folder / "b" / "03.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b/03\.png in .*images"):
        fid_stats(source, TinyFeatures(), tmp_path / "x.npz", size=16, quiet=True)
    assert not (tmp_path / "x.npz").exists()
