"""Bias, variance and hackability of a method, exactly, on worlds that can be listed; and the traps it walks into.

    certificate = run("grpo")             # or a .toml file, or a .py file (see composition.py)
    print(report(certificate))

What is certified is one optimiser step at the policy that played (in "stale": at one a little newer). What comes after
it in an update, when ratios have moved, is not. Numbers are those of the smallest groups that show an effect; most
shrink as groups and batches grow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from agentgym.errors import AgentGymError, ConfigError
from agentgym_trainers.exact.composition import Composition, load
from agentgym_trainers.exact.estimate import Lab
from agentgym_trainers.exact.flow import Flow, flows
from agentgym_trainers.exact.measures import MEMBERS, Bias, Spread, scatter, worst
from agentgym_trainers.exact.traps import TRAPS, Finding, Status
from agentgym_trainers.exact.worlds import WORLDS


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the method walks into one trap; `number` is what the sentence speaks of."""

    trap: str
    status: Status
    number: float
    sentence: str


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured. `refused`: why a run refuses the declaration (it was measured all the same); `outside`:
    why nothing could be measured; `gaps`: what of the method was not; `asides`: what was left out as another goal."""

    name: str
    refused: str = ""
    outside: str = ""
    gaps: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    bias: tuple[Bias, ...] = ()
    spread: tuple[Spread, ...] = ()
    flows: tuple[Flow, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    seconds: float = 0.0

    @property
    def caught(self) -> tuple[Verdict, ...]:
        """The traps that it walks into."""
        return tuple(v for v in self.verdicts if v.status == "caught")

    @property
    def hackable(self) -> bool:
        """Whether following its expected step raised the declared return and lowered the true one."""
        return any(flow.hacked for flow in self.flows)


def run(name: str | Path) -> Certificate:
    """Certify a method by its name, or a .toml or .py file."""
    return certify(load(name))


def certify(source: Composition | Mapping[str, Any]) -> Certificate:
    """Push every group of every world through the composition, and judge."""
    began = time.perf_counter()
    c = source if isinstance(source, Composition) else load(source)
    try:
        found = _outside(c, c.outside) if c.outside else _measured(c)
    except Exception as error:
        if not c.refused:
            raise _broken(c, error) from error
        found = _outside(c, f"past the rule that refuses it nothing can be computed ({error})")
    return msgspec.structs.replace(found, seconds=round(time.perf_counter() - began, 3))


def _broken(c: Composition, error: Exception) -> AgentGymError:
    """The gym's own errors as they are; another one is a function of the composition's."""
    if isinstance(error, AgentGymError):
        return error
    return ConfigError(f"{c.name} broke while it was measured: {type(error).__name__}: {error}")


def _outside(c: Composition, why: str) -> Certificate:
    nothing = tuple(_verdict(trap, ("not certified", float("nan"), f"Not measured: {why}.")) for trap in TRAPS)
    return Certificate(name=c.name, refused=c.refused, outside=why, verdicts=nothing)


def _measured(c: Composition) -> Certificate:
    labs = {mdp.name: Lab(c, mdp, members=MEMBERS[mdp.name]) for mdp in WORLDS.values()}
    gaps = (*c.gaps, *dict.fromkeys(note for lab in labs.values() for note in lab.pipeline.notes))
    whole = not (gaps or c.refused)
    paying = [lab for lab in labs.values() if lab.pipeline.varied]
    if not paying:
        return _outside(c, "its reward is the same for every episode, so it imitates and estimates no gradient")
    return Certificate(
        name=c.name,
        refused=c.refused,
        gaps=gaps,
        asides=c.asides,
        bias=tuple(worst(lab) for lab in paying),
        spread=tuple(scatter(lab) for lab in paying),
        flows=flows(c),
        verdicts=tuple(_verdict(trap, _hedged(judge(c), whole)) for trap, judge in TRAPS.items()),
    )


def _verdict(trap: str, found: Finding) -> Verdict:
    status, number, sentence = found
    return Verdict(trap=trap, status=status, number=number, sentence=sentence)


def _hedged(found: Finding, whole: bool) -> Finding:
    """What was measured in part, or cannot be run, is not called clean."""
    status, number, sentence = found
    if status == "clean" and not whole:
        return "not certified", number, f"In what could be measured: {sentence}"
    return found


# --- as text ----------------------------------------------------------------------------------------------------


def report(c: Certificate) -> str:
    """The certificate as text, for a terminal."""
    lines = [f"{c.name}: {_summary(c)} ({c.seconds:.1f} s)"]
    lines += [f"  refused when loaded: {c.refused}"] if c.refused else []
    lines += [f"  not measured: {gap}" for gap in ((c.outside,) if c.outside else c.gaps)]
    lines += [f"  note: {aside}" for aside in c.asides]
    lines += ["", "traps"] + [f"  {v.status:<14}{v.trap:<24}{v.sentence}" for v in c.verdicts]
    if c.bias:
        lines += ["", "world      bias     angle   turns                  prompts          variance   signal"]
        lines += [_row(b, s) for b, s in zip(c.bias, c.spread, strict=True)]
        lines += ["", "followed to the end (truth, declared return: before -> after)"] + [_led(f) for f in c.flows]
    return "\n".join(lines)


def _summary(c: Certificate) -> str:
    if c.outside:
        return "not certifiable"
    found = f"caught in {', '.join(v.trap for v in c.caught)}" if c.caught else "no trap found"
    return f"refused; {found}" if c.refused else f"{found}, in part" if c.gaps else found


def _row(b: Bias, s: Spread) -> str:
    turns, prompts = (" ".join(f"{x:.2f}" for x in found) for found in (b.turns, b.prompts))
    return f"{b.world:<10} {b.relative:<8.2g} {b.angle:<7.3g} {turns:<22} {prompts:<16} {s.trace:<10.3g} {s.signal:.3g}"


def _led(f: Flow) -> str:
    told = f"truth {f.truth[0]:.3f} -> {f.truth[1]:.3f}, declared {f.goal[0]:.3f} -> {f.goal[1]:.3f}"
    return f"  from {f.start:<16}{told}, regret {f.regret:.3f}{', HACKED' if f.hacked else ''}"
