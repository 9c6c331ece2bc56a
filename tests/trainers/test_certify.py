"""Certificates: what is known to be unbiased is, each trap is caught with its number, nothing is falsely clean."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import msgspec
import pytest

from agentgym.errors import ConfigError, DataError, RecordError, UnknownName
from agentgym_trainers.exact import certify as certificates
from agentgym_trainers.exact import measures
from agentgym_trainers.exact.certify import Certificate, Verdict, report, run
from agentgym_trainers.exact.composition import load
from agentgym_trainers.exact.estimate import Lab
from agentgym_trainers.exact.mdp import MDP
from agentgym_trainers.exact.traps import TRAPS
from agentgym_trainers.exact.worlds import SCALES, STOPPING

FILES = Path(__file__).resolve().parents[1] / "traps"
SUM = {"ratio": {"kind": "none"}, "gate": {"kind": "none"}, "aggregation": {"kind": "seq_mean_token_sum"}}
UNBIASED = {
    "reinforce": {"advantage": [{"key": "none", "centre": "none", "scale": "none"}], "objective": SUM},
    "reward to go": {
        "advantage": [{"key": "none", "centre": "none", "scale": "none", "credit": "return_to_go"}],
        "objective": SUM,
    },
    "rloo": {"advantage": [{"centre": "leave_one_out", "scale": "none"}], "objective": SUM},
    "stopping-aware turn baseline": {
        "advantage": [
            {
                "key": ["prompt", "turn"],
                "centre": "others",
                "scale": "none",
                "credit": "return_to_go",
                "singleton": "keep",
            }
        ],
        "objective": SUM,
    },
}


@functools.cache
def _certified(tables: str) -> Certificate:
    return certificates.certify(json.loads(tables))


def certify(tables: dict) -> Certificate:
    """Each composition once."""
    return _certified(json.dumps(tables, sort_keys=True))


def verdict(found: Certificate, trap: str) -> Verdict:
    return next(v for v in found.verdicts if v.trap == trap)


def relative(found: Certificate, world: str) -> float:
    return next(b.relative for b in found.bias if b.world == world)


@pytest.fixture(scope="module")
def grpo() -> Certificate:
    return certify({"objective": {"aggregation": {"kind": "seq_mean_token_mean"}}})


# --- what is known to be right ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_compositions_are_unbiased(name: str) -> None:
    found = certify(UNBIASED[name])
    for world in ("stopping", "scales", "tool"):
        assert relative(found, world) < 1e-9, world
    assert not found.caught
    assert {v.status for v in found.verdicts} == {"clean"}
    assert all(flow.regret < 1e-3 and not flow.hacked for flow in found.flows)
    assert found.seconds < 20


def test_a_baseline_lowers_the_variance_and_not_the_expectation() -> None:
    plain, rloo = certify(UNBIASED["reinforce"]), certify(UNBIASED["rloo"])
    assert all(b.trace < a.trace and b.signal > a.signal for a, b in zip(plain.spread, rloo.spread, strict=True))


def test_what_is_left_out_after_retries_is_told() -> None:
    found = certify(UNBIASED["rloo"])
    assert 0.01 < relative(found, "faulty") < 0.5
    assert "after 2 retries is left out" in verdict(found, "retry until success").sentence


# --- the traps --------------------------------------------------------------------------------------------------


def test_the_mean_of_a_turn_index_weighs_late_turns_less() -> None:
    terms = [{"key": ["prompt", "turn"], "scale": "none", "credit": "return_to_go"}]
    declared, own = certify({"advantage": terms, "objective": SUM}), run(FILES / "turn_mean.py")
    for found in (declared, own):
        caught = verdict(found, "per-turn normalisation")
        assert [v.trap for v in found.caught] == ["per-turn normalisation"]
        assert caught.number < 0.5
        weights = next(b.turns for b in found.bias if b.world == "stopping")
        assert weights[0] == 1.0 > weights[1] > weights[2]
    assert relative(declared, "stopping") > 0.1
    assert relative(own, "stopping") == pytest.approx(relative(declared, "stopping"), abs=1e-9)


def test_pairs_at_the_uniform_policy_give_the_weights_of_the_proof() -> None:
    """With two members the turn-index mean weighs turn k by P(the other one gets there) / 2: 1/2, 1/4, 1/8."""
    lab = Lab(load(FILES / "turn_mean.py"), STOPPING, members=2)
    found = measures.shares(lab.estimate(lab.mdp.legal * 0.0), 0)
    assert found == pytest.approx([0.5, 0.25, 0.125], abs=1e-12)


def test_std_weighs_a_prompt_by_the_inverse_of_its_scale(grpo: Certificate) -> None:
    caught = verdict(grpo, "std scaling")
    assert caught.status == "caught"
    assert 9 < caught.number < 13
    assert relative(grpo, "scales") > 0.5


def test_a_mean_over_tokens_weighs_long_episodes_less(grpo: Certificate) -> None:
    caught = verdict(grpo, "length normalisation")
    assert caught.status == "caught"
    assert 0.2 < caught.number < 0.5
    assert verdict(grpo, "per-turn normalisation").status == "clean"


def test_failures_that_count_as_zeros_lead_away_from_the_best_action() -> None:
    found = run(FILES / "silent_zeros.py")
    caught = verdict(found, "silent zeros")
    assert [v.trap for v in found.caught] == ["silent zeros"]
    assert caught.number > 0.3
    assert "leads away" in caught.sentence


def test_playing_again_until_it_works_changes_what_is_learnt() -> None:
    found = run(FILES / "retry_until_success.py")
    caught = verdict(found, "retry until success")
    assert [v.trap for v in found.caught] == ["retry until success"]
    assert caught.number > 0.1


def test_correcting_twice_squares_the_weights() -> None:
    caught = verdict(run(FILES / "double_correction.py"), "double correction")
    assert caught.status == "caught"
    assert caught.number == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "power"),
    [
        ({}, 1.0),
        ({"ratio": {"kind": "none"}, "gate": {"kind": "none"}}, 0.0),
        ({"proximal": "learner"}, 0.0),
        ({"proximal": "learner", "behaviour": [{"kind": "truncate", "cap": 2.0}]}, 1.0),
    ],
)
def test_the_power_of_the_mismatch(objective: dict, power: float) -> None:
    status, number, _ = TRAPS["double correction"](load({"objective": objective}))
    assert status == "clean"
    assert number == pytest.approx(power, abs=1e-6)


def test_a_refused_declaration_is_reported_and_measured() -> None:
    found = certify({"objective": {"behaviour": [{"kind": "truncate", "cap": 2.0}]}})
    assert "corrects twice" in found.refused
    caught = verdict(found, "double correction")
    assert caught.status == "caught"
    assert caught.sentence.startswith("Refused when loaded")
    assert "corrects twice" in report(found)


# --- hackability ------------------------------------------------------------------------------------------------


def test_components_normalised_apart_buy_the_proxy_with_the_truth() -> None:
    found = certify({"advantage": [{"key": ["prompt", "component"]}]})
    assert min(flow.regret for flow in found.flows) > 0.1
    nearly = next(flow for flow in found.flows if flow.start == "nearly right")
    assert nearly.truth[1] < nearly.truth[0]


def test_a_reward_of_the_proxy_alone_is_hacked() -> None:
    found = certify({**UNBIASED["rloo"], "reward": {"op": "term", "name": "tool", "default": 0.0}})
    assert found.hackable
    assert all(flow.goal[1] > 2.9 for flow in found.flows)


# --- nothing is falsely clean -----------------------------------------------------------------------------------


def test_what_has_hints_is_not_certified_clean() -> None:
    found = certify({**UNBIASED["rloo"], "strategy": {"kind": "hint_levels"}})
    assert "hint_levels" in found.gaps[0]
    assert {v.status for v in found.verdicts} == {"not certified"}
    assert "not measured" in report(found)


def test_what_is_caught_in_part_stays_caught() -> None:
    found = certify({"strategy": {"kind": "hint_levels"}})
    assert verdict(found, "std scaling").status == "caught"
    assert not any(v.status == "clean" for v in found.verdicts)


def test_another_family_is_outside() -> None:
    found = certify({"preference": {"kind": "dpo"}})
    assert "another family" in found.outside
    assert {v.status for v in found.verdicts} == {"not certified"}
    assert len(found.verdicts) == len(TRAPS)
    assert not found.bias


def test_a_method_that_learns_nothing_is_not_clean() -> None:
    nothing = [{"key": "none", "centre": "none", "scale": "none", "weight": 0.0}]
    found = certify({"advantage": nothing, "objective": SUM})
    assert verdict(found, "std scaling").status == "not certified"
    assert verdict(found, "per-turn normalisation").status == "not certified"


# --- loading ----------------------------------------------------------------------------------------------------


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    empty = tmp_path / "empty.py"
    empty.write_text("def helper():\n    return 1\n")
    with pytest.raises(ConfigError, match="replaces nothing"):
        load(empty)
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "nowhere.py")
    with pytest.raises(UnknownName, match="objective"):
        load({"objectiv": {}})
    with pytest.raises(ConfigError):
        load({"objective": {"gate": {"kind": "klip"}}})
    tries = tmp_path / "tries.py"
    tries.write_text("attempts = 0\ndef retry(t):\n    return False\n")
    with pytest.raises(ConfigError, match="attempts"):
        load(tries)


def test_a_certificate_is_plain_data(grpo: Certificate) -> None:
    told = msgspec.json.decode(msgspec.json.encode(grpo))
    assert told["verdicts"][0]["status"] in ("clean", "caught")
    assert all(math.isfinite(b["relative"]) for b in told["bias"])


# --- methods of the catalogue -----------------------------------------------------------------------------------


def test_a_reward_that_never_differs_is_imitation() -> None:
    found = certify({"reward": {"op": "weighted_sum", "plus": [1.0]}, **UNBIASED["reinforce"]})
    assert "imitates" in found.outside
    assert not any(v.status == "clean" for v in found.verdicts)


@pytest.mark.parametrize("name", ["rloo", "remax"])
def test_methods_by_name(name: str) -> None:
    found = run(name)
    assert found.name == name
    assert not found.caught
    assert relative(found, "stopping") < 1e-9


def test_a_greedy_baseline_and_a_selection_go_through_the_real_strategies() -> None:
    found = run("dcpo")
    assert verdict(found, "silent zeros").status == "clean"
    assert relative(found, "stopping") > 0.05


def test_bundles_labels_and_critics_are_enumerated() -> None:
    bundle = [{"key": "bundle", "centre": "none", "scale": "none", "credit": "share", "transform": {"kind": "risk"}}]
    halves = [{"key": ["prompt", "label:half"], "scale": "none"}]
    critic = [{"key": "none", "centre": "none", "scale": "none", "credit": "gae", "gamma": 1.0, "lam": 0.7}]
    assert alone(bundle, SCALES) > 0.01
    assert alone(halves, STOPPING) < 1e-9
    assert alone(critic, STOPPING) < 1e-9


def alone(terms: list, mdp: MDP, **tables: object) -> float:
    """The relative bias in one world, at a policy that is not uniform."""
    composition = load({"advantage": terms, "objective": SUM, **tables})
    theta = measures.policies(mdp)[1]
    return measures.bias("", Lab(composition, mdp, members=2).estimate(theta)).relative


def test_groups_without_signal_dropped_or_refilled() -> None:
    """Refilled they cost nothing. Dropped, a mean over what is left weighs prompts by what their neighbours drew, and
    without a baseline an all-equal group had a signal."""
    rloo, reinforce = UNBIASED["rloo"]["advantage"], UNBIASED["reinforce"]["advantage"]
    assert alone(rloo, SCALES, strategy={"kind": "dynamic_filter"}) < 1e-9
    assert 1e-5 < alone(rloo, SCALES, rollout={"drop_equal": True}) < 0.05
    assert alone(reinforce, SCALES, rollout={"drop_equal": True}) > 0.1


def test_what_is_not_a_number_is_never_clean() -> None:
    found = certificates.certify({"objective": {"gate": {"kind": "quadratic", "coef": float("nan")}}})
    assert found.refused
    assert {verdict.status for verdict in found.verdicts} == {"not certified"}
    custom = {"objective": {"gate": {"kind": "custom", "target": "custom_pieces:strange"}}}
    with pytest.raises(RecordError, match="not finite in the world"):
        certificates.certify(custom)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('half done')", "cannot be imported: ValueError: half done"),
        ("def reward(trajectory):\n    return 1 / 0", "broke while it was measured: ZeroDivisionError"),
    ],
)
def test_a_file_that_breaks_is_told_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        run(path)


def test_terms_that_are_none_are_refused_as_in_a_run() -> None:
    with pytest.raises(ConfigError, match=r"advantage|array"):
        certificates.certify({"advantage": 3})
