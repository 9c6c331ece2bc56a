"""The size budget: body lines of functions without their docstring, and lines of files."""

from __future__ import annotations

import ast
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [
    path
    for folder in ("agentgym", "envs", "policies", "trainers", "sandbox")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def body_lines(node: FunctionNode) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    return node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0


def functions() -> list[tuple[int, str]]:
    return [
        (body_lines(node), f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
        for path in SHIPPED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, FunctionNode)
    ]


def test_body_lines_leave_the_docstring_out() -> None:
    tree = ast.parse('def f():\n    """One.\n\n    Two."""\n    a = 1\n    return a\n')
    assert isinstance(tree.body[0], ast.FunctionDef)
    assert body_lines(tree.body[0]) == 2


def test_functions_are_short() -> None:
    sizes = [size for size, _ in functions()]
    assert median(sizes) < 10
    assert quantiles(sizes, n=10)[-1] < 35


def test_an_algorithm_fits_one_screen() -> None:
    longest = sorted(functions(), reverse=True)[0]
    assert longest[0] <= 70, f"split {longest[1]}: {longest[0]} lines"


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SHIPPED if (n := len(p.read_text("utf-8").splitlines())) >= 600}
    assert not long, f"files of 600 lines or more: {long}"
