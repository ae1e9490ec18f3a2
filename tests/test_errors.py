"""The exit codes of errors are fixed, and every error carries what a user needs."""

import pytest

from tlcli import errors

CODES = {
    "UsageError": 2, "DataError": 3, "BackboneError": 4, "ResourceError": 5, "DeviceError": 5,
    "StorageError": 5,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes_are_fixed(name, code):
    error = getattr(errors, name)("what happened", hint="what to do")
    assert isinstance(error, errors.TlcliError)
    assert (error.exit_code, error.message, error.hint) == (code, "what happened", "what to do")
    assert str(error) == "what happened"


def test_every_error_has_a_code_of_the_contract():
    def below(kind):
        return {kind, *(found for child in kind.__subclasses__() for found in below(child))}

    for kind in below(errors.TlcliError) - {errors.TlcliError}:
        assert kind.exit_code in {2, 3, 4, 5, 6, 130} or kind is errors.Interrupted, kind


def test_a_failed_check_carries_its_document():
    error = errors.CheckFailed("too low", document={"a": 1})
    assert error.exit_code == 6
    assert error.document == {"a": 1}


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(2, 130, "SIGINT"), (15, 143, "SIGTERM"), (1, 129, "SIGHUP"), (99, 227, "99")],
)
def test_an_interruption_has_the_shells_code(number, code, name):
    error = errors.Interrupted(number)
    assert error.exit_code == code
    assert name in error.message
