"""The data half of common.py: long tails, reading and checking files, and the loader."""

import hashlib
import itertools
import os
import pickle
import shutil
import struct
import urllib.error
import urllib.request
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

import common
from common import SPECS, Batches, load_dataset, long_tail_counts, long_tail_subset, split_evenly


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test of this file can reach a network, even by mistake."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# %% Long tails


@pytest.mark.parametrize(
    "K, n_max, published",
    [
        (100, 500, {10: 19573, 50: 12608, 100: 10847, 200: 9502}),  # CIFAR-100-LT
        (10, 5000, {10: 20431, 50: 13996, 100: 12406, 200: 11203}),  # CIFAR-10-LT
    ],
)
def test_exponential_profile_has_the_published_totals(K, n_max, published):
    for imbalance, total in published.items():
        counts = long_tail_counts(K, n_max, imbalance)
        assert sum(counts) == total
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == n_max
        assert counts[-1] == n_max // imbalance


def test_step_profile_cuts_the_second_half():
    assert long_tail_counts(4, 500, 10, "step") == [500, 500, 50, 50]
    assert long_tail_counts(5, 500, 10, "step") == [500, 500, 500, 50, 50]


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_profiles_at_their_ends(profile):
    assert long_tail_counts(3, 7, 1, profile) == [7, 7, 7]  # balanced
    assert min(long_tail_counts(10, 5, 1000, profile)) == 1  # no class is left empty
    assert long_tail_counts(1, 7, 1, profile) == [7]  # K - 1 = 0 does not divide


@pytest.mark.parametrize("imbalance", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_impossible_imbalance(imbalance, user_error):
    with user_error(f"--imbalance {imbalance:g}"):
        long_tail_counts(10, 500, imbalance)


def test_unknown_profile(user_error):
    with user_error("--profile linear", "exp", "step"):
        long_tail_counts(10, 500, 10, "linear")


def shuffled_labels(sizes: list[int], seed: int = 0) -> torch.Tensor:
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return y[torch.randperm(len(y), generator=generator(seed))]


def test_subset_takes_each_class_its_quota_and_no_image_twice():
    y = shuffled_labels([80] * 5)
    subset = long_tail_subset(y, 5, 16)
    assert torch.bincount(y[subset], minlength=5).tolist() == [80, 40, 20, 10, 5]  # halves: 16^(1/4) = 2
    assert len(subset.unique()) == len(subset)
    assert y[subset].equal(y[subset].sort().values)  # class by class


def test_short_class_gives_all_it_has_and_no_label_slides():
    """SVHN: class 0 has fewer images than N / K. Cutting a label-sorted array at the quotas' running sums, as
    published code does, would then give every later class some images of its neighbour."""
    y = shuffled_labels([20, 110, 90, 80, 100])  # N / K = 80
    subset = long_tail_subset(y, 5, 16, by_count=False)
    assert torch.bincount(y[subset], minlength=5).tolist() == [20, 40, 20, 10, 5]


def test_n_max_is_a_fraction_where_the_classes_are_uneven():
    """SVHN's 73,257 images: int(7325.7 (1/IF)^(k/9)), as published code has it, not int(7325 ...)."""
    sizes = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]
    y = torch.arange(10).repeat_interleave(torch.tensor(sizes))
    found = torch.bincount(y[long_tail_subset(y, 10, 100, by_count=False)])
    expected = [min(n, int(7325.7 * 0.01 ** (k / 9))) for k, n in enumerate(sizes)]
    assert found.tolist() == expected
    assert expected != [min(n, int(7325 * 0.01 ** (k / 9))) for k, n in enumerate(sizes)]


def test_the_head_of_a_folder_is_its_largest_class():
    y = shuffled_labels([5, 60, 61, 59])
    counts = torch.bincount(y[long_tail_subset(y, 4, 10)])
    assert counts.argmax() == 2 and counts[0] == min(5, int(185 / 4 / 10)) == 4


def test_subset_draws_nothing_from_the_global_generator():
    y = shuffled_labels([50] * 4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = long_tail_subset(y, 4, 10)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert long_tail_subset(y, 4, 10).equal(first)


@given(n=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_keep_per_class_keeps_some_of_every_class(n, sizes):
    y = shuffled_labels(sizes)
    keep = common.keep_per_class(y, n)
    assert torch.bincount(y[keep]).tolist() == [min(n, size) for size in sizes]
    assert keep.equal(keep.sort().values) and keep.equal(common.keep_per_class(y, n))
    assert set(keep.tolist()) <= set(common.keep_per_class(y, n + 1).tolist())  # a part of a larger one


# %% Digits and names


def pairs(x, y) -> list[tuple[bytes, int]]:
    """Images with their labels, to be compared as a multiset."""
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def test_digits_are_all_of_scikit_learns_in_two_disjoint_stratified_parts():
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    assert data.train_x.shape == (1437, 8, 8, 1) and data.test_x.shape == (360, 8, 8, 1)
    assert data.train_x.dtype == torch.uint8 and data.train_y.dtype == torch.int64
    assert data.classes == tuple("0123456789")
    assert (data.pad, data.flip) == (1, False)
    x, y = load_digits(return_X_y=True)
    whole = pairs(np.round(x.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), y)
    assert sorted(pairs(data.train_x, data.train_y) + pairs(data.test_x, data.test_y)) == whole
    share = np.bincount(y) * 360 / 1797
    assert np.abs(torch.bincount(data.test_y).numpy() - share).max() < 1
    assert data.counts.tolist() == (np.bincount(y) - torch.bincount(data.test_y).numpy()).tolist()


def test_digits_are_split_the_same_way_every_time():
    np.random.seed(1)  # noqa: NPY002 the global state is what must not matter
    first = load_dataset("digits")
    np.random.seed(2)  # noqa: NPY002
    again = load_dataset("digits")
    assert again.train_x.equal(first.train_x) and again.test_y.equal(first.test_y)


def test_long_tailed_digits():
    full, tail = load_dataset("digits"), load_dataset("digitslt", imbalance=10)
    quotas = long_tail_counts(10, 143.7, 10)
    assert full.counts[0] < quotas[0]  # digit 0 is rarer than the average: it gives all it has
    assert tail.counts.tolist() == [full.counts[0], *quotas[1:]]
    assert set(pairs(tail.train_x, tail.train_y)) <= set(pairs(full.train_x, full.train_y))
    assert tail.test_x.equal(full.test_x)  # only training gets a tail
    assert tail.mean.equal(full.mean) and tail.std.equal(full.std)  # and it does not move the statistics
    assert load_dataset("digitslt", imbalance=10).train_x.equal(tail.train_x)  # the same images every time
    step = load_dataset("digitslt", imbalance=10, profile="step")
    assert step.counts[5:].tolist() == [14] * 5


@pytest.mark.parametrize("name", ["imagenet", "CIFAR10", "lt", "", "folder", "folderlt", "digits:here"])
def test_unknown_name(name, user_error):
    with user_error(f"--dataset {name}: unknown", "cifar100", "folder:PATH"):
        load_dataset(name)


def test_channel_statistics_are_numpys_over_all_pixels():
    rng = np.random.default_rng(0)
    # more than two chunks of 1,000
    images = np.stack([rng.integers(a, b, (2009, 6, 5)) for a, b in [(0, 256), (200, 256), (0, 3)]], axis=-1)
    mean, std = common._channel_statistics(torch.from_numpy(images.astype(np.uint8)))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-5)


def test_constant_channel_has_a_std_to_divide_by():
    mean, std = common._channel_statistics(torch.full((2, 3, 3, 1), 51, dtype=torch.uint8))
    assert mean.item() == pytest.approx(0.2)
    assert std.item() > 0


# %% The npz cache


def good_arrays(name: str = "mnist", n_train: int = 23, n_test: int = 11) -> dict[str, np.ndarray]:
    """Random images of the right shape. Labels go round all classes, last class first."""
    rng = np.random.default_rng(0)
    K, shape, *_ = SPECS[name]
    n_train = max(n_train, K)
    arrays = {"classes": np.array([f"class {k}" for k in range(K)])}
    for split, n in ("train", n_train), ("test", n_test):
        arrays[f"{split}_x"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_y"] = (K - 1 - np.arange(n)) % K
    return arrays


def assert_holds(data: common.Dataset, arrays: dict[str, np.ndarray]) -> None:
    for split in ("train", "test"):
        x, y = getattr(data, f"{split}_x"), getattr(data, f"{split}_y")
        assert x.dtype == torch.uint8 and y.dtype == torch.int64
        np.testing.assert_array_equal(x, arrays[f"{split}_x"])
        np.testing.assert_array_equal(y, arrays[f"{split}_y"])
    assert data.classes == tuple(arrays["classes"])


def test_cache_is_read_back(tmp_path):
    arrays = good_arrays()
    np.savez(tmp_path / "mnist.npz", **arrays)
    assert_holds(load_dataset("mnist", tmp_path), arrays)
    assert [path.name for path in tmp_path.iterdir()] == ["mnist.npz"]


def test_cache_may_be_compressed_and_have_small_labels(tmp_path):
    arrays = good_arrays()
    small = {key: a.astype(np.uint8) if key.endswith("_y") else a for key, a in arrays.items()}
    np.savez_compressed(tmp_path / "mnist.npz", **small)
    assert_holds(load_dataset("mnist", tmp_path), arrays)


WRONG_ARRAYS = {
    "float images": lambda a: a.update(train_x=a["train_x"].astype(np.float32)),
    "no channel axis": lambda a: a.update(test_x=a["test_x"][..., 0]),
    "channels first": lambda a: a.update(train_x=a["train_x"].transpose(0, 3, 1, 2)),
    "images of another size": lambda a: a.update(test_x=a["test_x"][:, :27]),
    "one image without its axis": lambda a: a.update(train_x=a["train_x"][0]),
    "no image": lambda a: a.update(test_x=a["test_x"][:0], test_y=a["test_y"][:0]),
    "nine classes": lambda a: a.update(classes=a["classes"][:9]),
    "classes as one word": lambda a: a.update(classes=np.array("classes")),
    "classes in a table": lambda a: a.update(classes=np.array([a["classes"]] * 10)),
    "a label too large": lambda a: a["test_y"].__setitem__(0, 10),
    "a label below 0": lambda a: a["train_y"].__setitem__(-1, -1),
    "fewer labels than images": lambda a: a.update(train_y=a["train_y"][:-1]),
    "labels in columns": lambda a: a.update(test_y=a["test_y"][:, None]),
    "float labels": lambda a: a.update(test_y=a["test_y"].astype(np.float64)),
    **{f"no {key}": lambda a, key=key: a.pop(key) for key in good_arrays()},
}


@pytest.mark.parametrize("spoil", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
def test_cache_with_a_wrong_array(spoil, tmp_path, user_error):
    arrays = good_arrays()
    spoil(arrays)
    np.savez(tmp_path / "mnist.npz", **arrays)
    with user_error(tmp_path / "mnist.npz", "delete"):
        load_dataset("mnist", tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the pixels: only the checksum can tell
    path.write_bytes(content)


def replace_by_text(path):
    path.write_text("<html>404: no such data set</html>")


def replace_by_one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def replace_member(content: bytes):
    def spoil(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("train_x.npy", content)

    return spoil


def array_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def set_in_zip_headers(local: int, central: int, value: int):
    """Overwrite a byte of the first member's two headers, at these offsets."""

    def spoil(path):
        content = bytearray(path.read_bytes())
        content[local] = content[content.find(b"PK\x01\x02") + central] = value
        path.write_bytes(content)

    return spoil


DAMAGE = {
    "truncated": truncate,
    "one byte wrong": flip_a_byte,
    "empty": lambda path: path.write_bytes(b""),
    "not a zip": replace_by_text,
    "npy, not npz": replace_by_one_array,
    "member that is no array": replace_member(b"hello"),
    "array header broken off": replace_member(array_header("{'descr': '|u1', 'shape': (")),
    "array of terabytes": replace_member(
        array_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 28, 28, 1)}\n")
    ),
    "unknown compression": set_in_zip_headers(8, 10, 99),
    "encrypted": set_in_zip_headers(6, 8, 1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_cache(damage, tmp_path, user_error):
    np.savez(tmp_path / "mnist.npz", **good_arrays())
    damage(tmp_path / "mnist.npz")
    with user_error(tmp_path / "mnist.npz", "delete"):
        load_dataset("mnist", tmp_path)


class Trap:
    """Unpickling this creates the file `marker`: it stands for any code a stranger's pickle may run."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickle_inside_the_cache_is_not_opened(tmp_path, user_error):
    cache, marker = tmp_path / "mnist.npz", tmp_path / "marker"
    np.savez(cache, **{**good_arrays(), "classes": np.array([Trap(marker)] * 10, dtype=object)})
    with user_error(cache):
        load_dataset("mnist", tmp_path)
    assert not marker.exists()
    with np.load(cache, allow_pickle=True) as file:  # the trap is real
        _ = file["classes"]
    assert marker.exists()


# %% Data sets through torchvision, from files in their own layout


def md5(path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_idx(path, array) -> None:
    """MNIST's format: 0, 0, type (8: uint8), number of axes, the axes as big-endian int32, the bytes."""
    axes = struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + axes + array.astype(np.uint8).tobytes())


def write_mnist(data_dir, arrays, monkeypatch, name="MNIST"):
    raw = data_dir / name / "raw"
    raw.mkdir(parents=True)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", arrays[f"{split}_x"][..., 0])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", arrays[f"{split}_y"])
    return getattr(datasets, name).classes


def write_fashionmnist(data_dir, arrays, monkeypatch):
    return write_mnist(data_dir, arrays, monkeypatch, "FashionMNIST")


def write_svhn(data_dir, arrays, monkeypatch):
    """MATLAB: images (H, W, C, N), labels (N, 1) from 1 to 10, where 10 is the digit 0."""
    from scipy.io import savemat

    sums = {}
    for split in ("train", "test"):
        x, y = arrays[f"{split}_x"], arrays[f"{split}_y"]
        path = data_dir / f"{split}_32x32.mat"
        savemat(path, {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y)[:, None].astype(np.uint8)})
        sums[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return list("0123456789")


def write_stl10(data_dir, arrays, monkeypatch):
    """Raw bytes, each image channel by channel and column by column; labels from 1."""
    base = data_dir / "stl10_binary"
    base.mkdir()
    (base / "unlabeled_X.bin").write_bytes(b"")
    for split in ("train", "test"):
        arrays[f"{split}_x"].transpose(0, 3, 2, 1).tofile(base / f"{split}_X.bin")
        (arrays[f"{split}_y"] + 1).astype(np.uint8).tofile(base / f"{split}_y.bin")
    (base / "class_names.txt").write_text("\n".join(arrays["classes"]))
    for files in "train_list", "test_list":
        sums = [[file, md5(base / file)] for file, _ in getattr(datasets.STL10, files)]
        monkeypatch.setattr(datasets.STL10, files, sums)
    return arrays["classes"]


def write_cifar(data_dir, arrays, monkeypatch, kind=datasets.CIFAR10, labels="labels", extra=()):
    """Pickled dictionaries; an image is 3072 bytes, channel by channel."""
    base = data_dir / kind.base_folder
    base.mkdir()

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, md5(base / file)]

    for split in ("train", "test"):
        files = [file for file, _ in getattr(kind, f"{split}_list")]
        flat = arrays[f"{split}_x"].transpose(0, 3, 1, 2).reshape(-1, 3072)
        parts = zip(
            files,
            np.array_split(flat, len(files)),
            np.array_split(arrays[f"{split}_y"], len(files)),
            strict=True,
        )
        sums = [
            write(file, {"data": x, labels: y.tolist(), **{key: [0] * len(y) for key in extra}})
            for file, x, y in parts
        ]
        monkeypatch.setattr(kind, f"{split}_list", sums)
    file, key = kind.meta["filename"], kind.meta["key"]
    file, checksum = write(file, {key: list(arrays["classes"])})
    monkeypatch.setattr(kind, "meta", {"filename": file, "key": key, "md5": checksum})
    return arrays["classes"]


def write_cifar100(data_dir, arrays, monkeypatch):
    return write_cifar(data_dir, arrays, monkeypatch, datasets.CIFAR100, "fine_labels", ["coarse_labels"])


WRITERS = {
    "mnist": write_mnist,
    "fashionmnist": write_fashionmnist,
    "svhn": write_svhn,
    "stl10": write_stl10,
    "cifar10": write_cifar,
    "cifar100": write_cifar100,
}


@pytest.mark.parametrize("name", WRITERS)
def test_torchvisions_files_are_read_and_kept(name, tmp_path, monkeypatch):
    arrays = good_arrays(name)
    originals = tmp_path / "originals"
    originals.mkdir()
    expected = {**arrays, "classes": WRITERS[name](originals, arrays, monkeypatch)}
    assert_holds(load_dataset(name, originals), expected)

    # from now on the npz alone is enough: no original, no network
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(originals / f"{name}.npz", elsewhere)
    assert_holds(load_dataset(name, elsewhere), expected)
    assert [path.name for path in elsewhere.iterdir()] == [f"{name}.npz"]


@pytest.mark.parametrize("name", WRITERS)
def test_neither_file_nor_network(name, tmp_path, user_error):
    with user_error(f"--dataset {name}", tmp_path / f"{name}.npz", "network"):
        load_dataset(name, tmp_path)
    assert not (tmp_path / f"{name}.npz").exists()


def test_a_downloads_whole_reason_is_said_in_one_line(tmp_path, user_error, monkeypatch):
    def refuse(self):
        raise RuntimeError("Error downloading x.gz:\nTried https://a.example/\nHTTP Error 403: Forbidden")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    with user_error("--dataset mnist", "Error downloading x.gz", "https://a.example/", "403: Forbidden"):
        load_dataset("mnist", tmp_path)


def test_two_programs_that_keep_the_same_data_at_once(tmp_path, monkeypatch):
    """Two seeds started together: the one must not rename what the other is still writing."""
    arrays = good_arrays()
    expected = {**arrays, "classes": write_mnist(tmp_path, arrays, monkeypatch)}
    savez = np.savez

    def slow_savez(part, **arrays):
        part.write_bytes(b"begun")
        with monkeypatch.context() as patch:  # meanwhile, in the other process
            patch.setattr(np, "savez", savez)
            patch.setattr(os, "getpid", lambda: 1)
            assert_holds(load_dataset("mnist", tmp_path), expected)
        assert part.read_bytes() == b"begun"
        savez(part, **arrays)

    monkeypatch.setattr(np, "savez", slow_savez)
    assert_holds(load_dataset("mnist", tmp_path), expected)
    assert_holds(load_dataset("mnist", tmp_path), expected)


def test_torchvisions_messages_are_no_output_of_ours(tmp_path, monkeypatch, capsys):
    write_mnist(tmp_path, good_arrays(), monkeypatch)
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: print("Downloading ..."))
    load_dataset("mnist", tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and "Downloading ..." in err


@pytest.mark.parametrize("length", [0, 3, 10, 100])
def test_interrupted_extraction(length, tmp_path, user_error, monkeypatch):
    """torchvision checks the archives' MD5, but of the extracted IDX files only that they are there."""
    write_mnist(tmp_path, good_arrays(), monkeypatch)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:length])
    with user_error("mnist", tmp_path):
        load_dataset("mnist", tmp_path)
    assert not (tmp_path / "mnist.npz").exists()


def test_what_torchvision_gives_is_checked_before_it_is_kept(tmp_path, user_error, monkeypatch):
    arrays = good_arrays()
    arrays["train_y"] = arrays["train_y"][:-1]
    write_mnist(tmp_path, arrays, monkeypatch)
    with user_error("mnist", "train_y", tmp_path):
        load_dataset("mnist", tmp_path)
    assert not (tmp_path / "mnist.npz").exists()


def test_data_dir_is_a_file(tmp_path, user_error):
    (tmp_path / "data").write_text("")
    with user_error("--dataset mnist", tmp_path / "data"):
        load_dataset("mnist", tmp_path / "data")


# %% Folders of images


def save_image(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def flat(height: int, width: int, *colour: int) -> np.ndarray:
    return (
        np.full((height, width, len(colour)), colour) if len(colour) > 1 else np.full((height, width), colour)
    )


@pytest.fixture
def tree(tmp_path):
    """PATH/train and PATH/test with classes cat and dog: flat images of every shape and mode."""
    path = tmp_path / "pets"
    save_image(path / "train" / "cat" / "1.png", flat(20, 12, 10, 20, 30))  # tall
    save_image(path / "train" / "cat" / "2.png", flat(9, 31, 40))  # wide, grayscale
    save_image(path / "train" / "dog" / "1.png", flat(4, 4, 50, 60, 70, 255))  # smaller than asked for, RGBA
    save_image(path / "test" / "cat" / "1.png", flat(8, 8, 80, 90, 100))
    save_image(path / "test" / "dog" / "1.png", flat(8, 8, 110, 120, 130))
    return path


def test_folder_of_images(tree):
    data = load_dataset(f"folder:{tree}", image_size=8)
    assert data.classes == ("cat", "dog")
    assert data.train_x.shape == (3, 8, 8, 3) and data.test_x.shape == (2, 8, 8, 3)
    assert data.train_y.tolist() == [0, 0, 1] and data.test_y.tolist() == [0, 1]
    colours = [[10, 20, 30], [40, 40, 40], [50, 60, 70], [80, 90, 100], [110, 120, 130]]
    images = torch.cat([data.train_x, data.test_x])
    assert images.equal(torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(5, 8, 8, 3))
    assert (data.pad, data.flip) == (1, True)


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("upright", [True, False])
def test_folder_images_are_resized_by_the_short_side_and_cut_in_the_middle(tree, scale, upright):
    stripes = np.concatenate([flat(8, 8, 255, 0, 0), flat(8, 8, 0, 255, 0), flat(8, 8, 0, 0, 255)], axis=1)
    stripes = stripes.repeat(scale, 0).repeat(scale, 1)
    save_image(tree / "train" / "cat" / "1.png", stripes.transpose(1, 0, 2) if upright else stripes)
    image = load_dataset(f"folder:{tree}", image_size=8).train_x[0]
    assert image[2:6, 2:6].equal(torch.tensor([0, 255, 0], dtype=torch.uint8).expand(4, 4, 3))
    assert (image[..., 1] > 150).all()  # resizing blurs the outermost pixels, but green they all are


def test_long_tailed_folder(tree):
    for k, name in enumerate(["cat", "dog"]):
        for i in range(8):
            save_image(tree / "train" / name / f"{i}.png", flat(8, 8, 100 * k + i, 0, 0))
    data = load_dataset(f"folderlt:{tree}", image_size=8, imbalance=4)
    assert data.counts.tolist() == [8, 2]
    assert ((data.train_x[:, 0, 0, 0] >= 100) == data.train_y).all()  # images went with their labels


def test_folder_with_other_classes_in_test(tree, user_error):
    (tree / "test" / "dog").rename(tree / "test" / "wolf")
    with user_error("--dataset folder:", tree, "different classes"):
        load_dataset(f"folder:{tree}")


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_with_an_empty_class(split, tree, user_error):
    (tree / split / "emu").mkdir()
    with user_error("--dataset folder:", tree, "emu"):
        load_dataset(f"folder:{tree}")


@pytest.mark.parametrize("missing", ["train", "test", "."])
def test_folder_without_a_split(missing, tree, user_error):
    shutil.rmtree(tree / missing)
    with user_error("--dataset folder:", tree, "CLASS/IMAGE"):
        load_dataset(f"folder:{tree}")


def break_a_later_chunk(path):
    """A PNG whose header and first pixels are right: Pillow reports what follows as a SyntaxError."""
    save_image(path, np.random.default_rng(0).integers(0, 256, (200, 200, 3)))
    content = path.read_bytes()
    second = content.find(b"IDAT", content.find(b"IDAT") + 1)
    path.write_bytes(content[:second] + bytes(4) + content[second + 4 :])


def claim_a_huge_size(path):
    """A PNG of a few bytes that says it has 1.6 billion pixels: Pillow calls it a decompression bomb."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">ii", 40000, 40000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BROKEN_IMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "broken chunk": break_a_later_chunk,
    "bomb": claim_a_huge_size,
}


@pytest.mark.parametrize("damage", BROKEN_IMAGES.values(), ids=BROKEN_IMAGES.keys())
def test_folder_with_a_broken_image(damage, tree, user_error):
    path = tree / "train" / "dog" / "1.png"
    damage(path)
    with user_error(path):
        load_dataset(f"folder:{tree}")


# %% Batches


def random_images(N: int, H: int, W: int, C: int) -> torch.Tensor:
    return torch.randint(256, (N, H, W, C), generator=generator(0)).to(torch.uint8)


MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])


def loader(images: torch.Tensor, **options) -> Batches:
    C = images.shape[3]
    return Batches(images, MEAN[:C], STD[:C], **options)


def by_torchvision(image: torch.Tensor, pad: int, top: int, left: int, mirror: bool) -> torch.Tensor:
    """One (H, W, C) image the usual way: pad, crop, flip, normalise."""
    H, W, C = image.shape
    x = TF.crop(TF.pad(image.permute(2, 0, 1), [pad] * 4), top, left, H, W)
    x = TF.hflip(x) if mirror else x
    return TF.normalize(x.float() / 255, MEAN[:C].tolist(), STD[:C].tolist())


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("pad", [0, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_each_loaded_image_is_torchvisions(C, pad, flip):
    """Every crop and flip as drawn on the CPU: all tops and lefts of a column at once, then the mirrors."""
    images = random_images(6, 5, 7, C)
    index = torch.randint(6, (60, 2), generator=generator(1))
    batches = list(loader(images, pad=pad, flip=flip).epoch(index, 25, generator(2)))
    drawn = generator(2)
    for column in range(2):
        top, left = torch.randint(2 * pad + 1, (2, 60), generator=drawn).tolist()
        mirror = (torch.rand(60, generator=drawn) < (0.5 if flip else 0.0)).tolist()
        views = zip(index[:, column], top, left, mirror, strict=True)
        expected = torch.stack([by_torchvision(images[i], pad, t, s, m) for i, t, s, m in views])
        x = torch.cat([batch[1 + column] for batch in batches])
        assert x.shape == (60, C, 5, 7) and x.dtype == torch.float32
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5, check_stride=False)
    assert [part for part, *_ in batches] == split_evenly(60, 25)


def test_all_crops_are_drawn_at_the_call():
    images = loader(random_images(5, 6, 6, 1), pad=2, flip=True)
    one = generator(3)
    epoch = images.epoch(torch.arange(5), 2, one)
    state = one.get_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = torch.cat([x for _, x in epoch])
    assert one.get_state().equal(state) and torch.get_rng_state().equal(before)
    again = torch.cat([x for _, x in images.epoch(torch.arange(5), 5, generator(3))])
    assert first.equal(again)  # whatever the batches
    other = torch.cat([x for _, x in images.epoch(torch.arange(5), 5, generator(4))])
    assert not first.equal(other)


@pytest.mark.parametrize("C", [1, 3])
def test_evaluation_gives_the_plain_images_in_order(C):
    images = random_images(4, 5, 7, C)
    batches = loader(images, pad=2, flip=True)
    plain = torch.stack([by_torchvision(image, 0, 0, 0, False) for image in images])
    for found in (batches.load(torch.arange(4)), torch.cat([x for _, x in batches.all(3)])):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5, check_stride=False)
    assert batches.load(torch.arange(4), generator(0)).is_contiguous(memory_format=torch.channels_last)


def test_each_draw_of_an_image_is_a_view_of_its_own():
    batches = loader(random_images(1, 8, 8, 3), pad=4, flip=True)
    x = batches.load(torch.zeros(300, dtype=torch.long), generator(0))
    # 300 draws from 81 crops x 2: 162 (1 - (1 - 1/162)^300) = 136.7 of them are expected to be seen
    assert 110 < len(torch.unique(x.flatten(1), dim=0)) <= 162


def test_views_are_uniform_over_all_offsets_and_mirrors():
    pad, T = 2, 20_000
    images = loader(random_images(1, 6, 6, 1), pad=pad, flip=True)
    x = images.load(torch.zeros(T, dtype=torch.long), generator(0))
    _, seen = torch.unique(x.flatten(1), dim=0, return_counts=True)
    assert len(seen) == 2 * (2 * pad + 1) ** 2
    expected = T / len(seen)
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    freedom = len(seen) - 1
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5  # chi-square: mean f, variance 2f


@pytest.mark.parametrize("T, batch_size, ranks", [(349, 32, 2), (100, 7, 3), (5, 4, 2)])
def test_every_rank_has_an_equal_share_of_each_batch(T, batch_size, ranks, monkeypatch):
    images = random_images(1, 4, 4, 1)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(common, "ranks", lambda rank=rank: (rank, ranks))
        epoch = loader(images).epoch(torch.zeros(T, dtype=torch.long), batch_size, generator(0))
        shares.append([part for part, _ in epoch])
    for batch in zip(*shares, strict=True):
        assert len({part.stop - part.start for part in batch}) == 1
        assert all(a.stop == b.start for a, b in itertools.pairwise(batch))
    covered = [i for share in zip(*shares, strict=True) for part in share for i in range(T)[part]]
    assert covered == list(range(T - T % ranks))


@given(T=st.integers(1, 3000), batch_size=st.integers(1, 300))
def test_even_batches_cover_everything_once(T, batch_size):
    parts = split_evenly(T, batch_size)
    assert [i for part in parts for i in range(T)[part]] == list(range(T))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == -(-T // batch_size)
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch_size
    if T > 1 and batch_size > 2:  # (three in batches of at most two: no way but 2 and 1)
        assert min(sizes) > 1


# %% Fingerprints, and folders as they lie about


def test_a_fingerprint_changes_with_an_image_a_label_and_a_name(tmp_path):
    arrays = good_arrays()
    images = arrays["train_x"].copy()
    images[5, 0, 0] += 1
    changed = {
        "nothing": {},
        "an image": {"train_x": images},
        "a test image": {"test_x": arrays["test_x"][::-1]},
        "a label": {"train_y": np.roll(arrays["train_y"], 1)},
        "a name": {"classes": np.array([f"kind {k}" for k in range(10)])},
    }
    found = {}
    for what, content in changed.items():
        (tmp_path / what).mkdir()
        np.savez(tmp_path / what / "mnist.npz", **arrays | content)
        found[what] = load_dataset("mnist", tmp_path / what).fingerprint
    assert len(set(found.values())) == len(changed)
    assert load_dataset("mnist", tmp_path / "nothing").fingerprint == found["nothing"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_fingerprint_changes_with_a_folders_files(streamed, tree, monkeypatch):
    if streamed:
        monkeypatch.setattr(common, "_FOLDER_LIMIT", 0)
    before = load_dataset(f"folder:{tree}").fingerprint
    assert load_dataset(f"folder:{tree}").fingerprint == before
    save_image(next((tree / "train").iterdir()) / "another.png", flat(5, 5, 1, 2, 3))
    assert load_dataset(f"folder:{tree}").fingerprint != before


def ramp(top: float, dtype) -> Image.Image:
    return Image.fromarray((np.arange(64).reshape(8, 8) / 63 * top).astype(dtype))


@pytest.mark.parametrize("top, dtype, suffix", [(65535, np.uint16, "png"), (1, np.float32, "tif")])
def test_images_of_more_than_8_bits_are_scaled(top, dtype, suffix, tree):
    path = next((tree / "train").iterdir()) / f"0.{suffix}"
    ramp(top, dtype).save(path)
    found = common._read_image(str(path), 8)
    expected = np.round(np.arange(64).reshape(8, 8) / 63 * 255)
    assert abs(found[..., 0].astype(float) - expected).max() <= 1 and found.max() == 255


def test_a_float_image_of_unknown_range_is_refused(tree, user_error):
    path = next((tree / "train").iterdir()) / "0.tif"
    ramp(300, np.float32).save(path)
    with user_error(path, "0 to 300"):
        load_dataset(f"folder:{tree}")


def test_exif_turns_an_image_and_transparency_is_white(tmp_path):
    upper = np.zeros((8, 8, 3), np.uint8)
    upper[:4] = 200
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(upper).save(tmp_path / "turned.png", exif=exif)
    assert common._read_image(str(tmp_path / "turned.png"), 8)[:, 0, 0].tolist() == [0] * 4 + [200] * 4
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (common._read_image(str(tmp_path / "clear.png"), 8) == 255).all()


def test_what_is_no_image_of_a_class_is_left_out_and_named_once(tree, capsys):
    classes = load_dataset(f"folder:{tree}").classes
    n = len(load_dataset(f"folder:{tree}").train_y)
    capsys.readouterr()
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    save_image(tree / "train" / ".ipynb_checkpoints" / "0.png", flat(5, 5, 1, 2, 3))
    where = tree / "train" / classes[0]
    (where / "notes.txt").write_text("no image")
    (where / "all").symlink_to(tree)  # a link to an ancestor
    Image.new("RGB", (6, 6), (9, 9, 9)).save(where / "photo.jfif", "JPEG")
    data = load_dataset(f"folder:{tree}")
    assert data.classes == classes and len(data.train_y) == n + 1  # the .jfif is read
    (line,) = capsys.readouterr().err.splitlines()
    assert "left out" in line and ".txt" in line and ".ipynb_checkpoints/" in line and "all/" in line


def test_a_flat_folder_is_split_by_class(tmp_path, user_error, capsys):
    for k, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        for i in range(10):
            save_image(tmp_path / name / f"{i}.png", flat(5, 5, 20 * i, 100 * k, 7))
    with user_error("--test-share 0.2"):
        load_dataset(f"folder:{tmp_path}")
    data = load_dataset(f"folder:{tmp_path}", test_share=0.2)
    assert data.counts.tolist() == [8, 8] and torch.bincount(data.test_y).tolist() == [2, 2]
    assert "4 of 20 images" in capsys.readouterr().err
    seen = {x.numpy().tobytes() for x in torch.cat([data.train_x, data.test_x])}
    assert len(seen) == 20  # no image is in both
    assert load_dataset(f"folder:{tmp_path}", test_share=0.2).test_x.equal(data.test_x)


def test_a_long_tail_of_uneven_classes_says_its_ratio(tmp_path, capsys):
    for split, sizes in (("train", (5, 60, 60, 60)), ("test", (1, 1, 1, 1))):
        for k, n in enumerate(sizes):
            (tmp_path / split / f"c{k}").mkdir(parents=True)
            for i in range(n):
                save_image(tmp_path / split / f"c{k}" / f"{i}.png", flat(4, 4, i, k, 0))
    data = load_dataset(f"folderlt:{tmp_path}", imbalance=100, image_size=4)
    counts = data.counts
    assert counts.argmax() == 1  # the largest class is the head
    assert f"a ratio of {counts.max() / counts.min():.4g}, not 100" in capsys.readouterr().err


def test_one_class_and_a_class_without_images_are_refused(tmp_path, tree, user_error):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for split in ("train", "test"):
        (tmp_path / "one" / split / "only").mkdir(parents=True)
        shutil.copy(tmp_path / "x.png", tmp_path / "one" / split / "only")
    with user_error("only", "two classes"):
        load_dataset(f"folder:{tmp_path / 'one'}")
    arrays = good_arrays()
    np.savez(tmp_path / "mnist.npz", **arrays | {"train_y": np.zeros_like(arrays["train_y"])})
    with user_error("--dataset mnist", "class 1", "no training image"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("name, expected", [
    ("digitslt", ("digits", True, "")),
    ("cifar100", ("cifar100", False, "")),
    ("folderlt:a/b", ("folder", True, "a/b")),
])  # fmt: skip
def test_a_name_is_split_in_one_place(name, expected):
    assert common.split_name(name) == expected


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.split_name("folder:~/x") == ("folder", False, str(tmp_path / "x"))
    np.savez(tmp_path / "mnist.npz", **good_arrays())
    assert len(load_dataset("mnist", "~").train_y) == 23


def test_kerass_mnist_and_names_as_bytes(tmp_path):
    arrays = good_arrays()
    keys = {"train_x": "x_train", "train_y": "y_train", "test_x": "x_test", "test_y": "y_test"}
    np.savez(tmp_path / "mnist.npz", **{ours: arrays[key].squeeze() for key, ours in keys.items()})
    data = load_dataset("mnist", tmp_path)
    assert data.train_x.equal(torch.from_numpy(arrays["train_x"])) and data.classes == tuple("0123456789")
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "mnist.npz", **arrays | {"classes": np.array([b"zero", *map(bytes, range(9))])})
    assert load_dataset("mnist", tmp_path / "b").classes[0] == "zero"


LIMITS = {"0::/a/b\n": "memory.max", "4:memory:/a/b\n": "memory.limit_in_bytes"}  # cgroup 2 and 1


@pytest.mark.parametrize("line, name", LIMITS.items())
def test_a_containers_memory_limit_is_seen(line, name, tmp_path):
    (tmp_path / "cgroup").write_text(line)
    kind = "" if line.startswith("0") else "memory"
    where = tmp_path / "limits" / kind / "a"
    where.mkdir(parents=True)
    (where / name).write_text(f"{2**27}\n")  # of the group above ours
    assert common._memory(str(tmp_path / "cgroup"), str(tmp_path / "limits")) == 2**27
    assert common._memory(str(tmp_path / "cgroup"), str(tmp_path / "nothing")) > 2**27
