"""A coordinator's folder.

coordinator.toml    the federation's name, its address, SuperLink's port
coordinator.pub     the public key that institutions pin, and that `verify` asks for
invitation.json     what to hand to institutions
members.json        who is enrolled (server.registry)
training.toml       a run to start from
nginx.conf          a proxy that lets institutions reach Flower's Fleet API, and nothing else
keys/ ca/ tls/      private keys of mode 0600, and their certificates
superlink/          Flower's database, secret and logs
runs/N/             one folder for each run
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.common.enrolment import Invitation, invitation_to_text
from fedlora.common.errors import BadInput
from fedlora.common.files import write_atomically
from fedlora.common.identity import Identity
from fedlora.common.toml import Bounds, Pattern, Table, literal, read_fields, read_table
from fedlora.server.certificates import check_server, issue_server, make_authority
from fedlora.server.deployment import Coordinator
from fedlora.server.registry import Registry
from fedlora.server.superlink import Files

TEMPLATES = Path(__file__).parent / "templates"
MAX_TOML_BYTES = 1 << 16


@dataclass(frozen=True)
class Settings:
    """coordinator.toml."""

    federation: str = field(
        default="", metadata={"rule": Pattern(r"[a-z0-9][a-z0-9.-]{0,62}", "a short name")}
    )
    host: str = field(
        default="127.0.0.1", metadata={"rule": Pattern(r"[A-Za-z0-9.:-]{1,253}", "a host name or address")}
    )
    port: int = field(default=9443, metadata={"rule": Bounds(1, 65535)})  # where institutions connect
    superlink_port: int = field(default=9443, metadata={"rule": Bounds(1, 65535)})  # on loopback


@dataclass(frozen=True)
class Directory:
    """An open folder; `identity` speaks for the federation."""

    root: Path
    settings: Settings
    identity: Identity

    @classmethod
    def create(cls, root: Path, settings: Settings) -> Directory:
        """Keys, authority, certificates, invitation and examples in a new folder; BadInput where one lies there."""
        if (root / "coordinator.toml").exists():
            raise BadInput(f"{root}: found a coordinator's folder, expected none")
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = Identity.create(root / "keys" / "coordinator.pem")
        directory = cls(root.resolve(), settings, identity)
        make_authority(settings.federation, directory.authority[0], directory.authority[1])
        directory.renew()
        _write(root / "coordinator.pub", identity.public.text + "\n")
        _write(root / "invitation.json", invitation_to_text(identity, directory.invitation()))
        for name in ("training.toml", "nginx.conf"):
            _write(root / name, _filled(TEMPLATES / name, directory))
        values = "".join(f"{name} = {literal(value)}\n" for name, value in vars(settings).items())
        _write(root / "coordinator.toml", "# A federation's coordinator.\n" + values)  # last: now it is one
        return directory

    @classmethod
    def open(cls, root: Path, expired: bool = False) -> Directory:
        """BadInput or Refused names what is wrong with the folder; `expired` certificates only where they may be."""
        path = root / "coordinator.toml"
        try:
            data = path.read_bytes()[:MAX_TOML_BYTES]
        except OSError as error:
            raise BadInput(f"{path}: found none; fedlora-server init makes a coordinator's folder") from error
        settings, faults = read_fields(
            Settings, Table(read_table(data.decode(errors="replace"), path.name).values, path.name)
        )
        if faults:
            raise BadInput(list(faults.values()))
        directory = cls(root.resolve(), settings, Identity.load(root / "keys" / "coordinator.pem"))
        if not expired:
            check_server(*directory.tls, directory.authority[0])
        return directory

    @property
    def authority(self) -> tuple[Path, Path]:
        return self.root / "ca" / "ca.crt", self.root / "ca" / "ca.key"

    @property
    def tls(self) -> tuple[Path, Path]:
        return self.root / "tls" / "server.crt", self.root / "tls" / "server.key"

    @property
    def port(self) -> int:
        return self.settings.superlink_port

    @property
    def registry(self) -> Registry:
        return Registry(self.root / "members.json", self.identity)

    def invitation(self) -> Invitation:
        address = f"{self.settings.host}:{self.settings.port}"
        certificate = self.authority[0].read_text()
        return Invitation(self.settings.federation, address, certificate, self.identity.public)

    def renew(self) -> None:
        """A new server certificate from the same authority."""
        hosts = list(dict.fromkeys((self.settings.host, "localhost", "127.0.0.1")))
        issue_server(hosts, self.authority, *self.tls)

    def coordinator(self) -> Coordinator:
        return Coordinator(self.settings.federation, self.identity, self.registry.active)

    def superlink_files(self) -> Files:
        return Files(self.authority[0], *self.tls, self.root / "superlink")

    def flower_keys(self) -> Mapping[str, str]:
        return self.registry.flower_keys()

    def nodes(self) -> dict[str, int]:
        """Flower's number of each active member's node."""
        active = self.registry.active()
        return {name: node for name, (node, _) in self.registered().items() if name in active}

    def registered(self) -> dict[str, tuple[int, str]]:
        """Node numbers and keys that SuperLink knows, by member."""
        path = self.root / "superlink" / "nodes.json"
        if not path.exists():
            return {}
        return {name: (int(node), str(key)) for name, (node, key) in json.loads(path.read_text()).items()}

    def write_registered(self, nodes: Mapping[str, tuple[int, str]]) -> None:
        _write(self.root / "superlink" / "nodes.json", json.dumps(nodes, indent=1) + "\n")

    def runs(self) -> list[Path]:
        """Folders of runs, the oldest first."""
        folder = self.root / "runs"
        found = [each for each in folder.iterdir() if each.name.isdecimal()] if folder.is_dir() else []
        return sorted(found, key=lambda each: int(each.name))

    def new_run(self) -> Path:
        runs = self.runs()
        folder = self.root / "runs" / str(int(runs[-1].name) + 1 if runs else 1)
        folder.mkdir(parents=True)
        return folder


def _filled(template: Path, directory: Directory) -> str:
    text = template.read_text()
    for name, value in (
        ("@PORT@", str(directory.settings.port)),
        ("@SUPERLINK_PORT@", str(directory.settings.superlink_port)),
        ("@HOST@", directory.settings.host),
        ("@CERTIFICATE@", str(directory.tls[0])),
        ("@KEY@", str(directory.tls[1])),
        ("@AUTHORITY@", str(directory.authority[0])),
    ):
        text = text.replace(name, value)
    return text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
