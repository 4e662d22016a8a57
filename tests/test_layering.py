"""Do imports go down the storeys only, and do siblings keep to themselves?"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "rankfold"
STOREY = {
    **dict.fromkeys(["errors", "_typing", "_atomic"], -2),
    **dict.fromkeys(["_batches", "_modes", "_progress", "_tensorfile", "_times", "_timing_cache"], -1),
    **dict.fromkeys(["decompose", "ranks", "spectrum"], 0),
    **dict.fromkeys(["layers", "runtimes", "_outputs"], 1),
    **dict.fromkeys(
        [
            "latency",
            "stats",
            "timings",
            "promises",
            "folding",
            "planning",
            "_pretrained",
            "_copies",
            "attention",
            "surgery",
        ],
        2,
    ),
    **dict.fromkeys(["recalibration", "calibration", "_chain", "_scores", "searches", "pipeline", "train"], 2),
    **dict.fromkeys(["hub", "store", "exporters", "reports", "plots"], 3),
    **dict.fromkeys(["cli", "demo", "__main__"], 4),
}
SIBLINGS = {  # the imports within a storey that the architecture allows
    "_timing_cache": {"_times"},
    "stats": {"latency"},
    "timings": {"latency", "stats"},
    "promises": {"latency", "planning", "surgery"},
    "folding": {"_copies", "stats"},
    "planning": {"stats", "latency"},
    "_pretrained": {"planning"},
    "_copies": {"_pretrained"},
    "attention": {"_copies", "planning"},
    "surgery": {"_pretrained", "_copies", "attention", "planning", "stats", "latency"},
    "recalibration": {"_copies", "attention", "stats"},
    "calibration": {"planning", "stats", "surgery"},
    "_chain": {
        *("calibration", "recalibration", "promises", "timings", "train", "surgery", "planning", "stats", "latency"),
    },
    "searches": {"_chain", "_scores", "planning", "stats", "latency"},
    "pipeline": {"_chain", "searches", "planning", "stats", "latency"},
    "train": {"surgery", "planning", "stats", "latency", "folding"},
    "plots": {"reports"},
    "cli": {"demo"},
    "__main__": {"cli"},
}
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


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Every module that a file imports, absolute, and whether the import is inside a function."""
    tree = ast.parse(path.read_text())
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "rankfold" else [f"rankfold.{a.name}" for a in node.names]
            found += [(name, id(node) in inner) for name in names]
    return found


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    for module, _ in imports(path):
        if not module.startswith("rankfold."):
            continue
        there = module.split(".")[1]
        allowed = here == there or STOREY[there] < STOREY[here] or there in SIBLINGS.get(here, ())
        assert allowed, f"{here} (storey {STOREY[here]}) imports {there} (storey {STOREY[there]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_inner_imports_are_of_optional_packages(path):
    inner = {module.split(".")[0] for module, inside in imports(path) if inside}
    assert inner <= OPTIONAL


def test_storey_zero_knows_no_modules():
    for path in [*(PACKAGE / "decompose").glob("*.py"), *(PACKAGE / "ranks").glob("*.py"), PACKAGE / "spectrum.py"]:
        assert "nn.Module" not in path.read_text(), path
        assert not any(module.startswith("torch.nn") for module, _ in imports(path)), path
