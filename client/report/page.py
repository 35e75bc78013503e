"""The node's report as a page that a person reads: no script, nothing fetched.

What is spent comes first, ε rounded up, and what is left rounded down; then each run in sentences,
its figures beside them; then refusals, and at the end what only another program reads.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.common.privacy.statement import shown_delta, shown_epsilon, shown_left

Body = Mapping[str, Any]
Rows = Iterable[tuple[str, Any]]

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:.6em 0}"
    "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}th{background:#f4f4f4;font-weight:600}"
    ".summary{background:#eef4fb;border-left:4px solid #36c;padding:.6em 1em}"
)
MODES = {"record": "record or person (by the node)", "client": "institution", "none": "none"}


def page(body: Body) -> str:
    """The whole page."""
    name = str(body["institution"])
    parts = [
        f"<h1>Privacy report of {_text(name)}</h1>",
        (
            f"<p>Written {_text(body['written'])}. Its signed form is report.json, which holds this"
            " page's digest.</p>"
        ),
        _summary(body),
        "<h2>Runs</h2>",
        *([_run(run) for run in body["runs"]] or ["<p>No run was consented to.</p>"]),
        *_refusals(body),
        "<h2>How privacy is made</h2>",
        _rows((MODES.get(mode, mode), text) for mode, text in body["mechanisms"].items()),
        f"<p>Noise and draws come from {_text(body['noise_source'])}.</p>",
        "<h2>What is assumed</h2>",
        _items(body["assumptions"]),
        "<h2>Who, and with what</h2>",
        _rows(_identities(body)),
        f"<h3>Versions</h3>{_rows(body['versions'].items())}",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Privacy report of'
        f" {_text(name)}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _summary(body: Body) -> str:
    lines = [_budget(each) for each in body["budgets"]]
    refused = (
        sum(line.get("times", 1) for line in body["refusals"]) + body["refusals_not_kept"]["count"]
    )
    lost = sum(not run["manifest_kept"] for run in body["runs"])
    lines.append(
        f"{len(body['runs'])} runs were consented"
        f" to{f', {lost} of them without a manifest that is kept here' * bool(lost)}; {refused}"
        " requests of the coordinator were refused."
    )
    why = (
        "ε bounds what anybody can learn about one unit from all that left this node: a smaller one"
        " says less. It is rounded up where it is spent and down where it is left. Once a budget is"
        " spent, the node trains no more."
    )
    return f'<div class="summary">{_items(lines)}<p>{why}</p></div>'


def _budget(each: Body) -> str:
    epsilon, delta = shown_epsilon(each["epsilon_spent"]), shown_delta(each["delta_spent"])
    if not each["in_policy"]:
        return (
            f"Budget {each['budget']}: ε {epsilon} and δ {delta} spent. It is no longer in the"
            f" policy; its last caps were ε {each['epsilon']:g} and δ {each['delta']:g}."
        )
    return (
        f"Budget {each['budget']}: ε {epsilon} of {each['epsilon']:g} spent,"
        f" {shown_left(each['epsilon_left'])} left; δ {delta} of {each['delta']:g} spent. It pays"
        f" for {', '.join(each['data']) or 'no data set'}."
    )


def _lost_run(run: Body) -> str:
    facts = [
        ("ε charged", shown_epsilon(run["epsilon"])),
        ("δ", shown_delta(run["delta"])),
        ("Budget", ", ".join(run["budget"])),
        ("Attempts", f"{run['attempts_consented']} consented to; {_attempts(run)}"),
        ("Sent to the coordinator", _sent(run)),
        ("Manifest", run["manifest"]),
    ]
    return f"<h3>A run without its manifest</h3><p>{_text(run['note'])}.</p>{_rows(facts)}"


def _attempts(run: Body) -> str:
    return f"{run['attempts_reserved']} reserved, {run['updates_committed']} updates made"


def _sent(run: Body) -> str:
    kinds = Counter(each["kind"] for each in run["sent"])
    return (
        "; ".join(
            f"{count} × {kind},"
            f" {sum(each['bytes'] for each in run['sent'] if each['kind'] == kind):,} bytes"
            for kind, count in kinds.items()
        )
        or "nothing"
    )


def _run(run: Body) -> str:
    if not run["manifest_kept"]:
        return _lost_run(run)
    updates = f"{run['updates_committed']} updates left; without ε, nothing is reserved"
    confirmed = sum(each.get("members") is not None for each in run["sums"])
    second = run["epsilon_second_accountant"]
    facts: list[tuple[str, Any]] = [
        ("Unit of privacy", run["unit"]),
        ("Neighbouring data", run["neighbours"]),
        ("Mechanism", run["mechanism"]),
        ("Noise", run["noise"]),
        ("ε charged", "none" if run["epsilon"] is None else shown_epsilon(run["epsilon"])),
        ("δ", shown_delta(run["delta"])),
        ("Accountant", run["accountant"]),
        (
            "Second accountant",
            run["second_accountant"] + (f": ε {shown_epsilon(second)}" if second else ""),
        ),
        ("Budget", ", ".join(run["budget"])),
        ("Attempts used", updates if run["mode"] == "none" else _attempts(run)),
        ("Sent to the coordinator", _sent(run)),
        ("Aggregation", run["aggregation"]),
        (
            "Sums that may hold an update of this node",
            f"{len(run['sums'])}, of them {confirmed} confirmed",
        ),
        ("Versions of the data", max((each.get("version", 0) for each in run["data"]), default=0)),
        ("Base model", run["base_digest"]),
        ("Manifest", run["manifest"]),
    ]
    heads = (
        "Phase",
        "Rounds",
        "Attempts",
        "Steps a round",
        "Sampling rate q",
        "Noise multiplier σ",
        "Clip C",
        "Clip of the head",
    )
    keys = ("name", "rounds", "attempts", "steps", "sampling_rate", "noise_multiplier", "clip")
    rows = (
        [*(phase[key] for key in keys), phase["head_clip"] or "one for all"]
        for phase in run["phases"]
    )
    phases = _table(heads, rows)
    return (
        f"<h3>Run {_text(run['run'])} of federation {_text(run['federation'])}:"
        f" {_text(run['task'])}</h3>"
        f"{''.join(f'<p>{_text(line)}</p>' for line in run['statement'])}{_rows(facts)}{phases}"
    )


def _refusals(body: Body) -> Iterable[str]:
    yield "<h2>What was refused</h2>"
    rows = [
        (
            line.get("time", ""),
            line.get("last", ""),
            line.get("times", 1),
            str(line.get("manifest", ""))[:20],
            line.get("verdict", line["reason"]),
        )
        for line in body["refusals"]
    ]
    yield _table(("First", "Last", "Times", "Run", "Reason"), rows) if rows else "<p>Nothing.</p>"
    lost = body["refusals_not_kept"]
    if lost["count"]:
        yield f"<p>{lost['count']} more refusals were counted by kind and not kept one by one:</p>"
        yield _table(
            ("Kind", "Times", "First", "Last"),
            (
                (kind, each["count"], each["first"], each["last"])
                for kind, each in lost["kinds"].items()
            ),
        )
    if body["strangers"]:
        yield "<h3>Requests that the coordinator did not sign for this node</h3>"
        yield (
            f"<p>The newest of them; older ones make room. {len(body['strangers'])} are kept, by"
            " reason:</p>"
        )
        reasons = Counter(line["reason"] for line in body["strangers"])
        yield _table(
            ("Times", "Reason"), ((count, reason) for reason, count in reasons.most_common(50))
        )


def _identities(body: Body) -> list[tuple[str, Any]]:
    peers = [f"{name}: {fingerprint}" for name, fingerprint in body["peers"].items()]
    return [
        ("This node's key, by fingerprint", body["fingerprint"]),
        ("Federation", body["federation"] or "none joined"),
        ("Coordinator's key, by fingerprint", body["coordinator"]),
        ("Peers that this node approved", "\n".join(peers) or "none"),
        ("Policy (digest of node.toml)", body["policy_digest"]),
        (
            "Ledger",
            (
                f"{body['ledger']['entries']} entries, head {body['ledger']['head']}, id"
                f" {body['ledger']['id']}"
            ),
        ),
    ]


def _rows(rows: Rows) -> str:
    cells = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows)
    return f"<table>{cells}</table>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    lines = "".join(
        f"<tr>{''.join(f'<td>{_text(each)}</td>' for each in row)}</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


def _items(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _text(value: Any) -> str:
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(shown).replace("\n", "<br>")
