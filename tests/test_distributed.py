"""Do the layers train on two processes, replicated or sharded, to what they train to on one?"""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from cases import FORM_IDS, FORMS, example_of, small_rank
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from rankfold import layers
from rankfold.layers import TABLE, is_factorised
from rankfold.train import parameter_groups

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp")

STEPS, RANKS, SECONDS = 3, 2, 100
F64 = torch.float64


class Language(nn.Module):
    """A low-rank embedding, a train, and a head that shares the embedding's factors."""

    def __init__(self):
        super().__init__()
        self.embed = layers.LowRankEmbedding(20, 12, rank=3)
        self.body = layers.TTLinear(12, 12, rank=4, in_shape=(3, 4), out_shape=(4, 3))
        self.head = self.embed.tied_head()

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


def layer_case(form):
    layer, options = form
    torch.manual_seed(0)
    dense, x = example_of(layer.dense_type)
    built = layer.like(dense, rank=small_rank(layer, dense, options), **options)
    return nn.Sequential(built).to(F64), torch.cat([x, x.flip(-1)])


def language_case():
    torch.manual_seed(0)
    return Language().to(F64), torch.randint(20, (4, 5))


EACH = list({form[0]: name for form, name in zip(FORMS, FORM_IDS, strict=True)}.values())  # a form of every class
FEW = [name for name in EACH if "1d" not in name and "3d" not in name]
CASES = {name: lambda form=form: layer_case(form) for name, form in zip(FORM_IDS, FORMS, strict=True)}


def sharded(model, *, each):
    if each:
        for layer in filter(is_factorised, list(model.modules())):
            fsdp.fully_shard(layer)
    return fsdp.fully_shard(model)


WRAPS = {
    "one process": lambda model: model,
    "replicated": DistributedDataParallel,
    "sharded": lambda model: sharded(model, each=False),
    "each layer sharded": lambda model: sharded(model, each=True),
}


def trained(make, wrap, rank, world):
    """Train on this process's part of the batch; return the parameters, whole, by their place."""
    model, x = make()
    share = x.to(F64).chunk(world)[rank] if x.is_floating_point() else x.chunk(world)[rank]
    model = WRAPS[wrap](model)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05), momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(share).square().mean().backward()
        optimizer.step()
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in model.parameters()]


def run(rank, world, folder, names):
    """One process: every case in every wrap; the first writes what came of it."""
    torch.set_num_threads(1)
    group = {"init_method": f"file://{folder}/store", "timeout": timedelta(seconds=SECONDS)}
    dist.init_process_group("gloo", rank=rank, world_size=world, **group)
    try:
        wraps = [wrap for wrap in WRAPS if wrap != "one process"]
        found = {(name, wrap): trained(CASES[name], wrap, rank, world) for name in names for wrap in wraps}
        for wrap in wraps[:-1]:  # tied factors belong to two layers, which cannot each have a shard of them
            found["tied", wrap] = trained(language_case, wrap, rank, world)
        if rank == 0:
            torch.save(found, f"{folder}/found.pt")
    finally:
        dist.destroy_process_group()


def joined(context):
    deadline = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"the processes did not end within {SECONDS} s")


def check(folder, names):
    found = torch.load(folder / "found.pt")
    assert len(found) == 3 * len(names) + 2
    for (name, wrap), parameters in found.items():
        expected = trained(CASES.get(name, language_case), "one process", 0, 1)
        torch.testing.assert_close(parameters, expected, msg=lambda text, k=(name, wrap): f"{k}: {text}")


def test_every_layer_is_among_the_cases():
    assert {form[0] for form in FORMS} == set(TABLE.values())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view")
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of axes of size one
def test_one_process_in_a_group_trains_as_without(tmp_path):
    run(0, 1, tmp_path, FEW)
    check(tmp_path, FEW)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    joined(multiprocessing.spawn(run, (RANKS, str(tmp_path), EACH), nprocs=RANKS, join=False))
    check(tmp_path, EACH)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module.*returned a view")
def test_sharded_layers_keep_their_learning_rates(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _ = layer_case((layers.TTLinear, {}))
        before = [(group["multiplier"], len(group["params"])) for group in parameter_groups(model, lr=1.0)]
        after = parameter_groups(sharded(model, each=True), lr=1.0)
        assert [(group["multiplier"], len(group["params"])) for group in after] == before
        assert len(before) > 1
    finally:
        dist.destroy_process_group()
