"""What the coordinator's process of a run shares with its actors, in a file of the run's folder.

Where everybody computes, the coordinator's public key, and a secret from which each simulated
institution's key follows: it is drawn when the process starts, and worth nothing after it.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.common.codec.framing import KEY_BYTES, digest
from fedlora.common.disk.files import write_atomically
from fedlora.common.trust.identity import Identity, PublicIdentity
from fedlora.simulations.federation.run_folder import SimulatedRun

NODES_FILE = "nodes.json"  # for this machine's user alone
IDENTITY_TAG = "fedlora-simulated-institution-1"


@dataclass(frozen=True)
class Shared:
    """Where every actor computes, what it charges, and who speaks to it."""

    ledger: str
    device: str
    coordinator: str  # its public key
    secret: str  # from which the institutions' keys follow

    @classmethod
    def of(cls, run: SimulatedRun, coordinator: PublicIdentity) -> Shared:
        """As `run` was built, with a new secret."""
        ledger, device = str(run.paths.ledger), str(run.federation.model.device)
        return cls(ledger, device, coordinator.text, secrets.token_hex(KEY_BYTES))

    def identity(self, name: str) -> Identity:
        """The key of the institution `name`."""
        raw = digest(IDENTITY_TAG, bytes.fromhex(self.secret), name.encode())
        return Identity(Ed25519PrivateKey.from_private_bytes(raw))

    def write(self, folder: Path) -> None:
        """Into a file that only its owner reads: it holds a secret."""
        write_atomically(folder / NODES_FILE, json.dumps(vars(self)).encode(), mode=0o600)
