"""The loader of common.py against the usual one, in one run: images per second, and its share of an epoch.

    python benchmarks/loader.py                 # about a minute on two cores; wants a quiet machine
    python benchmarks/loader.py --device cuda

Usual: torchvision's RandomCrop(padding=4), RandomHorizontalFlip, ToTensor, Normalize on PIL images, one by
one in a DataLoader with two workers. Ours: `Batches`, the same crop, flip and normalisation, gathered from
uint8 on the device. Both deliver float32 (B, 3, 32, 32) batches of 128, 10,847 images an epoch
(CIFAR-100-LT at 100). The pixels are random: neither loader's speed depends on them. The best of three
epochs counts, after one to warm up. Then an epoch of bmls_msclf.py's `bmls+ms`, two images a sample, with
each part of it timed.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bmls_msclf as script
from common import Batches, hardware, long_tail_counts, pick_device, pick_precision, table

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


class PILImages(TorchDataset):
    """As torchvision.datasets.CIFAR100 does it: an array to PIL, then the transforms."""

    def __init__(self, images, labels):
        self.images, self.labels = images.numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def best_epoch(epoch, wait) -> float:
    """Seconds of the fastest of three epochs, after one that does not count."""
    seconds = []
    for _ in range(4):
        wait()
        began = time.perf_counter()
        epoch()
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--steps", type=int, default=60, help="training steps that are timed")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    generator = torch.Generator().manual_seed(0)
    counts = long_tail_counts(100, 500, 100)
    labels = torch.arange(100).repeat_interleave(torch.tensor(counts))
    N, K, B = len(labels), 100, 128
    images = torch.randint(256, (N, 32, 32, 3), dtype=torch.uint8, generator=generator)
    print(f"{hardware(device)}, network in {precision}\n")

    usual = DataLoader(
        PILImages(images, labels), B, shuffle=True, num_workers=2, persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    ours = Batches(images, torch.tensor(MEAN), torch.tensor(STD), pad=4, flip=True, device=device)

    def usual_epoch():
        for x, _ in usual:
            x.to(device, non_blocking=True)

    def our_epoch():
        for _ in ours.epoch(torch.randperm(N, generator=generator), B, generator):
            pass

    rates = {
        "DataLoader, 2 workers": N / best_epoch(usual_epoch, wait),
        "Batches": N / best_epoch(our_epoch, wait),
    }
    usual_rate = rates["DataLoader, 2 workers"]
    rows = [[name, f"{rate:,.0f}", f"{rate / usual_rate:.1f}"] for name, rate in rates.items()]
    print(table(["loader", "images/s", "times"], rows))

    # One epoch's parts, each waited for, so that the device's work is charged to the part that asked for it
    model = torch.nn.ModuleDict(
        {"network": script.ResNet32(), "classifier": script.Classifier(K, 64, "linear", False, 16.0)}
    ).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    sampler = script.BalancedMixedLabelSampler(labels, K, generator)
    spent = {"draw the epoch": 0.0, "load and mix": 0.0, "forward, backward, step": 0.0}
    mark = [0.0]

    def charge(part: str | None) -> None:
        wait()
        now = time.perf_counter()
        if part:
            spent[part] += now - mark[0]
        mark[0] = now

    charge(None)
    drawn = sampler.draw(N)
    batches = ours.epoch(drawn, B, generator)
    lam = torch.rand(N, generator=generator).to(device)
    charge("draw the epoch")
    spent["draw the epoch"] *= args.steps * B / N  # the share of it that falls to the timed steps
    for step, (part, x_a, x_b) in enumerate(batches):
        mix = lam[part, None, None, None]
        x = mix * x_a + (1 - mix) * x_b
        charge("load and mix" if step >= 5 else None)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = model["network"](x)
        z = model["classifier"](h)[2]
        a, b = labels[drawn[part]].to(device).unbind(1)
        loss = script.ms_raw(z, a, b, lam[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        charge("forward, backward, step" if step >= 5 else None)
        if step == args.steps + 4:
            break
    whole = sum(spent.values())
    rows = [[name, f"{1000 * s / args.steps:.2f}", f"{100 * s / whole:.1f}"] for name, s in spent.items()]
    print(f"\n{table(['part of a training epoch', 'ms a step', '% of the epoch'], rows)}")
    other = 100 * (1 - spent["forward, backward, step"] / whole)
    ratio = rates["Batches"] / usual_rate
    print(f"\n{ratio:.1f} times the images per second (target 10)")
    print(f"{other:.1f}% of the epoch outside forward, backward and step (target 5)")


if __name__ == "__main__":
    main()
