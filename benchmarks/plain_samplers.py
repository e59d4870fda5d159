"""Plain sampling loops: what one would write from the papers, nothing computed once for many uses.

They compute everything again at each step, with both guidance halves all the way. B images,
R rows (of tokens or images), N tokens, C channels, c = C p^2 channels a token, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from detok_pipe.generators.ardiff import ARDiff
from detok_pipe.generators.diffusion import schedule
from detok_pipe.generators.dit import DiT
from detok_pipe.generators.guidance import scale_at
from detok_pipe.generators.head_net import HeadNet
from detok_pipe.generators.mar import MAR, reveal_counts
from detok_pipe.generators.sampling import Sampling
from detok_pipe.generators.sit import SiT
from detok_pipe.generators.token_generator import TokenGenerator
from detok_pipe.latents.noise import Noise


def plain_chain(
    network: Callable[[Tensor, Tensor], Tensor],
    name: str,
    draws: Tensor,
    scale: float,
    temperature: float,
) -> Tensor:
    """DDPM over [conditional, null] rows; draws (S + 1, R, ...), channels last -> (R, ...)."""
    table = schedule(name, len(draws) - 1)  # type: ignore[arg-type]
    kept = torch.tensor(table.alphas_cumprod, device=draws.device)
    betas = torch.tensor(table.betas, device=draws.device)
    low = torch.tensor(table.posterior_log_variance_clipped, device=draws.device)
    numbers = torch.tensor(table.timestep_map, device=draws.device)
    rows = draws.shape[1]
    x = torch.cat((draws[0], draws[0]))
    for k, i in enumerate(reversed(range(len(betas)))):
        x = torch.cat((x[:rows], x[:rows]))
        out = network(x, numbers[i].expand(len(x))).float()
        eps, v = out.chunk(2, dim=-1)
        eps_cond, eps_null = eps.chunk(2)
        guided = eps_null + scale * (eps_cond - eps_null)
        eps = torch.cat((guided, guided))
        before = kept[i - 1] if i else torch.ones_like(kept[0])
        x_0 = (x - (1 - kept[i]).sqrt().float() * eps) / kept[i].sqrt().float()
        mean = (before.sqrt() * betas[i] / (1 - kept[i])).float() * x_0
        mean = mean + ((1 - betas[i]).sqrt() * (1 - before) / (1 - kept[i])).float() * x
        log_variance = (v + 1) / 2 * betas[i].log().float() + (1 - v) / 2 * low[i].float()
        draw = torch.cat((draws[k + 1], draws[k + 1]))
        x = mean + (i > 0) * temperature * torch.exp(0.5 * log_variance) * draw
    return x[:rows]


def plain_head(net: HeadNet, condition: Tensor, draws: Tensor, scale: float, heat: float) -> Tensor:
    """The head over (2R, Z) conditions: time embedding, projection, modulation at each step."""
    return plain_chain(lambda x, t: net(x, t, condition), "cosine", draws, scale, heat)


def plain_labels(model: TokenGenerator, condition: Tensor) -> Tensor:
    """Class embeddings of the conditional rows, then of as many null rows."""
    null = model.fake_latent.expand(len(condition), -1)
    return torch.cat((model.class_emb(condition), null))


def plain_mar(model: MAR, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """All positions in raster order, found by nonzero; the decoder gives all of them."""
    batch, tokens_count = len(condition), model.tokens
    order = noise.uniform("order", (tokens_count,)).argsort(dim=1)
    label = plain_labels(model, condition)[:, None].expand(-1, model.buffer, -1)
    tokens = torch.zeros(batch, tokens_count, model.channels, device=condition.device)
    masked = tokens_count
    counts = reveal_counts(tokens_count, sampling.iterations or min(256, tokens_count))
    for k, count in enumerate(counts):
        mask = torch.zeros(batch, tokens_count, device=condition.device)
        mask = mask.scatter(1, order[:, :masked], 1.0).bool()
        next_mask = torch.zeros_like(mask).scatter(1, order[:, : masked - count], True)
        twice = torch.cat((mask, mask))
        x = torch.cat((label, model.z_proj(torch.cat((tokens, tokens)))), dim=1)
        x = model.z_proj_ln(x + model.encoder_pos_embed_learned)
        seen = torch.cat((torch.zeros_like(twice[:, :1]).expand(-1, model.buffer), twice), dim=1)
        x = x[(~seen).nonzero(as_tuple=True)].view(2 * batch, -1, x.shape[-1])
        for block in model.encoder_blocks:
            x = block(x)
        x = model.decoder_embed(model.encoder_norm(x))
        full = model.mask_token.to(x.dtype).repeat(2 * batch, model.buffer + tokens_count, 1)
        full[(~seen).nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = full + model.decoder_pos_embed_learned
        for block in model.decoder_blocks:
            x = block(x)
        x = model.decoder_norm(x)[:, model.buffer :] + model.diffusion_pos_embed_learned
        now = mask & ~next_mask
        where = torch.cat((now, now)).nonzero(as_tuple=True)
        # The draws come in the order of revelation; raster order within an image here.
        shape = count, model.channels
        draws = noise.normal_steps(f"head/{k}", (sampling.steps or 100) + 1, shape)
        rank = order[:, masked - count : masked].flip(1).argsort(dim=1)[None, :, :, None]
        draws = draws.gather(2, rank.expand_as(draws)).flatten(1, 2)
        masked -= count
        known = min(tokens_count - masked, tokens_count - 1)
        scale = scale_at(sampling, known / tokens_count)
        new = plain_head(model.diffloss.net, x[where], draws, scale, sampling.temperature)
        tokens[now.nonzero(as_tuple=True)] = new
    return tokens


def plain_ar_step(
    model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise, order: Tensor, known: Tensor
) -> Tensor:
    """Token i (B, c) from the i known ones (B, i, c): the whole prefix again, both halves."""
    i = known.shape[1]
    label = plain_labels(model, condition)[:, None]
    places = torch.cat((order, order))
    start = (model.bos_token + model.pos_embed[:, :1]).expand(len(places), -1, -1)
    x = model.x_embedder(torch.cat((known, known))) + model.pos_embed[0, 1:][places[:, :i]]
    x = torch.cat((start, x), dim=1) + model.target_pos_embed[0][places[:, : i + 1]]
    x = model.ln_pre(x)
    steps = label + model.timesteps_embeddings[:, : i + 1]
    for block in model.blocks:
        x = block(x, block.adaLN_modulation(steps), causal=True)
    x = model.final_layer(x, model.final_layer.adaLN_modulation(label))[:, -1]
    draws = noise.normal_steps(f"head/{i}", (sampling.steps or 100) + 1, (model.channels,))
    scale = scale_at(sampling, i / model.tokens)
    return plain_head(model.diffloss.net, x, draws, scale, sampling.temperature)


def plain_ardiff(model: ARDiff, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    order = model.places(noise, condition.device)
    tokens = torch.zeros(len(condition), 0, model.channels, device=condition.device)
    for _ in range(model.tokens):
        new = plain_ar_step(model, condition, sampling, noise, order, tokens)
        tokens = torch.cat((tokens, new[:, None]), dim=1)
    return model.assembled(tokens, order)


def plain_dit(model: DiT, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """Two halves of states through the whole chain."""
    steps, shape = sampling.steps or 250, (model.places, model.channels)
    names = ["start", *(f"step/{i}" for i in reversed(range(steps)))]
    draws = torch.stack([noise.normal(name, shape) for name in names])
    both = torch.cat((condition, torch.full_like(condition, -1)))
    scale = sampling.guidance_scale
    return plain_chain(
        lambda x, t: model.network(x, t, both), "linear", draws, scale, sampling.temperature
    )


def plain_flow(model: SiT, condition: Tensor, sampling: Sampling, noise: Noise) -> Tensor:
    """Two halves of states; the null half is evaluated where guidance is off, too."""
    t = torch.linspace(0, 1, sampling.steps or 250, device=condition.device)
    t = model.shift * t / (1 - t + model.shift * t)
    start = noise.normal("start", (model.places, model.channels))
    both = torch.cat((condition, torch.full_like(condition, -1)))
    x = torch.cat((start, start))
    for now, then in itertools.pairwise(t):
        cond, null = model.network(x, now.expand(len(x)), both).float().chunk(2)
        guided = null + scale_at(sampling, float(now)) * (cond - null)
        x = x + (then - now) * torch.cat((guided, guided))
    return x[: len(condition)]


PLAIN: dict[str, Callable[[Any, Tensor, Sampling, Noise], Tensor]] = {
    "mar": plain_mar,
    "random-ar": plain_ardiff,
    "raster-ar": plain_ardiff,
    "dit": plain_dit,
    "sit": plain_flow,
    "lightningdit": plain_flow,
}
