"""meta.py as a script: planted foci are found, files are whole, and input at fault is refused."""

import json

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn import datasets

import meta
from comparing import ale
from loading import template

PLACE_MM = (-24.0, -22.0, -16.0)


def write_foci(path, n_experiments: int = 12, space: str = "MNI", places=(PLACE_MM,)):
    """Write experiments that all report some places, and one focus anywhere each."""
    rng = np.random.default_rng(0)
    img = datasets.load_mni152_gm_mask(resolution=2)
    inside = nib.affines.apply_affine(img.affine, np.argwhere(img.get_fdata() > 0))
    lines = [f"//Reference={space}"]
    for number in range(n_experiments):
        lines += [f"//Study {number}", f"//Subjects={10 + number}"]
        foci = [*places, rng.choice(inside)]
        lines += [" ".join(f"{mm:.2f}" for mm in focus) for focus in foci]
    path.write_text("\n".join(lines))
    return path


def analyse(foci_path, outpath, *more):
    argv = ["--foci", foci_path, "--outpath", outpath, "--permutations", 20, *more]
    meta.main(meta.parse_args(list(map(str, argv))))


@pytest.fixture(scope="module")
def meta_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meta")
    like_img = template.cohort_grid(6.0)
    nib.save(like_img, folder / "like.nii.gz")
    analyse(write_foci(folder / "foci.txt"), folder / "out", "--like", folder / "like.nii.gz")
    return folder / "out"


def test_planted_foci_are_found_within_a_voxel(meta_path):
    table = pd.read_csv(meta_path / "clusters.csv")
    first = table.iloc[0]
    assert np.abs(first[["x", "y", "z"]].to_numpy(float) - PLACE_MM).max() <= 2
    assert first["survives"] == 1 and first["p"] == pytest.approx(1 / 21) and first["z_value"] > 5
    z_img = nib.load(meta_path / "z.nii.gz")
    voxel = np.rint(np.linalg.inv(z_img.affine) @ [*PLACE_MM, 1]).astype(int)[:3]
    assert nib.load(meta_path / "reference.nii.gz").get_fdata()[tuple(voxel)] == 1
    assert z_img.shape == datasets.load_mni152_gm_mask(resolution=2).shape


def test_files(meta_path):
    names = {"ale.nii.gz", "z.nii.gz", "reference.nii.gz", "reference_like.nii.gz", "clusters.csv",
             "experiments.csv", "meta.png", "meta.html", "meta.json", "meta.log"}  # fmt: skip
    assert names <= {path.name for path in meta_path.iterdir()}
    like = nib.load(meta_path / "reference_like.nii.gz")
    assert like.shape == (33, 39, 33) and like.affine[0, 0] == 6
    reference = nib.load(meta_path / "reference.nii.gz")
    volumes = [img.get_fdata().sum() * abs(np.linalg.det(img.affine)) for img in (like, reference)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.5)
    facts = json.loads((meta_path / "meta.json").read_text())
    assert facts["n_experiments"] == 12 and facts["n_foci"] == 24
    assert "12 experiments with 186 subjects and 24 foci" in facts["methods"]
    table = pd.read_csv(meta_path / "experiments.csv")
    assert table["n_foci"].tolist() == [2] * 12 and table["space"].unique().tolist() == ["MNI"]
    largest = nib.load(meta_path / "ale.nii.gz").get_fdata().max()
    assert 0.05 < largest < 1


def test_talairach_foci_are_converted(meta_path, tmp_path):
    """The same places, written in Talairach space, give the same map but for a voxel's rounding."""
    (x, y, z, _) = ale.TO_TALAIRACH @ [*PLACE_MM, 1]
    foci_path = write_foci(tmp_path / "foci.txt", space="Talairach", places=[(x, y, z)])
    analyse(foci_path, tmp_path / "out")
    first = pd.read_csv(tmp_path / "out" / "clusters.csv").iloc[0]
    assert np.abs(first[["x", "y", "z"]].to_numpy(float) - PLACE_MM).max() <= 2
    facts = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert "Talairach coordinates were converted" in facts["methods"]


def test_the_result_does_not_depend_on_the_workers(meta_path, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.N_WORKERS", 1)
    analyse(meta_path.parent / "foci.txt", tmp_path / "out")
    found, expected = (p / "clusters.csv" for p in (tmp_path / "out", meta_path))
    assert found.read_bytes() == expected.read_bytes()


def test_foci_outside_the_mask_are_listed(tmp_path, caplog):
    foci_path = write_foci(tmp_path / "foci.txt", places=[(0, 0, 100)])
    analyse(foci_path, tmp_path / "out")
    assert "12 of 24 foci lie outside the mask" in caplog.text
    assert "the reference space may be wrong" in caplog.text
    table = pd.read_csv(tmp_path / "out" / "experiments.csv")
    assert (table["n_outside"] == 1).all() and (table["outside"] == "0 0 100").all()


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("//Reference=MNI\n//A\n1 2 3\n", [], "line 2: an experiment with foci has no line"),
        ("//A\n//Subjects=3\n1 2 3\n", [], "line 3: no line //Reference"),
        ("//Reference=MNI\n//A\n//Subjects=3\n1 2 3\n", ["--like", "nothing.nii"], "there is no"),
        ("", ["--threshold", "0"], "--threshold: must be above 0"),
        ("", ["--permutations", "0"], "--permutations: must be at least 1"),
    ],
)
def test_input_at_fault(tmp_path, refusal, content, more, message):
    (tmp_path / "foci.txt").write_text(content)
    argv = ["--foci", tmp_path / "foci.txt", "--outpath", tmp_path / "out", *more]
    assert message in refusal(meta, argv)


def test_a_made_up_literature_lies_near_the_planted_regions(tmp_path):
    text = template.made_up_literature(0)
    assert text == template.made_up_literature(0) != template.made_up_literature(1)
    assert text.count("//Subjects=") == 79
    (tmp_path / "foci.txt").write_text(text)
    experiments = meta.sleuth.read_experiments(tmp_path / "foci.txt")
    foci_mm = np.concatenate([each.foci_mm for each in experiments])
    centres_mm = np.array([centre for centre, _ in template.REGIONS.values()])
    distance_mm = np.linalg.norm(foci_mm[:, None] - centres_mm, axis=2).min(1)
    assert 0.6 < (distance_mm < 18).mean() < 0.9
    assert all(1 <= len(each.foci) <= 12 and 8 <= each.n_subjects <= 60 for each in experiments)
