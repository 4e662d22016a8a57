"""Do the reproductions find their data, in which order, and do they refuse what is not the data?"""

import gzip
import hashlib
import importlib.util
import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

SOURCE = Path(__file__).parent.parent / "reproduce" / "datasets.py"


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The module, with empty places to look in and no address that leads anywhere."""
    spec = importlib.util.spec_from_file_location("reproduce_datasets", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setenv("RANKFOLD_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(module, "_cache_folder", lambda: tmp_path / "cache")
    for name in (
        "MNIST_URL",
        "FASHION_URL",
        "CIFAR10_URL",
        "RESNET20_URL",
        "MINILM_URL",
        "STSB_URL",
        "SHAKESPEARE_URL",
    ):
        monkeypatch.setattr(module, name, (tmp_path / "nowhere").as_uri() + "/")
    monkeypatch.setattr(module, "FASHION_SYSTEM", tmp_path / "system")
    monkeypatch.setattr(module, "MINILM_PACKAGE", "no_such_package")
    return module


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(module, folder, generator):
    """Write four made-up files into a folder; return the arrays and the digests they should have."""
    sizes = [(5, 28, 28), (5,), (3, 28, 28), (3,)]
    arrays = [generator.integers(0, 10, size) for size in sizes]
    folder.mkdir(parents=True)
    for name, array in zip(module.IDX_NAMES, arrays, strict=True):
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return arrays, tuple(hashlib.md5(idx(array)).hexdigest() for array in arrays)


def assert_idx(images, arrays):
    found = (images.train_images.squeeze(1), images.train_labels, images.test_images.squeeze(1), images.test_labels)
    for tensor, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert images.train_images.dtype == torch.uint8 and images.train_labels.dtype == torch.int64


def test_mnist_from_the_given_folder(datasets, monkeypatch, tmp_path):
    arrays, digests = write_idx(datasets, tmp_path / "data" / "mnist", np.random.default_rng(0))
    monkeypatch.setattr(datasets, "MNIST_MD5", digests)
    assert_idx(datasets.mnist(), arrays)
    assert not (tmp_path / "cache").exists()


def test_mnist_is_downloaded_into_the_cache_once(datasets, monkeypatch, tmp_path):
    arrays, digests = write_idx(datasets, tmp_path / "web", np.random.default_rng(1))
    monkeypatch.setattr(datasets, "MNIST_MD5", digests)
    monkeypatch.setattr(datasets, "MNIST_URL", (tmp_path / "web").as_uri() + "/")
    assert_idx(datasets.mnist(), arrays)
    monkeypatch.setattr(datasets, "MNIST_URL", "file:///nowhere/")
    assert_idx(datasets.mnist(), arrays)
    assert len(list((tmp_path / "cache" / "mnist").iterdir())) == 4


def test_fashion_mnist_from_the_system_package(datasets, monkeypatch, tmp_path):
    arrays, digests = write_idx(datasets, tmp_path / "system", np.random.default_rng(2))
    monkeypatch.setattr(datasets, "FASHION_MD5", digests)
    assert_idx(datasets.fashion_mnist(), arrays)


@pytest.mark.parametrize("place", ["data", "web"])
def test_another_file_is_refused(datasets, monkeypatch, tmp_path, place):
    write_idx(datasets, tmp_path / place / "mnist", np.random.default_rng(3))
    monkeypatch.setattr(datasets, "MNIST_URL", (tmp_path / "web" / "mnist").as_uri() + "/")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz has md5"):
        datasets.mnist()
    assert not (tmp_path / "cache").exists()


def test_missing_data_say_where_they_were_looked_for(datasets, tmp_path):
    with pytest.raises(FileNotFoundError, match="mnist/train-images.* is in none of") as caught:
        datasets.mnist()
    assert str(tmp_path / "data") in str(caught.value) and str(tmp_path / "cache") in str(caught.value)


def test_cifar10_from_the_binary_archive_is_cifar10_from_the_npz(datasets, monkeypatch, tmp_path):
    generator = np.random.default_rng(4)
    records = {f"data_batch_{i}.bin": generator.integers(0, 256, (4, 3073), dtype=np.uint8) for i in range(1, 6)}
    records["test_batch.bin"] = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        for name, content in records.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = content.nbytes
            tar.addfile(member, io.BytesIO(content.tobytes()))
    archive = tmp_path / "archive.tar.gz"
    monkeypatch.setattr(datasets, "CIFAR10_URL", archive.as_uri())
    monkeypatch.setattr(datasets, "CIFAR10_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets, "CIFAR10_TRAIN", 10)
    monkeypatch.setattr(datasets, "CIFAR10_TEST", 3)
    images = datasets.cifar10()
    train = np.concatenate([records[f"data_batch_{i}.bin"] for i in (1, 2, 3)])[:10]
    np.testing.assert_array_equal(images.train_images.numpy(), train[:, 1:].reshape(10, 3, 32, 32))
    np.testing.assert_array_equal(images.train_labels.numpy(), train[:, 0])
    assert images.test_images.shape == (3, 3, 32, 32) and images.test_labels.dtype == torch.int64
    with np.load(tmp_path / "cache" / "cifar10" / "cifar10.npz") as arrays:
        assert arrays["train_images"].shape == (10, 32, 32, 3)


def test_resnet20_weights_from_the_checkpoint_are_those_of_the_file(datasets, monkeypatch, tmp_path):
    state = {"conv1.weight": torch.randn(2, 3), "linear.bias": torch.randn(4)}
    checkpoint = tmp_path / "resnet20.th"
    torch.save({"best_prec1": 91.0, "state_dict": {f"module.{k}": v for k, v in state.items()}}, checkpoint)
    monkeypatch.setattr(datasets, "RESNET20_URL", checkpoint.as_uri())
    monkeypatch.setattr(datasets, "RESNET20_SHA256", hashlib.sha256(checkpoint.read_bytes()).hexdigest())
    torch.testing.assert_close(datasets.resnet20_weights(), state, rtol=0, atol=0)
    (tmp_path / "data" / "resnet20_cifar10").mkdir(parents=True)
    other = {"conv1.weight": torch.zeros(2, 3)}
    save_file(other, tmp_path / "data" / "resnet20_cifar10" / "model.safetensors")
    torch.testing.assert_close(datasets.resnet20_weights(), other, rtol=0, atol=0)


STSB = 'genre\tfile\t2012\t7\t3.500\tA "man".\tTwo men.\nnews\tfile\t2013\t8\t0\tRain\tSun\n'


def test_pairs_of_sentences_from_the_archive(datasets, monkeypatch, tmp_path):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, text in (("stsbenchmark/sts-train.csv", "other"), ("stsbenchmark/sts-dev.csv", STSB)):
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    (tmp_path / "stsb.tar.gz").write_bytes(archive.getvalue())
    monkeypatch.setattr(datasets, "STSB_URL", (tmp_path / "stsb.tar.gz").as_uri())
    with pytest.raises(ValueError, match="sts-dev.csv has sha256"):
        datasets.stsb_dev()
    monkeypatch.setattr(datasets, "STSB_SHA256", hashlib.sha256(STSB.encode()).hexdigest())
    assert datasets.stsb_dev() == [datasets.Pair('A "man".', "Two men.", 3.5), datasets.Pair("Rain", "Sun", 0.0)]


def test_files_of_the_sentence_encoder_from_its_package(datasets, monkeypatch, tmp_path):
    model = tmp_path / "made_up_package" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    for name in datasets.MINILM_SHA256:
        (model / name).write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="config.json is in none of"):
        datasets.minilm()
    monkeypatch.setattr(datasets, "MINILM_PACKAGE", "made_up_package")
    assert datasets.minilm() == {name: model / name for name in datasets.MINILM_SHA256}


def test_text_from_the_given_folder(datasets, tmp_path):
    (tmp_path / "data" / "text").mkdir(parents=True)
    (tmp_path / "data" / "text" / "tinyshakespeare.txt").write_text("First Citizen")
    assert datasets.tinyshakespeare() == "First Citizen"
