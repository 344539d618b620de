# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Minority collapse under Mixup, and two remedies: Balanced Mixed Label Sampler, Mixed-Singleton classifier.

Source: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 3. Only its abstract is public.

WHAT COLLAPSES. Class k has n_k of N images; n_max / n_min = IF (100, say). A network that is flexible
enough (the layer-peeled model: features h free, class vectors w_k learnable) gives all rare classes *one and
the same* class vector as soon as the tail is long enough (Fang et al. 2021): minority collapse. In the
penalised form the threshold is exact (derived here):

    the minority collapses  <=>  n_B / N <= lam_W lam_H           n_B images in each minority class

Mixup (x = lam x_a + (1-lam) x_b, lam ~ Beta(alpha, alpha)) does not help: it leaves each class its share
n_k / N, while the mixed label (i, j) comes with probability n_i n_j / N^2, so that most rare pairs never
come. It even hurts, since mixing spends part of the minority's signal:

    with Mixup:  (n_B / N) (alpha+1)/(2 alpha+1) <= lam_W lam_H   2/3 at alpha = 1: collapse comes earlier

REMEDY 1, the sampler (BMLS): balance the *mixed* labels. Every pair of classes comes once before any pair
comes again.
REMEDY 2, the loss (MS-Clf): read the mixed label (i, j, lam) as a class of its own, a singleton, with class
vector lam w_i + (1-lam) w_j.
    Mixup   L = lam CE(z, i) + (1-lam) CE(z, j)                   z = W h
    raw     L = CE(lam z, i) + CE((1-lam) z, j)                   = softmax over all K^2 mixed class vectors
    unit    the same softmax over mixed vectors of unit length    O(K^2) per sample
    dot     L = 1/2 (h . v/||v|| - 1)^2, v the mixed vector       no negatives: needs a fixed classifier

    python bmls_msclf.py                                          digits, long-tailed; under a minute
    python bmls_msclf.py --synthetic                              the theory above, claim by claim
    python bmls_msclf.py --dataset cifar100lt --method ce mixup cb-mixup bmls bmls+ms --seed 0 1 2
    torchrun --nproc-per-node 4 bmls_msclf.py --dataset folder:PATH       four GPUs

WHAT THE SOURCE LEAVES OPEN, and what we chose. It names neither the pairs, nor an epoch, nor the
distribution of lam, nor the formula of MS-Clf: BMLS and MS-Clf below are reconstructions. The author's
released long-tail code (khyong/FNO-classifier) is evidence, not proof: its epoch has N pairs, each image
has its own crop, and a batch shares one lam with alpha = 1, as here; its sampler never pairs a class with
itself (--pairs distinct), and its loss has no negatives (--ms dot --classifier etf), which our defaults do.
- Pairs: unordered, same-class pairs included (--pairs). An epoch: N mixed samples, as many steps as a
  baseline's. lam: one per batch, alpha = 1 (--lam, --alpha).
- MS-Clf: raw by default (--ms): it costs O(K), and needs neither the cosine head of unit nor the fixed
  classifier of dot.
- Partners of a batch: two independent draws. Common Mixup code pairs a batch with a permutation of itself;
  with two draws every method sees the same number of views per step.
- No bias in the classifier, so that class vectors are all there is to look at; published baselines have one.
- Schedule, augmentation and weight decay (on BatchNorm too) are those of the published CIFAR-LT runs
  (MiSLAS; Yang et al. 2022). They report the best epoch on the test set; we report the last one, and the
  best of those tested (--eval-every) beside it.
"""

# %% [markdown]
# # 1. The method
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class InstanceSampler:
    """Pairs of images as Mixup draws them: (i, j) has probability n_i n_j / N^2, rare pairs never come."""

    def __init__(self, y: Tensor, K: int, generator: torch.Generator):
        self.N = len(y)
        self.generator = generator

    def draw(self, T: int) -> Tensor:
        """Image numbers of T <= N pairs, (T, 2): two shuffles of the training set, side by side."""
        return torch.stack([torch.randperm(self.N, generator=self.generator) for _ in range(2)], 1)[:T]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class BalancedMixedLabelSampler:
    """BMLS: every pair of classes comes equally often. Reconstructed from the thesis abstract.

    A sweep deals every pair of classes once, in shuffled order; then the next sweep begins. What is left of a
    sweep is carried to the next epoch, so after any number of draws two pairs' counts differ by at most one.
    Within a class images come in shuffled cycles: none comes again before every other one has come.

    y (N,) labels, K classes. pairs: `unordered` i <= j, K(K+1)/2 of them, same-class pairs included (ours);
    `ordered` all K^2; `distinct` i < j, K(K-1)/2 (as in the author's released sampler). Raises ValueError
    for a class without images, and for distinct pairs of one class.
    """

    def __init__(self, y: Tensor, K: int, generator: torch.Generator, pairs: str = "unordered"):
        n = torch.bincount(y, minlength=K)
        if (n == 0).any():
            raise ValueError(f"class {int(n.argmin())} has no training image")
        if pairs == "distinct" and K < 2:
            raise ValueError("distinct pairs need two classes or more")
        self.generator = generator
        self.toss = pairs != "ordered"
        if pairs == "ordered":
            self.pairs = torch.cartesian_prod(torch.arange(K), torch.arange(K))  # (M, 2)
        else:
            self.pairs = torch.triu_indices(K, K, offset=int(pairs == "distinct")).T  # (M, 2)
        self.sweep = self.pairs[:0]  # what is left of the sweep
        self.cycles = list(torch.argsort(y, stable=True).split(n.tolist()))  # the images of each class
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
        if self.toss:  # a batch shares lam: a coin decides who gets lam and who 1 - lam, not i < j
            swap = torch.rand(T, 1, generator=self.generator) < 0.5
            labels = torch.where(swap, labels.flip(1), labels)
        return labels

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
        left = [images.clone() for images in self.left]  # as a view, all that it is part of would be saved
        return {"sweep": self.sweep.clone(), "cycles": list(self.cycles), "left": left}

    def load_state_dict(self, state: dict) -> None:
        self.sweep = state["sweep"]
        self.cycles = state["cycles"]
        self.left = state["left"]


class ClassBalancedSampler(BalancedMixedLabelSampler):
    """Two class-balanced draws: (i, j) has probability 1 / K^2, exact in expectation only."""

    def draw_labels(self, T: int) -> Tensor:
        return torch.randint(len(self.cycles), (T, 2), generator=self.generator)


def mixup_loss(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """Mixup's loss (Zhang et al. 2018). Logits z (B, K), labels a, b (B,), lam (B,) -> scalar."""
    # L = lam CE(z, a) + (1 - lam) CE(z, b)
    ce_a = F.cross_entropy(z, a, reduction="none")  # (B,)
    ce_b = F.cross_entropy(z, b, reduction="none")  # (B,)
    return (lam * ce_a + (1 - lam) * ce_b).mean()


def remix_lam(lam: Tensor, n_a: Tensor, n_b: Tensor, kappa: float = 3.0, tau: float = 0.5) -> Tensor:
    """Remix (Chou et al. 2020): the images mix by lam, the label goes wholly to a much smaller class.

    n_a, n_b (B,) training images of the two classes, lam (B,) -> the label's lam, (B,)
    """
    label_lam = torch.where((n_a >= kappa * n_b) & (lam < tau), 0.0, lam)  # b is the rare one
    return torch.where((kappa * n_a <= n_b) & (1 - lam < tau), 1.0, label_lam)  # a is


def balanced_softmax(z: Tensor, a: Tensor, n: Tensor) -> Tensor:
    """Balanced softmax (Ren et al. 2020): cross-entropy with the prior in the logits. n (K,) -> scalar."""
    return F.cross_entropy(z + n.log(), a)  # L = CE(z + log n, a)


# The Mixed-Singleton classifier reads the mixed label (i, j, lam) as a class of its own, with class vector
#     v_ij = lam w_i + (1 - lam) w_j
# and its loss is a softmax over the mixed class vectors at the batch's lam. The abstract gives no formula;
# these are three readings of it, none of them confirmed.


def ms_raw(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, raw: softmax over all K^2 mixed vectors v_ij as they are. z (B, K), lam (B,) -> scalar.

    A logit h . v_ij = lam z_i + (1 - lam) z_j is a sum, so the K^2-way softmax is a product of two K-way
    ones, in O(K): Mixup's loss with lam moved inside the softmax, where it acts as an inverse temperature.
    """
    # L = -log [exp(lam z_a + (1-lam) z_b) / sum_ij exp(lam z_i + (1-lam) z_j)]
    #   = CE(lam z, a) + CE((1-lam) z, b)
    lam = lam[:, None]
    return F.cross_entropy(lam * z, a) + F.cross_entropy((1 - lam) * z, b)


def ms_unit(W: Tensor, z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, unit: softmax over all K^2 normalised mixed vectors. W (K, d) unit rows, z (B, K) -> scalar.

    A raw v_ij lies between w_i and w_j, so (i, i) or (j, j) always scores at least as high: a mixed label is
    never strictly the best. At equal length it is (but at lam = 1/2, where v_ij = v_ji). O(B K^2) memory.
    """
    lam = lam[:, None, None]
    # ||v_ij||^2 = lam^2 + (1-lam)^2 + 2 lam (1-lam) w_i . w_j
    norm = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * (W @ W.T)).clamp_min(1e-12).sqrt()  # (B, K, K)
    mixed = (lam * z[:, :, None] + (1 - lam) * z[:, None, :]) / norm  # (B, K, K)
    return F.cross_entropy(mixed.flatten(1), a * len(W) + b)


def ms_dot(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, dot: regression onto the normalised mixed vector. h (B, d), W (K, d) unit rows -> scalar >= 0.

    It has no negatives, so W must be fixed: a learnable W would send every class vector to one point.
    """
    v = F.normalize(lam[:, None] * W[a] + (1 - lam[:, None]) * W[b], dim=1)  # (B, d)
    return 0.5 * ((h * v).sum(1) - 1).square().mean()  # L = 1/2 mean (h . v/||v|| - 1)^2


# [copied: simplex_etf]
def simplex_etf(K: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Class vectors of a random simplex ETF: (K, d) float64, unit rows, every pairwise cosine -1/(K-1).

    K unit vectors at equal angles span K - 1 dimensions. Raises ValueError for d < K - 1 (none exists).
    """
    if K < 2 or d < K - 1:
        raise ValueError(f"a simplex ETF of {K} classes needs 2 classes and {K - 1} dimensions, not {d}")
    # the centred basis sqrt(K/(K-1)) (I - 11^T/K) in K - 1 coordinates, then a random rotation into d
    centred = torch.eye(K, dtype=torch.float64) - 1 / K
    U = torch.linalg.svd(centred).U[:, : K - 1]  # (K, K-1), rows of squared norm (K-1)/K
    Q = torch.linalg.qr(torch.randn(d, K - 1, generator=generator, dtype=torch.float64)).Q  # (d, K-1)
    return math.sqrt(K / (K - 1)) * U @ Q.T


# [end copied]

# %% Imports of the other cells
import argparse
from pathlib import Path
from typing import NamedTuple

from torch import nn

from common import (
    HEADS,
    Arguments,
    Batches,
    Claims,
    Dataset,
    Run,
    UserError,
    accuracies,
    at_least,
    bars,
    collapse_metrics,
    command_line,
    cosines,
    curves,
    expected_calibration_error,
    finished_runs,
    heads,
    heat_maps,
    locate,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    minimise,
    open_run,
    positive,
    prepare_data,
    ranks,
    shot_groups,
    split_evenly,
    styles,
    table,
)

# %% [markdown]
# # 2. Theory check
# The layer-peeled model: a network below the last layer so flexible that every (mixed) label has one free
# feature. What is left is a matrix problem, convex in Z = W H^T, whose collapse has exact thresholds.

# %%


def layer_peeled(K: int, labels: tuple, reg: float) -> tuple[Tensor, Tensor]:
    """Optimal classifier W (K, d) and features H (S, d), d = K: one free feature per (mixed) label.

    labels: classes a (S,), b (S,), their lam (S,), and probabilities (S,) that sum to 1. lam_W = lam_H =
    sqrt(reg). With d >= K the problem, not convex in (W, H), has no bad local minimum (Hong & Ling 2023).
    """
    a, b, lam, p = (torch.as_tensor(np.asarray(v)) for v in labels)
    eye = torch.eye(K, dtype=torch.float64)
    q = lam[:, None] * eye[a] + (1 - lam[:, None]) * eye[b]  # (S, K) soft labels
    p = p[:, None]  # (S, 1)

    def loss(W, G):  # G = sqrt(p_s) h_s turns both penalties into plain squared norms
        H = G / p.sqrt()
        # L = sum_s p_s CE(W h_s, q_s) + lam_W/2 ||W||_F^2 + lam_H/2 sum_s p_s ||h_s||^2
        ce = -(p * q * F.log_softmax(H @ W.T, 1)).sum()  # (S, d) @ (d, K) -> (S, K)
        return ce + math.sqrt(reg) / 2 * (W.square().sum() + G.square().sum())

    generator = torch.Generator().manual_seed(0)
    W, H = (torch.randn(n, K, generator=generator, dtype=torch.float64) / 2 for n in (K, len(q)))
    W, G = minimise(loss, W, H * p.sqrt())
    return W, G / p.sqrt()


def mixed_labels(n, sampler: str, alpha: float = 1.0) -> tuple:
    """(a, b, lam, probability), each (2 K^2,): class pairs times two values for lam ~ Beta(alpha, alpha).

    n (K,) images per class. instance: both images from the pool. class: both classes uniform. balanced: BMLS.
    """
    K = len(n)
    share = np.asarray(n) / np.sum(n)
    a, b = (v.ravel() for v in np.mgrid[:K, :K])
    probability = {
        "instance": share[a] * share[b],
        "class": np.full(K * K, 1 / K**2),
        # K (K + 1) / 2 unordered labels; a cross label comes in two orders, each with half of its share
        "balanced": np.where(a == b, 2, 1) / (K * (K + 1)),
    }
    # thresholds need E[lam] and E[lam^2] only: two values of lam, one std beside 1/2, have Beta's
    std = 1 / math.sqrt(4 * (2 * alpha + 1))
    lam = np.tile([1 / 2 - std, 1 / 2 + std], K * K)
    return a.repeat(2), b.repeat(2), lam, probability[sampler].repeat(2) / 2


def rare_cosine(sampler: str, times: float) -> float:
    """Mean cosine of the class vectors of five rare classes among ten, at n_B / N = times * lam_W lam_H."""
    reg = 0.02  # lam_W lam_H
    share = times * reg
    n = [1 / 5 - share] * 5 + [share] * 5
    unmixed = (range(10), range(10), [1.0] * 10, n)
    W, _ = layer_peeled(10, unmixed if sampler == "ce" else mixed_labels(n, sampler), reg)
    return mean_pairwise_cosine(W, torch.arange(5, 10))


def check_theory(folder: Path) -> dict:
    """Print the chapter's story, each claim against direct optimisation or simulation; draw synthetic.png."""
    claims = Claims()
    # Collapse <=> the contrast between two minority classes is worth at most lam_W lam_H in E[q q^T]:
    #     n_B / N without Mixup;  E[lam^2 + (1-lam)^2] n_B / N = (alpha+1)/(2 alpha+1) n_B / N with it
    cosine = rare_cosine("ce", 0.9)
    claims.equal("Few enough images: all rare classes share one vector, cosine", 1, cosine, 1e-6)
    edge = locate(lambda times: rare_cosine("ce", times) > 0.99, 0.9, 1.15)
    claims.equal("They do up to (n_B/N) / (lam_W lam_H) =", 1, edge, 0.01)
    edge = locate(lambda times: rare_cosine("instance", times) > 0.99, 1.35, 1.7)
    claims.equal("Mixup moves this threshold to (2 alpha+1)/(alpha+1) =", 3 / 2, edge, 0.015)
    claims.at_most("Between the two, at 1.25, cross-entropy does not: cosine", 0.5, rare_cosine("ce", 1.25))
    claims.equal("   Mixup does: cosine", 1, rare_cosine("instance", 1.25), 1e-6)
    simplex = rare_cosine("balanced", 1.25)
    claims.equal("   balanced mixed labels give a simplex: -1/(K-1)", -1 / 9, simplex, 1e-6)
    check_samplers(claims)
    check_losses(claims)
    draw_thresholds(folder / "synthetic.png")
    return claims.report(folder / "synthetic.png")


def check_samplers(claims: Claims) -> None:
    """How often does a mixed label come?"""
    K = 10
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(K).repeat_interleave(torch.tensor([1000, 562, 316, 178, 100, 56, 31, 17, 10, 5]))
    sampler = InstanceSampler(y, K, generator)
    labels = torch.cat([y[sampler.draw(len(y))] for _ in range(2000)])  # (., 2)
    zeros, fours = ((labels == k).all(1).sum().item() for k in (0, 4))
    claims.equal("Mixup: label (0, 0) to label (4, 4), of a class 10 times rarer", 10**2, zeros / fours, 6)

    sampler = BalancedMixedLabelSampler(y, K, generator)
    counts = torch.zeros(K, K, dtype=torch.long)
    worst = 0
    for _ in range(200):  # epochs of 999, no multiple of 55 pairs: each begins in the middle of a sweep
        low, high = y[sampler.draw(999)].sort(1).values.unbind(1)
        counts.index_put_((low, high), torch.tensor(1), accumulate=True)
        drawn = counts[torch.triu_indices(K, K).unbind()]
        worst = max(worst, int(drawn.max() - drawn.min()))
    claims.at_most("BMLS: most less least often drawn label, after any epoch", 1, worst)


def check_losses(claims: Claims) -> None:
    """Where do the Mixed-Singleton losses send the feature of (0, 1, lam = 0.7) under a fixed simplex ETF?"""
    generator = torch.Generator().manual_seed(0)
    W = simplex_etf(10, 10, generator)
    a = torch.tensor([0])
    b = torch.tensor([1])
    lam = torch.tensor([0.7], dtype=torch.float64)
    start = torch.randn(1, 10, generator=generator, dtype=torch.float64)
    # inf L = min_t log(1 + e^{-lam t}) + log(1 + e^{(1-lam) t}), t = z_0 - z_1: the others' logits fall away
    t = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    floor = (F.softplus(-0.7 * t) + F.softplus(0.3 * t)).min().item()
    (h,) = minimise(lambda h: ms_raw(h @ W.T, a, b, lam), 0 * start)
    reached = ms_raw(h @ W.T, a, b, lam).item()
    claims.equal("MS raw cannot reach 0: its floor at lam = 0.7", floor, reached, 1e-5)
    (h,) = minimise(lambda h: ms_dot(F.normalize(h), W, a, b, lam), start)
    cosine = F.cosine_similarity(h, 0.7 * W[:1] + 0.3 * W[1:2]).item()
    claims.equal("MS dot sends the feature to the mixed class vector: cosine", 1, cosine, 1e-5)


def draw_thresholds(path: Path) -> None:
    """From which share of the images on does a rare class keep a class vector of its own?"""
    x = [0.5, 0.7, 0.98, 1.04, 1.15, 1.48, 1.57, 1.75, 2.2, 3.2]
    names = {"ce": "cross-entropy", "instance": "Mixup", "balanced": "balanced mixed labels"}
    style = styles(names.values())
    points = {name: (x, [rare_cosine(sampler, times) for times in x]) for sampler, name in names.items()}
    for name, edge in (("cross-entropy", 1), ("Mixup", 3 / 2)):
        points[f"{name}: predicted"] = [edge, edge], [-0.2, 1.05]
        style[f"{name}: predicted"] = {"color": style[name]["color"], "ls": "--"}
    axes = {"xlabel": "share of one rare class, (n_B / N) / (lam_W lam_H)"}
    curves(path, points, style, ylabel="mean cosine of the rare classes' vectors", **axes)


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
        self.new = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new - self.new // 2)
            )
        return F.relu(x + y)


class ResNet32(nn.Module):
    """The CIFAR ResNet of He et al. 2016, section 4.2: 3 stages of 5 blocks, 0.46 M parameters at width 1.

    Not ResNet-34, which has 21 M. Images (B, C, H, W) of any size -> features h (B, 64 * width), h >= 0.
    """

    def __init__(self, channels: int = 3, width: int = 1):
        super().__init__()
        stages = [16 * width, 32 * width, 64 * width]
        self.d = stages[-1]
        self.conv = nn.Conv2d(channels, stages[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(stages[0])
        blocks = []
        now = stages[0]
        for stage, c in enumerate(stages):
            for i in range(5):
                blocks.append(Block(now, c, stride=2 if stage and i == 0 else 1))
                now = c
        self.blocks = nn.Sequential(*blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3))  # global average pool


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

NETWORKS = {"resnet32": ResNet32, "cnn": SmallCNN}


class Classifier(nn.Module):
    """Class vectors W (K, d), learnable or a fixed simplex ETF, without bias. Always in float32.

    cosine False: logits z = h W^T. True: BatchNorm1d, then h and W at unit length, z = scale * cos;
    BatchNorm comes first since features behind a ReLU fill one orthant only, and class vectors need them all.
    """

    def __init__(self, K: int, d: int, cosine: bool, fixed: bool, scale: float):
        super().__init__()
        self.cosine = cosine
        self.scale = scale if cosine else 1.0
        self.bn = nn.BatchNorm1d(d) if cosine else nn.Identity()
        if fixed:
            W = simplex_etf(K, d).float()
        else:
            W = torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)  # nn.Linear's default start
        self.W = nn.Parameter(W, requires_grad=not fixed)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, d) from the network -> h (B, d), W (K, d) as the loss sees them, and logits z (B, K)."""
        h = self.bn(h.float())
        W = self.W
        if self.cosine:
            h = F.normalize(h, dim=1)
            W = F.normalize(W, dim=1)
        return h, W, self.scale * h @ W.T


def build_model(args: argparse.Namespace, method: "Method", data: Dataset) -> nn.ModuleDict:
    """Network and classifier; which head the method needs is decided here. Raises UserError for d < K - 1."""
    K = len(data.classes)
    network = NETWORKS[args.net](data.train_x.shape[3], args.width)
    fixed = args.classifier == "etf"
    if fixed and network.d < K - 1:
        raise UserError(f"--classifier etf: {K} classes need {K - 1} feature dimensions, not {network.d}")
    cosine = fixed or (method.loss == "ms" and args.ms != "raw")
    least = 3 * ranks()[1]  # cut evenly, no batch holds a single image then, which BatchNorm1d cannot use
    if cosine and args.batch_size < least:
        raise UserError(f"--batch-size {args.batch_size}: expected {least} or more for a cosine head")
    classifier = Classifier(K, network.d, cosine, fixed, args.scale)
    return nn.ModuleDict({"network": network, "classifier": classifier})


# %% [markdown]
# # 4. Training
# A method is a sampler of pairs, a loss, and whether the two images of a pair are mixed.


# %%
class Method(NamedTuple):
    sampler: str  # a key of SAMPLERS
    loss: str  # a key of LOSSES; `ms` is the one that --ms names
    mixes: bool  # are the two images of a draw mixed? if not, the first is trained on and lam is 1
    about: str


METHODS = {
    "ce": Method("instance", "ce", False, "cross-entropy"),
    "balanced-softmax": Method("instance", "balanced-softmax", False, "cross-entropy of z + log n_k"),
    "mixup": Method("instance", "mixup", True, "Mixup of two shuffles of the training images"),
    "remix": Method("instance", "remix", True, "Mixup whose label goes to the much rarer class"),
    "cb-mixup": Method("class", "mixup", True, "Mixup of two class-balanced draws"),
    "bmls": Method("balanced", "mixup", True, "Mixup with exactly balanced pairs of classes (remedy 1)"),
    "cb+ms": Method("class", "ms", True, "class-balanced draws with the Mixed-Singleton loss"),
    "bmls+ms": Method("balanced", "ms", True, "balanced pairs with the Mixed-Singleton loss (both remedies)"),
}
USUAL = ["ce", "mixup", "bmls+ms"]  # what is trained without --method
SAMPLERS = {"instance": InstanceSampler, "class": ClassBalancedSampler, "balanced": BalancedMixedLabelSampler}
# h (B, d), W (K, d), z (B, K) of the classifier; labels a, b (B,); lam (B,); n (K,) training images per class
LOSSES = {
    "ce": lambda h, W, z, a, b, lam, n: F.cross_entropy(z, a),
    "balanced-softmax": lambda h, W, z, a, b, lam, n: balanced_softmax(z, a, n),
    "mixup": lambda h, W, z, a, b, lam, n: mixup_loss(z, a, b, lam),
    "remix": lambda h, W, z, a, b, lam, n: mixup_loss(z, a, b, remix_lam(lam, n[a], n[b])),
    "ms-raw": lambda h, W, z, a, b, lam, n: ms_raw(z, a, b, lam),
    "ms-unit": lambda h, W, z, a, b, lam, n: ms_unit(W, z, a, b, lam),
    "ms-dot": lambda h, W, z, a, b, lam, n: ms_dot(h, W, a, b, lam),
}
# What published recipes leave to the user: small sets need small batches and fewer epochs.
# On digits, a step profile with a strong weight decay, at which theory has the minority collapse.
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "weight_decay": 2e-4, "net": "resnet32"},
    "digits": {"epochs": 60, "batch_size": 32, "weight_decay": 5e-3, "net": "cnn"},
    "mnist": {"epochs": 40},
    "fashionmnist": {"epochs": 100},
}
RECIPES[""] |= {"lr": 0.1, "profile": "exp", "imbalance": 100.0}
RECIPES["digits"] |= {"profile": "step", "imbalance": 140.0}


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160, a hundredth after 180; in proportion."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    drop = (1.0, 0.1, 0.01)[(done > 0.8) + (done > 0.9)]
    return args.lr * min(1, (epoch + 1) / warmup) * drop


def draw_lam(method: Method, args: argparse.Namespace, T: int, generator: torch.Generator) -> Tensor:
    """lam ~ Beta(alpha, alpha) of T mixed samples, (T,): one per batch or per pair; 1 if unmixed."""
    sizes = torch.tensor([part.stop - part.start for part in split_evenly(T, args.batch_size)])
    draws = len(sizes) if args.lam == "batch" else T
    seed = int(torch.randint(2**31, (), generator=generator))  # torch's own Beta takes no generator
    lam = torch.from_numpy(np.random.default_rng(seed).beta(args.alpha, args.alpha, draws)).float()
    if args.lam == "batch":
        lam = lam.repeat_interleave(sizes)
    return lam if method.mixes else torch.ones(T)


def train(args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[name]
    K = len(data.classes)
    N = len(data.train_y)
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # pairs, crops, flips and lam
    model = build_model(args, method, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile, several GPUs
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    options = {"pairs": args.pairs} if method.sampler == "balanced" else {}
    sampler = SAMPLERS[method.sampler](data.train_y, K, generator, **options)
    loss_of = LOSSES[f"ms-{args.ms}" if method.loss == "ms" else method.loss]
    images = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device)
    n = data.counts.to(run.device)  # (K,)

    parts = {"model": model, "optimizer": optimizer, "generator": generator, "sampler": sampler}
    for epoch in run.epochs(args.epochs, **parts):  # from the last checkpoint on
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        # An epoch is N mixed samples, so that every method takes the same number of steps
        pairs = sampler.draw(N)  # (N, 2): the two images of each mixed sample
        labels = data.train_y[pairs].to(run.device)  # (N, 2)
        batches = images.epoch(pairs, args.batch_size, generator)  # every draw has a crop and flip of its own
        lam = draw_lam(method, args, N, generator).to(run.device)  # (N,)
        model.train()
        for part, x_a, x_b in batches:  # (B, C, H, W) each
            a, b = labels[part].unbind(1)  # (B,) each
            mix = lam[part, None, None, None]
            with run.autocast():  # bf16 inside the network only
                h = network(mix * x_a + (1 - mix) * x_b)  # (B, d)
            h, W, z = classifier(h)  # (B, d), (K, d), (B, K)
            loss = loss_of(h, W, z, a, b, lam[part], n)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(lr=lr)
        if run.is_test_epoch(epoch):  # every --eval-every epochs, and after the last one
            run.log(**test(model, data, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results


# %%
@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: Dataset, run: Run) -> tuple[Tensor, Tensor]:
    """Features h (N, d) of every image in order, unaugmented, and W (K, d); the logits are h W^T."""
    model.eval()
    hs = []
    for _, x in Batches(images, data.mean, data.std, device=run.device).all():
        with run.autocast():
            h = model["network"](x)
        h, W, _ = model["classifier"](h)
        hs.append(h)
    where = metric_device(run.device)
    return torch.cat(hs).to(where), (model["classifier"].scale * W).to(where)


def test(model: nn.ModuleDict, data: Dataset, run: Run) -> dict[str, float]:
    """Test accuracy, overall and by class size, and how far the rare classes' vectors have collapsed."""
    h, W = embed(model, data.test_x, data, run)
    counts = data.counts.to(h.device)
    found = accuracies(h @ W.T, data.test_y.to(h.device), counts)
    found["minority_cosine_W"] = mean_pairwise_cosine(W, shot_groups(counts)[0]["few"])
    return {key: found[key] for key in ("accuracy", "many", "medium", "few", "minority_cosine_W")}


def measure(model: nn.ModuleDict, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz, where z = h W^T."""
    train_h, W = embed(model, data.train_x, data, run)
    test_h, _ = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(W.device)
    test_y = data.test_y.to(W.device)
    counts = data.counts.to(W.device)
    z = test_h @ W.T
    fitted = (train_h @ W.T).argmax(1)
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    return {
        **accuracies(z, test_y, counts),
        "ece": expected_calibration_error(z.softmax(1), test_y),
        "train_accuracy": float((fitted == train_y).double().mean()),
        **collapse_metrics(train_h, train_y, W, fitted, shot_groups(counts)[0]["few"]),
        "heads": heads(train_h, train_y, test_h, test_y, W),
        "counts": counts.tolist(),
    }


# [copied: draw_figures]
def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Three figures of finished runs, methods side by side; means over seeds, heat maps of the first seed."""
    order = np.argsort(-np.array(runs[0].finished["counts"]), kind="stable")  # largest class first
    file, key, factor, label = PROGRESS
    over_epochs = {}
    maps = {}
    by_head = {title: {} for title in HEADS.values()}  # {head: {method: accuracy of every seed}}
    for name in METHODS:
        found = [run for run in runs if run.name == name]
        if not found:
            continue
        tested = [[line for line in run.history if "accuracy" in line] for run in found]
        values = factor * np.mean([[line[key] for line in lines] for lines in tested], axis=0)
        over_epochs[name] = [line["epoch"] for line in tested[0]], values
        maps[name] = cosines(torch.from_numpy(found[0].load_features()["W"][order])).numpy()
        np.fill_diagonal(maps[name], np.nan)
        for head, title in HEADS.items():
            by_head[title][name] = [100 * run.finished["heads"][head] for run in found]

    style = styles(dict.fromkeys([*USUAL, *METHODS]))  # the strongest colours first
    curves(folder / file, over_epochs, style, xlabel="epoch", ylabel=label)
    axes = {"xlabel": "class, largest first", "ylabel": "class, largest first"}
    heat_maps(folder / "class_vectors.png", maps, label="cosine", limits=(-1, 1), diverging=True, **axes)
    bars(folder / "heads.png", by_head, styles(by_head), ylabel="test accuracy (%)", ylim=(0, 100))


# [end copied]
# What is drawn over epochs: the file, the entry of metrics.jsonl, its factor and label
PROGRESS = "minority_cosine.png", "minority_cosine_W", 1, "mean cosine of the rare classes' vectors"


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per method, mean ± std over seeds, and what its columns and figures mean."""
    rows = []
    for name in METHODS:
        found = [run.finished for run in runs if run.name == name]
        if not found:
            continue
        percent = ["accuracy", "train_accuracy", "many", "medium", "few", "best_accuracy", "ece"]
        cells = [mean_std([result[key] for result in found], 1, 100) for key in percent]
        cells.append(mean_std([result["minority_cosine_W"] for result in found], 2))
        for head in ("minus_log_n", "nearest_mean"):
            cells.append(mean_std([result["heads"][head] for result in found], 1, 100))
        rows.append([name, len(found), *cells])
    header = ["method", "seeds", "accuracy", "train", "many", "medium", "few", "best", "ECE", "cos few"]
    print("\n" + table([*header, "-log n", "near mean"], rows))
    print(f"""accuracy: % of the test images after the last epoch; train: of the training images, unaugmented
{runs[0].finished["rule"]}
best: highest accuracy of the tested epochs, chosen on the test set; ECE: calibration error, %
cos few: mean cosine of the few's class vectors; 1: minority collapse, -1/(K-1): a simplex; -: no such class
-log n: the same logits less log n_k; near mean: nearest class mean of the same features""")
    for name in dict.fromkeys(run.name for run in runs):
        print(f"{name}: {METHODS[name].about}")
    print(f"""figures in {folder}:
  minority_cosine.png    cosine of the rare classes' vectors over epochs: 1 is collapse
  class_vectors.png      cosines of class vectors: a red block at the lower right is minority collapse
  heads.png              what the same features give under other heads, without training""")


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    about = {name: method.about for name, method in METHODS.items()}
    defaults = {"dataset": "digitslt", "eval_every": 5}
    title = __doc__.partition("\n")[0]
    flags = Arguments("bmls_msclf", title, about, USUAL, RECIPES, **defaults)
    add = flags.add
    add("--net", choices=list(NETWORKS), help="network")
    add("--width", type=at_least(1), default=1, help="channels times this; d is 64 or 128 times this")
    add("--classifier", choices=["learnable", "etf"], default="learnable", help="etf: fixed, d >= K - 1")
    add("--scale", type=positive, default=16.0, help="factor of the logits of unit vectors (unit, dot, etf)")
    add("--alpha", type=positive, default=1.0, help="lam is drawn from Beta(alpha, alpha)")
    add("--lam", choices=["batch", "pair"], default="batch", help="one lam per batch, or one per pair")
    add("--pairs", choices=["unordered", "ordered", "distinct"], default="unordered", help="what is balanced")
    add("--ms", choices=["raw", "unit", "dot"], default="raw", help="reading of the Mixed-Singleton loss")
    args = flags.parse(argv)
    if args.ms == "dot" and args.classifier != "etf":
        raise UserError("--ms dot: without negatives a learnable classifier collapses; add --classifier etf")
    return args


def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "bmls_msclf" / "synthetic")
    data = prepare_data(args)
    for name in args.method:  # says what is wrong with a model before the first one is trained
        build_model(args, METHODS[name], data)
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
