"""Every head of every script: `nc_metrics.py --run` measures what the run's own result.json says."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

import bmls_msclf
import etf_dr
import fno_continual
import hug
import nc_metrics
import spherization

SHORT = ["--epochs", "1", "--device", "cpu", "--precision", "fp32", "--batch-size", "128"]
TAIL = [*SHORT, "--dataset", "digitslt", "--profile", "exp", "--imbalance", "20"]
STREAM = [*SHORT, "--per-class", "40", "--batch-size", "32", "--method", "sgd", "--no-mask"]
HUG = [*TAIL, "--per-class", "60"]
HEADS = {
    "linear with bias": (spherization, [*SHORT, "--method", "plain"]),
    "sphere": (spherization, [*SHORT, "--method", "sphere"]),
    "linear": (bmls_msclf, [*TAIL, "--method", "ce"]),
    "cosine": (bmls_msclf, [*TAIL, "--method", "bmls+ms", "--ms", "unit"]),
    "fixed": (bmls_msclf, [*TAIL, "--method", "bmls+ms", "--ms", "dot", "--classifier", "etf"]),
    "etf_dr linear": (etf_dr, [*TAIL, "--method", "ce"]),
    "etf+dr": (etf_dr, [*TAIL, "--method", "etf+dr"]),
    "hug linear": (hug, [*HUG, "--method", "ce"]),
    "ce+norm": (hug, [*HUG, "--method", "ce+norm"]),
    "proxy": (hug, [*HUG, "--method", "hug-mhe"]),
    "fno_continual learnable": (fno_continual, [*STREAM, "--bias", "--classifier", "learnable"]),
    "fno": (fno_continual, [*STREAM, "--classifier", "fno"]),
    "nc_metrics": (nc_metrics, [*SHORT, "--per-class", "40"]),
}
NAMES = ("nc0", "nc1", "nc1_rank", "nc3", "nc4", "cdnv", "znc1")
NAMES += tuple(
    f"{name}_{of}" for name in ("nc2_equinorm", "nc2_equiangular", "minority_cosine") for of in "MW"
)
ZERO_MEAN = ("znc_equinorm", "znc_mean_cosine", "znc_max_cosine", "znc_alignment")


@pytest.mark.parametrize("head", HEADS)
def test_run_is_what_the_run_says(head, tmp_path, monkeypatch):
    script, argv = HEADS[head]
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())  # most of the time
    (own,) = script.main([*argv, "--out", str(tmp_path)])["results"]
    (folder,) = [path.parent for path in Path(tmp_path).rglob("result.json")]
    assert json.loads((folder / "result.json").read_text())["method"] == own["method"]
    found = nc_metrics.main(["--run", str(folder), "--out", str(tmp_path)])

    assert own["accuracy"] == pytest.approx(found["test"]["accuracy"], abs=1e-9)
    if script is not fno_continual:
        assert own["train_accuracy"] == pytest.approx(found["train"]["accuracy"], abs=1e-9)
    shared = {name: own[name] for name in NAMES if math.isfinite(own.get(name, math.nan))}
    least = {"bmls_msclf": 9, "etf_dr": 9, "hug": 9, "nc_metrics": 9}
    assert len(shared) >= least.get(script.__name__, 0)
    assert {name: found["train"][name] for name in shared} == pytest.approx(shared, rel=1e-6, abs=1e-9)
    if script is fno_continual:
        zero_mean = {key: own[key] for key in ZERO_MEAN}
        assert {key: found["train"][key] for key in ZERO_MEAN} == pytest.approx(zero_mean, rel=1e-5)
