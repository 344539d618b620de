# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Classes that only the length of a feature keeps apart, and a layer that leaves angles only: Spherization.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 1, of which we have the abstract, and the
code and read-me published with the paper it builds on (NeurIPS 2022): "released" below. The paper's text we
do not have.

WHAT COLLAPSES. A classifier trained by inner products, z_k = w_k . h + b_k, may tell classes apart by the
length of h as much as by its direction. Whatever then looks at angles alone (cosine similarity, retrieval,
prototypes) sees such classes on top of each other: in a layer-peeled model with ReLU features and a bias all
K classes may lie on one ray, perfectly classified and, by angle, all the same (--synthetic).

THE REMEDY leaves length nothing to say. The last hidden layer's output z in R^n, no ReLU, becomes n angles,
and the angles become a point of the sphere of radius r in R^(n+1); a linear layer without bias reads it.

    phi_k = (pi/2 - phi_L) sigmoid(s z_k) + phi_L                 s: learnable scale, r: fixed radius
    x_k   = r cos(phi_k) prod_{j<k} sin(phi_j),   k = 1..n        x_{n+1} = r prod_{j<=n} sin(phi_j)
    phi_L = arcsin(delta^(1/n))                                   so that every product of sines is >= delta

    python spherization.py                                        digits, with and without; under a minute
    python spherization.py --synthetic                            the theory above, claim by claim
    python spherization.py --dataset mnist --net lenet --method plain sphere --seed 0 1 2
    python spherization.py --task fewshot --dataset cifar100      FC100, with and without, two metrics
    python spherization.py --task analogy                         a small language, with and without
    python spherization.py --task analogy --model NAME --text sentences.txt --analogies questions-words.txt

Tasks: `retain`, is accuracy kept? `overlap`, what does the norm hide? `fewshot`, prototypical networks, and
`analogy`, a : b :: c : d by the cosine of word vectors, where angles are all that is used. There the layer
sits inside a transformer's last block, as released: LayerNorm(u + W x), with u from the attention before it.
So x has nothing but angles, and a word's vector has more: W x has any length beside u. LayerNorm fixes the
length of the sum (but for its gains and biases), and does so without the layer too.

WHAT WE COMPUTE DIFFERENTLY
- The released code multiplies log-sines by a triangular (n+1) x (n+1) matrix and adds 1e-6 inside each
  logarithm, which lengthens x (at n = 4096 by 0.04% of r, and by 0.4% where all angles are alike). A
  triangular matrix of ones is a cumulative sum: O(n), and without the 1e-6 exact. benchmarks/spherization.py
  has the released form, and compares.
- The released w-linear and w-sigmoid are g(acos(clip(||h|| cos(theta)))), with logits of -1 to 1. Ours are
  ||h|| g(theta), SphereNet's formula; published percentages come from the released form. The released `none`
  normalises its input and divides the bias by ||w||; ours is the plain inner product.
- Analogies: the released runs pad each line to 512 tokens that count in the loss, begin the new layer at
  random, and let a language model rate sentences that state the analogy. We count no padding; W begins as
  the weights that it replaces, without their bias and with a column of zeros for x_{n+1}, the rest as it was;
  input embeddings name the tokens, as BERT ties them; and word vectors are compared. As released, no token is
  masked and SGD has no momentum; our own small encoder begins at random, has a fifth masked, and Adam.

WHAT THE SOURCE LEAVES OPEN, and what we chose
- `learnable` is about s alone, as in the released runs; r stays fixed. s = r = 5, but s = 1 for features of
  three dimensions (released there: s = r = 1, and ten times the steps).
- "Overlapping samples" are published as counts (CIFAR-10, nine convolutions) without a definition or code.
  Ours: `overlap`, with tau swept. Counts are not comparable.
- The last epoch is reported, and the best one tested beside it; test images select nothing.
- Baselines keep their biases, as released; `none` has no bias. Images are not augmented. The released VGG-11
  on CIFAR, where the gains are 0.1 and 0.6 points, is left out.
- Few-shot: the released network ends in a max-pool, the spherized one in a convolution and BatchNorm; the
  rows +last show what that change alone does. FC100's 20 validation classes are left out.
"""

# %% [markdown]
# # 1. The method
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lower_bound(n: int, delta: float = 1e-6) -> float:
    """phi_L, in radians: with n angles in [phi_L, pi/2] every product of sines is at least delta.

    It nears pi/2 as n grows: 0.001 at n = 2, 1.27 at 300, 1.49 at 4096.
    """
    # sin(phi_L)^n = delta; the cap (released) would only matter beyond n = 110,000
    return min(math.asin(delta ** (1 / n)), 0.99 * math.pi / 2)


def spherize(z: Tensor, s: Tensor | float, r: float = 5.0, delta: float = 1e-6) -> Tensor:
    """Points of the sphere of radius r: z (..., n) and scale s -> x (..., n+1). Time and memory O(n).

    With P_k = sin(phi_1) ... sin(phi_k):   x_k = r cos(phi_k) P_{k-1},   x_{n+1} = r P_n
    """
    n = z.shape[-1]
    phi_L = lower_bound(n, delta)
    psi = (math.pi / 2 - phi_L) * torch.sigmoid(-s * z)  # (..., n): pi/2 - phi
    cos = psi.sin()  # cos(phi)
    if n < 40:  # few angles come near 0, where 1 - cos^2 would cancel
        phi = (math.pi / 2 - phi_L) * torch.sigmoid(s * z) + phi_L
        log_sin = phi.sin().log()
    else:  # sines just below 1, whose rounding errors would add up: from the cosines
        log_sin = 0.5 * torch.log1p(-cos * cos)
    P = log_sin.cumsum(-1).exp()  # (..., n)
    one = torch.ones_like(z[..., :1])
    return r * torch.cat([cos, one], -1) * torch.cat([one, P], -1)


class Spherization(nn.Module):
    """The Spherization layer: z (B, n) -> x (B, n+1); ||x|| = r.

    Or channels (B, n, H, W) -> (B, n+1, H, W), or tokens (B, T, n) -> (B, T, n+1).

    Put it where the last hidden layer's ReLU was, and a linear layer or convolution without bias after it:
    with a bias a class could be recognised by the distance of its features from a plane, not by their
    direction. Always in float32 or better: in bf16 the sphere would be 0.4% thick.
    """

    def __init__(self, n: int, radius: float = 5.0, scale: float = 5.0, delta: float = 1e-6):
        super().__init__()
        if n < 1 or not (0 < radius < math.inf and 0 < scale < math.inf and 1e-30 <= delta < 1):
            raise ValueError(f"Spherization: n {n}, radius {radius}, scale {scale}, delta {delta}")
        self.n = n
        self.radius = radius
        self.delta = delta
        self.s = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, z: Tensor) -> Tensor:
        axis = 2 if z.ndim == 3 else 1
        if z.ndim < 2 or z.shape[axis] != self.n:
            expected = "(B, n), (B, n, H, W) or (B, T, n)"
            raise ValueError(f"Spherization of {self.n}: got {tuple(z.shape)}, expected {expected}")
        z = z.to(torch.promote_types(z.dtype, torch.float32)).movedim(axis, -1)  # (B, n), (B, H, W, n), ...
        return spherize(z, self.s, self.radius, self.delta).movedim(-1, axis)


def angles(x: Tensor) -> Tensor:
    """The inverse: x (..., n+1) -> phi (..., n) in radians, phi_k = atan2(||x_{>k}||, x_k)."""
    tail = x.square().flip(-1).cumsum(-1).flip(-1)[..., 1:].sqrt()  # ||x_{>k}|| = r P_k
    return torch.atan2(tail, x[..., :-1])


def angle_operator(name: str, cos: Tensor) -> Tensor:
    """SphereNet's angular similarities g(theta), from 1 at theta = 0 to -1 at pi (Liu et al. 2017)."""
    if name == "cosine":
        return cos
    theta = torch.acos(cos.clamp(-1 + 1e-6, 1 - 1e-6))  # its slope at +-1 is infinite
    if name == "linear":
        return 1 - 2 * theta / math.pi
    if name == "sigmoid":  # their quotient of exponentials, as tanh
        k = 0.3
        return torch.tanh((math.pi / 2 - theta) / (2 * k)) / math.tanh(math.pi / (4 * k))
    raise ValueError(f"angle_operator {name}: expected cosine, linear or sigmoid")


def overlap(h: Tensor, y: Tensor, norm_gap: float = 0.1) -> tuple[Tensor, Tensor]:
    """How close in angle each feature comes to one of another class: two largest cosines, (N,) each.

    Over all features of other classes, and over those of them whose norm is more than `norm_gap` (0.1: 10%)
    above or below: what the norm kept apart and an angle does not. h (N, d), y (N,). Where there is no such
    feature: -1. "Overlapping samples" as we define them: those with 1 - cosine < tau. In float64.
    """
    h = h.double()
    log_norm = h.norm(dim=1).clamp_min(1e-300).log()
    u = F.normalize(h, dim=1)
    near = []
    hidden = []
    for some, label, size in zip(u.split(1000), y.split(1000), log_norm.split(1000), strict=True):
        cos = (some @ u.T).masked_fill(label[:, None] == y, -1)  # (1000, N)
        near.append(cos.amax(1))
        same_norm = (size[:, None] - log_norm).abs() <= math.log1p(norm_gap)
        hidden.append(cos.masked_fill(same_norm, -1).amax(1))
    return torch.cat(near), torch.cat(hidden)


def draw_episodes(y: Tensor, E: int, way: int, images: int, generator: torch.Generator) -> Tensor:
    """E episodes of `way` classes, `images` images each: indices into y (E, way, images), none twice.

    Raises ValueError for too few classes, or too few images of one.
    """
    members = [(y == k).nonzero().flatten() for k in y.unique()]
    fewest = min(map(len, members))
    if len(members) < way or fewest < images:
        found = f"{len(members)} classes of {fewest} images or more"
        raise ValueError(f"an episode has {way} classes of {images} images, and there are {found}")
    episodes = torch.empty(E, way, images, dtype=torch.long)
    for episode in episodes:
        classes = torch.randperm(len(members), generator=generator)[:way]
        for slot, k in enumerate(classes):
            drawn = torch.randperm(len(members[k]), generator=generator)[:images]
            episode[slot] = members[k][drawn]
    return episodes


def prototype_logits(h: Tensor, shots: int, metric: str) -> Tensor:
    """Prototypical network (Snell et al. 2017) with the released temperatures, 1/128 and 1000/128.

    h (E, way, shots + queries, d) -> logits (E, way * queries, way), queries class by class. On the sphere
    -||q - p||^2 is 2 r^2 (cos - 1) for one shot: at r = 5 it spans 0.4 where the cosine's logits span 8.
    """
    p = h[:, :, :shots].mean(2)  # (E, way, d): the prototypes
    q = h[:, :, shots:].flatten(1, 2)  # (E, way * queries, d)
    if metric == "cosine":
        return 1000 * (F.normalize(q, dim=2) @ F.normalize(p, dim=2).mT - 1) / 128
    if metric == "euclidean":
        return -(q[:, :, None] - p[:, None]).square().sum(3) / 128
    raise ValueError(f"prototype_logits {metric}: expected cosine or euclidean")


def spherize_last_block(encoder: nn.Module, radius: float = 5.0, scale: float = 5.0) -> None:
    """Put the layer, in place, into the feed-forward part of a transformer's last block, whatever its names.

    LayerNorm(u + W_2 GELU(W_1 u + b_1) + b_2) becomes LayerNorm(u + W spherize(W_1 u + b_1)), where W begins
    as W_2 with a column of zeros more. Raises ValueError where there is not one W_2 and one GELU (or alike).
    """
    *_, blocks = (part for part in encoder.modules() if isinstance(part, nn.ModuleList))
    parts = dict(blocks[-1].named_modules())
    linear = {path: part for path, part in parts.items() if isinstance(part, nn.Linear)}
    (path,) = (path for path, part in linear.items() if part.in_features > part.out_features)  # W_2 narrows
    leaves = [path for path, part in parts.items() if not [*part.children(), *part.parameters()]]
    (gelu,) = (path for path in leaves if not isinstance(parts[path], nn.Dropout))
    W = nn.Linear(parts[path].in_features + 1, parts[path].out_features, bias=False)
    W.weight.data = F.pad(parts[path].weight.detach(), (0, 1))  # (d, n+1)
    blocks[-1].set_submodule(gelu, Spherization(parts[path].in_features, radius, scale))
    blocks[-1].set_submodule(path, W)


def answer_analogies(V: Tensor, questions: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Is d found in a : b :: c : d? By offset among all words, and by choice among four: (Q,) bool each.

    Offset: d is nearest to b - a + c, these three left out (3CosAdd, Mikolov et al. 2013). Choice: d - c is
    nearest to b - a. By cosine. V (n, d): vectors; questions (Q, 4), three wrong d (Q, 3): numbers of words.
    """
    a, b, c, d = questions.unbind(1)
    u = F.normalize(V, dim=1)
    cos = (u[b] - u[a] + u[c]) @ u.T  # (Q, n), times a length that changes no order
    offset = cos.scatter(1, questions[:, :3], -math.inf).argmax(1) == d
    four = torch.cat([d[:, None], wrong], 1)  # (Q, 4)
    cos = F.cosine_similarity(V[four] - V[c][:, None], (V[b] - V[a])[:, None], dim=2)
    return offset, cos[:, 0] > cos[:, 1:].amax(1)


# %% Imports of the other cells
import argparse
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import (
    Arguments,
    Batches,
    Claims,
    Dataset,
    Run,
    UserError,
    a_path,
    at_least,
    class_means,
    coarse_labels,
    command_line,
    concatenate,
    curves,
    finished_runs,
    hardware,
    keep_per_class,
    logits,
    mean_std,
    metric_device,
    minimise,
    open_run,
    pick_device,
    pick_precision,
    positive,
    prepare_data,
    save_figure,
    split_name,
    styles,
    table,
    unit,
)

# %% [markdown]
# # 2. Theory check
# The layer-peeled model (features are free), and what the layer promises.

# %%


def layer_peeled(K: int, n: int, lam: float, spherized: bool, seed: int = 0) -> tuple:
    """Optimal free pre-activations of K classes, n numbers each: W (K, d), b (K,), features H (K, d), loss.

    min mean_k CE(W h_k + b, k) + lam/2K (||W||^2 + ||Z||^2), with ReLU features h = z >= 0 and a free bias b,
    or with h the spherized z (d = n+1) and b = 0. Float64.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(K)

    def features(q: Tensor) -> tuple[Tensor, Tensor]:  # z and h
        return (q, spherize(q, 5.0)) if spherized else (q**2, q**2)  # every h = q^2 >= 0

    def loss(W: Tensor, q: Tensor, b: Tensor) -> Tensor:
        z, h = features(q)
        ce = F.cross_entropy(h @ W.T + (0 if spherized else b), y)
        return ce + lam / (2 * K) * (W.square().sum() + z.square().sum())

    W = torch.randn(K, n + 1 if spherized else n, generator=generator, dtype=torch.float64)
    q = torch.randn(K, n, generator=generator, dtype=torch.float64)
    W, q, b = minimise(loss, W, q, torch.zeros(K, dtype=torch.float64), steps=300)
    return W, b, features(q)[1], float(loss(W, q, b))


def angle_accuracy(h: Tensor, y: Tensor, M: Tensor) -> float:
    """Share of features h (N, d) whose nearest class mean, by cosine and of M (K, d), is that of y (N,)."""
    nearest = logits(h, unit(M).nan_to_num()).argmax(1)
    return float((nearest == y.to(nearest.device)).double().mean())


def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against a closed form or direct optimisation; draw synthetic.png."""
    from matplotlib.figure import Figure

    claims = Claims()
    generator = torch.Generator().manual_seed(0)

    # Six classes: the norm alone tells them apart, until one angle has to
    K = 6
    drawn = {}
    for spherized, name in ((False, "one ReLU unit and a bias"), (True, "one angle, no bias")):
        W, b, H, _ = layer_peeled(K, 1, 1e-3, spherized, seed=1)
        drawn[name] = H
        right = (H @ W.T + b).argmax(1) == torch.arange(K)
        noise = torch.randn(200, K, H.shape[1], generator=generator, dtype=torch.float64)
        noisy = H + 0.01 * H.norm(dim=1).mean() * noise
        noisy = noisy if spherized else noisy.relu()
        by_angle = angle_accuracy(noisy.flatten(0, 1), torch.arange(K).repeat(200), H)
        claims.equal(f"6 classes, {name}: accuracy", 1, float(right.double().mean()), 0)
        # on one ray every cosine is 1 (or 0, for no feature), and the first class wins
        claims.equal(f"   by angle alone, chance 1/{K}", 1 if spherized else 1 / K, by_angle, 0.01)

    # What the layer promises, in float32 and where rounding errors add up: all angles alike
    z = torch.tensor([0, 0.3, 0.9, -0.9, -3, 3, -50, 50])
    x = spherize(z[:, None].expand(-1, 4096), 5.0).double()
    norm = x.norm(dim=1) / 5
    farthest = float(norm[(norm - 1).abs().argmax()])
    claims.equal("4096 angles, float32: the point is on the sphere, norm / radius", 1, farthest, 1e-6)
    claims.equal(
        "   no coordinate fades below delta: smallest / delta", 1, float(x[:, -1].min()) / 5 / 1e-6, 2e-5
    )

    # The later an angle, the less it moves x: ||dx/dz_k|| = r s (pi/2 - phi_L)/4 prod_{j<k} sin(phi_j)
    n = 300
    z = torch.zeros(n, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda z: spherize(z, 5.0), z)  # (n+1, n)
    middle = (math.pi / 2 + lower_bound(n)) / 2  # the angle at z = 0
    theory = 5 * 5 * (math.pi / 2 - lower_bound(n)) / 4 * math.sin(middle) ** (n - 1)
    claims.equal(
        "300 angles at z = 0: the last one moves x least, |dx/dz_300|", theory, float(J[:, -1].norm()), 1e-9
    )

    # One picture: six classes told apart by the norm on one ray, or by one angle
    figure = Figure(figsize=(8, 4), layout="constrained")
    look = styles(range(K))
    for plot, (name, H) in zip(figure.subplots(1, 2), drawn.items(), strict=True):
        points = F.pad(H, (0, 1))[:, :2].tolist()  # on the left there is no second coordinate
        for k, (u, v) in enumerate(points):
            plot.plot([0, u], [0, v], color="0.8", zorder=1)
            plot.plot(u, v, ls="", markersize=9, label=f"class {k}", **look[k])
        plot.set(title=name, xlabel="first coordinate of the feature", ylabel="second coordinate")
        plot.set_aspect("equal", adjustable="datalim")
    figure.legend(*plot.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(folder / "synthetic.png", figure)
    return claims.report(folder / "synthetic.png")


# %% [markdown]
# # 3. Network
# A trunk, the last hidden layer's activation, a classifier.

# %%


def mlp(shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    """784-500-300 on MNIST: layers, images (B, C, H, W) -> z (B, n) before any activation, and n."""
    return [nn.Flatten(), nn.Linear(math.prod(shape), 500), nn.ReLU(), nn.Linear(500, 300)], 300


def lenet(shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; 28 x 28 is padded to its 32 x 32."""
    H, W, C = shape
    pad = 2 if H == 28 else 0
    h, w = (((side + 2 * pad - 4) // 2 - 4) // 2 for side in (H, W))
    if min(h, w) < 1:
        raise UserError(f"--net lenet: needs images of 16 x 16 or more, not {H} x {W}")
    layers = [nn.ZeroPad2d(pad), nn.Conv2d(C, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * h * w, 120), nn.ReLU(), nn.Linear(120, 84)]
    return layers, 84


class Classifier(nn.Linear):
    """Features h (B, d) -> logits (B, K).

    inner: w_k . h, and inner+bias: w_k . h + b_k. With theta_k between h and w_k, and SphereNet's g of three
    names, cosine, linear and sigmoid: g(theta_k), logits of -1 to 1; with w- before it: ||h|| g(theta_k).
    """

    def __init__(self, kind: str, d: int, K: int):
        super().__init__(d, K, bias=kind == "inner+bias")
        self.kind = kind

    def forward(self, h: Tensor) -> Tensor:
        if self.kind.startswith("inner"):
            return super().forward(h)
        cos = F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).T  # (B, K)
        length = h.norm(dim=1, keepdim=True) if self.kind.startswith("w-") else 1.0
        return length * angle_operator(self.kind.removeprefix("w-"), cos)

    def class_vectors(self) -> Tensor:
        """W (K, d) with argmax_k w_k . h + b_k the decision: of unit length where only its angle counts."""
        W = self.weight.detach()
        return W if self.kind.startswith("inner") else F.normalize(W, dim=1)


def build_classifier(args: argparse.Namespace, name: str, data: Dataset) -> nn.ModuleDict:
    """Images (B, C, H, W) -> trunk -> z (B, n) -> layer -> h (B, d) -> classifier -> logits (B, K)."""
    method = TASKS[args.task].methods[name]
    layers, n = TRUNKS[args.net](tuple(data.train_x.shape[1:]))
    if method.units:
        layers += [nn.ReLU(), nn.Linear(n, method.units)]
        n = method.units
    d = n
    layer = nn.ReLU()
    if method.layer == "sphere":  # at s = 5 two angles would end at 0 or 90 degrees
        layer = Spherization(n, args.radius, 1.0 if method.units else args.scale)
        d = n + 1
    classifier = Classifier(method.head, d, len(data.classes))
    return nn.ModuleDict({"trunk": nn.Sequential(*layers), "layer": layer, "classifier": classifier})


def build_embedding(args: argparse.Namespace, name: str, data: Dataset) -> nn.ModuleDict:
    """Conv-4 for prototypes: images (B, C, H, W) -> trunk -> z (B, 64) -> layer -> h (B, d).

    It ends in a max-pool over what is left of the image, or in a convolution of that size and BatchNorm.
    """
    last = PROTOTYPES[name].layer
    H, W, C = data.train_x.shape[1:]
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        C = 64
        if min(H, W) >= 4:  # 32 -> 2, 84 -> 5; digits 8 -> 2
            layers.append(nn.MaxPool2d(2))
            H = H // 2
            W = W // 2
    if last == "pool":
        layers.append(nn.MaxPool2d((H, W)))
    else:
        layers += [nn.Conv2d(64, 64, (H, W), bias=False), nn.BatchNorm2d(64)]
    layer = Spherization(64, args.radius, args.scale) if last == "sphere" else nn.Identity()
    return nn.ModuleDict({"trunk": nn.Sequential(*layers, nn.Flatten()), "layer": layer})


class Encoder(nn.Module):
    """Two blocks, called as transformers' are: tokens (B, T) of V, which are there (B, T) -> ((B, T, d),)."""

    def __init__(self, V: int, d: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(V, d)
        self.tokens.weight.data *= 0.1  # small, since they name the tokens too
        self.places = nn.Parameter(0.1 * torch.randn(7, d))
        self.norm = nn.LayerNorm(d)
        gelu = nn.Sequential(nn.GELU())  # a bare GELU's fused inference would pass by what replaces it
        block = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, gelu, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(self, tokens: Tensor, there: Tensor) -> tuple[Tensor]:
        u = self.norm(self.tokens(tokens) + self.places[: tokens.shape[1]])
        return (self.blocks(u, src_key_padding_mask=~there),)


def pretrained(kind: str, model: str, **options):
    """What transformers' class `kind` loads from --model: weights, no code. Raises UserError."""
    try:
        import transformers  # optional, and slow to import

        transformers.utils.logging.set_verbosity_error()
        return getattr(transformers, kind).from_pretrained(model, **options)
    except ImportError:
        raise UserError("--model: needs one more package: pip install transformers") from None
    except Exception as error:  # of many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"--model {model}: cannot be loaded ({reason})") from None


def build_encoder(args: argparse.Namespace, name: str, data: "Language") -> nn.ModuleDict:
    """The encoder of --model, or our own; for sphere methods with the layer in its last block."""
    if args.model:
        encoder, report = pretrained("AutoModel", args.model, use_safetensors=True, output_loading_info=True)
        absent = [key for key in sorted(report["missing_keys"]) if "pooler" not in key]
        if absent:
            raise UserError(f"--model {args.model}: has no weights for {absent[0]}")
    else:
        encoder = Encoder(data.mask + 1)
    if ENCODERS[name].layer == "sphere":
        try:
            spherize_last_block(encoder, args.radius, args.scale)
        except ValueError:
            raise UserError(f"--model {args.model}: its last block has not one W_2 and one GELU") from None
    return nn.ModuleDict({"encoder": encoder.float()})


# %% [markdown]
# # 4. Training

# %%


class Method(NamedTuple):
    layer: str  # the last hidden layer's activation, relu or sphere; of Conv-4 how it ends
    head: str  # a kind of Classifier, or a metric of prototype_logits
    about: str
    units: int = 0  # of the last hidden layer; 0: the network's own


CLASSIFIERS = {
    "plain": Method("relu", "inner+bias", "ReLU and a linear layer with bias: the baseline"),
    "sphere": Method("sphere", "inner", "the Spherization layer and a linear layer without bias"),
    "plain-3d": Method("relu", "inner+bias", "the baseline with features of three dimensions", 3),
    "sphere-3d": Method("sphere", "inner", "two angles: features on an eighth of a sphere", 2),
}
OPERATORS = {
    "none": Method("relu", "inner", "inner product, no bias"),
    "sphere": Method("sphere", "inner", "the Spherization layer, inner product, no bias"),
    "cosine": Method("relu", "cosine", "cos(theta), features and class vectors of unit length"),
    "linear": Method("relu", "linear", "1 - 2 theta / pi"),
    "sigmoid": Method("relu", "sigmoid", "SphereNet's sigmoid of theta"),
    "w-cosine": Method("relu", "w-cosine", "||h|| cos(theta): only class vectors of unit length"),
    "w-linear": Method("relu", "w-linear", "||h|| (1 - 2 theta / pi)"),
    "w-sigmoid": Method("relu", "w-sigmoid", "||h|| times the sigmoid of theta"),
}
PROTOTYPES = {
    "euclidean": Method("pool", "euclidean", "Conv-4 as it is, squared distance to a prototype"),
    "euclidean+last": Method("convolution", "euclidean", "a convolution for its last max-pool"),
    "euclidean+sphere": Method("sphere", "euclidean", "that, and the Spherization layer"),
    "cosine": Method("pool", "cosine", "Conv-4 as it is, cosine to a prototype"),
    "cosine+last": Method("convolution", "cosine", "a convolution for its last max-pool"),
    "cosine+sphere": Method("sphere", "cosine", "that, and the Spherization layer"),
}
ENCODERS = {
    "plain": Method("gelu", "untrained", "the encoder as it is before training"),
    "plain+tuned": Method("gelu", "tuned", "trained to name the tokens of sentences: the baseline"),
    "sphere+tuned": Method("sphere", "tuned", "the same with the Spherization layer in the last block"),
}
TRUNKS = {"mlp": mlp, "lenet": lenet}
WAY = 5  # classes of an episode, each with
SHOTS = 5  # labelled images and
QUERIES = 15  # images to be classified
RECIPES = {  # network, data set ("": any other): epochs, batch size, lr, weight decay; digits' are ours
    ("mlp", ""): (100, 256, 1e-3, 5e-5),
    ("mlp", "digits"): (80, 64, 5e-3, 5e-5),
    ("lenet", ""): (20, 128, 1e-3, 0.0),
    ("conv4", ""): (100, 100, 1e-4, 0.0),
    ("conv4", "digits"): (5, 100, 1e-3, 0.0),
    ("encoder", ""): (12, 64, 3e-3, 0.0),
    ("--model", ""): (3, 8, 1e-4, 0.0),
}
FC100 = {  # 60 and 20 of CIFAR-100's classes, by superclass (Oreshkin et al. 2018)
    "train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19),
    "test": (0, 7, 12, 14),
}


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr: Conv-4 halves it after each tenth of the epochs; digits have a tenth of it in the last fifth."""
    if args.net == "conv4":
        return args.lr * 0.5 ** (10 * epoch // args.epochs)
    last = split_name(args.dataset)[0] == "digits" and epoch / args.epochs >= 0.8
    return args.lr * 0.1 if last else args.lr


def train_classifier(args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # order
    model = build_classifier(args, name, data).to(run.device, memory_format=torch.channels_last)
    trunk, layer, classifier = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=run.fused)
    images = Batches(data.train_x, data.mean, data.std, device=run.device)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(len(data.train_y), generator=generator)
        labels = data.train_y[order].to(run.device)
        model.train()
        for part, x in images.epoch(order, args.batch_size):  # (B, C, H, W)
            with run.autocast():  # bf16 inside the network only
                z = trunk(x)  # (B, n)
            h = layer(z.float())  # (B, d); d = n + 1 and ||h|| = r on the sphere
            loss = F.cross_entropy(classifier(h), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(lr=lr)
        if run.is_test_epoch(epoch):  # every --eval-every epochs, and after the last one
            h = embed(model, data.test_x, data, run)
            run.log(accuracy=accuracy(model["classifier"], h, data.test_y))
    return measure_classifier(args, model, data, run)


def train_prototypes(args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run) -> dict:
    """Train one few-shot method, one episode per step: queries are told apart by distance to prototypes."""
    metric = PROTOTYPES[name].head
    x, y = split_by_class(args, data)["train"]
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # episodes
    model = build_embedding(args, name, data).to(run.device, memory_format=torch.channels_last)
    trunk, layer = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=run.fused)
    images = Batches(x, data.mean, data.std, device=run.device)
    queries = torch.arange(WAY, device=run.device).repeat_interleave(QUERIES)  # (WAY * QUERIES,)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        episodes = draw_episodes(y, args.episodes, WAY, SHOTS + QUERIES, generator)
        model.train()
        for _, batch in images.epoch(episodes.flatten(), args.batch_size):  # one episode: (B, C, H, W)
            with run.autocast():  # bf16 inside the network only
                z = trunk(batch)
            h = layer(z.float()).view(1, WAY, SHOTS + QUERIES, -1)
            loss = F.cross_entropy(prototype_logits(h, SHOTS, metric)[0], queries)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)
        run.log(lr=lr)
    return measure_prototypes(args, model, metric, data, run)


def split_by_class(args: argparse.Namespace, data: Dataset) -> dict[str, tuple]:
    """Images and labels of the classes to train and to test on: FC100's for cifar100, else half and half.

    Raises UserError for fewer classes or images than an episode has.
    """
    x = concatenate(data.train_x, data.test_x)
    y = torch.cat([data.train_y, data.test_y])
    if split_name(args.dataset)[0] == "cifar100":
        coarse, _ = coarse_labels(data.classes, "superclasses")  # (K,)
        classes = {split: torch.isin(coarse, torch.tensor(members)) for split, members in FC100.items()}
    else:
        first = torch.arange(len(data.classes)) < len(data.classes) // 2
        classes = {"train": first, "test": ~first}
    need = SHOTS + QUERIES
    for split, members in classes.items():
        n = torch.bincount(y, minlength=len(members))[members]
        if len(n) < WAY or n.min() < need:
            found = f"{len(n)} {split} classes of {n.min()} images or more"
            raise UserError(f"--dataset {args.dataset}: {found}; an episode has {WAY} classes of {need}")
    pools = {split: members[y].nonzero().flatten() for split, members in classes.items()}
    return {split: (x[pool], y[pool]) for split, pool in pools.items()}


def train_encoder(args: argparse.Namespace, name: str, seed: int, data: "Language", run: Run) -> dict:
    """Train one encoder to name the tokens of sentences, and measure its analogies."""
    torch.manual_seed(seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(seed)  # order and masks
    model = build_encoder(args, name, data).to(run.device)
    (encoder,) = run.prepare(model)  # speed only: --compile
    E = model["encoder"].get_input_embeddings().weight  # (V, d)
    sgd_or_adam = torch.optim.SGD if args.model else torch.optim.Adam
    optimizer = sgd_or_adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=run.fused)
    masked = 0.0 if args.model else 0.2
    epochs = args.epochs if ENCODERS[name].head == "tuned" else 0

    for _ in run.epochs(epochs, model=model, optimizer=optimizer, generator=generator):
        model.train()
        order = torch.randperm(len(data.sentences), generator=generator)
        for part in order.split(args.batch_size):
            tokens, there, _ = data.batch([data.sentences[i] for i in part])  # (B, T) each
            hidden = torch.rand(tokens.shape, generator=generator) < masked
            shown = tokens.masked_fill(hidden, data.mask).to(run.device)
            with run.autocast():  # bf16 inside the network only
                h = encoder(shown, there.to(run.device))[0]  # (B, T, d)
                z = h[there.to(run.device)] @ E.T  # (tokens, V)
            loss = F.cross_entropy(z.float(), tokens[there].to(run.device))  # masked or not
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)
    return measure_analogies(args, model["encoder"], data, run)


class Language(NamedTuple):
    """Sentences and analogy questions in words, and the tokens of each word."""

    sentences: list[list[str]]
    questions: list[tuple[str, list[str]]]  # section; a, b, c, d
    tokens: dict[str, list[int]]
    begin: int  # the token before a sentence,
    end: int  # the one after it,
    mask: int  # and the one that hides another; of our own tokens the last
    fingerprint: str = ""

    def batch(self, lines: list[list[str]], target: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, which of them are there, and which belong to the word `target`: (B, T) each."""
        rows = []
        for line in lines:
            inner = [(token, word == target) for word in line for token in self.tokens[word]]
            rows.append(torch.tensor([(self.begin, 0), *inner, (self.end, 0)]))
        tokens, found = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).unbind(2)
        return tokens.clamp_min(0), tokens >= 0, found == 1


def small_language(N: int = 3000) -> tuple[list, list]:
    """N sentences, and the lines of a file of questions.

    A word is stem and form, of 25 and 4, and one token: only its neighbours tell what it is made of. Its form
    decides the word before it and the one behind it, its stem the two after these, but for a quarter of them.
    """
    random = np.random.default_rng(0)
    sentences = []
    for stem, form in random.integers([25, 4], size=(N, 2)):
        anything = random.integers([4, 4, 25, 25])
        kinds = np.where(random.random(4) < 0.25, anything, [form, form, stem, stem])
        names = zip(("before", "behind", "topic", "topic"), kinds, random.integers(3, size=4), strict=True)
        first, *others = [f"{name}{kind}.{which}" for name, kind, which in names]
        sentences.append([first, f"{stem}+{form}", *others])
    lines = []
    for f, g in itertools.combinations(range(4), 2):
        lines.append([":", f"form {f} : form {g}"])
        pairs = itertools.permutations(range(25), 2)
        lines += [[f"{i}+{f}", f"{i}+{g}", f"{j}+{f}", f"{j}+{g}"] for i, j in pairs]
    return sentences, lines


def read_lines(path: Path) -> list[list[str]]:
    """The words of each line that has any. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    return [line.split() for line in lines if line.strip()]


def prepare_language(args: argparse.Namespace) -> Language:
    """What --text and --analogies hold, or the small language; settles args.device and args.precision.

    Leaves out questions with a word that the model does not know, and what a sentence has beyond 128 tokens.
    """
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    sentences, lines = (read_lines(args.text), read_lines(args.analogies)) if args.model else small_language()
    sentences = [line[:126] for line in sentences][: 2 * args.batch_size if args.dry_run else None]
    questions = []
    section = "all"
    for line in lines:
        if line[0].startswith(":"):
            section = " ".join(line).lstrip(": ")
        elif len(line) == 4:
            questions.append((section, line))
        else:
            raise UserError(f"--analogies {args.analogies}: {' '.join(line)!r}, expected four words")
    words = sorted({word for line in [*sentences, *(four for _, four in questions)] for word in line})
    if args.model:
        tokenizer = pretrained("AutoTokenizer", args.model, add_prefix_space=True)  # RoBERTa: a word's space
        special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        tokens = dict(zip(words, tokenizer(words, add_special_tokens=False)["input_ids"], strict=True))
        known = {word for word in words if tokens[word] and tokenizer.unk_token_id not in tokens[word]}
    else:
        torch.set_num_threads(1)  # so small that more of them only wait for each other
        special = range(len(words), len(words) + 3)
        tokens = {word: [i] for i, word in enumerate(words)}
        known = set(words)
    for line in sentences:
        while sum(len(tokens[word]) for word in line) > 126:
            line.pop()
    asked = [(section, four) for section, four in questions if len(known.intersection(four)) == 4]
    if not (sentences and asked) or None in special:
        raise UserError("--text, --analogies: no sentence, or no question of four words that the model knows")
    print(f"{len(sentences):,} sentences; {len(asked):,} of {len(questions):,} questions")
    print(f"{hardware(args.device)}, {args.precision}; into {args.folder}")
    data = Language(sentences, asked, tokens, *special)
    return data._replace(fingerprint=f"{zlib.crc32(repr(data).encode()):08x}")


# %% [markdown]
# # 5. Results

# %%


@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: Dataset, run: Run) -> Tensor:
    """Features h (N, d) of every image in order, without augmentation."""
    model.eval()
    found = []
    for _, x in Batches(images, data.mean, data.std, device=run.device).all(500):
        with run.autocast():
            z = model["trunk"](x)
        found.append(model["layer"](z.float()))
    return torch.cat(found).to(metric_device(run.device))


def accuracy(classifier: Classifier, h: Tensor, y: Tensor) -> float:
    """Share of features h (N, d) whose argmax_k w_k . h + b_k is that of y (N,)."""
    z = logits(h, classifier.class_vectors(), classifier.bias)
    return float((z.argmax(1) == y.to(z.device)).double().mean())


TAUS = (1e-4, 1e-3, 1e-2, 5e-2, 0.1)  # 1 - cosine: 0.8, 2.6, 8, 18, 26 degrees
KEPT = 10_000  # training images that are measured, so that features.npz stays small


def measure_classifier(args: argparse.Namespace, model: nn.ModuleDict, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training a classifier; writes features.npz."""
    classifier = model["classifier"]
    kept = keep_per_class(data.train_y, KEPT // len(data.classes))
    train_h = embed(model, data.train_x[kept], data, run)
    train_y = data.train_y[kept].to(train_h.device)
    test_h = embed(model, data.test_x, data, run)
    test_y = data.test_y.to(test_h.device)
    W = classifier.class_vectors()
    bias = {} if classifier.bias is None else {"b": classifier.bias}
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W, **bias)
    M = class_means(train_h, train_y, len(W))
    norm = test_h.double().norm(dim=1)
    result = {
        "task": args.task,
        "accuracy": accuracy(classifier, test_h, test_y),
        "train_accuracy": accuracy(classifier, train_h, train_y),
        "angle_accuracy": angle_accuracy(test_h, test_y, M),
        "norm_spread": float(norm.std(correction=0) / norm.mean().clamp_min(1e-12)),
        "within_cosine": float(F.cosine_similarity(test_h.double(), M[test_y], dim=1).mean()),
    }
    if args.task == "overlap":
        wrong = logits(test_h, W, classifier.bias).argmax(1) != test_y
        for name, cos in zip(("near", "hidden"), overlap(test_h, test_y), strict=True):
            near = [1 - cos < tau for tau in TAUS]
            counts = [int(some.sum()) for some in near]
            errors = [int((some & wrong).sum()) for some in near]
            result |= {f"{name}_counts": counts, f"{name}_errors": errors}
            result |= {name: counts[2] / len(test_y), f"{name}_wrong": errors[2] / max(1, counts[2])}
    return result


def measure_prototypes(args: argparse.Namespace, model: nn.ModuleDict, metric: str, data: Dataset, run: Run):
    """Accuracy with 1 and 5 shots, test and training classes; writes features.npz, which has no W."""
    result = {"task": args.task}
    features = {}
    for split, (x, y) in split_by_class(args, data).items():
        h = embed(model, x, data, run)
        queries = torch.arange(WAY, device=h.device).repeat_interleave(QUERIES)
        prefix = "train_" if split == "train" else ""
        for shots in (1, SHOTS):
            generator = torch.Generator().manual_seed(0)  # the same episodes in every run
            found = []
            for episodes in draw_episodes(y, args.test_episodes, WAY, shots + QUERIES, generator).split(50):
                z = prototype_logits(h[episodes.to(h.device)], shots, metric)  # (50, WAY * QUERIES, WAY)
                found.append((z.argmax(2) == queries).double().mean(1))
            found = torch.cat(found)  # (test_episodes,)
            result[f"{prefix}accuracy_{shots}shot"] = float(found.mean())
            result[f"{prefix}interval_{shots}shot"] = 1.96 * float(found.std()) / len(found) ** 0.5
        kept = keep_per_class(y, KEPT // len(y.unique()))
        features |= {f"{split}_h": h[kept.to(h.device)], f"{split}_y": y[kept]}
    run.save_features(**features)
    return result | {"accuracy": result["accuracy_5shot"], "train_accuracy": result["train_accuracy_5shot"]}


@torch.no_grad()
def word_vectors(encoder: nn.Module, words: list[str], data: Language, contexts: int, run: Run) -> tuple:
    """Vectors (n, d) of n words: last hidden states, and input embeddings.

    Means over a word's tokens in the first so many sentences that have it, or where it stands alone.
    """
    encoder.eval()
    states = []
    inputs = []
    for word in words:
        lines = itertools.islice((line for line in data.sentences if word in line), contexts)
        tokens, there, its = (x.to(run.device) for x in data.batch(list(lines) or [[word]], word))
        with run.autocast():
            h = encoder(tokens, there)[0]  # (B, T, d)
        states.append(h[its].double().mean(0))
        inputs.append(encoder.get_input_embeddings()(tokens[its]).double().mean(0))
    return torch.stack(states).cpu(), torch.stack(inputs).cpu()


def measure_analogies(args: argparse.Namespace, encoder: nn.Module, data: Language, run: Run) -> dict:
    """Shares of questions answered, with Wilson's 95% intervals (half of each), in all and by section."""
    words = sorted({word for _, four in data.questions for word in four})
    questions = torch.tensor([[words.index(word) for word in four] for _, four in data.questions])  # (Q, 4)
    sections = list(dict.fromkeys(section for section, _ in data.questions))
    section = torch.tensor([sections.index(name) for name, _ in data.questions])  # (Q,)
    # Wrong choices are answers to others of the section, or any words where these are too few
    answers = torch.zeros(len(sections), len(words))
    answers[section, questions[:, 3]] = 1
    lots = torch.rand(len(questions), len(words), generator=torch.Generator().manual_seed(0))
    wrong = (lots + answers[section]).scatter(1, questions, -1).topk(3).indices  # (Q, 3)
    states, inputs = word_vectors(encoder, words, data, args.contexts, run)
    offset, choice = answer_analogies(states, questions, wrong)
    right = {"offset": offset, "choice": choice, "inputs": answer_analogies(inputs, questions, wrong)[0]}

    def shares(some: Tensor) -> dict[str, float]:
        found = {}
        Q = int(some.sum())
        for key, is_right in right.items():
            p = float(is_right[some].double().mean())
            found |= {key: p, f"{key}_interval": 1.96 * math.sqrt(Q * p * (1 - p) + 0.96) / (Q + 3.84)}
        return found

    total = {"task": args.task, **shares(section >= 0), "chance": 1 / (len(words) - 3)}
    return total | {"sections": {name: shares(section == i) for i, name in enumerate(sections)}}


def group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by method, in the chapter's order."""
    names = TASKS[runs[0].finished["task"]].methods
    by_method = {name: [run for run in runs if run.name == name] for name in names}
    return {name: found for name, found in by_method.items() if found}


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """At most two figures of finished runs, methods side by side, means over seeds."""
    task = runs[0].finished["task"]
    by_method = group(runs)
    style = styles(TASKS[task].methods)
    if task in ("fewshot", "analogy"):
        draw_bars(folder / f"{task}.png", by_method, style)
        return

    def draw(name: str, x, measured: Callable, **axes) -> None:
        means = {method: np.mean([measured(run) for run in found], 0) for method, found in by_method.items()}
        curves(folder / name, {method: (x, mean) for method, mean in means.items()}, style, **axes)

    def tested(run: Run, key: str, factor: float = 1) -> list[float]:
        return [factor * line[key] for line in run.history if "accuracy" in line]

    axes = {"xlabel": "epoch", "ylabel": "test accuracy (%)"}
    draw("training.png", tested(runs[0], "epoch"), lambda run: tested(run, "accuracy", 100), **axes)
    if task == "overlap":
        axes = {"xlabel": "tau = 1 - cosine", "ylabel": "test samples near another class", "xscale": "log"}
        draw("overlap.png", TAUS, lambda run: run.finished["near_counts"], **axes)
    elif any(name.endswith("-3d") for name in by_method):
        draw_octant(folder / "octant.png", by_method)


def draw_bars(path: Path, by_method: dict[str, list[Run]], style: dict[str, dict]) -> None:
    """Accuracy by shots, or 3CosAdd by section: means over seeds, with the first seed's 95% intervals."""
    from matplotlib.figure import Figure

    def shares(run: Run) -> dict[str, tuple[float, float]]:  # of each bar, with its interval
        found = run.finished
        if found["task"] == "fewshot":
            return {f"{k}-shot": (found[f"accuracy_{k}shot"], found[f"interval_{k}shot"]) for k in (1, SHOTS)}
        return {name: (some["offset"], some["offset_interval"]) for name, some in found["sections"].items()}

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    plot = figure.subplots()
    height = 0.8 / len(by_method)
    xlabel = {"fewshot": "test accuracy (%)", "analogy": "questions answered right by 3CosAdd (%)"}
    for i, (name, found) in enumerate(by_method.items()):
        values = 100 * np.array([list(shares(run).values()) for run in found])  # (seeds, bars, 2)
        y = np.arange(values.shape[1]) + i * height
        plot.barh(
            y, values[:, :, 0].mean(0), height, xerr=values[0, :, 1], label=name, color=style[name]["color"]
        )
    plot.set_yticks(y + (0.5 - len(by_method) / 2) * height, shares(found[0]))
    plot.invert_yaxis()
    plot.set(xlabel=xlabel[found[0].finished["task"]], xlim=(0, 100))
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(path, figure)


def draw_octant(path: Path, by_method: dict[str, list[Run]]) -> None:
    """Test features of three dimensions, first seed, each its class's number; how two angles make them."""
    from matplotlib.figure import Figure

    panels = []  # title, points (N, 2 or 3), symbol of their coordinates
    for name in [name for name in by_method if name.endswith("-3d")]:
        values = by_method[name][0].load_features()
        h = torch.from_numpy(values["test_h"])
        if name == "sphere-3d":
            phi = angles(h.double())
            share = (phi - lower_bound(2)) / (math.pi / 2 - lower_bound(2))
            panels.append((f"{name}: s z", share.clamp(1e-5, 1 - 1e-5).logit(), "s z"))
            panels.append((f"{name}: angles (°)", phi.rad2deg(), r"\varphi"))
        panels.append((f"{name}: features", h, "x"))
    figure = Figure(figsize=(3.6 * len(panels), 3.6), layout="constrained")
    for i, (title, points, symbol) in enumerate(panels):
        solid = points.shape[1] == 3
        plot = figure.add_subplot(1, len(panels), i + 1, projection="3d" if solid else None)
        for k in np.unique(values["test_y"]):
            some = points[values["test_y"] == k][:30].numpy()
            plot.plot(*some.T, ls="", marker=f"${k}$", color=f"C{k % 10}", markersize=6, mew=0.3)
        plot.set(title=title, xlabel=f"${symbol}_1$", ylabel=f"${symbol}_2$")
        if solid:
            plot.set_zlabel(f"${symbol}_3$")
            plot.view_init(elev=30, azim=45)
            plot.set_box_aspect(None, zoom=0.85)  # room for the labels
    save_figure(path, figure)


COLUMNS = {  # share or number: title, what it is
    "accuracy": ("accuracy", "% of the test images after the last epoch, or of queries with 5 shots"),
    "train_accuracy": ("train", "the same of the training images (10,000 at most), or classes"),
    "best_accuracy": ("best", "highest accuracy of the tested epochs, chosen on the test set"),
    "angle_accuracy": ("by angle", "% right by the nearest class mean, by cosine"),
    "norm_spread": ("norm spread", "std / mean of the test features' lengths, %; 0 on a sphere"),
    "within_cosine": ("within cos", "100 times the mean cosine of a test feature and the mean of its class"),
    "near": ("near", "% of the test samples with 1 - cosine < 0.01 to one of another class"),
    "near_wrong": ("near wrong", "% misclassified among these"),
    "hidden": ("hidden", "% near in angle to one whose norm is 10% apart: only the norm tells"),
    "hidden_wrong": ("hidden wrong", "% misclassified among these"),
    "interval_5shot": ("± 95%", "interval of the accuracy over episodes of classes not trained on"),
    "accuracy_1shot": ("1-shot", "% with one labelled image per class"),
    "interval_1shot": ("± 1-shot", "its interval"),
    "offset": ("3CosAdd", "% of the questions whose d is the word nearest to b - a + c"),
    "offset_interval": ("± 95%", "its interval, as if questions were independent"),
    "inputs": ("inputs", "3CosAdd of the same model's input embeddings"),
    "chance": ("chance", "3CosAdd by chance: % for one of the questions' words but a, b and c"),
    "choice": ("choice", "% whose d - c is nearer to b - a than with three wrong d; by chance 25%"),
    "choice_interval": ("± choice", "its interval"),
}
CAPTIONS = {
    "training.png": "accuracy of the test images over epochs",
    "octant.png": "features of three dimensions; how s z becomes two angles, and these a point",
    "overlap.png": "test samples that lie within tau of another class when only angles count",
    "fewshot.png": "test accuracy with 1 and 5 shots, of classes that were not trained on",
    "analogy.png": "3CosAdd by section with 95% intervals; choice by section is in result.json",
}


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per method, mean ± std over seeds, and what its columns and figures mean."""
    methods = TASKS[runs[0].finished["task"]].methods
    columns = {key: column for key, column in COLUMNS.items() if key in runs[0].finished}
    rows = []
    for name, found in group(runs).items():
        cells = [mean_std([run.finished[key] for run in found], 2, 100) for key in columns]
        rows.append([name, len(found), *cells])
    print("\n" + table(["method", "seeds", *(title for title, _ in columns.values())], rows))
    for title, about in columns.values():
        print(f"{title}: {about}")
    for name, found in group(runs).items():
        print(f"{name}: {methods[name].about}")
        if np.mean([run.finished.get("train_accuracy", 1) for run in found]) < 0.99:
            print("   not trained to convergence: fits less than 99% of the training images")
    print(f"figures in {folder}:")
    for name, caption in CAPTIONS.items():
        if (folder / name).exists():
            print(f"  {name:<16}{caption}")


# %% [markdown]
# # 6. Command line

# %%


class Task(NamedTuple):
    methods: dict[str, Method]
    nets: tuple[str, ...]
    build: Callable  # (args, name, data) -> model
    train: Callable  # (args, name, seed, data, run) -> what was measured


TASKS = {
    "retain": Task(CLASSIFIERS, tuple(TRUNKS), build_classifier, train_classifier),
    "overlap": Task(OPERATORS, tuple(TRUNKS), build_classifier, train_classifier),
    "fewshot": Task(PROTOTYPES, ("conv4",), build_embedding, train_prototypes),
    "analogy": Task(ENCODERS, ("encoder",), build_encoder, train_encoder),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    # Methods and other defaults depend on these. A wrong value of them is named by the second reading
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--task", "--net", "--model"):
        first.add_argument(flag, nargs="?")
    given, _ = first.parse_known_args(argv)
    name = given.task if given.task in TASKS else "retain"
    task = TASKS[name]
    net = given.net if given.net in task.nets else task.nets[0]
    names = ("epochs", "batch_size", "lr", "weight_decay")
    what = "--model" if net == "encoder" and given.model else net
    recipes = {data: dict(zip(names, row, strict=True)) for (of, data), row in RECIPES.items() if of == what}
    about = {method: row.about for method, row in task.methods.items()}
    title = f"{__doc__.splitlines()[0]}\nDefaults and methods of --task {name} --net {net}:"
    flags = Arguments("spherization", title, about, list(about), recipes, eval_every=5)
    add = flags.add
    add("--task", choices=list(TASKS), default=name, help="what is compared; each has its own --help")
    add("--net", choices=task.nets, default=net, help="network")
    add("--radius", type=positive, default=5.0, help="r")
    add("--scale", type=positive, default=5.0, help="s at the start; 1 for features of three dimensions")
    add("--episodes", type=at_least(1), default=100, help="fewshot: of an epoch")
    add("--test-episodes", type=at_least(2), default=2000, help="fewshot: of the test")
    add("--model", help="analogy: name at Hugging Face, or folder, of an encoder (default: a small one)")
    add("--text", type=a_path, help="analogy: sentences, one per line (default: a small language)")
    add("--analogies", type=a_path, help="analogy: questions, in the format of questions-words.txt")
    add("--contexts", type=at_least(0), default=4, help="analogy: sentences for a word's vector; 0: it alone")
    args = flags.parse(argv)
    files = [args.model, args.text, args.analogies]
    if any(files) and not (all(files) and args.task == "analogy"):
        raise UserError("--model, --text and --analogies: all three go together, with --task analogy")
    if args.task == "analogy":
        if args.dataset != "digits":
            raise UserError(f"--dataset {args.dataset}: --task analogy has --text instead")
        args.net = Path(args.model).name if args.model else net
        args.folder = args.folder.with_name(args.text.stem if args.text else "language")
    args.folder = args.folder.parent / args.task / f"{args.folder.name}-{args.net}"
    episode = WAY * (SHOTS + QUERIES)
    if args.task == "fewshot" and args.batch_size != episode:
        raise UserError(f"--batch-size {args.batch_size}: an episode of --task fewshot has {episode} images")
    if args.dry_run:
        args.episodes = 2
        args.test_episodes = 20
    return args


def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "spherization" / "synthetic")
    task = TASKS[args.task]
    if args.task == "analogy":
        data = prepare_language(args)
    else:
        data = prepare_data(args, per_class=SHOTS + QUERIES if args.task == "fewshot" else 0)
    if args.task == "fewshot":
        split_by_class(args, data)  # says what is wrong with the data before the first run
    elif args.task != "analogy" and split_name(args.dataset)[0] != "digits":  # as released: pixels 0 to 1
        data = data._replace(mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std))
    for name in args.method:  # and with a model
        model = task.build(args, name, data)
        print(f"{name}: {args.net}, {sum(p.numel() for p in model.parameters()):,} parameters")
    runs = []
    for name in args.method:
        for seed in args.seed:
            run = open_run(args, name, seed, data)
            if not run.finished:
                run.finish(task.train(args, name, seed, data, run))
            runs.append(run)
    draw_figures(args.folder, finished_runs(args, runs))
    print_results(runs, args.folder)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    command_line(main)
