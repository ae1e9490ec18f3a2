"""--model-kwargs: what it reads, and what it refuses."""

import pytest

from tlcli.config.model_kwargs import parse_arguments, unknown_argument
from tlcli.errors import UsageError


def test_values_get_the_type_they_look_like():
    text = "a=3, b=0.5,c=true,d=False,e=none,f=every,g=[1,2],h=(1,2.5)"
    assert parse_arguments(text) == {
        "a": 3, "b": 0.5, "c": True, "d": False, "e": None, "f": "every", "g": [1, 2], "h": [1, 2.5],
    }  # fmt: skip
    assert parse_arguments("act=leaky-relu,x=-1,y=1e-3") == {"act": "leaky-relu", "x": -1, "y": 0.001}
    assert parse_arguments("") == parse_arguments("  ") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("norm", "KEY=VALUE"),
        ("norm=", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("a=1,,b=2", "KEY=VALUE"),
        ("a b=1", "KEY=VALUE"),
        ("a=1,a=2", "twice"),
        ("a=[1", "cannot be read"),
        ("a=f(x)", "cannot be read"),
        ("a=1==2", "cannot be read"),
        ("a={'x':1}", "no plain value"),
        ("a=1e999", "no plain value"),
        ("a=1j", "no plain value"),
        ("img_size=64", "img_size"),
        ("drop_path_rate=0.1", "drop_path_rate"),
        ("num_classes=3", "no classifier"),
    ],
)
def test_refusals(text, words):
    with pytest.raises(UsageError) as caught:
        parse_arguments(text)
    assert words in caught.value.message
    assert caught.value.hint


def test_options_of_their_own_are_named():
    for text, flag in (("img_size=64", "--image-size"), ("drop_path_rate=0.1", "--drop-path")):
        with pytest.raises(UsageError) as caught:
            parse_arguments(text)
        assert flag in caught.value.hint


def test_the_nearest_argument_is_named():
    error = unknown_argument("net", "depht", ["width", "depth"])
    assert "Did you mean depth? It takes depth, width." in error.hint
    assert unknown_argument("net", "x", []).hint == "It takes none."
