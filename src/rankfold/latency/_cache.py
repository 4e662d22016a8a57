"""The cache for times of layers: one JSON file per setting in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankfold._common import atomic_path
from rankfold.errors import DataError
from rankfold.stats import CallTime, Curve, Setting

VERSION = 1
LARGEST = 2**26  # bytes; larger files are not read
LARGEST_GRAIN = 1024


def cache_folder() -> Path:
    """Return the cache folder of the operating system for Rankfold; it is created on the first write."""
    home = Path.home()
    default = {"win32": home / "AppData" / "Local", "darwin": home / "Library" / "Caches"}
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(given or default.get(sys.platform, home / ".cache")) / "rankfold"


def cache_file(folder: Path, setting: Setting) -> Path:
    """Return the file of a setting; each device, version and number of threads has its own."""
    told = json.dumps(asdict(setting), sort_keys=True)
    return folder / f"timings-{setting.runtime}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"


def read_cases(path: Path, setting: Setting) -> dict[str, CallTime]:
    """Return the cases in a file, none if there is no file; warn about a file that can't be used and ignore it."""
    try:
        if not path.exists():
            return {}
        return _checked(path, setting)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        warnings.warn(
            f"the kept times of layers in {path} are ignored and measured again: {error!r:.200}", stacklevel=2
        )
        return {}


def write_cases(path: Path, setting: Setting, cases: Mapping[str, CallTime]) -> None:
    """Write all cases to a file; warn if that is not possible, and write nothing."""
    data = {key: {"dense": case.dense, "curves": [_curve_data(c) for c in case.curves]} for key, case in cases.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            text = json.dumps({"rankfold_timings": VERSION, "setting": asdict(setting), "cases": data}, indent=1)
            unfinished.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        warnings.warn(f"the times of layers are not kept: {error}", stacklevel=2)


def _checked(path: Path, setting: Setting) -> dict[str, CallTime]:
    if path.stat().st_size > LARGEST:
        raise DataError(f"it has {path.stat().st_size:,} bytes")
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["rankfold_timings"] != VERSION:
        raise DataError(f"it is of version {data['rankfold_timings']!r}, this is {VERSION}")
    if data["setting"] != asdict(setting):
        raise DataError("it is of another device or version")
    return {str(key): _read_case(case) for key, case in data["cases"].items()}


def _read_case(data: Mapping[str, Any]) -> CallTime:
    dense = data["dense"]
    if type(dense) is not float or not (math.isfinite(dense) and dense > 0):
        raise DataError(f"the time of a layer must be a number of seconds > 0, got {dense!r:.40}")
    return CallTime(dense, 1, tuple(_read_curve(curve) for curve in data["curves"]))


def _curve_data(curve: Curve) -> dict[str, Any]:
    fields = ("method", "options", "axes", "shares", "grain")
    return {name: getattr(curve, name) for name in fields}


def _read_curve(data: Mapping[str, Any]) -> Curve:
    options = {key: tuple(x) if isinstance(x, list) else x for key, x in data["options"].items()}
    axes = tuple(tuple(float(x) for x in axis) for axis in data["axes"])
    grain = data["grain"]
    if not isinstance(data["method"], str) or type(grain) is not int or grain > LARGEST_GRAIN:
        raise DataError(f"method {data['method']!r:.40} with ranks in steps of {grain!r:.40}")
    return Curve(data["method"], options, axes, tuple(float(share) for share in data["shares"]), grain)
