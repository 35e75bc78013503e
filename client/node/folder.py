"""A node's folder: its identity, the federation it pinned, the peers its operator approved.

node.toml          the policy, the operator's to write
identity.pem       Ed25519, 0600: what answers are signed with
enrolment.json     the request to hand to the coordinator
rotation.json      after `init --rotate`: that request under the old key's signature
federation.json    the invitation, as pinned by `join`
peers.toml         the roster; `join --approve` alone adds to it
ledger.sqlite, ledger.key, and the head; or wherever the policy's [ledger] says
offers/            what was consented to and not started: a bounded number of runs
runs/, outbox/     what was started, and the exact bytes that left
inbox/             an adapter that came in parts, the last one
refusals.jsonl     every refusal of what the coordinator signed; refusals.json how often
strangers.jsonl    the refusals of all else
relay/             all that the relay needs, to be given to its user: Flower's key, CA, address
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedlora.client.node import binding
from fedlora.client.node.policy import Policy, load_policy
from fedlora.common.codec.strict import MAX_MESSAGE_BYTES
from fedlora.common.disk.files import MAX_FILE_BYTES, text_of
from fedlora.common.disk.guarded import read_guarded
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.model.base import PACKAGED, resolve_base
from fedlora.common.trust.enrolment import (
    EnrolmentRequest,
    Invitation,
    invitation_from_text,
    request_from_text,
)

# in a run's folder
MANIFEST, PROJECTION = "manifest.signed", "projection.safetensors"


@dataclass(frozen=True)
class NodeFolder:
    """Where everything of one node lies."""

    root: Path

    @property
    def policy(self) -> Path:
        """What the institution allows."""
        return self.root / "node.toml"

    @property
    def identity(self) -> Path:
        """Its private key."""
        return self.root / "identity.pem"

    @property
    def request(self) -> Path:
        """What the coordinator enrols."""
        return self.root / "enrolment.json"

    @property
    def rotation(self) -> Path:
        """The signed change to a new key."""
        return self.root / "rotation.json"

    @property
    def federation(self) -> Path:
        """The pinned invitation: whose federation, and the coordinator's key."""
        return self.root / "federation.json"

    @property
    def peers(self) -> Path:
        """Whom it approved for secure aggregation."""
        return self.root / "peers.toml"

    @property
    def refusals(self) -> Path:
        """A line for each request that was refused."""
        return self.root / "refusals.jsonl"

    @property
    def strangers(self) -> Path:
        """A log of its own: whoever reaches the trainer may fill it; older lines make room."""
        return self.root / "strangers.jsonl"

    @property
    def relay(self) -> Path:
        """All that may lie on the machine with a network."""
        return self.root / "relay"

    @property
    def offers(self) -> Path:
        """A folder for each run that was consented to and not started."""
        return self.root / "offers"

    @property
    def inbox(self) -> Path:
        """What comes in parts."""
        return self.root / "inbox"

    @property
    def runs(self) -> Path:
        """A folder for each run that was started: manifest, projection, plans."""
        return self.root / "runs"

    def run(self, manifest: str) -> Path:
        """A run's own folder, by its manifest's digest."""
        return self.runs / manifest.removeprefix("sha256:")

    def manifest(self, manifest: str) -> Path:
        """What the coordinator signed, this node consented to, and was started."""
        return self.run(manifest) / MANIFEST

    def projection(self, manifest: str) -> Path:
        """The run's projection of pooled features; an empty file where it has none."""
        return self.run(manifest) / PROJECTION

    def data_log(self, manifest: str) -> Path:
        """When the run used its data, and which version of them."""
        return self.run(manifest) / "data.jsonl"

    def sums_log(self, manifest: str) -> Path:
        """The masked sums that may hold an update of this node."""
        return self.run(manifest) / "secure.jsonl"

    def manifests(self) -> list[Path]:
        """The manifests of all runs that are kept here."""
        return sorted(self.runs.glob(f"*/{MANIFEST}"))

    def base(self, name: str) -> Path:
        """The folder of a base of the policy: relative ones start in this folder."""
        inside = self.root / name
        return inside if name not in PACKAGED and inside.is_dir() else resolve_base(name)

    def under(self, path: str) -> Path:
        """A path of the policy: relative ones start in this folder."""
        return self.root / path

    def load_policy(self) -> Policy:
        """As `read_policy`; BadInput too where it lets one file charge two budgets."""
        policy = self.read_policy()
        binding.check_budgets(policy.data, self.root, self.policy.name)
        return policy

    def read_policy(self) -> Policy:
        """BadInput where it is another institution's than the one that enrols from this folder.

        No data are looked for, which takes longer the more files there are.
        """
        policy = load_policy(self.policy)
        if self.request.exists():
            enrolled = self.own_request().name
            if enrolled != policy.institution:
                raise BadInput(
                    f"{self.policy.name} institution: found {policy.institution}, expected"
                    f" {enrolled} as in {self.request.name}"
                )
        return policy

    def own_request(self) -> EnrolmentRequest:
        """What this node enrols as; BadInput or Refused where the file does not hold it."""
        data = read_guarded(self.request, "this node's request", MAX_FILE_BYTES)
        return request_from_text(text_of(data, self.request.name), self.request.name, own=True)

    def open_ledger(self, policy: Policy) -> Ledger:
        """The ledger of all budgets, held against its signed head; what `Ledger.open` raises.

        Key and head lie beside it, wherever that is: whoever shares the ledger shares them.
        """
        path = self.under(policy.ledger.path)
        anchor = self._anchor(policy, path.parent)
        head, key = path.parent / policy.trainer.head, path.with_suffix(".key")
        return Ledger.open(path, head, key, anchor)

    def has_ledger(self, policy: Policy) -> bool:
        """Whether there is one, or what is left of one: a head, a key, an anchor, a link."""
        path = self.under(policy.ledger.path)
        left = [path, path.parent / policy.trainer.head, path.with_suffix(".key")]
        if policy.ledger.anchor:
            left.append(self.under(policy.ledger.anchor))
        return any(each.exists() or each.is_symlink() for each in left)

    def _anchor(self, policy: Policy, ledger: Path) -> Path | None:
        """BadInput where the anchor would be put back to an older day with what it witnesses."""
        if not policy.ledger.anchor:
            return None
        anchor = self.under(policy.ledger.anchor)
        for folder in (self.root, ledger):
            if anchor.resolve().is_relative_to(folder.resolve()):
                raise BadInput(
                    f"{self.policy.name} [ledger] anchor: found a file in {folder}, expected one"
                    " outside, which no copy of that folder holds"
                )
        return anchor

    def marks(self, policy: Policy) -> Path | None:
        """Where marks of data files are written; None: beside the data."""
        return self.under(policy.ledger.marks) if policy.ledger.marks else None

    def check_marks(self, policy: Policy, ledger: str) -> None:
        """Refused where a data set of the policy is marked by another ledger than this, by id."""
        for data in policy.data.values():
            binding.check_mark(self.under(data.path), ledger, self.marks(policy))

    def bind_data(self, policy: Policy, name: str, ledger: str) -> None:
        """Mark a data set as this ledger's; Refused where it is another's, or can't be marked;
        BadInput where one of its files may charge two budgets by now.
        """
        binding.check_budgets(policy.data, self.root, self.policy.name)
        binding.bind(self.under(policy.data[name].path), ledger, self.marks(policy))


def pinned_invitation(folder: NodeFolder) -> Invitation:
    """The federation that this node joined; Refused where there is none."""
    if not folder.federation.exists():
        raise Refused(
            f"{folder.federation}: found no federation; fedlora-node join INVITATION first"
        )
    path = folder.federation
    data = read_guarded(path, "the invitation that this node joined by", MAX_MESSAGE_BYTES)
    return invitation_from_text(text_of(data, path.name), path.name)
