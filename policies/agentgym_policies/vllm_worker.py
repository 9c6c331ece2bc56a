"""What vLLM's workers learn from us: to take weights from a file while they live, and to say both log-probs.

vLLM loads the class by its name, in its own processes (`--worker-extension-cls agentgym_policies.vllm_worker.Worker`).
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open


class BothLogprobs:
    """vLLM's sampler with one change: beside the log-prob that a token was drawn with stands its raw one.

    vLLM reports either of them. Asked for top log-probs, it gives columns [sampled, best, second best, ...]; here every
    column behind the first holds the sampled token's raw log-prob, under the next token's id, which is never its own.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __call__(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raw = logits.log_softmax(-1, dtype=torch.float32)  # before the sampler changes the logits in place
        found = self.sampler(logits, *args, **kwargs)
        columns = found.logprobs_tensors
        if columns is not None:
            ids = found.sampled_token_ids[:, :1].long()
            columns.logprobs[:, 1:] = raw.gather(-1, ids)
            columns.logprob_token_ids[:, 1:] = (ids + 1) % raw.shape[-1]
        return found


class Worker:
    """Added to vLLM's worker class, whose attributes it uses; called through `collective_rpc`."""

    model_runner: Any
    model_config: Any
    reload_weights: Any

    def report_both_logprobs(self) -> dict[str, str]:
        """From now on; said twice, it is done once. Answers which of them vLLM itself reports."""
        if not isinstance(self.model_runner.sampler, BothLogprobs):
            self.model_runner.sampler = BothLogprobs(self.model_runner.sampler)
        return {"mode": self.model_config.logprobs_mode}

    def take_weights(self, path: str) -> None:
        """Put the tensors of a safetensors file (the hub's names) in the place of the model's own."""
        with safe_open(path, framework="pt") as held:
            self.reload_weights(weights_iterator=((name, held.get_tensor(name)) for name in held.keys()))  # noqa: SIM118
        if self.model_config.hf_text_config.tie_word_embeddings:
            self._repack_head()

    def _repack_head(self) -> None:
        """A head that shares the embedding's weights loads none, so vLLM keeps what it packed for the CPU before."""
        head = self.model_runner.get_model().lm_head
        head.quant_method.process_weights_after_loading(head)

    def can_sleep(self) -> dict[str, bool]:
        """Whether this device and configuration give memory back."""
        from vllm.platforms import current_platform

        return {"sleep": bool(current_platform.is_sleep_mode_available() and self.model_config.enable_sleep_mode)}
