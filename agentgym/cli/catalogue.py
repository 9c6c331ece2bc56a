"""`agentgym list`, `bench` and `completion`: what there is."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from agentgym import presets, registry
from agentgym.cli.output import emit, err, out, table

LISTED = ("envs", "presets", "policies", "trainers", "objectives", "sandboxes", "benches", "commands")


def run_list(options: Namespace) -> None:
    """Every catalogue that holds something; nothing is imported to print it."""
    found = {kind: registry.catalogue(kind) for kind in LISTED}
    if options.json:
        return emit({kind: [_line(spec) for spec in specs.values()] for kind, specs in found.items()})
    for kind, specs in found.items():
        if specs:
            rows = [(spec.id, spec.summary, f"[{spec.extra}]" if spec.extra else "") for spec in specs.values()]
            out().print(table(kind, ("id", "what", "extra"), rows), "", markup=False)
    return None


def _line(spec: registry.Spec) -> dict[str, str]:
    return {"id": spec.id, "summary": spec.summary, "extra": spec.extra}


def run_bench(options: Namespace) -> None:
    """A benchmark is a function from keyword settings to a mapping of figures (or of rows of figures)."""
    if options.name is None:
        rows = [(spec.id, spec.summary) for spec in registry.catalogue("benches").values()]
        return out().print(table("benches", ("id", "what"), rows))
    bench = registry.load(options.name, "benches")
    settings = presets.parse_settings(options.settings)
    registry.check_keywords(f"setting of the benchmark {options.name!r}", bench, settings)
    err().print(f"measuring {options.name} ...", style="dim", markup=False)
    figures = bench(**settings)
    return emit(figures) if options.json else _print_figures(options.name, figures)


def _print_figures(name: str, figures: Mapping[str, Any]) -> None:
    plain = {key: value for key, value in figures.items() if not isinstance(value, list | dict)}
    out().print(table(name, ("figure", "value"), plain.items()), "")
    for key, value in figures.items():
        if isinstance(value, dict):
            out().print(table(key, ("figure", "value"), value.items()), "")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            out().print(table(key, list(value[0]), [list(row.values()) for row in value]), "")


def run_completion(options: Namespace) -> None:
    """The script for `eval "$(agentgym completion bash)"`."""
    import shtab

    from agentgym.cli.arguments import parser

    sys.stdout.write(shtab.complete(parser(), options.shell) + "\n")
    if sys.stdout.isatty():
        err().print(f'put this into your shell: eval "$(agentgym completion {options.shell})"', markup=False)
