"""Sounds, unpacked by libsndfile: one channel, at the rate that the base was trained for.

A file of several channels is their mean. Another rate is changed to the base's own, by a polyphase
filter: it says nothing of the sound. How much is unpacked is bounded, whatever a header says.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import numpy as np
from scipy.signal import resample_poly

from fedlora.common.data.medium import Floats
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library

MOST_SECONDS = 600
MOST_SAMPLES = 1 << 26  # of all channels
RATES = (1_000, 384_000)  # samples a second
MOST_CHANNELS = 16


@dataclass(frozen=True, eq=False)
class Sound:
    """(samples,) float32 between -1 and 1, `rate` of them a second."""

    samples: Floats
    rate: int


class Sounds:
    """As a base's feature extractor takes them."""

    name: ClassVar[str] = "audio"
    plural: ClassVar[str] = "sounds"
    given: ClassVar[str] = "input_values"
    package: ClassVar[str] = "soundfile"
    extra: ClassVar[str] = "audio"

    def decoded(self, data: bytes, place: str) -> Sound:
        """WAV, FLAC, OGG or MP3; BadInput where it is none, empty or out of bounds."""
        soundfile = library(self.package, self.extra)
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                rate, channels = int(file.samplerate), int(file.channels)
                most = min(MOST_SECONDS * rate, MOST_SAMPLES // max(1, channels))
                sane = RATES[0] <= rate <= RATES[1] and channels <= MOST_CHANNELS
                found = file.read(most + 1, dtype="float32", always_2d=True) if sane else None
        except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"{place}: found no sound that can be read ({type(error).__name__}), expected WAV,"
                " FLAC, OGG or MP3"
            ) from error
        if found is None:
            raise BadInput(
                f"{place}: found {channels} channels of {rate} samples a second, expected at most"
                f" {MOST_CHANNELS} of {RATES[0]} to {RATES[1]}"
            )
        if not 0 < len(found) <= most:
            length = "no sample" if not len(found) else "a longer sound"
            raise BadInput(
                f"{place}: found {length}, expected at most {MOST_SECONDS} seconds, and"
                f" {MOST_SAMPLES:,} samples of all channels"
            )
        return Sound(found.mean(axis=1), rate)

    def measure(self, record: Sound) -> tuple[float, ...]:
        """Seconds, and samples a second."""
        return len(record.samples) / record.rate, record.rate

    def values(self, record: Sound, reader: Any) -> Floats:
        """(…) float32, as the extractor shapes them."""
        rate, samples = int(reader.sampling_rate), record.samples
        if record.rate != rate:
            common = gcd(rate, record.rate)
            wide = samples.astype(np.float64)
            samples = resample_poly(wide, rate // common, record.rate // common).astype(np.float32)
        found = reader(samples, sampling_rate=rate, return_tensors="np")[self.given][0]
        return np.asarray(found, dtype=np.float32)

    def blanks(self, reader: Any) -> Sequence[Sound]:
        """Silence of half a second, and of one."""
        rate = int(reader.sampling_rate)
        return [Sound(np.zeros(count, dtype=np.float32), rate) for count in (rate // 2, rate)]

    def told(self, measures: Sequence[tuple[float, ...]]) -> str:
        """The least and the most of both."""
        seconds, rates = zip(*measures, strict=True)
        return (
            f"sounds: {min(seconds):.2f} to {max(seconds):.2f} seconds long, {min(rates):g} to"
            f" {max(rates):g} samples a second"
        )
