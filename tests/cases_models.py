"""Small models that hold, between them, what a planner can meet in the wild."""

import dataclasses

import torch
from torch import nn

import rankfold as rf


class CalledTwice(nn.Module):
    """One layer, called twice, and registered under two names."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(32, 32)
        self.again = self.body
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.again(torch.relu(self.body(x))))


class Tied(nn.Module):
    """An embedding whose weight is also the output layer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


class TiedThrice(Tied):
    """An embedding whose weight is that of two output layers."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(32, 50)
        self.other.weight = self.embed.weight

    def forward(self, tokens):
        found = self.body(self.embed(tokens))
        return self.head(found) + self.other(found)


class WithDict(nn.Module):
    """A model that is called with keyword arguments and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.unused = nn.Linear(24, 24)

    def forward(self, *, x, scale):
        return {"y": self.first(x) * scale}


class Attention(nn.Module):
    """A multi-head attention, which reads the weights of its layers itself."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.attend(x, x, x, need_weights=False)[0])


def convnet(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    )


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(m, n) for m, n in zip(widths, widths[1:], strict=False)))


def encoder(depth: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, depth)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def told(**arguments) -> dict:
    """The arguments of `rf.plan`, `rf.compress` or `rf.search`, with those of a `Planning` gathered in one."""
    own = {field.name for field in dataclasses.fields(rf.Planning)}
    inner = {name: arguments.pop(name) for name in list(arguments) if name in own}
    return {**arguments, "planning": rf.Planning(**inner)} if inner else arguments
