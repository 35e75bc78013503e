"""`fedlora-node`: the institution's command line. Thin: it reads arguments and prints results."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedlora.client.node.folder import NodeFolder
from fedlora.common.codec.strict import MAX_MESSAGE_BYTES
from fedlora.common.errors import BadInput
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.privacy.figures import shown_delta, shown_epsilon
from fedlora.common.terminal import printable, run_to_end

app = typer.Typer(
    help="An institution's node: it keeps the data, and its own policy decides what leaves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="What this node allows.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
console = Console(highlight=False, soft_wrap=True)

Folder = Annotated[Path, typer.Option("--node", help="The node's folder.")]
HERE = Path("node")


@app.command()
def init(
    name: str,
    organisation: Annotated[str, typer.Option(help="The organisation's full name.")],
    node: Folder = HERE,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate", help="New keys for an existing node, handed over by the old ones."
        ),
    ] = False,
) -> None:
    """Make the node's folder, its keys and its enrolment request.

    NAME is this institution's name: lower-case letters, digits, '-'.
    """
    from fedlora.client.node import enrolment

    folder = NodeFolder(node)
    request = (enrolment.rotate if rotate else enrolment.init)(folder, name, organisation)
    file = folder.rotation if rotate else folder.request
    _say(f"hand {file} to the coordinator, and read out on the telephone:")
    _say(f"  {request.name}: {request.identity.fingerprint}")
    if rotate:
        _say("Peers approve the same file: fedlora-node join rotation.json --approve")
        console.print(
            "Once the coordinator has taken it: restart the trainer, and the relay with"
            f" {folder.relay}",
            markup=False,
        )


@app.command()
def join(
    file: Path,
    node: Folder = HERE,
    approve: Annotated[
        bool, typer.Option("--approve", help="Admit a peer to this node's roster.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the peer of this name.")] = False,
) -> None:
    """Pin a federation's keys, or admit a peer; compare the fingerprints by telephone.

    FILE is the coordinator's invitation; with --approve a peer's request or
    rotation, with --remove a peer's name.
    """
    from fedlora.client.node import enrolment, roster
    from fedlora.common.disk.files import read_text

    folder = NodeFolder(node)
    if remove:
        peer = roster.remove_peer(folder, file.name)
        _say(f"removed {peer.name} ({peer.organisation}): {peer.identity.fingerprint}")
        return
    expected = "a peer's request or rotation" if approve else "a coordinator's invitation"
    text = read_text(file, expected=expected)
    if approve:
        peer = roster.approve(folder, text, file.name)
        _say(f"approved {peer.name} ({peer.organisation}); compare by telephone:")
        _say(f"  {peer.identity.fingerprint}")
        return
    invitation = enrolment.join(folder, text, file.name)
    _say(f"joined {invitation.federation} at {invitation.address}; compare:")
    for name, fingerprint in enrolment.fingerprints(invitation).items():
        _say(f"  {name}: {fingerprint}")


@app.command("check-data")
def check_data(node: Folder = HERE) -> None:
    """Read and tokenise all data sets and base models that the policy names; spends nothing."""
    _offline()
    from fedlora.client.service import data_sets
    from fedlora.client.service.loaded_run import try_base
    from fedlora.common.model.base import base_digest, check_base

    folder = NodeFolder(node)
    policy = folder.load_policy()
    for digest, base in policy.bases.items():
        check_base(folder.base(base))
        found = base_digest(folder.base(base))
        if found != digest:
            raise BadInput(f"node.toml [bases] {base}: found {found}, expected {digest}")
        _say(f"{base}: {digest}")
        tried = try_base(folder, policy, digest)
        for task, took in tried.items():
            told = f"not for {task}: {took}" if isinstance(took, BadInput) else f"tried for {task}"
            _say(f"  {told}")
        faults = [each for each in tried.values() if isinstance(each, BadInput)]
        if faults and len(faults) == len(tried):
            raise faults[0]
    for name, data in policy.data.items():
        records, units, lines = data_sets.check_data(folder, policy, name)
        _say(f"{name}: {len(records)} records, {units} units, charges {data.budget}")
        for line in lines:
            _say(f"  {line}")


@app.command()
def personalise(
    adapter: Annotated[Path, typer.Argument(help="A release's adapter folder.")],
    out: Annotated[Path, typer.Option(help="A new folder. It is private, as what is printed.")],
    data: Annotated[str, typer.Option(help="A data set of the policy, if several fit.")] = "",
    lora: Annotated[bool, typer.Option("--lora", help="LoRA's B too, above the same A.")] = False,
    node: Folder = HERE,
) -> None:
    """A head of one's own above a released adapter. It stays here, and costs no ε."""
    _offline()
    from fedlora.client.service.personalise import personalise as fitted

    folder = NodeFolder(node)
    found = fitted(folder, folder.load_policy(), adapter, out, data, lora)
    for title, figures in found.compared.items():
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items()) or "too few"
        _say(f"{title} on records that it was not fitted to: {shown}")
    _say(f"{out}: {found.choice}")


@app.command("base")
def base(name: str) -> None:
    """Print the digest of a base model, as a policy names it under `bases`.

    NAME is a folder, or the name of a packaged model.
    """
    _offline()
    from fedlora.common.model.base import base_digest, check_base, resolve_base

    folder = resolve_base(name)
    check_base(folder)
    sys.stdout.write(base_digest(folder) + "\n")


@policy_app.command()
def explain(manifest: Path, node: Folder = HERE) -> None:
    """Allow or deny for each field of a manifest; exit code 3 where one is denied.

    MANIFEST is a file: signed, or as JSON.
    """
    from fedlora.client.consent.judge import judge
    from fedlora.client.consent.verdict import allow
    from fedlora.client.node.folder import pinned_invitation

    folder = NodeFolder(node)
    policy = folder.load_policy()
    asked = _manifest(manifest)
    ledger = folder.open_ledger(policy)
    spent = {name: ledger.charges(name) for name in policy.budgets}
    federation = (
        pinned_invitation(folder).federation if folder.federation.exists() else asked.federation
    )
    name = policy.data_for(asked.task, asked.labels, asked.unit)
    reserved = ledger.reserved_for(policy.data[name].budget, asked.digest) if name else None
    verdicts = judge(asked, policy, federation, spent, reserved)
    table = Table("field", "found", "verdict")
    for each in verdicts:
        verdict = "allow" if each.allowed else f"deny: {each.reason}"
        table.add_row(each.field, each.found, verdict + (f": {each.note}" if each.note else ""))
    console.print(table, markup=False)
    allow(verdicts)


@app.command()
def serve(node: Folder = HERE) -> None:
    """The trainer: holds the data, and answers what the coordinator signed."""
    _offline()
    from fedlora.client.node.enrolment import only_trainer
    from fedlora.client.node.folder import pinned_invitation
    from fedlora.client.service import endpoint
    from fedlora.client.service.answer import Resident
    from fedlora.client.service.loaded_run import LoadedRun
    from fedlora.common.trust.identity import Identity

    folder = NodeFolder(node)
    policy = folder.load_policy()
    identity = Identity.load(folder.identity)
    pinned_invitation(folder)
    with only_trainer(folder):
        ledger = folder.open_ledger(policy)
        resident = Resident(folder, policy, identity, ledger, LoadedRun(folder, policy, ledger))
        endpoint.serve(
            resident.ask_in_time,
            policy.trainer,
            folder.root,
            lambda address: _say(f"trainer of {policy.institution} listens at {address}"),
        )


@app.command()
def link(
    relay: Annotated[
        Path, typer.Option(help="The relay folder: relay/ of a node's, or a copy of it.")
    ] = Path("node/relay"),
    trainer: Annotated[
        str, typer.Option(help="unix:PATH or host:port of the trainer.")
    ] = "unix:node/trainer.sock",
    port: Annotated[
        int, typer.Option(help="Local port of the SuperNode's API; 0: Flower's own.")
    ] = 0,
    authority: Annotated[
        str, typer.Option(help="host:port: the CA of the trainer's certificate.")
    ] = "",
    certificate: Annotated[str, typer.Option(help="host:port: this relay's certificate.")] = "",
    key: Annotated[str, typer.Option(help="host:port: this relay's key.")] = "",
) -> None:
    """The relay: keeps a Flower SuperNode connected that hands bytes to the trainer and back."""
    from fedlora.client.network.supernode import Link, supervise, trainer_address
    from fedlora.client.service.signals import stop_event

    address = trainer_address(trainer, Path.cwd())
    command = Link(relay, address, port, (authority, certificate, key)).command()
    supervise(command, stop_event())


@app.command()
def ledger(node: Folder = HERE) -> None:
    """Budgets, what is spent and left, and every entry."""
    folder = NodeFolder(node)
    policy = folder.load_policy()
    if not folder.has_ledger(policy):  # looking makes none, at a path that was mistyped
        _say(f"{folder.under(policy.ledger.path)}: no ledger yet; the trainer begins one")
        return
    held = folder.open_ledger(policy)
    entries = held.entries()
    charged = [str(entry.body["budget"]) for entry in entries if entry.body["kind"] == "consent"]
    for name in dict.fromkeys((*policy.budgets, *charged)):
        spent, budget = held.spent(name), policy.budgets.get(name)
        epsilon, delta = shown_epsilon(spent.epsilon), shown_delta(spent.delta)
        if budget is None:
            shown = f"ε {epsilon}, δ {delta}, no longer in the policy"
        else:
            shown = f"ε {epsilon} of {budget.epsilon:g}, δ {delta} of {budget.delta:g}"
        _say(f"{name}: {shown}")
    for entry in entries:
        sys.stdout.write(
            json.dumps({"number": entry.number, **entry.body, "hash": entry.hash}) + "\n"
        )


@app.command()
def report(
    node: Folder = HERE,
    out: Annotated[Path, typer.Option(help="Where to: a folder of its own.")] = Path("report"),
    check: Annotated[
        Path | None, typer.Option(help="Check the report in this folder instead, offline.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="With --check: the node's enrolment.json, or its public key."),
    ] = None,
) -> None:
    """The node's report: JSON signed with its key, and a page."""
    from fedlora.client.report import check as check_module

    if check is not None:
        signer = check_module.check_report(
            check, None if key is None else check_module.read_key(key)
        )
        _say("verified" if key is not None else "integrity only: signed by")
        _say(f"  {signer.fingerprint}")
        return
    from fedlora.client.report.report import write_report
    from fedlora.common.trust.identity import Identity

    folder = NodeFolder(node)
    policy = folder.load_policy()
    identity = Identity.load(folder.identity)
    write_report(folder, policy, identity, folder.open_ledger(policy), out)
    _say(f"{out / check_module.REPORT} and {out / check_module.PAGE}")


def _manifest(path: Path) -> RunManifest:
    """A manifest from a file: JSON, or behind a signature that is not checked (it only asks)."""
    from fedlora.common.disk.files import read_bytes
    from fedlora.common.trust.identity import Signed

    data = read_bytes(path, MAX_MESSAGE_BYTES, "a manifest")
    try:
        return RunManifest.from_json(
            data if data[:1] == b"{" else Signed.from_bytes(data, "manifest").body
        )
    except BadInput as error:
        raise BadInput([f"{path}: {fault}" for fault in error.faults]) from error


def _say(text: str) -> None:
    console.print(printable(text), markup=False)


def _offline() -> None:
    """Before a model library is imported, which reads it then: nothing calls out."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def main() -> None:
    """Entry point: errors are one line to a fault, and the exit code says what kind they are."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run_to_end(app, "fedlora-node")


if __name__ == "__main__":
    main()
