"""The loss along directions: against direct evaluation, curvature, weighting of batches, options and errors."""

import pytest
import torch

import hessfunc as hf
from hessfunc import tree
from hessfunc.surface import Surface, filter_normalized, loss_surface


def problem(num=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    params = {
        "layers": [
            torch.randn(4, 3, generator=generator, dtype=dtype),
            (torch.randn(2, 4, generator=generator, dtype=dtype), torch.randn(2, generator=generator, dtype=dtype)),
        ]
    }
    x = torch.randn(num, 3, generator=generator, dtype=dtype)
    y = torch.randint(0, 2, (num,), generator=generator)

    def loss(params, x, y):
        first, (second, bias) = params["layers"]
        return torch.nn.functional.cross_entropy(torch.tanh(x @ first.T) @ second.T + bias, y)

    return loss, params, (x, y)


def random_directions(params, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tree.map_leaves(lambda p: torch.randn(num, *p.shape, generator=generator, dtype=p.dtype), params)


def at(params, directions, *steps):
    for i, step in enumerate(steps):
        params = tree.axpy(step, tree.index(directions, i), params)
    return params


def test_surface_holds_the_loss_at_every_grid_point():
    loss, params, data = problem()
    directions = random_directions(params, 2)
    surface = loss_surface(loss, params, directions, data, span=(0.3, 0.7), num_points=(5, 4))
    assert isinstance(surface, Surface)
    assert [c.dtype for c in surface.coordinates] == [torch.float64] * 2
    torch.testing.assert_close(surface.coordinates[0], torch.linspace(-0.3, 0.3, 5, dtype=torch.float64))
    torch.testing.assert_close(surface.coordinates[1], torch.linspace(-0.7, 0.7, 4, dtype=torch.float64))
    assert surface.losses.shape == (5, 4)
    assert surface.losses.dtype == torch.float64
    expected = [
        [loss(at(params, directions, a, b), *data) for b in surface.coordinates[1]] for a in surface.coordinates[0]
    ]
    torch.testing.assert_close(surface.losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    for kept, given in zip(tree.leaves(surface.directions), tree.leaves(directions), strict=True):
        assert torch.equal(kept, given)


def test_line_is_one_dimensional_and_defaults_are_as_documented():
    loss, params, data = problem()
    surface = loss_surface(loss, params, [tree.index(random_directions(params, 1), 0)], data)
    assert surface.losses.shape == (21,)
    assert len(surface.coordinates) == 1
    assert float(surface.coordinates[0][0]) == -0.5
    assert float(surface.coordinates[0][-1]) == 0.5
    assert float(surface.coordinates[0][10]) == 0.0
    torch.testing.assert_close(surface.losses[10], loss(params, *data), rtol=1e-14, atol=0)


def test_list_of_directions_equals_one_stacked_pytree():
    loss, params, data = problem()
    stacked = random_directions(params, 2)
    separate = [tree.index(stacked, 0), tree.index(stacked, 1)]
    one = loss_surface(loss, params, stacked, data, num_points=3)
    two = loss_surface(loss, params, separate, data, num_points=3)
    assert torch.equal(one.losses, two.losses)
    assert torch.equal(one.directions["layers"][0], two.directions["layers"][0])


def test_params_that_are_themselves_a_list_are_told_from_a_list_of_directions():
    def loss(p):
        return (p[0] ** 2).sum() + 3 * (p[1] ** 2).sum()

    params = [torch.zeros(2), torch.zeros(3)]
    stacked = [torch.ones(1, 2), torch.ones(1, 3)]
    separate = [[torch.ones(2), torch.ones(3)]]
    for directions in (stacked, separate):
        surface = loss_surface(loss, params, directions, span=1.0, num_points=3)
        assert surface.losses.tolist() == [11.0, 0.0, 11.0]
    # two leaves are two entries of a list, but one direction
    assert loss_surface(loss, torch.zeros(2), [torch.ones(2), torch.ones(2)], num_points=3).losses.shape == (3, 3)


def test_second_difference_along_an_eigenvector_is_its_eigenvalue():
    loss, params, data = problem()
    H = hf.hessian(loss, params, data)
    values, vectors = torch.linalg.eigh(H.dense())
    for position in (0, 5, -1):
        direction = [H.layout.unravel(vectors[:, position])]
        step = 1e-3
        surface = loss_surface(loss, params, direction, data, span=step, num_points=3)
        left, middle, right = surface.losses
        torch.testing.assert_close((left - 2 * middle + right) / step**2, values[position], rtol=0, atol=2e-5)
    # and the mixed difference of two eigenvectors vanishes
    pair = [H.layout.unravel(vectors[:, -1]), H.layout.unravel(vectors[:, -2])]
    s = loss_surface(loss, params, pair, data, span=step, num_points=3).losses
    assert abs(float(s[2, 2] - s[2, 0] - s[0, 2] + s[0, 0])) / (4 * step**2) < 2e-5


def test_ragged_batches_are_weighted_by_sample_count():
    loss, params, (x, y) = problem()
    directions = random_directions(params, 1)
    whole = loss_surface(loss, params, directions, (x, y), num_points=5)
    ragged = loss_surface(loss, params, directions, [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])], num_points=5)
    torch.testing.assert_close(ragged.losses, whole.losses, rtol=1e-13, atol=0)


def test_sum_reduction_and_count():
    loss, params, (x, y) = problem()
    directions = random_directions(params, 1)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]

    def summed(params, x, y):
        return loss(params, x, y) * len(x)

    mean = loss_surface(loss, params, directions, batches, num_points=3).losses
    total = loss_surface(summed, params, directions, batches, num_points=3, reduction="sum").losses
    torch.testing.assert_close(total, 7 * mean, rtol=1e-13, atol=0)
    equal = loss_surface(loss, params, directions, batches, num_points=3, count=lambda _: 1.0).losses
    parts = [loss_surface(loss, params, directions, batch, num_points=3).losses for batch in batches]
    torch.testing.assert_close(equal, (parts[0] + parts[1]) / 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("chunk_size", [2, 4, 100])
def test_chunks_under_vmap_equal_the_loop(chunk_size):
    loss, params, data = problem()
    directions = random_directions(params, 2)
    looped = loss_surface(loss, params, directions, data, num_points=3)
    chunked = loss_surface(loss, params, directions, data, num_points=3, chunk_size=chunk_size)
    torch.testing.assert_close(chunked.losses, looped.losses, rtol=1e-12, atol=0)


def test_progress_counts_losses():
    loss, params, (x, y) = problem()
    directions = random_directions(params, 1)
    calls = []
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    options = {"num_points": 5, "chunk_size": 2, "progress": lambda *call: calls.append(call)}
    loss_surface(loss, params, directions, batches, **options)
    assert calls == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]

    class Endless:
        def __iter__(self):
            return iter(batches)

    calls.clear()
    loss_surface(loss, params, directions, Endless(), **options)
    assert calls[-1] == (10, None)
    calls.clear()
    loss_surface(loss, params, directions, (x, y), **options)
    assert calls[-1] == (5, 5)


def test_module_is_left_alone_and_no_graph_is_kept():
    with torch.random.fork_rng():
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, params = hf.module_loss(model, torch.nn.functional.mse_loss)
    directions = random_directions(params, 2)
    data = (torch.ones(2, 1, 4, 4), torch.zeros(2, 8))
    surface = loss_surface(loss, params, directions, data, num_points=3)
    assert not surface.losses.requires_grad
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_overflow_far_away_is_kept_as_it_is():
    surface = loss_surface(lambda p: torch.exp(p).sum(), torch.zeros(1), [torch.ones(1)], span=200.0, num_points=3)
    assert surface.losses.tolist() == [0.0, 1.0, float("inf")]


def test_bfloat16_parameters():
    params = torch.zeros(2, dtype=torch.bfloat16)
    surface = loss_surface(lambda p: (p * p).sum(), params, [torch.ones_like(params)], span=1.0, num_points=3)
    assert surface.losses.tolist() == [2.0, 0.0, 2.0]


def test_filter_normalized_matches_the_norm_of_every_filter():
    generator = torch.Generator().manual_seed(0)
    params = {
        "conv": torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True),
        "bias": torch.randn(4, generator=generator),
        "scalar": torch.tensor(2.0),
        "dead": torch.zeros(2, 3),
    }
    direction = filter_normalized(params, generator=torch.Generator().manual_seed(1))
    norms = direction["conv"].flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, params["conv"].detach().flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    assert not direction["conv"].requires_grad
    assert direction["bias"].tolist() == [0.0] * 4
    assert float(direction["scalar"]) == 0.0
    assert direction["dead"].abs().max() == 0
    assert {name: d.dtype for name, d in direction.items()} == {name: p.dtype for name, p in params.items()}

    again = filter_normalized(params, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again["conv"], direction["conv"])
    other = filter_normalized(params, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(other["conv"], direction["conv"])

    free = filter_normalized(params, generator=torch.Generator().manual_seed(1), freeze_vectors=False)
    torch.testing.assert_close(free["bias"].norm(), params["bias"].norm())
    torch.testing.assert_close(free["scalar"].abs(), params["scalar"])
    assert torch.equal(free["conv"], direction["conv"])


def test_filter_normalized_direction_makes_the_surface_invariant_to_scale_before_a_normalization():
    def loss(params, x):
        hidden = x @ params["w"].T
        hidden = hidden / hidden.norm(dim=0, keepdim=True)
        return (hidden * torch.arange(6.0, dtype=torch.float64).reshape(2, 3)).sum()

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curves = []
    for scale in (1.0, 10.0):
        params = {"w": scale * w}
        direction = filter_normalized(params, generator=torch.Generator().manual_seed(2))
        curves.append(loss_surface(loss, params, [direction], (x,)).losses)
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-10, atol=1e-12)


BAD = [
    ({"directions": []}, ValueError, "directions is empty; pass one pytree like params for a line"),
    ({"directions": [torch.ones(2)] * 3}, ValueError, "directions holds 3 directions, expected 1 or 2"),
    ({"directions": torch.ones(3, 2)}, ValueError, "directions holds 3 directions, expected 1 or 2"),
    ({"directions": [torch.ones(3)]}, ValueError, r"directions\[0\] has shape \(3,\), expected \(2,\)"),
    ({"directions": [torch.ones(2).double()]}, TypeError, r"directions\[0\] has dtype torch.float64"),
    ({"directions": torch.ones(2)}, ValueError, r"directions has shape \(2,\), expected \('K', 2\)"),
    ({"span": 0.0}, ValueError, "span=0.0 is out of range"),
    ({"span": (1.0, 2.0)}, ValueError, r"span=\(1.0, 2.0\) has 2 entries, but there are 1 direction"),
    ({"num_points": 2}, ValueError, "num_points=2 is out of range; expected 3 <= num_points"),
    ({"num_points": 5.0}, TypeError, "num_points is 5.0 of type float"),
    ({"num_points": [3, 3]}, ValueError, r"num_points=\[3, 3\] has 2 entries"),
    ({"chunk_size": 0}, ValueError, "chunk_size=0 is out of range"),
    ({"reduction": "none"}, ValueError, "reduction='none' is not known"),
    ({"data": []}, ValueError, "data is empty"),
    ({"data": iter([])}, TypeError, "exhausted after one pass"),
    ({"loss": lambda p: p}, ValueError, r"loss returned a tensor of shape \(2,\)"),
    ({"params": torch.ones(2, dtype=torch.int64)}, TypeError, "params has dtype torch.int64"),
]


@pytest.mark.parametrize(("change", "error", "text"), BAD)
def test_errors_name_the_argument(change, error, text):
    arguments = {
        "loss": lambda p, *_: (p * p).sum(),
        "params": torch.zeros(2),
        "directions": [torch.ones(2)],
        "data": (),
        **change,
    }
    with pytest.raises(error, match=text):
        loss_surface(**arguments)


def test_filter_normalized_wants_a_generator():
    with pytest.raises(TypeError, match=r"generator is of type int, expected a torch\.Generator"):
        filter_normalized(torch.ones(2), generator=0)
