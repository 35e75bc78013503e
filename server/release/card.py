"""The model card of an adapter: what it is, what is guaranteed, what each institution signed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.accountant import ACCOUNTANT
from fedlora.common.privacy.figures import learnt_before, shown_epsilon
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Consent
from fedlora.server.release.layout import VERSION
from fedlora.server.secagg.log import DROP_OUTS

FIGURES = (
    *("accuracy", "macro_f1", "micro_f1", "entity_f1", "spearman", "pearson", "perplexity", "loss"),
)
WHOLE = ("rounds", "public_records")
SHARE = ("units", "accuracy", "error")  # of an evaluation
PAIRS, COUNTS = ("cohort", "threshold"), ("sums", "colluders", "smallest_sum")


def model_card(
    manifest: RunManifest,
    organisations: Mapping[str, str],
    statements: Mapping[str, Consent],
    figures: Mapping[str, Any],
    version: int = VERSION,
) -> str:
    """Markdown; the largest ε that an institution states is the run's. `version`: the release's."""
    largest = max((consent.epsilon for consent in statements.values()), default=None)
    guarantee = guarantee_of(manifest)
    epsilon = largest if guarantee.private else None
    rows = [_row(organisations[name], statements[name]) for name in statements]
    parts = [_head(manifest), _introduction(manifest, figures, len(organisations))]
    learnt = figures.get("public_records", 0) if version >= 4 else 0
    lines = [*guarantee.statement(epsilon), *learnt_before(learnt), *_masked(figures)]
    parts += ["## Privacy", "\n".join(f"- {line}" for line in lines)]
    heading = f"| institution | organisation | {guarantee.cost_name} | δ | policy |"
    parts += ["\n".join([heading, "|---|---|---|---|---|", *rows])]
    parts += ["The figures are each institution's own; `statements/` has them as it signed them."]
    measured = [f"| {n} | {figures[n]:.4g} |" for n in FIGURES if isinstance(figures.get(n), float)]
    if measured:
        parts += [
            "## Measured on public data",
            "\n".join(["| figure | value |", "|---|---|", *measured]),
        ]
    parts += _evaluated(figures.get("evaluation"))
    return "\n\n".join([*parts, USE.format(module=LOADERS[version])]) + "\n"


def as_earlier(card: str, found: str, version: int) -> str:
    """`card` as the release's version words it: until 2 with the Opacus that computed ε, which only
    what was `found` can say. Its figures are the same.
    """
    named = OPACUS.search(found) if version <= 2 else None
    return card.replace(ACCOUNTANT, named[1], 1) if named else card


def shown_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a card shows of a run's figures, as JSON holds it; anything else is left out."""
    shown: dict[str, Any] = {
        name: figures[name] for name in FIGURES if isinstance(figures.get(name), float)
    }
    shown |= {name: figures[name] for name in WHOLE if type(figures.get(name)) is int}
    if isinstance(figures.get("evaluation"), Mapping):
        shown["evaluation"] = _shown_evaluation(figures["evaluation"])
    secure = figures.get("secure")
    if isinstance(secure, Mapping):
        pairs = {
            name: list(secure[name]) for name in PAIRS if isinstance(secure.get(name), list | tuple)
        }
        counts = {name: secure[name] for name in COUNTS if type(secure.get(name)) is int}
        ends = [end for pair in pairs.values() for end in pair]
        lost = secure.get("dropouts")
        lost = lost if isinstance(lost, Mapping) else {}
        known = [stage for stage, *_ in DROP_OUTS]
        whole = (len(pairs), len(counts), len(ends), set(lost)) == (2, len(COUNTS), 4, set(known))
        if whole and all(type(each) is int for each in (*ends, *lost.values())):
            shown["secure"] = pairs | counts | {"dropouts": {stage: lost[stage] for stage in known}}
    return shown


def _shown_evaluation(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the institutions' noisy counts: all of them, the lowest institution, and the spread."""
    rows = {name: found.get(name) for name in ("together", "lowest")}
    shown: dict[str, Any] = {
        name: {key: row[key] for key in SHARE if isinstance(row.get(key), float)}
        for name, row in rows.items()
        if isinstance(row, Mapping)
    }
    spread = found.get("spread")
    return shown | ({"spread": spread} if isinstance(spread, float) else {})


def _evaluated(found: Any) -> list[str]:
    """The card's part on hold-outs; nothing where nothing could be told."""
    if not isinstance(found, Mapping):
        return []
    lines = [
        f"| {title} | {row['accuracy']:.4g} ± {row['error']:.2g} |"
        for name, title in (("together", "accuracy"), ("lowest", "accuracy, lowest institution"))
        if set(row := found.get(name, {})) == set(SHARE)
    ]
    if "spread" in found:
        lines.append(f"| spread between institutions | {found['spread']:.2g} |")
    note = "Noisy counts of units that the run did not train on; ± is a standard error."
    table = "\n".join(["| figure | value |", "|---|---|", *lines])
    return ["## Measured at the institutions", note, table] if lines else []


def _masked(figures: Mapping[str, Any]) -> list[str]:
    """What was learnt under masks, as the coordinator recorded it.

    Sums that did not count in the end included.
    """
    secure = figures.get("secure")
    if not isinstance(secure, Mapping):
        return []
    (fewest, most), (low, high) = secure["cohort"], secure["threshold"]
    lost = ", ".join(f"{stage} {secure['dropouts'][stage]}" for stage, *_ in DROP_OUTS)
    return [
        f"{secure['sums']} sums were learnt under masks: cohorts of {fewest} to {most}, t of {low}"
        f" to {high}, at most {secure['colluders']} colluders assumed, at least"
        f" {secure['smallest_sum']} updates in each. Drop-outs by stage: {lost}."
    ]


def _row(organisation: str, consent: Consent) -> str:
    cells = (
        _cell(consent.institution),
        _cell(organisation),
        shown_epsilon(consent.epsilon),
        f"{consent.delta:g}",
        f"`{_cell(consent.policy_digest)}`",
    )
    return "| " + " | ".join(cells) + " |"


def _head(manifest: RunManifest) -> str:
    return "\n".join(
        [
            "---",
            "library_name: peft",
            "tags: [lora, federated-learning, differential-privacy]",
            "---",
            "",
            f"# Adapter of the federation {_cell(manifest.federation)}",
        ]
    )


def _introduction(manifest: RunManifest, figures: Mapping[str, Any], institutions: int) -> str:
    done = figures.get("rounds", manifest.rounds)
    rounds = f"{done}" if done == manifest.rounds else f"{done} of the planned {manifest.rounds}"
    labels = f" over {len(manifest.labels)} labels" if manifest.labels else ""
    return (
        f"A LoRA adapter (rank {manifest.network.rank}) for {manifest.task}{labels}, trained in"
        f" {rounds} rounds by {institutions} institutions on texts that never left them. Run"
        f" `{manifest.digest}`, base model `{_cell(manifest.base_digest)}`."
    )


def _cell(text: str) -> str:
    """Text from outside that can't end a cell, a line or a code span, nor bring a link or a tag."""
    return "".join(
        letter if letter.isprintable() and letter not in "|<>[]`\\" else " " for letter in text
    )


# By a release's version, for a card is compared word for word: where `load_adapter` was, and is.
LOADERS = {1: "fedlora.common.export", **dict.fromkeys((2, 3, 4), "fedlora.common.adapter")}
OPACUS = re.compile(r"computed by (Opacus 1\.6(?:\.\d{1,2})? PRV) for the sampling that ran")
USE = """## Use

```python
from {module} import load_adapter

classifier = load_adapter("adapter")
```

Verify first, with the coordinator's key from a source that you trust: \
`fedlora-server verify . --key coordinator.pub`."""
