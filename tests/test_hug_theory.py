"""hug.py's losses and closed forms against slow definitions, and further claims of its theory."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import hug as script

KINDS = ("mhe", "mhs", "mgd")


def randn(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(K, d):
    """K unit vectors at equal angles, from the centred basis: nothing of hug.py in it."""
    U = torch.linalg.svd(torch.eye(K, dtype=torch.float64) - 1 / K).U[:, : K - 1]
    return F.pad(U * math.sqrt(K / (K - 1)), (0, d - K + 1))


def on_circle(*angles):
    angles = torch.tensor(angles, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], 1)


SHAPES = {
    "simplex": simplex(10, 9),
    "two points": simplex(2, 3),
    "cross-polytope": torch.cat([torch.eye(5), -torch.eye(5)]).double(),
    "polygon": on_circle(*(k * math.pi / 5 for k in range(10))),
}


def official(h, W, y, alpha, beta):
    """The official HUG (MHE), class by class and pair by pair, with plain tensors and autograd."""
    x = [v / v.norm() for v in h]
    w = [v / v.norm() for v in W]
    pairs = [(w[k] - w[m]).square().sum() ** -1 for k in range(len(w)) for m in range(k)]
    within = []
    for c in sorted(set(y.tolist())):
        distances = [(x[i] - w[c].detach()).norm() for i in range(len(y)) if y[i] == c]
        within.append(sum(distances) / len(distances))
    return alpha * sum(pairs) / len(pairs) + beta * sum(within) / len(within)


@pytest.mark.parametrize("alpha, beta", [(1, 1), (0.15, 0.015)])
def test_hug_mhe_is_the_official_loss_on_an_imbalanced_batch(alpha, beta):
    """Classes of 7, 3, 1 images and one that the batch lacks; values and gradients, to 1e-6 of either."""
    y = torch.tensor([0] * 7 + [1] * 3 + [3])
    h = randn(11, 5, 1).requires_grad_()
    W = (3 * randn(4, 5, 2)).requires_grad_()
    ours = script.hug_loss(h, W, y, alpha=alpha, beta=beta)
    theirs = official(h, W, y, alpha, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    gradients = [torch.autograd.grad(loss, (h, W)) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_proxies_feel_the_first_term_alone(kind, p):
    W = randn(4, 3, 1).requires_grad_()
    y = torch.tensor([0, 0, 1, 3, 3, 3])
    losses = [script.hug_loss(randn(6, 3), W, y, kind, p, 1, beta) for beta in (0, 5)]
    one, two = (torch.autograd.grad(loss, W)[0] for loss in losses)
    assert losses[1] > losses[0] and torch.equal(one, two) and one.norm() > 0


@given(K=st.integers(2, 8), d=st.integers(2, 6), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_rotations_lengths_and_order_change_nothing(K, d, seed, kind):
    W, h = randn(K, d, seed), randn(11, d, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(K, (11,), generator=generator)
    Q = torch.linalg.qr(randn(d, d, seed)).Q
    k, i = (torch.randperm(n, generator=generator) for n in (K, 11))
    value = script.hug_loss(h, W, y, kind).item()
    for same in [(h @ Q, W @ Q, y), (3 * h, 7 * W, y), (h, W[k], k.argsort()[y]), (h[i], W, y[i])]:
        assert script.hug_loss(*same, kind).item() == pytest.approx(value, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 3e-7])
@pytest.mark.parametrize("measure", [script.separation, lambda W: -script.pair_energy(W)])
def test_proxies_that_nearly_coincide_are_torn_apart(measure, gap):
    """In float32 2 - 2 cos is 0 or below for angles up to 5e-4: two proxies would stick together for ever."""
    for angle in torch.linspace(0, 6.2, 40).tolist():
        W = on_circle(angle, angle + gap, angle + 2).float().requires_grad_()
        (G,) = torch.autograd.grad(measure(W), W)
        apart = W.detach()[1] - W.detach()[0]
        assert G[1] @ apart > 0 > G[0] @ apart  # ascent moves them away from each other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_where_proxies_coincide_and_features_sit_on_them(kind, dtype):
    W = torch.tensor([[1, 0, 0], [1, 0, 0], [-1, 0, 0]], dtype=dtype).requires_grad_()
    h = torch.tensor([[1, 0, 0], [-1, 0, 0], [0, 1, 0]], dtype=dtype).requires_grad_()
    value = script.hug_loss(h, W, torch.tensor([0, 0, 2]), kind)
    assert value.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(value, (h, W)))
    h = W.detach().clone().requires_grad_()  # full collapse: at its proxy a feature has no gradient at all
    distance = script.distance_to_proxy(h, W.detach()).sum()
    (g,) = torch.autograd.grad(distance, h)
    assert distance < 1e-5 and (g == 0).all()


def test_many_proxies_on_a_circle_stay_finite():
    W = F.normalize(randn(200, 2)).float().requires_grad_()  # the kernel matrix is singular to 1e-64
    for value in (script.gram_logdet(W), script.pair_energy(W), script.separation(W)):
        (g,) = torch.autograd.grad(value, W)
        assert value.isfinite() and g.isfinite().all()


def test_the_pair_term_turns_a_proxy_and_goes_with_one_over_its_length():
    """Why proxies jam on a circle: a step makes them longer, and longer ones turn less."""

    def gradient(W):
        W = W.clone().requires_grad_()
        return torch.autograd.grad(script.hug_loss(W.detach(), W, torch.arange(len(W))), W)[0]

    W = 0.5 * randn(6, 2, 4)
    G = gradient(W)
    torch.testing.assert_close((G * W).sum(1), torch.zeros(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient(10 * W), G / 10)
    assert ((W - 0.1 * G).norm(dim=1) > W.norm(dim=1)).all()
    for r in (1e-2, 1e-3):  # two at distance r: 2 r^-3 over the length
        angle = 2 * math.asin(r / 2)
        expected = 2 * r**-3 * math.cos(angle / 2) / 3
        assert gradient(3 * on_circle(0, angle)).norm(dim=1).tolist() == pytest.approx(
            [expected] * 2, rel=1e-6
        )


@pytest.mark.parametrize("W", SHAPES.values(), ids=SHAPES)
def test_closed_forms_at_the_arrangements_themselves(W):
    K = len(W)
    r = [math.dist(W[k].tolist(), W[m].tolist()) for k in range(K) for m in range(k)]
    energy = sum(distance**-2 for distance in r) / len(r)
    logdet = torch.linalg.slogdet((-(torch.cdist(W, W) ** 2)).exp() + 1e-6 * torch.eye(K))[1].item()
    assert script.least_energy(*W.shape) == pytest.approx(energy, rel=1e-9)
    assert script.pair_energy(W).item() == pytest.approx(energy, rel=1e-9)
    assert script.separation(W).item() == pytest.approx(min(r), rel=1e-9)
    assert script.gram_logdet(W).item() == pytest.approx(logdet, rel=1e-6)
    for seed in range(20):  # by no measure does an arrangement drawn at random beat them
        other = F.normalize(randn(*W.shape, seed))
        assert script.pair_energy(other) >= energy * (1 - 1e-9)
        assert script.separation(other) <= min(r) + 1e-9
        assert script.gram_logdet(other) <= logdet + 1e-6


@pytest.mark.parametrize("K, d", [(5, 7), (2, 2), (4, 3)])
def test_optimised_proxies_reach_the_simplex_and_its_angles(K, d):
    W = script.optimise_proxies(K, d, 3)
    assert (W @ W.T - simplex(K, d) @ simplex(K, d).T).abs().max() < 1e-5


def test_geometry_and_spread_of_given_features():
    at_best = script.geometry(7 * simplex(5, 6))
    assert at_best["energy"] == pytest.approx(1, abs=1e-9)
    assert at_best["smallest_angle"] == pytest.approx(math.degrees(math.acos(-1 / 4)), abs=1e-6)
    assert script.geometry(randn(5, 6))["energy"] > 1.01
    # features at +- 0.2 rad about their class, of any length: mean distance 2 sin 0.1
    y = torch.arange(6).repeat_interleave(4)
    h = 3 * on_circle(*(y + torch.tensor([0.2, -0.2] * 12)).tolist())
    assert script.within_classes(h, y, 6) == pytest.approx(2 * math.sin(0.1))


def test_theory_check_holds(tmp_path, capsys):
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    assert "7 of 7 claims hold" in capsys.readouterr().out
