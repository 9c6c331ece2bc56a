"""The registry: versioned ids, one owner per name, errors with the way out, plugins that cannot break the house."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import agentgym
from agentgym import registry
from agentgym.env import Environment
from agentgym.errors import ConfigError, DuplicateName, MissingExtra, UnknownName
from agentgym.registry import Spec, catalogue, load, lookup, make, register, unregister
from agentgym.types import Action, Observation, StepResult, Task, say


class Corridor(Environment):
    """Three steps to the right."""

    def __init__(self, length: int = 3) -> None:
        self.length = length

    def tasks(self, split: str = "train", seed: int = 0) -> Iterator[Task]:
        yield Task(env="corridor-v0", split=split, seed=seed)

    async def reset(self, task: Task) -> dict[str, Observation]:
        return {"agent": say("go")}

    async def step(self, actions: Mapping[str, Action]) -> StepResult:
        return StepResult(terminated=True)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in registry.KINDS})
    yield
    registry._discovered.cache_clear()


class Point:
    """An entry point as `importlib.metadata` gives it."""

    def __init__(self, value: str, declared: object) -> None:
        self.value, self.declared = value, declared

    def load(self) -> object:
        if isinstance(self.declared, Exception):
            raise self.declared
        return self.declared


def plugins(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    registry._discovered.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "agentgym.envs" else ())


def test_what_is_registered_is_made_with_its_config() -> None:
    register("corridor-v0", Corridor, summary="a corridor", defaults={"length": 4})
    built = make("corridor-v0")
    assert isinstance(built, Corridor)
    assert (built.length, built.id) == (4, "corridor-v0")
    assert agentgym.make("corridor-v0", length=9).length == 9  # type: ignore[attr-defined]
    assert catalogue()["corridor-v0"].summary == "a corridor"
    assert load("corridor-v0") is Corridor
    unregister("corridor-v0")
    assert "corridor-v0" not in catalogue()


def test_a_taken_id_is_an_error() -> None:
    register("corridor-v0", Corridor)
    with pytest.raises(DuplicateName, match=r"'corridor-v0' is registered already .*choose another id"):
        register("corridor-v0", Corridor)
    register("corridor-v1", Corridor)


@pytest.mark.parametrize("id", ["corridor", "corridor-0", "corridor-v", "-v0", "a b-v0", "x/y/z-v0", "corridor-v0 "])
def test_an_id_without_a_version_is_refused(id: str) -> None:
    with pytest.raises(ConfigError, match="versioned, like 'name-v0'"):
        register(id, Corridor)


@pytest.mark.parametrize("id", ["a-v0", "yours/maze-v12", "Maze_2-v1", "my.org/maze-v0"])
def test_versioned_ids_are_taken(id: str) -> None:
    assert register(id, Corridor).id == id


def test_an_unknown_id_names_the_nearest() -> None:
    register("corridor-v0", Corridor)
    with pytest.raises(UnknownName, match=r"no environment 'coridor-v0'; did you mean 'corridor-v0'\?"):
        make("coridor-v0")
    with pytest.raises(UnknownName, match="no policy 'x'"):
        lookup("x", "policies")
    with pytest.raises(UnknownName, match="did you mean 'policies'"):
        register("x", Corridor, kind="policys")
    with pytest.raises(UnknownName):
        unregister("never-v0")


def test_a_misspelt_config_key_names_the_nearest() -> None:
    register("corridor-v0", Corridor)
    with pytest.raises(UnknownName, match="did you mean 'length'"):
        make("corridor-v0", lenght=4)


def test_a_missing_extra_is_named_and_another_missing_module_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_torchlike.py").write_text("import torchlike_absent.nn\n")
    (tmp_path / "needs_other.py").write_text("import other_absent\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = Spec(id="deep-v0", target="needs_torchlike:Env", extra="train", requires=("torchlike_absent",))
    with pytest.raises(MissingExtra, match=r"deep-v0 needs the extra \[train\]: pip install 'agentgym-suite\[train\]'"):
        spec.load()
    with pytest.raises(ModuleNotFoundError, match="other_absent"):
        Spec(id="other-v0", target="needs_other:Env", extra="train", requires=("torchlike_absent",)).load()


def test_targets_are_imported_only_when_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_target.py").write_text("class Outer:\n    class Inner:\n        pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins(monkeypatch, Point("p:E", [Spec(id="lazy-v0", target="lazy_target:Outer.Inner")]))
    assert "lazy-v0" in catalogue()
    assert "lazy_target" not in sys.modules
    assert load("lazy-v0").__name__ == "Inner"


def test_a_broken_plugin_is_reported_by_name_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Point("good:ENVS", lambda: [Spec(id="good-v0", target=Corridor)])
    odd = Point("odd:ENVS", ["not a spec"])
    plugins(monkeypatch, Point("bad:ENVS", ImportError("no module named bad")), odd, good)
    with pytest.warns(UserWarning, match="is left out") as warned:
        found = catalogue()
    assert [str(w.message) for w in warned] == [
        "plugin 'bad:ENVS' is left out: ImportError: no module named bad",
        "plugin 'odd:ENVS' is left out: TypeError: a catalogue lists Specs, not 'not a spec'",
    ]
    assert list(found) == ["good-v0"]


def test_two_packages_with_one_id_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [Spec(id="same-v0", target="a:X")], [Spec(id="same-v0", target="b:Y")]
    plugins(monkeypatch, *(Point(f"p{i}:E", s) for i, s in enumerate(specs)))
    with pytest.raises(DuplicateName, match="two packages declare envs 'same-v0': a:X, b:Y"):
        catalogue()


def test_our_own_catalogues_are_found_and_load() -> None:
    assert lookup("shopping-v0").summary
    for spec in catalogue("envs").values():
        assert registry._ENV_ID.fullmatch(spec.id)
