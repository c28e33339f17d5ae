"""Checks with ast the rules of docs/architecture.md on imports, environment and files.

Each rule is a function Source -> problems. It is applied to the repository, and to a snippet that
breaks it, so that a rule which went blind is noticed.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from tests.paths import REPO

PRODUCT = ("megatron/trainer", "moe_ext", "moe_app", "tools", "examples", "benchmarks")
MAX_LINES = 400
OUTSIDE = ("tools", "tests", "examples", "benchmarks")
FORBIDDEN_IMPORTS = {
    "megatron/trainer": ("moe_ext", "moe_app", *OUTSIDE),
    "moe_ext": ("megatron.trainer", "moe_app", *OUTSIDE),
    "moe_app": OUTSIDE,
    "tools": ("megatron", "moe_ext", "tests", "examples", "benchmarks"),
}
OPTIONAL_PACKAGES = (
    *("transformer_engine", "megablocks", "wandb", "transformers"),
    *("datatrove", "multiprocess", "pyarrow", "ray", "lm_eval", "datasets", "quack"),
)
NEED_AN_EXTRA = (
    *("moe_app/filter/pipeline", "moe_app/evaluate/harness"),
    "moe_ext/experts/cute_epilogue",
)
"""Rooms and modules of what an optional package makes, themselves imported at use."""
IMPORTED_AT_USE = (*OPTIONAL_PACKAGES, "apex", "tensorboard", "matplotlib", "rich")
LAUNCH = "megatron/trainer/runtime/launch.py"


@dataclass(frozen=True)
class Source:
    """Holds a Python file of the repository, or a snippet in its place."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def area(self) -> str:
        return next((area for area in (*PRODUCT, "tests") if self.path.startswith(f"{area}/")), "")

    @property
    def is_product(self) -> bool:
        return self.area in PRODUCT


@cache
def repository() -> list[Source]:
    paths = (path for area in (*PRODUCT, "tests") for path in (REPO / area).rglob("*.py"))
    return [Source(str(path.relative_to(REPO)), path.read_text("utf-8")) for path in sorted(paths)]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that `tree` imports, modules and their members."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` as written, "" for other expressions."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports_point_down(source: Source) -> list[str]:
    forbidden = FORBIDDEN_IMPORTS.get(source.area, ())
    found = [
        f"line {line}: {source.area} imports {name}"
        for line, name in imported(source.tree)
        if any(is_within(name, package) for package in forbidden)
    ]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"line {node.lineno}: a relative import; write the whole name")
        if source.is_product and isinstance(node, ast.Call):
            if dotted(node.func) in {"__import__", "importlib.import_module", "import_module"}:
                found.append(f"line {node.lineno}: an import by name, which no test can follow")
    return found


def launch_alone_reads_globals(source: Source) -> list[str]:
    """Check that only launch reads the environment and megatron-core's global groups."""
    if not source.is_product or source.path == LAUNCH:
        return []
    found = []
    for line, name in imported(source.tree):
        if "parallel_state" in name.split(".") or name in {"os.environ", "os.getenv"}:
            found.append(f"line {line}: imports {name}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name in {"os.environ", "os.getenv"} or node.attr == "parallel_state":
                found.append(f"line {node.lineno}: uses {name}")
    return found


def files_are_short(source: Source) -> list[str]:
    lines = len(source.text.splitlines())
    return [f"{lines} lines, at most {MAX_LINES}"] if lines > MAX_LINES else []


def optional_packages_are_imported_at_use(source: Source) -> list[str]:
    """Check that optional packages, and the room of one, are imported inside functions only."""
    if not source.is_product or source.path.startswith(NEED_AN_EXTRA):
        return []
    outside_functions = ast.Module(body=[], type_ignores=[])
    waiting: list[ast.AST] = [source.tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            outside_functions.body.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return [
        f"line {line}: imports {name} with the module"
        for line, name in imported(outside_functions)
        if any(
            is_within(name, package)
            for package in (*OPTIONAL_PACKAGES, *(room.replace("/", ".") for room in NEED_AN_EXTRA))
        )
    ]


Rule = Callable[[Source], list[str]]

BROKEN: list[tuple[Rule, str, str]] = [
    (imports_point_down, "moe_ext/a.py", "import megatron.trainer.step"),
    (imports_point_down, "moe_ext/a.py", "from megatron import trainer"),
    (imports_point_down, "moe_ext/a.py", "def f():\n    from megatron.trainer import step"),
    (imports_point_down, "megatron/trainer/a.py", "from moe_ext.config import MoEModelConfig"),
    (imports_point_down, "megatron/trainer/a.py", "import moe_app.cli"),
    (imports_point_down, "megatron/trainer/a.py", "import tests.unit"),
    (imports_point_down, "tools/a.py", "from tests import unit"),
    (imports_point_down, "tools/a.py", "import megatron.trainer.loop"),
    (imports_point_down, "moe_ext/a.py", "from moe_app.pretrain import build"),
    (imports_point_down, "moe_app/a.py", "from tools import pretrain"),
    (imports_point_down, "moe_ext/a.py", "from . import config"),
    (imports_point_down, "moe_ext/a.py", "import importlib\nimportlib.import_module('x')"),
    (launch_alone_reads_globals, "moe_ext/a.py", "from megatron.core import parallel_state"),
    (launch_alone_reads_globals, "tools/a.py", "import megatron.core.parallel_state as p"),
    (launch_alone_reads_globals, "tools/a.py", "import os\nos.environ['X'] = '1'"),
    (launch_alone_reads_globals, "megatron/trainer/a.py", "from os import getenv"),
    (launch_alone_reads_globals, "megatron/trainer/a.py", "megatron.core.parallel_state.f()"),
    (files_are_short, "tests/a.py", "x = 1\n" * (MAX_LINES + 1)),
    (optional_packages_are_imported_at_use, "moe_ext/a.py", "import transformer_engine.pytorch"),
    (
        optional_packages_are_imported_at_use,
        "moe_ext/a.py",
        "try:\n    import megablocks\nfinally: 0",
    ),
    (optional_packages_are_imported_at_use, "tools/a.py", "class A:\n    from wandb import init"),
    (optional_packages_are_imported_at_use, "tools/a.py", "from transformers import AutoModel"),
    (optional_packages_are_imported_at_use, "moe_app/a.py", "import moe_app.filter.pipeline.a"),
]
FINE: list[tuple[Rule, str, str]] = [
    (imports_point_down, "tools/a.py", "from moe_app.cli import plan"),
    (
        imports_point_down,
        "megatron/trainer/a.py",
        "from megatron.trainer.config.recipe import dump_config",
    ),
    (launch_alone_reads_globals, LAUNCH, "import os\nos.environ['RANK']"),
    (optional_packages_are_imported_at_use, "tools/a.py", "def f():\n    import wandb"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule: Rule) -> None:
    sources = repository()
    assert len(sources) > 50
    problems = [f"{source.path}: {each}" for source in sources for each in rule(source)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN)
def test_rule_finds_what_breaks_it(rule: Rule, path: str, text: str) -> None:
    assert rule(Source(path, text))


@pytest.mark.parametrize(("rule", "path", "text"), FINE)
def test_rule_lets_the_allowed_pass(rule: Rule, path: str, text: str) -> None:
    assert rule(Source(path, text)) == []


def module_of(source: Source) -> str:
    return source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def import_graph(package: Sequence[Source]) -> dict[str, set[str]]:
    """Return which modules of the package each imports: in functions and for type checkers, too."""
    modules = {module_of(source) for source in package}
    graph: dict[str, set[str]] = {}
    for source in package:
        found = {name for _, name in imported(source.tree)}
        found |= {name.rpartition(".")[0] for name in found - modules}
        graph[module_of(source)] = (found & modules) - {module_of(source)}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Find cycles: remove modules whose imports are all removed until none is left to remove."""
    left = dict(graph)
    while done := [name for name, others in left.items() if not others & left.keys()]:
        for name in done:
            del left[name]
    return [
        f"{name} imports {', '.join(sorted(others & left.keys()))}, which lead back to it"
        for name, others in left.items()
    ]


def imports_are_acyclic(package: Sequence[Source]) -> list[str]:
    return cycles(import_graph(package))


def rooms_are_acyclic(package: Sequence[Source]) -> list[str]:
    """Check for cycles between rooms: folders and modules directly in the package."""
    root = min((module_of(source) for source in package), key=len)

    def room(module: str) -> str:
        return module.removeprefix(f"{root}.").split(".")[0]

    rooms: dict[str, set[str]] = {}
    for module, others in import_graph(package).items():
        if module != root:
            rooms.setdefault(room(module), set()).update(room(other) for other in others - {root})
    return cycles({name: others - {name} for name, others in rooms.items()})


def names_are_unique(package: Sequence[Source]) -> list[str]:
    """Check that no two modules or folders share a name, nor two classes or named types."""
    places: dict[str, set[str]] = {}
    for source in package:
        *folders, module = module_of(source).split(".")
        if module == "__main__":
            continue
        for number, folder in enumerate(folders, start=1):
            places.setdefault(folder, set()).add(".".join(folders[:number]))
        places.setdefault(module, set()).add(module_of(source))
        for node in source.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names = [name for name in names if re.match("_?[A-Z]+[a-z]", name)]
            names += [node.name] if isinstance(node, ast.ClassDef) else []
            for name in names:
                places.setdefault(name, set()).add(source.path)
    return [
        f"{name} is in {' and in '.join(sorted(found))}"
        for name, found in places.items()
        if len(found) > 1
    ]


PackageRule = Callable[[Sequence[Source]], list[str]]
PACKAGE_RULES: list[tuple[PackageRule, str]] = [
    *(
        (rule, package)
        for rule in (imports_are_acyclic, rooms_are_acyclic)
        for package in ("moe_ext", "megatron/trainer", "moe_app")
    ),
    *((names_are_unique, package) for package in ("moe_ext", "megatron/trainer", "moe_app")),
]
CYCLE = [
    Source("p/__init__.py", "import p.a"),
    Source("p/a.py", "from p import b"),
    Source("p/b.py", "from p.q.c import C\nimport p.d"),
    Source("p/q/c.py", "def f():\n    import p.a"),
    Source("p/d.py", "import os"),
]
TWICE: list[list[tuple[str, str]]] = [
    [("p/a.py", "class A:\n    pass"), ("p/b.py", "class A:\n    pass")],
    [("p/a.py", "class Kind:\n    pass"), ("p/b.py", "Kind = int | str")],
    [("p/a.py", ""), ("p/q/a.py", "")],
    [("p/a.py", ""), ("p/q/a/b.py", "")],
]


@pytest.mark.parametrize(("rule", "package"), PACKAGE_RULES)
def test_package_keeps_the_rule(rule: PackageRule, package: str) -> None:
    sources = [source for source in repository() if source.area == package]
    assert len(sources) > 20
    problems = rule(sources)
    assert not problems, "\n".join(problems)


def test_cycle_of_imports_is_found_and_nothing_else() -> None:
    found = [problem.split(" imports ")[0] for problem in imports_are_acyclic(CYCLE)]
    assert found == ["p", "p.a", "p.b", "p.q.c"]
    assert imports_are_acyclic([*CYCLE[:3], Source("p/q/c.py", "import p.d"), CYCLE[4]]) == []


def test_cycle_of_rooms_is_found_where_modules_have_none() -> None:
    package = [
        Source("p/__init__.py", "import p.q.a"),
        Source("p/q/a.py", "from p.r.b import B"),
        Source("p/r/b.py", ""),
        Source("p/r/c.py", "import p.q.d"),
        Source("p/q/d.py", ""),
    ]
    assert imports_are_acyclic(package) == []
    assert [problem.split(" imports ")[0] for problem in rooms_are_acyclic(package)] == [
        "q",
        "r",
    ]
    assert rooms_are_acyclic([*package[:3], package[4]]) == []


@pytest.mark.parametrize("files", TWICE)
def test_name_of_two_things_is_found(files: list[tuple[str, str]]) -> None:
    assert names_are_unique([Source(*each) for each in files])
    assert names_are_unique([Source(*files[0])]) == []
    assert names_are_unique([Source("p/__init__.py", ""), Source("p/q/a.py", "LIMIT = 1")]) == []


def namespace_problems(root: Path) -> list[str]:
    """Find a `megatron/__init__.py`, which would shadow the wheel's megatron.core."""
    return [f"{path.name} is there" for path in (root / "megatron").glob("__init__.*")]


def test_megatron_stays_a_namespace_package(tmp_path: Path) -> None:
    assert namespace_problems(REPO) == []
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").touch()
    assert namespace_problems(tmp_path) == ["__init__.py is there"]


IMPORTER = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
blocked, modules = (each.split(",") for each in sys.argv[1:])
for name in blocked:
    sys.modules[name] = None
for name in modules:
    importlib.import_module(name)
"""


def import_without(
    blocked: tuple[str, ...], modules: list[str]
) -> subprocess.CompletedProcess[str]:
    """Import modules in a process that cannot import the blocked packages."""
    command = [sys.executable, "-c", IMPORTER, ",".join(blocked), ",".join(modules)]
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, check=False, timeout=300
    )


def package_modules(*areas: str) -> list[str]:
    paths = [path.relative_to(REPO) for area in areas for path in (REPO / area).rglob("*.py")]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_packages_import_without_the_optional_packages() -> None:
    modules = [
        module
        for module in package_modules("megatron/trainer", "moe_ext")
        if not module.startswith(tuple(room.replace("/", ".") for room in NEED_AN_EXTRA))
    ]
    assert {"megatron.trainer", "megatron.trainer.loop", "moe_ext.experts"} <= set(modules)
    done = import_without(IMPORTED_AT_USE, modules)
    assert done.returncode == 0, done.stderr[-3000:]


def test_application_imports_without_the_extras() -> None:
    needing = [module for room in NEED_AN_EXTRA for module in package_modules(room)]
    modules = [module for module in package_modules("moe_app") if module not in needing]
    assert {"moe_app.cli", "moe_app.pretrain.build", "moe_app.filter.filter_data"} <= set(modules)
    done = import_without(OPTIONAL_PACKAGES, modules)
    assert done.returncode == 0, done.stderr[-3000:]


def test_blocked_package_would_be_noticed() -> None:
    done = import_without(("yaml",), ["megatron.trainer.errors", "megatron.trainer.config.recipe"])
    assert done.returncode != 0
    assert "import of yaml halted" in done.stderr
