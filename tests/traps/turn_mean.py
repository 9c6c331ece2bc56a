"""A trap: credit from each turn on, against the mean of the same turn index over whoever is still there."""

import numpy as np

from agentgym.rewards import by_turn

composition = {
    "objective": {"ratio": {"kind": "none"}, "gate": {"kind": "none"}, "aggregation": {"kind": "seq_mean_token_sum"}}
}


def advantages(samples):
    ahead = [np.cumsum(by_turn(composed, trajectory)[::-1])[::-1] for trajectory, composed in samples]
    longest = max(map(len, ahead))
    means = [np.mean([x[k] for x in ahead if len(x) > k]) for k in range(longest)]
    return [x - means[: len(x)] for x in ahead]
