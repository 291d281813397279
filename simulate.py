"""Simulate a cohort with planted atrophy, and the truth map of where it was planted.

Every scan is the ICBM152 template (inside nilearn, no download) with other anatomy, a bias field, a
gain and noise. Patients (label 1) lose grey matter to cerebrospinal fluid around the hippocampi,
amygdalae, parahippocampal gyri, posterior cingulate and temporo-parietal cortex; controls
(label 0) a tenth of that, as ageing does.

    python3 simulate.py --outpath ./cohort/
    python3 simulate.py --outpath ./cohort1mm/ --n 20 --voxel 1

Written: sub-0001.nii.gz …, data.csv, truth.nii.gz (binary), truth_weights.nii.gz (the share of
tissue at stake per voxel, 0 to 1), brain.nii.gz (a mask for compare.py) and simulation.json.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

import utils
from comparing.overlap import bounding_box
from loading.image import write_image
from run_folder import files
from run_folder.processes import run_script

ORIGIN_MM = (-96, -132, -78)
GRID_AT_1MM = (193, 229, 193)
REGIONS = {
    #  centre in MNI mm      FWHM in mm
    "hippocampus left": ((-27, -22, -15), 16),
    "hippocampus right": ((27, -22, -15), 16),
    "amygdala left": ((-23, -4, -19), 12),
    "amygdala right": ((23, -4, -19), 12),
    "parahippocampal gyrus left": ((-23, -32, -18), 14),
    "parahippocampal gyrus right": ((23, -32, -18), 14),
    "posterior cingulate": ((0, -48, 28), 20),
    "temporo-parietal cortex left": ((-54, -52, 24), 24),
    "temporo-parietal cortex right": ((54, -52, 24), 24),
}
CONTROL_SEVERITY = 0.1  # of what a patient would draw
TRUTH_THRESHOLD = 0.25  # of the tissue in a voxel at stake: the voxel belongs to the truth
CSF_INTENSITY = 0.15  # of the template's maximum; CSF is dark on T1
DEFORMATION_MM = 1.5  # standard deviation of the displacement that registration leaves
DEFORMATION_FWHM_MM = 25.0
BIAS_SD = 0.05  # standard deviation of the log bias field that correction leaves
BIAS_FWHM_MM = 80.0
GAIN_RANGE = (0.8, 1.2)
NOISE_SD = 0.03  # of the template's maximum, in both Rician channels
FWHM_PER_SD = 2.3548
NEGLIGIBLE = 1e-4  # of a region's tissue: not simulated
MNI_CODE = 4  # NIfTI xform code of MNI 152 space


@dataclass(frozen=True)
class Template:
    """What scans are made from, on the template's own 1 mm grid, smoothed to the cohort's voxel.

    `loss_data` has, per region, the box it fills and in it the change in T1 that losing all its
    tissue makes.
    """

    affine: np.ndarray
    t1_data: np.ndarray  # 0 outside the brain
    brain_data: np.ndarray  # share of brain in each voxel
    loss_data: dict[str, tuple[tuple[slice, ...], np.ndarray]]
    weight_data: np.ndarray  # share of tissue at stake, over all regions


def smooth(data: np.ndarray, fwhm_vox: float) -> np.ndarray:
    """Smooth with a Gaussian of this full width at half maximum, in voxels."""
    return gaussian_filter(data, fwhm_vox / FWHM_PER_SD, mode="nearest", truncate=3)


def load_template(voxel_mm: float) -> Template:
    """Prepare the template: what the scans look like, and what each region can lose."""
    from nilearn import datasets

    t1_img = datasets.load_mni152_template(resolution=1)
    t1_data = np.asarray(t1_img.dataobj, dtype=np.float32)
    t1_data /= t1_data.max()
    brain_data = (t1_data > 0).astype(np.float32)
    grey_img = datasets.load_mni152_gm_template(resolution=1)
    grey_data = np.asarray(grey_img.dataobj, dtype=np.float32).clip(0, 1)
    blur_vox = voxel_mm if voxel_mm > 1 else 0  # a larger voxel averages over more tissue

    kernels = {name: region_kernel(t1_img, *place) for name, place in REGIONS.items()}
    overlap_data = np.maximum(1, sum(kernels.values()))  # no voxel loses more than it has
    loss_data = {}
    for name, kernel_data in kernels.items():
        box = bounding_box(kernel_data > NEGLIGIBLE)
        share_data = grey_data[box] * kernel_data[box] / overlap_data[box] * brain_data[box]
        loss_data[name] = (box, smooth(share_data * (CSF_INTENSITY - t1_data[box]), blur_vox))
    weight_data = grey_data * np.minimum(1, sum(kernels.values())) * brain_data
    return Template(
        t1_img.affine, smooth(t1_data, blur_vox), smooth(brain_data, blur_vox), loss_data,
        smooth(weight_data.astype(np.float32), blur_vox),
    )  # fmt: skip


def region_kernel(img: nib.Nifti1Image, centre_mm: tuple, fwhm_mm: float) -> np.ndarray:
    """Return a Gaussian with maximum 1 at a region's centre."""
    axes_mm = [img.affine[i, 3] + img.affine[i, i] * np.arange(img.shape[i]) for i in range(3)]
    profiles = [
        np.exp(-0.5 * ((axis_mm - centre) * FWHM_PER_SD / fwhm_mm) ** 2).astype(np.float32)
        for axis_mm, centre in zip(axes_mm, centre_mm, strict=True)
    ]
    return np.einsum("i,j,k->ijk", *profiles)


def cohort_grid(voxel_mm: float) -> nib.Nifti1Image:
    """Return an empty image on the grid of the cohort's scans, in MNI space."""
    shape = tuple(int(np.ceil(side / voxel_mm)) for side in GRID_AT_1MM)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = ORIGIN_MM
    like_img = nib.Nifti1Image(np.zeros(shape, dtype=np.float32), affine)
    like_img.set_sform(affine, MNI_CODE)
    like_img.set_qform(affine, MNI_CODE)
    like_img.header.set_xyzt_units("mm")
    return like_img


def smooth_noise(rng: np.random.Generator, shape: tuple, fwhm_vox: float) -> np.ndarray:
    """Return smooth random values with standard deviation 1, drawn coarsely and interpolated."""
    spacing_vox = max(1.0, fwhm_vox / 4)
    coarse_shape = [int(np.ceil(side / spacing_vox)) + 8 for side in shape]
    coarse_data = smooth(rng.standard_normal(coarse_shape), fwhm_vox / spacing_vox)
    coarse_data = (coarse_data / coarse_data.std()).astype(np.float32)
    fine_data = zoom(coarse_data, spacing_vox, order=1)
    margin = [(fine - side) // 2 for fine, side in zip(fine_data.shape, shape, strict=True)]
    return fine_data[tuple(slice(m, m + side) for m, side in zip(margin, shape, strict=True))]


def template_coordinates(template: Template, like_img: nib.Nifti1Image) -> np.ndarray:
    """Return where each voxel of the cohort's grid lies in the template, in template voxels."""
    to_template = np.linalg.inv(template.affine) @ like_img.affine
    grid = np.indices(like_img.shape, dtype=np.float32).reshape(3, -1)
    moved = to_template[:3, :3].astype(np.float32) @ grid + to_template[:3, 3:].astype(np.float32)
    return moved.reshape(3, *like_img.shape)


def simulate_scan(
    template: Template, coordinates: np.ndarray, voxel_mm: float, severities: dict[str, float],
    rng: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """Return one scan, (D, H, W): tissue loss, other anatomy, bias field, gain and noise.

    `coordinates`, (3, D, H, W), are those of its voxels in the template; `severities` say which
    share of its tissue each region loses. It is 0 outside the brain, as skull-stripped scans are.
    """
    shape = coordinates.shape[1:]
    t1_data = template.t1_data.copy()
    for name, (box, change_data) in template.loss_data.items():
        t1_data[box] += severities[name] * change_data
    displaced = coordinates.copy()
    for axis in range(3):  # template voxels are 1 mm
        displaced[axis] += DEFORMATION_MM * smooth_noise(rng, shape, DEFORMATION_FWHM_MM / voxel_mm)
    scan_data = map_coordinates(t1_data, displaced, order=1)
    in_brain = map_coordinates(template.brain_data, displaced, order=1) > 0.5
    scan_data *= np.exp(BIAS_SD * smooth_noise(rng, shape, BIAS_FWHM_MM / voxel_mm))
    scan_data *= rng.uniform(*GAIN_RANGE)
    real = scan_data + NOISE_SD * rng.standard_normal(shape, dtype=np.float32)
    imaginary = NOISE_SD * rng.standard_normal(shape, dtype=np.float32)
    return np.where(in_brain, np.hypot(real, imaginary), 0).astype(np.float32)


def write_truth(
    outpath: Path, template: Template, coordinates: np.ndarray, like_img: nib.Nifti1Image
) -> int:
    """Write truth and brain in the template's own anatomy; return how many voxels are true."""
    weight_data = map_coordinates(template.weight_data, coordinates, order=1)
    truth_data = weight_data > TRUTH_THRESHOLD
    write_image(outpath / "truth_weights.nii.gz", weight_data, like_img)
    write_image(outpath / "truth.nii.gz", truth_data, like_img, np.uint8)
    brain_data = map_coordinates(template.brain_data, coordinates, order=1) > 0.5
    write_image(outpath / "brain.nii.gz", brain_data, like_img, np.uint8)
    return int(truth_data.sum())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    number = utils.number
    parser = utils.make_parser(__doc__, "simulation", "--outpath", "--seed")
    option = parser.add_argument
    # fmt: off
    option("--n", type=number(int, at_least=2), default=120, help="scans, half of them patients")
    option("--voxel", type=number(float, at_least=1, below=20), default=4.0,
           help="voxel side in mm; 1 gives the paper's 193×229×193 grid")
    option("--severity", type=number(float, at_least=0), nargs=2, default=(0.3, 0.7),
           metavar=("LOW", "HIGH"), help="share of a patient's tissue lost, drawn per region")
    # fmt: on
    args = parser.parse_args(argv)
    low, high = args.severity
    if not low <= high <= 1:
        parser.error(f"argument --severity: LOW ≤ HIGH ≤ 1 is needed, got {low:g} {high:g}")
    return args


def main(args: argparse.Namespace) -> None:
    """Simulate a cohort."""
    utils.start_log()
    outpath = files.make_outpath(args.outpath)
    template, like_img = load_template(args.voxel), cohort_grid(args.voxel)
    coordinates = template_coordinates(template, like_img)
    n_true_voxels = write_truth(outpath, template, coordinates, like_img)

    rows, severities_of = [], {}
    for index in utils.progress(range(args.n), "simulating", unit="scan"):
        rng = np.random.default_rng([args.seed, index])
        label = index % 2
        name = f"sub-{index + 1:04d}.nii.gz"
        factor = 1.0 if label == 1 else CONTROL_SEVERITY
        severities = {region: factor * rng.uniform(*args.severity) for region in REGIONS}
        scan_data = simulate_scan(template, coordinates, args.voxel, severities, rng)
        write_image(outpath / name, scan_data, like_img)
        rows.append({"path": name, "label": label})
        severities_of[name] = severities

    files.write_csv(outpath / "data.csv", pd.DataFrame(rows))
    settings = {key: value for key, value in vars(args).items() if key != "outpath"}
    affine = like_img.affine.tolist()
    facts = {"shape": like_img.shape, "affine": affine, "n_true_voxels": n_true_voxels}
    regions = {name: {"centre_mm": mm, "fwhm_mm": fwhm} for name, (mm, fwhm) in REGIONS.items()}
    files.write_json(
        outpath / "simulation.json",
        {"arguments": settings, **facts, "regions": regions, "truth_threshold": TRUTH_THRESHOLD,
         "versions": utils.versions(), "severities": severities_of},
    )  # fmt: skip
    utils.say(outpath / "data.csv")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args()))
