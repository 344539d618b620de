# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
"""Neural collapse beyond K <= d + 1, and the hyperspherical uniformity gap (HUG) that aims at it directly.

Source: Liu, Yu, Weller, Schoelkopf, Generalizing and Decoupling Neural Collapse via Hyperspherical Uniformity
Gap (ICLR 2023). Of it we have the abstract, the coefficients and a few settings, but neither the loss
equations nor a table: see the last paragraph.

WHAT COLLAPSES. At the end of training with cross-entropy all features of a class fall onto their mean, and
the K means, centred, onto a simplex ETF: equal angles, cosine -1/(K-1). But K points at equal angles need
d >= K - 1 dimensions. With 1000 classes and 512 features, or ten digits drawn on a circle, there is no
simplex to collapse to. Generalized neural collapse (GNC) says what takes its place: features still fall
onto their class mean, and the means spread over the sphere as uniformly as K points can. Cross-entropy gets
there by one force that both pulls a feature to its own class vector and pushes it from the others; under a
long tail the two are out of balance and the rare classes' vectors fall onto each other.

THE REMEDY. Say both aims one by one: HUG = uniformity between classes - uniformity within classes. With
unit features x_i, one unit proxy w_k for each class (the classifier: the nearest proxy wins), B images:

    L = -alpha U_inter(w_1..w_K) + beta U_intra(x, w)
    MHE  U_inter = - sum_{k != l} ||w_k - w_l||^-2                minimum hyperspherical energy
    MHS  U_inter = min_{k != l} ||w_k - w_l||                     maximum separation
    MGD  U_inter = log det G, G_kl = exp(-eps ||w_k - w_l||^2)    maximum Gram determinant
    U_intra = sum_i ||x_i - w_{y_i}||                             MHS: sum_k max_{i in k} ||x_i - w_k||

U_intra has the minimum 0 at x_i = w_{y_i} wherever the proxies are, so the two aims never trade off: neither
alpha / beta nor the class counts move the optimum. Cost: O(K^2) for the proxies, O(B) for the batch.

Where the best proxies are known (r: distance of two points; energies over ordered pairs):
    K <= d + 1   simplex          every r = sqrt(2K/(K-1))                  MHE energy (K-1)^2 / 2
    K = 2d       cross-polytope   r = 2 once, sqrt 2 else                   MHE energy d (4d-3) / 2
    d = 2        regular polygon  r = 2 sin(pi j / K), j = 1..K-1           MHE energy K (K^2-1) / 12
    K -> inf     uniform law      mean of r^-s = 2^(d-s-2) G(d/2) G((d-1-s)/2) / (sqrt(pi) G(d-1-s/2))

    python hug.py                                                 digits on a circle; a minute on two cores
    python hug.py --synthetic                                     the theory above, claim by claim
    python hug.py --dataset cifar10 --method all --seed 0 1 2     ResNet-18; for a GPU
    python hug.py --dataset cifar100 --net cnn --per-class 100 --epochs 10 --method ce hug-mhe

WHAT TO EXPECT. Digits with d = 16 (3 seeds): hug-mhe, hug-mhs and hug-mgd are right in 99.3 to 99.6%, ce in
99.1; under PGD 96.3 to 96.7 against 95.1; calibration error 0.4 to 0.7% against 1.1; with MHE and MHS the
features collapse onto a simplex. On a circle, d = 2 (5 seeds), HUG's class vectors are spread evenly and
cross-entropy's are not, and yet ce is right in 96%, hug-mhe in 83, hug-mgd in 82, hug-mhs in 71, hug-fixed
in 48 and ce+norm in 46: HUG's features have not found their places after 25 epochs. CIFAR-10 in small, 10
epochs: ce 62%, hug-mhe 58 (results/hug.md).

WHAT THE SOURCE LEAVES OPEN, and what we chose. Known: the idea, HUG = inter - intra, and alpha / beta =
0.15/0.015 (MHE), 0.15/0.015 (MHS), 0.15/0.03 (MGD). Reconstructed, not confirmed:
- The equations above: exponents 2 and -1 of MHE, and max instead of sum within a class for MHS (--intra).
  (The kernel within must grow with r: with r^-s or log 1/r a class would win without limit by shrinking.)
- Sums, not means (--reduction). At K = 100 the optimum of a sum over pairs is 120 times that at K = 10.
- eps = 1 for MGD (--mgd-epsilon), as in the first author's code for MGD as a regulariser of neurons.
- Proxies start at random and are put back onto the sphere after every step; a proxy's gradient is cut to
  length 1, since r^-2 has no bound. --proxies fixed optimises them first and then leaves them alone.
- Schedule, weight decay, augmentation, attacks: the usual ones, alike for all methods.
- hug-fixed is ours: fixed proxies with the dot-regression of Yang et al. 2022. Where a simplex exists it is
  their ETF + DR; it goes on where none does.
"""

import argparse
import functools
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
from scipy.optimize import minimize_scalar
from scipy.special import digamma, gammaln
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    Dataset,
    Run,
    TrainingStep,
    UserError,
    accuracy_per_class,
    collapse_metrics,
    cosines,
    expected_calibration_error,
    hardware,
    load_dataset,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    pick_device,
    pick_precision,
    run_side_by_side,
    shot_groups,
    split_evenly,
    table,
    write_atomically,
)

# %% [1] The method
# Everything here takes unit vectors: proxies W (K, d), features x (B, d).


def pair_distances(W: Tensor) -> Tensor:
    """Squared distances of all pairs k < l of unit rows, (K, d) -> (K (K-1) / 2,), never 0.

    By subtraction: 2 - 2 cos is 0 or below in float32 for angles up to 5e-4, without a gradient, and two
    proxies that once came so close would never part. A rounding error is added, so that r^-2, log r and
    their gradients stay finite where two rows are equal.
    """
    return F.pdist(W).square() + torch.finfo(W.dtype).eps


def riesz_energy(W: Tensor, s: float) -> Tensor:
    """E_s = sum_{k != l} K_s(||w_k - w_l||), K_s(r) = sign(s) r^-s, K_0(r) = log(1/r), over ordered pairs.

    Least where the rows are most uniform. (The first author's MHE code has -log r^2, twice K_0, and means
    over unordered pairs.)
    """
    r2 = pair_distances(W)
    kernel = -0.5 * r2.log() if s == 0 else math.copysign(1, s) * r2 ** (-s / 2)
    return 2 * kernel.sum()


def separation(W: Tensor) -> Tensor:
    """min_{k != l} ||w_k - w_l||; tied pairs share the gradient. (The first author's MHS code squares it.)"""
    return pair_distances(W).amin().sqrt()


def soft_separation(W: Tensor, s: float) -> Tensor:
    """-(1/s) log sum_{k<l} r_kl^-s: at most log(min r), by log(K^2/2) / s at the most, and smooth."""
    return -(-s / 2 * pair_distances(W).log()).logsumexp(0) / s


def gram_logdet(W: Tensor, epsilon: float = 1.0, jitter: float = 1e-6) -> Tensor:
    """log det (G + jitter I), G_kl = exp(-epsilon ||w_k - w_l||^2): largest where the rows are most uniform.

    In float64: 100 points on a circle give eigenvalues down to 1e-64, and only the jitter keeps them apart
    from 0. (jitter as in the first author's code.)
    """
    W = W.to(metric_device(W.device)).double()
    G = (-epsilon * (2 - 2 * W @ W.T).clamp_min(0)).exp()  # (K, K)
    return (G + jitter * torch.eye(len(W), dtype=G.dtype, device=G.device)).logdet()


def distances(x: Tensor, w: Tensor, softness: float = 0.0) -> Tensor:
    """sqrt(||x_i - w_i||^2 + softness^2), rows (B, d) -> (B,); the gradient at x_i = w_i is 0, not nan."""
    return ((x - w).square().sum(1) + max(softness, torch.finfo(x.dtype).eps) ** 2).sqrt()


def hug_loss(
    x: Tensor,
    y: Tensor,
    W: Tensor,
    uniformity: str,
    alpha: float,
    beta: float,
    *,
    reduction: str = "sum",
    intra: str = "max",
    epsilon: float = 1.0,
    softness: float = 0.0,
) -> Tensor:
    """The hyperspherical uniformity gap, negated: x (B, d), y (B,), W (K, d), unit rows -> scalar.

    reduction `mean` divides the pair sum of MHE by K (K-1), the log-determinant by K, and the sum within
    classes by its number of terms. intra: only for mhs, `max` counts the farthest feature of each class.
    """
    K, mean = len(W), reduction == "mean"
    # U_inter: -sum_{k != l} r_kl^-2,  min r_kl,  or log det G
    if uniformity == "mhe":
        inter = -riesz_energy(W, 2) / (K * (K - 1) if mean else 1)
    elif uniformity == "mhs":
        inter = separation(W)
    else:
        inter = gram_logdet(W, epsilon).to(W.device, W.dtype) / (K if mean else 1)
    # U_intra: sum_i r_i, which is the Riesz energy -E_{-1} with proxies in place of pairs, or sum_k max_i r_i
    r = distances(x, W[y], softness)  # (B,)
    terms = len(x)
    if uniformity == "mhs" and intra == "max":
        r = r.new_zeros(K).scatter_reduce(0, y, r, "amax")  # (K,), 0 for a class that the batch lacks
        terms = (r > 0).sum()
    return -alpha * inter + beta * r.sum() / (terms if mean else 1)


def dot_regression_loss(x: Tensor, y: Tensor, W: Tensor) -> Tensor:
    """Pull each feature to its own fixed proxy (Yang et al. 2022). Unit x (B, d), W (K, d) -> scalar >= 0."""
    # L = 1/2 mean (w_y . x - 1)^2 = 1/8 mean ||x - w_y||^4: its pull fades near w_y, unlike that of HUG
    return 0.5 * ((x * W[y]).sum(1) - 1).square().mean()


# %% [2] Theory check: point sets on the sphere and the layer-peeled model


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


unit = functools.partial(F.normalize, dim=1)
SHARPER = [16.0**n for n in range(1, 6)]  # s of soft_separation: within 1e-6 of the minimum at the end


def spread(K: int, d: int, uniformity: str, generator: torch.Generator, epsilon: float = 1.0) -> Tensor:
    """K proxies optimised for uniformity alone, from a random start: (K, d) float64, unit rows.

    Every start ends in the simplex (K <= d + 1) or the polygon (d = 2); elsewhere in one of many arrangements
    whose energies hardly differ.
    """
    W = torch.randn(K, d, generator=generator, dtype=torch.float64)
    (W,) = minimise(lambda W: riesz_energy(unit(W), 2) / K, W, steps=500)
    if uniformity == "mgd":
        (W,) = minimise(lambda W: -gram_logdet(unit(W), epsilon), unit(W), steps=500)
    if uniformity == "mhs":
        for s in SHARPER:
            (W,) = minimise(lambda W, s=s: -soft_separation(unit(W), s), unit(W))
    return unit(W)


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


def least_energy(K: int, d: int, s: float) -> float:
    """min E_s over ordered pairs, in closed form. Raises ValueError where none is known."""
    r = known_distances(K, d)
    if r is None:
        raise ValueError(f"no closed form for {K} points in {d} dimensions")
    return float(K * (-np.log(r) if s == 0 else math.copysign(1, s) * r**-s).sum())


def largest_logdet(K: int, d: int, epsilon: float = 1.0, jitter: float = 1e-6) -> float:
    """max log det (G + jitter I) of simplex, cross-polytope (derived here) and polygon (not proven)."""
    if K <= d + 1:  # eigenvalues 1 - a (K - 1 times) and 1 + (K - 1) a
        a = math.exp(-2 * epsilon * K / (K - 1))
        return (K - 1) * math.log(1 + jitter - a) + math.log(1 + jitter + (K - 1) * a)
    if d == 2:  # a circulant matrix: its eigenvalues are the Fourier transform of a row
        row = np.exp(-epsilon * np.r_[0, known_distances(K, d)] ** 2)
        return float(np.log(np.fft.fft(row).real + jitter).sum())
    if K == 2 * d:  # pairs w, -w: differences 1 - b, sums 1 + b - 2 a, and one 1 + b + (2d - 2) a
        a, b = math.exp(-2 * epsilon), math.exp(-4 * epsilon)
        sums = (d - 1) * math.log(1 + jitter + b - 2 * a) + math.log(1 + jitter + b + (2 * d - 2) * a)
        return d * math.log(1 + jitter - b) + sums
    raise ValueError(f"no closed form for {K} points in {d} dimensions")


def uniform_energy(d: int, s: float) -> float:
    """Mean of K_s(||u - v||) over the uniform law on the sphere of R^d, s < d - 1: the limit of K -> inf."""
    if s == 0:
        return float(-math.log(2) - (digamma((d - 1) / 2) - digamma(d - 1)) / 2)
    log = (d - s - 2) * math.log(2) + gammaln(d / 2) + gammaln((d - 1 - s) / 2) - gammaln(d - 1 - s / 2)
    return math.copysign(1, s) * math.exp(log) / math.sqrt(math.pi)


@functools.cache
def reference_energy(K: int, d: int) -> float:
    """The least mean energy of MHE that we know, E_2 / (K (K-1)): closed form, or what `spread` finds."""
    if known_distances(K, d) is not None:
        energy = least_energy(K, d, 2)
    else:
        energy = riesz_energy(spread(K, d, "mhe", torch.Generator().manual_seed(0)), 2).item()
    return energy / (K * (K - 1))


def layer_peeled_hug(
    counts, d: int, uniformity: str, alpha: float, beta: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Proxies W (K, d), features X (N, d), labels (N,) that minimise HUG with n_k free features a class.

    Two changes leave the minimum where it is. Features are written as x = w + scale u, so that they move with
    their proxy: n features that sit on a proxy otherwise drag on it, and it moves n + 1 times slower. And the
    kink of ||x - w|| at 0 is softened, since L-BFGS wants a smooth loss.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    W, X = (unit(torch.randn(n, d, generator=generator, dtype=torch.float64)) for n in (len(counts), len(y)))
    softness = 0.3
    scale = math.sqrt(softness * alpha / beta)  # u and w then feel curvatures of the same order

    def feature(W, U):
        return unit(unit(W)[y] + scale * U)

    def loss(W, U, s):
        if uniformity != "mhs":
            hug = hug_loss(feature(W, U), y, unit(W), uniformity, alpha, beta, softness=softness)
            return hug / alpha
        return within(U, W) - soft_separation(unit(W), s)  # min r is not smooth either

    def within(U, W):
        return beta / alpha * distances(feature(W, U), unit(W)[y], softness).sum()

    for s in SHARPER if uniformity == "mhs" else [None] * 3:
        W, U = minimise(functools.partial(loss, s=s), W, (X - W[y]) / scale, steps=300)
        W, X = unit(W), feature(W, U)  # back to unit length: it conditions the next round
    # features alone, once more: beside a pair energy of 80 their last digits are lost in rounding
    (U,) = minimise(functools.partial(within, W=W), (X - W[y]) / scale)
    return W, feature(W, U), y


def layer_peeled_ce(counts, d: int, E_W: float, E_H: float, seed: int = 0) -> Tensor:
    """Class vectors (K, d) of cross-entropy without bias, (1/K) sum ||w_k||^2 = E_W and mean ||h_k||^2 = E_H.

    One feature h_k for each class suffices: the loss is convex in h, so equal labels get equal features.
    """
    K, generator = len(counts), torch.Generator().manual_seed(seed)
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    V, G = (torch.randn(K, d, generator=generator, dtype=torch.float64) for _ in range(2))

    def budget(V, E):
        return V * (K * E) ** 0.5 / V.norm()

    def loss(V, G):  # sum_k n_k/N CE(W h_k, k)
        z = budget(G, E_H) @ budget(V, E_W).T  # (K, K)
        return (share * F.cross_entropy(z, torch.arange(K), reduction="none")).sum()

    return budget(minimise(loss, V, G, steps=1000)[0], E_W)


def synthetic(folder) -> bool:
    """Check each claim against direct optimisation; print the table, draw synthetic.png."""
    passed, names = [], {"mhe": "MHE", "mhs": "MHS", "mgd": "MGD"}
    generator = torch.Generator().manual_seed(0)
    print(f"{'claim':<66}{'theory':>11}{'measured':>12}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, at_most=False):
        error = max(measured - theory, 0) if at_most else abs(measured - theory)
        passed.append(bool(error <= tolerance))
        print(f"{claim:<66}{theory:>11.6f}{measured:>12.6f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    def optimise(K, d, s):  # least mean energy of K points, from a random start
        W = torch.randn(K, d, generator=generator, dtype=torch.float64)
        (W,) = minimise(lambda W: riesz_energy(unit(W), s) / K, W, steps=500)
        return riesz_energy(unit(W), s).item() / (K * (K - 1))

    def inter(W, uniformity):  # what is maximised, and its best value in closed form
        K, d = W.shape
        if uniformity == "mhe":
            return -least_energy(K, d, 2), -riesz_energy(W, 2).item()
        if uniformity == "mhs":
            return known_distances(K, d).min(), separation(W).item()
        return largest_logdet(K, d), gram_logdet(W).item()

    # 1. Point sets: K optimised points reach the closed forms, for every energy
    shapes = {"simplex": (10, 9), "simplex, d > K": (10, 16), "two points": (2, 3)}
    shapes |= {"cross-polytope": (10, 5), "octahedron": (6, 3), "polygon": (10, 2), "square": (4, 2)}
    for shape, (K, d) in shapes.items():
        print(f"{shape}: K = {K}, d = {d}")
        for s in (-1, 0, 1, 2):
            check(f"   mean energy, s = {s}", least_energy(K, d, s) / (K * (K - 1)), optimise(K, d, s), 1e-6)
        for uniformity in ("mhs", "mgd"):
            theory, measured = inter(spread(K, d, uniformity, generator), uniformity)
            check(f"   {names[uniformity]}", theory, measured, 1e-6)
    # From K = d + 2 to 2d points the largest separation is stuck at sqrt 2 (Rankin 1955)
    for K, d in ((7, 5), (10, 8)):
        W = spread(K, d, "mhs", generator)
        check(f"K = {K}, d = {d}: largest separation, sqrt 2", math.sqrt(2), separation(W).item(), 1e-6)

    # 2. Many points: the mean energy rises to the uniform law's, the gap falls like K^(s/(d-1) - 1)
    for d, s in ((3, 1), (3, -1), (4, 2)):
        limit, small, large = uniform_energy(d, s), optimise(64, d, s), optimise(256, d, s)
        rate = 4 ** (s / (d - 1) - 1)
        print(f"many points: d = {d}, s = {s}")
        check("   mean energy of 256, at most the uniform law's", limit, large, 1e-12, at_most=True)
        check("   mean energy of 64, at most that of 256", large, small, 1e-12, at_most=True)
        check("   extrapolated from both to K = infinity", limit, (large - rate * small) / (1 - rate), 0.025)

    # 3. Layer-peeled HUG: features fall onto proxies, proxies to the optimum of their own, whatever else
    balanced, tail = [11] * 10, [100] * 5 + [1] * 5
    settings = ((balanced, 0.15, 0.015), (tail, 0.15, 0.015), (tail, 1.5, 0.015))
    for d, shape in ((9, "simplex"), (5, "cross-polytope: K = 2d"), (2, "polygon: K = 10 on a circle")):
        for uniformity, name in names.items():
            print(f"layer-peeled HUG, d = {d}, {shape}, {name}")
            for counts, alpha, beta in settings:
                W, X, y = layer_peeled_hug(counts, d, uniformity, alpha, beta)
                theory, measured = inter(W, uniformity)
                title = f"   n = {counts[0]}:{counts[-1]}, alpha {alpha}, beta {beta}: "
                check(title + "U_inter", theory, measured, 1e-6)
                farthest = (X - W[y]).norm(dim=1).max().item()
                check(f"{'':<{len(title)}}max ||x - w||", 0, farthest, 1e-6)
            # and the rest of GNC, at n = 100:1: equal angles to the nearest neighbours, all rules agree
            largest = {9: -1 / 9, 5: 0.0, 2: math.cos(math.pi / 5)}[d]
            found = cosines(W)[~torch.eye(10, dtype=torch.bool)].max().item()
            check("   largest cosine of two proxies", largest, found, 1e-6)
            M = unit(torch.zeros_like(W).index_add_(0, y, X))  # class means
            agree = ((X @ W.T).argmax(1) == y) & ((X @ M.T).argmax(1) == y)
            check("   nearest proxy, nearest mean and label agree", 1, agree.double().mean().item(), 0)

    # 4. Cross-entropy in the same model couples the two aims: its minority collapses
    minority, etf = torch.arange(5, 10), -1 / 9
    check("cross-entropy, n = 1:1, cosine of rare classes", etf, ce_minority(1), 1e-6)
    check("cross-entropy, n = 100:1", 1, ce_minority(100), 1e-6)
    W = layer_peeled_hug(tail, 9, "mhe", 0.15, 0.015)[0]
    check("HUG, n = 100:1", etf, mean_pairwise_cosine(W, minority), 1e-6)

    # One picture: what a long tail does to the rare classes
    ratios = [1, 2, 3, 4, 5, 6, 8, 10, 20, 50, 100]
    proxies = [layer_peeled_hug([r] * 5 + [1] * 5, 9, "mhe", 0.15, 0.015)[0] for r in ratios]
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.subplots()
    plot.plot(ratios, [ce_minority(r) for r in ratios], "o-", color="black", label="cross-entropy")
    cosine = [mean_pairwise_cosine(W, minority) for W in proxies]
    plot.plot(ratios, cosine, "s-", color="0.5", label="HUG (MHE)")
    plot.axhline(etf, ls=":", color="0.5", label="simplex: -1/9")
    plot.set(xscale="log", xlabel="images of a frequent class / of a rare class")
    plot.set(ylabel="mean cosine of the rare classes' vectors", title="Layer-peeled model, 5 + 5 classes")
    plot.legend()
    write_atomically(Path(folder) / "synthetic.png", lambda part: figure.savefig(part, dpi=110))
    print(f"{sum(passed)} of {len(passed)} claims hold; figure: {Path(folder) / 'synthetic.png'}")
    return all(passed)


def ce_minority(ratio: int) -> float:
    """Mean cosine of the rare classes' vectors: 5 classes with `ratio` images, 5 with one."""
    W = layer_peeled_ce([ratio] * 5 + [1] * 5, 10, E_W=2, E_H=2)
    return mean_pairwise_cosine(W, torch.arange(5, 10))


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


class CNN(nn.Module):
    """Three 3x3 convolutions for small images and machines: (B, C, H, W) -> (B, 128); 0.09 M weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.d = 128
        layers, now = [], channels
        for width, pool in ((32, True), (64, True), (128, False)):
            layers += [nn.Conv2d(now, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
            now = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # global average pool


NETWORKS = {"resnet18": resnet18, "resnet32": ResNet32, "cnn": CNN}


class Head(nn.Module):
    """From the network's output to features h (B, d), class vectors W (K, d) and logits z (B, K), in float32.

    A linear layer to d dimensions and BatchNorm, the same for every method: what leaves a ReLU fills one
    orthant only, and points all over a sphere need them all. Then, by kind:
        linear   z = h W^T                                        cross-entropy
        cosine   h and W at unit length, z = scale * cos          normalised softmax
        proxy    the same with scale 1: -||x - w||^2 = 2 cos - 2, so the largest cosine is the nearest proxy
    """

    def __init__(self, d_in: int, d: int, K: int, kind: str, scale: float):
        super().__init__()
        self.kind, self.scale = kind, scale if kind == "cosine" else 1.0
        self.fc = nn.Linear(d_in, d, bias=False)
        self.bn = nn.BatchNorm1d(d)
        W = torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d)  # nn.Linear's default start
        self.W = nn.Parameter(F.normalize(torch.randn(K, d), dim=1) if kind == "proxy" else W)

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, W = self.bn(self.fc(f.float())), self.W
        if self.kind != "linear":
            h, W = F.normalize(h, dim=1), F.normalize(W, dim=1)
        return h, W, self.scale * h @ W.T


# %% [4] Training


class Method(NamedTuple):
    head: str  # linear, cosine or proxy: Head
    loss: str  # ce, mhe, mhs, mgd or dr
    fixed: bool = False  # proxies that are optimised first and then stay


METHODS = {
    "ce": Method("linear", "ce"),
    "ce+norm": Method("cosine", "ce"),
    "hug-mhe": Method("proxy", "mhe"),
    "hug-mhs": Method("proxy", "mhs"),
    "hug-mgd": Method("proxy", "mgd"),
    "hug-fixed": Method("proxy", "dr", fixed=True),
}
REPORTED = {"mhe": (0.15, 0.015), "mhs": (0.15, 0.015), "mgd": (0.15, 0.03)}  # alpha, beta
# The source's schedules are not known: epochs, batch size, network, feature dimension (None: the network's).
RECIPES = {"digits": (25, 32, "cnn", 2), "mnist": (20, 128, "cnn", 2), "fashionmnist": (30, 128, "cnn", None)}
USUAL = (200, 128, "resnet18", None)


def pick_method(args: argparse.Namespace, name: str) -> Method:
    """The method, with --proxies fixed applied to those that have proxies."""
    method = METHODS[name]
    return method._replace(fixed=method.fixed or (method.head == "proxy" and args.proxies == "fixed"))


def build_model(args: argparse.Namespace, method: Method, data: Dataset) -> nn.ModuleDict:
    """Network and head; W learns unless the method fixes it."""
    network = NETWORKS[args.net](data.train_x.shape[3])
    head = Head(network.d, args.dim or network.d, len(data.classes), method.head, args.scale)
    head.W.requires_grad_(not method.fixed)
    return nn.ModuleDict({"network": network, "head": head})


def per_class_subset(data: Dataset, n: int, seed: int) -> Dataset:
    """At most n training images of each class, drawn by a generator of their own."""
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
    order = order[torch.argsort(data.train_y[order], stable=True)]  # class after class, shuffled within
    start = torch.repeat_interleave(data.counts.cumsum(0) - data.counts, data.counts)
    keep = order[torch.arange(len(order)) - start < n]
    return data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr after one epoch of warm-up in forty, then half a cosine down to 0."""
    warmup = max(1, round(args.epochs / 40))
    if epoch < warmup:
        return args.lr * (epoch + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup))) / 2


def limit_gradient(W: Tensor) -> None:
    """Cut each row of W's gradient to length 1 at most: r^-2 has no bound, and SGD needs one."""
    W.grad.mul_((1 / W.grad.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1))


def train(args, name: str, seed: int, data: Dataset, run: Run, device: torch.device) -> dict:
    """Train one method with one seed in its run folder, from its last checkpoint on; returns the result."""
    method, K, N = pick_method(args, name), len(data.classes), len(data.train_y)
    alpha, beta = coefficients(args, method.loss)
    generator = torch.Generator().manual_seed(seed)  # order and augmentation; on the CPU
    torch.manual_seed(seed)  # initialisation
    model = build_model(args, method, data).to(device, memory_format=torch.channels_last)
    network = torch.compile(model["network"]) if args.compile else model["network"]
    head = model["head"]
    # No decay on proxies: they live on the sphere. Class vectors of ce and ce+norm decay as usual.
    moving = method.head == "proxy" and not method.fixed
    decayed = [p for n, p in model.named_parameters() if method.head != "proxy" or n != "head.W"]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}]
    if moving:
        groups.append({"params": [head.W], "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, args.lr, momentum=0.9)
    batches = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    measure = metric_device(device)
    train_y, test_y = data.train_y.to(device), data.test_y.to(measure)
    start, best, seconds = 0, 0.0, 0.0

    state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start, best, seconds = state["epoch"], state["best"], state["seconds"]
    elif method.fixed:
        uniformity = args.uniformity if method.loss == "dr" else method.loss
        proxies = torch.Generator().manual_seed(seed)
        W = spread(K, head.W.shape[1], uniformity, proxies, args.mgd_epsilon)
        head.W.data.copy_(W)

    def step(x: Tensor, y: Tensor) -> Tensor:
        """One batch: images x (B, C, H, W), labels y (B,) -> loss."""
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            f = network(x)
        h, W, z = head(f)
        if method.loss == "ce":
            loss = F.cross_entropy(z, y)
        elif method.loss == "dr":
            loss = dot_regression_loss(h, y, W)
        else:
            options = dict(reduction=args.reduction, intra=args.intra, epsilon=args.mgd_epsilon)
            loss = hug_loss(h, y, W, method.loss, alpha, beta, **options)
        optimizer.zero_grad()
        loss.backward()
        if moving:
            limit_gradient(head.W)
        optimizer.step()
        if moving:
            head.W.data.copy_(unit(head.W.data))  # back onto the sphere
        return loss.detach()

    training_step = TrainingStep(step, optimizer, device, capture=not args.compile)

    def checkpoint(epoch: int) -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        numbers = {"epoch": epoch, "best": best, "seconds": seconds}
        run.save_checkpoint({**parts, **numbers, "generator": generator.get_state()})

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    parts = split_evenly(N, args.batch_size)[: 2 if args.dry_run else None]
    ahead, title = range(start, args.epochs), f"{name} seed {seed}"
    # disable=None: silent where there is no terminal
    bar = tqdm(ahead, initial=start, total=args.epochs, desc=title, disable=None)
    for epoch in bar:
        began = time.perf_counter()
        drawn = torch.randperm(N, generator=generator)
        views, labels = batches.views(drawn, generator), train_y[drawn.to(device)]
        training_step.set_learning_rate(learning_rate(epoch, args))
        losses = torch.zeros(len(parts), device=device)  # read once an epoch: no step waits for the host
        model.train()
        images = batches.sequence(views, parts)
        for i, part in enumerate(parts):
            losses[i] = training_step(next(images), labels[part])
            if i == 0:
                warm = time.perf_counter()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{name} seed {seed}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; lower "
                f"--lr and --overwrite. Last good checkpoint: epoch {epoch}, {run.folder}/checkpoint.pt"
            )
        seconds += time.perf_counter() - began
        line = dict(epoch=epoch + 1, lr=learning_rate(epoch, args), loss=float(losses.mean()))
        line |= geometry(head.W.detach().to(measure))
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            z = evaluate(model, test, args.precision)[1]
            line["accuracy"] = float((z.argmax(1) == test_y).double().mean())
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * len(parts) / max(len(parts) - 1, 1)
            tqdm.write(f"{name} seed {seed}: about {epoch_time * (args.epochs - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)

    about = {"method": name, "seed": seed, "best_accuracy": best, "seconds": seconds}
    about |= {"alpha": alpha, "beta": beta}
    return conclude(args, data, run, model, batches, test, about)


def coefficients(args: argparse.Namespace, loss: str) -> tuple[float | None, float | None]:
    """alpha and beta: the reported ones for this uniformity, unless the flags say otherwise."""
    alpha, beta = REPORTED.get(loss, (None, None))
    if alpha is None:
        return None, None
    return alpha if args.alpha is None else args.alpha, beta if args.beta is None else args.beta


# %% [5] Evaluation and figures


def geometry(W: Tensor) -> dict[str, float]:
    """How uniform the rows of W (K, d) point: MHE energy over the least known, smallest angle (degrees)."""
    K, d = W.shape
    W = unit(W.double())
    energy = riesz_energy(W, 2).item() / (K * (K - 1) * reference_energy(K, d))
    r = float(separation(W))  # r = 2 sin(angle / 2)
    return {"energy": energy, "smallest_angle": math.degrees(2 * math.asin(min(r / 2, 1)))}


def generalized_nc(h: Tensor, y: Tensor, W: Tensor) -> dict[str, float]:
    """Generalized neural collapse of features h (N, d), labels y (N,), class vectors W (K, d), by direction.

    within: mean ||x_i - m_y||, m the mean direction of a class, 0 at full collapse (GNC1); energy_M: as in
    `geometry`, of the class means centred at their mean, 1 at the optimum (GNC2); duality: mean ||m_k - w_k||
    (GNC3). A class without samples is left out.
    """
    x, W = unit(h.double()), unit(W.double())
    n = torch.bincount(y, minlength=len(W))
    sums = torch.zeros_like(W).index_add_(0, y, x)
    there = n > 0
    M = unit(sums)  # (K, d)
    centred = sums[there] / n[there, None]
    centred = centred - centred.mean(0)
    measured = geometry(centred) if there.sum() > 1 else {"energy": math.nan, "smallest_angle": math.nan}
    return {
        "within": float((x - M[y]).norm(dim=1).mean()),
        "energy_M": measured["energy"],
        "smallest_angle_M": measured["smallest_angle"],
        "duality": float((M - W)[there].norm(dim=1).mean()),
    }


@torch.no_grad()
def evaluate(model: nn.ModuleDict, batches: Batches, precision: str, change=None) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image, in order; `change` alters the images."""
    model.eval()
    views = batches.views(torch.arange(batches.N))
    hs, zs = [], []
    for x in batches.sequence(views, split_evenly(batches.N, 1000)):
        x = change(x) if change else x
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            f = model["network"](x)
        h, _, z = model["head"](f)
        hs.append(h)
        zs.append(z)
    measure = metric_device(batches.device)
    return torch.cat(hs).to(measure), torch.cat(zs).to(measure)


CORRUPTIONS = ("noise", "blur", "brightness")


def corrupt(name: str, x: Tensor, mean: Tensor, std: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise (std 0.1 of the pixel range), Gaussian blur (1 pixel), brightness (+ 0.3): our levels.

    x (B, C, H, W) normalised, mean and std (C, 1, 1) -> the same, pixels cut to [0, 1].
    """
    pixels = x * std + mean
    if name == "noise":
        pixels = pixels + 0.1 * torch.randn(x.shape, generator=generator).to(x.device)
    elif name == "blur":
        size = min(5, 2 * min(x.shape[2:]) - 1)  # odd, and the image must be larger than half of it
        pixels = gaussian_blur(pixels, size, 1.0)
    else:
        pixels = pixels + 0.3
    return (pixels.clamp(0, 1) - mean) / std


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


def robustness(args, model, test: Batches, data: Dataset) -> dict:
    """Accuracy under attack at a quarter, half and all of --attack-radius, and under corruptions.

    Attacks: on --attack-images of the test images, the same ones for every method, in float32.
    """
    device = test.device
    mean, std = (v.to(device)[:, None, None] for v in (data.mean, data.std))
    low, high = (0 - mean) / std, (1 - mean) / std
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(test.N, generator=generator)[: args.attack_images or None]
    radii = [args.attack_radius * share for share in (0, 0.25, 0.5, 1)]  # in 255ths
    right = {("clean", 0): 0, **{("pgd", r): 0 for r in radii[1:]}, ("fgsm", radii[-1]): 0}
    model.eval()
    for part in split_evenly(len(chosen), 500):
        index = chosen[part]
        x, y = test.load(test.views(index)), data.test_y[index].to(device)
        for kind, r in right:
            steps = {"clean": 0, "fgsm": 1, "pgd": args.attack_steps}[kind]
            found = attack(model, x, y, r / 255 / std, steps, low, high, generator) if steps else x
            with torch.no_grad():
                z = model["head"](model["network"](found))[2]
            right[kind, r] += int((z.argmax(1) == y).sum())
    share = {key: count / len(chosen) for key, count in right.items()}
    result = {
        "attack_clean": share["clean", 0],
        "fgsm": share["fgsm", radii[-1]],
        "pgd": share["pgd", radii[-1]],
    }
    result |= {"pgd_radii": radii, "pgd_curve": [share["clean", 0], *(share["pgd", r] for r in radii[1:])]}
    test_y = data.test_y.to(metric_device(device))
    for name in CORRUPTIONS:
        generator.manual_seed(0)
        change = functools.partial(corrupt, name, mean=mean, std=std, generator=generator)
        z = evaluate(model, test, args.precision, change)[1]
        result[name] = float((z.argmax(1) == test_y).double().mean())
    return result


def fit_temperature(z: Tensor, y: Tensor) -> float:
    """t > 0 that minimises the mean CE(t z, y): one number, convex. z (N, K), y (N,); bounded by 1000."""

    def loss(log_t):
        return F.cross_entropy(math.exp(log_t) * z.double(), y).item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(1e-2), math.log(1e3)), method="bounded").x)


def conclude(args, data: Dataset, run: Run, model, batches, test, about: dict) -> dict:
    """Measure the trained model on all data, write features.npz and result.json; returns the result."""
    measure, head, K = metric_device(batches.device), model["head"], len(data.classes)
    train_y, test_y = data.train_y.to(measure), data.test_y.to(measure)
    groups, rule = shot_groups(data.counts.to(measure))
    train_h, train_z = evaluate(model, batches, args.precision)
    test_h, test_z = evaluate(model, test, args.precision)
    W = head.W.detach().to(measure)
    # HUG trains no probability. Its cosines get the scale that fits the training images best, which is what
    # the length of the class vectors does in cross-entropy.
    temperature = fit_temperature(train_z, train_y) if head.kind == "proxy" else 1.0
    per_class = accuracy_per_class(test_z.argmax(1), test_y, K)
    tail = {group: float(per_class[members].nanmean()) for group, members in groups.items()}
    result = {
        **about,
        "epochs": args.epochs,
        "accuracy": float((test_z.argmax(1) == test_y).double().mean()),
        **(tail | {"rule": rule} if long_tailed(args.dataset) else {}),
        "ece": expected_calibration_error((temperature * test_z).softmax(1), test_y),
        "temperature": temperature,
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        **geometry(W),
        **generalized_nc(train_h, train_y, W),
        **collapse_metrics(train_h, train_y, W, train_z.argmax(1), groups["few"]),
        **robustness(args, model, test, data),
        "per_class": per_class.tolist(),
        "counts": data.counts.tolist(),
    }
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    run.finish(result)
    return result


def long_tailed(dataset: str) -> bool:
    return dataset.partition(":")[0].endswith("lt")


MARKERS = dict(zip(METHODS, "osv^dP", strict=True))


def draw_figures(folder: Path, runs: list[Run]) -> list[str]:
    """Figures of finished runs, one idea each, methods side by side; returns the names of the files."""
    by_method = {name: [r for r in runs if r.finished["method"] == name] for name in METHODS}
    by_method = {name: found for name, found in by_method.items() if found}
    shades = np.linspace(0.7, 0, len(by_method))
    look = {
        name: {"color": str(shade), "marker": MARKERS[name], "label": name}
        for name, shade in zip(by_method, shades, strict=True)
    }
    saved = []

    def save(name: str, figure: Figure) -> None:
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=110))
        saved.append(name)

    # Where the proxies go: how far from the most uniform arrangement, epoch by epoch
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, found in by_method.items():
        epochs = [line["epoch"] for line in found[0].history]
        for plot, key in ((left, "energy"), (right, "smallest_angle")):
            values = np.mean([[line[key] for line in r.history] for r in found], axis=0)
            plot.plot(epochs, values, markevery=max(1, len(epochs) // 10), **look[name])
    left.axhline(1, ls=":", color="0.5")
    left.set(xlabel="epoch", yscale="log", ylabel="energy of class vectors / least known")
    right.set(xlabel="epoch", ylabel="smallest angle of class vectors (degrees)")
    K, d = next(iter(by_method.values()))[0].load_features()["W"].shape
    if known_distances(K, d) is not None:
        best = math.degrees(2 * math.asin(known_distances(K, d).min() / 2))
        right.axhline(best, ls=":", color="0.5", label=f"largest possible: {best:.1f}")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save("uniformity.png", figure)

    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.subplots()
    for name, found in by_method.items():
        accuracy = 100 * np.mean([r.finished["pgd_curve"] for r in found], axis=0)
        plot.plot(found[0].finished["pgd_radii"], accuracy, **look[name])
    plot.set(xlabel="linf radius of the attack (255ths of the pixel range)")
    plot.set(ylabel="test accuracy under PGD (%)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save("robustness.png", figure)

    if d in (2, 3):
        save("features.png", sphere_figure({name: found[0] for name, found in by_method.items()}, K, d))
    return saved


def sphere_figure(runs: dict[str, Run], K: int, d: int) -> Figure:
    """Directions of test features and class vectors on the circle (d = 2) or the sphere (d = 3)."""
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.6 * rows + 0.4), layout="constrained")
    shades = ["0.0" if k % 2 else "0.55" for k in range(K)]  # the numbers tell which class it is
    for i, (name, run) in enumerate(runs.items()):
        plot = figure.add_subplot(rows, columns, i + 1, projection="3d" if d == 3 else None)
        arrays = run.load_features()
        x, W = (unit(torch.from_numpy(arrays[key])).numpy() for key in ("test_h", "W"))
        y = arrays["test_y"]
        some = np.random.default_rng(0).permutation(len(x))[:2000]
        # on a circle points hide each other: spread them outwards by chance, which means nothing
        out = 1 + 0.12 * np.random.default_rng(1).random((len(some), 1)) if d == 2 else 1
        plot.scatter(*(out * x[some]).T, s=2, c=[shades[k] for k in y[some]], alpha=0.5, rasterized=True)
        for k in range(K):
            plot.plot(*np.stack([0 * W[k], 0.95 * W[k]], 1), color="0.3", lw=1)
            if K <= 20:
                plot.text(*(1.3 * W[k]), str(k), ha="center", va="center", fontsize=8)
        plot.set_title(f"{name}: {100 * run.finished['accuracy']:.1f}%")
        limits = (-1.4, 1.4) if d == 2 else (-0.9, 0.9)
        plot.set(xlim=limits, ylim=limits, aspect="equal", **({"zlim": limits} if d == 3 else {}))
        plot.set_axis_off()
    figure.suptitle("numbered lines: class vectors\ndots: test features, by direction", fontsize=10)
    return figure


def results_table(runs: list[Run]) -> str:
    """Mean ± std over seeds, a row a method: last epoch's accuracy first, the best epoch's beside it."""
    percent = {"accuracy": 2, "best_accuracy": 2, "ece": 1, "fgsm": 1, "pgd": 1}
    percent |= dict.fromkeys(CORRUPTIONS, 1)
    rows = []
    for name in METHODS:
        if found := [r.finished for r in runs if r.finished["method"] == name]:
            cells = [mean_std([r[key] for r in found], digits, 100) for key, digits in percent.items()]
            cells += [mean_std([r["smallest_angle"] for r in found], 1)]
            cells += [mean_std([r[key] for r in found], 2) for key in ("energy", "within")]
            rows.append([name, len(found), *cells, f"{np.mean([r['seconds'] for r in found]):.0f}"])
    header = [
        "method",
        "seeds",
        "accuracy %",
        "best %",
        "ECE %",
        "FGSM %",
        "PGD %",
        *(f"{c} %" for c in CORRUPTIONS),
    ]
    return table([*header, "angle", "energy", "within", "train s"], rows)


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Hyperspherical uniformity gap: neural collapse beyond K <= d + 1, against cross-entropy."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("hug.py", description=about, formatter_class=formatter)).add_argument
    methods = [*METHODS, "hug", "all"]
    add(
        "--dataset", default="digits", help=f"{', '.join(SPECS)}, folder:PATH; long-tailed with lt: cifar10lt"
    )
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    add("--out", type=Path, default="runs", help="run folders go to OUT/hug/DATASET/METHOD/seedS")
    add(
        "--method", nargs="+", default=["all"], choices=methods, help="one or more; hug: as --uniformity says"
    )
    add("--epochs", type=int, help="200; mnist 20, digits 25, fashionmnist 30")
    add("--batch-size", type=int, help="128; digits 32")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--weight-decay", type=float, default=5e-4, help="on all parameters but proxies")
    add("--seed", type=int, nargs="+", default=[0], help="one or more; of weights, proxies, order and views")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of its own; they share the cores")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="inside the network only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start anew the runs that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    add("--synthetic", action="store_true", help="check the theory on the sphere; trains no network")
    add("--net", choices=list(NETWORKS), help="resnet18; mnist, fashionmnist and digits cnn")
    add("--dim", type=int, help="feature dimension d; the network's width; mnist and digits 2")
    add("--uniformity", choices=list(REPORTED), default="mhe", help="of --method hug, of hug-fixed's proxies")
    add("--alpha", type=float, help="weight between classes; 0.15")
    add("--beta", type=float, help="weight within classes; mhe and mhs 0.015, mgd 0.03")
    add("--reduction", choices=["sum", "mean"], default="sum", help="over pairs and over the batch, in HUG")
    add("--proxies", choices=["learnable", "fixed"], default="learnable", help="fixed: optimised beforehand")
    add("--intra", choices=["max", "sum"], default="max", help="over a class, for MHS")
    add("--mgd-epsilon", type=float, default=1.0, help="of the Gaussian kernel, for MGD")
    add("--scale", type=float, default=16.0, help="of the logits of ce+norm")
    add("--per-class", type=int, help="train on so many images of each class at most")
    add("--attack-radius", type=float, default=8.0, help="linf, in 255ths of the pixel range")
    add("--attack-steps", type=int, default=10, help="of PGD; FGSM has one")
    add("--attack-images", type=int, default=500, help="of the test set; 0 for all")
    add("--imbalance", type=float, default=100.0, help="largest over smallest class, for lt")
    add("--profile", choices=["exp", "step"], default="exp", help="shape of the long tail, for lt")
    add("--subset-seed", type=int, default=0, help="which images a class keeps, for lt and --per-class")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    add("--eval-every", type=int, default=1, help="epochs from test to test; the last is always tested")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    recipe = RECIPES.get(args.dataset.partition(":")[0].removesuffix("lt"), USUAL)
    for flag, value in zip(("epochs", "batch_size", "net", "dim"), recipe, strict=True):
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    least = dict(epochs=1, jobs=0, batch_size=3, eval_every=1, image_size=1, attack_steps=2, attack_images=0)
    least |= {flag: n for flag, n in (("dim", 2), ("per_class", 1)) if getattr(args, flag) is not None}
    for flag, n in least.items():
        if getattr(args, flag) < n:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {n} or more")
    for flag in ("lr", "alpha", "beta", "mgd_epsilon", "scale", "attack_radius"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{flag.replace('_', '-')} {value}: expected a number above 0")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    args.method = [f"hug-{args.uniformity}" if m == "hug" else m for m in args.method]
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
        return {"ok": synthetic(args.out / "hug" / "synthetic")}
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    tail = dict(imbalance=args.imbalance, profile=args.profile, subset_seed=args.subset_seed)
    data = load_dataset(args.dataset, args.data_dir, **tail, image_size=args.image_size)
    if args.dry_run:  # two batches, and a few images to measure on
        args.per_class = 2 * args.batch_size // len(data.classes) + 1
        args.attack_images, args.attack_steps = 20, 2
        data = data._replace(test_x=data.test_x[:200], test_y=data.test_y[:200])
    if args.per_class:
        data = per_class_subset(data, args.per_class, args.subset_seed)
    K, N, n = len(data.classes), len(data.train_y), data.counts
    if K < 2 or n.min() < 1 or N < 3:
        raise UserError(
            f"--dataset {args.dataset}: {N} images of {K} classes, the fewest {n.min()}; expected "
            "two classes or more, none of them empty, and three images or more"
        )
    folder = args.out / "hug" / args.dataset.replace(":", "-").replace("/", "-")
    print(f"{args.dataset}: {K} classes, {N:,} training images ({n.max()} to {n.min()} a class), ", end="")
    print(f"{len(data.test_y):,} test images\n{hardware(device)}, {args.precision}; into {folder}")
    for name in args.method:  # says what is wrong with a model before the first one is trained
        model = build_model(args, pick_method(args, name), data)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        d = model["head"].W.shape[1]
        print(f"{name}: {args.net}, d = {d}, {size:,} parameters; ", end="")
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
            run = Run(folder / name / f"seed{seed}", flags, Path(__file__), **again, device=device)
            if not run.finished:
                train(args, name, seed, data, run, device)
                draw_figures(run.folder, [run])
            elif args.jobs <= 1:  # else it was said when the run ended
                accuracy = 100 * run.finished["accuracy"]
                print(f"{name} seed {seed}: done before, {accuracy:.2f}%; --overwrite redoes it")
            runs.append(run)
    if args.jobs == 0:  # one of several at once: the common table and figures are for the one who started us
        return {"results": [run.finished for run in runs], "folder": str(folder)}
    attacked = min(args.attack_images or len(data.test_y), len(data.test_y))
    print(f"\n{results_table(runs)}\nLast epoch. FGSM, PGD-{args.attack_steps}: linf ", end="")
    print(
        f"{args.attack_radius:g}/255, {attacked:,} images. angle: smallest between class vectors (degrees)."
    )
    print("energy: of class vectors, 1 at the least known. within: mean distance of x to its class mean.")
    figures = draw_figures(folder, runs)
    print(f"figures in {folder}: {', '.join(figures)}")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def main(argv: list[str] | None = None) -> dict:
    """Run the command line. Exit code 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        result = program(parse(argv))
    except UserError as error:
        print(f"hug.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "hug.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
