"""The figures of docs/results/async.md: overlapped against synchronous training on shopping, five seeds.

    python bench/async_results.py                       # about 35 minutes on 2 quiet cores, one cell at a time
    python bench/async_results.py --seeds 2 --out runs/quick

Every cell is a run folder of its own under --out; what is finished is not done again, what was interrupted goes on.
All begin from one warm start; a seed's cells share tasks and objective. They differ in whether rollouts and learning
overlap, and in how long user and shop take to answer. Both ways have two threads in all: in turns both for whoever
works, overlapped one for the engine and one for the learner, each in a process of its own (in one process the two would
share Python's lock, and a step of so small a model is Python for the most part).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shopping_results as shop

ROOT = Path(__file__).resolve().parents[1]
LATENCY = 0.2
STALENESS = 2
STEPS = 16
MODES = {
    "sync": ["run.threads=2", "rollout.threads=2"],
    "async": ["run.threads=1", "rollout.threads=1", "run.processes=2", f"rollout.max_staleness={STALENESS}"],
}
LATENCIES = {"slow": LATENCY, "instant": 0.0}
CELLS = {f"{mode}-{name}": (mode, seconds) for name, seconds in LATENCIES.items() for mode in MODES}
ALONE = {f"alone-{name}": ("alone", seconds) for name, seconds in LATENCIES.items()}
"""In turns with one thread in all, which suits so small a model better than two: for the seconds alone."""
ALONE_SEEDS = 1
SETTINGS = {**MODES, "alone": ["run.threads=1", "rollout.threads=1"]}


def config(out: Path, cell: str, seed: int, quick: list[str]) -> Any:
    """The preset from the warm start, with a mode and a latency."""
    from agentgym_trainers.config import resolve

    mode, seconds = {**CELLS, **ALONE}[cell]
    start = [
        f"run.seed={seed}",
        f"run.steps={STEPS}",
        "eval.episodes=0",
        "warmup.steps=0",
        "sft.steps=0",
        f"env.latency={seconds}",
    ]
    return resolve(shop.PRESET, [*start, *SETTINGS[mode], *quick, f"model.path={shop.weights(out / 'warm-0')}"])


def train(out: Path, cell: str, seed: int, quick: list[str]) -> None:
    """One cell, in this process; goes on where it stopped."""
    from agentgym_trainers.loop import PolicyGradient

    if cell == "warm":
        shop.train(out, cell, seed, quick)
        return
    folder = out / f"{cell}-{seed}"
    resumed = (folder / "config.toml").is_file()
    PolicyGradient.train(None if resumed else config(out, cell, seed, quick), folder, resume=resumed)


def start(out: Path, cell: str, seed: int, quick: list[str]) -> None:
    """One cell, in a process of its own, and its judgement without latency."""
    print(f"{cell}-{seed} ...", flush=True)
    command = [sys.executable, __file__, "--out", str(out), "--cell", cell, str(seed)]
    subprocess.run([*command, *(word for setting in quick for word in ("--set", setting))], check=True)
    shop.judge(out, cell, seed)


def run_all(out: Path, seeds: int, quick: list[str]) -> None:
    start(out, "warm", 0, quick)
    for seed in range(seeds):
        for cell in (*CELLS, *(ALONE if seed < ALONE_SEEDS else ())):
            start(out, cell, seed, quick)


# --- the page ---------------------------------------------------------------------------------------------------


def seconds_of(out: Path, cell: str, seeds: int) -> list[float]:
    return [float(shop.summary(out, cell, seed)["seconds"]["rl"]) for seed in range(seeds)]


def alone(out: Path, name: str, seeds: int) -> str:
    """Seconds of the synchronous run with one thread."""
    return " and ".join(f"{s:.0f}" for s in seconds_of(out, f"alone-{name}", min(seeds, ALONE_SEEDS)))


def success_of(out: Path, cell: str, seeds: int) -> list[float]:
    found = (json.loads((out / f"{cell}-{seed}" / shop.FRESH).read_bytes()) for seed in range(seeds))
    return [float(judged["success"]) for judged in found]


def ages_of(out: Path, cell: str, seeds: int) -> tuple[float, float]:
    """Mean and greatest staleness of what was learnt from."""
    lines = [line for s in range(seeds) for line in shop.load_run(out / f"{cell}-{s}").metrics if line["phase"] == "rl"]
    return mean(line["staleness"] for line in lines), max(line["staleness_max"] for line in lines)


def rows(out: Path, seeds: int) -> list[str]:
    lines = [
        "| user and shop answer after | mode | success after | over sync, points [95 %] | seconds of reinforcement "
        "| sync takes, seed by seed | staleness mean, most |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, (mode, latency) in CELLS.items():
        other = cell.replace("async", "sync")
        after, beside, seconds = (
            success_of(out, cell, seeds),
            success_of(out, other, seeds),
            seconds_of(out, cell, seeds),
        )
        ratios = [a / b for a, b in zip(seconds_of(out, other, seeds), seconds, strict=True)]
        age, most = ages_of(out, cell, seeds)
        cells = [
            f"{1000 * latency:.0f} ms",
            mode,
            f"{100 * mean(after):.1f} %",
            "" if cell == other else shop.interval([a - b for a, b in zip(after, beside, strict=True)]),
            f"{median(seconds):.0f} ({min(seconds):.0f} - {max(seconds):.0f})",
            "" if cell == other else f"{median(ratios):.2f} x ({min(ratios):.2f} - {max(ratios):.2f})",
            f"{age:.2f}, {most:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def seed_rows(out: Path, seeds: int) -> list[str]:
    lines = [f"| seed | {' | '.join(CELLS)} |", f"|---|{'---|' * len(CELLS)}"]
    for seed in range(seeds):
        found = [f"{100 * success_of(out, name, seeds)[seed]:.1f}" for name in CELLS]
        lines.append(f"| {seed} | {' | '.join(found)} |")
    return lines


def page(out: Path, seeds: int) -> str:
    import numpy
    import torch

    import agentgym

    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (agentgym, torch, numpy))
    steps = shop.summary(out, "sync-slow", 0)["steps"]
    return f"""# Overlapped training: the same success in less time?

Written by `python bench/async_results.py`; {seeds} seeds (0 to {seeds - 1}), on {platform.machine()},
{platform.system()}, Python {platform.python_version()}, {versions}; one cell at a time on two cores. Ratios are
taken seed by seed.

Preset `{shop.PRESET}`: a small model made on the spot, {steps} updates of 192 episodes, all from one warm start
({100 * success_of(out, "warm", 1)[0]:.1f} % success); seeds differ in tasks and sampling noise.
Both modes have two threads in all: `sync` takes turns (both threads for whoever works), `async` overlaps with
`rollout.max_staleness = {STALENESS}` in two processes (one thread for the engine, one for the learner). The objective
is the preset's: its ratio is against the recorded log-probs of whichever weights sampled a token. Nothing was tuned for
either mode.
Success is strict, on {shop.EPISODES} held-out tasks, other ones for each seed, judged without latency at temperature 1.

{chr(10).join(rows(out, seeds))}

Seed by seed, success in percent:

{chr(10).join(seed_rows(out, seeds))}

An interval that holds 0 says that no difference was seen. Without latency nobody has to be waited for: what is gained
there comes from two cores that both work, since a step of so small a model hardly uses a second thread; and learning
from older samples costs what the interval says.

`sync` with one thread in all, where that suits so small a model better (seed 0):
{alone(out, "slow", seeds)} s with the latency, {alone(out, "instant", seeds)} s without.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/async-results"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "async.md")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=value")
    parser.add_argument("--cell", nargs=2, metavar=("CELL", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        train(options.out, options.cell[0], int(options.cell[1]), options.settings)
        return
    run_all(options.out, options.seeds, options.settings)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(options.out, options.seeds), encoding="utf-8")


if __name__ == "__main__":
    main()
