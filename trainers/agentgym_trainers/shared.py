"""Weights in memory that two processes see: the learner writes them, the rollouts read them.

    block = Block.of(model)                 # the learner: memory with the weights of now
    block.write(model)                      # and the weights of later
    Block(block.fd, block.places)           # another process, which was given the file descriptor

The memory has no name, so nothing has to clean it up: it ends with the last process that holds it, however that ends.
It holds what training moves; with adapters that is the adapters alone.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from agentgym.errors import ModelError

ALIGN = 64
"""Bytes; as torch lays its own tensors, on which the last bits of a product may hang."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies in the block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Block:
    """The memory behind the file descriptor `fd`, as tensors by name; see the module."""

    def __init__(self, fd: int, places: Sequence[Place]) -> None:
        self.fd, self.places = fd, tuple(places)
        memory = mmap.mmap(fd, os.fstat(fd).st_size)
        self.tensors = {place.name: _view(memory, place) for place in places}

    @classmethod
    def of(cls, model: Any) -> Block:
        """New memory with the weights of now."""
        places = list(_placed(model))
        last = places[-1]
        fd = _nameless(last.offset + _bytes(last))
        block = cls(fd, places)
        block.write(model)
        return block

    @torch.no_grad()
    def write(self, model: Any) -> None:
        """Take the weights of `model` over."""
        for name, p in _moving(model):
            self.tensors[name].copy_(p)

    def attach(self, model: Any) -> None:
        """On the CPU the parameters of `model` lie in the block from now on; elsewhere they are copied by `read`."""
        own = dict(model.named_parameters())
        for name, held in self.tensors.items():
            if name not in own or own[name].shape != held.shape or own[name].dtype != held.dtype:
                raise ModelError(f"the shared weights hold {name} {tuple(held.shape)}, and this model does not")
            if own[name].device.type == "cpu":
                own[name].data = held
        self.read(model)

    @torch.no_grad()
    def read(self, model: Any) -> None:
        """Give `model` the weights of the block, where they do not lie in it."""
        own = dict(model.named_parameters())
        for name, held in self.tensors.items():
            if own[name].data_ptr() != held.data_ptr():
                own[name].copy_(held)

    def close(self) -> None:
        """Let go of the file descriptor; the memory goes with its last tensor."""
        os.close(self.fd)


def _moving(model: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def _placed(model: Any) -> Iterator[Place]:
    offset = 0
    for name, p in _moving(model):
        place = Place(name=name, dtype=str(p.dtype).removeprefix("torch."), shape=tuple(p.shape), offset=offset)
        yield place
        offset += -(-_bytes(place) // ALIGN) * ALIGN


def _bytes(place: Place) -> int:
    size: int = torch.Size(place.shape).numel() * getattr(torch, place.dtype).itemsize
    return size


def _view(memory: mmap.mmap, place: Place) -> Tensor:
    count = torch.Size(place.shape).numel()
    flat = torch.frombuffer(memory, dtype=getattr(torch, place.dtype), count=count, offset=place.offset)
    return flat.view(place.shape)


def _nameless(size: int) -> int:
    """A file descriptor of memory without a name; where the system has none, of a file that is deleted already."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("agentgym-weights")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
