"""Sketches of an operator that grow probe by probe, and the trace estimates they allow."""

from __future__ import annotations

import torch

from hessfunc._chunks import check_samples, draw
from hessfunc._deflation import extend_basis, inner, known_shares, leaf_sums, products_of, project_off
from hessfunc._estimate import Estimate
from hessfunc._leave_one_out import nystrom_values, xtrace_values
from hessfunc._operators import Operator
from hessfunc._probe_law import ProbeLaw
from hessfunc._probes import Sampler, signs, sphere
from hessfunc._typing import Tensor


class Sketch:
    """Probes and products so far. No product is made twice when a sketch grows.

    ``first`` is the number of probes for a first look at the error, ``cost(count)`` what ``count`` probes cost in
    matvecs; ``grow(count)`` goes on to that many, and ``estimate()`` is the trace from what there is.
    """

    first = 8
    sampler: Sampler = staticmethod(sphere)

    def __init__(self, H: Operator, chunk: int, generator: torch.Generator) -> None:
        self.H, self.chunk, self.generator = H, chunk, generator
        self.none = torch.empty(0, H.size, dtype=H.dtype, device=H.device)
        self.num_matvecs = 0

    def cost(self, count: int) -> int:
        raise NotImplementedError

    def grow(self, count: int) -> None:
        raise NotImplementedError

    def estimate(self) -> Estimate:
        raise NotImplementedError

    def draw(self, num: int) -> Tensor:
        """That many new probes."""
        return torch.cat([self.none, *draw(self.H, num, self.sampler, self.chunk, self.generator)])

    def multiply(self, rows: Tensor) -> Tensor:
        """Products, counted and checked."""
        self.num_matvecs += len(rows)
        products = products_of(self.H, rows, self.chunk)
        check_samples(products)
        return products


class HutchPlusPlus(Sketch):
    """A basis of the images of one half of the probes, and the other half projected off it; with all products."""

    first = 16
    sampler: Sampler = staticmethod(signs)

    def __init__(self, H: Operator, chunk: int, generator: torch.Generator) -> None:
        super().__init__(H, chunk, generator)
        self.num_seen = 0
        self.basis = self.rest = self.rest_products = self.none
        self.shares = self.none[:, :0]  # of the basis in the probes that test: probes = rest + shares @ basis
        self.leaf_traces = torch.zeros(len(H.layout.sizes), dtype=torch.float64, device="cpu")

    def cost(self, count: int) -> int:
        return count + (count + 1) // 2

    def grow(self, count: int) -> None:
        rows, products = self.widen((count + 1) // 2 - self.num_seen)
        self.num_seen = (count + 1) // 2
        self.leaf_traces = self.leaf_traces + known_shares(self.basis, rows, products, self.H)
        self.basis = torch.cat([self.basis, rows])
        across = inner(self.rest, rows)
        rest, rest_products = self.rest - across @ rows, self.rest_products - across @ products
        probes = self.draw(count // 2 - len(rest))
        fresh = inner(probes, self.basis)
        tests = probes - fresh @ self.basis
        self.shares = torch.cat([torch.cat([self.shares, across], dim=1), fresh])
        self.rest, self.rest_products = torch.cat([rest, tests]), torch.cat([rest_products, self.multiply(tests)])

    def widen(self, num: int) -> tuple[Tensor, Tensor]:
        """New rows for the basis, and their products."""
        rows = extend_basis(self.basis, self.multiply(self.draw(num)))
        return rows, self.multiply(rows)

    def estimate(self) -> Estimate:
        law, found = ProbeLaw(self.sampler, self.H), []
        parts = (x.split(self.chunk) for x in (self.rest, self.shares, self.rest_products))
        for rest, shares, products in zip(*parts, strict=True):
            probes, outside = rest + shares @ self.basis, project_off(self.basis, products)
            found.append(leaf_sums(probes * outside, self.H))
            law.add(probes, outside)
        leaf_samples = self.leaf_traces + torch.cat(found)
        plain = Estimate.of(
            leaf_samples.sum(1),
            num_matvecs=self.num_matvecs,
            leaf_samples=leaf_samples,
            leaf_names=self.H.layout.names,
        )
        return law.applied(plain)


class KrylovDeflation(HutchPlusPlus):
    """The same with the Krylov space of one probe for a basis: its products are those that span it."""

    def __init__(self, H: Operator, chunk: int, generator: torch.Generator) -> None:
        super().__init__(H, chunk, generator)
        self.ahead = self.none

    def cost(self, count: int) -> int:
        return count

    def widen(self, num: int) -> tuple[Tensor, Tensor]:
        known = len(self.basis)
        rows = torch.cat([self.basis, self.basis.new_empty(num, self.H.size)])
        products = torch.empty_like(rows[known:])
        for i in range(num):
            row = extend_basis(rows[: known + i], self.ahead)
            if not len(row):  # at the start, and where the space is invariant
                row = extend_basis(rows[: known + i], self.draw(1))
            rows[known + i] = row[0]
            self.ahead = self.multiply(row)
            products[i] = self.ahead[0]
        return rows[known:], products


class XNysTrace(Sketch):
    """Probes and their images."""

    def __init__(self, H: Operator, chunk: int, generator: torch.Generator) -> None:
        super().__init__(H, chunk, generator)
        self.probes = self.images = self.none

    def cost(self, count: int) -> int:
        return count

    def grow(self, count: int) -> None:
        probes = self.draw(count - len(self.probes))
        self.probes = torch.cat([self.probes, probes])
        self.images = torch.cat([self.images, self.multiply(probes)])

    def estimate(self) -> Estimate:
        samples, stderr, dof = nystrom_values(self.probes, self.images)
        return Estimate.of(samples, stderr=stderr, dof=dof, num_matvecs=self.num_matvecs)


class XTrace(XNysTrace):
    """Probes and their images, and an orthonormal basis of the images with its products."""

    def __init__(self, H: Operator, chunk: int, generator: torch.Generator) -> None:
        super().__init__(H, chunk, generator)
        self.basis = self.products = self.none

    def cost(self, count: int) -> int:
        return 2 * count

    def grow(self, count: int) -> None:
        known = len(self.probes)
        super().grow(count)
        rows = extend_basis(self.basis, self.images[known:])
        self.basis = torch.cat([self.basis, rows])
        self.products = torch.cat([self.products, self.multiply(rows)])

    def estimate(self) -> Estimate:
        samples, stderr, dof = xtrace_values(self.probes, self.images, self.basis, self.products)
        return Estimate.of(samples, stderr=stderr, dof=dof, num_matvecs=self.num_matvecs)
