"""A run on two ranks: the weights of one process, one folder and one report; and an end in time when a rank is gone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import crewed
import pytest
import torch
from safetensors.torch import load_file

from agentgym.errors import ConfigError
from agentgym.store import load_run
from agentgym_trainers.loop import PolicyGradient
from agentgym_trainers.state import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(400)]
SCRIPT = Path(crewed.__file__)
RUN: dict[str, Any] = {
    "run": {"steps": 3, "threads": 1, "checkpoint_every": 2},
    "warmup": {"steps": 2, "batch": 4, "optim": {"lr": 1e-4}},
    "sft": {"steps": 6, "batch": 8, "optim": {"lr": 1e-4}},
    "optim": {"lr": 1e-4, "minibatches": 2},
    "objective": {"proximal": "learner", "regularisers": [{"kind": "kl", "coef": 0.01}]},
    "advantage": [{"credit": "gae", "key": "batch"}],
    "eval": {"episodes": 8, "ladder": False},
}
SHARDED = {**RUN, "optim": {**RUN["optim"], "sharded": True}}


def launch(out: Path, sections: dict[str, Any], ranks: int) -> list[subprocess.Popen[str]]:
    """The ranks of a run, in processes of their own that speak over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    if sys.platform == "linux":
        here["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), json.dumps(sections)],
            env={**os.environ, **paths, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(load_run(out).checkpoints[-1].path) / MODEL / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    PolicyGradient.train(crewed.config(RUN), out)
    return out


@pytest.mark.parametrize("sections", [RUN, SHARDED], ids=["whole", "sharded"])
def test_two_ranks_end_with_the_weights_of_one(alone: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    """A critic, a reference and minibatches take part; one folder, one report, and both ranks say how it ended. Small
    steps, because Adam makes whole ones of gradients that are nothing but rounding."""
    started = launch(tmp_path / "run", sections, 2)
    try:
        heard = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], heard
    assert len({said.splitlines()[-1] for said, _ in heard}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "report.html").is_file()
    one, two = weights(alone), weights(tmp_path / "run")
    assert one.keys() == two.keys()
    for name, found in one.items():
        torch.testing.assert_close(two[name], found, rtol=0, atol=1e-6)
    lines = [[line for line in load_run(out).metrics if line["phase"] == "rl"] for out in (alone, tmp_path / "run")]
    for a, b in zip(*lines, strict=True):
        assert [a[name] for name in ("loss", "kl", "value_loss", "tokens")] == pytest.approx(
            [b[name] for name in ("loss", "kl", "value_loss", "tokens")], abs=1e-5
        )


@pytest.mark.parametrize(("killed", "sections"), [(0, RUN), (1, SHARDED)], ids=["first", "second, sharded"])
def test_a_killed_rank_ends_the_other_in_time(tmp_path: Path, killed: int, sections: dict[str, Any]) -> None:
    endless = {"run": {**RUN["run"], "steps": 10_000}, "warmup": {"steps": 0}, "sft": {"steps": 0}}
    started = launch(tmp_path / "run", {**sections, **endless, "eval": {"episodes": 0, "ladder": False}}, 2)
    left = started[1 - killed]
    try:
        assert started[0].stdout is not None
        assert any(line.strip() == "rl 2" for line in started[0].stdout)
        started[killed].send_signal(signal.SIGKILL)
        began = time.monotonic()
        _, said = left.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert left.returncode == 2
        assert f"rank {1 - killed} of 2 waits for one that is gone or stuck" in said
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        (SHARDED, "torchrun"),
        ({**SHARDED, "model": {"lora": {"rank": 2}}}, "adapters"),
        ({**SHARDED, "run": {"algorithm": "preference"}, "advantage": []}, "whole weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_paid(
    tmp_path: Path, sections: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        PolicyGradient.train(crewed.config(sections), tmp_path / "run")
