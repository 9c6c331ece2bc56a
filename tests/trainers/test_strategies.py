"""Rollout strategies: which episodes are played, what is handed over, what is remembered; the reference's numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import msgspec
import pytest
from toys import BanditEnv

from agentgym.advantages import advantages
from agentgym.env import Environment
from agentgym.errors import ConfigError, UnknownName
from agentgym.policy import Policy, Scripted
from agentgym.rewards import Composed
from agentgym.rollout import Runner, episodes
from agentgym.types import (
    Action,
    Episode,
    Failure,
    Ids,
    Observation,
    Sampling,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
)
from agentgym_trainers import methods, strategies
from agentgym_trainers.strategies import Sample, Table, base, declare, hints, plain, prefix, rate

Judge = Callable[[Episode], float | None]
FAILED = None


class Hinting(BanditEnv):
    capabilities = frozenset({"ladder", "hints"})

    def hint(self, task: Task, level: int) -> str:
        return f"hint {level}"

    def ladder(self) -> dict[str, Policy]:
        four = Scripted(lambda e, a: lambda o: Action(text="blue"))
        return {"random": four, "oracle": four}


def sample(value: float | None, episode: Episode | None = None, tokens: int = 1, turns: int = 1) -> Sample:
    """A played episode of this reward; None is a failure."""
    said = tuple(
        Turn(step=i, observation=Observation(), action=Action(text=f"a{i}", span=TokenSpan(ids=Ids(range(tokens)))))
        for i in range(turns)
    )
    trajectory = Trajectory(
        env="bandit-v0",
        episode=episode or Episode(task=Task(env="x")),
        turns=Turns(items=said),
        status="failed" if value is None else "terminated",
        failure=Failure(kind="engine") if value is None else None,
        labels={} if episode is None else episode.labels,
    )
    return Sample(trajectory, None if value is None else Composed(value, 0.0, ()))


class Game:
    """A table whose episodes end as a judge says; keeps what was asked for."""

    def __init__(self, judge: Judge, *, tasks: Sequence[int] | None = None, deals: int = 1, turns: int = 1) -> None:
        self.judge, self.turns, self.deals = judge, turns, deals
        self.asked: list[tuple[Episode, Any]] = []
        self.firsts = episodes(self._tasks(tasks), seed=7)

    def _tasks(self, seeds: Sequence[int] | None) -> Iterator[Task]:
        return (Task(env="bandit-v0", seed=n) for n in (seeds if seeds is not None else count()))

    async def play(self, found: Sequence[Episode], policy: Any) -> list[Sample]:
        self.asked += [(episode, policy) for episode in found]
        return [sample(self.judge(episode), episode, turns=self.turns) for episode in found]

    def table(self, reference: Any = None) -> Table:
        return Table(self.firsts, self.play, deals=self.deals, reference=reference)

    @property
    def count(self) -> int:
        return len(self.asked)

    def labels(self, name: str) -> Counter[str]:
        return Counter(episode.labels.get(name, "") for episode, _ in self.asked)


def made(declared: Any, size: int = 4, env: Environment | None = None) -> Any:
    return strategies.make(declared, env or Hinting(), group_size=size)


def values(groups: Sequence[Sequence[Sample]]) -> list[list[float | None]]:
    return [[s.value for s in group] for group in groups]


def by_member(*rewards: float | None) -> Judge:
    return lambda episode: rewards[episode.member]


ALL: list[Any] = [
    declare.Plain(),
    declare.DynamicFilter(),
    declare.Greedy(),
    declare.Contrastive(sample=6, keep=4),
    declare.Contrastive(sample=6, keep=4, statistics="kept"),
    declare.HintLevels(),
    declare.HintLevels(variant="light"),
    declare.Prefix(),
    declare.HintedRejection(),
    declare.ForcedMode(reference=2),
]


# --- what holds for all -----------------------------------------------------------------------------------------


def keyed(episode: Episode) -> float:
    return float(episode.task.seed * 7 % 3 == 0 and episode.member % 3 == 1)


@pytest.mark.parametrize("declared", ALL, ids=lambda d: f"{d.kind}-{getattr(d, 'variant', '')}")
async def test_no_noise_is_drawn_twice_and_all_is_keyed(declared: Any) -> None:
    games = [Game(keyed, deals=4, turns=4) for _ in range(2)]
    found = [await made(declared).play(game.table(reference="first")) for game in games]
    assert found[0] == found[1]
    ids = [episode.id for episode, policy in games[0].asked if policy is None]
    assert len(ids) == len(set(ids))
    handed = [s.trajectory.episode.id for group in found[0] for s in group]
    assert len(handed) == len(set(handed))
    for group in found[0]:
        assert len({s.trajectory.episode.group for s in group}) == 1


@pytest.mark.parametrize("declared", ALL, ids=lambda d: f"{d.kind}-{getattr(d, 'variant', '')}")
async def test_failures_are_no_rewards(declared: Any) -> None:
    """Where every episode fails nothing is remembered of a task, and no group counts as one without success."""
    game = Game(lambda episode: FAILED, deals=2)
    strategy = made(declared)
    found = await strategy.play(game.table(reference="first"))
    assert strategy.memory == {}
    assert not any(s.value is not None for group in found for s in group)
    assert len(game.labels("hint")) <= 2
    assert "yes" not in game.labels("guided")


@pytest.mark.parametrize("declared", ALL, ids=lambda d: f"{d.kind}-{getattr(d, 'variant', '')}")
async def test_state_survives_a_checkpoint(declared: Any) -> None:
    def play(strategy: Any, game: Game) -> Any:
        return strategy.play(game.table(reference="first"))

    tasks = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    one, other = made(declared), made(declared)
    straight, cut = Game(keyed, tasks=tasks, deals=3, turns=4), Game(keyed, tasks=tasks, deals=3, turns=4)
    await play(one, straight)
    await play(other, cut)
    resumed = made(declared)
    resumed.restore(msgspec.json.decode(msgspec.json.encode(other.state())))
    assert await play(resumed, cut) == await play(one, straight)
    assert resumed.state() == one.state()


def test_success_is_the_environments_figure_or_a_positive_reward() -> None:
    plainly = sample(0.5)
    told = plainly._replace(trajectory=plainly.trajectory.replace(metrics={"success": 0.0}))
    assert (plainly.success, told.success, sample(None).success, sample(-1.0).success) == (1.0, 0.0, None, 0.0)
    assert rate([sample(1.0), sample(None), sample(0.0)]) == 0.5
    assert rate([sample(None)]) is None


# --- plain, filtered, greedy ------------------------------------------------------------------------------------


async def test_plain_plays_what_the_runner_plays() -> None:
    game = Game(keyed, deals=3)
    await made(declare.Plain()).play(game.table())
    tasks = [Task(env="bandit-v0", seed=n) for n in range(3)]
    assert [episode for episode, _ in game.asked] == list(episodes(tasks, 4, seed=7))


async def test_the_filter_drops_equal_groups_and_refills() -> None:
    """[1, 1], [1, 0] -> the second is kept, and a further task is taken for the first."""
    rewards = {0: (1.0, 1.0), 1: (1.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 1.0), 4: (1.0, 1.0)}
    game = Game(lambda e: rewards[e.task.seed][e.member], deals=2)
    found = await made(declare.DynamicFilter(rounds=3), size=2).play(game.table())
    assert values(found) == [[1.0, 0.0], [0.0, 1.0]]
    assert [e.task.seed for e, _ in game.asked] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [e.group for e, _ in game.asked][::2] == ["7.0", "7.1", "7.2", "7.3"]
    short = Game(lambda e: rewards[e.task.seed][e.member], deals=3)
    assert len(await made(declare.DynamicFilter(rounds=1), size=2).play(short.table())) == 1


def test_a_failed_member_makes_no_contrast() -> None:
    assert not plain.mixed([sample(0.0), sample(None)])
    assert plain.mixed([sample(0.0), sample(None), sample(1.0)])


async def test_greedy_is_one_more_episode_at_temperature_zero() -> None:
    """Hand: 1 - .4 = .6 with the given baseline; here the figure it reads."""
    game = Game(lambda e: 0.4 if e.guidance else 1.0)
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=9)
    strategy = strategies.make(declare.Greedy(), BanditEnv(), group_size=3, sampling=sampling)
    (group,) = await strategy.play(game.table())
    assert [s.value for s in group] == [1.0] * 3
    assert [s.trajectory.metrics for s in group] == [{"greedy": 0.4}] * 3
    (greedy,) = [e for e, _ in game.asked if e.guidance]
    assert (greedy.member, greedy.guidance.sampling) == (3, Sampling(temperature=0.0, max_tokens=9))


async def test_without_its_greedy_baseline_a_group_is_left_out() -> None:
    game = Game(lambda e: FAILED if e.guidance and e.task.seed == 0 else 1.0, deals=2)
    (group,) = await made(declare.Greedy()).play(game.table())
    assert {s.trajectory.task.seed for s in group} == {1}


# --- contrast ---------------------------------------------------------------------------------------------------

R, L = [1, 1, 0.6, 0.3, 0, 0], [900, 300, 500, 800, 200, 1500]


def test_dcpo_orders_by_reward_then_length() -> None:
    assert plain.contrast(R, L, 6) == [1, 0, 2, 3, 4, 5]
    assert plain.contrast(R, L, 4) == [1, 0, 4, 5]
    assert plain.contrast(R, L, 2) == [1, 5]
    assert plain.contrast([0.5], [3], 4) == [0]


@pytest.mark.parametrize("statistics", ["full", "kept"])
async def test_dcpo_keeps_both_ends(statistics: str) -> None:
    async def play(found: Sequence[Episode], policy: Any) -> list[Sample]:
        scores = [*R, None]
        return [sample(scores[e.member], e, tokens=[*L, 1][e.member]) for e in found]

    declared = declare.Contrastive(sample=7, keep=4, statistics=statistics)  # type: ignore[arg-type]
    (group,) = await made(declared).play(Table(episodes([Task(env="x")]), play, deals=1))
    trained = [s.trajectory.episode.member for s in group if s.train and s.value is not None]
    assert trained == [0, 1, 4, 5]
    assert [s.trajectory.episode.member for s in group] == ([*range(7)] if statistics == "full" else [0, 1, 4, 5, 6])


# --- hints ------------------------------------------------------------------------------------------------------


async def test_sage_light_moves_each_tasks_level() -> None:
    """Success 0, 0, .2, .5 from level 0: after each 1, 2, 2, 1."""
    declared, level, seen = declare.HintLevels(variant="light"), 0, []
    for success in (0.0, 0.0, 0.2, 0.5):
        level = hints.next_level(level, success, declared)
        seen.append(level)
    assert seen == [1, 2, 2, 1]
    assert hints.next_level(3, 0.0, declared) == 3
    assert hints.next_level(0, 0.9, declared) == 0
    assert hints.next_level(2, None, declared) == 2


async def test_sage_light_through_updates() -> None:
    share = iter([0, 0, 1, 3])
    game = Game(lambda e: float(e.member < game.successes), tasks=[5] * 4)
    strategy = made(declare.HintLevels(variant="light", context="original"), size=5)
    levels = []
    for game.successes in share:
        await strategy.play(game.table())
        levels.append(next(iter(strategy.memory.values()), 0))
    assert levels == [1, 2, 2, 1]
    asked = [(e.labels["hint"], e.guidance.hint if e.guidance else "") for e, _ in game.asked[::5]]
    assert asked == [("0", ""), ("1", "hint 1"), ("2", "hint 2"), ("2", "hint 2")]
    assert game.asked[-1][0].guidance.context == "original"


async def test_sage_plays_a_group_without_success_again_level_by_level() -> None:
    def judge(e: Episode) -> float | None:
        level = int(e.labels["hint"])
        return {0: 0.0, 1: float(level == 2 and e.member % 4 == 0), 2: 1.0, 3: FAILED}[e.task.seed]

    game = Game(judge, deals=4)
    found = await made(declare.HintLevels(levels=3)).play(game.table())
    assert [{s.trajectory.labels["hint"] for s in g} for g in found] == [{"0"}, {"2"}, {"0"}, {"0"}]
    assert Counter((e.task.seed, e.labels["hint"]) for e, _ in game.asked) == Counter(
        {(0, "0"): 4, (0, "1"): 4, (0, "2"): 4, (0, "3"): 4}
        | {(1, "0"): 4, (1, "1"): 4, (1, "2"): 4}
        | {(2, "0"): 4, (3, "0"): 4}
    )
    assert [s.trajectory.episode.member for s in found[1]] == [8, 9, 10, 11]


async def test_kepo_takes_a_plain_episode_when_all_attempts_fail() -> None:
    game = Game(lambda e: 0.0)
    (group,) = await made(declare.HintedRejection(count=2, attempts=5), size=8).play(game.table())
    assert len(group) == 8
    assert {s.trajectory.labels["hint"] for s in group} == {"0"}
    assert game.labels("hint") == {"0": 8, "1": 10}


async def test_kepo_redraws_only_what_is_missing() -> None:
    """The first attempt of one member and the third of the other are rewarded; a failed attempt is spent."""
    outcome = {6: 1.0, 7: 0.0, 8: FAILED, 9: 0.5}
    game = Game(lambda e: outcome.get(e.member, 0.0))
    (group,) = await made(declare.HintedRejection(count=2, attempts=5), size=8).play(game.table())
    hinted = [s for s in group if s.trajectory.labels["hint"] == "1"]
    assert [(s.trajectory.episode.member, s.value) for s in hinted] == [(6, 1.0), (9, 0.5)]
    assert game.labels("hint") == {"0": 6, "1": 4}
    assert {s.trajectory.episode.guidance.context for s in hinted} == {"original"}


@pytest.mark.parametrize("declared", [declare.HintLevels(), declare.HintedRejection(count=2)], ids=lambda d: d.kind)
async def test_a_task_without_words_is_not_drawn_until_it_succeeds(declared: Any) -> None:
    class Silent(Hinting):
        def hint(self, task: Task, level: int) -> str:
            return ""

    game = Game(lambda e: float(e.member > 4))
    (group,) = await made(declared, env=Silent()).play(game.table())
    assert [s.value for s in group] == [0.0] * 4
    assert game.count == 4


# --- prefixes ---------------------------------------------------------------------------------------------------


async def test_pope_takes_the_shortest_prefix_from_which_a_probe_succeeds() -> None:
    """Successes by checkpoint 0, 0, 1, 2 -> the third."""
    game: Game

    def judge(e: Episode) -> float | None:
        if e.labels == {}:
            return 1.0  # the oracle
        reached = len(e.guidance.start) if e.guidance else 0
        return float(e.labels["guided"] != "no" and e.member % 4 < {0: 0, 2: 0, 4: 0, 6: 1, 8: 2}[reached])

    game = Game(judge, turns=10)
    declared = declare.Prefix(checkpoints=(0.2, 0.4, 0.6, 0.8), guided=0.5)
    strategy = made(declared, size=8)
    (group,) = await strategy.play(game.table())
    assert list(strategy.memory.values()) == [2]
    probed = Counter(len(e.guidance.start) for e, _ in game.asked if e.labels.get("guided") == "probe")
    assert probed == {2: 4, 4: 4, 6: 4}
    assert Counter(s.trajectory.labels["guided"] for s in group) == {"no": 4, "yes": 4}
    guided = [s.trajectory.episode.guidance for s in group if s.trajectory.labels["guided"] == "yes"]
    assert {tuple(a.text for a in g.start) for g in guided} == {tuple(f"a{i}" for i in range(6))}
    players = {e.labels.get("guided", "oracle"): policy for e, policy in game.asked}
    assert players["oracle"] is strategy.oracle
    assert players["yes"] is None


async def test_pope_without_success_anywhere_begins_at_the_first_checkpoint() -> None:
    game = Game(lambda e: float(e.labels == {}), turns=8)
    strategy = made(declare.Prefix())
    (group,) = await strategy.play(game.table())
    assert strategy.memory == {}
    assert {len(s.trajectory.episode.guidance.start) for s in group if s.trajectory.episode.guidance} == {2}


async def test_pope_leaves_alone_what_the_policy_can_do_or_the_oracle_cannot() -> None:
    able = Game(lambda e: 1.0)
    assert len((await made(declare.Prefix()).play(able.table()))[0]) == able.count == 4
    unable = Game(lambda e: 0.0, turns=8)
    (group,) = await made(declare.Prefix()).play(unable.table())
    assert {s.trajectory.labels["guided"] for s in group} == {"no"}
    assert unable.count == 4 + 1


def test_a_prefix_holds_an_action_and_leaves_one() -> None:
    assert [len(p) for p in prefix.prefixes(sample(1.0, turns=2), (0.1, 0.5, 0.9))] == [1, 1, 1]
    assert [len(p) for p in prefix.prefixes(sample(1.0, turns=8), (0.1, 0.5, 0.99))] == [1, 4, 7]
    assert prefix.prefixes(sample(1.0, turns=1), (0.5,)) == []
    assert prefix.prefixes(sample(0.0, turns=8), (0.5,)) == []


async def test_popes_members_are_compared_with_those_that_began_alike() -> None:
    """Guided 1, 0 against unguided 0, 0: what the prefix earned is nobody's advantage."""
    game = Game(
        lambda e: float(e.labels.get("guided", "probe") == "probe" or (e.member % 4 == 1 and e.member > 4)), turns=8
    )
    (group,) = await made(declare.Prefix()).play(game.table())
    terms = methods.declared(methods.load("pope")).advantage
    found = [float(a[0]) for a in advantages([(s.trajectory, s.reward) for s in group], terms)]
    assert [(s.trajectory.labels["guided"], s.value) for s in group] == [("no", 0), ("no", 0), ("yes", 1), ("yes", 0)]
    assert found == pytest.approx([0, 0, 0.707106, -0.707106], abs=1e-5)


async def test_pope_on_a_real_environment() -> None:
    """The oracle's first blue is played for the guided half, whose turns of it carry no span."""
    env = Hinting()
    red = Scripted(lambda e, a: lambda o: Action(text="red", span=TokenSpan(prompt=Ids([1]), ids=Ids([2]))))

    async def play(found: Sequence[Episode], policy: Policy | None) -> list[Sample]:
        played = await Runner(env, policy or red).collect(found)
        return [Sample(t, Composed(float(t.metrics["success"]), 0.0, ())) for t in played]

    strategy = made(declare.Prefix(checkpoints=(0.5,)), env=env)
    (group,) = await strategy.play(Table(episodes([Task(env=env.id)]), play, deals=1))
    guided = [s.trajectory for s in group if s.trajectory.labels["guided"] == "yes"]
    assert [[t.action.text for t in g.turns.items] for g in guided] == [["blue", "red"]] * 2  # type: ignore[union-attr]
    assert [[index for index, _ in g.spans] for g in guided] == [[1]] * 2


# --- forced modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "forced"), [(16, 8), (5, 2), (2, 1)])
async def test_adaptthink_forces_half_of_each_group(size: int, forced: int) -> None:
    game = Game(lambda e: 1.0, deals=3)
    found = await made(declare.ForcedMode(), size=size).play(game.table())
    for group in found:
        modes = [s.trajectory.labels["mode"] for s in group]
        assert modes == ["forced"] * forced + ["free"] * (size - forced)
        shares = {s.trajectory.episode.guidance.share for s in group[:forced]}
        assert shares == {forced / size}
        assert {s.trajectory.episode.guidance.begin for s in group[:forced]} == {"</think>"}
        assert not any(s.trajectory.episode.guidance for s in group[forced:])
        assert not any(s.trajectory.metrics for s in group)


async def test_adaptthink_has_the_initial_policy_play_each_task_once() -> None:
    def judge(e: Episode) -> float | None:
        if e.labels["mode"] != "reference":
            return 1.0
        return (
            {3: FAILED, 4: FAILED}.get(e.task.seed, float(e.member < 3))
            if e.member
            else 1.0 * (e.task.seed < 3) or None
        )

    game = Game(judge, tasks=[1, 2, 3, 1, 2, 3], deals=3)
    strategy = made(declare.ForcedMode(reference=4))
    first = await strategy.play(game.table(reference="frozen"))
    assert [[s.trajectory.metrics for s in g] for g in first] == [[{"reference": 0.75}] * 4] * 2
    assert Counter(policy for e, policy in game.asked if e.labels["mode"] == "reference") == {"frozen": 12}
    await strategy.play(game.table(reference="frozen"))
    assert game.labels("mode")["reference"] == 12 + 4  # only the task that has none yet


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        (declare.HintLevels(), "strategy 'hint_levels' needs the capability 'hints'; bandit-v0 claims ladder"),
        (declare.HintedRejection(), "needs the capability 'hints'"),
        (declare.Contrastive(sample=4, keep=3), "even number up to strategy.sample"),
        (declare.Contrastive(sample=4, keep=6), "keep = 6, sample = 4"),
        (declare.DynamicFilter(rounds=0), "rounds is at least 1"),
        (declare.Prefix(checkpoints=(0.5, 0.2)), "rising shares between 0 and 1"),
        (declare.Prefix(guided=0.1), "guides 0 members"),
        (declare.Prefix(guided=math.nan), "guides 0 members"),
        (declare.Prefix(checkpoints=(math.nan,)), "rising shares between 0 and 1"),
        (declare.ForcedMode(share=0.1), "forces 0 members"),
        (declare.ForcedMode(share=math.nan), "forces 0 members"),
        (declare.ForcedMode(begin=""), "with a text"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_run_is_built(declared: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        strategies.make(declared, BanditEnv(), group_size=4)


def test_more_refusals() -> None:
    class Bare(BanditEnv):
        capabilities = frozenset()

    with pytest.raises(ConfigError, match="strategy 'prefix' needs the capability 'ladder'; bandit-v0 claims none"):
        made(declare.Prefix(), env=Bare())
    with pytest.raises(UnknownName, match="no rung of the ladder of bandit-v0 'orakle'; did you mean 'oracle'"):
        made(declare.Prefix(oracle="orakle"))
    with pytest.raises(ConfigError, match=r"count is 1 to rollout\.group_size = 1"):
        made(declare.HintedRejection(), size=1)
    with pytest.raises(ConfigError, match="group_size >= 2"):
        made(declare.DynamicFilter(), size=1)
    with pytest.raises(ConfigError, match="0 <= low <= high <= 1"):
        made(declare.HintLevels(low=0.5, high=0.1))
    assert strategies.needs_reference(declare.ForcedMode(reference=1))
    assert not any(strategies.needs_reference(d) for d in (declare.ForcedMode(), declare.Plain()))


def test_deals_count_their_members() -> None:
    deal = base.Deal(Episode(task=Task(env="x"), seed=3, group="g"))
    assert [e.member for e in (*deal.episodes(2), *deal.episodes(1), *deal.episodes(0), *deal.episodes(2))] == [
        *range(5)
    ]
