"""Sampling: what is drawn follows the distribution; top-k and top-p against slow twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import ConfigError, ModelError
from agentgym.types import Sampling
from agentgym_policies.sampling import check, draw, invert, processed_logprobs

LOGITS = [2.0, 1.0, 0.5, -1.0, -30.0, 1.0]


def twin(logits: list[float], s: Sampling) -> list[float]:
    """Probabilities by loops: temperature, then top-k (ties kept), then top-p, renormalised in between."""
    if s.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp((x - max(logits)) / s.temperature) for x in logits]
    if s.top_k:
        least = sorted(weights, reverse=True)[min(s.top_k, len(weights)) - 1]
        weights = [w if w >= least else 0.0 for w in weights]
    probs = [w / sum(weights) for w in weights]
    kept, total = [0.0] * len(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if total >= s.top_p and s.top_p < 1:
            break
        kept[i], total = probs[i], total + probs[i]
    return [p / sum(kept) for p in kept]


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=0.0),
    Sampling(top_k=2),
    Sampling(top_k=99, top_p=0.99),
    Sampling(top_p=0.6),
    Sampling(top_p=0.01),
    Sampling(temperature=2.0, top_k=4, top_p=0.7),
]


def test_processed_logprobs_equal_the_slow_twin_row_by_row() -> None:
    raw = torch.tensor([LOGITS] * len(SAMPLINGS)).log_softmax(-1)
    found = processed_logprobs(raw, SAMPLINGS).exp().numpy()
    for row, sampling in zip(found, SAMPLINGS, strict=True):
        np.testing.assert_allclose(row, twin(LOGITS, sampling), atol=1e-6, err_msg=str(sampling))


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=12, unique=True),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.93, 0.71, 0.37, 0.05]),
    st.sampled_from([0.0, 0.31, 1.0, 1.7]),
)
def test_any_row_equals_its_twin(tenths: list[int], top_k: int, top_p: float, temperature: float) -> None:
    sampling = Sampling(top_k=top_k, top_p=top_p, temperature=temperature)
    logits = [x / 10 + 0.0007 * i for i, x in enumerate(tenths)]
    found = processed_logprobs(torch.tensor([logits]).log_softmax(-1), [sampling]).exp()[0].numpy()
    np.testing.assert_allclose(found, twin(logits, sampling), atol=1e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.9)], ids=["raw", "processed"])
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    n = 20_000
    logits = torch.tensor([LOGITS]).expand(n, -1)
    drawn = draw(logits, [sampling] * n, [12345] * n, range(n))
    counts = np.bincount(drawn.ids, minlength=len(LOGITS))
    expected = np.array(twin(LOGITS, sampling)) * n
    likely = expected > 5
    chi2 = float((((counts - expected) ** 2)[likely] / expected[likely]).sum())
    assert chi2 < 20.5  # 0.999 quantile at 5 degrees of freedom
    assert counts[~likely].sum() <= 3
    raw = torch.tensor(LOGITS).log_softmax(-1)
    np.testing.assert_allclose(drawn.logprobs, raw[drawn.ids].numpy(), atol=1e-6)
    np.testing.assert_allclose(np.exp(drawn.processed), np.array(twin(LOGITS, sampling))[drawn.ids], atol=1e-5)


def test_impossible_tokens_are_never_drawn_even_at_the_edges() -> None:
    row = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(-1)
    edges = np.array([0.0, 0.5 - 1e-12, 0.5 + 1e-12, np.nextafter(1.0, 0.0)])
    assert invert(row.expand(4, -1), edges).tolist() == [1, 1, 3, 3]


def test_a_gpu_draws_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """There torch refuses to add floats up along a row: a GPU would do it in another order each time."""
    plain = torch.Tensor.cumsum

    def refusing(x: torch.Tensor, dim: int) -> torch.Tensor:
        assert not x.is_floating_point()
        return plain(x, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", refusing)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(), Sampling(top_p=0.9)):
        assert len(draw(logits, [sampling] * 4, list(range(4)), [0] * 4).ids) == 4


def test_weights_that_are_no_numbers_give_an_error_and_no_token() -> None:
    with pytest.raises(ModelError, match="not numbers"):
        draw(torch.full((2, 5), torch.nan), [Sampling()] * 2, [1, 2], [0, 0])


def test_a_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    together = draw(logits, [Sampling()] * 8, list(range(8)), [3] * 8)
    for i in range(8):
        alone = draw(logits[i : i + 1], [Sampling()], [i], [3])
        assert alone.ids[0] == together.ids[i]


@pytest.mark.parametrize(
    "bad", [Sampling(temperature=-1.0), Sampling(top_p=1.5), Sampling(top_k=-1), Sampling(max_tokens=0)], ids=str
)
def test_parameters_that_cannot_be_meant(bad: Sampling) -> None:
    with pytest.raises(ConfigError, match="sampling needs"):
        check(bad)
