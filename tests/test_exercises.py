"""Solutions of results/exercises.md, whose code blocks run as they are printed, and the lecture."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import bmls_msclf
import common
import nc_metrics

ROOT = Path(__file__).resolve().parent.parent
PARTS = (ROOT / "results/exercises.md").read_text().split("\n## ")[1:]
BLOCKS = {number: re.findall(r"```python\n(.*?)```", part, re.S) for number, part in enumerate(PARTS, 1)}


def numbers(text):
    """Every number of a block's output, in order."""
    return [float(word) for word in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)]


@pytest.fixture
def block(tmp_path, monkeypatch, capsys):
    """block(number, (old, new), ...) runs an exercise's code in an empty folder and returns its output."""
    monkeypatch.chdir(tmp_path)

    def run(number, *changes):
        (code,) = BLOCKS[number]
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        exec(code, {})  # noqa: S102
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("alpha", [0.2, 4])
def test_1_the_threshold_for_other_alphas(block, alpha):
    """A huge alpha makes every blend one half: the threshold goes to 2."""
    measured, theory = numbers(block(1, ("alpha = 4", f"alpha = {alpha}")))
    assert measured == pytest.approx(theory, abs=0.02)


def test_2_and_3_focal_loss_and_logit_adjustment(block, monkeypatch, tmp_path):
    """Neither loss finds a rare image; equal class vectors get equal scores, whatever is subtracted."""
    for name in ("METHODS", "LOSSES", "ABOUT"):
        monkeypatch.setattr(bmls_msclf, name, dict(getattr(bmls_msclf, name)))
    block(2, ('"ce", "focal"]', '"ce", "focal", "--epochs", "6", "--precision", "fp32"]'))
    folder = tmp_path / "runs/bmls_msclf/digitslt"
    for method in ("ce", "focal"):
        result = common.Run(folder / method / "seed0").finished
        assert result["few"] == 0 and result["accuracy"] > 0.4
    before, after = numbers(block(3))
    assert before == pytest.approx(common.Run(folder / "ce/seed0").finished["accuracy"])
    assert after == pytest.approx(common.Run(folder / "ce/seed0").finished["heads"]["logit_adjustment"])


def test_4_polygon_cross_polytope_simplex(block):
    angles = np.array(numbers(block(4))).reshape(4, 2)[:, 1]
    simplex = np.degrees(np.arccos(-1 / 9))  # nine dimensions hold ten points at equal angles
    np.testing.assert_allclose(angles, [36, 90, simplex, simplex], atol=1e-3)


def test_5_more_weight_decay_more_collapse(tmp_path):
    spread = []
    for decay in ("5e-4", "2e-2"):
        words = ["--weight-decay", decay, "--epochs", "8", "--eval-every", "8", "--precision", "fp32"]
        folder = nc_metrics.main([*words, "--out", str(tmp_path / decay)])["folder"]
        spread.append(common.Run(Path(folder) / "ce/seed0").history[-1]["nc1"])
    assert spread[1] < spread[0]


def test_6_mixup_misses_pairs_and_bmls_none(block):
    instance, balanced, exact = np.array(numbers(block(6))).reshape(3, 3)
    assert instance[0] == 32  # two given rare classes meet once in 720 / 2 = 360 epochs
    assert balanced[0] == 0 and exact.tolist() == [0, 13, 14]


def test_7_nc1_is_blind_across_the_means(block):
    nc1, cdnv = numbers(block(7))
    assert nc1 == pytest.approx(0, abs=1e-9) and cdnv == pytest.approx(2**2 / (2 * 3**2))


def test_8_the_mask_keeps_the_first_task(block):
    assert numbers(block(8)) == [0, 100, 0, 100]


def test_the_lecture_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the lecture extends
    runpy.run_path(str(ROOT / "results/lecture.py"))
    drawn = {path.name for path in (tmp_path / "runs/lecture").rglob("*.png")}
    assert drawn == {"falling.png", "threshold.png", "pairs.png", "class_vectors.png", "heads.png"}
    assert "mixup: cosine of the rare class vectors at 1.25 is 1.00" in capsys.readouterr().out
