"""The plain difference of the groups: Welch's t of patients minus controls in every voxel.

    python3 ttest.py --path ./data.csv --modelpath ./output/ --outpath ./ttest/ --permutations 1000

Every reader of a heatmap wants it as the yardstick: what do the scans themselves show, without any
network? It is taken in the networks' folds, of the scans that each network trained and validated
on, scaled as for the networks. The scans of one subject are averaged first; subjects with scans of
both labels are left out. With --covariates it is the t of the label in a linear model with them, of
pooled variance. It is no voxel-based morphometry, since nothing is segmented or smoothed,
and a reference made of it would be circular for maps of the same scans.

Every scan is decoded once, into a folder that is removed at the end, and read once, a range of
voxels of all scans at a time.

Written to --outpath: TTEST_map_f*.nii.gz and their mean TTEST_map_all.nii.gz; TTEST_t_all.nii.gz,
the t of all scans, with .json, .png and .html beside both; with --permutations TTEST_p_all.nii.gz,
its family-wise p; splits.csv, run.json, mean_scan.nii.gz, coverage.nii.gz and ttest.log.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import dataset
import utils
from comparing import group_difference
from loading import image
from reporting import maps, mean_maps
from run_folder import folds
from run_folder.processes import run_script
from run_folder.run import RunFolder, new_record
from utils import InputError, log, some_of

ALPHA = 0.05
METHOD, ADJUSTED = "Welch's t", "t beside covariates"
KINDS = ("map", "t")
RESULTS = (
    "TTEST_p_all.nii.gz", "splits.csv", maps.MEAN_SCAN, maps.COVERAGE, "TTEST_map_f*.nii.gz",
    *(f"TTEST_{k}_all.{suffix}" for k in KINDS for suffix in maps.SUFFIXES),
)  # fmt: skip
NOTES = (
    "voxels of whole scans are compared: this is no voxel-based morphometry",
    "as a reference for maps of the same scans it is circular",
)


def find_members(
    cohort: dataset.Cohort, splits: pd.DataFrame
) -> tuple[group_difference.Subjects, np.ndarray]:
    """Return the subjects, and who is in each fold's training and validation and, last, in all.

    An InputError names a fold that has too few subjects of a label.
    """
    subjects = group_difference.average_scans(
        cohort.table.get("subject", cohort.table["path"]), cohort.labels, cohort.covariates
    )
    if len(subjects.left_out):
        log.warning(
            "%d subjects have scans of both labels and are left out: %s", len(subjects.left_out),
            some_of(subjects.left_out),
        )  # fmt: skip
    is_used = [(splits[f"fold_{f}"] != "test").to_numpy() for f in range(folds.count(splits))]
    members = np.array([subjects.having(each) for each in (*is_used, np.ones(len(splits), bool))])
    for number, is_member in enumerate(members):
        place = f"fold {number}" if number < len(is_used) else "the CSV"
        group_difference.check_groups(subjects.labels[is_member], place)
        if subjects.nuisance is not None:
            group_difference.check_model(subjects, is_member, place)
    return subjects, members


def write_maps(
    args: argparse.Namespace, cohort: dataset.Cohort, t: np.ndarray, largest: np.ndarray,
    facts: dict,
) -> list[Path]:  # fmt: skip
    """Write the t of the folds and their mean, that of all scans and its p; return the files."""
    t_data = t.reshape(-1, *cohort.volume_shape)
    sidecar = {"notes": NOTES, "covariates": args.covariates, **facts}
    method = ADJUSTED if args.covariates else METHOD
    written = mean_maps.write_baseline(
        args.outpath, "TTEST_map", t_data[:-1], cohort.like_img, method, sidecar
    )
    if args.permutations:
        p = group_difference.familywise_p(t[-1], largest)
        threshold = float(np.quantile(largest, 1 - ALPHA, method="higher"))
        path, p_data = args.outpath / "TTEST_p_all.nii.gz", p.reshape(cohort.volume_shape)
        image.write_image(path, p_data, cohort.like_img)
        written.append(path)
        n_significant = int((p <= ALPHA).sum())
        sidecar |= {"permutations": args.permutations, "t_at_familywise_0.05": threshold,
                    "n_voxels_significant": n_significant}  # fmt: skip
        log.info(
            "family-wise p of %g: |t| ≥ %.3g, reached by %d voxels", ALPHA, threshold, n_significant
        )
    written += mean_maps.write_baseline(
        args.outpath, "TTEST_t", t_data[-1:], cohort.like_img, method, sidecar | {"n_folds": None}
    )
    return written


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = utils.make_parser(
        __doc__, "group difference", *utils.OF_COHORT, "--outpath", "--seed", "--workers",
        "--cache-dir", "--covariates", "--overwrite",
    )  # fmt: skip
    folds.add_options(parser)
    parser.add_argument(
        "--permutations", type=utils.number(int, at_least=0), default=0,
        help="permutations of subjects' labels that the family-wise p is taken from; 0: no p",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Compare the groups in every fold and in all scans."""
    utils.start_log()
    if utils.world_size() > 1:
        raise InputError("ttest.py runs as one process: start it without torchrun")
    cohort = dataset.read_cohort(args.path, dataset.Wanted.of(vars(args)))
    splits = folds.choose(
        args.modelpath, cohort.table, cohort.scans, args.fold, args.val_fraction, args.seed
    )
    subjects, members = find_members(cohort, splits)
    facts = {"model": METHOD, "n_folds": folds.count(splits), **cohort.facts(args.path)}
    record = new_record("ttest.py", vars(args), **facts)
    run = RunFolder(args.outpath, "run", record, (), RESULTS)
    if run.check(args.overwrite):
        raise InputError(f"{args.outpath} holds a run: choose another --outpath, or --overwrite")
    volumes = cohort.volumes(args.cache_dir or args.outpath / ".cache", args.workers)
    volumes.check_room()
    run.start(args.overwrite, {"splits.csv": splits.assign(path=cohort.table["path"])})
    utils.start_log(args.outpath / "ttest.log")

    with utils.log_above_bars():
        volumes.fill()
        folds.check_scans(args.modelpath, volumes.table()["crc32"].set_axis(splits["path"]))
        exchanges = subjects.exchanged(args.permutations, args.seed)
        t, largest, mean, coverage = group_difference.compare(volumes, subjects, members, exchanges)
    volumes.remove(is_own=args.cache_dir is None)

    mean_maps.write_background(args.outpath, mean, coverage, cohort.like_img)
    counts = {f"n_{name}": int((subjects.labels == label).sum())
              for name, label in (("patients", 1), ("controls", 0))}  # fmt: skip
    written = write_maps(args, cohort, t, largest, counts)
    following = utils.command(
        "compare.py", args, maps=[path for path in written if path.name.endswith("_all.nii.gz")
                                  and "_p_" not in path.name],
        outpath=args.outpath / "comparison",
    )  # fmt: skip
    with run.finish():
        utils.conclude(*written, f"next: {following}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
