"""The tokenizer's network: published numbers, shapes, and what may depend on what."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from detok_pipe.latents.errors import ConfigError, MismatchError
from detok_pipe.latents.noise import Noise, ReplayNoise
from detok_pipe.latents.posterior import Posterior
from detok_pipe.tokenizer.contract import encoder_keys
from detok_pipe.tokenizer.corruption import gather_tokens
from detok_pipe.tokenizer.layers import rope_table, rotate
from detok_pipe.tokenizer.model import LDeTok, parameter_groups
from detok_pipe.tokenizer.sizes import SIZES, Size

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("DETOK_REFERENCE", ROOT.parent / "shared" / "reference"))
SHORT = Path(__file__).parent / "data" / "detok_golden.npz"

RELEASED = {
    # encoder, decoder, parameters, first digits of the digest of all keys and shapes
    "SS": ("small", "small", 51_502_100, "1128e02af23ced03"),
    "SB": ("small", "base", 111_605_444, "17e5d0323c3de621"),
    "BB": ("base", "base", 171_712_628, "553868af3ef0c3fe"),
}


def tiny(**changes: object) -> LDeTok:
    torch.manual_seed(0)
    options = {"image_size": 32, "patch_size": 8, "channels": 3, "encoder": "32,2,2"}
    return LDeTok(**{**options, "decoder": (48, 1, 3), **changes})


def noise(rows: int = 2, seed: int = 0, step: int = 0) -> Noise:
    return Noise(seed, range(rows), step=step)


@pytest.fixture
def golden_model(golden_weights) -> LDeTok:
    return golden_weights(LDeTok(image_size=64, channels=4, encoder="64,2,4", decoder="64,2,4"))


def check_golden(model: LDeTok, golden: dict[str, Tensor], stride: int) -> None:
    images = golden["image"]
    replay = ReplayNoise(len(images), named={"mask_tokens": golden["mask_uniform"]})
    with torch.no_grad():
        moments = model.encode_moments(images)
        rebuilt = model.decode(moments[..., :4])
        masked = model.rebuild(images, replay, hidden=0.5)
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(moments, golden["moments"], **close)
    torch.testing.assert_close(rebuilt[..., ::stride, ::stride], golden["reconstruction"], **close)
    torch.testing.assert_close(Posterior(moments).kl(), golden["kl"], atol=0, rtol=1e-6)
    torch.testing.assert_close(masked.posterior.mean, golden["masked_moments"][..., :4], **close)
    torch.testing.assert_close(masked.posterior.logvar, golden["masked_moments"][..., 4:], **close)
    torch.testing.assert_close(
        masked.reconstruction[..., ::stride, ::stride], golden["masked_reconstruction"], **close
    )


def test_published_numbers(golden_model) -> None:
    with np.load(SHORT) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    check_golden(golden_model, golden, stride=3)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference files are not here")
def test_published_numbers_in_full(golden_model) -> None:
    with np.load(REFERENCE / "golden" / "detok.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    check_golden(golden_model, golden, stride=1)


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_fit(name: str) -> None:
    encoder, decoder, parameters, digest = RELEASED[name]
    with torch.device("meta"):
        model = LDeTok(encoder=encoder, decoder=decoder)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    text = json.dumps(shapes, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)
    if REFERENCE.is_dir():
        released = json.loads((REFERENCE / "state_dicts.json").read_text())[f"detok_{name}"]
        assert shapes == released["state_dict"]
        assert round(parameters / 1e6, 3) == released["parameters_M"]


def test_rotary_angles() -> None:
    rope = rope_table((3, 5), 16)
    x = torch.randn(1, 15, 16, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, rope)[0]
    frequencies = [7.0 * (7.0 / 7e-4) ** (-i / 3) for i in range(4)]
    for token, channel in [(0, 3), (7, 0), (7, 5), (13, 8), (13, 15), (14, 2)]:
        row, column = divmod(token, 5)
        coordinate = row / 2 if channel < 8 else column / 4
        angle = 2 * np.pi * coordinate * frequencies[channel % 4]
        other = x[0, token, channel ^ 1] * (1 if channel % 2 else -1)
        expected = x[0, token, channel] * np.cos(angle) + other * np.sin(angle)
        torch.testing.assert_close(turned[token, channel], expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "channels", "grid"),
    [(64, 8, 16, (8, 8)), ((16, 48), 8, 4, (2, 6)), (8, 8, 2, (1, 1))],
)
def test_any_image_and_patch_size(image_size, patch_size, channels, grid) -> None:
    model = tiny(image_size=image_size, patch_size=patch_size, channels=channels)
    images = torch.rand(2, 3, *model.image_size) * 2 - 1
    assert model.grid == grid
    assert model.tokens == grid[0] * grid[1]
    moments = model.encode_moments(images)
    assert moments.shape == (2, model.tokens, 2 * channels)
    assert model.decode(moments[..., :channels]).shape == images.shape


def test_encoding_tokens_in_another_order_permutes_the_moments() -> None:
    model, images = tiny(), torch.rand(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    torch.testing.assert_close(
        model.encoder(images, order), gather_tokens(model.encoder(images), order)
    )


def test_hidden_tokens_are_not_seen() -> None:
    model, images, draws = tiny(), torch.rand(2, 3, 32, 32), noise()
    first = model.rebuild(images, draws, hidden=0.6)
    hidden = draws.uniform("mask_tokens", (16,)).argsort(1)[:, first.visible :]
    changed = images.clone()
    for image, tokens in zip(changed, hidden.tolist(), strict=True):
        for token in tokens:
            row, column = divmod(token, 4)
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 7.0
    assert first.visible == 7
    assert torch.equal(first.reconstruction, model.rebuild(changed, draws, hidden=0.6)[0])
    assert not torch.equal(first.reconstruction, model.rebuild(changed, draws)[0])


def test_a_row_is_the_same_in_any_batch() -> None:
    model, images = tiny(), torch.rand(3, 3, 32, 32)
    recipe = {"gamma": 3.0, "mask_ratio": 0.7}
    draws = Noise(1, [4, 9, 2], step=7)
    whole = model(images, draws, **recipe)
    part = model(images[1:], draws.take(slice(1, None)), **recipe)
    assert part.visible == whole.visible
    torch.testing.assert_close(part.reconstruction, whole.reconstruction[1:])
    other = model(images, Noise(1, [4, 9, 3], step=7), **recipe)
    assert torch.equal(other.reconstruction[:2], whole.reconstruction[:2])
    assert not torch.allclose(other.reconstruction[2], whole.reconstruction[2])


def test_the_mask_ratio_changes_with_the_step_and_not_with_the_rows() -> None:
    model, images = tiny(), torch.rand(2, 3, 32, 32)
    counts = [
        model(images, Noise(0, rows, step=step), mask_ratio=0.7).visible
        for step in range(12)
        for rows in ([0, 1], [5, 6])
    ]
    assert counts[::2] == counts[1::2]
    assert len(set(counts)) > 3
    constant = model(images, noise(), mask_ratio=0.5, mask_kind="constant")
    assert constant.visible == 8


def test_without_corruption_the_training_pass_decodes_a_posterior_sample() -> None:
    model, images, draws = tiny(), torch.rand(2, 3, 32, 32), noise()
    output = model(images, draws)
    posterior = Posterior(model.encode_moments(images))
    sample = posterior.sample(draws.normal("posterior", (16, 3)))
    torch.testing.assert_close(output.reconstruction, model.decode(sample))
    torch.testing.assert_close(output.posterior.kl(), posterior.kl())
    clean = model.rebuild(images, draws).reconstruction
    torch.testing.assert_close(clean, model.decode(posterior.mean))


def test_latent_noise_follows_its_formula() -> None:
    model, images, draws = tiny(), torch.rand(2, 3, 32, 32), noise()
    z = Posterior(model.encode_moments(images)).sample(draws.normal("posterior", (16, 3)))
    tau = draws.uniform("tau", ())[:, None, None]
    eps = draws.normal("latent_noise", (16, 3))
    for kind, expected in {
        "interpolative": (1 - tau) * z + tau * 3.0 * eps,
        "additive": z + tau * 3.0 * eps,
    }.items():
        output = model(images, draws, gamma=3.0, noise_kind=kind)
        torch.testing.assert_close(output.reconstruction, model.decode(expected))


@pytest.mark.parametrize("recipe", [{}, {"gamma": 3.0, "mask_ratio": 0.7}])
def test_every_parameter_gets_a_gradient(recipe: dict[str, float]) -> None:
    model = tiny()
    model(torch.rand(2, 3, 32, 32), noise(), **recipe).reconstruction.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.decoder.mask_token.grad is not None


def test_autocast_stays_close_and_keeps_the_posterior_in_fp32(golden_weights) -> None:
    model, images = golden_weights(tiny()), torch.rand(2, 3, 32, 32)
    recipe = {"gamma": 1.0, "mask_ratio": 0.5, "mask_kind": "constant"}
    exact = model(images, noise(), **recipe)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise(), **recipe)
    assert output.posterior.mean.dtype == output.posterior.logvar.dtype == torch.float32
    difference = (output.reconstruction.float() - exact.reconstruction).abs().max()
    assert difference < 0.05 * exact.reconstruction.abs().max()


def test_latents_depend_on_the_encoder_only() -> None:
    model, images = tiny(), torch.rand(2, 3, 32, 32)
    before = model.encode_moments(images)
    state = model.state_dict()
    encoder = encoder_keys(state)
    assert state.keys() - encoder == {key for key in state if key.startswith("decoder.")}
    model.load_state_dict({k: v if k in encoder else v + 1 for k, v in state.items()})
    assert torch.equal(before, model.encode_moments(images))


def test_weight_decay_spares_vectors_positions_and_the_mask_token() -> None:
    model = tiny()
    decayed, others = parameter_groups(model, 1e-4)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 1e-4
    assert others["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    spared = {names[id(p)] for p in others["params"]}
    assert {"encoder.positional_embedding", "decoder.mask_token", "decoder.ln_pre.weight"} < spared
    assert all("weight" in names[id(p)] and p.ndim > 1 for p in decayed["params"])
    model.encoder.requires_grad_(False)
    for group in parameter_groups(model, 1e-4):
        assert all(names[id(p)].startswith("decoder.") for p in group["params"])


def test_initial_weights() -> None:
    model = tiny(encoder="256,1,4")
    qkv = model.encoder.transformer[0].attn.qkv
    assert abs(qkv.weight.std().item() - 0.02) < 0.001
    assert not qkv.bias.any()
    assert abs(model.encoder.positional_embedding.std().item() - 256**-0.5) < 0.005


def test_sizes() -> None:
    assert Size.parse("base") == SIZES["base"] == Size(768, 12, 12)
    assert Size.parse("128,4,2") == Size.parse((128, 4, 2)) == Size(128, 4, 2)
    assert SIZES["small"] == (512, 8, 8)
    assert SIZES["large"] == (1024, 24, 16)
    assert SIZES["xl"] == (1152, 28, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "bse"}, "small, base, large, xl"),
        ({"encoder": "128,4"}, "width,depth,heads"),
        ({"decoder": "128,0,4"}, "width,depth,heads"),
        ({"decoder": "100,2,8"}, "multiple of 32"),
        ({"image_size": 30}, "image_size 30 is no multiple of patch_size 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_inputs_of_another_shape_are_refused() -> None:
    model = tiny(image_size=(16, 48))
    turned = torch.rand(1, 3, 48, 16)
    for call in (model.encode_moments, lambda x: model(x, noise(1))):
        with pytest.raises(MismatchError, match=r"\(3, 48, 16\).*\(3, 16, 48\)"):
            call(turned)
    with pytest.raises(MismatchError, match=r"latents of shape \(11, 3\).*\(12, 3\)"):
        model.decode(torch.zeros(1, 11, 3))


def test_an_identity_output_passes_the_decoder_through_at_first():
    model = LDeTok(
        image_size=16,
        patch_size=8,
        channels=4,
        encoder="16,1,2",
        decoder="16,1,2",
        identity_output=True,
    )
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(model.decoder.conv_out(image), image)
