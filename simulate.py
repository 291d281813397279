"""Simulate a cohort with planted atrophy, and the truth map of where it was planted.

    python3 simulate.py --outpath ./cohort/
    python3 simulate.py --outpath ./cohort1mm/ --n 20 --voxel 1

Every scan is the ICBM152 template (inside nilearn, no download) with other anatomy, a bias field, a
gain and noise. Patients (label 1) lose grey matter to cerebrospinal fluid around the hippocampi,
amygdalae, parahippocampal gyri, posterior cingulate and temporo-parietal cortex; controls
(label 0) a tenth of that, as ageing does.

    python3 simulate.py --scans controls.csv --copies 3 --outpath ./planted/
    python3 simulate.py --scans controls.csv --region hippocampus.nii.gz --outpath ./planted/

With --scans the same loss is planted into your own scans of controls, in MNI space: half of the
subjects become patients, the other half lose nothing. Which map finds a lesion that is known, in
these scans with this preprocessing?

Written: sub-0001.nii.gz …, data.csv, truth.nii.gz (binary), truth_weights.nii.gz (the share of
tissue at stake per voxel, 0 to 1), brain.nii.gz (a mask for compare.py), foci.txt (a made-up
literature for meta.py) and simulation.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import SpatialImage
from scipy.ndimage import map_coordinates

import dataset
import utils
from loading import image
from loading.simulated import planted_copies, simulate_scan
from loading.template import (
    REGIONS,
    TRUTH_THRESHOLD,
    InBox,
    Template,
    cohort_grid,
    load_template,
    made_up_literature,
    region_shares,
    template_coordinates,
)
from run_folder import files
from run_folder.processes import run_script
from utils import InputError, derived_seed, some_of

CONTROL_SEVERITY = 0.1  # of what a patient would draw
DEFORMATION_MM = 1.5  # standard deviation of the displacement that registration leaves
N_SCANS, VOXEL_MM = 120, 4.0
MIN_OVERLAP = 0.5  # of the template's brain, that a given scan must fill


def draw_severities(
    names: list[str], severity: tuple[float, float], spare: float, factor: float,
    rng: np.random.Generator, sparing: np.random.Generator,
) -> dict[str, float]:  # fmt: skip
    """Draw which share of its tissue each region loses, 0 where it is spared."""
    lost = {name: factor * rng.uniform(*severity) for name in names}
    return {name: share * (sparing.random() >= spare) for name, share in lost.items()}


def simulate_cohort(args: argparse.Namespace) -> None:
    """Simulate scans from the template, and write them."""
    outpath = files.make_outpath(args.outpath)
    template, like_img = load_template(args.voxel), cohort_grid(args.voxel)
    coordinates = template_coordinates(template, like_img)
    rows, severities_of = [], {}
    for index in utils.progress(range(args.n), "simulating", unit="scan"):
        rng = np.random.default_rng([args.seed, index])
        sparing = np.random.default_rng(derived_seed(args.seed, index, purpose="spared regions"))
        label = index % 2
        name = f"sub-{index + 1:04d}.nii.gz"
        factor, spare = (1.0, args.spare) if label == 1 else (CONTROL_SEVERITY, 0.0)
        drawn = draw_severities(list(REGIONS), args.severity, spare, factor, rng, sparing)
        scan_data = simulate_scan(template, coordinates, args.voxel, drawn, args.deformation, rng)
        image.write_image(outpath / name, scan_data, like_img)
        rows.append({"path": name, "label": label})
        severities_of[name] = drawn
    weight_data = map_coordinates(template.weight_data, coordinates, order=1)
    facts = {
        "regions": {n: {"centre_mm": mm, "fwhm_mm": fwhm} for n, (mm, fwhm) in REGIONS.items()},
        "severities": severities_of,
    }
    write_cohort(args, rows, weight_data, template, coordinates, like_img, facts)


def parent_of(scan: str) -> Path:
    """Return the folder that a scan lies in."""
    return Path(scan).resolve().parent


def read_controls(args: argparse.Namespace) -> dataset.Cohort:
    """Read the given scans, at least two subjects; an InputError names patients among them."""
    cohort = dataset.read_cohort(args.scans, dataset.Wanted(columns=args.columns))
    patients = cohort.table["path"][cohort.labels == 1]
    if len(patients):
        rule = "--scans takes controls, label 0, to plant atrophy into"
        raise InputError(f"{rule}: {len(patients)} scans have label 1: {some_of(patients)}")
    if cohort.table.get("subject", cohort.table["path"]).nunique() < 2:
        raise InputError(f"{args.scans} has one subject; half of them are to become patients")
    if args.outpath.resolve() in (args.scans.resolve().parent, *map(parent_of, cohort.scans)):
        raise InputError(f"--outpath {args.outpath} holds the given scans: choose another folder")
    return cohort


def find_fluid(cohort: dataset.Cohort, template: Template, coordinates: np.ndarray) -> list[float]:
    """Return the intensity of cerebrospinal fluid in each of the given scans.

    An InputError names scans that do not lie where the template's brain is.
    """
    in_brain = map_coordinates(template.brain_data, coordinates, order=1) > 0.5
    is_fluid = map_coordinates(template.csf_data.astype(np.float32), coordinates, order=1) > 0.5
    voxel_mm3 = abs(np.linalg.det(cohort.like_img.affine[:3, :3]))
    least = MIN_OVERLAP * template.brain_data.sum() / voxel_mm3
    elsewhere, fluid = [], []
    for path, scan in utils.progress(list(zip(cohort.table["path"], cohort.scans, strict=True))):
        scan_data = image.read_image(Path(scan), "scan").get_fdata(dtype=np.float32)
        if (in_brain & (scan_data != 0)).sum() < least:
            elsewhere.append(path)
        values = scan_data[is_fluid & (scan_data != 0)]
        fluid.append(float(np.median(values)) if values.size else np.nan)
    if elsewhere:
        rule = "scans must be in MNI space: less than half of the template's brain is in"
        raise InputError(f"{rule} {some_of(elsewhere)}")
    if np.isnan(fluid).any():
        lacking = cohort.table["path"][np.isnan(fluid)]
        raise InputError(f"no voxel holds cerebrospinal fluid alone in {some_of(lacking)}")
    return fluid


def find_shares(
    args: argparse.Namespace, template: Template, coordinates: np.ndarray, like_img: SpatialImage
) -> tuple[dict[str, InBox], np.ndarray]:
    """Return by region, and in all, the share of each voxel that patients can lose."""
    if args.region is None:
        weight_data = map_coordinates(template.weight_data, coordinates, order=1)
        return region_shares(template, coordinates), weight_data
    region_img = image.read_image(args.region, "region mask")
    if not image.same_space(region_img, like_img):
        grids = "\nand\n".join(f"{img.shape}\n{img.affine}" for img in (region_img, like_img))
        raise InputError(f"--region {args.region} is not on the scans' grid:\n{grids}")
    weight_data = region_img.get_fdata(dtype=np.float32).clip(0, 1)
    if not (weight_data > TRUTH_THRESHOLD).any():
        raise InputError(f"--region {args.region} has no voxel above {TRUTH_THRESHOLD}")
    return {args.region.name: ((slice(None),) * 3, weight_data)}, weight_data


def plant_into_scans(args: argparse.Namespace) -> None:
    """Plant atrophy into given scans of controls, and write them."""
    cohort = read_controls(args)
    template = load_template(float(voxel_sizes(cohort.like_img.affine).mean()))
    coordinates = template_coordinates(template, cohort.like_img)
    fluid = find_fluid(cohort, template, coordinates)
    shares, weight_data = find_shares(args, template, coordinates, cohort.like_img)
    subjects = cohort.table.get("subject", cohort.table["path"])
    names = subjects.unique()
    drawn = np.random.default_rng(derived_seed(args.seed, purpose="patients"))
    patients = set(drawn.permutation(len(names))[: len(names) // 2])
    files.make_outpath(args.outpath)
    rows, severities_of, n_seen = [], {}, dict.fromkeys(names, 0)
    for row, scan in enumerate(utils.progress(cohort.scans, "planting", unit="scan")):
        number = int(np.flatnonzero(names == subjects[row])[0])
        rng, sparing, deforming = (
            np.random.default_rng(derived_seed(args.seed, *keys, purpose=purpose))
            for keys, purpose in (((number,), "severities"), ((number,), "spared regions"),
                                  ((row,), "copies"))
        )  # fmt: skip
        factor = float(number in patients)
        lost = draw_severities(list(shares), args.severity, args.spare, factor, rng, sparing)
        loss_data = np.zeros(cohort.volume_shape, dtype=np.float32)
        for name, (box, share_data) in shares.items():
            loss_data[box] += lost[name] * share_data
        n_seen[subjects[row]] += 1
        scan_data = image.read_image(Path(scan), "scan").get_fdata(dtype=np.float32)
        copies = planted_copies(
            scan_data, loss_data, fluid[row], cohort.like_img.affine, args.deformation, args.copies,
            deforming,
        )  # fmt: skip
        for copy, copy_data in enumerate(copies, 1):
            file = f"sub-{number + 1:04d}_scan-{n_seen[subjects[row]]}_copy-{copy}.nii.gz"
            image.write_image(args.outpath / file, copy_data, cohort.like_img)
            rows.append({"path": file, "label": int(factor), "subject": subjects[row]})
            severities_of[file] = {"scan": scan, "fluid": fluid[row], **lost}
    facts = {"severities": severities_of}
    write_cohort(args, rows, weight_data, template, coordinates, cohort.like_img, facts)


def write_cohort(
    args: argparse.Namespace, rows: list[dict], weight_data: np.ndarray, template: Template,
    coordinates: np.ndarray, like_img: SpatialImage, facts: dict,
) -> None:  # fmt: skip
    """Write truth and brain in the template's own anatomy, the CSV and what was drawn."""
    truth_data = weight_data > TRUTH_THRESHOLD
    brain_data = map_coordinates(template.brain_data, coordinates, order=1) > 0.5
    image.write_image(args.outpath / "truth_weights.nii.gz", weight_data, like_img)
    image.write_image(args.outpath / "truth.nii.gz", truth_data, like_img, np.uint8)
    image.write_image(args.outpath / "brain.nii.gz", brain_data, like_img, np.uint8)
    files.write_csv(args.outpath / "data.csv", pd.DataFrame(rows))
    if args.region is None:
        literature = made_up_literature(args.seed)
        files.write_bytes(args.outpath / "foci.txt", literature.encode())
    given = {key: value for key, value in vars(args).items() if value not in (None, [])}
    settings = {key: value for key, value in given.items() if key != "outpath"}
    general = {
        "arguments": settings, "shape": like_img.shape, "affine": like_img.affine.tolist(),
        "n_true_voxels": int(truth_data.sum()), "truth_threshold": TRUTH_THRESHOLD,
        "versions": utils.versions(),
    }  # fmt: skip
    files.write_json(args.outpath / "simulation.json", general | facts)
    utils.say(args.outpath / "data.csv")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(__doc__, "simulation", "--outpath", "--seed", "--columns")
    option = parser.add_argument
    # fmt: off
    option("--n", type=number(int, at_least=2), default=None,
           help=f"scans, half of them patients; left out: {N_SCANS}")
    option("--voxel", type=number(float, at_least=1, below=20), default=None,
           help="voxel side in mm; 1 gives the paper's 193×229×193 grid; left out: "
                f"{VOXEL_MM:g}")
    option("--scans", type=Path, default=None, metavar="CSV",
           help="plant atrophy into these scans of controls: one a row, NIfTI file in MNI space, "
                "label 0, optional subject")
    option("--copies", type=number(int, at_least=1), default=None,
           help="of each of --scans: the scan itself and, of one subject with it, deformed ones; "
                "left out: 1")
    option("--region", type=Path, default=None, metavar="MASK",
           help="the tissue that patients of --scans can lose, 0 to 1 on their grid; left out: "
                "the template's grey matter in nine regions")
    option("--severity", type=number(float, at_least=0), nargs=2, default=(0.3, 0.7),
           metavar=("LOW", "HIGH"), help="share of a patient's tissue lost, drawn per region")
    option("--spare", type=number(float, at_least=0), default=0.0,
           help="chance that a patient's region is spared")
    option("--deformation", type=number(float, at_least=0), default=DEFORMATION_MM,
           help="standard deviation of the displacement that registration leaves, in mm")
    # fmt: on
    args = parser.parse_args(argv)
    low, high = args.severity
    if not low <= high <= 1:
        parser.error(f"argument --severity: LOW ≤ HIGH ≤ 1 is needed, got {low:g} {high:g}")
    if args.spare > 1:
        parser.error(f"argument --spare: must be at most 1, got {args.spare:g}")
    of_template = [name for name in ("n", "voxel") if getattr(args, name) is not None]
    of_scans = [name for name in ("copies", "region") if getattr(args, name) is not None]
    if args.scans and of_template:
        parser.error(f"argument --{of_template[0]}: not with --scans")
    if not args.scans and of_scans:
        parser.error(f"argument --{of_scans[0]}: only with --scans")
    defaults = {"copies": 1} if args.scans else {"n": N_SCANS, "voxel": VOXEL_MM}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def main(args: argparse.Namespace) -> None:
    """Simulate a cohort, from the template or from given scans."""
    utils.start_log()
    if args.scans is None:
        simulate_cohort(args)
    else:
        plant_into_scans(args)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
