"""Diffusion head: a small MLP that denoises one token given a condition vector.

Li et al. 2024, "Autoregressive image generation without vector quantization". Rows R are tokens
of any images, C a token's channels, Z the condition's width, W the head's width. Cosine schedule
of 1000 steps, eps prediction, learned-range variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detok_pipe.generators.captured import CapturedCall
from detok_pipe.generators.diffusion import (
    TRAIN_STEPS,
    GaussianDiffusion,
    ReverseChain,
    reverse_step,
)
from detok_pipe.generators.guidance import combine
from detok_pipe.generators.layers import (
    LAYER_NORM_EPS,
    AnyNoise,
    FinalLayer,
    Modulation,
    TimeEmbedding,
    init_linear_layers,
    modulate,
)
from detok_pipe.generators.sampling import Sampling

# Rows x steps whose modulations are made at once while sampling: enough for full speed of the
# matrix product, few enough for memory.
_ROWS_AHEAD = 2048


class ResidualBlock(nn.Module):
    """x + gate * MLP(modulated LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(modulate(self.in_ln(x), shift, scale)))


class HeadNet(nn.Module):
    """The head's network: (x_t, t, condition) -> (eps, v)."""

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)
        self.init_weights()

    def init_weights(self) -> None:
        """Start values of all layers; the network then predicts zero."""
        init_linear_layers(self)
        for name in ("0.weight", "2.weight"):
            nn.init.normal_(self.time_embed.mlp.get_parameter(name), std=0.02)

    @property
    def blocks(self) -> Iterable[ResidualBlock]:
        """`res_blocks`, typed."""
        return cast(Iterable[ResidualBlock], self.res_blocks)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x (..., R, C), t (..., R), condition (R, Z), shared by the leading dimensions."""
        y = self.time_embed(t) + self.cond_embed(condition)
        x = self.input_proj(x)
        for block in self.blocks:
            x = block(x, y)
        return self.final_layer(x, y)  # (..., R, 2C)


class DiffusionHead(nn.Module):
    """Loss and sampler over `HeadNet`.

    Noise names: "head/t", "head/noise" (loss).
    """

    def __init__(self, channels: int, condition: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.net = HeadNet(channels, condition, width, depth)
        self.diffusion = GaussianDiffusion("cosine")
        self.compiled = False

    def compile_sampler(self) -> None:
        """Let samplers made from now on compile their steps."""
        self.compiled = True

    def losses(
        self, x_0: Tensor, condition: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each draw's (mse, vlb), (K R,). x_0 (R, C), condition (R, Z), t (K, R), eps (K, R, C)."""
        flat_t, flat_eps = t.flatten(), eps.flatten(0, 1)
        flat_x_0 = x_0.expand_as(eps).flatten(0, 1)
        x_t = self.diffusion.noised(flat_x_0, flat_eps, flat_t).view_as(eps)
        out = self.net(x_t.to(condition.dtype), t, condition)
        predicted, v = out.flatten(0, 1).chunk(2, dim=-1)
        return self.diffusion.losses(flat_x_0, flat_eps, flat_t, predicted, v)

    def loss(self, x_0: Tensor, condition: Tensor, noise: AnyNoise, draws: int = 4) -> Tensor:
        """Mean loss over all tokens and `draws` independent (t, eps) each.

        Args:
            x_0: (B, n, C) fp32, n tokens of each image. condition: (B, n, Z).
        """
        count = x_0.shape[1]
        t = noise.uniform("head/t", (draws, count)).mul(TRAIN_STEPS).long()  # (B, K, n)
        eps = noise.normal("head/noise", (draws, count, self.channels))  # (B, K, n, C)
        mse, vlb = self.losses(
            x_0.flatten(0, 1),
            condition.flatten(0, 1),
            t.transpose(0, 1).flatten(1),
            eps.transpose(0, 1).flatten(1, 2),
        )
        return (mse + vlb).mean()

    def sampler(self, sampling: Sampling, *, places: int = 1) -> HeadSampler:
        """A sampler to be made once for many tokens.

        Uses the temperature, the clip, the steps (None: 100) and the guided channels; a token
        covers `places` latent places.
        """
        chain = ReverseChain(
            "cosine",
            sampling.steps or 100,
            temperature=sampling.temperature,
            clip=sampling.clip,
            device=self.net.input_proj.weight.device,
        )
        guided = sampling.guided_channels
        guided = None if guided is None else guided * places
        return HeadSampler(self.net, chain, guided, compiled=self.compiled)


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
        self.time = net.time_embed(torch.tensor(self.chain.timestep_map, device=device))  # (S, W)
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
        self.weight = torch.cat((*weights, shift, scale))  # ((3 depth + 2) W, W)
        self.bias = torch.cat((*biases, shift_bias, 1 + scale_bias))
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
        ahead = max(1, _ROWS_AHEAD // max(1, len(condition)))
        x = draws[0]
        for last in range(self.chain.steps - 1, -1, -ahead):
            first = max(0, last + 1 - ahead)
            y = F.silu(self.time[first : last + 1, None] + condition)  # (s, R, W)
            parts = F.linear(y, self.weight, self.bias).unflatten(-1, (-1, self.width))
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
        h = torch.addcmul(h, gate, _mlp(block, torch.addcmul(shift, n, scale)))
    shift, scale = part[-2:]
    n = F.layer_norm(h, width, eps=LAYER_NORM_EPS)
    return net.final_layer.linear(torch.addcmul(shift, n, scale))


def _mlp(block: ResidualBlock, x: Tensor) -> Tensor:
    """`block.mlp` of x (R, W), in the faster of two layouts."""
    if x.device.type != "cpu" or not 8 <= len(x) <= 64:
        return block.mlp(x)
    first, act, second = cast(tuple[nn.Linear, nn.SiLU, nn.Linear], tuple(block.mlp))
    # For few rows the CPU's matrix product is faster (1.5 times at 16 x 1024) with rows last.
    hidden = act(torch.addmm(first.bias[:, None], first.weight, x.t()))  # (W, R)
    return torch.addmm(second.bias[:, None], second.weight, hidden).t()
