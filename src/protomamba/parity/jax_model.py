"""The model and its training step once more, in JAX, from the papers' equations and from none of our other code.

    python jax_model.py INPUTS.npz OUTPUTS.npz

reads parameters, batches and hyperparameters, and writes what JAX makes of them. It imports jax and numpy only, so that
it can be read, run and doubted on its own. The names of the parameters say which kind of block and head it is; every
size by their shapes.

Sources: Gu & Dao 2023 (arXiv 2312.00752), section 3 and algorithm 2; Mettes et al. 2019 (arXiv 1901.10514), equation
2; Zhang & Sennrich 2019 (arXiv 1910.07467) for RMSNorm; Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, for
AdamW.
B batch, L length, D width, E inner width, N state, R rank of dt, K taps, V classes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]
NORM_EPS = 1e-5
LEAST_SHARPNESS = 0.5


class Hyper(NamedTuple):
    """Of the update. Clipping to `clip` is off at 0. By name: which parameters decay, factors on their learning rate,
    and whether their rows return to the sphere after each update."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    decay: dict[str, bool]
    rate: dict[str, float]
    sphere: dict[str, bool]


class Moments(NamedTuple):
    first: Params
    second: Params


class Step(NamedTuple):
    """What one training step yields: the loss and gradients before the update, and the state after it."""

    loss: jax.Array
    grads: Params
    grad_norm: jax.Array
    params: Params
    moments: Moments


def rms_norm(x_BLD: jax.Array, weight_D: jax.Array) -> jax.Array:
    mean_square_BL1 = jnp.mean(x_BLD**2, axis=-1, keepdims=True)
    return x_BLD / jnp.sqrt(mean_square_BL1 + NORM_EPS) * weight_D


def causal_conv(x_BLE: jax.Array, weight_E1K: jax.Array, bias_E: jax.Array) -> jax.Array:
    """Depthwise: y_t = bias + sum over k of w_k x_{t-K+1+k}, with zeros before the start."""
    length, taps = x_BLE.shape[1], weight_E1K.shape[-1]
    padded = jnp.pad(x_BLE, ((0, 0), (taps - 1, 0), (0, 0)))
    return bias_E + sum(padded[:, k : k + length] * weight_E1K[:, 0, k] for k in range(taps))


def selective_scan(
    u_BLE: jax.Array, dt_BLE: jax.Array, A_EN: jax.Array, B_BLN: jax.Array, C_BLN: jax.Array, D_E: jax.Array
) -> jax.Array:
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,  y_t = C_t . h_t + D u_t,  from h = 0."""

    def advance(h_BEN: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        u_BE, dt_BE, B_BN, C_BN = now
        h_BEN = jnp.exp(dt_BE[:, :, None] * A_EN) * h_BEN + (dt_BE * u_BE)[:, :, None] * B_BN[:, None, :]
        return h_BEN, jnp.einsum("ben,bn->be", h_BEN, C_BN)

    batch, _, inner = u_BLE.shape
    over_time = tuple(jnp.swapaxes(a, 0, 1) for a in (u_BLE, dt_BLE, B_BLN, C_BLN))
    h_BEN = jnp.zeros((batch, inner, A_EN.shape[1]), u_BLE.dtype)
    _, y_LBE = jax.lax.scan(advance, h_BEN, over_time)
    return jnp.swapaxes(y_LBE, 0, 1) + D_E * u_BLE


def state_space(p: Params, u_BLE: jax.Array) -> jax.Array:
    """Convolution, SiLU, and the scan whose dt, B and C are projections of its own input: what both blocks share."""
    rank, state = p["dt_proj.weight"].shape[1], p["A_log"].shape[1]
    u_BLE = jax.nn.silu(causal_conv(u_BLE, p["conv1d.weight"], p["conv1d.bias"]))
    dt_BLR, B_BLN, C_BLN = jnp.split(u_BLE @ p["x_proj.weight"].T, (rank, rank + state), axis=-1)
    dt_BLE = jax.nn.softplus(dt_BLR @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    return selective_scan(u_BLE, dt_BLE, -jnp.exp(p["A_log"]), B_BLN, C_BLN, p["D"])


def mixer(p: Params, x_BLD: jax.Array) -> jax.Array:
    """The mamba block where there is an in_proj; without one the compact block: no expansion, no gate."""
    if "in_proj.weight" not in p:
        return state_space(p, x_BLD) @ p["out_proj.weight"].T
    u_BLE, gate_BLE = jnp.split(x_BLD @ p["in_proj.weight"].T, 2, axis=-1)
    return (state_space(p, u_BLE) * jax.nn.silu(gate_BLE)) @ p["out_proj.weight"].T


def under(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name[len(prefix) :]: value for name, value in named.items() if name.startswith(prefix)}


def backbone(params: Params, ids_BL: jax.Array) -> jax.Array:
    x_BLD = params["embedding.weight"][ids_BL]
    for layer in range(len([name for name in params if name.endswith(".norm.weight")])):
        p = under(params, f"layers.{layer}.")
        x_BLD = x_BLD + mixer(under(p, "mixer."), rms_norm(x_BLD, p["norm.weight"]))
    return rms_norm(x_BLD, params["norm_f.weight"])


def scores(params: Params, ids_BL: jax.Array) -> jax.Array:
    """Per position and class: cosines to the prototypes, or softmax logits (tied to the embedding without a matrix)."""
    z_BLD = backbone(params, ids_BL)
    if "head.prototypes" not in params:
        return z_BLD @ params.get("head.weight", params["embedding.weight"]).T
    return unit(z_BLD) @ unit(params["head.prototypes"]).T


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True))


def loss(params: Params, ids_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Mean over the targets that are not negative of (1 - cos)^2, or of the cross entropy.

    With a learnt sharpness s the value is the former, the gradient that of the cross entropy over s cos, all classes
    being in the sample.
    """
    scores_BLV = scores(params, ids_BL)
    if "head.prototypes" not in params:
        losses_BLV = -jax.nn.log_softmax(scores_BLV, axis=-1)
    elif "head.log_scale" not in params:
        losses_BLV = (1 - scores_BLV) ** 2
    else:
        followed_BLV = -jax.nn.log_softmax(jnp.exp(params["head.log_scale"]) * scores_BLV, axis=-1)
        losses_BLV = jax.lax.stop_gradient((1 - scores_BLV) ** 2 - followed_BLV) + followed_BLV
    counted_BL = targets_BL >= 0
    chosen_BL = jnp.take_along_axis(losses_BLV, jnp.where(counted_BL, targets_BL, 0)[:, :, None], axis=-1)[:, :, 0]
    return jnp.sum(jnp.where(counted_BL, chosen_BL, 0)) / jnp.sum(counted_BL)


loss_and_grads = jax.jit(jax.value_and_grad(loss))


def clip(grads: Params, limit: float) -> tuple[Params, jax.Array]:
    """All gradients, scaled together so that their joint norm is at most `limit`; and that norm before."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in grads.values()))
    scale = jnp.where((limit > 0) & (norm > limit), limit / norm, 1.0)
    return {name: g * scale for name, g in grads.items()}, norm


def adamw(params: Params, grads: Params, moments: Moments, step: int, hyper: Hyper) -> tuple[Params, Moments]:
    """One update; `step` counts from 1. The decay is decoupled: it never enters the moments."""
    first = {n: hyper.beta1 * moments.first[n] + (1 - hyper.beta1) * g for n, g in grads.items()}
    second = {n: hyper.beta2 * moments.second[n] + (1 - hyper.beta2) * g**2 for n, g in grads.items()}

    def updated(name: str) -> jax.Array:
        unbiased_first = first[name] / (1 - hyper.beta1**step)
        unbiased_second = second[name] / (1 - hyper.beta2**step)
        decay = hyper.weight_decay * params[name] if hyper.decay[name] else 0.0
        change = unbiased_first / (jnp.sqrt(unbiased_second) + hyper.eps) + decay
        return params[name] - hyper.lr * hyper.rate[name] * change

    return on_the_sphere({name: updated(name) for name in params}, hyper), Moments(first, second)


def on_the_sphere(params: Params, hyper: Hyper) -> Params:
    """Prototypes back to their length: 1, and more where the sharpness is below that of a fresh head; it stays above
    a least one."""
    if "head.log_scale" in params:
        params = {**params, "head.log_scale": jnp.maximum(params["head.log_scale"], jnp.log(LEAST_SHARPNESS))}
    for name in (name for name in params if hyper.sphere[name]):
        first = math.sqrt(2) * math.log(max(2, len(params[name]) - 1))
        sharpness = jnp.exp(params.get("head.log_scale", jnp.inf))
        params = {**params, name: unit(params[name]) * jnp.maximum(1.0, first / sharpness)}
    return params


def train_step(
    params: Params, moments: Moments, step: int, ids_BL: jax.Array, targets_BL: jax.Array, hyper: Hyper
) -> Step:
    """Loss, every gradient (before clipping), and the clipped AdamW update number `step` >= 1."""
    value, grads = loss_and_grads(params, ids_BL, targets_BL)
    clipped, norm = clip(grads, hyper.clip)
    return Step(value, grads, norm, *adamw(params, clipped, moments, step, hyper))


def fresh_moments(params: Params) -> Moments:
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    return Moments(zeros, zeros)


def train(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Run the steps an inputs file describes.

    `param/NAME`, `decay/NAME`, `rate/NAME`, `sphere/NAME`, `hyper/NAME`, and `ids`, `targets` of shape (steps, B, L).
    Returns `scores` of the first batch, `grad/NAME` of the first step, `loss` and `grad_norm` of every step, and
    `updated/NAME` after the last.
    """
    params = {name: jnp.asarray(value) for name, value in under(inputs, "param/").items()}
    hyper: dict[str, Any] = {name: float(value) for name, value in under(inputs, "hyper/").items()}
    for kind in ("decay", "rate", "sphere"):
        hyper[kind] = {name: value.item() for name, value in under(inputs, f"{kind}/").items()}
    ids_SBL, targets_SBL = jnp.asarray(inputs["ids"]), jnp.asarray(inputs["targets"])
    out = {"scores": jax.jit(scores)(params, ids_SBL[0])}
    moments, steps = fresh_moments(params), []
    for number, (ids_BL, targets_BL) in enumerate(zip(ids_SBL, targets_SBL, strict=True), start=1):
        steps.append(train_step(params, moments, number, ids_BL, targets_BL, Hyper(**hyper)))
        params, moments = steps[-1].params, steps[-1].moments
    out |= {f"grad/{name}": value for name, value in steps[0].grads.items()}
    out |= {f"updated/{name}": value for name, value in params.items()}
    out |= {"loss": jnp.stack([s.loss for s in steps]), "grad_norm": jnp.stack([s.grad_norm for s in steps])}
    return {name: np.asarray(value) for name, value in out.items()}


def main() -> None:
    inputs_path, outputs_path = sys.argv[1:]
    with np.load(inputs_path, allow_pickle=False) as file:
        inputs = dict(file)
    in_float64 = inputs["param/embedding.weight"].dtype == np.float64
    jax.config.update("jax_enable_x64", in_float64)  # type: ignore[no-untyped-call, unused-ignore]
    np.savez(outputs_path, **train(inputs))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
