"""What this room holds, as static metadata: reading it imports no torch."""

import tomllib
from pathlib import Path

from agentgym.registry import Spec

HERE = Path(__file__).parent

TRAINERS = [
    Spec(
        id="policy-gradient",
        target="agentgym_trainers.loop:PolicyGradient",
        summary="supervised warm start, then clipped policy gradient with turn-level credit",
        extra="train",
        requires=("torch", "transformers", "tokenizers", "safetensors"),
    ),
]

BENCHES = [
    Spec(
        id="objectives",
        target="agentgym_trainers.bench:objectives",
        summary="loss and advantages of every method: time per million tokens, beside plain GRPO and TRL's loss",
        extra="train",
        requires=("torch",),
    ),
    Spec(
        id="async",
        target="agentgym_trainers.overlap:overlap",
        summary="asynchronous training on simulated parts, beside its discrete-event bound and the synchronous loop",
        extra="train",
        requires=("torch",),
    ),
    Spec(
        id="learner",
        target="agentgym_trainers.bench_learner:learner",
        summary="an update on packed sequences beside TRL's GRPO trainer: tokens/s, utilisation, peak memory",
        extra="train",
        requires=("torch", "transformers", "tokenizers"),
    ),
]

COMMANDS = [
    Spec(
        id="objectives",
        target="agentgym_trainers.methods.command:add",
        summary="methods of the literature: what there is, what one is, what enumeration says of it",
    ),
]


def OBJECTIVES() -> list[Spec]:  # noqa: N802 - the name of a catalogue
    """Every methods/*.toml by its name."""
    return [Spec(id=f.stem, target=str(f), summary=_title(f)) for f in sorted(HERE.glob("methods/*.toml"))]


def _title(path: Path) -> str:
    return str(tomllib.loads(path.read_text(encoding="utf-8"))["about"]["title"])
