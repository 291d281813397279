"""The cohort: its CSV (path, label 0 or 1, optional subject), checks on its scans, its volumes."""

import csv
import hashlib
import io
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from loading import image
from loading.cache import Volumes
from run_folder import files
from run_folder.processes import from_first
from utils import InputError, log, progress, some_of

LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}  # spreadsheets and pandas write 1.0 for 1
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # the last two as spreadsheets write
IMAGE_SUFFIXES = (".nii", ".hdr", ".img", ".mgz", ".mgh", ".mnc", ".head", ".brik", ".par", ".rec")
BIDS_SUBJECT = r"(?:^|[/\\_])(sub-[A-Za-z0-9]+)"  # the first in a path
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MAX_TEXT_SHOWN = 100  # letters of a cell in a message
MAX_PROBLEMS_SHOWN = 20
N_CHECK_THREADS = 8


@dataclass(frozen=True)
class Cohort:
    """A checked cohort."""

    table: pd.DataFrame  # one row a scan: path (as the CSV has it), label, and subject if given
    scans: list[str]  # their files, absolute
    volume_shape: tuple[int, int, int]  # of every scan, in voxels
    like_img: SpatialImage  # the first scan, unread: its header says where the cohort lies

    @property
    def labels(self) -> np.ndarray:
        """Label of each scan, int64."""
        return self.table["label"].to_numpy()

    def volumes(self, folder: Path | None, n_workers: int) -> Volumes:
        """Return the scaled volumes, kept in a folder once decoded (None: decoded every time)."""
        return Volumes(self.scans, self.labels, self.volume_shape, folder, n_workers)

    def facts(self, csv_path: Path) -> dict:
        """Return what a run's record says of the cohort: scans count by size, whenever copied."""
        try:
            sizes = "\n".join(str(Path(scan).stat().st_size) for scan in self.scans)
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be read any more: {error.strerror}"
            ) from None
        return {
            "csv_sha256": files.sha256(csv_path),
            "scan_sizes_sha256": hashlib.sha256(sizes.encode()).hexdigest(),
            "n_scans": len(self.scans),
            "volume_shape": list(self.volume_shape),
            "affine": self.like_img.affine.tolist(),
        }


def read_text(csv_path: Path) -> str:
    """Return the CSV's text, which must be UTF-8."""
    refusal = f"{csv_path} cannot be read as a CSV file"
    try:
        content = csv_path.read_bytes()
        if content.startswith(UTF16_MARKS) or b"\0" in content:
            raise InputError(f"{refusal}: it is UTF-16 or no text; save it as CSV UTF-8")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{refusal}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b"?").splitlines())
        raise InputError(f"{refusal}: row {line} is not UTF-8; save it as CSV UTF-8") from None


def read_rows(csv_path: Path) -> list[tuple[int, list[str]]]:
    """Return the CSV's rows as (line, cells), split where that finds the most labels."""
    text = read_text(csv_path)
    rows_by = {}
    for separator in SEPARATORS:
        lines = io.StringIO(text, newline="")
        reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            raise InputError(f"{csv_path} cannot be read as a CSV file: {error}") from None
        rows_by[separator] = [(line, cells) for line, cells in rows if any(cells)]
    separator = max(rows_by, key=lambda key: sum(has_label(cells) for _, cells in rows_by[key]))
    if separator != ",":
        log.info("columns are separated by a %s", SEPARATORS[separator])
    rows = rows_by[separator]
    if rows and is_header(rows[0][1], csv_path):
        del rows[0]
    if not rows:
        raise InputError(f"{csv_path} lists no scan")
    return rows


def has_label(cells: list[str]) -> bool:
    """Tell whether column 2 holds a label."""
    return len(cells) > 1 and cells[1] in LABELS


def is_header(cells: list[str], csv_path: Path) -> bool:
    """Tell whether the first row names columns instead of a scan."""
    names_image = re.sub(r"\.(gz|bz2)$", "", cells[0].lower()).endswith(IMAGE_SUFFIXES)
    return not (has_label(cells) or names_image or find_file(cells[0], csv_path))


def find_file(text: str, csv_path: Path) -> Path | None:
    """Look a path up from the CSV's folder, then from here, however its letters are composed."""
    spellings = dict.fromkeys([text, *(unicodedata.normalize(f, text) for f in ("NFC", "NFD"))])
    try:
        for path in (Path(spelling).expanduser() for spelling in spellings):
            for candidate in (csv_path.parent / path, path):
                if candidate.is_file():
                    return candidate.resolve()
    except (OSError, RuntimeError):  # a name too long, a folder not ours, an unknown ~user
        return None
    return None


def scan_key(file: Path) -> str:
    """Return what two spellings of one scan have in common: x.hdr and x.img are one."""
    return re.sub(r"\.img(\.gz|\.bz2)?$", r".hdr\1", str(file), flags=re.IGNORECASE)


def shown(text: str) -> str:
    """Return a cell as messages quote it: escaped, and not endless."""
    return repr(text if len(text) <= MAX_TEXT_SHOWN else text[:MAX_TEXT_SHOWN] + "…")


def parse_rows(rows: list[tuple[int, list[str]]], csv_path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the scans that the rows name, with their file and line, and the problems found."""
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
        scans.append((cells[0], label, subject, str(file), line))
    table = pd.DataFrame(scans, columns=["path", "label", "subject", "file", "line"])
    return table if has_subjects else table.drop(columns="subject"), problems


def check_scans(table: pd.DataFrame) -> tuple[str, list[str]]:
    """Check that all scans are good and in one space; return the first in the space of most scans.

    Of the scans the headers are read, the last bytes, and voxels until two of them differ, so that
    hundreds of scans are checked in seconds.
    """

    def check(row: tuple) -> tuple[tuple, SpatialImage | None, str]:
        try:
            return row, image.open_scan(row.file), ""
        except InputError as error:
            return row, None, f"row {row.line}: {str(error).replace(row.file, row.path, 1)}"

    with ThreadPoolExecutor(N_CHECK_THREADS) as pool:
        checks = pool.map(check, table.itertuples())
        checked = list(progress(checks, "checking", total=len(table), unit="scan"))
    problems = [problem for *_, problem in checked if problem]
    good = [(row, img) for row, img, _ in checked if img]
    if not good:
        return "", problems
    spaces: list[list] = []  # images in one space, the first of them decides
    for row, img in good:
        same = (space for space in spaces if image.same_space(img, space[0][1]))
        if (space := next(same, None)) is None:
            spaces.append(space := [])
        space.append((row, img))
    spaces.sort(key=len, reverse=True)
    like_img = spaces[0][0][1]
    name, shape, affine = like_img.get_filename(), image.volume_shape(like_img), like_img.affine
    for row, img in sorted((each for space in spaces[1:] for each in space), key=itemgetter(0)):
        where = f"row {row.line}: {row.path} has"
        if image.volume_shape(img) != shape:
            problems.append(f"{where} shape {img.shape}, the other scans {shape}")
        else:
            problems.append(f"{where} another affine than {name}:\n{img.affine}\nnot\n{affine}")
    if not all(image.states_orientation(img) for _, img in good):
        image.warn_of_orientation("a scan")
    return name, problems


def read_cohort(csv_path: Path, no_subjects: bool = False) -> Cohort:
    """Read the CSV and check every scan; an InputError has all problems found, with their rows."""
    table, like_file = from_first(lambda: _check_cohort(csv_path, no_subjects))
    like_img = nib.load(like_file)
    columns = table.drop(columns="file")
    return Cohort(columns, table["file"].tolist(), image.volume_shape(like_img), like_img)


def _check_cohort(csv_path: Path, no_subjects: bool) -> tuple[pd.DataFrame, str]:
    """Return the cohort's table and the file of its first scan, or raise what is wrong."""
    table, problems = parse_rows(read_rows(csv_path), csv_path)
    like_file, scan_problems = check_scans(table)
    problems += scan_problems
    if problems:
        listed = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(listed):
            listed.append(f"… and {len(problems) - len(listed)} more problems")
        raise InputError(f"{csv_path}:\n  " + "\n  ".join(listed))
    table = table.drop(columns="line").astype({"label": "int64"})
    source = "column 3 is the subject"
    if "subject" not in table and not no_subjects:
        subjects = table["path"].str.extract(BIDS_SUBJECT, expand=False)
        if subjects.notna().all() and subjects.duplicated().any():
            table["subject"] = subjects
            source = "sub-… in the paths is the subject (--no-subjects turns this off)"
    if "subject" in table:
        n_labels = table.groupby("subject")["label"].nunique()
        log.info("%s: %d subjects, %d scans", source, len(n_labels), len(table))
        mixed = n_labels.index[n_labels > 1]
        if len(mixed):
            log.warning("%d subjects have scans of both labels: %s", len(mixed), some_of(mixed))
    return table, like_file
