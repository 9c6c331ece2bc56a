"""Learning from candidates: a loss with an axis of its own, weighed by what the policy says when it knows the answer.

declare  the options, as a table                                     (no torch)
learner  from correct rollouts and their tasks' answers to moved weights
"""

from agentgym_trainers.candidates.declare import InTRO

__all__ = ["InTRO"]
