"""The pre-flight test: a right cache passes, and each way of being wrong shows."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detok_pipe.generators.registry import build_generator
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import InputError, MismatchError
from detok_pipe.latents.import_cache import import_cache, open_foreign
from detok_pipe.latents.manifest import read_manifest, write_manifest
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines import check_cache as check_module
from detok_pipe.pipelines.check_cache import LEAST_PSNR, check_cache
from detok_pipe.pipelines.encode import encode, make_plan
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.trained import TrainedGenerator, TrainedTokenizer
from detok_pipe.tokenizer.model import LDeTok

COUNT, SIZE = 20, 32


def make_tokenizer(seed, fingerprint="tok"):
    torch.manual_seed(seed)
    model = LDeTok(image_size=SIZE, patch_size=8, channels=4, encoder="32,1,2", decoder="32,1,2")
    for parameter in model.parameters():  # an untrained decoder draws every image grey
        parameter.data.normal_(0, 0.1)
    identity = {"fingerprint": fingerprint}
    return TrainedTokenizer(
        model.eval().requires_grad_(False), SIZE, identity, "decoder", Path("runs/tok"), 1
    )


def make_images(root, seed=0):
    """BMP files, all of one size in bytes: only their pixels tell them apart."""
    rng = np.random.default_rng(seed)
    for number in range(COUNT):
        path = root / f"class{number % 3}" / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize((40, 36), Image.Resampling.BICUBIC).save(path)
    return root


def write(tokenizer, images, out, **options):
    source = open_images(images)
    plan = make_plan(tokenizer, source, shards=2, rows_per_record=4, batch_size=5, **options)
    encode(tokenizer, source, out, plan, quiet=True, decode_threads=1)
    return open_cache(out)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(0)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


@pytest.fixture
def cache(tokenizer, images, tmp_path):
    return write(tokenizer, images, tmp_path / "cache")


def test_a_right_cache(tokenizer, cache, images):
    found = check_cache(cache, tokenizer, open_images(images), num=8)
    assert found.problems == []
    assert found.match.shape == (8,)
    assert found.match.min() > 55  # fp16 rows alone
    assert found.latents < 5e-4
    assert np.abs(found.cached - found.online).max() < 0.05
    assert found.picture.width > 8 * SIZE
    assert "PSNR at least" in "\n".join(found.lines())
    everything = check_cache(cache, tokenizer, open_images(images), num=1000)
    assert len(everything.match) == COUNT


def test_pieces_are_of_the_caches_batch_size(tokenizer, cache, images, monkeypatch):
    seen = []
    inner = check_module.moments_on_device

    def counted(model, pixels, plan):
        seen.append(len(pixels))
        return inner(model, pixels, plan)

    monkeypatch.setattr(check_module, "moments_on_device", counted)
    source, generator = open_images(images), make_generator(cache)
    pieces = check_cache(cache, tokenizer, source, num=13, generator=generator)
    assert seen == [5, 5, 3]
    whole = cache.manifest.model_copy(
        update={"encoding": cache.manifest.encoding | {"batch_size": 13}}
    )
    write_manifest(cache.path, whole.sealed())
    at_once = check_cache(open_cache(cache.path), tokenizer, source, num=13, generator=generator)
    assert seen[3:] == [13]
    for field in ("match", "cached", "online", "latents", "losses"):
        np.testing.assert_allclose(getattr(pieces, field), getattr(at_once, field), rtol=1e-3)
    assert pieces.picture.size == at_once.picture.size


def test_an_imported_cache_of_another_shape(tokenizer, images, tmp_path):
    for number in range(COUNT):
        path = tmp_path / "mar" / f"class{number % 3}" / f"{number:02d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = np.random.default_rng(number).standard_normal((2, 8, 3, 3)).astype(np.float32)
        np.savez(path, moments=moments[0], moments_flip=moments[1])
    foreign = open_foreign(tmp_path / "mar")
    import_cache(foreign, tmp_path / "imported", encoder=tokenizer.identity)
    with pytest.raises(
        MismatchError, match=r"have grid \(3, 3\), those of the tokenizer runs/tok \(4, 4\)"
    ):
        check_cache(open_cache(tmp_path / "imported"), tokenizer, open_images(images))


def test_bf16_rows_are_compared_with_bf16(tokenizer, images, tmp_path):
    cache = write(tokenizer, images, tmp_path / "bf16", precision="bf16", mirror=False, std=False)
    assert check_cache(cache, tokenizer, open_images(images)).problems == []


def test_images_replaced_under_their_names(tokenizer, cache, images):
    make_images(images, seed=1)
    found = check_cache(cache, tokenizer, open_images(images))
    assert found.latents > 0.5
    # This untrained decoder is blind to them: the picture alone would not tell.
    assert found.match.min() > LEAST_PSNR
    assert len(found.problems) == 1
    assert "does not hold the latents of its images: they are" in found.problems[0]


def test_a_decoder_that_sees_its_latents_shows_it_too(tokenizer, cache, images):
    class Seeing(type(tokenizer.model)):
        def decode(self, z):
            grey = cache.stats.normalize(z).reshape(len(z), 1, 8, 8).sigmoid()
            return grey.repeat(1, 3, 4, 4) * 2 - 1

    model = copy.copy(tokenizer.model)
    model.__class__ = Seeing
    seeing = replace(tokenizer, model=model)
    assert check_cache(cache, seeing, open_images(images)).problems == []
    make_images(images, seed=1)
    found = check_cache(cache, seeing, open_images(images))
    assert found.match.min() < LEAST_PSNR - 10
    assert any("decoded from the cache is" in problem for problem in found.problems)


def test_another_normalisation_in_the_manifest(tokenizer, cache, images):
    manifest = read_manifest(cache.path)
    stats = manifest.stats.model_copy(update={"mean": [m + 0.3 for m in manifest.stats.mean]})
    write_manifest(cache.path, manifest.model_copy(update={"stats": stats}).sealed())
    found = check_cache(open_cache(cache.path), tokenizer, open_images(images))
    assert found.problems
    assert found.latents > 0.1


def test_what_cannot_be_compared_names_the_field(tokenizer, cache, images):
    with pytest.raises(MismatchError, match=r"another encoder\.fingerprint"):
        check_cache(cache, make_tokenizer(0, "other"), open_images(images))
    (images / "class0" / "00.bmp").write_bytes(b"longer or shorter")
    with pytest.raises(
        MismatchError, match=r"another sources\.sizes.* images that it was made from"
    ):
        check_cache(cache, tokenizer, open_images(images))
    (images / "class0" / "00.bmp").rename(images / "class0" / "01.bmp")
    with pytest.raises(MismatchError, match=r"another sources\.hash"):
        check_cache(cache, tokenizer, open_images(images))


def test_an_image_that_became_unreadable(tokenizer, cache, images):
    size = (images / "class0" / "00.bmp").stat().st_size
    for path in images.rglob("*.bmp"):
        path.write_bytes(bytes(size))
    with pytest.raises(InputError, match="it is no image"):
        check_cache(cache, tokenizer, open_images(images))


def make_generator(cache, stats=None, tokenizer="tok"):
    torch.manual_seed(1)
    model = build_generator(
        "sit-s", grid=cache.grid, channels=4, num_classes=3, width=32, depth=1, heads=2
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return TrainedGenerator(
        model=model.eval().requires_grad_(False),
        stats=stats or cache.stats,
        grid=cache.grid,
        class_names=list(cache.class_names),
        identity={"tokenizer": tokenizer},
        record={},
        path=Path("runs/gen"),
    )


def test_a_generators_loss_on_both(tokenizer, cache, images):
    source = open_images(images)
    found = check_cache(cache, tokenizer, source, generator=make_generator(cache))
    assert found.problems == []
    cached, fresh = found.losses
    assert cached == pytest.approx(fresh, rel=1e-3)
    assert "the generator's loss" in found.lines()[-1]
    other = LatentStats(cache.stats.mean, cache.stats.std * 2)
    found = check_cache(cache, tokenizer, source, generator=make_generator(cache, other))
    assert "the loss of runs/gen is" in found.problems[0]
    with pytest.raises(MismatchError, match="trained on latents of the tokenizer"):
        check_cache(cache, tokenizer, source, generator=make_generator(cache, tokenizer="x"))
