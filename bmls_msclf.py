# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Minority collapse under Mixup, and two remedies: Balanced Mixed Label Sampler, Mixed-Singleton classifier.

Source: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 3. Only its abstract is public.

WHAT COLLAPSES. A long tail is a training set in which some classes have a hundred times as many images as
others, n_k of N. A classifier compares the feature h of an image with a class vector w_k per class. Where
the tail is long enough, all rare classes get one and the same class vector, so that nothing tells them apart:
minority collapse (Fang et al. 2021). Mixup, which trains on blends of two images, does not help: a pair of
rare classes almost never comes. It even hurts: part of a rare class's signal goes into the blends.

REMEDY 1, the sampler (BMLS). Balance mixed labels: every pair of classes comes once before any comes again.
REMEDY 2, the loss (MS-Clf). Read the mixed label (i, j, lam) as a class of its own, a singleton, whose class
vector is lam w_i + (1 - lam) w_j.

    python bmls_msclf.py                                          digits, long-tailed; under a minute
    python bmls_msclf.py --synthetic                              the theory, claim by claim
    python bmls_msclf.py --dataset cifar100lt --method ce mixup cb-mixup bmls bmls+ms --seed 0 1 2
    torchrun --nproc-per-node 4 bmls_msclf.py --dataset folder:PATH       four GPUs

WHAT THE SOURCE LEAVES OPEN. It names neither the pairs, nor an epoch, nor the distribution of lam, nor the
formula of MS-Clf: both are reconstructions. Ours: unordered pairs, also (i, i); an epoch is N mixed samples;
one lam per batch, from Beta(1, 1); the loss `raw`. The abstract says that balance and singletons help; our
runs show the first only. The author's code for long tails: --pairs distinct --ms dot --classifier etf.
"""

# %% [markdown]
# # 1. The method
# ## Mixup's pairs
# Two shuffles of the training set, side by side (Zhang et al. 2018). A pair of classes $(i, j)$ comes with
# probability $n_i n_j / N^2$: for two rare classes that is almost never.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class InstanceSampler:
    """Pairs of images as Mixup draws them, each image once per epoch on either side."""

    def __init__(self, y: Tensor, K: int, generator: torch.Generator):
        self.N = len(y)
        self.generator = generator

    def draw(self, T: int) -> Tensor:
        """Image numbers of T <= N pairs, (T, 2)."""
        return torch.stack([torch.randperm(self.N, generator=self.generator) for _ in range(2)], 1)[:T]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing is kept from draw to draw."""


# %% [markdown]
# ## Balanced Mixed Label Sampler (BMLS)
# A sweep deals each of the $K(K+1)/2$ unordered pairs of classes once, shuffled; then the next one begins. So
# the counts of two pairs never differ by more than one. (Reconstructed; the abstract: deterministic pairs.)


# %%
class BalancedMixedLabelSampler:
    """Pairs of images whose pairs of classes come equally often.

    y (N,) labels, K classes. pairs: `unordered` i <= j (ours), or `distinct` i < j, as in the author's
    released sampler. Raises ValueError for a class without images.
    """

    def __init__(self, y: Tensor, K: int, generator: torch.Generator, pairs: str = "unordered"):
        n = torch.bincount(y, minlength=K)
        if (n == 0).any():
            raise ValueError(f"class {int(n.argmin())} has no training image")
        self.generator = generator
        self.pairs = torch.triu_indices(K, K, offset=int(pairs == "distinct")).T  # (M, 2)
        self.sweep = self.pairs[:0]  # what is left of the sweep
        self.cycles = list(torch.argsort(y, stable=True).split(n.tolist()))  # images per class
        self.left = [cycle[:0] for cycle in self.cycles]  # what is left of each cycle

    def draw(self, T: int) -> Tensor:
        """Image numbers of the next T mixed samples, (T, 2)."""
        labels = self.draw_labels(T)
        images = torch.empty_like(labels)
        for k in range(len(self.cycles)):
            places = labels == k  # (T, 2)
            images[places] = self.next_images(k, int(places.sum()))
        return images

    def draw_labels(self, T: int) -> Tensor:
        """Classes of the next T mixed samples, (T, 2)."""
        while len(self.sweep) < T:
            order = torch.randperm(len(self.pairs), generator=self.generator)
            self.sweep = torch.cat([self.sweep, self.pairs[order]])
        labels = self.sweep[:T]
        self.sweep = self.sweep[T:]
        # i <= j in every pair, and a batch shares lam: a coin decides which of the two gets lam
        swap = torch.rand(T, 1, generator=self.generator) < 0.5
        return torch.where(swap, labels.flip(1), labels)

    def next_images(self, k: int, n: int) -> Tensor:
        """The next n images of class k, (n,)."""
        while len(self.left[k]) < n:
            order = torch.randperm(len(self.cycles[k]), generator=self.generator)
            self.cycles[k] = self.cycles[k][order]
            self.left[k] = torch.cat([self.left[k], self.cycles[k]])
        images = self.left[k][:n]
        self.left[k] = self.left[k][n:]
        return images

    def state_dict(self) -> dict:
        left = [images.clone() for images in self.left]  # a view would be saved whole
        return {"sweep": self.sweep.clone(), "cycles": list(self.cycles), "left": left}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


# %% [markdown]
# ## Class-balanced pairs
# Two class-balanced draws: $(i, j)$ has probability $1/K^2$, balance on average only. With Mixup it is
# Label-Occurrence-Balanced Mixup (arXiv 2110.04964); the control of BMLS: does *exact* balance matter?


# %%
class ClassBalancedSampler(BalancedMixedLabelSampler):
    """Pairs of images whose classes are drawn independently and uniformly; images in cycles, as in BMLS."""

    def draw_labels(self, T: int) -> Tensor:
        return torch.randint(len(self.cycles), (T, 2), generator=self.generator)


# %% [markdown]
# ## Mixup's loss, and balanced softmax
# An image $\lambda x_a + (1-\lambda) x_b$ with logits $z$ is charged for both labels (Zhang et al. 2018):
# $$L = \lambda\, \mathrm{CE}(z, a) + (1-\lambda)\, \mathrm{CE}(z, b), \qquad
# \lambda \sim \mathrm{Beta}(\alpha, \alpha)$$
# A baseline puts the class sizes into the logits: $L = \mathrm{CE}(z + \log n, y)$ (Ren et al. 2020).


# %%
def mixup_loss(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """Mixup's loss: logits z (B, K), labels a, b (B,), lam () -> scalar."""
    ce_a = F.cross_entropy(z, a, reduction="none")  # (B,)
    ce_b = F.cross_entropy(z, b, reduction="none")  # (B,)
    return (lam * ce_a + (1 - lam) * ce_b).mean()


def balanced_softmax(z: Tensor, y: Tensor, n: Tensor) -> Tensor:
    """Cross-entropy with the prior in the logits: z (B, K), y (B,), n (K,) images per class -> scalar."""
    return F.cross_entropy(z + n.log(), y)


# %% [markdown]
# ## Mixed-Singleton classifier (MS-Clf), raw
# The mixed label $(i, j, \lambda)$ is a class of its own, with class vector
# $v_{ij} = \lambda w_i + (1-\lambda) w_j$, and the loss is a softmax over all $K^2$ of them. A logit
# $h \cdot v_{ij} = \lambda z_i + (1-\lambda) z_j$ is a sum, so this softmax is a product of two:
# $$L = -\log \frac{e^{\lambda z_a + (1-\lambda) z_b}}{\sum_{ij} e^{\lambda z_i + (1-\lambda) z_j}}
# = \mathrm{CE}(\lambda z, a) + \mathrm{CE}((1-\lambda) z, b)$$
# It is Mixup's loss with $\lambda$ inside the softmax. (The abstract has no formula: we try three readings.)


# %%
def ms_raw(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf over the K^2 mixed class vectors as they are, in O(K). z (B, K), lam () -> scalar."""
    return F.cross_entropy(lam * z, a) + F.cross_entropy((1 - lam) * z, b)


# %% [markdown]
# ## MS-Clf, unit
# A raw $v_{ij}$ lies between $w_i$ and $w_j$, so $(i, i)$ or $(j, j)$ scores at least as high: a mixed label
# is never strictly the best. At equal length it is (but at $\lambda = 1/2$). With unit $w$:
# $$\|v_{ij}\|^2 = \lambda^2 + (1-\lambda)^2 + 2 \lambda (1-\lambda)\, w_i \cdot w_j$$


# %%
def ms_unit(z: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf over K^2 normalised mixed vectors. z (B, K), W (K, d) unit rows, lam () -> scalar; O(B K^2)."""
    square = lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * (W @ W.T)  # (K, K)
    length = square.clamp_min(1e-12).sqrt()
    mixed = (lam * z[:, :, None] + (1 - lam) * z[:, None, :]) / length  # (B, K, K)
    return F.cross_entropy(mixed.flatten(1), a * len(W) + b)


# %% [markdown]
# ## MS-Clf, dot
# $L = \frac12 (h \cdot v_{ab}/\|v_{ab}\| - 1)^2$, as in the author's released code. It has no negatives, so
# $W$ must be fixed: a learnable $W$ would send every class vector to one point.


# %%
def ms_dot(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf as dot-regression. h (B, d), W (K, d), both of unit rows, lam () -> scalar >= 0."""
    v = F.normalize(lam * W[a] + (1 - lam) * W[b], dim=1)  # (B, d)
    return 0.5 * ((h * v).sum(1) - 1).square().mean()


# %% Imports of the other cells
import argparse
import itertools
from pathlib import Path

from torch import nn

import common

# %% [markdown]
# # 2. Theory check
# The layer-peeled model: below the last layer the network is so flexible that every (mixed) label $s$ has one
# free feature $h_s$. With soft labels $q_s$, their probabilities $p_s$ and penalties $\lambda_W, \lambda_H$:
# $$\min_{W, H} \sum_s p_s\, \mathrm{CE}(W h_s, q_s) + \tfrac{\lambda_W}{2} \|W\|_F^2
# + \tfrac{\lambda_H}{2} \sum_s p_s \|h_s\|^2$$


# %%
def layer_peeled(q: Tensor, p: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Optimal class vectors W (K, d) and features H (S, d), d = K, for soft labels q (S, K) and p (S,).

    penalty = lambda_W lambda_H, both its root. With d >= K the problem, which is not convex in (W, H), has no
    bad local minimum (Hong & Ling 2023, arXiv 2309.09725).
    """
    p = p[:, None]  # (S, 1)

    def loss(W, G):  # G = sqrt(p_s) h_s: plain squared norms
        H = G / p.sqrt()
        ce = -(p * q * F.log_softmax(H @ W.T, 1)).sum()  # (S, d) @ (d, K) -> (S, K)
        return ce + math.sqrt(penalty) / 2 * (W.square().sum() + G.square().sum())

    generator = torch.Generator().manual_seed(0)
    W, H = (torch.randn(n, q.shape[1], generator=generator, dtype=torch.float64) / 2 for n in q.T.shape)
    W, G = common.minimise(loss, W, H * p.sqrt())
    return W, G / p.sqrt()


def soft_labels(share: Tensor, method: str, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """The soft labels q (S, K) that a method trains on and their probabilities p (S,); share (K,) n_k / N.

    Thresholds need lam's mean and variance only: two values stand for Beta(alpha, alpha).
    """
    K = len(share)
    eye = torch.eye(K, dtype=torch.float64)
    if method == "ce":
        return eye, share
    pairs = {
        "mixup": share[:, None] * share,
        "bmls": (1 + eye) / (K * (K + 1)),  # (i, j) and (j, i) share one
    }
    std = 1 / math.sqrt(4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    mixed = [lam * eye[:, None] + (1 - lam) * eye for lam in (1 / 2 - std, 1 / 2 + std)]  # (K, K, K) each
    q = torch.stack(mixed).flatten(0, 2)  # (2 K^2, K)
    return q, pairs[method].repeat(2, 1).flatten() / 2


def rare_cosine(method: str, times: float, alpha: float = 1.0) -> float:
    """Mean cosine of five rare classes' vectors among ten; each has n_B / N = times * lambda_W lambda_H."""
    penalty = 0.02
    rare = times * penalty
    share = torch.tensor([1 / 5 - rare] * 5 + [rare] * 5, dtype=torch.float64)
    W, _ = layer_peeled(*soft_labels(share, method, alpha), penalty)
    return common.mean_pairwise_cosine(W, torch.arange(5, 10))


# %% [markdown]
# **Where collapse begins.** Each rare class has $n_B$ images; $\lambda$ alone is Mixup's weight.
# 1. With $G = H \sqrt p$ the penalties are at best $\sqrt{\lambda_W \lambda_H} \|W G^T\|_*$, a nuclear norm.
# 2. So at an optimum the loss's gradient in $W G^T$ has operator norm $\le \sqrt{\lambda_W \lambda_H}$.
# 3. Take two collapsed rare classes $i, j$ and $u = (e_i - e_j)/\sqrt 2$: their predictions are equal, so the
#    gradient along $u$ has squared length $u^T \mathbb E[q q^T] u = \mathbb E[q_i^2] - \mathbb E[q_i q_j]$.
# 4. Without Mixup that is $n_B/N$; with it $\frac{n_B}{N} \mathbb{E}[\lambda^2 + (1-\lambda)^2]
#    = \frac{n_B}{N} \frac{\alpha+1}{2\alpha+1}$.
# 5. All is convex in $W G^T$: collapse is optimal exactly while this is $\le \lambda_W \lambda_H$ (Hong &
#    Ling 2023). Mixup moves that by $\frac{2\alpha+1}{\alpha+1}$, 3/2 at $\alpha = 1$ (derived here).


# %%
def check_theory(folder: Path) -> dict:
    """Print the chapter's story, each claim against direct optimisation; draw both figures into folder."""
    claims = common.Claims()
    claims.equal("Few images: the rare share one vector, cosine", 1, rare_cosine("ce", 0.9), 1e-6)
    edge = common.locate(lambda times: rare_cosine("ce", times) > 0.99, 0.9, 1.15)
    claims.equal("They do up to (n_B/N) / (lambda_W lambda_H) =", 1, edge, 0.01)
    edge = common.locate(lambda times: rare_cosine("mixup", times) > 0.99, 1.35, 1.7)
    claims.equal("Mixup moves this threshold to (2 alpha+1)/(alpha+1) =", 3 / 2, edge, 0.015)
    claims.at_most("At 1.25, in between, cross-entropy does not: cosine", 0.5, rare_cosine("ce", 1.25))
    claims.equal("   Mixup does: cosine", 1, rare_cosine("mixup", 1.25), 1e-6)
    claims.equal("   BMLS gives a simplex, cosine -1/(K-1) =", -1 / 9, rare_cosine("bmls", 1.25), 1e-6)
    counts = {name: count_pairs(sampler) for name, sampler in SAMPLERS.items()}
    drawn = counts["balanced"][tuple(torch.triu_indices(10, 10))]
    claims.at_most("BMLS: counts of the pairs differ by", 1, float(drawn.max() - drawn.min()))
    draw_pairs(folder / "pairs.png", counts)
    draw_thresholds(folder / "thresholds.png")
    return claims.report(folder / "thresholds.png")


def count_pairs(sampler: type) -> Tensor:
    """How often each pair comes in an epoch of five classes of 143 images and five of one, symmetric."""
    y = torch.arange(10).repeat_interleave(torch.tensor([143] * 5 + [1] * 5))
    a, b = y[sampler(y, 10, torch.Generator().manual_seed(0)).draw(len(y))].unbind(1)
    count = torch.bincount(10 * a + b, minlength=100).view(10, 10)
    return count + count.T - count.diag().diag()


def draw_pairs(path: Path, counts: dict[str, Tensor]) -> None:
    """The remedy in one picture: which pairs of classes come, under each sampler?"""
    titles = {"instance": "Mixup", "class": "class-balanced", "balanced": "BMLS"}
    maps = {titles[name]: count.numpy() for name, count in counts.items()}
    axes = {"xlabel": "class: five common, five rare", "ylabel": "class", "limits": (0, 30)}
    common.heat_maps(path, maps, label="samples per epoch (yellow: >= 30)", diverging=False, **axes)


def draw_thresholds(path: Path) -> None:
    """From which share of the images on does a rare class keep a class vector of its own?"""
    x = [0.5, 0.7, 0.98, 1.04, 1.15, 1.48, 1.57, 1.75, 2.2, 3.2]
    names = {"ce": "cross-entropy", "mixup": "Mixup", "bmls": "balanced mixed labels"}
    points = {name: (x, [rare_cosine(method, times) for times in x]) for method, name in names.items()}
    style = {name: common.styles([method])[method] for method, name in names.items()}
    for method, name, edge in (("ce", "predicted: 1", 1), ("mixup", "predicted: 3/2", 3 / 2)):
        points[name] = [edge, edge], [-0.2, 1.05]
        style[name] = {"color": style[names[method]]["color"], "ls": "--"}
    axes = {"xlabel": r"share of one rare class $n_B/N$, in units of $\lambda_W \lambda_H$"}
    common.curves(path, points, style, ylabel="cosine of rare class vectors (1: collapse)", **axes)


# %% [markdown]
# # 3. Network


# %%
# [copied: resnet32]
class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: stride by slicing, new channels zero (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new = channels - channels_in  # even: half of them before, half after the old ones

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.new // 2, self.new // 2))
        return F.relu(x + y)


class ResNet32(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 3 stages of 5 blocks, 0.46 M parameters at width 1.

    Not ResNet-34, which has 21 M. Images (B, C, H, W) of any size -> features h (B, 64 * width), h >= 0.
    """

    def __init__(self, channels: int = 3, width: int = 1):
        super().__init__()
        self.d = 64 * width
        self.conv = nn.Conv2d(channels, 16 * width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16 * width)
        sizes = [16 * width] * 6 + [32 * width] * 5 + [64 * width] * 5
        blocks = [Block(before, after, after // before) for before, after in itertools.pairwise(sizes)]
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3))  # global average pool


# [end copied]


# %%
# [copied: smallcnn]
class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, ReLU and max-pool: (B, C, H, W) -> h (B, 128), h >= 0.

    Ours, for a laptop: 0.09 M parameters, seven times the images per second of ResNet-32.
    """

    def __init__(self, channels: int = 3):
        super().__init__()
        self.d = 128
        layers = []
        for c in (32, 64, 128):
            conv = nn.Conv2d(channels, c, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels = c
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # global average pool


# [end copied]


# %%
NETWORKS = {"resnet32": ResNet32, "cnn": SmallCNN}
SCALE = 16.0  # factor of the logits of a cosine head


class BiasFreeHead(nn.Module):
    """Class vectors W (K, d), learnable or a fixed simplex ETF, without bias. Always in float32.

    cosine False: logits z = h W^T. True: BatchNorm1d, then h and W at unit length, z = SCALE * cos; BatchNorm
    comes first since features behind a ReLU fill one orthant only, and class vectors need them all.
    """

    def __init__(self, K: int, d: int, cosine: bool, fixed: bool):
        super().__init__()
        self.cosine = cosine
        self.scale = SCALE if cosine else 1.0
        self.bn = nn.BatchNorm1d(d) if cosine else nn.Identity()
        if fixed:  # a random simplex equiangular tight frame: every cosine is -1/(K-1)
            Q = torch.linalg.qr(torch.randn(d, K)).Q  # (d, K), orthonormal columns
            W = math.sqrt(K / (K - 1)) * (torch.eye(K) - 1 / K) @ Q.T
        else:
            W = torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)  # as nn.Linear
        self.W = nn.Parameter(W, requires_grad=not fixed)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, d) from the network -> h (B, d), W (K, d) as the loss sees them, and logits z (B, K)."""
        h = self.bn(h.float())
        W = self.W
        if self.cosine:
            h = F.normalize(h, dim=1)
            W = F.normalize(W, dim=1)
        return h, W, self.scale * h @ W.T


def build_model(args: argparse.Namespace, name: str, data: common.Dataset) -> nn.ModuleDict:
    """Network and head of a method. Raises UserError for an ETF in too few dimensions."""
    K = len(data.classes)
    network = NETWORKS[args.net](data.train_x.shape[3])
    fixed = args.classifier == "etf"
    if fixed and network.d < K:
        raise common.UserError(f"--classifier etf: {K} classes in {network.d} dimensions")
    cosine = fixed or ("ms" in METHODS[name] and args.ms != "raw")
    return nn.ModuleDict({"network": network, "classifier": BiasFreeHead(K, network.d, cosine, fixed)})


# %% [markdown]
# # 4. Training
# A method is a sampler of pairs, a loss, and whether the two images of a pair are mixed.


# %%
METHODS = {  # sampler, loss, are two images mixed? (else lam is 1), what it is
    "ce": ("instance", "ce", False, "cross-entropy"),
    "balanced-softmax": ("instance", "prior", False, "balanced softmax: CE of z + log n"),
    "cb": ("class", "ce", False, "class-balanced: unmixed draws"),
    "mixup": ("instance", "mixup", True, "Mixup: of two shuffles"),
    "cb-mixup": ("class", "mixup", True, "balanced Mixup: of two balanced draws"),
    "bmls": ("balanced", "mixup", True, "BMLS: exactly balanced pairs (remedy 1)"),
    "cb+ms": ("class", "ms", True, "MS-Clf: balanced draws (remedy 2)"),
    "bmls+ms": ("balanced", "ms", True, "BMLS + MS-Clf: both remedies"),
}
ABOUT = {name: method[-1] for name, method in METHODS.items()}
SAMPLERS = {"instance": InstanceSampler, "class": ClassBalancedSampler, "balanced": BalancedMixedLabelSampler}
# h (B, d), W (K, d), z (B, K) of the head; labels a, b (B,); lam (); n (K,) training images per class
LOSSES = {
    "ce": lambda h, W, z, a, b, lam, n: F.cross_entropy(z, a),
    "prior": lambda h, W, z, a, b, lam, n: balanced_softmax(z, a, n),
    "mixup": lambda h, W, z, a, b, lam, n: mixup_loss(z, a, b, lam),
    "ms-raw": lambda h, W, z, a, b, lam, n: ms_raw(z, a, b, lam),
    "ms-unit": lambda h, W, z, a, b, lam, n: ms_unit(z, W, a, b, lam),
    "ms-dot": lambda h, W, z, a, b, lam, n: ms_dot(h, W, a, b, lam),
}
# As published for CIFAR-LT (MiSLAS; Yang et al. 2022), weight decay on BatchNorm too. Digits: ours.
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "net": "resnet32"},
    "digits": {"epochs": 60, "batch_size": 32, "weight_decay": 5e-3, "net": "cnn"},
}
RECIPES["digits"] |= {"profile": "step", "imbalance": 140.0}


# [copied: learning_rate]
def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160, a hundredth after 180; in proportion."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    drop = (1.0, 0.1, 0.01)[(done > 0.8) + (done > 0.9)]
    return args.lr * min(1, (epoch + 1) / warmup) * drop


# [end copied]


# %%
def train(args: argparse.Namespace, run: common.Run, data: common.Dataset) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    sampling, loss_name, mixes, _ = METHODS[run.name]
    N = len(data.train_y)
    torch.manual_seed(run.seed)  # initial weights
    generator = torch.Generator().manual_seed(run.seed)  # pairs, crops, flips and lam
    model = build_model(args, run.name, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile, several GPUs
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    options = {"pairs": args.pairs} if sampling == "balanced" else {}
    sampler = SAMPLERS[sampling](data.train_y, len(data.classes), generator, **options)
    loss_of = LOSSES[f"ms-{args.ms}" if loss_name == "ms" else loss_name]
    augment = {"pad": data.pad, "flip": data.flip}
    images = common.Batches(data.train_x, data.mean, data.std, **augment, device=run.device)
    n = data.counts.to(run.device)  # (K,)
    steps = len(common.split_evenly(N, args.batch_size))

    parts = {"model": model, "optimizer": optimizer, "generator": generator, "sampler": sampler}
    for epoch in run.epochs(args.epochs, **parts):  # from the last checkpoint on
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        # An epoch is N mixed samples, so that every method takes the same number of steps
        pairs = sampler.draw(N)  # (N, 2): the two images of each mixed sample
        labels = data.train_y[pairs].to(run.device)  # (N, 2)
        batches = images.epoch(pairs, args.batch_size, generator)  # each its own crop and flip
        seed = int(torch.randint(2**31, (), generator=generator))  # for NumPy's beta
        lams = torch.from_numpy(np.random.default_rng(seed).beta(args.alpha, args.alpha, steps)).float()
        lams = lams.to(run.device) if mixes else torch.ones(steps, device=run.device)
        model.train()
        for lam, (part, x_a, x_b) in zip(lams, batches, strict=True):  # x (B, C, H, W) each
            a, b = labels[part].unbind(1)  # (B,) each
            with run.autocast():  # bf16 inside the network only
                h = network(lam * x_a + (1 - lam) * x_b)  # (B, d)
            h, W, z = classifier(h)  # (B, d), (K, d), (B, K)
            norms = W.square().sum() + h.square().sum(1).mean()  # of section 2
            loss = loss_of(h, W, z, a, b, lam, n) + args.penalty / 2 * norms
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)  # read once per epoch
        run.log(lr=lr)
        if run.is_test_epoch(epoch):  # and after the last one
            run.log(**test(model, data, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results


# %%
@torch.no_grad()
def embed(model: nn.Module, images: Tensor, data: common.Dataset, run: common.Run) -> tuple[Tensor, Tensor]:
    """Features h (N, d) of every image in order, unaugmented, and W (K, d); the logits are h W^T."""
    model.eval()
    hs = []
    for _, x in common.Batches(images, data.mean, data.std, device=run.device).all():
        with run.autocast():
            h = model["network"](x)
        h, W, _ = model["classifier"](h)
        hs.append(h)
    return torch.cat(hs), model["classifier"].scale * W


def test(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict[str, float]:
    """Test accuracy, overall and by class size, and how far the rare classes' vectors have collapsed."""
    h, W = embed(model, data.test_x, data, run)
    right = common.accuracies(h @ W.T, data.test_y.to(h.device), data.groups)
    cosine = common.mean_pairwise_cosine(W, data.groups["few"])
    return {key: right[key] for key in ("accuracy", "many", "medium", "few")} | {"minority_cosine_W": cosine}


def measure(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz, where z = h W^T."""
    train_h, W = embed(model, data.train_x, data, run)
    test_h, _ = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(W.device)
    test_y = data.test_y.to(W.device)
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    fitted = common.accuracies(train_h @ W.T, train_y, data.groups)
    softmax = not model["classifier"].cosine
    return {
        **common.accuracies(test_h @ W.T, test_y, data.groups),
        "train_accuracy": fitted["accuracy"],
        "train_few": fitted["few"],
        "minority_cosine_W": common.mean_pairwise_cosine(W, data.groups["few"]),
        "heads": common.heads(train_h, train_y, test_h, test_y, W, softmax=softmax),
        "counts": data.counts.tolist(),
    }


COLUMNS = {  # entry of result.json: title, unit, what it is
    "accuracy": ("accuracy", "%", "of the test images after the last epoch"),
    "few": ("few", "%", "of the rare classes' test images"),
    "minority_cosine_W": ("cos few", "", "mean cosine of the few's class vectors; 1: collapse"),
    "train_accuracy": ("train", "%", "of the training images, unaugmented"),
    "train_few": ("train few", "%", "of the few's training images"),
    "heads.logit_adjustment": ("logit adj.", "%", "with log n_k taken off the logits"),
    "heads.nearest_mean": ("near mean", "%", "by the nearest class mean"),
}


def draw_class_vectors(path: Path, runs: list[common.Run]) -> None:
    """Cosines of each method's class vectors, first seed: a red block at the lower right is collapse."""
    maps = {}
    for run in runs:
        order = np.argsort(-np.array(run.finished["counts"]), kind="stable")
        W = torch.from_numpy(run.load_features()["W"][order])
        title = ABOUT[run.name].partition(":")[0]
        maps.setdefault(title, common.cosines(W).fill_diagonal_(math.nan).numpy())
    axes = {"xlabel": "class, most images first", "ylabel": "class, most images first", "limits": (-1, 1)}
    common.heat_maps(path, maps, label="cosine of class vectors", diverging=True, **axes)


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    flags = common.Flags("bmls_msclf", __doc__)
    add = flags.add_argument
    add("--net", choices=list(NETWORKS), help="network")
    add("--classifier", choices=["learnable", "etf"], default="learnable", help="etf: fixed, d >= K")
    add("--alpha", type=float, default=1.0, help="of lam's Beta(alpha, alpha)")
    add("--pairs", choices=["unordered", "distinct"], default="unordered", help="what BMLS balances")
    add("--penalty", type=float, default=0.0, help="on W and h, as in theory")
    add("--ms", choices=["raw", "unit", "dot"], default="raw", help="reading of MS-Clf")
    args = flags.parse(argv, ABOUT, ["ce", "mixup", "bmls+ms"], RECIPES, dataset="digitslt", eval_every=5)
    if args.ms == "dot" and args.classifier != "etf":
        raise common.UserError("--ms dot: add --classifier etf, a fixed one")
    if args.penalty and (args.ms, args.classifier) != ("raw", "learnable"):
        raise common.UserError("--penalty: add --ms raw --classifier learnable")
    return args


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figure. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "bmls_msclf" / "synthetic")
    data = common.prepare_data(args)
    for name in args.method:  # fail early: build every model first
        build_model(args, name, data)
    for run in common.runs(args, data):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data)
    common.print_table(runs, COLUMNS, ABOUT)
    draw_class_vectors(args.folder / "class_vectors.png", runs)
    print(f"figure: {args.folder / 'class_vectors.png'}")
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
