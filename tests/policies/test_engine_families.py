"""Hybrid and sliding-window models in the engine, and the two ways of decoding: all against the plain forward pass."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from agentgym.modeling import build
from agentgym.modeling.renderer import Renderer
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import Episode, Sampling, Task, TokenSpan, WeightsVersion, say
from agentgym_policies.slots import Row, SlotStore
from agentgym_policies.torch_engine import TorchEngine

TOKENIZER = closed_vocabulary(f"w{i}" for i in range(40))
ATOL = 1e-4
PATTERN = ["sliding_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sliding pattern": ("Qwen3", "SlotStore", {"layer_types": PATTERN, "use_sliding_window": True}),
    "sliding pattern with two ropes": ("Gemma3", "SlotStore", {"layer_types": PATTERN}),
    "experts": ("Qwen3Moe", "SlotStore", EXPERTS),
    "linear attention": (
        "Qwen3Next",
        "RowStore",
        {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16}
        | LINEAR
        | EXPERTS,
    ),
    "state space beside attention": ("FalconH1", "RowStore", {"mamba_d_ssm": 32, **MAMBA}),
    "state space, begun anew each turn": (
        "Jamba",
        "RowStore",
        {"num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
}


def tiny(family: str, seed: int) -> Any:
    name, _, more = FAMILIES[family]
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(name, name) + "Config")
    sizes: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "sliding_window": 8,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, name + "ForCausalLM")(config(**{**sizes, **more})).eval()


def gap(model: Any, spans: list[TokenSpan], of: slice) -> float:
    """The largest difference between what some spans recorded and one teacher-forced pass over the whole session."""
    ids = torch.tensor([[i for s in spans for i in (*s.prompt, *s.ids, *s.suffix)]])
    with torch.no_grad():
        forced = model(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()
    ends = np.cumsum([len(s.prompt) + len(s.ids) + len(s.suffix) for s in spans]) - [len(s.suffix) for s in spans]
    pairs = list(zip(spans, ends, strict=True))[of]
    return max(float(np.abs(forced[end - 1 - len(s.ids) : end - 1] - s.logprobs.numpy()).max()) for s, end in pairs)


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_family_records_exactly_over_turns_eviction_and_new_weights(family: str) -> None:
    model, old, new = (tiny(family, seed) for seed in (0, 0, 1))
    options: dict[str, Any] = {"slots": 2, "max_length": 256, "sampling": Sampling(max_tokens=10)}
    who = TorchEngine.serving(model, Renderer(TOKENIZER), shared=False, **options)
    assert type(who._batcher.store).__name__ == FAMILIES[family][1]
    barrier = asyncio.Barrier(4)

    async def play(seed: int) -> list[TokenSpan]:
        async with who.session(Episode(task=Task(env="test"), seed=seed), "agent") as session:
            spans = [(await session.act(say(f"w{seed} w{i} w3"))).span for i in range(2)]
            await barrier.wait()
            await barrier.wait()
            spans += [(await session.act(say(f"w{i} w4"))).span for i in range(2)]
        return [s for s in spans if s is not None]

    played = [asyncio.create_task(play(seed)) for seed in range(3)]
    await barrier.wait()
    model.load_state_dict(new.state_dict())
    await who.publish(WeightsVersion(number=1))
    await barrier.wait()
    for spans in await asyncio.gather(*played):
        assert gap(old, spans, slice(2)) < ATOL
        assert gap(new, spans, slice(2, 4)) < ATOL
        assert gap(new, spans, slice(2)) > ATOL
    assert who.counts["evicted"] > 0
    assert (who.counts["reused"] == 0) is (family == "state space, begun anew each turn")


@pytest.mark.parametrize("slots", [list(range(9)), [0, 5, 11]], ids=["dense", "far apart"])
def test_decoding_in_fixed_shapes_gives_the_logits_of_exact_ones_and_writes_nowhere_else(slots: list[int]) -> None:
    model = build.tiny(54, hidden=32, layers=2, init=0.3)
    exact, fixed = SlotStore(model, 12, 200), SlotStore(model, 12, 200)
    fixed.static = True  # as on a GPU
    rng = np.random.default_rng(0)
    everyone = {s: rng.integers(0, 54, 30 + 9 * s).tolist() for s in range(12)}
    with torch.no_grad():
        stores = [(store, {s: Row(ids=list(ids), slot=s) for s, ids in everyone.items()}) for store in (exact, fixed)]
        for store, rows in stores:
            store.run(list(rows.values()))
        for token in (3, 4):
            found = [_decoded(store, [rows[s] for s in slots], token) for store, rows in stores]
            torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
        idle = [s for s in range(12) if s not in slots]  # their caches are as they were
        found = [_decoded(store, [rows[s] for s in idle], 5) for store, rows in stores]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    dense = len(slots) == 9
    assert next(iter(fixed.decodes)) == ((12, 128, True) if dense else (8, 200, False))
    assert next(iter(exact.decodes)) == ((9, 128, True) if dense else (3, 192, False))


def _decoded(store: SlotStore, rows: list[Row], token: int) -> torch.Tensor:
    for row in rows:
        row.ids.append(token)
    done, logits = store.run(rows)
    assert done == rows
    return logits
