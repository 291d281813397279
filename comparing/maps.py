"""The maps to compare, with what lies beside them: their folds', scans' and untrained networks'."""

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from nibabel.spatialimages import SpatialImage

from loading.image import open_image, read_image, same_space
from run_folder import files
from utils import InputError, log, printable, progress


@dataclass(frozen=True)
class Map:
    """A map to compare, with the fold maps beside it."""

    path: Path
    img: SpatialImage
    fold_imgs: list[SpatialImage]
    scans: pd.DataFrame | None = None  # what `find_scans` found

    @property
    def is_control(self) -> bool:
        """Whether it is of untrained networks."""
        return "_random_" in self.path.name

    @property
    def is_contrast(self) -> bool:
        """Whether it is patients' mean map less controls'."""
        return "_contrast_all.nii" in self.path.name


def require_same_grid(img: SpatialImage, path: Path, like_img: SpatialImage, like: str) -> None:
    """Raise an InputError that shows both grids if they differ; maps are never resampled."""
    if not same_space(img, like_img):
        grids = "\nand\n".join(f"{each.shape}\n{each.affine}" for each in (img, like_img))
        raise InputError(f"{path} and {like} are not on one grid; resample one of them:\n{grids}")


def load_maps(paths: list[Path]) -> dict[str, Map]:
    """Return each map, its fold maps and scans by name, all on one grid; controls are added."""
    paths = with_controls(paths)
    maps, like_img = {}, read_image(paths[0], "map")
    for path, name in zip(paths, name_maps(paths), strict=True):
        imgs = [read_image(each, "map") for each in (path, *fold_paths(path))]
        for img, each in zip(imgs, (path, *fold_paths(path)), strict=True):
            require_same_grid(img, each, like_img, str(paths[0]))
        maps[name] = Map(path, imgs[0], imgs[1:], find_scans(path, like_img))
    return maps


def control_path(path: Path) -> Path:
    """Return where heatmap.py --randomize puts the control of a map; of others, their own path."""
    name = re.sub(r"(_(map|contrast)_all\.nii)", r"_random\1", path.name)
    return path if "_random_" in path.name else path.with_name(name)


def with_controls(paths: list[Path]) -> list[Path]:
    """Return the maps, and after them those of untrained networks beside them."""
    controls = [path for path in map(control_path, paths) if path not in paths and path.is_file()]
    if controls:
        log.info("added as controls: %s", ", ".join(path.name for path in controls))
    return [*paths, *controls]


def find_scans(path: Path, like_img: SpatialImage) -> pd.DataFrame | None:
    """Return path, label, fold[, subject] and map of each scan that a mean map is the mean of.

    None where heatmap.py was not asked to keep the scans' maps; an InputError if one is missing.
    """
    stem = re.fullmatch(r"(.+)_(?:map|contrast)_all\.nii(?:\.gz)?", path.name)
    table_path = path.with_name(f"{stem[1]}_predictions.csv") if stem else path
    if not stem or not table_path.is_file():
        return None
    table = files.read_csv(table_path, {"path": str, "label": int, "fold": int})
    if "map" not in table or table["map"].isna().any():
        return None
    table["map"] = [path.parent / name for name in table["map"]]
    for scan_path in progress(table["map"], f"maps of {stem[1]}'s scans"):
        if not scan_path.is_file():
            raise InputError(f"there is no {scan_path}, a scan's map that {table_path} names")
        require_same_grid(open_image(scan_path), scan_path, like_img, str(path))
    columns = [name for name in ("path", "label", "fold", "subject", "map") if name in table]
    return table[columns].sort_values(["fold", "path"], ignore_index=True)


def name_maps(paths: list[Path]) -> list[str]:
    """Return a short name for each map, with its folder where names alone are ambiguous."""
    short = [printable(re.sub(r"(_map)?(_all)?\.nii(\.gz)?$", "", path.name)) for path in paths]
    names = [
        f"{printable(path.parent.name)}/{name}" if short.count(name) > 1 else name
        for path, name in zip(paths, short, strict=True)
    ]
    if len(set(names)) < len(names):
        raise InputError(f"two maps have one name: {', '.join(names)}")
    return names


def fold_paths(path: Path) -> list[Path]:
    """Return the fold maps beside a map that ends in _all, in the folds' order."""
    stem, is_all, suffix = path.name.rpartition("_all.nii")
    if not is_all:
        return []
    pattern = re.compile(re.escape(stem) + r"_f(\d+)\.nii" + re.escape(suffix))
    found = [(pattern.fullmatch(p.name), p) for p in path.parent.iterdir()]
    return [p for match, p in sorted((int(m[1]), p) for m, p in found if m)]


def in_order(maps: dict[str, Map]) -> list[str]:
    """Return the names of the maps, each control behind its map."""
    name_of = {each.path: name for name, each in maps.items()}
    pairs = [
        (name, name_of.get(control_path(each.path), name))
        for name, each in maps.items()
        if not each.is_control
    ]
    return list(dict.fromkeys([*(name for pair in pairs for name in pair), *maps]))
