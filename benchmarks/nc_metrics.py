"""Neural collapse of the same features, measured the usual ways and ours: seconds, and error against float64.

    python benchmarks/nc_metrics.py                 # a few minutes on two cores; wants a quiet machine
    python benchmarks/nc_metrics.py --device cuda

All get the same N float32 features. First NC1 = tr(Sigma_W pinv(Sigma_B)) / K alone, in batches of 500:
    per sample         a Python loop over samples that adds up outer products, after one for the means
    class by class     two passes; per batch and class features minus mean, their outer products summed
    two passes         two passes without a loop over samples or classes: means by index_add, then Z^T Z
    raw moments        one pass over sum h h^T and the class sums: fast, and it cancels
    ours               nc1 of common.py: the spread along the K - 1 directions that NC1 needs, in float64
The others are in float32 and end with torch's pinv of the (d, d) matrix. Truth: two passes in float64, the
pseudo-inverse through an SVD of the class means. `near collapse` is the error for other features: shifted by
10, their spread a hundredth. Raw moments are wrong where it matters: they are no rival.
Then NC1 to NC4, CDNV and the trace ratio together, in CPU seconds: `two passes` and what follows from it in
float32, as in the `neural-collapse` package (v0.1, not in the registry), against ours in float64.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    cdnv,
    class_sums,
    equiangularity,
    equinorm,
    hardware,
    logits,
    nc1,
    nearest_mean_mismatch,
    pick_device,
    self_duality,
    simplex_etf_distance,
    table,
    trace_ratio,
)

BATCH = 500


def batches(h, y):
    return zip(h.split(BATCH), y.split(BATCH), strict=True)


def close(scatter, means, N):
    """NC1 from the summed scatter (d, d) and the class means (K, d), in their own precision."""
    M = means - means.mean(0)
    between = M.T @ M / len(M)
    return float(torch.trace(scatter / N @ torch.linalg.pinv(between, hermitian=True)) / len(M))


def per_sample(h, y, K):
    total, n = torch.zeros(K, h.shape[1], device=h.device), torch.zeros(K, device=h.device)
    for x, k in zip(h, y.tolist(), strict=True):
        total[k] += x
        n[k] += 1
    means, scatter = total / n[:, None], torch.zeros(h.shape[1], h.shape[1], device=h.device)
    for x, k in zip(h, y.tolist(), strict=True):
        z = x - means[k]
        scatter += torch.outer(z, z)
    return close(scatter, means, len(h))


def class_by_class(h, y, K):
    total, n = torch.zeros(K, h.shape[1], device=h.device), torch.zeros(K, device=h.device)
    for x, labels in batches(h, y):
        for k in range(K):
            rows = (labels == k).nonzero().flatten()
            total[k] += x[rows].sum(0)
            n[k] += len(rows)
    means, scatter = total / n[:, None], torch.zeros(h.shape[1], h.shape[1], device=h.device)
    for x, labels in batches(h, y):
        for k in range(K):
            rows = (labels == k).nonzero().flatten()
            if len(rows):
                z = x[rows] - means[k]  # (n, d); the outer products of all n at once: (n, d, d)
                scatter += (z[:, :, None] * z[:, None, :]).sum(0)
    return close(scatter, means, len(h))


def means_and_scatter(h, y, K):
    means = torch.zeros(K, h.shape[1], dtype=h.dtype, device=h.device)
    for x, labels in batches(h, y):
        means.index_add_(0, labels, x)
    means /= torch.bincount(y, minlength=K)[:, None]
    scatter = torch.zeros(h.shape[1], h.shape[1], dtype=h.dtype, device=h.device)
    for x, labels in batches(h, y):
        z = x - means[labels]
        scatter += z.T @ z
    return means, scatter


def two_passes(h, y, K):
    means, scatter = means_and_scatter(h, y, K)
    return close(scatter, means, len(h))


def raw_moments(h, y, K):
    means = torch.zeros(K, h.shape[1], device=h.device)
    scatter = torch.zeros(h.shape[1], h.shape[1], device=h.device)
    for x, labels in batches(h, y):
        means.index_add_(0, labels, x)
        scatter += x.T @ x
    n = torch.bincount(y, minlength=K)[:, None]
    means /= n
    return close(scatter - means.T @ (n * means), means, len(h))


def ours(h, y, K):
    return nc1(h, y)[0]


def all_usual(h, y, K, W):
    """NC1 to NC4, CDNV, trace ratio in float32: the sums above, then a pass for variances and decisions."""
    means, scatter = means_and_scatter(h, y, K)
    n = torch.bincount(y, minlength=K)
    square, differs = torch.zeros(K, device=h.device), 0
    for x, labels in batches(h, y):
        square.index_add_(0, labels, (x - means[labels]).square().sum(1))
        differs += ((x @ W.T).argmax(1) != torch.cdist(x, means).argmin(1)).sum()
    M = means - means.mean(0)
    i, j = torch.triu_indices(K, K, 1, device=h.device)
    v = square / n
    return {
        "nc1": close(scatter, means, len(h)),
        "trace_ratio": float(scatter.trace() / len(h) / M.square().sum() * K),
        "cdnv": float(((v[i] + v[j]) / (2 * torch.cdist(means, means)[i, j].square())).mean()),
        "nc2": [f(V) for f in (equinorm, equiangularity, simplex_etf_distance) for V in (M, W)],
        "nc3": [self_duality(W, M), simplex_etf_distance(W, M)],
        "nc4": float(differs / len(h)),
    }


def all_ours(h, y, K, W):
    sums = class_sums(h, y, K)
    M = sums.centred
    return {
        "nc1": nc1(h, y, sums)[0],
        "trace_ratio": trace_ratio(h, y, sums),
        "cdnv": cdnv(h, y, sums),
        "nc2": [f(V) for f in (equinorm, equiangularity, simplex_etf_distance) for V in (M, W)],
        "nc3": [self_duality(W, M), simplex_etf_distance(W, M)],
        "nc4": nearest_mean_mismatch(h, logits(h, W).argmax(1), sums.mean),
    }


def truth(h, y, K):
    """Two passes in float64; pinv(M^T M) = pinv(M) pinv(M)^T, without squaring what is small."""
    h = h.double()
    means = torch.zeros(K, h.shape[1], dtype=h.dtype, device=h.device).index_add_(0, y, h)
    means /= torch.bincount(y, minlength=K)[:, None]
    M = (means - means.mean(0)) / K**0.5  # (K, d), rank min(K - 1, d)
    _, values, V = torch.linalg.svd(M, full_matrices=False)
    rank = min(K - 1, h.shape[1])
    z = (h - means[y]) @ (V[:rank].T / values[:rank])
    return float(z.square().sum() / len(h) / K)


WAYS = {
    "per sample": per_sample,
    "class by class": class_by_class,
    "two passes": two_passes,
    "raw moments": raw_moments,
    "ours": ours,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--samples", type=int, default=50_000, help="N")
    args = parser.parse_args()
    device = pick_device(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(hardware(device))
    for d, K in ((512, 10), (512, 100), (64, 100)):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(K, (args.samples,), generator=generator)
        h = torch.randn(K, d, generator=generator)[y] + torch.randn(len(y), d, generator=generator)
        near = (torch.randn(K, d, generator=generator)[y] + 10 + 0.01 * (h - h.mean(0))).to(device)
        h, y = h.to(device), y.to(device)
        expected, expected_near = truth(h, y, K), truth(near, y, K)
        rows, best = [], {}
        for name, way in WAYS.items():
            # the best of three, so that the machine's other work counts less; the slow ones once
            seconds = []
            for _ in range(1 if name in ("per sample", "class by class") else 4):
                wait()
                began = time.perf_counter()
                found = way(h, y, K)
                wait()
                seconds.append(time.perf_counter() - began)
            best[name] = min(seconds)
            slow = name == "per sample"  # a minute's loop is not run twice
            error_near = "" if slow else f"{abs(way(near, y, K) / expected_near - 1):.0e}"
            times = f"{best['per sample'] / best[name]:,.0f}"
            rows.append([name, f"{best[name]:.3f}", times, f"{abs(found / expected - 1):.0e}", error_near])
        print(f"\nN = {args.samples:,}, d = {d}, K = {K}: NC1 = {expected:.4g}, near it {expected_near:.3g}")
        print(table(["way", "seconds", "times", "error", "near collapse"], rows))
        other = min(best["class by class"], best["two passes"])
        print(f"ours: {best['per sample'] / best['ours']:,.0f} times a loop over samples, ", end="")
        print(f"{other / best['ours']:.2f} times the best of the others")
        W = torch.randn(K, d, generator=generator).to(device)
        rows = []
        for name, way in (("two passes, float32", all_usual), ("ours, float64", all_ours)):
            seconds = []
            for _ in range(4):
                wait()
                began = time.process_time()
                found = way(h, y, K, W)
                wait()
                seconds.append(time.process_time() - began)
            rows.append(
                [name, f"{min(seconds):.3f}", *(f"{found[key]:.6g}" for key in ("nc1", "cdnv", "nc4"))]
            )
        print(table(["NC1 to NC4, CDNV, trace ratio", "CPU s", "NC1", "CDNV", "NC4"], rows))


if __name__ == "__main__":
    main()
