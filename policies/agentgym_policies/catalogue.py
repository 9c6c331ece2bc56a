"""What this room holds, as static metadata: reading it imports no torch."""

from agentgym.registry import Spec

POLICIES = [
    Spec(
        id="torch",
        target="agentgym_policies.torch_engine:TorchEngine.from_checkpoint",
        summary="any causal language model in hub format, continuous batching over leased cache slots",
        extra="train",
        requires=("torch", "transformers", "tokenizers", "safetensors"),
    ),
    Spec(
        id="endpoint",
        target="agentgym_policies.endpoint:Endpoint",
        summary="any server that speaks OpenAI's chat completions, by its URL; for evaluation",
        extra="http",
        requires=("aiohttp",),
    ),
]

BENCHES = [
    Spec(
        id="engine",
        target="agentgym_policies.bench:engine",
        summary="sampled tokens per second over many turns: torch engine against generate, with and without a cache",
        extra="train",
        requires=("torch", "transformers", "tokenizers", "safetensors"),
    ),
]
