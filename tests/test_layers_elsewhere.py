"""Does every factorised layer go where its dense twin goes: torch.export, torch.compile, ONNX?"""

import pytest
import torch
from cases import FORM_IDS, FORMS, example_of, small_rank

from rankfold.exporters import export

CONTRACTED = ("TTLinear", "TTEmbedding", "TTConv1d", "TTConv2d", "TTConv3d")  # the rest is stock layers in a row


def case(layer, options):
    torch.manual_seed(0)
    dense, x = example_of(layer.dense_type)
    return layer.from_dense(dense, rank=small_rank(layer, dense, options), **options).eval(), x


def forms(*, slow=()):
    marks = {True: pytest.mark.slow, False: ()}
    rows = [
        pytest.param(*form, id=name, marks=marks[form[0].__name__ in slow])
        for form, name in zip(FORMS, FORM_IDS, strict=True)
    ]
    return pytest.mark.parametrize(("layer", "options"), rows)


@forms()
def test_torch_export(layer, options, tmp_path):
    built, x = case(layer, options)
    assert export(built, tmp_path / "layer.pt2", example=x).difference < 1e-5


@pytest.mark.slow
@forms()
def test_onnx(layer, options, tmp_path):
    pytest.importorskip("onnxruntime")
    built, x = case(layer, options)
    assert export(built, tmp_path / "layer.onnx", example=x).difference < 1e-5


@forms(slow=CONTRACTED)
def test_compiles_to_one_graph_and_trains(layer, options):
    built, x = case(layer, options)
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), built(x))
    gradients = []
    for run in (compiled, built):
        built.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in built.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
