import threading

import pytest
import torch

from detok_pipe.latents import atomic
from detok_pipe.latents.errors import CheckpointError
from detok_pipe.pipelines.checkpoints import (
    checkpoint_paths,
    latest_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    remove_checkpoints,
    write_checkpoint,
)


def write(run, *steps, metrics=lambda step: {}):
    """Checkpoints of the steps, in a folder that has a configuration as runs do."""
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text("{}")
    for step in steps:
        tensors = {"model": {"w": torch.full((3,), float(step))}}
        write_checkpoint(run, step, tensors, {"p": step}, metrics(step))
    return run


def steps_of(run):
    return [int(path.name[5:]) for path in checkpoint_paths(run)]


def test_a_checkpoint_comes_back(tmp_path):
    write(tmp_path / "run", 5)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert (checkpoint.step, checkpoint.progress) == (5, {"p": 5})
    assert checkpoint.tensors("model")["w"].tolist() == [5.0] * 3


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "remove", "no record", "other record", "list", "not text"]
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    write(tmp_path / "run", 1, 2)
    folder = tmp_path / "run" / "checkpoints" / "step-00000002"
    file = folder / "model.safetensors"
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-5])
    elif damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "remove":
        file.unlink()
    elif damage == "no record":
        (folder / "checkpoint.json").unlink()
    else:
        record = {"other record": b'{"step": 2}', "list": b"[]", "not text": b"\xff"}[damage]
        (folder / "checkpoint.json").write_bytes(record)
    with pytest.warns(UserWarning, match="step-00000002"):
        assert latest_checkpoint(tmp_path / "run").step == 1


def test_no_whole_checkpoint_is_an_error(tmp_path):
    write(tmp_path / "run", 1)
    (tmp_path / "run/checkpoints/step-00000001/model.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(CheckpointError, match="start anew"),
    ):
        latest_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("rule", "stay"),
    [
        ((1, None, None), [6]),
        ((2, None, None), [5, 6]),
        ((1, 2, None), [2, 4, 6]),
        ((1, None, "loss"), [3, 6]),
    ],
)
def test_checkpoints_stay_by_the_rule(tmp_path, rule, stay):
    run = write(tmp_path / "run", *range(1, 7), metrics=lambda step: {"loss": abs(step - 3)})
    remove_checkpoints(run, 6, *rule)
    assert steps_of(run) == stay
    names = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(names) == [f"step-{step:08d}" for step in stay]


def test_the_best_score_is_that_of_the_network_used_last(tmp_path):
    scores = [{"FD-EffLite2@128": 1.0}, {"FID": 8.0}, {"FID": 9.0}, {}, {}]
    run = write(tmp_path / "run", *range(1, 6), metrics=lambda step: scores[step - 1])
    remove_checkpoints(run, 5, 1, None, "score")
    assert steps_of(run) == [2, 5]


def test_a_run_can_be_read_while_it_trains(tmp_path, recwarn):
    run = write(tmp_path / "run", 1)

    def train():
        for step in range(2, 150):
            write(run, step)
            remove_checkpoints(run, step, 1, None, None)

    training = threading.Thread(target=train)
    training.start()
    seen = [1]
    while training.is_alive():
        seen.append(latest_checkpoint(run).step)
    training.join()
    assert seen == sorted(seen)
    assert not recwarn.list


def test_a_checkpoint_that_goes_while_it_is_checked_gives_way_to_a_newer_one(
    tmp_path, monkeypatch, recwarn
):
    run = write(tmp_path / "run", 1)

    def overtaken(file):
        monkeypatch.undo()
        write(run, 2)
        remove_checkpoints(run, 2, 1, None, None)
        return atomic.crc32c_file(file)

    monkeypatch.setattr(atomic, "crc32c_file", overtaken)
    assert latest_checkpoint(run).step == 2
    assert not recwarn.list


def test_a_checkpoint_that_goes_before_it_is_loaded_says_so(tmp_path):
    run = write(tmp_path / "run", 1)
    checkpoint = latest_checkpoint(run)
    write(run, 2)
    remove_checkpoints(run, 2, 1, None, None)
    with pytest.raises(CheckpointError, match=r"removed .* run the same command again"):
        checkpoint.tensors("model")


def test_a_damaged_newer_checkpoint_does_not_take_the_place_of_a_new_one(tmp_path):
    run = write(tmp_path / "run", 6, 8)
    (run / "checkpoints/step-00000008/model.safetensors").unlink()
    write(run, 7)  # having gone on from 6
    remove_checkpoints(run, 7, 1, None, None)
    assert steps_of(run) == [7]


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
