"""A configuration in parts: what each room of a run is given, so that none is given the whole.

`Terms` can change what is guaranteed and learnt, and are signed with the manifest; a
`NetworkRecipe` says what is trained. Where data lie, how rounds end and how fast a machine is are
parts of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedlora.common.config.schema import (
    AggregationConfig,
    Config,
    EvaluationConfig,
    FederationConfig,
    LoraConfig,
    ModelConfig,
    PrivacyConfig,
    TrainingConfig,
    open_fields,
)
from fedlora.common.errors import BadInput


@dataclass(frozen=True)
class Terms:
    """What a run asks of institutions: who takes part, what they compute, what is guaranteed."""

    seed: int
    unit: str  # the column that names the privacy unit; "" is the record
    federation: FederationConfig
    training: TrainingConfig
    privacy: PrivacyConfig
    evaluation: EvaluationConfig
    aggregation: AggregationConfig

    @classmethod
    def of(cls, config: Config, batches: str = "fixed") -> Terms:
        """As they are configured; with `batches` where the configuration leaves the choice.

        BadInput where more is left open: what rules have not chosen must not be signed.
        """
        if left := open_fields(config):
            raise BadInput(f"{', '.join(left)}: found nothing yet, expected a value in every place")
        training = config.training
        if training.batches == "auto":
            training = replace(training, batches=batches)
        return cls(
            config.seed,
            config.data.unit,
            config.federation,
            training,
            config.privacy,
            config.evaluation,
            config.aggregation,
        )


@dataclass(frozen=True)
class NetworkRecipe:
    """The frozen base, the adapter on it, and the seed that both begin with."""

    model: ModelConfig
    lora: LoraConfig
    seed: int
    head_phase: bool  # rounds come in which the head is trained by itself
    public_epochs: int = 0  # of public records, before the first round

    @classmethod
    def of(cls, config: Config) -> NetworkRecipe:
        """As it is configured."""
        training = config.training
        head, epochs = training.head_rounds > 0, max(0, training.public_epochs)
        return cls(config.model, config.lora, config.seed, head, epochs)
