import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import StorageError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write_and_fail(target, error):
    with atomic.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error


def test_file_appears_whole_and_replaces(tmp_path):
    target = tmp_path / "deep" / "a.bin"
    atomic.write_bytes(target, b"one")
    with atomic.atomic_file(target) as temporary:
        temporary.write_bytes(b"two")
        assert target.read_bytes() == b"one"
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    atomic.write_text(target, "old")
    with pytest.raises(error):
        write_and_fail(target, error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "run"
    for text in ("one", "two"):
        with atomic.atomic_folder(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / text).write_text(text)
        assert names(target / "sub") == [text]
    with pytest.raises(FileExistsError), atomic.atomic_folder(target) as temporary:
        temporary.mkdir()
    assert names(target) == ["sub"]
    assert names(tmp_path) == ["run"]


def test_json_refuses_nan(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"é": [1.5]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"é": [1.5]}
    with pytest.raises(ValueError):
        atomic.write_json(tmp_path / "b.json", float("nan"))
    assert names(tmp_path) == ["a.json"]


def test_exactly_one_creates(tmp_path):
    wins = []

    def create(i):
        if atomic.create_exclusive(tmp_path / "plan", str(i).encode()):
            wins.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(wins) == 1
    assert (tmp_path / "plan").read_text() == str(wins[0])
    assert names(tmp_path) == ["plan"]


def test_exclusive_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "link", no_links)
    assert atomic.create_exclusive(tmp_path / "a", b"1")
    assert not atomic.create_exclusive(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_disk_errors_name_the_path(tmp_path, code):
    target = tmp_path / "a.bin"
    with pytest.raises(StorageError, match=r"a\.bin"):
        write_and_fail(target, OSError(code, "from the disk"))
    assert names(tmp_path) == []


def test_crc32c_matches_the_published_check_value(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    assert atomic.crc32c_file(tmp_path / "a") == 0xE3069283  # RFC 3720's polynomial, check value


def test_kill_leaves_only_a_temporary(tmp_path):
    code = (
        "import sys, os, signal; from detok_pipe.latents.atomic import atomic_file\n"
        "with atomic_file(sys.argv[1]) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    assert len(names(tmp_path)) == 1
    atomic.remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_a_folder_goes_at_once_and_what_cannot_be_deleted_stays_as_a_temporary(
    tmp_path, monkeypatch
):
    def busy(*_, **__):
        raise OSError(errno.EBUSY, "held open")

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    atomic.remove_folder(tmp_path / "first")
    assert names(tmp_path) == ["second"]
    monkeypatch.setattr(os, "unlink", busy)
    atomic.remove_folder(tmp_path / "second")
    monkeypatch.undo()
    assert [name[:5] for name in names(tmp_path)] == [atomic.TEMPORARY_PREFIX]
    atomic.remove_temporaries(tmp_path)
    assert names(tmp_path) == []


def test_a_dangling_link_as_target_is_a_storage_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="a link that leads nowhere"):
        atomic.create_exclusive(tmp_path / "link" / "plan.json", b"")
