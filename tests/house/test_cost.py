"""What `import agentgym` costs, and what it must not bring."""

from __future__ import annotations

import subprocess
import sys
import time

RUNS = 5


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def fastest(code: str) -> float:
    """Seconds of the quickest of `RUNS` fresh interpreters."""

    def once() -> float:
        began = time.perf_counter()
        run(code)
        return time.perf_counter() - began

    return min(once() for _ in range(RUNS))


def test_import_is_cheap() -> None:
    assert fastest("import agentgym") - fastest("pass") <= 0.100


def test_import_brings_nothing_heavy() -> None:
    found = set(run("import agentgym, sys; print(*sys.modules)").split())
    assert not found & {"numpy", "asyncio", "torch", "rich", "msgspec", "importlib.metadata"}


def test_records_bring_no_numpy() -> None:
    found = set(run("import agentgym.types, agentgym.errors, sys; print(*sys.modules)").split())
    assert not found & {"numpy", "asyncio", "torch"}


def test_listing_what_there_is_imports_no_environment() -> None:
    listed = "; ".join(f"agentgym.catalogue({kind!r})" for kind in ("envs", "presets", "policies", "trainers"))
    found = set(run(f"import agentgym, sys; {listed}; print(*sys.modules)").split())
    rooms = {name for name in found if name.startswith("agentgym_") and "." in name}
    assert rooms <= {"agentgym_envs.catalogue", "agentgym_policies.catalogue", "agentgym_trainers.catalogue"}
    assert "torch" not in found
