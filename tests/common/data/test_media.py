"""Records that are no text: where their bytes may lie, and what is refused, by file and row."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fedlora.common.data import media
from fedlora.common.data.images import Images
from fedlora.common.data.records import MEDIA, Columns, Records, read_records
from fedlora.common.data.sounds import Sounds
from fedlora.common.data.unit_names import unit_names
from fedlora.common.errors import BadInput
from tests.media import png, tone, wav

COLUMNS = Columns("", media="image", label="label")
RNG = np.random.default_rng(0)
RED, BLUE = png(RNG, 1), png(RNG, 0)


def read(folder: Path, *values: Any) -> Records:
    rows = (json.dumps({"image": value, "label": "a"}) for value in values)
    (folder / "t.jsonl").write_text("".join(row + "\n" for row in rows))
    return read_records(folder / "t.jsonl", COLUMNS, ("a", "b"))


def files(records: Records) -> list[tuple[str, bytes]]:
    return [(each.name, each.data) for each in records.parts[MEDIA]]


def test_a_column_holds_paths_bytes_or_both(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes(RED)
    paths = read(tmp_path, "in/red.png", {"bytes": None, "path": "in/red.png"})
    assert files(paths) == [("in/red.png", RED)] * 2
    both = [{"bytes": BLUE, "path": "/somewhere/else.png"}, {"bytes": RED, "path": None}]
    for column, names in ((both, ["else.png"]), ([BLUE, RED], [f"{len(BLUE):,} bytes"])):
        table = pyarrow.table({"image": column, "label": ["a", "b"]})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        found = read_records(tmp_path / "t.parquet", COLUMNS, ("a", "b"))
        assert files(found) == [(names[0], BLUE), (f"{len(RED):,} bytes", RED)]
    kept = found.take(np.array([1]))
    assert files(kept) == [(f"{len(RED):,} bytes", RED)] and kept.texts == [found.texts[1]]
    assert unit_names(found)[1] == unit_names(paths)[0]  # what it holds names it, not where it lies
    assert unit_names(found)[0] != unit_names(found)[1]


def test_shards_of_a_folder_name_images_beside_them(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, data in enumerate((RED, BLUE)):
        (tmp_path / "images" / f"{number}.png").write_bytes(data)
        table = pyarrow.table({"image": [f"images/{number}.png"], "label": ["a"]})
        pyarrow.parquet.write_table(table, tmp_path / f"shard-{number}.parquet")
    for path in (tmp_path, tmp_path / "*.parquet"):
        found = read_records(path, COLUMNS, ("a", "b"), root=tmp_path)
        assert files(found) == [("images/0.png", RED), ("images/1.png", BLUE)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("../out.png", '"../out.png", expected one inside here'),
        ("link.png", '"link.png", expected one inside here'),
        ("/etc/hostname", "expected one inside here"),
        ("gone.png", '"gone.png", expected a file'),
        ("", "found nothing, expected bytes, or the path of a file"),
        (None, "found nothing"),
        ({"bytes": None, "path": None}, "found nothing"),
        (7, "found int, expected bytes"),
        (["a.png"], "found list"),
        ("a\0b", "which can't be read"),
        ("a" * 5000, "can't be read|expected a file"),
    ],
)
def test_what_is_no_file_beside_the_table_is_refused(tmp_path: Path, value: Any, said: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for place in (tmp_path / "out.png", here / "good.png"):
        place.write_bytes(RED)
    (here / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(BadInput, match=said) as caught:
        read(here, "good.png", value)
    (fault,) = caught.value.faults
    assert fault.startswith("t.jsonl row 2 image: ") and len(fault) < 400


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    monkeypatch.setattr(media, "MAX_MEDIUM_BYTES", len(RED) - 1)
    with pytest.raises(BadInput, match=r'row 1 image "red.png": found more than'):
        read(tmp_path, "red.png")
    monkeypatch.setattr(media, "MAX_MEDIUM_BYTES", len(RED))
    monkeypatch.setattr(media, "MAX_FILE_BYTES", 2 * len(RED))
    assert len(read(tmp_path, "red.png", "red.png")) == 2
    with pytest.raises(BadInput, match=r"row 3 image: found more than .* bytes in all"):
        read(tmp_path, *["red.png"] * 3)


def bomb(wide: int, high: int) -> bytes:
    """A PNG of a few bytes that says it unpacks to so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no image", r"found no image that can be read \(UnidentifiedImageError\), expected PNG"),
        (RED[:200], "found no image that can be read"),
        (bomb(9000, 9000), r"found 9000 × 9000 pixels, expected at most 64,000,000"),
        (bomb(60_000, 60_000), "found far more pixels, expected at most"),
        (bomb(101, 1), r"found 101 × 1 pixels, .* no side more than 100 times as long"),
        (bomb(40, 60_000), r"found 40 × 60000 pixels, .* no side more than 100 times"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "found no image"),
    ],
    ids=["text", "cut off", "large", "bomb", "a strip", "an upright one", "a program"],
)
def test_what_is_no_image_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(BadInput, match="t.csv row 7 image: " + said):
        Images().decoded(data, "t.csv row 7 image")


def saved(image: Image.Image, kind: str, **more: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **more)
    return stream.getvalue()


def test_images_are_upright_and_of_three_colours() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    wide = Image.new("L", (8, 4), 200)
    for data, size in (
        (saved(wide, "PNG"), (8, 4)),
        (saved(wide, "JPEG", exif=turned), (4, 8)),
        (saved(wide.convert("P"), "PNG", transparency=b"\x00\x80"), (8, 4)),
        (saved(Image.new("RGBA", (8, 4), (9, 9, 9, 0)), "WEBP"), (8, 4)),
    ):
        image = Images().decoded(data, "here")
        assert (image.mode, Images().measure(image)) == ("RGB", size)


def test_sounds_are_one_channel_at_the_rate_of_the_base() -> None:
    class Reader:
        sampling_rate = 16_000

        def __call__(self, samples: Any, sampling_rate: int, return_tensors: str) -> Any:
            assert sampling_rate == 16_000
            return {"input_values": samples[None]}

    rng = np.random.default_rng(1)
    for rate in (8_000, 16_000, 44_100):
        sound = Sounds().decoded(wav(rng, 440, rate, channels=2), "here")
        seconds = len(sound.samples) / rate
        assert Sounds().measure(sound) == (seconds, rate) and sound.samples.ndim == 1
        found = Sounds().values(sound, Reader())
        expected = tone(440, seconds, 16_000)
        inner = slice(500, len(expected) - 500)  # a filter has no neighbours at the ends
        assert abs(len(found) - len(expected)) <= 1
        assert np.abs(found[: len(expected)] - expected)[inner].max() < 0.06


def test_what_is_no_sound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    with pytest.raises(BadInput, match=r"^t.csv row 7 audio: found no sound that can be read"):
        Sounds().decoded(RED, "t.csv row 7 audio")
    with pytest.raises(BadInput, match="found 1 channels of 500 samples a second"):
        Sounds().decoded(wav(rng, 40, 500), "here")
    empty = wav(rng, 440)[:44]
    with pytest.raises(BadInput, match=r"found no sample, expected|found no sound"):
        Sounds().decoded(empty[:40] + bytes(4), "here")
    monkeypatch.setattr("fedlora.common.data.sounds.MOST_SAMPLES", 1000)
    with pytest.raises(BadInput, match="found a longer sound, expected at most 600 seconds"):
        Sounds().decoded(wav(rng, 440), "here")


@pytest.mark.parametrize(
    ("read", "package", "extra"),
    [
        (lambda: Images().decoded(RED, ""), "PIL.Image", "images"),
        (lambda: Sounds().decoded(RED, ""), "soundfile", "audio"),
    ],
)
def test_a_missing_library_is_one_line(
    read: Callable[[], Any], package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(BadInput, match=rf"expected an installation with fedlora\[{extra}\]"):
        read()
