"""Does `rankfold train --svd` train, prune, tune, show its ranks and refuse what it cannot use?"""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import rankfold as rf
from rankfold.cli import app
from rankfold.cli._svd_training import RankView
from rankfold.errors import RankfoldError
from rankfold.plots import plot_spectra
from rankfold.train import Recipe, SVDTraining, fit, svd_form

SHOP = """
import torch
from torch import nn

def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4))

def data():
    torch.manual_seed(2)
    return [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(3)]

def accuracy(model):
    return 0.625
"""
WORDS = ("train", "vault:model", "--data", "vault:data", "--out", "small.safetensors", "--svd", "spatial")


@pytest.fixture(autouse=True)
def vault(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "vault.py").write_text(SHOP)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_trains_prunes_tunes_and_draws(tmp_path):
    result = call(
        *(*WORDS, "--epochs", 2, "--macs", 0.5, "--example", "1,3,8,8", "--evaluate", "vault:accuracy"),
        *("--plot", "values.png", "--checkpoint", "run.safetensors"),
    )
    assert result.exit_code == 0, result.output
    assert "spatial" in result.stdout
    assert (tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run.tuning.safetensors").is_file()
    import vault

    small = rf.load("small.safetensors", vault.model())
    assert (
        rf.measure(small, example=torch.ones(1, 3, 8, 8)).macs
        <= 0.5 * rf.measure(vault.model(), example=torch.ones(1, 3, 8, 8)).macs
    )


def test_json_holds_histories_and_plan():
    result = call(*WORDS, "--epochs", 1, "--energy", 0.5, "--tune", 0, "--json", "--kind", "l1")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["tuned"] is None
    assert found["trained"]["epochs"][0]["penalty"] > 0
    assert found["plan"]["layers"]["2"]["method"] == "svd"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS, "--epochs", 1), "say how far to prune"),
        ((*WORDS, "--macs", 0.5), "--macs needs --example"),
        ((*WORDS, "--macs", 0.5, "--energy", 0.9, "--example", "1,3,8,8"), "say how far to prune"),
        ((*WORDS, "small.safetensors", "--energy", 0.9), "leave SMALL out"),
        ((*WORDS, "--energy", 0.9, "--kind", "l3"), "kind must be 'hoyer', 'l1' or 'hoyer_square', got 'l3'"),
        ((*WORDS[:-1], "rows", "--energy", 0.9), "split must be 'channel' or 'spatial', got 'rows'"),
        (WORDS[:-2], "name a compressed model"),
        ((*WORDS[:-2], "small.safetensors", "--sparsity", 0.2), "--sparsity is for training in SVD form"),
    ],
)
def test_bad_words(words, message):
    result = call(*words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_view_shows_terms_and_shrinking_ranks():
    torch.manual_seed(0)
    form, _ = svd_form(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    run = SVDTraining(form, sparsity=0.3)
    data = [(torch.randn(16, 8), torch.randint(8, (16,)))] * 20
    with RankView(run, 3) as view:
        fit(form, data, epochs=3, lr=0.05, recipe=Recipe(method=run, watch=view.watch))
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(view.picture())
    text = console.export_text()
    assert "3 of 3 epochs" in text
    assert "penalty" in text
    last = sum(rf.ranks.energy(values, 0.99) for values in run.spectrum().values())
    assert last < sum(rf.ranks.energy(values, 0.99) for values in view.spectra[0].values())
    assert str(last) in text
    assert "of 8" in text
    assert len(view.spectra) == 4


def test_spectra_become_a_picture_of_every_layer(tmp_path):
    spectra = [{f"layer{k}": torch.rand(4).sort(descending=True).values.double() for k in range(7)} for _ in range(3)]
    path = plot_spectra(spectra, tmp_path / "s.svg")
    text = path.read_text()
    assert all(f"<!-- layer{k} -->" in text for k in range(7))
    with pytest.raises(RankfoldError, match="no spectrum to draw"):
        plot_spectra([], tmp_path / "s.svg")
