"""The theory of etf_dr.py against independent oracles: another optimiser, a grid, small steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

import etf_dr as theory


def simplex(K):
    return theory.simplex_etf(K, K, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("E_W, E_H", [(1, 1), (2, 5)])
def test_theorem_1_and_its_features_against_scipy(E_W, E_H):
    K = 10
    W = math.sqrt(E_W) * simplex(K).numpy()

    def loss(h):
        z = W @ h
        p = np.exp(z - np.logaddexp.reduce(z))
        return np.logaddexp.reduce(z) - z[0], W.T @ (p - np.eye(K)[0])

    ball = {"type": "ineq", "fun": lambda h: E_H - h @ h, "jac": lambda h: -2 * h}
    start = np.random.default_rng(0).normal(size=K) / 10
    by_scipy = minimize(loss, start, jac=True, method="SLSQP", constraints=ball, options={"ftol": 1e-14})
    assert by_scipy.fun == pytest.approx(math.log1p(9 * math.exp(-math.sqrt(E_W * E_H) * 10 / 9)), abs=1e-8)
    ours = theory.fixed_optimum(theory.cross_entropy_loss, torch.from_numpy(W), torch.tensor([0]), E_H)
    assert by_scipy.x == pytest.approx(ours[0].numpy(), abs=1e-4)


@pytest.mark.parametrize("ratio", [1, 3, 100])
def test_learnable_optimum_against_scipy(ratio):
    """Two rare classes of three share a vector at 100 to 1; at 1 to 1 they are a simplex."""
    counts = np.array([1, 1, ratio])
    W, H = (V.numpy() for V in theory.learnable_optimum(counts.tolist(), 1, 2))
    assert np.square([W, H]).sum((1, 2)) == pytest.approx([3, 6])

    def loss(x):
        W, H = x.reshape(2, 3, 3)
        z = math.sqrt(18) * H @ W.T / np.linalg.norm(H) / np.linalg.norm(W)
        return (counts / counts.sum()) @ (np.logaddexp.reduce(z, axis=1) - np.diag(z))

    by_scipy = minimize(loss, np.random.default_rng(0).normal(size=18), options={"gtol": 1e-8})
    assert loss(np.stack([W, H])) == pytest.approx(by_scipy.fun, abs=1e-8)


def test_with_mixup_dot_regression_keeps_a_loss():
    """At lam = 1/2 no unit h has a cosine above sqrt((K-2) / (2 (K-1))) with both class vectors."""
    K = 10
    W = simplex(K)
    angles = torch.linspace(0, 2 * math.pi, 100_001, dtype=torch.float64)[:, None]
    across = F.normalize(W[1] - (W[1] @ W[0]) * W[0], dim=0)  # the best h lies in the plane of the two
    h = angles.cos() * W[0] + angles.sin() * across
    least = ((h @ W[:2].T - 1).square() / 2).mean(1).min().item()
    assert least == pytest.approx((1 - math.sqrt((K - 2) / (2 * (K - 1)))) ** 2 / 2, rel=1e-8)


# %% Speed: gradient flow of one feature on the sphere ||h||^2 = E = E_W, from another class's direction


def setting(K, E, name):
    """The gradient of the script's loss in h (d,), and class vectors W (K, K) of length sqrt(E)."""
    W = math.sqrt(E) * simplex(K)

    def gradient(h):
        h = h.clone().requires_grad_()
        if name == "dr":
            loss = theory.dot_regression_loss(h[None], W, torch.tensor([0]), None, E, E)
        else:
            loss = theory.cross_entropy_loss(h[None], W, torch.tensor([0]))
        return torch.autograd.grad(loss, h)[0]

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


def test_which_is_the_faster_one():
    """From another class's direction cross-entropy at E = 1, dot-regression at E = 10; late always CE."""
    for E, faster, slower in ((1, "ce", "dr"), (10, "dr", "ce")):
        angles = [angle_after(*setting(10, E, name), time=4, steps=1000) for name in (faster, slower)]
        assert angles[0] < 0.9 * angles[1] < 1
    for E in (1, 10):
        far, near = (slope(*setting(10, E, "dr"), x) / slope(*setting(10, E, "ce"), x) for x in (1e-2, 1e-3))
        assert near == pytest.approx(far / 100, rel=5e-2)  # theta^3 against theta


def test_a_wrong_claim_fails(tmp_path, monkeypatch, capsys):
    """The check is able to say no: class vectors that do not collapse make the second claim fail."""
    monkeypatch.setattr(theory, "learnable_optimum", lambda n, *_: (theory.simplex_etf(len(n), len(n)), None))
    monkeypatch.setattr(theory, "draw_simplex", lambda path: None)
    assert not theory.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" NO")]
    assert len(lines) == 1 and "share one vector" in lines[0]
