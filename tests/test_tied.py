"""Is an embedding with a tied head planned, built, stored and undone as the one weight that it is?"""

from dataclasses import replace

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.errors import PlanError
from rankfold.layers import LowRankEmbedding, TiedHead
from rankfold.planning import candidates, tied_heads
from rankfold.recalibration import Recalibration
from rankfold.stats import CallTime, Curve, LayerTime, LayerTimes, Setting
from tests.cases_models import Tied, TiedThrice, params, same_state, state, told

TOKENS = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(0))
HALF = rf.Budget(params=0.5)
TABLE = 50 * 32


class TiedBias(Tied):
    """A head with a bias that the model holds too, as BERT's does."""

    def __init__(self):
        super().__init__()
        self.head.bias = nn.Parameter(torch.randn(50))
        self.bias = self.head.bias


def batches(count=4):
    source = torch.Generator().manual_seed(1)
    return [torch.randint(50, (16, 6), generator=source) for _ in range(count)]


def planned(model, budget=HALF, **options):
    return rf.plan(model, budget=budget, stats=rf.measure(model, example=TOKENS), **told(**options))


@pytest.mark.parametrize("make", [Tied, TiedBias])
def test_one_choice_stands_for_both(make):
    model = make()
    before = state(model)
    plan = planned(model)
    rank, row, head = plan.layers["embed"].rank, plan.layers["embed"], plan.layers["head"]
    assert (row.dense.params, row.params) == (TABLE, rank * 82)
    assert (row.dense.macs, row.macs) == (6 * TABLE, 6 * rank * (82 + 32))  # the head's, and those of the look-up
    assert head.reason == "follows 'embed', whose weight it has"
    assert (head.params, head.macs) == (50 * (make is TiedBias), 0)
    small = rf.apply(model, plan)
    same_state(model, before)
    assert (type(small.embed), type(small.head)) == (LowRankEmbedding, TiedHead)
    assert (small.head.down, small.head.up) == (small.embed.down, small.embed.up)
    assert params(small) == plan.params <= 0.5 * params(model)
    assert rf.measure(small, example=TOKENS).macs == plan.macs
    assert rf.stats.count_bytes(small) == plan.bytes


def test_at_full_rank_the_model_is_the_same_and_its_bias_still_one():
    model = TiedBias().double()
    small = rf.apply(model, rf.Plan({"embed": rf.Choice("svd", rank=32)}))
    torch.testing.assert_close(small(TOKENS), model(TOKENS))
    assert small.bias is small.head.bias
    assert small.bias is not model.bias
    dense = rf.densify(small)
    assert dense.head.weight is dense.embed.weight
    assert dense.bias is dense.head.bias
    torch.testing.assert_close(dense(TOKENS), model(TOKENS))


def test_a_file_holds_the_factors_once(tmp_path):
    small = rf.apply(TiedBias(), plan := planned(TiedBias()))
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", TiedBias())
    assert loaded.head.down is loaded.embed.down
    assert loaded.bias is loaded.head.bias
    assert params(loaded) == plan.params
    torch.testing.assert_close(loaded(TOKENS), small(TOKENS))
    assert (tmp_path / "small.safetensors").stat().st_size < 4 * plan.params + 4000


@pytest.mark.parametrize("filters", [{"include": "embed"}, {"include": "head"}])
def test_to_include_one_is_to_include_both(filters):
    plan = planned(Tied(), rf.Budget(params=0.9), **filters)
    assert [choice.method for choice in plan.layers.values()] == ["svd", "dense", "dense"]
    assert plan.layers["body"].reason == "not included"


@pytest.mark.parametrize("name", ["embed", "head", "*d"])
def test_to_exclude_one_is_to_exclude_both(name):
    plan = planned(Tied(), rf.Budget(params=0.9), exclude=name)
    assert [plan.layers[key].reason for key in ("embed", "head")] == ["excluded", "excluded"]
    assert plan.layers["body"].method == "svd"


def hooked():
    model = Tied()
    model.head.register_forward_hook(lambda *_: None)
    return model


def rescaled():
    model = Tied()
    model.embed.max_norm = 1.0
    return model


def copied():
    """The same values, and memory, but two parameters."""
    model = Tied()
    model.head.weight = nn.Parameter(model.embed.weight.detach())
    return model


OTHERS = {
    "three owners": (TiedThrice, "embed", "weight is tied with 'head', 'other'"),
    "hooks on the head": (hooked, "embed", "weight is tied with 'head'"),
    "rescaled rows": (rescaled, "head", "weight is tied with 'embed'"),
    "two parameters": (copied, "embed", "weight is tied with 'head'"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_ties_are_left_and_named(case):
    make, name, reason = OTHERS[case]
    plan = planned(make(), rf.Budget(params=1.0))
    assert plan.layers[name].reason == reason
    with pytest.raises(PlanError, match=f"'{name}'"):
        rf.apply(make(), rf.Plan({name: rf.Choice("svd", rank=2)}))


def test_a_head_that_is_not_called_is_no_head():
    class Body(Tied):
        def forward(self, tokens):
            return self.body(self.embed(tokens))

    plan = planned(Body(), rf.Budget(params=1.0))
    assert (plan.layers["embed"].reason, plan.layers["head"].reason) == (
        "weight is tied with 'head'",
        "not called on the example",
    )


def test_only_svd_replaces_both():
    assert planned(Tied(), rf.Budget(params=1.0), methods="tt").layers["embed"].reason == (
        "tt can't replace a Embedding that is tied"
    )
    shape = {"out_shape": (5, 10), "in_shape": (4, 8)}
    with pytest.raises(PlanError, match="svd can replace both, 'tt' can't"):
        rf.apply(Tied(), rf.Plan({"embed": rf.Choice("tt", rank=2, options=shape)}))
    with pytest.raises(PlanError, match="'head'.*tied with 'embed', whose choice stands for both"):
        rf.apply(Tied(), rf.Plan({"head": rf.Choice("svd", rank=2)}))


def relative(new, old):
    new, old = new.detach(), old.detach()
    return float((new - old).square().sum() / old.square().sum())


@pytest.mark.parametrize("make", [Tied, TiedBias])
def test_with_data_the_error_is_the_mean_of_that_of_outputs_and_of_rows(make):
    model = make().double()
    stats = rf.measure(model, batches(60), moments=True)  # so many that none of the covariance is shrunk
    (choice,) = [c for c in candidates(model, stats=stats).layers["embed"] if c.rank == 8]
    plan = rf.Plan({"embed": choice}, metric="outputs")
    small = rf.apply(model, plan, stats=stats)
    with torch.no_grad():
        x = model.body(model.embed(torch.cat(batches(60))))
        centre = make is TiedBias
        wanted, found = (head(x) - centre * head(x).mean((0, 1)) for head in (model.head, small.head))
        outputs, rows = relative(found, wanted), relative(small.embed.weight, model.embed.weight)
        assert choice.error**2 == pytest.approx((outputs + rows) / 2, rel=5e-3)
        if centre:
            torch.testing.assert_close(small.head(x).mean((0, 1)), model.head(x).mean((0, 1)))
        plain = rf.apply(model, rf.Plan({"embed": rf.Choice("svd", rank=8)}))
        found = plain.head(x) - centre * plain.head(x).mean((0, 1))
        assert relative(found, wanted) > outputs


def test_latency_is_that_of_both():
    stats = rf.measure(Tied(), example=TOKENS)
    shares = {"embed": 3.0, "body": 0.5, "head": 0.5}  # a look-up takes longer in two stages
    times = {"embed": 1.0, "body": 8.0, "head": 16.0}
    layers = {
        name: LayerTime((CallTime(times[name], 1, (Curve("svd", {}, ((8,),), (share,)),)),))
        for name, share in shares.items()
    }
    setting = Setting("eager", 1, "cpu", "a processor", "2.6")
    timed = replace(stats, times=LayerTimes(layers, 25.0, setting))
    plan = rf.plan(Tied(), budget=rf.Budget(latency=0.6), stats=timed)
    assert (plan.layers["embed"].dense.latency, plan.layers["embed"].latency) == (17.0, 3.0 + 8.0)
    assert plan.layers["head"].latency == 0
    del layers["head"]
    untimed = replace(stats, times=LayerTimes(layers, 25.0, setting))
    plan = rf.plan(Tied(), budget=rf.Budget(latency=1.0), stats=untimed)
    assert plan.layers["head"].reason == "no form of svd or tucker was timed"
    assert plan.layers["embed"].reason == "weight is tied with 'head'"


def cross_entropy(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def test_gradients_of_a_loss_weigh_the_rows():
    model = Tied()
    loader = [(tokens, tokens.roll(1, 1)) for tokens in batches()]
    stats = rf.measure(model, loader, moments=True, loss=cross_entropy)
    plan = rf.plan(model, budget=HALF, stats=stats, planning=rf.Planning(metric="fisher", objective="loss"))
    assert plan.layers["embed"].method == "svd"
    assert rf.apply(model, plan, stats=stats)(TOKENS).isfinite().all()


def test_a_random_start_reads_no_weight(tmp_path):
    with torch.device("meta"):
        skeleton = Tied()
    plan = rf.plan(skeleton, budget=HALF, planning=rf.Planning(rule="uniform"))
    small = rf.apply(Tied(), plan, init="random")
    assert params(small) == plan.params
    assert tied_heads(skeleton) == {"embed": "head"}
    small(TOKENS).sum().backward()
    assert small.embed.down.weight.grad.any()


def test_recalibration_leaves_the_head_and_fits_what_comes_after_the_embedding():
    model = Tied()
    small = rf.apply(model, rf.Plan({"embed": rf.Choice("svd", rank=8)}))
    done: list[Recalibration] = []
    better = rf.recalibrate(small, model, batches(), watch=done.append)
    assert [one.name for one in done[0].layers] == ["body"]
    assert done[0].left_out["head"] == "its factors are those of its embedding"
    assert better.head.down is better.embed.down
    assert torch.equal(better.embed.weight, small.embed.weight)


def test_compression_on_data_and_its_report():
    model = TiedBias()
    small, plan = rf.compress(model, batches(), budget=rf.Budget(params=0.7))
    assert plan.metric == "outputs"
    assert params(small) == plan.params
    found = rf.report(model, small, plan, example=TOKENS, latency=False)
    head = next(row for row in found.layers if row.name == "head")
    assert head.macs == (6 * TABLE, 6 * plan.layers["embed"].rank * 82)


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_a_model_with_a_tied_head_may_be_quantised():
    small = rf.apply(TiedBias(), rf.Plan({"embed": rf.Choice("svd", rank=8)})).eval()
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear})
    error = relative(quantised(TOKENS), small(TOKENS))
    assert 0 < error < 1e-2
    torch.testing.assert_close(rf.densify(quantised)(TOKENS), quantised(TOKENS))


def test_other_methods_of_densify_leave_the_head():
    small = rf.apply(Tied(), rf.Plan({"embed": rf.Choice("svd", rank=4), "body": rf.Choice("svd", rank=4)}))
    assert isinstance(rf.densify(small, methods="svd_form").head, TiedHead)
    assert rf.plan(small, budget=rf.Budget(params=1.0)).layers["head"].reason.startswith("is the head of a factorised")
