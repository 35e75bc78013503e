"""One organisation has one name: what looks like it is it, or is refused."""

from __future__ import annotations

import unicodedata

import pytest

from fedlora.common.errors import BadInput
from fedlora.common.trust.organisations import check_organisation, folded

NORTH = "Hospital North"
HONEST = (
    *(NORTH, "Süd-Klinik „Weiß“ & Söhne", "St. Mary’s", "Sağlık Bakanlığı İzmir", "Łódź 2"),
    *("Þjóð", "Bệnh viện Đà Nẵng", "Лікарня Київ", "Νοσοκομείο Αθηνών", "مستشفى الشمال 57357"),
    *(
        "בית חולים",
        "โรงพยาบาล",
        "अस्पताल",
        "மருத்துவமனை",
        "서울병원",
        "トウキョウ病院（第1）",
        "ガーデン",
    ),
)
# Each shows as NORTH does, or nearly: by U+, for a reader could not tell them apart either.
REFUSED = {
    "a filler": f"{NORTH}\u3164",
    "a half filler": f"{NORTH}\uffa0",
    "a selector": f"{NORTH}\ufe0f",
    "a joiner": "Hospital\u034f North",
    "a soft hyphen": "Hos\u00adpital North",
    "a blank of braille": "Hospital\u2800 North",
    "a space of another width": "Hospital\u2002North",
    "a Mongolian selector": "Hospital\u180b North",
    "a tag": f"{NORTH}\U000e0020",
    "an Armenian letter": "H\u0585spital North",
    "a Cherokee letter": "\u13bbospital North",
    "a letter of Lisu": "\ua4e7ospital North",
    "a Latin alpha": "Hospit\u0251l North",
    "a small capital": "Hospital N\u1d0frth",
    "a Cyrillic letter": "H\u043espital North",
    "a Greek word": "Hospital \u039f",
    "a digit of another script": "H\u0665spital North",
    "a letter of Han": "Hospita\u4e28 North",
    "a stroke through it": "Hospital\u0336 North",
}
# Allowed, each, and the same organisation.
SAME = (
    *("  hospital  NORTH ", "Hospital-North", "Hospital, North.", "Hospital \uff2eorth"),
    *(
        "Hosp\u0131tal North",
        "HospitaI North",
        "Hospita1 North",
        "Hospita| North",
        "H0spital North",
    ),
    *("Hospit\u1ea1l North", "Hospital No\u0301rth", "H\u00f8spital North", "Hospita\u0142 North"),
    *("H0spital North", "\U0001d407ospital North"),
)


@pytest.mark.parametrize("name", HONEST)
def test_names_of_many_scripts_are_allowed(name: str) -> None:
    check_organisation(name, "request organisation")
    check_organisation(unicodedata.normalize("NFD", name), "request organisation")
    assert folded(name) == folded(unicodedata.normalize("NFD", name)) == folded(name.upper())


def test_honest_names_differ() -> None:
    assert len({folded(name) for name in HONEST}) == len(HONEST)
    numbered = [f"site-{number}" for number in range(200)]
    assert len({folded(name) for name in numbered}) == 200


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED)
def test_what_looks_like_a_name_and_is_not_one_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"^request organisation: "):
        check_organisation(name, "request organisation")


@pytest.mark.parametrize("name", SAME, ids=ascii)
def test_what_is_allowed_and_looks_like_a_name_is_that_name(name: str) -> None:
    check_organisation(name, "request organisation")
    assert folded(name) == folded(NORTH)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u0410\u0422\u041e\u041c", "  aTom"),  # Cyrillic
        ("\u0391\u03a4\u039f\u039c", "atom"),  # Greek
        ("\u04c0\u0456\u043e\u043f", "lion"),
        ("Modern", "Modem"),
        ("\u0645\u0633\u062a\u0634\u0641\u0649", "\u0645\u0633\u062a\u0640\u0634\u0641\u06cc"),
        ("\u30ab\u30bf\u30ed", "\u529b\u5915\u53e3"),  # Kana, Han
        ("\u0e41\u0e1e\u0e17\u0e22\u0e4c", "\u0e40\u0e40\u0e1e\u0e17\u0e22\u0e4c"),  # Thai
        ("\u049a\u0430\u0437\u0430\u049b", "\u041a\u0430\u0437\u0430\u043a"),  # a letter's tail
    ],
)
def test_names_that_look_alike_are_one(one: str, other: str) -> None:
    """Else one organisation counts twice in a cohort."""
    for name in (one, other):
        check_organisation(name, "request organisation")
    assert folded(one) == folded(other) != folded(one + "s")


@pytest.mark.parametrize("name", ["", "...", "\u0301", "a" * 201, "two\nlines"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match=r"^request organisation: "):
        check_organisation(name, "request organisation")
