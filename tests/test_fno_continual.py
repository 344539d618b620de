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
from common import load_dataset, split_tasks

ROOT = Path(script.__file__).resolve().parent


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
    Q = [script.fno_classifier(10, 512, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(Q[0], Q[1])
    assert not torch.equal(Q[0].argmax(0), Q[2].argmax(0))
    sizes = [(script.fno_classifier(10, 512, generator(seed)) > 0).sum(1) for seed in range(20)]
    extra = [tuple((size == 52).nonzero().flatten().tolist()) for size in sizes]
    assert len(set(extra)) > 10 and all(len(e) == 2 for e in extra)  # 512 = 10 * 51 + 2


@pytest.mark.parametrize("kind, bias, learned", [
    ("learnable", False, {"W"}), ("learnable", True, {"W", "b"}), ("fno", True, {"w"}),
])  # fmt: skip
def test_what_a_classifier_learns(kind, bias, learned):
    classifier = script.Classifier(10, 64, kind, bias)
    assert {name for name, _ in classifier.named_parameters()} == learned
    h = torch.rand(5, 64)
    b = 0 if classifier.b is None else classifier.b
    torch.testing.assert_close(classifier(h), h @ classifier.W.T + b)  # w starts at 1


def test_gradient_is_exactly_zero_outside_the_tasks_dimensions():
    classifier, task = script.Classifier(10, 100, "fno"), split_tasks(10, 5)
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
    task, seen = split_tasks(K, 3), torch.rand(K, generator=g) < 0.5
    keep = script.kept_logits(y, task, mask, seen if ace else None)
    for n in range(5):
        for k in range(K):
            expected = not mask or task[k] == task[y[n]]
            if ace:
                expected = expected and (k in y.tolist() or not seen[k])
            assert bool(keep[n, k]) == bool(expected)
        assert keep[n, y[n]]  # a label is never masked


def toy_batch(B=7, n=5, K=6, seed=0):
    """A linear model on images (B, 1, 2, 2), a batch, and two replayed draws (images, labels, logits)."""
    g = generator(seed)
    A = torch.randn(4, K, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, 1, 2, 2, generator=g).double()
    y = torch.randint(K, (B,), generator=g)
    draws = []
    for _ in range(2):
        images = torch.randn(n, 1, 2, 2, generator=g).double()
        draws.append((images, torch.randint(K, (n,), generator=g), torch.randn(n, K, generator=g).double()))
    return A, lambda x: x.flatten(1) @ A, x, y, draws


def slow_ce(z, y, keep):
    """Sum of -log softmax over the logits that are kept, one sample and one class at a time."""
    total = 0.0
    for n in range(len(y)):
        kept = [k for k in range(z.shape[1]) if keep[n, k]]
        total += math.log(sum(math.exp(z[n, k].detach()) for k in kept)) - float(z[n, y[n]].detach())
    return total


@pytest.mark.parametrize("name", script.LOSSES)
def test_losses_are_their_definitions(name):
    A, logits, x, y, draws = toy_batch()
    keep = script.kept_logits(y, split_tasks(6, 3), True)
    full = torch.ones(5, 6, dtype=torch.bool)
    loss, z = script.LOSSES[name](logits, x, y, keep, iter(draws).__next__, 0.3, 0.7)
    torch.testing.assert_close(z, logits(x))  # unmasked, for the buffer
    new = slow_ce(logits(x), y, keep)
    old = [slow_ce(logits(images), labels, full) for images, labels, _ in draws]
    mse = float(((logits(draws[0][0]) - draws[0][2]) ** 2).sum().detach()) / (5 * 6)
    expected = {
        "new": new / 7,
        "er-mean": (new + old[0]) / (7 + 5),
        "er-sum": new / 7 + old[0] / 5,
        "der++": new / 7 + 0.3 * mse + 0.7 * old[1] / 5,
    }
    assert loss.item() == pytest.approx(float(expected[name]), rel=1e-12)
    loss.backward()
    assert A.grad.isfinite().all()  # minus infinity in a masked logit leaves no nan behind


def test_er_ace_does_not_push_old_classes_with_new_images():
    A, logits, x, y, _ = toy_batch()
    y = 4 + y % 2  # the current task is 4, 5; 0 to 3 are old
    seen = torch.ones(6, dtype=torch.bool)
    keep = script.kept_logits(y, split_tasks(6, 3), False, seen)
    script.new_images_loss(logits, x, y, keep)[0].backward()
    assert (A.grad[:, :4] == 0).all() and (A.grad[:, 4:] != 0).any()


# %% The buffer


def logits_of(index):
    return index[:, None] * torch.tensor([1.0, 10.0])


def test_the_reservoir_is_uniform_over_the_stream():
    """Every image of a stream of 40, whichever batches it came in, is kept with probability 8 / 40."""
    repeats, kept, pairs = 600, torch.zeros(40), 0
    for seed in range(repeats):
        memory = script.Reservoir(8, 2, generator(seed))
        for part in torch.arange(40).split([5, 13, 1, 10, 7, 4]):
            memory.add(part, logits_of(part))
        assert len(set(memory.index.tolist())) == len(memory) == 8
        kept[memory.index] += 1
        pairs += int(0 in memory.index and 39 in memory.index)
    p = 8 / 40
    assert ((kept / repeats - p).abs() < 4.5 * math.sqrt(p * (1 - p) / repeats)).all()
    p = 8 * 7 / (40 * 39)  # first and last together: subsets are uniform, too, not only members
    assert abs(pairs / repeats - p) < 4.5 * math.sqrt(p * (1 - p) / repeats)


def test_the_reservoir_against_algorithm_r_one_row_at_a_time():
    fast, g = script.Reservoir(6, 2, generator(3)), generator(3)
    slow, n = [None] * 6, 0
    for part in torch.arange(200).split(11):
        fast.add(part, logits_of(part))
        drawn = torch.rand(len(part), generator=g, dtype=torch.float64)
        for row, u in zip(part.tolist(), drawn, strict=True):
            place = n if n < 6 else int(u * (n + 1))
            if place < 6:
                slow[place] = row
            n += 1
        filled = min(n, 6)
        assert fast.index[:filled].tolist() == slow[:filled]
        assert torch.equal(fast.z, logits_of(fast.index))  # an image and its logits stay together


def test_what_is_drawn_from_the_reservoir():
    memory = script.Reservoir(10, 2, generator())
    assert len(memory) == 0
    memory.add(torch.arange(4), logits_of(torch.arange(4)))
    assert sorted(memory.draw(32)[0].tolist()) == [0, 1, 2, 3]  # no more than there are
    memory.add(torch.arange(4, 30), logits_of(torch.arange(4, 30)))
    counts = torch.zeros(30)
    for _ in range(2000):
        index, z = memory.draw(3)
        assert len(set(index.tolist())) == 3  # without replacement
        assert torch.equal(z, logits_of(index))
        counts[index] += 1
    share = counts[memory.index] / 2000
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 2000)


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


# %% Networks, recipes, schedules


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 33, 20)])
def test_features_are_not_negative(shape):
    for network in (script.SmallCNN(shape[1]), script.mlp(math.prod(shape[1:]))):
        h = network(torch.randn(shape))
        assert h.shape == (2, network.d) and (h >= 0).all()


def settings_of(*argv):
    args = script.parse(list(argv))
    return {(job.method, job.buffer): job[4:] for job in script.list_jobs(args)}


def test_released_settings():
    args = script.parse(["--dataset", "cifar10"])
    assert (args.net, args.tasks, args.epochs, args.batch_size, args.augment) == ("resnet18", 5, 50, 32, True)
    assert args.weight_decay == 0 and args.replay == "mean" and args.bias
    two = ["--method", "er", "der++", "--buffer", "200", "500", "5120"]
    assert settings_of("--dataset", "cifar10", *two) == {
        ("er", 200): (0.1, None, None, 32), ("er", 500): (0.1, None, None, 32),
        ("er", 5120): (0.1, None, None, 32), ("der++", 200): (0.03, 0.1, 0.5, 32),
        ("der++", 500): (0.03, 0.2, 0.5, 32), ("der++", 5120): (0.03, 0.1, 1.0, 32),
    }  # fmt: skip
    assert settings_of("--dataset", "mnist", *two) == {
        ("er", 200): (0.01, None, None, 10), ("er", 500): (0.1, None, None, 10),
        ("er", 5120): (0.1, None, None, 10), ("der++", 200): (0.03, 0.2, 1.0, 128),
        ("der++", 500): (0.03, 1.0, 0.5, 10), ("der++", 5120): (0.1, 0.2, 0.5, 64),
    }  # fmt: skip
    hundred = settings_of("--dataset", "cifar100", "--method", "sgd", "er-ace", "der++", "--buffer", "500")
    assert hundred[("sgd", 0)][0] == hundred[("er-ace", 500)][0] == 0.03
    assert hundred[("der++", 500)] == (0.03, 0.1, 0.5, 32)
    mine = settings_of("--method", "er", "der++", "--lr", "0.2")
    assert mine == {("er", 50): (0.2, None, None, 10), ("der++", 50): (0.2, 0.1, 0.5, 10)}
    assert settings_of("--dataset", "fashionmnist", *two) == settings_of("--dataset", "mnist", *two)


def test_learning_rates():
    def rates(epochs, *argv):
        args = script.parse(list(argv))
        job = script.list_jobs(args)[0]._replace(lr=1.0)
        return [script.learning_rate(e - 1, args, job) for e in epochs]  # epochs from 1

    for name in ("cifar100", "cifar100lt"):
        np.testing.assert_allclose(rates((1, 35, 36, 45, 46), "--dataset", name), [1, 1, 0.1, 0.1, 0.01])
        assert script.parse(["--dataset", name]).tasks == 10
    assert rates((50,), "--dataset", "cifar10") == [1]


def test_a_long_tail_has_the_recipe_of_its_data_set():
    args = script.parse(["--dataset", "digitslt"])
    assert (args.net, args.batch_size, args.buffer) == ("mlp", 10, [50])


def test_both_ways_unless_a_mask_is_asked_for():
    def names(*argv):
        return [job.name for job in script.list_jobs(script.parse(list(argv)))]

    assert names("--method", "er", "joint", "--classifier", "fno") == [
        "er50-fno",
        "er50-fno-mask",
        "joint-fno",
    ]
    assert names("--method", "er", "--mask", "--classifier", "fno") == ["er50-fno-mask"]
    assert names("--method", "sgd", "--no-mask", "--buffer", "7", "9") == ["sgd-learnable", "sgd-fno"]
    assert len(names("--method", "all")) == 18


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
    tensors = {"index": state["memory"]["index"], "z": state["memory"]["z"], "seen": state["seen"]}
    return result, history, features, {**state["model"], **tensors, "generator": state["generator"]}


def assert_same_bits(one, two):
    assert json.dumps(one[:2]) == json.dumps(two[:2])
    assert one[2].keys() == two[2].keys() and one[3].keys() == two[3].keys()
    assert all(np.array_equal(one[2][key], two[2][key], equal_nan=True) for key in one[2])
    assert all(torch.equal(one[3][key], two[3][key]) for key in one[3])


SHORT = ["--tasks", "3", "--epochs", "2", "--per-class", "12", "--precision", "fp32", "--device", "cpu"]
OUT = Path("fno_continual") / "digits"


def test_killed_in_mid_task_and_gone_on_with(no_figures, tmp_path, run_until_killed):
    """Six epochs of 4 or 5 steps, two per task: kill -9 in mid-task, and while a checkpoint is renamed."""
    job = ["--method", "er-ace", "--no-mask", "--net", "cnn", "--augment", "--classifier", "fno", *SHORT]
    script.main([*job, "--out", str(tmp_path / "whole")])
    broken = [*job, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "step", 16)  # in the second epoch of the second task
    run_until_killed(script.main, broken, "save", 1)  # after an epoch that is logged but not saved
    script.main(broken)
    (whole,) = [path.parent for path in (tmp_path / "whole").rglob("result.json")]
    assert_same_bits(files(whole), files(tmp_path / "broken" / whole.relative_to(tmp_path / "whole")))
    assert not list((tmp_path / "broken").rglob(".*"))


def test_the_seed_is_all_that_differs(no_figures, tmp_path):
    job = ["--method", "er", "--classifier", "fno", "--mask", *SHORT]
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(len(results))  # whatever happened before
        script.main([*job, "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files(tmp_path / out / OUT / "er50-fno-mask" / f"seed{seed}"))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["test_h"], results[2][2]["test_h"])


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = [sys.executable, str(ROOT / "fno_continual.py"), "--dry-run", "--out", str(tmp_path)]
    argv += ["--mask", "--method", "der++", "joint", "--classifier", "fno"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    folder = tmp_path / "dry-run" / OUT
    for name in ("der++50-fno-mask", "joint-fno"):
        made = {path.name for path in (folder / name / "seed0").iterdir()}
        assert made >= {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz"}
    for name in ("class_il", "forgetting", "feature_energy"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{name}.png" in done.stdout
    config = json.loads((folder / "der++50-fno-mask" / "seed0" / "config.json").read_text())
    expected = {"method": "der++", "classifier": "fno", "mask": True, "buffer": 50, "lr": 0.03}
    assert config["flags"].items() >= {**expected, "der_alpha": 0.1}.items()


@pytest.mark.parametrize("flags", [
    ["--method", "er", "er-ace", "--replay", "sum", "--no-mask", "--classifier", "fno"],
    ["--method", "er", "--tasks", "3", "--mask", "--classifier", "fno"],  # 4 + 3 + 3 classes
    ["--method", "er", "--tasks", "1", "--no-mask", "--classifier", "fno"],
    ["--method", "der++", "--buffer", "2", "--mask", "--classifier", "learnable", "--no-bias"],
    ["--method", "er", "--precision", "bf16", "--net", "cnn", "--augment", "--mask", "--classifier", "fno"],
    ["--dataset", "digitslt", "--imbalance", "3", "--method", "er", "--mask", "--classifier", "fno"],
])  # fmt: skip
def test_every_flag_trains(flags, no_figures, tmp_path):
    script.main(["--dry-run", "--out", str(tmp_path), *flags])


def test_the_features_give_the_networks_logits(no_figures, tmp_path):
    """train_h W^T + b decides as the network did, bias and learnable scalar included."""
    argv = ["--method", "joint", "--epochs", "2", "--per-class", "40", "--precision", "fp32"]
    for result in script.main([*argv, "--out", str(tmp_path)])["results"]:
        path = tmp_path / OUT / f"joint-{result['classifier']}" / "seed0" / "features.npz"
        with np.load(path) as file:
            assert ("b" in file.files) == (result["classifier"] == "learnable")
            z = file["test_h"] @ file["W"].T + (file["b"] if "b" in file.files else 0)
            assert (z.argmax(1) == file["test_y"]).mean() == pytest.approx(result["accuracy"])


def test_joint_training_shows_zero_mean_collapse(no_figures, tmp_path, capsys):
    """Nearer to its class vectors about the origin than a learnable classifier; both kinds are measured."""
    argv = ["--method", "joint", "--epochs", "3", "--per-class", "60", "--no-bias"]
    learnable, fno = script.main([*argv, "--out", str(tmp_path)])["results"]
    assert fno["znc_alignment"] < learnable["znc_alignment"] - 0.1
    for result in (learnable, fno):
        assert {"nc1", "nc3", "nc2_equiangular_M", "znc1", "znc_mean_cosine", "old_cosine_W"} <= set(result)
    out = capsys.readouterr().out
    assert f"{fno['znc_alignment']:.2f}  {fno['nc3']:.2f}" in out


def test_the_matrix_in_the_result_is_that_of_the_stream(no_figures, tmp_path):
    argv = ["--method", "er", "joint", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    er, joint = script.main([*argv, "--eval-every", "1"])["results"]
    R = np.array(er["matrix_class_il"])
    assert R.shape == np.array(er["matrix_task_il"]).shape == (3, 3)
    assert er["class_il"] == pytest.approx(R[-1].mean())
    assert er["forgetting"] == pytest.approx(np.mean([R[:-1, 0].max() - R[-1, 0], R[1, 1] - R[-1, 1]]))
    path = tmp_path / OUT / "er50-fno-mask" / "seed0" / "metrics.jsonl"
    history = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["task"] for line in history] == [0, 0, 1, 1, 2, 2]
    assert [line["class_il"] for line in history[1::2]] == R.tolist()
    assert len(joint["matrix_class_il"]) == 1 and math.isnan(joint["forgetting"])
    data = load_dataset("digits")
    n = torch.bincount(data.test_y).numpy()
    task = split_tasks(10, 3).numpy()
    for t in range(3):
        expected = (np.array(er["per_class"]) * n)[task == t].sum() / n[task == t].sum()
        assert R[-1, t] == pytest.approx(expected)


def test_forgetting_and_its_remedy_on_digits(no_figures, tmp_path):
    """Not a benchmark: without a buffer the unmasked learner keeps the last task only, which is 20%."""
    argv = ["--method", "sgd", "joint", "--classifier", "fno", "--epochs", "4", "--per-class", "60"]
    argv += ["--out", str(tmp_path)]
    plain, masked, joint = script.main(argv)["results"]
    assert plain["class_il"] < 0.3 and plain["forgetting"] > 0.8 and plain["fit"] > 0.95
    assert joint["class_il"] > 0.9
    assert masked["class_il"] > plain["class_il"] + 0.1 and masked["forgetting"] < 0.4


def test_common_figures_keep_the_runs_that_a_later_command_leaves_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(script, "draw_figures", lambda folder, runs: drawn.append(len(runs)))
    argv = ["--classifier", "fno", "--mask", *SHORT, "--epochs", "1", "--out", str(tmp_path)]
    script.main(["--method", "sgd", "der++", *argv])
    script.main(["--method", "sgd", *argv])
    assert drawn == [2, 2]


# %% Bad input


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "folder:PATH"]),
    (["--method", "ewc"], ["--method", "ewc", "der++"]),
    (["--classifier", "cosine"], ["--classifier", "cosine", "fno"]),
    (["--tasks", "11"], ["--tasks 11", "1 to 10"]),
    (["--tasks", "6"], ["--mask", "one class", "--no-mask"]),
    (["--buffer", "1"], ["--buffer", "2 or more"]),
    (["--batch-size", "2"], ["--batch-size 2", "3 or more"]),
    (["--lr", "nan"], ["--lr", "nan"]),
])  # fmt: skip
def test_bad_flags(argv, words, user_error, tmp_path):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path)])
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


def test_folders_of_images(no_figures, tmp_path, user_error):
    write_folder(tmp_path / "images", [3, 4, 2, 3, 5])
    argv = ["--dataset", f"folder:{tmp_path / 'images'}", "--image-size", "8", "--net", "cnn"]
    argv += ["--out", str(tmp_path / "o"), "--epochs", "1", "--method", "der++", "--classifier", "fno"]
    result = script.main([*argv, "--tasks", "2", "--mask"])["results"][0]
    assert np.array(result["matrix_class_il"]).shape == (2, 2)
    with user_error("--mask", "one class"):  # five tasks of one class
        script.main([*argv, "--mask"])
    write_folder(tmp_path / "few", [1, 4, 4])
    argv[1] = f"folder:{tmp_path / 'few'}"
    with user_error("--tasks 3", "task 1 has 1 training images"):
        script.main([*argv, "--tasks", "3", "--no-mask"])


def test_more_classes_than_feature_dimensions(tmp_path, user_error):
    write_folder(tmp_path / "images", [2] * 101)
    argv = ["--dataset", f"folder:{tmp_path / 'images'}", "--image-size", "8", "--net", "mlp", "--mask"]
    with user_error("--classifier fno", "101", "not 100"):
        script.main([*argv, "--method", "er", "--classifier", "fno", "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_loss_that_is_not_finite(user_error, tmp_path):
    argv = ["--method", "er", "--classifier", "learnable", "--no-mask", *SHORT, "--lr", "1e30"]
    with user_error("not finite", "epoch 1, step", "--lr"):
        script.main([*argv, "--out", str(tmp_path)])


def test_other_flags_than_the_run_had(no_figures, user_error, tmp_path):
    argv = ["--method", "der++", "--classifier", "fno", "--mask", *SHORT, "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    assert json.dumps(script.main(argv)["results"]) == json.dumps(first)  # finished: not redone
    with user_error("--lr 0.03", "--overwrite"):
        script.main([*argv, "--lr", "0.5"])


def test_an_unknown_kind_of_classifier_is_refused():
    with pytest.raises(ValueError, match="FNO"):
        script.Classifier(3, 6, "FNO")
