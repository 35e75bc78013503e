"""One label of a public set to each record of another medium than text: to an image, say.

A record becomes values by the base's own processor, each record by itself and all in one shape.
What is learnt, measured and answered is as of texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedlora.common.data.free_memory import free_memory, shown
from fedlora.common.data.images import Images
from fedlora.common.data.media import MediaFile, media_file
from fedlora.common.data.medium import Floats, Medium
from fedlora.common.data.records import MEDIA, Columns, Records
from fedlora.common.data.sounds import Sounds
from fedlora.common.errors import BadInput
from fedlora.common.tasks.arrays import Values
from fedlora.common.tasks.classification import Classification
from fedlora.common.tasks.task import Named

MOST_BYTES = 64 << 30  # of all values of a data file, which stay in memory


@dataclass(frozen=True)
class MediaClassification(Classification):
    """Cross entropy of a record's label; which medium, a class says that extends it."""

    name: ClassVar[str]
    medium: ClassVar[Medium | None]

    @classmethod
    def columns(cls, named: Named) -> Columns:
        """The column that is named for the medium, and the column of labels."""
        key = cls._medium().name
        if not (column := getattr(named, key)):
            raise BadInput(
                f'[data] {key} = "": expected a column of bytes or of paths, since task ='
                f' "{cls.name}"'
            )
        return Columns("", media=column, label=named.label)

    def encode(self, records: Records, tokenizer: Any, max_length: int) -> Values:
        """Each record's values by the processor `tokenizer`; BadInput names who has none."""
        files, medium = records.parts[MEDIA], self._medium()
        asked = records.unanswered
        targets = self.no_targets(len(records)) if asked else self.targets_of(records)
        found, measures = np.zeros((0,), dtype=np.float32), []
        for row, file in enumerate(files):
            place = f"{records.place(row)} {medium.name} {file.name}"
            record = medium.decoded(file.data, place)
            values = _values(medium, record, tokenizer, place)
            if row == 0:
                found = _room(len(files), values, records.where)
            if values.shape != found.shape[1:]:
                raise BadInput(
                    f"{place}: found values of {values.shape}, expected {found.shape[1:]} as of"
                    " the records before: a base whose processor gives all records one shape"
                )
            found[row] = values
            measures.append(medium.measure(record))
        return Values(found, targets, max_length, medium.told(measures))

    def unlabelled(self, tokens: Any, offsets: Any) -> Values:
        """Values (n, …) of nobody's, each as long as the first of `offsets` says."""
        return Values(tokens, self.no_targets(len(tokens)), int(offsets[1]))

    def asked(self, inputs: Sequence[Any]) -> Records:
        """Bytes, or paths of files on this machine; BadInput for anything else."""
        name = self._medium().name
        files = [_asked(each, name, number) for number, each in enumerate(inputs, 1)]
        texts, where = [each.digest for each in files], self._medium().plural
        return Records(texts, None, None, None, {}, where, unanswered=True, parts={MEDIA: files})

    @classmethod
    def _medium(cls) -> Medium:
        if cls.medium is None:
            raise BadInput(f"task {cls.name}: found no medium, expected one")
        return cls.medium


@dataclass(frozen=True)
class ImageClassification(MediaClassification):
    """A label to an image."""

    name: ClassVar[str] = "image-classification"
    medium: ClassVar[Medium | None] = Images()


@dataclass(frozen=True)
class AudioClassification(MediaClassification):
    """A label to a sound."""

    name: ClassVar[str] = "audio-classification"
    medium: ClassVar[Medium | None] = Sounds()


def _asked(given: Any, name: str, number: int) -> MediaFile:
    if isinstance(given, bytes):
        return MediaFile(f"{len(given):,} bytes", given)
    if isinstance(given, str | Path):
        return media_file(Path(given))
    raise BadInput(
        f"{name} {number}: found {type(given).__name__}, expected bytes or the path of a file"
    )


def _values(medium: Medium, record: Any, reader: Any, place: str) -> Floats:
    """(…) finite float32; a processor's own faults are of this record."""
    try:
        values = medium.values(record, reader)
    except BadInput:
        raise
    except Exception as error:  # the library raises a dozen unrelated types
        raise BadInput(
            f"{place}: found what the base's processor can't read ({type(error).__name__})"
        ) from error
    if not np.isfinite(values).all():
        raise BadInput(f"{place}: found values that are not finite, expected numbers")
    return values


def _room(count: int, values: Floats, where: str) -> Floats:
    """(count, …) for values like these; BadInput where that is more than this machine has free.

    Here, where whoever reads records comes by: a run, a check of data, a loaded adapter.
    """
    free, needed = free_memory(), count * values.nbytes
    most = MOST_BYTES if free is None else min(free, MOST_BYTES)
    if needed > most:
        raise BadInput(
            f"{where}: found {count} records that take {shown(needed)} once read, expected at"
            f" most the {shown(most)} that are free"
        )
    return np.empty((count, *values.shape), dtype=np.float32)
