"""The cohort at a glance: correlation with the mean, and who is shown."""

import numpy as np
import pandas as pd
import pytest
from conftest import SHAPE, make_volume, save_scan

import dataset
from reporting import glance


@pytest.fixture
def odd_cohort(tmp_path):
    """Return a cohort with one scan upside down and one with half of its head missing."""
    for index in range(8):
        data = make_volume(index, 0)
        data[:, :, 14:] *= 0.3  # top and bottom differ
        if index == 3:
            data = data[:, :, ::-1]
        if index == 5:
            data[: SHAPE[0] // 2] = 0
        save_scan(tmp_path / f"s{index}.nii.gz", data)
    (tmp_path / "data.csv").write_text("".join(f"s{i}.nii.gz,{i % 2}\n" for i in range(8)))
    return dataset.read_cohort(tmp_path / "data.csv")


def test_odd_scans_are_least_like_the_mean(odd_cohort, tmp_path, monkeypatch):
    volumes = odd_cohort.volumes(None, 0)
    on_grid = glance.likeness(volumes, range(8))
    monkeypatch.setattr(glance, "GRID_VOXELS", volumes.n_voxels)
    r = glance.likeness(volumes, range(8))
    assert abs(on_grid - r).max() < 0.05 and (on_grid != r).all()
    rows = np.stack([volumes[i].ravel() for i in range(8)]).astype(float)
    expected = [np.corrcoef(row, rows.mean(0))[0, 1] for row in rows]
    assert r == pytest.approx(expected)
    assert {row for row, _ in glance.choose(r)[:2]} == {3, 5}
    said = glance.at_a_glance(volumes, odd_cohort.table["path"])
    assert said.index("s3.nii.gz") < said.index("s0.nii.gz") and f"{r[3]:.3f}" in said
    glance.draw(tmp_path / "cohort.png", volumes, odd_cohort.table["path"])
    assert (tmp_path / "cohort.png").stat().st_size > 1000


def test_of_many_scans_those_at_the_ends_are_shown():
    r = np.linspace(0.5, 0.99, 100)
    r[[40, 41]] = [0.1, np.nan]
    chosen = glance.choose(r)
    assert len(chosen) == glance.N_SHOWN
    by_group = pd.DataFrame(chosen, columns=["row", "why"]).groupby("why")["row"].agg(list)
    assert by_group["least like the mean"][:3] == [41, 40, 0]
    assert by_group["most"][:2] == [99, 98]
    assert by_group["first"] == list(range(15)) and by_group["last"] == list(range(85, 100))
