"""Small networks, data and a bare loop for training towards low rank."""

import torch
from torch import nn
from torch.nn import functional as F


def convnet(width=8):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


def vectors(count=64):
    x = torch.randn(count, 12, generator=torch.Generator().manual_seed(2))
    return x, x[:, :3].argmax(1)


def images(count=32):
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    return x, (x[:, 0, :4].mean((1, 2)) > 0).long() + 2 * (x[:, 0, 4:].mean((1, 2)) > 0).long()


def train(run, optimizer, steps, data=None):
    """The loop that anyone would write; the loss of every step."""
    x, y = vectors() if data is None else data
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        (loss + run.penalty()).backward()
        optimizer.step()
        run.step()
        losses.append(float(loss.detach()))
    return losses


def accuracy(model):
    x, y = vectors()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())
