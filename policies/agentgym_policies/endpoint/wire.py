"""Chat completions as bytes: observations and sampling to the protocol, answers back to text, calls and tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from agentgym.modeling.renderer import as_dict, parse
from agentgym.types import Message, Sampling, ToolCall
from agentgym_policies.endpoint.client import Passing, message_of

# --- to the server ----------------------------------------------------------------------------------------------


def encoded(body: dict[str, Any]) -> bytes:
    """JSON; half of a surrogate pair, which UTF-8 cannot hold, goes as an escape."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return json.dumps(body).encode()


def drawn(sampling: Sampling) -> dict[str, Any]:
    """Sampling as the protocol spells it. `top_k` is no part of it and goes along only where it is set."""
    found: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.top_k:
        found["top_k"] = sampling.top_k
    if sampling.stop:
        found["stop"] = list(sampling.stop)
    return found


def wired(messages: Sequence[Message], open: Sequence[str]) -> list[dict[str, Any]]:
    """New messages as the protocol wants them behind a reply that called tools (`open`: the ids of those calls).

    Every call is answered, and before anything else is said: answers come first, one that is missing is empty. A tool
    message that answers no such call (the environment read a call in plain text) is said by the user.
    """
    answers = {id: {"role": "tool", "tool_call_id": id, "content": ""} for id in open}
    missing, others = set(open), []
    for message in messages:
        found = as_wire(message)
        if message.role != "tool":
            others.append(found)
        elif message.tool_call_id in missing:
            missing.remove(message.tool_call_id)
            answers[message.tool_call_id] = found
        else:
            others.append({"role": "user", "content": found["content"]})
    return [*answers.values(), *others]


def as_wire(message: Message) -> dict[str, Any]:
    """A message in the protocol: arguments are JSON in a string. `ModelError` for an image."""
    found = as_dict(message)
    for call in found.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    if message.role == "tool":
        found.pop("name", None)
    return found


# --- from the server --------------------------------------------------------------------------------------------


S = TypeVar("S", bound=msgspec.Struct)


class _Cached(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Spent(msgspec.Struct, gc=False):
    """Tokens of one call."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Function(msgspec.Struct, gc=False):
    name: str = ""
    arguments: str | dict[str, Any] | None = None


class _Call(msgspec.Struct, gc=False):
    function: _Function
    id: str | None = None


class Reply(msgspec.Struct, gc=False):
    """A chat completion's message, as far as it is read."""

    content: str | list[Any] | None = None
    refusal: str | None = None
    tool_calls: list[_Call] | None = None


class _Logprob(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Logprob] | None = None


class _ChatChoice(msgspec.Struct, gc=False):
    message: Reply
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """What the sampler read and drew: ids of the whole prompt [P], sampled ids [N] and their log-probs [N]."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]


class Chat(msgspec.Struct, gc=False):
    """A chat completion. `prompt_token_ids`, `token_ids` and their log-probs are vLLM's, and others' that follow it."""

    choices: list[_ChatChoice]
    usage: Spent | None = None
    prompt_token_ids: list[int] | None = None

    def tokens(self) -> Tokens | str:
        """The tokens behind the first choice, or the field that is missing."""
        choice = self.choices[0]
        said = choice.logprobs.content if choice.logprobs else None
        if self.prompt_token_ids is None:
            return "prompt_token_ids"
        if choice.token_ids is None:
            return "choices[0].token_ids"
        if said is None or len(said) != len(choice.token_ids):
            return "choices[0].logprobs.content, one for each of token_ids"
        return Tokens(self.prompt_token_ids, choice.token_ids, [each.logprob for each in said])


class _TextLogprobs(msgspec.Struct, gc=False):
    token_logprobs: list[float] | None = None


class _TextChoice(msgspec.Struct, gc=False):
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: _TextLogprobs | None = None


class Text(msgspec.Struct, gc=False):
    """A completion of a prompt."""

    choices: list[_TextChoice]
    usage: Spent | None = None

    def tokens(self) -> Tokens | str:
        """The same; the prompt is empty where the server does not repeat it."""
        choice = self.choices[0]
        said = choice.logprobs.token_logprobs if choice.logprobs else None
        if choice.token_ids is None:
            return "choices[0].token_ids"
        if said is None or len(said) != len(choice.token_ids):
            return "choices[0].logprobs.token_logprobs, one for each of token_ids"
        return Tokens(choice.prompt_token_ids or [], choice.token_ids, said)


class _Model(msgspec.Struct, gc=False):
    id: str


class Models(msgspec.Struct, gc=False):
    data: list[_Model]


def reader(kind: type[S]) -> Callable[[bytes], S]:
    """Reads answers with a good status; `Passing` where one is no JSON of this shape."""
    decoder = msgspec.json.Decoder(kind)

    def read(data: bytes) -> S:
        try:
            return decoder.decode(data)
        except (ValueError, RecursionError):
            return _leniently(data, kind)

    return read


A = TypeVar("A", Chat, Text)


def completions(kind: type[A]) -> Callable[[bytes], A]:
    """Reads completions; `Passing` also where none is there, or the server broke it off."""
    read = reader(kind)

    def choose(data: bytes) -> A:
        found = read(data)
        if not found.choices:
            raise Passing("unreadable", f"the endpoint's answer holds no choice: {message_of(data, {})}")
        if found.choices[0].finish_reason == "abort":
            raise Passing("aborted", "the server broke off its reply (finish_reason 'abort')")
        return found

    return choose


def _leniently(data: bytes, kind: type[S]) -> S:
    """With what json forgives: half of a surrogate pair."""
    try:
        return msgspec.convert(json.loads(data), kind)
    except (ValueError, RecursionError) as error:
        what = f"the endpoint's answer is not as agreed ({error}): {message_of(data, {})}"
        raise Passing("unreadable", what) from error


def understood(reply: Reply, turn: int, *, hermes: bool) -> tuple[str, tuple[ToolCall, ...]]:
    """Text and tool calls of a reply. `hermes`: where the server found no calls, those written in the text count.

    Calls without ids of their own get some that are new in the episode. Arguments that are no JSON object stay text.
    """
    text = _text(reply.content) or reply.refusal or ""
    calls: list[ToolCall] = []
    if hermes and not reply.tool_calls:
        text, written = parse(text)
        calls = [call.replace(id="") for call in written]
    for asked in reply.tool_calls or ():
        arguments = _arguments(asked.function.arguments)
        if arguments is None:
            text = f"{text}\n{_written(asked.function)}".lstrip("\n")
        else:
            calls.append(ToolCall(name=asked.function.name, arguments=arguments, id=asked.id or ""))
    ids = {call.id for call in calls}
    if "" in ids or len(ids) < len(calls):
        calls = [call.replace(id=f"call_{turn}_{number}") for number, call in enumerate(calls)]
    return text, tuple(calls)


def _text(content: str | list[Any] | None) -> str:
    """Of a message's content, which some servers cut into parts."""
    if not isinstance(content, list):
        return content or ""
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))


def _arguments(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not isinstance(given, str):
        return given or {}
    try:
        found = json.loads(given or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _written(function: _Function) -> str:
    """A call as models write it, its arguments as they came."""
    return f'<tool_call>\n{{"name": {json.dumps(function.name)}, "arguments": {function.arguments}}}\n</tool_call>'
