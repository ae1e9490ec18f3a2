"""Options: written once, ranged, documented; files of options; what contradicts itself is refused."""

import contextlib
import dataclasses

import pytest
import yaml

from tlcli.config import commands as config
from tlcli.config.commands import ExtractConfig, FinetuneConfig
from tlcli.config.data import DataOptions
from tlcli.config.fields import from_options, long_name, to_options
from tlcli.config.yaml_file import read_config_file
from tlcli.errors import DataError, UsageError

CONFIGS = [
    kind for name, kind in vars(config).items() if name.endswith("Config") and dataclasses.is_dataclass(kind)
]
KNOWN = {field.name for field in dataclasses.fields(FinetuneConfig)}


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_option_has_help_and_a_default_in_its_range(kind):
    kind()  # every default is allowed
    for field in dataclasses.fields(kind):
        about = field.metadata
        assert about["help"].endswith((".", ")")), field.name
        low, high = about.get("minimum"), about.get("maximum")
        if field.default is not None and low is not None:
            assert low <= field.default <= (high if high is not None else float("inf")), field.name


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FinetuneConfig().seed = 3


@pytest.mark.parametrize(
    ("head", "hidden"),
    [
        ("linear", ()),
        ("mlp:512", (512,)),
        ("mlp:64,32", (64, 32)),
        ("mlp: 8", (8,)),
        ("knn", ()),
        ("lda", ()),
    ],
)
def test_heads(head, hidden):
    options = FinetuneConfig(head=head)
    assert options.hidden_sizes == hidden
    assert options.kind == head.partition(":")[0]
    assert options.is_single_layer == (head in {"linear", "lda"})


@pytest.mark.parametrize(
    "head", ["mlp", "mlp:", "mlp:0", "mlp:-5", "mlp:a", "svm", "linear:3", "mlp:99999", "knn:5"]
)
def test_what_is_no_head_is_refused(head):
    with pytest.raises(UsageError, match="not a head"):
        FinetuneConfig(head=head)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"head": "ridge", "label_smoothing": 0.1}, ["--label-smoothing", "--head ridge"]),
        ({"head": "knn", "l2": "0.1"}, ["--l2", "--head knn"]),
        ({"head": "ncm", "l2": "0.1"}, ["--l2", "--head ncm"]),
        ({"head": "knn", "scaling": "plain"}, ["--scaling", "--head knn"]),
        ({"head": "knn", "scenario": "full"}, ["--head knn", "not a layer"]),
        ({"head": "lda", "scenario": "scratch"}, ["--head lda", "no probe"]),
        ({"head": "ncm", "freeze": "3", "head_init": "random"}, ["--head ncm", "no probe"]),
    ],
)
def test_what_a_closed_form_cannot_follow_is_refused(options, names):
    with pytest.raises(UsageError) as caught:
        FinetuneConfig(**options)
    assert all(name in str(caught.value) for name in names)


def test_what_a_closed_form_can_follow_is_taken():
    FinetuneConfig(head="ridge", l2="0.1,1", scaling="plain", class_weights="balanced")
    FinetuneConfig(head="knn", class_weights="balanced")
    FinetuneConfig(head="ridge", freeze="3", label_smoothing=0.1)


@pytest.mark.parametrize("options", [{"l2": "x"}, {"lr": "0"}, {"dropout": "1"}, {"l2": "-1"}])
def test_grids_are_checked_with_the_configuration(options):
    with pytest.raises(UsageError):
        FinetuneConfig(**options)


@pytest.mark.parametrize("output", ["features.pt", "features", "a.json"])
def test_an_unknown_export_format_is_refused(output):
    with pytest.raises(UsageError, match="format"):
        ExtractConfig(output=output)


def test_options_survive_a_yaml_file(tmp_path):
    before = FinetuneConfig(
        data="photos", val_fraction=0.3, refit=True, freeze="all", limit_per_class=7, l2="0.1,1", seed=4
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_options(before)))
    assert FinetuneConfig(**read_config_file(path, KNOWN)) == before
    assert from_options(DataOptions, to_options(before)).val_fraction == 0.3


def test_names_in_files_take_dashes_or_underscores_and_null_is_unset(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("val-fraction: 0.3\nsplit_seed: 2\nfreeze: null\n")
    assert read_config_file(path, KNOWN) == {"val_fraction": 0.3, "split_seed": 2}
    path.write_text("")
    assert read_config_file(path, KNOWN) == {}


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("val-fractoin: 0.3\n")
    with pytest.raises(UsageError, match="val-fractoin") as caught:
        read_config_file(path, KNOWN)
    assert "val-fraction" in caught.value.hint
    path.write_text("qqqqqq: 1\n")
    with pytest.raises(UsageError) as caught:
        read_config_file(path, KNOWN)
    assert "--help" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just words", "a: [1", "a: !!python/object/apply:os.getcwd []"]
)
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"config\.yaml"):
        read_config_file(path, KNOWN)


def test_a_missing_or_binary_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="none"):
        read_config_file(tmp_path / "none.yaml", KNOWN)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="binary"):
        read_config_file(tmp_path / "binary.yaml", KNOWN)


def test_long_names_and_field_names_are_one_to_one():
    for kind in CONFIGS:
        names = [long_name(field.name) for field in dataclasses.fields(kind)]
        assert len(set(names)) == len(names)
        assert not any("_" in name for name in names)


@pytest.mark.parametrize(
    "option",
    [
        "freeze",
        "device",
        "image_size",
        "head",
        "l2",
        "dropout",
        "lr",
        "cache_max_size",
        "scaling",
        "backbone",
    ],
)
@pytest.mark.parametrize("value", ["{}", "cuda:{}", "{}x{}", "mlp:{}", "{}GB", "0.1,{}", "mlp:{},{}"])
def test_a_number_of_any_length_is_refused_or_taken(option, value):
    """int() refuses more than 4,300 digits in its own words."""
    with contextlib.suppress(UsageError):
        FinetuneConfig(**{option: value.replace("{}", "9" * 5_000)})
