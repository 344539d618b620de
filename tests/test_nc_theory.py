"""nc_metrics.py's theory: closed forms beyond the script's claims, and the free features that collapse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import nc_metrics as script

K, d, r, sigma = 10, 32, 3.0, 0.2


def simplex():
    """Ten rows in 32 dimensions of length 1 and cosines -1/9: an orthonormal frame, centred and rescaled."""
    return F.normalize(torch.eye(K, d, dtype=torch.float64) - torch.eye(K, d, dtype=torch.float64).mean(0))


def around(means, sigma):
    """Features of covariance exactly sigma^2 I around the means, two for each class and axis."""
    axes = sigma * means.shape[1] ** 0.5 * torch.eye(means.shape[1], dtype=means.dtype)
    h = (means[:, None] + torch.cat([axes, -axes])).flatten(0, 1)
    return h, torch.arange(len(means)).repeat_interleave(2 * means.shape[1])


def test_a_simplex_with_round_spread_has_closed_forms():
    h, y = around(r * simplex(), sigma)
    measured = script.neural_collapse(h, simplex(), y)
    assert measured.pop("nc1") == pytest.approx(sigma**2 * (K - 1) ** 2 / (K * r**2), rel=1e-9)
    assert max(measured.values()) < 1e-12
    assert common.cdnv(h, y) == pytest.approx(d * sigma**2 * (K - 1) / (2 * K * r**2), rel=1e-9)
    expected = 2 * d * sigma**2 + 2 * r**2 * K / (K - 1)
    assert float(common.class_distances(h, y)[0, 1]) == pytest.approx(expected, rel=1e-9)


def test_free_features_go_where_l_bfgs_finds_the_optimum():
    """Gradient descent against another optimiser, from another start: the same loss and lengths."""
    states, y = script.fall([0, 3000])
    H, W = states[3000]

    def loss(H, W):
        return F.cross_entropy(H @ W.T, y) + 0.01 * (W.square().sum() + H.square().sum() / len(y))

    generator = torch.Generator().manual_seed(5)
    start = [torch.randn(*V.shape, generator=generator, dtype=V.dtype) for V in (H, W)]
    found_H, found_W = common.minimise(loss, *start, steps=1000)
    assert float(loss(H, W)) == pytest.approx(float(loss(found_H, found_W)), rel=1e-9)
    np.testing.assert_allclose(H.norm(dim=1), found_H.norm(dim=1), rtol=1e-4)
    np.testing.assert_allclose(H.norm(dim=1), 3**0.5 * W.norm(dim=1)[y], rtol=1e-9)  # as drawn
    gram = F.normalize(W) @ F.normalize(W).T
    np.testing.assert_allclose(gram, 1.5 * np.eye(3) - 0.5, atol=1e-9)


def test_a_claim_that_fails_is_reported(monkeypatch, tmp_path, capsys):
    states, y = script.fall([0])
    monkeypatch.setattr(script, "fall", lambda steps: (dict.fromkeys(steps, states[0]), y))  # nothing moves
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"] is False
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
    assert "at the end" in failed
    assert (tmp_path / "nc_metrics" / "synthetic" / "synthetic.png").exists()
