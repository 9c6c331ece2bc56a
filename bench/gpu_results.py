"""The figures of docs/results/gpu.md: engine and learner with a random model of 0.6 B parameters on one GPU.

    python bench/gpu_results.py                                       # about 20 minutes; needs a GPU of 40 GB
    python bench/gpu_results.py --vllm-python PATH                    # vLLM of another environment beside the engine
    python bench/gpu_results.py --device cpu --size 3M --rounds 1     # the same path here, its figures of no interest

The weights are random: what is measured is speed, and nothing is learnt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from agentgym.bench.measure import machine, markdown, spread
from agentgym.modeling import build, flops
from agentgym.modeling.tokenizer import closed_vocabulary
from agentgym_policies import bench as engines
from agentgym_policies.torch_engine import TorchEngine
from agentgym_trainers import bench_learner as learners

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "gpu.md"
READING = (
    "A random model of the Qwen3 class. The engine samples sessions of 8 turns, each at its own pace; tokens/s counts "
    "sampled tokens, utilisation their forward passes alone (decoding is bound by memory, not by products). "
    "Engines are made, and record their CUDA graphs, before the rounds that count. The learner is "
    "read as `agentgym bench learner` says. Rounds alternate between contestants; median (lowest - highest)."
)


def sampling(size: str, device: str, sessions: int, rounds: int, vllm_python: str) -> list[dict[str, Any]]:
    """A row per contestant: tokens/s, utilisation, the most memory that was held at once."""
    tokenizer, plan = (
        closed_vocabulary(f"w{i}" for i in range(engines.WORDS)),
        engines.Schedule(sessions, 8, "drawn", 0),
    )
    model = learners.Setting(size, "drawn", False, device).model(half=True)
    renderer = engines.Endless(tokenizer)
    with ExitStack() as stack:
        engine = stack.enter_context(closing(TorchEngine(model, renderer, slots=sessions, max_length=plan.length)))
        contestants: dict[str, Callable[[], Any]] = {
            "engine": lambda: engines.play_sessions(engine, plan),
            "engine, no reuse": lambda: engines.play_sessions(engine, plan, reuse=False),
        }
        if vllm_python:
            there = engines._vllm(vllm_python, model, renderer, plan, torch.get_num_threads(), reuse=True)
            vllm, _ = stack.enter_context(there)
            contestants["vLLM"] = lambda: vllm(model, renderer, plan)
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        held = {}
        for turn in range(rounds + 1):
            for name, play in contestants.items():
                begun = time.perf_counter()
                held[name] = most(device, play)
                if turn:
                    rates[name].append(plan.tokens / (time.perf_counter() - begun))
    shape = flops.shape(model)
    able = flops.peak_of(model)
    per_token = 2 * (shape.trunk + shape.head)
    return [
        {
            "contestant": name,
            "parameters": build.parameters(model),
            "sampled tokens": plan.tokens,
            "tokens/s": spread(rates[name], 0),
            "utilisation": f"{max(rates[name]) * per_token / able:.1%}",
            "peak MB": held[name] if name != "vLLM" else "",
        }
        for name in contestants
    ]


def most(device: str, work: Callable[[], Any]) -> int | str:
    """Runs it; the most MB of tensors on the GPU meanwhile, weights included."""
    if not device.startswith("cuda"):
        work()
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return round(torch.cuda.max_memory_allocated(device) / 1e6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="0.6B", choices=list(learners.SIZES))
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", default="", help="interpreter of an environment that has vLLM")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    beside = learners.learner(
        asked.size,
        sequences=asked.sequences,
        micro_tokens=asked.micro_tokens,
        rounds=asked.rounds,
        threads=threads,
        device=asked.device,
    )
    figures = {
        "machine": {**machine(("torch", "transformers", "trl")), "device": learners._name(asked.device)},
        "reading": READING,
        "engine": sampling(asked.size, asked.device, asked.sessions, asked.rounds, asked.vllm_python),
        "learner": beside["learner"],
        "of the learner": beside["reading"],
    }
    asked.out.write_text(markdown("Engine and learner on a GPU", figures), encoding="utf-8")
    print(f"wrote {asked.out}")


if __name__ == "__main__":
    main()
