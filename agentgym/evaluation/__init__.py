"""How good is a policy? Play it (`evaluate`), or judge it by what another one logged (`estimate`).

playing      figures of episodes played for the purpose, with their uncertainty
off_policy   importance sampling and its relatives on logged trajectories
"""

from agentgym.evaluation.off_policy import Estimate, Logged, effective, estimate, logged, weights
from agentgym.evaluation.playing import Evaluation, Part, evaluate, interval, standard_error, summarise

__all__ = [
    "Estimate",
    "Evaluation",
    "Logged",
    "Part",
    "effective",
    "estimate",
    "evaluate",
    "interval",
    "logged",
    "standard_error",
    "summarise",
    "weights",
]
