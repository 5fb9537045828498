"""The vocabulary of sizes: what a user may type, and what it means in bits."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankine.budget import Budget, format_bytes, parse_size
from rankine.errors import BudgetError, UserError


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"keep": 0.7}, Budget(keep=0.7)),
        ({"keep": "0.7"}, Budget(keep=0.7)),
        ({"keep": 1}, Budget(keep=1.0)),
        ({"bits": "3.5"}, Budget(bits=3.5)),
        ({"size": "4GB"}, Budget(size=4_000_000_000)),
        ({"size": 4096}, Budget(size=4096)),
        ({"paper_ratio": 0.2}, Budget(keep=0.8)),
        ({"paper_ratio": "0.3"}, Budget(keep=0.7)),
        ({"paper_ratio": 0}, Budget(keep=1.0)),
    ],
)
def test_what_users_type(typed, expected):
    assert Budget.parse(**typed) == expected


def test_a_paper_ratio_is_converted_and_says_so():
    assert (
        Budget.parse(paper_ratio=0.2).note == "paper ratio 0.2 (fraction removed) read as keep 0.8"
    )
    assert Budget.parse(keep=0.8).note == ""


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ({}, "none"),
        ({"keep": 0.7, "bits": 3}, "keep=0.7 and bits=3"),
        ({"keep": 0}, "found 0"),
        ({"keep": 1.5}, "found 1.5"),
        ({"keep": -0.1}, "found -0.1"),
        ({"keep": math.nan}, "found 'nan'"),
        ({"keep": math.inf}, "found 'inf'"),
        ({"keep": "abc"}, "found 'abc'"),
        ({"keep": True}, "found 'True'"),
        ({"keep": [0.7]}, "found '[0.7]'"),
        ({"bits": 0}, "found 0"),
        ({"bits": 64}, "found 64"),
        ({"size": 0}, "found 0"),
        ({"size": "-4GB"}, "found '-4GB'"),
        ({"size": "4XB"}, "found '4XB'"),
        ({"size": "GB"}, "found 'GB'"),
        ({"size": ""}, "found ''"),
        ({"size": "0.1B"}, "found 0.1B"),
        ({"size": math.nan}, "found 'nan'"),
        ({"paper_ratio": 1}, "found 1"),
        ({"paper_ratio": -0.2}, "found -0.2"),
    ],
)
def test_nonsense_is_refused_with_what_was_found(typed, found):
    with pytest.raises(UserError) as error:
        Budget.parse(**typed)
    message = str(error.value)
    assert found in message
    assert message.count(". ") <= 1  # one sentence, and what to do
    assert "\n" not in message


def test_the_constructor_checks_too():
    for fields in ({}, {"keep": 2.0}, {"keep": 0.5, "size": 4}, {"size": -1}, {"bits": math.nan}):
        with pytest.raises(UserError):
            Budget(**fields)


def test_total_bits():
    assert Budget(keep=0.7).total_bits(1000, fixed_bytes=10**9) == 11_200
    assert Budget(bits=3.3).total_bits(1000, fixed_bytes=10**9) == 3300
    assert Budget(size=1000).total_bits(1000, fixed_bytes=200) == 6400
    assert Budget(size=1000).total_bits(1000) == 8000


def test_a_size_below_what_is_fixed_cannot_be_met():
    with pytest.raises(BudgetError, match=r"1.00 kB, but what is not compressed takes 2.00 kB"):
        Budget(size=1000).total_bits(1000, fixed_bytes=2000)


@given(st.integers(1, 99), st.integers(1, 10**12))
def test_decimals_mean_what_they_say(percent, weights):
    assert Budget(keep=percent / 100).total_bits(weights) == percent * 16 * weights // 100


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1.5GB", 1_500_000_000),
        ("700MiB", 700 * 2**20),
        ("1 KiB", 1024),
        ("1kb", 1000),
        ("2TB", 2 * 10**12),
        (".5kB", 500),
        ("4.GB", 4 * 10**9),
        (" 12 ", 12),
        ("12B", 12),
        (1e9, 10**9),
    ],
)
def test_parse_size(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_500_000_000, "1.50 GB"),
        (9_999_000, "10.0 MB"),
        (999_600, "1.00 MB"),
        (123_456_789, "123 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


@given(st.integers(1, 10**15))
def test_formatting_keeps_three_digits(count):
    assert parse_size(format_bytes(count)) == pytest.approx(count, rel=0.0051)
