"""fno_continual.py: classifier, masks, buffer and losses against slow definitions; the program in use."""

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

import fno_continual as script
from common import UserError, load_dataset, self_duality, split_tasks, zero_mean_metrics

ROOT = Path(script.__file__).resolve().parent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% The classifier


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 12), spare=st.integers(-1, 40), seed=st.integers(0, 5))
def test_fno_classifier_is_non_negative_and_orthogonal(K, spare, seed):
    d = K + spare
    if d < K:
        with pytest.raises(UserError, match="feature dimensions"):
            script.fno_classifier(K, d)
        return
    Q = script.fno_classifier(K, d, generator(seed))
    assert Q.shape == (K, d) and Q.dtype == torch.float64
    assert (Q >= 0).all() and (Q @ Q.T - torch.eye(K)).abs().max() < 1e-14
    assert ((Q > 0).sum(0) == 1).all()  # every dimension has one owner
    sizes = (Q > 0).sum(1).tolist()
    assert sorted(sizes) == [d // K] * (K - d % K) + [d // K + 1] * (d % K)
    for row, size in zip(Q, sizes, strict=True):
        np.testing.assert_allclose(row[row > 0], 1 / math.sqrt(size))


def test_who_gets_the_dimensions_is_drawn():
    Q = [script.fno_classifier(10, 512, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(Q[0], Q[1])
    assert not torch.equal(Q[0].argmax(0), Q[2].argmax(0))
    sizes = [(script.fno_classifier(10, 512, generator(seed)) > 0).sum(1) for seed in range(20)]
    extra = [tuple((size == 52).nonzero().flatten().tolist()) for size in sizes]
    assert len(set(extra)) > 10 and all(len(e) == 2 for e in extra)  # 512 = 10 * 51 + 2


@pytest.mark.parametrize("kind, learned", [("learnable", {"W"}), ("fno", {"w"}), ("etf", {"w"})])
def test_what_a_classifier_learns(kind, learned):
    classifier = script.Classifier(10, 64, kind)
    assert {name for name, _ in classifier.named_parameters()} == learned
    h = torch.rand(5, 64)
    torch.testing.assert_close(classifier(h), h @ classifier.W.T)  # w starts at 1
    assert {
        name for name, _ in script.Classifier(10, 64, kind, scaled=False).named_parameters()
    } == learned - {"w"}


def test_gradient_is_exactly_zero_outside_the_tasks_dimensions():
    classifier, task = script.Classifier(10, 100, "fno"), split_tasks(10, 5, 3)
    owner = classifier.W.argmax(0)
    h, y = torch.rand(30, 100, requires_grad=True), torch.arange(30) % 10
    z = classifier(h).masked_fill(~script.kept_logits(y, task, True), -torch.inf)
    F.cross_entropy(z, y).backward()
    own = task[owner] == task[y][:, None]  # (30, 100)
    assert (h.grad[~own] == 0).all() and (h.grad[own] != 0).all()


# %% Masks and losses


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 20), mask=st.booleans(), ace=st.booleans())
def test_kept_logits_are_their_definition(seed, mask, ace):
    g = generator(seed)
    K, y = 6, torch.randint(6, (5,), generator=g)
    task, seen = split_tasks(K, 3, seed), torch.rand(K, generator=g) < 0.5
    keep = script.kept_logits(y, task, mask, seen if ace else None)
    for n in range(5):
        for k in range(K):
            expected = not mask or task[k] == task[y[n]]
            if ace:
                expected = expected and (k in y.tolist() or not seen[k])
            assert bool(keep[n, k]) == bool(expected)
        assert keep[n, y[n]]  # a label is never masked


def toy_batch(B=7, n=5, K=6, seed=0):
    """A batch, a linear model on images (B, 1, 2, 2), and a replay of fixed samples that counts its calls."""
    g = generator(seed)
    A = torch.randn(4, K, generator=g, dtype=torch.float64, requires_grad=True)
    x, x_buf = torch.randn(B, 1, 2, 2, generator=g).double(), torch.randn(2, n, 1, 2, 2, generator=g).double()
    y, y_buf = torch.randint(K, (B,), generator=g), torch.randint(K, (2, n), generator=g)
    z_buf, calls = torch.randn(2, n, K, generator=g).double(), []

    def replay():
        calls.append(1)
        i = len(calls) - 1
        return x_buf[i], y_buf[i], z_buf[i]

    return A, lambda x: x.flatten(1) @ A, x, y, replay, x_buf, y_buf, z_buf, calls


def slow_ce(z, y, keep):
    """Sum of -log softmax over the logits that are kept, one sample and one class at a time."""
    total = 0.0
    for n in range(len(y)):
        kept = [k for k in range(z.shape[1]) if keep[n, k]]
        total += math.log(sum(math.exp(z[n, k].detach()) for k in kept)) - float(z[n, y[n]].detach())
    return total


@pytest.mark.parametrize("learner, combine", [
    ("sgd", "mean"), ("joint", "mean"), ("er", "mean"), ("er", "sum"), ("er-ace", "mean"), ("er-ace", "sum"),
    ("der++", "mean"), ("der++", "sum"),
])  # fmt: skip
def test_losses_are_their_definitions(learner, combine):
    A, logits, x, y, replay, x_buf, y_buf, z_buf, calls = toy_batch()
    keep, full = script.kept_logits(y, split_tasks(6, 3), True), torch.ones(5, 6, dtype=torch.bool)
    replay = None if learner in ("sgd", "joint") else replay
    loss, z = script.stream_loss(learner, logits, x, y, keep, replay, combine, alpha=0.3, beta=0.7)
    torch.testing.assert_close(z, logits(x))  # unmasked, for the buffer
    new = slow_ce(logits(x), y, keep)
    old = [slow_ce(logits(x_buf[i]), y_buf[i], full) for i in range(2)]
    if replay is None:
        expected = new / 7
    elif learner == "der++":
        mse = float(((logits(x_buf[0]) - z_buf[0]) ** 2).sum().detach()) / (5 * 6)
        expected = new / 7 + 0.3 * mse + 0.7 * old[1] / 5
    elif combine == "mean":
        expected = (new + old[0]) / (7 + 5)
    else:
        expected = new / 7 + old[0] / 5
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)
    assert len(calls) == {"sgd": 0, "joint": 0, "der++": 2}.get(learner, 1)
    loss.backward()
    assert A.grad.isfinite().all()  # minus infinity in a masked logit leaves no nan behind


def test_er_ace_does_not_push_old_classes_with_new_images():
    A, logits, x, y, *_ = toy_batch()
    y = 4 + y % 2  # the current task is 4, 5; 0 to 3 are old
    seen = torch.tensor([True] * 4 + [True, True])
    loss, _ = script.stream_loss(
        "er-ace", logits, x, y, script.kept_logits(y, split_tasks(6, 3), False, seen), None
    )
    loss.backward()
    assert (A.grad[:, :4] == 0).all() and (A.grad[:, 4:] != 0).any()


# %% The buffer


def test_the_reservoir_is_uniform_over_the_stream():
    """Every image of a stream of 40, whichever batches it came in, is kept with probability 8 / 40."""
    repeats, kept, pairs = 2000, torch.zeros(40), 0
    for seed in range(repeats):
        memory = script.Reservoir(8, generator(seed))
        for part in torch.arange(40).split([5, 13, 1, 10, 7, 4]):
            memory.add(part)
        inside = memory.rows[0]
        assert len(set(inside.tolist())) == len(memory) == 8
        kept[inside] += 1
        pairs += int(0 in inside and 39 in inside)
    p = 8 / 40
    assert ((kept / repeats - p).abs() < 4.5 * math.sqrt(p * (1 - p) / repeats)).all()
    p = 8 * 7 / (40 * 39)  # first and last together: subsets are uniform, too, not only members
    assert abs(pairs / repeats - p) < 4.5 * math.sqrt(p * (1 - p) / repeats)


def test_the_reservoir_against_algorithm_r_one_row_at_a_time():
    fast, g = script.Reservoir(6, generator(3)), generator(3)
    slow, n = [None] * 6, 0
    for part in torch.arange(200).split(11):
        fast.add(part, part * 10.0)
        for row, u in zip(
            part.tolist(), torch.rand(len(part), generator=g, dtype=torch.float64), strict=True
        ):
            place = n if n < 6 else int(u * (n + 1))
            if place < 6:
                slow[place] = row
            n += 1
        filled = min(n, 6)
        assert fast.rows[0][:filled].tolist() == slow[:filled]
        assert torch.equal(fast.rows[1], fast.rows[0] * 10.0)  # an image and its logits stay together


def test_what_is_drawn_from_the_reservoir():
    memory = script.Reservoir(10, generator())
    assert len(memory) == 0
    memory.add(torch.arange(4))
    assert len(memory) == 4 and sorted(memory.draw(32)[0].tolist()) == [0, 1, 2, 3]  # no more than there are
    memory.add(torch.arange(4, 30))
    counts = torch.zeros(30)
    for _ in range(3000):
        drawn = memory.draw(3)[0]
        assert len(set(drawn.tolist())) == 3  # without replacement
        counts[drawn] += 1
    share = counts[memory.rows[0]] / 3000
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 3000)


def test_the_reservoir_goes_on_from_its_state():
    one = script.Reservoir(5, generator())
    one.add(torch.arange(12))
    state, random = {"seen": one.seen, "rows": [row.clone() for row in one.rows]}, one.generator.get_state()
    one.add(torch.arange(12, 40))
    two = script.Reservoir(5, generator(9))
    two.load_state_dict(state)
    two.generator.set_state(random)
    two.add(torch.arange(12, 40))
    assert torch.equal(one.rows[0], two.rows[0]) and torch.equal(one.draw(3)[0], two.draw(3)[0])


# %% What is measured


def test_energy_map_is_its_definition():
    g = generator()
    h, y, owner = torch.rand(20, 9, generator=g), torch.arange(20) % 3, torch.arange(9) % 4
    h[0] = 0
    E = script.energy_map(h, y, owner, 4)
    for k in range(3):
        for block in range(4):
            shares = [float(h[n][owner == block].square().sum()) / max(float(h[n].square().sum()), 1e-300)
                      for n in range(20) if y[n] == k]  # fmt: skip
            assert float(E[k, block]) == pytest.approx(sum(shares) / len(shares))
    assert E[3].isnan().all()  # a class without features
    assert E[1].sum() == pytest.approx(1)


def test_separated_features_lie_on_the_diagonal():
    Q = script.fno_classifier(5, 23, generator())
    y = torch.arange(40) % 5
    torch.testing.assert_close(script.energy_map(3 * Q[y], y, Q.argmax(0), 5), torch.eye(5).double())


def balanced_model(features, kind="fno", K=5, d=23):
    """Stands for a network: the image's number is the row of its features."""

    class Lookup(torch.nn.Module):
        def forward(self, x):
            return features[x[:, 0, 0, 0].round().long()]

    classifier = script.Classifier(K, d, kind, scaled=False)
    return torch.nn.ModuleDict({"network": Lookup(), "classifier": classifier})


def test_collapse_of_features_at_the_optimum():
    K, N = 5, 40
    model, features = balanced_model(None), torch.zeros(N, 23)
    y = torch.arange(N) % K
    features[:] = 3 * model["classifier"].W[y]
    model["network"].forward = lambda x: features[x[:, 0, 0, 0].round().long()]
    images = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1)
    one = torch.ones(1)
    batches = script.Batches(images, torch.zeros(1), one / 255)  # (x / 255 - 0) / (1 / 255) = x
    data = load_dataset("digits")._replace(train_y=y)
    found = script.collapse(model, batches, torch.arange(N), data, "fp32")
    for key in ("znc1", "znc_equinorm", "znc_mean_cosine", "znc_alignment", "nc2_equiangular", "nc1", "nc4"):
        assert found[key] == pytest.approx(0, abs=1e-6), key
    assert found["nc3"] == pytest.approx(2 * (1 - math.sqrt(1 - 1 / K)), abs=1e-6)
    assert found["train_accuracy"] == 1
    # within-class spread along q_k alone, of variance s^2: tr(Sigma_W Sigma_B^-1) / K = s^2 / |mu|^2
    features *= torch.where(torch.arange(N) % 10 < 5, 0.9, 1.1)[:, None]
    found = script.collapse(model, batches, torch.arange(N), data, "fp32")
    assert found["znc1"] == pytest.approx(0.01, rel=1e-4)


def test_zero_mean_collapse_along_the_stream_leaves_out_later_classes():
    Q = script.fno_classifier(6, 12, generator())
    y = torch.arange(30) % 6
    h = 2 * Q[y]
    h[y >= 4] = 1.0  # classes to come: anywhere
    found = script.stream_collapse(h, y, Q, torch.arange(4))
    assert found["znc_max_cosine"] == pytest.approx(0, abs=1e-12) and found["znc_alignment"] < 1e-12
    assert script.stream_collapse(h, y, Q, torch.arange(6))["znc_max_cosine"] > 0.1
    assert math.isnan(script.stream_collapse(h, y, Q, torch.arange(1))["znc_max_cosine"])


# %% Theory


def test_the_optimum_against_another_optimiser():
    """Free features by scipy's SLSQP on one sample: same value, same place."""
    from scipy.optimize import minimize

    Q, E_H = 1.3 * script.fno_classifier(4, 6, generator()).numpy(), 3.0

    def loss(h):
        z = Q @ h
        return np.logaddexp.reduce(z) - z[1]

    ball = {"type": "ineq", "fun": lambda h: E_H - h @ h}
    start = np.full(6, 0.3)
    theory = math.log1p(3 * math.exp(-math.sqrt(E_H * 1.69)))
    found = minimize(loss, start, method="SLSQP", bounds=[(0, None)] * 6, constraints=ball, tol=1e-12)
    assert found.fun == pytest.approx(theory, abs=1e-8)
    h = script.peeled_features(torch.from_numpy(Q), torch.arange(4), E_H, True)[1]
    np.testing.assert_allclose(h, found.x, atol=1e-4)
    np.testing.assert_allclose(h, math.sqrt(E_H / 1.69) * Q[1], atol=1e-9)
    theory = math.log1p(3 * math.exp(-math.sqrt(E_H * 1.69 * 4 / 3)))
    found = minimize(loss, start, method="SLSQP", constraints=ball, tol=1e-12)
    assert found.fun == pytest.approx(theory, abs=1e-8)
    h = script.peeled_features(torch.from_numpy(Q), torch.arange(4), E_H, False)[1]
    assert loss(h.numpy()) == pytest.approx(theory, abs=1e-10)


@given(K=st.integers(2, 12), spare=st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_alignment_floor_of_centred_means(K, spare):
    Q = script.fno_classifier(K, K + spare, generator(spare))
    assert self_duality(Q, Q - Q.mean(0)) == pytest.approx(2 * (1 - math.sqrt(1 - 1 / K)), abs=1e-12)
    assert zero_mean_metrics(Q, Q)["znc_alignment"] < 1e-12


def test_synthetic_passes_and_draws(tmp_path, capsys):
    assert script.main(["--synthetic", "--out", str(tmp_path)]) == {"ok": True}
    out = capsys.readouterr().out
    assert "  NO\n" not in out and "0.058874" in out and "0.102633" in out and "0.045232" in out
    assert (tmp_path / "fno_continual" / "synthetic" / "synthetic.png").read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_claim_is_seen(tmp_path, capsys, monkeypatch):
    toy = {"curve": [1.0, 1.0, 1.0], "second": 1.0, "moved": 0.0, "dW": torch.ones(2, 3)}
    monkeypatch.setattr(script, "toy_stream", lambda kind, mask: toy)
    right = script.fno_classifier
    features = lambda Q, y, E_H, sign: E_H**0.5 * F.normalize(Q)[y] * (1 + 1e-6)  # noqa: E731
    monkeypatch.setattr(script, "peeled_features", features)
    monkeypatch.setattr(script, "fno_classifier", right)
    with pytest.raises(SystemExit) as end:
        script.main(["--synthetic", "--out", str(tmp_path)])
    assert end.value.code == 1 and "  NO\n" in capsys.readouterr().out


# %% Networks, recipes, schedules


def test_parameter_counts():
    network = script.resnet18(3)
    count = sum(p.numel() for p in network.parameters()) + 512 * 10 + 10
    assert count == 11_173_962  # the published ResNet-18 for CIFAR-10, with its linear head
    assert sum(p.numel() for p in script.MLP(784).parameters()) == 784 * 100 + 100 + 100 * 100 + 100


@pytest.mark.parametrize(
    "make", [lambda c: script.CNN(c), lambda c: script.ResNet32(c), lambda c: script.resnet18(c)]
)
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 33, 20)])
def test_features_are_not_negative(make, shape):
    network = make(shape[1])
    h = network(torch.randn(shape))
    assert h.shape == (2, network.d) and (h >= 0).all()
    assert (script.MLP(64)(torch.randn(2, 1, 8, 8)) >= 0).all()


def test_published_settings():
    args = script.parse(["--dataset", "cifar10", "--method", "er", "der++", "--buffer", "200", "500", "5120"])
    assert (args.net, args.tasks, args.epochs, args.batch_size, args.augment) == ("resnet18", 5, 50, 32, True)
    assert args.weight_decay == 0 and args.replay == "mean"
    jobs = {(j.method, j.buffer): script.job_flags(args, j, 0) for j in script.list_jobs(args)}
    found = {key: (flags["lr"], flags["alpha"], flags["beta"]) for key, flags in jobs.items()}
    assert found == {
        ("er", 200): (0.1, None, None), ("er", 500): (0.1, None, None), ("er", 5120): (0.1, None, None),
        ("der++", 200): (0.03, 0.1, 0.5), ("der++", 500): (0.03, 0.2, 0.5), ("der++", 5120): (0.03, 0.1, 1.0),
    }  # fmt: skip
    hundred = script.parse(["--dataset", "cifar100"])
    assert hundred.tasks == 10
    rate = [script.learning_rate(0.1, e - 1, hundred) for e in (1, 35, 36, 45, 46, 50)]  # epochs from 1
    np.testing.assert_allclose(rate, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert script.learning_rate(0.1, 49, args) == 0.1
    balanced = script.parse(["--dataset", "cifar10", "--balanced"])
    assert (balanced.epochs, balanced.batch_size, balanced.weight_decay) == (350, 128, 5e-4)
    assert (balanced.augment, balanced.tasks) == (False, 1)
    rate = [script.learning_rate(1.0, e - 1, balanced) for e in (1, 117, 118, 233, 234)]
    np.testing.assert_allclose(rate, [1, 1, 0.1, 0.1, 0.01])
    assert script.job_flags(balanced, script.list_jobs(balanced)[0], 0)["lr"] == 0.06786


def test_both_ways_unless_a_mask_is_asked_for():
    names = lambda argv: [job.name for job in script.list_jobs(script.parse(argv))]  # noqa: E731
    assert names(["--method", "er", "joint", "--classifier", "fno"]) == [
        "er50-fno",
        "er50-fno-mask",
        "joint-fno",
    ]
    assert names(["--method", "er", "--mask", "--classifier", "etf"]) == ["er50-etf-mask"]
    assert names(["--method", "sgd", "--no-mask", "--buffer", "7"]) == ["sgd-learnable", "sgd-fno"]
    assert len(names([])) == 18


def test_per_class_takes_the_same_images_for_every_seed():
    data = load_dataset("digits")
    pool = script.training_pool(script.parse(["--per-class", "20"]), data)
    assert torch.bincount(data.train_y[pool]).tolist() == [20] * 10 and len(set(pool.tolist())) == 200
    assert len(script.training_pool(script.parse([]), data)) == 1437
    balanced = script.training_pool(script.parse(["--balanced"]), data)
    assert torch.bincount(data.train_y[balanced]).tolist() == [int(data.counts.min())] * 10


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
    memory = {str(i): row for i, row in enumerate(state["memory"]["rows"])}
    return result, history, features, {**state["model"], **memory, "generator": state["generator"]}


def assert_same_bits(one, two):
    assert json.dumps(one[:2]) == json.dumps(two[:2])
    assert one[2].keys() == two[2].keys() and one[3].keys() == two[3].keys()
    assert all(np.array_equal(one[2][key], two[2][key], equal_nan=True) for key in one[2])
    assert all(torch.equal(one[3][key], two[3][key]) for key in one[3])


SHORT = ["--tasks", "3", "--epochs", "2", "--per-class", "30", "--precision", "fp32", "--device", "cpu"]
OUT = Path("fno_continual") / "digits"


def interrupt_at_step(n, monkeypatch):
    """Ctrl-C at the n-th optimiser step, once."""
    step, calls = torch.optim.SGD.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)


def test_killed_in_mid_task_and_resumed_is_the_same_to_the_last_bit(no_figures, tmp_path, run_until_killed):
    """Six epochs of 9 to 12 steps, two a task: kill -9 in mid-task, and while a checkpoint is renamed."""
    job = ["--method", "der++", "--classifier", "fno", "--mask", "--augment", *SHORT]
    script.main([*job, "--out", str(tmp_path / "whole")])
    broken = [*job, "--out", str(tmp_path / "broken")]
    again = [*broken, "--resume"]
    run_until_killed(script.main, broken, "step", 38)  # in the second epoch of the second task
    run_until_killed(script.main, again, "save", 1)  # after an epoch that is logged but not saved
    script.main(again)
    folder = OUT / "der++50-fno-mask" / "seed0"
    assert_same_bits(files(tmp_path / "whole" / folder), files(tmp_path / "broken" / folder))
    assert not list((tmp_path / "broken").rglob(".*"))


@pytest.mark.parametrize("method, flags", [("er-ace", ["--no-mask"]), ("er", ["--mask", "--net", "cnn"])])
def test_interrupted_in_mid_task_and_resumed(no_figures, method, flags, tmp_path, monkeypatch):
    """ER-ACE must know which classes it has met, and a network its BatchNorm statistics."""
    job = ["--method", method, "--classifier", "learnable", *flags, *SHORT]
    script.main([*job, "--out", str(tmp_path / "whole")])
    interrupt_at_step(30, monkeypatch)
    with pytest.raises(SystemExit):
        script.main([*job, "--out", str(tmp_path / "broken")])
    script.main([*job, "--out", str(tmp_path / "broken"), "--resume"])
    (folder,) = [path.parent for path in (tmp_path / "whole").rglob("result.json")]
    broken = tmp_path / "broken" / folder.relative_to(tmp_path / "whole")
    assert_same_bits(files(folder), files(broken))


def test_the_seed_is_all_that_differs(no_figures, tmp_path):
    job, results = ["--method", "er", "--classifier", "fno", "--mask", *SHORT], []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*job, "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files(tmp_path / out / OUT / "er50-fno-mask" / f"seed{seed}"))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["test_h"], results[2][2]["test_h"])


def test_dry_run_of_everything_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, str(ROOT / "fno_continual.py"), "--dry-run", "--out", str(tmp_path)]
    argv += ["--classifier", "fno", "--mask"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "5 variants" in done.stdout and "1,437 training images" in done.stdout
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / OUT
    for name in ("sgd-fno-mask", "er50-fno-mask", "er-ace50-fno-mask", "der++50-fno-mask", "joint-fno"):
        made = {path.name for path in (folder / name / "seed0").iterdir()}
        kept = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
        assert made >= kept | {"feature_energy.png"}
    for name in ("accuracy_matrix", "forgetting", "feature_energy"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "der++50-fno-mask" / "seed0" / "config.json").read_text())
    expected = {"method": "der++", "classifier": "fno", "mask": True, "buffer": 50, "lr": 0.03, "alpha": 0.1}
    assert config["flags"].items() >= expected.items() and config["hardware"] and config["versions"]["torch"]
    with np.load(folder / "er50-fno-mask" / "seed0" / "features.npz") as arrays:
        assert {"train_h", "train_y", "test_h", "test_y", "W", "energy"} == set(arrays.files)
        assert arrays["train_h"].shape == (1437, 100) and arrays["W"].shape == (10, 100)


@pytest.mark.parametrize("flags", [
    ["--method", "er", "er-ace", "--replay", "sum", "--no-mask", "--classifier", "etf"],
    ["--method", "er", "--tasks", "3", "--order-seed", "4", "--mask", "--classifier", "fno"],  # 4 + 3 + 3
    ["--method", "er", "--tasks", "1", "--no-mask", "--classifier", "fno"],
    ["--method", "der++", "--alpha", "0", "--beta", "1", "--buffer", "2", "--mask", "--classifier", "fno"],
    ["--method", "er", "--net", "resnet32", "--batch-size", "3", "--mask", "--classifier", "fno"],
    ["--method", "sgd", "--net", "resnet18", "--tasks", "1", "--mask", "--classifier", "fno"],
    ["--method", "er", "--precision", "bf16", "--net", "cnn", "--augment", "--mask", "--classifier", "etf"],
    ["--balanced", "--classifier", "fno", "etf", "--net", "mlp"],
])  # fmt: skip
def test_every_flag_trains(flags, tmp_path):
    script.main(["--dry-run", "--per-class", "6", "--out", str(tmp_path), *flags])


def test_the_matrix_in_the_result_is_that_of_the_stream(no_figures, tmp_path):
    argv = ["--method", "er", "joint", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    er, joint = script.main(argv)["results"]
    R = np.array(er["matrix_class_il"])
    assert R.shape == np.array(er["matrix_task_il"]).shape == (3, 3)
    assert er["class_il"] == pytest.approx(R[-1].mean())
    assert er["forgetting"] == pytest.approx(np.mean([R[:-1, 0].max() - R[-1, 0], R[1, 1] - R[-1, 1]]))
    path = tmp_path / OUT / "er50-fno-mask" / "seed0" / "metrics.jsonl"
    history = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["task"] for line in history] == [0, 0, 1, 1, 2, 2]
    assert ["class_il" in line for line in history] == [False, True] * 3
    assert all("znc_mean_cosine" in line for line in history[1::2])
    assert len(joint["matrix_class_il"]) == 1 and math.isnan(joint["forgetting"])
    per_class, task = np.array(er["per_class"]), np.array(er["task_of_class"])
    data = load_dataset("digits")
    n = torch.bincount(data.test_y).numpy()
    for t in range(3):
        expected = (per_class * n)[task == t].sum() / n[task == t].sum()
        assert R[-1, t] == pytest.approx(expected)


def test_forgetting_and_its_remedy_on_digits(no_figures, tmp_path):
    """Not a benchmark: without a buffer the unmasked learner keeps the last task only, which is 20%."""
    argv = ["--method", "sgd", "joint", "--classifier", "fno", "--epochs", "3", "--out", str(tmp_path)]
    plain, masked, joint = script.main(argv)["results"]
    assert plain["class_il"] < 0.3 and plain["forgetting"] > 0.8
    assert joint["class_il"] > 0.9
    assert masked["class_il"] > plain["class_il"] + 0.1 and masked["forgetting"] < 0.4


def test_balanced_shows_zero_mean_collapse(tmp_path, capsys):
    argv = ["--balanced", "--epochs", "10", "--per-class", "70", "--out", str(tmp_path)]
    learnable, fno = script.main(argv)["results"]
    for result in (learnable, fno):
        assert result["zero_error_epoch"] and result["train_accuracy"] > 0.999
    assert fno["znc_alignment"] < learnable["znc_alignment"] - 0.1
    out = capsys.readouterr().out
    assert "fno, ZNC" in out and "0.1026" in out
    assert (tmp_path / OUT / "znc.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_redone(no_figures, tmp_path, capsys):
    argv = ["--method", "sgd", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    path = tmp_path / OUT / "sgd-fno-mask" / "seed0" / "result.json"
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert json.dumps(script.main(argv)["results"]) == json.dumps(first)
    assert "--overwrite" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    script.main([*argv, "--overwrite"])
    assert path.stat().st_mtime_ns > before


def fail(argv, capsys, *words):
    """The program ends with 2 and one line on stderr that has these words."""
    with pytest.raises(SystemExit) as end:
        script.main([str(word) for word in argv])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("fno_continual.py: error: "), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "folder:PATH"]),
    (["--method", "ewc"], ["--method", "ewc", "der++"]),
    (["--classifier", "cosine"], ["--classifier", "cosine", "fno"]),
    (["--tasks", "0"], ["--tasks 0", "1 or more"]),
    (["--tasks", "11"], ["--tasks 11", "1 to 10"]),
    (["--tasks", "6"], ["--mask", "one class", "--no-mask"]),
    (["--buffer", "1"], ["--buffer 1", "--method sgd"]),
    (["--batch-size", "2"], ["--batch-size 2", "3 or more"]),
    (["--epochs", "0"], ["--epochs 0"]),
    (["--per-class", "1"], ["--per-class 1"]),
    (["--lr", "0"], ["--lr 0.0", "above 0"]),
    (["--lr", "nan"], ["--lr nan"]),
    (["--alpha", "-1"], ["--alpha -1.0", "0 or more"]),
    (["--beta", "inf"], ["--beta inf"]),
    (["--weight-decay", "2"], ["--weight-decay 2"]),
    (["--net", "resnet18", "--width", "2"], ["--width 2", "resnet32"]),
    (["--balanced", "--tasks", "5"], ["--balanced", "--tasks"]),
    (["--balanced", "--mask"], ["--balanced", "--mask"]),
    (["--dataset", "folder:nowhere"], ["folder:nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, capsys, tmp_path):
    fail([*argv, "--out", tmp_path], capsys, *words)
    assert not list(tmp_path.iterdir())  # nothing half-written


def write_folder(path, counts, size=8):
    """A folder data set with counts[k] training images of class k and two test images of each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, n in (("train", counts), ("test", [2] * len(counts))):
        for k, count in enumerate(n):
            (path / split / f"class{k}").mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(image).save(path / split / f"class{k}" / f"{i}.png")


def test_a_folder_of_images(no_figures, tmp_path, capsys):
    write_folder(tmp_path / "images", [3, 4, 2, 3, 5])
    argv = ["--dataset", f"folder:{tmp_path / 'images'}", "--image-size", "8", "--net", "cnn"]
    argv += ["--out", tmp_path / "o"]
    argv = [str(word) for word in argv]
    extra = ["--tasks", "2", "--epochs", "1", "--method", "der++", "--classifier", "fno", "--mask"]
    assert np.array(script.main([*argv, *extra])["results"][0]["matrix_class_il"]).shape == (2, 2)
    fail([*argv, "--mask"], capsys, "--mask", "one class")  # five tasks of one class


def test_a_task_with_too_few_images(tmp_path, capsys):
    write_folder(tmp_path / "images", [1, 4, 4])
    argv = ["--dataset", f"folder:{tmp_path / 'images'}", "--image-size", "8", "--net", "cnn"]
    argv += ["--out", tmp_path / "o"]
    fail([*argv, "--tasks", "3", "--no-mask"], capsys, "--tasks 3", "task 1 has 1 training images")
    fail([*argv, "--balanced"], capsys, "--balanced", "class0")
    assert not (tmp_path / "o").exists()


def test_more_classes_than_feature_dimensions(no_figures, capsys, tmp_path):
    rng = np.random.default_rng(0)
    arrays = dict(
        train_x=rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8),
        train_y=np.arange(200) % 100,
        test_x=rng.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8),
        test_y=np.arange(100),
        classes=np.array([f"class {k}" for k in range(100)]),
    )
    np.savez(tmp_path / "cifar100.npz", **arrays)
    argv = ["--dataset", "cifar100", "--data-dir", tmp_path, "--out", tmp_path / "o", "--net", "resnet32"]
    argv += ["--method", "er", "--mask", "--dry-run", "--classifier", "fno"]
    fail(argv, capsys, "--classifier fno", "100 classes", "64")
    assert not (tmp_path / "o").exists()
    done = script.main([str(word) for word in [*argv, "--net", "cnn"]])  # d = 128 will do
    assert np.array(done["results"][0]["matrix_class_il"]).shape == (10, 10)


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    argv = ["--method", "er", "--classifier", "learnable", "--no-mask", *SHORT, "--lr", "1e30"]
    argv += ["--out", tmp_path]
    fail(argv, capsys, "not finite", "epoch 1, step", "checkpoint.pt", "--lr")
    state = torch.load(tmp_path / OUT / "er50-learnable" / "seed0" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 0 and all(v.isfinite().all() for v in state["model"].values())


def test_other_flags_than_the_run_had(no_figures, capsys, tmp_path):
    argv = ["--method", "der++", "--classifier", "fno", "--mask", *SHORT, "--out", tmp_path]
    script.main([str(word) for word in argv])
    fail([*argv, "--alpha", "0.5"], capsys, "--alpha 0.1", "--overwrite")
    fail([*argv, "--order-seed", "1"], capsys, "--order-seed None")


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(no_figures, capsys, tmp_path, monkeypatch):
    interrupt_at_step(30, monkeypatch)
    argv = ["--method", "er", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    assert end.value.code == 130
    message = capsys.readouterr().err
    assert message.strip().endswith("--resume") and "python fno_continual.py --method er" in message
    state = torch.load(tmp_path / OUT / "er50-fno-mask" / "seed0" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2 and state["memory"]["seen"] == 240  # two epochs of the first four classes
    fail(argv, capsys, "--resume")  # not silently anew, nor silently on
    script.main([*argv, "--resume"])
