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
        summary="any server that speaks OpenAI's chat completions, by its URL; records the token ids it returns",
        extra="http",
        requires=("aiohttp",),
    ),
    Spec(
        id="completions",
        target="agentgym_policies.endpoint.completions:Completions.from_checkpoint",
        summary="any server of /v1/completions that takes token ids; conversations are rendered here",
        extra="train,http",
        requires=("aiohttp", "torch", "transformers", "tokenizers", "safetensors"),
    ),
    Spec(
        id="vllm",
        target="agentgym_policies.vllm_engine:VllmEngine.from_checkpoint",
        summary="vLLM without a server between: token ids and log-probs, prefix caching, weights replaced in place",
        extra="vllm",
        requires=("vllm", "torch", "transformers", "tokenizers", "safetensors"),
    ),
    Spec(
        id="vllm-server",
        target="agentgym_policies.vllm_server:VllmServer.from_checkpoint",
        summary="a `vllm serve` process by its URL, with the same records; it can be trained on",
        extra="train,http",
        requires=("aiohttp", "torch", "transformers", "tokenizers", "safetensors"),
    ),
]

BENCHES = [
    Spec(
        id="engine",
        target="agentgym_policies.bench:engine",
        summary="sampled tokens per second over turns and sizes of model: torch engine against generate and vLLM",
        extra="train",
        requires=("torch", "transformers", "tokenizers", "safetensors"),
    ),
    Spec(
        id="endpoint",
        target="agentgym_policies.endpoint.bench:endpoint",
        summary="CPU per call of HTTP clients: ours against a bare aiohttp loop, httpx and AsyncOpenAI",
        extra="http",
        requires=("aiohttp",),
    ),
]
