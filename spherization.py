# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "numpy", "matplotlib", "scikit-learn", "tqdm"]
# ///

# %% [markdown]
"""Spherization: features on a sphere, so that only angles can separate classes.

Sources: H. Kim, From Theory to Remedy (doctoral thesis, GIST), part 1, of which we have the abstract, and the
code published with its paper (NeurIPS 2022): "released" below.

What collapses. A classifier by inner products, w_k . h + b_k, may tell classes apart by the length of a
feature h instead of its direction. Retrieval, prototypes and word analogies compare angles only, and for them
such classes lie on top of each other. In the extreme all lie on one ray: a classifier separates them without
error, and no angle does (--synthetic).

The remedy removes length as a cue. The last hidden layer's output z (n numbers, no ReLU) becomes n angles,
and the angles become a point x of the sphere of radius r, which a linear layer without bias reads:

    phi_k = (pi/2 - phi_L) sigmoid(s z_k) + phi_L                 s: learnable scale, r: fixed radius
    x_k   = r cos(phi_k) prod_{j<k} sin(phi_j),   k = 1..n        x_{n+1} = r prod_{j<=n} sin(phi_j)

    python spherization.py                                        digits, with and without; under a minute
    python spherization.py --synthetic                            the theory, claim by claim
    python spherization.py --dataset mnist --net lenet --method plain sphere --seed 0 1 2
    python spherization.py --task overlap --dataset mnist         how near do classes come in angle?
    python spherization.py --task fewshot --dataset cifar100      FC100, by distance and by cosine
    python spherization.py --task analogy                         words of a small language, in a transformer
    python spherization.py --task analogy --model NAME --text sentences.txt --analogies questions-words.txt

What the source leaves open, or we do differently (more in results/spherization.md):

- The released code adds 1e-6 inside logarithms, which makes x up to 0.4% too long. Ours is exact.
- "Overlapping samples" are published as counts without a definition; ours is the function `overlap`.
- Only s is learned, as in the released runs; with two angles it begins at 1.
- Few-shot, the layer follows a convolution in place of the last max-pool: +last is that without the layer.
- Analogies compare word vectors; the released code lets a language model rate sentences.
"""

# %% [markdown]
# # 1. The method
# These cells need nothing else, so that they can be pasted into a notebook.

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# %% [markdown]
# ## Lower bound of the angles: $\varphi_L = \arcsin(\delta^{1/n})$
# [released] A coordinate is a product of up to n sines. With smaller angles it fades, and its gradient too.
# %%
def lower_bound(n: int, delta: float = 1e-6) -> float:
    """phi_L, in radians, from sin(phi_L)^n = delta: 0.001 at n = 2, 1.27 at 300, 1.49 at 4096."""
    return min(math.asin(delta ** (1 / n)), 0.99 * math.pi / 2)  # the cap (released) is for n > 110,000


# %% [markdown]
# ## From angles to a point: $x_k = r P_{k-1} \cos\varphi_k$ and $x_{n+1} = r P_n$
# [released, by a matrix of size n^2] $P_k = \prod_{j \le k} \sin\varphi_j$ is a cumulative sum of logarithms.
# %%
def spherize(z: Tensor, s: Tensor | float, r: float = 5.0, delta: float = 1e-6) -> Tensor:
    """Points of the sphere of radius r: z (..., n) and scale s -> x (..., n+1). Time and memory O(n)."""
    n = z.shape[-1]
    phi_L = lower_bound(n, delta)
    psi = (math.pi / 2 - phi_L) * torch.sigmoid(-s * z)  # (..., n): pi/2 - phi
    cos = psi.sin()  # cos(phi)
    if n < 40:  # few angles come near 0, where 1 - cos^2 would cancel
        phi = (math.pi / 2 - phi_L) * torch.sigmoid(s * z) + phi_L
        log_sin = phi.sin().log()
    else:  # sines just below 1, whose rounding errors would add up: from the cosines
        log_sin = 0.5 * torch.log1p(-cos * cos)
    P = log_sin.cumsum(-1).exp()  # (..., n)
    one = torch.ones_like(z[..., :1])
    return r * torch.cat([cos, one], -1) * torch.cat([one, P], -1)


# %% [markdown]
# ## The Spherization layer: $z \mapsto \varphi \mapsto x$, instead of the last hidden layer's ReLU
# [released] The linear layer after it has no bias, by which the length of a feature could count again.
# %%
class Spherization(nn.Module):
    """z (B, n) -> x (B, n+1); or images (B, n, H, W), tokens (B, T, n). In float32: bf16 is 0.4% off."""

    def __init__(self, n: int, radius: float = 5.0, scale: float = 5.0, delta: float = 1e-6):
        super().__init__()
        if n < 1 or not (0 < radius < math.inf and 0 < scale < math.inf and 1e-30 <= delta < 1):
            raise ValueError(f"Spherization: n {n}, radius {radius}, scale {scale}, delta {delta}")
        self.n = n
        self.radius = radius
        self.delta = delta
        self.s = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, z: Tensor) -> Tensor:
        axis = 2 if z.ndim == 3 else 1
        if z.ndim < 2 or z.shape[axis] != self.n:
            raise ValueError(f"Spherization: {tuple(z.shape)}, expected (B, {self.n}), images or tokens")
        z = z.to(torch.promote_types(z.dtype, torch.float32)).movedim(axis, -1)  # (B, n), (B, H, W, n), ...
        return spherize(z, self.s, self.radius, self.delta).movedim(-1, axis)


# %% [markdown]
# ## Overlapping samples: $1 - \cos(h_i, h_j) < \tau$ for some $h_j$ of another class
# [ours; published without a definition] Whatever compares angles confuses the two, however long they are.
# %%
def overlap(h: Tensor, y: Tensor) -> Tensor:
    """Largest cosine of each feature with one of another class, (N,); -1 without one. h (N, d), y (N,)."""
    u = F.normalize(h.double(), dim=1)
    nearest = []
    for some, label in zip(u.split(1000), y.split(1000), strict=True):
        cos = (some @ u.T).masked_fill(label[:, None] == y, -1)  # (1000, N)
        nearest.append(cos.amax(1))
    return torch.cat(nearest)


# %% [markdown]
# ## Episodes: few classes, each with some labelled images (shots) and others to classify (queries)
# [Vinyals et al. 2016] Those of the test have new classes: the features have to be good, not a head.
# %%
def draw_episodes(y: Tensor, E: int, way: int, images: int, generator: torch.Generator) -> Tensor:
    """Indices into y (E, way, images), none twice in an episode. Raises ValueError for too few images."""
    members = [(y == k).nonzero().flatten() for k in y.unique()]
    fewest = min(map(len, members))
    if len(members) < way or fewest < images:
        raise ValueError(f"{len(members)} classes of {fewest} images; an episode has {way} of {images}")
    episodes = torch.empty(E, way, images, dtype=torch.long)
    for episode in episodes:
        classes = torch.randperm(len(members), generator=generator)[:way]
        for slot, k in enumerate(classes):
            drawn = torch.randperm(len(members[k]), generator=generator)[:images]
            episode[slot] = members[k][drawn]
    return episodes


# %% [markdown]
# ## Prototypes $p_k$, means of the shots: logits $-\|q - p_k\|^2 / 128$ or $1000 (\cos(q, p_k) - 1) / 128$
# [Snell et al. 2017; temperatures: released] At r = 5 the first spans 0.4 on the sphere, the second spans 8.
# %%
def prototype_logits(h: Tensor, shots: int, metric: str) -> Tensor:
    """h (E, way, shots + queries, d) -> logits (E, way * queries, way), queries class by class."""
    p = h[:, :, :shots].mean(2)  # (E, way, d): the prototypes
    q = h[:, :, shots:].flatten(1, 2)  # (E, way * queries, d)
    if metric == "cosine":
        return 1000 * (F.normalize(q, dim=2) @ F.normalize(p, dim=2).mT - 1) / 128
    if metric == "euclidean":
        return -(q[:, :, None] - p[:, None]).square().sum(3) / 128
    raise ValueError(f"prototype_logits {metric}: expected cosine or euclidean")


# %% [markdown]
# ## In a transformer's last block: $LN(u + W_2 GELU(W_1 u + b_1) + b_2) \to LN(u + W spherize(W_1 u + b_1))$
# [released] Ours begins as $W_2$ with a column of zeros, theirs at random. A word's vector has u beside it.
# %%
FEED_FORWARD = [  # where a block has its activation, and the linear layer behind it
    ("activation", "linear2"),  # nn.TransformerEncoderLayer
    ("intermediate.intermediate_act_fn", "output.dense"),  # BERT (MiniLM is one), RoBERTa, MPNet
]


def spherize_last_block(encoder: nn.Module, radius: float = 5.0, scale: float = 5.0) -> None:
    """Put the layer into an encoder's last block, in place. Raises ValueError for another kind of block."""
    stacks = [part for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    block = stacks[-1][-1] if stacks else nn.Identity()
    parts = dict(block.named_modules())
    for activation, linear in FEED_FORWARD:
        if activation in parts and linear in parts:
            W_2 = parts[linear].weight.detach()  # (d, n)
            W = nn.Linear(W_2.shape[1] + 1, W_2.shape[0], bias=False)
            W.weight.data = F.pad(W_2, (0, 1))  # (d, n+1)
            block.set_submodule(activation, Spherization(W_2.shape[1], radius, scale))
            block.set_submodule(linear, W)
            return
    raise ValueError("its last block is none of BERT, RoBERTa or MPNet")


# %% [markdown]
# ## Word analogies a : b :: c : d by 3CosAdd: $d = \arg\max_w \cos(v_w, v_b - v_a + v_c)$
# [Mikolov et al. 2013] Word vectors v are compared by angle: their lengths cannot help.
# %%
def answer_analogies(V: Tensor, questions: Tensor) -> Tensor:
    """Word vectors V (n, d), questions (Q, 4) in numbers of words -> is d found? (Q,) bool."""
    a, b, c, d = questions.unbind(1)
    u = F.normalize(V, dim=1)
    cos = (u[b] - u[a] + u[c]) @ u.T  # (Q, n), times a length that changes no order
    return cos.scatter(1, questions[:, :3], -math.inf).argmax(1) == d


# %% Imports of the other cells
import argparse
import itertools
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import common


# %% [markdown]
# # 2. Theory check
# On one ray, $h_k = t_k u$, the head $w_k = t_k u,\ b_k = -t_k^2/2$ finds the nearest length, since then
# $w_k h + b_k = (\|h\|^2 - \|h - h_k\|^2)/2$. No angle does. On a sphere $w_k = x_k$ finds the nearest angle.
# %%
def check_theory(folder: Path) -> dict:
    """Print the chapter's claims, each against a closed form; draw synthetic.png."""
    claims = common.Claims()
    K = 6
    y = torch.arange(K)
    ray = 1.0 + y[:, None].double()  # one ReLU unit, (K, 1)
    arc = spherize(torch.linspace(-0.5, 0.5, K).double()[:, None], 5.0)  # one angle, (K, 2)
    logits = {
        "6 classes of one ReLU unit and a bias: accuracy": (1, ray @ ray.T - ray.T**2 / 2),
        "   without the bias, chance 1/6": (1 / K, ray @ ray.T),
        "   by angle, chance 1/6": (1 / K, common.unit(ray) @ common.unit(ray).T),
        "6 classes of one angle, no bias: accuracy": (1, arc @ arc.T),
        "   by angle": (1, common.unit(arc) @ common.unit(arc).T),
    }
    for claim, (theory, z) in logits.items():
        claims.equal(claim, theory, float((z.argmax(1) == y).double().mean()), 0)
    # In float32, and where rounding errors add up: all angles alike
    z = torch.tensor([0, 0.3, 0.9, -0.9, -3, 3, -50, 50])
    x = spherize(z[:, None].expand(-1, 4096), 5.0).double()
    norm = x.norm(dim=1) / 5
    farthest = float(norm[(norm - 1).abs().argmax()])
    smallest = float(x[:, -1].min()) / 5 / 1e-6
    claims.equal("4096 angles, float32: the point is on the sphere, norm / radius", 1, farthest, 1e-6)
    claims.equal("   no coordinate fades below delta: smallest / delta", 1, smallest, 2e-5)
    figure = Figure(figsize=(8, 4), layout="constrained")
    look = common.styles(range(K))
    drawn = {"one ReLU unit": F.pad(ray, (0, 1)), "one angle": arc}
    for plot, (title, points) in zip(figure.subplots(1, 2), drawn.items(), strict=True):
        for k, (u, v) in enumerate(points.tolist()):
            plot.plot([0, u], [0, v], color="0.8", zorder=1)
            plot.plot(u, v, ls="", markersize=9, label=f"class {k}", **look[k])
        plot.set(title=title, xlabel="first coordinate of the feature", ylabel="second coordinate")
        plot.set_aspect("equal", adjustable="datalim")
    figure.legend(*plot.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    common.save_figure(folder / "synthetic.png", figure)
    return claims.report(folder / "synthetic.png")


# %% [markdown]
# # 3. Network
# %%
def mlp(shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    """784-500-300 on MNIST: layers, images (B, C, H, W) -> z (B, n) before any activation, and n."""
    return [nn.Flatten(), nn.Linear(math.prod(shape), 500), nn.ReLU(), nn.Linear(500, 300)], 300


def lenet(shape: tuple[int, int, int]) -> tuple[list[nn.Module], int]:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; 28 x 28 is padded to its 32 x 32."""
    H, W, C = shape
    pad = 2 if H == 28 else 0
    h, w = (((side + 2 * pad - 4) // 2 - 4) // 2 for side in (H, W))
    if min(h, w) < 1:
        raise common.UserError(f"--net lenet: needs images of 16 x 16 or more, not {H} x {W}")
    layers = [nn.ZeroPad2d(pad), nn.Conv2d(C, 6, 5), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * h * w, 120), nn.ReLU(), nn.Linear(120, 84)]
    return layers, 84


class CosineHead(nn.Linear):
    """Features h (B, d) -> logits cos(h, w_k) (B, K), from -1 to 1."""

    def forward(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).T


def build_classifier(args: argparse.Namespace, name: str, data: common.Dataset) -> nn.ModuleDict:
    """Images (B, C, H, W) -> trunk -> z (B, n) -> layer -> h (B, d) -> head -> logits (B, K)."""
    layers, n = {"mlp": mlp, "lenet": lenet}[args.net](tuple(data.train_x.shape[1:]))
    if name.endswith("-3d"):
        layers += [nn.ReLU(), nn.Linear(n, 2 if name == "sphere-3d" else 3)]
        n = layers[-1].out_features
    scale = 1.0 if name == "sphere-3d" else args.scale  # at 5 its angles would end at 0 or 90 degrees
    on_sphere = name.startswith("sphere")
    layer = Spherization(n, args.radius, scale) if on_sphere else nn.ReLU()
    Head = CosineHead if name == "cosine" else nn.Linear
    head = Head(n + on_sphere, len(data.classes), bias=name.startswith("plain"))
    return nn.ModuleDict({"trunk": nn.Sequential(*layers), "layer": layer, "head": head})


# %%
def build_embedding(args: argparse.Namespace, name: str, data: common.Dataset) -> nn.ModuleDict:
    """Conv-4 (Snell et al. 2017): images (B, C, H, W) -> trunk -> z (B, 64) -> layer -> h (B, d)."""
    last = name.partition("+")[2]
    H, W, C = data.train_x.shape[1:]
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(C, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        C = 64
        if min(H, W) >= 4:  # 32 -> 2, 84 -> 5; digits 8 -> 2
            layers.append(nn.MaxPool2d(2))
            H = H // 2
            W = W // 2
    if last:  # as released, for the layer; it has the size of what is left of the image
        layers += [nn.Conv2d(64, 64, (H, W), bias=False), nn.BatchNorm2d(64)]
    else:
        layers.append(nn.MaxPool2d((H, W)))
    layer = Spherization(64, args.radius, args.scale) if last == "sphere" else nn.Identity()
    return nn.ModuleDict({"trunk": nn.Sequential(*layers, nn.Flatten()), "layer": layer})


# %%
class Encoder(nn.Module):
    """Two blocks: tokens (B, T) of V, attention_mask (B, T), False for padding -> (states (B, T, d),)."""

    def __init__(self, V: int, d: int = 64):
        super().__init__()
        self.tokens = nn.Embedding(V, d)
        self.tokens.weight.data *= 0.1  # small, since they name the tokens too
        self.places = nn.Parameter(0.1 * torch.randn(7, d))
        self.norm = nn.LayerNorm(d)
        gelu = nn.Sequential(nn.GELU())  # a bare GELU's fused inference would pass by what replaces it
        block = nn.TransformerEncoderLayer(d, 4, 4 * d, 0.0, gelu, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        u = self.norm(self.tokens(tokens) + self.places[: tokens.shape[1]])
        return (self.blocks(u, src_key_padding_mask=~attention_mask),)


def pretrained(kind: str, model: str, **options):
    """What transformers' class `kind` loads from --model: weights, no code. Raises UserError."""
    try:
        import transformers  # optional, and slow to import

        transformers.utils.logging.set_verbosity_error()
        return getattr(transformers, kind).from_pretrained(model, **options)
    except Exception as error:  # of many kinds
        reason = str(error).partition("\n")[0]
        raise common.UserError(f"--model {model}: cannot be loaded by transformers ({reason})") from None


def build_encoder(args: argparse.Namespace, name: str, data: "Language") -> nn.ModuleDict:
    """The encoder of --model, or our own; for sphere methods with the layer in its last block."""
    if not args.model:
        encoder = Encoder(data.mask + 1)
    else:
        encoder, report = pretrained("AutoModel", args.model, use_safetensors=True, output_loading_info=True)
        absent = [key for key in sorted(report["missing_keys"]) if "pooler" not in key]
        if absent:
            raise common.UserError(f"--model {args.model}: has no weights for {absent[0]}")
        sizes = encoder.get_input_embeddings().embedding_dim, encoder.config.hidden_size
        if sizes[0] != sizes[1]:  # the embeddings are to name the tokens
            raise common.UserError(f"--model {args.model}: embeddings of {sizes[0]}, states of {sizes[1]}")
    if name == "sphere+tuned":
        try:
            spherize_last_block(encoder, args.radius, args.scale)
        except ValueError as error:
            raise common.UserError(f"--model {args.model}: {error}") from None
    return nn.ModuleDict({"encoder": encoder.float()})


# %% [markdown]
# # 4. Training

# %%
METHODS = {
    "retain": {
        "plain": "ReLU and a linear layer with bias: the baseline",
        "sphere": "the Spherization layer and a linear layer without bias",
        "plain-3d": "the baseline with features of three dimensions",
        "sphere-3d": "two angles: features on an eighth of a sphere",
    },
    "overlap": {
        "none": "inner product, no bias",
        "sphere": "the Spherization layer, inner product, no bias",
        "cosine": "cosine, whatever the lengths of features and class vectors",
    },
    "fewshot": {
        "euclidean": "Conv-4 as it is, squared distance to a prototype",
        "euclidean+last": "a convolution for its last max-pool",
        "euclidean+sphere": "that, and the Spherization layer",
        "cosine": "Conv-4 as it is, cosine to a prototype",
        "cosine+last": "a convolution for its last max-pool",
        "cosine+sphere": "that, and the Spherization layer",
    },
    "analogy": {
        "plain": "the encoder as it is before training",
        "plain+tuned": "trained to name the tokens of sentences: the baseline",
        "sphere+tuned": "the same with the Spherization layer in the last block",
    },
}
RECIPES = {  # network, data; those of digits and of our own encoder are ours
    "mlp": dict(epochs=100, batch_size=256, lr=1e-3, weight_decay=5e-5),
    "mlp digits": dict(epochs=80, batch_size=64, lr=5e-3),
    "lenet": dict(epochs=20, batch_size=128, lr=1e-3, weight_decay=0.0),
    "conv4": dict(epochs=100, batch_size=100, lr=1e-4, weight_decay=0.0),
    "conv4 digits": dict(epochs=5, lr=1e-3),
    "encoder": dict(epochs=12, batch_size=64, lr=3e-3, weight_decay=0.0),
    "pretrained": dict(epochs=3, batch_size=8, lr=1e-4, weight_decay=0.0),
}


def learning_rate(epoch: int, args: argparse.Namespace) -> float:
    """--lr: Conv-4 halves it after each tenth of the epochs; digits have a tenth of it in the last fifth."""
    if args.net == "conv4":
        return args.lr * 0.5 ** (10 * epoch // args.epochs)
    last = common.split_name(args.dataset)[0] == "digits" and epoch / args.epochs >= 0.8
    return args.lr * 0.1 if last else args.lr


# %% [markdown]
# ## Images: batches of all classes, or (few-shot) an episode per step
# FC100 tests on 20 classes of CIFAR-100 and trains on 60 (Oreshkin et al. 2018); else halves.
# %%
WAY = 5  # classes of an episode, each with
SHOTS = 5  # labelled images and
QUERIES = 15  # images to be classified
FC100 = {"train": (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19), "test": (0, 7, 12, 14)}  # superclasses


def split_by_class(args: argparse.Namespace, data: common.Dataset) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of the classes to train and to test on. Raises UserError for too few of them."""
    x = torch.cat([data.train_x, data.test_x])
    y = torch.cat([data.train_y, data.test_y])
    K = len(data.classes)
    groups = {"train": range(K // 2), "test": range(K // 2, K)}
    group = torch.arange(K)
    if common.split_name(args.dataset)[0] == "cifar100":
        groups = FC100
        group, _ = common.coarse_labels(data.classes, "superclasses")  # (K,)
    pools = {split: torch.isin(group[y], torch.tensor(some)) for split, some in groups.items()}
    for split, pool in pools.items():
        try:
            draw_episodes(y[pool], 1, WAY, SHOTS + QUERIES, torch.Generator())
        except ValueError as error:
            raise common.UserError(f"--dataset {args.dataset}, to {split} on: {error}") from None
    return {split: (x[pool], y[pool]) for split, pool in pools.items()}


# %%
def train_images(args: argparse.Namespace, run: common.Run, data: common.Dataset) -> dict:
    """Train one method with one seed, from its last checkpoint on. Returns what was measured at the end."""
    few_shot = args.task == "fewshot"
    metric = run.name.partition("+")[0]
    x, y = split_by_class(args, data)["train"] if few_shot else (data.train_x, data.train_y)
    torch.manual_seed(run.seed)  # initial weights
    generator = torch.Generator().manual_seed(run.seed)  # order, episodes
    build = build_embedding if few_shot else build_classifier
    model = build(args, run.name, data).to(run.device, memory_format=torch.channels_last)
    trunk, layer, *head = run.prepare(model)  # speed only: --compile
    optimizer = torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=run.fused)
    images = common.Batches(x, data.mean, data.std, device=run.device)
    queries = torch.arange(WAY, device=run.device).repeat_interleave(QUERIES)  # (WAY * QUERIES,)

    for epoch in run.epochs(args.epochs, model=model, optimizer=optimizer, generator=generator):
        optimizer.param_groups[0]["lr"] = learning_rate(epoch, args)
        if few_shot:
            order = draw_episodes(y, args.episodes, WAY, SHOTS + QUERIES, generator).flatten()
        else:
            order = torch.randperm(len(y), generator=generator)
        labels = y[order].to(run.device)
        model.train()
        for part, batch in images.epoch(order, args.batch_size):  # (B, C, H, W); few-shot: one episode
            with run.autocast():  # bf16 inside the network only
                z = trunk(batch)  # (B, n)
            h = layer(z.float())  # (B, d); d = n + 1 and ||h|| = r on the sphere
            if few_shot:
                logits = prototype_logits(h.view(1, WAY, SHOTS + QUERIES, -1), SHOTS, metric)[0]
                loss = F.cross_entropy(logits, queries)
            else:
                loss = F.cross_entropy(head[0](h), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)  # stays on the device; read once per epoch
        if run.is_test_epoch(epoch) and not few_shot:  # every --eval-every epochs, and after the last one
            h = embed(model, data.test_x, data, run)
            run.log(accuracy=share_right(model["head"](h).argmax(1), data.test_y))
    return (measure_prototypes if few_shot else measure_classifier)(args, run, model, data)


# %% [markdown]
# ## A small language of stems and forms, `7+2`
# The form decides the word before and the one behind, the stem the next two, except for a quarter of them.
# %%
def small_language(N: int = 3000) -> "Language":
    """N sentences of five words, and questions as 7+2 : 7+3 :: 9+2 : 9+3. 25 stems, 4 forms."""
    random = np.random.default_rng(0)
    sentences = []
    for stem, form in random.integers([25, 4], size=(N, 2)):
        anything = random.integers([4, 4, 25, 25])
        kinds = np.where(random.random(4) < 0.25, anything, [form, form, stem, stem])
        names = zip(("before", "behind", "topic", "topic"), kinds, random.integers(3, size=4), strict=True)
        first, *others = [f"{name}{kind}.{which}" for name, kind, which in names]
        sentences.append([first, f"{stem}+{form}", *others])
    questions = []
    for f, g in itertools.combinations(range(4), 2):
        pairs = itertools.permutations(range(25), 2)
        questions += [[f"{i}+{f}", f"{i}+{g}", f"{j}+{f}", f"{j}+{g}"] for i, j in pairs]
    words = sorted({word for line in sentences + questions for word in line})
    token = {word: (i,) for i, word in enumerate(words)}
    sentences = [[token[word] for word in line] for line in sentences]
    questions = [[token[word] for word in line] for line in questions]
    return Language(sentences, questions, len(words), len(words) + 1, len(words) + 2)


# %% [markdown]
# ## Words are compared by their tokens
# A tokenizer splits a line into pieces, `Paris,` into `Paris` and a comma. Equal tokens are one word.
# %%
class Language(NamedTuple):
    """Sentences and analogy questions, in pieces, which are tuples of tokens."""

    sentences: list[list[tuple]]
    questions: list[list[tuple]]  # a, b, c, d
    begin: int  # the token before a sentence,
    end: int  # the one after it,
    mask: int  # and the one that hides another; of the small language's tokens the last

    @property
    def fingerprint(self) -> str:
        return f"{zlib.crc32(repr(tuple(self)).encode()):08x}"

    def batch(self, lines: list[list[tuple]], target: tuple = ()) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, attention mask, and which tokens are the word `target`: (B, T) each."""
        rows = []
        for line in lines:
            inner = [(token, piece == target) for piece in line for token in piece]
            rows.append(torch.tensor([(self.begin, 0), *inner, (self.end, 0)]))
        tokens, is_target = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).unbind(2)
        return tokens.clamp_min(0), tokens >= 0, is_target == 1


# %%
def read_lines(path: Path) -> list[str]:
    """The lines that have a word. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise common.UserError(f"{path}: cannot be read as text ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def pretrained_language(args: argparse.Namespace) -> Language:
    """--text and --analogies, split by the tokenizer of --model. Raises UserError."""
    tokenizer = pretrained("AutoTokenizer", args.model, add_prefix_space=True)  # RoBERTa: a word's space
    positions = getattr(pretrained("AutoConfig", args.model), "max_position_embeddings", 512)
    most = min(128, positions - 2) - 2  # without begin and end; RoBERTa counts positions from 2
    special = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
    if None in special or not tokenizer.is_fast:
        raise common.UserError(f"--model {args.model}: expected a fast tokenizer with [CLS], [SEP], [MASK]")

    def split(line: str) -> list[tuple]:
        encoded = tokenizer(line, add_special_tokens=False, truncation=True, max_length=most + 1)
        pieces = {}
        for i, token in zip(encoded.word_ids(), encoded["input_ids"], strict=True):
            pieces.setdefault(i, []).append(token)
        if len(encoded["input_ids"]) > most:  # the last piece may be cut
            pieces.popitem()
        return [tuple(tokens) for tokens in pieces.values()]

    questions = []
    for line in read_lines(args.analogies):
        if line[0] == ":":  # the name of a section
            continue
        if len(line.split()) != 4:
            raise common.UserError(f"--analogies {args.analogies}: {line!r}, expected four words")
        four = split(line)  # left out where they are not four different pieces that the tokenizer knows
        if len(four) == len(set(four)) == 4 and tokenizer.unk_token_id not in sum(four, ()):
            questions.append(four)
    return Language([split(line) for line in read_lines(args.text)], questions, *special)


def prepare_language(args: argparse.Namespace) -> Language:
    """What --text and --analogies hold, or the small language; settles args.device and args.precision."""
    args.device = common.pick_device(args.device)
    args.precision = common.pick_precision(args.precision, args.device)
    if args.model:
        data = pretrained_language(args)
    else:
        torch.set_num_threads(1)  # so small that more threads are slower
        data = small_language()
    if args.dry_run:
        data = data._replace(sentences=data.sentences[: 2 * args.batch_size])
    words = {word for four in data.questions for word in four}
    if not data.sentences or not words:
        raise common.UserError("--text, --analogies: no sentence, or no question of words that --model knows")
    sizes = f"{len(data.questions):,} questions of {len(words):,} words"
    lost = len(words.difference(*data.sentences))
    print(f"{len(data.sentences):,} sentences; {sizes}, of which {lost:,} stand in no sentence")
    print(f"{common.hardware(args.device)}, {args.precision}; into {args.folder}")
    return data


# %% [markdown]
# ## An encoder learns to name the tokens of sentences by its input embeddings
# [released: no token masked, SGD without momentum] Our own small encoder has a fifth masked, and Adam.
# %%
def train_encoder(args: argparse.Namespace, run: common.Run, data: Language) -> dict:
    """Train one encoder with one seed; returns which analogies its word vectors answer."""
    torch.manual_seed(run.seed)  # initial weights and dropout
    generator = torch.Generator().manual_seed(run.seed)  # order and masks
    model = build_encoder(args, run.name, data).to(run.device)
    (encoder,) = run.prepare(model)  # speed only: --compile
    E = model["encoder"].get_input_embeddings().weight  # (V, d)
    sgd_or_adam = torch.optim.SGD if args.model else torch.optim.Adam
    optimizer = sgd_or_adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=run.fused)
    masked = 0.0 if args.model else 0.2
    epochs = args.epochs if run.name.endswith("+tuned") else 0

    for _ in run.epochs(epochs, model=model, optimizer=optimizer, generator=generator):
        model.train()
        order = torch.randperm(len(data.sentences), generator=generator)
        for part in order.split(args.batch_size):
            tokens, attention_mask, _ = data.batch([data.sentences[i] for i in part])  # (B, T) each
            hidden = torch.rand(tokens.shape, generator=generator) < masked
            shown = tokens.masked_fill(hidden, data.mask).to(run.device)
            names = tokens[attention_mask].to(run.device)  # masked or not
            attention_mask = attention_mask.to(run.device)
            with run.autocast():  # bf16 inside the network only
                h = encoder(shown, attention_mask)[0]  # (B, T, d)
                z = h[attention_mask] @ E.T  # (tokens, V)
            loss = F.cross_entropy(z.float(), names)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.add_loss(loss)
    return measure_analogies(args, run, model["encoder"], data)


# %% [markdown]
# # 5. Results
# %%
@torch.no_grad()
def embed(model: nn.ModuleDict, images: Tensor, data: common.Dataset, run: common.Run) -> Tensor:
    """Features h (N, d) of every image in order, without augmentation."""
    model.eval()
    parts = []
    for _, x in common.Batches(images, data.mean, data.std, device=run.device).all(500):
        with run.autocast():
            z = model["trunk"](x)
        parts.append(model["layer"](z.float()))
    return torch.cat(parts)


def share_right(prediction: Tensor, y: Tensor) -> float:
    """Share of the classes predicted (N,) that are those of y (N,)."""
    return float((prediction == y.to(prediction.device)).double().mean())


TAUS = (1e-4, 1e-3, 1e-2, 5e-2, 0.1)  # 1 - cosine: 0.8, 2.6, 8, 18, 26 degrees
KEPT = 10_000  # training images that are measured, so that features.npz stays small


def measure_classifier(args: argparse.Namespace, run: common.Run, model: nn.ModuleDict, data: common.Dataset):
    """Everything that is measured after training a classifier; writes features.npz."""
    head = model["head"]
    kept = common.keep_per_class(data.train_y, KEPT // len(data.classes))
    train_h = embed(model, data.train_x[kept], data, run)
    train_y = data.train_y[kept].to(train_h.device)
    test_h = embed(model, data.test_x, data, run)
    test_y = data.test_y.to(test_h.device)
    W = F.normalize(head.weight, dim=1) if isinstance(head, CosineHead) else head.weight  # (K, d)
    bias = {} if head.bias is None else {"b": head.bias}
    run.save_features(train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W, **bias)
    M = common.class_means(train_h, train_y, len(W))
    norm = test_h.double().norm(dim=1)
    result = {
        "accuracy": share_right(head(test_h).argmax(1), test_y),
        "train_accuracy": share_right(head(train_h).argmax(1), train_y),
        "angle_accuracy": share_right(common.logits(test_h, common.unit(M).nan_to_num()).argmax(1), test_y),
        "norm_spread": float(norm.std(correction=0) / norm.mean().clamp_min(1e-12)),
        "within_cosine": float(F.cosine_similarity(test_h.double(), M[test_y], dim=1).mean()),
    }
    if args.task == "overlap":
        wrong = head(test_h).argmax(1) != test_y
        gap = 1 - overlap(test_h, test_y)
        result["near_shares"] = [float((gap < tau).double().mean()) for tau in TAUS]
        result["near_errors"] = [float(wrong[gap < tau].double().mean()) for tau in TAUS]  # share of these
        result["near"] = result["near_shares"][2]  # tau = 0.01
    return result


def measure_prototypes(args: argparse.Namespace, run: common.Run, model: nn.ModuleDict, data: common.Dataset):
    """Accuracy with 1 and 5 shots, of test and training classes; writes features.npz, which has no W."""
    metric = run.name.partition("+")[0]
    result = {"chance": 1 / WAY}
    features = {}
    for split, (x, y) in split_by_class(args, data).items():
        h = embed(model, x, data, run)
        queries = torch.arange(WAY, device=h.device).repeat_interleave(QUERIES)
        for shots, key in ((1, "accuracy_1shot"), (SHOTS, "accuracy")):
            generator = torch.Generator().manual_seed(0)  # the same episodes in every run
            right = []
            for episodes in draw_episodes(y, args.test_episodes, WAY, shots + QUERIES, generator).split(50):
                z = prototype_logits(h[episodes.to(h.device)], shots, metric)  # (50, WAY * QUERIES, WAY)
                right.append((z.argmax(2) == queries).double().mean(1))
            result[key if split == "test" else f"train_{key}"] = float(torch.cat(right).mean())
        kept = common.keep_per_class(y, KEPT // len(y.unique()))
        features |= {f"{split}_h": h[kept.to(h.device)], f"{split}_y": y[kept]}
    run.save_features(**features)
    return result


@torch.no_grad()
def word_vectors(encoder: nn.Module, words: list[tuple], contexts: int, data: Language, run: common.Run):
    """Hidden states and input embeddings of n words, (n, d) each: means over sentences, or of it alone."""
    encoder.eval()
    states = []
    inputs = []
    for word in words:
        lines = list(itertools.islice((line for line in data.sentences if word in line), contexts))
        tokens, attention_mask, its = (x.to(run.device) for x in data.batch(lines or [[word]], word))
        with run.autocast():
            h = encoder(tokens, attention_mask)[0]  # (B, T, d)
        states.append(h[its].double().mean(0))
        inputs.append(encoder.get_input_embeddings()(tokens[its]).double().mean(0))
    return torch.stack(states).cpu(), torch.stack(inputs).cpu()


def measure_analogies(args: argparse.Namespace, run: common.Run, encoder: nn.Module, data: Language) -> dict:
    """Shares of questions that are answered right."""
    words = sorted({word for four in data.questions for word in four})
    number = {word: i for i, word in enumerate(words)}
    questions = torch.tensor([[number[word] for word in four] for four in data.questions])  # (Q, 4)
    states, inputs = word_vectors(encoder, words, args.contexts, data, run)
    return {
        "offset": float(answer_analogies(states, questions).double().mean()),
        "inputs": float(answer_analogies(inputs, questions).double().mean()),
        "chance": 1 / (len(words) - 3),
    }


BARS = {"fewshot": {"1 shot": "accuracy_1shot", "5 shots": "accuracy"}, "analogy": {"3CosAdd": "offset"}}
COLUMNS = {  # entry of result.json: title, unit, what it is
    "accuracy": ("accuracy", "%", "of the test images after the last epoch, or of queries with 5 shots"),
    "train_accuracy": ("train", "%", "the same of the training images (10,000 at most), or classes"),
    "best_accuracy": ("best", "%", "highest accuracy of the tested epochs, chosen on the test set"),
    "angle_accuracy": ("by angle", "%", "right by the nearest class mean, by cosine"),
    "norm_spread": ("norm spread", "%", "std / mean of the test features' lengths; 0 on a sphere"),
    "within_cosine": ("within cos", "", "mean cosine of a test feature and the mean of its class"),
    "near": ("near", "%", "of the test samples with 1 - cosine < 0.01 to one of another class"),
    "accuracy_1shot": ("1-shot", "%", "of queries with one labelled image per class"),
    "offset": ("3CosAdd", "%", "of the questions whose d is the word nearest to b - a + c"),
    "inputs": ("inputs", "%", "3CosAdd of the same model's input embeddings"),
    "chance": ("chance", "%", "by chance: one of five classes, or of the questions' words but a, b and c"),
}


def draw_figures(folder: Path, runs: list[common.Run]) -> None:
    """The one figure of a task: means over seeds, or the first seed's features of three dimensions."""
    task = folder.parent.name
    style = common.styles(METHODS[task])
    results = {}  # {method: its seeds' results}
    for run in runs:
        results.setdefault(run.name, []).append(run.finished)
    if task == "overlap":
        points = {}
        for name, seeds in results.items():
            points[name] = (TAUS, 100 * np.mean([seed["near_shares"] for seed in seeds], 0))
        axes = {"xlabel": "tau = 1 - cosine", "ylabel": "test samples near another class (%)"}
        common.curves(folder / "overlap.png", points, style, xscale="log", **axes)
    elif task in BARS:
        bars = {}
        for name, seeds in results.items():
            values = {title: [100 * seed[key] for seed in seeds] for title, key in BARS[task].items()}
            label = f"{name}  {',  '.join(common.mean_std(of, 1) for of in values.values())}"
            bars[label] = values
            style[label] = style[name]
        axes = {"ylabel": "answered right (%), from chance on", "ylim": (100 * seeds[0]["chance"], None)}
        common.bars(folder / f"{task}.png", bars, style, **axes)
    elif any(name.endswith("-3d") for name in results):
        draw_octant(folder / "octant.png", runs)


def draw_octant(path: Path, runs: list[common.Run]) -> None:
    """Test features of three dimensions, first seed, each its class's number, and the sphere's octant."""
    first = {run.name: run for run in reversed(runs) if run.name.endswith("-3d")}
    figure = Figure(figsize=(6 * len(first), 6), layout="constrained")
    for i, (name, run) in enumerate(sorted(first.items())):
        features = run.load_features()
        plot = figure.add_subplot(1, len(first), i + 1, projection="3d")
        for k in np.unique(features["test_y"]):
            some = features["test_h"][features["test_y"] == k][:30]
            plot.plot(*some.T, ls="", marker=f"${k}$", color=f"C{k % 10}", markersize=9, mew=0.3)
        if name == "sphere-3d":
            arc = np.linspace(0, np.pi / 2, 50)
            quarter = np.linalg.norm(some[0]) * np.array([np.cos(arc), np.sin(arc), 0 * arc])
            for axis in range(3):
                plot.plot(*np.roll(quarter, axis, 0), color="0.6")
        plot.set(title=name, xlabel="$x_1$", ylabel="$x_2$", zlabel="$x_3$")
        plot.view_init(elev=30, azim=45)
        plot.set_box_aspect(None, zoom=0.85)  # room for the labels
    common.save_figure(path, figure)


# %% [markdown]
# # 6. Command line
# %%
def prepare_images(args: argparse.Namespace) -> common.Dataset:
    """The images of --dataset. Raises UserError."""
    data = common.prepare_data(args, per_class=SHOTS + QUERIES if args.task == "fewshot" else 0)
    if args.task == "fewshot":
        split_by_class(args, data)  # fail early: are there classes and images enough?
    elif common.split_name(args.dataset)[0] != "digits":  # as released: pixels 0 to 1
        data = data._replace(mean=torch.zeros_like(data.mean), std=torch.ones_like(data.std))
    return data


TASKS = {  # networks; how data, model and run are made
    "retain": (("mlp", "lenet"), prepare_images, build_classifier, train_images),
    "overlap": (("mlp", "lenet"), prepare_images, build_classifier, train_images),
    "fewshot": (("conv4",), prepare_images, build_embedding, train_images),
    "analogy": (("encoder",), prepare_language, build_encoder, train_encoder),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with every default filled in. Raises UserError."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--task", "--net", "--model"):  # methods and defaults depend on these
        first.add_argument(flag, nargs="?")
    given = first.parse_known_args(argv)[0]
    task = given.task if given.task in TASKS else "retain"  # what is invalid is reported below
    nets = TASKS[task][0]
    net = given.net if given.net in nets else nets[0]
    recipe = "pretrained" if task == "analogy" and given.model else net
    recipes = {"": RECIPES[recipe], "digits": RECIPES.get(f"{recipe} digits", {})}
    flags = common.Flags("spherization", __doc__)
    add = flags.add_argument
    add("--task", choices=list(TASKS), default=task, help="what is compared; each has its own --help")
    add("--net", choices=nets, default=net, help="network")
    add("--radius", type=float, default=5.0, help="r")
    add("--scale", type=float, default=5.0, help="s at the start; 1 for three dimensions")
    add("--episodes", type=int, default=100, help="fewshot: of an epoch")
    add("--test-episodes", type=int, default=2000, help="fewshot: of the test")
    add("--model", help="analogy: an encoder's name or folder, for transformers (default: a small one)")
    add("--text", type=Path, help="analogy: sentences, one per line (default: a small language)")
    add("--analogies", type=Path, help="analogy: questions, as in questions-words.txt")
    add("--contexts", type=int, default=4, help="analogy: sentences for a word's vector")
    args = flags.parse(argv, METHODS[task], list(METHODS[task]), recipes, eval_every=5)
    files = [args.model, args.text, args.analogies]
    if any(files) and not (all(files) and task == "analogy"):
        raise common.UserError("--model, --text and --analogies: all three go together, with --task analogy")
    if task == "analogy" and args.dataset != "digits":
        raise common.UserError(f"--dataset {args.dataset}: --task analogy has --text instead")
    if task == "fewshot" and args.batch_size != WAY * (SHOTS + QUERIES):
        raise common.UserError(f"--batch-size {args.batch_size}: an episode has 100 images")
    if args.dry_run:
        args.episodes = 2
        args.test_episodes = 20
    names = [args.folder.name, net]
    if task == "analogy":
        names = [args.text.stem, Path(args.model).name] if args.model else ["language", net]
    args.folder = args.folder.parent / task / "-".join(names)
    return args


@common.own_torch_settings()
def main(argv: list[str] | None = None) -> dict:
    """Train every method with every seed, print the table, draw the figure. Raises UserError."""
    args = parse(argv)
    if args.synthetic:
        return check_theory(args.out / "spherization" / "synthetic")
    _, prepare, build, train = TASKS[args.task]
    data = prepare(args)
    for name in args.method:  # fail early: build every model first
        build(args, name, data)
    for run in common.runs(args, data):
        run.finish(train(args, run, data))
    runs = common.finished_runs(args, data)
    common.print_table(runs, COLUMNS, METHODS[args.task])
    draw_figures(args.folder, runs)
    return {"results": [run.finished for run in runs], "folder": str(args.folder)}


if __name__ == "__main__":
    common.command_line(main)
