"""S6: from values per token to a number. Over the micro-batches of a step the results add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agentgym.errors import RecordError
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.custom import call
from agentgym_trainers.objective.tokens import Tokens, Totals, needed, per_sequence


def aggregate(declared: Any, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    """[M] to a scalar, by the global counts."""
    return AGGREGATIONS[type(declared)](declared, x, t, total)


def totals(declared: Any, t: Tokens) -> Totals:
    """The counts of tokens that are a whole step."""
    parts = count_parts(declared, t.turn, t.segment, t.sequence, t.labels)
    return Totals(len(t.logp), t.sequences, parts)


def _token_mean(d: declare.TokenMean, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return x.sum() / max(total.tokens, 1)


def _seq_mean_token_mean(d: declare.SeqMeanTokenMean, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return per_sequence(x, t, mean=True).sum() / max(total.sequences, 1)


def _seq_mean_token_sum(d: declare.SeqMeanTokenSum, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return x.sum() / max(total.sequences, 1)


def _const_norm(d: declare.ConstNorm, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return x.sum() / (max(total.sequences, 1) * d.horizon)


def _token_sum(d: declare.TokenSum, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    return x.sum()


# --- segments, each with its own denominator --------------------------------------------------------------------


def segment_parts(
    declared: declare.Segments, turn: Tensor | None, segment: Tensor | None, sequence: Tensor, labels: tuple[str, ...]
) -> tuple[Tensor, tuple[str, ...]]:
    """Which part each of the M trained tokens belongs to [M], and the names of the parts.

    turn, segment, sequence [M] as in `Tokens`. Raises `RecordError` where weights are declared for labels and no token
    of the step carries one.
    """
    if declared.by == "first":
        later = torch.ones_like(sequence)
        later[1:] = (sequence[1:] == sequence[:-1]).to(later.dtype)
        later[:1] = 0
        return later, ("first", "rest")
    if declared.by == "turn":
        turns = needed(turn, "turn")
        ends = torch.searchsorted(sequence, sequence.unique_consecutive(), right=True) - 1
        counts = ends.diff(prepend=ends.new_tensor([-1]))
        last = turns[ends].repeat_interleave(counts, output_size=len(turns))
        return (turns == last).to(sequence.dtype), ("earlier", "last")
    if declared.weights and labels == ("",) and len(sequence):
        raise RecordError(
            f"segments are weighed by label ({', '.join(declared.weights)}), and no token carries one; let the engine "
            "record TokenSpan.segments, or set aggregation.by = 'first' or 'turn'"
        )
    return needed(segment, "segment").to(sequence.dtype), labels


def count_parts(
    declared: Any, turn: Tensor | None, segment: Tensor | None, sequence: Tensor, labels: tuple[str, ...]
) -> dict[str, int]:
    """Tokens of each part, to be summed over micro-batches and ranks into `Totals.parts`; {} without segments."""
    if not isinstance(declared, declare.Segments):
        return {}
    index, names = segment_parts(declared, turn, segment, sequence, labels)
    return dict(zip(names, torch.bincount(index, minlength=len(names)).tolist(), strict=True))


def _segments(d: declare.Segments, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    index, names = segment_parts(d, t.turn, t.segment, t.sequence, t.labels)
    scale = [d.weights.get(name, 1.0) / max(total.parts.get(name, 0), 1) for name in names]
    return (x * x.new_tensor(scale).index_select(0, index)).sum()


AGGREGATIONS: dict[type[declare.Kind], Callable[[Any, Tensor, Tokens, Totals], Tensor]] = {
    declare.TokenMean: _token_mean,
    declare.SeqMeanTokenMean: _seq_mean_token_mean,
    declare.SeqMeanTokenSum: _seq_mean_token_sum,
    declare.ConstNorm: _const_norm,
    declare.TokenSum: _token_sum,
    declare.Segments: _segments,
    declare.Custom: call,
}
