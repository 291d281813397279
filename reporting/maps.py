"""Maps of many scans: running means, and a fold's files."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from scipy.special import softmax

from loading import image
from run_folder import files, processes
from utils import InputError

OUTCOMES = ("TP", "TN", "FP", "FN")
KINDS = ("map", "contrast")  # of mean maps: of all scans, and patients' less controls'
GROUPS = ("controls", "patients")  # by label
SUFFIXES = ("nii.gz", "json", "png", "pdf", "html")  # of a mean map and what belongs to it
LOGITS = {  # that --target explains
    "label": "the own class's logit", "predicted": "the predicted class's logit",
    "0": "the controls' logit", "1": "the patients' logit",
}  # fmt: skip
UNITS = {  # of a method's maps
    "LRP": "relevance for {}, per voxel",
    "IG": "contribution to {}, per voxel",
    "GGC": "guided gradient of {} × Grad-CAM",
    "SG": "gradient of {} by intensity",
    "SVM weights": "gradient of the decision by intensity",
    "SVM pattern": "intensity per unit of decision",
    "Welch's t": "Welch's t, patients minus controls",
    "t beside covariates": "t of the label in a linear model with covariates",
}
PARAMETERS = {  # of a method, as titles have them
    "beta": "β = {}", "n_steps": "{} steps", "n_samples": "{} samples", "noise": "noise {}",
    "cam": "--cam {}", "C": "C = {}",
}  # fmt: skip
OUTCOME_NAMES = {
    "TP": "patients, found", "TN": "controls, found", "FP": "controls taken for patients",
    "FN": "patients taken for controls",
}  # fmt: skip
MEAN_SCAN = "mean_scan.nii.gz"
COVERAGE = "coverage.nii.gz"  # the share of explained scans that are not 0 in a voxel
NO_CHANGE = 0.01  # of the logit, below which IG's completeness error says nothing
IG_TOLERANCE = 0.05  # median completeness error of IG above which more --steps are advised
MAX_NAME_BYTES = 80  # of a scan's name in the name of its map
TABLE_COLUMNS = {
    "path": str, "label": int, "fold": int, "predicted": int, "probability": float, "outcome": str,
    "logit": float, "map_sum": float, "completeness_error": float,
}  # fmt: skip


@dataclass
class RunningMean:
    """A mean of volumes that holds only their sum."""

    total: np.ndarray | None = None
    n: int = 0

    def add(self, data: np.ndarray, n: int = 1) -> None:
        """Add a volume, shape (D, H, W), that is the mean of `n`."""
        if self.total is None:
            self.total = np.zeros(data.shape)
        self.total += data if n == 1 else n * data.astype(np.float64)
        self.n += n

    def mean(self) -> np.ndarray:
        """Return the mean volume, float64."""
        return self.total / self.n

    def gather(self, volume_shape: tuple[int, int, int]) -> None:
        """Add up what all processes of the job have added."""
        self.n = sum(processes.gathered(self.n))
        if self.n:
            self.total = np.zeros(volume_shape) if self.total is None else self.total
            processes.add_up(self.total)


@dataclass(frozen=True)
class ExplainedScan:
    """A scan whose maps are made: its row in the cohort, its path there, and its logits (2,)."""

    row: int
    path: str
    label: int
    part: str
    target: int
    logits: np.ndarray
    subject: str = ""

    @property
    def probability(self) -> float:
        """Of label 1."""
        return float(softmax(self.logits.astype(np.float64))[1])

    @property
    def predicted(self) -> int:
        """The class of the larger logit."""
        return int(self.logits.argmax())

    @property
    def outcome(self) -> str:
        """TP, TN, FP or FN; "" where the label is not known."""
        if self.label < 0:
            return ""
        return ("T" if self.label == self.predicted else "F") + "NP"[self.predicted]


@dataclass
class FoldMaps:
    """What one method makes of a fold's scans.

    `stem` begins the names of the method's files; `like_img` is a scan of the cohort; `saves_scans`
    makes each scan's map a file, too; `groups` has a mean for each of `OUTCOMES` and `GROUPS` that
    is asked for.
    """

    method: str
    stem: str
    fold: int
    outpath: Path
    like_img: SpatialImage
    saves_scans: bool
    groups: dict[str, RunningMean]
    mean: RunningMean = field(default_factory=RunningMean)
    lines: dict[int, dict] = field(default_factory=dict)  # of the table, by the scan's row

    def saved(self, scans: list[ExplainedScan]) -> list[np.ndarray] | None:
        """Return the maps of scans that an earlier command has left; None unless all are there."""
        paths = [self.outpath / self.name_of(scan) for scan in scans]
        if not (self.saves_scans and all(path.is_file() for path in paths)):
            return None
        return [read_map(path, image.volume_shape(self.like_img)) for path in paths]

    def add(self, scan: ExplainedScan, map_data: np.ndarray, zero_logits: np.ndarray) -> None:
        """Add a scan's map; `zero_logits`, (2,), are those of the zero volume."""
        logit, total = float(scan.logits[scan.target]), float(map_data.sum(dtype=np.float64))
        zero_logit = float(zero_logits[scan.target])
        line = {
            "path": scan.path,
            **({"subject": scan.subject} if scan.subject else {}),
            "label": scan.label,
            "fold": self.fold,
            "part": scan.part,
            "predicted": scan.predicted,
            "probability": scan.probability,
            "outcome": scan.outcome,
            "logit": logit,
            "map_sum": total,
            "completeness_error": completeness_error(self.method, total, logit, zero_logit),
        }
        if self.saves_scans:
            line["map"] = self.name_of(scan)
            path = self.outpath / line["map"]
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                image.write_image(path, map_data, self.like_img)
        self.lines[scan.row] = line
        self.mean.add(map_data)
        of_label = () if scan.label < 0 else (scan.outcome, GROUPS[scan.label])
        for group in set(of_label) & set(self.groups):
            self.groups[group].add(map_data)

    def name_of(self, scan: ExplainedScan) -> str:
        """Return the path of a scan's map below --outpath; no name of a scan leads out of it."""
        name = f"{scan.row + 1:05d}_{short_name(scan.path)}_f{self.fold}.nii.gz"
        return f"{self.stem}_subjects/{name}"

    def gather(self) -> None:
        """Put together what all processes of the job have."""
        for mean in (self.mean, *self.groups.values()):
            mean.gather(image.volume_shape(self.like_img))
        lines = {row: line for part in processes.gathered(self.lines) for row, line in part.items()}
        self.lines = dict(sorted(lines.items()))

    def write(self) -> None:
        """Write the fold's mean maps and, last, its table, which says that it is finished."""
        written = {f"map_{name}": self.groups[name] for name in OUTCOMES if name in self.groups}
        data = {name: mean.mean() for name, mean in {"map": self.mean, **written}.items() if mean.n}
        controls, patients = (self.groups.get(group) for group in GROUPS)
        if patients and patients.n and controls.n:
            data["contrast"] = patients.mean() - controls.mean()
        for name, map_data in data.items():
            path = self.outpath / f"{self.stem}_{name}_f{self.fold}.nii.gz"
            image.write_image(path, map_data, self.like_img)
        table = pd.DataFrame(list(self.lines.values()))
        files.write_csv(self.outpath / f"{self.stem}_predictions_f{self.fold}.csv", table)


def short_name(path: str) -> str:
    """Return a scan's name as part of a file's."""
    name = re.sub(r"[^\w-]+", "_", Path(path).name.split(".")[0])
    return name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def title_of(sidecar: dict) -> str:
    """Return a title for a mean map from its record, of which any part may be missing."""
    given, of_folds = (sidecar.get(key) for key in ("parameters", "scans_per_fold"))
    given, of_folds = (each if isinstance(each, dict) else {} for each in (given, of_folds))
    parameters = [text.format(given[name]) for name, text in PARAMETERS.items() if name in given]
    title = str(sidecar.get("method", "a map")) + f" ({', '.join(parameters)})" * bool(parameters)
    if logit := LOGITS.get(str(sidecar.get("target"))):
        title += f" of {logit}"
    if sidecar.get("map") == "contrast":
        title += ", patients less controls"
    if model := sidecar.get("model"):
        title += f" · {'untrained ' * bool(sidecar.get('random_weights'))}{model}"
    if n_folds := len(of_folds) or sidecar.get("n_folds"):
        title += f" · {n_folds} folds"
    counts = [n for n in of_folds.values() if isinstance(n, int)]
    is_each_once = sidecar.get("subjects", "test") == "test"
    n_scans = sum(counts) if is_each_once else max(counts, default=0)
    title += f", {n_scans} scans" * bool(n_scans)
    return title + ", not all held out" * (sidecar.get("held_out") is False)


def completeness_error(method: str, total: float, logit: float, zero_logit: float) -> float:
    """Return how far a map's sum is from what it explains, relative to that.

    NaN for GGC, and for IG where the scan's logit is that of the zero volume.
    """
    explained = {"LRP": logit, "IG": logit - zero_logit}.get(method, np.nan)
    if method == "IG" and abs(explained) < NO_CHANGE:
        return np.nan
    return abs(total - explained) / abs(explained) if explained else np.inf


def read_map(path: Path, volume_shape: tuple[int, int, int]) -> np.ndarray:
    """Return a map, float32 in C order; an InputError if it is damaged or of another shape."""
    try:
        if image.open_image(path).shape == tuple(volume_shape):
            return np.ascontiguousarray(image.read_data(path))
        problem = f"{path} has another shape than the scans, {volume_shape}"
    except InputError as error:
        problem = str(error)
    raise InputError(f"{problem}; start anew with --overwrite")
