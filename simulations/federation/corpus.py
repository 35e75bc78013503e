"""A synthetic corpus for the quickstart: messages to service desks of five made-up institutions.

It is made hard on purpose, so that a good model gets about nine of ten right and none gets all:
classes share their words, a message mentions other things in passing, some could be meant either
way, and a share of the training labels is wrong. Institutions write in their own manner and see
different matters. A seed fixes every byte, on every Python: only `random.Random.random`, whose
stream is guaranteed, is drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

Option = TypeVar("Option")

TRAIN, TEST = 4_000, 1_000
LABEL_NOISE = 0.06  # of the training records; the test labels are as the sender meant them
EITHER = 0.19  # share of messages that the senders of two classes would both write
ASIDE = 0.5  # share of messages with a remark that has the words of another class

# A class is what is wrong with what: problems are written around {thing}.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "access": (
        ("the staff portal", "the records system", "my mailbox", "the shared drive", "the rota"),
        (
            "my password for {thing} is refused",
            "I am locked out of {thing} after three attempts",
            "{thing} says that I have no permission",
            "please give {colleague} the rights to {thing}",
            "the code for {thing} never arrives on my phone",
            "my account for {thing} has expired",
            "I was moved to {place} and no longer see {thing}",
        ),
    ),
    "hardware": (
        ("my laptop", "the label printer", "the scanner", "the second monitor", "the card reader"),
        (
            "{thing} does not switch on any more",
            "{thing} makes a burning smell",
            "{thing} at {place} is broken again",
            "the cable of {thing} is torn",
            "{thing} shows stripes and then goes dark",
            "{thing} was dropped and the case is cracked",
            "{thing} keeps showing the same error, even after a restart",
        ),
    ),
    "network": (
        ("the wireless", "the VPN", "the connection at {place}", "the internet", "the telephone"),
        (
            "{thing} drops every few minutes",
            "{thing} has been very slow since {day}",
            "nobody at {place} can reach anything, {thing} is down",
            "{thing} does not find a server",
            "calls over {thing} break up",
            "{thing} times out before a page has loaded",
            "my laptop sees {thing} but gets no address",
        ),
    ),
    "software": (
        ("the records system", "the spreadsheet", "the mail program", "the rota", "the browser"),
        (
            "{thing} crashes when I save",
            "since the update {thing} shows an empty window",
            "please install the new version of {thing}",
            "{thing} prints the wrong date",
            "a button is missing in {thing}",
            "{thing} freezes as soon as I search",
            "{thing} does not open the file from {colleague}",
        ),
    ),
    "orders": (
        ("a laptop", "a second monitor", "a headset", "two licences", "a chair", "toner"),
        (
            "we need {thing} for {colleague} by {day}",
            "when will {thing} be delivered to {place}",
            "please order {thing} for {place}",
            "{thing} was approved on {day} and has not come",
            "the invoice for {thing} has the wrong cost centre",
            "can I have a quotation for {thing}",
            "please cancel {thing} that I asked for on {day}",
        ),
    ),
    "data": (
        ("the spreadsheet", "the folder of {place}", "the record of {colleague}", "the statistics"),
        (
            "{thing} was deleted on {day}, can it be restored",
            "the figures in {thing} do not add up",
            "{thing} still shows the old address",
            "there are two entries for the same person in {thing}",
            "please send me a copy of {thing} as of {day}",
            "half of {thing} is gone since {day}",
            "{thing} was changed and nobody knows by whom",
        ),
    ),
}

# What the senders of two classes would both write: no reader can know which of them is meant.
EITHER_MESSAGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("access", "network"): (
        "I can't get to the shared drive from {place}",
        "remote desktop does not connect",
    ),
    ("access", "software"): (
        "the records system closes when I log in",
        "the rota does not let me in since {day}",
    ),
    ("hardware", "network"): (
        "the label printer at {place} can't be reached",
        "the telephone at {place} is dead",
    ),
    ("hardware", "orders"): (
        "the headset of {colleague} is worn out",
        "I need another laptop, mine is too slow",
    ),
    ("software", "data"): (
        "the spreadsheet shows nothing since {day}",
        "a column is missing in the statistics",
    ),
    ("orders", "software"): (
        "{colleague} has no forms editor yet",
        "we need the newer records system at {place}",
    ),
    ("access", "data"): (
        "I can't find the folder of {place} any more",
        "the mailing list is empty for me",
    ),
    ("hardware", "software"): (
        "the scanner only makes blank pages",
        "the laptop of {colleague} hangs at the start",
    ),
    ("network", "data"): (
        "the folder of {place} does not open since {day}",
        "the statistics never finish loading",
    ),
    ("orders", "data"): (
        "the list of our laptops is wrong",
        "{colleague} is still listed at {place}",
    ),
}

ASIDES = (
    "{colleague} can log in without trouble",
    "I have changed my password already",
    "the printer next to it works",
    "I have restarted the laptop twice",
    "the wireless was slow too",
    "it began after the update on {day}",
    "I have installed the update",
    "we ordered a new one on {day}",
    "the invoice is with {colleague}",
    "the spreadsheet with the numbers is attached",
    "nothing was deleted as far as I know",
    "the cable is in and the light is on",
    "other pages open normally",
    "the licence is valid until {day}",
)

COLLEAGUES = (
    "Ms Adler",
    "Mr Okoye",
    "the new trainee",
    "my deputy",
    "Dr Lindqvist",
    "a temp",
    "our team lead",
)
DAYS = ("Monday", "Tuesday", "Thursday", "Friday", "the 3rd", "the 9th", "the 14th", "the 28th")


@dataclass(frozen=True)
class Institution:
    """How one institution's staff write, and how often about what (in CLASSES' order)."""

    name: str
    size: float
    mix: tuple[float, ...]
    places: tuple[str, ...]
    openings: tuple[str, ...]
    endings: tuple[str, ...]
    lower_case: float = 0.0  # share of messages without capitals
    typos: float = 0.0  # chance that a longer word has two letters swapped


INSTITUTIONS = (
    Institution(
        name="hospital",
        size=1.5,
        mix=(4, 3, 2, 2, 1, 2),
        places=("ward 4", "radiology", "the night desk", "theatre 2", "admissions"),
        openings=("Hello,", "urgent:", "Colleagues,", ""),
        endings=("Thanks", "Please call the ward.", ""),
        lower_case=0.3,
        typos=0.02,
    ),
    Institution(
        name="bank",
        size=1.2,
        mix=(3, 1, 2, 4, 1, 2),
        places=("the main branch", "the counter", "loans", "the dealing room"),
        openings=("Dear service desk,", "Good morning,", "For your attention:"),
        endings=("Kind regards", "With thanks in advance", ""),
    ),
    Institution(
        name="university",
        size=1.4,
        mix=(2, 2, 5, 2, 1, 1),
        places=("the library", "lecture hall B", "the chemistry lab", "room 2.14"),
        openings=("hi,", "hey", "Hi all,", ""),
        endings=("thx", "cheers", "pls help", ""),
        lower_case=0.6,
        typos=0.05,
    ),
    Institution(
        name="city council",
        size=0.7,
        mix=(1, 1, 1, 2, 5, 3),
        places=("the registry", "the town hall", "parking permits", "the archive"),
        openings=("To whom it may concern:", "Good day,", "Re. our telephone call:"),
        endings=("Yours faithfully", "Please confirm.", ""),
    ),
    Institution(
        name="insurer",
        size=1.0,
        mix=(2, 1, 1, 3, 1, 5),
        places=("claims", "the call centre", "underwriting", "the Leeds office"),
        openings=("Hello team,", "Ticket:", ""),
        endings=("Many thanks", "Regards", "This blocks us.", ""),
        lower_case=0.2,
        typos=0.03,
    ),
)


@dataclass(frozen=True)
class Corpus:
    """Records with the string columns text, label and institution."""

    train: list[dict[str, str]]
    test: list[dict[str, str]]


def generate(seed: int) -> Corpus:
    """The corpus of a seed: TRAIN records with label noise, TEST records without."""
    source = Random(seed)
    return Corpus(_records(source, TRAIN, LABEL_NOISE), _records(source, TEST, 0.0))


def write(corpus: Corpus, folder: Path) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl under `folder`."""
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    write_records(train, corpus.train)
    write_records(test, corpus.test)
    return train, test


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """One JSON line a record, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _records(source: Random, count: int, label_noise: float) -> list[dict[str, str]]:
    return [_record(source, label_noise) for _ in range(count)]


def _record(source: Random, label_noise: float) -> dict[str, str]:
    institution = INSTITUTIONS[_weighted(source, [each.size for each in INSTITUTIONS])]
    label = list(CLASSES)[_weighted(source, institution.mix)]
    text = _message(source, institution, label)
    if source.random() < label_noise:
        label = _pick(source, [other for other in CLASSES if other != label])
    return {"text": text, "label": label, "institution": institution.name}


def _message(source: Random, institution: Institution, label: str) -> str:
    body = _either(source, label) if source.random() < EITHER else _problem(source, label)
    if source.random() < ASIDE:
        aside = _pick(source, ASIDES)
        body = _pick(
            source, (f"{body}; {aside}", f"{aside}, but {body}", f"{body}, although {aside}")
        )
    body = _fill(source, body, institution)
    opening, ending = _pick(source, institution.openings), _pick(source, institution.endings)
    if not opening:
        body = body[0].upper() + body[1:]
    text = " ".join(part for part in (opening, body + ".", ending) if part)
    if source.random() < institution.lower_case:
        text = text.lower()
    return " ".join(_typo(source, word, institution.typos) for word in text.split(" "))


def _problem(source: Random, label: str) -> str:
    things, problems = CLASSES[label]
    return _pick(source, problems).replace("{thing}", _pick(source, things))


def _either(source: Random, label: str) -> str:
    pairs = [pair for pair in EITHER_MESSAGES if label in pair]
    return _pick(source, EITHER_MESSAGES[_pick(source, pairs)])


def _fill(source: Random, text: str, institution: Institution) -> str:
    for name, options in (
        ("{colleague}", COLLEAGUES),
        ("{day}", DAYS),
        ("{place}", institution.places),
    ):
        while name in text:
            text = text.replace(name, _pick(source, options), 1)
    return text


def _typo(source: Random, word: str, chance: float) -> str:
    if len(word) < 5 or source.random() >= chance:
        return word
    at = 1 + int(source.random() * (len(word) - 3))
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _pick(source: Random, options: Sequence[Option]) -> Option:
    return options[int(source.random() * len(options))]


def _weighted(source: Random, weights: Sequence[float]) -> int:
    """An index, drawn in proportion to its weight."""
    point = source.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return len(weights) - 1
