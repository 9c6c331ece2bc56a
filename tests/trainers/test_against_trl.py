"""Where TRL's formula is ours, its own code is run on the same tensors: losses, gradients, corrections, divergences.

`GRPOTrainer._compute_loss` reads a handful of attributes and the log-probs of one method; a namespace stands in for the
trainer, so that what is executed is TRL's formula and nothing else.
"""

from __future__ import annotations

import ast
import inspect
import math
import os
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from objective_twins import random_step, tensors
from torch import Tensor

from agentgym.modeling.logprobs import divergence
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.behaviours import weights
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import Objective
from agentgym_trainers.objective.tokens import Tokens, needed

LENGTHS = [5, 1, 7, 3]
HORIZON = 9
MEAN = declare.SeqMeanTokenMean()


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """The classes that hold TRL's formulas, imported once."""
    pytest.importorskip("trl")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
        from trl.trainer.grpo_trainer import GRPOTrainer
    return SimpleNamespace(grpo=GRPOTrainer, gmpo=GMPOTrainer, gkd=GKDTrainer)


@pytest.fixture
def played() -> Tokens:
    """Four sequences with one advantage each, of both signs."""
    step = random_step(LENGTHS, 11, spread=0.4)
    for s, a in zip(step, (1.3, -0.7, -1.1, 0.4), strict=True):
        s.a = [a] * len(s)
    return tensors(step)


def padded(x: Tensor, t: Tokens) -> Tensor:
    """[M] to [B, T], with zeros behind."""
    return torch.nn.utils.rnn.pad_sequence(list(x.split(t.lengths.tolist())), batch_first=True)


def mask_of(t: Tokens) -> Tensor:
    return padded(torch.ones_like(t.old), t)


def trainer(trl: SimpleNamespace, t: Tokens, **given: Any) -> SimpleNamespace:
    """What `_compute_loss` reads of a trainer."""
    args = {
        "use_bias_correction_kl": False,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }
    held = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "max_completion_length": HORIZON,
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
    }
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=False)
    return SimpleNamespace(
        **{**held, **{name: x for name, x in given.items() if name not in args}},
        args=SimpleNamespace(**{**args, **{name: x for name, x in given.items() if name in args}}),
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(t.logp, t), padded(t.entropy, t), None),
        get_off_policy_mask=trl.grpo.get_off_policy_mask,
        get_gamma_weights=trl.grpo.get_gamma_weights,
    )


def theirs(cls: Any, me: SimpleNamespace, t: Tokens, **more: Tensor) -> tuple[float, list[float]]:
    """TRL's loss and its gradient by the log-probs."""
    mask = mask_of(t)
    inputs = {
        "prompt_ids": torch.zeros(t.sequences, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(t.sequences, 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(mask, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.stack([a[0] for a in t.advantages.split(t.lengths.tolist())]),
        "old_per_token_logps": padded(t.old, t),
        "sampling_per_token_logps": padded(t.sampled, t),
        "ref_per_token_logps": padded(needed(t.reference, "reference"), t),
        "num_items_in_batch": mask.sum(),
        **more,
    }
    found = cls._compute_loss(me, None, inputs)
    (slope,) = torch.autograd.grad(found, t.logp)
    return found.item(), slope.tolist()


def ours(o: Objective, t: Tokens) -> tuple[float, list[float]]:
    found, _ = loss(o, t, totals(o.aggregation, t))
    (slope,) = torch.autograd.grad(found, t.logp)
    return found.item(), slope.tolist()


def agree(mine: tuple[float, list[float]], other: tuple[float, list[float]]) -> None:
    assert mine[0] == pytest.approx(other[0], rel=1e-9)
    assert mine[1] == pytest.approx(other[1], rel=1e-9, abs=1e-12)


KL = (declare.Kl(coef=0.04),)
CASES: dict[str, tuple[dict[str, Any], Objective]] = {
    "grpo": ({}, Objective(aggregation=MEAN)),
    "grpo with KL": ({"beta": 0.04}, Objective(aggregation=MEAN, regularisers=KL)),
    "dr_grpo": ({"loss_type": "dr_grpo"}, Objective(aggregation=declare.ConstNorm(horizon=HORIZON))),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, Objective(gate=declare.Clip(high=0.28))),
    "dapo with KL": ({"loss_type": "dapo", "beta": 0.04}, Objective(regularisers=KL)),
    "luspo": ({"loss_type": "luspo"}, Objective(aggregation=declare.SeqMeanTokenSum())),
    "bnpo of one micro-batch": ({"loss_type": "bnpo"}, Objective()),
    "dapo with an entropy bonus": (
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.02},
        Objective(regularisers=(declare.Entropy(coef=0.02),)),
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.28}, Objective(gate=declare.Detached(high=0.28))),
    "sapo": ({"loss_type": "sapo"}, Objective(gate=declare.Soft(), aggregation=MEAN)),
    "vespo": (
        {"loss_type": "vespo"},
        Objective(ratio=declare.SequenceProduct(), gate=declare.GammaWeight()),
    ),
    "off-policy mask": (
        {"off_policy_mask_threshold": 0.05},
        Objective(proximal="learner", behaviour=(declare.OffPolicyMask(threshold=0.05),), aggregation=MEAN),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(trl: SimpleNamespace, played: Tokens, name: str) -> None:
    given, o = CASES[name]
    agree(ours(o, played), theirs(trl.grpo, trainer(trl, played, **given), played))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_gspo_has_the_same_gradient_as_the_sequence_form(trl: SimpleNamespace, played: Tokens, loss_type: str) -> None:
    """TRL differentiates the geometric mean itself, we its token form: with one advantage a sequence they agree where
    tokens of a sequence weigh the same. Some sequences are past their bounds."""
    given = {"importance_sampling_level": "sequence", "loss_type": loss_type, "epsilon_low": 3e-4, "epsilon_high": 4e-4}
    aggregation: Any = MEAN if loss_type == "grpo" else declare.TokenMean()
    o = Objective(ratio=declare.Geometric(), gate=declare.Clip(low=3e-4, high=4e-4), aggregation=aggregation)
    agree(ours(o, played), theirs(trl.grpo, trainer(trl, played, **given), played))
    assert 0 < loss(o, played, totals(aggregation, played))[1]["clipped"] < len(played.logp)


def test_two_sided_clipping_is_another_dual_clip(trl: SimpleNamespace, played: Tokens) -> None:
    """TRL's delta caps the ratio in the unclipped branch for both signs; with A < 0 that is the dual clip, and with
    A > 0 the clipped branch is the smaller one anyway."""
    far = replace(played, old=played.old - 1.0)
    assert bool(((far.logp - far.old > math.log(3.0)) & (far.advantages < 0)).any())
    agree(
        ours(Objective(gate=declare.Clip(dual=3.0), aggregation=MEAN), far),
        theirs(trl.grpo, trainer(trl, far, delta=3.0), far),
    )


def test_bnpo_depends_on_how_a_step_is_cut(trl: SimpleNamespace, played: Tokens) -> None:
    """A local token mean over two micro-batches is not the mean over their tokens: ours divides by the global count."""

    columns = ("logp", "old", "sampled", "advantages", "entropy", "reference")

    def bnpo(start: int, stop: int) -> float:
        at = (played.sequence >= start) & (played.sequence < stop)
        rows = {name: getattr(played, name)[at] for name in columns}
        part = replace(played, sequence=played.sequence[at] - start, sequences=stop - start, **rows)
        return theirs(trl.grpo, trainer(trl, part, loss_type="bnpo"), part)[0]

    assert bnpo(0, 4) == pytest.approx(ours(Objective(), played)[0])
    assert (bnpo(0, 2) + bnpo(2, 4)) / 2 != pytest.approx(ours(Objective(), played)[0], rel=1e-3)


def test_gmpo(trl: SimpleNamespace, played: Tokens) -> None:
    me = trainer(trl, played, epsilon_low=0.3, epsilon_high=0.2, loss_type="gmpo")
    o = Objective(gate=declare.LogClip(low=0.3, high=0.2), aggregation=MEAN)
    agree(ours(o, played), theirs(trl.gmpo, me, played))


# --- the sampler's mismatch -------------------------------------------------------------------------------------


def correction(cls: Any) -> Callable[..., Tensor]:
    """The block of `_generate_and_score_completions` that forms the sampler's weights, compiled on its own."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls._generate_and_score_completions)))
    blocks = [x for x in ast.walk(tree) if isinstance(x, ast.If) and "torch.exp(logps_diff)" in ast.unparse(x.body)]
    block = min(blocks, key=lambda x: len(ast.unparse(x)))
    code = compile(ast.Module(block.body, []), "trl", "exec")

    def run(me: Any, old: Tensor, sampled: Tensor, mask: Tensor) -> Tensor:
        scope = {
            **vars(inspect.getmodule(cls)),
            "self": me,
            "old_per_token_logps": old,
            "sampling_per_token_logps": sampled,
            "completion_mask": mask,
            "tool_mask": None,
        }
        exec(code, scope)
        return scope["vllm_importance_sampling_ratio"].expand_as(mask)

    return run


@pytest.mark.parametrize(
    ("mode", "low", "high", "declared"),
    [
        ("token_truncate", None, 1.2, declare.Truncate(cap=1.2)),
        ("token_truncate", 0.8, 1.2, declare.Clamp(low=0.8, high=1.2)),
        ("token_mask", 0.8, 1.2, declare.Mask(low=0.8, high=1.2)),
        ("token_mask", None, 1.2, declare.Mask(low=0.0, high=1.2)),
        ("sequence_truncate", None, 1.1, declare.Truncate(level="product", cap=1.1)),
        ("sequence_mask", None, 3.0, declare.Mask(level="product", low=0.0, high=3.0)),
        ("sequence_mask", 0.5, 1.1, declare.Mask(level="product", low=0.5, high=1.1)),
    ],
)
def test_corrections_of_the_sampler(
    trl: SimpleNamespace, played: Tokens, mode: str, low: float | None, high: float, declared: Any
) -> None:
    me = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    sampled = played.sampled.clone()
    sampled[2] = torch.nan
    mask = mask_of(played)
    expected = correction(trl.grpo)(me, padded(played.old, played), padded(sampled, played), mask)
    found = padded(weights((declared,), replace(played, sampled=sampled)), played)
    torch.testing.assert_close(found, expected * mask)


def test_corrected_loss(trl: SimpleNamespace, played: Tokens) -> None:
    given = {"use_vllm": True, "vllm_importance_sampling_correction": True}
    found = weights((declare.Truncate(),), played)
    o = Objective(proximal="learner", behaviour=(declare.Truncate(),), aggregation=MEAN)
    me = trainer(trl, played, **given)
    agree(ours(o, played), theirs(trl.grpo, me, played, importance_sampling_ratio=padded(found, played)))


def test_vespo_against_the_sampler_holds_the_whole_mismatch(trl: SimpleNamespace, played: Tokens) -> None:
    """TRL multiplies the behaviour weights into w; untruncated that is the ratio against the sampler itself."""
    ratio = padded((played.old - played.sampled).exp(), played)
    ratio = torch.where(mask_of(played) > 0, ratio, 1.0)
    me = trainer(trl, played, loss_type="vespo")
    coupled = replace(played, old=played.sampled)
    o = Objective(ratio=declare.SequenceProduct(), gate=declare.GammaWeight())
    agree(ours(o, coupled), theirs(trl.grpo, me, played, importance_sampling_ratio=ratio))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalised_divergence(trl: SimpleNamespace, beta: float) -> None:
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 2, 5, 17, generator=g, dtype=torch.float64)
    expected = trl.gkd.generalized_jsd_loss(student, teacher, beta=beta, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(student, teacher, beta), expected)
