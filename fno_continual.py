# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Inter-class collapse in continual learning, and a remedy: the Fixed Non-negative Orthogonal classifier.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 2, and its paper (ICLR 2024), of which we
read the abstract. Classifier, mask and settings are those of the released code (khyong/FNO-classifier), the
learners mammoth's; the proofs are ours. A patent application, US 2026/0141221 A1, covers the classifier.

WHAT COLLAPSES. Classes come task by task; the images of past tasks are gone, except for a small buffer. By
cross-entropy every feature h of a new class moves the class vector w_k of each old class by -p_k h. Old
classes have almost no images left to pull their vectors back. Features of old classes fall onto those of the
newest, and the network answers with the newest only: catastrophic forgetting. That the old class vectors
themselves collapse into one is not seen (cosine -0.03 on digits): they lose to the newest all the same.

THE REMEDY has two parts. The FNO classifier is fixed, so that nothing moves it, and non-negative and
orthogonal, so that every feature dimension belongs to one class. Softmax masking lets the softmax of a new
image run over the classes of its own task only. Together they keep the gradient of a feature, exactly, within
the dimensions of its task. Replayed images keep the full softmax: they alone teach the network to tell the
tasks apart.

    python fno_continual.py                                      digits in 5 tasks, under a minute
    python fno_continual.py --synthetic                          the theory, claim by claim
    python fno_continual.py --dataset cifar10 --method er der++ --buffer 200 500 --seed 0 1 2

WHERE PAPER, CODE AND THIS FILE DIFFER.
- The released masked ER adds two means of two forward passes, so its mask comes with twice the gradient of
  plain ER. Here ER takes one mean of one pass, with the mask or without.
- The released masked DER++ stores logits computed anew after the step; ours are those of the step itself.
- lr and DER++'s weights are the released ones of split MNIST, CIFAR-10 and CIFAR-100, for every classifier
  and mask; other data have those of CIFAR-10.
"""

# %% [markdown]
# # 1. The method
# ## The classifier: fixed, non-negative, orthogonal
# $$q_k = \frac{1}{\sqrt{|J_k|}} \text{ on } J_k, \quad 0 \text{ elsewhere}; \qquad Q \ge 0, \quad Q Q^T = I$$
#
# [Kim, part 2; released `classifier_ops.py`] $J_k$ are the dimensions of class $k$. Rows that are orthogonal
# and not negative cannot overlap, so these sets are disjoint: each feature dimension belongs to one class.

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


# %% [markdown]
# ## Its logits
# $$z = w\, Q h, \qquad h \ge 0$$
#
# [released `WeightedSoftmax`] $w$ is one learnable scalar. It takes the place of the class vectors' length.


# %%
class FNOHead(nn.Module):
    """Features (B, d) -> logits (B, K), both float32. W = w Q (K, d): the class vectors in use."""

    def __init__(self, K: int, d: int):
        super().__init__()
        self.b = None  # no bias
        self.register_buffer("Q", fno_classifier(K, d).float())
        self.w = nn.Parameter(torch.ones(()))

    @property
    def W(self) -> Tensor:
        return self.w * self.Q

    def forward(self, h: Tensor) -> Tensor:
        return self.w * (h.float() @ self.Q.T)


# %% [markdown]
# ## Softmax masking
# $$L = -\log \frac{e^{z_y}}{\sum_{k \in T(y)} e^{z_k}}, \qquad
# \frac{\partial L}{\partial h} = w \sum_{k \in T(y)} (p_k - [k = y])\, q_k$$
#
# [Kim, part 2] $T(y)$ are the classes of the label's task. With the FNO classifier the gradient is zero,
# exactly, in every dimension that belongs to another task: what was learned there stays.


# %%
def task_mask(y: Tensor, task: Tensor) -> Tensor:
    """Which logits stay in the softmax: those of the label's own task. y (B,), task (K,) -> (B, K) bool."""
    return task[y][:, None] == task


def masked_ce(z: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """Mean of -log softmax(z)_y over the logits that are kept: z (B, K), y (B,), keep (B, K) bool."""
    return F.cross_entropy(z.masked_fill(~keep, -torch.inf), y)


# %% [markdown]
# ## The buffer: reservoir sampling
# $$P(\text{image } i \text{ is kept}) = M / n \quad \text{for all } n \text{ images of the stream so far}$$
#
# [Vitter 1985, algorithm R] Image $n$ draws a place from $0$ to $n$ and takes it if there is such a place. So
# the buffer is a fair sample of a stream whose length need not be known.


# %%
class Reservoir(nn.Module):
    """Buffer of M rows of a stream, any M of the n seen so far equally likely.

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
        n = int(self.seen) + torch.arange(len(index))  # which image of the stream, from 0
        drawn = torch.rand(len(index), generator=self.generator, dtype=torch.float64)
        place = torch.where(n < len(self.index), n, (drawn * (n + 1)).long())  # once full: any of 0..n
        for row in (place < len(self.index)).nonzero().flatten():
            self.index[place[row]] = index[row]
            self.z[place[row]] = z[row]
        self.seen += len(index)

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """min(n, filled) different rows at random: index and logits."""
        pick = torch.randperm(len(self), generator=self.generator)[:n]
        return self.index[pick], self.z[pick.to(self.z.device)]


# %% [markdown]
# # 2. Theory check
# ## The orthogonal layer-peeled model
# Let every sample have a free feature $h \ge 0$, $\|h\|^2 \le E_H$, and let $\|q_k\|^2 = E_W$. Under any
# imbalance the minimum of cross-entropy is
#
# $$h = \sqrt{E_H / E_W}\; q_k, \qquad L = \log\left(1 + (K - 1)\, e^{-\sqrt{E_H E_W}}\right)$$
#
# [proof ours] All $z_j \ge 0$, so $L \ge \log(1 + (K - 1) e^{-z_k})$, and $z_k$ is largest along $q_k$.
# Class means are then orthogonal about the origin: *zero-mean neural collapse* (ZNC). About their own mean
# they form a simplex, as in neural collapse (NC), but do not point along $Q$.

# %%
import argparse
import itertools
from pathlib import Path

import numpy as np

import common


def peeled_features(Q: Tensor, y: Tensor, E_H: float, non_negative: bool, steps: int = 4000) -> Tensor:
    """argmin over H (N, d) of mean CE(H Q^T, y), ||h_n||^2 <= E_H [and h_n >= 0]. Q (K, d), y (N,)."""
    share = torch.bincount(y, minlength=len(Q)).double() / len(y)  # (K,): of one feature per class
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


# %%
def toy_stream(kind: str, mask: bool, steps: int = 200) -> list[float]:
    """Accuracy (%) on the first of two tasks, at each step of first the one and then the other.

    The smallest stream that forgets: one layer h = relu(V x), two classes per task, no buffer.
    """
    generator = torch.Generator().manual_seed(0)
    task = torch.tensor([0, 0, 1, 1])
    y = torch.arange(4).repeat_interleave(50)
    x = 2 * torch.eye(4, 20)[y] + 1  # + 1: a direction that all share, in which tasks interfere
    x += 0.3 * torch.randn(200, 20, generator=generator)
    V = (torch.randn(40, 20, generator=generator) / 20**0.5).requires_grad_()
    W = (torch.randn(4, 40, generator=generator) / 40**0.5).requires_grad_()
    if kind == "fno":
        W = fno_classifier(4, 40, generator).float()
    optimizer = torch.optim.SGD([V, W] if kind == "learnable" else [V], 0.2)
    curve = []
    for step in range(2 * steps):
        z = torch.relu(x @ V.T) @ W.T
        curve.append(100 * (z.argmax(1) == y)[:100].double().mean().item())
        now = task[y] == step // steps
        keep = task_mask(y[now], task) | (not mask)
        optimizer.zero_grad()
        masked_ce(z[now], y[now], keep).backward()
        optimizer.step()
    return curve


# %%
ARMS = ["learnable", "fno", "learnable + mask", "fno + mask"]
STYLE = common.styles(ARMS)


def check_theory(folder: Path, K: int = 10, d: int = 64, E_H: float = 25) -> dict:
    """Print seven claims, each against direct optimisation; draw synthetic.png."""
    generator = torch.Generator().manual_seed(0)
    claims = common.Claims()
    Q = fno_classifier(K, d, generator)  # E_W = 1

    # The largest class has 20 times the images of the smallest
    y = torch.arange(K).repeat_interleave(torch.linspace(20, 1, K).round().long())
    H = peeled_features(Q, y, E_H, True)
    least = math.log1p((K - 1) * math.exp(-math.sqrt(E_H)))
    loss = F.cross_entropy(H @ Q.T, y).item()
    claims.equal("The least cross-entropy, log(1+(K-1)exp(-sqrt(E_H E_W)))", least, loss, 1e-12)
    error = (H - E_H**0.5 * Q[y]).abs().max().item()
    claims.equal("   is where h = sqrt(E_H/E_W) q_k, under imbalance too: error", 0, error, 1e-9)
    largest = common.zero_mean_metrics(common.class_means(H, y, K))["znc_max_cosine"]
    claims.equal("ZNC: class means are orthogonal about the origin, cosine", 0, largest, 1e-7)
    H = peeled_features(Q, torch.arange(K), E_H, False)
    theory = math.sqrt(1 - 1 / K)
    cosine = (F.normalize(H) * Q).sum(1).min().item()
    claims.equal("Without h >= 0 features leave q_k: cos = sqrt(1 - 1/K)", theory, cosine, 1e-7)

    # Masked softmax and FNO: the gradient of a feature stays in its task's dimensions
    task = common.split_tasks(K, 5)
    y = torch.randint(K, (200,), generator=generator)
    h = torch.rand(len(y), d, generator=generator, dtype=torch.float64).requires_grad_()
    masked_ce(h @ Q.T, y, task_mask(y, task)).backward()
    others = task[Q.argmax(0)] != task[y][:, None]  # (200, d): dimensions of other tasks' classes
    largest = h.grad[others].abs().max().item()
    claims.equal("FNO + mask: |dL/dh| in the dimensions of other tasks", 0, largest, 0)

    # Two tasks, no buffer: which classifier forgets the first one?
    lines = {arm: (range(400), toy_stream(arm.partition(" ")[0], "mask" in arm)) for arm in ARMS}
    end = {arm: accuracy[-1] for arm, (_, accuracy) in lines.items()}
    claims.at_most("Two tasks, learnable: % right of the first after the second", 20, end["learnable"])
    claims.at_most("   FNO + mask forgets", 1, 100 - end["fno + mask"])
    lines["second task begins"] = [200, 200], [0, 100]
    style = {**STYLE, "second task begins": {"color": "black", "linestyle": ":"}}
    axes = {"xlabel": "steps", "ylabel": "accuracy on the first task (%)"}
    common.curves(folder / "synthetic.png", lines, style, **axes)
    return claims.report(folder / "synthetic.png")


# %% [markdown]
# # 3. Network
# All networks end in a ReLU, so that features are not negative.


# %%
def mlp(pixels: int) -> nn.Module:
    """Two hidden layers of 100 ReLU units, the network of split MNIST: (B, C, H, W) -> (B, 100)."""
    layers = [nn.Flatten(), nn.Linear(pixels, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
    network = nn.Sequential(*layers)
    network.d = 100
    return network


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


# %%
class LearnableHead(nn.Module):
    """The baseline, z = W h + b, with nn.Linear's start: features (B, d) -> logits (B, K), both float32."""

    def __init__(self, K: int, d: int, bias: bool):
        super().__init__()
        self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))
        self.b = nn.Parameter(torch.empty(K).uniform_(-1, 1) / math.sqrt(d)) if bias else None

    def forward(self, h: Tensor) -> Tensor:
        z = h.float() @ self.W.T
        return z if self.b is None else z + self.b


def build_model(args: argparse.Namespace, classifier: str, data: common.Dataset) -> nn.ModuleDict:
    """Network first, then classifier: with one seed, both classifiers start on the same network.

    Raises UserError for an FNO classifier that needs more feature dimensions.
    """
    K = len(data.classes)
    _, height, width, channels = data.train_x.shape
    if args.net == "mlp":
        network = mlp(height * width * channels)
    else:
        network = {"cnn": SmallCNN, "resnet18": resnet18}[args.net](channels)
    d = network.d
    if classifier == "fno" and d < K:
        needed = f"{K} classes need {K} feature dimensions, not {d}"
        raise common.UserError(f"--classifier fno: {needed}; try another --net")
    head = FNOHead(K, d) if classifier == "fno" else LearnableHead(K, d, args.bias)
    model = nn.ModuleDict({"network": network, "classifier": head})
    if args.net == "mlp":  # the released start of split MNIST: Glorot's weights, no bias
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
            if p.ndim == 1:
                nn.init.zeros_(p)
    return model


# %% [markdown]
# # 4. Training
# | learner | loss | source |
# |---|---|---|
# | ER | mean CE of new and replayed images, one forward pass | Chaudhry et al. 2019 |
# | DER++ | $CE_{new} + \alpha \|z_1 - z_1^{stored}\|^2 / K + \beta\, CE_2$, two draws | Buzzega et al. 2020 |
#
# New images have softmax masking with `mask`; replayed ones never do. All by SGD without momentum, so that
# nothing of a past task is left in the optimiser.

# %%
METHODS = {
    "sgd": "one task after another, no buffer: the lower bound",
    "er": "Experience Replay: cross-entropy of new and stored images",
    "der++": "Dark Experience Replay: stored logits are kept, and stored labels",
    "joint": "all tasks at once: the upper bound",
}
# Split MNIST, CIFAR-10 and CIFAR-100 as published (Buzzega et al. 2020); digits are ours. Epochs per task.
RECIPES = {
    "": {"tasks": 5, "epochs": 50, "batch_size": 32, "net": "resnet18", "buffer": [200], "weight_decay": 0.0},
    "digits": {"epochs": 12, "batch_size": 10, "net": "mlp", "buffer": [50]},
    "mnist": {"epochs": 1, "batch_size": 10, "net": "mlp"},
    "cifar100": {"tasks": 10},
}
RELEASED = {  # by the authors: {data set: {learner: {buffer: (lr, alpha, beta, images per replayed draw)}}}
    "mnist": {
        "sgd": {0: (0.03, 0, 0, 0)},
        "er": {200: (0.01, 0, 0, 0), 5120: (0.1, 0, 0, 0)},
        "der++": {200: (0.03, 0.2, 1.0, 128), 500: (0.03, 1.0, 0.5, 0), 5120: (0.1, 0.2, 0.5, 64)},
    },
    "cifar10": {"der++": {200: (0.03, 0.1, 0.5, 0), 500: (0.03, 0.2, 0.5, 0), 5120: (0.03, 0.1, 1.0, 0)}},
    "cifar100": {"sgd": {0: (0.03, 0, 0, 0)}, "der++": {5120: (0.03, 0.1, 0.5, 0)}},
}


def released_setting(dataset: str, method: str, buffer: int) -> tuple[float, float, float, int]:
    """For a buffer in between, that of the next larger one; where nothing else is released, lr 0.1."""
    settings = RELEASED.get(common.split_name(dataset)[0], RELEASED["cifar10"]).get(
        method, {0: (0.1, 0, 0, 0)}
    )
    return settings[min((size for size in settings if size >= buffer), default=max(settings))]


def list_jobs(args: argparse.Namespace) -> dict[str, dict]:
    """Every learner with every buffer, classifier and mask that is wanted: {run name: in what it differs}.

    Where neither --mask nor --no-mask is given, both are run: what the mask does is seen beside its absence.
    """
    masks = [False, True] if args.mask is None else [args.mask]
    jobs = {}
    for method, buffer, kind, mask in itertools.product(args.method, args.buffer, args.classifier, masks):
        if method in ("sgd", "joint"):
            buffer = 0
        mask = mask and method != "joint"  # which has no tasks
        name = f"{method}{buffer or ''}-{kind}{'-mask' if mask else ''}"
        lr, alpha, beta, replay = released_setting(args.dataset, method, buffer)
        job = {"method": method, "classifier": kind, "mask": mask, "buffer": buffer, "lr": args.lr or lr}
        jobs[name] = {**job, "alpha": alpha, "beta": beta, "replay_batch": replay or args.batch_size}
    return jobs


def learning_rate(epoch: int, args: argparse.Namespace, lr: float) -> float:
    """The same all along; on CIFAR-100 a tenth of it after 35 of a task's 50 epochs, and again after 45."""
    drops = (0.7, 0.9) if common.split_name(args.dataset)[0] == "cifar100" else ()
    return lr * 0.1 ** sum(epoch >= round(drop * args.epochs) for drop in drops)


# %%
def train(args: argparse.Namespace, run: common.Run, data: common.Dataset) -> dict:
    """Train one job with one seed, from its last checkpoint on. Returns what was measured at the end."""
    job = argparse.Namespace(**run.config["setting"])
    torch.manual_seed(run.seed)  # initial weights, and which dimensions a class owns
    generator = torch.Generator().manual_seed(run.seed)  # order, crops, flips and the buffer
    model = build_model(args, job.classifier, data).to(run.device, memory_format=torch.channels_last)
    network, classifier = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.SGD(model.parameters(), job.lr, weight_decay=args.weight_decay, fused=run.fused)
    views = common.Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device)
    labels = data.train_y.to(run.device)  # (N,)
    task = common.split_tasks(len(data.classes), 1 if job.method == "joint" else args.tasks).to(run.device)
    memory = Reservoir(job.buffer, len(task), generator, run.device)

    def forward(x: Tensor) -> Tensor:
        with run.autocast():  # bf16 inside the network only
            h = network(x)  # (B, d)
        return classifier(h)  # (B, K)

    parts = {"model": model, "optimizer": optimizer, "generator": generator, "memory": memory}
    for epoch in run.epochs((int(task.max()) + 1) * args.epochs, **parts):  # from the last checkpoint on
        optimizer.param_groups[0]["lr"] = learning_rate(epoch % args.epochs, args, job.lr)
        present = (task[labels] == epoch // args.epochs).nonzero().flatten().cpu()  # one task's images
        order = present[torch.randperm(len(present), generator=generator)]
        model.train()
        for part, x in views.epoch(order, args.batch_size, generator):  # (B, C, H, W)
            y = labels[order[part]]  # (B,)
            keep = task_mask(y, task) | (not job.mask)  # (B, K): the logits in the softmax
            if job.method == "er" and len(memory):  # replayed images, never masked, join the batch
                index, _ = memory.draw(job.replay_batch)
                x = torch.cat([x, views.load(index, generator)])
                y = torch.cat([y, labels[index]])
                keep = torch.cat([keep, keep.new_ones(len(index), len(task))])
            z = forward(x)
            loss = masked_ce(z, y, keep)
            if job.method == "der++" and len(memory):
                index, z_1 = memory.draw(job.replay_batch)
                x_1 = views.load(index, generator)
                loss = loss + job.alpha * F.mse_loss(forward(x_1), z_1)
                index, _ = memory.draw(job.replay_batch)
                x_2 = views.load(index, generator)
                loss = loss + job.beta * F.cross_entropy(forward(x_2), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if job.buffer:
                memory.add(order[part], z.detach())
            run.add_loss(loss)  # stays on the device; read once per epoch
        if run.is_test_epoch(epoch) or (epoch + 1) % args.epochs == 0:
            run.log(**test(model, job.mask, data, present, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results: accuracies by *class-IL*, all classes compete, and *task-IL*, those of the own task do


# %%
@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: common.Dataset, run: common.Run) -> tuple:
    """Features h (N, d) and logits z (N, K) of every image in order, neither cropped nor flipped."""
    model.eval()
    hs = []
    zs = []
    for _, x in common.Batches(images, data.mean, data.std, device=run.device).all(250):
        with run.autocast():
            h = model["network"](x)
        hs.append(h.float())
        zs.append(model["classifier"](h))
    return torch.cat(hs), torch.cat(zs)


def test(model: nn.ModuleDict, mask: bool, data: common.Dataset, present: Tensor, run: common.Run) -> dict:
    """A row of each accuracy matrix, and how well the training images of the present task are fitted."""
    task = common.split_tasks(len(data.classes), run.args.tasks)
    _, z = embed(model, data.test_x, data, run)
    class_il, task_il = common.task_accuracies(z, data.test_y.to(z.device), task)
    _, z = embed(model, data.train_x[present], data, run)
    trained = common.task_accuracies(z, data.train_y[present].to(z.device), task)
    fit = trained[1 if mask else 0].nanmean()  # masked: only the task's own classes competed
    return {"class_il": class_il.tolist(), "task_il": task_il.tolist(), "fit": float(fit)}


def own_energy(h: Tensor, y: Tensor, owner: Tensor, K: int) -> float:
    """Mean share of ||h||^2 in its class's dimensions. h (N, d), y (N,); owner (d,): of the largest w_kj."""
    h2 = h.double().square()
    own = (h2 * (owner == y[:, None])).sum(1) / h2.sum(1).clamp_min(1e-300)  # of a zero feature: 0
    return float(common.class_means(own[:, None], y, K).nanmean())


@torch.no_grad()
def measure(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict:
    """Everything that is measured after training, on all images; writes features.npz: z = h W^T + b."""
    train_h, train_z = embed(model, data.train_x, data, run)
    test_h, test_z = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(test_h.device)
    test_y = data.test_y.to(test_h.device)
    head = model["classifier"]
    W = head.W.to(test_h.device)
    bias = {} if head.b is None else {"b": head.b}
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W, **bias)

    K = len(W)
    tasks = run.args.tasks
    old = (common.split_tasks(K, tasks) < tasks - 1).nonzero().flatten()  # classes of past tasks
    ends = run.history[run.args.epochs - 1 :: run.args.epochs]  # the last epoch of each task
    R = torch.tensor([line["class_il"] for line in ends], dtype=torch.float64)  # (tasks, tasks)
    R_own = torch.tensor([line["task_il"] for line in ends], dtype=torch.float64)
    stream = common.stream_metrics(R)
    M = common.class_means(train_h, train_y, K)
    prediction = test_z.argmax(1)
    return {
        "class_il": stream["average"],
        "task_il": common.stream_metrics(R_own)["average"],
        "forgetting": stream["forgetting"],
        "accuracy": float((prediction == test_y).double().mean()),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        "fit": float(np.mean([line["fit"] for line in ends])),
        "own_energy": own_energy(test_h, test_y, W.argmax(0), K),
        "old_cosine_W": common.mean_pairwise_cosine(W, old.to(W.device)),
        "nc3": common.self_duality(W, M - M.mean(0)),
        **common.zero_mean_metrics(M, W),
        "matrix_class_il": R.tolist(),
        "matrix_task_il": R_own.tolist(),
    }


# %%
COLUMNS = {  # entry of result.json: title, unit, what it is
    "class_il": ("class-IL", "%", "of the test images after the last task, all classes compete"),
    "task_il": ("task-IL", "%", "the same, where only the image's own task competes"),
    "forgetting": ("forgetting", "%", "fall of a task's class-IL from its best; without the last task"),
    "fit": ("fit", "%", "of a task's training images at its end, within its softmax"),
    "own_energy": ("own energy", "%", "of a test feature's squared norm lie in its class's dimensions"),
    "old_cosine_W": ("old cos W", "", "mean cosine of past tasks' class vectors; 1: collapsed"),
    "znc_alignment": ("ZNC3", "", "distance of class means from class vectors, about the origin"),
    "nc3": ("NC3", "", "the same about their own mean"),
}


def draw_figures(folder: Path, runs: list[common.Run]) -> None:
    """class_il.png, bars of the learners; forgetting.png, maps of the streams. Means over seeds."""
    class_il = {bar: {} for bar in ARMS}  # {bar: {learner: class-IL of every seed}}
    streams = {}
    for run in runs:
        job = run.config["setting"]
        learner = f"{job['method']}, buffer {job['buffer']}" if job["buffer"] else job["method"]
        bar = f"{job['classifier']} + mask" if job["mask"] else job["classifier"]
        class_il[bar].setdefault(learner, []).append(100 * run.finished["class_il"])
        if job["method"] != "joint":  # joint training has no past
            R = 100 * np.array(run.finished["matrix_class_il"])
            streams.setdefault(f"{learner}\n{bar}", []).append(R)
    class_il = {bar: groups for bar, groups in class_il.items() if groups}
    common.bars(folder / "class_il.png", class_il, STYLE, ylabel="class-IL accuracy (%)", ylim=(0, 100))
    if streams:
        T = job["tasks"]
        later = np.triu(np.full((T, T), np.nan), 1)  # grey: tasks that are still to come
        maps = {name: np.mean(seeds, 0) + later for name, seeds in streams.items()}
        axes = {"xticks": range(T), "xticklabels": range(1, T + 1), "xlabel": "task"}
        axes |= {"yticks": range(T), "yticklabels": range(1, T + 1), "ylabel": "tasks learned"}
        axes |= {"label": "class-IL accuracy (%)", "limits": (0, 100), "diverging": False}
        common.heat_maps(folder / "forgetting.png", maps, **axes)


# %% [markdown]
# # 6. Command line


# %%
def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    flags = common.Flags("fno_continual", __doc__)
    add = flags.add_argument
    kinds = ["learnable", "fno"]
    switch = argparse.BooleanOptionalAction
    add("--classifier", nargs="+", default=kinds, choices=kinds, help="fno: needs d >= K")
    add("--mask", action=switch, help="softmax of new images over their task; else both ways")
    add("--buffer", type=int, nargs="+", help="images kept, one or more sizes")
    add("--tasks", type=int, help="number of tasks")
    add("--bias", action=switch, default=True, help="of the learnable classifier")
    add("--net", choices=["mlp", "cnn", "resnet18"], help="features behind a ReLU; mlp: split MNIST's")
    add("--per-class", type=int, help="training images of each class; else all")
    args = flags.parse(argv, METHODS, ["sgd", "er", "joint"], RECIPES, eval_every=None)
    if args.dry_run:
        args.epochs = 2  # of one step each, so that the second one replays
    args.eval_every = args.eval_every or args.epochs  # each task's end is tested
    return args


def select_images(args: argparse.Namespace, data: common.Dataset) -> common.Dataset:
    """The training images of --per-class, as the network gets them. UserError if they make no stream."""
    if args.per_class:
        chosen = common.keep_per_class(data.train_y, args.per_class)  # whatever the seed
        data = common.keep(data, chosen)
    if args.net == "mlp":  # pixels in [0, 1], as released for split MNIST
        data = data._replace(mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std))
    if data.train_x.shape[3] == 1:  # grey images are neither cropped nor flipped, as released
        data = data._replace(pad=0, flip=False)
    task = common.split_tasks(len(data.classes), args.tasks)
    images = torch.bincount(task[data.train_y], minlength=args.tasks)
    if images.min() < 2:  # BatchNorm needs two
        raise common.UserError(
            f"--tasks {args.tasks}: task {images.argmin() + 1} has under 2 training images"
        )
    if args.mask is not False and set(args.method) != {"joint"} and torch.bincount(task).min() < 2:
        raise common.UserError("--mask: one class in a task, nothing to compete; fewer --tasks or --no-mask")
    return data


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Train every job with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "fno_continual" / "synthetic")
    jobs = list_jobs(args)
    data = select_images(args, common.prepare_data(args))
    for job in jobs.values():  # fail early: build every model first
        build_model(args, job["classifier"], data)
    for run in common.runs(args, data, jobs):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data, jobs)
    common.print_table(runs, COLUMNS, {})
    for name in args.method:
        print(f"{name}: {METHODS[name]}")
    print("learnable, fno: trained or fixed class vectors; -mask: softmax masking")
    draw_figures(args.folder, runs)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
