"""Values as words, and words as values with the option's name in the message."""

import pytest

from tlcli.errors import UsageError
from tlcli.wording import (
    did_you_mean,
    images_text,
    near_misses,
    parse_age,
    parse_device,
    parse_numbers,
    parse_size,
    size_text,
)

DAY = 86400.0


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1536, "1.5 kB"), (2_500_000, "2.5 MB"), (7e9, "7.0 GB"), (3e13, "30.0 TB")],
)
def test_size_text(num_bytes, text):
    assert size_text(num_bytes) == text


def test_images_are_counted_with_their_groups():
    assert images_text(1, None) == "1 image"
    assert images_text(1200, 40) == "1,200 images in 40 groups"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9), ("500mb", 5 * 10**8), ("1.5GiB", 3 * 2**29), ("0B", 0), ("7 TB", 7 * 10**12),
        ("10k", 10**4), ("3KiB", 3072), ("2G", 2 * 10**9),
        ("0.5 tib", 2**39), ("1b", 1), ("2MiB", 2**21),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text, "--cache-max-size") == size


@pytest.mark.parametrize("text", ["", "20", "GB", "-1GB", "1iB", "1XB", "1 GB GB", "1e3MB", "inf"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match=r"--cache-max-size .* is not a size"):
        parse_size(text, "--cache-max-size")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30d", 30 * DAY),
        ("12h", 43200),
        ("45m", 2700),
        ("0s", 0),
        ("1.5D", 1.5 * DAY),
        ("2w", 14 * DAY),
    ],
)
def test_ages(text, seconds):
    assert parse_age(text, "--older-than") == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1e3d", "nan", "1 d", "99999999999d", "١d"])
def test_ages_that_are_none(text):
    with pytest.raises(UsageError, match=r"--older-than .* is not an age"):
        parse_age(text, "--older-than")


def test_a_grid_keeps_its_order():
    assert parse_numbers("3,0.1, 2e-3", "--lr", minimum=0) == (3.0, 0.1, 2e-3)
    assert parse_numbers("0.5", "--lr", minimum=0) == (0.5,)


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1;2", "nan", "0.99"])
def test_a_grid_with_anything_else_is_refused(text):
    with pytest.raises(UsageError, match="--dropout") as caught:
        parse_numbers(text, "--dropout", minimum=0.0, maximum=0.95)
    assert "commas" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("auto", ("auto", 0)),
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:3", ("cuda", 3)),
        ("mps", ("mps", 0)),
    ],
)
def test_devices(text, device):
    assert parse_device(text) == device


@pytest.mark.parametrize(
    "text", ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps:1", "CUDA", "cuda:1:2"]
)
def test_devices_that_are_none(text):
    with pytest.raises(UsageError, match=r"--device .* is not a device"):
        parse_device(text)


def test_near_misses_ignore_capitals_and_keep_the_spelling():
    known = ["AdamW", "sgd", "RMSprop"]
    assert near_misses("adamv", known) == ["AdamW"]
    assert near_misses("SGD", known, most=1) == ["sgd"]
    assert near_misses("zzz", known) == []
    assert did_you_mean(["AdamW", "sgd"]) == "Did you mean AdamW, sgd? "
    assert did_you_mean([]) == ""
