"""A rank of a run: `python crewed.py OUT SECTIONS` trains a toy, with sections (JSON) laid over its table, among those
that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name. Says each step; prints an error as the command does."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from toys import register, table

from agentgym.errors import AgentGymError
from agentgym_trainers.config import Config, from_table
from agentgym_trainers.loop import PolicyGradient


def progress(phase: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    print(phase, done, flush=True)


def config(sections: Mapping[str, Any]) -> Config:
    register()
    laid = {name: section for name, section in sections.items() if isinstance(section, dict)}
    return from_table({**sections, **table(**laid)})


def main(out: str, sections: str) -> int:
    try:
        summary = PolicyGradient.train(config(json.loads(sections)), out, progress=progress)
    except AgentGymError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print("success", summary.after["success"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
