"""`check_env`: what every environment must hold, and what it claims to hold."""

from __future__ import annotations

from agentgym.env import Environment
from agentgym.registry import make
from agentgym.testing import capabilities, determinism, robustness, rules
from agentgym.testing.report import CheckReport, Item, run_checks
from agentgym.testing.subject import Settings, Subject

SAME = ("runs", "same_seed")
ITEMS = (
    Item("runs", rules.runs),
    Item("tasks", determinism.tasks),
    Item("records", rules.records, ("runs",)),
    Item("attribution", rules.attribution, ("runs",)),
    Item("same_seed", determinism.same_seed, ("runs",)),
    Item("different_seeds", determinism.different_seeds, SAME),
    Item("concurrency", determinism.concurrency, (*SAME, "attribution")),
    Item("two_processes", determinism.two_processes, SAME),
    Item("legal_actions", rules.legal_actions, ("runs",)),
    Item("random_actions", robustness.random_actions, ("records",)),
    Item("garbage_actions", robustness.garbage_actions, ("records",)),
    Item("injection", robustness.injection, ("garbage_actions",)),
    Item("after_end", robustness.after_end, ("runs",)),
    Item("close", robustness.close, ("runs",)),
    Item("memory", robustness.memory, ("garbage_actions", "close")),
    Item("replay", capabilities.replay, (*SAME, "records")),
    Item("fork", capabilities.fork, (*SAME, "concurrency")),
    Item("ladder", capabilities.ladder, ("attribution",)),
    Item("hidden_twin", capabilities.hidden_twin, SAME),
    Item("hints", capabilities.hints),
    Item("answer", capabilities.answer),
)


def check_env(
    env: Environment | str,
    *,
    episodes: int = 8,
    seed: int = 0,
    processes: bool = True,
    seconds: float = 30.0,
    patience: float = 5.0,
    steps: int = 64,
) -> CheckReport:
    """Test an environment (or the one of this id, with its defaults) against the contract of `Environment`.

    `episodes` tasks of split "train" are played where a check compares episodes, each for at most `steps` steps.
    `patience` is the deadline in seconds of every reset, step and close, `seconds` the one of a whole check.
    `processes=False` leaves out the comparison with fresh processes, which costs two interpreter starts.
    The same arguments run the same actions. May be called from inside a running event loop (it blocks it).
    """
    built = make(env) if isinstance(env, str) else env
    settings = Settings(
        episodes=episodes, seed=seed, processes=processes, seconds=seconds, patience=patience, steps=steps
    )
    subject = Subject(built, settings)
    return run_checks(subject.name, subject, ITEMS, seconds)
