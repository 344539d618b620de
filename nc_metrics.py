# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Neural collapse: how to measure it, and what it hides.

Sources: Papyan, Han & Donoho 2020 (neural collapse); Yang, Steinhardt & Hu 2023, Are Neurons Actually
Collapsed? On the Fine-Grained Structure in Neural Representations (ICML; of it we have the abstract and facts
from second hand); Liu et al. 2023 and Jiang et al. 2024 (generalized neural collapse).

WHAT COLLAPSES. Train a classifier on past zero training error. The features h of a class shrink to their mean
mu_k, and the means spread out evenly around their own mean mu_G:
    NC1  tr(Sigma_W pinv(Sigma_B)) / K -> 0     Sigma_W, Sigma_B: covariance within and between classes
    NC2  cos(mu_i - mu_G, mu_j - mu_G) -> -1/(K-1), all of one length: a simplex equiangular tight frame (ETF)
    NC3  w_k -> c (mu_k - mu_G)                 the classifier's vectors copy the means
    NC4  argmax_k w_k . h + b_k = argmin_k ||h - mu_k||
    NC0  1/K ||sum_k w_k||^2 -> 0               what NC2 and NC3 together need
All of it is about the labels, and suggests that nothing but the label is left in h.

WHAT IT HIDES. pinv(Sigma_B) sees the K-1 directions between the class means and no other. Spread that lies
across them costs NC1 nothing: two sub-clusters in every class, and NC1 = 0 (--synthetic). So we put the trace
ratio and CDNV beside it. And collapse is never complete: train on coarse labels (CIFAR-10's ten classes in
five pairs), cluster the features inside each coarse class, and the fine labels come back.

    python nc_metrics.py                                        digits, past zero error; a minute on two cores
    python nc_metrics.py --synthetic                            each claim above against its closed form
    python nc_metrics.py --run runs/bmls_msclf/digitslt/ce/seed0      measure what another script has trained
    python nc_metrics.py --features features.npz --json               or any file of features
    python nc_metrics.py --dataset cifar10 --coarse pairs --net cnn --per-class 1000 --epochs 50 --lr 0.05
    python nc_metrics.py --dataset mnist --optimizer adamw      published: SGD and Adam collapse, it does not

FEATURES OF ANY FRAMEWORK: np.savez("features.npz", train_h=h, train_y=y) with train_h (N, d) float, train_y
(N,) integers 0..K-1; and if there are any: test_h, test_y (the same), W (K, d) class vectors, b (K,) biases:
logits h W^T + b. Without W all that needs it is left out.

WHICH CONVENTION. Papers and code disagree; each metric's docstring in common.py names its own. Sigma_W is
pooled over samples, mu_G is the mean of the class means (under imbalance not that of the samples). NC4 is
about the network's own decision, bias included. Test features are measured around their own class means, but
NC4 uses the training means. Zero error: the first epoch with 99.9% of the images right while training (the
released ZNC code's bound).

WHAT THE SOURCES LEAVE OPEN. Pairing class k with k + K/2, the matrix of mean squared distances, clustering
inside each coarse class and naming the clusters by the best permutation are reconstructed. How features are
prepared before k-means decides what is found, and what was published we do not know: unit length is what we
compare, raw and whitened features stand beside it. Augmentation is off, as in the literature on neural
collapse. On 8 x 8 digits an untrained network shows the pairs as well as a trained one: take real images, and
read the untrained column.
"""

# %% [markdown]
# # 1. The method: measure, then look for what the measures miss
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import warnings

import numpy as np
import torch
from torch import Tensor


def neural_collapse(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> dict[str, float]:
    """NC0 to NC4 as in a textbook; 0 is full collapse.

    Features h (N, d), class vectors W (K, d), labels y (N,), biases b (K,). O(N d^2). Everything else in this
    file takes the same quantities from common.py, which needs no d x d matrix. Raises ValueError for a class
    without samples, for fewer than two classes, and for labels that are no integers.
    """
    if len(W) < 2 or y.is_floating_point():
        raise ValueError("expected (h, W, y) with two classes or more, labels y as integers")
    h = h.double()
    W = W.double()
    N = len(h)
    K = len(W)
    if (torch.bincount(y, minlength=K) == 0).any():
        raise ValueError("a class has no sample")
    M = torch.stack([h[y == k].mean(0) for k in range(K)])  # (K, d) mu_k
    Z = h - M[y]  # (N, d) each feature less its class's mean
    C = M - M.mean(0)  # (K, d) mu_k - mu_G
    Sigma_W = Z.T @ Z / N
    Sigma_B = C.T @ C / K
    length = C.norm(dim=1)
    cosine = C @ C.T / length / length[:, None]
    off_diagonal = ~torch.eye(K, dtype=torch.bool)
    decision = (h @ W.T + (0 if b is None else b)).argmax(1)
    nearest = torch.cdist(h, M).argmin(1)
    measured = {
        "nc0": W.sum(0).square().sum() / K,
        "nc1": torch.trace(Sigma_W @ torch.linalg.pinv(Sigma_B, hermitian=True)) / K,
        "nc2_equinorm_M": length.std(correction=0) / length.mean(),
        "nc2_equiangular_M": (cosine + 1 / (K - 1)).abs()[off_diagonal].mean(),
        "nc3": (W / W.norm() - C / C.norm()).square().sum(),
        "nc4": (decision != nearest).double().mean(),
    }
    return {name: float(value) for name, value in measured.items()}


CLUSTERINGS = ("l2", "raw", "whiten")


def prepare(h: np.ndarray, how: str) -> np.ndarray:
    """Features of one coarse class, (n, d) -> (n, p), as k-means will see them.

    In deep nets the first thing that k-means finds in a class is how long the features are:
    l2      unit length, so that only the direction is left
    raw     as they are
    whiten  the first five principal components, each at unit variance
    """
    from sklearn.decomposition import PCA

    if how not in CLUSTERINGS:
        raise ValueError(f"features {how}: expected one of {CLUSTERINGS}")
    if how == "raw":
        return h
    if how == "whiten":
        return PCA(min(5, *h.shape), whiten=True, svd_solver="full").fit_transform(h)
    length = np.linalg.norm(h, axis=1, keepdims=True)
    return h / np.where(length > 0, length, 1)


def recover_labels(
    h: np.ndarray, coarse_y: np.ndarray, fine_y: np.ndarray, how: str, seed: int
) -> np.ndarray:
    """Fine labels reconstructed from features of a network that saw only coarse ones, (N,).

    h (N, d), coarse_y and fine_y (N,). Clusters inside each coarse class, into as many clusters as it has
    fine classes, and names the clusters. Only their names use the truth: the best one-to-one assignment to
    the fine classes of their coarse class. So two classes at random get a little more than half right.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans

    found = np.empty_like(fine_y)
    for c in np.unique(coarse_y):
        rows = np.flatnonzero(coarse_y == c)
        fine = np.unique(fine_y[rows])
        k_means = KMeans(len(fine), n_init=10, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that fewer distinct points than clusters are left: collapse
            cluster = k_means.fit_predict(prepare(h[rows], how))
        truth = [fine_y[rows][cluster == i] for i in range(len(fine))]  # of each cluster
        overlap = np.array([[(y == f).sum() for f in fine] for y in truth])
        _, name = linear_sum_assignment(overlap, maximize=True)
        found[rows] = fine[name][cluster]
    return found


def probe_accuracy(h: np.ndarray, y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of a linear probe: logistic regression on standardised features h (N, d), labels y."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, tol=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where 500 steps are not enough, a probe of 500 steps it is
        return float(probe.fit(h, y).score(test_h, test_y))


def sister_ratio(D: Tensor, coarse: Tensor) -> float:
    """Mean of D_ij over the fine classes i, j of one coarse class, over that of D_ii, within a fine class.

    D (K, K) mean squared distances between fine classes, coarse (K,) their coarse class. 1: sisters are no
    farther apart than two samples of one class; what NC1 -> 0 would have us believe.
    """
    sisters = (coarse[:, None] == coarse).to(D.device)
    own = torch.eye(len(D), dtype=torch.bool, device=D.device)
    return float(D[sisters & ~own].mean() / D.diagonal().nanmean())


# %%
# Imports of the other cells
import argparse
import math
from pathlib import Path

import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import common
from common import Batches, Dataset, Run, UserError, coarse_labels, curves, heat_maps, styles, table

# %% [markdown]
# # 2. Theory check
# Configurations whose metrics are known exactly.


# %%
def simplex(K: int, d: int) -> Tensor:
    """A simplex ETF, (K, d) float64 for d >= K: unit rows, every pairwise cosine -1/(K-1)."""
    corners = (torch.eye(K, dtype=torch.float64) - 1 / K) * math.sqrt(K / (K - 1))
    return F.pad(corners, (0, d - K))


def around(means: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Features with class means (K, d) and covariance exactly sigma^2 I around them: (2 d K, d), and labels.

    Residuals +-sigma sqrt(d) e_j, each axis once: 1/(2d) sum of their squares is sigma^2 in every direction.
    """
    K, d = means.shape
    axes = sigma * d**0.5 * torch.eye(d, dtype=means.dtype)
    h = (means[:, None] + torch.cat([axes, -axes])).flatten(0, 1)
    return h, torch.arange(K).repeat_interleave(2 * d)


def peeled_optimum(K: int, n: int, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """The layer-peeled model, every feature free: optimal H (K n, d), class vectors W (K, d), labels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(K).repeat_interleave(n)
    W = torch.randn(K, 16, generator=generator, dtype=torch.float64)
    H = torch.randn(K * n, 16, generator=generator, dtype=torch.float64)

    def loss(W: Tensor, H: Tensor) -> Tensor:
        # L = 1/N sum_i CE(W h_i) + lam/2 (||W||^2 + 1/N sum_i ||h_i||^2)
        return F.cross_entropy(H @ W.T, y) + lam / 2 * (W.square().sum() + H.square().sum() / len(y))

    W, H = common.minimise(loss, W, H, steps=1500)
    return H, W, y


def mixture(depth: int, steps: int, seed: int) -> dict[str, tuple[list, list]]:
    """Curves over steps, NC1 and purity of k-means, where a ReLU network learns four clusters in two classes.

    Gaussian clusters in d = 64: orthogonal means of norm 3, sigma = 0.5, 250 samples each, label k mod 2.
    `depth` hidden layers of 256. (Yang et al. prove a theorem in such a setting, which we did not see.)
    """
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(4).repeat_interleave(250)
    x = 3 * torch.eye(4, 64)[fine] + 0.5 * torch.randn(1000, 64, generator=generator)
    y = fine % 2
    torch.manual_seed(seed)
    layers = [layer for i in range(depth) for layer in (nn.Linear(256 if i else 64, 256), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(256, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    at = [steps // 100, steps // 10, steps // 3, steps]
    measured = {"NC1": (at, []), **{f"purity, {how}": (at, []) for how in CLUSTERINGS}}
    for step in range(1, steps + 1):
        rows = torch.randint(1000, (128,), generator=generator)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in at:
            h = model[:-1](x).detach()
            measured["NC1"][1].append(common.nc1(h, y)[0])
            for how in CLUSTERINGS:
                found = recover_labels(h.numpy(), y.numpy(), fine.numpy(), how, 0)
                measured[f"purity, {how}"][1].append(common.clustering_agreement(found, fine)["purity"])
    return measured


def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each measure against its closed form; draw synthetic.png."""
    K = 10
    d = 32
    r = 3.0  # length of the means
    sigma = 0.2
    claims = common.Claims()
    etf = simplex(K, d)

    H, W, y = peeled_optimum(K, 4, 0.02)
    worst = max(neural_collapse(H, W, y).values())
    claims.equal("The layer-peeled model collapses wholly: largest of NC0 to NC4", 0, worst, 1e-6)

    # ETF means of norm r, covariance exactly sigma^2 I within, class vectors along the means: all is known
    h, y = around(r * etf, sigma)
    found = neural_collapse(h, etf, y)
    expected = sigma**2 * (K - 1) ** 2 / (K * r**2)
    claims.equal("A simplex: NC1 = sigma^2 (K-1)^2 / (K r^2)", expected, found.pop("nc1"), 1e-9)
    claims.equal("   NC0, NC2, NC3 and NC4 are 0: the largest", 0, max(found.values()), 1e-9)
    expected = d * sigma**2 * (K - 1) / (2 * K * r**2)
    claims.equal("   CDNV = d sigma^2 (K-1) / (2 K r^2)", expected, common.cdnv(h, y), 1e-9)

    # NC1 does not see spread across the span of the class means: two sub-clusters in every class, 2a apart
    axis = F.one_hot(torch.tensor(d - 1), d)  # orthogonal to all class means
    h = torch.cat([r * etf + 2 * axis, r * etf - 2 * axis])
    y = torch.arange(K).repeat(2)
    claims.equal("Two sub-clusters in every class: NC1 is blind to them", 0, common.nc1(h, y)[0], 1e-9)
    claims.equal("   the trace ratio is not: a^2 / r^2", 4 / r**2, common.trace_ratio(h, y), 1e-9)

    # More classes than the simplex has room for, K > d + 1: how far can each stay from the others?
    corners = torch.eye(5)
    distance, _ = common.one_vs_rest_distance(torch.cat([corners, -corners]))
    claims.equal("Ten directions in five dimensions: one-vs-rest distance", 1, float(distance.min()), 1e-6)

    # A network on four clusters in two classes: NC1 falls, the clusters remain
    points = mixture(depth=4, steps=1000, seed=0)
    claims.at_most("Four clusters in two classes, four hidden layers: NC1", 0.05, points["NC1"][1][-1])
    purity = points["purity, whiten"][1][-1]
    claims.at_least("   k-means finds the clusters once whitened: purity", 0.999, purity)
    axes = {"xscale": "log", "xlabel": "training step", "ylabel": "NC1; purity of k-means in a class"}
    curves(folder / "synthetic.png", points, styles(points), **axes)
    return claims.report(folder / "synthetic.png")


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

NETWORKS = {"cnn": SmallCNN, "resnet18": resnet18, "resnet32": ResNet32}


def build_model(args: argparse.Namespace, data: Dataset) -> nn.ModuleDict:
    """Network and linear classifier with bias, as in the published runs."""
    network = NETWORKS[args.net](data.train_x.shape[3])
    return nn.ModuleDict({"network": network, "classifier": nn.Linear(network.d, len(data.classes))})


# %% [markdown]
# # 4. Training


# %%
METHODS = {"ce": "cross-entropy, linear classifier with bias"}
# SGD and Adam have the weight decay in the gradient, AdamW beside it: that decides about NC0 (2602.16642)
OPTIMIZERS = {
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# Published neural-collapse runs take 350 epochs, batches of 128 and classes of one size
RECIPES = {
    "": {"epochs": 350, "batch_size": 128, "net": "resnet18", "weight_decay": 5e-4},
    "digits": {"epochs": 100, "batch_size": 64, "net": "cnn"},
}
# Learning rates of SGD, those of the released ZNC code for ResNet-18; and the class size it cuts to
RATES = {"": 0.068, "digits": 0.05, "mnist": 0.0133, "fashionmnist": 0.13, "svhn": 0.0096}
ADAM_RATE = 0.001
PER_CLASS = {"mnist": 5000, "svhn": 4600}
# Epochs at which all is measured, as in that code
MILESTONES = {1, 2, 3, 4, 5, 7, 9, 11, 14, 18, 23, 28, 34, 41, 49, 59, 70, 82, 95, 110, 127, 145, 165, 187}
MILESTONES |= {211, 237, 265, 295, 327, 350}
ZERO_ERROR = 0.999  # share of right images from which an epoch counts as one of zero error


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr, a tenth of it after a third of the epochs, a hundredth after two thirds."""
    return args.lr * (1, 0.1, 0.01)[3 * epoch // args.epochs]


def train(args: argparse.Namespace, seed: int, data: Dataset, fine: Dataset | None, run: Run) -> dict:
    """Train with one seed, from the last checkpoint on. Returns what was measured at the end.

    fine: the same images with the fine labels, which the network never sees; None without --coarse.
    """
    N = len(data.train_y)
    torch.manual_seed(seed)  # initial weights
    generator = torch.Generator().manual_seed(seed)  # order and augmentation
    model = build_model(args, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": run.fused}
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), **options)
    crops = {"pad": data.pad, "flip": data.flip} if args.augment else {}
    images = Batches(data.train_x, data.mean, data.std, device=run.device, **crops)
    train_y = data.train_y.to(run.device)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        order = torch.randperm(N, generator=generator)  # (N,)
        labels = train_y[order.to(run.device)]
        right = torch.zeros((), device=run.device)  # images that were classified right as they came
        model.train()
        for part, x in images.epoch(order, args.batch_size, generator if args.augment else None):
            y = labels[part]  # (B,)
            with run.autocast():  # bf16 inside the network only
                h = network(x)  # (B, C, H, W) -> (B, d)
            z = classifier(h.float())  # (B, K)
            loss = F.cross_entropy(z, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += (z.detach().argmax(1) == y).sum()
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(lr=learning_rate(epoch, args), running_accuracy=float(right) / N)
        due = epoch + 1 in MILESTONES or run.is_test_epoch(epoch)
        if due and loss.isfinite():  # if not, run.epochs says so and stops
            measured, arrays = measure_model(model, data, run)
            run.log(**measured, plane=plane(arrays["train_h"], arrays["train_y"]))
    return conclude(args, data, fine, model, run)


# %% [markdown]
# # 5. Results


# %%
def directions(V: Tensor, suffix: str, few: Tensor | None) -> dict[str, float]:
    """NC2 of class vectors or centred means V (K, d); with `few` also GNC2, and how close those rows are."""
    found = {
        "nc2_equinorm": common.equinorm(V),
        "nc2_equiangular": common.equiangularity(V),
        "nc2_etf": common.simplex_etf_distance(V),
    }
    if few is not None:
        found |= common.generalized_metrics(V)
        found["minority_angle"] = common.minority_angle(V, few)
        found["minority_cosine"] = common.mean_pairwise_cosine(V, few)
    return {f"{key}_{suffix}": value for key, value in found.items()}


def measure(h: Tensor, y: Tensor, K: int, W=None, b=None, means=None, few=None) -> dict[str, float]:
    """Accuracy and NC1 to NC4 of features h (N, d), labels y (N,), class vectors W (K, d), biases b (K,).

    means (K, d): the class means that NC4 decides by, the training split's; this split's own by default.
    few: the rare classes; with them come the measures that cost more. Without W what needs it is left out.
    Raises ValueError for a class without samples.
    """
    sums = common.class_sums(h, y, K)
    M = sums.centred  # (K, d)
    spread, rank = common.nc1(h, y, sums)
    result = {"nc1": spread, "nc1_rank": rank, **directions(M, "M", few)}
    result["trace_ratio"] = common.trace_ratio(h, y, sums)
    result["cdnv"] = common.cdnv(h, y, sums)
    if W is not None:
        decision = common.logits(h, W, b).argmax(1)
        means = sums.mean if means is None else means
        result["accuracy"] = float((decision == y.to(decision.device)).double().mean())
        result["nc3"] = common.self_duality(W, M)
        result["nc3_etf"] = common.simplex_etf_distance(W, M)
        result["nc4"] = common.nearest_mean_mismatch(h, decision, means)
    if few is not None:
        result["vci"] = common.vci(h, y, sums)
        result["znc1"], _ = common.nc1(h, y, sums, centred=False)
        result["gnc1"], _ = common.nc1(common.unit(h).nan_to_num(), y)  # a feature of zeros stays one
        result |= common.zero_mean_metrics(sums.mean, W)
        if W is not None:
            result["gnc3"] = common.gnc3(W, M)
    return result


def measure_splits(arrays: dict[str, Tensor], K: int, few: Tensor | None = None) -> dict[str, dict]:
    """{"train": ..., "test": ...}, measures of the features in `arrays`, which are named as in features.npz.

    Test features are measured around their own class means, but NC4 decides by those of training. What
    concerns W alone, NC0 among it, is in "train".
    """
    W = arrays.get("W")
    means = common.class_means(arrays["train_h"], arrays["train_y"], K)
    found = {}
    for split in ("train", "test"):
        if f"{split}_h" in arrays:
            h = arrays[f"{split}_h"]
            y = arrays[f"{split}_y"]
            found[split] = measure(h, y, K, W, arrays.get("b"), means, few)
    if W is not None:
        found["train"] |= {"nc0": common.nc0(W), **directions(W, "W", few)}
    return found


@torch.no_grad()
def embed(network: nn.Module, data: Dataset, run: Run) -> dict[str, Tensor]:
    """train_h, train_y, test_h, test_y as in features.npz: all images in order, unaugmented, in float32."""
    network.eval()
    arrays = {}
    for split, images, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        hs = []
        for _, x in Batches(images, data.mean, data.std, device=run.device).all():
            with run.autocast():
                hs.append(network(x).float())
        h = torch.cat(hs)
        if not h.isfinite().all():
            raise UserError(f"{run.title}: features that are not finite; lower --lr and --overwrite")
        arrays |= {f"{split}_h": h, f"{split}_y": y}
    return arrays


def measure_model(model: nn.ModuleDict, data: Dataset, run: Run) -> tuple[dict, dict[str, Tensor]]:
    """Accuracies and measures, those of the test split as test_..., and the arrays that they are of."""
    arrays = embed(model["network"], data, run)
    arrays |= {"W": model["classifier"].weight.detach(), "b": model["classifier"].bias.detach()}
    arrays = {key: array.to(common.metric_device(run.device)) for key, array in arrays.items()}
    found = measure_splits(arrays, len(data.classes))
    accuracy = {"accuracy": found["test"].pop("accuracy"), "train_accuracy": found["train"].pop("accuracy")}
    return accuracy | found["train"] | {f"test_{key}": v for key, v in found["test"].items()}, arrays


def plane(h: Tensor, y: Tensor) -> list:
    """Forty features of each of the first three classes in the plane of their means, of mean length 1."""
    shown = y < 3
    sums = common.class_sums(h[shown], y[shown])
    axes = torch.linalg.qr(sums.centred[:2].T).Q / sums.centred.norm(dim=1).mean()  # (d, 2)
    features = [h[y == k][:40].double() - sums.mean.mean(0) for k in range(len(sums.mean))]
    return [(z @ axes).round(decimals=3).tolist() for z in features]


def untrained(args: argparse.Namespace, data: Dataset, run: Run) -> dict[str, Tensor]:
    """Features of the network before its first step: random weights; the images set BatchNorm's averages."""
    torch.manual_seed(run.seed)
    network = build_model(args, data)["network"].to(run.device)
    images = Batches(data.train_x, data.mean, data.std, device=run.device)
    update_bn((x for _, x in images.all()), network)  # in training mode, a plain average over batches
    return embed(network, data, run)


def fine_structure(arrays: dict, fine: Dataset, coarse: Tensor, clusterings: tuple, seed: int) -> dict:
    """What of the fine labels is in the features of a network trained on coarse ones.

    coarse (K,): the coarse class of each fine one. For each clustering: agreement, and a linear probe trained
    on the reconstructed labels, scored on the true test labels; beside it one trained on the true labels.
    """
    D = common.class_distances(arrays["train_h"], fine.train_y)
    h = arrays["train_h"].cpu().numpy()
    test_h = arrays["test_h"].cpu().numpy()
    y = fine.train_y.numpy()
    test_y = fine.test_y.numpy()
    result = {"sister_ratio": sister_ratio(D, coarse), "class_distances": D.tolist()}
    result["oracle_probe"] = probe_accuracy(h, y, test_h, test_y)
    for how in clusterings:
        found = recover_labels(h, coarse.numpy()[y], y, how, seed)
        result[how] = common.clustering_agreement(found, y)
        result[how]["probe"] = probe_accuracy(h, found, test_h, test_y)
    return result


def conclude(args: argparse.Namespace, data: Dataset, fine: Dataset | None, model, run: Run) -> dict:
    """Everything that is measured after training, fine labels recovered if there are any; features.npz."""
    result, arrays = measure_model(model, data, run)
    reached = [line["epoch"] for line in run.history if line["running_accuracy"] >= ZERO_ERROR]
    result |= {"zero_error_epoch": min(reached, default=None), "counts": data.counts.tolist()}
    if fine is not None:
        coarse, _ = coarse_labels(fine.classes, args.coarse)
        generator = torch.Generator().manual_seed(run.seed)
        noise = {key: torch.randn(arrays[key].shape, generator=generator) for key in ("train_h", "test_h")}
        trained = fine_structure(arrays, fine, coarse, CLUSTERINGS, run.seed)
        control = fine_structure(untrained(args, data, run), fine, coarse, ("l2",), run.seed)
        chance = fine_structure(noise, fine, coarse, ("l2",), run.seed)
        result["fine"] = {"trained": trained, "untrained": control, "random": chance}
        found = trained | trained["l2"]
        result |= {key: found[key] for key in ("purity", "probe", "oracle_probe", "sister_ratio")}
        result["untrained_purity"] = control["l2"]["purity"]
        arrays |= {"train_fine": fine.train_y, "test_fine": fine.test_y}
    run.save_features(**arrays)
    return result


CURVES = {"NC0": "nc0", "NC1": "nc1", "NC1, test": "test_nc1", "NC2": "nc2_equiangular_M"}
CURVES |= {"NC3": "nc3", "NC4": "nc4"}


def draw_figures(run: Run, data: Dataset, fine: Dataset | None) -> None:
    """collapse.png, and falling.png or, where labels were coarse, hidden.png and class_distances.png."""
    lines = [line for line in run.history if "nc1" in line]
    epochs = [line["epoch"] for line in lines]
    # 0 has no place on a log axis, and leaves a gap
    points = {name: (epochs, [line[key] or math.nan for line in lines]) for name, key in CURVES.items()}
    zero = run.finished["zero_error_epoch"]
    epoch = "epoch" if math.isnan(zero) else f"epoch; zero training error from epoch {zero} on"
    axes = {"xscale": "log", "yscale": "log", "xlabel": epoch, "ylabel": "0 at full collapse"}
    curves(run.folder / "collapse.png", points, styles(points), **axes)
    if fine is not None:
        draw_fine(run, fine)
        return
    panels = {}
    for i in sorted({0, len(lines) // 3, 2 * len(lines) // 3, len(lines) - 1}):
        groups = zip(data.classes, lines[i]["plane"], strict=False)
        panels[f"epoch {epochs[i]}"] = {name: np.array(points) for name, points in groups}
    scatters(run.folder / "falling.png", panels, "class", "unit: length of a mean", sharex=True, sharey=True)


def scatters(path: Path, panels: dict[str, dict], legend: str, xlabel: str, **share) -> None:
    """Points in the plane side by side, {title: {name: (n, 2)}}, their names below, once if all are alike."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.8 * len(panels), 3.8), layout="constrained")
    plots = figure.subplots(1, len(panels), squeeze=False, **share)
    for plot, (title, groups) in zip(plots.flat, panels.items(), strict=True):
        for (name, points), look in zip(groups.items(), styles(groups).values(), strict=True):
            plot.scatter(points[:, 0], points[:, 1], s=8, label=name.replace("$", r"\$"), **look)
        plot.set(title=title, xlabel=xlabel)
        if len({tuple(names) for names in panels.values()}) > 1:
            plot.legend(title=legend, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)
    if figure.axes[0].get_legend() is None:
        names = figure.axes[0].get_legend_handles_labels()
        figure.legend(*names, title=legend, loc="outside lower center", ncols=10, frameon=False)
    common.save_figure(path, figure)


def draw_fine(run: Run, fine: Dataset) -> None:
    """hidden.png: the fine classes inside coarse ones, by PCA. class_distances.png: before and after."""
    from sklearn.decomposition import PCA

    coarse, groups = coarse_labels(fine.classes, run.args.coarse)
    features = run.load_features()
    panels = {}
    for c in range(min(4, len(groups))):
        inside = features["train_y"] == c
        points = PCA(2).fit_transform(prepare(features["train_h"][inside], "l2"))
        own = {k: features["train_fine"][inside] == k for k in np.flatnonzero(coarse == c)}
        # 300 of each: more would hide each other
        panels[f"coarse class {c}"] = {fine.classes[k]: points[rows][:300] for k, rows in own.items()}
    scatters(run.folder / "hidden.png", panels, "fine class", "two principal components")

    order = torch.argsort(coarse, stable=True).numpy()  # sisters beside each other
    maps = {}
    for source in ("untrained", "trained"):
        D = np.array(run.finished["fine"][source]["class_distances"])[np.ix_(order, order)]
        maps[source] = D / np.diag(D).mean()
    limits = (0, max(values.max() for values in maps.values()))
    label = "squared distance / that within a class"
    axes = {"xlabel": "fine class, sisters side by side"}
    if len(order) <= 20:
        names = [fine.classes[k].replace("$", r"\$") for k in order]
        axes |= {"xticks": [], "yticks": range(len(order)), "yticklabels": names}
    heat_maps(run.folder / "class_distances.png", maps, label=label, limits=limits, diverging=False, **axes)


SHAPES = {"train_h": "Nd", "train_y": "N", "test_h": "nd", "test_y": "n", "W": "Kd", "b": "K"}
LAYOUT = (
    "expected an .npz file of train_h (N, d) float and train_y (N,) integers, and if there are any test_h "
    "(n, d), test_y (n,), W (K, d), b (K,); labels count from 0: np.savez('f.npz', train_h=h, train_y=y)"
)


def read_features(path: Path, device: torch.device) -> tuple[dict[str, Tensor], int]:
    """The arrays of a features file, checked, and K. Raises UserError that names file, array and fault."""

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise UserError(f"{path}: {what}; {LAYOUT}")

    require(path.suffix != ".npy", ".npy holds one array")
    try:
        with np.load(path, allow_pickle=False) as file:  # never unpickles
            found = {key: file[key] for key in SHAPES if key in file}
    except Exception as error:  # many kinds; all mean a missing or damaged file
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path}: not a readable features file ({reason}); {LAYOUT}") from None
    sizes = {}
    for key, a in found.items():
        kind = np.integer if key.endswith("_y") else np.floating
        ok = np.issubdtype(a.dtype, kind) and a.ndim == len(SHAPES[key]) and a.size
        require(ok, f"{key} is {a.shape} {a.dtype}")
        require(np.isfinite(a).all(), f"{key} has values that are not finite")
        for name, size in zip(SHAPES[key], a.shape, strict=True):
            expected = sizes.setdefault(name, size)
            require(size == expected, f"{key} is {a.shape}, where {name} = {expected}")
        small = np.float64 if a.dtype.itemsize > 4 else np.float32
        found[key] = a.astype(np.int64 if kind is np.integer else small)
    splits = ("train", "test") if found.keys() & {"test_h", "test_y"} else ("train",)
    for split in splits:
        require({f"{split}_h", f"{split}_y"} <= found.keys(), f"{split}_h and {split}_y are needed together")
    require("W" in found or "b" not in found, "b is there, but no W")
    K = sizes.get("K", int(found["train_y"].max()) + 1)
    require(K >= 2, f"{K} class, and collapse needs two")
    for split in splits:
        y = found[f"{split}_y"]
        ok = 0 <= y.min() and y.max() < K
        require(ok, f"{split}_y has labels {y.min()} to {y.max()}, not 0 to {K - 1}")
        counts = np.bincount(y, minlength=K)
        require(counts.all(), f"class {counts.argmin()} has no sample in {split}_y")
    return {key: torch.from_numpy(a).to(device) for key, a in found.items()}, K


def measure_file(path: Path, device: torch.device) -> tuple[dict, dict[str, Tensor]]:
    """Every measure of a features file, {"K": ..., "train": {...}, "test": {...}}, and its arrays."""
    found, K = read_features(path, common.metric_device(device))
    N, d = found["train_h"].shape
    counts = torch.bincount(found["train_y"])
    few = common.shot_groups(counts)[0]["few"]
    if len(few) < 2:
        few = torch.argsort(counts, stable=True)[:2]
    return {"file": str(path), "N": N, "d": d, "K": K, **measure_splits(found, K, few)}, found


# The rows of the tables: what it is, by which convention
MEASURES = {
    "accuracy": "accuracy, share decided right",
    "nc1": "NC1 tr(Sigma_W pinv(Sigma_B)) / K",
    "nc2_equinorm": "NC2 std / mean of lengths",
    "nc2_equiangular": "NC2 mean |cos + 1/(K-1)|",
    "nc3": "NC3 ||W/|W| - M/|M|||^2",
    "nc4": "NC4 share not decided by nearest mean",
    "nc0": "NC0 ||sum of class vectors||^2 / K",
    "nc1_rank": "NC1 rank of Sigma_B that was kept",
    "trace_ratio": "tr Sigma_W / tr Sigma_B",
    "cdnv": "CDNV, mean over class pairs",
    "vci": "VCI, variability collapse index",
    "nc2_etf": "NC2 distance of Gram matrix from ETF's",
    "nc3_etf": "NC3 distance of W M^T from ETF's",
    "znc1": "ZNC1, NC1 around the origin",
    "znc_equinorm": "ZNC2 std / mean of lengths",
    "znc_mean_cosine": "ZNC2 mean |cos|",
    "znc_max_cosine": "ZNC2 largest |cos|",
    "znc_cosine_spread": "ZNC2 std of cos",
    "znc_alignment": "ZNC3 ||W/|W| - M/|M|||^2, M not centred",
    "gnc1": "GNC1, NC1 of unit features",
    "gnc_log_energy": "GNC2 mean log(1/r)",
    "gnc_riesz1_energy": "GNC2 mean 1/r",
    "gnc_riesz2_energy": "GNC2 mean 1/r^2",
    "gnc_smallest_angle": "GNC2 smallest angle (degrees)",
    "gnc_one_vs_rest": "GNC2 one-vs-rest distance",
    "gnc_one_vs_rest_gap": "GNC2 known to within",
    "gnc3": "GNC3 mean of 1 - cos(w_k, mu_k - mu_G)",
    "minority_angle": "minority: mean angle (degrees)",
    "minority_cosine": "minority: mean cosine",
}
FINE_MEASURES = {
    "purity": "purity: % of the fine training labels found by k-means",
    "probe": "probe: % of the fine test labels, trained on labels so found",
    "oracle_probe": "   trained on the true ones",
    "nmi": "NMI of clusters and fine labels (%)",
    "ari": "adjusted Rand index (%), 0 by chance",
    "sister_ratio": "squared distance of sisters, % of that within a fine class",
}


def cell(found: list[dict], key: str) -> str:
    """Mean over `found`, ± std, of an entry, to significant digits; nothing if it is not there."""
    values = [result[key] for result in found if key in result]
    if len(values) > 1:
        return f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.1g}"
    return f"{values[0]:.6g}" if values else ""


def print_measures(results: list[dict]) -> None:
    """A row per measure, mean ± std over `results`, of every seed's measure_file."""
    K = results[0]["K"]
    splits = {name: [result[name] for result in results] for name in ("train", "test") if name in results[0]}
    rows = []
    for key, text in MEASURES.items():
        cells = [cell(found, key) or cell(found, f"{key}_M") for found in splits.values()]
        cells.append(cell(splits["train"], f"{key}_W"))
        if any(cells):
            rows.append([text, *cells])
    print("\n" + table(["measure", *splits, "class vectors"], rows))
    cosine = -1 / (K - 1)
    angle = math.degrees(math.acos(cosine))
    print(f"""At full collapse all below accuracy is 0, but for the rank, K - 1, and of a simplex, K <= d + 1,
angle {angle:.4g}, cosine {cosine:.4g}, r^2 {2 - 2 * cosine:.4g}, one-vs-rest distance {1 - cosine:.4g}.
Means are centred, but for ZNC. Minority: the classes with fewest training images, two at least.
nan: nothing differs between classes, or a vector is 0. VCI: left out for d > {common.VCI_LARGEST_D}""")


def print_results(runs: list[Run], args: argparse.Namespace) -> None:
    """The table of measures, mean ± std over seeds; what was recovered of fine labels; figures."""
    print_measures([measure_file(run.folder / "features.npz", args.device)[0] for run in runs])
    if args.coarse:
        found = [run.finished["fine"] for run in runs]
        columns = {}
        for source, here in found[0].items():
            for how in [how for how in CLUSTERINGS if how in here]:
                columns[f"{source}, {how}"] = [fine[source] | fine[source][how] for fine in found]
        rows = [[text] for text in FINE_MEASURES.values()]
        for row, key in zip(rows, FINE_MEASURES, strict=True):
            for column in columns.values():
                row.append(common.mean_std([result[key] for result in column], 2, 100))
        print("\n" + table(["features, and k-means on", *columns], rows))
    print(f"figures in {runs[0].folder} and the other run folders:")
    print("  collapse.png         NC0 to NC4 over the epochs; 0 is full collapse")
    if args.coarse:
        print("  hidden.png           fine classes inside coarse ones, never named in training")
        print("  class_distances.png  distances of the fine classes before and after training")
    else:
        print("  falling.png          features of three classes fall together over the epochs")


def report(args: argparse.Namespace) -> dict:
    """--features and --run: every measure as JSON, or as a table and then maps of cosines."""
    path = args.features if args.features else args.run / "features.npz"
    if args.run and (Run(args.run).finished or {}).get("task") == "fewshot":
        raise UserError(f"--run {args.run}: a few-shot run is tested on other classes than it was trained on")
    result, found = measure_file(path, common.pick_device(args.device))
    if args.json:
        print(common.to_json(result, indent=1))
        return result
    print(f"{path}: N = {result['N']:,}, d = {result['d']}, K = {result['K']}")
    print_measures([result])
    maps = {"class means, centred": common.class_sums(found["train_h"], found["train_y"]).centred}
    maps |= {"class vectors": found["W"]} if "W" in found else {}
    maps = {name: common.cosines(V).fill_diagonal_(math.nan).cpu().numpy() for name, V in maps.items()}
    place = "-".join(path.resolve().with_suffix("").parts[1:][-4:])  # without the root: below --out
    figure = args.out / "nc_metrics" / "features" / place / "cosines.png"
    axes = {"xlabel": "class", "ylabel": "class"}
    heat_maps(figure, maps, label="cosine", limits=(-1, 1), diverging=True, **axes)
    print(f"cosines of the training features' class means and of the class vectors: {figure}")
    return result


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    title = __doc__.partition("\n")[0]
    flags = common.Arguments("nc_metrics", title, METHODS, ["ce"], RECIPES, eval_every=50)
    add = flags.add
    add("--features", type=common.a_path, help="measure this npz file; its layout: top of the script")
    add("--run", type=common.a_path, help="measure FOLDER/features.npz of a run of any script here")
    add("--json", action="store_true", help="with --features or --run: JSON on stdout instead of the table")
    add("--net", choices=list(NETWORKS), help="network")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="lr of adam and adamw: 0.001")
    size = "images kept of each class; mnist 5000, svhn 4600, else all"
    add("--per-class", type=common.at_least(2), help=size)
    add("--augment", action="store_true", help="random crops and flips; published runs have none")
    add("--coarse", choices=["pairs", "superclasses"], help="train on coarse labels, recover the fine ones")
    args = flags.parse(argv)
    if args.features and args.run:
        raise UserError("--features and --run: give one of them")
    if args.json and not (args.features or args.run):
        raise UserError("--json: only with --features FILE.npz or --run FOLDER")
    base, long_tailed, _ = common.split_name(args.dataset)
    if args.lr is None:
        args.lr = RATES.get(base, RATES[""]) if args.optimizer == "sgd" else ADAM_RATE
    if args.per_class is None and not long_tailed:
        args.per_class = PER_CLASS.get(base)
    optimizer = None if args.optimizer == "sgd" else args.optimizer
    parts = [args.folder.name, args.coarse, optimizer]  # each with a folder of its own
    args.folder = args.folder.with_name("-".join(part for part in parts if part))
    return args


def main(argv: list[str] | None = None) -> dict:
    """Measure a file or run, or train with every seed; print tables, draw figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "nc_metrics" / "synthetic")
    if args.features or args.run:
        return report(args)
    data = common.prepare_data(args)
    if args.per_class is not None:
        keep = common.keep_per_class(data.train_y, args.per_class)
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    fine = None
    if args.coarse:
        fine = data
        coarse, names = coarse_labels(fine.classes, args.coarse)
        data = fine._replace(train_y=coarse[fine.train_y], test_y=coarse[fine.test_y], classes=names)
    what = f"{len(data.classes)} coarse classes of {len(fine.classes)} fine ones" if fine else "all classes"
    print(f"trains on {what}, {len(data.train_y):,} training images")
    runs = []
    for seed in args.seed:
        run = common.open_run(args, "ce", seed, data)
        if not run.finished:
            run.finish(train(args, seed, data, fine, run))
            draw_figures(run, data, fine)
        runs.append(run)
    print_results(runs, args)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
