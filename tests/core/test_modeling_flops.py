"""Operations of a training step, counted by hand and by torch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralForCausalLM

from agentgym.collate import collate
from agentgym.modeling import build, flops, lora
from agentgym.modeling.logprobs import packed_hidden
from agentgym.types import (
    Action,
    Draft,
    Episode,
    Floats,
    Ids,
    Observation,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
)

HIDDEN, LAYERS, HEADS, KV, WORDS = 32, 2, 4, 2, 50
LINEAR = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * (HIDDEN // 2) + 3 * HIDDEN * (3 * HIDDEN)
"""Of a layer: q and o, k and v with half the heads, the three of the MLP."""


def model() -> object:
    return build.tiny(WORDS, hidden=HIDDEN, layers=LAYERS, heads=HEADS, kv_heads=KV)


def test_a_step_of_full_weights_is_what_hand_and_paper_say() -> None:
    """6 N per token, the unembedding at the trained ones; 12 L H D n^2 / 2 of attention."""
    found = flops.shape(model())
    assert found.trunk == found.trunk_moving == LAYERS * LINEAR
    assert found.head == found.head_moving == WORDS * HIDDEN
    lengths, trained = [10, 4], 5
    useful = 6 * LAYERS * LINEAR * 14 + 6 * WORDS * HIDDEN * 5 + 12 * LAYERS * HIDDEN * (100 + 16) / 2
    again = 2 * LAYERS * LINEAR * 14 + 4 * LAYERS * HIDDEN * (100 + 16) / 2
    assert flops.training(found, lengths, trained) == (useful, again)


def test_torch_counts_the_same_products() -> None:
    """Forward and backward of the linear layers; its counter does not see attention on the CPU."""
    made = model()
    bounds = np.array([0, 16, 32])
    ids, positions = np.arange(32, dtype=np.int32) % WORDS, np.tile(np.arange(16, dtype=np.int32), 2)
    with FlopCounterMode(display=False) as counter:
        packed_hidden(made, ids, positions, bounds).sum().backward()
    bare = flops.shape(made)._replace(windows=())
    assert counter.get_total_flops() == flops.training(bare, [16, 16], 0).useful


def test_a_frozen_base_costs_no_gradients_by_its_weights() -> None:
    pytest.importorskip("peft", reason="needs the extra [lora]")
    made = model()
    lora.add(made, lora.Lora(rank=2, targets=("q_proj",)))
    pairs = LAYERS * 2 * (HIDDEN + HIDDEN)
    found = flops.shape(made)
    assert (found.trunk, found.trunk_moving) == (LAYERS * LINEAR + pairs, pairs)
    assert found.head_moving == 0
    useful = 4 * LAYERS * LINEAR * 10 + 6 * pairs * 10 + 4 * WORDS * HIDDEN * 3 + 12 * LAYERS * HIDDEN * 100 / 2
    assert flops.training(found, [10], 3).useful == useful


def test_a_window_bounds_what_attention_costs() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = flops.shape(
        MistralForCausalLM(MistralConfig(vocab_size=50, intermediate_size=64, sliding_window=8, **sizes))
    )
    assert found.windows in ((8, 8), (0, 0))
    near, far = flops.Shape(0, 0, 0, 0, 32, (8,)), flops.Shape(0, 0, 0, 0, 32, (0,))
    assert flops.training(near, [8], 0) == flops.training(far, [8], 0)
    assert flops.training(near, [100], 0).useful == 12 * 32 * (100**2 - 92**2) / 2


def played() -> Trajectory:
    """Two turns of one branch, a draft in it, and a third that forked after 4 tokens."""

    def act(prompt: int, said: int, **more: object) -> Action:
        given = {"prompt": Ids([1] * prompt), "ids": Ids([2] * said), "logprobs": Floats([-1.0] * said)}
        return Action(span=TokenSpan(**given, suffix=Ids([3]), **more))

    turns = (
        Turn(step=0, observation=Observation(), action=act(5, 2)),
        Turn(step=1, observation=Observation(), action=act(3, 4), drafts=(Draft(by="agent", action=act(2, 6)),)),
        Turn(step=2, observation=Observation(), action=act(3, 2, branch=1, parent=(0, 4))),
    )
    task = Task(env="bench")
    return Trajectory(env="bench", episode=Episode(task=task), turns=Turns(items=turns), status="terminated")


def test_lengths_are_those_that_collate_packs() -> None:
    t = played()
    (batch,) = collate([t], [np.ones(3)], max_tokens=100)
    lengths, trained = flops.lengths_of([t, t.replace(status="failed")])
    assert sorted(lengths) == sorted(np.diff(batch.bounds).tolist()) == [10, 25]
    assert trained == batch.mask.sum() == 8


def test_utilisation_is_operations_over_what_the_machine_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "peak", lambda *_: 1e9)
    made, t = model(), played()
    useful = flops.training(flops.shape(made), [10, 25], 8).useful
    found = flops.utilisation(made, [t], 0.5, epochs=2, ranks=2)
    assert found == {"learn_tokens_per_second": pytest.approx(140.0), "mfu": pytest.approx(2 * useful / 1e9)}


def test_the_machine_is_measured_in_its_own_precision() -> None:
    slow = flops.measured("cpu", torch.float32, (256, 256, 256))
    assert 1e8 < slow < 1e14
    assert flops.peak("cpu", torch.float32, 1) is flops.peak("cpu", torch.float32, 1)
