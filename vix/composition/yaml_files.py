"""Validation of the files of ``conf/`` and of additional config directories while Hydra loads them.

Configs are shared, so a file of a group (an experiment, a recipe, an attention) may set only the program's options. It may not
set environment variables, callbacks, log handlers, launchers or sweepers, which can execute code. Those are allowed in the
primary config, in the files of ``hydra/`` and on the command line. YAML errors are reported with file and line.
"""

import codecs
import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ConfigDefault, GroupDefault, InputDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf, grammar_parser
from omegaconf.errors import GrammarParseError

from vix.build import GROUPS, OVERLAYS, SETTINGS
from vix.errors import ConfigError, nearest
from vix.overrides import parse_or_none
from vix.system.files import expand_home

# Keys of Hydra that only set directories and the values of a sweep.
HARMLESS = ("mode", "run.dir", "sweep.dir", "sweep.subdir", "sweeper.params")
PARAMS = "sweeper.params"
WHERE = "is allowed only on the command line, in the primary config and in files of conf/hydra/"


class Repository(ConfigRepository):
    """Hydra's repository of config files, which validates every file when it is loaded. Raises ConfigError.

    primary: the name of the primary config, which may set anything.
    includes: file → the files that its defaults list includes, for the files loaded so far.
    """

    primary: str | None = None

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        self.includes: dict[str, list[str]] = {}
        super().__init__(config_search_path)

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        """Hydra's method, with a leading ``~`` expanded in the search path."""
        for entry in config_search_path.get_path():
            scheme, separator, path = (entry.path or "").rpartition("://")
            if scheme in ("", "file"):
                entry.path = scheme + separator + expand_home(path)
        super().initialize_sources(config_search_path)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Load and validate a file; None where it does not exist. Raises ConfigError."""
        path = self.file_of(config_path)
        if path is None:
            return super().load_config(config_path)
        root = read_yaml(path)
        if is_group_file(config_path) and config_path != self.primary:
            check_layout(path, config_path.split("/")[0], root)
        try:
            result = super().load_config(config_path)
        except (ValueError, OSError, yaml.YAMLError) as error:  # a header, a tag or a defaults list that Hydra cannot use
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: an alias (*NAME) refers to a mapping or list that contains it") from error
        defaults = (result.defaults_list if result else None) or []
        if is_group_file(config_path) and config_path != self.primary:
            check_defaults(self, config_path, defaults)
        self.check_includes(config_path, defaults)
        return result

    def __deepcopy__(self, _: Any) -> "Repository":
        return copy.copy(self)  # Hydra's copy may read from other sources, and shares ``includes``

    def check_includes(self, config_path: str, defaults: Sequence[InputDefault]) -> None:
        """Raises ConfigError where a file includes one twice, one that does not exist, or in the end itself."""
        path, found = self.file_of(config_path), list(included(config_path, defaults))
        refuse_repeated(path, defaults)
        for file, required in found:
            # The primary config is loaded before the search path that it sets.
            if required and config_path != self.primary and not self.config_exists(file):
                group, _, option = file.rpartition("/")
                near = nearest(option, self.get_group_options(group) if group else ())
                raise ConfigError(f"{location(path, option)}: defaults: {file}: there is no such file; {near}")
        self.includes[config_path] = [file for file, _ in found]
        if circle := self.circle(config_path, [config_path]):
            raise ConfigError(
                f"{location(path, circle[1].rpartition('/')[2])}: defaults: the files include one another in a circle "
                f"({' → '.join(circle)}); remove one of these entries"
            )

    def circle(self, start: str, way: list[str]) -> list[str]:
        """The files from ``start`` through others back to it; empty where there is no such way. ``way``: the files so far."""
        for file in self.includes.get(way[-1], ()):
            if file == start:
                return [*way, start]
            if file not in way and (found := self.circle(start, [*way, file])):
                return found
        return []

    def file_of(self, config_path: str) -> Path | None:
        """The file from which a config is loaded; None for the configs of Hydra and its plugins."""
        source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
        if source is None or source.scheme() != "file":
            return None
        return Path(source.path, source._normalize_file_name(config_path))


def included(config_path: str, defaults: Iterable[InputDefault]) -> Iterator[tuple[str, bool]]:
    """The files that a defaults list includes, each with whether it must exist: the command line may choose another option.

    Entries with ``override`` and with an interpolation are left out.
    """
    for default in defaults:
        entry = copy.copy(default)
        entry.update_parent(config_path.rpartition("/")[0], "")
        if entry.is_self() or entry.is_override():
            continue
        if isinstance(entry, GroupDefault) and entry.is_options():
            yield from ((f"{entry.get_group_path()}/{option}", False) for option in entry.get_options())
        elif entry.get_name() is not None and not entry.is_interpolation() and not entry.is_missing():
            yield entry.get_config_path(), isinstance(entry, ConfigDefault) and not entry.is_optional()


def refuse_repeated(path: Path | None, defaults: Iterable[InputDefault]) -> None:
    """Raises ConfigError where a defaults list has two entries for a group, or two for a file."""
    seen: set[tuple[str, str | None]] = set()
    for default in defaults:
        name = str(default.group if isinstance(default, GroupDefault) else getattr(default, "path", "")).strip("/")
        if (name, default.package) in seen:
            raise ConfigError(f"{location(path, name)}: defaults: {name} is listed twice; remove one of the entries")
        seen.add((name, default.package))


def is_group_file(config_path: str) -> bool:
    """Whether a config belongs to a group other than Hydra's own."""
    return "/" in config_path and not config_path.startswith("hydra/")


# Layout


def read_yaml(path: Path) -> yaml.Node | None:
    """The syntax tree of a file, None for an empty file. Raises ConfigError with file and line for invalid YAML."""
    try:
        written = path.stat()
        return parse_yaml(path, written.st_mtime_ns, written.st_size)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


@functools.lru_cache(maxsize=1024)
def parse_yaml(path: Path, written: int, size: int) -> yaml.Node | None:
    """Parse a file; ``written`` and ``size`` (modification time in ns, bytes) are part of the cache key."""
    data = path.read_bytes()
    if data.startswith(codecs.BOM_UTF8):
        raise ConfigError(f"{path}:1: starts with a byte-order mark (BOM), which hides its first line; save it without a BOM")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line, problem = syntax_error(text.splitlines(), error)
        raise ConfigError(f"{path}:{line}: {problem}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: the character U+{error.character:04X} is not allowed in YAML") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: invalid YAML ({' '.join(str(error).split()) or 'nested too deeply'})") from error
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{line_of(root)}: {kind_of(root)} where keys are expected (key: value)")
        check_nodes(path, root)
    return root


def syntax_error(lines: Sequence[str], error: yaml.MarkedYAMLError) -> tuple[int, str]:
    """Line number and description of a YAML syntax error."""
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    here = lines[line] if line < len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())]:
        return line + 1, "indented with a tab; YAML requires spaces"
    if error.context_mark and "could not find expected ':'" in str(error.problem):
        line = error.context_mark.line
        return line + 1, f"a colon is missing (key: value): {lines[line].strip()}"
    if "mapping values are not allowed" in str(error.problem):
        before = next((n for n in range(line - 1, -1, -1) if lines[n].strip()), None)
        if before is not None and not re.search(r":(\s|$)|^\s*(#|-)", lines[before]):
            return before + 1, f"a colon is missing (key: value): {lines[before].strip()}"
        return line + 1, f"a key is not allowed here; check indentation and colons: {here.strip()}"
    if re.search(r"[\[{,:]\s*(\$\{|\?\?\?)", here):
        return line + 1, f"within brackets or braces, ${{…}} and ??? need quotes: {here.strip()}"
    return line + 1, f"invalid YAML ({error.problem or error})"


def check_nodes(path: Path, root: yaml.Node) -> None:
    """Raises ConfigError where a mapping contains a key twice, or a text an invalid interpolation."""
    seen: set[int] = set()
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.ScalarNode) and "${" in node.value:
            try:
                grammar_parser.parse(node.value)
            except GrammarParseError as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"{path}:{line_of(node)}: {node.value}: invalid interpolation ({reason})") from error
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                nodes.append(value)
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in lines:
                        raise ConfigError(f"{path}:{line_of(key)}: {key.value} is set twice, first on line {lines[key.value]}")
                    lines[key.value] = line_of(key)


def check_layout(path: Path, group: str, root: yaml.Node | None) -> None:
    """Raises ConfigError where a group's file is empty, an overlay lacks its ``# @package _global_`` line, or a list or mapping
    is expected."""
    first = path.read_text(encoding="utf-8").lstrip().partition("\n")[0]
    has_header = re.match(r"#\s*@package\s", first) is not None
    if root is None and not has_header:
        raise ConfigError(f"{path}: the file is empty; see the other files of conf/{group}/")
    if group not in GROUPS and not has_header:
        raise ConfigError(f"{path}:1: the first line must be '# @package _global_', or its keys become {group}.KEY")
    for name, value in entries(root):
        if name == "defaults" and not isinstance(value, yaml.SequenceNode):
            raise ConfigError(f"{path}:{line_of(value)}: defaults: a list is expected (- override /GROUP: OPTION)")
        if name == "defaults":
            for item in value.value:
                check_default_item(path, item)
        elif name in GROUPS and group not in GROUPS and not isinstance(value, yaml.MappingNode):
            what = "nothing" if is_null(value) else f"{kind_of(value)} ({value.value})" if is_text(value) else kind_of(value)
            raise ConfigError(
                f"{path}:{line_of(value)}: {name}: {what} where options are expected (key: value, each on an indented line)"
            )


def check_default_item(path: Path, item: yaml.Node) -> None:
    """Raises ConfigError where an entry of a defaults list lacks a part of ``override /GROUP: OPTION``, or where it chooses an
    option of the file's own group: such a file is included by its path."""
    if isinstance(item, yaml.ScalarNode):
        words = item.value.replace("=", " ").replace(":", " ").split()
        chooses = GROUPS if len(words) == 1 else (*GROUPS, *OVERLAYS)
        if words and (words[0] == "override" or words[0].strip("/") in chooses):
            if words[0] == "override":
                words = words[1:]
            group, option = (*words, "GROUP", "OPTION")[:2]
            refuse_item(path, item, item.value, group, option)
        return
    for name, value in entries(item):
        keyword, _, group = name.rpartition(" ")
        correct = keyword == "override" and group.startswith("/") and group != f"/{path.parent.name}"
        if group.strip("/") in (*GROUPS, *OVERLAYS) and not correct:
            refuse_item(path, item, f"{name}: {getattr(value, 'value', '')}", group, getattr(value, "value", "OPTION"))


def refuse_item(path: Path, item: yaml.Node, written: str, group: str, option: str) -> None:
    """Raises ConfigError for an entry of a defaults list, with the corrected entry."""
    group = group.strip("/")
    correct = f"/{group}/{option}" if group == path.parent.name else f"override /{group}: {option}"
    raise ConfigError(f"{path}:{line_of(item)}: defaults: '{written}' must be '{correct}'")


def entries(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """Keys and values of a mapping; empty for any other node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield str(key.value), value


def kind_of(node: yaml.Node) -> str:
    """The kind of a node, for an error message."""
    return {"sequence": "a list", "mapping": "a mapping"}.get(node.id, "text")


def is_text(node: yaml.Node) -> bool:
    """Whether a node is a scalar."""
    return isinstance(node, yaml.ScalarNode)


def is_null(node: yaml.Node) -> bool:
    """Whether a node is null."""
    return node.tag == "tag:yaml.org,2002:null"


def line_of(node: yaml.Node) -> int:
    """Line number of a node, from 1."""
    return int(node.start_mark.line) + 1


# Permissions


def check_defaults(repository: Any, config_path: str, defaults: Iterable[InputDefault]) -> None:
    """Raises ConfigError where the defaults list of a group's file contains an entry that is not allowed or does not exist."""
    path = repository.file_of(config_path)
    for default in defaults:
        name = str(default.group if isinstance(default, GroupDefault) else getattr(default, "path", ""))
        value = default.value if isinstance(default, GroupDefault) else None
        values = value if isinstance(value, list) else [value] if value else []
        parts = [part for text in (name, *values) for part in str(text).split("/")]
        package = [part for part in re.split(r"[.:]", default.package or "") if part != "_global_"]
        group = name.strip("/")
        if group.split("/")[0] == "hydra" or package[:1] == ["hydra"]:
            shown = name + (f"@{default.package}" if default.package else "")
            raise ConfigError(f"{location(path, group)}: defaults: {shown}: Hydra's own configuration {WHERE}")
        if ".." in parts:
            raise ConfigError(f"{location(path, group)}: defaults: {name}: is outside of the group's directory")
        if isinstance(default, GroupDefault) and default.override and name.startswith("/") and not default.is_interpolation():
            if not repository.group_exists(group):
                what = f"there is no such group; {nearest(group, [*GROUPS, *OVERLAYS])}"
                raise ConfigError(f"{location(path, group)}: defaults: {name}: {what}")
            for option in values:
                if not repository.config_exists(f"{group}/{option}"):
                    options = repository.get_group_options(group)
                    raise ConfigError(
                        f"{location(path, group)}: defaults: {group}={option}: conf/{group}/ has no such file; "
                        f"{nearest(option, options)}"
                    )


def check_permissions(defaults: Sequence[ResultDefault], repository: Any) -> None:
    """Raises ConfigError where a file of the defaults list sets a key that it may not set."""
    parents = parents_of(defaults)
    primary = {default.config_path for default in defaults if default.primary}
    for default in defaults:
        path = str(default.config_path)
        if not is_free(path, parents, primary):
            loaded = repository.load_config(config_path=path)
            file = repository.delegate.file_of(path)
            check_defaults(repository.delegate, path, loaded.defaults_list or [])
            check_keys(repository, file or Path(path), embedded(loaded, default.package))
        elif path.startswith("hydra/"):
            refuse_shadowing(repository.delegate, path)


def refuse_shadowing(repository: Repository, path: str) -> None:
    """Raises ConfigError where an additional config directory replaces a file of Hydra or of a plugin."""
    first, *others = [source for source in repository.get_sources() if source.is_config(path)]
    if first.provider not in ("hydra", "main", "schema") and others:
        raise ConfigError(f"{repository.file_of(path)}: would replace Hydra's own {path}; give it another name")


def embedded(loaded: ConfigResult, package: str | None) -> dict[str, Any]:
    """The keys of a file at their place in the composed config, with interpolations unresolved."""
    content = OmegaConf.create(OmegaConf.to_container(loaded.config, resolve=False))
    package = loaded.header["package"] if package is None else package
    if package and package != "_global_":
        whole = OmegaConf.create()
        OmegaConf.update(whole, package, content)
        content = whole
    return OmegaConf.to_container(content, resolve=False)  # type: ignore[return-value]


def check_keys(repository: Any, file: Path, config: Any) -> None:
    """Raises ConfigError unless the keys are options of the program's groups, its settings, or harmless keys of Hydra."""
    for key, value in config.items():
        if key == "hydra":
            check_hydra_keys(repository, file, value)
        elif key in GROUPS and not isinstance(value, dict):
            raise ConfigError(f"{location(file, key)}: {key}: {value!r} where options are expected (key: value)")
        elif key not in GROUPS and key not in SETTINGS:
            raise ConfigError(f"{location(file, key)}: {key}: unknown key; {nearest(str(key), [*GROUPS, *SETTINGS])}")


def check_hydra_keys(repository: Any, file: Path, value: Any, prefix: str = "") -> None:
    """Raises ConfigError for a key of Hydra that a group's file may not set."""
    if prefix == PARAMS and isinstance(value, dict):
        for key, values in value.items():
            check_param(repository, file, str(key), values)
    elif prefix in HARMLESS and prefix != PARAMS and not isinstance(value, dict | list):
        return
    elif isinstance(value, dict) and (not prefix or any(key.startswith(f"{prefix}.") for key in HARMLESS)):
        for key, below in value.items():
            check_hydra_keys(repository, file, below, f"{prefix}.{key}".lstrip("."))
    else:
        while isinstance(value, dict) and value and prefix.count(".") < 1:
            key, value = next(iter(value.items()))
            prefix = f"{prefix}.{key}".lstrip(".")
        shown = ".".join(["hydra", *filter(None, [prefix])])
        raise ConfigError(f"{location(file, shown.split('.')[-1])}: {shown}: a file of a group may not set this; it {WHERE}")


def check_param(repository: Any, file: Path, key: str, value: Any) -> None:
    """Raises ConfigError where a parameter of a sweep, which becomes an override, is not one of the program's own keys."""
    override = parse_or_none(f"{key}={value}")
    if override and override.package is None:
        name = override.key_or_group
        first = re.match(r"\w*", name)
        if first and first[0] != "hydra" and (first[0] in (*GROUPS, *SETTINGS) or repository.group_exists(name)):
            return
    raise ConfigError(f"{location(file, key)}: hydra.sweeper.params: {key}: a file may sweep only over the program's own keys")


def location(file: Path | None, key: Any) -> str:
    """``FILE:LINE`` of the first line that contains the key, for a message; ``FILE`` where no line does."""
    if file is None or not file.is_file():
        return str(file)
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if re.search(rf"(^|[\s/.@'\"{{+]){re.escape(str(key))}\b", line.partition("#")[0]):
            return f"{file}:{number}"
    return str(file)


def parents_of(defaults: Sequence[ResultDefault]) -> dict[str, set[str]]:
    """File → the files that include it, for all files of a defaults list."""
    parents: dict[str, set[str]] = {}
    for default in defaults:
        parents.setdefault(str(default.config_path), set()).add(str(default.parent))
    return parents


def is_free(path: str, parents: Mapping[str, set[str]], primary: set[str | None]) -> bool:
    """Whether a file may set anything: the primary config, files outside of groups that it includes, and files of hydra/."""
    if path in primary or path in ("<root>", "None"):
        return True
    if "/" in path and not path.startswith("hydra/"):
        return False
    return all(is_free(parent, parents, primary) for parent in parents.get(path, {"<root>"}))


def free_files(parents: Mapping[str, set[str]], primary: set[str | None]) -> list[str]:
    """The files that may set anything, without those of hydra/."""
    return [path for path in parents if not path.startswith("hydra/") and is_free(path, parents, primary)]
