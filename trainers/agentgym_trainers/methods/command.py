"""`agentgym objectives`: what there is, what a method is, and what enumeration says of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import tomli_w

from agentgym.cli import NO, OK
from agentgym.cli.output import emit, err, out, table

OWN_FAMILY = ("judge", "preference", "candidates", "optim")
"""Sections that are only shown where a method sets them."""

WIDE = 120
"""Columns from which the list says how methods differ; `show` says it always."""


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommand; see `agentgym.cli.arguments`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/objectives.md")
    parser.set_defaults(run=run_list)
    verbs = parser.add_subparsers(metavar="show|certify", dest="verb")
    for name, (summary, run) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.add_argument("method", metavar="NAME|FILE", help="a method of `agentgym objectives`, or a TOML file")
        for flag in ("--json", "--debug"):
            verb.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        verb.set_defaults(run=run)


def run_list(options: argparse.Namespace) -> None:
    """Every method of the catalogue, and the axes on which it is unlike the defaults."""
    from agentgym_trainers.methods.describe import markdown, rows

    if options.markdown:
        return print(markdown(), end="")
    found = rows()
    if options.json:
        return emit({"objectives": found})
    columns = ("name", "badge", "paper", "what", "differs from the defaults in")
    shown = len(columns) if out().width >= WIDE else len(columns) - 1
    return out().print(table("", columns[:shown], [_line(row)[:shown] for row in found]), markup=False)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    unlike = "; ".join(f"{axis}: {choice}" for axis, choice in row["axes"].items())
    return row["name"], row["badge"], row["paper"], row["title"], unlike


def run_show(options: argparse.Namespace) -> None:
    """One method: its axes, its formula, and what backs it."""
    from agentgym_trainers.methods import declared, load
    from agentgym_trainers.methods.describe import axes, differing

    method = load(options.method)
    whole, unlike, pasted = axes(declared(method), full=True), differing(method), tomli_w.dumps(method.table)
    if options.json:
        about = {name: getattr(method.about, name) for name in method.about.__struct_fields__}
        return emit({"name": method.name, **about, "axes": whole, "differing": unlike, "toml": pasted})
    rows = [(k, v, "" if k in unlike else "default") for k, v in whole.items() if k in unlike or k not in OWN_FAMILY]
    out().print(f"{method.name}  {method.about.title}\n", style="bold", markup=False)
    out().print(table("", ("axis", "choice", ""), rows), "", markup=False)
    return out().print(_prose(method), pasted, markup=False, sep="\n")


def _prose(method: Any) -> str:
    """What is known of the method, paragraph by paragraph."""
    about = method.about
    parts = {
        "formula": about.formula.strip("\n"),
        "source": about.paper,
        "badge": f"{about.badge} (evidence {about.mark or 'none'})",
        "notes": about.notes,
        "differs": about.differs,
        "the paper's reward": tomli_w.dumps({"reward": about.reward}).strip() if about.reward else "",
    }
    said = [f"{name}:\n{text}\n" if "\n" in text else f"{name}: {text}\n" for name, text in parts.items() if text]
    return "\n".join([*said, f'use it with  method = "{method.name}"  in a run\'s config, or paste:\n'])


def run_certify(options: argparse.Namespace) -> int:
    """Exact bias, variance and hackability on enumerable problems; exit code 1 where it walks into a trap."""
    with err().status(f"certifying {options.method}: every group of episodes of small worlds, up to a minute"):
        from agentgym_trainers.exact.certify import report, run

        certificate = run(options.method)
    emit(certificate) if options.json else out().print(report(certificate), markup=False)
    return NO if certificate.caught else OK


VERBS: dict[str, tuple[str, Callable[[argparse.Namespace], Any]]] = {
    "show": ("axes, formula, defaults, source and badge of a method, and its TOML", run_show),
    "certify": ("exact bias, variance and hackability of a composition on enumerable problems", run_certify),
}
