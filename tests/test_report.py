"""The record of an analysis: table, files, errors about files."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from example_reports import SHAPES, example_report

from hessfunc import tree
from hessfunc.report import Report, load_report


def assert_equal(loaded, report, *, with_vectors=False):
    """Every field of two reports, bit by bit."""
    for name in ("eigenvalues", "residuals", "converged"):
        assert torch.equal(getattr(loaded.eigenpairs, name), getattr(report.eigenpairs, name)), name
    assert loaded.eigenpairs.num_matvecs == report.eigenpairs.num_matvecs
    if with_vectors:
        for name, leaf in report.eigenpairs.eigenvectors.items():
            assert torch.equal(loaded.eigenpairs.eigenvectors[name], leaf), name
    else:
        assert loaded.eigenpairs.eigenvectors == {}
    for name in ("value", "stderr", "samples", "leaf_samples"):
        assert torch.equal(getattr(loaded.trace, name), getattr(report.trace, name)), name
    assert loaded.trace.num_matvecs == report.trace.num_matvecs
    assert loaded.trace.leaf_names == report.trace.leaf_names
    for field in dataclasses.fields(report.quadrature):
        one, other = getattr(loaded.quadrature, field.name), getattr(report.quadrature, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    if report.surface is None:
        assert loaded.surface is None
    else:
        assert torch.equal(loaded.surface.losses, report.surface.losses)
        assert len(loaded.surface.coordinates) == len(report.surface.coordinates)
        for one, other in zip(loaded.surface.coordinates, report.surface.coordinates, strict=True):
            assert torch.equal(one, other)
        expected = report.surface.directions if with_vectors else {}
        assert loaded.surface.directions.keys() == expected.keys()
        for name, leaf in expected.items():
            assert torch.equal(loaded.surface.directions[name], leaf)
    for name in ("leaf_shapes", "settings", "versions", "num_matvecs", "seconds"):
        assert getattr(loaded, name) == getattr(report, name), name


def test_round_trip_keeps_the_errors_of_leaves(tmp_path):
    report = example_report(dimensions=0)
    count = len(report.leaf_shapes)
    errors = {"leaf_stderr": torch.linspace(1, 2, count).double(), "leaf_dof": torch.linspace(5, 9, count).double()}
    report = dataclasses.replace(report, trace=dataclasses.replace(report.trace, **errors))
    loaded = load_report(report.save(tmp_path / "report")).trace.per_leaf
    for name, part in report.trace.per_leaf.items():
        assert loaded[name].interval() == part.interval()
    assert [float(part.stderr) for part in loaded.values()] == errors["leaf_stderr"].tolist()


@pytest.mark.parametrize("eigenvectors", [False, True])
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_round_trip_keeps_every_field(tmp_path, dimensions, eigenvectors):
    report = example_report(dimensions=dimensions)
    folder = report.save(tmp_path / "a folder" / "with ümlaut λ", eigenvectors=eigenvectors)
    assert folder == tmp_path / "a folder" / "with ümlaut λ"
    expected = {"report.json", "arrays.npz", *(["eigenvectors.npz"] if eigenvectors else [])}
    assert {path.name for path in folder.iterdir()} == expected
    assert_equal(load_report(str(folder)), report, with_vectors=eigenvectors)


def test_loaded_report_saves_the_same_again(tmp_path):
    report = example_report()
    first = report.save(tmp_path / "one", eigenvectors=True)
    second = load_report(first).save(tmp_path / "two", eigenvectors=True)
    documents = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for document in documents:
        del document["files"]  # zip archives carry the time
    assert documents[0] == documents[1]
    assert_equal(load_report(second), report, with_vectors=True)


def test_bfloat16_eigenvectors_are_saved_as_float32(tmp_path):
    report = example_report(dtype=torch.bfloat16)
    loaded = load_report(report.save(tmp_path, eigenvectors=True))
    for name, leaf in loaded.eigenpairs.eigenvectors.items():
        assert leaf.dtype == torch.float32
        assert torch.equal(leaf, report.eigenpairs.eigenvectors[name].float())


def test_nested_parameters_save_under_dotted_names(tmp_path):
    report = example_report({"0.w": (2,), "0.b": ()})
    nested = [{"w": torch.ones(3, 2), "b": torch.zeros(3)}]
    report = dataclasses.replace(report, eigenpairs=dataclasses.replace(report.eigenpairs, eigenvectors=nested))
    loaded = load_report(report.save(tmp_path, eigenvectors=True))
    assert loaded.eigenpairs.eigenvectors["0.w"].tolist() == [[1.0, 1.0]] * 3
    assert tree.names(loaded.eigenpairs.eigenvectors) == ["0.w", "0.b"]


def test_document_states_every_figure(tmp_path):
    report = example_report()
    document = json.loads((report.save(tmp_path) / "report.json").read_text(encoding="utf-8"))
    assert document["format"] == "hessfunc report"
    assert document["format_version"] == 1
    assert document["size"] == report.size == 36 + 4 + 12 + 1
    assert document["eigenpairs"] == {
        "eigenvalues": report.eigenpairs.eigenvalues.tolist(),
        "residuals": report.eigenpairs.residuals.tolist(),
        "converged": [True, True, False],
        "num_matvecs": 41,
    }
    assert document["trace"] == {
        "value": float(report.trace.value),
        "stderr": float(report.trace.stderr),
        "interval_95": list(report.trace.interval(0.95)),
        "num_samples": 6,
        "dof": None,
        "num_matvecs": 6,
    }
    density = report.quadrature.density()
    negative = report.quadrature.negative_fraction()
    assert document["density"] == {
        "num_probes": 4,
        "num_steps": 5,
        "num_exact": 1,
        "num_rules": 1,
        "num_matvecs": 20,
        "sigma": density.sigma,
        "negative_fraction": float(negative),
        "negative_fraction_stderr": float(negative.stderr),
        "wasserstein_bound_95": report.quadrature.error_bound().distance,
    }
    assert document["surface"] == {"span": [1.0, 2.0], "num_points": [7, 5], "lowest": 0.5}
    for entry, (name, shape) in zip(document["leaves"], SHAPES.items(), strict=True):
        share = report.trace.per_leaf[name]
        assert entry == {
            "name": name,
            "shape": list(shape),
            "trace": float(share),
            "stderr": float(share.stderr),
            "trace_per_parameter": float(share) / math.prod(shape),
        }
    assert document["settings"]["problem"] == "λ ±"
    assert document["versions"] == report.versions
    assert document["num_matvecs"] == report.num_matvecs
    assert document["seconds"] == report.seconds
    archive = tmp_path / "arrays.npz"
    assert document["files"] == {
        "arrays.npz": {
            "bytes": archive.stat().st_size,
            "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        }
    }
    with np.load(archive, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["density_grid"], density.grid)
        np.testing.assert_array_equal(arrays["density"], density.values)
        np.testing.assert_array_equal(arrays["density_stderr"], density.stderr)


def test_document_holds_no_literal_that_json_lacks(tmp_path):
    report = example_report()
    losses = report.surface.losses.clone()
    losses[0, 0], losses[0, 1] = math.inf, math.nan
    report = dataclasses.replace(
        report,
        trace=dataclasses.replace(report.trace, stderr=torch.tensor(math.inf, dtype=torch.float64)),
        surface=dataclasses.replace(report.surface, losses=losses),
        settings={**report.settings, "tol": math.nan},
    )
    text = (report.save(tmp_path) / "report.json").read_text()

    def forbidden(name):
        raise AssertionError(f"{name} is no JSON")

    document = json.loads(text, parse_constant=forbidden)
    assert document["trace"]["stderr"] is None
    assert document["trace"]["interval_95"] == [None, None]
    assert document["surface"]["lowest"] is None
    assert document["settings"]["tol"] is None
    loaded = load_report(tmp_path)
    assert float(loaded.trace.stderr) == math.inf
    assert math.isnan(loaded.surface.losses[0, 1])


def test_saving_again_replaces_its_own_files_and_no_others(tmp_path):
    report = example_report()
    (tmp_path / "notes.txt").write_text("mine")
    report.save(tmp_path, eigenvectors=True)
    other = dataclasses.replace(report, settings={**report.settings, "k": 4})
    other.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "arrays.npz", "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert load_report(tmp_path).settings["k"] == 4


def test_a_foreign_report_is_not_overwritten(tmp_path):
    path = tmp_path / "report.json"
    for content in ('{"format": "other"}', "[1, 2]", "no json"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"will not be overwritten: choose another folder"):
            example_report().save(tmp_path)
        assert path.read_text() == content
        assert list(tmp_path.iterdir()) == [path]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write a report to '.*file/sub': Not a directory"):
        example_report().save(tmp_path / "file" / "sub")


@pytest.mark.parametrize("method", ["mkdir", "open"])
def test_read_only_folder(tmp_path, monkeypatch, method):
    """As for a user without rights: root, who may run the tests, can write anywhere."""

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, method, denied)
    with pytest.raises(OSError, match=r"cannot write a report to '.*with spaces': Permission denied"):
        example_report().save(tmp_path / "with spaces")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.*"))


def test_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    report = example_report()
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"cannot write a report to '.*': No space left on device"):
        report.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_eigenvectors_that_were_not_saved_cannot_be_saved(tmp_path):
    loaded = load_report(example_report().save(tmp_path / "one"))
    with pytest.raises(ValueError, match="eigenvectors=True, but this report was loaded from a folder without"):
        loaded.save(tmp_path / "two", eigenvectors=True)


# Damaged, truncated and foreign files


@pytest.fixture
def saved(tmp_path):
    return example_report().save(tmp_path / "report", eigenvectors=True)


def edit(folder, change):
    document = json.loads((folder / "report.json").read_text())
    change(document)
    (folder / "report.json").write_text(json.dumps(document))


def relist(folder, name):
    """Write a file's checksum into the document, as one who edits both would."""
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    edit(folder, lambda document: document["files"].update({name: {"bytes": 0, "sha256": digest}}))


def test_missing_folder_and_missing_files(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match=r"no report.json in '.*nowhere'; pass a folder that Report.save"):
        load_report(tmp_path / "nowhere")
    (saved / "eigenvectors.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"eigenvectors.npz' is missing, though report.json lists it"):
        load_report(saved)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_document(saved, keep):
    content = (saved / "report.json").read_bytes()
    (saved / "report.json").write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"report.json' is damaged or truncated, not valid JSON"):
        load_report(saved)


def test_binary_and_deeply_nested_documents(saved):
    for content in (b"\xff\xfe\x00binary", b"[" * 100_000):
        (saved / "report.json").write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or truncated, not valid JSON"):
            load_report(saved)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"format": "something else", "files": {}}'])
def test_foreign_document(saved, content):
    (saved / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report.json' was not written by hessfunc: its format is not"):
        load_report(saved)


def test_version_of_the_future(saved):
    edit(saved, lambda document: document.update(format_version=2))
    with pytest.raises(ValueError, match=r"has format_version 2, this hessfunc reads 1; .* wrote it: 0.1.0"):
        load_report(saved)


@pytest.mark.parametrize("files", [None, [], {"../other.npz": {}}, {"/etc/passwd": {}}, {"arrays.txt": {}}])
def test_file_list_cannot_lead_out_of_the_folder(saved, files):
    edit(saved, lambda document: document.update(files=files))
    with pytest.raises(ValueError, match=r"its entry 'files' does not list .npz files of the folder"):
        load_report(saved)


@pytest.mark.parametrize("name", ["arrays.npz", "eigenvectors.npz"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:0], lambda b: b[:200] + b"x" + b[201:]])
def test_damaged_archives(saved, name, damage):
    path = saved / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}' is damaged, truncated, or from another run: its checksum"):
        load_report(saved)


def test_archive_of_another_run(tmp_path, saved):
    other = example_report(dimensions=1).save(tmp_path / "other")
    shutil.copy(other / "arrays.npz", saved / "arrays.npz")
    with pytest.raises(ValueError, match="from another run"):
        load_report(saved)


def test_pickled_arrays_are_refused_even_with_the_right_checksum(saved):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("code of the file was run",))

    np.savez(saved / "arrays.npz", eigenvalues=np.array([Bomb()], dtype=object))
    relist(saved, "arrays.npz")
    with pytest.raises(ValueError, match=r"is not an archive of plain arrays: .*allow_pickle=False"):
        load_report(saved)


def test_archive_that_is_no_archive(saved):
    (saved / "arrays.npz").write_bytes(b"PK\x03\x04 but no more")
    relist(saved, "arrays.npz")
    with pytest.raises(ValueError, match="is not an archive of plain arrays"):
        load_report(saved)


@pytest.mark.parametrize("key", ["eigenvalues", "nodes", "surface_losses", "trace_leaf_samples"])
def test_missing_arrays(saved, key):
    with np.load(saved / "arrays.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name != key}
    np.savez(saved / "arrays.npz", **arrays)
    relist(saved, "arrays.npz")
    with pytest.raises(ValueError, match=rf"is damaged or incomplete: KeyError: '{key}'"):
        load_report(saved)


@pytest.mark.parametrize("key", ["size", "eigenpairs", "trace", "density", "surface", "leaves", "settings", "versions"])
def test_missing_entries(saved, key):
    edit(saved, lambda document: document.pop(key))
    with pytest.raises(ValueError, match=rf"is damaged or incomplete: KeyError: '{key}'"):
        load_report(saved)


def test_entries_of_the_wrong_kind(saved):
    edit(saved, lambda document: document.update(leaves=5))
    with pytest.raises(ValueError, match="is damaged or incomplete: TypeError"):
        load_report(saved)


# Text


def test_table_states_every_figure():
    report = example_report()
    text = report.table()
    assert text == str(report)
    assert "Hessian of 53 parameters in 4 tensors, float32 on cpu" in text
    assert "Eigenvalues (LM, relative tolerance 0.001)" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "30", "1.0e-04", "yes"] in lines
    assert ["2", "12.5", "2.0e-04", "yes"] in lines
    assert ["3", "-4", "5.0e-01", "NO"] in lines
    low, high = report.trace.interval(0.95)
    assert (
        f"Trace {float(report.trace):.5g} ± {float(report.trace.stderr):.2g}, "
        f"95 % interval {low:.4g} to {high:.4g}, 6 probes"
    ) in text
    assert str(report.quadrature) in text
    share = report.trace.per_leaf["conv.weight"]
    cells = [f"{float(share):.4g}", f"{float(share.stderr):.2g}", f"{float(share) / 36:.3g}"]
    assert ["conv.weight", "4", "x", "1", "x", "3", "x", "3", *cells] in lines
    share = report.trace.per_leaf["scale"]
    assert ["scale", "1", f"{float(share):.4g}", f"{float(share.stderr):.2g}", f"{float(share):.3g}"] in lines
    assert "Products: 67 in all; by stage eigenpairs 41 (1.2 s), trace 6 (0.5 s), density 20 (2.0 s), surface" in text


def test_sizes():
    report = example_report()
    assert isinstance(report, Report)
    assert report.leaf_sizes == {"conv.weight": 36, "conv.bias": 4, "head.weight": 12, "scale": 1}
    assert report.size == 53


def test_table_of_an_empty_leaf():
    table = example_report({"a": (2,), "empty": (0, 3)}).table()
    cells = next(line.split() for line in table.splitlines() if line.strip().startswith("empty"))
    assert cells[:4] == ["empty", "0", "x", "3"]
