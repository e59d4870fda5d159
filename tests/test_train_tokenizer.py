"""The tokenizer's trainer: the recipe against a plain loop, resumption, the adversary, tuning."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_making import random_images
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from detok_pipe.latents.errors import ConfigError, Interrupted, MismatchError, NonFiniteError
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines import train_tokenizer as trainer
from detok_pipe.pipelines.accelerators import make_accelerator, tensor_float32
from detok_pipe.pipelines.adversary import Adversary, Pairs
from detok_pipe.pipelines.checkpoints import checkpoint_paths, latest_checkpoint
from detok_pipe.pipelines.config import Execution, TokenizerConfig
from detok_pipe.pipelines.ema import Ema
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.tokenizer_inspection import Validation
from detok_pipe.pipelines.train_tokenizer import describe, train_tokenizer
from detok_pipe.pipelines.trained import build_tokenizer, load_tokenizer
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import discriminator_losses, reconstruction_losses
from detok_pipe.tokenizer.model import parameter_groups
from detok_pipe.tokenizer.perceptual import FeatureDistance

STEPS, START = 6, 3
PLAIN = TokenizerConfig(
    image_size=32,
    patch_size=8,
    channels=4,
    encoder="16,1,2",
    decoder="16,1,2",
    perceptual="none",
    global_batch=4,
    duration=f"{STEPS} steps",
    base_lr=6.4e-2,
    ema=0.9,
    precision="fp32",
)
ADVERSARIAL = dataclasses.replace(PLAIN, adversarial_start=f"{START} steps")
QUIET = Execution(
    device="cpu", trackers=(), quiet=True, log_every=2, checkpoint_every=2, keep_checkpoints=9
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return random_images(tmp_path_factory.mktemp("images"), 10, (36, 40))


@pytest.fixture(scope="module", autouse=True)
def small_discriminator():
    """The same layers with few channels, for speed."""
    patch = pytest.MonkeyPatch()
    patch.setattr(
        "detok_pipe.pipelines.adversary.PatchDiscriminator", lambda: PatchDiscriminator(width=4)
    )
    yield
    patch.undo()


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory, small_discriminator) -> Path:
    """A run with the adversary, trained in one sitting."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_tokenizer(ADVERSARIAL, images, out, QUIET)
    return out


def files(run: Path, step: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """All tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {file.stem: load_file(file) for file in folder.glob("*.safetensors")}


def assert_same(first, second) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def at_step(monkeypatch, wanted: int, action) -> None:
    """Call ``action(losses)`` on what step ``wanted`` of the next training computes."""
    steps = iter(range(10**6))

    def losses(*arguments, **settings):
        values = reconstruction_losses(*arguments, **settings)
        return action(values) if next(steps) == wanted else values

    monkeypatch.setattr(trainer, "reconstruction_losses", losses)


def kill(values):
    os.kill(os.getpid(), signal.SIGTERM)
    return values


def test_training_is_the_plain_loop_of_the_recipe(images, tmp_path) -> None:
    config = dataclasses.replace(ADVERSARIAL, adversarial_start="0 epochs", clip=0.05)
    train_tokenizer(config, images, tmp_path / "run", QUIET)

    torch.manual_seed(config.seed)
    model, critic = build_tokenizer(config), PatchDiscriminator(width=4)
    average = {name: p.clone() for name, p in model.named_parameters()}

    def optimizer(network: nn.Module) -> torch.optim.Optimizer:
        free = ("positional_embedding", "mask_token")
        groups: tuple[list, list] = ([], [])
        for name, p in network.named_parameters():
            groups[p.ndim == 1 or name.endswith(free)].append(p)
        return torch.optim.AdamW(
            [
                {"params": groups[0], "weight_decay": config.weight_decay},
                {"params": groups[1], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
        )

    optimizers = optimizer(model), optimizer(critic)
    loader = ImageLoader(open_images(images), config.image_size, config.global_batch, config.seed)
    for step, batch in zip(range(STEPS), loader, strict=False):
        warm = 0.25 * STEPS
        peak = 6.4e-2 * 4 / 256
        rate = (
            peak * (step + 1) / warm
            if step < warm
            else peak * 0.5 * (1 + np.cos(np.pi * (step - warm) / (STEPS - warm)))
        )
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] = rate
        output = model(
            batch.images, Noise(config.seed, batch.ids, step=step), gamma=3.0, mask_ratio=0.7
        )
        real, fake = (x * 0.5 + 0.5 for x in (batch.images, output.reconstruction))
        loss = (fake - real).square().mean() + 1e-6 * output.posterior.kl().mean()
        (loss - 0.1 * critic(fake).mean()).backward()
        critic.zero_grad()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizers[0].step()
        model.zero_grad()
        discriminator_losses(critic, batch.images, output.reconstruction)["loss"].backward()
        nn.utils.clip_grad_norm_(critic.parameters(), config.clip)
        optimizers[1].step()
        critic.zero_grad()
        for name, p in model.named_parameters():
            average[name] += 0.1 * (p.detach() - average[name])

    found = files(tmp_path / "run")
    assert found.keys() == {
        "model",
        "ema",
        "optimizer",
        "discriminator",
        "discriminator_optimizer",
    }
    torch.testing.assert_close(found["model"], dict(model.state_dict()), atol=1e-6, rtol=0)
    wanted = {name: p.detach() for name, p in average.items()}
    torch.testing.assert_close(found["ema"], wanted, atol=1e-6, rtol=0)
    learned = {n: p.detach() for n, p in critic.named_parameters()}
    stored = {n: found["discriminator"][n] for n in learned}
    torch.testing.assert_close(stored, learned, atol=1e-6, rtol=0)


def test_until_its_start_the_adversary_changes_nothing_and_is_not_run(
    images, tmp_path, finished
) -> None:
    every_step = dataclasses.replace(QUIET, checkpoint_every=1)
    train_tokenizer(PLAIN, images, tmp_path / "plain", every_step)
    train_tokenizer(ADVERSARIAL, images, tmp_path / "adversarial", every_step)
    for step in range(1, STEPS + 1):
        plain, other = files(tmp_path / "plain", step), files(tmp_path / "adversarial", step)
        critic = other["discriminator"]
        assert critic["main.3.num_batches_tracked"] == 3 * max(0, step - START)
        if step <= START:
            for name in ("model", "ema", "optimizer"):
                assert_same(plain[name], other[name])
            assert_same(critic, files(tmp_path / "adversarial", 1)["discriminator"])
            assert other["discriminator_optimizer"] == {}
        else:
            changed = other["model"]["decoder.conv_out.weight"]
            assert not torch.equal(plain["model"]["decoder.conv_out.weight"], changed)
    records = read_metrics(finished)
    assert "adversarial" not in records[0]
    assert {"adversarial", "discriminator_loss"} <= records[1].keys()  # steps 2 and 3
    assert records[-1]["discriminator_loss"] > 0


def test_the_discriminators_step_leaves_the_tokenizer_alone(images) -> None:
    torch.manual_seed(0)
    model = build_tokenizer(PLAIN)
    adversary = Adversary(ADVERSARIAL, 0, make_accelerator("fp32", QUIET))
    before = [p.clone() for p in adversary.discriminator.parameters()]
    batch = torch.rand(4, 3, 32, 32) * 2 - 1
    rebuilt = model.rebuild(batch, Noise(0, range(4))).reconstruction
    values = adversary.update(Pairs(batch, rebuilt, torch.arange(4)), micro_batch=None)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for p in adversary.discriminator.parameters())
    after = list(adversary.discriminator.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert values.keys() >= {"discriminator_loss", "discriminator_real", "discriminator_fake"}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_waits_for_nothing_on_the_device() -> None:
    """Fake tensors have no values, so whatever asks for one fails."""
    config = ADVERSARIAL
    with torch.device("meta"):
        model, critic = build_tokenizer(config), PatchDiscriminator()
        perceptual = FeatureDistance(timm.create_model("resnet10t"), stages=(0, 1))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        for network in (model, critic, perceptual):
            network.to_empty(device="cpu")
        images, ids = torch.empty(4, 3, 32, 32), torch.empty(4, dtype=torch.int64)
        ema = Ema(model)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                images,
                Noise(config.seed, ids, step=3, device="cpu"),
                gamma=config.gamma,
                mask_ratio=config.mask_ratio,
            )
        assert output.reconstruction.device.type == "cpu"
        losses = reconstruction_losses(
            images,
            output.reconstruction,
            output.posterior,
            perceptual=perceptual,
            discriminator=critic,
        )
        losses["loss"].backward()
        discriminator_losses(critic, images, output.reconstruction)["loss"].backward()
        for network in (model, critic):
            nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            torch.optim.AdamW(parameter_groups(network, 1e-4), fused=True).step()
        ema.update(model, config.ema)
        with pytest.raises(DataDependentOutputException):  # that is: this test can fail
            losses["loss"].item()


@pytest.mark.parametrize("step", [1, START, START + 1])
def test_interrupted_equals_uninterrupted(images, tmp_path, finished, monkeypatch, step) -> None:
    out = tmp_path / "parts"
    at_step(monkeypatch, step, kill)
    with pytest.raises(Interrupted):
        train_tokenizer(ADVERSARIAL, images, out, QUIET)
    assert latest_checkpoint(out).step == step + 1
    monkeypatch.undo()
    monkeypatch.setattr(
        "detok_pipe.pipelines.adversary.PatchDiscriminator", lambda: PatchDiscriminator(width=4)
    )
    train_tokenizer(ADVERSARIAL, images, out, QUIET)
    assert_same(files(out), files(finished))
    assert "num_batches_tracked" in "".join(files(out)["discriminator"])


@pytest.mark.parametrize("name", ["discriminator", "discriminator_optimizer", "ema"])
def test_a_checkpoint_cut_short_is_passed_over(images, tmp_path, finished, name) -> None:
    out = tmp_path / "run"
    train_tokenizer(ADVERSARIAL, images, out, QUIET)
    damaged = checkpoint_paths(out)[-1] / f"{name}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"{name}.*using the checkpoint before it"):
        train_tokenizer(ADVERSARIAL, images, out, QUIET)
    assert_same(files(out), files(finished))


def test_a_loss_that_is_not_finite_names_the_images(images, tmp_path, monkeypatch) -> None:
    at_step(monkeypatch, 4, lambda values: {**values, "loss": values["loss"] * float("nan")})
    with pytest.raises(NonFiniteError, match=r"step 5 .*\d\.png") as stopped:
        train_tokenizer(PLAIN, images, tmp_path / "run", QUIET)
    loader = ImageLoader(open_images(images), 32, 4, PLAIN.seed)
    assert ", ".join(loader.names(range(16, 20))) in str(stopped.value)
    assert latest_checkpoint(tmp_path / "run").step == 4


def test_micro_batches_change_nothing_but_rounding(images, tmp_path, monkeypatch) -> None:
    # AdamW's first steps divide by tiny moments; plain steps keep rounding small.
    train_tokenizer(PLAIN, images, tmp_path / "whole", QUIET)
    pieces = dataclasses.replace(QUIET, micro_batch=3)
    train_tokenizer(PLAIN, images, tmp_path / "pieces", pieces)
    first, second = files(tmp_path / "whole"), files(tmp_path / "pieces")
    torch.testing.assert_close(first["model"], second["model"], atol=2e-4, rtol=0)
    train_tokenizer(ADVERSARIAL, images, tmp_path / "adversarial", pieces)
    tracked = files(tmp_path / "adversarial")["discriminator"]["main.3.num_batches_tracked"]
    assert tracked == 2 * 3 * (STEPS - START)


def test_recomputed_activations_and_chosen_kernels_change_nothing(
    images, tmp_path, finished
) -> None:
    other = dataclasses.replace(QUIET, activation_checkpointing=True, deterministic=True)
    try:
        train_tokenizer(ADVERSARIAL, images, tmp_path / "run", other)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(files(tmp_path / "run"), files(finished))


def test_rounded_matrix_products_are_over_when_the_training_is() -> None:
    before = torch.get_float32_matmul_precision()
    for wanted in (True, False):
        with tensor_float32(wanted):
            assert torch.get_float32_matmul_precision() == ("high" if wanted else before)
        assert torch.get_float32_matmul_precision() == before


def test_bf16_trains(images, tmp_path) -> None:
    train_tokenizer(
        dataclasses.replace(ADVERSARIAL, precision="bf16"), images, tmp_path / "run", QUIET
    )
    assert all(value.dtype != torch.bfloat16 for value in files(tmp_path / "run")["model"].values())


def test_looking_at_a_training_leaves_no_trace(images, tmp_path, finished) -> None:
    look = Validation(every=2, data=images, features="none", limit=5)
    train_tokenizer(ADVERSARIAL, images, tmp_path / "run", QUIET, validation=look)
    assert_same(files(tmp_path / "run"), files(finished))
    scored = [r for r in read_metrics(tmp_path / "run") if "val/psnr" in r]
    assert [record["step"] for record in scored] == [2, 4, 6]
    assert scored[0]["val/images"] == 5
    assert scored[0]["val/psnr"] != scored[-1]["val/psnr"]
    names = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert names[:2] == ["step-00000002-corrupted.png", "step-00000002-reconstructions.png"]
    assert len(names) == 6
    # Without a validation set there are pictures of training images, after the last step.
    assert len(list((finished / "samples").iterdir())) == 2


def test_images_too_small_for_the_discriminator_are_refused(images, tmp_path) -> None:
    small = dataclasses.replace(ADVERSARIAL, image_size=16)
    with pytest.raises(ConfigError, match="image_size 16 set adversarial_start=null"):
        train_tokenizer(small, images, tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def tuning(**changes) -> TokenizerConfig:
    """A recipe for the decoder alone; its network is not that of the runs here."""
    return dataclasses.replace(
        TokenizerConfig(
            decoder_only=True,
            perceptual="none",
            global_batch=4,
            duration="4 steps",
            precision="fp32",
            gamma=0.0,
            mask_ratio=0.0,
            adversarial_start="2 steps",
            base_lr=6.4e-2,
            ema=0.5,
        ),
        **changes,
    )


def test_decoder_tuning_leaves_the_encoder_as_it_was(images, tmp_path, finished) -> None:
    out = tmp_path / "tuned"
    train_tokenizer(tuning(), images, out, QUIET, finetune=finished)
    before, after = load_tokenizer(finished), load_tokenizer(out)
    assert after.identity == before.identity
    assert after.decoder != before.decoder
    old, new = before.model.state_dict(), after.model.state_dict()
    for name, value in new.items():
        # No token is hidden, so the mask token is not used.
        same = name.startswith("encoder.") or name == "decoder.mask_token"
        assert torch.equal(value, old[name]) == same, name
    # The optimizer holds moments of the decoder only.
    moments = {key.split(".")[0] for key in files(out, 4)["optimizer"]}
    assert len(moments) == len(list(after.model.decoder.parameters()))


def test_decoder_tuning_resumes_bit_for_bit(images, tmp_path, finished, monkeypatch) -> None:
    train_tokenizer(tuning(), images, tmp_path / "whole", QUIET, finetune=finished)
    with monkeypatch.context() as patch:
        at_step(patch, 2, kill)
        with pytest.raises(Interrupted):
            train_tokenizer(tuning(), images, tmp_path / "parts", QUIET, finetune=finished)
    train_tokenizer(tuning(), images, tmp_path / "parts", QUIET, finetune=finished)
    assert_same(files(tmp_path / "parts", 4), files(tmp_path / "whole", 4))


def test_tuning_needs_a_run_and_a_recipe_for_it(images, tmp_path, finished) -> None:
    with pytest.raises(ConfigError, match="--finetune-decoder"):
        train_tokenizer(tuning(), images, tmp_path / "a", QUIET)
    with pytest.raises(ConfigError, match="trains the encoder too"):
        train_tokenizer(PLAIN, images, tmp_path / "b", QUIET, finetune=finished)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    train_tokenizer(tuning(), images, tmp_path / "tuned", QUIET, finetune=finished)
    other = dataclasses.replace(PLAIN, seed=1, duration="1 step")
    train_tokenizer(other, images, tmp_path / "other", QUIET)
    with pytest.raises(MismatchError, match="tuned from"):
        train_tokenizer(tuning(), images, tmp_path / "tuned", QUIET, finetune=tmp_path / "other")


def test_a_dry_run_counts_what_trains(images) -> None:
    source = open_images(images)
    model, critic = build_tokenizer(PLAIN), PatchDiscriminator()
    whole, decoder, judge = (
        sum(p.numel() for p in m.parameters()) for m in (model, model.decoder, critic)
    )
    plan = describe(PLAIN, source)
    assert plan["memory for weights and optimizer (bytes)"] == 20 * whole
    assert plan["disk a checkpoint (bytes)"] == 16 * whole
    plan = describe(dataclasses.replace(ADVERSARIAL, decoder_only=True), source)
    assert plan["parameters"] == whole
    assert plan["memory for weights and optimizer (bytes)"] == (
        8 * whole + 12 * decoder + 16 * judge
    )
    assert plan["disk a checkpoint (bytes)"] == 8 * whole + 8 * decoder + 12 * judge
