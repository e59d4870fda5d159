import json
import os
import subprocess
import sys

import pytest

from detok_pipe.latents.errors import (
    CheckpointError,
    ConfigError,
    LockedError,
    MismatchError,
    StorageError,
)
from detok_pipe.pipelines.run_directory import open_run, read_config, read_metrics

RUN = {"kind": "tokenizer", "config": {"gamma": 3.0}, "inputs": {"data": "abc"}, "keep": 2}


def begin(path):
    with open_run(path, **RUN):
        pass


def test_a_changed_setting_is_named_with_both_values(tmp_path):
    begin(tmp_path / "run")
    changed = {**RUN, "config": {"gamma": 2.0}, "inputs": {"data": "xyz"}}
    with (
        pytest.raises(MismatchError, match=r"gamma: 3.0 there, 2.0 now; data: 'abc' there"),
        open_run(tmp_path / "run", **changed),
    ):
        pass


def test_a_setting_that_came_later_had_its_default(tmp_path):
    begin(tmp_path / "run")
    later = {**RUN, "config": {**RUN["config"], "holdout": 0}, "defaults": {"holdout": 0}}
    with open_run(tmp_path / "run", **later):
        pass
    later["config"]["holdout"] = 5
    with (
        pytest.raises(MismatchError, match=r"\(holdout: 0 there, 5 now\)"),
        open_run(tmp_path / "run", **later),
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
    begin(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=f"process {other.pid}"):
            begin(tmp_path / "run")
        other.kill()
        other.wait()
        begin(tmp_path / "run")


def test_a_run_is_read_as_utf_8_whatever_the_locale(tmp_path):
    with open_run(tmp_path / "run", **RUN, extra={"class_names": ["Vögel"]}):
        pass
    code = (
        "import pathlib, sys; from detok_pipe.pipelines.run_directory import read_config\n"
        "print(ascii(read_config(pathlib.Path(sys.argv[1]))['class_names']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert done.stdout.strip() == ascii(["Vögel"]).encode()


def test_a_run_of_another_kind_is_refused(tmp_path):
    begin(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds a tokenizer run"):
        read_config(tmp_path / "run", "generator")
    with pytest.raises(CheckpointError, match="no run directory"):
        read_config(tmp_path / "nowhere", "generator")


@pytest.mark.parametrize("text", [b"[1]", b"\xff", b"{"])
def test_a_configuration_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_read_only_run_is_named(small_disk):
    disk, mount = small_disk
    mount("remount,size=100k")
    begin(disk / "run")
    mount("remount,ro")
    with pytest.raises(StorageError, match="read-only"):
        begin(disk / "run")
    mount("remount,rw")


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_a_configuration_without_a_section_is_refused(tmp_path, kind):
    sections = ["config", "inputs", "versions", *["latents"] * (kind == "generator")]
    whole = {"kind": kind, **{section: {} for section in sections}}
    for section in sections:
        for damaged in ({k: v for k, v in whole.items() if k != section}, {**whole, section: 1}):
            (tmp_path / "config.json").write_text(json.dumps(damaged))
            with pytest.raises(CheckpointError, match=rf"config\.json .* no {section},"):
                read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert read_config(tmp_path, kind) == whole


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(StorageError, match="dangling is a file, or a link that leads nowhere"):
        begin(tmp_path / "dangling" / "run")


def test_damaged_metrics_are_left_out(tmp_path):
    lines = [b'{"step": 1}', b"12", b'{"loss": 2.0}', b'{"step": "2"}', b"\xff", b'{"step": 3}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]


def test_metrics_cut_short_are_read_up_to_the_cut(tmp_path):
    with open_run(tmp_path / "run", **RUN) as run:
        run.log(1, {"loss": 2.0})
        run.log(2, {"loss": 1.0})
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')
        assert [r["step"] for r in read_metrics(run.path)] == [1, 2]
        run.forget_metrics_after(1)
        assert read_metrics(run.path) == [{"step": 1, "loss": 2.0}]
