"""Overrides of the command line, parsed by Hydra's own grammar.

Imports no torch, and Hydra only when the first override is parsed, so that commands that read results start fast.
"""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override


@functools.cache
def parser() -> "OverridesParser":
    """Hydra's parser for overrides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


@functools.lru_cache(maxsize=16384)
def parse_override(override: str) -> "Override":
    """Parse an override such as ``+attention@extra=linear``. Raises HydraException where the grammar does not accept it."""
    return parser().parse_overrides([override])[0]


def parse_or_none(override: str) -> "Override | None":
    """Parse an override; None where the grammar does not accept it."""
    from hydra.errors import HydraException

    try:
        return parse_override(override)
    except HydraException:
        return None


def override_key(override: str) -> str:
    """``+model.dim=64`` → ``model.dim``, and ``attention@extra=linear`` → ``attention``."""
    parsed = parse_or_none(override)
    return parsed.key_or_group if parsed else override  # results of another program may contain any text


def canonical(override: str) -> str:
    """The canonical form of an override: ``+optimizer.lr=1e-3`` → ``optimizer.lr=0.001``, ``x='a'`` → ``x=a``."""
    parsed = parse_or_none(override)
    if parsed is None or parsed.is_sweep_override():
        return override
    key = f"{parsed.key_or_group}@{parsed.package}" if parsed.package else parsed.key_or_group
    if parsed.is_delete():
        return f"~{key}"
    value = parsed.get_value_element_as_str()
    return f"{key}={value.lower() if isinstance(parsed.value(), bool) else unquoted(value)}"


def unquoted(value: str) -> str:
    """A quoted value without its quotes, where it parses to the same value without them."""
    if value[:1] not in ("'", '"'):
        return value
    quoted = parse_or_none(f"key={value}")
    text = quoted.value() if quoted else None
    plain = parse_or_none(f"key={text}") if isinstance(text, str) and text else None
    same = plain is not None and not plain.is_sweep_override() and plain.value() == text
    return str(text) if same else value


def quote(text: str) -> str:
    """``text`` quoted for Hydra's grammar, as the value of an override."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
