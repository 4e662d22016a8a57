"""Does what is saved come back the same, and is every other file refused, by its name and whole?"""

import copy
import io
import json
import os
import pickle
import resource
import stat
import struct
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cases import FORM_IDS, FORMS, dense_layers, part_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from rankfold._common import _atomic, _tensorfile, atomic_path
from rankfold.errors import PlanError, RankfoldError, StoreError
from rankfold.layers import TABLE, LowRankLinear
from rankfold.planning import Choice, Plan
from rankfold.store import load, read_plan, save
from rankfold.surgery import apply

DENSE = {
    nn.Linear: lambda: nn.Linear(24, 18),
    nn.Embedding: lambda: nn.Embedding(30, 12, padding_idx=3),
    nn.Conv1d: lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1),
    nn.Conv2d: lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False),
    nn.Conv3d: lambda: nn.Conv3d(8, 12, (1, 3, 3), padding="same", padding_mode="replicate"),
}
INPUT = {
    nn.Linear: lambda: torch.randn(3, 24),
    nn.Embedding: lambda: torch.randint(30, (2, 5)),
    nn.Conv1d: lambda: torch.randn(2, 8, 9),
    nn.Conv2d: lambda: torch.randn(2, 8, 7, 7),
    nn.Conv3d: lambda: torch.randn(2, 8, 3, 7, 7),
}


def one_layer(kind, method, options):
    """A skeleton of one layer, and a plan for it at the lowest rank worth planning."""
    dense = DENSE[kind]()
    grid = TABLE[kind, method].rank_grid(dense, **options)
    assert grid, "a variant without a rank that saves anything"
    return nn.Sequential(dense), Plan({"0": Choice(method, grid[len(grid) // 2], options)})


def two_layers(**options):
    """A dense skeleton, its plan, and the model with other weights than the skeleton's."""
    skeleton = nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4)).to(**options)
    plan = Plan({"0": Choice("svd", 3), "3": Choice("dense", reason="small")})
    small = apply(skeleton, plan)
    with torch.no_grad():
        for tensor in [*small.parameters(), small[1].running_mean]:
            tensor.add_(torch.randn_like(tensor))
    return skeleton, plan, small


@pytest.fixture
def path(tmp_path):
    return tmp_path / "small.safetensors"


@pytest.fixture
def saved(path):
    skeleton, plan, small = two_layers()
    save(small, plan, path)
    return skeleton, plan, small, path


def assert_same(model, wanted):
    assert_close(dict(model.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)


# --- the same comes back ---


@pytest.mark.parametrize(("kind", "method"), list(TABLE), ids=lambda x: getattr(x, "__name__", x))
def test_every_layer_and_method_comes_back(kind, method, path):
    variants = TABLE[kind, method].variants(DENSE[kind]())
    assert variants or method == "svd_form"  # a form to train in is planned for no budget
    for options in variants or ({},):
        skeleton, plan = one_layer(kind, method, options)
        small = apply(skeleton, plan).eval()
        save(small, plan, path)
        x = INPUT[kind]()
        for bare in (skeleton, copy.deepcopy(skeleton).to("meta")):
            loaded = load(path, bare).eval()
            assert type(loaded[0]) is type(small[0]) and loaded[0].rank == small[0].rank
            assert loaded[0].options == small[0].options
            assert_same(loaded, small)
            assert_close(loaded(x), small(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of the dense layer
@pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)
@given(data=st.data(), share=st.floats(0, 1))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_layer_at_any_rank_gives_the_same_outputs(layer, options, data, share, tmp_path_factory):
    dense, x = data.draw(dense_layers(layer.dense_type, torch.float32))
    rank = part_of(layer.full_rank(dense, **options), share)
    plan = Plan({"": Choice(layer.method, rank=rank, options=options)})
    small = apply(dense, plan)
    file = tmp_path_factory.mktemp("any") / "small.safetensors"
    save(small, plan, file)
    loaded = load(file, dense)
    assert_same(loaded, small)
    assert_close(loaded(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_comes_back(dtype, path):
    skeleton, plan, small = two_layers(dtype=dtype)
    save(small, plan, path)
    loaded = load(path, skeleton)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(loaded, small)


def test_the_plan_comes_back_without_the_weights(saved):
    _, plan, _, path = saved
    assert read_plan(path).to_json() == plan.to_json()
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    assert json.loads(texts["rankfold"])["layers"]["0"]["rank"] == 3
    assert texts["rankfold_format"] == "1" and texts["rankfold_version"] and texts["format"] == "pt"


def test_other_programs_can_read_the_weights(saved):
    _, _, small, path = saved
    assert_close(load_file(path), dict(small.state_dict()), rtol=0, atol=0)


def test_the_skeleton_is_neither_changed_nor_shared(saved):
    skeleton, _, small, path = saved
    before = copy.deepcopy(skeleton)
    loaded = load(path, skeleton)
    with torch.no_grad():
        for tensor in [*loaded.parameters(), *loaded.buffers()]:
            tensor.zero_()
    assert_same(skeleton, before)
    assert not any(p.is_meta for p in skeleton.parameters())
    assert_same(load(path, skeleton), small)  # nor does changing the model change the file


def test_the_file_may_go_once_it_is_read(saved):
    skeleton, _, small, path = saved
    loaded = load(path, skeleton)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(loaded, small)


def test_modes_gradients_and_hooks_are_those_of_the_skeleton(saved):
    skeleton, _, _, path = saved
    skeleton[0].requires_grad_(False)
    skeleton[3].bias.requires_grad_(False)
    skeleton[1].eval()
    calls = []
    skeleton[3].register_forward_hook(lambda *_: calls.append(1))
    for bare in (skeleton, copy.deepcopy(skeleton).to("meta")):
        loaded = load(path, bare)
        assert [p.requires_grad for p in loaded[0].parameters()] == [False] * len(list(loaded[0].parameters()))
        assert loaded[3].weight.requires_grad and not loaded[3].bias.requires_grad
        assert [module.training for module in loaded] == [True, False, True, True]
        calls.clear()
        loaded(torch.randn(2, 12))
        assert calls == [1]


def test_the_device_may_be_chosen(saved):
    skeleton, _, _, path = saved
    bare = copy.deepcopy(skeleton).to("meta")
    assert {p.device.type for p in load(path, bare, device="cpu").parameters()} == {"cpu"}
    with pytest.raises(StoreError, match="meta"):
        load(path, skeleton, device="meta")


def test_noncontiguous_weights_come_back(path):
    skeleton, plan, small = two_layers()
    small[3].weight = nn.Parameter(torch.randn(10, 4).t())
    pair = torch.randn(2, 10)
    small[1].weight, small[1].bias = nn.Parameter(pair[0]), nn.Parameter(pair[1])  # views of one storage
    small[1].running_mean = pair[0, :1].expand(10)
    save(small, plan, path)
    assert_same(load(path, skeleton), small)


class Tied(nn.Module):
    """A language model in small: the head reads the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)

    def forward(self, x):
        return self.head(self.middle(self.embed(x)) * self.scale)


def test_tied_weights_are_stored_once_and_tied_again(path):
    skeleton, plan = Tied(), Plan({"middle": Choice("svd", 4)})
    small = apply(skeleton, plan)
    save(small, plan, path)
    with safe_open(path, framework="pt") as file:
        assert sum(file.get_tensor(name).shape == (50, 16) for name in file.keys()) == 1  # noqa: SIM118
    loaded = load(path, skeleton)
    assert loaded.head.weight is loaded.embed.weight
    assert len(list(loaded.parameters())) == len(list(small.parameters()))
    x = torch.randint(50, (2, 3))
    assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_a_module_in_two_places_stays_one(path):
    block = nn.Linear(8, 8)
    skeleton = nn.Sequential(block, nn.ReLU(), block)
    plan = Plan({"0": Choice("svd", 2)})
    small = apply(skeleton, plan)
    save(small, plan, path)
    loaded = load(path, skeleton)
    assert loaded[0] is loaded[2] and isinstance(loaded[0], LowRankLinear)
    assert_same(loaded, small)


def test_modules_that_hold_their_weights_twice_come_back(path):
    skeleton = nn.ModuleDict({"lstm": nn.LSTM(4, 6), "attention": nn.MultiheadAttention(6, 2), "out": nn.Linear(6, 8)})
    plan = Plan({"out": Choice("svd", 2)})
    small = apply(skeleton, plan)
    save(small, plan, path)
    x = torch.randn(3, 2, 4)
    for bare in (skeleton, copy.deepcopy(skeleton).to("meta")):
        loaded = load(path, bare)
        assert_close(loaded["lstm"](x)[0], small["lstm"](x)[0], rtol=0, atol=0)
        y = small["lstm"](x)[0]
        assert_close(loaded["attention"](y, y, y)[0], small["attention"](y, y, y)[0], rtol=0, atol=0)


def test_buffers_that_no_file_holds_come_from_the_skeleton(path):
    skeleton, plan = Tied(), Plan({"middle": Choice("svd", 4)})
    save(apply(skeleton, plan), plan, path)
    skeleton.scale.fill_(7.0)
    assert load(path, skeleton).scale.item() == 7.0
    with pytest.raises(StoreError, match="no values for scale"):
        load(path, skeleton.to("meta"))


# --- what cannot be saved ---


def test_a_plan_of_another_model_is_not_saved(path):
    _, plan, small = two_layers()
    for problem, wrong in [
        ("of rank 3 where it says 'svd' of rank 2", {"0": Choice("svd", 2)}),
        ("where it says dense", {"0": Choice("dense", reason="no")}),
        ("where it says 'svd'", {"0": plan.layers["0"], "3": Choice("svd", 2)}),
        ("does not name", {}),
        ("does not have", {**plan.layers, "head": Choice("dense", reason="no")}),
    ]:
        with pytest.raises(PlanError, match=problem):
            save(small, Plan(wrong), path)
    assert not path.exists()


def test_a_split_other_than_the_plans_is_not_saved(path):
    skeleton, plan = one_layer(nn.Conv2d, "svd", {"split": "channel"})
    small = apply(skeleton, plan)
    wrong = Plan({"0": Choice("svd", plan.layers["0"].rank, {"split": "spatial"})})
    with pytest.raises(PlanError, match="options"):
        save(small, wrong, path)


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.ParameterList([torch.eye(3).to_sparse()]), "0 is a Tensor of layout"),
        (nn.ParameterList([torch.ones(2, dtype=torch.complex128)]), "cannot be written"),
        (Extra(2, 2), "_extra_state is a dict"),
    ],
    ids=["meta", "sparse", "complex128", "extra state"],
)
def test_values_that_no_file_can_hold_are_named(model, problem, path):
    with pytest.raises(StoreError, match=problem):
        save(model, Plan({}), path)
    assert not list(path.parent.iterdir())


# --- what cannot be loaded ---


def header(fields):
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text


class Evil:
    def __reduce__(self):
        return (os._exit, (66,))


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil()))
    return buffer.getvalue()


SPAN = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FOREIGN = {
    "empty": (b"", "is empty"),
    "pickle": (pickle.dumps(Evil()), "pickle"),
    "old pickle": (pickle.dumps(Evil(), protocol=0), "damaged"),
    "zip": (zipped(), "zip archive"),
    "text": (b"hello, world\n" * 9, "damaged"),
    "huge header": (struct.pack("<Q", 2**62) + b"{}", "damaged"),
    "no json": (struct.pack("<Q", 4) + b"{\xff\xfe}", "damaged"),
    "no data": (header({"a": SPAN}), "damaged"),
    "overlap": (header({"a": SPAN, "b": SPAN}) + bytes(8), "damaged"),
    "odd dtype": (header({"a": {**SPAN, "dtype": "F6"}}) + bytes(8), "damaged"),
    "endless shape": (header({"a": {**SPAN, "shape": [2**40, 2**40]}}) + bytes(8), "damaged"),
    "no plan": (header({"a": SPAN}) + bytes(8), "without a plan"),
    "bad plan": (header({"__metadata__": {"rankfold": "{", "rankfold_format": "1"}}), "plan in it is damaged"),
    "later": (header({"__metadata__": {"rankfold": "{}", "rankfold_format": "2"}}), "install a later"),
    "no format": (header({"__metadata__": {"rankfold": "{}"}}), "has format None"),
}


@pytest.mark.parametrize("content", FOREIGN)
def test_another_file_is_refused_by_name(content, path):
    data, problem = FOREIGN[content]
    path.write_bytes(data)
    for read in (lambda: load(path, nn.Linear(2, 2)), lambda: read_plan(path)):
        with pytest.raises(StoreError, match=problem) as caught:
            read()
        assert str(path) in str(caught.value)


def test_places_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors", nn.Linear(2, 2))
    with pytest.raises(StoreError, match="not a regular file"):
        load(tmp_path, nn.Linear(2, 2))
    with pytest.raises(StoreError, match="not a regular file"):
        load(os.devnull, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "aliases",
    ["[]", "{", '{"x": "nowhere"}', '{"x": 3}', '{"0.weight": "3.weight"}', "[" * 100_000],
    ids=lambda t: t[:9],
)
def test_a_damaged_table_of_ties_is_refused(aliases, saved):
    skeleton, plan, small, path = saved
    texts = {"rankfold": plan.to_json(), "rankfold_format": "1", _tensorfile.ALIASES: aliases}
    state = {**small.state_dict(), "0.weight": torch.ones(1)}
    save_file(state, path, metadata=texts)
    with pytest.raises(StoreError, match="tied weights|is missing or damaged"):
        load(path, skeleton)


@pytest.mark.parametrize("kept", [0, 7, 9, 200, -1])
def test_a_truncated_file_is_refused(kept, saved):
    skeleton, _, _, path = saved
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StoreError, match="is empty" if kept == 0 else "cut short"):
        load(path, skeleton)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_read(changes, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "small.safetensors"
    skeleton, plan, small = two_layers()
    save(small, plan, path)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        loaded = load(path, skeleton)
    except StoreError:
        return
    assert loaded.state_dict().keys() == small.state_dict().keys()


def test_a_plan_that_does_not_fit_the_skeleton_is_refused(saved):
    skeleton, _, small, path = saved
    for problem, other in [
        ("plan does not fit the skeleton", nn.Linear(12, 10)),
        ("plan does not fit the skeleton", nn.Sequential(nn.Linear(2, 2), *copy.deepcopy(skeleton)[1:])),
        ("plan does not fit the skeleton", small),
        ("differs in 3.weight .*10.*11", nn.Sequential(*copy.deepcopy(skeleton)[:3], nn.Linear(11, 4))),
        ("lacks 4.weight", nn.Sequential(*copy.deepcopy(skeleton), nn.Linear(4, 4, bias=False))),
        (
            "beside those of the skeleton 3.bias",
            nn.Sequential(*copy.deepcopy(skeleton)[:3], nn.Linear(10, 4, bias=False)),
        ),
        ("float32 .* in the file, float64", copy.deepcopy(skeleton).double()),
        ("no shape yet", nn.Sequential(nn.LazyLinear(10), *copy.deepcopy(skeleton)[1:])),
    ]:
        with pytest.raises(StoreError, match=problem) as caught:
            load(path, other)
        assert isinstance(caught.value, RankfoldError)


# --- the file is written whole or not at all ---


@contextmanager
def limited_files(size):
    """Let no file grow beyond a size, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_the_old_file(saved):
    _, _, small, path = saved
    old = path.read_bytes()
    large = nn.Linear(200, 200)
    with limited_files(4096), pytest.raises(StoreError, match=str(path)):
        save(large, Plan({}), path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def raising(error, write_first):
    def replacement(*args, **kwargs):
        if write_first:
            Path(args[1]).write_bytes(b"half of a file")
        raise error

    return replacement


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["Ctrl-C", "full"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(_tensorfile, "save_file"), (_atomic, "_flush"), (_atomic.os, "replace")],
    ids=["writing", "flushing", "renaming"],
)
def test_an_interrupted_save_leaves_the_old_file_and_no_other(module, name, error, saved, monkeypatch):
    skeleton, plan, small, path = saved
    old = path.read_bytes()
    other = copy.deepcopy(small)
    with torch.no_grad():
        other[3].weight.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, raising(error, name == "save_file"))
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoreError):
            save(other, plan, path)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]
    assert_same(load(path, skeleton), small)


def test_places_that_cannot_be_written_to(saved, monkeypatch):
    _, plan, small, path = saved
    for place in (
        path / "below.safetensors",
        path.parent / "none" / "small.safetensors",
        path.parent,
        Path(os.devnull),
    ):
        with pytest.raises(StoreError, match=str(place)):
            save(small, plan, place)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

    def read_only(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_atomic.os, "open", read_only)
    with pytest.raises(StoreError, match="Permission denied"):
        save(small, plan, path)


def test_permissions_and_links_are_kept(saved):
    _, plan, small, path = saved
    umask = os.umask(0o022)
    try:
        fresh = path.with_name("fresh.safetensors")
        save(small, plan, fresh)
        assert stat.S_IMODE(fresh.stat().st_mode) == 0o644
        path.chmod(0o640)
        link = path.with_name("link.safetensors")
        link.symlink_to(path)
        save(small, plan, link)
    finally:
        os.umask(umask)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_the_block_raises_is_what_comes_out(tmp_path):
    target = tmp_path / "note.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as unfinished:
        unfinished.write_text("half")
        assert target.read_text() == "old"
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"] and target.read_text() == "old"
    with atomic_path(target) as unfinished:
        unfinished.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"] and target.read_text() == "new"


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    plan = Plan({"0": Choice("dense")})
    for k in range(8):  # of four texts in the header safetensors would write another order each time
        save(model, plan, tmp_path / f"{k}.safetensors")
    assert len({(tmp_path / f"{k}.safetensors").read_bytes() for k in range(8)}) == 1
