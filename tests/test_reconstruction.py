"""PSNR and SSIM against scikit-image and torchmetrics, on the same images."""

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from detok_pipe.evaluation.reconstruction import MAX_PSNR, ReconstructionMetrics, psnr, ssim
from detok_pipe.latents.errors import InputError


@pytest.fixture(scope="module")
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    crops = np.stack([data.astronaut()[:64, 200:264], data.coffee()[100:164, 100:164]])
    noise = np.random.default_rng(0).normal(0, [[[[8]]], [[[30]]]], crops.shape)
    rebuilt = np.clip(crops + noise, 0, 255).astype(np.uint8)
    original, noisy = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (crops, rebuilt))
    return original, noisy


def test_psnr_equals_scikit_image(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    theirs = [
        peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=255)
        for x, y in zip(*pairs, strict=True)
    ]
    np.testing.assert_allclose(psnr(*pairs).numpy(), theirs, rtol=1e-9)


def test_ssim_equals_scikit_image_and_torchmetrics(
    pairs: tuple[torch.Tensor, torch.Tensor],
) -> None:
    skimage = [
        structural_similarity(
            x.numpy(),
            y.numpy(),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(*pairs, strict=True)
    ]
    np.testing.assert_allclose(ssim(*pairs).numpy(), skimage, rtol=1e-6)
    _, maps = structural_similarity_index_measure(
        pairs[1].double(),
        pairs[0].double(),
        data_range=255.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics counts a reflected border of 5 pixels as well.
    inner = maps[..., 5:-5, 5:-5].mean((1, 2, 3))
    np.testing.assert_allclose(ssim(*pairs).numpy(), inner.numpy(), rtol=1e-6)


def test_stream_equals_all_at_once(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    original, rebuilt = pairs
    parts = [ReconstructionMetrics(), ReconstructionMetrics()]
    for i, part in enumerate(parts):
        part.update(original[i : i + 1], rebuilt[i : i + 1])
    parts[0].merge(parts[1])
    result = parts[0].result()
    assert result["count"] == 2
    assert result["psnr"] == pytest.approx(psnr(original, rebuilt).mean().item())
    assert result["ssim"] == pytest.approx(ssim(original, rebuilt).mean().item())


def test_equal_images_and_bad_input(pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    original, _ = pairs
    assert psnr(original, original).tolist() == [MAX_PSNR] * 2
    assert ssim(original, original).tolist() == pytest.approx([1, 1])
    with pytest.raises(InputError, match="11 pixels"):
        ssim(original[..., :10], original[..., :10])
    with pytest.raises(ValueError, match="uint8"):
        psnr(original.float(), original)
    with pytest.raises(InputError, match="no images"):
        ReconstructionMetrics().result()
