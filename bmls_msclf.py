# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
"""Minority collapse under Mixup, and two remedies: Balanced Mixed Label Sampler, Mixed-Singleton classifier.

Source: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 3. Of it we have the abstract only.

WHAT COLLAPSES. Class k has n_k of N images, pi_k = n_k / N, and n_max / n_min = IF (100, say). A network
that is flexible enough (the layer-peeled model: features h free, class vectors w_k learnable) gives rare
classes *one and the same* class vector as soon as the tail is long enough (Fang et al. 2021): minority
collapse. In the penalised form the threshold is exact,

    the minority collapses  <=>  n_B / N <= lam_W lam_H           n_B images in each minority class

Mixup (x = lam x_a + (1-lam) x_b, lam ~ Beta(alpha, alpha)) does not help: symmetric lam leaves each class
its share pi_k, while the mixed label (i, j) comes with pi_i pi_j, so that two classes an IF apart are IF^2
apart on the diagonal and most rare pairs never come. It even hurts, since mixing spends part of the
minority's signal:

    with Mixup:  (n_B / N) (alpha+1)/(2 alpha+1) <= lam_W lam_H   2/3 at alpha = 1: collapse comes earlier

REMEDY 1, the sampler: balance the *mixed* labels. Every pair of classes comes once before any comes again.
REMEDY 2, the loss: read the mixed label (i, j, lam) as a class of its own, with class vector lam w_i +
(1-lam) w_j.
    Mixup   L = lam CE(z, i) + (1-lam) CE(z, j)                   z = W h
    raw     L = CE(lam z, i) + CE((1-lam) z, j)                   = softmax over all K^2 mixed class vectors
    unit    the same softmax over mixed vectors of unit length    O(K^2) a sample
    dot     L = 1/2 (h . v/||v|| - 1)^2, v the mixed vector       no negatives: needs a fixed classifier

    python bmls_msclf.py                                          digits, long-tailed; a minute on two cores
    python bmls_msclf.py --synthetic                              the theory above, claim by claim
    python bmls_msclf.py --dataset cifar100lt --method ce mixup cb-mixup bmls bmls+ms --seed 0 1 2
    torchrun --nproc-per-node 4 bmls_msclf.py --dataset folder:PATH  four GPUs

WHAT TO EXPECT. On digits (5 seeds, 30 epochs, last epoch): ce 54 ± 7%, mixup 46 ± 5, cb-mixup 87 ± 1, bmls
84 ± 3, cb+ms 86 ± 2, bmls+ms 88 ± 2. Balanced pairs, in whichever way, are worth 40 points over Mixup's;
what the exact balance and the MS loss add is within the spread. CIFAR-100-LT at 100, 200 epochs, one seed: ce
39.7, mixup 40.7, bmls+ms 43.2, and no class vectors that fall together in the end. With log n_k taken off the
logits after training (logit adjustment, Menon et al. 2021): 43.4, 48.0, 43.6; Mixup's features are the best.
After 12 epochs: ce 20.1, mixup 16.7, cb-mixup 19.8, bmls 20.3, cb+ms 22.0, bmls+ms 20.8.
results/bmls_msclf.md has the tables.

WHAT THE SOURCE LEAVES OPEN, and what we chose. It names neither the pairs, nor an epoch, nor the law of
lam, nor the formula of MS-Clf: BMLS and MS-Clf below are reconstructions.
- Pairs: unordered, same-class pairs included (--pairs). An epoch: N mixed samples, as many steps as a
  baseline's.
- lam: one for each batch, alpha = 1 (--lam, --alpha).
- MS-Clf: raw by default (--ms): on CIFAR-10-LT at 100 it had 65.8% after 10 epochs where unit had 60.1 (one
  seed), it costs O(K), and it needs neither the cosine head of unit nor the fixed classifier of dot.
- Partners of a batch: two independent draws, each with its own crop and flip. Released Mixup code pairs a
  batch with a permutation of itself; with two draws every method sees as many views a step.
- No bias in the classifier, so that class vectors are all there is to look at; the published baselines have
  one.
- Schedule, augmentation and weight decay (on BatchNorm too) are those of the published CIFAR-LT runs
  (MiSLAS; Yang et al. 2022). They report the best epoch on the test set; we report the last, and put the
  best of those tested (--eval-every) beside it.
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
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import roots_jacobi, wrightomega
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    ClassCycles,
    Dataset,
    Run,
    TrainingStep,
    UserError,
    accuracy_per_class,
    agree,
    check_shares,
    collapse_metrics,
    cosines,
    expected_calibration_error,
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


class PairSampler:
    """Balanced Mixed Label Sampler: which two classes are mixed next.

    A sweep deals every pair of classes once, in shuffled order, and then the next sweep begins. The queue
    is carried from epoch to epoch, so after any number of draws two pairs' counts differ by at most one.
    K classes; pairs: `unordered` i <= j, K(K+1)/2 of them, same-class pairs included (ours; the abstract does
    not say), `ordered` all K^2, `distinct` i < j, K(K-1)/2. Reconstructed from the thesis abstract.
    """

    def __init__(self, K: int, generator: torch.Generator, pairs: str = "unordered"):
        if pairs == "distinct" and K < 2:
            raise UserError("--pairs distinct: expected two classes or more")
        self.generator = generator
        self.flip = pairs != "ordered"
        if pairs == "ordered":
            self.pairs = torch.cartesian_prod(torch.arange(K), torch.arange(K))  # (M, 2)
        else:
            self.pairs = torch.triu_indices(K, K, offset=int(pairs == "distinct")).T.contiguous()  # (M, 2)
        self.queue = torch.empty(0, dtype=torch.long)

    def draw(self, T: int) -> Tensor:
        """The next T pairs of class labels, (T, 2)."""
        M = len(self.pairs)
        while len(self.queue) < T:
            self.queue = torch.cat([self.queue, torch.randperm(M, generator=self.generator)])
        now, self.queue = self.queue[:T], self.queue[T:].clone()
        labels = self.pairs[now]
        if self.flip:  # lam is shared by a batch: who gets lam and who 1 - lam is a coin toss, not i < j
            swap = torch.rand(T, 1, generator=self.generator) < 0.5
            labels = torch.where(swap, labels.flip(1), labels)
        return labels

    def state_dict(self) -> dict[str, Tensor]:
        return {"queue": self.queue}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.queue = state["queue"].cpu()


def draw_pairs(sampler: str, T: int, y: Tensor, K: int, cycles: ClassCycles, pairs: PairSampler) -> Tensor:
    """Indices (T, 2) of the two images of each of T mixed samples, for labels y (N,).

    The probability of the mixed label (i, j), with pi_k = n_k / N:
        instance   pi_i pi_j          Mixup as usual: the imbalance of (i, i) is IF^2, rare pairs never come
        class      1 / K^2            two class-balanced draws: even in expectation, multinomial in any epoch
        balanced   1 / M, exactly     BMLS: M pairs dealt like cards
    """
    if sampler == "instance":  # two shuffles of the training set; T = N
        return torch.stack([torch.randperm(len(y), generator=cycles.generator) for _ in range(2)], 1)[:T]
    labels = pairs.draw(T) if sampler == "balanced" else torch.randint(K, (T, 2), generator=cycles.generator)
    return cycles.take(labels.flatten()).view(T, 2)


def mixup_loss(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """Mixup's loss (Zhang et al. 2018). Logits z (B, K), labels a, b (B,), lam (B,) or (1,) -> scalar."""
    # L = lam CE(z, a) + (1 - lam) CE(z, b)
    ce_a, ce_b = (F.cross_entropy(z, y, reduction="none") for y in (a, b))  # (B,)
    return (lam * ce_a + (1 - lam) * ce_b).mean()


def remix_lam(lam: Tensor, n_a: Tensor, n_b: Tensor, kappa: float = 3.0, tau: float = 0.5) -> Tensor:
    """Remix (Chou et al. 2020): the images mix by lam, the label goes wholly to a much smaller class.

    n_a, n_b (B,) training images of the two classes, lam (B,) or (1,) -> the label's lam, (B,)
    """
    lam_y = lam.expand(len(n_a))
    lam_y = torch.where((n_a >= kappa * n_b) & (lam < tau), 0.0, lam_y)  # b is the rare one
    return torch.where((kappa * n_a <= n_b) & (1 - lam < tau), 1.0, lam_y)  # a is


# The Mixed-Singleton classifier reads the mixed label (i, j, lam) as a class of its own, with class vector
#     v_ij = lam w_i + (1 - lam) w_j
# and its loss is a softmax over the mixed class vectors at the batch's lam. The abstract gives no formula;
# these are three readings of it, none of them confirmed.


def ms_raw(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, raw: softmax over all K^2 mixed vectors v_ij as they are. z (B, K) logits -> scalar.

    A logit h . v_ij = lam z_i + (1 - lam) z_j is a sum, so the K^2-way softmax is a product of two K-way
    ones, in O(K): Mixup's loss with lam moved inside the softmax, where it acts as an inverse temperature.
    """
    # L = -log [exp(lam z_a + (1-lam) z_b) / sum_ij exp(lam z_i + (1-lam) z_j)]
    #   = CE(lam z, a) + CE((1-lam) z, b)
    lam = lam[:, None]
    return F.cross_entropy(lam * z, a) + F.cross_entropy((1 - lam) * z, b)


def ms_unit(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor, scale: float) -> Tensor:
    """MS-Clf, unit: softmax over all K^2 normalised mixed vectors. h (B, d), W (K, d) unit rows -> scalar.

    A raw v_ij lies between w_i and w_j, so (i, i) or (j, j) always scores at least as high: a mixed label is
    never strictly the best. At equal length it is (but at lam = 1/2, where v_ij = v_ji). O(B K^2) memory.
    """
    lam = lam[:, None, None]
    z, C = h @ W.T, W @ W.T  # (B, K), (K, K)
    # ||v_ij||^2 = lam^2 + (1-lam)^2 + 2 lam (1-lam) w_i . w_j
    norm = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * C).clamp_min(1e-12).sqrt()  # (1 or B, K, K)
    logits = scale * (lam * z[:, :, None] + (1 - lam) * z[:, None, :]) / norm  # (B, K, K)
    return F.cross_entropy(logits.flatten(1), a * len(W) + b)


def ms_dot(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, dot: regression onto the normalised mixed vector. h (B, d), W (K, d) unit rows -> scalar >= 0.

    It has no negatives, so W must be fixed: a learnable W would send every class vector to one point.
    """
    v = F.normalize(lam[:, None] * W[a] + (1 - lam[:, None]) * W[b], dim=1)
    return 0.5 * ((h * v).sum(1) - 1).square().mean()  # L = 1/2 mean (h . v/||v|| - 1)^2


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


# %% [2] Theory check: the layer-peeled model
# The network below the last layer is taken to be so flexible that every (mixed) label has one free feature.
# What is left is a matrix problem, convex in Z = W H^T, and its collapse has exact thresholds.


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


def soft_labels(K: int, a, b, lam) -> Tensor:
    """q_s = lam_s e_a + (1 - lam_s) e_b: a (S,), b (S,), lam (S,) -> (S, K) float64."""
    lam = torch.as_tensor(lam, dtype=torch.float64)[:, None]
    eye = torch.eye(K, dtype=torch.float64)
    return lam * eye[torch.as_tensor(a)] + (1 - lam) * eye[torch.as_tensor(b)]


def layer_peeled(
    K, a, b, lam, weight, *, d, lam_W=None, lam_H=None, E_W=None, E_H=None, steps=200, seed=0
) -> tuple[Tensor, Tensor]:
    """Optimal classifier W (K, d) and features H (S, d): one free feature h_s for each (mixed) label s.

    a, b (S,) classes, lam (S,), weight (S,) probabilities that sum to 1; a == b is an unmixed label.
    Give lam_W and lam_H for the penalised form (Hong & Ling 2023), or E_W and E_H for the norm-constrained
    form (Fang et al. 2021). Take d >= K: the problem, not convex in (W, H), then has no bad local minimum.
    """
    if (lam_W is None) == (E_W is None):
        raise ValueError("layer_peeled: give either lam_W and lam_H or E_W and E_H")
    q = soft_labels(K, a, b, lam)  # (S, K)
    w = torch.as_tensor(weight, dtype=torch.float64)[:, None]  # (S, 1)

    def unpack(V, G):  # the optimiser's variables -> W, H
        if E_W is None:  # G = sqrt(w_s) h_s turns both penalties into plain squared norms
            return V, G / w.sqrt()
        # (1/K) sum_k ||w_k||^2 = E_W and mean_s ||h_s||^2 = E_H: the optimum uses the whole budget
        return V * (E_W * K) ** 0.5 / V.norm(), G * (E_H * len(G)) ** 0.5 / G.norm()

    def loss(V, G):
        W, H = unpack(V, G)
        # L = sum_s w_s CE(W h_s, q_s) [+ lam_W/2 ||W||_F^2 + lam_H/2 sum_s w_s ||h_s||^2]
        ce = -(w * q * F.log_softmax(H @ W.T, 1)).sum()  # (S, d) @ (d, K) -> (S, K)
        return ce + (lam_W * V.square().sum() + lam_H * G.square().sum()) / 2 if E_W is None else ce

    gen = torch.Generator().manual_seed(seed)
    V, G = (torch.randn(n, d, generator=gen, dtype=torch.float64) / 2 for n in (K, len(q)))
    return unpack(*minimise(loss, V, G * w.sqrt() if E_W is None else G, steps=steps))


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


def mixed_label_weights(counts, sampler: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability of each ordered class pair (a, b), three (K*K,) arrays; `counts` (K,) images per class.

    instance: both images from the pool. class: both classes uniform (two class-balanced samplers).
    balanced: unordered pairs, same-class ones included, all alike (BMLS, as reconstructed here).
    """
    K, pi = len(counts), np.asarray(counts) / np.sum(counts)
    a, b = (v.ravel() for v in np.mgrid[:K, :K])
    weight = {
        "instance": pi[a] * pi[b],
        "class": np.full(K * K, 1 / K**2),
        # M = K (K + 1) / 2 labels; a cross label is met in two orders, each with half of its share
        "balanced": np.where(a == b, 2, 1) / (K * (K + 1)),
    }[sampler]
    return a, b, weight


def mixed_labels(counts, sampler: str, alpha: float = 1.0, nodes: int = 3):
    """(a, b, lam, weight), each (K*K*nodes,): class pairs times Gauss nodes for lam ~ Beta(alpha, alpha)."""
    a, b, weight = mixed_label_weights(counts, sampler)
    # the thresholds need E[lam^2] only, and n nodes integrate every polynomial of degree 2n - 1 exactly
    x, g = roots_jacobi(nodes, alpha - 1, alpha - 1)
    a, b, weight = (np.repeat(v, nodes) for v in (a, b, weight))
    return a, b, np.tile((1 + x) / 2, len(a) // nodes), weight * np.tile(g / g.sum(), len(a) // nodes)


def contrast_eigenvalue(K: int, sampler: str, alpha: float = 1.0, share: float | None = None) -> float:
    """Eigenvalue of E[q q^T] on the contrasts between minority classes; derived here.

    They collapse iff it is <= lam_W lam_H. `share` = n_B / N of one minority class ('ce' and 'instance').
    """
    m2, m11 = (alpha + 1) / (4 * alpha + 2), alpha / (4 * alpha + 2)  # E[lam^2], E[lam (1 - lam)]
    if sampler == "balanced":
        return (1 + m2 * (K - 1) - m11) / (K * (K + 1) / 2)
    # E[lam^2 + (1 - lam)^2] = (alpha + 1) / (2 alpha + 1) < 1: mixing spends part of the minority's signal
    return {"ce": share, "instance": share and 2 * m2 * share, "class": 2 * m2 / K}[sampler]


def mixup_etf_optimum(q: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """p, z (K,) at the minimum over h of CE(softmax(W h), q) + lam_H/2 ||h||^2, W a fixed ETF.

    c = ||w||^2 K / ((K - 1) lam_H). Setting of Fisher, Meng, Papyan 2024, Lambert-W form derived here.
    """

    # z = c (q - p) with p_k = W0(c e^{c q_k} / Z) / c; omega(t) = W0(e^t) cannot overflow
    def p(log_Z):
        return wrightomega(math.log(c) + c * q - log_Z).real / c

    log_K = math.log(len(q))  # sum z = 0 puts log Z = logsumexp(z) between log K and c + log K
    best = p(brentq(lambda log_Z: p(log_Z).sum() - 1, log_K, c + log_K, xtol=1e-12, rtol=1e-15))
    return best, c * (q - best)


# [copied: locate]
def locate(collapsed, inside: float, outside: float) -> float:
    """Bisect, on a log scale, for the edge of the region in which the direct optimisation is collapsed."""
    for _ in range(4):
        middle = math.sqrt(inside * outside)
        inside, outside = (middle, outside) if collapsed(middle) else (inside, middle)
    return math.sqrt(inside * outside)


# [end copied]


def synthetic(folder) -> bool:
    """Check each claim against direct optimisation or simulation; print the table, draw synthetic.png."""
    K, reg, ones = 10, 0.02, [1.0] * 10  # reg = lam_W lam_H
    majority, minority = torch.arange(K).chunk(2)
    passed, gen, rng = [], torch.Generator().manual_seed(0), np.random.default_rng(0)
    print(f"{'claim':<66}{'theory':>9}{'measured':>10}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, at_most=False):
        error = max(measured - theory, 0) if at_most else abs(measured - theory)
        passed.append(bool(error <= tolerance))
        print(f"{claim:<66}{theory:>9.4f}{measured:>10.4f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    def classifier(sampler, share=1 / K, reg=reg):  # share = n_B / N of each of the five minority classes
        counts = [1 / 5 - share] * 5 + [share] * 5
        labels = (range(K), range(K), ones, counts) if sampler == "ce" else mixed_labels(counts, sampler)
        return layer_peeled(K, *labels, d=K, lam_W=reg**0.5, lam_H=reg**0.5)[0]

    def cosine(sampler, share):
        return mean_pairwise_cosine(classifier(sampler, share), minority)

    def fang(R):
        pi = np.repeat([R, 1], 5) / (5 * R + 5)
        W, _ = layer_peeled(K, range(K), range(K), ones, pi, d=K, E_W=1, E_H=5)
        return mean_pairwise_cosine(W, minority)

    # 1, 3. Penalised: collapse iff n_B/N (CE), 2/3 n_B/N (plain Mixup, alpha = 1) is at most lam_W lam_H
    edges = {m: reg / contrast_eigenvalue(K, m, share=1) for m in ("ce", "instance")}
    names = {"ce": "CE", "instance": "plain Mixup"}
    for m, edge in edges.items():
        found = locate(lambda share, m=m: cosine(m, share) > 0.99, 0.9 * edge, 1.15 * edge)
        edge, found = edge / reg, found / reg
        check(f"{names[m]}: collapse up to (n_B/N) / (lam_W lam_H) =", edge, found, 0.01 * edge)
    # 2. Norm-constrained, the setting of Fang et al.: theory from the KKT conditions, measured directly
    R = collapse_threshold(5, 5, 5**0.5)
    found = locate(lambda R: fang(R) > 0.99, 1.15 * R, 0.9 * R)
    check("constrained, 5 + 5 classes, E_W=1, E_H=5: collapse from R =", R, found, 0.01 * R)
    check("   minority cosine at R = 13.5", 1, fang(13.5), 1e-6)
    check("   minority cosine at R = 11, at most", 0.95, fang(11), 0, True)
    # 4. Between the thresholds CE separates the minority and Mixup does not: balance the mixed labels
    check("n_B/N = 1.25 lam_W lam_H: minority cosine, Mixup", 1, cosine("instance", 1.25 * reg), 1e-6)
    check("   CE, at most", 0.5, cosine("ce", 1.25 * reg), 0, True)
    W = classifier("balanced", 1.25 * reg)
    check("   balanced mixed labels: -1/(K-1)", -1 / (K - 1), mean_pairwise_cosine(W, minority), 1e-6)
    check(
        "   balanced mixed labels, majority: the same", -1 / (K - 1), mean_pairwise_cosine(W, majority), 1e-6
    )
    edge = contrast_eigenvalue(K, "balanced")  # lam_W lam_H beyond it: no class is told apart, W = 0
    found = locate(lambda reg: classifier("balanced", reg=reg).norm() < 0.1, 1.15 * edge, 0.9 * edge)
    check("   balanced mixed labels: K x contrast eigenvalue", K * edge, K * found, 0.01)

    # 5. Mixup CE under a fixed ETF: how much longer than an unmixed feature is one with lam = 1/2?
    W, start = simplex_etf(K, K, gen), torch.zeros(K, dtype=torch.float64)
    q = soft_labels(K, [0, 0, 0], [1, 1, 0], [0.5, 0.7, 1])  # (3, K)

    def energy(h, c):  # times c: the gradient does not fade.  h (3, d)
        return c * F.cross_entropy(h @ W.T, q, reduction="sum") + K / (K - 1) / 2 * h.square().sum()

    for c in (1e1, 1e2, 1e4, 1e6):  # the ratio creeps up, like 1 / log c, to sqrt(2 (K-2) / (K-1)) = 4/3
        theory = np.array([mixup_etf_optimum(row, c)[1] for row in q.numpy()])
        (h,) = minimise(lambda h, c=c: energy(h, c), start.repeat(3, 1))
        gain = np.linalg.norm(theory[0]) / np.linalg.norm(theory[2])
        direct = (h[0].norm() / h[2].norm()).item()
        check(f"fixed ETF, c = {c:.0e}: ||h_(lam=1/2)|| / ||h_same||", gain, direct, 1e-5)
        error = np.abs((h @ W.T).numpy() - theory).max()
        check("   largest error of a logit", 0, error, 1e-6 if c < 1e6 else 1e-4)  # condition number c

    # 6. Mixed-Singleton losses, same ETF, label (0, 1): class 0 with lam, class 1 with 1 - lam
    a, b, random = torch.tensor([0]), torch.tensor([1]), torch.randn(1, K, generator=gen, dtype=torch.float64)

    def in_plane(t):  # where the optimal direction must lie, by symmetry
        return F.normalize(math.cos(t) * W[:1] + math.sin(t) * W[1:2])

    def direction(loss):  # best unit feature (1, d), searched in all directions
        return F.normalize(minimise(lambda h: loss(F.normalize(h)), random)[0])

    def singleton_claims(lam):
        at = torch.tensor([lam], dtype=torch.float64)
        # inf L = min_t log(1 + e^{-lam t}) + log(1 + e^{(1 - lam) t}), t = z_0 - z_1: it stays far above 0
        floor = minimize_scalar(lambda t: np.logaddexp(0, -lam * t) + np.logaddexp(0, (1 - lam) * t)).fun
        (h,) = minimise(lambda h: ms_raw(h @ W.T, a, b, at), start[None])
        check(f"lam = {lam}, MS raw: floor of the loss", floor, ms_raw(h @ W.T, a, b, at).item(), 1e-5)
        # lam w_i + (1 - lam) w_j lies between its ends w_i and w_j, and a linear score is largest at an end
        V = lam * W[:, None] + (1 - lam) * W  # (K, K, d)
        U = F.normalize(V, dim=2)  # normalised, the ends no longer win (lam = 1/2: (0, 1) ties with (1, 0))
        for name, scores, top in (("raw", V @ h[0], 0), ("unit", U @ U[0, 1], lam != 0.5)):
            rivals = (scores >= scores[0, 1] - 1e-9).sum().item() - 1
            check(f"   MS {name}: is (0, 1) alone on top?", top, rivals == 0, 0)
        if lam != 0.5:
            v_hat, unit = U[0, 1], lambda h: ms_unit(h, W, a, b, at, scale=10)
            t = minimize_scalar(lambda t: unit(in_plane(t)).item(), bounds=(-0.5, 1), method="bounded").x
            theory, measured = (in_plane(t) @ v_hat).item(), (direction(unit) @ v_hat).item()
            check("   MS unit, scale 10: cos(optimum, v_hat)", theory, measured, 1e-4)
            h = direction(lambda h: ms_dot(h, W, a, b, at))
            check("   MS dot: cos(optimum, v_hat)", 1, (h @ v_hat).item(), 1e-4)

    for lam in (0.5, 0.6, 0.7, 0.8, 0.9):
        singleton_claims(lam)
    floor = (1 - ((K - 2) / (2 * (K - 1))) ** 0.5) ** 2 / 2  # cos(h, w_0) = cos(h, w_1) < 1 at the best h
    h = direction(lambda h: (h @ W[:2].T - 1).square().mean() / 2)
    check("lam = 1/2, ordinary Mixup of dot-regression: floor", floor, ((h @ W[0] - 1) ** 2 / 2).item(), 1e-5)

    # 7. How often is a mixed label met?
    counts, T = [1000, 562, 316, 178, 100], 12_406  # T: CIFAR-10-LT at IF 100, one epoch
    pool = rng.choice(np.repeat(range(5), counts), (2, 4_000_000))
    same = np.bincount(pool[0][pool[0] == pool[1]])  # how often (k, k) was drawn
    check("instance: (0, 0) against (4, 4) = IF^2, IF = 10", 10**2, same[0] / same[4], 5)
    cells = rng.multinomial(T, mixed_label_weights([1] * K, "class")[2], size=1000)  # (1000, K*K)
    cv = cells.var(1).mean() ** 0.5 / cells.mean()
    check("class: std/mean over ordered labels = sqrt((K^2-1)/T)", ((K**2 - 1) / T) ** 0.5, cv, 1e-3)
    sampler, n, worst = PairSampler(K, gen), np.zeros((K, K), dtype=int), 0
    for _ in range(200):  # epochs; T is no multiple of the 55 pairs, so each begins in the middle of a sweep
        low, high = sampler.draw(T).sort(1).values.T.numpy()
        np.add.at(n, (low, high), 1)
        worst = max(worst, np.ptp(n[np.triu_indices(K)]))
    check("balanced: most less least often drawn, any of 200 epochs", 1, worst, 0, at_most=True)

    # One picture: from which share on does a minority class keep a classifier of its own?
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    x = [0.5, 0.7, 0.98, 1.04, 1.15, 1.48, 1.57, 1.75, 2.2, 3.2, 5]
    for (m, name), style in zip(names.items(), ("o-", "s--"), strict=True):
        ax.plot(x, [cosine(m, r * reg) for r in x], style, color="black", label=name)
        ax.axvline(edges[m] / reg, ls=style[1:], color="0.6", label=f"{name}: predicted threshold")
    # balanced mixed labels do not depend on the class counts: one solution for every share
    ax.plot(x, [cosine("balanced", reg)] * len(x), "^:", color="black", label="balanced mixed labels")
    ax.set(xscale="log", xlabel="share of one minority class, (n_B / N) / (lam_W lam_H)")
    ax.set(ylabel="mean cosine of minority classifiers", title="Minority collapse: 5 + 5 classes, alpha = 1")
    ax.set_xticks([0.5, 1, 1.5, 2, 3, 5], ["0.5", "1", "1.5", "2", "3", "5"])
    ax.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    write_atomically(Path(folder) / "synthetic.png", lambda part: figure.savefig(part, dpi=130))
    print(f"{sum(passed)} of {len(passed)} claims hold; figure: {Path(folder) / 'synthetic.png'}")
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
    """Class vectors W (K, d), learnable or a fixed simplex ETF, without bias. Always in float32.

    head `linear`: logits z = h W^T. head `cosine`: BatchNorm1d, then h and W at unit length, z = scale * cos;
    BatchNorm comes first since features behind a ReLU fill one orthant only, and class vectors need them all.
    """

    def __init__(self, K: int, d: int, head: str, fixed: bool, scale: float):
        super().__init__()
        self.head, self.scale = head, scale
        self.bn = nn.BatchNorm1d(d) if head == "cosine" else nn.Identity()
        W = simplex_etf(K, d).float() if fixed else torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)
        self.W = nn.Parameter(W, requires_grad=not fixed)  # learnable: nn.Linear's default start

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, d) from the network -> h (B, d), W (K, d) as the loss sees them, and logits z (B, K)."""
        h, W = self.bn(h.float()), self.W
        if self.head == "linear":
            return h, W, h @ W.T
        h, W = F.normalize(h, dim=1), F.normalize(W, dim=1)
        return h, W, self.scale * h @ W.T


# %% [4] Training


class Method(NamedTuple):
    sampler: str  # instance, class or balanced: draw_pairs
    loss: str  # ce, mixup, remix or ms


METHODS = {
    "ce": Method("instance", "ce"),
    "mixup": Method("instance", "mixup"),
    "cb-mixup": Method("class", "mixup"),
    "remix": Method("instance", "remix"),
    "bmls": Method("balanced", "mixup"),
    "cb+ms": Method("class", "ms"),
    "bmls+ms": Method("balanced", "ms"),
}
# What published recipes leave to the user: small sets need small batches and fewer epochs.
RECIPES = {"digits": (30, 32), "mnist": (40, 128), "fashionmnist": (100, 128)}  # epochs, batch size
PUBLISHED = (200, 128)


def build_model(args: argparse.Namespace, method: Method, data: Dataset) -> nn.ModuleDict:
    """Network and classifier; which head the method needs is decided here."""
    K, channels = len(data.classes), data.train_x.shape[3]
    cosine = args.classifier == "etf" or (method.loss == "ms" and args.ms != "raw")
    head = args.head if args.head != "auto" else "cosine" if cosine else "linear"
    network = ResNet32(channels, args.width)
    classifier = Classifier(K, network.d, head, args.classifier == "etf", args.scale)
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

    cycles = ClassCycles(data.train_y, K, generator)
    pairs = PairSampler(K, generator, args.pairs)
    batches = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    n, measure = data.counts.to(device), metric_device(device)
    test_y, (groups, _) = data.test_y.to(measure), shot_groups(data.counts.to(measure))
    mixed_counts = torch.zeros(K, K, dtype=torch.long)  # how often (a, b) was drawn
    start, best, seconds = 0, 0.0, 0.0

    with first_rank_first():
        state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        cycles.load_state_dict({key: value.cpu() for key, value in state["cycles"].items()})
        pairs.load_state_dict(state["pairs"])
        mixed_counts = state["mixed_counts"].cpu()
        start, best, seconds = state["epoch"], state["best"], state["seconds"]

    def step(weight: Tensor, x: Tensor, a: Tensor, x_b=None, b=None, lam=None) -> Tensor:
        """One batch: images x (B, C, H, W), labels a (B,); what is mixed in, and lam (1,) or (B,) -> loss.

        weight (): 1 on one GPU; on several what the mean over this one's share is worth.
        """
        if method.loss != "ce":
            mix = lam[:, None, None, None]
            x = mix * x + (1 - mix) * x_b  # (B, C, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            h = network(x)
        h, W, z = classifier(h)
        if method.loss == "ce":
            loss = F.cross_entropy(z, a)
        elif method.loss == "mixup":
            loss = mixup_loss(z, a, b, lam)
        elif method.loss == "remix":
            loss = mixup_loss(z, a, b, remix_lam(lam, n[a], n[b]))
        elif args.ms == "raw":
            loss = ms_raw(z, a, b, lam)
        elif args.ms == "unit":
            loss = ms_unit(h, W, a, b, lam, args.scale)
        else:
            loss = ms_dot(h, W, a, b, lam)
        loss = weight * loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    training_step = TrainingStep(step, optimizer, device, capture=not args.compile)

    def checkpoint(epoch: int) -> None:
        parts = {"model": model, "optimizer": optimizer, "cycles": cycles, "pairs": pairs}
        state = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"epoch": epoch, "best": best, "seconds": seconds}
        tensors = {"generator": generator.get_state(), "mixed_counts": mixed_counts}
        run.save_checkpoint({**state, **numbers, **tensors})

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    parts = split_evenly(N, args.batch_size)[: 2 if args.dry_run else None]
    own, weight = [own_share(part) for part in parts], share_of_mean(parts).to(device)
    ahead, title = range(start, args.epochs), f"{name} seed {seed}"
    hide = True if ranks()[0] else None  # None: silent without terminal
    bar = tqdm(ahead, initial=start, total=args.epochs, desc=title, disable=hide)
    for epoch in bar:
        began = time.perf_counter()
        # An epoch is drawn at once: N mixed samples, so that every method takes the same number of steps
        drawn = draw_pairs(method.sampler, N, data.train_y, K, cycles, pairs)  # (N, 2)
        labels = data.train_y[drawn]  # (N, 2)
        view_a, view_b = (batches.views(drawn[:, i], generator) for i in range(2))
        a, b = (labels[:, i].to(device) for i in range(2))
        lam = draw_lam(args, len(parts) if args.lam == "batch" else N, generator).to(device)
        if method.loss != "ce":
            used = labels[: parts[-1].stop]
            mixed_counts += torch.bincount(used[:, 0] * K + used[:, 1], minlength=K * K).view(K, K)
        training_step.set_learning_rate(learning_rate(epoch, args))
        losses = torch.zeros(len(parts), device=device)  # read once an epoch: no step waits for the host
        model.train()
        images_a, images_b = (batches.sequence(view, own) for view in (view_a, view_b))
        for i, part in enumerate(own):
            if method.loss == "ce":
                losses[i] = training_step(weight[i], next(images_a), a[part])
            else:
                mix = lam[i : i + 1] if args.lam == "batch" else lam[part]  # (1,) or (B,)
                losses[i] = training_step(weight[i], next(images_a), a[part], next(images_b), b[part], mix)
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
            z = evaluate(model, test, args.precision)[1]
            per_class = accuracy_per_class(z.argmax(1), test_y, K)
            line["accuracy"] = float((z.argmax(1) == test_y).double().mean())
            line |= {group: float(per_class[members].mean()) for group, members in groups.items()}
            W = model["classifier"].W.detach().to(measure)
            line["minority_cosine_W"] = mean_pairwise_cosine(W, groups["few"])
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * len(parts) / max(len(parts) - 1, 1)
            tqdm.write(f"{name} seed {seed}: about {epoch_time * (args.epochs - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)

    about = {"method": name, "seed": seed, "best_accuracy": best, "seconds": seconds}
    return conclude(args, data, run, model, batches, test, mixed_counts, about)


def draw_lam(args: argparse.Namespace, n: int, generator: torch.Generator) -> Tensor:
    """n draws of lam ~ Beta(alpha, alpha), (n,) float32, from our generator (torch's Beta takes none)."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(args.alpha, args.alpha, n)).float()


# %% [5] Evaluation and figures


@torch.no_grad()
def evaluate(model: nn.ModuleDict, batches: Batches, precision: str) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image, in order, unaugmented."""
    model.eval()
    views = batches.views(torch.arange(batches.N))
    hs, zs = [], []
    parts = split_evenly(batches.N, 1000 * ranks()[1])
    for part, x in zip(parts, batches.sequence(views, [own_share(part) for part in parts]), strict=True):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = model["network"](x)
        h, _, z = model["classifier"](h)
        hs.append(whole(h, part))
        zs.append(whole(z, part))
    measure = metric_device(batches.device)
    return torch.cat(hs).to(measure), torch.cat(zs).to(measure)


def conclude(args, data: Dataset, run: Run, model, batches, test, mixed_counts: Tensor, about: dict) -> dict:
    """Measure the trained model on all data, write features.npz and result.json; returns the result."""
    measure = metric_device(batches.device)
    train_y, test_y = data.train_y.to(measure), data.test_y.to(measure)
    groups, rule = shot_groups(data.counts.to(measure))
    train_h, train_z = evaluate(model, batches, args.precision)
    test_h, test_z = evaluate(model, test, args.precision)
    W = model["classifier"].W.detach().to(measure)
    per_class = accuracy_per_class(test_z.argmax(1), test_y, len(data.classes))
    result = {
        **about,
        "epochs": args.epochs,
        "accuracy": float((test_z.argmax(1) == test_y).double().mean()),
        **{group: float(per_class[members].mean()) for group, members in groups.items()},
        "rule": rule,
        "ece": expected_calibration_error(test_z.softmax(1), test_y),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        **collapse_metrics(train_h, train_y, W, train_z.argmax(1), groups["few"]),
        "per_class": per_class.tolist(),
        "counts": data.counts.tolist(),
    }
    features = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y, "W": W}
    run.save_features(**features, mixed_counts=mixed_counts)
    run.finish(result)
    return result


MARKERS = dict(zip(METHODS, "osv^dPX", strict=True))


def draw_figures(folder: Path, runs: list[Run]) -> list[str]:
    """Four figures of finished runs, one idea each, methods side by side; heat maps show the first seed.

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
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=110))
        saved.append(name)

    def curves(name: str, points: dict[str, tuple], **axes) -> None:
        figure = Figure(figsize=(6, 4), layout="constrained")
        plot = figure.subplots()
        for method, (x, y) in points.items():
            plot.plot(x, y, markevery=max(1, len(x) // 10), **look[method])
        plot.set(ylabel="test accuracy (%)", **axes)
        plot.legend()
        save(name, figure)

    def heat_maps(name: str, maps: dict[str, np.ndarray], label: str, vmin: float, vmax: float) -> None:
        columns = min(4, len(maps))
        rows = -(-len(maps) // columns)
        figure = Figure(figsize=(2.8 * columns + 1.2, 2.8 * rows + 0.5), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for plot, (method, values) in itertools.zip_longest(grid.flat, maps.items(), fillvalue=(None, None)):
            if method is None:
                plot.axis("off")
                continue
            values = values[np.ix_(order, order)]
            image = plot.imshow(values, cmap="gray_r", interpolation="nearest", vmin=vmin, vmax=vmax)
            plot.set(title=method, xlabel="class, largest first", ylabel="class, largest first")
        figure.colorbar(image, ax=grid, label=label)
        save(name, figure)

    # Where minority collapse costs: accuracy by class size, in ten groups also for 100 classes
    groups = np.array_split(order, min(10, len(order)))
    points = {}
    for name, found in by_method.items():
        accuracy = 100 * np.mean([r.finished["per_class"] for r in found], axis=0)
        points[name] = [n[g].mean() for g in groups], [np.nanmean(accuracy[g]) for g in groups]
    curves("accuracy_by_class.png", points, xscale="log", xlabel="training images of the class")

    points = {}
    for name, found in by_method.items():
        tested = [[line for line in r.history if "accuracy" in line] for r in found]
        accuracy = 100 * np.mean([[line["accuracy"] for line in lines] for lines in tested], axis=0)
        points[name] = [line["epoch"] for line in tested[0]], accuracy
    curves("training.png", points, xlabel="epoch")

    # Where minority collapse shows: class vectors of small classes with cosine 1, a dark block at lower right
    arrays = {name: found[0].load_features() for name, found in by_method.items()}
    maps = {name: cosines(torch.from_numpy(a["W"])).numpy() for name, a in arrays.items()}
    heat_maps("class_vectors.png", maps, "cosine of class vectors", -1, 1)

    # Where it comes from: how often each mixed label was drawn in the whole training; ce draws none
    maps = {}
    for name, drawn in ((name, a["mixed_counts"]) for name, a in arrays.items() if a["mixed_counts"].any()):
        drawn = drawn + drawn.T - np.diag(np.diag(drawn))  # (i, j) and (j, i) are one mixed label
        share = drawn / drawn[np.triu_indices(len(n))].mean()
        maps[name] = np.log10(np.maximum(share, 1e-3))
    if maps:
        heat_maps("mixed_labels.png", maps, "log10 (times drawn / their mean)", -3, 2)
    return saved


def results_table(runs: list[Run]) -> str:
    """Mean ± std over seeds, a row a method: last epoch's accuracy first, the best tested one's beside it."""
    percent = ["accuracy", "best_accuracy", "many", "medium", "few", "ece"]
    rows = []
    for name in METHODS:
        if found := [r.finished for r in runs if r.finished["method"] == name]:
            cells = [mean_std([r[key] for r in found], 2, 100) for key in percent]
            cells += [mean_std([r[key] for r in found], 3) for key in ("minority_cosine_W", "nc1")]
            rows.append([name, len(found), *cells, f"{np.mean([r['seconds'] for r in found]):.0f}"])
    header = ["method", "seeds", "accuracy %", "best %", "many %", "medium %", "few %", "ECE %"]
    return table([*header, "minority cos", "NC1", "train s"], rows)


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Minority collapse under Mixup on long tails, and what balanced mixed labels do about it."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("bmls_msclf.py", description=about, formatter_class=formatter)).add_argument
    methods = [*METHODS, "all"]
    add(
        "--dataset",
        default="digitslt",
        help=f"{', '.join(SPECS)}, folder:PATH; long-tailed with lt: cifar10lt",
    )
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    add("--out", type=Path, default="runs", help="run folders go to OUT/bmls_msclf/DATASET/METHOD/seedS")
    add("--method", nargs="+", default=["ce", "mixup", "bmls+ms"], choices=methods, help="one or more")
    add("--epochs", type=int, help="200; mnist 40, fashionmnist 100, digits 30")
    add("--batch-size", type=int, help="of all GPUs together: 128; digits 32")
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
    add(
        "--synthetic",
        action="store_true",
        help="check the theory in the layer-peeled model; trains no network",
    )
    add("--imbalance", type=float, default=100.0, help="largest over smallest class, for lt")
    add("--profile", choices=["exp", "step"], default="exp", help="shape of the long tail, for lt")
    add("--subset-seed", type=int, default=0, help="which images a class keeps, for lt")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    add("--width", type=int, default=1, help="of ResNet-32: channels times this, d = 64 times this")
    add("--classifier", choices=["learnable", "etf"], default="learnable", help="etf: fixed, d >= K - 1")
    add("--head", choices=["auto", "linear", "cosine"], default="auto", help="cosine for etf, unit, dot")
    add("--scale", type=float, default=16.0, help="of the cosine head's logits")
    add("--alpha", type=float, default=1.0, help="lam ~ Beta(alpha, alpha)")
    add("--lam", choices=["batch", "pair"], default="batch", help="one lam a batch or one a pair")
    add("--pairs", choices=["unordered", "ordered", "distinct"], default="unordered", help="what is balanced")
    add("--ms", choices=["raw", "unit", "dot"], default="raw", help="reading of the Mixed-Singleton loss")
    add("--eval-every", type=int, default=5, help="epochs from test to test; the last is always tested")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    epochs, batch_size = RECIPES.get(args.dataset.partition(":")[0].removesuffix("lt"), PUBLISHED)
    args.epochs = epochs if args.epochs is None else args.epochs
    args.batch_size = batch_size if args.batch_size is None else args.batch_size
    for flag, least in dict(epochs=1, jobs=0, batch_size=2, width=1, eval_every=1, image_size=1).items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {least} or more")
    for flag in ("lr", "scale", "alpha"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise UserError(f"--{flag} {getattr(args, flag)}: expected a number above 0")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    if args.ms == "dot" and args.classifier != "etf":
        raise UserError("--ms dot: without negatives a learnable classifier collapses; add --classifier etf")
    if args.head == "linear" and (args.ms != "raw" or args.classifier == "etf"):
        raise UserError("--head linear: --ms unit and --classifier etf need unit vectors; use --head cosine")
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
        return {"ok": ranks()[0] > 0 or synthetic(args.out / "bmls_msclf" / "synthetic")}
    device = join_ranks(pick_device(args.device))
    args.precision = pick_precision(args.precision, device)
    tail = dict(imbalance=args.imbalance, profile=args.profile, subset_seed=args.subset_seed)
    with first_rank_first():  # which may have to download
        data = load_dataset(args.dataset, args.data_dir, **tail, image_size=args.image_size)
    K, N, n = len(data.classes), len(data.train_y), data.counts
    if N < 2:
        raise UserError(f"--dataset {args.dataset}: {N} training image, and BatchNorm needs two")
    check_shares(N, len(data.test_y), args.batch_size)
    folder = args.out / "bmls_msclf" / args.dataset.replace(":", "-").replace("/", "-")
    print(f"{args.dataset}: {K} classes, {N:,} training images ({n.max()} to {n.min()} a class), ", end="")
    print(f"{len(data.test_y):,} test images\n{hardware(device)}, {args.precision}; into {folder}")
    for name in args.method:  # says what is wrong with a model before the first one is trained
        model = build_model(args, METHODS[name], data)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{name}: ResNet-32 and {model['classifier'].head} head, {size:,} parameters; ", end="")
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
        print(f"bmls_msclf.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        launch = ["torchrun", "--nproc-per-node", str(ranks()[1])] if ranks()[1] > 1 else ["python"]
        command = shlex.join([*launch, "bmls_msclf.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
