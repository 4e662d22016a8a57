"""Does an exported program compute what the model computes, and is nothing left where it does not?"""

import warnings

import pytest
import torch
from torch import nn

from rankfold import exporters
from rankfold.errors import ExportError
from rankfold.exporters import export

SUFFIXES = [".onnx", ".pt2"]


class TwoInputs(nn.Module):
    """Keyword input, integer input, nested outputs."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 4)

    def forward(self, ids, shift=None):
        hidden = self.embedding(ids)
        return {"hidden": hidden, "scores": (self.linear(hidden) + shift,)}


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def initialised(model, example):
    model(example)
    return model


IMAGE = torch.randn(2, 3, 8, 8)
CASES = {
    "cnn": (lambda: initialised(cnn(), IMAGE), IMAGE),
    "keywords": (TwoInputs, {"ids": torch.randint(0, 20, (2, 5)), "shift": torch.ones(4)}),
    "positions": (TwoInputs, (torch.randint(0, 20, (2, 5)), torch.ones(4))),
    "recurrent": (lambda: nn.LSTM(6, 4), torch.randn(3, 2, 6)),
    "float64": (lambda: nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", CASES)
def test_program_computes_what_the_model_computes(case, suffix, tmp_path):
    make, example = CASES[case]
    done = export(make(), tmp_path / f"model{suffix}", example=example)
    assert done.difference < 1e-5
    assert done.format == suffix[1:]
    assert done.bytes == done.path.stat().st_size > 0
    assert [file.name for file in tmp_path.iterdir()] == [f"model{suffix}"]


def test_onnx_file_runs_on_other_values(tmp_path):
    import onnxruntime

    model = initialised(cnn(), IMAGE)
    export(model, tmp_path / "model.onnx", example=IMAGE)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn_like(IMAGE)
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model.eval()(other).detach(), rtol=1e-4, atol=1e-5)


def test_pt2_file_runs_on_other_values(tmp_path):
    model = initialised(cnn(), IMAGE)
    export(model, tmp_path / "model.pt2", example=IMAGE)
    other = torch.randn_like(IMAGE)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(other), model.eval()(other))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_modes_and_statistics_are_kept(suffix, tmp_path):
    model = initialised(cnn(), IMAGE)
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / f"model{suffix}", example=IMAGE)
    assert [module.training for module in model] == [True, True, True, False, True, True]
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrong_program_is_refused_and_leaves_nothing(suffix, tmp_path, monkeypatch):
    write, load = exporters.FORMATS[suffix[1:]]
    other = nn.Linear(4, 3).eval()
    monkeypatch.setattr(exporters, "FORMATS", {suffix[1:]: (lambda _, example: write(other, example), load)})
    with pytest.raises(ExportError, match=r"differs from the model by [0-9.]+ .*tolerance 0\.0001"):
        export(nn.Linear(4, 3), tmp_path / f"model{suffix}", example=torch.ones(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_failed_export_keeps_the_file_that_was_there(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("before")
    with pytest.raises(ExportError):
        export(nn.Linear(4, 3), path, example=torch.ones(2, 4), tolerance=-1.0)
    assert path.read_text() == "before"


def test_tolerance_is_the_limit(tmp_path, monkeypatch):
    model = nn.Linear(4, 3)
    near = nn.Linear(4, 3)
    near.load_state_dict({name: value * (1 + 1e-3) for name, value in model.state_dict().items()})
    write, load = exporters.FORMATS["pt2"]
    monkeypatch.setattr(exporters, "FORMATS", {"pt2": (lambda _, example: write(near, example), load)})
    done = export(model, tmp_path / "a.pt2", example=torch.ones(2, 4), tolerance=2e-3)
    assert 0.9e-3 < done.difference < 1.1e-3
    with pytest.raises(ExportError):
        export(model, tmp_path / "b.pt2", example=torch.ones(2, 4), tolerance=0.5e-3)


def test_format_overrules_the_suffix(tmp_path):
    assert export(nn.Linear(4, 3), tmp_path / "model.bin", example=torch.ones(2, 4), format="pt2").format == "pt2"


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


class NoTensor(nn.Module):
    def forward(self, x):
        return [len(x)]


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        (nn.Linear(4, 3), "model.pth", "no format 'pth'"),
        (nn.Linear(4, 3), "model", "end the name in .onnx or .pt2"),
        (Branches(), "model.pt2", "Branches cannot be exported"),
        (Branches(), "model.onnx", "Branches cannot be exported"),
        (NoTensor(), "model.pt2", "returns no tensor"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_cannot_be_exported_is_said(model, name, said, tmp_path):
    with pytest.raises(ExportError, match=said):
        export(model, tmp_path / name, example=torch.ones(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_missing_onnx_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"pip install 'rankfold\[onnx\]'"):
        export(nn.Linear(4, 3), tmp_path / "model.onnx", example=torch.ones(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_on_the_way(tmp_path, capfd):
    export(nn.LSTM(6, 4), tmp_path / "model.onnx", example=torch.randn(3, 2, 6))
    assert capfd.readouterr() == ("", "")


def test_warnings_of_the_users_model_still_reach_the_user(tmp_path):
    class Warns(nn.Module):
        def forward(self, x):
            warnings.warn("mind the scale", UserWarning, stacklevel=1)
            return x * 2

    with pytest.warns(UserWarning, match="mind the scale"):
        export(Warns(), tmp_path / "model.pt2", example=torch.ones(2, 4))
