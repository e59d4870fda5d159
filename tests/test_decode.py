"""Decoding rules and the exact centre crop, on odd files made here."""

import contextlib
import io
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines.decode import (
    BatchDecoder,
    MemoryBudget,
    center_crop,
    decode,
    decode_square,
    to_float,
)

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth colours and a little noise, (height, width, channels) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + c)) + np.cos(y / (11 + c)) for c in range(channels)]
    pixels = np.stack(waves, -1) * 50 + 128 + RNG.normal(0, 5, (height, width, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def square_of(image: Image.Image, form: str = "PNG", size: int = 16, **options) -> np.ndarray:
    return decode_square(encoded(image, form, **options), size)


# ---------------------------------------------------------------- colour


def test_grey_palette_and_one_bit_become_rgb():
    grey = Image.fromarray(noise(20, 20, 1)[..., 0])
    for image in (grey, grey.convert("1"), grey.convert("LA")):
        rgb = np.asarray(decode(encoded(image, "PNG")))
        assert rgb.shape == (20, 20, 3)
        assert (rgb == np.asarray(image.convert("L"))[..., None]).all()
    palette = Image.fromarray(noise(20, 20)).quantize(32)
    assert (np.asarray(decode(encoded(palette, "GIF"))) == np.asarray(palette.convert("RGB"))).all()


def test_transparency_is_dropped_not_blended(recwarn):
    pixels = noise(16, 16, 4)
    pixels[..., 3] = 0
    assert (square_of(Image.fromarray(pixels)) == pixels[..., :3]).all()
    palette = Image.fromarray(pixels[..., :3]).quantize(8)
    square_of(palette, "PNG", transparency=bytes(range(8)))
    assert not recwarn.list


def test_cmyk_jpeg():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = square_of(red, "JPEG", quality=95)
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_by_257(form):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels * 257)
    assert (square_of(image, form)[..., 0] == levels).all()
    between = Image.fromarray(levels * 257 - np.where(levels > 0, 128, 0).astype(np.uint16))
    assert (square_of(between, form)[..., 0] == levels).all()


def test_exif_rotation_is_ignored():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (square_of(Image.fromarray(pixels), "PNG", exif=exif) == pixels).all()


def test_an_icc_profile_changes_nothing():
    pixels = noise(16, 16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (square_of(Image.fromarray(pixels), "PNG", icc_profile=profile) == pixels).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_square(file, 16) == [255, 0, 0]).all()


# ---------------------------------------------------------------- unreadable


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_truncated_anywhere_is_an_input_error(form):
    data = encoded(Image.fromarray(noise(64, 64)), form).getvalue()
    for keep in (1, 2, 10, len(data) // 4, len(data) // 2, int(len(data) * 0.9)):
        with pytest.raises(InputError):
            decode_square(io.BytesIO(data[:keep]), 16)


def test_random_damage_is_an_input_error_or_an_image():
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        data = encoded(Image.fromarray(noise(40, 40)), form).getvalue()
        for _ in range(40):
            damaged = bytearray(data)
            for place in RNG.integers(0, len(data), 4):
                damaged[place] = RNG.integers(0, 256)
            with contextlib.suppress(InputError):
                assert decode_square(io.BytesIO(bytes(damaged)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    ],
)
def test_no_images(data, reason):
    with pytest.raises(InputError, match=reason):
        decode_square(io.BytesIO(data), 16)


def test_floating_point_and_wide_integers_are_refused():
    image = np.full((16, 16), np.nan, np.float32)
    with pytest.raises(InputError, match="floating-point"):
        square_of(Image.fromarray(image), "TIFF")
    with pytest.raises(InputError, match="32-bit"):
        square_of(Image.fromarray(np.full((16, 16), 70000, np.int32)), "TIFF")


def test_the_limit_of_pixels():
    image = Image.new("RGB", (40, 30))
    assert decode_square(encoded(image, "PNG"), 16, max_pixels=1200).shape == (16, 16, 3)
    with pytest.raises(InputError, match="40 x 30 = 1,200 pixels, above the limit of 1,199"):
        decode_square(encoded(image, "PNG"), 16, max_pixels=1199)
    with pytest.raises(InputError, match="too narrow: 1000 x 1"):
        decode_square(encoded(Image.new("RGB", (1000, 1)), "PNG"), 16, max_pixels=100_000)


# ---------------------------------------------------------------- crop


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's procedure, written step by step on numpy for its halving and its crop."""
    pixels = np.asarray(image)
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[:2]
        half = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BOX)
        if height % 2 == 0 and width % 2 == 0:  # each pass rounds half up
            wide = pixels.astype(int)
            wide = (wide[:, ::2] + wide[:, 1::2] + 1) >> 1
            assert (np.asarray(half) == (wide[::2] + wide[1::2] + 1) >> 1).all()
        pixels = np.asarray(half)
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    target = (round(width * scale), round(height * scale))
    pixels = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))
    top, left = math.floor((target[1] - size) / 2), math.floor((target[0] - size) / 2)
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "shape",
    [
        (16, 16),
        (31, 33),
        (32, 32),
        (33, 47),
        (64, 200),
        (129, 65),
        (5, 9),
        (1, 1),
        (7, 90),
        (3, 16),
    ],
)
def test_crop_equals_the_adm_procedure(shape):
    image = Image.fromarray(noise(*shape))
    cropped = center_crop(image, 16)
    assert cropped.shape == (16, 16, 3)
    assert cropped.dtype == np.uint8
    assert (cropped == reference_crop(image, 16)).all()


def test_an_image_of_the_wanted_size_is_untouched():
    pixels = noise(32, 32)
    assert (center_crop(Image.fromarray(pixels), 32) == pixels).all()


def test_to_float_range_and_layout():
    pixels = np.zeros((2, 4, 5, 3), np.uint8)
    pixels[0, 1, 2] = (255, 51, 0)
    images = to_float(pixels)
    assert images.shape == (2, 3, 4, 5)
    assert images.is_contiguous()
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[0, :, 1, 2], torch.tensor([1.0, -0.6, -1.0]))


# ---------------------------------------------------------------- threads


class Listed:
    """Images in memory: anything with name and open is a source."""

    max_pixels = 10_000

    def __init__(self, files: list[bytes]) -> None:
        self.files = files
        self.opened = 0

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return str(index)

    def open(self, index: int) -> io.BytesIO:
        self.opened += 1
        return io.BytesIO(self.files[index])


def test_batches_keep_their_order_and_list_what_is_unreadable():
    squares = [noise(16, 16) for _ in range(20)]
    files = [encoded(Image.fromarray(pixels), "PNG").getvalue() for pixels in squares]
    files[7] = files[7][:30]
    order = np.random.default_rng(1).permutation(20)
    decoder = BatchDecoder(Listed(files), 16, threads=3)
    batches = list(decoder.batches(np.array_split(order, 6)))
    assert np.concatenate([batch.indices for batch in batches]).tolist() == order.tolist()
    for batch in batches:
        for place, index in enumerate(batch.indices):
            if index == 7:
                assert "image" in batch.unreadable[place]
                assert not batch.pixels[place].any()
            else:
                assert place not in batch.unreadable
                assert (batch.pixels[place] == squares[index]).all()


def test_decoding_runs_ahead_but_not_away():
    source = Listed([encoded(Image.new("RGB", (16, 16)), "PNG").getvalue()] * 100)
    batches = BatchDecoder(source, 16, threads=2, ahead=3).batches(
        np.array_split(np.arange(100), 20)
    )
    next(batches)
    time.sleep(0.1)
    assert source.opened <= 20
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_memory_budget_is_kept_and_a_larger_request_runs_alone():
    budget, held, most, lock = MemoryBudget(100), [], [], threading.Lock()

    def work(amount: int) -> None:
        with budget.hold(amount):
            with lock:
                held.append(amount)
                most.append(list(held))
            time.sleep(0.002)
            with lock:
                held.remove(amount)

    threads = [threading.Thread(target=work, args=(a,)) for a in [40, 60, 300, 30, 90, 300, 10] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 21
    assert all(sum(together) <= 100 or together == [300] for together in most)


def test_images_just_below_the_limit_take_bounded_memory(tmp_path):
    """Four threads at a budget that holds one such image: they take turns."""
    side = 4000
    Image.new("RGB", (side, side), (200, 30, 10)).save(tmp_path / "large.bmp")
    code = """if True:
        import io, resource, sys
        import numpy as np
        from detok_pipe.pipelines.decode import BatchDecoder

        class Source:
            max_pixels = int(sys.argv[2])
            def __len__(self): return 4
            def name(self, index): return str(index)
            def open(self, index): return open(sys.argv[1], "rb")

        decoder = BatchDecoder(Source(), 64, threads=4, memory_budget=150_000_000)
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        (batch,) = decoder.batches([np.arange(4)])
        print(len(batch.unreadable), peak() - before)
    """
    command = [sys.executable, "-c", code, tmp_path / "large.bmp", str(side * side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unreadable, grown = map(int, done.stdout.split())
    assert unreadable == 0
    # 128 MB is what one of them takes; without turns it would be four times that.
    assert grown < 300_000_000
