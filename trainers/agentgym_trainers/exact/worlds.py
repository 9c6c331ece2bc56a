"""The worlds: each as small as the effect it shows allows."""

from __future__ import annotations

from agentgym_trainers.exact.mdp import MDP, TRUTH, Move

STOPPING = MDP(
    name="stopping",
    about="The policy decides when to stop, so late turns exist in long trajectories only. Returns are 0 or 1.",
    prompts=("one",),
    moves={
        "one": {"stop": Move(pay={TRUTH: 0.0}), "go": Move("two")},
        "two": {"stop": Move(pay={TRUTH: 1.0}), "go": Move("three")},
        "three": {"stop": Move(pay={TRUTH: 0.0}), "go": Move(pay={TRUTH: 1.0})},
    },
)
SCALES = MDP(
    name="scales",
    about="Two prompts of one turn; the rewards of the second are ten times those of the first.",
    prompts=("small", "large"),
    moves={
        "small": {a: Move(pay={TRUTH: 0.1 * x}) for a, x in (("low", 0.0), ("middle", 0.6), ("high", 1.0))},
        "large": {a: Move(pay={TRUTH: x}) for a, x in (("low", 1.0), ("middle", 0.6), ("high", 0.0))},
    },
)
TOOL = MDP(
    name="tool",
    about="A tool is worth one call. Each call also pays a small bonus, the proxy; truth and proxy have one optimum.",
    prompts=("asked",),
    moves={
        "asked": {"answer": Move(pay={TRUTH: 0.5}), "call": Move("told", {"tool": 1.0})},
        "told": {"answer": Move(pay={TRUTH: 1.0}), "call": Move("again", {"tool": 1.0})},
        "again": {"answer": Move(pay={TRUTH: 0.8}), "call": Move(pay={"tool": 1.0, TRUTH: 0.0})},
    },
    reward={
        "op": "weighted_sum",
        "plus": [
            {"op": "term", "name": TRUTH, "default": 0.0},
            {"op": "scale", "factor": 0.05, "of": {"op": "term", "name": "tool", "default": 0.0}},
        ],
    },
)
FAULTY = MDP(
    name="faulty",
    about="The best action leads to where the environment breaks half of the time, through no fault of the policy.",
    prompts=("shop",),
    moves={
        "shop": {
            "safe": Move(pay={TRUTH: 0.6}),
            "risky": Move("desk"),
            "idle": Move(pay={TRUTH: 0.5}),
        },
        "desk": {"take": Move(pay={TRUTH: 1.0}, fault=0.5)},
    },
)
STALE = MDP(
    name="stale",
    about="One turn, three actions; the sampler is a little older than the learner.",
    prompts=("now",),
    moves={"now": {"low": Move(pay={TRUTH: 0.0}), "middle": Move(pay={TRUTH: 0.6}), "high": Move(pay={TRUTH: 1.0})}},
)
LESSON = MDP(
    name="lesson",
    about="Two tasks of different scale, to be learnt: asking once is right for one, twice for the other.",
    prompts=("small", "large"),
    moves={
        "small": {"answer": Move(pay={TRUTH: 0.05}), "ask": Move("told")},
        "told": {"answer": Move(pay={TRUTH: 0.1}), "ask": Move(pay={TRUTH: 0.0})},
        "large": {"answer": Move(pay={TRUTH: 0.4}), "ask": Move("hint")},
        "hint": {"answer": Move(pay={TRUTH: 0.3}), "ask": Move("clear")},
        "clear": {"answer": Move(pay={TRUTH: 1.0}), "ask": Move(pay={TRUTH: 0.0})},
    },
)
"""Not one to certify in: what docs/results/objectives.md trains on."""
WORLDS = {mdp.name: mdp for mdp in (STOPPING, SCALES, TOOL, FAULTY, STALE)}
