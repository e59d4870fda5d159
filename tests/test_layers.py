"""The import table of the architecture, held against the sources, and the packages in the wheel."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "latents": set(),
    "tokenizer": {"latents"},
    "generators": {"latents"},
    "evaluation": {"latents"},
    "pipelines": {"latents", "tokenizer", "generators", "evaluation"},
}
LATENTS_FOR_EVERYONE = {
    "generators": {"errors", "noise"},
    "evaluation": {"errors", "atomic"},
}
ONLY_PIPELINES = {"accelerate", "click", "rich", "torch.distributed"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(file for package in MAY_IMPORT for file in (ROOT / package).glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_imports_follow_the_table(file: Path):
    package = file.parent.name
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "detok_pipe" and len(parts) > 1:
            other = parts[1]
            assert other == package or other in MAY_IMPORT[package], f"{file} imports {name}"
            if other == "latents" and package in LATENTS_FOR_EVERYONE and len(parts) > 2:
                assert parts[2] in LATENTS_FOR_EVERYONE[package], f"{file} imports {name}"
        if package != "pipelines":
            assert not any(name == o or name.startswith(o + ".") for o in ONLY_PIPELINES), name


def test_folders_are_flat():
    for package in MAY_IMPORT:
        nested = [p for p in (ROOT / package).iterdir() if p.is_dir() and p.name != "__pycache__"]
        assert not nested, nested


def test_no_folder_shadows_the_installed_package():
    assert not (ROOT / "detok_pipe").exists()


def test_each_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {f"detok_pipe.{package}" for package in MAY_IMPORT}
    assert settings["package-dir"] == {f"detok_pipe.{p}": p for p in MAY_IMPORT}
    for package in MAY_IMPORT:
        assert (ROOT / package / "py.typed").exists()
