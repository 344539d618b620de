"""spherization.py: the claims of its theory check, others beside them; a wrong constant fails the check."""

import math

import pytest
import torch
import torch.nn.functional as F

import common
import spherization as script
from spherization import Spherization, spherize

BOUNDS = {2: 0.001, 64: 0.937, 84: 1.013, 256: 1.245, 300: 1.270, 640: 1.364, 4096: 1.4887}


@pytest.mark.parametrize("n, phi_L", BOUNDS.items())
def test_lower_bound(n, phi_L):
    assert script.lower_bound(n) == pytest.approx(phi_L, abs=6e-4)
    assert math.sin(script.lower_bound(n)) ** n == pytest.approx(1e-6, rel=1e-6)
    assert script.lower_bound(10**6) == 0.99 * math.pi / 2


def hard_inputs(n):
    """z (75, n), float32: all angles alike (rounding errors would add up), saturated, ordinary and wide."""
    alike = torch.tensor([0, 0.3, 0.9, -0.9, -3, 3, -50, 50, -0.3, 0.6, 2]).float()
    ordinary = torch.randn(32, n, generator=torch.Generator().manual_seed(0))
    return torch.cat([alike[:, None].expand(-1, n), ordinary, 20 * ordinary])


@pytest.mark.parametrize("n", [2, 64, 512, 4096])
def test_hard_inputs_in_float32_are_those_of_float64(n):
    """Values to 1e-6 of the radius, gradients to 1e-5 of the largest, all finite; z = 0, +-50 among them."""
    z = hard_inputs(n)
    g = torch.randn(len(z), n + 1, generator=torch.Generator().manual_seed(1))
    both = []
    for dtype in (torch.float32, torch.float64):
        layer = Spherization(n).to(dtype)
        start = z.clone().to(dtype).requires_grad_()
        x = layer(start)
        x.backward(g.to(dtype))
        both.append([t.double() for t in (x.detach(), start.grad, layer.s.grad)])
    assert (both[0][0].norm(dim=1) / 5 - 1).abs().max() < 1e-6
    x, dz, ds = zip(*both, strict=True)
    assert (x[0] - x[1]).abs().max() < 5e-6
    assert all(t.isfinite().all() for t in both[0])
    assert (dz[0] - dz[1]).abs().max() < 1e-5 * dz[1].abs().max()
    assert (ds[0] - ds[1]).abs() < 1e-4 * dz[1].abs().sum()


def test_coordinate_lines_cross_at_right_angles_and_get_shorter():
    """||dx/dz_k|| = r s (pi/2 - phi_L)/4 prod_{j<k} sin(phi_j) at z = 0."""
    n = 300
    J = torch.autograd.functional.jacobian(lambda z: spherize(z, 5.0), torch.zeros(n, dtype=torch.float64))
    phi_L = script.lower_bound(n)
    middle = (math.pi / 2 + phi_L) / 2
    for k in (0, 150, 299):
        theory = 25 * (math.pi / 2 - phi_L) / 4 * math.sin(middle) ** k
        assert J[:, k].norm().item() == pytest.approx(theory, abs=1e-9)
    G = J.T @ J
    assert (G - G.diag().diag()).abs().max() < 1e-9


def test_without_the_lower_bound_no_gradient_comes_through():
    z = torch.zeros(512, requires_grad=True)
    (math.pi / 2 * torch.sigmoid(z)).sin().prod().backward()
    assert (z.grad == 0).all()
    z = torch.zeros(512, requires_grad=True)
    spherize(z, 5.0)[-1].backward()
    assert (z.grad != 0).all()


def layer_peeled(K, n, penalty, spherized, seed=0):
    """The optimum with free features: min mean_k CE(W h_k + b, k) + penalty/2K (||W||^2 + ||Z||^2).

    Either h = z >= 0, as behind a ReLU, and b is free; or h is z spherized, and b = 0. W, b, H, loss.
    """
    g = torch.Generator().manual_seed(seed)

    def loss(W, q, b=0.0):
        z = q if spherized else q**2
        h = spherize(z, 5.0) if spherized else z
        squares = W.square().sum() + z.square().sum()
        return F.cross_entropy(h @ W.T + b, torch.arange(K)) + penalty / (2 * K) * squares

    W = torch.randn(K, n + 1 if spherized else n, generator=g, dtype=torch.float64)
    q = torch.randn(K, n, generator=g, dtype=torch.float64)
    b = [] if spherized else [torch.zeros(K, dtype=torch.float64)]
    W, q, *b = common.minimise(loss, W, q, *b, steps=300)
    return W, sum(b), spherize(q, 5.0) if spherized else q**2, float(loss(W, q, *b))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("spherized", [False, True])
def test_the_optimum_of_six_classes_uses_length_unless_there_is_none(n, spherized):
    """ReLU units and a bias leave classes apart in norm alone, one unit all of them; angles leave none."""
    W, b, H, _ = layer_peeled(6, n, 1e-3, spherized, seed=1)
    y = torch.arange(6)
    assert ((H @ W.T + b).argmax(1) == y).all()
    noise = torch.randn(200, 6, H.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = (H + 0.01 * H.norm(dim=1).mean() * noise).relu()
    by_angle = (F.normalize(noisy, dim=2) @ F.normalize(H, dim=1).T).argmax(2) == y
    share = by_angle.double().mean()
    assert share > 0.99 if spherized else share < (0.2 if n == 1 else 0.9)


def test_synthetic(tmp_path, capsys):
    done = script.main(["--synthetic", "--out", str(tmp_path)])
    assert done["ok"] and 5 <= done["claims"] <= 8
    assert " NO" not in capsys.readouterr().out
    assert (tmp_path / "spherization" / "synthetic" / "synthetic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name, wrong, claim", [
    ("lower_bound", lambda n, delta=1e-6: math.asin((delta / 2) ** (1 / n)), "no coordinate fades"),
    ("spherize", lambda z, s, r=5.0, delta=1e-6: 1.01 * spherize(z, s, r, delta), "norm / radius"),
])  # fmt: skip
def test_a_wrong_constant_fails_the_check(name, wrong, claim, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "save_figure", lambda *_: None)
    monkeypatch.setattr(script, name, wrong)
    assert not script.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    assert any(claim in line for line in capsys.readouterr().out.splitlines() if line.endswith("NO"))
