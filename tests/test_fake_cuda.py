"""Training, sampling and the rest of a GPU's work, on fake CUDA tensors that need no GPU."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from generator_making import FAMILIES, recipe, write_latents
from gpu_faking import CPU, CUDA, autocast, begun, fake_gpu, step
from image_making import random_images
from timm import create_model
from tokenizer_making import ADVERSARIAL, START
from torch import nn
from torchvision.models import convnext_tiny, vgg16

from detok_pipe.evaluation.features import EfficientNetLite2Features
from detok_pipe.evaluation.reconstruction import psnr, ssim
from detok_pipe.generators.registry import build_generator
from detok_pipe.generators.sampling import Sampling
from detok_pipe.latents.loader import HostBatch
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines import train_generator, train_tokenizer
from detok_pipe.pipelines.decode import to_float, to_uint8
from detok_pipe.pipelines.encode import moments_on_device
from detok_pipe.pipelines.trained import build_tokenizer
from detok_pipe.tokenizer.perceptual import LPIPS, LogitsDistance, WeightedMean

# Copying a fake network asks for the address of its numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "cache"
    write_latents(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return random_images(tmp_path_factory.mktemp("images"), 10, (36, 40))


@pytest.fixture
def gpu(monkeypatch, latents, images):
    """The test runs in fake mode; what it reads from disk is there before."""
    with fake_gpu(monkeypatch) as mode:
        yield mode


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generators(name, precision, gpu, monkeypatch, latents, tmp_path):
    config = recipe(name, precision=precision)
    if name == "mar-b":
        config.model["dropout"] = 0.1
    run = begun(gpu, monkeypatch, train_generator, config, latents, tmp_path / "run")
    arrays = {field: torch.empty(4, 16, 4, dtype=torch.float16) for field in ("mean", "std")}
    batch = HostBatch(arrays, torch.empty(3, 4, dtype=torch.int64)).to_device(run.parts.loader)
    gpu.waits.clear()  # moving the network to the device is not of interest
    for number in range(2):
        values = step(run, batch, number)
    assert values["loss"].device == values["gradient_norm"].device == CUDA
    assert not gpu.waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_samplers_know_their_schedule_beforehand(name, dtype, gpu):
    sizes = {**recipe(name).model, "patch_size": 2}
    model = build_generator(name, grid=(4, 4), channels=4, num_classes=3, **sizes)
    model = model.to(CUDA).to(dtype).eval()
    noise = Noise(0, np.arange(4), device=CUDA)
    labels = torch.empty(4, dtype=torch.int64, device=CUDA)
    gpu.waits.clear()
    for changes in (
        {"guidance_scale": 2.0},
        {"guidance_schedule": "linear", "guided_channels": 3, "temperature": 0.9, "clip": 3.0},
        {"guidance_interval": (0.3, 0.6)},
    ):
        options = model.used({"guidance_scale": 3.0, "steps": 4, "iterations": 3, **changes})
        z = model.sample(labels, Sampling(**options), noise)
        assert (z.device, z.dtype, z.shape) == (CUDA, torch.float32, (4, 16, 4))
    assert not gpu.waits


@pytest.mark.parametrize("name", ["sit-b", "lightningdit-b"])
def test_dopri5_waits_to_choose_its_steps(name, gpu):
    model = build_generator(name, grid=(4, 4), channels=4, num_classes=3, **recipe(name).model)
    noise = Noise(0, np.arange(4), device=CUDA)
    labels = torch.empty(4, dtype=torch.int64, device=CUDA)
    model.to(CUDA)
    gpu.waits.clear()
    # A step's error decides about the next step; the host fetches it.
    with pytest.raises(RuntimeError, match="numpy"):
        model.sample(labels, Sampling(guidance_scale=2.0, method="dopri5"), noise)
    assert "dopri5.<locals>.size" in gpu.waits


def test_noise(gpu):
    noise = Noise(3, torch.arange(5), device=CUDA)
    for draw in (noise.normal("a", (3, 7)), noise.uniform("b", (3, 7))):
        assert (draw.device, draw.shape) == (CUDA, (5, 3, 7))
    assert noise.normal_steps("c", 4, (2,)).shape == (4, 5, 2)
    assert noise.take(slice(2)).normal("a", ()).device == CUDA
    assert not gpu.waits


def perceptual_term(*_):
    """The recipe's two networks, the second in a smaller size."""
    channels = (64, 128, 256, 512, 512)
    lpips = LPIPS(vgg16().features, [torch.ones(n) for n in channels], size=48)
    return WeightedMean([(1.0, lpips), (0.1, LogitsDistance(convnext_tiny()))]).to(CUDA)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokenizer(precision, gpu, monkeypatch, images, tmp_path):
    monkeypatch.setattr(train_tokenizer, "perceptual_term", perceptual_term)
    config = dataclasses.replace(ADVERSARIAL, precision=precision)
    run = begun(gpu, monkeypatch, train_tokenizer, config, images, tmp_path / "run")
    gpu.waits.clear()
    stream = iter(run.parts.loader)
    for number in (0, START):
        values = step(run, next(stream), number)
    assert {"perceptual", "adversarial", "discriminator_fake", "gradient_norm"} <= values.keys()
    assert {value.device for value in values.values()} == {CUDA}
    assert not gpu.waits


def test_encoding_decoding_and_comparing(gpu):
    mixed = autocast(gpu, "bf16")
    model = build_tokenizer(ADVERSARIAL).to(CUDA).eval()
    gpu.waits.clear()
    images = to_float(np.zeros((3, 32, 32, 3), np.uint8), CUDA)
    plan = SimpleNamespace(views=("original", "mirror"), dtype="bf16")
    for mean, std in moments_on_device(model, images, plan).values():
        assert (mean.device, std.shape, std.dtype) == (CUDA, (3, 16, 4), torch.float32)
    with torch.inference_mode(), mixed:
        rebuilt = to_uint8(model.decode(mean))
    for metric in (psnr, ssim):
        assert metric(to_uint8(images), rebuilt).device == CUDA
    assert not gpu.waits


def test_features(gpu):
    state = create_model("tf_efficientnet_lite2").state_dict()
    extractor = EfficientNetLite2Features(state, resolution=64, device=CUDA)
    gpu.waits.clear()
    found = extractor(torch.empty(2, 3, 48, 48, dtype=torch.uint8, device=CUDA))
    assert found["features"].device == found["logits"].device == CUDA
    assert not gpu.waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.to(CPU),
        lambda x: torch.ones(3).to(CUDA),
        lambda x: torch.tensor([1.0], device=CUDA),
        lambda x: torch.as_tensor(np.ones(3), device=CUDA),
        lambda x: x[0].copy_(torch.ones(3)),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x[torch.arange(2)],
    ],
)
def test_waits_are_seen(wait, gpu):
    wait(torch.empty(3, 3, device=CUDA))
    assert gpu.waits


@pytest.mark.parametrize(
    "impossible",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x[[0, 2]],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
    ],
)
def test_other_waits_and_mixed_devices_are_refused(impossible, gpu):
    with pytest.raises((RuntimeError, AssertionError)):
        impossible(torch.empty(3, 3, device=CUDA))


def test_autocast_is_on(gpu):
    with autocast(gpu, "bf16"):
        assert nn.Linear(3, 3).to(CUDA)(torch.empty(2, 3, device=CUDA)).dtype == torch.bfloat16
