"""Copies to the host that nobody waits for before they are needed."""

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopies:
    """Tensors of one device on their way to the host.

    The copies are queued behind what has been asked of the device so far, not behind what is
    asked of it later, so the device can go on with the next batch meanwhile.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        self._copied: torch.cuda.Event | None = None
        device = next(iter(tensors.values())).device
        if device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))

    def arrived(self) -> bool:
        """Whether all are there."""
        return self._copied is None or self._copied.query()

    def wait(self) -> dict[str, Tensor]:
        """The copies, once all are there; of tensors on the CPU the tensors themselves."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copies


def _copy(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
