"""Does every command do its one job, print what a program can read, and fail in one clear line?"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases_timing import FakeClock
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import rankfold
from rankfold.cli import _commands, app
from rankfold.cli._options import AFTER, BEFORE, SVD_ALONE, CompressWords, DenseWords, InputWords, TrainWords
from rankfold.latency import _layers as timings
from rankfold.pipeline import _latency_check as promises
from rankfold.planning import Plan, Planning
from rankfold.stats import Stats, measure
from rankfold.store import load, read_plan

SHOP = """
import os

import torch
from torch import nn

def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20), nn.Linear(20, 5))

def noisy():
    os.write(1, b"a compiled library says hello")
    return model()

def tokens():
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 4))

def data():
    torch.manual_seed(2)
    return [(torch.randn(4, 3, 8, 8), torch.arange(4)) for _ in range(3)]

def generator():
    yield from data()

def no_data():
    return []

def accuracy(model):
    return 0.625

def broken():
    raise KeyError("no such thing")

def number():
    return 3

constant = 5
"""
SIZES = ["--example", "2,3,8,8"]


@pytest.fixture(autouse=True)
def shop(tmp_path, monkeypatch):
    """A working directory with a module of factories and trained weights."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    import shop

    torch.manual_seed(5)
    state = {name: torch.randn_like(value) for name, value in shop.model().state_dict().items()}
    save_file(state, "trained.safetensors")
    yield shop
    sys.modules.pop("shop", None)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words):
    result = run(*words)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fails(*words):
    """Return the one line that a failing command says."""
    result = run(*words)
    assert result.exit_code == 2, (result.stdout, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.endswith("--weights FILE.safetensors")]
    assert line.startswith("error: ")
    return line


def compressed(name="small.safetensors", *words):
    done("compress", "shop:model", *SIZES, "--params", "0.5", "--weights", "trained.safetensors", "--out", name, *words)
    return name


def test_measure_prints_the_statistics(shop):
    wanted = measure(shop.model(), example=torch.zeros(2, 3, 8, 8))
    result = done("measure", "shop:model", *SIZES, "--json")
    assert Stats.from_json(result.stdout) == wanted
    assert result.stderr == ""
    text = done("measure", "shop:model", "--data", "shop:data").stdout
    assert f"{wanted.params:,}" in text
    assert f"{wanted.macs:,}" in text


def test_measure_of_a_model_that_takes_tokens():
    assert json.loads(done("measure", "shop:tokens", "--example", "2,7", "--dtype", "int64", "--json").stdout)["params"]


def test_plan_prints_and_writes_the_same_plan():
    limits = ("--params", "0.5", "--macs", "0.9", "--bytes", "0.8")
    result = done("plan", "shop:model", *SIZES, *limits, "--json", "--out", "plan.json")
    plan = Plan.from_json(result.stdout)
    assert plan == Plan.from_json(Path("plan.json").read_text())
    assert plan.params <= 0.5 * plan.dense.params
    assert plan.budget.limits == {"params": 0.5, "macs": 0.9, "bytes": 0.8}
    assert "wrote plan.json" in result.stderr


def test_a_latency_arrives_in_the_budget(monkeypatch):
    seen = {}

    def spy(model, **options):
        seen.update(options)
        return model, Plan({})

    monkeypatch.setattr(_commands, "compress_model", spy)
    monkeypatch.setattr("rankfold.cli._commands.save", lambda *_: None)
    done("compress", "shop:model", *SIZES, "--latency", "0.6", "--out", "small.safetensors")
    assert seen["budget"].limits == {"latency": 0.6}


TIMED = {
    "example": (SIZES, []),
    "data": (["--data", "shop:data"], ["--metric", "weights"]),
    "generator, its inputs measured": (["--data", "shop:generator"], ["--batches", "2"]),
    "from scratch": (SIZES, ["--init", "random", "--rule", "uniform"]),
    "with another limit": (SIZES, ["--macs", "0.9"]),
}


@pytest.mark.parametrize("case", TIMED)
def test_a_plan_within_a_latency_is_measured_in_the_whole_model(case, monkeypatch, tmp_path):
    source, more = TIMED[case]
    clock = FakeClock()
    monkeypatch.setattr(timings, "time_models", clock)
    monkeypatch.setattr(promises, "time_models", clock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plan = Plan.from_json(done("plan", "shop:model", *source, "--latency", "0.8", "--json", *more).stdout)
    assert plan.budget.latency == 0.8
    assert plan.measured.kept <= 0.8 * promises.TOLERATED
    assert sum("small" in models for models, _ in clock.races) >= 1


def test_a_latency_that_no_layer_allows_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "time_models", clock := FakeClock(lambda _: 1e-3))
    monkeypatch.setattr(promises, "time_models", clock)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "latency=1.0000" in fails("plan", "shop:model", *SIZES, "--latency", "0.5")


def test_every_option_of_the_planner_arrives(monkeypatch):
    seen = {}

    def spy(model, **options):
        seen.update(options)
        return Plan({})

    monkeypatch.setattr(_commands, "make_plan", spy)
    done(
        *("plan", "shop:model", *SIZES, "--params", "0.5", "--methods", "cp, tt", "--rule", "uniform"),
        *("--include", "0", "--include", "3", "--exclude", "4", "--multiple", "4", "--seed", "7", "--init", "random"),
        *("--metric", "weights", "--objective", "squares", "--batches", "3", "--no-recalibrate"),
    )
    assert seen.pop("example").shape == (2, 3, 8, 8)
    assert seen == {
        "budget": rankfold.Budget(params=0.5),
        "planning": Planning(
            methods=("cp", "tt"),
            rule="uniform",
            init="random",
            include=("0", "3"),
            exclude=("4",),
            multiple=4,
            metric="weights",
            objective="squares",
            batches=3,
            recalibrate=False,
            seed=7,
        ),
    }


def test_a_plan_to_train_from_scratch_reads_no_weights():
    words = ["shop:model", *SIZES, "--params", 0.5, "--init", "random"]
    done = run("plan", *words, "--rule", "uniform", "--out", "scratch.json")
    assert done.exit_code == 0, done.output
    assert "error: unknown" in done.stdout
    assert any(choice.method != "dense" for choice in Plan.from_json(Path("scratch.json").read_text()).layers.values())
    assert "reads the weights" in run("plan", *words).stderr


def test_compress_saves_the_model_and_its_report(shop):
    result = done(
        *("compress", "shop:model", *SIZES, "--params", "0.5", "--weights", "trained.safetensors"),
        *("--out", "small.safetensors", "--report", "report.md", "--json"),
    )
    small, plan = load("small.safetensors", shop.model()), read_plan("small.safetensors")
    assert Plan.from_json(result.stdout) == plan
    assert sum(p.numel() for p in small.parameters()) == plan.params
    assert Path("report.md").read_text().startswith("# Compression report")


def test_compress_takes_an_edited_plan(shop):
    done("plan", "shop:model", *SIZES, "--params", "0.5", "--out", "plan.json")
    edited = Plan.from_json(Path("plan.json").read_text()).with_choice("3", rankfold.planning.Choice("svd", rank=2))
    Path("plan.json").write_text(edited.to_json())
    done("compress", "shop:model", "--plan", "plan.json", "--out", "small.safetensors")
    assert load("small.safetensors", shop.model())[3].rank == 2


def test_compress_learns_from_data(shop):
    arguments = ("compress", "shop:model", "--params", "0.5", "--data", "shop:data", "--batches", "2")
    done(*arguments, "--out", "small.safetensors", "--report", "report.md")
    small, plan = rankfold.compress(
        shop.model(), shop.data(), budget=rankfold.Budget(params=0.5), planning=Planning(batches=2)
    )
    assert plan.metric == "outputs"
    assert read_plan("small.safetensors") == plan
    loaded = load("small.safetensors", shop.model())
    torch.testing.assert_close(loaded.state_dict(), small.state_dict())
    assert "output error" in Path("report.md").read_text()
    done(*arguments, "--no-recalibrate", "--metric", "asvd", "--out", "other.safetensors")
    other, plan = rankfold.compress(
        shop.model(),
        shop.data(),
        budget=rankfold.Budget(params=0.5),
        planning=Planning(batches=2, metric="asvd", recalibrate=False),
    )
    assert plan.metric == "asvd"
    torch.testing.assert_close(load("other.safetensors", shop.model()).state_dict(), other.state_dict())


def test_a_plan_from_data_wants_the_data_again(shop):
    words = ("shop:model", "--params", "0.5", "--data", "shop:data")
    plan = Plan.from_json(done("plan", *words, "--out", "plan.json", "--json").stdout)
    assert plan == rankfold.plan(shop.model(), shop.data(), budget=rankfold.Budget(params=0.5))
    failed = run("compress", "shop:model", "--plan", "plan.json", "--out", "small.safetensors")
    assert failed.exit_code
    assert "need the data again" in failed.stderr and "--data" in failed.stderr
    done("compress", "shop:model", "--plan", "plan.json", "--data", "shop:data", "--out", "small.safetensors")
    expected, _ = rankfold.compress(shop.model(), shop.data(), plan=plan)
    torch.testing.assert_close(load("small.safetensors", shop.model()).state_dict(), expected.state_dict())


def test_weights_are_the_ones_of_the_file(shop):
    words = (
        "compress",
        "shop:model",
        "--plan",
        "plan.json",
        "--weights",
        "trained.safetensors",
        "--out",
        "s.safetensors",
    )
    Path("plan.json").write_text(Plan({}).to_json())
    done(*words)
    trained = shop.model()
    trained.load_state_dict(load_file("trained.safetensors"))
    torch.testing.assert_close(load("s.safetensors", shop.model())[3].weight, trained[3].weight, rtol=0, atol=0)


def test_train_changes_the_weights_and_keeps_the_plan(shop):
    small = compressed()
    words = ("train", "shop:model", small, "--weights", "trained.safetensors", "--data", "shop:data")
    result = done(*words, "--epochs", "2", "--evaluate", "shop:accuracy", "--out", "tuned.safetensors", "--json")
    history = json.loads(result.stdout)
    assert [(row["epoch"], row["metric"]) for row in history["epochs"]] == [(1, 0.625), (2, 0.625)]
    assert all(row["distillation"] is not None for row in history["epochs"])
    before, after = (load(name, shop.model()) for name in (small, "tuned.safetensors"))
    assert not torch.equal(before[4].weight, after[4].weight)
    assert read_plan(small) == read_plan("tuned.safetensors")


def test_train_without_a_teacher():
    small = compressed()
    words = ("train", "shop:model", small, "--data", "shop:data", "--no-teacher", "--out", "t.safetensors")
    assert json.loads(done(*words, "--json").stdout)["epochs"][0]["distillation"] is None
    assert "loss" in done(*words, "--force").stdout


def test_report_is_printed_written_and_drawn():
    words = ("report", "shop:model", compressed(), "--weights", "trained.safetensors", "--evaluate", "shop:accuracy")
    result = done(*words, *SIZES, "--threads", "1", "--out", "report.json", "--plot", "report.png", "--json")
    data = json.loads(result.stdout)
    assert data == json.loads(Path("report.json").read_text())
    assert [row["accuracy"] for row in data["rows"]] == [0.625, 0.625]
    assert data["conditions"]["threads"] == 1
    assert Path("report.png").read_bytes()[:4] == b"\x89PNG"
    assert "speed-up" in done(*words, "--data", "shop:data").stdout


def test_export_writes_a_checked_program():
    words = ("export", "shop:model", compressed(), *SIZES, "--out", "small.pt2")
    data = json.loads(done(*words, "--json").stdout)
    assert data["path"] == "small.pt2"
    assert data["difference"] < 1e-5
    assert "small.pt2: 0." in done(*words, "--force").stdout


def test_demo_runs_in_the_directory_given(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(_commands, "run_demo", lambda out, *, seed: seen.append((out.name, seed)))
    done("demo", "--out", "there", "--seed", "4")
    assert seen == [("there", 4)]


def test_zoo_models():
    words = ("measure", "torchvision:squeezenet1_1", "--example", "1,3,64,64", "--json")
    assert json.loads(done(*words).stdout)["params"] == 1_235_496


def test_random_weights_are_pointed_out():
    words = ("plan", "torchvision:squeezenet1_1", "--example", "1,3,64,64", "--params", "0.999", "--methods", "svd")
    assert "random weights" in done(*words, "--include", "features.0").stderr


def test_hugging_face_directories(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained("bert")
    words = ("measure", "hf:bert", "--example", "2,7", "--dtype", "int64", "--json")
    assert json.loads(done(*words).stdout)["params"] == sum(p.numel() for p in model.parameters())


PLAN = ("plan", "shop:model", *SIZES, "--params", "0.5")
FAILURES = {
    "no colon": (("measure", "shop", *SIZES), "write package.module:function"),
    "no module": (("measure", "warehouse:model", *SIZES), "warehouse cannot be imported: ModuleNotFoundError"),
    "no function": (("measure", "shop:bicycle", *SIZES), "shop has no 'bicycle'"),
    "no callable": (("measure", "shop:constant", *SIZES), "not a function but a int"),
    "raising factory": (("measure", "shop:broken", *SIZES), "shop:broken failed: KeyError: 'no such thing'"),
    "not a model": (("measure", "shop:number", *SIZES), "returned a int, not a torch.nn.Module"),
    "unknown zoo model": (("measure", "torchvision:resnet17", *SIZES), "torchvision:resnet17 cannot be built"),
    "no input": (("measure", "shop:model"), "give one of --example"),
    "two inputs": (("measure", "shop:model", *SIZES, "--data", "shop:data"), "give one of --example"),
    "wrong input": (("measure", "shop:model", "--example", "2,3,9,9"), "the model cannot be called with this input"),
    "no sizes": (("measure", "shop:model", "--example", "2x3"), "sizes such as 1,3,224,224, not '2x3'"),
    "zero size": (("measure", "shop:model", "--example", "0,3"), "at least 1, not '0,3'"),
    "unknown dtype": (("measure", "shop:model", *SIZES, "--dtype", "float8"), "--dtype is one of float32"),
    "empty loader": (("measure", "shop:model", "--data", "shop:no_data"), "empty"),
    "bad device": (("measure", "shop:model", *SIZES, "--device", "abacus"), "device 'abacus' cannot be used"),
    "no budget": (("plan", "shop:model", *SIZES), "say how much to keep"),
    "impossible budget": ((*PLAN[:-1], "0.0001"), "closest"),
    "budget beyond one": ((*PLAN[:-1], "1.5"), "1.5"),
    "unknown method": ((*PLAN, "--methods", "magic"), "magic"),
    "unknown rule": ((*PLAN, "--rule", "luck"), "luck"),
    "unknown layer": ((*PLAN, "--exclude", "layer9"), "layer9"),
    "pickle": ((*PLAN, "--weights", "net.pth"), "convert it once: python -c"),
    "no weights": ((*PLAN, "--weights", "gone.safetensors"), "there is no file gone.safetensors"),
    "other weights": (
        ("plan", "shop:tokens", *PLAN[2:], "--weights", "trained.safetensors"),
        "does not fit Sequential",
    ),
    "damaged weights": ((*PLAN, "--weights", "noise.safetensors"), "noise.safetensors is damaged"),
    "existing file": ((*PLAN, "--out", "shop.py"), "shop.py exists: choose another name, or add --force"),
    "no directory": ((*PLAN, "--out", "gone/plan.json"), "there is no directory gone"),
    "no plan": (("compress", "shop:model", "--plan", "gone.json", "--out", "s.safetensors"), "gone.json"),
    "damaged plan": (("compress", "shop:model", "--plan", "shop.py", "--out", "s.safetensors"), "JSON"),
    "plan and budget": (
        ("compress", "shop:model", "--plan", "p.json", "--macs", "0.5", "--out", "s.safetensors"),
        "leave --macs out",
    ),
    "no small file": (("export", "shop:model", "gone.safetensors", *SIZES, "--out", "a.pt2"), "there is no file gone"),
    "pickle as small": (("report", "shop:model", "net.pth", *SIZES), "net.pth"),
    "no directory of hf": (("measure", "hf:nowhere", *SIZES), "there is no directory nowhere"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_errors_are_one_clear_line(case):
    words, said = FAILURES[case]
    Path("noise.safetensors").write_bytes(b"\xff" * 100)
    torch.save({"weight": torch.zeros(2)}, "net.pth")
    assert said in fails(*words)


def test_errors_about_a_compressed_file():
    small = compressed()
    assert "no format 'xyz'" in fails("export", "shop:model", small, *SIZES, "--out", "a.xyz")
    assert "got 'tpu'" in fails("report", "shop:model", small, *SIZES, "--runtime", "tpu")
    assert "0.003" in fails("export", "shop:model", small, *SIZES, "--out", "a.pt2", "--tolerance=-0.003")
    assert fails("report", "shop:tokens", small, *SIZES)


def test_the_conversion_that_is_advised_works(shop):
    torch.save(shop.model().state_dict(), "net.pth")
    command = fails(*PLAN, "--weights", "net.pth").split("convert it once: ")[1]
    code = re.fullmatch(r'python -c "(.*)"', command).group(1)
    exec(code, {})
    done(*PLAN, "--weights", "net.safetensors")


def test_force_replaces_and_nothing_is_lost_without_it():
    small = compressed()
    before = Path(small).read_bytes()
    words = ("compress", "shop:model", *SIZES, "--params", "0.3", "--out", small)
    assert "--force" in fails(*words)
    assert Path(small).read_bytes() == before
    done(*words, "--force")
    assert Path(small).read_bytes() != before


def test_ctrl_c_ends_with_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_commands, "measure_model", interrupted)
    result = run("measure", "shop:model", *SIZES)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(_commands, "make_plan", lambda *_, **__: 1 / 0)
    assert isinstance(run(*PLAN).exception, ZeroDivisionError)


def test_as_a_program():
    words = [sys.executable, "-m", "rankfold"]
    ok = subprocess.run([*words, "plan", *PLAN[1:], "--json"], capture_output=True, text=True, check=True)
    assert Plan.from_json(ok.stdout).layers
    bad = subprocess.run([*words, "measure", "shop:broken", *SIZES], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr == "error: shop:broken failed: KeyError: 'no such thing'\n"


def test_json_is_all_there_is_on_standard_output():
    words = [sys.executable, "-m", "rankfold", "measure", "shop:noisy", *SIZES, "--json"]
    out = subprocess.run(words, capture_output=True, text=True, check=True)
    assert Stats.from_json(out.stdout).params
    assert "says hello" in out.stderr


def test_version():
    assert re.fullmatch(r"rankfold \d+\.\d+.*\n", done("--version").stdout)


@pytest.mark.parametrize("command", ["demo", "measure", "plan", "compress", "train", "report", "export"])
def test_every_command_explains_itself(command):
    assert "--help" in done(command, "--help").stdout


def test_no_option_is_forgotten_next_to_a_plan():
    """An option that says how to plan is refused with --plan, or counts for the plan that is there."""
    same = {field.name for field in dataclasses.fields(InputWords)}
    of_the_command = {"plan", "out", "report", "force", "as_json"}
    known = {field.name for field in dataclasses.fields(CompressWords)}
    assert known == same | of_the_command | {*BEFORE, *AFTER}


def test_no_option_of_svd_training_is_forgotten_without_it():
    same = {field.name for field in dataclasses.fields(DenseWords)}
    both = {"small", "data", "out", "epochs", "lr", "teacher", "evaluate", "checkpoint", "svd", "device", "seed"}
    known = {field.name for field in dataclasses.fields(TrainWords)}
    assert known == same | both | {"force", "as_json"} | {*SVD_ALONE}


def test_two_outputs_in_one_file_are_refused():
    words = ("compress", "shop:model", *SIZES, "--params", "0.5", "--out", "one.safetensors")
    assert "two outputs" in fails(*words, "--report", "one.safetensors")
    assert not Path("one.safetensors").exists()


def test_the_file_says_how_the_model_in_it_was_made(shop):
    done("plan", "shop:model", "--params", "0.5", "--data", "shop:data", "--out", "plan.json")
    words = ("compress", "shop:model", "--data", "shop:data", "--plan", "plan.json", "--no-recalibrate", "--seed", "7")
    done(*words, "--out", "small.safetensors")
    made = read_plan("small.safetensors")
    assert (made.planning.recalibrate, made.planning.seed) == (False, 7)
    again, _ = rankfold.compress(shop.model(), shop.data(), plan=made)
    torch.testing.assert_close(again.state_dict(), load("small.safetensors", shop.model()).state_dict(), rtol=0, atol=0)
