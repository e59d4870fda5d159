"""Linear layers for inference on a CPU in fp32, with their weights laid out once for oneDNN.

torch's own fp32 product arranges the weights anew in each call, which for few rows takes as long
as the product itself, and not all processors have fast code in the library that it calls (MKL).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer whose weights do not change any more.

    Shares the parameters of `linear`, under the same names. The second copy of the weights is
    made at the first call that can use it; all other calls go torch's way.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the second copy, which can be neither copied nor pickled."""
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        if (
            x.dtype != torch.float32
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return F.linear(x, self.weight, self.bias)
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), None)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def frozen_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer of weights (out, in) and a bias (out,) that do not change any more."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return PackedLinear(linear) if _can_pack(linear) else linear


def pack_linears(network: nn.Module) -> None:
    """Replace the linear layers of a network whose weights do not change any more.

    Does nothing on other devices than the CPU, and where torch comes without oneDNN.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and _can_pack(child):
                setattr(parent, name, PackedLinear(child))


def _can_pack(linear: nn.Linear) -> bool:
    return linear.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
