"""The tokenizer's trainer: the recipe against a plain loop, the adversary, what changes nothing."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from tokenizer_making import (
    ADVERSARIAL,
    PLAIN,
    QUIET,
    START,
    STEPS,
    assert_same,
    files,
)
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from detok_pipe.latents.errors import ConfigError
from detok_pipe.latents.noise import Noise
from detok_pipe.pipelines.accelerators import make_accelerator, tensor_float32
from detok_pipe.pipelines.adversary import Adversary, Pairs
from detok_pipe.pipelines.ema import Ema
from detok_pipe.pipelines.image_loader import ImageLoader
from detok_pipe.pipelines.images import open_images
from detok_pipe.pipelines.run_directory import read_metrics
from detok_pipe.pipelines.tokenizer_inspection import Validation
from detok_pipe.pipelines.train_tokenizer import describe, train_tokenizer
from detok_pipe.pipelines.trained import build_tokenizer
from detok_pipe.tokenizer.discriminator import PatchDiscriminator
from detok_pipe.tokenizer.losses import discriminator_losses, reconstruction_losses
from detok_pipe.tokenizer.model import parameter_groups
from detok_pipe.tokenizer.perceptual import FeatureDistance

pytestmark = pytest.mark.usefixtures("small_discriminator")


def test_training_is_the_plain_loop_of_the_recipe(tokenizer_images, tmp_path) -> None:
    config = dataclasses.replace(ADVERSARIAL, adversarial_start="0 epochs", clip=0.05)
    train_tokenizer(config, tokenizer_images, tmp_path / "run", QUIET)

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
    loader = ImageLoader(
        open_images(tokenizer_images), config.image_size, config.global_batch, config.seed
    )
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
    tokenizer_images, tmp_path, finished_tokenizer
) -> None:
    every_step = dataclasses.replace(QUIET, checkpoint_every=1)
    train_tokenizer(PLAIN, tokenizer_images, tmp_path / "plain", every_step)
    train_tokenizer(ADVERSARIAL, tokenizer_images, tmp_path / "adversarial", every_step)
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
    records = read_metrics(finished_tokenizer)
    assert "adversarial" not in records[0]
    assert {"adversarial", "discriminator_loss"} <= records[1].keys()  # steps 2 and 3
    assert records[-1]["discriminator_loss"] > 0


def test_the_discriminators_step_leaves_the_tokenizer_alone(tokenizer_images) -> None:
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


def test_micro_batches_change_nothing_but_rounding(tokenizer_images, tmp_path) -> None:
    # AdamW's first steps divide by tiny moments; plain steps keep rounding small.
    train_tokenizer(PLAIN, tokenizer_images, tmp_path / "whole", QUIET)
    pieces = dataclasses.replace(QUIET, micro_batch=3)
    train_tokenizer(PLAIN, tokenizer_images, tmp_path / "pieces", pieces)
    first, second = files(tmp_path / "whole"), files(tmp_path / "pieces")
    torch.testing.assert_close(first["model"], second["model"], atol=2e-4, rtol=0)
    train_tokenizer(ADVERSARIAL, tokenizer_images, tmp_path / "adversarial", pieces)
    tracked = files(tmp_path / "adversarial")["discriminator"]["main.3.num_batches_tracked"]
    assert tracked == 2 * 3 * (STEPS - START)


def test_recomputed_activations_and_chosen_kernels_change_nothing(
    tokenizer_images, tmp_path, finished_tokenizer
) -> None:
    other = dataclasses.replace(QUIET, activation_checkpointing=True, deterministic=True)
    try:
        train_tokenizer(ADVERSARIAL, tokenizer_images, tmp_path / "run", other)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(files(tmp_path / "run"), files(finished_tokenizer))


def test_rounded_matrix_products_are_over_when_the_training_is() -> None:
    before = torch.get_float32_matmul_precision()
    for wanted in (True, False):
        with tensor_float32(wanted):
            assert torch.get_float32_matmul_precision() == ("high" if wanted else before)
        assert torch.get_float32_matmul_precision() == before


def test_bf16_trains_as_fp32_does(tokenizer_images, tmp_path, finished_tokenizer) -> None:
    train_tokenizer(
        dataclasses.replace(ADVERSARIAL, precision="bf16"),
        tokenizer_images,
        tmp_path / "run",
        QUIET,
    )
    assert all(value.dtype != torch.bfloat16 for value in files(tmp_path / "run")["model"].values())
    exact, rounded = read_metrics(finished_tokenizer), read_metrics(tmp_path / "run")
    assert len(exact) == len(rounded) == STEPS // QUIET.log_every
    for one, other in zip(exact, rounded, strict=True):
        for name in one.keys() & {"loss", "mse", "kl", "gradient_norm", "discriminator_loss"}:
            # bf16 rounds to one part in 256, and here to both sides about equally often.
            assert other[name] == pytest.approx(one[name], rel=4e-3), name
    assert exact[0]["kl"] != rounded[0]["kl"]


def test_looking_at_a_training_leaves_no_trace(
    tokenizer_images, tmp_path, finished_tokenizer
) -> None:
    look = Validation(every=2, data=tokenizer_images, features="none", limit=5)
    train_tokenizer(ADVERSARIAL, tokenizer_images, tmp_path / "run", QUIET, validation=look)
    assert_same(files(tmp_path / "run"), files(finished_tokenizer))
    scored = [r for r in read_metrics(tmp_path / "run") if "val/psnr" in r]
    assert [record["step"] for record in scored] == [2, 4, 6]
    assert scored[0]["val/images"] == 5
    assert scored[0]["val/psnr"] != scored[-1]["val/psnr"]
    names = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert names[:2] == ["step-00000002-corrupted.png", "step-00000002-reconstructions.png"]
    assert len(names) == 6
    # Without a validation set there are pictures of training images, after the last step.
    assert len(list((finished_tokenizer / "samples").iterdir())) == 2


def test_the_best_by_score_needs_scores_of_checkpoints(tokenizer_images, tmp_path) -> None:
    best = dataclasses.replace(QUIET, keep_best="score", checkpoint_every=4)
    for look, words in (
        (None, "--keep-best score needs images to score on .*--val-data"),
        (Validation(data=tokenizer_images, features="none"), "--features none"),
        (Validation(data=tokenizer_images, every=6), "--eval-every 6 is no multiple of .* 4"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_tokenizer(PLAIN, tokenizer_images, tmp_path / "run", best, validation=look)
    assert not (tmp_path / "run").exists()


def test_images_too_small_for_the_discriminator_are_refused(tokenizer_images, tmp_path) -> None:
    small = dataclasses.replace(ADVERSARIAL, image_size=16)
    with pytest.raises(ConfigError, match="image_size 16 set adversarial_start=null"):
        train_tokenizer(small, tokenizer_images, tmp_path / "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_an_adversary_that_would_join_after_the_end_is_refused(tokenizer_images, tmp_path) -> None:
    late = dataclasses.replace(PLAIN, adversarial_start="3 epochs")
    with pytest.raises(ConfigError, match=r"'3 epochs' is step 8, .*'6 steps' ends after 6"):
        train_tokenizer(late, tokenizer_images, tmp_path / "run", QUIET)
    with pytest.raises(ConfigError, match="adversarial_start=null"):
        describe(late, open_images(tokenizer_images))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_what_trains(tokenizer_images) -> None:
    source = open_images(tokenizer_images)
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
