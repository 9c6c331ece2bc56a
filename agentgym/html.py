"""Trajectories as HTML: offline, self-contained, without a script, everything foreign escaped.

`trajectory_html` is a fragment (a notebook shows it); `trajectory_page` a document. Both follow the reader's light or
dark scheme. Observations come from web pages and models: nothing of them reaches the page but as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from typing import Any

import numpy as np

from agentgym.figures import figure, looks_numeric
from agentgym.rewards import composer, turn_of
from agentgym.types import (
    Action,
    Array,
    Draft,
    Image,
    Message,
    Observation,
    RewardTerm,
    TokenSpan,
    Trajectory,
    Turn,
    iterate,
)

TEXT_LIMIT = 4000
"""Characters of one message that are shown."""
TURN_LIMIT = 200
"""Turns of one trajectory that are shown."""

STYLE = """
.agentgym{--ink:#1c2024;--soft:#60646c;--line:#e0e1e6;--card:#fff;--page:#f6f7f9;--blue:#3358d4;--blue-soft:#edf2fe;
--green:#1f7a4d;--green-soft:#e6f6eb;--red:#c62a2f;--red-soft:#feebec;--amber:#8f6400;--amber-soft:#fff3cf;
font:14px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);color-scheme:light dark}
@media (prefers-color-scheme:dark){.agentgym{--ink:#edeef0;--soft:#a0a5ae;--line:#363a3f;--card:#1b1d20;--page:#111214;
--blue:#9eb1ff;--blue-soft:#1d2540;--green:#5bd197;--green-soft:#13291d;--red:#ff9592;--red-soft:#3a1719;
--amber:#f5d878;--amber-soft:#302408}}
body.agentgym{margin:0;background:var(--page)}
.agentgym *{box-sizing:border-box}
.agentgym main{max-width:1000px;margin:0 auto;padding:28px 20px 60px}
.agentgym h1{font-size:24px;line-height:1.25;margin:0 0 4px;letter-spacing:-.01em}
.agentgym h2{font-size:16px;margin:34px 0 10px}
.agentgym .hero{font-size:30px;font-weight:650;letter-spacing:-.02em;margin:14px 0 0}
.agentgym .hero small{font-size:14px;font-weight:400;letter-spacing:0;color:var(--soft);margin-left:10px}
.agentgym p{margin:6px 0}.agentgym .soft{color:var(--soft)}
.agentgym .head{display:flex;flex-wrap:wrap;gap:6px 8px;align-items:center;margin:6px 0 14px}
.agentgym .chip{display:inline-flex;gap:6px;padding:1px 9px;border:1px solid var(--line);border-radius:99px;
background:var(--card);font-size:12.5px;white-space:nowrap;font-variant-numeric:tabular-nums}
.agentgym .chip.plus{color:var(--green);background:var(--green-soft);border-color:transparent}
.agentgym .chip.minus{color:var(--red);background:var(--red-soft);border-color:transparent}
.agentgym .chip.warn{color:var(--amber);background:var(--amber-soft);border-color:transparent}
.agentgym .turn{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:10px 0;overflow:hidden}
.agentgym .bar{display:flex;flex-wrap:wrap;gap:6px;align-items:center;padding:6px 14px;
border-bottom:1px solid var(--line);
color:var(--soft);font-size:12.5px}
.agentgym .bar b{color:var(--ink)}.agentgym .bar .gap{flex:1}
.agentgym .say{display:grid;grid-template-columns:84px minmax(0,1fr);gap:12px;padding:7px 14px}
.agentgym .say>span{color:var(--soft);font-size:12.5px;padding-top:1px;overflow-wrap:anywhere}
.agentgym .say.act{background:var(--blue-soft)}.agentgym .say.act>span{color:var(--blue);font-weight:600}
.agentgym .say.draft{background:var(--amber-soft)}.agentgym .say.draft>span{color:var(--amber)}
.agentgym pre{margin:0;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
.agentgym details{margin:10px 0}.agentgym summary{cursor:pointer;padding:3px 0}
.agentgym .scroll{overflow-x:auto}
.agentgym table{border-collapse:separate;border-spacing:0;overflow:hidden;background:var(--card);
border:1px solid var(--line);border-radius:8px;
font-variant-numeric:tabular-nums}
.agentgym th,.agentgym td{padding:5px 12px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
.agentgym tr:last-child td{border-bottom:0}.agentgym th{color:var(--soft);font-weight:500;font-size:12.5px}
.agentgym td.n,.agentgym th.n{text-align:right}
.agentgym tr.strong td{font-weight:600;background:var(--blue-soft)}
"""


def trajectory_page(trajectory: Trajectory, reward: Mapping[str, Any] | None = None) -> str:
    """One trajectory as a whole document."""
    title = f"{trajectory.env}, episode {trajectory.episode.id}"
    return page(title, f"<h1>{safe(title)}</h1>{trajectory_body(trajectory, reward)}")


def trajectory_html(trajectory: Trajectory, reward: Mapping[str, Any] | None = None) -> str:
    """One trajectory as a fragment. With a composer's declaration each turn shows its share of the return.

    Without one, the ledger is shown as the environment wrote it.
    """
    return f'<div class="agentgym"><style>{STYLE}</style>{trajectory_body(trajectory, reward)}</div>'


def page(title: str, body: str) -> str:
    """A document that fetches nothing and runs nothing: the policy in its head forbids both."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{safe(title)}</title><style>{STYLE}</style></head>"
        f'<body class="agentgym"><main>{body}</main></body></html>\n'
    )


def trajectory_body(trajectory: Trajectory, reward: Mapping[str, Any] | None = None) -> str:
    """The inside of either."""
    shares, head = _shares(trajectory, reward)
    first = enumerate(islice(iterate(trajectory.turns), TURN_LIMIT))
    turns = "".join(_turn(i, turn, shares.get(i, ())) for i, turn in first)
    if len(trajectory.turns) > TURN_LIMIT:
        turns += f'<p class="soft">… {len(trajectory.turns) - TURN_LIMIT} more turns</p>'
    final = "".join(_observation(seen, agent) for agent, seen in trajectory.final.items())
    ending = f'<div class="turn"><div class="bar"><b>after the last turn</b></div>{final}</div>' if final else ""
    return f'<div class="head">{head}</div>{turns}{ending}'


Shares = dict[int, Sequence[tuple[RewardTerm, float]]]


def _shares(trajectory: Trajectory, reward: Mapping[str, Any] | None) -> tuple[Shares, str]:
    """What each turn contributed, and the chips above the turns."""
    ledger = tuple(trajectory.rewards)
    chips = [chip(trajectory.status, tone="warn" if trajectory.failure else ""), chip(f"{len(trajectory.turns)} turns")]
    values, turns = [term.value for term in ledger], turn_of(trajectory)
    made = None if reward is None or trajectory.failure else composer(dict(reward))
    if made is not None and "policy.kl" not in made.derived:  # which only the trainer knew
        composed = made.trajectory(trajectory)
        ledger, values = (*ledger, *composed.extra), list(composed.shares)
        turns = turn_of(trajectory, composed.extra)
        chips.insert(0, signed("return", composed.value))
        if composed.base:
            chips.append(signed("base", composed.base))
    if trajectory.failure:
        chips.append(chip(f"{trajectory.failure.kind}: {trajectory.failure.message}"[:200], tone="warn"))
    chips += [chip(f"{name} {value}") for name, value in trajectory.labels.items()]
    chips += [chip(f"{name} {value:.4g}") for name, value in trajectory.metrics.items()]
    found: dict[int, list[tuple[RewardTerm, float]]] = {}
    for turn, term, value in zip(turns.tolist(), ledger, values, strict=True):
        found.setdefault(turn, []).append((term, value))
    return dict(found), "".join(chips)


def chip(text: str, tone: str = "", title: str = "") -> str:
    """A small label. `tone` is "", "plus", "minus" or "warn"."""
    return f'<span class="chip {tone}" title="{safe(title)}">{safe(text)}</span>'


def signed(name: str, value: float, title: str = "") -> str:
    """A figure whose sign has a colour."""
    return chip(f"{name} {value:+.4g}", tone="plus" if value > 0 else "minus" if value < 0 else "", title=title)


def _turn(index: int, turn: Turn, shares: Sequence[tuple[RewardTerm, float]]) -> str:
    total = sum(value for _, value in shares)
    chips = "".join(
        signed(term.name, value, title=f"{term.level}, ledger value {term.value:.6g}")
        for term, value in shares
        if value
    )
    chips = _potentials(turn.rewards) + chips
    facts = " · ".join(filter(None, (_tokens(turn.spans), _time(turn))))
    bar = f'<div class="bar"><b>turn {index}</b><span>{safe(turn.agent)}</span><span>{facts}</span><span class="gap">'
    bar += f"</span>{chips}{signed('Σ', total) if len([v for _, v in shares if v]) > 1 else ''}</div>"
    said = "".join(map(_draft, turn.drafts)) + _say("acts", _action(turn.action), "act")
    return f'<div class="turn">{bar}{_observation(turn.observation)}{said}</div>'


def _potentials(rewards: Sequence[RewardTerm]) -> str:
    """How far a turn moved each potential; 0 after the last turn, by convention."""
    values = {term.name: term.value for term in rewards}
    names = [name.removesuffix(".before") for name in values if name.endswith(".before")]
    moved = [(name, values[f"{name}.before"], values.get(f"{name}.after", 0.0)) for name in names]
    return "".join(chip(f"{name} {before:.3g} → {after:.3g}") for name, before, after in moved if before != after)


def _tokens(spans: Sequence[TokenSpan]) -> str:
    if not spans:
        return ""
    logprobs = np.concatenate([span.logprobs.numpy() for span in spans])
    versions = sorted({run.version for span in spans for run in span.versions})
    said = f"{sum(len(s.prompt) for s in spans)} + {sum(len(s.ids) for s in spans)} tokens"
    said += f", mean log-prob {logprobs.mean():.3f}" if len(logprobs) else ""
    return said + (f", weights {'–'.join(map(str, dict.fromkeys((versions[0], versions[-1]))))}" if versions else "")


def _time(turn: Turn) -> str:
    if turn.timing is None:
        return ""
    return f"{1000 * turn.timing.policy:.1f} ms thinking, {1000 * turn.timing.environment:.1f} ms world"


def _observation(observation: Observation, agent: str = "") -> str:
    parts = [_message(message) for message in observation.messages]
    if observation.array is not None:
        parts.append(_say(f"{agent} sees".strip(), _numbers(observation.array)))
    return "".join(parts)


def _message(message: Message) -> str:
    images = () if isinstance(message.content, str) else message.content
    shown = [f"[image {part.media.hash[:12]}]" for part in images if isinstance(part, Image)]
    calls = [_call(call.name, call.arguments) for call in message.tool_calls]
    return _say(message.name or message.role, "\n".join(filter(None, (message.text, *shown, *calls))))


def _draft(draft: Draft) -> str:
    return _say(f"{draft.by} {draft.verdict}", f"{_action(draft.action)}\n{draft.reason}".strip(), "draft")


def _action(action: Action) -> str:
    calls = [_call(call.name, call.arguments) for call in action.tool_calls]
    array = [_numbers(action.array)] if action.array is not None else []
    return "\n".join(filter(None, (action.text, *calls, *array))) or "(nothing)"


def _call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({json.dumps(dict(arguments), ensure_ascii=False, default=str)})"


def _numbers(array: Array) -> str:
    values = array.numpy()
    text = np.array2string(values, precision=4, threshold=64, separator=", ")
    return text if values.size <= 64 else f"{text}  {array.dtype}{list(array.shape)}"


def _say(who: str, text: str, kind: str = "") -> str:
    rest = f"\n… {len(text) - TEXT_LIMIT} more characters" if len(text) > TEXT_LIMIT else ""
    body = safe(text[:TEXT_LIMIT] + rest)
    return f'<div class="say {kind}"><span>{safe(who)}</span><pre>{body}</pre></div>'


def safe(text: str) -> str:
    """Any text as text: markup escaped, control characters and lone surrogates made visible."""
    shown = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown))


# --- tables -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], strong: Iterable[int] = ()) -> str:
    """An HTML table; columns of numbers are right-aligned, the rows numbered in `strong` stand out."""
    cells = [[figure(cell) for cell in row] for row in rows]
    kinds = [' class="n"' if looks_numeric([row[i] for row in cells]) else "" for i in range(len(columns))]
    head = "".join(f"<th{kind}>{safe(name)}</th>" for name, kind in zip(columns, kinds, strict=True))
    marked = set(strong)
    body = "".join(
        f"<tr{' class=strong' if i in marked else ''}>"
        + "".join(f"<td{kind}>{safe(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for i, row in enumerate(cells)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
