"""Do all scripts of benchmarks/ and reproduce/ find what they import, and does every reproduction have a quick run?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABSENT = ("decoupling", "jax")  # what the extra "dev" does not install: scripts that want it are left out
IMPORTER = """
import importlib, json, sys
folder, *names = sys.argv[1:]
sys.path[:0] = [".", folder]
sys.argv[1:] = []
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = [getattr(error, "name", None) or "", f"{type(error).__name__}: {error}"]
print(json.dumps(failed))
"""


def modules(folder):
    """Return the names that the scripts of a folder are imported by."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [
        file.stem if folder == "benchmarks" else ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
    ]


@pytest.mark.parametrize("folder", ["benchmarks", "reproduce"])
def test_every_script_finds_what_it_imports(folder):
    names = modules(folder)
    assert len(names) > 15
    words = [sys.executable, "-c", IMPORTER, folder, *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: told for name, (package, told) in failed.items() if package.partition(".")[0] not in ABSENT}
    assert not wrong


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda file: file.stem)
def test_every_benchmark_has_a_quick_run(file):
    text = file.read_text(encoding="utf-8")
    assert "options(" in text or "options_of_settings(" in text or '"--quick"' in text


@pytest.mark.parametrize("file", sorted((ROOT / "reproduce").rglob("run.py")), ids=lambda file: str(file.parent.name))
def test_every_reproduction_has_a_quick_run(file):
    text = file.read_text(encoding="utf-8")
    assert "quick=QUICK" in text or '"--quick"' in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cp_mnist", "planning.promise"])
def test_a_quick_run_writes_nothing(name):
    folder = ROOT / "reproduce" / Path(*name.split("."))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}
    words = [sys.executable, "-m", f"reproduce.{name}.run", "--quick"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if "FileNotFoundError" in done.stderr:
        pytest.skip("its data are not on this machine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.is_file()}
