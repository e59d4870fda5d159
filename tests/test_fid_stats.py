"""Reference statistics: the images' own, whatever the batches and processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from score_making import Rank, TinyFeatures

from detok_pipe.evaluation.reference import read_reference
from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.pipelines import fid_stats as module
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


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IMAGES_A_PART", 5)


def test_interrupted_statistics_go_on_to_the_same_bits(
    folder: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, settings = open_images(folder), {"size": 16, "keep_features": 9, "quiet": True}
    whole = fid_stats(source, TinyFeatures(), tmp_path / "whole.npz", **settings)
    out = tmp_path / "again.npz"
    broken = TinyFeatures()

    def interrupted(images: torch.Tensor) -> dict:
        if broken.images >= 12:
            raise KeyboardInterrupt
        return TinyFeatures.__call__(broken, images)

    broken_network = type("Broken", (TinyFeatures,), {"__call__": lambda _, x: interrupted(x)})()
    with pytest.raises(KeyboardInterrupt):
        fid_stats(source, broken_network, out, **settings)
    assert not out.exists()
    with pytest.raises(
        MismatchError, match=r"again\.npz\.parts is of something else: its image_si"
    ):
        fid_stats(source, TinyFeatures(), out, **{**settings, "size": 8})
    rest = TinyFeatures()
    fid_stats(source, rest, out, **settings)
    assert rest.images == 23 - 15  # three parts of five were there
    assert sorted(path.name for path in tmp_path.glob("*.npz*")) == ["again.npz", "whole.npz"]
    assert whole.path.read_bytes() == out.read_bytes()


def test_parts_of_other_images_are_never_used(
    folder: Path, tmp_path: Path, small_parts: None
) -> None:
    """As a slower run of a command leaves them, whose faster twin has finished and tidied up."""
    source, out = open_images(folder), tmp_path / "stats.npz"
    rest = fid_stats(source, TinyFeatures(), tmp_path / "5.npz", size=16, quiet=True)
    parts = out.with_name(f"{out.name}.parts")
    with pytest.raises(InputError, match="does not exist"):  # the second of two writes its parts
        fid_stats(source, TinyFeatures(), out, size=8, processes=Rank(1, 2), quiet=True)
    fid_stats(source, TinyFeatures(), out, size=16, quiet=True)
    assert out.read_bytes() == rest.path.read_bytes()
    assert not parts.exists()


def test_finished_statistics_are_not_computed_again_nor_overwritten(
    folder: Path, tmp_path: Path
) -> None:
    out, extractor = tmp_path / "stats.npz", TinyFeatures()
    fid_stats(open_images(folder), extractor, out, size=16, quiet=True)
    fid_stats(open_images(folder), extractor, out, size=16, quiet=True)
    assert extractor.images == 23
    rows = np.arange(5)
    with pytest.raises(MismatchError, match=r"its source\.images is 23, now it is 5"):
        fid_stats(open_images(folder), extractor, out, size=16, rows=rows, quiet=True)
    (folder / "b" / "01.png").unlink()
    with pytest.raises(MismatchError, match=r"source\.images is 23, now it is 22"):
        fid_stats(open_images(folder), extractor, out, size=16, quiet=True)


def test_processes_share_the_parts(folder: Path, tmp_path: Path, small_parts: None) -> None:
    source = open_images(folder)
    alone = fid_stats(source, TinyFeatures(), tmp_path / "alone.npz", size=16, quiet=True)
    out, networks = tmp_path / "shared.npz", [TinyFeatures() for _ in range(3)]
    for rank in (2, 1):
        with pytest.raises(InputError, match="does not exist"):  # the first process writes it
            fid_stats(source, networks[rank], out, size=16, processes=Rank(rank, 3), quiet=True)
    fid_stats(source, networks[0], out, size=16, processes=Rank(0, 3), quiet=True)
    assert [network.images for network in networks] == [10, 8, 5]
    assert alone.path.read_bytes() == out.read_bytes()


def test_statistics_in_an_npz_of_images_are_kept(folder: Path, tmp_path: Path) -> None:
    """As in ADM's reference batches, whose statistics are of more images than the file holds."""
    mu, sigma = np.arange(6.0), 2 * np.eye(6)
    np.savez(tmp_path / "batch.npz", _crops(folder), mu=mu, sigma=sigma)
    batch = read_reference(tmp_path / "batch.npz")
    inception, other = TinyFeatures(), TinyFeatures()
    inception.name = "FID"
    kept = fid_stats_of_npz(batch, inception, tmp_path / "fid.npz", quiet=True)
    assert kept.stats is not None
    np.testing.assert_array_equal(kept.stats.sigma, sigma)
    assert kept.features is not None
    assert len(kept.features) == 23
    assert kept.made_from["source"]["statistics"] == "the file's own"
    own = fid_stats_of_npz(batch, other, tmp_path / "other.npz", quiet=True)
    assert own.stats is not None
    assert own.stats.count == 23
    assert not np.allclose(own.stats.mu, mu)


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
