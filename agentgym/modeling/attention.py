"""One attention function for packed tokens, shared by the engine's cache and the learner's batches.

Everything but attention works token by token, so tokens of many sequences travel packed, as one row [1, N], and only
attention needs to know who may look at whom. It is told by a `Layout`, handed to the model as the keyword `layout`
and passed down by transformers to the function registered here. Without a layout the function is plain sdpa, so a
prepared model still trains, generates and saves like any other.

Shapes: N tokens in all, H query heads, K key/value heads, D head size, S sequences or rows, T and L padded lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from inspect import signature
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


def _kernel() -> Any:
    """torch's attention over packed sequences, or None: its first versions knew neither windows nor grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(signature(varlen_attn).parameters) else None


varlen_attn = _kernel()


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

    In half precision on a GPU torch's own kernel for packed sequences runs over them as they are. Else sequences of
    similar length are attended together as one padded block [S, T]; the padding exists in attention only. With
    16 x 128 tokens that is 15 times faster on a CPU than a block-diagonal mask over [N, N].
    """

    def __init__(self, bounds: NDArray[np.int64], device: torch.device | str = "cpu") -> None:
        self.bounds, self.device = bounds, device
        self.longest = int(np.diff(bounds).max(initial=0))

    @cached_property
    def starts(self) -> Tensor:
        """Where each sequence begins, and where the last one ends [S+1], as the kernel wants them."""
        return torch.from_numpy(self.bounds.astype(np.int32)).to(self.device)

    @cached_property
    def blocks(self) -> tuple[list[Tensor], Tensor]:
        """Tokens of each padded block [S, T], and where each token lies in the blocks put end to end [N]."""
        bounds, blocks, offset = self.bounds, [], 0
        home = np.empty(int(bounds[-1]), np.int64)
        for members, width in _similar(np.diff(bounds)):
            index = bounds[members][:, None] + np.arange(width)
            real = index < bounds[members + 1][:, None]
            home[index[real]] = offset + np.flatnonzero(real)
            offset += index.size
            blocks.append(torch.from_numpy(np.minimum(index, bounds[-1] - 1)).to(self.device))
        return blocks, torch.from_numpy(home).to(self.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        if kernel_fits(q, dropout):
            return self.packed(varlen_attn, q, k, v, scale, window)
        q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1) for x in (q, k, v))
        blocks, home = self.blocks
        outs = []
        for block in blocks:
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
        return torch.cat(outs)[home].unsqueeze(0)

    def packed(self, kernel: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """By a kernel with the signature of `torch.nn.attention.varlen.varlen_attn`: a token sees itself and at most
        `window` - 1 before it."""
        q_NHD, k_NKD, v_NKD = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        span = (-1 if window is None else window - 1, 0)
        grouped = q.shape[1] != k.shape[1]
        ends = (self.starts, self.starts, self.longest, self.longest)
        out: Tensor = kernel(q_NHD, k_NKD, v_NKD, *ends, scale=scale, window_size=span, enable_gqa=grouped)
        return out.unsqueeze(0)


def kernel_fits(q: Tensor, dropout: float) -> bool:
    """Whether torch's kernel for packed sequences takes this: its limits are flash attention's, and its gradients are
    not the same bit for bit in each run."""
    return (
        varlen_attn is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and not dropout
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


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
