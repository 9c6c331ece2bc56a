"""A shop can be narrowed to the slots that matter."""

import pytest

import agentgym
from agentgym.errors import UnknownName


def test_only_the_named_slots_and_the_category_exist():
    env = agentgym.make("shopping-v0", surface="compact", size=300, slots=["brand", "price"])
    assert list(env.catalogue.columns) == ["category", "brand", "price"]
    assert {"color", "seller"}.isdisjoint(env.vocabulary())
    assert next(env.tasks("train", 0)).payload


def test_a_slot_the_catalogue_lacks_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'price'"):
        agentgym.make("shopping-v0", size=300, slots=["prize"])
