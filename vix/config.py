"""Schema check of one group of a config against the constructor of its class.

The keys of a group are the constructor arguments of the class that its ``_target_`` names. The annotations of that
constructor are the schema; there is no separate list of keys. A key that the constructor does not accept is an error,
whether a file or the command line sets it.
"""

import functools
import importlib
import inspect
import json
import os
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from vix.errors import ConfigError, first_paragraph, nearest

PACKAGES = ("vix", "torch.optim")  # a config may name classes of these
PACKAGES_VARIABLE = "VIX_PACKAGES"  # environment variable: further packages, separated by commas


def validated_partial(
    group: str, options: Any, kind: type, supplied: Collection[str], own_options: Mapping[str, Any]
) -> functools.partial[Any]:
    """The class that ``options["_target_"]`` names, with the other options as keyword arguments, all validated.

    group: its name, for error messages.
    options: the group as plain containers.
    kind: required base class.
    supplied: constructor arguments that the program supplies.
    own_options: options of the group that the program reads itself, with their types; validated, but not passed on.

    Raises ConfigError, which names the key and the nearest valid ones.
    """
    if not isinstance(options, dict):
        raise ConfigError(f"{group}: no option of this group is chosen; add {group}=NAME with a file of conf/{group}/")
    options = dict(options)
    target = import_target(group, options.pop("_target_", None), kind)
    parameters = dict(inspect.signature(target).parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = {
        name: p for name, p in parameters.items() if name not in supplied and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    valid = {**accepted, **own_options}
    hints = {**annotations(target), **own_options}
    for key, value in options.items():
        if key not in valid and (key in supplied or not takes_any):
            near = nearest(str(key), valid, prefix=f"{group}.")  # a key may be a number
            raise ConfigError(f"{group}.{key}: {target.__name__} has no such option; {near}")
        check_value(f"{group}.{key}", value, hints.get(key, Any))
    for name, parameter in accepted.items():
        if parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{group}.{name}: missing, and {target.__name__} needs it; add {group}.{name}=VALUE")
    return functools.partial(target, **{key: value for key, value in options.items() if key not in own_options})


def to_plain(cfg: DictConfig, key: str) -> Any:
    """``cfg.<key>`` as plain containers, with its interpolations resolved; None where it is absent.

    Raises ConfigError where an interpolation cannot be resolved or a value is missing.
    """
    try:
        value = cfg.get(key)
        return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        reason = first_paragraph(error)
        circular = reason in ("Recursive interpolation detected", "Interpolation to parent node detected")
        raise ConfigError(f"{error.full_key or key}: {'its value refers to itself' if circular else reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{key}: its value refers to itself") from error


def import_target(group: str, path: Any, kind: type) -> Callable[..., Any]:
    """Import the class that a ``_target_`` names.

    Configs are shared, so a config must not run arbitrary code: only classes defined in ``vix``, in ``torch.optim``, and in
    the packages that the environment variable VIX_PACKAGES lists (comma-separated) are imported.

    path: import path of the class.
    kind: required base class.

    Raises ConfigError where the class is not allowed, cannot be imported, or is not a ``kind``.
    """
    allowed = (*PACKAGES, *filter(None, os.environ.get(PACKAGES_VARIABLE, "").split(",")))

    def inside(module: str) -> bool:
        return any(module == package or module.startswith(package + ".") for package in allowed)

    key = f"{group}._target_"
    if not isinstance(path, str) or "." not in path:
        raise ConfigError(f"{key}={path}: must be the import path of a class, such as vix.attention.softmax.Softmax")
    if not inside(path):
        raise ConfigError(
            f"{key}={path}: configs may only name classes of {', '.join(allowed)}; "
            f"to allow more, set the environment variable {PACKAGES_VARIABLE}={path.split('.')[0]}"
        )
    module_name, _, name = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        ours = path.startswith(tuple(f"{package}." for package in PACKAGES))
        where = "" if ours else "; install its package, or add the folder that contains it to PYTHONPATH"
        raise ConfigError(f"{key}={path}: cannot be imported ({error}){where}") from error
    if not (inspect.isclass(target) and issubclass(target, kind) and inside(target.__module__)):
        raise ConfigError(f"{key}={path}: must be a {kind.__module__}.{kind.__qualname__} defined in {' or '.join(allowed)}")
    return target


def annotations(target: Any) -> dict[str, Any]:
    """Annotations of a class's constructor; empty where they contain a name that cannot be resolved."""
    try:
        return typing.get_type_hints(target.__init__, include_extras=True)
    except NameError:
        return {}


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Check a value against a constructor's annotation, without coercion: an int is not a bool, a string not a number.

    Raises ConfigError, which names the key, the value and the accepted types or range.
    """
    try:
        adapter = adapter_of(annotation)
    except PydanticSchemaGenerationError:
        return
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        # A union reports each of its members; those that JSON cannot represent (a tensor) are omitted.
        problems = [e for e in error.errors() if e["type"] not in ("is_instance_of", "needs_python_object")]
        if not problems:
            raise ConfigError(f"{key}={json.dumps(value)}: cannot be set in a config") from error
        null = ["null"] if type(None) in typing.get_args(annotation) else []  # pydantic's message omits it
        message = " or ".join(dict.fromkeys([*(describe(problem["loc"], problem["msg"]) for problem in problems), *null]))
        shown = json.dumps(value) if not isinstance(value, str) else value
        if isinstance(value, str) and is_number(value):
            message += " (this is text; remove the quotes, or write ${oc.decode:${oc.env:NAME}} for a variable)"
        raise ConfigError(f"{key}={shown}: {message}") from error


def is_number(text: str) -> bool:
    """Whether a string can be parsed as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe(location: tuple[int | str, ...], message: str) -> str:
    """Pydantic's message, preceded by the position where it concerns an item of a list."""
    item = f"item {location[0] + 1}: " if location and isinstance(location[0], int) else ""
    return item + message[0].lower() + message[1:]


@functools.cache
def adapter_of(annotation: Any) -> TypeAdapter[Any]:
    """pydantic's validator for an annotation."""
    return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
