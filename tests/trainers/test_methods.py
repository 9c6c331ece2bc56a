"""Every method of the catalogue: listed, shown, refused where it contradicts itself, true to its printed numbers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from making import ledger, trajectory
from method_steps import EVERY, filled
from numpy.typing import NDArray

from agentgym import registry
from agentgym.advantages import advantages
from agentgym.cli import main
from agentgym.collate import collate
from agentgym.errors import AgentGymError, ConfigError, DataError, UnknownName
from agentgym.modeling import build
from agentgym.rewards import composer, derived
from agentgym_trainers import methods
from agentgym_trainers.candidates import InTRO
from agentgym_trainers.candidates.learner import weights
from agentgym_trainers.config import resolve
from agentgym_trainers.controllers import begun, controlled, numbers
from agentgym_trainers.forward import Forward
from agentgym_trainers.methods import declared, load, names
from agentgym_trainers.methods.describe import axes, markdown
from agentgym_trainers.objective import declare
from agentgym_trainers.objective.aggregations import totals
from agentgym_trainers.objective.compute import loss
from agentgym_trainers.objective.declare import BranchClip, Geometric, LevelsClip, Mask, Mix, NoGate, Objective
from agentgym_trainers.objective.tokens import Tokens
from agentgym_trainers.preference import losses
from agentgym_trainers.strategies.hints import next_level
from agentgym_trainers.strategies.plain import contrast

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    "ppo",
    "grpo",
    "dr-grpo",
    "rloo",
    "reinforce-pp",
    "reinforce-pp-baseline",
    "remax",
    "opo",
    "gpg",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
    "dppo-tv",
    "dppo-kl",
    "dro",
    "vespo",
    "gdpo",
    "gigpo",
    "minpro",
    "dhpo",
    "bapo",
    "fiberpo",
    "fiberpo-domain",
    "r2vpo",
    "riskpo",
    "g2rpo",
    "drpo",
    "degrpo",
    "adaptthink",
    "dtpo",
    "hrpo",
    "dcpo",
    "sage",
    "pope",
    "kepo",
    "complementary-actor",
    "complementary-extractor",
    "bupo",
    "papo",
    "cgpo-crpg",
    "cgpo-crraft",
    "cgpo-codpo",
    "etcon-tpsft",
    "etcon-grpo",
    "mdpo",
    "turn-baseline",
    "pass-at-k",
    "tis",
    "icepop",
    "mis",
    "geometric",
    "veto",
    "decoupled-ppo",
    "dpo",
    "rpo",
    "inpo",
    "dno",
    "srpo",
    "intro",
}


# --- the catalogue ----------------------------------------------------------------------------------------------


def test_the_catalogue_is_whole() -> None:
    assert set(names()) == WANTED
    assert {spec.id for spec in registry.catalogue("objectives").values()} == set(names())


@pytest.mark.parametrize("name", names())
def test_every_method_is_a_declaration_with_its_evidence(name: str) -> None:
    method = load(name)
    declared(method)
    about = method.about
    assert about.title
    assert about.formula.strip()
    assert about.badge != "reproduced"
    assert set(about.mark) <= set("CNMR/")
    assert registry.lookup(name, "objectives").summary == about.title
    if about.badge == "code-checked":
        assert "C" in about.mark
    if "R" in about.mark:
        assert about.badge in ("reconstruction", "idea carried")
        assert about.differs, "what was reconstructed is said"
    if about.reward:
        composer(filled(about.reward))


@pytest.mark.parametrize("name", EVERY)
def test_a_method_says_what_a_run_might_say_otherwise(name: str) -> None:
    """Sections that a run has defaults of its own for are spelled out."""
    table = load(name).table
    assert "objective" in table
    assert "advantage" in table or "contrast" in table["objective"]


def test_listing_imports_no_torch() -> None:
    code = "import sys; from agentgym.cli import main; main(['objectives', '--json']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f'"name": "{name}"' in done.stdout for name in WANTED)


def test_listing_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Half a second for the command; what importing costs, test_cost of the house measures."""

    def seconds() -> float:
        began = time.perf_counter()
        assert answer(capsys, "objectives")[0] == 0
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    return code, *capsys.readouterr()


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "objectives", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["objectives"]}
    assert set(rows) == set(names())
    assert rows["gspo"]["axes"]["ratio"] == "sequence"
    assert rows["gspo"]["paper"] == "2507.18071"


@pytest.mark.parametrize("name", names())
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "objectives", "show", name, "--json")
    shown = json.loads(out)
    method = load(name)
    assert code == 0
    assert shown["badge"] == method.about.badge
    assert shown["axes"] == axes(declared(method), full=True)
    assert tomllib.loads(shown["toml"]) == method.table
    code, out, _ = answer(capsys, "objectives", "show", name)
    assert code == 0
    assert method.about.title in out
    assert method.about.badge in out


def test_unknown_names_and_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, "objectives", "show", "gsppo")
    assert (code, out) == (2, "")
    assert "did you mean 'gspo'?" in err
    with pytest.raises(UnknownName, match="did you mean 'icepop'"):
        load("ice-pop")
    with pytest.raises(DataError, match="nowhere"):
        load("nowhere.toml")
    mine = tmp_path / "mine.toml"
    mine.write_text('[objectif]\nkind = "clip"\n')
    with pytest.raises(UnknownName, match="did you mean 'objective'"):
        load(str(mine))
    mine.write_text('[about]\ntitle = "x"\nbadge = "proven"\nmark = ""\nformula = ""\n')
    with pytest.raises(ConfigError, match="badge"):
        load(str(mine))


def test_a_file_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[objective]\ngate = {kind = "clip", low = 0.1, high = 0.3}\n')
    assert declared(load(str(mine))).objective.gate.high == 0.3
    code, out, _ = answer(capsys, "objectives", "show", str(mine))
    assert code == 0
    assert "clip (low 0.1, high 0.3, dual 0, adaptive none)" in " ".join(out.split())


@pytest.mark.parametrize(("name", "code"), [("turn-baseline", 0), ("grpo", 1), ("dpo", 0)])
def test_certify(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """0: clean, or nothing that could be measured; 1: it walks into a trap."""
    found, out, _ = answer(capsys, "objectives", "certify", name, "--json")
    assert found == code
    caught = [verdict["trap"] for verdict in json.loads(out)["verdicts"] if verdict["status"] == "caught"]
    assert bool(caught) == bool(code)
    assert answer(capsys, "objectives", "certify", name + "x")[0] == 2


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert markdown() in page, "write the output of `agentgym objectives --markdown` into docs/objectives.md"


NEEDS_MORE = {
    "bupo": "layer 5 of a model of 3 layers",
    "gigpo": "gamma",  # the preset's potential has another discount
    "kepo": "teacher",
}


@pytest.mark.parametrize("name", names())
def test_a_run_takes_the_method_as_it_is(name: str) -> None:
    """On a preset; what needs more than a preset has is refused with what it needs."""
    settings = [f"method={name}"]
    if name in NEEDS_MORE:
        with pytest.raises(AgentGymError, match=NEEDS_MORE[name]):
            resolve("shopping/laptop", settings)
        return
    config, method = resolve("shopping/laptop", settings), declared(load(name))
    assert config.objective == method.objective or name not in EVERY
    assert config.advantage == method.advantage
    assert (config.strategy, config.whiten) == (method.strategy, method.whiten)
    other = next((family for family in ("preference", "candidates") if family in load(name).table), "")
    assert config.run.algorithm == (other or "policy_gradient")
    assert not other or getattr(config, other) == getattr(method, other)


# --- what cannot be meant ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_contradictions_are_refused(name: str) -> None:
    """A gate for parts that the ratio has not; a correction for what the ratio corrects; a misspelt option."""
    o = declared(load(name)).objective
    misfit = LevelsClip() if isinstance(o.ratio, Mix) else BranchClip()
    with pytest.raises(ConfigError, match="gate"):
        msgspec.structs.replace(o, gate=misfit)
    with pytest.raises(ConfigError, match="twice"):
        Objective(proximal="sampler", ratio=Geometric(), gate=NoGate(), behaviour=(*o.behaviour, Mask()))
    with pytest.raises(ConfigError, match="unknown field"):
        declared(table_of(name, objective={"gatte": {}}))
    with pytest.raises(ConfigError):
        declared(table_of(name, strategy={"kind": "plainest"}))


def table_of(name: str, **sections: Any) -> methods.Method:
    method = load(name)
    return msgspec.structs.replace(method, table={**method.table, **sections})


def test_token_bounds_on_a_sequence_are_refused() -> None:
    gspo = load("gspo").table["objective"]
    with pytest.raises(ConfigError, match="thousandths"):
        declared(table_of("gspo", objective={**gspo, "gate": {"kind": "clip", "low": 0.2, "high": 0.2}}))


# --- printed numbers: advantages --------------------------------------------------------------------------------

Played = Sequence[Sequence[Any]]


def credited(
    name: str, groups: Played, values: Sequence[NDArray[np.float64]] | None = None, **sections: Any
) -> list[list[float]]:
    """What the method gives each turn. A member is a reward, or a dict with `rewards` (one a turn) and other facts."""
    method = declared(table_of(name, **sections))
    played = []
    for g, members in enumerate(groups):
        for m, what in enumerate(members):
            facts = dict(what) if isinstance(what, Mapping) else {"rewards": [what]}
            rewards = [r if isinstance(r, Mapping) else {"r": float(r)} for r in facts.pop("rewards")]
            t = trajectory(rewards, group=f"g{g}", **facts)
            played.append(t.replace(episode=t.episode.replace(member=m)))
    compose = composer(filled(method.reward or "environment"))
    samples = [(t, compose.trajectory(t, derived(t, [0.0] * len(t.turns)))) for t in played]
    found = advantages(samples, method.advantage, whiten=method.whiten, values=values)
    return [per_turn.tolist() for per_turn in found]


def terms_with(name: str, **options: Any) -> list[dict[str, Any]]:
    """The method's advantage terms, each with these options."""
    return [{**term, **options} for term in load(name).table["advantage"]]


def single(found: list[list[float]]) -> list[float]:
    return [values[0] for values in found]


PER_TRAJECTORY: list[tuple[str, Played, list[float]]] = [
    ("grpo", [[1, 0, 0, 1]], [0.866024, -0.866024, -0.866024, 0.866024]),
    ("grpo", [[1, 0, 0, 0]], [1.499997, -0.499999, -0.499999, -0.499999]),
    ("grpo", [[0.7]], [0.7]),
    ("grpo", [[2, 2, 2]], [0, 0, 0]),
    ("dr-grpo", [[1, 0, 0, 0]], [0.75, -0.25, -0.25, -0.25]),
    ("rloo", [[1, 0, 0, 0]], [1, -0.333333, -0.333333, -0.333333]),
    ("reinforce-pp", [[1], [1], [0]], [0.57735, 0.57735, -1.154701]),
    ("reinforce-pp-baseline", [[1, 0], [0, 0]], [1.224745, -1.224745, 0, 0]),
    ("remax", [[{"rewards": [1], "metrics": {"greedy": 0.4}}]], [0.6]),
    ("opo", [[{"rewards": [1], "tokens": 2}, {"rewards": [0], "tokens": 4}]], [0.666667, -0.333333]),
    ("gpg", [[1, 0], [0, 0]], [2, -2, 0, 0]),
    ("pass-at-k", [[0.9, 0.4, 0.1]], [1.237177, 0, 0]),
    ("g2rpo", [[0.1, 0.5, 0.5, 0.9]], [-1.150349, 0, 0, 1.150349]),
    ("g2rpo", [[1, 0, 0, 0]], [1.150349, -0.383450, -0.383450, -0.383450]),
    ("cgpo-crpg", [[1], [0.5], [0]], [0.5, 0, -0.5]),
    ("cgpo-crraft", [[0.731059, 0.5, 0]], [0.731059, 0, 0]),
    ("etcon-tpsft", [[0.3, -2]], [1, 1]),
    ("kepo", [[1, 0, 0, 1]], [0.865875, -0.865875, -0.865875, 0.865875]),
    (
        "complementary-actor",
        [
            [{"rewards": [r], "labels": {"experience": "with"}} for r in (1, 1, 0)]
            + [{"rewards": [r], "labels": {"experience": "without"}} for r in (0, 0, 1)]
        ],
        [0.577349, 0.577349, -1.154699, -0.577349, -0.577349, 1.154699],
    ),
]


@pytest.mark.parametrize(("name", "groups", "expected"), PER_TRAJECTORY)
def test_advantages_of_trajectories(name: str, groups: Played, expected: list[float]) -> None:
    assert single(credited(name, groups)) == pytest.approx(expected, abs=5e-6)


def test_pass_at_k_without_the_division() -> None:
    found = credited("pass-at-k", [[0.9, 0.4, 0.1]], advantage=terms_with("pass-at-k", scale="none"))
    assert single(found) == pytest.approx([0.5, 0, 0])


def test_g2rpo_with_the_other_convention() -> None:
    options = terms_with("g2rpo", transform={"kind": "rank_normal", "convention": "plus_one"})
    assert single(credited("g2rpo", [[0.1, 0.5, 0.5, 0.9]], advantage=options)) == pytest.approx(
        [-0.841621, 0, 0, 0.841621], abs=2e-6
    )


def test_gdpo_normalises_every_component_apart() -> None:
    rewards = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.1}, {"a": 0.0, "b": 0.1}, {"a": 1.0, "b": 0.0}]
    group = [[{"rewards": [r]} for r in rewards]]
    apart = single(credited("gdpo", group, whiten="none", advantage=terms_with("gdpo", eps=1e-6)))
    assert [abs(x) for x in apart] == pytest.approx([1.35e-5] * 4, abs=1e-7)
    together = single(credited("grpo", group))
    assert [abs(x) for x in together] == pytest.approx([0.866024] * 4, abs=3e-6)


def test_gigpo() -> None:
    """3.3 of the reference, with gamma 0.5."""
    members = [
        {"rewards": [0, 1], "anchors": ["s0", "s1"]},
        {"rewards": [0, 0], "anchors": ["s0", "s2"]},
        {"rewards": [0, 0], "anchors": ["s0", "s1"]},
    ]
    outcome, anchor = load("gigpo").table["advantage"]
    found = credited("gigpo", [members], advantage=[outcome, {**anchor, "gamma": 0.5}])
    expected = [[1.0, 1.166667], [-0.5, -0.333333], [-0.5, -0.833333]]
    for values, wanted in zip(found, expected, strict=True):
        assert values == pytest.approx(wanted, abs=1e-6)


def test_dtpo() -> None:
    tool, outcome = (0.1, 0.0, 0.1, 0.0), (1.5, 0.5, 0.5, 1.5)
    members = [{"rewards": [{"tool": a}, {"outcome": b}]} for a, b in zip(tool, outcome, strict=True)]
    found = credited("dtpo", [members])
    first, last = ([values[k] for values in found] for k in (0, 1))
    assert first == pytest.approx([1.125827, -1.125827, -0.606221, 0.606221], abs=2e-5)
    assert last == pytest.approx([0.866024, -0.866024, -0.866024, 0.866024], abs=2e-5)


def test_hrpo_adds_raw_action_rewards() -> None:
    members = [
        {"rewards": [{"action": 0.0}, {"action": -0.1, "answer": 1.0}]},
        {"rewards": [{"action": 0.0}, {"action": 0.0, "answer": 0.0}]},
    ]
    found = credited("hrpo", [members], reward={"op": "term", "name": "answer"})
    assert found[0] == pytest.approx([0.707106, 0.607106], abs=2e-6)
    assert found[1] == pytest.approx([-0.707106, -0.707106], abs=2e-6)


def test_turn_baseline_takes_the_mean_of_the_others() -> None:
    members = [{"rewards": [0, 1]}, {"rewards": [0, 0]}, {"rewards": [1]}]
    found = credited("turn-baseline", [members])
    assert found[0] == pytest.approx([1 - (0 + 1) / 2, 1 - 0])
    assert found[1] == pytest.approx([0 - (1 + 1) / 2, 0 - 1])
    assert found[2] == pytest.approx([1 - (1 + 0) / 2])


@pytest.mark.parametrize(
    ("correct", "nothinking", "expected"), [(1, 1, 0.45), (0, 1, -0.55), (1, 0, 0.4), (0, 0, -0.6)]
)
def test_adaptthink_against_the_reference(correct: int, nothinking: int, expected: float) -> None:
    member = {"rewards": [{"correct": correct, "nothinking": nothinking}], "metrics": {"reference": 0.6}}
    found = credited("adaptthink", [[member]], reward=load("adaptthink").about.reward)
    assert single(found) == pytest.approx([expected])


def test_dapo_charges_overlong_replies() -> None:
    reward = {"op": "weighted_sum", "plus": ["environment", {"op": "overlong", "max": 10, "cache": 4}]}
    table = table_of("dapo", reward=reward, advantage=terms_with("dapo", centre="none", scale="none")).table
    members = [[{"rewards": [0.0], "tokens": n} for n in (5, 6, 8, 10, 11)]]
    assert single(credited("dapo", members, **table)) == pytest.approx([0, 0, -0.5, -1, -1])


def test_the_paper_s_own_rewards() -> None:
    etcon = composer(load("etcon-grpo").about.reward)
    facts = {"format": 1, "exact": 0, "subset": 1, "cleanliness": 0.4, "consistency": 0.5}
    assert etcon.compose(ledger(facts)).value == pytest.approx(0.685)
    mode = composer(load("degrpo").about.reward)
    rewards = [mode.compose(ledger({"correct": c, "think": t})).value for c, t in ((1, 0), (1, 1), (0, 0))]
    assert rewards == [1.0, 0.5, -1.0]
    crpg = composer({**load("cgpo-crpg").about.reward, "kl_max": 2.0})
    facts = {"safe": 1, "factual": 1, "reward": 2, "baseline": 1, "policy.kl": 0.5}
    assert crpg.compose(ledger(facts)).value == pytest.approx(0.548294, abs=1e-6)
    assert crpg.compose(ledger({**facts, "safe": 0})).value == 0


def test_ppo_estimates_through_turns() -> None:
    """3.1 of the reference, before whitening: V = 0.5, 0.6, rewards 0, 1, gamma 1, lambda 0.5."""
    term = terms_with("ppo", lam=0.5, scale="none")
    values = [np.asarray([0.5, 0.6])]
    found = credited("ppo", [[{"rewards": [0, 1]}]], values=values, advantage=term)
    assert found[0] == pytest.approx([0.3, 0.4])


@pytest.mark.parametrize(
    ("natural", "expected"),
    [
        (True, [-4.133333, -1.6, -0.933333, -0.266667, 0.0]),
        (False, [-2.4, 0.133333, 0.8, 1.466667, 1.733333]),
    ],
)
def test_riskpo_mixes_quantiles(natural: bool, expected: list[float]) -> None:
    """Bundles of one prompt, the whole value to each member; within 1e-5, as the reference leaves out the 1e-6."""
    (term,) = load("riskpo").table["advantage"]
    transform = {**term["transform"], "natural": natural, "track": False}
    term = {**term, "bundle": 1, "credit": "trajectory", "transform": transform}
    found = credited("riskpo", [[0, 1, 2, 3, 5]], advantage=[term])
    assert single(found) == pytest.approx(expected, abs=2e-5)


def test_selection_of_dcpo_and_levels_of_sage() -> None:
    dcpo = declared(load("dcpo")).strategy
    assert (dcpo.sample, dcpo.keep) == (16, 8)
    assert contrast([1, 1, 0.6, 0.3, 0, 0], [900, 300, 500, 800, 200, 1500], 4) == [1, 0, 4, 5]
    sage = msgspec.structs.replace(declared(load("sage")).strategy, variant="light")
    level, seen = 0, []
    for success in (0.0, 0.0, 0.2, 0.5):
        level = next_level(level, success, sage)
        seen.append(level)
    assert seen == [1, 2, 2, 1]


# --- printed numbers: losses ------------------------------------------------------------------------------------


def tokens(
    ratios: Sequence[float], advantages: Sequence[float] | float = 1.0, lengths: Sequence[int] = (), **columns: Any
) -> Tokens:
    """Tokens with these ratios to the proximal policy, in sequences of these lengths (one sequence)."""
    counts = lengths or (len(ratios),)
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in columns.items()}
    logp = given.pop("logp", torch.full((len(ratios),), -1.0, dtype=torch.float64))
    old = logp - torch.tensor(ratios, dtype=torch.float64).log()
    a = torch.tensor(advantages, dtype=torch.float64) * torch.ones(len(ratios), dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    given = {name: x.long() if name in ("group", "domain", "turn") else x for name, x in given.items()}
    return Tokens(
        logp=logp.requires_grad_(),
        **{"old": old, "sampled": old, "advantages": a, "sequence": owner, "sequences": len(counts), **given},
    )


def objective(name: str, **changes: Any) -> Objective:
    """The method's objective without its regularisers, with other choices on some axes."""
    o = declared(load(name)).objective
    found: Objective = msgspec.structs.replace(o, regularisers=(), controllers=(), **changes)
    return found


def lost(o: Objective, t: Tokens) -> float:
    return float(loss(o, t, totals(o.aggregation, t))[0].detach())


def slopes(o: Objective, t: Tokens) -> list[float]:
    (found,) = torch.autograd.grad(loss(o, t, totals(o.aggregation, t))[0], t.logp)
    return found.tolist()


ONE_SEQUENCE: list[tuple[str, list[float], Any, float]] = [
    *((n, [r], a, x) for n in ("ppo", "grpo", "gigpo", "sage") for r, a, x in ((1.5, 1.0, -1.2), (0.5, 1.0, -0.5))),
    *((n, [r], a, x) for n in ("ppo", "grpo", "dcpo", "bupo") for r, a, x in ((1.5, -1.0, 1.5), (0.5, -1.0, 0.8))),
    ("ppo", [5.0], -1.0, 3.0),
    ("etcon-grpo", [5.0], -1.0, 3.0),
    ("etcon-grpo", [1.5], 1.0, -1.3),
    ("etcon-tpsft", [1.5], 1.0, -1.2),
    ("dapo", [1.5], 1.0, -1.28),
    ("dtpo", [1.5], 1.0, -1.24),
    ("cispo", [1.5], 1.0, 1.28),
    ("complementary-extractor", [1.5], 1.0, 1.1),
    ("complementary-extractor", [0.5], 1.0, 0.9),
    ("sapo", [1.5], 1.0, -2.489837),
    ("gmpo", [math.exp(x) for x in (0.5, 0.1, 0.3)], 1.0, -1.305605),
    ("hrpo", [1.2, 0.9], 1.0, -1.08),
    ("dhpo", [1.5, 0.9], 1.0, -(1.15 + 1.0) / 2),
    ("bapo", [1.5, 0.5, 1.0, 0.7], [1.0, -1.0, 1.0, -1.0], -(1.2 - 0.6 + 1.0 - 0.7) / 4),
    ("bapo", [1.5, 0.5, 0.9, 0.9], [1.0, -1.0, -1.0, -1.0], -(1.5 - 0.8 - 0.9 - 0.9) / 4),
    ("fiberpo", [math.exp(x) for x in (0.5, 0.1, 0.3)], 1.0, -1.237742),
    ("r2vpo", [1.5], 1.0, -1.49),
    ("mdpo", [1.1], 1.0, -1.1),
    ("rloo", [1.5], 1.0, -1.0),
]


@pytest.mark.parametrize(("name", "ratios", "advantages", "expected"), ONE_SEQUENCE)
def test_losses_of_one_sequence(name: str, ratios: list[float], advantages: Any, expected: float) -> None:
    found = lost(objective(name), tokens(ratios, advantages, turn=[0] * len(ratios)))
    assert found == pytest.approx(expected, abs=1e-6)


COEFFICIENTS: list[tuple[str, float, float, float]] = [
    ("sapo", 1.5, 1.0, 1.410022),
    ("r2vpo", 1.5, 1.0, 1.44),
    ("dro", 1.5, 1.0, 0.959453),
    ("vespo", 1.5, 1.0, 0.502043),
    ("vespo", 1.5, -1.0, -1.241593),
    ("vespo", 1.0, 1.0, 1.0),
    ("cispo", 1.5, 1.0, 1.28),
    ("opo", 1.5, 1.0, 1.0),
]


@pytest.mark.parametrize(("name", "ratio", "advantage", "expected"), COEFFICIENTS)
def test_gradient_coefficients(name: str, ratio: float, advantage: float, expected: float) -> None:
    assert slopes(objective(name), tokens([ratio], advantage)) == pytest.approx([-expected], abs=1e-6)


@pytest.mark.parametrize(("advantage", "expected"), [(1.0, 0.0), (-1.0, 1.6)])
def test_dppo_keeps_what_moves_back(advantage: float, expected: float) -> None:
    t = tokens([1.6], advantage, logp=[math.log(0.8)])
    assert slopes(objective("dppo-tv"), t) == pytest.approx([expected])
    assert (slopes(objective("dppo-kl"), t)[0] == 0) == (expected == 0)


def test_gspo_takes_the_geometric_mean() -> None:
    t = tokens([1.2, 0.9, 1.1])
    assert lost(objective("gspo", gate=NoGate()), t) == pytest.approx(-1.059105, abs=1e-6)
    assert lost(objective("gspo"), t) == pytest.approx(-1.0004, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.2, 0.6, 0.75, 0.4]),
        ({"cap_one": True}, [1.2, 0.5, 0.75, 0.4]),
        ({"inclusive": True}, [1.2, 0.5, 0.5, 0.5]),
    ],
)
def test_minpro(options: dict[str, bool], expected: list[float]) -> None:
    ratio = msgspec.structs.replace(objective("minpro").ratio, **options)
    o = objective("minpro", ratio=ratio, gate=NoGate())
    assert slopes(o, tokens([1.2, 0.5, 1.5, 0.8])) == pytest.approx([-x / 4 for x in expected])


def test_dhpo_weighs_by_entropy() -> None:
    t = tokens([1.5, 0.9], entropy=[0.25, 1.0])
    assert lost(objective("dhpo", ratio=Mix(by="entropy")), t) == pytest.approx(-(1.125 + 0.9) / 2)


def test_fiberpo_moves_along_the_fibre_when_its_base_is_spent() -> None:
    """Residuals 0.2 and -0.2 stand on the budget: printed is the central difference across it, the mean of both sides.
    Just inside, the fibre's directions alone move: the gradient sums to zero."""
    o, logs, h = objective("fiberpo"), [0.5, 0.1, 0.3], 1e-6

    def at(k: int, by: float) -> float:
        return lost(o, tokens([math.exp(x + by * (i == k)) for i, x in enumerate(logs)]))

    central = [(at(k, h) - at(k, -h)) / (2 * h) for k in range(3)]
    assert central == pytest.approx([0.025509, 0.107479, -0.132988], abs=1e-6)
    inside = objective("fiberpo", gate=LevelsClip(budgets=(0.2, 0.2 + 1e-9)))
    assert sum(slopes(inside, tokens([math.exp(x) for x in logs]))) == pytest.approx(0, abs=1e-12)
    a = objective("fiberpo", gate=LevelsClip(budgets=(0.2, 0.2), variant="A"))
    mean = (1.491825 + 1.105171 + 1.349859) / 3
    assert lost(a, tokens([math.exp(x) for x in (0.5, 0.1, 0.3)])) == pytest.approx(-mean, abs=1e-6)


def test_fiberpo_domain() -> None:
    """Domain 0.05, group 0.25, trajectory 0.3 and token 0.5 lie above budgets 0.1, 0.15, 0.2, 0.2 in turn."""
    logs = [0.5, 0.1, 0.2, 0.2, -0.15, -0.15, -0.15, -0.15]
    t = tokens([math.exp(x) for x in logs], [1.0] + [0.0] * 7, (2, 2, 4), group=[0, 0, 1], domain=[0, 0, 0])
    assert lost(objective("fiberpo-domain"), t) == pytest.approx(-1.568312 / 2 / 3, abs=1e-6)


def test_drpo_by_its_gradient() -> None:
    """5.8: two right, two wrong; J's gradient is that of sum omega s - sum softmax(s / tau) s."""
    logp = [-0.2, -0.4, -0.3, -0.6]
    lengths = torch.tensor([0.25, 0.75, 0.5, 0.5])
    table = load("drpo").table["objective"]
    contrast = {**table["contrast"], "length_temperature": 0.5, "max_length": 4}
    o = declared(table_of("drpo", objective={**table, "contrast": contrast, "regularisers": []})).objective
    counts = (lengths * 4).int().tolist()
    spread = [x for x, n in zip(logp, counts, strict=True) for _ in range(n)]
    t = tokens([1.0] * len(spread), 0.0, counts, logp=spread, group=[0] * 4, reward=[1.0, 1.0, 0.0, 0.0])
    found = torch.tensor(slopes(o, t))
    each = [float(part.sum()) * 4 for part in found.split(counts)]
    assert each == pytest.approx([-0.731059, -0.268941, 0.507499, 0.492501], abs=1e-6)


def test_degrpo_weighs_the_control_token_apart() -> None:
    t = tokens([1.0] * 5, [-0.5, -0.1, -0.3, 0.2, -0.2], (3, 2))
    assert lost(objective("degrpo"), t) == pytest.approx(0.20015)


def test_dtpo_averages_turns_apart() -> None:
    t = tokens([1.0] * 5, [-1.0, -2.0, -3.0, -4.0, -5.0], (3, 2), turn=[0, 0, 1, 0, 1])
    assert lost(objective("dtpo"), t) == pytest.approx(0.5 * (1 + 2 + 4) / 3 + (3 + 5) / 2)


def test_adaptthink_corrects_the_forced_token() -> None:
    t = tokens([0.2, 1.0, 1.0], logp=[math.log(0.1), -1.0, -2.0])
    assert lost(objective("adaptthink"), t) == pytest.approx(-0.584804, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tis", [0.3, 0.9, 1.0, 2.0]),
        ("icepop", [0.0, 0.9, 1.0, 2.5]),
        ("mis", [0.0, 0.9, 1.0, 0.0]),
        ("geometric", [0.0] * 4),
        ("veto", [0.3, 0.9, 1.0, 2.0]),
        ("decoupled-ppo", [0.3, 0.9, 1.0, 2.5]),
    ],
)
def test_corrections_weigh_by_the_mismatch(name: str, expected: list[float]) -> None:
    t = mismatched([0.3, 0.9, 1.0, 2.5])
    assert slopes(objective(name), t) == pytest.approx([-x / 4 for x in expected])


def mismatched(weights: Sequence[float]) -> Tokens:
    """On-policy tokens whose proximal policy is `weights` times as sure of them as the sampler."""
    logp = torch.full((len(weights),), -1.0, dtype=torch.float64)
    return tokens([1.0] * len(weights), sampled=(logp - torch.tensor(weights).double().log()).tolist())


def test_geometric_and_veto_judge_the_sequence() -> None:
    wide = (Mask(level="geometric", low=0.5, high=2.0),)
    t = mismatched([0.3, 0.9, 1.0, 2.5])
    assert slopes(objective("geometric", behaviour=wide), t) == pytest.approx([-0.906413 / 4] * 4, abs=1e-6)
    assert slopes(objective("veto"), mismatched([1e-5, 1.0, 1.0])) == [0.0] * 3


def test_decoupled_ppo_clips_around_the_learner() -> None:
    t = tokens([math.exp(0.2)], logp=[-0.6], old=[-0.8], sampled=[-1.0])
    assert lost(objective("decoupled-ppo"), t) == pytest.approx(-1.465683, abs=1e-6)
    coupled = tokens([math.exp(0.4)], logp=[-0.6])
    assert lost(objective("grpo"), coupled) == pytest.approx(-1.2)


def test_regularisers_of_methods() -> None:
    papo = declared(load("papo")).objective
    only = msgspec.structs.replace(papo, regularisers=papo.regularisers[1:])
    t = tokens([1.0], 0.0, logp=[-1.0], masked=[-1.5])
    assert lost(only, t) == pytest.approx(-0.01 * 0.106531, abs=1e-8)
    kepo = declared(load("kepo")).objective
    t = tokens([1.0] * 4, 0.0, (1, 1, 1, 1), reward=[2.0, 0.1, 0.5, 1.0], divergence=[1.0, 10.0, 100.0, 1000.0])
    assert lost(kepo, t) == pytest.approx((1 + 1000) / 4)
    g2rpo = declared(load("g2rpo")).objective
    t = tokens([1.0] * 3, 0.0, entropy=[0.1, 0.5, 1.4])
    assert lost(g2rpo, t) == pytest.approx(0.01 * (0.2 + 0.0 + 0.4) / 3)


def test_controllers_of_methods() -> None:
    r2vpo = declared(load("r2vpo")).objective
    assert numbers(controlled(r2vpo, 1, {"ratio_variance": 0.13}))["gate.coef"] == pytest.approx(0.051)
    mdpo = declared(load("mdpo")).objective
    coefs = [numbers(controlled(begun(mdpo), n, {}))["regularisers.0.coef"] for n in (0, 50, 100, 200)]
    assert [1 / c for c in coefs] == pytest.approx([1.0, 0.525, 0.05, 0.05])
    ppo = declared(load("ppo")).objective
    coef = ppo.regularisers[0].coef
    assert numbers(controlled(ppo, 1, {"kl_reference": 1.0}))["regularisers.0.coef"] == pytest.approx(1.002 * coef)


def test_bupo_reads_layer_5_for_30_steps() -> None:
    """Steps 1 to 30 (here from 0) come from the layer inside, the 31st from the last."""
    source = declared(load("bupo")).objective.source
    assert source == declare.Layer(layer=5, steps=30)
    o = objective("bupo", source=declare.Layer(layer=1, steps=30))
    forward = Forward(o, build.tiny(9, hidden=8, layers=2, heads=2, kv_heads=1))
    t = trajectory([{"r": 1.0}], tokens=3)
    (batch,) = collate([t], [np.ones(1)], max_tokens=99)
    batch.ids %= 9
    found = [forward.prepare(batch, step) for step in (29, 30)]
    assert [micro.layer for micro in found] == [1, None]
    for micro in found:  # equal weights: a ratio of one, whichever layer
        torch.testing.assert_close(forward.tokens(micro).logp.detach(), micro.fixed.old)
    assert not torch.allclose(found[0].fixed.old, found[1].fixed.old)


# --- printed numbers: pairs and candidates ----------------------------------------------------------------------


def paired(chosen: Sequence[float], rejected: Sequence[float], **rates: float) -> losses.Sums:
    """One pair with log-probs under policy, reference and pi_t."""
    columns = [torch.tensor([[a], [b]]).double() for a, b in zip(chosen, rejected, strict=True)]
    policy, reference, previous = columns
    won = torch.tensor([[rates.get("win", 0.0)], [rates.get("lose", 0.0)]]).double()
    return losses.Sums(policy=policy, tokens=torch.ones(2, 1), reference=reference, previous=previous, rates=won)


PAIRS: list[tuple[str, dict[str, float], losses.Sums, float]] = [
    ("dpo", {}, paired((0, 0, 0), (-2, 0, 0)), 0.598139),
    ("cgpo-codpo", {}, paired((0, 0, 0), (-2, 0, 0)), 0.598139),
    ("rpo", {"eta": 0.0}, paired((0, 0, 0), (-100, 0, 0)), 0.313262),
    ("rpo", {}, paired((-0.7, -0.7, 0), (-100, 0, 0)), 0.316762),
    ("inpo", {"eta": 0.5, "tau": 0.25}, paired((-1, -1.2, -1.1), (-2, -1.9, -1.95)), 0.600625),
    ("dno", {"eta": 1.0}, paired((0.2, 0, 0), (-0.1, 0, 0), win=0.8, lose=0.3), 0.667617),
]


@pytest.mark.parametrize(("name", "options", "sums", "expected"), PAIRS)
def test_losses_of_pairs(name: str, options: dict[str, float], sums: losses.Sums, expected: float) -> None:
    preference = declared(load(name)).preference
    assert preference is not None
    loss_ = msgspec.structs.replace(preference.loss, **options)
    assert float(losses.pair_loss(loss_, sums)) == pytest.approx(expected, abs=1e-6)


def test_srpo_improves_on_what_it_reads() -> None:
    """(0.1 x 2 - 0.5)^2 = 0.09, both orders alike; robustness weighs as much."""
    preference = declared(load("srpo")).preference
    assert preference is not None
    ratios = torch.tensor([[0.0], [0.0], [2.0], [0.0], [0.0], [2.0]]).double()
    sums = losses.Sums(policy=ratios, tokens=torch.ones(2, 1), reference=torch.zeros_like(ratios))
    expected = 0.5 * 0.09 + 0.5 * (0.5 * 0.1 * 2.0 - 0.5) ** 2
    assert float(losses.pair_loss(preference.loss, sums)) == pytest.approx(expected)


def test_intro_weighs_candidates() -> None:
    intro = InTRO(**load("intro").table["candidates"])
    w = weights(torch.tensor([-1.0, -3.0, 0.0]), torch.tensor([-1.5, -1.0, -9.0]), intro.cap)
    assert w.tolist() == pytest.approx([1.648721, 0.135335, 200.0], abs=1e-6)
    assert intro.candidates == 5


# --- what they cost ---------------------------------------------------------------------------------------------


def test_the_benchmark_takes_methods_as_text_or_list() -> None:
    bench = registry.load("objectives", "benches")
    for named in ("gspo", ["gspo"]):
        figures = bench(tokens=4096, repeats=1, trl=False, methods=named)
        assert [row["method"] for row in figures["methods"]] == ["grpo", "gspo"]


def test_the_benchmark_measures_every_method() -> None:
    bench = registry.load("objectives", "benches")
    figures = bench(tokens=4096, repeats=1, trl=False)
    assert {row["method"] for row in figures["methods"]} == set(EVERY)
    assert all(row["peak MB of the loss"] >= 0 for row in figures["methods"])
    with pytest.raises(UnknownName, match="did you mean 'gspo'"):
        bench(methods="gsppo")
