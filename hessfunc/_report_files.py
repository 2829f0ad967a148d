"""A report as files: one JSON document and NumPy archives, read back without pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

DOCUMENT = "report.json"
FORMAT = "hessfunc report"
VERSION = 1

Arrays: TypeAlias = Mapping[str, np.ndarray]


def write(folder: str | os.PathLike[str], document: Mapping[str, Any], archives: Mapping[str, Arrays]) -> Path:
    """Write ``document`` as report.json and each of ``archives`` as an ``.npz`` file; return the folder.

    Every file is complete or absent: it is written beside its place and moved there, report.json last. Archives of
    an earlier report that this one does not have are removed, other files left alone.

    Raises:
        ValueError: the folder holds a report.json that is not ours.
        OSError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stale = set(_listed(folder)) - set(archives)
        files = {}
        for name, arrays in archives.items():
            path = _replace(folder / name, lambda stream, arrays=arrays: np.savez(stream, **arrays))  # type: ignore[misc]
            files[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        whole = {"format": FORMAT, "format_version": VERSION, **document, "files": files}
        text = json.dumps(plain(whole), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        _replace(folder / DOCUMENT, lambda stream: stream.write(text.encode()))
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"cannot write a report to {str(folder)!r}: {error.strerror or error}") from error
    return folder


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The document and the archives that [`write`][] wrote, each checked against its checksum.

    Raises:
        FileNotFoundError: no report.json, or a file that it lists is missing.
        ValueError: a file is damaged, truncated, or not ours.
    """
    folder = Path(folder)
    document = _document(folder)
    return document, {name: _archive(folder / name, entry) for name, entry in document["files"].items()}


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise now what [`write`][] would raise later: the folder cannot be written to, or holds a foreign report.json."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write a report to {str(folder)!r}: {error.strerror or error}") from error
    _listed(folder)


def plain(value: Any) -> Any:
    """``value`` with what JSON has no literal for (NaN, infinities) replaced by ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _listed(folder: Path) -> list[str]:
    """Archives of the report that is in the folder already."""
    if not (folder / DOCUMENT).exists():
        return []
    try:
        return [name for name in _document(folder)["files"] if (folder / name).is_file()]
    except ValueError as error:
        raise ValueError(f"{error} It will not be overwritten: choose another folder, or move it away.") from None


def _document(folder: Path) -> dict[str, Any]:
    path = folder / DOCUMENT
    if not path.is_file():
        raise FileNotFoundError(f"no {DOCUMENT} in {str(folder)!r}; pass a folder that Report.save has written.")
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged or truncated, not valid JSON: {error}.") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} was not written by hessfunc: its format is not {FORMAT!r}.")
    if document.get("format_version") != VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {document.get('format_version')!r}, this hessfunc reads {VERSION}; read "
            f"it with the hessfunc that wrote it: {document.get('versions', {}).get('hessfunc', 'unknown')}."
        )
    files = document.get("files")
    # Names only: an edited document must not lead out of the folder.
    if not isinstance(files, dict) or any(Path(name).name != name or not name.endswith(".npz") for name in files):
        raise ValueError(f"{str(path)!r} is damaged: its entry 'files' does not list .npz files of the folder.")
    return document


def _archive(path: Path, entry: Any) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing, though {DOCUMENT} lists it; copy the whole folder.")
    if not isinstance(entry, dict) or _digest(path) != entry.get("sha256"):
        raise ValueError(
            f"{str(path)!r} is damaged, truncated, or from another run: its checksum is not the one in {DOCUMENT}."
        )
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is not an archive of plain arrays: {error}") from error


def _replace(path: Path, fill: Callable[[Any], Any]) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            fill(stream)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
