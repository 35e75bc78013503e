"""What a statement says of a private file that serves as public."""

from __future__ import annotations

import pytest

from fedlora.common.config.load import parse_config
from fedlora.server.defaults.decide import decided
from fedlora.server.defaults.public_facts import PublicFacts
from fedlora.simulations.chosen import differing, rounded, taken_as_public

FACTS = PublicFacts(1_000, 2)
FILES = 'train = "a.csv"\ntest = "b.csv"\nvalidation = "c.csv"\n'


def said(data: str, mode: str = "record", chosen: tuple[str, ...] = ()) -> str:
    config = parse_config(f'[data]\n{data}[privacy]\nmode = "{mode}"')
    return " ".join(taken_as_public(decided(config, FACTS), chosen))


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (FILES, ""),
        (FILES.replace('"c.csv"', "0.06"), "the validation part."),
        (FILES.replace('"b.csv"', "0.1"), "the test part and label set."),
        (
            FILES.replace('"b.csv"', '0.1\nlabels = ["a", "b"]').replace('"c.csv"', "0.1"),
            "the test part and validation part.",
        ),
    ],
)
def test_each_part_that_a_private_file_gives_is_named(data: str, parts: str) -> None:
    found = said(data)
    assert parts in found and bool(found) is bool(parts)
    assert not said(data, mode="none")


def test_the_number_of_units_is_named_where_rules_reckoned_with_it() -> None:
    assert "about 1000 units" in said(FILES, chosen=("federation.units", "training.expected_units"))
    assert not said(FILES, chosen=("federation.units", "privacy.clip"))


def test_a_run_goes_on_with_what_was_chosen_when_it_began() -> None:
    run = decided(parse_config(""), FACTS)
    assert not differing(parse_config(""), run)
    assert not differing(parse_config("[federation]\nrounds = 90"), run)
    assert differing(parse_config("[federation]\nrounds = 91"), run)
    assert differing(parse_config("seed = 8"), run)


@pytest.mark.parametrize(
    ("units", "shown"), [(1, 1), (99, 99), (104, 100), (9_951, 10_000), (67_349, 67_000)]
)
def test_a_number_of_units_is_public_to_two_digits(units: int, shown: int) -> None:
    assert rounded(units) == shown
