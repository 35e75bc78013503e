"""Many institutions on one machine: private federated fine-tuning, simulated.

```python
from fedlora.simulations import load_config, plan, simulate

config = load_config("ag_news", privacy={"epsilon": 3.0})
print(plan(config))  # σ, ε by round, minutes, bytes: before anything is spent

result = simulate(config, "runs/ag_news", on_round=print)
print(result.summary["accuracy"], result.epsilon, *result.statement, sep="\\n")
print(result.adapter.predict(["Oil prices rose on Monday."]))
```

The command line calls these functions. `fedlora.simulations.examples` shows a strategy and a
partition of one's own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.common.adapter.peft import LoadedAdapter, load_adapter
    from fedlora.common.config.schema import Config
    from fedlora.common.data.records import Records, UnitIndex
    from fedlora.common.model.state import AdapterState
    from fedlora.common.tasks.batch import Batch
    from fedlora.common.tasks.classification import SequenceClassification
    from fedlora.common.tasks.task import Task
    from fedlora.server.release.verify import verify_export as verify
    from fedlora.server.rounds.cohort import Cohort
    from fedlora.server.strategies.strategy import ServerState, Strategy
    from fedlora.simulations.engines.sequential import sequential
    from fedlora.simulations.experiments.checking import Check, check
    from fedlora.simulations.experiments.compare import Comparison, compare
    from fedlora.simulations.experiments.configuration import load_config
    from fedlora.simulations.experiments.federated_trainer import FederatedTrainer
    from fedlora.simulations.experiments.personalised import personalise
    from fedlora.simulations.experiments.planning import Plan, plan
    from fedlora.simulations.experiments.simulate import Result, simulate
    from fedlora.simulations.experiments.sweep import Sweep, sweep
    from fedlora.simulations.federation.run_folder import SimulatedRun
    from fedlora.simulations.options import Options

# Where each name comes from, when it is first asked for: torch is not loaded before it is needed.
FACE = {
    "load_config": "simulations.experiments.configuration",
    "Config": "common.config.schema",
    "check": "simulations.experiments.checking",
    "Check": "simulations.experiments.checking",
    "plan": "simulations.experiments.planning",
    "Plan": "simulations.experiments.planning",
    "simulate": "simulations.experiments.simulate",
    "Options": "simulations.options",
    "Result": "simulations.experiments.simulate",
    "compare": "simulations.experiments.compare",
    "Comparison": "simulations.experiments.compare",
    "FederatedTrainer": "simulations.experiments.federated_trainer",
    "personalise": "simulations.experiments.personalised",
    "sweep": "simulations.experiments.sweep",
    "Sweep": "simulations.experiments.sweep",
    "load_adapter": "common.adapter.peft",
    "LoadedAdapter": "common.adapter.peft",
    "verify": "server.release.verify:verify_export",
    # for a strategy, a partition, a cohort or a task of one's own
    "Task": "common.tasks.task",
    "Batch": "common.tasks.batch",
    "SequenceClassification": "common.tasks.classification",
    "Strategy": "server.strategies.strategy",
    "ServerState": "server.strategies.strategy",
    "AdapterState": "common.model.state",
    "Records": "common.data.records",
    "UnitIndex": "common.data.records",
    "Cohort": "server.rounds.cohort",
    "SimulatedRun": "simulations.federation.run_folder",
    "sequential": "simulations.engines.sequential",
}
__all__ = [
    "AdapterState",
    "Batch",
    "Check",
    "Cohort",
    "Comparison",
    "Config",
    "FederatedTrainer",
    "LoadedAdapter",
    "Options",
    "Plan",
    "Records",
    "Result",
    "SequenceClassification",
    "ServerState",
    "SimulatedRun",
    "Strategy",
    "Sweep",
    "Task",
    "UnitIndex",
    "check",
    "compare",
    "load_adapter",
    "load_config",
    "personalise",
    "plan",
    "sequential",
    "simulate",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, inside = FACE[name].partition(":")
    return getattr(import_module(f"fedlora.{module}"), inside or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
