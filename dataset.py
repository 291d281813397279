"""The cohort: its CSV (scan, label, optional subject), checks on its scans, its volumes."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from loading import image, table
from loading.cache import Volumes
from loading.table import Wanted, shown
from run_folder import files
from run_folder.processes import from_first
from utils import InputError, log, progress, some_of

BIDS_SUBJECT = r"(?:^|[/\\_])(sub-[A-Za-z0-9]+)"  # the first in a path
N_SHOWN = 3  # problems of one kind
NO_LABEL = -1
N_CHECK_THREADS = 8

Problems = defaultdict[str, list[str]]  # by kind


@dataclass(frozen=True)
class Cohort:
    """A checked cohort."""

    table: pd.DataFrame  # one row a scan: path (as the CSV has it), label, and subject if given
    scans: list[str]  # their files, absolute
    volume_shape: tuple[int, int, int]  # of every scan, in voxels
    like_img: SpatialImage  # the first scan, unread: its header says where the cohort lies
    covariates: pd.DataFrame | None = None  # a row a scan: numbers, or words

    @property
    def labels(self) -> np.ndarray:
        """Label of each scan, int64; −1 where there is none."""
        return self.table["label"].to_numpy()

    def volumes(self, folder: Path | None, n_workers: int) -> Volumes:
        """Return the scaled volumes, kept in a folder once decoded (None: decoded every time)."""
        return Volumes(self.scans, self.labels, self.volume_shape, folder, n_workers)

    def seen(self, trained: pd.DataFrame) -> list[str]:
        """Return the paths of scans that are among those trained on, by size and then content."""
        volumes, sizes = self.volumes(None, 1), set(trained["bytes"])
        alike = [row for row, scan in enumerate(self.scans) if Path(scan).stat().st_size in sizes]
        crc32 = {row: image.describe_volume(volumes[row], 0)["crc32"] for row in alike}
        rows = [row for row in alike if crc32[row] in set(trained["crc32"])]
        return self.table["path"].iloc[rows].tolist()

    def facts(self, csv_path: Path) -> dict:
        """Return what a run's record says of the cohort: scans count by size, whenever copied."""
        try:
            sizes = "\n".join(str(Path(scan).stat().st_size) for scan in self.scans)
        except OSError as e:
            raise InputError(f"{e.filename} cannot be read any more: {e.strerror}") from None
        return {
            "csv_folder": str(csv_path.parent.resolve()),
            "csv_sha256": files.sha256(csv_path),
            "scan_sizes_sha256": hashlib.sha256(sizes.encode()).hexdigest(),
            "n_scans": len(self.scans),
            "volume_shape": list(self.volume_shape),
            "affine": self.like_img.affine.tolist(),
        }


def scan_keys(file: Path) -> set[str]:
    """Return what two spellings of one scan have in common: links to it, and x.hdr and x.img."""
    spellings = (str(file), str(file.resolve()))
    return {re.sub(r"\.img(\.gz|\.bz2)?$", r".hdr\1", text, flags=re.I) for text in spellings}


def parse_rows(
    sheet: table.Sheet, labels: dict[str, int], wanted: Wanted
) -> tuple[pd.DataFrame, Problems]:
    """Return the scans that the rows name, with their file and line, and the problems found.

    Rows whose label means nothing are problems, unless `wanted` leaves them out.
    """
    covariates = sheet.covariate_columns(wanted.covariates)
    folder, has_subjects = sheet.path.parent, "subject" in sheet.column_of
    scans, problems, line_of_scan = [], defaultdict(list), {}
    for line, cells in sheet.rows:
        if len(cells) < 2 and wanted.needs_labels:
            rule = "needs a path and a label separated by a comma"
            problems["cells"].append(f"row {line}: {rule}, got {shown(cells[0])}")
            continue
        path, word, subject = (sheet.cell(cells, role) for role in table.ROLES)
        label = labels.get(word)
        if label is None and not wanted.needs_labels and word.casefold() in table.MISSING:
            label = NO_LABEL
        if label is None:
            if wanted.positive:
                continue
            problems["label"].append(f"row {line}: label must be 0 or 1, got {shown(word)}")
        if has_subjects and subject.casefold() in table.MISSING:
            problems["subject"].append(f"row {line}: the subject is empty, while others have one")
        file = files.find(path, folder)
        if file is None:
            is_link = os.path.islink(folder / path)  # noqa: PTH114 (whatever the name)
            why = ": it is a link to nothing, whose content is still to be fetched" * is_link
            problems["file"].append(f"row {line}: there is no file {shown(path)}{why}")
            continue
        first_line = min(line_of_scan.setdefault(key, line) for key in scan_keys(file))
        if first_line != line:
            already = f"{shown(path)} is listed already, in row {first_line}"
            problems["twice"].append(f"row {line}: {already}")
            continue
        values = [cells[column] if column < len(cells) else "" for column in covariates.values()]
        scans.append((path, label, subject, str(file), line, word, *values))
    columns = ["path", "label", "subject", "file", "line", "word", *covariates_named(covariates)]
    scans_table = pd.DataFrame(scans, columns=columns)
    return scans_table if has_subjects else scans_table.drop(columns="subject"), problems


def covariates_named(names: Iterable[str]) -> list[str]:
    """Return the names of the covariates' columns in a cohort's table while it is checked."""
    return [f"covariate {name}" for name in names]


def read_covariates(
    scans_table: pd.DataFrame, names: Sequence[str]
) -> tuple[pd.DataFrame | None, Problems]:
    """Return the covariates, numbers or words, and the rows that lack one or mix both.

    An InputError if one is the same in all rows.
    """
    values, problems = {}, defaultdict(list)
    for name, column in zip(names, covariates_named(names), strict=True):
        texts = scans_table[column]
        numbers = pd.to_numeric(
            texts.str.replace(r"^(-?\d+),(\d+)$", r"\1.\2", regex=True), errors="coerce"
        )
        numbers = numbers.where(np.isfinite(numbers))
        is_missing = texts.str.casefold().isin(table.MISSING)
        is_word = numbers.isna() & ~is_missing
        if is_word.any() and not is_word[~is_missing].all():
            for line, text in zip(scans_table["line"][is_word], texts[is_word], strict=True):
                rule = f"{name} is a number in other rows, got {shown(text)}"
                problems[column].append(f"row {line}: {rule}")
        problems[column] += [
            f"row {line}: {name} is missing" for line in scans_table["line"][is_missing]
        ]
        values[name] = texts if is_word.any() else numbers
        if not is_missing.any() and values[name].nunique() < 2:
            raise InputError(f"--covariates {name}: it is {texts.iloc[0]} in all rows")
    found = {column: lines for column, lines in problems.items() if lines}
    return (pd.DataFrame(values) if names else None), defaultdict(list, found)


def check_scans(scans_table: pd.DataFrame) -> tuple[str, Problems]:
    """Check that all scans are good and in one space; return the first in the space of most scans.

    Headers are read, last bytes, and voxels until two differ: hundreds of scans take seconds.
    """

    def check(row: tuple) -> tuple[tuple, SpatialImage | None, str]:
        try:
            return row, image.open_scan(row.file), ""
        except InputError as error:
            return row, None, str(error).replace(row.file, "", 1)

    with ThreadPoolExecutor(N_CHECK_THREADS) as pool:
        checks = pool.map(check, scans_table.itertuples())
        checked = list(progress(checks, "checking", total=len(scans_table), unit="scan"))
    problems = defaultdict(list)
    for row, _, fault in checked:
        if fault:
            kind = re.split(r"[\d'\"(]", fault)[0]
            problems[kind].append(f"row {row.line}: {row.path}{fault}")
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
    for row, img in (each for space in spaces[1:] for each in space):
        where = f"row {row.line}: {row.path} has"
        if image.volume_shape(img) != shape:
            problems["shape"].append(f"{where} shape {img.shape}, the other scans {shape}")
        else:
            other = f"another affine than {name}:\n{img.affine}\nnot\n{affine}"
            problems["affine"].append(f"{where} {other}")
    if not all(image.states_orientation(img) for _, img in good):
        image.warn_of_orientation("a scan")
    return name, problems


def read_cohort(csv_path: Path, wanted: Wanted | None = None) -> Cohort:
    """Read the CSV and check every scan; an InputError has the problems found, with their rows."""
    wanted = wanted or Wanted()
    scans_table, like_file, covariates = from_first(lambda: _check_cohort(csv_path, wanted))
    like_img = nib.load(like_file)
    columns, scans = scans_table.drop(columns="file"), scans_table["file"].tolist()
    return Cohort(columns, scans, image.volume_shape(like_img), like_img, covariates)


def _check_cohort(csv_path: Path, wanted: Wanted) -> tuple[pd.DataFrame, str, pd.DataFrame | None]:
    """Return the cohort's table, the file of its first scan, and covariates, or what is wrong."""
    sheet = table.read_sheet(csv_path, wanted)
    labels = table.find_labels(sheet, wanted) if "label" in sheet.column_of else {}
    scans_table, problems = parse_rows(sheet, labels, wanted)
    covariates, covariate_problems = read_covariates(scans_table, wanted.covariates)
    scans_table = scans_table.drop(columns=covariates_named(wanted.covariates))
    like_file, scan_problems = check_scans(scans_table)
    problems |= scan_problems | covariate_problems
    if problems:
        lines = [f"{csv_path}:"]
        for found in sorted(problems.values(), key=row_of):
            found.sort(key=lambda text: row_of([text]))
            n_more = len(found) - N_SHOWN
            lines += [*found[:N_SHOWN], *([f"… and {n_more} more like these"] * (n_more > 0))]
        words = f"; the label's column holds {sheet.words()}: {table.MEANING}"
        roles = ", ".join(f"{role} = {sheet.name(role)}" for role in sheet.column_of)
        lines.append(f"read as: {roles}{words * ('label' in problems)}")
        raise InputError("\n  ".join(lines))
    scans_table = scans_table.drop(columns="line").astype({"label": "int64"})
    subject = sheet.name("subject") if "subject" in scans_table else ""
    if not subject and not wanted.no_subjects:
        subjects = scans_table["path"].str.extract(BIDS_SUBJECT, expand=False)
        if subjects.notna().all() and subjects.duplicated().any():
            scans_table["subject"] = subjects
            subject = "sub-… in the paths (--no-subjects turns this off)"
    used = sheet.covariate_columns(wanted.covariates).values()
    log.info(summary(sheet, scans_table, subject, used))
    if subject:
        n_labels = scans_table.groupby("subject")["label"].nunique()
        mixed = n_labels.index[n_labels > 1]
        if len(mixed):
            log.warning("%d subjects have scans of both labels: %s", len(mixed), some_of(mixed))
    return scans_table.drop(columns="word"), like_file, covariates


def row_of(found: list[str]) -> int:
    """Return the row of the first problem of a kind."""
    return int(re.match(r"row (\d+)", found[0])[1])


def summary(
    sheet: table.Sheet, scans_table: pd.DataFrame, subject: str, used: Iterable[int]
) -> str:
    """Return in one line what was taken from the CSV, and what was not."""
    words = scans_table["word"]
    spelled = words.str.casefold().mask(words.str.fullmatch(table.LABEL), "")  # AD is ad
    groups = words.groupby([scans_table["label"], spelled]).agg(["first", "size"])
    taken = [
        f"{word} {n} → {label}"
        if meaning
        else f"{n} of label {label}"
        if label != NO_LABEL
        else f"{n} without label"
        for (label, meaning), word, n in groups[::-1].itertuples()
    ]
    parts = [f"{len(scans_table)} scans: {', '.join(taken)}"]
    if len(scans_table) < len(sheet.rows):
        parts.append(f"left out: {sheet.words(but=set(scans_table['word']))}")
    n_subjects = scans_table["subject"].nunique() if subject else 0
    parts.append(f"subject = {subject}, {n_subjects}" if subject else "no subjects")
    if unused := sheet.unused(used):
        parts.append(f"{', '.join(unused)} not used")
    return "; ".join(parts)
