"""Maps measured in every setting: overlap, chance, stability, and how sure that is."""

import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage

from comparing import overlap, significance
from comparing.maps import Map, control_path
from comparing.significance import ScanMaps
from comparing.space import Space
from loading.image import read_image
from run_folder import files
from utils import log, progress, some_of

MEASURES = ("dice_matched", "dice_max", "roc_auc", "average_precision", "mass")
WITH_ERRORS = {"dice_matched": overlap.dice_matched, "average_precision": overlap.average_precision}
NO_CONTROL = (
    "%s: its label_p says that the groups' maps differ there, not that the networks learned it: "
    "that of untrained networks is to stand beside it (heatmap.py --randomize --save-subjects)"
)


@dataclass(frozen=True)
class Settings:
    """How maps are read and judged; the first sign and the first width lead."""

    signs: list[str]
    fwhms_mm: list[float]
    n_permutations: int
    seed: int

    @property
    def how(self) -> str:
        """What is evidence in the leading setting, in words."""
        smoothed_by = f", smoothed by {self.fwhms_mm[0]:g} mm" * bool(self.fwhms_mm[0])
        return f"{overlap.SIGN_WORDS[self.signs[0]]}{smoothed_by}"


@dataclass
class Measured:
    """What was found of a map; all but the other rows is of the leading setting."""

    rows: list[dict]  # of comparison.csv, one a setting, the leading one first
    values: np.ndarray  # of the mask's voxels, signed and smoothed
    curve: np.ndarray | None = None  # Dice at `overlap.TOP_FRACTIONS`
    draws: np.ndarray | None = None  # of `WITH_ERRORS`, see `significance.draws`


def smoothed(img: SpatialImage, fwhm_mm: float) -> np.ndarray:
    """Return a map's data, (D, H, W), signed, smoothed with a Gaussian of this width."""
    if fwhm_mm:
        from nilearn import image

        img = image.smooth_img(img, fwhm_mm)
    return img.get_fdata(dtype=np.float32)


def measure(name: str, each: Map, space: Space, settings: Settings, outpath: Path) -> Measured:
    """Measure a map in every setting; the maps of its scans are smoothed below `outpath`."""
    found, mask_data = Measured([], np.empty(0)), space.mask_data
    for fwhm_mm in settings.fwhms_mm:
        signed_data = smoothed(each.img, fwhm_mm)
        of_folds = np.array([smoothed(img, fwhm_mm)[mask_data] for img in each.fold_imgs])
        stable = {"n_folds": len(of_folds), "fold_r": significance.fold_r(of_folds)}
        for sign in settings.signs:
            row = {"map": name, "sign": sign, "fwhm": fwhm_mm, "n_mask": int(mask_data.sum())}
            data = overlap.SIGNS[sign](signed_data)
            row |= stable | {"outside": overlap.outside(data, mask_data)}
            if space.inside is not None:
                row |= overlap_of(data[mask_data], overlap.SIGNS[sign](of_folds), space.inside)
            found.rows.append(row)
            if len(found.rows) == 1:
                found.values = signed_data[mask_data]
                if space.inside is not None:
                    row["shift_p"], row["shift_mean"] = overlap.shift_null(
                        data, mask_data, space.reference_data, settings.seed,
                        settings.n_permutations,
                    )  # fmt: skip
                    found.curve = overlap.dice_curve(data[mask_data], space.inside)[0]
                    if row["degenerate"]:
                        log.warning("%s: fewer non-zero voxels than the reference has", name)
    if each.scans is not None:
        judge(name, each, space, settings, outpath, found)
    return found


def overlap_of(values: np.ndarray, of_folds: np.ndarray, inside: np.ndarray) -> dict:
    """Return a map's overlap with the reference, and that of its folds' maps, mean and sd."""
    row = {"n_reference": int(inside.sum()), "p": inside.mean()} | overlap.overlap(values, inside)
    found = [overlap.overlap(each, inside) for each in of_folds]
    table = pd.DataFrame(found, columns=MEASURES, dtype=float)
    row |= {f"{name}_folds_mean": table[name].mean() for name in MEASURES}
    return row | {f"{name}_folds_sd": table[name].std() for name in MEASURES}


def scratch_gb(maps: dict[str, Map], space: Space) -> float:
    """Return how large the file of smoothed maps of scans gets, that `judge` makes and removes."""
    n_scans = max((len(each.scans) for each in maps.values() if each.scans is not None), default=0)
    return 4e-9 * n_scans * int(space.mask_data.sum())


def judge(
    name: str, each: Map, space: Space, settings: Settings, outpath: Path, found: Measured
) -> None:
    """Say in a map's leading row how sure it is, from its scans' maps, smoothed into one file."""
    shape, gb = (len(each.scans), len(found.values)), scratch_gb({name: each}, space)
    log.info("%s: maps of %d scans, %.3g GB below %s meanwhile", name, shape[0], gb, outpath)
    with tempfile.TemporaryDirectory(dir=outpath, prefix=files.TEMPORARY_PREFIX) as folder:
        values = np.memmap(Path(folder) / "scans", np.float32, "w+", shape=shape)
        for row, path in enumerate(progress(each.scans["map"], f"smoothing {name}")):
            scan_img = read_image(path, "map")
            values[row] = smoothed(scan_img, settings.fwhms_mm[0])[space.mask_data]
        scan_maps = ScanMaps(values, each.scans, each.is_contrast)
        if significance.is_mean_of(scan_maps, found.values):
            judge_scans(name, scan_maps, space.inside, settings, found)
        else:
            log.warning("%s is not the mean of its scans' maps (--mean equal?): no errors", name)


def judge_scans(
    name: str, scan_maps: ScanMaps, inside: np.ndarray | None, settings: Settings, found: Measured
) -> None:
    """Add standard errors, the p of exchanged labels and the correlation of halves."""
    row, seed = found.rows[0], settings.seed
    row |= {"n_scans": len(scan_maps.table), "half_r": significance.half_r(scan_maps, seed)}
    if inside is None:
        return
    evidence = overlap.SIGNS[settings.signs[0]]
    measures = [lambda v, f=f: f(evidence(v), inside) for f in WITH_ERRORS.values()]
    found.draws = significance.draws(scan_maps, measures, seed)
    errors = significance.standard_errors(found.draws)
    row |= {f"{measure}_se": error for measure, error in zip(WITH_ERRORS, errors, strict=True)}
    if scan_maps.is_contrast:
        row["label_p"], n_fixed = significance.label_p(
            scan_maps, measures[0], settings.n_permutations, seed
        )
        if n_fixed:
            log.warning("%s: %d subjects keep their labels in all exchanges", name, n_fixed)


def add_controls(maps: dict[str, Map], found: dict[str, Measured]) -> None:
    """Put beside a contrast's label_p that of the untrained networks, in label_p_untrained."""
    name_of = {each.path: name for name, each in maps.items()}
    for name, each in maps.items():
        path, row = control_path(each.path), found[name].rows[0]
        if "label_p" not in row or path == each.path:
            continue
        of_control = found[name_of[path]].rows[0] if path in name_of else {}
        row["label_p_untrained"] = of_control.get("label_p", np.nan)
        if "label_p" not in of_control:
            log.warning(NO_CONTROL, name)


def differences_of_maps(maps: dict[str, Map], found: dict[str, Measured]) -> pd.DataFrame:
    """Return, for each pair of maps of the same scans, differences with their standard errors."""
    rows, unpaired = [], []
    for one, other in combinations([name for name in maps if found[name].draws is not None], 2):
        scans = [maps[name].scans.drop(columns="map") for name in (one, other)]
        if not scans[0].equals(scans[1]):
            unpaired.append(f"{one} and {other}")
            continue
        errors = significance.standard_errors(found[one].draws - found[other].draws)
        row = {"map": one, "other": other, "n_scans": len(scans[0])}
        for name, error in zip(WITH_ERRORS, errors, strict=True):
            difference = found[one].rows[0][name] - found[other].rows[0][name]
            row |= {f"{name}_difference": difference, f"{name}_difference_se": error}
        rows.append(row)
    if unpaired:
        log.info("maps of different scans have no difference: %s", some_of(unpaired))
    return pd.DataFrame(rows)


def correlations(found: dict[str, Measured]) -> pd.DataFrame:
    """Return the correlation of each two maps in the mask, a row and a column a map."""
    names = list(found)
    values = significance.correlations([each.values for each in found.values()])
    table = pd.DataFrame(values, columns=names)
    table.insert(0, "map", names, allow_duplicates=True)  # a map may be called map
    return table
