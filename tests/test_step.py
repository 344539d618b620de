"""TrainingStep: the step asks the device nothing, and as a CUDA graph it does what it does eagerly.

Where there is no GPU a stand-in for CUDA's graphs shows which tensors are read, and when; the graph itself is
tested where there is one.
"""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from common import TrainingStep

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


# %% No step waits for the host

# What makes the host wait for the card: a number read from it, or a shape that depends on what is in it
SYNCHRONISING = (
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim unique_consecutive bincount "
    "repeat_interleave.Tensor linalg_cholesky.default is_nonzero"
).split()


class NoQuestions(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        asked = any(name == word or name.startswith(word + ".") for word in SYNCHRONISING)
        masks = name.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not asked and not masks, f"{name} makes the host wait for the card"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.bincount(x),
        lambda x: x.unique(),
        lambda x: (x > 1).nonzero(),
    ],
)
def test_a_question_is_noticed(question):
    with pytest.raises(AssertionError, match="wait"), NoQuestions():
        question(torch.arange(4))


SCRIPTS = {
    "bmls_msclf": [["--method", "all"], ["--method", "bmls+ms", "--ms", "unit", "--lam", "pair"]],
    "etf_dr": [["--method", "all"]],
    "hug": [["--method", "all"]],
    "nc_metrics": [["--method", "all"]],
    "spherization": [
        ["--task", "retain", "--method", "all"],
        ["--task", "overlap", "--network", "cnn9", "--method", "sphere"],
        ["--task", "fewshot", "--method", "all", "--episodes", "2", "--test-episodes", "2"],
    ],
}


@pytest.mark.parametrize("script, flags", [(s, flags) for s, found in SCRIPTS.items() for flags in found])
def test_no_step_waits_for_the_host(script, flags, tmp_path, monkeypatch):
    module, steps, call = importlib.import_module(script), [], TrainingStep.__call__

    def watched(self, *tensors):
        steps.append(all(isinstance(t, torch.Tensor) for t in tensors))
        with NoQuestions():
            return call(self, *tensors)

    def adam(self, step=torch.optim.Adam.step):  # counts on the host here; the fused one on the card does not
        with _disable_current_modes():
            return step(self)

    monkeypatch.setattr(TrainingStep, "__call__", watched)
    monkeypatch.setattr(torch.optim.Adam, "step", adam)
    monkeypatch.setattr(module, "draw_figures", lambda *_: [], raising=False)
    module.main([*flags, "--dry-run", "--device", "cpu", "--out", str(tmp_path)])
    assert steps and all(steps)


# %% The graph


def problem(device="cpu", optimizer=torch.optim.SGD, **rate):
    """A network with BatchNorm and dropout-free arithmetic, its step, and batches of two sizes."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(2, 3, 6, 6))
    network.to(device)
    optimizer = optimizer(network.parameters(), 0.05, **(rate or {"momentum": 0.9, "weight_decay": 1e-3}))

    def step(x, y):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    generator = torch.Generator().manual_seed(1)
    batches = []
    for B in [8, 8, 7, 8, 8, 8, 7, 8, 7, 7, 7, 8]:
        x = torch.randn(B, 3, 6, 6, generator=generator).to(device)
        batches.append((x, torch.randint(5, (B,), generator=generator).to(device)))
    return network, optimizer, step, batches


def run(training_step, batches):
    losses = []
    for i, (x, y) in enumerate(batches):
        training_step.set_learning_rate(0.05 / (i + 1))
        losses.append(training_step(x, y).clone())
    return torch.stack(losses)


class StandIn:
    """A graph whose replay runs the recorded step again, on the tensors it was recorded with."""

    def __init__(self):
        self.replays = 0

    @classmethod
    @contextlib.contextmanager
    def record(cls, graph, pool=None):
        cls.recorded.append(graph)  # a list that the fixture makes anew
        yield


@pytest.fixture
def cuda_stand_in(monkeypatch):
    """TrainingStep as on CUDA, but for streams and graphs; its learning rate is a tensor on the CPU."""

    class Device(str):
        type = "cuda"

    monkeypatch.setattr(StandIn, "recorded", [], raising=False)
    monkeypatch.setattr(
        torch.cuda, "Stream", lambda device: type("S", (), {"wait_stream": lambda *_: None})()
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: torch.cuda.Stream(None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", StandIn.record)
    tensor = torch.tensor
    here = Device()

    def made(*args, device=None, **kwargs):
        return tensor(*args, device=None if device is here else device, **kwargs)

    monkeypatch.setattr(torch, "tensor", made)
    return here


def test_replay_reads_copies_of_its_arguments(cuda_stand_in, monkeypatch):
    """Each shape is recorded once, after three eager steps; then its own tensors are filled and replayed."""
    done = []

    def step(x):  # on a card recording does not compute; here the first call of a shape is as good
        done.append(x)
        return x.sum()

    _, optimizer, _, _ = problem()
    training_step = TrainingStep(step, optimizer, cuda_stand_in)
    losses = []

    def replay(graph):  # what the card would do: the recorded step on the recorded tensors
        graph.replays += 1
        shape = list(training_step.graphs)[StandIn.recorded.index(graph)]
        _, (x,), loss = training_step.graphs[shape]
        loss.copy_(x.sum())

    monkeypatch.setattr(StandIn, "replay", replay, raising=False)
    for i, B in enumerate([2, 2, 3, 2, 2, 3, 3, 2, 3, 3]):
        losses.append(float(training_step(torch.full((B,), float(i)))))
    assert losses == [B * i for i, B in enumerate([2, 2, 3, 2, 2, 3, 3, 2, 3, 3])]
    assert len(done) == 3 + 3 + 2  # eager steps of each shape, and a recording of each
    assert [graph.replays for graph in StandIn.recorded] == [2, 2]


def test_learning_rate_keeps_its_address(cuda_stand_in):
    _, optimizer, step, _ = problem()
    training_step = TrainingStep(step, optimizer, cuda_stand_in)
    (group,) = optimizer.param_groups
    rate = group["lr"]
    assert float(rate) == pytest.approx(0.05) and group["fused"]
    training_step.set_learning_rate(0.01)
    assert group["lr"] is rate and float(rate) == pytest.approx(0.01)
    adam = problem(optimizer=torch.optim.Adam, weight_decay=0.0)[1]
    TrainingStep(step, adam, cuda_stand_in)
    assert adam.param_groups[0]["capturable"] and adam.param_groups[0]["fused"]


def test_a_step_that_cannot_be_recorded_runs_eagerly_and_says_so_once(cuda_stand_in, monkeypatch, capsys):
    def refuse(graph, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    _, optimizer, _, _ = problem()
    training_step = TrainingStep(lambda x: x.sum(), optimizer, cuda_stand_in)
    assert [float(training_step(torch.full((2,), i))) for i in range(6)] == [2.0 * i for i in range(6)]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("(operation not permitted when stream is capturing)")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_on_the_cpu_it_is_the_step_itself(optimizer):
    """To the last bit, and the optimizer's state is as it was: a number for the rate, no fused kernel."""
    rate = {"weight_decay": 1e-3}
    network, own, step, batches = problem(optimizer=optimizer, **rate)
    losses = run(TrainingStep(step, own, torch.device("cpu")), batches)
    expected, plain, step, _ = problem(optimizer=optimizer, **rate)
    for i, (x, y) in enumerate(batches):
        plain.param_groups[0]["lr"] = 0.05 / (i + 1)
        assert step(x, y).equal(losses[i])
    for a, b in zip(network.parameters(), expected.parameters(), strict=True):
        assert a.equal(b)
    assert own.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


def test_optimizer_state_of_a_card_goes_on_on_the_cpu(cuda_stand_in):
    _, optimizer, step, _ = problem()
    TrainingStep(step, optimizer, cuda_stand_in).set_learning_rate(0.01)
    _, other, step, _ = problem()
    other.load_state_dict(optimizer.state_dict())
    TrainingStep(step, other, torch.device("cpu"))
    (group,) = other.param_groups
    assert group["lr"] == pytest.approx(0.01) and isinstance(group["lr"], float) and group["fused"] is None


@needs_cuda
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_graph_and_eager_give_the_same_parameters(optimizer):
    rate = {"weight_decay": 1e-3}
    network, own, step, batches = problem("cuda", optimizer, **rate)
    graphed = TrainingStep(step, own, torch.device("cuda"))
    losses = run(graphed, batches)
    assert len(graphed.graphs) == 2
    expected, plain, step, _ = problem("cuda", optimizer, **rate)
    torch.testing.assert_close(
        losses, run(TrainingStep(step, plain, torch.device("cuda"), capture=False), batches)
    )
    torch.testing.assert_close(network.state_dict(), expected.state_dict())


@needs_cuda
def test_no_step_synchronises_on_the_card():
    _, optimizer, step, batches = problem("cuda")
    training_step = TrainingStep(step, optimizer, torch.device("cuda"))
    run(training_step, batches)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(training_step, batches)
        run(TrainingStep(step, optimizer, torch.device("cuda"), capture=False), batches)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_recorded_on_the_card(script, tmp_path, monkeypatch, capsys):
    """Two epochs, so that each shape of batch comes more than three times; a graph, and no complaint."""
    module, made = importlib.import_module(script), []
    init = TrainingStep.__init__
    monkeypatch.setattr(
        TrainingStep, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
    )
    module.main(["--epochs", "2", "--device", "cuda", "--out", str(tmp_path)])
    assert made and all(step.graphs for step in made)
    assert "CUDA graph" not in capsys.readouterr().err
