"""Learning from preferences: a small family beside the objectives, sharing their batches, log-probs and optimiser.

declare      the losses and the ways to make pairs, as tables       (no torch)
pairs        pairs of trajectories out of groups of samples         (no torch)
losses       (declaration, sums of log-probs) -> loss of each pair
learner      from pairs to moved weights
diagnostics  what a preference says of two distributions            (no torch)
"""

from agentgym_trainers.preference.declare import Preference
from agentgym_trainers.preference.pairs import Pair, Pairs, build

__all__ = ["Pair", "Pairs", "Preference", "build"]
