"""What is told to torch's kernel for packed sequences, which runs on GPUs alone: a slow twin with its documented
signature stands in for it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor

from agentgym.modeling.attention import PackedLayout, kernel_fits, varlen_attn

BOUNDS = np.array([0, 9, 10, 10, 31])


def twin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """[T, H, D]: each token of a sequence sees `window_size` = (left, right) tokens beside itself, -1 = all."""
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    outs = []
    for a, b in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        gap = torch.arange(b - a)[:, None] - torch.arange(b - a)[None, :]
        left, right = (b - a if n < 0 else n for n in window_size)
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[a:b]) * scale
        scores = scores.masked_fill((gap > left) | (-gap > right), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[a:b]))
    return torch.cat(outs)


@pytest.mark.parametrize("window", [None, 1, 8, 100])
@pytest.mark.parametrize("heads", [2, 6])
def test_the_kernel_is_told_what_the_blocks_do(window: int | None, heads: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 31, 8, generator=g) for n in (heads, 2, 2))
    layout = PackedLayout(BOUNDS)
    expected = layout.attend(q, k, v, 0.3, window, 0.0)
    found = layout.packed(twin, q, k, v, 0.3, window)
    assert found.shape == expected.shape == (1, 31, heads, 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_torchs_kernel_has_this_signature() -> None:
    known = inspect.signature(varlen_attn).parameters
    assert set(inspect.signature(twin).parameters) <= set(known)
    assert not kernel_fits(torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16), 0.0)
