"""Does each kind of bad input get its clear error, and is everything afterwards as it was, bit for bit?

The list of what a careless user hands in; details of each are in the tests of the room that refuses it.
"""

import copy
import io
import os
import pickle

import pytest
import torch
from cases import FORM_IDS, FORMS, example_of
from cases_models import convnet, params, same_state, state
from torch import nn

import rankfold as rf
from rankfold._common import _tensorfile
from rankfold.errors import BudgetError, DataError, LayerError, PlanError, StoreError
from rankfold.train import fit, reestimate_batchnorm

IMAGE = torch.randn(2, 3, 8, 8)
PLAN = rf.Plan({"3": rf.Choice("svd", rank=4), "8": rf.Choice("svd", rank=7)})
forms = pytest.mark.parametrize(("layer", "options"), FORMS, ids=FORM_IDS)


@pytest.fixture
def model():
    """A model of which nothing may have changed when the test is over."""
    made = convnet()
    before, modes = state(made), [module.training for module in made.modules()]
    yield made
    same_state(made, before)
    assert [module.training for module in made.modules()] == modes


@pytest.fixture
def old(tmp_path):
    """A file that must be as it was, and alone, when the test is over."""
    path = tmp_path / "old.safetensors"
    rf.save(rf.apply(convnet(), PLAN), PLAN, path)
    content = path.read_bytes()
    yield path
    tmp_path.chmod(0o755)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def with_value(model, value):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[3].weight.view(-1)[5] = value
    return broken


@forms
@pytest.mark.parametrize("beyond", [False, True], ids=["zero", "beyond full"])
def test_rank_of_a_layer(layer, options, beyond):
    dense, _ = example_of(layer.dense_type)
    full = layer.full_rank(dense, **options)
    rank = tuple(r + 1 if beyond else 0 for r in full) if isinstance(full, tuple) else full + 1 if beyond else 0
    for build in (layer.from_dense, layer.like):
        with pytest.raises(LayerError, match="rank") as error:
            build(dense, rank=rank, **options)
        assert layer.__name__ in str(error.value)


def test_rank_of_zero_in_a_plan():
    with pytest.raises(PlanError, match="rank of method 'svd' must be an int >= 1.*got 0"):
        rf.Choice("svd", rank=0)
    with pytest.raises(PlanError, match="layer '3' of the plan: rank"):
        rf.Plan.from_json(PLAN.to_json().replace('"rank": 4', '"rank": 0'))


def test_rank_beyond_full_in_a_plan(model):
    plan = rf.Plan.from_json(PLAN.to_json().replace('"rank": 7', '"rank": 41'))
    with pytest.raises(PlanError, match="layer '8'.*rank 41 is beyond the full rank 40"):
        rf.apply(model, plan)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(model, value):
    broken = with_value(model, value)
    for act in (
        lambda: rf.plan(broken, budget=rf.Budget(params=0.5)),
        lambda: rf.compress(broken, example=IMAGE, budget=rf.Budget(params=0.5)),
        lambda: rf.apply(broken, PLAN),
    ):
        with pytest.raises(rf.RankfoldError, match="layer '3'.*NaN or Inf"):
            act()
    plan = rf.plan(broken, budget=rf.Budget(params=0.7), exclude="3")
    assert plan.layers["3"].reason == "excluded"


EMPTY = {
    "measure": lambda model: rf.measure(model, []),
    "compress": lambda model: rf.compress(model, [], budget=rf.Budget(params=0.5)),
    "fit": lambda model: fit(model, []),
    "re-estimate": lambda model: reestimate_batchnorm(model, []),
}


@pytest.mark.parametrize("call", EMPTY)
def test_an_empty_loader(model, call):
    with pytest.raises(DataError, match="empty|no batch"):
        EMPTY[call](model)


UNKNOWN = {
    "include": lambda model: rf.plan(model, budget=rf.Budget(params=0.5), include="80"),
    "exclude": lambda model: rf.plan(model, budget=rf.Budget(params=0.5), exclude=["8", "80"]),
    "plan": lambda _: PLAN.with_choice("80", rf.Choice("dense")),
    "apply": lambda model: rf.apply(model, rf.Plan({"80": rf.Choice("svd", rank=2)})),
    "save": lambda model: rf.save(model, rf.Plan({"80": rf.Choice("svd", rank=2)}), os.devnull),
}


@pytest.mark.parametrize("place", UNKNOWN)
def test_an_unknown_layer(model, place):
    with pytest.raises(PlanError, match="'80'"):
        UNKNOWN[place](model)


@pytest.mark.parametrize("methods", ["svd", "tucker", "cp", ("svd", "tucker", "tt")], ids=str)
@pytest.mark.parametrize("limits", [{"params": 0.001}, {"macs": 0.001}, {"params": 0.001, "macs": 0.9}], ids=str)
def test_an_impossible_budget(model, limits, methods):
    stats = rf.measure(model, example=IMAGE)
    with pytest.raises(BudgetError, match="closest reachable is") as error:
        rf.plan(model, budget=rf.Budget(**limits), stats=stats, methods=methods)
    said = str(error.value).split("closest reachable is ")[1]
    closest = {name: float(said.split(f"{name}=")[1].split()[0]) for name in limits}
    found = rf.plan(model, budget=rf.Budget(**closest), stats=stats, methods=methods)
    small = rf.apply(model, found)
    assert params(small) == found.params
    assert all(found.amounts[name] <= share * found.dense[name] for name, share in closest.items())


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file(old, tmp_path, kept):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(old.read_bytes()[:kept])
    with pytest.raises(StoreError, match=r"cut\.safetensors"):
        rf.load(cut, convnet())
    cut.unlink()


def test_a_file_whose_plan_does_not_fit_the_model(old):
    for other in (convnet(24), nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)):
        before = state(other)
        with pytest.raises(StoreError, match="does not fit"):
            rf.load(old, other)
        same_state(other, before)


def test_a_pickle_offered_as_a_file(old, tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    zipped = io.BytesIO()
    torch.save(convnet(), zipped)
    for content, kind in ((pickle.dumps(Trap()), "a pickle"), (zipped.getvalue(), "torch.save")):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        with pytest.raises(StoreError, match=kind):
            rf.load(path, convnet())
        path.unlink()
    assert not (tmp_path / "sprung").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full on this system")
def test_a_full_place(old, model):
    before = state(rf.apply(model, PLAN))
    small = rf.apply(model, PLAN)
    with pytest.raises(StoreError, match="/dev/full"):
        rf.save(small, PLAN, "/dev/full")
    same_state(small, before)


def test_a_disk_that_fills_up(old, model, monkeypatch):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_tensorfile, "save_file", fill)
    with pytest.raises(StoreError, match="No space left"):
        rf.save(rf.apply(model, PLAN), PLAN, old)


def test_a_place_that_is_read_only(old, model):
    small = rf.apply(model, PLAN)
    with pytest.raises(StoreError, match="cannot be written"):
        rf.save(small, PLAN, "/proc/small.safetensors")
    with pytest.raises(StoreError, match="cannot be written"):
        rf.save(small, PLAN, old.parent / "missing" / "small.safetensors")
    if os.geteuid():  # root may write anywhere
        old.parent.chmod(0o555)
        with pytest.raises(StoreError, match="cannot be written"):
            rf.save(small, PLAN, old)


def test_control_c_in_the_middle_of_a_save(old, model, monkeypatch):
    write = _tensorfile.save_file

    def interrupted(tensors, path, metadata):
        write(tensors, path, metadata=metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr(_tensorfile, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rf.save(rf.apply(model, PLAN), PLAN, old)


def test_control_c_in_the_middle_of_planning_and_measuring(model):
    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[8].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rf.measure(model, example=IMAGE)
    handle.remove()
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_hooks for module in model.modules())
