"""S6: from values per token to a number. Over the micro-batches of a step the results add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from agentgym_trainers.objective import declare
from agentgym_trainers.objective.tokens import Tokens, Totals, per_sequence


def aggregate(declared: Any, x: Tensor, t: Tokens, total: Totals) -> Tensor:
    """[M] to a scalar, by the global counts."""
    return AGGREGATIONS[type(declared)](declared, x, t, total)


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


AGGREGATIONS: dict[type[declare.Kind], Callable[[Any, Tensor, Tokens, Totals], Tensor]] = {
    declare.TokenMean: _token_mean,
    declare.SeqMeanTokenMean: _seq_mean_token_mean,
    declare.SeqMeanTokenSum: _seq_mean_token_sum,
    declare.ConstNorm: _const_norm,
    declare.TokenSum: _token_sum,
}
