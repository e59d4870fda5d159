"""Published files: found, downloaded, and refused where the checksum is wrong."""

import hashlib
import ssl
import threading
from collections.abc import Iterator
from functools import partial
from http.client import HTTPResponse
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from detok_pipe.evaluation import weights
from detok_pipe.evaluation.weights import PublishedFile, find_published, load_state_dict
from detok_pipe.latents.errors import WeightsError

CONTENT = b"published bytes" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands between the tests and their own server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "file.pth").write_bytes(CONTENT)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/file.pth"
        http.shutdown()


def _file(url: str = "http://127.0.0.1:9/file.pth", sha256: str = DIGEST) -> PublishedFile:
    return PublishedFile("file.pth", url, sha256, "the test's weights", "or use others")


def test_weights_dir_comes_before_the_hub(hub: Path, tmp_path: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "file.pth").write_bytes(CONTENT)
    assert find_published(_file()) == hub / "file.pth"
    own = tmp_path / "own"
    own.mkdir()
    (own / "file.pth").write_bytes(CONTENT)
    assert find_published(_file(sha256=DIGEST[:8]), own) == own / "file.pth"


def test_missing_names_the_places_and_the_remedy(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        find_published(_file(), tmp_path / "own")
    for part in (str(tmp_path / "own"), str(hub), "http://127.0.0.1:9", "--weights-dir", "others"):
        assert part in str(error.value)
    with pytest.raises(WeightsError, match="switched off"):
        find_published(_file(), download=False)


def test_download_is_checked(hub: Path, server: str) -> None:
    with pytest.raises(WeightsError, match="expected 0000"):
        find_published(_file(server, "0" * 64))
    assert list(hub.iterdir()) == []
    assert find_published(_file(server)).read_bytes() == CONTENT
    with pytest.raises(WeightsError, match=r"404|not found|File not found"):
        find_published(PublishedFile("b", f"{server}.none", DIGEST, "purpose"))


@pytest.mark.parametrize("error", [ssl.SSLError(1, "bad record mac"), OSError(113, "no route")])
def test_a_broken_download_names_the_remedy(
    hub: Path, server: str, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def broken(self: HTTPResponse, *arguments: object) -> bytes:
        raise error

    monkeypatch.setattr(HTTPResponse, "read", broken)
    with pytest.raises(WeightsError, match=r"the download of .* failed: .*--weights-dir"):
        find_published(_file(server))
    assert list(hub.iterdir()) == []


def test_damaged_local_file_is_an_error_not_a_download(hub: Path, server: str) -> None:
    hub.mkdir(parents=True)
    (hub / "file.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match="damaged, cut short or another file"):
        find_published(_file(server))


def test_state_dicts_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save({"a": torch.ones(2)}, path)
    assert load_state_dict(path)["a"].tolist() == [1, 1]
    torch.save({"a": threading.Lock}, path)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_state_dict(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(WeightsError, match="no state dict"):
        load_state_dict(path)
    path.write_bytes(b"no zip")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_state_dict(path)


def test_inception_names_its_own_digest() -> None:
    assert weights.INCEPTION.sha256[:8] in weights.INCEPTION.name
