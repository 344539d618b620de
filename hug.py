# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Neural collapse beyond K <= d + 1, and the hyperspherical uniformity gap (HUG) that aims at it directly.

Source: Liu, Yu, Weller, Schoelkopf, Generalizing and Decoupling Neural Collapse via Hyperspherical Uniformity
Gap (ICLR 2023, arXiv 2303.06484), of which we have the abstract, the coefficients and a few settings; and the
second author's official code (yulonghui/Uniformity-Gap), which has MHE alone.

WHAT COLLAPSES. At the end of training with cross-entropy all features of a class fall onto their mean, and
the K means, centred, onto a simplex ETF: equal angles, cosine -1/(K-1). But K points at equal angles need
d >= K - 1 dimensions. With 1000 classes and 512 features, or ten digits drawn on a circle, there is no
simplex to collapse to. Generalized neural collapse (GNC) says what takes its place: features still fall
onto their class mean, and the means spread over the sphere as uniformly as K points can. Cross-entropy gets
there by one force that both pulls a feature to its own class vector and pushes it from the others; under a
long tail the two are out of balance and the rare classes' vectors fall onto each other.

THE REMEDY states the two aims separately: HUG = uniformity between classes - uniformity within classes. With
unit features x_i, one unit proxy w_k per class (the classifier: the nearest proxy wins), the classes C_B of a
batch and their samples B_c:

    L = alpha U(w_1..w_K) + beta (1/|C_B|) sum_{c in C_B} (1/|B_c|) sum_{i in B_c} ||x_i - stopgrad(w_c)||
    MHE  U = mean_{k<l} ||w_k - w_l||^-2                          official: minimum hyperspherical energy
    MHS  U = - min_{k<l} ||w_k - w_l||                            reconstructed: maximum separation
    MGD  U = - 1/K log det G, G_kl = exp(-||w_k - w_l||^2)        reconstructed: maximum Gram determinant

The second term has the minimum 0 at x_i = w_{y_i} wherever the proxies are, so the aims never trade off:
neither alpha / beta nor the class counts move the optimum. Cost: O(K^2) for the proxies, O(B) for the batch.
What follows from the official form:
- Proxies feel the first term alone (stopgrad): "learnable" proxies are uniformity optimised on the way, while
  the features chase them. `hug-fixed` optimises them beforehand.
- Means class by class weigh samples by inverse frequency within a batch, as ETF + DR's class lengths do. On a
  long tail cross-entropy must be given the same before the two are compared: --reweight on.
- The pair term turns a raw proxy and goes with r^-3 / length. Two that start close throw each other to such
  lengths that they hardly turn any more: on a circle proxies jam. In 16 dimensions random starts are far
  enough apart; --reduction sum, which cuts the gradient and keeps lengths at 1, spreads them on a circle too.

Where the best proxies are known (r: distance of two points):         mean r^-2
    K <= d + 1   simplex          every r = sqrt(2K/(K-1))             (K-1) / 2K
    K = 2d       cross-polytope   r = 2 once, sqrt 2 else              (4d-3) / (4 (2d-1))
    d = 2        regular polygon  r = 2 sin(pi j / K), j = 1..K-1      (K+1) / 12
    K -> inf     uniform law                                           (d-2) / (2 (d-3)), d > 3

    python hug.py                                 digits in 16 dimensions, where a simplex exists; a minute
    python hug.py --dim 2 --epochs 100            digits on a circle, where none does and proxies jam
    python hug.py --synthetic                     the theory above, claim by claim
    python hug.py --dataset cifar100 --net cnn --dim 64 --epochs 30

WHAT THE SOURCES LEAVE OPEN, and what we chose
- alpha = beta = 1 (official default). The paper's .15/.015 (MHE, MHS) and .15/.03 (MGD) go with sums or with
  means: not stated. --reduction sum is the former reading, sums over ordered pairs and over the batch with
  those weights, proxies put back onto the sphere after every step, a proxy's gradient cut to length 1 (r^-2
  has no bound), the farthest feature per class for MHS, and proxies that feel both terms.
- MHS and MGD: the same structure as the official MHE. MGD's kernel is as wide as in the first author's code,
  where it regularises neurons.
- Schedule, augmentation, attacks: the usual ones, alike for all methods. Proxies have the weight decay of all
  other parameters, as in the official code; its demo has Nesterov's momentum, which we leave out.
- hug-fixed is ours: fixed proxies with the dot-regression of Yang et al. 2022. Where a simplex exists it is
  their ETF + DR; it goes on where none does.
"""

# %% [markdown]
# # 1. The method
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor

# x_i and w_k are features h (B, d) and proxies W (K, d) at unit length.


def squared_distances(W: Tensor) -> Tensor:
    """Squared distances of all pairs k < l of unit rows, (K, d) -> (K (K-1) / 2,), never 0.

    By subtraction: 2 - 2 cos is 0 or below in float32 for angles up to 5e-4, without a gradient, and two
    proxies that once came so close would never part. A rounding error is added, so that r^-2, log r and
    their gradients stay finite where two rows are equal.
    """
    return F.pdist(W).square() + torch.finfo(W.dtype).eps


def pair_energy(W: Tensor) -> Tensor:
    """MHE: mean_{k<l} ||w_k - w_l||^-2 of unit rows. Least where they are most uniform."""
    return squared_distances(W).pow(-1).mean()


def separation(W: Tensor) -> Tensor:
    """MHS: min_{k<l} ||w_k - w_l||; tied pairs share the gradient."""
    return squared_distances(W).amin().sqrt()


def gram_logdet(W: Tensor, jitter: float = 1e-6) -> Tensor:
    """MGD: log det (G + jitter I), G_kl = exp(-||w_k - w_l||^2): largest where the rows are most uniform.

    In float64: 100 points on a circle give eigenvalues down to 1e-64, and only the jitter keeps them apart
    from 0. (jitter as in the first author's code.)
    """
    W = W.cpu().double() if W.device.type == "mps" else W.double()  # Apple's MPS has no float64
    G = (-(2 - 2 * W @ W.T).clamp_min(0)).exp()  # (K, K)
    return (G + jitter * torch.eye(len(W), dtype=G.dtype, device=G.device)).logdet()


def distance_to_proxy(x: Tensor, w: Tensor) -> Tensor:
    """||x_i - w_i||, rows (B, d) -> (B,); the gradient at x_i = w_i is 0, not nan."""
    return ((x - w).square().sum(1) + torch.finfo(x.dtype).eps ** 2).sqrt()


def class_mean(losses: Tensor, y: Tensor, K: int) -> Tensor:
    """(1/|C_B|) sum_{c in C_B} (1/|B_c|) sum_{i in B_c} l_i: mean class by class; losses (B,), y (B,)."""
    # (K,): |B_c|, 0 for a class that the batch lacks; unlike bincount it lets no step wait for the device
    n = losses.new_zeros(K).scatter_add(0, y, torch.ones_like(losses))
    return (losses / n[y]).sum() / (n > 0).sum()


UNIFORMITIES = ("mhe", "mhs", "mgd")


def hug_loss(
    h: Tensor, W: Tensor, y: Tensor, uniformity: str = "mhe", alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """The hyperspherical uniformity gap, negated. h (B, d), W (K, d), of any length, y (B,) -> scalar.

    uniformity `mhe` is the official loss; `mhs` and `mgd` are reconstructed after it. Raises ValueError for
    another one.
    """
    if uniformity not in UNIFORMITIES:
        raise ValueError(f"uniformity {uniformity}: expected one of {UNIFORMITIES}")
    x = F.normalize(h.to(W.dtype), dim=1)
    w = F.normalize(W, dim=1)
    # U(w_1..w_K)
    if uniformity == "mhe":
        between = pair_energy(w)
    elif uniformity == "mhs":
        between = -separation(w)
    else:
        between = -gram_logdet(w).to(W.device, W.dtype) / len(W)
    # ||x_i - stopgrad(w_{y_i})||, averaged class by class
    within = class_mean(distance_to_proxy(x, w.detach()[y]), y, len(W))
    return alpha * between + beta * within


def hug_sum_loss(h: Tensor, W: Tensor, y: Tensor, uniformity: str, alpha: float, beta: float) -> Tensor:
    """--reduction sum: sums over ordered pairs and over the batch, nothing detached. h, W of unit length."""
    if uniformity not in UNIFORMITIES:
        raise ValueError(f"uniformity {uniformity}: expected one of {UNIFORMITIES}")
    if uniformity == "mhe":
        between = 2 * squared_distances(W).pow(-1).sum()
    elif uniformity == "mhs":
        between = -separation(W)
    else:
        between = -gram_logdet(W).to(W.device, W.dtype)
    r = distance_to_proxy(h, W[y])  # (B,)
    if uniformity == "mhs":  # the farthest feature of each class
        r = r.new_zeros(len(W)).scatter_reduce(0, y, r, "amax")
    return alpha * between + beta * r.sum()


def dot_regression_loss(h: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """Pull each feature to its own fixed proxy (Yang et al. 2022). Unit h (B, d), W (K, d) -> scalar >= 0."""
    # L = 1/2 mean (w_y . h - 1)^2 = 1/8 mean ||h - w_y||^4: its pull fades near w_y, unlike that of HUG
    return 0.5 * ((h * W[y]).sum(1) - 1).square().mean()


# %% Imports of the other cells
import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm

from common import (
    COLOURS,
    Arguments,
    Batches,
    Claims,
    Dataset,
    Run,
    UserError,
    accuracy_per_class,
    at_least,
    collapse_metrics,
    command_line,
    curves,
    finished_runs,
    keep_per_class,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    minimise,
    open_run,
    positive,
    prepare_data,
    save_figure,
    shot_groups,
    smallest_angle,
    split_name,
    styles,
    table,
)

# %% [markdown]
# # 2. Theory check
# Point sets on the sphere, and the layer-peeled model: features and class vectors are free.

# %%


def optimise_proxies(K: int, d: int, generator: torch.Generator) -> Tensor:
    """K proxies of least MHE energy, from a random start: (K, d) float64, unit rows.

    Every start ends in the simplex (K <= d + 1) or the polygon (d = 2); elsewhere in one of many arrangements
    whose energies hardly differ.
    """
    steps = 500 if K <= 300 else 20  # a thousand proxies in half a minute, their energy right to 3e-4
    start = torch.randn(K, d, generator=generator, dtype=torch.float64)
    # None: shown where there is a terminal
    with tqdm(desc=f"{K} proxies in {d} dimensions", leave=False, disable=None if K > 200 else True) as bar:

        def energy(W: Tensor) -> Tensor:
            bar.update()
            return (K - 1) * pair_energy(F.normalize(W))

        (W,) = minimise(energy, start, steps=steps)
    return F.normalize(W)


def known_distances(K: int, d: int) -> np.ndarray | None:
    """From one point of the most uniform arrangement to the K - 1 others, where one is known; else None.

    The three are optimal for every energy f(r^2) here, convex and decreasing (simplex, polygon) or completely
    monotone (cross-polytope: Cohn & Kumar 2007).
    """
    if K <= d + 1:
        return np.full(K - 1, math.sqrt(2 * K / (K - 1)))
    if d == 2:
        return 2 * np.sin(np.pi * np.arange(1, K) / K)
    if K == 2 * d:
        return np.array([2.0] + [math.sqrt(2)] * (K - 2))
    return None


@functools.cache
def least_energy(K: int, d: int) -> float:
    """The least MHE energy that we know: in closed form, or what optimise_proxies finds."""
    r = known_distances(K, d)
    if r is None:
        return pair_energy(optimise_proxies(K, d, torch.Generator().manual_seed(0))).item()
    return float((r**-2.0).mean())


def uniform_energy(d: int) -> float:
    """Mean of r^-2 over the uniform law on the sphere of R^d, d > 3: the least energy as K -> inf."""
    return (d - 2) / (2 * (d - 3))


def layer_peeled_hug(n: list[int], d: int, alpha: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Proxies W (K, d), features X (N, d), labels (N,) that minimise HUG (MHE) with n_k free features each.

    The kink of ||x - w|| at 0 is softened, since L-BFGS wants a smooth loss; the minimum stays where it is.
    """
    generator = torch.Generator().manual_seed(0)
    K = len(n)
    y = torch.arange(K).repeat_interleave(torch.tensor(n))
    W, H = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (K, len(y)))
    W = F.normalize(W)
    H = F.normalize(H)  # lengths of 1 condition what follows

    def loss(W, H):
        w = F.normalize(W)
        r = ((F.normalize(H) - w[y]).square().sum(1) + 0.3**2).sqrt()
        return alpha * pair_energy(w) + beta * class_mean(r, y, K)

    W, H = minimise(loss, W, H, steps=300)
    return F.normalize(W), F.normalize(H), y


def layer_peeled_ce(n: list[int], d: int, E_W: float, E_H: float) -> Tensor:
    """Class vectors (K, d) of cross-entropy without bias, (1/K) sum ||w_k||^2 = E_W and mean ||h_k||^2 = E_H.

    One feature h_k per class suffices: the loss is convex in h, so equal labels get equal features.
    """
    K = len(n)
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor(n, dtype=torch.float64) / sum(n)
    V, G = (torch.randn(K, d, generator=generator, dtype=torch.float64) for _ in range(2))

    def budget(V, E):
        return V * (K * E) ** 0.5 / V.norm()

    def loss(V, G):  # sum_k n_k/N CE(W h_k, k)
        z = budget(G, E_H) @ budget(V, E_W).T  # (K, K)
        return (share * F.cross_entropy(z, torch.arange(K), reduction="none")).sum()

    V, _ = minimise(loss, V, G, steps=1000)
    return budget(V, E_W)


def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against direct optimisation; draw synthetic.png."""
    claims = Claims()
    generator = torch.Generator().manual_seed(0)

    # Where K points are most uniform, they are these
    for K, d, shape in ((10, 9, "a simplex"), (10, 5, "a cross-polytope"), (10, 2, "a polygon")):
        found = pair_energy(optimise_proxies(K, d, generator)).item()
        claim = f"MHE, {K} proxies in {d} dimensions are {shape}: energy"
        claims.equal(claim, least_energy(K, d), found, 1e-6)
    # Many points: the gap to the uniform law falls like K^(2/(d-1) - 1)
    small, large = (pair_energy(optimise_proxies(K, 4, generator)).item() for K in (64, 256))
    rate = 4 ** (2 / 3 - 1)
    limit = (large - rate * small) / (1 - rate)
    claims.equal("Many proxies in 4 dimensions: energy of the uniform law", uniform_energy(4), limit, 0.025)

    # HUG in the layer-peeled model, 100 images to 1: the class counts do not matter
    for alpha in (1.0, 10.0):
        W, X, y = layer_peeled_hug([100] * 5 + [1] * 5, 5, alpha, 1.0)
        claim = f"HUG, 100 images to 1, alpha / beta = {alpha:g}: energy is the least"
        claims.equal(claim, least_energy(10, 5), pair_energy(W).item(), 1e-6)
        farthest = (X - W[y]).norm(dim=1).max().item()
        claims.equal("   and every feature is on its proxy: largest distance", 0, farthest, 1e-5)

    # Cross-entropy couples the two aims: its minority collapses
    few = torch.arange(5, 10)
    ratios = [1, 2, 3, 4, 5, 6, 8, 10, 20, 50, 100]
    cosines = [mean_pairwise_cosine(layer_peeled_ce([r] * 5 + [1] * 5, 9, 1, 5), few) for r in ratios]
    claims.equal("Cross-entropy, 100 to 1: all rare classes share one vector, cosine", 1, cosines[-1], 1e-6)

    sparse = [1, 3, 10, 100]  # HUG's line is flat
    proxies = [layer_peeled_hug([r] * 5 + [1] * 5, 9, 1.0, 1.0)[0] for r in sparse]
    points = {
        "cross-entropy": (ratios, cosines),
        "HUG (MHE)": (sparse, [mean_pairwise_cosine(W, few) for W in proxies]),
    }
    axes = {"xlabel": "images of a frequent class / of a rare class", "xscale": "log"}
    axes["ylabel"] = "mean cosine of the rare classes' vectors"
    curves(folder / "synthetic.png", points, styles(points), **axes)
    return claims.report(folder / "synthetic.png")


# %% [markdown]
# # 3. Network

# %%


# [copied: resnet18]
def resnet18(channels: int) -> nn.Module:
    """torchvision's ResNet-18 with the CIFAR stem: (B, channels, H, W) -> (B, 512); 11.2 M parameters.

    The ImageNet stem (7x7, stride 2, max-pool) would leave a 32x32 image as 1x1 before the last stage.
    """
    from torchvision import models  # here, since importing it takes seconds

    network = models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = network.fc = nn.Identity()
    network.d = 512
    return network


# [end copied]


# [copied: smallcnn]
class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, ReLU and max-pool: (B, C, H, W) -> h (B, 128 * width), h >= 0.

    Ours, for a laptop: 0.09 M parameters at width 1, seven times the images per second of ResNet-32.
    """

    def __init__(self, channels: int = 3, width: int = 1):
        super().__init__()
        self.d = 128 * width
        layers = []
        for c in (32 * width, 64 * width, 128 * width):
            conv = nn.Conv2d(channels, c, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels = c
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # global average pool


# [end copied]


NETWORKS = {"resnet18": resnet18, "cnn": SmallCNN}


class Head(nn.Module):
    """From the network's output to features h (B, d), class vectors W (K, d) and logits z (B, K), in float32.

    A linear layer to d dimensions and BatchNorm, the same for every method: what leaves a ReLU fills one
    orthant only, and points all over a sphere need them all. Then, by kind:
        linear   z = h W^T                                        cross-entropy
        cosine   h and W at unit length, z = 16 cos               normalised softmax, scale ours
        proxy    the same with scale 1: -||x - w||^2 = 2 cos - 2, so the largest cosine is the nearest proxy
    """

    def __init__(self, d_in: int, d: int, K: int, kind: str):
        super().__init__()
        self.kind = kind
        self.scale = 16.0 if kind == "cosine" else 1.0
        self.fc = nn.Linear(d_in, d, bias=False)
        self.bn = nn.BatchNorm1d(d)
        self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # nn.Linear's, HUG's start

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.bn(self.fc(f.float()))
        W = self.W
        if self.kind != "linear":
            h = F.normalize(h, dim=1)
            W = F.normalize(W, dim=1)
        return h, W, self.scale * h @ W.T


# %% [markdown]
# # 4. Training

# %%


class Method(NamedTuple):
    head: str  # linear, cosine or proxy: Head
    loss: str  # a key of LOSSES
    about: str


METHODS = {
    "ce": Method("linear", "ce", "cross-entropy"),
    "ce+norm": Method("cosine", "ce", "cross-entropy of scaled cosines"),
    "hug-mhe": Method("proxy", "mhe", "HUG by least hyperspherical energy (official)"),
    "hug-mhs": Method("proxy", "mhs", "HUG by largest separation (reconstructed)"),
    "hug-mgd": Method("proxy", "mgd", "HUG by largest Gram determinant (reconstructed)"),
    "hug-fixed": Method("proxy", "dr", "proxies optimised beforehand, dot-regression (ours)"),
}


def weighted_ce(z: Tensor, y: Tensor, args: argparse.Namespace) -> Tensor:
    """Cross-entropy; --reweight on: its mean class by class, the weights that HUG's second term has."""
    if args.reweight == "off":
        return F.cross_entropy(z, y)
    return class_mean(F.cross_entropy(z, y, reduction="none"), y, z.shape[1])


def gap(h: Tensor, W: Tensor, y: Tensor, uniformity: str, args: argparse.Namespace) -> Tensor:
    """The HUG loss. alpha and beta are 1 and 1 (official), with sums the paper's."""
    if args.reduction == "official":
        return hug_loss(h, W, y, uniformity, args.inter or 1.0, args.intra or 1.0)
    beta = 0.03 if uniformity == "mgd" else 0.015
    return hug_sum_loss(h, W, y, uniformity, args.inter or 0.15, args.intra or beta)


# features h (B, d) and class vectors W (K, d) as the head gives them, logits z (B, K), labels y (B,)
LOSSES = {
    "ce": lambda h, W, z, y, args: weighted_ce(z, y, args),
    "mhe": lambda h, W, z, y, args: gap(h, W, y, "mhe", args),
    "mhs": lambda h, W, z, y, args: gap(h, W, y, "mhs", args),
    "mgd": lambda h, W, z, y, args: gap(h, W, y, "mgd", args),
    "dr": lambda h, W, z, y, args: dot_regression_loss(h, W, y),
}
# The source's schedules are not known: epochs, batch size, network, feature dimension (0: the network's).
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "net": "resnet18", "dim": 0, "lr": 0.1, "weight_decay": 5e-4},
    # d = 16: official proxies jam on a circle, the second thing to look at. 40 epochs: a minute
    "digits": {"epochs": 40, "batch_size": 64, "net": "cnn", "dim": 16},
    "mnist": {"epochs": 20, "net": "cnn"},
    "fashionmnist": {"epochs": 30, "net": "cnn"},
}


def build_model(args: argparse.Namespace, method: Method, data: Dataset) -> nn.ModuleDict:
    """Network and head."""
    network = NETWORKS[args.net](data.train_x.shape[3])
    head = Head(network.d, args.dim or network.d, len(data.classes), method.head)
    return nn.ModuleDict({"network": network, "head": head})


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr after one epoch of warm-up in forty, then half a cosine down to 0."""
    warmup = max(1, round(args.epochs / 40))
    if epoch < warmup:
        return args.lr * (epoch + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup))) / 2


def start_proxies(head: Head, method: Method, args: argparse.Namespace, seed: int) -> None:
    """hug-fixed: optimised proxies that stay. --reduction sum: random unit proxies."""
    if method.loss == "dr":
        generator = torch.Generator().manual_seed(seed)
        head.W.data.copy_(optimise_proxies(*head.W.shape, generator))
        head.W.requires_grad_(False)
    elif method.head == "proxy" and args.reduction == "sum":
        head.W.data.copy_(F.normalize(torch.randn(head.W.shape), dim=1))


def train(args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[name]
    N = len(data.train_y)
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # order, crops and flips
    model = build_model(args, method, data)
    start_proxies(model["head"], method, args, seed)
    model = model.to(run.device, memory_format=torch.channels_last)
    network, head = run.prepare(model)  # speed only: --compile
    on_sphere = method.head == "proxy" and method.loss != "dr" and args.reduction == "sum"
    groups = [{"params": [p for p in model.parameters() if p is not head.W]}, {"params": [head.W]}]
    if on_sphere:
        groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.SGD(
        groups, args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    loss_of = LOSSES[method.loss]
    images = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        drawn = torch.randperm(N, generator=generator)
        labels = data.train_y[drawn].to(run.device)
        model.train()
        for part, x in images.epoch(drawn, args.batch_size, generator):  # (B, C, H, W)
            with run.autocast():  # bf16 inside the network only
                f = network(x)
            h, W, z = head(f)  # (B, d), (K, d), (B, K)
            loss = loss_of(h, W, z, labels[part], args)
            optimizer.zero_grad()
            loss.backward()
            if on_sphere:  # r^-2 has no bound: cut each proxy's gradient to length 1
                head.W.grad.mul_((1 / head.W.grad.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1))
            optimizer.step()
            if on_sphere:
                head.W.data.copy_(F.normalize(head.W.data, dim=1))
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(lr=lr, **geometry(head.W.detach()))
        if run.is_test_epoch(epoch):  # every --eval-every epochs, and after the last one
            run.log(**test(model, data, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results

# %%


def geometry(W: Tensor) -> dict[str, float]:
    """How uniform the rows of W (K, d) point: MHE energy over the least known, smallest angle (degrees)."""
    W = F.normalize(W.to(metric_device(W.device)).double())
    energy = pair_energy(W).item() / least_energy(*W.shape)
    return {"energy": energy, "smallest_angle": smallest_angle(W)}


def within_classes(h: Tensor, y: Tensor, K: int) -> float:
    """Mean ||x_i - m_y||, m the mean direction of a class: 0 at full collapse (GNC1). h (N, d), y (N,)."""
    x = F.normalize(h.double())
    sums = torch.zeros(K, h.shape[1], dtype=x.dtype, device=x.device).index_add_(0, y, x)
    return float((x - F.normalize(sums)[y]).norm(dim=1).mean())


@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: Dataset, run: Run) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image, in order."""
    model.eval()
    hs = []
    zs = []
    loader = Batches(images, data.mean, data.std, device=run.device)
    for _, x in loader.all():
        with run.autocast():
            f = model["network"](x)
        h, _, z = model["head"](f)
        hs.append(h)
        zs.append(z)
    where = metric_device(run.device)
    return torch.cat(hs).to(where), torch.cat(zs).to(where)


def test(model: nn.ModuleDict, data: Dataset, run: Run) -> dict[str, float]:
    """Test accuracy, and how far test features are from their class's mean direction."""
    h, z = embed(model, data.test_x, data, run)
    y = data.test_y.to(z.device)
    return {
        "accuracy": float((z.argmax(1) == y).double().mean()),
        "test_within": within_classes(h, y, len(data.classes)),
    }


RADIUS = 8.0  # of the attacks, linf in 255ths of the pixel range: the usual one
PGD_STEPS = 10
ATTACKED = 500  # test images, the same ones for every method


def attack(model, x: Tensor, y: Tensor, radius, steps: int, low, high, generator) -> Tensor:
    """FGSM (steps = 1) or PGD in the linf ball of `radius` around x (B, C, H, W), both per channel (C, 1, 1).

    FGSM (Goodfellow et al. 2015): x + radius sign g. PGD (Madry et al. 2018): a random start, then steps of
    2.5 radius / steps, each cut back to the ball and to pixels in [low, high]. g is the gradient of the
    margin max_{j != y} z_j - z_y and not of a loss: its sign does not depend on the logits' scale. Under its
    own loss a confident cross-entropy, whose softmax saturates in float32, would look robust.
    """
    start = torch.zeros_like(x)
    if steps > 1:
        start = radius * (2 * torch.rand(x.shape, generator=generator).to(x.device) - 1)
    adversary = (x + start).clamp(low, high)
    size = radius if steps == 1 else 2.5 * radius / steps
    for _ in range(steps):
        adversary = adversary.detach().requires_grad_()
        z = model["head"](model["network"](adversary))[2]
        own = z.gather(1, y[:, None]).squeeze(1)
        margin = z.scatter(1, y[:, None], float("-inf")).amax(1) - own  # (B,)
        (g,) = torch.autograd.grad(margin.sum(), adversary)
        adversary = adversary.detach() + size * g.sign()
        adversary = adversary.clamp(x - radius, x + radius).clamp(low, high)
    return adversary.detach()


def robustness(model: nn.ModuleDict, data: Dataset, run: Run) -> dict:
    """Test accuracy under FGSM and PGD at RADIUS; pgd_curve: at no attack, a quarter, half and all of it."""
    loader = Batches(data.test_x, data.mean, data.std, device=run.device)
    mean = data.mean.to(run.device)[:, None, None]
    std = data.std.to(run.device)[:, None, None]
    low = (0 - mean) / std
    high = (1 - mean) / std
    generator = torch.Generator().manual_seed(0)
    attacked = 10 if run.args.dry_run else ATTACKED
    chosen = torch.randperm(loader.N, generator=generator)[:attacked]
    x = loader.load(chosen)
    y = data.test_y[chosen].to(run.device)
    model.eval()

    def accuracy(radius: float, steps: int) -> float:
        found = attack(model, x, y, radius / 255 / std, steps, low, high, generator) if radius else x
        with torch.no_grad():
            z = model["head"](model["network"](found))[2]  # in float32
        return float((z.argmax(1) == y).double().mean())

    radii = [RADIUS * share for share in (0, 0.25, 0.5, 1)]
    curve = [accuracy(radius, PGD_STEPS) for radius in radii]
    return {"fgsm": accuracy(RADIUS, 1), "pgd": curve[-1], "pgd_radii": radii, "pgd_curve": curve}


def measure(model: nn.ModuleDict, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training; writes features.npz, where the logits are h W^T."""
    head = model["head"]
    K = len(data.classes)
    train_h, train_z = embed(model, data.train_x, data, run)
    test_h, test_z = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(train_z.device)
    test_y = data.test_y.to(train_z.device)
    W = head.W.detach().to(train_z.device)
    W = W if head.kind == "linear" else head.scale * F.normalize(W, dim=1)
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    groups, rule = shot_groups(data.counts.to(train_z.device))
    per_class = accuracy_per_class(test_z.argmax(1), test_y, K)
    tail = {group: float(per_class[members].nanmean()) for group, members in groups.items()}
    return {
        "accuracy": float((test_z.argmax(1) == test_y).double().mean()),
        **(tail | {"rule": rule} if split_name(run.args.dataset)[1] else {}),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        **geometry(W),
        "within": within_classes(train_h, train_y, K),
        **collapse_metrics(train_h, train_y, W, train_z.argmax(1), groups["few"]),
        **robustness(model, data, run),
        "per_class": per_class.tolist(),
        "counts": data.counts.tolist(),
    }


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Figures of finished runs, methods side by side; means over seeds, one circle per method."""
    from matplotlib.figure import Figure

    by_method = {name: [run for run in runs if run.name == name] for name in METHODS}
    by_method = {name: found for name, found in by_method.items() if found}
    style = styles(METHODS)

    # Both terms of the gap, epoch by epoch
    figure = Figure(figsize=(10, 4), layout="constrained")
    between, within = figure.subplots(1, 2)
    for name, found in by_method.items():
        for plot, key in ((between, "energy"), (within, "test_within")):
            epochs = [line["epoch"] for line in found[0].history if key in line]
            values = np.mean([[line[key] for line in run.history if key in line] for run in found], axis=0)
            plot.plot(epochs, values, markevery=max(1, len(epochs) // 10), label=name, **style[name])
    scale = "log" if between.dataLim.ymax > 10 else "linear"  # where proxies have jammed
    between.set(xlabel="epoch", yscale=scale, ylabel="between: energy of class vectors / least known")
    within.set(xlabel="epoch", ylim=(0, None), ylabel="within: mean distance to the class's direction")
    figure.legend(*between.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save_figure(folder / "gap.png", figure)

    points = {}
    for name, found in by_method.items():
        accuracy = 100 * np.mean([run.finished["pgd_curve"] for run in found], axis=0)
        points[name] = found[0].finished["pgd_radii"], accuracy
    axes = {"xlabel": "linf radius of the attack (255ths of the pixel range)"}
    curves(folder / "robustness.png", points, style, ylabel="test accuracy under PGD (%)", **axes)

    arrays = {name: found[0].load_features() for name, found in by_method.items()}
    if all(found["W"].shape[1] == 2 for found in arrays.values()):
        draw_circles(folder / "circle.png", arrays)


def draw_circles(path: Path, arrays: dict[str, dict]) -> None:
    """Directions of test features (dots) and class vectors (lines) on the circle, one colour per class."""
    from matplotlib.figure import Figure

    rows = -(-len(arrays) // 3)
    columns = min(3, len(arrays))
    figure = Figure(figsize=(3.4 * columns + 1, 3.5 * rows), layout="constrained")
    colours = [*COLOURS, "#882255", "#999933"]  # ten classes have ten colours
    for i, (title, found) in enumerate(arrays.items()):
        plot = figure.add_subplot(rows, columns, i + 1)
        x = found["test_h"] / np.linalg.norm(found["test_h"], axis=1, keepdims=True)
        W = found["W"] / np.linalg.norm(found["W"], axis=1, keepdims=True)
        # points hide each other: spread them outwards by chance, which means nothing
        x *= 1 + 0.15 * np.random.default_rng(1).random((len(x), 1))
        for k, w in enumerate(W):
            colour = colours[k % len(colours)]
            plot.scatter(*x[found["test_y"] == k].T, s=4, color=colour, label=f"class {k}", rasterized=True)
            plot.plot([0, 0.95 * w[0]], [0, 0.95 * w[1]], color=colour, lw=2)
        plot.set(title=title, xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        plot.set_axis_off()
    handles, labels = plot.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, markerscale=3)
    save_figure(path, figure)


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per method, mean ± std over seeds, and what its columns and figures mean."""
    rows = []
    for name in METHODS:
        found = [run.finished for run in runs if run.name == name]
        if not found:
            continue
        percent = ["accuracy", "train_accuracy", "best_accuracy", "fgsm", "pgd"]
        cells = [mean_std([result[key] for result in found], 1, 100) for key in percent]
        cells.append(mean_std([result["smallest_angle"] for result in found], 1))
        cells += [mean_std([result[key] for result in found], 2) for key in ("energy", "within")]
        rows.append([name, len(found), *cells])
    header = ["method", "seeds", "accuracy", "train", "best", "FGSM", "PGD", "angle", "energy", "within"]
    print("\n" + table(header, rows))
    print(f"""accuracy: % of the test images after the last epoch; train: of the training images, unaugmented
best: highest accuracy of the tested epochs, chosen on the test set
FGSM, PGD: % right under attack, linf {RADIUS:g}/255, in one step and in {PGD_STEPS}
angle: smallest angle between two class vectors, degrees; energy: theirs over the least known, 1 at best
within: mean distance of a unit training feature to its class's mean direction, 0 at full collapse""")
    for name in dict.fromkeys(run.name for run in runs):
        print(f"{name}: {METHODS[name].about}")
    print(f"""figures in {folder}:
  gap.png         both terms of the gap over epochs: 1 and 0 at generalized neural collapse
  robustness.png  accuracy under PGD by radius""")
    if runs[0].args.dim == 2:
        print("  circle.png      class vectors (lines) and test features (dots) by direction")


# %% [markdown]
# # 6. Command line

# %%


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    about = {name: method.about for name, method in METHODS.items()}
    title = __doc__.partition("\n")[0]
    flags = Arguments("hug", title, about, ["ce", "hug-mhe"], RECIPES, eval_every=5)
    add = flags.add
    add("--net", choices=list(NETWORKS), help="network")
    add("--dim", type=at_least(0), help="feature dimension d; 0: the network's")
    add("--reduction", choices=["official", "sum"], default="official", help="of HUG's two terms")
    add("--inter", type=positive, help="alpha, weight between classes (default: 1; sum .15)")
    add("--intra", type=positive, help="beta, weight within classes (default: 1; sum .015, mgd .03)")
    add("--reweight", choices=["on", "off"], default="off", help="ce: mean class by class, as HUG has it")
    add("--per-class", type=at_least(1), help="train on so many images of each class at most")
    args = flags.parse(argv)
    if args.dim == 1:
        raise UserError("--dim 1: a circle needs two dimensions, or 0 for the network's")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "hug" / "synthetic")
    if args.batch_size < 3:
        raise UserError(f"--batch-size {args.batch_size}: expected 3 or more, no batch has one image then")
    data = prepare_data(args)
    if args.per_class:
        keep = keep_per_class(data.train_y, args.per_class)
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    runs = []
    for name in args.method:
        for seed in args.seed:
            run = open_run(args, name, seed, data)
            if not run.finished:
                run.finish(train(args, name, seed, data, run))
            runs.append(run)
    print_results(runs, args.folder)
    draw_figures(args.folder, finished_runs(args, runs))
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    command_line(main)
