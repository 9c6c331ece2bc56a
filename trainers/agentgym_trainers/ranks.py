"""Several processes, one learner: what its ranks exchange. Without `torch.distributed` there is one rank.

Every rank holds the same weights and its own trajectories. Counts, figures and the tokens of coupled objectives are
gathered, gradients summed, so that N ranks take the step that one process with all the trajectories takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def gather(x: T) -> list[T]:
    """Everybody's `x` (pickled: tensors on the CPU), in the order of the ranks."""
    if count() == 1:
        return [x]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, x)
    return found


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes its sum over the ranks; where no rank has one it stays None."""
    if count() == 1:
        return
    held = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    for p, some in zip(parameters, held.tolist(), strict=True):
        if some:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
