"""The theory of etf_dr.py against independent oracles: SciPy's optimisers, slopes by autograd."""

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


def slope(name, E, theta):
    """d loss / d theta at an angle theta between h and its class vector, both of squared length E."""
    W = math.sqrt(E) * simplex(10)
    own, other = F.normalize(W[:2])
    across = F.normalize(other - (other @ own) * own, dim=0)
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    h = math.sqrt(E) * (theta.cos() * own + theta.sin() * across)[None]
    y = torch.tensor([0])
    loss = (
        theory.dot_regression_loss(h, W, y, None, E, E)
        if name == "dr"
        else theory.cross_entropy_loss(h, W, y)
    )
    return torch.autograd.grad(loss, theta)[0].item()


def test_which_is_the_faster_one_depends_on_the_lengths():
    """Dot-regression pulls harder on the way at E = 10, weaker at E = 1 as released; late always weaker."""

    def ratio(E, theta):
        return slope("dr", E, theta) / slope("ce", E, theta)

    assert ratio(1, 0.3) < 0.1 and ratio(10, 0.3) > 10
    for E in (1, 10):
        assert ratio(E, 1e-3) == pytest.approx(ratio(E, 1e-2) / 100, rel=5e-2)  # theta^3 against theta


def test_a_wrong_claim_fails(tmp_path, monkeypatch, capsys):
    """The check is able to say no: class vectors that do not collapse make the second claim fail."""
    monkeypatch.setattr(theory, "learnable_optimum", lambda n, *_: (theory.simplex_etf(len(n), len(n)), None))
    assert not theory.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" NO")]
    assert len(lines) == 1 and "share one vector" in lines[0]
    assert (tmp_path / "etf_dr" / "synthetic" / "simplex.png").read_bytes().startswith(b"\x89PNG")
