"""Hugging Face's Trainer over a private federation: a fine-tuning script's own lines, kept.

    trainer = FederatedTrainer(model, arguments, train_dataset=…, eval_dataset=…, config=config)
    trainer.train()      # a private federation instead of a loop over all records
    trainer.evaluate()   # as ever, on the released adapter

`train` deals the records out to simulated institutions and trains there under the run's clip, noise
and ledger. What decides that is `config`: of Trainer's own arguments the folder counts, and no
learning rate, batch size or number of epochs. A subclass's `compute_loss`, or a
`compute_loss_func`, has to return a loss for each record, (n,), and is tried first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from fedlora.common.config.schema import Config
from fedlora.common.errors import BadInput
from fedlora.server.runs.metrics import Observe, nobody
from fedlora.simulations.experiments.simulate import Result, simulate
from fedlora.simulations.federation.record_loss import RecordLoss
from fedlora.simulations.options import DEFAULTS, Options


class FederatedTrainer(Trainer):
    """A Trainer for sequence classification whose `train` is a private federation.

    Records keep the columns of text and label that `config` names, beside their tokens; labels are
    0 to k-1. The model is one of PEFT with LoRA, whose base lies in a folder. `result` is the run
    that `train` left in the folder of the arguments.
    """

    def __init__(
        self,
        *arguments: Any,
        config: Config,
        options: Options = DEFAULTS,
        on_round: Observe = nobody,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        self._config, self._options, self._on_round = config, options, on_round
        self.result: Result | None = None

    def train(self, *arguments: Any, **named: Any) -> TrainOutput:
        """Train a federation, and put its adapter into `model`; BadInput lists what is wrong."""
        if arguments or named:
            raise BadInput("train: expected no argument; Options(resume=True) goes on with a run")
        self.result = simulate(
            self._settings(),
            Path(str(self.args.output_dir)),
            self._options,
            on_round=self._on_round,
            train=_rows(self.train_dataset, "train_dataset"),
            test=_rows(self.eval_dataset, "eval_dataset"),
            loss=self._own_loss(),
        )
        _put(self.model, self.result.folder / "adapter")
        summary = self.result.summary
        metrics = {name: summary[name] for name in ("epsilon", "loss", "accuracy")}
        return TrainOutput(int(summary["rounds"]), float(summary["loss"]), metrics)

    def _settings(self) -> Config:
        """The configuration, with the base, the adapter and the labels of the model."""
        model: Any = self.model
        config, lora = self._config, self._config.lora
        given = next(iter(getattr(model, "peft_config", {}).values()), None)
        if not isinstance(model, peft.PeftModel) or not isinstance(given, peft.LoraConfig):
            raise BadInput(f"model: found {type(model).__name__}, expected one of PEFT with LoRA")
        named = given.target_modules or ()
        targets = (named,) if isinstance(named, str) else tuple(sorted(named))
        lora = replace(lora, rank=given.r, alpha=float(given.lora_alpha), targets=targets)
        labels = tuple(str(number) for number in range(model.config.num_labels))
        base = str(model.config._name_or_path)
        return replace(
            config,
            lora=lora,
            model=replace(config.model, base=base, pooling="default"),
            data=replace(config.data, labels=labels),
        )

    def _own_loss(self) -> RecordLoss | None:
        """None where the loss is transformers' own: the task's."""
        given = self.compute_loss_func
        if type(self).compute_loss is Trainer.compute_loss and given is None:
            return None

        def loss(scores: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            found: Any = self.compute_loss(_Scored(scores, inputs), dict(inputs))
            losses: torch.Tensor = found[0] if isinstance(found, tuple) else found
            return losses

        loss.__name__ = getattr(given, "__name__", f"{type(self).__name__}.compute_loss")
        return loss


class _Scored(torch.nn.Module):
    """Stands for the model in `compute_loss`: its scores are there, of these inputs alone."""

    def __init__(self, scores: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._scores, self._inputs = scores, inputs

    def forward(self, **given: Any) -> Any:
        """The scores as transformers returns them; BadInput for any other inputs."""
        named = {name: each for name, each in given.items() if isinstance(each, torch.Tensor)}
        if any(each is not self._inputs.get(name) for name, each in named.items()):
            raise BadInput("compute_loss: found a model that is called on other inputs than given")
        return _Outputs(logits=self._scores)


class _Outputs(SimpleNamespace):
    """`outputs.logits`, `outputs["logits"]` and `outputs[0]`, as in transformers."""

    def __getitem__(self, key: str | int) -> Any:
        return self.logits if key == 0 else getattr(self, str(key))


def _rows(dataset: Any, name: str) -> list[Mapping[str, Any]]:
    """A dataset's records as rows; BadInput where there are none."""
    if dataset is None or isinstance(dataset, dict):
        raise BadInput(f"{name}: found {type(dataset).__name__}, expected records")
    return [dataset[number] for number in range(len(dataset))]


def _put(model: Any, adapter: Path) -> None:
    """The released adapter's values into a model of PEFT."""
    weights = peft.load_peft_weights(str(adapter), device="cpu")
    peft.set_peft_model_state_dict(model, weights)
