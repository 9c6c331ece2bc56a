"""Reward models that fit on a laptop: texts go in, scores come out, and each is a judge of trajectories.

raters = ensemble(tokenizer, members=4)                  # rm.0 .. rm.3, for wco and uwo (2310.02743)
raters.fit(Pairs(chosen, rejected))                      # Bradley-Terry on texts
loved = feedback(tokenizer)                              # love = P[Love] from reactions (2505.14946)
several = heads(tokenizer, ("safe", "helpful"))          # regression on labels, some of them missing (2503.21819)
alike = against(tokenizer, lambda t: t.task.payload["reference"])    # conditioned on a reference (2507.05197)

played = await judged(raters, trajectories)              # agentgym.rewards.judges
raters.save("raters"); raters = RewardModel.load("raters")
"""

from agentgym_trainers.reward_models.examples import Pairs, Ratings, Reactions
from agentgym_trainers.reward_models.figures import Calibration, accuracy, calibration
from agentgym_trainers.reward_models.model import (
    Backbone,
    RewardModel,
    Training,
    against,
    ensemble,
    feedback,
    heads,
    joined,
    judge,
)

__all__ = [
    "Backbone",
    "Calibration",
    "Pairs",
    "Ratings",
    "Reactions",
    "RewardModel",
    "Training",
    "accuracy",
    "against",
    "calibration",
    "ensemble",
    "feedback",
    "heads",
    "joined",
    "judge",
]
