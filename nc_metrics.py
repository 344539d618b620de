# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
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
All of it is about the labels, and suggests that nothing but the label is left in h.

WHAT IT HIDES. pinv(Sigma_B) sees the K-1 directions between the class means and no other. Spread that lies
across them costs NC1 nothing: two sub-clusters in every class, and NC1 = 0 (--synthetic, 3). So we put the
trace ratio and CDNV beside it. And collapse is never complete: train on coarse labels (CIFAR-10's ten classes
in five pairs), cluster the features inside each coarse class, and the fine labels come back.

    python nc_metrics.py                                        digits, past zero error; a minute on two cores
    python nc_metrics.py --coarse pairs                         train on pairs of digits, recover the ten
    python nc_metrics.py --run runs/bmls_msclf/digitslt/ce/seed0      measure what another script has learnt
    python nc_metrics.py --features features.npz --json               or any file of features
    python nc_metrics.py --synthetic                            each metric against its closed form
    python nc_metrics.py --dataset cifar10 --coarse pairs --net resnet18 --grid       the published setting

FEATURES OF ANY FRAMEWORK: an npz file with the arrays
    train_h (N, d) float, train_y (N,) integers 0..K-1; and if there are any: test_h, test_y (the same),
    W (K, d) class vectors, b (K,) biases: logits h W^T + b. Without W all that needs it is left out.
    np.savez("features.npz", train_h=h, train_y=y)

WHAT TO EXPECT. Digits reach zero training error in epoch 5; after 100 epochs NC1 is 0.041 (0.085 on test),
the trace ratio 0.12, CDNV 0.053, NC3 0.18, and NC4 0: collapse is under way, not complete. CIFAR-10 in five
pairs, a small CNN, 10,000 images, 29 epochs past zero error: 86% of the fine training labels are recovered
(untrained network 72%, chance 51%; published with ResNet-18 and all images 93%): results/nc_metrics.md.

WHICH CONVENTION. Papers and code disagree; each metric's docstring in common.py names its own.
- NC1: trace of Sigma_W pinv(Sigma_B), divided by K. Papyan et al.'s notebook does not divide. Sigma_W is
  pooled over samples, mu_G is the mean of the class means (under imbalance not that of the samples).
- NC2: spread of the norms by the population std (the notebook's is the sample's, sqrt(K/(K-1)) larger).
- NC3: the squared Frobenius distance of the notebook; nc3_etf is the one of Zhu et al.'s code.
- NC4: mismatch with the network's own decision, bias included. (Released code compares with the labels, or
  leaves the bias out.)
- Train and test: test features are measured around their own class means; NC4 on test uses the train means.
- Zero error: the first epoch with 99.9% of the images right while training (the released ZNC code's bound).

WHAT THE SOURCES LEAVE OPEN. Pairing class k with k + K/2, the matrix of mean squared distances, clustering
inside each coarse class and naming the clusters by the best permutation are reconstructed. How features are
prepared before k-means decides what is found, and what was published we do not know: unit length is our
default, raw, whitened and t-SNE stand beside it (--cluster). Augmentation is off, as in the literature on
neural collapse; --augment turns it on.
"""

import argparse
import json
import math
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.special import digamma
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    CollapseStatistics,
    Dataset,
    Run,
    StoredStatistics,
    TrainingStep,
    UserError,
    clustering_agreement,
    coarse_labels,
    cosines,
    equiangularity,
    equinorm,
    generalized_metrics,
    gnc3,
    hardware,
    load_dataset,
    mean_std,
    metric_device,
    minority_angle,
    nearest_mean_mismatch,
    one_vs_rest_distance,
    pick_device,
    pick_precision,
    riesz_energy,
    run_side_by_side,
    self_duality,
    simplex_etf_distance,
    split_evenly,
    table,
    write_atomically,
    zero_mean_metrics,
)

# %% [1] The method: measure, then look for what the measures miss


def measure(h: Tensor, y: Tensor, K: int, W=None, b=None, means=None) -> dict[str, float]:
    """NC1..NC4 of one split: features h (N, d), labels y (N,), class vectors W (K, d), biases b (K,) or None.

    means (K, d): the class means that NC4 decides by, the training split's; this split's own by default.
    Raises ValueError for a class without samples.
    """
    S = StoredStatistics(h, y, K)
    M = S.centred_means()  # (K, d)
    nc1, rank = S.nc1()
    result = {
        "nc1": nc1,
        "nc1_rank": rank,
        "trace_ratio": S.trace_ratio(),
        "cdnv": S.cdnv(),
        "nc2_equinorm_M": equinorm(M),
        "nc2_equiangular_M": equiangularity(M),
        "nc2_etf_M": simplex_etf_distance(M),
    }
    if W is not None:
        z = h.double() @ W.double().T + (0 if b is None else b.double())  # (N, d) @ (d, K) -> (N, K)
        result |= {
            "nc2_equinorm_W": equinorm(W),
            "nc2_equiangular_W": equiangularity(W),
            "nc2_etf_W": simplex_etf_distance(W),
            "nc3": self_duality(W, M),
            "nc3_etf": simplex_etf_distance(W, M),
            "nc4": nearest_mean_mismatch(h, z.argmax(1), S.mean if means is None else means),
        }
    return result


def measure_everything(h: Tensor, y: Tensor, K: int, W=None, b=None, means=None) -> dict[str, float]:
    """measure, and all that costs more: VCI, zero-mean and generalized neural collapse, minority angle."""
    S = CollapseStatistics(K, h.shape[1], h.device)
    for part in split_evenly(len(h), 8192):
        S.update(h[part], y[part])
    M = S.centred_means()
    few = torch.argsort(S.count, stable=True)[: max(2, K // 3)]  # the smallest third of the classes
    result = measure(h, y, K, W, b, means) | {"vci": S.vci()}
    result |= {"znc1": S.nc1(centred=False)[0], **zero_mean_metrics(S.mean, W)}
    result |= {"gnc1": StoredStatistics(F.normalize(h, dim=1), y, K).nc1()[0]}
    result |= {f"{key}_M": value for key, value in generalized_metrics(M).items()}
    result |= {"minority_angle_M": minority_angle(M, few)}
    if W is not None:
        result |= {f"{key}_W": value for key, value in generalized_metrics(W).items()}
        result |= {"gnc3": gnc3(W, M), "minority_angle_W": minority_angle(W, few.to(W.device))}
    return result


CLUSTERINGS = ("l2", "raw", "whiten", "tsne")


def prepare(h: np.ndarray, how: str, seed: int) -> np.ndarray:
    """Features of one coarse class, (n, d) -> (n, p), as k-means will see them.

    In deep nets the first thing that k-means finds in a class is how long the features are:
    l2      unit length, so that only the direction is left
    raw     as they are
    whiten  the first five principal components, each at unit variance
    tsne    a t-SNE map of the unit features into the plane (Yang et al. may have used it; minutes at 10,000)
    """
    if how == "raw":
        return h
    if how == "whiten":
        from sklearn.decomposition import PCA

        return PCA(min(5, *h.shape), whiten=True, svd_solver="full").fit_transform(h)
    h = h / np.maximum(np.linalg.norm(h, axis=1, keepdims=True), 1e-12)
    if how == "tsne":
        from sklearn.manifold import TSNE

        return TSNE(init="pca", perplexity=min(30, (len(h) - 1) / 3), random_state=seed).fit_transform(h)
    return h


def recover_labels(h: np.ndarray, coarse_y: np.ndarray, fine_y: np.ndarray, how: str, seed: int) -> tuple:
    """Cluster inside each coarse class into as many clusters as it has fine classes, and name the clusters.

    h (N, d), coarse_y and fine_y (N,) -> reconstructed fine labels (N,), and their clustering_agreement with
    the true ones. Only the clusters' names use the truth: the best one-to-one assignment to the fine classes
    of their coarse class. So two classes at random get a little more than half right.
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
            cluster = k_means.fit_predict(prepare(h[rows], how, seed))
        truth = [fine_y[rows][cluster == i] for i in range(len(fine))]  # of each cluster
        overlap = np.array([[(y == f).sum() for f in fine] for y in truth])
        _, name = linear_sum_assignment(overlap, maximize=True)
        found[rows] = fine[name][cluster]
    return found, clustering_agreement(found, fine_y)


def probe_accuracy(h: np.ndarray, y: np.ndarray, test_h: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of a linear probe: logistic regression on standardised features h (N, d), labels y."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500, tol=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where 500 steps are not enough, a probe of 500 steps it is
        return float(probe.fit(h, y).score(test_h, test_y))


class Fine(NamedTuple):
    """The labels that a network trained on coarse ones never saw."""

    train_y: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    coarse: Tensor  # (K,): the coarse class of each fine one


def distance_ratios(D: Tensor, coarse: Tensor) -> tuple[float, float]:
    """Mean of D_ij over sisters (two fine classes of one coarse class) and over others, over that of D_ii.

    1: no farther apart than two samples of one fine class; what NC1 -> 0 would have us believe of sisters.
    """
    sisters = (coarse[:, None] == coarse).to(D.device)
    own = torch.eye(len(D), dtype=torch.bool, device=D.device)
    within = D.diagonal().nanmean()
    return float(D[sisters & ~own].mean() / within), float(D[~sisters].mean() / within)


def fine_structure(h: Tensor, test_h: Tensor, fine: Fine, clusterings: list[str], seed: int) -> dict:
    """What of the fine labels is in features h (N, d) of a network trained on coarse ones.

    For each clustering: agreement, and a linear probe trained on the reconstructed labels, scored on the true
    test labels; beside it a probe trained on the true ones, with the same features.
    """
    coarse_y = fine.coarse[fine.train_y]
    D = StoredStatistics(h, fine.train_y.to(h.device), len(fine.classes)).class_distances()
    sister, other = distance_ratios(D, fine.coarse)
    arrays = [t.cpu().numpy() for t in (h, fine.train_y, test_h, fine.test_y, coarse_y)]
    h, y, test_h, test_y, coarse_y = arrays
    result = {"sister_ratio": sister, "other_ratio": other, "class_distances": D.tolist()}
    result["oracle_probe"] = probe_accuracy(h, y, test_h, test_y)
    for how in clusterings:
        found, agreement = recover_labels(h, coarse_y, y, how, seed)
        result[how] = agreement | {"probe": probe_accuracy(h, found, test_h, test_y)}
    return result


# %% [2] Theory check: configurations whose metrics are known exactly


# [copied: simplex_etf]
def simplex_etf(K: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Class vectors of a random simplex ETF: (K, d) float64, unit rows, every pairwise cosine -1/(K-1).

    K unit vectors at equal angles span K - 1 dimensions. Raises UserError for d < K - 1 (none exists).
    """
    if K < 2 or d < K - 1:
        raise UserError(
            f"--classifier etf: {K} classes need {max(K - 1, 1)} feature dimensions, the network has {d}"
        )
    # the centred basis sqrt(K/(K-1)) (I - 11^T/K) in K - 1 coordinates, then a random rotation into d
    centred = torch.eye(K, dtype=torch.float64) - 1 / K
    U = torch.linalg.svd(centred).U[:, : K - 1]  # (K, K-1), rows of squared norm (K-1)/K
    Q = torch.linalg.qr(torch.randn(d, K - 1, generator=generator, dtype=torch.float64)).Q  # (d, K-1)
    return math.sqrt(K / (K - 1)) * U @ Q.T


# [end copied]


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


def around(means: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Features with class means (K, d) and covariance exactly sigma^2 I around them: (2 d K, d), and labels.

    Residuals +-sigma sqrt(d) e_j, each axis once: 1/(2d) sum of their squares is sigma^2 in every direction.
    """
    K, d = means.shape
    axes = sigma * d**0.5 * torch.eye(d, dtype=means.dtype)
    h = (means[:, None] + torch.cat([axes, -axes])).flatten(0, 1)
    return h, torch.arange(K).repeat_interleave(2 * d)


def mixture(depth: int, steps: int, seed: int, width: int = 256) -> list[dict]:
    """Four Gaussian clusters in two classes, learnt by a ReLU network of `depth` hidden layers.

    d = 64, orthogonal cluster means of norm 3, sigma = 0.5, 250 samples each; cluster k has label k mod 2.
    SGD 0.1, momentum 0.9, weight decay 5e-4, batches of 128. Yang et al. prove a theorem in a setting of this
    kind, which we did not see. Returns NC1 and the purity of k-means in the classes, four times on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(4).repeat_interleave(250)
    x = 3 * torch.eye(4, 64)[fine] + 0.5 * torch.randn(1000, 64, generator=generator)
    y = fine % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for i in range(depth) for layer in (nn.Linear(width if i else 64, width), nn.ReLU())]
        body, head = nn.Sequential(*layers), nn.Linear(width, 2)
    optimizer = torch.optim.SGD(
        [*body.parameters(), *head.parameters()], 0.1, momentum=0.9, weight_decay=5e-4
    )
    marks, seen = [steps // 100, steps // 10, steps // 3, steps], []
    for step in range(1, steps + 1):
        rows = torch.randint(1000, (128,), generator=generator)
        loss = F.cross_entropy(head(body(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in marks:
            with torch.no_grad():
                h = body(x)
                right = (head(h).argmax(1) == y).double().mean()
            point = {"step": step, "nc1": StoredStatistics(h, y, 2).nc1()[0], "accuracy": float(right)}
            for how in ("raw", "l2", "whiten"):
                _, agreement = recover_labels(h.numpy(), y.numpy(), fine.numpy(), how, 0)
                point[how] = agreement["purity"]
            point["oracle"] = probe_accuracy(h.numpy(), fine.numpy(), h.numpy(), fine.numpy())
            seen.append(point)
    return seen


def synthetic(folder) -> bool:
    """Check each metric against its closed form, by both statistics; print the table, draw synthetic.png."""
    passed, gen = [], torch.Generator().manual_seed(0)
    print(f"{'claim':<70}{'theory':>10}{'measured':>10}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, at_most=False):
        error = max(measured - theory, 0) if at_most else abs(measured - theory)
        passed.append(bool(error <= tolerance))
        print(f"{claim:<70}{theory:>10.5f}{measured:>10.5f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    def random(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    def one_pass(h, y, K):
        S = CollapseStatistics(K, h.shape[1])
        for part in split_evenly(len(h), 100):
            S.update(h[part], y[part])
        return S

    # 1. ETF means of norm r, covariance exactly sigma^2 I within: everything is known
    K, d, r, sigma = 10, 32, 3.0, 0.2
    etf = simplex_etf(K, d, gen)
    h, y = around(r * etf, sigma)
    S, expected = one_pass(h, y, K), sigma**2 * (K - 1) ** 2 / (K * r**2)
    check("ETF, isotropic spread: NC1 = sigma^2 (K-1)^2 / (K r^2)", expected, S.nc1()[0], 1e-12)
    check("   the same, features in memory", expected, StoredStatistics(h, y, K).nc1()[0], 1e-12)
    check("   trace ratio = d sigma^2 / r^2", d * sigma**2 / r**2, S.trace_ratio(), 1e-12)
    check("   CDNV = d sigma^2 (K-1) / (2 K r^2)", d * sigma**2 * (K - 1) / (2 * K * r**2), S.cdnv(), 1e-12)
    part = sigma**2 * (K - 1)
    check("   VCI = sigma^2 (K-1) / (r^2 + sigma^2 (K-1))", part / (r**2 + part), S.vci(), 1e-12)
    D = S.class_distances()
    expected = 2 * d * sigma**2 + 2 * r**2 * K / (K - 1)
    check("   class distance = 2 d sigma^2 + 2 r^2 K/(K-1)", expected, D[0, 1].item(), 1e-10)
    check("   NC2, NC3 of the means, and of the Gram matrix", 0, simplex_etf_distance(etf, 2 * etf), 1e-12)

    # 2. Hard numbers: tiny spread in float32, far from the origin; two class means that nearly coincide
    h, y = around(r * etf, 1e-5)
    h = (h + 100).float().double()  # on float32's grid: what is left of the spread there is the truth
    truth = one_pass(h, y, K).nc1()[0]
    for name, way in (("one pass", one_pass), ("in memory", StoredStatistics)):
        ratio = way(h.float(), y, K).nc1()[0] / truth
        check(f"float32, spread 1e-5 around 100, {name}: over the truth", 1, ratio, 1e-4)
    for gap in (1e-2, 1e-4):
        near = torch.cat([etf[:-1], etf[-2:-1] + gap * F.normalize(random(1, d))])
        h, y = around(near, 0.01)
        # an SVD of the means instead of their Gram matrix: it does not square what is small
        values = torch.linalg.svdvals(near - near.mean(0))[: K - 1].square() / K
        nc1, rank = one_pass(h, y, K).nc1()
        expected = float((0.01**2 / values).sum() / K)
        check(f"two means {gap:.0e} apart: NC1 over sigma^2 sum_r 1/l_r / K", 1, nc1 / expected, 1e-6)
        check("   rank kept", K - 1, rank, 0)
        M = (near - near.mean(0)).float() / K**0.5
        lost = 0.01**2 * float(torch.linalg.pinv(M.T @ M, hermitian=True).trace()) / K
        if gap < 1e-3:
            check("   float32 and pinv's own cut-off keep of it at most", 0.01, lost / expected, 0, True)

    # 3. What NC1 does not see: two sub-clusters in every class, 2a apart, across the span of the class means
    axis = torch.linalg.svd(etf).Vh[-1]  # orthogonal to all class means
    means = torch.stack([r * etf + 2 * axis, r * etf - 2 * axis], 1)  # (K, 2, d), a = 2
    S = one_pass(means.flatten(0, 1), torch.arange(K).repeat_interleave(2), K)
    check("two sub-clusters in every class, across: NC1", 0, S.nc1()[0], 1e-12)
    check("   trace ratio = a^2 / r^2", 4 / r**2, S.trace_ratio(), 1e-12)
    check("   CDNV = a^2 (K-1) / (2 K r^2)", 4 * (K - 1) / (2 * K * r**2), S.cdnv(), 1e-12)

    # 4. Zero-mean collapse: means along a non-negative orthogonal classifier. Centring hides the alignment
    Q = torch.eye(K, dtype=torch.float64).repeat_interleave(6, 1) / 6**0.5  # (K, 60)
    znc = zero_mean_metrics(5 * Q, Q)
    check("orthogonal means: largest of the ZNC metrics", 0, max(znc.values()), 1e-12)
    floor = 2 * (1 - (1 - 1 / K) ** 0.5)
    check("   centred: NC3 = 2 (1 - sqrt(1 - 1/K))", floor, self_duality(Q, Q - Q.mean(0)), 1e-12)
    check("   centred: they are an ETF", 0, simplex_etf_distance(Q - Q.mean(0)), 1e-12)
    h, y = around(5 * Q, 0.2)
    check("   ZNC1 = sigma^2 K / r^2", 0.04 * K / 25, one_pass(h, y, K).nc1(centred=False)[0], 1e-12)

    # 5. Generalized collapse: the most uniform K directions in d dimensions, found by direct optimisation
    i, j = torch.triu_indices(K, K, 1)

    def best_energy(d, s):
        def energy(V):  # the kernel written out: the optimiser needs its gradient
            V = F.normalize(V)
            r = (V[i] - V[j]).norm(dim=1)
            return -r.log().mean() if s == 0 else r.pow(-s).mean()

        # for the cross-polytope's some starts end in a local minimum
        found = [minimise(energy, random(K, d))[0] for _ in range(1 if d == K - 1 else 6)]
        return min(found, key=lambda V: riesz_energy(V, s))

    for s in (0, 1, 2):
        r2 = 2 * K / (K - 1)
        theory = -math.log(r2) / 2 if s == 0 else r2 ** (-s / 2)
        V = best_energy(K - 1, s)
        check(f"K = 10, d = 9, s = {s}: least energy, the simplex's", theory, riesz_energy(V, s), 1e-8)
        kernel = (lambda r: -math.log(r)) if s == 0 else (lambda r, s=s: r**-s)
        theory = (kernel(2) + (K - 2) * kernel(2**0.5)) / (K - 1)  # one antipode, the others at right angles
        V = best_energy(K // 2, s)
        check(f"K = 10, d = 5, s = {s}: the cross-polytope's", theory, riesz_energy(V, s), 1e-8)
    # K -> infinity: the mean kernel of the uniform law, -ln 2 - (psi((d-1)/2) - psi(d-1)) / 2
    theory = -math.log(2) - (digamma(31.5) - digamma(63)) / 2
    check("1,500 random directions, d = 64: mean log(1/r)", theory, riesz_energy(random(1500, 64)), 1e-3)
    circle = torch.arange(12, dtype=torch.float64) * math.tau / 12
    circle = torch.stack([circle.cos(), circle.sin()], 1)
    cross = torch.cat([torch.eye(5, dtype=torch.float64), -torch.eye(5, dtype=torch.float64)])
    shapes = [("simplex: K/(K-1)", etf, K / (K - 1)), ("cross-polytope: 1", cross, 1.0)]
    for name, V, theory in [*shapes, ("12-gon: 1 - cos(2 pi/12)", circle, 1 - math.cos(math.tau / 12))]:
        distance, gap = one_vs_rest_distance(V)
        check(f"one-vs-rest distance, {name}", theory, distance.min().item(), 1e-7)
        check("   certified to", 0, gap.max().item(), 1e-7)

    # 6. The layer-peeled model (one free feature a sample) collapses completely
    n, reg = 4, 0.02
    y = torch.arange(K).repeat_interleave(n)

    def peeled(W, H, weight):  # L = sum_i p_i CE(W h_i) + lam_W/2 ||W||^2 + lam_H/2 sum_i p_i ||h_i||^2
        loss = (weight * F.cross_entropy(H @ W.T, y[: len(H)], reduction="none")).sum()
        return loss + reg / 2 * (W.square().sum() + (weight[:, None] * H.square()).sum())

    flat = torch.full((K * n,), 1 / (K * n), dtype=torch.float64)
    W, H = minimise(lambda W, H: peeled(W, H, flat), random(K, 16), random(K * n, 16), steps=1500)
    for key, value in measure(H, y, K, W, None).items():
        if key != "nc1_rank":
            check(f"layer-peeled model: {key}", 0, value, 1e-6)
    # five classes of share b each collapse up to b = lam_W lam_H (bmls_msclf.py --synthetic finds the edge)
    y, few = torch.arange(K), torch.arange(5, 10)
    for name, share, angle in (("below", 0.5, 0.0), ("above", 1e3, math.degrees(math.acos(-1 / 9)))):
        b = min(share * reg**2, 0.1)
        weight = torch.tensor([0.2 - b] * 5 + [b] * 5, dtype=torch.float64)
        # sqrt(p) h in place of h makes both penalties plain squared norms, which the optimiser prefers
        loss = lambda W, G, p=weight: peeled(W, G / p.sqrt()[:, None], p)  # noqa: E731
        V, _ = minimise(loss, random(K, 16), random(K, 16), steps=500)
        check(f"minority share {name} lam_W lam_H: angle (degrees)", angle, minority_angle(V, few), 0.05)

    # 7. A network on four Gaussian clusters in two classes: NC1 falls, the clusters remain. How deep it is
    # decides what k-means needs to find them: nothing, unit length, or the whitening of the main directions
    paths = {depth: mixture(depth, 1000, 0) for depth in (1, 2, 4)}
    lost = {1: (), 2: ("raw",), 4: ("raw", "l2")}  # where k-means is near chance, 1/2
    for depth, path in paths.items():
        end = path[-1]
        check(f"mixture, hidden layers: {depth}. NC1, at most", 0.05, end["nc1"], 0, at_most=True)
        for how in ("raw", "l2", "whiten"):
            if how in lost[depth]:
                check(f"   purity of k-means, {how}, at most", 0.75, end[how], 0, at_most=True)
            else:
                check(f"   1 - purity of k-means, {how}, at most", 0.001, 1 - end[how], 0, at_most=True)
        check("   1 - accuracy of a linear probe for the clusters", 0, 1 - end["oracle"], 0.01)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (depth, path) in zip(figure.subplots(1, 3, sharey=True), paths.items(), strict=True):
        for how, look in (("raw", "s--"), ("l2", "o-"), ("whiten", "^:")):
            ax.plot([p["step"] for p in path], [p[how] for p in path], look, color="black", label=how)
        ax.set(xscale="log", xlabel="training step", title=f"{depth} hidden, NC1 {path[-1]['nc1']:.3f}")
    figure.axes[0].set(ylabel="purity of k-means in a class")
    figure.axes[0].legend(title="features", loc="lower left")
    write_atomically(Path(folder) / "synthetic.png", lambda part: figure.savefig(part, dpi=110))
    print(f"{sum(passed)} of {len(passed)} claims hold; figure: {Path(folder) / 'synthetic.png'}")
    return all(passed)


# %% [3] Network


# [copied: resnet18]
def resnet18(channels: int) -> nn.Module:
    """torchvision's ResNet-18 with the CIFAR stem: (B, channels, H, W) -> (B, 512); 11.2 M parameters.

    The ImageNet stem (7x7, stride 2, max-pool) would leave a 32x32 image as 1x1 before the last stage.
    """
    network = torchvision.models.resnet18(weights=None)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    network.maxpool = network.fc = nn.Identity()
    network.d = 512
    return network


# [end copied]


class SmallCNN(nn.Module):
    """The laptop's network: four 3x3 convolutions with BatchNorm, channels 32 to 256, 0.39 M parameters.

    Images (B, C, H, W) of any size -> features h (B, 256), h >= 0; convolutions 2 to 4 halve H and W.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.d = 256
        layers, now = [], channels
        for c in (32, 64, 128, self.d):
            stride = 1 if now == channels else 2
            layers += [nn.Conv2d(now, c, 3, stride, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]
            now = c
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # global average pool


NETWORKS = {"cnn": SmallCNN, "resnet18": resnet18}


def build_model(net: str, channels: int, K: int) -> nn.ModuleDict:
    """Network and linear classifier with bias, as in the published runs."""
    network = NETWORKS[net](channels)
    return nn.ModuleDict({"network": network, "classifier": nn.Linear(network.d, K)})


# %% [4] Training

METHODS = ("ce", "mse")
# Epochs, batch size, images per class, learning rate. Published neural-collapse runs take 350 epochs, batches
# of 128 and classes of one size; the rates are those of the released ZNC code for ResNet-18.
RECIPES = {
    "digits": (100, 64, None, 0.05),
    "mnist": (350, 128, 5000, 0.0133),
    "fashionmnist": (350, 128, None, 0.13),
    "svhn": (350, 128, 4600, 0.0096),
}
PUBLISHED = (350, 128, None, 0.068)
MILESTONES = {1, 2, 3, 4, 5, 7, 9, 11, 14, 18, 23, 28, 34, 41, 49, 59, 70, 82, 95, 110, 127, 145, 165, 187}
MILESTONES |= {211, 237, 265, 295, 327, 350}  # epochs at which all is measured, as in that code
GRID = [(lr, wd) for lr in (0.1, 0.01, 0.001) for wd in (5e-3, 5e-4, 5e-5)]  # Yang, Steinhardt & Hu 2023
ZERO_ERROR = 0.999  # share of right images from which an epoch counts as one of zero error


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr, a tenth of it after a third of the epochs, a hundredth after two thirds."""
    done = epoch / args.epochs
    return args.lr * (1 if done < 1 / 3 else 0.1 if done < 2 / 3 else 0.01)


def loss_of(name: str, z: Tensor, y: Tensor) -> Tensor:
    """ce: cross-entropy; mse: 1/2 mean_i ||z_i - e_y||^2 (Han et al. 2022). Logits z (B, K), y (B,)."""
    if name == "ce":
        return F.cross_entropy(z, y)
    e = torch.eye(z.shape[1], device=z.device)  # F.one_hot looks at its labels: the device would be asked
    return 0.5 * (z - e[y]).square().sum(1).mean()


def keep_per_class(y: Tensor, K: int, n: int, seed: int) -> Tensor:
    """Indices of n images of each class, drawn by their own generator; all of a class that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    members = [(y == k).nonzero().flatten() for k in range(K)]
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:n]] for m in members]).sort().values


def train(args, name: str, seed: int, data: Dataset, fine: Fine | None, run: Run, device) -> dict:
    """Train with one loss and one seed in its run folder, from its last checkpoint on; returns the result."""
    K, N = len(data.classes), len(data.train_y)
    generator = torch.Generator().manual_seed(seed)  # order and augmentation; on the CPU
    torch.manual_seed(seed)  # initialisation
    model = build_model(args.net, data.train_x.shape[3], K).to(device, memory_format=torch.channels_last)
    network = torch.compile(model["network"]) if args.compile else model["network"]
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    pad, flip = (data.pad, data.flip) if args.augment else (0, False)
    batches = Batches(data.train_x, data.mean, data.std, pad=pad, flip=flip, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    train_y = data.train_y.to(device)
    start, best, zero_error, seconds = 0, 0.0, 0, 0.0  # zero_error: epoch, 0 as long as there was none

    state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start, best, zero_error, seconds = (state[k] for k in ("epoch", "best", "zero_error", "seconds"))

    right = torch.zeros((), device=device)  # images of this epoch that were classified right as they came

    def step(x: Tensor, y: Tensor) -> Tensor:
        """One batch: images x (B, C, H, W), labels y (B,) -> loss."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            h = network(x)
        z = model["classifier"](h.float())  # (B, d) -> (B, K)
        loss = loss_of(name, z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.add_((z.detach().argmax(1) == y).sum())
        return loss.detach()

    training_step = TrainingStep(step, optimizer, device, capture=not args.compile)

    def checkpoint(epoch: int) -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        numbers = {"epoch": epoch, "best": best, "zero_error": zero_error, "seconds": seconds}
        run.save_checkpoint({**parts, **numbers, "generator": generator.get_state()})

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    parts = split_evenly(N, args.batch_size)[: 2 if args.dry_run else None]
    ahead, title = range(start, args.epochs), f"{name} seed {seed}"
    bar = tqdm(ahead, initial=start, total=args.epochs, desc=title, disable=None)  # None: only on a terminal
    for epoch in bar:
        began = time.perf_counter()
        order = torch.randperm(N, generator=generator)
        views = batches.views(order, generator if args.augment else None)
        y = train_y[order.to(device)]
        training_step.set_learning_rate(learning_rate(epoch, args))
        losses = torch.zeros(len(parts), device=device)  # read once an epoch: no step waits for the host
        right.zero_()
        model.train()
        images = batches.sequence(views, parts)
        for i, part in enumerate(parts):
            losses[i] = training_step(next(images), y[part])
            if i == 0:
                warm = time.perf_counter()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{name} seed {seed}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; lower "
                f"--lr and --overwrite. Last good checkpoint: epoch {epoch}, {run.folder}/checkpoint.pt"
            )
        seconds += time.perf_counter() - began
        running = float(right) / parts[-1].stop  # of the images as they were trained on
        if running >= ZERO_ERROR and not zero_error:
            zero_error = epoch + 1
        line = dict(epoch=epoch + 1, lr=learning_rate(epoch, args), loss=float(losses.mean()))
        line["running_accuracy"] = running
        if epoch + 1 in MILESTONES or epoch + 1 == args.epochs:
            line |= measure_model(model, data, batches, test, args.precision)[0]
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * len(parts) / max(len(parts) - 1, 1)
            tqdm.write(f"{name} seed {seed}: about {epoch_time * (args.epochs - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)
    about = {"method": name, "seed": seed, "best_accuracy": best, "zero_error_epoch": zero_error or None}
    return conclude(args, data, fine, run, model, batches, test, {**about, "seconds": seconds})


# %% [5] Evaluation and figures


@torch.no_grad()
def features_of(network: nn.Module, batches: Batches, precision: str) -> Tensor:
    """Features h (N, d) of every image, in order, unaugmented, in float32."""
    network.eval()
    views, hs = batches.views(torch.arange(batches.N)), []
    for x in batches.sequence(views, split_evenly(batches.N, 1000)):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            hs.append(network(x).float())
    return torch.cat(hs).to(metric_device(batches.device))


def measure_model(model, data: Dataset, batches: Batches, test: Batches, precision: str) -> tuple:
    """Accuracies and metrics of both splits, and the features and class vectors they were measured on."""
    train_h, test_h = (features_of(model["network"], b, precision) for b in (batches, test))
    device, K = train_h.device, len(data.classes)
    train_y, test_y = data.train_y.to(device), data.test_y.to(device)
    W, b = (p.detach().to(device) for p in (model["classifier"].weight, model["classifier"].bias))
    accuracies = {
        "accuracy": float(((test_h @ W.T + b).argmax(1) == test_y).double().mean()),
        "train_accuracy": float(((train_h @ W.T + b).argmax(1) == train_y).double().mean()),
    }
    means = StoredStatistics(train_h, train_y, K).mean
    measured = measure(train_h, train_y, K, W, b)
    on_test = measure(test_h, test_y, K, W, b, means)
    arrays = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y, "W": W, "b": b}
    return accuracies | measured | {f"test_{key}": value for key, value in on_test.items()}, arrays


@torch.no_grad()
def untrained(args, seed: int, data: Dataset, batches: Batches, test: Batches) -> tuple[Tensor, Tensor]:
    """Features of the network before its first step: random weights; the images set BatchNorm's averages."""
    torch.manual_seed(seed)
    network = build_model(args.net, data.train_x.shape[3], len(data.classes))["network"].to(batches.device)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches below
    network.train()
    views = batches.views(torch.arange(batches.N))
    for x in batches.sequence(views, split_evenly(batches.N, 1000)):
        network(x)
    return tuple(features_of(network, b, args.precision) for b in (batches, test))


def conclude(args, data: Dataset, fine: Fine | None, run: Run, model, batches, test, about: dict) -> dict:
    """Measure the trained model, recover fine labels if there are any, write features.npz and result.json."""
    measured, arrays = measure_model(model, data, batches, test, args.precision)
    result = {**about, "epochs": args.epochs, **measured, "counts": data.counts.tolist()}
    if fine is not None:
        seed, (h, test_h) = about["seed"], (arrays["train_h"], arrays["test_h"])
        generator = torch.Generator().manual_seed(seed)
        noise = [torch.randn(t.shape, generator=generator) for t in (h, test_h)]
        first = args.cluster[:1]  # the controls get one clustering
        found = {
            "trained": fine_structure(h, test_h, fine, args.cluster, seed),
            "untrained": fine_structure(*untrained(args, seed, data, batches, test), fine, first, seed),
            "random": fine_structure(*noise, fine, first, seed),
        }
        best = found["trained"][first[0]]
        result |= {"purity": best["purity"], "probe": best["probe"], "fine": found}
        result |= {key: found["trained"][key] for key in ("oracle_probe", "sister_ratio", "other_ratio")}
        arrays |= {"train_fine": fine.train_y, "test_fine": fine.test_y}
    run.save_features(**arrays)
    run.finish(result)
    return result


# Panels of collapse.png: title, and its curves by key and name; on the test split the key has test_ before it
PANELS = (
    ("error (%)", [("error", "")]),
    ("NC1: spread within classes", [("nc1", "NC1"), ("trace_ratio", "trace ratio")]),
    ("NC2: spread of lengths", [("nc2_equinorm_M", "means"), ("nc2_equinorm_W", "class vectors")]),
    ("NC2: mean |cos + 1/(K-1)|", [("nc2_equiangular_M", "means"), ("nc2_equiangular_W", "class vectors")]),
    ("NC3: squared distance of W, M", [("nc3", "")]),
    ("NC4: nearest mean differs (%)", [("nc4", "")]),
)


def save_figure(path: Path, figure: Figure) -> str:
    write_atomically(path, lambda part: figure.savefig(part, dpi=80))
    return path.name


def draw_collapse(folder: Path, run: Run, title: str) -> str:
    """NC1..NC4 and the error over the epochs, train and test, with the zero-error epoch marked; one run."""
    lines = [line for line in run.history if "nc1" in line]
    lines = [x | {"error": 1 - x["train_accuracy"], "test_error": 1 - x["accuracy"]} for x in lines]
    x, zero = [line["epoch"] for line in lines], run.finished["zero_error_epoch"]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for ax, (name, curves) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        percent = "%" in name
        for (key, label), color in zip(curves, ("black", "0.6"), strict=False):
            for split, style in (("", "o-"), ("test_", "s--")):
                if key.endswith("_W") and split:
                    continue  # class vectors have no test split
                y = np.array([line[split + key] for line in lines], dtype=float) * (100 if percent else 1)
                ax.plot(x, y, style, color=color, ms=3, label=None if split else label)
        if zero:
            ax.axvline(zero, color="0.7", ls=":", lw=2)
        ax.set(title=name, xlabel="epoch", xscale="log", yscale="linear" if percent else "log")
        for axis in (ax.xaxis,) if percent else (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
        if len(curves) > 1:
            ax.legend()
    at = f"Dotted: epoch {zero}, the first with 99.9% right." if zero else "Zero error was not reached."
    figure.suptitle(f"{title}. Full lines: training images, dashed: test. {at}")
    return save_figure(folder / "collapse.png", figure)


def heat_map(figure, ax, values: np.ndarray, title: str, label: str, ticks, **limits) -> None:
    image = ax.imshow(values, cmap="gray_r", interpolation="nearest", **limits)
    ax.set(title=title)
    if len(ticks) <= 20:
        ax.set_xticks(range(len(ticks)), ticks, rotation=90)
        ax.set_yticks(range(len(ticks)), ticks)
    else:
        ax.set(xlabel="class", ylabel="class")
    figure.colorbar(image, ax=ax, label=label, shrink=0.8)


def draw_fine(folder: Path, run: Run, fine: Fine) -> list[str]:
    """Class distances of untrained and trained features, and what was recovered from which features."""
    found, order = run.finished["fine"], torch.argsort(fine.coarse, stable=True).numpy()
    names = [fine.classes[k] for k in order]  # sisters beside each other
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for ax, source in zip(figure.subplots(1, 2), ("untrained", "trained"), strict=True):
        D = np.array(found[source]["class_distances"])[np.ix_(order, order)]
        title = f"{source}: sisters / within {found[source]['sister_ratio']:.2f}"
        heat_map(figure, ax, np.log10(D / np.diag(D).mean()), title, "log10 (distance² / within)", names)
    saved = [save_figure(folder / "class_distances.png", figure)]

    rows = [(f"{source}, {how}", r[how], r["oracle_probe"])
            for source, r in found.items() for how in CLUSTERINGS if how in r]  # fmt: skip
    figure = Figure(figsize=(6.5, 1.2 + 0.4 * len(rows)), layout="constrained")
    ax, y = figure.subplots(), np.arange(len(rows))[::-1]
    for key, marker in (("matched", "o"), ("probe", "s")):
        label = {"matched": "train labels reconstructed", "probe": "probe on them, test"}[key]
        ax.plot([100 * r[1][key] for r in rows], y, marker, color="black", label=label,
                mfc="black" if key == "matched" else "white")  # fmt: skip
    ax.plot([100 * r[2] for r in rows], y, "x", color="0.4", label="probe on true labels, test")
    ax.set_yticks(y, [r[0] for r in rows])
    ax.set(xlabel="fine labels right (%)", xlim=(0, 102))
    ax.grid(axis="x", color="0.85")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return [*saved, save_figure(folder / "recovered.png", figure)]


def results_table(runs: list[Run]) -> str:
    """A row for each loss and setting, mean ± std over seeds: last epoch's accuracy, the best's, collapse."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        f = json.loads((run.folder / "config.json").read_text())["flags"]
        groups.setdefault((run.finished["method"], f["lr"], f["weight_decay"]), []).append(run.finished)
    percent, plain = ["accuracy", "best_accuracy", "train_accuracy"], ["nc1", "test_nc1", "cdnv", "nc3"]
    header = ["loss", "lr", "decay", "seeds", "test %", "best %", "train %", "NC1", "test NC1", "CDNV", "NC3"]
    if "fine" in runs[0].finished:
        percent += ["purity", "probe", "oracle_probe"]
        header[7:7] = ["purity %", "probe %", "true %"]
    rows = []
    for (method, lr, wd), found in groups.items():
        cells = [mean_std([r[key] for r in found], 2, 100) for key in percent]
        cells += [mean_std([r[key] for r in found], 4) for key in plain]
        rows.append([method, f"{lr:g}", f"{wd:g}", len(found), *cells])
    return table(header, rows)


# What --features prints: what it is, by which convention, and its value at complete collapse
EXPLAINED = {
    "nc1": ("NC1 tr(Sigma_W pinv(Sigma_B)) / K", "0"),
    "nc1_rank": ("  rank of Sigma_B that was kept", "rank"),
    "trace_ratio": ("  tr Sigma_W / tr Sigma_B", "0"),
    "cdnv": ("  CDNV, mean over class pairs", "0"),
    "vci": ("  VCI, variability collapse index", "0"),
    "nc2_equinorm": ("NC2 std / mean of lengths", "0"),
    "nc2_equiangular": ("NC2 mean |cos + 1/(K-1)|", "0"),
    "nc2_etf": ("NC2 distance of Gram matrix from ETF's", "0"),
    "nc3": ("NC3 ||W/|W| - M/|M|||^2", "0"),
    "nc3_etf": ("  distance of W M^T from ETF's", "0"),
    "nc4": ("NC4 share not decided by nearest mean", "0"),
    "znc1": ("ZNC1, NC1 around the origin", "0"),
    "znc_equinorm": ("ZNC2 std / mean of lengths", "0"),
    "znc_mean_cosine": ("ZNC2 mean |cos|", "0"),
    "znc_max_cosine": ("  largest |cos|", "0"),
    "znc_alignment": ("ZNC3 ||W/|W| - M/|M|||^2, M not centred", "0"),
    "gnc1": ("GNC1, NC1 of unit features", "0"),
    "gnc_log_energy": ("GNC2 mean log(1/r)", "log"),
    "gnc_riesz1_energy": ("GNC2 mean 1/r", "riesz1"),
    "gnc_riesz2_energy": ("GNC2 mean 1/r^2", "riesz2"),
    "gnc_smallest_angle": ("GNC2 smallest angle (degrees)", "angle"),
    "gnc_one_vs_rest": ("GNC2 one-vs-rest distance", "rest"),
    "gnc_one_vs_rest_gap": ("  known to within", "0"),
    "gnc3": ("GNC3 mean of 1 - cos(w_k, mu_k - mu_G)", "0"),
    "minority_angle": ("minority: mean angle (degrees)", "angle"),
}


def collapse_targets(K: int, d: int) -> dict[str, str]:
    """Values at complete collapse; those that depend on K are the simplex's, K <= d + 1, and open beyond."""
    r2 = 2 * K / (K - 1)
    values = {"log": -math.log(r2) / 2, "riesz1": r2**-0.5, "riesz2": 1 / r2, "rest": K / (K - 1)}
    values["angle"] = math.degrees(math.acos(-1 / (K - 1)))
    known = {key: f"{value:.6g}" if K <= d + 1 else "-" for key, value in values.items()}
    return known | {"0": "0", "rank": str(min(K - 1, d))}


def read_features(path: Path) -> tuple[dict[str, Tensor], int]:
    """The arrays of a features file, checked, and K. Raises UserError that names file, array and fault."""
    names = ("train_h", "train_y", "test_h", "test_y", "W", "b")
    try:
        with np.load(path, allow_pickle=False) as file:  # never unpickles
            found = {key: file[key] for key in names if key in file}
    except Exception as error:  # as with the data's npz: many kinds, all mean a missing or damaged file
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0].partition(". ")[0]
        raise UserError(f"{path}: not a readable features file ({reason or type(error).__name__})") from None

    def require(ok, what: str) -> None:
        if not ok:
            raise UserError(f"{path}: {what}; the layout stands at the top of nc_metrics.py")

    for key in found.keys() & {"train_h", "test_h", "W", "b"}:
        a = found[key]
        ok = np.issubdtype(a.dtype, np.floating) and a.ndim == (1 if key == "b" else 2) and a.size
        require(ok, f"{key} is {a.shape} {a.dtype}, expected {'(K,)' if key == 'b' else '(rows, d)'} floats")
        require(np.isfinite(a).all(), f"{key} has values that are not finite")
        found[key] = a.astype(np.float64 if a.dtype.itemsize > 4 else np.float32)
    splits = ("train", "test") if found.keys() & {"test_h", "test_y"} else ("train",)
    for split in splits:
        h, y = found.get(f"{split}_h"), found.get(f"{split}_y")
        require(h is not None and y is not None, f"{split}_h and {split}_y are needed together")
        ok = np.issubdtype(y.dtype, np.integer) and y.shape == (len(h),)
        require(ok, f"{split}_y is {y.shape} {y.dtype}, expected ({len(h)},) integers")
        found[f"{split}_y"] = y.astype(np.int64)
    W, b, K = found.get("W"), found.get("b"), int(found["train_y"].max()) + 1
    K = K if W is None else len(W)
    require(K >= 2, f"{K} class, and collapse needs two")
    require(b is None or (W is not None and len(b) == K), f"b is there, but not with the K = {K} rows of a W")
    for key in found.keys() & {"test_h", "W"}:
        d = found["train_h"].shape[1]
        require(found[key].shape[1] == d, f"{key} is {found[key].shape}, and train_h has d = {d}")
    for y, split in ((found[f"{split}_y"], split) for split in splits):
        ok = 0 <= y.min() and y.max() < K
        require(ok, f"{split}_y has labels {y.min()} to {y.max()}, expected 0 to {K - 1}")
        n = np.bincount(y, minlength=K)
        require(n.all(), f"class {n.argmin()} has no sample in {split}_y")
    return {key: torch.from_numpy(a) for key, a in found.items()}, K


def report(args: argparse.Namespace) -> dict:
    """--features and --run: every metric as a table or as JSON, and maps of class distances and cosines."""
    path = args.features if args.features else args.run / "features.npz"
    found, K = read_features(path)
    device = metric_device(pick_device(args.device))
    found = {key: t.to(device) for key, t in found.items()}
    h, y, W, b = (found.get(key) for key in ("train_h", "train_y", "W", "b"))
    S = StoredStatistics(h, y, K)
    result = {"train": measure_everything(h, y, K, W, b)}
    if "test_h" in found:
        result["test"] = measure_everything(found["test_h"], found["test_y"], K, W, b, S.mean)
    maps = [("class distances", "mean squared distance", S.class_distances(), {})]
    limits = {"vmin": -1, "vmax": 1}
    maps += [("class means, centred", "cosine", cosines(S.centred_means()), limits)]
    maps += [("class vectors", "cosine", cosines(W), limits)] if W is not None else []
    figure = Figure(figsize=(4.6 * len(maps), 4), layout="constrained")
    for ax, (title, label, values, limits) in zip(figure.subplots(1, len(maps)), maps, strict=True):
        heat_map(figure, ax, values.cpu().numpy(), title, label, range(K), **limits)
    place = "-".join((args.run or args.features.with_suffix("")).resolve().parts[-3:])
    figure_path = args.out / "nc_metrics" / "features" / place / "maps.png"
    save_figure(figure_path, figure)
    size = {"file": str(path), "N": len(h), "d": h.shape[1], "K": K}
    if args.json:  # JSON knows neither nan nor inf
        finite = {
            split: {k: v if math.isfinite(v) else None for k, v in m.items()} for split, m in result.items()
        }
        print(json.dumps(size | finite, indent=1))
        return size | result
    targets, rows = collapse_targets(K, h.shape[1]), []
    for key, (text, target) in EXPLAINED.items():
        for end, whose in (("", ""), ("_M", ", means"), ("_W", ", class vectors")):
            if key + end in result["train"]:
                cells = [f"{measured[key + end]:.6g}" for measured in result.values()]
                rows.append([text + whose, *cells, targets[target]])
    print(f"{path}: N = {len(h):,}, d = {h.shape[1]}, K = {K}\n")
    print(table(["metric", *result, "collapsed"], rows))
    print("\nMeans are centred, but for ZNC. Minority: the smallest third of the classes.")
    print(f"maps of the training features: {figure_path}")
    return size | result


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Neural collapse: its metrics, and the fine-grained structure that they miss."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("nc_metrics.py", description=about, formatter_class=formatter)).add_argument
    add("--dataset", default="digits", help=f"{', '.join(SPECS)}, folder:PATH; with lt long-tailed")
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    add("--out", type=Path, default="runs", help="run folders go to OUT/nc_metrics/DATASET/METHOD/seedS")
    add("--method", nargs="+", default=["ce"], choices=[*METHODS, "all"], help="loss, one or more")
    add("--epochs", type=int, help="350; digits 100")
    add("--batch-size", type=int, help="128; digits 64")
    add("--lr", type=float, help="0.068; mnist 0.0133, fashionmnist 0.13, svhn 0.0096, digits 0.05")
    add("--weight-decay", type=float, help="on all parameters; 5e-4")
    add("--seed", type=int, nargs="+", default=[0], help="one or more; of weights, order, views and k-means")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of its own; they share the cores")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="inside the network only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start anew the runs that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    add("--synthetic", action="store_true", help="check each metric against its closed form")
    add("--features", type=Path, help="measure this npz file; its layout stands at the top of the script")
    add("--run", type=Path, help="measure FOLDER/features.npz of a run of any script here")
    add("--json", action="store_true", help="with --features or --run: JSON on stdout instead of the table")
    add("--net", choices=["auto", *NETWORKS], default="auto", help="auto: cnn for digits, else resnet18")
    add("--per-class", type=int, help="training images of each class; mnist 5000, svhn 4600, else all")
    add("--augment", action="store_true", help="random crops and flips; published runs have none")
    add("--coarse", choices=["pairs", "superclasses"], help="train on coarse labels, recover the fine ones")
    how = "features for k-means; the first is the one that is compared"
    add("--cluster", nargs="+", default=["l2", "raw", "whiten"], choices=CLUSTERINGS, help=how)
    add("--grid", action="store_true", help="lr .1 .01 .001 x weight decay 5e-3 5e-4 5e-5, instead of --lr")
    add("--imbalance", type=float, default=100.0, help="largest over smallest class, for lt")
    add("--profile", choices=["exp", "step"], default="exp", help="shape of the long tail, for lt")
    add("--subset-seed", type=int, default=0, help="which images a class keeps, for lt and --per-class")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    if args.grid and (args.lr is not None or args.weight_decay is not None):
        raise UserError("--grid: sets both itself; leave --lr and --weight-decay out")
    args.weight_decay = 5e-4 if args.weight_decay is None else args.weight_decay
    name = args.dataset.partition(":")[0]
    recipe = RECIPES.get(name.removesuffix("lt"), PUBLISHED)
    if name.endswith("lt"):
        recipe = (*recipe[:2], None, recipe[3])  # a long tail is not cut to one size
    for flag, value in zip(("epochs", "batch_size", "per_class", "lr"), recipe, strict=True):
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.net == "auto":
        args.net = "cnn" if name.removesuffix("lt") == "digits" else "resnet18"
    least = dict(epochs=1, jobs=0, batch_size=4, image_size=1, per_class=2)  # no batch of one: BatchNorm
    for flag, smallest in least.items():
        value = getattr(args, flag)
        if value is not None and value < smallest:
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected {smallest} or more")
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr {args.lr}: expected a number above 0")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    if args.features and args.run:
        raise UserError("--features and --run: give one of them")
    if args.json and not (args.features or args.run):
        raise UserError("--json: only with --features FILE.npz or --run FOLDER")
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed, args.cluster = list(dict.fromkeys(args.seed)), list(dict.fromkeys(args.cluster))
    if args.dry_run:
        args.epochs, args.overwrite, args.out = 1, True, args.out / "dry-run"
    return args


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "resume", "overwrite", "synthetic"}
NOT_IN_CONFIG |= {"jobs", "words"}
NOT_IN_CONFIG |= {"features", "run", "json", "grid"}


def load(args: argparse.Namespace) -> tuple[Dataset, Fine | None]:
    """The data set as it is trained on, and the fine labels if that is with coarse ones. Raises UserError."""
    tail = dict(imbalance=args.imbalance, profile=args.profile, subset_seed=args.subset_seed)
    data = load_dataset(args.dataset, args.data_dir, **tail, image_size=args.image_size)
    if args.per_class is not None:
        keep = keep_per_class(data.train_y, len(data.classes), args.per_class, args.subset_seed)
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    K = len(data.classes)
    for split, y in (("training", data.train_y), ("test", data.test_y)):
        n = torch.bincount(y, minlength=K)
        if K < 2 or n.min() == 0:
            raise UserError(f"--dataset {args.dataset}: class {n.argmin()} has no {split} image, or no rival")
    if args.coarse is None:
        return data, None
    coarse, names = coarse_labels(data.classes, args.coarse)
    fine = Fine(data.train_y, data.test_y, data.classes, coarse)
    return data._replace(train_y=coarse[data.train_y], test_y=coarse[data.test_y], classes=names), fine


def program(args: argparse.Namespace) -> dict:
    """Every loss, setting and seed, one after another; the table and the figures. Raises UserError."""
    if args.synthetic:
        return {"ok": synthetic(args.out / "nc_metrics" / "synthetic")}
    if args.features or args.run:
        return report(args)
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    data, fine = load(args)
    K, N = len(data.classes), len(data.train_y)
    folder = args.dataset.replace(":", "-").replace("/", "-") + (f"-{args.coarse}" if args.coarse else "")
    folder = args.out / "nc_metrics" / folder
    size = sum(p.numel() for p in build_model(args.net, data.train_x.shape[3], K).parameters())
    what = f"{K} coarse classes of {len(fine.classes)} fine ones" if fine else f"{K} classes"
    print(f"{args.dataset}: {what}, {N:,} training images, {len(data.test_y):,} test images")
    print(f"{hardware(device)}, {args.precision}; into {folder}")
    print(f"{args.net}, {size:,} parameters; losses {args.method}, seeds {args.seed}; ", end="")
    print(f"{args.epochs} epochs of {N:,} images, batch {args.batch_size}")
    if args.jobs > 1:  # all are finished then, and what follows only reads them
        run_side_by_side(Path(__file__), args, device)
        args.resume, args.overwrite = True, False
    runs = []
    for lr, weight_decay in GRID if args.grid else [(args.lr, args.weight_decay)]:
        args.lr, args.weight_decay = lr, weight_decay
        place = folder / f"lr{lr:g}-wd{weight_decay:g}" if args.grid else folder
        for name in args.method:
            for seed in args.seed:
                flags = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
                flags |= {"method": name, "seed": seed}
                again = dict(resume=args.resume, overwrite=args.overwrite)
                run = Run(place / name / f"seed{seed}", flags, Path(__file__), **again, device=device)
                if not run.finished:
                    train(args, name, seed, data, fine, run, device)
                elif args.jobs <= 1:  # else it was said when the run ended
                    accuracy = 100 * run.finished["accuracy"]
                    print(f"{run.folder}: done before, {accuracy:.2f}%; --overwrite redoes it")
                draw_collapse(run.folder, run, f"{args.dataset}, {name}")
                if fine:
                    draw_fine(run.folder, run, fine)
                runs.append(run)
    if args.jobs == 0:  # one of several at once: the common table and figures are for the one who started us
        return {"results": [run.finished for run in runs], "folder": str(folder)}
    print(f"\n{results_table(runs)}")
    print("Last epoch. NC1, CDNV, NC3: on training features, but for test NC1.")
    if fine:
        print(f"purity: of k-means ({args.cluster[0]}) in a coarse class; probe: trained on labels so found,")
        print("tested on the true fine ones; true: trained on the true ones")
        print(f"\n{fine_table(runs[0].finished['fine'])}")
    print(f"\nfigures in {runs[0].folder} and the other run folders")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def fine_table(found: dict) -> str:
    """What one run's features gave: a row for each source and clustering."""
    rows = []
    for source, r in found.items():
        for how in (how for how in CLUSTERINGS if how in r):
            keys = ("purity", "matched", "probe")
            agreement = [f"{100 * r[how][key]:.2f}" for key in keys]
            scores = [f"{r[how][key]:.3f}" for key in ("nmi", "ari")]
            oracle = f"{100 * r['oracle_probe']:.2f}"
            rows.append([f"{source}, {how}", *agreement, oracle, *scores, f"{r['sister_ratio']:.3f}"])
    header = ["features, k-means on", "purity %", "train %", "probe %", "true %", "NMI", "ARI"]
    return table([*header, "sisters / within"], rows)


def main(argv: list[str] | None = None) -> dict:
    """Run the command line. Exit code 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        result = program(parse(argv))
    except UserError as error:
        print(f"nc_metrics.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "nc_metrics.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
