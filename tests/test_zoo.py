"""Do representative architectures of torchvision compress to half, run, train and survive a file?

`benchmarks/does_the_zoo_compress.py` asks the same of all of them and keeps the answer.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import does_the_zoo_compress as zoo  # noqa: E402

FAMILIES = [
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vit_b_32",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compresses_to_half(name):
    result = zoo.check(name, 0.5)
    assert zoo.passes(result, 0.5), result
    assert result["kept"] <= 0.5


def test_the_zoo_is_whole():
    assert set(FAMILIES) <= set(zoo.names())
    assert set(zoo.ARGUMENTS) | set(zoo.SIZES) <= set(zoo.names())


def test_a_small_model_compresses_to_half(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
    monkeypatch.setattr(zoo.torchvision.models, "get_model", lambda *_, **__: net)
    result = zoo.check("resnet18", 0.5)
    assert zoo.passes(result, 0.5), result
    assert not zoo.passes({"model": "x", "note": "failed"}, 0.5)
