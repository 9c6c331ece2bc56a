"""Lives of runs for the fault battery, each in a process of its own, and what they leave behind.

A life trains by the very command that people type (`agentgym.cli.main`), so its exit code and its one line of error are
what they would see. It says "go" when everything is imported, and writes what it held before and after beside the run.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faulty
import msgspec
import tomli_w

from agentgym.presets import merge
from agentgym.types import Trajectory

MARK = "AGENTGYM_FAULTS"
"""Environment variable that all processes of a row inherit: whoever has it afterwards is a leak."""
SMALL: dict[str, Any] = {
    "env": {"id": faulty.Faulty.id},
    "run": {"steps": 40, "threads": 1, "checkpoint_every": 5},
    "model": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1},
    "rollout": {
        "tasks_per_step": 4,
        "group_size": 4,
        "slots": 48,
        "max_length": 64,
        "retries": 0,
        "max_staleness": 2,
        "threads": 1,
    },
    "sampling": {"max_tokens": 3},
    "optim": {"lr": 1e-3},
    "eval": {"episodes": 0},
}
"""A run of seconds: 10,000 parameters, 16 episodes an update, nothing warm."""


# --- in the process of a life -----------------------------------------------------------------------------------


def train(run: Path, room: float = 0.0) -> int:
    """Train or resume in this process and write `life.json` beside the run. `room`: MiB of address space that are left
    to it from the moment on when episodes begin."""
    faulty.register()
    _warm(run.parent / "ledger.warm")
    before, ledger = held(), run.parent / "ledger"
    if room:
        threading.Thread(target=_limit, args=(ledger, room), daemon=True).start()
    print("go", flush=True)
    began = time.perf_counter()
    code = _command(run)
    _told(run, code=code, seconds=time.perf_counter() - began, before=before)
    return code


def _command(run: Path) -> int:
    from agentgym.cli import main

    resumed = (run / "config.toml").is_file()
    words = ["--resume", str(run)] if resumed else [str(run.parent / "preset.toml"), "--out", str(run)]
    return main(["train", *words])


def _warm(ledger: Path) -> None:
    """Two undisturbed updates: what torch and the libraries open once is open then."""
    from agentgym_trainers.config import from_table
    from agentgym_trainers.loop import PolicyGradient

    table = laid({"env": {"ledger": str(ledger)}, "run": {"steps": 2}})
    with TemporaryDirectory() as folder:
        PolicyGradient.train(from_table(table), Path(folder) / "run")


def _limit(ledger: Path, room: float) -> None:
    """From the first begun episode on, the process may grow by so many MiB."""
    at = ledger.stat().st_size if ledger.is_file() else 0
    while not ledger.is_file() or ledger.stat().st_size <= at:
        time.sleep(0.005)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(room * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def talk(run: Path, shares: Mapping[str, float], episodes: int, seed: int) -> int:
    """Evaluate by an endpoint whose server breaks as declared, in this process."""
    asyncio.run(_talk(run, dict(shares), episodes, seed))
    return 0


async def _talk(run: Path, shares: dict[str, float], episodes: int, seed: int) -> None:
    ledger = run.parent / "ledger"
    await _judged({}, 8, seed, Path(os.devnull))
    before, began = held(), time.perf_counter()
    print("go", flush=True)
    found, server, usage = await _judged(shares, episodes, seed, ledger)
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.2)
    told = {"judged": msgspec.to_builtins(found), "usage": msgspec.to_builtins(usage), "struck": server.struck}
    _told(run, code=0, seconds=seconds, before=before, **told)


async def _judged(shares: dict[str, float], episodes: int, seed: int, ledger: Path) -> tuple[Any, faulty.Server, Any]:
    from agentgym.evaluation import evaluate
    from agentgym_policies.endpoint import Endpoint

    async with faulty.serving(shares, seed) as server:
        endpoint = Endpoint(server.url, model="m", concurrency=64, retries=3, seconds=8.0, try_seconds=0.4)
        try:
            found = await evaluate(faulty.Faulty(str(ledger)), endpoint, episodes=episodes, seed=seed)
        finally:
            await endpoint.aclose()
    return found, server, endpoint.client.usage


def _told(run: Path, *, before: Mapping[str, list[str]], **figures: Any) -> None:
    gc.collect()
    after = {kind: list((Counter(now) - Counter(before[kind])).elements()) for kind, now in held().items()}
    (run.parent / "life.json").write_text(json.dumps({**figures, "left": after}))


def held() -> dict[str, list[str]]:
    """What the open descriptors of this process lead to."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    own = [link for link in links if not link.startswith("/proc/")]
    sockets = ["socket" for link in own if link.startswith("socket:")]
    others = [link.partition(":[")[0] for link in own if not link.startswith("socket:")]
    return {"sockets": sockets, "files": others}


# --- from outside -----------------------------------------------------------------------------------------------


def laid(*tables: Mapping[str, Any]) -> dict[str, Any]:
    """`SMALL` with these laid over it."""
    found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(SMALL))
    for table in tables:
        merge(found, table)
    return found


class Life:
    """A process of the script with these words. `ended` waits; `error` is what it complained of."""

    def __init__(self, row: Path, *words: str) -> None:
        self.row, self.log = row, row / "stderr.log"
        (row / "tmp").mkdir(parents=True, exist_ok=True)
        (row / "life.json").unlink(missing_ok=True)
        own = {MARK: row, "TMPDIR": row / "tmp", "TORCHINDUCTOR_CACHE_DIR": row / "torch", "OMP_NUM_THREADS": 1}
        env = {**os.environ, **{name: str(value) for name, value in own.items()}}
        script = Path(__file__).with_name("faults_results.py")
        command = [sys.executable, str(script), "--life", str(row / "run"), *words]
        with open(self.log, "w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)

    def go(self) -> None:
        """Wait until it trains."""
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) and line != "go\n":
            pass

    def plays(self, episodes: int = 1) -> None:
        """Wait until so many more have begun, or it is over."""
        at = faulty.struck(self.row / "ledger")["b"] + episodes
        within(60.0, lambda: self.process.poll() is not None or faulty.struck(self.row / "ledger")["b"] >= at)

    def kill(self) -> bool:
        """Whether it was still there to be killed."""
        self.process.send_signal(signal.SIGKILL)
        return self.ended() == -signal.SIGKILL

    def ended(self, seconds: float = 300.0) -> int:
        """Its exit code; one that takes longer is killed."""
        try:
            self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode

    @property
    def told(self) -> dict[str, Any]:
        path = self.row / "life.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @property
    def complaints(self) -> list[str]:
        """Its lines of error, warnings apart."""
        lines = self.log.read_text().splitlines()
        return [line for line in lines if line.startswith(("agentgym: ", "Traceback")) and ": warning: " not in line]


def preset(row: Path, *tables: Mapping[str, Any]) -> None:
    """The config of a row's run, with the row's ledger."""
    row.mkdir(parents=True, exist_ok=True)
    own = {"env": {"ledger": str(row / "ledger")}}
    (row / "preset.toml").write_text(tomli_w.dumps(laid(*tables, own)))


def marked(row: Path) -> list[tuple[int, str]]:
    """Processes of a row that run: (pid, command line)."""
    mark = f"{MARK}={row}".encode()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found.append((int(name), Path(f"/proc/{name}/cmdline").read_text().replace("\0", " ")))
    return found


def within(seconds: float, good: Callable[[], Any]) -> bool:
    """Whether it becomes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if good():
            return True
        time.sleep(0.01)
    return bool(good())


def leaks(row: Path, shared: set[str]) -> dict[str, list[str]]:
    """What is left when all lives of a row are over; `shared`: names that /dev/shm held before."""
    within(3.0, lambda: not marked(row))
    told = row / "life.json"
    left = json.loads(told.read_text())["left"] if told.is_file() else {"sockets": [], "files": []}
    checkpoints = (row / "run" / "checkpoints").glob(".*")
    names = [row / "run" / "run.lock", row / "run" / "worker", *checkpoints, *(row / "tmp").iterdir()]
    lying = [path.name for path in names if path.exists()] + orphaned(shared)
    return {
        "processes": [command for _, command in marked(row)],
        "sockets": left["sockets"],
        "files": left["files"] + lying,
    }


def orphaned(shared: set[str]) -> list[str]:
    """New names in /dev/shm that no living process has mapped (other programs come and go there)."""
    new = [name for name in os.listdir("/dev/shm") if name not in shared]
    maps = []
    for pid in filter(str.isdigit, os.listdir("/proc") if new else ()):
        with suppress(OSError):
            maps.append(Path(f"/proc/{pid}/maps").read_text())
    return [name for name in new if not any(f"/dev/shm/{name}" in text for text in maps)]


def finished(run: Path) -> dict[str, Any]:
    """Episodes whose unit was over when the run died, by their ids: what the journal holds."""
    from agentgym_trainers.journal import History, read

    files = sorted((run / "journal").glob("*.frames"))
    history = History(event for path in files for event in read(path))
    return {s.trajectory.episode.id: s.trajectory.content() for p in history.played.values() for s in p.handed}


def account(row: Path, kept: Mapping[str, Any]) -> dict[str, Any]:
    """What became of every episode of a finished run. `kept`: what was whole at some death of it (see `finished`)."""
    from agentgym.store import load_run
    from agentgym_trainers.rollouts import oldest

    run, told = load_run(row / "run"), faulty.struck(row / "ledger")
    summary = row / "run" / "summary.json"
    counts: dict[str, int] = json.loads(summary.read_text())["counts"] if summary.is_file() else {}
    stored: list[Trajectory] = list(run.trajectories())
    ages = [e.step - 1 - oldest(t, e.step - 1) for e, t in zip(run.index, stored, strict=True)]
    content = {t.episode.id: t.content() for t in stored}
    return {
        "begun": told["b"],
        "consumed": counts.get("consumed", 0),
        "failed": dict(Counter(t.failure.kind for t in stored if t.failure)),
        "dropped": {name: counts[name] for name in ("stale", "equal", "aside") if counts.get(name)},
        "stored": len(stored),
        "worker_restarts": counts.get("worker_restarts", 0),
        "twice": len(stored) - len(content),
        "lost": sum(content.get(name) != found for name, found in kept.items()),
        "rewarded": sum(e.status == "failed" and e.value is not None for e in run.index),
        "staleness": max(ages, default=0),
    }


@contextmanager
def little_room(folder: Path, kib: int) -> Iterator[Callable[[], None]]:
    """The folder on a really full disk: a tmpfs with its contents and so many KiB more; call what it yields to make
    room. Needs root."""
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    size = sum(-(-len(data) // 4096) * 4 for data in found.values()) + kib

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)

    mount(f"size={size}k")
    try:
        for path, data in found.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        yield lambda: mount("remount,size=64m")
    finally:
        subprocess.run(["umount", str(folder)], check=True)
