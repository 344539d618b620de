"""hug.py's losses and closed forms against slow definitions, and further claims of its theory."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import hug as script
from common import mean_pairwise_cosine, minimise

KINDS = ("mhe", "mhs", "mgd")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def points(n, d, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=generator(seed), dtype=torch.float64), dim=1).to(dtype)


def simplex(K, d):
    """K unit vectors at equal angles, from the centred basis: nothing of hug.py in it."""
    centred = torch.eye(K, dtype=torch.float64) - 1 / K
    U = torch.linalg.svd(centred).U[:, : K - 1] * math.sqrt(K / (K - 1))
    return F.pad(U, (0, d - K + 1))


def cross_polytope(d):
    eye = torch.eye(d, dtype=torch.float64)
    return torch.cat([eye, -eye])


def polygon(K):
    angle = torch.arange(K, dtype=torch.float64) * 2 * math.pi / K
    return torch.stack([angle.cos(), angle.sin()], 1)


SHAPES = {
    "simplex": simplex(10, 9),
    "simplex in more dimensions": simplex(4, 7),
    "two points": simplex(2, 3),
    "cross-polytope": cross_polytope(5),
    "octahedron": cross_polytope(3),
    "polygon": polygon(10),
    "square": polygon(4),
}


def slow_energy(W):
    """Mean of r^-2 over pairs, one pair at a time."""
    r = [math.dist(W[k].tolist(), W[m].tolist()) for k in range(len(W)) for m in range(k)]
    return sum(distance**-2 for distance in r) / len(r)


# %% The official loss


def official(h, W, y, alpha=1.0, beta=1.0):
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
    h = torch.randn(11, 5, generator=generator(1), dtype=torch.float64).requires_grad_()
    W = (3 * torch.randn(4, 5, generator=generator(2), dtype=torch.float64)).requires_grad_()
    found = script.hug_loss(h, W, y, "mhe", alpha, beta)
    expected = official(h, W, y, alpha, beta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    ours = torch.autograd.grad(found, (h, W))
    theirs = torch.autograd.grad(expected, (h, W))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_proxies_feel_the_first_term_alone(kind):
    h = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    W = torch.randn(4, 3, generator=generator(1), dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 0, 1, 3, 3, 3])
    (alone,) = torch.autograd.grad(script.hug_loss(h, W, y, kind, 0.0, 1.0), W, allow_unused=True)
    assert alone is None or (alone == 0).all()
    one, two = (torch.autograd.grad(script.hug_loss(h, W, y, kind, 1.0, b), W)[0] for b in (0.0, 5.0))
    assert torch.equal(one, two) and one.norm() > 0


def test_class_mean_weighs_samples_by_inverse_frequency_in_the_batch():
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    y = torch.tensor([0, 0, 0, 2])
    assert script.class_mean(losses, y, 4).item() == pytest.approx((2 + 10) / 2)


def test_sums_are_their_definition():
    K, W, h = 4, points(4, 3), points(6, 3, 5)
    y = torch.tensor([0, 0, 1, 3, 3, 3])
    r = [math.dist(a, b) for a, b in zip(h.tolist(), W[y].tolist(), strict=True)]
    between = {
        "mhe": K * (K - 1) * slow_energy(W),
        "mhs": -script.separation(W).item(),
        "mgd": -script.gram_logdet(W).item(),
    }
    farthest = [max(r[:2]), r[2], max(r[3:])]
    for kind in KINDS:
        expected = 2 * between[kind] + 0.5 * sum(farthest if kind == "mhs" else r)
        assert script.hug_sum_loss(h, W, y, kind, 2.0, 0.5).item() == pytest.approx(expected)


@settings(max_examples=15, deadline=None)
@given(K=st.integers(2, 8), d=st.integers(2, 6), seed=st.integers(0, 99), kind=st.sampled_from(KINDS))
def test_rotations_lengths_and_order_change_nothing(K, d, seed, kind):
    W, h = points(K, d, seed), points(11, d, seed + 1)
    y = torch.randint(K, (11,), generator=generator(seed))
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64)).Q
    order, shuffle = (torch.randperm(n, generator=generator(seed)) for n in (K, 11))

    def loss(h, W, y):
        return script.hug_loss(h, W, y, kind).item()

    value = loss(h, W, y)
    assert loss(h @ Q, W @ Q, y) == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert loss(3 * h, 7 * W, y) == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert loss(h, W[order], order.argsort()[y]) == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert loss(h[shuffle], W, y[shuffle]) == pytest.approx(value, rel=1e-9, abs=1e-10)


# %% Collapse and coincidence


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 3e-7])
@pytest.mark.parametrize("measure", [script.separation, lambda W: -script.pair_energy(W)])
def test_proxies_that_nearly_coincide_are_torn_apart(measure, gap):
    """In float32 2 - 2 cos is 0 or below for angles up to 5e-4: two proxies would stick together for ever."""
    stuck = 0
    for angle in torch.linspace(0, 6.2, 40).tolist():
        a = torch.tensor([angle, angle + gap, angle + 2])
        W = torch.stack([a.cos(), a.sin()], 1).requires_grad_()  # (3, 2)
        (G,) = torch.autograd.grad(measure(W), W)
        apart = W.detach()[1] - W.detach()[0]
        stuck += not float(G[1] @ apart) > 0 > float(G[0] @ apart)  # ascent moves them away from each other
    assert stuck == 0


@pytest.mark.parametrize("loss", [script.hug_loss, script.hug_sum_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_where_proxies_coincide_and_features_sit_on_them(kind, dtype, loss):
    raw = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]], dtype=dtype).requires_grad_()
    h = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]], dtype=dtype).requires_grad_()
    y = torch.tensor([0, 0, 2])
    value = loss(F.normalize(h), F.normalize(raw), y, kind, 0.15, 0.015)
    gradients = torch.autograd.grad(value, (h, raw))
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    W = points(3, 3, dtype=dtype)  # full collapse: every feature on its proxy has no gradient at all
    h = W[y].clone().requires_grad_()
    distance = script.distance_to_proxy(h, W[y]).sum()
    (g,) = torch.autograd.grad(distance, h)
    assert distance < 1e-5 and (g == 0).all()


def test_many_proxies_on_a_circle_stay_finite():
    W = points(200, 2, dtype=torch.float32).requires_grad_()  # the kernel matrix is singular to 1e-64
    for value in (script.gram_logdet(W), script.pair_energy(W), script.separation(W)):
        (g,) = torch.autograd.grad(value, W)
        assert value.isfinite() and g.isfinite().all()


def test_dot_regression_is_an_eighth_of_the_fourth_power():
    h, W, y = points(6, 5), points(3, 5, 1), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = ((h - W[y]).norm(dim=1) ** 4 / 8).mean()
    assert script.dot_regression_loss(h, W, y).item() == pytest.approx(expected.item())
    assert script.dot_regression_loss(W[y], W, y) < 1e-30


def test_the_pair_term_turns_a_proxy_and_goes_with_one_over_its_length():
    """Why proxies jam on a circle: a step makes them longer, and longer ones turn less."""
    W = 0.5 * torch.randn(6, 2, generator=generator(4), dtype=torch.float64)
    h, y = points(6, 2), torch.arange(6)

    def gradient(W):
        W = W.clone().requires_grad_()
        return torch.autograd.grad(script.hug_loss(h[: len(W)], W, y[: len(W)]), W)[0]

    G = gradient(W)
    torch.testing.assert_close((G * W).sum(1), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient(10 * W), G / 10)
    assert ((W - 0.1 * G).norm(dim=1) > W.norm(dim=1)).all()
    # two at distance r: 2 r^-3 over the number of pairs and the length
    for r in (1e-2, 1e-3):
        angle = 2 * math.asin(r / 2)
        pair = 3 * torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        expected = 2 * r**-3 * math.cos(angle / 2) / 3
        assert script.hug_loss(h[:2], pair, y[:2]).item() > r**-2 * (1 - 1e-6)
        assert gradient(pair).norm(dim=1).tolist() == pytest.approx([expected] * 2, rel=1e-6)


# %% Closed forms


@pytest.mark.parametrize("W", SHAPES.values(), ids=SHAPES)
def test_closed_forms_at_the_arrangements_themselves(W):
    K, d = W.shape
    assert script.least_energy(K, d) == pytest.approx(slow_energy(W), rel=1e-9)
    assert script.pair_energy(W).item() == pytest.approx(slow_energy(W), rel=1e-9)
    r = torch.cdist(W, W).sort(1).values[:, 1:]
    assert np.sort(script.known_distances(K, d)) == pytest.approx(r[0].numpy(), rel=1e-9)
    G = np.exp(-(torch.cdist(W, W).numpy() ** 2)) + 1e-6 * np.eye(K)
    assert script.gram_logdet(W).item() == pytest.approx(np.linalg.slogdet(G)[1], rel=1e-6)


def test_closed_forms_as_numbers():
    assert script.least_energy(10, 9) == pytest.approx(9 / 20)  # (K-1) / 2K
    assert script.least_energy(10, 5) == pytest.approx(17 / 36)  # (4d-3) / (4 (2d-1))
    assert script.least_energy(10, 2) == pytest.approx(11 / 12)  # (K+1) / 12
    assert script.gram_logdet(simplex(10, 9), jitter=0).item() == pytest.approx(-0.351590, abs=1e-6)
    assert script.known_distances(10, 6) is None


@pytest.mark.parametrize("d", [4, 7, 64])
def test_uniform_law_against_an_integral(d):
    # two points of the sphere at angle a: density sin(a)^(d-2), distance 2 sin(a/2)
    mass = quad(lambda a: math.sin(a) ** (d - 2), 0, math.pi)[0]
    mean = quad(lambda a: (2 * math.sin(a / 2)) ** -2 * math.sin(a) ** (d - 2), 0, math.pi)[0] / mass
    assert script.uniform_energy(d) == pytest.approx(mean, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(3, 9), seed=st.integers(0, 99))
def test_no_arrangement_beats_the_closed_forms(K, seed):
    for d in {2, K - 1, K // 2 if K % 2 == 0 and K > 4 else K}:
        W = points(K, d, seed)
        assert script.pair_energy(W).item() >= script.least_energy(K, d) * (1 - 1e-12) - 1e-9
        assert script.separation(W) <= script.known_distances(K, d).min() + 1e-9


# %% Optimised proxies and the layer-peeled model


def soft_separation(W, s):
    """-(1/s) log sum_{k<l} r_kl^-s: at most log(min r), by log(K^2/2) / s at the most, and smooth."""
    return -(-s / 2 * script.squared_distances(W).log()).logsumexp(0) / s


def most_uniform(K, d, kind, seed=0):
    """K proxies of largest uniformity by MHE, MHS or MGD; the latter two go on from the first."""
    W = script.optimise_proxies(K, d, generator(seed))
    if kind == "mgd":
        (W,) = minimise(lambda W: -script.gram_logdet(F.normalize(W)), W, steps=500)
    if kind == "mhs":
        for s in (16.0**n for n in range(1, 6)):  # within 1e-6 of the minimum at the end
            (W,) = minimise(lambda W, s=s: -soft_separation(F.normalize(W), s), F.normalize(W))
    return F.normalize(W)


@pytest.mark.parametrize("kind", KINDS)
def test_optimised_proxies_reach_the_simplex_and_its_angles(kind):
    W = most_uniform(5, 7, kind, 3)
    gram = torch.full((5, 5), -0.25, dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-5
    assert most_uniform(2, 2, kind).sum(0).norm() < 1e-6  # K = 2: opposite
    assert torch.equal(W, most_uniform(5, 7, kind, 3))


@pytest.mark.parametrize("kind", ["mhe", "mgd"])
def test_ten_proxies_on_a_circle_are_a_polygon(kind):
    W = most_uniform(10, 2, kind)
    assert script.gram_logdet(W).item() == pytest.approx(script.gram_logdet(polygon(10)).item(), abs=1e-6)
    assert script.separation(W).item() == pytest.approx(script.separation(polygon(10)).item(), abs=1e-3)


def test_between_d_plus_two_and_2d_points_the_separation_is_stuck_at_sqrt_2():
    assert script.separation(most_uniform(7, 5, "mhs")).item() == pytest.approx(math.sqrt(2), abs=1e-6)


def test_optimised_proxies_where_no_closed_form_is_known():
    W = script.optimise_proxies(9, 3, generator())
    found = script.pair_energy(W).item()
    others = [script.pair_energy(script.optimise_proxies(9, 3, generator(s))).item() for s in (1, 2)]
    assert found == pytest.approx(min(others), rel=1e-2)
    assert script.least_energy(9, 3) == pytest.approx(found, rel=1e-2)
    assert script.separation(most_uniform(9, 3, "mhs")) > script.separation(W) - 1e-9


def test_many_proxies_take_fewer_steps_to_nearly_the_same_energy():
    W = torch.randn(320, 4, generator=generator(), dtype=torch.float64)
    (W,) = minimise(lambda W: 319 * script.pair_energy(F.normalize(W)), W, steps=80)
    least = script.pair_energy(F.normalize(W)).item()
    assert least * (1 - 1e-12) <= script.least_energy(320, 4) < least * 1.01


def test_the_layer_peeled_optimum_ignores_class_counts():
    for n in ([3] * 4, [20, 20, 1, 1]):
        W, X, y = script.layer_peeled_hug(n, 3, 1.0, 1.0)
        assert (W @ W.T - simplex(4, 3) @ simplex(4, 3).T).abs().max() < 1e-5
        assert (X - W[y]).norm(dim=1).max() < 1e-6


def test_cross_entropy_collapses_its_minority_and_balanced_gives_the_simplex():
    W = script.layer_peeled_ce([100] * 2 + [1] * 2, 4, 2, 2)
    assert mean_pairwise_cosine(W, torch.tensor([2, 3])) > 1 - 1e-6
    assert (W.square().sum() / 4).item() == pytest.approx(2)
    W = F.normalize(script.layer_peeled_ce([1] * 4, 4, 2, 2), dim=1)
    assert (W @ W.T - simplex(4, 3) @ simplex(4, 3).T).abs().max() < 1e-5


def test_geometry_and_spread_of_given_features():
    at_best = script.geometry(7 * simplex(5, 6))
    assert at_best["energy"] == pytest.approx(1, abs=1e-9)
    assert at_best["smallest_angle"] == pytest.approx(math.degrees(math.acos(-1 / 4)), abs=1e-6)
    assert script.geometry(points(5, 6))["energy"] > 1.01
    W = polygon(6)
    y = torch.arange(6).repeat_interleave(4)
    assert script.within_classes(3 * W[y], y, 6) < 1e-7  # lengths do not count
    # features at +- 0.2 rad about their class: mean distance 2 sin 0.1
    angle = torch.atan2(W[y, 1], W[y, 0]) + torch.tensor([0.2, -0.2] * 12, dtype=torch.float64)
    h = torch.stack([angle.cos(), angle.sin()], 1)
    assert script.within_classes(h, y, 6) == pytest.approx(2 * math.sin(0.1))


def test_theory_check_holds(tmp_path, capsys):
    assert script.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    assert "9 of 9 claims hold" in capsys.readouterr().out
