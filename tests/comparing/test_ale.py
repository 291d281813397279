"""ALE against plain loops, its null against brute force, and conversions by hand."""

import importlib.util

import numpy as np
import pytest
from scipy.stats import norm

from comparing import ale

SHAPE = (16, 18, 14)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[2:14, 3:15, 2:12] = True
N_SUBJECTS = (8, 20, 60)


def make_foci(seed: int = 0) -> list[np.ndarray]:
    """Return the foci of three experiments, one of them beyond the grid."""
    rng = np.random.default_rng(seed)
    foci = [rng.integers(0, SHAPE, (n, 3)) for n in (3, 1, 4)]
    foci[2][0] = (-2, 5, 30)
    return foci


def test_ale_against_a_plain_loop():
    """Over voxels and foci: the density of the nearest focus, times the voxel's volume."""
    foci, voxel_mm = make_foci(), 3.0
    not_active = np.ones(SHAPE)
    for of_one, n in zip(foci, N_SUBJECTS, strict=True):
        fwhm_template = 5.7 / (2 * np.sqrt(2 / np.pi)) * np.sqrt(8 * np.log(2))
        fwhm_subject = 11.6 / (2 * np.sqrt(2 / np.pi)) * np.sqrt(8 * np.log(2))
        sd_mm = np.sqrt(fwhm_template**2 + fwhm_subject**2 / n) / np.sqrt(8 * np.log(2))
        for voxel in np.ndindex(SHAPE):
            distance_mm = voxel_mm * np.linalg.norm(of_one - np.array(voxel), axis=1).min()
            density = np.exp(-0.5 * (distance_mm / sd_mm) ** 2) / (2 * np.pi * sd_mm**2) ** 1.5
            not_active[voxel] *= 1 - density * voxel_mm**3
    cubes = [ale.kernel(n, voxel_mm) for n in N_SUBJECTS]
    found = -np.expm1(-ale.ale_map(foci, cubes, SHAPE))
    assert np.abs(found - (1 - not_active)).max() < 1e-6
    assert found.max() > 0.01


def test_kernels_hold_all_chance_at_any_voxel_size():
    for voxel_mm in (1.0, 2.0, 5.0):
        chances = -np.expm1(-ale.kernel(20, voxel_mm))
        assert chances.sum() == pytest.approx(1, abs=1e-4)
        sd_mm = voxel_mm * np.sqrt(
            (chances.sum((1, 2)) * (np.arange(len(chances)) - len(chances) // 2) ** 2).sum()
        )
        assert sd_mm == pytest.approx(ale.kernel_sd_mm(20), rel=0.02)


def test_talairach_by_hand():
    """Three places of MNI space through the published matrix, and back."""
    mni_mm = np.array([[0.0, 0, 0], [-24, -22, -14], [50, -54, 28]])
    talairach_mm = [
        (-1.0423, -1.3940, 3.6475),
        (0.9357 * -24 + 0.0029 * -22 - 0.0072 * -14 - 1.0423,
         -0.0065 * -24 + 0.9396 * -22 - 0.0726 * -14 - 1.3940,
         0.0103 * -24 + 0.0752 * -22 + 0.8967 * -14 + 3.6475),
        (0.9357 * 50 + 0.0029 * -54 - 0.0072 * 28 - 1.0423,
         -0.0065 * 50 + 0.9396 * -54 - 0.0726 * 28 - 1.3940,
         0.0103 * 50 + 0.0752 * -54 + 0.8967 * 28 + 3.6475),
    ]  # fmt: skip
    assert ale.from_talairach(np.array(talairach_mm)) == pytest.approx(mni_mm, abs=1e-9)


def test_null_against_brute_force():
    """Foci's maps where they are, looked up in voxels drawn anew for each experiment."""
    foci, cubes = make_foci(1), [ale.kernel(n, 4.0) for n in N_SUBJECTS]
    survival = ale.null_survival(foci, cubes, MASK)
    rng = np.random.default_rng(2)
    drawn = sum(
        rng.choice(ale.ale_map([each], [cube], SHAPE)[MASK], 200_000)
        for each, cube in zip(foci, cubes, strict=True)
    )
    for p in (0.5, 0.1, 0.01, 0.001):
        least = ale.least_of(survival, p)
        found = (drawn >= least).mean()
        assert found == pytest.approx(survival[int(np.ceil(least / ale.BIN))], abs=5e-4, rel=0.1)
    assert survival[0] == pytest.approx(1) and (np.diff(survival) <= 0).all()


def test_tails_are_not_lost():
    """Chances far below the smallest that 1 − cdf could tell from 0."""
    cubes = [ale.kernel(20, 2.0)] * 30
    foci = [np.array([[8, 9, 7]])] * 30
    survival = ale.null_survival(foci, cubes, np.ones(SHAPE, dtype=bool))
    p = ale.p_of(ale.ale_map(foci, cubes, SHAPE), survival)
    assert 0 < p.min() < 1e-30
    z = ale.z_of(p)
    assert z.max() > 11 and norm.sf(z.max()) == pytest.approx(p.min(), rel=1e-6)
    assert (z >= 0).all()


def test_clusters_are_face_connected():
    above = np.zeros(SHAPE, dtype=bool)
    above[2, 2, 2:5] = above[3, 3, 5] = above[8:10, 8:10, 8] = True
    assert ale.largest_cluster(above) == 4
    assert ale.largest_cluster(np.zeros(SHAPE, dtype=bool)) == 0


@pytest.mark.slow
def test_few_literatures_without_effect_have_a_surviving_cluster():
    """Foci anywhere in the mask; the null depends on the counts only, and is drawn once."""
    from nilearn import datasets

    mask_data = datasets.load_mni152_gm_mask(resolution=2).get_fdata() > 0
    inside, rng = np.argwhere(mask_data), np.random.default_rng(0)
    counts = rng.integers(1, 12, 20).tolist()
    cubes = [ale.kernel(n, 2.0) for n in rng.integers(8, 60, 20)]
    foci = [inside[rng.integers(len(inside), size=n)] for n in counts]
    least = ale.least_of(ale.null_survival(foci, cubes, mask_data), 0.001)
    sizes = np.array([
        ale.permuted_size(rng, counts, cubes, mask_data, inside, least) for _ in range(5000)
    ])  # fmt: skip
    null, observed = sizes[1000:], sizes[:1000]
    p = np.array([(1 + (null >= size).sum()) / (1 + len(null)) for size in observed])
    print(f"surviving clusters: {100 * (p <= 0.05).mean():.1f} %")
    assert 0.03 <= (p <= 0.05).mean() <= 0.07


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("nimare"), reason="NiMARE is not installed")
def test_beside_nimare():
    """At 2 mm, where its kernel is right: z, and the voxels with p < .001."""
    from nilearn import datasets
    from nimare.dataset import Dataset
    from nimare.meta.cbma.ale import ALE

    mask_img = datasets.load_mni152_gm_mask(resolution=2)
    mask_data, rng = mask_img.get_fdata() > 0, np.random.default_rng(0)
    inside = np.argwhere(mask_data)
    foci = [inside[rng.integers(len(inside), size=8)] for _ in range(30)]
    for each in foci[:15]:
        each[0] = inside[1000] + rng.integers(-2, 3, 3)
    ns = rng.integers(8, 60, 30).tolist()
    studies = {}
    for i, (each, n) in enumerate(zip(foci, ns, strict=True)):
        x, y, z = (mask_img.affine @ np.column_stack([each, np.ones(len(each))]).T)[:3].tolist()
        contrast = {"coords": {"space": "MNI", "x": x, "y": y, "z": z},
                    "metadata": {"sample_sizes": [n]}}  # fmt: skip
        studies[f"s{i}"] = {"contrasts": {"1": contrast}}
    dataset = Dataset(studies, mask=mask_img, target="mni152_2mm")
    result = ALE(null_method="approximate").fit(dataset)
    expected = result.get_map("z").get_fdata()[mask_data]
    cubes = [ale.kernel(n, 2.0) for n in ns]
    survival = ale.null_survival(foci, cubes, mask_data)
    found = ale.z_of(ale.p_of(ale.ale_map(foci, cubes, mask_data.shape), survival))[mask_data]
    r = np.corrcoef(found, np.maximum(expected, 0))[0, 1]
    above = found > norm.isf(0.001), expected > norm.isf(0.001)
    dice = 2 * (above[0] & above[1]).sum() / (above[0].sum() + above[1].sum())
    print(f"z: r = {r:.4f}; p < .001: Dice {dice:.3f}")
    assert r > 0.9999 and dice > 0.99
