"""Are the moments of a layer's inputs those of a direct computation, whatever the layer, the data and its form?"""

import pytest
import torch
from cases_models import CalledTwice, Tied, WithDict, convnet, same_state, state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rankfold as rf
from rankfold.errors import DataError, StoreError
from rankfold.layers import LowRankConv2d, TTLinear
from rankfold.stats import Stats, observing
from rankfold.stats._moments import shrunk

ALL = 10**6  # patches enough for every position of any image here
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def rows_by_probing(conv, x):
    """The patches of a convolution as (groups, count, n), read off by one-hot kernels that torch itself applies."""
    n = conv.weight[0].numel()
    probe = type(conv)(
        conv.in_channels, conv.groups * n, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        bias=False, padding_mode=conv.padding_mode, dtype=x.dtype,
    )  # fmt: skip
    with torch.no_grad():
        probe.weight.copy_(torch.eye(n).repeat(conv.groups, 1).reshape(probe.weight.shape))
        found = probe(x)
    return found.flatten(2).unflatten(1, (conv.groups, n)).permute(1, 0, 3, 2).reshape(conv.groups, -1, n).double()


def direct(rows):
    return rows.mT @ rows / rows.shape[1], rows.mean(1)


CONVS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padded": nn.Conv2d(3, 4, 3, padding=1),
    "stride, dilation": nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 3), padding=(2, 1)),
    "groups": nn.Conv2d(6, 4, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(6, 6, 3, groups=6),
    "reflect": nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
    "circular": nn.Conv2d(3, 4, 3, padding=2, padding_mode="circular"),
    "replicate": nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="replicate"),
    "same, even kernel": nn.Conv2d(3, 4, (4, 3), padding="same", dilation=(1, 2)),
    "same, reflect": nn.Conv2d(3, 4, 2, padding="same", padding_mode="reflect"),
    "1x1": nn.Conv2d(3, 4, 1),
    "1-d": nn.Conv1d(4, 6, 3, padding=1, groups=2),
    "3-d": nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2), stride=(1, 2, 1)),
}
SIZES = {1: (11,), 2: (7, 9), 3: (4, 5, 3)}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CONVS)
def test_convolutions(case):
    conv = CONVS[case]
    batches = [torch.randn(b, conv.in_channels, *SIZES[len(conv.kernel_size)]) + 0.5 for b in (3, 2)]
    moments = rf.measure(nn.Sequential(conv), batches, moments=True, patches=ALL).layers["0"].moments
    second, mean = direct(rows_by_probing(conv, torch.cat(batches)))
    torch.testing.assert_close(moments.second, second, **CLOSE)
    torch.testing.assert_close(moments.mean, mean, **CLOSE)
    outputs = torch.cat([conv(x) for x in batches]).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(moments.output_second, outputs.square().mean(1).detach(), **CLOSE)
    assert moments.count == outputs.shape[1]


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 4, 8), (8,)], ids=str)
def test_linear_layers(shape):
    layer = nn.Linear(8, 4)
    batches = [torch.randn(shape) for _ in range(3)]
    moments = rf.measure(layer, batches, moments=True).layers[""].moments
    rows = torch.stack(batches).reshape(1, -1, 8).double()
    second, mean = direct(rows)
    torch.testing.assert_close(moments.second, second, **CLOSE)
    torch.testing.assert_close(moments.mean, mean, **CLOSE)
    assert moments.count == rows.shape[1]


def test_wide_layers_and_many_small_batches():
    batches = [torch.randn(b, 1100) + 0.3 for b in (300, 1, 900, 40)]
    moments = rf.measure(nn.Linear(1100, 2), batches, moments=True).layers[""].moments
    torch.testing.assert_close(moments.second, direct(torch.cat(batches)[None].double())[0], **CLOSE)
    assert torch.equal(moments.second, moments.second.mT)


def test_a_single_image_without_a_batch_axis():
    conv, image = nn.Conv2d(3, 4, 3, padding=1), torch.randn(3, 6, 6)
    alone, batched = (rf.measure(conv, example=x, moments=True).layers[""].moments for x in (image, image[None]))
    assert torch.equal(alone.second, batched.second)


def test_every_call_of_a_layer_counts():
    model, x = CalledTwice(), torch.randn(6, 32)
    moments = rf.measure(model, [x], moments=True).layers["body"].moments
    with torch.no_grad():
        rows = torch.cat([x, torch.relu(model.body(x))])[None].double()
    torch.testing.assert_close(moments.second, direct(rows)[0], **CLOSE)
    assert moments.count == 12


class Overwriting(nn.Module):
    """A model that changes the input and the output of a layer in place after the call."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 6)

    def forward(self, x):
        x = x + 1
        y = self.body(x)
        x.zero_()
        return y.zero_()


def test_what_the_model_overwrites_was_seen_before():
    model, x = Overwriting(), torch.randn(3, 8)
    moments = rf.measure(model, [x], moments=True).layers["body"].moments
    torch.testing.assert_close(moments.second, direct((x + 1)[None].double())[0], **CLOSE)
    with observing(model, ["body"]) as run:
        rows = run(x)["body"]
    torch.testing.assert_close(rows.inputs[0], x + 1)
    torch.testing.assert_close(rows.outputs, model.body(x + 1))


def test_sampled_patches_are_patches_and_fair():
    conv = nn.Conv2d(1, 1, 1)
    image = torch.arange(35.0).reshape(1, 1, 5, 7)
    with observing(conv, [""], patches=8, seed=3) as run:
        seen = torch.cat([run(image.repeat(50, 1, 1, 1))[""].inputs[0, :, 0] for _ in range(40)])
    counts = torch.bincount(seen.long(), minlength=35)
    assert len(seen) == 8 * 50 * 40
    # Each position is expected 457 times, with a standard deviation of at most 19.
    assert counts.min() > 457 - 5 * 19
    assert counts.max() < 457 + 5 * 19


def test_rows_explain_the_outputs():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    small = LowRankConv2d.from_dense(conv, rank=2)
    image = torch.randn(3, 4, 9, 9)
    for layer in (conv, small):
        with observing(nn.Sequential(layer), ["0"], patches=5) as run:
            rows = run(image)["0"]
        weight = layer.weight.detach().reshape(2, 3, -1)
        expected = torch.cat(list(rows.inputs @ weight.mT), dim=1) + layer.bias
        torch.testing.assert_close(rows.outputs, expected, **CLOSE)
        assert rows.outputs.shape == (15, 6)


def test_two_models_are_seen_at_the_same_positions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5))
    small = rf.apply(model, rf.Plan({"0": rf.Choice("svd", rank=8), "2": rf.Choice("svd", rank=4)}))
    with torch.no_grad():
        small[0].up.weight.copy_(torch.linalg.qr(small[0].up.weight.flatten(1))[0].reshape(small[0].up.weight.shape))
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    with observing(model, ["0", "4"], patches=6, seed=1) as one, observing(small, ["4", "0"], patches=6, seed=1) as two:
        for batch in batches:
            torch.testing.assert_close(one(batch)["0"].inputs, two(batch)["0"].inputs, rtol=0, atol=0)
    with observing(model, ["0"], patches=6, seed=1) as one, observing(model, ["0"], patches=6, seed=2) as two:
        assert not torch.equal(one(batches[0])["0"].inputs, two(batches[0])["0"].inputs)


def test_batches_and_calls_are_seen_at_different_positions():
    image = torch.randn(2, 3, 20, 20)
    with observing(nn.Conv2d(3, 4, 3), [""], patches=6) as run:
        assert not torch.equal(run(image)[""].inputs, run(image)[""].inputs)


def test_calls_in_one_batch_are_seen_at_different_positions():
    layer, ramp = nn.Conv2d(1, 1, 1), torch.arange(10_000.0).reshape(1, 1, 100, 100)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.fill_(0)
    with observing(nn.Sequential(layer, layer), ["0"], patches=6) as run:
        first, second = run(ramp)["0"].inputs.split(6, dim=1)
    assert not torch.equal(first, second)


def test_the_same_seed_gives_the_same_moments():
    model, images = convnet(), [torch.randn(4, 3, 16, 16)]
    one, two, other = (
        rf.measure(model, images, moments=True, patches=7, seed=s).layers["3"].moments for s in (1, 1, 2)
    )
    assert torch.equal(one.second, two.second)
    assert not torch.equal(one.second, other.second)


def test_factorised_layers_have_moments():
    layer, x = TTLinear(12, 8, rank=2), torch.randn(5, 12)
    moments = rf.measure(layer, [x], moments=True).layers[""].moments
    torch.testing.assert_close(moments.second, direct(x[None].double())[0], **CLOSE)


def test_hugging_face_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer, x = conv1d(6, 10), torch.randn(3, 4, 10)
    moments = rf.measure(layer, [x], moments=True).layers[""].moments
    torch.testing.assert_close(moments.second, direct(x.reshape(1, -1, 10).double())[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    layer, x = nn.Linear(16, 4, dtype=dtype), (torch.randn(200, 16) * 100).to(dtype)
    moments = rf.measure(layer, [x], moments=True).layers[""].moments
    close = {"rtol": 1e-12, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-1}
    torch.testing.assert_close(moments.second, direct(x[None].double())[0], **close)


def test_autocast_does_not_round_the_products():
    layer, x = nn.Linear(16, 4), torch.randn(200, 16)
    plain = rf.measure(layer, [x], moments=True).layers[""].moments
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rf.measure(layer, [x], moments=True).layers[""].moments
    assert torch.equal(cast.second, plain.second)


class Tokens(nn.Module):
    """Tokens to vectors to a pooled vector, as a text encoder does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens, attention_mask, labels=None):  # noqa: ARG002 - as models in the wild have them
        vectors = torch.tanh(self.body(self.embed(tokens)))
        return self.head(vectors[:, 0])


TOKENS = torch.randint(0, 20, (4, 7))
KEEP = (torch.arange(7) < torch.tensor([[7], [3], [5], [1]])).long()


@pytest.mark.parametrize("mask", ["attention_mask", lambda batch: batch["attention_mask"].bool()])
def test_padding_is_not_counted(mask):
    model = Tokens()
    stats = rf.measure(model, [{"tokens": TOKENS, "attention_mask": KEEP}], moments=True, mask=mask)
    rows = model.embed(TOKENS)[KEEP.bool()][None].double().detach()
    torch.testing.assert_close(stats.layers["body"].moments.second, direct(rows)[0], **CLOSE)
    assert stats.layers["body"].moments.count == 16
    assert stats.layers["head"].moments.count == 4  # one vector per text: nothing to mask


def test_flattened_tokens_are_masked_too():
    layer, x = nn.Linear(6, 5), torch.randn(28, 6)
    moments = rf.measure(layer, [x], moments=True, mask=lambda _: KEEP).layers[""].moments
    torch.testing.assert_close(moments.second, direct(x[KEEP.flatten().bool()][None].double())[0], **CLOSE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("padding", "'attention_mask'"),
        (lambda _: torch.ones(4), r"\(batch, tokens\)"),
        (lambda _: torch.full((4, 7), -1e4), "1 or True"),
        (lambda _: None, "no tensor"),
    ],
)
def test_a_bad_mask_is_refused(mask, message):
    with pytest.raises(DataError, match=message):
        rf.measure(Tokens(), [{"tokens": TOKENS, "attention_mask": KEEP}], moments=True, mask=mask)


class Stream(IterableDataset):
    """A data set of unknown length."""

    def __iter__(self):
        return iter(torch.ones(5, 8))


@pytest.mark.parametrize(
    "loader",
    [
        [torch.ones(2, 8), torch.ones(3, 8)],
        [(torch.ones(2, 8), torch.zeros(2)), (torch.ones(3, 8), torch.zeros(3))],
        [{"input": torch.ones(5, 8)}],
        (torch.ones(1, 8) for _ in range(5)),
        DataLoader(TensorDataset(torch.ones(5, 8)), batch_size=2),
        DataLoader(Stream(), batch_size=2),
    ],
    ids=["tensors", "pairs", "dict", "generator", "DataLoader", "stream"],
)
def test_any_loader(loader):
    assert rf.measure(nn.Linear(8, 4), loader, moments=True).layers[""].moments.count == 5


def test_an_infinite_loader_ends_at_batches():
    def forever():
        while True:
            yield torch.ones(2, 8)

    assert rf.measure(nn.Linear(8, 4), forever(), moments=True, batches=3).layers[""].moments.count == 6


GOOD = torch.ones(2, 8)
BAD = {
    "empty loader": ([], "loader is empty"),
    "NaN": ([GOOD, GOOD * torch.nan], r"batch 1: the input of layer '0'.*NaN"),
    "Inf": ([GOOD, GOOD / 0], r"batch 1: the input of layer '0'.*Inf"),
    "too large": ([GOOD, GOOD * 1e30], r"batch 1: the input of layer '0'.*too large"),
    "empty batch": ([GOOD, GOOD[:0]], "batch 1.*empty"),
    "text": ([GOOD, "text"], "batch 1"),
    "number": ([3], "batch 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_have_their_error_and_leave_no_trace(case):
    loader, message = BAD[case]
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(DataError, match=message):
        rf.measure(model, loader, moments=True)
    same_state(model, before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_between_the_sampled_positions_is_found():
    image = torch.zeros(1, 1, 50, 50)
    image[0, 0, 20, 20] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        rf.measure(nn.Conv2d(1, 1, 1), [image], moments=True, patches=1)


@pytest.mark.parametrize(
    "arguments",
    [{"batches": 2}, {"mask": "x"}, {"loss": lambda out, _: out.sum()}, {"moments": True, "batches": 0},
     {"moments": True, "patches": 0}, {"moments": True, "memory": 1.5}],
)  # fmt: skip
def test_unusable_arguments_are_refused(arguments):
    with pytest.raises(DataError, match=list(arguments)[-1]):
        rf.measure(nn.Linear(8, 4), [GOOD], **arguments)


def test_an_interruption_leaves_the_model_as_it_was():
    model = convnet()
    before, random = state(model), torch.get_rng_state()

    def interrupted():
        yield torch.randn(2, 3, 8, 8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rf.measure(model, interrupted(), moments=True, loss=lambda out, _: out.square().mean())
    same_state(model, before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


def test_memory_is_bounded_and_what_is_left_out_is_said():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4), nn.Embedding(4, 4))
    model.forward = lambda x: model[1](model[0](x))
    stats = rf.measure(model, [torch.randn(9, 16)], moments=True, memory=8 * 16 * 16)
    assert stats.layers["1"].moments is not None
    assert stats.layers["0"].moments is None
    assert "2,048 bytes" in stats.left_out["0"]
    assert "Embedding" in stats.left_out["2"]
    assert stats.metric("0") is None


def test_what_is_not_called_is_left_out():
    stats = rf.measure(WithDict(), example={"x": torch.ones(3, 24), "scale": 2.0}, moments=True)
    assert list(stats.left_out) == ["unused"]


def test_without_moments_nothing_is_kept_and_one_batch_is_read():
    loader = iter([GOOD, GOOD])
    stats = rf.measure(nn.Linear(8, 4), loader)
    assert stats.layers[""].moments is None
    assert not stats.left_out
    assert len(list(loader)) == 1


def test_costs_are_those_without_moments():
    model, images = convnet(), torch.randn(4, 3, 8, 8)
    plain, full = rf.measure(model, [images]), rf.measure(model, [images, images[:2]], moments=True)
    assert full.to_json() == plain.to_json()


# Fisher information


class Residual(nn.Module):
    """In-place activations, a reused layer and a layer that the loss does not see."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.body = nn.Linear(6, 6)
        self.unseen = nn.Linear(6, 2)

    def forward(self, x):
        x = functional.relu(self.conv(x), inplace=True).mean((2, 3))
        self.unseen(x)
        return self.body(functional.relu_(self.body(x)))


def fisher(model, batches, loss):
    """Mean squared gradients of one sample's loss in the outputs, one sample at a time."""
    found = {name: [] for name in ("conv", "body")}
    for x, y in batches:
        for k in range(len(x)):
            z = model.conv(x[k : k + 1])
            h = model.body(functional.relu(z).mean((2, 3)))
            out = model.body(functional.relu(h))
            grads = torch.autograd.grad(loss(out, y[k : k + 1]), [z, h, out])
            found["conv"].append(grads[0][0].flatten(1).T)
            found["body"] += [grads[1], grads[2]]
    return {name: torch.cat(grads).double().square().mean(0) for name, grads in found.items()}


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_are_the_diagonal_fisher_information(frozen):
    model = Residual().requires_grad_(not frozen)
    batches = [(torch.randn(b, 3, 6, 6), torch.randint(0, 6, (b,))) for b in (5, 2)]
    stats = rf.measure(model, batches, moments=True, loss=functional.cross_entropy)
    expected = fisher(Residual.requires_grad_(model, True), batches, functional.cross_entropy)
    for name, rows in expected.items():
        torch.testing.assert_close(stats.layers[name].moments.output_weights, rows, **CLOSE)
    assert not stats.layers["unseen"].moments.output_weights.any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert stats.metric("conv", weighted=True).output_weights is stats.layers["conv"].moments.output_weights


def test_watching_gradients_changes_no_moment():
    model, x = Residual(), torch.randn(5, 3, 6, 6)
    plain = rf.measure(model, [x], moments=True)
    with_loss = rf.measure(model, [x], moments=True, loss=lambda out, _: out.square().mean())
    for name in plain.layers:
        assert torch.equal(plain.layers[name].moments.second, with_loss.layers[name].moments.second), name
    with pytest.raises(DataError, match="loss="):
        plain.metric("conv", weighted=True)


def test_labels_of_a_dict_are_the_target():
    batch = {"tokens": TOKENS, "attention_mask": KEEP, "labels": torch.tensor([0, 1, 2, 0])}
    stats = rf.measure(Tokens(), [batch], moments=True, mask="attention_mask", loss=functional.cross_entropy)
    assert (stats.layers["head"].moments.output_weights > 0).all()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, _: out, "one number"),
        (lambda out, _: out.tolist(), "one number"),
        (lambda out, _: out.detach().sum(), "does not depend"),
        (lambda out, _: out.sum() * torch.nan, "nan"),
    ],
)
def test_a_bad_loss_is_refused(loss, message):
    with pytest.raises(DataError, match=f"batch 0.*{message}"):
        rf.measure(nn.Linear(8, 4), [GOOD], moments=True, loss=loss)


# the metric


def test_many_inputs_leave_the_covariance_alone():
    mix, shift = torch.randn(12, 12), torch.randn(12)
    x = torch.randn(200_000, 12) @ mix + shift
    metric = rf.measure(nn.Linear(12, 4), [x], moments=True).metric("")
    second = direct(x[None].double())[0]
    torch.testing.assert_close(metric.second, second, rtol=1e-3, atol=1e-3 * float(second.abs().max()))


def test_few_inputs_are_shrunk_and_stay_positive():
    torch.manual_seed(1)
    x = torch.randn(6, 30)
    metric = rf.measure(nn.Linear(30, 4), [x], moments=True).metric("")
    covariance = metric.second - metric.mean[:, :, None] * metric.mean[:, None, :]
    sample = torch.cov(x.T.double(), correction=0)
    torch.testing.assert_close(covariance[0].diagonal(), sample.diagonal(), **CLOSE)
    off = covariance[0] - torch.diag(covariance[0].diagonal())
    assert off.norm() < 0.5 * (sample - torch.diag(sample.diagonal())).norm()
    assert torch.linalg.eigvalsh(covariance[0]).min() > 0


@pytest.mark.parametrize("count", [2, 5, 50, 500])
def test_shrinking_brings_the_estimate_closer(count):
    torch.manual_seed(2)
    truth = torch.eye(20, dtype=torch.float64) + 0.3
    factor = torch.linalg.cholesky(truth)
    before = after = 0.0
    for _ in range(20):
        x = torch.randn(count, 20, dtype=torch.float64) @ factor.T
        sample = (x.T @ x / count)[None]
        before += float((sample - truth).square().sum())
        after += float((shrunk(sample, count) - truth).square().sum())
    assert after < before


def test_dead_and_equal_inputs_are_no_trouble():
    metric = rf.measure(nn.Linear(4, 2), [torch.ones(5, 4) * torch.tensor([0.0, 1, 2, 3])], moments=True).metric("")
    torch.testing.assert_close(metric.second[0], torch.outer(torch.arange(4.0), torch.arange(4.0)).double())


def test_a_single_input_is_no_metric():
    assert rf.measure(nn.Linear(4, 2), [torch.ones(1, 4)], moments=True).metric("") is None


def test_the_metric_of_an_unknown_layer_is_refused():
    with pytest.raises(rf.RankfoldError, match="'nose'"):
        rf.measure(nn.Linear(4, 2), [torch.ones(1, 4)]).metric("nose")


# files


def stats_of_all_kinds():
    batches = [{"tokens": TOKENS, "attention_mask": KEEP, "labels": torch.tensor([0, 1, 2, 0])}]
    return rf.measure(Tokens(), batches, moments=True, mask="attention_mask", loss=functional.cross_entropy)


def test_there_and_back(tmp_path):
    for number, stats in enumerate((stats_of_all_kinds(), rf.measure(Tied(), [TOKENS], moments=True))):
        stats.save(tmp_path / f"{number}.safetensors")
        back = Stats.load(tmp_path / f"{number}.safetensors")
        assert back.to_json() == stats.to_json()
        assert back.left_out == stats.left_out
        for name, layer in stats.layers.items():
            again = back.layers[name].moments
            assert (again is None) == (layer.moments is None)
            if again is not None:
                assert vars(again).keys() == vars(layer.moments).keys()
                torch.testing.assert_close(vars(again), vars(layer.moments), rtol=0, atol=0)


def damaged(tmp_path, tensors, texts):
    """A good file with some of its tensors and texts replaced, or removed where they are None."""
    path = tmp_path / "stats.safetensors"
    stats_of_all_kinds().save(path)
    with safe_open(path, framework="pt") as file:
        stored, header = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())
    whole = [
        {k: v for k, v in (old | new).items() if v is not None} for old, new in ((stored, tensors), (header, texts))
    ]
    save_file(whole[0], path, metadata=whole[1])
    return path


FOREIGN = '{"rankfold_stats": 1, "params": 1, "macs": 1, "batch_size": 1, "layers": {}}'
DAMAGE = {
    "a missing tensor": ({"body.mean": None}, {}),
    "a tensor too many": ({"body.extra": torch.ones(1)}, {}),
    "another shape": ({"body.second": torch.ones(1, 5, 5, dtype=torch.float64)}, {}),
    "another type": ({"body.mean": torch.ones(1, 6)}, {}),
    "NaN": ({"body.mean": torch.full((1, 6), torch.nan, dtype=torch.float64)}, {}),
    "no symmetry": ({"body.second": torch.arange(36.0, dtype=torch.float64).reshape(1, 6, 6)}, {}),
    "a count of none": ({}, {"rankfold_moments": '{"body": 0, "head": 4}'}),
    "counts of no table": ({}, {"rankfold_moments": "[]"}),
    "no statistics": ({}, {"stats": None}),
    "statistics of another model": ({}, {"stats": FOREIGN}),
    "no reasons": ({}, {"left_out": "3"}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused(case, tmp_path):
    path = damaged(tmp_path, *DAMAGE[case])
    with pytest.raises(StoreError, match=r"stats\.safetensors"):
        Stats.load(path)


def test_the_test_of_damage_damages_nothing_else(tmp_path):
    assert Stats.load(damaged(tmp_path, {}, {})).layers["body"].moments.count == 16


def test_a_pickle_is_refused(tmp_path):
    torch.save({}, tmp_path / "stats.pt")
    with pytest.raises(StoreError, match="zip"):
        Stats.load(tmp_path / "stats.pt")
