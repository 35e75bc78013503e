"""A released adapter with a head of this institution's own, or LoRA's B too: nothing is sent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.policy import Policy
from fedlora.client.service.data_sets import read_data
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.memory import check_fits
from fedlora.client.training.personal_adapter import PersonalAdapter, personal_adapter
from fedlora.client.training.personal_head import Personal, check_head, personal_head
from fedlora.client.training.step import PerSampleGradients
from fedlora.common.adapter.peft import export_adapter, load_adapter
from fedlora.common.adapter.released import Description, read_released, refuse_used
from fedlora.common.config.toml import shown
from fedlora.common.data.records import unit_groups
from fedlora.common.disk.files import write_text
from fedlora.common.errors import BadInput
from fedlora.common.model.compute import threads
from fedlora.common.model.features import FeatureCache, pooled_features
from fedlora.common.model.network import AdapterModel

NOTE = "personal.json"  # in the adapter's folder: what the head is, and what it is worth
WARNING = "trained on private records without noise: keep this folder as they are kept"
TOKENS = 2048  # of a micro-batch, where the policy leaves them open


def personalise(
    folder: NodeFolder, policy: Policy, adapter: Path, out: Path, data: str = "", lora: bool = False
) -> Personal | PersonalAdapter:
    """Fit a head on the policy's data set `data`, and write the adapter with it into `out`.

    With `lora` LoRA's B too. `out` is a new folder that this account alone can read. Where `data`
    is empty, the one data set that has the adapter's task and labels. BadInput says what does not
    fit.
    """
    description, _ = read_released(adapter)
    refuse_used(out)
    name = data or _data_set(policy, description)
    if name not in policy.data:
        known = ", ".join(policy.data)
        raise BadInput(f"--data {name}: found no such data set, expected one of {known}")
    if description.base_digest not in policy.bases:
        raise BadInput(
            f"{adapter}: found base {description.base_digest}, expected one of [bases] in"
            f" {folder.policy.name}"
        )
    base = str(folder.base(policy.bases[description.base_digest]))
    with threads(policy.trainer.threads):
        model = load_adapter(adapter, base).model
        check_head(model)
        training = _training(model, policy) if lora else None
        records = read_data(policy.data[name], folder.under(policy.data[name].path))
        encoded = model.encoded(records)
        client = ClientData(name, encoded, unit_groups(records.units, len(records)))
        features = pooled_features(model, encoded, client.units.records)
        given = client, features, model.state()
        found = personal_adapter(training, *given) if training else personal_head(model, *given)
    with _for_this_account_alone():
        settings = description.configs(base, str(adapter))
        export_adapter(model, found.state, *settings, description.seed, out)
        write_text(out / NOTE, json.dumps(found.figures | {"warning": WARNING}, indent=2) + "\n")
    return found


def _training(model: AdapterModel, policy: Policy) -> LocalTraining:
    """Steps without privacy on `model`; BadInput where the machine has no room for one."""
    tokens = max(policy.trainer.micro_batch_tokens, 0) or TOKENS
    if policy.trainer.checkpointing:
        model.recompute()
    check_fits(model, tokens, model.longest, packed=True, private=False, section="[trainer]")
    return LocalTraining(PerSampleGradients(model), FeatureCache(model), tokens)


def _data_set(policy: Policy, description: Description) -> str:
    """The one of the adapter's task and labels, whatever its unit."""
    asked = description.task, description.labels
    found = [name for name, each in policy.data.items() if each.serves[:2] == asked]
    if len(found) != 1:
        raise BadInput(
            f"[data]: found {len(found)} data sets for {shown(description.task)} with the adapter's"
            f" labels{': ' + ', '.join(found) if found else ''}, expected one, or --data"
        )
    return found[0]


@contextmanager
def _for_this_account_alone() -> Iterator[None]:
    """What is written meanwhile, others can't read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
