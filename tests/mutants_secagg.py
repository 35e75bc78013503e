"""Mutants of the checks that secure aggregation stands on.

A check removed, a comparison turned, a set widened.

    python -m tests.mutants_secagg

Each mutant is made in a copy of the sources; the tests must fail on it. The unchanged copy must
pass them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/client/secagg/test_node.py",
    "tests/client/secagg/test_masked_run.py",
    "tests/client/secagg/test_runs.py",
    "tests/server/secagg/test_epoch.py",
    "tests/client/secagg/test_machine.py",
    "tests/client/secagg/test_shared_noise.py",
    "tests/client/secagg/test_shared_records.py",
    "tests/client/secagg/test_turns.py",
    "tests/common/privacy/test_skellam.py",
    "tests/common/privacy/test_unit_release.py",
)
COPIED = ("client", "common", "server", "tests", ".typing", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """In `file`, `found` (which occurs once) becomes `put`."""

    name: str
    file: str
    found: str
    put: str


COHORT, NODE = "common/secagg/cohort.py", "client/secagg/node.py"
SHARES = "client/secagg/shares.py"
EPOCH, ATTEMPT = "server/secagg/epoch.py", "server/secagg/attempt.py"
LOG = "server/secagg/log.py"
RUN, CALIBRATION = "client/secagg/masked_run.py", "common/privacy/calibration.py"
SKELLAM, PRIVACY = "common/privacy/skellam.py", "common/privacy/institution_level.py"
SHARED, RECORDS = "common/privacy/shared_noise.py", "common/privacy/shared_record_level.py"
UNITS, PROMISE = "common/privacy/unit_release.py", "client/consent/promise.py"
TURNS = "common/manifest/turns.py"
RUNS, WIRE = "client/secagg/runs.py", "common/secagg/wire.py"
MUTANTS = (
    Mutant("a stranger counts", COHORT, "if name not in self.peers:", "if False:"),
    Mutant(
        "an epoch outlives a member's removal",
        NODE,
        "in state.names\n        ):",
        "in ()\n        ):",
    ),
    Mutant("cohorts of two", COHORT, "SMALLEST_COHORT = 3", "SMALLEST_COHORT = 2"),
    Mutant(
        "one organisation twice",
        COHORT,
        "if len(set(organisations)) != len(organisations):",
        "if False:",
    ),
    Mutant(
        "one identity twice",
        COHORT,
        "if len({peer.identity for peer in peers}) != len(peers):",
        "if False:",
    ),
    Mutant("no minimum cohort", COHORT, "if len(offers) < policy.minimum_cohort:", "if False:"),
    Mutant(
        "one below the minimum cohort",
        COHORT,
        "if len(offers) < policy.minimum_cohort:",
        "if len(offers) < policy.minimum_cohort - 1:",
    ),
    Mutant(
        "two quorums may be of colluders",
        COHORT,
        "if 2 * t - members <= colluders:",
        "if 2 * t - members < colluders:",
    ),
    Mutant(
        "no bound on colluders",
        COHORT,
        "    check_colluders(len(offers), policy.max_colluders)\n",
        "",
    ),
    Mutant("a sum of one honest input", COHORT, "if t - colluders < 2:", "if t - colluders < 1:"),
    Mutant(
        "a majority is enough", COHORT, "return 2 * members // 3 + 1", "return members // 2 + 1"
    ),
    Mutant(
        "t by the ceiling", COHORT, "return 2 * members // 3 + 1", "return -(-2 * members // 3)"
    ),
    Mutant("keys of any epoch", COHORT, "if offer.epoch != epoch.digest:", "if False:"),
    Mutant(
        "keys unsigned",
        COHORT,
        "    identity.verify(offer.signature, wire.KEYS_TAG, *offer.signed())\n",
        "",
    ),
    Mutant(
        "any public key", COHORT, "        keys.check_public(public, where)\n", "        pass\n"
    ),
    Mutant("a key may occur twice", COHORT, "if len(set(public)) != len(public):", "if False:"),
    Mutant(
        "only share keys are distinct",
        COHORT,
        "for key in (offer.share_key, *offer.mask_keys)]",
        "for key in (offer.share_key,)]",
    ),
    Mutant("somebody else's entry for me", COHORT, "if own not in offers:", "if False:"),
    Mutant("somebody else's deal for me", COHORT, "    if own not in dealers:", "    if False:"),
    Mutant(
        "dealers unsigned",
        COHORT,
        ".identity.verify(\n"
        "            dealer.signature, wire.SHARES_TAG, *dealer.signed(cohort)\n        )",
        "",
    ),
    Mutant("U2 or U3 with strangers", COHORT, "    if strangers:\n", "    if False:\n"),
    Mutant("U2 or U3 without me", COHORT, "if policy.me not in names:", "if False:"),
    Mutant("U2 or U3 below t", COHORT, "    if len(names) < needed:", "    if False:"),
    Mutant(
        "U3 below the minimum cohort",
        COHORT,
        "needed = max(threshold(members), policy.minimum_cohort)",
        "needed = threshold(members)",
    ),
    Mutant(
        "U3 below t",
        COHORT,
        "needed = max(threshold(members), policy.minimum_cohort)",
        "needed = policy.minimum_cohort",
    ),
    Mutant(
        "a list in any order, or one twice",
        COHORT,
        "if list(names) != sorted(set(names)):",
        "if False:",
    ),
    Mutant(
        "a signer counts twice",
        COHORT,
        "    if len(set(names)) != len(names):\n",
        "    if False:\n",
    ),
    Mutant("signers outside U3", COHORT, "if not set(names) <= set(survivors):", "if False:"),
    Mutant("any number of signers", COHORT, "if len(names) < threshold(members):", "if False:"),
    Mutant(
        "signatures over anything",
        COHORT,
        "policy.member(each.name).identity.verify(each.signature, wire.CONFIRM_TAG, *signed)",
        "policy.member(each.name)",
    ),
    Mutant(
        "another federation or run",
        NODE,
        "if (epoch.federation, epoch.run) != (self._federation, self._run):",
        "if False:",
    ),
    Mutant(
        "an epoch again",
        NODE,
        "if epoch.number <= self._last_epoch:",
        "if epoch.number < self._last_epoch:",
    ),
    Mutant(
        "an attempt again in a new epoch",
        NODE,
        "if epoch.first <= self._last_attempt:",
        "if False:",
    ),
    Mutant(
        "restart forgets attempts",
        NODE,
        "max((attempt for _, attempt in outbox.used()), default=0)",
        "0",
    ),
    Mutant("a second U1", NODE, "        if state.cohort:\n", "        if False:\n"),
    Mutant(
        "keys of earlier epochs",
        NODE,
        "if self._seen_keys & {each.share_key, *each.mask_keys}:",
        "if False:",
    ),
    Mutant("the coordinator takes old keys", EPOCH, "        self._kept.check_keys(offer)\n", ""),
    Mutant(
        "keys are forgotten",
        LOG,
        '        self._keep_keys({"epoch"',
        '        self._take_keys({"epoch"',
    ),
    Mutant(
        "an offer brought twice is a lie",
        LOG,
        "if earlier != epoch and offer.name not in self.liars:",
        "if offer.name not in self.liars:",
    ),
    Mutant(
        "mask keys may be old",
        LOG,
        "for key in (offer.share_key, *offer.mask_keys)]",
        "for key in (offer.share_key,)]",
    ),
    Mutant(
        "a second U2",
        NODE,
        "if not state.cohort or state.own is None or state.dealers:",
        "if not state.cohort or state.own is None:",
    ),
    Mutant("an attempt twice", NODE, " or slot.attempt <= self._last_attempt:", ":"),
    Mutant(
        "a round twice without noise", NODE, "if not self._noised and any(", "if False and any("
    ),
    Mutant("a second U3", NODE, "        if attempt.signed:\n", "        if False:\n"),
    Mutant(
        "unmask without a confirmed list",
        NODE,
        "        if not attempt.signed:\n",
        "        if False:\n",
    ),
    Mutant("secrets stay after opening", NODE, "        del state.attempts[attempt_number]\n", ""),
    Mutant(
        "secrets of earlier attempts stay",
        NODE,
        "            del state.attempts[earlier]\n",
        "            pass\n",
    ),
    Mutant("s of survivors too", NODE, "[0 if name in attempt.survivors else 1]", "[1]"),
    Mutant("b of the dead", NODE, "[0 if name in attempt.survivors else 1]", "[0]"),
    Mutant(
        "the agreement is not looked at",
        NODE,
        "        cohort.check_agreement(\n            self._policy, confirmations,"
        " attempt.survivors, len(state.members), attempt.signed\n        )\n",
        "",
    ),
    Mutant(
        "no mask of one's own",
        NODE,
        "        masked.apply_mask(masks.seed_mask(attempt.seed, context, state.dealers),"
        " positive=True)\n",
        "",
    ),
    Mutant(
        "sealed shares are taken as they come",
        SHARES,
        "    commit.check_path(dealer.root, commit.leaf(hashes), place, len(state.members), path,"
        " where)\n",
        "",
    ),
    Mutant(
        "training before the checks",
        RUN,
        "        self.node.check(\n            stages.slot_of(plan, self._manifest.base_digest),"
        " self._encoding(plan.phase, size)\n        )\n",
        "",
    ),
    Mutant("the other half leaves", TURNS, "    if values[~mask].any():\n", "    if False:\n"),
    Mutant("noise on the whole phase", SHARED, "recipe_of(plan.round)", "phases[plan.phase]"),
    Mutant("any threshold rule", RUN, "if terms.threshold != cohort.THRESHOLD_RULE:", "if False:"),
    Mutant(
        "an attempt is trained again", RUN, "        if sent is not None:\n", "        if False:\n"
    ),
    Mutant("no range check at the node", NODE, "        encoding.check(len(state.members))\n", ""),
    Mutant(
        "late inputs",
        ATTEMPT,
        '        if self._survivors:\n            raise Refused(f"{where}: found it',
        '        if False:\n            raise Refused(f"{where}: found it',
    ),
    Mutant("an input twice", ATTEMPT, " or message.name in self._inputs:", ":"),
    Mutant(
        "inputs unsigned",
        ATTEMPT,
        "        self._listed.identities[message.name].verify(\n"
        "            message.signature, wire.INPUT_TAG, *message.signed()\n        )\n",
        "",
    ),
    Mutant("a liar's share", ATTEMPT, "if not as_signed and share != NO_SHARE:", "if False:"),
    Mutant(
        "a rebuilt seed is believed",
        ATTEMPT,
        "if commit.seed_hash(self._listed.cohort, name, attempt, seed) != expected:",
        "if False:",
    ),
    Mutant("unmask with fewer shares", ATTEMPT, "if len(shares) < t:", "if len(shares) < t - 1:"),
    Mutant(
        "noise as if all who stay were honest",
        SHARED,
        "carriers = cohort.threshold(members) - secure.max_colluders",
        "carriers = cohort.threshold(members)",
    ),
    Mutant(
        "more colluders than the others share for",
        SHARED,
        "if secure.max_colluders < colluders:",
        "if False:",
    ),
    Mutant(
        "fewer carriers than promised", SHARED, "if carriers < terms.carriers:", "if carriers < 2:"
    ),
    Mutant(
        "a cohort whose lists may be two",
        SHARED,
        "        cohort.check_colluders(members, secure.max_colluders)\n",
        "",
    ),
    Mutant("other coordinates", SHARED, "if noised != moved:", "if False:"),
    Mutant("no opt-in", PRIVACY, "if permits.client_level:", "if True:"),
    Mutant(
        "rounding is free",
        SKELLAM,
        "self.levels + math.sqrt(self.coordinates) / 2",
        "float(self.levels)",
    ),
    Mutant("releases are one", SKELLAM, "each.times * each.renyi", "each.renyi"),
    Mutant("Skellam is Gaussian", SKELLAM, "/ (2 * mu) + rest", "/ (2 * mu)"),
    Mutant("the clip is not checked", SKELLAM, "if not norm <= release.longest:", "if False:"),
    Mutant("a phase moves anything", SKELLAM, "if levels[~moved].any():", "if False:"),
    Mutant("an update that is no number", SKELLAM, "if not math.isfinite(norm):", "if False:"),
    Mutant("zero twice", SKELLAM, "self.middle - 1 - place", "self.middle - place"),
    Mutant("proposals below the probabilities", SKELLAM, "ratios.max())", "ratios.max()) - 0.3"),
    Mutant(
        "shares too small",
        SKELLAM,
        "return self.variance / carriers",
        "return self.variance / carriers**2",
    ),
    Mutant(
        "a record is charged as an institution",
        PRIVACY,
        "self.manifest.delta, 2)",
        "self.manifest.delta, 1)",
    ),
    Mutant("any bound", PRIVACY, "phase.clip != bound or phase.head_clip", "phase.head_clip"),
    Mutant("any carriers", SHARED, "if terms.carriers != carriers or", "if"),
    Mutant("no opt-in for records", RECORDS, "if permits.shared_noise:", "if True:"),
    Mutant("several steps before the noise", RECORDS, "if phase.steps != 1:", "if False:"),
    Mutant("any optimizer", RECORDS, 'if phase.optimizer != "sgd":', "if False:"),
    Mutant("two clips at once", RECORDS, "if phase.head_clip:", "if False:"),
    Mutant(
        "any levels of a clip",
        RECORDS,
        "if secure.update_bounds[place] != self.coordinate_bound(phase):",
        "if False:",
    ),
    Mutant("any grid", RECORDS, "if each.coarse\n", "if False\n"),
    Mutant("alone with others", RECORDS, "/ math.sqrt(carriers))", "/ 1)"),
    Mutant(
        "no largest cohort", RECORDS, "manifest.largest_cohort < manifest.minimum_cohort", "False"
    ),
    Mutant("larger cohorts", SHARED, "if 0 < self.manifest.largest_cohort < members:", "if False:"),
    Mutant("few honest peers", PROMISE, "few = peers is not None and peers < least", "few = False"),
    Mutant(
        "rounding of a sum is free",
        UNITS,
        "self.levels * (1 + ROOM) + math.sqrt(self.coordinates)",
        "float(self.levels)",
    ),
    Mutant("a draw hides all", UNITS, "terms + grown[: order - 1]", "terms"),
    Mutant("every draw is rare", UNITS, "+ some * math.log(rate)", "+ 2 * some * math.log(rate)"),
    Mutant(
        "fewer levels of a clip",
        UNITS,
        "math.ceil(levels / (CAPACITY * phase.expected_units))",
        "math.ceil(levels / (2 * CAPACITY * phase.expected_units))",
    ),
    Mutant(
        "noise that can't be drawn",
        SKELLAM,
        "        if rate <= LARGEST_RATE:\n",
        "        if True:\n",
    ),
    Mutant("no fewer levels", CALIBRATION, "        levels //= 2\n", "        levels = 0\n"),
    Mutant(
        "any number of mask keys", COHORT, "if len(offer.mask_keys) != epoch.count:", "if False:"
    ),
    Mutant(
        "spellings are organisations",
        COHORT,
        "folded(peer.organisation) for",
        "peer.organisation for",
    ),
    Mutant(
        "an epoch outlives a member's new key",
        NODE,
        "policy.peers.get(name) != before.get(name)",
        "name not in policy.peers",
    ),
    Mutant(
        "late offers",
        EPOCH,
        '        if self._cohort:\n            raise Refused("keys: found a late',
        '        if False:\n            raise Refused("keys: found a late',
    ),
    Mutant(
        "a second deal",
        EPOCH,
        "if deal.name not in self._offers or deal.name in self._deals:",
        "if deal.name not in self._offers:",
    ),
    Mutant(
        "confirmations unsigned",
        ATTEMPT,
        "        self._listed.identities[message.name].verify(\n"
        "            message.signature, wire.CONFIRM_TAG, *self._signed\n        )\n",
        "",
    ),
    Mutant(
        "openings unsigned",
        ATTEMPT,
        "        self._listed.identities[message.name].verify(message.signature, wire.OPENING_TAG,"
        " *signed)\n",
        "",
    ),
    Mutant(
        "openings signed without their shares",
        WIRE,
        "return (context, survivors, *parts_of(self)[:-1])",
        "return (context, survivors, *parts_of(self)[:-2])",
    ),
    Mutant(
        "an opener outside U3",
        ATTEMPT,
        "if message.name not in self._survivors or message.name in self._openers:",
        "if message.name in self._openers:",
    ),
    Mutant(
        "an opening twice",
        ATTEMPT,
        "if message.name not in self._survivors or message.name in self._openers:",
        "if message.name not in self._survivors:",
    ),
    Mutant(
        "openings of any length",
        ATTEMPT,
        "        wire.sized(message.shares, shamir.BYTES * len(self._listed.deals))\n",
        "",
    ),
    Mutant(
        "a rebuilt mask key is believed",
        ATTEMPT,
        "if pair.public != self._listed.offers[name].mask_keys[place]:",
        "if False:",
    ),
    Mutant(
        "c words suspect a dealer", ATTEMPT, "len(without) > colluders", "len(without) >= colluders"
    ),
    Mutant(
        "a word proves a lie",
        ATTEMPT,
        "            self._without[dealer].append(opener)\n",
        "            self._liars.add(dealer)\n",
    ),
    Mutant(
        "any cohort is asked",
        EPOCH,
        "if cohort.most_colluders(size) >= self._colluders:",
        "if True:",
    ),
    Mutant(
        "updates without noise leave as often",
        RUN,
        "noised = guarantee_of(manifest).private",
        "noised = True",
    ),
    Mutant(
        "the manifest's colluders do not count",
        RUNS,
        "max(limits.max_colluders, colluders),",
        "limits.max_colluders,",
    ),
)


def copy_to(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(source, folder / name)


def fails(folder: Path) -> bool:
    """Whether a test fails on the sources in `folder`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-m",
        "not chaos",
    ]
    paths = {
        "PYTHONPATH": f"{folder / '.typing'}{os.pathsep}{folder}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*command, *TESTS], cwd=folder, env={**os.environ, **paths}, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 1


def survivors() -> list[str]:
    """The mutants that no test sees."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_to(folder)
        if fails(folder):
            raise RuntimeError("the tests fail on the unchanged sources")
        alive = []
        for mutant in MUTANTS:
            path = folder / mutant.file
            text = path.read_text()
            if text.count(mutant.found) != 1:
                raise RuntimeError(
                    f"{mutant.name}: found its text {text.count(mutant.found)} times, expected once"
                )
            path.write_text(text.replace(mutant.found, mutant.put))
            killed = fails(folder)
            path.write_text(text)
            print(f"{'killed ' if killed else 'ALIVE  '} {mutant.name}", flush=True)
            if not killed:
                alive.append(mutant.name)
    return alive


if __name__ == "__main__":
    left = survivors()
    print(f"{len(MUTANTS) - len(left)} of {len(MUTANTS)} mutants killed")
    sys.exit(bool(left))
