"""Claims of bmls_msclf.py beyond its own, and its theory cell against independent oracles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize
from scipy.special import wrightomega

import bmls_msclf as theory
from bmls_msclf import ms_unit, simplex_etf
from common import locate, mean_pairwise_cosine, minimise

# %% The norm-constrained model of Fang et al. 2021


def collapse_threshold(K_A: int, K_B: int, E: float) -> float:
    """R* = n_A / n_B from which the minority collapses in the norm-constrained model; derived here.

    E = sqrt(E_W E_H). Fang et al. 2021 prove collapse for R -> infinity and observe a finite threshold.
    The constraints amount to a nuclear-norm budget ||Z||_* <= K E, and by symmetry the collapsed optimum is
    Z = a (I_A - 11^T/K_A) + u w^T, u the unit direction majority against minority.
    """
    K = K_A + K_B
    u_A, u_B = (K_B / (K_A * K)) ** 0.5, -((K_A / (K_B * K)) ** 0.5)  # entries of u: unit norm, zero sum

    def excess(R):
        def logits(v):  # (K_A - 1) a + ||w|| = K E, with w = x on the majority and y on the minority samples
            x, y = v
            a = (K * E - math.hypot(K_A**0.5 * x, K_B**0.5 * y)) / (K_A - 1)
            # majority sample: own, other majority, minority class; minority sample: majority, minority class
            return a * (1 - 1 / K_A) + u_A * x, -a / K_A + u_A * x, u_B * x, u_A * y, u_B * y

        def loss(v):
            own, other, minor, major, tail = logits(v)
            L_A = np.logaddexp.reduce([own, other + math.log(K_A - 1), minor + math.log(K_B)]) - own
            L_B = np.logaddexp(major + math.log(K_A), tail + math.log(K_B)) - tail
            return (R * K_A * L_A + K_B * L_B) / (R * K)

        # convex in (x, y): BFGS finds the global optimum
        own, other, minor, *_ = np.exp(logits(minimize(loss, [0.1 * E, -0.1 * E], options={"gtol": 1e-8}).x))
        total = own + (K_A - 1) * other + K_B * minor
        # KKT: collapse is optimal iff R (1 - p_d + p_o) >= 1, p_d = own / total, p_o = other / total
        return R * (1 - (own - other) / total) - 1

    return math.exp(brentq(lambda log_R: excess(math.exp(log_R)), 0, math.log(1e7), xtol=1e-6))


def constrained(p, E_W: float, E_H: float, seed: int = 0):
    """Optimal W (K, d), H (K, d) for class shares p, (1/K) sum ||w_k||^2 = E_W and mean ||h_k||^2 = E_H."""
    K = len(p)
    p = torch.as_tensor(p, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(K, K, generator=generator, dtype=torch.float64) for _ in range(2)]

    def scaled(V, G):  # the optimum uses the whole budget
        return V * (E_W * K) ** 0.5 / V.norm(), G * (E_H * K) ** 0.5 / G.norm()

    def loss(V, G):
        W, H = scaled(V, G)
        return -(p * F.log_softmax(H @ W.T, 1).diagonal()).sum()

    return scaled(*minimise(loss, *start))


@pytest.mark.parametrize(
    ("K_A", "K_B", "E", "R"),
    [
        *((5, 5, 0.5, 1.19), (5, 5, 1, 1.74), (5, 5, 2, 7.76), (5, 5, 5**0.5, 12.2), (5, 5, 10**0.5, 81.1)),
        *((7, 3, 5**0.5, 4.0), (3, 7, 1, 4.14), (3, 7, 5**0.5, 246)),
        (50, 50, 10**0.5, 6.75),  # direct optimisation: cosine 0.58 at R = 6.62, 1.000 at R = 6.82
    ],
)
def test_collapse_threshold_table(K_A, K_B, E, R):
    assert collapse_threshold(K_A, K_B, E) == pytest.approx(R, rel=5e-3)


def test_collapse_threshold_against_direct_optimisation():
    K_A, K_B = 3, 2
    R = collapse_threshold(K_A, K_B, 1.5)
    for ratio, collapsed in ((0.93, False), (1.07, True)):
        p = np.r_[np.full(K_A, R * ratio), np.ones(K_B)]
        W, _ = constrained(p / p.sum(), 1.5, 1.5)
        assert (mean_pairwise_cosine(W, torch.tensor([3, 4])) > 1 - 1e-4) == collapsed


def test_balanced_classes_give_the_etf_and_the_known_loss():
    K, E = 6, 2.0
    W, H = constrained([1 / K] * K, E, E)
    cos = F.normalize(W, dim=1) @ F.normalize(W, dim=1).T
    assert torch.allclose(cos, (K * torch.eye(K).double() - 1) / (K - 1), atol=1e-5)
    loss = F.cross_entropy(H @ W.T, torch.arange(K)).item()
    assert loss == pytest.approx(math.log(1 + (K - 1) * math.exp(-E * K / (K - 1))), abs=1e-9)


# %% The penalised model


def test_penalised_optimum_is_balanced_between_W_and_H():
    # stationarity in W and in H: W^T W = sum_s p_s h_s h_s^T where lam_W = lam_H
    labels = theory.mixed_labels([5, 3, 2], "instance")
    W, H = theory.layer_peeled(3, labels, 0.002)
    p = torch.as_tensor(labels[3])
    assert torch.allclose(W.T @ W, (H.T * p) @ H, atol=1e-7)
    assert torch.equal(W, theory.layer_peeled(3, labels, 0.002)[0])  # the same each time


def contrast_eigenvalue(K, sampler, alpha=1.0, share=0.0):
    """Eigenvalue of E[q q^T] on the contrasts between minority classes: they collapse iff <= lam_W lam_H."""
    m2 = (alpha + 1) / (4 * alpha + 2)  # E[lam^2]
    m11 = alpha / (4 * alpha + 2)  # E[lam (1 - lam)]
    if sampler == "balanced":
        return (1 + m2 * (K - 1) - m11) / (K * (K + 1) / 2)
    return 2 * m2 / K if sampler == "class" else 2 * m2 * share


@pytest.mark.parametrize("sampler", ["instance", "class", "balanced"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_contrast_eigenvalue_against_eigh(sampler, alpha):
    K, counts = 7, np.array([50, 40, 30, 20, 4, 4, 4])
    a, b, lam, p = theory.mixed_labels(counts, sampler, alpha)
    assert p.sum() == pytest.approx(1)
    assert (p * lam**2).sum() == pytest.approx((alpha + 1) / (4 * alpha + 2))
    q = lam[:, None] * np.eye(K)[a] + (1 - lam[:, None]) * np.eye(K)[b]
    S = (p[:, None] * q).T @ q
    C = np.linalg.svd(np.ones((1, 3)))[2][1:]  # (2, 3): a basis of the zero-sum vectors
    C = np.c_[np.zeros((2, 4)), C]
    closed = contrast_eigenvalue(K, sampler, alpha, share=4 / counts.sum())
    assert np.linalg.eigvalsh(C @ S @ C.T) == pytest.approx([closed, closed])
    assert S @ C.T == pytest.approx(closed * C.T)  # a true eigenvector, not only on the subspace


@pytest.mark.parametrize("sampler", ["class", "balanced"])
def test_balanced_labels_keep_every_class_up_to_their_own_threshold(sampler):
    """Beyond lam_W lam_H = the contrast eigenvalue no class is told apart: W = 0. Below, none collapses."""
    K = 5
    edge = contrast_eigenvalue(K, sampler)

    def norm(reg):
        return theory.layer_peeled(K, theory.mixed_labels([1] * K, sampler), reg)[0].norm()

    assert locate(lambda reg: norm(reg) < 0.1, 1.15 * edge, 0.9 * edge) == pytest.approx(edge, rel=0.015)


def test_mixed_label_probability():
    counts = np.array([6, 3, 1])

    def probability(sampler):
        a, b, lam, p = theory.mixed_labels(counts, sampler)
        assert (p * lam).sum() == pytest.approx(1 / 2)
        found = np.zeros((3, 3))
        np.add.at(found, (a, b), p)
        return found

    pool = np.repeat(range(3), counts)  # enumerate all pairs of images
    pairs = [[((pool[:, None] == i) & (pool == j)).mean() for j in range(3)] for i in range(3)]
    assert probability("instance") == pytest.approx(np.array(pairs))
    assert probability("class") == pytest.approx(np.full((3, 3), 1 / 9))
    p = probability("balanced")
    assert np.triu(p + p.T - np.diag(p.diagonal()))[np.triu_indices(3)] == pytest.approx([1 / 6] * 6)


# %% Mixup under a fixed ETF (Fisher, Meng, Papyan 2024): a feature with lam = 1/2 grows longer


def mixup_etf_optimum(q: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """p, z (K,) at the minimum over h of CE(softmax(W h), q) + lam_H/2 ||h||^2, W a fixed ETF.

    c = ||w||^2 K / ((K - 1) lam_H). Setting of Fisher, Meng, Papyan 2024, Lambert-W form derived here.
    """

    # z = c (q - p) with p_k = W0(c e^{c q_k} / Z) / c; omega(t) = W0(e^t) cannot overflow
    def p(log_Z):
        return wrightomega(math.log(c) + c * q - log_Z).real / c

    log_K = math.log(len(q))  # sum z = 0 puts log Z = logsumexp(z) between log K and c + log K
    best = p(brentq(lambda log_Z: p(log_Z).sum() - 1, log_K, c + log_K, xtol=1e-12, rtol=1e-15))
    return best, c * (q - best)


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
    p, z = mixup_etf_optimum(q, c)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert z == pytest.approx(W @ h, abs=1e-6)


def test_mixup_amplification_and_its_limit():
    eye = np.eye(10)

    def gain(c):
        half, same = (mixup_etf_optimum(q, c)[1] for q in ((eye[0] + eye[1]) / 2, eye[0]))
        return np.linalg.norm(half) / np.linalg.norm(same)

    for c, tabled in ((10, 0.886), (1e2, 1.038), (1e4, 1.155), (1e6, 1.206)):
        assert gain(c) == pytest.approx(tabled, abs=6e-4)
    limit = math.sqrt(2 * 8 / 9)  # sqrt(2 (K-2) / (K-1)), approached like 1 / log c
    assert gain(1e6) < gain(1e12) < limit


# %% The Mixed-Singleton losses


@pytest.mark.parametrize("lam", [0.6, 0.7, 0.9])
def test_a_mixed_label_is_on_top_only_if_mixed_vectors_have_equal_length(lam):
    """lam w_i + (1-lam) w_j lies between w_i and w_j, and a linear score is largest at an end."""
    W = simplex_etf(10, 10)
    V = lam * W[:, None] + (1 - lam) * W  # (K, K, d)
    U = F.normalize(V, dim=2)
    h = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = V @ h.T  # (K, K, 50)
    assert (raw[0, 1] <= torch.maximum(raw[0, 0], raw[1, 1]) + 1e-12).all()
    unit = U @ U[0, 1]
    assert (unit >= unit[0, 1] - 1e-9).sum() == 1


@pytest.mark.parametrize(("lam", "cos"), [(0.7, 0.97), (0.9, 0.86)])
def test_ms_unit_optimum(lam, cos):
    W, a, b = simplex_etf(10, 10), torch.tensor([0]), torch.tensor([1])
    at = torch.tensor([lam]).double()
    (h,) = minimise(
        lambda h: ms_unit(10 * F.normalize(h) @ W.T, W, a, b, at), W[:1] + 0.3 * W[1:2] + 0.1 * W[2:3]
    )
    v = lam * W[0] + (1 - lam) * W[1]
    assert F.cosine_similarity(h[0], v, dim=0).item() == pytest.approx(cos, abs=5e-3)


def test_locate():
    assert locate(lambda x: x < 2, 1.8, 2.3) == pytest.approx(2, rel=8e-3)
    assert locate(lambda x: x > 2, 2.3, 1.8) == pytest.approx(2, rel=8e-3)


@pytest.mark.parametrize("root", [-0.5, 0.25])
def test_minimise(root):
    (x,) = minimise(lambda x: ((x - root) ** 4).sum() + (x - root).square().sum(), torch.ones(3).double())
    assert x.tolist() == pytest.approx([root] * 3, abs=1e-8)


def test_theory_check_holds(tmp_path, capsys, monkeypatch):
    """The figure has made-up curves here: the optima that it needs take longer than all claims."""
    draw = theory.draw_thresholds

    def quickly(path):
        monkeypatch.setattr(theory, "rare_cosine", lambda sampler, times: 1 / times)
        draw(path)

    monkeypatch.setattr(theory, "draw_thresholds", quickly)
    assert theory.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    text = capsys.readouterr().out
    assert "10 of 10 claims hold" in text and "NO" not in text
    assert (tmp_path / "bmls_msclf" / "synthetic" / "synthetic.png").exists()
