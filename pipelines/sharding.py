"""Networks whose parameters or activations are too many for one device.

A generator's transformer blocks, and those of its diffusion head, are the units: each is
sharded (FSDP), recomputed in the backward pass (activation checkpointing) or compiled alone.
Checkpoints hold whole tensors whatever the sharding, so a run may go on without it.
"""

from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from detok_pipe.latents.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the entries of its module lists."""
    return [
        child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
    ]


def checkpoint_activations(model: nn.Module) -> None:
    """Have the blocks compute their activations again in the backward pass, to the same bits."""
    units = set(blocks(model))
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: module in units
    )


def compile_blocks(model: nn.Module, *, sharded: bool = False) -> None:
    """Compile each block; equal ones share the code.

    Args:
        sharded: the model is going to be. FSDP's hooks, which lie on the block itself, would keep
            the whole from being compiled with its recomputation.
    """
    for block in blocks(model):
        (_within_checkpoint(block) if sharded else block).compile()


def _within_checkpoint(block: nn.Module) -> nn.Module:
    """The block itself, where `checkpoint_activations` has wrapped it."""
    return getattr(block, "_checkpoint_wrapped_module", block)


def _units(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes that are sharded one by one: the blocks, and what is called apart from them."""
    found: set[type[nn.Module]] = set()
    for block in blocks(model):
        inner = _within_checkpoint(block)
        found.add(type(inner))
        modulation: nn.Module | None = getattr(inner, "adaLN_modulation", None)
        if modulation is not None:  # is called by itself, before the block
            found.add(type(modulation))
    return tuple(sorted(found, key=lambda kind: kind.__name__))


def shard(model: nn.Module) -> nn.Module:
    """Shard a network over all processes, unit by unit; its parameters change."""
    units = _units(model)
    for module in reversed([m for m in model.modules() if isinstance(m, units)]):
        fully_shard(module)
    fully_shard(model)
    return model


def prepared(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> nn.Module:
    """The network as it is to be called in training: wrapped for several processes, or sharded.

    Accelerate's FSDP plugin shards as `shard` does, and puts the new parameters into ``optimizer``.

    Raises:
        ConfigError: the plugin is there, and has not sharded.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare_model(model)
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [kind.__name__ for kind in _units(model)]
    accelerator.prepare(model, optimizer)  # in place
    if not isinstance(model, FSDPModule):
        raise ConfigError("--fsdp: Accelerate did not shard the model; start it with its launcher")
    return model


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their shards put together; every process has to call."""
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in tensors.items()}


def whole_on_host(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """`whole` where they are ``wanted``, what was sharded on the host: no device has to hold more
    than one at a time. Every process has to call."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            full = tensor.full_tensor()
            if wanted:
                found[name] = full.cpu()
        elif wanted:
            found[name] = tensor
    return found


def as_sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's view of a whole tensor, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
