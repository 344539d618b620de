# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""ETF + DR against minority collapse: class vectors fixed as a simplex, trained by dot-regression.

Source: Y. Yang et al., Inducing Neural Collapse in Imbalanced Learning (NeurIPS 2022, arXiv 2203.09081), and
the code that its authors released (NeuralCollapseApplications/ImbalancedLearning).

WHAT COLLAPSES. A last layer compares the feature h of an image with one class vector w_k per class. On
balanced classes, trained to the end, the class vectors become a simplex ETF (equiangular tight frame: equal
lengths, every pairwise cosine -1/(K-1)) and features lie on them. Cross-entropy pulls w_k towards the
features of class k and pushes it away from all others. A rare class has few to pull and many to push, and
all rare classes are pushed alike. On a long tail their vectors become one and the same: minority collapse.

THE REMEDY has two parts. The class vectors are a random simplex ETF from the start and are never trained
(ETF). The loss pulls each feature towards its own class vector and pushes it from none (DR).

    python etf_dr.py                                 digits with a long tail; a minute on two cores
    python etf_dr.py --synthetic                     the theory, claim by claim
    python etf_dr.py --dataset cifar100lt --method ce+mixup etf+dr+mixup --seed 0 1 2
    torchrun --nproc-per-node 4 etf_dr.py --dataset cifar100lt --method etf+dr+mixup

PAPER, RELEASED CODE AND THIS FILE (more in results/etf_dr.md)

- The released code, not the paper, weighs images by inverse class frequency (`class_length`), under
  dot-regression only. --class-length off leaves this out, --reweight on gives it to cross-entropy.
- The released cross-entropy baseline has a classifier frozen at its random start, with a bias. Ours learns,
  and has no bias.
- As released: schedule, augmentation, weight decay on all parameters, Mixup within a batch, a network twice
  as wide for CIFAR-100. Not so: both images of a pair have a crop of their own, and the accuracy reported
  is the last epoch's, not the best on the test set. ImageNet-LT (ResNet-50) is left out.
- Whether DR converges faster, as the paper claims, depends on the lengths of h and w_k (theory tests).
"""

# %% [markdown]
# # 1. The method
# A simplex that stays, and a loss that pulls without a push. These cells run alone, pasted into a notebook.

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# %% [markdown]
# ## The simplex ETF: K directions as far apart as K can be
# $$ W = \sqrt{\tfrac{K}{K-1}}\, U Q^\top, \quad U U^\top = I - \tfrac{1}{K} 1 1^\top, \quad Q^\top Q = I
#    \quad\Rightarrow\quad w_k^\top w_j = \tfrac{K}{K-1} [k = j] - \tfrac{1}{K-1} $$
# [Papyan et al. 2020] Class vectors of balanced training end here. [Yang et al. 2022] Start here and stay: a
# vector that is fixed cannot be pushed onto another one.


# %%
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


# %% [markdown]
# ## Cross-entropy: a pull and a push
# $$ L_{CE} = -\log p_y, \quad p = \mathrm{softmax}(W h), \qquad \frac{\partial L_{CE}}{\partial h} =
#    \underbrace{-(1 - p_y)\, w_y}_{pull} + \underbrace{\sum_{k \neq y} p_k w_k}_{push} $$
# $$ \frac{\partial L_{CE}}{\partial w_k} = \frac{1}{B} \Big[
#    \underbrace{-\sum_{y_i = k} (1 - p_{ik})\, h_i}_{pull} +
#    \underbrace{\sum_{y_i \neq k} p_{ik}\, h_i}_{push} \Big] $$
# [Yang et al. 2022] The pull on the vector of a rare class has few terms, the push has many. Two rare
# classes are pushed by the same features with almost the same p, so that their vectors move alike.


# %%
def cross_entropy_loss(h: Tensor, W: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy with logits h . w_k -> scalar >= 0.

    h (B, d), W (K, d), y (B,). weight (B,): of each sample's loss, 1 if not given.
    """
    loss = F.cross_entropy(h @ W.T.to(h.dtype), y, reduction="none")  # (B, K) -> (B,)
    return loss.mean() if weight is None else (weight * loss).mean()


# %% [markdown]
# ## Dot-regression: a pull and no push
# $$ L_{DR} = \frac{1}{2 \sqrt{E_W E_H}} \left( w_y^\top h - \sqrt{E_W E_H} \right)^2, \qquad
#    \frac{\partial L_{DR}}{\partial h} = -(1 - \cos \angle(h, w_y))\, w_y $$
# [Yang et al. 2022] With fixed class vectors each feature's target is known, so regress on it. The gradient
# is that at squared lengths E_H of h and E_W of w; it fades as the angle closes.


# %%
def dot_regression_loss(
    h: Tensor, W: Tensor, y: Tensor, weight: Tensor | None = None, E_W: float = 1.0, E_H: float = 1.0
) -> Tensor:
    """Squared distance of w_y . h from its largest value, as in the paper -> scalar >= 0.

    h (B, d) with ||h||^2 <= E_H, W (K, d) with ||w_k||^2 = E_W, y (B,). Zero exactly where every
    h = sqrt(E_H/E_W) w_y. weight (B,): of each sample's loss, 1 if not given.
    """
    E = math.sqrt(E_W * E_H)
    loss = ((h * W[y]).sum(1) - E).square() / (2 * E)  # (B, d) * (B, d) -> (B,)
    return loss.mean() if weight is None else (weight * loss).mean()


# %% [markdown]
# ## Class lengths: the weights of the released code
# $$ \ell_k = \sqrt{\gamma / n_k}, \qquad \gamma = B \,/\, \mathrm{classes\ in\ the\ batch} $$
# [released code, not the paper] It lengthens the vector w_y of dot-regression to l_y w_y and asks for
# w_y . h = l_y E. That multiplies the loss of a sample by l_y squared, its inverse class frequency.


# %%
def class_length(y: Tensor, K: int) -> Tensor:
    """Length of each class vector in this batch, (K,); y (B,) the unmixed labels.

    A sample's weight is class_length(y, K)[y] ** 2. Absent classes get 1, which nothing uses.
    """
    n = torch.bincount(y, minlength=K)  # (K,)
    gamma = len(y) / (n > 0).sum()
    return torch.where(n > 0, (gamma / n.clamp_min(1)).sqrt(), 1.0)


# %% [markdown]
# # 2. Theory check
# The layer-peeled model: a network so flexible that the feature of every sample is free.

# %%
import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import nn

import common

# %% [markdown]
# ## Learnable class vectors in this model
# $$ \min_{W, H} \sum_k \frac{n_k}{N}\, L_{CE}(h_k, W, k), \qquad
#    \frac{1}{K} \sum_k \lVert w_k \rVert^2 = E_W, \quad \frac{1}{K} \sum_k \lVert h_k \rVert^2 = E_H $$
# [Fang et al. 2021] One feature per class is enough, since the loss is convex in h. In W and H together it is
# not, but for d >= K no local minimum is worse than another. From some ratio of class sizes on, all rare
# classes have the same vector.


# %%
def learnable_optimum(counts: list[int], E_W: float, E_H: float) -> tuple[Tensor, Tensor]:
    """Optimal class vectors W (K, d) and class features H (K, d), d = K, for the class counts (K,)."""
    K = len(counts)
    share = torch.as_tensor(counts, dtype=torch.float64) / sum(counts)  # (K,)

    def on_budget(V, G):  # the optimum uses both budgets whole
        return V * math.sqrt(E_W * K) / V.norm(), G * math.sqrt(E_H * K) / G.norm()

    def loss(V, G):
        W, H = on_budget(V, G)
        return cross_entropy_loss(H, W, torch.arange(K), K * share)

    generator = torch.Generator().manual_seed(0)
    V, G = torch.randn(2, K, K, generator=generator, dtype=torch.float64) / 2
    return on_budget(*common.minimise(loss, V, G))


# %% [markdown]
# ## Fixed class vectors in this model
# $$ \min_{\lVert h \rVert^2 \le E_H} L_{CE} = \log\left( 1 + (K-1)\, e^{-E K / (K-1)} \right)
#    \quad\text{at}\quad h = \sqrt{E_H / E_W}\; w_y, \qquad E = \sqrt{E_W E_H} $$
# [Yang et al. 2022, theorem 1] Every sample has a problem of its own now, so class counts do not matter.


# %%
def fixed_optimum(loss, W: Tensor, y: Tensor, E_H: float) -> Tensor:
    """The features in the ball ||h||^2 <= E_H, (N, d), that minimise loss(H, W, y) under fixed W (K, d)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(y), W.shape[1], generator=generator, dtype=torch.float64) / 10

    def ball(G):  # what lies beyond it is pulled back
        return math.sqrt(E_H) * G / G.norm(dim=1, keepdim=True).clamp_min(1)

    # times N: the mean hides a sample behind all others, and L-BFGS stops on the gradient
    (G,) = common.minimise(lambda G: len(y) * loss(ball(G), W, y), start)
    return ball(G)


# %%
def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against direct optimisation; draw simplex.png."""
    K = 10
    E_H = 5  # and E_W = 1: the setting of Fang et al.
    counts = [100] * 5 + [1] * 5
    claims = common.Claims()

    W, _ = learnable_optimum([1] * K, 1, E_H)
    cosine = common.mean_pairwise_cosine(W, torch.arange(K))
    claims.equal("Ten equal classes: a simplex, cosine -1/(K-1)", -1 / 9, cosine, 1e-6)
    W, _ = learnable_optimum(counts, 1, E_H)
    cosine = common.mean_pairwise_cosine(W, torch.arange(5, 10))
    claims.equal("Five have 1/100 of the images: they share one vector, cosine", 1, cosine, 1e-6)

    # Theorem 1: with a fixed simplex the optimum is neural collapse, however imbalanced the classes
    W = simplex_etf(K, K, torch.Generator().manual_seed(0))
    y = torch.arange(K).repeat_interleave(torch.tensor(counts))
    H = fixed_optimum(cross_entropy_loss, W, y, E_H)
    least = math.log1p((K - 1) * math.exp(-math.sqrt(E_H) * K / (K - 1)))
    reached = cross_entropy_loss(H, W, y).item()
    claims.equal("On a fixed simplex the least CE is log(1+(K-1)exp(-E K/(K-1)))", least, reached, 1e-9)
    farthest = (H - math.sqrt(E_H) * W[y]).norm(dim=1).max().item()
    claims.equal("   with every feature on its own vector: distance", 0, farthest, 1e-5)

    def dr(H, W, y):
        return dot_regression_loss(H, W, y, None, 1, E_H)

    reached = dr(fixed_optimum(dr, W, y, E_H), W, y).item()
    claims.equal("Dot-regression ends at the same place: loss", 0, reached, 1e-9)

    draw_simplex(folder / "simplex.png")
    return claims.report(folder / "simplex.png")


# %%
def draw_simplex(path: Path) -> None:
    """Class vectors of three classes, two of them rare: the fixed simplex beside learnt optima."""
    simplex = simplex_etf(3, 2, torch.Generator().manual_seed(1))
    pictures = {"fixed, any class sizes": simplex}
    for ratio in (3, 100):
        W, _ = learnable_optimum([1, 1, ratio], 1, 1)
        U, _, Vh = torch.linalg.svd(W.T @ simplex, full_matrices=False)
        pictures[f"learnt, {ratio} to 1"] = W @ U @ Vh  # turned to lie along the fixed one
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    lines = [("rare", 1, 10), ("other rare", 6, 3), ("common", 0, 10)]  # thin: seen on top of another one
    for plot, (title, V) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        plot.fill(*V.T.tolist(), fill=False, edgecolor="0.8")  # the triangle of their tips
        for (x, y), (name, colour, width) in zip(V.tolist(), lines, strict=True):
            plot.plot([0, x], [0, y], color=common.COLOURS[colour], lw=width, label=name)
        cosine = common.mean_pairwise_cosine(V, torch.tensor([0, 1]))
        plot.set_title(f"{title}\ncosine of the rare: {cosine:.2f}", fontsize=17)
        plot.set(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.4, 1.4), xticks=[], yticks=[], frame_on=False)
    handles = plot.get_legend_handles_labels()
    figure.legend(*handles, ncols=3, loc="outside lower center", fontsize=17, frameon=False)
    common.save_figure(path, figure)


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
class LearnableHead(nn.Module):
    """The usual last layer without bias: h (B, d) -> the same h (B, d) and W (K, d), in float32."""

    def __init__(self, K: int, d: int):
        super().__init__()
        self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # as nn.Linear

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return h.float(), self.W


class SimplexHead(nn.Module):
    """A random simplex ETF, never trained: h (B, d) -> h (B, d) and W (K, d) of unit length, in float32.

    Features behind a ReLU fill one orthant only, vectors of an ETF point everywhere: hence BatchNorm. No
    logit exceeds 1, as released, so that the largest p of ETF + CE is 0.25 for 10 classes.
    """

    def __init__(self, K: int, d: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(d)
        self.W = nn.Parameter(simplex_etf(K, d).float(), requires_grad=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.bn(h.float()), dim=1), F.normalize(self.W, dim=1)


def build_model(args: argparse.Namespace, name: str, data: common.Dataset) -> nn.ModuleDict:
    """Network and head of a method. Raises UserError for fewer feature dimensions than a simplex needs."""
    K = len(data.classes)
    channels = data.train_x.shape[3]
    network = SmallCNN(channels) if args.net == "cnn" else ResNet32(channels, args.width)
    if not METHODS[name].fixed:
        return nn.ModuleDict({"network": network, "classifier": LearnableHead(K, network.d)})
    if network.d < K - 1:
        needed = f"a simplex of {K} classes needs {K - 1} feature dimensions, not {network.d}"
        raise common.UserError(f"--method {name}: {needed}; take a larger --width of resnet32")
    return nn.ModuleDict({"network": network, "classifier": SimplexHead(K, network.d)})


# %% [markdown]
# # 4. Training
# A method is a classifier, fixed or learnable, a loss, and whether images are mixed by Mixup:
# $$ x = \lambda x_a + (1 - \lambda) x_b, \qquad L = \lambda L(h, a) + (1 - \lambda) L(h, b), \qquad
#    \lambda \sim \mathrm{Beta}(1, 1) $$
# [Zhang et al. 2018] As released, a batch is mixed with a permutation of itself, by one lam.


# %%
class Method(NamedTuple):
    fixed: bool  # simplex ETF, or a learnable classifier
    loss: Callable  # of h (B, d), W (K, d), y (B,), weight (B,)
    mixup: bool  # are an image and its partner mixed? if not, lam is 1
    about: str


METHODS = {
    "ce": Method(False, cross_entropy_loss, False, "learnable classifier, cross-entropy"),
    "ce+mixup": Method(False, cross_entropy_loss, True, "the same with Mixup"),
    "etf+ce": Method(True, cross_entropy_loss, False, "fixed simplex ETF, cross-entropy"),
    "etf+dr": Method(True, dot_regression_loss, False, "fixed simplex ETF, dot-regression"),
    "etf+dr+mixup": Method(True, dot_regression_loss, True, "the same with Mixup, as released"),
}
ABOUT = {name: method.about for name, method in METHODS.items()}
USUAL = ["ce", "etf+ce", "etf+dr"]  # what is trained without --method
# The published recipe, and what a small data set needs instead
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "net": "resnet32", "width": 1},
    "digits": {"epochs": 120, "batch_size": 32, "net": "cnn"},
    "cifar100": {"width": 2},
}


# [copied: learning_rate]
def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160, a hundredth after 180; in proportion."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    drop = (1.0, 0.1, 0.01)[(done > 0.8) + (done > 0.9)]
    return args.lr * min(1, (epoch + 1) / warmup) * drop


# [end copied]


# %%
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


def draw_lam(mixup: bool, batches: list[slice], generator: torch.Generator) -> Tensor:
    """lam of each sample, (N,): one draw of Beta(1, 1) per batch; 1 without Mixup."""
    seed = int(torch.randint(2**31, (), generator=generator))  # torch's own Beta takes no generator
    lam = np.random.default_rng(seed).beta(1, 1, len(batches))
    sizes = [batch.stop - batch.start for batch in batches]
    return torch.from_numpy(np.repeat(lam, sizes)).float() if mixup else torch.ones(sum(sizes))


def length_weights(labels: Tensor, batches: list[slice], K: int) -> Tensor:
    """Weight of both labels of each sample, (N, 2): inverse class frequency in its batch; labels (N, 2)."""
    return torch.cat([class_length(labels[batch, 0], K)[labels[batch]].square() for batch in batches])


# %%
def train(args: argparse.Namespace, run: common.Run, data: common.Dataset) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[run.name]
    K = len(data.classes)
    switch = args.class_length if method.loss is dot_regression_loss else args.reweight
    torch.manual_seed(run.seed)  # initial weights
    generator = torch.Generator().manual_seed(run.seed)  # order, crops, flips, partners and lam
    model = build_model(args, run.name, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile, several GPUs
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    augment = {"pad": data.pad, "flip": data.flip}
    images = common.Batches(data.train_x, data.mean, data.std, **augment, device=run.device)
    batches = common.split_evenly(len(data.train_y), args.batch_size)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        pairs = draw_pairs(batches, generator)  # (N, 2): image and Mixup partner of each sample
        labels = data.train_y[pairs]  # (N, 2)
        weights = length_weights(labels, batches, K) if switch == "on" else torch.ones(labels.shape)
        lam = draw_lam(method.mixup, batches, generator)  # (N,)
        labels, weights, lam = (tensor.to(run.device) for tensor in (labels, weights, lam))
        model.train()
        for part, x_a, x_b in images.epoch(pairs, args.batch_size, generator):  # (B, C, H, W) each
            mix = lam[part, None, None, None]
            with run.autocast():  # bf16 inside the network only
                h = network(mix * x_a + (1 - mix) * x_b)  # (B, d)
            h, W = classifier(h)  # (B, d), (K, d)
            a, b = labels[part].unbind(1)  # (B,) each
            weight_a, weight_b = weights[part].unbind(1)
            loss = method.loss(h, W, a, lam[part] * weight_a)
            loss = loss + method.loss(h, W, b, (1 - lam[part]) * weight_b)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)
        run.log(lr=lr)
        if run.is_test_epoch(epoch):
            run.log(**test(model, data, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results


# %%
@torch.no_grad()
def embed(
    model: nn.ModuleDict, images: Tensor, data: common.Dataset, run: common.Run
) -> tuple[Tensor, Tensor]:
    """Features h (N, d) of every image in order, unaugmented, and W (K, d), as the loss sees them."""
    model.eval()
    hs = []
    for _, x in common.Batches(images, data.mean, data.std, device=run.device).all():
        with run.autocast():
            h = model["network"](x)
        h, W = model["classifier"](h)
        hs.append(h)
    return torch.cat(hs), W.detach()


def test(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict[str, float]:
    """Test accuracy, overall and by class size, for this epoch's line of metrics.jsonl."""
    h, W = embed(model, data.test_x, data, run)
    of_test = common.accuracies(h @ W.T, data.test_y.to(h.device), data.groups)
    return {key: of_test[key] for key in ("accuracy", "many", "medium", "few")}


def measure(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz, where z = h W^T."""
    train_h, W = embed(model, data.train_x, data, run)
    test_h, _ = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(W.device)
    test_y = data.test_y.to(W.device)
    z = train_h @ W.T
    of_train = common.accuracies(z, train_y, data.groups)
    softmax = not METHODS[run.name].fixed  # log n_k would outweigh logits between -1 and 1
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    return {
        **common.accuracies(test_h @ W.T, test_y, data.groups),
        "train_accuracy": of_train["accuracy"],
        "train_few": of_train["few"],
        "minority_cosine_W": common.mean_pairwise_cosine(W, data.groups["few"]),
        "heads": common.heads(train_h, train_y, test_h, test_y, W, softmax=softmax),
        "counts": data.counts.tolist(),
    }


COLUMNS = {  # entry of result.json: title, unit, what it is
    "accuracy": ("accuracy", "%", "of the test images after the last epoch"),
    "few": ("few", "%", "of the test images of the few, the rarest classes"),
    "minority_cosine_W": ("cos few", "", "mean cosine of the few's class vectors; 1: minority collapse"),
    "train_accuracy": ("train", "%", "of the training images, unaugmented"),
    "train_few": ("train few", "%", "of the few's training images"),
    "heads.logit_adjustment": ("logit adj.", "%", "right once log n_k is taken off learnt logits"),
    "heads.nearest_mean": ("near mean", "%", "right by the nearest class mean of the same features"),
}


def draw_figures(folder: Path, runs: list[common.Run]) -> None:
    """Two figures of finished runs: test accuracy over epochs (mean over seeds), cosines of class vectors."""
    order = np.argsort(-np.array(runs[0].finished["counts"]), kind="stable")  # largest class first
    progress = {}
    maps = {}
    for name, method in METHODS.items():
        of_method = [run for run in runs if run.name == name]
        if not of_method:
            continue
        tested = [[line for line in run.history if "accuracy" in line] for run in of_method]
        accuracy = np.mean([[100 * line["accuracy"] for line in lines] for lines in tested], axis=0)
        progress[name] = [line["epoch"] for line in tested[0]], accuracy
        title = "fixed simplex ETF" if method.fixed else name  # the same for all
        cosine = common.mean_std([of_method[0].finished["minority_cosine_W"]])
        W = torch.from_numpy(of_method[0].load_features()["W"][order])
        maps[f"{title}\ncosine of the few: {cosine}"] = common.cosines(W).fill_diagonal_(math.nan).numpy()

    axes = {"xlabel": "epoch", "ylabel": "test accuracy (%)"}
    common.curves(folder / "training.png", progress, common.styles(progress), **axes)
    axes = {"xlabel": "class, largest first", "ylabel": "class, largest first"}
    shades = {"label": "cosine of class vectors", "limits": (-1, 1), "diverging": True}
    common.heat_maps(folder / "class_vectors.png", maps, **shades, **axes)


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    flags = common.Flags("etf_dr", __doc__)
    add = flags.add_argument
    add("--net", choices=["resnet32", "cnn"], help="network")
    add("--width", type=int, help="resnet32: channels times this")
    on_off = ["on", "off"]
    add("--class-length", choices=on_off, default="on", help="dr: weights of inverse class frequency")
    add("--reweight", choices=on_off, default="off", help="ce: the same weights")
    return flags.parse(argv, ABOUT, USUAL, RECIPES, dataset="digitslt", eval_every=10)


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "etf_dr" / "synthetic")
    data = common.prepare_data(args)
    for name in args.method:  # fail early: build every model first
        build_model(args, name, data)
    for run in common.runs(args, data):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data)
    common.print_table(runs, COLUMNS, ABOUT)
    draw_figures(args.folder, runs)
    print(f"figures in {args.folder}: training.png, accuracy over epochs; class_vectors.png, their cosines")
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
