"""Log-probs and entropies of packed tokens, with gradient, without ever holding all logits.

A batch of N tokens has N x V logits: at N = 16,384 and V = 150,000 that is 10 GB in float32, several times over with
its gradient. Here the unembedding runs in checkpointed chunks, and only on the positions asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from agentgym.errors import ModelError
from agentgym.modeling.attention import NO_MASK, PackedLayout, prepare
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
        """[n, hidden] -> [n, V] in float32."""
        found = torch.nn.functional.linear(hidden, self.weight, self.bias).float()
        found = found if self.scale == 1.0 else found * self.scale
        return found if self.cap is None else torch.tanh(found / self.cap) * self.cap


def head_of(model: Any) -> Head:
    """The model's unembedding, tied or not, with the final scaling and capping some families apply."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; a causal language model is needed")
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def _chunk(hidden: Tensor, targets: Tensor, head: Head, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    logits = head.logits(hidden) / temperature
    norm = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets[:, None])[:, 0] - norm
    if not entropy:
        return chosen, torch.zeros_like(chosen)
    return chosen, norm - (torch.softmax(logits, -1) * logits).sum(-1)  # H = log Z - E[logit]


def chunked_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [n, hidden], targets [n] -> log-probs [n] and entropies [n] (nats; zeros unless `entropy`), float32.

    `chunk` rows at a time (by default as many as `LOGITS` allows); what fits into one chunk is not computed twice.
    """
    rows = chunk or max(LOGITS // head.weight.shape[0], 1)
    pieces = []
    for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
        if torch.is_grad_enabled() and len(targets) > rows:
            pieces.append(checkpoint(_chunk, h, t, head, temperature, entropy, use_reentrant=False))
        else:
            pieces.append(_chunk(h, t, head, temperature, entropy))
    if not pieces:
        return hidden.new_zeros(0, dtype=torch.float32), hidden.new_zeros(0, dtype=torch.float32)
    chosen, entropies = zip(*pieces, strict=True)
    return torch.cat(chosen), torch.cat(entropies)


def packed_hidden(
    model: Any, ids: NDArray[np.int32], positions: NDArray[np.int32], bounds: NDArray[np.int64]
) -> Tensor:
    """Final hidden states [N, hidden] of sequences packed end to end, each attending to itself alone.

    Models that cannot attend through a layout are run sequence by sequence.
    """
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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token given its prefix, and the entropy of the distribution it came from; both [N], float32.

    Aligned with `batch.ids`: entry n belongs to token n. The first token of a sequence has no prediction and gets 0,
    as do tokens with mask 0 when `masked_only` (which skips the unembedding of prompts). With gradient unless the
    caller turned it off.
    """
    hidden = packed_hidden(model, batch.ids, batch.positions, batch.bounds)
    wanted = batch.positions > 0
    if masked_only:
        wanted &= batch.mask > 0
    at = torch.from_numpy(np.flatnonzero(wanted)).to(hidden.device)
    targets = torch.from_numpy(batch.ids[wanted].astype(np.int64)).to(hidden.device)
    chosen, entropies = chunked_logprobs(
        hidden[at - 1], targets, head_of(model), temperature=temperature, entropy=entropy, chunk=chunk
    )
    zeros = torch.zeros(len(batch.ids), device=hidden.device)
    return zeros.index_copy(0, at, chosen), zeros.index_copy(0, at, entropies)
