"""A user's file as rows of text: any delimited text, or JSON lines.

Whatever is wrong is one `DataError` that names the place and the way out.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from agentgym.errors import DataError

DELIMITERS = (",", ";", "\t", "|", "#", "~", "^")
_NAMES = {"\t": "'\\t' (tab)"}
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".psv", ".dat")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_FIELD_LIMIT = 1 << 24


class Table(NamedTuple):
    """Header, rows of equal length, and how many rows were dropped by reason."""

    header: list[str]
    rows: list[list[str]]
    dropped: dict[str, int]


def table(path: Path, delimiter: str, encoding: str, quote: str) -> Table:
    """Read the file by its suffix or, without one, by its first character."""
    text = _text(path, encoding)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if path.suffix.lower() in JSON_SUFFIXES or (not delimiter and text.lstrip()[:2] in ('{"', "[{")):
        return _json(path, text)
    return _delimited(path, text, delimiter, quote)


def _text(path: Path, encoding: str) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        found = path.parent.glob("*") if path.parent.is_dir() else ()
        near = sorted(p.name for p in found if p.suffix.lower() in (*JSON_SUFFIXES, *TEXT_SUFFIXES))[:5]
        there = f"; {path.parent} holds: {', '.join(near)}" if near else f"; {path.parent} holds no such files"
        raise DataError(f"no catalogue file {str(path)!r}{there}") from None
    except OSError as error:
        raise DataError(f"the catalogue {str(path)!r} cannot be read: {error.strerror}") from None
    try:
        return data.decode(encoding or _guess(data))
    except LookupError:
        raise DataError(f"no encoding {encoding!r}; common ones are utf-8, latin-1, cp1252, utf-16") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: byte {data[error.start]:#04x} in line {line} is not {error.encoding}; "
            "name the encoding, e.g. encoding='latin-1' or 'cp1252'"
        ) from None


def _guess(data: bytes) -> str:
    return "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


# --- delimited text ---------------------------------------------------------------------------------------------


def _delimited(path: Path, text: str, delimiter: str, quote: str) -> Table:
    """With quoting, and where a stray quote mark swallows rows, without: whichever keeps more rows."""
    first = text.lstrip("\r\n").splitlines()[0]
    mark = {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter) or _sniff(path, first)
    if len(mark) != 1:
        raise DataError(f"{path}: a delimiter is one character, not {delimiter!r}")
    if mark not in first:
        raise DataError(f"{path}: only one column found with the delimiter {_name(mark)}; {_advice(first)}")
    quoted = _rows(text, mark, quote)
    if not quote or not (quoted.dropped or _swallowed(quoted, mark)):
        return quoted
    return max(quoted, _rows(text, mark, ""), key=lambda t: len(t.rows))


def _swallowed(found: Table, mark: str) -> bool:
    """Whether some cell holds what looks like whole rows: a stray quote mark opened it."""
    inner = (line for row in found.rows for cell in row if "\n" in cell for line in cell.split("\n")[1:-1])
    return any(line.count(mark) >= len(found.header) - 1 for line in inner)


def _rows(text: str, mark: str, quote: str) -> Table:
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    lines = io.StringIO(text, newline="")
    if quote:
        reader = csv.reader(lines, delimiter=mark, quotechar=quote)
    else:
        reader = csv.reader(lines, delimiter=mark, quoting=csv.QUOTE_NONE)
    header: list[str] = []
    rows: list[list[str]] = []
    dropped: dict[str, int] = {}
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
            elif len(cells) == len(header):
                rows.append([cell.strip() for cell in cells])
            else:
                dropped["wrong number of fields"] = dropped.get("wrong number of fields", 0) + 1
    except csv.Error:
        dropped["unreadable"] = dropped.get("unreadable", 0) + 1
    return Table(header, rows, dropped)


def _sniff(path: Path, first: str) -> str:
    """The mark that splits the header into most columns."""
    best = max(DELIMITERS, key=first.count)
    if not first.count(best):
        raise DataError(f"{path}: only one column found in the header {first[:60]!r}; name the delimiter")
    return best


def _advice(first: str) -> str:
    best = max(DELIMITERS, key=first.count)
    if first.count(best):
        return f"{_name(best)} would give {first.count(best) + 1}: delimiter={best!r}"
    return f"the header reads {first[:60]!r}"


def _name(mark: str) -> str:
    return _NAMES.get(mark, repr(mark))


# --- JSON lines -------------------------------------------------------------------------------------------------


def _json(path: Path, text: str) -> Table:
    """One object a line, or one array of objects; nested objects become columns with dotted names."""
    objects, dropped = _objects(path, text)
    flat = [_flat(o) for o in objects]
    header = list(dict.fromkeys(name for row in flat for name in row))
    return Table(header, [[row.get(name, "") for name in header] for row in flat], dropped)


def _objects(path: Path, text: str) -> tuple[list[dict[str, Any]], dict[str, int]]:
    if text.lstrip().startswith("["):
        try:
            found: Any = msgspec.json.decode(text.strip())
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{path}: no JSON array: {error}") from None
        lines = list(found)
    else:
        lines = [_line(line) for line in text.splitlines() if line.strip()]
    objects = [line for line in lines if isinstance(line, dict)]
    if not objects:
        raise DataError(f"{path}: no line holds a JSON object; for delimited text give the file another suffix")
    lost = len(lines) - len(objects)
    return objects, {"no JSON object": lost} if lost else {}


def _line(line: str) -> Any:
    try:
        return msgspec.json.decode(line)
    except (ValueError, RecursionError):
        return None


def _flat(value: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Dotted names. A list gives its scalars joined by " | ", a list of objects its first one."""
    found: dict[str, str] = {}
    for name, inner in value.items():
        full = f"{prefix}{name}"
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            inner = inner[0]
        if isinstance(inner, dict) and depth < 4:
            found |= _flat(inner, f"{full}.", depth + 1)
        elif isinstance(inner, list):
            found[full] = " | ".join(_scalar(x) for x in inner)
        else:
            found[full] = _scalar(inner)
    return found


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, dict | list):
        return ""
    return ("yes" if value else "no") if isinstance(value, bool) else str(value).strip()
