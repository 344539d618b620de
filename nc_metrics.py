# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Neural collapse: how to measure it, and what it hides.

Sources: Papyan, Han & Donoho 2020 (neural collapse); Yang, Steinhardt & Hu 2023, Are Neurons Actually
Collapsed? On the Fine-Grained Structure in Neural Representations (ICML; we have its abstract, and facts from
second hand); Liu et al. 2023 and Jiang et al. 2024 (generalized neural collapse).

WHAT COLLAPSES. A network maps an image to its feature h, and compares h with one class vector w_k per class.
Train it on past zero training error. The features of a class shrink to their mean mu_k (NC1), the means
spread out evenly around their own mean mu_G (NC2), and the class vectors copy the means (NC3). Everything
that is left is about the label, so it seems that nothing else is kept.

WHAT IT HIDES. NC1 looks only along the directions in which class means differ; spread in any other direction
costs it nothing. And collapse is never complete: train on coarse labels (CIFAR-10's ten classes in five
pairs), cluster the features inside each coarse class, and the fine labels come back.

    python nc_metrics.py                                        digits, past zero error; a minute on two cores
    python nc_metrics.py --synthetic                            the claims about the measures, checked
    python nc_metrics.py --run runs/bmls_msclf/digitslt/ce/seed0      measure what another script has trained
    python nc_metrics.py --features features.npz --json               or any file of features
    python nc_metrics.py --dataset cifar10 --coarse pairs --net cnn --epochs 40 --batch-size 64 --lr 0.05
    python nc_metrics.py --dataset mnist --optimizer adamw --lr 0.001    NC0 -> 0 under SGD, not here

FEATURES OF ANY FRAMEWORK: np.savez("features.npz", train_h=h, train_y=y) with train_h (N, d) float, train_y
(N,) integers 0..K-1; if there are any also test_h, test_y, class vectors W (K, d) and biases b (K,). Without
W all that needs it is left out; where the test split has no sample of a class, its column is nan.

WHAT THE SOURCES LEAVE OPEN. Reconstructed: pairing class k with k + K/2, the mean squared distances,
clustering inside each coarse class, naming clusters by the best permutation. How features are prepared before
k-means decides what is found: we compare unit length, and show raw and whitened features beside it. Digits of
8 x 8 pixels show the pairs before training as well as after it: take real images, read `untrained`.
"""

# %% [markdown]
# # 1. The method: measure, then look for what the measures miss

# %%
import warnings

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn import cluster, decomposition, linear_model, pipeline, preprocessing
from torch import Tensor

warnings.filterwarnings("ignore", module="sklearn")  # fewer points than clusters: collapse; 500 steps do

# %% [markdown]
# **Neural collapse**, NC0 to NC4 (Papyan et al. 2020; NC0: arXiv 2602.16642). With the class means $\mu_k$,
# their own mean $\mu_G$, the covariances $\Sigma_W$ within and $\Sigma_B$ between classes:
# $$\mathrm{NC1} = \tfrac1K \mathrm{tr}(\Sigma_W \Sigma_B^+) \to 0, \qquad
# \mathrm{NC2}:\ \cos(\mu_i - \mu_G, \mu_j - \mu_G) \to -\tfrac{1}{K-1}, \qquad
# \mathrm{NC3}:\ w_k \to c\,(\mu_k - \mu_G),$$
# $$\mathrm{NC4}:\ \arg\max_k w_k^\top h + b_k = \arg\min_k \|h - \mu_k\|, \qquad
# \mathrm{NC0} = \tfrac1K \|\textstyle\sum_k w_k\|^2 \to 0.$$
# Means of one length with these cosines are a simplex equiangular tight frame (ETF).


# %%
def neural_collapse(h: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> dict[str, float]:
    """NC0 to NC4 as in a textbook: features h (N, d), class vectors W (K, d), labels y (N,), biases b (K,).

    Everything else in this file takes them from common.py, which needs no d x d matrix. Raises ValueError for
    a class without samples, for fewer than two classes, and for labels that are no integers.
    """
    if len(W) < 2 or y.is_floating_point():
        raise ValueError("expected (h, W, y) with two classes or more, labels y as integers")
    h = h.double()
    W = W.double()
    K = len(W)
    if (torch.bincount(y, minlength=K) == 0).any():
        raise ValueError("a class has no sample")
    M = torch.stack([h[y == k].mean(0) for k in range(K)])  # (K, d) mu_k
    Z = h - M[y]  # (N, d) each feature less its class's mean
    C = M - M.mean(0)  # (K, d) mu_k - mu_G
    Sigma_W = Z.T @ Z / len(h)
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


# %% [markdown]
# **Fine labels from coarse training** (Yang et al. 2023; the procedure is reconstructed). Inside coarse class
# $c$, k-means with as many clusters as it has fine classes. A cluster $i$ gets the name $\pi(i)$ of a fine
# class, one name each, by the assignment with most agreement:
# $$\max_\pi \sum_i |\{n : \text{cluster}_n = i,\ y_n = \pi(i)\}|.$$
# The first thing that k-means finds in a class is how long features are: what is done before decides.

# %%
PREPARATIONS = {  # of the features of one coarse class, (n, d) -> (n, p)
    "l2": preprocessing.normalize,  # unit length, so that only the direction is left
    "raw": lambda h: h,
    # the first five principal components, each at unit variance
    "whiten": lambda h: decomposition.PCA(min(5, *h.shape), whiten=True, svd_solver="full").fit_transform(h),
}


def recover_labels(h, coarse_y, fine_y, how: str, seed: int) -> np.ndarray:
    """Fine labels (N,) reconstructed from features h (N, d) of a network that saw only coarse ones.

    coarse_y, fine_y (N,). Fine labels give the number of clusters and their names only. By chance a little
    more than half would be right for two classes.
    """
    recovered = np.empty_like(fine_y)
    for c in np.unique(coarse_y):
        rows = np.flatnonzero(coarse_y == c)
        fine = np.unique(fine_y[rows])
        k_means = cluster.KMeans(len(fine), n_init=10, random_state=seed)
        assigned = k_means.fit_predict(PREPARATIONS[how](h[rows]))
        truth = [fine_y[rows][assigned == i] for i in range(len(fine))]  # of each cluster
        overlap = np.array([[(y == f).sum() for f in fine] for y in truth])
        _, name = linear_sum_assignment(overlap, maximize=True)
        recovered[rows] = fine[name][assigned]
    return recovered


# %% [markdown]
# **Linear probe.** Logistic regression on fixed features $(h - m) / s$, of mean $m$ and standard deviation
# $s$ in each dimension. What it gets right is in the features, whatever the network's own head says.


# %%
def probe_accuracy(h: np.ndarray, y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of a linear probe: logistic regression on standardised features h (N, d), labels y."""
    regression = linear_model.LogisticRegression(max_iter=500, tol=1e-3)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    return float(probe.fit(h, y).score(test_h, test_y))


# %% [markdown]
# **Distance of classes with one coarse label** (after Yang et al. 2023, whose formula we did not see).
# With $D_{ij}$ the mean squared distance between a sample of fine class $i$ and one of $j$:
# $$\mathrm{mean}\{D_{ij} : i \ne j,\ c_i = c_j\} \,/\, \mathrm{mean}\{D_{ii}\}$$
# It would be 1 if training on $c$ had merged the fine classes, as NC1 $\to$ 0 suggests.


# %%
def same_coarse_ratio(D: Tensor, coarse: Tensor) -> float:
    """Mean distance of fine classes with one coarse label, over that within a fine class.

    D (K, K) mean squared distances between fine classes, nan where undefined; coarse (K,) their coarse class.
    """
    same = (coarse[:, None] == coarse).to(D.device)
    own = torch.eye(len(D), dtype=torch.bool, device=D.device)
    return float(D[same & ~own].mean() / D.diagonal().nanmean())


# %%
# Imports of the other cells
import argparse
import json
import math
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import update_bn

import common

# %% [markdown]
# # 2. Theory check
# **Layer-peeled model** (Fang et al. 2021). Every feature is free, as if a network could put it anywhere:
# $$\min_{W, H}\ \tfrac1N \sum_i \mathrm{CE}(W h_i, y_i)
# + \tfrac{\lambda}{2} \Big(\|W\|_F^2 + \tfrac1N \sum_i \|h_i\|^2\Big)$$
# Gradient descent takes it into the simplex: collapse needs no network.


# %%
def fall(steps: list[int], n: int = 30, penalty: float = 0.02) -> tuple[dict[int, tuple], Tensor]:
    """{step: (features (3 n, 2), class vectors (3, 2))} of three classes in the plane, and the labels."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(3).repeat_interleave(n)
    H = torch.randn(3 * n, 2, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def loss(H: Tensor, W: Tensor) -> Tensor:
        norms = W.square().sum() + H.square().sum() / len(y)
        return F.cross_entropy(H @ W.T, y) + penalty / 2 * norms

    gradient = torch.func.grad(loss, argnums=(0, 1))
    states = {}
    for step in range(max(steps) + 1):
        if step in steps:
            states[step] = (H, W)
        slope_H, slope_W = gradient(H, W)
        H = H - n * slope_H  # a feature's slope goes with 1/N
        W = W - slope_W
    return states, y


def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each measure against its closed form; draw synthetic.png."""
    claims = common.Claims()
    states, y = fall([0, 30, 200, 3000])
    found = {step: neural_collapse(H, W, y) for step, (H, W) in states.items()}
    claims.at_most("Free features at the start: 1 / NC1", 0.01, 1 / found[0]["nc1"])
    claims.equal("   at the end: the largest of NC0 to NC4", 0, max(found[3000].values()), 1e-9)

    # Orthogonal means of length r, two sub-clusters in every class: NC1 does not see spread across the means
    K = 10
    r = 3
    a = 2
    axis = F.one_hot(torch.tensor(K), 32)  # orthogonal to all class means
    h = torch.cat([r * torch.eye(K, 32) + a * axis, r * torch.eye(K, 32) - a * axis])
    cluster_y = torch.arange(K).repeat(2)
    claims.equal("Two sub-clusters in every class: NC1", 0, common.nc1(h, cluster_y)[0], 1e-9)
    claims.equal("   CDNV: a^2 / (2 r^2)", a**2 / (2 * r**2), common.cdnv(h, cluster_y), 1e-9)

    panels = {}
    for step, (H, W) in states.items():
        points = {f"class {k}": H[y == k].numpy() for k in range(3)}
        # at the optimum the two penalties are equal, so that ||h|| = sqrt(K) ||w||
        panels[f"step {step}: NC1 = {found[step]['nc1']:.3g}"] = (points, 3**0.5 * W.numpy())
    draw_planes(folder / "synthetic.png", panels, "free features")
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

NETWORKS = {"cnn": SmallCNN, "resnet18": resnet18}


def build_model(args: argparse.Namespace, data: common.Dataset) -> nn.ModuleDict:
    """Network and linear classifier with bias, as in the published runs."""
    network = NETWORKS[args.net](data.train_x.shape[3])
    return nn.ModuleDict({"network": network, "classifier": nn.Linear(network.d, len(data.classes))})


# %% [markdown]
# # 4. Training
# Published runs take 350 epochs, no augmentation, classes of one size (mnist: --per-class 5000),
# and a tenth of the learning rate after each third.

# %%
METHODS = {"ce": "cross-entropy, linear classifier with bias"}
# SGD and Adam have the weight decay in the gradient, AdamW beside it: that decides about NC0 (2602.16642)
OPTIMIZERS = {
    "sgd": lambda parameters, **options: torch.optim.SGD(parameters, momentum=0.9, **options),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
RECIPES = {  # lr: that of SGD, from the released ZNC code for ResNet-18; digits: ours
    "": {"epochs": 350, "batch_size": 128, "net": "resnet18", "lr": 0.068, "weight_decay": 5e-4},
    "mnist": {"lr": 0.0133},
    "fashionmnist": {"lr": 0.13},
    "digits": {"epochs": 100, "batch_size": 64, "net": "cnn", "lr": 0.05, "weight_decay": 2e-2},
}
MEASURED = {round(1.2**i) for i in range(50)}  # even on a log axis


# %%
def train(args: argparse.Namespace, run: common.Run, fine: common.Dataset) -> dict:
    """Train one seed, from the last checkpoint on; --coarse hides fine labels. Returns what was measured."""
    data = fine
    if args.coarse:
        coarse, names = common.coarse_labels(fine.classes, args.coarse)
        data = fine._replace(train_y=coarse[fine.train_y], test_y=coarse[fine.test_y], classes=names)
    N = len(data.train_y)
    torch.manual_seed(run.seed)  # initial weights
    generator = torch.Generator().manual_seed(run.seed)  # order
    model = build_model(args, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": run.fused}
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), **options)
    images = common.Batches(data.train_x, data.mean, data.std, device=run.device)
    train_y = data.train_y.to(run.device)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = args.lr * (1, 0.1, 0.01)[3 * epoch // args.epochs]
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(N, generator=generator)  # (N,)
        labels = train_y[order.to(run.device)]
        right = torch.zeros((), device=run.device)  # images classified right
        model.train()
        for part, x in images.epoch(order, args.batch_size):
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
        run.log(lr=lr, running_accuracy=float(right) / N)
        if epoch + 1 in MEASURED or run.is_test_epoch(epoch):
            measured, arrays = evaluate(model, data, run)
            run.log(**measured, plane=plane(arrays["train_h"], arrays["train_y"], arrays["W"]))
    return measure(args, run, model, data, fine)


# %% [markdown]
# # 5. Results


# %%
def directions(V: Tensor, few: Tensor) -> dict[str, float]:
    """How class vectors or centred class means V (K, d) are spread; few: the rare classes."""
    return {
        "nc2_equinorm": common.equinorm(V),
        "nc2_equiangular": float((common.pairwise_cosines(V) + 1 / (len(V) - 1)).abs().mean()),
        "gnc_riesz2_energy": float((torch.pdist(common.unit(V)) ** -2).mean()),
        "gnc_smallest_angle": common.smallest_angle(V),
        "gnc_one_vs_rest": float(common.one_vs_rest_distance(V).min()),
        "minority_cosine": common.mean_pairwise_cosine(V, few),
    }


def measures(arrays: dict[str, Tensor], K: int) -> dict[str, dict[str, float]]:
    """{"train": ..., "test": ...}: every measure of arrays that are named as in features.npz.

    Test features are measured around their own class means, but NC4 decides by those of training. Without W
    what needs it is left out; what concerns W alone is in "train". nan: a class has no sample in the split.
    """
    W = arrays.get("W")
    few = common.shot_groups(torch.bincount(arrays["train_y"], minlength=K))["few"]
    training_means = common.class_means(arrays["train_h"], arrays["train_y"], K)
    found = {}
    for split in [split for split in ("train", "test") if f"{split}_h" in arrays]:
        h = arrays[f"{split}_h"]
        y = arrays[f"{split}_y"]
        n, mean, v = common.class_sums(h, y, K)
        M = mean - mean.mean(0)  # (K, d)
        nc1, rank = common.nc1(h, y, K)
        found[split] = {
            "nc1": nc1,
            "nc1_rank": rank,
            "trace_ratio": float((n * v).sum() / n.sum() / (M.square().sum() / K)),
            "cdnv": common.cdnv(h, y, K),
            "znc1": common.nc1(h, y, K, centred=False)[0],
            **common.zero_mean_metrics(mean, W),
            **{f"{name}_M": value for name, value in directions(M, few).items()},
        }
        if W is not None:
            decision = common.logits(h, W, arrays.get("b")).argmax(1)
            found[split] |= {
                "accuracy": float((decision == y).double().mean()),
                "nc3": common.self_duality(W, M),
                "nc4": float((decision != common.nearest_mean(h, training_means)).double().mean()),
                "gnc3": float(1 - (common.unit(W) * common.unit(M)).sum(1).mean()),
            }
    if W is not None:
        found["train"]["nc0"] = float(W.double().sum(0).square().sum() / K)
        found["train"] |= {f"{name}_W": value for name, value in directions(W, few).items()}
    return found


@torch.no_grad()
def embed(network: nn.Module, data: common.Dataset, run: common.Run) -> dict[str, Tensor]:
    """train_h, train_y, test_h, test_y as in features.npz: all images in order, in float32."""
    network.eval()
    arrays = {}
    for split, images, y in (("train", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        hs = []
        for _, x in common.Batches(images, data.mean, data.std, device=run.device).all():
            with run.autocast():
                hs.append(network(x).float())
        arrays |= {f"{split}_h": torch.cat(hs), f"{split}_y": y}
    return arrays


def evaluate(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> tuple[dict, dict[str, Tensor]]:
    """Accuracies and measures, those of the test split as test_..., and the arrays that they are of."""
    arrays = embed(model["network"], data, run)
    arrays |= {"W": model["classifier"].weight.detach(), "b": model["classifier"].bias.detach()}
    arrays = {key: array.to(run.device) for key, array in arrays.items()}
    found = measures(arrays, len(data.classes))
    accuracy = {"accuracy": found["test"].pop("accuracy"), "train_accuracy": found["train"].pop("accuracy")}
    of_test = {f"test_{key}": value for key, value in found["test"].items()}
    return accuracy | found["train"] | of_test, arrays


def plane(h: Tensor, y: Tensor, W: Tensor) -> dict[str, list]:
    """The first three classes in the plane of their means: forty features of each, and the class vectors.

    h (N, d), y (N,), W (K, d). The first mean points right, the second up. Means and vectors: mean length 1.
    """
    M = common.class_means(h[y < 3], y[y < 3], len(W[:3]))
    centre = M.mean(0)
    Q, R = torch.linalg.qr((M - centre)[:2].T)
    axes = Q * R.diagonal().sign()  # (d, 2)
    vectors = (W[:3] - W[:3].mean(0)).double()
    vectors = vectors @ axes / vectors.norm(dim=1).mean()
    scale = (M - centre).norm(dim=1).mean()
    shown = [h[y == k][:40].double() - centre for k in range(len(M))]
    return {"points": [(z @ axes / scale).tolist() for z in shown], "vectors": vectors.tolist()}


def fine_structure(arrays: dict, fine: common.Dataset, coarse: Tensor, hows: tuple, seed: int) -> dict:
    """Share of the fine labels that is recovered from features; accuracy of linear probes trained on them.

    coarse (K,): the coarse class of each fine one; hows: PREPARATIONS. oracle_probe: trained on true ones.
    """
    D = common.class_distances(arrays["train_h"], fine.train_y)
    h, test_h = (arrays[name].cpu().numpy() for name in ("train_h", "test_h"))
    y, test_y = fine.train_y.numpy(), fine.test_y.numpy()
    result = {"same_coarse_ratio": same_coarse_ratio(D, coarse)}
    result["oracle_probe"] = probe_accuracy(h, y, test_h, test_y)
    for how in hows:
        recovered = recover_labels(h, coarse.numpy()[y], y, how, seed)
        end = "" if how == "l2" else f"_{how}"
        result[f"recovered{end}"] = float(np.mean(recovered == y))
        result[f"probe{end}"] = probe_accuracy(h, recovered, test_h, test_y)
    return result


def measure(args, run: common.Run, model, data: common.Dataset, fine: common.Dataset) -> dict:
    """Everything that is measured after training; with --coarse the fine labels recovered. features.npz."""
    result, arrays = evaluate(model, data, run)
    no_errors = [line["epoch"] for line in run.history if line["running_accuracy"] >= 0.999]
    result |= {"zero_error_epoch": min(no_errors, default=math.nan), "counts": data.counts.tolist()}
    if not args.coarse:
        run.save_features(**arrays)
        return result
    run.save_features(**arrays, train_fine=fine.train_y, test_fine=fine.test_y)
    coarse, _ = common.coarse_labels(fine.classes, args.coarse)
    result |= fine_structure(arrays, fine, coarse, ("l2", "raw", "whiten"), run.seed)
    torch.manual_seed(run.seed)
    network = build_model(args, data)["network"].to(run.device)  # before its first step
    images = common.Batches(data.train_x, data.mean, data.std, device=run.device)
    update_bn((x for _, x in images.all()), network)  # BatchNorm's averages, in training mode
    untrained = fine_structure(embed(network, data, run), fine, coarse, ("l2",), run.seed)
    return result | {f"untrained_{name}": value for name, value in untrained.items()}


COLUMNS = {
    "accuracy": ("accuracy", "%", "of the test images after the last epoch"),
    "train_accuracy": ("train", "%", "of the training images"),
    "recovered": ("k-means", "%", "of the fine training labels, found in features of unit length"),
    "recovered_raw": ("raw", "%", "the same in raw features"),
    "recovered_whiten": ("whitened", "%", "the same in whitened features"),
    "untrained_recovered": ("untrained", "%", "as k-means, before the first step"),
    "probe": ("probe", "%", "of the fine test labels, by a probe trained on the labels so found"),
    "oracle_probe": ("true labels", "%", "by a probe trained on the true fine labels"),
    "same_coarse_ratio": ("apart", "", "squared distance between fine classes / within one"),
    "untrained_same_coarse_ratio": ("untr.", "", "the same before the first step"),
}

CURVES = {"nc1": "NC1", "test_nc1": "NC1, test", "nc2_equiangular_M": "NC2", "nc3": "NC3", "nc4": "NC4"}


def draw_figures(args: argparse.Namespace, data: common.Dataset, runs: list[common.Run]) -> None:
    """In each run's folder collapse.png, and falling.png or, where labels were coarse, hidden.png."""
    for run in runs:
        lines = [line for line in run.history if "nc1" in line]
        draw_collapse(run, lines)
        if args.coarse:
            panels = hidden_classes(run, data, args.coarse)
            draw_planes(run.folder / "hidden.png", panels, "principal components")
            continue
        panels = {}
        for line in [lines[len(lines) * i // 3] for i in range(3)] + lines[-1:]:
            title = f"epoch {line['epoch']}: NC1 = {line['nc1']:.2g}"
            groups = dict(zip(data.classes, line["plane"]["points"], strict=False))
            panels[title] = (groups, line["plane"]["vectors"])
        draw_planes(run.folder / "falling.png", panels, "unit: length of a mean")
    print("figures in the run folders: collapse.png, falling.png, hidden.png (--coarse)")


def draw_collapse(run: common.Run, lines: list[dict]) -> None:
    """collapse.png: NC1 to NC4 over the epochs that were measured, NC0 in a panel of its own."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    epochs = [line["epoch"] for line in lines]
    looks = common.styles([*CURVES, "nc0"])
    for key, name in {**CURVES, "nc0": "NC0"}.items():
        values = [line[key] for line in lines]
        if values[-1] == 0:  # has no place on a log axis
            last = [epoch for epoch, value in zip(epochs, values, strict=True) if value]
            name = f"{name} = 0 after epoch {max(last, default=0)}"
        plot = right if key == "nc0" else left
        plot.plot(epochs, [value or math.nan for value in values], label=name, **looks[key])
    for plot in (left, right):
        plot.axvline(run.finished["zero_error_epoch"], color="0.7", label="zero training error")
        plot.set(xscale="log", yscale="log", xlabel="epoch", ylabel="0 at full collapse")
        plot.legend(frameon=False)
    common.save_figure(run.folder / "collapse.png", figure)


def hidden_classes(run: common.Run, fine: common.Dataset, grouping: str) -> dict[str, tuple]:
    """Panels for draw_planes: the fine classes in each of the first four coarse ones, 300 samples of each."""
    _, names = common.coarse_labels(fine.classes, grouping)
    features = run.load_features()
    panels = {}
    for c, name in enumerate(names[:4]):
        h = PREPARATIONS["l2"](features["train_h"][features["train_y"] == c])
        points = decomposition.PCA(2).fit_transform(h)
        y = features["train_fine"][features["train_y"] == c]
        panels[name] = ({fine.classes[k]: points[y == k][:300] for k in np.unique(y)}, [])
    return panels


def draw_planes(path: Path, panels: dict[str, tuple], xlabel: str) -> None:
    """Points in the plane side by side: {title: ({name: points (n, 2)}, vectors (k, 2) from 0, or none)}."""
    figure = Figure(figsize=(3 * len(panels), 4.2), layout="constrained")
    plots = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)
    for plot, (title, (groups, vectors)) in zip(plots.flat, panels.items(), strict=True):
        looks = common.styles(groups)
        for name, points in groups.items():
            plot.scatter(*np.array(points).T, s=8, label=name.replace("$", r"\$"), **looks[name])
        for (x, y), look in zip(vectors, looks.values(), strict=False):
            plot.plot([0, x], [0, y], color=look["color"])
        plot.set(xlabel=xlabel, aspect="equal")
        plot.set_title(title, parse_math=False)
        plot.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False, fontsize="small")
    plot.axis([min(plot.axis()), max(plot.axis())] * 2)  # a square
    common.save_figure(path, figure)


def read_features(path: Path) -> tuple[dict[str, Tensor], int]:
    """The arrays of a features file, checked, and K. Raises UserError that names file, array and fault."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            layout = "train_h (N, d) float, train_y (N,) integers from 0; test_h, test_y, W (K, d), b (K,)"
            raise common.UserError(f"{path}: {text}; expected np.savez('f.npz', train_h=h, ...): {layout}")

    names = ("train_h", "train_y", "test_h", "test_y", "W", "b")
    try:
        with np.load(path, allow_pickle=False) as file:  # never unpickles
            arrays = {name: file[name] for name in names if name in file}
    except Exception as error:  # parsers raise many kinds
        require(False, f"not a readable features file ({getattr(error, 'strerror', type(error).__name__)})")
    require({"train_h", "train_y"} <= arrays.keys(), "train_h and train_y are needed together")
    require(("test_h" in arrays) == ("test_y" in arrays), "test_h and test_y are needed together")
    require("W" in arrays or "b" not in arrays, "b is there, but no W")
    for name, a in arrays.items():
        kind = np.integer if name.endswith("_y") else np.floating
        require(np.issubdtype(a.dtype, kind) and a.ndim and a.size, f"{name} is {a.shape} {a.dtype}")
        require(np.isfinite(a).all(), f"{name} has values that are not finite")
        arrays[name] = a.astype(np.int64 if kind is np.integer else np.float64)
    K = len(arrays["W"]) if "W" in arrays else int(arrays["train_y"].max()) + 1
    require(K >= 2, f"{K} class, and collapse needs two")
    N, n = len(arrays["train_h"]), len(arrays.get("test_h", ()))
    d = arrays["train_h"].shape[-1]
    shapes = dict(zip(names, ((N, d), (N,), (n, d), (n,), (K, d), (K,)), strict=True))
    for name, a in arrays.items():
        require(a.shape == shapes[name], f"{name} is {a.shape}, not {shapes[name]}")
    y = np.concatenate([a for name, a in arrays.items() if name.endswith("_y")])
    require(0 <= y.min() and y.max() < K, f"labels {y.min()} to {y.max()}, not 0 to {K - 1}")
    counts = np.bincount(arrays["train_y"], minlength=K)
    require(counts.all(), f"class {counts.argmin()} has no sample in train_y")
    return {name: torch.from_numpy(a) for name, a in arrays.items()}, K


def measure_file(path: Path, device: torch.device) -> dict:
    """Every measure of a features file: {"K": ..., "train": {...}, "test": {...}}."""
    arrays, K = read_features(path)
    arrays = {name: array.to(device) for name, array in arrays.items()}
    N, d = arrays["train_h"].shape
    return {"file": str(path), "N": N, "d": d, "K": K, **measures(arrays, K)}


def print_measures(results: list[dict]) -> None:
    """A row per measure, named as in result.json: the mean over `results`, of every seed's measure_file."""

    def cell(split: str, *names: str) -> str:
        values = [result[split][name] for result in results for name in names if name in result[split]]
        return f"{np.mean(values):.5g}" if values else ""

    splits = [split for split in ("train", "test") if split in results[0]]
    rows = []
    names = [name.removesuffix("_M").removesuffix("_W") for name in results[0]["train"]]
    for name in dict.fromkeys(names):
        cells = [cell(split, name, f"{name}_M") for split in splits]
        rows.append([name, *cells, cell("train", f"{name}_W")])
    print("\n" + common.table(["measure", *splits, "class vectors"], rows))
    angle = math.degrees(math.acos(-1 / (results[0]["K"] - 1)))
    print("formulas: common.py. minority: classes with few images. nan: not defined")
    print(f"full collapse: 0, rank K - 1, and for K <= d + 1 a simplex, angle {angle:.4g}")


def report(args: argparse.Namespace) -> dict:
    """--features and --run: every measure, as JSON or as a table."""
    path = args.features or args.run / "features.npz"
    if args.run and (common.Run(args.run).finished or {}).get("task") == "fewshot":
        raise common.UserError(f"--run {args.run}: a few-shot run is tested on classes not trained")
    result = measure_file(path, common.pick_device(args.device))
    if args.json:
        print(json.dumps(result, indent=1).replace("NaN", "null"))
    else:
        print(f"{path}: N = {result['N']:,}, d = {result['d']}, K = {result['K']}")
        print_measures([result])
    return result


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    flags = common.Flags("nc_metrics", __doc__)
    add = flags.add_argument
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--features", type=Path, help="npz file; see top of script")
    source.add_argument("--run", type=Path, help="run folder of any script")
    add("--json", action="store_true", help="with --features or --run: JSON, no table")
    add("--net", choices=list(NETWORKS), help="network")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="adam, adamw: --lr 0.001")
    add("--per-class", type=int, help="images kept of each class")
    add("--coarse", choices=["pairs", "superclasses"], help="hide the fine labels")
    args = flags.parse(argv, METHODS, ["ce"], RECIPES, eval_every=50)
    if args.json and not (args.features or args.run):
        raise common.UserError("--json: only with --features FILE.npz or --run FOLDER")
    if args.optimizer != "sgd" and args.lr == flags.get_default("lr"):
        raise common.UserError(f"--optimizer {args.optimizer}: give --lr too, usually 0.001")
    parts = [args.folder.name, args.coarse, args.optimizer]
    args.folder = args.folder.with_name("-".join(part for part in parts if part and part != "sgd"))
    return args


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Measure a file or run, or train with every seed; print tables, draw figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "nc_metrics" / "synthetic")
    if args.features or args.run:
        return report(args)
    data = common.prepare_data(args)
    if args.per_class is not None:
        data = common.keep(data, common.keep_per_class(data.train_y, args.per_class))
    for run in common.runs(args, data):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data)
    common.print_table(runs, COLUMNS, METHODS)
    print_measures([measure_file(run.folder / "features.npz", args.device) for run in runs])
    draw_figures(args, data, runs)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
