"""The run folder: what is written is read back, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from golden_runs import CONFIG, GOLDEN, rich, simple, write_2
from making import trajectory

import agentgym
from agentgym.errors import ConfigError, StoreError, UnknownName
from agentgym.shards import FIRST, Shard, start_of_shard
from agentgym.store import RunFolder, load_run
from agentgym.types import SCHEMA, Trajectory


def episodes(count: int, start: int = 0) -> list[Trajectory]:
    return [trajectory([{"r": float(i)}, {}], group=f"g{i}", tokens=3) for i in range(start, start + count)]


def fill(run: RunFolder, count: int, start: int = 0) -> None:
    for i, t in enumerate(episodes(count, start), start):
        run.append(t, step=i // 4, value=float(i))
        run.log({"episode": i})


def started(path: Path, count: int = 0, **options: object) -> Path:
    with RunFolder.create(path, {"seed": 1}, **options) as run:
        fill(run, count)
    return path


def groups(path: Path) -> list[str]:
    return [t.episode.group for t in load_run(path).trajectories()]


# --- reading what was written -----------------------------------------------------------------------------------


def test_a_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    config = {"env": {"id": "test-v0", "limit": None}, "rate": 0.5, "names": ("a", "b")}
    written = [*episodes(6), *rich(), trajectory([{}], status="failed", group="f")]
    with RunFolder.create(tmp_path / "run", config) as run:
        for i, t in enumerate(written):
            run.append(t, step=i // 4, value=i / 2)
        run.log({"step": 1, "loss": 0.5})
        run.log({"step": 2, "loss": float("nan")})
    read = agentgym.load_run(tmp_path / "run")
    assert list(read.trajectories()) == written
    assert read.config == {"env": {"id": "test-v0"}, "rate": 0.5, "names": ["a", "b"]}
    assert read.metrics == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert len(read) == len(written)
    assert [e.value for e in read.index] == [i / 2 for i in range(len(written))]
    assert list(read.trajectories(status="failed")) == written[-1:]
    assert list(read.trajectories(step=1)) == written[4:8]
    assert list(read.trajectories(step=(0, 2), status="terminated")) == [*written[:4]]
    assert list(read.trajectories(group="g3")) == [written[3]]
    assert "9 trajectories" in repr(read)
    assert "<td>9</td>" in read._repr_html_()
    with pytest.raises(UnknownName, match="did you mean 'failed'"):
        read.trajectories(status="fialed")


def test_shards_rotate_by_size_and_read_as_one(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 9, shard_bytes=1000)
    assert len(list((path / "trajectories").glob("*.shard"))) > 2
    assert groups(path) == [f"g{i}" for i in range(9)]
    with RunFolder.open(path, shard_bytes=1000) as run:
        fill(run, 3, 9)
    assert groups(path) == [f"g{i}" for i in range(12)]


@pytest.mark.parametrize("buffer", [0, 5000])
def test_a_run_can_be_read_while_it_is_written(tmp_path: Path, buffer: int) -> None:
    with RunFolder.create(tmp_path / "run", {}, buffer=buffer) as run:
        for i in range(30):
            fill(run, 1, i)
            seen = groups(tmp_path / "run")
            assert seen == [f"g{k}" for k in range(len(seen))]
            assert buffer or len(seen) == i + 1
        run.flush()
        assert len(groups(tmp_path / "run")) == 30


@pytest.mark.parametrize("lost", ["all", "tail", "torn"])
def test_a_lost_index_is_rebuilt_from_the_shards(tmp_path: Path, lost: str) -> None:
    path = started(tmp_path / "run", 5, shard_bytes=700)
    index = path / "trajectories" / "index.jsonl"
    whole = index.read_bytes()
    lines = whole.splitlines(keepends=True)
    index.write_bytes({"all": b"", "tail": b"".join(lines[:3]), "torn": whole[:-7]}[lost])
    assert groups(path) == [f"g{i}" for i in range(5)]
    with RunFolder.open(path):
        pass
    assert index.read_bytes() == whole


# --- torn, damaged, locked, full --------------------------------------------------------------------------------


def test_every_torn_tail_is_cut_and_never_read_as_whole(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 2)
    shard, index = path / "trajectories" / "000000.shard", path / "trajectories" / "index.jsonl"
    data, first, whole = shard.read_bytes(), load_run(path).index[0].end, index.read_bytes()
    for size in sorted({*range(first, first + 30), *range(first, len(data), 37), len(data) - 1}):
        shard.write_bytes(data[:size])
        index.write_bytes(whole.splitlines(keepends=True)[0])
        assert groups(path) == ["g0"]
        with RunFolder.open(path) as run:
            fill(run, 1, 7)
        assert groups(path) == ["g0", "g7"]


def test_zeros_after_a_power_cut_are_no_frames(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 2)
    with open(path / "trajectories" / "000000.shard", "ab") as file:
        file.write(bytes(64))
    assert groups(path) == ["g0", "g1"]


def test_damage_is_named_when_read_and_cut_when_opened(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 3)
    shard = path / "trajectories" / "000000.shard"
    data, second = bytearray(shard.read_bytes()), load_run(path).index[1]
    data[second.offset + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=f"damaged at byte {second.offset} .*RunFolder.open"):
        list(load_run(path).trajectories())
    with pytest.warns(UserWarning, match="2 damaged trajectories are cut off"):
        run = RunFolder.open(path)
    run.close()
    assert groups(path) == ["g0"]


def test_a_second_writer_is_refused_with_the_reason(tmp_path: Path) -> None:
    holder = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(StoreError, match=f"is being written by process {os.getpid()}"):
        RunFolder.open(tmp_path / "run")
    holder.close()
    RunFolder.open(tmp_path / "run").close()
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.parametrize(
    "left", ['{"pid": %d, "started": 1, "host": "%s"}', '{"pid": 4194999, "started": 1, "host": "%s"}', '{"pi']
)
def test_a_dead_writers_lock_is_taken_over(tmp_path: Path, left: str) -> None:
    import socket

    path = started(tmp_path / "run")
    values = (os.getpid(), socket.gethostname())[2 - left.count("%") :]
    (path / "run.lock").write_text(left % values)
    with RunFolder.open(path) as run:
        assert json.loads((path / "run.lock").read_text())["pid"] == os.getpid()
        fill(run, 1)


def test_a_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    path = started(tmp_path / "run")
    (path / "run.lock").write_text('{"pid": 1, "started": 1, "host": "elsewhere"}')
    with pytest.raises(StoreError, match=r"locked by process 1 on elsewhere; if that is over, delete"):
        RunFolder.open(path)


FULL_DISK = """
    import resource, sys
    from making import trajectory
    from agentgym.errors import StoreError
    from agentgym.store import RunFolder
    run = RunFolder.create(sys.argv[1], {}, buffer=int(sys.argv[2]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        for i in range(200):
            run.append(trajectory([{"r": 1.0}] * 4, group=f"g{i}", tokens=5))
    except StoreError as error:
        print(error)
    with __import__("contextlib").suppress(StoreError):
        run.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE stands in for a full disk")
@pytest.mark.parametrize("buffer", [0, 4000])
def test_a_full_disk_is_one_clear_error_and_leaves_whole_records(tmp_path: Path, buffer: int) -> None:
    done = script(FULL_DISK, tmp_path / "run", buffer)
    out, errors = done.communicate(timeout=60)
    assert errors == ""
    assert out.startswith(f"cannot write {tmp_path / 'run' / 'trajectories' / '000000.shard'}: File too large")
    assert out.count("\n") == 1
    assert "make room, then resume" in out
    seen = groups(tmp_path / "run")
    assert len(seen) > 10
    assert seen == [f"g{i}" for i in range(len(seen))]
    with RunFolder.open(tmp_path / "run") as run:
        fill(run, 1, 999)
    assert groups(tmp_path / "run") == [*seen, "g999"]


def test_what_a_kill_left_of_a_dropped_checkpoint_is_in_nobodys_way(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        with run.checkpoint(1) as folder:
            (folder / "weights").write_bytes(b"w")
        left = tmp_path / "run" / "checkpoints" / ".dropped-step-000001"
        shutil.copytree(left.with_name("step-000001"), left)
        assert [c.step for c in run.checkpoints] == [1]
        run.drop(run.checkpoints[0])
    assert list(left.parent.iterdir()) == []


FULL_CHECKPOINT = """
    import resource, sys
    import torch
    from agentgym.errors import StoreError
    from agentgym.store import RunFolder
    from safetensors.torch import save_file
    run = RunFolder.create(sys.argv[1], {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        with run.checkpoint(1) as folder:
            save_file({"w": torch.zeros(10_000)}, folder / "model.safetensors")
    except StoreError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE stands in for a full disk")
def test_a_full_disk_under_a_native_writer_is_the_same_error_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    out, errors = script(FULL_CHECKPOINT, tmp_path / "run").communicate(timeout=60)
    assert errors == ""
    assert out.startswith("cannot write ")
    assert "os error 27" in out
    assert "make room, then resume" in out
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert load_run(tmp_path / "run").checkpoints == []


def script(source: str, *arguments: object) -> subprocess.Popen[str]:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


WRITER = """
    import itertools, sys
    from making import trajectory
    from agentgym.store import RunFolder
    run = RunFolder.create(sys.argv[1], {}, shard_bytes=200_000, buffer=int(sys.argv[2]))
    print("ready", flush=True)
    for i in itertools.count():
        run.append(trajectory([{"r": 1.0}] * 4, group=f"g{i}", tokens=5), step=i)
        if sys.argv[2] == "0":
            print(i, flush=True)
        if i % 10 == 9:
            with run.checkpoint(i) as folder:
                (folder / "weights").write_bytes(bytes(50_000))
"""


@pytest.mark.parametrize("buffer", [0, 30_000])
@pytest.mark.parametrize("attempt", range(3))
def test_killed_at_any_instant_the_folder_is_whole(tmp_path: Path, attempt: int, buffer: int) -> None:
    writer = script(WRITER, tmp_path / "run", buffer)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    time.sleep(random.Random(17 * attempt + buffer).uniform(0.05, 0.4))
    writer.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    said = writer.communicate(timeout=60)[0].split()
    seen = groups(tmp_path / "run")
    assert seen == [f"g{i}" for i in range(len(seen))]
    if buffer == 0:
        assert len(seen) >= len(said)
    for found in load_run(tmp_path / "run").checkpoints:
        assert (Path(found.path) / "weights").stat().st_size == 50_000
    with RunFolder.open(tmp_path / "run") as run:
        last = run.latest
        if last is not None:
            run.truncate_to(last)
    assert last is None or len(groups(tmp_path / "run")) == last.step + 1


# --- checkpoints ------------------------------------------------------------------------------------------------


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_truncating_to_a_checkpoint_restores_every_file(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}, shard_bytes=900) as run:
        fill(run, 3)
        with run.checkpoint(10, {"lr": 0.5}) as folder:
            (folder / "weights.bin").write_bytes(b"w")
        before = files(tmp_path / "run")
        fill(run, 5, 3)
        with run.checkpoint(20):
            pass
        fill(run, 2, 8)
        assert [c.step for c in run.checkpoints] == [10, 20]
        first = run.checkpoints[0]
        assert first.extra == {"lr": 0.5}
        run.truncate_to(first)
        assert files(tmp_path / "run") == before
        fill(run, 5, 3)
        assert run.latest == first
    assert groups(tmp_path / "run") == [f"g{i}" for i in range(8)]
    assert [m["episode"] for m in load_run(tmp_path / "run").metrics] == list(range(8))


def test_an_unfinished_checkpoint_never_counts(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        with pytest.raises(RuntimeError, match="out of memory"), run.checkpoint(10):
            raise RuntimeError("out of memory")
        half = tmp_path / "run" / "checkpoints" / ".writing-step-000020"
        half.mkdir()
        (half / "checkpoint.json").write_text("{}")
        (tmp_path / "run" / "checkpoints" / "step-000030").mkdir()
        assert run.latest is None
        with run.checkpoint(20):
            pass
        assert [c.step for c in run.checkpoints] == [20]
        with pytest.raises(StoreError, match="step-000020 exists"), run.checkpoint(20):
            pass


def test_a_checkpoint_beyond_the_files_is_refused(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}) as run:
        fill(run, 2)
        with run.checkpoint(1):
            pass
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"")
    with RunFolder.open(tmp_path / "run") as run:
        assert run.latest is not None
        with pytest.raises(StoreError, match="beyond the run's files"):
            run.truncate_to(run.latest)


# --- schemas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", range(SCHEMA + 1))
def test_golden_runs_of_every_schema_read_as_today(schema: int, tmp_path: Path) -> None:
    read = load_run(GOLDEN / f"schema-{schema}")
    expected = simple() if schema == 0 else [*simple(), *rich()]
    assert list(read.trajectories()) == expected
    assert read.config == CONFIG
    copy = tmp_path / "run"
    shutil.copytree(GOLDEN / f"schema-{schema}", copy)
    with RunFolder.open(copy) as run:
        run.append(simple()[0])
    assert list(load_run(copy).trajectories()) == [*expected, simple()[0]]
    shards = sorted((copy / "trajectories").glob("*.shard"))
    assert len(shards) == (1 if schema == SCHEMA else 2)


def test_todays_writer_still_writes_the_golden_bytes(tmp_path: Path) -> None:
    """Fails where records changed on disk: raise SCHEMA, write a migration, and add a golden folder."""
    write_2(tmp_path / "run")
    assert files(tmp_path / "run") == files(GOLDEN / "schema-2")


def test_a_newer_schema_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 1)
    shard = path / "trajectories" / "000000.shard"
    data = shard.read_bytes()
    shard.write_bytes(start_of_shard(SCHEMA + 1) + data[FIRST:])
    with pytest.raises(StoreError, match=f"schema {SCHEMA + 1}, this agentgym reads up to {SCHEMA}: upgrade"):
        list(load_run(path).trajectories())
    shard.write_bytes(b"PK\x03\x04" + data)
    with pytest.raises(StoreError, match="is no trajectory shard"):
        Shard(shard)
    with pytest.raises(StoreError, match="is no trajectory shard"):
        RunFolder.open(path)
    assert not (path / "run.lock").exists()


# --- refusals ---------------------------------------------------------------------------------------------------


def test_what_is_no_run_or_no_room_is_refused(tmp_path: Path) -> None:
    started(tmp_path / "first")
    with pytest.raises(StoreError, match=r"no config.toml in it; no run 'frist'; did you mean 'first'"):
        load_run(tmp_path / "frist")
    with pytest.raises(StoreError, match="holds something already; resume it"):
        RunFolder.create(tmp_path / "first", {})
    with pytest.raises(ConfigError, match="cannot be written as TOML"):
        RunFolder.create(tmp_path / "second", {"odd": object()})
    assert not (tmp_path / "second").exists()


def test_damaged_side_files_are_named(tmp_path: Path) -> None:
    path = started(tmp_path / "run", 2)
    (path / "metrics.jsonl").write_bytes(b'{"a": 1}\nnot json\n{"torn')
    with pytest.raises(StoreError, match=r"metrics.jsonl is damaged"):
        _ = load_run(path).metrics
    (path / "trajectories" / "index.jsonl").write_bytes(b"[]\n")
    with pytest.raises(StoreError, match="delete it, it is rebuilt"):
        load_run(path)
    (path / "trajectories" / "index.jsonl").unlink()
    broken = path / "checkpoints" / "step-000001"
    broken.mkdir()
    (broken / "checkpoint.json").write_text("{")
    with pytest.raises(StoreError, match="resume from the one before"):
        _ = load_run(path).checkpoints
