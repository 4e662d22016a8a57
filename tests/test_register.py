"""Does a class of the user's own become a method like those that are built in, and is what is missing told by name?"""

import functools
import importlib
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from cases_own import PairEmbedding, PairLinear
from cases_timing import FakeClock, seconds
from torch import nn

import rankfold as rf
from rankfold.errors import LayerError, MethodError, PlanError, StoreError
from rankfold.latency import Timing, time_layers
from rankfold.latency import _layers as timings
from rankfold.layers import Stages, TiedHead, is_factorised, layer_class, methods_for, register, registered
from rankfold.planning import Planning, tied_heads
from rankfold.planning._layer import Job, grid, untouched
from rankfold.recalibration import Refitting, recalibrate
from rankfold.train import parameter_groups
from tests.cases_models import Tied

X = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def own():
    with registered(PairLinear, PairEmbedding):
        yield


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24)).eval()


def variant(**changes):
    """A class like `PairLinear` with other members."""
    return type("Changed", (PairLinear,), changes)


# --- the whole road


def test_a_plan_is_made_applied_stored_and_undone(own, tmp_path):
    model = network()
    stats = rf.measure(model, example=X)
    plan = rf.plan(model, budget=rf.Budget(macs=0.6), stats=stats, methods="pair")
    assert {choice.method for choice in plan.layers.values()} == {"pair"}
    assert rf.Plan.from_json(plan.to_json()) == plan
    small = rf.apply(model, plan)
    assert type(small[0]) is PairLinear
    assert sum(p.numel() for p in small.parameters()) == plan.params
    assert rf.measure(small, example=X).macs == plan.macs <= 0.6 * stats.macs
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", network())
    torch.testing.assert_close(loaded(X), small(X), rtol=0, atol=0)
    assert [type(layer) for layer in rf.densify(small)] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(rf.densify(small)(X), small(X))


def test_two_stages_are_as_good_as_the_svd_that_they_are(own):
    model, data = network(), [X + k for k in range(3)]
    plans = [
        rf.compress(model, data, budget=rf.Budget(macs=0.6), methods=method)[1].layers for method in ("pair", "svd")
    ]
    assert [(c.rank, c.params, c.macs) for c in plans[0].values()] == [
        (c.rank, c.params, c.macs) for c in plans[1].values()
    ]


@pytest.mark.parametrize("memory", [2**31, 16_000], ids=["all of it", "the second stage"])
def test_recalibration_solves_two_stages_in_closed_form(own, memory):
    model = network()
    source = torch.Generator().manual_seed(1)
    mixing = torch.randn(24, 24, generator=source)
    data = [torch.randn(256, 24, generator=source) @ mixing + 0.5 for _ in range(3)]
    results = []
    for method in ("pair", "svd"):
        small = rf.apply(model, rf.Plan({"0": rf.Choice(method, rank=6), "2": rf.Choice(method, rank=6)}))
        done = []
        # hardly damped: damping depends on how the two stages share the scale
        better = recalibrate(small, model, data, memory=memory, refitting=Refitting(damping=1e-9), watch=done.append)
        assert all(refit.kept for refit in done[0].layers) and not done[0].left_out
        results.append(better(X))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_latency_is_planned_in_steps_of_ranks(own, monkeypatch):
    monkeypatch.setattr(timings, "time_models", FakeClock(functools.partial(seconds, grain=16)))
    model, x = nn.Sequential(nn.Linear(400, 400)), torch.ones(1, 400)
    grains = {}
    for method in ("pair", "svd"):
        stats = rf.measure(model, example=x)
        times = time_layers(model, stats, example=x, methods=method, timing=Timing(cache=False)).times
        grains[method] = times.layers["0"].grain(method, {})
    assert grains["pair"] == grains["svd"] == 16


def test_times_of_a_class_of_ones_own_are_not_kept_for_other_processes(own, monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "time_models", FakeClock())
    model, x = nn.Sequential(nn.Linear(400, 400)), torch.ones(1, 400)
    stats = rf.measure(model, example=x)
    for method, files in (("pair", 0), ("svd", 1)):
        time_layers(model, stats, example=x, methods=method, timing=Timing(cache=tmp_path))
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == files


def test_a_tied_head_shares_the_two_stages(own, tmp_path):
    model, tokens = Tied(), torch.randint(50, (4, 6))
    assert tied_heads(model) == {"embed": "head"}
    plan = rf.plan(model, budget=rf.Budget(params=0.5), stats=rf.measure(model, example=tokens), methods="pair")
    small = rf.apply(model, plan)
    assert (type(small.embed), type(small.head)) == (PairEmbedding, TiedHead)
    assert (small.head.down, small.head.up) == (small.embed.down, small.embed.up)
    rf.save(small, plan, tmp_path / "small.safetensors")
    torch.testing.assert_close(rf.load(tmp_path / "small.safetensors", Tied())(tokens), small(tokens))
    dense = rf.densify(small)
    assert dense.head.weight is dense.embed.weight


def test_a_decorator_and_twice_the_same(own):
    assert register(PairLinear) is PairLinear
    assert "pair" in methods_for(nn.Linear(2, 2))
    assert layer_class(nn.Linear(2, 2), "pair") is PairLinear
    assert is_factorised(PairLinear(4, 4, rank=1))


def test_nothing_is_left_behind():
    with registered(PairLinear):
        assert is_factorised(PairLinear(4, 4, rank=1))
    assert not is_factorised(PairLinear(4, 4, rank=1))
    assert "pair" not in methods_for(nn.Linear(2, 2))


def test_a_class_that_is_defined_again_takes_the_place_of_the_old_one():
    again = type("PairLinear", (PairLinear,), {"__module__": PairLinear.__module__, "__qualname__": "PairLinear"})
    with registered(PairLinear):
        register(again)
        assert layer_class(nn.Linear(2, 2), "pair") is again


def test_workers_need_not_know_the_class(own):
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as executor:
        plan = rf.plan(network(), budget=rf.Budget(params=0.6), methods="pair", executor=executor)
        small = rf.apply(network(), plan, executor=executor)
    assert plan == rf.plan(network(), budget=rf.Budget(params=0.6), methods="pair")
    assert type(small[0]) is PairLinear


def test_a_worker_that_does_not_know_the_class_leaves_nothing_out():
    layer = nn.Linear(24, 40)
    with registered(PairLinear):
        job = pickle.dumps(Job("0", layer, untouched("0", layer, None), None, 1, methods=("pair",)))
        assert len(grid(pickle.loads(job))) > 1
    with pytest.raises(MethodError, match="got 'pair'"):
        grid(pickle.loads(job))


def test_learning_rates_follow_the_fan_in_of_stages(own):
    groups = parameter_groups(nn.Sequential(PairLinear(24, 12, rank=4)), lr=1.0)
    assert [group["multiplier"] for group in groups] == [0.5, 3.0, 1.0]

    class Bare(PairLinear):
        def __init__(self, *sizes, rank, **where):
            super().__init__(*sizes, rank=rank, **where)
            self.gain = nn.Parameter(torch.ones(1))

    with registered(*()):
        rf.layers._table.ENTRIES[nn.Linear, "pair"] = Bare
        with pytest.raises(LayerError, match=r"fan-in of gain in a Bare is not known: .* fan_ins\(\)"):
            parameter_groups(nn.Sequential(Bare(24, 12, rank=4)), lr=1.0)
        Bare.fan_ins = lambda layer: [(layer.down.weight, 24), (layer.up.weight, 4), (layer.gain, 1)]
        groups = parameter_groups(nn.Sequential(Bare(24, 12, rank=4)), lr=1.0)
        assert sorted(group["multiplier"] for group in groups)[:2] == [1 / 3, 1.0]


# --- a method that is not known


def test_a_plan_of_a_class_that_is_not_registered_says_so(tmp_path):
    with registered(PairLinear):
        plan = rf.Plan({"0": rf.Choice("pair", rank=3)})
        small = rf.apply(network(), plan)
        rf.save(small, plan, tmp_path / "small.safetensors")
    told = "once the class that implements it is registered with rankfold.layers.register, got 'pair'"
    with pytest.raises(MethodError, match=told):
        rf.Plan.from_json(plan.to_json())
    with pytest.raises(StoreError, match=told) as error:
        rf.load(tmp_path / "small.safetensors", network())
    assert "damaged" not in str(error.value)
    with pytest.raises(PlanError, match=told):
        rf.Choice("pair", rank=3)


def test_a_known_method_for_another_type_of_layer_says_so(tmp_path):
    with registered(variant(method="cp")):
        plan = rf.Plan({"0": rf.Choice("cp", rank=3)})
        rf.save(rf.apply(network(), plan), plan, tmp_path / "small.safetensors")
    told = "'cp' does not fit Linear: its methods are svd, .* must be registered with rankfold.layers.register"
    with pytest.raises(StoreError, match=told):
        rf.load(tmp_path / "small.safetensors", network())


def test_a_planning_with_such_a_method_says_so():
    with registered(PairLinear):
        data = Planning(methods=("svd", "pair")).to_data()
    with pytest.raises(MethodError, match="registered with rankfold.layers.register, got 'pair'"):
        Planning.from_data(data)


def test_an_option_may_not_hide_what_a_plan_says():
    class Named(PairLinear):
        def __init__(self, *sizes, rank, error=1, **where):  # noqa: ARG002
            super().__init__(*sizes, rank=rank, **where)

    Named.method = "named"
    with registered(Named), pytest.raises(PlanError, match="an option can't be named 'error'"):
        rf.Choice("named", rank=2, options={"error": 1})


# --- what is refused

MEMBERS = [name for name in vars(rf.layers.FactorisedLayer) if not name.startswith("_")]


@pytest.mark.parametrize("name", [*MEMBERS, "method", "dense_type", "stages", "forward"])
def test_every_member_that_is_missing_is_named(name):
    members = {key: value for kind in (nn.Module, *PairLinear.__mro__[2::-1]) for key, value in vars(kind).items()}
    kept = {key: value for key, value in members.items() if key not in vars(nn.Module) or key in ("__init__",)}
    body = {key: value for key, value in (kept | vars(PairLinear)).items() if key not in ("__dict__", "__weakref__")}
    own = {**{k: v for k, v in vars(PairLinear.__mro__[1]).items() if not k.startswith("__")}, **body}
    own.pop(name)
    lacking = type("Lacking", (nn.Module,), own)
    with registered(), pytest.raises(LayerError, match=rf"Lacking can't be registered: it lacks {name}\b"):
        register(lacking)


def cost_of_an_instance(self, dense, calls, *, rank):
    raise NotImplementedError


def from_dense_without_seed(cls, dense, *, rank):
    raise NotImplementedError


def made_with_a_positional_rank(self, rank):
    raise NotImplementedError


REFUSED = {
    "no module": (lambda: dict, "dict can't be registered: it is no class of nn.Module"),
    "no class": (lambda: nn.Linear(2, 2), "it is no class of nn.Module"),
    "name": (lambda: variant(method="my method"), "method='my method' is no name"),
    "dense": (lambda: variant(method="dense"), "method 'dense' is taken"),
    "block": (lambda: variant(method="flexible"), "method 'flexible' is taken"),
    "type": (lambda: variant(dense_type=nn.LSTM), "dense_type=LSTM is none .* nn.Linear, nn.Conv1d, .*nn.Embedding"),
    "refused type": (lambda: variant(dense_type=nn.EmbeddingBag), "dense_type=EmbeddingBag is none"),
    "stages": (lambda: variant(stages=2), "stages=2 is neither"),
    "taken": (lambda: variant(method="svd"), "method 'svd' of nn.Linear is rankfold.layers._linear.LowRankLinear"),
    "no classmethod": (lambda: variant(cost=cost_of_an_instance), "cost is no classmethod"),
    "arguments": (
        lambda: variant(from_dense=classmethod(from_dense_without_seed)),
        "from_dense.* can't be called so .*'seed'",
    ),
    "constructor": (lambda: variant(__init__=made_with_a_positional_rank), "must take rank, .* as keywords"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    make, message = REFUSED[case]
    with registered(), pytest.raises(LayerError, match=message):
        register(make())


def test_another_class_does_not_take_the_place_of_a_registered_one(own):
    with pytest.raises(LayerError, match="cases_own.PairLinear already: give your method another name"):
        register(variant())
    assert layer_class(nn.Linear(2, 2), "pair") is PairLinear


def test_a_member_may_be_declared_and_set_on_the_instance():
    own = {name: value for kind in PairLinear.__mro__[1::-1] for name, value in vars(kind).items()}
    own = {key: value for key, value in own.items() if key not in ("rank", "__dict__", "__weakref__")}
    with registered():
        register(type("Declared", (nn.Module,), {**own, "__annotations__": {"rank": int}}))


def test_stages_say_which_options_are_of_the_matrix():
    assert Stages().is_matrix({"split": "spatial"})
    assert not Stages({"split": "channel"}).is_matrix({"split": "spatial"})


def test_the_command_line_knows_what_the_models_module_registers(tmp_path):
    (tmp_path / "shop.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(importlib.import_module('cases_own').__file__.rpartition('/')[0])!r})\n"
        "from cases_own import PairLinear\nfrom torch import nn\nimport rankfold\n"
        "rankfold.layers.register(PairLinear)\n"
        "def model():\n    return nn.Sequential(nn.Linear(24, 40))\n"
    )
    words = ["plan", "shop:model", "--params", "0.5", "--methods", "pair", "--example", "1,24", "--out", "plan.json"]
    done = subprocess.run(
        [sys.executable, "-m", "rankfold", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"method": "pair"' in (tmp_path / "plan.json").read_text()
    for words in (["compress", "shop:model", "--plan", "plan.json"], ["report", "shop:model", "small.safetensors"]):
        words += ["--out", "small.safetensors"] if words[0] == "compress" else ["--example", "1,24"]
        done = subprocess.run(
            [sys.executable, "-m", "rankfold", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "pair" in done.stdout
