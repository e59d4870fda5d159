"""What README and report advise works: the Python runs on a cache, the commands exist."""

import re
from pathlib import Path

import click
import pytest
import torch
from cache_making import plan_of, write_cache

from detok_pipe.pipelines import cli, report_quickstart

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def shell_lines() -> list[str]:
    lines = [line.strip() for line in README.read_text().splitlines() if line.startswith("    ")]
    return [line.rpartition("&& ")[2] for line in lines if "detok-pipe " in line]


def test_the_python_example_is_short_and_runs(tmp_path, monkeypatch) -> None:
    (example,) = blocks("python")
    code = [
        line for line in example.splitlines() if line and not line.startswith(("import", "from"))
    ]
    assert len(code) <= 15
    write_cache(tmp_path / "cache", plan_of(20))
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    saved = torch.load(tmp_path / "mine.pt", weights_only=True)
    assert set(saved) == {"model", "position"}


@pytest.mark.parametrize(
    "lines", [shell_lines(), report_quickstart._OWN_IMAGES, report_quickstart._IMAGENET]
)
def test_commands_and_options_that_we_advise_exist(lines) -> None:
    assert len(lines) >= 5
    for line in lines:
        _, name, *words = line.split()
        assert name in cli.COMMANDS, line
        command = cli.group.get_command(click.Context(cli.group), name)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {w for w in words if w.startswith("--")} <= known, line


def test_the_readme_explains_each_exit_code() -> None:
    section = re.search(r"^## Exit codes\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    cells = re.findall(r"^\| ([\d, ]+) \| \w", section[1], re.MULTILINE)
    assert ", ".join(cells).split(", ") == ["0", "2", "3", "130", "138", "143"]
