"""`agentgym bench learner`: an update of ours beside TRL's GRPO trainer, on the same episodes.

Both take the optimiser steps of clipped policy gradient with a token mean over the same ids, masks, recorded log-probs
and advantages, with the same AdamW and bound of the gradient, and end at the same weights up to rounding (a test
compares them). TRL runs as it is shipped, from its buffered batch to the optimiser's step; only what would sample is
replaced by what was sampled. Rounds alternate, so that what else the machine does meets both.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agentgym.bench.measure import machine, markdown, spread
from agentgym.collate import collate
from agentgym.errors import ConfigError, MissingExtra, unknown
from agentgym.modeling import build, flops
from agentgym.modeling.layers import checkpoint_layers
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym.types import (
    Action,
    Episode,
    Floats,
    Ids,
    Observation,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
    Turns,
    WeightsVersion,
)
from agentgym_trainers.bench import peak
from agentgym_trainers.learner import Learner, Optim
from agentgym_trainers.objective.declare import Objective

SIZES: dict[str, dict[str, int]] = {
    "3M": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "words": 2_048},
    "25M": {"hidden": 512, "layers": 8, "heads": 8, "kv_heads": 4, "words": 4_096},
    "0.6B": {"hidden": 1024, "layers": 28, "heads": 16, "kv_heads": 8, "words": 151_936},
}
"""Random models of the Qwen3 class."""
PROMPT, REPLY = (8, 40), (8, 56)
"""Tokens of what is observed and of what is sampled in a turn: uniform, bounds included."""
TURNS = {"drawn": (1, 8), "near": (5, 8), "equal": (4, 4)}
"""Turns of an episode, uniform; with "equal" every episode is as long as the first: TRL's best case."""
OPTIM = Optim(lr=1e-4, betas=(0.9, 0.95), clip=1.0, warmup=0, decay=0.0)
UNLIKE = (
    "tokens/s counts the episodes' own tokens, observed and sampled, never padding. Both compute their figures "
    "(entropy, clipped share). Ours packs sequences and unembeds sampled tokens alone; TRL pads to the longest prompt "
    "and the longest rest of the batch and, off a GPU, unembeds every position. Dropout is 0, compile is off for both. "
    "Memory is the most that was alive at once in a step above weights and the optimiser's moments"
)


def learner(
    sizes: str | Sequence[str] = "3M",
    lengths: str | Sequence[str] = "drawn,near,equal",
    sequences: int = 32,
    micro_tokens: int = 4096,
    checkpointing: str | Sequence[str] = "off,on",
    rounds: int = 3,
    threads: int = 1,
    seed: int = 0,
    device: str = "cpu",
    trl: bool = True,
    out: str = "",
) -> dict[str, Any]:
    """A row per model size, distribution of lengths and checkpointing: tokens/s, FLOP utilisation, peak memory, and how
    much faster ours is within each round.

    `lengths` are those of `TURNS`. On CUDA our model is bfloat16 with float32 masters, and TRL's float32 under
    autocast, as its default is. `out` also writes Markdown. Raises `MissingExtra` without TRL, unless `trl` is off.
    """
    if min(sequences, rounds, threads) < 1:
        raise ConfigError("sequences, rounds and threads are at least 1")
    torch.set_num_threads(threads)
    rows = [
        _row(
            Setting(size, kind, again == "on", device), episodes(size, kind, sequences, seed), micro_tokens, rounds, trl
        )
        for size in _chosen("size", sizes, SIZES)
        for kind in _chosen("distribution of lengths", lengths, TURNS)
        for again in _chosen("checkpointing", checkpointing, ("off", "on"))
    ]
    figures = {
        "machine": {**machine(("torch", "transformers", "trl")), "threads": threads, "device": _name(device)},
        "settings": {"sequences": sequences, "micro_tokens": micro_tokens, "rounds": rounds, "seed": seed},
        "reading": UNLIKE,
        "learner": rows,
    }
    if out:
        Path(out).write_text(markdown("The learner beside TRL's", figures), encoding="utf-8")
    return figures


def _chosen(what: str, names: str | Sequence[str], known: Sequence[str] | dict[str, Any]) -> list[str]:
    listed = [n.strip() for n in (names.split(",") if isinstance(names, str) else names)]
    for name in listed:
        if name not in known:
            raise unknown(what, name, known)
    return listed


def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


# --- what is learnt from ----------------------------------------------------------------------------------------


class Played(NamedTuple):
    """Episodes and the one advantage of each [episodes]."""

    trajectories: list[Trajectory]
    advantages: NDArray[np.float64]

    @property
    def tokens(self) -> int:
        return sum(flops.lengths_of(self.trajectories)[0])

    @property
    def sampled(self) -> int:
        return flops.lengths_of(self.trajectories)[1]


def episodes(size: str, lengths: str, count: int, seed: int) -> Played:
    """Drawn once: everybody learns from the same."""
    g, words = np.random.default_rng(seed), SIZES[size]["words"]
    turns = g.integers(*TURNS[lengths], count, endpoint=True).tolist()
    shapes = [np.stack([g.integers(*bounds, n, endpoint=True) for bounds in (PROMPT, REPLY)], 1) for n in turns]
    if lengths == "equal":
        shapes = shapes[:1] * count
    return Played([_episode(g, i, shape.tolist(), words) for i, shape in enumerate(shapes)], g.normal(size=count))


def _episode(g: np.random.Generator, number: int, shape: list[list[int]], words: int) -> Trajectory:
    """Its recorded log-probs are near those of a model that knows nothing."""
    turns = []
    for k, (asked, said) in enumerate(shape):
        logprobs = Floats(g.normal(-np.log(words), 0.1, said))
        span = TokenSpan(
            prompt=Ids(g.integers(0, words, asked)), ids=Ids(g.integers(0, words, said)), logprobs=logprobs
        )
        turns.append(Turn(step=k, observation=Observation(), action=Action(span=span)))
    episode = Episode(task=Task(env="bench", seed=number), member=0, group=f"g{number}")
    return Trajectory(env="bench", episode=episode, turns=Turns(items=tuple(turns)), status="terminated")


# --- ours -------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    size: str
    lengths: str
    checkpointing: bool
    device: str

    def model(self, *, half: bool) -> Any:
        """A fresh model; the same for everybody."""
        shape = {**SIZES[self.size]}
        model = build.tiny(shape.pop("words"), **shape, head_dim=128 if self.size == "0.6B" else None)
        return model.to(self.device, torch.bfloat16 if half and self.device.startswith("cuda") else torch.float32)


class Own:
    """A model that nobody acts with."""

    collate = staticmethod(collate)

    def __init__(self, model: Any) -> None:
        self.model = model

    def module(self) -> nn.Module:
        return self.model

    async def publish(self, version: WeightsVersion) -> None:
        return None


class Ours:
    def __init__(self, setting: Setting, played: Played, micro_tokens: int) -> None:
        self.model, self.played = setting.model(half=True), played
        if setting.checkpointing:
            checkpoint_layers(self.model)
        optim = msgspec.structs.replace(OPTIM, micro_tokens=micro_tokens)
        self.learner = Learner(Own(self.model), Objective(), optim, total_steps=10**6)
        self.credit = [np.full(len(t.turns), a) for t, a in zip(*played, strict=True)]

    def step(self) -> None:
        """From trajectories to moved weights, packing included."""
        self.learner.update(self.played.trajectories, self.credit)


# --- TRL --------------------------------------------------------------------------------------------------------


class Theirs:
    """TRL's trainer with its own accelerator, optimiser and loss, fed with what was sampled."""

    def __init__(self, setting: Setting, played: Played, micro_tokens: int) -> None:
        self.batch = padded(played, setting.device)
        rows, width = (
            len(played.trajectories),
            self.batch["prompt_ids"].shape[1] + self.batch["completion_ids"].shape[1],
        )
        self.size = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * width <= micro_tokens))
        self.padding = 1 - played.tokens / (rows * width)
        self.model = setting.model(half=False)
        self.model.set_attn_implementation("sdpa")
        if setting.checkpointing:  # as `Trainer.train` does before its first step
            self.model.activation_checkpointing_enable()
        with tempfile.TemporaryDirectory() as folder:  # it wants one, and writes nothing into it
            self.trainer = _trainer(self.model, setting, rows, self.size, folder)
        self.trainer._generate_and_score_completions = lambda batch: dict(self.batch)
        self.trainer.create_optimizer()
        self.trainer.model_wrapped, self.trainer.optimizer = self.trainer.accelerator.prepare(
            self.model, self.trainer.optimizer
        )
        self.parts = rows // self.size
        self.trainer.current_gradient_accumulation_steps = self.parts

    def step(self) -> None:
        """What `Trainer.train` does of an optimiser step, without its callbacks and its schedule of one rate."""
        trainer = self.trainer
        for part in range(self.parts):
            trainer.accelerator.gradient_state._set_sync_gradients(part + 1 == self.parts)
            trainer.training_step(trainer.model_wrapped, self.batch, None)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), OPTIM.clip)
        trainer.optimizer.step()
        self.model.zero_grad()


def _trainer(model: Any, setting: Setting, rows: int, size: int, folder: str) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise MissingExtra("the comparison with TRL", "compare") from error
    on_gpu = setting.device.startswith("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = trl.GRPOConfig(
            output_dir=folder,
            **{"use_cpu": not on_gpu, "bf16": on_gpu, "report_to": "none", "save_strategy": "no", "max_steps": 10**6},
            **{"learning_rate": OPTIM.lr, "adam_beta1": OPTIM.betas[0], "adam_beta2": OPTIM.betas[1]},
            **{"weight_decay": OPTIM.weight_decay, "max_grad_norm": OPTIM.clip, "lr_scheduler_type": "constant"},
            **{"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "disable_dropout": True, "shuffle_dataset": False},
            **{
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": rows // size,
                "num_generations": rows,
            },
            gradient_checkpointing=setting.checkpointing,
        )
        return trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w"]}),
            processing_class=closed_vocabulary(["w"]),
        )


def padded(played: Played, device: str) -> dict[str, torch.Tensor]:
    """The tensors that TRL's `_generate_and_score_completions` makes, of the same episodes: the first prompt padded at
    its left, all that follows at its right, with a mask over what the policy sampled."""
    prompts, rest, sampled, logprobs = [], [], [], []
    for t in played.trajectories:
        spans = [span for _, span in t.spans]
        prompts.append(spans[0].prompt.numpy())
        pieces = [(x, s.logprobs.numpy() if y else None) for s in spans for x, y in ((s.prompt, False), (s.ids, True))]
        rest.append(np.concatenate([x.numpy() for x, _ in pieces[1:]]))
        sampled.append(np.concatenate([np.full(len(x), found is not None) for x, found in pieces[1:]]))
        logprobs.append(np.concatenate([np.zeros(len(x)) if y is None else y for x, y in pieces[1:]]))
    prompt_ids, prompt_mask = _pad(prompts, left=True)
    completion_ids, completion_mask = _pad(rest)
    found = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": _pad(sampled)[0],
        "old_per_token_logps": _pad(logprobs)[0].float(),
        "advantages": torch.from_numpy(played.advantages).float(),
        "num_items_in_batch": torch.tensor(played.sampled),
    }
    return {name: x.to(device) for name, x in found.items()}


def _pad(rows: list[NDArray[Any]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows side by side with zeros, and where they are real."""
    side = "left" if left else "right"
    held = [torch.from_numpy(r.astype(np.float64 if r.dtype.kind == "f" else np.int64)) for r in rows]
    ones = [torch.ones(len(r), dtype=torch.int64) for r in rows]
    padded = (nn.utils.rnn.pad_sequence(x, batch_first=True, padding_side=side) for x in (held, ones))
    values, mask = padded
    return values, mask


# --- the rows ---------------------------------------------------------------------------------------------------


def _row(setting: Setting, played: Played, micro_tokens: int, rounds: int, trl: bool) -> dict[str, Any]:
    ours = Ours(setting, played, micro_tokens)
    theirs = Theirs(setting, played, micro_tokens) if trl else None
    works = {"ours": ours.step, **({"TRL": theirs.step} if theirs else {})}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            found = _seconds(work, setting.device)
            if turn:
                seconds[name].append(found)
    row = {
        "model": setting.size,
        "parameters": build.parameters(ours.model),
        "lengths": setting.lengths,
        "checkpointing": "on" if setting.checkpointing else "off",
        "tokens": played.tokens,
        "sampled": played.sampled,
    }
    for name in works:
        row[f"{name}, tokens/s"] = spread([played.tokens / s for s in seconds[name]], 0)
        row[f"{name}, MFU"] = f"{flops.utilisation(ours.model, played.trajectories, median(seconds[name]))['mfu']:.1%}"
        row[f"{name}, peak MB"] = round(_peak(works[name], setting.device) / 1e6)
    if theirs:
        row["TRL's padding"] = f"{theirs.padding:.0%}"
        row["ours is faster by"] = spread([b / a for a, b in zip(seconds["ours"], seconds["TRL"], strict=True)], 2)
    return row


def _seconds(work: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _peak(work: Callable[[], None], device: str) -> int:
    """Bytes above what was held before."""
    if not device.startswith("cuda"):
        return peak(work)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - held
