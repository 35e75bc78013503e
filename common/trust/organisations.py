"""What an organisation may be called, and which names a person would take for one another.

What is allowed is listed, for what looks alike can't be: letters of one script of a short list,
the digits 0 to 9, white space and plain punctuation. Within that, names are compared by a skeleton
(after Unicode's UTS 39): without case, marks and punctuation, and one letter for those that look
like it, of the same script or of another. Else one organisation could count twice in a cohort.
"""

from __future__ import annotations

import unicodedata

from fedlora.common.codec.invisible import is_invisible
from fedlora.common.errors import BadInput

MAX_LETTERS = 200

# By the first word of a character's name in Unicode. Chinese and Japanese are one here.
_SCRIPTS = {
    **{each: each.capitalize() for each in ("LATIN", "GREEK", "CYRILLIC", "ARABIC", "HEBREW")},
    **{each: each.capitalize() for each in ("DEVANAGARI", "BENGALI", "TAMIL", "TELUGU", "THAI")},
    **dict.fromkeys(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA"), "Han or Kana"),
    **{"KATAKANA-HIRAGANA": "Han or Kana", "HANGUL": "Hangul", "GEORGIAN": "Georgian"},
}
# Latin letters beside those that are ASCII without their marks, and what they look like.
_LATIN = {"ð": "d", "ı": "i", "þ": "p", "æ": "ae", "œ": "oe", "ß": "ss"}
_PUNCTUATION = frozenset("""!"#$%&'()*+,-./:;<=>?@[]_|‐–—‘’‚“”„«»‹›·•،、。「」§©®°ʻʼ־׳״""")

# Letters that look like a Latin one, in the case in which they do.
_CYRILLIC = dict(
    zip("авекмнорстухіјѕԁԛԝһгпиьүӏѵѡшзбч", "abekmhopctyxijsdqwhrnubylvww3b4", strict=True)
)
_GREEK = dict(zip("αβεζηικμνορτυχγσω", "abezhikmnoptyxyow", strict=True))
_KANA = dict(zip("ロニカタエトハヘーノチミオリ", "口二力夕工卜八へ一丿千三才り", strict=True))
_ARABIC = dict(zip("ىیېےکڪہھەٱ", "ييييككههها", strict=True)) | {"ـ": ""}
_ONE_STROKE = dict.fromkeys("i1|", "l") | {"0": "o"}
_ALIKE = str.maketrans(
    {a: _ONE_STROKE.get(b, b) for a, b in (_LATIN | _CYRILLIC | _GREEK).items()}
    | (_ONE_STROKE | _KANA | _ARABIC)
)
_PAIRS = (("rn", "m"), ("vv", "w"), ("เเ", "แ"), ("अा", "आ"))


def folded(organisation: str) -> str:
    """The same for all names that a person would take for `organisation`; some others too."""
    text = unicodedata.normalize("NFKD", organisation).casefold()
    text = "".join(map(_plain, unicodedata.normalize("NFKD", text))).translate(_ALIKE)
    shown = (each for each in text if not (_is_accent(each) or is_invisible(each)))
    words = "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in shown)
    for pair, one in _PAIRS:
        words = words.replace(pair, one)
    return " ".join(words.split())


def check_organisation(text: str, where: str) -> None:
    """BadInput unless `text` is a name of letters of one script; `where` is file and field."""
    if not 0 < len(text) <= MAX_LETTERS or not text.isprintable():
        raise BadInput(f"{where}: expected 1 to {MAX_LETTERS} printable characters")
    plain = unicodedata.normalize("NFKD", text)
    for each in (*text, *plain):
        if is_invisible(each) or not _is_allowed(each):
            raise BadInput(
                f"{where}: found U+{ord(each):04X} ({unicodedata.name(each, 'unnamed').lower()}),"
                f" expected letters of {', '.join(dict.fromkeys(_SCRIPTS.values()))}, digits 0 to"
                " 9, spaces and plain punctuation"
            )
    scripts = sorted({_script(each) for each in plain} - {""})
    if len(scripts) > 1:
        raise BadInput(f"{where}: found {' and '.join(scripts)} letters, expected one script")
    if not folded(text):
        raise BadInput(f"{where}: found no letter and no digit, expected a name")


def _is_allowed(char: str) -> bool:
    """Whether a character, or what it is composed of, may stand in a name."""
    plain = unicodedata.normalize("NFKD", char)
    if plain != char:
        return all(_is_allowed(each) for each in plain)
    if char.isascii():
        return char.isalnum() or char == " " or char in _PUNCTUATION
    kind, script = unicodedata.category(char), _script(char)
    if script == "Latin":
        return _plain(char).isascii() or char.lower() in _LATIN
    return char in _PUNCTUATION or _is_accent(char) or (kind[0] in "LM" and script != "")


def _is_accent(char: str) -> bool:
    """Whether it is a mark above or below a letter, and no letter of its own, as Thai's vowels."""
    place = unicodedata.combining(char)
    return 10 <= place < 36 or place >= 200


def _script(char: str) -> str:
    """Of the scripts above the one that a letter, or a mark of one script alone, belongs to."""
    if unicodedata.category(char)[0] not in "LM":
        return ""
    named = unicodedata.name(char, "").removeprefix("COMBINING ")
    return _SCRIPTS.get(named.partition(" ")[0], "")


def _plain(char: str) -> str:
    """A letter without the stroke, hook or tail that its name in Unicode ends with."""
    named, extra, _ = unicodedata.name(char, "").partition(" WITH ")
    try:
        return unicodedata.lookup(named) if extra else char
    except KeyError:  # there is none without
        return char
