"""The built wheel: its top level, its types, its presets, its entry points."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"agentgym", "agentgym_envs", "agentgym_policies", "agentgym_trainers", "agentgym_sandbox"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_top_level_is_the_five_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_every_package_says_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_presets_travel(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "envs"
    presets = {path.relative_to(source).as_posix() for path in source.glob("*/*/presets/*.toml")}
    assert presets
    assert presets <= set(wheel.namelist())


def test_entry_points_lead_to_files_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    (declared,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    lines = [line for line in wheel.read(declared).decode().splitlines() if "=" in line]
    modules = {line.partition("=")[2].strip().partition(":")[0].replace(".", "/") for line in lines}
    names = set(wheel.namelist())
    assert modules
    assert all(f"{module}.py" in names or f"{module}/__init__.py" in names for module in modules), modules


def test_nothing_of_the_workshop_is_in_it(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if name.startswith(("tests", "bench", "docs", "runs"))]
