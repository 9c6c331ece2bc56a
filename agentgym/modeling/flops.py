"""What a step of training costs in floating-point operations, and what share of the machine's peak it reaches.

    utilisation(model, trajectories, seconds)     # {"learn_tokens_per_second": ..., "mfu": ...}

Counted are the products that the step cannot do without: two operations per weight and token forward, two for the
gradient by the input, two for the gradient by the weight, if it moves; attention's two products over the causal half;
the unembedding at the trained tokens alone. A lookup of embeddings is no product. What checkpointing does again is
counted apart, as are passes without gradient (a reference, old log-probs), which only take time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from agentgym.types import Trajectory, iterate

DATASHEET = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense products in 16 bits a second, by a part of the device's name; the first that fits counts."""
ATTENDS = ("full_attention", "sliding_attention")


class Shape(NamedTuple):
    """What the count needs of a model: weights of its linear layers and of the unembedding, those of them that move,
    attention layers with their width (heads x head size) and window (0 = none)."""

    trunk: float
    trunk_moving: float
    head: float
    head_moving: float
    width: int
    windows: tuple[int, ...]


class Flops(NamedTuple):
    """Operations of a step: `useful`, and those that `checkpointing` does a second time."""

    useful: float
    again: float


def shape(model: Any) -> Shape:
    """Read off the module. Of experts a token visits only some; their share of the weights is counted."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    table = id(model.get_input_embeddings().weight)
    sizes = [
        (p.numel() * (share if p.ndim == 3 else 1.0), p.requires_grad)
        for p in model.base_model.parameters()
        if p.ndim > 1 and id(p) != table
    ]
    head = model.get_output_embeddings().weight
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        trunk=sum(n for n, _ in sizes),
        trunk_moving=sum(n for n, moves in sizes if moves),
        head=head.numel(),
        head_moving=head.numel() if head.requires_grad else 0,
        width=config.num_attention_heads * size,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds if kind in ATTENDS),
    )


def training(model: Shape, lengths: Sequence[int], trained: int) -> Flops:
    """Forward and backward over sequences of these lengths, with a loss at `trained` tokens."""
    tokens = float(sum(lengths))
    attention = sum(4.0 * model.width * _pairs(lengths, window) for window in model.windows)
    forward = 2 * model.trunk * tokens + attention
    moved = 2 * (model.trunk_moving * tokens + model.head_moving * trained)
    return Flops(2 * forward + attention + moved + 4 * model.head * trained, forward)


def _pairs(lengths: Sequence[int], window: int) -> float:
    """(query, key) pairs of causal attention: half a square each, less what lies beyond the window."""
    n = np.asarray(lengths, np.float64)
    beyond = np.maximum(n - window, 0.0) if window else np.zeros_like(n)
    return float((n**2 - beyond**2).sum() / 2)


def lengths_of(trajectories: Iterable[Trajectory]) -> tuple[list[int], int]:
    """Tokens of every sequence that is learnt from, as `collate` lays them end to end, and how many are trained on."""
    held: dict[tuple[int, str, int], int] = {}
    trained = 0
    for number, t in enumerate(t for t in trajectories if t.status != "failed"):
        for turn in iterate(t.turns):
            said = [(d.by or turn.agent, d.action.span) for d in turn.drafts] + [(turn.agent, turn.action.span)]
            for agent, span in said:
                if span is not None:
                    key = (number, agent, span.branch)
                    begun = span.parent[1] if span.parent is not None else 0
                    held[key] = held.get(key, begun) + len(span.prompt) + len(span.ids) + len(span.suffix)
            trained += len(turn.action.span.ids) if turn.action.span is not None else 0
    return list(held.values()), trained


def utilisation(
    model: Any, trajectories: Iterable[Trajectory], seconds: float, *, epochs: int = 1, ranks: int = 1
) -> dict[str, float]:
    """Of an update that went over these trajectories `epochs` times: tokens a second, context included, and the model's
    FLOP utilisation: useful operations over what `ranks` machines like this one could have done in the time."""
    lengths, trained = lengths_of(trajectories)
    able = ranks * peak_of(model) * seconds
    useful = epochs * training(shape(model), lengths, trained).useful
    return {"learn_tokens_per_second": epochs * sum(lengths) / seconds, "mfu": useful / able}


def peak_of(model: Any) -> float:
    """Operations a second where this model computes, with the threads of now. Measured by the first call: let that be
    while nothing else computes."""
    like = next(model.parameters())
    return peak(str(like.device), like.dtype, torch.get_num_threads())


@lru_cache
def peak(device: str, dtype: torch.dtype, threads: int) -> float:
    """Operations a second: of the datasheet for a known GPU in 16 bits, else of a large product, measured once."""
    if device.startswith("cuda") and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        known = next((speed for part, speed in DATASHEET.items() if part in name), None)
        if known:
            return known
    side = 4096 if device.startswith("cuda") else 1024
    return measured(device, dtype, (side, side, side))


def measured(device: str, dtype: torch.dtype, sides: tuple[int, int, int], repeats: int = 5) -> float:
    """Operations a second of [a, b] @ [b, c], the best of some tries."""
    a, b, c = sides
    x, w = torch.ones(a, b, device=device, dtype=dtype), torch.ones(b, c, device=device, dtype=dtype)
    best = min(_timed(x, w) for _ in range(repeats))
    return 2.0 * a * b * c / best


def _timed(x: torch.Tensor, w: torch.Tensor) -> float:
    started = time.perf_counter()
    found = x @ w
    found[0, 0].item()  # waits for a GPU
    return time.perf_counter() - started
