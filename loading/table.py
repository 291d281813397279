"""Tables as people have them: text, remarks, separator; the cohort's columns, found by name."""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from run_folder import files
from utils import InputError, log, some_of

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}  # the last two as spreadsheets write
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SEPARATOR_LINE = re.compile(r'"?sep=([^"\r\n])"?[,;]*', re.IGNORECASE)  # as Excel takes and writes
REMARK = "#"
MAX_TEXT_SHOWN = 100  # letters of a cell in a message
ROLES = {  # of the cohort's columns, and the names that a header row gives them
    "scan": ("path", "file", "filename", "scan", "image", "t1", "nifti"),
    "label": ("label", "diagnosis", "dx", "group", "class"),
    "subject": ("subject", "subject_id", "participant_id", "sub", "rid", "ptid", "family"),
}
LABEL = re.compile(r"([01])([.,]0*)?")  # spreadsheets and pandas write 1.0 for 1
WHOLE_NUMBER = re.compile(r"(-?[0-9]+)[.,]0+")
IMAGE_SUFFIXES = (".nii", ".hdr", ".img", ".mgz", ".mgh", ".mnc", ".head", ".brik", ".par", ".rec")
MISSING = ("", "n/a", "nan")  # a subject or word that is none: BIDS's way, and pandas's
N_ROWS_LOOKED_AT = 20  # for images, where it is to be seen how columns are separated
N_WORDS_SHOWN = 10
MEANING = "say what they mean with --positive WORD… --negative WORD…"

Rows = list[tuple[int, list[str]]]  # the line where each row ends, and its cells without spaces


def read_text(path: Path) -> str:
    """Return a table's text, which must be UTF-8."""
    refusal = f"{path} cannot be read as a CSV file"
    try:
        content = path.read_bytes()
        if content.startswith(UTF16_MARKS) or b"\0" in content:
            raise InputError(f"{refusal}: it is UTF-16 or no text; save it as CSV UTF-8")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{refusal}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = len((error.object[: error.start] + b"?").splitlines())
        raise InputError(f"{refusal}: row {line} is not UTF-8; save it as CSV UTF-8") from None


def read_rows(
    path: Path, score: Callable[[Rows], tuple], is_wanted: Callable[[list[str]], bool]
) -> Rows:
    """Return a table's rows, split by the separator whose rows score highest.

    A line `sep=;` above them settles the separator. Lines that begin with # are left out, unless
    `is_wanted` says of their cells that they are rows all the same.
    """
    lines = list(io.StringIO(read_text(path), newline=""))
    separators = list(SEPARATORS)

    def is_remark(line: str) -> bool:
        rows = ([cell.strip() for cell in line.split(each)] for each in separators)
        return line.startswith(REMARK) and not any(map(is_wanted, rows))

    for number, line in enumerate(map(str.strip, lines)):
        if separator_line := SEPARATOR_LINE.fullmatch(line):
            separators = [separator_line[1]]
        elif line and not is_remark(line):
            break
        lines[number] = "\n"  # the others keep their numbers

    rows_by = {each: _split(lines, each, path) for each in separators}
    separator = max(separators, key=lambda each: score(rows_by[each]))
    if separator != ",":
        log.info("columns are separated by a %s", SEPARATORS.get(separator, repr(separator)))
    rows = rows_by[separator]
    return [row for row in rows if not row[1][0].startswith(REMARK) or is_wanted(row[1])]


def _split(lines: list[str], separator: str, path: Path) -> Rows:
    """Return the rows that are not empty."""
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (csv.Error, ValueError) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from None
    return [(line, cells) for line, cells in rows if any(cells)]


def shown(text: str) -> str:
    """Return a cell as messages quote it: escaped, and not endless."""
    return repr(text if len(text) <= MAX_TEXT_SHOWN else text[:MAX_TEXT_SHOWN] + "…")


@dataclass(frozen=True)
class Wanted:
    """What the command line says of the cohort's columns, and of words in that of the label."""

    columns: Sequence[tuple[str, str]] = ()  # roles, and the names of their columns
    positive: Sequence[str] = ()  # words that mean 1
    negative: Sequence[str] = ()  # and 0; without them the one other word does
    no_subjects: bool = False
    covariates: Sequence[str] = ()  # names of further columns
    needs_labels: bool = True

    @classmethod
    def of(cls, arguments: dict) -> "Wanted":
        """Return what a script's arguments say."""
        return cls(**{f: arguments[f] for f in cls.__dataclass_fields__ if f in arguments})

    def __post_init__(self):
        """Raise an InputError if the options contradict each other."""
        roles = [role for role, _ in self.columns]
        if len(set(roles)) < len(roles):
            raise InputError(f"--columns names two columns for one role: {some_of(roles)}")
        both = {word_of(text) for text in self.positive} & {word_of(text) for text in self.negative}
        if both:
            raise InputError(f"{some_of(sorted(both))} cannot be both --positive and --negative")
        if self.negative and not self.positive:
            raise InputError("--negative goes with --positive, which says who the patients are")


@dataclass(frozen=True)
class Sheet:
    """The cohort's rows, and which of their columns has which role."""

    path: Path
    header: list[str]  # [] where the first row is a scan's
    rows: Rows
    column_of: dict[str, int]  # of scan, label and, if there is one, subject

    def cell(self, cells: list[str], role: str) -> str:
        """Return what a row has in a role's column; "" without one, or where the row ends."""
        column = self.column_of.get(role, len(cells))
        return cells[column] if column < len(cells) else ""

    def name(self, role: str) -> str:
        """Return what a role's column is called."""
        column = self.column_of[role]
        return self.header[column] if self.header else f"column {column + 1}"

    def words(self, but: Iterable[str] = ()) -> str:
        """Return what the label's column holds, with counts; but for some words."""
        texts = Counter(self.cell(cells, "label") for _, cells in self.rows)
        counted = [f"{text or 'nothing'} {n}" for text, n in texts.most_common() if text not in but]
        return some_of(counted, N_WORDS_SHOWN)

    def covariate_columns(self, names: Iterable[str]) -> dict[str, int]:
        """Return where covariates stand; an InputError that lists the columns if one is missing."""
        found = {name: _named(self.header, (plain(name),)) for name in names}
        for name, columns in found.items():
            if len(columns) != 1:
                n_found = "several columns are" if columns else "no column is"
                there = ", ".join(map(shown, self.header)) or "not named by a first row"
                rule = f"--covariates {name}: {n_found} called that"
                raise InputError(f"{rule}; the columns of {self.path} are {there}")
        return {name: column for name, (column,) in found.items()}

    def unused(self, but: Iterable[int] = ()) -> list[str]:
        """Return the names of the columns without a role; but for some."""
        used = {*self.column_of.values(), *but}
        return [name for column, name in enumerate(self.header) if name and column not in used]


def read_sheet(path: Path, wanted: Wanted) -> Sheet:
    """Return a cohort's rows, with columns by their names or, without a header row, in order."""

    def is_image(text: str) -> bool:
        name = re.sub(r"\.(gz|bz2)$", "", text.lower())
        return name.endswith(IMAGE_SUFFIXES) or files.find(text, path.parent) is not None

    needed = ("scan", "label") if wanted.needs_labels else ("scan",)

    def names_roles(cells: list[str]) -> bool:
        return all(_named(cells, ROLES[role]) for role in needed)

    def has_label(cells: list[str]) -> bool:
        return len(cells) > 1 and LABEL.fullmatch(cells[1]) is not None

    def score(rows: Rows) -> tuple:
        n_roles = sum(bool(_named(rows[0][1], names)) for names in ROLES.values()) if rows else 0
        n_images = sum(any(map(is_image, cells)) for _, cells in rows[:N_ROWS_LOOKED_AT])
        return n_roles, n_images, sum(has_label(cells) for _, cells in rows)

    def is_row(remark: list[str]) -> bool:
        return files.find(remark[0], path.parent) is not None or names_roles(remark)

    rows = read_rows(path, score, is_row)
    first = rows[0][1] if rows else []
    numbers = list(map(str, range(len(first))))  # pandas's heads of unnamed columns
    first_column = int(first == ["", *numbers[:-1]])  # after its index
    is_numbered = (first == numbers or first_column == 1) and not any(map(is_image, first))
    is_named = names_roles(first) or not (first and (is_image(first[0]) or has_label(first)))
    if is_numbered or is_named:
        del rows[:1]
    if not rows:
        raise InputError(f"{path} lists no scan")
    header = first if is_named and not is_numbered else []
    if header:
        images = [c for c, text in enumerate(rows[0][1][: len(header)]) if is_image(text)]
        column_of = _find_columns(header, wanted, images, path)
    elif wanted.columns or wanted.positive:
        option = "--columns" if wanted.columns else "--positive"
        raise InputError(f"{option} needs a row in {path} that names the columns")
    else:
        column_of = {role: column for column, role in enumerate(ROLES, first_column)}
    sheet = Sheet(path, header, rows, column_of)
    if wanted.no_subjects or not any(sheet.cell(cells, "subject") for _, cells in rows):
        column_of.pop("subject", None)
    return sheet


def plain(name: str) -> str:
    """Return a column's name as it is compared: whatever its case, with spaces or hyphens."""
    return re.sub(r"[\s-]+", "_", name.lstrip(REMARK).strip().casefold())


def _named(header: list[str], names: tuple[str, ...]) -> list[int]:
    """Return which columns have one of these names."""
    return [column for column, name in enumerate(header) if plain(name) in names]


def _find_columns(
    header: list[str], wanted: Wanted, images: list[int], path: Path
) -> dict[str, int]:
    """Return the column of each role: as asked for, else by its name, else the one that is left.

    That is for the scan the only one of `images`, which hold one in the first row; of two columns
    the other is the label's.
    """
    there = f"the columns of {path} are {', '.join(map(shown, header))}"
    found: dict[str, list[int]] = {}
    for role, name in wanted.columns:
        found[role] = _named(header, (plain(name),))
        if len(found[role]) != 1:
            n_found = "several columns are" if found[role] else "no column is"
            raise InputError(f"--columns {role}={name}: {n_found} called that; {there}")
    taken = [column for (column,) in found.values()]
    if len(set(taken)) < len(taken):
        raise InputError("--columns gives one column two roles")
    for role in [role for role in ROLES if role not in found]:
        named = [column for column in _named(header, ROLES[role]) if column not in taken]
        if len(named) > 1 and not (role == "subject" and wanted.no_subjects):
            names = " and ".join(shown(header[column]) for column in named)
            option = f"--columns {role}={header[named[0]]}"
            raise InputError(f"{names} in {path} could each be the {role}: say which with {option}")
        found[role] = named
    if not found["scan"] and len(images) == 1:
        found["scan"] = images
    if not found["label"] and len(header) == 2:
        found["label"] = [column for column in range(2) if column not in found["scan"]][:1]
    for role in ("scan", "label") if wanted.needs_labels else ("scan",):
        if not found[role]:
            rule = f"no column is called one of {', '.join(ROLES[role])}"
            raise InputError(f"{rule}: say which with --columns {role}=NAME; {there}")
    if not found["subject"] and (found["scan"], found["label"]) == ([0], [1]) and header[2:]:
        remark = "column 3, %s, is not taken as the subject: --columns subject=%s would take it"
        log.warning(remark, shown(header[2]), header[2])
    return {role: found[role][0] for role in ROLES if found[role]}


def word_of(text: str) -> str:
    """Return a word of the label column as it is compared: AD and ad are one, and 3 and 3.0."""
    number = WHOLE_NUMBER.fullmatch(text)
    return number[1] if number else text.casefold()


def find_labels(sheet: Sheet, wanted: Wanted) -> dict[str, int]:
    """Return what each text of the label column means; those that mean nothing are left out.

    An InputError if no row has a word of the options, or nothing says what the words mean.
    """
    texts = {sheet.cell(cells, "label") for _, cells in sheet.rows}
    words = {word_of(text) for text in texts} - set(MISSING)
    holds = f"the label's column in {sheet.path} holds {sheet.words()}"
    if not wanted.positive:
        labels = {text: int(match[1]) for text in texts if (match := LABEL.fullmatch(text))}
        if sheet.header and words and not labels:
            raise InputError(f"{holds}: {MEANING}")
        return labels
    for option, given in (("--positive", wanted.positive), ("--negative", wanted.negative)):
        absent = [text for text in given if word_of(text) not in words]
        if absent:
            raise InputError(f"{option} {' '.join(absent)}: no row has that; {holds}")
    label_of = dict.fromkeys(map(word_of, wanted.negative), 0)
    label_of |= dict.fromkeys(map(word_of, wanted.positive), 1)
    if not wanted.negative:
        others = words - label_of.keys()
        if len(others) != 1:
            raise InputError(f"{holds}: {MEANING}")
        label_of[others.pop()] = 0
    return {text: label_of[word_of(text)] for text in texts if word_of(text) in label_of}
