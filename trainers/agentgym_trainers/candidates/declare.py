"""What learning from candidates is declared with. No torch here.

[candidates]
candidates = 5
threshold = 0.9
"""

from __future__ import annotations

import math

from agentgym.errors import ConfigError
from agentgym_trainers.objective.declare import Kind


class InTRO(Kind, frozen=True, kw_only=True, tag="intro"):
    """InTRO (2511.09865); `learner` has the formula.

    candidates  n, with the sampled token
    cap         the largest weight
    threshold   rewards from here on are correct
    """

    candidates: int = 5
    cap: float = 200.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.candidates < 1 or not 0 < self.cap < math.inf or not math.isfinite(self.threshold):
            raise ConfigError(f"candidates are at least 1, cap is positive and threshold finite; got {self}")
