"""The figures of docs/results/objectives.md: every method on a world that can be solved exactly, five on shopping.

    python bench/objectives_results.py exact            # about 15 minutes on 2 quiet cores
    python bench/objectives_results.py shopping         # about an hour and a half
    python bench/objectives_results.py page             # write the page from what is there

Every cell is a file or a run folder of its own under --out: what is finished is not done again, what was interrupted
goes on. The exact part trains through the run's own machinery (strategies, runner, composer, advantages, learner) with
a table in place of a language model, and judges by the exact value of the policy that came out.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import msgspec

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
import shopping_results as shop

ROOT = Path(__file__).resolve().parents[1]
YARDSTICK = "grpo"

# --- part 1: every method on a world that can be solved ---------------------------------------------------------

STEPS = 60
THRESHOLD = 0.9
RUN: dict[str, Any] = {
    "env": {"id": "exact-lesson-v0"},
    "run": {"steps": STEPS},
    "rollout": {"tasks_per_step": 4, "group_size": 8, "drop_equal": False, "retries": 0},
    "optim": {"lr": 0.03, "warmup": 0, "decay": 0.0, "clip": 0.0, "epochs": 4},
    "eval": {"episodes": 0},
}
TWO: dict[str, dict[str, Any]] = {
    "bupo": {"objective": {"source": {"layer": 1}}},
    "dcpo": {"strategy": {"sample": 8, "keep": 4}},
}
"""What of a method has to be smaller in a world of two tasks, for a model of two layers; and bundles hold two tasks."""
CAUTIOUS = 1.0
"""Logit of answering at once in the policy that every cell begins from."""


def exact_cells(out: Path, method: str, seeds: int) -> str:
    """Every cell of a method, in this process: what it learns, seed by seed, and its certificate."""
    import torch

    torch.set_num_threads(1)
    for seed in range(seeds):
        _cell(out / "exact" / f"{method}-{seed}.json", lambda seed=seed: lesson(method, seed))
    _cell(out / "exact" / f"{method}.estimate.json", lambda: estimated(method))
    _cell(out / "exact" / f"{method}.certificate.json", lambda: certified(method))
    return method


def _cell(path: Path, make: Any) -> None:
    """Make it unless it is there; why it cannot be made is a result too."""
    from agentgym.errors import AgentGymError

    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what declarations warn of is what the page measures
        try:
            found = make()
        except AgentGymError as error:
            found = {"error": str(error)}
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(found) + b"\n")
    part.replace(path)


def lesson(method: str, seed: int) -> dict[str, Any]:
    """One training run: the exact value of the policy after every update."""
    from agentgym.types import WeightsVersion
    from agentgym_trainers.exact.bigram import Model
    from agentgym_trainers.exact.mdp import environment
    from agentgym_trainers.exact.worlds import LESSON
    from agentgym_trainers.reinforce import Reinforcement
    from agentgym_trainers.rollouts import Rollouts, TaskCursor, Unit

    config = lesson_config(method, seed)
    model = Model(LESSON, first_policy(), layers=2)
    env, initial = environment(LESSON), copy.deepcopy(model.bigram).requires_grad_(False)
    phase, rollouts = Reinforcement(config, env, model, initial), Rollouts(config, env, model.engine)
    cursor = TaskCursor(env, seed)
    began, values, played = time.perf_counter(), [values_of(model)], 0

    async def update(step: int) -> int:
        tasks = tuple(cursor.take(config.rollout.tasks_per_step))
        unit = await rollouts.play(Unit(number=step, version=step, tasks=tasks, step=step))
        phase.learn([unit], model.engine.version)
        rollouts.reprice(phase.multipliers.state())
        await model.publish(WeightsVersion(number=step + 1))
        return len(unit.everything)

    for step in range(config.run.steps):
        played += asyncio.run(update(step))
        values.append(values_of(model))
    seconds = time.perf_counter() - began
    return {"method": method, "seed": seed, "values": values, "episodes": played, "seconds": seconds}


def lesson_config(method: str, seed: int) -> Any:
    """The run of a cell; the method's declaration, but for what has to be smaller here."""
    from agentgym import registry
    from agentgym.errors import ConfigError
    from agentgym.presets import merge
    from agentgym_trainers import methods
    from agentgym_trainers.config import resolve
    from agentgym_trainers.exact.composition import HINTED
    from agentgym_trainers.exact.mdp import environment
    from agentgym_trainers.exact.worlds import LESSON

    if "exact-lesson-v0" not in registry.catalogue():
        registry.register("exact-lesson-v0", lambda: environment(LESSON))
    kind = methods.declared(methods.load(method)).strategy
    if isinstance(kind, HINTED):
        raise ConfigError(f"the strategy {kind.kind!r} needs hints, or replies that begin as it says")
    own: dict[str, Any] = {"method": method, "run": {"seed": seed}, **copy.deepcopy(TWO.get(method, {}))}
    terms = terms_of(method)
    if any("bundle" in term.get("key", "") for term in terms):
        own["advantage"] = [{**term, "bundle": 2} for term in terms]
    return resolve(merge(copy.deepcopy(RUN), own))


def first_policy() -> Any:
    import numpy as np

    from agentgym_trainers.exact.worlds import LESSON

    return CAUTIOUS * np.eye(len(LESSON.actions))[[LESSON.actions.index("answer")] * len(LESSON.states)]


def values_of(model: Any) -> list[float]:
    """The exact return: the mean over the two tasks, and what share of its best each has reached."""
    from agentgym_trainers.exact.mdp import log_policy
    from agentgym_trainers.exact.worlds import LESSON

    value, best = LESSON.value(log_policy(model.theta(), LESSON.legal)), LESSON.best()
    starts = [LESSON.states.index(word) for word in LESSON.prompts]
    return [LESSON.mean(value), *(float(value[s] / best[s]) for s in starts)]


def estimated(method: str) -> dict[str, Any]:
    """Bias and signal of a step at the policy that every cell begins from, by enumeration."""
    from agentgym_trainers.exact.composition import load
    from agentgym_trainers.exact.estimate import Lab
    from agentgym_trainers.exact.measures import bias
    from agentgym_trainers.exact.worlds import LESSON

    composition = load(method)
    if composition.outside:
        return {"error": composition.outside}
    lab = Lab(composition, LESSON, members=4)
    found = lab.estimate(first_policy())
    told = bias("lesson", found)
    return {"bias": told.relative, "angle": told.angle, "prompts": told.prompts, "signal": found.signal}


def certified(method: str) -> dict[str, Any]:
    from agentgym_trainers.exact.certify import run

    found: dict[str, Any] = msgspec.to_builtins(run(method))
    return found


def run_exact(out: Path, seeds: int, jobs: int, names: list[str]) -> None:
    """Methods side by side, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for name in pool.map(exact_cells, [out] * len(names), names, [seeds] * len(names)):
            print(f"{name} done", flush=True)


def all_methods() -> list[str]:
    from agentgym_trainers import methods

    return list(methods.names())


# --- its tables -------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return found


def learnt(out: Path, method: str, seeds: int) -> list[dict[str, Any]]:
    return [read(out / "exact" / f"{method}-{seed}.json") for seed in range(seeds)]


def best_return() -> float:
    from agentgym_trainers.exact.worlds import LESSON

    return LESSON.mean(LESSON.best())


def reached(run: dict[str, Any]) -> int | None:
    """The first update after which the exact return was `THRESHOLD` of the best."""
    return next((i for i, v in enumerate(run["values"]) if v[0] >= THRESHOLD * best_return()), None)


def spread(values: list[float], form: str = ".3f") -> str:
    """Mean and range."""
    return f"{mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def why_not(out: Path, method: str, seeds: int) -> str:
    """Why a method has no row, or ""."""
    for found in learnt(out, method, seeds):
        if "error" in found:
            return str(found["error"])
    outside = read(out / "exact" / f"{method}.certificate.json").get("outside", "")
    return outside if "imitates" in outside else ""


def exact_rows(out: Path, names: list[str], seeds: int) -> list[str]:
    lines = [
        "| method | updates to 90 % | x GRPO's | final return | share of the small task | of the large one | episodes "
        "| bias | signal, x GRPO's | caught in |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    able = [name for name in names if not why_not(out, name, seeds)]
    for name in sorted(able, key=lambda name: rank(out, name, seeds)):
        rows.setdefault(cells_of(out, name, seeds), []).append(name)
    return lines + [f"| {', '.join(same)} | {' | '.join(cells)} |" for cells, same in rows.items()]


def steps_of(out: Path, name: str, seeds: int) -> list[int]:
    """Updates to the threshold, of the seeds that got there."""
    return [step for step in map(reached, learnt(out, name, seeds)) if step is not None]


def rank(out: Path, name: str, seeds: int) -> tuple[float, ...]:
    steps = steps_of(out, name, seeds)
    return -len(steps), median(steps) if steps else 0.0, -mean(r["values"][-1][0] for r in learnt(out, name, seeds))


def cells_of(out: Path, name: str, seeds: int) -> tuple[str, ...]:
    runs = learnt(out, name, seeds)
    steps, other = steps_of(out, name, seeds), steps_of(out, YARDSTICK, seeds)
    some = f" ({len(steps)} of {seeds} seeds)" if len(steps) < seeds else ""
    told = f"{median(steps):g} [{min(steps)}, {max(steps)}]{some}" if steps else "never"
    ratio = f"{median(steps) / median(other):.2f}" if len(steps) == len(other) == seeds else ""
    final = zip(*(run["values"][-1] for run in runs), strict=True)
    cells = [told, ratio, *(spread(list(v)) for v in final), f"{mean(run['episodes'] for run in runs):.0f}"]
    return (*cells, *estimate_cells(out, name), traps_of(out, name))


def estimate_cells(out: Path, name: str) -> list[str]:
    """Bias, and signal over that of the yardstick."""
    found, other = (read(out / "exact" / f"{n}.estimate.json") for n in (name, YARDSTICK))
    if "error" in found:
        return ["", ""]
    small = found["bias"] < 1e-9
    return ["0" if small else f"{found['bias']:.2g}", f"{found['signal'] / other['signal']:.2f}"]


def traps_of(out: Path, name: str) -> str:
    found = read(out / "exact" / f"{name}.certificate.json")
    if found.get("error") or found.get("outside"):
        return "not certifiable"
    caught = [v["trap"] for v in found["verdicts"] if v["status"] == "caught"]
    return ", ".join(caught) or ("none in what could be measured" if found["gaps"] else "none")


def exact_part(out: Path, seeds: int) -> str:
    names = [p.name.removesuffix(".certificate.json") for p in sorted((out / "exact").glob("*.certificate.json"))]
    left = [(name, why_not(out, name, seeds)) for name in names]
    seconds = sum(run.get("seconds", 0.0) for name in names for run in learnt(out, name, seeds))
    rollout, optim = RUN["rollout"], RUN["optim"]
    return f"""## Every method, exactly

A world of two tasks: for the small one (returns up to 0.1) asking once before the answer is right, for the large one
(up to 1) asking twice; answering at once is a local optimum of both, and what the first policy leans to. A table of
logits takes the place of a language model; everything else is the run's own code. {STEPS} updates of
{rollout["tasks_per_step"]} tasks x {rollout["group_size"]} episodes, {optim["epochs"]} optimiser steps each, AdamW with
lr {optim["lr"]} for every method (untuned; Adam takes the scale out of a gradient), {seeds} seeds with the same tasks
and sampling noise for all; no group is dropped unless a method says so. Returns are exact values of the policy, not
averages of episodes; the best is {best_return():.2f}. In brackets: the range over seeds. Methods that came out equal in
everything share a row.

{chr(10).join(exact_rows(out, names, seeds))}

- *updates to 90 %*: until the exact return is {THRESHOLD:.0%} of the best, the median over the seeds that got there;
  and that over {YARDSTICK}'s, where all seeds of both did.
- *bias*: the expected first step against the gradient of the expected return, |c E[step] - g| / |g| with the best
  c > 0; 0 is below 1e-9, and 1 is the most there is. *signal*: (expected step along g)^2 / (trace of its covariance x
  episodes), over {YARDSTICK}'s. Both by listing every step, with one group of four a task, at the first policy; KL and
  entropy terms are set aside. Empty: it has no such estimate.
- *caught in*: what `agentgym objectives certify NAME` says.
- *episodes*: played in all; strategies that refill, select or play a greedy one need more.

What to read off it, and what not. The two tasks differ tenfold in scale on purpose: a method that divides by a
group's standard deviation learns the small one first, one that does not the large one, which is nine tenths of the
return; in a world where the small task is the one that matters the order turns round. Rows whose ranges overlap do not
differ. An update of {optim["epochs"]} steps on one rollout is all that ratios and gates have to hold here, with one
token a turn. Sampler and learner agree, so that the corrections of their mismatch (TIS, MIS, IcePop, ...) have
nothing to correct. KL terms pull towards the first policy; RLOO's, in the reward, is large beside a task that pays 0.1
at most. BuPO's layer is the first of two, DCPO keeps 4 episodes of 8 a task, RiskPO's bundles hold two tasks, and the
preference methods learn from pairs of the same episodes.

{_left(left)}

Training took {seconds / 60:.1f} minutes of one core in all.
"""


def _left(left: list[tuple[str, str]]) -> str:
    told = [f"- {name}: {why.rstrip('.')}." for name, why in left if why]
    return "Not run, and why:\n\n" + "\n".join(told) if told else ""


# --- part 2: five methods on shopping ---------------------------------------------------------------------------

SHOPPING = {
    "grpo": "GRPO: the yardstick",
    "gspo": "GSPO: one ratio, and one clip, for all an episode said",
    "gigpo": "GiGPO: turn-level credit against the group's visits of the same state",
    "turn-baseline": "turn-level credit against the others' turns, unbiased where the policy decides when to stop",
    "dcpo": "DCPO: of 16 episodes a task the strongest contrast is learnt from",
}
SMALLER: dict[str, list[str]] = {"dcpo": ["rollout.tasks_per_step=12"]}
"""As many episodes an update as the others: half the tasks, twice the episodes of each."""


def terms_of(method: str) -> list[dict[str, Any]]:
    """The terms that a method declares, as tables."""
    from agentgym_trainers import methods

    found: list[dict[str, Any]] = methods.load(method).table.get("advantage", [])
    return found


def shopping_config(out: Path, method: str, seed: int, quick: list[str]) -> Any:
    """The preset with another method and the environment's own reward, from the seed's warm start."""
    from agentgym_trainers.config import resolve

    start = [f"run.seed={seed}", "run.threads=1", "eval.episodes=0", "warmup.steps=0", "sft.steps=0"]
    path = f"model.path={shop.weights(out / f'warm-{seed}')}"
    declared = [f"method={method}", "reward=environment", *SMALLER.get(method, [])]
    return resolve(shop.PRESET, [*declared, *quick, *start, path])


def shopping_cell(out: Path, method: str, seed: int, quick: list[str]) -> None:
    """One cell, in this process; goes on where it stopped."""
    from agentgym_trainers.loop import PolicyGradient

    if method == "warm":
        shop.train(out, method, seed, quick)
        return
    folder = out / f"{method}-{seed}"
    resumed = (folder / "config.toml").is_file()
    PolicyGradient.train(None if resumed else shopping_config(out, method, seed, quick), folder, resume=resumed)


def start(out: Path, method: str, seed: int, quick: list[str]) -> None:
    """One cell, in a process of its own."""
    print(f"{method}-{seed} ...", flush=True)
    command = [sys.executable, __file__, "shopping", "--out", str(out.parent), "--cell", method, str(seed)]
    subprocess.run([*command, *(word for setting in quick for word in ("--set", setting))], check=True)


def run_shopping(out: Path, seeds: int, jobs: int, quick: list[str]) -> None:
    first = [("warm", seed) for seed in range(seeds)]
    cells = [(method, seed) for seed in range(seeds) for method in SHOPPING]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: start(out, *cell, quick), first))
        list(pool.map(lambda cell: start(out, *cell, quick), cells))
        list(pool.map(lambda cell: shop.judge(out, *cell), first + cells))


def successes(out: Path, method: str, seeds: int) -> list[float]:
    """On a cell's fresh tasks, seed by seed."""
    return [float(read(out / f"{method}-{seed}" / shop.FRESH)["success"]) for seed in range(seeds)]


def less(values: list[float], others: list[float]) -> str:
    """Mean and interval of the differences, in points."""
    return shop.interval([a - b for a, b in zip(values, others, strict=True)])


def shopping_rows(out: Path, seeds: int) -> list[str]:
    lines = [
        "| method | success after | gain, points [95 %] | over GRPO [95 %] | valid | seconds of learning |",
        "|---|---|---|---|---|---|",
    ]
    for method, title in SHOPPING.items():
        after, folders = successes(out, method, seeds), [out / f"{method}-{seed}" for seed in range(seeds)]
        seconds = [shop.summary(out, method, seed)["seconds"]["rl"] for seed in range(seeds)]
        cells = [
            title,
            f"{100 * mean(after):.1f} %",
            less(after, successes(out, "warm", seeds)),
            "" if method == YARDSTICK else less(after, successes(out, YARDSTICK, seeds)),
            f"{100 * mean(read(folder / shop.FRESH)['metrics']['valid'] for folder in folders):.1f} %",
            spread(seconds, ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def seed_rows(out: Path, seeds: int) -> list[str]:
    lines = [f"| seed | warm start | {' | '.join(SHOPPING)} |", f"|---|---|{'---|' * len(SHOPPING)}"]
    for seed in range(seeds):
        found = [f"{100 * successes(out, name, seeds)[seed]:.1f}" for name in ("warm", *SHOPPING)]
        lines.append(f"| {seed} | {' | '.join(found)} |")
    return lines


def shopping_part(out: Path, seeds: int) -> str:
    steps = shop.summary(out, YARDSTICK, 0)["steps"]
    return f"""## Five of them on shopping

Preset `{shop.PRESET}` with `method = ...` and `reward = environment` (the gated hierarchical reward, a reconstruction,
without the preset's potential): its optimiser, {steps} updates of 192 episodes; only what the method declares is
exchanged. Each seed has one warm start of a small model made on the spot, which all its cells begin from; tasks and
sampling noise are the same. Success is strict (every hard wish of the user holds), on {shop.EPISODES} held-out tasks,
other ones for each seed, at temperature 1. Intervals are Student's over {seeds} seeds, differences are taken seed by
seed.

{chr(10).join(shopping_rows(out, seeds))}

Seed by seed, success in percent:

{chr(10).join(seed_rows(out, seeds))}

Each was chosen for one question: GSPO changes the level of ratio and clip; GiGPO and the turn baseline say in two ways
which turn is owed what, one of them unbiased; DCPO changes what is learnt from, and was made for shopping: it plays as
many episodes as the others and learns from half of them. The learning rate is the preset's; nothing was tuned for any
of them. An interval that holds 0 says that no difference was seen. Seconds are of reinforcement on one thread, two
cells at once; where the machine had other work the least of the range is nearest to the method's own.
"""


# --- the page ---------------------------------------------------------------------------------------------------


def write_page(out: Path, seeds: int, page: Path) -> None:
    """docs/results/objectives.md, with the parts that are there."""
    import numpy
    import torch

    import agentgym

    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (agentgym, torch, numpy))
    parts = [exact_part(out, seeds)] if (out / "exact").is_dir() else []
    if (out / "shopping" / f"{YARDSTICK}-0" / shop.FRESH).is_file():
        parts.append(shopping_part(out / "shopping", seeds))
    text = f"""# Objectives: what a method does to learning

Written by `python bench/objectives_results.py exact`, then `shopping`, then `page`; {seeds} seeds (0 to {seeds - 1}),
on {platform.machine()}, {platform.system()}, Python {platform.python_version()}, {versions}. Ratios are taken within
one run. Methods are the declarations that `agentgym objectives` lists; how far each is backed stands there.

{chr(10).join(parts)}"""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("exact", "shopping", "page"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives-results"))
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "objectives.md")
    parser.add_argument("--only", action="append", default=[], metavar="METHOD", help="of the exact part")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="a.b=value")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        shopping_cell(options.out / "shopping", options.cell[0], int(options.cell[1]), options.settings)
    elif options.part == "exact":
        run_exact(options.out, options.seeds, options.jobs, options.only or all_methods())
    elif options.part == "shopping":
        run_shopping(options.out / "shopping", options.seeds, options.jobs, options.settings)
    else:
        write_page(options.out, options.seeds, options.page)


if __name__ == "__main__":
    main()
