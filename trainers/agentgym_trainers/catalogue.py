"""What this room holds, as static metadata: reading it imports no torch."""

from agentgym.registry import Spec

TRAINERS = [
    Spec(
        id="policy-gradient",
        target="agentgym_trainers.loop:PolicyGradient",
        summary="supervised warm start, then clipped policy gradient with turn-level credit",
        extra="train",
        requires=("torch", "transformers", "tokenizers", "safetensors"),
    ),
]
