"""etf_dr.py: losses and gradients against slow definitions, the sampler, the heads, what flags change."""

import contextlib
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import etf_dr as script


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(K=5, d=7, B=11, seed=0):
    g = generator(seed)
    h, W = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (B, K))
    return h, W, torch.randint(K, (B,), generator=g)


# %% The method


@settings(max_examples=20)
@given(K=st.integers(2, 12), spare=st.integers(-1, 6), seed=st.integers(0, 5))
def test_simplex_etf_is_exact(K, spare, seed):
    W = script.simplex_etf(K, K + spare, generator(seed))
    gram = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-12
    if K > 2:  # two directions in one dimension may be the same ones
        assert not torch.equal(W, script.simplex_etf(K, K + spare, generator(seed + 1)))
    with pytest.raises(ValueError, match="dimensions"):
        script.simplex_etf(K, K - 2)


@pytest.mark.parametrize("E_W, E_H", [(1, 1), (2, 5), (0.3, 4)])
def test_dot_regression_is_the_papers_formula(E_W, E_H):
    h, W, y = batch()
    E = math.sqrt(E_W * E_H)
    losses = [(sum(W[y[i], j] * h[i, j] for j in range(7)) - E) ** 2 / (2 * E) for i in range(len(h))]
    ours = script.dot_regression_loss(h, W, y, None, E_W, E_H).item()
    assert ours == pytest.approx(float(sum(losses) / len(h)))


def test_dot_regression_with_class_lengths_is_the_released_formula():
    """1/2 mean (h . m - |m||h|)^2 / |h| with m = l_y w_y, one sample at a time."""
    h, _, y = batch()
    h = F.normalize(h)
    W = script.simplex_etf(5, 7, generator())
    length = script.class_length(y, 5).double()
    losses = []
    for i in range(len(h)):
        m = length[y[i]] * W[y[i]]
        losses.append(0.5 * (h[i] @ m - m.norm() * h[i].norm()) ** 2 / h[i].norm())
    ours = script.dot_regression_loss(h, W, y, length[y] ** 2).item()
    assert ours == pytest.approx(float(sum(losses) / len(h)), rel=1e-12)


@settings(max_examples=20)
@given(K=st.integers(2, 8), E_W=st.floats(0.1, 20), E_H=st.floats(0.1, 20), seed=st.integers(0, 9))
def test_dot_regression_pushes_from_no_other_class(K, E_W, E_H, seed):
    W = math.sqrt(E_W) * script.simplex_etf(K, K, generator(seed))
    y = torch.arange(K)
    best = math.sqrt(E_H / E_W) * W
    opposite = script.dot_regression_loss(-best, W, y, None, E_W, E_H).item()
    assert opposite == pytest.approx(2 * math.sqrt(E_W * E_H))  # (2E)^2 / 2E
    other = W.roll(1, 0)
    side = other - (other * W).sum(1, keepdim=True) / E_W * W  # another class vector's part across the own
    for h in (best, best + side, best - side):
        assert script.dot_regression_loss(h, W, y, None, E_W, E_H) < 1e-20 * (1 + E_W * E_H)


def test_weighed_cross_entropy():
    h, W, y = batch()
    weight = torch.rand(len(y), generator=generator(), dtype=torch.float64)
    losses = torch.stack([(h_i @ W.T).exp().sum().log() - h_i @ W[k] for h_i, k in zip(h, y, strict=True)])
    assert script.cross_entropy_loss(h, W, y).item() == pytest.approx(losses.mean().item())
    weighed = script.cross_entropy_loss(h, W, y, weight).item()
    assert weighed == pytest.approx((weight @ losses).item() / len(y))
    for loss in (script.cross_entropy_loss, script.dot_regression_loss):  # float32 and float64 mix
        assert loss(h.float(), W, y).item() == pytest.approx(loss(h, W, y).item(), rel=1e-5)


@settings(max_examples=25)
@given(K=st.integers(2, 9), d=st.integers(1, 8), B=st.integers(1, 12), seed=st.integers(0, 9))
def test_the_gradients_in_the_text(K, d, B, seed):
    """Pull and push, as section 1 writes them, against autograd of the losses."""
    h, W, y = batch(K, d, B, seed)
    p = (h @ W.T).softmax(1)
    own = [(i, int(y[i])) for i in range(B)]
    others = [(i, k) for i in range(B) for k in range(K) if k != y[i]]
    by_hand = torch.zeros_like(h), torch.zeros_like(W)
    for pairs, factor in ((own, p - 1), (others, p)):  # pull, push
        for i, k in pairs:
            by_hand[0][i] += factor[i, k] * W[k]
            by_hand[1][k] += factor[i, k] * h[i] / B
    h.requires_grad_()
    W.requires_grad_()
    g_h, g_W = torch.autograd.grad(script.cross_entropy_loss(h, W, y), (h, W))
    torch.testing.assert_close((B * g_h, g_W), by_hand)

    W = math.sqrt(2) * F.normalize(W.detach())
    h = (math.sqrt(3) * F.normalize(h.detach())).requires_grad_()
    (g_h,) = torch.autograd.grad(script.dot_regression_loss(h, W, y, None, 2, 3), h)
    torch.testing.assert_close(B * g_h, (F.cosine_similarity(h, W[y]) - 1)[:, None] * W[y])


# %% Recipe, sampler, heads


def test_published_settings():
    args = script.parse(["--dataset", "cifar100lt"])
    assert (args.net, args.epochs, args.batch_size, args.width) == ("resnet32", 200, 128, 2)
    rate = [script.learning_rate(e - 1, args) for e in (1, 4, 5, 160, 161, 180, 181, 200)]  # epochs from 1
    assert np.allclose(rate, [0.02, 0.08, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert script.parse(["--dataset", "cifar10lt"]).width == 1


def test_partners_are_a_permutation_of_the_batch():
    batches = common.split_evenly(100, 32)
    pairs = script.draw_pairs(batches, generator())
    assert sorted(pairs[:, 0].tolist()) == list(range(100))
    for part in batches:
        assert sorted(pairs[part, 0].tolist()) == sorted(pairs[part, 1].tolist())
    assert (pairs[:, 0] != pairs[:, 1]).any()


def test_a_batch_has_one_lam_and_what_is_not_mixed_has_1():
    batches = common.split_evenly(60_000, 32)
    assert (script.draw_lam(False, batches, generator()) == 1).all()
    lam = script.draw_lam(True, batches, generator())
    of_batch = [lam[part].unique().item() for part in batches]  # which fails where a batch has two
    assert np.allclose(np.quantile(of_batch, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)  # Beta(1, 1)


def test_weights_are_inverse_frequencies_of_the_unmixed_labels():
    y = torch.tensor([[0, 1], [0, 1], [0, 0], [1, 0]])  # (N, 2): labels and their partners'
    weights = script.length_weights(y, [slice(0, 4)], 3)
    torch.testing.assert_close(weights, torch.tensor([[4 / 6, 2.0], [4 / 6, 2.0], [4 / 6] * 2, [2.0, 4 / 6]]))


def test_heads():
    features = torch.rand(6, 128)
    h, W = script.LearnableHead(10, 128)(features)
    assert torch.equal(h, features) and W.shape == (10, 128) and W.requires_grad
    h, W = script.SimplexHead(10, 128)(features)
    assert (h < 0).any()  # BatchNorm has left the positive orthant
    torch.testing.assert_close(h.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(W @ W.T, torch.full((10, 10), -1 / 9).fill_diagonal_(1), atol=1e-6, rtol=0)


# %% Runs


def dry_run(out, name, *flags):
    """The result, features.npz and weights of a dry run."""
    argv = [
        "--dry-run",
        "--precision",
        "fp32",
        "--device",
        "cpu",
        "--method",
        name,
        "--out",
        str(out),
        *flags,
    ]
    (result,) = script.main(argv)["results"]
    folder = out / "dry-run" / "etf_dr" / "digitslt" / name / "seed0"
    with np.load(folder / "features.npz") as arrays:
        return result, dict(arrays), torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_class_length_is_dot_regressions_and_reweight_cross_entropys(tmp_path, no_figures):
    for name, its_own in (("etf+dr", ["--class-length", "off"]), ("ce", ["--reweight", "on"])):
        h = dry_run(tmp_path / name, name)[1]["train_h"]
        for i, flags in enumerate((["--class-length", "off"], ["--reweight", "on"])):
            same = np.array_equal(h, dry_run(tmp_path / f"{name}{i}", name, *flags)[1]["train_h"])
            assert same == (flags != its_own)


@pytest.mark.parametrize("name", ["ce", "etf+ce"])
def test_what_is_learnt_what_is_fixed_and_what_is_kept(name, tmp_path, no_figures):
    """The class vectors move, or stay; features.npz reproduces the network's own logits."""
    result, arrays, state = dry_run(tmp_path, name)
    args = script.parse(["--dry-run"])
    data = common.prepare_data(args)
    torch.manual_seed(0)
    model = script.build_model(args, name, data)
    assert np.allclose(model["classifier"].W.detach(), arrays["W"], atol=1e-6) == (name == "etf+ce")
    model.load_state_dict(state)
    model.eval()
    x = ((data.test_x / 255 - data.mean) / data.std).permute(0, 3, 1, 2)
    h, W = model["classifier"](model["network"](x))
    z = (h @ W.T).detach().numpy()
    np.testing.assert_allclose(arrays["test_h"] @ arrays["W"].T, z, rtol=1e-3, atol=1e-4)
    assert (z.argmax(1) == data.test_y.numpy()).mean() == pytest.approx(result["accuracy"])


def test_a_class_without_test_images_is_nan_and_the_training_columns_are_whole():
    data = common.load_dataset("digitslt")
    absent = int(data.counts.argmin())
    there = data.test_y != absent
    data = data._replace(test_x=data.test_x[there], test_y=data.test_y[there])
    model = script.build_model(script.parse([]), "etf+dr", data)
    kept = {}
    run = types.SimpleNamespace(name="etf+dr", device=torch.device("cpu"), save_features=kept.update)
    run.autocast = contextlib.nullcontext
    measured = script.measure(model, data, run)
    assert math.isnan(measured["per_class"][absent]) and not math.isnan(measured["few"])
    right = ((kept["train_h"] @ kept["W"].T).argmax(1) == kept["train_y"]).double()
    assert measured["train_accuracy"] == pytest.approx(right.mean().item())
    by_class = [right[kept["train_y"] == k].mean().item() for k in data.groups["few"]]
    assert measured["train_few"] == pytest.approx(np.mean(by_class))
    assert math.isnan(measured["heads"]["logit_adjustment"])  # the logits are cosines


def test_refusals(tmp_path, user_error):
    with user_error("--batch-size 2", "3 or more"):
        script.main(["--batch-size", "2", "--out", str(tmp_path / "o")])
    data = common.load_dataset("digits")._replace(classes=tuple(map(str, range(100))))
    with user_error("--method etf+dr", "100 classes", "99", "64", "--width"):
        script.build_model(script.parse(["--net", "resnet32"]), "etf+dr", data)
    model = script.build_model(script.parse(["--dataset", "cifar100"]), "etf+dr", data)
    assert model["classifier"].W.shape == (100, 128)


def test_a_fixed_classifier_is_faster_for_the_few_on_digits(tmp_path, capsys):
    """Not a benchmark: in 10 epochs the fixed, normalised head sees to the tail, plain CE does not."""
    argv = ["--method", "ce", "etf+dr", "--epochs", "10", "--eval-every", "10", "--out", str(tmp_path)]
    ce, remedy = script.main(argv)["results"]
    assert remedy["few"] > ce["few"] + 0.15
    assert remedy["minority_cosine_W"] == pytest.approx(-1 / 9, abs=1e-6)
    printed = capsys.readouterr().out
    assert all(f"{title}:" in printed for title, _, _ in script.COLUMNS.values())
    figures = {path.name for path in (tmp_path / "etf_dr" / "digitslt").glob("*.png")}
    assert figures == {"training.png", "class_vectors.png"}
