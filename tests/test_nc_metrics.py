"""nc_metrics.py: the method cell, recovering fine labels, features files, the program as a user meets it."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nc_metrics as script
from common import SUPERCLASSES, UserError, class_means, coarse_labels, load_dataset, minority_angle, nc0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(seed=0):
    y = torch.arange(4).repeat_interleave(10)
    h = random(4, 6, seed=seed)[y] + 0.1 * random(40, 6, seed=seed + 1)
    return h, y, random(4, 6, seed=seed + 2), random(4, seed=seed + 3)


# %% The method


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_textbook_form_is_that_of_common(dtype):
    h, y, W, b = example()
    h, W, b = h.to(dtype), W.to(dtype), b.to(dtype)
    for bias in (None, b):
        textbook = script.neural_collapse(h, W, y, bias)
        found = script.measure(h, y, 4, W, bias) | {"nc0": nc0(W)}
        assert list(textbook) == ["nc0", "nc1", "nc2_equinorm_M", "nc2_equiangular_M", "nc3", "nc4"]
        assert textbook == pytest.approx({key: found[key] for key in textbook}, rel=1e-9)


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
    found = script.recover_labels(h, coarse_y, fine_y, how, 0)
    np.testing.assert_array_equal(found, fine_y)


def test_length_hides_them_from_raw_features_only():
    h, coarse_y, fine_y = hidden(gap=2.0, length=1.0)
    right = {
        how: np.mean(script.recover_labels(h, coarse_y, fine_y, how, 0) == fine_y) for how in ("raw", "l2")
    }
    assert right["l2"] == 1 and right["raw"] < 0.9


def test_nothing_is_found_in_noise():
    _, coarse_y, fine_y = hidden(n=400)
    noise = random(len(fine_y), 6).numpy()
    found = script.recover_labels(noise, coarse_y, fine_y, "l2", 0)
    # the coarse labels are given: the class of one is right, the pair a half, the three a third, and a little
    assert (1 + 2 / 2 + 3 / 3) / 6 < np.mean(found == fine_y) < 0.6


def test_a_name_stays_in_its_coarse_class_and_is_used_once():
    h, coarse_y, fine_y = hidden(gap=0.05)  # clusters and classes hardly agree
    found = script.recover_labels(h, coarse_y, fine_y, "raw", 0)
    coarse = np.array([0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(coarse[found], coarse_y)
    assert set(found) == set(range(6))


def test_sister_ratio():
    D = torch.tensor([[2.0, 3, 8, 8], [3, 2, 8, 8], [8, 8, 2, 5], [8, 8, 5, 2]])
    assert script.sister_ratio(D, torch.tensor([0, 0, 1, 1])) == 2


def test_features_that_collapse_completely_do_not_break_it():
    fine_y = np.repeat(np.arange(4), 10)
    h = np.eye(2, 5)[fine_y % 2]  # both fine classes of a coarse one on one point
    for how in script.CLUSTERINGS:
        found = script.recover_labels(h, fine_y % 2, fine_y, how, 0)
        assert np.mean(found == fine_y) >= 0.5 and set(found) <= set(range(4))


def test_the_probe_sees_what_is_linear():
    y = np.arange(200) % 2
    h = np.stack([np.where(y, 1.0, -1.0) * 1e-3, 1e3 * random(200).numpy()], 1)  # standardised: not drowned
    assert script.probe_accuracy(h, y, h, y) == 1
    assert script.probe_accuracy(h[:, 1:], y, random(200, 1, seed=5).numpy(), y) < 0.7


# %% Network and training


def test_networks():
    data = load_dataset("digits")  # one channel, ten classes
    count = {}
    for name in script.NETWORKS:
        model = script.build_model(argparse.Namespace(net=name), data)
        count[name] = sum(p.numel() for p in model.parameters())
        h = model["network"](torch.randn(2, 1, 9, 11))
        assert (h >= 0).all() and h.shape == (2, model["network"].d)
    small = 9 * (1 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10
    assert count == {"cnn": small, "resnet18": 11_173_962 - 2 * 64 * 9, "resnet32": 464_154 - 2 * 16 * 9}


def test_published_setting():
    args = script.parse(["--dataset", "cifar10"])
    assert (args.net, args.epochs, args.batch_size, args.weight_decay) == ("resnet18", 350, 128, 5e-4)
    rate = [script.learning_rate(e - 1, args) / args.lr for e in (1, 117, 118, 234, 235, 350)]
    assert np.allclose(rate, [1, 1, 0.1, 0.1, 0.01, 0.01])
    assert script.parse(["--dataset", "mnist"]).per_class == 5000
    assert script.parse(["--dataset", "mnistlt"]).per_class is None
    assert script.parse([]).lr == 0.05 and script.parse(["--lr", "0.3"]).lr == 0.3
    assert script.parse(["--optimizer", "adamw"]).lr == 0.001


def test_weight_decay_is_in_the_gradient_of_adam_and_beside_that_of_adamw():
    """Without a gradient of the loss, AdamW takes lr * decay off; Adam makes it a step of lr."""
    moved = {}
    for name, make in script.OPTIMIZERS.items():
        w = torch.nn.Parameter(torch.tensor([2.0]))
        optimizer = make([w], lr=0.1, weight_decay=0.01, fused=None)
        w.grad = torch.zeros(1)
        optimizer.step()
        moved[name] = 2 - float(w.detach())
    assert moved == pytest.approx({"sgd": 0.1 * 0.01 * 2, "adam": 0.1, "adamw": 0.1 * 0.01 * 2}, rel=1e-4)


# %% Measuring


def test_nc4_has_the_bias_and_the_given_means():
    h, y, W, b = example()
    for bias, means in ((b, None), (None, None), (b, random(4, 6, seed=9))):
        mu = class_means(h, y, 4) if means is None else means
        nearest = [min(range(4), key=lambda k, x=x: float((x - mu[k]).square().sum())) for x in h]
        decided = [int((W @ x + (0 if bias is None else bias)).argmax()) for x in h]
        expected = np.mean([n != c for n, c in zip(nearest, decided, strict=True)])
        assert script.measure(h, y, 4, W, bias, means)["nc4"] == expected
    far = torch.tensor([0.0, 0.0, 0.0, 100.0])  # a bias that decides everything for class 3
    assert script.measure(h, y, 4, W, far)["nc4"] == 0.75 != script.measure(h, y, 4, W)["nc4"]


def write_features(path, **changes):
    h, y, W, b = (t.numpy() for t in example())
    arrays = {"train_h": h, "train_y": y, "test_h": h[::2], "test_y": y[::2], "W": W, "b": b} | changes
    np.savez(path, **{key: a for key, a in arrays.items() if a is not None})
    return path


def measured(path, tmp_path, capsys):
    """`--features path --json`: what is printed, as strict JSON."""

    def refuse(word):
        raise ValueError(word)

    capsys.readouterr()
    script.main(["--features", str(path), "--json", "--out", str(tmp_path / "o")])
    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_table_of_a_features_file(tmp_path, capsys):
    path = write_features(tmp_path / "f.npz")
    result = script.main(["--features", str(path), "--out", str(tmp_path / "o")])
    text = capsys.readouterr().out
    h, y, W, b = example()
    train = script.measure(h, y, 4, W, b)
    assert {key: result["train"][key] for key in train} == train
    means = class_means(h, y, 4)
    assert result["test"]["nc4"] == script.measure(h[::2], y[::2], 4, W, b, means)["nc4"]
    assert f"{train['nc1']:.6g}" in text and f"{result['test']['vci']:.6g}" in text
    assert [line[:3] for line in text.splitlines()[4:11]] == ["acc", "NC1", "NC2", "NC2", "NC3", "NC4", "NC0"]
    assert "angle 109.5, cosine -0.3333, r^2 2.667, one-vs-rest distance 1.333" in text  # of a tetrahedron
    keys = {key.removesuffix("_M").removesuffix("_W") for key in result["train"]}
    assert keys == set(script.MEASURES)  # every metric is printed, and nothing else
    assert not any(key.endswith("_W") for key in result["test"])  # what concerns W alone stands once
    (figure,) = tmp_path.rglob("*.png")
    assert str(figure) in text and figure.read_bytes().startswith(b"\x89PNG")
    assert figure.is_relative_to(tmp_path / "o")


def test_without_class_vectors_what_needs_them_is_left_out(tmp_path, capsys):
    whole = measured(write_features(tmp_path / "f.npz"), tmp_path, capsys)["train"]
    part = measured(write_features(tmp_path / "f.npz", W=None, b=None), tmp_path, capsys)["train"]
    assert part == {key: whole[key] for key in part}
    missing = {
        "accuracy",
        "nc0",
        "nc3",
        "nc3_etf",
        "nc4",
        "gnc3",
        "znc_alignment",
        "minority_angle_W",
        "minority_cosine_W",
    }
    assert missing <= whole.keys() - part.keys() and not any(key.endswith("_W") for key in part)


def test_the_minority_is_that_of_the_training_counts(tmp_path, capsys):
    y = torch.arange(6).repeat_interleave(torch.tensor([50, 30, 20, 10, 5, 3]))  # classes 4 and 5 are rare
    test_y = torch.arange(5, -1, -1).repeat_interleave(torch.tensor([50, 30, 20, 10, 5, 3]))
    h, test_h = (random(6, 9)[v] + 0.1 * random(len(v), 9, seed=1) for v in (y, test_y))
    W = random(6, 9, seed=2)
    arrays = {"train_h": h, "train_y": y, "test_h": test_h, "test_y": test_y, "W": W}
    path = write_features(tmp_path / "f.npz", b=None, **{key: a.numpy() for key, a in arrays.items()})
    found = measured(path, tmp_path, capsys)
    few = torch.tensor([4, 5])
    for split, features, labels in (("train", h, y), ("test", test_h, test_y)):
        M = class_means(features, labels, 6)
        angle = minority_angle(M - M.mean(0), few)
        assert found[split]["minority_angle_M"] == pytest.approx(angle, rel=1e-9)
    assert found["train"]["minority_angle_W"] == pytest.approx(minority_angle(W, few), rel=1e-9)
    assert "minority_angle_W" not in found["test"]


@pytest.mark.parametrize("unit", [2.0**-60, 2.0**60])
def test_the_unit_of_the_features_does_not_matter(unit, tmp_path, capsys):
    h, y, W, _ = (t.float().numpy() if t.is_floating_point() else t.numpy() for t in example())
    arrays = {"train_y": y, "W": W, "b": None, "test_h": None, "test_y": None}
    one = measured(write_features(tmp_path / "f.npz", train_h=h, **arrays), tmp_path, capsys)["train"]
    other = measured(write_features(tmp_path / "f.npz", train_h=unit * h, **arrays), tmp_path, capsys)[
        "train"
    ]
    assert other == pytest.approx(one, rel=1e-9, abs=1e-12)


def test_dead_features_are_null_in_strict_json(tmp_path, capsys):
    path = write_features(tmp_path / "f.npz", train_h=np.zeros((40, 6), np.float32), test_h=None, test_y=None)
    found = measured(path, tmp_path, capsys)["train"]
    assert found["nc1_rank"] == 0
    for key in ("nc1", "cdnv", "vci", "nc3", "znc1", "gnc1", "gnc_log_energy_M", "minority_angle_M"):
        assert found[key] is None, key
    assert found["nc2_equinorm_W"] > 0
    script.main(["--features", str(path), "--out", str(tmp_path / "o")])
    text = capsys.readouterr().out
    assert "nan: nothing differs" in text


def test_many_dimensions_leave_vci_out(tmp_path, capsys):
    h = random(12, 50_000).float().numpy()
    path = write_features(
        tmp_path / "f.npz", train_h=h, train_y=np.arange(12) % 4, W=None, b=None, test_h=None, test_y=None
    )
    found = script.main(["--features", str(path), "--out", str(tmp_path / "o")])["train"]
    assert np.isnan(found["vci"]) and found["nc1"] > 0
    assert "VCI: left out for d > 4096" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_any_float_and_any_integer(dtype, tmp_path, capsys):
    h, y, *_ = (t.numpy() for t in example())
    exact = script.measure(*(torch.from_numpy(a) for a in (h.astype(dtype).astype(float), y)), 4)
    path = write_features(tmp_path / "f.npz", train_h=h.astype(dtype), train_y=y.astype(np.uint16))
    found = measured(path, tmp_path, capsys)["train"]
    assert {key: found[key] for key in exact} == pytest.approx(exact, rel=1e-5, abs=1e-6)


def test_the_table_comes_before_the_figure(tmp_path, capsys, monkeypatch):
    """Where the figure cannot be written the metrics have been printed."""

    def full(*args, **kwargs):
        raise UserError("no space")

    monkeypatch.setattr(script, "heat_maps", full)
    with pytest.raises(UserError, match="no space"):
        script.main(["--features", str(write_features(tmp_path / "f.npz")), "--out", str(tmp_path / "o")])
    assert "NC1 tr(Sigma_W" in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", [
    ({"train_h": None}, ["train_h and train_y"]),
    ({"test_y": None}, ["test_h and test_y"]),
    ({"train_h": np.zeros((40, 6), int)}, ["train_h", "int64"]),
    ({"train_h": np.full((40, 6), np.nan)}, ["train_h", "not finite"]),
    ({"train_h": np.zeros((40, 2, 3))}, ["train_h", "(40, 2, 3)"]),
    ({"train_y": np.zeros(39, int)}, ["train_y is (39,)", "N = 40"]),
    ({"train_y": np.zeros(40)}, ["train_y", "float64"]),
    ({"train_y": np.arange(40) % 5}, ["labels 0 to 4", "0 to 3"]),
    ({"train_y": np.arange(40) % 4 + 1}, ["labels 1 to 4", "labels count from 0"]),
    ({"train_y": np.arange(40) % 4 - 1}, ["labels -1 to 2"]),
    ({"train_y": np.arange(40) % 3}, ["class 3 has no sample in train_y"]),
    ({"test_y": np.zeros(20, int)}, ["class 1 has no sample in test_y"]),
    ({"test_h": np.zeros((20, 7))}, ["test_h", "d = 6"]),
    ({"test_y": np.arange(19) % 4}, ["test_y is (19,)", "n = 20"]),
    ({"W": np.zeros((4, 7))}, ["W", "d = 6"]),
    ({"W": None}, ["b is there"]),
    ({"b": np.zeros(3)}, ["b is (3,)", "K = 4"]),
    ({"train_y": np.zeros(40, int), "W": None, "b": None, "test_h": None, "test_y": None}, ["1 class"]),
    ({"train_y": np.array([{}] * 40, dtype=object)}, ["not a readable"]),
])  # fmt: skip
def test_bad_features_files(changes, words, tmp_path, user_error):
    path = write_features(tmp_path / "f.npz", **changes)
    with user_error("f.npz", "train_h (N, d)", *words):
        script.main(["--features", str(path), "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_a_npy_file(tmp_path, user_error):
    np.save(tmp_path / "h.npy", np.zeros((4, 2)))
    with user_error("h.npy", ".npy holds one array", "np.savez"):
        script.main(["--features", str(tmp_path / "h.npy")])


# %% The program


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "cifar1000"], ["--dataset cifar1000", "cifar100"]),
    (["--net", "vgg"], ["--net", "vgg"]),
    (["--optimizer", "lion"], ["--optimizer", "adamw"]),
    (["--epochs", "0"], ["--epochs", "1 or more"]),
    (["--per-class", "1"], ["--per-class", "2 or more"]),
    (["--lr", "-1"], ["--lr", "above 0"]),
    (["--json"], ["--json", "--features"]),
    (["--features", "a.npz", "--run", "b"], ["--features and --run"]),
    (["--features", "nowhere.npz"], ["nowhere.npz", "No such file"]),
    (["--run", "nowhere"], ["nowhere/features.npz", "No such file"]),
    (["--coarse", "superclasses"], ["--coarse superclasses", "CIFAR-100"]),
])  # fmt: skip
def test_bad_flags(argv, words, tmp_path, user_error):
    with user_error(*words):
        script.main([*argv, "--out", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def files(folder):
    """Everything that a run computes, for comparison to the last bit; times are left out."""
    result = json.loads((folder / "result.json").read_text())
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for entry in (result, *history):
        entry.pop("seconds")
    with np.load(folder / "features.npz", allow_pickle=False) as arrays:
        features = {key: arrays[key] for key in arrays.files}
    return result, history, features


def assert_same_bits(one, two):
    assert json.dumps(one[:2]) == json.dumps(two[:2])
    assert one[2].keys() == two[2].keys()
    assert all(np.array_equal(one[2][key], two[2][key]) for key in one[2])


SHORT = ["--per-class", "12", "--batch-size", "32", "--epochs", "3", "--precision", "fp32", "--device", "cpu"]
FOLDER = Path("nc_metrics") / "digits" / "ce" / "seed0"
COARSE = Path("nc_metrics") / "digits-pairs" / "ce" / "seed0"


def test_killed_and_gone_on_with_is_the_same_to_the_last_bit(
    tmp_path, no_figures, monkeypatch, run_until_killed
):
    """kill -9 while a checkpoint is renamed; then an interruption in the middle of recovering labels."""
    coarse = [*SHORT, "--coarse", "pairs", "--augment"]
    script.main([*coarse, "--out", str(tmp_path / "whole")])
    broken = [*coarse, "--out", str(tmp_path / "broken")]
    run_until_killed(script.main, broken, "save", 2)  # epoch 2 is logged by then, but not saved
    recover, calls = script.recover_labels, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # trained, and one clustering of three done
            raise KeyboardInterrupt
        return recover(*args)

    monkeypatch.setattr(script, "recover_labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(broken)
    script.main(broken)
    assert_same_bits(files(tmp_path / "whole" / COARSE), files(tmp_path / "broken" / COARSE))


def test_the_seed_is_all_that_differs(tmp_path, no_figures):
    results = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever happened before
        script.main([*SHORT, "--epochs", "1", "--seed", seed, "--out", str(tmp_path / out)])
        results.append(files((tmp_path / out / FOLDER).with_name(f"seed{seed}")))
    assert_same_bits(results[0], results[1])
    assert not np.array_equal(results[0][2]["W"], results[2][2]["W"])


def test_dry_run(tmp_path, capsys):
    argv = ["--dry-run", "--coarse", "pairs", "--per-class", "12", "--out", str(tmp_path)]
    script.main(argv)
    text = capsys.readouterr().out
    assert "5 coarse classes of 10 fine ones" in text
    assert "untrained, l2" in text and "\nNC1 tr(" in text  # both tables
    folder = tmp_path / "dry-run" / "nc_metrics" / "digits-pairs" / "ce" / "seed0"
    for name in ("collapse.png", "class_distances.png", "hidden.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in text
    assert "falling.png" not in text


def test_a_run_that_diverges_stops_with_one_line(tmp_path, user_error):
    with user_error("the loss is not finite in epoch 1", "--lr"):
        script.main([*SHORT, "--lr", "1e30", "--out", str(tmp_path)])


def test_the_default_figures(tmp_path):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path)])
    for name in ("collapse.png", "falling.png"):
        assert (tmp_path / FOLDER / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", [
    ["--dataset", "digitslt", "--coarse", "pairs"],
    ["--net", "resnet32", "--per-class", "2", "--optimizer", "adamw", "--augment", "--precision", "bf16"],
])  # fmt: skip
def test_other_flags_train(flags, tmp_path, no_figures):
    script.main([*SHORT, "--epochs", "1", "--out", str(tmp_path), *flags])


def test_the_result_is_of_the_features_that_were_saved(tmp_path, no_figures, capsys):
    result = script.main([*SHORT, "--epochs", "2", "--out", str(tmp_path)])["results"][0]
    data = load_dataset("digits")
    with np.load(tmp_path / FOLDER / "features.npz") as file:
        saved = {key: torch.from_numpy(file[key]) for key in file.files}
    decided = (saved["test_h"] @ saved["W"].T + saved["b"]).argmax(1)
    assert result["accuracy"] == (decided == data.test_y).double().mean()
    textbook = script.neural_collapse(saved["train_h"], saved["W"], saved["train_y"], saved["b"])
    assert {key: result[key] for key in textbook} == pytest.approx(textbook, rel=1e-6)
    assert result["counts"] == [12] * 10
    again = script.main(["--run", str(tmp_path / FOLDER), "--out", str(tmp_path)])
    for split, before in (("train", ""), ("test", "test_")):
        assert again[split].pop("accuracy") == result["accuracy" if before else "train_accuracy"]
        shared = {key: value for key, value in again[split].items() if before + key in result}
        assert len(shared) >= 10
        assert shared == pytest.approx({key: result[before + key] for key in shared}, rel=1e-9)


def test_zero_error_is_the_first_epoch_of_it(tmp_path, no_figures):
    argv = [*SHORT, "--epochs", "20", "--out", str(tmp_path)]
    result = script.main(argv)["results"][0]
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "metrics.jsonl").read_text().splitlines()]
    right = [line["epoch"] for line in lines if line["running_accuracy"] >= 0.999]
    assert result["zero_error_epoch"] == right[0] > 1
    measured = [line["epoch"] for line in lines if "nc1" in line]
    assert measured == [e for e in range(1, 21) if e in script.MILESTONES or e == 20]
    assert lines[-1]["nc1"] < lines[0]["nc1"] / 2  # and it collapses
    assert result["train_accuracy"] == 1 and result["nc4"] == 0


def test_a_finished_run_is_not_redone(tmp_path, capsys, no_figures, user_error):
    argv = [*SHORT, "--epochs", "1", "--out", str(tmp_path)]
    first = script.main(argv)["results"]
    before = (tmp_path / FOLDER / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    again = script.main(argv)["results"]
    assert json.dumps(again) == json.dumps(first)
    assert "--overwrite" in capsys.readouterr().out
    assert (tmp_path / FOLDER / "result.json").stat().st_mtime_ns == before
    with user_error("--weight-decay 0.0005", "--overwrite"):
        script.main([*argv, "--weight-decay", "0.1"])


def test_a_few_shot_run_has_no_common_classes(tmp_path, user_error):
    (tmp_path / "result.json").write_text('{"task": "fewshot", "method": "cosine"}')
    with user_error("--run", "few-shot", "other classes"):
        script.main(["--run", str(tmp_path), "--out", str(tmp_path)])


def test_snippets_refuse_what_they_would_get_wrong():
    with pytest.raises(ValueError, match="L2"):
        script.prepare(np.eye(3), "L2")
    with pytest.raises(ValueError, match="integers"):
        script.neural_collapse(torch.eye(3), torch.eye(3), torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="two classes"):
        script.neural_collapse(torch.ones(4, 2), torch.ones(1, 2), torch.zeros(4, dtype=torch.long))
