"""Tokenizers, models in hub format, packed attention and chunked log-probs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from agentgym.errors import ModelError
from agentgym.modeling import build, logprobs, tokenizer
from agentgym.types import Batch

LENGTHS = (5, 40, 1, 17, 33, 33)


def pack(lengths: tuple[int, ...], vocab: int, mask: Any = None) -> Batch:
    """Random sequences packed end to end."""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    n = int(bounds[-1])
    zeros = np.zeros(n, np.float32)
    return Batch(
        ids=np.random.default_rng(0).integers(0, vocab, n).astype(np.int32),
        positions=np.concatenate([np.arange(k) for k in lengths]).astype(np.int32),
        bounds=bounds,
        mask=np.ones(n, np.float32) if mask is None else mask,
        advantages=zeros,
        logprobs=zeros,
        versions=zeros.astype(np.int32),
        turns=zeros.astype(np.int32),
        owners=np.arange(len(lengths), dtype=np.int32),
        segments=zeros.astype(np.int16),
    )


def one_by_one(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin: every sequence alone, all logits at once."""
    logs, entropies = [], []
    for a, b in zip(batch.bounds[:-1], batch.bounds[1:], strict=True):
        ids = torch.from_numpy(batch.ids[a:b].astype(np.int64))[None]
        full = model(ids).logits[0, :-1].log_softmax(-1)
        zero = torch.zeros(1)
        logs += [zero, full.gather(-1, ids[0, 1:, None])[:, 0]]
        entropies += [zero, -(full.exp() * full).sum(-1)]
    return torch.cat(logs), torch.cat(entropies)


def small(cls: Any, config: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.2,
    }
    return cls(config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **more})).eval()


MODELS = {
    "qwen3": lambda: build.tiny(50, hidden=32, layers=2, seed=1),
    "llama": lambda: small(LlamaForCausalLM, LlamaConfig),
    "mistral with a window of 8": lambda: small(MistralForCausalLM, MistralConfig, sliding_window=8),
}


@pytest.mark.parametrize("chunk", [16, None])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_sequence_by_sequence_with_gradients(name: str, chunk: int | None) -> None:
    model = MODELS[name]()
    batch = pack(LENGTHS, 50)
    weights = torch.randn(len(batch.ids), 2)
    grads = []
    values = []
    for compute in (lambda: logprobs.token_logprobs(model, batch, chunk=chunk), lambda: one_by_one(model, batch)):
        model.zero_grad()
        found = torch.stack(compute(), -1)
        (found * weights).sum().backward()
        values.append(found.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert (values[0][batch.positions == 0] == 0).all()


def test_masked_only_leaves_prompts_at_zero_and_agrees_elsewhere() -> None:
    model = build.tiny(50, hidden=32, layers=1)
    mask = (np.arange(sum(LENGTHS)) % 3 == 0).astype(np.float32)
    batch = pack(LENGTHS, 50, mask)
    with torch.no_grad():
        whole, entropy = logprobs.token_logprobs(model, batch, temperature=0.7)
        part, none = logprobs.token_logprobs(model, batch, temperature=0.7, masked_only=True, entropy=False)
    assert (part[mask == 0] == 0).all()
    torch.testing.assert_close(part[mask == 1], whole[mask == 1])
    assert entropy.max() > 1
    assert none.abs().max() == 0


def test_temperature_divides_logits() -> None:
    hidden, head = torch.eye(2), logprobs.Head(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    value, entropy = logprobs.chunked_logprobs(hidden, torch.tensor([0, 0]), head, temperature=2.0)
    assert value.tolist() == pytest.approx([-np.log(1 + np.exp(-1)), -np.log(2)])
    p = 1 / (1 + np.exp(-1))
    assert entropy.tolist() == pytest.approx([-p * np.log(p) - (1 - p) * np.log(1 - p), np.log(2)])


def test_unembedding_knows_caps_and_scales() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    head = logprobs.Head(weight, None, 0.5, 3.0)
    torch.testing.assert_close(head.logits(hidden), 3 * torch.tanh(hidden @ weight.T * 0.5 / 3))


def test_closed_vocabulary_round_trip_and_unknown_words() -> None:
    made = tokenizer.closed_vocabulary(["blue", "shoe", "r1", "blue"])
    assert made.decode(made.encode("blue  shoe\nr1 <tool_call>")) == "blue shoe r1 <tool_call>"
    assert made.convert_ids_to_tokens(made.encode("blue hat")) == ["blue", "<unk>"]
    assert len(set(made.get_vocab().values())) == len(made)
    with pytest.raises(ModelError, match="two words"):
        tokenizer.closed_vocabulary(["two words"])


def test_bpe_survives_any_text() -> None:
    made = tokenizer.train_bpe(["the cat sat on the mat"] * 9, 300)
    text = 'the cat: {"größe": "北京 🙂"}\n\n<tool_call> the mat'
    assert made.decode(made.encode(text)) == text
    assert len(made.encode("the cat")) < 7
    assert made.convert_tokens_to_ids("<tool_call>") in made.encode(text)
    with pytest.raises(ModelError, match="at least"):
        tokenizer.train_bpe(["x"], 100)


def test_tiny_depends_on_its_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build.tiny(40, seed=1), build.tiny(40, seed=1), build.tiny(40, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.lm_head.weight is a.model.embed_tokens.weight
    assert 0.5e6 < build.parameters(a) < 0.7e6


@pytest.mark.parametrize("name", MODELS)
def test_hub_format_round_trip(name: str, tmp_path: Path) -> None:
    model, made = MODELS[name](), tokenizer.closed_vocabulary(f"w{i}" for i in range(30))
    path = build.save(model, made, tmp_path / "model")
    assert (path / "model.safetensors").is_file()
    again, read = build.load(path), tokenizer.load(path)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert read.chat_template == made.chat_template
    assert read.encode("w3 <|im_end|>") == made.encode("w3 <|im_end|>")


def experts() -> Any:
    """transformers keeps the weights of all experts in one tensor; files have one for each."""
    sizes = {"num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=40, hidden_size=32, num_attention_heads=4, head_dim=8, **sizes)
    )


@pytest.mark.parametrize("name", [*MODELS, "experts"])
def test_an_engine_elsewhere_takes_over_what_a_file_would_hold(name: str, tmp_path: Path) -> None:
    model = (MODELS | {"experts": experts})[name]()
    saved = load_file(build.save(model, None, tmp_path / "model") / "model.safetensors")
    save_file({n: x.contiguous() for n, x in build.weights(model)}, tmp_path / "weights")
    taken = load_file(tmp_path / "weights")
    assert taken.keys() == saved.keys()
    assert all(torch.equal(taken[n], saved[n]) for n in saved)


def test_saving_replaces_the_whole_folder_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.save(build.tiny(40, seed=1), None, tmp_path / "model")
    (path / "stray").write_text("from before")
    old = build.load(path).lm_head.weight

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            build.save(build.tiny(40, seed=2), None, path)
    assert torch.equal(build.load(path).lm_head.weight, old)
    build.save(build.tiny(40, seed=2), None, path)
    assert not torch.equal(build.load(path).lm_head.weight, old)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (path / "stray").exists()


def test_missing_and_broken_folders_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model folder .*hub format"):
        build.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"config.json is missing \(it holds notes.txt\)"):
        build.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ModelError, match="cannot load"):
        build.load(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer"):
        tokenizer.load(tmp_path)
