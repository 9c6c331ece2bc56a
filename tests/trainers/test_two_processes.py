"""Rollouts in a process of their own: the same bits as in one, whoever of the two dies; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mortal import Mortal, alive, children, config
from safetensors.torch import load_file
from toys import BanditEnv

from agentgym import errors, registry
from agentgym.errors import ConfigError, EngineFault, MissingExtra, RecordError, UnknownName
from agentgym.modeling import build
from agentgym.processes import exit_reason
from agentgym.store import load_run
from agentgym.types import WeightsVersion
from agentgym_trainers import language
from agentgym_trainers.config import Config
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.remote import HOME, RESTARTS, Remote, portable
from agentgym_trainers.rollouts import TaskCursor, Unit, oldest
from agentgym_trainers.shared import Block
from agentgym_trainers.state import MODEL
from agentgym_trainers.wire import Trouble

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes in /proc")
HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def weights(run: Path) -> dict[str, Any]:
    return load_file(Path(load_run(run).checkpoints[-1].path) / MODEL / "model.safetensors")


def agree(a: Path, b: Path) -> None:
    """The same weights and episodes, bit by bit."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(bool((left[name] == right[name]).all()) for name in left)
    one, other = ([t.content() for t in load_run(path).trajectories()] for path in (a, b))
    assert one == other
    assert len(one) == 5 * 32


def nothing_left(out: Path) -> None:
    assert children(os.getpid()) == []
    assert not (out / HOME).exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    path = tmp_path_factory.mktemp("two") / "whole"
    PolicyGradient.train(config(run={"processes": 1}), path)
    return path


# --- parity -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_one_and_keep_to_their_cores(whole: Path, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(phase: str, done: int, total: int, figures: Any) -> None:
        if done == 2:
            (worker,) = children(os.getpid())
            seen.append(affinities(worker))
            seen.append(affinities(os.getpid()))

    first, last = CORES[0], CORES[-1]
    declared = config(run={"cores": [first]}, rollout={"cores": [last]})
    summary = PolicyGradient.train(declared, tmp_path / "run", progress=look)
    agree(whole, tmp_path / "run")
    nothing_left(tmp_path / "run")
    assert summary.counts.get("worker_restarts", 0) == 0
    assert seen[0] == {str(last)}, "every thread of the worker"
    assert str(first) in seen[1], "the learner's thread"


def affinities(pid: int) -> set[str]:
    """The cores of each thread of a process."""
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return {line.split()[1] for state in states for line in state.splitlines() if "Cpus_allowed_list" in line}


@pytest.mark.slow
def test_overlapped_in_two_processes_everything_is_learnt_from_once_within_the_bound(tmp_path: Path) -> None:
    declared = config(run={"deterministic": False, "steps": 8}, rollout={"max_staleness": 2})
    summary = PolicyGradient.train(declared, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert Counter(e.step for e in run.index) == dict.fromkeys(range(1, 9), 32)
    assert len({e.episode for e in run.index}) == len(run) == summary.counts["consumed"]
    ages = [entry.step - 1 - oldest(t, 0) for entry, t in zip(run.index, run.trajectories(), strict=True)]
    assert max(ages) in (1, 2), "published weights arrive, and play goes on meanwhile"
    nothing_left(tmp_path / "run")


# --- deaths -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_its_play_costs_no_bit(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the third update. It is reported, another one gets weights and memory, and its unit is played again."""
    declared = config(env={"ledger": str(tmp_path / "ledger"), "turns": 150})
    summary = PolicyGradient.train(declared, tmp_path / "run")
    agree(whole, tmp_path / "run")
    nothing_left(tmp_path / "run")
    assert summary.counts["worker_restarts"] == 1
    assert "died: signal SIGKILL" in caplog.text
    assert summary.counts["consumed"] == 5 * 32


CHILD = f"""
import os, sys
sys.path.insert(0, {str(HERE.parent)!r})
from mortal import children, config
from agentgym_trainers.loop import PolicyGradient
PolicyGradient.train(config(), sys.argv[1],
    progress=lambda phase, done, total, figures: print(phase, done, *children(os.getpid()), flush=True))
"""


@pytest.mark.slow
def test_when_the_learner_is_killed_the_worker_ends_and_the_run_resumes(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)], stdout=subprocess.PIPE, text=True, env=environment
    ) as learner:
        assert learner.stdout is not None
        worker = next(int(line.split()[-1]) for line in learner.stdout if line.startswith("rl 3"))
        learner.send_signal(signal.SIGKILL)
    until = time.monotonic() + 3
    while alive(worker) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(worker), "it ends by itself"
    PolicyGradient.train(None, out, resume=True)
    agree(whole, out)
    nothing_left(out)


# --- errors -----------------------------------------------------------------------------------------------------


def model_of(declared: Config) -> tuple[language.LanguageModel, Unit]:
    env = registry.make(**declared.env)
    unit = Unit(number=0, version=0, step=0, tasks=tuple(TaskCursor(env, 0).take(1)))
    return language.make(declared, env), unit


@pytest.mark.slow
async def test_an_error_in_the_worker_is_raised_here(tmp_path: Path) -> None:
    """What its engine refuses, with its traceback as a note; the next worker does not care."""
    model, unit = model_of(config())
    remote = Remote(config(rollout={"engine_options": {"slotz": 3}}), model, tmp_path)
    with pytest.raises(UnknownName, match="no engine option 'slotz'; did you mean 'slots'") as caught:
        await remote.play(unit)
    assert "language.py" in caught.value.__notes__[0]
    await remote.close()
    model.close()
    nothing_left(tmp_path)


@pytest.mark.slow
async def test_workers_that_die_in_a_row_are_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    model, unit = model_of(config())
    remote = Remote(config(), model, tmp_path)
    with pytest.raises(EngineFault, match=f"died {RESTARTS + 1} times in a row .* last by exit code 1.*--resume"):
        await remote.play(unit)
    assert remote.counts["worker_restarts"] == RESTARTS
    await remote.close()
    model.close()
    nothing_left(tmp_path)


def test_errors_travel_by_name() -> None:
    def travelled(error: Exception) -> Exception:
        return Trouble.of(error).error()

    assert type(travelled(RecordError("span 3 is odd"))) is RecordError
    assert str(travelled(MissingExtra("vllm", "vllm"))) == str(MissingExtra("vllm", "vllm"))
    foreign = travelled(KeyError("red"))
    assert type(foreign) is RuntimeError
    assert str(foreign) == "KeyError: 'red'"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.AgentGymError) and kind is not MissingExtra:
            assert type(travelled(kind("x"))) is kind


def test_exits_in_words() -> None:
    assert exit_reason(-signal.SIGSEGV) == "signal SIGSEGV"
    assert "memory" in exit_reason(-signal.SIGKILL)
    assert exit_reason(3) == "exit code 3"


def test_names_that_another_process_cannot_know_are_refused() -> None:
    class Local(BanditEnv):
        id = "local-v0"

    registry.register("local-v0", Local)
    try:
        with pytest.raises(ConfigError, match=r"'local-v0' was registered .* cannot import.*processes = 1"):
            list(portable(config(env={"id": "local-v0"})))
        lines = list(portable(config()))
    finally:
        registry.unregister("local-v0")
    assert {"id": "mortal-v0", "target": "mortal:Mortal", "kind": "envs"}.items() <= lines[-1].items()
    assert all(line["id"] != "local-v0" for line in lines), "nobody needs it"
    assert registry.load("mortal-v0") is Mortal


def test_cores_that_are_not_there_are_refused_before_anything_is_paid(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this process has no core 4095"):
        PolicyGradient.train(config(rollout={"cores": [4095]}), tmp_path / "run")


# --- weights ----------------------------------------------------------------------------------------------------


def test_weights_are_seen_through_memory_without_a_name() -> None:
    here, there = (build.tiny(20, hidden=16, layers=1, heads=2, kv_heads=1, seed=seed) for seed in (1, 2))
    block = Block.of(here)
    Block(block.fd, block.places).attach(there)
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    with torch.no_grad():
        next(here.parameters()).add_(1.0)
    assert not torch.equal(next(here.parameters()), next(there.parameters())), "nothing moves before it is written"
    block.write(here)
    assert torch.equal(next(here.parameters()), next(there.parameters()))
    assert all(p.data_ptr() % 64 == 0 for p in there.parameters())
    assert os.readlink(f"/proc/self/fd/{block.fd}").endswith("(deleted)")
    block.close()


def test_weights_of_another_model_are_refused() -> None:
    block = Block.of(build.tiny(20, hidden=16, layers=1, heads=2, kv_heads=1))
    with pytest.raises(errors.ModelError, match=r"model\.embed_tokens\.weight"):
        block.attach(build.tiny(24, hidden=16, layers=1, heads=2, kv_heads=1))
    block.close()


def test_only_what_training_moves_is_shared() -> None:
    model = build.tiny(20, hidden=16, layers=1, heads=2, kv_heads=1).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    block = Block.of(model)
    assert [place.name for place in block.places] == ["model.norm.weight"]
    block.close()


async def test_publishing_before_any_play_is_enough_for_the_first_worker(tmp_path: Path) -> None:
    """The block and the version are those of then; no worker was started for it."""
    model, _ = model_of(config())
    remote = Remote(config(), model, tmp_path)
    with torch.no_grad():
        next(model.module().parameters()).add_(1.0)
    await remote.publish(WeightsVersion(number=7))
    name, moved = next(model.module().named_parameters())
    assert torch.equal(remote.block.tensors[name], moved)
    assert (remote.version, model.engine.version, remote.pid) == (7, 7, None)
    await remote.close()
    model.close()
