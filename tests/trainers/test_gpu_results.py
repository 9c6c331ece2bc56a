"""The script behind docs/results/gpu.md walks its whole path without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from agentgym_trainers import bench_learner

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu_results.py"


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs the extra [compare]")
@pytest.mark.filterwarnings("ignore")
def test_the_page_has_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_results", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tiny = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "words": 512}
    monkeypatch.setitem(bench_learner.SIZES, "tiny", tiny)
    small = ["--size", "tiny", "--sessions", "2", "--sequences", "2", "--rounds", "1"]
    script.main(["--device", "cpu", *small, "--out", str(tmp_path / "gpu.md")])
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| engine, no reuse |" in page
    assert page.count("| tiny |") == 6
