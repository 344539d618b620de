"""The data part of common.py: long tails, reading and refusing files, the loader."""

import functools
import itertools
import os
import struct
import urllib.request
import zlib

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
from common import Batches, load_dataset, long_tail_counts, long_tail_subset, split_evenly


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exponential_profile_has_the_published_totals():
    for K, totals in (100, [19573, 12608, 10847, 9502]), (10, [20431, 13996, 12406, 11203]):
        assert [sum(long_tail_counts(K, 50_000 / K, ratio)) for ratio in (10, 50, 100, 200)] == totals


@given(st.integers(1, 40), st.integers(1, 600), st.floats(1, 1e4), st.sampled_from(["exp", "step"]))
def test_a_long_tail_falls_from_n_max_and_leaves_no_class_empty(K, n_max, imbalance, profile):
    counts = long_tail_counts(K, n_max, imbalance, profile)
    assert len(counts) == K and counts == sorted(counts, reverse=True)
    assert counts[0] == n_max and counts[-1] >= 1


def shuffled_labels(sizes: list[int]) -> torch.Tensor:
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return y[torch.randperm(len(y), generator=generator(0))]


def test_subset_takes_each_class_its_quota_and_draws_nothing_from_the_global_generator():
    y, before = shuffled_labels([80] * 5), torch.get_rng_state()
    subset = long_tail_subset(y, 5, 16)
    assert torch.get_rng_state().equal(before) and long_tail_subset(y, 5, 16).equal(subset)
    assert y[subset].tolist() == [0] * 80 + [1] * 40 + [2] * 20 + [3] * 10 + [4] * 5  # 16^(1/4) = 2
    assert len(subset.unique()) == len(subset)
    y = shuffled_labels([20, 110, 90, 80, 100])  # class 0 has less than its quota, N / K
    for by_count, counts in (False, [20, 40, 20, 10, 5]), (True, [5, 80, 20, 10, 40]):  # True: largest first
        assert torch.bincount(y[long_tail_subset(y, 5, 16, by_count=by_count)]).tolist() == counts


@given(n=st.integers(1, 9), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_keep_per_class_keeps_some_of_every_class(n, sizes):
    y = shuffled_labels(sizes)
    index = common.keep_per_class(y, n)
    assert torch.bincount(y[index]).tolist() == [min(n, size) for size in sizes]
    assert index.equal(index.sort().values)
    assert set(index.tolist()) <= set(common.keep_per_class(y, n + 1).tolist())  # a part of a larger one


def test_refused_without_reading_a_file(user_error):
    for name in ("imagenet", "CIFAR10", "lt", "", "folder", "folderlt", "digits:here", "svhn"):
        with user_error(f"--dataset {name}: expected", "cifar100", "folder:PATH"):
            load_dataset(name)
    for imbalance in (0.5, -1.0, float("nan"), float("inf")):
        with user_error(f"--imbalance {imbalance:g}"):
            load_dataset("digitslt", imbalance=imbalance)
    with user_error("--test-share 0.2", "digits"):
        load_dataset("digits", test_share=0.2)


def pairs(x, y) -> list[tuple[bytes, int]]:
    """Images with their labels, to be compared as a multiset."""
    return sorted((np.asarray(image).tobytes(), int(label)) for image, label in zip(x, y, strict=True))


def test_digits_are_all_of_scikit_learns_in_two_stratified_parts_and_only_training_gets_a_tail(monkeypatch):
    data, tail = load_dataset("digits"), load_dataset("digitslt", imbalance=10, profile="step")
    assert data.train_x.shape == (1437, 8, 8, 1) and data.test_x.shape == (360, 8, 8, 1)
    assert data.classes == tuple("0123456789") and (data.pad, data.flip, data.profile) == (1, False, "")
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    whole = pairs(np.round(x.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8), y)
    assert sorted(pairs(data.train_x, data.train_y) + pairs(data.test_x, data.test_y)) == whole
    assert np.abs(torch.bincount(data.test_y).numpy() - np.bincount(y) * 360 / 1797).max() < 1
    pixels = data.train_x.numpy() / 255
    np.testing.assert_allclose([data.mean, data.std], [[pixels.mean()], [pixels.std()]], rtol=1e-6)
    assert tail.counts.tolist() == [min(n, 143) for n in data.counts[:5].tolist()] + [14] * 5
    assert set(pairs(tail.train_x, tail.train_y)) <= set(pairs(data.train_x, data.train_y))
    assert tail.test_x.equal(data.test_x) and tail.mean.equal(data.mean) and tail.std.equal(data.std)
    monkeypatch.setattr(common, "shot_groups", lambda counts, profile: (counts.tolist(), profile))
    assert tail.groups == (tail.counts.tolist(), "step")


@pytest.mark.parametrize("batch_size, per_class, n", [(40, 0, 8), (16, 0, 3), (16, 5, 10)])
def test_a_dry_run_keeps_some_of_every_class(batch_size, per_class, n, monkeypatch, user_error):
    line = f"--dataset digits --dry-run --device cpu --batch-size {batch_size}".split()
    args = common.Flags("hug", "about").parse(line, {"ce": ""}, ["ce"], {"": {"epochs": 9, "lr": 0.1}})
    data = common.prepare_data(args, per_class)
    assert data.counts.tolist() == [n] * 10 == torch.bincount(data.test_y).tolist()
    assert data.fingerprint == load_dataset("digits").fingerprint
    for count, least in (1, 3), (2, 6):  # of an odd number of images one batch would hold a single one
        args.batch_size = least - 1
        monkeypatch.setattr(common, "ranks", lambda count=count: (0, count))
        with user_error(f"--batch-size {least - 1}", f"{least} or more"):
            common.prepare_data(args)


# %% NAME.npz, and torchvision's files


def good_arrays() -> dict[str, np.ndarray]:
    """Random images like MNIST's. Labels go round all classes, last class first."""
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class {k}" for k in range(10)])}
    for split, n in ("train", 23), ("test", 11):
        arrays[f"{split}_x"] = rng.integers(0, 256, (n, 28, 28, 1), dtype=np.uint8)
        arrays[f"{split}_y"] = (9 - np.arange(n)) % 10
    return arrays


FAULTS = {
    "float images": lambda a: a.update(train_x=a["train_x"].astype(np.float32)),
    "no channel axis": lambda a: a.update(test_x=a["test_x"][..., 0]),
    "nine classes": lambda a: a.update(classes=a["classes"][:9]),
    "pickled names": lambda a: a.update(classes=a["classes"].astype(object)),  # a pickle may run any code
    "a label too large": lambda a: a["test_y"].__setitem__(0, 10),
    "a label below 0": lambda a: a["train_y"].__setitem__(-1, -1),
    "fewer labels than images": lambda a: a.update(train_y=a["train_y"][:-1]),
    "a label between two": lambda a: a.update(test_y=a["test_y"] + 0.5),
    "one byte wrong": lambda a: None,
}


def same(data, arrays) -> bool:
    return all(np.array_equal(getattr(data, key), arrays[key]) for key in arrays if key != "classes")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_npz_is_read_and_a_faulty_one_is_named(fault, tmp_path, user_error):
    arrays = good_arrays()
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    data = load_dataset("mnist", tmp_path)
    assert same(data, arrays) and data.train_y.dtype == torch.int64
    assert data.classes == tuple(arrays["classes"])
    FAULTS[fault](arrays)
    np.savez(path, **arrays)
    if fault == "one byte wrong":
        path.write_bytes(path.read_bytes().replace(arrays["train_x"][3].tobytes(), bytes(784)))
    with user_error(f"{path}: cannot be read", "delete or replace it"):
        load_dataset("mnist", tmp_path)


def test_torchvisions_files_are_read_and_nothing_is_written(tmp_path, user_error, monkeypatch):
    """MNIST's own files: 0, 0, type (8: uint8), number of axes, the axes as big-endian int32, the bytes."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: open(tmp_path))  # an OSError
    for name in common.SPECS.keys() - {"digits"}:
        with user_error(f"--dataset {name}", tmp_path / f"{name}.npz", "network"):
            load_dataset(name, tmp_path)
    arrays, raw = good_arrays(), tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for split, prefix in ("train", "train"), ("test", "t10k"):
        for kind, x in ("images-idx3", arrays[f"{split}_x"][..., 0]), ("labels-idx1", arrays[f"{split}_y"]):
            header = bytes([0, 0, 8, x.ndim]) + struct.pack(f">{x.ndim}i", *x.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + x.astype(np.uint8).tobytes())
    [folder.chmod(0o500) for folder in (tmp_path, raw.parent, raw)]
    before = sorted(tmp_path.rglob("*"))
    data = load_dataset("mnist", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before  # root may write in spite of the folder's mode
    [folder.chmod(0o700) for folder in (tmp_path, raw.parent, raw)]
    assert same(data, arrays) and data.classes[3] == "3 - three"  # torchvision's name
    (raw / "train-images-idx3-ubyte").write_bytes(header)  # torchvision checks only that it exists
    with user_error("--dataset mnist", tmp_path):
        load_dataset("mnist", tmp_path)


def test_a_class_may_lack_test_images_and_a_fingerprint_changes_with_all(tmp_path, user_error):
    arrays = good_arrays()
    image = arrays["test_x"].copy()
    image[5, 0, 0] += 1
    other = {"train_y": np.roll(arrays["train_y"], 1), "classes": np.arange(10), "test_x": image}
    other["test_y"] = zeros = np.zeros_like(arrays["test_y"])
    prints = []
    for content in ({}, *({key: value} for key, value in other.items()), {}):
        np.savez(tmp_path / "mnist.npz", **arrays | content)
        prints.append(load_dataset("mnist", tmp_path).fingerprint)
    assert len(set(prints)) == 5 and prints[0] == prints[-1]
    np.savez(tmp_path / "mnist.npz", **arrays | {"train_y": zeros.repeat(3)[:23]})
    with user_error("--dataset mnist", "class 1", "no training image"):
        load_dataset("mnist", tmp_path)


# %% Folders of images


def save(path, pixels, **options) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def flat(height: int, width: int, *colour: int) -> np.ndarray:
    return np.tile(np.uint8(colour), (height, width, 1))


@pytest.fixture
def tree(tmp_path):
    """PATH/train and PATH/test with classes cat and dog: images of every shape and mode."""
    path = tmp_path / "pets"
    stripes = np.concatenate([flat(16, 16, 255, 0, 0), flat(16, 16, 0, 255, 0), flat(16, 16, 0, 0, 255)])
    save(path / "train" / "cat" / "1.png", stripes)  # tall
    save(path / "train" / "cat" / "2.png", flat(9, 31, 40)[..., 0])  # wide, grey
    save(path / "train" / "dog" / "1.png", flat(4, 4, 50, 60, 70, 0))  # smaller than asked for, transparent
    save(path / "test" / "cat" / "1.png", flat(8, 8, 80, 90, 100))
    save(path / "test" / "dog" / "1.jfif", flat(8, 8, 110, 110, 110), format="JPEG")
    return path


def test_folder_of_images(tree, capsys):
    assert load_dataset(f"folderlt:{tree}", image_size=8).counts.tolist() == [1, 1]
    assert "imbalance 1, not 100" in capsys.readouterr().err
    data = load_dataset(f"folder:{tree}", image_size=8)
    assert data.classes == ("cat", "dog") and (data.pad, data.flip) == (1, True)
    assert data.train_y.tolist() == [0, 0, 1] and data.test_y.tolist() == [0, 1]
    images = torch.cat([data.train_x, data.test_x])
    colours = torch.tensor([[0, 255, 0], [40] * 3, [255] * 3, [80, 90, 100], [110] * 3])
    assert (images[:, 2:6] == colours[:, None, None]).all()  # the middle; resizing blurs the stripes' edges
    assert (images[0, ..., 1] > 150).all()


def test_names_of_classes_and_the_largest_one_is_the_head(tree):
    for hidden in (".ipynb_checkpoints/1.png", "cat/.cache/1.png", "cat/._2.png"):
        save(tree / "train" / hidden, flat(5, 5, 1, 2, 3))
    for split, name in itertools.product(("train", "test"), (b"_unknown_", b"a_$x$", b"caf\xe9")):
        save(os.path.join(tree, split, os.fsdecode(name), "1.png"), flat(4, 4, 1, 2, 3))
    for i in range(20):
        save(tree / "train" / "dog" / f"{i}.png", flat(4, 4, 100, i, 0))
    data, tail = (load_dataset(f"folder{lt}:{tree}", imbalance=5) for lt in ("", "lt"))
    assert data.classes == ("_unknown_", "a_$x$", "caf\ufffd", "cat", "dog")  # hidden ones are none
    assert data.counts.tolist() == [1, 1, 1, 2, 20] and tail.counts.tolist() == [1, 1, 1, 2, 5]  # of 25 / 5


def test_a_flat_folder_is_split_by_class(tmp_path, user_error):
    for k, i in itertools.product(range(2), range(10)):
        save(tmp_path / "ab"[k] / f"{i}.png", flat(5, 5, 20 * i, 100 * k, 7))
    data = load_dataset(f"folder:{tmp_path}", test_share=0.2)
    assert data.counts.tolist() == [8, 8] and torch.bincount(data.test_y).tolist() == [2, 2]
    np.testing.assert_allclose(data.mean, data.train_x.double().mean((0, 1, 2)) / 255, rtol=1e-6)
    expected = (data.train_x.double() / 255).std((0, 1, 2), correction=0).clamp_min(1e-3)  # one is constant
    np.testing.assert_allclose(data.std, expected, rtol=1e-6)
    images = torch.cat([data.train_x, data.test_x])
    assert len({x.numpy().tobytes() for x in images}) == 20  # no image is in both
    assert (images[:, 0, 0, 1] == 100 * torch.cat([data.train_y, data.test_y])).all()
    for share in (0.0, 0.01):  # no test images; fewer than classes
        with user_error(f"--dataset folder:{tmp_path}", "--test-share 0.2"):
            load_dataset(f"folder:{tmp_path}", test_share=share)


def test_a_folder_laid_out_wrongly_or_beyond_memory_is_refused(tree, user_error):
    def refused(*words, **options):
        with user_error(f"folder:{tree}", *words):
            load_dataset(f"folder:{tree}", **options)

    refused("--test-share is 0.5", test_share=0.5)
    refused("memory", "--image-size 1000000", image_size=1_000_000)
    (tree / "train" / "emu").mkdir()
    refused("emu")
    (tree / "train" / "emu").rmdir()
    (tree / "test" / "dog").rename(tree / "test" / ".dog")
    refused("different classes, {'dog'}")
    (tree / "train" / "dog").rename(tree / "train" / ".dog")
    refused("its only class is cat")
    (tree / "test").rename(tree / "rest")
    refused("/test")
    tree.rename(tree.with_name("elsewhere"))
    refused("not found")


def deep_png() -> bytes:
    """A PNG of 8 x 1 coloured pixels of 16 bits, of which Pillow would read the upper half without a word."""
    chunks = (b"IHDR" + struct.pack(">iiBBBBB", 8, 1, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(49)))
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (*chunks, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GREY = np.arange(64).reshape(8, 8)
BAD_IMAGES = {
    "text": lambda path: path.write_text("not an image"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "colours of 16 bits": lambda path: path.write_bytes(deep_png()),
    "12 bits": lambda path: save(path, (GREY * 64).astype(np.uint16)),
    "floats of 32 bits": lambda path: save(path, GREY.astype(np.float32), format="TIFF"),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_an_image_that_is_not_8_bits_or_not_readable_is_named(fault, tree, user_error):
    path = tree / "train" / "dog" / "1.png"
    BAD_IMAGES[fault](path)
    with user_error(f"{path}: not a readable image", "bits" * ("bits" in fault), "replace or remove it"):
        load_dataset(f"folder:{tree}")


def test_worker_processes_read_the_same_and_name_a_bad_file(tree, user_error):
    dog, state = tree / "train" / "dog", torch.get_rng_state()
    for i in range(1000):
        os.link(tree / "train" / "cat" / "2.png", dog / f"x{i}.png")
    assert (load_dataset(f"folder:{tree}", image_size=2).train_x[3:] == 40).all()
    assert torch.get_rng_state().equal(state)
    (dog / "y.png").write_text("no image")
    with user_error(f"{dog / 'y.png'}: not a readable image ("):
        load_dataset(f"folder:{tree}", image_size=2)


# %% Batches

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])


def loader(N: int, H: int, W: int, C: int, **options) -> tuple[torch.Tensor, Batches]:
    images = torch.randint(256, (N, H, W, C), generator=generator(0)).to(torch.uint8)
    return images, Batches(images, MEAN[:C], STD[:C], **options)


def by_hand(image: torch.Tensor, pad: int, top: int, left: int, mirror: bool) -> torch.Tensor:
    """(H, W, C) -> (C, H, W): the crop that begins at (top, left) of the padded image."""
    H, W, C = image.shape
    crop = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[top : top + H, left : left + W]
    x = torch.tensor((crop[:, ::-1] if mirror else crop) / 255).float()
    return ((x - MEAN[:C]) / STD[:C]).permute(2, 0, 1)


@pytest.mark.parametrize("C, pad, flip", [(1, 0, True), (3, 3, False), (3, 3, True)])
def test_every_pixel_of_a_crop(C, pad, flip):
    """As drawn on the CPU: all tops and lefts of a column at once, then the mirrors; and uncropped."""
    images, batches = loader(6, 4, 5, C, pad=pad, flip=flip)
    index = torch.randint(6, (30, 2), generator=generator(1))
    one, drawn = generator(2), generator(2)
    epoch = batches.epoch(index, 12, one)
    states = one.get_state(), torch.get_rng_state()
    parts, *columns = zip(*epoch, strict=True)
    assert one.get_state().equal(states[0]) and torch.get_rng_state().equal(states[1])  # drawn at the call
    assert list(parts) == split_evenly(30, 12)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_stride=False)
    for i, x in enumerate(columns):
        top, left = torch.randint(2 * pad + 1, (2, 30), generator=drawn).tolist()
        mirror = (torch.rand(30, generator=drawn) < (0.5 if flip else 0.0)).tolist()
        views = zip(images[index[:, i]], top, left, mirror, strict=True)
        close(torch.cat(x), torch.stack([by_hand(image, pad, *view) for image, *view in views]))
        assert x[0].is_contiguous(memory_format=torch.channels_last)
    plain = torch.stack([by_hand(image, 0, 0, 0, False) for image in images])
    close(batches.load(torch.arange(6)), plain)
    close(torch.cat([x for _, x in batches.all(4)]), plain)


def test_each_draw_is_a_view_of_its_own_uniform_over_offsets_and_mirrors():
    _, batches = loader(1, 6, 6, 1, pad=2, flip=True)
    x = batches.load(torch.zeros(20_000, dtype=torch.long), generator(0))
    _, seen = torch.unique(x.flatten(1), dim=0, return_counts=True)
    assert len(seen) == 2 * 5**2 and (seen - 400).abs().max() < 5 * 20  # standard deviation 20


@settings(max_examples=20)
@given(T=st.integers(3, 500), batch_size=st.integers(1, 60), count=st.integers(1, 3))
def test_batches_cover_everything_once_and_every_rank_has_an_equal_share(T, batch_size, count):
    _, images = loader(1, 4, 4, 1)
    shares = []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "ranks", lambda rank=rank: (rank, count))
            epoch = images.epoch(torch.zeros(T).long(), batch_size, generator(0))
            shares.append([part for part, _ in epoch])
    batches = list(zip(*shares, strict=True))
    assert [i for batch in batches for part in batch for i in range(T)[part]] == list(range(T - T % count))
    assert all(len({part.stop - part.start for part in batch}) == 1 for batch in batches)
    sizes = [batch[-1].stop - batch[0].start for batch in batches]
    assert len(batches) == min(-(-T // batch_size), T // count) and max(sizes) - min(sizes) <= count
