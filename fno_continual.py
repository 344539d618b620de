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
- The released masked ER adds two means of two forward passes, CE_masked(new) + CE(replayed); its plain ER
  takes one mean of one pass. So its mask comes with twice the gradient and other BatchNorm statistics. Here
  ER and ER-ACE take one mean, with mask or without; --replay sum adds two, which is masked ER as released
  and ER-ACE as published. DER++ is a sum by definition.
- The released masked DER++ computes the logits that it stores anew after the step; ours are those of the
  step's own forward pass, as in plain DER++. Both are unmasked.
- ER-ACE with --mask (ours): a logit stays where both masks keep it. The released mask of ER-ACE keeps the
  highest class seen even where the batch lacks it; ours follows the paper.
- lr and DER++'s weights are the released ones of split MNIST, CIFAR-10 and CIFAR-100 for every classifier
  and mask; other data have those of CIFAR-10. The network of split MNIST is the released one: pixels in
  [0, 1], Glorot's start, a bias in the learnable classifier.
- All numbers are those after the last epoch of the last task; a best epoch would mean nothing here.
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


class Classifier(nn.Module):
    """z = W h + b, learnable; or z = w Q h, Q a fixed FNO classifier, w one learnable scalar. In float32.

    Raises ValueError for another kind than `learnable` or `fno`.
    """

    def __init__(self, K: int, d: int, kind: str, bias: bool = False):
        super().__init__()
        if kind not in ("learnable", "fno"):
            raise ValueError(f"classifier {kind}: expected learnable or fno")
        self.w = 1.0
        self.b = None
        if kind == "fno":
            self.register_buffer("W", fno_classifier(K, d).float())
            self.w = nn.Parameter(torch.ones(()))
        else:
            self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # nn.Linear's start
            if bias:
                self.b = nn.Parameter(torch.empty(K).uniform_(-1, 1) / math.sqrt(d))

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


class Reservoir(nn.Module):
    """Buffer of M rows of a stream, any M of the n seen so far equally likely (Vitter 1985, algorithm R).

    A row is an image's index in the training set, so that each replay crops and flips it anew, and its
    logits. An image counts in every epoch of its task, as published: all tasks keep the same share.
    """

    def __init__(self, M: int, K: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        super().__init__()
        self.generator = generator
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("index", torch.zeros(M, dtype=torch.long))
        self.register_buffer("z", torch.zeros(M, K, device=device))

    def __len__(self) -> int:
        return min(int(self.seen), len(self.index))

    def add(self, index: Tensor, z: Tensor) -> None:
        """Offer B rows of the stream: index (B,) and logits z (B, K)."""
        M = len(self.index)
        drawn = torch.rand(len(index), generator=self.generator, dtype=torch.float64).tolist()
        kept = {}  # {place in the buffer: row}; of two rows for one place the later one stays
        for row, n in enumerate(range(self.seen, self.seen + len(index))):  # n: row of the stream, from 0
            place = n if n < M else int(drawn[row] * (n + 1))  # once full: any of 0..n, kept if that is < M
            if place < M:
                kept[place] = row
        self.seen += len(index)
        places = list(kept)
        rows = list(kept.values())
        self.index[places] = index[rows]
        self.z[places] = z[rows]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """min(n, filled) different rows at random: index and logits."""
        pick = torch.randperm(len(self), generator=self.generator)[:n]
        return self.index[pick], self.z[pick.to(self.z.device)]


# The losses: (logits, x, y, keep, replay, alpha, beta) -> L, and logits of new images for the buffer.
# logits: images (B, C, H, W) -> z (B, K); which images go through the network together is part of a learner,
# for BatchNorm. x, y: new images and labels; keep (B, K): from kept_logits. replay() draws from the buffer:
# images, their labels, and the logits that they had when they were stored. *_: what a loss has no use for.


def masked_ce(z: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """Mean of -log softmax(z)_y over the logits that are kept: z (B, K), y (B,), keep (B, K) bool."""
    return F.cross_entropy(z.masked_fill(~keep, -torch.inf), y)


def new_images_loss(logits, x: Tensor, y: Tensor, keep: Tensor, *_) -> tuple[Tensor, Tensor]:
    """Nothing to replay: L = CE(new)."""
    z = logits(x)
    return masked_ce(z, y, keep), z


def er_loss(logits, x: Tensor, y: Tensor, keep: Tensor, replay, *_) -> tuple[Tensor, Tensor]:
    """Experience replay: L = CE(new and replayed images together), one mean, one forward pass."""
    x_buf, y_buf, _ = replay()
    z = logits(torch.cat([x, x_buf]))  # (B + R, K)
    full = keep.new_ones(len(y_buf), keep.shape[1])  # replayed images are never masked
    return masked_ce(z, torch.cat([y, y_buf]), torch.cat([keep, full])), z[: len(y)]


def er_sum_loss(logits, x: Tensor, y: Tensor, keep: Tensor, replay, *_) -> tuple[Tensor, Tensor]:
    """L = CE(new) + CE(replayed), two means, two forward passes."""
    x_buf, y_buf, _ = replay()
    z = logits(x)
    return masked_ce(z, y, keep) + F.cross_entropy(logits(x_buf), y_buf), z


def der_loss(logits, x: Tensor, y: Tensor, keep: Tensor, replay, alpha: float, beta: float):
    """DER++ (Buzzega et al. 2020): L = CE(new) + alpha MSE(z, z stored) + beta CE, of two replayed draws."""
    x_1, _, z_1 = replay()
    x_2, y_2, _ = replay()
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

from common import (
    Arguments,
    Batches,
    Claims,
    Dataset,
    Run,
    UserError,
    accuracy_per_class,
    at_least,
    bars,
    class_sums,
    collapse_metrics,
    command_line,
    curves,
    finished_runs,
    heat_maps,
    keep_per_class,
    mean_pairwise_cosine,
    mean_std,
    metric_device,
    nc1,
    open_run,
    prepare_data,
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
    """Class-IL accuracy (%) on the first of two tasks, at each step of first the one and then the other.

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
            right = (z.argmax(1) == y)[task[y] == 0]
            curve.append(100 * right.double().mean().item())
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
    M = class_sums(H, y, K)
    largest = zero_mean_metrics(M.mean)["znc_max_cosine"]
    claims.equal("ZNC: class means are orthogonal about the origin, cosine", 0, largest, 1e-7)
    cosine = mean_pairwise_cosine(M.centred, torch.arange(K))
    claims.equal("NC: about their mean they are a simplex, cosine -1/(K-1)", -1 / (K - 1), cosine, 1e-7)
    floor = 2 * (1 - math.sqrt(1 - 1 / K))
    claims.equal("   not aligned with Q: NC3 = 2(1 - sqrt(1 - 1/K))", floor, self_duality(Q, M.centred), 1e-7)
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
    for name in STYLE:
        kind, _, mask = name.partition(" + ")
        curve = toy_stream(kind, bool(mask))
        toys[name] = range(len(curve)), curve
    end = {name: curve[-1] for name, (_, curve) in toys.items()}
    claims.at_most("Two tasks, learnable: % right of the first after the second", 20, end["learnable"])
    claims.at_least("   the same for FNO + mask", 99, end["fno + mask"])
    axes = {"xlabel": "steps; the second task begins halfway", "ylabel": "accuracy on the first task (%)"}
    curves(folder / "synthetic.png", toys, STYLE, **axes)
    return claims.report(folder / "synthetic.png")


KINDS = ["learnable", "fno"]
STYLE = styles([*KINDS, *(f"{kind} + mask" for kind in KINDS)])

# %% [markdown]
# # 3. Network
# All of them have features h >= 0, behind a ReLU.


# %%
def mlp(pixels: int) -> nn.Module:
    """Two hidden layers of 100 ReLU units, the network of split MNIST: (B, C, H, W) -> (B, 100)."""
    layers = [nn.Flatten(), nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    network = nn.Sequential(*layers)
    network.d = 100
    return network


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
        network = mlp(height * width * channels)
    else:
        network = {"cnn": SmallCNN, "resnet18": resnet18}[args.net](channels)
    if job.classifier == "fno" and network.d < K:
        found = f"{K} classes need {K} feature dimensions, not {network.d}"
        raise UserError(f"--classifier fno: {found}; try another --net")
    classifier = Classifier(K, network.d, job.classifier, args.bias)
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
# A method is a loss and, for ER-ACE, a mask of its own. A job is a method with a classifier and a buffer.


# %%
class Method(NamedTuple):
    loss: str  # a key of LOSSES: `new` has no buffer, `er` is the one that --replay names
    asymmetric: bool  # has ER-ACE's mask, and neither mask nor replay in the first task, as published
    about: str


METHODS = {
    "sgd": Method("new", False, "one task after another, no buffer: the lower bound"),
    "er": Method("er", False, "Experience Replay: cross-entropy of new and stored images"),
    "er-ace": Method("er", True, "ER with Asymmetric Cross-Entropy: new images do not push old classes"),
    "der++": Method("der++", False, "Dark Experience Replay: stored logits are kept, and stored labels"),
    "joint": Method("new", False, "all tasks at once: the upper bound"),
}
LOSSES = {"new": new_images_loss, "er-mean": er_loss, "er-sum": er_sum_loss, "der++": der_loss}
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
# Released, whatever the classifier (utils/best_args.py of mammoth and FNO-classifier): data set, learner ("":
# any), largest buffer; lr, alpha and beta of DER++, images per replayed draw (None: as many as new ones). The
# first row that fits counts.
ANY = math.inf
RELEASED = [
    ("mnist", "sgd", ANY, 0.03, None, None, None),
    ("mnist", "er", 200, 0.01, None, None, None),
    ("mnist", "der++", 200, 0.03, 0.2, 1.0, 128),
    ("mnist", "der++", 500, 0.03, 1.0, 0.5, None),
    ("mnist", "der++", ANY, 0.1, 0.2, 0.5, 64),
    ("cifar100", "sgd", ANY, 0.03, None, None, None),
    ("cifar100", "er-ace", ANY, 0.03, None, None, None),
    ("cifar100", "der++", ANY, 0.03, 0.1, 0.5, None),
    ("", "der++", 200, 0.03, 0.1, 0.5, None),
    ("", "der++", 500, 0.03, 0.2, 0.5, None),
    ("", "der++", ANY, 0.03, 0.1, 1.0, None),
    ("", "", ANY, 0.1, None, None, None),
]


class Job(NamedTuple):
    """What one run is about, beside its seed."""

    method: str
    classifier: str
    mask: bool
    buffer: int  # 0: none
    lr: float
    der_alpha: float | None  # weights of DER++; None for other learners
    der_beta: float | None
    replay_batch: int  # images per replayed draw

    @property
    def name(self) -> str:
        return f"{self.method}{self.buffer or ''}-{self.classifier}{'-mask' if self.mask else ''}"


def list_jobs(args: argparse.Namespace) -> list[Job]:
    """Every learner with every classifier, mask and buffer that is wanted, in its released setting.

    Where neither --mask nor --no-mask is given, both are run: what the mask does is seen beside its absence.
    """
    data = split_name(args.dataset)[0].removeprefix("fashion")  # Fashion-MNIST as MNIST
    masks = [False, True] if args.mask is None else [args.mask]
    jobs = []
    for method, kind, mask, buffer in itertools.product(args.method, args.classifier, masks, args.buffer):
        if method == "joint":  # no task to mask
            mask = False
        if METHODS[method].loss == "new":
            buffer = 0
        for of, learner, most, *setting in RELEASED:
            if of in ("", data) and learner in ("", method) and buffer <= most:
                lr, alpha, beta, replayed = setting
                break
        jobs.append(Job(method, kind, mask, buffer, args.lr or lr, alpha, beta, replayed or args.batch_size))
    return list(dict.fromkeys(jobs))  # each once


def learning_rate(epoch: int, args: argparse.Namespace, job: Job) -> float:
    """The same all along; on CIFAR-100 a tenth of it after 35 of a task's 50 epochs, and again after 45."""
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
    images = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device)
    task = split_tasks(len(data.classes), args.tasks)  # (K,): the task of each class
    stage = task[data.train_y]  # (N,): when each image comes
    if job.method == "joint":
        stage = torch.zeros_like(stage)  # all at once
    stages = int(stage.max()) + 1
    task = task.to(run.device)
    memory = Reservoir(job.buffer, len(task), generator, run.device)
    seen = torch.zeros_like(task, dtype=torch.bool)  # (K,): the classes met so far
    replay_loss = f"er-{args.replay}" if method.loss == "er" else method.loss

    def logits(x: Tensor) -> Tensor:
        with run.autocast():  # bf16 inside the network only
            h = network(x)  # (B, d)
        return classifier(h)  # (B, K)

    def replay() -> tuple[Tensor, Tensor, Tensor]:
        index, z = memory.draw(job.replay_batch)
        return images.load(index, generator), data.train_y[index].to(run.device), z

    parts = {"model": model, "optimizer": optimizer, "generator": generator, "memory": memory, "seen": seen}
    for epoch in run.epochs(stages * args.epochs, **parts):  # from the last checkpoint on
        t = epoch // args.epochs
        lr = learning_rate(epoch % args.epochs, args, job)
        optimizer.param_groups[0]["lr"] = lr
        # The stream: images of the present task alone, in random order
        present = (stage == t).nonzero().flatten()
        order = present[torch.randperm(len(present), generator=generator)]
        labels = data.train_y[order].to(run.device)
        # ER-ACE, as published: neither its mask nor a replay in the first task
        ace = method.asymmetric and t > 0
        replays = t > 0 or not method.asymmetric
        model.train()
        for part, x in images.epoch(order, args.batch_size, generator):  # (B, C, H, W)
            y = labels[part]  # (B,)
            seen[y] = True
            keep = kept_logits(y, task, job.mask, seen if ace else None)  # (B, K): classes y competes with
            loss_of = LOSSES[replay_loss if replays and len(memory) else "new"]
            loss, z = loss_of(logits, x, y, keep, replay, job.der_alpha, job.der_beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if job.buffer:
                memory.add(order[part], z.detach())
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(task=t, lr=lr)
        if run.is_test_epoch(epoch) or (epoch + 1) % args.epochs == 0:
            run.log(**test(model, job, data, present, run))
    return measure(model, job, data, run)


# %% [markdown]
# # 5. Results


# %%
@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: Dataset, run: Run) -> tuple[Tensor, Tensor]:
    """Features h (N, d) and logits z (N, K) of every image in order, neither cropped nor flipped."""
    model.eval()
    where = metric_device(run.device)
    hs = []
    zs = []
    for _, x in Batches(images, data.mean, data.std, device=run.device).all(250):
        with run.autocast():
            h = model["network"](x)
        hs.append(h.float())
        zs.append(model["classifier"](h))
    return torch.cat(hs).to(where), torch.cat(zs).to(where)


def test(model: nn.ModuleDict, job: Job, data: Dataset, present: Tensor, run: Run) -> dict:
    """A row of each accuracy matrix, and how well the training images of the present task are fitted."""
    task = split_tasks(len(data.classes), run.args.tasks)
    _, z = embed(model, data.test_x, data, run)
    class_il, task_il = task_accuracies(z, data.test_y.to(z.device), task)
    _, z = embed(model, data.train_x[present], data, run)
    trained = task_accuracies(z, data.train_y[present].to(z.device), task)
    fit = trained[1 if job.mask else 0].nanmean()  # masked: only the task's own classes competed
    return {"class_il": class_il.tolist(), "task_il": task_il.tolist(), "fit": float(fit)}


@torch.no_grad()
def measure(model: nn.ModuleDict, job: Job, data: Dataset, run: Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz: z = h W^T + b."""
    train_h, train_z = embed(model, data.train_x, data, run)
    test_h, test_z = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(test_h.device)
    test_y = data.test_y.to(test_h.device)
    classifier = model["classifier"]
    W = classifier.W.detach().to(test_h.device)
    K = len(W)
    owner = W.argmax(0)  # a learnable classifier owns no dimensions: the class of the largest w_kj
    energy = energy_map(test_h, test_y, owner, K)
    features = {"train_h": train_h, "train_y": train_y, "test_h": test_h, "test_y": test_y}
    if classifier.b is not None:
        features["b"] = classifier.b
    run.save_features(**features, W=float(classifier.w) * W, energy=energy)

    sums = class_sums(train_h, train_y, K)
    old = (split_tasks(K, run.args.tasks) < run.args.tasks - 1).nonzero().flatten()  # classes of past tasks
    collapsed = collapse_metrics(train_h, train_y, W, train_z.argmax(1), old)
    ends = run.history[run.args.epochs - 1 :: run.args.epochs]  # the last epoch of each task
    R = torch.tensor([line["class_il"] for line in ends], dtype=torch.float64)  # (tasks, tasks)
    R_own = torch.tensor([line["task_il"] for line in ends], dtype=torch.float64)
    stream = stream_metrics(R)
    prediction = test_z.argmax(1)
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
        **{key.replace("minority", "old"): value for key, value in collapsed.items()},
        "znc1": nc1(train_h, train_y, sums, centred=False)[0],  # about the origin
        **zero_mean_metrics(sums.mean, W),
        "matrix_class_il": R.tolist(),
        "matrix_task_il": R_own.tolist(),
        "per_class": accuracy_per_class(prediction, test_y, K).tolist(),
    }


def by_job(runs: list[Run]) -> dict[str, list[Run]]:
    """The seeds of each job together, {"er50-fno-mask": [...]}, in the order of METHODS, learnable first."""

    def place(run: Run) -> tuple:
        job = run.finished
        return list(METHODS).index(job["method"]), job["buffer"], job["classifier"] == "fno", job["mask"]

    found = {}
    for run in sorted(runs, key=place):
        found.setdefault(run.folder.parent.name, []).append(run)
    return found


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Three figures of finished runs, jobs side by side: means over seeds, feature maps of the first seed."""
    class_il = {}  # {"fno + mask": {"er, buffer 50": class-IL of every seed}}
    streams = {}
    energy = {}
    for name, seeds in by_job(runs).items():
        results = [run.finished for run in seeds]
        job = results[0]
        learner = f"{job['method']}, buffer {job['buffer']}" if job["buffer"] else job["method"]
        arm = f"{job['classifier']} + mask" if job["mask"] else job["classifier"]
        class_il.setdefault(arm, {})[learner] = [100 * result["class_il"] for result in results]
        if job["method"] != "joint":  # which has no past
            streams[name] = 100 * np.mean([result["matrix_class_il"] for result in results], axis=0)
        energy[name] = 100 * seeds[0].load_features()["energy"]

    bars(folder / "class_il.png", class_il, STYLE, ylabel="class-IL accuracy (%)", ylim=(0, 100))
    options = {"limits": (0, 100), "diverging": False}
    if streams:
        T = runs[0].config["flags"]["tasks"]
        axes = {"xticks": range(T), "xticklabels": range(1, T + 1), "xlabel": "task"}
        axes |= {"yticks": range(T), "yticklabels": range(1, T + 1), "ylabel": "tasks learned"}
        heat_maps(folder / "forgetting.png", streams, label="class-IL accuracy (%)", **options, **axes)
    axes = {"label": "share of the features' squared norm (%)", "xlabel": "dimensions of class"}
    heat_maps(folder / "feature_energy.png", energy, ylabel="features of class", **options, **axes)


def print_results(runs: list[Run], folder: Path) -> None:
    """A table with one row per job, mean ± std over seeds, and what its columns and figures mean."""
    percent = ["class_il", "train_accuracy", "fit", "task_il", "forgetting", "own_energy"]
    rows = []
    for name, seeds in by_job(runs).items():
        found = [run.finished for run in seeds]
        cells = [mean_std([result[key] for result in found], 1, 100) for key in percent]
        for key in ("old_cosine_W", "znc_alignment", "nc3"):
            cells.append(mean_std([result[key] for result in found]))
        rows.append([name, len(seeds), *cells])
    header = ["method-classifier", "seeds", "class-IL", "train", "fit", "task-IL", "forgetting", "own energy"]
    print("\n" + table([*header, "old cos W", "ZNC3", "NC3"], rows))
    short = [run.folder.parent.name for run in runs if run.finished["fit"] < 0.99]
    if short:
        print(f"not trained to convergence (fit below 99%): {', '.join(dict.fromkeys(short))}")
    print("""class-IL: % of the test images after the last task, all classes compete, mean over tasks
train: the same of the training images; task-IL: only the classes of the image's own task compete
fit: % of a task's training images right when it was learned, by what its softmax ran over
forgetting: how far the accuracy on a task falls from its best, mean over all tasks but the last
own energy: share (%) of a test feature's squared norm in the dimensions of its class
old cos W: mean cosine of the past tasks' class vectors; 1: they have collapsed
ZNC3, NC3: distance of the class means from the class vectors, about the origin and about their own mean""")
    for name in dict.fromkeys(run.finished["method"] for run in runs):
        print(f"{name}: {METHODS[name].about}")
    print(f"""learnable: trained class vectors; fno: Fixed Non-negative Orthogonal ones
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
    add("--classifier", nargs="+", default=KINDS, choices=KINDS, help="fno: needs d >= K")
    add("--mask", action=both, help="softmax of new images over their own task; neither flag: both ways")
    add("--buffer", type=at_least(2), nargs="+", help="images kept, one or more sizes: 200, digits 50")
    add("--tasks", type=at_least(1), help="number of tasks: 5, cifar100 10")
    add("--replay", choices=["mean", "sum"], default="mean", help="ER, ER-ACE: one mean, or two summed")
    add("--bias", action=both, help="of the learnable classifier")
    add("--net", choices=["mlp", "cnn", "resnet18"], help="features behind a ReLU; mlp: split MNIST's")
    add("--per-class", type=at_least(2), help="training images of each class, for a shorter run; else all")
    add("--augment", action=both, help="crop and flip, replayed images too; digits, (fashion)mnist: no")
    args = flags.parse(argv)
    if args.batch_size < 3:  # else a batch may be a single image, which has no variance for BatchNorm
        raise UserError(f"--batch-size {args.batch_size}: expected 3 or more")
    if args.dry_run:
        args.epochs = 2  # of one step each, so that the second one replays
    args.eval_every = args.eval_every or args.epochs  # a stream is tested at the end of each task at least
    return args


def select_images(args: argparse.Namespace, jobs: list[Job], data: Dataset) -> Dataset:
    """The training images of --per-class, as the network gets them. UserError if that is no stream."""
    if args.per_class:
        keep = keep_per_class(data.train_y, args.per_class)  # the same images for every seed
        data = data._replace(train_x=data.train_x[keep], train_y=data.train_y[keep])
    if args.net == "mlp":  # pixels in [0, 1], as released for split MNIST
        data = data._replace(mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std))
    if not args.augment:
        data = data._replace(pad=0, flip=False)
    task = split_tasks(len(data.classes), args.tasks)
    images = torch.bincount(task[data.train_y])
    if images.min() < 2:  # BatchNorm needs two
        found = f"task {images.argmin() + 1} has {images.min()} training images, expected 2 or more"
        raise UserError(f"--tasks {args.tasks}: {found}")
    classes = torch.bincount(task)
    if any(job.mask for job in jobs) and classes.min() < 2:
        found = f"task {classes.argmin() + 1} has one class, and a softmax over one class has no gradient"
        raise UserError(f"--mask: {found}; choose fewer --tasks, or --no-mask")
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
