"""A rank of a learner: `python ranked.py RANK RANKS FOLDER` takes three updates of every case on its own share of the
trajectories and leaves weights, figures and controllers in FOLDER/RANK.pt. One rank alone is the plain learner."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from learning import CREDIT, EPISODES, REWARDS, Bare, weights

from agentgym.errors import RecordError
from agentgym_trainers.controllers import numbers
from agentgym_trainers.critic import Critic, CriticConfig
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.declare import Objective

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


def share_of(name: str, rank: int, ranks: int) -> list[int]:
    """The trajectories of a rank: every other one, so that groups lie across ranks; or all with the first."""
    everything = list(range(len(EPISODES)))
    if "nothing" in name:
        return everything if rank == 0 else []
    return everything[rank::ranks]


def learn(name: str, rank: int, ranks: int) -> dict[str, Any]:
    optim = Optim(lr=0.02, warmup=0, micro_tokens=40)
    models = {"reference": Bare(3, dtype=torch.float64).module()}
    learner = Learner(Bare(dtype=torch.float64), CASES[name], optim, total_steps=3, **models)
    mine = share_of(name, rank, ranks)
    parts = [[held[i] for i in mine] for held in (EPISODES, CREDIT, REWARDS)]
    figures = [learner.update(*parts) for _ in range(3)]
    return {"weights": weights(learner), "figures": figures, "numbers": numbers(learner.objective)}


def valued(rank: int, ranks: int) -> dict[str, Any]:
    """The critic's side of an update."""
    mine = share_of("critic", rank, ranks)
    critic = Critic(Bare(dtype=torch.float64), CriticConfig(), micro_tokens=40)
    states = critic.read([EPISODES[i] for i in mine])
    figures = critic.update(states, [CREDIT[i] for i in mine])
    return {"weights": torch.cat([p.detach().flatten() for p in critic.parameters]), "figures": figures}


def refused(rank: int) -> str:
    """An advantage that is not finite, on the last rank alone."""
    learner = Learner(Bare(), Objective(), Optim(), total_steps=1)
    try:
        learner.update(EPISODES[:2], [np.full(len(t.turns), np.nan if rank else 1.0) for t in EPISODES[:2]])
    except RecordError as error:
        return str(error)
    return ""


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    found: dict[str, Any] = {name: learn(name, rank, ranks) for name in CASES}
    torch.save({**found, "critic": valued(rank, ranks), "refused": refused(rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
