"""`tlcli recommend` on the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parent.parent.parent)


def test_json_is_one_document_with_its_schema(run_cli) -> None:
    result = run_cli("recommend", "--size", "small", "--similarity", "low", "--json")
    document = json.loads(result.stdout)
    assert result.code == 0
    assert document["schema"] == "tlcli.recommend/1"
    assert set(document) == {
        *("schema", "scenario", "reason", "caveats", "command", "built", "size", "similarity", "warnings"),
    }
    assert document["scenario"] == "freeze"
    assert document["built"] is True
    assert isinstance(document["caveats"], list)


def test_the_text_gives_scenario_reason_caveats_and_command(run_cli) -> None:
    result = run_cli("recommend", "--size", "small", "--similarity", "high", "--backbone", "resnet18")
    assert result.code == 0
    assert result.stdout.startswith("feature-extraction")
    assert "Kornblith" in result.stdout
    assert "tlcli finetune DATA --backbone resnet18 --scenario feature-extraction" in result.stdout
    assert "not built" not in result.stdout


@pytest.mark.parametrize(
    ("size", "similarity", "scenario"),
    [("small", "low", "freeze"), ("large", "low", "scratch"), ("large", "high", "full")],
)
def test_every_scenario_comes_with_its_own_command(run_cli, size, similarity, scenario) -> None:
    result = run_cli("recommend", "--size", size, "--similarity", similarity)
    assert result.code == 0
    assert result.stdout.startswith(f"{scenario} ")
    assert result.stdout.rstrip().endswith(f"--scenario {scenario}")
    assert "not built" not in result.stdout


def test_nothing_given_is_a_usage_error_with_an_empty_stdout(run_cli) -> None:
    result = run_cli("recommend")
    assert (result.code, result.stdout) == (2, "")
    assert "--size small|large" in result.stderr


def test_a_word_that_is_no_size_is_a_usage_error(run_cli) -> None:
    result = run_cli("recommend", "--size", "medium", "--similarity", "low")
    assert (result.code, result.stdout) == (2, "")
    assert "medium" in result.stderr


def test_markup_in_a_backbone_name_is_printed_as_it_is(run_cli) -> None:
    result = run_cli("recommend", "--size", "small", "--similarity", "high", "--backbone", "a[bold]b")
    assert "a[bold]b" in result.stdout


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from tlcli.cli.app import main;"
        "main(['recommend', '--size', 'small', '--similarity', 'low']);"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
