"""Pages: nothing foreign runs, nothing is fetched, and what a run holds is on its page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym import charts
from agentgym.env import task_list
from agentgym.evaluation import evaluate
from agentgym.html import trajectory_html, trajectory_page
from agentgym.report import curves, evaluations, find, run_html, write_report
from agentgym.rewards import composer
from agentgym.rollout import Runner, episodes
from agentgym.store import RunFolder, load_run
from agentgym.testing import CountingEnv, FlakyEnv
from agentgym.types import (
    Action,
    Array,
    Draft,
    Episode,
    Failure,
    Floats,
    Ids,
    Message,
    Observation,
    RewardTerm,
    Task,
    TokenSpan,
    ToolCall,
    Trajectory,
    Turn,
    Turns,
)

EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</pre></div><iframe src=//evil.example></iframe>",
    "</style><svg onload=alert(1)>",
    "<!--", "&lt;b&gt;", "'\"`", "\x00\x1b[31m\u202e\ud800",
]  # fmt: skip
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "div", "span", "p", "b", "pre", "h1", "h2"),
    *("details", "summary", "small", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "text", "line", "polyline", "circle"),
}


class Reader(HTMLParser):
    """Collects the tags and attributes that a browser would see."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def harmless(page: str) -> None:
    page.encode()  # no lone surrogate
    reader = Reader(page)
    assert set(reader.tags) <= ALLOWED, set(reader.tags) - ALLOWED
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("src", "href", "action")]
    assert "http://" not in page.replace("http-equiv", "")
    assert not re.search(r"url\(|@import", page)


def spoken(text: str) -> Trajectory:
    """A trajectory with the text in every place that something foreign can reach."""
    action = Action(text=text, tool_calls=(ToolCall(name=text, arguments={text: text}),))
    turn = Turn(
        step=0,
        agent=text,
        observation=Observation(messages=(Message(role="user", content=text, name=text),)),
        action=action,
        drafts=(Draft(by=text, action=action, reason=text),),
        rewards=(RewardTerm(name=text, value=1.0, turn=0),),
    )
    return Trajectory(
        env=text,
        episode=Episode(task=Task(env="any-v0")),
        turns=Turns(items=(turn,)),
        status="failed",
        failure=Failure(kind="tool", message=text),
        final={text: Observation(array=Array.of([1.0]), messages=(Message(role="tool", content=text),))},
        metrics={text: 1.0},
        labels={text: text},
    )


@pytest.mark.parametrize("text", EVIL)
def test_markup_from_outside_stays_text(text: str) -> None:
    harmless(trajectory_page(spoken(text)))
    harmless(trajectory_html(spoken(text)))


@given(st.text(max_size=40))
def test_any_text_stays_text(text: str) -> None:
    harmless(trajectory_page(spoken(text)))


def test_a_page_forbids_scripts_and_fetching() -> None:
    page = trajectory_page(spoken("hello"))
    assert "Content-Security-Policy" in page
    assert "default-src 'none'" in page


def test_turns_show_their_share_of_the_return() -> None:
    terms = (RewardTerm(name="answer", value=2.0, turn=0), RewardTerm(name="waste", value=3.0, turn=0))
    span = TokenSpan(prompt=Ids([1, 2]), ids=Ids([3]), logprobs=Floats([-0.5]))
    turn = Turn(step=0, observation=Observation(), action=Action(text="x", span=span), rewards=terms)
    played = spoken("x").replace(turns=Turns(items=(turn,)), status="terminated", failure=None)
    shown = trajectory_html(played, {"op": "weighted_sum", "of": {"answer": 0.5, "waste": -0.1}})
    assert "return +0.7" in shown
    assert "answer +1<" in shown
    assert "waste -0.3<" in shown
    assert "2 + 1 tokens, mean log-prob -0.500" in shown


def test_turns_show_how_they_moved_a_potential() -> None:
    terms = (RewardTerm(name="phi.before", value=0.25, turn=0), RewardTerm(name="phi.after", value=0.5, turn=0))
    turn = Turn(step=0, observation=Observation(), action=Action(), rewards=terms)
    assert "phi 0.25 → 0.5" in trajectory_html(spoken("x").replace(turns=Turns(items=(turn,))), {"op": "sum"})


def test_long_text_is_cut_and_says_so() -> None:
    assert "… 1000 more characters" in trajectory_html(spoken("x" * 5000))


def test_a_long_episode_is_cut_and_says_so() -> None:
    (turn,) = spoken("x").turns
    shown = trajectory_html(spoken("x").replace(turns=Turns(items=(turn,) * 203)))
    assert "… 3 more turns" in shown
    assert shown.count("<b>turn ") == 200


def test_a_notebook_shows_a_trajectory() -> None:
    assert spoken("hello")._repr_html_().startswith('<div class="agentgym">')


# --- curves -----------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_within() -> None:
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(2013.0, 2090.0) == [2020.0, 2040.0, 2060.0, 2080.0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    drawn = charts.chart("c", list(enumerate(values)))
    numbers = [float(n) for points in re.findall(r'points="([^"]*)"', drawn) for n in re.split("[ ,]", points)]
    assert numbers
    assert all(-1 <= n <= charts.WIDTH + 1 for n in numbers)


def test_a_curve_leaves_out_what_is_not_finite() -> None:
    assert charts.chart("c", [(0, float("nan")), (1, float("inf"))]) == ""
    assert "nan" not in charts.chart("c", [(0, 1.0), (1, float("nan")), (2, 3.0)])


def test_running_mean_looks_back_only() -> None:
    assert charts.running_mean([1.0, 2.0]) == [1.0, 2.0]
    assert charts.running_mean([0.0] * 39 + [2.0])[-2:] == [0.0, 1.0]


def test_curves_need_two_points_and_numbers() -> None:
    lines = [{"step": 3, "loss": 1.0, "note": "x", "once": 1}, {"step": 5, "loss": None}, {"step": 7, "loss": 0.5}]
    assert curves(lines) == {"": {"loss": [(3.0, 1.0), (7.0, 0.5)]}}
    assert list(curves([{"phase": phase, **line} for phase in ("sft", "rl") for line in lines])) == ["sft", "rl"]


def test_lines_of_one_chart_have_their_colour_name_and_last_value() -> None:
    drawn = charts.chart_of("success by domain", {"<a>": [(0, 0.0), (1, 0.25)], "b": [(0, 1.0), (1, float("nan"))]})
    assert drawn.count('class="line"') == 2
    assert "&lt;a&gt;</text>" in drawn
    assert ">0.25</text>" in drawn
    assert "nan" not in drawn
    assert {"var(--blue)", "var(--green)"} <= set(re.findall(r"--c:(var\(--\w+\))", drawn))
    assert charts.chart_of("nothing", {"a": [(0, float("nan"))]}) == ""


# --- a run's page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run, made without a trainer."""
    import asyncio

    path = tmp_path_factory.mktemp("runs") / "small"
    env = FlakyEnv(turns=2, raises=0.3, persistent=True)
    compose = composer(env.reward)
    config = {"env": {"id": "counting-v0", "note": "<script>"}, "reward": dict(env.reward)}
    with RunFolder.create(path, config) as run:
        for step in range(3):
            tasks = task_list(env, "train", step, 4)
            policy = env.ladder()["oracle" if step == 2 else "random"]
            for played in asyncio.run(Runner(env, policy, retries=0).collect(episodes(tasks, 2, step))):
                run.append(played, step=step, value=None if played.failure else compose.trajectory(played).value)
            told = {f"domain/{name}/{figure}": step / 2 for name in ("a/b", "c") for figure in ("share", "success")}
            run.log({"step": step, "loss": 1.0 / (1 + step), **told})
        for name in ("random", "oracle"):
            judged = asyncio.run(evaluate(CountingEnv(turns=2), env.ladder()[name], episodes=5))
            success = 0.25 if name == "random" else 0.75
            figures = msgspec.to_builtins(judged.replace(policy=f"{name} <b>", success=success))
            run.log({"step": 2, "evaluation": figures})
    return path


def test_the_page_holds_the_run(folder: Path) -> None:
    page = run_html(load_run(folder))
    harmless(page)
    words = " ".join(Reader(page).text)
    assert "25.0 % → 75.0 %" in words
    assert "+50.0 points" in words
    assert "best of the last step" in words
    assert "broke on purpose" in words
    assert "polyline" in page


def test_evaluations_come_in_order(folder: Path) -> None:
    assert [name for name, _ in evaluations(load_run(folder))] == ["random <b>", "oracle <b>"]


def test_find_reads_the_entry(folder: Path) -> None:
    run = load_run(folder)
    assert [find(run, entry).episode.id for entry in run.index[:5]] == [entry.episode for entry in run.index[:5]]


def test_the_report_is_written_beside_the_run(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_empty_run_has_a_page_too(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "empty", {"env": {"id": "nowhere-v0"}}):
        pass
    page = run_html(load_run(tmp_path / "empty"))
    harmless(page)
    assert "0 episodes" in page


def test_figures_by_domain_are_a_chart_each_with_a_line_for_each_domain(folder: Path) -> None:
    drawn = run_html(load_run(folder))
    assert re.findall(r'<text class="t"[^>]*>([^<]*)<', drawn) == ["loss", "success by domain", "share by domain"]
    assert drawn.count(">a/b</text>") == drawn.count(">c</text>") == 2
