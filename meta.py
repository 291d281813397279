"""Make a meta-analysis map of published coordinates: activation likelihood estimation (ALE).

    python3 meta.py --foci foci.txt --like ./maps/mean_scan.nii.gz --outpath ./meta/
    python3 compare.py --maps ./maps/IG_map_all.nii.gz --reference ./meta/reference.nii.gz \\
        --outpath ./comparison/

The text file is the one of Sleuth and GingerALE: a reference space, then for each experiment its
title, its number of subjects, and its foci; see docs/meta-analysis.md. Where do the foci of many
experiments lie more densely than foci anywhere in grey matter would? The analysis is on the 2 mm
grid of nilearn's grey-matter mask. Clusters survive if clusters as large are rare when all foci are
moved at random within the mask.

Written to --outpath: ale.nii.gz, z.nii.gz, reference.nii.gz (the surviving clusters, a mask for
compare.py), with --like reference_like.nii.gz on that image's grid, clusters.csv, experiments.csv,
meta.png, meta.pdf, meta.html, meta.json (all parameters, and a methods paragraph) and meta.log. An
interrupted run begins anew.
"""

import argparse
import html
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from scipy.ndimage import label, maximum_position

import utils
from comparing import ale, sleuth
from comparing.sleuth import Experiment
from comparing.space import average_over_voxels
from loading import image
from reporting import map_pictures
from run_folder import files
from run_folder.processes import run_script
from utils import log, some_of

THRESHOLD, ALPHA, N_PERMUTATIONS = 0.001, 0.05, 1000
VOXEL_MM = 2
MUCH_OUTSIDE = 0.2  # of the foci: the reference space may be wrong
AT_ONCE = 10  # permutations a worker does before it reports
SHOWN_Z = 1.645
HEADING = '<div style="font: 15px system-ui, sans-serif; padding: 6px 10px"><b>{}</b><br>{}</div>'
METHODS = (
    "Coordinates of {n_experiments} experiments with {n_subjects} subjects and {n_foci} foci were "
    "meta-analysed by activation likelihood estimation (Eickhoff et al. 2009, "
    "doi:10.1002/hbm.20718; Turkeltaub et al. 2012, doi:10.1002/hbm.21186) on a {voxel} mm grid "
    "within a grey-matter mask. {converted}p values came from the histograms of the modelled "
    "activations (Eickhoff et al. 2012, doi:10.1016/j.neuroimage.2011.09.017). Clusters of voxels "
    "with p < {threshold:g} were kept at a family-wise error of {alpha:g}, from the largest "
    "clusters of {permutations} analyses with all foci moved at random within the mask: "
    "{n_clusters} of at least {size_mm3:.0f} mm³."
)


@dataclass(frozen=True)
class Literature:
    """The experiments on the analysis grid."""

    mask_img: nib.Nifti1Image
    mask_data: np.ndarray
    table: pd.DataFrame  # experiments.csv
    foci_vox: list[np.ndarray]  # of experiments with foci
    cubes: list[np.ndarray]


def place(experiments: list[Experiment]) -> Literature:
    """Bring the foci to the grid; say what is odd about them."""
    from nilearn import datasets

    loaded_img = datasets.load_mni152_gm_mask(resolution=VOXEL_MM)
    mask_data = loaded_img.get_fdata() > 0
    rows, foci_vox, cubes = [], [], []
    for each in experiments:
        mni_mm = each.foci_mm if each.space == "MNI" else ale.from_talairach(each.foci_mm)
        voxels = np.rint(apply_affine(np.linalg.inv(loaded_img.affine), mni_mm)).astype(int)
        is_on_grid = ((voxels >= 0) & (voxels < mask_data.shape)).all(1)
        is_inside = is_on_grid.copy()
        is_inside[is_on_grid] = mask_data[tuple(voxels[is_on_grid].T)]
        outside = [" ".join(f"{mm:g}" for mm in focus) for focus in each.foci_mm[~is_inside]]
        rows.append({"experiment": each.name, "n_subjects": each.n_subjects, "space": each.space,
                     "n_foci": len(voxels), "n_outside": len(outside),
                     "outside": "; ".join(outside), "line": each.line})  # fmt: skip
        if len(voxels):
            foci_vox.append(voxels)
            cubes.append(ale.kernel(each.n_subjects, VOXEL_MM))
    table = pd.DataFrame(rows)
    warn_of(table)
    mask_img = nib.Nifti1Image(mask_data.astype(np.uint8), loaded_img.affine)
    return Literature(mask_img, mask_data, table, foci_vox, cubes)


def warn_of(table: pd.DataFrame) -> None:
    """Say which experiments have one name or no foci, and how many foci lie outside the mask."""
    log.info("%d experiments, %d foci", len(table), table["n_foci"].sum())
    twice = table["experiment"][table["experiment"].duplicated()].unique()
    if len(twice):
        log.warning("experiments of one name stay separate: %s", some_of(twice))
    empty = table["experiment"][table["n_foci"] == 0]
    if len(empty):
        log.warning("%d experiments have no foci: %s", len(empty), some_of(empty))
    n_outside, n_foci = int(table["n_outside"].sum()), int(table["n_foci"].sum())
    if n_outside:
        say = log.warning if n_outside > MUCH_OUTSIDE * n_foci else log.info
        advice = "; the reference space may be wrong" * (n_outside > MUCH_OUTSIDE * n_foci)
        say("%d of %d foci lie outside the mask, see experiments.csv%s", n_outside, n_foci, advice)


def permuted_sizes(literature: Literature, least: float, seed: int, numbers: range) -> list[int]:
    """Return the sizes of the largest clusters of some permutations; for a worker process."""
    inside, counts = np.argwhere(literature.mask_data), [len(f) for f in literature.foci_vox]
    keys = [utils.derived_seed(seed, number, purpose="foci") for number in numbers]
    return [
        ale.permuted_size(
            np.random.default_rng(key), counts, literature.cubes, literature.mask_data, inside,
            least,
        )
        for key in keys
    ]  # fmt: skip


def null_sizes(args: argparse.Namespace, literature: Literature, least: float) -> np.ndarray:
    """Return the largest clusters of all permutations, whatever the number of workers."""
    starts = range(0, args.permutations, AT_ONCE)
    parts = [range(start, min(start + AT_ONCE, args.permutations)) for start in starts]
    work = partial(permuted_sizes, literature, least, args.seed)
    with ProcessPoolExecutor(utils.N_WORKERS) as pool:
        done = utils.progress(pool.map(work, parts), "permutations", total=len(parts))
        return np.array([size for sizes in done for size in sizes])


def find_clusters(
    literature: Literature, is_above: np.ndarray, z_data: np.ndarray, sizes: np.ndarray,
    alpha: float,
) -> tuple[pd.DataFrame, np.ndarray]:  # fmt: skip
    """Return clusters.csv, largest first, and the mask of the clusters that survive."""
    numbers, n_clusters = label(is_above)
    n_voxels = np.bincount(numbers.ravel(), minlength=n_clusters + 1)
    rows, surviving = [], np.zeros_like(is_above)
    for number in np.argsort(-n_voxels[1:], kind="stable") + 1:
        peak = maximum_position(z_data, numbers, number)
        p = (1 + int((sizes >= n_voxels[number]).sum())) / (1 + len(sizes))
        place_mm = dict(zip("xyz", apply_affine(literature.mask_img.affine, peak), strict=True))
        rows.append({"cluster": len(rows) + 1, **place_mm, "z_value": z_data[peak],
                     "volume_mm3": n_voxels[number] * VOXEL_MM**3, "p": p,
                     "survives": int(p <= alpha)})  # fmt: skip
        surviving |= (numbers == number) & (p <= alpha)
    columns = ["cluster", "x", "y", "z", "z_value", "volume_mm3", "p", "survives"]
    return pd.DataFrame(rows, columns=None if rows else columns), surviving


def draw(outpath: Path, z_img: nib.Nifti1Image, reference_img: nib.Nifti1Image, title: str) -> None:
    """Draw the z map with the outline of what survives, and its viewer."""
    from nilearn import datasets
    from nilearn.image import resample_to_img

    background_img = resample_to_img(
        datasets.load_mni152_template(VOXEL_MM), z_img, force_resample=True, copy_header=True
    )
    limit = max(map_pictures.color_limit(z_img.get_fdata()), SHOWN_Z)
    stem, has_any = outpath / "meta", bool(reference_img.get_fdata().any())
    map_pictures.draw_slices(
        stem, z_img, background_img, title, "z", limit, SHOWN_Z, reference_img if has_any else None
    )
    heading = HEADING.format(
        html.escape(title), html.escape(map_pictures.said_of("z", SHOWN_Z, limit))
    )
    map_pictures.write_viewer(stem, z_img, background_img, heading, limit, SHOWN_Z)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(__doc__, "meta-analysis", "--outpath", "--seed")
    option = parser.add_argument
    # fmt: off
    option("--foci", type=Path, required=True, metavar="FILE",
           help="coordinates as Sleuth and GingerALE have them")
    option("--like", type=Path, default=None, metavar="IMAGE",
           help="write the reference on this image's grid, too")
    option("--threshold", type=number(float, above=0, below=0.5), default=THRESHOLD,
           help="p below which voxels form clusters")
    option("--permutations", type=number(int, at_least=1), default=N_PERMUTATIONS,
           help="analyses of foci moved at random, that the clusters' p is taken from")
    option("--alpha", type=number(float, above=0, below=1), default=ALPHA,
           help="family-wise p at which clusters survive")
    # fmt: on
    args = parser.parse_args(argv)
    if 1 / (1 + args.permutations) > args.alpha:
        parser.error(f"argument --permutations: {args.permutations} cannot give a p of --alpha")
    return args


def main(args: argparse.Namespace) -> None:
    """Make the map, its null, and the clusters that survive."""
    utils.start_log()
    literature = place(sleuth.read_experiments(args.foci))
    like_img = image.read_image(args.like, "--like image") if args.like else None
    files.make_outpath(args.outpath)
    utils.start_log(args.outpath / "meta.log")
    mask_data, grid_img = literature.mask_data, literature.mask_img

    total_data = ale.ale_map(literature.foci_vox, literature.cubes, mask_data.shape) * mask_data
    survival = ale.null_survival(literature.foci_vox, literature.cubes, mask_data)
    z_data = ale.z_of(ale.p_of(total_data, survival)) * mask_data
    least = ale.least_of(survival, args.threshold)
    with utils.log_above_bars():
        sizes = null_sizes(args, literature, least)
    is_above = (total_data >= least) & mask_data
    clusters, surviving = find_clusters(literature, is_above, z_data, sizes, args.alpha)

    maps = {"ale": -np.expm1(-total_data), "z": z_data}
    for name, data in maps.items():
        labels = map_pictures.color_labels(data, name, f"ALE of {args.foci.name}: {name}")
        image.write_image(args.outpath / f"{name}.nii.gz", data, grid_img, labels=labels)
    image.write_image(args.outpath / "reference.nii.gz", surviving, grid_img, np.uint8)
    if like_img is not None:
        share = average_over_voxels(surviving, grid_img.affine, like_img)
        path = args.outpath / "reference_like.nii.gz"
        image.write_image(path, share > 0.5, like_img, np.uint8)
    files.write_csv(args.outpath / "experiments.csv", literature.table)
    files.write_csv(args.outpath / "clusters.csv", clusters)
    table, n_surviving = literature.table, int(clusters["survives"].sum())
    z_img, reference_img = (nib.Nifti1Image(data.astype(np.float32), grid_img.affine)
                            for data in (z_data, surviving))  # fmt: skip
    title = f"ALE of {len(table)} experiments, {table['n_foci'].sum()} foci; green: {n_surviving} "
    draw(args.outpath, z_img, reference_img, f"{title}clusters survive")
    facts = {
        "n_experiments": len(table), "n_foci": int(table["n_foci"].sum()),
        "n_subjects": int(table["n_subjects"].sum()), "threshold": args.threshold,
        "alpha": args.alpha, "permutations": args.permutations, "voxel": VOXEL_MM,
        "n_clusters": n_surviving,
        "size_mm3": float(np.quantile(sizes, 1 - args.alpha, method="higher")) * VOXEL_MM**3,
        "converted": "Talairach coordinates were converted to MNI space (Lancaster et al. 2007, "
        "doi:10.1002/hbm.20345). " * bool((table["space"] == "Talairach").any()),
    }  # fmt: skip
    methods = METHODS.format(**facts)
    given = {key: str(value) if isinstance(value, Path) else value
             for key, value in vars(args).items()}  # fmt: skip
    files.write_json(
        args.outpath / "meta.json",
        {"arguments": given, "foci_sha256": files.sha256(args.foci), **facts,
         "least_ale": float(-np.expm1(-least)), "methods": methods,
         "versions": utils.versions(), "made": utils.now()},
    )  # fmt: skip
    if not n_surviving:
        log.warning("no cluster survives: reference.nii.gz is empty")
    utils.conclude(methods, args.outpath / "reference.nii.gz")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
