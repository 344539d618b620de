"""The Spherization layer against the published matrix form, in one run: time and memory, forward + backward.

    python benchmarks/spherization.py                 # under a minute; wants a quiet machine
    python benchmarks/spherization.py --device cuda

Two forms are in spherization.py: `MatrixForm`, written from its formula, with its two (n+1)^2 matrices, and
`Spherization`; a third, below, is ours without the derivative written out. All get the same z (batch, n), the
same gradient of x, and learn the scale s.
- ms: the fastest of some repetitions, the forms in turn, after one of each to warm up.
- MiB: the most that is allocated at once beyond z, x and their gradients, which any layer must have. Counted
  are buffers, what is kept for the backward pass, and what is needed in passing: every allocation that
  PyTorch's profiler records (on CUDA: its allocator's own peak). `with z, x` adds those four.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import hardware, pick_device, table
from spherization import MatrixForm, Spherization

MIB = 2**20


class Autograd(Spherization):
    """Our forward pass in plain operations, its derivative left to autograd: is the custom one worth it?"""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        c = torch.sin((math.pi / 2 - self.phi_L) * torch.sigmoid(-self.s * z))
        log_P = torch.cumsum(0.5 * torch.log1p(-c * c), 1)
        zero = torch.zeros_like(z[:, :1])
        return self.radius * torch.cat([zero, log_P], 1).exp() * torch.cat([c, zero + 1], 1)


def step(layer: torch.nn.Module, z: torch.Tensor, g: torch.Tensor) -> None:
    z.grad = layer.s.grad = None
    layer(z).backward(g)


def fastest(layers, z, g, wait) -> list[float]:
    """Milliseconds of each layer's step, measured in turn so that a disturbance hits both."""
    best = [float("inf")] * len(layers)
    for layer in layers:
        step(layer, z, g)
    began = time.perf_counter()
    repetitions = 0
    while repetitions < 3 or (repetitions < 200 and time.perf_counter() - began < 4):
        for i, layer in enumerate(layers):
            wait()
            start = time.perf_counter()
            step(layer, z, g)
            wait()
            best[i] = min(best[i], 1000 * (time.perf_counter() - start))
        repetitions += 1
    return best


def peak(layer, z, g) -> float:
    """Most bytes held at once: the layer's buffers and what a step allocates; z and g are there before."""
    buffers = sum(b.numel() * b.element_size() for b in layer.buffers())
    z.grad = layer.s.grad = None
    if z.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(z).backward(g)
        return buffers + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        layer(z).backward(g)
    found = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()  # negative when freed
        most = max(most, now)
    return buffers + most


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--n", type=int, nargs="+", default=[64, 512, 4096], help="angles")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    args = parser.parse_args()
    device = pick_device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{hardware(device)}, float32\n")
    rows, ratios = [], {}
    for n in args.n:
        layers = [form(n).to(device) for form in (MatrixForm, Autograd, Spherization)]
        for batch in args.batch:
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(batch, n, generator=generator).to(device).requires_grad_()
            g = torch.randn(batch, n + 1, generator=generator).to(device)
            ms = fastest(layers, z, g, wait)
            # a step allocates x and dL/dz too: the layer's own is what is left without them
            must = 4 * batch * (2 * n + 1)
            whole = [peak(layer, z, g) for layer in layers]
            own = [bytes_ - must for bytes_ in whole]
            ratios[n, batch] = ms[0] / ms[-1], own[0] / own[-1]
            whole = [bytes_ + must for bytes_ in whole]  # z and dL/dx
            row = [f"n = {n}, batch {batch}"]
            for unit, digits, found in ((1, 2, ms), (MIB, 1, own), (MIB, 1, whole)):
                row += [f"{value / unit:.{digits}f}" for value in found]
            rows.append(row)
    names = ("matrix", "autograd", "ours")
    header = [f"{name} {unit}" for unit in ("ms", "MiB", "with z, x") for name in names]
    print(table(["", *header], rows))
    print()
    targets = {64: "1 and 0", 4096: "5 and 10"}
    for (n, batch), (faster, smaller) in ratios.items():
        if n in targets:
            found = f"{faster:.1f} times as fast, {smaller:.1f} times less memory of its own"
            print(f"n = {n}, batch {batch}: {found} (targets {targets[n]})")


if __name__ == "__main__":
    main()
