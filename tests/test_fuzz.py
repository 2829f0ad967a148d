"""Public entry points under random pytrees, dtypes and options: documented exceptions come out, or right results."""

import math
import warnings

import torch
from helpers import F64, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hessfunc as hf
from hessfunc import tree

DOCUMENTED = (ValueError, TypeError, FloatingPointError, NotImplementedError)
fuzzed = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)

numbers = st.one_of(
    st.integers(-2, 9),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from([None, True, "1", 10**9, 1e-3, -1.0]),
)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, F64, torch.int64, torch.bool, torch.complex64])


@st.composite
def tensors(draw):
    entries = torch.randn(draw(shapes), generator=seeded(draw(st.integers(0, 99))), dtype=F64)
    if draw(st.integers(0, 9)) == 0:
        entries = entries * draw(st.sampled_from([0.0, math.inf, math.nan, 1e300]))
    return entries.to(draw(dtypes))


anything = st.recursive(
    st.one_of(tensors(), tensors(), st.none(), st.integers(), st.text(max_size=2)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=2), inner)
    ),
    max_leaves=5,
)


def quiet(function):
    """The result, or ``None`` after a documented exception that says something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function()
        except DOCUMENTED as error:
            text = str(error)
    assert len(text) > 20, text
    return None


def quartic(params, *batch):
    parts = [leaf.double().pow(4).sum() for leaf in tree.leaves(params)]
    extra = [leaf.double().mean() for leaf in tree.leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.numel()]
    return sum(parts) * (1 + sum(extra) ** 2)


@given(anything, anything)
@fuzzed
def test_products_of_anything(params, v):
    for product in (hf.hvp, hf.hvp_reverse_over_forward, hf.hvp_double_backward):
        result = quiet(lambda product=product: product(quartic, params, v))
        if result is not None:
            for leaf, point, vector in zip(tree.leaves(result), tree.leaves(params), tree.leaves(v), strict=True):
                expected = (12 * point.double() ** 2 * vector.double()).to(leaf.dtype)
                close = torch.isclose(leaf.double(), expected.double(), rtol=3e-2, atol=1e-6, equal_nan=True)
                assert bool((close | ~leaf.double().isfinite() | ~expected.double().isfinite()).all())


@given(anything, anything, st.sampled_from(["mean", "sum", "max", None]), numbers, numbers, st.booleans())
@fuzzed
def test_operators_on_anything(params, data, reduction, chunk_size, memory_budget, linearize):
    options = {"chunk_size": chunk_size, "memory_budget": memory_budget, "linearize": linearize}
    H = quiet(lambda: hf.hessian(quartic, params, data, reduction=reduction, **options))
    if H is not None:
        result = quiet(lambda: H(tree.map_leaves(torch.ones_like, params)))
        assert result is None or all(leaf.isfinite().all() for leaf in tree.leaves(result))


@given(
    st.integers(1, 6),
    st.sampled_from([torch.float32, F64]),
    st.sampled_from([0.0, 1.0, 1e-30, 1e30, math.nan]),
    st.dictionaries(
        st.sampled_from(["num_probes", "rtol", "atol", "confidence", "max_probes", "chunk_size"]), numbers, max_size=3
    ),
)
@fuzzed
def test_estimators_of_anything(size, dtype, scale, options):
    H = hf.as_operator(scale * torch.diag(torch.arange(1.0, size + 1, dtype=dtype)))
    options = {k: v for k, v in options.items() if v != 10**9}
    for method in (hf.hutchinson, hf.hutchpp, hf.xtrace, hf.frobenius_squared):
        given_options = dict(options)
        if "max_probes" not in given_options and not {"num_probes"} & set(given_options):
            given_options["max_probes"] = 8
        estimate = quiet(lambda m=method, o=given_options: m(H, **o, generator=seeded()))
        if estimate is not None:
            assert torch.isfinite(estimate.value)


@given(
    st.integers(1, 6),
    st.sampled_from([0.0, 1.0, 1e-30, 1e30, math.nan]),
    numbers,
    st.dictionaries(
        st.sampled_from(["tol", "max_matvecs", "max_basis", "block_size", "verify_steps", "which"]), numbers, max_size=3
    ),
)
@fuzzed
def test_eigenpairs_of_anything(size, scale, k, options):
    H = hf.as_operator(scale * torch.diag(torch.arange(1.0, size + 1, dtype=F64)))
    pairs = quiet(lambda: hf.eigsh(H, k, **options, generator=seeded()))
    if pairs is not None:
        assert len(pairs) == k
        expected = scale * torch.arange(size, size - k, -1.0, dtype=F64)
        assert (pairs.eigenvalues - expected).abs().max() <= pairs.residuals.max() + 1e-9 * scale * size


@given(st.integers(1, 6), numbers, numbers, st.sampled_from([0.0, 1.0, math.nan]), st.sampled_from(["full", "none", 3]))
@fuzzed
def test_quadratures_of_anything(size, num_steps, num_probes, scale, reorthogonalize):
    if num_probes == 10**9:
        return
    H = hf.as_operator(scale * torch.diag(torch.arange(1.0, size + 1, dtype=F64)))
    rule = quiet(
        lambda: hf.slq(
            H, num_steps=num_steps, num_probes=num_probes, reorthogonalize=reorthogonalize, generator=seeded()
        )
    )
    if rule is not None:
        assert (rule.weights.sum(1) - 1).abs().max() < 1e-9
        assert torch.isfinite(rule.nodes).all()
