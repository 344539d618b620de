"""What every chapter shares: data, metrics, the bookkeeping of a run. It knows no model, loss or method.

    from common import Batches, load_dataset, open_run, ...

Five parts, each under its own banner; a reader who never opens them loses nothing of a chapter:
    Data      load_dataset -> Dataset (uint8); long tails, subsets, tasks, coarse labels; Batches, the loader
    Metrics   accuracy per class, calibration, neural collapse, continual learning, clustering
    Theory    Claims, the table of a theory check; minimise and locate, which measure what theory predicts
    Run       flags, the run folder, `epochs` (checkpoint, log, progress), several GPUs
    Figures   curves, heat maps, tables; command_line, which turns errors into exit codes

Symbols, here and in every script: K classes, d feature dimension, N samples, B batch, n_k images of class k,
h features (row vectors), W class vectors (K, d), M class means (K, d).
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


class UserError(Exception):
    """Something only the user can mend. The scripts print it as one line on stderr and exit with code 2."""


# %% ------------------------------------------------------------------------------------------------- Data

SPECS = {  # K, (H, W, C), zero padding of the random crop, mirrored left-right? (a mirrored digit is none)
    "digits": (10, (8, 8, 1), 1, False),
    "mnist": (10, (28, 28, 1), 2, False),
    "fashionmnist": (10, (28, 28, 1), 4, True),
    "cifar10": (10, (32, 32, 3), 4, True),
    "cifar100": (100, (32, 32, 3), 4, True),
    "svhn": (10, (32, 32, 3), 4, False),
    "stl10": (10, (96, 96, 3), 12, True),
}


class Dataset(NamedTuple):
    """A data set. Images are uint8 (N, H, W, C); labels int64 (N,); mean and std (C,) in [0, 1]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    mean: Tensor  # of the full training split, so that a long tail does not move it
    std: Tensor
    pad: int
    flip: bool
    fingerprint: str  # another one where an image, a label or a class name differs
    profile: str = ""  # of a long tail: exp or step

    @property
    def counts(self) -> Tensor:
        """n_k: training images of each class, (K,)."""
        return torch.bincount(self.train_y, minlength=len(self.classes))

    @property
    def groups(self) -> dict[str, Tensor]:
        """The classes of each group: many, medium and few training images."""
        return shot_groups(self.counts, self.profile)


def keep(data: Dataset, index: Tensor) -> Dataset:
    """The data with only the training images that index selects."""
    return data._replace(train_x=data.train_x[index], train_y=data.train_y[index])


def split_name(name: str) -> tuple[str, bool, str]:
    """`digitslt` -> ("digits", True, ""); `folder:~/x` -> ("folder", False, HOME/x). Raises UserError."""
    base, colon, path = name.partition(":")
    long_tailed = base.endswith("lt")
    base = base.removesuffix("lt")
    if (base == "folder" and path) or (base in SPECS and not colon):
        return base, long_tailed, os.path.expanduser(path)
    names = ", ".join(SPECS)
    raise UserError(f"--dataset {name}: unknown; one of {names}, folder:PATH, or one with lt (cifar100lt)")


def load_dataset(
    name: str, data_dir: str | Path = "data", *, imbalance=100.0, profile="exp", image_size=32, test_share=0.0
) -> Dataset:
    """Data set by name; with the suffix `lt` its training split is long-tailed. Raises UserError.

    name: a key of SPECS, `folder:PATH` with PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or with
    PATH/CLASS/IMAGE and a test_share. image_size (folders): the short side is resized, then the centre cut.
    """
    base, long_tailed, path = split_name(name)
    if base == "folder":
        arrays = _read_folder(Path(path).resolve(), image_size, test_share)
    elif test_share:
        raise UserError(f"--test-share {test_share:g}: {base} has test images; only a folder may need it")
    else:
        arrays = _read_named(base, Path(data_dir).expanduser())
    classes = arrays["classes"]
    checksum = zlib.crc32("\n".join(classes).encode())
    for key in ("train_x", "train_y", "test_x", "test_y"):
        checksum = zlib.crc32(arrays[key].numpy(), checksum)
    sizes = f"{len(arrays['train_y'])}+{len(arrays['test_y'])} images, {len(classes)} classes"
    mean, std = _channel_statistics(arrays["train_x"])
    pad, flip = SPECS[base][2:] if base in SPECS else (image_size // 8, True)
    data = Dataset(**arrays, mean=mean, std=std, pad=pad, flip=flip, fingerprint=f"{sizes}, {checksum:08x}")
    if len(classes) < 2:
        raise UserError(f"--dataset {name}: its only class is {classes[0]}; expected two classes or more")
    if data.counts.min() == 0:
        raise UserError(f"--dataset {name}: class {classes[data.counts.argmin()]} has no training image")
    if not long_tailed:
        return data
    subset = long_tail_subset(data.train_y, len(classes), imbalance, profile, by_count=base == "folder")
    data = keep(data, subset)._replace(profile=profile)
    n = data.counts
    if abs(n.max() / n.min() / imbalance - 1) > 0.1:
        ratio = f"a ratio of {n.max() / n.min():.4g}, not {imbalance:g}"
        print(f"{name}: {n.max()} to {n.min()} images per class, {ratio}", file=sys.stderr)
    return data


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all pixels of (N, H, W, C): (C,) each, in [0, 1].

    (The often-copied CIFAR-10 std .2023, .1994, .2010 averages the images' own stds; over pixels it is .247.)
    """
    parts = [part.flatten(0, 2) for part in images.split(100)]  # in float64, all at once takes 8 x the memory
    pixels = images[..., 0].numel()
    mean = sum(part.double().sum(0) for part in parts) / pixels / 255
    square = sum(part.double().square().sum(0) for part in parts) / pixels / 255**2
    std = (square - mean.square()).clamp_min(1e-6).sqrt()  # a constant channel's is not 0
    return mean.float(), std.float()


def _read_named(name: str, data_dir: Path) -> dict:
    """A named data set: embedded, from DATA_DIR/NAME.npz, or through torchvision and then kept there."""
    cache = data_dir / f"{name}.npz"
    kept = cache.exists() or name == "digits"
    try:
        if name == "digits":
            arrays = _read_digits()
        elif kept:
            arrays = dict(np.load(cache, allow_pickle=False))  # never unpickles: that could run any code
        else:
            arrays = _read_torchvision(name, data_dir)
        fields = _checked(arrays, *SPECS[name][:2])
    except Exception as error:  # the parsers of zip, npy, IDX and MATLAB files raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        where = cache if kept else f"--dataset {name}: neither {cache} nor torchvision's files"
        remedy = "delete or replace it" if kept else "delete what is damaged, and connect to a network"
        raise UserError(f"{where}: cannot be read ({reason}); {remedy}") from error
    try:
        if not kept:
            write_atomically(cache, lambda part: np.savez(part, **arrays), shared=True)
    except UserError as error:  # a shared folder may be read-only
        reason = str(error).rpartition(";")[0]
        print(f"{reason}; the images were read, but nothing is kept", file=sys.stderr)
    return fields


def _checked(arrays: dict[str, np.ndarray], K: int, shape: tuple[int, int, int]) -> dict:
    """The fields of a Dataset: tensors, and names as text. ValueError for a wrong shape, type or label."""
    classes = arrays["classes"].astype(str)
    fields = {"classes": tuple(classes.tolist())}
    for split in ("train", "test"):
        x = arrays[f"{split}_x"]
        y = arrays[f"{split}_y"]
        right = x.dtype == np.uint8 and x.shape == (*y.shape, *shape) and classes.shape == (K,)
        if not right or y.size == 0 or not set(y.tolist()) <= set(range(K)):
            found = f"{split}_x {x.shape} {x.dtype}, {split}_y {y.shape} {y.dtype}, classes {classes.shape}"
            raise ValueError(f"{found}; expected (N, *{shape}) uint8, N labels from 0 to {K - 1}, {K} names")
        fields[f"{split}_x"] = torch.from_numpy(np.ascontiguousarray(x))
        fields[f"{split}_y"] = torch.from_numpy(y.astype(np.int64))
    return fields


def _read_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, split once and for all into 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    keys = ("train_x", "test_x", "train_y", "test_y")
    arrays = zip(keys, train_test_split(x, y, test_size=360, stratify=y, random_state=0), strict=True)
    return dict(arrays, classes=np.arange(10))


def _read_torchvision(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """Through torchvision, which downloads what is missing and opens CIFAR's pickles after checking MD5s."""
    from torchvision import datasets

    kind = next(getattr(datasets, kind) for kind in datasets.__all__ if kind.lower() == name)
    by_name = name in ("svhn", "stl10")
    arrays = {}
    data_dir.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        which = {"split": split} if by_name else {"train": split == "train"}
        with contextlib.redirect_stdout(sys.stderr):  # its progress does not belong to our output
            data = kind(data_dir, download=True, **which)
        x = np.asarray(data.data)  # MNIST: (N, H, W); SVHN, STL-10: (N, C, H, W); CIFAR: (N, H, W, C)
        x = x.transpose(0, 2, 3, 1) if by_name else x
        arrays[f"{split}_x"] = x.reshape(*x.shape[:3], -1)
        arrays[f"{split}_y"] = np.asarray(data.labels if by_name else data.targets)
    return dict(arrays, classes=np.array(getattr(data, "classes", range(10))))  # SVHN's have no names


def _read_folder(path: Path, size: int, test_share: float) -> dict:
    """The fields of a Dataset from PATH/train/CLASS/IMAGE and PATH/test, or from PATH/CLASS/IMAGE."""
    from sklearn.model_selection import train_test_split

    try:
        if (test_share > 0) == any((path / split).is_dir() for split in ("train", "test")):
            raise ValueError(f"--test-share is {test_share:g}")
        if test_share:
            x, y, classes = _read_images(path, size)
            train, test = train_test_split(range(len(y)), test_size=test_share, stratify=y, random_state=0)
            return dict(train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test], classes=classes)
        x, y, classes = _read_images(path / "train", size)
        test_x, test_y, test_classes = _read_images(path / "test", size)
        if odd := set(classes) ^ set(test_classes):
            raise ValueError(f"train and test have different classes, one has {min(odd)}")
        return dict(train_x=x, train_y=y, test_x=test_x, test_y=test_y, classes=classes)
    except (OSError, ValueError) as error:  # no such folder, a class without an image, too few to split
        reason = " ".join(str(error).split())
        layout = "PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or PATH/CLASS/IMAGE with --test-share 0.2"
        raise UserError(f"--dataset folder:{path}: {reason}; expected {layout}") from error


def _read_images(root: Path, size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 (N, size, size, 3), labels (N,) and classes of root/CLASS/IMAGE. Raises UserError.

    Hidden files and folders are left out; every other file must be an image of 8 bits.
    """
    from torchvision.datasets import ImageFolder

    names = sorted(item.name for item in root.iterdir() if item.is_dir() and item.name[0] != ".")
    label = {name: k for k, name in enumerate(names)}

    def visible(file: str) -> bool:
        return f"{os.sep}." not in file.removeprefix(str(root))

    files, y = zip(*ImageFolder.make_dataset(root, label, is_valid_file=visible), strict=True)
    needed = len(files) * size * size * 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**35
    if needed > memory / 4:  # the loader's padded copy takes more than as much again
        sizes = f"{needed / 2**30:.3g} GiB at --image-size {size}, of {memory / 2**30:.3g} GiB"
        raise UserError(f"--dataset folder:{root}: too large for memory ({sizes}); lower --image-size")
    images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
    read = functools.partial(_read_image, size=size)
    workers = min(8, torch.get_num_threads(), len(files) // 1000)
    own = torch.Generator()  # else it draws from torch's own
    reader = iter(DataLoader(files, batch_size=None, collate_fn=read, num_workers=workers, generator=own))
    for i, file in enumerate(tqdm(files, "reading images", leave=False, disable=None)):
        try:
            images[i] = next(reader)
        except Exception as error:  # of many kinds; a worker's text has its traceback before it
            reason = str(error).strip().rpartition("\n")[2]
            raise UserError(f"{file}: not a readable image ({reason}); replace or remove it") from error
    classes = tuple(os.fsencode(name).decode(errors="replace") for name in names)  # printable
    return images, torch.tensor(y), classes


def _read_image(file: str, size: int) -> Tensor:
    """A file's pixels, uint8 (size, size, 3): short side resized, centre cut, white where transparent."""
    from PIL import Image
    from torchvision.transforms import functional as TF

    with Image.open(file) as image:
        if image.mode[0] in "IF" or ";16" in str(image.tile):  # tile: how the file holds its pixels
            raise ValueError("more than 8 bits per value; convert it to 8 bits")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = TF.center_crop(TF.resize(image.convert("RGB"), size), size)
    return TF.pil_to_tensor(image).permute(1, 2, 0)


def long_tail_counts(K: int, n_max: float, imbalance: float, profile: str = "exp") -> list[int]:
    """Images per class, head first, n_max / n_min = imbalance. Raises UserError for an imbalance below 1.

    exp:  n_k = int(n_max * (1/IF)^(k/(K-1))), the convention of the published tables (Cui et al. 2019);
    step: the first half of the classes keeps n_max, the others get n_max / IF (Buda et al. 2018).
    """
    if not 1 <= imbalance < float("inf"):
        raise UserError(f"--imbalance {imbalance:g}: expected largest over smallest class, 1 or more")
    counts = {
        "exp": [int(n_max * (1 / imbalance) ** (k / max(K - 1, 1))) for k in range(K)],
        "step": [int(n_max) if k < K - K // 2 else int(n_max / imbalance) for k in range(K)],
    }
    return [max(n, 1) for n in counts[profile]]  # no class is left empty


def long_tail_subset(y: Tensor, K: int, imbalance: float, profile="exp", by_count: bool = True) -> Tensor:
    """Indices of a long-tailed subset of labels y (N,), class by class in label order; always the same ones.

    The head is the largest class, or with by_count=False class 0, as in the published tables. n_max is N / K;
    a class that has fewer images than its quota (SVHN's digit 0) gives all it has.
    """
    generator = torch.Generator().manual_seed(0)
    quotas = long_tail_counts(K, len(y) / K, imbalance, profile)
    order = torch.bincount(y, minlength=K).argsort(descending=True, stable=True).tolist()
    quota = dict(zip(order if by_count else range(K), quotas, strict=True))
    subset = []
    for k in range(K):
        members = (y == k).nonzero().flatten()
        subset.append(members[torch.randperm(len(members), generator=generator)[: quota[k]]])
    return torch.cat(subset)


def keep_per_class(y: Tensor, n: int, seed: int = 0) -> Tensor:
    """Sorted indices of n images of each class, drawn at random; of a class with fewer all of them."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[y[order].argsort(stable=True)]  # class after class, shuffled within
    counts = torch.bincount(y)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)  # where the image's class begins
    return order[torch.arange(len(y)) - first < max(n, 1)].sort().values


def cut_for_dry_run(data: Dataset, batch_size: int) -> Dataset:
    """Two batches of training images or a few more, some of every class, and as many test images."""
    n = 2 * batch_size // len(data.classes)
    train = keep_per_class(data.train_y, n)
    test = keep_per_class(data.test_y, n)
    return keep(data, train)._replace(test_x=data.test_x[test], test_y=data.test_y[test])


SUPERCLASSES = {  # CIFAR-100's twenty, of five classes each
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


def coarse_labels(classes: tuple[str, ...], grouping: str) -> tuple[Tensor, tuple[str, ...]]:
    """The coarse label of each of K classes, (K,), and the coarse classes' names; coarse_labels(...)[0][y].

    pairs: class k with class k + K/2, on CIFAR-10 airplane and dog, ...; superclasses: CIFAR-100's twenty.
    Raises UserError where the classes do not allow it.
    """
    K = len(classes)
    if grouping == "pairs" and K % 2 == 0 and K >= 4:
        names = (f"{a}+{b}" for a, b in zip(classes[: K // 2], classes[K // 2 :], strict=True))
        return torch.arange(K) % (K // 2), tuple(names)
    coarse = {name: i for i, members in enumerate(SUPERCLASSES.values()) for name in members.split()}
    if grouping == "superclasses" and set(classes) == set(coarse):
        return torch.tensor([coarse[name] for name in classes]), tuple(SUPERCLASSES)
    expected = "pairs (an even number of them, 4 or more) or superclasses (only CIFAR-100 has them)"
    raise UserError(f"--coarse {grouping}: {K} classes; expected {expected}")


def split_tasks(K: int, tasks: int) -> Tensor:
    """The task in which each of K classes comes, in label order: (K,) int64. Sizes differ by one at most."""
    if not 1 <= tasks <= K:
        raise UserError(f"--tasks {tasks}: expected 1 to {K}, the number of classes")
    sizes = torch.tensor([len(classes) for classes in torch.arange(K).tensor_split(tasks)])
    return torch.arange(tasks).repeat_interleave(sizes)


class Batches:
    """Loader: uint8 images stay on the device, and a batch is one gather away, (B, C, H, W) float32.

    Each *draw* of an image gets a random crop and flip of its own, none without a generator. An epoch's are
    drawn at once on the CPU: no step waits for the device, and a seed gives the same views on every device.
    """

    def __init__(
        self, images: Tensor, mean: Tensor, std: Tensor, *, pad: int = 0, flip: bool = False, device="cpu"
    ):
        self.N, self.H, self.W, self.C = images.shape
        self.pad = pad
        self.flip = flip
        self.device = torch.device(device)
        self.padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad)).to(device)
        self.rows = torch.arange(self.H, device=device)
        self.columns = torch.arange(self.W, device=device)
        # (x / 255 - mean) / std = x * scale + shift, repeated over a row so that it vectorises
        self.scale = (1 / (255 * std)).repeat(self.W).to(device)  # (W * C,)
        self.shift = (-mean / std).repeat(self.W).to(device)

    def epoch(self, index: Tensor, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """An iterator over (part, x), or (part, x_0, ..., x_{m-1}) for an index of shape (T, m).

        part is the slice of the epoch's T draws that x holds. All crops and flips are drawn at this call.
        Under torchrun each process gets an equal share of every batch; without a generator all of it.
        """
        views = [self._draw(column, generator) for column in index.view(len(index), -1).unbind(1)]
        rank, count = ranks() if generator is not None else (0, 1)
        parts = []
        for batch in split_evenly(len(index), batch_size, count):
            share = (batch.stop - batch.start) // count
            start = batch.start + rank * share
            parts.append(slice(start, start + share))
        return ((part, *(self._crop(column[:, part]) for column in views)) for part in parts)

    def all(self, batch_size: int = 1000) -> Iterator:
        """An iterator over (part, x): every image once, in order, neither cropped nor flipped."""
        return self.epoch(torch.arange(self.N), batch_size)

    def load(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One batch of the images index (B,), read now: (B, C, H, W)."""
        return self._crop(self._draw(index, generator))

    def _draw(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """(4, T): image, top, left and whether mirrored, of T views, on the device."""
        T = len(index)
        top = left = torch.full((T,), self.pad)
        mirror = torch.zeros(T, dtype=torch.bool)
        if generator is not None:
            top, left = torch.randint(2 * self.pad + 1, (2, T), generator=generator)
            mirror = torch.rand(T, generator=generator) < (0.5 if self.flip else 0.0)
        return torch.stack([index.cpu(), top, left, mirror]).to(self.device)

    def _crop(self, views: Tensor) -> Tensor:
        """The views (4, B), normalised: (B, C, H, W) float32, channels_last in memory."""
        image, top, left, mirror = views
        rows = top[:, None] + self.rows  # (B, H)
        cols = left[:, None] + torch.where(mirror[:, None] > 0, self.columns.flip(0), self.columns)  # (B, W)
        x = self.padded[image[:, None, None], rows[:, :, None], cols[:, None, :]]  # (B, H, W, C)
        return torch.addcmul(self.shift, x.flatten(2).float(), self.scale).view(x.shape).permute(0, 3, 1, 2)


def split_evenly(T: int, batch_size: int, count: int | None = None) -> list[slice]:
    """ceil(T / batch_size) slices, sizes equal to within one, so that no small rest is left over.

    For count processes (or torchrun's) sizes are multiples of count; up to count - 1 of T are left out.
    """
    count = count or ranks()[1]
    shares = T // count
    steps = min(-(-T // batch_size), shares)
    edges = [count * round(shares * i / steps) for i in range(steps + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


concatenate = lambda a, b: torch.cat([a, b])  # noqa: E731  for spherization.py, until it calls torch.cat itself


# %% ---------------------------------------------------------------------------------------------- Metrics


def metric_device(device: torch.device | str) -> torch.device:
    """Where metrics are computed: the device itself, but the CPU for Apple's MPS, which has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def accuracy_per_class(prediction: Tensor, y: Tensor, K: int) -> Tensor:
    """Share of each class's samples predicted right, (K,) float64; nan for a class without samples."""
    right = torch.bincount(y[prediction == y], minlength=K).double()
    return right / torch.bincount(y, minlength=K)


def shot_groups(counts: Tensor) -> tuple[dict[str, Tensor], str]:
    """Classes by training images: many (> 100), medium (20 to 100), few (< 20), and the rule in words.

    Where none are many or none few (Liu et al. 2019): the two halves of a step, else thirds of the classes.
    """
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    rule = "many > 100, medium 20 to 100, few < 20 training images"
    if not (groups["many"].any() and groups["few"].any()):
        order = torch.argsort(counts, descending=True, stable=True)
        log_size = counts[order].double().log()
        drop = log_size[:-1] - log_size[1:]  # from each class to the next smaller one
        steepest = max(drop.tolist(), default=0)
        if steepest > max(0.6 * drop.sum(), math.log(1.5)):  # most of the tail is one drop
            large = counts >= counts[order[drop.argmax()]]
            parts = [large, counts < 0, ~large]
            rule = "many, few: the classes of the larger and of the smaller size"
        else:
            parts = [torch.isin(torch.arange(len(order)).to(order), third) for third in order.tensor_split(3)]
            rule = "many, medium, few: thirds of the classes by training images"
        groups = dict(zip(groups, parts, strict=True))
    return {name: mask.nonzero().flatten() for name, mask in groups.items()}, rule


def expected_calibration_error(probability: Tensor, y: Tensor, bins: int = 15) -> float:
    """ECE = sum_b n_b/N |accuracy_b - confidence_b| over equal-width bins of confidence (Guo et al. 2017).

    probability (N, K), y (N,) -> in [0, 1]
    """
    confidence, prediction = probability.double().max(1)
    right = (prediction == y).double()
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bins are (0, 1/b], (1/b, 2/b], ...
    gap = torch.zeros(bins, dtype=torch.float64, device=y.device).index_add_(0, which, right - confidence)
    return float(gap.abs().sum() / len(y))


def accuracies(z: Tensor, y: Tensor, counts: Tensor) -> dict:
    """Accuracy of logits z (N, K): overall, by class size, per class; counts (K,): training images."""
    prediction = z.argmax(1)
    per_class = accuracy_per_class(prediction, y, len(counts))
    groups, rule = shot_groups(counts)
    return {
        "accuracy": float((prediction == y).double().mean()),
        **{group: float(per_class[members].nanmean()) for group, members in groups.items()},
        "rule": rule,
        "per_class": per_class.tolist(),
    }


HEADS = {  # on the same features; in figures
    "own": "its own head",
    "minus_log_n": "less log n",
    "equal_length": "equal lengths",
    "nearest_mean": "nearest class mean",
}


def heads(train_h, train_y, test_h, test_y, W, b=None) -> dict[str, float]:
    """Test accuracy that trained features give under other heads, without any training.

    Features (N, d), labels (N,), class vectors W (K, d) and biases b (K,) as they are in the logits.
        own           argmax_k  w_k . h + b_k
        equal_length  argmax_k  w_k . h / ||w_k||             tau-normalisation at 1 (Kang et al. 2020)
        minus_log_n   argmax_k  w_k . h + b_k - log n_k       logit adjustment at 1 (Menon et al. 2021)
        nearest_mean  argmin_k  ||h - mu_k||                  mu_k of the training features
    Each also with `_few`: on the classes that shot_groups calls few (nan if none).
    """
    K = len(W)
    n = torch.bincount(train_y, minlength=K)
    z = logits(test_h, W, b)
    predictions = {
        "own": z.argmax(1),
        "equal_length": logits(test_h, unit(W)).argmax(1),
        "minus_log_n": (z - n.to(z.device).double().log()).argmax(1),
        "nearest_mean": nearest_mean(test_h, class_means(train_h, train_y, K)),
    }
    few = torch.isin(test_y, shot_groups(n)[0]["few"])
    result = {}
    for name, prediction in predictions.items():
        right = (prediction.to(test_y.device) == test_y).double()
        result[name] = float(right.mean())
        result[f"{name}_few"] = float(right[few].mean())
    return result


# Continual learning: a stream of T tasks.


def task_accuracies(z: Tensor, y: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """Accuracy on each task of a stream, (T,) float64 twice: class-IL and task-IL (van de Ven, Tolias 2019).

    class-IL: argmax over all K logits z (N, K); task-IL: over the classes of the image's own task. task (K,)
    as from split_tasks; nan for a task without test images.
    """
    task = task.to(z.device)
    which = task[y]  # (N,)
    own = z.masked_fill(which[:, None] != task, -torch.inf)
    T = int(task.max()) + 1
    images = torch.bincount(which, minlength=T)
    right = [torch.bincount(which[score.argmax(1) == y], minlength=T).double() for score in (z, own)]
    return right[0] / images, right[1] / images


def average_so_far(R: Tensor) -> Tensor:
    """Accuracy over the tasks learned so far, after each: 1/(i+1) sum_{j<=i} R[i, j], (T,)."""
    return torch.stack([R[i, : i + 1].nanmean() for i in range(len(R))])


def stream_metrics(R: Tensor) -> dict[str, float]:
    """Summary of an accuracy matrix R (T, T): R[i, j] is the accuracy on task j after training on task i.

    average             A = 1/T sum_j R[T-1, j], over all tasks at the end of the stream
    stream_average      mean of average_so_far(R)
    forgetting          1/(T-1) sum_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j])     Chaudhry et al. 2018
    backward_transfer   1/(T-1) sum_{j<T-1} (R[T-1, j] - R[j, j])                    Lopez-Paz, Ranzato 2017
    Forgetting's maximum leaves out the last row, so it may be negative. A joint run has one row, (1, T): an
    average, the rest is nan. Tasks without test images (nan) are left out of every mean.
    """
    R = R.double()
    rows, T = R.shape
    result = dict.fromkeys(("average", "stream_average", "forgetting", "backward_transfer"), math.nan)
    result["average"] = float(R[-1].nanmean())
    if rows == T:
        result["stream_average"] = float(average_so_far(R).nanmean())
    if rows == T > 1:
        old = range(T - 1)
        result["forgetting"] = float(torch.stack([R[j:-1, j].max() - R[-1, j] for j in old]).nanmean())
        result["backward_transfer"] = float(torch.stack([R[-1, j] - R[j, j] for j in old]).nanmean())
    return result


# Neural collapse. Features h (N, d) of any float type and length, labels y (N,). All sums are in float64, of
# differences where what is added up is a spread: a spread of 1e-7 around features of norm 100 is right, and
# features times 1e-18 or 1e18 give the same. What is not defined is nan: dead or fully collapsed features.


def chunks(h: Tensor, *labels: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of h at a time, in float64 and small enough for the cache, with their rows of the labels."""
    device = metric_device(h.device)
    rows = max(1, 2**16 // h.shape[1])
    for x, *parts in zip(h.split(rows), *(y.split(rows) for y in labels), strict=True):
        yield x.detach().to(device, torch.float64), *(part.to(device) for part in parts)


def logits(h: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """z = h W^T + b in float64, (N, K), of features h (N, d), class vectors W (K, d), biases b (K,)."""
    device = metric_device(h.device)
    W = W.detach().to(device, torch.float64)
    b = 0 if b is None else b.detach().to(device, torch.float64)
    return torch.cat([x @ W.T + b for (x,) in chunks(h)])


def class_means(h: Tensor, y: Tensor, K: int) -> Tensor:
    """mu_k, (K, d) float64; equal features have exactly this mean. ValueError for a class without samples."""
    device = metric_device(h.device)
    y = y.to(device)
    count = torch.bincount(y, minlength=K)
    if count.min() == 0:
        raise ValueError(f"class {int(count.argmin())} has no sample")
    order = torch.arange(len(y), device=device)
    first = torch.full_like(count, len(y)).scatter_reduce(0, y, order, "amin")  # a sample of each class
    anchor = h.detach()[first.to(h.device)].to(device, torch.float64)  # (K, d)
    total = torch.zeros_like(anchor)
    for x, k in chunks(h, y):
        total.index_add_(0, k, x - anchor.index_select(0, k))
    return anchor + total / count[:, None]


class ClassSums(NamedTuple):
    """What the measures of collapse share, in float64."""

    count: Tensor  # (K,) n_k
    mean: Tensor  # (K, d) mu_k
    centred: Tensor  # (K, d) mu_k - mu_G, where mu_G is the mean of the class means, not of the samples
    square: Tensor  # (K,) sum of ||h - mu_k||^2 over the class: its part of N tr(Sigma_W)


def class_sums(h: Tensor, y: Tensor, K: int | None = None) -> ClassSums:
    """Of features h (N, d), labels y (N,); K: the largest label + 1. ValueError for an empty class."""
    mean = class_means(h, y, K or int(y.max()) + 1)
    square = mean.new_zeros(len(mean))
    for x, k in chunks(h, y):
        z = x - mean.index_select(0, k)
        square.index_add_(0, k, torch.linalg.vecdot(z, z))
    from_first = mean - mean[0]  # of equal means exactly 0
    centred = from_first - from_first.mean(0)
    count = torch.bincount(y, minlength=len(mean)).to(mean.device, torch.float64)
    return ClassSums(count, mean, centred, square)


def rounding(mean: Tensor) -> float:
    """Length below which a difference of class means (K, d) is what rounding left."""
    return float(1000 * torch.finfo(torch.float64).eps * mean.norm(dim=1).max())


def nc1(h: Tensor, y: Tensor, sums: ClassSums | None = None, centred: bool = True) -> tuple[float, int]:
    """NC1 = tr(Sigma_W pinv(Sigma_B)) / K, and the rank of Sigma_B that was kept (K - 1 if all is well).

        Sigma_W = 1/N sum_i (h_i - mu_y)(h_i - mu_y)^T      pooled over samples
        Sigma_B = 1/K sum_k (mu_k - mu_G)(mu_k - mu_G)^T     mu_G = mean of the class means
    With A = (mu_k - mu_G)_k / sqrt(K), (K, d), Sigma_B = A^T A and pinv(Sigma_B) = P P^T for P = pinv(A), so
        tr(Sigma_W pinv(Sigma_B)) = 1/N sum_i ||P^T (h_i - mu_y)||^2
    and no d x d matrix is needed. Class means that (nearly) coincide give a singular value near 0, which the
    cut-off drops: NC1 jumps, and only the rank tells. nan where no mean differs (rank 0). NC1 does not see
    spread across the span of the centred means: report trace_ratio or cdnv beside it. The notebook of Papyan
    et al. does not divide by K. centred=False: ZNC1, with mu_G = 0 and rank K.
    """
    sums = sums or class_sums(h, y)
    K = len(sums.mean)
    A = (sums.centred if centred else sums.mean) / K**0.5
    _, s, V = torch.linalg.svd(A, full_matrices=False)  # A = U diag(s) V
    cut = max(A.shape) * torch.finfo(s.dtype).eps * s[0] ** 2  # pinv(Sigma_B)'s: its eigenvalues are s^2
    keep = s**2 > cut + rounding(sums.mean) ** 2
    P = V[keep].T / s[keep]  # (d, rank)
    if P.shape[1] == 0:
        return math.nan, 0
    total = 0.0
    for x, k in chunks(h, y):
        total += ((x - sums.mean.index_select(0, k)) @ P).square().sum()
    return float(total / len(h) / K), P.shape[1]


def trace_ratio(h: Tensor, y: Tensor, sums: ClassSums | None = None) -> float:
    """tr(Sigma_W) / tr(Sigma_B), the neural-collapse package's `quotient`. inf where no mean differs."""
    sums = sums or class_sums(h, y)
    within = sums.square.sum() / sums.count.sum()
    between = sums.centred.square().sum() / len(sums.mean)
    return float(within / between)


def cdnv(h: Tensor, y: Tensor, sums: ClassSums | None = None) -> float:
    """CDNV (Galanti et al. 2022): mean over pairs of classes of (v_i + v_j) / (2 ||mu_i - mu_j||^2).

    v_k = mean of ||h - mu_k||^2 over class k. inf where two means are equal (nan if neither has any spread).
    """
    sums = sums or class_sums(h, y)
    v = sums.square / sums.count
    i, j = torch.triu_indices(len(v), len(v), 1, device=v.device)
    return float(((v[i] + v[j]) / (2 * distances(sums.mean)[i, j].square())).mean())


VCI_LARGEST_D = 4096  # vci needs the d x d matrix Sigma_W and its eigenvectors; beyond this d it is nan


def vci(h: Tensor, y: Tensor, sums: ClassSums | None = None) -> float:
    """VCI = 1 - tr(pinv(Sigma_W + Sigma_B) Sigma_B) / r, r = min(d, K-1), of variability (Xu & Liu 2023).

    From 0, collapsed, to 1, whatever the invertible linear map of the features. Computed as
        1/r sum_{i<=r} 1 / (1 + g_i)      g: the r largest eigenvalues of A pinv(Sigma_W) A^T, A as in nc1
    which near collapse, g -> inf, does not subtract from 1. nan where nothing differs, and for d > 4096.
    """
    sums = sums or class_sums(h, y)
    K, d = sums.mean.shape
    if d > VCI_LARGEST_D:
        return math.nan
    Sigma_W = sums.mean.new_zeros(d, d)
    for x, k in chunks(h, y):
        z = x - sums.mean.index_select(0, k)
        Sigma_W.addmm_(z.T, z, alpha=1 / len(h))
    e, V = torch.linalg.eigh(Sigma_W)  # Sigma_W = V diag(e) V^T
    # a direction without spread makes g huge, not inf
    least = d * torch.finfo(e.dtype).eps * e[-1] + rounding(sums.mean) ** 2
    B = sums.centred / K**0.5 @ V / e.clamp_min(least).sqrt()  # B B^T = A pinv(Sigma_W) A^T
    if e[-1] <= least and sums.centred.norm() <= rounding(sums.mean):
        return math.nan
    g = torch.linalg.svdvals(B)[: min(d, K - 1)].square()
    return float((1 / (1 + g)).mean())


def class_distances(h: Tensor, y: Tensor, sums: ClassSums | None = None) -> Tensor:
    """D_ij = mean squared distance between a sample of class i and one of class j, (K, K) float64.

    = v_i + v_j + ||mu_i - mu_j||^2; on the diagonal over distinct samples, 2 v_i n_i / (n_i - 1), nan for a
    class of one. (Diagnostic of Yang, Steinhardt & Hu 2023, whose formula we did not see.)
    """
    sums = sums or class_sums(h, y)
    v = sums.square / sums.count
    D = v[:, None] + v + distances(sums.mean).square()
    return D.diagonal_scatter(2 * sums.square / (sums.count - 1))  # 0 / 0 = nan


def unit(V: Tensor) -> Tensor:
    """Rows of V (K, d) at length 1, float64; nan for a row of zeros, which has no direction."""
    V = V.detach().double()
    return V / V.norm(dim=1, keepdim=True)


def cosines(V: Tensor) -> Tensor:
    """Pairwise cosines of the rows of V, (K, d) -> (K, K) float64. A zero row gives cosine 0."""
    V = unit(V).nan_to_num()
    return V @ V.T


def _pairs(C: Tensor) -> Tensor:
    """Entries of a symmetric matrix (K, K) above its diagonal, (K (K-1) / 2,)."""
    i, j = torch.triu_indices(len(C), len(C), 1, device=C.device)
    return C[i, j]


def _pairwise_cosines(V: Tensor) -> Tensor:
    """Cosines between all pairs of rows of V (K, d), (K (K-1) / 2,); nan with a row of zeros."""
    V = unit(V)
    return _pairs(V @ V.T)


def mean_pairwise_cosine(V: Tensor, classes: Tensor) -> float:
    """Mean cosine between the rows `classes` of V. 1: minority collapse (Fang et al. 2021); -1/(K-1): an ETF.

    nan where there are fewer than two classes, or one of them is a row of zeros.
    """
    return float(_pairwise_cosines(V[classes]).mean())


def distances(V: Tensor) -> Tensor:
    """Pairwise distances of the rows of V, (K, d) -> (K, K) float64, by subtraction.

    sqrt(|a|^2 + |b|^2 - 2 a.b) would round the distance of two close vectors to 0, or to nan.
    """
    V = V.double()
    return torch.cdist(V, V, compute_mode="donot_use_mm_for_euclid_dist")


def nc0(W: Tensor) -> float:
    """NC0 = 1/K ||W^T 1||^2: 0 where the class vectors W (K, d) sum to 0, as NC2 and NC3 together need.

    Not scale-free. (arXiv 2602.16642: SGD and Adam reach it, AdamW does not.)
    """
    return float(W.double().sum(0).square().sum() / len(W))


def equinorm(V: Tensor) -> float:
    """NC2, lengths: std / mean of the rows' norms (population std). 0 for an ETF. (Papyan et al. 2020.)"""
    norm = V.double().norm(dim=1)
    return float(norm.std(correction=0) / norm.mean())


def equiangularity(V: Tensor) -> float:
    """NC2, angles: mean over pairs of |cos + 1/(K-1)| (Papyan et al.). 0: a simplex ETF; nan: a zero row."""
    return float((_pairwise_cosines(V) + 1 / (len(V) - 1)).abs().mean())


def self_duality(W: Tensor, M: Tensor) -> float:
    """NC3: ||W/||W||_F - M/||M||_F||_F^2 for class vectors W and centred means M, both (K, d); in [0, 4]."""
    M = M.double()
    W = W.double().to(M.device)
    return float((W / W.norm() - M / M.norm()).square().sum())


def simplex_etf_distance(V: Tensor, U: Tensor | None = None) -> float:
    """||A/||A||_F - E||_F, A = V U^T (U = V if not given), E = (I - 11^T/K) / sqrt(K-1) an ETF's Gram matrix.

    V, U (K, d). NC2 in one number, lengths and angles together, of class vectors (Zhu et al. 2021; tding1's
    code) or centred means (neural-collapse package); with V = W and U = M centred it is their NC3.
    """
    V = V.double()
    A = V @ (V if U is None else U.double().to(V.device)).T
    K = len(A)
    E = (torch.eye(K, dtype=A.dtype, device=A.device) - 1 / K) / (K - 1) ** 0.5
    return float((A / A.norm() - E).norm())


def nearest_mean(h: Tensor, M: Tensor) -> Tensor:
    """argmin_k ||h - mu_k|| of each feature h (N, d), means M (K, d), (N,)."""
    M = M.to(metric_device(h.device), torch.float64)
    centre = M.mean(0)  # products lose digits far from the origin: centre first
    V = M - centre
    half = V.square().sum(1) / 2  # ||h - mu||^2 / 2 = ||h||^2 / 2 - h.mu + ||mu||^2 / 2, h and mu centred
    return torch.cat([((x - centre) @ V.T - half).argmax(1) for (x,) in chunks(h)])


def nearest_mean_mismatch(h: Tensor, prediction: Tensor, M: Tensor) -> float:
    """NC4: share of features h (N, d) whose nearest class mean, of M (K, d), is not the prediction (N,)."""
    nearest = nearest_mean(h, M)
    return float((nearest != prediction.to(nearest.device)).double().mean())


def collapse_metrics(h: Tensor, y: Tensor, W: Tensor, prediction: Tensor, few: Tensor) -> dict[str, float]:
    """All of NC1..NC4 and minority collapse for features h (N, d), labels y, class vectors W (K, d)."""
    sums = class_sums(h, y, len(W))
    spread, rank = nc1(h, y, sums)
    M = sums.centred
    return {
        "nc1": spread,
        "nc1_rank": rank,
        "nc2_equinorm_M": equinorm(M),
        "nc2_equinorm_W": equinorm(W),
        "nc2_equiangular_M": equiangularity(M),
        "nc2_equiangular_W": equiangularity(W),
        "nc3": self_duality(W, M),
        "nc4": nearest_mean_mismatch(h, prediction, sums.mean),
        "minority_cosine_M": mean_pairwise_cosine(M, few.to(M.device)),
        "minority_cosine_W": mean_pairwise_cosine(W, few.to(W.device)),
    }


def zero_mean_metrics(means: Tensor, W: Tensor | None = None) -> dict[str, float]:
    """Zero-mean neural collapse (ZNC): NC2 and NC3 with the origin in the place of the global mean.

    means (K, d) class means, not centred, W (K, d) class vectors or None. All are 0 where the means have one
    length, are orthogonal and point along W, as under a fixed non-negative orthogonal classifier:
        znc_equinorm       std / mean of the means' norms
        znc_mean_cosine    mean over pairs of |cos|; znc_max_cosine: the largest
        znc_cosine_spread  std over pairs of cos
        znc_alignment      ||W/||W||_F - M/||M||_F||_F^2, in [0, 4]; only where W is given
    Centre and target are those of the thesis abstract (Kim, part 2). Its released code (znc_utils.py) differs
    in three places: stds are the sample's (norms: larger by sqrt(K/(K-1))); cosines are averaged with their
    sign, so that they cancel; (Z)NC1 averages the classes' covariances, where nc1 pools samples (on a long
    tail 6 to 8% apart).
    A mean at the origin has no angle: the cosines are nan. Raises ValueError for fewer than two classes.
    """
    K = len(means)
    if K < 2:
        raise ValueError(f"zero_mean_metrics: {K} class, and an angle needs two")
    C = _pairwise_cosines(means)
    result = {
        "znc_equinorm": equinorm(means),
        "znc_mean_cosine": float(C.abs().mean()),
        "znc_max_cosine": float(C.abs().max()),
        "znc_cosine_spread": float(C.std(correction=0)),
    }
    return result if W is None else {**result, "znc_alignment": self_duality(W, means)}


# Generalized neural collapse (GNC, Liu et al. 2023): for any K and d the directions are spread as evenly as
# they can be, of which the simplex ETF is the case K <= d + 1. All below take the rows' directions only.


def riesz_energy(V: Tensor, s: float = 0.0) -> float:
    """Mean over pairs of sign(s) r^-s, or of log(1/r) for s = 0; r = ||v_i - v_j|| of unit rows of V (K, d).

    Lower is more uniform; inf where two directions are equal. The released s = d - 2 underflows for d = 512.
    """
    r = _pairs(distances(unit(V)))
    if s == 0:
        return float(-r.log().mean())
    return math.copysign(1, s) * float((r**-s).mean())


def _angles(V: Tensor) -> Tensor:
    """Angles in degrees between all pairs of rows of V (K, d), (K (K-1) / 2,)."""
    V = unit(V)
    # angle = 2 atan(||a - b|| / ||a + b||): acos loses half of the digits at 0 and 180 degrees
    apart = _pairs(distances(V))
    both = _pairs(torch.cdist(V, -V, compute_mode="donot_use_mm_for_euclid_dist"))
    return torch.rad2deg(2 * torch.atan2(apart, both))


def smallest_angle(V: Tensor) -> float:
    """Smallest angle between two rows of V (K, d), in degrees; arccos(-1/(K-1)) for a simplex ETF."""
    return float(_angles(V).min())


def minority_angle(V: Tensor, classes: Tensor) -> float:
    """Mean angle between the rows `classes` of V, in degrees; 0 at minority collapse. nan for < 2."""
    return float(_angles(V[classes]).mean())


def _nearest_point(D: Tensor, tolerance: float, steps: int) -> tuple[float, float]:
    """Distance of 0 from the convex hull of the rows of D (n, d), and how far off it is at most.

    Wolfe's algorithm (1976): w, the weights of some rows, is made exact on them; the rows that reach farthest
    towards 0 join, twice as many each time that helps; on the way to the new weights the first to become 0
    drops out. The point u = sum_j w_j D_j certifies itself: ||u|| is above the distance, and
    min_j <D_j, u/||u||> below it.
    """
    rows = D.norm(dim=1).argmin()[None]
    u = D[rows[0]]
    w = u.new_ones(1)
    upper = u.norm()
    gap = u.norm()
    joining = 1
    for _ in range(steps):
        if gap <= tolerance:
            break
        G = D[rows] @ D[rows].T
        G.diagonal().add_(1e-15 * G.diagonal().max())
        exact = torch.cholesky_solve(torch.ones_like(w)[:, None], torch.linalg.cholesky_ex(G).L)[:, 0]
        exact /= exact.sum()
        if exact.min() < 0:
            w += (w / (w - exact))[exact < 0].min() * (exact - w)
            rows = rows[w > 1e-14]
            w = w[w > 1e-14]
            continue
        w = exact
        u = w @ D[rows]
        joining = 2 * joining if u.norm() < upper else 1
        upper = u.norm()
        reach = D @ u / upper
        gap = upper - reach.min().clamp(0, upper)
        room = min(joining, D.shape[1] + 1 - len(rows), len(D))
        new = reach.topk(max(room, 1), largest=False).indices
        new = new[(reach[new] < upper - tolerance) & ~torch.isin(new, rows)]
        rows = torch.cat([rows, new])
        w = torch.cat([w, w.new_zeros(len(new))])
    return float(upper), float(gap)


def one_vs_rest_distance(V: Tensor, tolerance: float = 1e-8, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """Distance of each row's direction from the convex hull of the others', and how far off it is at most.

    V (K, d) -> (K,), (K,) float64; nan if a row is 0. By duality the margin max_h min_j <w_k - w_j, h> over
    unit h (Jiang et al. 2024). K/(K-1) for K <= d + 1 at best, 1 for d + 2 <= K <= 2d, 1 - cos(2 pi/K) for
    d = 2. A thousand classes take up to a minute.
    """
    V = unit(V)
    K, d = V.shape
    if K < 2:
        raise ValueError(f"one_vs_rest_distance: {K} class has no rest")
    if V.isnan().any():
        return V.new_full((K,), math.nan), V.new_full((K,), math.nan)
    if d > K:
        V = torch.linalg.qr(V.T).R.T  # the same angles in K dimensions
    rows = tqdm(range(K), desc="one-vs-rest distance", leave=False, disable=None if K > 200 else True)
    found = [_nearest_point(torch.cat([V[:k], V[k + 1 :]]) - V[k], tolerance, steps) for k in rows]
    distance, gap = torch.tensor(found, dtype=V.dtype, device=V.device).T
    return distance, gap


def generalized_metrics(V: Tensor) -> dict[str, float]:
    """GNC2 of class vectors or centred means V (K, d): energies, smallest angle and distance."""
    distance, gap = one_vs_rest_distance(V)
    worst = distance.argmin()
    return {
        "gnc_log_energy": riesz_energy(V, 0),
        "gnc_riesz1_energy": riesz_energy(V, 1),
        "gnc_riesz2_energy": riesz_energy(V, 2),
        "gnc_smallest_angle": smallest_angle(V),
        "gnc_one_vs_rest": float(distance[worst]),
        "gnc_one_vs_rest_gap": float(gap[worst]),
    }


def gnc3(W: Tensor, M: Tensor) -> float:
    """GNC3: mean over classes of 1 - cos(w_k, mu_k - mu_G); class vectors and centred means, (K, d)."""
    return float(1 - (unit(W).to(M.device) * unit(M)).sum(1).mean())


def clustering_agreement(cluster, y) -> dict[str, float]:
    """How well clusters (N,) agree with classes y (N,); all 1 for the same partition, whatever the numbering.

    purity: samples in the majority class of their cluster; nmi: mutual information over the mean entropy;
    ari: Rand index, 0 by chance; matched: right under the best one-to-one assignment of clusters to classes.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    cluster = np.asarray(cluster)
    y = np.asarray(y)
    table = contingency_matrix(y, cluster)  # (classes, clusters)
    best = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "purity": float(table.max(0).sum() / len(y)),
        "nmi": float(normalized_mutual_info_score(y, cluster)),
        "ari": float(adjusted_rand_score(y, cluster)),
        "matched": float(best / len(y)),
    }


# %% ----------------------------------------------------------------------------------------------- Theory


class Claims:
    """The table of a theory check: claim, theory, measured, error, tolerance, ok; one line per claim."""

    def __init__(self):
        self.passed: list[bool] = []
        torch.set_num_threads(1)  # on small matrices more of them only wait for each other
        print(f"{'claim':<66}{'theory':>9}{'measured':>10}{'error':>9}{'tolerance':>10}  ok")

    def equal(self, claim: str, theory: float, measured: float, tolerance: float) -> None:
        """Holds where |measured - theory| <= tolerance."""
        self._line(claim, theory, measured, abs(measured - theory), tolerance)

    def at_most(self, claim: str, bound: float, measured: float, tolerance: float = 0.0) -> None:
        """Holds where measured <= bound + tolerance."""
        self._line(claim + ", at most", bound, measured, max(measured - bound, 0.0), tolerance)

    def at_least(self, claim: str, bound: float, measured: float, tolerance: float = 0.0) -> None:
        """Holds where measured >= bound - tolerance."""
        self._line(claim + ", at least", bound, measured, max(bound - measured, 0.0), tolerance)

    def _line(self, claim: str, theory: float, measured: float, error: float, tolerance: float) -> None:
        ok = bool(error <= tolerance)  # nan is no success
        self.passed.append(ok)
        numbers = f"{theory:>9.4f}{measured:>10.4f}{error:>9.1e}{tolerance:>10.1e}"
        print(f"{claim:<66}{numbers}  {'yes' if ok else 'NO'}")

    def report(self, figure: Path) -> dict:
        """Print the summary; {"ok": whether all claims hold, ...}, what a script's main returns."""
        print(f"{sum(self.passed)} of {len(self.passed)} claims hold; figure: {figure}")
        return {"ok": all(self.passed), "claims": len(self.passed), "folder": str(figure.parent)}


def minimise(loss, *start: Tensor, steps: int = 200) -> list[Tensor]:
    """Where loss(*tensors) is least, by full-batch L-BFGS with a strong Wolfe line search from `start`."""
    x = [s.clone().requires_grad_() for s in start]
    # stop on the gradient alone: near a threshold the loss is flat long before the solution is right
    limits = {"max_iter": steps, "history_size": 20, "tolerance_grad": 1e-9, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(x, line_search_fn="strong_wolfe", **limits)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(*x)
        value.backward()
        return value

    optimizer.step(closure)
    return [v.detach() for v in x]


def locate(holds, inside: float, outside: float) -> float:
    """The edge of the region in which holds(x) is true, between inside and outside, by bisection of log x."""
    for _ in range(4):
        middle = math.sqrt(inside * outside)
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return math.sqrt(inside * outside)


# %% -------------------------------------------------------------------------------------------------- Run
# Several GPUs: torchrun starts one process (a rank) per GPU. Every rank draws the whole epoch from the same
# generator and trains on its own slice of each batch. Rank 0 alone tests, prints and writes.


def ranks() -> tuple[int, int]:
    """Under torchrun, which of how many processes this is: (rank, number). (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device: torch.device) -> torch.device:
    """This rank's own device, after meeting the other ranks. Raises UserError for fewer GPUs than ranks."""
    if ranks()[1] == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        gpus = torch.cuda.device_count()
        if device.index >= gpus:
            raise UserError(f"torchrun: more processes than GPUs, {gpus}; lower --nproc-per-node")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        wait = datetime.timedelta(days=1)  # the others wait while rank 0 reads data, tests and draws
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return device


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Runs the block on rank 0, then on the others, which find what it downloaded or wrote."""
    rank, number = ranks()
    if rank:
        dist.barrier()
    yield
    if number > 1 and not rank:
        dist.barrier()


# Flags. argparse types do the checking.


def _number(kind: type, holds, expected: str):
    def number(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return value

    number.__name__ = "whole number" if kind is int else "number"  # argparse: invalid number value: 'x'
    return number


positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to 1, 1 not included")


def at_least(least: int, most: int = 2**63 - 1):
    """argparse type: a whole number from least to most."""
    limit = "" if most == 2**63 - 1 else f", {most} or less"
    return _number(int, lambda value: least <= value <= most, f"{least} or more{limit}")


def a_path(text: str) -> Path:
    """argparse type: a path, with ~ for the home folder."""
    return Path(text).expanduser()


class Arguments(argparse.ArgumentParser):
    """The flags of a script: `add` the chapter's own, then `parse`; the shared ones are there already.

    script: its name without .py. methods: {name: what it is, in a clause}. recipes: the defaults that depend
    on the data set, {data set: {flag: value}}, "" for every other one: {"": {"epochs": 200}, "digits": ...}.
    defaults: of shared flags, where the script's differ.
    """

    def __init__(
        self, script: str, about: str, methods: dict[str, str], default: list[str], recipes: dict, **defaults
    ):
        width = max(map(len, methods))
        listed = [f"  {name:<{width}}  {what}" for name, what in {**methods, "all": "all of them"}.items()]
        layout = argparse.RawDescriptionHelpFormatter
        epilog = "\n".join(["methods:", *listed])
        super().__init__(f"{script}.py", None, about, epilog, formatter_class=layout, allow_abbrev=False)
        self.script = script
        self.methods = list(methods)
        self.recipes = recipes
        self.defaults = {"method": default, **defaults}
        self.add = self._group("of this chapter")  # first in --help
        self._add_shared()

    def _group(self, title: str):
        """add_argument of a group, which shows the default in the help: `(default: 200; digits 30)`."""
        group = self.add_argument_group(title)

        def add(name: str, *, help: str, **options) -> None:
            flag = name[2:].replace("-", "_")
            if flag in self.defaults:
                options["default"] = self.defaults[flag]
            default = options.get("default")
            words = default if isinstance(default, list) else [default]
            shown = "" if default in (None, False) else " ".join(map(str, words))
            recipes = {key: values[flag] for key, values in self.recipes.items() if flag in values}
            if recipes:  # `parse` fills it in
                options["default"] = None
                shown = "; ".join(f"{key} {value}".strip() for key, value in recipes.items())
            group.add_argument(name, help=f"{help} (default: {shown})" if shown else help, **options)

        return add

    def _add_shared(self) -> None:
        add = self._group("training")
        names = [*self.methods, "all"]
        add("--method", nargs="+", choices=names, metavar="M", help="one or more, see below")
        add("--epochs", type=at_least(1), help="passes over the training images")
        add("--batch-size", type=at_least(2), help="images per step")
        add("--lr", type=positive, help="peak learning rate")
        add("--weight-decay", type=fraction, help="on all parameters")
        seed = at_least(0, 2**32 - 1)
        add("--seed", type=seed, nargs="+", default=[0], help="one or more; of weights, order and crops")
        add("--eval-every", type=at_least(1), default=1, help="epochs from test to test; the last is tested")
        add = self._group("data")
        names = f"{', '.join(SPECS)}, folder:PATH; with lt long-tailed: cifar10lt"
        add("--dataset", default="digits", help=names)
        add("--data-dir", type=a_path, default=Path("data"), help="where NAME.npz is kept and downloads go")
        add("--imbalance", type=positive, default=100.0, help="lt: largest class over smallest")
        add("--profile", choices=["exp", "step"], default="exp", help="lt: shape of the long tail")
        add("--image-size", type=at_least(1), default=32, help="folder: pixels")
        add("--test-share", type=fraction, default=0.0, help="folder without train/, test/: to test on")
        add = self._group("run")
        where = f"run folders go to OUT/{self.script}/DATASET/METHOD/seedS"
        add("--out", type=a_path, default=Path("runs"), help=where)
        add("--overwrite", action="store_true", help="train anew what is there, instead of going on with it")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
        precisions = ["auto", "fp32", "bf16"]
        add("--precision", choices=precisions, default="auto", help="inside the network; auto: bf16 if fast")
        add("--compile", action="store_true", help="torch.compile the network; records CUDA graphs")
        add("--dry-run", action="store_true", help="two steps of everything, into OUT/dry-run")
        add("--synthetic", action="store_true", help="check the theory; trains no network")

    def error(self, message: str):
        raise UserError(message)  # one line instead of the usage text; command_line makes it exit code 2

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The flags, defaults by data set filled in, with `folder`: OUT/SCRIPT/DATASET. Raises UserError."""
        args = self.parse_args(argv)
        base, _, _ = split_name(args.dataset)
        for flag, value in (self.recipes[""] | self.recipes.get(base, {})).items():
            if getattr(args, flag) is None:
                setattr(args, flag, value)
        args.method = self.methods if "all" in args.method else list(dict.fromkeys(args.method))
        args.seed = list(dict.fromkeys(args.seed))
        if args.dry_run:
            args.epochs = 1
            args.overwrite = True
            args.out = args.out / "dry-run"
        args.script = self.script
        args.folder = args.out / self.script / re.sub(r"[^\w.,+-]+", "-", args.dataset)
        return args


def prepare_data(args: argparse.Namespace, per_class: int = 0) -> Dataset:
    """The data that --dataset names; prints what and where, settles args.device and args.precision.

    per_class: so many images of each class stay in a dry run, where two batches have fewer.
    """
    least = 2 * ranks()[1]  # BatchNorm needs two images in each process
    if args.batch_size < least:
        raise UserError(f"--batch-size {args.batch_size}: for {ranks()[1]} processes, {least} or more")
    args.device = join_ranks(pick_device(args.device))
    args.precision = pick_precision(args.precision, args.device)
    options = {key: getattr(args, key) for key in ("imbalance", "profile", "image_size", "test_share")}
    with first_rank_first():  # which may have to download
        data = load_dataset(args.dataset, args.data_dir, **options)
    if args.dry_run:
        data = cut_for_dry_run(data, max(args.batch_size, per_class * len(data.classes)))
    if args.device.type == "cpu" and data.train_x.shape[1] <= 16:
        torch.set_num_threads(1)  # on 8 x 8 images more of them only wait for each other
    n = data.counts
    sizes = f"{len(data.train_y):,} training images ({n.max()} to {n.min()} per class)"
    print(f"{args.dataset}: {len(n)} classes, {sizes}, {len(data.test_y):,} test images")
    print(f"{hardware(args.device)}, {args.precision}; into {args.folder}")
    return data


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: not available here; use --device auto")
    if name == "cuda":
        torch.backends.cudnn.benchmark = True  # batches come in few shapes: let cuDNN try its algorithms
    return torch.device(name)


def _cpu_info() -> str:
    """What Linux knows of the processor; empty elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where hardware multiplies it fast (CUDA; CPUs with AMX or AVX512-BF16), else fp32."""
    if name != "auto":
        return name
    fast = device.type == "cpu" and {"amx_bf16", "avx512_bf16"} & set(_cpu_info().split())
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    return "bf16" if fast else "fp32"


def hardware(device: torch.device) -> str:
    """What the run ran on, in words, for config.json and for tables."""
    times = f"{ranks()[1]} x " if ranks()[1] > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*:\s*(.+)", _cpu_info())
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{times}{model}, {torch.get_num_threads()} threads"


def _git_commit(folder: Path) -> str:
    """The commit of the code that runs, with + where files differ from it; `unknown` outside a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_atomically(path: Path, write, shared: bool = False) -> None:
    """write(part) fills a temporary file beside path, which is then renamed: path is whole or not there.

    The temporary file has the same name each time, so that the next write removes what a kill left behind;
    shared: a name of this process's own, for a path that another process may be writing at the same moment.
    Raises UserError where it cannot be written (a full disk). Under torchrun only rank 0 writes.
    """
    if ranks()[0]:
        return
    own = f"{os.getpid()}." if shared else ""
    part = path.with_name(f".{path.name}.{own}part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        instead = "free space, or choose another --out or --data-dir"
        raise UserError(f"{path}: cannot be written ({reason}); {instead}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def to_json(content, **layout) -> str:
    """Strict JSON, which knows no nan and no infinity: both become null."""
    text = json.dumps(content, **layout)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), **layout)


def from_json(text: str, null=math.nan) -> dict:
    """What to_json wrote of a dict, with nan for null. Raises ValueError for anything else."""

    def read(value):
        if isinstance(value, dict):
            return {key: read(v) for key, v in value.items()}
        if isinstance(value, list):
            return [read(v) for v in value]
        return null if value is None else value

    content = read(json.loads(text))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _epochs_from_json(text: str) -> list[dict]:
    lines = [from_json(line) for line in text.splitlines()]
    if [line.get("epoch") for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError("its epochs are not 1, 2, 3, ...")
    return lines


class Run:
    """One run folder, OUT/SCRIPT/DATASET/METHOD/seedS: what was run, how it went, and where to go on.

        config.json     flags, data, commit, versions, hardware   source.py       the script as it was run
        metrics.jsonl   one line per epoch                        result.json     the end; there when finished
        checkpoint.pt   tensors, numbers, generator states        features.npz    what nc_metrics.py reads

    Run(folder) reads what is there: `config`, `history` (the lines), `finished` (the result, or None). To
    train, take `open_run`. Raises UserError for a damaged file.
    """

    FILES = ("result.json", "checkpoint.pt", "metrics.jsonl", "features.npz", "source.py", "config.json")

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = self._read("config.json", lambda text: from_json(text, null=None))  # flags not given
        self.finished = self._read("result.json", from_json)
        self.name = self.finished.get("method") if self.finished else None
        self.history = self._read("metrics.jsonl", _epochs_from_json) or []

    def _read(self, name: str, parse):
        path = self.folder / name
        try:
            return parse(path.read_text()) if path.exists() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable ({error}); --overwrite it, or another --out") from None

    def _write(self, name: str, write) -> None:
        write_atomically(self.folder / name, write)

    @property
    def fused(self) -> bool | None:
        """For an optimiser: one kernel for all parameters on CUDA; elsewhere PyTorch chooses."""
        return True if self.device.type == "cuda" else None

    def autocast(self) -> torch.autocast:
        """bf16 inside the network, where --precision says so."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16")

    def prepare(self, model: torch.nn.ModuleDict) -> list[torch.nn.Module]:
        """The model's parts as training calls them. Speed only: --compile, and torchrun's several GPUs.

        Gradients are averaged over the ranks, exactly: every rank has an equal share of a batch. On CUDA
        BatchNorm's statistics are those of the whole batch, on a CPU, which has no such layer, of the share.
        """
        if ranks()[1] > 1 and self.device.type == "cuda":
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place, under the same names
        parts = list(model.values())
        if ranks()[1] > 1:
            for i, part in enumerate(parts):
                if any(p.requires_grad for p in part.parameters()):
                    parts[i] = torch.nn.parallel.DistributedDataParallel(part)
        if self.args.compile:
            parts[0] = torch.compile(parts[0], mode="reduce-overhead")  # records CUDA graphs
        return parts

    def epochs(self, total: int, **parts) -> Iterator[int]:
        """Each epoch still to be trained, from 0; after its body its line and checkpoint are written.

        parts: what changes in training and is needed to go on: modules, optimisers, generators, tensors,
        anything with state_dict and load_state_dict. They are restored before the first epoch. Raises
        UserError for a loss that is not finite.
        """
        first = self._restore(parts)
        self.total = total
        hide = True if ranks()[0] else None  # None: no bar where there is no terminal
        bar = tqdm(range(first, total), initial=first, total=total, desc=self.title, disable=hide)
        for epoch in bar:
            began = time.perf_counter()
            self.losses = []
            self.line = {}
            yield epoch
            line = {"epoch": epoch + 1, "loss": self._mean_loss(epoch), **self.line}
            line["seconds"] = time.perf_counter() - began
            self.history.append(line)
            text = "".join(to_json(entry) + "\n" for entry in self.history)
            self._write("metrics.jsonl", lambda part, text=text: part.write_text(text))
            self._save(epoch + 1, parts)
            bar.set_postfix({key: f"{line[key]:.3f}" for key in ("loss", "accuracy") if key in line})
            minutes = line["seconds"] * (total - first - 1) / 60
            if epoch == first and bar.disable and minutes > 1:
                print(f"{self.title}: about {minutes:.0f} more minutes", flush=True)

    def is_test_epoch(self, epoch: int) -> bool:
        """Every --eval-every epochs, and after the last one. Under torchrun rank 0 tests, the others wait."""
        last = epoch + 1 == self.total
        return not ranks()[0] and (last or (epoch + 1) % self.args.eval_every == 0)

    def add_loss(self, loss: Tensor) -> None:
        """Keep a step's loss on the device; it is read once per epoch, so that no step waits for the host."""
        self.losses.append(loss.detach())

    def log(self, **numbers: float) -> None:
        """Add numbers to this epoch's line of metrics.jsonl."""
        self.line |= numbers

    def _mean_loss(self, epoch: int) -> float:
        losses = torch.stack(self.losses)
        if ranks()[1] > 1:
            dist.all_reduce(losses)
            losses /= ranks()[1]
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).nonzero()[0]) + 1
            kept = f"epoch {epoch}, {self.folder / 'checkpoint.pt'}" if epoch else "none"
            raise UserError(
                f"{self.title}: the loss is not finite in epoch {epoch + 1}, step {step}; lower --lr and "
                f"--overwrite. Last good checkpoint: {kept}"
            )
        return float(losses.mean())

    def _restore(self, parts: dict) -> int:
        """Load the last checkpoint into parts; how many epochs are done. The history is cut back to it."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            self.history = []
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no code
            epoch = state["epoch"]
            torch.set_rng_state(state["rng"])  # dropout draws from torch's own generator
            for name, part in parts.items():
                if isinstance(part, Tensor):
                    part.copy_(state[name])
                else:
                    load = "set_state" if isinstance(part, torch.Generator) else "load_state_dict"
                    getattr(part, load)(state[name])
        except Exception as error:  # torch raises many kinds for a damaged file; to the user they are one
            reason = type(error).__name__
            raise UserError(f"{path}: not a readable checkpoint ({reason}); --overwrite it") from None
        self.history = self.history[:epoch]
        print(f"{self.title}: goes on after epoch {epoch}")
        return epoch

    def _save(self, epoch: int, parts: dict) -> None:
        state = {"epoch": epoch, "rng": torch.get_rng_state()}
        for name, part in parts.items():
            get = "get_state" if isinstance(part, torch.Generator) else "state_dict"
            state[name] = part if isinstance(part, Tensor) else getattr(part, get)()
        self._write("checkpoint.pt", lambda part: torch.save(state, part))

    def save_features(self, **arrays: Tensor) -> None:
        """features.npz: train_h (N, d), train_y, test_h, test_y, W (K, d), as numpy arrays."""
        as_numpy = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        self._write("features.npz", lambda part: np.savez(part, **as_numpy))

    def load_features(self) -> dict[str, np.ndarray]:
        """What save_features wrote. Raises UserError where the file is missing or damaged."""
        path = self.folder / "features.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except Exception as error:  # zip, zlib and the header's parser raise many kinds
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(f"{path}: not readable ({reason}); --overwrite the run") from None

    def finish(self, measured: dict) -> dict:
        """Write result.json, last of all: its being there means that the run is whole. Returns the result."""
        result = {"method": self.name, "seed": self.seed, "epochs": len(self.history)}
        tested = [line["accuracy"] for line in self.history if "accuracy" in line]
        if tested:
            result["best_accuracy"] = max(tested)
        result["seconds"] = sum(line["seconds"] for line in self.history)
        result |= measured
        with first_rank_first():
            self._write("result.json", lambda part: part.write_text(to_json(result, indent=1)))
            written = Run(self.folder)  # the other ranks have not tested
        self.history = written.history
        self.finished = written.finished
        return self.finished


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "overwrite", "synthetic", "folder", "dry_run"}
NOT_IN_CONFIG |= {"script"}


def open_run(args: argparse.Namespace, name: str, seed: int, data: Dataset, **flags) -> Run:
    """The folder of one method and seed: finished, to be gone on with, or fresh. Raises UserError.

    flags: what this run's config.json says beside, or instead of, the command line. An interrupted run goes
    on by itself, and a finished one is never redone silently; both need the flags and the data they were
    started with. --overwrite starts anew.
    """
    folder = args.folder / name / f"seed{seed}"
    about = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
    about = json.loads(to_json({**about, "method": name, "seed": seed, **flags}, default=str))
    with first_rank_first():
        if args.overwrite and not ranks()[0]:
            _clear(folder)
        run = Run(folder)
        run.args = args
        run.name = name
        run.seed = seed
        run.title = f"{name} seed {seed}"
        run.device = args.device
        started = run.finished or (folder / "checkpoint.pt").exists()
        if started and run.config is None:
            raise UserError(f"{folder}: a run without its config.json is here; --overwrite it")
        if started:
            _check_same(run, about, data)
        else:
            _describe(run, about, data)
        if run.finished:
            print(f"{run.title}: finished before; --overwrite trains it anew")
    return run


def _clear(folder: Path) -> None:
    # result first and config last: what a kill leaves behind is no finished run, nor an unknown one
    try:
        for name in Run.FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be overwritten ({error.strerror}); choose another --out") from None


def _check_same(run: Run, flags: dict, data: Dataset) -> None:
    before = run.config.get("flags", {})
    for flag in sorted((before.keys() | flags.keys()) - NOT_IN_CONFIG):
        old = before.get(flag)
        new = flags.get(flag)
        if old != new:
            name = f"--{flag.replace('_', '-')}"
            instead = f"give the same {name}, --overwrite it or choose another --out"
            raise UserError(f"{run.folder}: was run with {name} {old}, not {new}; {instead}")
    if run.config.get("data") != data.fingerprint:
        found = f"{run.config.get('data')}, not {data.fingerprint}"
        raise UserError(f"{run.folder}: was run on other data ({found}); --overwrite it or change --out")


def _describe(run: Run, flags: dict, data: Dataset) -> None:
    """Write source.py and config.json, before the first epoch."""
    source = Path(__file__).resolve().with_name(f"{run.args.script}.py")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["torchvision"] = importlib.metadata.version("torchvision")  # to import it would take seconds
    run.config = {"flags": flags, "data": data.fingerprint, "commit": _git_commit(source.parent)}
    run.config |= {"versions": versions, "hardware": hardware(run.device)}
    run._write("source.py", lambda part: shutil.copyfile(source, part))
    run._write("config.json", lambda part: part.write_text(to_json(run.config, indent=1)))


def finished_runs(args: argparse.Namespace, runs: list[Run], aside: tuple = ()) -> list[Run]:
    """Every finished run of args.folder with the flags of `runs`, but for method, seed and `aside`.

    For common figures, so that a later call with fewer methods draws no fewer curves.
    """

    def setting(run: Run) -> dict:
        flags = run.config["flags"]
        return {key: value for key, value in flags.items() if key not in {*NOT_IN_CONFIG, *aside}}

    found = [Run(path.parent) for path in sorted(args.folder.glob("*/seed*/result.json"))]
    settings = [setting(run) for run in runs]
    return [run for run in found if run.config and setting(run) in settings]


# %% ---------------------------------------------------------------------------------------------- Figures
# Colours of Okabe and Ito (2008), which the colour-blind can tell apart; the pale ones come last.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#F0E442"]


def styles(names) -> dict[str, dict]:
    """Colour and marker of each name: {name: {"color": ..., "marker": ...}}. No two of 72 names are alike."""
    markers = "os^DvPX<>"
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": markers[i % len(markers)]}
        for i, name in enumerate(names)
    }


def save_figure(path: Path, figure) -> None:
    """Write a matplotlib Figure as PNG, 200 dots per inch. Several processes may draw the same one."""
    write_atomically(Path(path), lambda part: figure.savefig(part, dpi=200), shared=True)


def curves(path: Path, points: dict[str, tuple], style: dict[str, dict], **axes) -> None:
    """One plot of lines, {name: (x, y)}, its legend beside the data; axes: xlabel, ylabel, xscale, ..."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    plot = figure.subplots()
    for name, (x, y) in points.items():
        plot.plot(x, y, label=name, markevery=max(1, len(x) // 10), **style[name])
    plot.set(**axes)
    plot.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(path, figure)


def bars(path: Path, found: dict[str, dict[str, list[float]]], style: dict[str, dict], **axes) -> None:
    """Groups of bars, {bar: {group: values over seeds}}: means, with the sample std as a whisker."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    plot = figure.subplots()
    groups = list(dict.fromkeys(group for values in found.values() for group in values))
    width = 0.8 / len(found)
    for i, (name, of_group) in enumerate(found.items()):
        x = [groups.index(group) + (i + 0.5) * width - 0.4 for group in of_group]
        mean = [np.mean(values) for values in of_group.values()]
        std = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in of_group.values()]
        plot.bar(x, mean, width, yerr=std, ecolor="0.5", color=style[name]["color"], label=name)
    plot.set(**axes)
    plot.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(path, figure)


def heat_maps(path: Path, maps: dict[str, np.ndarray], *, label: str, limits: tuple, diverging: bool, **axes):
    """Square maps side by side with one colour bar. diverging: red, white at 0, blue, for cosines."""
    from matplotlib.figure import Figure

    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2.8 * columns + 1.2, 2.8 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    colours = "RdBu_r" if diverging else "viridis"
    for plot in grid.flat[len(maps) :]:
        plot.axis("off")
    for plot, (name, values) in zip(grid.flat, maps.items(), strict=False):
        image = plot.imshow(values, cmap=colours, interpolation="nearest", vmin=limits[0], vmax=limits[1])
        plot.set(title=name, **axes)
    figure.colorbar(image, ax=grid, label=label)
    save_figure(path, figure)


def mean_std(values: list[float], digits: int = 2, factor: float = 1.0) -> str:
    """`34.20 ± 0.31` over seeds (sample std); one value stands alone, and what is not defined is `-`."""
    values = [factor * v for v in values]
    if np.isnan(values).any():
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def table(header: list[str], rows: list[list]) -> str:
    """Columns aligned for the terminal: text left, numbers right."""
    cells = [header, *([str(c) for c in row] for row in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * w for w in width])
    lines = []
    for first, *others in cells:
        numbers = [c.rjust(w) for c, w in zip(others, width[1:], strict=True)]
        lines.append("  ".join([first.ljust(width[0]), *numbers]).rstrip())
    return "\n".join(lines)


def command_line(main) -> None:
    """Run main() and exit: 0, 1 after a failed claim, 2 after bad input (one line), 130 after Ctrl-C.

    Does nothing in a notebook, where main(["--method", "ce"]) is called and returns results and folder.
    """
    if "ipykernel" in sys.modules:
        print('in a notebook: result = main(["--epochs", "5"])')
        return
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    script = Path(sys.argv[0]).name
    try:
        result = main()
    except UserError as error:
        time.sleep(5 if ranks()[0] else 0)  # a rank that is still alive then has failed alone, so it reports
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        print(f"\ninterrupted; the same command{without} goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        time.sleep(5 if ranks()[0] else 0)  # torchrun ends it before, where rank 0 has failed first
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(1 if result.get("ok") is False else 0)
