"""Which tasks there are: those of this package, of this process, and of what is installed.

A package offers its own under the entry point `fedlora.tasks`, a program by `use_task`. A name is
resolved here alone; what an institution trains its policy names first.
"""

from __future__ import annotations

from typing import cast

from fedlora.common.config.task_names import BUILT_IN, installed_tasks, name_task
from fedlora.common.errors import BadInput
from fedlora.common.tasks.causal_lm import CausalLanguageModel
from fedlora.common.tasks.classification import SequenceClassification
from fedlora.common.tasks.media_classification import AudioClassification, ImageClassification
from fedlora.common.tasks.multi_label import MultiLabel
from fedlora.common.tasks.regression import Regression
from fedlora.common.tasks.seq2seq import SequenceToSequence
from fedlora.common.tasks.task import Task, TaskKind
from fedlora.common.tasks.token_classification import TokenClassification

TASKS: dict[str, TaskKind] = {
    "sequence-classification": SequenceClassification,
    "image-classification": ImageClassification,
    "audio-classification": AudioClassification,
    "multi-label": MultiLabel,
    "token-classification": TokenClassification,
    "regression": Regression,
    "causal-lm": CausalLanguageModel,
    "seq2seq": SequenceToSequence,
}


def task_kind(name: str) -> TaskKind:
    """The task that a configuration, policy or manifest names; BadInput where it names none."""
    if name not in TASKS:
        offered = installed_tasks()
        if name not in offered:
            known = ", ".join(sorted({*TASKS, *offered}))
            raise BadInput(f"task: found {name!r}, expected one of {known}")
        use_task(cast(TaskKind, offered[name].load()), name)
    return TASKS[name]


def task_named(name: str, labels: tuple[str, ...]) -> Task:
    """The task of that name for a public label set; BadInput where there is none."""
    return task_kind(name)(labels)


def use_task(kind: TaskKind, name: str = "") -> None:
    """Know a task of one's own in this process, by its own name.

    BadInput where the name is one of this package's, or not the one that is expected.
    """
    if kind.name in BUILT_IN or (name and kind.name != name):
        raise BadInput(f"task: found the name {kind.name!r}, expected {name or 'a new one'}")
    TASKS[kind.name] = kind
    name_task(kind.name)
