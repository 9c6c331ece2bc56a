"""Checkpointed layers: the same gradients for fewer kept activations, whoever shares the module."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import MistralConfig, MistralForCausalLM

from agentgym.errors import ConfigError, ModelError
from agentgym.modeling import build
from agentgym.modeling.layers import checkpoint_layers, compile_layers, layers_of
from agentgym.modeling.logprobs import packed_hidden

BOUNDS = np.array([0, 40, 57, 90])
POSITIONS = np.concatenate([np.arange(n) for n in np.diff(BOUNDS)]).astype(np.int32)
WEIGHTS = torch.randn(90, 32, generator=torch.Generator().manual_seed(0))
IDS = np.random.default_rng(0).integers(0, 50, 90).astype(np.int32)


def windowed() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=50, intermediate_size=64, sliding_window=8, attention_dropout=0.5, **sizes)
    return MistralForCausalLM(config).eval()


MODELS = {"qwen3": lambda: build.tiny(50, hidden=32, layers=3), "mistral with dropout and a window": windowed}


def hidden(model: Any, ids: np.ndarray = IDS) -> torch.Tensor:
    return packed_hidden(model, ids, POSITIONS, BOUNDS)


def differentiate(model: Any) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd itself keeps of one pass, and the gradients."""
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes if not isinstance(x, nn.Parameter) else 0
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = (hidden(model) * WEIGHTS).sum()
    loss.backward()
    return kept, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_gradients_are_equal_and_less_is_kept(name: str) -> None:
    plain = MODELS[name]()
    kept, expected = differentiate(plain)
    model = MODELS[name]()
    checkpoint_layers(model)
    less, found = differentiate(model)
    assert less < kept / 5
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-6, rtol=1e-6)


def test_a_checkpointed_model_still_generates_with_its_cache_and_copies_whole() -> None:
    plain, model = MODELS["qwen3"](), MODELS["qwen3"]()
    checkpoint_layers(model)
    asked = torch.from_numpy(IDS[None, :20].astype(np.int64))
    twin = copy.deepcopy(model)
    for layer in layers_of(model):
        nn.init.zeros_(layer.mlp.down_proj.weight)
    expected = plain.generate(asked, max_new_tokens=5, do_sample=False)
    assert torch.equal(twin.generate(asked, max_new_tokens=5, do_sample=False), expected)
    torch.testing.assert_close(hidden(twin), hidden(plain))
    assert not torch.allclose(hidden(model), hidden(plain))
    cached = twin(asked, use_cache=True).past_key_values
    assert cached.get_seq_length() == 20


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = build.tiny(50, hidden=16, layers=2)
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 layers"):
        checkpoint_layers(model)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_learn_the_same_and_leave_other_passes_alone() -> None:
    """Traced and differentiated as for the real thing, without its minute of C++."""
    plain, model = (build.tiny(50, hidden=32, layers=1) for _ in range(2))
    compile_layers(model, backend="aot_eager")
    checkpoint_layers(model)
    _, expected = differentiate(plain)
    _, found = differentiate(model)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, atol=1e-5 * float(gradient.abs().max()), rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(hidden(model), hidden(plain))
    twin = copy.deepcopy(model)
    _, found = differentiate(twin)  # into its own weights
    assert found.keys() == expected.keys()


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        compile_layers(build.tiny(50, hidden=16, layers=1))
