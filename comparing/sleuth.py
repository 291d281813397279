"""Coordinates as text files of Sleuth and GingerALE have them: experiments, subjects, foci."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils import InputError

REFERENCE = re.compile(r"reference\s*=\s*(.*)", re.IGNORECASE)
SUBJECTS = re.compile(r"subjects\s*=\s*(.*)", re.IGNORECASE)
COUNT = re.compile(r"(\d+)(\.0*)?(?!\d|\.)")
SPACES = {"mni": "MNI", "tal": "Talairach"}  # how names of reference spaces begin


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
    count. An experiment whose foci are missing ends where the next one's subjects are given.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--foci {path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    experiments: list[Experiment] = []
    space, is_open = "", False  # whether the last experiment may still get titles and subjects
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        line, place = line.strip(), f"{path}, line {number}"
        if not line or line.startswith("#"):
            continue
        if not line.startswith("//"):
            if not experiments:
                raise InputError(f"{place}: a focus before any experiment's title")
            if not space:
                raise InputError(f"{place}: no line //Reference=MNI or Talairach stands before it")
            experiments[-1].foci.append(_focus(line, place))
            is_open = False
            continue
        remark = line.lstrip("/").strip()
        if match := REFERENCE.fullmatch(remark):
            space = _space(match[1], place)
            if is_open:
                experiments[-1].space = space
            continue
        match = SUBJECTS.fullmatch(remark)
        last = experiments[-1] if is_open else None
        if last is None or _begins_anew(last, bool(match)):
            experiments.append(last := Experiment(number, space=space))
        is_open = True
        if match:
            last.n_subjects = _count(match[1], place)
        elif remark:
            last.titles.append(remark)
    for each in experiments:
        if each.foci and each.n_subjects is None:
            rule = "an experiment with foci has no line //Subjects=n"
            raise InputError(f"{path}, line {each.line}: {rule}: {each.name!r}")
    if not any(each.foci for each in experiments):
        raise InputError(f"--foci {path} has no focus")
    return experiments


def _begins_anew(last: Experiment, is_count: bool) -> bool:
    """Tell whether a line belongs to a new experiment, though the last one has no foci.

    A second number of subjects does, and a title after one that has both.
    """
    return last.n_subjects is not None and (is_count or bool(last.titles))


def _space(text: str, place: str) -> str:
    """Return MNI or Talairach."""
    for beginning, space in SPACES.items():
        if text.strip().casefold().startswith(beginning):
            return space
    raise InputError(f"{place}: the reference must be MNI or Talairach, got {text.strip()!r}")


def _count(text: str, place: str) -> int:
    """Return a number of subjects, whatever follows it."""
    match = COUNT.match(text.strip())
    if not match or int(match[1]) < 1:
        raise InputError(f"{place}: the number of subjects must be at least 1, got {text!r}")
    return int(match[1])


def _focus(line: str, place: str) -> tuple[float, float, float]:
    """Return a focus; numbers are separated by spaces, tabs or commas."""
    words = [word for word in re.split(r"[\s,;]+", line.replace("\u2212", "-")) if word]
    try:
        x, y, z = map(float, words)
    except ValueError:
        raise InputError(f"{place}: a focus is three numbers, x y z in mm, got {line!r}") from None
    if not np.isfinite([x, y, z]).all():
        raise InputError(f"{place}: a focus is three numbers, x y z in mm, got {line!r}")
    return x, y, z
