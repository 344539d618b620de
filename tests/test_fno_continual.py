"""fno_continual.py: classifier, mask, buffer and training loop against slow definitions; what it measures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import fno_continual as script


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# %% The classifier


@settings(max_examples=40, deadline=None)
@given(K=st.integers(1, 12), spare=st.integers(-1, 40), seed=st.integers(0, 5))
def test_fno_classifier_is_non_negative_and_orthogonal(K, spare, seed):
    d = K + spare
    if d < K:
        with pytest.raises(ValueError, match="feature dimensions"):
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
    Q = [script.fno_classifier(10, 512, generator(seed)) for seed in (0, 0, *range(1, 20))]
    assert torch.equal(Q[0], Q[1]) and not torch.equal(Q[1].argmax(0), Q[2].argmax(0))
    larger = {tuple(((q > 0).sum(1) == 52).nonzero().flatten().tolist()) for q in Q}
    assert len(larger) > 10 and {len(classes) for classes in larger} == {2}  # 512 = 10 * 51 + 2


@pytest.mark.parametrize("head, learned", [
    (script.FNOHead(10, 64), {"w"}),
    (script.LearnableHead(10, 64, False), {"W"}), (script.LearnableHead(10, 64, True), {"W", "b"}),
])  # fmt: skip
def test_what_a_classifier_learns(head, learned):
    assert {name for name, _ in head.named_parameters()} == learned
    if "w" in learned:
        head.w.data.fill_(1.7)
        torch.testing.assert_close(head.W.norm(dim=1), torch.full((10,), 1.7))
    h = torch.rand(5, 64)
    torch.testing.assert_close(head(h), h @ head.W.T + (0 if head.b is None else head.b))
    assert head(h.bfloat16()).dtype == torch.float32


# %% Mask and loss


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 20), tasks=st.integers(1, 6))
def test_the_mask_and_its_loss_are_their_definitions(seed, tasks):
    y = torch.randint(6, (5,), generator=generator(seed))
    z = torch.randn(5, 6, generator=generator(seed), dtype=torch.float64, requires_grad=True)
    task = common.split_tasks(6, tasks)
    keep = script.task_mask(y, task)
    total = 0.0
    for n in range(5):
        kept = [k for k in range(6) if task[k] == task[y[n]]]
        assert keep[n].nonzero().flatten().tolist() == kept
        total += math.log(sum(math.exp(z[n, k].detach()) for k in kept)) - z[n, y[n]].item()
    loss = script.masked_ce(z, y, keep)
    assert loss.item() == pytest.approx(total / 5, rel=1e-12)
    loss.backward()
    assert z.grad.isfinite().all() and (z.grad[~keep] == 0).all()  # minus infinity leaves no nan behind


# %% The buffer


def logits_of(index):
    return index[:, None] * torch.tensor([1.0, 10.0])


def test_the_reservoir_is_uniform_over_the_stream():
    """Every image of a stream of 6, whichever batches it came in, is kept with probability 2 / 6."""
    repeats, kept, pairs = 2000, torch.zeros(6), 0
    for seed in range(repeats):
        memory = script.Reservoir(2, 2, generator(seed))
        for part in torch.arange(6).split([3, 1, 2]):
            memory.add(part, torch.cat([logits_of(part), torch.full((4, 2), -1.0)]))  # replayed ones behind
        assert len(set(memory.index.tolist())) == len(memory) == 2
        assert torch.equal(memory.z, logits_of(memory.index))  # an image and its logits stay together
        kept[memory.index] += 1
        pairs += int(0 in memory.index and 5 in memory.index)
    assert ((kept / repeats - 1 / 3).abs() < 4.5 * math.sqrt(2 / 9 / repeats)).all()
    p = 1 / 15  # first and last together: pairs are uniform, too, not only members
    assert abs(pairs / repeats - p) < 4.5 * math.sqrt(p * (1 - p) / repeats)


def test_what_is_drawn_from_the_reservoir():
    memory, counts = script.Reservoir(10, 2, generator()), torch.zeros(30)
    assert len(memory) == 0
    memory.add(torch.arange(4), logits_of(torch.arange(4)))
    assert sorted(memory.draw(32)[0].tolist()) == [0, 1, 2, 3]  # no more than there are
    memory.add(torch.arange(4, 30), logits_of(torch.arange(4, 30)))
    for _ in range(2000):
        index, z = memory.draw(3)
        assert len(set(index.tolist())) == 3 and torch.equal(z, logits_of(index))
        counts[index] += 1
    assert (counts[memory.index] / 2000 - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 2000)


# %% Training


SHORT = ["--tasks", "3", "--epochs", "2", "--per-class", "12", "--precision", "fp32", "--device", "cpu"]


def plain_ce(z, y, competing):
    """-log softmax(z)_y of each row, by its definition; competing: the classes in the softmax."""
    return torch.stack([row[competing].logsumexp(0) - row[k] for row, k in zip(z, y, strict=True)])


@pytest.mark.parametrize("method, classifier, mask", [
    ("sgd", "learnable", False), ("er", "fno", True), ("er", "learnable", False),
    ("der++", "fno", False), ("der++", "learnable", True), ("joint", "fno", False),
])  # fmt: skip
def test_a_learner_is_what_its_authors_wrote(method, classifier, mask, no_figures, tmp_path):
    """The same draws, losses by their formulas, new and replayed images apart, steps p -= lr dL/dp."""
    argv = ["--method", method, "--classifier", classifier, "--mask" if mask else "--no-mask"]
    argv += [*SHORT, "--out", str(tmp_path)]
    script.main(argv)
    (path,) = tmp_path.rglob("checkpoint.pt")
    trained = torch.load(path, weights_only=True)["model"]

    args = script.parse(argv)
    (job,) = script.list_jobs(args).values()
    data = script.select_images(args, common.load_dataset("digits"))
    torch.manual_seed(0)
    model, g = script.build_model(args, classifier, data), generator()
    params = list(model.parameters())
    assert all(p.abs().max() == 0 for p in params if p.ndim == 1)  # the released start of split MNIST
    assert all(0.95 < p.abs().max() / math.sqrt(6 / sum(p.shape)) <= 1 for p in params if p.ndim == 2)
    views, memory = common.Batches(data.train_x, data.mean, data.std), script.Reservoir(50, 10, g)
    everything = list(range(10))
    for stage in [everything] if method == "joint" else [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]:
        for _ in range(2):
            order = torch.tensor([n for n in range(120) if data.train_y[n] in stage])
            order = order[torch.randperm(len(order), generator=g)]
            for part, x in views.epoch(order, 10, g):
                z = model["classifier"](model["network"](x))
                new = plain_ce(z, data.train_y[order[part]], stage if mask else everything)
                loss = new.mean()
                draws = []
                for _ in range({"er": 1, "der++": 2}.get(method, 0) if len(memory) else 0):
                    index, stored = memory.draw(10)
                    old = model["classifier"](model["network"](views.load(index, g)))
                    draws.append(((old - stored) ** 2, plain_ce(old, data.train_y[index], everything)))
                if draws and method == "er":
                    loss = torch.cat([new, draws[0][1]]).mean()
                if draws and method == "der++":  # alpha and beta of split CIFAR-10 with 200 images
                    loss = loss + 0.1 * draws[0][0].mean() + 0.5 * draws[1][1].mean()
                for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                    p.data -= (0.03 if method == "der++" else 0.1) * gradient
                if job["buffer"]:
                    memory.add(order[part], z.detach())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5)


def settings_of(*argv):
    """(lr, alpha, beta, images per replayed draw) of sgd, and of er and der++ with each buffer."""
    jobs = script.list_jobs(script.parse(["--method", "sgd", "er", "der++", "--classifier", "fno", *argv]))
    return [tuple(job.values())[4:] for job in jobs.values() if not job["mask"]]


BUFFERS = ["--buffer", "200", "500", "5120"]
FAST, SLOW = (0.1, 0, 0, 32), (0.03, 0, 0, 32)


@pytest.mark.parametrize("argv, expected", [
    (["--dataset", "cifar10", *BUFFERS],
     [FAST] * 4 + [(0.03, 0.1, 0.5, 32), (0.03, 0.2, 0.5, 32), (0.03, 0.1, 1.0, 32)]),
    (["--dataset", "cifar100", *BUFFERS], [SLOW, *[FAST] * 3, *[(0.03, 0.1, 0.5, 32)] * 3]),
    (["--dataset", "mnist", *BUFFERS],
     [(0.03, 0, 0, 10), (0.01, 0, 0, 10), (0.1, 0, 0, 10), (0.1, 0, 0, 10),
      (0.03, 0.2, 1.0, 128), (0.03, 1.0, 0.5, 10), (0.1, 0.2, 0.5, 64)]),
    (["--dataset", "mnist", "--buffer", "201"], [(0.03, 0, 0, 10), (0.1, 0, 0, 10), (0.03, 1.0, 0.5, 10)]),
    (["--lr", "0.2"], [(0.2, 0, 0, 10), (0.2, 0, 0, 10), (0.2, 0.1, 0.5, 10)]),
])  # fmt: skip
def test_released_settings(argv, expected):
    assert settings_of(*argv) == expected


def test_recipes_and_learning_rates():
    args = script.parse(["--dataset", "cifar10"])
    assert (args.net, args.tasks, args.epochs, args.batch_size) == ("resnet18", 5, 50, 32)
    assert args.weight_decay == 0 and args.bias and script.learning_rate(49, args, 0.03) == 0.03
    args = script.parse(["--dataset", "cifar100lt"])
    rates = [script.learning_rate(epoch - 1, args, 1.0) for epoch in (1, 35, 36, 45, 46)]  # from 1
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01])
    assert args.tasks == 10


@pytest.mark.parametrize("argv, names", [
    (["er", "joint", "--classifier", "fno"], ["er50-fno", "er50-fno-mask", "joint-fno"]),
    (["er", "--classifier", "fno", "--mask"], ["er50-fno-mask"]),
    (["sgd", "--no-mask", "--buffer", "7", "9"], ["sgd-learnable", "sgd-fno"]),
])  # fmt: skip
def test_both_ways_unless_a_mask_is_asked_for(argv, names):
    assert list(script.list_jobs(script.parse(["--method", *argv]))) == names


# %% What is measured


def test_own_energy_is_its_definition():
    h, y, owner = torch.rand(20, 9, generator=generator()), torch.arange(20) % 3, torch.arange(9) % 4
    h[0] = 0  # has no share in anything
    shares = [float(h[n][owner == n % 3].square().sum() / max(h[n].square().sum(), 1e-9)) for n in range(20)]
    expected = np.mean([np.mean(shares[k::3]) for k in range(3)])
    assert script.own_energy(h, y, owner, 4) == pytest.approx(expected)  # the fourth class has no features
    Q = script.fno_classifier(5, 23, generator())
    assert script.own_energy(3 * Q, torch.arange(5), Q.argmax(0), 5) == pytest.approx(1)


def test_features_are_not_negative():
    for network in (script.SmallCNN(3), script.mlp(3 * 33 * 20)):
        h = network(torch.randn(2, 3, 33, 20))
        assert h.shape == (2, network.d) and (h >= 0).all()


def test_joint_training_shows_zero_mean_collapse(no_figures, tmp_path, capsys):
    """FNO is nearer to its class vectors about the origin; h W^T + b decides as the network did."""
    argv = ["--method", "joint", "--epochs", "3", "--per-class", "60", "--precision", "fp32"]
    learnable, fno = script.main([*argv, "--out", str(tmp_path)])["results"]
    assert fno["znc_alignment"] < learnable["znc_alignment"] - 0.1
    assert f"{fno['znc_alignment']:.2f}  {fno['nc3']:.2f}" in capsys.readouterr().out
    for name, result in (("learnable", learnable), ("fno", fno)):
        file = common.Run(tmp_path / "fno_continual" / "digits" / f"joint-{name}" / "seed0").load_features()
        z = file["test_h"] @ file["W"].T + file.get("b", 0)
        assert ("b" in file) == (name == "learnable")
        assert (z.argmax(1) == file["test_y"]).mean() == pytest.approx(result["accuracy"])


def test_the_matrix_in_the_result_is_that_of_the_stream(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(common, "bars", lambda path, found, *_, **axes: drawn.update(bars=found))
    monkeypatch.setattr(common, "heat_maps", lambda path, maps, **axes: drawn.update(maps=maps))
    argv = ["--method", "er", "joint", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    er, joint = script.main([*argv, "--eval-every", "1"])["results"]
    R = np.array(er["matrix_class_il"])
    assert R.shape == np.array(er["matrix_task_il"]).shape == (3, 3)
    assert er["class_il"] == pytest.approx(R[-1].mean())
    assert er["forgetting"] == pytest.approx(np.mean([R[:-1, 0].max() - R[-1, 0], R[1, 1] - R[-1, 1]]))
    run = common.Run(tmp_path / "fno_continual" / "digits" / "er50-fno-mask" / "seed0")
    assert [line["class_il"] for line in run.history[1::2]] == R.tolist()
    assert len(joint["matrix_class_il"]) == 1 and math.isnan(joint["forgetting"])
    (found,) = drawn["maps"].values()
    np.testing.assert_allclose(found, np.where(np.tri(3) > 0, 100 * R, np.nan))  # grey above the diagonal
    assert list(drawn["bars"]) == ["fno", "fno + mask"]


def test_forgetting_and_its_remedy_on_digits(no_figures, tmp_path):
    """Not a benchmark: without a buffer the unmasked learner keeps the last task only, which is 20%."""
    argv = ["--method", "sgd", "joint", "--classifier", "fno", "--epochs", "4", "--per-class", "60"]
    plain, masked, joint = script.main([*argv, "--out", str(tmp_path)])["results"]
    assert plain["class_il"] < 0.3 and plain["forgetting"] > 0.8 and plain["fit"] > 0.95
    assert joint["class_il"] > 0.9
    assert (
        masked["class_il"] > plain["class_il"] + 0.1 and masked["forgetting"] < 0.4 and masked["fit"] > 0.95
    )


def toy_data(counts, test=(2,)):
    """A stand-in for load_dataset: counts[k] training images of class k, test[k] test images."""
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    test_y = torch.arange(len(counts)).repeat_interleave(torch.tensor(test).expand(len(counts)))
    x, test_x = (torch.randint(256, (len(labels), 8, 8, 1)).to(torch.uint8) for labels in (y, test_y))
    names = tuple(f"class {k}" for k in range(len(counts)))
    data = common.Dataset(x, y, test_x, test_y, names, torch.zeros(1), torch.ones(1), 0, False, "toy")
    return lambda *_, **__: data


def test_a_task_without_test_images_is_nan(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(common, "load_dataset", toy_data([9, 9, 9, 9], (0, 0, 3, 3)))
    argv = ["--method", "er", "joint", "--tasks", "2", "--epochs", "1", "--out", str(tmp_path)]
    for result in script.main(argv)["results"]:
        assert math.isnan(result["matrix_class_il"][-1][0])
        assert result["class_il"] == result["matrix_class_il"][-1][1]
        assert math.isnan(result["forgetting"]) and 0 <= result["own_energy"] <= 1
    assert "er50-fno-mask" in capsys.readouterr().out
    assert (tmp_path / "fno_continual" / "digits" / "forgetting.png").exists()


@pytest.mark.parametrize("counts, argv, words", [
    ([9] * 10, ["--tasks", "11"], ["--tasks 11", "1 to 10"]),
    ([9] * 10, ["--tasks", "6"], ["--mask", "one class", "--no-mask"]),
    ([1, 4, 4], ["--tasks", "3", "--no-mask"], ["--tasks 3", "task 1 has under 2 training images"]),
    ([2] * 101, ["--tasks", "2", "--net", "mlp"], ["--classifier fno", "101", "not 100"]),
    ([9] * 10, ["--lr", "1e30", "--classifier", "learnable"], ["not finite", "epoch 1, step", "--lr"]),
])  # fmt: skip
def test_what_is_refused(counts, argv, words, monkeypatch, user_error, tmp_path):
    monkeypatch.setattr(common, "load_dataset", toy_data(counts))
    with user_error(*words):
        script.main(["--method", "er", *argv, "--out", str(tmp_path)])
    assert "--lr" in words or not list(tmp_path.iterdir())  # nothing half-written
