"""The shared loop, on a problem so small that its properties can be checked bit for bit."""

import dataclasses
import os
import signal

import pytest
import torch
from torch import nn
from training_making import Stream

from detok_pipe.latents.errors import Interrupted, NonFiniteError
from detok_pipe.pipelines.accelerators import make_accelerator
from detok_pipe.pipelines.accumulation import accumulate
from detok_pipe.pipelines.checkpoints import checkpoint_paths, latest_checkpoint
from detok_pipe.pipelines.config import Execution
from detok_pipe.pipelines.ema import Ema, ema_decay
from detok_pipe.pipelines.inspection import Inspection
from detok_pipe.pipelines.run_directory import open_run, read_metrics
from detok_pipe.pipelines.training import Parts, fit, learning_rate

STEPS = 12
QUIET = Execution(device="cpu", trackers=(), quiet=True, log_every=5, checkpoint_every=4)


def train(
    folder, *, steps=STEPS, execution=QUIET, before_step=lambda step: None, poison=None, **more
):
    """Train the toy; returns its weights, EMA weights and the optimizer's state."""
    accelerator = make_accelerator("fp32", execution)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 4))
    ema = Ema(model)
    optimizer = torch.optim.AdamW(model.parameters())
    parts = Parts({"model": model}, {"optimizer": optimizer}, ema, Stream())
    trained = accelerator.prepare_model(model)

    def update(batch, step):
        before_step(step)

        def losses(part):
            scale = float("nan") if step == poison else 1.0
            return {"loss": (trained(part.x) - part.x).square().mean() * scale}

        values = accumulate(accelerator, trained, batch, execution.micro_batch, losses)
        optimizer.step()
        optimizer.zero_grad()
        return values

    with open_run(
        folder, kind="tokenizer", config={}, inputs={}, keep=execution.keep_checkpoints
    ) as run:
        fit(
            "toy",
            accelerator=accelerator,
            run=run,
            parts=parts,
            resume=latest_checkpoint(folder),
            update=update,
            steps=steps,
            rate=lambda step: learning_rate(
                step, steps=steps, peak=1e-2, warmup=0.25, schedule="cosine"
            ),
            decay=lambda step: ema_decay(step, 0.9, True),
            global_batch=8,
            seed=3,
            execution=execution,
            describe_ids=lambda ids: f"rows {ids[0]} to {ids[-1]}",
            **more,
        )
    return model.state_dict(), ema.module.state_dict(), optimizer.state_dict()["state"]


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_equals_uninterrupted(tmp_path, signum):
    expected = train(tmp_path / "whole")

    def interrupt(step):
        if step == 6:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted) as stopped:
        train(tmp_path / "parts", before_step=interrupt)
    assert stopped.value.exit_code == 128 + signum
    assert latest_checkpoint(tmp_path / "parts").step == 7
    assert_equal(train(tmp_path / "parts"), expected)
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert whole[-1]["step"] == parts[-1]["step"] == STEPS


def test_a_crash_costs_only_the_steps_since_the_checkpoint(tmp_path):
    expected = train(tmp_path / "whole")

    def crash(step):
        if step == 10:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(tmp_path / "parts", before_step=crash)
    seen = []
    assert_equal(train(tmp_path / "parts", before_step=seen.append), expected)
    assert seen == [8, 9, 10, 11]
    steps = [record["step"] for record in read_metrics(tmp_path / "parts")]
    assert steps == sorted(set(steps))


def test_micro_batches_give_the_same_gradients(tmp_path):
    accelerator = make_accelerator("fp32", QUIET)
    model = nn.Linear(4, 4)
    batch = next(iter(Stream()))
    gradients = []
    for size in (None, 3, 1):
        model.zero_grad()
        values = accumulate(
            accelerator, model, batch, size, lambda part: {"loss": model(part.x).square().mean()}
        )
        gradients.append((model.weight.grad.clone(), values["loss"]))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 7.*positions 48, 49.*rows 48"):
        train(tmp_path / "run", poison=6)
    assert latest_checkpoint(tmp_path / "run").step == 4


def test_old_checkpoints_are_removed(tmp_path):
    train(tmp_path / "run", execution=dataclasses.replace(QUIET, keep_checkpoints=2))
    assert [p.name for p in checkpoint_paths(tmp_path / "run")] == [
        "step-00000008",
        "step-00000012",
    ]


def test_inspections_see_each_interval_and_change_nothing(tmp_path):
    expected = train(tmp_path / "plain")
    seen = []

    def look(step):
        seen.append(step)
        torch.manual_seed(99)
        return {"score": float(step)}

    assert_equal(train(tmp_path / "run", inspections=[Inspection(5, look)]), expected)
    assert seen == [5, 10, 12]
    found = [(r["step"], r["score"]) for r in read_metrics(tmp_path / "run") if "score" in r]
    assert found == [(5, 5.0), (10, 10.0), (12, 12.0)]


def test_a_finished_run_does_nothing(tmp_path):
    train(tmp_path / "run")
    seen = []
    train(tmp_path / "run", before_step=seen.append)
    assert seen == []


def test_the_learning_rate_rises_then_follows_its_schedule():
    rates = [
        learning_rate(step, steps=100, peak=1.0, warmup=0.25, schedule="cosine")
        for step in range(100)
    ]
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == rates[24] == 1.0
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] < 0.001
    assert learning_rate(50, steps=100, peak=0.5, warmup=0, schedule="constant") == 0.5
