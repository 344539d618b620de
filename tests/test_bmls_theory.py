"""Tests of the theory cell against independent oracles: tables, eigen-decompositions, other optimisers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize

import bmls_msclf as theory
from bmls_msclf import ms_raw, ms_unit, simplex_etf


@pytest.mark.parametrize(
    ("K_A", "K_B", "E", "R"),
    [
        *((5, 5, 0.5, 1.19), (5, 5, 1, 1.74), (5, 5, 2, 7.76), (5, 5, 5**0.5, 12.2), (5, 5, 10**0.5, 81.1)),
        *((7, 3, 5**0.5, 4.0), (3, 7, 1, 4.14), (3, 7, 5**0.5, 246)),
        (50, 50, 10**0.5, 6.75),  # direct optimisation: cosine 0.58 at R = 6.62, 1.000 at R = 6.82
    ],
)
def test_collapse_threshold_table(K_A, K_B, E, R):
    assert theory.collapse_threshold(K_A, K_B, E) == pytest.approx(R, rel=5e-3)


def test_collapse_threshold_against_direct_optimisation():
    K_A, K_B, K = 3, 2, 5
    R = theory.collapse_threshold(K_A, K_B, 1.5)
    for ratio, collapsed in ((0.93, False), (1.07, True)):
        pi = np.r_[np.full(K_A, R * ratio), np.ones(K_B)]
        W, H = theory.layer_peeled(K, range(K), range(K), [1.0] * K, pi / pi.sum(), d=K, E_W=1.5, E_H=1.5)
        assert (theory.mean_pairwise_cosine(W, torch.tensor([3, 4])) > 1 - 1e-4) == collapsed
        assert W.square().sum() / K == pytest.approx(1.5)
        assert H.square().sum() / K == pytest.approx(1.5)


def test_balanced_classes_give_the_etf_and_the_known_loss():
    K, E = 6, 2.0
    W, H = theory.layer_peeled(K, range(K), range(K), [1.0] * K, [1 / K] * K, d=K + 2, E_W=E, E_H=E)
    cos = F.normalize(W, dim=1) @ F.normalize(W, dim=1).T
    assert torch.allclose(cos, (K * torch.eye(K).double() - 1) / (K - 1), atol=1e-5)
    loss = F.cross_entropy(H @ W.T, torch.arange(K)).item()
    assert loss == pytest.approx(math.log(1 + (K - 1) * math.exp(-E * K / (K - 1))), abs=1e-9)


def test_penalised_optimum_is_balanced_between_W_and_H():
    # stationarity in W and in H: lam_W W^T W = lam_H sum_s w_s h_s h_s^T
    a, b, lam, w = theory.mixed_labels([5, 3, 2], "instance")
    W, H = theory.layer_peeled(3, a, b, lam, w, d=4, lam_W=0.1, lam_H=0.02)
    assert torch.allclose(0.1 * W.T @ W, 0.02 * (H.T * torch.as_tensor(w)) @ H, atol=1e-7)


def test_layer_peeled_is_deterministic_and_wants_one_form():
    args = (3, range(3), range(3), [1.0] * 3, [1 / 3] * 3)
    one, two = (theory.layer_peeled(*args, d=3, lam_W=0.1, lam_H=0.1)[0] for _ in range(2))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="lam_W"):
        theory.layer_peeled(*args, d=3)


@pytest.mark.parametrize("sampler", ["instance", "class", "balanced"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_contrast_eigenvalue_against_eigh(sampler, alpha):
    K, counts = 7, np.array([50, 40, 30, 20, 4, 4, 4])
    a, b, lam, w = theory.mixed_labels(counts, sampler, alpha, nodes=4)
    assert w.sum() == pytest.approx(1)
    assert (w * lam**2).sum() == pytest.approx((alpha + 1) / (4 * alpha + 2))  # E[lam^2]
    q = theory.soft_labels(K, a, b, lam).numpy()
    S = (w[:, None] * q).T @ q
    C = np.linalg.svd(np.ones((1, 3)))[2][1:]  # (2, 3): a basis of the zero-sum vectors
    C = np.c_[np.zeros((2, 4)), C]
    closed = theory.contrast_eigenvalue(K, sampler, alpha, share=4 / counts.sum())
    assert np.linalg.eigvalsh(C @ S @ C.T) == pytest.approx([closed, closed])
    assert S @ C.T == pytest.approx(closed * C.T)  # a true eigenvector, not only on the subspace


def test_contrast_eigenvalue_numbers():
    assert 10 * theory.contrast_eigenvalue(10, "balanced") == pytest.approx(0.697, abs=5e-4)
    assert 100 * theory.contrast_eigenvalue(100, "balanced") == pytest.approx(0.670, abs=5e-4)
    assert theory.contrast_eigenvalue(10, "instance", share=0.03) == pytest.approx(0.02)
    assert theory.contrast_eigenvalue(10, "ce", share=0.03) == 0.03


def test_mixed_label_weights():
    counts = np.array([6, 3, 1])
    a, b, w = theory.mixed_label_weights(counts, "instance")
    pool = np.repeat(range(3), counts)
    for i, j, p in zip(a, b, w, strict=True):  # enumerate all pairs of images
        assert p == pytest.approx(((pool[:, None] == i) & (pool == j)).mean())
    a, b, w = theory.mixed_label_weights(counts, "balanced")
    unordered = {
        (i, j): w[((a == i) & (b == j)) | ((a == j) & (b == i))].sum() for i in range(3) for j in range(i, 3)
    }
    assert list(unordered.values()) == pytest.approx([1 / 6] * 6)
    assert theory.mixed_label_weights(counts, "class")[2] == pytest.approx([1 / 9] * 9)


@pytest.mark.parametrize("c", [0.3, 10, 200])
def test_mixup_etf_optimum_against_scipy(c):
    q = np.array([0.55, 0.45, 0, 0, 0, 0])
    W = simplex_etf(6, 8).numpy()
    lam_H = 6 / (5 * c)

    def loss(h):
        z = W @ h
        p = np.exp(z - np.logaddexp.reduce(z))
        return -q @ np.log(p) + lam_H / 2 * h @ h, W.T @ (p - q) + lam_H * h

    h = minimize(loss, np.zeros(8), jac=True, method="BFGS", options={"gtol": 1e-10}).x
    p, z = theory.mixup_etf_optimum(q, c)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert z == pytest.approx(W @ h, abs=1e-6)


def test_mixup_amplification_and_its_limit():
    def gain(c, K=10):  # one unknown each: log of the probability e of an unmixed-in class
        t = brentq(
            lambda t: -t + math.log1p(-(K - 1) * math.exp(t)) - c * K * math.exp(t), -800, -math.log(K)
        )
        s = brentq(
            lambda s: math.log(0.5 - (K / 2 - 1) * math.exp(s)) - s - c * K / 2 * math.exp(s),
            -800,
            -math.log(K),
        )
        return math.exp(s - t) * ((K - 2) ** 2 / 2 + K - 2) ** 0.5 / ((K - 1) ** 2 + K - 1) ** 0.5

    eye = np.eye(10)
    for c, tabled in ((10, 0.886), (1e2, 1.038), (1e4, 1.155), (1e6, 1.206)):
        half, same = (theory.mixup_etf_optimum(q, c)[1] for q in ((eye[0] + eye[1]) / 2, eye[0]))
        ours = np.linalg.norm(half) / np.linalg.norm(same)
        assert ours == pytest.approx(gain(c), abs=1e-8)
        assert ours == pytest.approx(tabled, abs=6e-4)
    assert gain(1e300) == pytest.approx(math.sqrt(2 * 8 / 9), rel=5e-3)


def test_ms_raw_is_the_softmax_over_all_mixed_vectors():
    gen = torch.Generator().manual_seed(0)
    z = torch.randn(20, 5, generator=gen, dtype=torch.float64)
    a, b = torch.randint(5, (2, 20), generator=gen)
    lam = torch.rand(20, generator=gen, dtype=torch.float64)
    full = lam[:, None, None] * z[:, :, None] + (1 - lam)[:, None, None] * z[:, None, :]  # (B, K, K)
    assert ms_raw(z, a, b, lam).item() == pytest.approx(F.cross_entropy(full.flatten(1), a * 5 + b).item())


@pytest.mark.parametrize(("lam", "cos"), [(0.7, 0.97), (0.9, 0.86)])
def test_ms_unit_optimum(lam, cos):
    W, a, b = simplex_etf(10, 10), torch.tensor([0]), torch.tensor([1])
    (h,) = theory.minimise(
        lambda h: ms_unit(F.normalize(h), W, a, b, torch.tensor([lam]).double(), 10),
        W[:1] + 0.3 * W[1:2] + 0.1 * W[2:3],
    )
    v = lam * W[0] + (1 - lam) * W[1]
    assert F.cosine_similarity(h[0], v, dim=0).item() == pytest.approx(cos, abs=5e-3)


def test_locate():
    assert theory.locate(lambda x: x < 2, 1.8, 2.3) == pytest.approx(2, rel=8e-3)
    assert theory.locate(lambda x: x > 2, 2.3, 1.8) == pytest.approx(2, rel=8e-3)
