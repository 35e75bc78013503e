"""A synthetic corpus for the quickstart: messages to the service desks of five made-up institutions.

Not trivial on purpose: classes share words, messages mention a second matter in passing, some say too little to
be sure, and a share of training labels is wrong. Institutions write differently and see different matters.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TRAIN, TEST = 4_000, 1_000
LABEL_NOISE = 0.06  # of the training records
SECOND_MATTER = 0.35  # share of messages that mention another matter in passing
VAGUE = 0.06  # share of messages that any class could have sent

MATTERS: dict[str, tuple[str, ...]] = {
    "card": (
        "my {new} card has not arrived",
        "the card is declined at the {place}",
        "I can't activate the card you sent",
        "the machine at the {place} kept my card",
        "contactless stopped working on my card",
        "I need the limit of my card raised before {day}",
    ),
    "transfer": (
        "the transfer to my {person} has not gone through",
        "I sent {amount} to the wrong account",
        "a payment from abroad is still pending since {day}",
        "how long does a transfer to another bank take",
        "my standing order for {amount} did not run on {day}",
        "the transfer was returned and I don't see the money",
    ),
    "fees": (
        "I was charged {amount} and do not know what for",
        "why is there a fee on my account this month",
        "you took {amount} twice for the same payment",
        "the exchange rate on my statement is not what you advertise",
        "what do you charge for taking out cash at the {place}",
        "I would like the fee of {amount} back",
    ),
    "loan": (
        "I would like to repay part of my loan early",
        "what rate would I get for a loan of {amount}",
        "my application for a mortgage has been open since {day}",
        "can I move the instalment on my loan to {day}",
        "the instalment that was taken is higher than agreed",
        "my {person} wants to sign the loan with me",
    ),
    "access": (
        "I can't log in since {day}",
        "the app asks for a code that never arrives",
        "I changed my phone and lost access to the app",
        "my password is refused and the account is locked",
        "please change the telephone number on my account",
        "the app closes as soon as I open my account",
    ),
    "fraud": (
        "there is a payment of {amount} on my account that I did not make",
        "someone called and asked for the code from the app",
        "I think my card was copied at the {place}",
        "a message asked me to log in and I gave my password",
        "my {person} got a letter about a loan that nobody applied for",
        "I don't recognise the transfer on {day}",
    ),
}
VAGUE_MESSAGES = (
    "please call me back about my account",
    "this is about the matter of {day}, nothing has happened since",
    "it still does not work, can somebody help",
    "I have a question about {amount} on my statement",
    "my {person} and I both wrote to you and got no answer",
)
FILLERS = {
    "new": ("new", "second", "replacement", "old"),
    "place": ("station", "supermarket", "airport", "petrol station", "branch in town"),
    "person": ("daughter", "landlord", "brother", "mother", "partner"),
    "amount": ("12.50", "40 euros", "250", "about 900", "1,200", "exactly 75.00"),
    "day": ("Monday", "last Friday", "the 3rd", "yesterday", "two weeks ago", "the first of the month"),
}


@dataclass(frozen=True)
class Institution:
    """How one institution's customers write, and how often they write about what (in the order of MATTERS)."""

    name: str
    openings: tuple[str, ...]
    endings: tuple[str, ...]
    mix: tuple[float, ...]
    size: float


INSTITUTIONS = (
    Institution("city bank", ("Hello,", "Good morning,", ""), ("Thank you.", ""), (3, 2, 2, 1, 2, 1), 1.6),
    Institution(
        "savings bank",
        ("Dear Sir or Madam,", "To whom it may concern:"),
        ("Kind regards",),
        (1, 2, 2, 4, 1, 1),
        1.2,
    ),
    Institution("online bank", ("hi", "hey,", ""), ("thx", "pls fix", ""), (2, 2, 1, 0.5, 5, 2), 1.4),
    Institution("credit union", ("Hello all,", ""), ("Thanks so much!", "Cheers"), (1, 1, 2, 5, 1, 0.5), 0.6),
    Institution(
        "merchant bank",
        ("Ref. invoice:", "For accounting:"),
        ("Please confirm.",),
        (0.5, 5, 4, 1, 1, 1.5),
        0.8,
    ),
)


@dataclass(frozen=True)
class Corpus:
    """Records with the columns text, label and institution."""

    train: list[dict[str, str]]
    test: list[dict[str, str]]


def generate(seed: int) -> Corpus:
    """The corpus of a seed; the test part has no wrong labels beyond what its vague messages make."""
    rng = np.random.Generator(np.random.Philox(seed))
    return Corpus(_records(rng, TRAIN, LABEL_NOISE), _records(rng, TEST, 0.0))


def write(corpus: Corpus, folder: Path) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl under `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, records in zip(paths, (corpus.train, corpus.test), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return paths


def _records(rng: np.random.Generator, count: int, label_noise: float) -> list[dict[str, str]]:
    shares = np.array([institution.size for institution in INSTITUTIONS])
    chosen = rng.choice(len(INSTITUTIONS), size=count, p=shares / shares.sum())
    return [_record(rng, INSTITUTIONS[index], label_noise) for index in chosen]


def _record(rng: np.random.Generator, institution: Institution, label_noise: float) -> dict[str, str]:
    labels = list(MATTERS)
    mix = np.array(institution.mix)
    label = labels[rng.choice(len(labels), p=mix / mix.sum())]
    text = _message(rng, institution, label)
    if rng.random() < label_noise:
        label = labels[rng.integers(len(labels))]
    return {"text": text, "label": label, "institution": institution.name}


def _message(rng: np.random.Generator, institution: Institution, label: str) -> str:
    if rng.random() < VAGUE:
        body = _filled(rng, VAGUE_MESSAGES)
    else:
        body = _filled(rng, MATTERS[label])
        if rng.random() < SECOND_MATTER:
            other = list(MATTERS)[rng.integers(len(MATTERS))]
            aside = _filled(rng, MATTERS[other])
            body = (
                f"{body}, and by the way {aside}"
                if rng.random() < 0.5
                else f"last time {aside}, but now {body}"
            )
    parts = (_pick(rng, institution.openings), body + ".", _pick(rng, institution.endings))
    return " ".join(part for part in parts if part)


def _filled(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    return _pick(rng, templates).format(**{name: _pick(rng, values) for name, values in FILLERS.items()})


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
