"""spherization.py: the claims of its theory check, others beside them; a wrong constant fails the check."""

import functools
import math

import pytest
import torch

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


@pytest.mark.parametrize("n", [1, 2, 64, 300, 512, 4096])
def test_the_layers_promises_in_float32(n):
    """On the sphere to 1e-6 of the radius, angles recovered, the smallest product of sines is delta."""
    z = hard_inputs(n)
    x = spherize(z, 5.0)
    phi_L = script.lower_bound(n)
    phi = phi_L + (math.pi / 2 - phi_L) * torch.sigmoid(5 * z.double())
    assert (x.double().norm(dim=1) / 5 - 1).abs().max() < 1e-6
    assert (script.angles(x) - phi).abs().max() < 1e-5
    assert x[:, -1].double().min() / 5 / 1e-6 == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("n", [2, 64, 512, 4096])
def test_hard_inputs_in_float32_are_those_of_float64(n):
    """Values to 1e-6 of the radius, gradients to 1e-5 of the largest, all finite; z = 0, +-50 among them."""
    z = hard_inputs(n)
    g = torch.randn(len(z), n + 1, generator=torch.Generator().manual_seed(1))
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = Spherization(n).to(dtype)
        start = z.clone().to(dtype).requires_grad_()
        x = layer(start)
        x.backward(g.to(dtype))
        found.append([t.double() for t in (x.detach(), start.grad, layer.s.grad)])
    x, dz, ds = zip(*found, strict=True)
    assert (x[0] - x[1]).abs().max() < 5e-6
    assert all(t.isfinite().all() for t in found[0])
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


def test_layer_peeled_two_classes_one_unit():
    """sigma(-t/2) = lam / sqrt 2 at the optimum; the norm of the one feature that is not zero follows."""
    for lam in (1e-3, 0.1):
        t = 2 * math.log(math.sqrt(2) / lam - 1)
        W, _, H, loss = script.layer_peeled(2, 1, lam, spherized=False)
        # ||W||^2 + ||h||^2 >= sqrt(2) t for t = w h: what is left is a function of t
        least = math.log1p(math.exp(-t / 2)) + math.sqrt(2) / 4 * lam * t
        assert loss == pytest.approx(least, abs=1e-9)
        assert sorted(H.flatten().tolist()) == pytest.approx([0, (t / math.sqrt(2)) ** 0.5], abs=1e-4)
        assert (W[0] + W[1]).abs().item() < 1e-4
        # no bias, no ReLU: with the layer both are on the quarter circle of radius 5
        _, b, H, _ = script.layer_peeled(2, 1, lam, spherized=True)
        torch.testing.assert_close(H.norm(dim=1), torch.full((2,), 5.0).double())
        assert (b == 0).all()


@pytest.mark.parametrize("spherized", [False, True])
def test_six_classes_of_two_units(spherized):
    """Two ReLU units and a bias leave some classes apart in norm alone; two angles leave none."""
    W, b, H, _ = script.layer_peeled(6, 2, 1e-3, spherized, seed=1)
    assert ((H @ W.T + b).argmax(1) == torch.arange(6)).all()
    noise = torch.randn(200, 6, H.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = H + 0.01 * H.norm(dim=1).mean() * noise
    noisy = (noisy if spherized else noisy.relu()).flatten(0, 1)
    by_angle = script.angle_accuracy(noisy, torch.arange(6).repeat(200), H)
    assert by_angle > 0.99 if spherized else by_angle < 0.9


layer_peeled = functools.cache(script.layer_peeled)  # once for two tests


def test_synthetic(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "layer_peeled", layer_peeled)
    done = script.main(["--synthetic", "--out", str(tmp_path)])
    assert done["ok"] and 6 <= done["claims"] <= 10
    assert " NO" not in capsys.readouterr().out
    assert (tmp_path / "spherization" / "synthetic" / "synthetic.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_constant_fails_the_check(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "layer_peeled", layer_peeled)
    monkeypatch.setattr(script, "save_figure", lambda *_: None)
    monkeypatch.setattr(script, "lower_bound", lambda n, delta=1e-6: math.asin((delta / 2) ** (1 / n)))
    assert not script.main(["--synthetic", "--out", str(tmp_path)])["ok"]
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("NO")]
    assert len(failed) == 1 and "no coordinate fades" in failed[0]
