"""One attention function for packed tokens, shared by the engine's cache and the learner's batches.

Everything but attention works token by token, so tokens of many sequences travel packed, as one row [1, N], and only
attention needs to know who may look at whom. It is told by a `Layout`, handed to the model as the keyword `layout`
and passed down by transformers to the function registered here. Without a layout the function is plain sdpa, so a
prepared model still trains, generates and saves like any other.

Shapes: N tokens in all, H query heads, K key/value heads, D head size, S sequences or rows, T and L padded lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agentgym.errors import ModelError

NAME = "agentgym"
NO_MASK = torch.zeros(1, 1, 1, 1)
"""A 4-d mask makes transformers build none of its own; layouts never read it."""


class Layout(Protocol):
    """Who attends to whom in one forward pass."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        """q [1, H, N, D]; k, v as the cache returned them, [1, K, N, D] without one -> [1, N, H, D]."""
        ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if layout is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    foreign = sorted(name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None)
    if foreign:
        raise ModelError(f"{type(module).__name__} attends with {', '.join(foreign)}, which packed rows cannot")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layout.attend(query, key, value, scale, options.get("sliding_window"), dropout), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def prepare(model: Any) -> bool:
    """Let the model attend through layouts; False, and nothing is changed, where it does more than plain attention.

    That is: recurrent or chunked layers, capped scores, attention sinks, or a class with a fixed attention function.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if (
        not kinds <= {"full_attention", "sliding_attention"}
        or getattr(config, "attn_logit_softcapping", None)
        or getattr(model, "_is_stateful", False)
        or not model._supports_sdpa
        or not model._can_set_attn_implementation()
    ):
        return False
    if model.config._attn_implementation != NAME:
        model.set_attn_implementation(NAME)
    return True


def expand_heads(kv: Tensor, heads: int) -> Tensor:
    """[S, K, L, D] -> [S, H, L, D], each key/value head repeated for its group of query heads."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)


class PackedLayout:
    """Causal attention inside each of S sequences packed end to end; `bounds` [S+1] as in `types.Batch`.

    Sequences of similar length are attended together as one padded block [S, T]; the padding exists in attention only.
    With 16 x 128 tokens this is 15 times faster on a CPU than a block-diagonal mask over [N, N].
    """

    def __init__(self, bounds: NDArray[np.int64], device: torch.device | str = "cpu") -> None:
        self.blocks: list[Tensor] = []
        home = np.empty(int(bounds[-1]), np.int64)  # where each token lies in the concatenated padded blocks
        offset = 0
        for members, width in _similar(np.diff(bounds)):
            index = bounds[members][:, None] + np.arange(width)
            real = index < bounds[members + 1][:, None]
            home[index[real]] = offset + np.flatnonzero(real)
            offset += index.size
            self.blocks.append(torch.from_numpy(np.minimum(index, bounds[-1] - 1)).to(device))
        self.home = torch.from_numpy(home).to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (q, k, v))
        outs = []
        for block in self.blocks:
            q_SHTD, k_SKTD, v_SKTD = (x[block].transpose(1, 2) for x in (q_NHD, k_NKD, v_NKD))
            mask = _window_mask(block.shape[1], window, q.device)
            out = scaled_dot_product_attention(
                q_SHTD,
                expand_heads(k_SKTD, q.shape[1]),
                expand_heads(v_SKTD, q.shape[1]),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
            )
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)[self.home].unsqueeze(0)


def _similar(lengths: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Groups of sequences whose lengths differ by at most a quarter (or 16 tokens): (members, longest)."""
    order = np.argsort(lengths, kind="stable")[::-1]
    order = order[lengths[order] > 0]
    while len(order):
        longest = int(lengths[order[0]])
        near = lengths[order] >= min(longest * 0.75, longest - 16)
        yield order[near], longest
        order = order[~near]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The causal mask [T, T] with a sliding window; None where plain causal attention is the same."""
    if window is None or window >= length:
        return None
    at = torch.arange(length, device=device)
    gap = at[:, None] - at[None, :]
    return (gap >= 0) & (gap < window)
