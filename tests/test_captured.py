"""CUDA graphs of functions: the same results, anew for other shapes, inputs read at each call."""

from contextlib import contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch

from detok_pipe.generators.captured import CapturedCall
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.noise import Noise

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_all_captures_share_a_stream_of_the_inputs_device(monkeypatch):
    """Workspaces are kept for each stream, and work on another device would not be captured."""
    made, captured_on = [], []

    def stream(device):
        made.append(Mock(device=device))
        return made[-1]

    @contextmanager
    def graph(graph, *, pool, stream):
        captured_on.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    captured = CapturedCall(lambda scale, x: x * 2)
    for rows in (2, 3, 2):
        captured(None, torch.zeros(rows, device="meta"))
    (only,) = made
    assert only.device == torch.device("meta")
    assert captured_on == [only] * 2


@pytest.mark.gpu
@needs_gpu
def test_replays_follow_their_inputs():
    weight = torch.randn(8, 8, device="cuda")
    runs = []

    def function(x, scale):
        runs.append(len(x))
        y = torch.nn.functional.silu(x @ weight)
        return y if scale is None else y * scale

    captured = CapturedCall(function)
    results = []
    for rows, scale in ((4, None), (4, 2.0), (4, 3.0), (6, 3.0), (4, None)):
        x = torch.randn(rows, 8, device="cuda")
        factor = None if scale is None else torch.tensor(scale, device="cuda")
        results.append((captured(x, factor), function(x, factor)))
    # Each of the three shapes runs twice, to warm up and to be captured; the others replay.
    assert len(runs) == 3 * 2 + 5
    for found, expected in results:  # a later replay leaves earlier results alone
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["mar-b", "raster-ar-b"])
def test_compiled_samples_are_the_same(name):
    torch.manual_seed(0)
    sizes = {"width": 64, "depth": 2, "heads": 2, "head_width": 64, "head_depth": 2}
    model = build_generator(name, grid=(4, 4), channels=4, num_classes=5, **sizes)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model = model.to("cuda").eval()
    labels, noise = torch.arange(3, device="cuda"), Noise(0, range(3), device="cuda")
    sampling = Sampling(guidance_scale=2.0, guidance_schedule="linear", steps=6, clip=3.0)
    expected = model.sample(labels, sampling, noise)
    model.compile_sampler()
    for _ in range(2):
        out = model.sample(labels, sampling, noise)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
