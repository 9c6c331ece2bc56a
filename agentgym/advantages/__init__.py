"""Composed rewards become advantages: one number per turn, a sum of declared terms.

declare     a term and its axes; what cannot be meant is refused
table       the records of a step as columns
estimate    the sum of the terms
units       what a term compares, and with whom
scores      what it scores
compare     centred, transformed, scaled; bundles
groups      statistics of groups
transforms  ranks, quantiles, the best alone; what is remembered between steps
gae         discounted sums and generalised advantages over packed sequences

docs/credit.md says which of them are unbiased, and why.
"""

from agentgym.advantages.declare import Best, PassAtK, RankNormal, Risk, Term, Transform
from agentgym.advantages.estimate import advantages, critic_targets, to_tokens
from agentgym.advantages.gae import gae, returns
from agentgym.advantages.transforms import AdvantageState

__all__ = [
    "AdvantageState",
    "Best",
    "PassAtK",
    "RankNormal",
    "Risk",
    "Term",
    "Transform",
    "advantages",
    "critic_targets",
    "gae",
    "returns",
    "to_tokens",
]
