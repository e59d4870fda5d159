"""Replaying a function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CapturedCall:
    """A function whose kernels are launched together, as one CUDA graph.

    The graph is captured at the first call with inputs of these shapes and replayed afterwards,
    so the function must not look at values on the host, and what it reads besides its inputs
    must stay where it is. Replays share one memory pool: a result is copied out before the next.

    Args:
        function: of tensors on one CUDA device, or None in places; returns one tensor.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.pool = torch.cuda.graph_pool_handle()
        self.stream: torch.cuda.Stream | None = None
        self.graphs: dict[
            tuple[torch.Size | None, ...],
            tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Tensor],
        ] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The function's result, for inputs of the dtypes of the first call."""
        shapes = tuple(None if given is None else given.shape for given in inputs)
        if shapes not in self.graphs:
            self.graphs[shapes] = self._captured(inputs)
        graph, held, result = self.graphs[shapes]
        for place, given in zip(held, inputs, strict=True):
            if place is not None and given is not None:
                place.copy_(given)
        graph.replay()
        return result.clone()

    def _captured(
        self, inputs: tuple[Tensor | None, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor | None, ...], Tensor]:
        held = tuple(None if given is None else given.clone() for given in inputs)
        # The device of the inputs need not be the current one. One stream for all captures: the
        # libraries keep a workspace for each stream that they were ever called on.
        device = next(given.device for given in inputs if given is not None)
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        # Compiling and the workspaces must be done with before the capture, on another stream
        # than the default one.
        usual = torch.cuda.current_stream(device)
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            self.function(*held)
        usual.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = self.function(*held)
        return graph, held, result
