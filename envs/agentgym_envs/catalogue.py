"""What this room holds, as static metadata: reading it imports no environment."""

from pathlib import Path

from agentgym.registry import Spec

HERE = Path(__file__).parent

ENVIRONMENTS = [
    Spec(
        id="shopping-v0",
        target="agentgym_envs.shopping.env:ShoppingEnv",
        summary="conversational shopping: find out what the user wants, search, recommend",
    ),
]

BENCHES = [
    Spec(
        id="shopping",
        target="agentgym_envs.shopping.bench:shopping",
        summary="shopping-v0 on 20k products: reset, step, search, memory",
    ),
]


def PRESETS() -> list[Spec]:  # noqa: N802 - the name of a catalogue
    """Every presets/*.toml of every environment's folder, as `<folder>/<name>`."""
    files = sorted(HERE.glob("*/presets/*.toml"))
    return [Spec(id=f"{f.parent.parent.name}/{f.stem}", target=str(f), summary=_summary(f)) for f in files]


def _summary(path: Path) -> str:
    """The first line of the file, when it is a comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
