"""What a turn costs, as a ratio to a bare loop in the same run: a regression bound, far from the published figure."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from itertools import islice
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from agentgym.bench.endpoint import ENDPOINT_PEERS, complete
from agentgym.bench.measure import markdown, spread
from agentgym.bench.overhead import drawn, instant, lag, makespan, peer_rows, schedule
from agentgym.bench.peers import PEERS
from agentgym.bench.stub import REPLY, content_length, stub
from agentgym.errors import EnvironmentFault
from agentgym.registry import lookup
from agentgym.rollout import Runner, episodes
from agentgym.testing.fakes import LATENCIES, CountingEnv, FakePolicy, SimulatedPolicy


def middle(text: str) -> float:
    return float(text.split()[0])


def test_a_fully_recorded_turn_costs_a_bounded_multiple_of_a_bare_one() -> None:
    row = min((instant(256, 300, 1) for _ in range(3)), key=lambda row: middle(row["agentgym us"]))
    assert row["turns"] == 2400
    assert middle(row["agentgym us"]) < 60 * middle(row["bare us"])  # measured: 15 to 20 times


def test_slots_do_not_wait_for_each_other() -> None:
    row = max((schedule(32, 0.02, 3, 1) for _ in range(2)), key=lambda row: middle(row["agentgym %"]))
    assert middle(row["agentgym %"]) > 60  # lockstep reaches about 20: each turn waits for the slowest of 32
    assert middle(row["agentgym %"]) < 101


def test_the_list_schedule_is_grahams() -> None:
    assert makespan([3, 3, 2, 2, 2], 2) == 7
    assert makespan([1.0], 5) == 1.0
    assert makespan([5, 1, 1, 1, 1, 1], 2) == 5


@pytest.mark.parametrize("name", LATENCIES)
def test_latencies_have_their_mean_and_grow_with_the_uniform(name: str) -> None:
    latency = LATENCIES[name](2.0)
    values = [latency((i + 0.5) / 20_000) for i in range(20_000)]
    assert sum(values) / len(values) == pytest.approx(2.0, rel=0.03)
    assert values == sorted(values)
    assert name == "constant" or values[-200] > 3 * 2.0


def test_simulated_latencies_are_drawn_by_key() -> None:
    policy, asked = SimulatedPolicy(LATENCIES["pareto"](1.0)), drawn(40, 0)
    delays = [policy.delay(e, "agent", turn) for e in asked for turn in range(3)]
    assert delays == [policy.delay(e, "agent", turn) for e in asked for turn in range(3)]
    assert len(set(delays)) == 120
    assert all(delay >= 0.6 for delay in delays)  # the scale: 1 * (2.5 - 1) / 2.5


async def test_lag_sees_a_held_loop() -> None:
    async def holds() -> None:
        for _ in range(5):
            sum(range(2_000_000))
            await asyncio.sleep(0)

    found = await lag(holds, 0.3)
    assert found["max ms"] > 10
    assert found["p50 ms"] <= found["p99 ms"] <= found["max ms"]


def test_the_collector_is_eased_during_a_run_and_put_back() -> None:
    before, during = gc.get_threshold(), []

    class Looks(CountingEnv):
        async def close(self) -> None:
            during.append(gc.get_threshold()[0])

    env = Looks(turns=1)
    Runner(env, FakePolicy(), concurrency=2000).run_sync(islice(episodes(env.tasks()), 3))
    assert min(during) > before[0]
    assert gc.get_threshold() == before


def test_a_missing_framework_is_a_row_and_the_page_has_every_table(tmp_path: Path) -> None:
    rows = peer_rows(PEERS, 1)
    assert {row["framework"] for row in rows} == set(PEERS)
    page = markdown("Title", {"seed": 1, "machine": {"cores": "2"}, "others": rows})
    assert page.startswith("# Title\n\n- seed: 1\n- machine: cores 2\n\n## others\n\n| framework | at once |")
    assert len(page.splitlines()) == 9 + len(rows)
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0 - 3.0)"


@pytest.mark.network
def test_the_stub_answers_whatever_is_posted() -> None:
    with stub() as url:
        asked = Request(f"{url}/chat/completions", json.dumps({"messages": ["x" * 100_000]}).encode())
        for _ in range(2):
            with urlopen(asked, timeout=10) as response:
                assert json.load(response)["choices"][0]["message"] == {"role": "assistant", "content": REPLY}
    assert content_length(b"POST / HTTP/1.1\r\ncontent-LENGTH: 12\r\nAccept: */*\r\n\r\n") == 12
    assert content_length(b"GET / HTTP/1.1\r\n\r\n") == 0


def test_without_a_client_the_endpoint_rows_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("aiohttp", "verifiers", "verifiers.v1"):
        monkeypatch.setitem(sys.modules, package, None)
    rows = peer_rows(ENDPOINT_PEERS, 1)
    assert [row["framework"] for row in rows] == ["bare aiohttp", "agentgym", "verifiers"]
    assert {row["cpu us a turn"] for row in rows} == {"not installed"}
    assert [row["not alike"] for row in rows] == ["aiohttp", "aiohttp", "verifiers.v1"]


def test_a_row_counts_whole_episodes_only() -> None:
    complete(8, 8, None)
    with pytest.raises(EnvironmentFault, match="after 7 of 8 turns"):
        complete(7, 8, None)
    with pytest.raises(EnvironmentFault, match="refused"):
        complete(8, 8, ["refused"])


def test_the_bench_is_in_the_catalogue() -> None:
    assert lookup("overhead", "benches").load().__name__ == "overhead"
