"""Named tensors and texts in one safetensors file: nothing in it is ever executed.

A tensor with several names (tied weights) is stored once, and the header lists its other names. Saved models and
checkpoints of training runs are such files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankfold._common._atomic import atomic_path
from rankfold.errors import StoreError

ALIASES = "rankfold_aliases"
FOREIGN = (  # the first bytes of files that are often mistaken for safetensors files
    (b"PK\x03\x04", "a zip archive, as torch.save writes it (.pt, .pth)"),
    (b"\x80", "a pickle"),
)
# What safetensors and torch raise for a header that is well-formed but makes no sense.
UNREADABLE = (SafetensorError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write tensors and texts to `path`, atomically; the same ones give the same bytes.

    Args:
        path: the file to write or replace.
        tensors: dense tensors by name, on any device, contiguous or not; the same memory under several names is
            written once.
        texts: further entries of the header.

    Raises:
        StoreError: a tensor has no data or cannot be stored (meta, sparse, unsupported dtype), or the file cannot be
            written; an old file at `path` is then intact.
    """
    stored, aliases = _distinct(tensors)
    header = {"format": "pt", **(texts or {}), **({ALIASES: json.dumps(aliases)} if aliases else {})}
    try:
        with atomic_path(path) as unfinished:
            save_file(stored, unfinished, metadata=header)
            _sort_texts(unfinished)
            with safe_open(unfinished, framework="pt"):  # fails unless all bytes listed in the header are there
                pass
    except (OSError, SafetensorError, KeyError, AttributeError, ValueError) as problem:
        raise StoreError(f"{os.fspath(path)} cannot be written: {problem}") from problem


def _sort_texts(path: Path) -> None:
    """Put the texts of a header in order: safetensors writes them in another one each time, in as many bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # what is left over is padded with spaces, as the format has it
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read every tensor (to the CPU) and every text of a file.

    Names that share a tensor in the file get the same tensor object.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is not a complete safetensors file.
    """
    with _opened(path) as file:
        texts = dict(file.metadata() or {})
        # The copy releases the mapped file, which may be replaced while the tensors are in use.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    aliases = _aliases(path, texts.pop(ALIASES, "{}"), tensors)
    return tensors | {name: tensors[stored] for name, stored in aliases.items()}, texts


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts in the header of a file, without reading any tensors.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is not a complete safetensors file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def json_text(path: str | os.PathLike[str], texts: Mapping[str, str], key: str) -> Any:
    """Return an entry of the header, parsed as JSON; raise a `StoreError` if that is not possible."""
    try:
        return json.loads(texts[key])
    except (KeyError, ValueError, RecursionError) as problem:
        raise StoreError(f"{os.fspath(path)}: the header's entry {key!r} is missing or damaged") from problem


def _distinct(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split tensors into those to store, each contiguous and in its own memory, and further names for them."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        tensor = _plain(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and places.setdefault(place, name) != name:
            aliases[name] = places[place]
            continue
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        stored[name] = (
            tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
        )
        storages.add(storage)
    return stored, aliases


def _plain(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_meta:
        raise StoreError(f"{name} is on the meta device and has no values to save")
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise StoreError(f"{name} is a {type(tensor).__name__} of layout {tensor.layout}: only dense tensors are saved")
    return tensor.resolve_conj().resolve_neg()


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    _recognise(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except StoreError:
        raise
    except UNREADABLE as problem:
        raise StoreError(
            f"{os.fspath(path)} is damaged or cut short, or is no safetensors file: {problem}"
        ) from problem


def _recognise(path: str | os.PathLike[str]) -> None:
    """Refuse files that are clearly of another kind, naming the kind."""
    if Path(path).exists() and not Path(path).is_file():
        raise StoreError(f"{os.fspath(path)} is not a regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            second = file.read(1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise StoreError(f"{os.fspath(path)} cannot be read: {problem}") from problem
    if not start:
        raise StoreError(f"{os.fspath(path)} is empty")
    for magic, kind in FOREIGN:
        # A safetensors file starts with a length and then a brace: with a brace it may be one after all.
        if start.startswith(magic) and second != b"{":
            raise StoreError(
                f"{os.fspath(path)} is {kind}, which could run code when opened: Rankfold reads safetensors files only"
            )


def _aliases(path: str | os.PathLike[str], text: str, stored: Mapping[str, Tensor]) -> dict[str, str]:
    aliases = json_text(path, {ALIASES: text}, ALIASES)
    valid = isinstance(aliases, dict) and all(
        name not in stored and isinstance(target, str) and target in stored for name, target in aliases.items()
    )
    if not valid:
        raise StoreError(f"{os.fspath(path)}: the header's table of tied weights does not fit its tensors")
    return {name: str(target) for name, target in aliases.items()}
