"""Diffusion head: the loss and the sampler of a token given a condition vector.

Li et al. 2024, "Autoregressive image generation without vector quantization". Rows R are tokens
of any images, C a token's channels, Z the condition's width. Cosine schedule of 1000 steps, eps
prediction, learned-range variance.
"""

from torch import Tensor, nn

from detok_pipe.generators.diffusion import TRAIN_STEPS, GaussianDiffusion, ReverseChain
from detok_pipe.generators.head_net import HeadNet
from detok_pipe.generators.head_sampler import HeadSampler
from detok_pipe.generators.layers import AnyNoise
from detok_pipe.generators.sampling import Sampling


class DiffusionHead(nn.Module):
    """Loss and sampler over `HeadNet`.

    Noise names: "head/t", "head/noise" (loss).
    """

    def __init__(self, channels: int, condition: int, *, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.net = HeadNet(channels, condition, width, depth)
        self.diffusion = GaussianDiffusion("cosine")
        self._compiled: dict[tuple[Sampling, int], HeadSampler] | None = None

    def compile_sampler(self) -> None:
        """Let samplers made from now on compile their steps; the weights must stay as they are."""
        self._compiled = {}

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

        Uses the temperature, the clip, the steps (which must be given) and the guided channels; a
        token covers `places` latent places. A compiled one is kept for the next batch.
        """
        if self._compiled is None:
            return self._new_sampler(sampling, places)
        key = sampling, places
        if key not in self._compiled:
            self._compiled[key] = self._new_sampler(sampling, places, compiled=True)
        return self._compiled[key]

    def _new_sampler(
        self, sampling: Sampling, places: int, *, compiled: bool = False
    ) -> HeadSampler:
        assert sampling.steps is not None
        chain = ReverseChain(
            "cosine",
            sampling.steps,
            temperature=sampling.temperature,
            clip=sampling.clip,
            device=self.net.input_proj.weight.device,
        )
        guided = sampling.guided_channels
        guided = None if guided is None else guided * places
        return HeadSampler(self.net, chain, guided, compiled=compiled)
