"""The renderer: turn by turn equals the whole conversation where it should, and says so where it cannot."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentgym.errors import ModelError
from agentgym.modeling.renderer import Renderer, as_dict, parse
from agentgym.modeling.tokenizer import closed_vocabulary, train_bpe
from agentgym.types import Image, MediaRef, Message, Segment, Text, ToolCall

QWEN3_LIKE = r"""
{%- if tools %}{{- '<|im_start|>system\nTools: ' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
"""Drops the thinking of turns before the last question, as Qwen3's template does."""

TOOLS = ({"type": "function", "function": {"name": "find", "parameters": {}}},)
TURNS: list[tuple[tuple[Message, ...], str]] = [
    ((Message(role="system", content="be kind"), Message(role="user", content="find it")), "I look\n<tool_call>\n{}"),
    ((Message(role="tool", content="a shoe"), Message(role="tool", content="a hat")), "two  things"),
    ((Message(role="user", content="which?"),), "the hat"),
    ((), "still the hat"),
]


@pytest.fixture(scope="module")
def bpe() -> Any:
    return train_bpe(["<|im_start|>user find it a shoe a hat which the things thought answer"] * 5, 340)


def whole(renderer: Renderer, turns: list[tuple[tuple[Message, ...], str]], tools: Any = ()) -> list[int]:
    """The whole conversation in one go, last reply included."""
    messages: list[dict[str, Any]] = []
    for said, reply in turns:
        messages += [{"role": m.role, "content": m.text} for m in said]
        messages.append({"role": "assistant", "content": reply})
    return renderer.encode(renderer.text(messages, tools, prompt=False).rstrip("\n"))


@pytest.mark.parametrize("template", ["chatml", QWEN3_LIKE], ids=["chatml", "qwen3-like"])
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["no tools", "tools"])
def test_turn_by_turn_equals_the_whole_for_canonical_text(bpe: Any, template: str, tools: Any) -> None:
    renderer = Renderer(bpe, template=template)
    conversation = renderer.conversation()
    for turn, (messages, reply) in enumerate(TURNS):
        prompt = conversation.observe(messages, tools if turn == 0 else ())
        assert prompt.branch == 0
        sampled = [*bpe.encode(reply), renderer.end_id]
        assert conversation.reply(sampled) == []
        assert conversation.ids == whole(renderer, TURNS[: turn + 1], tools)


def test_sampled_ids_are_kept_where_their_text_has_a_shorter_tokenisation(bpe: Any) -> None:
    renderer = Renderer(bpe)
    canonical = bpe.encode("the things the things")
    spelled = [i for char in "the things the things" for i in bpe.encode(char)]
    assert renderer.decode(spelled) == renderer.decode(canonical)
    assert len(spelled) == 21 > 2 * len(canonical)
    conversation = renderer.conversation()
    start = conversation.observe(TURNS[0][0]).ids
    conversation.reply(spelled)
    extension = conversation.observe(TURNS[2][0]).ids
    assert conversation.ids == [*start, *spelled, renderer.end_id, *extension]
    assert extension == renderer.extend(TURNS[2][0])


def test_a_missing_end_mark_is_added_once(bpe: Any) -> None:
    renderer = Renderer(bpe)
    cut, ended = bpe.encode("I was cut"), [*bpe.encode("I ended"), renderer.end_id]
    assert renderer.suffix(cut) == [renderer.end_id]
    assert renderer.suffix(ended) == []
    assert renderer.suffix([]) == [renderer.end_id]
    assert renderer.reply(cut)[0] == "I was cut"
    assert renderer.reply(ended)[0] == "I ended"


def test_rewriting_templates_are_found_out(bpe: Any) -> None:
    assert not Renderer(bpe).rewrites
    assert Renderer(bpe, template=QWEN3_LIKE).rewrites
    with pytest.raises(ModelError, match="rewrites earlier turns; choose history='append'"):
        Renderer(bpe, "refuse", template=QWEN3_LIKE)
    assert Renderer(bpe, "refuse").history == "refuse"
    with pytest.raises(ModelError, match="append, branch, refuse"):
        Renderer(bpe, "rewrite")  # type: ignore[arg-type]


THOUGHT = "<think>\na long thought\n</think>\n\nthe answer"


def test_append_keeps_thinking_that_the_template_would_drop(bpe: Any) -> None:
    renderer = Renderer(bpe, "append", template=QWEN3_LIKE)
    conversation = renderer.conversation()
    conversation.observe(TURNS[0][0])
    conversation.reply([*bpe.encode(THOUGHT), renderer.end_id])
    before = list(conversation.ids)
    prompt = conversation.observe(TURNS[2][0])
    assert prompt.parent is None
    assert conversation.ids[: len(before)] == before
    assert "a long thought" in renderer.decode(conversation.ids)


def test_branch_follows_the_template_and_reports_its_price(bpe: Any) -> None:
    renderer = Renderer(bpe, "branch", template=QWEN3_LIKE)
    conversation = renderer.conversation()
    first = conversation.observe(TURNS[0][0])
    conversation.reply([*bpe.encode(THOUGHT), renderer.end_id])
    tools = conversation.observe(TURNS[1][0])  # no new question: the thought stays
    assert (tools.branch, tools.parent) == (0, None)
    conversation.reply([*bpe.encode("two things"), renderer.end_id])
    fork = conversation.observe(TURNS[2][0])
    assert fork.branch == 1
    assert fork.parent == (0, len(first.ids))
    messages = [("system", "be kind"), ("user", "find it"), ("assistant", "the answer"), ("tool", "a shoe")]
    messages += [("tool", "a hat"), ("assistant", "two things"), ("user", "which?")]
    text = renderer.text([{"role": r, "content": c} for r, c in messages], prompt=True)
    assert renderer.decode(conversation.ids) == text
    assert fork.rerendered == conversation.rerendered == len(fork.ids) - len(renderer.extend(TURNS[2][0]))


def test_no_template_is_one_error_with_the_way_out() -> None:
    tokenizer = closed_vocabulary(["a"])
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template; pass template='chatml'"):
        Renderer(tokenizer)
    assert Renderer(tokenizer, template="chatml").end_text == "<|im_end|>"


def test_templates_without_an_end_mark_and_broken_ones_are_refused(bpe: Any) -> None:
    with pytest.raises(ModelError, match="ends a reply with ' / '"):
        Renderer(bpe, template="{% for m in messages %}{{ m.content }} / {% endfor %}")
    with pytest.raises(ModelError, match="refused messages of roles user, assistant: only one"):
        Renderer(bpe, template="{{ raise_exception('only one') }}")


def test_a_closed_vocabulary_renders_its_words() -> None:
    renderer = Renderer(closed_vocabulary(["red", "shoe", "find"]))
    ids = renderer.start([Message(role="user", content="red shoe")])
    assert renderer.decode(ids) == "<|im_start|> user red shoe <|im_end|> <|im_start|> assistant"


def test_an_image_is_refused_and_not_dropped(bpe: Any) -> None:
    seen = Message(role="user", content=(Text(text="look"), Image(media=MediaRef(hash="abc"))))
    with pytest.raises(ModelError, match="got an image"):
        Renderer(bpe).start([seen])
    assert "look" in Renderer(bpe).extension([as_dict(Message(role="user", content=(Text(text="look"),)))])


def test_tool_calls_are_read_and_written() -> None:
    text = 'First.\n<tool_call>\n{"name": "find", "arguments": {"brand": "x", "n": 2}}\n</tool_call>'
    content, calls = parse(text)
    assert content == "First."
    assert calls == (ToolCall(name="find", arguments={"brand": "x", "n": 2}, id="call_0"),)
    written = Renderer(closed_vocabulary(["a"])).text(
        [
            {
                "role": "assistant",
                "content": "First.",
                "tool_calls": [{"function": {"name": "find", "arguments": calls[0].arguments}}],
            }
        ],
        prompt=False,
    )
    assert text in written


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "<tool_call>{not json}</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": "a", "arguments": 5}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        '<tool_call>{"name": "a"}',
    ],
)
def test_malformed_calls_stay_text(text: str) -> None:
    assert parse(text) == (text, ())


PARTS = [
    ("two words", ["answer"]),
    ("<think> deep </think> the hat", ["think", "answer"]),
    ("<think> deep", ["think"]),
    ("deep </think> <tool_call> find </tool_call>", ["think", "tool"]),
    ("I look <tool_call> find </tool_call> and <tool_call> find", ["answer", "tool", "answer", "tool"]),
    ("a </tool_call> stray <tool_call> find </tool_call> </think>", ["think", "tool", "think"]),
    ("a </tool_call> stray", ["answer"]),
    ("<think> a <tool_call> find </tool_call> b </think> c", ["think", "tool", "think", "answer"]),
    ("", []),
]


def plain_marks(texts: list[str]) -> Any:
    """A byte-level tokenizer to which the marks are text like any other."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")


@pytest.mark.parametrize("kind", ["closed", "bpe", "plain"])
@pytest.mark.parametrize(("text", "labels"), PARTS)
def test_a_reply_falls_into_thought_calls_and_answer(bpe: Any, kind: str, text: str, labels: list[str]) -> None:
    words = ["two", "words", "deep", "the", "hat", "find", "I", "look", "and", "a", "b", "c", "stray"]
    tokenizer = {"closed": lambda: closed_vocabulary(words), "bpe": lambda: bpe, "plain": lambda: plain_marks([text])}
    renderer = Renderer(tokenizer[kind](), template="chatml")
    ids = renderer.encode(text)
    parts = renderer.segments_of(ids)
    assert [p.stop for p in parts[:-1]] == [p.start for p in parts[1:]]
    assert (parts[0].start, parts[-1].stop) == (0, len(ids)) if ids else not parts
    solid = [p.label for p in parts if renderer.decode(ids[p.start : p.stop]).strip()]
    assert [label for label, _ in groupby(solid)] == labels


def test_parts_hold_their_marks_and_an_end_mark_belongs_to_the_answer() -> None:
    renderer = Renderer(closed_vocabulary(["deep", "hat"]))
    ids = [*renderer.encode("<think> deep </think> hat"), renderer.end_id]
    assert renderer.segments_of(ids) == (
        Segment(label="think", start=0, stop=3),
        Segment(label="answer", start=3, stop=5),
    )


def test_marks_that_are_text_take_the_tokens_that_touch_them() -> None:
    renderer = Renderer(plain_marks(["x<think>y</think>z"] * 3), template="chatml")
    ids = renderer.encode("é x<think>y</think>z é")
    assert renderer._mark_ids is None
    (before, thought, after) = renderer.segments_of(ids)
    assert [p.label for p in (before, thought, after)] == ["answer", "think", "answer"]
    said = renderer.decode(ids[thought.start : thought.stop])
    assert said.strip("xz") == "<think>y</think>"
