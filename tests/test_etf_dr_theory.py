"""The theory cell of etf_dr.py against independent oracles: other optimisers, quadrature, small steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


# %% Speed: gradient flow of one feature on the sphere ||h||^2 = E = E_W, from another class's direction


def dr_time(theta: float, K: int) -> float:
    """When dot-regression has closed the angle to theta, whatever E; derived here. Late, theta = t^-1/2."""

    # u = cos theta: du/dt = (1 - u)^2 (1 + u), whose integral is elementary
    def clock(v):  # v = 1 - cos theta; 1 - u would lose a small angle's digits
        return 1 / (2 * v) + math.log((2 - v) / v) / 4

    return clock(2 * math.sin(theta / 2) ** 2) - clock(K / (K - 1))


def setting(K, E, loss):
    """The gradient of the script's own closed form, and class vectors W (K, K) of length sqrt(E)."""
    W = math.sqrt(E) * theory.simplex_etf(K, K, torch.Generator().manual_seed(0))
    y = torch.tensor([0])

    def gradient(h):
        if loss == "dr":
            return theory.dr_feature_gradient(h[None], W, y, E, E)[0]
        return sum(theory.ce_feature_gradient(h[None], W, y))[0]

    return gradient, W


def angle_after(gradient, W, time, steps):
    """Gradient descent with tiny steps and a projection: slow, but nothing is derived in it."""
    h = W[1]
    for _ in range(steps):
        h = h - time / steps * gradient(h)
        h = W[0].norm() * h / h.norm()
    return math.acos((h @ W[0]).item() / (W[0] @ W[0]).item())


def slope(gradient, W, theta):
    """The gradient's part along the sphere at an angle theta from W[0] towards W[1]."""
    u = F.normalize(W[0], dim=0)
    v = F.normalize(W[1] - (W[1] @ u) * u, dim=0)
    h = W[0].norm() * (math.cos(theta) * u + math.sin(theta) * v)
    return (gradient(h) @ (math.cos(theta) * v - math.sin(theta) * u)).item()


@pytest.mark.parametrize(("K", "E"), [(4, 1), (10, 3)])
def test_dr_time_on_the_sphere_whatever_E(K, E):
    assert angle_after(*setting(K, E, "dr"), dr_time(0.3, K), steps=4000) == pytest.approx(0.3, rel=2e-3)


def test_which_is_the_faster_one():
    """From another class's direction cross-entropy at E = 1, dot-regression at E = 10; late always CE."""
    time = dr_time(0.5, 10)
    assert angle_after(*setting(10, 1, "ce"), time, 2000) < 0.5
    assert angle_after(*setting(10, 10, "ce"), time, 2000) > 0.5
    for E in (1, 10):
        far, near = (slope(*setting(10, E, "dr"), x) / slope(*setting(10, E, "ce"), x) for x in (1e-2, 1e-3))
        assert near == pytest.approx(far / 100, rel=5e-2)  # theta^3 against theta


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
