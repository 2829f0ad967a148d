"""``hessfunc analyze``: options, kinds of problem, and errors; and the way in without the extras."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import seeded
from typer.testing import CliRunner

import hessfunc as hf
from hessfunc import __main__ as entry
from hessfunc._cli import app
from hessfunc.report import load_report

PROBLEM = """
import torch
from torch.nn import functional as F


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=generator, dtype=dtype)
    return [(x[:5], x[:5, 0] > 0), (x[5:], x[5:, 0] > 0)]


class Criterion(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0]))

    def forward(self, output, target):
        return F.cross_entropy(output, target.long(), weight=self.weight, reduction="sum")


def module():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)), Criterion(), data()


def closure():
    def loss(params, x, y):
        return F.binary_cross_entropy_with_logits(torch.tanh(x @ params["w"]) @ params["v"], y.to(x))

    generator = torch.Generator().manual_seed(1)
    return loss, {n: torch.randn(s, generator=generator) for n, s in (("w", (3, 4)), ("v", (4,)))}, data()


def single_batch():
    loss, params, batches = closure()
    return loss, params, batches[0]


class Stream:
    def __iter__(self):
        return iter(data())


def stream():
    loss, params, _ = closure()
    return loss, params, Stream()


def loader():
    loss, params, batches = closure()
    x, y = (torch.cat(parts) for parts in zip(*batches))
    data = torch.utils.data.TensorDataset(x, y)
    return loss, params, torch.utils.data.DataLoader(data, batch_size=4, generator=torch.Generator())


def exhausted():
    loss, params, batches = closure()
    return loss, params, iter(batches)


def noisy():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    return model, lambda o, t: o.square().mean(), data()


def quiet():
    model, criterion, batches = noisy()
    return model.eval(), criterion, batches


def uses_sibling():
    import a_sibling_module
    return a_sibling_module.problem()


def needs(argument, other=1, *more, **options):
    pass


def fails():
    raise KeyError("no such thing")


def bad_loss():
    return (lambda params: params["w"] @ params["missing"]), {"w": torch.ones(2)}, ()


def shapes():
    def loss(params, x, y):
        return (x @ params["w"]).sum()

    return loss, {"w": torch.ones(4)}, data()


def nan():
    return (lambda params: (params["w"] * float("nan")).sum()), {"w": torch.ones(2)}, ()


def quadratic():
    return (lambda p: (p["w"] ** 2 * torch.tensor([1.0, 3.0, -2.0])).sum() / 2), {"w": torch.zeros(3)}, ()


nothing = 3
two = lambda: (1, 2)
a_list = lambda: [1, 2, 3]
not_callable = lambda: (3, {}, ())
no_criterion = lambda: (torch.nn.Linear(1, 1), 3, ())
no_data = lambda: (lambda p: p.sum(), torch.ones(2), [])
integers = lambda: (lambda p: p.sum(), torch.ones(2, dtype=torch.int64), ())
"""
SMALL = ["--k", "2", "--probes", "4", "--steps", "5", "--density-probes", "2", "--no-surface", "--no-figures"]


@pytest.fixture
def problem(tmp_path):
    folder = tmp_path / "my problem ü"
    folder.mkdir()
    (folder / "a problem λ.py").write_text(PROBLEM, encoding="utf-8")
    return folder / "a problem λ.py"


def run(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def reference(name, *, reduction="sum", dtype=torch.float64):
    """The dense Hessian of one of the problems above."""
    space = {}
    exec(PROBLEM, space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second, data = space[name]()
    if isinstance(first, torch.nn.Module):
        first, second = hf.module_loss(first.to(dtype), second.to(dtype))
    params = {name: leaf.to(dtype) for name, leaf in second.items()}
    batches = [tuple(x.to(dtype) if x.is_floating_point() else x for x in batch) for batch in data]
    return hf.hessian(first, params, batches, reduction=reduction).dense()


def test_module_with_every_option(problem, tmp_path):
    out = tmp_path / "neu ✓"
    result = run(
        f"{problem}:module", "--out", out, "--k", 3, "--which", "BE", "--tol", 1e-6, "--probes", 5, "--steps", 7,
        "--density-probes", 3, "--surface-points", 4, "--surface-span", 0.25, "--reduction", "sum",
        "--dtype", "float64", "--device", "cpu", "--eigenvectors", "--seed", 11,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings == {
        "k": 3,
        "which": "BE",
        "tol": 1e-6,
        "num_probes": 5,
        "num_steps": 7,
        "density_probes": 3,
        "surface_points": 4,
        "surface_span": 0.25,
        "reduction": "sum",
        "count": None,
        "product": "hvp",
        "chunk_size": None,
        "linearize": True,
        "memory_budget": None,
        "compile": False,
        "dtype": "float64",
        "device": "cpu",
        "seed": 11,
        "problem": {"target": f"{problem}:module"},
    }
    report = load_report(out)
    assert report.eigenpairs.eigenvalues.dtype == torch.float64
    assert report.trace.samples.shape == (5,)
    assert report.quadrature.num_steps == 7
    assert report.quadrature.num_probes == 3
    assert report.surface.losses.shape == (4, 4)
    assert set(report.eigenpairs.eigenvectors) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {path.name for path in out.iterdir()} == {
        "report.json", "arrays.npz", "eigenvectors.npz", "density.png", "layers.png", "surface.png",
    }  # fmt: skip


def test_eigenvalues_and_trace_are_those_of_the_problem(problem, tmp_path):
    result = run(f"{problem}:module", "--out", tmp_path / "o", "--reduction", "sum", "--tol", 1e-5, *SMALL)
    assert result.exit_code == 0, result.output
    report = load_report(tmp_path / "o")
    values = torch.linalg.eigvalsh(reference("module"))
    top = values[values.abs().argsort(descending=True)[:2]]
    torch.testing.assert_close(report.eigenpairs.eigenvalues.double(), top, rtol=1e-4, atol=0)
    assert abs(float(report.trace) - float(values.sum())) < 5 * float(report.trace.stderr)
    # as-they-are dtype, and a seeded initialization: the same again
    assert report.settings["dtype"] == "float32"
    again = run(f"{problem}:module", "--out", tmp_path / "p", "--reduction", "sum", "--tol", 1e-5, *SMALL)
    assert again.exit_code == 0
    assert torch.equal(load_report(tmp_path / "p").eigenpairs.eigenvalues, report.eigenpairs.eigenvalues)


def test_closure_with_mean_reduction_weights_batches(problem, tmp_path):
    result = run(f"{problem}:closure", "--out", tmp_path / "o", "--dtype", "float64", *SMALL)
    assert result.exit_code == 0, result.output
    report = load_report(tmp_path / "o")
    values = torch.linalg.eigvalsh(reference("closure", reduction="mean"))
    top = values[values.abs().argsort(descending=True)[:2]]
    torch.testing.assert_close(report.eigenpairs.eigenvalues, top, rtol=1e-4, atol=0)
    assert report.surface is None
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"report.json", "arrays.npz"}
    assert "surface" not in report.seconds


@pytest.mark.parametrize("name", ["stream", "loader"])
def test_other_data_is_converted_as_it_is_read(problem, tmp_path, name):
    for folder, target in (("a", "closure"), ("b", name)):
        result = run(f"{problem}:{target}", "--out", tmp_path / folder, "--dtype", "float64", *SMALL)
        assert result.exit_code == 0, result.output
    one, other = (load_report(tmp_path / folder).eigenpairs.eigenvalues for folder in "ab")
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_single_batch_and_dtypes(problem, tmp_path, dtype):
    result = run(f"{problem}:single_batch", "--out", tmp_path, "--dtype", dtype, "--tol", 0.1, *SMALL)
    assert result.exit_code == 0, result.output
    assert load_report(tmp_path).settings["dtype"] == ("float64" if dtype == "float64" else "float32")


def test_which_and_k_of_one_draws_a_line(problem, tmp_path):
    options = ["--k", 1, "--probes", 2, "--steps", 3, "--surface-points", 3, "--no-figures"]
    for which, value in (("LM", 3), ("LA", 3), ("SA", -2)):
        result = run(f"{problem}:quadratic", "--out", tmp_path, "--which", which, *options)
        assert result.exit_code == 0, result.output
        report = load_report(tmp_path)
        assert report.eigenpairs.eigenvalues.tolist() == pytest.approx([value])
        assert report.surface.losses.shape == (3,)
        torch.testing.assert_close(float(report.surface.losses[0]), value / 8)


def test_mode_of_the_model_is_remarked_on(problem, tmp_path):
    with torch.random.fork_rng():
        loud = run(f"{problem}:noisy", "--out", tmp_path, "--tol", 10.0, *SMALL)
    assert "Note: dropout is active (2): every product differs; call model.eval() in your function." in loud.output
    assert "Note: BatchNorm is in train mode (1): the Hessian is that of the loss with batch statistics." in loud.output
    silent = run(f"{problem}:quiet", "--out", tmp_path, *SMALL)
    assert silent.exit_code == 0, silent.output
    assert "Note" not in silent.output


def test_file_can_import_from_its_own_folder_and_leaves_no_trace(problem, tmp_path):
    (problem.parent / "a_sibling_module.py").write_text(
        "import torch\ndef problem():\n    return lambda p: (p**2).sum(), torch.ones(3), ()\n"
    )
    before = list(sys.path)
    try:
        result = run(f"{problem}:uses_sibling", "--out", tmp_path / "o", *SMALL, "--steps", 2, "--k", 1)
        assert result.exit_code == 0, result.output
        assert sys.path == before
    finally:
        sys.modules.pop("a_sibling_module", None)


def test_unconverged_pairs_warn_in_one_line(problem, tmp_path, monkeypatch):
    import hessfunc._analyze as module

    exact = module.eigsh
    short = {"max_matvecs": 4, "verify_steps": 0}
    monkeypatch.setattr(module, "eigsh", lambda H, k, **options: exact(H, k, **short, **options))
    result = run(f"{problem}:module", "--out", tmp_path, "--reduction", "sum", "--tol", 1e-9, *SMALL)
    assert result.exit_code == 0, result.output
    assert "Warning: eigsh: " in result.stderr
    assert "the fields converged and residuals" in result.stderr
    assert "NO" in result.output
    assert not bool(load_report(tmp_path).eigenpairs.converged.all())


ERRORS = [
    ("{file}", "is not of the form FILE.py:FUNCTION, for example problem.py:problem"),
    ("{file}:", "is not of the form FILE.py:FUNCTION"),
    (":module", "is not of the form FILE.py:FUNCTION"),
    ("{file}:not a name", "is not of the form FILE.py:FUNCTION"),
    ("{folder}/none.py:module", "there is no file '{folder}/none.py'; the working directory is "),
    ("{folder}:module", "there is no file '{folder}'"),
    ("{folder}/notes.txt:module", "is not a Python file: its name has to end in .py"),
    ("{folder}/broken.py:module", "SyntaxError"),
    ("{folder}/raises.py:module", "ModuleNotFoundError: No module named 'surely_not_there'"),
    ("{file}:nowhere", "has no function 'nowhere'; it defines data, module, closure"),
    ("{file}:nothing", "has no function 'nothing'; it defines"),
    ("{folder}/empty.py:f", "has no function 'f'; it defines no function"),
    ("{file}:needs", "needs in '{file}' has required arguments (argument); it is called as needs()"),
    ("{file}:fails", "fails() in '{file}' failed:"),
    ("{file}:two", "returned a tuple of 2, expected (model, criterion, data) or (loss, params, data)"),
    ("{file}:a_list", "returned a list, expected (model, criterion, data)"),
    ("{file}:not_callable", "returned a int first, expected an nn.Module or a loss function"),
    ("{file}:no_criterion", "returned a model and a int; after a model it has to return a criterion"),
    ("{file}:no_data", "data is empty"),
    ("{file}:exhausted", "data is a list_iterator, which is exhausted after one pass"),
    ("{file}:integers", "params has dtype torch.int64"),
    ("{file}:nan", "the loss of batch 0 is NaN or infinite"),
    ("{file}:shapes", "line "),
]


@pytest.mark.parametrize(("target", "text"), ERRORS)
def test_errors_say_what_is_wrong_and_write_nothing(problem, tmp_path, target, text):
    (problem.parent / "notes.txt").write_text("")
    (problem.parent / "broken.py").write_text("def f(:\n")
    (problem.parent / "raises.py").write_text("import surely_not_there\n")
    (problem.parent / "empty.py").write_text("")
    names = {"file": str(problem), "folder": str(problem.parent)}
    result = run(target.format(**names), "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text.format(**names) in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_errors_inside_the_users_code_name_the_line(problem, tmp_path):
    result = run(f"{problem}:fails", "--out", tmp_path / "o")
    number = PROBLEM.splitlines().index('    raise KeyError("no such thing")') + 1
    assert f"line {number}, in fails" in result.stderr
    assert "KeyError: 'no such thing'" in result.stderr
    assert "_problem.py" not in result.stderr
    result = run(f"{problem}:shapes", "--out", tmp_path / "o")
    number = PROBLEM.splitlines().index('        return (x @ params["w"]).sum()') + 1
    assert f"({problem}, line {number})" in result.stderr


def test_debug_shows_the_traceback(problem, tmp_path):
    result = run(f"{problem}:shapes", "--out", tmp_path / "o", "--debug")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--k", "0"], "--k"),
        (["--which", "XX"], "--which"),
        (["--probes", "1"], "--probes"),
        (["--steps", "0"], "--steps"),
        (["--density-probes", "0"], "--density-probes"),
        (["--surface-points", "2"], "--surface-points"),
        (["--dtype", "int8"], "--dtype"),
        (["--reduction", "none"], "--reduction"),
        (["--seed", "-1"], "--seed"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_options_out_of_range_are_usage_errors(problem, tmp_path, options, text):
    result = run(f"{problem}:closure", "--out", tmp_path, *options)
    assert result.exit_code == 2
    assert text in result.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--k", "1000"], "k=1000 is out of range; expected 1 <= k <= 16"),
        (["--steps", "1000"], "num_steps=1000 is out of range; expected 1 <= num_steps <= 16"),
        (["--tol", "0"], "tol=0.0 is out of range"),
        (["--surface", "--surface-span", "-1"], "surface_span=-1.0 is out of range"),
        (["--device", "nonsense"], "--device nonsense: torch cannot use it here"),
    ],
)
def test_options_that_do_not_fit_the_problem(problem, tmp_path, options, text):
    result = run(f"{problem}:closure", "--out", tmp_path / "o", *SMALL, *options)
    assert result.exit_code == 1
    assert f"Error: {text}" in result.stderr


def test_output_folder_that_cannot_be_written_fails_before_any_work(problem, tmp_path):
    (tmp_path / "file").write_text("")
    (problem.parent / "marks.py").write_text("raise SystemExit('was run')\n")
    result = run(f"{problem.parent / 'marks.py'}:f", "--out", tmp_path / "file" / "sub")
    assert result.exit_code == 1
    assert "Error: cannot write a report to " in result.stderr
    assert "Not a directory" in result.stderr


def test_foreign_report_in_the_folder_stops_the_run(problem, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    result = run(f"{problem}:closure", "--out", tmp_path)
    assert result.exit_code == 1
    assert "was not written by hessfunc" in result.stderr
    assert "choose another folder" in result.stderr
    assert (tmp_path / "report.json").read_text() == "{}"


def test_help_and_missing_arguments():
    runner = CliRunner()
    overview = runner.invoke(app, ["--help"])
    assert overview.exit_code == 0
    assert "demo" in overview.output
    assert "analyze" in overview.output
    assert runner.invoke(app, ["demo"]).exit_code == 2
    assert runner.invoke(app, ["analyze", "x.py:f"]).exit_code == 2


def test_missing_extras_are_named_and_exit_with_1(monkeypatch, capsys):
    found = entry.importlib.util.find_spec
    monkeypatch.setattr(
        entry.importlib.util, "find_spec", lambda name: None if name in ("typer", "sklearn") else found(name)
    )
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 1
    expected = "hessfunc: the command line needs scikit-learn, typer; run: pip install 'hessfunc[cli]'\n"
    assert capsys.readouterr().err == expected


def test_package_and_entry_import_without_the_extras():
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'rich', 'sklearn', 'tqdm', 'typer', 'click'): sys.modules[name] = None\n"
        "import hessfunc, hessfunc.__main__, hessfunc.plot, hessfunc.report, hessfunc.surface, hessfunc._analyze\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_python_dash_m(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hessfunc", "analyze", "none.py:f", "--out", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "hessfunc.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("hessfunc", run_name="__main__")
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("Error: there is no file 'none.py'; the working directory is ")


def test_seeded_generator_is_all_that_matters(problem, tmp_path):
    one, two, other = (tmp_path / name for name in "abc")
    for out, seed in ((one, 3), (two, 3), (other, 4)):
        result = run(f"{problem}:closure", "--out", out, "--seed", seed, *SMALL)
        assert result.exit_code == 0, result.output
    samples = [load_report(out).trace.samples for out in (one, two, other)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert seeded(3).initial_seed() == load_report(one).settings["seed"]
