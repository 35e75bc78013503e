"""Every kind of run's report: well-formed, self-contained, escaped, true to its files."""

from __future__ import annotations

import html
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.common.errors import BadInput
from fedlora.simulations.report.pages import write_report, write_sweep_report

VOID = {"meta", "br", "img", "path", "use", "rect", "image"}
HOSTILE = (
    "<script>alert(1)</script>",
    "a\"b'&amp;",
    "$x_{$",
    "\x00\x07",
    "\ud800",
    "医院",
    "x" * 300,
)
LABELS = ("access", "hardware", "network", "orders")


class Page(HTMLParser):
    """What a test asks of a page: its tags, in balance, and its words."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def check(self) -> None:
        """No scripts or foreign links, captions and descriptions, no id twice, no gap."""
        assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in self.tags}
        assert "http:" not in self.source and "https:" not in self.source
        for tag, attributes in self.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), (
                    attributes[name]
                )
            if attributes.get("role") == "img":
                assert attributes["aria-label"]
        names = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(names) == len(set(names))
        assert {attributes["href"] for tag, attributes in self.tags if tag == "a"} <= {
            f"#{name}" for name in names
        }
        assert (
            sum(tag == "table" for tag, _ in self.tags)
            == sum(tag == "caption" for tag, _ in self.tags)
            > 0
        )
        assert not re.search(
            r"\bNone\b|\bnan\b|Undefined|\{\{|\{%", self.text.replace("None failed", "")
        )


def summary(
    clients: int = 3, labels: tuple[str, ...] = LABELS, private: bool = True, **changes: Any
) -> dict[str, Any]:
    """A summary as `fedlora-sim run` writes it, with made-up figures."""
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 4, (len(labels), len(labels))) + 30 * np.eye(
        len(labels), dtype=np.int64
    )
    names = [f"client-{number}" for number in range(clients)]
    return {
        "task": "sequence-classification",
        "accuracy": float(confusion.trace() / confusion.sum()),
        "macro_f1": 0.8,
        "loss": 0.4,
        "epsilon": 2.9911 if private else None,
        "epsilon_by_client": dict.fromkeys(names, 2.9911) if private else {},
        "delta": 1e-5 if private else None,
        "unit": "record",
        "mode": "record" if private else "none",
        "schedule": [
            {
                "phase": "head",
                "steps": 5,
                "sampling_rate": 0.2,
                "noise_multiplier": 1.75 if private else 0.0,
            }
        ],
        "rounds": 4,
        "clients": clients,
        "seconds": 72.4,
        "trainable_parameters": 1540,
        "strategy": "fedavg",
        "base_digest": "sha256:" + "0" * 64,
        "truncated": {"text": 3},
        "privacy_statement": ["Each institution's updates are private."],
        "labels": list(labels),
        "confusion": confusion.tolist(),
        "recall_by_class": dict.fromkeys(labels, 0.5),
        "accuracy_by_client": {name: float(rng.random()) for name in names},
        "partition": {
            "clients": names,
            "labels": list(labels),
            "counts": rng.integers(0, 50, (clients, len(labels))).tolist(),
        },
        "versions": {"python": "3.11"},
        "config": '[model]\nbase = "models/minilm"\n',
        "synthetic": False,
        **changes,
    }


def rounds(
    count: int, metric: str = "accuracy", private: bool = True, **changes: Any
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [
        {
            "round": number,
            "phase": "head" if number < 3 else "adapter",
            "attempt": number,
            "epsilon": 0.5 * number if private else None,
            "asked": 3,
            "replies": 3,
            "failures": [],
            "loss": 1 / number,
            metric: 1 - 0.5 / number,
            **changes,
        }
        for number in range(1, count + 1)
    ]


def report(folder: Path, values: dict[str, Any], lines: list[dict[str, Any]]) -> Page:
    (folder / "summary.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(folder))
    page.check()
    return page


SIZES = {"clients": ["a", "b", "c"], "labels": ["records"], "counts": [[5], [6], [0]]}


def language_model() -> dict[str, Any]:
    values = summary(task="causal-lm", perplexity=18.2, partition=SIZES)
    of_classes = ("accuracy", "macro_f1", "confusion", "recall_by_class", "accuracy_by_client")
    return {key: value for key, value in values.items() if key not in of_classes} | {"labels": []}


@pytest.mark.parametrize(
    ("clients", "classes"),
    [(1, 1), (1, 2), (40, 12), (41, 12), (40, 13), (2, 46), (3, 150), (41, 150)],
)
def test_every_size_gives_a_page_that_is_in_order(
    tmp_path: Path, clients: int, classes: int
) -> None:
    report(tmp_path, summary(clients, tuple(f"class {n}" for n in range(classes))), rounds(4))


def test_the_first_screen_says_what_matters(tmp_path: Path) -> None:
    page = report(tmp_path, summary(), rounds(4))
    first = page.text.split("What is guaranteed")[0]
    for words in (
        "A classifier for 4 classes",
        "3 institutions with differential privacy",
        "for minilm",
        "ε = 2.992 and δ = 10⁻⁵",
        "10⁻⁵",
    ):
        assert words in first, words
    right = np.trace(summary()["confusion"]) / np.sum(summary()["confusion"])
    assert (
        f"labels {100 * right:.1f} % of {np.sum(summary()['confusion'])} public test records"
        " correctly" in first
    )
    assert "one record" in first and "synthetic" not in first
    most = np.sum(summary()["confusion"], axis=1).max() / np.sum(summary()["confusion"])
    assert f"always guessing the most frequent class would give {100 * most:.1f} %" in first


def test_all_sections_are_there(tmp_path: Path) -> None:
    page = report(tmp_path, summary(), rounds(4))
    for words in (
        "Each institution's updates are private.", "Sampling rate", "after round 4",
        "ε of the rounds so far: 2 after", "asked 12 times and 12 answers counted", "None failed",
        "Records by institution and label", "true \\ guessed", "Recall by class",
        "Training records whose text was cut", 'base = "models/minilm"', "python", "sha256:",
    ):  # fmt: skip
        assert words in page.text, words


def test_the_updates_length_stands_beside_that_of_its_noise(tmp_path: Path) -> None:
    page = report(tmp_path, summary(), rounds(4, update_norm=0.5, noise_norm=0.45))
    assert "Length of the mean update: 0.5 in round 4, where its noise alone has about 0.45" in (
        page.text
    )
    page = report(tmp_path, summary(), rounds(4, update_norm=0.5, noise_norm=None))
    assert "Length of the mean update" not in page.text


def test_counts_of_the_files_are_the_counts_of_the_page(tmp_path: Path) -> None:
    values = summary(labels=("yes", "no"), confusion=[[31, 7], [5, 17]])
    values["partition"]["counts"] = [[101, 102], [103, 104], [105, 106]]
    page = report(tmp_path, values, rounds(4))
    cells = re.findall(r"<td style=\"background[^>]*>([^<]*)</td>", page.source)
    assert cells == ["101", "102", "103", "104", "105", "106", "31", "7", "5", "17"]


def test_clients_go_by_the_names_of_the_partition(tmp_path: Path) -> None:
    values = summary()
    values["partition"]["clients"] = ["hospital", "bank", "insurer"]
    lines = rounds(4, failures=[["client-1", "deadline passed"]])
    page = report(tmp_path, values, lines)
    assert "client-" not in page.text
    assert re.search(r"deadline passed 4 bank 1–4", page.text)


def test_failures_are_counted_and_listed(tmp_path: Path) -> None:
    lines = rounds(3)
    lines[1] |= {"replies": 1, "failures": [["client-0", "gone <b>"], ["client-2", "gone <b>"]]}
    lines[2] |= {"attempt": 5}
    page = report(tmp_path, summary(rounds=3), lines)
    assert "asked 9 times and 7 answers counted. 2 answers did not count." in page.text
    assert "2 attempts at a round had to be repeated, and were paid for." in page.text
    assert "gone <b> 2 client-0, client-2 2" in page.text


def test_a_run_without_privacy_says_so(tmp_path: Path) -> None:
    page = report(tmp_path, summary(private=False), rounds(4, private=False))
    first = page.text.split("What is guaranteed")[0]
    assert (
        "fine-tuned by 3 institutions without privacy" in first and "differential" not in page.text
    )
    assert "Nothing is guaranteed" in first and "not private" in first
    assert (
        "δ" not in first
        and "ε of the rounds" not in page.text
        and "no noise was added" in page.text
    )


def test_a_language_model_has_a_perplexity_and_no_confusion(tmp_path: Path) -> None:
    page = report(tmp_path, language_model(), rounds(4, "perplexity"))
    first = page.text.split("What is guaranteed")[0]
    assert "A language model" in first and "18.2" in first and "Accuracy" not in first
    assert "mistaken" not in page.text and "Perplexity on the public validation part" in page.text


def test_no_completed_round(tmp_path: Path) -> None:
    page = report(tmp_path, summary(rounds=0), [])
    assert "No round was completed" in page.text and "nothing to draw" in page.text


def test_a_run_without_a_validation_part(tmp_path: Path) -> None:
    lines = [
        {key: value for key, value in line.items() if key not in ("accuracy", "epsilon", "loss")}
        for line in rounds(2)
    ]
    assert "No round was scored" in report(tmp_path, summary(), lines).text


def test_one_client_is_one_institution(tmp_path: Path) -> None:
    page = report(tmp_path, summary(1), rounds(1))
    assert "fine-tuned by 1 institution with" in page.text and "1 institutions" not in page.text


def test_ten_thousand_clients_are_drawn_as_histograms(tmp_path: Path) -> None:
    began = time.process_time()
    page = report(tmp_path, summary(10_000), rounds(4))
    assert time.process_time() - began < 10
    assert len(page.source) < 300_000
    assert (
        "10,000 institutions: the spread of each figure" in page.text
        and "client-77" not in page.text
    )


def test_the_quickstart_is_compared_side_by_side(tmp_path: Path) -> None:
    scores = {"untrained": 0.17, "non-private": 0.902, "private": 0.871}
    comparison = {
        name: {
            "accuracy": score,
            "macro_f1": score,
            "loss": 1.0,
            "epsilon": 2.9911 if name == "private" else None,
        }
        for name, score in scores.items()
    }
    page = report(tmp_path, summary(synthetic=True, comparison=comparison), rounds(4))
    assert "The data is synthetic." in page.text.split("What is guaranteed")[0]
    assert "Privacy cost 3.1 points of accuracy here." in page.text
    for words in (
        "Before training",
        "17.0 %",
        "Trained without privacy",
        "90.2 %",
        "Trained with privacy",
        "87.1 %",
    ):
        assert words in page.text, words


def test_hostile_text_is_text(tmp_path: Path) -> None:
    values = summary(
        len(HOSTILE), HOSTILE, unit=HOSTILE[0], privacy_statement=list(HOSTILE), config=HOSTILE[0]
    )
    values["partition"]["clients"] = list(HOSTILE)
    values["comparison"] = {
        HOSTILE[0]: {"accuracy": 0.5, "macro_f1": None, "loss": None, "epsilon": None}
    }
    values["versions"] = {HOSTILE[0]: HOSTILE[1]}
    values["schedule"][0]["phase"] = HOSTILE[0]
    lines = rounds(4, failures=[[name, name] for name in HOSTILE], phase=HOSTILE[0])
    page = report(tmp_path, values, lines)
    assert html.escape(HOSTILE[0], quote=False) in page.source and HOSTILE[0] not in page.source


def test_hostile_text_is_text_in_pictures_too(tmp_path: Path) -> None:
    labels = (*HOSTILE, *(f"class {number}" for number in range(20)))
    values = summary(len(HOSTILE), labels)
    values["partition"]["clients"] = list(HOSTILE)
    lines = rounds(2)
    lines[1]["phase"] = HOSTILE[0]
    page = report(tmp_path, values, lines)
    assert HOSTILE[0] not in page.source and html.escape("<script>", quote=False) in page.source


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    one = report(tmp_path, summary(4, tuple("abcdefghijklmnop")), rounds(4)).source
    assert Page(write_report(tmp_path)).source == one


def test_a_cut_off_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    report(tmp_path, summary(), rounds(2))
    metrics = tmp_path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"round": 3, "ph')
    assert "asked 6 times" in Page(write_report(tmp_path)).text
    metrics.write_text('{"round": \n' + whole)
    with pytest.raises(BadInput, match=r"metrics\.jsonl line 1: "):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a run that has finished"),
        ("{", "not JSON"),
        ("[]", "expected a table"),
        ('{"task": "x"}', "summary.json clients: missing"),
    ],
)
def test_a_summary_that_is_not_one(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        write_report(tmp_path)


def trial(key: str, value: str, **figures: Any) -> dict[str, Any]:
    return {
        "key": key,
        "value": value,
        "loss": 0.4,
        "epsilon": 2.9911,
        "delta": 1e-5,
        "seconds": 72.4,
        **figures,
    }


SWEEPS: dict[str, list[dict[str, Any]]] = {
    "epsilon": [
        trial("privacy.epsilon", v, accuracy=0.8, validation={"accuracy": 0.81})
        for v in ("8", "1", "3")
    ],
    "words": [trial("aggregation.strategy", v, accuracy=0.8, validation=None) for v in HOSTILE[:3]],
    "perplexity": [trial("lora.rank", v, accuracy=None, perplexity=9.5) for v in ("1", "64")],
    "without": [trial("privacy.mode", "none", accuracy=0.9) | {"epsilon": None, "delta": None}],
    "unscored": [trial("seed", "-1", accuracy=None, loss=None)],
    "negative": [trial("seed", value, accuracy=0.5) for value in ("-1", "0", "nan")],
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_that_its_trials_were_not_accounted_together(
    tmp_path: Path, name: str
) -> None:
    trials = SWEEPS[name]
    (tmp_path / "sweep.json").write_text(json.dumps(trials))
    page = Page(write_sweep_report(tmp_path))
    page.source = page.source.replace(">nan<", "><")  # a value that was asked for
    page.words = [word for word in page.words if word != "nan"]
    page.check()
    assert "The trials were not accounted together." in page.text
    assert page.source.count('<th scope="row">') == len(trials)
    assert ("<svg" in page.source) == (name != "unscored")


def test_a_sweep_without_trials(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(BadInput, match="found no trials"):
        write_sweep_report(tmp_path)
