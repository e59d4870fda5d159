"""From images to a finished cache: any number of processes, restarts, bad files, mirrored views."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from detok_pipe.latents.errors import CacheError, ConfigError, InputError, MismatchError
from detok_pipe.latents.stats import LatentStats
from detok_pipe.pipelines.decode import decode_square, to_float
from detok_pipe.pipelines.encode import encode, make_plan, planned_threads
from detok_pipe.pipelines.images import open_images
from detok_pipe.tokenizer.model import LDeTok

SIZE, COUNT = 16, 61


class PatchMeans:
    """A tokenizer stub: the means of 8 x 8 patches, and a log variance from the red channel."""

    grid = (2, 2)
    channels = 3
    has_posterior = True

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        patches = torch.nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        return torch.cat([patches, patches[..., :1].expand_as(patches) - 3], -1)


class Overflowing(PatchMeans):
    """Not finite in bf16 for bright images, and for the brightest not in fp32 either."""

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        moments = super().encode_moments(images)
        brightness = images.mean((1, 2, 3))
        limit = 0.5 if torch.is_autocast_enabled("cpu") else 0.8
        moments[brightness > limit] = torch.nan
        return moments


@dataclass
class Stub:
    model: Any = field(default_factory=PatchMeans)
    image_size: int = SIZE
    identity: dict[str, Any] = field(default_factory=lambda: {"fingerprint": "stub"})
    stats: LatentStats | None = None


def make_images(root: Path, count: int = COUNT, bad: dict[int, bytes] | None = None) -> Path:
    """Image i: its left half of level 4 i, its right half of level 4 i + 3."""
    for number in range(count):
        pixels = np.full((SIZE, SIZE, 3), 4 * number, np.uint8)
        pixels[:, SIZE // 2 :] += 3
        file = root / f"class {number % 3}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if bad and number in bad:
            file.write_bytes(bad[number])
        else:
            Image.fromarray(pixels).save(file)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_images(make_images(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    bad = {5: b"", 20: b"no image", 33: b"\x89PNG\r\n\x1a\n cut short"}
    return open_images(make_images(tmp_path_factory.mktemp("damaged"), bad=bad))


def plan_of(source, tokenizer=None, **options):
    options = {"shards": 7, "rows_per_record": 4, "batch_size": 5, **options}
    return make_plan(tokenizer or Stub(), source, **options)


def run(source, out, plan=None, tokenizer=None, **options):
    tokenizer = tokenizer or Stub()
    plan = plan or plan_of(source, tokenizer)
    return encode(tokenizer, source, out, plan, quiet=True, decode_threads=2, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def stored(folder: Path, view: str = "image") -> dict[str, np.ndarray]:
    """All rows of a view, read with plain webdataset."""
    tars = sorted(str(p) for p in (folder / view).glob("*.tar"))
    names = ("mean.npy", "std.npy", "label.npy")
    rows = list(wds.WebDataset(tars, shardshuffle=False).decode().to_tuple(*names).unbatched())
    return {
        n.split(".")[0]: np.stack(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)
    }


# ---------------------------------------------------------------- what is written


def test_rows_are_the_normalised_moments_of_both_views(source, tmp_path):
    done = run(source, tmp_path / "cache")
    manifest = done.manifest
    assert (done.images, done.quarantined, manifest.count) == (COUNT, 0, COUNT)
    assert manifest.class_names == ["class 0", "class 1", "class 2"]
    index = np.load(tmp_path / "cache" / "index.npy")
    assert sorted(index["source_id"]) == list(range(COUNT))
    assert (index["label"] == source.labels[index["source_id"]]).all()
    squares = np.stack([decode_square(source.open(i), SIZE) for i in index["source_id"]])
    images = to_float(squares)
    for view, seen in (("image", images), ("mirror", images.flip(-1))):
        moments = PatchMeans().encode_moments(seen).numpy()
        mean, logvar = moments[..., :3], moments[..., 3:]
        rows = stored(tmp_path / "cache", view)
        stats = LatentStats.from_json(manifest.stats.model_dump())
        np.testing.assert_allclose(rows["mean"], stats.normalize(mean), atol=2e-3)
        np.testing.assert_allclose(rows["std"], np.exp(logvar / 2) / stats.std, rtol=2e-3)
        assert (rows["label"] == index["label"]).all()
    views = [stored(tmp_path / "cache", view)["mean"] for view in ("image", "mirror")]
    both = np.concatenate(views).astype(np.float64)
    np.testing.assert_allclose(both.mean((0, 1)), 0, atol=1e-3)
    np.testing.assert_allclose(both.std((0, 1)), 1, atol=1e-3)


def test_without_mirror_and_with_given_statistics(source, tmp_path):
    stats = LatentStats(np.array([0.0, 0.5, 1.0]), np.array([1.0, 2.0, 3.0]))
    plan = plan_of(source, mirror=False, std=False, stats=stats)
    manifest = run(source, tmp_path / "cache", plan).manifest
    assert manifest.views == ["image"]
    assert manifest.fields == ["mean"]
    assert manifest.stats.std == [1.0, 2.0, 3.0]


def test_with_the_real_tokenizer(source, tmp_path):
    torch.manual_seed(0)
    model = LDeTok(image_size=16, patch_size=8, channels=4, encoder="32,1,2", decoder="32,1,2")
    tokenizer = Stub(model.eval(), 16, {"fingerprint": "small"})
    assert run(source, tmp_path / "cache", tokenizer=tokenizer).manifest.count == COUNT


def test_one_image(tmp_path):
    source = open_images(make_images(tmp_path / "images", count=1))
    assert run(source, tmp_path / "cache", make_plan(Stub(), source)).manifest.count == 1


# ---------------------------------------------------------------- same bits always


@pytest.fixture(scope="module")
def reference(damaged, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "cache"
    run(damaged, out)
    return contents(out)


@pytest.mark.parametrize("world", [2, 4, 11])
def test_processes_one_after_the_other(damaged, reference, tmp_path, world):
    results = [run(damaged, tmp_path / "c", rank=r, world=world) for r in range(world)]
    assert [bool(r.manifest) for r in results] == [
        rank >= min(world, 6) - 1 for rank in range(world)
    ]
    assert sum(result.images for result in results) == COUNT
    assert contents(tmp_path / "c") == reference


@pytest.mark.parametrize("world", [2, 4])
def test_processes_at_the_same_time(damaged, reference, tmp_path, world):
    results = []
    threads = [
        threading.Thread(
            target=lambda r=r: results.append(run(damaged, tmp_path / "c", rank=r, world=world))
        )
        for r in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == world
    assert any(result.manifest for result in results)
    assert contents(tmp_path / "c") == reference


def test_two_processes_that_believe_to_be_alone(damaged, reference, tmp_path):
    threads = [threading.Thread(target=run, args=(damaged, tmp_path / "c")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert contents(tmp_path / "c") == reference


class Interrupting(PatchMeans):
    """Ctrl-C in the n-th batch."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().encode_moments(images)


@pytest.mark.parametrize("batch", [1, 6, 13, 26])
def test_interrupted_then_resumed_by_another_number_of_processes(
    damaged, reference, tmp_path, batch
):
    with pytest.raises(KeyboardInterrupt):
        run(damaged, tmp_path / "c", tokenizer=Stub(Interrupting(batch)))
    for rank in range(3):
        run(damaged, tmp_path / "c", rank=rank, world=3)
    assert contents(tmp_path / "c") == reference
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "commit"))]


def test_run_again_it_finds_everything_done(damaged, reference, tmp_path):
    out = tmp_path / "c"
    first = run(damaged, out)
    again = run(damaged, out, tokenizer=Stub(Interrupting(1)))
    assert again.images == 0
    assert (again.manifest, again.quarantined) == (first.manifest, 3)
    assert contents(out) == reference


# ---------------------------------------------------------------- what cannot be encoded


def test_unreadable_images_are_listed_and_counts_add_up(damaged, tmp_path):
    done = run(damaged, tmp_path / "c")
    assert (done.quarantined, done.manifest.count) == (3, COUNT - 3)
    lines = (tmp_path / "c" / "quarantine.jsonl").read_text()
    for name, reason in (
        ("class 2/005.png", "empty"),
        ("class 2/020.png", "no image"),
        ("class 0/033.png", "image"),
    ):
        (line,) = [line for line in lines.splitlines() if name in line]
        assert reason in line
    assert len(stored(tmp_path / "c")["mean"]) == COUNT - 3


def test_strict_stops_and_names_the_image(damaged, tmp_path):
    with pytest.raises(InputError, match=r"class \d/0\d\d\.png in .*--strict"):
        run(damaged, tmp_path / "c", strict=True)


def test_latents_that_are_not_finite_are_tried_in_fp32_then_quarantined(source, tmp_path):
    tokenizer = Stub(Overflowing())
    plan = plan_of(source, tokenizer, precision="bf16")
    done = run(source, tmp_path / "c", plan, tokenizer)
    brightest = [i for i in range(COUNT) if (4 * i + 1.5) / 127.5 - 1 > 0.8]
    assert done.quarantined == len(brightest) > 0
    assert "not finite, in fp32 either" in (tmp_path / "c" / "quarantine.jsonl").read_text()


def test_nothing_readable(tmp_path):
    images = make_images(tmp_path / "images", 3, bad=dict.fromkeys(range(3), b"bad"))
    with pytest.raises(CacheError, match="none of the 3 images could be encoded"):
        run(open_images(images), tmp_path / "c")


def test_a_name_that_is_no_unicode_can_be_quarantined(tmp_path):
    folder = str(tmp_path / "images" / "c").encode()
    Path(folder.decode()).mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "c" / "good.png")
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(b"bad")
    done = run(open_images(tmp_path / "images"), tmp_path / "c")
    assert (done.quarantined, done.manifest.count) == (1, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 6}, "batch_size"),
        ({"precision": "bf16"}, "dtype"),
        ({"threads": 99}, "settings"),
    ],
)
def test_another_plan_is_refused(source, tmp_path, change, field):
    plan = plan_of(source)
    run(source, tmp_path / "c", plan, rank=0, world=2)
    before = contents(tmp_path / "c")
    with pytest.raises(MismatchError, match=f"another {field}"):
        run(source, tmp_path / "c", plan_of(source, **change))
    assert contents(tmp_path / "c") == before


def test_a_resumed_encode_takes_the_threads_it_was_begun_with(source, tmp_path):
    assert planned_threads(tmp_path / "c") is None
    before = torch.get_num_threads()
    run(source, tmp_path / "c", plan_of(source, threads=1))
    assert planned_threads(tmp_path / "c") == 1
    assert torch.get_num_threads() == before


def test_rank_out_of_range(source, tmp_path):
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        run(source, tmp_path / "c", rank=2, world=2)
