"""The one reward model: causal language models with a pooled hidden state and linear heads."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agentgym import seeding
from agentgym.errors import ConfigError, ModelError
from agentgym.modeling import build
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.logprobs import packed_hidden
from agentgym.rewards.judges import transcript
from agentgym.types import RewardTerm, Trajectory
from agentgym_trainers.reward_models.examples import Examples

FIGURES, HEADS = "reward_model.json", "heads.safetensors"


class Backbone(msgspec.Struct, frozen=True, kw_only=True):
    """What reads the text: a small model made on the spot, or a folder in hub format (`path`)."""

    path: str = ""
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2

    def make(self, vocabulary: int, seed: int) -> Any:
        if self.path:
            return build.load(self.path, dtype="float32")
        return build.tiny(
            vocabulary, hidden=self.hidden, layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, seed=seed
        )


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """`steps` of AdamW on `batch` examples each; every epoch takes all of them once, in a keyed order."""

    steps: int = 100
    batch: int = 16
    lr: float = 3e-3
    decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or not (0 < self.lr < math.inf and 0 <= self.decay < math.inf):
            raise ConfigError(f"steps and batch are at least 1, lr is positive and decay at least 0; got {self}")


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a saved model is: the names of its terms, its members, and how a score is read."""

    names: tuple[str, ...]
    members: int = 1
    probability: bool = False
    max_tokens: int = 512
    against: bool = False


class Scorer(nn.Module):
    """Packed ids -> the mean hidden state of each sequence -> (head - shift) / scale: [sequences, outputs]."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Any, outputs: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(backbone.config.get_text_config().hidden_size, outputs)
        self.register_buffer("shift", torch.zeros(outputs))
        self.register_buffer("scale", torch.ones(outputs))

    def forward(self, sequences: Sequence[NDArray[np.int32]]) -> Tensor:
        lengths = np.asarray([len(s) for s in sequences])
        bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        hidden = packed_hidden(self.backbone, np.concatenate(sequences), positions, bounds).float()
        owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(hidden.device)
        pooled = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add(0, owner, hidden)
        pooled = pooled / torch.from_numpy(lengths).to(hidden)[:, None]
        return (self.head(pooled) - self.shift) / self.scale

    def standardise(self, scores: Tensor) -> None:
        """From now on scores like these [n, outputs] have mean 0 and deviation 1 (0 where all are equal)."""
        spread = scores.std(0, correction=0)
        self.shift += self.scale * scores.mean(0)
        self.scale *= torch.where(spread > 1e-6, spread, 1.0)

    def small(self) -> dict[str, Tensor]:
        """Everything but the backbone."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith("backbone.")}


class RewardModel:
    """Members that score texts; as a `Judge`, one term a name and trajectory.

    text   what a trajectory is to the model (its transcript, unless said otherwise)
    """

    def __init__(
        self,
        tokenizer: Any,
        members: Sequence[Scorer],
        about: About,
        text: Callable[[Trajectory], str] = transcript,
    ) -> None:
        self.tokenizer, self.about, self.text = tokenizer, about, text
        self.members = nn.ModuleList(members)

    # --- learning -------------------------------------------------------------------------------------------------

    def fit(self, examples: Examples, training: Training | None = None) -> list[list[float]]:
        """Train every member, each in an order of its own; the losses of each member's steps.

        Pairs leave the zero and the scale of scores open, and members are compared with each other: their scores are
        standardised over the texts of the pairs afterwards. So a probability is not learnt from pairs: `ConfigError`.
        """
        t = training or Training()
        if examples.relative and self.about.probability:
            raise ConfigError("pairs leave the zero of scores open, and a probability has one; fit it to Reactions")
        sequences = self.encode(examples.texts)
        losses = [list(self._train(k, sequences, examples, t)) for k in range(len(self.members))]
        if examples.relative:
            for member in self._scorers():
                member.standardise(_scored(member, sequences))
        return losses

    def _scorers(self) -> Iterator[Scorer]:
        for member in self.members:
            assert isinstance(member, Scorer)
            yield member

    def _train(
        self, number: int, sequences: list[NDArray[np.int32]], examples: Examples, t: Training
    ) -> Iterator[float]:
        member = self.members[number]
        optimiser = torch.optim.AdamW(member.parameters(), lr=t.lr, weight_decay=t.decay)
        for rows in _rows(len(examples), t, number):
            scores = member([sequences[i] for i in examples.places(rows)])
            loss = examples.loss(scores, rows)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(member.parameters(), 1.0)
            optimiser.step()
            yield loss.item()

    # --- scoring --------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """The last `max_tokens` ids of every text; a text without any is one end mark."""
        found = [self.tokenizer.encode(text, add_special_tokens=False)[-self.about.max_tokens :] for text in texts]
        return [np.asarray(ids or [self.tokenizer.eos_token_id], np.int32) for ids in found]

    def scores(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[texts, names]: every output of every member, as probabilities where the model says so."""
        if not texts:
            return np.zeros((0, len(self.about.names)))
        sequences = self.encode(texts)
        found = torch.cat([_scored(member, sequences) for member in self._scorers()], 1)
        return (found.sigmoid() if self.about.probability else found).double().cpu().numpy()

    def score(self, trajectories: Sequence[Trajectory]) -> list[tuple[RewardTerm, ...]]:
        """The terms of each trajectory, on its last turn."""
        rows = self.scores([self.text(t) for t in trajectories])
        return [
            tuple(
                RewardTerm(name=n, value=float(v), level="episode") for n, v in zip(self.about.names, row, strict=True)
            )
            for row in rows
        ]

    async def __call__(self, trajectory: Trajectory) -> tuple[RewardTerm, ...]:
        (terms,) = await asyncio.to_thread(self.score, [trajectory])
        return terms

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Backbones in hub format, heads as safetensors, and what they are as JSON."""
        folder = Path(path)
        for k, member in enumerate(self._scorers()):
            build.save(member.backbone, self.tokenizer, folder / f"member-{k}")
        tensors = {f"{k}.{n}": v.contiguous() for k, m in enumerate(self._scorers()) for n, v in m.small().items()}
        save_file(tensors, folder / HEADS)
        (folder / FIGURES).write_text(json.dumps(msgspec.to_builtins(self.about), indent=2), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, path: str | Path, text: Callable[[Trajectory], str] | None = None) -> Self:
        """What `save` wrote. A model against a reference needs its `text` again: a function is not saved."""
        folder = Path(path)
        if not (folder / FIGURES).is_file():
            raise ModelError(f"{str(path)!r} holds no reward model ({FIGURES} is missing)")
        about = msgspec.json.decode((folder / FIGURES).read_bytes(), type=About)
        if about.against and text is None:
            raise ConfigError(f"{str(path)!r} scores against a reference; pass text=joined(...) that says which")
        tensors = load_file(folder / HEADS)
        members = [_loaded(folder / f"member-{k}", k, tensors) for k in range(about.members)]
        return cls(tokenizers.load(folder / "member-0"), members, about, text or transcript)


def _loaded(folder: Path, number: int, tensors: dict[str, Tensor]) -> Scorer:
    held = {n.removeprefix(f"{number}."): t for n, t in tensors.items() if n.startswith(f"{number}.")}
    scorer = Scorer(build.load(folder), len(held["shift"]), 0)
    scorer.load_state_dict(held, strict=False)
    return scorer


def _rows(count: int, t: Training, member: int) -> Iterator[list[int]]:
    """The examples of every step."""
    places = np.arange(t.steps * min(t.batch, count))
    orders = [
        np.random.default_rng(seeding.key(t.seed, "reward model", member, epoch)).permutation(count)
        for epoch in range(len(places) // count + 1)
    ]
    return (rows.tolist() for rows in np.concatenate(orders)[places].reshape(t.steps, -1))


@torch.no_grad()
def _scored(member: nn.Module, sequences: Sequence[NDArray[np.int32]], chunk: int = 64) -> Tensor:
    return torch.cat([member(sequences[i : i + chunk]) for i in range(0, len(sequences), chunk)])


# --- the four kinds -----------------------------------------------------------------------------------------------


def _model(
    tokenizer: Any, about: About, backbone: Backbone | None, seed: int, text: Callable[[Trajectory], str] = transcript
) -> RewardModel:
    if not about.names:
        raise ConfigError("a reward model has at least one member and one name; got none")
    outputs = len(about.names) // about.members
    seeds = [seeding.key(seed, "reward model", k) >> 33 for k in range(about.members)]
    made = backbone or Backbone()
    return RewardModel(tokenizer, [Scorer(made.make(len(tokenizer), s), outputs, s) for s in seeds], about, text)


def ensemble(
    tokenizer: Any, members: int = 4, name: str = "rm", *, backbone: Backbone | None = None, seed: int = 0
) -> RewardModel:
    """Models of different seeds for WCO and UWO (2310.02743): terms NAME.0 .. NAME.(members - 1), learnt from `Pairs`.
    Over a hub folder only the heads and the orders of the examples differ at first."""
    names = tuple(f"{name}.{k}" for k in range(members))
    return _model(tokenizer, About(names=names, members=members), backbone, seed)


def feedback(tokenizer: Any, name: str = "love", *, backbone: Backbone | None = None, seed: int = 0) -> RewardModel:
    """RLUF's P[Love] (2505.14946): one probability, learnt from `Reactions`."""
    return _model(tokenizer, About(names=(name,), probability=True), backbone, seed)


def heads(tokenizer: Any, names: Sequence[str], *, backbone: Backbone | None = None, seed: int = 0) -> RewardModel:
    """One model with a regression head for each objective (2503.21819), learnt from `Ratings`."""
    return _model(tokenizer, About(names=tuple(names)), backbone, seed)


def against(
    tokenizer: Any,
    reference: Callable[[Trajectory], str],
    name: str = "polar",
    *,
    backbone: Backbone | None = None,
    seed: int = 0,
) -> RewardModel:
    """POLAR's r(x, reference, candidate) (2507.05197): how much an episode is like one of the policy wanted. Learnt
    from `Pairs` of `joined` texts, the chosen one by the policy that wrote the reference."""
    return _model(tokenizer, About(names=(name,), against=True), backbone, seed, joining(reference))


def joined(reference: str, candidate: str) -> str:
    """A reference and a candidate as one text."""
    return f"{reference}\n<|im_end|>\n{candidate}"


def joining(reference: Callable[[Trajectory], str]) -> Callable[[Trajectory], str]:
    """The text of a trajectory beside its reference."""
    return lambda trajectory: joined(reference(trajectory), transcript(trajectory))


def judge(path: str) -> RewardModel:
    """A saved model as a declared judge: kind = "custom", target = "agentgym_trainers.reward_models:judge", path."""
    return RewardModel.load(path)
