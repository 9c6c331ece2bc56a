"""Chat messages to token ids, once per turn, and replies back to text and tool calls.

    conversation = Renderer(tokenizer).conversation()
    prompt = conversation.observe(messages, tools)     # ids the new messages add, generation prompt included
    suffix = conversation.reply(sampled_ids)           # a missing end mark, which nobody sampled

Sampled ids are authoritative: they are never decoded and encoded again. What new messages add is rendered after a
stand-in conversation and cut behind its end mark. Because an end mark is a special token, at which every tokenizer
cuts its text, ids turn by turn equal ids of the whole conversation wherever the sampled text was canonical.

Some templates rewrite what was said (Qwen3 drops thinking of earlier turns). One probe per tokenizer finds them out;
`history` says what to do: "append" keeps what was said and adds to it, "branch" begins a new token sequence where the
template's text departs from what was said, "refuse" raises.
"""

from __future__ import annotations

import copy
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from agentgym.errors import ModelError
from agentgym.modeling.templates import CHATML
from agentgym.types import Action, Image, Message, Segment, Text, ToolCall

History = Literal["append", "branch", "refuse"]
Tools = Sequence[dict[str, Any]]

_STAND_IN = "stand-in-reply"
_THOUGHT = "<think>\nprobing thought\n</think>\n\nprobing answer"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_PARTS = {"think": ("<think>", "</think>"), "tool": ("<tool_call>", "</tool_call>")}
_MARK = re.compile("|".join(mark for marks in _PARTS.values() for mark in marks))


class Prompt(NamedTuple):
    """Ids to add to a branch before sampling. `parent` is set where the branch is new: (branch, length) it shares.

    `rerendered` counts ids of `ids` that repeat earlier turns: the price of branching, in training tokens.
    """

    ids: list[int]
    branch: int = 0
    parent: tuple[int, int] | None = None
    rerendered: int = 0


def parse(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split a reply into its text and its Hermes-style tool calls. A call that is no valid JSON stays text."""
    calls: list[ToolCall] = []

    def take(found: re.Match[str]) -> str:
        call = _read_call(found[1], f"call_{len(calls)}")
        if call is None:
            return found[0]
        calls.append(call)
        return ""

    content = _CALL.sub(take, text)
    return (content.strip() if calls else text), tuple(calls)


class Mark(NamedTuple):
    """The tokens [start, stop) that hold a mark."""

    text: str
    start: int
    stop: int


def _between(marks: Sequence[Mark], label: str, total: int) -> Iterator[slice]:
    """The tokens of each part of this label, marks included. Thinking may have been begun by the prompt."""
    begin, end = _PARTS[label]
    mine = [m for m in marks if m.text in (begin, end)]
    opened = 0 if label == "think" and mine and mine[0].text == end else None
    for mark in mine:
        if mark.text == begin and opened is None:
            opened = mark.start
        elif mark.text == end and opened is not None:
            yield slice(opened, mark.stop)
            opened = None
    if opened is not None:
        yield slice(opened, total)


def _read_call(text: str, id: str) -> ToolCall | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    return ToolCall(name=value["name"], arguments=arguments, id=id) if isinstance(arguments, dict) else None


def as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it; `ModelError` for an image, which text alone cannot carry."""
    if not isinstance(message.content, str) and any(isinstance(part, Image) for part in message.content):
        raise ModelError("this renderer speaks text and got an image; describe it, or use a model that sees")
    found: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.name:
        found["name"] = message.name
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return found


def with_hint(messages: Sequence[Message], hint: str) -> tuple[Message, ...]:
    """The messages with a hint behind them: in the last one where the user speaks it (some templates want speakers to
    take turns), else as a message of the user."""
    if not messages or messages[-1].role != "user":
        return (*messages, Message(role="user", content=hint))
    said = messages[-1].content
    behind: Any = f"{said}\n\n{hint}" if isinstance(said, str) else (*said, Text(text=f"\n\n{hint}"))
    return (*messages[:-1], messages[-1].replace(content=behind))


class Renderer:
    """The chat template of one tokenizer. Stateless, shared by all sessions; see `Conversation` for one of them.

    `template` replaces the tokenizer's own: "chatml" for the shipped one, or the text of a Jinja template.
    Raises `ModelError` where there is no template, where it does not mark the end of a reply, or where it rewrites
    history and `history` is "refuse".
    """

    def __init__(self, tokenizer: Any, history: History = "append", *, template: str | None = None) -> None:
        if history not in get_args(History):
            raise ModelError(f"history is one of {', '.join(get_args(History))}; got {history!r}")
        self.tokenizer = tokenizer
        self.history = history
        self.template = CHATML if template == "chatml" else template or tokenizer.chat_template
        if not self.template:
            raise ModelError(
                "this tokenizer has no chat template; pass template='chatml' (or a Jinja template), or set"
                " tokenizer.chat_template and save it with the model"
            )
        self._first = lru_cache(maxsize=256)(self._render_first)
        self.end_text, self.end_id = self._find_end()
        if history == "refuse" and self.rewrites:
            raise ModelError(
                "this chat template rewrites earlier turns; choose history='append' (keep what was said) or"
                " history='branch' (a new token sequence at each rewrite)"
            )

    def text(self, messages: Sequence[dict[str, Any]], tools: Tools = (), *, prompt: bool) -> str:
        """The template's text of a whole conversation; `prompt` adds the opening of a reply."""
        try:
            found: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except Exception as error:  # templates raise whatever they like
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(f"the chat template refused messages of roles {roles}: {error}") from error
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of rendered text; nothing is added to it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, marks included."""
        found: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return found

    def start(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Ids of a conversation's beginning, up to where the reply is sampled."""
        return list(self._first(msgspec.json.encode((tuple(messages), tuple(tools)))))

    def _render_first(self, packed: bytes) -> tuple[int, ...]:
        messages, tools = msgspec.json.decode(packed, type=tuple[tuple[Message, ...], tuple[dict[str, Any], ...]])
        return tuple(self.encode(self.text([as_dict(m) for m in messages], tools, prompt=True)))

    def extend(self, messages: Sequence[Message]) -> list[int]:
        """Ids that new messages add behind the end mark of a reply, up to where the next reply is sampled."""
        return self.encode(self.extension([as_dict(m) for m in messages]))

    def extension(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text that new messages add behind the end mark of a reply."""
        whole = self.text([*self._stand_in, *messages], prompt=True)
        _, _, behind = whole.partition(_STAND_IN)
        return behind.removeprefix(self.end_text)

    def suffix(self, ids: Sequence[int]) -> list[int]:
        """The end mark, unless the reply was sampled with one."""
        return [] if ids and ids[-1] in self.end_ids else [self.end_id]

    def reply(self, ids: Sequence[int]) -> tuple[str, tuple[ToolCall, ...]]:
        """Text and tool calls of a sampled reply; its end mark is not part of the text."""
        ended = bool(ids) and ids[-1] in self.end_ids
        return parse(self.decode(ids[:-1] if ended else ids))

    def segments_of(self, ids: Sequence[int]) -> tuple[Segment, ...]:
        """A sampled reply in parts, marks included: "think", "tool" (a call), and "answer" for all else.

        A part that is not closed reaches to the end. Nothing is looked up for marks that are tokens of their own.
        """
        labels, marks = ["answer"] * len(ids), self._marks(ids)
        for label in _PARTS if marks else ():
            for part in _between(marks, label, len(ids)):
                labels[part] = [label] * (part.stop - part.start)
        runs = [(label, len(list(run))) for label, run in groupby(labels)]
        stops = accumulate(length for _, length in runs)
        return tuple(
            Segment(label=label, start=stop - length, stop=stop)
            for (label, length), stop in zip(runs, stops, strict=True)
        )

    def _marks(self, ids: Sequence[int]) -> list[Mark]:
        """Where marks lie, first to last."""
        if self._mark_ids is not None:
            return [Mark(self._mark_ids[i], n, n + 1) for n, i in enumerate(ids) if i in self._mark_ids]
        if not _MARK.search(self.decode(ids)):
            return []
        pieces = [self.decode([i]) for i in ids]
        ends = list(accumulate(map(len, pieces)))
        found = _MARK.finditer("".join(pieces))
        return [Mark(m[0], bisect_right(ends, m.start()), bisect_right(ends, m.end() - 1) + 1) for m in found]

    @cached_property
    def _mark_ids(self) -> dict[int, str] | None:
        """Marks by id; None where one of them is not a single token."""
        found = {mark: self.encode(mark) for marks in _PARTS.values() for mark in marks}
        known = set(self.tokenizer.get_added_vocab().values())
        whole = all(len(ids) == 1 and ids[0] in known for ids in found.values())
        return {ids[0]: mark for mark, ids in found.items()} if whole else None

    def ids_of(self, action: Action) -> list[int]:
        """Ids of an action as the template writes it, end mark included: what a model would have to sample."""
        asked = {"role": "user", "content": "x"}
        said = as_dict(Message(role="assistant", content=action.text, tool_calls=action.tool_calls))
        opening = self.text([asked], prompt=True)
        whole = self.text([asked, said], prompt=False)
        body = whole.removeprefix(opening) if whole.startswith(opening) else action.text + self.end_text
        end = body.rfind(self.end_text)
        return self.encode(body[: end + len(self.end_text)])

    def conversation(self) -> Conversation:
        return Conversation(self)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a reply: the template's end mark and the tokenizer's own end of sequence."""
        return frozenset({self.end_id, *([] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id])})

    @cached_property
    def rewrites(self) -> bool:
        """Whether the template changes what was said once the conversation goes on. Probed once."""
        asked, more = {"role": "user", "content": "probing"}, {"role": "user", "content": "going on"}
        said = {"role": "assistant", "content": _THOUGHT}
        appended = self.text([asked], prompt=True) + _THOUGHT + self.end_text + self.extension([more])
        return self.text([asked, said, more], prompt=True) != appended

    @property
    def _stand_in(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": "x"}, {"role": "assistant", "content": _STAND_IN}]

    def _find_end(self) -> tuple[str, int]:
        """The special token that the template puts behind a reply: (text, id)."""
        whole = self.text(self._stand_in, prompt=False)
        _, found, behind = whole.partition(_STAND_IN)
        special = {t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        marks = [t for t in special if found and behind.startswith(t)]
        if not marks:
            raise ModelError(
                f"the chat template ends a reply with {behind[:20]!r}, which begins with no special token, so turns"
                " cannot be rendered one by one; pass template='chatml'"
            )
        mark = max(marks, key=len)
        return mark, special[mark]


class Conversation:
    """The token sequences of one session. Owned by one session; not shared.

    `ids` is the running branch: prompts, sampled ids and suffixes end to end. A branch is the concatenation of its
    spans; earlier branches are in the records.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.ids: list[int] = []
        self.branch = 0
        self.rerendered = 0
        self._messages: list[dict[str, Any]] = []
        self._tools: Tools = ()
        self._branching = renderer.history == "branch" and renderer.rewrites

    def fork(self) -> Conversation:
        """An independent copy."""
        twin = copy.copy(self)
        twin.ids, twin._messages = list(self.ids), list(self._messages)
        return twin

    def observe(self, messages: Sequence[Message], tools: Tools = ()) -> Prompt:
        """Add what is new since the last reply."""
        if self._branching:
            self._messages += [as_dict(m) for m in messages]
            self._tools = self._tools or tools
        if not self.ids:
            prompt = Prompt(self.renderer.start(messages, tools))
        elif self._branching:
            prompt = self._rerender()
        else:
            prompt = Prompt(self.renderer.extend(messages), self.branch)
        if prompt.parent is not None:
            self.branch, self.rerendered = prompt.branch, self.rerendered + prompt.rerendered
            del self.ids[prompt.parent[1] :]
        self.ids += prompt.ids
        return prompt

    def reply(self, ids: Sequence[int]) -> list[int]:
        """Add a sampled reply; the suffix that ends it where it did not end itself."""
        suffix = self.renderer.suffix(ids)
        self.ids += [*ids, *suffix]
        if self._branching:
            ended = not suffix
            said = self.renderer.decode(ids[:-1] if ended else ids)
            self._messages.append({"role": "assistant", "content": said})
        return suffix

    def _rerender(self) -> Prompt:
        """Extend the branch where the template kept its text; else fork where the two texts depart."""
        whole = self.renderer.text(self._messages, self._tools, prompt=True)
        said = self.renderer.decode(self.ids)
        if whole.startswith(said):
            return Prompt(self.renderer.encode(whole[len(said) :]), self.branch)
        ids = self.renderer.encode(whole)
        shared = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(self.ids))
        new = len(self.renderer.encode(self.renderer.extension(self._messages[self._last_reply() + 1 :])))
        return Prompt(ids[shared:], self.branch + 1, (self.branch, shared), len(ids) - shared - new)

    def _last_reply(self) -> int:
        return max(i for i, m in enumerate(self._messages) if m["role"] == "assistant")
