"""What every chapter shares: data, metrics, the bookkeeping of a run. It knows no model, loss or method.

Five parts, each under a banner: Data, Metrics, Theory, Run, Figures. Symbols, here and in every script: K
classes, d feature dimension, N samples, B batch, n_k images of class k, h features (row vectors), W class
vectors (K, d), M class means (K, d).
"""

import argparse
import codecs
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
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


class UserError(Exception):
    """Something only the user can fix. The scripts print it as one line on stderr and exit with code 2."""


# %% ------------------------------------------------------------------------------------------------- Data

SPECS = {  # K, (H, W, C), padding of the random crop, mirrored left-right?
    "digits": (10, (8, 8, 1), 1, False),
    "mnist": (10, (28, 28, 1), 2, False),
    "fashionmnist": (10, (28, 28, 1), 4, True),
    "cifar10": (10, (32, 32, 3), 4, True),
    "cifar100": (100, (32, 32, 3), 4, True),
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
    pad: int  # of the random crop
    flip: bool
    fingerprint: str  # another one where an image, a label or a class name differs
    profile: str = ""  # of a long tail: exp or step

    @property
    def counts(self) -> Tensor:
        """n_k: training images of each class, (K,)."""
        return torch.bincount(self.train_y, minlength=len(self.classes))

    @property
    def groups(self) -> dict[str, Tensor]:
        """The classes with many, medium and few training images."""
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
    raise UserError(f"--dataset {name}: expected {', '.join(SPECS)}, folder:PATH, or cifar100lt")


def load_dataset(
    name: str, data_dir: str | Path = "data", *, imbalance=100.0, profile="exp", image_size=32, test_share=0.0
) -> Dataset:
    """Data set by name, a key of SPECS or folder:PATH; with `lt` long-tailed. Raises UserError.

    A folder: PATH/train/CLASS/IMAGE and PATH/test, or PATH/CLASS/IMAGE and a test_share.
    """
    base, long_tailed, path = split_name(name)
    if test_share and base != "folder":
        raise UserError(f"--test-share {test_share:g}: {base} needs none")
    folder = base == "folder"
    arrays = _read_folder(Path(path).resolve(), image_size, test_share) if folder else _read(base, data_dir)
    classes = arrays["classes"]
    checksum = zlib.crc32("\n".join(classes).encode())
    for key in ("train_x", "train_y", "test_x", "test_y"):
        checksum = zlib.crc32(arrays[key].numpy(), checksum)
    sizes = f"{len(arrays['train_y'])}+{len(arrays['test_y'])} images, {len(classes)} classes"
    parts = [part.flatten(0, 2) for part in arrays["train_x"].split(100)]  # in float64
    pixels = arrays["train_x"][..., 0].numel()
    mean = sum(part.double().sum(0) for part in parts) / pixels / 255  # (C,)
    square = sum(part.double().square().sum(0) for part in parts) / pixels / 255**2
    std = (square - mean.square()).clamp_min(1e-6).sqrt()  # never 0
    pad, flip = (image_size // 8, True) if folder else SPECS[base][2:]
    rest = {"pad": pad, "flip": flip, "fingerprint": f"{sizes}, {checksum:08x}"}
    data = Dataset(**arrays, mean=mean.float(), std=std.float(), **rest)
    if len(classes) < 2:
        raise UserError(f"--dataset {name}: its only class is {classes[0]}; expected two")
    if data.counts.min() == 0:
        raise UserError(f"--dataset {name}: class {classes[data.counts.argmin()]} has no training image")
    if not long_tailed:
        return data
    subset = long_tail_subset(data.train_y, len(classes), imbalance, profile, by_count=folder)
    data = keep(data, subset)._replace(profile=profile)
    n = data.counts
    ratio = float(n.max() / n.min())
    if abs(ratio / imbalance - 1) > 0.1:
        print(f"{name}: imbalance {ratio:.4g}, not {imbalance:g}", file=sys.stderr)
    return data


def _read(name: str, data_dir: str | Path) -> dict:
    """The fields of a named data set: embedded, from DATA_DIR/NAME.npz, or through torchvision there."""
    K, shape = SPECS[name][:2]
    kept = Path(data_dir, f"{name}.npz")
    try:
        if name != "digits" and kept.exists():
            arrays = dict(np.load(kept, allow_pickle=False))  # never unpickles: that could run any code
        else:
            arrays = _read_digits() if name == "digits" else _read_torchvision(name, data_dir)
        fields = {"classes": tuple(arrays["classes"].astype(str).tolist())}
        for x_name, y_name in (("train_x", "train_y"), ("test_x", "test_y")):
            x = arrays[x_name]
            y = arrays[y_name]
            images = x.dtype == np.uint8 and x.shape == (len(y), *shape)
            labels = y.dtype.kind in "iu" and y.ndim == 1 and len(y) and 0 <= y.min() and y.max() < K
            if not images or not labels or len(fields["classes"]) != K:
                wrong = f"{x_name} {x.shape} {x.dtype}, {y_name} {y.shape} {y.dtype}"
                raise ValueError(f"{wrong}; expected (N, *{shape}) uint8, labels below {K}")
            fields[x_name] = torch.from_numpy(np.ascontiguousarray(x))
            fields[y_name] = torch.from_numpy(y.astype(np.int64))
        return fields
    except Exception as error:  # parsers raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        where = kept if kept.exists() else f"--dataset {name}: no {kept}"
        remedy = "delete or replace it" if kept.exists() else "connect to a network"
        raise UserError(f"{where}: cannot be read ({reason}); {remedy}") from error


def _read_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, split once and for all into 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    keys = ("train_x", "test_x", "train_y", "test_y")
    arrays = zip(keys, train_test_split(x, y, test_size=360, stratify=y, random_state=0), strict=True)
    return dict(arrays, classes=np.arange(10))


def _read_torchvision(name: str, data_dir: str | Path) -> dict[str, np.ndarray]:
    """Through torchvision, which downloads what is missing and opens CIFAR's pickles after checking MD5s."""
    from torchvision import datasets

    kind = next(getattr(datasets, kind) for kind in datasets.__all__ if kind.lower() == name)
    arrays = {}
    for split in ("train", "test"):
        with contextlib.redirect_stdout(sys.stderr):  # its progress does not belong to our output
            data = kind(data_dir, train=split == "train", download=True)
        x = np.asarray(data.data)  # MNIST: (N, H, W), CIFAR: (N, H, W, C)
        arrays[f"{split}_x"] = x.reshape(*x.shape[:3], -1)
        arrays[f"{split}_y"] = np.asarray(data.targets)
    return dict(arrays, classes=np.array(data.classes))


def _read_folder(path: Path, size: int, test_share: float) -> dict:
    """The fields of a Dataset from PATH/train/CLASS/IMAGE and PATH/test, or from PATH/CLASS/IMAGE."""
    from sklearn.model_selection import train_test_split

    try:
        if (test_share > 0) == any((path / split).is_dir() for split in ("train", "test")):
            raise ValueError(f"--test-share is {test_share:g}" if path.is_dir() else "not found")
        if test_share:
            x, y, classes = _read_images(path, size)
            train, test = train_test_split(range(len(y)), test_size=test_share, stratify=y, random_state=0)
            return dict(train_x=x[train], train_y=y[train], test_x=x[test], test_y=y[test], classes=classes)
        x, y, classes = _read_images(path / "train", size)
        test_x, test_y, test_classes = _read_images(path / "test", size)
        if classes != test_classes:
            raise ValueError(f"different classes, {set(classes) ^ set(test_classes)}")
        return dict(train_x=x, train_y=y, test_x=test_x, test_y=test_y, classes=classes)
    except (OSError, ValueError) as error:  # no such folder, a class without an image, too few to split
        layout = "PATH/train/CLASS/IMAGE and PATH/test, or PATH/CLASS/IMAGE with --test-share 0.2"
        reason = " ".join(str(error).split())
        raise UserError(f"--dataset folder:{path}: {reason}; expected {layout}") from error


def _read_images(root: Path, size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 (N, size, size, 3), labels (N,) and classes of root/CLASS/IMAGE, hidden ones left out."""
    from torchvision.datasets import ImageFolder

    names = sorted(item.name for item in root.iterdir() if item.is_dir() and item.name[0] != ".")
    label = {name: k for k, name in enumerate(names)}
    visible = lambda file: f"{os.sep}." not in file.removeprefix(str(root))  # noqa: E731
    files, y = zip(*ImageFolder.make_dataset(root, label, is_valid_file=visible), strict=True)
    needed = len(files) * size * size * 3 / 2**30
    pages = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    memory = math.prod(map(os.sysconf, pages)) / 2**30 if hasattr(os, "sysconf") else 32
    if needed > memory / 4:  # the loader's padded copy needs more
        sizes = f"--image-size {size} makes {needed:.3g} GiB, of {memory:.3g}"
        raise UserError(f"--dataset folder:{root}: memory is too small: {sizes}")
    images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
    options = {"collate_fn": functools.partial(_read_image, size=size), "generator": torch.Generator()}
    workers = min(8, torch.get_num_threads(), len(files) // 1000)
    reader = iter(DataLoader(files, batch_size=None, num_workers=workers, **options))
    for i, file in enumerate(tqdm(files, "reading images", leave=False, disable=None)):
        try:
            images[i] = next(reader)
        except Exception as error:  # a worker's text begins with its traceback
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
            raise ValueError(f"more than 8 bits, {image.getextrema()}; convert it")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = TF.center_crop(TF.resize(image.convert("RGB"), size), size)
    return TF.pil_to_tensor(image).permute(1, 2, 0)


def long_tail_counts(K: int, n_max: float, imbalance: float, profile: str = "exp") -> list[int]:
    """Images per class, head first, n_max / n_min = imbalance. Raises UserError for an imbalance below 1.

    exp:  n_k = int(n_max * (1/IF)^(k/(K-1))), as in the published tables (Cui et al. 2019);
    step: the first half of the classes keeps n_max, the others get n_max / IF (Buda et al. 2018).
    """
    if not 1 <= imbalance < float("inf"):
        raise UserError(f"--imbalance {imbalance:g}: expected 1 or more")
    counts = {
        "exp": [int(n_max * (1 / imbalance) ** (k / max(K - 1, 1))) for k in range(K)],
        "step": [int(n_max) if k < K - K // 2 else int(n_max / imbalance) for k in range(K)],
    }
    return [max(n, 1) for n in counts[profile]]  # no class is left empty


def long_tail_subset(y: Tensor, K: int, imbalance: float, profile="exp", by_count: bool = True) -> Tensor:
    """Indices of a long-tailed subset of labels y (N,), class by class in label order; always the same ones.

    The head is the largest class, or with by_count=False class 0, as in the published tables. n_max is N / K.
    """
    generator = torch.Generator().manual_seed(0)
    quotas = long_tail_counts(K, len(y) / K, imbalance, profile)
    order = torch.bincount(y, minlength=K).argsort(descending=True, stable=True).tolist()
    quota = dict(zip(order if by_count else range(K), quotas, strict=True))
    subset = []
    for k in range(K):
        members = (y == k).nonzero().flatten()
        subset.append(members[torch.randperm(len(members), generator=generator)[: quota[k]]])  # all, if fewer
    return torch.cat(subset)


def keep_per_class(y: Tensor, n: int, seed: int = 0) -> Tensor:
    """Sorted indices of n images of each class, drawn at random; of a class with fewer all of them."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = order[y[order].argsort(stable=True)]  # class after class, shuffled within
    counts = torch.bincount(y)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)  # where the image's class begins
    return order[torch.arange(len(y)) - first < max(n, 1)].sort().values


# The superclass, of twenty, of each of CIFAR-100's classes in their order
COARSE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 "
    "5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 "
    "15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)


def coarse_labels(classes: tuple[str, ...], grouping: str) -> tuple[Tensor, tuple[str, ...]]:
    """The coarse label of each of K classes, (K,), and the coarse classes' names. Raises UserError.

    pairs: class k with class k + K/2, so that coarse = k mod K/2; superclasses: the twenty of CIFAR-100.
    """
    K = len(classes)
    if grouping == "superclasses":
        if (classes[0], classes[-1], K) != ("apple", "worm", 100):
            raise UserError("--coarse superclasses: only CIFAR-100 has them")
        return torch.tensor([int(k) for k in COARSE.split()]), tuple(f"superclass {k}" for k in range(20))
    if K % 2 or K < 4:
        raise UserError(f"--coarse pairs: {K} classes; expected 4, 6, 8, ...")
    names = zip(classes[: K // 2], classes[K // 2 :], strict=True)
    return torch.arange(K) % (K // 2), tuple(f"{a}+{b}" for a, b in names)


def split_tasks(K: int, tasks: int) -> Tensor:
    """The task in which each of K classes comes, in label order: (K,) int64. Sizes differ by one at most."""
    if not 1 <= tasks <= K:
        raise UserError(f"--tasks {tasks}: expected 1 to {K}, the number of classes")
    sizes = torch.tensor([len(classes) for classes in torch.arange(K).tensor_split(tasks)])
    return torch.arange(tasks).repeat_interleave(sizes)


class Batches:
    """Loader: uint8 images stay on the device, and a batch is one gather away, (B, C, H, W) float32.

    Each *draw* of an image gets a crop and flip of its own, none without a generator. An epoch's are drawn at
    once on the CPU, so that no step waits for the device.
    """

    def __init__(self, images: Tensor, mean: Tensor, std: Tensor, *, pad=0, flip=False, device="cpu"):
        self.N, self.H, self.W, self.C = images.shape
        self.pad = pad
        self.flip = flip
        self.device = torch.device(device)
        self.pixels = F.pad(images, (0, 0, pad, pad, pad, pad)).to(device).flatten(0, 2)  # (N H' W', C)
        self.rows = torch.arange(self.H, device=device)
        self.columns = torch.arange(self.W, device=device)
        # (x / 255 - mean) / std = x * scale + shift, repeated over a row so that it vectorises
        self.scale = (1 / (255 * std)).repeat(self.W).to(device)  # (W * C,)
        self.shift = (-mean / std).repeat(self.W).to(device)

    def epoch(self, index: Tensor, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """(part, x), or (part, x_0, ..., x_{m-1}) for an index (T, m); part: the slice of it that x holds."""
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
        image, top, left, mirror = (view[:, None] for view in views)  # (B, 1) each
        rows = image * (self.H + 2 * self.pad) + top + self.rows  # (B, H): of all images below each other
        cols = left + torch.where(mirror > 0, self.columns.flip(0), self.columns)  # (B, W)
        x = self.pixels[rows[:, :, None] * (self.W + 2 * self.pad) + cols[:, None]]  # (B, H, W, C)
        return torch.addcmul(self.shift, x.flatten(2).float(), self.scale).view(x.shape).permute(0, 3, 1, 2)


def split_evenly(T: int, batch_size: int, count: int | None = None) -> list[slice]:
    """ceil(T / batch_size) slices, equal to within one; sizes are multiples of count, of all processes."""
    count = count or ranks()[1]
    shares = T // count
    steps = min(-(-T // batch_size), shares)
    edges = [count * round(shares * i / steps) for i in range(steps + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


# %% ---------------------------------------------------------------------------------------------- Metrics


def accuracy_per_class(prediction: Tensor, y: Tensor, K: int) -> Tensor:
    """Share of each class's samples predicted right: prediction, y (N,) -> (K,) float64; nan: no samples."""
    right = torch.bincount(y[prediction == y], minlength=K).double()
    return right / torch.bincount(y, minlength=K)


def shot_groups(counts: Tensor, profile: str = "") -> dict[str, Tensor]:
    """Classes by training images, counts (K,): {"many": classes, "medium": ..., "few": ...}.

    One size: all many. A step: larger and smaller. Else many > 100, few < 20 (Liu et al. 2019), or, where
    either has no class, thirds. Classes of one size are never parted.
    """
    smallest, largest = counts.aminmax()
    if largest == smallest:
        group = torch.zeros_like(counts)
    elif profile == "step":
        group = 2 * (counts < (largest.double() * smallest).sqrt()).long()
    elif largest > 100 and smallest < 20:
        group = (counts <= 100).long() + (counts < 20).long()
    else:
        rank = (counts - counts[:, None]).sign().sum(1) + len(counts) - 1  # twice the mean rank of its size
        group = 3 * rank // (2 * len(counts))
        group[counts == largest] = 0
        group[counts == smallest] = 2
    return {name: (group == i).nonzero().flatten() for i, name in enumerate(("many", "medium", "few"))}


def accuracies(z: Tensor, y: Tensor, groups: dict[str, Tensor]) -> dict:
    """Accuracy of logits z (N, K) for labels y (N,): of all samples, per class, and its mean by group."""
    prediction = z.argmax(1)
    per_class = accuracy_per_class(prediction, y, z.shape[1])
    return {
        "accuracy": float((prediction == y).double().mean()),
        **{name: float(per_class[classes.to(y.device)].nanmean()) for name, classes in groups.items()},
        "per_class": per_class.tolist(),
    }


HEADS = {  # classifiers on the same features: their names in figures and tables
    "own": "own head",
    "logit_adjustment": "logit adjustment",
    "tau_normalisation": "tau-normalisation",
    "nearest_mean": "nearest class mean",
}


def heads(train_h, train_y, test_h, test_y, W, b=None, *, softmax: bool = True) -> dict[str, float]:
    """Test accuracy of trained features h (N, d) under other heads, without any training.

        own                argmax_k  w_k . h + b_k               W (K, d), b (K,)
        logit_adjustment   argmax_k  w_k . h + b_k - log n_k     at tau = 1 (Menon et al. 2021)
        tau_normalisation  argmax_k  w_k . h / ||w_k||           at tau = 1 (Kang et al. 2020)
        nearest_mean       argmin_k  ||h - mu_k||                mu_k of the training features
    softmax=False, where logits are cosines: logit_adjustment is nan.
    """
    z = logits(test_h, W, b)
    n = torch.bincount(train_y, minlength=len(W)).to(z)
    predictions = {
        "own": z.argmax(1),
        "logit_adjustment": (z - n.log()).argmax(1),
        "tau_normalisation": logits(test_h, unit(W).nan_to_num()).argmax(1),
        "nearest_mean": nearest_mean(test_h, class_means(train_h, train_y, len(W))),
    }
    y = test_y.to(z.device)
    result = {name: float((prediction == y).double().mean()) for name, prediction in predictions.items()}
    return result if softmax else {**result, "logit_adjustment": math.nan}


def task_accuracies(z: Tensor, y: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
    """class-IL and task-IL (van de Ven, Tolias 2019) of each task, (T,); z (N, K), y (N,), task (K,)."""
    task = task.to(z.device)
    which = task[y]  # (N,)
    own = z.masked_fill(which[:, None] != task, -torch.inf)  # task-IL: the task's classes compete
    T = int(task.max()) + 1
    class_il, task_il = (torch.where(score.argmax(1) == y, which, -1) for score in (z, own))  # -1: wrong
    return accuracy_per_class(class_il, which, T), accuracy_per_class(task_il, which, T)


def stream_metrics(R: Tensor) -> dict[str, float]:
    """Summary of accuracies R (T, T): R[i, j] on task j after task i; nan (no test images) is left out.

    average             1/T sum_j R[T-1, j], over all tasks at the end of the stream
    forgetting          1/(T-1) sum_{j<T-1} (max_{j<=i<T-1} R[i, j] - R[T-1, j])     Chaudhry et al. 2018
    A joint run, R (1, T), has an average only.
    """
    R = R.double()
    forgotten = [R[j:-1, j].max() - R[-1, j] for j in range(len(R) - 1)]  # below 0: the last row is best
    return {"average": float(R[-1].nanmean()), "forgetting": float(R.new_tensor(forgotten).nanmean())}


# Neural collapse. Features h (N, d) of any float type, labels y (N,); spreads are sums of differences, in
# float64. What is not defined is nan: a class without samples, dead features, values that are not finite.


def logits(h: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """z = h W^T + b, (N, K) float64, of features h (N, d), class vectors W (K, d), biases b (K,)."""
    z = h.detach().double() @ W.detach().to(h.device).double().T
    return z if b is None else z + b.detach().to(h.device).double()


def class_means(h: Tensor, y: Tensor, K: int) -> Tensor:
    """mu_k, the mean of h (N, d) over class k of y (N,): (K, d) float64; nan for a class without samples."""
    h = h.detach().double()
    y = y.to(h.device)
    total = h.new_zeros(K, h.shape[1]).index_add_(0, y, h)
    return total / torch.bincount(y, minlength=K)[:, None]


def class_sums(h: Tensor, y: Tensor, K: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Counts n_k (K,), means mu_k (K, d), v_k = mean of ||h - mu_k||^2 (K,); K: the largest label + 1."""
    h = h.detach().double()
    y = y.to(h.device)
    mean = class_means(h, y, K or int(y.max()) + 1)
    n = torch.bincount(y, minlength=len(mean)).double()
    return n, mean, torch.zeros_like(n).index_add_(0, y, (h - mean[y]).square().sum(1)) / n


def nc1(h: Tensor, y: Tensor, K: int | None = None, centred: bool = True) -> tuple[float, int]:
    """NC1 = tr(Sigma_W pinv(Sigma_B)) / K of h (N, d), y (N,), and Sigma_B's rank (K - 1 if all is well).

        Sigma_W = 1/N sum_i (h_i - mu_y)(h_i - mu_y)^T      pooled over samples
        Sigma_B = 1/K sum_k (mu_k - mu_G)(mu_k - mu_G)^T     mu_G = mean of the class means
    With A = (mu_k - mu_G)_k / sqrt(K) and P = pinv(A) it is 1/(N K) sum_i ||P^T (h_i - mu_y)||^2. It misses
    spread across the span of the means (see cdnv). centred=False: ZNC1, with mu_G = 0 and rank K.
    """
    mean = class_means(h, y, K or int(y.max()) + 1)
    A = (mean - mean.mean(0) if centred else mean) / len(mean) ** 0.5
    if not A.isfinite().all():
        return math.nan, 0
    _, s, V = torch.linalg.svd(A, full_matrices=False)  # A = U diag(s) V
    eps = torch.finfo(s.dtype).eps
    keep = s**2 > max(A.shape) * eps * s[0] ** 2  # pinv(Sigma_B)'s rule: its eigenvalues are s^2
    keep &= s > 1000 * eps * mean.norm(dim=1).max()  # below it, means differ by their rounding only
    P = V[keep].T / s[keep]  # (d, rank)
    within = (h.detach().double() - mean[y.to(A.device)]) @ P  # (N, rank)
    return float(within.square().sum() / within.shape[0] / len(mean)) if keep.any() else math.nan, P.shape[1]


def cdnv(h: Tensor, y: Tensor, K: int | None = None) -> float:
    """CDNV of h (N, d), y (N,): mean over pairs of (v_i + v_j) / (2 ||mu_i - mu_j||^2) (Galanti et al.)."""
    _, mean, v = class_sums(h, y, K)
    return float((torch.combinations(v).sum(1) / (2 * torch.pdist(mean).square())).mean())


def class_distances(h: Tensor, y: Tensor) -> Tensor:
    """D_ij = mean squared distance of a sample of class i to one of j; h (N, d), y (N,) -> (K, K) float64."""
    n, mean, v = class_sums(h, y)
    D = v[:, None] + v + torch.cdist(mean, mean).square()  # v_i + v_j + ||mu_i - mu_j||^2
    return D.diagonal_scatter(2 * v * n / (n - 1))  # over distinct samples; 0 / 0 = nan


def unit(V: Tensor) -> Tensor:
    """Rows of V (K, d) at length 1, float64; nan for a row of zeros, which has no direction."""
    V = V.detach().double()
    return V / V.norm(dim=1, keepdim=True)


def cosines(V: Tensor) -> Tensor:
    """Pairwise cosines of the rows of V, (K, d) -> (K, K) float64. A zero row gives cosine 0."""
    V = unit(V).nan_to_num()
    return V @ V.T


def pairwise_cosines(V: Tensor) -> Tensor:
    """cos = 1 - r^2/2, r the distance of unit rows, of all pairs of rows of V (K, d): (K (K-1) / 2,)."""
    return 1 - torch.pdist(unit(V)).square() / 2


def mean_pairwise_cosine(V: Tensor, classes: Tensor) -> float:
    """Mean cosine of V's rows `classes`, V (K, d). 1: minority collapse (Fang et al. 2021); nan: < 2 rows."""
    return float(pairwise_cosines(V[classes.to(V.device)]).mean())


def equinorm(V: Tensor) -> float:
    """NC2, lengths: std / mean of the norms of V's rows (K, d), population std. 0: an ETF (Papyan et al.)."""
    norm = V.detach().double().norm(dim=1)
    return float(norm.std(correction=0) / norm.mean())


def self_duality(W: Tensor, M: Tensor) -> float:
    """NC3: ||W/||W||_F - M/||M||_F||_F^2 for class vectors W and centred means M, both (K, d); in [0, 4]."""
    M = M.double()
    W = W.double().to(M.device)
    return float((W / W.norm() - M / M.norm()).square().sum())


def nearest_mean(h: Tensor, M: Tensor) -> Tensor:
    """argmin_k ||h - mu_k|| of each feature: h (N, d), M (K, d) -> (N,). A mean of nan is nearest to none."""
    h = h.detach().double()
    M = M.double().to(h.device)
    centre = M.nanmean(0)  # products lose digits far from the origin
    V = M - centre
    score = (h - centre) @ V.T - V.square().sum(1) / 2  # (N, K) ||h||^2 / 2 - ||h - mu||^2 / 2
    return score.nan_to_num(nan=-torch.inf).argmax(1)


def zero_mean_metrics(means: Tensor, W: Tensor | None = None) -> dict[str, float]:
    """Zero-mean neural collapse (Kim, part 2): NC2, NC3 about the origin; means not centred, W (K, d)."""
    cosine = pairwise_cosines(means).abs()
    result = {"znc_equinorm": equinorm(means), "znc_mean_cosine": float(cosine.mean())}
    result["znc_max_cosine"] = float(cosine.max())
    return result if W is None else {**result, "znc_alignment": self_duality(W, means)}


def smallest_angle(V: Tensor) -> float:
    """Smallest angle between two rows of V (K, d), K >= 2, in degrees; arccos(-1/(K-1)) for a simplex ETF."""
    half_chord = torch.pdist(unit(V)).min() / 2  # arccos of the cosine would lose half of the digits near 0
    return float(torch.rad2deg(2 * torch.asin(half_chord.clamp(max=1))))


def one_vs_rest_distance(V: Tensor) -> Tensor:
    """Distance of each row's direction from the convex hull of the others', V (K, d) -> (K,), K >= 2.

        min_a || sum_{j != k} a_j v_j - v_k ||    over a >= 0, sum_j a_j = 1, of unit rows v of V
    The margin max_h min_j <w_k - w_j, h> over unit h (Jiang et al. 2024); at best K/(K-1) if K <= d + 1. With
    rows D_j = v_j - v_k, a is w / sum(w) for w = argmin ||D^T w||^2 + (1^T w - 1)^2 over w >= 0.
    """
    from scipy.optimize import lsq_linear  # nnls errs in SciPy 1.12 to 1.15

    V = unit(V).cpu()
    K, d = V.shape
    distance = V.new_full((K,), math.nan)
    if V.isfinite().all():
        for k in range(K):
            D = (torch.cat([V[:k], V[k + 1 :]]) - V[k]).numpy()
            A = np.vstack([D.T, np.ones(K - 1)])
            w = lsq_linear(A, np.append(np.zeros(d), 1), (0, np.inf), "bvls", 1e-14).x
            distance[k] = np.linalg.norm(w @ D) / w.sum()
    return distance


# %% ----------------------------------------------------------------------------------------------- Theory


class Claims:
    """The table of a theory check: claim, theory, measured, error, tolerance, ok; one line per claim."""

    def __init__(self):
        self.passed: list[bool] = []
        torch.set_num_threads(1)  # on small matrices more threads are slower
        print(f"{'claim':<66}{'theory':>9}{'measured':>10}{'error':>9}{'tolerance':>10}  ok")

    def equal(self, claim: str, theory: float, measured: float, tolerance: float, error=None) -> None:
        """Holds where the error, |measured - theory| if not given, is at most the tolerance."""
        error = abs(measured - theory) if error is None else error
        self.passed.append(math.isfinite(measured) and error <= tolerance)
        numbers = f"{theory:>9.4f}{measured:>10.4f}{error:>9.1e}{tolerance:>10.1e}"
        print(f"{claim:<66}{numbers}  {'yes' if self.passed[-1] else 'NO'}")

    def at_most(self, claim: str, bound: float, measured: float, tolerance: float = 0.0) -> None:
        """Holds where measured <= bound + tolerance."""
        self.equal(f"{claim}, at most", bound, measured, tolerance, max(measured - bound, 0.0))

    def report(self, figure: Path) -> dict:
        """Print the summary; {"ok": whether all claims hold, ...}, what a script's main returns."""
        print(f"{sum(self.passed)} of {len(self.passed)} claims hold; figure: {figure}")
        return {"ok": all(self.passed), "claims": len(self.passed), "folder": str(figure.parent)}


def minimise(loss, *start: Tensor, steps: int = 200) -> list[Tensor]:
    """The tensors, of the shapes of start, at which loss(*tensors) is least: full-batch L-BFGS from start."""
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


def locate(holds, inside: float, outside: float, steps: int = 4) -> float:
    """The edge of where holds(x) is true, right to a factor (outside / inside) ** (2 ** -(steps + 1))."""
    for _ in range(steps):  # bisection of log x
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return math.sqrt(inside * outside)


# %% -------------------------------------------------------------------------------------------------- Run
# Several GPUs: torchrun starts one process (a rank) per GPU. Every rank draws the whole epoch from the same
# generator and trains on its slice of each batch; rank 0 alone tests, prints and writes.


def ranks() -> tuple[int, int]:
    """Under torchrun, which of how many processes this is: (rank, number). (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """Runs the block on rank 0, then on the others, which find what it downloaded or wrote."""
    if ranks()[0]:
        dist.barrier()
    yield
    if ranks()[1] > 1 and not ranks()[0]:
        dist.barrier()


class Flags(argparse.ArgumentParser):
    """The command line of a script, given its name and docstring: add its flags, `parse` adds the rest."""

    def __init__(self, script: str, about: str | None):
        title = (about or "").partition("\n")[0]  # None under python -OO
        kinds = (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter)
        layout = type("Help", kinds, {})  # shows defaults, and keeps the lines of the list of methods
        super().__init__(f"{script}.py", None, title, formatter_class=layout, allow_abbrev=False)
        self.script = script

    def error(self, message: str):
        raise UserError(message)  # one line; command_line exits with 2

    def parse(
        self, argv: list[str] | None, methods: dict[str, str], usual: list[str], recipes: dict, **defaults
    ) -> Namespace:
        """The flags, with `folder`: OUT/SCRIPT/DATASET. Raises UserError.

        methods: {name: what it is}; usual: without --method. recipes: {data set, or "": {flag: default}}.
        """
        own = set(vars(self.parse_args([])))  # the chapter's flags; none is required
        self._add_shared([*methods, "all"])
        self.epilog = "\n".join(["methods:", *(f"  {name:<18}{what}" for name, what in methods.items())])
        self.set_defaults(method=usual, **defaults)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # other defaults hang on it
        first.add_argument("--dataset", nargs="?", default=self.get_default("dataset"))
        base = str(first.parse_known_args(argv)[0].dataset).partition(":")[0].removesuffix("lt")
        self.set_defaults(**recipes[""] | recipes.get(base, {}))
        args = self.parse_args(argv)
        split_name(args.dataset)
        for flag, value in vars(args).items():
            for one in value if isinstance(value, list) else [value]:
                name = f"--{flag.replace('_', '-')} {one}"
                inside = type(one) not in (int, float) or 0 < one < (2**63 if type(one) is int else math.inf)
                if not inside and not (one == 0 and flag in MAY_BE_0):
                    raise UserError(f"{name}: expected a number above 0")
                if str(one).startswith("~"):
                    raise UserError(f"{name}: no such user; write the path out")
        if {"RANK", "WORLD_SIZE"} & os.environ.keys() and "MASTER_ADDR" not in os.environ:
            raise UserError("RANK or WORLD_SIZE is left over; unset them, or use torchrun")
        if ranks()[1] > 1 and self.script not in ("bmls_msclf", "etf_dr"):
            raise UserError("torchrun: only for bmls_msclf.py and etf_dr.py")
        args.script = self.script
        args.compared = own | COMPARED
        args.method = list(methods) if "all" in args.method else list(dict.fromkeys(args.method))
        args.seed = list(dict.fromkeys(args.seed))
        if args.dry_run:
            args.epochs = 1
            args.overwrite = True
            args.out = args.out / "dry-run"
        args.folder = args.out / self.script / re.sub(r"[^\w.,+-]+", "-", args.dataset)
        return args

    def _add_shared(self, names: list[str]) -> None:
        add = self.add_argument_group("shared by all scripts").add_argument
        add("--dataset", default="digits", help=f"{', '.join(SPECS)}, folder:PATH; long-tailed: cifar10lt")
        add("--data-dir", type=Path, default=Path("data"), help="of NAME.npz, and of downloads")
        add("--imbalance", type=float, default=100.0, help="lt: largest over smallest class")
        add("--profile", choices=["exp", "step"], default="exp", help="lt: shape of the long tail")
        add("--image-size", type=int, default=32, help="folder: pixels")
        add("--test-share", type=float, default=0.0, help="folder without train/, test/")
        add("--method", nargs="+", choices=names, metavar="M", help="see below, or all")
        add("--seed", type=int, nargs="+", default=[0], help="one or more")
        add("--epochs", type=int, help="passes over the images")
        add("--batch-size", type=int, help="images per step")
        add("--lr", type=float, help="peak learning rate")
        add("--weight-decay", type=float, help="on all parameters")
        add("--eval-every", type=int, default=1, help="epochs from test to test")
        add("--out", type=Path, default=Path("runs"), help="where runs go")
        add("--overwrite", action="store_true", help="train anew what is there")
        add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where it runs")
        add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 where fast")
        add("--compile", action="store_true", help="torch.compile the network")
        add("--dry-run", action="store_true", help="two steps, into OUT/dry-run")
        add("--synthetic", action="store_true", help="check the theory")


# Shared flags that decide what is computed: with other values a run is another one. A chapter's own all do.
COMPARED = {"dataset", "imbalance", "profile", "image_size", "test_share", "epochs", "batch_size", "lr"}
COMPARED |= {"weight_decay", "eval_every", "precision", "compile"}
MAY_BE_0 = {"seed", "weight_decay", "test_share", "dim", "contexts", "penalty"}


def prepare_data(args: Namespace, per_class: int = 0) -> Dataset:
    """The data of --dataset; settles args.device and args.precision. per_class: images kept in a dry run."""
    least = 3 * ranks()[1]  # no batch holds a single image then, which has no variance for BatchNorm
    if args.batch_size < least:
        raise UserError(f"--batch-size {args.batch_size}: expected {least} or more")
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    options = {key: getattr(args, key) for key in ("imbalance", "profile", "image_size", "test_share")}
    with first_rank_first():  # which may have to download
        data = load_dataset(args.dataset, args.data_dir, **options)
    if args.dry_run:  # two batches of training images or a few more, some of every class, as many test images
        n = max(2 * args.batch_size // len(data.classes), 2 * per_class)
        test = keep_per_class(data.test_y, n)
        data = keep(data, keep_per_class(data.train_y, n))
        data = data._replace(test_x=data.test_x[test], test_y=data.test_y[test])
    if args.device.type == "cpu" and data.train_x.shape[1] <= 16:
        torch.set_num_threads(1)  # on 8 x 8 images more threads are slower
    sizes = f"{len(data.train_y):,} training images ({data.counts.max()} to {data.counts.min()} per class)"
    print(f"{args.dataset}: {len(data.classes)} classes, {sizes}, {len(data.test_y):,} test images")
    print(f"{hardware(args.device)}, {args.precision}; into {args.folder}")
    return data


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU. Joins the other ranks. Raises UserError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: not available here; use --device auto")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    if ranks()[1] > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if ranks()[1] > 1 and not dist.is_initialized():
        wait = datetime.timedelta(days=1)  # while rank 0 tests, draws
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return device


CPU_INFO = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where hardware multiplies it fast (CUDA; CPUs with AMX or AVX512-BF16), else fp32."""
    fast = device.type == "cuda" or {"amx_bf16", "avx512_bf16"} & set(CPU_INFO.split())
    return name if name != "auto" else "bf16" if fast else "fp32"


def hardware(device: torch.device) -> str:
    """What the run ran on, in words, for config.json and for tables."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", CPU_INFO)
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def _git_commit(folder: Path) -> str:
    """The commit of the code that runs, with + where files differ from it; `unknown` outside a checkout."""
    if not (folder / ".git").exists() or not shutil.which("git"):  # a copy inside another repository
        return "unknown"
    describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown"


def write_atomically(path: Path, write) -> None:
    """write(part) fills a temporary file, which is then renamed: path is whole or not there. UserError."""
    if ranks()[0]:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot be written ({error}); free space, or choose another") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _mapping(text: str) -> dict:
    return {**json.loads(text)}  # other JSON raises TypeError


class Run:
    """One run folder, OUT/SCRIPT/DATASET/METHOD/seedS: what was run, how it went, and where to go on.

    `config`, `history` (of metrics.jsonl) and `finished` (the result, or None) are read, or UserError raised.
    """

    FILES = ("result.json", "checkpoint.pt", "metrics.jsonl", "features.npz", "source.py", "config.json")

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name = self.folder.parent.name
        self.config = self._read("config.json", _mapping)  # a flag that was not given stays None
        self.finished = self._read("result.json", _mapping)
        self.history = self._read("metrics.jsonl", lambda text: [*map(_mapping, text.splitlines())]) or []

    def _read(self, file: str, parse, unpack=Path.read_text):
        """parse(unpack(path)) of one of the files, None where it is missing."""
        path = self.folder / file
        try:
            return parse(unpack(path)) if path.exists() else None
        except Exception:  # parsers raise many kinds
            raise UserError(f"{path}: cannot be read; --overwrite the run, or change --out") from None

    def _write(self, file: str, text: str) -> None:
        write_atomically(self.folder / file, lambda part: part.write_text(text))

    def prepare(self, model: torch.nn.ModuleDict) -> list[torch.nn.Module]:
        """The model's parts as training calls them. Speed only: --compile, and torchrun's several GPUs."""
        if ranks()[1] > 1 and self.device.type == "cuda":
            # In place; on CPUs statistics are the share's
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        parts = list(model.values())
        for i, part in enumerate(parts):
            if ranks()[1] > 1 and any(p.requires_grad for p in part.parameters()):
                parts[i] = torch.nn.parallel.DistributedDataParallel(part)  # exact: shares are equal
        if self.args.compile:
            parts[0] = torch.compile(parts[0], mode="reduce-overhead")  # records CUDA graphs
        return parts

    def epochs(self, total: int, **parts) -> Iterator[int]:
        """Each epoch still to be trained, from 0; after its body its line and checkpoint are written.

        parts (modules, optimisers, generators, tensors; `model` among them) are restored first. Raises
        UserError for a loss or weight that is not finite.
        """
        first = self._restore(parts)
        self.total = total
        hide = ranks()[0] > 0 or None  # None: no bar where there is no terminal
        for epoch in tqdm(range(first, total), self.title, initial=first, total=total, disable=hide):
            began = time.perf_counter()
            self.losses = []
            self.line = {}
            yield epoch
            line = {"epoch": epoch + 1, "loss": self._mean_loss(epoch, parts["model"]), **self.line}
            line["seconds"] = time.perf_counter() - began
            self.history.append(line)
            self._write("metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))
            self._save(epoch + 1, parts)

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

    def _mean_loss(self, epoch: int, model: torch.nn.Module) -> float:
        losses = torch.stack(self.losses)
        if ranks()[1] > 1:
            dist.all_reduce(losses)
            losses /= ranks()[1]
        broken = (~losses.isfinite()).nonzero().flatten().tolist()
        if broken:
            self._stop(epoch, f"the loss is not finite in epoch {epoch + 1}, step {broken[0] + 1}")
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            self._stop(epoch, f"a weight is not finite after epoch {epoch + 1}")
        return float(losses.mean())

    def _stop(self, epoch: int, reason: str):
        kept = f"epoch {epoch}, {self.folder / 'checkpoint.pt'}" if epoch else "none"
        raise UserError(f"{self.title}: {reason}; lower --lr. Last good checkpoint: {kept}")

    def _restore(self, parts: dict) -> int:
        """Load the last checkpoint into parts; how many epochs are done. The history is cut back to it."""

        def load(state: dict) -> int:
            torch.set_rng_state(state["rng"])  # dropout draws from torch's own generator
            for name, part in parts.items():
                if isinstance(part, Tensor):
                    part.copy_(state[name])
                elif isinstance(part, torch.Generator):
                    part.set_state(state[name])
                else:
                    part.load_state_dict(state[name])
            last = self.history[state["epoch"] - 1]["loss"]  # missing: metrics.jsonl was cut
            print(f"{self.title}: goes on after epoch {state['epoch']}, loss {last:.3g}")
            return state["epoch"]

        unpack = functools.partial(torch.load, map_location="cpu", weights_only=True)  # no code
        epoch = self._read("checkpoint.pt", load, unpack) or 0
        self.history = self.history[:epoch]
        return epoch

    def _save(self, epoch: int, parts: dict) -> None:
        state = {"epoch": epoch, "rng": torch.get_rng_state()}
        for name, part in parts.items():
            get = "get_state" if isinstance(part, torch.Generator) else "state_dict"
            state[name] = part if isinstance(part, Tensor) else getattr(part, get)()
        write_atomically(self.folder / "checkpoint.pt", lambda part: torch.save(state, part))

    def save_features(self, **arrays: Tensor) -> None:
        """Write features.npz: train_h (N, d), train_y, ... UserError where the network is broken."""
        if not arrays["train_h"].isfinite().all():
            self._stop(len(self.history), "features are not finite after the last epoch")
        as_numpy = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
        write_atomically(self.folder / "features.npz", lambda part: np.savez(part, **as_numpy))

    def load_features(self) -> dict[str, np.ndarray]:
        """What save_features wrote. Raises UserError where the file is damaged."""
        return self._read("features.npz", dict, lambda path: np.load(path, allow_pickle=False))

    def finish(self, measured: dict) -> None:
        """Write result.json, last of all: its presence marks the run as finished."""
        result = {"method": self.name, "seed": self.config["seed"], "epochs": len(self.history)}
        tested = [line["accuracy"] for line in self.history if "accuracy" in line]
        result["best_accuracy"] = max(tested, default=math.nan)
        result["seconds"] = sum(line["seconds"] for line in self.history)
        with first_rank_first():  # the other ranks have not tested
            self._write("result.json", json.dumps({**result, **measured}, indent=1))
            self.finished = self._read("result.json", _mapping)

    def other_code(self) -> str:
        """Which file has changed since this run began: the script, common.py, or none ("")."""
        script = Path(__file__).with_name(f"{self.config['script']}.py")
        if self._read("source.py", str) != script.read_text():
            return script.name
        return "" if self.config["common"] == zlib.crc32(Path(__file__).read_bytes()) else "common.py"


def runs(args: Namespace, data: Dataset, jobs: dict[str, dict] | None = None) -> Iterator[Run]:
    """Each run that is still to be trained, new or interrupted; meanwhile its folder is this process's own.

    jobs: {run name: its flags}, where runs differ in more than method and seed. Raises UserError.
    """
    for name, job in (jobs or {name: {} for name in args.method}).items():
        for seed in args.seed:
            folder = args.folder / name / f"seed{seed}"
            lock = filelock.FileLock(folder / ".lock", is_singleton=True)  # until the process dies
            try:
                with first_rank_first():
                    folder.mkdir(parents=True, exist_ok=True)
                    if not ranks()[0]:
                        lock.acquire(timeout=0)
                    run = _open(folder, args, _setting(args, data, job), seed)
                if not run.finished:
                    yield run
            except filelock.Timeout:
                raise UserError(f"{folder}: another command is at work here; change --out") from None
            except OSError as error:
                raise UserError(f"{folder}: cannot be written ({error.strerror}); change --out") from None
            finally:  # also where it is refused
                lock.release()


def _setting(args: Namespace, data: Dataset, job: dict) -> dict:
    """What a run is defined by, beside its method and seed: flags that decide what is computed, and data."""
    flags = {key: getattr(args, key) for key in sorted(args.compared)}
    return json.loads(json.dumps({**flags, **job, "data": data.fingerprint}, default=str))


def _open(folder: Path, args: Namespace, setting: dict, seed: int) -> Run:
    """The run in this folder: a new one with its config.json, or the one that is there. Raises UserError."""
    if not ranks()[0]:
        for left in folder.glob(".*.part*"):  # by a kill
            left.unlink()
        for file in Run.FILES if args.overwrite else ():  # the result first
            (folder / file).unlink(missing_ok=True)
    run = Run(folder)
    run.args = args
    run.seed = seed
    run.title = f"{run.name} seed {seed}"
    run.device = args.device
    run.fused = args.device.type == "cuda"  # for an optimiser: one kernel for all parameters
    half = args.precision == "bf16"
    run.autocast = functools.partial(torch.autocast, args.device.type, torch.bfloat16, half)
    if run.finished or (folder / "checkpoint.pt").exists():
        instead = "--overwrite it, or change --out"
        before = (run.config or {}).get("setting", {})
        for key, new in setting.items():
            if before.get(key) != new:
                name = key if key == "data" else f"--{key.replace('_', '-')}"
                raise UserError(f"{folder}: was run with {name} {before.get(key)}, not {new}; {instead}")
        other = run.other_code()
        if other and not run.finished:
            raise UserError(f"{folder}: was begun with another version of {other}; {instead}")
        if run.finished:
            made = f", with another version of {other}" if other else ""
            print(f"{run.title}: finished before{made}; --overwrite trains it anew")
        return run
    source = Path(__file__).resolve().with_name(f"{args.script}.py")
    common = zlib.crc32(Path(__file__).read_bytes())
    run.config = {"script": args.script, "seed": seed, "setting": setting, "common": common}
    run.config["commit"] = _git_commit(source.parent)
    run.config |= {"hardware": hardware(run.device), "threads": torch.get_num_threads()}
    run.config |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    run._write("source.py", source.read_text())
    run._write("config.json", json.dumps(run.config, indent=1))
    return run


def finished_runs(args: Namespace, data: Dataset, jobs: dict[str, dict] | None = None) -> list[Run]:
    """Every finished run of args.folder with this setting, of whatever method and seed."""
    names = list(jobs or args.method)
    differ = {flag for job in (jobs or {}).values() for flag in job}
    setting = {key: value for key, value in _setting(args, data, {}).items() if key not in differ}
    there = [Run(path.parent) for path in sorted(args.folder.glob("*/seed*/result.json"))]
    same = []
    for run in there:
        wanted = {**setting, **(jobs or {}).get(run.name, {})}
        if run.config and run.config.get("setting", {}).items() >= wanted.items():
            same.append(run)
    names += sorted({run.name for run in same} - set(names))
    return sorted(same, key=lambda run: (names.index(run.name), run.config["seed"]))


@contextlib.contextmanager
def own_torch_settings() -> Iterator[None]:
    """Above a script's main: float32 by default inside, and the process's settings as before afterwards."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng([]), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            yield  # benchmark: batches come in few shapes, so let cuDNN try its algorithms
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def command_line(main) -> None:
    """Run main() and exit: 0, 1 after a failed claim, 2 after bad input (one line), 130 after Ctrl-C."""
    if "ipykernel" in sys.modules:
        print('in a notebook: result = main(["--epochs", "5"])')
        return
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    codecs.register_error("plain", lambda e: ("+-" if e.object[e.start] == "±" else "?", e.start + 1))
    sys.stdout.reconfigure(errors="plain")  # ± or a class name may not exist in the terminal's encoding
    refusals = (UserError, RuntimeError) if ranks()[0] else UserError  # gloo's
    try:
        result = main()
    except refusals as error:
        time.sleep(5 if ranks()[0] else 0)  # alive then: it failed alone
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command, without --overwrite, goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(1 if result.get("ok") is False else 0)


# %% ---------------------------------------------------------------------------------------------- Figures
# Colours of Okabe and Ito (2008), which the colour-blind can tell apart. Methods on one line share one.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "os^DPXv<"
ALIKE = """ce learnable none
mixup ce+mixup fno fixed+ce
bmls+ms sphere fixed+squared
cosine cb hug-fixed
cb-mixup etf+ce hug-mhe
etf+dr bmls hug-mhs fixed+distance
etf+dr+mixup balanced-softmax hug-mgd hug-mhe-squared
cb+ms ce+norm"""
STYLES = {name: i for i, names in enumerate(ALIKE.splitlines()) for name in names.split()}


def styles(names) -> dict[str, dict]:
    """Colour and marker of each name; one that is no method has those of its place."""
    place = {name: STYLES.get(name, i % len(COLOURS)) for i, name in enumerate(names)}
    return {name: {"color": COLOURS[i], "marker": MARKERS[i]} for name, i in place.items()}


def save_figure(path: Path, figure) -> None:
    """Write a matplotlib Figure as PNG, 200 dots per inch."""
    write_atomically(Path(path), lambda part: figure.savefig(part, dpi=200))


def curves(path: Path, points: dict[str, tuple], style: dict[str, dict], **axes) -> None:
    """One plot of lines, {name: (x, y)}, its legend beside the data; axes: xlabel, ylabel, xscale, ..."""
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
    plot.set_xticks(range(len(groups)), groups)
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(path, figure)


def heat_maps(path: Path, maps: dict[str, np.ndarray], *, label: str, limits: tuple, diverging: bool, **axes):
    """Square maps side by side with one colour bar. diverging: red, white at 0, blue, for cosines."""
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(2.8 * columns + 1.2, 2.8 * rows + 0.5), layout="constrained")
    colours = "RdBu_r" if diverging else "viridis"
    for i, (name, values) in enumerate(maps.items()):
        plot = figure.add_subplot(rows, columns, i + 1)
        image = plot.imshow(values, cmap=colours, interpolation="nearest", vmin=limits[0], vmax=limits[1])
        plot.set(facecolor="0.85", **axes)
        plot.set_title(name, parse_math=False)  # a class name may hold a $
    figure.colorbar(image, ax=figure.axes, label=label)
    save_figure(path, figure)


def mean_std(values: list[float | None], digits: int = 2, factor: float = 1.0) -> str:
    """`34.20 ± 0.31` over seeds (sample std); one value stands alone, and what is not defined is `-`."""
    values = factor * np.array(values, float)
    if np.isnan(values).any():
        return "-"
    mean = f"{values.mean().round(digits) + 0.0:.{digits}f}"  # never -0.00
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def table(header: list[str], rows: list[list]) -> str:
    """Columns aligned for the terminal: text left, numbers right."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * w for w in width])
    cells = [[row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in cells)


UNITS = {"%": (1, 100), "°": (1, 1), "#": (0, 1), "": (2, 1)}  # digits, factor


def print_table(found: list[Run], columns: dict[str, tuple[str, str, str]], about: dict[str, str]) -> None:
    """A row per run name, mean ± std over seeds. columns: {entry: (title, unit, meaning)}, or `heads.own`."""

    def entry(run: Run, key: str) -> float | None:
        first, _, second = key.partition(".")
        return run.finished.get(first, {}).get(second) if second else run.finished.get(first)

    by_name = {}
    for run in found:
        by_name.setdefault(run.name, []).append(run)
    columns = {key: c for key, c in columns.items() if any(entry(run, key) is not None for run in found)}
    rows = []
    for name, seeds in by_name.items():
        row = [name, len(seeds)]
        for key, (_, unit, _) in columns.items():
            row.append(mean_std([entry(run, key) for run in seeds], *UNITS[unit]))
        rows.append(row)
    print("\n" + table(["method", "seeds", *(title for title, _, _ in columns.values())], rows))
    for title, unit, meaning in columns.values():
        print(f"{title}:", *filter(None, [unit, meaning]))
    for name in filter(about.get, by_name):
        print(f"{name}: {about[name]}")
