import copy
import dataclasses

import pytest
import torch
from torch import nn

from detok_pipe.generators.packed_linear import PackedLinear, frozen_linear, pack_linears
from detok_pipe.generators.registry import build_generator, default_sampling
from detok_pipe.latents.noise import Noise

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch comes without oneDNN"
)


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 24), (16, 24), (3, 5, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_linear_layer_does(shape, bias):
    linear = nn.Linear(24, 40, bias=bias).requires_grad_(False)
    packed = PackedLinear(linear)
    x = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), linear(x))
        torch.testing.assert_close(packed(x.transpose(0, -2)), linear(x.transpose(0, -2)))


@needs_onednn
def test_it_has_a_gradient_and_the_dtypes_and_autocast_of_the_linear_layer():
    linear = nn.Linear(8, 6)
    packed, x = PackedLinear(linear), torch.randn(5, 8, requires_grad=True)
    packed(x).square().sum().backward()
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(x.grad, expected)
    assert linear.weight.grad is not None
    with torch.inference_mode():
        packed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        half = copy.deepcopy(packed).to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16


@needs_onednn
def test_a_frozen_layer_is_its_weights_and_bias():
    weight, bias, x = torch.randn(6, 8), torch.randn(6), torch.randn(5, 8)
    with torch.inference_mode():
        torch.testing.assert_close(frozen_linear(weight, bias)(x), x @ weight.T + bias)


@needs_onednn
@pytest.mark.parametrize("name", ["mar-b", "random-ar-b", "dit-b", "lightningdit-b"])
def test_a_packed_generator_keeps_its_parameters_and_its_samples(name):
    small = {"width": 32, "depth": 2, "heads": 2}
    model = build_generator(name, grid=(4, 4), channels=4, num_classes=3, **small).eval()
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(0, 0.02)
    packed = copy.deepcopy(model)
    pack_linears(packed)
    assert list(packed.state_dict()) == list(model.state_dict())
    assert not any(type(layer) is nn.Linear for layer in packed.modules())
    condition, noise = torch.tensor([0, 2]), Noise(0, [0, 1])
    sampling = dataclasses.replace(default_sampling(name), steps=20)
    expected = model.sample(condition, sampling, noise)
    difference = packed.sample(condition, sampling, noise) - expected
    assert difference.abs().max() < 1e-4 * expected.abs().max()
