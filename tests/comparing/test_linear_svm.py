"""The Gram matrix, the fit and the maps, range by range and wherever the origin is."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sklearn.svm  # noqa: F401 (memory of importing it later would count)

from comparing import linear_svm
from loading.cache import Volumes

SHAPE = (18, 27, 23)  # 11,178 voxels: three ranges


def write_volumes(folder: Path, n_scans: int, shape: tuple) -> tuple[Volumes, np.ndarray]:
    """Return decoded volumes of a cohort that has no scans, and the same as rows."""
    folder.mkdir()
    names, labels = [str(folder / f"{i}.nii") for i in range(n_scans)], np.arange(n_scans) % 2
    volumes = Volumes(names, labels, shape, folder)
    rows = np.random.default_rng(0).random((n_scans, np.prod(shape)), dtype=np.float32)
    for path, row in zip(volumes.paths, rows, strict=True):
        np.save(path, row.reshape(shape))
    return volumes, rows


@pytest.mark.parametrize(("n_scans", "shape"), [(10, SHAPE), (1030, (2, 3, 4))])
def test_gram_matrix_is_that_of_the_centred_scans(tmp_path, n_scans, shape):
    """In several ranges of voxels, and in several tiles of rows: symmetric to the bit."""
    volumes, rows = write_volumes(tmp_path / "decoded", n_scans, shape)
    gram, mean, coverage = linear_svm.gram_matrix(volumes, block_bytes=1)
    centred = rows - rows.mean(0, dtype=np.float64)
    assert np.abs(gram - centred @ centred.T).max() < 1e-10
    assert (gram == gram.T).all()
    assert np.allclose(coverage, (rows != 0).mean(0))
    assert mean == pytest.approx(rows.mean(0), abs=1e-6)


def test_blocks_change_nothing(tmp_path):
    volumes, rows = write_volumes(tmp_path / "decoded", 10, SHAPE)
    ranges, blocks = zip(*volumes.blocks("", block_bytes=1), strict=True)
    assert len(ranges) == 3 and ranges[0].start == 0 and ranges[-1].stop == volumes.n_voxels
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    assert (np.concatenate(blocks, axis=1) == rows).all()
    coefficients = np.random.default_rng(1).standard_normal((3, 10))
    for block_bytes in (1, 4 * 10 * 5000, 10**9):
        found = linear_svm.combine_scans(volumes, coefficients, block_bytes)
        assert found == pytest.approx(coefficients @ rows, abs=1e-5)


def test_the_origin_does_not_matter_and_one_copy_is_made():
    rng = np.random.default_rng(0)
    labels = np.arange(1200) % 2
    volumes = rng.standard_normal((1200, 900)) + 0.2 * labels[:, None]
    train = np.flatnonzero(rng.random(1200) < 0.8)
    fits = []
    for origin in (volumes[train].mean(0), volumes.mean(0), 3):
        scans = volumes - origin
        gram = np.asfortranarray(scans @ scans.T)
        tracemalloc.start()
        fits.append(linear_svm.fit_fold(gram, labels, train, 1.0))
        assert tracemalloc.get_traced_memory()[1] < 1.1 * 8 * len(train) ** 2
        tracemalloc.stop()
    for other in fits[1:]:
        for name in ("weight_coefficients", "pattern_coefficients", "decisions"):
            expected = getattr(fits[0], name)
            difference = np.abs(getattr(other, name) - expected).max()
            assert difference < 1e-5 * np.abs(expected).max(), name
