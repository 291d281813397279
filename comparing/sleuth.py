"""Coordinates as text files of Sleuth and GingerALE have them: experiments, subjects, foci."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils import InputError

REFERENCE = re.compile(r"reference\s*[=:]\s*(.*)", re.IGNORECASE)
SUBJECTS = re.compile(r"subjects?\s*[=:]\s*(.*)", re.IGNORECASE)
COUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d+)(\.0*)?(?![\d.,]*\d)")  # 24, 24.0, 1,200, 24 AD
SPACES = {"MNI": re.compile(r"mni", re.IGNORECASE),
          "Talairach": re.compile(r"tal(airach)?(?![a-z])", re.IGNORECASE)}  # fmt: skip
MINUS = str.maketrans("\u2212\u2013", "--")  # as word processors write it
FARTHEST_MM = 500.0  # from the origin: no head is larger
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass
class Experiment:
    """One experiment: its foci are as the file has them, in mm of its reference space."""

    line: int  # where it begins
    titles: list[str] = field(default_factory=list)
    n_subjects: int | None = None
    space: str = ""
    foci: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its title, over however many lines."""
        return " ".join(self.titles)

    @property
    def foci_mm(self) -> np.ndarray:
        """Its foci, (n, 3)."""
        return np.array(self.foci, dtype=float).reshape(-1, 3)


def read_experiments(path: Path) -> list[Experiment]:
    """Read the experiments of a text file; an InputError names the line that cannot be meant.

    Lines that begin with // hold the reference space, titles, and numbers of subjects, in any order
    before an experiment's foci, one a line: x, y, z in mm. Blank lines and those with # do not
    count. Where several numbers of subjects stand before the foci, those before the last are of
    experiments without foci.
    """
    experiments: list[Experiment] = []
    header: list[tuple[int, str, str]] = []  # line, "title" or "subjects", and text
    space = ""
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _text(path)), 1):
        line, place = line.strip(), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        remark = line.lstrip("/").strip()
        if line.startswith("//") and (match := REFERENCE.fullmatch(remark)):
            space = _space(match[1], place)
        elif line.startswith("//"):
            match = SUBJECTS.fullmatch(remark)
            header += [(number, "subjects", match[1]) if match else (number, "title", remark)]
        else:
            experiments += _experiments_of(header, space, path)
            header = []
            if not experiments:
                raise InputError(f"{place}: a focus before any experiment's title")
            if not space:
                raise InputError(f"{place}: no line //Reference=MNI or Talairach stands before it")
            if experiments[-1].space != space:
                raise InputError(f"{place}: the reference changes within an experiment's foci")
            experiments[-1].foci.append(_focus(line, place))
    experiments += _experiments_of(header, space, path)
    for each in experiments:
        if each.foci and each.n_subjects is None:
            rule = "an experiment with foci has no line //Subjects=n"
            raise InputError(f"{path}, line {each.line}: {rule}: {each.name!r}")
    if not any(each.foci for each in experiments):
        raise InputError(f"--foci {path} has no focus")
    return experiments


def _text(path: Path) -> str:
    """Return a file's text, UTF-8 or Latin-1."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--foci {path} cannot be read: {error.strerror}") from None
    if content.startswith(UTF16_MARKS) or b"\0" in content:
        raise InputError(f"--foci {path} is UTF-16 or no text; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _experiments_of(
    header: list[tuple[int, str, str]], space: str, path: Path
) -> list[Experiment]:  # fmt: skip
    """Return the experiments whose titles and numbers of subjects stand before some foci.

    Each number of subjects but the last ends its experiment; where the first line is a number, each
    but the first begins one.
    """
    is_number_first = bool(header) and header[0][1] == "subjects"
    found: list[Experiment] = []
    for index, (line, kind, text) in enumerate(header):
        is_count, place = kind == "subjects", f"{path}, line {line}"
        before = header[index - 1] if index else (0, "", "")
        if is_count and before[1] == "subjects":
            raise InputError(f"{place}: the number of subjects is given twice in a row")
        begins = is_count if is_number_first else before[1] == "subjects" and _more(header, index)
        if not found or begins:
            found.append(Experiment(line, space=space))
        if is_count:
            found[-1].n_subjects = _count(text, place)
        elif text:
            found[-1].titles.append(text)
    return found


def _more(header: list[tuple[int, str, str]], index: int) -> bool:
    """Tell whether a number of subjects stands at or behind a line of a header."""
    return any(kind == "subjects" for _, kind, _ in header[index:])


def _space(text: str, place: str) -> str:
    """Return MNI or Talairach."""
    for space, pattern in SPACES.items():
        if pattern.match(text.strip()):
            return space
    raise InputError(f"{place}: the reference must be MNI or Talairach, got {text.strip()!r}")


def _count(text: str, place: str) -> int:
    """Return a number of subjects, whatever follows it."""
    match = COUNT.match(text.strip())
    n = int(match[1].replace(",", "")) if match else 0
    if n < 1:
        raise InputError(f"{place}: the number of subjects must be at least 1, got {text!r}")
    return n


def _focus(line: str, place: str) -> tuple[float, float, float]:
    """Return a focus; numbers are separated by spaces, tabs or commas."""
    words = [word for word in re.split(r"[\s,;]+", line.translate(MINUS)) if word]
    try:
        x, y, z = map(float, words)
    except ValueError:
        raise InputError(f"{place}: a focus is three numbers, x y z in mm, got {line!r}") from None
    if not (np.abs([x, y, z]) <= FARTHEST_MM).all():  # nor NaN
        raise InputError(f"{place}: a focus is three numbers, x y z in mm, got {line!r}")
    return x, y, z
