"""fno_continual.py: claims of the theory beyond the seven that --synthetic prints."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import fno_continual as script
from common import class_means, cosines, self_duality, split_tasks, zero_mean_metrics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_optimum_against_another_optimiser():
    """Free features by scipy's SLSQP on one sample: same value, same place."""
    Q = 1.3 * script.fno_classifier(4, 6, generator()).numpy()
    E_H = 3.0

    def loss(h):
        z = Q @ h
        return np.logaddexp.reduce(z) - z[1]

    ball = {"type": "ineq", "fun": lambda h: E_H - h @ h}
    for non_negative, gain in ((True, 1), (False, 4 / 3)):
        bounds = [(0, None)] * 6 if non_negative else None
        best = minimize(loss, [0.3] * 6, method="SLSQP", bounds=bounds, constraints=ball, tol=1e-12)
        h = script.peeled_features(torch.from_numpy(Q), torch.arange(4), E_H, non_negative)[1]
        theory = math.log1p(3 * math.exp(-math.sqrt(E_H * 1.69 * gain)))
        assert best.fun == pytest.approx(theory, abs=1e-8) and loss(h.numpy()) == pytest.approx(theory)
        np.testing.assert_allclose(h, best.x, atol=1e-4)


@pytest.mark.parametrize("E_H, E_W, imbalance", [(25, 1, 1), (9, 2, 5)])
def test_the_optimum_under_other_budgets(E_H, E_W, imbalance):
    K = 10
    Q = E_W**0.5 * script.fno_classifier(K, 64, generator())
    y = torch.arange(K).repeat_interleave(torch.linspace(imbalance, 1, K).round().long())
    H = script.peeled_features(Q, y, E_H, True)
    theory = math.log1p((K - 1) * math.exp(-math.sqrt(E_H * E_W)))
    assert F.cross_entropy(H @ Q.T, y).item() == pytest.approx(theory, abs=1e-12)
    torch.testing.assert_close(H, (E_H / E_W) ** 0.5 * Q[y], atol=1e-9, rtol=0)
    M = class_means(H, y, K)
    assert M.mean(0).norm().item() == pytest.approx(math.sqrt(E_H / K), abs=1e-7)
    simplex = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(cosines(M - M.mean(0)), simplex, atol=1e-7, rtol=0)  # NC about their own mean


@given(K=st.integers(2, 12), spare=st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_alignment_floor_of_centred_means(K, spare):
    Q = script.fno_classifier(K, K + spare, generator(spare))
    assert self_duality(Q, Q - Q.mean(0)) == pytest.approx(2 * (1 - math.sqrt(1 - 1 / K)), abs=1e-12)
    assert zero_mean_metrics(Q, Q)["znc_alignment"] < 1e-12


@pytest.mark.parametrize("kind, mask, outside", [("fno", True, 0), ("learnable", True, 1), ("fno", False, 1)])
def test_it_takes_both_remedies_to_keep_gradients_in_the_tasks_dimensions(kind, mask, outside):
    K, d = 10, 64
    Q = script.fno_classifier(K, d, generator())
    C = Q if kind == "fno" else torch.randn(K, d, generator=generator(), dtype=torch.float64)
    task = split_tasks(K, 5)
    y = torch.randint(K, (200,), generator=generator())
    h = torch.rand(200, d, generator=generator(), dtype=torch.float64).requires_grad_()
    script.masked_ce(h @ C.T, y, script.task_mask(y, task if mask else 0 * task)).backward()
    others = task[Q.argmax(0)] != task[y][:, None]
    assert (h.grad[others] != 0).double().mean() == outside


def test_synthetic_passes_and_draws(tmp_path, capsys):
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"] is True
    out = capsys.readouterr().out
    assert "0.0589" in out and "0.9487" in out and "7 of 7 claims" in out
    assert (tmp_path / "fno_continual" / "synthetic" / "synthetic.png").exists()


def test_a_wrong_claim_is_seen(tmp_path, capsys, monkeypatch):
    wrong = lambda Q, y, E_H, sign: E_H**0.5 * F.normalize(Q)[y] * (1 + 1e-6)  # noqa: E731
    monkeypatch.setattr(script, "peeled_features", wrong)
    monkeypatch.setattr(script, "toy_stream", lambda kind, mask: [1.0] * 400)
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"] is False
    assert "NO\n" in capsys.readouterr().out
