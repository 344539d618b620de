# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///
"""Inter-class collapse in continual learning, and a remedy: the Fixed Non-negative Orthogonal classifier.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 2, and its paper (ICLR 2024). Of the text
we have the abstract; equations and settings are those of the released code, proofs are ours. A patent
application, US 2026/0141221 A1, covers the FNO classifier.

WHAT COLLAPSES. Classes come task by task; images of past tasks are gone, but for a small buffer.
Cross-entropy over all K classes moves every class vector w_k by -p_k h for each feature h of another class.
Old classes have next to nothing to answer with, and all are pushed the same way: the network tells new
features from no old class in particular, and soon answers with the newest classes only (catastrophic
forgetting).

REMEDY 1, the classifier Q (K, d): fixed, so that nothing pushes it; Q >= 0 and Q Q^T = I, so that every
feature dimension belongs to one class. J_k are the dimensions of class k, disjoint sets, and

    q_k = 1 on J_k, 0 elsewhere, over sqrt|J_k|      z = w Q h, h >= 0 (a ReLU), w one learnable scalar

REMEDY 2, softmax masking: the softmax of a new image runs over the classes of its own task only. Together:

    dL/dh = w sum_k (p_k - y_k) q_k = 0, exactly, outside the task's own dimensions

Replayed images keep the full softmax: they alone teach classes of different tasks apart.

WHAT IT TENDS TO. Orthogonal layer-peeled model: features h >= 0 free, ||h||^2 <= E_H, rows of Q orthogonal,
||q_k||^2 = E_W. The minimum of cross-entropy is, under any imbalance,

    h = sqrt(E_H/E_W) q_k,   L = log(1 + (K-1) exp(-sqrt(E_H E_W)))

Zero-mean neural collapse (ZNC): class means are orthogonal about the *origin*. Centred at their own mean they
are a simplex ETF, as in neural collapse (NC), but one that is not aligned with Q.

    python fno_continual.py                                      digits in 5 tasks, 40 s
    python fno_continual.py --synthetic                          the theory above, claim by claim
    python fno_continual.py --balanced                           NC against ZNC, beyond zero training error
    python fno_continual.py --dataset cifar10 --method er der++ --buffer 200 500 --seed 0 1 2

WHAT TO EXPECT. On digits (5 seeds, buffer of 50), class-IL accuracy and forgetting in %:

             learnable    + mask       fno          + mask
    sgd      20, 100      46, 28       20, 100      65, 8        FNO needs the mask where there is no replay
    er       82, 19       79, 9        86, 16       86, 7
    er-ace   82, 8        82, 9        88, 5        88, 5        it masks by itself
    der++    87, 14       78, 3        91, 10       88, 3
    joint    96           -            97           -

FNO adds 4 to 9 points to each learner with replay. The mask halves forgetting and more, but it moves accuracy
from the newest task to old ones rather than adding to it. CIFAR-10 was run in small, one seed: with DER++ the
mask is worth 8 to 14 points there, FNO 2 to 7: results/fno_continual.md.

WHERE PAPER, CODE AND THIS FILE DIFFER.
- The released "masked replay" of ER adds two means, CE_masked(current) + CE(buffer), from two forward passes;
  plain ER takes one mean over both. So the mask comes with twice the gradient and with other BatchNorm
  statistics. Here ER and ER-ACE take one mean in one pass, with mask or without (--replay mean). --replay sum
  is masked ER as released and ER-ACE as published. DER++ is a sum by definition.
- The released masked DER++ recomputes the logits it stores, unmasked, after the step; we store those of the
  step's own forward pass, unmasked, as plain DER++ does.
- ER-ACE with --mask: a logit stays where both masks keep it. (Ours.)
- lr, alpha and beta are those published for ER and DER++ on split CIFAR-10, for every classifier and mask
  alike (the released code tunes neither anew), and for want of others on other data (--lr --alpha --beta).
- No bias in any classifier; the published networks have one.
- Forgetting and backward transfer have several definitions: see stream_metrics in common.py. All numbers are
  those after the last epoch of the last task; a best epoch would mean nothing here.
- A learnable or ETF classifier owns no dimensions; to draw it, dimension j is counted to the class with the
  largest w_kj. For Q that is J_k.
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
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    CollapseStatistics,
    Dataset,
    Run,
    UserError,
    accuracy_per_class,
    average_so_far,
    cosines,
    equiangularity,
    equinorm,
    hardware,
    load_dataset,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    nearest_mean_mismatch,
    pick_device,
    pick_precision,
    run_side_by_side,
    self_duality,
    split_evenly,
    split_tasks,
    stream_metrics,
    table,
    task_accuracies,
    write_atomically,
    zero_mean_metrics,
)

# %% [1] The method


def fno_classifier(K: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Class vectors of a Fixed Non-negative Orthogonal classifier: Q (K, d) float64, Q >= 0, Q Q^T = I.

    A random permutation of the d dimensions is dealt out: floor(d/K) to each class, and the d mod K left over
    one each to randomly drawn classes, so that every dimension has one owner. Raises UserError for d < K.
    """
    if d < K:
        raise UserError(f"--classifier fno: {K} classes need {K} feature dimensions, the network has {d}")
    size = torch.full((K,), d // K)
    size[torch.randperm(K, generator=generator)[: d % K]] += 1  # |J_k|
    owner = torch.empty(d, dtype=torch.long)  # which class a dimension belongs to
    owner[torch.randperm(d, generator=generator)] = torch.arange(K).repeat_interleave(size)
    Q = F.one_hot(owner, K).T.double()  # (K, d)
    return Q / size.double().sqrt()[:, None]  # q_k = 1 on J_k, over sqrt|J_k|


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


class Classifier(nn.Module):
    """z = W h, learnable; or z = w Q h, Q a fixed FNO or ETF classifier and w one learnable scalar from 1 on.

    No bias. scaled=False leaves w out, as the released experiments on ZNC do. Always in float32.
    """

    def __init__(self, K: int, d: int, kind: str, scaled: bool = True):
        super().__init__()
        if kind == "learnable":
            self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # nn.Linear's start
        else:
            self.register_buffer("W", {"fno": fno_classifier, "etf": simplex_etf}[kind](K, d).float())
        self.w = nn.Parameter(torch.ones(())) if scaled and kind != "learnable" else 1.0

    def forward(self, h: Tensor) -> Tensor:
        return self.w * (h.float() @ self.W.T)  # (B, d) @ (d, K) -> (B, K)


def kept_logits(y: Tensor, task: Tensor, mask: bool, ace_seen: Tensor | None = None) -> Tensor:
    """Which logits of the current batch stay in its softmax, (B, K) bool. y (B,) labels, task (K,).

    mask: those of the label's own task; past and future tasks are out. ace_seen, (K,) bool: ER-ACE's own mask
    (Caccia et al. 2022) keeps classes present in the batch and those not seen so far, this batch included.
    """
    keep = torch.ones(len(y), len(task), dtype=torch.bool, device=y.device)
    if mask:
        keep &= task[y][:, None] == task
    if ace_seen is not None:
        present = torch.zeros_like(ace_seen).index_fill_(0, y, True)
        keep &= present | ~ace_seen
    return keep


class Reservoir:
    """Buffer of M rows of a stream, any M of the n seen so far equally likely (Vitter 1985, algorithm R).

    A row is a tuple: add(a, b, ...) takes tensors with the same first axis. Learners here give the image's
    index in the training set, which stands for the image, not augmented: each replay crops and flips it
    anew. DER++ gives its logits too. An image that comes in every epoch of its task counts each time, as in
    the published code, so that all tasks keep the same share.
    """

    def __init__(self, M: int, generator: torch.Generator):
        self.M, self.generator = M, generator
        self.seen, self.rows = 0, []

    def __len__(self) -> int:
        return min(self.seen, self.M)

    def add(self, *rows: Tensor) -> None:
        if not self.rows:
            self.rows = [row.new_zeros(self.M, *row.shape[1:]) for row in rows]
        # row n of the stream (from 0) goes to place n; once full, to a place drawn from 0..n, if that is < M
        B = len(rows[0])
        n = self.seen + torch.arange(B)
        drawn = (torch.rand(B, generator=self.generator, dtype=torch.float64) * (n + 1)).long()
        place = torch.where(n < self.M, n, drawn).tolist()
        self.seen += B
        last = {p: i for i, p in enumerate(place) if p < self.M}  # of two at one place the later stays
        if last:
            to, source = torch.tensor([list(last), list(last.values())])
            for memory, row in zip(self.rows, rows, strict=True):
                memory[to.to(row.device)] = row[source.to(row.device)]

    def draw(self, n: int) -> list[Tensor]:
        """min(n, filled) different rows at random."""
        pick = torch.randperm(len(self), generator=self.generator)[:n]
        return [memory[pick.to(memory.device)] for memory in self.rows]

    def state_dict(self) -> dict:
        return {"seen": self.seen, "rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.seen, self.rows = state["seen"], state["rows"]


def stream_loss(learner: str, logits, x, y, keep, replay, combine="mean", alpha=0.0, beta=0.0):
    """Loss of one step and the current batch's unmasked logits (B, K).

    logits: images (B, C, H, W) -> (B, K). x, y current batch; keep (B, K) from kept_logits. replay() draws
    images, labels and stored logits from the buffer; None for sgd and joint, and while there is no buffer.
    combine: `mean` over current and replayed samples in one pass, or the `sum` of two means in two passes.
    """

    ce = F.cross_entropy

    def masked(z, keep):
        return z.masked_fill(~keep, -torch.inf)

    if replay is None:  # L = CE(cur)
        z = logits(x)
        return ce(masked(z, keep), y), z
    if learner in ("er", "er-ace") and combine == "mean":  # L = CE(cur and buf), one mean
        x_buf, y_buf, _ = replay()
        z = logits(torch.cat([x, x_buf]))
        keep = torch.cat([keep, keep.new_ones(len(y_buf), keep.shape[1])])  # replay is never masked
        return ce(masked(z, keep), torch.cat([y, y_buf])), z[: len(y)]
    z = logits(x)
    if learner in ("er", "er-ace"):  # L = CE(cur) + CE(buf)
        x_buf, y_buf, _ = replay()
        return ce(masked(z, keep), y) + ce(logits(x_buf), y_buf), z
    # DER++ (Buzzega et al. 2020): L = CE(cur) + alpha MSE(buf, stored logits) + beta CE(buf), of two draws
    x_buf, _, z_buf = replay()
    distilled = F.mse_loss(logits(x_buf), z_buf)
    x_buf, y_buf, _ = replay()
    return ce(masked(z, keep), y) + alpha * distilled + beta * ce(logits(x_buf), y_buf), z


def energy_map(h: Tensor, y: Tensor, owner: Tensor, K: int) -> Tensor:
    """Where features live: (K, K), entry [k, k'] = share of ||h||^2 in the dimensions of class k', mean over
    the features of class k. Identity where the dimensions are separated. h (N, d), y (N,), owner (d,).
    """
    h2 = h.double().square()
    blocks = h2.new_zeros(len(h), K).index_add_(1, owner, h2)  # (N, K)
    share = blocks / h2.sum(1, keepdim=True).clamp_min(1e-300)  # a zero feature has no share in anything
    total = h2.new_zeros(K, K).index_add_(0, y, share)
    return total / torch.bincount(y, minlength=K)[:, None]  # a class without features: nan


# %% [2] Theory check: the orthogonal layer-peeled model
# The network below the last layer is taken to be so flexible that every sample has a free feature.


def peeled_features(Q: Tensor, y: Tensor, E_H: float, non_negative: bool, steps: int = 4000) -> Tensor:
    """argmin over H of mean CE(H Q^T, y), ||h_n||^2 <= E_H [and h_n >= 0]: (N, d), by projected gradient.

    Convex: whatever it converges to is the optimum. Q (K, d) float64, y (N,).
    """
    # equal samples have equal optimal features: one free feature a class, weighted by its share
    share = torch.bincount(y, minlength=len(Q)).double() / len(y)  # (K,)
    H = torch.rand(Q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        # dL/dh_k = share_k (softmax(Q h_k) - e_k) Q;  on the sphere a long step is a stable one
        P = torch.softmax(H @ Q.T, 1)
        P.diagonal().sub_(1)
        H = H - 20 / share.max() * (share[:, None] * P) @ Q
        if non_negative:
            H = H.clamp_min(0)
        H = H * (E_H**0.5 / H.norm(dim=1, keepdim=True)).clamp_max(1)  # cone, then ball: the exact projection
    return H[y]


def toy_stream(kind: str, mask: bool, steps: int = 400) -> dict:
    """Two tasks of two classes, one layer h = relu(V x), no buffer, full-batch gradient descent, float64.

    Returns the class-IL accuracy on the first task along the way, that on the second at the end, and by how
    much the second task moved the first one's own logits and class vectors.
    """
    generator, K, d, D = torch.Generator().manual_seed(0), 4, 40, 20
    y = torch.arange(K).repeat_interleave(50)
    x = 2 * torch.eye(K, D, dtype=torch.float64)[y] + 1  # + 1: a direction that all share; tasks interfere
    x += 0.3 * torch.randn(len(y), D, generator=generator, dtype=torch.float64)
    task = split_tasks(K, 2)
    V = (torch.randn(d, D, generator=generator, dtype=torch.float64) / D**0.5).requires_grad_()
    W = torch.randn(K, d, generator=generator, dtype=torch.float64) / d**0.5
    W = fno_classifier(K, d, generator) if kind == "fno" else W.requires_grad_()
    learnable = [p for p in (V, W) if p.requires_grad]
    old, curve = task[y] == 0, []
    for t in range(2):
        now = task[y] == t
        keep = kept_logits(y[now], task, mask)
        W_before, z_before = W.detach().clone(), (torch.relu(x @ V.T) @ W.T).detach()
        for _ in range(steps):
            z = torch.relu(x @ V.T) @ W.T
            curve.append(float((z[old].argmax(1) == y[old]).double().mean()))
            loss = F.cross_entropy(z[now].masked_fill(~keep, -torch.inf), y[now])
            for p, g in zip(learnable, torch.autograd.grad(loss, learnable), strict=True):
                p.data -= 0.2 * g
    z = (torch.relu(x @ V.T) @ W.T).detach()
    first, second = task_accuracies(z, y, task)[0].tolist()
    moved = float((z - z_before)[old, :2].abs().max())
    return {"curve": [*curve, first], "second": second, "moved": moved, "dW": (W.detach() - W_before)[:2]}


def synthetic(folder: Path) -> bool:
    """Check each claim against direct optimisation; print the table, draw synthetic.png."""
    K, d, passed = 10, 64, []
    generator = torch.Generator().manual_seed(0)
    print(f"{'claim':<66}{'theory':>10}{'measured':>11}{'error':>9}{'tolerance':>10}  ok")

    def check(claim, theory, measured, tolerance, at_most=False, at_least=False):
        error = measured - theory if at_most else theory - measured if at_least else abs(measured - theory)
        error = max(float(error), 0.0)
        passed.append(error <= tolerance)
        print(f"{claim:<66}{theory:>10.6f}{measured:>11.6f}{error:>9.1e}{tolerance:>10.1e}", end="  ")
        print("yes" if passed[-1] else "NO")

    # 1. The classifier itself
    for K_, d_ in ((10, 512), (100, 512), (10, 10), (7, 100)):
        Q = fno_classifier(K_, d_, generator)
        error = (Q @ Q.T - torch.eye(K_)).abs().max()
        check(f"K={K_}, d={d_}: largest entry of |Q Q^T - I|", 0, error, 1e-15)
        check("   smallest entry of Q", 0, Q.min(), 0)
        check("   most owners of a dimension", 1, (Q > 0).sum(0).max(), 0)
        spare = ((Q > 0).sum(1) > d_ // K_).sum()
        check("   classes with one of the dimensions left over: d mod K", d_ % K_, spare, 0)

    # 2. The optimum of the orthogonal layer-peeled model, balanced or not
    for E_H, E_W, imbalance in ((25, 1, 1), (25, 1, 20), (9, 2, 5)):
        Q = E_W**0.5 * fno_classifier(K, d, generator)
        y = torch.arange(K).repeat_interleave(torch.linspace(imbalance, 1, K).round().long())
        H = peeled_features(Q, y, E_H, True)
        loss = math.log1p((K - 1) * math.exp(-math.sqrt(E_H * E_W)))
        name = f"E_H={E_H}, E_W={E_W}, imbalance {imbalance}"
        check(f"{name}: log(1+(K-1)exp(-sqrt(E_H E_W)))", loss, F.cross_entropy(H @ Q.T, y), 1e-12)
        error = (H - (E_H / E_W) ** 0.5 * Q[y]).abs().max()
        check("   largest error of h = sqrt(E_H/E_W) q_k", 0, error, 1e-9)
    M = torch.stack([H[y == k].mean(0) for k in range(K)])  # class means

    # 3. What the means look like: about the origin, and about their own mean
    floor = 2 * (1 - math.sqrt(1 - 1 / K))
    znc = zero_mean_metrics(M, Q)
    check("ZNC: largest cosine of class means about the origin", 0, znc["znc_max_cosine"], 1e-7)
    check("ZNC: alignment with Q", 0, znc["znc_alignment"], 1e-12)
    centred = M - M.mean(0)
    off = cosines(centred)[~torch.eye(K, dtype=torch.bool)]
    check("NC2: cosine of centred class means, -1/(K-1)", -1 / (K - 1), off.mean(), 1e-7)
    check("   the same for every pair", -1 / (K - 1), off[(off + 1 / (K - 1)).abs().argmax()], 1e-7)
    check("NC3: alignment of centred means, 2(1 - sqrt(1 - 1/K))", floor, self_duality(Q, centred), 1e-7)
    check("norm of the global mean, sqrt(E_H/K)", math.sqrt(E_H / K), M.mean(0).norm(), 1e-7)

    # 4. Orthogonality alone does not do it: without h >= 0 the optimum moves away from q_k
    Q, y, E_H = fno_classifier(K, d, generator), torch.arange(K), 25
    H = peeled_features(Q, y, E_H, False)
    loss = math.log1p((K - 1) * math.exp(-math.sqrt(E_H * K / (K - 1))))
    check("h of any sign: log(1+(K-1)exp(-sqrt(E_H E_W K/(K-1))))", loss, F.cross_entropy(H @ Q.T, y), 1e-9)
    check("   cos(h, q_k) = sqrt(1 - 1/K)", math.sqrt(1 - 1 / K), (F.normalize(H) * Q).sum(1).min(), 1e-7)

    # 5. Masked softmax and FNO: the gradient of a feature stays in its task's dimensions
    task, y = split_tasks(K, 5, 1), torch.randint(K, (200,), generator=generator)
    W = torch.randn(K, d, generator=generator, dtype=torch.float64)
    others = task[Q.argmax(0)] != task[y][:, None]  # (200, d): dimensions of other tasks' classes
    cases = {"FNO + mask": (Q, True, 0), "learnable + mask": (W, True, 1), "FNO": (Q, False, 1)}
    for name, (C, mask, outside) in cases.items():
        h = torch.rand(len(y), d, generator=generator, dtype=torch.float64).requires_grad_()
        keep = kept_logits(y, task, mask)
        F.cross_entropy((h @ C.T).masked_fill(~keep, -torch.inf), y).backward()
        share = (h.grad[others] != 0).double().mean()
        check(f"{name}: share of other tasks' dimensions with dL/dh != 0", outside, share, 0)

    # 6. The released masked ER: with current batch and replay alike, two summed means have twice the gradient
    V = torch.randn(d, d, generator=generator, dtype=torch.float64, requires_grad=True)
    x, y, norms = torch.rand(20, d, generator=generator, dtype=torch.float64), y[:20], {}
    for combine in ("mean", "sum"):
        args = lambda x: x @ V @ Q.T, x, y, kept_logits(y, task, False), lambda: (x, y, None)
        norms[combine] = torch.autograd.grad(stream_loss("er", *args, combine)[0], V)[0].norm()
    check("ER: gradient of --replay sum over --replay mean", 2, norms["sum"] / norms["mean"], 1e-12)

    # 7. Two tasks, no buffer: who forgets the first one?
    toys = {(kind, mask): toy_stream(kind, mask) for kind in ("learnable", "fno") for mask in (False, True)}
    for (kind, mask), toy in toys.items():
        name = f"toy, {kind}{' + mask' if mask else ''}: class-IL of task 1"
        check(f"{name} before task 2", 1, toy["curve"][len(toy["curve"]) // 2], 0)
        if kind == "learnable" and not mask:
            check("   and after it, at most", 0.2, toy["curve"][-1], 0, at_most=True)
            # dw_k = -eta sum p_k h over new features h >= 0: all old class vectors go down, everywhere
            check("   largest entry of their class vectors' changes", 0, toy["dW"].max(), 0, at_most=True)
            check("   cosine of the two changes, at least", 0.8, cosines(toy["dW"])[0, 1], 0, at_least=True)
        if kind == "fno" and mask:
            check("   and after it, at least", 0.99, toy["curve"][-1], 0, at_least=True)
            check("   by how much its own logits moved", 0, toy["moved"], 0)
            check("   class-IL of task 2, at least", 0.99, toy["second"], 0, at_least=True)

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for ((kind, mask), toy), style in zip(toys.items(), (":", "--", "-.", "-"), strict=True):
        label = kind + (" + mask" if mask else "")
        ax.plot([100 * a for a in toy["curve"]], style, color="black", label=label)
    ax.axvline(len(toy["curve"]) // 2, color="0.7")
    ax.set(xlabel="steps; the second task begins at the line", ylabel="accuracy on the first task (%)")
    ax.set_title("Two tasks of two classes, no buffer")
    ax.legend()
    write_atomically(folder / "synthetic.png", lambda part: figure.savefig(part, dpi=130))
    print(f"{sum(passed)} of {len(passed)} claims hold; figure: {folder / 'synthetic.png'}")
    return all(passed)


# %% [3] Networks, all of them with features h >= 0 behind a ReLU


class MLP(nn.Module):
    """Two hidden layers of 100 * width ReLU units, the network of split MNIST: (B, C, H, W) -> (B, d)."""

    def __init__(self, pixels: int, width: int = 1):
        super().__init__()
        d = self.d = 100 * width
        self.layers = nn.Sequential(nn.Linear(pixels, d), nn.ReLU(), nn.Linear(d, d), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class CNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, ReLU and max-pool, global average pool: d = 128 * width.

    Ours, for a CPU: 0.09 M parameters, seven times the images per second of ResNet-32.
    """

    def __init__(self, channels: int, width: int = 1):
        super().__init__()
        self.d, layers = 128 * width, []
        for c in (32 * width, 64 * width, 128 * width):
            conv = nn.Conv2d(channels, c, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels = c
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


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


# %% [4] Training


class Recipe(NamedTuple):
    tasks: int
    epochs: int  # of each task
    batch_size: int
    net: str
    augment: bool  # crop and flip, for new and replayed images alike
    buffer: int


# Published for split MNIST, CIFAR-10 and CIFAR-100 (Buzzega et al. 2020); digits are ours.
PUBLISHED = Recipe(5, 50, 32, "resnet18", True, 200)
RECIPES = {
    "digits": Recipe(5, 5, 10, "mlp", False, 50),
    "mnist": Recipe(5, 1, 10, "mlp", False, 200),
    "fashionmnist": Recipe(5, 1, 10, "mlp", False, 200),
    "cifar100": PUBLISHED._replace(tasks=10),
}
# --balanced: ResNet-18, 350 epochs of batches of 128 and these learning rates are released; digits are ours.
BALANCED = {"mnist": 0.013296, "fashionmnist": 0.13025, "svhn": 0.009597, "cifar10": 0.06786}
MILESTONES = (1, 2, 3, 4, 5, 7, 9, 11, 14, 18, 23, 28, 34, 41, 49, 59, 70, 82, 95, 110, 127, 145, 165, 187,
              211, 237, 265, 295, 327, 350)  # fmt: skip
METHODS = ("sgd", "er", "er-ace", "der++", "joint")


class Job(NamedTuple):
    """What one run folder is about; method is a learner or `balanced`, buffer 0 where there is none."""

    method: str
    classifier: str
    mask: bool
    buffer: int

    @property
    def name(self) -> str:
        return f"{self.method}{self.buffer or ''}-{self.classifier}{'-mask' if self.mask else ''}"


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """Every learner with every classifier, mask and buffer asked for; joint and balanced are not masked.

    Where neither --mask nor --no-mask is given, both are run: what the mask does is seen beside its absence.
    """
    jobs = []
    for method, classifier in itertools.product(args.method, args.classifier):
        masks = (False, True) if args.mask is None else (args.mask,)
        masks = (False,) if method in ("joint", "balanced") else masks
        buffers = args.buffer if method in ("er", "er-ace", "der++") else [0]
        jobs += [Job(method, classifier, *rest) for rest in itertools.product(masks, buffers)]
    return jobs


def job_flags(args: argparse.Namespace, job: Job, seed: int) -> dict:
    """The flags of one run, for config.json: what depends on the learner is filled in here."""
    der = job.method == "der++"
    # published for split CIFAR-10: ER 0.1; DER++ 0.03, (alpha, beta) by size of the buffer
    alpha, beta = (0.1, 0.5) if job.buffer <= 200 else (0.2, 0.5) if job.buffer <= 500 else (0.1, 1.0)
    lr = BALANCED.get(args.dataset, 0.1) if job.method == "balanced" else 0.03 if der else 0.1
    flags = {key: value for key, value in vars(args).items() if key not in NOT_IN_CONFIG} | job._asdict()
    flags |= {"lr": lr if args.lr is None else args.lr, "seed": seed}
    flags["alpha"] = (alpha if args.alpha is None else args.alpha) if der else None
    flags["beta"] = (beta if args.beta is None else args.beta) if der else None
    return flags


def build_model(args: argparse.Namespace, job: Job, data: Dataset) -> nn.ModuleDict:
    """Network first, then classifier: with one seed, every classifier starts on the same network."""
    _, *size, channels = data.train_x.shape
    if args.net == "mlp":
        network = MLP(size[0] * size[1] * channels, args.width)
    elif args.net == "resnet18":
        network = resnet18(channels)
    else:
        network = {"cnn": CNN, "resnet32": ResNet32}[args.net](channels, args.width)
    classifier = Classifier(len(data.classes), network.d, job.classifier, scaled=job.method != "balanced")
    return nn.ModuleDict({"network": network, "classifier": classifier})


def learning_rate(lr: float, epoch: int, args: argparse.Namespace) -> float:
    """In epoch 0, 1, ... of a task: --lr all along; cifar100 a tenth of it after 0.7 and again after 0.9 of
    the task's epochs (35 and 45 of 50), --balanced after 1/3 and 2/3 of all (117 and 233 of 350)."""
    if args.balanced:
        drops = (1 / 3, 2 / 3)
    else:
        drops = (0.7, 0.9) if args.dataset == "cifar100" else ()
    return lr * 0.1 ** sum(epoch >= round(drop * args.epochs) for drop in drops)


def training_pool(args: argparse.Namespace, data: Dataset) -> Tensor:
    """Indices of the training images used: --per-class of each class, or all; --balanced: equally many."""
    n = int(data.counts.min()) if args.balanced else len(data.train_y)
    n = min(n, args.per_class or n)
    generator = torch.Generator().manual_seed(0)  # the same images for every seed
    order = torch.randperm(len(data.train_y), generator=generator)
    picked = [order[data.train_y[order] == k][:n] for k in range(len(data.classes))]
    return torch.cat(picked).sort().values


def train(args, job: Job, flags: dict, data: Dataset, run: Run, device: torch.device) -> dict:
    """Train one job with one seed in its run folder, from its last checkpoint on; returns the result."""
    K, E, seed, title = len(data.classes), args.epochs, flags["seed"], f"{job.name} seed {flags['seed']}"
    generator = torch.Generator().manual_seed(seed)  # order, augmentation, buffer; all on the CPU
    torch.manual_seed(seed)  # initialisation, and which dimensions a class owns
    model = build_model(args, job, data).to(device, memory_format=torch.channels_last)
    network = torch.compile(model["network"]) if args.compile else model["network"]
    classifier, balanced = model["classifier"], job.method == "balanced"
    learnable = [p for p in model.parameters() if p.requires_grad]
    momentum = 0.9 if balanced else 0.0  # streams: plain SGD, so nothing of a past task is left in it
    # No CUDA graph here: what a step replays from its buffer is decided on the host, image by image
    rate = dict(momentum=momentum, weight_decay=args.weight_decay, fused=device.type == "cuda" or None)
    optimizer = torch.optim.SGD(learnable, flags["lr"], **rate)
    view = dict(pad=data.pad, flip=data.flip) if args.augment else {}
    batches = Batches(data.train_x, data.mean, data.std, **view, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    task = split_tasks(K, args.tasks, args.order_seed)  # (K,)
    pool, train_y = training_pool(args, data), data.train_y.to(device)
    by_task = [pool[task[data.train_y[pool]] == t] for t in range(args.tasks)]
    stages = [pool] if job.method in ("joint", "balanced") else by_task  # joint: all tasks are one stage
    task, test_y = task.to(device), data.test_y.to(metric_device(device))
    memory = Reservoir(job.buffer, generator)
    ace_seen = torch.zeros(K, dtype=torch.bool, device=device)  # classes ER-ACE has met
    start, seconds = 0, 0.0

    state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        memory.load_state_dict(state["memory"])
        ace_seen = state["ace_seen"]
        start, seconds = state["epoch"], state["seconds"]

    def checkpoint(epoch: int) -> None:
        parts = {"model": model, "optimizer": optimizer, "memory": memory}
        state = {name: part.state_dict() for name, part in parts.items()}
        tensors = {"generator": generator.get_state(), "ace_seen": ace_seen}
        run.save_checkpoint({**state, **tensors, "epoch": epoch, "seconds": seconds})

    def logits(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            h = network(x)
        return classifier(h)

    def replay() -> tuple[Tensor, Tensor, Tensor | None]:
        index, *stored = memory.draw(args.batch_size)  # at least two of them, for BatchNorm's sake
        return batches.load(batches.views(index, generator)), train_y[index], *(stored or [None])

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    total = len(stages) * E
    ahead = range(start, total)
    bar = tqdm(ahead, initial=start, total=total, desc=title, disable=None)  # None: silent without terminal
    for epoch in bar:
        began, (t, e) = time.perf_counter(), divmod(epoch, E)
        index = stages[t][torch.randperm(len(stages[t]), generator=generator)]
        views = batches.views(index, generator)
        parts = split_evenly(len(index), args.batch_size)[: 2 if args.dry_run else None]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(flags["lr"], e, args)
        losses = torch.zeros(len(parts), device=device)  # read once an epoch: no step waits for the host
        model.train()
        images = batches.sequence(views, parts)
        for step, part in enumerate(parts):
            x, y = next(images), train_y[views.index[part]]  # (B, C, H, W), (B,)
            ace = job.method == "er-ace" and t > 0  # in task 0 it neither masks nor replays, as published
            ace_seen[y] = True
            keep = kept_logits(y, task, job.mask, ace_seen if ace else None)
            ready = len(memory) > 0 and (ace or job.method != "er-ace")
            batch = x, y, keep, replay if ready else None
            loss, z = stream_loss(job.method, logits, *batch, args.replay, flags["alpha"], flags["beta"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            if job.buffer:
                rows = [views.index[part]] + ([z.detach()] if job.method == "der++" else [])
                memory.add(*rows)
            if step == 0:
                warm = time.perf_counter()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{title}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; lower "
                f"--lr and --overwrite. Last good checkpoint: epoch {epoch}, {run.folder}/checkpoint.pt"
            )
        seconds += time.perf_counter() - began
        lr = learning_rate(flags["lr"], e, args)
        line = dict(epoch=epoch + 1, task=t, lr=lr, loss=float(losses.mean()), seconds=seconds)
        if e + 1 == E or (balanced and e + 1 in MILESTONES):
            h, z = evaluate(model, test, args.precision)
            class_il, task_il = task_accuracies(z, test_y, task)
            line |= {"class_il": class_il.tolist(), "task_il": task_il.tolist()}  # a row of the matrix each
            if balanced:
                line |= collapse(model, batches, pool, data, args.precision)
            else:  # from test features: they are at hand, and hold every task that was learned
                met = torch.arange(K) if job.method == "joint" else (task.cpu() <= t).nonzero().flatten()
                line |= stream_collapse(h, test_y, classifier.W.detach(), met)
            bar.set_postfix(loss=f"{line['loss']:.3f}", class_il=f"{100 * class_il.nanmean():.1f}")
        if epoch == 0 and total > 1:  # forecast without the first step, which also sets things up
            epoch_time = (time.perf_counter() - warm) * len(parts) / max(len(parts) - 1, 1)
            tqdm.write(f"{title}: about {epoch_time * (total - 1) / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)
    return conclude(args, job, flags, data, run, model, batches, test, task, pool, seconds)


# %% [5] Evaluation and figures


@torch.no_grad()
def evaluate(model: nn.ModuleDict, batches: Batches, precision: str, index=None) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image, or of those at index, in order, unaugmented."""
    model.eval()
    views = batches.views(torch.arange(batches.N) if index is None else index)
    hs, zs = [], []
    for x in batches.sequence(views, split_evenly(len(views.index), 250)):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = model["network"](x)
        hs.append(h.float())
        zs.append(model["classifier"](h))
    measure = metric_device(batches.device)
    return torch.cat(hs).to(measure), torch.cat(zs).to(measure)


def stream_collapse(h: Tensor, y: Tensor, W: Tensor, met: Tensor) -> dict[str, float]:
    """ZNC of the classes met so far that have features here; nan for fewer than two of them."""
    counts = torch.bincount(y, minlength=len(W))
    met = met.to(h.device)
    met = met[counts[met] > 0]
    means = h.new_zeros(W.shape, dtype=torch.float64).index_add_(0, y, h.double()) / counts[:, None]
    if len(met) < 2:
        return dict.fromkeys(("znc_equinorm", "znc_mean_cosine", "znc_max_cosine", "znc_alignment"), math.nan)
    return zero_mean_metrics(means[met], W.to(h.device)[met])


def collapse(model, batches: Batches, pool: Tensor, data: Dataset, precision: str) -> dict[str, float]:
    """NC and ZNC of the training features, for --balanced; 0 is full collapse, but for NC3 under FNO."""
    h, z = evaluate(model, batches, precision, pool)
    y, W = data.train_y[pool].to(h.device), model["classifier"].W.detach().to(h.device)
    statistics = CollapseStatistics(*W.shape, device=h.device)
    for part in split_evenly(len(h), 8192):
        statistics.update(h[part], y[part])
    M, centred, prediction = statistics.mean, statistics.centred_means(), z.argmax(1)
    return {
        "train_accuracy": float((prediction == y).double().mean()),
        "nc1": statistics.nc1()[0],
        "nc2_equinorm": equinorm(centred),
        "nc2_equiangular": equiangularity(centred),
        "nc3": self_duality(W, centred),
        "nc4": nearest_mean_mismatch(h, prediction, M),  # the same for both: distances know no centre
        "znc1": statistics.nc1(centred=False)[0],  # Sigma_B about the origin, 1/K sum mu_k mu_k^T
        **zero_mean_metrics(M, W),
    }


def conclude(args, job: Job, flags, data, run: Run, model, batches, test, task, pool, seconds: float) -> dict:
    """Measure the trained model, write features.npz and result.json; returns the result."""
    K = len(data.classes)
    train_h, train_z = evaluate(model, batches, args.precision, pool)
    test_h, test_z = evaluate(model, test, args.precision)
    measure = test_h.device
    train_y, test_y, task = data.train_y[pool].to(measure), data.test_y.to(measure), task.to(measure)
    W = model["classifier"].W.detach().to(measure)
    rows = [line for line in run.history if "class_il" in line]
    rows = rows[-1:] if job.method == "balanced" else rows
    R = {kind: torch.tensor([line[kind] for line in rows]).double() for kind in ("class_il", "task_il")}
    summary = {kind: stream_metrics(matrix) for kind, matrix in R.items()}
    energy = energy_map(test_h, test_y, W.argmax(0), K)
    old = (task < args.tasks - 1).nonzero().flatten()
    result = {
        **job._asdict(),
        "seed": flags["seed"],
        "epochs": args.epochs,
        "seconds": seconds,
        **{kind: values["average"] for kind, values in summary.items()},
        "forgetting": summary["class_il"]["forgetting"],
        "backward_transfer": summary["class_il"]["backward_transfer"],
        "task_il_forgetting": summary["task_il"]["forgetting"],
        "task_il_backward_transfer": summary["task_il"]["backward_transfer"],
        "stream_average": summary["class_il"]["stream_average"],
        "accuracy": float((test_z.argmax(1) == test_y).double().mean()),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        "own_energy": float(energy.diagonal().nanmean()),
        "old_cosine_W": mean_pairwise_cosine(W, old),
        **{key: value for key, value in rows[-1].items() if key.startswith(("nc", "znc"))},
        "matrix_class_il": R["class_il"].tolist(),
        "matrix_task_il": R["task_il"].tolist(),
        "per_class": accuracy_per_class(test_z.argmax(1), test_y, K).tolist(),
        "task_of_class": task.tolist(),
    }
    if job.method == "balanced":
        tested = [line for line in run.history if "train_accuracy" in line]
        result["zero_error_epoch"] = next((r["epoch"] for r in tested if r["train_accuracy"] >= 0.999), None)
    features = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y, "W": W}
    run.save_features(**features, energy=energy)
    run.finish(result)
    return result


def variants(runs: list[Run]) -> dict[Job, list[Run]]:
    """Runs of one job with several seeds together, in the order of the runs."""
    found: dict[Job, list[Run]] = {}
    for run in runs:
        found.setdefault(Job(*(run.finished[field] for field in Job._fields)), []).append(run)
    return found


def draw_figures(folder: Path, runs: list[Run]) -> list[str]:
    """Figures of finished runs, one idea each; heat maps show the first seed. Returns the files' names."""
    found, saved = variants(runs), []

    def save(name: str, figure: Figure) -> None:
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=100))
        saved.append(name)

    def heat_maps(name: str, maps: dict[Job, np.ndarray], label: str, x: str, y: str) -> None:
        columns = min(4, len(maps))
        rows = -(-len(maps) // columns)
        figure = Figure(figsize=(2.4 * columns + 1.2, 2.4 * rows + 0.3), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for plot in grid.flat[len(maps) :]:
            plot.axis("off")
        for plot, (job, values) in zip(grid.flat, maps.items(), strict=False):
            image = plot.imshow(values, cmap="gray_r", interpolation="nearest", vmin=0, vmax=100)
            plot.set_title(job.name, fontsize=10)
            plot.set(xlabel=x, ylabel=y)
            ticks = range(0, len(values), max(1, len(values) // 5))
            plot.set_xticks(ticks, [t + 1 for t in ticks])
            plot.set_yticks(ticks, [t + 1 for t in ticks])
        figure.colorbar(image, ax=grid, label=label)
        save(name, figure)

    if any(job.method == "balanced" for job in found):
        draw_balanced(save, found)
    else:
        # What forgetting is: below the diagonal the columns fade
        first = {job: np.array(same[0].finished["matrix_class_il"]) for job, same in found.items()}
        full = {job: 100 * R for job, R in first.items() if len(R) == R.shape[1]}
        if full:
            heat_maps("accuracy_matrix.png", full, "class-IL accuracy (%)", "on task", "after task")
            draw_forgetting(save, {job: found[job] for job in full})

    # Feature dimension separation: a diagonal. Classes in the order of the stream
    maps = {}
    for job, same in found.items():
        order = np.argsort(same[0].finished["task_of_class"], kind="stable")
        maps[job] = 100 * same[0].load_features()["energy"][np.ix_(order, order)]
    heat_maps("feature_energy.png", maps, "share of the features' energy (%)", "dimensions of class", "class")
    return saved


SHADES = {"learnable": "0.55", "etf": "0.3", "fno": "0"}


def draw_forgetting(save, found: dict[Job, list[Run]]) -> None:
    """Along the stream, a column for each learner and buffer: all tasks learned so far, and the first one.

    The two belong together: a learner that never takes up a new class does not forget the first task either.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in found:
        groups.setdefault((job.method, job.buffer), []).append(job)
    figure = Figure(figsize=(2.2 * len(groups) + 1, 5), layout="constrained")
    grid = figure.subplots(2, len(groups), squeeze=False, sharey=True)
    for (top, bottom), ((method, buffer), jobs) in zip(grid.T, groups.items(), strict=True):
        for job in jobs:
            R = 100 * torch.tensor([run.finished["matrix_class_il"] for run in found[job]]).mean(0)  # (T, T)
            line = "o-" if job.mask else "x--"
            look = {
                "color": SHADES[job.classifier],
                "label": job.classifier + (" + mask" if job.mask else ""),
            }
            for plot, y in ((top, average_so_far(R)), (bottom, R[:, 0])):
                plot.plot(range(1, len(R) + 1), y, line, **look)
                plot.xaxis.get_major_locator().set_params(integer=True)
        top.set_title(f"{method} {buffer or ''}")
        bottom.set(xlabel="tasks learned", ylim=(-3, 103))
    for plot, which in zip(grid[:, 0], ("all tasks so far", "the first task"), strict=True):
        plot.set_ylabel(f"class-IL accuracy (%)\n{which}")
    lines = {line.get_label(): line for line in grid[0, 0].get_lines()}  # in each panel the same variants
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save("forgetting.png", figure)


def draw_balanced(save, found: dict[Job, list[Run]]) -> None:
    """NC and ZNC over the epochs of --balanced, first seed: spread, angles and alignment."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    grid = figure.subplots(1, 3)
    measures = {"within-class": ("nc1", "znc1"), "angles": ("nc2_equiangular", "znc_mean_cosine"),
                "alignment with W": ("nc3", "znc_alignment")}  # fmt: skip
    for plot, (name, keys) in zip(grid, measures.items(), strict=True):
        for job, same in found.items():
            lines = [line for line in same[0].history if "nc1" in line]
            for key, about, style in zip(keys, ("NC", "ZNC"), ("--", "-"), strict=True):
                values = [line[key] for line in lines]
                label = f"{job.classifier}, {about}"
                plot.plot(
                    [line["epoch"] for line in lines],
                    values,
                    style,
                    color=SHADES[job.classifier],
                    label=label,
                )
        plot.set(xscale="log", title=name, xlabel="epoch", ylabel="distance from full collapse")
        plot.set_ylim(bottom=0)
    grid[0].legend(fontsize=8)
    save("znc.png", figure)


def results_table(runs: list[Run]) -> str:
    """Mean ± std over seeds, a row a learner, classifier, mask and buffer; after the last task."""
    percent = ("class_il", "task_il", "forgetting", "backward_transfer", "own_energy")
    rows = []
    for job, same in variants(runs).items():
        found = [run.finished for run in same]
        cells = [mean_std([r[key] for r in found], 1, 100) for key in percent]
        cells += [mean_std([r[key] for r in found], 2) for key in ("old_cosine_W", "znc_mean_cosine")]
        cells = ["-" if cell.startswith("nan") else cell for cell in cells]  # a joint run's forgetting
        seconds = f"{np.mean([r['seconds'] for r in found]):.0f}"
        which = job.method, job.buffer or "-", job.classifier, "yes" if job.mask else "no"
        rows.append([*which, len(found), *cells, seconds])
    header = ["method", "buffer", "classifier", "mask", "seeds", "class-IL %", "task-IL %", "forgetting %"]
    return table([*header, "backward %", "own energy %", "old cos W", "ZNC cos", "train s"], rows)


def balanced_table(runs: list[Run]) -> str:
    """NC and ZNC of --balanced under each other, mean ± std over seeds; 0 everywhere is full collapse."""
    keys = {
        "NC": ("nc1", "nc2_equinorm", "nc2_equiangular", "nc3", "nc4"),
        "ZNC": ("znc1", "znc_equinorm", "znc_mean_cosine", "znc_alignment", "nc4"),
    }
    rows = []
    for (job, same), about in itertools.product(variants(runs).items(), keys):
        found = [run.finished for run in same]
        cells = [mean_std([r[key] for r in found], 1, 100) for key in ("train_accuracy", "accuracy")]
        zero = [r["zero_error_epoch"] for r in found]
        cells.append("not reached" if None in zero else mean_std(zero, 0))
        rows.append([f"{job.classifier}, {about}", *cells])
        rows[-1] += [mean_std([r[key] for r in found], 4) for key in keys[about]]
    header = ["classifier, about", "train %", "test %", "zero error at", "within-class", "norms", "angles"]
    return table([*header, "alignment", "nearest mean"], rows)


# %% [6] Command line


# [copied: parser]
class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


# [end copied]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    about = "Inter-class collapse in continual learning, and the fixed non-negative orthogonal classifier."
    formatter = argparse.ArgumentDefaultsHelpFormatter
    add = (parser := Parser("fno_continual.py", description=about, formatter_class=formatter)).add_argument
    methods, kinds, both = [*METHODS, "all"], ["learnable", "fno", "etf"], argparse.BooleanOptionalAction
    out = "run folders go to OUT/fno_continual/DATASET/METHOD/seedS"
    add("--dataset", default="digits", help=f"{', '.join(SPECS)}, folder:PATH")
    add("--data-dir", type=Path, default="data", help="where NAME.npz is kept and downloads go")
    add("--out", type=Path, default="runs", help=out)
    add("--method", nargs="+", default=["all"], choices=methods, help="learners; joint: all tasks at once")
    add("--classifier", nargs="+", default=kinds[:2], choices=kinds, help="fno: d >= K, etf: d >= K - 1")
    add("--mask", action=both, help="softmax of new images over their task only; neither flag: both ways")
    add("--buffer", type=int, nargs="+", help="images kept, one or more sizes; 200, digits 50")
    add("--tasks", type=int, help="5; cifar100 10")
    add("--order-seed", type=int, help="shuffle the classes over the tasks; else label order")
    add("--epochs", type=int, help="a task: 50; digits 5, (fashion)mnist 1; --balanced 350, digits 60")
    add("--batch-size", type=int, help="new images, and as many replayed: 32; digits, (fashion)mnist 10")
    add("--lr", type=float, help="learning rate: 0.1, der++ 0.03; --balanced as released")
    add("--weight-decay", type=float, help="on all parameters: 0; --balanced 5e-4")
    add("--seed", type=int, nargs="+", default=[0], help="one or more; of weights, order, views and buffer")
    add("--jobs", type=int, default=1, help="runs at a time, each a process of its own; they share the cores")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="inside the network only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start anew the runs that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    add("--synthetic", action="store_true", help="check the theory; trains no network")
    add("--balanced", action="store_true", help="no stream: NC against ZNC on the whole set")
    add(
        "--net",
        choices=["mlp", "cnn", "resnet32", "resnet18"],
        help="resnet18; streams of digits, (fashion)mnist: mlp; --balanced digits: cnn",
    )
    add("--width", type=int, default=1, help="of mlp, cnn and resnet32: d = 100, 128, 64 times this")
    add("--per-class", type=int, help="training images of each class, for a shorter run; else all")
    add("--replay", choices=["mean", "sum"], default="mean", help="ER, ER-ACE: one mean, or two summed")
    add("--alpha", type=float, help="DER++, stored logits: 0.1; buffers of 201 to 500: 0.2")
    add("--beta", type=float, help="DER++, stored labels: 0.5; buffers above 500: 1")
    add("--augment", action=both, help="crop and flip, replayed images too; digits, (fashion)mnist: no")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv

    recipe = RECIPES.get(args.dataset, PUBLISHED)
    if args.balanced:
        if args.tasks not in (None, 1) or args.mask:
            raise UserError("--balanced: trains on the whole set at once; leave out --tasks and --mask")
        recipe = recipe._replace(tasks=1, epochs=350, batch_size=128, net="resnet18", augment=False)
        if args.dataset == "digits":
            recipe = recipe._replace(epochs=60, batch_size=32, net="cnn")
        args.method = ["balanced"]
    for flag in recipe._fields:
        if getattr(args, flag) is None:
            setattr(args, flag, [recipe.buffer] if flag == "buffer" else getattr(recipe, flag))
    if args.weight_decay is None:
        args.weight_decay = 5e-4 if args.balanced else 0.0
    # three: split evenly, no batch is then a single image, for which BatchNorm has no variance
    bounds = dict(tasks=1, epochs=1, jobs=0, batch_size=3, width=1, image_size=1, per_class=2)
    for flag, least in bounds.items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {least} or more")
    for size in args.buffer:
        if size < 2:
            raise UserError(f"--buffer {size}: expected 2 images or more; --method sgd has no buffer")
    if args.lr is not None and not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: expected a number above 0")
    for flag in ("alpha", "beta"):
        if getattr(args, flag) is not None and not 0 <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected a number, 0 or more")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    if args.net == "resnet18" and args.width != 1:
        raise UserError(f"--width {args.width}: resnet18 has one width; choose --net resnet32")
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    for flag in ("classifier", "buffer", "seed"):
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
    if args.dry_run:
        args.epochs, args.overwrite, args.out = 1, True, args.out / "dry-run"
    return args


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "resume", "overwrite", "synthetic"}
NOT_IN_CONFIG |= {"jobs", "words"}


def check_stream(args: argparse.Namespace, jobs: list[Job], data: Dataset) -> None:
    """Say what is wrong with a stream before anything is trained on it. Raises UserError."""
    task, n = split_tasks(len(data.classes), args.tasks, args.order_seed), data.counts
    images = torch.bincount(task[data.train_y[training_pool(args, data)]], minlength=args.tasks)
    if args.balanced and n.min() < 2:
        name = data.classes[int(n.argmin())]
        raise UserError(f"--balanced: class {name} has {n.min()} training images, expected two or more")
    if images.min() < 2:
        few = f"task {int(images.argmin()) + 1} has {images.min()} training images"
        raise UserError(f"--tasks {args.tasks}: {few}, expected two or more")
    classes = torch.bincount(task)
    if any(job.mask for job in jobs) and classes.min() < 2:
        raise UserError(
            f"--mask: task {int(classes.argmin()) + 1} has one class, and a softmax over one class has no "
            "gradient; choose fewer --tasks, or --no-mask"
        )


def program(args: argparse.Namespace) -> dict:
    """Every job with every seed, one after another; the table and the figures. Raises UserError."""
    if args.synthetic:
        return {"ok": synthetic(args.out / "fno_continual" / "synthetic")}
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    data, jobs = load_dataset(args.dataset, args.data_dir, image_size=args.image_size), list_jobs(args)
    check_stream(args, jobs, data)
    K, N = len(data.classes), len(training_pool(args, data))
    folder = args.out / "fno_continual" / args.dataset.replace(":", "-").replace("/", "-")
    print(f"{args.dataset}: {K} classes in {args.tasks} tasks, {N:,} training images, ", end="")
    print(f"{len(data.test_y):,} test images\n{hardware(device)}, {args.precision}; into {folder}")
    for kind in args.classifier:  # says what is wrong with a model before the first one is trained
        model = build_model(args, Job(args.method[0], kind, False, 0), data)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{kind} classifier on {args.net}, d = {model['network'].d}: {size:,} parameters to learn")
    print(f"{len(jobs)} variants, seeds {args.seed}, {args.epochs} epochs a task, batch {args.batch_size}")
    if args.jobs > 1:  # all are finished then, and what follows only reads them
        run_side_by_side(Path(__file__), args, device)
        args.resume, args.overwrite = True, False
    runs = []
    for job, seed in itertools.product(jobs, args.seed):
        flags = job_flags(args, job, seed)
        again = dict(resume=args.resume, overwrite=args.overwrite)
        run = Run(folder / job.name / f"seed{seed}", flags, Path(__file__), **again, device=device)
        if not run.finished:
            train(args, job, flags, data, run, device)
            draw_figures(run.folder, [run])
        elif args.jobs <= 1:  # else it was said when the run ended
            accuracy = 100 * run.finished["class_il"]
            print(f"{job.name} seed {seed}: done before, {accuracy:.2f}%; --overwrite redoes it")
        runs.append(run)
    if args.jobs == 0:  # one of several at once: the common table and figures are for the one who started us
        return {"results": [run.finished for run in runs], "folder": str(folder)}
    if args.balanced:
        floor = 2 - 2 * math.sqrt(1 - 1 / K)
        print(
            f"\n{balanced_table(runs)}\nFrom within-class on, 0 is full collapse, about the means' mean (NC)"
        )
        print(f"or the origin (ZNC). Where ZNC is complete, the alignment in the sense of NC is {floor:.4f}.")
    else:
        print(
            f"\n{results_table(runs)}\nAfter the last task. class-IL: all classes compete; task-IL: those of"
        )
        print("the image's task. own energy: share of a feature's squared norm in its class's dimensions.")
        print(
            "old cos W: mean cosine of past tasks' class vectors. ZNC cos: mean |cos| about the origin of the"
        )
        print("class means of test features; 0 is full zero-mean collapse.")
    figures = draw_figures(folder, runs)
    print(f"figures in {folder}: {', '.join(figures)}")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def main(argv: list[str] | None = None) -> dict:
    """Run the command line. Exit code 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        result = program(parse(argv))
    except UserError as error:
        print(f"fno_continual.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        command = shlex.join(["python", "fno_continual.py", *words, "--resume"])
        if words[-2:] != ["--jobs", "0"]:  # else the one who started us says it
            print(f"\ninterrupted; go on with: {command}", file=sys.stderr)
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
