"""Where key/value caches live: leased slots of one static cache, or the model's own cache class row by row.

A `Store` runs the model over the tokens a row has not cached yet and returns the logits behind the last of them.

    SlotStore   full and sliding-window attention. One tensor [slots, K, length, D] per layer; new tokens of many rows
                travel packed in one pass; decoding is one pass over the slots in use, with grouped attention of our own
    RowStore    any other model, through the cache object that it makes itself: one row at a time, correct, slower

`store_for` chooses by asking the model: each candidate must reproduce the model's plain forward pass on a probe.
Shapes as in `agentgym.modeling.attention`; R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from agentgym.errors import ModelError
from agentgym.modeling.attention import NO_MASK, expand_heads, prepare

KEY_BUCKET = 64
"""Attended key lengths are rounded up to multiples of this."""
PREFILL_TOKENS = 2048
"""Tokens of one prefill pass; longer prompts take several."""


@dataclass(slots=True, eq=False)
class Row:
    """The tokens of one session, and how many of them are cached in which slot (-1: none).

    `version` is that of the oldest weights in the cache; caches of other epochs than the batcher's are not looked at.
    """

    ids: list[int] = field(default_factory=list)
    slot: int = -1
    cached: int = 0
    saved: Any = None
    epoch: int = 0
    version: int = 0

    @property
    def todo(self) -> int:
        return len(self.ids) - self.cached


class Store(Protocol):
    """Key/value caches of `slots` rows. Used by the engine thread alone."""

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """Cache what rows have not cached yet, as far as one pass goes: those now complete, and their logits [R, V]."""
        ...

    def usable(self, row: Row) -> int:
        """How many of the row's cached tokens a pass over the others can build on."""
        ...

    def drop(self, slot: int) -> None:
        """Forget a slot's content."""
        ...

    def save(self, row: Row) -> Any:
        """An exact copy of a row's cache, for a slot that is lent to somebody else."""
        ...

    def restore(self, row: Row) -> None:
        """Put `row.saved` into `row.slot`."""
        ...


@dataclass(slots=True)
class Pass:
    """One forward pass of a `SlotStore`: token `sources[i]` is written to (slots[i], positions[i])."""

    sources: Tensor | None
    slots: Tensor
    positions: Tensor


class SlotCache:
    """The duck-typed cache handed to transformers: writes new keys and values into their slots, hands out the whole.

    Each slot has one position more than `length`, which nobody attends to: padding writes there.
    """

    is_compileable = False

    def __init__(self, slots: int, length: int) -> None:
        self.shape = (slots, length + 1)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.step: Pass | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """k, v [1, K, N, D] -> the layer's cache, [slots, K, length + 1, D] each."""
        assert self.step is not None, "a slot cache is only used within a pass"
        while len(self.layers) <= layer_idx:
            self.layers.append(tuple(x.new_zeros(self.shape[0], x.shape[1], self.shape[1], x.shape[3]) for x in (k, v)))  # type: ignore[arg-type]
        for whole, new in zip(self.layers[layer_idx], (k, v), strict=True):
            tokens = new[0].transpose(0, 1)
            if self.step.sources is not None:
                tokens = tokens[self.step.sources]
            whole[self.step.slots, :, self.step.positions] = tokens
        return self.layers[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given explicitly."""
        return 0


class DecodeLayout:
    """One query token per row against the first `span` positions of its slot: grouped-query attention by two products.

    `rows` is a count (slots 0 to rows) or the slots themselves; `lengths` [B] counts the keys a row may see.
    """

    def __init__(self, rows: int | Tensor, lengths: Tensor, span: int) -> None:
        self.rows, self.span = rows, span
        self.last = lengths[:, None] - 1
        self.at = torch.arange(span, device=lengths.device)
        self.bias = self._bias(None)

    def _bias(self, window: int | None) -> Tensor:
        hidden = self.at > self.last
        if window is not None:
            hidden |= self.at <= self.last - window
        zeros = torch.zeros(hidden.shape, device=hidden.device)
        return zeros.masked_fill_(hidden, -torch.inf)[:, None, None]

    def _lent(self, whole: Tensor) -> Tensor:
        found = whole[: self.rows] if isinstance(self.rows, int) else whole[self.rows]
        return found[:, :, : self.span]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        _, H, B, D = q.shape
        k_BKLD, v_BKLD = self._lent(k), self._lent(v)
        q_BKGD = (q[0].transpose(0, 1) * scale).reshape(B, k.shape[1], H // k.shape[1], D)
        bias = self.bias if window is None or window >= self.span else self._bias(window)
        weights = (torch.matmul(q_BKGD, k_BKLD.transpose(-1, -2)).float() + bias).softmax(-1)
        return torch.matmul(weights.to(v.dtype), v_BKLD).reshape(1, B, H, v.shape[-1])


class PrefillLayout:
    """New tokens of R rows, packed; row r has `counts[r]` of them behind `starts[r]` cached ones.

    Rows are padded to the longest in attention only.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], span: int) -> None:
        first = np.cumsum([0, *counts[:-1]])
        at = np.arange(max(counts))
        real = at < np.array(counts)[:, None]
        self.block = torch.from_numpy(np.where(real, first[:, None] + at, first[:, None]))
        self.home = torch.from_numpy(np.flatnonzero(real))
        self.slots = torch.tensor(slots)
        self.at = torch.from_numpy(np.array(starts)[:, None] + at)[:, None, :, None]  # [R, 1, T, 1]
        self.keys = torch.arange(span)
        self.span = span

    def to(self, device: torch.device) -> PrefillLayout:
        for name in ("block", "home", "slots", "at", "keys"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        mask = self.keys <= self.at
        if window is not None and window < self.span:
            mask &= self.keys > self.at - window
        k_RKLD, v_RKLD = (x[self.slots, :, : self.span] for x in (k, v))
        q_RHTD = q[0].transpose(0, 1)[self.block].transpose(1, 2)
        out = scaled_dot_product_attention(
            q_RHTD, expand_heads(k_RKLD, q.shape[1]), expand_heads(v_RKLD, q.shape[1]), attn_mask=mask, scale=scale
        )
        return out.transpose(1, 2).flatten(0, 1)[self.home].unsqueeze(0)


def _bucket(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


class Decode:
    """One decoding pass over `width` rows and `span` keys of each, on tensors of its own that are filled in place.

    `dense`: row i is slot i. Rows that are not filled are padding: they see one key, and write where nobody looks. With
    the shape and the addresses fixed, a GPU records the pass once and replays it as a CUDA graph.
    """

    def __init__(self, store: SlotStore, width: int, span: int, dense: bool) -> None:
        self.store, self.span, self.dense = store, span, dense
        self.padding = np.array([[0], [1], [0], [store.length]]).repeat(width, 1)
        if dense:
            self.padding[2] = np.arange(width)
        self.feed = torch.empty(4, width, dtype=torch.int64, device=store.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64], slots: NDArray[np.int64]) -> Tensor:
        """Logits [R, V] of rows in these slots, each `lengths` tokens long, `ids` their last."""
        rows = slots if self.dense else np.arange(len(slots))
        feed = self.padding.copy()
        feed[:, rows] = ids, lengths, slots, lengths - 1
        self.feed.copy_(torch.from_numpy(feed))
        where = torch.from_numpy(rows).to(self.store.device)
        if not self.store.static:
            return self._pass(where)
        if self.store.device.type != "cuda":
            return self._pass(None)[where]  # the shape of the unembedding, too, must not depend on the others
        return self._replayed()[where]

    def _pass(self, keep: Tensor | None) -> Tensor:
        ids, lengths, slots, at = self.feed
        layout = DecodeLayout(len(slots) if self.dense else slots, lengths, self.span)
        return self.store.forward(ids, lengths - 1, Pass(None, slots, at), layout, keep)

    def _replayed(self) -> Tensor:
        """[width, V], from the graph. Another thread may allocate while it is recorded; the first pass warms up."""
        if self.graph is None:
            self._pass(None)
            self.graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.device(self.store.device),
                torch.cuda.graph(self.graph, self.store.pool, torch.cuda.Stream(), "thread_local"),
            ):
                self.logits = self._pass(None)
        self.graph.replay()
        assert self.logits is not None
        return self.logits


class SlotStore:
    """See the module. `deterministic`: every pass has a shape that depends on one row's own history alone."""

    def __init__(self, model: Any, slots: int, length: int, *, deterministic: bool = False) -> None:
        self.model, self.slots, self.length, self.deterministic = model, slots, length, deterministic
        self.device = next(model.parameters()).device
        self.mask = NO_MASK.to(self.device)
        self.static = deterministic or self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.cache = SlotCache(slots, length)
        self.decodes: dict[tuple[int, int, bool], Decode] = {}

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        """Prefill and decoding are a pass of their own each; deterministic mode takes more."""
        new = [r for r in rows if r.todo > 1]
        groups = [(self._prefill, g) for g in self._prefill_groups(new)]
        groups += [(self._decode, g) for g in self._decode_groups([r for r in rows if r.todo == 1])]
        done: list[Row] = []
        logits: list[Tensor] = []
        for step, group in groups:
            found = step(group)
            ready = [i for i, r in enumerate(group) if r.todo == 0]
            done += [group[i] for i in ready]
            logits.append(found if len(ready) == len(group) else found[ready])
        return done, torch.cat(logits) if len(logits) > 1 else logits[0]

    def _prefill_groups(self, rows: list[Row]) -> list[list[Row]]:
        if self.deterministic:
            return [[r] for r in rows]
        groups: list[list[Row]] = []
        room = 0
        for row in sorted(rows, key=lambda r: r.todo):
            if not groups or row.todo > room:
                groups.append([])
                room = PREFILL_TOKENS
            groups[-1].append(row)
            room -= row.todo
        return groups

    def _decode_groups(self, rows: list[Row]) -> list[list[Row]]:
        if not self.deterministic:
            return [rows] if rows else []
        spans = [self._span(len(r.ids)) for r in rows]
        return [[r for r, s in zip(rows, spans, strict=True) if s == span] for span in sorted(set(spans))]

    def _span(self, length: int) -> int:
        rounded = _bucket(length, 2 * KEY_BUCKET) if self.static else -(-length // KEY_BUCKET) * KEY_BUCKET
        return min(rounded, self.length)

    def _prefill(self, rows: list[Row]) -> Tensor:
        starts = [r.cached for r in rows]
        counts = [min(r.todo, PREFILL_TOKENS) for r in rows]
        slots = np.repeat([r.slot for r in rows], counts)
        ids = np.concatenate([r.ids[r.cached : r.cached + n] for r, n in zip(rows, counts, strict=True)])
        positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        for row, n in zip(rows, counts, strict=True):
            row.cached += n
        total = len(ids)
        padded = _bucket(total, 16) if self.deterministic else total
        layout = PrefillLayout(
            [r.slot for r in rows],
            starts,
            [padded] if self.deterministic else counts,
            self._span(max(r.cached for r in rows)),
        )
        sources = torch.arange(total, device=self.device) if padded > total else None
        step = Pass(sources, self._tensor(slots), self._tensor(positions))
        extra = (0, padded - total)
        return self.forward(
            pad(self._tensor(ids), extra),
            pad(step.positions, extra),
            step,
            layout.to(self.device),
            self._tensor(np.cumsum(counts) - 1),
        )

    def _decode(self, rows: list[Row]) -> Tensor:
        slots, lengths = np.array([r.slot for r in rows]), np.array([len(r.ids) for r in rows])
        last = np.array([r.ids[-1] for r in rows])
        for row in rows:
            row.cached += 1
        width = int(slots.max()) + 1
        dense = self.deterministic or 2 * len(rows) >= width  # few rows far apart: copy their caches together
        shape = self._width(width if dense else len(rows)), self._span(int(lengths.max())), dense
        if shape not in self.decodes:
            self.decodes[shape] = Decode(self, *shape)
        return self.decodes[shape](last, lengths, slots)

    def _width(self, rows: int) -> int:
        if self.deterministic:
            return self.slots
        return min(_bucket(rows, 8), self.slots) if self.static else rows

    def _tensor(self, values: Any) -> Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(self.device, non_blocking=True)

    def forward(self, ids: Tensor, positions: Tensor, step: Pass, layout: Any, keep: Tensor | None) -> Tensor:
        """Logits [R, V] of the packed tokens `keep` (all: None)."""
        self.cache.step = step
        out = self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if keep is None else keep,
            layout=layout,
        )
        found: Tensor = out.logits[0]
        return found

    def usable(self, row: Row) -> int:
        return row.cached

    def drop(self, slot: int) -> None:
        """Nothing to do: what a slot held before is never looked at."""

    def save(self, row: Row) -> list[tuple[Tensor, Tensor]]:
        return [
            (k[row.slot, :, : row.cached].clone(), v[row.slot, :, : row.cached].clone()) for k, v in self.cache.layers
        ]

    def restore(self, row: Row) -> None:
        for whole, saved in zip(self.cache.layers, row.saved, strict=True):
            for kept, copy in zip(whole, saved, strict=True):
                kept[row.slot, :, : copy.shape[1]] = copy


class RowStore:
    """Any model, through the cache object it makes itself. `restart`: its cache cannot take several tokens at once
    later on (recurrent states), so a turn begins from nothing."""

    def __init__(self, model: Any, *, restart: bool = False) -> None:
        self.model, self.restart = model, restart
        self.device = next(model.parameters()).device
        self.caches: dict[int, tuple[Any, int]] = {}

    def run(self, rows: Sequence[Row]) -> tuple[list[Row], Tensor]:
        return list(rows), torch.stack([self._advance(row) for row in rows])

    def _advance(self, row: Row) -> Tensor:
        cache = self.caches[row.slot][0] if row.cached else None
        ids = torch.tensor([row.ids[row.cached :]], device=self.device)
        positions = torch.arange(row.cached, len(row.ids), device=self.device)[None]
        out = self.model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        row.cached = len(row.ids)
        self.caches[row.slot] = out.past_key_values, row.cached
        found: Tensor = out.logits[0, -1]
        return found

    def usable(self, row: Row) -> int:
        _, seen = self.caches.get(row.slot, (None, 0))
        return 0 if row.cached != seen or (self.restart and row.todo > 1) else seen

    def drop(self, slot: int) -> None:
        self.caches.pop(slot, None)

    def save(self, row: Row) -> Any:
        return self.caches.pop(row.slot)

    def restore(self, row: Row) -> None:
        self.caches[row.slot] = row.saved


def store_for(model: Any, slots: int, length: int, *, deterministic: bool = False) -> Store:
    """The fastest store that reproduces the model's plain forward pass on a probe; `ModelError` where none does."""
    candidates: list[tuple[Store, Store]] = []
    if prepare(model):
        candidates.append((SlotStore(model, 2, 64), SlotStore(model, slots, length, deterministic=deterministic)))
    for restart in (False, True):
        candidates.append((RowStore(model, restart=restart), RowStore(model, restart=restart)))
    errors = []
    for probe, store in candidates:
        gap = _probe(model, probe)
        if gap < (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.5):
            return store
        errors.append(f"{type(probe).__name__} {gap:.2g}")
    raise ModelError(
        f"no cache of {type(model).__name__} reproduces its own forward pass (largest log-prob gaps:"
        f" {', '.join(errors)}); this engine cannot run it"
    )


@torch.no_grad()
def _probe(model: Any, store: Store) -> float:
    """The largest log-prob gap between turn-by-turn caching and one plain forward pass; inf where it cannot run."""
    ids = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, 24).tolist()
    row, gap = Row(slot=1), 0.0
    expected = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device)).logits[0].float()
    try:
        for stop in (9, 10, 17, 18, 24):
            row.ids = ids[:stop]
            row.cached = store.usable(row)
            _, logits = store.run([row])
            gap = max(gap, float((logits[0].float().log_softmax(-1) - expected[stop - 1].log_softmax(-1)).abs().max()))
    except Exception:  # whatever a foreign model raises over a cache it does not know
        return float("inf")
    return gap
