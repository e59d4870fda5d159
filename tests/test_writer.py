"""Exactly once, bit-identical, normalised: what the writing side promises."""

import itertools
import json

import numpy as np
import pytest
from cache_making import encode_shard, label_of, moments_of, plan_of, tree, write_cache
from safetensors.numpy import load

from detok_pipe.latents import publish
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CacheError, ConfigError, MismatchError, NonFiniteError
from detok_pipe.latents.raw_rows import dense_rows, raw_pieces
from detok_pipe.latents.stats import LatentStats
from detok_pipe.latents.writer import CacheWriter

FORMATS = ("webdataset", "zarr")
BAD = (3, 11, 12, 36)


def direct_rows(cache, view):
    """fp32 rows and std computed straight from the moments, with the cache's statistics."""
    mean, std = moments_of(cache.source_ids, view)
    m, s = cache.stats.mean, cache.stats.std
    return (mean - m) / s, std / s


@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("bad", [(), BAD, tuple(range(29)), tuple(range(1, 37))])
def test_each_image_once_normalised_with_exact_statistics(tmp_path, store_format, bad):
    write_cache(tmp_path / "c", plan_of(format=store_format), bad)
    cache = open_cache(tmp_path / "c")
    good = [i for i in range(37) if i not in bad]
    assert sorted(cache.source_ids) == good
    assert cache.num_rows + cache.manifest.quarantined == 37
    np.testing.assert_array_equal(cache.labels, label_of(cache.source_ids))

    every = np.concatenate([moments_of(good, v)[0] for v in ("image", "mirror")])
    every = every.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(cache.stats.mean, every.mean(0), rtol=1e-6)
    np.testing.assert_allclose(cache.stats.std, every.std(0), rtol=1e-6)

    means = []
    for view in ("image", "mirror"):
        rows = np.arange(cache.num_rows)
        for field, wanted in zip(("mean", "std"), direct_rows(cache, view), strict=True):
            found = cache.rows(rows, view, field).astype(np.float64)
            ulp = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64)
            assert (np.abs(found - wanted) <= ulp).all()
            means.append(found) if field == "mean" else None
    written = np.concatenate(means).reshape(-1, 4)
    np.testing.assert_allclose(written.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(written.std(0), 1, atol=1e-3)

    lines = (tmp_path / "c" / "quarantine.jsonl").read_bytes().splitlines()
    assert [json.loads(x)["source_id"] for x in lines] == sorted(bad)
    assert all(json.loads(x)["reason"] == "cut short" for x in lines)


@pytest.mark.parametrize("store_format", FORMATS)
def test_bit_identical_for_any_processes_and_restarts(tmp_path, store_format):
    plan = plan_of(format=store_format)
    write_cache(tmp_path / "1", plan, BAD)
    wanted = tree(tmp_path / "1")
    for world in (2, 4):
        write_cache(tmp_path / str(world), plan, BAD, world=world)
        assert tree(tmp_path / str(world)) == wanted
    # Two of four processes write one shard each and stop; three others go on.
    writer = CacheWriter.open(tmp_path / "r", plan)
    for rank in (1, 3):
        shard = writer.pending(rank, 4)[0]
        writer.commit(shard, *encode_shard(writer, shard, BAD))
    write_cache(tmp_path / "r", plan, BAD, world=3)
    assert tree(tmp_path / "r") == wanted
    assert not [p for p in wanted if p.startswith((".", "_"))]


def test_a_finished_cache_is_found_done(tmp_path):
    writer = write_cache(tmp_path / "c")
    before = tree(tmp_path / "c")
    again = CacheWriter.open(tmp_path / "c", plan_of())
    assert again.finished
    assert again.is_complete()
    assert again.pending(0, 1) == []
    assert again.finalize() == writer.finalize()
    assert tree(tmp_path / "c") == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2),
        ("batch_size", 7),
        ("encoder", {"fingerprint": "f" * 64}),
        ("preprocessing", {"crop": "adm", "size": 128}),
        ("sources", {"hash": "t" * 64, "count": 37}),
        ("views", ("image",)),
        ("class_names", ("cat",)),
        ("stats", LatentStats.identity(4)),
    ],
)
def test_another_plan_is_refused_and_its_field_named(tmp_path, field, value):
    CacheWriter.open(tmp_path / "c", plan_of())
    with pytest.raises(MismatchError, match=f"another {field}"):
        CacheWriter.open(tmp_path / "c", plan_of(**{field: value}))


def test_fingerprint_follows_what_makes_the_rows_and_nothing_else(tmp_path):
    def fingerprint(name, **changes):
        write_cache(tmp_path / name, plan_of(**changes))
        return open_cache(tmp_path / name).fingerprint

    prints = {
        "base": fingerprint("base"),
        "encoder": fingerprint("encoder", encoder={"fingerprint": "f" * 64}),
        "crop": fingerprint("crop", preprocessing={"crop": "none", "size": 256}),
        "size": fingerprint("size", preprocessing={"crop": "adm", "size": 128}),
        "sources": fingerprint("sources", sources={"hash": "t" * 64, "count": 37}),
        "stats": fingerprint("stats", stats=LatentStats.identity(4)),
        "version": fingerprint("version", encode_version=2),
    }
    assert len(set(prints.values())) == len(prints)
    assert fingerprint("zarr", format="zarr") == prints["base"]


def test_a_newer_release_alone_gives_the_same_fingerprint_and_rows(tmp_path, monkeypatch):
    write_cache(tmp_path / "old", plan_of())
    monkeypatch.setattr(publish, "library_versions", lambda: {"detok-pipe": "99.0"})
    write_cache(tmp_path / "new", plan_of())
    old, new = open_cache(tmp_path / "old"), open_cache(tmp_path / "new")
    assert old.manifest.created_with != new.manifest.created_with
    assert old.fingerprint == new.fingerprint
    assert old.manifest.files == new.manifest.files


def test_given_statistics_are_used_and_recorded(tmp_path):
    stats = LatentStats(np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5]), source="published")
    write_cache(tmp_path / "c", plan_of(stats=stats))
    cache = open_cache(tmp_path / "c")
    assert cache.stats == stats
    wanted, _ = direct_rows(cache, "image")
    np.testing.assert_array_equal(cache.rows(range(37)), wanted.astype(np.float16))


def test_one_image_one_view_mean_only(tmp_path):
    plan = plan_of(1, views=("image",), fields=("mean",), sources={"hash": "x", "count": 1})
    writer = CacheWriter.open(tmp_path / "c", plan)
    mean, _ = moments_of([0], "image")
    writer.commit(0, {"image": (mean, None)}, np.array([2]), np.array([0]))
    writer.finalize()
    cache = open_cache(tmp_path / "c")
    assert cache.num_rows == 1
    assert not cache.has_posterior
    assert cache.rows([0, 0]).shape == (2, 6, 4)
    with pytest.raises(CacheError, match="no image/std; it has image/mean"):
        cache.rows([0], field="std")
    with pytest.raises(IndexError):
        cache.rows([1])


def test_unfinished_says_what_is_missing_and_how_to_go_on(tmp_path):
    writer = CacheWriter.open(tmp_path / "c", plan_of())
    writer.commit(2, *encode_shard(writer, 2))
    for act in (lambda: open_cache(tmp_path / "c"), writer.finalize):
        with pytest.raises(CacheError, match="4 of its 5 shards are missing; run the same encode"):
            act()
    write_cache(tmp_path / "c", finalize=False)
    with pytest.raises(CacheError, match="run `detok-pipe finalize"):
        open_cache(tmp_path / "c")
    CacheWriter.resume(tmp_path / "c").finalize()
    assert open_cache(tmp_path / "c").num_rows == 37


def test_not_a_cache(tmp_path):
    with pytest.raises(CacheError, match="no such folder"):
        open_cache(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(CacheError, match="is no latent cache"):
        open_cache(tmp_path / "full")
    with pytest.raises(ConfigError, match=r"not empty \(thesis.txt\)"):
        CacheWriter.open(tmp_path / "full", plan_of())
    with pytest.raises(ConfigError, match="is a file"):
        CacheWriter.open(tmp_path / "full" / "thesis.txt", plan_of())


def test_commit_refuses_what_does_not_fit(tmp_path):
    writer = CacheWriter.open(tmp_path / "c", plan_of())
    moments, labels, ids, _ = encode_shard(writer, 0)
    moments["mirror"][0][3, 2, 1] = np.nan
    with pytest.raises(NonFiniteError, match=f"image {ids[3]} \\(mirror\\)"):
        writer.commit(0, moments, labels, ids)
    moments, labels, ids, _ = encode_shard(writer, 0)
    for arguments in (
        (moments, labels, ids[::-1].copy()),
        (moments, labels[:-1], ids),
        (moments, np.where(labels == 2, 3, labels), ids),  # three names
        (moments, np.where(labels == -1, -2, labels), ids),
        ({"image": moments["image"]}, labels, ids),
        (moments, labels, ids, [(int(ids[0]), "p", "r")]),
        ({k: (m[:-1], s[:-1]) for k, (m, s) in moments.items()}, labels, ids),
    ):
        with pytest.raises(ConfigError):
            writer.commit(0, *arguments)
    assert writer.missing() == [0, 1, 2, 3, 4]


def test_all_images_bad(tmp_path):
    with pytest.raises(CacheError, match=r"none of the 37 images .*; the first: dir/"):
        write_cache(tmp_path / "c", bad=tuple(range(37)))


def test_overflow_of_fp16_is_named(tmp_path):
    tiny = LatentStats(np.zeros(4), np.full(4, 1e-5))
    with pytest.raises(NonFiniteError, match=r"image \d+ .* too large for fp16"):
        write_cache(tmp_path / "c", plan_of(stats=tiny))


def test_second_writer_of_a_shard_changes_nothing(tmp_path):
    plan = plan_of()
    a = CacheWriter.open(tmp_path / "c", plan)
    b = CacheWriter.open(tmp_path / "c", plan)
    a.commit(0, *encode_shard(a, 0))
    moments, labels, ids, lost = encode_shard(b, 0)
    moments["image"][0][0] += 1e-6  # another device's last bits
    b.commit(0, moments, labels, ids, lost)
    write_cache(tmp_path / "c", plan)
    write_cache(tmp_path / "alone", plan)
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")


def test_damaged_raw_shard_is_found(tmp_path):
    writer = write_cache(tmp_path / "c", finalize=False)
    raw = next((tmp_path / "c" / "_raw").glob("00001-*"))
    data = bytearray(raw.read_bytes())
    data[-1] ^= 1
    raw.write_bytes(data)
    with pytest.raises(CacheError, match=r"missing or damaged; remove .*00001.json"):
        writer.finalize()
    (tmp_path / "c" / "_commit" / "00001.json").unlink()
    write_cache(tmp_path / "c")
    write_cache(tmp_path / "alone")
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")


def test_sources_are_kept_with_odd_names(tmp_path):
    paths = [f"a b/é\n{i}\udcff\u2028\x85.png" for i in range(37)]
    writer = CacheWriter.open(tmp_path / "c", plan_of(), paths=paths)
    for shard in writer.pending():
        writer.commit(shard, *encode_shard(writer, shard))
    writer.finalize()
    lines = (tmp_path / "c" / "sources.jsonl").read_bytes().splitlines()
    found = [json.loads(line.decode("utf-8", "surrogateescape"))["path"] for line in lines]
    assert found == paths
    assert any(r.path == "sources.jsonl" for r in open_cache(tmp_path / "c").manifest.files)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_raw_shards_are_safetensors(rows):
    rng = np.random.default_rng(0)
    wanted = {n: rng.standard_normal((rows, 2, 3), dtype=np.float32) for n in ("a", "image.mean")}
    found = load(b"".join(bytes(piece) for piece in raw_pieces(wanted)))
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("rows_per_shard", [1, 3, 8])
def test_dense_rows_fill_holes_from_the_end(rows_per_shard):
    for flags in itertools.product([False, True], repeat=8):
        valid = np.split(np.array(flags), range(rows_per_shard, 8, rows_per_shard))
        if not any(flags):
            continue
        shard, row = dense_rows(rows_per_shard, valid)
        pairs = zip(shard, row, strict=True)
        places = [int(np.flatnonzero(valid[s])[r]) + s * rows_per_shard for s, r in pairs]
        assert sorted(places) == list(np.flatnonzero(flags))
        count = sum(flags)
        assert all(p == i for i, p in enumerate(places) if flags[i])
        assert all(p >= count for i, p in enumerate(places) if not flags[i])
