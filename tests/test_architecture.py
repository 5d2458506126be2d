"""The floor plan holds: which room may import which, where heavy libraries may appear, and no circles.

docs/architecture.md explains the rooms. Imports inside functions and for typing count like any other.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "zimage_runner"
LOOSE_MODULES = 14
LARGEST_CIRCLE = 2

BASICS = {"errors", "logs", "signals", "__init__"}
FILES = {"outputs.atomic", "outputs.beneath", "outputs.digest", "outputs.parsed"}
"""How a file is opened, told from others, parsed and written, for every room: no link followed, plain values, whole or
not at all."""
COMPONENTS = {"model", "sampling", "compile", "warmup"}
ARROWS: dict[str, set[str]] = {
    "prompts": {"model", "sampling"},
    "plan": {"model", "prompts", "sampling"},
    "memory": set(),
    "pictures": {"model", "sampling"},
    "weights": {"model"},
    "engines": {"compile", "memory", "model", "pictures", "sampling", "warmup", "weights"},
    "outputs": {"engines", "plan"},
    "executors": {"engines", "memory", "plan", "session", "warmup"},
    "config": {"engines", "executors", "memory", "outputs", "prompts", "serve", *COMPONENTS},  # serve.config
    "collect": {"outputs", "plan"},
    "view": {"collect", "outputs", "prompts"},
    "runner": {
        "config", "engines", "executors", "memory", "outputs", "pictures", "plan", "prompts", "session", "view",
        "weights", *COMPONENTS,
    },  # view: a run ends with its report
    # view: so does a multirun
    "cli": {"collect", "config", "executors", "model", "outputs", "prompts", "runner", "sampling", "view"},
    "serve": {
        "cli", "config", "engines", "executors", "outputs", "pictures", "plan", "prompts", "runner", "session", "view",
        *COMPONENTS,
    },
    "resident": {"__main__", "cli", "config", "executors", "memory", "outputs", "runner", "startup", "weights"},
    "startup": {"cli", "config", "engines", "executors", "runner", "weights"},
    "executors.handing": {"resident"},  # the door to it
    "executors.ray_actor": {"engines", "plan", "startup"},  # the entry of a worker's process
    "prompts.images": {"model", "outputs", "pictures", "sampling"},  # a picture's metadata
    "prompts.folder": {"model", "outputs", "sampling"},
    # loose modules
    "errors": set(),
    "logs": {"errors"},
    "signals": {"errors", "logs"},
    "model": {"errors"},
    "sampling": {"errors", "model"},
    "compile": {"errors", "weights"},
    "warmup": {"engines", "errors", "pictures", "sampling"},
    "session": {"engines", "memory", "pictures", "plan", "weights", *COMPONENTS},
    "prepare": {"cli", "config", "engines", "model", "startup", "weights"},
    "compare": {"collect", "engines", "weights"},
    "reproduce": {"cli", "config", "executors", "outputs", "pictures", "prompts", "runner", "sampling", "startup"},
    "collect.__main__": {"cli", "outputs"},
    "serve.config": {"model", "view"},
    "serve.__main__": {"cli", "config", "startup", "view"},
    "view.__main__": {"weights"},
    "view.runs": {"cli", "collect", "outputs", "prompts"},
    "view.command": {"cli"},
    "__main__": {
        "cli", "collect", "compare", "executors", "prepare", "reproduce", "resident", "serve", "startup", "view",
    },  # cli.commands
    "api": {"cli", "config", "executors", "outputs", "prompts", "runner", "sampling"},  # a second entrance beside cli
    "__init__": set(),
}  # fmt: skip
"""What each room, each loose module and each command inside a room may import, besides itself, BASICS and FILES."""

ONLY_IN = {
    "hydra": {"api", "cli", "config", "prepare", "reproduce"},
    "omegaconf": {"cli", "config", "prepare", "reproduce"},
    "PIL": {"api", "outputs", "collect", "compare", "pictures", "reproduce", "view"},
}
"""Rooms that may import a library at all."""
NOT_WHEN_IMPORTED = {"torch", "diffusers", "transformers", "safetensors", "PIL", "pyarrow", "triton"}
"""Libraries that no module imports when it is imported itself, but for those of ``HEAVY``."""
HEAVY = ("engines/native/", "engines/diffusers/", "weights/packed/", "collect/", "outputs/encoders", "outputs/metadata",
         "view/thumbs", "reproduce", "weights/eight_bits", "weights/parts")  # fmt: skip
"""Modules that are imported only once such a library is needed."""


def modules() -> dict[str, Path]:
    """Dotted name below the package and path of each module; a package by its own name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path
    return found


MODULES = modules()


@functools.cache
def imports(path: Path, *, at_import_time: bool = False) -> list[str]:
    """Absolute name of each module, or of each name of a module, that a file imports."""
    found: list[str] = []
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += (f"{node.module}.{alias.name}" for alias in node.names)
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if at_import_time and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
    return found


def arrows(name: str) -> set[str]:
    """The package's modules that module ``name`` imports."""
    targets = set()
    for imported in imports(MODULES[name]):
        first, _, inside = imported.partition(".")
        if first != "zimage_runner":
            continue
        while inside and inside not in MODULES:
            inside = inside.rpartition(".")[0]
        targets.add(inside or "__init__")
    return targets - {name}


def room(name: str) -> str:
    return name.partition(".")[0]


def test_a_module_imports_only_what_its_room_may() -> None:
    wrong = []
    for name in sorted(MODULES):
        allowed = ARROWS.get(name, ARROWS[room(name)]) | BASICS | {room(name)}
        wrong += [f"{name} -> {target}" for target in sorted(arrows(name) - FILES) if room(target) not in allowed]
    assert not wrong, f"{wrong}: see docs/architecture.md, or change ARROWS and say why"


def test_no_circle_is_larger_than_two_files() -> None:
    graph = {name: arrows(name) for name in MODULES}
    too_large = [sorted(circle) for circle in circles(graph) if len(circle) > LARGEST_CIRCLE]
    assert not too_large


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that all reach one another."""

    def reachable(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for target in graph.get(todo.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return seen

    reach = {name: reachable(name) for name in graph}
    found = {frozenset({other for other in reach[name] if name in reach[other]}) for name in graph}
    return [set(circle) for circle in found if circle]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": set()}
    assert sorted(map(sorted, circles(graph))) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_libraries_stay_in_their_rooms(library: str) -> None:
    users = {name for name, path in MODULES.items() if any(i.partition(".")[0] == library for i in imports(path))}
    assert not {name for name in users if room(name) not in ONLY_IN[library]}


PRIVATE_TO_HYDRA = re.compile(
    r"hydra\._internal|(hydra|omegaconf)(\.\w+)*\._\w|"  # what is imported
    r"\b(?!self|cls)\w+\._(get_node|get_parent|get_root|get_flag|set_flag|value|val|content|metadata|parent|is_none|is_missing|"
    r"is_interpolation|load_single_config|apply_overrides_to_config|process_config_searchpath)\b"
)


def test_every_library_comes_with_the_package() -> None:
    """Declared, or needed by what is: what only the tests' own packages bring is missing elsewhere."""
    declared = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [group for name, group in declared["optional-dependencies"].items() if name != "dev"]
    coming = [Requirement(text) for text in (*declared["dependencies"], *itertools.chain(*extras))]
    come: set[str] = set()
    while coming:
        name = canonicalize_name(coming.pop().name)
        if name not in come:
            come.add(name)
            with contextlib.suppress(metadata.PackageNotFoundError):  # of another platform, or of a GPU
                needs = map(Requirement, metadata.requires(name) or ())
                coming += (need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""}))
    homes = metadata.packages_distributions()
    libraries = {
        name.partition(".")[0] for path in MODULES.values() for name in imports(path)
    } - sys.stdlib_module_names
    strangers = {
        library for library in libraries if not come & {canonicalize_name(home) for home in homes.get(library, ())}
    }
    assert strangers <= {"zimage_runner", "triton"}  # torch brings Triton where there may be a GPU


def test_private_parts_of_hydra_are_touched_in_one_file() -> None:
    users = {name for name, path in MODULES.items() if PRIVATE_TO_HYDRA.search(path.read_text(encoding="utf-8"))}
    assert users == {"cli.hydra_patches"}, "go through cli/hydra_patches.py"


def test_heavy_libraries_are_imported_late() -> None:
    wrong = []
    for name, path in sorted(MODULES.items()):
        if not path.relative_to(PACKAGE).as_posix().startswith(HEAVY):
            early = {i.partition(".")[0] for i in imports(path, at_import_time=True)} & NOT_WHEN_IMPORTED
            wrong += [f"{name} imports {library} when it is imported" for library in sorted(early)]
    assert not wrong


def test_the_entrance_is_small() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert len(loose) <= LOOSE_MODULES, sorted(loose)


def test_every_room_says_what_it_holds() -> None:
    for folder in PACKAGE.rglob("*"):
        if folder.is_dir() and any(folder.glob("*.py")):
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
            assert text, f"{folder.relative_to(PACKAGE)}/__init__.py has no docstring"


def test_the_table_names_rooms_that_exist() -> None:
    rooms = {room(name) for name in MODULES}
    assert {name for name in ARROWS if "." not in name} == rooms
    assert set(ARROWS) - rooms <= set(MODULES)
    assert set().union(*ARROWS.values()) <= rooms


def test_no_test_module_imports_another() -> None:
    """What several tests need lies in tests/support/; fixtures that pytest hands out, in a conftest.py."""
    wrong = []
    for path in TESTS.rglob("*.py"):
        for imported in imports(path):
            names = imported.split(".")
            taken = {name for name in names if name == "conftest" or name.startswith("test_")}
            if (names[0] == "tests" and names[1:2] != ["support"]) or (taken and names[0] != "zimage_runner"):
                wrong.append(f"{path.relative_to(TESTS)} -> {imported}")
    assert not wrong, f"{wrong}: move it to tests/support/"
