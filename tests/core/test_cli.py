"""The command line: what it answers, what it refuses in one line, and its exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agentgym import presets, registry
from agentgym.cli import main
from agentgym.cli.arguments import COMMANDS
from agentgym.cli.output import Bar
from agentgym.cli.play import read_action
from agentgym.env import task_list
from agentgym.errors import ConfigError, DataError, UnknownName
from agentgym.rewards import composer
from agentgym.rollout import Runner, episodes
from agentgym.store import RunFolder
from agentgym.testing import CountingEnv
from agentgym.types import Array, Observation

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _counting() -> Iterator[None]:
    registry.register("counting-v0", CountingEnv, summary="count on")
    yield
    registry.unregister("counting-v0")


@pytest.fixture
def agentgym(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as ended:  # --help and --version
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return call


def refused(answer: tuple[int, str, str], *words: str) -> None:
    """One clear line on standard error, nothing on standard output, exit code 2."""
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("agentgym: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a.b=3", {"a": {"b": 3}}),
        ("a.b=0.5", {"a": {"b": 0.5}}),
        ("a.b=true", {"a": {"b": True}}),
        ("a.b=#", {"a": {"b": "#"}}),
        ("a.b='#'", {"a": {"b": "#"}}),
        ("a.b=../x y.csv", {"a": {"b": "../x y.csv"}}),
        ("a.b=", {"a": {"b": ""}}),
        ("a.b=c=d", {"a": {"b": "c=d"}}),
        ("a.b=1\nc = 2", {"a": {"b": "1\nc = 2"}}),
        ("a.b=2026-01-01", {"a": {"b": "2026-01-01"}}),
        ('a.b={title="name",price="cost"}', {"a": {"b": {"title": "name", "price": "cost"}}}),
        ("a.b=[1, 2]", {"a": {"b": [1, 2]}}),
    ],
)
def test_settings_are_toml_or_text(typed: str, meant: dict[str, Any]) -> None:
    assert presets.parse_settings([typed]) == meant


def test_later_settings_win_and_tables_merge() -> None:
    assert presets.parse_settings(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("typed", ["a.b", "=3", "a..b=3", ".a=1"])
def test_a_setting_without_key_or_value_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.b=value"):
        presets.parse_settings([typed])


def test_sections_name_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'env'"):
        presets.sections({"evn": {}}, ["env", "policy"])
    with pytest.raises(ConfigError, match="section"):
        presets.sections({"env": 3}, ["env"])


def test_presets_are_read_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[env]\nid = 'counting-v0'\n")
    registry.register("mine/preset", str(path), kind="presets")
    try:
        assert presets.read_preset("mine/preset") == presets.read_preset(str(path)) == {"env": {"id": "counting-v0"}}
    finally:
        registry.unregister("mine/preset", kind="presets")


def test_a_broken_preset_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("a = 1\nb = = 2\n")
    with pytest.raises(DataError, match=r"broken\.toml.*line 2"):
        presets.read_preset(str(path))
    with pytest.raises(DataError, match="no file"):
        presets.read_preset(str(tmp_path / "absent.toml"))


# --- list, help, version ----------------------------------------------------------------------------------------


def test_list_is_one_json_object(agentgym: Run) -> None:
    code, out, _ = agentgym("list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {"id": "counting-v0", "summary": "count on", "extra": ""} in listed["envs"]
    assert "torch" in [line["id"] for line in listed["policies"]]


def test_list_for_people_names_everything(agentgym: Run) -> None:
    code, out, _ = agentgym("list")
    assert code == 0
    assert "counting-v0" in out
    assert "policy-gradient" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(agentgym: Run, command: str) -> None:
    code, out, _ = agentgym(command, "--help")
    assert code == 0
    assert f"agentgym {command}" in out


def test_version(agentgym: Run) -> None:
    from agentgym import __version__

    assert agentgym("--version")[1].strip() == f"agentgym {__version__}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(agentgym: Run, shell: str) -> None:
    code, out, _ = agentgym("completion", shell)
    assert code == 0
    assert all(command in out for command in COMMANDS)


def test_start_up_imports_neither_torch_nor_numpy() -> None:
    code = "import sys; from agentgym.cli.arguments import parser; parser(['list']); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert not {"numpy", "torch", "asyncio", "rich"} & set(found.split())


@pytest.mark.skipif(os.name == "nt", reason="a pipe that is closed early is another error there")
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = "import sys; from agentgym.cli import main; sys.exit(main(['completion', 'bash']))"
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout is not None
    done.stdout.close()
    _, err = done.communicate(timeout=60)
    assert "Traceback" not in err


def test_a_terminal_that_cannot_spell_it_ends_nothing() -> None:
    code = "import sys; from agentgym.cli import main; sys.exit(main(['lst\u2192']))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "\\u2192" in done.stderr


# --- asked wrongly ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lst", ["'lst'", "did you mean 'list'?"]),
        ("list --jsn", ["--jsn", "--help"]),
        ("eval couting-v0 --policy random", ["'couting-v0'", "did you mean 'counting-v0'?"]),
        ("eval counting-v0 --policy randum", ["'randum'", "did you mean 'random'?"]),
        ("eval counting-v0 --policy random --set env.turn=3", ["'turn'", "did you mean 'turns'?"]),
        ("eval counting-v0 --policy random --set evn.turns=3", ["'evn'", "did you mean 'env'?"]),
        ("eval counting-v0 --policy random --set sampling.temprature=1", ["did you mean 'temperature'?"]),
        ("eval counting-v0 --policy random --set sampling.temperature=hot", ["temperature"]),
        ("eval counting-v0 --policy random --set env.turns=0", ["turns is at least 1"]),
        ("eval counting-v0 --policy random --episodes 0", ["at least one episode"]),
        ("eval counting-v0 --policy random --episodes many", ["'many'"]),
        ("eval counting-v0 --policy ftp://127.0.0.1/v1", ["'ftp://127.0.0.1/v1'", "an address like http://"]),
        ("eval counting-v0 --policy http://127.0.0.1/v1 --set policy.modle=m", ["'modle'", "did you mean 'model'?"]),
        ("eval counting-v0 --policy endpoint", ["'endpoint'", "url"]),
        ("eval counting-v0", ["--policy"]),
        ("check nothing-v0", ["'nothing-v0'"]),
        ("play counting-v0 --task -1", ["no number -1"]),
        ("replay nowhere", ["no run folder"]),
        ("report nowhere", ["no run folder"]),
        ("bench nothing", ["no benchmark 'nothing'"]),
        ("train shopping/nothing", ["preset"]),
        ("train absent.toml", ["absent.toml"]),
        ("train", ["preset"]),
        ("completion fish", ["'fish'"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(agentgym: Run, line: str, words: list[str]) -> None:
    refused(agentgym(*line.split()), *words)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(UnknownName):
        main(["check", "nothing-v0", "--debug"])


def test_a_folder_without_a_model_is_no_policy(agentgym: Run, tmp_path: Path) -> None:
    refused(agentgym("eval", "counting-v0", "--policy", str(tmp_path)), "config.json", "config.toml")


# --- eval -------------------------------------------------------------------------------------------------------


def test_eval_json_holds_the_promised_figures(agentgym: Run) -> None:
    code, out, _ = agentgym(
        "eval", "counting-v0", "--policy", "oracle", "--episodes", "6", "--split", "test", "--seed", "3", "--json",
        "--set", "env.turns=2", "--attempts", "2",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert found["episodes"] == 12
    assert found["return_mean"] == pytest.approx(3.0)
    assert found["turns"] == 24
    assert found["policy"] == "oracle"
    promised = ("success", "return_se", "metrics", "failures", "turns_per_second", "avg_at_k", "pass_all_k")
    assert all(key in found for key in promised)


def test_random_means_something_everywhere(agentgym: Run) -> None:
    code, out, _ = agentgym("eval", "gym:CartPole-v1", "--policy", "random", "--episodes", "5", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["success"] is None
    assert found["return_mean"] == found["turns"] / 5


def test_eval_for_people_is_a_table(agentgym: Run) -> None:
    code, out, _ = agentgym("eval", "counting-v0", "--policy", "random", "--episodes", "3")
    assert code == 0
    assert "turns/s" in out


def test_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 1.0, 30.0])
    monkeypatch.setattr("agentgym.cli.output.time.monotonic", lambda: next(clock))
    with Bar("work", 4) as bar:
        bar.advance()
        bar.advance("loss 1")
    assert capsys.readouterr().err == "work: 2/4, about 30 s left loss 1\n"


# --- play -------------------------------------------------------------------------------------------------------


def test_play_reads_lines_and_sums_up(agentgym: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n2\n"))
    code, out, _ = agentgym("play", "counting-v0", "--set", "env.turns=2", "--html", str(tmp_path / "played.html"))
    assert code == 0
    assert "terminated: return" in out
    assert "<html" in (tmp_path / "played.html").read_text()


def test_play_ends_where_the_input_ends(agentgym: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    code, out, _ = agentgym("play", "counting-v0", "--set", "env.turns=3")
    assert code == 1
    assert "left early" in out


TOOLS = {
    "search": {"name": "search", "parameters": {"properties": {"query": {}, "page": {}}}},
    "buy": {"name": "buy"},
}


@pytest.mark.parametrize(
    ("line", "calls"),
    [
        ("search red shoes page=2", [("search", {"query": "red shoes", "page": 2})]),
        ('search query="red shoes"', [("search", {"query": "red shoes"})]),
        ("buy", [("buy", {})]),
        ('{"name": "buy", "arguments": {"id": 3}}', [("buy", {"id": 3})]),
        ('[{"name": "buy"}, {"name": "search"}]', [("buy", {}), ("search", {})]),
        ("I would like shoes", []),
    ],
)
def test_typed_lines_become_calls_or_speech(line: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    action = read_action(line, Observation(), TOOLS)
    assert [(call.name, call.arguments) for call in action.tool_calls] == calls
    assert action.text == line


@pytest.mark.parametrize("line", ['{"name": 3}', "{broken", "[1]", 'search "open'])
def test_a_broken_call_is_asked_again(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - every kind of it is told to the person
        read_action(line, Observation(), TOOLS)


def test_numbers_become_arrays() -> None:
    seen = Observation(array=Array.of([0.5]))
    assert read_action("1", seen, {}).array == Array.of(1)
    assert read_action("[0.5, 1]", seen, {}).array == Array.of([0.5, 1])


# --- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    env = CountingEnv(turns=2)
    compose = composer(env.reward)
    with RunFolder.create(tmp_path / "run", {"env": {"id": "counting-v0", "turns": 2}}) as run:
        for played in asyncio.run(Runner(env, env.ladder()["random"]).collect(episodes(task_list(env, "train", 0, 3)))):
            run.append(played, step=0, value=compose.trajectory(played).value)
    return tmp_path / "run"


@pytest.mark.parametrize("which", ["", ":1", ":-1"])
def test_replay_finds_the_same(agentgym: Run, folder: Path, which: str) -> None:
    code, out, _ = agentgym("replay", f"{folder}{which}", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["same"], found["turns"], found["difference"]) == (True, 2, "")


def test_replay_by_episode_id(agentgym: Run, folder: Path) -> None:
    episode = json.loads(agentgym("replay", f"{folder}:2", "--json")[1])["episode"]
    assert json.loads(agentgym("replay", f"{folder}:{episode}", "--json")[1])["episode"] == episode


def test_replay_of_a_changed_environment_says_where(agentgym: Run, folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("turns = 2", "turns = 3"))
    code, out, _ = agentgym("replay", str(folder))
    assert code == 1
    assert "differs" in out


@pytest.mark.parametrize(("which", "word"), [(":7", "no number 7"), (":0.0.9x", "no episode")])
def test_replay_of_what_is_not_there(agentgym: Run, folder: Path, which: str, word: str) -> None:
    refused(agentgym("replay", f"{folder}{which}"), word)


def test_report_prints_where_it_is(agentgym: Run, folder: Path) -> None:
    code, out, _ = agentgym("report", str(folder))
    assert code == 0
    assert Path(out.strip()).read_text().startswith("<!doctype html>")


# --- bench ------------------------------------------------------------------------------------------------------


def test_bench_runs_what_is_registered(agentgym: Run) -> None:
    registry.register("adding", lambda times=2: {"sum": times * 2.0, "rows": [{"n": 1, "us": 0.5}]}, kind="benches")
    try:
        assert json.loads(agentgym("bench", "adding", "--json", "--set", "times=3")[1])["sum"] == 6.0
        assert "us" in agentgym("bench", "adding")[1]
        refused(agentgym("bench", "adding", "--set", "tims=3"), "did you mean 'times'?")
    finally:
        registry.unregister("adding", kind="benches")


# --- train ------------------------------------------------------------------------------------------------------


class Config(msgspec.Struct):
    """What the small trainer below is told."""

    env: dict[str, Any]
    steps: int = 2
    stop: bool = False

    def table(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        return {"trainer": "small", **found}


class Plan(msgspec.Struct):
    parameters: int = 7
    memory: dict[str, float] = msgspec.field(default_factory=lambda: {"weights": 28.0})
    seconds: dict[str, float] = msgspec.field(default_factory=lambda: {"all": 1.0})
    fits: bool = True
    verdict: str = "this machine can do it"


class Small:
    """A trainer as outsiders may write one: it judges two policies and learns nothing."""

    @staticmethod
    def resolve(table: dict[str, Any], overrides: list[str]) -> Config:
        return msgspec.convert(presets.merge(table, presets.parse_settings(overrides)), Config)

    @staticmethod
    def plan(config: Config) -> Plan:
        return Plan(fits=config.steps < 100)

    @staticmethod
    def train(config: Config | None, out: Path, *, resume: bool, progress: Callable[..., None]) -> dict[str, Any]:
        folder = RunFolder.open(out) if resume else RunFolder.create(out, config.table() if config else {})
        with folder:
            for step in range(2):
                progress("all", step + 1, 2, {"loss": 0.5, "success": 0.25})
                if config and config.stop:
                    raise KeyboardInterrupt
        judged = {"success": 0.5, "success_interval": (0.25, 0.75), "return_mean": 1.0, "episodes": 4}
        return {"before": judged, "after": judged, "ladder": {"oracle": judged}, "resumed": resume}


@pytest.fixture
def preset(tmp_path: Path) -> Iterator[str]:
    registry.register("small", Small, kind="trainers")
    path = tmp_path / "mine.toml"
    path.write_text('trainer = "small"\nsteps = 1\n[env]\nid = "counting-v0"\n')
    yield str(path)
    registry.unregister("small", kind="trainers")


def test_train_shows_before_and_after(agentgym: Run, preset: str, tmp_path: Path) -> None:
    code, out, err = agentgym("train", preset, "--out", str(tmp_path / "run"), "--set", "env.turns=3")
    assert code == 0
    assert "all: 2 steps, 0 s  success 0.25, loss 0.5" in err
    assert "25.0 % – 75.0 %" in out
    assert "turns = 3" in (tmp_path / "run" / "config.toml").read_text()


def test_train_json_is_the_summary(agentgym: Run, preset: str, tmp_path: Path) -> None:
    found = json.loads(agentgym("train", preset, "--out", str(tmp_path / "run"), "--json")[1])
    assert found["after"]["success"] == 0.5


def test_an_interrupted_run_says_how_to_go_on(agentgym: Run, preset: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    code, _, err = agentgym("train", preset, "--out", folder, "--set", "stop=true")
    assert code == 130
    assert f"agentgym train --resume {folder}" in err
    code, out, _ = agentgym("train", "--resume", folder, "--json")
    assert code == 0
    assert json.loads(out)["resumed"] is True


def test_a_run_is_never_written_over(agentgym: Run, preset: str, tmp_path: Path) -> None:
    agentgym("train", preset, "--out", str(tmp_path / "run"))
    refused(agentgym("train", preset, "--out", str(tmp_path / "run")), "--resume", "another --out")


def test_without_out_a_free_folder_is_found(agentgym: Run, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(preset).parent)
    for name in ("mine", "mine-2", "mine-3"):
        assert f"runs/{name}/report.html" in agentgym("train", preset)[1].replace("\\", "/")


def test_a_dry_run_prints_config_and_verdict(agentgym: Run, preset: str, tmp_path: Path) -> None:
    code, out, _ = agentgym("train", preset, "--dry-run", "--set", "steps=9")
    assert code == 0
    assert "steps = 9" in out
    assert "this machine can do it" in out
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_that_does_not_fit_exits_1(agentgym: Run, preset: str) -> None:
    code, out, _ = agentgym("train", preset, "--dry-run", "--json", "--set", "steps=100")
    assert code == 1
    assert json.loads(out)["plan"]["fits"] is False


def test_resume_takes_nothing_else(agentgym: Run, preset: str) -> None:
    refused(agentgym("train", preset, "--resume", "anywhere"), "its own config")
    refused(agentgym("train", "--resume", "nowhere"), "no run folder")


def test_an_unknown_trainer_names_the_nearest(agentgym: Run, preset: str) -> None:
    refused(agentgym("train", preset, "--set", "trainer=policy-gradeint"), "did you mean 'policy-gradient'?")


def test_a_method_set_on_the_command_line_replaces_the_presets_credit(agentgym: Run) -> None:
    """Layers reach the trainer apart: merged beforehand, the preset's own advantages would lie over the method's."""
    settings = ("--set", "method=gspo", "--set", "reward=environment", "--dry-run", "--json")
    config = json.loads(agentgym("train", "shopping/laptop", *settings)[1])["config"]
    assert config["objective"]["ratio"]["kind"] == "sequence"
    assert [term["key"] for term in config["advantage"]] == ["prompt"]
