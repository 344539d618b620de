"""A folder of images larger than memory: streamed from disk, it gives what the same folder gives in memory.

The tests' folder is small, so the limit is lowered below it; all else is as in use, worker processes too.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Batches, FolderImages, load_dataset

SIZE = 8
TRAIN, TEST = (12, 7, 9, 8), (2, 3, 2, 2)  # images of each class
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK")


def write_images(path: Path) -> None:
    """PATH/train and PATH/test: noise of several sizes and modes, PNG and JPEG; no two images are alike."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", TRAIN), ("test", TEST)):
        for k, count in enumerate(counts):
            where = path / split / f"class{k}"
            where.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (9 + 3 * (i % 4), 8 + 5 * (i % 3), 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(MODES[(i + k) % len(MODES)])
                suffix = "jpg" if image.mode in ("RGB", "L", "CMYK") and i % 2 else "png"
                image = image.convert("RGB") if (image.mode, suffix) == ("CMYK", "png") else image
                image.save(where / f"{i}.{suffix}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read by all tests of this file, and changed by none."""
    path = tmp_path_factory.mktemp("streaming") / "images"
    write_images(path)
    return path


def load(folder: Path, streamed: bool, name: str = "folder") -> common.Dataset:
    with pytest.MonkeyPatch.context() as patch:
        if streamed:
            patch.setattr(common, "_FOLDER_LIMIT", 0)
        data = load_dataset(f"{name}:{folder}", image_size=SIZE, imbalance=4)
    for images in (data.train_x, data.test_x):
        assert isinstance(images, FolderImages if streamed else torch.Tensor)
    return data


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# %% What is streamed, and what stands for its images


def test_what_does_not_fit_is_streamed_and_the_user_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(common, "_FOLDER_LIMIT", (sum(TRAIN) + sum(TEST)) * SIZE * SIZE * 3)
    assert isinstance(load_dataset(f"folder:{folder}", image_size=SIZE).train_x, torch.Tensor)
    assert capsys.readouterr().err == ""
    data = load_dataset(f"folder:{folder}", image_size=SIZE + 1)
    assert isinstance(data.train_x, FolderImages) and isinstance(data.test_x, FolderImages)
    line = capsys.readouterr().err
    assert f"folder:{folder}" in line and "--image-size 9" in line and "stream" in line


def test_the_limit_leaves_room_in_this_machines_memory():
    assert 0 < common._FOLDER_LIMIT <= 32 * 2**30
    if sys.platform == "linux":
        kib = int(Path("/proc/meminfo").read_text().split()[1])  # MemTotal: 24 kB
        assert common._FOLDER_LIMIT <= kib * 1024 / 2


def test_labels_statistics_and_pixels_are_those_of_memory(folder):
    held, streamed = load(folder, False), load(folder, True)
    assert streamed.train_y.equal(held.train_y) and streamed.test_y.equal(held.test_y)
    assert streamed.mean.equal(held.mean) and streamed.std.equal(held.std)
    assert (streamed.classes, streamed.pad, streamed.flip) == (held.classes, held.pad, held.flip)
    assert streamed.train_x.shape == held.train_x.shape == (sum(TRAIN), SIZE, SIZE, 3)
    assert streamed.train_x.decode().equal(held.train_x) and streamed.test_x.decode().equal(held.test_x)


def test_long_tail_is_the_same_subset(folder):
    held, streamed = load(folder, False, "folderlt"), load(folder, True, "folderlt")
    assert held.counts.tolist() == [9, 2, 5, 3]  # 9 = 36 images / 4 classes; the largest class is the head
    assert streamed.train_y.equal(held.train_y) and streamed.train_x.decode().equal(held.train_x)
    assert streamed.mean.equal(held.mean)


@pytest.mark.parametrize(
    "index",
    [slice(3, 8), slice(None, None, 5), torch.tensor([7, 0, 7]), torch.arange(36) % 7 == 2, slice(0, 0)],
    ids=["slice", "steps", "indices", "mask", "nothing"],
)
def test_selecting_is_a_tensors(index, folder):
    held, streamed = load(folder, False).train_x[index], load(folder, True).train_x[index]
    assert isinstance(streamed, FolderImages)
    assert streamed.shape == held.shape and len(streamed) == len(held)
    assert streamed.decode().equal(held)


def test_concatenate(folder):
    held, streamed = load(folder, False), load(folder, True)
    images = common.concatenate(streamed.train_x, streamed.test_x)
    assert images.decode().equal(torch.cat([held.train_x, held.test_x]))
    assert images.decode().equal(common.concatenate(held.train_x, held.test_x))


# %% Batches


def loaders(folder: Path, pad: int = 2, flip: bool = True) -> tuple[Batches, Batches]:
    return tuple(
        Batches(data.train_x, data.mean, data.std, pad=pad, flip=flip)
        for data in (load(folder, False), load(folder, True))
    )


def draws(n: int) -> torch.Tensor:
    return torch.randint(sum(TRAIN), (n, 2), generator=generator(0))  # some images more than once


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pad, flip", [(0, False), (3, True)])
def test_batches_are_those_of_memory_bit_for_bit(workers, pad, flip, folder, monkeypatch):
    monkeypatch.setattr(common, "WORKERS", workers)
    held, streamed = loaders(folder, pad, flip)
    for batch_size in (40, 7):
        expected = list(held.epoch(draws(50), batch_size, generator(1)))
        found = list(streamed.epoch(draws(50), batch_size, generator(1)))
        assert [part for part, *_ in found] == [part for part, *_ in expected]
        for (_, *ours), (_, *theirs) in zip(found, expected, strict=True):
            assert all(a.equal(b) and a.stride() == b.stride() for a, b in zip(ours, theirs, strict=True))
    index = draws(9)[:, 0]
    assert streamed.load(index, generator(2)).equal(held.load(index, generator(2)))
    for (_, x), (_, y) in zip(streamed.all(10), held.all(10), strict=True):
        assert x.equal(y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_the_card_are_those_of_memory(folder):
    held, streamed = (
        Batches(data.train_x, data.mean, data.std, pad=2, flip=True, device="cuda")
        for data in (load(folder, False), load(folder, True))
    )
    epochs = [loader.epoch(draws(30), 4, generator(0)) for loader in (streamed, held)]
    for (_, *ours), (_, *theirs) in zip(*epochs, strict=True):
        assert all(a.is_cuda and a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_worker_processes_stay_over_epochs_and_draw_nothing(folder, monkeypatch):
    """To start them may take as long as an epoch; torch's own generator, dropout's, is not touched."""
    monkeypatch.setattr(common, "WORKERS", 2)
    monkeypatch.setattr(common, "_READERS", [])
    _, streamed = loaders(folder)
    before = torch.get_rng_state()
    others = {child.pid for child in multiprocessing.active_children()}
    list(streamed.epoch(draws(20), 4, generator(0)))
    first = {child.pid for child in multiprocessing.active_children()} - others
    list(streamed.epoch(draws(20), 4, generator(0)))
    assert {child.pid for child in multiprocessing.active_children()} - others == first and len(first) == 2
    assert torch.get_rng_state().equal(before)


def test_two_epochs_side_by_side(folder, monkeypatch):
    monkeypatch.setattr(common, "WORKERS", 2)
    held, streamed = loaders(folder)
    ours = [streamed.epoch(draws(30), 5, generator(i)) for i in range(2)]
    theirs = [held.epoch(draws(30), 5, generator(i)) for i in range(2)]
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            assert all(x.equal(y) for x, y in zip(next(a)[1:], next(b)[1:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_wherever_it_is_read(workers, tmp_path, monkeypatch, user_error):
    write_images(tmp_path)
    _, streamed = loaders(tmp_path)
    broken = tmp_path / "train" / "class2" / "1.png"
    broken = broken if broken.exists() else broken.with_suffix(".jpg")
    broken.write_bytes(broken.read_bytes()[:60])
    monkeypatch.setattr(common, "WORKERS", workers)
    monkeypatch.setattr(common, "_READERS", [])
    before = set(multiprocessing.active_children())
    try:
        list(streamed.all(4))
        text = "no error"
    except common.UserError as error:  # (pytest.raises would keep the error, and the workers with it)
        text = str(error)
    assert text.startswith(f"{broken}: not a readable image")
    assert set(multiprocessing.active_children()) <= before  # at once, not five seconds per worker later
    with user_error(f"{broken}: not a readable image"):
        load(tmp_path, True)  # the pass for mean and std meets it too


def test_a_killed_worker_is_one_line(folder, monkeypatch, user_error):
    monkeypatch.setattr(common, "WORKERS", 1)
    monkeypatch.setattr(common, "_READERS", [])
    _, streamed = loaders(folder)
    before = set(multiprocessing.active_children())
    epoch = streamed.epoch(draws(30), 2, generator(0))
    next(epoch)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # DataLoader's own signal handler would raise here, in the middle of a training step
    with user_error("--batch-size"):
        list(epoch)
    assert set(multiprocessing.active_children()) <= before


# %% Scripts

RUNS = {
    "bmls_msclf": ["--method", "bmls+ms"],
    "etf_dr": ["--method", "etf+dr+mixup", "--net", "cnn"],
    "hug": ["--method", "hug-mhe", "--net", "cnn"],
    "nc_metrics": ["--method", "ce", "--net", "cnn", "--augment"],
    "fno_continual": ["--method", "der++", "--classifier", "fno", "--net", "cnn", "--tasks", "2"],
    "spherization": ["--task", "retain", "--method", "sphere", "--net", "mlp"],
}


def numbers(out: Path) -> dict:
    """Everything that the runs under `out` measured, but times and names of folders."""
    found = {}
    for path in sorted(out.rglob("*.json*")):
        if path.name != "config.json":
            text = path.read_text()
            lines = map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text])
            found[str(path.relative_to(out))] = [
                {key: value for key, value in line.items() if key != "seconds"} for line in lines
            ]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_script_reads_a_streamed_folder(name, folder, tmp_path, monkeypatch, capsys):
    script = importlib.import_module(name)
    monkeypatch.setattr(common, "WORKERS", 1)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())
    argv = ["--dataset", f"folder:{folder}", "--image-size", str(SIZE), "--dry-run", *RUNS[name]]
    argv += ["--batch-size", "6", "--device", "cpu", "--precision", "fp32", "--out"]
    monkeypatch.setattr(common, "_FOLDER_LIMIT", 0)
    script.main([*argv, str(tmp_path / "streamed")])
    assert "stream" in capsys.readouterr().err
    streamed = numbers(tmp_path / "streamed")
    assert any(path.endswith("result.json") for path in streamed)
    if name == "fno_continual":  # once: it reads epochs and, for its memory, single batches
        monkeypatch.setattr(common, "_FOLDER_LIMIT", 2**30)
        script.main([*argv, str(tmp_path / "held")])
        assert "stream" not in capsys.readouterr().err
        assert json.dumps(streamed) == json.dumps(numbers(tmp_path / "held"))  # as text: nan is nan


def test_a_broken_test_image_ends_a_script_with_one_line(tmp_path, monkeypatch, capsys, user_error):
    import bmls_msclf

    write_images(tmp_path / "images")
    (broken,) = (tmp_path / "images" / "test" / "class0").glob("0.*")  # read in evaluation, not before
    broken.write_bytes(b"")
    monkeypatch.setattr(common, "_FOLDER_LIMIT", 0)
    monkeypatch.setattr(common, "WORKERS", 2)
    argv = ["--dataset", f"folder:{tmp_path / 'images'}", "--image-size", str(SIZE), "--method", "ce"]
    with user_error(f"{broken}: not a readable image"):
        bmls_msclf.main([*argv, "--epochs", "1", "--out", str(tmp_path / "out")])
    assert "stream" in capsys.readouterr().err


def in_a_terminal(argv: list[str], out: Path) -> None:
    """bmls_msclf.py as the leader of a process group of its own; what it says is kept in out/stderr."""
    import bmls_msclf

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = (out / "stderr").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    sys.stdout = (out / "stdout").open("w")
    sys.argv = ["bmls_msclf.py", *argv]
    common._FOLDER_LIMIT, common.WORKERS = 0, 2
    common._READERS.clear()
    common.command_line(bmls_msclf.main)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process group")
def test_ctrl_c_ends_the_workers_too(folder, tmp_path):
    """As a terminal does it: the interrupt reaches the program and all of its workers at once."""
    argv = ["--dataset", f"folder:{folder}", "--image-size", str(SIZE), "--method", "bmls", "--device", "cpu"]
    argv += ["--epochs", "9999", "--batch-size", "4", "--out", str(tmp_path)]
    program = multiprocessing.get_context("fork").Process(target=in_a_terminal, args=(argv, tmp_path))
    program.start()
    try:
        while not list(tmp_path.rglob("checkpoint.pt")) and program.is_alive():
            time.sleep(0.05)
        os.killpg(program.pid, signal.SIGINT)
        program.join(120)
        error = (tmp_path / "stderr").read_text()
        told, *_, last = error.strip().splitlines()
        assert program.exitcode == 130 and "stream" in told and "the same command goes on" in last
        assert "Traceback" not in error
        with pytest.raises(ProcessLookupError):  # the group is empty
            until = time.monotonic() + 60
            while time.monotonic() < until:
                os.killpg(program.pid, 0)
                time.sleep(0.05)
    finally:
        program.kill()


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_ctrl_c_does_not_reach_workers_that_are_still_starting(method, folder, monkeypatch, capfd):
    """These import torch first, for seconds, in which Python's own handler would print a traceback each."""
    monkeypatch.setattr(common, "WORKERS", 1)
    monkeypatch.setattr(common, "_READERS", [])
    _, streamed = loaders(folder)
    capfd.readouterr()
    usual = multiprocessing.get_start_method()
    before = set(multiprocessing.active_children())
    multiprocessing.set_start_method(method, force=True)
    try:
        epoch = streamed.all(20)
        common._READERS.append(common._start_reader())
        (worker,) = set(multiprocessing.active_children()) - before
        for _ in range(5):
            time.sleep(0.1)
            os.kill(worker.pid, signal.SIGINT)
        assert len(list(epoch)) == 2 and worker.is_alive()
    finally:
        multiprocessing.set_start_method(usual, force=True)
    assert capfd.readouterr().err == ""
