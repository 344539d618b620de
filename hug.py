# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Neural collapse beyond K <= d + 1, and the hyperspherical uniformity gap (HUG) that aims at it directly.

Source: Liu, Yu, Weller, Schoelkopf, Generalizing and Decoupling Neural Collapse via Hyperspherical Uniformity
Gap (ICLR 2023, arXiv 2303.06484; we have the abstract, the coefficients and a few settings), and the second
author's official code (yulonghui/Uniformity-Gap), which has MHE alone.

WHAT COLLAPSES. At the end of training with cross-entropy all features of a class lie on their mean, and the K
means form a simplex: all angles equal. That takes K - 1 dimensions, and a thousand classes in 512 dimensions,
or ten digits on a circle, do not have them. Generalized neural collapse says what happens there: features
still gather at their class mean, and the means spread over the sphere as evenly as K points can.
Cross-entropy gets there by one force that pulls a feature to its own class vector and pushes it from the
others; on a long tail the two are out of balance, and rare class vectors fall together (bmls_msclf.py).

THE REMEDY states the two aims apart: HUG = uniformity between classes - uniformity within classes. The
classifier is one unit proxy w_k per class; the nearest proxy wins. With unit features x_i, minimise

    L = alpha U(w_1..w_K) + beta mean_c mean_{i in class c} ||x_i - stopgrad(w_c)||

U is the mean of r^-2 over pairs of proxies at distance r (MHE); or MHS, MGD (section 1). The second term is 0
at x_i = w_{y_i} wherever the proxies are: the aims never compete, and class sizes do not move the optimum.

    python hug.py                                 digits in 16 dimensions, where a simplex exists; a minute
    python hug.py --dim 2 --epochs 100            digits on a circle, where none does and two proxies jam
    python hug.py --method all                    the other uniformities, fixed class vectors
    python hug.py --synthetic                     the theory, claim by claim
    python hug.py --dataset cifar10               ResNet-18, for a GPU
    python hug.py --dataset cifar100 --net cnn --dim 64 --epochs 30 --method ce fixed+ce fixed+distance

WHAT THE SOURCES LEAVE OPEN, and what we chose
- alpha = beta = 1 (official). The paper's form has .15 and .015; whether with sums or means is not said.
- MHS and MGD have the structure of the official MHE; MGD's kernel is that of the first author's other code.
- Schedule, augmentation, attack: the usual ones, for all methods alike. There is only an official demo, on
  free features with d = 512, with lr 1 and Nesterov's momentum.
- The mean class by class weighs rare images more; --reweight on gives cross-entropy the same weights.
- fixed+..., hug-fixed, ...-squared and --cut are ours. They show where HUG's points go on a hundred classes:
  its loss is normalised and has no negatives, of which such losses need many (arXiv 2605.20302).
"""

# %% [markdown]
# # 1. The method
# A cell per function; pasted one after the other they run without the rest of this file. $x_i$ and $w_k$ are
# the features $h$ (B, d) and the proxies $W$ (K, d) at unit length, $r_{kl} = \lVert w_k - w_l \rVert$.

# %%
import torch
import torch.nn.functional as F
from torch import Tensor

# %% [markdown]
# ## MHE: minimum hyperspherical energy
# $$U = \frac{2}{K(K-1)} \sum_{k<l} r_{kl}^{-2}, \qquad r_{kl}^2 = \lVert w_k - w_l \rVert^2 + \epsilon$$
# [official; $\epsilon$, a rounding error, is ours] Proxies repel each other like charges. The distances are
# made by subtraction: in float32 $2 - 2\cos$ is 0 or below for angles up to 5e-4, without a gradient, and
# two proxies that once came so close would never part.


# %%
def squared_distances(W: Tensor) -> Tensor:
    """Of all pairs k < l of unit rows, (K, d) -> (K (K-1) / 2,); never 0, so that r^-2 stays finite."""
    return F.pdist(W).square() + torch.finfo(W.dtype).eps


def pair_energy(W: Tensor) -> Tensor:
    """Mean of r^-2 over pairs of unit rows, (K, d) -> scalar: least where they are most uniform."""
    return squared_distances(W).pow(-1).mean()


# %% [markdown]
# ## MHS: maximum hyperspherical separation
# $$U = -\min_{k<l} r_{kl}$$
# [reconstructed] Only the closest pair counts.


# %%
def separation(W: Tensor) -> Tensor:
    """Least distance of two unit rows, (K, d) -> scalar; tied pairs share the gradient."""
    return squared_distances(W).amin().sqrt()


# %% [markdown]
# ## MGD: maximum Gram determinant
# $$U = -\tfrac{1}{K} \log\det(G + 10^{-6} I), \qquad G_{kl} = e^{-r_{kl}^2}$$
# [reconstructed; kernel and jitter of the first author's code] The volume that the proxies span.


# %%
def gram_logdet(W: Tensor, jitter: float = 1e-6) -> Tensor:
    """log det (G + jitter I) of unit rows, (K, d) -> float64 scalar: largest where they are most uniform.

    In float64: 100 points on a circle have eigenvalues down to 1e-64, and only the jitter keeps them from 0.
    """
    W = W.double()
    G = (-(2 - 2 * W @ W.T).clamp_min(0)).exp()  # (K, K)
    return (G + jitter * torch.eye(len(W), dtype=G.dtype, device=G.device)).logdet()


# %% [markdown]
# ## Distance to the proxy, and the mean class by class
# $$\frac{1}{|C_B|} \sum_{c \in C_B} \frac{1}{|B_c|} \sum_{i \in B_c} \ell_i, \qquad
# \ell_i = \lVert x_i - w_{y_i} \rVert$$
# [official] $C_B$ are the classes of a batch, $B_c$ the samples of class c in it: each sample is weighted by
# the inverse of its class's frequency. The distance pulls a sample that is far away no harder than one that
# has almost arrived; its square, also on offer, does [ours].


# %%
def distance_to_proxy(x: Tensor, w: Tensor) -> Tensor:
    """||x_i - w_i||, rows (B, d) -> (B,); the gradient at x_i = w_i is 0, not nan."""
    return ((x - w).square().sum(1) + torch.finfo(x.dtype).eps ** 2).sqrt()


def mean_by_class(losses: Tensor, y: Tensor, K: int) -> Tensor:
    """Mean over the classes present of the mean over their samples; losses (B,), y (B,) -> scalar."""
    # (K,): |B_c|, 0 for a class that the batch lacks; unlike bincount it lets no step wait for the device
    n = losses.new_zeros(K).scatter_add(0, y, torch.ones_like(losses))
    return (losses / n[y]).sum() / (n > 0).sum()


# %% [markdown]
# ## The hyperspherical uniformity gap
# $$L = \alpha\, U(w_1, \dots, w_K) + \frac{\beta}{|C_B|} \sum_{c \in C_B} \frac{1}{|B_c|} \sum_{i \in B_c}
# \lVert x_i - \mathrm{stopgrad}(w_c) \rVert^p$$
# [official: MHE, $p = 1$] Proxies feel the first term alone and spread out as if there were no data; features
# follow them. Cost: O(K^2) for the proxies, O(B) for the batch.


# %%
UNIFORMITIES = {
    "mhe": pair_energy,
    "mhs": lambda w: -separation(w),
    "mgd": lambda w: -gram_logdet(w).to(w.dtype) / len(w),
}


def hug_loss(
    h: Tensor, W: Tensor, y: Tensor, uniformity: str = "mhe", p: int = 1, alpha: float = 1, beta: float = 1
) -> Tensor:
    """HUG, negated: features h (B, d), proxies W (K, d), of any length, y (B,) -> scalar.

    uniformity: `mhe` (official), `mhs`, `mgd` (reconstructed), else KeyError. p: power of the distance.
    """
    x = F.normalize(h, dim=1)
    w = F.normalize(W, dim=1)
    distance = distance_to_proxy(x, w.detach()[y])  # (B,)
    within = mean_by_class(distance**p, y, len(W))
    return alpha * UNIFORMITIES[uniformity](w) + beta * within


# %% [markdown]
# ## Dot-regression to fixed proxies
# $$L = \frac{1}{2B} \sum_i (w_{y_i} \cdot x_i - 1)^2 = \frac{1}{8B} \sum_i \lVert x_i - w_{y_i} \rVert^4$$
# [Yang et al. 2022] The fourth power of the distance: a far feature is pulled most, and the pull fades near
# the proxy. Where a simplex exists this is their ETF + DR; it goes on where none does.


# %%
def dot_regression_to_proxies(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Pull each feature to its own proxy; unit x (B, d), unit w (K, d), y (B,) -> scalar >= 0."""
    return 0.5 * ((x * w[y]).sum(1) - 1).square().mean()


# %% Imports of the other cells
import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

import common

# %% [markdown]
# # 2. Theory check
# Where points on a sphere are most uniform, and the layer-peeled model: features and class vectors are free.
#
# | | | distances $r$ | mean of $r^{-2}$ |
# |:--|:--|:--|:--|
# | K <= d + 1 | simplex | all $\sqrt{2K/(K-1)}$ | $(K-1)/2K$ |
# | d = 2 | regular polygon | $2 \sin(\pi j/K)$, j = 1..K-1 | $(K+1)/12$ |
# | K = 2d | cross-polytope | 2 once, else $\sqrt 2$ | $(4d-3)/(4(2d-1))$ |
#
# Each is best for every energy here [convex and decreasing in $r^2$; cross-polytope: Cohn & Kumar 2007]. For
# other K and d none is known: we optimise.


# %%
@functools.cache
def optimise_proxies(K: int, d: int, seed: int = 0) -> Tensor:
    """K proxies of least MHE energy, from a random start: (K, d) float64, unit rows.

    Every start ends in the simplex (K <= d + 1) or the polygon (d = 2); elsewhere in one of many arrangements
    whose energies hardly differ. A thousand proxies take half a minute, their energy right to 3e-4.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(K, d, generator=generator, dtype=torch.float64)
    steps = 500 if K <= 300 else 20
    (W,) = common.minimise(lambda W: (K - 1) * pair_energy(F.normalize(W)), start, steps=steps)
    return F.normalize(W)


def least_energy(K: int, d: int) -> float:
    """The least MHE energy that we know: in closed form, or what optimise_proxies finds."""
    if K <= d + 1:
        return (K - 1) / (2 * K)
    if d == 2:
        return (K + 1) / 12
    if K == 2 * d:
        return (4 * d - 3) / (4 * (2 * d - 1))
    return pair_energy(optimise_proxies(K, d)).item()


# %% [markdown]
# ## HUG in the layer-peeled model
# $n_k$ free features per class: the optimum has every feature on its proxy and the proxies at their most
# uniform, whatever the $n_k$. For L-BFGS the kink of $\lVert x - w \rVert$ at 0 is softened; the minimum
# stays where it is.


# %%
def layer_peeled_hug(n: list[int], d: int, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Proxies W (K, d), features X (N, d) and labels (N,) that minimise HUG (MHE), beta = 1."""
    generator = torch.Generator().manual_seed(0)
    K = len(n)
    y = torch.arange(K).repeat_interleave(torch.tensor(n))
    W = torch.randn(K, d, generator=generator, dtype=torch.float64)
    H = torch.randn(len(y), d, generator=generator, dtype=torch.float64)

    def loss(W: Tensor, H: Tensor) -> Tensor:
        w = F.normalize(W)
        r = ((F.normalize(H) - w[y]).square().sum(1) + 0.3**2).sqrt()
        return alpha * pair_energy(w) + mean_by_class(r, y, K)

    W, H = common.minimise(loss, F.normalize(W), F.normalize(H), steps=300)
    return F.normalize(W), F.normalize(H), y


# %%
def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against direct optimisation; draw synthetic.png."""
    claims = common.Claims()
    shapes = {2: "polygon", 5: "cross-polytope", 9: "simplex"}  # of ten proxies, by dimension
    for d, shape in shapes.items():
        energy = pair_energy(optimise_proxies(10, d)).item()
        claim = f"MHE, 10 proxies in {d} dimensions are a {shape}: energy"
        claims.equal(claim, least_energy(10, d), energy, 1e-6)
    # 100 images to 1: the class counts do not matter, and neither do the weights of the two terms
    for alpha in (1.0, 10.0):
        W, X, y = layer_peeled_hug([100] * 5 + [1] * 5, 5, alpha)
        claim = f"HUG, 100 images to 1, alpha / beta = {alpha:g}: energy is the least"
        claims.equal(claim, least_energy(10, 5), pair_energy(W).item(), 1e-6)
        farthest = (X - W[y]).norm(dim=1).max().item()
        claims.equal("   and every feature is on its proxy: largest distance", 0, farthest, 1e-5)

    dimensions = list(range(2, 13))
    angles = [common.smallest_angle(optimise_proxies(10, d)) for d in dimensions]
    labels = [f"{d}\n{shapes.get(d, '')}" for d in dimensions]
    axes = {"xlabel": "dimensions d", "xticks": dimensions, "xticklabels": labels}
    axes |= {"title": "Ten proxies, spread as evenly as they can be", "ylabel": "smallest angle (degrees)"}
    points = {"hug-mhe": (dimensions, angles)}
    common.curves(folder / "synthetic.png", points, common.styles(points), **axes)
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


NETWORKS = {"resnet18": resnet18, "cnn": SmallCNN}

# %% [markdown]
# ## The head
# A linear layer and BatchNorm, the same for every method: what leaves a ReLU fills one orthant only, and
# points all over a sphere need them all. The logits are $z = h W^T$. Cross-entropy leaves $h$ and $W$ free
# (linear) or has 16 cosines (cosine; 16 is ours). With both at unit length (proxy) the largest logit is the
# nearest proxy, since $-\lVert x - w \rVert^2 = 2\cos - 2$.


# %%
class ProxyHead(nn.Module):
    """From the network's output (B, d_in) to features h (B, d) and class vectors (K, d), in float32."""

    def __init__(self, d_in: int, d: int, K: int, kind: str):
        super().__init__()
        self.kind = kind
        self.length = 16.0 if kind == "cosine" else 1.0
        self.fc = nn.Linear(d_in, d, bias=False)
        self.bn = nn.BatchNorm1d(d)
        self.W = nn.Parameter(torch.empty(K, d).uniform_(-1, 1) / math.sqrt(d))  # nn.Linear's, HUG's start

    def forward(self, f: Tensor) -> tuple[Tensor, Tensor]:
        h = self.bn(self.fc(f.float()))
        if self.kind == "linear":
            return h, self.W
        return F.normalize(h, dim=1), self.length * F.normalize(self.W, dim=1)


# %% [markdown]
# # 4. Training


# %%
class Method(NamedTuple):
    head: str  # linear, cosine or proxy: ProxyHead
    loss: str  # a key of LOSSES
    fixed: bool  # the most uniform class vectors from the start, which stay
    about: str


METHODS = {
    "ce": Method("linear", "ce", False, "cross-entropy"),
    "ce+norm": Method("cosine", "ce", False, "cross-entropy of 16 cosines"),
    "fixed+ce": Method("cosine", "ce", True, "cross-entropy of 16 cosines to fixed proxies"),
    "hug-fixed": Method("proxy", "dot-regression", True, "dot-regression to fixed proxies"),
    "fixed+squared": Method("proxy", "mhe-squared", True, "squared distance to fixed proxies"),
    "fixed+distance": Method("proxy", "mhe", True, "distance to fixed proxies"),
    "hug-mhe-squared": Method("proxy", "mhe-squared", False, "HUG by energy, squared distance"),
    "hug-mhe": Method("proxy", "mhe", False, "HUG by energy (official)"),
    "hug-mhs": Method("proxy", "mhs", False, "HUG by separation (reconstructed)"),
    "hug-mgd": Method("proxy", "mgd", False, "HUG by Gram determinant (reconstructed)"),
}
# of features h (B, d) and class vectors W (K, d) as the head gives them, and labels y (B,)
LOSSES = {
    "ce": lambda h, W, y: F.cross_entropy(h @ W.T, y),
    "ce by class": lambda h, W, y: mean_by_class(F.cross_entropy(h @ W.T, y, reduction="none"), y, len(W)),
    "mhe": lambda h, W, y: hug_loss(h, W, y, "mhe"),
    "mhe-squared": lambda h, W, y: hug_loss(h, W, y, "mhe", p=2),
    "mhs": lambda h, W, y: hug_loss(h, W, y, "mhs"),
    "mgd": lambda h, W, y: hug_loss(h, W, y, "mgd"),
    "dot-regression": dot_regression_to_proxies,
}
# The source's schedules are not known: epochs, batch size, network, feature dimension (0: the network's).
RECIPES = {
    "": {"epochs": 200, "batch_size": 128, "net": "resnet18", "dim": 0, "lr": 0.1, "weight_decay": 5e-4},
    # d = 16: official proxies jam on a circle, the second thing to look at. 40 epochs: a minute
    "digits": {"epochs": 40, "batch_size": 64, "net": "cnn", "dim": 16},
}


def build_model(args: argparse.Namespace, name: str, data: common.Dataset, seed: int = 0) -> nn.ModuleDict:
    """Network and head of a method; seed: of fixed proxies."""
    method = METHODS[name]
    network = NETWORKS[args.net](data.train_x.shape[3])
    head = ProxyHead(network.d, args.dim or network.d, len(data.classes), method.head)
    if method.fixed:
        head.W.data.copy_(optimise_proxies(*head.W.shape, seed))
        head.W.requires_grad_(False)
    return nn.ModuleDict({"network": network, "head": head})


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr after a warm-up of one epoch in forty; then half a cosine to 0, or steps as in bmls_msclf.py."""
    warmup = max(1, round(args.epochs / 40))
    if args.schedule == "steps":
        done = (epoch + 1) / args.epochs
        drop = (1.0, 0.1, 0.01)[(done > 0.8) + (done > 0.9)]
        return args.lr * min(1, (epoch + 1) / warmup) * drop
    if epoch < warmup:
        return args.lr * (epoch + 1) / warmup
    return args.lr * (1 + math.cos(math.pi * (epoch - warmup) / (args.epochs - warmup))) / 2


# %% [markdown]
# ## The training loop
# --cut shortens the gradient of each proxy to length 1 at most [ours]. The pair term only turns a proxy, and
# goes with $r^{-3} / \lVert w_k \rVert$: two that start close grow so long that their direction hardly
# changes any more. On a circle such a pair is stuck; in 16 dimensions random starts are far enough apart.


# %%
def train(args: argparse.Namespace, run: common.Run, data: common.Dataset) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    method = METHODS[run.name]
    torch.manual_seed(run.seed)  # initial weights
    generator = torch.Generator().manual_seed(run.seed)  # order, crops and flips
    model = build_model(args, run.name, data, run.seed)
    model = model.to(run.device, memory_format=torch.channels_last)
    network, head = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=run.fused
    )
    by_class = method.loss == "ce" and args.reweight == "on"
    loss_of = LOSSES["ce by class" if by_class else method.loss]
    cut = args.cut and method.head == "proxy" and not method.fixed
    images = common.Batches(
        data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=run.device
    )

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        lr = learning_rate(epoch, args)
        optimizer.param_groups[0]["lr"] = lr
        drawn = torch.randperm(images.N, generator=generator)
        labels = data.train_y[drawn].to(run.device)
        model.train()
        for part, x in images.epoch(drawn, args.batch_size, generator):  # (B, C, H, W)
            with run.autocast():  # bf16 inside the network only
                f = network(x)
            h, W = head(f)  # (B, d), (K, d)
            loss = loss_of(h, W, labels[part])
            optimizer.zero_grad()
            loss.backward()
            if cut:
                head.W.grad /= head.W.grad.norm(dim=1, keepdim=True).clamp_min(1)
            optimizer.step()
            run.add_loss(loss)  # stays on the device; read once per epoch
        run.log(lr=lr, **geometry(head.W.detach()))
        if run.is_test_epoch(epoch):  # every --eval-every epochs, and after the last one
            run.log(**test(model, data, run))
    return measure(model, data, run)


# %% [markdown]
# # 5. Results


# %%
def geometry(W: Tensor) -> dict[str, float]:
    """How uniform the rows of W (K, d) point: MHE energy over the least known, smallest angle (degrees)."""
    W = F.normalize(W.double())
    energy = pair_energy(W).item() / least_energy(*W.shape)
    return {"energy": energy, "smallest_angle": common.smallest_angle(W)}


def within_classes(h: Tensor, y: Tensor, K: int) -> float:
    """Mean ||x_i - m_y||, m the mean direction of a class: 0 at full collapse (GNC1). h (N, d), y (N,)."""
    x = F.normalize(h.double())
    sums = torch.zeros(K, h.shape[1], dtype=x.dtype, device=x.device).index_add_(0, y, x)
    return float((x - F.normalize(sums)[y]).norm(dim=1).mean())


@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: common.Dataset, run: common.Run):
    """Features h (N, d) of every image, in order, and class vectors W (K, d): the logits are h W^T."""
    model.eval()
    parts = []
    for _, x in common.Batches(images, data.mean, data.std, device=run.device).all():
        with run.autocast():
            f = model["network"](x)
        h, W = model["head"](f)
        parts.append(h)
    return torch.cat(parts), W.detach()


def test(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict[str, float]:
    """Test accuracy, and how far test features are from their class's mean direction."""
    h, W = embed(model, data.test_x, data, run)
    y = data.test_y.to(h.device)
    accuracy = common.accuracies(common.logits(h, W), y, {})["accuracy"]
    return {"accuracy": accuracy, "test_within": within_classes(h, y, len(W))}


RADIUS = 8  # of the attack, linf in 255ths of the pixel range: the usual one
PGD_STEPS = 10
ATTACKED = 500  # test images, the same ones for every method


def robust_accuracy(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> float:
    """Share of ATTACKED test images that stay right under PGD (Madry et al. 2018) within RADIUS, in float32.

    It climbs the margin max_{j != y} z_j - z_y and not a loss: the sign of its gradient does not depend on
    the logits' scale. Under its own loss a confident cross-entropy, whose softmax saturates, looks robust.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(data.test_y), generator=generator)[: 10 if run.args.dry_run else ATTACKED]
    x = common.Batches(data.test_x, data.mean, data.std, device=run.device).load(chosen)
    y = data.test_y[chosen, None].to(run.device)
    mean = data.mean.to(run.device)[:, None, None]
    std = data.std.to(run.device)[:, None, None]
    radius = RADIUS / 255 / std
    start = 2 * torch.rand(x.shape, generator=generator).to(run.device) - 1
    moved = (x + radius * start).clamp(-mean / std, (1 - mean) / std)
    model.eval()
    for _ in range(PGD_STEPS + 1):  # the last round measures only
        moved = moved.detach().requires_grad_()
        h, W = model["head"](model["network"](moved))
        z = h @ W.T
        margin = z.scatter(1, y, float("-inf")).amax(1) - z.gather(1, y).squeeze(1)  # (B,)
        (g,) = torch.autograd.grad(margin.sum(), moved)
        step = (moved + 2.5 * radius / PGD_STEPS * g.sign()).clamp(x - radius, x + radius)
        moved = step.clamp(-mean / std, (1 - mean) / std)
    return float((margin < 0).double().mean())


def measure(model: nn.ModuleDict, data: common.Dataset, run: common.Run) -> dict:
    """Everything that is measured after training; writes features.npz, where the logits are h W^T."""
    train_h, W = embed(model, data.train_x, data, run)
    test_h, _ = embed(model, data.test_x, data, run)
    train_y = data.train_y.to(W.device)
    test_y = data.test_y.to(W.device)
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W)
    predicted = common.logits(train_h, W).argmax(1)
    fitted = common.accuracy_per_class(predicted, train_y, len(W))
    groups = data.groups if data.profile else {}  # many, medium, few of a long tail
    return {
        **common.accuracies(common.logits(test_h, W), test_y, groups),
        "train_accuracy": float((predicted == train_y).double().mean()),
        "lost_classes": int((fitted < 0.1).sum()),
        **geometry(W),
        "within": within_classes(train_h, train_y, len(W)),
        "pgd": robust_accuracy(model, data, run),
    }


COLUMNS = {  # entry of result.json: its title, unit and meaning in the table
    "accuracy": ("accuracy", "%", "of the test images, after the last epoch"),
    "few": ("few", "%", "of the test images of the rare classes"),
    "best_accuracy": ("best", "%", "highest of the tested epochs, chosen on the test set"),
    "train_accuracy": ("train", "%", "of the training images, unaugmented"),
    "lost_classes": ("lost", "#", "classes of which under 10% of the training images are right"),
    "pgd": ("PGD", "%", f"right under attack, linf {RADIUS}/255 in {PGD_STEPS} steps"),
    "smallest_angle": ("angle", "°", "smallest between two class vectors"),
    "energy": ("energy", "", "of the class vectors over the least known, 1 at best"),
    "within": ("within", "", "mean distance of a unit training feature to its class's mean direction"),
}


def draw_figures(folder: Path, runs: list[common.Run]) -> None:
    """gap.png: both terms of the gap, means over seeds; with d = 2 circle.png, each method's first seed."""
    paths = {}
    features = {}
    for name in dict.fromkeys(run.name for run in runs):
        group = [run for run in runs if run.name == name]
        tested = [[line for line in run.history if "test_within" in line] for run in group]
        within = np.mean([[line["test_within"] for line in lines] for lines in tested], axis=0)
        energy = np.mean([[line["energy"] for line in lines] for lines in tested], axis=0)
        paths[name] = within, 100 * (energy - 1).clip(0)
        features[METHODS[name].about] = group[0].load_features()
    axes = {"title": "From epoch to epoch; collapse is the lower left corner"}
    jammed = max(energy.max() for _, energy in paths.values()) > 100
    axes["yscale"] = "symlog" if jammed else "linear"
    axes["xlabel"] = "within classes: mean distance of test features to their direction"
    axes["ylabel"] = "between: energy of class vectors, % above the least"
    axes |= {"xlim": (0, None), "ylim": (-0.2, None)}
    common.curves(folder / "gap.png", paths, common.styles(METHODS), **axes)
    if all(arrays["W"].shape[1] == 2 for arrays in features.values()):
        draw_circles(folder / "circle.png", features)


def draw_circles(path: Path, features: dict[str, dict]) -> None:
    """Directions of test features (dots) and class vectors (lines) by class; a ring around a jammed pair."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(features) + 1, 3.7), layout="constrained")
    plots = figure.subplots(1, len(features), squeeze=False)[0]
    colours = [*common.COLOURS, "#882255", "#999933"]  # ten classes have ten colours
    for plot, (title, arrays) in zip(plots, features.items(), strict=True):
        x = arrays["test_h"] / np.linalg.norm(arrays["test_h"], axis=1, keepdims=True)
        W = arrays["W"] / np.linalg.norm(arrays["W"], axis=1, keepdims=True)
        x *= 1 + 0.15 * np.random.default_rng(1).random((len(x), 1))  # random jitter, for visibility only
        for k, w in enumerate(W):
            colour = colours[k % len(colours)]
            plot.scatter(*x[arrays["test_y"] == k].T, s=4, color=colour, label=f"class {k}", rasterized=True)
            plot.plot([0, 0.95 * w[0]], [0, 0.95 * w[1]], color=colour, lw=2)
        cosines = W @ W.T - 2 * np.eye(len(W))
        angle = np.degrees(np.arccos(cosines.max().clip(-1, 1)))
        if angle < 90 / len(W):  # a quarter of the polygon's
            pair = np.unravel_index(cosines.argmax(), cosines.shape)
            plot.plot(*(0.8 * W[pair[0]]), "ko", fillstyle="none", ms=20, mew=2)
            title += f"\nclasses {pair[0]} and {pair[1]} only {angle:.1f}° apart"
        plot.set_title(title, fontsize=10)
        plot.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        plot.set_axis_off()
    figure.legend(*plot.get_legend_handles_labels(), loc="outside right upper", frameon=False, markerscale=3)
    common.save_figure(path, figure)


# %% [markdown]
# # 6. Command line

# %%
ABOUT = {name: method.about for name, method in METHODS.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    flags = common.Flags("hug", __doc__)
    add = flags.add_argument
    add("--net", choices=list(NETWORKS), help="network")
    add("--dim", type=int, help="feature dimension d; 0: the network's")
    add("--reweight", choices=["on", "off"], default="off", help="ce: mean class by class, as HUG has it")
    add("--cut", action="store_true", help="cut a proxy's gradient to length 1; no pair jams on a circle")
    add("--schedule", choices=["cosine", "steps"], default="cosine", help="of the learning rate")
    add("--per-class", type=int, help="train on so many images of each class at most")
    args = flags.parse(argv, ABOUT, ["ce", "hug-mhe"], RECIPES, eval_every=5)
    if args.dim == 1:
        raise common.UserError("--dim 1: a circle needs two dimensions, or 0 for the network's")
    if args.batch_size < 3:
        raise common.UserError(f"--batch-size {args.batch_size}: expected 3 or more")
    return args


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figures. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "hug" / "synthetic")
    data = common.prepare_data(args)
    if args.per_class:
        data = common.keep(data, common.keep_per_class(data.train_y, args.per_class))
    for run in common.runs(args, data):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data)
    common.print_table(runs, COLUMNS, ABOUT)
    draw_figures(args.folder, runs)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
