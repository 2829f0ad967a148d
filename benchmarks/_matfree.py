"""The benchmarks' networks in JAX, at the same parameters, and matfree's algorithms on their Hessians."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import _models as models
import jax
import jax.numpy as jnp
import numpy as np
import torch
from matfree import decomp, eig, stochtrace

Array = jax.Array
Params = dict[str, Array]


def _mlp(p: Params, _state: Params, x: Array) -> Array:
    layers = sorted({int(name.split(".")[0]) for name in p})
    for i in layers:
        x = x @ p[f"{i}.weight"].T + p[f"{i}.bias"]
        x = x if i == layers[-1] else jax.nn.relu(x)
    return x


def _resnet(p: Params, state: Params, x: Array) -> Array:
    def conv(name: str, x: Array, stride: int, pad: int) -> Array:
        weight = p[f"{name}.weight"].transpose(2, 3, 1, 0)
        form = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, weight, (stride, stride), [(pad, pad)] * 2, dimension_numbers=form)

    def norm(name: str, x: Array) -> Array:
        scale = p[f"{name}.weight"] / jnp.sqrt(state[f"{name}.running_var"] + 1e-5)
        return (x - state[f"{name}.running_mean"]) * scale + p[f"{name}.bias"]

    x = jax.nn.relu(norm("bn", conv("conv", x.transpose(0, 2, 3, 1), 1, 1)))
    for i in range(len({name.split(".")[1] for name in p if name.startswith("blocks.")})):
        block = f"blocks.{i}"
        projected = f"{block}.shortcut.0.weight" in p
        stride = 2 if projected else 1
        y = jax.nn.relu(norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride, 1)))
        y = norm(f"{block}.bn2", conv(f"{block}.conv2", y, 1, 1))
        x = norm(f"{block}.shortcut.1", conv(f"{block}.shortcut.0", x, stride, 0)) if projected else x
        x = jax.nn.relu(x + y)
    return x.mean(axis=(1, 2)) @ p["head.weight"].T + p["head.bias"]


def _gpt(p: Params, _state: Params, tokens: Array) -> Array:
    def norm(name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(name: str, x: Array) -> Array:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    batch, time = tokens.shape
    x = p["token.weight"][tokens] + p["position.weight"][:time]
    width, heads = x.shape[-1], 4
    causal = jnp.tril(jnp.ones((time, time), bool))
    for i in range(len({name.split(".")[1] for name in p if name.startswith("layers.")})):
        layer = f"layers.{i}"
        qkv = linear(f"{layer}.qkv", norm(f"{layer}.norm1", x)).reshape(batch, time, 3, heads, width // heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / (width // heads) ** 0.5
        attended = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)) @ v
        x = x + linear(f"{layer}.out", attended.transpose(0, 2, 1, 3).reshape(batch, time, width))
        hidden = linear(f"{layer}.up", norm(f"{layer}.norm2", x))
        x = x + linear(f"{layer}.down", jax.nn.gelu(hidden, approximate=False))
    return norm("norm", x) @ p["head.weight"].T


_NETWORKS: dict[str, Callable[[Params, Params, Array], Array]] = {"resnet-20": _resnet, "gpt": _gpt}


def _array(tensor: torch.Tensor) -> Array:
    return jnp.asarray(tensor.detach().cpu().numpy())


@functools.lru_cache(maxsize=1)
def _setup(problem_id: int, dtype: torch.dtype) -> dict[Any, Any]:  # noqa: ARG001
    """Compiled functions of one problem, kept for as long as no other problem comes."""
    jax.config.update("jax_enable_x64", dtype == torch.float64)
    return {}


def _cached(problem: models.Problem, key: Any, make: Callable[[], Any]) -> Any:
    cache = _setup(id(problem), next(iter(problem.params.values())).dtype)
    cache["problem"] = problem  # held, so that its id stays its own
    if key not in cache:
        cache[key] = make()
    return cache[key]


def loss_and_params(problem: models.Problem) -> tuple[Callable[..., Array], Params, Array, Array]:
    """The loss of the first batch as a JAX function, with the same parameters and data."""
    network = _NETWORKS.get(problem.name, _mlp)
    state = {name: _array(buffer) for name, buffer in problem.model.named_buffers()}
    params = {name: _array(leaf) for name, leaf in problem.params.items()}
    inputs, targets = (_array(tensor) for tensor in problem.batch)

    def loss(params: Params, inputs: Array, targets: Array) -> Array:
        log_probabilities = jax.nn.log_softmax(network(params, state, inputs))
        return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1).mean()

    return loss, params, inputs, targets


def _compiled(problem: models.Problem, function: Callable[[Callable[[Array], Array], Array], Any]) -> Any:
    """Jit ``rows -> function(matvec, rows)`` with the product linearized once."""
    loss, params, inputs, targets = loss_and_params(problem)
    names, shapes = list(params), {name: leaf.shape for name, leaf in params.items()}
    splits = np.cumsum([leaf.size for leaf in params.values()])[:-1]

    @jax.jit
    def run(params: Params, inputs: Array, targets: Array, rows: Array) -> Any:
        gradient = jax.grad(lambda p: loss(p, inputs, targets))
        _, tangent = jax.linearize(gradient, params)

        def matvec(v: Array) -> Array:
            pieces = jnp.split(v, splits)
            out = tangent({name: piece.reshape(shapes[name]) for name, piece in zip(names, pieces, strict=True)})
            return jnp.concatenate([out[name].ravel() for name in names])

        return function(matvec, rows)

    return lambda rows: jax.block_until_ready(run(params, inputs, targets, rows))


def _each(algorithm: Callable[..., Any]) -> Callable[..., Any]:
    """The algorithm on row after row."""
    return lambda matvec, rows: jax.lax.map(functools.partial(algorithm, matvec), rows)


def _floats(problem: models.Problem, rows: np.ndarray) -> Array:
    return jnp.asarray(rows, dtype=_array(next(iter(problem.params.values()))[:0]).dtype)


def _signs(problem: models.Problem, num: int, seed: int) -> Array:
    return _floats(problem, np.random.default_rng(seed).integers(0, 2, (num, problem.size)) * 2 - 1)


def _normal(problem: models.Problem, num: int, seed: int) -> Array:
    return _floats(problem, np.random.default_rng(seed).standard_normal((num, problem.size)))


def product(problem: models.Problem, rows: np.ndarray) -> np.ndarray:
    """Hessian-vector products, to check that this is the same network."""
    run = _cached(problem, "product", lambda: _compiled(problem, _each(lambda matvec, row: matvec(row))))
    return np.asarray(run(_floats(problem, rows)))


def density(problem: models.Problem, steps: int, probes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights from matfree's Lanczos without reorthogonalization, solved in float64 by NumPy."""
    tridiag = decomp.tridiag_sym(steps, reortho="none", materialize=True)

    def make() -> Any:
        return _compiled(problem, _each(lambda matvec, row: tridiag(matvec, row).J_small))

    run = _cached(problem, ("density", steps), make)
    nodes, vectors = np.linalg.eigh(np.asarray(run(_signs(problem, probes, seed)), dtype=np.float64))
    return nodes, vectors[:, 0, :] ** 2


def eigs(problem: models.Problem, k: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest in magnitude of matfree's partial eigendecomposition, full reorthogonalization."""
    solve = eig.eigh_partial(decomp.tridiag_sym(steps, reortho="full"))
    run = _cached(problem, ("eigs", steps), lambda: _compiled(problem, lambda matvec, rows: solve(matvec, rows[0])))
    values, rows = (np.asarray(x) for x in run(_normal(problem, 1, seed)))
    order = np.argsort(-np.abs(values))[:k]
    return values[order], rows[order]


def trace(problem: models.Problem, probes: int, seed: int) -> np.ndarray:
    """Samples of matfree's Monte-Carlo trace."""
    integrand = stochtrace.monte_carlo_trace()
    # In equal chunks of at most 16, so that memory is bounded and one compilation does.
    chunks = -(-probes // 16)
    length = -(-probes // chunks)
    run = _cached(problem, ("trace", length), lambda: _compiled(problem, _each(integrand)))
    parts = [run(_signs(problem, length, 1000 * seed + i)) for i in range(chunks)]
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])[:probes]


def xtrace(problem: models.Problem, matvecs: int, seed: int) -> float:
    """XTrace of matfree, product after product; half of them go to the probes, half to the basis."""
    estimate = stochtrace.leave_one_out_xtrace()

    def make() -> Any:
        return _compiled(
            problem, lambda matvec, rows: estimate(jax.custom_batching.sequential_vmap(matvec), rows).mean()
        )

    run = _cached(problem, ("xtrace", matvecs), make)
    return float(run(_normal(problem, matvecs // 2, seed)))
