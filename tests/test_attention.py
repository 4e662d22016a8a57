"""Does a separated attention compute what `nn.MultiheadAttention` computes, and does the library see its layers?"""

import itertools

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.layers import LowRankLinear, SeparateAttention
from tests.cases_models import Attention, encoder, params, same_state, state

KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other widths": {"kdim": 20, "vdim": 12, "batch_first": True},
    "other widths of keys": {"kdim": 20, "bias": False},
    "learned key": {"add_bias_kv": True, "batch_first": True},
    "zero key": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
BATCH, TARGET, SOURCE = 3, 5, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(dtype=torch.float64, **options):
    dense = nn.MultiheadAttention(24, 4, **options)
    for parameter in dense.parameters():  # biases are zero at first
        nn.init.normal_(parameter, std=0.3)
    dense = dense.to(dtype)
    return dense, SeparateAttention.from_dense(dense)


def inputs(dense, *, batched=True, dtype=torch.float64):
    draw = generator()
    made = []
    for length, width in ((TARGET, 24), (SOURCE, dense.kdim), (SOURCE, dense.vdim)):
        x = torch.randn(BATCH, length, width, generator=draw, dtype=torch.float64).to(dtype)
        made.append(x[0] if not batched else x if dense.batch_first else x.transpose(0, 1))
    return made


def padding(batched=True, dtype=torch.bool):
    mask = torch.zeros(BATCH, SOURCE, dtype=torch.bool)
    mask[1, 5:] = mask[2, 2:] = mask[0, -1] = True
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -1.5)
    return mask if batched else mask[0]


def pairwise(form, batched=True):
    causal = torch.ones(TARGET, SOURCE).triu(1).bool()
    if form == "bool":
        return causal
    scores = torch.randn(TARGET, SOURCE, generator=generator(1), dtype=torch.float64)
    if form == "float":
        return scores.masked_fill(causal, float("-inf"))
    count = 4 * (BATCH if batched else 1)
    return torch.randn(count, TARGET, SOURCE, generator=generator(2), dtype=torch.float64) > 1


def same(got, expected, **tolerances):
    torch.testing.assert_close(got[0], expected[0], **tolerances)
    assert (got[1] is None) == (expected[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(got[1], expected[1], **tolerances)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "single"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same_with_any_mask(kind, batched, training):
    dense, layer = (module.train(training) for module in pair(**KINDS[kind]))
    x = inputs(dense, batched=batched)
    for padded, form in itertools.product((None, torch.bool, torch.float64), (None, "bool", "float", "per head")):
        if padded == torch.float64 and form in ("bool", "per head"):
            continue  # torch warns of a float mask beside a bool one
        if padded == torch.bool and form == "float":
            continue
        masks = {
            "key_padding_mask": None if padded is None else padding(batched, padded),
            "attn_mask": None if form is None else pairwise(form, batched),
        }
        for asked in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            same(layer(*x, **masks, **asked), dense(*x, **masks, **asked))


@pytest.mark.parametrize("kind", ["plain", "batch first", "both keys"])
def test_the_hint_of_a_causal_mask_is_taken_as_torch_takes_it(kind):
    dense, layer = pair(**KINDS[kind])
    x = inputs(dense)
    mask = pairwise("bool")
    for asked in ({"need_weights": False}, {}, {"key_padding_mask": padding(), "need_weights": False}):
        same(layer(*x, attn_mask=mask, is_causal=True, **asked), dense(*x, attn_mask=mask, is_causal=True, **asked))
    with pytest.raises(rf.RankfoldError, match="pass attn_mask"):
        layer(*x, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype(dtype):
    dense, layer = pair(dtype, batch_first=True)
    x = inputs(dense, dtype=dtype)
    for asked in ({"need_weights": False}, {}):
        got, expected = (module(*x, key_padding_mask=padding(), **asked) for module in (layer, dense))
        assert got[0].dtype == dtype
        same(got, expected, **({} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}))


def test_autocast():
    dense, layer = pair(torch.float32, batch_first=True)
    x = inputs(dense, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(*x, key_padding_mask=padding(), need_weights=False)
        expected = dense(*x, key_padding_mask=padding(), need_weights=False)
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    same(got, expected, rtol=2e-2, atol=3e-2)


def test_gradients_are_those_of_the_packed_weights():
    dense, layer = pair(batch_first=True)
    x = inputs(dense)
    for module in (dense, layer):
        module(*x)[0].square().sum().backward()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    torch.testing.assert_close(torch.cat([p.weight.grad for p in projections]), dense.in_proj_weight.grad)
    torch.testing.assert_close(torch.cat([p.bias.grad for p in projections]), dense.in_proj_bias.grad)
    torch.testing.assert_close(layer.out_proj.weight.grad, dense.out_proj.weight.grad)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_on_the_weights_in_training_only(need_weights):
    _, layer = pair(dropout=0.5, batch_first=True)
    x = inputs(layer)
    torch.manual_seed(0)
    outputs = [layer(*x, need_weights=need_weights)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    layer.eval()
    assert torch.equal(*(layer(*x, need_weights=need_weights)[0] for _ in range(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_are_the_same_values(kind):
    dense, layer = pair(**KINDS[kind])
    dense.in_proj_bias is not None and dense.in_proj_bias.requires_grad_(False)
    layer = SeparateAttention.from_dense(dense.eval())
    back = layer.to_dense()
    assert not back.training
    assert params(layer) == params(dense)
    assert {n: p.requires_grad for n, p in back.named_parameters()} == {
        n: p.requires_grad for n, p in dense.named_parameters()
    }
    same_state(back, state(dense))
    for ours in layer.parameters():
        assert all(ours.data_ptr() != theirs.data_ptr() for theirs in dense.parameters())


def test_fresh_values_have_the_scale_of_torchs():
    for options in ({}, {"kdim": 96, "vdim": 32}):
        dense, layer = nn.MultiheadAttention(64, 4, **options), SeparateAttention(64, 4, **options)
        back = layer.to_dense()
        for (name, ours), theirs in zip(back.named_parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.1, atol=1e-6, msg=name)


BAD = {
    "a batch of queries only": (lambda m, x: m(x[None], x, x), "of 3 with a batch"),
    "four axes": (lambda m, x: m(x[None, None], x, x), "not one of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, said = BAD[case]
    with pytest.raises(rf.RankfoldError, match=said):
        call(SeparateAttention(24, 4), torch.ones(5, 24))
    with pytest.raises(rf.RankfoldError, match="24 features do not divide into 5 heads"):
        SeparateAttention(24, 5)


# Whole models


X = torch.randn(2, 6, 32, generator=generator(3))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layers(x, x.flip(1), tgt_mask=mask, tgt_is_causal=True)


MODELS = {
    "encoder": encoder,
    "decoder": Decoder,
    "own": Attention,
    "one attention": lambda: SelfAttention(nn.MultiheadAttention(32, 4, batch_first=True)),
}


class SelfAttention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("make", MODELS)
def test_a_separated_model_computes_the_same(make, grad):
    model = MODELS[make]().eval()
    before = state(model)
    separate = rf.separate_attention(model)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in separate.modules())
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(separate(X), model(X), rtol=1e-4, atol=1e-5)
    same_state(model, before)
    assert params(separate) == params(model)


def test_a_bare_attention_is_separated_too():
    dense = nn.MultiheadAttention(32, 4, batch_first=True)
    separate = rf.separate_attention(dense)
    assert isinstance(separate, SeparateAttention)
    same(separate(X, X, X), dense(X, X, X))
    small = rf.apply(dense, rf.Plan({"v_proj": rf.Choice("svd", rank=2)}))
    assert isinstance(small.v_proj, LowRankLinear)
    assert isinstance(rf.densify(small), nn.MultiheadAttention)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_the_fused_path_of_an_encoder_reads_nothing_that_is_missing(masked):
    model = encoder().eval()
    separate = rf.separate_attention(model)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = masked
    seen = []
    separate.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda layer, _: seen.append(layer))
    with torch.no_grad():
        expected, got = (m(X, src_key_padding_mask=mask if masked else None) for m in (model, separate))
    torch.testing.assert_close(got[~mask], expected[~mask], rtol=1e-4, atol=1e-5)
    assert seen
    joined = rf.densify(separate)
    assert (joined.use_nested_tensor, joined.layers[0].activation_relu_or_gelu) == (True, 1)
    same_state(joined, state(model))


def test_measure_and_plan_see_the_projections():
    model = rf.separate_attention(encoder())
    names = [f"layers.{k}.self_attn.{part}_proj" for k in range(2) for part in ("q", "k", "v", "out")]
    stats = rf.measure(model, example=X)
    assert set(names) < set(stats.layers)
    assert all(stats.layers[name].macs == 6 * 32 * 32 for name in names)
    small, plan = rf.compress(model, example=X, budget=rf.Budget(params=0.5))
    assert any(plan.layers[name].method == "svd" for name in names)
    assert params(small) == plan.params


@pytest.mark.parametrize("options", [{"include": "layers.0.*"}, {"exclude": "layers.1.self_attn"}], ids=str)
def test_chosen_attentions_only(options):
    model = rf.separate_attention(encoder(), **options)
    kinds = [type(layer.self_attn) for layer in model.layers]
    assert kinds == [SeparateAttention, nn.MultiheadAttention]
    with pytest.raises(rf.RankfoldError, match=r"layers\.9"):
        rf.separate_attention(encoder(), include="layers.9.self_attn")


PLANS = {
    "all four": {f"attend.{part}_proj": rf.Choice("svd", rank=4) for part in ("q", "k", "v", "out")},
    "one": {"attend.q_proj": rf.Choice("svd", rank=4)},
    "none changed": {"attend.q_proj": rf.Choice("dense"), "head": rf.Choice("svd", rank=4)},
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_of_projections_fits_the_model_as_it_was(case, tmp_path):
    """One plan, applied to the separated model and to the plain one, and loaded into either."""
    model, plan = Attention().eval(), rf.Plan(PLANS[case])
    before = state(model)
    small, direct = rf.apply(rf.separate_attention(model), plan), rf.apply(model, plan)
    assert isinstance(direct.attend, SeparateAttention)
    torch.testing.assert_close(direct(X), small(X), rtol=0, atol=0)
    same_state(model, before)
    assert {p.data_ptr() for p in direct.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    path = tmp_path / "small.safetensors"
    rf.save(small, plan, path)
    with torch.device("meta"):
        empty = Attention()
    for skeleton in (Attention(), rf.separate_attention(Attention()), empty):
        loaded = rf.load(path, skeleton.eval())
        torch.testing.assert_close(loaded(X), small(X), rtol=0, atol=0)


def test_a_plan_cannot_name_an_attention_and_its_projection():
    plan = rf.Plan({"attend": rf.Choice("dense"), "attend.q_proj": rf.Choice("svd", rank=4)})
    with pytest.raises(rf.RankfoldError, match="'attend'"):
        rf.apply(Attention(), plan)


def test_densify_joins_what_was_compressed():
    small, _ = rf.compress(rf.separate_attention(Attention().eval()), example=X, budget=rf.Budget(params=0.4))
    dense = rf.densify(small)
    assert isinstance(dense.attend, nn.MultiheadAttention)
    torch.testing.assert_close(dense(X), small(X), rtol=1e-4, atol=1e-5)
    assert isinstance(rf.densify(small, methods="svd").attend, SeparateAttention)


class Own(nn.MultiheadAttention):
    pass


def hooked():
    attention = nn.MultiheadAttention(32, 4)
    attention.register_forward_hook(lambda *_: None)
    return attention


def parametrised():
    attention = nn.MultiheadAttention(32, 4)
    nn.utils.parametrizations.spectral_norm(attention.out_proj)
    return attention


def sharing():
    attentions = nn.ModuleList([nn.MultiheadAttention(32, 4) for _ in range(2)])
    attentions[1].in_proj_weight = attentions[0].in_proj_weight
    return attentions


REFUSED = {
    "subclass": (lambda: Own(32, 4), "not nn.MultiheadAttention itself"),
    "hooks": (hooked, "hooks"),
    "parametrised": (parametrised, "parametri"),
    "shared weight": (sharing, "shared with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_change_the_function_is_refused(case):
    make, said = REFUSED[case]
    model = nn.ModuleDict({"attend": make()})
    with pytest.raises(rf.RankfoldError, match=rf"attention 'attend.*{said}"):
        rf.separate_attention(model)
    rf.separate_attention(model, exclude="*")


def test_one_attention_in_two_places_stays_one():
    attention = nn.MultiheadAttention(32, 4)
    separate = rf.separate_attention(nn.ModuleList([attention, attention]))
    assert separate[0] is separate[1]


def test_torchvisions_vit():
    models = pytest.importorskip("torchvision.models")
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = models.VisionTransformer(**sizes, num_classes=5).eval()
    x = torch.randn(2, 3, 16, 16, generator=generator(4))
    separate = rf.separate_attention(model)
    nn.init.normal_(separate.heads.head.weight, std=0.1)
    model.heads.head.load_state_dict(separate.heads.head.state_dict())
    torch.testing.assert_close(separate(x), model(x), rtol=1e-4, atol=1e-5)
    small, plan = rf.compress(separate, example=x, budget=rf.Budget(macs=0.8), include="*self_attention*")
    projections = [choice for name, choice in plan.layers.items() if "self_attention" in name]
    assert len(projections) == 8
    assert any(choice.method == "svd" for choice in projections)
    assert small(x).isfinite().all()


def test_it_exports():
    small, _ = rf.compress(rf.separate_attention(Attention().eval()), example=X, budget=rf.Budget(params=0.6))
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(small, (X,), dynamic_shapes=({1: length},))
    for x in (X, X[:, :3]):
        torch.testing.assert_close(program.module()(x), small(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_it_compiles(make):
    model = rf.separate_attention(MODELS[make]()).eval()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_report_takes_the_model_whose_attention_the_plan_separated():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x)[0]

    model, x = Whole().eval(), torch.randn(2, 5, 32)
    plan = rf.Plan({"inner.q_proj": rf.Choice("svd", rank=4)})
    small = rf.apply(model, plan)
    found = rf.report(model, small, plan, example=x, latency=False)
    assert [layer.params for layer in found.layers] == [(32 * 32 + 32, 4 * 64 + 32)]
