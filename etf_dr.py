# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
"""Minority collapse of a learnable classifier, and a remedy: fixed simplex-ETF class vectors, dot-regression.

Source: Y. Yang, S. Chen, X. Li, L. Xie, Z. Lin, D. Tao, Inducing Neural Collapse in Imbalanced Learning: Do
We Really Need a Learnable Classifier at the End of Deep Neural Network? (NeurIPS 2022), and the code that
its authors released. Where the two differ, or we from them, is said below and at the line.

WHAT COLLAPSES. Train features h and class vectors w_k to the end on balanced classes and they become a
simplex ETF: K vectors of one length, every pairwise cosine -1/(K-1), features on top of their class vectors
(neural collapse). On imbalanced classes they do not. The gradient of cross-entropy has a pull and a push,

    dCE/dh   = -(1 - p_y) w_y + sum_{k != y} p_k w_k              p = softmax(W h)
    dCE/dw_k = -sum_{i: y_i = k} (1 - p_ik) h_i + sum_{i: y_i != k} p_ik h_i

and a rare class's w_k, pulled by few features and pushed by many, goes where all rare classes go: from
n_majority / n_minority = R* on they share one vector (minority collapse; Fang et al. 2021).

REMEDY 1, the classifier: draw a random simplex ETF and never train it. Then (Theorem 1) with ||h||^2 <= E_H
and ||w_k||^2 = E_W the least CE is at h = sqrt(E_H/E_W) w_y for every sample, whatever the class counts.
REMEDY 2, the loss: with the target known, regress on it. A pull, no push, and the same optimum:

    L_DR = 1/(2 sqrt(E_W E_H)) (w_y . h - sqrt(E_W E_H))^2        dL/dh = -(1 - cos angle(h, w_y)) w_y

    python etf_dr.py                                              digits, long-tailed; all methods
    python etf_dr.py --synthetic                                  the theory above, claim by claim
    python etf_dr.py --dataset cifar100lt --method ce etf+dr etf+dr+mixup --seed 0 1 2
    torchrun --nproc-per-node 4 etf_dr.py --dataset folder:PATH   four GPUs

WHAT TO EXPECT. On digits, 142 images to 1 (5 seeds, 20 epochs, last epoch): ce 46 ± 2%, ce+mixup 37 ± 6,
etf+ce 68 ± 1, etf+dr 79 ± 3, etf+dr+mixup 71 ± 2. Without class lengths etf+dr has 71 ± 2, and with the
same weights (--reweight on) etf+ce is level with it, 79 ± 2. A learnable classifier with BatchNorm and
lengths (--normalise on --E-W 256) has 68 ± 5. CIFAR-10-LT at 100, 10 of 200 epochs, one seed: ce 31, etf+dr
43, without class lengths 37; ce --reweight on 44. More in results/etf_dr.md.

PAPER, CODE AND THIS FILE
- Class lengths. The released configurations of ETF + DR give w_k the length sqrt(gamma / n_k), n_k counted
  in the batch. That is inverse-frequency weighting of the samples; the paper's CE baseline has none. Here
  --class-length off takes it away from dot-regression and --reweight on gives it to cross-entropy.
- The released learnable baseline for CIFAR is frozen at its random start (requires_grad is False). Ours
  learns. It has no bias; --normalise on gives it the BatchNorm and the lengths of the ETF methods.
- With unit vectors and K classes ETF + CE cannot be surer than p = .25 (K = 10) or .03 (K = 100). That is
  what was released; --E-W 256 is a temperature of 16.
- Faster convergence of DR (claimed with its Theorem 2, whose wording we do not have) is a matter of E =
  sqrt(E_W E_H) and of the angle: --synthetic measures it. At the released E = 1 CE is the faster one.
- Mixup follows the released code: a batch with a permutation of itself, one lam ~ Beta(alpha, alpha), the
  two losses mixed, class lengths from the unmixed labels. Then DR's least loss is no longer 0.
- Schedule, augmentation, weight decay (on BatchNorm too) and width (doubled for CIFAR-100) are the released
  ones; the normalisation is by the statistics of our data. They report the best epoch on the test set; we
  report the last, and put the best beside it. Sampling is instance-balanced.
- SVHN and STL-10 have augmentation and their own statistics here, none of it there. The released SVHN-LT
  constructor appends more labels than images for short classes, so that labels slide; ours cannot.
- ImageNet-LT (folder:PATH) differs more: ResNet-50 with d = 2048 where the paper widens the last stage to
  4096; the step schedule, weight decay and batch of the flags, where it has a cosine from .1, 5e-4, 1024;
  features at unit length, where it has BatchNorm and a penalty on the norm; crop and flip, no colour jitter.
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
import torchvision
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq, minimize
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    Dataset,
    Run,
    TrainingStep,
    UserError,
    accuracy_per_class,
    agree,
    check_shares,
    collapse_metrics,
    cosines,
    first_rank_first,
    hardware,
    in_parallel,
    join_ranks,
    load_dataset,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    own_share,
    pick_device,
    pick_precision,
    quiet_but_first,
    ranks,
    run_side_by_side,
    share_of_mean,
    shot_groups,
    split_evenly,
    table,
    whole,
    write_atomically,
)

# %% [1] The method


def simplex_etf(K: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Class vectors of a random simplex ETF: (K, d) float64, unit rows, every pairwise cosine -1/(K-1).

    The paper's sqrt(K/(K-1)) P (I - 11^T/K), P (d, K) orthonormal, needs d >= K; K vectors at equal angles
    span K - 1 dimensions only, and d >= K - 1 is enough here. The released P comes from a QR of uniform
    numbers, ours of Gaussian ones. Raises UserError for d < K - 1, where none exists.
    """
    if K < 2 or d < K - 1:
        raise UserError(
            f"--method etf+dr: a simplex ETF of {K} classes needs {max(K - 1, 1)} feature dimensions, the "
            f"network has {d}; take a larger --width, or --project {max(K, 2)}"
        )
    # the centred basis sqrt(K/(K-1)) (I - 11^T/K) in K - 1 coordinates, then a random rotation into d
    centred = torch.eye(K, dtype=torch.float64) - 1 / K
    U = torch.linalg.svd(centred).U[:, : K - 1]  # (K, K-1), rows of squared norm (K-1)/K
    Q = torch.linalg.qr(torch.randn(d, K - 1, generator=generator, dtype=torch.float64)).Q  # (d, K-1)
    return math.sqrt(K / (K - 1)) * U @ Q.T


def class_length(y: Tensor, K: int) -> Tensor:
    """Length of each class vector in this batch (released code only), (K,); y (B,) the unmixed labels.

    Rare classes get long vectors. Absent classes get 1, which nothing uses.
    """
    n = torch.zeros(K, device=y.device).index_add_(0, y, torch.ones(len(y), device=y.device))
    # l_k = sqrt(gamma / n_k), gamma = B / (number of classes in the batch)
    gamma = len(y) / (n > 0).sum()
    return torch.where(n > 0, (gamma / n.clamp_min(1)).sqrt(), 1.0)


def dot_regression_loss(
    h: Tensor, W: Tensor, y: Tensor, E_W: float = 1.0, E_H: float = 1.0, length: Tensor | None = None
) -> Tensor:
    """Pull each feature to its own class vector and push it from none (Yang et al. 2022).

    h (B, d) with ||h||^2 <= E_H, W (K, d) with ||w_k||^2 = E_W, y (B,) -> scalar >= 0, zero exactly where
    every h = sqrt(E_H/E_W) w_y. length (K,): `class_length`, or None for one length for all.
    """
    E = math.sqrt(E_W * E_H)
    # L = 1/(2E) (w_y . h - E)^2, E = sqrt(E_W E_H)             (B, d) * (B, d) -> (B,)
    loss = ((h * W[y]).sum(1) - E).square() / (2 * E)
    # The released code lengthens w_y to l_y w_y and asks for w_y . h = l_y E, but does not divide by l_y as
    # the paper's 1/(2 sqrt(E_W E_H)) would have it. So L gets the factor l_y^2 = gamma / n_y: the weight of
    # a sample is the inverse frequency of its class in the batch. (The paper's form would give l_y.)
    return loss.mean() if length is None else (length[y].square() * loss).mean()


def cross_entropy_loss(h: Tensor, W: Tensor, y: Tensor, length: Tensor | None = None) -> Tensor:
    """CE with logits h . w_k; `length` weighs it as it weighs dot-regression. Shapes as there -> scalar."""
    loss = F.cross_entropy(h @ W.T, y, reduction="none")  # (B, d) @ (d, K) -> (B, K); (B,)
    return loss.mean() if length is None else (length[y].square() * loss).mean()


def ce_feature_gradient(h: Tensor, W: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """dCE/dh in two parts, pull to the own class vector and push from the others: two (B, d)."""
    p = (h @ W.T).softmax(1)  # (B, K)
    own = F.one_hot(y, len(W)).to(p.dtype)
    # dCE/dh = -(1 - p_y) w_y + sum_{k != y} p_k w_k
    return ((own * p - own) @ W), ((p - own * p) @ W)


def ce_classifier_gradient(
    h: Tensor, W: Tensor, y: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """d(mean CE)/dW in two parts: the pull of a class's own features, the push of all others; two (K, d).

    weight (B,): of each sample's loss, 1 if not given. A rare class has few features of its own and is pushed
    by all others. Two rare classes are pushed by the same features with almost the same p: their vectors move
    alike and end up alike. That is the collapse.
    """
    p = (h @ W.T).softmax(1)  # (B, K)
    own = F.one_hot(y, len(W)).to(p.dtype)
    # dL/dw_k = 1/B [-sum_{i: y_i = k} (1 - p_ik) h_i + sum_{i: y_i != k} p_ik h_i]
    h = h / len(h) if weight is None else h * weight[:, None] / len(h)
    return (own * p - own).T @ h, (p - own * p).T @ h


def dr_feature_gradient(h: Tensor, W: Tensor, y: Tensor, E_W: float = 1.0, E_H: float = 1.0) -> Tensor:
    """d(dot-regression)/dh: a pull that fades as the angle closes, and no push. (B, d)"""
    # dL/dh = -(1 - w_y . h / E) w_y                             on the sphere: -(1 - cos angle(h, w_y)) w_y
    return ((h * W[y]).sum(1, keepdim=True) / math.sqrt(E_W * E_H) - 1) * W[y]


# %% [2] Theory check: the layer-peeled model
# The network below the last layer is taken to be so flexible that every sample has a free feature.


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


# [copied: collapse_threshold]
def collapse_threshold(K_A: int, K_B: int, E: float) -> float:
    """R* = n_A / n_B from which the minority collapses in the norm-constrained model; derived here.

    E = sqrt(E_W E_H). Fang et al. 2021 prove collapse for R -> infinity and observe a finite threshold.
    The constraints amount to a nuclear-norm budget ||Z||_* <= K E, and by symmetry the collapsed optimum is
    Z = a (I_A - 11^T/K_A) + u w^T, u the unit direction majority against minority.
    """
    K = K_A + K_B
    u_A, u_B = (K_B / (K_A * K)) ** 0.5, -((K_A / (K_B * K)) ** 0.5)  # entries of u: unit norm, zero sum

    def excess(R):
        def logits(v):  # (K_A - 1) a + ||w|| = K E, with w = x on the majority and y on the minority samples
            x, y = v
            a = (K * E - math.hypot(K_A**0.5 * x, K_B**0.5 * y)) / (K_A - 1)
            # majority sample: own, other majority, minority class; minority sample: majority, minority class
            return a * (1 - 1 / K_A) + u_A * x, -a / K_A + u_A * x, u_B * x, u_A * y, u_B * y

        def loss(v):
            own, other, minor, major, tail = logits(v)
            L_A = np.logaddexp.reduce([own, other + math.log(K_A - 1), minor + math.log(K_B)]) - own
            L_B = np.logaddexp(major + math.log(K_A), tail + math.log(K_B)) - tail
            return (R * K_A * L_A + K_B * L_B) / (R * K)

        # convex in (x, y): BFGS finds the global optimum
        own, other, minor, *_ = np.exp(logits(minimize(loss, [0.1 * E, -0.1 * E], options={"gtol": 1e-8}).x))
        total = own + (K_A - 1) * other + K_B * minor
        # KKT: collapse is optimal iff R (1 - p_d + p_o) >= 1, p_d = own / total, p_o = other / total
        return R * (1 - (own - other) / total) - 1

    return math.exp(brentq(lambda log_R: excess(math.exp(log_R)), 0, math.log(1e7), xtol=1e-6))


# [end copied]


# [copied: locate]
def locate(collapsed, inside: float, outside: float) -> float:
    """Bisect, on a log scale, for the edge of the region in which the direct optimisation is collapsed."""
    for _ in range(4):
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if collapsed(middle) else (inside, middle)
    return math.sqrt(inside * outside)


# [end copied]


def optimal_loss(K: int, E: float) -> float:
    """Theorem 1: least CE under a fixed ETF, E = sqrt(E_W E_H), whatever the class counts."""
    # at h = sqrt(E_H/E_W) w_y: h . w_k = E (K/(K-1) [k = y] - 1/(K-1))
    return math.log1p((K - 1) * math.exp(-E * K / (K - 1)))


def layer_peeled(counts, E_W: float, E_H: float, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Learnable classifier: optimal W (K, d) and class features H (K, d), d = K, for class counts (K,).

    min sum_k n_k/N CE(W h_k, k) with (1/K) sum ||w_k||^2 = E_W and (1/K) sum ||h_k||^2 = E_H (Fang et al.
    2021). Not convex in (W, H), but at d >= K without bad local minima. One feature a class is enough.
    """
    K = len(counts)
    weight = torch.as_tensor(counts, dtype=torch.float64) / sum(counts)

    def unpack(V, G):  # the optimum uses both budgets whole
        return V * (E_W * K) ** 0.5 / V.norm(), G * (E_H * K) ** 0.5 / G.norm()

    def loss(V, G):
        W, H = unpack(V, G)
        return weight @ F.cross_entropy(H @ W.T, torch.arange(K), reduction="none")

    generator = torch.Generator().manual_seed(0)
    V, G = (torch.randn(K, K, generator=generator, dtype=torch.float64) / 2 for _ in range(2))
    return unpack(*minimise(loss, V, G, steps=steps))


def peeled_features(loss, W: Tensor, y: Tensor, E_H: float, steps: int = 200) -> Tensor:
    """Fixed classifier W (K, d): the features of all samples, (N, d), that minimise loss(H, W, y).

    Searched in the whole ball ||h||^2 <= E_H, from random points inside: beyond it G is pulled back.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(y), W.shape[1], generator=generator, dtype=torch.float64)
    start = F.normalize(start) * torch.rand(len(y), 1, generator=generator, dtype=torch.float64)

    def ball(G):
        return math.sqrt(E_H) * G / G.norm(dim=1, keepdim=True).clamp_min(1)

    # times N: the mean hides a sample behind all others, and L-BFGS stops on the gradient
    (G,) = minimise(lambda G: len(y) * loss(ball(G), W, y), start, steps=steps)
    return ball(G)


def flow(gradient, h0, T: float, E_H: float, ball: bool, at=None):
    """Gradient flow dh/dt = -gradient(h) of one feature h (d,) to time T: scipy's solution, h at times `at`.

    On the sphere ||h||^2 = E_H only the tangential part moves h. In the ball h moves freely until it reaches
    the sphere, where the flow stops (`t_events`): from then on it is the sphere's.
    """

    def velocity(t, h):
        v = -gradient(h)
        return v if ball else v - (v @ h) / (h @ h) * h

    def surface(t, h):
        return h @ h - E_H

    surface.terminal = surface.direction = 1
    precise = dict(method="LSODA", rtol=1e-9, atol=1e-13, t_eval=at)
    return solve_ivp(velocity, (0, T), h0, events=surface if ball else None, **precise)


# Gradient flow on the sphere, E_W = E_H = E, from h = the direction of another class: theta, the angle to the
# own class vector, stays in the plane of both, so that time is an integral over theta. Derived here.


def dr_time(theta: float, K: int) -> float:
    """When dot-regression has brought the angle down to theta. In the end theta = 1 / sqrt(t)."""

    # u = cos theta: du/dt = (1 - u)^2 (1 + u), whose integral is elementary. The same for any E.
    def clock(v):  # v = 1 - cos theta; 1 - u would lose a small angle's digits
        return 1 / (2 * v) + math.log((2 - v) / v) / 4

    return clock(2 * math.sin(theta / 2) ** 2) - clock(K / (K - 1))


def ce_time(theta: float, K: int, E: float) -> float:
    """When cross-entropy has brought the angle down to theta, by quadrature; K >= 3."""
    start = math.acos(-1 / (K - 1))  # the angle between any two class vectors

    def speed(a):
        # cosines of h with the own, the other and each further class vector (all K sum to zero), and p
        own, other = math.cos(a), math.cos(start - a)
        further = -(own + other) / (K - 2)
        mass = np.exp(E * np.array([own, other, further])) * [1, 1, K - 2]
        p_own, p_other, p_further = mass / mass.sum() / [1, 1, K - 2]
        # what (1 - p_own) w_own - p_other w_other - sum p_k w_k does to the angle; the further w_k sum to
        # -(w_own + w_other)
        to_own, to_other = math.sin(a), -math.sin(start - a)
        return (1 - p_own) * to_own - p_other * to_other + p_further * (to_own + to_other)

    return quad(lambda a: 1 / speed(a), theta, start, limit=500)[0]


def ce_rate(K: int, E: float) -> float:
    """CE's angle ends as exp(-rate t): the slope of its flow at the optimum, in any direction."""
    e = math.exp(-E * K / (K - 1))
    p, q = 1 / (1 + (K - 1) * e), e / (1 + (K - 1) * e)  # probability of the own, of any other class
    # restoring force K/(K-1) (1 - p) of the pull, and E W^T diag(q) W = E K/(K-1) q of the Hessian
    return K / (K - 1) * (1 - p + E * q)


def ce_arrival(K: int, E: float) -> float:
    """When CE, from h = 0 in the ball, reaches the optimum on its surface: a finite time."""
    # on the axis x = (z_y - z_k) obeys dx/dt = E K^2/(K-1) / (e^x + K - 1), up to x = E K/(K-1)
    x = E * K / (K - 1)
    return (K - 1) / (K * K * E) * (math.expm1(x) + (K - 1) * x)


def synthetic(folder) -> bool:
    """Check each claim against direct optimisation or simulation; print the table, draw two figures."""
    passed, generator = [], torch.Generator().manual_seed(0)
    print(f"{'claim':<70}{'theory':>10}{'measured':>11}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, at_most=False):
        error = max(measured - theory, 0) if at_most else abs(measured - theory)
        passed.append(bool(error <= tolerance))
        print(f"{claim:<70}{theory:>10.4f}{measured:>11.4f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    # 1. Theorem 1: with a fixed ETF the optimum is neural collapse, however imbalanced the classes
    for K, E_W, E_H, rule, counts in (
        (10, 1, 1, "n_k = 100 ... 1", np.geomspace(100, 1, 10)),
        (10, 2, 5, "n_k = 100 or 1", [100] * 5 + [1] * 5),
        (100, 1, 1, "n_k = 20 ... 1", np.geomspace(20, 1, 100)),
    ):
        W = math.sqrt(E_W) * simplex_etf(K, K, generator)
        y = torch.arange(K).repeat_interleave(torch.as_tensor(np.rint(counts)).long())
        print(f"fixed ETF, K = {K}, E_W = {E_W}, E_H = {E_H}, {rule}, {len(y)} free features")
        H = peeled_features(cross_entropy_loss, W, y, E_H)
        best = optimal_loss(K, math.sqrt(E_W * E_H))
        check("   CE: log(1 + (K-1) exp(-E K/(K-1)))", best, cross_entropy_loss(H, W, y).item(), 1e-9)
        far = (H - math.sqrt(E_H / E_W) * W[y]).norm(dim=1).max().item() / math.sqrt(E_H)
        check("   CE: largest distance of a feature from sqrt(E_H/E_W) w_y", 0, far, 1e-5)

        def dr(h, W, y, E_W=E_W, E_H=E_H):
            return dot_regression_loss(h, W, y, E_W, E_H)

        H = peeled_features(dr, W, y, E_H)
        check("   DR: 0", 0, dr(H, W, y).item(), 1e-9)
        far = (H - math.sqrt(E_H / E_W) * W[y]).norm(dim=1).max().item() / math.sqrt(E_H)
        check("   DR: largest distance (its optimum is flat: error ~ gradient^(1/3))", 0, far, 2e-2)

    # 2. A learnable classifier gives the minority one common vector from n_A / n_B = R* on; a fixed one never
    def minority(K_A, K_B, E_W, E_H, R):  # mean cosine of the minority's class vectors
        W, _ = layer_peeled([R] * K_A + [1] * K_B, E_W, E_H)
        return mean_pairwise_cosine(W, torch.arange(K_A, K_A + K_B))

    settings = {(5, 5): (1, 5), (7, 3): (1, 5), (3, 7): (1, 1)}  # the first is that of Fang et al.
    edges = {k: collapse_threshold(*k, math.sqrt(E_W * E_H)) for k, (E_W, E_H) in settings.items()}
    for k, (E_W, E_H) in settings.items():
        R = edges[k]
        found = locate(lambda R, k=k, b=(E_W, E_H): minority(*k, *b, R) > 0.99, 1.15 * R, 0.9 * R)
        check(
            f"learnable, {k[0]} + {k[1]} classes, E_W = {E_W}, E_H = {E_H}: collapse from R =",
            R,
            found,
            0.01 * R,
        )
    check("   5 + 5: minority cosine at R = 13.5", 1, minority(5, 5, 1, 5, 13.5), 1e-6)
    check("   5 + 5: minority cosine at R = 11, at most", 0.95, minority(5, 5, 1, 5, 11), 0, True)
    K, few, W = 10, torch.arange(5, 10), simplex_etf(10, 10, generator)
    for R in (13.5, 1e4):  # weights instead of ten thousand samples
        weight = torch.tensor([R] * 5 + [1.0] * 5, dtype=torch.float64) / (5 * R + 5)

        def weighted(h, W, y, weight=weight):
            return weight @ F.cross_entropy(h @ W.T, y, reduction="none") / weight.min()

        H = peeled_features(weighted, W, torch.arange(K), 5)
        found = mean_pairwise_cosine(H, few)
        check(f"fixed ETF, CE, R = {R:g}: cosine of minority features -1/(K-1)", -1 / (K - 1), found, 1e-5)

    # 3. Closed forms of the gradients, of the loss with class lengths, and what Mixup leaves of DR's optimum
    y = torch.randint(K, (64,), generator=generator)
    h, V = (torch.randn(n, K, generator=generator, dtype=torch.float64).requires_grad_() for n in (64, K))
    g_h, g_V = torch.autograd.grad(cross_entropy_loss(h, V, y), (h, V))
    error = (sum(ce_feature_gradient(h, V, y)) / len(y) - g_h).abs().max().item()
    check("CE: pull + push on features against autograd, largest error", 0, error, 1e-14)
    error = (sum(ce_classifier_gradient(h, V, y)) - g_V).abs().max().item()
    check("CE: pull + push on class vectors against autograd, largest error", 0, error, 1e-14)
    (g_h,) = torch.autograd.grad(dot_regression_loss(h, W, y, 1, 5), h)
    error = (dr_feature_gradient(h, W, y, 1, 5) / len(y) - g_h).abs().max().item()
    check("DR: pull on features against autograd, largest error", 0, error, 1e-14)
    u = F.normalize(h.detach())
    longer = class_length(y, K).double()[y, None] * W[y]  # the released form: a longer w_y, w_y . h = ||w_y||
    released = ((u * longer).sum(1) - longer.norm(dim=1)).square().mean() / 2
    inverse = 64 / len(y.unique()) / torch.bincount(y, minlength=K)[y]  # gamma / n_y
    reweighted = (inverse * ((u * W[y]).sum(1) - 1).square()).mean() / 2
    check("class lengths = inverse-frequency weights in the batch", reweighted.item(), released.item(), 1e-7)
    for n in (10, 100):  # lam = 1/2: the best h has cosine sqrt((n-2) / (2 (n-1))) with both class vectors
        W_n, pair = simplex_etf(n, n, generator), torch.tensor([0, 1])
        floor = (1 - math.sqrt((n - 2) / (2 * (n - 1)))) ** 2 / 2

        def mixed(x, W=W_n, pair=pair):
            return dot_regression_loss(F.normalize(x).expand(2, -1), W, pair)

        best = mixed(*minimise(mixed, W_n[:1] + W_n[2:3])).item()
        check(f"DR with Mixup, lam = 1/2, K = {n}: the loss stays above", floor, best, 1e-9)

    # 4. Which converges faster? One feature, from the direction of another class, E_W = E_H = E
    axis, own, clocks, paths = W[0].numpy(), torch.tensor([0]), {}, {}

    def off(h):  # angle of h (..., d) to the own class vector, right down to rounding
        along = h @ axis
        return np.arctan2(np.linalg.norm(h - along[..., None] * axis, axis=-1), along)

    for E in (1, 10):
        W_E = math.sqrt(E) * W

        def ce(h, W=W_E):
            return sum(ce_feature_gradient(torch.from_numpy(h)[None], W, own))[0].numpy()

        def dr(h, W=W_E, E=E):
            return dr_feature_gradient(torch.from_numpy(h)[None], W, own, E, E)[0].numpy()

        other = math.sqrt(E) * W[1].numpy()
        print(f"on the sphere, E = {E}: the time to an angle of 0.1 and of 0.01; below it, the angle reached")
        for theta in (0.1, 0.01):
            for name, gradient, t in (("DR", dr, dr_time(theta, K)), ("CE", ce, ce_time(theta, K, E))):
                reached = off(flow(gradient, other, t, E, ball=False).y[:, -1])
                check(f"   {name} at t = {t:.1f}", theta, reached, 1e-5 * theta)
                clocks[name, E, theta] = t
        rate = ce_rate(K, E)
        early, late = flow(ce, other, 15 / rate, E, ball=False, at=np.array([12, 15]) / rate).y.T
        measured = math.log(off(early) / off(late)) * rate / 3
        check("   CE in the end: rate of exp(-rate t)", rate, measured, 1e-4 * rate)
        early, late = flow(dr, other, 1e6, E, ball=False, at=[1e4, 1e6]).y.T
        measured = math.log(off(late) / off(early)) / math.log(100)
        check("   DR in the end: exponent of t^-1/2", -0.5, measured, 1e-3)
        for name, gradient, end in (("CE", ce, min(15 / rate, 1e5)), ("DR", dr, 1e5)):
            at = np.geomspace(0.1, end, 60)
            label = f"CE, E = {E}" if name == "CE" else "DR, any E"
            paths[label] = at, off(flow(gradient, other, end, E, ball=False, at=at).y.T)
        print(f"in the ball, E = {E}, from h = 0")
        T = ce_arrival(K, E)
        arrived = flow(ce, np.zeros(K), 2 * T, E, ball=True)
        check("   CE is at the optimum, on the surface, at t =", T, arrived.t_events[0][0], 1e-5 * T)
        left = 1 - np.linalg.norm(flow(dr, np.zeros(K), 3, E, ball=True).y[:, -1]) / math.sqrt(E)
        check("   DR at t = 3: part of the way that is left, e^-t", math.exp(-3), left, 1e-6)
        # From half of another class vector DR goes straight on, along w_y, until it meets the surface at an
        # angle with sin = 1/2 sin(angle of the classes); there it slides on as above
        met = flow(dr, other / 2, 10, E, ball=True)
        at = math.asin(math.sin(math.acos(-1 / (K - 1))) / 2)
        check("   DR from half of another class vector: angle at the surface", at, off(met.y[:, -1]), 1e-6)
        T = math.log((1 + 0.5 / (K - 1)) / (1 - math.cos(at)))
        check("      reached at t =", T, met.t_events[0][0], 1e-5)
    # The claim that dot-regression converges faster: at large E and large angles; never in the end
    for E, theta, first in ((1, 0.1, "CE"), (1, 0.01, "CE"), (10, 0.1, "DR"), (10, 0.01, "CE")):
        sooner = min(("CE", "DR"), key=lambda name, E=E, theta=theta: clocks[name, E, theta])
        check(f"sphere, E = {E}: is {first} the first at an angle of {theta}?", 1, sooner == first, 0)

    # Two pictures: where a learnable classifier collapses, and how fast an angle closes
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    plot = figure.subplots()
    # far beyond R* the vectors of 7 + 3's minority shrink to zero, and a cosine means nothing
    x = np.array([0.25, 0.35, 0.5, 0.7, 0.85, 0.95, 1.02, 1.1, 1.2])
    for (k, (E_W, E_H)), style in zip(settings.items(), ("o-", "s--", "^-."), strict=True):
        R = edges[k] * x[edges[k] * x > 1]
        label = f"{k[0]} + {k[1]} classes, E_W = {E_W}, E_H = {E_H}"
        plot.plot(R, [minority(*k, E_W, E_H, r) for r in R], style, color="black", label=label)
        plot.axvline(edges[k], ls=style[1:], color="0.6")
    plot.axhline(-1 / (K - 1), color="0.6", lw=3, label="fixed simplex ETF")
    plot.set(xscale="log", xlabel="images of a majority class / of a minority class", ylim=(-0.2, 1.05))
    plot.set(ylabel="mean cosine of minority class vectors", title="Minority collapse; grey: predicted R*")
    plot.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    plot.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    write_atomically(Path(folder) / "collapse.png", lambda part: figure.savefig(part, dpi=100))

    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.subplots()
    for (label, path), style in zip(paths.items(), (":", "-", "-."), strict=True):
        plot.plot(*path, style, color="black", label=label)
    plot.set(xscale="log", yscale="log", xlim=(0.1, 1e5), ylim=(1e-3, 3), xlabel="time of the gradient flow")
    plot.set(
        ylabel="angle to the own class vector (radians)", title="From another class vector, on the sphere"
    )
    plot.legend()
    write_atomically(Path(folder) / "convergence.png", lambda part: figure.savefig(part, dpi=100))
    print(f"{sum(passed)} of {len(passed)} claims hold; figures: collapse.png, convergence.png in {folder}")
    return all(passed)


# %% [3] Network


# [copied: resnet32]
class Block(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut: stride by slicing, new channels zero (option A)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new = stride, channels - channels_in

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
        blocks, now = [], stages[0]
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


class Classifier(nn.Module):
    """Class vectors W (K, d) without bias, learnable or a fixed simplex ETF. Always in float32.

    unit False: logits h W^T of the pooled features as they are, the usual last layer. (The baseline's class
    vectors in the released CIFAR code are frozen at random: requires_grad is False. Ours learn.)
    unit True: BatchNorm1d, then ||h||^2 = E_H and ||w_k||^2 = E_W. Behind a ReLU features fill one orthant
    only, and an ETF's vectors point everywhere. No temperature but E, and no bias, as released.
    """

    def __init__(self, K: int, d: int, fixed: bool, unit: bool, E_W: float, E_H: float):
        super().__init__()
        self.lengths = (math.sqrt(E_H), math.sqrt(E_W)) if unit else None
        self.bn = nn.BatchNorm1d(d) if unit else nn.Identity()
        # learnable: nn.Linear's default start
        W = simplex_etf(K, d).float() if fixed else torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)
        self.W = nn.Parameter(W, requires_grad=not fixed)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, d) from the network -> h (B, d) and W (K, d) as the loss sees them; logits are h W^T."""
        h = self.bn(h.float())
        if self.lengths is None:
            return h, self.W
        return tuple(n * F.normalize(v, dim=1) for n, v in zip(self.lengths, (h, self.W), strict=True))


# %% [4] Training


class Method(NamedTuple):
    fixed: bool  # simplex ETF, or a learnable classifier
    loss: str  # ce or dr
    mixup: bool


METHODS = {
    "ce": Method(False, "ce", False),
    "ce+mixup": Method(False, "ce", True),
    "etf+ce": Method(True, "ce", False),
    "etf+dr": Method(True, "dr", False),
    "etf+dr+mixup": Method(True, "dr", True),
}
# What published recipes leave to the user: small sets need small batches and fewer epochs.
RECIPES = {"digits": (20, 32), "mnist": (40, 128), "fashionmnist": (100, 128), "folder": (90, 256)}
PUBLISHED = (200, 128)  # epochs, batch size


def build_model(args: argparse.Namespace, method: Method, data: Dataset) -> nn.ModuleDict:
    """Network and classifier; --project puts one more layer between them, whatever the method."""
    K, channels = len(data.classes), data.train_x.shape[3]
    if args.network == "resnet32":
        network = ResNet32(channels, args.width)
    else:
        network = torchvision.models.resnet50(weights=None)
        network.fc, network.d = nn.Identity(), 2048  # the paper widens the last stage to 4096
    if args.project:
        # with a ReLU, since a linear map of 64 features would still fill 64 dimensions only
        network = nn.Sequential(network, nn.Linear(network.d, args.project), nn.ReLU())
        network.d = args.project
    unit = method.fixed or args.normalise == "on"
    classifier = Classifier(K, network.d, method.fixed, unit, args.E_W, args.E_H)
    return nn.ModuleDict({"network": network, "classifier": classifier})


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160, a hundredth after 180; in proportion."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    return args.lr * min(1, (epoch + 1) / warmup) * (0.01 if done > 0.9 else 0.1 if done > 0.8 else 1)


def train(args, name: str, seed: int, data: Dataset, run: Run, device: torch.device) -> dict:
    """Train one method with one seed in its run folder, from its last checkpoint on; returns the result."""
    method, K, N = METHODS[name], len(data.classes), len(data.train_y)
    generator = torch.Generator().manual_seed(seed)  # order, augmentation, mixing; all on the CPU
    torch.manual_seed(seed)  # initialisation
    model = build_model(args, method, data).to(device, memory_format=torch.channels_last)
    network, classifier = in_parallel(model)
    network = torch.compile(network) if args.compile else network
    learnable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnable, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    batches = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    test_y = data.test_y.to(metric_device(device))
    groups, _ = shot_groups(data.counts.to(test_y.device))
    watched = probe(data.train_y, K)
    weighed = (args.class_length if method.loss == "dr" else args.reweight) == "on"
    start, best, seconds = 0, 0.0, 0.0

    def loss_of(h: Tensor, W: Tensor, y: Tensor, length: Tensor | None) -> Tensor:
        if method.loss == "ce":
            return cross_entropy_loss(h, W, y, length)
        return dot_regression_loss(h, W, y, args.E_W, args.E_H, length)

    with first_rank_first():
        state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start, best, seconds = state["epoch"], state["best"], state["seconds"]

    def step(weight: Tensor, everyone: Tensor, x: Tensor, a: Tensor, x_b=None, b=None, lam=None) -> Tensor:
        """One batch: images x (B, C, H, W), labels a (B,); what is mixed in, and lam () -> loss.

        On several GPUs it is this one's share of a batch: weight (), which is else 1, is what the mean over
        the share is worth, and `everyone` the labels of the whole batch, by which class lengths are counted.
        """
        if method.mixup:
            x = lam * x + (1 - lam) * x_b  # (B, C, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            h = network(x)
        (h, W), length = classifier(h), class_length(everyone, K) if weighed else None
        loss = loss_of(h, W, a, length)
        if method.mixup:  # L = lam L(h, a) + (1 - lam) L(h, b): the losses are mixed, not the targets
            loss = lam * loss + (1 - lam) * loss_of(h, W, b, length)
        loss = weight * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    training_step = TrainingStep(step, optimizer, device, capture=not args.compile)

    def checkpoint(epoch: int) -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        numbers = {"epoch": epoch, "best": best, "seconds": seconds}
        run.save_checkpoint({**parts, **numbers, "generator": generator.get_state()})

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    parts = split_evenly(N, args.batch_size)
    ahead, title = range(start, args.epochs), f"{name} seed {seed}"
    hide = True if ranks()[0] else None  # None: silent without terminal
    bar = tqdm(ahead, initial=start, total=args.epochs, desc=title, disable=hide)
    for epoch in bar:
        began = time.perf_counter()
        # An epoch is drawn at once: every image once, whatever its class (instance-balanced)
        order = torch.randperm(N, generator=generator)
        views, labels = batches.views(order, generator), data.train_y[order].to(device)
        # Mixup pairs a batch with a permutation of itself, so that both labels have the same class counts
        partner = torch.cat([p.start + torch.randperm(p.stop - p.start, generator=generator) for p in parts])
        lam, partner = draw_lam(args.alpha, len(parts), generator).to(device), partner.to(device)
        training_step.set_learning_rate(learning_rate(epoch, args))
        steps = parts[: 2 if args.dry_run else None]
        losses = torch.zeros(len(steps), device=device)  # read once an epoch: no step waits for the host
        model.train()
        own, weight = [own_share(part) for part in steps], share_of_mean(steps).to(device)
        images, partners = batches.sequence(views, own), batches.sequence(views[partner], own)
        for i, (part, batch) in enumerate(zip(own, steps, strict=True)):
            x, mixed = next(images), ()
            if method.mixup:  # the partners of a share may be in another GPU's
                x_b = x[partner[part] - part.start] if ranks()[1] == 1 else next(partners)
                mixed = x_b, labels[partner[part]], lam[i]
            losses[i] = training_step(weight[i], labels[batch], x, labels[part], *mixed)
            if i == 0:
                warm = time.perf_counter()
        agree(model, losses)
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{name} seed {seed}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; lower "
                f"--lr and --overwrite. Last good checkpoint: epoch {epoch}, {run.folder}/checkpoint.pt"
            )
        seconds += time.perf_counter() - began
        line = dict(epoch=epoch + 1, lr=learning_rate(epoch, args), loss=float(losses.mean()))
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            _, _, prediction = evaluate(model, test, args.precision)
            per_class = accuracy_per_class(prediction, test_y, K)
            line["accuracy"] = float((prediction == test_y).double().mean())
            line |= {group: float(per_class[members].nanmean()) for group, members in groups.items()}
            line |= watch(args, method, model, batches, data, watched)
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * len(steps) / max(len(steps) - 1, 1)
            tqdm.write(f"{name} seed {seed}: about {epoch_time * (args.epochs - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)

    about = {"method": name, "seed": seed, "best_accuracy": best, "seconds": seconds}
    return conclude(args, data, run, model, batches, test, about)


def draw_lam(alpha: float, n: int, generator: torch.Generator) -> Tensor:
    """n draws of lam ~ Beta(alpha, alpha), (n,) float32, from our generator (torch's Beta takes none)."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, n)).float()


# %% [5] Evaluation and figures


@torch.no_grad()
def evaluate(model: nn.ModuleDict, batches: Batches, precision: str, index: Tensor | None = None):
    """h (N, d), W (K, d) and predictions (N,) for the images `index` (all), in order, unaugmented."""
    model.eval()
    views = batches.views(torch.arange(batches.N) if index is None else index)
    hs, predictions = [], []
    parts = split_evenly(len(views.index), (1000 if batches.H < 64 else 100) * ranks()[1])
    for part, x in zip(parts, batches.sequence(views, [own_share(part) for part in parts]), strict=True):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = model["network"](x)
        h, W = model["classifier"](h)
        hs.append(whole(h, part))
        predictions.append(whole((h @ W.T).argmax(1), part))
    return [v.detach().to(metric_device(batches.device)) for v in (torch.cat(hs), W, torch.cat(predictions))]


def probe(y: Tensor, K: int, total: int = 2000) -> Tensor:
    """Training images to watch every epoch: the first total / K of each class, all of a rare one. (n,)"""
    return torch.cat([(y == k).nonzero().flatten()[: max(total // K, 1)] for k in range(K)])


def mean_angle(V: Tensor, classes: Tensor) -> float:
    """Mean angle in degrees between the rows `classes` of V (K, d); nan for fewer than two."""
    n = len(classes)
    angle = torch.rad2deg(cosines(V[classes]).clamp(-1, 1).arccos())
    return float(angle[~torch.eye(n, dtype=torch.bool, device=angle.device)].mean())


def watch(args, method: Method, model, batches: Batches, data: Dataset, watched: Tensor) -> dict[str, float]:
    """Neural collapse, minority angles and the parts of the gradient, on the watched training images."""
    h, W, prediction = evaluate(model, batches, args.precision, watched)  # (n, d), (K, d), (n,)
    y, n = data.train_y[watched].to(h.device), data.counts.to(h.device)
    groups, _ = shot_groups(n)
    line = collapse_metrics(h, y, W, prediction, groups["few"])
    M = torch.stack([h[y == k].double().mean(0) for k in range(len(W))])  # (K, d)
    line["minority_angle_M"] = mean_angle(M - M.mean(0), groups["few"])
    line["minority_angle_W"] = mean_angle(W, groups["few"])
    if method.loss == "ce":
        pull, push = ce_feature_gradient(h, W, y)
    else:
        pull, push = dr_feature_gradient(h, W, y, args.E_W, args.E_H), None
    parts = {"pull_h": pull, "push_h": push}
    for group in ("many", "few"):
        inside = torch.isin(y, groups[group])
        line |= {
            f"{k}_{group}": float(v[inside].norm(dim=1).mean()) for k, v in parts.items() if v is not None
        }
    if not method.fixed:
        # each class counts with all of its training images, however many are watched
        weight = (n / n.sum() * len(y) / torch.bincount(y, minlength=len(W)))[y]  # (n,)
        parts = dict(zip(("pull_w", "push_w"), ce_classifier_gradient(h, W, y, weight), strict=True))
        for group in ("many", "few"):
            line |= {f"{k}_{group}": float(v[groups[group]].norm(dim=1).mean()) for k, v in parts.items()}
    return line


def conclude(args, data: Dataset, run: Run, model, batches: Batches, test: Batches, about: dict) -> dict:
    """Measure the trained model on all data, write features.npz and result.json; returns the result."""
    measure, K = metric_device(batches.device), len(data.classes)
    train_y, test_y = data.train_y.to(measure), data.test_y.to(measure)
    groups, rule = shot_groups(data.counts.to(measure))
    train_h, W, train_prediction = evaluate(model, batches, args.precision)
    test_h, _, prediction = evaluate(model, test, args.precision)
    per_class = accuracy_per_class(prediction, test_y, K)
    result = {
        **about,
        "epochs": args.epochs,
        "accuracy": float((prediction == test_y).double().mean()),
        **{group: float(per_class[members].nanmean()) for group, members in groups.items()},
        "rule": rule,
        "train_accuracy": float((train_prediction == train_y).double().mean()),
        **collapse_metrics(train_h, train_y, W, train_prediction, groups["few"]),
        "per_class": per_class.tolist(),
        "counts": data.counts.tolist(),
    }
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    run.finish(result)
    return result


MARKERS = dict(zip(METHODS, "osv^d", strict=True))


def draw_figures(folder: Path, runs: list[Run]) -> list[str]:
    """Six figures of finished runs, one idea each, methods side by side; heat maps show the first seed.

    Returns the names of the files, which go to folder.
    """
    by_method = {name: [r for r in runs if r.finished["method"] == name] for name in METHODS}
    by_method = {name: found for name, found in by_method.items() if found}
    shades = np.linspace(0.7, 0, len(by_method))
    look = {
        name: {"color": str(shade), "marker": MARKERS[name], "label": name}
        for name, shade in zip(by_method, shades, strict=True)
    }
    n = np.array(runs[0].finished["counts"])
    order = np.argsort(-n, kind="stable")  # head first
    saved = []

    def save(name: str, figure: Figure) -> None:
        for plot in figure.axes:
            if plot.get_xlabel() and plot.get_xscale() == "linear":  # epochs, classes: whole numbers
                plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=100))
        saved.append(name)

    def history(method: str, key: str) -> tuple[list, np.ndarray]:  # tested epochs, mean over seeds
        tested = [[line for line in r.history if key in line] for r in by_method[method]]
        values = np.array([[line[key] for line in lines] for lines in tested], dtype=float)
        return [line["epoch"] for line in tested[0]] if tested else [], values.mean(0)

    def curve(plot, method: str, x, y, **style) -> None:
        plot.plot(x, y, markevery=max(1, len(x) // 8), **look[method] | style)

    # Where minority collapse costs: accuracy by class size, in ten groups also for 100 classes
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot, parts = figure.subplots(), np.array_split(order, min(10, len(order)))
    for name, found in by_method.items():
        accuracy = 100 * np.mean([r.finished["per_class"] for r in found], axis=0)
        curve(plot, name, [n[g].mean() for g in parts], [np.nanmean(accuracy[g]) for g in parts])
    plot.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy (%)")
    plot.legend()
    save("accuracy_by_class.png", figure)

    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.subplots()
    for name in by_method:
        x, y = history(name, "accuracy")
        curve(plot, name, x, 100 * y)
    plot.set(xlabel="epoch", ylabel="test accuracy (%)")
    plot.legend()
    save("training.png", figure)

    # Where minority collapse shows: rare classes' vectors with cosine 1, a dark block at lower right; and
    # whether the features follow a classifier that was fixed
    arrays = {name: found[0].load_features() for name, found in by_method.items()}
    figure = Figure(figsize=(2.5 * len(arrays) + 1.5, 5.2), layout="constrained")
    grid = figure.subplots(2, len(arrays), squeeze=False)
    for column, (name, a) in zip(grid.T, arrays.items(), strict=True):
        M = np.stack([a["train_h"][a["train_y"] == k].mean(0) for k in range(len(n))])
        for plot, V in zip(column, (a["W"], M - M.mean(0)), strict=True):
            values = cosines(torch.from_numpy(V)).numpy()[np.ix_(order, order)]
            image = plot.imshow(values, cmap="gray_r", interpolation="nearest", vmin=-1, vmax=1)
            plot.set(xlabel="class, largest first", yticks=[])
        column[0].set_title(name)
    grid[0, 0].set(ylabel="class vectors")
    grid[1, 0].set(ylabel="means of features")
    figure.colorbar(image, ax=grid, label="cosine")
    save("class_vectors.png", figure)

    # Minority collapse over training: an angle of 0 is collapse, the ETF's is reached by none too small
    figure = Figure(figsize=(9, 4), layout="constrained")
    titles = {"minority_angle_W": "class vectors of the few", "minority_angle_M": "their feature means"}
    for plot, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for name in by_method:
            curve(plot, name, *history(name, key))
        plot.axhline(math.degrees(math.acos(-1 / (len(n) - 1))), ls=":", color="0.5", label="simplex ETF")
        plot.set(xlabel="epoch", title=title)
    figure.axes[0].set(ylabel="mean angle (degrees)", ylim=(0, None))
    figure.axes[1].legend()
    save("minority_angle.png", figure)

    # Neural collapse over training, on the watched training images: all four go to 0
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    titles = {
        "nc1": "NC1: spread within classes / between",
        "nc2_equiangular_M": "NC2: mean |cos + 1/(K-1)| of class means",
        "nc3": "NC3: distance of W from the class means",
        "nc4": "NC4: nearest mean is not the prediction",
    }
    for plot, (key, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        for name in by_method:
            curve(plot, name, *history(name, key))
        plot.set(xlabel="epoch", title=title, yscale="log" if key == "nc1" else "linear")
    figure.legend(*plot.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save("neural_collapse.png", figure)

    # What moves a feature and a class vector: pull and push, for head and tail classes
    figure = Figure(figsize=(2.6 * len(by_method) + 1.8, 5.2), layout="constrained")
    grid = figure.subplots(2, len(by_method), sharex=True, sharey="row", squeeze=False)
    for column, name in zip(grid.T, by_method, strict=True):
        for plot, on in zip(column, "hw", strict=True):
            for (part, ls), (group, shade) in itertools.product(
                (("pull", "-"), ("push", "--")), (("many", "0.6"), ("few", "0"))
            ):
                x, y = history(name, f"{part}_{on}_{group}")
                if len(x):
                    y[y == 0] = np.nan  # features behind a ReLU can all be zero in the first epochs
                    plot.plot(x, y, ls=ls, color=shade, label=f"{part}, the {group}")
            plot.set(yscale="log")
            plot.minorticks_off()
        if METHODS[name].fixed:
            column[1].text(0.5, 0.5, "fixed", ha="center", transform=column[1].transAxes)
        column[0].set_title(name)
        column[1].set(xlabel="epoch")
    grid[0, 0].set(ylabel="norm of its gradient,\na feature")
    grid[1, 0].set(ylabel="norm of its gradient,\na class vector")
    handles = {h.get_label(): h for plot in grid.flat for h in plot.lines}  # dot-regression has no push
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    save("gradients.png", figure)
    return saved


def results_table(runs: list[Run]) -> str:
    """Mean ± std over seeds, a row a method: last epoch's accuracy first, the best epoch's beside it."""
    percent = ["accuracy", "best_accuracy", "many", "medium", "few", "train_accuracy"]
    rows = []
    for name in METHODS:
        if found := [r.finished for r in runs if r.finished["method"] == name]:
            cells = [mean_std([r[key] for r in found], 2, 100) for key in percent]
            cells += [mean_std([r[key] for r in found], 3) for key in ("minority_cosine_W", "nc1", "nc3")]
            rows.append([name, len(found), *cells, f"{np.mean([r['seconds'] for r in found]):.0f}"])
    header = ["method", "seeds", "accuracy %", "best %", "many %", "medium %", "few %", "training %"]
    return table([*header, "minority cos", "NC1", "NC3", "train s"], rows)


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Minority collapse of a learnable classifier; a fixed simplex ETF and dot-regression instead."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("etf_dr.py", description=about, formatter_class=formatter)).add_argument
    sets = f"{', '.join(SPECS)}, folder:PATH; long-tailed with lt: cifar10lt"
    add("--dataset", default="digitslt", help=sets)
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    add("--out", type=Path, default="runs", help="run folders go to OUT/etf_dr/DATASET/METHOD/seedS")
    add("--method", nargs="+", default=list(METHODS), choices=[*METHODS, "all"], help="one or more")
    add("--epochs", type=int, help="200; folder 90, fashionmnist 100, mnist 40, digits 20")
    add("--batch-size", type=int, help="of all GPUs together: 128; folder 256, digits 32")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--weight-decay", type=float, default=2e-4, help="on all parameters")
    add("--seed", type=int, nargs="+", default=[0], help="one or more; of weights, order, views and mixing")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of its own; they share the cores")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="inside the network only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start anew the runs that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    synthetic_help = "check the theory in the layer-peeled model; trains no network"
    add("--synthetic", action="store_true", help=synthetic_help)
    add("--imbalance", type=float, default=100.0, help="largest over smallest class, for lt")
    add("--profile", choices=["exp", "step"], default="exp", help="shape of the long tail, for lt")
    add("--subset-seed", type=int, default=0, help="which images a class keeps, for lt")
    add("--image-size", type=int, default=224, help="pixels, for folder:PATH")
    add("--network", choices=["auto", "resnet32", "resnet50"], default="auto", help="50 for folder:, else 32")
    add("--width", type=int, help="of ResNet-32: channels times this, d = 64 times this; cifar100 2, else 1")
    add("--project", type=int, default=0, help="d of one more layer, Linear and ReLU, after the network")
    add(
        "--E-W",
        type=float,
        default=1.0,
        help="squared length of the class vectors, where they have one length",
    )
    add("--E-H", type=float, default=1.0, help="squared length of the features there")
    lengths = "dr: lengths sqrt(gamma / n_k) in each batch, the released default: inverse-frequency weights"
    add("--class-length", choices=["on", "off"], default="on", help=lengths)
    add("--reweight", choices=["on", "off"], default="off", help="ce: the same weights for its samples")
    norms = "ce, ce+mixup: BatchNorm and the lengths of --E-H and --E-W, as with a fixed classifier"
    add("--normalise", choices=["on", "off"], default="off", help=norms)
    add("--alpha", type=float, default=1.0, help="lam ~ Beta(alpha, alpha) for Mixup")
    add("--eval-every", type=int, default=2, help="epochs from test to test; the last is always tested")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    base = args.dataset.partition(":")[0].removesuffix("lt")
    epochs, batch_size = RECIPES.get(base, PUBLISHED)
    args.epochs = epochs if args.epochs is None else args.epochs
    args.batch_size = batch_size if args.batch_size is None else args.batch_size
    args.width = (2 if base == "cifar100" else 1) if args.width is None else args.width
    if args.network == "auto":
        args.network = "resnet50" if base == "folder" else "resnet32"
    # batches of 3 or more, cut evenly, never hold a single image, which BatchNorm1d could not use
    least = dict(epochs=1, jobs=0, batch_size=3, width=1, eval_every=1, image_size=1, project=0)
    for flag, value in least.items():
        if getattr(args, flag) < value:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {value} or more")
    for flag in ("lr", "alpha", "E_W", "E_H"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number above 0")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed = list(dict.fromkeys(args.seed))
    if args.dry_run:
        args.epochs, args.overwrite, args.out = 1, True, args.out / "dry-run"
    return args


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "resume", "overwrite", "synthetic"}
NOT_IN_CONFIG |= {"jobs", "words"}


def program(args: argparse.Namespace) -> dict:
    """Every method with every seed, one after another; the table and the figures. Raises UserError."""
    if args.synthetic:
        return {"ok": ranks()[0] > 0 or synthetic(args.out / "etf_dr" / "synthetic")}
    device = join_ranks(pick_device(args.device))
    args.precision = pick_precision(args.precision, device)
    tail = dict(imbalance=args.imbalance, profile=args.profile, subset_seed=args.subset_seed)
    with first_rank_first():  # which may have to download
        data = load_dataset(args.dataset, args.data_dir, **tail, image_size=args.image_size)
    K, N, n = len(data.classes), len(data.train_y), data.counts
    if K < 2 or N < 2:
        found = f"{K} classes, {N} training images" if K > 1 else "one class"
        raise UserError(f"--dataset {args.dataset}: {found}; expected two or more")
    if not n.all():
        raise UserError(f"--dataset {args.dataset}: class {int(n.argmin())} has no training image")
    check_shares(N, len(data.test_y), args.batch_size)
    folder = args.out / "etf_dr" / args.dataset.replace(":", "-").replace("/", "-")
    print(f"{args.dataset}: {K} classes, {N:,} training images ({n.max()} to {n.min()} a class), ", end="")
    print(f"{len(data.test_y):,} test images\n{hardware(device)}, {args.precision}; into {folder}")
    for name in args.method:  # says what is wrong with a model before the first one is trained
        model = build_model(args, METHODS[name], data)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{name}: {args.network}, d = {model['classifier'].W.shape[1]}, {size:,} parameters; ", end="")
        print(f"seeds {args.seed}, {args.epochs} epochs of {N:,} samples, batch {args.batch_size}")
    if args.jobs > 1:  # all are finished then, and what follows only reads them
        run_side_by_side(Path(__file__), args, device)
        args.resume, args.overwrite = True, False
    runs = []
    for name in args.method:
        for seed in args.seed:
            flags = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG}
            flags |= {"method": name, "seed": seed}
            again = dict(resume=args.resume, overwrite=args.overwrite)
            with first_rank_first():
                run = Run(folder / name / f"seed{seed}", flags, Path(__file__), **again, device=device)
            if not run.finished:
                train(args, name, seed, data, run, device)
                if not ranks()[0]:
                    draw_figures(run.folder, [run])
            elif args.jobs <= 1:  # else it was said when the run ended
                accuracy = 100 * run.finished["accuracy"]
                print(f"{name} seed {seed}: done before, {accuracy:.2f}%; --overwrite redoes it")
            runs.append(run)
    # one of several at once: the common table and figures are for the one who started us
    if args.jobs == 0 or ranks()[0]:
        return {"results": [run.finished for run in runs], "folder": str(folder)}
    print(f"\n{results_table(runs)}\nLast epoch. Groups: {runs[0].finished['rule']}.")
    print("minority cos: mean cosine of the few's class vectors, 1 where the minority has collapsed")
    figures = draw_figures(folder, runs)
    print(f"figures in {folder}: {', '.join(figures)}")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def main(argv: list[str] | None = None) -> dict:
    """Run the command line. Exit code 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        with quiet_but_first():
            result = program(parse(argv))
    except UserError as error:
        print(f"etf_dr.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        launch = ["torchrun", "--nproc-per-node", str(ranks()[1])] if ranks()[1] > 1 else ["python"]
        command = shlex.join([*launch, "etf_dr.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
