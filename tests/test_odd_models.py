"""Does the whole way, from measuring to loading, hold for models that are not a plain stack of layers?"""

import copy
import warnings
from collections import namedtuple

import pytest
import torch
from cases_models import Attention, CalledTwice, Tied, TiedThrice, encoder, mlp, params, same_state, state
from torch import nn

import rankfold as rf
from rankfold._common import example_arguments
from rankfold.layers import LowRankEmbedding, LowRankLinear, factorisable, is_factorised
from rankfold.layers._refusal import is_quantised

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(weight_norm|quantiz|spectral_norm).*"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
X, STEPS, IMAGE = torch.randn(4, 32), torch.randn(2, 5, 32), torch.randn(2, 8, 12, 12)
TOKENS = torch.randint(0, 50, (2, 7))
Inputs = namedtuple("Inputs", "x scale")


class Nested(nn.Module):
    """Layers in lists and dicts, one of them in three places."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.parts = nn.ModuleList([self.body, nn.Linear(32, 32)])
        self.named = nn.ModuleDict({"x": nn.ModuleList([nn.Linear(32, 32), self.body])})

    def forward(self, x):
        for layer in (*self.parts, *self.named["x"]):
            x = layer(x)
        return x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.gate = nn.LSTM(32, 32, batch_first=True), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.gate(self.inside(x)[0])[0])


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)
        self.register_buffer("kept", torch.randn(32))
        self.register_buffer("scale", torch.randn(32), persistent=False)

    def forward(self, x):
        return self.layer(x) * self.scale + self.kept


class Keeps(nn.Module):
    """Keeps its last output, as feature extractors do; one hook on a parent writes another."""

    def __init__(self):
        super().__init__()
        self.block, self.last, self.seen = nn.Sequential(nn.Linear(32, 32)), None, {}
        self.block.register_forward_hook(self.note)

    def note(self, *seen):
        self.seen["block"] = seen[-1].detach()

    def forward(self, x):
        self.last = self.block(x).detach()
        return self.seen["block"] + self.block(x)


class SharedHead(nn.Module):
    """A head called at two sizes, as detectors do; returns a list."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return [self.head(x), self.head(x[..., ::2, ::2])]


class Auxiliary(nn.Module):
    """A head for training only, and a named tuple for an output there, as GoogLeNet has."""

    Output = namedtuple("Output", "logits aux")

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.body(x)
        return self.Output(self.head(x), self.aux(x)) if self.training else self.head(x)


class Takes(nn.Module):
    """Takes a mapping or a sequence as one argument."""

    def __init__(self, key):
        super().__init__()
        self.key, self.layer = key, nn.Linear(32, 32)

    def forward(self, inputs):
        return self.layer(inputs[self.key])


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x, scale=1.0):
        return {"logits": self.layer(x) * scale, "steps": 3}


class ReadsWeight(nn.Module):
    """Reads the weight of one layer without calling it."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias))


def normed():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
    weight = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 32)), spectral, weight, nn.Linear(32, 32))


def frozen():
    model = mlp(32, 32, 32)
    model[0].requires_grad_(False)
    return model


def hooked():
    model = mlp(32, 32, 32)
    model[0].register_forward_hook(Keeps().note)
    return model


MODELS = {
    "one layer": (lambda: nn.Linear(32, 32), X, 0.7),
    "one convolution": (lambda: nn.Conv2d(8, 8, 3), IMAGE, 0.7),
    "nested": (Nested, X, 0.7),
    "called twice": (CalledTwice, X, 0.7),
    "tied": (Tied, TOKENS, 0.95),
    "normed": (normed, X, 0.95),
    "attention": (Attention, STEPS, 0.95),
    "encoder": (encoder, STEPS, 0.7),
    "transformer": (lambda: nn.Transformer(32, 4, 1, 1, 64, batch_first=True), (STEPS, STEPS), 0.8),
    "recurrent": (Recurrent, STEPS, 0.97),
    "buffers": (Buffers, X, 0.7),
    "keeps outputs": (Keeps, X, 0.7),
    "shared head": (SharedHead, IMAGE, 0.7),
    "auxiliary head": (Auxiliary, X, 0.9),
    "mapping as an argument": (lambda: Takes("x"), ({"x": X},), 0.7),
    "pair as an argument": (lambda: Takes(0), ((X, X),), 0.7),
    "mapping of arguments": (Scaled, {"x": X, "scale": 2.0}, 0.7),
    "list of arguments": (Scaled, [X, 2.0], 0.7),
    "named tuple of arguments": (Scaled, Inputs(X, 2.0), 0.7),
    "reads a weight": (ReadsWeight, X, 0.8),
    "frozen": (frozen, X, 0.7),
    "hooked": (hooked, X, 0.8),
    "float16": (lambda: mlp(32, 32, 32).half(), X.half(), 0.7),
    "bfloat16": (lambda: mlp(32, 32, 32).bfloat16(), X.bfloat16(), 0.7),
    "data parallel": (lambda: nn.DataParallel(mlp(32, 32, 32)), X, 0.7),
    "compiled": (lambda: torch.compile(mlp(32, 32, 32), backend="eager"), X, 0.7),
    "compiled in place": (lambda: compiled_in_place(mlp(32, 32, 32)), X, 0.7),
    "no parameters": (nn.ReLU, X, 0.5),
}


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def outputs(model, example):
    args, kwargs = example_arguments(example)
    model.eval()
    with torch.no_grad():
        found = model(*args, **kwargs)
    values = found.values() if isinstance(found, dict) else found if isinstance(found, (list, tuple)) else [found]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("case", MODELS)
def test_from_measuring_to_loading(case, tmp_path):
    make, example, fraction = MODELS[case]
    torch.manual_seed(0)
    model = make()
    before, modes, random = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    small, plan = rf.compress(model, example=example, budget=rf.Budget(params=fraction))
    rf.save(small, plan, tmp_path / "small.safetensors")
    loaded = rf.load(tmp_path / "small.safetensors", model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    same_state(model, before)

    assert params(small) == plan.params <= fraction * params(model)
    assert any(map(is_factorised, small.modules())) or not params(model)
    assert not any(map(is_factorised, model.modules()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what still reads the original would now give something else
    expected = outputs(small, example)
    torch.testing.assert_close(outputs(loaded, example), expected, rtol=0, atol=0)
    wide = 0.05 if expected[0].dtype in (torch.float16, torch.bfloat16) else 1e-4
    torch.testing.assert_close(outputs(rf.densify(small), example), expected, rtol=wide, atol=wide)


@pytest.mark.parametrize("case", MODELS)
def test_the_plans_macs_are_those_measured_afterwards(case):
    make, example, fraction = MODELS[case]
    small, plan = rf.compress(make(), example=example, budget=rf.Budget(params=fraction))
    assert rf.measure(small, example=example).macs == plan.macs


def test_a_training_model_with_auxiliary_heads_keeps_them():
    model = Auxiliary()
    small, plan = rf.compress(model, example=X, budget=rf.Budget(params=0.9))
    assert plan.layers["aux"].reason == "not called on the example"
    assert small(X)._fields == ("logits", "aux")
    history = rf.train.fit(small, [(X, torch.zeros(4, dtype=torch.long))], teacher=model)
    assert history.epochs[0].distillation > 0


class OwnCopy(nn.Module):
    """Copies itself without passing the memo on."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        return self.layer(x)

    def __deepcopy__(self, memo):
        new = OwnCopy()
        new.load_state_dict(self.state_dict())
        return new


class GoodCopy(OwnCopy):
    def __deepcopy__(self, memo):
        new = GoodCopy.__new__(GoodCopy)
        nn.Module.__init__(new)
        new.layer = copy.deepcopy(self.layer, memo)
        return new


def test_a_copy_that_would_lack_the_new_layers_is_refused():
    budget = rf.Budget(params=0.7)
    with pytest.raises(rf.RankfoldError, match="OwnCopy lacks the new layer 'layer'.*memo"):
        rf.compress(OwnCopy(), example=X, budget=budget)
    with pytest.raises(rf.RankfoldError, match="OwnCopy"):
        rf.densify(nn.Sequential(factorised_inside(OwnCopy())))
    assert is_factorised(rf.compress(GoodCopy(), example=X, budget=budget)[0].layer)


def factorised_inside(model):
    model.layer = LowRankLinear(32, 32, rank=4)
    return model


def test_a_function_that_holds_the_layers_is_refused():
    """Deep copies share functions, so that the copy would go on calling the original's dense layer."""
    model = nn.Sequential(mlp(32, 32), mlp(32, 32))
    model[1].shortcut = lambda x: model[0](x)
    choice = {"0.0": rf.Choice("svd", rank=4)}
    with pytest.raises(rf.RankfoldError, match=r"1\.shortcut is a function that holds"):
        rf.apply(model, rf.Plan(choice))
    other = mlp(2, 2)
    model[1].shortcut = lambda x: other(x)
    assert is_factorised(rf.apply(model, rf.Plan(choice))[0][0])


def test_measuring_a_compiled_model_compiles_nothing():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.compile(mlp(32, 32, 32), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = rf.measure(model, example=X)
    assert not graphs
    assert [len(layer.calls) for layer in stats.layers.values()] == [1, 1]
    model(X)
    assert graphs


def test_ties_through_a_transposed_view_or_a_bare_parameter_are_seen():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.plain = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 8)
            self.down.weight = nn.Parameter(self.up.weight.detach().T)
            self.mixing = self.plain.weight

    plan = rf.plan(Autoencoder(), budget=rf.Budget(params=1.0))
    reasons = {name: choice.reason for name, choice in plan.layers.items()}
    assert reasons == {
        "up": "weight is tied with 'down'",
        "down": "weight is tied with 'up'",
        "plain": "weight is tied with ''",
    }


def test_a_tied_bias_is_called_a_bias():
    model = mlp(8, 8, 8)
    model[1].bias = model[0].bias
    assert rf.plan(model, budget=rf.Budget(params=1.0)).layers["0"].reason == "bias is tied with '1'"


def test_quantised_layers_are_named_and_left():
    model = torch.ao.quantization.quantize_dynamic(mlp(32, 32, 32), {nn.Linear})
    plan = rf.plan(model, budget=rf.Budget(params=1.0), stats=rf.measure(model, example=X))
    assert list(plan.layers) == ["0", "1"]
    assert all("quantised" in choice.reason for choice in plan.layers.values())
    assert all(map(factorisable, model))


def test_a_compressed_model_may_be_quantised():
    small = rf.apply(mlp(32, 32, 32), rf.Plan({"0": rf.Choice("svd", rank=4)}))
    quantised = torch.ao.quantization.quantize_dynamic(small, {nn.Linear})
    assert is_quantised(quantised[0].down)
    assert list(rf.measure(quantised, example=X).layers) == ["0.down", "0.up", "1"]
    torch.testing.assert_close(rf.densify(quantised)(X), quantised(X))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = LowRankEmbedding(50, 32, padding_idx=0, rank=8)
        self.body = nn.Linear(32, 32)
        self.head = self.embed.tied_head(bias=True)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def test_a_tied_head_belongs_to_its_embedding():
    model = LanguageModel()
    stats = rf.measure(model, example=TOKENS)
    assert list(stats.layers) == ["embed", "body", "head"]
    assert stats.layers["head"].macs == TOKENS.shape[1] * 8 * (50 + 32)
    assert stats.params == params(model)
    dense = rf.densify(model)
    assert (type(dense.embed), type(dense.head)) == (nn.Embedding, nn.Linear)
    assert dense.head.weight is dense.embed.weight
    torch.testing.assert_close(dense(TOKENS), model(TOKENS))


def test_densified_transformers_have_their_fused_path_back():
    model = encoder().eval()
    assert model.use_nested_tensor
    plan = rf.Plan({"layers.0.linear1": rf.Choice("svd", rank=4)})
    small = rf.apply(model, plan)
    assert (small.use_nested_tensor, small.layers[0].activation_relu_or_gelu) == (False, 0)
    assert small.layers[1].activation_relu_or_gelu == 1
    for dense in (rf.densify(small), rf.densify(rf.apply(rf.densify(small), plan))):
        assert (dense.use_nested_tensor, dense.layers[0].activation_relu_or_gelu) == (True, 1)


NOTHING_TO_DO = {
    "no layer": (nn.LayerNorm(8), torch.ones(1, 8), "no Linear, convolution or Embedding"),
    "complex": (nn.Linear(8, 8, dtype=torch.complex64), torch.ones(1, 8, dtype=torch.complex64), "complex64"),
    "meta": (nn.Linear(8, 8, device="meta"), torch.ones(1, 8), "the model' .*meta device"),
    "tied": (TiedThrice(), TOKENS, r"3 of 4 layers can't change, the largest 'other' \(weight is tied with 'embed'"),
}


@pytest.mark.parametrize("case", NOTHING_TO_DO)
def test_what_stands_in_the_way_of_a_budget_is_said(case):
    model, example, said = NOTHING_TO_DO[case]
    with pytest.raises(rf.BudgetError, match=said):
        rf.compress(model, example=example, budget=rf.Budget(params=0.2))
    _, plan = rf.compress(model, example=example, budget=rf.Budget(params=1.0))
    assert all(choice.method == "dense" for choice in plan.layers.values())


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=60, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config).eval()


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize(("make", "head"), [(gpt2, "lm_head"), (bert, "cls.predictions.decoder")])
def test_hugging_face_models(make, head, tmp_path):
    path = tmp_path / "small.safetensors"
    small, plan = rf.compress(make(), [{"input_ids": TOKENS, "labels": TOKENS}], budget=rf.Budget(macs=0.8))
    assert "whose weight it has" in plan.layers[head].reason
    rf.save(small, plan, path)
    loaded = rf.load(path, make())
    table = loaded.get_input_embeddings()
    assert loaded.get_submodule(head).weight is table.weight or loaded.get_submodule(head).down is table.down
    torch.testing.assert_close(loaded(TOKENS).logits, small(TOKENS).logits, rtol=0, atol=0)
    small(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_compressed_language_model_generates_from_a_skeleton_without_memory(tmp_path):
    small, plan = rf.compress(gpt2(), example=TOKENS, budget=rf.Budget(macs=0.8))
    rf.save(small, plan, tmp_path / "small.safetensors")
    with torch.device("meta"):
        skeleton = gpt2()
    loaded = rf.load(tmp_path / "small.safetensors", skeleton)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(TOKENS, **options), small.generate(TOKENS, **options))


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_buffers_that_neither_file_nor_skeleton_has_are_named(tmp_path):
    small, plan = rf.compress(bert(), example=TOKENS, budget=rf.Budget(macs=0.8))
    rf.save(small, plan, tmp_path / "small.safetensors")
    with torch.device("meta"):
        skeleton = bert()
    with pytest.raises(rf.RankfoldError, match="position_ids.*build the skeleton on the CPU"):
        rf.load(tmp_path / "small.safetensors", skeleton)
