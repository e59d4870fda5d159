"""The stream of training images: order, mirroring, processes, restarts, bad files."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.latents.noise import Noise
from detok_pipe.latents.order import SampleOrder
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import open_images

COUNT, SIZE = 23, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Image i has level 10 i, and is brighter by 5 in its left half."""
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        pixels = np.full((SIZE, SIZE, 3), 10 * number, np.uint8)
        pixels[:, : SIZE // 2] += 5
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return open_images(root)


def numbers(batch) -> list[int]:
    """The number that each image was made from."""
    right = torch.minimum(batch.images[:, 0, 0, 0], batch.images[:, 0, 0, -1])
    return ((right + 1) * 127.5 / 10).round().int().tolist()


def taken(source, steps: int, batch: int = 6, **options):
    return list(islice(ImageLoader(source, SIZE, batch, seed=3, **options), steps))


@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_positions_labels_mirroring_and_range(source, resident_bytes):
    batches = taken(source, 8, resident_bytes=resident_bytes)
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.tolist() == list(range(48))
    rows = SampleOrder(COUNT, 3).at(ids.numpy())
    made_from = [int(source.name(i)[-6:-4]) for i in rows]
    assert [n for batch in batches for n in numbers(batch)] == made_from
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.tolist() == source.labels[rows].tolist()
    images = torch.cat([batch.images for batch in batches])
    mirrored = images[:, 0, 0, 0] < images[:, 0, 0, -1]
    assert mirrored.tolist() == (Noise(3, ids).uniform("flip", ()) < 0.5).tolist()
    assert 10 < mirrored.sum() < 38
    assert images.dtype == torch.float32
    assert images.min() == -1.0 if 0 in made_from else images.min() > -1.0


def test_resident_and_streamed_batches_are_equal(source):
    for one, other in zip(taken(source, 6), taken(source, 6, resident_bytes=0), strict=True):
        assert torch.equal(one.images, other.images)


def test_a_stream_begun_anew_lacks_no_image(source):
    loader = ImageLoader(source, SIZE, 4, seed=3)
    start = loader.state()
    first = next(iter(loader))  # images of later batches were asked for and are thrown away
    loader.load_state(start)
    again = list(islice(loader, 9))
    assert torch.equal(first.images, again[0].images)
    for mine, other in zip(again, taken(source, 9, batch=4, resident_bytes=0), strict=True):
        assert torch.equal(mine.images, other.images)


def test_each_epoch_has_each_image_once(source):
    batches = taken(source, COUNT, batch=6)  # six epochs
    seen = np.array([n for batch in batches for n in numbers(batch)]).reshape(6, COUNT)
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in seen.tolist())


def test_without_flip(source):
    images = torch.cat([batch.images for batch in taken(source, 4, flip=False)])
    assert (images[..., 0] > images[..., -1]).all()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_global_batches_do_not_depend_on_the_number_of_processes(source, world):
    alone = taken(source, 5)
    together = [taken(source, 5, rank=rank, world=world) for rank in range(world)]
    for step, whole in enumerate(alone):
        parts = [together[rank][step] for rank in range(world)]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)
        assert torch.equal(torch.cat([p.ids for p in parts]), whole.ids)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_resumes_at_any_position_with_another_number_of_processes(source, resident_bytes):
    loader = ImageLoader(source, SIZE, 6, seed=3, resident_bytes=resident_bytes)
    stream = iter(loader)
    for done in range(1, 6):
        next(stream)  # batches decoded ahead do not count
        assert loader.state()["samples_consumed"] == 6 * done
    state = loader.state()
    expected = next(stream)
    parts = []
    for rank in range(2):
        resumed = ImageLoader(source, SIZE, 6, seed=3, rank=rank, world=2)
        resumed.load_state(state)
        parts.append(next(iter(resumed)))
    assert torch.equal(torch.cat([part.images for part in parts]), expected.images)


def test_a_state_of_another_seed_or_source_is_refused(source):
    state = ImageLoader(source, SIZE, 6, seed=4).state()
    with pytest.raises(MismatchError, match="another seed: 4 there, 3 now"):
        ImageLoader(source, SIZE, 6, seed=3).load_state(state)
    with pytest.raises(MismatchError, match="another source"):
        ImageLoader(source, SIZE, 6, seed=4).load_state({**state, "source": {"hash": "x"}})


def test_a_batch_larger_than_the_set(source):
    (batch,) = taken(source, 1, batch=60)
    assert len(set(numbers(batch))) == COUNT


@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_an_unreadable_image_is_named_and_ends_the_stream(tmp_path, resident_bytes):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    loader = ImageLoader(open_images(tmp_path), SIZE, 4, 0, resident_bytes=resident_bytes)
    with pytest.raises(InputError, match=r"a/bad\.png in .*: it "):
        next(iter(loader))


def test_a_batch_that_does_not_divide(source):
    with pytest.raises(ConfigError, match="global batch 7 is no multiple of the 2 processes"):
        ImageLoader(source, SIZE, 7, 0, world=2)
