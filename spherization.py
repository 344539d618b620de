# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
"""Representation using only angles: the Spherization layer.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 1, of which we have the abstract, and the
code and read-me published with the paper it builds on (NeurIPS 2022). The paper's text we do not have.

WHAT COLLAPSES. A classifier trained by inner products, z_k = w_k . h + b_k, may tell classes apart by the
length of h as much as by its direction. Whatever then looks at angles alone (cosine similarity, retrieval,
prototypes) sees such classes on top of each other: in a layer-peeled model with ReLU features and a bias all
K classes may lie on one ray, perfectly classified and, by angle, all the same (--synthetic).

THE REMEDY gives length nothing to say. The last hidden layer's output z in R^n, no ReLU, becomes n angles,
and the angles become a point of the sphere of radius r in R^(n+1); a linear layer without bias reads it.

    phi_k = (pi/2 - phi_L) sigmoid(s z_k) + phi_L                 s: learnable scale, r: fixed radius
    x_k   = r cos(phi_k) prod_{j<k} sin(phi_j),   k = 1..n        x_{n+1} = r prod_{j<=n} sin(phi_j)
    phi_L = arcsin(delta^(1/n))                                   so that every product of sines is >= delta

    python spherization.py                                        digits, with and without; under a minute
    python spherization.py --synthetic                            the layer's promises, claim by claim
    python spherization.py --task fewshot --dataset cifar100      FC100, with and without, two metrics

Tasks: `retain`, is accuracy kept? `overlap`, what does the norm hide? `visualise`, features of two and three
dimensions; `fewshot`, prototypical networks, where angles are all that is used.

WHAT TO EXPECT. On digits (3 seeds) 98.0 ± 0.3% without the layer and 98.4 ± 0.2 with it; by angle alone
(nearest class mean) 96.7 ± 0.3 and 98.2 ± 0.2. At the published length (1 seed) LeNet-5 on MNIST has 98.87
and 99.08, the MLP 98.02 and 98.58, with swings of half a point between tests. Trained for a few epochs
only, VGG-11 on CIFAR-10 and few-shot on FC100 are in results/spherization.md; there the layer is behind.

WHAT WE COMPUTE DIFFERENTLY. The published code multiplies log-sines by a triangular (n+1) x (n+1) matrix and
adds epsilon = 1e-6 inside each logarithm, which lengthens x (by 0.04% at n = 4096). A triangular matrix of
ones is a cumulative sum: O(n), and without the epsilon exact (`Spherize`; `MatrixForm` is the published one).

WHAT THE SOURCE LEAVES OPEN, and what we chose.
- `learnable` is about s alone, as in the published runs; r stays fixed. s = r = 5, but s = 1 for features of
  two or three dimensions (published there: s = r = 1, and ten times the steps).
- `projected` (z scaled to the sphere) is drawn without a ReLU: behind one its few units died in our runs.
- "Overlapping samples" are published as counts (24.39% of them misclassified for cosine, 0.00% for the
  layer) without a definition or code. Ours: `overlap`, with tau swept. Counts are not comparable.
- Test images are never used to select anything. The last epoch is reported, the best beside it.
- Baselines keep their biases, and for VGG their second ReLU and dropout, as published; `none` has no bias.
- SphereNet's operators replace the last layer's inner product. The published code also normalises the input
  of its `Original` row and divides the bias by ||w||; our `none` is the plain inner product.
- Few-shot: the published network ends in a max-pool, the spherized one in a convolution and BatchNorm. What
  that change alone does is told by the rows +last. Training images are not augmented (not stated).
- Schedules keep their shape when --epochs is changed.
"""

import argparse
import itertools
import math
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.vgg import cfgs, make_layers
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    Dataset,
    Run,
    TrainingStep,
    UserError,
    coarse_labels,
    concatenate,
    hardware,
    load_dataset,
    mean_std,
    metric_device,
    pick_device,
    pick_precision,
    run_side_by_side,
    split_evenly,
    table,
    write_atomically,
)

# %% [1] The method


def lower_bound(n: int, delta: float = 1e-6) -> float:
    """phi_L, in radians: with n angles in [phi_L, pi/2] every product of sines is at least delta.

    It nears pi/2 as n grows: 0.001 at n = 2, 1.27 at 300, 1.49 at 4096.
    """
    # sin(phi_L)^n = delta; the cap (published) would only matter beyond n = 110,000
    return min(math.asin(delta ** (1 / n)), 0.99 * math.pi / 2)


CHUNK = 2**18  # numbers worked on at once: intermediate results stay in the cache and need next to no memory


class Spherize(torch.autograd.Function):
    """z (N, n), scale s () -> x (N, n+1) of norm r. Time O(N n); keeps z, x and P for the backward pass.

    With P_k = r sin(phi_1) ... sin(phi_k), which is also the length of what follows x_k:
        x_k = P_{k-1} cos(phi_k),   x_{n+1} = P_n,   P_k = ||(x_{k+1}, ..., x_{n+1})||
    A product of thousands of sines just below 1 would add up their rounding errors (2e-5 at n = 4096).
    Instead we compute the complement psi = pi/2 - phi, small where phi is near pi/2, and from it
        cos(phi) = sin(psi) =: c,   log sin(phi) = 1/2 log(1 - c^2),   P_k = r exp(sum_{j<=k} log sin(phi_j))
    Left to autograd, the same lines need three to seven times the memory (benchmarks/spherization.py): that
    is why the derivative is written out.
    """

    @staticmethod
    def forward(ctx, z: Tensor, s: Tensor, phi_L: float, r: float) -> Tensor:
        N, n = z.shape
        P, x = torch.empty_like(z), z.new_empty(N, n + 1)
        for start in range(0, N, rows := max(1, CHUNK // n)):
            i = slice(start, start + rows)
            a = z[i] * s
            c = torch.sigmoid(-a).mul_(math.pi / 2 - phi_L).sin_()  # cos(phi) = sin(psi), (rows, n)
            log_sine = (c * c).neg_().log1p_().mul_(0.5)
            if phi_L < math.pi / 4:  # n < 40: phi may be small, and then 1 - c^2 has lost its digits
                phi = torch.sigmoid(a).mul_(math.pi / 2 - phi_L).add_(phi_L)
                log_sine = torch.where(c < 0.75, log_sine, phi.sin_().log_())
            torch.cumsum(log_sine, 1, out=P[i]).exp_().mul_(r)
            x[i, 0], x[i, 1:] = r, P[i]  # the cumulative product, shifted by one,
            x[i, :-1] *= c  # times the cosines
        ctx.save_for_backward(z, s, x, P)
        ctx.range = math.pi / 2 - phi_L
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        z, s, x, P = ctx.saved_tensors
        n = z.shape[1]
        dz, ds = torch.empty_like(z), torch.zeros_like(s)
        for start in range(0, len(z), rows := max(1, CHUNK // n)):
            i = slice(start, start + rows)
            # dx_k/dphi_k = -P_k,   dx_m/dphi_k = x_m cot(phi_k) for m > k,   cot(phi_k) = x_k / P_k
            # dL/dphi_k = x_k/P_k sum_{m>k} g_m x_m - g_k P_k
            after = (g[i, 1:] * x[i, 1:]).flip(1).cumsum(1).flip(1)  # from the small end: keeps its digits
            d = after.mul_(x[i, :-1]).div_(P[i]).addcmul_(g[i, :-1], P[i], value=-1)  # (rows, n)
            sigmoid = torch.sigmoid(z[i] * s)
            d.mul_(sigmoid).mul_(sigmoid.neg_().add_(1)).mul_(ctx.range)  # dphi/da, a = s z
            ds += (d * z[i]).sum()
            torch.mul(d, s, out=dz[i])
        return dz, ds, None, None


class Spherization(nn.Module):
    """The Spherization layer: z (B, n) -> x (B, n+1), or channels (B, n, H, W) -> (B, n+1, H, W); ||x|| = r.

    Put it where the last hidden layer's ReLU was and follow it by a linear layer or convolution without bias:
    a bias would let a class be told by how far its features lie from a plane, not by their direction. Always
    in float32 or better: in bf16 the sphere would be 0.4% thick.
    """

    def __init__(
        self, n: int, radius: float = 5.0, scale: float = 5.0, delta: float = 1e-6, learnable: bool = True
    ):
        super().__init__()
        if n < 1 or not (0 < radius < math.inf and 0 < scale < math.inf and 1e-30 <= delta < 1):
            raise ValueError(f"Spherization: n {n}, radius {radius}, scale {scale}, delta {delta}")
        self.n, self.radius, self.phi_L = n, radius, lower_bound(n, delta)
        self.s = nn.Parameter(torch.tensor(float(scale)), requires_grad=learnable)

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim < 2 or z.shape[1] != self.n:
            raise ValueError(
                f"Spherization of {self.n}: got {tuple(z.shape)}, expected (B, n) or (B, n, H, W)"
            )
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        s = self.s.to(z.dtype)
        if z.ndim == 2:
            return Spherize.apply(z, s, self.phi_L, self.radius)
        pixels = z.movedim(1, -1)  # (B, H, W, n)
        x = Spherize.apply(pixels.reshape(-1, self.n), s, self.phi_L, self.radius)
        return x.view(*pixels.shape[:-1], self.n + 1).movedim(-1, 1)


def angles(x: Tensor) -> Tensor:
    """The inverse: x (..., n+1) -> phi (..., n) in radians, phi_k = atan2(||x_{>k}||, x_k)."""
    tail = x.square().flip(-1).cumsum(-1).flip(-1)[..., 1:].sqrt()  # P_k
    return torch.atan2(tail, x[..., :-1])


class MatrixForm(nn.Module):
    """The layer as published, with matrices of O(n^2): to compare with. z (B, n) -> x (B, n+1).

    theta = W_theta^T phi repeats the last angle
    x = r exp(W_phi^T log(|sin theta| + e) + log(|cos(theta + b)| + e))
    W_phi: ones above the diagonal, but 0 at [n-1, n]; b = (0, ..., 0, -pi/2); pi is cut to 3.141592 there.
    """

    def __init__(self, n: int, radius: float = 5.0, scale: float = 5.0, delta: float = 1e-6, e: float = 1e-6):
        super().__init__()
        self.radius, self.e, self.phi_L, self.pi = radius, e, lower_bound(n, delta), 3.141592
        self.s = nn.Parameter(torch.tensor(float(scale)))
        W_theta, W_phi, b = torch.eye(n, n + 1), torch.ones(n + 1, n + 1).triu(1), torch.zeros(n + 1)
        W_theta[n - 1, n], W_phi[n - 1, n], b[n] = 1, 0, -self.pi / 2
        for name, value in {"W_theta": W_theta, "W_phi": W_phi, "b": b}.items():
            self.register_buffer(name, value)

    def forward(self, z: Tensor) -> Tensor:
        phi = (self.pi / 2 - self.phi_L) * torch.sigmoid(self.s * z) + self.phi_L
        theta = phi @ self.W_theta  # (B, n+1)
        sines, cosines = torch.sin(theta).abs() + self.e, torch.cos(theta + self.b).abs() + self.e
        return self.radius * torch.exp(torch.log(sines) @ self.W_phi + torch.log(cosines))


def angle_operator(name: str, cos: Tensor) -> Tensor:
    """SphereNet's angular similarities g(theta), from 1 at theta = 0 to -1 at pi (Liu et al. 2017)."""
    if name == "cosine":
        return cos
    theta = torch.acos(cos.clamp(-1 + 1e-6, 1 - 1e-6))  # its slope at +-1 is infinite
    if name == "linear":
        return 1 - 2 * theta / math.pi
    k = 0.3  # sigmoid: coth(pi/4k) tanh((pi/2 - theta)/2k), which is their quotient of exponentials
    return torch.tanh((math.pi / 2 - theta) / (2 * k)) / math.tanh(math.pi / (4 * k))


def overlap(h: Tensor, y: Tensor, norm_gap: float) -> tuple[Tensor, Tensor]:
    """How close in angle each feature comes to one of another class: two largest cosines, (N,) each.

    Over all features of other classes, and over those of them whose norm is more than `norm_gap` (0.1: 10%)
    above or below: what the norm kept apart and an angle does not. h (N, d), y (N,). Where there is no such
    feature: -1. "Overlapping samples" as we define them: those with 1 - cosine < tau. In float64.
    """
    h = h.double()
    log_norm, u = h.norm(dim=1).clamp_min(1e-300).log(), F.normalize(h, dim=1)
    any_norm, apart = [], []
    for part in split_evenly(len(h), 1000):
        cos = (u[part] @ u.T).masked_fill(y[part, None] == y, -1)  # (1000, N)
        any_norm.append(cos.amax(1))
        same = (log_norm[part, None] - log_norm).abs() <= math.log1p(norm_gap)
        apart.append(cos.masked_fill(same, -1).amax(1))
    return torch.cat(any_norm), torch.cat(apart)


def draw_episodes(y: Tensor, E: int, way: int, images: int, generator: torch.Generator) -> Tensor:
    """E episodes of `way` classes, `images` images each: indices into y (E, way, images), none twice."""
    members = [(y == k).nonzero().flatten() for k in y.unique()]
    episodes = torch.empty(E, way, images, dtype=torch.long)
    for episode in episodes:
        for slot, k in enumerate(torch.randperm(len(members), generator=generator)[:way]):
            drawn = torch.randperm(len(members[k]), generator=generator)[:images]
            episode[slot] = members[k][drawn]
    return episodes


def prototype_logits(h: Tensor, shots: int, metric: str) -> Tensor:
    """Prototypical network (Snell et al. 2017) with the published temperatures, 1/128 and 1000/128.

    h (E, way, shots + queries, d) -> logits (E, way * queries, way), queries class by class. On the sphere
    -||q - p||^2 is 2 r^2 (cos - 1): at r = 5 the Euclidean logits span 0.4 where the cosine's span 8.
    """
    p, q = h[:, :, :shots].mean(2), h[:, :, shots:].flatten(1, 2)  # (E, way, d), (E, way * queries, d)
    if metric == "cosine":
        return 1000 * (F.normalize(q, dim=2) @ F.normalize(p, dim=2).mT - 1) / 128
    return -(q[:, :, None] - p[:, None]).square().sum(3) / 128


# %% [2] Theory check: the layer's promises, and the layer-peeled model
# [copied: minimise]
def minimise(loss, *start: Tensor, steps: int = 200) -> list[Tensor]:
    """Full-batch L-BFGS with a strong Wolfe line search. `start` tensors in, their optimal values out."""
    x = [s.clone().requires_grad_() for s in start]
    # stop on the gradient alone: near a threshold the loss is flat long before the cosine is right
    limits = {"max_iter": steps, "history_size": 20, "tolerance_grad": 1e-9, "tolerance_change": 0}
    optimizer = torch.optim.LBFGS(x, line_search_fn="strong_wolfe", **limits)

    def closure():
        optimizer.zero_grad()
        value = loss(*x)
        value.backward()
        return value

    optimizer.step(closure)
    return [v.detach() for v in x]


# [end copied]


def layer_peeled(K: int, n: int, lam: float, spherized: bool, seed: int = 0) -> tuple:
    """Optimal free pre-activations of K classes, n numbers each: W (K, d), b (K,), features H (K, d), loss.

    min mean_k CE(W h_k + b, k) + lam/2K (||W||^2 + ||Z||^2), with ReLU features h = z >= 0 and a free bias b,
    or with h the spherized z (d = n+1) and b = 0. Float64.
    """
    generator, y = torch.Generator().manual_seed(seed), torch.arange(K)
    layer = Spherization(n, learnable=False)

    def unpack(W, q, b):
        return (layer(q), torch.zeros(K)) if spherized else (q**2, b)  # h = q^2: every h >= 0

    def loss(W, q, b):
        (h, bias), z = unpack(W, q, b), q if spherized else q**2
        return F.cross_entropy(h @ W.T + bias, y) + lam / (2 * K) * (W.square().sum() + z.square().sum())

    W, q = (torch.randn(K, m, generator=generator, dtype=torch.float64) for m in (n + spherized, n))
    W, q, b = minimise(loss, W, q, torch.zeros(K, dtype=torch.float64), steps=300)
    h, b = unpack(W, q, b)
    return W, b, h, loss(W, q, b).item()


def class_means(h: Tensor, y: Tensor, K: int) -> Tensor:
    """M (K, d), float64, of features h (N, d) with labels y (N,); zero for a class without samples."""
    M = torch.zeros(K, h.shape[1], dtype=torch.float64, device=h.device).index_add_(0, y, h.double())
    return M / torch.bincount(y, minlength=K).clamp_min(1)[:, None]


def angle_accuracy(h: Tensor, y: Tensor, M: Tensor) -> float:
    """Share of features h (N, d) whose nearest class mean, by cosine and of M (K, d), is that of y (N,)."""
    nearest = (F.normalize(h.double(), dim=1) @ F.normalize(M.double(), dim=1).T).argmax(1)
    return float((nearest == y).double().mean())


def toy(spherized: bool, seed: int) -> tuple[float, Tensor]:
    """The published toy, clusters around (0, 0) and (1, 1): accuracy, and class means (2, 2) of features."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    y = torch.arange(200) // 100
    x = torch.rand(200, 2, generator=generator) * 0.1 - 0.05 + y[:, None]
    if spherized:
        first, hidden = nn.Linear(2, 1, bias=False), Spherization(1, radius=1.0, scale=1.0)
    else:
        first, hidden = nn.Linear(2, 2), nn.Sigmoid()
    network = nn.Sequential(first, hidden, nn.Linear(2, 2, bias=not spherized))
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for _ in range(100):
        for part in torch.randperm(200, generator=generator).split(16):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    with torch.no_grad():
        h = hidden(first(x))
        M = torch.stack([h[y == k].mean(0) for k in range(2)])
        accuracy = (network(x).argmax(1) == y).double().mean()
    return float(accuracy), M


def synthetic(folder) -> bool:
    """Check each claim against a closed form or direct optimisation; print the table, draw synthetic.png."""
    passed, generator = [], torch.Generator().manual_seed(0)
    print(f"{'claim':<66}{'theory':>9}{'measured':>10}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, bound=0):  # bound 1: theory is the most, -1: the least
        error = max(bound * (measured - theory), 0) if bound else abs(measured - theory)
        passed.append(bool(error <= tolerance))
        print(f"{claim:<66}{theory:>9.4f}{measured:>10.4f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    # 1. The bound, against the root of n log sin(phi) = log delta
    for n in (2, 64, 300, 4096):
        root = brentq(lambda phi, n=n: n * math.log(math.sin(phi)) - math.log(1e-6), 1e-9, 1.57)
        check(f"n = {n}: phi_L", root, lower_bound(n), 1e-9)

    # 2. In float32, on ordinary and on hard inputs: all alike (errors would add up), saturated, wide
    for n in (1, 2, 64, 300, 4096):
        hard = torch.tensor([[0.0], [0.3], [-50.0], [50.0]]).expand(4, n)
        ordinary = torch.randn(32, n, generator=generator)
        z, layer = torch.cat([hard, ordinary, 20 * ordinary]), Spherization(n)
        x = layer(z).detach()
        phi = layer.phi_L + (math.pi / 2 - layer.phi_L) * torch.sigmoid(5 * z.double())
        one = torch.ones(len(z), 1, dtype=torch.float64)  # the definition, in float64
        P = torch.cat([one, phi.sin().cumprod(1)], 1)
        exact = 5 * P * torch.cat([phi.cos(), one], 1)
        farthest = max((x.double().norm(dim=1) / 5).tolist(), key=lambda length: abs(length - 1))
        check(f"n = {n}, float32: norm / radius, farthest from 1", 1, farthest, 1e-6)
        check("   angles by atan2, largest error, rad", 0, (angles(x) - phi).abs().max().item(), 1e-5)
        check("   coordinates, largest error against float64", 0, (x - exact).abs().max().item(), 2e-6)
        smallest = (x[:, -1].double().min() / 5 / 1e-6).item()  # the last coordinate is the whole product
        check("   smallest product of sines / delta", 1, smallest, 2e-6)
        if n > 2:
            published = MatrixForm(n)
            with torch.no_grad():
                px = published(ordinary).double()
            # each factor is e too large: ||x||/r - 1 = e sum_k P_{k-1}^2 (sin phi_k + cos phi_k) + O(e^2)
            longer = 1e-6 * (P[:, :-1] ** 2 * (phi.sin() + phi.cos()))[4:36].sum(1).mean().item()
            measured = (px.norm(dim=1) / 5 - 1).mean().item()
            check("   published form: norm / radius - 1, in 1e-6", 1e6 * longer, 1e6 * measured, 5)
            worse = (px - exact[4:36]).abs().max() / (x - exact)[4:36].abs().max()
            check("   published form: times our largest error, at least", 10, worse.item(), 0, -1)

    # 3. The gradient: coordinate lines cross at right angles, and the later an angle, the shorter its line
    n = 300
    layer = Spherization(n, learnable=False)
    J = torch.autograd.functional.jacobian(lambda z: layer(z[None])[0], torch.zeros(n, dtype=torch.float64))
    middle = (math.pi / 2 + layer.phi_L) / 2  # the angle at z = 0
    for k in (0, 150, 299):
        # ||dx/dz_k|| = r s (pi/2 - phi_L)/4 prod_{j<k} sin(phi_j)
        theory = 5 * 5 * (math.pi / 2 - layer.phi_L) / 4 * math.sin(middle) ** k
        check(f"n = 300, z = 0: length of dx/dz_{k}", theory, J[:, k].norm().item(), 1e-9)
    G = J.T @ J
    check("   largest inner product of two of them", 0, (G - G.diag().diag()).abs().max().item(), 1e-9)
    # without phi_L, z = 0 is pi/4 everywhere: sin^512 = 2^-256 is no float32, and no gradient comes through
    product = torch.full((512,), math.pi / 4).sin().prod().item()
    check("n = 512, z = 0, no phi_L: product of sines", 0, product, 0)

    # 4. The published toy: both classify; only spherized features all have one length
    found = {kind: [toy(kind, seed) for seed in range(2)] for kind in (False, True)}
    check("toy, spherized: accuracy, worse of 2 seeds", 1, min(a for a, _ in found[True]), 0)
    # the cluster around 0 has z = 0 on average: its one angle is (pi/2 + phi_L)/2
    lean = max(abs(math.degrees(math.atan2(*M[0].flip(0).tolist())) - 45) for _, M in found[True])
    check("   direction of the cluster at the origin off 45 degrees", 0, lean, 0.5)
    lengths = [abs(M[0].norm() / M[1].norm() - 1).item() for _, M in found[True]]
    check("   lengths of the class means differ by", 0, max(lengths), 5e-3)
    lengths = [abs(M[0].norm() / M[1].norm() - 1).item() for _, M in found[False]]
    check("toy, sigmoid units: they differ by, at least", 0.05, max(lengths), 0, -1)

    # 5. Layer-peeled. Two classes, one ReLU unit, a bias: one class has no feature at all, h_0 = 0.
    #    With t = w h, ||W||^2 + ||h||^2 >= sqrt(2) t, and L(t) = log(1 + e^(-t/2)) + sqrt(2)/4 lam t is left
    lam, root = 1e-2, math.sqrt(2)
    t = 2 * math.log(root / lam - 1)
    W, b, H, loss = layer_peeled(2, 1, lam, spherized=False)
    least = math.log1p(math.exp(-t / 2)) + root / 4 * lam * t
    check("K = 2, one ReLU unit and a bias: loss", least, loss, 1e-9)
    check("   norm of the longer feature", math.sqrt(t / root), H.max().item(), 1e-4)
    check("   norm of the shorter one", 0, H.min().item(), 1e-4)
    drawn = {}
    for n, name in ((1, "one"), (2, "two")):
        for spherized in (False, True):
            W, b, H, _ = drawn[n, spherized] = layer_peeled(K := 6, n, 1e-3, spherized, seed=1)
            y = torch.arange(K)
            inner = ((H @ W.T + b).argmax(1) == y).double().mean().item()
            noise = torch.randn(200, K, H.shape[1], generator=generator, dtype=torch.float64)
            noisy = H + 0.01 * H.norm(dim=1).mean() * noise
            noisy = (noisy if spherized else noisy.relu()).flatten(0, 1)
            label = "spherized" if spherized else f"ReLU unit{'s' * (n > 1)} and a bias"
            check(f"K = 6, {name} {label}: accuracy", 1, inner, 0)
            by_angle = angle_accuracy(noisy, y.repeat(200), H)
            if spherized:
                check("   by angle, 1% noise", 1, by_angle, 0.01)
            elif n == 1:  # all on one ray: every cosine is 1 (or 0 for no feature), the first class wins
                check("   by angle, 1% noise: 1/K", 1 / K, by_angle, 0.01)
            else:
                check("   by angle, 1% noise, at most", 0.9, by_angle, 0, 1)

    # One picture: six classes told apart by the norm on one ray, or by one angle
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    titles = {(1, False): "one ReLU unit and a bias", (1, True): "one angle, no bias"}
    for ax, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for k, (u, v) in enumerate(F.pad(drawn[key][2], (0, 1))[:, :2].tolist()):
            ax.plot([0, u], [0, v], color="0.8", zorder=1)
            ax.plot(u, v, marker=f"${k}$", color="black", markersize=9, zorder=2)
        ax.set(title=title, xlabel="first coordinate of the feature", ylabel="second (none on the left)")
        ax.set_aspect("equal", adjustable="datalim")
    write_atomically(Path(folder) / "synthetic.png", lambda part: figure.savefig(part, dpi=130))
    print(f"{sum(passed)} of {len(passed)} claims hold; figure: {Path(folder) / 'synthetic.png'}")
    return all(passed)


# %% [3] Networks
VGG = {"vgg11": "A", "vgg16": "D", "vgg19": "E"}  # torchvision's names of the configurations
PLANS = {  # channels of 3x3 convolutions, each with BatchNorm and ReLU; M: 2x2 max-pool
    "cnn": (32, 32, "M", 64, 64, "M", 128, 128),
    "cnn9": (128, 128, 128, "M", 192, 192, 192, "M", 256, 256, 256, "M"),
}
NETWORKS = ("mlp", "lenet", *PLANS, *VGG)
BACKBONES = ("conv4", "resnet12")


def convolutions(plan, channels: int) -> list[nn.Module]:
    layers = []
    for c in plan:
        if c == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
            channels = c
    return layers


def build_trunk(args: argparse.Namespace, shape: tuple[int, int, int], n: int) -> nn.Sequential:
    """All below the last hidden layer's activation: images (B, C, H, W) -> z (B, trunk.n).

    n > 0 adds a ReLU and a linear layer of n units, for features that can be drawn. shape is (H, W, C).
    """
    (H, W, C), name = shape, args.network
    if name == "mlp":
        layers, width = [nn.Flatten(), nn.Linear(C * H * W, 500), nn.ReLU(), nn.Linear(500, 300)], 300
    elif name == "lenet":  # LeCun et al. 1998, with ReLU and max-pooling; 28 x 28 is padded to its 32 x 32
        pad = 2 if H == 28 else 0
        sides = [((side + 2 * pad - 4) // 2 - 4) // 2 for side in (H, W)]
        if min(sides) < 1:
            raise UserError(f"--network lenet: needs images of 16 x 16 or more, not {H} x {W}")
        layers = [nn.ZeroPad2d(pad), nn.Conv2d(C, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5)]
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * sides[0] * sides[1], 120)]
        layers, width = [*layers, nn.ReLU(), nn.Linear(120, 84)], 84
    elif name in PLANS:
        layers = convolutions(PLANS[name], C)
        scale = 2 ** PLANS[name].count("M")
        if min(H, W) < scale:
            raise UserError(f"--network {name}: needs images of {scale} x {scale} or more, not {H} x {W}")
        flat = max(c for c in PLANS[name] if c != "M") * (H // scale) * (W // scale)
        layers, width = [*layers, nn.Flatten(), nn.Linear(flat, 256)], 256
    else:  # VGG with BatchNorm; the published one averages in its pools on Fashion-MNIST, at 32 x 32
        plan = [c if c == "M" else max(1, round(c * args.width)) for c in cfgs[VGG[name]]]
        layers = list(make_layers(plan, batch_norm=True))
        layers[0] = nn.Conv2d(C, plan[0], 3, padding=1)
        if args.dataset.startswith("fashionmnist"):
            layers = [nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in layers]
        for layer in layers:  # torchvision's start for VGG; its linear layers keep PyTorch's here
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        grow = [nn.Upsample(size=(32, 32), mode="bilinear")] if min(H, W) < 32 else []
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(plan[-2], 4096), nn.ReLU(), nn.Dropout()]
        layers, width = [*grow, *layers, *head, nn.Linear(4096, 4096)], 4096
    if n:
        layers += [nn.ReLU(), nn.Linear(width, n)]
    trunk = nn.Sequential(*layers)
    trunk.n = n or width
    return trunk


class Head(nn.Module):
    """z (B, n), before any activation -> features h (B, d) and logits (B, K). Always in float32.

    plain: ReLU, linear with bias. projected: z / sqrt(||z||^2 + 1e-4), linear with bias. sphere: the layer,
    linear without bias. none: ReLU, linear without bias. cosine, linear, sigmoid: g(theta) of the angles
    between h and the class vectors, so logits of -1 to 1; w-: ||h|| g(theta), only class vectors normalised.
    """

    def __init__(self, kind: str, n: int, K: int, dropout: bool, **layer):
        super().__init__()
        self.kind = kind
        self.sphere = Spherization(n, **layer) if kind == "sphere" else None
        self.dropout = nn.Dropout() if dropout and kind != "sphere" else nn.Identity()
        self.linear = nn.Linear(n + (kind == "sphere"), K, bias=kind in ("plain", "projected"))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "sphere":
            h = self.sphere(z)
        elif self.kind == "projected":  # no ReLU: two or three units behind it and on a sphere die together
            h = z / (z.square().sum(1, keepdim=True) + 1e-4).sqrt()
        else:
            h = self.dropout(F.relu(z))
        if self.kind in ("plain", "projected", "sphere", "none"):
            return h, self.linear(h)
        cos = F.normalize(h, dim=1) @ F.normalize(self.linear.weight, dim=1).T  # (B, K)
        g = angle_operator(self.kind.removeprefix("w-"), cos)
        return h, h.norm(dim=1, keepdim=True) * g if self.kind.startswith("w-") else g


class Residual(nn.Module):
    """A stage of ResNet-12: three 3x3 convolutions, a 1x1 shortcut, a max-pool where there is room for it."""

    def __init__(self, channels: int, c: int, pool: bool, activation: nn.Module):
        super().__init__()
        layers = []
        for i in range(3):
            layers += [nn.Conv2d(channels if i == 0 else c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)]
            layers += [nn.LeakyReLU(0.1)] if i < 2 else []
        self.main = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, c, 1, bias=False), nn.BatchNorm2d(c))
        self.after = nn.Sequential(activation, nn.MaxPool2d(2) if pool else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.main(x) + self.shortcut(x))


def build_backbone(args: argparse.Namespace, shape: tuple[int, int, int], last: str) -> nn.Sequential:
    """Embedding for prototypes: images (B, C, H, W) -> h (B, d); for `last` and `sphere`, pre-activations z.

    conv4 ends in a max-pool over what is left of the image, h in R^64, or else in a convolution of that size
    and BatchNorm. resnet12 (no DropBlock) ends in ReLU and an average, R^640, or has BatchNorm for that ReLU.
    """
    H, W, channels = shape
    layers = []
    widths = (64,) * 4 if args.network == "conv4" else (64, 160, 320, 640)
    for stage, c in enumerate(widths):
        pool = min(H, W) >= 4  # 32 -> 2, 84 -> 5; digits 8 -> 2
        if args.network == "conv4":
            layers += convolutions((c, "M") if pool else (c,), channels)
        else:
            linear = stage == 3 and last != "plain"
            layers.append(Residual(channels, c, pool, nn.BatchNorm2d(c) if linear else nn.LeakyReLU(0.1)))
        H, W, channels = (H // 2, W // 2, c) if pool else (H, W, c)
    if args.network == "resnet12":
        layers.append(nn.AdaptiveAvgPool2d(1))
    elif last == "plain":
        layers.append(nn.MaxPool2d((H, W)))
    else:
        layers += [nn.Conv2d(c, c, (H, W), bias=False), nn.BatchNorm2d(c)]
    backbone = nn.Sequential(*layers, nn.Flatten())
    backbone.n = widths[-1]
    return backbone


# %% [4] Training


class Method(NamedTuple):
    kind: str  # of Head, or the metric of a prototypical network
    n: int = 0  # units of the last hidden layer; 0: the network's own
    last: str = ""  # few-shot: plain, last or sphere


HEADS = ("plain", "sphere", "projected")
SMALL = {f"{kind}-{d}d": Method(kind, d - (kind == "sphere")) for d in (2, 3) for kind in HEADS}
OPERATORS = ("none", "cosine", "linear", "sigmoid", "w-cosine", "w-linear", "w-sigmoid", "sphere")
TASKS = {
    "retain": {kind: Method(kind) for kind in HEADS} | SMALL,
    "overlap": {kind: Method(kind) for kind in OPERATORS},
    "visualise": SMALL,
    "fewshot": {
        metric + suffix: Method(metric, 0, last)
        for metric in ("euclidean", "cosine")
        for suffix, last in (("", "plain"), ("+last", "last"), ("+sphere", "sphere"))
    },
}
TAUS = (1e-4, 1e-3, 1e-2, 5e-2, 0.1)  # 1 - cosine: 0.8, 2.6, 8, 18, 26 degrees
# CIFAR-10, cnn9: test accuracy %, errors in overlapping samples, overlapping samples, the ratio in %
PUBLISHED_OVERLAP = {
    "none": (92.46, 0, 0, 0.0), "sigmoid": (79.03, 1097, 5222, 20.75), "linear": (72.15, 1631, 6849, 23.84),
    "cosine": (76.15, 776, 3170, 24.39), "w-sigmoid": (91.51, 167, 7925, 2.11),
    "w-linear": (82.12, 946, 7669, 12.30), "w-cosine": (92.29, 80, 7051, 1.14),
    "sphere": (92.38, 0, 499, 0.0),
}  # fmt: skip
FC100 = {  # CIFAR-100's superclasses (Oreshkin et al. 2018): 60, 20 and 20 classes
    "train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19), "validation": (8, 11, 13, 16), "test": (0, 7, 12, 14),
}  # fmt: skip


class Recipe(NamedTuple):
    """The published setting; what the command line gives goes before it."""

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    factor: float = 1.0  # the learning rate is multiplied by it
    at: tuple[float, ...] = ()  # after these shares of the epochs
    augment: str = "none"  # none, crop+flip, crop+flip+rotate
    statistics: str = "data"  # normalise by: none, data, imagenet


TENTHS = tuple(i / 10 for i in range(1, 10))
STATISTICS = {"none": ([0.0], [1.0]), "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def recipe(args: argparse.Namespace) -> Recipe:
    """By task, network and data; digits, which nobody published, get a short one."""
    dataset = args.dataset.partition(":")[0].removesuffix("lt")
    if args.task == "fewshot":
        if dataset == "digits":
            return Recipe(5, 1, "adam", 1e-3, 0.0, 0.5, TENTHS)
        if args.network == "conv4":
            return Recipe(100, 1, "adam", 1e-4, 0.0, 0.5, TENTHS)
        return Recipe(100, 1, "sgd", 1e-4, 5e-4, 0.5, TENTHS)
    if dataset == "digits":
        return Recipe(40, 32, "adam", 1e-3, 5e-5)
    if args.network == "mlp":
        return Recipe(100, 256, "adam", 1e-3, 5e-5, statistics="none")
    if args.network == "lenet":
        return Recipe(20, 128, "adam", 1e-3, 0.0, statistics="none")
    if args.network == "cnn":  # published: batches of 32 for the layer, 64 without; here 64 for all
        return Recipe(20, 64, "adam", 1e-3, 0.0, statistics="none")
    if args.network == "cnn9":
        return Recipe(160, 128, "adam", 1e-3, 5e-4, 0.1, (80 / 160, 130 / 160), "crop+flip")
    if dataset == "fashionmnist":
        return Recipe(100, 128, "sgd", 0.01, 5e-4, 0.5, (0.2, 0.4, 0.6, 0.8), "crop+flip")
    if dataset == "cifar100":
        return Recipe(200, 128, "sgd", 0.1, 5e-4, 0.2, (0.3, 0.6, 0.8), "crop+flip+rotate")
    statistics = "imagenet" if dataset == "cifar10" else "data"
    return Recipe(300, 128, "sgd", 0.05, 5e-4, 0.5, TENTHS, "crop+flip", statistics)


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    at = sum(epoch / args.epochs >= share for share in recipe(args).at)
    return args.lr * recipe(args).factor ** at


def rotate(x: Tensor, degrees: Tensor, black: Tensor) -> Tensor:
    """Rotate each image of x (B, C, H, W) by its own angle (B,); what comes in is `black` (C,)."""
    B, C, H, W = x.shape
    cos, sin = (f(torch.deg2rad(degrees)) for f in (torch.cos, torch.sin))
    zero, black = torch.zeros_like(cos), black[:, None, None]
    # grid coordinates run from -1 to 1 on both axes, so a rotation of pixels is stretched by H / W
    matrix = torch.stack([cos, -sin * H / W, zero, sin * W / H, cos, zero], 1).view(B, 2, 3)
    grid = F.affine_grid(matrix, [B, C, H, W], align_corners=False)
    return F.grid_sample(x - black, grid, mode="nearest", align_corners=False) + black


@torch.no_grad()
def embed(module, batches: Batches, index: Tensor, precision: str):
    """module's outputs, unaugmented, for the images `index`, on the device where metrics are computed."""
    module.eval()
    found, views = [], batches.views(index)
    for x in batches.sequence(views, split_evenly(len(index), 500)):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            z = module["trunk"](x)
        out = module["head"](z.float())
        found.append(out if isinstance(out, tuple) else (out,))
    measure = metric_device(batches.device)
    return [torch.cat(parts).to(measure) for parts in zip(*found, strict=True)]


class Classification:
    """retain, overlap, visualise: cross-entropy on images. What `train` needs of a task: see FewShot too."""

    def __init__(self, args: argparse.Namespace, method: Method, data: Dataset, device: torch.device):
        self.args, self.data, self.device, self.K = args, data, device, len(data.classes)
        shape = tuple(data.train_x.shape[1:])
        trunk = build_trunk(args, shape, method.n)
        scale = args.scale or (1.0 if method.n else 5.0)  # with 5 one or two angles end at 0 or 90 degrees
        layer = dict(radius=args.radius, scale=scale, delta=args.delta, learnable=not args.fixed_scale)
        head = Head(method.kind, trunk.n, self.K, args.network in VGG and not method.n, **layer)
        model = nn.ModuleDict({"trunk": trunk, "head": head})
        self.model = model.to(device, memory_format=torch.channels_last)
        self.trunk = torch.compile(trunk) if args.compile else trunk
        r = recipe(args)
        mean, std = data.mean, data.std
        if r.statistics != "data":
            mean, std = (torch.tensor(v).expand(shape[2]) for v in STATISTICS[r.statistics])
        crop = dict(pad=data.pad, flip=data.flip) if "crop" in r.augment else {}
        self.batches = Batches(data.train_x, mean, std, **crop, device=device)
        self.test = Batches(data.test_x, mean, std, device=device)
        self.black = (-mean / std).to(device) if "rotate" in r.augment else None
        self.test_y = data.test_y.to(metric_device(device))

    def draw(self, generator: torch.Generator) -> int:
        """Draws an epoch; returns its number of steps."""
        N = len(self.data.train_y)
        order = torch.randperm(N, generator=generator)
        views, self.y = self.batches.views(order, generator), self.data.train_y[order].to(self.device)
        self.degrees = (30 * torch.rand(N, generator=generator) - 15).to(self.device)
        self.parts = split_evenly(N, self.args.batch_size)
        self.images = self.batches.sequence(views, self.parts)
        return len(self.parts)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        part = self.parts[step]
        return next(self.images), self.y[part], self.degrees[part]

    def loss(self, x: Tensor, y: Tensor, degrees: Tensor) -> Tensor:
        if self.black is not None:
            x = rotate(x, degrees, self.black)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            z = self.trunk(x)
        return F.cross_entropy(self.model["head"](z.float())[1], y)

    def evaluate(self) -> dict[str, float]:
        logits = embed(self.model, self.test, torch.arange(self.test.N), self.args.precision)[1]
        return {"accuracy": float((logits.argmax(1) == self.test_y).double().mean())}

    def conclude(self) -> tuple[dict, dict[str, Tensor]]:
        """The result's measures, and what features.npz keeps."""
        kept, everything = spread(self.batches.N), torch.arange(self.test.N)
        train_h, train_z = embed(self.model, self.batches, kept, self.args.precision)
        test_h, test_z = embed(self.model, self.test, everything, self.args.precision)
        train_y, test_y = self.data.train_y[kept].to(test_h.device), self.test_y
        right, M = test_z.argmax(1) == test_y, class_means(train_h, train_y, self.K)
        norm = test_h.double().norm(dim=1)
        result = {
            "accuracy": float(right.double().mean()),
            "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
            "angle_accuracy": angle_accuracy(test_h, test_y, M),
            "norm_spread": float(norm.std(correction=0) / norm.mean().clamp_min(1e-12)),
            "within_cosine": float(F.cosine_similarity(test_h.double(), M[test_y], dim=1).mean()),
        }
        if self.args.task == "overlap":
            found = overlap(test_h, test_y, self.args.norm_gap)
            for name, cos in zip(("near", "hidden"), found, strict=True):
                below = [1 - cos < tau for tau in (*TAUS, self.args.tau)]
                *counts, n = [int(samples.sum()) for samples in below]
                *errors, wrong = [int((samples & ~right).sum()) for samples in below]
                result |= {name: n / len(test_y), f"{name}_wrong": wrong / max(1, n)}
                result |= {f"{name}_counts": counts, f"{name}_errors": errors}
        features = dict(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, right=right)
        return result, features | {"W": self.model["head"].linear.weight}


def spread(N: int, most: int = 10_000) -> Tensor:
    """Indices of all N images, or of 10,000 spread evenly: 50,000 features of VGG would fill 800 MB."""
    return torch.arange(N) if N <= most else torch.linspace(0, N - 1, most).long()


def split_classes(dataset: str, classes: tuple[str, ...]) -> dict[str, list[int]]:
    """Few-shot classes: FC100 for cifar100, else the first and the second half, and none to validate on."""
    if dataset.partition(":")[0].removesuffix("lt") != "cifar100":
        half = len(classes) // 2
        return {"train": list(range(half)), "validation": [], "test": list(range(half, len(classes)))}
    coarse = coarse_labels(classes, "superclasses")[0].tolist()
    return {split: [k for k, c in enumerate(coarse) if c in members] for split, members in FC100.items()}


class FewShot:
    """Prototypical networks: an episode's queries are told apart by their distance to the class prototypes.

    Training and test images are thrown together and split by class. Trained with --shots; tested: 1 and 5.
    """

    def __init__(self, args: argparse.Namespace, method: Method, data: Dataset, device: torch.device):
        self.args, self.method, self.device = args, method, device
        images, self.y = concatenate(data.train_x, data.test_x), torch.cat([data.train_y, data.test_y])
        classes, self.pools = split_classes(args.dataset, data.classes), {}
        for split, members in classes.items():
            chosen = torch.isin(self.y, torch.tensor(members, dtype=torch.long))
            self.pools[split] = chosen.nonzero().flatten()
            fewest = min((int((self.y == k).sum()) for k in members), default=0)
            need = max(args.shots, 5) + args.queries
            if members and (len(members) < args.way or fewest < need):
                raise UserError(
                    f"--dataset {args.dataset}: {len(members)} {split} classes of {fewest} images or more; "
                    f"--way, --shots and --queries ask for {args.way} of {need}"
                )
        trunk = build_backbone(args, tuple(data.train_x.shape[1:]), method.last)
        scale, learnable = args.scale or 5.0, not args.fixed_scale
        layer = dict(radius=args.radius, scale=scale, delta=args.delta, learnable=learnable)
        head = Spherization(trunk.n, **layer) if method.last == "sphere" else nn.Identity()
        model = nn.ModuleDict({"trunk": trunk, "head": head})
        self.model = model.to(device, memory_format=torch.channels_last)
        self.trunk = torch.compile(trunk) if args.compile else trunk
        self.batches = Batches(images, data.mean, data.std, device=device)
        queries = torch.arange(args.way).repeat_interleave(args.queries)
        self.queries, self.K = queries.to(device), len(data.classes)

    def draw(self, generator: torch.Generator) -> int:
        a, pool = self.args, self.pools["train"]
        episodes = draw_episodes(self.y[pool], a.episodes, a.way, a.shots + a.queries, generator)
        views, size = self.batches.views(pool[episodes.flatten()]), a.way * (a.shots + a.queries)
        parts = [slice(step * size, (step + 1) * size) for step in range(a.episodes)]
        self.images = self.batches.sequence(views, parts)
        return a.episodes

    def batch(self, step: int) -> tuple[Tensor]:
        return (next(self.images),)

    def loss(self, x: Tensor) -> Tensor:
        a = self.args
        with torch.autocast(self.device.type, torch.bfloat16, enabled=a.precision == "bf16"):
            z = self.trunk(x)
        h = self.model["head"](z.float()).view(1, a.way, a.shots + a.queries, -1)
        return F.cross_entropy(prototype_logits(h, a.shots, self.method.kind)[0], self.queries)

    def accuracies(self, split: str, shots: int, episodes: int) -> Tensor:
        """Accuracy of each of so many episodes, (episodes,); the same ones for every method and seed."""
        a, pool = self.args, self.pools[split]
        (h,) = embed(self.model, self.batches, pool, a.precision)  # every image once
        generator = torch.Generator().manual_seed(0)
        drawn = draw_episodes(self.y[pool], episodes, a.way, shots + a.queries, generator)
        found = []
        for part in split_evenly(episodes, 50):
            logits = prototype_logits(h[drawn[part].to(h.device)], shots, self.method.kind)
            found.append((logits.argmax(2) == self.queries.to(h.device)).double().mean(1))
        return torch.cat(found)

    def evaluate(self) -> dict[str, float]:
        if not len(self.pools["validation"]):
            return {}
        return {"accuracy": float(self.accuracies("validation", self.args.shots, 500).mean())}

    def conclude(self) -> tuple[dict, dict[str, Tensor]]:
        result = {}
        for shots in (1, 5):
            found = self.accuracies("test", shots, self.args.test_episodes)
            result[f"accuracy_{shots}shot"] = float(found.mean())
            result[f"interval_{shots}shot"] = 1.96 * float(found.std()) / len(found) ** 0.5
        result["accuracy"] = result["accuracy_5shot"]
        features = {}
        for split in ("train", "test"):
            index = self.pools[split][spread(len(self.pools[split]))]
            (features[f"{split}_h"],) = embed(self.model, self.batches, index, self.args.precision)
            features[f"{split}_y"] = self.y[index]
        M = class_means(features["train_h"], features["train_y"].to(features["train_h"].device), self.K)
        features["W"] = M[features["train_y"].unique()]  # no classifier was trained: W holds prototypes
        return result, features


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of torch's own generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def build(args: argparse.Namespace, name: str, data: Dataset, device: torch.device):
    task = FewShot if args.task == "fewshot" else Classification
    return task(args, TASKS[args.task][name], data, device)


def train(args, name: str, seed: int, data: Dataset, run: Run, device: torch.device) -> dict:
    """Train one method with one seed in its run folder, from its last checkpoint on; returns the result."""
    generator = torch.Generator().manual_seed(seed)  # order, augmentation, episodes; all on the CPU
    torch.manual_seed(seed)  # initialisation and dropout
    task = build(args, name, data, device)
    model = task.model
    learnable = [p for p in model.parameters() if p.requires_grad]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(learnable, args.lr, weight_decay=args.weight_decay)
    else:
        rate = dict(momentum=0.9, nesterov=args.task == "fewshot", weight_decay=args.weight_decay)
        optimizer = torch.optim.SGD(learnable, args.lr, **rate)
    start, best, seconds = 0, 0.0, 0.0

    state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if "cuda" in state["random"] and device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), device)
        start, best, seconds = state["epoch"], state["best"], state["seconds"]

    def step(*batch: Tensor) -> Tensor:
        loss = task.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    training_step = TrainingStep(step, optimizer, device, capture=not args.compile)

    def checkpoint(epoch: int) -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        random = {"generator": generator.get_state(), "random": random_state(device)}
        run.save_checkpoint({**parts, **random, "epoch": epoch, "best": best, "seconds": seconds})

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    ahead, title = range(start, args.epochs), f"{name} seed {seed}"
    # disable=None: silent without terminal
    bar = tqdm(ahead, initial=start, total=args.epochs, desc=title, disable=None)
    for epoch in bar:
        began = time.perf_counter()
        steps = task.draw(generator)
        steps = min(steps, 2) if args.dry_run else steps
        training_step.set_learning_rate(learning_rate(epoch, args))
        losses = torch.zeros(steps, device=device)  # read once an epoch: no step waits for the host
        model.train()
        for i in range(steps):
            losses[i] = training_step(*task.batch(i))
            if i == 0:
                warm = time.perf_counter()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{name} seed {seed}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; lower "
                f"--lr and --overwrite. Last good checkpoint: epoch {epoch}, {run.folder}/checkpoint.pt"
            )
        seconds += time.perf_counter() - began
        line = dict(epoch=epoch + 1, lr=learning_rate(epoch, args), loss=float(losses.mean()))
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            line |= task.evaluate()
        if "accuracy" in line:
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * steps / max(steps - 1, 1)
            tqdm.write(f"{name} seed {seed}: about {epoch_time * (args.epochs - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)

    measured, features = task.conclude()
    run.save_features(**features)
    about = {"method": name, "seed": seed, "epochs": args.epochs, "seconds": seconds}
    if "accuracy" in run.history[-1]:
        about["best_validation" if args.task == "fewshot" else "best_accuracy"] = best
    run.finish({**about, **measured})
    return run.finished


# %% [5] Evaluation and figures


def draw_figures(folder: Path, runs: list[Run], args: argparse.Namespace) -> list[str]:
    """Figures of finished runs, one idea each, methods side by side; returns the names of the files."""
    names = list(dict.fromkeys(r.finished["method"] for r in runs))
    by_method = {name: [r for r in runs if r.finished["method"] == name] for name in names}
    saved = []

    def save(name: str, figure: Figure) -> None:
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=110))
        saved.append(name)

    def percent(name: str, key: str) -> np.ndarray:
        return np.array([100 * r.finished[key] for r in by_method[name]])

    tested = {name: [[x for x in r.history if "accuracy" in x] for r in by_method[name]] for name in names}
    if all(lines[0] for lines in tested.values()):
        figure = Figure(figsize=(6, 4), layout="constrained")
        plot = figure.subplots()
        for i, (name, lines) in enumerate(tested.items()):
            y = 100 * np.mean([[x["accuracy"] for x in one] for one in lines], axis=0)
            look = {
                "color": str(0.7 * i / max(1, len(names) - 1)),
                "marker": "osv^dPX*h"[i % 9],
                "label": name,
            }
            plot.plot([x["epoch"] for x in lines[0]], y, markevery=max(1, len(y) // 10), **look)
        what = "validation" if args.task == "fewshot" else "test"
        plot.set(xlabel="epoch", ylabel=f"{what} accuracy (%)")
        plot.legend()
        save("training.png", figure)

    if args.task == "fewshot":
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        plot = figure.subplots()
        for shots, marker, color in ((1, "o", "0.55"), (5, "s", "black")):
            y = [percent(name, f"accuracy_{shots}shot").mean() for name in names]
            error = [percent(name, f"interval_{shots}shot").mean() for name in names]
            look = {"fmt": marker, "color": color, "capsize": 4, "label": f"{shots}-shot"}
            plot.errorbar(y, range(len(names)), xerr=error, **look)
        plot.axvline(100 / args.way, ls=":", color="0.6", label="chance")
        plot.set_yticks(range(len(names)), names)
        plot.invert_yaxis()
        plot.set(xlabel=f"{args.way}-way test accuracy (%), 95% interval over episodes")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        save("fewshot.png", figure)
        return saved

    def panels(n: int, most: int) -> tuple[Figure, int]:
        rows, columns = -(-n // most), min(n, most)
        return Figure(figsize=(3.2 * columns, 3.3 * rows + 0.3), layout="constrained"), rows

    arrays = {name: found[0].load_features() for name, found in by_method.items()}
    small = {name: a for name, a in arrays.items() if a["test_h"].shape[1] <= 3}
    if small:  # each feature drawn as its class's number
        figure, rows = panels(len(small), 3)
        for i, (name, a) in enumerate(small.items()):
            d, K = a["test_h"].shape[1], len(a["W"])
            solid = {"projection": "3d"} if d == 3 else {}
            plot = figure.add_subplot(rows, min(3, len(small)), i + 1, **solid)
            for k in range(K):
                h, shade = a["test_h"][a["test_y"] == k][:40], str(0.65 * k / max(1, K - 1))
                plot.plot(*h.T, ls="", marker=f"${k}$", color=shade, markersize=5, mew=0.3)
            ends = [min(0, 1.05 * a["test_h"].min()), 1.05 * a["test_h"].max() + 1e-9]
            plot.set(title=name, xlabel="$h_1$", ylabel="$h_2$", xlim=ends, ylim=ends)
            if d == 3:
                plot.set(zlabel="$h_3$", zlim=ends)
                plot.view_init(elev=30, azim=45)
                plot.tick_params(labelsize=6)
            else:
                plot.set_aspect("equal")
        save("sphere.png", figure)

    # What the norm tells: each test feature's length, against the angle to its class's mean
    figure, rows = panels(len(arrays), 4)
    grid = figure.subplots(rows, min(4, len(arrays)), squeeze=False, sharex=True, sharey=True)
    for plot, (name, a) in itertools.zip_longest(grid.flat, arrays.items(), fillvalue=(None, None)):
        if name is None:
            plot.axis("off")
            continue
        h, y, right = (a[key][:2000] for key in ("test_h", "test_y", "right"))
        M = class_means(*(torch.from_numpy(a[f"train_{key}"]) for key in "hy"), len(a["W"])).numpy()[y]
        norm = np.linalg.norm(h, axis=1)
        cos = (h * M).sum(1) / np.maximum(norm * np.linalg.norm(M, axis=1), 1e-12)
        angle, norm = np.degrees(np.arccos(cos.clip(-1, 1))), norm / max(norm.mean(), 1e-12)
        plot.plot(angle[right], norm[right], ".", color="0.7", ms=3, label="right")
        plot.plot(angle[~right], norm[~right], "x", color="black", ms=5, label="misclassified")
        plot.set(title=name, xlabel="angle to class mean (degrees)", ylabel="norm / mean norm")
    handles = grid.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    save("norm_angle.png", figure)

    if args.task == "overlap":
        figure = Figure(figsize=(7, 4), layout="constrained")
        plot = figure.subplots()
        x = np.arange(len(names))
        for shift, key, shade in ((-0.2, "near", "0.85"), (0.2, "hidden", "0.55")):
            share = [percent(name, key) for name in names]  # a value a seed
            wrong = [(percent(name, key) * percent(name, f"{key}_wrong") / 100).mean() for name in names]
            height, error = [n.mean() for n in share], [n.std(ddof=min(1, len(n) - 1)) for n in share]
            label = "near another class" + (", norms apart" if key == "hidden" else "")
            plot.bar(x + shift, height, 0.36, yerr=error, color=shade, edgecolor="black", label=label)
            label = "of these misclassified" if key == "hidden" else None
            plot.bar(x + shift, wrong, 0.36, color="black", label=label)
        plot.set_xticks(x, names, rotation=20)
        plot.set(ylabel="test samples (%)", title=f"Overlapping on the sphere: 1 - cosine < {args.tau:g}")
        plot.legend()
        save("overlap.png", figure)
    return saved


def results_table(runs: list[Run], args: argparse.Namespace) -> str:
    """Mean ± std over seeds, a row a method: last epoch's accuracy first, the best epoch's beside it."""
    columns = {  # key: title, digits, factor
        "accuracy": ("accuracy %", 2, 100), "best_accuracy": ("best %", 2, 100),
        "angle_accuracy": ("by angle %", 2, 100), "norm_spread": ("norm spread", 3, 1),
        "within_cosine": ("within cosine", 3, 1), "near": ("near %", 2, 100),
        "near_wrong": ("wrong %", 2, 100), "hidden": ("hidden %", 2, 100),
        "hidden_wrong": ("wrong %", 2, 100),
        "accuracy_1shot": ("1-shot %", 2, 100), "interval_1shot": ("± 95%", 2, 100),
        "accuracy_5shot": ("5-shot %", 2, 100), "interval_5shot": ("± 95%", 2, 100),
        "best_validation": ("best val. %", 2, 100), "seconds": ("train s", 0, 1),
    }  # fmt: skip
    if args.task == "fewshot":
        del columns["accuracy"]
    keys = [key for key in columns if all(key in r.finished for r in runs)]
    rows = []
    for name in TASKS[args.task]:
        if found := [r.finished for r in runs if r.finished["method"] == name]:
            cells = [mean_std([r[key] for r in found], *columns[key][1:]) for key in keys]
            rows.append([name, len(found), *cells])
    return table(["method", "seeds", *(columns[key][0] for key in keys)], rows)


def overlap_table(runs: list[Run], args: argparse.Namespace) -> str:
    """Overlapping samples and the share of them misclassified, by tau; the published counts beside them."""
    rows = []
    for name in TASKS["overlap"]:
        if found := [r.finished for r in runs if r.finished["method"] == name]:
            cells = []
            for kind, i in itertools.product(("near", "hidden"), range(len(TAUS))):
                n, wrong = (np.mean([r[f"{kind}_{what}"][i] for r in found]) for what in ("counts", "errors"))
                cells.append(f"{n:.0f} ({100 * wrong / max(1, n):.1f})")
            rows.append([name, *cells, "{2} ({3:.2f})".format(*PUBLISHED_OVERLAP[name])])
    header = [f"{kind} {tau:g}" for kind in ("near", "hidden") for tau in TAUS]
    return table(["samples (% wrong)", *header, "published"], rows)


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def default_network(task: str, dataset: str) -> str:
    if task == "fewshot":
        return "conv4"
    small = dataset.partition(":")[0].removesuffix("lt") in ("digits", "mnist")
    if small:
        return "cnn" if task == "visualise" else "mlp"
    return "cnn9" if task == "overlap" else "vgg11"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Representation using only angles: the Spherization layer, and what the norm of a feature hides."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("spherization.py", description=about, formatter_class=formatter)).add_argument
    add("--task", choices=list(TASKS), default="retain", help="what is compared")
    add("--dataset", default="digits", help=f"{', '.join(SPECS)}, folder:PATH")
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    where = "run folders go to OUT/spherization/TASK/DATASET-NETWORK/METHOD/seedS"
    add("--out", type=Path, default="runs", help=where)
    methods = "; ".join(f"{task}: {' '.join(found)}" for task, found in TASKS.items())
    add("--method", nargs="+", metavar="METHOD", help=f"one or more, or all; {methods}")
    networks = "mlp; to visualise cnn, for larger images vgg11, to overlap cnn9, for few shots conv4"
    add("--network", choices=[*NETWORKS, *BACKBONES], help=networks)
    add("--epochs", type=int, help="as published for the task, network and data; digits 40")
    add("--batch-size", type=int, help="as published; digits 32")
    add("--optimizer", choices=["adam", "sgd"], help="as published")
    add("--lr", type=float, help="first learning rate; as published")
    add("--weight-decay", type=float, help="on all parameters; as published")
    add("--seed", type=int, nargs="+", default=[0], help="one or more; of weights, order, views and episodes")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of its own; they share the cores")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="below the layer only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start anew the runs that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    add("--synthetic", action="store_true", help="check the layer's promises and the layer-peeled model")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    add("--train-size", type=int, default=0, help="so many images, classes alike; 0: all; not for fewshot")
    add("--width", type=float, default=1.0, help="of VGG: channels times this")
    add("--radius", type=float, default=5.0, help="r; the published 2-D and 3-D features had 1")
    add("--scale", type=float, help="s at the start; 5, for 2-D and 3-D features 1")
    add("--delta", type=float, default=1e-6, help="least product of sines")
    add("--fixed-scale", action="store_true", help="do not learn s")
    add("--tau", type=float, default=0.01, help="overlapping: 1 - cosine below this")
    add("--norm-gap", type=float, default=0.1, help="hidden: and norms differ by more than this share")
    add("--way", type=int, default=5, help="classes of an episode")
    add("--shots", type=int, default=5, help="labelled images a class, in training; tested are 1 and 5")
    add("--queries", type=int, default=15, help="images a class to be classified")
    add("--episodes", type=int, default=100, help="of an epoch")
    add("--test-episodes", type=int, default=2000, help="of the test")
    add("--eval-every", type=int, default=1, help="epochs from test to test; the last is always tested")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    args.network = args.network or default_network(args.task, args.dataset)
    fits = BACKBONES if args.task == "fewshot" else NETWORKS
    if args.network not in fits:
        raise UserError(f"--network {args.network}: --task {args.task} has {', '.join(fits)}")
    known = list(TASKS[args.task])
    if args.method is None:
        digits = args.dataset.startswith("digits")  # a run of seconds: also three dimensions, for the picture
        few = ["plain", "sphere"] + ["plain-3d", "sphere-3d"] * digits
        args.method = few if args.task == "retain" else known
    for name in args.method:
        if name not in known and name != "all":
            raise UserError(f"--method {name}: --task {args.task} has {', '.join(known)}, all")
    args.method = known if "all" in args.method else list(dict.fromkeys(args.method))
    for key, value in recipe(args)._asdict().items():
        if key in args and getattr(args, key) is None:
            setattr(args, key, value)
    least = dict(epochs=1, jobs=0, batch_size=1, eval_every=1, image_size=1, train_size=0)
    for flag, low in (least | dict(way=2, shots=1, queries=1, episodes=1, test_episodes=2)).items():
        if getattr(args, flag) < low:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {low} or more")
    if args.train_size and args.task == "fewshot":
        raise UserError(f"--train-size {args.train_size}: --task fewshot has episodes, not a training set")
    for flag in ("lr", "width", "radius", "scale", "norm_gap", "tau"):
        if getattr(args, flag) is not None and not 0 < getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number above 0")
    if not 1e-30 <= args.delta < 1:
        raise UserError(f"--delta {args.delta}: expected a number from 1e-30, for float32's sake, to 1")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    args.seed = list(dict.fromkeys(args.seed))
    if args.dry_run:
        args.epochs, args.overwrite, args.out = 1, True, args.out / "dry-run"
        args.test_episodes = min(args.test_episodes, 20)
    return args


def balanced_subset(y: Tensor, K: int, size: int) -> Tensor:
    """Indices of `size` images, the classes alike to within one image; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(y), generator=generator)
    rank = torch.empty_like(y)  # the how-manieth of its class each image is
    for k in range(K):
        members = shuffled[y[shuffled] == k]
        rank[members] = torch.arange(len(members))
    return torch.argsort(rank * K + y)[:size].sort().values


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "resume", "overwrite", "synthetic"}
NOT_IN_CONFIG |= {"jobs", "words"}


def program(args: argparse.Namespace) -> dict:
    """Every method with every seed, one after another; the table and the figures. Raises UserError."""
    if args.synthetic:
        return {"ok": synthetic(args.out / "spherization" / "synthetic")}
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    data = load_dataset(args.dataset, args.data_dir, image_size=args.image_size)
    K = len(data.classes)
    if args.train_size and args.task != "fewshot":
        keep = balanced_subset(data.train_y, K, args.train_size)
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    if args.dry_run and args.task != "fewshot":
        few, some = spread(len(data.train_y), 2000), spread(len(data.test_y), 500)
        splits = dict(train_x=data.train_x[few], train_y=data.train_y[few])
        data = data._replace(**splits, test_x=data.test_x[some], test_y=data.test_y[some])
    N = len(data.train_y)
    if N < 2 or (args.batch_size < 2 and args.task != "fewshot"):
        least = f"--dataset {args.dataset}, --batch-size {args.batch_size}"
        raise UserError(f"{least}: BatchNorm needs two images at a time")
    name = args.dataset.replace(":", "-").replace("/", "-")
    folder = args.out / "spherization" / args.task / f"{name}-{args.network}"
    print(f"{args.dataset}: {K} classes, {N:,} training images, {len(data.test_y):,} test images")
    print(f"{hardware(device)}, {args.precision}; into {folder}")
    for name in args.method:  # says what is wrong with a model before the first one is trained
        task = build(args, name, data, torch.device("cpu"))
        size = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
        print(f"{name}: {args.network}, {size:,} parameters; seeds {args.seed}, ", end="")
        print(f"{args.epochs} epochs, {args.optimizer} at {args.lr:g}")
    if args.jobs > 1:  # all are finished then, and what follows only reads them
        run_side_by_side(Path(__file__), args, device)
        args.resume, args.overwrite = True, False
    runs = []
    for name in args.method:
        for seed in args.seed:
            flags = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
            flags |= {"method": name, "seed": seed}
            again = dict(resume=args.resume, overwrite=args.overwrite)
            run = Run(folder / name / f"seed{seed}", flags, Path(__file__), **again, device=device)
            if not run.finished:
                train(args, name, seed, data, run, device)
                draw_figures(run.folder, [run], args)
            elif args.jobs <= 1:  # else it was said when the run ended
                accuracy = 100 * run.finished["accuracy"]
                print(f"{name} seed {seed}: done before, {accuracy:.2f}%; --overwrite redoes it")
            runs.append(run)
    if args.jobs == 0:  # one of several at once: the common table and figures are for the one who started us
        return {"results": [run.finished for run in runs], "folder": str(folder)}
    print(f"\n{results_table(runs, args)}")
    if args.task == "fewshot":
        print(f"{args.way}-way, {args.test_episodes:,} test episodes; trained with {args.shots} shots")
    else:
        print("Last epoch. by angle: nearest class mean by cosine; norm spread: std / mean of feature norms")
    if args.task == "overlap":
        print(f"near: within tau = {args.tau:g} of a sample of another class in angle; hidden: and in norm")
        print(f"more than {args.norm_gap:.0%} apart\n\n{overlap_table(runs, args)}")
        print("published: CIFAR-10, cnn9, a definition that is not known; the counts are not comparable")
    figures = draw_figures(folder, runs, args)
    print(f"figures in {folder}: {', '.join(figures)}")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def main(argv: list[str] | None = None) -> dict:
    """Run the command line. Exit code 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        result = program(parse(argv))
    except UserError as error:
        print(f"spherization.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "spherization.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
