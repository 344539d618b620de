"""The Spherization layer against the released matrix form, in one run: time, memory, accuracy.

    python benchmarks/spherization.py                 # under a minute; wants a quiet machine
    python benchmarks/spherization.py --device cuda

`MatrixForm` is written from the released code's formula, with its two (n+1)^2 matrices; `Spherization` is
ours. Both get the same z (batch, n), the same gradient of x, and learn the scale s, forward and backward.
- ms: the fastest of some repetitions, the forms in turn, after one of each to warm up.
- MiB: the most that is allocated at once beyond z, x and their gradients, which any layer must have. Counted
  are buffers, what is kept for the backward pass, and what is needed in passing: every allocation that
  PyTorch's profiler records (on CUDA: its allocator's own peak). `with z, x` adds those four.
- error: largest difference of x from its definition in float64, as a share of the radius, on ordinary z and
  where all n numbers are alike.
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
from spherization import Spherization, lower_bound

MIB = 2**20


class MatrixForm(torch.nn.Module):
    """The layer as released, with matrices of O(n^2): z (B, n) -> x (B, n+1).

    theta = W_theta^T phi repeats the last angle
    x = r exp(W_phi^T log(|sin theta| + e) + log(|cos(theta + b)| + e))
    W_phi: ones above the diagonal, but 0 at [n-1, n]; b = (0, ..., 0, -pi/2); pi is cut to 3.141592 there.
    """

    def __init__(self, n: int, radius: float = 5.0, scale: float = 5.0, delta: float = 1e-6, e: float = 1e-6):
        super().__init__()
        self.radius = radius
        self.e = e
        self.phi_L = lower_bound(n, delta)
        self.pi = 3.141592
        self.s = torch.nn.Parameter(torch.tensor(float(scale)))
        W_theta = torch.eye(n, n + 1)
        W_theta[n - 1, n] = 1
        W_phi = torch.ones(n + 1, n + 1).triu(1)
        W_phi[n - 1, n] = 0
        b = torch.zeros(n + 1)
        b[n] = -self.pi / 2
        for name, value in {"W_theta": W_theta, "W_phi": W_phi, "b": b}.items():
            self.register_buffer(name, value)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        phi = (self.pi / 2 - self.phi_L) * torch.sigmoid(self.s * z) + self.phi_L
        theta = phi @ self.W_theta  # (B, n+1)
        sines = torch.sin(theta).abs() + self.e
        cosines = torch.cos(theta + self.b).abs() + self.e
        return self.radius * torch.exp(torch.log(sines) @ self.W_phi + torch.log(cosines))


def definition(z: torch.Tensor, s: float = 5.0, r: float = 5.0) -> torch.Tensor:
    """x (N, n+1) in float64: x_k = r cos(phi_k) prod_{j<k} sin(phi_j)."""
    phi_L = lower_bound(z.shape[1])
    phi = (math.pi / 2 - phi_L) * torch.sigmoid(s * z.double()) + phi_L
    one = torch.ones_like(phi[:, :1])
    return r * torch.cat([one, phi.sin().cumprod(1)], 1) * torch.cat([phi.cos(), one], 1)


@torch.no_grad()
def errors(layer: torch.nn.Module, n: int) -> list[float]:
    """Largest error of x as a share of r, on ordinary z and on z alike everywhere."""
    device = layer.s.device
    ordinary = torch.randn(32, n, generator=torch.Generator().manual_seed(0)).to(device)
    alike = torch.linspace(-4, 4, 33, device=device)[:, None].expand(-1, n)
    return [float((layer(z).cpu() - definition(z.cpu())).abs().max() / 5) for z in (ordinary, alike)]


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
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--n", type=int, nargs="+", default=[64, 512, 4096], help="angles")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    args = parser.parse_args()
    device = pick_device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{hardware(device)}, float32\n")
    rows = []
    accuracy = []
    ratios = {}
    for n in args.n:
        layers = [form(n).to(device) for form in (MatrixForm, Spherization)]
        found = [f"{error:.1e}" for layer in layers for error in errors(layer, n)]
        accuracy.append([f"n = {n}", *found])
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
    names = ("matrix", "ours")
    header = [f"{name} {unit}" for unit in ("ms", "MiB", "with z, x") for name in names]
    print(table(["", *header], rows))
    columns = [f"{name}, {z}" for name in names for z in ("ordinary z", "z alike")]
    print("\n" + table(["error / radius", *columns], accuracy) + "\n")
    targets = {64: 1, 4096: 5}
    for (n, batch), (faster, smaller) in ratios.items():
        if n in targets:
            found = f"{faster:.1f} times as fast, {smaller:.1f} times less memory of its own"
            print(f"n = {n}, batch {batch}: {found} (target: {targets[n]} times as fast)")


if __name__ == "__main__":
    main()
