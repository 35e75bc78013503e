"""Images, unpacked by Pillow: as RGB, upright, within bounds, of formats that hold pictures alone.

How large an image is, its header says: one that would unpack to more than `MOST_PIXELS` is refused
before it is unpacked. So is a strip: a processor that makes the shorter side as long as its base's
makes the other one longer by as much, and of one line of a few bytes more than any machine holds.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fedlora.common.data.medium import Floats
from fedlora.common.errors import BadInput
from fedlora.common.libraries import library

MOST_PIXELS = 64_000_000
MOST_RATIO = 100  # of the longer side to the shorter one
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


class Images:
    """As a base's image processor takes them; of several pictures in one file the first."""

    name: ClassVar[str] = "image"
    plural: ClassVar[str] = "images"
    given: ClassVar[str] = "pixel_values"
    package: ClassVar[str] = "PIL.Image"
    extra: ClassVar[str] = "images"

    def decoded(self, data: bytes, place: str) -> Any:
        """A `PIL.Image`, RGB, turned as its camera was held."""
        pillow, turned = library(self.package, self.extra), library("PIL.ImageOps", self.extra)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are bounded here, and of palettes
            try:
                with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
                    if _is_bounded(*image.size):
                        return turned.exif_transpose(image).convert("RGB")
                    size = f"{image.width} × {image.height} pixels"
            except pillow.DecompressionBombError:
                size = "far more pixels"
            except Exception as error:  # decoders raise a dozen unrelated types
                raise BadInput(
                    f"{place}: found no image that can be read ({type(error).__name__}), expected"
                    f" {', '.join(FORMATS)}"
                ) from error
        raise BadInput(
            f"{place}: found {size}, expected at most {MOST_PIXELS:,}, and no side more than"
            f" {MOST_RATIO} times as long as the other"
        )

    def measure(self, record: Any) -> tuple[float, ...]:
        """Width and height in pixels."""
        return record.width, record.height

    def values(self, record: Any, reader: Any) -> Floats:
        """(channels, height, width) float32."""
        found = reader(images=record, return_tensors="np")[self.given][0]
        return np.asarray(found, dtype=np.float32)

    def blanks(self, reader: Any) -> Sequence[Any]:
        """A square, and one that is none."""
        pillow = library(self.package, self.extra)
        return [pillow.new("RGB", size) for size in ((64, 64), (96, 80))]

    def told(self, measures: Sequence[tuple[float, ...]]) -> str:
        """The least and the most of each side."""
        wide, high = zip(*measures, strict=True)
        return f"images: {min(wide)} to {max(wide)} pixels wide, {min(high)} to {max(high)} high"


def _is_bounded(width: int, height: int) -> bool:
    return (
        0 < width * height <= MOST_PIXELS and max(width, height) <= min(width, height) * MOST_RATIO
    )
