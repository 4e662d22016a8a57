"""Does block distillation teach every block, keep what is better, and leave alone what is not its own?"""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rankfold as rf
from rankfold._common import output_error
from rankfold.errors import DataError, RankfoldError
from rankfold.surgery import apply
from rankfold.train import Recipe, distil_blocks


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.norm, self.down = (
            nn.Linear(width, 2 * width),
            nn.BatchNorm1d(2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x, *, scale):
        return x + scale * self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.blocks = nn.Linear(6, 8), nn.ModuleList([Residual(8), Residual(8)])
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.head(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.out(x)


DATA = [torch.randn(32, 6, generator=torch.Generator().manual_seed(k)) for k in range(4)]
PLAN = {f"blocks.{k}.{name}": rf.Choice("svd", rank=3) for k in range(2) for name in ("up", "down")}


def models():
    torch.manual_seed(0)
    teacher = Net().eval()
    return teacher, apply(teacher, rf.Plan({**PLAN, "out": rf.Choice("svd", rank=2)}))


def state(model):
    return copy.deepcopy(dict(model.state_dict()))


@pytest.mark.parametrize("inputs", ["student", "teacher"])
def test_every_block_and_the_whole_get_better(inputs):
    teacher, small = models()
    wanted, before, taught = state(teacher), output_error(teacher, small, DATA), state(small)
    small.train()
    rows = distil_blocks(small, teacher, DATA, epochs=15, lr=0.01, inputs=inputs)
    assert [row.name for row in rows] == ["blocks.0", "blocks.1", "out"]
    assert all(row.after < 0.9 * row.before and row.steps == 60 for row in rows[:2])
    assert output_error(teacher, small, DATA) < 0.9 * before
    assert_close(state(teacher), wanted, rtol=0, atol=0)
    after = state(small)
    kept = [name for name in taught if name.startswith("head") or "running" in name]
    assert_close({name: after[name] for name in kept}, {name: taught[name] for name in kept}, rtol=0, atol=0)
    assert all(module.training for module in small.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_the_error_told_is_that_of_the_block_on_its_own_inputs():
    teacher, small = models()
    (row,) = distil_blocks(small, teacher, [(x, None) for x in DATA], blocks=["blocks.0"], epochs=3)
    x = torch.cat(DATA)
    with torch.no_grad():
        wanted = teacher.blocks[0](teacher.head(x), scale=0.5)
        found = small.blocks[0](small.head(x), scale=0.5)
    assert row.after == pytest.approx(((found - wanted).norm() / wanted.norm()).item(), rel=1e-4)
    assert row.after < row.before


def test_only_the_factors():
    teacher, small = models()
    before = state(small)
    distil_blocks(small, teacher, DATA, recipe=Recipe(only="factors"))
    after = state(small)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".up." in name or ".down." in name for name in changed)


def test_a_block_that_does_not_get_better_keeps_its_weights():
    teacher, small = models()
    before = state(small)
    recipe = Recipe(clip=float("inf"), optimizer=lambda groups, lr: torch.optim.SGD(groups, lr=lr))
    rows = distil_blocks(small, teacher, DATA, epochs=1, lr=3.0, recipe=recipe, blocks=["out"])
    assert rows[0].after == rows[0].before
    assert_close(state(small), before, rtol=0, atol=0)


def test_the_same_seed_gives_the_same_model():
    results = []
    for seed in (0, 0, 1):
        teacher, small = models()
        distil_blocks(small, teacher, DATA, recipe=Recipe(seed=seed))
        results.append(small.state_dict())
    assert_close(dict(results[0]), dict(results[1]), rtol=0, atol=0)
    assert not torch.equal(results[0]["blocks.0.up.up.weight"], results[2]["blocks.0.up.up.weight"])


def test_an_interruption_gives_the_block_at_hand_its_weights_back():
    teacher, small = models()
    before = state(small)
    steps = []

    class Stopping(torch.optim.Adam):
        def step(self, closure=None):
            if len(steps) == 3:
                raise KeyboardInterrupt
            steps.append(super().step(closure))

    recipe = Recipe(optimizer=lambda groups, lr: Stopping(groups, lr=lr))
    with pytest.raises(KeyboardInterrupt):
        distil_blocks(small, teacher, DATA, recipe=recipe)
    assert_close(state(small), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in small.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"inputs": "both"}, "inputs"),
        ({"blocks": ["block.0"]}, "no block 'block.0'.*blocks.0"),
        ({"recipe": Recipe(temperature=3.0)}, "temperature"),
        ({"loader": []}, "empty"),
        ({"loader": (x for x in DATA)}, "which ends"),
        ({"loader": [DATA[0] * torch.nan]}, "NaN"),
    ],
)
def test_refusals(options, message):
    teacher, small = models()
    loader = options.pop("loader", DATA)
    before = state(small)
    with pytest.raises(RankfoldError, match=message) as caught:
        distil_blocks(small, teacher, loader, **options)
    assert isinstance(caught.value, DataError) == (message in ("empty", "which ends"))
    assert_close(state(small), before, rtol=0, atol=0)


def test_a_model_without_factorised_layers_needs_the_names_of_blocks():
    teacher, _ = models()
    with pytest.raises(RankfoldError, match="blocks="):
        distil_blocks(copy.deepcopy(teacher), teacher, DATA)
    rows = distil_blocks(copy.deepcopy(teacher), teacher, DATA, blocks=["head"])
    assert rows[0].before == rows[0].after == 0 and rows[0].steps == 0
