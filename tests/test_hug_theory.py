"""hug.py's energies and closed forms against slow definitions, enumeration and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import hug as script

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


SHAPES = [
    (simplex(10, 9), "simplex"),
    (simplex(4, 7), "simplex in more dimensions"),
    (simplex(2, 3), "two points"),
    (cross_polytope(5), "cross-polytope"),
    (cross_polytope(3), "octahedron"),
    (polygon(10), "polygon"),
    (polygon(4), "square"),
]


def slow_energy(W, s):
    total = 0.0
    for k in range(len(W)):
        for m in range(len(W)):
            if k != m:
                r = math.dist(W[k].tolist(), W[m].tolist())
                total += -math.log(r) if s == 0 else math.copysign(1, s) * r**-s
    return total


# %% Energies against definitions


@pytest.mark.parametrize("s", [-1, 0, 0.5, 1, 2])
def test_energy_is_its_definition(s):
    W = points(7, 4)
    assert script.riesz_energy(W, s).item() == pytest.approx(slow_energy(W, s), rel=1e-12)


def test_separation_and_determinant_are_their_definitions():
    W = points(6, 3)
    r = [math.dist(W[k].tolist(), W[m].tolist()) for k in range(6) for m in range(k)]
    assert script.separation(W).item() == pytest.approx(min(r), rel=1e-12)
    for epsilon in (1.0, 0.5):
        G = np.array([[math.exp(-epsilon * math.dist(a, b) ** 2) for b in W.tolist()] for a in W.tolist()])
        expected = np.linalg.slogdet(G + 1e-6 * np.eye(6))[1]
        assert script.gram_logdet(W, epsilon).item() == pytest.approx(expected, rel=1e-9)


def test_the_soft_minimum_is_below_the_minimum_and_tends_to_it():
    W = points(8, 3)
    exact = math.log(script.separation(W))
    for s in (4.0, 64.0, 4.0**8):
        soft = script.soft_separation(W, s).item()
        assert exact - math.log(8 * 7 / 2) / s - 1e-12 <= soft <= exact + 1e-12


@pytest.mark.parametrize("W, shape", SHAPES, ids=[name for _, name in SHAPES])
def test_closed_forms_at_the_arrangements_themselves(W, shape):
    K, d = W.shape
    for s in (-1, 0, 1, 2, 5):
        assert script.least_energy(K, d, s) == pytest.approx(slow_energy(W, s), rel=1e-9)
    r = torch.cdist(W, W).sort(1).values[:, 1:]
    assert np.sort(script.known_distances(K, d)) == pytest.approx(r[0].numpy(), rel=1e-9)
    for epsilon in (1.0, 0.5):
        expected = np.linalg.slogdet(np.exp(-epsilon * torch.cdist(W, W).numpy() ** 2) + 1e-6 * np.eye(K))[1]
        assert script.largest_logdet(K, d, epsilon) == pytest.approx(expected, rel=1e-6)


def test_closed_forms_as_numbers():
    for s, expected in ((-1, -134.164079), (0, -35.932846), (1, 60.373835), (2, 40.5)):
        assert script.least_energy(10, 9, s) == pytest.approx(expected, abs=1e-6)
    for s, expected in ((-1, -133.137085), (0, -34.657359), (1, 61.568542), (2, 42.5)):
        assert script.least_energy(10, 5, s) == pytest.approx(expected, abs=1e-6)
    assert script.least_energy(10, 2, 2) == pytest.approx(10 * 99 / 12)  # K (K^2 - 1) / 12
    assert script.largest_logdet(10, 9, jitter=0) == pytest.approx(-0.351590, abs=1e-6)
    assert script.largest_logdet(10, 9, 0.5, jitter=0) == pytest.approx(-2.216529, abs=1e-6)
    assert script.largest_logdet(10, 5, jitter=0) == pytest.approx(-0.513322, abs=1e-6)
    assert script.known_distances(10, 9).min() == pytest.approx(math.sqrt(20 / 9))
    assert script.known_distances(10, 6) is None
    for formula in (script.largest_logdet, lambda K, d: script.least_energy(K, d, 2)):
        with pytest.raises(ValueError, match="no closed form"):
            formula(10, 6)


@pytest.mark.parametrize("d, s", [(2, -1), (2, 0), (3, 1), (3, -1), (4, 2), (8, 0), (64, 2)])
def test_uniform_law_against_an_integral(d, s):
    # two points of the sphere at angle a: density sin(a)^(d-2), distance 2 sin(a/2)
    def kernel(a):
        r = 2 * math.sin(a / 2)
        return -math.log(r) if s == 0 else math.copysign(1, s) * r**-s

    mass = quad(lambda a: math.sin(a) ** (d - 2), 0, math.pi)[0]
    mean = quad(lambda a: kernel(a) * math.sin(a) ** (d - 2), 0, math.pi)[0] / mass
    assert script.uniform_energy(d, s) == pytest.approx(mean, rel=1e-6)


def test_uniform_law_as_numbers():
    assert script.uniform_energy(64, 2) == pytest.approx(0.508197, abs=1e-6)
    assert script.uniform_energy(64, 0) == pytest.approx(-0.342574, abs=1e-6)
    assert script.uniform_energy(2, -1) == pytest.approx(-4 / math.pi)  # mean chord of the circle
    assert script.uniform_energy(3, 1) == pytest.approx(1)  # a charged shell: potential as from its centre
    # polygons have a closed form for every K, and it goes there
    mean = script.least_energy(2000, 2, -1) / (2000 * 1999)
    assert mean == pytest.approx(-4 / math.pi, rel=1e-3)


# %% Invariants


@settings(max_examples=15, deadline=None)
@given(
    K=st.integers(2, 8), d=st.integers(2, 6), seed=st.integers(0, 99), kind=st.sampled_from(KINDS),
    intra=st.sampled_from(["max", "sum"]), reduction=st.sampled_from(["sum", "mean"]),
)  # fmt: skip
def test_rotations_and_the_order_of_classes_and_samples_change_nothing(K, d, seed, kind, intra, reduction):
    W, x = points(K, d, seed), points(11, d, seed + 1)
    y = torch.randint(K, (11,), generator=generator(seed))
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64)).Q
    order, shuffle = (torch.randperm(n, generator=generator(seed)) for n in (K, 11))

    def loss(x, y, W):
        return script.hug_loss(x, y, W, kind, 0.15, 0.015, intra=intra, reduction=reduction).item()

    value = loss(x, y, W)
    assert loss(x @ Q, y, W @ Q) == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert loss(x, order.argsort()[y], W[order]) == pytest.approx(value, rel=1e-9, abs=1e-10)
    assert loss(x[shuffle], y[shuffle], W) == pytest.approx(value, rel=1e-9, abs=1e-10)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(3, 9), seed=st.integers(0, 99))
def test_no_arrangement_beats_the_closed_forms(K, seed):
    for d in {2, K - 1, K // 2 if K % 2 == 0 and K > 4 else K}:
        W = points(K, d, seed)
        for s in (-1, 0, 1, 2):
            assert script.riesz_energy(W, s).item() >= script.least_energy(K, d, s) * (1 - 1e-12) - 1e-9
        assert script.separation(W) <= script.known_distances(K, d).min() + 1e-9
        assert script.gram_logdet(W) <= script.largest_logdet(K, d) + 1e-9


def test_the_gradient_is_the_derivative():
    x, W = points(5, 3), points(4, 3, 1)
    y = torch.tensor([0, 1, 2, 2, 1])
    for kind in KINDS:
        for x0, W0 in ((x, W),):
            x1, W1 = x0.clone().requires_grad_(), W0.clone().requires_grad_()

            def loss(x, W, kind=kind):
                unit = [F.normalize(v, dim=1) for v in (x, W)]
                return script.hug_loss(unit[0], y, unit[1], kind, 0.15, 0.015)

            assert torch.autograd.gradcheck(loss, (x1, W1), eps=1e-6, atol=1e-6)


# %% Collapse and coincidence


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 3e-7])
@pytest.mark.parametrize("measure", [script.separation, lambda W: -script.riesz_energy(W, 2)])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_where_proxies_coincide_and_features_sit_on_them(kind, dtype):
    raw = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]], dtype=dtype).requires_grad_()
    x = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [0, 1.0, 0]], dtype=dtype).requires_grad_()
    y = torch.tensor([0, 0, 2])
    for intra in ("max", "sum"):
        units = [F.normalize(v, dim=1) for v in (x, raw)]
        loss = script.hug_loss(units[0], y, units[1], kind, 0.15, 0.015, intra=intra)
        gradients = torch.autograd.grad(loss, (x, raw))
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients)
    # full collapse: every feature on its proxy has no gradient at all, and U_intra is 0
    W = points(3, 3, dtype=dtype)
    x = W[y].clone().requires_grad_()
    distance = script.distances(x, W[y]).sum()
    (g,) = torch.autograd.grad(distance, x)
    assert distance < 1e-5 and (g == 0).all()


def test_many_proxies_on_a_circle_stay_finite():
    W = points(200, 2, dtype=torch.float32).requires_grad_()  # the kernel matrix is singular to 1e-64
    for value in (script.gram_logdet(W), script.riesz_energy(W, 2), script.separation(W)):
        (g,) = torch.autograd.grad(value, W)
        assert value.isfinite() and g.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gap_is_inter_minus_intra_term_by_term(kind):
    K, W, x = 4, points(4, 3), points(6, 3, 5)
    y = torch.tensor([0, 0, 1, 3, 3, 3])  # class 2 is not in the batch
    r = [math.dist(a, b) for a, b in zip(x.tolist(), W[y].tolist(), strict=True)]
    inter = {"mhe": -slow_energy(W, 2), "mhs": script.separation(W).item(),
             "mgd": script.gram_logdet(W, 0.7).item()}[kind]  # fmt: skip
    farthest = [max(r[0], r[1]), r[2], max(r[3:])]
    for intra in ("max", "sum"):
        terms = farthest if kind == "mhs" and intra == "max" else r
        for reduction in ("sum", "mean"):
            scale = {"mhe": K * (K - 1), "mhs": 1, "mgd": K}[kind] if reduction == "mean" else 1
            expected = -2.0 * inter / scale + 0.5 * (np.mean(terms) if reduction == "mean" else sum(terms))
            options = dict(reduction=reduction, intra=intra, epsilon=0.7)
            assert script.hug_loss(x, y, W, kind, 2.0, 0.5, **options).item() == pytest.approx(expected)


def test_the_kernel_within_classes_must_grow_with_distance():
    """With r^-1 in place of r a class gains without limit by shrinking: the loss has no minimum."""
    values = [-script.riesz_energy(F.normalize(points(2, 3) * e + points(1, 3, 4), dim=1), 1) for e in
              (1, 1e-2, 1e-4)]  # fmt: skip
    assert values[0] > 50 * values[1] / 100 and values[2] < 50 * values[1] < 0


def test_dot_regression_is_an_eighth_of_the_fourth_power():
    x, W, y = points(6, 5), points(3, 5, 1), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = ((x - W[y]).norm(dim=1) ** 4 / 8).mean()
    assert script.dot_regression_loss(x, y, W).item() == pytest.approx(expected.item())
    assert script.dot_regression_loss(W[y], y, W) < 1e-30


# %% Optimised proxies and the layer-peeled model


@pytest.mark.parametrize("kind", KINDS)
def test_spread_reaches_the_simplex_and_its_angles(kind):
    W = script.spread(5, 7, kind, generator(3))
    gram = torch.full((5, 5), -0.25, dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-5
    assert script.spread(2, 2, kind, generator()).sum(0).norm() < 1e-6  # K = 2: opposite
    again = script.spread(5, 7, kind, generator(3))
    assert torch.equal(W, again)


def test_spread_where_no_closed_form_is_known():
    W = script.spread(9, 3, "mhe", generator())
    found = script.riesz_energy(W, 2).item()
    other = min(script.riesz_energy(script.spread(9, 3, "mhe", generator(s)), 2).item() for s in (1, 2))
    assert found == pytest.approx(other, rel=1e-2)
    assert script.reference_energy(9, 3) == pytest.approx(found / 72, rel=1e-2)
    assert script.separation(script.spread(9, 3, "mhs", generator())) > script.separation(W) - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_peeled_optimum_ignores_class_counts(kind):
    for counts in ([3] * 4, [20, 20, 1, 1]):
        W, X, y = script.layer_peeled_hug(counts, 3, kind, 0.15, 0.015)
        assert (W @ W.T - simplex(4, 3) @ simplex(4, 3).T).abs().max() < 1e-5
        assert (X - W[y]).norm(dim=1).max() < 1e-6


def test_cross_entropy_collapses_its_minority_and_balanced_gives_the_simplex():
    W = script.layer_peeled_ce([100] * 2 + [1] * 2, 4, 2, 2)
    assert script.mean_pairwise_cosine(W, torch.tensor([2, 3])) > 1 - 1e-6
    assert (W.square().sum() / 4).item() == pytest.approx(2)
    W = F.normalize(script.layer_peeled_ce([1] * 4, 4, 2, 2), dim=1)
    assert (W @ W.T - simplex(4, 3) @ simplex(4, 3).T).abs().max() < 1e-5


# %% Generalized neural collapse of given features


def test_generalized_nc_at_the_optimum_and_off_it():
    W = polygon(6)
    y = torch.arange(6).repeat_interleave(4)
    measured = script.generalized_nc(3 * W[y], y, 5 * W)  # lengths do not count
    assert measured["within"] < 1e-7 and measured["duality"] < 1e-7
    assert measured["energy_M"] == pytest.approx(1, abs=1e-6)
    assert measured["smallest_angle_M"] == pytest.approx(60, abs=1e-4)
    turned = F.normalize(W + 0.3 * W.flip(1), dim=1)
    assert script.generalized_nc(W[y], y, turned)["duality"] > 0.1
    # features at +- 0.2 rad about their class: mean distance 2 sin 0.1
    angle = torch.atan2(W[y, 1], W[y, 0]) + torch.tensor([0.2, -0.2] * 12, dtype=torch.float64)
    spread = script.generalized_nc(torch.stack([angle.cos(), angle.sin()], 1), y, W)
    assert spread["within"] == pytest.approx(2 * math.sin(0.1))
    assert spread["energy_M"] == pytest.approx(1, abs=1e-6)


def test_generalized_nc_leaves_out_an_empty_class():
    W, y = polygon(4), torch.tensor([0, 0, 1, 2])
    measured = script.generalized_nc(W[y], y, W)
    assert all(math.isfinite(v) for v in measured.values()) and measured["duality"] < 1e-7
    assert math.isnan(script.generalized_nc(W[:1], torch.tensor([0]), W)["energy_M"])


def test_geometry_of_class_vectors():
    at_best = script.geometry(7 * simplex(5, 6))
    assert at_best["energy"] == pytest.approx(1, abs=1e-9)
    assert at_best["smallest_angle"] == pytest.approx(math.degrees(math.acos(-1 / 4)), abs=1e-6)
    assert script.geometry(points(5, 6))["energy"] > 1.01
