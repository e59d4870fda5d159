"""Sampling with the diffusion head, where most of the time of MAR, RandomAR and RasterAR goes.

Rows R are tokens of any images, C a token's channels, Z the condition's width, W the head's
width, S the steps of the chain.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from detok_pipe.generators.captured import CapturedCall
from detok_pipe.generators.diffusion import ReverseChain, reverse_step
from detok_pipe.generators.guidance import combine
from detok_pipe.generators.head_net import HeadNet
from detok_pipe.generators.layers import LAYER_NORM_EPS, on_device
from detok_pipe.generators.packed_linear import frozen_linear

# Rows x steps whose modulations are made at once: enough for full speed of the matrix product,
# few enough for a CPU's cache or a GPU's memory.
_ROWS_AHEAD_CPU, _ROWS_AHEAD_GPU = 512, 2048


class HeadSampler:
    """DDPM sampling with a `HeadNet`, arranged for many tokens and steps.

    What depends on no token is made once here (time embeddings, the modulations' weights of all
    layers in one matrix with the LayerNorms' affine parts folded in); what depends on the
    condition but not on x_t is made for many steps in one matrix product. The loop over steps
    has static shapes, no number from the host that changes between tokens, and never waits for
    the device.

    Args:
        guided_channels: guide the first so many of a token's channels (None: all).
        compiled: compile the step; on CUDA, replay the whole loop as one graph, captured once
            for each number of rows.
    """

    def __init__(
        self,
        net: HeadNet,
        chain: ReverseChain,
        guided_channels: int | None,
        *,
        compiled: bool = False,
    ) -> None:
        self.net = net
        self.chain = chain
        self.guided_channels = guided_channels
        self.width = net.input_proj.out_features
        device = net.input_proj.weight.device
        self.time = net.time_embed(on_device(self.chain.timestep_map, device))  # (S, W)
        weights, biases = [], []
        for block in net.blocks:
            (shift, scale, gate), bias = block.adaLN_modulation.chunks(3)
            shift_bias, scale_bias, gate_bias = bias
            gain, offset = block.in_ln.weight, block.in_ln.bias
            # LN = gain n + offset, so LN (1 + scale) + shift
            #    = n [gain (1 + scale)] + [offset (1 + scale) + shift].
            weights += [shift + offset[:, None] * scale, gain[:, None] * scale, gate]
            biases += [shift_bias + offset * (1 + scale_bias), gain * (1 + scale_bias), gate_bias]
        (shift, scale), (shift_bias, scale_bias) = net.final_layer.adaLN_modulation.chunks(2)
        self.modulations = frozen_linear(
            torch.cat((*weights, shift, scale)),  # ((3 depth + 2) W, W)
            torch.cat((*biases, shift_bias, 1 + scale_bias)),
        )
        self._step: Callable[..., Tensor] = torch.compile(head_step) if compiled else head_step
        captured = compiled and device.type == "cuda"
        self._run: Callable[..., Tensor] = CapturedCall(self._loop) if captured else self._loop

    def __call__(self, condition: Tensor, draws: Tensor, scale: float = 1.0) -> Tensor:
        """Denoise R rows.

        With guidance only eps is guided; the variance is the conditional half's.

        Args:
            condition: (R, Z); where `scale` is not 1, (2R, Z): conditional, then null rows.
            draws: (S + 1, R, C) fp32 normals: the start, then one a step (the last is unused).
            scale: guidance scale.

        Returns:
            (R, C) fp32.
        """
        guided = None if scale == 1.0 else torch.full((), scale, device=draws.device)
        return self._run(condition, draws.contiguous(), guided)

    def _loop(self, condition: Tensor, draws: Tensor, scale: Tensor | None) -> Tensor:
        condition = self.net.cond_embed(condition)  # (R or 2R, W)
        rows = _ROWS_AHEAD_CPU if condition.device.type == "cpu" else _ROWS_AHEAD_GPU
        ahead = max(1, rows // max(1, len(condition)))
        x = draws[0]
        for last in range(self.chain.steps - 1, -1, -ahead):
            first = max(0, last + 1 - ahead)
            y = F.silu(self.time[first : last + 1, None] + condition)  # (s, R, W)
            parts = self.modulations(y).unflatten(-1, (-1, self.width))
            for i in range(last, first - 1, -1):
                x = self.step(i, x, parts[i - first], draws[self.chain.steps - i], scale)
        return x

    def step(self, i: int, x: Tensor, parts: Tensor, draw: Tensor, scale: Tensor | None) -> Tensor:
        """x_{i-1} (R, C) from x_i; see `head_step`."""
        row, clip = self.chain.table[i], self.chain.clip
        return self._step(self.net, x, parts, row, draw, scale, self.guided_channels, clip)


def head_step(
    net: HeadNet,
    x: Tensor,
    parts: Tensor,
    row: Tensor,
    draw: Tensor,
    scale: Tensor | None,
    guided_channels: int | None,
    clip: float | None,
) -> Tensor:
    """One step of the chain, guided where there is a scale.

    Args:
        x: (R, C) fp32. parts: (R or 2R, 3 depth + 2, W), the modulations at this step.
        row: of the chain's table. draw: (R, C) fp32. scale: (), None for no guidance.
    """
    eps, v = _modulated(net, x.to(parts.dtype), parts).float().chunk(2, dim=-1)
    if scale is not None:
        eps_cond, eps_null = eps.chunk(2)
        eps = combine(eps_cond, eps_null, scale, guided_channels)
        v = v[: len(x)]
    return reverse_step(row, x, eps, v, draw, clip)


def _modulated(net: HeadNet, x: Tensor, parts: Tensor) -> Tensor:
    """x (R, C), shared by both halves of `parts` under guidance -> (R or 2R, 2C)."""
    part = parts.unbind(1)
    h = net.input_proj(x)
    if len(h) != len(parts):
        h = h.repeat(2, 1)
    width = h.shape[1:]
    for j, block in enumerate(net.blocks):
        shift, scale, gate = part[3 * j : 3 * j + 3]
        n = F.layer_norm(h, width, eps=LAYER_NORM_EPS)
        h = torch.addcmul(h, gate, block.mlp(torch.addcmul(shift, n, scale)))
    shift, scale = part[-2:]
    n = F.layer_norm(h, width, eps=LAYER_NORM_EPS)
    return net.final_layer.linear(torch.addcmul(shift, n, scale))
