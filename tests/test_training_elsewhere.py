"""Do the training methods work in the loops of others: accumulation, autocast, two processes, Lightning, Trainer?"""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases_svd_training import convnet, images, mlp, train, vectors
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import rankfold as rf
from rankfold.train import TRP, SVDTraining, lightning_callback, svd_form, trainer_callback, training_method

STEPS, BATCH = 4, 16


def started(**options):
    form, _ = svd_form(mlp())
    return SVDTraining(form, **{"sparsity": 0.05, **options})


def reference(run, steps=STEPS, rate=0.1):
    """The bare loop on batches in order."""
    x, y = vectors()
    optimizer = torch.optim.SGD(run.model.parameters(), lr=rate, momentum=0.9)
    for k in range(steps):
        part = slice(k * BATCH, (k + 1) * BATCH)
        optimizer.zero_grad()
        (F.cross_entropy(run.model(x[part]), y[part]) + run.penalty()).backward()
        optimizer.step()
        run.step()
    return run


def assert_same_weights(model, other):
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), atol=1e-5, rtol=1e-4)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    whole, parts = reference(started()), started()
    x, y = vectors()
    optimizer = torch.optim.SGD(parts.model.parameters(), lr=0.1, momentum=0.9)
    for k in range(STEPS):
        optimizer.zero_grad()
        for half in range(2):
            part = slice(k * BATCH + half * 8, k * BATCH + half * 8 + 8)
            ((F.cross_entropy(parts.model(x[part]), y[part]) + parts.penalty()) / 2).backward()
        optimizer.step()
        parts.step()
    assert_same_weights(parts.model, whole.model)


@pytest.mark.parametrize("name", ["svd", "trp", "dlrt", "lc"])
def test_autocast_to_bfloat16(name):
    options = {"trp": {"every": 3}, "lc": {"every": 3}}.get(name, {})
    run = training_method(name, convnet(), **options)
    x, y = images()
    optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(run.model(x), y)
            penalty = run.penalty()
        assert penalty.dtype == torch.float32
        (loss + penalty).backward()
        optimizer.step()
        run.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_the_penalty_under_autocast_is_that_of_float32():
    run = reference(started())
    plain = float(run.penalty().detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(run.penalty().detach()) == pytest.approx(plain, rel=1e-6)


def test_a_model_in_bfloat16():
    form, _ = svd_form(mlp().bfloat16())
    run = SVDTraining(form, sparsity=0.05)
    assert run.penalty().dtype == torch.float32
    x, y = vectors()
    losses = train(run, torch.optim.SGD(form.parameters(), lr=0.1), 20, (x.bfloat16(), y))
    assert losses[-1] < losses[0]
    small, _ = run.prune(energy=0.9)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["svd", "dlrt"])
def test_compiled_models_are_seen_through(name):
    run = training_method(name, mlp())
    compiled = torch.compile(run.model, backend="eager")
    again = SVDTraining(compiled) if name == "svd" else type(run)(compiled)
    assert list(again.layers) == ["0", "2", "4"]
    assert type(again.prune(budget=rf.Budget(params=0.5))[0]) is nn.Sequential


TOGETHER = {"svd": {"sparsity": 0.05}, "trp": {"every": 2}}


def worker(rank, port, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, options in TOGETHER.items():
        run = training_method(name, mlp(), **options)
        model = DistributedDataParallel(run.model)
        run = SVDTraining(model, **options) if name == "svd" else TRP(run.model, **options)
        x, y = vectors()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for k in range(STEPS):
            part = slice(k * BATCH + 8 * rank, k * BATCH + 8 * rank + 8)
            optimizer.zero_grad()
            (F.cross_entropy(model(x[part]), y[part]) + run.penalty()).backward()
            optimizer.step()
            run.step()
        queue.put((rank, name, {key: value.tolist() for key, value in model.module.state_dict().items()}))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch():
    queue = mp.get_context("spawn").Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(worker, (port, queue), nprocs=2, join=False)
    found = [queue.get(timeout=120) for _ in range(4)]
    processes.join()
    for _, name, state in found:
        whole = reference(training_method(name, mlp(), **TOGETHER[name]))
        state = {key: torch.tensor(value) for key, value in state.items()}
        torch.testing.assert_close(state, dict(whole.model.state_dict()), atol=1e-4, rtol=1e-3)


# Lightning


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip("lightning.pytorch")
        yield found


def lightning_run(lightning, run, folder, **options):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = run.model

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[lightning_callback(run)],
        **{"max_epochs": 1, "enable_checkpointing": False, **options.pop("trainer", {})},
    )
    batch = options.pop("batch", BATCH)
    trainer.fit(Module(), DataLoader(TensorDataset(*vectors()), batch_size=batch), **options)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_is_the_bare_loop(lightning, tmp_path):
    whole = reference(started())
    run = started()
    lightning_run(lightning, run, tmp_path)
    assert (run.steps, run.epochs) == (4, 1)
    assert_same_weights(run.model, whole.model)
    accumulated = started()
    lightning_run(lightning, accumulated, tmp_path, batch=8, trainer={"accumulate_grad_batches": 2})
    assert accumulated.steps == 4
    assert_same_weights(accumulated.model, whole.model)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_and_stops(lightning, tmp_path):
    run = training_method("lc", mlp(), every=3)
    trainer = lightning_run(lightning, run, tmp_path, trainer={"enable_checkpointing": True})
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    again, whole = training_method("lc", mlp(), every=3), training_method("lc", mlp(), every=3)
    lightning_run(lightning, again, tmp_path, ckpt_path=path, trainer={"max_epochs": 2}, weights_only=False)
    lightning_run(lightning, whole, tmp_path, trainer={"max_epochs": 2})
    assert again.state_dict()["mu"] == whole.state_dict()["mu"]
    assert_same_weights(again.model, whole.model)
    short = training_method("pufferfish", mlp(), warmup=1)
    lightning_run(lightning, short, tmp_path, trainer={"max_epochs": 5})
    assert short.epochs == 1
    broken = started()
    with torch.no_grad():
        broken.model[4].up.bias.fill_(float("nan"))
    with pytest.raises(rf.RankfoldError, match="the loss is nan in step 1"):
        lightning_run(lightning, broken, tmp_path)


# the Hugging Face Trainer


class Classifier(nn.Module):
    """Takes and returns what the Trainer expects."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_run(run, folder, *, resume=False, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    x, y = vectors()
    rows = [{"inputs": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 1e9,
        "logging_strategy": "no",
    }
    model = Classifier(run.model)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**arguments, **options}),
        train_dataset=rows,
        callbacks=[trainer_callback(run)],
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None),
    )
    trainer._get_train_sampler = lambda *_: None  # in order, as the bare loop reads them
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_is_the_bare_loop(tmp_path):
    whole, run = reference(started()), started()
    trainer_run(run, tmp_path)
    assert (run.steps, run.epochs) == (4, 1)
    assert_same_weights(run.model, whole.model)
    accumulated = started()
    trainer_run(accumulated, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert accumulated.steps == 4
    assert_same_weights(accumulated.model, whole.model)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_resumes_and_stops(tmp_path):
    saving = {"save_strategy": "epoch", "num_train_epochs": 2}
    whole = training_method("lc", mlp(), every=3)
    trainer_run(whole, tmp_path / "whole", **saving)
    again = training_method("lc", mlp(), every=3)
    half = tmp_path / "whole" / "checkpoint-4"
    assert (half / "rankfold_method.safetensors").is_file()
    trainer_run(again, tmp_path / "whole", resume=str(half), **saving)
    assert (again.steps, again.epochs) == (8, 2)
    assert again.state_dict()["mu"] == whole.state_dict()["mu"]
    assert_same_weights(again.model, whole.model)
    short = training_method("pufferfish", mlp(), warmup=1)
    trainer_run(short, tmp_path / "short", num_train_epochs=5)
    assert short.epochs == 1
