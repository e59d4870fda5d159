"""Statistics files that pytorch-fid and clean-fid write and read themselves."""

import contextlib
from pathlib import Path
from unittest import mock

import cleanfid.features
import cleanfid.fid
import numpy as np
import pytest
import pytorch_fid.fid_score

from detok_pipe.evaluation.frechet import FrechetReference, feature_stats
from detok_pipe.evaluation.kernel_distance import kernel_distance
from detok_pipe.evaluation.reference import read_reference, write_reference

RNG = np.random.default_rng(0)
REAL = RNG.standard_normal((60, 6)) @ RNG.standard_normal((6, 6))
GENERATED = REAL[:40] * 1.3 + 0.2


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "ours.npz"
    stats = feature_stats(REAL)
    write_reference(
        path, stats, extractor="FID", settings={}, image_size=8, source={}, features=REAL
    )
    return path


@pytest.fixture
def clean_fid_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where clean-fid keeps its statistics: otherwise inside its own installation."""
    monkeypatch.setattr(cleanfid, "__file__", str(tmp_path / "package" / "__init__.py"))
    return tmp_path / "package" / "stats"


def test_pytorch_fid_reads_ours(ours: Path) -> None:
    mu, sigma = pytorch_fid.fid_score.compute_statistics_of_path(str(ours), None, 1, 6, "cpu")
    np.testing.assert_array_equal(mu, feature_stats(REAL).mu)
    np.testing.assert_array_equal(sigma, feature_stats(REAL).sigma)


def test_we_read_what_pytorch_fid_writes(tmp_path: Path) -> None:
    path, folder = tmp_path / "theirs.npz", tmp_path / "images"
    folder.mkdir()
    statistics = (REAL.mean(0), np.cov(REAL, rowvar=False))
    module = pytorch_fid.fid_score
    with (
        mock.patch.object(module, "InceptionV3"),
        mock.patch.object(module, "calculate_activation_statistics", return_value=statistics),
    ):
        module.save_fid_stats([str(folder), str(path)], 1, "cpu", 2048)
    stats = read_reference(path).stats
    assert stats is not None
    np.testing.assert_allclose(stats.mu, REAL.mean(0))
    np.testing.assert_allclose(stats.sigma, feature_stats(REAL).sigma)


def test_clean_fid_reads_ours(ours: Path, clean_fid_folder: Path) -> None:
    clean_fid_folder.mkdir(parents=True)
    for name in ("mine_clean_custom_na.npz", "mine_clean_custom_na_kid.npz"):
        (clean_fid_folder / name).write_bytes(ours.read_bytes())
    mu, sigma = cleanfid.features.get_reference_statistics("mine", 0, split="custom")
    np.testing.assert_array_equal(mu, feature_stats(REAL).mu)
    np.testing.assert_array_equal(sigma, feature_stats(REAL).sigma)
    real = cleanfid.features.get_reference_statistics("mine", 0, split="custom", metric="KID")
    # One subset of all 40 samples on both sides is the estimate from all pairs.
    theirs = cleanfid.fid.kernel_distance(GENERATED, real[:40], num_subsets=1)
    assert kernel_distance(GENERATED, real[:40]).value == pytest.approx(theirs, rel=1e-4)


def test_we_read_what_clean_fid_writes(clean_fid_folder: Path) -> None:
    with (
        mock.patch.object(cleanfid.fid, "build_feature_extractor"),
        mock.patch.object(cleanfid.fid, "get_folder_features", return_value=REAL),
        contextlib.redirect_stdout(None),
    ):
        cleanfid.fid.make_custom_stats("theirs", "images", device="cpu")
    statistics = read_reference(clean_fid_folder / "theirs_clean_custom_na.npz").stats
    features = read_reference(clean_fid_folder / "theirs_clean_custom_na_kid.npz")
    assert statistics is not None
    assert features.features is not None
    assert FrechetReference(statistics).distance(feature_stats(REAL)) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(features.features, REAL, rtol=1e-6)
