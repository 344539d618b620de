"""nc_metrics.py: recovering fine labels, reading features files, and the program as a user meets it."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nc_metrics as script
from common import SUPERCLASSES, StoredStatistics, coarse_labels, load_dataset

ROOT = Path(script.__file__).resolve().parent


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# %% Coarse labels


def test_pairs_are_k_and_k_plus_half():
    coarse, names = coarse_labels(tuple("abcdefghij"), "pairs")
    assert coarse.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert names == ("a+f", "b+g", "c+h", "d+i", "e+j")


def test_superclasses_are_found_by_name_in_any_order():
    members = {name: fine.split() for name, fine in SUPERCLASSES.items()}
    fine = sorted(name for group in members.values() for name in group)
    assert len(members) == 20 and all(len(group) == 5 for group in members.values()) and len(set(fine)) == 100
    for classes in (fine, fine[::-1]):
        coarse, names = coarse_labels(tuple(classes), "superclasses")
        assert torch.bincount(coarse).tolist() == [5] * 20
        assert all(classes[k] in members[names[c]] for k, c in enumerate(coarse.tolist()))
    # the official coarse labels of CIFAR-100's first ten classes, apple to bowl, coarse names in ABC order
    order = [sorted(members).index(names[c]) for c in coarse_labels(tuple(fine), "superclasses")[0][:10]]
    assert order == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]


def test_no_coarse_labels(user_error):
    with user_error("--coarse pairs", "3 classes"):
        coarse_labels(("a", "b", "c"), "pairs")
    with user_error("--coarse superclasses", "CIFAR-100"):
        coarse_labels(tuple("abcdefghij"), "superclasses")


# %% Recovering fine labels


def hidden(gap=4.0, length=0.0, n=40, d=12):
    """Features of 3 coarse classes of 2, 3 and 1 fine ones, gap apart; lengths vary by up to e^length."""
    fine_y = torch.arange(6).repeat_interleave(n)
    coarse = torch.tensor([0, 0, 1, 1, 1, 2])
    h = 10 * torch.eye(3, d)[coarse[fine_y]] + gap * torch.eye(6, d).roll(3, 1)[fine_y]
    h = h + 0.1 * random(len(h), d).float()
    h = h * (length * random(len(h), 1, seed=1).float()).exp()
    return h.numpy(), coarse[fine_y].numpy(), fine_y.numpy()


@pytest.mark.parametrize("how", script.CLUSTERINGS)
def test_separate_sub_clusters_are_recovered_and_named(how):
    h, coarse_y, fine_y = hidden()
    found, agreement = script.recover_labels(h, coarse_y, fine_y, how, 0)
    np.testing.assert_array_equal(found, fine_y)
    assert set(agreement.values()) == {1.0}


def test_length_hides_them_from_raw_features_only():
    h, coarse_y, fine_y = hidden(gap=2.0, length=1.0)
    purity = {how: script.recover_labels(h, coarse_y, fine_y, how, 0)[1]["purity"] for how in ("raw", "l2")}
    assert purity["l2"] == 1 and purity["raw"] < 0.9


def test_nothing_is_found_in_noise():
    _, coarse_y, fine_y = hidden(n=400)
    noise = random(len(fine_y), 6).numpy()
    _, agreement = script.recover_labels(noise, coarse_y, fine_y, "l2", 0)
    # the coarse labels are given: the class of one is right, the pair a half, the three a third, and a little
    assert (1 + 2 / 2 + 3 / 3) / 6 < agreement["matched"] < 0.6


def test_a_name_stays_in_its_coarse_class_and_is_used_once():
    h, coarse_y, fine_y = hidden(gap=0.05)  # clusters and classes hardly agree
    found, agreement = script.recover_labels(h, coarse_y, fine_y, "raw", 0)
    coarse = np.array([0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(coarse[found], coarse_y)
    assert set(found) == set(range(6))
    assert agreement["matched"] == np.mean(found == fine_y)


def test_distance_ratios():
    D = torch.tensor([[2.0, 3, 8, 8], [3, 2, 8, 8], [8, 8, 2, 5], [8, 8, 5, 2]])
    assert script.distance_ratios(D, torch.tensor([0, 0, 1, 1])) == (2.0, 4.0)


def test_features_that_collapse_completely_do_not_break_it():
    fine_y = np.repeat(np.arange(4), 10)
    h = np.eye(2, 5)[fine_y % 2]  # both fine classes of a coarse one on one point
    for how in ("l2", "raw", "whiten"):
        found, agreement = script.recover_labels(h, fine_y % 2, fine_y, how, 0)
        assert agreement["matched"] >= 0.5 and set(found) <= set(range(4))


def test_the_probe_sees_what_is_linear():
    y = np.arange(200) % 2
    h = np.stack([np.where(y, 1.0, -1.0) * 1e-3, 1e3 * random(200).numpy()], 1)  # standardised: not drowned
    assert script.probe_accuracy(h, y, h, y) == 1
    assert script.probe_accuracy(h[:, 1:], y, random(200, 1, seed=5).numpy(), y) < 0.7


# %% Network and schedule


def test_networks():
    count = {
        name: sum(p.numel() for p in script.build_model(name, 3, 10).parameters()) for name in script.NETWORKS
    }
    small = 9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256) + 2 * (32 + 64 + 128 + 256) + 256 * 10 + 10
    assert count == {"cnn": small, "resnet18": 11_173_962}  # the latter as in everyone's CIFAR ResNet-18
    for name in script.NETWORKS:
        for shape in ((2, 3, 32, 32), (2, 3, 17, 23)):
            h = script.NETWORKS[name](3)(torch.randn(shape))
            assert (h >= 0).all() and h.shape == (2, {"cnn": 256, "resnet18": 512}[name])


def test_published_setting():
    args = script.parse(["--dataset", "cifar10"])
    assert (args.net, args.epochs, args.batch_size, args.weight_decay) == ("resnet18", 350, 128, 5e-4)
    rate = [script.learning_rate(e - 1, args) / args.lr for e in (1, 117, 118, 234, 235, 350)]
    assert np.allclose(rate, [1, 1, 0.1, 0.1, 0.01, 0.01])
    assert script.parse(["--dataset", "mnist"]).per_class == 5000
    assert script.parse(["--dataset", "mnistlt"]).per_class is None
    assert len(set(script.GRID)) == 9


def test_losses():
    z, y = random(6, 4), torch.tensor([0, 1, 2, 3, 0, 0])
    slow = sum(0.5 * sum((z[i, k] - float(k == y[i])) ** 2 for k in range(4)) for i in range(6)) / 6
    torch.testing.assert_close(script.loss_of("mse", z, y), slow)
    torch.testing.assert_close(script.loss_of("ce", z, y), -z.log_softmax(1)[range(6), y].mean())


def test_keep_per_class():
    y = torch.tensor([2, 0, 1, 0, 0, 1, 2, 2, 2])
    keep = script.keep_per_class(y, 3, 2, 0)
    assert torch.bincount(y[keep]).tolist() == [2, 2, 2] and len(set(keep.tolist())) == 6
    assert script.keep_per_class(y, 3, 2, 1).tolist() != keep.tolist()
    assert torch.bincount(y[script.keep_per_class(y, 3, 3, 0)]).tolist() == [3, 2, 3]


# %% Measuring


def example(seed=0, shift=0.0):
    y = torch.arange(4).repeat_interleave(10)
    h = shift + random(4, 6, seed=seed)[y] + 0.1 * random(40, 6, seed=seed + 1)
    return h, y, random(4, 6, seed=seed + 2), random(4, seed=seed + 3)


def test_nc4_has_the_bias_and_the_given_means():
    h, y, W, b = example()
    S = StoredStatistics(h, y, 4)
    for bias, means in ((b, None), (None, None), (b, random(4, 6, seed=9))):
        mu = S.mean if means is None else means
        nearest = [min(range(4), key=lambda k, x=x: float((x - mu[k]).square().sum())) for x in h]
        decided = [int((W @ x + (0 if bias is None else bias)).argmax()) for x in h]
        expected = np.mean([n != c for n, c in zip(nearest, decided, strict=True)])
        assert script.measure(h, y, 4, W, bias, means)["nc4"] == expected
    far = torch.tensor([0.0, 0.0, 0.0, 100.0])  # a bias that decides everything for class 3
    assert script.measure(h, y, 4, W, far)["nc4"] == 0.75 != script.measure(h, y, 4, W)["nc4"]


def test_without_class_vectors_what_needs_them_is_left_out():
    h, y, W, b = example()
    whole, part = script.measure_everything(h, y, 4, W, b), script.measure_everything(h, y, 4)
    assert part == {key: whole[key] for key in part}
    missing = {"nc3", "nc3_etf", "nc4", "gnc3", "znc_alignment", "minority_angle_W"}
    assert missing <= whole.keys() - part.keys() and not any(key.endswith("_W") for key in part)
    keys = {key.removesuffix("_M").removesuffix("_W") for key in whole}
    assert keys == set(script.EXPLAINED)  # every metric is printed, and nothing else


def write_features(path, **changes):
    h, y, W, b = (t.numpy() for t in example())
    arrays = {"train_h": h, "train_y": y, "test_h": h[::2], "test_y": y[::2], "W": W, "b": b} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{key: a for key, a in arrays.items() if a is not None})
    return path


def test_table_of_a_features_file(tmp_path, capsys):
    path = write_features(tmp_path / "f.npz")
    result = script.main(["--features", str(path), "--out", str(tmp_path)])
    text = capsys.readouterr().out
    h, y, W, b = example()
    assert result["train"] == script.measure_everything(h, y, 4, W, b)
    assert (
        result["test"]["nc4"]
        == script.measure(h[::2], y[::2], 4, W, b, StoredStatistics(h, y, 4).mean)["nc4"]
    )
    assert f"{result['train']['nc1']:.6g}" in text and f"{result['test']['vci']:.6g}" in text
    (figure,) = tmp_path.rglob("maps.png")
    assert str(figure) in text and figure.read_bytes().startswith(b"\x89PNG")


def test_json_is_all_that_is_printed_and_strict(tmp_path, capsys):
    h = np.repeat(np.eye(3), 4, 0)
    h[4:] = h[4:8].mean(0)  # classes 1 and 2 on one point: infinities
    h[:4, 0] += [0.1, -0.1, 0.2, -0.2]
    path = write_features(tmp_path / "f.npz", train_h=h, train_y=np.repeat([0, 1, 2], 4), W=None, b=None,
                          test_h=None, test_y=None)  # fmt: skip
    script.main(["--features", str(path), "--json", "--out", str(tmp_path)])
    out = capsys.readouterr().out

    def refuse(word):
        raise ValueError(word)

    found = json.loads(out, parse_constant=refuse)
    assert found["K"] == 3 and found["N"] == 12 and "test" not in found
    assert found["train"]["nc1_rank"] == 1 and found["train"]["gnc_log_energy_M"] is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_and_any_integer(dtype, tmp_path):
    h, y, *_ = (t.numpy() for t in example())
    exact = script.measure_everything(*(torch.from_numpy(a) for a in (h.astype(dtype).astype(float), y)), 4)
    path = write_features(tmp_path / "f.npz", train_h=h.astype(dtype), train_y=y.astype(np.uint16))
    found = script.main(["--features", str(path), "--out", str(tmp_path)])["train"]
    assert {key: found[key] for key in exact} == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("changes, words", [
    ({"train_h": None}, ["train_h and train_y"]),
    ({"test_y": None}, ["test_h and test_y"]),
    ({"train_h": np.zeros((40, 6), int)}, ["train_h", "int64"]),
    ({"train_h": np.full((40, 6), np.nan)}, ["train_h", "not finite"]),
    ({"train_h": np.zeros((40, 2, 3))}, ["train_h", "(40, 2, 3)"]),
    ({"train_y": np.zeros(39, int)}, ["train_y", "(39,)"]),
    ({"train_y": np.zeros(40)}, ["train_y", "float64"]),
    ({"train_y": np.arange(40) % 5}, ["labels 0 to 4", "0 to 3"]),
    ({"train_y": np.arange(40) % 4 - 1}, ["labels -1 to 2"]),
    ({"train_y": np.arange(40) % 3}, ["class 3 has no sample in train_y"]),
    ({"test_y": np.zeros(20, int)}, ["class 1 has no sample in test_y"]),
    ({"test_h": np.zeros((20, 7))}, ["test_h", "d = 6"]),
    ({"W": np.zeros((4, 7))}, ["W", "d = 6"]),
    ({"W": None}, ["b is there"]),
    ({"b": np.zeros(3)}, ["b is there"]),
    ({"train_y": np.zeros(40, int), "W": None, "b": None, "test_h": None, "test_y": None}, ["1 class"]),
    ({"train_y": np.array([{}] * 40, dtype=object)}, ["not a readable"]),
])  # fmt: skip
def test_bad_features_files(changes, words, tmp_path, capsys):
    path = write_features(tmp_path / "f.npz", **changes)
    fail(["--features", path, "--out", tmp_path / "o"], capsys, "f.npz", *words)
    assert not (tmp_path / "o").exists()


# %% The program


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take most of a short run's time; the dry run below draws them."""
    monkeypatch.setattr(script, "draw_collapse", lambda *args: None)
    monkeypatch.setattr(script, "draw_fine", lambda *args: None)


def fail(argv, capsys, *words):
    """The program ends with 2 and one line on stderr that has these words."""
    with pytest.raises(SystemExit) as end:
        script.main([str(word) for word in argv])
    assert end.value.code == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and message.startswith("nc_metrics.py: error: "), message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100"]),
    (["--method", "hinge"], ["--method", "hinge"]),
    (["--net", "vgg"], ["--net", "vgg"]),
    (["--epochs", "0"], ["--epochs 0", "1 or more"]),
    (["--batch-size", "3"], ["--batch-size 3", "4 or more"]),
    (["--per-class", "1"], ["--per-class 1"]),
    (["--lr", "-1"], ["--lr -1"]),
    (["--weight-decay", "2"], ["--weight-decay 2"]),
    (["--grid", "--lr", "0.1"], ["--grid", "--lr"]),
    (["--json"], ["--json", "--features"]),
    (["--features", "a.npz", "--run", "b"], ["--features and --run"]),
    (["--features", "nowhere.npz"], ["nowhere.npz", "No such file"]),
    (["--run", "nowhere"], ["nowhere/features.npz", "No such file"]),
    (["--coarse", "superclasses"], ["--coarse superclasses", "CIFAR-100"]),
    (["--dataset", "folder:nowhere"], ["folder:nowhere", "train"]),
])  # fmt: skip
def test_bad_flags(argv, words, capsys, tmp_path):
    fail([*argv, "--out", tmp_path / "o"], capsys, *words)
    assert not (tmp_path / "o").exists()


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


SHORT = ["--per-class", "12", "--batch-size", "32", "--epochs", "3", "--precision", "fp32", "--device", "cpu"]
FOLDER = Path("nc_metrics") / "digits" / "ce" / "seed0"
COARSE = Path("nc_metrics") / "digits-pairs" / "ce" / "seed0"


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, no_figures, monkeypatch, run_until_killed):
    """kill -9 while a checkpoint is renamed; then an interruption in the middle of recovering labels."""
    coarse = [*SHORT, "--coarse", "pairs", "--cluster", "l2", "--augment"]
    script.main([*coarse, "--out", str(tmp_path / "whole")])
    broken = [*coarse, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "save", 3)  # epoch 2 is logged by then, but not saved
    recover, calls = script.recover_labels, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # trained, and one clustering of three done
            raise KeyboardInterrupt
        return recover(*args)

    monkeypatch.setattr(script, "recover_labels", interrupted)
    with pytest.raises(SystemExit) as end:
        script.main([*broken, "--resume"])
    assert end.value.code == 130
    script.main([*broken, "--resume"])
    assert_same_bits(files(tmp_path / "whole" / COARSE), files(tmp_path / "broken" / COARSE))
    assert not list((tmp_path / "broken").rglob(".*"))


def test_the_seed_is_all_that_differs(tmp_path, no_figures):
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*SHORT, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files((tmp_path / out / FOLDER).with_name(f"seed{seed}")))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["W"], results[2][2]["W"])


def test_dry_run_as_a_user_starts_it(tmp_path):
    argv = ["--dry-run", "--method", "mse", "--coarse", "pairs", "--per-class", "20", "--cluster", "l2"]
    argv = [sys.executable, str(ROOT / "nc_metrics.py"), *argv, "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal, no warning
    assert "5 coarse classes of 10 fine ones, 200 training images" in done.stdout
    assert "\nmse " in done.stdout and "\nuntrained, l2 " in done.stdout
    folder = tmp_path / "dry-run" / "nc_metrics" / "digits-pairs" / "mse" / "seed0"
    made = {path.name for path in folder.iterdir()}
    figures = {"collapse.png", "class_distances.png", "recovered.png"}
    wanted = {"config.json", "metrics.jsonl", "result.json", "checkpoint.pt", "features.npz", "source.py"}
    assert made >= wanted | figures
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert script.main(["--run", str(folder), "--json", "--out", str(tmp_path)])["K"] == 5


def test_the_grid_is_every_pair_of_rate_and_decay(tmp_path, capsys, no_figures):
    argv = ["--grid", "--dry-run", "--per-class", "8", "--out", str(tmp_path)]
    results = script.main(argv)["results"]
    assert len(results) == 9
    configs = [json.loads(p.read_text())["flags"] for p in tmp_path.rglob("config.json")]
    assert {(c["lr"], c["weight_decay"]) for c in configs} == set(script.GRID)
    out = capsys.readouterr().out
    rows = [line.split()[1:3] for line in out.splitlines() if line.startswith("ce ")]
    assert rows == [[f"{lr:g}", f"{wd:g}"] for lr, wd in script.GRID]


@pytest.mark.parametrize("flags", [
    ["--dataset", "digitslt", "--coarse", "pairs", "--cluster", "whiten"],
    ["--augment", "--precision", "bf16"],
    ["--net", "resnet18", "--per-class", "2"],
])  # fmt: skip
def test_other_flags_train(flags, tmp_path, no_figures):
    script.main(["--dry-run", "--per-class", "20", "--out", str(tmp_path), *flags])


def test_the_result_is_of_the_features_that_were_saved(tmp_path, no_figures):
    result = script.main([*SHORT, "--epochs", "2", "--out", str(tmp_path)])["results"][0]
    data = load_dataset("digits")
    with np.load(tmp_path / FOLDER / "features.npz") as file:
        saved = {key: torch.from_numpy(file[key]) for key in file.files}
    decided = (saved["test_h"] @ saved["W"].T + saved["b"]).argmax(1)
    assert result["accuracy"] == (decided == data.test_y).double().mean()
    y = saved["train_y"]
    mu = torch.stack([saved["train_h"][y == k].double().mean(0) for k in range(10)])
    within, M = saved["train_h"].double() - mu[y], mu - mu.mean(0)
    inverse = torch.linalg.pinv(M.T @ M / 10, hermitian=True, rtol=1e-10)
    assert result["nc1"] == pytest.approx(float((within @ inverse * within).sum() / len(y) / 10), rel=1e-6)
    assert result["counts"] == [12] * 10
    again = script.main(["--run", str(tmp_path / FOLDER), "--out", str(tmp_path)])
    for split, before in (("train", ""), ("test", "test_")):
        shared = {key: value for key, value in again[split].items() if before + key in result}
        assert len(shared) >= 13
        assert shared == pytest.approx({key: result[before + key] for key in shared}, rel=1e-6)


def test_zero_error_is_the_first_epoch_of_it(tmp_path, no_figures):
    argv = [*SHORT, "--epochs", "30", "--out", str(tmp_path)]
    result = script.main(argv)["results"][0]
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "metrics.jsonl").read_text().splitlines()]
    right = [line["epoch"] for line in lines if line["running_accuracy"] >= 0.999]
    assert result["zero_error_epoch"] == right[0] > 1
    measured = [line["epoch"] for line in lines if "nc1" in line]
    assert measured == [e for e in range(1, 31) if e in script.MILESTONES or e == 30]
    assert lines[-1]["nc1"] < lines[0]["nc1"] / 3  # and it collapses
    assert result["train_accuracy"] == 1 and result["nc4"] == 0


def test_a_finished_run_is_not_redone(tmp_path, capsys, no_figures):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    assert script.main(argv)["results"] == first
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before
    fail([*argv, "--weight-decay", "0.1"], capsys, "--weight-decay 0.0005", "--overwrite")


def test_a_loss_that_is_not_finite(capsys, tmp_path):
    fail([*SHORT, "--lr", "1e30", "--out", tmp_path], capsys, "not finite", "epoch 1, step", "checkpoint.pt")
    state = torch.load(tmp_path / FOLDER / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 0 and all(v.isfinite().all() for v in state["model"].values())


def test_full_disk_keeps_the_last_checkpoint(capsys, tmp_path, monkeypatch, no_figures):
    argv, save, calls = [*SHORT, "--epochs", "2", "--out", str(tmp_path)], torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 3:  # checkpoints 0 and 1 fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    fail(argv, capsys, "checkpoint.pt", "No space left")
    assert torch.load(tmp_path / FOLDER / "checkpoint.pt", weights_only=True)["epoch"] == 1
    monkeypatch.setattr(torch, "save", save)
    script.main([*argv, "--resume"])


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(capsys, tmp_path, monkeypatch, no_figures):
    step, calls = torch.optim.SGD.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", interrupted)
    argv = [*SHORT, "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        script.main(argv)
    assert end.value.code == 130
    message = capsys.readouterr().err
    assert message.strip().endswith("--resume") and "python nc_metrics.py --per-class 12" in message
    assert torch.load(tmp_path / FOLDER / "checkpoint.pt", weights_only=True)["epoch"] == 1
    script.main([*argv, "--resume"])
    script.main([*SHORT, "--out", str(tmp_path / "whole")])
    assert_same_bits(files(tmp_path / "whole" / FOLDER), files(tmp_path / FOLDER))


def test_a_class_without_an_image_is_named(capsys, tmp_path, monkeypatch):
    whole = load_dataset("digits")
    keep = whole.test_y != 3
    part = whole._replace(test_x=whole.test_x[keep], test_y=whole.test_y[keep])
    monkeypatch.setattr(script, "load_dataset", lambda *args, **kwargs: part)
    fail(["--out", tmp_path / "o"], capsys, "--dataset digits", "class 3 has no test image")


# %% Theory


def test_residuals_have_the_covariance_that_is_claimed():
    h, y = script.around(random(3, 5), 0.7)
    for k in range(3):
        C = np.cov(h[y == k].numpy().T, bias=True)
        np.testing.assert_allclose(C, 0.49 * np.eye(5), atol=1e-12)


def test_targets_of_collapse():
    targets = script.collapse_targets(10, 64)
    assert targets["rest"] == "1.11111" and targets["angle"] == "96.3794" and targets["rank"] == "9"
    beyond = script.collapse_targets(100, 64)
    assert beyond["rest"] == beyond["log"] == "-" and beyond["rank"] == "64" and beyond["0"] == "0"


def test_a_claim_that_fails_ends_with_1(monkeypatch, tmp_path, capsys):
    point = {"step": 1, "nc1": 0.01, "raw": 0.5, "l2": 0.5, "whiten": 0.5, "oracle": 1.0}
    monkeypatch.setattr(script, "mixture", lambda *args: [point])  # whitening that recovers nothing
    with pytest.raises(SystemExit) as end:
        script.main(["--synthetic", "--out", str(tmp_path)])
    assert end.value.code == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.endswith("NO")]
    assert failed and all("k-means" in line for line in failed)  # all that does not train a network holds
    counted = sum(line.endswith((" yes", " NO")) for line in out.splitlines())
    assert f"\n{counted - len(failed)} of {counted} claims hold" in out


def test_two_hidden_layers_hide_the_clusters_from_raw_k_means_only():
    end = script.mixture(2, 400, 1)[-1]
    assert end["nc1"] < 0.05 and end["accuracy"] == 1
    assert end["raw"] < 0.75 and end["l2"] > 0.999 and end["whiten"] > 0.999
