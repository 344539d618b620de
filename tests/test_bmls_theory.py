"""Claims of bmls_msclf.py beyond its own, and its theory cell against independent oracles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bmls_msclf as theory
from bmls_msclf import ms_unit
from common import locate, minimise


def simplex(K: int) -> torch.Tensor:
    """A simplex ETF in d = K dimensions, (K, K) float64."""
    return math.sqrt(K / (K - 1)) * (torch.eye(K, dtype=torch.float64) - 1 / K)


# %% The penalised model


def shares(n) -> torch.Tensor:
    n = torch.tensor(n, dtype=torch.float64)
    return n / n.sum()


def test_penalised_optimum_is_balanced_between_W_and_H():
    # stationarity in W and in H: W^T W = sum_s p_s h_s h_s^T where lam_W = lam_H
    q, p = theory.soft_labels(shares([5, 3, 2]), "mixup")
    W, H = theory.layer_peeled(q, p, 0.002)
    assert torch.allclose(W.T @ W, (H.T * p) @ H, atol=1e-7)
    assert torch.equal(W, theory.layer_peeled(q, p, 0.002)[0])  # the same each time


def contrast_eigenvalue(K, method, alpha=1.0, share=0.0):
    """Eigenvalue of E[q q^T] on the contrasts between rare classes: they collapse iff <= the penalties."""
    m2 = (alpha + 1) / (4 * alpha + 2)  # E[lam^2]
    m11 = alpha / (4 * alpha + 2)  # E[lam (1 - lam)]
    return (1 + m2 * (K - 1) - m11) / (K * (K + 1) / 2) if method == "bmls" else 2 * m2 * share


@pytest.mark.parametrize("method", ["mixup", "bmls"])
@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_contrast_eigenvalue_against_eigh(method, alpha):
    share = shares([50, 40, 30, 20, 4, 4, 4])
    q, p = theory.soft_labels(share, method, alpha)
    assert p.sum() == pytest.approx(1) and q.sum(1).tolist() == pytest.approx([1] * len(q))
    S = ((p[:, None] * q).T @ q).numpy()
    C = np.linalg.svd(np.ones((1, 3)))[2][1:]  # (2, 3): a basis of the zero-sum vectors
    C = np.c_[np.zeros((2, 4)), C]
    closed = contrast_eigenvalue(7, method, alpha, share=float(share[-1]))
    assert np.linalg.eigvalsh(C @ S @ C.T) == pytest.approx([closed, closed])
    assert S @ C.T == pytest.approx(closed * C.T)  # a true eigenvector, not only on the subspace


def test_the_threshold_moves_with_alpha():
    """(2 alpha + 1) / (alpha + 1): 7/6 at 0.2, 9/5 at 4."""
    for alpha, edge in ((0.2, 7 / 6), (4.0, 9 / 5)):
        found = locate(
            lambda times, a=alpha: theory.rare_cosine("mixup", times, a) > 0.99, 0.9 * edge, 1.15 * edge
        )
        assert found == pytest.approx(edge, rel=0.015)


def test_balanced_labels_keep_every_class_up_to_their_own_threshold():
    """Beyond the contrast eigenvalue no class is told apart: W = 0. Below, none collapses."""
    edge = contrast_eigenvalue(5, "bmls")

    def norm(penalty):
        return theory.layer_peeled(*theory.soft_labels(shares([1] * 5), "bmls"), penalty)[0].norm()

    assert locate(lambda penalty: norm(penalty) < 0.1, 1.15 * edge, 0.9 * edge) == pytest.approx(
        edge, rel=0.015
    )


def test_soft_label_probability():
    """Against an enumeration of all pairs of images, and of all unordered pairs of classes."""
    share = shares([6, 3, 1])
    q, p = theory.soft_labels(share, "mixup")
    assert (p[:, None] * q).sum(0).tolist() == pytest.approx(share.tolist())  # each class keeps its share
    of_pair = (p * ((q > 0).sum(1) == 1)).sum()  # a class with itself
    pool = np.repeat(range(3), [6, 3, 1])
    assert float(of_pair) == pytest.approx((pool[:, None] == pool).mean())
    q, p = theory.soft_labels(share, "bmls")
    assert (p[:, None] * q).sum(0).tolist() == pytest.approx([1 / 3] * 3)
    assert float((p * ((q > 0).sum(1) == 1)).sum()) == pytest.approx(3 / 6)  # 3 of 6 unordered pairs


# %% The Mixed-Singleton losses


@pytest.mark.parametrize("lam", [0.6, 0.7, 0.9])
def test_a_mixed_label_is_on_top_only_if_mixed_vectors_have_equal_length(lam):
    """lam w_i + (1-lam) w_j lies between w_i and w_j, and a linear score is largest at an end."""
    W = simplex(10)
    V = lam * W[:, None] + (1 - lam) * W  # (K, K, d)
    U = F.normalize(V, dim=2)
    h = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raw = V @ h.T  # (K, K, 50)
    assert (raw[0, 1] <= torch.maximum(raw[0, 0], raw[1, 1]) + 1e-12).all()
    unit = U @ U[0, 1]
    assert (unit >= unit[0, 1] - 1e-9).sum() == 1


@pytest.mark.parametrize(("lam", "cos"), [(0.7, 0.97), (0.9, 0.86)])
def test_ms_unit_optimum(lam, cos):
    W, a, b = simplex(10), torch.tensor([0]), torch.tensor([1])
    at = torch.tensor(lam).double()
    (h,) = minimise(
        lambda h: ms_unit(10 * F.normalize(h) @ W.T, W, a, b, at), W[:1] + 0.3 * W[1:2] + 0.1 * W[2:3]
    )
    v = lam * W[0] + (1 - lam) * W[1]
    assert F.cosine_similarity(h[0], v, dim=0).item() == pytest.approx(cos, abs=5e-3)


def test_each_method_of_the_mixed_singleton_loss_goes_where_it_should():
    """raw has a floor, inf_t log(1 + e^{-lam t}) + log(1 + e^{(1-lam) t}); dot sends h to the mixed vector."""
    W, a, b = simplex(10), torch.tensor([0]), torch.tensor([1])
    lam = torch.tensor(0.7, dtype=torch.float64)
    start = torch.randn(1, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = np.linspace(-10, 10, 100_001)
    floor = (np.logaddexp(0, -0.7 * t) + np.logaddexp(0, 0.3 * t)).min()
    (h,) = minimise(lambda h: theory.ms_raw(h @ W.T, a, b, lam), 0 * start)
    assert float(theory.ms_raw(h @ W.T, a, b, lam)) == pytest.approx(floor, abs=1e-5)
    (h,) = minimise(lambda h: theory.ms_dot(F.normalize(h), W, a, b, lam), start)
    assert F.cosine_similarity(h, 0.7 * W[:1] + 0.3 * W[1:2]).item() == pytest.approx(1, abs=1e-5)


def test_theory_check_holds(tmp_path, capsys, monkeypatch):
    """The figure has made-up curves here: the optima that it needs take longer than all claims."""
    draw = theory.draw_thresholds

    def quickly(path):
        monkeypatch.setattr(theory, "rare_cosine", lambda method, times: 1 / times)
        draw(path)

    monkeypatch.setattr(theory, "draw_thresholds", quickly)
    assert theory.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    text = capsys.readouterr().out
    assert "7 of 7 claims hold" in text and "NO" not in text
    assert {path.name for path in tmp_path.rglob("*.png")} == {"pairs.png", "thresholds.png"}


def test_mixup_hardly_ever_draws_a_rare_pair():
    counts = {name: theory.count_pairs(sampler) for name, sampler in theory.SAMPLERS.items()}
    upper = tuple(torch.triu_indices(10, 10))
    assert all(int(count[upper].sum()) == 720 for count in counts.values())
    assert int((counts["instance"][upper] == 0).sum()) > 20
    assert set(counts["balanced"][upper].tolist()) == {13, 14}
