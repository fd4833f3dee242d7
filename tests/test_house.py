"""The house's own rules, read from the sources: imports point down, native code has one door, public names are true."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import protomamba

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "protomamba"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top down: an import points to a later row. Those of one row never import each other.
ROWS = (
    ("__main__",),
    ("cli",),
    ("doctor",),
    ("parity", "bench", "demo"),
    ("export", "predict"),
    ("train",),
    ("decode",),
    ("model", "data", "report"),
    ("checkpoint",),
    ("kernels", "config_file", "metrics_file", "storage", "folder_lock", "output", "bits", "memory"),
    ("run_config",),
    ("config",),
    ("schema",),
    ("errors", "machine", "words"),
)
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}

# Stricter than the rows: all that these may import of ours, beside themselves.
ONLY = {
    "data": {"config", "errors", "folder_lock", "schema", "storage", "words"},
    "checkpoint": {"config", "errors", "folder_lock", "storage"},
    "report": {"run_config", "errors", "metrics_file", "storage"},
    "kernels": {"errors"},
    "storage": {"errors"},
    "metrics_file": {"errors"},
}

# native.py loads our libraries; allocator.py asks the C library's malloc to keep its memory.
NATIVE_DOORS = {"kernels/native.py", "kernels/allocator.py"}
NATIVE_MODULES = {"ctypes", "_ctypes", "cffi", "torch.utils.cpp_extension"}

HEAVY = ("torch", "numpy", "pydantic", "rich", "safetensors", "yaml")


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(file: Path) -> str:
    """The folder or module right below the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST) -> set[str]:
    """Every module and every `module.name` that a file imports, inside functions too; relative imports as dots."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def imported_parts(source: str) -> set[str]:
    """The parts of protomamba that a file imports; a public name taken from the top counts as its own part."""
    names = imported_names(ast.parse(source))
    parts = {name.split(".")[1] for name in names if name.startswith("protomamba.")}
    return parts - {"__version__"}


def wrong_imports(part: str, source: str) -> set[str]:
    """The parts that a file of this part imports and must not."""
    allowed = ONLY.get(part, {other for other in ROW if ROW[other] > ROW[part]}) | {part}
    return imported_parts(source) - allowed


# The package's own __init__ lists the public names, which come from everywhere and are loaded when used.
@pytest.mark.parametrize("file", [f for f in FILES if f != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    assert part in ROW, f"{part}: give it a row in tests/test_house.py"
    assert not wrong_imports(part, file.read_text())


@pytest.mark.parametrize(
    ("part", "source", "wrong"),
    [
        ("model", "from protomamba.train.trainer import Trainer", {"train"}),
        ("model", "def f():\n    import protomamba.data.shards", {"data"}),
        ("data", "from protomamba import kernels", {"kernels"}),
        ("kernels", "from protomamba import config, errors", {"config"}),
        ("train", "from protomamba import Trainer", {"Trainer"}),
        ("bench", "from protomamba.demo import main", {"demo"}),
        ("train", "from protomamba import __version__\nfrom protomamba.model import mamba", set()),
    ],
)
def test_the_rule_finds_imports_that_point_up(part: str, source: str, wrong: set[str]) -> None:
    assert wrong_imports(part, source) == wrong


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_are_absolute_and_native_code_has_one_door(file: Path) -> None:
    names = imported_names(ast.parse(file.read_text()))
    assert not {name for name in names if name.startswith(".")}
    if name_of(file) not in NATIVE_DOORS:
        assert not names & NATIVE_MODULES


def test_public_names_resolve_and_match_what_type_checkers_see() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(protomamba.__all__) == sorted([*seen, "__version__"])
    for name, module in seen.items():
        home = importlib.import_module(str(module))
        assert getattr(protomamba, name) is getattr(home, name), f"{name}: a module of the same name hides it"


def test_every_public_name_is_on_the_page_of_the_library() -> None:
    shown = set(re.findall(r"^\.\. auto\w+:: (\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert shown - {"protomamba"} == set(protomamba.__all__) - {"__version__"}


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Tariner'"):
        _ = protomamba.Tariner


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, protomamba; print(*[m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_the_readme_maps_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    folders = {f.parent.relative_to(PACKAGE).as_posix() for f in PACKAGE.rglob("*.py")} - {"."}
    named = {f.name for f in PACKAGE.iterdir() if f.is_dir()}
    missing = sorted(folder for folder in folders if f"{folder}/" not in text)
    assert not missing, f"folders that the README's map does not name: {missing}"
    listed = {line.split()[0].rstrip("/") for line in text.splitlines() if re.match(r"^ {6}\w[\w/]*/ ", line)}
    assert {name.split("/")[0] for name in listed} <= named, "the map names folders that are not there"
