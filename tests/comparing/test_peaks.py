"""Clusters and peaks: thresholds, sizes, coordinates, values and regions of planted blobs."""

import nibabel as nib
import numpy as np
import pytest

from comparing import peaks
from comparing.space import Space

SHAPE = (14, 16, 12)
AFFINE = np.array([[-3.0, 0, 0, 20], [0, 4, 0, -30], [0, 0, 2.5, -10], [0, 0, 0, 1]])  # 30 mm³
BLOBS = {(3, 4, 5): 5.0, (9, 11, 6): 3.0}  # centre and height


def make_space() -> tuple[Space, np.ndarray]:
    """Return a space whose mask leaves out the outermost voxels, and a signed map in it."""
    img = nib.Nifti1Image(np.zeros(SHAPE, np.float32), AFFINE)
    mask_data = np.zeros(SHAPE, dtype=bool)
    mask_data[1:-1, 1:-1, 1:-1] = True
    data = np.zeros(SHAPE)
    for centre, height in BLOBS.items():
        distance = np.abs(np.moveaxis(np.indices(SHAPE), 0, -1) - centre).sum(-1)
        data -= height * (1 - 0.3 * distance).clip(0)
    data[12, 2, 2] = -4.0  # a single voxel: 30 mm³
    return Space(img, mask_data, "", None, img, ""), data


def test_peaks_of_negative_evidence_in_millimetres():
    space, data = make_space()
    values = data[space.mask_data]
    regions = (np.arange(len(values)) >= 0).astype(int) * 7
    table = peaks.find_peaks(values, np.maximum(-values, 0), 1.5, space, (regions, {7: "cortex"}))
    assert table["cluster"].astype(str).tolist() == ["1", "2"]
    for row, (centre, height) in zip(table.to_dict("records"), BLOBS.items(), strict=True):
        place = nib.affines.apply_affine(AFFINE, centre)
        assert [row[axis] for axis in "xyz"] == pytest.approx(place)
        assert row["value"] == -height and row["region"] == "cortex"
        n_voxels = (data[tuple(slice(c - 3, c + 4) for c in centre)] <= -1.5).sum()
        assert row["volume_mm3"] == pytest.approx(30 * n_voxels, abs=1)


def test_no_evidence_no_peak():
    space, data = make_space()
    values = data[space.mask_data]
    assert list(peaks.find_peaks(values, np.maximum(values, 0), np.inf, space).columns) == [
        "cluster", "x", "y", "z", "value", "volume_mm3",
    ]  # fmt: skip
    assert len(peaks.find_peaks(values, np.maximum(values, 0), 0.1, space)) == 0


def test_threshold_takes_as_many_voxels_as_the_reference_has():
    evidence = np.array([5.0, 1.0, 4.0, 0.0, 3.0, 2.0])
    inside = np.array([True, True, True, False, False, False])
    assert peaks.threshold_of(evidence, inside) == 3.0
    assert peaks.threshold_of(np.arange(200.0), None) == 196.0  # 2 %
    assert peaks.threshold_of(np.array([0.0, 2.0, 0.0, 0.0]), np.array([True] * 3 + [False])) == 2.0
    assert peaks.threshold_of(np.zeros(4), None) == np.inf


def test_only_the_highest_clusters(monkeypatch):
    monkeypatch.setattr(peaks, "MAX_CLUSTERS", 1)
    space, data = make_space()
    values = data[space.mask_data]
    table = peaks.find_peaks(values, -values, 1.5, space)
    assert table["value"].tolist() == [-5.0]
