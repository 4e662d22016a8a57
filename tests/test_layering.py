"""Do imports go down only, from room to room and from file to file?"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "rankfold"
ROOMS = (  # from the ground up: a room imports rooms before it, and of those only what their `__init__` hands on
    *("errors", "_common", "ranks", "decompose", "spectrum", "layers"),
    *("stats", "planning", "surgery", "latency", "recalibration", "train"),
    *("hub", "store", "exporters", "reports", "plots", "pipeline", "testing", "demo", "cli", "__main__"),
)
OPTIONAL = {
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torchvision",
    "timm",
    "transformers",
    "lightning",
    "sklearn",
}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def targets(node: ast.ImportFrom) -> list[str]:
    """What `from … import …` imports: of a package its files where it names them, otherwise itself."""
    folder = PACKAGE.parent.joinpath(*node.module.split("."))
    files = [a.name for a in node.names if (folder / a.name).is_dir() or (folder / f"{a.name}.py").is_file()]
    return [f"{node.module}.{name}" for name in files] or [node.module]


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, for its types too, and whether the import is inside a function."""
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(name, id(node) in inner) for name in targets(node)]
    return found


def ours(path: Path) -> list[str]:
    return [name for name, _ in imports(path) if name.startswith("rankfold.")]


def test_the_rooms_are_those_that_are_there():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__init__", "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_go_down(path):
    here = ROOMS.index(room(path))
    for name in ours(path):
        there = name.split(".")[1]
        assert ROOMS.index(there) <= here, f"{ROOMS[here]} imports {there}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=module)
def test_rooms_take_from_each_other_what_is_handed_on(path):
    for name in ours(path):
        _, there, *file = name.split(".")
        assert there == room(path) or not any(part.startswith("_") for part in file), f"{path}: {name}"


@pytest.mark.parametrize("name", ROOMS)
def test_no_circle_within_a_room(name):
    files = {module(path): set(ours(path)) for path in FILES if room(path) == name}
    try:
        tuple(TopologicalSorter({file: seen & files.keys() for file, seen in files.items()}).static_order())
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_inner_imports_are_of_optional_packages(path):
    inner = {name.split(".")[0] for name, inside in imports(path) if inside}
    assert inner <= OPTIONAL


def test_decompositions_know_no_modules():
    for path in [*(PACKAGE / "decompose").glob("*.py"), *(PACKAGE / "ranks").glob("*.py"), PACKAGE / "spectrum.py"]:
        assert "nn.Module" not in path.read_text(), path
        assert not any(name.startswith("torch.nn") for name, _ in imports(path)), path
