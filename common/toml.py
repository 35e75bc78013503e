"""Strict TOML for frozen dataclasses: types, bounds and names are checked, every fault at once."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from fedlora.common.errors import BadInput


@dataclass(frozen=True)
class Bounds:
    """A number from `low` to `high`; `open_low` leaves `low` itself out."""

    low: float
    high: float
    open_low: bool = False

    def fault(self, value: Any) -> str:
        if (self.low < value if self.open_low else self.low <= value) and value <= self.high:
            return ""
        sign = ">" if self.open_low else ">="
        return f"expected a finite number {sign} {self.low:g} and <= {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of `known`; a name in `later` is refused as not built yet."""

    known: tuple[str, ...]
    later: tuple[str, ...] = ()

    def fault(self, value: Any) -> str:
        if value in self.known:
            return ""
        if value in self.later:
            return f"not built yet; expected one of {', '.join(self.known)}"
        return f"expected one of {', '.join(self.known)}{suggestion(str(value), self.known)}"


def read_table(text: str, where: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Parse TOML and lay `section.key=VALUE` overrides over it; VALUE is TOML, or else a string."""
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadInput(f"{where}: not TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    return table


def section_faults(cls: type[Any], table: Mapping[str, Any], where: str, section: str = "") -> tuple[Any, list[str]]:
    """An instance of `cls` from a table, or None, and the faults that were found."""
    hints, values, faults = get_type_hints(cls), {}, []
    known = {field.name: field for field in fields(cls)}
    place = f"{where} [{section}]" if section else where
    for name in table:
        if name not in known:
            faults.append(f"{place} {name}: unknown key{suggestion(name, known)}")
    for name, field in known.items():
        if name not in table:
            continue
        kind = hints[name]
        if is_dataclass(kind):
            if isinstance(table[name], Mapping):
                values[name], more = section_faults(kind, table[name], where, name)  # type: ignore[arg-type]
                faults += more
            else:
                faults.append(f"{place} {name} = {table[name]!r}: expected a section [{name}]")
            continue
        values[name], fault = _value(kind, table[name], field.metadata.get("rule"))
        if fault:
            faults.append(f"{place} {name} = {_shown(table[name])}: {fault}")
    return (None if faults else cls(**values)), faults


def suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean "x"?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def to_toml(config: Any) -> str:
    """A nested dataclass as TOML: scalars first, then a table for each section."""
    plain, sections = [], []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            sections.append(f"\n[{field.name}]\n{to_toml(value)}")
        else:
            plain.append(f"{field.name} = {_literal(value)}\n")
    return "".join(plain + sections)


def _value(kind: Any, value: Any, rule: Bounds | Choice | None) -> tuple[Any, str]:
    """The value in its field's type, and what is wrong with it."""
    if get_origin(kind) is tuple:
        (item,) = (each for each in get_args(kind) if each is not Ellipsis)
        if not isinstance(value, list) or not all(_is(each, item) for each in value):
            return None, f"expected a list of {item.__name__}"
        return tuple(value), ""
    kinds = get_args(kind) or (kind,)
    if not any(_is(value, each) for each in kinds):
        return None, f"expected {' or '.join(_name(each) for each in kinds)}"
    if isinstance(value, float) and not math.isfinite(value):
        return None, "expected a finite number" + (f": {rule.fault(math.nan)}" if isinstance(rule, Bounds) else "")
    fault = rule.fault(value) if rule is not None else ""
    return (float(value) if float in kinds and not isinstance(value, str) else value), fault


def _is(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind)


def _name(kind: type) -> str:
    return {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false"}[kind.__name__]


def _shown(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) > 2:
        raise BadInput(f"--set {override}: expected section.key=VALUE")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    target = table
    if len(keys) == 2:
        target = table.setdefault(keys[0], {})
        if not isinstance(target, dict):
            raise BadInput(f"--set {override}: {keys[0]} is not a section")
    target[keys[-1]] = value


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(_escaped(letter) for letter in value)
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(each) for each in value) + "]"
    return repr(value)


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x20 or ord(letter) == 0x7F else letter
