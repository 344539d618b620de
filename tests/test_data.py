"""The data part of common.py: long tails, reading and refusing files, and the loader."""

import itertools
import os
import pickle
import struct
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

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
        assert (counts[0], counts[-1]) == (n_max, n_max // imbalance)


def test_step_profile_cuts_the_second_half():
    assert long_tail_counts(4, 500, 10, "step") == [500, 500, 50, 50]
    assert long_tail_counts(5, 500, 10, "step") == [500, 500, 500, 50, 50]


@given(
    K=st.integers(1, 40),
    n_max=st.integers(1, 600),
    imbalance=st.floats(1, 1e4),
    profile=st.sampled_from(["exp", "step"]),
)
def test_a_long_tail_falls_from_n_max_and_leaves_no_class_empty(K, n_max, imbalance, profile):
    counts = long_tail_counts(K, n_max, imbalance, profile)
    assert len(counts) == K and counts[0] == n_max and counts[-1] >= 1
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("imbalance", [0.5, -1.0, float("nan"), float("inf")])
def test_impossible_imbalance(imbalance, user_error):
    with user_error(f"--imbalance {imbalance:g}"):
        long_tail_counts(10, 500, imbalance)


def shuffled_labels(sizes: list[int], seed: int = 0) -> torch.Tensor:
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return y[torch.randperm(len(y), generator=generator(seed))]


def test_subset_takes_each_class_its_quota_and_draws_nothing_from_the_global_generator():
    y = shuffled_labels([80] * 5)
    before = torch.get_rng_state()
    subset = long_tail_subset(y, 5, 16)
    assert torch.get_rng_state().equal(before)
    assert torch.bincount(y[subset], minlength=5).tolist() == [80, 40, 20, 10, 5]  # halves: 16^(1/4) = 2
    assert len(subset.unique()) == len(subset) and y[subset].equal(y[subset].sort().values)
    torch.manual_seed(2)
    assert long_tail_subset(y, 5, 16).equal(subset)


def test_short_class_gives_all_it_has_and_no_label_slides():
    """SVHN: class 0 has fewer images than N / K. Cutting a label-sorted array at the quotas' running sums, as
    published code does, would then give every later class some images of its neighbour."""
    y = shuffled_labels([20, 110, 90, 80, 100])  # N / K = 80
    subset = long_tail_subset(y, 5, 16, by_count=False)
    assert torch.bincount(y[subset], minlength=5).tolist() == [20, 40, 20, 10, 5]


def test_the_head_of_a_folder_is_its_largest_class():
    y = shuffled_labels([5, 60, 61, 59])
    counts = torch.bincount(y[long_tail_subset(y, 4, 10)])
    assert counts.argmax() == 2 and counts[0] == int(185 / 4 / 10)


@given(n=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_keep_per_class_keeps_some_of_every_class(n, sizes):
    y = shuffled_labels(sizes)
    index = common.keep_per_class(y, n)
    assert torch.bincount(y[index]).tolist() == [min(n, size) for size in sizes]
    assert index.equal(index.sort().values) and index.equal(common.keep_per_class(y, n))
    assert set(index.tolist()) <= set(common.keep_per_class(y, n + 1).tolist())  # a part of a larger one


# %% Names, digits, statistics


@pytest.mark.parametrize("name", ["imagenet", "CIFAR10", "lt", "", "folder", "folderlt", "digits:here"])
def test_unknown_name(name, user_error):
    with user_error(f"--dataset {name}: unknown", "cifar100", "folder:PATH"):
        load_dataset(name)


def test_a_name_is_split_in_one_place(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert common.split_name("digitslt") == ("digits", True, "")
    assert common.split_name("folderlt:a/b") == ("folder", True, "a/b")
    assert common.split_name("folder:~/x") == ("folder", False, "/home/me/x")


def pairs(x, y) -> list[tuple[bytes, int]]:
    """Images with their labels, to be compared as a multiset."""
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def test_digits_are_all_of_scikit_learns_in_two_disjoint_stratified_parts(user_error):
    from sklearn.datasets import load_digits

    data = load_dataset("digits")
    assert data.train_x.shape == (1437, 8, 8, 1) and data.test_x.shape == (360, 8, 8, 1)
    assert data.classes == tuple("0123456789") and (data.pad, data.flip, data.profile) == (1, False, "")
    x, y = load_digits(return_X_y=True)
    whole = pairs(np.round(x.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), y)
    assert sorted(pairs(data.train_x, data.train_y) + pairs(data.test_x, data.test_y)) == whole
    assert np.abs(torch.bincount(data.test_y).numpy() - np.bincount(y) * 360 / 1797).max() < 1
    with user_error("--test-share 0.2", "digits"):
        load_dataset("digits", test_share=0.2)


def test_long_tailed_digits():
    full, tail = load_dataset("digits"), load_dataset("digitslt", imbalance=10)
    quotas = long_tail_counts(10, 143.7, 10)
    assert full.counts[0] < quotas[0]  # digit 0 is rarer than the average: it gives all it has
    assert tail.counts.tolist() == [full.counts[0], *quotas[1:]] and tail.profile == "exp"
    assert set(pairs(tail.train_x, tail.train_y)) <= set(pairs(full.train_x, full.train_y))
    assert tail.test_x.equal(full.test_x)  # only training gets a tail
    assert tail.mean.equal(full.mean) and tail.std.equal(full.std)  # and it does not move the statistics
    step = load_dataset("digitslt", imbalance=10, profile="step")
    assert step.counts[5:].tolist() == [14] * 5 and step.profile == "step"


def test_a_part_of_the_training_images():
    data = load_dataset("digitslt", profile="step")
    part = common.keep(data, torch.tensor([7, 3]))
    assert part.train_x.equal(data.train_x[[7, 3]]) and part.train_y.equal(data.train_y[[7, 3]])
    assert part.test_x is data.test_x and part.profile == "step"
    small = common.cut_for_dry_run(data, 40)
    assert small.counts.tolist() == [min(n, 8) for n in data.counts.tolist()]
    assert torch.bincount(small.test_y).tolist() == [8] * 10


def test_groups_know_counts_and_profile(monkeypatch):
    monkeypatch.setattr(common, "shot_groups", lambda counts, profile: (counts.tolist(), profile))
    data = load_dataset("digitslt", profile="step")
    assert data.groups == (data.counts.tolist(), "step")


def test_channel_statistics_are_numpys_over_all_pixels():
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(a, b, (209, 6, 5)) for a, b in [(0, 256), (200, 256), (51, 52)]], axis=-1)
    mean, std = common._channel_statistics(torch.from_numpy(images.astype(np.uint8)))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], (images / 255).std((0, 1, 2))[:2], rtol=1e-6)
    assert std[2] == pytest.approx(1e-3)  # of a constant channel: something to divide by


# %% NAME.npz, and torchvision's files


def good_arrays(name: str = "mnist") -> dict[str, np.ndarray]:
    """Random images of the right shape. Labels go round all classes, last class first."""
    rng = np.random.default_rng(0)
    K, shape, *_ = SPECS[name]
    arrays = {"classes": np.array([f"class {k}" for k in range(K)])}
    for split, n in ("train", 23), ("test", 11):
        arrays[f"{split}_x"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_y"] = (K - 1 - np.arange(n)) % K
    return arrays


def assert_holds(data: common.Dataset, arrays: dict[str, np.ndarray]) -> None:
    for key in ("train_x", "train_y", "test_x", "test_y"):
        assert getattr(data, key).dtype == (torch.uint8 if key.endswith("x") else torch.int64)
        np.testing.assert_array_equal(getattr(data, key), arrays[key])
    assert data.classes == tuple(arrays["classes"])


WRONG_ARRAYS = {
    "float images": lambda a: a.update(train_x=a["train_x"].astype(np.float32)),
    "no channel axis": lambda a: a.update(test_x=a["test_x"][..., 0]),
    "no image": lambda a: a.update(test_x=a["test_x"][:0], test_y=a["test_y"][:0]),
    "nine classes": lambda a: a.update(classes=a["classes"][:9]),
    "a label too large": lambda a: a["test_y"].__setitem__(0, 10),
    "a label below 0": lambda a: a["train_y"].__setitem__(-1, -1),
    "fewer labels than images": lambda a: a.update(train_y=a["train_y"][:-1]),
    "labels in columns": lambda a: a.update(test_y=a["test_y"][:, None]),
    "float labels": lambda a: a.update(test_y=a["test_y"].astype(np.float64)),
    "no test labels": lambda a: a.pop("test_y"),
}


@pytest.mark.parametrize("spoil", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
def test_npz_with_a_wrong_array(spoil, tmp_path, user_error):
    arrays = good_arrays()
    small = {key: array.astype(np.uint8) if key.endswith("_y") else array for key, array in arrays.items()}
    np.savez_compressed(tmp_path / "mnist.npz", **small)
    assert_holds(load_dataset("mnist", tmp_path), arrays)
    spoil(arrays)
    np.savez(tmp_path / "mnist.npz", **arrays)
    with user_error(f"{tmp_path / 'mnist.npz'}: cannot be read", "delete or replace it"):
        load_dataset("mnist", tmp_path)


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # among the pixels: only the checksum can tell
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "one byte wrong": flip_a_byte,
    "empty": lambda path: path.write_bytes(b""),
    "not a zip": lambda path: path.write_text("<html>404: no such data set</html>"),
    "one array": lambda path: np.save(path.open("wb"), np.zeros(3)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_npz(damage, tmp_path, user_error):
    np.savez(tmp_path / "mnist.npz", **good_arrays())
    damage(tmp_path / "mnist.npz")
    with user_error(f"{tmp_path / 'mnist.npz'}: cannot be read", "delete or replace it"):
        load_dataset("mnist", tmp_path)


def test_a_pickle_inside_is_not_opened(tmp_path, user_error):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "marker"), "w")  # it stands for any code

    np.savez(tmp_path / "mnist.npz", **good_arrays() | {"classes": np.array([Trap()] * 10, dtype=object)})
    with user_error(tmp_path / "mnist.npz"):
        load_dataset("mnist", tmp_path)
    assert not (tmp_path / "marker").exists()
    pickle.loads(pickle.dumps(Trap()))  # noqa: S301  the trap is real
    assert (tmp_path / "marker").exists()


def write_mnist(data_dir, arrays) -> None:
    """MNIST's own files: 0, 0, type (8: uint8), number of axes, the axes as big-endian int32, the bytes."""
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        for kind, array in (
            ("images-idx3", arrays[f"{split}_x"][..., 0]),
            ("labels-idx1", arrays[f"{split}_y"]),
        ):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def test_torchvisions_files_are_read_and_kept(tmp_path, capsys):
    arrays = good_arrays()
    write_mnist(tmp_path, arrays)
    data = load_dataset("mnist", tmp_path)
    assert_holds(data, arrays | {"classes": data.classes})
    assert data.classes[3] == "3 - three" and capsys.readouterr() == ("", "")
    (tmp_path / "MNIST").rename(tmp_path / "gone")  # from now on the npz alone is enough
    assert load_dataset("mnist", tmp_path).fingerprint == data.fingerprint


def test_a_read_only_folder_is_read_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    write_mnist(tmp_path, good_arrays())
    monkeypatch.setattr(os, "replace", refuse)
    assert len(load_dataset("mnist", tmp_path).train_y) == 23
    (line,) = capsys.readouterr().err.splitlines()
    assert "mnist.npz" in line and "Permission denied" in line and "nothing is kept" in line
    assert [path.name for path in tmp_path.iterdir()] == ["MNIST"]


def test_two_programs_that_keep_the_same_data_at_once(tmp_path, monkeypatch):
    """Two seeds started together: the one must not rename what the other is still writing."""
    write_mnist(tmp_path, good_arrays())
    savez = np.savez

    def slow_savez(part, **arrays):
        part.write_bytes(b"begun")
        with monkeypatch.context() as patch:  # meanwhile, in the other process
            patch.setattr(np, "savez", savez)
            patch.setattr(os, "getpid", lambda: 1)
            load_dataset("mnist", tmp_path)
        assert part.read_bytes() == b"begun"
        savez(part, **arrays)

    monkeypatch.setattr(np, "savez", slow_savez)
    load_dataset("mnist", tmp_path)
    assert len(load_dataset("mnist", tmp_path).train_y) == 23


def test_neither_file_nor_network_nor_a_whole_file(tmp_path, user_error):
    for name in SPECS:
        if name != "digits":
            with user_error(f"--dataset {name}", tmp_path / f"{name}.npz", "network"):
                load_dataset(name, tmp_path)
    write_mnist(tmp_path / "cut", good_arrays())
    images = tmp_path / "cut" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:100])  # of extracted files torchvision knows only that they exist
    with user_error("--dataset mnist", tmp_path):
        load_dataset("mnist", tmp_path / "cut")
    assert not (tmp_path / "cut" / "mnist.npz").exists()


def test_a_class_may_lack_test_images_but_not_training_images(tmp_path, user_error):
    arrays = good_arrays()
    np.savez(tmp_path / "mnist.npz", **arrays | {"test_y": np.zeros_like(arrays["test_y"])})
    assert load_dataset("mnist", tmp_path).counts.min() >= 1
    np.savez(tmp_path / "mnist.npz", **arrays | {"train_y": np.zeros_like(arrays["train_y"])})
    with user_error("--dataset mnist", "class 1", "no training image"):
        load_dataset("mnist", tmp_path)


def test_a_fingerprint_changes_with_an_image_a_label_and_a_name(tmp_path):
    arrays = good_arrays()
    images = arrays["train_x"].copy()
    images[5, 0, 0] += 1
    changed = [
        {},
        {"train_x": images},
        {"test_x": arrays["test_x"][::-1]},
        {"train_y": np.roll(arrays["train_y"], 1)},
        {"classes": np.array(list("0123456789"))},
        {},
    ]
    prints = []
    for content in changed:
        np.savez(tmp_path / "mnist.npz", **arrays | content)
        prints.append(load_dataset("mnist", tmp_path).fingerprint)
    assert len(set(prints)) == len(changed) - 1 and prints[0] == prints[-1]


# %% Folders of images


def save(path, pixels, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def flat(height: int, width: int, *colour: int) -> np.ndarray:
    return np.full((height, width, len(colour)), colour, np.uint8)


@pytest.fixture
def tree(tmp_path):
    """PATH/train and PATH/test with classes cat and dog: one-coloured images of every shape and mode."""
    path = tmp_path / "pets"
    save(path / "train" / "cat" / "1.png", flat(20, 12, 10, 20, 30))  # tall
    save(path / "train" / "cat" / "2.png", flat(9, 31, 40)[..., 0])  # wide, grey
    save(path / "train" / "dog" / "1.png", flat(4, 4, 50, 60, 70, 0))  # smaller than asked for, transparent
    save(path / "test" / "cat" / "1.png", flat(8, 8, 80, 90, 100))
    save(path / "test" / "dog" / "1.jfif", flat(8, 8, 110, 110, 110), format="JPEG")
    return path


def test_folder_of_images(tree):
    data = load_dataset(f"folder:{tree}", image_size=8)
    assert data.classes == ("cat", "dog") and (data.pad, data.flip) == (1, True)
    assert data.train_y.tolist() == [0, 0, 1] and data.test_y.tolist() == [0, 1]
    images = torch.cat([data.train_x, data.test_x])
    colours = torch.tensor([[10, 20, 30], [40] * 3, [255] * 3, [80, 90, 100], [110] * 3]).to(torch.uint8)
    assert images.equal(colours[:, None, None].expand(5, 8, 8, 3))
    save(tree / "train" / "dog" / "deeper" / "2.png", flat(5, 5, 1, 2, 3))
    assert load_dataset(f"folder:{tree}", image_size=8).fingerprint != data.fingerprint


@pytest.mark.parametrize("upright", [True, False])
def test_images_are_resized_by_the_short_side_and_cut_in_the_middle(tree, upright):
    stripes = np.concatenate(
        [flat(8, 8, *colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))], axis=1
    )
    stripes = stripes.repeat(2, 0).repeat(2, 1)
    save(tree / "train" / "cat" / "1.png", stripes.transpose(1, 0, 2) if upright else stripes)
    image = load_dataset(f"folder:{tree}", image_size=8).train_x[0]
    assert (image[2:6, 2:6] == torch.tensor([0, 255, 0])).all()
    assert (image[..., 1] > 150).all()  # resizing blurs the outermost pixels, but green they all are


def test_hidden_is_no_class_and_other_names_are_as_they_are(tree):
    save(tree / "train" / ".ipynb_checkpoints" / "1.png", flat(5, 5, 1, 2, 3))
    save(tree / "train" / "cat" / ".cache" / "1.png", flat(5, 5, 1, 2, 3))
    (tree / "train" / "cat" / ".DS_Store").write_text("hidden, and no image")
    for split in ("train", "test"):
        for name in (b"_unknown_", b"a_$x$", b"caf\xe9"):
            os.makedirs(os.path.join(os.fsencode(tree / split), name))
            Image.new("RGB", (4, 4)).save(os.path.join(os.fsdecode(tree / split), os.fsdecode(name), "1.png"))
    data = load_dataset(f"folder:{tree}")
    assert data.classes == ("_unknown_", "a_$x$", "caf\ufffd", "cat", "dog")
    assert data.counts.tolist() == [1, 1, 1, 2, 1]


def test_a_long_tail_of_uneven_classes_says_its_ratio(tree, capsys):
    for name, n in (("cat", 4), ("dog", 20)):
        for i in range(n):
            save(tree / "train" / name / f"{i}.png", flat(4, 4, *(100 if name == "dog" else 0, i, 0)))
    data = load_dataset(f"folderlt:{tree}", imbalance=100, image_size=4)
    assert data.counts[1] > data.counts[0]  # the largest class is the head
    assert ((data.train_x[:, 0, 0, 0] == 100) == data.train_y).all()  # images went with their labels
    assert f"a ratio of {data.counts[1] / data.counts[0]:.4g}, not 100" in capsys.readouterr().err


def test_a_flat_folder_is_split_by_class(tmp_path, user_error):
    for k, name in enumerate(("a", "b")):
        for i in range(10):
            save(tmp_path / name / f"{i}.png", flat(5, 5, 20 * i, 100 * k, 7))
    data = load_dataset(f"folder:{tmp_path}", test_share=0.2)
    assert data.counts.tolist() == [8, 8] and torch.bincount(data.test_y).tolist() == [2, 2]
    images = torch.cat([data.train_x, data.test_x])
    assert len({x.numpy().tobytes() for x in images}) == 20  # no image is in both
    assert (images[:, 0, 0, 1] == 100 * torch.cat([data.train_y, data.test_y])).all()
    assert load_dataset(f"folder:{tmp_path}", test_share=0.2).test_x.equal(data.test_x)
    for share in (0.0, 0.01):  # no test images; fewer than classes
        with user_error(f"--dataset folder:{tmp_path}", "--test-share 0.2"):
            load_dataset(f"folder:{tmp_path}", test_share=share)


LAYOUTS = {
    "classes differ": (
        lambda path: (path / "test" / "dog").rename(path / "test" / "wolf"),
        "different classes",
    ),
    "empty class": (lambda path: (path / "train" / "emu").mkdir(), "emu"),
    "no test": (lambda path: (path / "test").rename(path / "rest"), "test"),
    "nothing": (lambda path: path.rename(path.parent / "elsewhere"), "CLASS/IMAGE"),
    "one class": (
        lambda path: [(path / s / "dog").rename(path / s / ".d") for s in ("train", "test")],
        "cat",
    ),
}


@pytest.mark.parametrize("change, word", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_folder_laid_out_wrongly(change, word, tree, user_error):
    with user_error(f"--test-share is 0.5; expected {'PATH/train/CLASS/IMAGE'}"):
        load_dataset(f"folder:{tree}", test_share=0.5)
    change(tree)
    with user_error(f"--dataset folder:{tree}", word):
        load_dataset(f"folder:{tree}")


def test_a_folder_beyond_memory_is_refused(tree, user_error):
    with user_error(tree, "memory", "--image-size 1000000"):
        load_dataset(f"folder:{tree}", image_size=1_000_000)


def claim_a_huge_size(path) -> None:
    """A PNG of a few bytes that says it has 1.6 billion pixels: Pillow calls it a decompression bomb."""
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">ii", 40000, 40000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def write_rgb_of_16_bits(path) -> None:
    rows = b"".join(b"\0" + struct.pack(">12H", *range(12)) for _ in range(4))  # 4 x 4 pixels
    chunks = (
        (b"IHDR", struct.pack(">iiBBBBB", 4, 4, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    content = b"".join(
        struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


GREY = np.arange(64).reshape(8, 8)
BAD_IMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "bomb": claim_a_huge_size,
    "12 bits": lambda path: save(path, (GREY * 64).astype(np.uint16)),
    "colours of 16 bits": write_rgb_of_16_bits,
    "32 bits": lambda path: save(path, GREY.astype(np.int32), format="TIFF"),
    "floats": lambda path: save(path, (GREY / 64).astype(np.float32), format="TIFF"),
}


@pytest.mark.parametrize("damage", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_an_image_that_is_not_8_bits_or_not_readable_is_named(damage, tree, user_error):
    path = tree / "train" / "dog" / "1.png"
    damage(path)
    with user_error(f"{path}: not a readable image", "replace or remove it"):
        load_dataset(f"folder:{tree}")


def test_worker_processes_read_the_same_and_name_a_bad_file(tree, user_error):
    for i in range(1000):
        os.link(tree / "train" / "cat" / f"{1 + i % 2}.png", tree / "train" / "dog" / f"x{i:03}.png")
    state = torch.get_rng_state()
    data = load_dataset(f"folder:{tree}", image_size=2)
    assert torch.get_rng_state().equal(state)
    assert data.train_x[3:, 0, 0, 0].tolist() == [10, 40] * 500
    bad = tree / "train" / "dog" / "y.png"
    bad.write_text("no image")
    with user_error(f"{bad}: not a readable image ("):
        load_dataset(f"folder:{tree}", image_size=2)


# %% Batches

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])


def random_images(N: int, H: int, W: int, C: int) -> torch.Tensor:
    return torch.randint(256, (N, H, W, C), generator=generator(0)).to(torch.uint8)


def loader(images: torch.Tensor, **options) -> Batches:
    return Batches(images, MEAN[: images.shape[3]], STD[: images.shape[3]], **options)


def by_hand(image: torch.Tensor, pad: int, top: int, left: int, mirror: bool) -> torch.Tensor:
    """(H, W, C) -> (C, H, W), pixel by pixel: the crop that begins at (top, left) of the padded image."""
    H, W, C = image.shape
    x = torch.zeros(C, H, W)
    for c, i, j in itertools.product(range(C), range(H), range(W)):
        row = top + i - pad
        column = left + (W - 1 - j if mirror else j) - pad
        inside = 0 <= row < H and 0 <= column < W
        value = image[row, column, c].item() / 255 if inside else 0
        x[c, i, j] = (value - MEAN[c].item()) / STD[c].item()
    return x


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("pad, flip", [(0, False), (0, True), (3, False), (3, True)])
def test_every_pixel_of_a_crop(C, pad, flip):
    """Crops and flips as drawn on the CPU: all tops and lefts of a column at once, then the mirrors."""
    images = random_images(6, 4, 5, C)
    index = torch.randint(6, (40, 2), generator=generator(1))
    batches = list(loader(images, pad=pad, flip=flip).epoch(index, 15, generator(2)))
    assert [part for part, *_ in batches] == split_evenly(40, 15)
    drawn = generator(2)
    for column in range(2):
        top, left = torch.randint(2 * pad + 1, (2, 40), generator=drawn).tolist()
        mirror = (torch.rand(40, generator=drawn) < (0.5 if flip else 0.0)).tolist()
        views = zip(index[:, column], top, left, mirror, strict=True)
        expected = torch.stack([by_hand(images[i], pad, t, s, m) for i, t, s, m in views])
        x = torch.cat([batch[1 + column] for batch in batches])
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5, check_stride=False)


def test_all_crops_are_drawn_at_the_call():
    images = loader(random_images(5, 6, 6, 1), pad=2, flip=True)
    one = generator(3)
    epoch = images.epoch(torch.arange(5), 2, one)
    states = one.get_state(), torch.get_rng_state()
    first = torch.cat([x for _, x in epoch])
    assert one.get_state().equal(states[0]) and torch.get_rng_state().equal(states[1])
    assert first.equal(torch.cat([x for _, x in images.epoch(torch.arange(5), 5, generator(3))]))
    assert not first.equal(torch.cat([x for _, x in images.epoch(torch.arange(5), 5, generator(4))]))


def test_evaluation_gives_the_plain_images_in_order():
    images = random_images(4, 5, 7, 3)
    batches = loader(images, pad=2, flip=True)
    plain = torch.stack([by_hand(image, 0, 0, 0, False) for image in images])
    for x in (batches.load(torch.arange(4)), torch.cat([x for _, x in batches.all(3)])):
        torch.testing.assert_close(x, plain, rtol=1e-5, atol=1e-5, check_stride=False)
    assert batches.load(torch.arange(4), generator(0)).is_contiguous(memory_format=torch.channels_last)


def test_each_draw_is_a_view_of_its_own_uniform_over_offsets_and_mirrors():
    images = loader(random_images(1, 6, 6, 1), pad=2, flip=True)
    x = images.load(torch.zeros(20_000, dtype=torch.long), generator(0))
    _, seen = torch.unique(x.flatten(1), dim=0, return_counts=True)
    assert len(seen) == 2 * 5**2
    chi2 = float(((seen - 400.0) ** 2 / 400).sum())
    assert chi2 < 49 + 6 * (2 * 49) ** 0.5  # chi-square of 49 degrees of freedom: mean 49, variance 98


@pytest.mark.parametrize("T, batch_size, ranks", [(349, 32, 2), (100, 7, 3), (5, 4, 2)])
def test_every_rank_has_an_equal_share_of_each_batch(T, batch_size, ranks, monkeypatch):
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(common, "ranks", lambda rank=rank: (rank, ranks))
        epoch = loader(random_images(1, 4, 4, 1)).epoch(torch.zeros(T).long(), batch_size, generator(0))
        shares.append([part for part, _ in epoch])
    for batch in zip(*shares, strict=True):
        assert len({part.stop - part.start for part in batch}) == 1
    covered = [i for batch in zip(*shares, strict=True) for part in batch for i in range(T)[part]]
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
