"""Image grids: every pixel in its place, labels of any kind, clear errors."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from detok_pipe.latents.errors import InputError
from detok_pipe.pipelines import pictures
from detok_pipe.pipelines.pictures import ImageRow
from detok_pipe.pipelines.theme import DARK


def plain(colour: tuple[int, int, int], size: int = 96) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


RED, GREEN, BLUE = plain((255, 0, 0)), plain((0, 255, 0)), plain((0, 0, 255))


def boxes(picture: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(left, top) of the 96-pixel squares of one colour."""
    match = (np.asarray(picture) == colour).all(-1)
    found = []
    while match.any():
        top, left = np.argwhere(match)[0]
        assert match[top : top + 96, left : left + 96].all()
        match[top : top + 96, left : left + 96] = False
        found.append((int(left), int(top)))
    return found


def test_a_tensor_and_an_array_give_the_same_images() -> None:
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    tensor = torch.as_tensor(array).permute(0, 3, 1, 2)
    for one, other, expected in zip(
        pictures.to_images(array), pictures.to_images(tensor), array, strict=True
    ):
        assert one.size == (4, 5)
        assert np.array_equal(np.asarray(one), expected)
        assert np.array_equal(np.asarray(other), expected)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        np.zeros((2, 3, 4, 4), dtype=np.uint8),
    ],
)
def test_another_form_is_refused_with_its_shape(batch) -> None:
    with pytest.raises(InputError, match="uint8 of shape"):
        pictures.to_images(batch)


def test_the_original_stands_above_what_was_rebuilt() -> None:
    picture = pictures.labelled_grid(pictures.reconstruction_rows([RED, RED], [BLUE, BLUE]))
    above, below = boxes(picture, (255, 0, 0)), boxes(picture, (0, 0, 255))
    assert [x for x, _ in above] == [x for x, _ in below]
    assert all(b[1] >= a[1] + 96 for a, b in zip(above, below, strict=True))


def test_originals_and_rebuilt_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pictures.reconstruction_rows([RED, RED], [BLUE])


def test_classes_are_rows_in_class_order_limited_and_named() -> None:
    rows = pictures.class_rows(
        [RED, GREEN, BLUE, RED, RED], [1, 0, -1, 1, 7], ["cat", "dog"], per_class=1
    )
    assert [row.label for row in rows] == ["cat", "dog", "class 7", "no class"]
    assert [len(row.cells) for row in rows] == [1, 1, 1, 1]
    assert rows[0].cells[0][0] is GREEN


def test_scales_are_rows_in_ascending_order() -> None:
    rows = pictures.scale_rows([(3.0, [RED]), (1.0, [GREEN]), (1.25, [BLUE])])
    assert [row.label for row in rows] == ["scale 1", "scale 1.25", "scale 3"]


def test_rows_stand_below_one_another_and_long_rows_go_on_below() -> None:
    rows = [ImageRow("a", [(RED,)] * 3), ImageRow("b", [(BLUE,)])]
    wide = pictures.labelled_grid(rows)
    assert len({y for _, y in boxes(wide, (255, 0, 0))}) == 1
    folded = pictures.labelled_grid(rows, columns=2)
    assert folded.width < wide.width
    reds, (blue,) = boxes(folded, (255, 0, 0)), boxes(folded, (0, 0, 255))
    assert len(reds) == 3
    assert len({y for _, y in reds}) == 2
    assert blue[1] >= max(y for _, y in reds) + 96


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture = np.asarray(pictures.labelled_grid([ImageRow("", [(noise,)])]))
    inner = picture[16:-16, 16:-16]
    assert np.array_equal(inner, np.asarray(noise).repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize(
    "label", ["cat", "<img onerror=1>", "漢字 ñ ü", "two\nlines\x07", "long " * 60, "\u202eabc", ""]
)
def test_any_label_leaves_the_images_untouched(label) -> None:
    picture = pictures.labelled_grid([ImageRow(label, [(RED,), (BLUE,)])], theme=DARK)
    assert len(boxes(picture, (255, 0, 0))) == len(boxes(picture, (0, 0, 255))) == 1
    assert picture.width < 600


@pytest.mark.parametrize("label", ["noise 2, 50% hidden", "wide", "i", "original"])
def test_a_label_that_fits_is_not_shortened(label, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, place, text, **_: drawn.append(text)
    )
    pictures.labelled_grid([ImageRow(label, [(RED,)])])
    assert drawn == [label]


def test_a_label_is_drawn() -> None:
    rows = [ImageRow("cat", [(RED,)])]
    label = np.asarray(pictures.labelled_grid(rows))[:, :40]
    assert (label.sum(-1) < 300).any()


def test_images_of_two_sizes_and_no_images_are_refused() -> None:
    with pytest.raises(InputError, match="32 x 32, 96 x 96"):
        pictures.labelled_grid([ImageRow("a", [(RED,), (plain((0, 0, 0), 32),)])])
    with pytest.raises(InputError, match="none"):
        pictures.labelled_grid([])


def test_a_saved_picture_is_whole(tmp_path) -> None:
    target = pictures.save(tmp_path / "deep" / "grid.png", RED)
    assert np.array_equal(np.asarray(Image.open(target)), np.asarray(RED))
    assert list(target.parent.iterdir()) == [target]
    with Image.open(io.BytesIO(pictures.png_bytes(RED))) as image:
        assert image.format == "PNG"
