"""Caches and images at URLs, with fsspec's own local and memory file systems."""

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest
from cache_making import plan_of, tree, write_cache
from PIL import Image

from detok_pipe.latents import remote
from detok_pipe.latents.atomic import crc32c_file
from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import (
    CacheError,
    ConfigError,
    InputError,
    MismatchError,
    StorageError,
)
from detok_pipe.latents.manifest import read_manifest, write_manifest
from detok_pipe.latents.place import Place
from detok_pipe.latents.remote import is_remote, stage_files, staging_folder
from detok_pipe.latents.verify import verify
from detok_pipe.pipelines.images import open_images

BAD = (3, 11)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path, monkeypatch):
    """A URL where nothing is yet; staging folders lie in ``tmp_path``."""
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    if request.param == "file":
        yield f"file://{tmp_path}/far/cache"
    else:
        yield "memory://far/cache"
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def here(tmp_path):
    write_cache(tmp_path / "here", plan_of(), BAD)
    return tmp_path / "here"


def write(url, path, data):
    with fsspec.open(f"{url}/{path}", "wb") as file:
        file.write(data)


def read(url, path):
    with fsspec.open(f"{url}/{path}", "rb") as file:
        return file.read()


def published(url, here):
    """The cache ``here`` at the URL, as another machine would have put it there."""
    place = Place(url)
    shutil.copytree(here, place.folder)
    place.publish()
    shutil.rmtree(place.folder)
    return place


def test_what_is_a_url(tmp_path):
    assert is_remote("s3://bucket/x")
    assert is_remote("simplecache::gs://bucket/x")
    assert not is_remote("pipe:touch /tmp/x; curl http://x")
    for path in ("cache", "/data/cache", "./a:b", "C:\\cache"):
        assert not is_remote(path)
        assert Place(path).folder.name == path.rsplit("/", 1)[-1]
        assert Place(path).begin() == Place(path).folder


def test_there_and_back(url, here):
    place = published(url, here)
    assert place.fetch() == place.folder
    assert tree(place.folder) == tree(here)
    assert verify(place.folder) == []
    assert open_cache(place.folder).rows(range(5)).shape[0] == 5


def test_written_in_the_staging_folder_then_copied(url, here):
    place = Place(url)
    assert not place.begin().exists()
    write_cache(place.folder, plan_of(), BAD)
    place.publish()
    place.publish()  # the same command again finds it done
    shutil.rmtree(place.folder)
    assert tree(place.begin()) == tree(here)


class Stopped(Exception):
    """In the middle of a copy."""


def stop_after(monkeypatch, method, count):
    """Lets ``count`` copies through, then fails each time."""
    original, done, lock = getattr(remote.Remote, method), [], threading.Lock()

    def copy(self, *arguments):
        with lock:  # files are copied by several threads
            if len(done) >= count:
                raise Stopped
            done.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(remote.Remote, method, copy)
    return done


@pytest.mark.parametrize("count", [1, 4, 9])
def test_interrupted_copies_go_on(url, here, monkeypatch, count):
    place = Place(url)
    shutil.copytree(here, place.folder)
    with monkeypatch.context() as patch:
        stop_after(patch, "put", count)
        with pytest.raises(Stopped):
            place.publish()
    with pytest.raises(CacheError, match="no finished latent cache"):
        Place(url).fetch()
    with monkeypatch.context() as patch:
        done = stop_after(patch, "put", 10**6)
        place.publish()
    total = len(tree(here))
    assert len(done) == total - count
    shutil.rmtree(place.folder)
    with monkeypatch.context() as patch:
        stop_after(patch, "fetch", count)
        with pytest.raises(Stopped):
            place.fetch()
    with pytest.raises(CacheError):
        open_cache(place.folder)
    place.fetch()
    assert tree(place.folder) == tree(here)


def test_damage_there_is_named_and_never_taken_over(url, here):
    place = published(url, here)
    name = "image/00001.tar"
    data = bytearray(read(url, name))
    data[700] ^= 1
    write(url, name, bytes(data))
    with pytest.raises(CacheError, match=r"image/00001\.tar is damaged: its checksum is wrong"):
        place.fetch()
    assert not (place.folder / name).exists()
    write(url, "manifest.json", read(url, "manifest.json").replace(b"cat", b"cow"))
    with pytest.raises(CacheError, match="was changed after it was written"):
        place.fetch()


def test_what_is_wrong_there_is_sent_again(url, here):
    place = published(url, here)
    place.fetch()
    write(url, "image/00001.tar", b"cut")
    write(url, "manifest.json", b"{")
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        place.fetch()
    assert verify(place.fetch_whole_files()) == []
    assert [problem.file for problem in place.problems()] == ["manifest.json", "image/00001.tar"]
    (place.folder / "image" / "00000.tar").unlink()  # it is whole there
    place.publish()
    assert place.problems() == []
    assert tree(place.fetch()) == tree(here)
    write(url, "image/00001.tar", b"cut")
    (place.folder / "image" / "00001.tar").write_bytes(b"cut too")
    with pytest.raises(CacheError, match=r"00001\.tar is missing or damaged, and so is"):
        place.publish()


def test_shards_mended_with_other_bits_are_sent(url, here):
    place = published(url, here)
    file = place.fetch() / "image" / "00001.tar"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    manifest = read_manifest(place.folder)
    records = [
        r.model_copy(update={"crc32c": crc32c_file(file)}) if r.path == "image/00001.tar" else r
        for r in manifest.files
    ]
    write_manifest(place.folder, manifest.model_copy(update={"files": records}).sealed())
    place.publish()
    mended = tree(place.folder)
    shutil.rmtree(place.folder)
    assert tree(place.fetch()) == mended != tree(here)


def test_a_damaged_file_stays_known_until_it_is_replaced(url, here):
    place = published(url, here)
    whole = read(url, "image/00001.tar")
    write(url, "image/00001.tar", whole[:700] + b"x" + whole[701:])
    for _ in range(2):
        folder = place.fetch_whole_files()
        assert [str(p) for p in place.problems()] == [
            f"image/00001.tar had a wrong checksum at {url} when it was fetched"
        ]
    (folder / "image" / "00001.tar").write_bytes(whole)  # mended, then killed
    place.fetch_whole_files()
    assert len(place.problems()) == 1
    place.publish()
    assert place.problems() == []
    assert read(url, "image/00001.tar") == whole


def test_a_cache_that_was_replaced_there_is_fetched_anew(url, here, tmp_path):
    published(url, here).fetch()
    write_cache(tmp_path / "other", plan_of(20, seed=2), BAD)  # of fewer shards
    files, root = fsspec.core.url_to_fs(url)
    files.rm(root, recursive=True)
    for name, data in tree(tmp_path / "other").items():
        write(url, name, data)
    assert tree(Place(url).fetch()) == tree(tmp_path / "other")


def test_work_in_the_staging_folder_is_never_fetched_over(url, here):
    place = published(url, here)
    write_cache(place.folder, plan_of(seed=2), finalize=False)
    before = tree(place.folder)
    assert place.begin() == place.folder
    assert tree(place.folder) == before


def test_another_cache_there_is_not_overwritten(url, here, tmp_path):
    place = published(url, here)
    write_cache(place.folder, plan_of(seed=2), BAD)
    with pytest.raises(MismatchError, match="another cache"):
        place.publish()
    assert read(url, "manifest.json") == (here / "manifest.json").read_bytes()


def test_something_else_there_is_not_mixed_with(url, here):
    place = Place(url)
    shutil.copytree(here, place.folder)
    write(url, "thesis.tex", b"%")
    with pytest.raises(ConfigError, match=r"is not empty \(thesis\.tex\)"):
        place.publish()


def test_urls_that_cannot_be_opened(here, tmp_path, monkeypatch):
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    with pytest.raises(ConfigError, match="cannot be opened"):
        Place("carrier-pigeon://cache").fetch()
    with pytest.raises(InputError, match="does not exist or is empty"):
        stage_files(f"file://{tmp_path}/nowhere")
    with pytest.raises(CacheError, match="no finished latent cache at"):
        Place(f"file://{tmp_path}/nowhere").fetch()
    place = Place(f"file://{tmp_path}/file/below")
    (tmp_path / "file").write_bytes(b"")
    shutil.copytree(here, place.folder)
    with pytest.raises((StorageError, InputError), match="file/below"):
        place.publish()


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "no"), PermissionError("AccessDenied")]
)
def test_a_target_that_is_not_permitted(url, here, monkeypatch, error):
    place = Place(url)
    shutil.copytree(here, place.folder)

    def refused(*arguments, **options):
        raise error

    monkeypatch.setattr(type(fsspec.core.url_to_fs(url)[0]), "put_file", refused)
    with pytest.raises(StorageError, match=r"cannot write .*manifest\.json: not permitted"):
        place.publish()


def test_a_staging_folder_that_cannot_be_written(url, here, tmp_path, monkeypatch):
    published(url, here)
    (tmp_path / "taken").write_bytes(b"")
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "taken" / "staging"))
    with pytest.raises(StorageError, match="a part of the path is a file"):
        Place(url).fetch()


def test_several_processes_fetch_at_once(url, here):
    place = published(url, here)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Place(url).fetch(), range(4)))
    assert found == [place.folder] * 4
    assert tree(place.folder) == tree(here)


def test_hostile_names_do_not_leave_the_staging_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETOK_STAGING", str(tmp_path / "staging"))
    monkeypatch.setattr(
        remote.Remote, "listing", lambda self: {"../../x.png": {"size": 1}}, raising=True
    )
    with pytest.raises(InputError, match="not a plain relative path"):
        stage_files(f"file://{tmp_path}")


def test_images_at_a_url(url, tmp_path):
    folder = tmp_path / "images"
    for number in range(4):
        path = folder / f"class {number % 2}" / f"{number} é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        write(url, path.relative_to(folder).as_posix(), path.read_bytes())
    staged = open_images(stage_files(url))
    assert staged.identity == open_images(folder).identity
    assert [np.asarray(staged.load(i))[0, 0, 0] for i in range(4)] == [0, 2, 1, 3]
    # What changes there changes here, and only that is copied.
    kept = staging_folder(url) / "class 0" / "0 é.png"
    before = os.stat(kept).st_mtime_ns
    write(url, "class 0/2 é.png", (folder / "class 1" / "1 é.png").read_bytes())
    files = fsspec.core.url_to_fs(url)[0]
    files.rm(f"{fsspec.core.url_to_fs(url)[1]}/class 1/3 é.png")
    staged = open_images(stage_files(url))
    assert [np.asarray(staged.load(i))[0, 0, 0] for i in range(3)] == [0, 1, 1]
    assert len(staged) == 3
    assert os.stat(kept).st_mtime_ns == before
    one = stage_files(f"{url}/class 0/0 é.png")
    assert one.read_bytes() == kept.read_bytes()
