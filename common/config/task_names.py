"""What a task may be called: this package's, and what others add to them; nothing is imported.

`common.tasks.known` knows what is behind a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fedlora.common.config.toml import Choice

# whose records are no text, and the key of [data] that names their column
MEDIA = {"image-classification": "image", "audio-classification": "audio"}
CLASSIFIED = ("sequence-classification", *MEDIA)  # one label to a record
MANY_LABELS = ("multi-label",)  # any number of labels to a record, each a question of its own
LABELLED = (*CLASSIFIED, *MANY_LABELS, "token-classification")
BY_WORD = ("token-classification",)  # answered word by word
LANGUAGES = ("causal-lm", "seq2seq")  # answered by the base's own scores of words
BUILT_IN = (*LABELLED, "regression", *LANGUAGES)
GROUP = "fedlora.tasks"
_added: set[str] = set()


def scale_labels(scale: Sequence[float]) -> tuple[str, ...]:
    """The two ends of a scale as a label set, in one spelling: 0 and 0.0 are the same."""
    return tuple(repr(float(end)) for end in scale)


@cache
def installed_tasks() -> dict[str, EntryPoint]:
    """What installed packages offer, by name."""
    return {each.name: each for each in entry_points(group=GROUP)}


def name_task(name: str) -> None:
    """Let configurations of this process name a task of its own."""
    _added.add(name)


class TaskName(Choice):
    """One of the tasks that have a name when it is asked for."""

    def __init__(self) -> None:
        """More may come to be known later."""

    @property
    def known(self) -> tuple[str, ...]:
        """This package's first."""
        return (*BUILT_IN, *sorted({*_added, *installed_tasks()} - {*BUILT_IN}))
