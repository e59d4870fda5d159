"""Caches from strangers: each attack ends in an error, never in code run or a file read outside."""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from cache_making import plan_of, write_cache

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import CacheError, DetokError
from detok_pipe.latents.manifest import Manifest, check_relative, read_manifest, write_manifest
from detok_pipe.latents.verify import verify


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    path = tmp_path_factory.mktemp("honest") / "c"
    write_cache(path, plan_of(format="zarr"))
    return path


@pytest.fixture
def cache(honest, tmp_path):
    shutil.copytree(honest, tmp_path / "c")
    return tmp_path / "c"


def seal(cache, change):
    """An attacker can compute digests too: an edited manifest with the right seal."""
    value = json.loads((cache / "manifest.json").read_text())
    change(value)
    files = [dict(record) for record in value["files"]]
    sealed = Manifest.model_construct(**value)
    content = {k: v for k, v in value.items() if k != "digest"}
    try:
        sealed = Manifest.model_validate(value | {"digest": ""}).sealed()
        write_manifest(cache, sealed)
    except ValueError:
        (cache / "manifest.json").write_text(json.dumps(content | {"digest": "", "files": files}))


def rename(value, old, new):
    for record in value["files"]:
        if record["path"] == old:
            record["path"] = new
    for extents in value["arrays"].values():
        for extent in extents:
            if extent["file"] == old:
                extent["file"] = new


SHARD = "v0/mean/c/0/0/0"


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "v0/../../secret",
        "/etc/passwd",
        "C:/x",
        "a\\b",
        "",
        ".",
        "v0//x",
        "a\0b",
        "./a",
    ],
)
def test_paths_must_be_plain(cache, name):
    with pytest.raises(ValueError, match="plain relative path"):
        check_relative(name)
    (cache.parent / "x").write_bytes((cache / SHARD).read_bytes())
    seal(cache, lambda m: rename(m, SHARD, name))
    with pytest.raises(CacheError, match="plain relative path"):
        open_cache(cache)


def test_symbolic_links_out_of_the_cache(cache):
    secret = cache.parent / "secret"
    shutil.move(cache / SHARD, secret)
    (cache / SHARD).symlink_to(secret)
    with pytest.raises(CacheError, match="lies outside the cache"):
        open_cache(cache)
    (cache / SHARD).unlink()
    shutil.move(secret, cache / SHARD)
    open_cache(cache)
    # The cache itself may be reached through a link.
    (cache.parent / "link").symlink_to(cache)
    assert open_cache(cache.parent / "link").rows([0]).shape[0] == 1
    folder = cache.parent / "elsewhere"
    shutil.move(cache / "v1", folder)
    (cache / "v1").symlink_to(folder)
    with pytest.raises(CacheError, match="lies outside the cache"):
        open_cache(cache)


def extent(m):
    return m["arrays"]["image/mean"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: extent(m).update(offset=10**9),
        lambda m: extent(m).update(stride=10**12),
        lambda m: extent(m).update(offset=-8),
        lambda m: extent(m).update(rows=10**15),
        lambda m: extent(m).update(rows_per_record=0),
        lambda m: extent(m).update(first_row=1),
        lambda m: extent(m).update(file="unlisted"),
        lambda m: m.update(grid=[1 << 39, 1 << 39]),
        lambda m: m.update(grid=[]),
        lambda m: m.update(count=10**9),
        lambda m: m.update(channels="4"),
        lambda m: m.update(dtype="object"),
        lambda m: m["stats"].update(std=[0, 1, 1, 1]),
        lambda m: m["stats"].update(mean=[float("nan")] * 4),
        lambda m: m["stats"].update(mean=[0.0]),
        lambda m: m.update(views=["image", "image"]),
        lambda m: m["files"].append(m["files"][0]),
        lambda m: m.update(files=[r for r in m["files"] if r["path"] != "index.npy"]),
        lambda m: m.update(format_version="1"),
        lambda m: m.pop("format_version"),
    ],
)
def test_hostile_manifests(cache, change):
    seal(cache, change)
    with pytest.raises(CacheError):
        open_cache(cache)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\xff", '{"format_version": 1}'])
def test_no_manifest_at_all(cache, text):
    (cache / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(CacheError):
        open_cache(cache)
    (cache / "manifest.json").unlink()
    (cache / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(DetokError):
        open_cache(cache)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickles_are_never_loaded(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = io.BytesIO()
    np.save(objects, np.array([Bomb()], dtype=object), allow_pickle=True)
    for data in (objects.getvalue(), pickle.dumps(Bomb())):
        replace_listed(cache, "index.npy", data)
        with pytest.raises(CacheError, match=r"index\.npy is damaged"):
            open_cache(cache)
        verify(cache)
    assert not (tmp_path / "exploded").exists()


def replace_listed(cache, name, data):
    """Replaces a file, and what the manifest says of it."""
    import google_crc32c

    (cache / name).write_bytes(data)
    manifest = read_manifest(cache)
    files = [
        r.model_copy(update={"bytes": len(data), "crc32c": google_crc32c.value(data)})
        if r.path == name
        else r
        for r in manifest.files
    ]
    write_manifest(cache, manifest.model_copy(update={"files": files}).sealed())


def test_an_index_that_claims_a_huge_array(cache):
    header = io.BytesIO()
    claim = {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
    np.lib.format.write_array_header_1_0(header, claim)
    replace_listed(cache, "index.npy", header.getvalue())
    with pytest.raises(CacheError, match=r"index\.npy is damaged"):
        open_cache(cache)


@pytest.mark.parametrize("label", [-2, 3, 1 << 30])
def test_labels_out_of_range(cache, label):
    index = np.load(cache / "index.npy")
    index["label"][5] = label
    buffer = io.BytesIO()
    np.save(buffer, index)
    replace_listed(cache, "index.npy", buffer.getvalue())
    with pytest.raises(CacheError, match=r"labels .*; the cache's are -1 \.\.\. 2"):
        open_cache(cache)


def test_a_tar_with_a_pickle_inside_is_only_bytes(tmp_path, monkeypatch):
    """Our reader maps offsets; it does not decode members, so a .pyd in a tar stays data."""
    import tarfile

    monkeypatch.chdir(tmp_path)
    write_cache(tmp_path / "c", plan_of(8))
    shard = tmp_path / "c" / "image" / "00000.tar"
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("00000-00000.pyd")
        data = pickle.dumps(Bomb())
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    replace_listed(tmp_path / "c", "image/00000.tar", shard.read_bytes())
    assert verify(tmp_path / "c") == []
    assert open_cache(tmp_path / "c").rows(range(8)).shape[0] == 8
    assert not (tmp_path / "exploded").exists()
