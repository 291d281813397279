"""The cohort's CSV: its rows, the files that they name, and what is wrong with them."""

import csv
import io
import re
import unicodedata
from pathlib import Path

import pandas as pd

from errors import InputError
from utils import log

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # spreadsheets and pandas write 1.0 for 1
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # the last two as spreadsheets write
IMAGE_SUFFIXES = (
    ".nii", ".hdr", ".img", ".mgz", ".mgh", ".mnc", ".head", ".brik", ".par", ".rec",
)  # fmt: skip
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PAIRS = {"img": "hdr", "brik": "head", "rec": "par"}  # the suffix of voxels, that of their header
MAX_TEXT_SHOWN = 100  # letters of a cell in a message


def read_text(csv_path: Path) -> str:
    """Return the CSV's text, which must be UTF-8."""
    refusal = f"{csv_path} cannot be read as a CSV file"
    try:
        content = csv_path.read_bytes()
        if content.startswith(UTF16_MARKS) or b"\0" in content:
            raise InputError(f"{refusal}: it is UTF-16 or no text; save it as CSV UTF-8")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"there is no CSV file {csv_path}") from None
    except OSError as error:
        raise InputError(f"{refusal}: {error}") from None
    except UnicodeDecodeError as error:
        line = len(error.object[: error.start].splitlines() or [b""])
        raise InputError(
            f"{refusal}: row {line} has letters that are not UTF-8; save it as CSV UTF-8"
        ) from None


def split_rows(text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Return the rows that are not empty as (line number, cells)."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    return [(line, cells) for line, cells in rows if any(cells)]


def has_label(cells: list[str]) -> bool:
    """Tell whether column 2 holds a label."""
    return len(cells) > 1 and cells[1] in LABELS


def is_header(cells: list[str], csv_path: Path) -> bool:
    """Tell whether the first row names columns instead of a scan."""
    names_image = re.sub(r"\.(gz|bz2)$", "", cells[0].lower()).endswith(IMAGE_SUFFIXES)
    return not (has_label(cells) or names_image or find_file(cells[0], csv_path))


def read_rows(csv_path: Path) -> list[tuple[int, list[str]]]:
    """Return the CSV's rows as (line number, cells), without header row and empty lines.

    Of the separators the one is taken that finds the most labels in column 2.
    """
    text = read_text(csv_path)
    try:
        rows_by = {separator: split_rows(text, separator) for separator in SEPARATORS}
    except csv.Error as error:
        raise InputError(f"{csv_path} cannot be read as a CSV file: {error}") from None
    separator = max(rows_by, key=lambda key: sum(has_label(cells) for _, cells in rows_by[key]))
    if separator != ",":
        log.info("columns are separated by a %s", SEPARATORS[separator])
    rows = rows_by[separator]
    if rows and is_header(rows[0][1], csv_path):
        del rows[0]
    if not rows:
        raise InputError(f"{csv_path} lists no scan")
    return rows


def find_file(text: str, csv_path: Path) -> Path | None:
    """Look a path up from the CSV's folder, then from the working directory.

    Letters such as ü are found however file system and CSV compose them.
    """
    spellings = dict.fromkeys([text, *(unicodedata.normalize(f, text) for f in ("NFC", "NFD"))])
    try:
        for path in (Path(spelling).expanduser() for spelling in spellings):
            for candidate in (csv_path.parent / path, path):
                if candidate.is_file():
                    return candidate.resolve()
    except (OSError, RuntimeError):  # a name too long, a folder not ours, an unknown ~user
        return None
    return None


def scan_key(file: Path) -> tuple[str, ...]:
    """Return what two spellings of one scan have in common: x.hdr and x.img are one."""
    match = re.fullmatch(r"(.+)\.(hdr|img|head|brik|par|rec)(\.gz)?", str(file), re.IGNORECASE)
    if match is None:
        return (str(file),)
    stem, suffix, compression = match.groups()
    return stem, PAIRS.get(suffix.lower(), suffix.lower()), compression or ""


def shown(text: str) -> str:
    """Return a cell as messages quote it: escaped, and not endless."""
    return repr(text if len(text) <= MAX_TEXT_SHOWN else text[:MAX_TEXT_SHOWN] + "…")


def parse_rows(rows: list[tuple[int, list[str]]], csv_path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the scans that the rows name, with their line, and the problems found."""
    has_subjects = any(len(cells) > 2 and cells[2] for _, cells in rows)
    scans, problems, line_of_scan = [], [], {}
    for line, cells in rows:
        if len(cells) < 2:
            problems.append(
                f"row {line}: needs a path and a label separated by a comma, got {shown(cells[0])}"
            )
            continue
        label = LABELS.get(cells[1])
        if label is None:
            problems.append(f"row {line}: label must be 0 or 1, got {shown(cells[1])}")
        subject = cells[2] if has_subjects and len(cells) > 2 else ""
        if has_subjects and not subject:
            problems.append(f"row {line}: the subject is empty while other rows have one")
        file = find_file(cells[0], csv_path)
        if file is None:
            problems.append(f"row {line}: there is no file {shown(cells[0])}")
            continue
        first_line = line_of_scan.setdefault(scan_key(file), line)
        if first_line != line:
            problems.append(f"row {line}: {shown(cells[0])} is listed already, in row {first_line}")
            continue
        scans.append(
            {"path": cells[0], "file": str(file), "label": label, "subject": subject, "line": line}
        )
    columns = ["path", "file", "label", "subject", "line"]
    table = pd.DataFrame(scans, columns=columns)
    return table if has_subjects else table.drop(columns="subject"), problems
