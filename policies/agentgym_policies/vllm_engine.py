"""`VllmEngine`: vLLM inside this process's control, its workers in processes of their own, no server between.

    engine = VllmEngine.from_checkpoint("path/to/model", slots=64)      # or rollout.engine = "vllm" in a run
    async with engine.session(episode, agent) as session:
        action = await session.act(observation)

Needs vLLM (the extra `vllm`). Its workers are spawned: a script that makes an engine at its top level needs the
`if __name__ == "__main__"` that multiprocessing asks of every script.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

from agentgym.errors import ConfigError, MissingExtra, ModelError
from agentgym.modeling import build
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.renderer import History, Renderer
from agentgym.types import Sampling
from agentgym_policies.vllm_base import WORKER, Completion, Vllm, refuse

STOPPING = 30.0
"""Seconds that vLLM's processes may take to end before they are killed; they usually need five."""


class VllmEngine(Vllm):
    """vLLM on a local folder in hub format; see `Vllm` for what it records.

    `dtype` "auto" is the checkpoint's own. `cache_gib` is the memory for keys and values on each device. `threads` and
    `cores` are for the CPU build: threads without a place of their own, or one thread on each of these cores.
    `arguments` are fields of vLLM's `AsyncEngineArgs` (tensor_parallel_size, enforce_eager, ...) and go before ours.
    """

    def __init__(
        self,
        path: str | Path,
        renderer: Renderer,
        *,
        model: Any = None,
        slots: int = 64,
        max_length: int = 1024,
        sampling: Sampling | None = None,
        seed: int = 0,
        dtype: str = "auto",
        cache_gib: float = 1.0,
        threads: int | None = None,
        cores: Sequence[int] = (),
        **arguments: Any,
    ) -> None:
        self.path, self.threads, self.cores = build.check_folder(path), threads, cores
        self._names = count()
        self._arguments = {
            "model": str(path),
            "dtype": _dtype(self.path) if dtype == "auto" else dtype,
            "max_model_len": max_length,
            "max_num_seqs": slots,
            "kv_cache_memory_bytes": int(cache_gib * 2**30),
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": WORKER,
            "generation_config": "vllm",
            "disable_log_stats": True,
            **arguments,
        }
        super().__init__(
            renderer,
            model=model,
            slots=slots,
            max_length=max_length,
            sampling=sampling,
            seed=seed,
        )

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, history: History = "append", template: str | None = None, **options: Any
    ) -> Self:
        """An engine for a local folder in hub format, for evaluation; `options` are those of the class."""
        return cls(path, Renderer(tokenizers.load(path), history, template=template), **options)

    @classmethod
    def serving(
        cls,
        model: Any,
        renderer: Renderer,
        *,
        shared: bool,
        deterministic: bool = False,
        stale_caches: bool = False,
        **options: Any,
    ) -> Self:
        """The engine of a training run. It never shares: `publish` copies the module's weights, `shared` or not."""
        refuse(deterministic, stale_caches)
        with _written(model, renderer) as path:
            return cls(path, renderer, model=model, **{"dtype": _name(model), **options})

    async def _start(self) -> None:
        with _environment(_placement(self.threads, self.cores)):
            self._llm = _launch(self._arguments)
        cache = self._llm.vllm_config.cache_config
        self._capacity = (cache.num_gpu_blocks or 0) * cache.block_size
        await self._llm.update_weight_version("0")

    async def _complete(self, ids: list[int], parameters: dict[str, Any]) -> Completion:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        asked = SamplingParams(**parameters, output_kind=RequestOutputKind.FINAL_ONLY)
        async for found in self._llm.generate(TokensPrompt(prompt_token_ids=ids), asked, str(next(self._names))):
            return _completion(found)
        raise RuntimeError("no answer to a request")

    async def _take(self, path: str, version: int) -> None:
        """Where the workers cannot read the weights, generation stays frozen: nothing is sampled by half of them."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        await self._rpc("take_weights", path)
        await self._llm.update_weight_version(str(version))
        await self._llm.resume_generation()

    async def _rpc(self, method: str, *args: str) -> list[Any]:
        return list(await self._llm.collective_rpc(method, args=args))

    async def _sleep(self, asleep: bool) -> None:
        await (self._llm.sleep(level=1, mode="keep") if asleep else self._llm.wake_up())

    async def _stop(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.shutdown(timeout=STOPPING)
            del self._llm  # whose own __del__ would run when the interpreter is half gone


def _completion(found: Any) -> Completion:
    """vLLM's `RequestOutput`, read."""
    (said,) = found.outputs
    ids = list(said.token_ids)
    drawn = [entry[token].logprob for token, entry in zip(ids, said.logprobs or (), strict=True)]
    raw = [_other(entry, token).logprob for token, entry in zip(ids, said.logprobs or (), strict=True)]
    asked = zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True) if found.prompt_logprobs else ()
    return Completion(
        ids=ids,
        drawn=drawn,
        raw=raw,
        versions=[(span.start, int(span.version)) for span in said.weight_versions or ()],
        finish=said.finish_reason,
        cached=found.num_cached_tokens or 0,
        prompt=[entry[token].logprob for token, entry in asked],
    )


def _other(entry: dict[int, Any], token: int) -> Any:
    """The entry that does not belong to the sampled token: its raw log-prob (`vllm_worker.BothLogprobs`)."""
    return next(value for other, value in entry.items() if other != token)


def _name(model: Any) -> str:
    """The name of the module's number format."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _dtype(folder: Path) -> str:
    """The checkpoint's number format, which vLLM by itself would halve where it is float32."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _launch(arguments: dict[str, Any]) -> Any:
    """vLLM's asynchronous engine, ready."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise MissingExtra("the engine 'vllm'", "vllm") from error
    if current_platform.is_cpu():
        arguments = {"block_size": 32, **arguments}  # its own choice of 128 tokens would find short turns again never
    try:
        asked = AsyncEngineArgs(**arguments)
    except TypeError as error:
        raise ConfigError(f"vLLM's AsyncEngineArgs: {error}") from error
    try:
        return AsyncLLM.from_engine_args(asked)
    except ValueError as error:
        raise ModelError(f"vLLM cannot serve this model so: {error}") from error


def _placement(threads: int | None, cores: Sequence[int]) -> dict[str, str]:
    """What tells vLLM's CPU workers where to run."""
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)) if cores else "nobind"}
    return bound if threads is None else {**bound, "OMP_NUM_THREADS": str(threads)}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for processes that are spawned meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _written(model: Any, renderer: Renderer) -> Iterator[Path]:
    """The model as a folder in hub format, as long as vLLM reads it."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="agentgym-vllm-model-") as folder:
        yield build.save(model, renderer.tokenizer, Path(folder) / "model")
