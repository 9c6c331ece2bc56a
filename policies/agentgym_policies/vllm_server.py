"""`VllmServer`: a `vllm serve` process by its URL, with exact records, and weights that it takes over while it serves.

    VLLM_SERVER_DEV_MODE=1 vllm serve path/to/model --enable-scale-out --enable-prompt-tokens-details \
        --logprobs-mode processed_logprobs --worker-extension-cls agentgym_policies.vllm_worker.Worker

    server = VllmServer.from_checkpoint("path/to/model", url="http://127.0.0.1:8000")
    agentgym train ... --set rollout.engine=vllm-server --set rollout.engine_options.url=http://127.0.0.1:8000

Requests go to `/inference/v1/generate`, which takes and gives token ids and says which weights sampled which (vLLM 0.32
or newer). The server belongs to one run: its weights change, and what it reports as top log-probs is ours. vLLM halves
float32 checkpoints unless told `--dtype float32`; corrections between sampler and learner then have work to do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from agentgym.errors import ConfigError, EngineFault
from agentgym.modeling import tokenizer as tokenizers
from agentgym.modeling.renderer import History, Renderer
from agentgym.types import Sampling
from agentgym_policies.vllm_base import Completion, Vllm, refuse


class VllmServer(Vllm):
    """A client of one server; see `Vllm` for what it records.

    `slots` only says how many replies the server samples at once (its `--max-num-seqs`), `max_length` what it was
    started with. Weights pass through a file in `folder`, which client and server must both see. A request that takes
    longer than `deadline` seconds is an `EngineFault`.
    """

    def __init__(
        self,
        url: str,
        renderer: Renderer,
        *,
        model: Any = None,
        slots: int = 64,
        max_length: int = 1024,
        sampling: Sampling | None = None,
        seed: int = 0,
        folder: str = "",
        deadline: float = 600.0,
    ) -> None:
        self.url, self.deadline = url.rstrip("/"), deadline
        super().__init__(
            renderer, model=model, slots=slots, max_length=max_length, sampling=sampling, seed=seed, folder=folder
        )

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, url: str, history: History = "append", template: str | None = None, **options: Any
    ) -> Self:
        """A client that renders with the tokenizer and template in the folder `path`; the weights are the server's."""
        return cls(url, Renderer(tokenizers.load(path), history, template=template), **options)

    @classmethod
    def serving(
        cls,
        model: Any,
        renderer: Renderer,
        *,
        shared: bool,
        url: str = "",
        deterministic: bool = False,
        stale_caches: bool = False,
        threads: int | None = None,
        cores: Sequence[int] = (),
        **options: Any,
    ) -> Self:
        """The engine of a training run: the server takes the module's weights at once and at each `publish`.

        `threads` are for engines in this process: the server's are chosen where it is started, as its cores are.
        """
        refuse(deterministic, stale_caches)
        if not url or cores:
            raise ConfigError(
                "engine 'vllm-server' needs engine_options.url, and is pinned to cores where it is started"
            )
        server = cls(url, renderer, model=model, **options)
        try:
            server._thread.wait(server._publish(0))
        except BaseException:
            server.close()
            raise
        return server

    async def _start(self) -> None:
        self._http = aiohttp.ClientSession(
            # vLLM lets go of an idle connection after five seconds
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=self.deadline),
        )
        await self._post("/update_weight_version", {"new_version": "0"})
        await self._post("/resume")  # a client that died in the middle of an update left it frozen

    async def _post(self, route: str, body: dict[str, Any] | None = None, **query: str) -> Any:
        try:
            async with self._http.post(self.url + route, json=body, params=query) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineFault(f"{self.url}{route}: {type(error).__name__}: {error}") from error
        if answer.status in (403, 404):
            raise ConfigError(f"{self.url} does not offer {route}: start it as agentgym_policies/vllm_server.py says")
        if answer.status != 200:
            raise EngineFault(f"{self.url}{route} answered {answer.status}: {text[:300]}")
        return json.loads(text or "{}")

    async def _complete(self, ids: list[int], parameters: dict[str, Any]) -> Completion:
        return _completion(
            ids, await self._post("/inference/v1/generate", {"token_ids": ids, "sampling_params": parameters})
        )

    async def _take(self, path: str, version: int) -> None:
        """Where the workers cannot read the weights, generation stays frozen: nothing is sampled by half of them."""
        await self._post("/pause", mode="keep")
        await self._rpc("take_weights", path)
        await self._post("/update_weight_version", {"new_version": str(version)})
        await self._post("/resume")

    async def _rpc(self, method: str, *args: str) -> list[Any]:
        found = await self._post("/collective_rpc", {"method": method, "args": args})
        return list(found.get("results", ()))

    async def _sleep(self, asleep: bool) -> None:
        await (self._post("/sleep", level="1", mode="keep") if asleep else self._post("/wake_up"))

    async def _stop(self) -> None:
        if hasattr(self, "_http"):
            await self._http.close()


def _completion(prompt: list[int], found: dict[str, Any]) -> Completion:
    """The server's answer, read."""
    (said,) = found["choices"]
    tokens = said["logprobs"]["content"] if said["logprobs"] else []
    asked = zip(prompt[1:], found["prompt_logprobs"][1:], strict=True) if found.get("prompt_logprobs") else ()
    return Completion(
        ids=said["token_ids"],
        drawn=[token["logprob"] for token in tokens],
        raw=[token["top_logprobs"][1]["logprob"] for token in tokens],
        versions=[(span["start"], int(span["version"])) for span in said["weight_versions"] or ()],
        finish=said["finish_reason"],
        cached=((found["usage"] or {}).get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        prompt=[entry[str(token)]["logprob"] for token, entry in asked],
    )
