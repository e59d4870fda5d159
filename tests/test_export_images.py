"""Exports: the pixels that the scorer sees, in the forms that other evaluators read."""

from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from score_making import QUICK, tiny_generator, tiny_tokenizer

from detok_pipe.evaluation.reference import read_reference
from detok_pipe.latents.errors import CacheError, ConfigError, InputError, MismatchError
from detok_pipe.latents.sample_store import SampleStore
from detok_pipe.pipelines import export_images as module
from detok_pipe.pipelines.export_images import export_images
from detok_pipe.pipelines.sample import sample
from detok_pipe.pipelines.stored_features import decode_latents


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return sample(
        tiny_generator(tmp_path),
        tmp_path / "samples",
        count=11,
        first=1,
        sampling=QUICK,
        rows_per_shard=4,
        quiet=True,
    )


def _pixels(store: SampleStore) -> np.ndarray:
    images = decode_latents(tiny_tokenizer(), store.stats, store.read(0, store.count))
    return images.permute(0, 2, 3, 1).numpy()


def test_png(store: SampleStore, tmp_path: Path) -> None:
    count = export_images(store, tiny_tokenizer(), tmp_path / "png", batch_size=4, quiet=True)
    assert count == 11
    names = sorted(path.name for path in (tmp_path / "png").glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(11)]
    read = np.stack([np.asarray(Image.open(tmp_path / "png" / name)) for name in names])
    np.testing.assert_array_equal(read, _pixels(store))


def test_npz_is_adms(store: SampleStore, tmp_path: Path) -> None:
    export_images(
        store, tiny_tokenizer(), tmp_path / "s.npz", form="npz", count=7, batch_size=3, quiet=True
    )
    with np.load(tmp_path / "s.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], _pixels(store)[:7])
        assert arrays["labels"].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert read_reference(tmp_path / "s.npz").image_shape == (7, 16, 16, 3)


def test_webdataset(store: SampleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IMAGES_PER_TAR", 5)
    export_images(store, tiny_tokenizer(), tmp_path / "tars", form="webdataset", quiet=True)
    tars = sorted(str(path) for path in (tmp_path / "tars").glob("*.tar"))
    assert len(tars) == 3
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    np.testing.assert_array_equal(np.stack([row["png"] for row in read]), _pixels(store))
    assert [row["cls"] for row in read] == [(i + 1) % 3 for i in range(11)]


def test_an_export_is_whole_or_not_there(store: SampleStore, tmp_path: Path) -> None:
    (store.path / "00002.safetensors").unlink()
    for form, name in (("png", "folder"), ("npz", "file.npz")):
        with pytest.raises(CacheError, match="1 of 3 shards"):
            export_images(store, tiny_tokenizer(), tmp_path / name, form=form, quiet=True)
        assert not (tmp_path / name).exists()


def test_bad_requests(store: SampleStore, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="never adds"):
        export_images(store, tiny_tokenizer(), tmp_path / "there")
    with pytest.raises(ConfigError, match=r"ends in \.npz"):
        export_images(store, tiny_tokenizer(), tmp_path / "x", form="npz")
    with pytest.raises(ConfigError, match="choose one of png, npz, webdataset"):
        export_images(store, tiny_tokenizer(), tmp_path / "x", form="jpg")
    with pytest.raises(InputError, match="11 samples; 12 cannot"):
        export_images(store, tiny_tokenizer(), tmp_path / "x", count=12)
    with pytest.raises(MismatchError, match="does not belong"):
        export_images(store, tiny_tokenizer(fingerprint="other"), tmp_path / "x")
