"""The JAX twin against brute force and finite differences: it must be right on its own before it judges anything."""

import numpy as np
import pytest
from tests.marks import slow

jax = pytest.importorskip("jax")
jnp = jax.numpy
jax.config.update("jax_enable_x64", True)

from protomamba.parity import jax_model  # noqa: E402


def draws(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def parameters(layer, head, *, seed=0, layers=2, D=6, N=3, R=2, K=3, V=7):
    E = 2 * D if layer == "mamba" else D
    R = R if layer == "mamba" else 1
    shapes = {"embedding.weight": (V, D), "norm_f.weight": (D,)}
    shapes |= {"hpn": {"head.prototypes": (V, D)}, "softmax": {"head.weight": (V, D)}, "tied": {}}[head]
    for i in range(layers):
        mixer = {"conv1d.weight": (E, 1, K), "conv1d.bias": (E,), "x_proj.weight": (R + 2 * N, E), "A_log": (E, N)}
        mixer |= {"dt_proj.weight": (E, R), "dt_proj.bias": (E,), "D": (E,), "out_proj.weight": (D, E)}
        if layer == "mamba":
            mixer["in_proj.weight"] = (2 * E, D)
        shapes |= {f"layers.{i}.mixer.{name}": shape for name, shape in mixer.items()} | {
            f"layers.{i}.norm.weight": (D,)
        }
    return {name: 0.5 * value for name, value in draws(seed, **shapes).items()}


def batch(seed=1, B=2, L=5, V=7):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, V, (B, L))
    targets[0, 1] = -100
    return rng.integers(0, V, (B, L)), targets


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 5, 3, 4), (1, 2, 3, 5)], ids=lambda s: "B{}-L{}-E{}-K{}".format(*s)
)
def test_convolution_by_brute_force(shape):
    B, L, E, K = shape
    d = draws(0, x=(B, L, E), w=(E, 1, K), b=(E,))
    expected = np.zeros((B, L, E))
    for b, t, e in np.ndindex(B, L, E):
        expected[b, t, e] = d["b"][e]
        for k in range(K):
            lag = K - 1 - k
            if t - lag >= 0:
                expected[b, t, e] += d["w"][e, 0, k] * d["x"][b, t - lag, e]
    np.testing.assert_allclose(jax_model.causal_conv(d["x"], d["w"], d["b"]), expected, rtol=1e-13)


def test_convolution_is_torch_s():
    """The published weights are those of torch's Conv1d: cross-correlation, last tap on the present."""
    torch = pytest.importorskip("torch")
    d = draws(1, x=(2, 6, 3), w=(3, 1, 4), b=(3,))
    x, w, b = (torch.from_numpy(d[name]) for name in "xwb")
    expected = torch.nn.functional.conv1d(x.mT, w, b, padding=3, groups=3)[..., :6].mT
    np.testing.assert_allclose(jax_model.causal_conv(d["x"], d["w"], d["b"]), expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 2)], ids=lambda s: "B{}-L{}-E{}-N{}".format(*s))
def test_scan_by_brute_force(shape):
    B, L, E, N = shape
    d = draws(2, u=(B, L, E), dt=(B, L, E), A=(E, N), B=(B, L, N), C=(B, L, N), D=(E,))
    dt, A = np.log1p(np.exp(d["dt"])), -np.exp(d["A"])
    expected = np.zeros((B, L, E))
    for b, e in np.ndindex(B, E):
        for n in range(N):
            h = 0.0
            for t in range(L):
                h = np.exp(dt[b, t, e] * A[e, n]) * h + dt[b, t, e] * d["B"][b, t, n] * d["u"][b, t, e]
                expected[b, t, e] += d["C"][b, t, n] * h
        expected[b, :, e] += d["D"][e] * d["u"][b, :, e]
    found = jax_model.selective_scan(d["u"], dt, A, d["B"], d["C"], d["D"])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("head", ["hpn", slow("softmax"), slow("tied")])
@pytest.mark.parametrize("layer", ["mamba", "compact"])
def test_every_gradient_by_finite_differences(layer, head):
    params, (ids, targets) = parameters(layer, head), batch()
    value = jax.jit(jax_model.loss)
    grads = jax.grad(jax_model.loss)(params, ids, targets)
    assert set(grads) == set(params)
    for name in params:
        direction = np.random.default_rng(3).standard_normal(params[name].shape)
        h = 1e-5
        up, down = ({**params, name: params[name] + sign * h * direction} for sign in (1, -1))
        slope = float(value(up, ids, targets) - value(down, ids, targets)) / (2 * h)
        assert float(np.sum(grads[name] * direction)) == pytest.approx(slope, rel=1e-6, abs=1e-10), name
        assert np.any(grads[name] != 0), name


@pytest.mark.parametrize("layer", ["mamba", "compact"])
def test_causal_and_rows_independent(layer):
    params, (ids, _) = parameters(layer, "hpn"), batch()
    changed = ids.copy()
    changed[0, 3] = (changed[0, 3] + 1) % 7
    before, after = jax_model.scores(params, ids), jax_model.scores(params, changed)
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert np.abs(before[0, 3:] - after[0, 3:]).max() > 1e-6


def test_losses_in_plain_words():
    """Both heads' losses recomputed from the scores, target by target, the ignored one left out."""
    ids, targets = batch()
    for head, one in (("hpn", lambda s, y: (1 - s[y]) ** 2), ("softmax", lambda s, y: np.log(np.exp(s).sum()) - s[y])):
        params = parameters("mamba", head)
        scores = np.asarray(jax_model.scores(params, ids))
        each = [one(scores[i], targets[i]) for i in np.ndindex(targets.shape) if targets[i] >= 0]
        assert len(each) == targets.size - 1
        assert float(jax_model.loss(params, ids, targets)) == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_updates_are_those_of_torch_s_adamw(limit):
    """Several steps, so that both moments and both bias corrections matter, with decay, rate and sphere by name."""
    torch = pytest.importorskip("torch")
    shapes = {"kept": (3, 2), "decayed": (2, 4), "turned": (4, 3)}
    start = draws(4, **shapes)
    decay = {"kept": False, "decayed": True, "turned": False}
    rate = {"kept": 1.0, "decayed": 0.5, "turned": 1.0}
    sphere = {"kept": False, "decayed": False, "turned": True}
    hyper = jax_model.Hyper(0.1, 0.8, 0.95, 1e-6, 0.3, limit, decay, rate, sphere)
    params, moments = start, jax_model.fresh_moments(start)
    twins = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in start.items()}
    groups = [
        {"params": [twins["kept"], twins["turned"]], "weight_decay": 0.0},
        {"params": [twins["decayed"]], "weight_decay": 0.3, "lr": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95), eps=1e-6)
    for step in (1, 2, 3):
        grads = draws(10 + step, **shapes)
        clipped, norm = jax_model.clip(grads, limit)
        params, moments = jax_model.adamw(params, clipped, moments, step, hyper)
        size = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        assert float(norm) == pytest.approx(size, rel=1e-12)
        for name, twin in twins.items():
            twin.grad = torch.from_numpy(grads[name] * (limit / size if 0 < limit < size else 1.0))
        optimizer.step()
        with torch.no_grad():
            twins["turned"].div_(twins["turned"].norm(dim=1, keepdim=True))
    for name, twin in twins.items():
        np.testing.assert_allclose(params[name], twin.detach(), rtol=1e-12)


def test_files_in_files_out(tmp_path, monkeypatch):
    """The command reads one file and writes the other; three steps on one batch bring its loss down."""
    params, (ids, targets) = parameters("mamba", "hpn"), batch()
    inputs = {f"param/{name}": value for name, value in params.items()}
    inputs |= {f"decay/{name}": np.array(value.ndim > 1) for name, value in params.items()}
    inputs |= {f"rate/{name}": np.array(1.0) for name in params}
    inputs |= {f"sphere/{name}": np.array(name == "head.prototypes") for name in params}
    inputs |= {"hyper/lr": 1e-2, "hyper/beta1": 0.9, "hyper/beta2": 0.999, "hyper/eps": 1e-8}
    inputs |= {
        "hyper/weight_decay": 0.01,
        "hyper/clip": 1.0,
        "ids": np.stack([ids] * 3),
        "targets": np.stack([targets] * 3),
    }
    np.savez(tmp_path / "in.npz", **inputs)
    monkeypatch.setattr("sys.argv", ["jax_model.py", str(tmp_path / "in.npz"), str(tmp_path / "out.npz")])
    jax_model.main()
    with np.load(tmp_path / "out.npz") as out:
        assert out["loss"].dtype == np.float64
        assert out["loss"][0] > out["loss"][1] > out["loss"][2]
        assert {name for name in out if name.startswith("grad/")} == {f"grad/{name}" for name in params}
        np.testing.assert_allclose(np.linalg.norm(out["updated/head.prototypes"], axis=1), 1.0, rtol=1e-12)
        assert all(np.any(out[f"updated/{name}"] != params[name]) for name in params)
