"""Are models timed side by side, with their state left as it was?"""

import time

import pytest
import torch
from torch import nn

from rankfold.errors import DataError
from rankfold.latency import Latency, steady_clock, time_models
from rankfold.latency._race import LEAST_ROUNDS

X = torch.randn(4, 64)


class Recorder(nn.Module):
    """Notes its name at every call, and in which state it was called."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def forward(self, x):
        self.log.append((self.name, self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(0.006)  # long enough for one call to make a sample
        return x


def test_slower_model_has_a_ratio_below_one():
    models = {"dense": nn.Linear(64, 64), "huge": nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))}
    times = time_models(models, X, rounds=5)
    assert list(times) == ["dense", "huge"]
    assert times["dense"].ratios == (1.0,) * 5
    assert times["huge"].ratio < 0.5
    assert times["huge"].median > times["dense"].median > 0


def test_ratios_are_of_the_same_round():
    times = time_models({"a": nn.Linear(64, 64), "b": nn.Linear(64, 8)}, X, rounds=6)
    for first, second, ratio in zip(times["a"].seconds, times["b"].seconds, times["b"].ratios, strict=True):
        assert ratio == first / second


def test_rounds_are_interleaved_and_the_order_alternates():
    log = []
    time_models({"a": Recorder("a", log), "b": Recorder("b", log)}, X, rounds=5)
    assert "".join(entry[0] for entry in log)[-10:] == "abbaabbaab"


def test_models_run_in_eval_and_inference_mode_on_the_threads_asked_for():
    log = []
    model = Recorder("a", log)
    before = torch.get_num_threads()
    time_models({"a": model}, X, rounds=1, threads=before + 1)
    assert {entry[1:] for entry in log} == {(False, True, before + 1)}
    assert torch.get_num_threads() == before
    assert model.training


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout())
    model[1].eval()
    time_models({"a": model}, X, rounds=1)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].num_batches_tracked == 0


def test_state_comes_back_after_an_error():
    before = torch.get_num_threads()
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        time_models({"a": model}, X, threads=before + 1)
    assert torch.get_num_threads() == before
    assert model.training


def test_time_limit_ends_the_rounds_early_but_not_before_the_least():
    times = time_models({"a": Recorder("a", [])}, X, rounds=1000, seconds=0.001)
    assert len(times["a"].seconds) == LEAST_ROUNDS


def test_short_calls_are_repeated_until_a_sample_is_long():
    times = time_models({"short": nn.Identity(), "long": Recorder("a", [])}, X, rounds=1)
    assert times["short"].calls > 100
    assert times["long"].calls == 1


def test_samples_are_read_off_the_clock_that_is_given():
    ticks = iter(range(10_000))
    times = time_models({"a": nn.Identity()}, X, rounds=5, clock=lambda: float(next(ticks)))
    assert times["a"].calls == 1
    assert times["a"].seconds == (1.0,) * 5


@pytest.mark.parametrize(("threads", "clock"), [(1, time.process_time), (2, time.perf_counter)])
def test_processor_time_counts_where_one_thread_works(threads, clock):
    assert steady_clock(nn.Linear(2, 2), threads) is clock


def test_median_and_quartiles():
    time_ = Latency((5.0, 1.0, 2.0, 3.0, 4.0), (1.0, 1.0, 2.0, 2.0, 9.0), 1, 1, "cpu", "eager")
    assert (time_.median, time_.quartiles) == (3.0, (2.0, 4.0))
    assert (time_.ratio, time_.ratio_quartiles) == (2.0, (1.0, 2.0))


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        ({}, {}, "no model"),
        ({"a": nn.Identity()}, {"runtime": "tpu"}, "'eager', 'compile', 'onnxruntime' or a function .*, got 'tpu'"),
        ({"a": nn.Identity()}, {"rounds": 0}, "rounds must be a whole number >= 1, got 0"),
        ({"a": nn.Identity()}, {"threads": -1}, "threads must be a whole number >= 1, got -1"),
        ({"a": nn.Identity()}, {"seconds": 0}, "seconds must be a number > 0, got 0"),
    ],
)
def test_bad_arguments_are_named(models, options, said):
    with pytest.raises(DataError, match=said):
        time_models(models, X, **options)


def test_onnx_runtime_computes_the_same():
    from rankfold.latency import RUNTIMES

    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU()).eval()
    torch.testing.assert_close(RUNTIMES["onnxruntime"].model(model, X)()[0], model(X).detach())


def test_a_function_is_a_runtime_too():
    def halved(model, example):
        return lambda: model(example[:2])

    assert time_models({"a": nn.Linear(64, 8)}, X, runtime=halved, rounds=1)["a"].runtime == "halved"


@pytest.mark.slow
def test_compiled_model_computes_the_same():
    from rankfold.latency import RUNTIMES

    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU()).eval()
    with torch.inference_mode():
        torch.testing.assert_close(RUNTIMES["compile"].model(model, X)(), model(X))
