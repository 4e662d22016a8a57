"""Is a resumed training run the uninterrupted one, and is every other checkpoint refused?"""

import pytest
import torch
from cases_train import accuracy, assert_same, loader, network, tensors
from torch import nn

from rankfold._common import write_tensors
from rankfold.errors import RankfoldError, StoreError
from rankfold.train import Recipe, fit


class Interrupting:
    """A loader that is interrupted at a step of an epoch, counted over all epochs."""

    def __init__(self, loader, at):
        self.loader, self.at, self.steps = loader, at, 0

    def __len__(self):
        return len(self.loader)

    @property
    def generator(self):
        return self.loader.generator

    def __iter__(self):
        for batch in self.loader:
            self.steps += 1
            if self.steps == self.at:
                raise KeyboardInterrupt
            yield batch


RUNS = {
    "adamw": {},
    "sgd": {"optimizer": "sgd"},
    "best": {"keep_best": True},
    "own generator": {},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    def made():
        return loader(generator=torch.Generator().manual_seed(3) if run == "own generator" else None)

    def go(model, batches, path):
        recipe = Recipe(**RUNS[run], checkpoint=path)
        # for "best" it falls with every epoch, so that the first is kept and must come back from the file
        metric = (lambda model: -model[1].num_batches_tracked.item()) if run == "best" else accuracy
        options = {"teacher": nn.Linear(6, 3), "epochs": 4, "lr": 0.05, "evaluate": metric, "recipe": recipe}
        with torch.no_grad():
            options["teacher"].weight.copy_(torch.eye(3, 6))
            options["teacher"].bias.zero_()
        return fit(model, batches, **options)

    wanted = network()
    uninterrupted = go(wanted, made(), None)

    path = tmp_path / "run.safetensors"
    # re-estimation reads 3 batches, an epoch 3 more: this is the second step of the third epoch
    interrupted = network()
    with pytest.raises(KeyboardInterrupt):
        go(interrupted, Interrupting(made(), 11), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    resumed = network()
    history = go(resumed, made(), path)
    assert_same(resumed, tensors(wanted))
    without_time = [[{**vars(row), "seconds": 0} for row in h.epochs] for h in (uninterrupted, history)]
    assert without_time[0] == without_time[1]
    assert history.kept == uninterrupted.kept == (1 if run == "best" else 4)

    finished = network()
    assert go(finished, Interrupting(made(), 1), path) == history  # and reads no batch
    assert_same(finished, tensors(wanted))


def plain_file(path):
    write_tensors(path, {"a": torch.ones(2)})


def pickle_file(path):
    torch.save({"a": torch.ones(2)}, path)


def cut_file(path):
    fit(network(), loader(), recipe=Recipe(checkpoint=path))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("write", "problem"),
    [(plain_file, "no checkpoint of a training run"), (pickle_file, "zip archive"), (cut_file, "cut short")],
)
def test_another_file_is_no_checkpoint(write, problem, tmp_path):
    path = tmp_path / "run.safetensors"
    write(path)
    content, model = path.read_bytes(), network()
    with pytest.raises(StoreError, match=problem):
        fit(model, loader(), recipe=Recipe(checkpoint=path))
    assert path.read_bytes() == content
    assert_same(model, tensors(network()))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lr": 0.5}, "lr is 0.001, this run's 0.5"),
        ({"epochs": 3}, "epochs is 2, this run's 3"),
        ({"recipe": {"alpha": 0.1}}, "alpha is 0.7, this run's 0.1"),
        ({"model": nn.Sequential(nn.Linear(6, 3))}, "model's 0.weight"),
        ({"loader": loader(64)}, "steps is 3, this run's 4"),
    ],
    ids=["lr", "epochs", "alpha", "model", "loader"],
)
def test_a_checkpoint_of_another_run_is_refused(change, problem, tmp_path):
    path = tmp_path / "run.safetensors"
    fit(network(), loader(), epochs=2, recipe=Recipe(checkpoint=path))
    model = change.pop("model", network())
    before = tensors(model)
    options = {"epochs": 2, **change, "recipe": Recipe(checkpoint=path, **change.get("recipe", {}))}
    with pytest.raises(StoreError, match=problem):
        fit(model, options.pop("loader", loader()), **options)
    assert_same(model, before)


def test_a_checkpoint_that_cannot_be_written_stops_before_training(tmp_path):
    model = network()
    with pytest.raises(StoreError, match="none/run.safetensors cannot be written"):
        fit(model, loader(), recipe=Recipe(checkpoint=tmp_path / "none" / "run.safetensors"))
    assert_same(model, tensors(network()))


def test_an_optimizer_that_is_not_plain_data_cannot_be_kept(tmp_path):
    class Odd(torch.optim.SGD):
        def __init__(self, groups, lr):
            super().__init__(groups, lr=lr)
            self.param_groups[0]["odd"] = object()

    with pytest.raises(RankfoldError, match="Odd cannot be kept"):
        fit(network(), loader(), recipe=Recipe(optimizer=Odd, checkpoint=tmp_path / "run.safetensors"))
    assert not list(tmp_path.iterdir())
