"""The ICBM152 template inside nilearn: where tissue can be lost, on its grid and on others."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import distance_transform_edt, find_objects, gaussian_filter, map_coordinates

from utils import derived_seed

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
TRUTH_THRESHOLD = 0.25  # of the tissue in a voxel at stake: the voxel belongs to the truth
CSF_INTENSITY = 0.15  # of the template's maximum; CSF is dark on T1
CSF_TISSUE = 0.1  # grey and white matter in a voxel, below which it is cerebrospinal fluid
CSF_DEPTH_MM = 3.0  # below the brain's surface
FWHM_PER_SD = 2.3548
NEGLIGIBLE = 1e-4  # of a region's tissue: not simulated
N_EXPERIMENTS, MAX_FOCI, N_SUBJECTS = 79, 12, (8, 61)  # of a made-up literature
FOCUS_SD_MM, NEAR_SHARE = 6.0, 0.7  # around a planted region, and how many lie there
MNI_CODE = 4  # NIfTI xform code of MNI 152 space


InBox = tuple[tuple[slice, ...], np.ndarray]  # a box of voxels, and the values in it


@dataclass(frozen=True)
class Template:
    """What scans are made from, on the template's own 1 mm grid, smoothed to the cohort's voxel.

    Per region, the box it fills has in `share_data` the share of each voxel that is its tissue, and
    in `loss_data` the change in T1 that losing all of it makes.
    """

    affine: np.ndarray
    t1_data: np.ndarray  # 0 outside the brain
    brain_data: np.ndarray  # share of brain in each voxel
    share_data: dict[str, InBox]
    loss_data: dict[str, InBox]
    weight_data: np.ndarray  # share of tissue at stake, over all regions
    csf_data: np.ndarray  # where there is fluid, well inside the brain; not smoothed


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
    grey_data, white_data = (
        np.asarray(load(resolution=1).dataobj, dtype=np.float32).clip(0, 1)
        for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    is_deep = distance_transform_edt(brain_data) >= CSF_DEPTH_MM  # voxels are 1 mm
    blur_vox = voxel_mm if voxel_mm > 1 else 0  # a larger voxel averages over more tissue

    kernels = {name: region_kernel(t1_img, *place) for name, place in REGIONS.items()}
    overlap_data = np.maximum(1, sum(kernels.values()))  # no voxel loses more than it has
    share_data, loss_data = {}, {}
    for name, kernel_data in kernels.items():
        (box,) = find_objects((kernel_data > NEGLIGIBLE).astype(np.uint8))
        share = grey_data[box] * kernel_data[box] / overlap_data[box] * brain_data[box]
        share_data[name] = (box, smooth(share, blur_vox))
        loss_data[name] = (box, smooth(share * (CSF_INTENSITY - t1_data[box]), blur_vox))
    weight_data = grey_data * np.minimum(1, sum(kernels.values())) * brain_data
    return Template(
        t1_img.affine, smooth(t1_data, blur_vox), smooth(brain_data, blur_vox), share_data,
        loss_data, smooth(weight_data.astype(np.float32), blur_vox),
        (grey_data + white_data < CSF_TISSUE) & is_deep,
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


def template_coordinates(template: Template, like_img: nib.Nifti1Image) -> np.ndarray:
    """Return where each voxel of a grid lies in the template, in its voxels, (3, D, H, W)."""
    to_template = np.linalg.inv(template.affine) @ like_img.affine
    grid = np.indices(like_img.shape, dtype=np.float32).reshape(3, -1)
    moved = to_template[:3, :3].astype(np.float32) @ grid + to_template[:3, 3:].astype(np.float32)
    return moved.reshape(3, *like_img.shape)


def region_shares(template: Template, coordinates: np.ndarray) -> dict[str, InBox]:
    """Return each region's share of tissue on the grid of `template_coordinates`."""
    found = {}
    for name, (box, share_data) in template.share_data.items():
        whole_data = np.zeros_like(template.weight_data)
        whole_data[box] = share_data
        on_grid_data = map_coordinates(whole_data, coordinates, order=1)
        for box in find_objects((on_grid_data > 0).astype(np.uint8)):
            found[name] = (box, on_grid_data[box])
    return found


def made_up_literature(seed: int) -> str:
    """Return foci of made-up experiments, in the text format of Sleuth, for meta.py.

    Most lie near the planted regions, the others anywhere in grey matter.
    """
    from nilearn import datasets

    rng = np.random.default_rng(derived_seed(seed, purpose="literature"))
    grey_img = datasets.load_mni152_gm_mask(resolution=2)
    anywhere_mm = apply_affine(grey_img.affine, np.argwhere(grey_img.get_fdata() > 0))
    centres_mm = np.array([centre for centre, _ in REGIONS.values()], dtype=float)
    lines = ["//Reference=MNI"]
    for number in range(1, N_EXPERIMENTS + 1):
        n_foci = rng.integers(1, MAX_FOCI + 1)
        near_mm = rng.choice(centres_mm, n_foci) + rng.normal(0, FOCUS_SD_MM, (n_foci, 3))
        is_near = rng.random(n_foci) < NEAR_SHARE
        foci_mm = np.where(is_near[:, None], near_mm, rng.choice(anywhere_mm, n_foci))
        lines += [f"//Made-up experiment {number}", f"//Subjects={rng.integers(*N_SUBJECTS)}"]
        lines += [" ".join(f"{mm:.0f}" for mm in focus) for focus in foci_mm] + [""]
    return "\n".join(lines)
