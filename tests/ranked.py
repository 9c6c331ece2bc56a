"""A rank of a learner: `python ranked.py RANK RANKS FOLDER` takes two updates of every case, whole and in shards, and
leaves weights, figures and controllers in FOLDER/RANK.pt. One rank alone is the plain learner."""

from __future__ import annotations

import sys
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learning import CREDIT, EPISODES, REWARDS, Bare, weights

from agentgym.errors import RecordError
from agentgym.rewards import Composed
from agentgym.types import Batch
from agentgym_trainers import ranks as exchange
from agentgym_trainers.candidates.declare import InTRO
from agentgym_trainers.candidates.learner import CandidateLearner
from agentgym_trainers.controllers import numbers
from agentgym_trainers.critic import Critic, CriticConfig
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.preference import Pair, Preference
from agentgym_trainers.preference.learner import PairLearner
from agentgym_trainers.sharding import full_weights, local, whole

DUAL = declare.Dual(of="gate.coef", watch="ratio_variance", target=0.001, lr=2.0)
CASES = {
    "plain": Objective(regularisers=(declare.Kl(coef=0.1), declare.Perception(coef=0.1))),
    "controlled": Objective(
        gate=declare.Quadratic(), controllers=(DUAL,), aggregation=declare.Segments(weights={"control": 0.2})
    ),
    "BAPO": Objective(gate=declare.Clip(adaptive=declare.Adaptive())),
    "FiberPO-Domain": Objective(
        ratio=declare.Levels(levels=("domain", "prompt", "trajectory", "token")),
        gate=declare.LevelsClip(budgets=(0.02, 0.03, 0.05, 0.1)),
        aggregation=declare.SeqMeanTokenMean(),
    ),
    "one rank has nothing": Objective(source=declare.Layer(layer=1, steps=2), proximal="learner"),
    "coupled, one rank has nothing": Objective(ratio=declare.Mix(by="entropy"), gate=declare.BranchClip()),
}


OPTIM = Optim(lr=0.02, warmup=0, micro_tokens=60, minibatches=2)
SHARDED = ("plain", "FiberPO-Domain", "one rank has nothing", "coupled, one rank has nothing")


def given(name: str) -> list[Any]:
    """Trajectories, advantages, rewards: of one episode where a rank is to have nothing."""
    count = 1 if "nothing" in name else len(EPISODES)
    return [held[:count] for held in (EPISODES, CREDIT, REWARDS)]


def make(name: str, optim: Optim = OPTIM, *, dtype: torch.dtype = torch.float64, **more: Any) -> Learner:
    models = {"reference": Bare(3, dtype=dtype).module()}
    return Learner(Bare(dtype=dtype), CASES[name], optim, total_steps=6, **models, **more)


def learn(name: str, optim: Optim = OPTIM, **more: Any) -> dict[str, Any]:
    learner = make(name, optim, **more)
    figures = [learner.update(*given(name)) for _ in range(2)]
    return {"weights": weights(learner), "figures": figures, "numbers": numbers(learner.objective)}


PAIRS = [Pair(a, b, 1.0, (0.8, 0.3)) for i in (0, 3) for a, b in combinations(EPISODES[i : i + 3], 2)]
RIGHT: list[Any] = [(t, Composed(1.0, 0.0, ())) for t in EPISODES]


def family(name: str) -> dict[str, Any]:
    """Learners of the other families, over six pairs and nine rollouts, or over one."""
    optim, given = Optim(lr=0.02, warmup=0, micro_tokens=52), slice(0, 1 if "one" in name else None)
    shared: dict[str, Any] = {"total_steps": 2}
    if "pair" in name:
        reference = Bare(1, dtype=torch.float64).module()
        pairs = PairLearner(Bare(dtype=torch.float64), Preference(), optim, reference=reference, **shared)
        figures = [pairs.update(PAIRS[given]) for _ in range(2)]
        return {"weights": weights(pairs.learner), "figures": figures, "numbers": {}}
    answers = CandidateLearner(Bare(dtype=torch.float64), InTRO(), optim, answer=lambda t: [1, 2], **shared)
    figures = [answers.update(RIGHT[given]) for _ in range(2)]
    return {"weights": weights(answers.learner), "figures": figures, "numbers": {}}


FAMILIES = ("pairs", "one pair", "candidates", "one rollout")


def valued() -> dict[str, Any]:
    """The critic's side of an update."""
    critic = Critic(Bare(dtype=torch.float64), CriticConfig(), micro_tokens=40)
    states = critic.read(EPISODES)
    figures = critic.update(states, CREDIT)
    parameters = torch.cat([p.detach().flatten() for p in critic.parameters])
    return {"weights": parameters, "figures": figures, "values": states.per_turn}


def compared() -> list[Any]:
    """Log-ratios to another model."""
    return make("plain").log_ratios(EPISODES, Bare(3, dtype=torch.float64).module())


IN_SHARDS = Optim(lr=0.02, warmup=0, micro_tokens=60, minibatches=2, sharded=True)


def in_shards() -> dict[str, Any]:
    """What shards come to: every case, how much of the weights is here, and a learner that was interrupted."""
    learner = make("plain", IN_SHARDS, remember=1)
    held = sum(local(p).numel() for p in learner.parameters) / sum(p.numel() for p in learner.parameters)
    for version in range(2):
        learner.update(*given("plain"), version=version)
    moments = [local(x).numel() for state in learner.optimiser.state.values() for x in state.values() if x.ndim]
    tensors, plain = learner.state()
    later = make("plain", IN_SHARDS, remember=1)
    for p, q in zip(later.parameters, learner.parameters, strict=True):
        local(p.data).copy_(local(q.data))
    later.restore({name: x.clone() for name, x in tensors.items()}, plain)
    figures = [each.update(*given("plain"), version=2) for each in (learner, later)]
    kept = full_weights(learner.trainable.module())
    return {
        **{name: learn(name, IN_SHARDS) for name in SHARDED},
        "half": learn("plain", IN_SHARDS, dtype=torch.bfloat16),
        "held": held,
        "moments": sum(moments) / (2 * sum(p.numel() for p in learner.parameters)),
        "resumed": [weights(learner), weights(later)],
        "figures": figures,
        "names": sorted(kept),
        "state": {name: whole(x).shape for name, x in tensors.items()},
    }


class Failing(Bare):
    """Cannot collate on the last rank."""

    def collate(self, *given: Any, **more: Any) -> list[Batch]:
        if exchange.rank() == exchange.count() - 1:
            raise RecordError("a span does not add up")
        return super().collate(*given, **more)


def failed() -> str:
    """What a rank says of one that failed, while it waits for it."""
    try:
        with exchange.together():
            Learner(Failing(), Objective(), Optim(), total_steps=1).update(EPISODES, CREDIT)
    except (RecordError, exchange.RankError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {name: learn(name) for name in CASES} | {name: family(name) for name in FAMILIES}
    more = {"critic": valued(), "ratios": compared(), "shards": in_shards(), "failed": failed()}
    torch.save({**found, **more}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
