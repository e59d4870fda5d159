"""Statistics files of ADM, pytorch-fid and clean-fid, ours, and files that must be refused."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from detok_pipe.evaluation import reference as module
from detok_pipe.evaluation.frechet import feature_stats
from detok_pipe.evaluation.reference import find_reference, read_reference, write_reference
from detok_pipe.evaluation.weights import sha256_file
from detok_pipe.latents.errors import InputError, MismatchError, NonFiniteError, WeightsError

FEATURES = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
MU, SIGMA = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)


def _write_ours(path: Path, **extra: object) -> Path:
    write_reference(
        path,
        feature_stats(FEATURES),
        extractor="FD-EffLite2@128",
        settings={"resolution": 128},
        image_size=64,
        source={"sha256": "ab", "count": 50},
        **extra,  # type: ignore[arg-type]
    )
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pytorch_fid_and_clean_fid_statistics(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "stats.npz"
    np.savez(path, mu=MU.astype(dtype), sigma=SIGMA.astype(dtype))
    reference = read_reference(path)
    assert reference.stats is not None
    assert reference.stats.mu.dtype == np.float64
    assert reference.stats.count is None
    assert reference.features is None
    np.testing.assert_allclose(reference.stats.sigma, SIGMA, rtol=1e-6, atol=1e-7)
    assert reference.frechet.distance(feature_stats(FEATURES)) == pytest.approx(0, abs=1e-6)


def test_clean_fid_features(tmp_path: Path) -> None:
    path = tmp_path / "name_kid.npz"
    np.savez(path, feats=FEATURES)
    reference = read_reference(path)
    assert reference.stats is not None
    assert reference.features is not None
    np.testing.assert_allclose(reference.stats.mu, MU, rtol=1e-5)


def test_adm_file_with_images_is_streamed(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "adm.npz"
    np.savez_compressed(path, images, mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA)
    reference = read_reference(path)
    assert reference.image_shape == (7, 8, 8, 3)
    assert reference.image_size == 8
    (some,) = reference.images(8, start=2, stop=5)
    np.testing.assert_array_equal(some.permute(0, 2, 3, 1).numpy(), images[2:5])
    batches = list(reference.images(3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), images)
    np.savez(tmp_path / "images.npz", images)
    only = read_reference(tmp_path / "images.npz")
    with pytest.raises(InputError, match="fid-stats"):
        _ = only.frechet


def test_ours_goes_round_and_is_read_by_other_tools(tmp_path: Path) -> None:
    path = _write_ours(tmp_path / "sub" / "ours.npz", features=FEATURES)
    reference = read_reference(path)
    assert reference.stats is not None
    assert reference.stats.count == 50
    assert (reference.extractor, reference.image_size) == ("FD-EffLite2@128", 64)
    assert reference.made_from["source"] == {"sha256": "ab", "count": 50}
    np.testing.assert_array_equal(reference.features, FEATURES)
    with np.load(path) as arrays:  # as pytorch-fid and clean-fid do
        mu, sigma = arrays["mu"][:], arrays["sigma"][:]
    assert mu.shape == (6,)
    assert sigma.shape == (6, 6)


def test_what_may_not_be_compared(tmp_path: Path) -> None:
    ours = read_reference(_write_ours(tmp_path / "ours.npz"))
    ours.check(extractor="FD-EffLite2@128", dimensions=6, image_size=64)
    ours.check(extractor="FD-EffLite2@128", dimensions=6, image_size=None)
    with pytest.raises(MismatchError, match="FD-EffLite2@128, and the features are FID's"):
        ours.check(extractor="FID", dimensions=6, image_size=64)
    with pytest.raises(MismatchError, match="--resolution 128, or make"):
        ours.check(extractor="FD-EffLite2@260", dimensions=6, image_size=64)
    with pytest.raises(MismatchError, match="64 pixels a side, the images to score have 32"):
        ours.check(extractor="FD-EffLite2@128", dimensions=6, image_size=32)
    with pytest.raises(MismatchError, match="6 feature dimensions, FD-EffLite2@128 has 1280"):
        ours.check(extractor="FD-EffLite2@128", dimensions=1280, image_size=64)
    np.savez(tmp_path / "theirs.npz", mu=MU, sigma=SIGMA)
    theirs = read_reference(tmp_path / "theirs.npz")
    theirs.check(extractor="FID", dimensions=6, image_size=64)
    with pytest.raises(MismatchError, match="names no network"):
        theirs.check(extractor="FD-EffLite2@128", dimensions=6, image_size=64)


def test_a_published_reference_is_found_by_name_and_its_digest_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    name = Path("imagenet-256")
    with pytest.raises(WeightsError, match=r"ADM's reference batch .* was not found .* fid-stats"):
        find_reference(name, download=False)
    published = module.PUBLISHED["imagenet-256"]
    assert len(published.sha256) == 64
    for folder in (tmp_path / "hub" / "checkpoints", tmp_path / "own"):
        folder.mkdir(parents=True)
        path = folder / published.name
        np.savez(path, mu=MU, sigma=SIGMA)
        with pytest.raises(WeightsError, match=f"expected {published.sha256}"):
            find_reference(name, weights_dir=folder)
        known = dataclasses.replace(published, sha256=sha256_file(path))
        monkeypatch.setitem(module.PUBLISHED, "imagenet-256", known)
        assert find_reference(name, weights_dir=folder).path == path
        monkeypatch.setitem(module.PUBLISHED, "imagenet-256", published)
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "mine.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "mine.npz").rename("imagenet-256")
    assert find_reference(name).path == name  # a file of that name comes first


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_flipped_bits_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "images.npz"
    save(path, np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8))
    data = path.read_bytes()
    accepted = 0
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        with contextlib.suppress(InputError):
            list(read_reference(path).images(3))
            accepted += 1
    assert accepted < len(data) / 2


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_reference(tmp_path / "none.npz")
    path = tmp_path / "bad.npz"
    for content in (b"PK\x03\x04 no zip", b"text"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"is no \.npz: damaged"):
            read_reference(path)
    np.savez(path, mu=MU, sigma=SIGMA, detok=np.array("[1]"))
    with pytest.raises(InputError, match="no readable"):
        read_reference(path)
    np.savez(path, mu=np.array([object()]), sigma=SIGMA)
    with pytest.raises(InputError, match="no readable"):
        read_reference(path)
    np.savez(path, other=MU)
    with pytest.raises(InputError, match="has the arrays other"):
        read_reference(path)
    np.savez(path, mu=MU, sigma=SIGMA[:3])
    with pytest.raises(MismatchError):
        read_reference(path)
    for statistics in ({}, {"mu": MU, "sigma": SIGMA}):
        np.savez(path, feats=FEATURES[0], **statistics)
        with pytest.raises(InputError, match=r"bad\.npz: feats must be .* found \(6,\)"):
            read_reference(path)
    np.savez(path, feats=FEATURES[:, :5], mu=MU, sigma=SIGMA)
    with pytest.raises(MismatchError, match="feats has 5 dimensions, mu 6"):
        read_reference(path)
    np.savez(path, mu=MU * np.nan, sigma=SIGMA)
    with pytest.raises(NonFiniteError):
        read_reference(path)
    np.savez(path, np.zeros((2, 8, 8, 3), np.float32))
    with pytest.raises(InputError, match="uint8 images"):
        read_reference(path)
    _write_ours(path)
    with pytest.raises(WeightsError, match="expected 1234"):
        read_reference(path, sha256="1234")
