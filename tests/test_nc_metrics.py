"""nc_metrics.py: the method's cells, recovering fine labels, measures, features files, a run."""

import argparse
import json
import math

import numpy as np
import pytest
import torch

import common
import nc_metrics as script


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def example(seed=0):
    y = torch.arange(4).repeat_interleave(10)
    h = random(4, 6, seed=seed)[y] + 0.1 * random(40, 6, seed=seed + 1)
    return h, y, random(4, 6, seed=seed + 2), random(4, seed=seed + 3)


def arrays(h, y, W=None, b=None, test_h=None, test_y=None):
    found = {"train_h": h, "train_y": y, "test_h": test_h, "test_y": test_y, "W": W, "b": b}
    return {name: array for name, array in found.items() if array is not None}


# %% The method


def test_the_textbook_form_is_that_of_common():
    h, y, W, b = example()
    for dtype, bias in ((torch.float64, None), (torch.float64, b), (torch.float32, b.float())):
        textbook = script.neural_collapse(h.to(dtype), W.to(dtype), y, bias)
        found = script.measures(arrays(h.to(dtype), y, W.to(dtype), bias), 4)["train"]
        assert list(textbook) == ["nc0", "nc1", "nc2_equinorm_M", "nc2_equiangular_M", "nc3", "nc4"]
        assert textbook == pytest.approx({key: found[key] for key in textbook}, rel=1e-9)


def test_the_textbook_form_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match="integers"):
        script.neural_collapse(torch.eye(3), torch.eye(3), torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="two classes"):
        script.neural_collapse(torch.ones(4, 2), torch.ones(1, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="no sample"):
        script.neural_collapse(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 2]))


def test_pairs_are_k_and_k_plus_half(user_error):
    coarse, names = common.coarse_labels(tuple("abcdefghij"), "pairs")
    assert coarse.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert names == ("a+f", "b+g", "c+h", "d+i", "e+j")
    with user_error("--coarse pairs", "3 classes"):
        common.coarse_labels(("a", "b", "c"), "pairs")
    with user_error("--coarse superclasses", "CIFAR-100"):
        common.coarse_labels(tuple("abcdefghij"), "superclasses")


def test_superclasses_are_the_official_coarse_labels():
    coarse, names = common.coarse_labels(("apple", *map(str, range(98)), "worm"), "superclasses")
    assert torch.bincount(coarse).tolist() == [5] * 20 and len(set(names)) == 20
    assert coarse[:10].tolist() == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]  # apple, aquarium_fish, ... bowl
    assert len(names) == 20 and (coarse[0], coarse[-1]) == (4, 13)  # fruit; invertebrates


# %% Recovering fine labels


def hidden(gap=4.0, length=0.0, n=40, d=12):
    """Features of 3 coarse classes of 2, 3 and 1 fine ones, gap apart; lengths vary by up to e^length."""
    fine_y = torch.arange(6).repeat_interleave(n)
    coarse = torch.tensor([0, 0, 1, 1, 1, 2])
    h = 10 * torch.eye(3, d)[coarse[fine_y]] + gap * torch.eye(6, d).roll(3, 1)[fine_y]
    h = h + 0.1 * random(len(h), d).float()
    h = h * (length * random(len(h), 1, seed=1).float()).exp()
    return h.numpy(), coarse[fine_y].numpy(), fine_y.numpy()


@pytest.mark.parametrize("how", script.PREPARATIONS)
def test_separate_sub_clusters_are_recovered_and_named(how):
    h, coarse_y, fine_y = hidden()
    np.testing.assert_array_equal(script.recover_labels(h, coarse_y, fine_y, how, 0), fine_y)


def test_length_hides_them_from_raw_features_only():
    h, coarse_y, fine_y = hidden(gap=2.0, length=1.0)
    raw, l2 = (np.mean(script.recover_labels(h, coarse_y, fine_y, how, 0) == fine_y) for how in ("raw", "l2"))
    assert l2 == 1 and raw < 0.9


def test_nothing_is_found_in_noise():
    _, coarse_y, fine_y = hidden(n=400)
    found = script.recover_labels(random(len(fine_y), 6).numpy(), coarse_y, fine_y, "l2", 0)
    # the coarse labels are given: the class of one is right, the pair a half, the three a third, and a little
    assert (1 + 2 / 2 + 3 / 3) / 6 < np.mean(found == fine_y) < 0.6


def test_a_name_stays_in_its_coarse_class_and_is_used_once():
    h, coarse_y, fine_y = hidden(gap=0.05)  # clusters and classes hardly agree
    found = script.recover_labels(h, coarse_y, fine_y, "raw", 0)
    np.testing.assert_array_equal(np.array([0, 0, 1, 1, 1, 2])[found], coarse_y)
    assert set(found) == set(range(6))


@pytest.mark.filterwarnings("ignore")
def test_features_that_collapse_completely_do_not_break_it():
    fine_y = np.repeat(np.arange(4), 10)
    h = np.eye(2, 5)[fine_y % 2]  # both fine classes of a coarse one on one point
    for how in script.PREPARATIONS:
        found = script.recover_labels(h, fine_y % 2, fine_y, how, 0)
        assert np.mean(found == fine_y) >= 0.5 and set(found) <= set(range(4))


def test_distance_of_classes_with_one_coarse_label():
    D = torch.tensor([[2.0, 3, 8, 8], [3, 2, 8, 8], [8, 8, 2, 5], [8, 8, 5, torch.nan]])  # nan: one image
    assert script.same_coarse_ratio(D, torch.tensor([0, 0, 1, 1])) == 2


def test_the_probe_sees_what_is_linear():
    y = np.arange(200) % 2
    h = np.stack([np.where(y, 1.0, -1.0) * 1e-3, 1e3 * random(200).numpy()], 1)  # standardised: not drowned
    assert script.probe_accuracy(h, y, h, y) == 1
    assert script.probe_accuracy(h[:, 1:], y, random(200, 1, seed=5).numpy(), y) < 0.7


# %% Network and training


def test_networks():
    data = common.load_dataset("digits")  # one channel, ten classes
    count = {}
    for name in script.NETWORKS:
        model = script.build_model(argparse.Namespace(net=name), data)
        count[name] = sum(p.numel() for p in model.parameters())
        h = model["network"](torch.randn(2, 1, 9, 11))
        assert (h >= 0).all() and h.shape == (2, model["network"].d)
    small = 9 * (1 * 32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10
    assert count == {"cnn": small, "resnet18": 11_173_962 - 2 * 64 * 9}


def test_published_setting(user_error):
    args = script.parse(["--dataset", "cifar10"])
    assert (args.net, args.epochs, args.batch_size, args.weight_decay) == ("resnet18", 350, 128, 5e-4)
    assert script.parse(["--dataset", "mnist"]).lr == 0.0133 and script.parse(["--lr", "0.3"]).lr == 0.3
    assert script.parse([]).lr == 0.05 and script.parse([]).weight_decay == 0.02
    assert script.parse(["--optimizer", "adam", "--lr", "0.001"]).folder.name == "digits-adam"
    with user_error("--optimizer adam", "--lr", "0.001"):
        script.parse(["--optimizer", "adam"])  # whose steps at SGD's rate destroy the network


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


# %% Measures, and features files


def test_nc4_has_the_bias_and_the_training_means():
    h, y, W, b = example()
    test_h, test_y, *_ = example(seed=9)
    found = script.measures(arrays(h, y, W, b, test_h, test_y), 4)
    M = common.class_means(h, y, 4)
    for split, features in (("train", h), ("test", test_h)):
        nearest = [min(range(4), key=lambda k, x=x: float((x - M[k]).square().sum())) for x in features]
        decided = [int((W @ x + b).argmax()) for x in features]
        assert found[split]["nc4"] == np.mean([n != c for n, c in zip(nearest, decided, strict=True)])
    far = torch.tensor([0.0, 0.0, 0.0, 100.0])  # a bias that decides everything for class 3
    assert script.measures(arrays(h, y, W, far), 4)["train"]["nc4"] == 0.75


def test_the_minority_is_that_of_the_training_counts():
    sizes = torch.tensor([50, 30, 20, 10, 5, 3])  # classes 4 and 5 are rare
    y = torch.arange(6).repeat_interleave(sizes)
    test_y = 5 - y
    h, test_h = (random(6, 9)[v] + 0.1 * random(len(v), 9, seed=1) for v in (y, test_y))
    W = random(6, 9, seed=2)
    found = script.measures(arrays(h, y, W, None, test_h, test_y), 6)
    means = {"train": common.class_means(h, y, 6), "test": common.class_means(test_h, test_y, 6)}
    for split, M in means.items():
        a, b = (M - M.mean(0))[4:]
        assert found[split]["minority_cosine_M"] == pytest.approx(float(a @ b / a.norm() / b.norm()))
    assert found["train"]["minority_cosine_W"] == pytest.approx(float(common.cosines(W)[4, 5]))
    balanced = script.measures(arrays(*example()[:3]), 4)["train"]
    assert np.isnan(balanced["minority_cosine_M"])  # classes of one size have no minority


def test_a_class_without_test_samples_leaves_training_whole():
    h, y, W, b = example()
    whole = script.measures(arrays(h, y, W, b, h, y), 4)
    part = script.measures(arrays(h, y, W, b, h[y != 2], y[y != 2]), 4)
    assert json.dumps(part["train"]) == json.dumps(whole["train"])
    assert np.isnan([part["test"][name] for name in ("nc1", "cdnv", "nc2_equinorm_M", "nc3")]).all()
    right = (h @ W.T + b).argmax(1) == y
    assert part["test"]["accuracy"] == float(right[y != 2].double().mean())


def test_no_measure_depends_on_how_classes_are_numbered():
    sizes = torch.tensor([40, 25, 15, 8, 5, 1, 1, 1, 1, 1])
    y = torch.arange(10).repeat_interleave(sizes)
    W = random(10, 12)
    h = W[y] + 0.1 * random(len(y), 12, seed=1)
    one = script.measures(arrays(h, y, W), 10)["train"]
    other = script.measures(arrays(h, 9 - y, W.flip(0)), 10)["train"]
    assert other == pytest.approx(one, rel=1e-9, nan_ok=True)


def write_features(path, **changes):
    h, y, W, b = (t.numpy() for t in example())
    found = {"train_h": h, "train_y": y, "test_h": h[::2], "test_y": y[::2], "W": W, "b": b} | changes
    np.savez(path, **{name: a for name, a in found.items() if a is not None})
    return path


def run_file(path, *flags):
    return script.main(["--features", str(path), *flags, "--out", str(path.parent / "o")])


def test_table_of_a_features_file(tmp_path, capsys):
    h, y, W, b = example()
    h = h.half()  # any float and any integer will do
    path = write_features(tmp_path / "f.npz", train_h=h.numpy(), train_y=y.numpy().astype(np.uint16))
    result = run_file(path)
    expected = script.measures(arrays(h, y, W, b, example()[0][::2], y[::2]), 4)
    for split in ("train", "test"):
        assert result[split] == pytest.approx(expected[split], nan_ok=True)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][1:] == ["N", "=", "40,", "d", "=", "6,", "K", "=", "4"]
    assert "angle 109.5" in " ".join(lines[-1])  # of a tetrahedron
    rows = {words[0]: words[1:] for words in lines[4:-2]}
    names = {name.removesuffix("_M").removesuffix("_W") for name in result["train"]}
    assert rows.keys() == names and 20 <= len(names) <= 22  # every measure is printed, and nothing else
    for name, found in rows.items():
        columns = [result[split].get(name, result[split].get(f"{name}_M")) for split in ("train", "test")]
        columns.append(result["train"].get(f"{name}_W"))
        assert found == [f"{value:.5g}" for value in columns if value is not None]
    run_file(path, "--json")
    strict = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["train"]  # no NaN in it
    printed = {key: math.nan if value is None else value for key, value in strict.items()}
    assert printed == pytest.approx(result["train"], nan_ok=True)


def test_without_class_vectors_what_needs_them_is_left_out(tmp_path):
    whole = run_file(write_features(tmp_path / "f.npz"))["train"]
    part = run_file(write_features(tmp_path / "f.npz", W=None, b=None))["train"]
    assert part == pytest.approx({key: whole[key] for key in part}, nan_ok=True)
    missing = {"accuracy", "nc0", "nc3", "nc4", "gnc3", "znc_alignment", "minority_cosine_W"}
    assert missing <= whole.keys() - part.keys() and not any(key.endswith("_W") for key in part)


def test_dead_features_give_a_table_of_nan(tmp_path, capsys):
    path = write_features(tmp_path / "f.npz", train_h=np.zeros((40, 6)), test_h=None, test_y=None)
    found = run_file(path)["train"]
    assert found["nc1_rank"] == 0 and found["nc2_equinorm_W"] > 0
    assert np.isnan([found[name] for name in ("nc1", "cdnv", "nc3", "znc1", "gnc_smallest_angle_M")]).all()
    assert "nan: not defined" in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", [
    ({"train_h": None}, ["train_h and train_y"]),
    ({"test_y": None}, ["test_h and test_y"]),
    ({"train_h": np.zeros((40, 6), int)}, ["train_h", "int64"]),
    ({"train_h": np.full((40, 6), np.nan)}, ["train_h", "not finite"]),
    ({"train_h": np.zeros((40, 2, 3))}, ["train_h is (40, 2, 3)"]),
    ({"train_h": np.float64(1)}, ["train_h is ()"]),
    ({"train_y": np.arange(40) % 5}, ["labels 0 to 4", "0 to 3"]),
    ({"train_y": np.arange(40) % 4 - 1}, ["labels -1 to"]),
    ({"train_y": np.arange(40) % 3}, ["class 3 has no sample in train_y"]),
    ({"test_y": np.arange(19) % 4}, ["test_y is (19,), not (20,)"]),
    ({"W": np.zeros((4, 7))}, ["W is (4, 7), not (4, 6)"]),
    ({"W": None}, ["b is there"]),
    ({"b": np.zeros(3)}, ["b is (3,), not (4,)"]),
    ({"train_y": np.zeros(40, int), "W": None, "b": None, "test_h": None, "test_y": None}, ["1 class"]),
    ({"train_y": np.array([{}] * 40, dtype=object)}, ["not a readable"]),
])  # fmt: skip
def test_bad_features_files(changes, words, tmp_path, user_error):
    path = write_features(tmp_path / "f.npz", **changes)
    with user_error("f.npz", "train_h (N, d)", *words):
        run_file(path)


def test_no_features_file(tmp_path, user_error):
    np.save(tmp_path / "h.npy", np.zeros((4, 2)))
    with user_error("h.npy", "not a readable features file", "np.savez"):
        run_file(tmp_path / "h.npy")
    with user_error("nowhere", "No such file"):
        script.main(["--run", str(tmp_path / "nowhere")])
    (tmp_path / "result.json").write_text('{"task": "fewshot", "method": "cosine"}')
    with user_error("--run", "few-shot", "not trained"):
        script.main(["--run", str(tmp_path), "--out", str(tmp_path)])
    with user_error("--features", "--run"):
        script.parse(["--features", "a.npz", "--run", "b"])
    with user_error("--json", "--features"):
        script.parse(["--json"])


# %% A run


SHORT = ["--per-class", "12", "--batch-size", "32", "--precision", "fp32", "--device", "cpu"]


def test_a_run_measures_the_features_that_it_saved(tmp_path, capsys):
    argv = [*SHORT, "--epochs", "20", "--out", str(tmp_path)]
    result = script.main(argv)["results"][0]
    folder = tmp_path / "nc_metrics" / "digits" / "ce" / "seed0"
    with np.load(folder / "features.npz") as file:
        saved = {name: torch.from_numpy(file[name]) for name in file.files}
    assert (
        result["accuracy"]
        == ((saved["test_h"] @ saved["W"].T + saved["b"]).argmax(1) == saved["test_y"]).double().mean()
    )
    textbook = script.neural_collapse(saved["train_h"], saved["W"], saved["train_y"], saved["b"])
    assert {name: result[name] for name in textbook} == pytest.approx(textbook, rel=1e-6)
    assert result["counts"] == [12] * 10

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    no_errors = [line["epoch"] for line in lines if line["running_accuracy"] >= 0.999]
    assert result["zero_error_epoch"] == no_errors[0] > 1
    assert [line["epoch"] for line in lines if "nc1" in line] == [1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 15, 18, 20]
    assert lines[-1]["nc1"] < lines[0]["nc1"] / 2  # and it collapses
    rate = {line["epoch"]: line["lr"] for line in lines}
    assert [rate[e] for e in (1, 7, 8, 14, 15)] == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])

    for name in ("collapse.png", "falling.png"):
        (folder / name).unlink()
    script.main(argv)  # as after a kill between result and figures
    for name in ("collapse.png", "falling.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_plane_shows_the_same_class_on_the_same_side():
    y = torch.arange(5).repeat_interleave(20)
    M = random(5, 9)
    for turn in (torch.eye(9).double(), -torch.eye(9).double(), torch.linalg.qr(random(9, 9, seed=3)).Q):
        shown = script.plane((M[y] + 1e-6 * random(100, 9, seed=1)) @ turn, y, (M + 1) @ turn)
        ends = np.array([np.mean(points, 0) for points in shown["points"]])
        assert ends[0, 0] > 0 and abs(ends[0, 1]) < 1e-5 and ends[1, 1] > 0
        np.testing.assert_allclose(ends, shown["vectors"], atol=1e-5)  # points end on the class vectors
        np.testing.assert_allclose(np.linalg.norm(ends, axis=1).mean(), 1, atol=1e-5)


def test_coarse_labels_hide_the_fine_ones(tmp_path, capsys):
    (result,) = script.main([*SHORT, "--epochs", "2", "--coarse", "pairs", "--out", str(tmp_path)])["results"]
    folder = tmp_path / "nc_metrics" / "digits-pairs" / "ce" / "seed0"
    with np.load(folder / "features.npz") as file:
        assert file["W"].shape[0] == 5
        np.testing.assert_array_equal(file["train_fine"] % 5, file["train_y"])
        found = script.recover_labels(file["train_h"], file["train_y"], file["train_fine"], "l2", 0)
        assert result["recovered"] == np.mean(found == file["train_fine"])
    out = capsys.readouterr().out
    assert all(title in out for title in ("k-means", "whitened", "untrained", "true labels"))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("collapse.png", "hidden.png"))


def test_data_without_a_test_image_of_a_class(tmp_path):
    y = np.arange(300) % 10
    x = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 1), np.uint8)
    test = {"test_x": x[y != 7], "test_y": y[y != 7]}
    np.savez(tmp_path / "mnist.npz", train_x=x, train_y=y, classes=np.array(list("0123456789")), **test)
    argv = ["--dataset", "mnist", "--data-dir", str(tmp_path), "--net", "cnn", "--epochs", "1"]
    (result,) = script.main([*argv, "--out", str(tmp_path)])["results"]
    assert result["nc1_rank"] == 9 and np.isnan(result["test_nc1"]) and result["accuracy"] >= 0
