"""Reports made up from a known spectrum, without a network."""

import torch
from helpers import F64, seeded

from hessfunc._eigenpairs import Eigenpairs
from hessfunc._estimate import Estimate
from hessfunc._quadrature import Quadrature
from hessfunc.report import Report
from hessfunc.surface import Surface

SHAPES = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "head.weight": (3, 4), "scale": ()}


def example_report(shapes=None, *, dimensions=2, dtype=torch.float32, converged=(True, True, False)):
    """A report over leaves of these shapes, with a surface of 0, 1 or 2 dimensions."""
    shapes = SHAPES if shapes is None else shapes
    generator = seeded(7)
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    leaf_samples = torch.rand(6, len(shapes), generator=generator, dtype=F64)
    nodes = torch.cat([torch.rand(4, 5, generator=generator, dtype=F64) - 0.2, torch.full((4, 1), 30.0, dtype=F64)], 1)
    weights = torch.rand(4, 6, generator=generator, dtype=F64)
    weights[:, -1] = 1 / size
    weights[:, :-1] *= (1 - 1 / size) / weights[:, :-1].sum(1, keepdim=True)
    nodes, weights = nodes.flip(1), weights.flip(1)
    vectors = {name: torch.randn(3, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    axes = (torch.linspace(-1, 1, 7, dtype=F64), torch.linspace(-2, 2, 5, dtype=F64))[:dimensions]
    losses = sum((c**2).reshape([-1 if i == j else 1 for j in range(dimensions)]) for i, c in enumerate(axes))
    directions = {name: leaf[:dimensions] for name, leaf in vectors.items()}
    return Report(
        eigenpairs=Eigenpairs(
            eigenvalues=torch.tensor([30.0, 12.5, -4.0]),
            eigenvectors=vectors,
            residuals=torch.tensor([1e-4, 2e-4, 0.5]),
            converged=torch.tensor(converged),
            num_matvecs=41,
        ),
        trace=Estimate.of(leaf_samples.sum(1), num_matvecs=6, leaf_samples=leaf_samples, leaf_names=tuple(shapes)),
        quadrature=Quadrature(nodes, weights, size, num_steps=5, num_matvecs=20, num_exact=1),
        surface=Surface(axes, losses + 0.5, directions) if dimensions else None,
        leaf_shapes=shapes,
        settings={"k": 3, "which": "LM", "tol": 1e-3, "dtype": "float32", "device": "cpu", "problem": "λ ±"},
        versions={"hessfunc": "0.1.0", "torch": "2.13.0"},
        num_matvecs={"eigenpairs": 41, "trace": 6, "density": 20},
        seconds={"eigenpairs": 1.25, "trace": 0.5, "density": 2.0, "surface": 0.125},
    )
