"""Keys depend on facts alone, on all of them, and on nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcli.cache.key import canonical_json, entry_key, explain

SAME_EVERY_TIME = settings(max_examples=40, deadline=None, derandomize=True, database=None)
LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
FACTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


def test_key_is_pinned():
    facts = {"schema": 1, "b": [True, None, "ü"], "a": {"y": 2, "x": 1}}
    assert canonical_json(facts) == '{"a":{"x":1,"y":2},"b":[true,null,"\\u00fc"],"schema":1}'
    assert entry_key(facts) == "dd9b6a47ac7951a8be323dc21d304b0b267b077ac1fee50b3d467a79435f72cb"


@given(FACTS)
@SAME_EVERY_TIME
def test_key_survives_a_round_trip_and_another_order(facts):
    shuffled = dict(reversed(list(facts.items())))
    assert entry_key(json.loads(json.dumps(facts))) == entry_key(shuffled) == entry_key(facts)
    assert explain(facts, shuffled) == []


@given(FACTS, FACTS)
@SAME_EVERY_TIME
def test_two_keys_are_equal_only_for_equal_facts(a, b):
    same_text = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (entry_key(a) == entry_key(b)) == same_text
    assert (explain(a, b) == []) == same_text


def test_true_is_not_one_and_a_tuple_is_a_list():
    assert entry_key({"a": True}) != entry_key({"a": 1})
    assert entry_key({"a": (1, 2)}) == entry_key({"a": [1, 2]})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (0.5, "value.a"),
        (float("nan"), "value.a"),
        (np.int64(1), "value.a"),
        (b"x", "value.a"),
        ({1: 2}, "value.a"),
        ([1, {"b": 0.1}], r"value.a\[1\].b"),
        ({2}, "value.a"),
        (Path("x"), "value.a"),
    ],
)
def test_what_is_not_plain_is_refused_by_name(value, place):
    with pytest.raises(TypeError, match=place):
        entry_key({"a": value})


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"a": {"b": 1}}, {"a.b": 1}),
        ({"": {"": 1}}, {".": 1}),
        ({'"a': {'b"': 1}}, {'"a.b"': 1}),
    ],
)
def test_facts_of_other_structure_are_told_apart(a, b):
    assert entry_key(a) != entry_key(b)
    assert len(explain(a, b)) == 2
    assert explain({**a, **b}, {**b, **a}) == []


def test_explain_names_every_difference():
    a = {"cut": "layer4", "preprocess": {"size": [224, 224], "mode": "center"}, "old": {}}
    b = {"cut": "layer3", "preprocess": {"size": [256, 256], "mode": "center"}, "new": 1}
    assert explain(a, b) == [
        'cut: "layer4" -> "layer3"',
        "new: absent -> 1",
        "old: {} -> absent",
        "preprocess.size: [224,224] -> [256,256]",
    ]
