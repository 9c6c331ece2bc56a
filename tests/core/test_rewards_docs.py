"""docs/rewards.md is true: its Python runs as written, its TOML composes, every operation and composite is named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from agentgym.rewards import composer
from agentgym.rewards.composites import COMPOSITES
from agentgym.rewards.judges import KINDS, declared
from agentgym.rewards.ops import OPS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def found(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_python_runs_in_one_go() -> None:
    exec(compile("\n".join(found("python")), "rewards.md", "exec"), {})


def test_the_toml_composes() -> None:
    tables = [tomllib.loads(block) for block in found("toml")]
    rewards = [{**t["reward"], **({"then": {"op": "sum"}} if "judge" in t else {})} for t in tables]
    names = [composer(reward).names for reward in rewards]
    assert names == [("rm.0", "rm.1", "rm.2"), ("polite",), ("sold", "careful.violated")]
    assert [list(declared(t.get("judge", ())).judges) for t in tables] == [[], ["polite"], []]


def test_every_operation_composite_and_kind_of_judge_is_named() -> None:
    named = set(re.findall(r"`([\w.]+)`", PAGE)) | {"term"}
    assert not set(OPS) - named
    assert not set(COMPOSITES) - named
    assert not set(KINDS) - named
