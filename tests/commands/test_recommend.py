"""The 2x2 rule."""

import itertools

import pytest

from tlcli.advice.literature import scratch_warning
from tlcli.commands.recommend import recommend
from tlcli.config.commands import FinetuneConfig, RecommendConfig
from tlcli.errors import UsageError


@pytest.mark.parametrize(
    ("size", "similarity", "scenario"),
    [
        ("small", "high", "feature-extraction"),
        ("small", "low", "freeze"),
        ("large", "low", "scratch"),
        ("large", "high", "full"),
    ],
)
def test_the_rule_is_the_table_of_the_four_scenarios(size, similarity, scenario) -> None:
    found = recommend(RecommendConfig(size=size, similarity=similarity))
    assert (found.scenario, found.size, found.similarity) == (scenario, size, similarity)
    assert found.built


@pytest.mark.parametrize(("size", "similarity"), list(itertools.product(["small", "large"], ["low", "high"])))
def test_every_answer_has_a_reason_caveats_with_sources_and_a_command_that_works_now(
    size, similarity
) -> None:
    found = recommend(RecommendConfig(size=size, similarity=similarity, backbone="resnet18"))
    assert found.reason.endswith(".")
    assert any("et al." in caveat or "BYOL" in caveat for caveat in found.caveats)
    assert found.command == f"tlcli finetune DATA --backbone resnet18 --scenario {found.scenario}"
    assert FinetuneConfig(scenario=found.scenario).resolved_scenario() == found.scenario


def test_from_scratch_figures_come_with_both_schedules() -> None:
    for size, similarity in itertools.product(["small", "large"], ["low", "high"]):
        for caveat in recommend(RecommendConfig(size=size, similarity=similarity)).caveats:
            if "VTAB" in caveat:
                assert "short schedule" in caveat
                assert "long, tuned schedule" in caveat


def test_the_warning_before_scratch_has_both_schedules_and_names_the_alternative() -> None:
    warning = scratch_warning()
    for words in ("VTAB's short schedule", "long, tuned schedule", "--scenario full"):
        assert words in warning


def test_the_printed_command_is_one_the_command_line_takes(run_cli, tmp_path) -> None:
    printed = run_cli("recommend", "--size", "small", "--similarity", "low", "--backbone", "bundled")
    command = printed.stdout.splitlines()[-1].split()
    assert command[:2] == ["tlcli", "finetune"]
    nowhere = tmp_path / "nowhere"
    refused = run_cli(*(nowhere if word == "DATA" else word for word in command[1:]))
    assert refused.code == 3  # the data is missing; the options are right
    assert "nowhere" in refused.stderr


def test_scratch_names_full_as_the_alternative() -> None:
    found = recommend(RecommendConfig(size="large", similarity="low"))
    assert any("rarely wins" in caveat for caveat in found.caveats)
    assert any("`full`" in caveat for caveat in found.caveats)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({}, "--size and --similarity"),
        ({"size": "small"}, "--similarity"),
        ({"similarity": "low"}, "--size"),
    ],
)
def test_a_missing_answer_is_a_usage_error_that_says_what_to_type(options, missing) -> None:
    with pytest.raises(UsageError, match=f"^{missing} missing") as caught:
        recommend(RecommendConfig(**options))
    assert "tlcli recommend --size small|large --similarity low|high" in caught.value.hint


def test_an_odd_backbone_name_is_quoted_in_the_command() -> None:
    found = recommend(RecommendConfig(size="small", similarity="high", backbone="local-dir:my models/a"))
    assert "--backbone 'local-dir:my models/a'" in found.command
