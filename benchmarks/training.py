"""One epoch of training, three ways in one run: images per second of ResNet-32 and ResNet-18 at batch 128.

    python benchmarks/training.py                 # some minutes on two cores; wants a quiet machine
    python benchmarks/training.py --device cuda
    python benchmarks/training.py --compile       # (a) and (b) with torch.compile
    python benchmarks/training.py --profile       # what (a) spends its time on
    python benchmarks/training.py --memory        # peak memory of each script

(a) bare      forward, backward and step on one batch that is there already, in the precision and memory
              layout of (b): no loader and no bookkeeping
(b) ours      an epoch of the script's own `train`, as metrics.jsonl records it: bmls_msclf.py's ce with
              ResNet-32, hug.py's ce with ResNet-18. Order, crops, flips, normalisation and losses included
(c) usual     fp32, NCHW, a DataLoader with two workers that crop and flip PIL images one by one, `.item()`
              after every step

The first line is of the loaders alone: that of (c) against `Batches`, the best of three epochs each.

Images are random, 32 x 32, of 100 classes: no speed here depends on what is in them. Each way has one epoch
to warm up and then the best of three, in turn, so that a machine that slows down slows all of them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bmls_msclf
import hug
from common import Batches, Dataset, hardware, pick_device, pick_precision, runs, split_evenly, table

ROOT = Path(__file__).resolve().parent.parent
BATCH = 128
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CROP, FLIP = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
USUAL = transforms.Compose([CROP, FLIP, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
NETWORKS = {  # script and flags
    "ResNet-32": (bmls_msclf, ["--dataset", "cifar100", "--method", "ce"]),
    "ResNet-18": (hug, ["--dataset", "cifar100", "--method", "ce"]),
}


def random_data(N: int) -> Dataset:
    """N training images and a few to test on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (N + 200, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(N + 200) % 100
    classes = tuple(map(str, range(100)))
    splits = images[:N], labels[:N], images[N:], labels[N:]
    return Dataset(*splits, classes, torch.tensor(MEAN), torch.tensor(STD), 4, True, "random")


def crop_and_flip(batch):
    """(x, y) of a list of pixels and labels: the usual transforms of PIL images, one by one."""
    x = torch.stack([USUAL(Image.fromarray(pixels)) for pixels, _ in batch])
    return x, torch.tensor([label for _, label in batch])


def usual_loader(data, device, **options):
    samples = list(zip(data.train_x.numpy(), data.train_y.tolist(), strict=True))
    options |= {"num_workers": 2, "collate_fn": crop_and_flip, "pin_memory": device.type == "cuda"}
    return DataLoader(samples, BATCH, shuffle=True, **options)


def loaders(data, device, wait) -> str:
    """Images per second of the usual loader and of ours."""
    generator = torch.Generator().manual_seed(0)
    usual = usual_loader(data, device, persistent_workers=True)
    batches = Batches(data.train_x, data.mean, data.std, pad=4, flip=True, device=device)

    def ours():
        return batches.epoch(torch.randperm(batches.N, generator=generator), BATCH, generator)

    def rate(epoch):  # the first epoch to warm up
        return max([timed(lambda: sum(len(x.to(device)) for x in epoch()), wait) for _ in range(4)][1:])

    slow = rate(lambda: (x for x, _ in usual))
    fast = rate(lambda: (x for _, x in ours()))
    return (
        f"loader, images/s: DataLoader {slow:,.0f}, Batches {fast:,.0f}, {fast / slow:.1f} times (target 10)"
    )


def flags_of(script, words, args, device):
    """The script's own flags, with this benchmark's device and precision."""
    words = [*words, "--batch-size", str(BATCH), *(["--compile"] if args.compile else [])]
    flags = script.parse(words)
    flags.device = device
    flags.precision = pick_precision("auto", device)
    return flags


def step(model, optimizer, x, y, bf16: bool):
    head = model["classifier" if "classifier" in model else "head"]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        h = model["network"](x)
    h, W = head(h)[:2]
    loss = F.cross_entropy(h @ W.T, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def bare(script, flags, data, device):
    """(a): as many steps as an epoch has, all on one batch."""
    model = script.build_model(flags, "ce", data)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    if flags.compile:
        model["network"].compile(mode="reduce-overhead")
    x = torch.randn(BATCH, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(BATCH, device=device) % 100
    steps = len(split_evenly(len(data.train_y), BATCH))

    def epoch():
        for _ in range(steps):
            step(model, optimizer, x, y, flags.precision == "bf16")
        return steps * BATCH

    return epoch


def usual(script, flags, data, device):
    """(c): what a first script for CIFAR looks like."""
    model = script.build_model(flags, "ce", data).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    loader = usual_loader(data, device)

    def epoch():
        total = 0.0
        for x, y in loader:
            total += step(model, optimizer, x.to(device), y.to(device), False).item() * len(y)
        return len(data.train_y)

    return epoch


def ours(script, flags, data, epochs: int) -> list[float]:
    """(b): images per second of each epoch but the first, and the last, which is tested."""
    with tempfile.TemporaryDirectory() as folder:
        flags.folder = Path(folder)
        flags.epochs = epochs + 2
        flags.eval_every = flags.epochs
        measure = script.measure
        script.measure = lambda *_: {}
        try:
            for run in runs(flags, data):
                script.train(flags, run, data)
        finally:
            script.measure = measure
        seconds = [line["seconds"] for line in run.history]
    return [len(data.train_y) / s for s in seconds[1:-1]]


def timed(epoch, wait) -> float:
    """Images per second of one epoch."""
    wait()
    began = time.perf_counter()
    n = epoch()
    wait()
    return n / (time.perf_counter() - began)


def speed(args, device) -> None:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    data = random_data(args.images or (10_847 if device.type == "cuda" else 4 * BATCH))
    print(f"{hardware(device)}; (a) and (b) in {pick_precision('auto', device)}, channels_last\n")
    print(loaders(random_data(10_847), device, wait), end="\n\n")
    rows = []
    for name, (script, words) in NETWORKS.items():
        flags = flags_of(script, words, args, device)
        a = bare(script, flags, data, device)
        c = usual(script, flags, data, device)
        rates = {"a": [], "b": [], "c": []}
        for repeat in range(4):  # the first to warm up
            for key, epoch in (("a", a), ("c", c)):
                rate = timed(epoch, wait)
                rates[key] += [rate] if repeat else []
            rates["b"] += ours(script, flags, data, 1) if repeat else []
        best = {key: max(found) for key, found in rates.items()}
        for key, what in (("a", "bare"), ("b", "ours"), ("c", "usual")):
            shares = f"{100 * best[key] / best['a']:.0f}", f"{best[key] / best['c']:.2f}"
            rows.append([f"{name}, ({key}) {what}", f"{best[key]:,.0f}", *shares])
    print(table(["one epoch", "images/s", "% of (a)", "times (c)"], rows))
    print("\ntargets: (b) at least 95% of (a), at least 2.5 times (c) on two cores")


KINDS = {  # words in the names of PyTorch's operations
    "convolution, forward": ["mkldnn_convolution", "cudnn_convolution", "thnn_conv"],
    "convolution, backward": ["convolution_backward"],
    "BatchNorm": ["batch_norm"],
    "ReLU": ["clamp_min", "relu", "threshold"],
    "matrix products": ["mm", "bmm", "addmm"],
}


def profile(args, device) -> None:
    """Shares of the time of (a), by kind of operation."""
    cells = {}
    for name, (script, words) in NETWORKS.items():
        epoch = bare(script, flags_of(script, words, args, device), random_data(2 * BATCH), device)
        epoch()
        watched = [torch.profiler.ProfilerActivity.CPU]
        watched += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
        with torch.profiler.profile(activities=watched) as found:
            epoch()
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in found.key_averages():
            time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            kinds = (kind for kind, words in KINDS.items() if any(word in event.key for word in words))
            spent[next(kinds, "other")] += time
        cells[name] = [f"{100 * time / sum(spent.values()):.0f}" for time in spent.values()]
    print(f"{hardware(device)}; {pick_precision('auto', device)}, channels_last\n")
    rows = zip([*KINDS, "other"], *cells.values(), strict=True)
    print(table(["share of a step (%)", *cells], [list(row) for row in rows]))


# A script's main in a process of its own; its last line: peak memory of the host (on Linux), and of the card
PROGRAM = """
import sys, torch, {script}
{script}.main(sys.argv[1:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
host = int(status["VmHWM"].split()[0]) * 1024  # getrusage would begin with the peak of who started us
print(host, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
"""


def memory(args) -> None:
    """Peak memory of two steps and the measurements of each script: its default, and CIFAR's shapes.

    50,000 random images are loaded to train on, and 1,000 to test on.
    """
    cifar = {
        "bmls_msclf": "cifar100lt --method bmls+ms",
        "etf_dr": "cifar100lt --method etf+dr",
        "hug": "cifar10 --method hug-mhe --per-class 200",
        "spherization": "cifar10 --method sphere --task overlap",
        "fno_continual": "cifar10 --method der++ --classifier fno --no-mask --per-class 200",
        "nc_metrics": "cifar10 --method ce --per-class 200",
    }
    rows, rng = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for K in (10, 100):
            arrays = {"classes": np.array([str(k) for k in range(K)])}
            for split, N in (("train", 50_000), ("test", 1_000)):
                arrays[f"{split}_x"] = rng.integers(256, size=(N, 32, 32, 3), dtype=np.uint8)
                arrays[f"{split}_y"] = np.arange(N) % K
            np.savez(Path(folder) / f"cifar{K}.npz", **arrays)
        for script, flags in cifar.items():
            cells = []
            for extra in ([], ["--dataset", *flags.split()]):
                words = ["--dry-run", "--out", folder, "--data-dir", folder, "--device", args.device, *extra]
                command = [sys.executable, "-c", PROGRAM.format(script=script), *words]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
                host, card = map(int, done.stdout.split()[-2:]) if done.returncode == 0 else (0, 0)
                cells += [f"{size / 2**30:.2f}" if size else "-" for size in (host, card)]
            rows.append([f"{script}.py", *cells, flags])
    header = ["default: host", "card", "CIFAR: host", "card", "data set and flags"]
    print(table(["peak memory (GiB)", *header], rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--images", type=int, help="of an epoch; 10,847 (CIFAR-100-LT) on CUDA, else 512")
    parser.add_argument("--compile", action="store_true", help="torch.compile in (a) and (b)")
    parser.add_argument("--profile", action="store_true", help="what a step spends its time on instead")
    parser.add_argument("--memory", action="store_true", help="peak memory of each script instead")
    args = parser.parse_args()
    if args.images is not None and args.images < 2 * BATCH:
        parser.error(f"--images {args.images}: expected {2 * BATCH} or more, two steps")
    if args.memory:
        memory(args)
    else:
        what = profile if args.profile else speed
        what(args, pick_device(args.device))


if __name__ == "__main__":
    main()
