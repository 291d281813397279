"""What report.html shows, read and checked: runs, what is known of maps, and their volumes."""

import base64
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from nibabel.spatialimages import SpatialImage
from nilearn import datasets, image

import files
import utils
from errors import InputError
from pictures import color_limit

SHOWN_VOXEL_MM = 2.0  # slices in report.html are no finer: it stays small
METRICS_SHOWN = ("roc_auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity")
SUMMARY_ROWS = ("pooled", "pooled_low", "pooled_high", "mean", "sd")
PICTURES = {"loss_curves.png": "losses per epoch", "roc.png": "ROC curves of held-out scans"}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_NAME_SHOWN = 80


# Runs


@dataclass(frozen=True)
class Run:
    """What a run of train_cv.py or svm.py left for the page.

    Attributes
    ----------
    name : str
    metrics : DataFrame
        Of metrics.csv, indexed by fold.
    n_patients, n_controls : int
    pictures : list of Path
        loss_curves.png and roc.png, as far as they exist.
    """

    name: str
    metrics: pd.DataFrame
    n_patients: int
    n_controls: int
    pictures: list[Path]


def load_run(folder: Path) -> Run:
    """Read what the page shows of a run's folder.

    Raises
    ------
    InputError
        If it holds no metrics.csv and predictions.csv as train_cv.py and svm.py write them.
    """
    columns = {"fold": str} | dict.fromkeys(METRICS_SHOWN, float)
    record_path = folder / "run.json"
    try:
        metrics = files.read_csv(folder / "metrics.csv", columns).dropna(subset="fold")
        labels = files.read_csv(folder / "predictions.csv", {"label": int})["label"]
        record = files.read_json(record_path) if record_path.is_file() else {}
        metrics = metrics.set_index("fold")
        if not metrics.index.is_unique or set(SUMMARY_ROWS) - set(metrics.index):
            raise ValueError(f"metrics.csv must have one row each of {', '.join(SUMMARY_ROWS)}")
    except ValueError as error:
        raise InputError(f"--run {folder} is no finished run: {error}") from None
    name = utils.printable(str(record.get("model", folder.name)))
    pictures = [path for path in (folder / name for name in PICTURES) if is_png(path)]
    return Run(
        name[:MAX_NAME_SHOWN], metrics, int((labels == 1).sum()), int((labels == 0).sum()), pictures
    )


def is_png(path: Path) -> bool:
    """Tell whether a file is there and begins as a PNG picture does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE


def completeness_errors(map_paths: dict[str, Path]) -> dict[str, float]:
    """Return, by name, the median completeness errors that the .json beside IG maps state."""
    found = {}
    for name, path in map_paths.items():
        sidecar_path = path.with_name(path.name.split(".nii")[0] + ".json")
        sidecar = files.read_json(sidecar_path) if sidecar_path.is_file() else {}
        error = sidecar.get("median_completeness_error")
        if sidecar.get("method") == "IG" and error is not None:
            try:
                found[name] = float(error)
            except (TypeError, ValueError, OverflowError):
                raise InputError(
                    f"{sidecar_path}: median_completeness_error must be a number"
                ) from None
    return found


# Volumes for the slice viewers


def shrink(img: SpatialImage) -> SpatialImage:
    """Return an image turned to RAS axes, averaged over blocks to about the shown voxel size."""
    img = nib.as_closest_canonical(img)
    data = np.asarray(img.dataobj, dtype=np.float32)
    factors = np.maximum(1, SHOWN_VOXEL_MM // nib.affines.voxel_sizes(img.affine))
    factors = np.minimum(factors, data.shape).astype(int).tolist()
    n_blocks = [side // factor for side, factor in zip(data.shape, factors, strict=True)]
    cropped = data[tuple(slice(n * f) for n, f in zip(n_blocks, factors, strict=True))]
    split = [size for pair in zip(n_blocks, factors, strict=True) for size in pair]
    affine = img.affine @ np.diag([*factors, 1])
    affine[:3, 3] = nib.affines.apply_affine(img.affine, [(f - 1) / 2 for f in factors])
    return nib.Nifti1Image(cropped.reshape(split).mean((1, 3, 5)), affine)


def encode(data: np.ndarray) -> str:
    """Return bytes in Fortran order (first axis fastest), base64."""
    return base64.b64encode(data.tobytes(order="F")).decode()


def viewer_data(
    volumes: dict[str, SpatialImage], reference_img: SpatialImage, background_img: SpatialImage
) -> dict:
    """Return what the page's script needs to draw the slices of all maps."""
    background_data = shrink(background_img).get_fdata()
    positive = background_data[background_data > 0]
    top = np.percentile(positive, 99.5) if positive.size else 1.0
    reference_small_img = shrink(reference_img)
    maps = []
    for name, img in volumes.items():
        data = shrink(img).get_fdata()
        limit = color_limit(data)
        levels = np.clip(np.round(127 * data / limit), -127, 127) + 128
        maps.append({"name": name, "limit": limit, "data": encode(levels.astype(np.uint8))})
    return {
        "shape": reference_small_img.shape,
        "affine": reference_small_img.affine.tolist(),
        "background": encode(np.clip(255 * background_data / top, 0, 255).astype(np.uint8)),
        "reference": encode((reference_small_img.get_fdata() >= 0.5).astype(np.uint8)),
        "maps": maps,
    }


def template_like(like_img: SpatialImage) -> SpatialImage:
    """Return nilearn's ICBM152 template on the maps' grid."""
    return image.resample_to_img(
        datasets.load_mni152_template(resolution=2), like_img, force_resample=True,
        copy_header=True,
    )  # fmt: skip
