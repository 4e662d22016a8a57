"""Does every factorised layer go where its dense twin goes: torch.export, torch.compile, ONNX?"""

import warnings

import pytest
import torch
from cases import FORM_IDS, FORMS, example_of, small_rank

from rankfold.exporters import export
from rankfold.layers import TABLE

INDUCED = ("LowRankLinear", "TuckerConv2d", "TTLinear", "TTEmbedding")


def case(layer, options):
    torch.manual_seed(0)
    dense, x = example_of(layer.dense_type)
    return layer.from_dense(dense, rank=small_rank(layer, dense, options), **options).eval(), x


def forms(*names, first_only=False):
    """Every form, or those of the classes that are named, or one of each class in the fast tier."""
    rows, seen = [], set()
    for form, name in zip(FORMS, FORM_IDS, strict=True):
        marks = (pytest.mark.slow,) if first_only and form[0] in seen else ()
        seen.add(form[0])
        if not names or form[0].__name__ in names:
            rows.append(pytest.param(*form, id=name, marks=marks))
    return pytest.mark.parametrize(("layer", "options"), rows)


def same_as_compiled(built, x, backend):
    """Compare output and gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(built, fullgraph=True, backend=backend)
    gradients = []
    for run in (compiled, built):
        built.zero_grad()
        output = run(x)
        output.square().sum().backward()
        gradients.append([output.detach(), *(parameter.grad.clone() for parameter in built.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_every_layer_is_among_the_cases():
    assert {layer for layer, _ in FORMS} == set(TABLE.values())


@forms(first_only=True)
def test_an_exported_program_takes_any_batch(layer, options):
    built, x = case(layer, options)
    shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
    program = torch.export.export(built, (torch.cat([x, x, x]),), dynamic_shapes=shapes).module()
    other = torch.cat([x.flip(0)] * 4)
    torch.testing.assert_close(program(other), built(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@forms()
def test_files(layer, options, suffix, tmp_path):
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    built, x = case(layer, options)
    assert export(built, tmp_path / f"layer{suffix}", example=x).difference < 1e-5


@forms(first_only=True)
def test_compiles_to_one_graph(layer, options):
    same_as_compiled(*case(layer, options), "eager")


@pytest.mark.slow
@forms()
def test_compiles_with_its_backward(layer, options):
    same_as_compiled(*case(layer, options), "aot_eager")


@pytest.mark.slow
@forms(*INDUCED)
def test_compiles_to_code(layer, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_as_compiled(*case(layer, options), "inductor")
