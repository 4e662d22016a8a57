"""Do the documents name what exists, and does the code in them run?"""

import ast
import importlib
import inspect
import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError
from rankfold.layers import BLOCKS, TABLE
from rankfold.planning import Amounts, Measured, Planning

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += sorted((ROOT / "reproduce").rglob("README.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:src|tests|docs|benchmarks|reproduce)/[\w./-]*")


def page_name(path):
    return str(path.relative_to(ROOT))


def fenced(text):
    """What stands in the blocks of Python of a page, without prompts and what they print."""
    for block in BLOCK.findall(text):
        lines = block.splitlines()
        shown = any(line.startswith(">>> ") for line in lines)
        yield "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... "))) if shown else block


def code(path):
    """Every piece of Python on a page that can be parsed, "…" standing for arguments that are not told."""
    text = path.read_text(encoding="utf-8")
    for piece in [*fenced(text), *INLINE.findall(BLOCK.sub("", text))]:
        try:
            yield ast.parse(piece.replace("…", "..."))
        except SyntaxError:
            continue


def named(node):
    """The dotted name of an expression, "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := named(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def found(name):
    """What `rf.…` names, None for names of other things."""
    first, _, rest = name.partition(".")
    if first not in ("rf", "rankfold"):
        return None
    value = rf
    for part in rest.split(".") if rest else ():
        if not hasattr(value, part) and inspect.ismodule(value):
            importlib.import_module(f"{value.__name__}.{part}")
        value = getattr(value, part)
    return value


def keywords(value):
    """The names of a function's parameters; None where it takes any."""
    parameters = inspect.signature(value).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_names_and_keywords_exist(path):
    for tree in code(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (name := named(node)):
                found(name)
            if isinstance(node, ast.Call) and (value := found(named(node.func))) is not None:
                known, given = keywords(value), {word.arg for word in node.keywords if word.arg}
                assert known is None or given <= known, f"{ast.unparse(node)}: no {sorted(given - known)}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/how_it_is_built.md", "README.md"])
def test_paths_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = {path.rstrip(".") for path in PATH.findall(text)}
    assert paths, page
    missing = sorted(path for path in paths if not (ROOT / path).exists())
    assert not missing


def test_the_page_of_the_house_names_every_room():
    text = (ROOT / "docs" / "how_it_is_built.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs" / "how_it_is_built.svg").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "rankfold").iterdir():
        room = path.name.removesuffix(".py")
        if room.startswith("__") or (path.is_file() and path.suffix != ".py"):
            continue
        assert f"src/rankfold/{path.name}" in text, room
        assert f">{room}<" in picture, room


def test_the_first_block_of_the_readme_runs_as_pasted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8")).group(1)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert "layers: " in capsys.readouterr().out
    assert names["plan"].macs <= 0.5 * names["plan"].dense.macs
    assert (tmp_path / "small.safetensors").exists() and (tmp_path / "small.pt2").exists()


# The page of file formats

FORMATS = (ROOT / "docs" / "file_format.md").read_text(encoding="utf-8")


def keys(heading):
    """The first column of the table under a heading."""
    section = FORMATS.split(f"\n{heading}\n", 1)[1]
    table = re.search(r"^\| key .*?\n\n", section, re.M | re.S).group(0)
    return re.findall(r"^\| `(\w+)` \|", table, re.M)


def plan_with_everything():
    amounts = Amounts(1568, 393216, 6272, 0.0002)
    choice = rf.Choice(
        "svd", rank=8, amounts=amounts, dense=amounts, error=0.25, damage=0.1, reason="why", metric="weights"
    )
    return rf.Plan(
        {"conv": choice},
        rf.Budget(macs=0.5),
        Planning(),
        amounts,
        "outputs",
        "energy",
        Measured(0.5, 1.0, "here"),
    )


@pytest.mark.parametrize(
    ("heading", "part"),
    [
        ("### The head", lambda data: data),
        ("### A layer", lambda data: data["layers"]["conv"]),
        ("### `planning`: how the plan was made", lambda data: data["planning"]),
        ("### `measured`", lambda data: data["measured"]),
    ],
)
def test_every_key_of_a_plan_is_specified(heading, part):
    written = part(json.loads(plan_with_everything().to_json()))
    assert set(keys(heading)) == set(written)


def test_the_defaults_of_a_planning_are_those_that_are_specified():
    table = FORMATS.split("### `planning`: how the plan was made", 1)[1].split("\n### ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)`", table, re.M))
    assert {name: json.loads(value) for name, value in told.items()} == Planning().to_data()
    assert set(told) == {field.name for field in fields(Planning)}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(rankfold=2),
        lambda data: data.pop("rankfold"),
        lambda data: data.pop("layers"),
        lambda data: data.update(dense_flops=1),
        lambda data: data.update(metric="taste"),
        lambda data: data.update(budget={}),
        lambda data: data.update(budget={"macs": 1.5}),
        lambda data: data["planning"].update(rules="optimal"),
        lambda data: data["planning"].update(rule="best"),
        lambda data: data["measured"].pop("kept"),
        lambda data: data["layers"]["conv"].pop("method"),
        lambda data: data["layers"]["conv"].update(method="magic"),
        lambda data: data["layers"]["conv"].pop("rank"),
        lambda data: data["layers"]["conv"].update(rank=0),
        lambda data: data["layers"]["conv"].update(rank=8.0),
        lambda data: data["layers"]["conv"].update(flavour="sweet"),
        lambda data: data["layers"]["conv"].update(params=-1),
        lambda data: data["layers"]["conv"].update(error=float("nan")),
    ],
    ids=range(18),
)
def test_a_reader_of_plans_refuses_what_the_page_says(change):
    data = json.loads(plan_with_everything().to_json())
    assert rf.Plan.from_json(json.dumps(data)) == plan_with_everything()
    change(data)
    with pytest.raises(PlanError):
        rf.Plan.from_json(json.dumps(data))


def test_without_for_what_was_predicted_is_taken_as_it_is():
    data = json.loads(plan_with_everything().to_json())
    del data["layers"]["conv"]["for"], data["measured"]["for"]
    data["layers"]["conv"]["rank"] = 9
    found = rf.Plan.from_json(json.dumps(data))
    assert found["conv"] == replace(plan_with_everything()["conv"], rank=9)
    assert found.measured is not None


def tensors_of(method):
    rows = FORMATS.split("| method | tensors", 1)[1].splitlines()
    row = next(line for line in rows if f"`{method}`" in line.split("|")[1])
    return set(re.findall(r"`([\w.]+)`", row.split("|")[2]))


@pytest.mark.parametrize("key", [*TABLE, *BLOCKS], ids=lambda key: f"{key[0].__name__}-{key[1]}")
def test_the_tensors_of_a_layer_have_the_names_that_are_specified(key):
    kind, method = key
    assert numbered(state_of(kind, method)) <= numbered(tensors_of(method))


def numbered(names):
    """Names with 0 for every number: one row of the page tells of all cores and axes."""
    return {re.sub(r"\d+", "0", name) for name in names}


def state_of(kind, method):
    if (kind, method) in BLOCKS:
        return BLOCKS[kind, method](16, 16, rank=4).state_dict()
    dense = kind(16, 16) if kind in (nn.Linear, nn.Embedding) else kind(16, 16, 3)
    cls = TABLE[kind, method]
    states = {}
    for options in cls.variants(dense) or ({},):
        rank = cls.rank_grid(dense, **options)
        states |= cls.like(dense, rank=rank[0] if rank else 1, **options).state_dict()
    return states


def test_a_model_whose_tensors_do_not_fit_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16))
    plan = rf.Plan({"0": rf.Choice("svd", rank=2)})
    rf.save(rf.apply(model, plan), plan, tmp_path / "small.safetensors")
    with pytest.raises(rf.RankfoldError, match="does not fit"):
        rf.load(tmp_path / "small.safetensors", nn.Sequential(nn.Linear(16, 16, bias=False)))
    with pytest.raises(rf.RankfoldError, match="does not fit"):
        rf.load(tmp_path / "small.safetensors", nn.Sequential(nn.Linear(16, 16).to(torch.float64)))
