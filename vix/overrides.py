"""Overrides of the command line, read by Hydra's own grammar. Imports no torch."""

import functools

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException


@functools.cache
def parser() -> OverridesParser:
    return OverridesParser.create()


@functools.lru_cache(maxsize=16384)
def parse(override: str) -> Override:
    """An override such as ``+attention@extra=linear``. Raises HydraException where the grammar does not accept it."""
    return parser().parse_overrides([override])[0]


def override_key(override: str) -> str:
    """``+model.dim=64`` → ``model.dim``, and ``attention@extra=linear`` → ``attention``."""
    try:
        return parse(override).key_or_group
    except HydraException:  # kept by some other program
        return override


def canonical(override: str) -> str:
    """The same override however it was written: ``+optimizer.lr=1e-3`` → ``optimizer.lr=0.001``, ``x='a'`` → ``x=a``."""
    try:
        parsed = parse(override)
        if parsed.is_sweep_override():
            return override
        key = f"{parsed.key_or_group}@{parsed.package}" if parsed.package else parsed.key_or_group
        if parsed.is_delete():
            return f"~{key}"
        value = parsed.get_value_element_as_str()
        return f"{key}={value.lower() if isinstance(parsed.value(), bool) else unquoted(value)}"
    except HydraException:
        return override


def unquoted(value: str) -> str:
    """A quoted value without its quotes, where it means the same without them."""
    quoted = parse(f"key={value}").value()
    if isinstance(quoted, str) and quoted and value[0] in "'\"":
        with_quotes_removed = as_written(quoted)
        if with_quotes_removed is not None:
            return with_quotes_removed
    return value


def as_written(text: str) -> str | None:
    """``text`` if the grammar reads it as that very text without quotes, else None."""
    try:
        plain = parse(f"key={text}")
    except HydraException:
        return None
    return text if not plain.is_sweep_override() and plain.value() == text else None


def quote(text: str) -> str:
    """``text`` in Hydra's quotes, as the value of an override."""
    return QuotedString(text, Quote.single).with_quotes()
