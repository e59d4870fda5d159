"""A fake GPU: CUDA tensors that have a shape, a dtype and a device, but no numbers.

PyTorch's fake mode refuses to mix devices and to read a number on the host; `Gpu` also notes the
copies for which a host waits.
"""

import dataclasses
import inspect
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from generator_making import QUIET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.readings import Readings

aten = torch.ops.aten
PRODUCT = Path(inspect.getfile(Noise)).parents[1]
CUDA = torch.device("cuda", 0)
CPU, META = torch.device("cpu"), torch.device("meta")


class Gpu(TorchDispatchMode):
    """Sees each operation before `FakeTensorMode` does.

    Attributes:
        hidden: PyTorch's C++ part is told that the tensors are meta tensors. It would otherwise
            look for a GPU to begin a backward pass, and in a build without CUDA to index a tensor.
            Autocast has no effect then, so what uses it runs without both of these.
        waits: functions of ours in which a host would wait for a GPU that the fake one lets pass:
            copies between host and GPU that are not `non_blocking`, indices that lie on the host,
            and masks as indices, whose true places are counted first.
    """

    def __init__(self):
        super().__init__()
        self.hidden = True
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META if self.hidden and args[0].device == CUDA else args[0].device
        if kwargs.get("device") == META:
            kwargs["device"] = CUDA
        if func is aten._pin_memory.default:  # unknown to the fake mode, which has no memory
            return args[0]
        if self._waits(func, args, kwargs):
            self.waits.append(_caller())
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func, args, kwargs):
        if func is aten._to_copy.default:
            target = kwargs.get("device") or args[0].device
            return target != args[0].device and not kwargs.get("non_blocking")
        if func is aten.copy_.default:
            return args[0].device != args[1].device and True not in args[2:]
        if func in (aten.index.Tensor, aten.index_put_.default) and args[0].device == CUDA:
            given = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, torch.Tensor)]
            return any(t.device == CPU or t.dtype == torch.bool for t in given)
        return False


def _caller():
    """The function of ours that is being run."""
    frame = sys._getframe(2)
    while frame and not Path(frame.f_code.co_filename).is_relative_to(PRODUCT):
        frame = frame.f_back
    return frame.f_code.co_qualname if frame else "elsewhere"


def _apply(module, fn, recurse=True):
    """In place of `nn.Module._apply`, which swaps parameters in a way that fake ones refuse."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                part._parameters[name] = nn.Parameter(fn(old.detach()), old.requires_grad)
        for name, old in part._buffers.items():
            part._buffers[name] = old if old is None else fn(old)
    return module


@contextmanager
def fake_gpu(monkeypatch):
    """Runs in fake mode, with autocast and events as on a machine with a GPU."""
    monkeypatch.setattr(nn.Module, "_apply", _apply)
    # Looks at the numbers that it has drawn.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)
    # A copied tensor stays in the mode that it is of.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    with FakeTensorMode(), Gpu() as mode:
        yield mode


def autocast(gpu, precision):
    """As a training of this precision has it."""
    gpu.hidden = precision == "fp32"
    if not gpu.hidden and not torch.backends.cuda.is_built():
        pytest.skip("autocast of fake CUDA tensors needs a build of PyTorch with CUDA")
    return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")


def begun(gpu, monkeypatch, trainer, config, *arguments):
    """What a trainer gives to the training loop: `parts`, `update` and an accelerator."""
    found = SimpleNamespace()
    trained = []

    def prepared(model):  # as Accelerate does
        trained.append(model)
        model.forward = autocast(gpu, config.precision)(model.forward)
        return model

    def backward(loss):
        if gpu.hidden:
            loss.backward()
        else:
            for parameter in nn.ModuleList(trained).parameters():
                parameter.grad = torch.empty_like(parameter)

    found.accelerator = SimpleNamespace(
        device=CUDA,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        distributed_type="NO",
        prepare_model=prepared,
        no_sync=nullcontext,
        local_main_process_first=nullcontext,
        backward=backward,
        autocast=lambda: autocast(gpu, config.precision),
        reduce=lambda tensor, reduction: tensor,
    )
    monkeypatch.setattr(trainer, "start", lambda *_: (found.accelerator, config))
    monkeypatch.setattr(trainer, "train", lambda *_, **given: vars(found).update(given))
    train = getattr(trainer, trainer.__name__.rpartition(".")[2])
    train(config, *arguments, dataclasses.replace(QUIET, micro_batch=3))
    return found


def step(run, batch, number):
    """One step of the training loop: update, average, and the values' way to the log."""
    values = run.update(batch, number)
    run.parts.ema.update(run.parts.models["model"], 0.9)
    readings = Readings(run.accelerator)
    readings.add(number, batch.ids, values)
    readings.send()
    return values
