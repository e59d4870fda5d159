"""What we write, read by plain zarr-python and plain webdataset only; conversion is bit-exact."""

import json
import re
import signal

import numpy as np
import pytest
import webdataset as wds
import zarr
from cache_making import CHANNELS, TOKENS, plan_of, tree, write_cache
from generator_making import QUIET, recipe, write_latents

from detok_pipe.latents import publish
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.convert import convert
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError
from detok_pipe.latents.manifest import read_manifest
from detok_pipe.latents.verify import verify
from detok_pipe.latents.writer import CacheWriter
from detok_pipe.pipelines.train_generator import train_generator

BAD = (3, 11, 12, 36)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    path = tmp_path_factory.mktemp("tars") / "c"
    write_cache(path, plan_of(), BAD)
    return path


@pytest.fixture(scope="module")
def zarrs(tmp_path_factory):
    path = tmp_path_factory.mktemp("zarrs") / "c"
    write_cache(path, plan_of(format="zarr"), BAD)
    return path


def urls(path, view):
    return sorted(str(p) for p in (path / view).glob("*.tar"))


@pytest.mark.parametrize("view", ["image", "mirror"])
def test_plain_webdataset(tars, view):
    dataset = wds.WebDataset(urls(tars, view), shardshuffle=False).decode()
    samples = list(dataset.to_tuple("mean.npy", "std.npy", "label.npy").unbatched())
    cache = open_cache(tars)
    assert len(samples) == cache.num_rows
    mean, std, label = (np.stack(values) for values in zip(*samples, strict=True))
    rows = np.arange(cache.num_rows)
    np.testing.assert_array_equal(mean, cache.rows(rows, view, "mean"))
    np.testing.assert_array_equal(std, cache.rows(rows, view, "std"))
    np.testing.assert_array_equal(label, cache.labels)
    assert mean.dtype == np.float16


def test_plain_webdataset_one_row_a_record(tmp_path):
    write_cache(tmp_path / "c", plan_of(10, rows_per_record=1, views=("image",)))
    dataset = wds.WebDataset(urls(tmp_path / "c", "image"), shardshuffle=False).decode()
    samples = list(dataset)
    cache = open_cache(tmp_path / "c")
    assert [s["mean.npy"].shape for s in samples] == [(TOKENS, CHANNELS)] * 10
    assert [int(s["label.npy"]) for s in samples] == cache.labels.tolist()
    assert [s["json"]["first_row"] for s in samples] == list(range(10))
    assert len({s["__key__"] for s in samples}) == 10
    means = np.stack([s["mean.npy"] for s in samples])
    np.testing.assert_array_equal(means, cache.rows(range(10)))


@pytest.mark.parametrize("rows_per_record", [1, 4])
def test_tars_are_bit_for_bit_those_of_webdataset(tmp_path, rows_per_record):
    write_cache(tmp_path / "c", plan_of(21, rows_per_record=rows_per_record))
    cache = open_cache(tmp_path / "c")
    for shard in range(3):
        stop = min(8 * shard + 8, 21)
        with open(tmp_path / "tar", "wb") as file:
            writer = wds.TarWriter(file, mtime=0, user="", group="")
            for number, start in enumerate(range(8 * shard, stop, rows_per_record)):
                rows = np.arange(start, min(start + rows_per_record, stop))
                arrays = {
                    "label.npy": cache.labels[rows],
                    "mean.npy": cache.rows(rows, "mirror", "mean"),
                    "std.npy": cache.rows(rows, "mirror", "std"),
                }
                if rows_per_record == 1:
                    arrays = {name: values[0] for name, values in arrays.items()}
                about = {"view": "mirror", "first_row": start, "rows": len(rows)}
                sample = {"__key__": f"{shard:05d}-{number:05d}", "json": about, **arrays}
                writer.write(sample)
            writer.close()
        ours = (tmp_path / "c" / "mirror" / f"{shard:05d}.tar").read_bytes()
        assert ours == (tmp_path / "tar").read_bytes()


def test_plain_zarr(zarrs):
    root = zarr.open(zarrs, mode="r")
    cache = open_cache(zarrs)
    rows = np.arange(cache.num_rows)
    for number, view in enumerate(("image", "mirror")):
        for field in ("mean", "std"):
            array = root[f"v{number}/{field}"]
            assert array.shape == (33, TOKENS, CHANNELS)
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array[:], cache.rows(rows, view, field))
            np.testing.assert_array_equal(array[31], cache.rows([31], view, field)[0])
    np.testing.assert_array_equal(root["labels"][:], cache.labels)
    np.testing.assert_array_equal(root["source_ids"][:], cache.source_ids)
    assert root.attrs["statistics"]["mean"] == cache.stats.mean.tolist()
    assert root.attrs["class_names"] == ["cat", "dog", "bird"]


@pytest.mark.parametrize("count", [1, 4, 9, 15, 16])
def test_shards_are_bit_for_bit_those_of_zarr_python(tmp_path, count):
    write_cache(tmp_path / "c", plan_of(count, format="zarr"))
    cache = open_cache(tmp_path / "c")
    array = zarr.create_array(
        tmp_path / "z",
        shape=(count, TOKENS, CHANNELS),
        dtype="float16",
        chunks=(4, TOKENS, CHANNELS),
        shards=(8, TOKENS, CHANNELS),
        compressors=None,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    for start in range(0, count, 8):  # whole shards, as documented
        rows = np.arange(start, min(start + 8, count))
        array[start : start + 8] = cache.rows(rows)
    for shard in range(-(-count // 8)):
        ours = (tmp_path / "c" / "v0" / "mean" / "c" / str(shard) / "0" / "0").read_bytes()
        theirs = (tmp_path / "z" / "c" / str(shard) / "0" / "0").read_bytes()
        assert ours == theirs


def test_conversion_there_and_back_is_bit_exact(tars, zarrs, tmp_path):
    there = convert(tars, tmp_path / "z", "zarr")
    assert tree(tmp_path / "z") == tree(zarrs)
    assert there.fingerprint == read_manifest(tars).fingerprint
    convert(tmp_path / "z", tmp_path / "t", "webdataset")
    assert tree(tmp_path / "t") == tree(tars)
    # The encode command that made the one finds the other done, if it asks for that format.
    assert CacheWriter.open(tmp_path / "z", plan_of(format="zarr")).finished
    before = tree(tmp_path / "z")
    convert(tars, tmp_path / "z", "zarr")
    assert tree(tmp_path / "z") == before


def test_conversion_to_other_records(tars, tmp_path):
    convert(tars, tmp_path / "t", "webdataset", rows_per_record=1)
    assert verify(tmp_path / "t") == []
    a, b = open_cache(tars), open_cache(tmp_path / "t")
    np.testing.assert_array_equal(a.rows(range(33), "mirror"), b.rows(range(33), "mirror"))
    with pytest.raises(ConfigError, match="multiple of rows_per_record"):
        convert(tars, tmp_path / "u", "zarr", rows_per_record=3)


def test_conversion_refuses(tars, tmp_path):
    with pytest.raises(ConfigError, match="the cache itself"):
        convert(tars, tars / ".." / "c", "zarr")
    write_cache(tmp_path / "other", plan_of(format="zarr", seed=9))
    with pytest.raises(MismatchError, match="another seed"):
        convert(tars, tmp_path / "other", "zarr")
    # The same plan, but other images were readable.
    write_cache(tmp_path / "same", plan_of(format="zarr"))
    with pytest.raises(MismatchError, match="holds another cache"):
        convert(tars, tmp_path / "same", "zarr")
    write_cache(tmp_path / "begun", plan_of(), finalize=False)
    with pytest.raises(CacheError, match="not finished"):
        convert(tmp_path / "begun", tmp_path / "x", "zarr")


def test_conversion_does_not_seal_damage_anew(tmp_path):
    write_cache(tmp_path / "c")
    shard = tmp_path / "c" / "image" / "00001.tar"
    data = bytearray(shard.read_bytes())
    data[1600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match=r"image/00001.tar has a wrong checksum"):
        convert(tmp_path / "c", tmp_path / "z", "zarr")
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("after", [0, 2, 4])
def test_conversion_goes_on_after_an_interruption(tars, zarrs, tmp_path, after):
    def stop(shard):
        if shard == after:
            raise KeyboardInterrupt(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(tars, tmp_path / "z", "zarr", progress=stop)
    with pytest.raises(CacheError, match="not finished"):
        open_cache(tmp_path / "z")
    convert(tars, tmp_path / "z", "zarr")
    assert tree(tmp_path / "z") == tree(zarrs)


def test_stored_shard_records_of_other_content_are_not_reused(tmp_path):
    """finalize was cut short; then a shard was lost and encoded again on another device."""
    from cache_making import encode_shard

    writer = write_cache(tmp_path / "c", finalize=False)

    def stop(shard):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.finalize(stop)
    record = json.loads((tmp_path / "c" / publish.COMMITS / "final-00000.json").read_text())
    assert record["files"]
    (tmp_path / "c" / publish.COMMITS / "00004.json").unlink()
    (tmp_path / "c" / publish.COMMITS / "00000.json").unlink()
    for shard in (0, 4):
        moments, *rest = encode_shard(writer, shard)
        moments["image"][0][:] += 0.5
        writer.commit(shard, moments, *rest)
    writer.finalize()
    assert verify(tmp_path / "c") == []


def test_a_run_goes_on_with_the_converted_cache_and_refuses_another(tmp_path):
    write_latents(tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "z", "zarr")
    write_latents(tmp_path / "other", count=40)
    train_generator(recipe(), tmp_path / "c", tmp_path / "run", QUIET, verify=True)
    train_generator(recipe(), tmp_path / "z", tmp_path / "run", QUIET)
    found, asked = (open_cache(tmp_path / name).fingerprint for name in ("c", "other"))
    wanted = f"cache: '{found}' there, '{asked}' now (sources.count: 50 there, 40 now)"
    with pytest.raises(MismatchError, match=re.escape(wanted)):
        train_generator(recipe(), tmp_path / "other", tmp_path / "run", QUIET)
