"""Imports point one way: no room imports a higher one, and no modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the top; a room may import its own layer and those below.
LAYERS = (
    ("cli", "serving", "integrations"),
    ("experiments",),
    ("pipeline",),
    ("report",),
    ("inference", "training", "evaluation"),
    ("model", "tokenizer", "data"),
    ("ops", "trie"),
    ("kernels",),
    ("",),  # the modules beside the rooms: errors, files, the native core
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# The public names and the program import what they name.
DOORS = {"onerec", "onerec.__main__"}

Graph = dict[str, set[str]]


def sources(root: Path) -> dict[str, Path]:
    """Module -> file of the package, kernels among it; stubs stand for the native modules."""
    found = {}
    for folder, package in (
        (root / "onerec", ("onerec",)),
        (root / "kernels", ("onerec", "kernels")),
    ):
        for path in (*folder.rglob("*.py"), *folder.rglob("*.pyi")):
            parts = [*package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules that a file imports anywhere, for the type checker too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules else str(node.module)


def graph(root: Path) -> Graph:
    """Module -> modules that it imports; the doors import nothing."""
    modules = sources(root)
    return {
        name: set() if name in DOORS else set(imported(path, modules))
        for name, path in modules.items()
    }


def room(module: str) -> str:
    """The folder of `onerec/` that a module is in; "" for the modules beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYER else ""


def upward(edges: Graph) -> list[str]:
    """Imports of a higher layer."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(edges.items())
        for other in sorted(others)
        if LAYER[room(other)] < LAYER[room(module)]
    ]


def circle(edges: Graph) -> list[str]:
    """Modules that import each other, in a round; empty if there are none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_its_layer() -> None:
    rooms = {path.parent.name for path in (ROOT / "onerec").glob("*/__init__.py")}
    assert rooms | {"kernels", ""} == set(LAYER)


def test_no_room_imports_a_higher_one() -> None:
    assert upward(graph(ROOT)) == []


def test_no_modules_import_each_other() -> None:
    assert circle(graph(ROOT)) == []


def test_wrong_imports_are_seen(tmp_path: Path) -> None:
    files = {
        "onerec/__init__.py": "from onerec.cli import main",
        "onerec/errors.py": "",
        "onerec/cli/__init__.py": "",
        "onerec/cli/main.py": "def f():\n import onerec.trie.build\nfrom onerec import errors",
        "onerec/trie/__init__.py": "from onerec.trie.build import x",
        "onerec/trie/build.py": "import numpy\nif 0:\n    from onerec.trie import look",
        "onerec/trie/look.py": "from onerec.trie.build import y",
        "kernels/plan.py": "from onerec.trie.look import z",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    edges = graph(tmp_path)
    assert edges["onerec.cli.main"] == {"onerec.trie.build", "onerec.errors"}
    assert upward(edges) == ["onerec.kernels.plan imports onerec.trie.look"]
    assert set(circle(edges)) == {"onerec.trie.build", "onerec.trie.look"}
