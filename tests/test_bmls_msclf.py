"""bmls_msclf.py: the samplers, the losses against slow definitions, the heads and the schedule."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bmls_msclf as script
from common import load_dataset, long_tail_counts


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% The samplers


def sampler(K, seed=0, pairs="unordered"):
    """One image per class, so that image numbers are labels."""
    return script.BalancedMixedLabelSampler(torch.arange(K), K, generator(seed), pairs)


@pytest.mark.parametrize("pairs, M", [("unordered", 21), ("distinct", 15)])
def test_one_sweep_is_every_pair_once(pairs, M):
    labels = sampler(6, 0, pairs).draw(M)
    seen = {tuple(sorted(p)) for p in labels.tolist()}
    assert len(seen) == M
    assert any(a == b for a, b in seen) == (pairs != "distinct")


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(2, 7),
    chunks=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    pairs=st.sampled_from(["unordered", "distinct"]),
    seed=st.integers(0, 10),
)
def test_counts_never_differ_by_more_than_one(K, chunks, pairs, seed):
    bmls = sampler(K, seed, pairs)
    counts = torch.zeros(K, K, dtype=torch.long)
    for T in chunks:
        labels = bmls.draw_labels(T)
        assert labels.shape == (T, 2)
        labels = labels.sort(1).values
        counts += torch.bincount(labels[:, 0] * K + labels[:, 1], minlength=K * K).view(K, K)
        kept = counts[tuple(torch.triu_indices(K, K, int(pairs == "distinct")))]
        assert kept.max() - kept.min() <= 1
        assert kept.sum() == counts.sum()


def test_the_order_of_a_pair_is_a_fair_coin():
    labels = sampler(5).draw_labels(15 * 400)
    cross = labels[labels[:, 0] != labels[:, 1]]
    share = (cross[:, 0] < cross[:, 1]).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(len(cross))


@pytest.mark.parametrize("name", script.SAMPLERS)
def test_a_sampler_goes_on_from_its_state(name):
    y = torch.tensor([0] * 9 + [1] * 3 + [2] * 2)
    one = script.SAMPLERS[name](y, 3, generator())
    one.draw(7)
    state, random = copy.deepcopy(one.state_dict()), one.generator.get_state()
    expected = one.draw(14)
    two = script.SAMPLERS[name](y, 3, generator(5))
    two.load_state_dict(state)
    two.generator.set_state(random)
    assert torch.equal(two.draw(14), expected)


def frequencies(name, K, n_max, epochs):
    """How often each unordered mixed label is drawn in some epochs of a long tail at 100, (M,)."""
    y = torch.arange(K).repeat_interleave(torch.tensor(long_tail_counts(K, n_max, 100)))
    drawn_by = script.SAMPLERS[name](y, K, generator())
    counts = torch.zeros(K * K)
    for _ in range(epochs):
        drawn = drawn_by.draw(len(y))
        assert drawn.shape == (len(y), 2)
        labels = y[drawn].sort(1).values
        counts += torch.bincount(labels[:, 0] * K + labels[:, 1], minlength=K * K)
    i, j = torch.triu_indices(K, K)
    return counts.view(K, K)[i, j] / epochs


def test_mixed_labels_under_each_sampler():
    """One epoch of CIFAR-10-LT at 100: N = 12,406 samples, 55 unordered labels, 225.6 each on average."""
    i, j = torch.triu_indices(10, 10)
    n = torch.tensor(long_tail_counts(10, 5000, 100)).double()
    pi = n / n.sum()
    # instance: N pi_i pi_j, twice for i != j; the counts are nearly Poisson
    expected = n.sum() * pi[i] * pi[j] * (1 + (i != j).double())
    counts = frequencies("instance", 10, 5000, 20)
    assert ((counts - expected).abs() < 6 * (expected / 20).sqrt() + 0.5).all()
    assert expected.min() < 0.21 and expected.max() / expected[i == j].min() > 1e4  # rare pairs never come
    # class: N / K^2, twice for i != j
    expected = n.sum() / 100 * (1 + (i != j).double())
    assert ((frequencies("class", 10, 5000, 20) - expected).abs() < 6 * (expected / 20).sqrt()).all()
    # balanced: 225 or 226
    counts = frequencies("balanced", 10, 5000, 1)
    assert set(counts.tolist()) == {225.0, 226.0}


def test_instance_pairs_use_every_image_once_on_either_side():
    drawn = script.InstanceSampler(torch.tensor([0] * 9 + [1] * 2), 2, generator()).draw(11)
    assert (drawn.sort(0).values == torch.arange(11)[:, None]).all()
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_balanced_pairs_pick_images_of_their_labels_in_cycles():
    y = torch.tensor([0] * 9 + [1] * 3 + [2])[torch.randperm(13, generator=generator())]
    drawn = script.BalancedMixedLabelSampler(y, 3, generator()).draw(18)
    uses = torch.bincount(drawn.flatten(), minlength=13)
    assert torch.bincount(y[drawn].flatten()).tolist() == [12, 12, 12]  # 3 sweeps x 4 slots
    assert set(uses[y == 0].tolist()) == {1, 2} and set(uses[y == 1].tolist()) == {4}
    assert uses[y == 2] == 12


@pytest.mark.parametrize("name", ["class", "balanced"])
def test_a_class_without_images_is_refused(name):
    with pytest.raises(ValueError, match="class 1 has no"):
        script.SAMPLERS[name](torch.tensor([0, 2]), 3, generator())


# %% The losses


def mixed_batch(K=4, d=6, B=7, seed=0, unit=False):
    g = generator(seed)
    h, W = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (B, K))
    if unit:
        h, W = F.normalize(h, dim=1), F.normalize(W, dim=1)
    a, b = torch.randint(K, (2, B), generator=g)
    return h, W, a, b, torch.rand((), generator=g, dtype=torch.float64)


def test_mixup_loss_is_cross_entropy_with_the_soft_label():
    h, W, a, b, lam = mixed_batch()
    soft = lam * F.one_hot(a, 4) + (1 - lam) * F.one_hot(b, 4)
    torch.testing.assert_close(script.mixup_loss(h @ W.T, a, b, lam), F.cross_entropy(h @ W.T, soft))


def k_squared_softmax(h, W, a, b, lam, scale=1.0, normalise=False):
    """The definition, one sample and one mixed class vector at a time."""
    K, losses = len(W), []
    for n in range(len(h)):
        scores = torch.empty(K, K, dtype=torch.float64)
        for i in range(K):
            for j in range(K):
                v = lam * W[i] + (1 - lam) * W[j]
                scores[i, j] = scale * h[n] @ (v / v.norm() if normalise else v)
        losses.append(scores.flatten().logsumexp(0) - scores[a[n], b[n]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(3))
def test_ms_raw_is_the_softmax_over_all_mixed_vectors(seed):
    h, W, a, b, lam = mixed_batch(seed=seed)
    expected = k_squared_softmax(h, W, a, b, lam)
    torch.testing.assert_close(script.ms_raw(h @ W.T, a, b, lam), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ms_unit_is_the_softmax_over_all_normalised_mixed_vectors(seed):
    h, W, a, b, lam = mixed_batch(seed=seed, unit=True)
    expected = k_squared_softmax(h, W, a, b, lam, 5.0, True)
    found = script.ms_unit(5.0 * h @ W.T, W, a, b, lam)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_ms_unit_survives_opposite_class_vectors():
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)  # at lam = 1/2 they mix to nothing
    h = torch.tensor([[0.6, 0.8]], requires_grad=True)
    loss = script.ms_unit(16 * h @ W.T, W, torch.tensor([0]), torch.tensor([1]), torch.tensor(0.5))
    loss.backward()
    assert loss.isfinite() and W.grad.isfinite().all() and h.grad.isfinite().all()


def simplex(K, d):
    """Class vectors of the fixed head, (K, d) in float64."""
    torch.manual_seed(0)
    return script.BiasFreeHead(K, d, cosine=True, fixed=True).W.detach().double()


def test_ms_dot_is_zero_at_the_mixed_direction_only():
    W = F.normalize(simplex(5, 8), dim=1)
    a, b, lam = torch.tensor([0, 3]), torch.tensor([1, 3]), torch.tensor(0.3, dtype=torch.float64)
    v = F.normalize(lam * W[a] + (1 - lam) * W[b], dim=1)
    assert script.ms_dot(v, W, a, b, lam) < 1e-30
    assert math.isclose(script.ms_dot(-v, W, a, b, lam), 2.0)  # 1/2 (-1 - 1)^2
    lengths = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None]
    assert math.isclose(script.ms_dot(lengths * v, W, a, b, lam), (0.25 + 1) / 4)


@pytest.mark.parametrize("K, d", [(2, 2), (5, 5), (10, 64)])
def test_the_fixed_head_is_a_simplex_and_learns_nothing(K, d):
    W = simplex(K, d)
    gram = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-6
    assert not script.BiasFreeHead(K, d, cosine=True, fixed=True).W.requires_grad


def test_balanced_softmax_is_the_softmax_of_counts_times_exponentials():
    h, W, a, _, _ = mixed_batch()
    n = torch.tensor([100, 20, 5, 1])
    e = n * (h @ W.T).exp()
    expected = -(e[torch.arange(7), a] / e.sum(1)).log().mean()
    torch.testing.assert_close(script.balanced_softmax(h @ W.T, a, n), expected)


# %% Network and schedule


def test_it_is_resnet32_not_resnet34():
    without_head = sum(p.numel() for p in script.ResNet32(3).parameters())
    assert without_head + 64 * 10 + 10 == 464_154  # He et al. 2016, table 6: 0.46 M
    wide = script.ResNet32(3, width=2)
    assert wide.d == 128 and 1.8e6 < sum(p.numel() for p in wide.parameters()) < 1.9e6


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 33, 47)])
def test_the_network_takes_any_image(shape):
    h = script.ResNet32(shape[1])(torch.randn(shape))
    assert h.shape == (2, 64) and (h >= 0).all()


def test_published_schedule():
    args = script.parse(["--dataset", "cifar100lt"])
    assert (args.epochs, args.batch_size) == (200, 128)
    rate = [script.learning_rate(e - 1, args) for e in (1, 4, 5, 160, 161, 180, 181, 200)]  # epochs from 1
    assert np.allclose(rate, [0.02, 0.08, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("flags, head", [
    ([], "linear"), (["--ms", "unit"], "cosine"), (["--classifier", "etf"], "cosine"),
])  # fmt: skip
def test_head_follows_the_loss(flags, head):
    data = load_dataset("digitslt")
    model = script.build_model(script.parse(["--ms", "raw", *flags]), "bmls+ms", data)
    h, W, z = model["classifier"](torch.rand(5, model["network"].d))
    torch.testing.assert_close(z, model["classifier"].scale * h @ W.T)
    if head == "cosine":
        ones = torch.ones(5)
        torch.testing.assert_close(h.norm(dim=1), ones)
        torch.testing.assert_close(W.norm(dim=1), torch.ones(10))
        assert model["classifier"].scale == 16
    assert model["classifier"].W.requires_grad == ("etf" not in flags)


def test_an_etf_in_too_few_dimensions_is_refused(user_error):
    data = load_dataset("digits")._replace(classes=tuple("abcdefghij" * 13))
    with user_error("--classifier etf", "130", "128"):
        script.build_model(script.parse(["--classifier", "etf"]), "ce", data)


def test_a_loss_without_negatives_needs_a_fixed_head(user_error):
    with user_error("--ms dot", "--classifier etf"):
        script.parse(["--ms", "dot"])


def test_the_penalty_shrinks_features_and_class_vectors(tmp_path, user_error):
    """lam/2 (|W|^2 + mean |h|^2): at its optimum both terms are equal, as in the layer-peeled model."""
    with user_error("--penalty", "--ms raw"):
        script.parse(["--penalty", "0.1", "--ms", "unit"])
    argv = ["--method", "ce", "--epochs", "10", "--eval-every", "10", "--weight-decay", "0"]
    argv += ["--penalty", "0.05", "--precision", "fp32", "--out", str(tmp_path)]
    script.main(argv)
    kept = script.common.Run(tmp_path / "bmls_msclf" / "digitslt" / "ce" / "seed0").load_features()
    norms = np.square(kept["W"]).sum(), np.square(kept["train_h"]).sum(1).mean()
    assert norms[0] == pytest.approx(norms[1], rel=0.1) and norms[0] < 25


def test_what_is_not_mixed_sees_one_image_whole(tmp_path, monkeypatch):
    """lam is 1 for ce and cb, and of Beta(alpha, alpha) for the others, one per batch."""
    seen = {}

    def loss(h, W, z, a, b, lam, n):
        seen.setdefault(name, []).append(float(lam))
        return F.cross_entropy(z, a)

    monkeypatch.setattr(script, "LOSSES", dict.fromkeys(script.LOSSES, loss))
    for name in ("ce", "cb", "mixup", "bmls+ms"):
        script.main(["--method", name, "--dry-run", "--batch-size", "30", "--out", str(tmp_path)])
        lams = set(seen[name])
        assert lams == {1.0} if name in ("ce", "cb") else len(lams) == len(seen[name]) > 1


def test_the_remedy_helps_the_few_on_digits(tmp_path):
    """Not a benchmark: over 6 epochs the class-balanced samplers see tail classes that Mixup hardly sees."""
    argv = [
        "--method",
        "mixup",
        "cb",
        "bmls+ms",
        "--epochs",
        "6",
        "--eval-every",
        "6",
        "--out",
        str(tmp_path),
    ]
    mixup, balanced, remedy = script.main(argv)["results"]
    assert min(balanced["few"], remedy["few"]) > mixup["few"] + 0.2
    assert remedy["minority_cosine_W"] < mixup["minority_cosine_W"]
    assert mixup["train_few"] < 0.5 < remedy["train_few"]
