import pytest
import torch

from detok_pipe.latents.errors import ConfigError
from detok_pipe.pipelines.devices import resolve_device, resolve_precision


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with two GPUs; the devices that were made the current one."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    return made_current


@pytest.mark.parametrize(
    ("name", "local_rank", "index"),
    [(None, None, 0), (None, "1", 1), ("cuda", "1", 1), ("cuda", "3", 1), ("cuda:1", "0", 1)],
)
def test_a_process_takes_its_own_gpu_or_the_one_named(
    name: str | None,
    local_rank: str | None,
    index: int,
    taken: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device(name) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)]


def test_the_cpu_is_taken_where_it_is_named(taken: list[torch.device]) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert not taken


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {name} cannot be used here"):
        resolve_device(name)


@pytest.mark.parametrize(
    ("device", "capabilities", "precision"),
    [
        ("cuda", {}, "bf16"),
        ("mps", {}, "fp32"),
        ("cpu", {"avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ("cpu", {"avx512_bf16": True, "amx_bf16": True}, "bf16"),
    ],
)
def test_auto_precision_is_bf16_where_it_is_faster(
    device: str, capabilities: dict[str, bool], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert resolve_precision("auto", torch.device(device)) == precision
    assert resolve_precision("fp32", torch.device(device)) == "fp32"
