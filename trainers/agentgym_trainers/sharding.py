"""FSDP2: parameters, gradients and optimiser states in shards over all ranks, a layer whole only while it is at work.

    shard(model)                              # in place: its parameters are DTensors from now on
    logp = within(model, lambda: read(model)) # whatever touches the weights runs as the model's forward pass
    weights = full_weights(model)             # whole again, on rank 0

Gradients are summed over the ranks, not averaged: losses divide by the counts of all of them already. All ranks run the
same passes, as each of them gathers shards. Nothing here needs torch.distributed before something is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from agentgym.errors import ConfigError
from agentgym.modeling.layers import layers_of
from agentgym_trainers import ranks

T = TypeVar("T")
ALONE = (
    "optim.sharded = true spreads a model over several processes, and this is one: start the run with "
    "'torchrun --nproc-per-node N -m agentgym train ...', or set it to false"
)


def shard(module: Any) -> None:
    """Shard a causal language model over all ranks: a group for each decoder layer, one for the rest. A model that is
    sharded stays as it is. `ConfigError` in a single process, `ModelError` where no list of layers is found."""
    if sharded(module):
        return
    if ranks.count() == 1:
        raise ConfigError(ALONE)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(next(module.parameters()).device.type, (ranks.count(),))
    half = any(p.dtype == torch.bfloat16 for p in module.parameters())
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    for part in (*layers_of(module), module):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    module.within = MethodType(lambda self, function: function(), module)
    register_fsdp_forward_method(module, "within")


def sharded(module: Any) -> bool:
    return hasattr(module, "within")


def within(module: Any, function: Callable[[], T]) -> T:
    """What the function gives (tensors), called as the module's forward pass: its weights are whole meanwhile, the
    unembedding too, and what has gradient leads back to the shards."""
    found: T = module.within(function) if sharded(module) else function()
    return found


def local(x: Tensor) -> Tensor:
    """This rank's shard, sharing memory; a plain tensor is its own."""
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found


def whole(x: Tensor) -> Tensor:
    """All shards of a tensor put together, which all ranks do at once."""
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found


def assembled(shard: Tensor, like: Any) -> Tensor:
    """The whole tensor, of a copy of a shard that lies as `like` does."""
    if not hasattr(like, "device_mesh"):
        return shard
    from torch.distributed.tensor import DTensor

    layout: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    found = DTensor.from_local(shard.to(like.device), like.device_mesh, like.placements, **layout)
    return whole(found)


def parted(x: Tensor, like: Any) -> Tensor:
    """A whole tensor laid out as `like` is."""
    if not hasattr(like, "device_mesh") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, whole and on the CPU: on rank 0, nothing on the others. All ranks call it."""
    found = {}
    for name, x in module.state_dict().items():
        x = whole(x)
        if ranks.rank() == 0:
            found[name] = x.to("cpu", copy=True)
    return found
