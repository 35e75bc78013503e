"""Code points that show nothing: two names that differ in them alone look the same to a person."""

from __future__ import annotations

import unicodedata

_OTHERS = (  # beside control and format characters: marks, letters and a symbol without ink,
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),  # and what Unicode lets a program ignore once it is assigned
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)


def is_invisible(char: str) -> bool:
    """Whether one code point shows nothing, and no space either: white space is no such."""
    if char.isspace():
        return False
    if unicodedata.category(char) in ("Cc", "Cf"):
        return True
    return any(first <= ord(char) <= last for first, last in _OTHERS)
