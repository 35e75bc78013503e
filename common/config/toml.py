"""Strict TOML for frozen dataclasses: types, bounds and names are checked, every fault at once.

What a value may be is a `Rule` in its field's metadata. A fault names the file (or the `--set`
option that brought the value), section, key, what was found and what was expected, on one line
whatever the file holds.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from fedlora.common.codec.strict import NOUNS, converted, is_kind, noun_of
from fedlora.common.errors import BadInput
from fedlora.common.terminal import one_line

AUTO = "auto"  # what is written for a value that a rule is to choose
UNDECIDED = -1  # what stands for it where the field's type is a number


class Rule(Protocol):
    """What a field may be beyond its type."""

    def expected(self, noun: str) -> str:
        """The end of 'expected …'; `noun` is the name of the type."""

    def fault(self, value: Any, noun: str) -> str:
        """What is wrong with a value of the right type, or ""."""


@dataclass(frozen=True)
class Bounds(Rule):
    """A number from `low` to `high`, each end left out where it is open.

    `text` is of a string: one comes here only where the field's type allows it instead of a number.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    text: Rule | None = None

    def expected(self, noun: str) -> str:
        low = f"{noun} {'>' if self.open_low else '>='} {_end(self.low)}"
        high = f" and {'<' if self.open_high else '<='} {_end(self.high)}"
        return low + high * math.isfinite(self.high)

    def fault(self, value: Any, noun: str) -> str:
        if isinstance(value, str):
            return self.text.fault(value, noun) if self.text else ""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return "" if above and below else f"expected {self.expected(noun)}"  # nan compares false


@dataclass(frozen=True)
class Choice(Rule):
    """One of `known`. `elsewhere`: what to say of names that one may look for here."""

    known: tuple[str, ...]
    elsewhere: tuple[tuple[str, str], ...] = ()

    def expected(self, noun: str) -> str:
        return f"one of {', '.join(self.known)}"

    def fault(self, value: Any, noun: str) -> str:
        if value in self.known:
            return ""
        said = dict(self.elsewhere).get(value) if isinstance(value, str) else None
        hint = f"; {said}" if said else suggestion(str(value), self.known)
        return f"expected {self.expected(noun)}{hint}"


@dataclass(frozen=True)
class Pattern(Rule):
    """A string that matches a regular expression; `what` says so in words."""

    pattern: str
    what: str

    def expected(self, noun: str) -> str:
        return self.what

    def fault(self, value: Any, noun: str) -> str:
        return "" if re.fullmatch(self.pattern, value) else f"expected {self.what}"


@dataclass(frozen=True)
class Each(Rule):
    """A list of at least `shortest` items that each keep `rule`, none twice unless it says so."""

    rule: Rule
    shortest: int = 0
    distinct: bool = True

    def expected(self, noun: str) -> str:
        return f"a list, each {self.rule.expected(noun)}"

    def fault(self, value: Any, noun: str) -> str:
        if len(value) < self.shortest:
            return f"found {len(value)} items, expected at least {self.shortest}"
        if self.distinct and len(set(value)) != len(value):
            return "found an item twice, expected each once"
        faults = [(item, self.rule.fault(item, noun)) for item in value]
        return next(
            (f"found {shown(item)}, {fault} in each place" for item, fault in faults if fault), ""
        )


@dataclass(frozen=True)
class Table:
    """Parsed TOML and where it came from; `overridden`: the `section.key` paths `--set` brought."""

    values: Mapping[str, Any]
    where: str
    overridden: frozenset[str] = frozenset()

    def place(self, section: str, key: str) -> str:
        """Where a person finds the value."""
        path = f"{section}.{key}" if section else key
        if path in self.overridden:
            return f"--set {path}"
        inside = sorted(each for each in self.overridden if each.startswith(f"{path}."))
        if inside:  # of a section that no file has
            return f"--set {inside[0]}"
        return f"{self.where} [{section}] {_key(key)}" if section else f"{self.where} {_key(key)}"


def read_table(text: str, where: str, overrides: Sequence[str] = ()) -> Table:
    """Parse TOML and lay `section.key=VALUE` overrides over it; VALUE is TOML, or else a string."""
    try:
        values = tomllib.loads(text)
    # ValueError: an integer of more than 4,300 digits too
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: found no TOML ({one_line(str(error), 200)})") from error
    faults = [fault for fault in (_override(values, override) for override in overrides) if fault]
    if faults:
        raise BadInput(faults)
    paths = (override.partition("=")[0].strip() for override in overrides)
    return Table(values, where, frozenset(paths))


def read_fields(cls: type[Any], table: Table) -> tuple[Any, dict[str, str]]:
    """An instance of `cls`, defaults for wrong values, and the faults by `section.key`."""
    return _section(cls, cls, table.values, table, "")


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean "x"?`, or nothing."""
    close = difflib.get_close_matches(name[:80], list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def shown(value: Any) -> str:
    """A value from a file as TOML would write it, on one line of at most 80 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        text = hex(value)  # Python refuses to write out very long decimals
    elif isinstance(value, str | bool | int | float):
        text = literal(value)
    elif isinstance(value, list):
        text = (
            "["
            + ", ".join(shown(item) for item in value[:20])
            + (", …" if len(value) > 20 else "")
            + "]"
        )
    else:
        text = f"a {'table' if isinstance(value, Mapping) else type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def to_toml(config: Any) -> str:
    """A nested dataclass as TOML: scalars first, then a table for each section."""
    plain, sections = [], []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            sections.append(f"\n[{field.name}]\n{to_toml(value)}")
        else:
            plain.append(f"{field.name} = {literal(AUTO if undecided(field, value) else value)}\n")
    return "".join(plain + sections)


def undecided(field: Field[Any], value: Any) -> bool:
    """Whether a field that a rule may choose is left to it."""
    return bool(field.metadata.get("auto")) and value in (AUTO, UNDECIDED)


def literal(value: Any) -> str:
    """A scalar or a tuple of scalars as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_escaped(letter) for letter in value) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(literal(each) for each in value) + "]"
    return repr(value.item() if hasattr(value, "item") else value)  # a number of NumPy's


def check_rules(section: Any, where: str) -> list[str]:
    """What is wrong with a section's values that did not come through TOML: one line to a fault."""
    faults = []
    for each in fields(section):
        value, rule = getattr(section, each.name), each.metadata.get("rule")
        fault = rule.fault(value, NOUNS.get(type(value), "a value")) if rule is not None else ""
        if fault:
            found = [*value] if isinstance(value, tuple) else value
            faults.append(f"{where} {each.name} = {shown(found)}: {fault}")
    return faults


def _section(
    root: type[Any], cls: type[Any], values: Mapping[str, Any], table: Table, section: str
) -> tuple[Any, dict[str, str]]:
    known = {field.name: field for field in fields(cls)}
    faults = {
        f"{section}.{name}": f"{table.place(section, name)}: unknown key{_meant(root, name, known)}"
        for name in values
        if name not in known
    }
    right, kinds = {}, get_type_hints(cls)
    for name, field in known.items():
        if name not in values:
            continue
        kind, path = kinds[name], f"{section}.{name}".lstrip(".")
        if field.metadata.get("one") and isinstance(values[name], str):
            values = {**values, name: [values[name]]}  # one item, written without brackets
        if is_dataclass(kind):
            right[name], inner = _subsection(root, kind, values[name], table, name)
            faults |= inner
        elif field.metadata.get("auto") and values[name] == AUTO:
            right[name] = AUTO if kind is str else kind(UNDECIDED)
        elif fault := _fault(kind, values[name], field.metadata.get("rule")):
            faults[path] = f"{table.place(section, name)} = {shown(values[name])}: {fault}"
        else:
            right[name] = (
                tuple(values[name]) if get_origin(kind) is tuple else converted(values[name], kind)
            )
    return cls(**right), faults


def _subsection(
    root: type[Any], kind: Any, value: Any, table: Table, name: str
) -> tuple[Any, dict[str, str]]:
    if isinstance(value, Mapping):
        return _section(root, kind, value, table, name)
    return kind(), {name: f"{table.place('', name)} = {shown(value)}: expected a section [{name}]"}


def _fault(kind: Any, value: Any, rule: Rule | None) -> str:
    """What is wrong with a value, or ""."""
    noun = noun_of(kind)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        if not isinstance(value, list) or not all(is_kind(each, item) for each in value):
            return f"expected a list, each {noun}"
    elif not is_kind(value, kind):
        others = "".join(f" or {NOUNS[each]}" for each in get_args(kind)[1:])
        return f"expected {rule.expected(noun) if rule else noun}{others}"
    return rule.fault(value, noun) if rule else ""


def _meant(root: type[Any], name: str, known: Mapping[str, Any]) -> str:
    """A key of the same section that looks alike, or the section where such a key belongs."""
    if close := suggestion(name, known):
        return close
    homes = {field.name: get_type_hints(root)[field.name] for field in fields(root)}
    for section, kind in homes.items():
        if is_dataclass(kind) and name in {field.name for field in fields(kind)}:
            return f"; did you mean [{section}] {name}?"
    return f"; did you mean {name}, before the first section?" if name in homes else ""


def _override(values: dict[str, Any], override: str) -> str:
    """Lay one override over the table; what is wrong with it, or ""."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > 2:
        return f"--set {shown(override)}: expected section.key=VALUE"
    target = values if len(keys) == 1 else values.setdefault(keys[0], {})
    if not isinstance(target, dict):
        return (
            f"--set {shown(override)}: found {keys[0]} = {shown(target)}, expected a section"
            f" [{keys[0]}]"
        )
    target[keys[-1]] = _override_value(text)
    return ""


def _override_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name) else shown(name)


def _end(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    return f"\\u{ord(letter):04x}" if not letter.isprintable() and ord(letter) <= 0xFFFF else letter
