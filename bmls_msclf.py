"""placeholder"""

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common import (
    SPECS,
    Batches,
    ClassCycles,
    Dataset,
    Run,
    UserError,
    accuracy_per_class,
    collapse_metrics,
    cosines,
    expected_calibration_error,
    hardware,
    load_dataset,
    mean_pairwise_cosine,
    mean_std,
    pick_device,
    pick_precision,
    shot_groups,
    split_evenly,
    table,
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
    return (
        lam * F.cross_entropy(z, a, reduction="none") + (1 - lam) * F.cross_entropy(z, b, reduction="none")
    ).mean()


def remix_lam(lam: Tensor, n_a: Tensor, n_b: Tensor, kappa: float = 3.0, tau: float = 0.5) -> Tensor:
    """Remix (Chou et al. 2020): the images mix by lam, the label goes wholly to a much smaller class.

    n_a, n_b (B,) training images of the two classes, lam (B,) or (1,) -> the label's lam, (B,)
    """
    lam_y = lam.expand(len(n_a))
    lam_y = torch.where((n_a >= kappa * n_b) & (lam < tau), 0.0, lam_y)  # b is the rare one
    return torch.where((kappa * n_a <= n_b) & (1 - lam < tau), 1.0, lam_y)  # a is


# The Mixed-Singleton classifier reads the mixed label (i, j, lam) as a class of its own, with the class vector
#     v_ij = lam w_i + (1 - lam) w_j
# and its loss is a softmax over mixed class vectors at the batch's lam. The abstract gives no formula; these
# are three readings of it, none of them confirmed.


def ms_raw(z: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, raw: softmax over all K^2 mixed vectors v_ij as they are. z (B, K) logits -> scalar.

    A logit h . v_ij = lam z_i + (1 - lam) z_j is a sum, so the K^2-way softmax is a product of two K-way ones:
    O(K), and the whole loss is Mixup's with lam moved inside the softmax, where it acts as a temperature.
    """
    # L = -log exp(lam z_a + (1-lam) z_b) / sum_ij exp(lam z_i + (1-lam) z_j) = CE(lam z, a) + CE((1-lam) z, b)
    lam = lam[:, None]
    return F.cross_entropy(lam * z, a) + F.cross_entropy((1 - lam) * z, b)


def ms_unit(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor, scale: float) -> Tensor:
    """MS-Clf, unit: softmax over all K^2 normalised mixed vectors. h (B, d), W (K, d) unit rows -> scalar.

    A raw v_ij lies between w_i and w_j, so (i, i) or (j, j) always scores at least as high: the mixed label is
    never strictly the best. At equal length it is (for lam != 1/2, where v_ij = v_ji). O(B K^2) memory.
    """
    lam = lam[:, None, None]
    z, C = h @ W.T, W @ W.T  # (B, K), (K, K)
    # ||v_ij||^2 = lam^2 + (1-lam)^2 + 2 lam (1-lam) w_i . w_j
    norm = (lam**2 + (1 - lam) ** 2 + 2 * lam * (1 - lam) * C).clamp_min(1e-12).sqrt()  # (1 or B, K, K)
    logits = scale * (lam * z[:, :, None] + (1 - lam) * z[:, None, :]) / norm  # (B, K, K)
    return F.cross_entropy(logits.flatten(1), a * len(W) + b)


def ms_dot(h: Tensor, W: Tensor, a: Tensor, b: Tensor, lam: Tensor) -> Tensor:
    """MS-Clf, dot: dot-regression onto the normalised mixed vector. h (B, d), W (K, d) unit rows -> scalar >= 0.

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

    Not ResNet-34, which has 21 M. Images (B, C, H, W) of any size -> features h (B, 64 * width), non-negative.
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
RECIPES = {"digits": (50, 32), "mnist": (40, 128), "fashionmnist": (100, 128)}  # epochs, batch size
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
    """Warm-up to epoch 5 of 200, then --lr, a tenth of it after 160 and a hundredth after 180; else scaled."""
    warmup = max(1, round(args.epochs * 5 / 200))
    done = (epoch + 1) / args.epochs
    return args.lr * min(1, (epoch + 1) / warmup) * (0.01 if done > 0.9 else 0.1 if done > 0.8 else 1)


def train(
    args: argparse.Namespace, name: str, seed: int, data: Dataset, run: Run, device: torch.device
) -> dict:
    """Train one method with one seed in its run folder, from its last checkpoint if there is one; the result."""
    method, K, N = METHODS[name], len(data.classes), len(data.train_y)
    generator = torch.Generator().manual_seed(seed)  # order, augmentation, mixing; all on the CPU
    torch.manual_seed(seed)  # initialisation
    model = build_model(args, method, data).to(device, memory_format=torch.channels_last)
    network = torch.compile(model["network"]) if args.compile else model["network"]
    classifier = model["classifier"]
    learnable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learnable, args.lr, momentum=0.9, weight_decay=args.weight_decay)
    cycles = ClassCycles(data.train_y, K, generator)
    pairs = PairSampler(K, generator, args.pairs)
    batches = Batches(data.train_x, data.mean, data.std, pad=data.pad, flip=data.flip, device=device)
    test = Batches(data.test_x, data.mean, data.std, device=device)
    test_y, counts = data.test_y.to(device), data.counts.to(device)
    groups, rule = shot_groups(data.counts)
    mixed_counts = torch.zeros(K, K, dtype=torch.long)  # how often (a, b) was drawn
    start, best, seconds = 0, 0.0, 0.0

    state = run.load_checkpoint(device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        cycles.load_state_dict({key: value.cpu() for key, value in state["cycles"].items()})
        pairs.load_state_dict(state["pairs"])
        mixed_counts = state["mixed_counts"].cpu()
        start, best, seconds = state["epoch"], state["best"], state["seconds"]

    def checkpoint(epoch: int) -> None:
        run.save_checkpoint(
            dict(
                epoch=epoch,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                generator=generator.get_state(),
                cycles=cycles.state_dict(),
                pairs=pairs.state_dict(),
                mixed_counts=mixed_counts,
                best=best,
                seconds=seconds,
            )
        )

    if state is None:
        checkpoint(0)  # so that Ctrl-C in the first epoch leaves something to resume
    parts = split_evenly(N, args.batch_size)[: 2 if args.dry_run else None]
    bar = tqdm(
        range(start, args.epochs), initial=start, total=args.epochs, desc=f"{name} seed {seed}", disable=None
    )
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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, args)
        losses = torch.zeros(len(parts), device=device)  # read once an epoch: no step waits for the host
        model.train()
        for step, part in enumerate(parts):
            share = lam[step : step + 1] if args.lam == "batch" else lam[part]  # (1,) or (B,)
            x = batches.load(view_a[part])
            if method.loss != "ce":
                mix = share[:, None, None, None]
                x = mix * x + (1 - mix) * batches.load(view_b[part])  # (B, C, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                h = network(x)
            h, W, z = classifier(h)
            if method.loss == "ce":
                loss = F.cross_entropy(z, a[part])
            elif method.loss == "mixup":
                loss = mixup_loss(z, a[part], b[part], share)
            elif method.loss == "remix":
                loss = mixup_loss(z, a[part], b[part], remix_lam(share, counts[a[part]], counts[b[part]]))
            elif args.ms == "raw":
                loss = ms_raw(z, a[part], b[part], share)
            elif args.ms == "unit":
                loss = ms_unit(h, W, a[part], b[part], share, args.scale)
            else:
                loss = ms_dot(h, W, a[part], b[part], share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
        if not losses.isfinite().all():
            bad = int((~losses.isfinite()).nonzero()[0])
            raise UserError(
                f"{name} seed {seed}: the loss is not finite in epoch {epoch + 1}, step {bad + 1}; the last good "
                f"checkpoint is {run.folder / 'checkpoint.pt'} (epoch {epoch}); lower --lr and --overwrite"
            )
        seconds += time.perf_counter() - began
        line = dict(epoch=epoch + 1, lr=learning_rate(epoch, args), loss=float(losses.mean()))
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            z = evaluate(model, test, args.precision)[1]
            per_class = accuracy_per_class(z.argmax(1), test_y, K)
            line["accuracy"] = float((z.argmax(1) == test_y).double().mean())
            line |= {group: float(per_class[members.to(device)].mean()) for group, members in groups.items()}
            line["minority_cosine_W"] = mean_pairwise_cosine(classifier.W.detach(), groups["few"].to(device))
            best = max(best, line["accuracy"])
            bar.set_postfix(loss=f"{line['loss']:.3f}", accuracy=f"{100 * line['accuracy']:.2f}")
        line["seconds"] = seconds
        if epoch == 0 and args.epochs > 1:
            whole = (time.perf_counter() - began) * (args.epochs - 1)
            tqdm.write(f"{name} seed {seed}: about {whole / 60:.1f} more minutes")
        run.log(line)
        checkpoint(epoch + 1)

    return conclude(
        args,
        name,
        seed,
        data,
        run,
        model,
        batches,
        test,
        mixed_counts,
        rule,
        dict(best=best, seconds=seconds),
    )


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
    for part in split_evenly(batches.N, 1000):
        with torch.autocast(batches.device.type, torch.bfloat16, enabled=precision == "bf16"):
            h = model["network"](batches.load(views[part]))
        h, _, z = model["classifier"](h)
        hs.append(h)
        zs.append(z)
    return torch.cat(hs), torch.cat(zs)


def conclude(args, name, seed, data, run, model, batches, test, mixed_counts, rule, so_far) -> dict:
    """Measure the trained model, write features.npz and result.json; the result."""
    device, K = batches.device, len(data.classes)
    groups, _ = shot_groups(data.counts)
    train_y, test_y = data.train_y.to(device), data.test_y.to(device)
    train_h, train_z = evaluate(model, batches, args.precision)
    test_h, test_z = evaluate(model, test, args.precision)
    W = model["classifier"].W.detach()
    per_class = accuracy_per_class(test_z.argmax(1), test_y, K)
    result = {
        "method": name,
        "seed": seed,
        "epochs": args.epochs,
        "accuracy": float((test_z.argmax(1) == test_y).double().mean()),
        "best_accuracy": so_far["best"],
        **{group: float(per_class[members.to(device)].mean()) for group, members in groups.items()},
        "rule": rule,
        "ece": expected_calibration_error(test_z.softmax(1), test_y),
        "train_accuracy": float((train_z.argmax(1) == train_y).double().mean()),
        **collapse_metrics(train_h, train_y, W, train_z.argmax(1), groups["few"].to(device)),
        "per_class": per_class.tolist(),
        "counts": data.counts.tolist(),
        "seconds": so_far["seconds"],
    }
    run.save_features(
        train_h=train_h, train_y=train_y, test_h=test_h, test_y=test_y, W=W, mixed_counts=mixed_counts
    )
    run.finish(result)
    return result


MARKERS = dict(zip(METHODS, "osv^dPX", strict=True))


def draw_figures(folder: Path, runs: list[Run]) -> None:
    """Four figures of finished runs, one idea each, methods side by side; heat maps show the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_method = {name: [r for r in runs if r.finished["method"] == name] for name in METHODS}
    by_method = {name: found for name, found in by_method.items() if found}
    look = {
        name: dict(color=str(0.7 * (1 - i / max(len(by_method) - 1, 1))), marker=MARKERS[name], label=name)
        for i, name in enumerate(by_method)
    }

    def save(figure, name: str) -> None:
        write_atomically(folder / name, lambda part: figure.savefig(part, dpi=130))
        plt.close(figure)

    # Accuracy against class size: where minority collapse costs
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, found in by_method.items():
        counts = np.array(found[0].finished["counts"])
        accuracy = np.mean([r.finished["per_class"] for r in found], axis=0)
        order = np.argsort(-counts, kind="stable")
        bins = np.array_split(order, min(10, len(order)))  # ten points a curve, also for 100 classes
        axes.plot(
            [counts[b].mean() for b in bins], [100 * np.nanmean(accuracy[b]) for b in bins], **look[name]
        )
    axes.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy (%)")
    axes.legend()
    save(figure, "accuracy_by_class.png")

    # Test accuracy over training
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, found in by_method.items():
        lines = [[e for e in r.history if "accuracy" in e] for r in found]
        epochs = [e["epoch"] for e in lines[0]]
        mean = np.mean([[100 * e["accuracy"] for e in line] for line in lines], axis=0)
        axes.plot(epochs, mean, markevery=max(1, len(epochs) // 8), **look[name])
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.legend()
    save(figure, "training.png")

    def heat_maps(file: str, maps: dict[str, np.ndarray], label: str, axis_label: str, **kwargs) -> None:
        columns = min(4, len(maps))
        rows = -(-len(maps) // columns)
        figure, grid = plt.subplots(
            rows, columns, figsize=(3 * columns + 1, 2.8 * rows + 0.3), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(maps) :]:
            axes.axis("off")
        for axes, (name, values) in zip(grid.flat, maps.items(), strict=False):
            picture = axes.imshow(values, cmap="gray_r", interpolation="nearest", **kwargs)
            axes.set(title=name, xlabel=axis_label, ylabel=axis_label)
        figure.colorbar(picture, ax=grid, label=label)
        save(figure, file)

    # Cosines of the class vectors, head to tail: minority collapse is a dark block at the lower right
    arrays = {name: read_features(found[0].folder) for name, found in by_method.items()}
    order = np.argsort(-np.array(runs[0].finished["counts"]), kind="stable")
    maps = {
        name: cosines(torch.from_numpy(a["W"])).numpy()[np.ix_(order, order)] for name, a in arrays.items()
    }
    heat_maps("class_vectors.png", maps, "cosine of class vectors", "class, largest first", vmin=-1, vmax=1)

    # Mixed labels drawn over the whole training, either order, as a share of their mean
    maps = {}
    for name, a in arrays.items():
        drawn = a["mixed_counts"][np.ix_(order, order)].astype(float)
        if drawn.sum():  # ce mixes nothing
            unordered = drawn + drawn.T - np.diag(np.diag(drawn))  # (i, j) and (j, i) are one mixed label
            maps[name] = np.log10(np.maximum(unordered / unordered[np.triu_indices(len(order))].mean(), 1e-3))
    if maps:
        label = "log10 (times drawn / mean)"
        heat_maps("mixed_labels.png", maps, label, "class, largest first", vmin=-3, vmax=2)


def read_features(folder: Path) -> dict[str, np.ndarray]:
    """A run's features.npz. Raises UserError where it is missing or damaged."""
    try:
        with np.load(folder / "features.npz", allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'features.npz'}: not readable ({error}); --overwrite the run") from None


def results_table(runs: list[Run]) -> str:
    """Mean ± std over seeds, a row a method: last epoch's accuracy first, the best epoch's beside it."""
    rows = []
    for name in METHODS:
        found = [r.finished for r in runs if r.finished["method"] == name]
        if found:
            percent = [mean_std([r[key] for r in found], 2, 100) for key in TABLE_PERCENT]
            geometry = [mean_std([r[key] for r in found], 3) for key in TABLE_GEOMETRY]
            rows.append(
                [name, str(len(found)), *percent, *geometry, f"{np.mean([r['seconds'] for r in found]):.0f}"]
            )
    header = ["method", "seeds", "accuracy %", "best %", "many %", "medium %", "few %", "ECE %"]
    return table([*header, "minority cos", "NC1", "train s"], rows)


TABLE_PERCENT = ("accuracy", "best_accuracy", "many", "medium", "few", "ece")
TABLE_GEOMETRY = ("minority_cosine_W", "nc1")

# %% [6] Command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line instead of the usage text; main turns it into exit code 2
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with each default filled in and each value checked. Raises UserError."""
    parser = Parser(
        prog="bmls_msclf.py",
        description="Minority collapse under Mixup on long tails; Balanced Mixed Label Sampler + Mixed-Singleton classifier.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--dataset",
        default="digitslt",
        help=f"{', '.join(SPECS)} or folder:PATH, with lt for a long tail (cifar100lt)",
    )
    add("--data-dir", type=Path, default=Path("data"), help="where NAME.npz is kept and downloads go")
    add(
        "--out", type=Path, default=Path("runs"), help="run folders go to OUT/bmls_msclf/DATASET/METHOD/seedS"
    )
    add(
        "--method",
        nargs="+",
        default=["ce", "mixup", "bmls+ms"],
        choices=[*METHODS, "all"],
        help="one or more",
    )
    add("--epochs", type=int, help="default: 200; digits 50, mnist 40, fashionmnist 100")
    add("--batch-size", type=int, help="default: 128; digits 32")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--weight-decay", type=float, default=2e-4, help="on all parameters")
    add(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="weights, order, augmentation and mixing; one or more",
    )
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="inside the network only")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    add("--overwrite", action="store_true", help="start runs anew that are there")
    add("--dry-run", action="store_true", help="two steps of one epoch of everything, into OUT/dry-run")
    add(
        "--synthetic",
        action="store_true",
        help="theory check in the layer-peeled model; no data, no training",
    )
    add("--imbalance", type=float, default=100.0, help="largest over smallest class of an lt data set")
    add("--profile", choices=["exp", "step"], default="exp", help="shape of the long tail")
    add("--subset-seed", type=int, default=0, help="which images the long tail keeps")
    add("--image-size", type=int, default=32, help="pixels, for folder:PATH")
    add("--width", type=int, default=1, help="channels of ResNet-32 times this; d = 64 * width")
    add(
        "--classifier", choices=["learnable", "etf"], default="learnable", help="etf: fixed, needs d >= K - 1"
    )
    add(
        "--head",
        choices=["auto", "linear", "cosine"],
        default="auto",
        help="auto: cosine for etf, unit and dot",
    )
    add("--scale", type=float, default=16.0, help="of the cosine head's logits")
    add("--alpha", type=float, default=1.0, help="lam ~ Beta(alpha, alpha)")
    add("--lam", choices=["batch", "pair"], default="batch", help="one lam for each batch or each pair")
    add(
        "--pairs",
        choices=["unordered", "ordered", "distinct"],
        default="unordered",
        help="what BMLS balances",
    )
    add(
        "--ms",
        choices=["raw", "unit", "dot"],
        default="raw",
        help="reading of the Mixed-Singleton classifier",
    )
    add(
        "--eval-every", type=int, default=1, help="epochs between tests on the way; the last is always tested"
    )
    args = parser.parse_args(argv)

    epochs, batch_size = RECIPES.get(args.dataset.partition(":")[0].removesuffix("lt"), PUBLISHED)
    args.epochs = epochs if args.epochs is None else args.epochs
    args.batch_size = batch_size if args.batch_size is None else args.batch_size
    for flag, least in dict(epochs=1, batch_size=2, width=1, eval_every=1, image_size=1).items():
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {least} or more")
    for flag in ("lr", "scale", "alpha"):
        if not 0 < getattr(args, flag) < float("inf"):
            raise UserError(f"--{flag} {getattr(args, flag)}: expected a number above 0")
    if not 0 <= args.weight_decay < 1:
        raise UserError(f"--weight-decay {args.weight_decay}: expected a number from 0 to 1")
    if args.ms == "dot" and args.classifier != "etf":
        raise UserError(
            "--ms dot: has no negatives, so a learnable classifier would collapse; add --classifier etf"
        )
    if args.head == "linear" and (args.ms != "raw" or args.classifier == "etf"):
        raise UserError(
            "--head linear: --ms unit, --ms dot and --classifier etf need unit vectors; use --head cosine"
        )
    args.method = list(METHODS) if "all" in args.method else list(dict.fromkeys(args.method))
    args.seed = list(dict.fromkeys(args.seed))
    if args.dry_run:
        args.epochs, args.overwrite, args.out = 1, True, args.out / "dry-run"
    return args


# Flags that say where or how often, not what is computed: a run may go on with other values of these.
NOT_IN_CONFIG = {"out", "data_dir", "method", "seed", "device", "resume", "overwrite", "synthetic"}


def program(args: argparse.Namespace) -> dict:
    """Every method with every seed, one after another; the table and the figures. Raises UserError."""
    folder = args.out / "bmls_msclf" / args.dataset.replace(":", "-").replace("/", "-")
    if args.synthetic:
        return {
            "ok": synthetic(  # noqa: F821
                args.out / "bmls_msclf" / "synthetic"
            )
        }
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    where = dict(imbalance=args.imbalance, profile=args.profile, subset_seed=args.subset_seed)
    data = load_dataset(args.dataset, args.data_dir, **where, image_size=args.image_size)
    counts, K = data.counts, len(data.classes)
    if len(data.train_y) < 2:
        raise UserError(f"--dataset {args.dataset}: {len(data.train_y)} training image; BatchNorm needs two")
    print(
        f"{args.dataset}: {K} classes, {len(data.train_y):,} training images ({counts.max()} to {counts.min()} "
        f"a class), {len(data.test_y):,} test images\n{hardware(device)}, {args.precision}; "
        f"{' '.join(args.method)}; seeds {args.seed}; {args.epochs} epochs of {len(data.train_y):,} samples, "
        f"batch {args.batch_size}; into {folder}"
    )
    for name in args.method:
        model = build_model(
            args, METHODS[name], data
        )  # says what is wrong with a model before anything is trained
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"ResNet-32, width {args.width}: {parameters:,} parameters, d = {model['network'].d}")
    runs = []
    for name in args.method:
        for seed in args.seed:
            flags = {
                k: str(v) if isinstance(v, Path) else v
                for k, v in vars(args).items()
                if k not in NOT_IN_CONFIG
            }
            flags |= {"method": name, "seed": seed}
            run = Run(
                folder / name / f"seed{seed}", flags, Path(__file__), resume=args.resume, overwrite=args.overwrite,
                device=device,
            )  # fmt: skip
            if run.finished:
                print(
                    f"{name} seed {seed}: {100 * run.finished['accuracy']:.2f}%, done before; --overwrite does it again"
                )
            else:
                train(args, name, seed, data, run, device)
            runs.append(run)
            draw_figures(run.folder, [runs[0], run] if runs[0] is not run else [run])
    print(
        f"\n{results_table(runs)}\n({runs[0].finished['rule']}; last epoch; minority cos: class vectors of the few)"
    )
    draw_figures(folder, runs)
    print(f"figures: {folder}/accuracy_by_class.png, training.png, class_vectors.png, mixed_labels.png")
    return {"results": [run.finished for run in runs], "folder": str(folder)}


def main(argv: list[str] | None = None) -> dict:
    """Run the command line; ends the process with 2 after bad input, 1 after a failed claim, 130 after Ctrl-C."""
    try:
        result = program(parse(argv))
    except UserError as error:
        print(f"bmls_msclf.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = [w for w in (sys.argv[1:] if argv is None else argv) if w not in ("--resume", "--overwrite")]
        print(
            f"\ninterrupted; go on with: python bmls_msclf.py {shlex.join([*words, '--resume'])}",
            file=sys.stderr,
        )
        sys.exit(130)
    if result.get("ok") is False:
        sys.exit(1)
    return result


if __name__ == "__main__":
    main()
