"""Operations by family. Each is one function from a table to a node, with its paper beside it."""

from agentgym.rewards.nodes import Op
from agentgym.rewards.ops import gates, groups, shapes, sums, watchers

OPS: dict[str, Op] = {**sums.OPS, **groups.OPS, **gates.OPS, **shapes.OPS, **watchers.OPS}
