"""The preference family as functions: numbers of the reference, slow twins, gradients, trl, pairs, diagnostics."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from making import samples as composed
from making import trajectory
from torch import Tensor

from agentgym.errors import ConfigError, RecordError
from agentgym.rewards import Composed
from agentgym.types import Trajectory
from agentgym_trainers.preference import Preference, build
from agentgym_trainers.preference.declare import CODPO, DNO, DPO, INPO, RPO, SRPO, AllPairs, BestWorst, Judged, Loss
from agentgym_trainers.preference.diagnostics import departure, differential, entropy, of_samples, optimal_loser
from agentgym_trainers.preference.losses import Sums, improvement, pair_loss, robustness


def columns(*rows: list[float]) -> Tensor:
    """Chosen, rejected (and conditional) rows of numbers, one column for each pair."""
    return torch.tensor(rows, dtype=torch.float64)


def one_pair(policy: list[float], **fields: Any) -> Sums:
    known = {"tokens": columns([1.0], [1.0]), "reference": torch.zeros(len(policy), 1, dtype=torch.float64)}
    return Sums(policy=columns(*([x] for x in policy)), **{**known, **fields})


# --- numbers of the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "sums", "expected"),
    [
        (DPO(), one_pair([0.0, -2.0]), 0.598139),
        (RPO(eta=0.0), one_pair([0.0, -100.0]), 0.313262),
        (RPO(), one_pair([-0.7, -100.7]), 0.316762),
        (
            INPO(eta=0.5, tau=0.25),
            one_pair([-1.0, -2.0], reference=columns([-1.2], [-1.9]), previous=columns([-1.1], [-1.95])),
            0.600625,
        ),
        (
            DNO(eta=1.0),
            one_pair([0.2, -0.1], previous=columns([0.0], [0.0]), rates=columns([0.8], [0.3])),
            0.667617,
        ),
        (CODPO(), one_pair([0.0, -2.0]), 0.598139),
    ],
)
def test_numbers_of_the_reference(loss: Loss, sums: Sums, expected: float) -> None:
    assert pair_loss(loss, sums).item() == pytest.approx(expected, abs=1e-6)


def test_srpo_improves_by_half_a_preference() -> None:
    """beta .1, D 2, p 1: (.2 - .5)^2 = .09; the other order with the sign turned is the same."""
    ratio = columns([0.0], [0.0], [2.0], [0.0], [-2.0], [0.0])
    assert improvement(0.1, ratio).item() == pytest.approx(0.09)


# --- twins ------------------------------------------------------------------------------------------------------

PAIRS = 5


def drawn(seed: int = 0) -> Sums:
    g = torch.Generator().manual_seed(seed)
    policy, reference, previous = (torch.randn(6, PAIRS, generator=g, dtype=torch.float64) for _ in range(3))
    return Sums(
        policy=policy.requires_grad_(),
        reference=reference,
        previous=previous,
        tokens=torch.randint(1, 9, (2, PAIRS), generator=g).double(),
        rates=torch.rand(2, PAIRS, generator=g, dtype=torch.float64),
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def slow(loss: Any, s: Sums, i: int) -> float:
    """The loss of pair i, written out."""
    pi, ref, old = (x[:, i].tolist() for x in (s.policy.detach(), s.reference, s.previous))  # type: ignore[index]
    d = (pi[0] - ref[0]) - (pi[1] - ref[1])
    d_old = (pi[0] - old[0]) - (pi[1] - old[1])
    if isinstance(loss, DPO):
        return -log_sigmoid(loss.beta * (d if loss.against == "reference" else d_old))
    if isinstance(loss, RPO):
        tokens = sum(s.tokens[0].tolist()) / PAIRS
        return -log_sigmoid(loss.beta * d) - loss.eta * (pi[0] * loss.beta if loss.form == "paper" else pi[0] / tokens)
    if isinstance(loss, INPO):
        h = (
            (pi[0] - pi[1])
            - loss.tau / loss.eta * (ref[0] - ref[1])
            - (loss.eta - loss.tau) / loss.eta * (old[0] - old[1])
        )
        return (h - 1 / (2 * loss.eta)) ** 2
    if isinstance(loss, DNO):
        target = 1 / (1 + math.exp(-float(s.rates[0, i] - s.rates[1, i])))  # type: ignore[index]
        return -target * log_sigmoid(loss.eta * d_old) - (1 - target) * log_sigmoid(-loss.eta * d_old)
    if isinstance(loss, CODPO):
        return -log_sigmoid(loss.beta * d) - loss.sft * pi[0] / s.tokens[0, i].item()
    r = [a - b for a, b in zip(pi, ref, strict=True)]
    up, down = (loss.beta * (r[2] - r[3]) - 0.5) ** 2, (loss.beta * (r[4] - r[5]) + 0.5) ** 2
    robust = (1 - 0.5 + 0.5 * loss.beta * (r[1] - r[0] + r[4] - r[2])) ** 2
    return (1 - loss.mix) * (up + down) / 2 + loss.mix * robust


LOSSES = [
    DPO(),
    DPO(against="previous", beta=0.7),
    RPO(beta=0.5, eta=0.2),
    RPO(beta=0.5, eta=0.2, form="paper"),
    INPO(eta=0.5, tau=0.2),
    DNO(eta=0.8),
    SRPO(beta=0.6, mix=0.3),
    CODPO(sft=0.3),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_their_definitions(loss: Loss) -> None:
    sums = drawn()
    assert pair_loss(loss, sums).tolist() == pytest.approx([slow(loss, sums, i) for i in range(PAIRS)], rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_finite_differences(loss: Loss) -> None:
    sums = drawn(1)

    def value(policy: Tensor) -> Tensor:
        return pair_loss(loss, Sums(**{**vars(sums), "policy": policy})).mean()

    assert torch.autograd.gradcheck(value, (sums.policy,))


@pytest.mark.parametrize("loss", [x for x in LOSSES if not isinstance(x, RPO | CODPO)])
def test_only_differences_count_but_for_likelihood_terms(loss: Loss) -> None:
    """The same amount on every log-prob of a pair, in the policy, changes nothing: the partition function cancels."""
    sums = drawn(2)
    moved = Sums(**{**vars(sums), "policy": sums.policy + torch.arange(PAIRS)})
    torch.testing.assert_close(pair_loss(loss, sums), pair_loss(loss, moved))


def test_srpo_is_zero_at_the_optimum_of_its_game() -> None:
    """Three answers, any preference: the improvement policy ref exp(P(.beats y) / beta) and the policy that needs it
    least, ref exp(-V / beta) with V the game's value behind y, leave nothing of either term."""
    g, beta = np.random.default_rng(0), 0.7
    ref = g.dirichlet(np.ones(3))
    p = np.tril(g.random((3, 3)), -1)
    p = p + np.triu(1 - p.T, 1) + 0.5 * np.eye(3)  # p[a, b]: a beats b
    improver = ref[:, None] * np.exp(p / beta)  # [y, behind]
    value = beta * np.log(improver.sum(0))
    improver /= improver.sum(0)
    policy = ref * np.exp(-value / beta)
    ratio, behind = np.log(policy / policy.sum() / ref), np.log(improver / ref[:, None])
    for a in range(3):
        for b in range(3):
            rows = columns(*([x] for x in (ratio[a], ratio[b], behind[a, b], behind[b, b], behind[b, a], behind[a, a])))
            assert improvement(beta, rows, p[a, b]).item() == pytest.approx(0.0, abs=1e-12)
            assert robustness(beta, rows, p[a, b]).item() == pytest.approx(0.0, abs=1e-12)


# --- trl --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_loss() -> Any:
    """trl's own DPO loss over given log-probs: its `_compute_loss` on a bare object."""
    trainers = pytest.importorskip("trl.trainer.dpo_trainer")

    def loss(
        logps: Tensor, reference: Tensor, mask: Tensor, types: list[str], shares: list[float], beta: float
    ) -> float:
        """logps and mask [2 P, T], reference [2 P]; chosen first, as trl wants them."""
        zeros = torch.zeros_like(logps)
        outputs = SimpleNamespace(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )
        bare = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=types,
            loss_weights=shares,
            beta=beta,
            label_smoothing=0.0,
            use_weighting=False,
            _metrics={"train": _Lists()},
            _total_train_tokens=0,
            _tp_size=1,
        )
        first = torch.zeros(len(mask), 1, dtype=mask.dtype)
        inputs = {
            "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.long),
            "attention_mask": torch.ones(len(mask), mask.shape[1] + 1),
            "completion_mask": torch.cat([first, mask], 1),
            "ref_chosen_logps": reference[: len(mask) // 2],
            "ref_rejected_logps": reference[len(mask) // 2 :],
        }
        found = trainers.DPOTrainer._compute_loss(bare, lambda **_: outputs, inputs, False)
        return float(found)

    return loss


class _Lists(dict):  # type: ignore[type-arg]
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


@pytest.mark.parametrize(
    ("loss", "types", "shares", "beta"),
    [
        (DPO(beta=0.3), ["sigmoid"], [1.0], 0.3),
        (RPO(beta=0.3, eta=0.2), ["sigmoid", "sft"], [1.0, 0.2], 0.3),
    ],
)
def test_equal_to_trl(trl_loss: Any, loss: Loss, types: list[str], shares: list[float], beta: float) -> None:
    g = torch.Generator().manual_seed(3)
    mask = (torch.arange(7) < torch.randint(2, 8, (2 * PAIRS, 1), generator=g)).long()
    logps = -torch.rand(2 * PAIRS, 7, generator=g, dtype=torch.float64) * mask
    reference = -4 * torch.rand(2 * PAIRS, generator=g, dtype=torch.float64)
    ours = Sums(
        policy=logps.sum(1).reshape(2, PAIRS),
        reference=reference.reshape(2, PAIRS),
        tokens=mask.sum(1).reshape(2, PAIRS).double(),
    )
    theirs = trl_loss(logps, reference, mask, types, shares, beta)
    assert pair_loss(loss, ours).mean().item() == pytest.approx(theirs, abs=1e-12)


def test_inpo_without_a_previous_policy_is_trls_ipo_before_it_divides_by_length(trl_loss: Any) -> None:
    """tau = eta leaves the reference alone: IPO with beta = eta. trl's token means are our sums at one token."""
    g = torch.Generator().manual_seed(4)
    logps, reference = (-torch.rand(2 * PAIRS, 1, generator=g, dtype=torch.float64) for _ in range(2))
    ours = Sums(
        policy=logps.reshape(2, PAIRS),
        reference=reference.reshape(2, PAIRS),
        previous=torch.zeros(2, PAIRS, dtype=torch.float64),
        tokens=torch.ones(2, PAIRS, dtype=torch.float64),
    )
    theirs = trl_loss(logps, reference[:, 0], torch.ones(2 * PAIRS, 1, dtype=torch.long), ["ipo"], [1.0], 0.4)
    assert pair_loss(INPO(eta=0.4, tau=0.4), ours).mean().item() == pytest.approx(theirs, abs=1e-12)


# --- declarations -----------------------------------------------------------------------------------------------


def declared(**table: Any) -> Preference:
    return msgspec.convert(table, Preference, strict=True)


def test_a_declaration_is_a_table() -> None:
    found = declared(loss={"kind": "rpo", "beta": 0.2}, pairs={"kind": "all", "margin": 0.5})
    assert (found.loss, found.pairs) == (RPO(beta=0.2), AllPairs(margin=0.5))
    needs = {kind: declared(loss={"kind": kind}) for kind in ("dpo", "rpo", "inpo", "dno", "srpo")}
    assert {kind: (p.needs_reference, p.needs_previous, p.conditional) for kind, p in needs.items()} == {
        "dpo": (True, False, False),
        "rpo": (True, False, False),
        "inpo": (True, True, False),
        "dno": (False, True, False),
        "srpo": (True, False, True),
    }
    iterated = declared(loss={"kind": "dpo", "against": "previous"})
    assert (iterated.needs_reference, iterated.needs_previous) == (False, True)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"loss": {"kind": "dpo", "beta": 0.0}}, "beta of 'dpo' is above 0"),
        ({"loss": {"kind": "dno", "eta": 0.0}}, "eta of 'dno' is above 0"),
        ({"loss": {"kind": "rpo", "eta": -1.0}}, "finite number from 0"),
        ({"loss": {"kind": "inpo", "eta": 0.1, "tau": 0.2}}, "tau / eta is a share"),
        ({"loss": {"kind": "srpo", "mix": 2.0}}, "share in"),
        ({"loss": {"kind": "codpo"}}, "DPO on judged pairs"),
        ({"pairs": {"kind": "judged", "constraints": []}}, "names of the judges"),
        ({"pairs": {"kind": "all", "length_ratio": 0.5}}, "at least 1"),
        ({"pairs": {"kind": "all", "margin": math.inf}}, "finite number from 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], reason: str) -> None:
    with pytest.raises((ConfigError, msgspec.ValidationError), match=reason):
        declared(**table)


# --- pairs ------------------------------------------------------------------------------------------------------


def group(values: list[float | None], tokens: list[int] | None = None, name: str = "g", **terms: list[float]) -> list:
    """One trajectory for every value; None is a failed one."""
    found = []
    for i, value in enumerate(values):
        amounts = {"r": value or 0.0, **{term: held[i] for term, held in terms.items()}}
        status = "failed" if value is None else "terminated"
        found.append(trajectory([amounts], tokens=tokens[i] if tokens else 2, group=name, status=status))
    return composed(found, {"op": "weighted_sum", "of": {"r": 1.0}})


def chosen(samples: list, pairs: Any) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Which two of the samples were paired, and what was left out."""
    places = {id(t): i for i, (t, _) in enumerate(samples)}
    found = build(samples, Preference(pairs=pairs))
    return [(places[id(p.chosen)], places[id(p.rejected)]) for p in found.pairs], dict(found.counts)


def test_best_against_worst() -> None:
    samples = group([0.5, 2.0, None, -1.0, 2.0])
    assert chosen(samples, BestWorst()) == ([(1, 3)], {"failed": 1})
    (pair,) = build(samples, Preference()).pairs
    assert pair.margin == 3.0
    assert pair.rates == pytest.approx((2.5 / 3, 0.0))
    assert chosen(samples, BestWorst(margin=3.0)) == ([], {"failed": 1, "tied": 1})


def test_every_pair_above_a_margin() -> None:
    samples = group([0.0, 1.0, 1.0, 3.0])
    assert chosen(samples, AllPairs())[0] == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert chosen(samples, AllPairs(margin=1.5))[0] == [(3, 0), (3, 1), (3, 2)]


def test_groups_stay_apart_and_ties_are_counted() -> None:
    samples = [*group([0.0, 5.0], name="a"), *group([1.0, 1.0, 1.0], name="b"), *group([9.0], name="c")]
    mixed = [samples[i] for i in (2, 0, 5, 3, 1, 4)]
    pairs, counts = chosen(mixed, AllPairs())
    assert pairs == [(4, 1)]
    assert counts == {"tied": 1, "single": 1}


def test_pairs_of_like_length() -> None:
    samples = group([0.0, 1.0, 3.0], tokens=[4, 5, 20])
    assert chosen(samples, BestWorst())[0] == [(2, 0)]
    assert chosen(samples, BestWorst(length_ratio=1.5))[0] == [(1, 0)]
    assert chosen(samples, AllPairs(length_ratio=4.0))[0] == [(1, 0), (2, 1)]
    assert chosen(samples, BestWorst(length_ratio=1.1)) == ([], {"unbalanced": 1})


def test_what_nobody_sampled_is_left_out() -> None:
    assert chosen(group([0.0, 1.0, 2.0], tokens=[1, 1, 0]), BestWorst()) == ([(1, 0)], {"empty": 1})


JUDGED = Judged(constraints=("safe", "polite"))


@pytest.mark.parametrize(
    ("values", "safe", "polite", "expected"),
    [
        ([1.0, 4.0, 2.0, 0.5], [1, 0, 1, 0], [1, 1, 1, 1], [(2, 3)]),  # best feasible, worst infeasible
        (
            [1.0, 4.0, 2.0, 0.5],
            [1, 0, 1, 1],
            [1, 1, 0, 1],
            [(0, 2)],
        ),  # either judge makes infeasible, whatever its reward
        ([1.0, 4.0, 2.0, 0.5], [1, 1, 1, 1], [1, 1, 1, 1], [(1, 3)]),  # nobody violates: the worst of all
        ([1.0, 1.0], [1, 0], [1, 1], [(0, 1)]),  # equal rewards, unlike judgement
    ],
)
def test_judged_pairs(values: list[float], safe: list[float], polite: list[float], expected: list) -> None:
    assert chosen(group(values, safe=safe, polite=polite), JUDGED) == (expected, {})  # type: ignore[arg-type]


def test_judged_groups_without_a_pair() -> None:
    ones = [1.0, 1.0]
    assert chosen(group([1.0, 2.0], safe=[0.0, 0.0], polite=ones), JUDGED) == ([], {"infeasible": 1})
    assert chosen(group([1.0, 1.0], safe=ones, polite=ones), JUDGED) == ([], {"tied": 1})
    long = group([1.0, 2.0], tokens=[1, 9], safe=ones, polite=ones)
    assert chosen(long, Judged(constraints=("safe",), length_ratio=2.0)) == ([], {"unbalanced": 1})
    with pytest.raises(RecordError, match=r"no reward term 'polite'.*it has r, safe"):
        chosen(group([1.0, 2.0], safe=ones), JUDGED)


def test_a_reward_that_is_not_finite_is_refused() -> None:
    bad: list[tuple[Trajectory, Composed | None]] = [(t, Composed(math.nan, 0.0, ())) for t, _ in group([1.0, 2.0])]
    with pytest.raises(RecordError, match="is nan"):
        build(bad, Preference())
    assert build([], Preference()).pairs == ()


# --- diagnostics ------------------------------------------------------------------------------------------------

REF, PI = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]


def test_numbers_of_differential_information() -> None:
    q = differential(PI, REF)
    assert q == pytest.approx([0.102564, 0.256410, 0.641026], abs=1e-6)
    assert float(entropy(q)) == pytest.approx(0.867589, abs=1e-6)
    assert optimal_loser(PI, REF, 1.0) == pytest.approx([0.766871, 0.184049, 0.049080], abs=1e-6)
    assert float(departure(optimal_loser(PI, REF, 1.0), PI, REF, 1.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(departure(REF, PI, REF, 1.0)) > 0.1
    assert entropy(np.stack([q, REF])).shape == (2,)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_leads_to_the_target_exactly_from_optimal_losers(beta: float) -> None:
    """Winners from ref, losers from pi_l, every pair with its probability: the minimum of our DPO loss is pi*."""
    ref, logits = torch.tensor(REF, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    loser = torch.from_numpy(optimal_loser(PI, REF, beta))
    won, lost = (x.flatten() for x in torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"))
    chance = ref[won] * loser[lost]
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimiser.zero_grad()
        logp = logits.log_softmax(0)
        sums = Sums(
            policy=torch.stack([logp[won], logp[lost]]),
            reference=torch.stack([ref[won], ref[lost]]).log(),
            tokens=torch.ones(2, 9),
        )
        value = (chance * pair_loss(DPO(beta=beta), sums)).sum()
        value.backward()
        return value

    optimiser.step(closure)
    assert logits.softmax(0).tolist() == pytest.approx(PI, abs=1e-5)


def test_differential_information_of_samples() -> None:
    q, share = of_samples([-4.0, -9.0], [-6.0, -9.0], [2, 3])
    assert q == pytest.approx(np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum())
    assert share == pytest.approx(float(entropy(q)) / math.log(2))
    assert of_samples([-1.0, -2.0], [-1.0, -2.0], [1, 2])[1] == pytest.approx(1.0)
    assert of_samples([-1.0], [-5.0], [1])[1] == 1.0
    for wrong in (([], [], []), ([-1.0], [-1.0], [0]), ([math.nan], [-1.0], [1])):
        with pytest.raises(ConfigError, match="sequences have tokens"):
            of_samples(*wrong)
    with pytest.raises(ConfigError, match="mass everywhere"):
        differential([0.5, 0.5], [1.0, 0.0])
