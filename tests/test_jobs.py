"""`--jobs`: runs side by side, each in a process of its own, give what they give one after another."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent


def run(argv, **options):
    command = [sys.executable, ROOT / "bmls_msclf.py", *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, **options)


def results(folder):
    """result.json by run folder, without what a clock says."""
    found = {p.parent.relative_to(folder): json.loads(p.read_text()) for p in folder.rglob("result.json")}
    return {str(name): {k: v for k, v in r.items() if k != "seconds"} for name, r in found.items()}


def test_side_by_side_is_the_same_as_one_after_another(tmp_path):
    argv = ["--method", "ce", "bmls+ms", "--seed", "3", "--dry-run", "--out"]
    done = run([*argv, tmp_path / "many", "--jobs", "2"])
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout and "figures in" in done.stdout
    assert "bmls+ms      1" in done.stdout  # the table's row: one seed
    assert (tmp_path / "many/dry-run/bmls_msclf/digitslt/training.png").exists()
    importlib.import_module("bmls_msclf").main([*argv, str(tmp_path / "one")])
    many, one = results(tmp_path / "many"), results(tmp_path / "one")
    assert len(one) == 2 and many == one


def test_what_fails_is_said_and_no_other_is_started(tmp_path):
    folder = tmp_path / "dry-run/bmls_msclf/digitslt/ce"
    folder.mkdir(parents=True)
    (folder / "seed1").write_text("a file where a run folder should be")  # only the process comes upon it
    done = run(["--method", "ce", "--seed", "1", "2", "3", "--jobs", "2", "--dry-run", "--out", tmp_path])
    assert done.returncode == 2
    first, last = done.stderr.strip().splitlines()
    assert str(folder / "seed1") in first
    assert "--jobs 2: ce seed 1 failed" in last and "1 not started" in last and "--resume" in last
    assert not (folder / "seed3").exists()


def test_an_interrupt_reaches_every_process(tmp_path):
    argv = ["--method", "ce", "--seed", "0", "1", "2", "--epochs", "900", "--jobs", "2", "--out", tmp_path]
    command = [sys.executable, ROOT / "bmls_msclf.py", *argv]
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    folder = tmp_path / "bmls_msclf/digitslt/ce"
    began = time.monotonic()
    while not all((folder / f"seed{s}/checkpoint.pt").exists() for s in (0, 1)):
        assert process.poll() is None and time.monotonic() - began < 300
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)  # to the parent alone
    stderr = process.communicate(timeout=100)[1]  # comes to its end when the last process has closed it
    assert process.returncode == 130
    assert stderr.count("interrupted; go on with") == 1 and "--jobs 2" in stderr and "--resume" in stderr
    assert not (folder / "seed2").exists()
    for seed in (0, 1):
        torch.load(folder / f"seed{seed}/checkpoint.pt", weights_only=True)


def test_an_interrupt_that_gets_lost_is_sent_again(monkeypatch):
    class Process:
        returncode, heard = None, 0

        def __init__(self, command, env, stdout):
            pass

        def poll(self):
            return self.returncode

        def wait(self, timeout):
            if self.returncode is None:
                raise subprocess.TimeoutExpired("x.py", timeout)

        def send_signal(self, number):
            assert number == signal.SIGINT
            Process.heard += self.returncode is None
            if Process.heard == 3:
                self.returncode = 130

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.subprocess, "Popen", Process)
    monkeypatch.setattr(common.time, "sleep", interrupt)
    args = importlib.import_module("bmls_msclf").parse(["--method", "ce", "--jobs", "2"])
    with pytest.raises(KeyboardInterrupt):
        common.run_side_by_side(Path("x.py"), args, torch.device("cpu"))
    assert Process.heard == 3


@pytest.mark.parametrize(
    "script, words",
    [
        ("bmls_msclf", ["--method", "ce", "bmls+ms"]),
        ("etf_dr", ["--method", "ce", "etf+dr"]),
        ("fno_continual", ["--method", "er", "joint"]),
        ("hug", ["--method", "ce", "hug-mgd"]),
        ("nc_metrics", ["--method", "all", "--coarse", "pairs"]),
        ("spherization", ["--task", "fewshot"]),
    ],
)
def test_every_script_hands_out_all_of_its_runs(script, words, tmp_path, monkeypatch, capsys):
    """The processes' command lines are run here, one after another: together they leave nothing to train."""
    module, started, running = importlib.import_module(script), [], []
    launch, train = subprocess.Popen, module.train

    def once(*args):
        assert running  # by the processes, not by the one who started them
        return train(*args)

    def process(command, **options):  # git, which is asked for the commit, is none of ours
        return (Process if command[0] == sys.executable else launch)(command, **options)

    class Process:
        returncode = 0

        def __init__(self, command, env, stdout):
            assert Path(command[1]).name == f"{script}.py"
            started.append(env["TQDM_POSITION"])
            running.append(self)
            assert module.main(command[2:])["results"]
            running.remove(self)
            assert not list(folder.glob("*.png"))  # figures of several runs are for the parent

        def poll(self):
            return 0

    monkeypatch.setattr(module, "train", once)
    monkeypatch.setattr(common.subprocess, "Popen", process)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch())
    names = {"bmls_msclf": "digitslt", "etf_dr": "digitslt", "nc_metrics": "digits-pairs"}
    folder = tmp_path / "dry-run" / script / names.get(script, "digits")
    if script == "spherization":
        folder = folder.parent / "fewshot" / "digits-conv4"
    out = module.main([*words, "--seed", "4", "--jobs", "3", "--dry-run", "--out", str(tmp_path)])
    assert folder.exists()
    printed = capsys.readouterr().out
    methods = module.parse([*words, "--out", str(tmp_path)]).method
    assert started == [str(place % 3) for place in range(len(methods))]
    assert len(out["results"]) >= len(methods) and all(out["results"])
    assert "done before" not in printed and "figures in" in printed  # who has just run them knows


@pytest.mark.parametrize("cores, jobs, runs, threads", [(16, 4, 6, "4"), (2, 3, 3, "1"), (16, 8, 2, "8")])
def test_processes_share_the_cores(cores, jobs, runs, threads, monkeypatch, tmp_path):
    seen = []

    class Process:
        returncode = 0

        def __init__(self, command, env, stdout):
            seen.append((env["OMP_NUM_THREADS"], env.get("CUDA_VISIBLE_DEVICES")))

        def poll(self):
            return 0

    monkeypatch.setattr(common.subprocess, "Popen", Process)
    monkeypatch.setattr(common.os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    args = importlib.import_module("bmls_msclf").parse(["--method", "ce", "--jobs", str(jobs)])
    args.seed = list(range(runs))
    common.run_side_by_side(Path("x.py"), args, torch.device("cpu"))
    assert seen == [(threads, None)] * runs
    # several GPUs: one each, in turn, of those that we may use
    seen.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    common.run_side_by_side(Path("x.py"), args, torch.device("cuda"))
    assert {gpu for _, gpu in seen} == {"5", "7"}


def test_a_negative_number_of_jobs_is_refused(user_error):
    for script in ("spherization", "fno_continual", "etf_dr", "bmls_msclf", "hug", "nc_metrics"):
        with user_error("--jobs -1", "expected 0 or more"):
            importlib.import_module(script).parse(["--jobs", "-1"])
