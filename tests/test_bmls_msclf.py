"""bmls_msclf.py: the sampler, the losses against slow definitions, and the program as a user meets it."""

import copy
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

import bmls_msclf as script
from common import load_dataset, long_tail_counts

ROOT = Path(script.__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% The samplers


def sampler(K, seed=0, pairs="unordered"):
    """One image per class, so that image numbers are labels."""
    return script.BalancedMixedLabelSampler(torch.arange(K), K, generator(seed), pairs)


@pytest.mark.parametrize("pairs, M", [("unordered", 21), ("ordered", 36), ("distinct", 15)])
def test_one_sweep_is_every_pair_once(pairs, M):
    labels = sampler(6, 0, pairs).draw(M)
    seen = {tuple(p) if pairs == "ordered" else tuple(sorted(p)) for p in labels.tolist()}
    assert len(seen) == M
    assert any(a == b for a, b in seen) == (pairs != "distinct")


@settings(max_examples=40, deadline=None)
@given(
    K=st.integers(2, 7),
    chunks=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    pairs=st.sampled_from(["unordered", "ordered", "distinct"]),
    seed=st.integers(0, 10),
)
def test_counts_never_differ_by_more_than_one(K, chunks, pairs, seed):
    bmls = sampler(K, seed, pairs)
    counts = torch.zeros(K, K, dtype=torch.long)
    for T in chunks:
        labels = bmls.draw_labels(T)
        assert labels.shape == (T, 2)
        if pairs != "ordered":
            labels = labels.sort(1).values
        counts += torch.bincount(labels[:, 0] * K + labels[:, 1], minlength=K * K).view(K, K)
        kept = counts[{"ordered": ..., "unordered": tuple(torch.triu_indices(K, K)),
                       "distinct": tuple(torch.triu_indices(K, K, 1))}[pairs]]  # fmt: skip
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
    with pytest.raises(ValueError, match="two classes"):
        script.BalancedMixedLabelSampler(torch.tensor([0]), 1, generator(), "distinct")


# %% The losses


def mixed_batch(K=4, d=6, B=7, seed=0, unit=False):
    g = generator(seed)
    h, W = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (B, K))
    if unit:
        h, W = F.normalize(h, dim=1), F.normalize(W, dim=1)
    a, b = torch.randint(K, (2, B), generator=g)
    return h, W, a, b, torch.rand(B, generator=g, dtype=torch.float64)


def test_mixup_loss_is_cross_entropy_with_the_soft_label():
    h, W, a, b, lam = mixed_batch()
    soft = lam[:, None] * F.one_hot(a, 4) + (1 - lam[:, None]) * F.one_hot(b, 4)
    torch.testing.assert_close(script.mixup_loss(h @ W.T, a, b, lam), F.cross_entropy(h @ W.T, soft))


def k_squared_softmax(h, W, a, b, lam, scale=1.0, normalise=False):
    """The definition, one sample and one mixed class vector at a time."""
    K, losses = len(W), []
    for n in range(len(h)):
        scores = torch.empty(K, K, dtype=torch.float64)
        for i in range(K):
            for j in range(K):
                v = lam[n] * W[i] + (1 - lam[n]) * W[j]
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
    found = script.ms_unit(W, 5.0 * h @ W.T, a, b, lam)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_ms_unit_survives_opposite_class_vectors():
    W = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)  # at lam = 1/2 they mix to nothing
    h = torch.tensor([[0.6, 0.8]], requires_grad=True)
    loss = script.ms_unit(W, 16 * h @ W.T, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.5]))
    loss.backward()
    assert loss.isfinite() and W.grad.isfinite().all() and h.grad.isfinite().all()


def test_ms_dot_is_zero_at_the_mixed_direction_only():
    W = script.simplex_etf(5, 8, generator())
    a, b, lam = torch.tensor([0, 3]), torch.tensor([1, 3]), torch.tensor([0.3, 0.9], dtype=torch.float64)
    v = F.normalize(lam[:, None] * W[a] + (1 - lam[:, None]) * W[b], dim=1)
    assert script.ms_dot(v, W, a, b, lam) < 1e-30
    assert math.isclose(script.ms_dot(-v, W, a, b, lam), 2.0)  # 1/2 (-1 - 1)^2
    lengths = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None]
    assert math.isclose(script.ms_dot(lengths * v, W, a, b, lam), (0.25 + 1) / 4)


def test_remix_gives_the_label_to_the_rare_class():
    lam = torch.tensor([0.4, 0.6, 0.4, 0.6, 0.4, 0.6])
    n_a, n_b = torch.tensor([300, 300, 100, 100, 299, 100]), torch.tensor([100, 100, 300, 300, 100, 299])
    # a is 3 times as large and lam < 1/2: all b; b is 3 times as large and 1 - lam < 1/2: all a; else lam
    expected = torch.tensor([0.0, 0.6, 0.4, 1.0, 0.4, 0.6])
    assert torch.equal(script.remix_lam(lam, n_a, n_b), expected)


def test_balanced_softmax_is_the_softmax_of_counts_times_exponentials():
    h, W, a, _, _ = mixed_batch()
    n = torch.tensor([100, 20, 5, 1])
    e = n * (h @ W.T).exp()
    expected = -(e[torch.arange(7), a] / e.sum(1)).log().mean()
    torch.testing.assert_close(script.balanced_softmax(h @ W.T, a, n), expected)


def test_every_method_names_a_sampler_and_a_loss_that_exist():
    for method in script.METHODS.values():
        assert method.sampler in script.SAMPLERS
        assert (method.loss if method.loss != "ms" else "ms-raw") in script.LOSSES


@pytest.mark.parametrize("method", script.METHODS.values(), ids=script.METHODS)
def test_what_is_not_mixed_has_lam_1(method):
    for words in (["--lam", "batch"], ["--lam", "pair"]):
        args = script.parse(["--batch-size", "32", *words])
        lam = script.draw_lam(method, args, 100, generator())
        assert lam.shape == (100,)
        assert bool((lam == 1).all()) == (not method.mixes)
        if method.mixes:
            assert len(set(lam.tolist())) == (4 if "batch" in words else 100)


@settings(max_examples=20, deadline=None)
@given(K=st.integers(2, 12), spare=st.integers(-1, 6), seed=st.integers(0, 5))
def test_simplex_etf_is_exact(K, spare, seed):
    W = script.simplex_etf(K, K + spare, generator(seed))
    gram = torch.full((K, K), -1 / (K - 1), dtype=torch.float64).fill_diagonal_(1)
    assert (W @ W.T - gram).abs().max() < 1e-12
    if K > 2:
        with pytest.raises(ValueError, match="dimensions"):
            script.simplex_etf(K, K - 2)


# %% Network and schedule


def test_it_is_resnet32_not_resnet34():
    count = (
        sum(p.numel() for p in script.ResNet32(3).parameters()) + 64 * 10 + 10
    )  # and the usual linear head
    assert count == 464_154  # He et al. 2016, table 6: 0.46 M
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
    model = script.build_model(script.parse(["--ms", "raw", *flags]), script.METHODS["bmls+ms"], data)
    h, W, z = model["classifier"](torch.rand(5, model["network"].d))
    torch.testing.assert_close(z, model["classifier"].scale * h @ W.T)
    if head == "cosine":
        ones = torch.ones(5)
        torch.testing.assert_close(h.norm(dim=1), ones)
        torch.testing.assert_close(W.norm(dim=1), torch.ones(10))
        assert model["classifier"].scale == 16
    assert model["classifier"].W.requires_grad == ("etf" not in flags)


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


SHORT = ["--method", "bmls+ms", "--epochs", "3", "--batch-size", "64", "--precision", "fp32"]
SHORT += ["--device", "cpu"]
FOLDER = Path("bmls_msclf") / "digitslt" / "bmls+ms" / "seed0"


def test_killed_and_gone_on_with_is_the_same_to_the_last_bit(tmp_path, run_until_killed, no_figures):
    """kill -9 in the middle of a later epoch, and while a checkpoint is being renamed."""
    script.main([*SHORT, "--out", str(tmp_path / "whole")])
    broken = [*SHORT, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "step", 15)  # in epoch 2 of 12 steps
    run_until_killed(script.main, broken, "save", 1)  # after epoch 2, which is logged but not saved
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


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, ROOT / "bmls_msclf.py", "--dry-run", "--method", "bmls+ms", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training images" in done.stdout and "\nbmls+ms " in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / "bmls_msclf" / "digitslt"
    wanted = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    assert {path.name for path in (folder / "bmls+ms" / "seed0").iterdir()} >= wanted
    for name in ("heads", "class_vectors", "minority_cosine"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "bmls+ms" / "seed0" / "config.json").read_text())
    assert config["flags"]["method"] == "bmls+ms" and config["hardware"] and config["versions"]["torch"]


@pytest.mark.parametrize("flags", [
    ["--method", "all"], ["--method", "bmls+ms", "mixup", "--lam", "pair", "--pairs", "ordered"],
    ["--ms", "unit", "--profile", "exp"], ["--ms", "dot", "--classifier", "etf", "--pairs", "distinct"],
    ["--dataset", "digits", "--precision", "bf16", "--width", "2"],
])  # fmt: skip
def test_every_method_and_flag_trains(flags, tmp_path, no_figures):
    results = script.main(["--method", "bmls+ms", "--dry-run", "--out", str(tmp_path), *flags])["results"]
    assert len(results) == (len(script.METHODS) if "all" in flags else 2 if "mixup" in flags else 1)
    for path in tmp_path.rglob("features.npz"):  # what is saved reproduces the network's decisions
        saved = np.load(path)
        result = json.loads(path.with_name("result.json").read_text())
        logits = saved["test_h"] @ saved["W"].T
        assert (logits.argmax(1) == saved["test_y"]).mean() == pytest.approx(result["accuracy"], abs=1e-12)


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
    (["--method", "smote"], ["--method", "smote", "bmls+ms"]),
    (["--imbalance", "0.5"], ["--imbalance 0.5", "1 or more"]),
    (["--imbalance", "nan"], ["--imbalance", "nan"]),
    (["--epochs", "0"], ["--epochs", "0", "1 or more"]),
    (["--epochs", "many"], ["--epochs", "many"]),
    (["--batch-size", "1"], ["--batch-size", "1"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--alpha", "0"], ["--alpha", "0"]),
    (["--weight-decay", "2"], ["--weight-decay", "2"]),
    (["--ms", "dot"], ["--ms dot", "--classifier etf"]),
    (["--over"], ["--over"]),
    (["--net", "resnet34"], ["--net", "resnet32"]),
    (["--dataset", "folder:nowhere"], ["folder:", "nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())  # nothing half-written


def write_cifar(path, **changes):
    """A cifar100.npz of 200 + 100 random images that is right, but for the changes."""
    rng = np.random.default_rng(0)
    arrays = dict(
        train_x=rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8),
        train_y=np.arange(200) % 100,
        test_x=rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8),
        test_y=np.arange(100),
        classes=np.array([f"class {k}" for k in range(100)]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays | changes)


@pytest.mark.parametrize("changes, words", [
    ({"train_x": np.zeros((200, 28, 28, 1), np.uint8)}, ["train_x", "32, 32, 3"]),
    ({"test_y": np.full(100, 100)}, ["test_y", "0 to 99"]),
    ({"train_y": np.array([{"a": 1}] * 200, dtype=object)}, ["delete it"]),  # would have to be unpickled
])  # fmt: skip
def test_bad_data_files(changes, words, user_error, tmp_path):
    write_cifar(tmp_path / "cifar100.npz", **changes)
    with user_error("cifar100.npz", *words):
        script.main(["--dataset", "cifar100", "--data-dir", str(tmp_path), "--out", str(tmp_path)])


def test_fewer_features_than_an_etf_needs(user_error, tmp_path):
    write_cifar(tmp_path / "cifar100.npz")
    argv = ["--dataset", "cifar100", "--data-dir", str(tmp_path), "--out", str(tmp_path / "o")]
    argv += ["--classifier", "etf", "--dry-run"]
    with user_error("--classifier etf", "99", "64"):
        script.main(argv)
    assert not (tmp_path / "o").exists()
    args = script.parse([*argv, "--width", "2"])
    model = script.build_model(args, script.METHODS["ce"], load_dataset("cifar100", tmp_path))
    assert model["classifier"].W.shape == (100, 128)  # d = 128 will do


def test_a_loss_that_is_not_finite(user_error, tmp_path):
    with user_error("not finite", "epoch 1, step", "checkpoint: none", "--lr"):
        script.main([*SHORT, "--lr", "1e30", "--out", str(tmp_path)])
    assert not list(tmp_path.rglob("checkpoint.pt"))


def test_other_flags_than_the_run_had(user_error, tmp_path, no_figures):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    with user_error("--alpha 1.0", "--overwrite"):
        script.main([*SHORT, "--epochs", "1", "--alpha", "0.5", "--out", str(tmp_path)])


def test_the_remedy_helps_the_few_on_digits(tmp_path, no_figures):
    """Not a benchmark: over 6 epochs the class-balanced samplers see tail classes that Mixup hardly sees."""
    argv = ["--method", "mixup", "bmls+ms", "--epochs", "6", "--eval-every", "6", "--out", str(tmp_path)]
    mixup, remedy = script.main(argv)["results"]
    assert remedy["few"] > mixup["few"] + 0.2
    assert remedy["minority_cosine_W"] < mixup["minority_cosine_W"]


def test_a_batch_of_one_image_is_refused_where_batchnorm_cannot_use_it(user_error, tmp_path):
    """1,437 images cut evenly in batches of two leave one of a single image."""
    argv = ["--dataset", "digits", "--epochs", "1", "--batch-size", "2", "--out", str(tmp_path)]
    with user_error("--batch-size 2", "3"):
        script.main([*argv, "--method", "bmls+ms", "--ms", "unit"])
    assert not list(tmp_path.rglob("config.json"))
