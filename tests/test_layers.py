"""What the source itself promises: layers, one seam for pytrees, no hidden state, a documented public surface."""

import ast
import inspect
import types
from pathlib import Path

import pytest
import torch

import hessfunc as hf

PACKAGE = Path(hf.__file__).parent
TREES = {path.stem: ast.parse(path.read_text(), str(path)) for path in sorted(PACKAGE.glob("*.py"))}

# From the ground up. A module imports from layers below its own, and within its layer without cycles.
LAYERS = {
    "types": ["_typing"],
    "pytrees": ["tree"],
    "checks and probes": ["_checks", "_probes", "_room", "_heap"],
    "torch put right": [
        *("_decompositions", "_explain", "_compat", "_shadows", "_recorder", "_simplify", "_zeros"),
        *("_elementwise", "_factors", "_softmax", "_reassociate", "_slopes", "_channels_last", "_onednn"),
        *("_steps", "_memory", "_in_place", "_bindings", "_program", "_placed", "_agreement", "_parts"),
        *("_repeating", "_cut", "_thrift", "_linearize"),
    ],
    "products and operators": [
        *("_products", "_rules", "_kept", "_trial", "_traced", "_module", "_restrict", "_data", "_terms", "_operators"),
        *("_batched", "_hessian"),
        *("_witness", "_fingerprint", "_soundness"),
        *("_likelihood", "_gauss_newton", "_linear_factors", "_samples", "_fisher", "_positions", "_hierarchy"),
        "_straight",
    ],
    "kernels": ["_lanczos", "_power"],
    "estimators": [
        *(
            "_eigenpairs",
            "_certify",
            "_krylov_basis",
            "_wanted",
            "_eigsh",
            "_power_eigenpairs",
            "_estimate",
            "_stopping",
            "_deflation",
            "_probe_law",
            "_square_law",
            "_chunks",
            "_batch_probes",
            "_trace",
            "_sketches",
        ),
        *(
            "_sketch_trace",
            "_leave_one_out",
            "_sphere_law",
            "_density",
            "_quadrature",
            "_outliers",
            "_mean_rule",
            "_runs",
            "_semiorthogonal",
            "_krylov",
            "_slq",
        ),
        *("_exact_diagonal", "_split_trace"),
        *("_diagonal", "_sharpness", "_blocks", "_minibatch", "_trajectory", "_track"),
    ],
    "analysis": [
        *("surface", "_tables", "_report_files", "report", "_canvas", "plot", "_analyze", "_problem", "_demo"),
        *("_terminal", "_cli"),
    ],
    "entrance": ["__init__", "__main__"],
}
LEVEL = {module: level for level, modules in enumerate(LAYERS.values()) for module in modules}
KERNELS = LAYERS["kernels"]
SYNCHRONIZING = {"item", "tolist", "nonzero"}
ORDERED_IMPORTS_OF_KERNELS = {"_typing", "tree", "_checks"}


def imported(module):
    """Modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module == "hessfunc":
            found |= {alias.name for alias in node.names if alias.name in TREES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hessfunc."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("hessfunc.")}
    return found


def dotted(node):
    """``torch.nn.functional.silu`` for the expression of that name, an empty string for others."""
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls(module):
    return [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]


def test_every_module_has_a_layer_and_every_layer_its_modules():
    assert set(LEVEL) == set(TREES), "give a new module its place in LAYERS, in this file"


@pytest.mark.parametrize("module", TREES)
def test_nothing_imports_upward(module):
    above = {other for other in imported(module) if LEVEL[other] > LEVEL[module]}
    assert not above, f"{module} imports {above} from a layer above its own"


def test_there_are_no_cycles():
    graph = {module: imported(module) - {module} for module in TREES if module != "__init__"}
    settled = set()
    while len(settled) < len(graph):
        free = {m for m, below in graph.items() if m not in settled and below <= settled | {"__init__"}}
        assert free, f"a cycle among {sorted(set(graph) - settled)}"
        settled |= free


def test_kernels_and_products_do_not_know_each_other():
    for kernel in KERNELS:
        assert imported(kernel) <= ORDERED_IMPORTS_OF_KERNELS
    for module in LAYERS["products and operators"]:
        assert not imported(module) & set(KERNELS)


def test_relative_and_star_imports_are_not_used():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, module
                assert all(alias.name != "*" for alias in node.names), module


def test_pytrees_have_one_seam():
    for module, tree in TREES.items():
        text = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        uses = {name for name in text | names if "_pytree" in name}
        assert bool(uses) == (module == "tree"), (module, uses)


RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"),
    *(
        "multinomial",
        "poisson",
        "normal_",
        "uniform_",
        "random_",
        "bernoulli_",
        "exponential_",
        "cauchy_",
        "geometric_",
    ),
    *("log_normal_", "dropout", "feature_dropout", "alpha_dropout", "rrelu"),
}
# Who may draw: probes, the labels of a Monte Carlo Fisher matrix, and the demonstration's own training.
DRAWING = {"_probes", "_likelihood", "_demo"}


def test_random_numbers_come_from_an_explicit_generator():
    drawing = set()
    for module in TREES:
        for call in calls(module):
            name = dotted(call.func)
            last = call.func.attr if isinstance(call.func, ast.Attribute) else name
            if last in RANDOM and name.partition(".")[0] not in ("_probes", "probes"):
                if isinstance(call.func, ast.Name):  # imported from _probes, which test_nothing_imports_upward sees
                    continue
                drawing.add(module)
                assert any(k.arg == "generator" for k in call.keywords), f"{module}:{call.lineno} {last}"
    assert drawing <= DRAWING


def test_no_global_state_is_set():
    forbidden = {
        *("torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.cuda.manual_seed"),
        *("torch.set_rng_state", "torch.set_default_dtype", "torch.set_default_device", "torch.set_num_threads"),
        *("torch.use_deterministic_algorithms", "torch.set_grad_enabled", "torch.autograd.set_detect_anomaly"),
        *("np.random.seed", "numpy.random.seed", "random.seed", "warnings.simplefilter", "warnings.filterwarnings"),
    }
    for module in TREES:
        for call in calls(module):
            # The command line seeds a user's own function, whose model initializes from the global state, inside
            # fork_rng, and turns warnings into lines of its own inside catch_warnings; _compat keeps a warning of torch
            # from its user inside of another.
            guard = {
                ("_problem", "torch.manual_seed"): "fork_rng",
                ("_cli", "warnings.simplefilter"): "catch_warnings",
                ("_compat", "warnings.simplefilter"): "catch_warnings",
            }.get((module, dotted(call.func)))
            if guard is not None:
                assert guard in (PACKAGE / f"{module}.py").read_text()
                continue
            assert dotted(call.func) not in forbidden, f"{module}:{call.lineno} {dotted(call.func)}"
        for node in ast.walk(TREES[module]):
            targets = node.targets if isinstance(node, ast.Assign) else []
            assert not any(dotted(t).startswith(("torch.", "F.", "np.")) for t in targets), f"{module}:{node.lineno}"


def test_every_new_tensor_says_on_which_device_it_is():
    """Or it would lie on torch's default device, which a user may have set to an accelerator."""
    factories = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
    factories |= {"randperm", "tensor", "zeros"}
    for module in TREES:
        for call in calls(module):
            if dotted(call.func).startswith("torch.") and dotted(call.func).removeprefix("torch.") in factories:
                assert any(k.arg == "device" for k in call.keywords), f"{module}:{call.lineno} {dotted(call.func)}"


def test_a_users_model_is_never_switched_or_given_gradients():
    for module in set(TREES) - {"_demo"}:  # which trains a model of its own
        for call in calls(module):
            if isinstance(call.func, ast.Attribute) and not dotted(call.func).startswith("_demo."):
                assert call.func.attr not in {
                    *("backward", "eval", "train", "zero_grad", "register_forward_hook", "load_state_dict"),
                    *("register_buffer", "register_parameter", "half", "bfloat16", "share_memory"),
                }, f"{module}:{call.lineno} .{call.func.attr}("
        for node in ast.walk(TREES[module]):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                assert node.attr not in ("grad", "training", "data", "requires_grad"), f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", [*KERNELS, "tree", "_products", "_decompositions", "_operators"])
def test_kernels_and_products_do_not_synchronize(module):
    hosts = {"eigh_tridiagonal", "to_scipy", "columns", "column"}
    for function in [n for n in ast.walk(TREES[module]) if isinstance(n, ast.FunctionDef) and n.name not in hosts]:
        nested = {
            m for n in ast.walk(function) if isinstance(n, ast.FunctionDef) and n.name in hosts for m in ast.walk(n)
        }
        for node in ast.walk(function):
            if node in nested or not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute):
                where = f"{module}:{node.lineno} .{node.func.attr}("
                assert node.func.attr not in SYNCHRONIZING | {"cpu", "numpy"}, where
            elif module in KERNELS:
                assert dotted(node.func) not in ("float", "int", "bool"), f"{module}:{node.lineno} {dotted(node.func)}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_have_no_branch_on_a_value(kernel):
    """Every ``if`` and ``while`` outside of docstrings compares options, lengths and counts."""
    for node in ast.walk(TREES[kernel]):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
            allowed = {
                "reorthogonalize",
                "recent",
                "len",
                "_BLOCK",
                "blocks",
                "num_steps",
                "alphas",
                "betas",
                "max",
                "np",
            }
            assert names <= allowed | {"diagonals", "off_diagonals"}, f"{kernel}:{node.lineno} {names}"


def test_modules_stay_short():
    lengths = {m: len((PACKAGE / f"{m}.py").read_text().splitlines()) for m in TREES}
    assert max(lengths.values()) <= 320, max(lengths, key=lengths.get)


def test_init_holds_no_logic():
    for node in TREES["__init__"].body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        version = isinstance(node, ast.Assign) and dotted(node.targets[0]) in ("__version__", "__all__")
        assert docstring or version or isinstance(node, ast.ImportFrom), ast.dump(node)
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), "re-exports are explicit: X as X"


# The public surface

PUBLIC = {
    name: value
    for name, value in vars(hf).items()
    if not name.startswith("_") and not isinstance(value, types.ModuleType)
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
TREE_FUNCTIONS = {
    name: value
    for name, value in vars(hf.tree).items()
    if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == "hessfunc.tree"
}
# What is data rather than an option may be given by position.
DATA = {"data", "like", "k", "pairs", "state"}


def test_the_public_surface_is_functions_and_classes():
    assert set(PUBLIC) == set(FUNCTIONS) | set(CLASSES)
    for name, value in PUBLIC.items():
        assert value.__name__ == name
        assert value.__module__.startswith("hessfunc.")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated_and_their_options_keyword_only(name):
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        if parameter.default is not inspect.Parameter.empty and parameter.name not in DATA:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
    if "generator" in signature.parameters:
        generator = signature.parameters["generator"]
        assert generator.kind is inspect.Parameter.KEYWORD_ONLY
        assert generator.default in (inspect.Parameter.empty, None), "no silent seed"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_documented(name):
    documentation = inspect.getdoc(FUNCTIONS[name])
    first, *rest = documentation.splitlines()
    assert first.endswith((".", ";", ":", ",")) or rest[0], first
    assert documentation.split("\n\n")[0].replace("\n", " ").endswith("."), "the summary is a sentence"
    assert ">>>" in documentation or name == "load_report", "a doctest"  # which needs a folder
    options = [p.name for p in inspect.signature(FUNCTIONS[name]).parameters.values()]
    if "Args:" in documentation:
        for option in options:
            assert f"{option}:" in documentation or f"{option}," in documentation or f"{option} and" in documentation, (
                option
            )


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_are_documented(name):
    cls = CLASSES[name]
    assert cls.__doc__
    assert inspect.getdoc(cls).splitlines()[0].strip()
    if not issubclass(cls, Warning) and hasattr(cls, "__annotations__"):
        documentation = inspect.getdoc(cls)
        for field in [field for field in cls.__annotations__ if not field.startswith("_")]:
            assert field in documentation, f"{name}.{field} is not in the docstring"
    for attribute, value in vars(cls).items():
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            function = value.fget if isinstance(value, property) else value
            assert function.__doc__, f"{name}.{attribute}"
            annotations = inspect.signature(function)
            assert annotations.return_annotation is not inspect.Signature.empty, f"{name}.{attribute}"


@pytest.mark.parametrize("name", TREE_FUNCTIONS)
def test_tree_functions_are_documented_and_annotated(name):
    assert inspect.getdoc(TREE_FUNCTIONS[name])
    signature = inspect.signature(TREE_FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_results_of_kernels_are_named_tuples_of_tensors():
    matrix = torch.eye(3)
    for result in (
        hf.lanczos(lambda v: matrix @ v, torch.ones(3), 2),
        hf.power_iteration(lambda v: matrix @ v, torch.ones(3), 2),
        hf.power_step(lambda v: matrix @ v, torch.ones(3)),
        hf.eigh_tridiagonal(torch.ones(2), torch.ones(1)),
    ):
        assert isinstance(result, tuple)
        assert type(result).__name__ in CLASSES
        assert all(isinstance(field, torch.Tensor) for field in result)
