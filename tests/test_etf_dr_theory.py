"""The theory cell of etf_dr.py against independent oracles: other optimisers, quadrature, small steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.optimize import minimize

import etf_dr as theory
from common import mean_pairwise_cosine


@pytest.mark.parametrize(("K", "E_W", "E_H", "value"), [
    (10, 1, 1, 1.3769), (100, 1, 1, 3.6124), (10, 2, 5, 0.2375),
])  # fmt: skip
def test_optimal_loss_against_scipy(K, E_W, E_H, value):
    assert theory.optimal_loss(K, math.sqrt(E_W * E_H)) == pytest.approx(value, abs=5e-5)
    if K > 10:
        return
    W = math.sqrt(E_W) * theory.simplex_etf(K, K, torch.Generator().manual_seed(0)).numpy()

    def loss(h):
        z = W @ h
        p = np.exp(z - np.logaddexp.reduce(z))
        return np.logaddexp.reduce(z) - z[0], W.T @ (p - np.eye(K)[0])

    ball = {"type": "ineq", "fun": lambda h: E_H - h @ h, "jac": lambda h: -2 * h}
    start = np.random.default_rng(0).normal(size=K) / 10
    found = minimize(loss, start, jac=True, method="SLSQP", constraints=ball, options={"ftol": 1e-14})
    assert found.fun == pytest.approx(theory.optimal_loss(K, math.sqrt(E_W * E_H)), abs=1e-8)
    assert found.x == pytest.approx(math.sqrt(E_H / E_W) * W[0], abs=1e-4)


@pytest.mark.parametrize(("K_A", "K_B", "E", "R"), [
    (5, 5, 0.5, 1.19), (5, 5, 1, 1.74), (5, 5, 2, 7.76), (5, 5, 5**0.5, 12.2), (5, 5, 10**0.5, 81.1),
    (7, 3, 5**0.5, 4.0), (3, 7, 1, 4.14), (3, 7, 5**0.5, 246),
    (50, 50, 0.5, 1.017), (50, 50, 1, 1.065), (50, 50, 5**0.5, 1.886), (50, 50, 10**0.5, 6.753),
])  # fmt: skip
def test_collapse_threshold_table(K_A, K_B, E, R):
    assert theory.collapse_threshold(K_A, K_B, E) == pytest.approx(R, rel=5e-3)


def test_collapse_threshold_against_direct_optimisation():
    R = theory.collapse_threshold(3, 2, 1.5)
    for ratio, collapsed in ((0.93, False), (1.07, True)):
        W, H = theory.layer_peeled([R * ratio] * 3 + [1] * 2, 1.5, 1.5)
        assert (mean_pairwise_cosine(W, torch.tensor([3, 4])) > 1 - 1e-4) == collapsed
        assert W.square().sum() / 5 == pytest.approx(1.5)
        assert H.square().sum() / 5 == pytest.approx(1.5)


def test_balanced_learnable_classifier_becomes_the_etf():
    K, E = 6, 2.0
    W, H = theory.layer_peeled([1] * K, E, E)
    cos = F.normalize(W, dim=1) @ F.normalize(W, dim=1).T
    assert torch.allclose(cos, (K * torch.eye(K).double() - 1) / (K - 1), atol=1e-5)
    loss = F.cross_entropy(H @ W.T, torch.arange(K)).item()
    assert loss == pytest.approx(theory.optimal_loss(K, E), abs=1e-9)


def test_features_are_searched_in_the_whole_ball():
    """A loss whose optimum lies inside the ball is found there, one that wants to leave it stays within."""
    y, W = torch.arange(4), theory.simplex_etf(4, 4, torch.Generator().manual_seed(0))
    inside = theory.peeled_features(lambda H, W, y: (H - W[y] / 2).square().sum(1).mean(), W, y, E_H=1)
    assert torch.allclose(inside, W / 2, atol=1e-6)
    outside = theory.peeled_features(lambda H, W, y: (H - 3 * W[y]).square().sum(1).mean(), W, y, E_H=4)
    assert torch.allclose(outside, 2 * W, atol=1e-5)


def euler(gradient, h, T, E_H, ball, steps=6000):
    """Gradient descent with tiny steps and a projection: slow, but nothing is derived in it."""
    for _ in range(steps):
        h = h - T / steps * gradient(h)
        norm = np.linalg.norm(h)
        if not ball or norm > math.sqrt(E_H):
            h = math.sqrt(E_H) * h / norm
    return h


def angle(h, w):
    along = h @ w / np.linalg.norm(w)
    return math.atan2(math.sqrt(max(h @ h - along**2, 0)), along)


def setting(K, E):
    W = math.sqrt(E) * theory.simplex_etf(K, K, torch.Generator().manual_seed(0)).numpy()

    def ce(h):
        p = np.exp(W @ h - np.logaddexp.reduce(W @ h))
        return W.T @ (p - np.eye(K)[0])

    def dr(h):
        return (W[0] @ h / E - 1) * W[0]

    return W, ce, dr


@pytest.mark.parametrize(("K", "E"), [(4, 1.0), (10, 3.0)])
def test_times_on_the_sphere_against_small_steps(K, E):
    W, ce, dr = setting(K, E)
    for theta in (1.0, 0.3):
        assert angle(euler(dr, W[1], theory.dr_time(theta, K), E, False), W[0]) == pytest.approx(
            theta, rel=2e-3
        )
        assert angle(euler(ce, W[1], theory.ce_time(theta, K, E), E, False), W[0]) == pytest.approx(
            theta, rel=2e-3
        )


def test_dr_time_solves_its_equation():
    for theta in (1.2, 0.3, 1e-3):  # d theta / dt = -(1 - cos theta) sin theta
        step = 1e-5 * theta
        slope = (theory.dr_time(theta + step, 10) - theory.dr_time(theta - step, 10)) / (2 * step)
        assert slope == pytest.approx(-1 / (2 * math.sin(theta / 2) ** 2 * math.sin(theta)), rel=1e-6)
    assert theory.dr_time(1e-4, 10) == pytest.approx(1e8, rel=1e-3)  # theta = t^-1/2 in the end


@pytest.mark.parametrize(("K", "E"), [(3, 1.0), (10, 1.0), (10, 10.0)])
def test_ce_rate_is_the_slope_of_the_flow(K, E):
    W, ce, _ = setting(K, E)
    side = np.random.default_rng(1).normal(size=K)  # any direction, that is what the formula claims,
    side = np.linalg.pinv(W) @ W @ side  # within the span of the class vectors
    side -= side @ W[0] / E * W[0]
    h = W[0] + 1e-5 * math.sqrt(E) * side / np.linalg.norm(side)  # 1e-5 radians off
    h = math.sqrt(E) * h / np.linalg.norm(h)
    g = ce(h)
    g = g - (g @ h) / (h @ h) * h
    assert g @ side / np.linalg.norm(side) / math.sqrt(E) / 1e-5 == pytest.approx(
        theory.ce_rate(K, E), rel=1e-3
    )


@pytest.mark.parametrize(("K", "E"), [(3, 0.5), (10, 1.0), (10, 5.0)])
def test_ce_arrival(K, E):
    W, ce, _ = setting(K, E)

    def speed(r):  # along the own class vector, by the gradient itself
        return -ce(r * W[0] / math.sqrt(E)) @ W[0] / math.sqrt(E)

    assert theory.ce_arrival(K, E) == pytest.approx(
        quad(lambda r: 1 / speed(r), 0, math.sqrt(E))[0], rel=1e-8
    )
    almost = euler(ce, np.zeros(K), 0.99 * theory.ce_arrival(K, E), E, True)
    assert 0.9 * math.sqrt(E) < np.linalg.norm(almost) < 0.9999 * math.sqrt(E)
    arrived = euler(ce, np.zeros(K), 1.01 * theory.ce_arrival(K, E), E, True)
    assert arrived == pytest.approx(W[0], abs=1e-6)


def test_flow_stays_on_the_sphere_and_stops_at_it():
    W, ce, _ = setting(6, 2.0)
    start = W[3].copy()
    on = theory.flow(ce, start, 5, 2.0, ball=False)
    assert np.linalg.norm(on.y, axis=0) == pytest.approx(math.sqrt(2), abs=1e-6)
    within = theory.flow(ce, start / 4, 100, 2.0, ball=True)
    assert within.t_events[0].size == 1 and np.linalg.norm(within.y[:, -1]) == pytest.approx(math.sqrt(2))
    assert (np.linalg.norm(within.y, axis=0) < math.sqrt(2) + 1e-6).all()


def test_a_wrong_claim_fails(tmp_path, monkeypatch, capsys):
    """The check is able to say no: with another constant in the optimum the exit code is 1."""
    right = theory.optimal_loss
    monkeypatch.setattr(theory, "optimal_loss", lambda K, E: right(K, E) * (1 + 1e-6))
    with pytest.raises(SystemExit) as end:
        theory.main(["--synthetic", "--out", str(tmp_path)])
    assert end.value.code == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" NO")]
    assert len(lines) == 3 and all("CE: log" in line for line in lines)
    for name in ("collapse", "convergence"):
        assert (tmp_path / "etf_dr" / "synthetic" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
