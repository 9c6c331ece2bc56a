"""What benchmarks share: CPU time, spread over repeats, the machine they ran on, tables in Markdown."""

from __future__ import annotations

import asyncio
import gc
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import msgspec

from agentgym import __version__


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of one run: CPU of this process (all threads, system time included) and wall clock."""

    cpu: float
    wall: float


def cost(work: Callable[[], Awaitable[Any]]) -> Cost:
    """Run it on an event loop of its own, after a full garbage collection."""

    async def main() -> Cost:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        await work()
        return Cost(cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)

    return asyncio.run(main())


def spread(values: Sequence[float], digits: int = 1) -> str:
    """ "median (lowest - highest)" over the repeats."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Where the figures come from: interpreter, processor, load when it began, versions of what takes part."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    found = {
        "agentgym": __version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "load": load,
    }
    return found | {name: number for name in packages if name not in found and (number := _version(name))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def markdown(title: str, figures: Mapping[str, Any]) -> str:
    """Figures as a page: a list of what is single, a table for each list of rows."""
    lines = [f"# {title}", ""]
    lines += [f"- {name}: {value}" for name, value in figures.items() if not isinstance(value, list | dict)]
    for name, value in figures.items():
        if isinstance(value, dict):
            lines += [f"- {name}: " + ", ".join(f"{k} {v}" for k, v in value.items())]
    for name, value in figures.items():
        if isinstance(value, list) and value:
            lines += ["", f"## {name}", "", *_table(value)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = list(rows[0])
    body = ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body]
