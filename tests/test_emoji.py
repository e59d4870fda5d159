"""The demonstration's image set: what is in it, and that it is made once, whole."""

import builtins
import json

import numpy as np
import pytest

from detok_pipe.latents.errors import ConfigError, InputError, MismatchError
from detok_pipe.pipelines import emoji
from detok_pipe.pipelines.emoji import ALL_CLASSES, DISTINCT_CLASSES, make_emoji_images
from detok_pipe.pipelines.images import open_images

pytest.importorskip("resvg_py")
FEW = {"hearts": ("Smileys & Emotion/heart",), "fruit": ("Food & Drink/food-fruit",)}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji") / "set"
    return folder, make_emoji_images(folder, size=64, classes=FEW, quiet=True)


def test_the_folders_are_image_sources(few):
    folder, images = few
    train, held_out = open_images(images.train), open_images(images.held_out)
    assert train.class_names == held_out.class_names == ["fruit", "hearts"]
    assert len(train) == sum(images.train_counts.values())
    assert images.held_out_counts == {"hearts": 2, "fruit": 2}
    shown = {train.name(i) for i in range(len(train))}
    assert not shown & {held_out.name(i) for i in range(len(held_out))}
    assert "CC-BY 4.0" in (folder / "LICENSE.txt").read_text()


def test_pictures_are_drawings_on_white(few):
    source = open_images(few[1].train)
    hearts = [i for i in range(len(source)) if source.name(i).startswith("hearts/2764.")]
    heart = np.asarray(source.load(hearts[0]))
    assert heart.shape == (64, 64, 3)
    assert (heart[0, 0] == 255).all()
    red, green, blue = heart[32, 32].astype(int)
    assert red > 150 > 100 > max(green, blue)


def test_a_drawing_that_is_not_square_is_centred(few):
    _, images = few
    (file,) = [*images.train.glob("fruit/1f349.png"), *images.held_out.glob("fruit/1f349.png")]
    source = open_images(file.parent)
    melon = np.asarray(source.load([source.name(i) for i in range(len(source))].index("1f349.png")))
    assert melon.shape == (64, 64, 3)
    inked = (melon < 250).any(-1).any(1).nonzero()[0]
    assert abs(inked[0] - (63 - inked[-1])) <= 2


def test_the_same_set_every_time_and_no_drawing_twice(few, tmp_path):
    _, images = few
    again = make_emoji_images(tmp_path / "again", size=64, classes=FEW, quiet=True)
    for one, other in ((images.train, again.train), (images.held_out, again.held_out)):
        files = {p.relative_to(one): p.read_bytes() for p in one.rglob("*.png")}
        assert files == {p.relative_to(other): p.read_bytes() for p in other.rglob("*.png")}
        assert len(set(files.values())) == len(files)


def test_a_second_run_renders_nothing(few, monkeypatch):
    folder, images = few
    monkeypatch.setattr(emoji, "_render", None)
    assert make_emoji_images(folder, size=64, classes=FEW, quiet=True) == images
    with pytest.raises(MismatchError, match="made with size 64, and 128 is wanted"):
        make_emoji_images(folder, size=128, classes=FEW, quiet=True)


def test_an_interruption_leaves_nothing_and_strangers_are_kept(tmp_path, monkeypatch):
    calls = iter(range(5))

    def interrupted(svg, size):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return b"png"

    monkeypatch.setattr(emoji, "_render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_emoji_images(tmp_path / "set", classes=FEW, quiet=True)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="was not made by this command"):
        make_emoji_images(tmp_path, classes=FEW, quiet=True)


def test_every_class_of_the_presets_has_drawings():
    everything = emoji._selected(ALL_CLASSES)
    assert len(everything) == 9
    assert sum(len(codes) for codes in everything.values()) >= 1850
    counts = {name: len(codes) for name, codes in emoji._selected(DISTINCT_CLASSES).items()}
    assert min(counts.values()) >= 30, counts
    assert json.dumps(counts)


def test_a_selection_that_matches_nothing():
    with pytest.raises(InputError, match="no emoji belong to the class dragons: Food/dragon"):
        emoji._selected({"dragons": ("Food/dragon",)})


def test_missing_wheels_say_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_resvg(name, *rest, **named):
        if name == "resvg_py":
            raise ModuleNotFoundError("No module named 'resvg_py'", name="resvg_py")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_resvg)
    with pytest.raises(InputError, match=r"resvg_py; .*pip install 'detok-pipe\[demo\]'"):
        make_emoji_images(tmp_path / "set", quiet=True)
