"""Adapters: beside the weights, merged for others, and a run that learns and resumes with them."""

from __future__ import annotations

import asyncio
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agentgym import registry
from agentgym.collate import collate
from agentgym.errors import ConfigError, ModelError
from agentgym.modeling import build, logprobs, lora
from agentgym.modeling.lora import Lora
from agentgym.rollout import Runner, episodes
from agentgym.store import load_run
from agentgym.types import Sampling, Task
from agentgym_trainers import language
from agentgym_trainers.config import from_table
from agentgym_trainers.loop import PolicyGradient

pytest.importorskip("peft", reason="needs the extra [lora]")
IDS = torch.arange(20)[None]
LORA = {"rank": 8, "alpha": 16.0}


@pytest.fixture(autouse=True)
def bandit() -> None:
    toys.register()


def moved(declared: Lora | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model, and the same with adapters that have an effect."""
    base = build.tiny(50, hidden=32, layers=2).to(dtype)
    model = copy.deepcopy(base)
    lora.add(model, declared or Lora(rank=4), seed=1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return base, model


def test_adapters_begin_without_effect_and_alone_require_gradients() -> None:
    base = build.tiny(50, hidden=32, layers=2)
    model = copy.deepcopy(base)
    before = torch.get_rng_state()
    lora.add(model, Lora(rank=4), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model(IDS).logits, base(IDS).logits)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 2
    assert all(".lora_" in name for name in trained)
    assert not model.training


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj")])
def test_merged_weights_say_the_same_under_the_hubs_names(targets: tuple[str, ...]) -> None:
    base, model = moved(Lora(rank=4, targets=targets))
    merged = dict(build.weights(model))
    assert merged.keys() == dict(base.named_parameters()).keys()
    twin = copy.deepcopy(base)
    twin.load_state_dict(merged, strict=False)
    torch.testing.assert_close(twin(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (model(IDS).logits - base(IDS).logits).abs().max() > 0.1


def test_saved_whole_for_anybody_and_apart_for_peft(tmp_path: Path) -> None:
    base, model = moved()
    build.save(model, None, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a deprecated property of transformers
        wrapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "model" / build.ADAPTER)
    torch.testing.assert_close(wrapped(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)


def test_adapters_come_back_bit_for_bit_beside_a_base_of_half_precision(tmp_path: Path) -> None:
    base, model = moved(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    build.save(model, None, tmp_path / "model")
    again = copy.deepcopy(base)
    lora.add(again, Lora(rank=4), seed=7)
    assert not torch.equal(again(IDS).logits, model(IDS).logits)
    lora.load(again, tmp_path / "model" / build.ADAPTER)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert {x.dtype for _, x in build.weights(again)} == {torch.bfloat16}


def test_a_twin_shares_the_base_and_keeps_its_adapters() -> None:
    _, model = moved()
    twin = lora.twin(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    assert shared == {id(p) for p in model.parameters() if not p.requires_grad}
    before = model(IDS).logits
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1)
    assert torch.equal(twin(IDS).logits, before)
    assert not torch.allclose(model(IDS).logits, before)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets = \['nowhere'\]"):
        lora.add(build.tiny(50, hidden=32, layers=2), Lora(targets=("nowhere",)))
    with pytest.raises(ConfigError, match="rank is at least 1"):
        Lora(rank=0)
    _, model = moved()
    lora.save(model, tmp_path)
    _, other = moved(Lora(rank=2))
    with pytest.raises(ModelError, match="not those of this model"):
        lora.load(other, tmp_path)


# --- in a run -------------------------------------------------------------------------------------------------------


def settings(**run: object) -> dict[str, Any]:
    """The bandit with adapters alone: no warm start moves the base, whose embeddings are large enough to decide by."""
    model = {**toys.table()["model"], "init": 0.4, "lora": LORA, "checkpointing": True}
    return toys.table(model=model, run={"steps": 12, "threads": 1, "checkpoint_every": 4, **run})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(Path(load_run(path).checkpoints[-1].path) / "model" / build.ADAPTER / lora.WEIGHTS)


def test_a_run_learns_with_adapters_alone(tmp_path: Path) -> None:
    summary = PolicyGradient.train(from_table(settings()), tmp_path / "run")
    assert summary.after["return_mean"] > summary.before["return_mean"] + 0.5
    config = from_table(settings())
    checkpoint = Path(load_run(tmp_path / "run").checkpoints[-1].path) / "model"
    fresh = language.make(config, registry.make("bandit-v0"))
    resumed = language.make(config, registry.make("bandit-v0"), checkpoint)
    for (name, a), (_, b) in zip(fresh.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b) == (not a.requires_grad), name
    fresh.close()
    resumed.close()


def test_a_run_cut_off_ends_with_the_same_adapters(tmp_path: Path) -> None:
    """Deterministic, with a KL to the policy before reinforcement: resumed from a checkpoint in the middle."""
    kl = {"regularisers": [{"kind": "kl", "form": "k3", "coef": 0.01}]}
    table = {**settings(deterministic=True, steps=6, checkpoint_every=2), "objective": kl}
    PolicyGradient.train(from_table(table), tmp_path / "whole")

    class Cut(Exception):
        pass

    def stop(phase: str, done: int, total: int, figures: object) -> None:
        if phase == "rl" and done == 3:
            raise Cut

    with pytest.raises(Cut):
        PolicyGradient.train(from_table(table), tmp_path / "cut", progress=stop)
    PolicyGradient.train(None, tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(cut[name], value), name


def test_the_engine_samples_with_the_adapters() -> None:
    made = language.make(from_table(settings()), registry.make("bandit-v0"))
    for name, p in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(name)))

    async def play() -> list[Any]:
        asked = episodes([Task(env="bandit-v0", seed=s) for s in range(4)])
        runner = Runner(registry.make("bandit-v0"), made.engine, sampling=Sampling(max_tokens=6))
        return [t async for t in runner.run(asked)]

    played = asyncio.run(play())
    made.close()
    (batch,) = collate(played, [torch.ones(len(t.turns)).double().numpy() for t in played], max_tokens=10_000)
    logp, _ = logprobs.token_logprobs(made.model, batch)
    at = batch.mask > 0
    torch.testing.assert_close(logp[at].detach(), torch.from_numpy(batch.logprobs[at]), atol=1e-4, rtol=0)
