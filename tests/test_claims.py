"""docs/claims.md names a test for each promise, each of which exists; figures are the code's."""

from __future__ import annotations

import ast
import math
import re
from functools import cache
from pathlib import Path

from fedlora.client.node.policy import Limits, TrainerPolicy
from fedlora.client.node.waiting_runs import MOST
from fedlora.client.service.loaded_run import MOST_UNNOISED
from fedlora.common.data.data_file import TELLING
from fedlora.common.privacy.accountant import ACCURACY, MOST_POINTS
from fedlora.common.privacy.unit_release import CAPACITY, COARSEST, MOST_UNITS, ROOM
from fedlora.common.protocol.consent import LONGEST_OFFER

ROOT = Path(__file__).resolve().parents[1]
CLAIMS = ROOT / "docs" / "claims.md"
TRIED = "## What a review tried"
LIMITS = ("What can't be noticed.", "Assumed.")  # and no promises
PROOF = "Both sides are equal"


@cache
def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def paragraphs() -> list[str]:
    """Of README's first screen and docs/privacy.md, but headings, code and what leads to a list."""
    screen = (ROOT / "README.md").read_text().split("## A run")[0]
    text = screen + (ROOT / "docs" / "privacy.md").read_text()
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = (each.strip("\n") for each in re.split(r"\n\n|\n(?=\* )", without_code))
    prose = (each for each in blocks if each and each[0] not in "# " and each[-1] != ":")
    return [each.removeprefix("* ").replace("**", "") for each in prose]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", CLAIMS.read_text())
    assert len(named) > 80
    for file, name in named:
        assert name in names_in(ROOT / file), f"docs/claims.md: {file} has no {name}"


def test_no_promise_is_left_out() -> None:
    rows = [*re.findall(r"^\| (.+?) \|", CLAIMS.read_text(), re.MULTILINE), *LIMITS, PROOF]
    assert len(paragraphs()) > 30
    for paragraph in paragraphs():
        assert any(paragraph.startswith(row) for row in rows), paragraph[:60]


def test_rows_stand_in_the_texts_order() -> None:
    """A row whose paragraph is gone would bear nothing."""
    rows = re.findall(r"^\| (?!where|attack)(.+?) \|", CLAIMS.read_text().split(TRIED)[0], re.M)
    places = [[each.startswith(row) for each in paragraphs()].index(True) for row in rows]
    assert places == sorted(places)


def power(number: float) -> str:
    """A power of two, as the text writes it."""
    exponent = int(math.log2(number))
    assert number == 2.0**exponent
    return "2" + str(exponent).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def test_figures_of_privacy_md_are_the_codes() -> None:
    text = " ".join((ROOT / "docs" / "privacy.md").read_text().split())
    limits, words = Limits(), {4: "four", 7: "seven"}
    for said in (
        f"`[trainer] answer_every` ({TrainerPolicy().answer_every:g} s)",
        f"`[limits] offers` ({limits.offers}) a day",
        f"`[limits] budget_steps` ({limits.budget_steps})",
        f"takes no more than {limits.budget_steps} runs",
        f"at most {words[LONGEST_OFFER // 86_400]} days ahead",
        f"A node keeps the last {words[MOST]} that it consented to",
        f"for the last {words[MOST_UNNOISED]} runs",
        f"files below {TELLING // 1024} KiB",
        f"{1000 * ACCURACY:g} ‰ of a tail bound",
        f"{power(MOST_POINTS)} mesh points",
        f"for n up to {power(MOST_UNITS)}, which is the most units",
        f"{power(ROOM)} L pays for all",
        f"more than {1 + COARSEST:g} L does not start",
        f"({CAPACITY:g} η C: twice",
    ):
        assert said in text, said


def test_no_row_is_without_a_test() -> None:
    for line in CLAIMS.read_text().splitlines():
        if line.startswith("| ") and not re.match(r"\| (where|attack) \|", line):
            assert "tests/" in line, line
