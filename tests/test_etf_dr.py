"""etf_dr.py: losses and gradients against slow definitions, data, and the program as a user meets it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import etf_dr as script
from common import cut_for_dry_run, load_dataset, long_tail_counts, split_evenly

ROOT = Path(script.__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(K=5, d=7, B=11, seed=0):
    g = generator(seed)
    h, W = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (B, K))
    return h, W, torch.randint(K, (B,), generator=g)


# %% The method


@settings(max_examples=20, deadline=None)
@given(K=st.integers(2, 12), spare=st.integers(-1, 6), seed=st.integers(0, 5))
def test_simplex_etf_is_exact(K, spare, seed):
    W = script.simplex_etf(K, K + spare, generator(seed))
    gram = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-12
    if K > 2:  # two directions in one dimension may be the same ones
        assert not torch.equal(W, script.simplex_etf(K, K + spare, generator(seed + 1)))
    with pytest.raises(ValueError, match="dimensions"):
        script.simplex_etf(K, K - 2)


@settings(max_examples=30, deadline=None)
@given(y=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_class_length(y):
    length = script.class_length(torch.tensor(y), 7)
    gamma = len(y) / len(set(y))
    expected = [math.sqrt(gamma / y.count(k)) if k in y else 1.0 for k in range(7)]
    assert np.allclose(length, expected, rtol=1e-6)
    # every class in the batch gets the same total weight, and the mean weight is 1
    weight = length[torch.tensor(y)].square()
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)
    totals = [weight[torch.tensor(y) == k].sum().item() for k in set(y)]
    assert totals == pytest.approx([gamma] * len(totals), rel=1e-5)


@pytest.mark.parametrize("E_W, E_H", [(1, 1), (2, 5), (0.3, 4)])
def test_dot_regression_is_the_papers_formula(E_W, E_H):
    h, W, y = batch()
    losses = []
    for i in range(len(h)):
        E = math.sqrt(E_W * E_H)
        losses.append(1 / (2 * E) * (sum(W[y[i], j] * h[i, j] for j in range(7)) - E) ** 2)
    ours = script.dot_regression_loss(h, W, y, None, E_W, E_H).item()
    assert ours == pytest.approx(float(sum(losses) / len(h)))


def test_dot_regression_with_class_lengths_is_the_released_formula():
    """1/2 mean (h . m - |m||h|)^2 / |h| with m = l_y w_y, one sample at a time."""
    h, _, y = batch()
    h, W, length = F.normalize(h), script.simplex_etf(5, 7, generator()), script.class_length(y, 5).double()
    losses = []
    for i in range(len(h)):
        m = length[y[i]] * W[y[i]]
        losses.append(0.5 * (h[i] @ m - m.norm() * h[i].norm()) ** 2 / h[i].norm())
    ours = script.dot_regression_loss(h, W, y, length[y] ** 2)
    assert ours.item() == pytest.approx(float(sum(losses) / len(h)), rel=1e-12)
    counts = torch.bincount(y, minlength=5)
    weight = len(y) / (counts > 0).sum() / counts[y]  # and this is inverse-frequency weighting
    plain = torch.stack([script.dot_regression_loss(h[i : i + 1], W, y[i : i + 1]) for i in range(len(y))])
    assert ours.item() == pytest.approx((weight * plain).mean().item(), rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(2, 8), E_W=st.floats(0.1, 20), E_H=st.floats(0.1, 20), seed=st.integers(0, 9))
def test_dot_regression_is_zero_at_its_own_class_vector_only(K, E_W, E_H, seed):
    W = math.sqrt(E_W) * script.simplex_etf(K, K, generator(seed))
    y = torch.arange(K)
    best = math.sqrt(E_H / E_W) * W
    assert script.dot_regression_loss(best, W, y, None, E_W, E_H) < 1e-24 * (1 + E_W * E_H)
    opposite = script.dot_regression_loss(-best, W, y, None, E_W, E_H).item()
    assert opposite == pytest.approx(2 * math.sqrt(E_W * E_H))  # (2E)^2 / 2E
    # no negatives: moving along another class vector's part that is orthogonal to the own changes nothing
    side = W.roll(1, 0) - (W.roll(1, 0) * W).sum(1, keepdim=True) / E_W * W
    assert script.dot_regression_loss(best + side, W, y, None, E_W, E_H) < 1e-20 * (1 + E_W * E_H)


def test_weighed_cross_entropy():
    h, W, y = batch()
    length = script.class_length(y, 5).double()
    per_sample = -torch.log_softmax(h @ W.T, 1)[torch.arange(len(y)), y]
    assert script.cross_entropy_loss(h, W, y).item() == pytest.approx(per_sample.mean().item())
    expected = sum(length[c] ** 2 * loss for c, loss in zip(y, per_sample, strict=True)) / len(y)
    assert script.cross_entropy_loss(h, W, y, length[y] ** 2).item() == pytest.approx(expected.item())


@settings(max_examples=25, deadline=None)
@given(K=st.integers(2, 9), d=st.integers(1, 8), B=st.integers(1, 12), seed=st.integers(0, 9))
def test_gradients_against_autograd(K, d, B, seed):
    h, W, y = batch(K, d, B, seed)
    h, W = h.requires_grad_(), W.requires_grad_()
    g_h, g_W = torch.autograd.grad(script.cross_entropy_loss(h, W, y), (h, W))
    assert torch.allclose(sum(script.ce_feature_gradient(h, W, y)) / B, g_h, atol=1e-14)
    assert torch.allclose(sum(script.ce_classifier_gradient(h, W, y)), g_W, atol=1e-13)
    (g_h,) = torch.autograd.grad(script.dot_regression_loss(h, W, y, None, 2, 3), h)
    assert torch.allclose(script.dr_feature_gradient(h, W, y, 2, 3) / B, g_h, atol=1e-13)


def test_pull_is_of_the_own_class_and_push_of_the_others():
    h, W, y = batch()
    p = (h @ W.T).softmax(1)
    pull, push = script.ce_feature_gradient(h, W, y)
    for i in range(len(h)):
        assert torch.allclose(pull[i], -(1 - p[i, y[i]]) * W[y[i]])
        assert torch.allclose(push[i], sum(p[i, k] * W[k] for k in range(5) if k != y[i]))
    pull, push = script.ce_classifier_gradient(h, W, y)
    for k in range(5):
        own, others = y == k, y != k
        assert torch.allclose(pull[k], -((1 - p[own, k])[:, None] * h[own]).sum(0) / len(h))
        assert torch.allclose(push[k], (p[others, k][:, None] * h[others]).sum(0) / len(h))


# %% Network and schedule


def test_it_is_resnet32_not_resnet34():
    assert sum(p.numel() for p in script.ResNet32(3).parameters()) + 64 * 10 + 10 == 464_154
    assert script.ResNet32(1, width=2)(torch.randn(2, 1, 8, 8)).shape == (2, 128)


def test_published_settings():
    args = script.parse(["--dataset", "cifar100lt"])
    assert (args.epochs, args.batch_size, args.width, args.class_length) == (200, 128, 2, "on")
    rate = [script.learning_rate(e - 1, args) for e in (1, 4, 5, 160, 161, 180, 181, 200)]  # epochs from 1
    assert np.allclose(rate, [0.02, 0.08, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert script.parse(["--dataset", "cifar10lt"]).width == 1
    assert script.parse(["--dataset", "cifar100lt", "--width", "1"]).width == 1
    assert script.parse(["--dataset", "folderlt:x"]).net == "resnet50"
    assert script.parse(["--dataset", "svhnlt"]).net == "resnet32"


@pytest.mark.parametrize("name", ["ce", "etf+dr"])
def test_heads(name):
    args = script.parse(["--E-W", "4"])
    model = script.build_model(args, script.METHODS[name], load_dataset("digitslt"))
    features = torch.rand(6, model["network"].d)
    h, W = model["classifier"](features)
    assert model["classifier"].W.requires_grad == (name == "ce")
    if name == "ce":
        assert torch.equal(h, features) and torch.equal(W, model["classifier"].W)
    else:
        assert (h < 0).any()  # BatchNorm has left the positive orthant
        assert torch.allclose(h.norm(dim=1), torch.tensor(1.0))
        assert torch.allclose(W.norm(dim=1), torch.tensor(2.0))
        off = common.cosines(W)[~torch.eye(10, dtype=torch.bool)]
        assert torch.allclose(off, torch.tensor(-1 / 9, dtype=torch.float64), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(N=st.integers(2, 400), batch_size=st.integers(3, 50))
def test_no_batch_holds_a_single_image(N, batch_size):
    assert min(part.stop - part.start for part in split_evenly(N, batch_size)) >= 2


def test_partners_are_a_permutation_of_the_batch():
    batches = split_evenly(100, 32)
    pairs = script.draw_pairs(batches, generator())
    assert sorted(pairs[:, 0].tolist()) == list(range(100))
    for batch in batches:
        assert sorted(pairs[batch, 0].tolist()) == sorted(pairs[batch, 1].tolist())
    assert (pairs[:, 0] != pairs[:, 1]).any()


@pytest.mark.parametrize("method", script.METHODS.values(), ids=script.METHODS)
def test_what_is_not_mixed_has_lam_1(method):
    batches = split_evenly(100, 32)
    lam = script.draw_lam(method, 1.0, batches, generator())
    assert lam.shape == (100,) and bool((lam == 1).all()) == (not method.mixup)
    if method.mixup:
        assert all(len(set(lam[batch].tolist())) == 1 for batch in batches)


def test_weights_are_inverse_frequencies_of_the_unmixed_labels():
    y = torch.tensor([[0, 1], [0, 0], [0, 0], [1, 0]])  # (N, 2): labels and their partners'
    weights = script.length_weights(y, [slice(0, 4)], 3)
    torch.testing.assert_close(weights, torch.tensor([[4 / 6, 2.0], [4 / 6] * 2, [4 / 6] * 2, [2.0, 4 / 6]]))


def test_every_method_names_a_loss_that_exists():
    assert all(method.loss in script.LOSSES for method in script.METHODS.values())


# %% Data


def write_svhn_like(path, shape):
    """Shuffled classes of uneven size, digit 0 the smallest, as in SVHN; the pixels are the label."""
    sizes = [40, 140, 110, 100, 90, 100, 100, 110, 105, 105]  # 1000 images: N / K = 100
    y = np.repeat(np.arange(10), sizes)
    y = y[np.random.default_rng(0).permutation(len(y))]
    arrays = {}
    for split, labels in (("train", y), ("test", np.arange(10))):
        arrays[f"{split}_x"] = np.broadcast_to(labels[:, None, None, None], (len(labels), *shape)).astype(
            np.uint8
        )
        arrays[f"{split}_y"] = labels
    np.savez(path, **arrays, classes=np.array([str(k) for k in range(10)]))
    return torch.from_numpy(y), sizes


@pytest.mark.parametrize("name, shape", [("svhn", (32, 32, 3)), ("stl10", (96, 96, 3))])
def test_long_tails_of_uneven_classes_keep_their_labels(name, shape, tmp_path):
    y, sizes = write_svhn_like(tmp_path / f"{name}.npz", shape)
    data = load_dataset(f"{name}lt", tmp_path, imbalance=10)
    assert torch.equal(data.train_x[:, 5, 5, 1].long(), data.train_y)
    quotas = long_tail_counts(10, 100, 10)
    assert data.counts.tolist() == [min(q, n) for q, n in zip(quotas, sizes, strict=True)]
    # The released constructor takes y == k [:n_k] but appends n_k labels, also where there are fewer images:
    # from the first class on that is short, images and labels slide apart.
    images = torch.cat([y[y == k][:q] for k, q in enumerate(quotas)])
    labels = torch.cat([torch.full((q,), k) for k, q in enumerate(quotas)])[: len(images)]
    assert (images != labels).double().mean() > 0.2


@pytest.fixture
def folder(tmp_path):
    """PATH/train and PATH/test with three classes of PNG and JPEG images in several sizes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", (6, 3, 2)), ("test", (1, 1, 1))):
        for k, name in enumerate(("auk", "bee", "cod")):
            where = tmp_path / "animals" / split / name
            where.mkdir(parents=True)
            for i in range(n[k]):
                pixels = rng.integers(0, 256, (40 + 3 * i, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(where / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "animals"


def test_a_folder_through_resnet50(folder, tmp_path, no_figures):
    argv = ["--dataset", f"folder:{folder}", "--image-size", "40", "--batch-size", "4"]
    argv += ["--method", "etf+dr+mixup"]
    (result,) = script.main([*argv, "--dry-run", "--out", str(tmp_path / "out")])["results"]
    assert result["counts"] == [2, 2, 2] and 0 <= result["accuracy"] <= 1
    assert sum(p.numel() for p in script.resnet50(3, 1).parameters()) == 23_508_032
    (path,) = (tmp_path / "out").rglob("features.npz")
    with np.load(path) as arrays:
        assert arrays["train_h"].shape == (6, 2048) and arrays["W"].shape == (3, 2048)


# %% The program


def files(folder):
    """Everything that a run computes, for comparison to the last bit; times are left out."""
    result = json.loads((folder / "result.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in (result, *history):
        entry.pop("seconds")
    with np.load(folder / "features.npz", allow_pickle=False) as arrays:
        features = {key: arrays[key] for key in arrays.files}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return result, history, features, state["model"]


def assert_same_bits(one, two):
    assert json.dumps(one[:2]) == json.dumps(two[:2])
    assert one[2].keys() == two[2].keys() and one[3].keys() == two[3].keys()
    assert all(np.array_equal(one[2][key], two[2][key]) for key in one[2])
    assert all(torch.equal(one[3][key], two[3][key]) for key in one[3])


SHORT = "--method etf+dr+mixup --epochs 3 --batch-size 64 --precision fp32 --device cpu".split()
FOLDER = Path("etf_dr") / "digitslt" / "etf+dr+mixup" / "seed0"


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, no_figures, run_until_killed):
    """kill -9 in the middle of the first epoch, and while a later checkpoint is being renamed."""
    script.main([*SHORT, "--out", str(tmp_path / "whole")])
    broken = [*SHORT, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "step", 3)  # in the first epoch: nothing is saved yet
    run_until_killed(script.main, broken, "save", 2)  # after epoch 2, which is logged but not saved
    script.main(broken)
    assert_same_bits(files(tmp_path / "whole" / FOLDER), files(tmp_path / "broken" / FOLDER))
    assert not list((tmp_path / "broken").rglob(".*"))  # the half-renamed file is gone too


def test_the_seed_is_all_that_differs(tmp_path, no_figures):
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*SHORT, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files((tmp_path / out / FOLDER).with_name(f"seed{seed}")))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["W"], results[2][2]["W"])


def test_what_is_learnt_and_what_is_fixed(tmp_path, no_figures):
    """The learnable baseline's class vectors move (the released code's do not); the fixed ones stay."""
    for name in ("ce", "etf+ce"):
        script.main([*SHORT, "--method", name, "--epochs", "1", "--out", str(tmp_path)])
        args = script.parse(SHORT)
        torch.manual_seed(0)
        start = script.build_model(args, script.METHODS[name], load_dataset("digitslt"))["classifier"].W
        _, _, arrays, _ = files(tmp_path / "etf_dr" / "digitslt" / name / "seed0")
        assert np.allclose(start.detach(), arrays["W"], atol=1e-6) == (name == "etf+ce")


def test_each_flag_changes_what_it_should(tmp_path, no_figures):
    """--class-length is dr's, --reweight is ce's."""

    def weights(name, *flags):
        out = tmp_path / "-".join((name, *flags))
        script.main(["--method", name, "--dry-run", "--out", str(out), *flags])
        return files(out / "dry-run" / "etf_dr" / "digitslt" / name / "seed0")[2]["train_h"]

    dr, ce = weights("etf+dr"), weights("ce")
    assert not np.array_equal(dr, weights("etf+dr", "--class-length", "off"))
    assert np.array_equal(dr, weights("etf+dr", "--reweight", "on"))
    assert not np.array_equal(ce, weights("ce", "--reweight", "on"))
    assert np.array_equal(ce, weights("ce", "--class-length", "off"))


@pytest.mark.parametrize("name, flags", [("ce", ["--E-W", "4"]), ("etf+dr", ["--E-W", "9"])])
def test_features_reproduce_the_logits_of_every_head(name, flags, tmp_path, no_figures):
    """features.npz holds W at the length that the loss sees: h W^T is the network's own logit."""
    script.main(["--method", name, "--dry-run", "--precision", "fp32", "--out", str(tmp_path), *flags])
    folder = tmp_path / "dry-run" / "etf_dr" / "digitslt" / name / "seed0"
    result, _, arrays, state = files(folder)
    args = script.parse(["--method", name, *flags])
    data = cut_for_dry_run(load_dataset("digitslt"), args.batch_size)
    model = script.build_model(args, script.METHODS[name], data)
    model.load_state_dict(state)
    model.eval()
    x = ((data.test_x / 255 - data.mean) / data.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        h = model["classifier"].bn(model["network"](x))
        W = model["classifier"].W.detach()
        if name != "ce":
            h = h / h.norm(dim=1, keepdim=True)
            W = float(flags[-1]) ** 0.5 * W / W.norm(dim=1, keepdim=True)
    z = arrays["test_h"] @ arrays["W"].T
    np.testing.assert_allclose(z, h @ W.T, rtol=1e-3, atol=1e-4)
    assert (z.argmax(1) == arrays["test_y"]).mean() == pytest.approx(result["accuracy"])


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, ROOT / "etf_dr.py", "--dry-run", "--method", "etf+dr", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training images" in done.stdout
    assert done.stderr.count("\n") == 1 and "a ratio of 142, not 100" in done.stderr  # and no progress bar
    folder = tmp_path / "dry-run" / "etf_dr" / "digitslt"
    wanted = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    figures = {"heads", "training", "class_vectors"}
    assert "\netf+dr " in done.stdout
    made = {path.name for path in (folder / "etf+dr" / "seed0").iterdir()}
    assert made >= wanted
    for figure in figures:
        assert (folder / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "etf+dr" / "seed0" / "config.json").read_text())
    assert config["flags"]["method"] == "etf+dr" and config["hardware"] and config["versions"]["torch"]


@pytest.mark.parametrize("flags", [
    ["--profile", "step", "--eval-every", "3"], ["--dataset", "digits"],
    ["--E-W", "256", "--weight-decay", "0"], ["--net", "resnet32"],
])  # fmt: skip
def test_every_flag_trains(flags, tmp_path, no_figures):
    script.main(["--method", "ce+mixup", "etf+ce", "--dry-run", "--out", str(tmp_path), *flags])


def test_a_finished_run_is_not_redone(tmp_path, capsys, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(argv)["results"] == first
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before
    script.main([*argv, "--overwrite"])
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100", "folder:PATH"]),
    (["--method", "mixup"], ["--method", "'mixup'", "etf+dr"]),
    (["--batch-size", "2"], ["--batch-size 2", "3 or more"]),
    (["--E-W", "nan"], ["--E-W", "nan", "above 0"]),
    (["--alpha", "inf"], ["--alpha", "inf", "above 0"]),
    (["--class-length", "sqrt"], ["--class-length", "'sqrt'", "off"]),
    (["--imbalance", "0.5"], ["--imbalance 0.5"]),
    (["--net", "resnet34"], ["--net", "resnet32"]),
    (["--net", "resnet50"], ["--net resnet50", "3 colour channels"]),
    (["--dataset", "folder:nowhere"], ["--dataset folder:", "nowhere", "CLASS/IMAGE"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()  # nothing half-written


def test_one_class_is_none_to_tell_apart(folder, user_error):
    import shutil

    for split in ("train", "test"):
        for name in ("bee", "cod"):
            shutil.rmtree(folder / split / name)
    with user_error("--dataset folder:", "two classes"):
        script.main(["--dataset", f"folder:{folder}", "--image-size", "8"])


def test_fewer_features_than_an_etf_needs(tmp_path, user_error):
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class {k}" for k in range(100)])}
    for split in ("train", "test"):
        arrays[f"{split}_x"] = rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_y"] = np.arange(100)
    np.savez(tmp_path / "cifar100.npz", **arrays)
    argv = ["--dataset", "cifar100", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    with user_error("100 classes", "99", "64", "--width"):
        script.main([*argv, "--width", "1"])
    assert not (tmp_path / "o").exists()
    args = script.parse(argv)  # --width 2 is CIFAR-100's own
    model = script.build_model(args, script.METHODS["etf+dr"], load_dataset("cifar100", tmp_path))
    assert model["classifier"].W.shape == (100, 128)


def test_a_loss_that_is_not_finite(tmp_path, user_error):
    with user_error("not finite", "epoch 1, step", "checkpoint: none", "--lr"):
        script.main([*SHORT, "--method", "ce", "--lr", "1e30", "--out", str(tmp_path)])


def test_other_flags_than_the_run_had(tmp_path, user_error, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    script.main(argv)
    with user_error("--class-length on", "--overwrite"):
        script.main([*argv, "--class-length", "off"])


def test_a_fixed_classifier_is_faster_for_the_few_on_digits(tmp_path, no_figures):
    """Not a benchmark: in 10 epochs the fixed, normalised head sees to the tail, plain CE does not."""
    argv = ["--method", "ce", "etf+dr", "--epochs", "10", "--eval-every", "10", "--out", str(tmp_path)]
    ce, remedy = script.main(argv)["results"]
    assert remedy["few"] > ce["few"] + 0.15
    assert remedy["minority_cosine_W"] == pytest.approx(-1 / 9, abs=1e-6)
    assert remedy["nc1"] < ce["nc1"]
