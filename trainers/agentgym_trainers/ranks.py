"""Several processes, one learner: what its ranks exchange. Without `torch.distributed` there is one rank.

Every rank holds the same weights (or its shard of them), is given the same trajectories and takes its share of each
optimiser step. Counts, figures and the tokens of coupled objectives are gathered, gradients summed, so that N ranks
take the step that one process takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from agentgym.errors import ModelError

T = TypeVar("T")


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def share(sizes: Sequence[int]) -> list[int]:
    """Which of the items this rank takes, ascending: the largest first, each to the rank that has least."""
    load, mine = [0] * count(), []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = load.index(min(load))
        load[least] += sizes[i]
        if least == rank():
            mine.append(i)
    return sorted(mine)


def gather(x: T) -> list[T]:
    """Everybody's `x` (pickled: tensors on the CPU), in the order of the ranks. `RankError` where one of them has left
    (see `together`) or died."""
    if count() == 1:
        return [x]
    found: list[Any] = [None] * count()
    with alive():
        dist.all_gather_object(found, x)
    for number, held in enumerate(found):
        if isinstance(held, _Left):
            raise RankError(f"rank {number} of {count()} stopped: {held.why}")
    return found


@torch.no_grad()
def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Each gradient becomes its sum over the ranks; where no rank has one it stays None."""
    if count() == 1:
        return
    held = gather([p.grad is not None for p in parameters])
    with alive():
        for p, there in zip(parameters, zip(*held, strict=True), strict=True):
            if any(there):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)


# --- when a rank fails ------------------------------------------------------------------------------------------


class RankError(ModelError):
    """Another rank failed, and this one cannot go on without it."""


class _Left(NamedTuple):
    """What a rank that stops says in place of what is gathered."""

    why: str


@contextmanager
def together(*, sharded: bool = False) -> Iterator[None]:
    """What one rank raises in here ends all: the others get a `RankError` where they next gather, at the latest at the
    end of this block. In a pass over shards nobody listens; there a rank that raises is one that is gone."""
    try:
        yield
    except RankError:
        raise
    except Exception as error:
        if count() > 1 and not sharded:
            dist.all_gather_object([None] * count(), _Left(f"{type(error).__name__}: {error}"))
        raise
    gather(None)


@contextmanager
def alive() -> Iterator[None]:
    """Say clearly that a rank is gone, where torch speaks of closed connections."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, ModelError):
            raise
        raise RankError(
            f"rank {rank()} of {count()} waits for one that is gone or stuck ({str(error).splitlines()[0]:.200}). See "
            "what that one said last; the run can be resumed"
        ) from error
