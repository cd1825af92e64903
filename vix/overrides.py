"""Overrides of the command line, parsed by Hydra's own grammar.

Imports no torch, and Hydra only when the first override is parsed, so that commands that read results start fast.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

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
    return f"~{key}" if parsed.is_delete() else f"{key}={as_value(parsed.value())}"


def settings(overrides: Iterable[str]) -> dict[str, str]:
    """Key → canonical override, of the last override of each key; ``model={dim: 64}`` counts as ``model.dim=64``."""
    found: dict[str, str] = {}
    for override in overrides:
        parsed = parse_or_none(override)
        value = None if parsed is None or parsed.is_sweep_override() else parsed.value()
        if parsed and isinstance(value, dict) and value and not parsed.is_delete():
            found |= settings(f"{parsed.key_or_group}.{key}={as_value(item)}" for key, item in value.items())
        else:
            found[override_key(override)] = canonical(override)
    return found


def as_value(value: Any) -> str:
    """A plain value, list or dictionary in Hydra's grammar, as the value of an override; text is quoted only if necessary."""
    if isinstance(value, str):
        plain = parse_or_none(f"key={value}")
        same = plain is not None and not plain.is_sweep_override() and plain.value() == value
        return value if same else quote(value)
    if isinstance(value, list):
        return f"[{','.join(map(as_item, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{as_item(key)}:{as_item(item)}' for key, item in value.items())}}}"
    return "null" if value is None else str(value).lower()


def as_item(value: Any) -> str:
    """As :func:`as_value`, for an item of a list or dictionary, in which commas and brackets separate."""
    text = as_value(value)
    plain = parse_or_none(f"key=[{text}]") if isinstance(value, str) else None
    return text if not isinstance(value, str) or (plain and plain.value() == [value]) else quote(value)


def quote(text: str) -> str:
    """``text`` quoted for Hydra's grammar, as the value of an override."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()
