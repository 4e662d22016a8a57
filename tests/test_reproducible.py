"""Does the same seed give the same plan and the same weights, in any process and order, and is torch's state left?"""

import os
import subprocess
import sys

import pytest
import torch
from cases_models import convnet
from torch import nn

import rankfold as rf

PROGRAM = """
import hashlib, torch, rankfold as rf
from cases_models import convnet, encoder

torch.manual_seed(0)
digest = hashlib.sha256()
for model, example in ((convnet(), torch.randn(2, 3, 8, 8)), (encoder(), torch.randn(2, 5, 32))):
    for methods in (("svd", "tucker"), ("svd", "cp", "tt")):
        small, plan = rf.compress(model, example=example, budget=rf.Budget(params=0.8), methods=methods)
        fresh = rf.apply(model, plan, init="random", seed=3)
        digest.update(plan.to_json().encode())
        for tensor in (*small.state_dict().values(), *fresh.state_dict().values()):
            digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
"""


def run(hash_seed: str) -> str:
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_processes_agree_whatever_their_hash_seed():
    assert run("1") == run("2") != ""


@pytest.mark.parametrize("methods", ["svd", "cp", "tucker", "tt"])
def test_the_random_state_is_left_and_not_used(methods):
    torch.manual_seed(0)
    model, example = convnet(), torch.randn(2, 3, 8, 8)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        small, plan = rf.compress(model, example=example, budget=rf.Budget(params=0.8), methods=methods)
        fresh = rf.apply(model, plan, init="random")
        rf.densify(small)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((plan, small.state_dict(), fresh.state_dict()))
    (first, *weights), (second, *others) = results
    assert first == second
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def test_a_layer_is_decomposed_alike_whatever_its_neighbours():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    both = rf.Plan({name: rf.Choice("cp", rank=6) for name in "01"})
    alone = rf.Plan({"1": rf.Choice("cp", rank=6)})
    for init in ("decompose", "random"):
        pair, single = (rf.apply(model, plan, init=init)[1].state_dict() for plan in (both, alone))
        torch.testing.assert_close(pair, single, rtol=0, atol=0)
