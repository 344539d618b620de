"""The theory cell of etf_dr.py against independent oracles: other optimisers, quadrature, small steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

import etf_dr as theory


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


def test_balanced_learnable_classifier_becomes_the_etf():
    K, E = 6, 2.0
    W, H = theory.learnable_optimum([1] * K, E, E)
    cos = F.normalize(W, dim=1) @ F.normalize(W, dim=1).T
    assert torch.allclose(cos, (K * torch.eye(K).double() - 1) / (K - 1), atol=1e-5)
    loss = F.cross_entropy(H @ W.T, torch.arange(K)).item()
    assert loss == pytest.approx(theory.optimal_loss(K, E), abs=1e-9)


def test_features_are_searched_in_the_whole_ball():
    """A loss whose optimum lies inside the ball is found there, one that wants to leave it stays within."""
    y, W = torch.arange(4), theory.simplex_etf(4, 4, torch.Generator().manual_seed(0))
    inside = theory.fixed_optimum(lambda H, W, y: (H - W[y] / 2).square().sum(1).mean(), W, y, E_H=1)
    assert torch.allclose(inside, W / 2, atol=1e-6)
    outside = theory.fixed_optimum(lambda H, W, y: (H - 3 * W[y]).square().sum(1).mean(), W, y, E_H=4)
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


def dr_time(theta: float, K: int) -> float:
    """When gradient flow of dot-regression on the sphere has closed the angle from another class to theta.

    For E_W = E_H = E, whatever E; derived here. In the end theta = 1 / sqrt(t).
    """

    # u = cos theta: du/dt = (1 - u)^2 (1 + u), whose integral is elementary
    def clock(v):  # v = 1 - cos theta; 1 - u would lose a small angle's digits
        return 1 / (2 * v) + math.log((2 - v) / v) / 4

    return clock(2 * math.sin(theta / 2) ** 2) - clock(K / (K - 1))


def angle_after(gradient, W: torch.Tensor, time: float) -> float:
    """Angle to W[0] of a feature that follows -gradient(h, W, y), (1, d), on the sphere, from W[1] on."""
    own = torch.tensor([0])

    def velocity(t, h):  # the tangential part of -gradient
        v = -gradient(torch.from_numpy(h)[None], W, own)[0].numpy()
        return v - (v @ h) / (h @ h) * h

    h = solve_ivp(velocity, (0, time), W[1].numpy(), method="LSODA", rtol=1e-9, atol=1e-13).y[:, -1]
    axis = F.normalize(W[0], dim=0).numpy()
    return math.atan2(np.linalg.norm(h - (h @ axis) * axis), h @ axis)  # right down to rounding


@pytest.mark.parametrize(("K", "E"), [(4, 1.0), (10, 3.0)])
def test_times_on_the_sphere_against_small_steps(K, E):
    W, ce, dr = setting(K, E)
    for theta in (1.0, 0.3):
        time = dr_time(theta, K)
        assert angle(euler(dr, W[1], time, E, False), W[0]) == pytest.approx(theta, rel=2e-3)
    slow = angle(euler(ce, W[1], 2.0, E, False), W[0])

    def gradient(h, W, y):
        return sum(theory.ce_feature_gradient(h, W, y))

    assert angle_after(gradient, torch.from_numpy(W), 2.0) == pytest.approx(slow, rel=2e-3)


def test_cross_entropy_is_faster_at_e_1_and_slower_at_e_10():
    W = theory.simplex_etf(10, 10, torch.Generator().manual_seed(0))
    time = dr_time(0.1, 10)
    assert angle_after(theory.dr_feature_gradient, W, time) == pytest.approx(0.1, abs=1e-6)  # whatever E

    def gradient(h, W, y):
        return sum(theory.ce_feature_gradient(h, W, y))

    assert angle_after(gradient, W, time) < 1e-6
    assert angle_after(gradient, math.sqrt(10) * W, time) > 0.1


def test_dr_time_solves_its_equation():
    for theta in (1.2, 0.3, 1e-3):  # d theta / dt = -(1 - cos theta) sin theta
        step = 1e-5 * theta
        slope = (dr_time(theta + step, 10) - dr_time(theta - step, 10)) / (2 * step)
        assert slope == pytest.approx(-1 / (2 * math.sin(theta / 2) ** 2 * math.sin(theta)), rel=1e-6)
    assert dr_time(1e-4, 10) == pytest.approx(1e8, rel=1e-3)  # theta = t^-1/2 in the end


def test_a_wrong_claim_fails(tmp_path, monkeypatch, capsys):
    """The check is able to say no: with another constant in the optimum the claim fails."""
    right = theory.optimal_loss
    monkeypatch.setattr(theory, "optimal_loss", lambda K, E: right(K, E) * (1 + 1e-6))
    assert not theory.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" NO")]
    assert len(lines) == 1 and "least CE" in lines[0]
    assert (tmp_path / "etf_dr" / "synthetic" / "simplex.png").read_bytes().startswith(b"\x89PNG")
