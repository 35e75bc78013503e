"""`make federation`: a federation on one machine as between many, from enrolment to `verify`.

Everything goes through the installed commands: a coordinator's folder, enrolment, TLS and node
authentication, three trainers, three relays with their SuperNodes, SuperLink; five rounds with
privacy on; the export, verified.

    python simulations/local/whole_run.py [--out runs/federation] [--rounds 5]
        [--secure] [--shared-noise]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from fedlora.simulations.local.deployment import Federation, running
from fedlora.simulations.local.processes import run


def main() -> None:
    """The command; ends with 1 where the server did not end well."""
    parser = argparse.ArgumentParser(description="A federation of processes on this machine.")
    parser.add_argument("--out", type=Path, default=Path("runs/federation"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--secure", action="store_true", help="updates leave under the masks of secure aggregation"
    )
    parser.add_argument(
        "--shared-noise", action="store_true", help="institutions share their noise under masks"
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and not (out / "coordinator").is_dir():
        sys.exit(f"{out}: found another folder, expected none or an earlier federation")
    shutil.rmtree(out, ignore_errors=True)
    noise = "shared" if arguments.shared_noise else "own"
    secure = arguments.secure or arguments.shared_noise
    federation = Federation(out, rounds=arguments.rounds, secure=secure, noise=noise)
    print("enrolling three institutions", flush=True)
    federation.prepare()
    print("starting trainers, SuperLink and relays", flush=True)
    with running(federation):
        code = federation.wait(1800)
    if code:
        sys.exit(f"the server ended with {code}; {out / 'logs'} says why")
    conclude(federation)


def conclude(federation: Federation) -> None:
    """Export, verify, load; summary.json and the coordinator's public key beside the export."""
    out, folder = federation.root, federation.last_run()
    export = out / "export"
    run("fedlora-server", "export", str(export), "--dir", str(federation.coordinator))
    shutil.copy(folder / "summary.json", out / "summary.json")
    shutil.copy(federation.coordinator / "coordinator.pub", out / "coordinator.pub")
    print(
        run("fedlora-server", "verify", str(export), "--key", str(out / "coordinator.pub")).strip()
    )
    lines = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for line in lines:
        print(
            f"round {line['round']}: {line['seconds']:.1f} s, accuracy"
            f" {line.get('accuracy', 0):.3f}"
        )
    print(f"accuracy {summary['accuracy']:.3f} at ε = {summary['epsilon']:.3f}; export in {export}")


if __name__ == "__main__":
    main()
