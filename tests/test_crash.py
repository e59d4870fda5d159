"""Killed, interrupted, crowded, full, read-only: the next run completes it, bit for bit."""

import contextlib
import multiprocessing
import os
import random
import signal
import time

import pytest
from cache_making import tree, write_as

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.convert import convert
from detok_pipe.latents.errors import StorageError
from detok_pipe.latents.verify import verify

FORMATS = ("webdataset", "zarr")
KILLS = [8, pytest.param(150, marks=pytest.mark.soak)]


@pytest.fixture(scope="module")
def processes():
    """Children start in milliseconds, from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cache_making", "detok_pipe.latents.convert"])
    return context


def temporaries(path):
    return [name for name in tree(path) if ".tmp-" in name] if path.exists() else []


def begin(processes, function, *arguments):
    child = processes.Process(target=function, args=arguments)
    child.start()
    return child


def duration(processes, function, *arguments):
    start = time.monotonic()
    child = begin(processes, function, *arguments)
    child.join()
    assert child.exitcode == 0
    return time.monotonic() - start


def killed_until_done(processes, kills, seconds, function, *arguments):
    """Kills the function's process at random moments, then lets it finish."""
    rng = random.Random(kills)
    for _ in range(kills):
        child = begin(processes, function, *arguments)
        child.join(rng.uniform(0, seconds))
        child.kill()
        child.join()
    duration(processes, function, *arguments)


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("store_format", FORMATS)
def test_writer_and_finalize_killed_at_random_moments(processes, tmp_path, store_format, kills):
    seconds = duration(processes, write_as, tmp_path / "calm", store_format)
    wanted = tree(tmp_path / "calm")
    done = 0
    while done < kills:  # a cache takes a few kills at most, then it is finished
        path = tmp_path / f"c{done}"
        some = min(4, kills - done)
        killed_until_done(processes, some, seconds, write_as, path, store_format)
        assert tree(path) == wanted
        done += some


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("store_format", FORMATS)
def test_conversion_killed_at_random_moments(processes, tmp_path, store_format, kills):
    write_as(tmp_path / "source", next(f for f in FORMATS if f != store_format))
    write_as(tmp_path / "wanted", store_format)
    calm = tmp_path / "calm"
    seconds = duration(processes, convert, tmp_path / "source", calm, store_format)
    done = 0
    while done < kills:
        path = tmp_path / f"c{done}"
        some = min(4, kills - done)
        arguments = (tmp_path / "source", path, store_format)
        killed_until_done(processes, some, seconds, convert, *arguments)
        assert tree(path) == tree(tmp_path / "wanted")
        done += some


@pytest.mark.parametrize("store_format", FORMATS)
def test_several_writers_of_the_same_shards(processes, tmp_path, store_format):
    write_as(tmp_path / "alone", store_format)
    children = [
        begin(processes, write_as, tmp_path / "c", store_format, world) for world in (1, 1, 2, 3)
    ]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")


def test_ctrl_c_leaves_no_temporary_file(processes, tmp_path):
    seconds = duration(processes, write_as, tmp_path / "calm", "webdataset")
    rng = random.Random(0)
    for number in range(6):
        path = tmp_path / f"c{number}"
        child = begin(processes, write_as, path, "webdataset")
        child.join(rng.uniform(0.1, 1) * seconds)
        if child.is_alive():
            # The server reaps its children: one that has just ended has no process any more.
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGINT)
        child.join()
        assert temporaries(path) == []
        write_as(path, "webdataset")
        assert tree(path) == tree(tmp_path / "calm")


@pytest.mark.parametrize("store_format", FORMATS)
@pytest.mark.parametrize("converted", [False, True])
def test_disk_full_in_the_middle(small_disk, tmp_path, store_format, converted):
    disk, mount = small_disk
    write_as(tmp_path / "calm", store_format)
    wanted = tree(tmp_path / "calm")
    write_as(tmp_path / "source", next(f for f in FORMATS if f != store_format))
    errors = []
    for kilobytes in range(4, 600, 12):
        mount(f"remount,size={kilobytes}k")
        try:
            if converted:
                convert(tmp_path / "source", disk / "c", store_format)
            else:
                write_as(disk / "c", store_format)
            break
        except StorageError as error:
            errors.append(str(error))
        assert temporaries(disk) == []
    assert len(errors) > 3
    assert all("no space is left" in e and str(disk) in e for e in errors)
    assert tree(disk / "c") == wanted


def test_read_only_target(small_disk, tmp_path):
    disk, mount = small_disk
    mount("remount,size=2m")
    write_as(disk / "c", "zarr")
    mount("remount,ro")
    with pytest.raises(StorageError, match="read-only"):
        write_as(disk / "new", "webdataset")
    with pytest.raises(StorageError, match="read-only"):
        convert(disk / "c", disk / "new", "webdataset")
    # Reading needs no writing, nor does finding the cache finished.
    assert open_cache(disk / "c").rows([0]).shape[0] == 1
    assert verify(disk / "c") == []
    write_as(disk / "c", "zarr")
