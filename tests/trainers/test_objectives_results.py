"""The script behind docs/results/objectives.md: its cells differ in the method alone, go on, and make a page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from agentgym.errors import ConfigError
from agentgym_trainers import methods
from agentgym_trainers.loop import PolicyGradient

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("objectives_results", ROOT / "bench" / "objectives_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def short(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Two updates a cell, and no certificate that is not asked for."""
    monkeypatch.setattr(script, "RUN", {**script.RUN, "run": {"steps": 2}})
    return script


def test_a_cell_of_the_lesson_is_the_methods_declaration(script: ModuleType) -> None:
    runs = {name: script.lesson_config(name, 3) for name in ("grpo", "gspo", "riskpo", "dcpo", "dpo")}
    assert {run.rollout.group_size for run in runs.values()} == {8}
    assert {run.run.seed for run in runs.values()} == {3}
    assert runs["gspo"].objective == methods.declared(methods.load("gspo")).objective
    assert runs["riskpo"].advantage[0].bundle == 2
    assert (runs["dcpo"].strategy.sample, runs["dcpo"].strategy.keep) == (8, 4)
    assert runs["dpo"].run.algorithm == "preference"
    with pytest.raises(ConfigError, match="needs hints"):
        script.lesson_config("sage", 0)


def test_cells_are_made_once_and_a_refusal_is_a_result(short: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "grpo-0.json"
    short._cell(path, lambda: short.lesson("grpo", 0))
    found = short.read(path)
    assert len(found["values"]) == 3
    assert found["episodes"] == 2 * 4 * 8
    assert 0.2 < found["values"][0][0] < 0.3 < 0.55
    assert found["values"][0] != found["values"][2]
    short._cell(path, lambda: pytest.fail("made twice"))
    short._cell(tmp_path / "sage-0.json", lambda: short.lesson("sage", 0))
    assert "hint_levels" in short.read(tmp_path / "sage-0.json")["error"]


def test_the_page_ranks_methods_and_says_what_was_not_run(short: ModuleType, tmp_path: Path) -> None:
    for method in ("grpo", "dr-grpo", "sage"):
        for name, make in (
            (f"{method}-0", lambda method=method: short.lesson(method, 0)),
            (f"{method}.estimate", lambda: {"bias": 0.5, "signal": 2.0}),
            (f"{method}.certificate", lambda: {"verdicts": [{"trap": "std scaling", "status": "caught"}], "gaps": []}),
        ):
            short._cell(tmp_path / "exact" / f"{name}.json", make)
    page = tmp_path / "page.md"
    short.write_page(tmp_path, 1, page)
    text = page.read_text("utf-8")
    assert "| dr-grpo |" in text
    assert "| grpo |" in text
    assert "- sage: the strategy 'hint_levels' needs hints" in text
    assert "std scaling" in text
    assert "shopping/laptop" not in text


def test_shopping_cells_differ_from_the_preset_in_the_method_alone(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shop, "weights", lambda run: run)
    preset = PolicyGradient.resolve("shopping/laptop", ["reward=environment"])
    for name in script.SHOPPING:
        cell = script.shopping_config(Path("out"), name, 1, ["warmup.steps=3"])
        assert (cell.env, cell.reward, cell.sampling, cell.optim) == (
            preset.env, preset.reward, preset.sampling, preset.optim,
        )  # fmt: skip
        assert cell.objective == methods.declared(methods.load(name)).objective
        assert cell.warmup.steps == cell.sft.steps == 0
        played = getattr(cell.strategy, "sample", cell.rollout.group_size) * cell.rollout.tasks_per_step
        assert played == 192
    assert msgspec.structs.replace(cell.rollout, tasks_per_step=24) == preset.rollout
