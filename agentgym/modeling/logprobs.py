"""Log-probs and entropies of packed tokens, with gradient, without ever holding all logits.

A batch of N tokens has N x V logits: at N = 16,384 and V = 150,000 that is 10 GB in float32, several times over with
its gradient. Here the unembedding runs in checkpointed chunks, and only on the positions asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentgym.errors import ModelError
from agentgym.modeling.attention import NO_MASK, PackedLayout, prepare
from agentgym.modeling.layers import first_layers
from agentgym.types import Batch

LOGITS = 2**24
"""Logits that exist at once: 64 MB in float32."""


class Head(NamedTuple):
    """The unembedding: logits = cap * tanh(scale * (h W' + b) / cap)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, V] in float32, or in float64 where the model is."""
        found = torch.nn.functional.linear(hidden, self.weight, self.bias)
        found = found if found.dtype == torch.float64 else found.float()
        found = found if self.scale == 1.0 else found * self.scale
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap


def head_of(model: Any) -> Head:
    """The model's unembedding, tied or not, with the final scaling and capping some families apply."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; a causal language model is needed")
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def by_chunks(function: Callable[..., Any], head: Head, chunk: int | None, *rows: Tensor) -> list[Any]:
    """The function over so many rows at a time as `LOGITS` allows; what fits into one chunk is not computed twice."""
    size = chunk or max(LOGITS // head.weight.shape[0], 1)
    again = torch.is_grad_enabled() and len(rows[0]) > size
    pieces = zip(*(x.split(size) for x in rows), strict=True)
    return [checkpoint(function, *piece, use_reentrant=False) if again else function(*piece) for piece in pieces]


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    entropy: bool | Literal["detached"] = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [n, hidden], targets [n] -> log-probs [n] and entropies [n] (nats; zeros unless `entropy`), float32 or 64.

    `chunk` rows at a time (by default as many as `LOGITS` allows); what fits into one chunk is not computed twice.
    """

    def one(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head.logits(hidden) / temperature
        norm = torch.logsumexp(logits, -1)
        chosen = logits.gather(-1, targets[:, None])[:, 0] - norm
        if not entropy:
            return chosen, torch.zeros_like(chosen)
        if entropy == "detached":
            logits, norm = logits.detach(), norm.detach()
        return chosen, norm - (torch.softmax(logits, -1) * logits).sum(-1)  # H = log Z - E[logit]

    if not len(targets):
        empty = hidden.sum(-1)  # no rows, and yet part of the graph
        return empty, empty
    chosen, entropies = zip(*by_chunks(one, head, chunk, hidden, targets), strict=True)
    return torch.cat(chosen), torch.cat(entropies)


def chunked_divergence(
    hidden: Tensor,
    head: Head,
    teacher: Tensor,
    teacher_head: Head,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """hidden [n, hidden] of a policy and of a teacher -> their divergence over the whole vocabulary [n], in nats.

    The generalised Jensen-Shannon divergence with M = beta teacher + (1 - beta) policy: beta KL(teacher, M) +
    (1 - beta) KL(policy, M); KL(teacher, policy) at beta 0, KL(policy, teacher) at 1 (2306.13649). `ModelError` where
    the vocabularies differ.
    """
    sizes = head.weight.shape[0], teacher_head.weight.shape[0]
    if sizes[0] != sizes[1]:
        raise ModelError(f"policy and teacher have {sizes[0]} and {sizes[1]} logits; they need the same vocabulary")

    def one(hidden: Tensor, teacher: Tensor) -> Tensor:
        return divergence(head.logits(hidden) / temperature, teacher_head.logits(teacher) / temperature, beta)

    return torch.cat(by_chunks(one, head, chunk, hidden, teacher)) if len(hidden) else hidden.sum(-1)


def divergence(policy: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence that `chunked_divergence` forms, of logits [..., V] -> [...]. A token that both rule out (-inf)
    adds nothing; one that only the policy rules out costs a large, finite number."""
    p, q = (torch.log_softmax(x, -1).clamp(min=-1e4) for x in (policy, teacher))
    if beta in (0.0, 1.0):
        return _kl(q, p) if beta == 0.0 else _kl(p, q)
    middle = torch.logaddexp(q + math.log(beta), p + math.log(1.0 - beta))
    return beta * _kl(q, middle) + (1.0 - beta) * _kl(p, middle)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of log-probs [..., V]: [...]."""
    return (p.exp() * (p - q)).sum(-1)


def packed_hidden(
    model: Any,
    ids: NDArray[np.int32],
    positions: NDArray[np.int32],
    bounds: NDArray[np.int64],
    *,
    layer: int | None = None,
) -> Tensor:
    """Final hidden states [N, hidden] of sequences packed end to end, each attending to itself alone.

    With `layer`, the hidden states after that layer (1 = the first), through the final norm. Models that cannot attend
    through a layout are run sequence by sequence.
    """
    if layer is not None:
        with first_layers(model, layer):
            return packed_hidden(model, ids, positions, bounds)
    device = next(model.parameters()).device
    ids_N, positions_N = (torch.from_numpy(x.astype(np.int64)).to(device) for x in (ids, positions))
    base = model.base_model
    if not prepare(model):
        parts = [
            base(input_ids=ids_N[None, a:b], position_ids=positions_N[None, a:b], use_cache=False)[0][0]
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        return torch.cat(parts)
    out: Tensor = base(
        input_ids=ids_N[None],
        position_ids=positions_N[None],
        attention_mask=NO_MASK,
        use_cache=False,
        layout=PackedLayout(bounds, device),
    )[0]
    return out[0]


def token_logprobs(
    model: Any,
    batch: Batch,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    masked_only: bool = False,
    layer: int | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token given its prefix, and the entropy of the distribution it came from; both [N], float32.

    Aligned with `batch.ids`: entry n belongs to token n. The first token of a sequence has no prediction and gets 0,
    as do tokens with mask 0 when `masked_only` (which skips the unembedding of prompts). `layer` reads the hidden
    states after that layer. With gradient unless the caller turned it off.
    """
    hidden = packed_hidden(model, batch.ids, batch.positions, batch.bounds, layer=layer)
    wanted = batch.positions > 0
    if masked_only:
        wanted &= batch.mask > 0
    at = torch.from_numpy(np.flatnonzero(wanted)).to(hidden.device)
    targets = torch.from_numpy(batch.ids[wanted].astype(np.int64)).to(hidden.device)
    chosen, entropies = chunked_logprobs(
        hidden[at - 1], targets, head_of(model), temperature=temperature, entropy=entropy, chunk=chunk
    )
    zeros = chosen.new_zeros(len(batch.ids))
    return zeros.index_copy(0, at, chosen), zeros.index_copy(0, at, entropies)
