"""`tlcli backbones list` and `show`, as a user types them."""

import json

import pytest
from safetensors.torch import save_file


@pytest.fixture
def folder(tmp_path):
    """A tiny backbone in timm's format."""
    import timm

    model = timm.create_model("resnet10t", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "pretrained_cfg": {"license": "mit", "input_size": [3, 64, 64]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def document(result):
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def test_list_filters_sorts_and_limits(run_cli):
    found = document(run_cli("backbones", "list", "resnet18", "--json"))
    assert found["schema"] == "tlcli.backbones.list/1"
    names = [row["name"] for row in found["backbones"]]
    assert {"resnet18.a1_in1k", "torchvision/resnet18"} <= set(names)
    assert all("resnet18" in name for name in names)
    assert found["total"] == len(names)

    small = document(
        run_cli("backbones", "list", "--max-params", "2", "--sort", "params", "--limit", "5", "--json")
    )
    sizes = [row["num_parameters"] for row in small["backbones"]]
    assert len(sizes) == 5 < small["total"]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= 2e6

    large = document(run_cli("backbones", "list", "vit*", "--image-size", "384", "--json"))
    assert {tuple(row["image_size"]) for row in large["backbones"]} == {(384, 384)}
    assert all(row["name"].startswith("vit") for row in large["backbones"])


def test_list_begins_with_the_bundled_one_and_says_what_it_left_out(run_cli):
    result = run_cli("backbones", "list")
    assert result.code == 0
    assert result.stdout.splitlines()[1].startswith("bundled")
    assert "50 of" in result.stderr
    assert "--limit 0" in result.stderr


def test_the_table_of_parameters_is_complete_and_right():
    import timm
    import torch

    from tlcli.backbones import catalog, torchvision_zoo

    counts = catalog.parameter_counts()
    assert {f"torchvision/{name}" for name in torchvision_zoo.names()} <= counts.keys()
    known = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
    assert len(known & counts.keys()) > 0.9 * len(known)
    with torch.device("meta"):
        model = timm.create_model("resnet10t", num_classes=0)
    assert counts["resnet10t"] == sum(parameter.numel() for parameter in model.parameters())


def test_cached_names_what_is_on_this_machine(run_cli):
    from tlcli.backbones import hub

    snapshot = hub.hub_cache() / "models--timm--resnet18.a1_in1k" / "snapshots" / ("2" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x")
    found = document(run_cli("backbones", "list", "--cached", "--json"))
    assert [row["name"] for row in found["backbones"]] == ["bundled", "resnet18.a1_in1k"]


def test_list_and_show_count_the_same_parameters(run_cli):
    listed = document(run_cli("backbones", "list", "bundled", "--json"))["backbones"][0]
    shown = document(run_cli("backbones", "show", "bundled", "--json"))
    assert listed["num_parameters"] == shown["num_parameters"]


def test_classic_networks_are_listed_as_having_no_weights(run_cli):
    found = document(run_cli("backbones", "list", "classic/*", "--json"))["backbones"]
    assert [row["name"] for row in found] == [
        "classic/lenet5", "classic/lenet5-1998", "classic/mlp", "classic/small-cnn", "classic/xception-small",
    ]  # fmt: skip
    assert all(row["num_parameters"] and not row["pretrained"] and not row["cached"] for row in found)
    assert "no weights" in run_cli("backbones", "list", "classic").stdout
    assert document(run_cli("backbones", "list", "resnet18", "--json"))["backbones"][0]["pretrained"]


def test_show_of_a_classic_network_needs_no_weights_and_takes_its_options(run_cli):
    shown = document(
        run_cli("backbones", "show", "classic/small-cnn", "--model-kwargs", "depth=2,norm=every", "--json")
    )
    assert (shown["source"], shown["pretrained"]) == ("classic", False)
    assert [unit["name"] for unit in shown["units"]] == ["conv1", "conv2"]
    assert shown["arguments"]["norm"] == "every"
    text = run_cli("backbones", "show", "classic/lenet5", "--model-kwargs", "norm=first")
    assert "norm first" in text.stdout
    assert "--model-kwargs norm=first --scenario scratch" in text.stderr


def test_nothing_found_is_an_empty_list(run_cli):
    result = run_cli("backbones", "list", "no-such-thing", "--json")
    assert document(result)["backbones"] == []
    assert "PATTERN" in result.stderr


def test_show_lists_units_whose_shares_sum_to_one(run_cli, folder):
    shown = document(run_cli("backbones", "show", f"local-dir:{folder}", "--json"))
    parts = shown["units"]
    assert [unit["index"] for unit in parts] == list(range(1, len(parts) + 1))
    assert sum(unit["flops_share"] for unit in parts) == pytest.approx(1)
    assert sum(unit["num_parameters"] for unit in parts) == shown["num_parameters"]
    assert parts[-1]["output_shape"] == [shown["num_features"]] == [512]
    assert parts[-1]["row_bytes"] == 4 * 512
    assert parts[1]["row_shape"] == parts[1]["output_shape"] == [64, 16, 16]
    assert parts[1]["row_bytes"] == 2 * 64 * 16 * 16
    assert (shown["license"], shown["image_size"], shown["pretrained"]) == ("mit", [64, 64], True)

    text = run_cli("backbones", "show", f"local-dir:{folder}")
    assert "layer1" in text.stdout
    assert "tlcli extract" in text.stderr


def test_show_needs_no_weights(run_cli):
    shown = document(
        run_cli("backbones", "show", "mobilenetv3_small_050", "--random-init", "--image-size", "64", "--json")
    )
    assert shown["pretrained"] is False
    assert shown["image_size"] == [64, 64]


def test_show_says_where_caching_saves_a_part_of_the_frozen_work(run_cli):
    arguments = ("backbones", "show", "hrnet_w18_small", "--random-init", "--image-size", "64")
    shares = [unit["saved_share"] for unit in document(run_cli(*arguments, "--json"))["units"]]
    assert shares[0] == shares[-1] == 1
    assert shares[1:-1] == sorted(shares[1:-1], reverse=True)
    assert 0 < shares[-2] < 0.95
    result = run_cli(*arguments)
    assert f"{shares[-2]:.0%}" in result.stdout
    assert "computed again in each epoch" in result.stderr.replace("\n", " ")


def test_show_says_nothing_of_it_where_all_is_saved(run_cli):
    result = run_cli("backbones", "show", "test_resnet", "--random-init")
    assert "100%" in result.stdout
    assert "again" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["resnet81"], 2, "resnet18"),
        ([], 2, "bundled"),
        (["resnet18"], 4, "--random-init"),
        (["local-dir:/nowhere"], 4, "no such folder"),
        (["mobilenetv3_small_050", "--weights", "absent.pth"], 4, "absent.pth"),
        (["classic/lenet5", "--model-kwargs", "nrm=every"], 2, "Did you mean norm"),
        (["classic/lenet5", "--model-kwargs", "norm=all"], 2, "none, first, every"),
        (["classic/lenet5", "--image-size", "12"], 4, "--image-size 16"),
        (["torchvision/resnet18", "--model-kwargs", "a=1"], 2, "timm"),
    ],
)
def test_errors_leave_stdout_empty(run_cli, arguments, code, words):
    result = run_cli("backbones", "show", *arguments, "--json")
    assert (result.code, result.stdout) == (code, "")
    assert words in result.stderr.replace("\n", " ")
