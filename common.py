"""What every chapter shares: data, metrics, the bookkeeping of a run. It knows no model, loss or method.

    import common                # then common.cosines(W): the prefix says that it is not in this file

Five parts, each under its own banner; a reader who never opens them loses nothing of a chapter:
    Data      load_dataset -> Dataset (uint8); long tails, subsets, tasks, coarse labels; Batches, the loader
    Metrics   accuracy per class, neural collapse, continual learning, clustering
    Theory    Claims, the table of a theory check; minimise and locate, which measure what theory predicts
    Run       flags, the run folder, `epochs` (checkpoint, log, progress), several GPUs
    Figures   curves, heat maps, tables; command_line, which turns errors into exit codes

Symbols, here and in every script: K classes, d feature dimension, N samples, B batch, n_k images of class k,
h features (row vectors), W class vectors (K, d), M class means (K, d).
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm


class UserError(Exception):
    """Something only the user can fix. The scripts print it as one line on stderr and exit with code 2."""


# %% ------------------------------------------------------------------------------------------------- Data


class Spec(NamedTuple):
    """What is known of a data set before it is read; pad and flip are its usual augmentation."""

    classes: int
    shape: tuple[int, int, int]  # (H, W, C)
    pad: int  # pixels of zero padding for the random crop
    flip: bool  # mirror left-right? A mirrored digit is no digit any more


SPECS = {
    "digits": Spec(10, (8, 8, 1), 1, False),
    "mnist": Spec(10, (28, 28, 1), 2, False),
    "fashionmnist": Spec(10, (28, 28, 1), 4, True),
    "cifar10": Spec(10, (32, 32, 3), 4, True),
    "cifar100": Spec(100, (32, 32, 3), 4, True),
    "svhn": Spec(10, (32, 32, 3), 4, False),
    "stl10": Spec(10, (96, 96, 3), 12, True),
}


class Dataset(NamedTuple):
    """A data set. Images are uint8 (N, H, W, C); labels int64 (N,); mean and std (C,) in [0, 1].

    The images of a folder too large for memory are FolderImages, which are indexed as a tensor is.
    """

    train_x: "Tensor | FolderImages"
    train_y: Tensor
    test_x: "Tensor | FolderImages"
    test_y: Tensor
    classes: tuple[str, ...]
    mean: Tensor  # of the full training split, so that a long tail does not move it
    std: Tensor
    pad: int
    flip: bool
    fingerprint: str  # another one where an image, a label or a class name differs

    @property
    def counts(self) -> Tensor:
        """n_k: training images of each class, (K,)."""
        return torch.bincount(self.train_y, minlength=len(self.classes))


def split_name(name: str) -> tuple[str, bool, str]:
    """`digitslt` -> ("digits", True, ""); `folder:~/x` -> ("folder", False, HOME/x). Raises UserError."""
    base, colon, path = name.partition(":")
    long_tailed = base.endswith("lt")
    base = base.removesuffix("lt")
    if base == "folder" and path:
        return base, long_tailed, os.path.expanduser(path)
    if base in SPECS and not colon:
        return base, long_tailed, ""
    names = ", ".join(SPECS)
    raise UserError(f"--dataset {name}: unknown; one of {names}, folder:PATH, or one with lt (cifar100lt)")


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    *,
    imbalance: float = 100.0,
    profile: str = "exp",
    image_size: int = 32,
    test_share: float = 0.0,
) -> Dataset:
    """Data set by name; with the suffix `lt` its training split is long-tailed.

    name: a key of SPECS, `folder:PATH` with PATH/train/CLASS/IMAGE and PATH/test/CLASS/IMAGE, or with
    PATH/CLASS/IMAGE and a test_share. image_size (folders): the short side is resized, then the centre cut.
    Raises UserError for an unknown name, a bad file, data that cannot be downloaded, or an empty class.
    """
    base, long_tailed, path = split_name(name)
    if base == "folder":
        arrays = _read_folder(Path(path), image_size, test_share)
        pad = image_size // 8
        flip = True
    elif test_share:
        raise UserError(f"--test-share {test_share:g}: {base} has test images; only a folder may need it")
    else:
        arrays = _read_named(base, Path(data_dir).expanduser())
        pad = SPECS[base].pad
        flip = SPECS[base].flip
    mean, std = _channel_statistics(arrays["train_x"])
    data = Dataset(**arrays, mean=mean, std=std, pad=pad, flip=flip, fingerprint=_fingerprint(arrays))
    if len(data.classes) < 2:
        raise UserError(
            f"--dataset {name}: its only class is {data.classes[0]}; expected two classes or more"
        )
    if data.counts.min() == 0:
        empty = data.classes[data.counts.argmin()]
        raise UserError(f"--dataset {name}: class {empty} has no training image")
    if not long_tailed:
        return data
    keep = long_tail_subset(data.train_y, len(data.classes), imbalance, profile, by_count=base == "folder")
    data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    most = data.counts.max()
    least = data.counts.min()
    if abs(most / least / imbalance - 1) > 0.1:
        _note(f"{name}: {most} to {least} images a class, a ratio of {most / least:.4g}, not {imbalance:g}")
    return data


_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def _note(text: str) -> None:
    """One line on stderr, from one process."""
    if ranks()[0] == 0:
        print(text, file=sys.stderr)


def _channel_statistics(images: "Tensor | FolderImages") -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all pixels, (C,) each, from counts of the 256 values.

    (The often-copied CIFAR-10 std .2023, .1994, .2010 averages the images' own stds; over pixels it is .247.)
    """
    counts = torch.zeros(images.shape[3], 256, dtype=torch.float64)
    for start in range(0, len(images), 1000):  # counts are exact, so streamed images give the same bits
        chunk = images[start : start + 1000]
        chunk = chunk.decode() if isinstance(chunk, FolderImages) else chunk
        for count, channel in zip(counts, chunk.unbind(3), strict=True):
            count += torch.bincount(channel.flatten(), minlength=256)
    share = counts / counts[0].sum()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(1)
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), std.clamp_min(1e-3).float()  # a constant channel stays finite


def _fingerprint(arrays: dict) -> str:
    """Sizes and a checksum of all images, labels and class names; of streamed files their paths and sizes."""
    checksum = zlib.crc32("\n".join(arrays["classes"]).encode())
    for part in map(arrays.get, _ARRAYS):
        if isinstance(part, FolderImages):
            lines = (f"{file} {os.path.getsize(file)}\n" for file in part.files)
            checksum = zlib.crc32("".join(lines).encode("utf-8", "surrogateescape"), checksum)
        else:
            checksum = zlib.crc32(part.numpy(), checksum)
    sizes = f"{len(arrays['train_y'])}+{len(arrays['test_y'])} images"
    return f"{sizes}, {len(arrays['classes'])} classes, {checksum:08x}"


def _read_named(name: str, data_dir: Path) -> dict:
    """A named data set: embedded, from DATA_DIR/NAME.npz, or through torchvision and then kept there."""
    cache = data_dir / f"{name}.npz"
    if name == "digits":
        return _checked(_read_digits(), SPECS[name], name)
    if cache.exists():
        return _checked(_read_npz(cache), SPECS[name], str(cache))
    found = _read_torchvision(name, data_dir)
    arrays = _checked(found, SPECS[name], f"torchvision's {name} in {data_dir}")
    write_atomically(cache, lambda part: np.savez(part, **found))
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays train_x, ..., classes of an npz file of ours, or of Keras, whose keys are x_train, ..."""
    try:
        with np.load(path, allow_pickle=False) as file:  # never unpickles: an object array raises ValueError
            if "x_train" not in file:
                return {key: file[key] for key in (*_ARRAYS, "classes")}
            arrays = {key: file["_".join(reversed(key.split("_")))] for key in _ARRAYS}
    except Exception as error:  # zip, zlib and the header's parser raise many kinds; all mean a damaged file
        reason = str(error).partition("\n")[0].partition(". ")[0]  # not NumPy's tip to unpickle
        reason = reason or type(error).__name__
        raise UserError(f"{path}: not a readable data file ({reason}); delete it to load it anew") from None
    for key in ("train_x", "test_x"):
        if arrays[key].ndim == 3:  # (N, H, W)
            arrays[key] = arrays[key][..., None]
    return arrays | {"classes": np.array([str(k) for k in range(SPECS[path.stem].classes)])}


def _checked(arrays: dict[str, np.ndarray], spec: Spec, where: str) -> dict:
    """The fields of a Dataset: tensors, and names as text. UserError for a wrong shape, type or label."""
    K = spec.classes
    names = arrays["classes"]
    wrong = ""
    if names.shape != (K,):
        wrong = f"classes has shape {names.shape}, expected the names of {K} classes"
    for split in ("train", "test"):
        x = arrays[f"{split}_x"]
        y = arrays[f"{split}_y"]
        if x.dtype != np.uint8 or x.shape[1:] != spec.shape or len(x) == 0:
            expected = f"(N, {', '.join(map(str, spec.shape))}) uint8, N > 0"
            wrong = f"{split}_x is {x.shape} {x.dtype}, expected {expected}"
        elif y.shape != (len(x),) or not np.issubdtype(y.dtype, np.integer):
            wrong = f"{split}_y is {y.shape} {y.dtype}, expected ({len(x)},) integers"
        elif y.min() < 0 or y.max() >= K:
            wrong = f"{split}_y has labels {y.min()} to {y.max()}, expected 0 to {K - 1}"
    if wrong:
        raise UserError(f"{where}: {wrong}; delete or replace the file")
    images = {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in ("train_x", "test_x")}
    labels = {key: torch.from_numpy(arrays[key].astype(np.int64)) for key in ("train_y", "test_y")}
    texts = (name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return images | labels | {"classes": tuple(texts)}


def _read_digits() -> dict[str, np.ndarray]:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, split once and for all into 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = np.round(x.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    names = np.array(list("0123456789"))
    return dict(train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y, classes=names)


def _read_torchvision(name: str, data_dir: Path) -> dict[str, np.ndarray]:
    """Through torchvision, which downloads what is missing and compares checksums.

    CIFAR's official files are pickles; torchvision opens them only after their MD5 is found right.
    """
    from torchvision import datasets

    kind = next(getattr(datasets, kind) for kind in datasets.__all__ if kind.lower() == name)
    by_name = name in ("svhn", "stl10")
    arrays = {}
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            which = {"split": split} if by_name else {"train": split == "train"}
            with contextlib.redirect_stdout(sys.stderr):  # its progress does not belong to our output
                data = kind(data_dir, download=True, **which)
            x = np.asarray(data.data)  # MNIST: (N, H, W); SVHN, STL-10: (N, C, H, W); CIFAR: (N, H, W, C)
            x = x.transpose(0, 2, 3, 1) if by_name else x
            arrays[f"{split}_x"] = x.reshape(*x.shape[:3], -1)
            arrays[f"{split}_y"] = np.asarray(data.labels if by_name else data.targets)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # the last two: a truncated IDX file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--dataset {name}: neither downloaded nor read whole from {data_dir} ({reason}); connect to a "
            f"network and delete what is damaged there, or put the data at {data_dir / name}.npz"
        ) from None
    classes = getattr(data, "classes", None) or [str(k) for k in range(SPECS[name].classes)]
    return arrays | {"classes": np.array(classes)}


# Endings of files that Pillow reads by itself (.eps would start another program)
_IMAGES = (
    ".jpg .jpeg .jpe .jfif .png .apng .gif .bmp .dib .ppm .pgm .pbm .pnm .tif .tiff .webp .avif .jp2 .tga"
)


def _memory(cgroup: str = "/proc/self/cgroup", limits: str = "/sys/fs/cgroup") -> int:
    """Bytes of memory that we may fill: the machine's, or less in a container (cgroup, version 1 or 2)."""
    found = [2**40]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows does not say
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    lines = Path(cgroup).read_text().splitlines() if os.path.exists(cgroup) else []
    for line in lines:
        _, controller, group = line.split(":", 2)
        own = Path(limits, controller, group.lstrip("/"))
        for folder in (own, *own.parents):  # a group's limit holds for those below it
            for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, 1
                with contextlib.suppress(OSError, ValueError):  # not there; `max`: no limit
                    found.append(int((folder / name).read_text()))
    return min(found)


# Bytes of a folder's decoded images that we hold; more than that streams from disk. ImageNet-LT at 224 pixels
# has 25e9. A third of the memory, since the loader's padded copy takes more than as much again.
_FOLDER_LIMIT = min(32 * 2**30, _memory() // 3)


def _read_folder(path: Path, size: int, test_share: float) -> dict:
    """PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/* split by class, cut to (size, size).

    Decoded where all of it fits into memory, else both splits as FolderImages. Raises UserError.
    """
    path = path.resolve()
    where = f"--dataset folder:{path}"
    flat = not (path / "train").is_dir() and not (path / "test").is_dir()
    if flat and not test_share:
        expected = f"{path}/train/CLASS/IMAGE and {path}/test/CLASS/IMAGE"
        raise UserError(f"{where}: expected {expected}; for {path}/CLASS/IMAGE add --test-share 0.2")
    if test_share and not flat:
        raise UserError(f"--test-share {test_share:g}: {path} has train/ or test/; leave the flag out")
    left_out = Counter()
    if flat:
        splits = _split_by_class(_find_images(path, left_out), test_share)
        counts = [sum(map(len, split.values())) for split in splits]
        _note(f"folder:{path}: {counts[1]} of {sum(counts)} images, drawn from each class, are for testing")
    else:
        splits = [_find_images(path / split, left_out) for split in ("train", "test")]
    if left_out:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in left_out.most_common(5))
        _note(f"folder:{path}: {left_out.total()} files and folders left out: {kinds}")
    classes = tuple(splits[0])
    if odd := sorted(set(classes) ^ set(splits[1])):
        raise UserError(f"{where}: train and test have different classes ({odd[0]} is in one only)")
    arrays = {"classes": classes}
    for name, split in zip(("train", "test"), splits, strict=True):
        sizes = torch.tensor([len(files) for files in split.values()])
        arrays[f"{name}_x"] = FolderImages(list(itertools.chain(*split.values())), size)
        arrays[f"{name}_y"] = torch.arange(len(classes)).repeat_interleave(sizes)
    needed = sum(math.prod(arrays[key].shape) for key in ("train_x", "test_x"))
    if needed <= _FOLDER_LIMIT:
        return arrays | {key: arrays[key].decode() for key in ("train_x", "test_x")}
    _note(
        f"folder:{path}: {needed / 2**30:.3g} GiB at --image-size {size} are too much to hold in memory; "
        "images stream from disk, and are read once now for their mean and std"
    )
    return arrays


def _find_images(root: Path, left_out: Counter) -> dict[str, list[str]]:
    """The image files below root/CLASS by class, sorted; left_out counts what else is there, by kind.

    Hidden files and folders are left out, and links to a folder that we came through. Raises UserError.
    """
    found = {}
    for where, folders, names in os.walk(root, followlinks=True):
        here = Path(where)
        above = {os.path.realpath(folder) for folder in (here, *here.parents)}
        for folder in sorted(folders):
            if folder.startswith(".") or os.path.realpath(here / folder) in above:
                folders.remove(folder)
                left_out[f"{folder}/"] += 1
            elif here == root:
                found[folder] = []
        for name in names:
            known = name.lower().endswith(tuple(_IMAGES.split())) and not name.startswith(".")
            if known and here != root:
                found[here.relative_to(root).parts[0]].append((where, name))
            else:
                left_out[os.path.splitext(name)[1] or name] += 1
    empty = [name for name, files in found.items() if not files]
    if empty or not found:
        what = f"no image in class {empty[0]}" if empty else "no class"
        raise UserError(f"--dataset folder:{root}: {what}; expected {root}/CLASS/IMAGE")
    return {name: [os.path.join(*file) for file in sorted(found[name])] for name in sorted(found)}


def _split_by_class(found: dict[str, list[str]], test_share: float) -> list[dict[str, list[str]]]:
    """Training and test files of each class, drawn once and for all; one image stays for each of the two."""
    generator = torch.Generator().manual_seed(0)
    train = {}
    test = {}
    for name, files in found.items():
        drawn = [files[i] for i in torch.randperm(len(files), generator=generator).tolist()]
        if len(drawn) < 2:
            raise UserError(f"--test-share {test_share:g}: class {name} has one image; expected two or more")
        n = min(max(round(test_share * len(drawn)), 1), len(drawn) - 1)
        train[name] = sorted(drawn[n:])
        test[name] = sorted(drawn[:n])
    return [train, test]


def long_tail_counts(K: int, n_max: float, imbalance: float, profile: str = "exp") -> list[int]:
    """Images per class, head first, n_max / n_min = imbalance.

    exp:  n_k = int(n_max * (1/IF)^(k/(K-1))), the convention of the published tables (Cui et al. 2019);
    step: the first half of the classes keeps n_max, the others get n_max / IF (Buda et al. 2018).
    Raises UserError for an imbalance below 1 or an unknown profile.
    """
    if not 1 <= imbalance < float("inf"):
        raise UserError(f"--imbalance {imbalance:g}: expected largest over smallest class, 1 or more")
    if profile == "exp":
        counts = [int(n_max * (1 / imbalance) ** (k / max(K - 1, 1))) for k in range(K)]
    elif profile == "step":
        counts = [int(n_max) if k < K - K // 2 else int(n_max / imbalance) for k in range(K)]
    else:
        raise UserError(f"--profile {profile}: expected exp or step")
    return [max(n, 1) for n in counts]  # no class is left empty


def long_tail_subset(
    y: Tensor, K: int, imbalance: float, profile: str = "exp", by_count: bool = True
) -> Tensor:
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
    data = data._replace(train_x=data.train_x[train], train_y=data.train_y[train])
    return data._replace(test_x=data.test_x[test], test_y=data.test_y[test])


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

    pairs:         class k with class k + K/2, so that coarse = k mod K/2; on CIFAR-10 airplane and dog, ...
    superclasses:  the twenty of CIFAR-100, found by the classes' names
    Raises UserError for an odd K, and for superclasses of anything else than CIFAR-100's classes.
    """
    K = len(classes)
    if grouping == "pairs":
        if K % 2 or K < 4:
            raise UserError(f"--coarse pairs: {K} classes; expected an even number of them, 4 or more")
        names = tuple(f"{a}+{b}" for a, b in zip(classes[: K // 2], classes[K // 2 :], strict=True))
        return torch.arange(K) % (K // 2), names
    if grouping != "superclasses":
        raise UserError(f"--coarse {grouping}: expected pairs or superclasses")
    coarse = {name: i for i, members in enumerate(SUPERCLASSES.values()) for name in members.split()}
    if set(classes) != set(coarse):
        raise UserError("--coarse superclasses: only CIFAR-100 has them; use --coarse pairs")
    return torch.tensor([coarse[name] for name in classes]), tuple(SUPERCLASSES)


def split_tasks(K: int, tasks: int) -> Tensor:
    """Which task of a class-incremental stream each class comes in: (K,) int64, values 0 to tasks - 1.

    Classes in label order are cut into consecutive tasks, whose sizes differ by at most one class; the images
    of task t are those with task[y] == t. Raises UserError unless every task gets a class.
    """
    if not 1 <= tasks <= K:
        raise UserError(f"--tasks {tasks}: expected 1 to {K}, the number of classes")
    sizes = torch.tensor([len(classes) for classes in torch.arange(K).tensor_split(tasks)])
    return torch.arange(tasks).repeat_interleave(sizes)


class Batches:
    """Loader: uint8 images stay on the device, and a batch is one gather away, (B, C, H, W) float32.

    `epoch(index, batch_size, generator)` gives an epoch of batches, `all()` every image once for evaluation,
    `load(index)` one batch. Each *draw* of an image gets a random crop and flip of its own, none without a
    generator. All are drawn at once on the CPU, so nothing synchronises within the epoch, and the same seed
    gives the same views on every device. FolderImages give the same batches, bit for bit.
    """

    def __init__(
        self,
        images: "Tensor | FolderImages",
        mean: Tensor,
        std: Tensor,
        *,
        pad: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.N, self.H, self.W, self.C = images.shape
        self.pad = pad
        self.flip = flip
        self.device = torch.device(device)
        self.down = torch.arange(self.H, device=device) * (self.W + 2 * pad)  # (H,): from row to row
        self.files = images if isinstance(images, FolderImages) else None
        self.rows = None if self.files else self._all_rows(images)
        # (x / 255 - mean) / std = x * scale + shift, repeated over a row so that it vectorises
        self.scale = (1 / (255 * std)).repeat(self.W).to(self.device)  # (W * C,)
        self.shift = (-mean / std).repeat(self.W).to(self.device)

    def epoch(self, index: Tensor, batch_size: int, generator: torch.Generator | None = None) -> Iterator:
        """An iterator over (part, x), or (part, x_0, ..., x_{m-1}) for an index of shape (T, m).

        part is the slice of the epoch's T draws that x holds. All crops and flips are drawn at this call,
        column after column. Under torchrun each process gets an equal share of every batch; without a
        generator each gets all of it.
        """
        views = [self._draw(column, generator) for column in index.view(len(index), -1).unbind(1)]
        rank, count = ranks() if generator is not None else (0, 1)
        parts = []
        for batch in split_evenly(len(index), batch_size, count):
            share = (batch.stop - batch.start) // count
            start = batch.start + rank * share
            parts.append(slice(start, start + share))
        if self.files:
            return self._read(index, views, parts)
        return ((part, *(self._crop(self.rows, column[:, part]) for column in views)) for part in parts)

    def all(self, batch_size: int = 1000) -> Iterator:
        """An iterator over (part, x): every image once, in order, neither cropped nor flipped."""
        return self.epoch(torch.arange(self.N), batch_size)

    def load(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One batch of the images index (B,), read now: (B, C, H, W)."""
        views = self._draw(index, generator)
        if self.files is None:
            return self._crop(self.rows, views)
        views[0] = torch.arange(len(index))
        return self._crop(self._all_rows(self.files[index].decode()), views)

    def _draw(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """(4, T): image, top, left and whether mirrored, of T views, on the device."""
        T = len(index)
        top = left = torch.full((T,), self.pad)
        mirror = torch.zeros(T, dtype=torch.bool)
        if generator is not None:
            top, left = torch.randint(2 * self.pad + 1, (2, T), generator=generator)
            mirror = torch.rand(T, generator=generator) < (0.5 if self.flip else 0.0)
        return torch.stack([index.cpu(), top, left, mirror]).to(self.device)

    def _all_rows(self, images: Tensor) -> Tensor:
        """A row of W pixels from every padded pixel on: (pixels - W + 1, W * C), a view, no copy.

        A crop is H of these rows, whatever its offset: one gather of whole rows.
        """
        padded = torch.nn.functional.pad(images, (0, 0, *[self.pad] * 4)).to(self.device)
        return padded.flatten().unfold(0, self.W * self.C, self.C)

    def _crop(self, rows: Tensor, views: Tensor) -> Tensor:
        """The views (4, B), normalised: (B, C, H, W) float32, channels_last in memory."""
        image, top, left, mirror = views
        height = self.H + 2 * self.pad
        width = self.W + 2 * self.pad
        first = (image * height + top) * width + left  # (B,): the crop's first pixel
        x = rows[first[:, None] + self.down]  # (B, H) rows -> (B, H, W * C)
        if self.flip:
            mirrored = x.view(-1, self.H, self.W, self.C).flip(2).view_as(x)
            x = torch.where(mirror[:, None, None] > 0, mirrored, x)
        x = torch.addcmul(self.shift, x.float(), self.scale)
        return x.view(-1, self.H, self.W, self.C).permute(0, 3, 1, 2)

    def _read(self, index: Tensor, views: list[Tensor], parts: list[slice]) -> Iterator:
        """The same from files: other processes decode a part's images, which are then padded and cropped."""
        files = self.files.files
        size = self.files.size
        columns = index.view(len(index), -1)
        requests = [([files[i] for i in columns[part].T.flatten().tolist()], size) for part in parts]
        for pixels, part in zip(_read_ahead(requests), parts, strict=True):
            rows = self._all_rows(torch.from_numpy(pixels))
            B = part.stop - part.start
            batch = [column[:, part].clone() for column in views]
            for i, column in enumerate(batch):
                column[0] = torch.arange(i * B, (i + 1) * B)  # the image's place among those just read
            yield part, *(self._crop(rows, column) for column in batch)


def split_evenly(T: int, batch_size: int, count: int | None = None) -> list[slice]:
    """ceil(T / batch_size) batches, sizes equal to within one, so that no small rest is left over.

    For count processes (torchrun's, if not given) each size is a multiple of count, and up to count - 1 of
    T are left out.
    """
    count = count or ranks()[1]
    shares = T // count
    steps = min(-(-T // batch_size), shares)
    edges = [count * round(shares * i / steps) for i in range(steps + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


# Folders larger than memory: worker processes of torch's DataLoader decode, all else is as above.


class FolderImages:
    """Image files that stand for a uint8 tensor (N, size, size, 3) too large for memory.

    Indexing gives FolderImages again: no file is opened before `decode`, and no pixels are kept.
    """

    def __init__(self, files: list[str], size: int):
        self.files = files
        self.size = size
        self.shape = (len(files), size, size, 3)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: slice | Tensor) -> "FolderImages":
        chosen = torch.arange(len(self))[index]  # (n,): whatever selects from a tensor selects here
        return FolderImages([self.files[i] for i in chosen.tolist()], self.size)

    def decode(self) -> Tensor:
        """All of them, uint8 (N, size, size, 3). Raises UserError for a file that is no readable image."""
        kind = np.dtype((np.uint8, self.shape[1:]))
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            images = pool.map(_read_image, self.files, itertools.repeat(self.size))
            return torch.from_numpy(np.fromiter(images, kind, len(self)))


def concatenate(a: Tensor | FolderImages, b: Tensor | FolderImages) -> Tensor | FolderImages:
    """The images of a and, after them, those of b; both tensors or both FolderImages."""
    return FolderImages(a.files + b.files, a.size) if isinstance(a, FolderImages) else torch.cat([a, b])


def _read_image(file: str, size: int) -> np.ndarray:
    """A file's pixels, uint8 (size, size, 3), turned as EXIF says, on white where transparent."""
    from PIL import Image, ImageOps
    from torchvision.transforms import functional as TF

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode[0] in "IF":  # more than 8 bits
                sixteen_bits = image.mode.startswith("I;16") or opened.format in ("PNG", "PPM")
                image = Image.fromarray(
                    _to_8_bits(np.asarray(image, np.float64), 65535 if sixteen_bits else 1)
                )
            if image.mode.upper() in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(TF.center_crop(TF.resize(image.convert("RGB"), size), size))
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(f"{file}: not a readable image ({error}); mend or remove it") from None


def _to_8_bits(values: np.ndarray, white: int) -> np.ndarray:
    """Grey values 0 to white -> 0 to 255."""
    low = values.min()
    high = values.max()
    if not 0 <= low <= high <= white:  # also for nan
        raise ValueError(f"grey values {low:g} to {high:g}, expected 8 or 16 bits, or 0 to 1")
    return np.round(255 * (values / white)).astype(np.uint8)


_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = min(8, _CORES)  # processes that read streamed images ahead; with 0 the program waits for each batch
_READERS: list[DataLoader] = []  # idle ones; their processes stay: to start them may take as long as an epoch


class _Decoder:
    """What worker processes do. Small, since it is pickled to them."""

    def __getitem__(self, request: tuple[list[str], int]) -> np.ndarray | str:
        files, size = request
        try:
            return np.stack([_read_image(file, size) for file in files])
        except UserError as error:  # raised here, it would arrive with this process's traceback in its text
            return str(error)


def _as_it_is(pixels: np.ndarray | str) -> np.ndarray | str:
    return pixels  # no tensor: that would be handed over in shared memory, of which containers have little


def _start_reader() -> DataLoader:
    """A DataLoader whose processes run, and stay; what is put into its list `sampler` they read."""
    reader = DataLoader(
        _Decoder(),
        batch_size=None,  # a request is a batch
        sampler=[],
        collate_fn=_as_it_is,
        num_workers=WORKERS,
        persistent_workers=WORKERS > 0,
        generator=torch.Generator(),  # else it draws from torch's own, and dropout would be another one
    )
    kinds = {signal.SIGINT, getattr(signal, "SIGCHLD", signal.SIGINT)}  # Windows has one of them
    before = {kind: signal.getsignal(kind) for kind in kinds}
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # workers inherit it: Ctrl-C is for the program, which ends them
    try:
        iter(reader)  # starts them. Its SIGCHLD handler would raise anywhere, not at the next batch only
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    return reader


def _read_ahead(requests: list[tuple[list[str], int]]) -> Iterator[np.ndarray]:
    """The pixels of each request in turn. Raises UserError for a damaged image or a killed worker."""
    reader = _READERS.pop() if _READERS else _start_reader()
    reader.sampler[:] = requests
    try:
        for pixels in reader:
            if isinstance(pixels, str):
                raise UserError(pixels)
            yield pixels
    except RuntimeError as error:  # DataLoader's, for a worker that was killed
        raise UserError(f"{error}; out of memory? Lower --batch-size or --image-size") from None
    _READERS.append(reader)  # not after an error: then its workers end with it


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
        torch.set_num_threads(1)  # on small matrices more threads are slower
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
        ok = bool(error <= tolerance) and math.isfinite(measured)  # nan is no success
        self.passed.append(ok)
        numbers = f"{theory:>9.4f}{measured:>10.4f}{error:>9.1e}{tolerance:>10.1e}"
        print(f"{claim:<66}{numbers}  {'yes' if ok else 'NO'}")

    def report(self, figure: Path) -> dict:
        """Print the summary; {"ok": whether all claims hold, ...}, what a script's main returns."""
        print(f"{sum(self.passed)} of {len(self.passed)} claims hold; figure: {figure}")
        return {"ok": all(self.passed), "claims": len(self.passed), "folder": str(figure.parent)}


def minimise(loss, *start: Tensor, steps: int = 200) -> list[Tensor]:
    """The tensors at which loss(*tensors) is least: full-batch L-BFGS with a strong Wolfe line search.

    start: the tensors to begin with, of any shapes; the result has the same shapes.
    """
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
    """The edge of the region in which holds(x) is true, by bisection of log x between inside and outside.

    Each step halves the error: it is at most a factor (outside / inside) ** (1 / 2 ** (steps + 1)).
    """
    for _ in range(steps):
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
    """This rank's own device, after meeting the other ranks."""
    if ranks()[1] > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if ranks()[1] > 1 and not dist.is_initialized():
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


def at_least(least: int):
    """argparse type: a whole number, least or more."""
    return _number(int, lambda value: least <= value < 2**63, f"{least} or more")


def a_path(text: str) -> Path:
    """argparse type: a path, with ~ for the home folder."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: there is no such user")
    return Path(path)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the list of methods."""


class Flags(argparse.ArgumentParser):
    """The command line of a script: add the chapter's own flags, then `parse` adds the shared ones.

    script: its name without .py. about: its docstring, whose first line is shown.
    """

    def __init__(self, script: str, about: str | None):
        title = (about or "").partition("\n")[0]  # None under python -OO
        super().__init__(f"{script}.py", None, title, formatter_class=_Help, allow_abbrev=False)
        self.script = script

    def error(self, message: str):
        raise UserError(message)  # one line instead of the usage text; command_line makes it exit code 2

    def parse(
        self, argv: list[str] | None, methods: dict[str, str], usual: list[str], recipes: dict, **defaults
    ) -> argparse.Namespace:
        """The flags, with `folder`: OUT/SCRIPT/DATASET. Raises UserError.

        methods: {name: what it is}. usual: those without --method. recipes: {data set: {flag: default}}, ""
        for all; --dataset is read first. defaults: of shared flags, the same for all data sets.
        """
        own = set(vars(self.parse_args([])))  # the chapter's flags, of which none is required
        self._add_shared([*methods, "all"])
        self.epilog = "\n".join(["methods:", *(f"  {name:<18}{what}" for name, what in methods.items())])
        self.set_defaults(method=usual, **defaults)
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--dataset", nargs="?", default=self.get_default("dataset"))
        base = str(first.parse_known_args(argv)[0].dataset).partition(":")[0].removesuffix("lt")
        self.set_defaults(**recipes[""] | recipes.get(base, {}))
        args = self.parse_args(argv)
        split_name(args.dataset)
        started = [name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
        if any(started[:2]) and not all(started):
            raise UserError("RANK or WORLD_SIZE is set, but torchrun did not start this; unset both")
        if ranks()[1] > 1 and self.script not in ("bmls_msclf", "etf_dr"):
            raise UserError(f"torchrun: {self.script}.py is for one process; bmls_msclf.py and etf_dr.py go")
        args.script = self.script
        args.compared = sorted(own | COMPARED)
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
        data = f"{', '.join(SPECS)}, folder:PATH; with lt long-tailed: cifar10lt"
        precisions = ["auto", "fp32", "bf16"]
        add("--dataset", default="digits", help=data)
        add("--data-dir", type=a_path, default=Path("data"), help="where NAME.npz is kept and downloads go")
        add("--imbalance", type=positive, default=100.0, help="lt: largest class over smallest")
        add("--profile", choices=["exp", "step"], default="exp", help="lt: shape of the long tail")
        add("--image-size", type=at_least(1), default=32, help="folder: pixels")
        add("--test-share", type=fraction, default=0.0, help="folder without train/, test/: to test on")
        add("--method", nargs="+", choices=names, metavar="M", help="one or more, or all; see below")
        add("--seed", type=at_least(0), nargs="+", default=[0], help="one or more; of weights and crops")
        add("--epochs", type=at_least(1), help="passes over the training images")
        add("--batch-size", type=at_least(2), help="images per step")
        add("--lr", type=positive, help="peak learning rate")
        add("--weight-decay", type=fraction, help="on all parameters")
        add("--eval-every", type=at_least(1), default=1, help="epochs from test to test; the last is tested")
        add("--out", type=a_path, default=Path("runs"), help="run folders: OUT/SCRIPT/DATASET/METHOD/seedS")
        add("--overwrite", action="store_true", help="train anew what is there, instead of going on with it")
        add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
        add("--precision", choices=precisions, default="auto", help="inside the network; auto: bf16 if fast")
        add("--compile", action="store_true", help="torch.compile the network; records CUDA graphs")
        add("--dry-run", action="store_true", help="two steps of everything, into OUT/dry-run")
        add("--synthetic", action="store_true", help="check the theory; trains no network")


# Shared flags that decide what is computed: with other values a run is another one. A chapter's own all do.
COMPARED = {"dataset", "imbalance", "profile", "image_size", "test_share", "epochs", "batch_size", "lr"}
COMPARED |= {"weight_decay", "eval_every", "precision", "compile"}


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
        torch.set_num_threads(1)  # on 8 x 8 images more threads are slower
    n = data.counts
    sizes = f"{len(data.train_y):,} training images ({n.max()} to {n.min()} per class)"
    print(f"{args.dataset}: {len(n)} classes, {sizes}, {len(data.test_y):,} test images")
    print(f"{hardware(args.device)}, {args.precision}; into {args.folder}")
    return data


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises UserError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(name, True):
        raise UserError(f"--device {name}: not available here; use --device auto")
    return torch.device(next(n for n, works in available.items() if works) if name == "auto" else name)


def _cpu_info() -> str:
    """What Linux knows of the processor; empty elsewhere."""
    return Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where hardware multiplies it fast (CUDA; CPUs with AMX or AVX512-BF16), else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    fast = {"amx_bf16", "avx512_bf16"} & set(_cpu_info().split())
    return "bf16" if fast and device.type == "cpu" else "fp32"


def hardware(device: torch.device) -> str:
    """What the run ran on, in words, for config.json and for tables."""
    times = f"{ranks()[1]} x " if ranks()[1] > 1 else ""
    if device.type == "cuda":
        return times + torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", _cpu_info())
    return f"{times}{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def _git_commit(folder: Path) -> str:
    """The commit of the code that runs, with + where files differ from it; `unknown` outside a checkout."""
    describe = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    if not (folder / ".git").exists():  # nor in a copy inside another repository
        return "unknown"
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_atomically(path: Path, write) -> None:
    """write(part) fills a temporary file beside path, which is then renamed: path is whole or not there.

    Raises UserError where it cannot be written (a full disk). Under torchrun only rank 0 writes.
    """
    if ranks()[0]:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: cannot be written ({reason}); free space, or choose another") from None


def to_json(content, **layout) -> str:
    """JSON of numbers, text, lists, dicts and paths; what is not defined is NaN, as Python reads it."""
    return json.dumps(content, default=str, **layout)


class Run:
    """One run folder, OUT/SCRIPT/DATASET/METHOD/seedS: what was run, how it went, and where to go on.

        config.json     flags, data, commit, versions   source.py       the script as it was run
        metrics.jsonl   one line per epoch              checkpoint.pt   tensors, numbers, generator states
        features.npz    what nc_metrics.py reads        result.json     its presence: the run is finished

    Run(folder) reads what is there: `config`, `history` (the lines), `finished` (the result, or None). To
    train, take `runs`. Raises UserError for a file that cannot be read.
    """

    FILES = ("result.json", "checkpoint.pt", "metrics.jsonl", "features.npz", "source.py", "config.json")

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.name = self.folder.parent.name
        self.config = self._read("config.json", json.loads)  # a flag that was not given stays None
        self.finished = self._read("result.json", json.loads)
        lines = self._read("metrics.jsonl", lambda text: [json.loads(line) for line in text.splitlines()])
        self.history = lines or []

    def _read(self, file: str, parse, unpack=Path.read_text):
        """parse(unpack(path)) of one of the files, None where it is missing."""
        path = self.folder / file
        try:
            return parse(unpack(path)) if path.exists() else None
        except Exception:  # zip, json and torch raise many kinds for a damaged file; to the user they are one
            raise UserError(f"{path}: cannot be read; --overwrite the run, or change --out") from None

    def _write(self, file: str, text: str) -> None:
        write_atomically(self.folder / file, lambda part: part.write_text(text))

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
        for i, part in enumerate(parts):
            if ranks()[1] > 1 and any(p.requires_grad for p in part.parameters()):
                parts[i] = torch.nn.parallel.DistributedDataParallel(part)
        if self.args.compile:
            parts[0] = torch.compile(parts[0], mode="reduce-overhead")  # records CUDA graphs
        return parts

    def epochs(self, total: int, **parts) -> Iterator[int]:
        """Each epoch still to be trained, from 0; after its body its line and checkpoint are written.

        parts: what changes in training and is needed to go on: modules, optimisers, generators, tensors,
        anything with state_dict and load_state_dict. They are restored before the first epoch. Raises
        UserError for a loss or a weight that is not finite.
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
            line = {"epoch": epoch + 1, "loss": self._mean_loss(epoch, parts["model"]), **self.line}
            line["seconds"] = time.perf_counter() - began
            self.history.append(line)
            self._write("metrics.jsonl", "".join(to_json(entry) + "\n" for entry in self.history))
            self._save(epoch + 1, parts)
            bar.set_postfix({key: f"{line[key]:.3f}" for key in ("loss", "accuracy") if key in line})

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
        raise UserError(f"{self.title}: {reason}; lower --lr, --overwrite. Last good checkpoint: {kept}")

    def _restore(self, parts: dict) -> int:
        """Load the last checkpoint into parts; how many epochs are done. The history is cut back to it."""

        def load(path: Path) -> dict:
            return torch.load(path, map_location="cpu", weights_only=True)  # tensors and numbers, no code

        def restore(state: dict) -> int:
            torch.set_rng_state(state["rng"])  # dropout draws from torch's own generator
            for name, part in parts.items():
                if isinstance(part, Tensor):
                    part.copy_(state[name])
                elif isinstance(part, torch.Generator):
                    part.set_state(state[name])
                else:
                    part.load_state_dict(state[name])
            return state["epoch"]

        epoch = self._read("checkpoint.pt", restore, load) or 0
        self.history = self.history[:epoch]
        if epoch:
            print(f"{self.title}: goes on after epoch {epoch}")
        return epoch

    def _save(self, epoch: int, parts: dict) -> None:
        state = {"epoch": epoch, "rng": torch.get_rng_state()}
        for name, part in parts.items():
            get = "get_state" if isinstance(part, torch.Generator) else "state_dict"
            state[name] = part if isinstance(part, Tensor) else getattr(part, get)()
        write_atomically(self.folder / "checkpoint.pt", lambda part: torch.save(state, part))

    def save_features(self, **arrays: Tensor) -> None:
        """features.npz: train_h (N, d), train_y, test_h, test_y, W (K, d), as numpy arrays.

        Raises UserError for features that are not finite: the last steps have destroyed the network.
        """
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
        if tested:
            result["best_accuracy"] = max(tested)
        result["seconds"] = sum(line["seconds"] for line in self.history)
        with first_rank_first():  # the other ranks have not tested
            self._write("result.json", to_json({**result, **measured}, indent=1))
            self.finished = self._read("result.json", json.loads)

    def other_code(self) -> str:
        """Which file has changed since this run began: the script, common.py, or none ("")."""
        script = Path(__file__).with_name(f"{self.config['script']}.py")
        if self._read("source.py", str) != script.read_text():
            return script.name
        return "" if self.config["common"] == zlib.crc32(Path(__file__).read_bytes()) else "common.py"


def runs(args: argparse.Namespace, data: Dataset, jobs: dict[str, dict] | None = None) -> Iterator[Run]:
    """Each run that is still to be trained, method by method and seed by seed: fresh, or to be gone on with.

    jobs: {run name: the flags in which it differs from the others}, for a command that trains more than one
    run per method and seed. A finished run is passed over; flags, data and code must be those it was begun
    with. --overwrite begins anew. Until the next one is asked for, a run's folder belongs to this process.
    Raises UserError.
    """
    jobs = jobs or {name: {} for name in args.method}
    for (name, job), seed in itertools.product(jobs.items(), args.seed):
        folder = args.folder / name / f"seed{seed}"
        with first_rank_first():
            lock = _take(folder)
            run = _open(folder, args, seed, job, data)
        if not run.finished:
            yield run
        lock.release()


def _take(folder: Path) -> filelock.FileLock:
    """Take the run folder for this process; the lock goes when the process dies. Raises UserError."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not ranks()[0]:
            lock.acquire(timeout=0)
            for left in folder.glob(".*.part*"):  # what a kill left behind
                left.unlink()
    except filelock.Timeout:
        raise UserError(f"{folder}: another command is at work here; wait, or change --out") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); change --out") from None
    return lock


def _open(folder: Path, args: argparse.Namespace, seed: int, job: dict, data: Dataset) -> Run:
    """The run in this folder: the one that is there, compared, or a new one with its config.json."""
    if args.overwrite and not ranks()[0]:
        for file in Run.FILES:  # the result first: what a kill leaves behind is no finished run
            (folder / file).unlink(missing_ok=True)
    run = Run(folder)
    run.args = args
    run.seed = seed
    run.title = f"{run.name} seed {seed}"
    run.device = args.device
    flags = {key: getattr(args, key) for key in args.compared if key not in job}
    about = {"script": args.script, "seed": seed, "flags": flags, "job": job, "data": data.fingerprint}
    about = json.loads(to_json(about))
    if run.finished or (folder / "checkpoint.pt").exists():
        _check_same(run, about)
        return run
    source = Path(__file__).resolve().with_name(f"{args.script}.py")
    run.config = {**about, "commit": _git_commit(source.parent)}
    run.config["common"] = zlib.crc32(Path(__file__).read_bytes())
    run.config |= {"hardware": hardware(run.device), "threads": torch.get_num_threads()}
    run.config |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    run._write("source.py", source.read_text())
    run._write("config.json", to_json(run.config, indent=1))
    return run


def _check_same(run: Run, about: dict) -> None:
    """Raises UserError for other flags, data, or, where the run is not finished, other code."""
    instead = "--overwrite it, or change --out"
    if run.config is None or "common" not in run.config:
        raise UserError(f"{run.folder}: not a run of this version; {instead}")
    before = {**run.config["flags"], **run.config["job"], "data": run.config["data"]}
    for flag, new in {**about["flags"], **about["job"], "data": about["data"]}.items():
        if before.get(flag) != new:
            name = flag if flag == "data" else f"--{flag.replace('_', '-')}"
            raise UserError(f"{run.folder}: was run with {name} {before.get(flag)}, not {new}; {instead}")
    other = run.other_code()
    if other and not run.finished:
        raise UserError(f"{run.folder}: was begun with another version of {other}; {instead}")
    if run.finished:
        made = f", with another version of {other}" if other else ""
        print(f"{run.title}: finished before{made}; --overwrite trains it anew")


def finished_runs(args: argparse.Namespace, data: Dataset, jobs: dict[str, dict] | None = None) -> list[Run]:
    """Every finished run of args.folder with these flags and these data, of whatever method and seed.

    So a later call with fewer methods draws no fewer curves. In the order of this call's methods.
    """
    names = list(jobs or args.method)
    differ = {flag for job in (jobs or {}).values() for flag in job}
    flags = json.loads(to_json({key: getattr(args, key) for key in args.compared if key not in differ}))
    same = []
    for path in sorted(args.folder.glob("*/seed*/result.json")):
        run = Run(path.parent)
        if run.config["flags"] == flags and run.config["data"] == data.fingerprint:
            same.append(run)
    names += sorted({run.name for run in same} - set(names))
    return sorted(same, key=lambda run: (names.index(run.name), run.config["seed"]))


@contextlib.contextmanager
def own_torch_settings() -> Iterator[None]:
    """Above a script's main: float32 by default inside, and the process's settings as before afterwards."""
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    benchmark = torch.backends.cudnn.benchmark
    torch.set_default_dtype(torch.float32)
    torch.backends.cudnn.benchmark = True  # batches come in few shapes: let cuDNN try its algorithms
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.cudnn.benchmark = benchmark


def command_line(main) -> None:
    """Run main() and exit: 0, 1 after a failed claim, 2 after bad input (one line), 130 after Ctrl-C.

    Does nothing in a notebook, where main(["--method", "ce"]) is called and returns results and folder.
    """
    if "ipykernel" in sys.modules:
        print('in a notebook: result = main(["--epochs", "5"])')
        return
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # only rank 0 prints
    sys.stdout.reconfigure(errors="replace")  # a class name may not exist in the terminal's encoding
    try:
        result = main()
    except UserError as error:
        time.sleep(5 if ranks()[0] else 0)  # a rank that is still alive then has failed alone, so it reports
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        without = " without --overwrite" if "--overwrite" in sys.argv else ""
        print(f"\ninterrupted; the same command{without} goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(1 if result.get("ok") is False else 0)


# %% ---------------------------------------------------------------------------------------------- Figures
# Colours of Okabe and Ito (2008), which the colour-blind can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = "os^DPXv<>*"
STYLES = {  # method: its colour and marker, the same in every figure
    name: style
    for style, names in {
        "0o": "ce learnable none euclidean",
        "1s": "mixup ce+mixup",
        "2^": "bmls+ms fno sphere",
        "3D": "hug-mhe cosine etf+dr+mixup",
        "4P": "cb-mixup etf+ce hug-fixed",
        "5X": "bmls hug-mhs",
        "6v": "etf+dr balanced-softmax hug-mgd",
        "7<": "cb+ms ce+norm",
        "3>": "cb",
        "4*": "remix",
    }.items()
    for name in names.split()
}


def styles(names) -> dict[str, dict]:
    """Colour and marker of each name: {name: {"color": ..., "marker": ...}}.

    A method has those of STYLES in every figure; another name has those of its place.
    """
    found = {}
    for i, name in enumerate(names):
        colour, marker = STYLES.get(name, f"{i % len(COLOURS)}{MARKERS[i % len(MARKERS)]}")
        found[name] = {"color": COLOURS[int(colour)], "marker": marker}
    return found


def save_figure(path: Path, figure) -> None:
    """Write a matplotlib Figure as PNG, 200 dots per inch."""
    write_atomically(Path(path), lambda part: figure.savefig(part, dpi=200))


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
    plot.set_xticks(range(len(groups)), groups)
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
        plot.set(**axes)
        plot.set_title(name, parse_math=False)  # a class name may hold a $
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


UNITS = {"%": (1, 100), "°": (1, 1), "": (2, 1)}  # unit: digits after the point, factor


def print_table(found: list[Run], columns: dict[str, tuple[str, str, str]], about: dict[str, str]) -> None:
    """A row per run name, mean ± std over its seeds; below it what the columns and the rows mean.

    columns: {entry of result.json: (title, unit, meaning)}; a dot leads into a dict, `heads.own`. An entry
    that no run has is left out. about: {run name: what it is}.
    """

    def entry(run: Run, key: str):
        value = run.finished
        for part in key.split("."):
            value = value.get(part, {})
        return value

    by_name = {}
    for run in found:
        by_name.setdefault(run.name, []).append(run)
    columns = {key: column for key, column in columns.items() if any(entry(run, key) != {} for run in found)}
    rows = []
    for name, group in by_name.items():
        row = [f"{name} *" if any(run.other_code() for run in group) else name, len(group)]
        for key, (_, unit, _) in columns.items():
            digits, factor = UNITS[unit]
            row.append(mean_std([entry(run, key) or 0.0 for run in group], digits, factor))
        rows.append(row)
    text = "\n" + table(["method", "seeds", *(title for title, _, _ in columns.values())], rows)
    text += "".join(f"\n{title}: {unit} {meaning}" for title, unit, meaning in columns.values())
    text += "".join(f"\n{name}: {about[name]}" for name in by_name if name in about)
    if any(row[0].endswith(" *") for row in rows):
        text += "\n*: made with another version of the script or of common.py"
    try:
        "±".encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.replace("±", "+-")
    print(text)
