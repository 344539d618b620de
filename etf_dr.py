# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Minority collapse of a learnable classifier, and a remedy: fixed simplex-ETF class vectors, dot-regression.

Source: Y. Yang, S. Chen, X. Li, L. Xie, Z. Lin, D. Tao, Inducing Neural Collapse in Imbalanced Learning: Do
We Really Need a Learnable Classifier at the End of Deep Neural Network? (NeurIPS 2022, arXiv 2203.09081),
and the code that its authors released (NeuralCollapseApplications/ImbalancedLearning).

WHAT COLLAPSES. Train features h and class vectors w_k to the end on balanced classes and they become a
simplex ETF: K vectors of one length, every pairwise cosine -1/(K-1), features on top of their class vectors
(neural collapse). On imbalanced classes they do not. The gradient of cross-entropy has a pull and a push,

    dCE/dh   = -(1 - p_y) w_y + sum_{k != y} p_k w_k              p = softmax(W h)
    dCE/dw_k = 1/B [-sum_{i: y_i = k} (1 - p_ik) h_i + sum_{i: y_i != k} p_ik h_i]

and the vector of a rare class has a pull from few features and a push from many. All rare classes have the
same push, so their vectors move alike: from some ratio of the class sizes on they are one and the same
vector (minority collapse; Fang et al. 2021. bmls_msclf.py derives that ratio).

REMEDY 1, the classifier: draw a random simplex ETF and never train it. Then (Theorem 1) with ||h||^2 <= E_H
and ||w_k||^2 = E_W the least CE is at h = sqrt(E_H/E_W) w_y for every sample, whatever the class counts.
REMEDY 2, the loss: with the target known, regress on it. A pull, no push, and the same optimum:

    L_DR = 1/(2 sqrt(E_W E_H)) (w_y . h - sqrt(E_W E_H))^2        dL/dh = -(1 - cos angle(h, w_y)) w_y

    python etf_dr.py                                              digits, long-tailed; a minute on two cores
    python etf_dr.py --synthetic                                  the theory above, claim by claim
    python etf_dr.py --dataset cifar100lt --method ce+mixup etf+dr+mixup --seed 0 1 2
    torchrun --nproc-per-node 4 etf_dr.py --dataset folder:PATH   four GPUs

PAPER, RELEASED CODE AND THIS FILE
- Class lengths (released, not in the paper): w_k has length sqrt(gamma / n_k), gamma = mean n_k.
  That weighs samples by inverse frequency (derived below); the cross-entropy beside it has no weights.
  --class-length off takes them from dot-regression, --reweight on gives them to cross-entropy.
- The released learnable classifier is frozen at its random start (requires_grad is False). Ours learns, on
  the features as they are, without bias.
- With unit vectors and K classes ETF + CE cannot be surer than p = .25 (K = 10) or .03 (K = 100). That is
  what was released; --E-W 256 is a temperature of 16.
- Faster convergence of DR (claimed with the paper's Theorem 2, whose wording we do not have) is a matter of
  E = sqrt(E_W E_H) and of the angle: from far away and at E = 10 it is the faster one, at the released E = 1
  it is not, and in the end, where its gradient fades as the angle cubed, never (tests/test_etf_dr_theory.py).
- Mixup: a batch with a permutation of itself, one lam ~ Beta(alpha, alpha) per batch, the two losses mixed,
  class lengths from the unmixed labels, as released. Here both images of a pair have a crop of their own.
- As released, every configuration has Mixup, cross-entropy too: the released pair is `ce+mixup` (--reweight
  off) against `etf+dr+mixup`. Schedule, augmentation, weight decay (on BatchNorm too), sampling and width
  (doubled for CIFAR-100) are the released ones; normalisation is by our data. They report the best epoch on
  the test set; we report the last one, and the best of those tested beside it.
- SVHN and STL-10 have augmentation and their own statistics here, none of it there. The released long-tailed
  SVHN trains on the parts train and extra, both long-tailed, ours on train alone; it appends more labels than
  images for classes that are too small, so that labels slide; ours cannot.
- ImageNet-LT (folder:PATH) differs more: ResNet-50 with d = 2048 where the paper widens the last stage to
  4096; the step schedule, weight decay and batch of the flags, where it has a cosine from .1, 5e-4, 1024;
  features at unit length, where it has BatchNorm and a penalty on the norm; crop and flip, no colour jitter.
"""

# %% [markdown]
# # 1. The method
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def class_length(y: Tensor, K: int) -> Tensor:
    """Length of each class vector in this batch (released code only), (K,); y (B,) the unmixed labels.

    Rare classes get long vectors. Absent classes get 1, which nothing uses.
    """
    n = torch.bincount(y, minlength=K)  # (K,)
    # l_k = sqrt(gamma / n_k), gamma = B / (number of classes in the batch)
    gamma = len(y) / (n > 0).sum()
    return torch.where(n > 0, (gamma / n.clamp_min(1)).sqrt(), 1.0)


def dot_regression_loss(
    h: Tensor, W: Tensor, y: Tensor, weight: Tensor | None = None, E_W: float = 1.0, E_H: float = 1.0
) -> Tensor:
    """Pull each feature to its own class vector and push it from none (Yang et al. 2022) -> scalar >= 0.

    h (B, d) with ||h||^2 <= E_H, W (K, d) with ||w_k||^2 = E_W, y (B,). Zero exactly where every
    h = sqrt(E_H/E_W) w_y. weight (B,): of each sample's loss, 1 if not given.
    Class lengths are weights, class_length(y, K)[y]**2: the released code lengthens w_y to l_y w_y and asks
    for w_y . h = l_y E, but does not divide by l_y as the paper's 1/(2 sqrt(E_W E_H)) would have it. So L
    gets the factor l_y^2 = gamma / n_y, the inverse frequency of the class in the batch. (The paper's: l_y.)
    """
    E = math.sqrt(E_W * E_H)
    # L = 1/(2E) (w_y . h - E)^2, E = sqrt(E_W E_H)             (B, d) * (B, d) -> (B,)
    loss = ((h * W[y]).sum(1) - E).square() / (2 * E)
    return loss.mean() if weight is None else (weight * loss).mean()


def cross_entropy_loss(h: Tensor, W: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with logits h . w_k. Shapes and weight as in dot_regression_loss -> scalar."""
    loss = F.cross_entropy(h @ W.T.to(h.dtype), y, reduction="none")  # (B, d) @ (d, K) -> (B, K); (B,)
    return loss.mean() if weight is None else (weight * loss).mean()


# Gradients in two parts, in closed form: they explain, training leaves them to autograd.


def ce_feature_gradient(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dCE/dh of each sample: pull to its own class vector, push from the others; two (B, d)."""
    p = (h @ W.T).softmax(1)  # (B, K)
    own = F.one_hot(y, len(W)).to(p.dtype)  # (B, K)
    # dCE/dh = -(1 - p_y) w_y + sum_{k != y} p_k w_k
    pull = (own * p - own) @ W
    push = (p - own * p) @ W
    return pull, push


def ce_classifier_gradient(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """d(mean CE)/dW: the pull of a class's own features, the push of all others; two (K, d).

    Two rare classes are pushed by the same features with almost the same p: their vectors move alike and end
    up alike. That is the collapse.
    """
    p = (h @ W.T).softmax(1)  # (B, K)
    own = F.one_hot(y, len(W)).to(p.dtype)  # (B, K)
    # dL/dw_k = 1/B [-sum_{i: y_i = k} (1 - p_ik) h_i + sum_{i: y_i != k} p_ik h_i]
    pull = (own * p - own).T @ h / len(h)
    push = (p - own * p).T @ h / len(h)
    return pull, push


def dr_feature_gradient(h: Tensor, W: Tensor, y: Tensor, E_W: float = 1.0, E_H: float = 1.0) -> Tensor:
    """Gradient of dot-regression in h of each sample: a pull that fades as the angle closes. (B, d)"""
    # dL/dh = -(1 - w_y . h / E) w_y                             on the sphere: -(1 - cos angle(h, w_y)) w_y
    along = (h * W[y]).sum(1, keepdim=True) / math.sqrt(E_W * E_H)  # (B, 1)
    return (along - 1) * W[y]


# %% Imports of the other cells
import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from common import (
    COLOURS,
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
    finished_runs,
    heads,
    heat_maps,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    minimise,
    open_run,
    positive,
    prepare_data,
    ranks,
    save_figure,
    shot_groups,
    split_evenly,
    styles,
    table,
)

# %% [markdown]
# # 2. Theory check
# The layer-peeled model: a network below the last layer so flexible that every sample has a free feature.

# %%


def learnable_optimum(counts, E_W: float, E_H: float) -> tuple[Tensor, Tensor]:
    """Learnable classifier: optimal W (K, d) and class features H (K, d), d = K, for class counts (K,).

    min sum_k n_k/N CE(W h_k, k) with (1/K) sum ||w_k||^2 = E_W and (1/K) sum ||h_k||^2 = E_H (Fang et al.
    2021). Not convex in (W, H), but at d >= K without bad local minima. One feature per class is enough.
    """
    K = len(counts)
    share = torch.as_tensor(counts, dtype=torch.float64) / sum(counts)  # (K,)

    def on_budget(V, G):  # the optimum uses both budgets whole
        return V * math.sqrt(E_W * K) / V.norm(), G * math.sqrt(E_H * K) / G.norm()

    def loss(V, G):
        W, H = on_budget(V, G)
        return cross_entropy_loss(H, W, torch.arange(K), K * share)

    generator = torch.Generator().manual_seed(0)
    V, G = torch.randn(2, K, K, generator=generator, dtype=torch.float64) / 2
    return on_budget(*minimise(loss, V, G))


def fixed_optimum(loss, W: Tensor, y: Tensor, E_H: float) -> Tensor:
    """Fixed classifier W (K, d): the features of all samples, (N, d), that minimise loss(H, W, y).

    Searched in the whole ball ||h||^2 <= E_H, from random points inside: beyond it G is pulled back.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(y), W.shape[1], generator=generator, dtype=torch.float64) / 10

    def ball(G):
        return math.sqrt(E_H) * G / G.norm(dim=1, keepdim=True).clamp_min(1)

    # times N: the mean hides a sample behind all others, and L-BFGS stops on the gradient
    (G,) = minimise(lambda G: len(y) * loss(ball(G), W, y), start)
    return ball(G)


def optimal_loss(K: int, E: float) -> float:
    """Theorem 1: least CE under a fixed ETF, E = sqrt(E_W E_H), whatever the class counts."""
    # at h = sqrt(E_H/E_W) w_y: h . w_k = E (K/(K-1) [k = y] - 1/(K-1))
    return math.log1p((K - 1) * math.exp(-E * K / (K - 1)))


def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against direct optimisation; draw simplex.png."""
    K = 10
    E_W = 1
    E_H = 5  # the setting of Fang et al.
    counts = [100] * 5 + [1] * 5
    claims = Claims()

    W, _ = learnable_optimum([1] * K, E_W, E_H)
    cosine = mean_pairwise_cosine(W, torch.arange(K))
    claims.equal("Ten equal classes: learnt vectors are a simplex, cosine -1/(K-1)", -1 / 9, cosine, 1e-6)
    W, _ = learnable_optimum(counts, E_W, E_H)
    cosine = mean_pairwise_cosine(W, torch.arange(5, 10))
    claims.equal("Five have 1/100 of the images: they share one vector, cosine", 1, cosine, 1e-6)

    # Theorem 1: with a fixed simplex the optimum is neural collapse, however imbalanced the classes
    W = math.sqrt(E_W) * simplex_etf(K, K, torch.Generator().manual_seed(0))
    y = torch.arange(K).repeat_interleave(torch.tensor(counts))
    H = fixed_optimum(cross_entropy_loss, W, y, E_H)
    least = optimal_loss(K, math.sqrt(E_W * E_H))
    reached = cross_entropy_loss(H, W, y).item()
    claims.equal("On a fixed simplex the least CE is log(1+(K-1)exp(-E K/(K-1)))", least, reached, 1e-9)
    farthest = (H - math.sqrt(E_H / E_W) * W[y]).norm(dim=1).max().item()
    claims.equal("   with every feature, rare too, on its own vector: distance", 0, farthest, 1e-5)

    def dr(H, W, y):
        return dot_regression_loss(H, W, y, None, E_W, E_H)

    reached = dr(fixed_optimum(dr, W, y, E_H), W, y).item()
    claims.equal("Dot-regression ends at the same place: loss", 0, reached, 1e-9)

    # lam = 1/2: the best h has cosine sqrt((K-2) / (2 (K-1))) with both class vectors
    floor = (1 - math.sqrt((K - 2) / (2 * (K - 1)))) ** 2 / 2
    pair = torch.tensor([0, 1])

    def mixed(h):  # both terms, at lengths 1
        return dot_regression_loss(F.normalize(h).expand(2, -1), F.normalize(W), pair)

    reached = mixed(*minimise(mixed, W[:1] + W[2:3])).item()
    claims.equal("With Mixup dot-regression keeps a loss: its floor at lam = 1/2", floor, reached, 1e-9)

    draw_simplex(folder / "simplex.png")
    return claims.report(folder / "simplex.png")


def draw_simplex(path: Path) -> None:
    """Class vectors of 3 and 4 classes, two of them rare: a fixed simplex beside the learnt optima."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    colours = [COLOURS[1], COLOURS[4], COLOURS[0], COLOURS[5]]
    for row, K in enumerate((3, 4)):
        names = ["rare", "rare 2", "common", "common 2"][:K]
        simplex = simplex_etf(K, K - 1, torch.Generator().manual_seed(1))
        pictures = {f"K = {K}, fixed: any class sizes": simplex}
        for ratio in (1, 100):
            W, _ = learnable_optimum([1, 1, ratio, ratio][:K], 1, 1)
            U, _, Vh = torch.linalg.svd(W.T @ simplex, full_matrices=False)
            pictures[f"K = {K}, learnt: {ratio} to 1"] = W @ U @ Vh  # turned to lie along the fixed one
        for column, (title, V) in enumerate(pictures.items()):
            plot = figure.add_subplot(2, 3, 3 * row + column + 1, projection="3d" if K == 4 else None)
            for a, b in torch.combinations(torch.arange(K)).tolist():
                plot.plot(*V[[a, b]].T.tolist(), color="0.8", lw=1)  # the edges: a triangle, a tetrahedron
            for name, tip, colour in zip(names, V.tolist(), colours, strict=False):
                width = 1.5 if name == "rare 2" else 4  # thin: seen on top of the other
                plot.plot(*[(0, x) for x in tip], color=colour, lw=width, label=name)
            plot.set(title=title, aspect="equal", xlim=(-1.2, 1.4), ylim=(-1.2, 1.2))
            if K == 4:
                plot.set_zlim(-1.2, 1.2)
                plot.set_box_aspect((2.6, 2.4, 2.4), zoom=1.6)
            plot.axis("off")
    figure.legend(*plot.get_legend_handles_labels(), title="class", loc="outside right upper", frameon=False)
    save_figure(path, figure)


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


class Classifier(nn.Module):
    """Class vectors W (K, d) without bias, learnable or a fixed simplex ETF. Always in float32.

    Learnable: logits h W^T of the pooled features as they are, the usual last layer.
    Fixed: BatchNorm1d, then ||h|| = 1 and ||w_k||^2 = E_W. Behind a ReLU features fill one orthant only, and
    an ETF's vectors point everywhere. No temperature but E_W, and no bias, as released.
    """

    def __init__(self, K: int, d: int, fixed: bool, E_W: float):
        super().__init__()
        self.fixed = fixed
        self.length = math.sqrt(E_W)
        self.bn = nn.BatchNorm1d(d) if fixed else nn.Identity()
        if fixed:
            W = simplex_etf(K, d).float()
        else:
            W = torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)  # nn.Linear's default start
        self.W = nn.Parameter(W, requires_grad=not fixed)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, d) from the network -> h (B, d) and W (K, d) as the loss sees them; logits are h W^T."""
        h = self.bn(h.float())
        W = self.W
        if self.fixed:
            h = F.normalize(h, dim=1)
            W = self.length * F.normalize(W, dim=1)
        return h, W


def resnet50(channels: int, width: int) -> nn.Module:
    """torchvision's, from scratch, without its last layer: (B, 3, H, W) -> h (B, 2048). It has one width."""
    from torchvision import models  # here, since importing it takes seconds

    network = models.resnet50(weights=None)
    network.fc = nn.Identity()
    network.d = 2048  # the paper widens the last stage to 4096
    return network


NETWORKS = {"resnet32": ResNet32, "cnn": SmallCNN, "resnet50": resnet50}


def build_model(args: argparse.Namespace, method: "Method", data: Dataset) -> nn.ModuleDict:
    """Network and classifier. Raises UserError for d < K - 1, and for resnet50 without colour."""
    K = len(data.classes)
    channels = data.train_x.shape[3]
    if args.net == "resnet50" and channels != 3:
        raise UserError(f"--net resnet50: expects 3 colour channels, not {channels}; take another network")
    network = NETWORKS[args.net](channels, args.width)
    if method.fixed and network.d < K - 1:
        needed = f"a simplex of {K} classes needs {K - 1} feature dimensions, not {network.d}"
        raise UserError(f"--method etf+...: {needed}; take a larger --width")
    classifier = Classifier(K, network.d, method.fixed, args.E_W)
    return nn.ModuleDict({"network": network, "classifier": classifier})


# %% [markdown]
# # 4. Training
# A method is a classifier, fixed or learnable, a loss, and whether images are mixed.


# %%
class Method(NamedTuple):
    fixed: bool  # simplex ETF, or a learnable classifier
    loss: str  # a key of LOSSES
    mixup: bool  # are an image and its partner mixed? if not, lam is 1
    about: str


METHODS = {
    "ce": Method(False, "ce", False, "learnable classifier, cross-entropy"),
    "ce+mixup": Method(False, "ce", True, "the same with Mixup: the baseline as released"),
    "etf+ce": Method(True, "ce", False, "fixed simplex ETF (remedy 1), cross-entropy"),
    "etf+dr": Method(True, "dr", False, "fixed simplex ETF, dot-regression (both remedies)"),
    "etf+dr+mixup": Method(True, "dr", True, "the same with Mixup: the method as released"),
}
USUAL = ["ce", "etf+ce", "etf+dr"]  # what is trained without --method
# h (B, d), W (K, d), y (B,), weight (B,) of each sample's loss, E_W -> scalar
LOSSES = {
    "ce": lambda h, W, y, weight, E_W: cross_entropy_loss(h, W, y, weight),
    "dr": lambda h, W, y, weight, E_W: dot_regression_loss(h, W, y, weight, E_W),
}
# What published recipes leave to the user: small sets need small batches and fewer epochs.
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "net": "resnet32", "width": 1},
    "digits": {"epochs": 120, "batch_size": 32, "net": "cnn"},
    "mnist": {"epochs": 40},
    "fashionmnist": {"epochs": 100},
    "cifar100": {"width": 2},
    "folder": {"epochs": 90, "batch_size": 256, "net": "resnet50"},
}


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160, a hundredth after 180; in proportion."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    drop = (1.0, 0.1, 0.01)[(done > 0.8) + (done > 0.9)]
    return args.lr * min(1, (epoch + 1) / warmup) * drop


def draw_pairs(batches: list[slice], generator: torch.Generator) -> Tensor:
    """An epoch of images, each beside its Mixup partner, (N, 2): every image once, whatever its class.

    The partners of a batch are a permutation of it, so that both columns have the same class counts.
    """
    order = torch.randperm(batches[-1].stop, generator=generator)  # (N,): instance-balanced
    pairs = []
    for batch in batches:
        image = order[batch]
        partner = image[torch.randperm(len(image), generator=generator)]
        pairs.append(torch.stack([image, partner], dim=1))
    return torch.cat(pairs)


def draw_lam(method: Method, alpha: float, batches: list[slice], generator: torch.Generator) -> Tensor:
    """lam of each sample, (N,): one draw of Beta(alpha, alpha) per batch; 1 without Mixup."""
    sizes = torch.tensor([batch.stop - batch.start for batch in batches])
    seed = int(torch.randint(2**31, (), generator=generator))  # torch's own Beta takes no generator
    lam = torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, len(sizes))).float()
    if not method.mixup:
        lam = torch.ones(len(sizes))
    return lam.repeat_interleave(sizes)


def length_weights(labels: Tensor, batches: list[slice], K: int) -> Tensor:
    """Weight of both labels of each sample, (N, 2): inverse class frequency in its batch; labels (N, 2)."""
    return torch.cat([class_length(labels[batch, 0], K)[labels[batch]].square() for batch in batches])


def train(args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[name]
    K = len(data.classes)
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # order, crops, flips, partners and lam
    model = build_model(args, method, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile, several GPUs
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    loss_of = LOSSES[method.loss]
    weighted = (args.class_length if method.loss == "dr" else args.reweight) == "on"
    images = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device)
    batches = split_evenly(len(data.train_y), args.batch_size)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        pairs = draw_pairs(batches, generator)  # (N, 2): image and Mixup partner of each sample
        labels = data.train_y[pairs]  # (N, 2)
        weights = length_weights(labels, batches, K) if weighted else torch.ones(labels.shape)  # (N, 2)
        labels = labels.to(run.device)
        weights = weights.to(run.device)
        lam = draw_lam(method, args.alpha, batches, generator).to(run.device)  # (N,)
        model.train()
        for part, x_a, x_b in images.epoch(pairs, args.batch_size, generator):  # (B, C, H, W) each
            mix = lam[part, None, None, None]
            with run.autocast():  # bf16 inside the network only
                h = network(mix * x_a + (1 - mix) * x_b)  # (B, d)
            h, W = classifier(h)  # (B, d), (K, d)
            # L = lam L(h, a) + (1 - lam) L(h, b): the losses are mixed, not the targets
            a, b = labels[part].unbind(1)  # (B,) each
            weight_a, weight_b = weights[part].unbind(1)
            loss = loss_of(h, W, a, lam[part] * weight_a, args.E_W)
            loss = loss + loss_of(h, W, b, (1 - lam[part]) * weight_b, args.E_W)
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
    """Features h (N, d) of every image in order, unaugmented, and W (K, d), as the loss sees them."""
    model.eval()
    hs = []
    loader = Batches(images, data.mean, data.std, device=run.device)
    for _, x in loader.all(1000 if loader.H < 64 else 100):
        with run.autocast():
            h = model["network"](x)
        h, W = model["classifier"](h)
        hs.append(h)
    where = metric_device(run.device)
    return torch.cat(hs).to(where), W.detach().to(where)


def test(model: nn.ModuleDict, data: Dataset, run: Run) -> dict[str, float]:
    """Test accuracy, overall and by class size, for this epoch's line of metrics.jsonl."""
    h, W = embed(model, data.test_x, data, run)
    found = accuracies(h @ W.T, data.test_y.to(h.device), data.counts.to(h.device))
    return {key: found[key] for key in ("accuracy", "many", "medium", "few")}


def measure(model: nn.ModuleDict, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz, where z = h W^T."""
    train_h, W = embed(model, data.train_x, data, run)
    test_h, _ = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(W.device)
    test_y = data.test_y.to(W.device)
    counts = data.counts.to(W.device)
    few = shot_groups(counts)[0]["few"]
    fitted = (train_h @ W.T).argmax(1)
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    return {
        **accuracies(test_h @ W.T, test_y, counts),
        "train_accuracy": float((fitted == train_y).double().mean()),
        **collapse_metrics(train_h, train_y, W, fitted, few),
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
PROGRESS = "training.png", "accuracy", 100, "test accuracy (%)"


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per method, mean ± std over seeds, and what its columns and figures mean."""
    rows = []
    for name in METHODS:
        found = [run.finished for run in runs if run.name == name]
        if not found:
            continue
        percent = ["accuracy", "train_accuracy", "many", "medium", "few", "best_accuracy"]
        cells = [mean_std([result[key] for result in found], 1, 100) for key in percent]
        for head in ("minus_log_n", "nearest_mean"):
            cells.append(mean_std([result["heads"][head] for result in found], 1, 100))
        for key in ("minority_cosine_W", "nc1"):
            cells.append(mean_std([result[key] for result in found], 2))
        rows.append([name, len(found), *cells])
    header = ["method", "seeds", "accuracy", "train", "many", "medium", "few", "best"]
    print("\n" + table([*header, "-log n", "near mean", "cos few", "NC1"], rows))
    print(f"""accuracy: % of the test images after the last epoch; train: of the training images, unaugmented
{runs[0].finished["rule"]}
best: highest accuracy of the tested epochs, chosen on the test set
-log n: the same logits less log n_k, which outweighs those of a fixed simplex (-E_W^.5 to E_W^.5)
near mean: nearest class mean of the same features
cos few: mean cosine of the few's class vectors; 1: minority collapse, -1/(K-1): a simplex; -: no such class
NC1: spread of features within classes over that between them; 0: collapsed onto their class means""")
    for name in dict.fromkeys(run.name for run in runs):
        print(f"{name}: {METHODS[name].about}")
    print(f"""figures in {folder}:
  training.png           test accuracy over epochs: which method gets there in how many
  heads.png              what the same features give under other heads, without training
  class_vectors.png      cosines of class vectors: a red block at the lower right is minority collapse""")


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = {name: method.about for name, method in METHODS.items()}
    defaults = {"dataset": "digitslt", "eval_every": 10, "image_size": 224}
    flags = Arguments("etf_dr", __doc__.partition("\n")[0], about, USUAL, RECIPES, **defaults)
    add = flags.add
    add("--net", choices=list(NETWORKS), help="network")
    add("--width", type=at_least(1), help="channels times this; not resnet50")
    add("--E-W", type=positive, default=1.0, help="squared length of the class vectors, where it is fixed")
    lengths = "dr: lengths sqrt(gamma / n_k) in each batch, as released: inverse-frequency weights"
    add("--class-length", choices=["on", "off"], default="on", help=lengths)
    add("--reweight", choices=["on", "off"], default="off", help="ce: the same weights for its samples")
    add("--alpha", type=positive, default=1.0, help="Mixup: lam is drawn from Beta(alpha, alpha)")
    return flags.parse(argv)


def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "etf_dr" / "synthetic")
    least = 3 * ranks()[1]  # cut evenly, no batch holds a single image then, which BatchNorm cannot use
    if args.batch_size < least:
        raise UserError(f"--batch-size {args.batch_size}: expected {least} or more")
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
