from unittest.mock import Mock

import pytest
import torch

from detok_pipe.pipelines.host_copies import HostCopies


def test_tensors_of_the_cpu_are_there_at_once() -> None:
    values = torch.arange(3.0)
    copies = HostCopies({"a": values})
    assert copies.arrived()
    assert copies.wait()["a"] is values


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_do_not_wait_for_what_is_asked_of_the_device_later() -> None:
    values = torch.arange(1000, device="cuda")
    copies = HostCopies({"a": values, "b": values + 1})
    torch.cuda._sleep(2_000_000_000)  # about a second
    arrived = copies.wait()
    assert not torch.cuda.current_stream().query()
    assert torch.equal(arrived["a"], torch.arange(1000))
    assert torch.equal(arrived["b"], torch.arange(1000) + 1)


def test_a_copy_is_marked_on_the_stream_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    event, stream = Mock(), object()
    event.query.return_value = False
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (stream, device))
    monkeypatch.setattr("detok_pipe.pipelines.host_copies._copy", lambda tensor: "on its way")
    copies = HostCopies({"a": Mock(device=torch.device("cuda", 1))})
    event.record.assert_called_once_with((stream, torch.device("cuda", 1)))
    assert not copies.arrived()
    assert copies.wait() == {"a": "on its way"}
    event.synchronize.assert_called_once_with()
