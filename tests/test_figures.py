"""results/figures.py: each figure from small runs; runs of two settings do not share a figure."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "results"))
import figures


def write_run(folder, counts, **setting):
    """A finished run of three epochs whose features are random."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    K = len(counts)
    arrays = {
        "W": rng.standard_normal((K, 6)),
        "test_h": rng.random((9 * K, 6)),
        "test_y": np.arange(9 * K) % K,
    }
    np.savez(folder / "features.npz", **arrays)
    setting = {"data": "d", "lr": 0.1, "batch_size": 5, "weight_decay": 0.1, **setting}
    (folder / "config.json").write_text(json.dumps({"seed": int(folder.name[4:]), "setting": setting}))
    (folder / "result.json").write_text(json.dumps({"counts": counts}))
    line = {"lr": 0.1, "accuracy": 0.5, "minority_cosine_W": 0.5, "nc0": 0.1}
    lines = [json.dumps({"epoch": epoch, **line}) + "\n" for epoch in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(lines))


def folders(name, folder):
    """The folders of runs that a figure is drawn from."""
    if name == "three_collapses":
        jobs = {"plain-3d": {}, "sgd-learnable": {"tasks": 2, "lr": 0.2}, "mixup": {"imbalance": 10.0}}
        for method, setting in jobs.items():
            write_run(folder / method / "seed0", [9, 9, 3, 3], **setting)
        return [folder / method for method in jobs]
    if name == "optimisers":
        for optimizer in ("sgd", "adamw"):
            write_run(folder / optimizer / "ce" / "seed0", [9, 9, 9, 9], optimizer=optimizer)
        return [folder]
    for imbalance in (1, 3, 9) if name == "collapse_map" else (9,):
        for run in ("ce/seed0", "ce/seed1", "mixup/seed0"):
            rare = 9 // imbalance
            write_run(folder / f"r{imbalance}" / run, [9, 9, rare, rare], imbalance=imbalance)
    return [folder]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_drawn_refused_on_other_data(name, tmp_path, user_error):
    where = folders(name, tmp_path / "runs")
    command = [name, *map(str, where), "--figure", str(tmp_path / "figure.png")]
    figures.main(command)
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    file = sorted((tmp_path / "runs").rglob("config.json"))[-1]
    config = json.loads(file.read_text())
    config["setting"]["data"] = "other"
    file.write_text(json.dumps(config))
    with user_error("data is", "other"):
        figures.main(command)


def test_other_settings_and_copies_are_refused(tmp_path, user_error):
    write_run(tmp_path / "a" / "ce" / "seed0", [9, 9, 1, 1])
    write_run(tmp_path / "b" / "ce" / "seed1", [9, 9, 1, 1], weight_decay=0.2)
    write_run(tmp_path / "c" / "ce" / "seed0", [9, 9, 1, 1])
    with user_error("weight_decay is 0.2, but 0.1"):
        figures.main(["minority_cosine", f"{tmp_path / 'a'}", f"{tmp_path / 'b'}", "--figure", "x.png"])
    with user_error(tmp_path / "c", "the same method, seed and setting", tmp_path / "a"):
        figures.main(["minority_cosine", f"{tmp_path / 'a'}", f"{tmp_path / 'c'}", "--figure", "x.png"])


def test_edge_is_where_the_cosine_falls_through_one_half():
    assert figures.edge([0.01, 0.1, 1.0], [0.9, 0.75, 0.25]) == pytest.approx(0.1 * 10**0.5)
    assert np.isnan(figures.edge([0.01, 0.1], [0.4, 0.3]))
