"""Sample stores: resumable, never mixed, and sound after kills and full disks."""

import json
import shutil

import numpy as np
import pytest

from detok_pipe.latents.errors import (
    CacheError,
    ConfigError,
    MismatchError,
    NonFiniteError,
    StorageError,
)
from detok_pipe.latents.sample_store import SampleStore, open_sample_store
from detok_pipe.latents.stats import LatentStats

IDENTITY = {"weights": "w" * 64, "sampling": {"guidance_scale": 3.5}, "seed": 0, "classes": [0, 1]}
Z = np.random.default_rng(0).standard_normal((10, 6, 4)).astype(np.float32)


def begin(path, identity=IDENTITY, **changes):
    settings = {
        "count": 10,
        "grid": (2, 3),
        "channels": 4,
        "rows_per_shard": 4,
        "stats": LatentStats(np.arange(4.0), np.ones(4)),
    }
    return SampleStore.open(path, identity, **(settings | changes))


def fill(store, rank=0, world=1):
    for shard, start, stop in store.pending(rank, world):
        store.commit(shard, Z[start:stop])


def test_any_processes_and_restarts_write_the_same(tmp_path):
    fill(begin(tmp_path / "one"))
    store = begin(tmp_path / "many")
    assert store.pending(1, 2) == [(1, 4, 8)]
    store.commit(1, Z[4:8])
    assert not store.complete
    store = begin(tmp_path / "many", extra={"ignored": 1})
    assert store.pending() == [(0, 0, 4), (2, 8, 10)]
    for rank in (2, 1, 0):
        fill(store, rank, 3)
    assert store.complete
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "many")]
    assert files[0] == files[1]
    assert sorted(files[0]) == [f"0000{k}.safetensors" for k in range(3)] + ["samples.json"]


def test_reads_any_span(tmp_path):
    fill(begin(tmp_path / "s", extra={"class_names": ["a", "b"]}))
    store = open_sample_store(tmp_path / "s")
    for span in ((0, 10), (3, 9), (4, 8), (5, 5), (9, 10)):
        np.testing.assert_array_equal(store.read(*span), Z[slice(*span)].astype(np.float16))
    assert store.identity == IDENTITY
    assert store.extra == {"class_names": ["a", "b"]}
    assert store.stats.mean.tolist() == [0, 1, 2, 3]
    assert store.verify() == []
    with pytest.raises(IndexError):
        store.read(0, 11)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("identity.seed", {"identity": IDENTITY | {"seed": 1}}),
        ("identity.sampling.guidance_scale", {"identity": IDENTITY | {"sampling": {"x": 1}}}),
        ("count", {"count": 11}),
        ("stats.std", {"stats": LatentStats(np.arange(4.0), np.full(4, 2.0))}),
    ],
)
def test_other_samples_are_refused_and_the_field_named(tmp_path, name, changes):
    begin(tmp_path / "s")
    with pytest.raises(MismatchError, match=f"their {name} is"):
        begin(tmp_path / "s", **changes)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / ".tmp-left").touch()
    begin(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for name in (".tmp-left", "thesis.tex"):
        (other / name).touch()
    with pytest.raises(ConfigError, match=r"not empty \(thesis\.tex\)"):
        begin(other)


def test_first_writer_wins(tmp_path):
    store = begin(tmp_path / "s")
    store.commit(0, Z[:4])
    store.commit(0, Z[4:8])
    np.testing.assert_array_equal(store.read(0, 4), Z[:4].astype(np.float16))


def test_bad_samples(tmp_path):
    store = begin(tmp_path / "s")
    for value in (np.nan, 1e6):
        z = Z[4:8].copy()
        z[1, 0, 0] = value
        with pytest.raises(NonFiniteError, match="sample 5 is not finite"):
            store.commit(1, z)
    with pytest.raises(ConfigError, match="shape"):
        store.commit(1, Z[:3])
    assert store.missing() == [0, 1, 2]


def test_damage_is_found(tmp_path):
    store = begin(tmp_path / "s")
    store.commit(0, Z[:4])
    store.commit(1, Z[4:8])
    with pytest.raises(CacheError, match="1 of 3 shards are; run the same sample command"):
        store.read(0, 10)
    for shard in (0, 1):
        path = tmp_path / "s" / f"0000{shard}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data if shard else data[:-5])
    problems = store.verify()
    assert len(problems) == 3
    assert "00000.safetensors is damaged" in problems[0]
    assert "00001.safetensors: its checksum is wrong" in problems[1]
    with pytest.raises(CacheError, match="is damaged"):
        store.read(0, 1)


def test_a_shard_of_another_store_is_refused(tmp_path):
    for seed in (0, 1):
        fill(begin(tmp_path / f"{seed}", IDENTITY | {"seed": seed}))
    shutil.copy(tmp_path / "0" / "00001.safetensors", tmp_path / "1")
    mixed = open_sample_store(tmp_path / "1")
    with pytest.raises(CacheError, match=r"00001\.safetensors belongs to other samples"):
        mixed.read(0, 10)
    assert len(mixed.verify()) == 1


def test_fifty_thousand_samples_of_sixteen_channels_take_410_megabytes(tmp_path):
    shape = {"grid": (16, 16), "channels": 16, "stats": LatentStats.identity(16)}
    store = begin(tmp_path, count=50_000, rows_per_shard=250, **shape)
    store.commit(0, np.zeros((250, 256, 16), np.float32))
    shard = (tmp_path / "00000.safetensors").stat().st_size
    assert 200 * shard == pytest.approx(410e6, rel=0.002)


def test_disk_full(small_disk, tmp_path):
    """A clear error, no part left behind, and what was written stays and is gone on with."""
    disk, mount = small_disk
    fill(begin(tmp_path / "calm"))
    errors = []
    for kilobytes in range(4, 100, 4):
        mount(f"remount,size={kilobytes}k")
        before = set(disk.rglob("*.safetensors"))
        try:
            fill(begin(disk / "s"))
            break
        except StorageError as error:
            errors.append(str(error))
        assert list(disk.rglob(".tmp-*")) == []
        assert before <= set(disk.rglob("*.safetensors"))
    assert len(errors) > 2
    assert all("no space is left" in error and str(disk) in error for error in errors)
    store = open_sample_store(disk / "s")
    assert store.complete
    assert store.verify() == []
    np.testing.assert_array_equal(store.read(0, 10), Z.astype(np.float16))


def test_headers_of_something_else(tmp_path):
    with pytest.raises(CacheError, match="holds no samples"):
        open_sample_store(tmp_path)
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        begin(tmp_path)
    store = begin(tmp_path / "s")
    header = json.loads((store.path / "samples.json").read_text())
    for change, message in (({"format_version": 99}, "update"), ({"grid": "x"}, "damaged")):
        (store.path / "samples.json").write_text(json.dumps(header | change))
        with pytest.raises(CacheError, match=message):
            open_sample_store(store.path)
    with pytest.raises(ConfigError):
        begin(tmp_path / "t", count=0)
