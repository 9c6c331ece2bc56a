"""The one training loop: build, warm up, imitate, then reinforce; every step exact, seeded and resumable.

    summary = PolicyGradient().train(resolve("shopping/laptop"), Path("runs/first"))

    model -> copy warm-up -> imitation -> evaluation -> [play -> compose -> admit -> advantages -> learn -> publish] x n
          -> evaluation, the ladder beside it -> report

Rollouts and learner are two sides with a pipeline between them (`updates`); `max_staleness` = 0 runs them in turn.
Random numbers hang on (seed, phase, step), so a resumed run draws what an uninterrupted one draws.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from agentgym.env import Environment
from agentgym.errors import StoreError
from agentgym.evaluation import evaluate
from agentgym.modeling import build
from agentgym.policy import Policy
from agentgym.report import write_report
from agentgym.types import Trajectory, WeightsVersion, iterate
from agentgym_trainers import config as configs
from agentgym_trainers import figures, language, sft, sinks
from agentgym_trainers.config import Config
from agentgym_trainers.crew import Crew, joined
from agentgym_trainers.figures import Figures
from agentgym_trainers.mixtures import make_env, reward_of
from agentgym_trainers.plan import Plan, plan
from agentgym_trainers.reinforce import needs_initial, player, refuse
from agentgym_trainers.remote import Remote
from agentgym_trainers.rollouts import Rollouts
from agentgym_trainers.state import SUMMARY, Stage, State, Stateful, position, require_free, steps_of
from agentgym_trainers.updates import Updates

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""progress(phase, done, total, figures of the step just done)"""
Step = Callable[[int], Awaitable[Figures]]
"""Takes one step of a phase."""
SUPERVISED_EVERY = 200
"""Steps of the warm start between checkpoints."""


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. Evaluations hold the fields of `agentgym.evaluation.Evaluation` and `success_valid`, the
    success among valid episodes; `ladder` the same for reference policies. `seconds` by phase."""

    out: str
    steps: int
    parameters: int
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    ladder: dict[str, dict[str, Any]] = {}
    last: dict[str, float] = {}
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}


class PolicyGradient:
    """The trainer `policy-gradient`; see the module."""

    resolve = staticmethod(configs.resolve)

    @staticmethod
    def plan(config: Config) -> Plan:
        """What the run will need, and whether this machine has it."""
        return plan(config)

    @staticmethod
    def train(
        config: Config | None, out: str | Path, *, resume: bool = False, progress: Progress | None = None
    ) -> RunSummary:
        """Run to the end in the folder `out`; with `resume`, continue the run that lies there by its own config.

        Also works inside a running event loop. Interrupting leaves a folder that can be resumed.
        """
        path = Path(out)
        with ExitStack() as stack:
            crew = stack.enter_context(joined())
            if crew.follows:
                return _summary(crew.follow(path))
            if resume and (path / SUMMARY).is_file():
                return _summary(path)
            if not resume:
                sinks.require(config.run.sinks if config else ())
                require_free(path)
            if not resume and config is None:
                raise StoreError(f"nothing to train in {path}: give a config, or resume")
            state = stack.enter_context(State.resume(path) if config is None or resume else State.begin(config, path))
            stack.enter_context(_torch_settings(state.config))
            return _run(_Training(state, progress or _silent, crew).run)


def _summary(path: Path) -> RunSummary:
    return msgspec.json.decode((path / SUMMARY).read_bytes(), type=RunSummary)


def _silent(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    return None


def _run(main: Callable[[], Awaitable[RunSummary]]) -> RunSummary:
    """`asyncio.run`, in a thread of its own where a loop is running already (notebooks)."""

    async def call() -> RunSummary:
        return await main()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(call())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(call())).result()


@contextmanager
def _torch_settings(config: Config) -> Iterator[None]:
    """Threads and determinism for the time of a run."""
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.run.threads or threads)
    torch.use_deterministic_algorithms(config.run.deterministic or exact)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact)


class _Training:
    """One run under way."""

    def __init__(self, state: State, progress: Progress, crew: Crew) -> None:
        self.state, self.progress, self.crew = state, progress, crew
        self.config = config = state.config
        self.env: Environment = make_env(config)
        refuse(config, self.env)
        self.seconds: defaultdict[str, float] = defaultdict(float, state.stage.seconds if state.stage else {})
        self.counts: Counter[str] = Counter(state.stage.counts if state.stage else {})
        self.last: Figures = {}
        self.updates: Updates | None = None

    async def run(self) -> RunSummary:
        weights, texts = self.state.weights, await self._texts()
        self.model = language.make(self.config, self.env, weights, texts)
        self.crew.begin(self.config, self.env, self.model, self.state.folder.path, weights, texts)
        await self.model.publish(WeightsVersion(number=self.state.position))
        try:
            return await self._phases()
        finally:
            self.model.close()

    async def _phases(self) -> RunSummary:
        await self._warm_up()
        await self._imitate()
        before = await self._judge("before", self.model.engine)
        await self._reinforce()
        after = await self._judge("after", self.model.engine)
        ladder = self.env.ladder() if self.config.eval.ladder and self.config.eval.episodes else {}
        beside = {name: await self._judge(f"ladder/{name}", policy) for name, policy in ladder.items()}
        summary = RunSummary(
            out=str(self.state.folder.path),
            steps=self.config.run.steps,
            parameters=build.parameters(self.model.model),
            before=before,
            after=after,
            ladder=beside,
            last=self.last,
            seconds=dict(self.seconds),
            counts=dict(self.counts),
        )
        self.state.folder.flush(sync=True)
        write_report(self.state.folder.path)
        self.state.finish(summary)
        return summary

    async def _texts(self) -> list[str]:
        """What a tokenizer made here is trained on: the teacher's episodes, both sides."""
        found = self.config.model
        if found.path or found.tokenizer != "bpe" or self.state.weights:
            return []
        played = await sft.demonstrate(self.config, self.env, min(self.config.sft.demonstrations, 300))
        turns = [turn for t in played for turn in iterate(t.turns)]
        return [m.text for turn in turns for m in turn.observation.messages] + [turn.action.text for turn in turns]

    # --- phases ---

    async def _phase(self, name: str, learner: Stateful, one: Step, every: int) -> None:
        """Take the steps of a phase that are not behind us, with a checkpoint every so often and at the end."""
        total, done = steps_of(self.config, name), self.state.steps_done(name)
        self.state.restore(learner, name)
        for step in range(done, total):
            started, judged = time.perf_counter(), self.seconds["evaluation"]
            found = await one(step)
            self.seconds[name] += time.perf_counter() - started - (self.seconds["evaluation"] - judged)
            self.last = found
            beside = {"timeline": self.updates.timeline} if self.updates else {}
            self.state.log({"phase": name, "step": position(self.config, name, step + 1), **found, **beside})
            self.progress(name, step + 1, total, found)
            if (step + 1) % every == 0 or step + 1 == total:
                await self._save(name, step + 1, learner)
        await self.model.publish(WeightsVersion(number=position(self.config, name, total)))

    async def _save(self, phase: str, step: int, learner: Stateful) -> None:
        """A checkpoint, written while play goes on: whatever ends meanwhile is in the journal that begins with it."""
        tensors, plain = learner.state()
        stage = Stage(phase=phase, step=step, learner=plain, seconds=dict(self.seconds), counts=dict(self.counts))
        number, updates = position(self.config, phase, step), self.updates
        self.state.journal.begin(number, updates.line.open() if updates else ())
        if updates is None:
            self.state.save(stage, tensors, self.model)
            return
        stage = msgspec.structs.replace(stage, play=updates.line.standing)
        await updates.off_loop(self.state.save, stage, tensors, self.model)
        updates.clock.lap("saving")

    async def _warm_up(self) -> None:
        c = self.config.warmup
        if self.state.steps_done("warmup") >= c.steps:
            return
        learner = self.crew.learner("warmup")
        tokens = sft.plain_tokens(self.model.renderer.tokenizer)

        async def one(step: int) -> Figures:
            return learner.step([sft.copy_batch(c, tokens, self.config.run.seed, step)])

        await self._phase("warmup", learner, one, SUPERVISED_EVERY)

    async def _imitate(self) -> None:
        c, seed = self.config.sft, self.config.run.seed
        if self.state.steps_done("sft") >= c.steps:
            return
        played = await sft.demonstrate(self.config, self.env, c.demonstrations)
        shown = [sft.with_spans(self.model.renderer, t) for t in played]
        learner = self.crew.learner("sft")

        async def one(step: int) -> Figures:
            chosen = sft.batch_of(shown, c.batch, seed, step)
            return learner.update(chosen, sft.ones(chosen))

        await self._phase("sft", learner, one, SUPERVISED_EVERY)

    async def _reinforce(self) -> None:
        config, env, model = self.config, self.env, self.model
        initial = self._initial() if needs_initial(config, reward_of(config, env).derived) else None
        phase = self.crew.learner("rl", initial, self.counts)
        rollouts: Rollouts | Remote
        if config.run.processes == 2:
            rollouts = Remote(config, model, self.state.folder.path, self.counts)
        else:
            rollouts = player(config, env, model.engine, model.renderer, initial)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(rollouts.close)
            self.updates = Updates(self.state, env, rollouts, phase, lambda name: self._judge(name, model.engine))
            stack.push_async_callback(self.updates.close)
            await self._phase("rl", phase, self.updates.one, config.run.checkpoint_every)

    def _initial(self) -> Any:
        """The policy as it was before reinforcement, kept in the run's folder for a resumed run."""
        folder = self.state.folder.path / "reference"
        if not folder.is_dir():
            self.model.save(folder)
        return self.model.frozen(folder)

    # --- judging ---

    async def _judge(self, name: str, policy: Policy) -> dict[str, Any]:
        """Evaluate on held-out tasks, once: a resumed run reads what it has."""
        known, c = self.state.evaluated(), self.config.eval
        if name in known or not c.episodes:
            return dict(known.get(name, {}))
        started = time.perf_counter()
        seen: list[Trajectory] = []
        found = await evaluate(
            self.env,
            policy,
            split=c.split,
            episodes=c.episodes,
            seed=c.seed,
            attempts=c.attempts,
            concurrency=self.config.rollout.concurrency,
            sampling=self.config.sampling,
            limits=self.config.rollout.limits,
            seen=seen.append,
        )
        told = msgspec.to_builtins(found.replace(policy=name)) | {"success_valid": figures.success_valid(seen)}
        self.state.log({"phase": "evaluation", "evaluation": told})
        self.seconds["evaluation"] += time.perf_counter() - started
        self.progress(name, 1, 1, {"success": found.success or 0.0, "return": found.return_mean})
        return told
