"""Exact token records of a conversation that the server renders: what each call adds to what is recorded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from agentgym.types import Floats, Ids, Sampling, TokenSpan, VersionRun
from agentgym_policies.endpoint.wire import Tokens

Finish = Literal["stop", "length", ""]
FINISH: dict[str | None, Finish] = {"stop": "stop", "tool_calls": "stop", "function_call": "stop", "length": "length"}
"""What servers call the end of a reply, in our words."""


VERSIONS = (VersionRun(start=0, version=0),)
"""A server's weights are taken to be one version: who changes them under a client must not train on what it records."""


class Branches:
    """One session's token sequences. The server's prompt is the truth: as long as it begins with all that was recorded,
    it extends the branch; where it departs (a template that rewrites what was said), a new branch forks there."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.branch = 0

    def span(self, tokens: Tokens, sampling: Sampling, finish: str | None, *, hinted: bool) -> TokenSpan:
        """The record of one call."""
        shared, parent = common(self.ids, tokens.prompt), None
        if shared < len(self.ids):
            parent, self.branch = (self.branch, shared), self.branch + 1
        self.ids = [*tokens.prompt, *tokens.ids]
        return TokenSpan(
            prompt=Ids(tokens.prompt[shared:]),
            ids=Ids(tokens.ids),
            logprobs=Floats(tokens.logprobs),
            versions=VERSIONS,
            sampling=sampling,
            finish=FINISH.get(finish, ""),
            branch=self.branch,
            parent=parent,
            context="hinted" if hinted else "original",
        )


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    if other[: len(one)] == one:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
