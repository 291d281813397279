"""Ask how well maps overlap a reference, such as a meta-analysis of where the disease strikes.

    python3 compare.py --maps maps/IG_map_all.nii.gz maps/IG_contrast_all.nii.gz \\
        svm/SVM_pattern_all.nii.gz --reference meta_analysis.nii.gz --sign neg pos abs \\
        --fwhm 10 0 --run ./output/ ./svm/ --outpath ./comparison/

Every measure comes with what chance would give, and every map is measured with each --sign and each
--fwhm; tables lead with the first of each, and nothing picks the best. Beside a map that ends in
_all its fold maps (_f0, _f1, …) are measured too, and the map of untrained networks (_random_), its
control, is added. Where heatmap.py --save-subjects left the maps of single scans, measures have
standard errors, and contrasts a p of exchanged labels.

--sign says what counts as evidence: neg is what reads atrophy, which darkens tissue, in maps of IG,
GGC and SVM with --target 1, and pos in the contrast of IG; see docs/reading-maps.md.

    python3 compare.py --maps maps/IG_map_all.nii.gz maps/LRP_map_all.nii.gz --outpath ./stability/

Without --reference the maps are shown, with how stable each is and how they correlate.

    python3 compare.py --run ./modelA24/ ./modelB32/ ./svm/ --outpath ./chosen/

Runs are sorted by their validation loss, which is what a model is chosen by; for two runs of the
same scans the difference of their ROC AUCs has a bootstrap interval.

Written to --outpath: comparison.csv, correlations.csv, differences.csv, dice_curves.png,
settings.png, report.html, compare.log; with --atlas, regions.csv; with --run, runs.csv and
run_differences.csv.
"""

import argparse
import shlex
import sys
import tempfile
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

import utils
from comparing import overlap, page, significance
from comparing import space as spaces
from comparing.runs import Run, differences, load_runs, runs_table
from comparing.significance import ScanMaps
from comparing.space import Map, Space, load_atlas, load_maps, load_space
from loading.image import read_image
from reporting import metrics, pictures
from run_folder import files
from run_folder.processes import run_script
from utils import log

NO_CONTROL = (
    "%s: its label_p says that the groups' maps differ there, not that the networks learned it: "
    "that of untrained networks is to stand beside it (heatmap.py --randomize --save-subjects)"
)
MEASURES = ("dice_matched", "dice_max", "roc_auc", "average_precision", "mass")
WITH_ERRORS = {"dice_matched": overlap.dice_matched, "average_precision": overlap.average_precision}
SHOWN = (
    "map", "sign", "fwhm", "dice_matched", "dice_matched_se", "average_precision",
    "average_precision_se", "roc_auc", "label_p", "label_p_untrained", "shift_p", "fold_r",
    "half_r", "outside",
)  # fmt: skip


def smoothed(img: nib.Nifti1Image, fwhm_mm: float) -> np.ndarray:
    """Return a map's data, (D, H, W), signed, smoothed with a Gaussian of this width."""
    if fwhm_mm:
        from nilearn import image

        img = image.smooth_img(img, fwhm_mm)
    return img.get_fdata(dtype=np.float32)


def measure(args: argparse.Namespace, name: str, each: Map, space: Space) -> list[dict]:
    """Return a map's rows of comparison.csv, one a setting; the first also has its Dice curve."""
    rows, mask_data, inside = [], space.mask_data, space.inside
    for fwhm_mm in args.fwhm:
        signed_data = smoothed(each.img, fwhm_mm)
        of_folds = [smoothed(img, fwhm_mm)[mask_data] for img in each.fold_imgs]
        for sign in args.sign:
            data = overlap.SIGNS[sign](signed_data)
            total = np.abs(data).sum(dtype=np.float64)
            beyond = np.abs(data[~mask_data]).sum(dtype=np.float64)
            row = {"map": name, "sign": sign, "fwhm": fwhm_mm, "n_mask": int(mask_data.sum()),
                   "n_folds": len(of_folds), "fold_r": significance.fold_r(np.array(of_folds)),
                   "outside": beyond / total if total else np.nan}  # fmt: skip
            if inside is not None:
                row |= {"n_reference": int(inside.sum()), "p": inside.mean()}
                row |= overlap.overlap(data[mask_data], inside)
                found = [overlap.overlap(overlap.SIGNS[sign](v), inside) for v in of_folds]
                table = pd.DataFrame(found, columns=MEASURES, dtype=float)
                row |= {f"{m}_folds_mean": table[m].mean() for m in MEASURES}
                row |= {f"{m}_folds_sd": table[m].std() for m in MEASURES}
            if inside is not None and not rows:
                row["shift_p"], row["shift_mean"] = overlap.shift_null(
                    data, mask_data, space.reference_data, args.seed, args.permutations
                )
                row["curve"] = overlap.dice_curve(data[mask_data], inside)[0]
            if row.get("degenerate"):
                log.warning("%s: fewer non-zero voxels than the reference has", name)
            rows.append(row)
    return rows


def judge(
    args: argparse.Namespace, name: str, each: Map, space: Space
) -> tuple[dict, np.ndarray | None]:
    """Say how sure a map's first row is, from its scans' maps; also return its measures' draws.

    Scans are smoothed once, into a file that is removed at the end.
    """
    if each.scans is None:
        return {}, None
    n_values = (len(each.scans), int(space.mask_data.sum()))
    gb = 4e-9 * n_values[0] * n_values[1]
    log.info("%s: maps of %d scans, %.3g GB in --outpath meanwhile", name, n_values[0], gb)
    files.check_room({"maps of scans": (gb, args.outpath)})
    with tempfile.TemporaryDirectory(dir=args.outpath, prefix=files.TEMPORARY_PREFIX) as folder:
        values = np.memmap(Path(folder) / "scans", np.float32, "w+", shape=n_values)
        for row, path in enumerate(utils.progress(each.scans["map"], f"smoothing {name}")):
            values[row] = smoothed(read_image(path, "map"), args.fwhm[0])[space.mask_data]
        scan_maps = ScanMaps(values, each.scans, each.is_contrast)
        if not significance.is_mean_of(
            scan_maps, smoothed(each.img, args.fwhm[0])[space.mask_data]
        ):
            log.warning("%s is not the mean of its scans' maps (--mean equal?): no errors", name)
            return {}, None
        return judge_scans(args, name, scan_maps, space.inside)


def judge_scans(
    args: argparse.Namespace, name: str, scan_maps: ScanMaps, inside: np.ndarray | None
) -> tuple[dict, np.ndarray | None]:
    """Return standard errors, the p of exchanged labels and the halves' correlation, and draws."""
    found = {"n_scans": len(scan_maps.table), "half_r": significance.half_r(scan_maps, args.seed)}
    if inside is None:
        return found, None
    evidence = overlap.SIGNS[args.sign[0]]
    measures = [lambda v, f=f: f(evidence(v), inside) for f in WITH_ERRORS.values()]
    draws = significance.draws(scan_maps, measures, args.seed)
    errors = significance.standard_errors(draws)
    found |= {f"{m}_se": error for m, error in zip(WITH_ERRORS, errors, strict=True)}
    if scan_maps.is_contrast:
        found["label_p"], n_fixed = significance.label_p(
            scan_maps, measures[0], args.permutations, args.seed
        )
        if n_fixed:
            log.warning("%s: %d subjects keep their labels in all exchanges", name, n_fixed)
    return found, draws


def add_controls(table: pd.DataFrame, maps: dict[str, Map]) -> None:
    """Put beside a contrast's label_p that of the untrained networks, in label_p_untrained."""
    label_p = table["label_p"].dropna().set_axis(table.loc[table["label_p"].notna(), "map"])
    for name, each in maps.items():
        path = spaces.control_path(each.path)
        control = next((k for k, m in maps.items() if m.path == path and m is not each), "")
        if name in label_p and control in label_p:
            is_first = (table["map"] == name) & table["label_p"].notna()
            table.loc[is_first, "label_p_untrained"] = label_p[control]
        elif name in label_p and "_random_" not in each.path.name:
            log.warning(NO_CONTROL, name)


def differences_of_maps(
    table: pd.DataFrame, maps: dict[str, Map], draws: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Return, for each pair of maps of the same scans, differences with their standard errors."""
    of_map, rows, unpaired = table.drop_duplicates("map").set_index("map"), [], []
    for one, other in combinations(draws, 2):
        scans = [maps[name].scans.drop(columns="map") for name in (one, other)]
        if not scans[0].equals(scans[1]):
            unpaired.append(f"{one} and {other}")
            continue
        errors = significance.standard_errors(draws[one] - draws[other])
        row = {"map": one, "other": other, "n_scans": len(scans[0])}
        for name, error in zip(WITH_ERRORS, errors, strict=True):
            difference = of_map.loc[one, name] - of_map.loc[other, name]
            row |= {f"{name}_difference": difference, f"{name}_difference_se": error}
        rows.append(row)
    if unpaired:
        log.info("maps of different scans have no difference: %s", utils.some_of(unpaired))
    return pd.DataFrame(rows)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(__doc__, "comparison", "--outpath", "--seed")
    option = parser.add_argument
    # fmt: off
    option("--maps", type=Path, nargs="+", default=[], metavar="FILE",
           help="maps on one grid, such as LRP_map_all.nii.gz")
    option("--reference", type=Path, default=None, metavar="FILE",
           help="the reference map; resampled to the maps' grid if it is on another")
    option("--mask", type=Path, default=None, metavar="FILE",
           help="analysis mask; left out: where at least half of the explained scans are not 0")
    option("--reference-threshold", type=number(float), default=0.0,
           help="the reference is where its map is above this")
    option("--sign", choices=list(overlap.SIGNS), nargs="+", default=["abs"],
           help="what counts as evidence, after --fwhm")
    option("--fwhm", type=number(float, at_least=0), nargs="+", default=[0.0], metavar="MM",
           help="smooth the signed maps with a Gaussian of this width in mm")
    option("--permutations", type=number(int, at_least=1), default=1000,
           help="exchanges of labels, and shifts of maps, that a p is taken from")
    option("--atlas", type=Path, default=None, metavar="FILE", help="label image for regions.csv")
    option("--atlas-labels", type=Path, default=None, metavar="CSV",
           help="number and name of each region of --atlas, with a header row")
    option("--run", type=Path, nargs="+", default=[], metavar="DIR",
           help="folders of train_cv.py or svm.py to compare; the page shows their metrics and "
           "curves. Without --maps only the runs are compared")
    # fmt: on
    args = parser.parse_args(argv)
    if (args.atlas is None) != (args.atlas_labels is None):
        parser.error("--atlas and --atlas-labels go together")
    if (args.reference and not args.maps) or not (args.maps or args.run):
        parser.error("--maps are needed, or --run without --reference")
    for name in ("sign", "fwhm"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"argument --{name}: a value is given twice")
    args.command = shlex.join(["compare.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def main(args: argparse.Namespace) -> None:
    """Compare the runs, then every map with the reference, and draw the page."""
    utils.start_log()
    runs, space = load_runs(args.run), None
    if args.maps:
        maps = load_maps(args.maps)
        space = load_space(maps, args.reference, args.reference_threshold, args.mask)
        atlas = load_atlas(args.atlas, args.atlas_labels, space) if args.atlas else None
        page.completeness_errors(maps)  # a damaged sidecar is refused before anything is written
    files.make_outpath(args.outpath)
    utils.start_log(args.outpath / "compare.log")
    if runs:
        compare_runs(args, runs)
    if space is not None:
        compare_maps(args, maps, space, atlas, runs)


def compare_runs(args: argparse.Namespace, runs: list[Run]) -> None:
    """Write and say how the runs compare."""
    table, pairs = runs_table(runs), differences(runs, args.seed)
    files.write_csv(args.outpath / "runs.csv", table)
    utils.conclude(metrics.as_text(table))
    if len(runs) > 1:
        utils.conclude(
            "sorted by validation loss: choose a model by it, never by the columns test_…"
        )
    if len(pairs):
        files.write_csv(args.outpath / "run_differences.csv", pairs)
        heads = "differences of ROC AUC, with bootstrap intervals by subject:"
        utils.conclude(heads, metrics.as_text(pairs))


def compare_maps(
    args: argparse.Namespace, maps: dict[str, Map], space: Space, atlas: tuple | None,
    runs: list[Run],
) -> None:  # fmt: skip
    """Measure every map in every setting, write the tables and draw the page."""
    log.info("mask: %s, %d voxels", space.mask_source, space.mask_data.sum())
    rows, curves, draws, values, regions = [], {}, {}, {}, []
    with utils.log_above_bars():
        for name, each in utils.progress(maps.items(), "maps"):
            first, *others = measure(args, name, each, space)
            curves[name] = first.pop("curve", None)
            judged, of_draws = judge(args, name, each, space)
            if of_draws is not None:
                draws[name] = of_draws
            rows += [first | judged, *others]
            values[name] = smoothed(each.img, args.fwhm[0])[space.mask_data]
            if atlas is not None:
                evidence = overlap.SIGNS[args.sign[0]](values[name])
                regions += [{"map": name} | row for row in overlap.region_table(evidence, *atlas)]
    table = pd.DataFrame(rows)
    if "label_p" in table:
        add_controls(table, maps)
    tables = {
        "comparison": table,
        "correlations": page.correlations(values),
        "differences": differences_of_maps(table, maps, draws),
        "regions": pd.DataFrame(regions),
    }
    for name, each in tables.items():
        if len(each):
            files.write_csv(args.outpath / f"{name}.csv", each)
    if space.inside is not None:
        p = space.inside.mean()
        pictures.plot_curves(args.outpath / "dice_curves.png", overlap.TOP_FRACTIONS, curves, p)
        pictures.plot_settings(args.outpath / "settings.png", table)
    facts = {
        "Command": args.command,
        "Reference": f"{args.reference}, above {args.reference_threshold:g}; "
        f"{space.inside.sum()} of {len(space.inside)} mask voxels"
        if args.reference else "none was given",
        "Mask": space.mask_source,
        "Evidence": f"--sign {' '.join(args.sign)}, smoothed by "
        f"{' or '.join(f'{fwhm:g}' for fwhm in args.fwhm)} mm; the first of each leads",
        "Background": space.background_source,
        "Versions": ", ".join(f"{k} {v}" for k, v in utils.versions().items()),
        "Made": utils.now(),
    }  # fmt: skip
    page_path = args.outpath / "report.html"
    page.write_page(page_path, facts, tables, runs, maps, space)
    shown = table[[name for name in SHOWN if name in table]]
    utils.conclude(metrics.as_text(shown), *page.verdicts(runs, maps), f"open {page_path}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
