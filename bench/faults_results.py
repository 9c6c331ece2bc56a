"""The figures of docs/results/faults.md: what a run comes to when what it stands on breaks.

    python bench/faults_results.py                        # about 12 minutes on 2 quiet cores, one row at a time
    python bench/faults_results.py --only disk-journal --out runs/quick
    python bench/faults_results.py --kills 4

Every row is a folder under --out, its runs are processes of their own; what is finished is not done again. A row whose
requirement does not hold is shown as FAILED with the reason, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fault_lives as lives
from fault_lives import Life, account, finished, laid, leaks, little_room, marked, preset, within

ROOT = Path(__file__).resolve().parents[1]
SEED = 0
BOUND = 2
WINDOW = 1.5
"""Seconds after the beginning of training in which a kill falls, uniformly."""
SYNC: dict[str, Any] = {"rollout": {"max_staleness": 0}}
EXACT: dict[str, Any] = {**SYNC, "run": {"deterministic": True, "steps": 30}}
TWO: dict[str, Any] = {"run": {"processes": 2}}
HANGS: dict[str, Any] = {"rollout": {"limits": {"turn_seconds": 2.0}}}
RAISES: dict[str, Any] = {"env": {"raises": 0.2}}
GARBAGE: dict[str, Any] = {"env": {"garbage": 0.1}}
ALL: dict[str, Any] = {"env": {"raises": 0.1, "hangs": 0.02, "garbage": 0.1}, **HANGS}
Found = dict[str, Any]
Row = tuple[str, Callable[[Path], Found]]


class NotRun(Exception):
    """This machine cannot do it; says why."""


# --- environments that break ------------------------------------------------------------------------------------


def broken(*tables: Mapping[str, Any]) -> Callable[[Path], Found]:
    """A run that finishes whatever its environment does."""

    def row(path: Path) -> Found:
        preset(path, {"run": {"steps": 20}}, *tables)
        life = Life(path)
        code = life.ended()
        found = {**told_of(life, code), **account(path, {})}
        struck = lives.faulty.struck(path / "ledger")
        retries = laid(*tables)["rollout"]["retries"]
        kinds = {"raised": struck["r"], "hung": struck["h"], "garbled": struck["g"]}
        found["struck"] = {name: number for name, number in kinds.items() if number}
        problems = [
            ("it did not finish", code != 0),
            ("no fault struck", not found["struck"]),
            ("a sound episode was lost", not retries and struck["e"] != found["consumed"]),
            ("a fault is no failure", not retries and sum(found["failed"].values()) != sum(kinds.values())),
            ("something was played twice", not retries and found["begun"] != found["stored"]),
        ]
        return judged(path, found, problems)

    return row


def down(path: Path) -> Found:
    """Every step raises until somebody repairs the environment: here, by a line of the run's config."""
    preset(path, {"env": {"raises": 1.0}, "run": {"steps": 20}})
    stopped = Life(path)
    first = stopped.ended()
    complaints, kept, left = stopped.complaints, finished(path / "run"), leaks(path, SHARED)
    config = path / "run" / "config.toml"
    config.write_text(config.read_text().replace("raises = 1.0", "raises = 0.0"))
    resumed = Life(path)
    code = resumed.ended()
    found = {**told_of(resumed, code), **account(path, kept), "kept": len(kept)}
    found["struck"] = {"raised": lives.faulty.struck(path / "ledger")["r"]}
    problems = stops(first, complaints, left, "nothing can be learnt. Repair that and resume")
    problems += [("repaired and resumed, it did not finish", code != 0), ("nothing was learnt", not found["consumed"])]
    return judged(path, {**found, "error": " / ".join(complaints), "exit": first}, problems)


# --- endpoints that break ---------------------------------------------------------------------------------------


def endpoint(episodes: int = 200, **shares: float) -> Callable[[Path], Found]:
    """An evaluation whose server always answers rightly, if it answers."""

    def row(path: Path) -> Found:
        path.mkdir(parents=True, exist_ok=True)
        life = Life(path, "--talk", json.dumps(shares), "--episodes", str(episodes))
        code = life.ended()
        found, judgement = told_of(life, code), life.told.get("judged", {})
        played, failed = judgement.get("episodes", 0), judgement.get("failures", {})
        right = not played or (judgement["success"] == 1.0 and judgement["return_mean"] == 2.0)
        begun = lives.faulty.struck(path / "ledger")["b"]
        found |= {"begun": begun, "consumed": played, "failed": failed, "dropped": {}, "stored": episodes}
        found["struck"] = life.told.get("struck", {})
        problems = [
            ("it did not finish", code != 0),
            ("a server's trouble is in a mean", not right),
            ("episodes are missing", played + sum(failed.values()) != episodes),
            ("no fault struck", not sum(found["struck"].values())),
        ]
        return judged(path, found, problems)

    return row


# --- processes that die -----------------------------------------------------------------------------------------


def learner_killed(kills: int, *tables: Mapping[str, Any], exact: bool = False) -> Callable[[Path], Found]:
    """The run's process, SIGKILLed at instants of chance of one run, resumed each time."""

    def row(path: Path) -> Found:
        preset(path, *tables)
        chance, kept, struck, orphans = random.Random(SEED), dict[str, Any](), 0, 0.0
        for number in range(kills):
            life = Life(path)
            life.go()
            if number % 2:
                life.plays()
            time.sleep(chance.uniform(0.0, WINDOW))
            struck += life.kill()
            began = time.monotonic()
            within(5.0, lambda: not marked(path))
            orphans = max(orphans, time.monotonic() - began)
            kept |= finished(path / "run")
        life = Life(path)
        code = life.ended()
        found = {**told_of(life, code), **account(path, kept), "struck": {"kills": struck}, "kept": len(kept)}
        problems = [
            ("it did not finish", code != 0),
            (f"only {struck} of {kills} kills fell into the run", struck < kills),
            (f"its other process outlived it by {orphans:.1f} s", orphans > 3.0),
        ]
        return judged(path, found, [*problems, *(differences(path, tables) if exact else ())])

    return row


def worker_killed(kills: int, *tables: Mapping[str, Any], exact: bool = False) -> Callable[[Path], Found]:
    """The rollouts' process, SIGKILLed in one life of a run."""

    def row(path: Path) -> Found:
        preset(path, TWO, *tables)
        chance, life = random.Random(SEED), Life(path)
        life.go()
        struck = sum(kill_worker(life, chance) for _ in range(kills))
        code = life.ended()
        found = {**told_of(life, code), **account(path, {}), "struck": {"kills": struck}}
        restarts = found["worker_restarts"]
        problems = [
            ("it did not finish", code != 0),
            (f"only {struck} of {kills} kills fell into the run", struck < kills),
            (f"{restarts} restarts were counted", restarts != struck),
        ]
        return judged(path, found, [*problems, *(differences(path, tables) if exact else ())])

    return row


def kill_worker(life: Life, chance: random.Random) -> bool:
    """Kill the worker of now, a while after it began to play; whether there was one."""
    life.plays(16)
    time.sleep(chance.uniform(0.0, 0.3))
    workers = [pid for pid, command in marked(life.row) if "agentgym_trainers.worker" in command]
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        within(5.0, lambda pid=pid: pid not in [p for p, _ in marked(life.row)])  # type: ignore[misc]
    return bool(workers)


def differences(path: Path, tables: tuple[Mapping[str, Any], ...]) -> Iterator[tuple[str, bool]]:
    """Against the same run undisturbed, in one process: its weights and episodes, bit for bit."""
    from agentgym.store import load_run

    other = path / "undisturbed"
    preset(other, *tables)
    alone = Life(other).ended()
    yield f"undisturbed it ended with exit code {alone}", alone != 0
    pair = [load_run(folder / "run") for folder in (path, other)]
    weights = [(Path(run.checkpoints[-1].path) / "model" / "model.safetensors").read_bytes() for run in pair]
    episodes = [[t.content() for t in run.trajectories()] for run in pair]
    yield "its last weights are other ones", weights[0] != weights[1]
    yield "its episodes are other ones", episodes[0] != episodes[1]


# --- disks and memory that end ----------------------------------------------------------------------------------


def full(part: str, kib: int) -> Callable[[Path], Found]:
    """The run is stopped after a checkpoint, and goes on where the disk under `part` of its folder has `kib` left."""

    def row(path: Path) -> Found:
        if os.geteuid() != 0 or not shutil.which("mount"):
            raise NotRun("a full disk is a small tmpfs, whose mounting needs root")
        preset(path)
        life = Life(path)
        within(120.0, lambda: list((path / "run" / "checkpoints").glob("step-*")))
        life.kill()
        with little_room(path / "run" / part, kib) as make_room:
            stopped = Life(path)
            first = stopped.ended()
            complaints, kept = stopped.complaints, finished(path / "run")
            left = leaks(path, SHARED)
            make_room()
            resumed = Life(path)
            code = resumed.ended()
            found = {**told_of(resumed, code), **account(path, kept), "struck": {"full disk": 1}, "kept": len(kept)}
        problems = stops(first, complaints, left, f"/{part}/", "make room, then resume")
        problems += [("resumed, it did not finish", code != 0)]
        return judged(path, {**found, "error": " / ".join(complaints), "exit": first}, problems)

    return row


WIDE: dict[str, Any] = {
    "model": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2},
    "run": {"steps": 4, "checkpoint_every": 2},
    "rollout": {"group_size": 32},
    "optim": {"micro_tokens": 65536},
}
ROOM = 300.0
"""MiB that the process may grow by once it plays: an update's whole batch needs more, its parts less."""


def short_of_memory(path: Path) -> Found:
    """An update's batch does not fit under a limit of the address space; cut smaller, it does."""
    preset(path, WIDE)
    stopped = Life(path, "--room", str(ROOM))
    first = stopped.ended()
    complaints, kept, left = stopped.complaints, finished(path / "run"), leaks(path, SHARED)
    config = path / "run" / "config.toml"
    config.write_text(config.read_text().replace("micro_tokens = 65536", "micro_tokens = 256"))
    resumed = Life(path, "--room", str(ROOM))
    code = resumed.ended()
    found = {**told_of(resumed, code), **account(path, kept), "struck": {"allocations": 1}, "kept": len(kept)}
    problems = stops(first, complaints, left, "no memory for update", "optim.micro_tokens")
    problems += [("resumed under the same limit, it did not finish", code != 0)]
    return judged(path, {**found, "error": " / ".join(complaints), "exit": first}, problems)


# --- judging ----------------------------------------------------------------------------------------------------

SHARED = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def stops(code: int, complaints: list[str], left: Mapping[str, list[str]], *words: str) -> list[tuple[str, bool]]:
    """What is wrong with a run that should have stopped with one line of error with these words in it."""
    return [
        (f"it stopped with exit code {code}", code != 2),
        (f"it complained {len(complaints)} times", len(complaints) != 1),
        (f"its error does not say {words}", not all(word in line for line in complaints for word in words)),
        (f"stopped, it left {left}", any(left.values())),
    ]


def told_of(life: Life, code: int) -> Found:
    """How a life ended."""
    return {"exit": code, "ended": "finished" if code == 0 else "one error", "error": " / ".join(life.complaints)}


def judged(path: Path, found: Found, problems: list[tuple[str, bool]]) -> Found:
    """With what holds for every row: the counts add up, and nothing is left."""
    left = leaks(path, SHARED)
    failed, dropped = sum(found["failed"].values()), sum(found["dropped"].values())
    found["again"] = found["begun"] - found["stored"]
    common = [
        (f"it left {left}", any(left.values())),
        ("the counts do not add up", found["consumed"] + failed + dropped != found["stored"]),
        ("more episodes are stored than began", found["again"] < 0),
        (f"{found.get('twice')} episodes were learnt from twice", bool(found.get("twice"))),
        (f"{found.get('lost')} finished episodes are lost", bool(found.get("lost"))),
        (f"{found.get('rewarded')} failed episodes have a reward", bool(found.get("rewarded"))),
        ("the bound on staleness was broken", found.get("staleness", 0) > BOUND),
    ]
    return {**found, "left": left, "problems": [text for text, holds in [*problems, *common] if holds]}


def rows(kills: int) -> dict[str, Row]:
    few = max(1, kills // 4)
    slow: dict[str, Any] = {"env": {"latency": 0.02}}
    return {
        "raises": ("20 % of the steps raise", broken(RAISES)),
        "raises-retried": ("the same, two retries", broken(RAISES, {"rollout": {"retries": 2}})),
        "hangs": ("5 % of the steps never end; 2 s a turn", broken({"env": {"hangs": 0.05}}, HANGS)),
        "garbage": (f"10 % of the steps answer nonsense of {len(lives.faulty.GARBAGE)} kinds", broken(GARBAGE)),
        "all-sync": ("all three, staleness 0", broken(ALL, SYNC)),
        "all-two": ("all three, two processes", broken(ALL, TWO)),
        "down": ("every step raises; repaired after the run stopped", down),
        "500": ("30 % of the answers are 500s", endpoint(**{"500": 0.3})),
        "timeouts": ("30 % come after 60 s; 0.4 s a try", endpoint(timeout=0.3)),
        "malformed": ("30 % are malformed JSON", endpoint(malformed=0.3)),
        "half": ("30 % break off in the middle", endpoint(half=0.3)),
        "endpoint-all": ("all four, 15 % each", endpoint(**dict.fromkeys(lives.faulty.TROUBLES, 0.15))),
        "endpoint-down": ("nothing but 500s", endpoint(16, **{"500": 1.0})),
        "worker": (f"worker killed, {few} times", worker_killed(few, {"run": {"steps": 150}}, slow)),
        "worker-exact": (
            "worker killed twice, staleness 0, deterministic: the undisturbed run's weights bit for bit",
            worker_killed(2, EXACT, {"run": {"steps": 60}}, slow, exact=True),
        ),
        "learner": (f"run killed, {kills} times", learner_killed(kills, {"run": {"steps": 500}}, slow)),
        "learner-two": (
            f"run killed, {few} times, two processes",
            learner_killed(few, TWO, {"run": {"steps": 80}}, slow),
        ),
        "learner-exact": (
            f"run killed, {few} times, staleness 0, deterministic: the undisturbed run's weights bit for bit",
            learner_killed(few, EXACT, {"run": {"steps": 80}}, slow, exact=True),
        ),
        "disk-journal": ("disk full under the journal", full("journal", 16)),
        "disk-shards": ("disk full under the trajectories", full("trajectories", 64)),
        "disk-checkpoint": ("disk full under the checkpoints", full("checkpoints", 64)),
        "memory": (f"no memory in a learner's step: {ROOM:.0f} MiB to grow by", short_of_memory),
    }


def run_row(out: Path, name: str, row: Row) -> Found:
    """A row, or what is known of it."""
    told = out / f"{name}.json"
    if told.is_file():
        return dict(json.loads(told.read_text()))
    print(f"{name} ...", flush=True)
    shutil.rmtree(out / name, ignore_errors=True)
    began = time.perf_counter()
    try:
        found = row[1](out / name)
    except NotRun as reason:
        return {"what": row[0], "not run": str(reason), "problems": []}
    found |= {"what": row[0], "seconds": time.perf_counter() - began}
    told.write_text(json.dumps(found, indent=1))
    print(f"  {'; '.join(found['problems']) or 'holds'}, {found['seconds']:.0f} s", flush=True)
    return found


# --- the page ---------------------------------------------------------------------------------------------------

HEAD = (
    "| what was done | struck | ended | episodes begun | = consumed + failed + dropped + played again | learnt twice, "
    "lost, failed with a reward | staleness | left: processes, sockets, files | s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(found: Found) -> str:
    """A row of the table."""
    if "not run" in found:
        return f"| {found['what']} | not run: {found['not run']} | | | | | | | |"
    ended = f"one error, exit code {found['exit']}; then finished" if found["error"] else "finished"
    failed = sum(found["failed"].values())
    kinds = f" ({counted(found['failed'])})" if failed else ""
    dropped = sum(found["dropped"].values())
    sums = f"{found['consumed']} + {failed}{kinds} + {dropped} + {found['again']}"
    lost = f"{found['lost']} of {found['kept']}" if "kept" in found else found.get("lost", "-")
    wrong = f"{found.get('twice', '-')}, {lost}, {found.get('rewarded', '-')}"
    left = ", ".join(str(len(found["left"][kind])) for kind in ("processes", "sockets", "files"))
    failure = "".join(f" **FAILED: {problem}**" for problem in found["problems"])
    cells = [
        found["what"] + failure,
        counted(found["struck"]),
        ended,
        found["begun"],
        sums,
        wrong,
        found.get("staleness", "-"),
        left,
        f"{found['seconds']:.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items() if number) or "0"


def errors(found: Mapping[str, Found], out: Path) -> list[str]:
    """What the runs that stopped said, in full."""
    told = {name: row["error"] for name, row in found.items() if row.get("error")}
    return [f"- `{name}`: {text.replace(f'{out}/', '')}" for name, text in told.items()]


def page(out: Path, found: Mapping[str, Found], kills: int) -> str:
    import torch

    import agentgym

    versions = f"agentgym {agentgym.__version__}, torch {torch.__version__}"
    small = laid()
    episodes = small["rollout"]["tasks_per_step"] * small["rollout"]["group_size"]
    seconds = sum(row.get("seconds", 0.0) for row in found.values())
    bad = sum(bool(row["problems"]) for row in found.values())
    verdict = f"{bad} of {len(found)} rows FAILED." if bad else f"All {len(found)} rows hold."
    return f"""# Faults: what a run comes to when what it stands on breaks

Written by `python bench/faults_results.py --kills {kills}`; seed {SEED}, on {platform.machine()}, {platform.system()},
Python {platform.python_version()}, {versions}; {seconds:.0f} s in all. {verdict}

Required of every row: the run finishes, or stops with one line of error and finishes when resumed; nothing that was
finished is lost or learnt from twice; no failure counts as a reward; no process, socket or file is left.

The environment is a bandit of two turns that breaks as declared, the model a toy of 10,000 parameters, {episodes}
episodes an update, trained by the command `agentgym train` in processes of its own, overlapped with `max_staleness =
{BOUND}` unless a row says otherwise. Episodes begun and faults are counted by the environment or the server itself, one
byte of a file each, so that no kill takes them back. Kills fall up to {WINDOW} s after training began, every other one
after the first episode of that life. Played again: a fault was retried, or the unit was under way when a process died.
Lost: of the episodes that stood in the journal when a process ended, those that do not stand unchanged in the finished
run. Left: processes that inherited a mark of the row; open descriptors of the last process beyond those that it had
after a short run before; and in its temporary folder, /dev/shm, and the run's folder (lock, half-written checkpoints,
the worker's home) whatever was not there before.

{HEAD}
{chr(10).join(line(row) for row in found.values())}

Endpoints are evaluated with, not trained on: the server is on the loopback, its answers are right whenever it answers,
each call has 3 retries and each episode 2. Required besides: among the outcomes, the success rate is exactly 1 and the
mean return exactly 2. Where nothing but faults came, there is no outcome and no mean.

An environment's message of a wrong type is noticed by the policy that reads it, and counted there (`engine`).

What the stopped runs said:

{chr(10).join(errors(found, out))}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this row; the page is not written")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "faults.md")
    parser.add_argument("--life", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--room", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--talk", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--episodes", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        return live(options)
    out, every = options.out.resolve(), rows(options.kills)
    out.mkdir(parents=True, exist_ok=True)
    found = {name: run_row(out, name, every[name]) for name in options.only or every}
    if not options.only:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.page.write_text(page(out, found, options.kills), encoding="utf-8")
    return int(any(row["problems"] for row in found.values()))


def live(options: argparse.Namespace) -> int:
    """Be a process of a row."""
    if options.talk is not None:
        return lives.talk(options.life, options.talk, options.episodes, SEED)
    return lives.train(options.life, options.room)


if __name__ == "__main__":
    sys.exit(main())
