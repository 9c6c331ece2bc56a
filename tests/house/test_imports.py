"""Who may import whom: read from the syntax tree, so that lazy imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "agentgym": ROOT / "agentgym",
    "agentgym_envs": ROOT / "envs" / "agentgym_envs",
    "agentgym_policies": ROOT / "policies" / "agentgym_policies",
    "agentgym_trainers": ROOT / "trainers" / "agentgym_trainers",
    "agentgym_sandbox": ROOT / "sandbox" / "agentgym_sandbox",
}
HEAVY = {"torch", "transformers", "tokenizers", "safetensors"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import in a file, `importlib.import_module("literal")` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def files(room: str) -> list[Path]:
    return sorted(ROOMS[room].rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_the_core(room: str) -> None:
    others = set(ROOMS) - {room, "agentgym"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(room)
        for line, name in imports(path)
        if name.split(".")[0] in others
    ]
    assert not wrong, f"rooms meet in the registry only: {wrong}"


def test_the_core_imports_torch_in_modeling_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("agentgym")
        if "modeling" not in path.parts
        for line, name in imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, f"torch lives in agentgym.modeling, the torch engine and the trainers: {wrong}"


def test_the_core_reaches_modeling_lazily() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files("agentgym")
        if "modeling" not in path.parts
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("agentgym.modeling")
    ]
    assert not wrong, f"agentgym.modeling imports torch: import it where it is used, {wrong}"


@pytest.mark.parametrize("folder", ["envs", "policies", "trainers", "sandbox"])
def test_bare_names_stay_out_of_site_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"`import {folder}` would become real"


def test_nothing_posix_only_is_imported_at_the_top() -> None:
    posix = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for room in ROOMS
        for path in files(room)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and {getattr(node, "module", None), *(alias.name for alias in node.names)} & posix
    ]
    assert not wrong, f"the core runs on macOS and Windows too: {wrong}"
