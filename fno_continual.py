# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Inter-class collapse in continual learning, and a remedy: the Fixed Non-negative Orthogonal classifier.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 2, and its paper (ICLR 2024). Of the text
we have the abstract. Classifier, masks and settings follow the released code (khyong/FNO-classifier); the
learners follow mammoth (aimagelab); the proofs are ours. A patent application, US 2026/0141221 A1, covers the
FNO classifier.

WHAT COLLAPSES. Classes come task by task; the images of past tasks are gone, but for a small buffer.
Cross-entropy over all K classes moves every class vector w_k by -p_k h for each feature h of another class.
Old classes have almost no images left to pull their vectors back, so all of these move in one direction. The
network can no longer tell old classes apart and answers with the newest only: catastrophic forgetting.

REMEDY 1, the classifier Q (K, d): fixed, so that nothing moves it; Q >= 0 and Q Q^T = I, so that every
feature dimension belongs to one class. J_k are the dimensions of class k, disjoint sets, and

    q_k = 1 on J_k, 0 elsewhere, over sqrt|J_k|      z = w Q h, h >= 0 (a ReLU), w one learnable scalar

REMEDY 2, softmax masking: the softmax of a new image runs over the classes of its own task only. Together:

    dL/dh = w sum_k (p_k - y_k) q_k = 0, exactly, outside the task's own dimensions

Replayed images keep the full softmax: they alone teach the network to tell the tasks apart.

WHAT IT TENDS TO. Orthogonal layer-peeled model: features h >= 0 free, ||h||^2 <= E_H, rows of Q orthogonal,
||q_k||^2 = E_W. The minimum of cross-entropy is, under any imbalance,

    h = sqrt(E_H/E_W) q_k,   L = log(1 + (K-1) exp(-sqrt(E_H E_W)))

Zero-mean neural collapse (ZNC): class means are orthogonal about the *origin*. About their own mean they are
a simplex ETF, as in neural collapse (NC), but not aligned with Q. `joint` shows both without a stream.

    python fno_continual.py                                      digits in 5 tasks, under a minute
    python fno_continual.py --synthetic                          the theory above, claim by claim
    python fno_continual.py --dataset cifar10 --method er der++ --buffer 200 500 --seed 0 1 2

WHERE PAPER, CODE AND THIS FILE DIFFER.
- The released "masked replay" of ER adds two means, CE_masked(current) + CE(buffer), from two forward passes;
  plain ER takes one mean over both. So the mask comes with twice the gradient and with other BatchNorm
  statistics. Here ER and ER-ACE take one mean in one pass, with mask or without (--replay mean). --replay sum
  is masked ER as released and ER-ACE as published. DER++ is a sum by definition.
- The released masked DER++ recomputes the logits it stores after the step; we store those of the step's
  own forward pass, as plain DER++ does. Both are unmasked.
- ER-ACE with --mask: a logit stays where both masks keep it. (Ours.) Its released mask keeps the highest
  class seen even where the batch lacks it; ours follows the paper.
- lr and DER++'s weights are the released ones for split MNIST, CIFAR-10 and CIFAR-100, whatever classifier
  and mask (the released code tunes neither anew); other data have those of CIFAR-10. The network of split
  MNIST is the released one: pixels in [0, 1], Glorot's start, a bias in the learnable classifier.
- The number to beat on split CIFAR-10, class-IL in %, buffer 200 / 500: ProNC 72.7 / 79.4 (ICLR 2026, arXiv
  2505.24254, table 1; not run here). It has DER++ 64.9 / 72.3 and NCT, a fixed simplex, 51.6 at 200.
- Five seeds of split MNIST can be three points off together: give it ten.
- All numbers are those after the last epoch of the last task; a best epoch would mean nothing here. Of the
  several definitions of forgetting and backward transfer ours stand in stream_metrics in common.py.
- A learnable or ETF classifier owns no dimensions; where features live is then counted by the largest w_kj.
"""

# %% [markdown]
# # 1. The method
# This cell needs nothing else, so that it can be pasted into a notebook.

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fno_classifier(K: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """Class vectors of a Fixed Non-negative Orthogonal classifier: Q (K, d) float64, Q >= 0, Q Q^T = I.

    A random permutation of the d dimensions is dealt out: floor(d/K) to each class, and the d mod K left over
    one each to randomly drawn classes, so that every dimension has one owner. Raises ValueError for d < K.
    """
    if d < K:
        raise ValueError(f"an FNO classifier of {K} classes needs {K} feature dimensions, not {d}")
    size = torch.full((K,), d // K)
    size[torch.randperm(K, generator=generator)[: d % K]] += 1  # |J_k|
    owner = torch.empty(d, dtype=torch.long)  # which class a dimension belongs to
    owner[torch.randperm(d, generator=generator)] = torch.arange(K).repeat_interleave(size)
    Q = F.one_hot(owner, K).T.double()  # (K, d)
    return Q / size.double().sqrt()[:, None]  # q_k = 1 on J_k, over sqrt|J_k|


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


class Classifier(nn.Module):
    """z = W h + b, learnable; or z = w Q h, Q a fixed FNO or ETF classifier and w one learnable scalar.

    Always in float32.
    """

    def __init__(self, K: int, d: int, kind: str, bias: bool = False):
        super().__init__()
        self.w = 1.0
        self.register_parameter("b", None)
        if kind == "learnable":
            self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # nn.Linear's start
            if bias:
                self.b = nn.Parameter(torch.empty(K).uniform_(-1, 1) / math.sqrt(d))
            return
        Q = fno_classifier(K, d) if kind == "fno" else simplex_etf(K, d)
        self.register_buffer("W", Q.float())
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, h: Tensor) -> Tensor:
        z = self.w * (h.float() @ self.W.T)  # (B, d) @ (d, K) -> (B, K)
        return z if self.b is None else z + self.b


def kept_logits(y: Tensor, task: Tensor, mask: bool, seen: Tensor | None = None) -> Tensor:
    """Which logits of the new images stay in their softmax, (B, K) bool. y (B,) labels, task (K,).

    mask: softmax masking keeps the classes of the label's own task; past and future tasks are out.
    seen (K,) bool, classes met so far, this batch included: ER-ACE's own mask (Caccia et al. 2022) keeps the
    classes of the batch and those not seen.
    """
    keep = torch.ones(len(y), len(task), dtype=torch.bool, device=y.device)
    if mask:
        keep &= task[y][:, None] == task
    if seen is not None:
        present = torch.zeros_like(seen).index_fill_(0, y, True)
        keep &= present | ~seen
    return keep


class Reservoir:
    """Buffer of M rows of a stream, any M of the n seen so far equally likely (Vitter 1985, algorithm R).

    A row is an image's index in the training set, so that each replay crops and flips it anew, and its
    logits. An image counts in every epoch of its task, as published: all tasks keep the same share.
    """

    def __init__(self, M: int, K: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        self.generator = generator
        self.seen = 0
        self.index = torch.zeros(M, dtype=torch.long)
        self.z = torch.zeros(M, K, device=device)

    def __len__(self) -> int:
        return min(self.seen, len(self.index))

    def add(self, index: Tensor, z: Tensor) -> None:
        """Offer B rows of the stream: index (B,) and logits z (B, K)."""
        M = len(self.index)
        # row n of the stream (from 0) goes to place n; once full, to a place drawn from 0..n, if that is < M
        n = self.seen + torch.arange(len(index))
        drawn = (torch.rand(len(n), generator=self.generator, dtype=torch.float64) * (n + 1)).long()
        place = torch.where(n < M, n, drawn).tolist()
        self.seen += len(n)
        last = {p: row for row, p in enumerate(place) if p < M}  # of two rows at one place the later stays
        to = torch.tensor(list(last.keys()), dtype=torch.long)
        row = torch.tensor(list(last.values()), dtype=torch.long)
        self.index[to] = index[row]
        self.z[to.to(z.device)] = z[row.to(z.device)]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """min(n, filled) different rows at random: index and logits."""
        pick = torch.randperm(len(self), generator=self.generator)[:n]
        return self.index[pick], self.z[pick.to(self.z.device)]

    def state_dict(self) -> dict:
        return {"seen": self.seen, "index": self.index, "z": self.z}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]
        self.index = state["index"]
        self.z = state["z"].to(self.z.device)


# The losses. logits: images (B, C, H, W) -> z (B, K), the network and its classifier: which images go through
# it together is part of a learner, for BatchNorm. x, y are the new images and their labels, keep (B, K) comes
# from kept_logits; a replayed draw is (images, labels, the logits that they had when they were stored).
# Each returns the loss and the new images' unmasked logits (B, K), which the buffer keeps.


def masked_ce(z: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """Mean of -log softmax(z)_y over the logits that are kept: z (B, K), y (B,), keep (B, K) bool."""
    return F.cross_entropy(z.masked_fill(~keep, -torch.inf), y)


def new_images_loss(logits, x: Tensor, y: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing to replay: L = CE(new)."""
    z = logits(x)
    return masked_ce(z, y, keep), z


def er_loss(logits, x: Tensor, y: Tensor, keep: Tensor, draw: tuple) -> tuple[Tensor, Tensor]:
    """Experience replay: L = CE(new and replayed images together), one mean, one forward pass."""
    x_buf, y_buf, _ = draw
    z = logits(torch.cat([x, x_buf]))  # (B + R, K)
    full = keep.new_ones(len(y_buf), keep.shape[1])  # replayed images are never masked
    return masked_ce(z, torch.cat([y, y_buf]), torch.cat([keep, full])), z[: len(y)]


def er_sum_loss(logits, x: Tensor, y: Tensor, keep: Tensor, draw: tuple) -> tuple[Tensor, Tensor]:
    """L = CE(new) + CE(replayed), two means, two forward passes."""
    x_buf, y_buf, _ = draw
    z = logits(x)
    return masked_ce(z, y, keep) + F.cross_entropy(logits(x_buf), y_buf), z


def der_loss(
    logits, x: Tensor, y: Tensor, keep: Tensor, draw_1: tuple, draw_2: tuple, alpha: float, beta: float
):
    """DER++ (Buzzega et al. 2020): L = CE(new) + alpha MSE(z, z stored) + beta CE, of two replayed draws."""
    x_1, _, z_1 = draw_1
    x_2, y_2, _ = draw_2
    z = logits(x)
    distilled = F.mse_loss(logits(x_1), z_1)
    return masked_ce(z, y, keep) + alpha * distilled + beta * F.cross_entropy(logits(x_2), y_2), z


def energy_map(h: Tensor, y: Tensor, owner: Tensor, K: int) -> Tensor:
    """Where features live: (K, K), entry [k, k'] = share of ||h||^2 in the dimensions of class k', mean over
    the features of class k. Identity where the dimensions are separated. h (N, d), y (N,), owner (d,).
    """
    h2 = h.double().square()
    blocks = h2.new_zeros(len(h), K).index_add_(1, owner, h2)  # (N, K)
    share = blocks / h2.sum(1, keepdim=True).clamp_min(1e-300)  # a zero feature has no share in anything
    total = h2.new_zeros(K, K).index_add_(0, y, share)
    return total / torch.bincount(y, minlength=K)[:, None]  # a class without features: nan


# %%
# Imports of the other cells
import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from common import (
    Arguments,
    Batches,
    Claims,
    Dataset,
    Run,
    UserError,
    accuracy_per_class,
    at_least,
    class_means,
    class_sums,
    command_line,
    curves,
    equiangularity,
    equinorm,
    finished_runs,
    heat_maps,
    keep_per_class,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    nc1,
    open_run,
    prepare_data,
    save_figure,
    self_duality,
    split_name,
    split_tasks,
    stream_metrics,
    styles,
    table,
    task_accuracies,
    zero_mean_metrics,
)

# %% [markdown]
# # 2. Theory check
# The orthogonal layer-peeled model: the network below the last layer is taken to be so flexible that every
# sample has a free feature.

# %%


def peeled_features(Q: Tensor, y: Tensor, E_H: float, non_negative: bool, steps: int = 4000) -> Tensor:
    """argmin over H of mean CE(H Q^T, y), ||h_n||^2 <= E_H [and h_n >= 0]: (N, d), by projected gradient.

    Convex: whatever it converges to is the optimum. Q (K, d) float64, y (N,).
    """
    # equal samples have equal optimal features: one free feature per class, weighted by its share
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


def toy_stream(kind: str, mask: bool, steps: int = 200) -> list[float]:
    """Class-IL accuracy on the first of two tasks, at each step of first the one and then the other.

    Two classes per task, one layer h = relu(V x), no buffer, full-batch gradient descent, float64.
    """
    K = 4
    d = 40
    D = 20
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(K).repeat_interleave(50)
    x = 2 * torch.eye(K, D, dtype=torch.float64)[y] + 1  # + 1: a direction that all share; tasks interfere
    x += 0.3 * torch.randn(len(y), D, generator=generator, dtype=torch.float64)
    task = split_tasks(K, 2)
    V = (torch.randn(d, D, generator=generator, dtype=torch.float64) / D**0.5).requires_grad_()
    W = torch.randn(K, d, generator=generator, dtype=torch.float64) / d**0.5
    W = fno_classifier(K, d, generator) if kind == "fno" else W.requires_grad_()
    optimizer = torch.optim.SGD([p for p in (V, W) if p.requires_grad], 0.2)
    curve = []
    for t in range(2):
        now = task[y] == t
        keep = kept_logits(y[now], task, mask)
        for _ in range(steps):
            z = torch.relu(x @ V.T) @ W.T
            curve.append(task_accuracies(z.detach(), y, task)[0][0].item())
            optimizer.zero_grad()
            masked_ce(z[now], y[now], keep).backward()
            optimizer.step()
    return curve


def check_theory(folder: Path) -> dict:
    """Print nine claims, each against direct optimisation; draw synthetic.png."""
    K = 10
    d = 64
    E_H = 25
    generator = torch.Generator().manual_seed(0)
    claims = Claims()
    Q = fno_classifier(K, d, generator)  # E_W = 1

    # The optimum of the orthogonal layer-peeled model: the largest class has 20 times the smallest's images
    y = torch.arange(K).repeat_interleave(torch.linspace(20, 1, K).round().long())
    H = peeled_features(Q, y, E_H, True)
    least = math.log1p((K - 1) * math.exp(-math.sqrt(E_H)))
    loss = F.cross_entropy(H @ Q.T, y).item()
    claims.equal("The least cross-entropy, log(1+(K-1)exp(-sqrt(E_H E_W)))", least, loss, 1e-12)
    error = (H - E_H**0.5 * Q[y]).abs().max().item()
    claims.equal("   is where h = sqrt(E_H/E_W) q_k, under imbalance too: error", 0, error, 1e-9)

    # What the class means look like: about the origin, and about their own mean
    M = class_means(H, y, K)
    centred = M - M.mean(0)
    largest = zero_mean_metrics(M, Q)["znc_max_cosine"]
    claims.equal("ZNC: class means are orthogonal about the origin, cosine", 0, largest, 1e-7)
    cosine = mean_pairwise_cosine(centred, torch.arange(K))
    claims.equal("NC: about their mean they are a simplex, cosine -1/(K-1)", -1 / (K - 1), cosine, 1e-7)
    floor = 2 * (1 - math.sqrt(1 - 1 / K))
    claims.equal("   not aligned with Q: NC3 = 2(1 - sqrt(1 - 1/K))", floor, self_duality(Q, centred), 1e-7)
    H = peeled_features(Q, torch.arange(K), E_H, False)
    cosine = (F.normalize(H) * Q).sum(1).min().item()
    claims.equal("Without h >= 0 features leave q_k: cos = sqrt(1 - 1/K)", math.sqrt(1 - 1 / K), cosine, 1e-7)

    # Masked softmax and FNO: the gradient of a feature stays in its task's dimensions
    task = split_tasks(K, 5)
    y = torch.randint(K, (200,), generator=generator)
    h = torch.rand(len(y), d, generator=generator, dtype=torch.float64).requires_grad_()
    masked_ce(h @ Q.T, y, kept_logits(y, task, True)).backward()
    others = task[Q.argmax(0)] != task[y][:, None]  # (200, d): dimensions of other tasks' classes
    largest = h.grad[others].abs().max().item()
    claims.equal("FNO + mask: |dL/dh| in the dimensions of other tasks", 0, largest, 0)

    # Two tasks, no buffer: which classifier forgets the first one?
    toys = {}
    for kind, mask in itertools.product(KINDS[:2], (False, True)):
        curve = toy_stream(kind, mask)
        toys[arm(kind, mask)] = range(len(curve)), [100 * accuracy for accuracy in curve]
    end = {name: accuracies[-1] for name, (_, accuracies) in toys.items()}
    claims.at_most("Two tasks, learnable: % right of the first after the second", 20, end["learnable"])
    claims.at_least("   the same for FNO + mask", 99, end["fno-mask"])
    axes = {"xlabel": "steps; the second task begins halfway", "ylabel": "accuracy on the first task (%)"}
    curves(folder / "synthetic.png", toys, STYLE, **axes)
    return claims.report(folder / "synthetic.png")


KINDS = ["learnable", "fno", "etf"]
STYLE = styles([*KINDS, *(f"{kind}-mask" for kind in KINDS)])

# %% [markdown]
# # 3. Network
# All of them have features h >= 0, behind a ReLU.

# %%


class MLP(nn.Module):
    """Two hidden layers of 100 ReLU units, the network of split MNIST: (B, C, H, W) -> (B, 100)."""

    def __init__(self, pixels: int):
        super().__init__()
        self.d = 100
        self.layers = nn.Sequential(nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


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


def build_model(args: argparse.Namespace, job: "Job", data: Dataset) -> nn.ModuleDict:
    """Network first, then classifier: with one seed, every classifier starts on the same network.

    Raises UserError for a classifier that needs more feature dimensions.
    """
    K = len(data.classes)
    _, height, width, channels = data.train_x.shape
    if args.net == "mlp":
        network = MLP(height * width * channels)
    else:
        network = {"cnn": SmallCNN, "resnet18": resnet18}[args.net](channels)
    try:
        classifier = Classifier(K, network.d, job.classifier, args.bias)
    except ValueError as error:
        raise UserError(f"--classifier {job.classifier}: {error}; try another --net") from None
    model = nn.ModuleDict({"network": network, "classifier": classifier})
    if args.net == "mlp":  # the released start of split MNIST: Glorot's weights, no bias
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
            if p.ndim == 1:
                nn.init.zeros_(p)
    return model


# %% [markdown]
# # 4. Training

# %%


class Method(NamedTuple):
    loss: str  # a key of LOSSES, for steps with a replay; before the first one all are `new`
    draws: int  # draws from the buffer per step; 0: no buffer
    asymmetric: bool  # has ER-ACE's mask, and neither mask nor replay in the first task, as published
    about: str


METHODS = {
    "sgd": Method("new", 0, False, "one task after another, no buffer: the lower bound"),
    "er": Method("er", 1, False, "Experience Replay: cross-entropy of new and stored images"),
    "er-ace": Method("er", 1, True, "ER with Asymmetric Cross-Entropy: new images do not push old classes"),
    "der++": Method("der++", 2, False, "Dark Experience Replay: stored logits are kept, and stored labels"),
    "joint": Method("new", 0, False, "all tasks at once: the upper bound"),
}
LOSSES = {"new": new_images_loss, "er": er_loss, "er-sum": er_sum_loss, "der++": der_loss}
# Published for split MNIST, CIFAR-10 and CIFAR-100 (Buzzega et al. 2020); digits are ours. Epochs per task.
# All by SGD without momentum, so that nothing of a past task is left in the optimiser.
RECIPES = {
    "": {"tasks": 5, "epochs": 50, "batch_size": 32, "net": "resnet18", "augment": True, "buffer": [200]},
    "digits": {"epochs": 12, "batch_size": 10, "net": "mlp", "augment": False, "buffer": [50]},
    "mnist": {"epochs": 1, "batch_size": 10, "net": "mlp", "augment": False},
    "fashionmnist": {"epochs": 1, "batch_size": 10, "net": "mlp", "augment": False},
    "cifar100": {"tasks": 10},
}
RECIPES[""] |= {"weight_decay": 0.0, "bias": True}


class Job(NamedTuple):
    """What one run is about, beside its seed; buffer is 0 where there is none."""

    method: str
    classifier: str
    mask: bool
    buffer: int
    lr: float
    der_alpha: float | None  # weights of DER++; None for other learners
    der_beta: float | None
    replay_batch: int  # images per replayed draw

    @property
    def name(self) -> str:
        return f"{self.method}{self.buffer or ''}-{arm(self.classifier, self.mask)}"


def arm(classifier: str, mask: bool) -> str:
    """`fno-mask`: what tables and figures call a classifier with or without softmax masking."""
    return f"{classifier}-mask" if mask else classifier


# Released for ER and DER++, whatever the classifier (utils/best_args.py of mammoth and of FNO-classifier):
# (largest buffer, lr, alpha, beta, images per replayed draw: None for as many as new ones)
ANY = math.inf
RELEASED = {
    ("cifar10", "der++"): [
        (200, 0.03, 0.1, 0.5, None),
        (500, 0.03, 0.2, 0.5, None),
        (ANY, 0.03, 0.1, 1.0, None),
    ],
    ("cifar100", "sgd"): [(ANY, 0.03, None, None, None)],
    ("cifar100", "er-ace"): [(ANY, 0.03, None, None, None)],
    ("cifar100", "der++"): [(ANY, 0.03, 0.1, 0.5, None)],
    ("mnist", "sgd"): [(ANY, 0.03, None, None, None)],
    ("mnist", "er"): [(200, 0.01, None, None, None), (ANY, 0.1, None, None, None)],
    ("mnist", "der++"): [(200, 0.03, 0.2, 1.0, 128), (500, 0.03, 1.0, 0.5, None), (ANY, 0.1, 0.2, 0.5, 64)],
}


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """Every learner with every classifier, mask and buffer that is wanted, in its released setting.

    Where neither --mask nor --no-mask is given, both are run: what the mask does is seen beside its absence.
    """
    data = split_name(args.dataset)[0].removeprefix("fashion")  # Fashion-MNIST as MNIST
    jobs = []
    for method, classifier in itertools.product(args.method, args.classifier):
        usual = RELEASED.get(("cifar10", method), [(ANY, 0.1, None, None, None)])
        settings = RELEASED.get((data, method), usual)
        masks = [False, True] if args.mask is None else [args.mask]
        if method == "joint":
            masks = [False]
        buffers = args.buffer if METHODS[method].draws else [0]
        for mask, buffer in itertools.product(masks, buffers):
            _, lr, alpha, beta, replay_batch = next(setting for setting in settings if buffer <= setting[0])
            replay_batch = replay_batch or args.batch_size
            jobs.append(Job(method, classifier, mask, buffer, args.lr or lr, alpha, beta, replay_batch))
    return jobs


def learning_rate(epoch: int, args: argparse.Namespace, job: Job) -> float:
    """In epoch 0, 1, ... of a task: the same all along; on CIFAR-100 a tenth of it after 0.7 of the task's
    epochs and again after 0.9 (35 and 45 of 50)."""
    drops = (0.7, 0.9) if split_name(args.dataset)[0] == "cifar100" else ()
    return job.lr * 0.1 ** sum(epoch >= round(drop * args.epochs) for drop in drops)


def train(args: argparse.Namespace, job: Job, seed: int, data: Dataset, run: Run) -> dict:
    """Train one job with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[job.method]
    torch.manual_seed(seed)  # initial weights, and which dimensions a class owns
    generator = torch.Generator().manual_seed(seed)  # order, crops, flips and the buffer
    model = build_model(args, job, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.SGD(model.parameters(), job.lr, weight_decay=args.weight_decay, fused=run.fused)
    views = {"pad": data.pad, "flip": data.flip} if args.augment else {}
    images = Batches(data.train_x, data.mean, data.std, **views, device=run.device)
    labels = data.train_y.to(run.device)
    task = split_tasks(len(data.classes), args.tasks).to(run.device)  # (K,)
    memory = Reservoir(job.buffer, len(task), generator, run.device)
    seen = torch.zeros_like(task, dtype=torch.bool)
    replay_loss = LOSSES["er-sum" if method.loss == "er" and args.replay == "sum" else method.loss]
    weights = {"alpha": job.der_alpha, "beta": job.der_beta} if method.loss == "der++" else {}
    stages = stages_of(args, job, data)

    def logits(x: Tensor) -> Tensor:
        with run.autocast():  # bf16 inside the network only
            h = network(x)  # (B, d)
        return classifier(h)  # (B, K)

    def replay() -> tuple[Tensor, Tensor, Tensor]:
        index, z = memory.draw(job.replay_batch)
        return images.load(index, generator), labels[index.to(run.device)], z

    parts = {"model": model, "optimizer": optimizer, "generator": generator, "memory": memory, "seen": seen}
    for epoch in run.epochs(len(stages) * args.epochs, **parts):
        t = epoch // args.epochs  # the stage of the stream: its task
        lr = learning_rate(epoch % args.epochs, args, job)
        optimizer.param_groups[0]["lr"] = lr
        # The stream: images of the present task alone, in random order
        order = stages[t][torch.randperm(len(stages[t]), generator=generator)]
        model.train()
        for part, x in images.epoch(order, args.batch_size, generator):  # (B, C, H, W)
            y = labels[order[part].to(run.device)]  # (B,)
            # The mask: which classes a new image competes with
            seen[y] = True
            ace = seen if method.asymmetric and t > 0 else None
            keep = kept_logits(y, task, job.mask, ace)  # (B, K)
            # The replay
            waits = len(memory) == 0 or (method.asymmetric and t == 0)
            draws = [] if waits else [replay() for _ in range(method.draws)]
            # The loss
            if draws:
                loss, z = replay_loss(logits, x, y, keep, *draws, **weights)
            else:
                loss, z = new_images_loss(logits, x, y, keep)
            # The step
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if job.buffer:
                memory.add(order[part], z.detach())
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(task=t, lr=lr)
        if run.is_test_epoch(epoch) or (epoch + 1) % args.epochs == 0:
            run.log(**test(model, job, data, stages[t], run))
    return measure(model, job, data, run)


def stages_of(args: argparse.Namespace, job: Job, data: Dataset) -> list[Tensor]:
    """Indices of the training images of each stage: one stage per task, or a single one with all of them."""
    if job.method == "joint":
        return [torch.arange(len(data.train_y))]
    which = split_tasks(len(data.classes), args.tasks)[data.train_y]  # (N,): the task of each image
    return [(which == t).nonzero().flatten() for t in range(args.tasks)]


# %% [markdown]
# # 5. Results

# %%


@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: Dataset, run: Run) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image in order, neither cropped nor flipped."""
    model.eval()
    hs = []
    zs = []
    loader = Batches(images, data.mean, data.std, device=run.device)
    for _, x in loader.all(250):
        with run.autocast():
            h = model["network"](x)
        hs.append(h.float())
        zs.append(model["classifier"](h))
    where = metric_device(run.device)
    return torch.cat(hs).to(where), torch.cat(zs).to(where)


def test(model: nn.ModuleDict, job: Job, data: Dataset, stage: Tensor, run: Run) -> dict:
    """A row of each accuracy matrix, and how well the stage's own training images are fitted."""
    task = split_tasks(len(data.classes), run.args.tasks)
    _, z = embed(model, data.test_x, data, run)
    class_il, task_il = task_accuracies(z, data.test_y.to(z.device), task)
    _, z = embed(model, data.train_x[stage], data, run)
    trained = task_accuracies(z, data.train_y[stage].to(z.device), task)
    fit = trained[1 if job.mask else 0].nanmean()  # masked: only the task's own classes competed
    return {"class_il": class_il.tolist(), "task_il": task_il.tolist(), "fit": float(fit)}


def collapse(h: Tensor, y: Tensor, W: Tensor) -> dict[str, float]:
    """Neural collapse of features h (N, d) about the means' mean (nc) and about the origin (znc).

    0 is full collapse, but for nc3 of an FNO classifier: see --synthetic.
    """
    sums = class_sums(h, y, len(W))
    return {
        "nc1": nc1(h, y, sums)[0],
        "nc2_equinorm": equinorm(sums.centred),
        "nc2_equiangular": equiangularity(sums.centred),
        "nc3": self_duality(W, sums.centred),
        "znc1": nc1(h, y, sums, centred=False)[0],  # Sigma_B about the origin, 1/K sum mu_k mu_k^T
        **zero_mean_metrics(sums.mean, W),
    }


@torch.no_grad()
def measure(model: nn.ModuleDict, job: Job, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz: z = h W^T + b."""
    train_h, train_z = embed(model, data.train_x, data, run)
    test_h, test_z = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(test_h.device)
    test_y = data.test_y.to(test_h.device)
    W = model["classifier"].W.detach().to(test_h.device)
    scale = float(model["classifier"].w)
    energy = energy_map(test_h, test_y, W.argmax(0), len(W))
    features = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y}
    if model["classifier"].b is not None:
        features["b"] = model["classifier"].b
    run.save_features(**features, W=scale * W, energy=energy)

    task = split_tasks(len(W), run.args.tasks)
    ends = run.history[run.args.epochs - 1 :: run.args.epochs]  # the last epoch of each task
    R = torch.tensor([line["class_il"] for line in ends], dtype=torch.float64)  # (tasks, tasks)
    R_own = torch.tensor([line["task_il"] for line in ends], dtype=torch.float64)
    stream = stream_metrics(R)
    prediction = test_z.argmax(1)
    old = (task < run.args.tasks - 1).nonzero().flatten()
    return {
        **job._asdict(),
        "class_il": stream["average"],
        "task_il": stream_metrics(R_own)["average"],
        "forgetting": stream["forgetting"],
        "backward_transfer": stream["backward_transfer"],
        "accuracy": float((prediction == test_y).double().mean()),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        "fit": float(np.mean([line["fit"] for line in ends])),
        "own_energy": float(energy.diagonal().nanmean()),
        "old_cosine_W": mean_pairwise_cosine(W, old.to(W.device)),
        **collapse(train_h, train_y, W),
        "matrix_class_il": R.tolist(),
        "matrix_task_il": R_own.tolist(),
        "per_class": accuracy_per_class(prediction, test_y, len(W)).tolist(),
    }


def by_job(runs: list[Run]) -> dict[str, list[Run]]:
    """The seeds of each job together, {"er50-fno-mask": [...]}, in the order of METHODS."""

    def place(run: Run) -> tuple:
        job = run.finished
        return list(METHODS).index(job["method"]), job["buffer"], KINDS.index(job["classifier"]), job["mask"]

    found = {}
    for run in sorted(runs, key=place):
        found.setdefault(run.folder.parent.name, []).append(run)
    return found


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Three figures of finished runs, jobs side by side: means over seeds, feature maps of the first seed."""
    bars = {}  # {"fno-mask": {"er 50": class-IL of every seed}}
    matrices = {}
    energy = {}
    for name, seeds in by_job(runs).items():
        results = [run.finished for run in seeds]
        job = results[0]
        learner = f"{job['method']} {job['buffer'] or ''}"
        accuracies = [100 * result["class_il"] for result in results]
        bars.setdefault(arm(job["classifier"], job["mask"]), {})[learner] = accuracies
        matrices[name] = 100 * np.mean([result["matrix_class_il"] for result in results], axis=0)
        energy[name] = 100 * seeds[0].load_features()["energy"]

    draw_bars(folder / "class_il.png", bars)

    streams = {name: R for name, R in matrices.items() if len(R) > 1}  # joint has one row, and no past
    if streams:
        T = runs[0].config["flags"]["tasks"]
        axes = {"xticks": range(T), "xticklabels": range(1, T + 1), "xlabel": "task"}
        axes |= {"yticks": range(T), "yticklabels": range(1, T + 1), "ylabel": "tasks learned"}
        path = folder / "forgetting.png"
        heat_maps(path, streams, label="class-IL accuracy (%)", limits=(0, 100), diverging=False, **axes)

    axes = {"xlabel": "dimensions of class", "ylabel": "features of class"}
    label = "share of the features' squared norm (%)"
    path = folder / "feature_energy.png"
    heat_maps(path, energy, label=label, limits=(0, 100), diverging=False, **axes)


def draw_bars(path: Path, bars: dict[str, dict[str, list[float]]]) -> None:
    """Class-IL of each learner, a bar for each classifier with and without mask; mean and std over seeds."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    plot = figure.subplots()
    learners = list(dict.fromkeys(learner for found in bars.values() for learner in found))
    width = 0.8 / len(bars)
    for i, (name, found) in enumerate(bars.items()):
        x = [learners.index(learner) + (i + 0.5) * width - 0.4 for learner in found]
        mean = [np.mean(values) for values in found.values()]
        std = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in found.values()]
        plot.bar(x, mean, width, yerr=std, color=STYLE[name]["color"], label=name)
    plot.set(xticks=range(len(learners)), xticklabels=learners, ylabel="class-IL accuracy (%)", ylim=(0, 100))
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(path, figure)


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per job, mean ± std over seeds, and what its columns and figures mean."""
    percent = {"class-IL": "class_il", "train": "train_accuracy", "fit": "fit", "task-IL": "task_il"}
    percent |= {"forgetting": "forgetting", "backward": "backward_transfer", "own energy": "own_energy"}
    plain = {"old cos W": "old_cosine_W", "ZNC cos": "znc_mean_cosine", "ZNC3": "znc_alignment", "NC3": "nc3"}
    rows = []
    for name, seeds in by_job(runs).items():
        results = [run.finished for run in seeds]
        cells = [mean_std([result[key] for result in results], 1, 100) for key in percent.values()]
        cells += [mean_std([result[key] for result in results]) for key in plain.values()]
        cells = ["-" if cell.startswith("nan") else cell for cell in cells]  # a joint run's forgetting
        rows.append([name, len(seeds), *cells])
    print("\n" + table(["method-classifier", "seeds", *percent, *plain], rows))
    short = [run.folder.parent.name for run in runs if run.finished["fit"] < 0.99]
    if short:
        print(f"not trained to convergence (fit below 99%): {', '.join(dict.fromkeys(short))}")
    print("""class-IL: % of the test images after the last task, all classes compete, mean over tasks
train: the same of the training images; task-IL: only the classes of the image's own task compete
fit: % of a task's training images right when it was learned, by what its softmax ran over
forgetting: how far the accuracy on a task falls from its best; backward: its change since it was learned
  (backward transfer); both are means over all tasks but the last
own energy: share (%) of a test feature's squared norm in the dimensions of its class
old cos W: mean cosine of the past tasks' class vectors; 1: they have collapsed
ZNC cos: mean |cosine| of the training features' class means about the origin; 0: zero-mean collapse
ZNC3, NC3: distance of these means from the class vectors, about the origin and about their own mean;
  result.json holds the other measures of both kinds of collapse""")
    for name in dict.fromkeys(run.finished["method"] for run in runs):
        print(f"{name}: {METHODS[name].about}")
    print(f"""learnable: trained class vectors; fno: Fixed Non-negative Orthogonal ones; etf: a fixed simplex
-mask: the softmax of new images runs over the classes of their own task
figures in {folder}:
  class_il.png        class-IL accuracy of each learner with each classifier, with and without mask
  forgetting.png      accuracy on each task along the stream: a column that grows dark downwards is forgetting
  feature_energy.png  where features live: a diagonal means that classes have dimensions of their own""")


# %% [markdown]
# # 6. Command line

# %%


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    about = {name: method.about for name, method in METHODS.items()}
    usual = ["sgd", "er", "joint"]
    title = __doc__.partition("\n")[0]
    flags = Arguments("fno_continual", title, about, usual, RECIPES, eval_every=None)
    add = flags.add
    both = argparse.BooleanOptionalAction
    add("--classifier", nargs="+", default=KINDS[:2], choices=KINDS, help="fno: d >= K, etf: d >= K - 1")
    add("--mask", action=both, help="softmax of new images over their own task; neither flag: both ways")
    add("--buffer", type=at_least(2), nargs="+", help="images kept, one or more sizes: 200, digits 50")
    add("--tasks", type=at_least(1), help="number of tasks: 5, cifar100 10")
    add("--replay", choices=["mean", "sum"], default="mean", help="ER, ER-ACE: one mean, or two summed")
    add("--bias", action=both, help="of the learnable classifier")
    nets = ["mlp", "cnn", "resnet18"]
    add("--net", choices=nets, help="features behind a ReLU; mlp: the one of split MNIST")
    add("--per-class", type=at_least(2), help="training images of each class, for a shorter run; else all")
    add("--augment", action=both, help="crop and flip, replayed images too; digits, (fashion)mnist: no")
    args = flags.parse(argv)
    if args.batch_size < 3:  # else a batch may be a single image, which has no variance for BatchNorm
        raise UserError(f"--batch-size {args.batch_size}: expected 3 or more")
    if args.dry_run:
        args.epochs = 2  # of one step each, so that the second one replays
    args.eval_every = args.eval_every or args.epochs  # a stream is tested at the end of each task at least
    args.classifier = list(dict.fromkeys(args.classifier))
    args.buffer = list(dict.fromkeys(args.buffer))
    return args


def select_images(args: argparse.Namespace, jobs: list[Job], data: Dataset) -> Dataset:
    """The training images of --per-class. Raises UserError for what is no stream."""
    if args.per_class:
        keep = keep_per_class(data.train_y, args.per_class)  # the same images for every seed
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    if args.net == "mlp":  # pixels in [0, 1], as released for split MNIST
        data = data._replace(mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std))
    task = split_tasks(len(data.classes), args.tasks)
    images = torch.bincount(task[data.train_y])
    if images.min() < 2:  # BatchNorm needs two
        t = int(images.argmin())
        raise UserError(
            f"--tasks {args.tasks}: task {t + 1} has {images[t]} training images, expected 2 or more"
        )
    classes = torch.bincount(task)
    if any(job.mask for job in jobs) and classes.min() < 2:
        t = int(classes.argmin())
        raise UserError(
            f"--mask: task {t + 1} has one class, and a softmax over one class has no gradient; "
            "choose fewer --tasks, or --no-mask"
        )
    return data


def main(argv: list[str] | None = None) -> dict:
    """Train every job with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "fno_continual" / "synthetic")
    jobs = list_jobs(args)
    data = select_images(args, jobs, prepare_data(args))
    for job in jobs:  # says what is wrong with a model before the first one is trained
        build_model(args, job, data)
    print(f"{len(jobs)} jobs, {args.epochs} epochs per task, {args.tasks} tasks")
    runs = []
    for job, seed in itertools.product(jobs, args.seed):
        run = open_run(args, job.name, seed, data, **job._asdict())
        if not run.finished:
            run.finish(train(args, job, seed, data, run))
        runs.append(run)
    print_results(runs, args.folder)
    draw_figures(args.folder, finished_runs(args, runs, aside=Job._fields))
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    command_line(main)
