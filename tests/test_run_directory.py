import subprocess
import sys

import pytest
import torch

from detok_pipe.latents.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    MismatchError,
)
from detok_pipe.pipelines.checkpoints import (
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
)
from detok_pipe.pipelines.run_directory import open_run, read_config, read_metrics

RUN = {"kind": "tokenizer", "config": {"gamma": 3.0}, "inputs": {"data": "abc"}, "keep": 2}


def with_checkpoints(path, *steps):
    with open_run(path, **RUN) as run:
        for step in steps:
            run.save_checkpoint(step, {"model": {"w": torch.full((3,), float(step))}}, {"p": step})


def test_a_checkpoint_comes_back(tmp_path):
    with_checkpoints(tmp_path / "run", 5)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert (checkpoint.step, checkpoint.progress) == (5, {"p": 5})
    assert checkpoint.tensors("model")["w"].tolist() == [5.0] * 3


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "no record"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    with_checkpoints(tmp_path / "run", 1, 2)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-5])
    elif damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "checkpoint.json").unlink()
    with pytest.warns(UserWarning, match="step-00000002"):
        assert latest_checkpoint(tmp_path / "run").step == 1


def test_no_whole_checkpoint_is_an_error(tmp_path):
    with_checkpoints(tmp_path / "run", 1)
    (tmp_path / "run/checkpoints/step-00000001/model.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(CheckpointError, match="start anew"),
    ):
        latest_checkpoint(tmp_path / "run")


def test_a_changed_setting_is_named_with_both_values(tmp_path):
    with_checkpoints(tmp_path / "run")
    changed = {**RUN, "config": {"gamma": 2.0}, "inputs": {"data": "xyz"}}
    with (
        pytest.raises(MismatchError, match=r"gamma: 3.0 there, 2.0 now; data: 'abc' there"),
        open_run(tmp_path / "run", **changed),
    ):
        pass


def test_a_strange_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex"), open_run(tmp_path, **RUN):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_as_target_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"), open_run(tmp_path / "out", **RUN):
        pass


def test_a_run_in_use_names_its_holder(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from detok_pipe.pipelines.run_directory import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with_checkpoints(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"process {other.pid}"):
            with_checkpoints(tmp_path / "run")
        other.kill()
        other.wait()
        with_checkpoints(tmp_path / "run")


def test_a_run_of_another_kind_is_refused(tmp_path):
    with_checkpoints(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a tokenizer run"):
        read_config(tmp_path / "run", "generator")
    with pytest.raises(CheckpointError, match="no run directory"):
        read_config(tmp_path / "nowhere", "generator")


def test_metrics_cut_short_are_read_up_to_the_cut(tmp_path):
    with open_run(tmp_path / "run", **RUN) as run:
        run.log(1, {"loss": 2.0})
        run.log(2, {"loss": 1.0})
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
        assert [r["step"] for r in read_metrics(run.path)] == [1, 2]
        run.forget_metrics_after(1)
        assert read_metrics(run.path) == [{"step": 1, "loss": 2.0}]


def test_optimizer_state_survives_as_flat_tensors():
    def trained():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters())

    layer, optimizer = trained()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    _, other = trained()
    load_optimizer_tensors(other, optimizer_tensors(optimizer))
    torch.testing.assert_close(optimizer.state_dict()["state"], other.state_dict()["state"])
