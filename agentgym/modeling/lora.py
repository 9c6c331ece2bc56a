"""Low-rank adapters: what is declared, without torch."""

from __future__ import annotations

import msgspec


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters of `rank`, scaled by alpha / rank (2106.09685), beside the linear layers whose names end in `targets`
    (empty = every linear layer but the unembedding)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
