"""The benchmark of HTTP clients runs, names what is absent, and its contestants all get through."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentgym.errors import ConfigError
from agentgym_policies.endpoint import bench

pytestmark = [pytest.mark.network, pytest.mark.timeout(60)]


def test_it_compares_clients_in_interleaved_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = {"nobody": ("no_such_client", bench._bare)}
    present = {name: bench.CONTESTANTS[name] for name in ("bare aiohttp", "Endpoint", "httpx")}
    monkeypatch.setattr(bench, "CONTESTANTS", present | absent)
    figures = bench.endpoint(callers=4, turns=2, rounds=2, out=str(tmp_path / "page.md"))
    assert figures["absent"] == "no_such_client"
    rows = {row["client"]: row["ratio"] for row in figures["CPU per call"]}
    assert list(rows) == ["bare aiohttp", "Endpoint", "httpx"]
    assert rows["bare aiohttp"] == 1.0
    assert all(ratio > 0 for ratio in rows.values())
    assert "| httpx |" in (tmp_path / "page.md").read_text()


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        bench.endpoint(callers=0)
