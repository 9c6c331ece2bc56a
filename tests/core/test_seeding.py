"""Keyed randomness: the same key draws the same number anywhere, and other keys draw others."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agentgym.seeding import digest, key, rng, share, uniforms

_parts = st.lists(
    st.one_of(st.integers(), st.text(max_size=4), st.binary(max_size=4), st.none(), st.floats()), max_size=4
)


def test_known_values_never_change() -> None:
    """Recorded runs depend on these: a change breaks replay."""
    assert key(7, "price", 3) == 14826870334151839271
    assert rng(7, "price").random() == 0.4604769888297102
    assert uniforms(np.asarray([1, 2], np.uint64), np.asarray([0, 5])).tolist() == [
        0.5665615751722809,
        0.346622270411699,
    ]


def test_another_process_draws_the_same() -> None:
    code = "from agentgym.seeding import key, share; print(key(1, 'a', b'b', None), share('x'))"
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {f"{key(1, 'a', b'b', None)} {share('x')}\n"}


@given(_parts, _parts)
def test_keys_differ_where_parts_differ(a: list, b: list) -> None:
    same = [(type(x), repr(x)) for x in a] == [(type(x), repr(x)) for x in b]
    assert (key(*a) == key(*b)) == same


def test_parts_carry_their_type_and_border() -> None:
    assert len({key("ab"), key("a", "b"), key(b"ab"), key("a", "b", ""), key(1), key("1"), key(1.0), key(True)}) == 8
    assert len(digest("x", size=16)) == 16


def test_shares_split_evenly() -> None:
    drawn = [share("split", i) for i in range(2000)]
    assert all(0 <= x < 1 for x in drawn)
    assert 0.17 < sum(x < 0.2 for x in drawn) / len(drawn) < 0.23


def test_uniforms_depend_on_each_pair_alone() -> None:
    keys, positions = np.asarray([key("a"), key("b")] * 50, np.uint64), np.repeat(np.arange(50), 2)
    whole = uniforms(keys, positions)
    order = np.random.default_rng(0).permutation(100)
    assert uniforms(keys[order], positions[order]).tolist() == whole[order].tolist()
    assert [uniforms(keys[i : i + 1], positions[i : i + 1])[0] for i in range(100)] == whole.tolist()
    assert len(set(whole.tolist())) == 100


def test_uniforms_look_uniform_along_positions_and_along_keys() -> None:
    count = 20_000
    along = uniforms(np.full(count, key("episode"), np.uint64), np.arange(count))
    across = uniforms(np.asarray([key(i) for i in range(count)], np.uint64), np.zeros(count, int))
    consecutive = uniforms(np.arange(count, dtype=np.uint64), np.zeros(count, int))
    for drawn in (along, across, consecutive):
        assert drawn.min() >= 0
        assert drawn.max() < 1
        bins = Counter((drawn * 20).astype(int).tolist())
        square = sum((bins[i] - count / 20) ** 2 / (count / 20) for i in range(20))
        assert square < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03


def test_no_global_state_is_read_or_written() -> None:
    import random

    random.seed(1)
    state = random.getstate()
    first = rng("a").random()
    assert random.getstate() == state
    random.seed(2)
    assert rng("a").random() == first
