"""Every option value is checked and parsed once, by its group, before anything slow happens."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tlcli.config import commands
from tlcli.config.commands import CachePruneConfig, EvaluateConfig, ExtractConfig, FinetuneConfig
from tlcli.config.fields import Options, option, option_name
from tlcli.errors import UsageError

ROOT = Path(__file__).parents[2]
CONFIGS = [kind for name, kind in vars(commands).items() if name.endswith("Config")]
PARSED = [
    pytest.param(kind, item, id=f"{kind.__name__}-{item.name}")
    for kind in CONFIGS
    for item in dataclasses.fields(kind)
    if item.metadata.get("parse")
]
BAD = "banana?/[1"  # no number, size, age, device, head, scaling, name of a backbone or KEY=VALUE


@pytest.mark.parametrize(("kind", "item"), PARSED)
def test_a_text_that_cannot_be_read_is_refused_by_name(kind, item):
    with pytest.raises(UsageError) as caught:
        kind(**{item.name: BAD})
    assert caught.value.message.startswith(option_name(item))
    assert repr(BAD) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_configuration_is_made_of_options(kind):
    """One that is not would skip every check."""
    assert issubclass(kind, Options)
    assert "__post_init__" not in vars(kind)


def test_the_check_of_every_group_runs_once():
    ran = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class One(Options):
        a: int = option(1, "A.", minimum=0)

        def check(self):
            ran.append("one")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two(Options):
        b: str = option("2", "B.", parse=lambda text, _name: int(text))

        def check(self):
            ran.append(f"two {self.parsed('b') + 1}")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both(Two, One):
        def check(self):
            ran.append("both")

    both = Both(b="5")
    assert ran == ["one", "two 6", "both"]
    assert dataclasses.replace(both, b="6").parsed("b") == 6
    with pytest.raises(UsageError, match="--a -1 is out of range"):
        Both(a=-1)
    assert Both(b="5") == both


def test_values_out_of_range_and_empty_ones_are_refused_from_python_too():
    with pytest.raises(UsageError, match="--val-fraction nan is out of range"):
        FinetuneConfig(val_fraction=float("nan"))
    with pytest.raises(UsageError, match="--weights is empty"):
        FinetuneConfig(weights="")
    with pytest.raises(UsageError, match="DATA is empty"):
        ExtractConfig(data="")


def test_what_texts_stand_for():
    config = ExtractConfig(freeze="8", cache_max_size="2GB", model_kwargs="a=1", workers=3)
    assert (config.frozen_units, config.cache_max_bytes, config.num_workers) == (8, 2 * 10**9, 3)
    assert config.model_arguments == {"a": 1}
    heads = FinetuneConfig(l2="0.1,1", lr="auto", dropout="0", head="mlp:8,4", scaling="plain, plain")
    assert (heads.l2_values, heads.lr_values, heads.dropout_values) == ((0.1, 1.0), None, (0.0,))
    assert (heads.hidden_sizes, heads.scalings) == ((8, 4), ("plain",))
    assert FinetuneConfig(freeze="NONE").frozen_units == 0
    assert ExtractConfig(freeze="all").frozen_units == "all"
    assert FinetuneConfig().frozen_units is None
    assert EvaluateConfig(cache_max_size="1GiB").cache_max_bytes == 2**30
    assert CachePruneConfig(older_than="2h").parsed("older_than") == 7200
    assert EvaluateConfig().num_workers >= 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--cache-max-size", "20Q"), "--cache-max-size '20Q' is not a size."),
        (("--freeze", "banana"), "--freeze takes all, none, or a number of units; got 'banana'."),
        (("--device", "gpu"), "--device 'gpu' is not a device."),
        (("--model-kwargs", "depth"), "--model-kwargs 'depth': 'depth' is not KEY=VALUE."),
        (("--backbone", "model:x"), "--backbone 'model:x' is not a timm model name."),
        (("--lr", "fast"), "--lr 'fast': 'fast' is not a number from 1e-08 to 10."),
    ],
)
def test_wrong_words_are_refused_before_data_and_torch(tmp_path, words, expected):
    code = (
        "import sys; from tlcli.cli.app import main;"
        f"code = main(['finetune', {str(tmp_path / 'lost')!r}, *sys.argv[1:]]);"
        "print(code, [name for name in ('torch', 'timm', 'PIL', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2 []"
    assert done.stderr.splitlines()[0] == f"error: {expected}"
