"""The order of the packages: imports run down the list, never up and never in a circle."""

import ast
from pathlib import Path

from conftest import ROOT

# From the top down. Packages on one line do not import one another.
ORDER = (
    ("__main__",),
    ("cli",),
    ("analysis",),
    ("composition",),
    ("build",),
    ("training",),
    ("reporting",),
    ("runs",),
    ("models",),
    ("attention",),
    ("data", "layers"),
    ("system",),
    ("config", "overrides"),
    ("types",),
    ("errors",),
)
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}
LEVEL["vix"] = LEVEL["build"]  # ``vix/__init__.py`` imports it on first use


def imported(path: Path) -> set[str]:
    """Modules of ``vix`` that a file imports anywhere, also within functions and for type checking."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() or (
                    ROOT / name.replace(".", "/")
                ).is_dir()
                modules.add(name if is_module else str(node.module))
    return {module for module in modules if module.partition(".")[0] == "vix"}


def graph() -> dict[str, set[str]]:
    edges = {}
    for path in sorted((ROOT / "vix").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        edges[name] = imported(path)
    return edges


def package(module: str) -> str:
    return [*module.split("."), "vix"][1]


def test_imports_run_down() -> None:
    edges = graph()
    assert {package(module) for module in edges} == set(LEVEL)
    up = []
    for module, targets in edges.items():
        for target in sorted(targets):
            here, there = package(module), package(target)
            if here != there and LEVEL[here] >= LEVEL[there] and module != "vix":
                up.append(f"{module} imports {target}")
    assert not up, "\n".join(up)


def test_no_circles() -> None:
    edges = graph()
    edges = {module: targets & edges.keys() for module, targets in edges.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for target in edges[module]:
            visit(target, (*path, module))
        done.add(module)

    for module in edges:
        visit(module, ())


def test_matplotlib_is_imported_when_something_is_drawn() -> None:
    """Every command would wait for it otherwise: the modules that need it are imported within functions only."""
    at_the_top: dict[str, set[str]] = {}
    for path in sorted((ROOT / "vix").rglob("*.py")):
        imports = [
            node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {f"{getattr(node, 'module', '')}.{alias.name}".lstrip(".") for node in imports for alias in node.names}
        at_the_top[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    draws = {module for module, names in at_the_top.items() if any(name.startswith("matplotlib") for name in names)}
    assert draws == {"vix.reporting.images", "vix.reporting.plots"}
    assert not [module for module, names in at_the_top.items() if any(name.startswith(tuple(draws)) for name in names)]
