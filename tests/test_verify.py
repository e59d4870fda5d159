"""Every kind of damage is found, named by file, and mended where the images are there."""

import errno
import json
import shutil

import numpy as np
import pytest
from cache_making import encode_shard, plan_of, tree, write_cache

from detok_pipe.latents import verify as verification
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CacheError, DetokError, MismatchError
from detok_pipe.latents.manifest import read_manifest
from detok_pipe.latents.repair import repair
from detok_pipe.latents.verify import damaged_files, describe, verify
from detok_pipe.latents.writer import CacheWriter

FORMATS = ("webdataset", "zarr")
BAD = (3, 11, 12, 36)


@pytest.fixture(scope="module", params=FORMATS)
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "c"
    paths = [f"{i}.png" for i in range(37)]
    writer = CacheWriter.open(path, plan_of(format=request.param), paths=paths)
    for shard in writer.pending():
        writer.commit(shard, *encode_shard(writer, shard, BAD))
    writer.finalize()
    assert verify(path) == []
    return path


@pytest.fixture
def cache(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "c")
    return tmp_path / "c"


def encode(writer, shards):
    for shard in shards:
        writer.commit(shard, *encode_shard(writer, shard, BAD))


def never(writer, shards):
    raise AssertionError(f"nothing to encode, but {shards} were asked for")


def data_files(cache):
    manifest = read_manifest(cache)
    used = {e.file for extents in manifest.arrays.values() for e in extents}
    return [r.path for r in manifest.files if r.path in used]


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def check_mended(cache, whole):
    assert repair(cache, encode) == []
    assert tree(cache) == tree(whole)


def test_flipped_bit_in_any_file(cache, whole):
    for name in tree(whole):
        flip_a_bit(cache / name)
        problems = verify(cache)
        assert [p.file for p in problems] == [name], problems
        flip_a_bit(cache / name)
    flipped = [n for n in tree(whole) if n != "manifest.json" and not n.startswith("backup")]
    for name in flipped:
        flip_a_bit(cache / name)
    check_mended(cache, whole)


def test_processes_share_the_hashing(cache):
    names = [r.path for r in read_manifest(cache).files]
    assert damaged_files(cache) == []
    for name in names:
        flip_a_bit(cache / name)
    for world in (1, 3, 50):
        found = [
            p.file for rank in range(world) for p in damaged_files(cache, rank=rank, world=world)
        ]
        assert sorted(found) == sorted(names)


def test_truncated_or_missing_shard(cache, whole):
    first, *_, last = data_files(cache)
    (cache / first).write_bytes((cache / first).read_bytes()[:-1])
    (cache / last).unlink()
    for hashes in (True, False):
        problems = {p.file: p.message for p in verify(cache, hashes=hashes)}
        assert set(problems) == {first, last}
        assert "instead of" in problems[first]
        assert "is missing" in problems[last]
    with pytest.raises(CacheError, match="detok-pipe verify"):
        open_cache(cache)
    check_mended(cache, whole)


def test_a_manifest_or_a_folder_that_cannot_be_read(cache, whole):
    manifest = cache / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    problems = [str(problem) for problem in verify(cache)]
    assert problems[0].endswith(f"{manifest} cannot be read: Is a directory")
    manifest.rmdir()
    shutil.copy(whole / "manifest.json", manifest)
    name = data_files(cache)[0]
    folder = cache / name.split("/")[0]
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    assert f"{name} cannot be read: Not a directory" in map(str, verify(cache))


def test_a_shard_that_cannot_be_read_is_a_problem_and_mended(cache, whole, monkeypatch):
    name = data_files(cache)[0]
    crc32c_file = verification.crc32c_file
    unreadable = {cache / name}

    def refuse(path):
        if path in unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return crc32c_file(path)

    def encode_readable(writer, shards):
        encode(writer, shards)
        unreadable.clear()

    monkeypatch.setattr(verification, "crc32c_file", refuse)
    assert [str(p) for p in verify(cache)] == [f"{name} cannot be read: Permission denied"]
    assert repair(cache, encode_readable) == []
    check_mended(cache, whole)


def test_swapped_shards(cache, whole):
    a, b = data_files(cache)[0], data_files(cache)[len(data_files(cache)) // 2]
    one, two = (cache / a).read_bytes(), (cache / b).read_bytes()
    (cache / a).write_bytes(two)
    (cache / b).write_bytes(one)
    assert {p.file for p in verify(cache)} == {a, b}
    check_mended(cache, whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["stats"]["mean"].__setitem__(0, 0.5),
        lambda m: m.__setitem__("class_names", ["x", "y", "z"]),
        lambda m: m["encoder"].__setitem__("fingerprint", "0" * 64),
        lambda m: m.__setitem__("format_version", 2),
        lambda m: m.__setitem__("fingerprint", "0" * 64),
        lambda m: m.__setitem__("count", 12),
        lambda m: m.pop("files"),
        lambda m: m.__setitem__("extra", 1),
    ],
)
def test_edited_or_newer_manifest(cache, whole, change):
    edit(cache / "manifest.json", change)
    assert [p.file for p in verify(cache)] == ["manifest.json"]
    with pytest.raises(CacheError, match=r"manifest\.json"):
        open_cache(cache)
    assert repair(cache, never) == []
    assert tree(cache) == tree(whole)


def test_newer_version_says_update(cache):
    edit(cache / "manifest.json", lambda m: m.__setitem__("format_version", 2))
    with pytest.raises(CacheError, match="version 2, this release reads up to 1; update"):
        open_cache(cache)


def test_small_files_and_plan_come_back_without_images(cache, whole):
    for name in ("index.npy", "quarantine.jsonl", "plan.json", "backup/manifest.json"):
        (cache / name).write_bytes(b"")
    (cache / "sources.jsonl").unlink()
    assert len(verify(cache)) == 5
    assert repair(cache, never) == []
    assert tree(cache) == tree(whole)


def test_both_copies_gone_cannot_be_mended(cache):
    for name in ("manifest.json", "backup/manifest.json"):
        (cache / name).write_text("{}")
    assert [p.file for p in verify(cache)] == ["manifest.json", "backup/manifest.json"]
    with pytest.raises(CacheError, match="cannot be repaired"):
        repair(cache, encode)


def test_a_stray_shard_is_named(cache):
    name = data_files(cache)[-1]
    stray = (cache / name).with_name("99999.tar")
    shutil.copy(cache / name, stray)
    assert [p.file for p in verify(cache)] == [stray.relative_to(cache).as_posix()]


def test_repair_with_other_bits_records_them(cache):
    def another_device(writer, shards):
        for shard in shards:
            moments, *rest = encode_shard(writer, shard, BAD)
            moments["image"][0][:] *= 1.0005
            writer.commit(shard, moments, *rest)

    before = open_cache(cache)
    flip_a_bit(cache / data_files(cache)[0])
    assert repair(cache, another_device) == []
    after = open_cache(cache)
    assert after.fingerprint == before.fingerprint
    assert after.manifest.digest != before.manifest.digest


def test_repair_with_other_images_is_refused(cache):
    def without(writer, shards):
        for shard in shards:
            writer.commit(shard, *encode_shard(writer, shard, bad=range(37)))

    flip_a_bit(cache / data_files(cache)[0])
    with pytest.raises(MismatchError, match="could not be encoded at first"):
        repair(cache, without)


def test_rows_that_do_not_fit_their_statistics(cache):
    """Sealed anew after an edit: checksums agree, and yet the rows are not normalised so."""
    from detok_pipe.latents.manifest import write_manifest

    manifest = read_manifest(cache)
    stats = manifest.measured.model_copy(update={"mean": [m + 1 for m in manifest.measured.mean]})
    write_manifest(cache, manifest.model_copy(update={"measured": stats}).sealed())
    assert any("does not fit the rows" in str(p) for p in verify(cache))


def test_unfinished_and_absent(tmp_path):
    write_cache(tmp_path / "c", finalize=False)
    for path in (tmp_path / "c", tmp_path / "none"):
        with pytest.raises(DetokError):
            verify(path)
    facts = describe(tmp_path / "c")
    assert (facts["finished"], facts["shards"], facts["missing"]) == (False, 5, 0)


def test_describe(whole):
    facts = describe(whole)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["finished"]
    assert (facts["rows"], facts["quarantined"], facts["images"]) == (33, 4, 37)
    assert facts["labelled"] == int((open_cache(whole).labels >= 0).sum())
    assert facts["shards"] == 5
    assert np.allclose(facts["statistics"]["mean"], open_cache(whole).stats.mean)
