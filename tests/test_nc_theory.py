"""nc_metrics.py's theory: closed forms beyond the script's claims, and what its examples promise."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import digamma

import nc_metrics as script
from common import (
    cdnv,
    class_distances,
    minimise,
    nc1,
    one_vs_rest_distance,
    riesz_energy,
    self_duality,
    simplex_etf_distance,
    trace_ratio,
    vci,
    zero_mean_metrics,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_simplex_is_exact():
    for K, d in ((2, 2), (10, 10), (10, 32)):
        V = script.simplex(K, d)
        expected = np.full((K, K), -1 / (K - 1)) + np.eye(K) * (1 + 1 / (K - 1))
        np.testing.assert_allclose(V @ V.T, expected, atol=1e-14)
        assert V.shape == (K, d) and simplex_etf_distance(V) < 1e-14


def test_residuals_have_the_covariance_that_is_claimed():
    h, y = script.around(random(3, 5), 0.7)
    for k in range(3):
        C = np.cov(h[y == k].numpy().T, bias=True)
        np.testing.assert_allclose(C, 0.49 * np.eye(5), atol=1e-12)


def test_a_simplex_with_round_spread_has_closed_forms():
    K, d, r, sigma = 10, 32, 3.0, 0.2
    h, y = script.around(r * script.simplex(K, d), sigma)
    part = sigma**2 * (K - 1)
    assert vci(h, y) == pytest.approx(part / (r**2 + part), rel=1e-9)
    assert trace_ratio(h, y) == pytest.approx(d * sigma**2 / r**2, rel=1e-9)
    expected = 2 * d * sigma**2 + 2 * r**2 * K / (K - 1)
    assert float(class_distances(h, y)[0, 1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_two_means_that_nearly_coincide(gap):
    """NC1 = sigma^2 sum_r 1/l_r / K, by an SVD of the means; float32 and pinv's own cut-off lose it."""
    etf = script.simplex(10, 32)
    near = torch.cat([etf[:-1], etf[-2:-1] + gap * F.normalize(random(1, 32))])
    values = torch.linalg.svdvals(near - near.mean(0))[:9].square() / 10
    expected = float((0.01**2 / values).sum() / 10)
    found, rank = nc1(*script.around(near, 0.01))
    assert found == pytest.approx(expected, rel=1e-6) and rank == 9
    M = (near - near.mean(0)).float() / 10**0.5
    lost = 0.01**2 * float(torch.linalg.pinv(M.T @ M, hermitian=True).trace()) / 10
    assert gap > 1e-3 or lost < 0.01 * expected


def test_cdnv_sees_the_sub_clusters_that_nc1_does_not():
    etf, K, r, a = script.simplex(10, 32), 10, 3.0, 2.0
    axis = F.one_hot(torch.tensor(31), 32)
    h = torch.cat([r * etf + a * axis, r * etf - a * axis])
    y = torch.arange(K).repeat(2)
    assert nc1(h, y)[0] < 1e-12
    assert cdnv(h, y) == pytest.approx(a**2 * (K - 1) / (2 * K * r**2))


def test_zero_mean_collapse_of_orthogonal_means():
    K = 10
    Q = torch.eye(K, dtype=torch.float64).repeat_interleave(6, 1) / 6**0.5  # (K, 60)
    assert max(zero_mean_metrics(5 * Q, Q).values()) < 1e-12
    assert self_duality(Q, Q - Q.mean(0)) == pytest.approx(2 * (1 - (1 - 1 / K) ** 0.5))
    assert simplex_etf_distance(Q - Q.mean(0)) < 1e-12
    h, y = script.around(5 * Q, 0.2)
    assert nc1(h, y, centred=False)[0] == pytest.approx(0.04 * K / 25)


@pytest.mark.parametrize("d, s", list(itertools.product((9, 5), (0, 1, 2))))
def test_least_energies_are_those_of_the_simplex_and_the_cross_polytope(d, s):
    """Ten directions: d = 9: simplex, r^2 = 2K/(K-1); d = 5: one antipode each, the rest at sqrt 2."""
    K = 10
    i, j = torch.triu_indices(K, K, 1)

    def energy(V):  # the kernel written out: the optimiser needs its gradient
        V = F.normalize(V)
        r = (V[i] - V[j]).norm(dim=1)
        return -r.log().mean() if s == 0 else r.pow(-s).mean()

    def kernel(r):
        return -math.log(r) if s == 0 else r**-s

    starts = 1 if d == K - 1 else 6  # for the cross-polytope some starts end in a local minimum
    found = min(riesz_energy(minimise(energy, random(K, d, seed=n))[0], s) for n in range(starts))
    expected = kernel((2 * K / (K - 1)) ** 0.5)
    if d == 5:
        expected = (kernel(2) + (K - 2) * kernel(2**0.5)) / (K - 1)
    assert found == pytest.approx(expected, abs=1e-8)


def test_energy_of_many_random_directions():
    """K -> infinity: the mean kernel of the uniform law, -ln 2 - (psi((d-1)/2) - psi(d-1)) / 2."""
    expected = -math.log(2) - (digamma(31.5) - digamma(63)) / 2
    assert riesz_energy(random(1500, 64)) == pytest.approx(expected, abs=1e-3)


def test_one_vs_rest_distances():
    angle = torch.arange(12, dtype=torch.float64) * math.tau / 12
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    for V, expected in ((script.simplex(10, 32), 10 / 9), (circle, 1 - math.cos(math.tau / 12))):
        distance, gap = one_vs_rest_distance(V)
        assert float(distance.min()) == pytest.approx(expected, abs=1e-7) and gap.max() < 1e-7


def test_layer_peeled_features_collapse_in_every_measure():
    H, W, y = script.peeled_optimum(5, 3, 0.02)
    assert max(script.neural_collapse(H, W, y).values()) < 1e-6
    measured = script.measure(H, y, 5, W)
    assert measured.pop("nc1_rank") == 4 and measured.pop("accuracy") == 1
    assert all(abs(value) < 1e-6 for value in measured.values())


def test_hidden_layers_hide_the_clusters_from_k_means():
    """One hidden layer: any k-means finds them. Two: not on raw features, which differ most in length."""
    shallow, deep = (
        {name: values[-1] for name, (_, values) in script.mixture(depth, steps, seed).items()}
        for depth, steps, seed in ((1, 100, 0), (2, 400, 1))
    )
    assert shallow["purity, raw"] > 0.999
    assert deep["NC1"] < 0.05
    assert deep["purity, raw"] < 0.75 and deep["purity, l2"] > 0.999 and deep["purity, whiten"] > 0.999


def test_a_claim_that_fails_is_reported(monkeypatch, tmp_path, capsys):
    points = {"NC1": ([1], [0.01]), "purity, whiten": ([1], [0.5])}  # whitening that recovers nothing
    monkeypatch.setattr(script, "mixture", lambda **_: points)
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"] is False
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.endswith("NO")]
    assert len(failed) == 1 and "k-means" in failed[0]
    assert "8 of 9 claims hold" in out
    assert (tmp_path / "nc_metrics" / "synthetic" / "synthetic.png").exists()
