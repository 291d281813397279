"""Drawing the folds, and reading them back from splits.csv."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import files
import folds
from errors import InputError

PARTS = {"train", "val", "test"}


def make_cohort(labels: list[int], subjects: list[str] | None = None) -> dataset.Cohort:
    """Return a cohort of scans that need not exist."""
    table = pd.DataFrame({"path": [f"scan{i:03d}.nii.gz" for i in range(len(labels))]})
    table = table.assign(file="/data/" + table["path"], label=labels)
    if subjects is not None:
        table["subject"] = subjects
    return dataset.Cohort(table, (24, 27, 23), None)


def repeated_scans(n_subjects: int) -> dataset.Cohort:
    """Return a cohort of 1 to 3 scans a subject, in mixed order, labels alternating by subject."""
    scans = [(f"{i:03d}", i % 2) for i in range(n_subjects) for _ in range(1 + i % 3)]
    scans = [scans[i] for i in np.random.default_rng(0).permutation(len(scans))]
    return make_cohort([label for _, label in scans], [subject for subject, _ in scans])


def parts_of(splits: pd.DataFrame) -> np.ndarray:
    """Return the fold columns, shape (n_scans, n_folds)."""
    return splits.filter(regex=folds.FOLD_COLUMN).to_numpy()


# Drawing


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n_folds=st.integers(2, 6),
    n_controls=st.integers(12, 60),
    n_patients=st.integers(12, 60),
    val_fraction=st.sampled_from([0.1, 0.2, 0.35, 0.5]),
    seed=st.integers(0, 2**40),
)
def test_folds_are_disjoint_cover_and_are_stratified(
    n_folds, n_controls, n_patients, val_fraction, seed
):
    labels = np.random.default_rng(1).permutation([0] * n_controls + [1] * n_patients)
    splits = folds.draw_folds(make_cohort(labels), n_folds, val_fraction, seed % 2**32)
    parts = parts_of(splits)
    assert parts.shape == (n_controls + n_patients, n_folds)
    assert set(parts.flat) == PARTS
    assert ((parts == "test").sum(axis=1) == 1).all()  # every scan is tested once
    for label in (0, 1):
        n_tested = (parts[labels == label] == "test").sum(axis=0)
        assert np.ptp(n_tested) <= 1
    for part in parts.T:
        rest, val = part != "test", part == "val"
        assert abs(val.sum() - val_fraction * rest.sum()) < 1
        share_of_patients = labels[rest].mean()
        assert abs(labels[val].sum() - share_of_patients * val.sum()) <= 1


def test_columns_are_those_of_the_cohort_without_file():
    assert list(folds.draw_folds(make_cohort([0, 1] * 9), 3, 0.2, 0)) == [
        "path", "label", "fold_0", "fold_1", "fold_2",
    ]  # fmt: skip
    assert list(folds.draw_folds(repeated_scans(30), 2, 0.2, 0)) == [
        "path", "label", "subject", "fold_0", "fold_1",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_subjects_are_never_split(seed):
    cohort = repeated_scans(40)
    splits = folds.draw_folds(cohort, 4, 0.5, seed)
    parts = parts_of(splits)
    assert set(parts.flat) == PARTS
    assert ((parts == "test").sum(axis=1) == 1).all()
    for _, rows in splits.groupby("subject"):
        assert (rows.filter(regex=folds.FOLD_COLUMN).nunique() == 1).all()
    for part in parts.T:
        assert set(cohort.table["label"][part == "test"]) == {0, 1}
        share_of_val = (part == "val").sum() / (part != "test").sum()
        assert share_of_val == pytest.approx(0.5, abs=0.1)


def test_seed_decides_the_folds():
    for cohort in (make_cohort([0, 1] * 15), repeated_scans(30)):
        first, again, other = (folds.draw_folds(cohort, 3, 0.2, seed) for seed in (7, 7, 8))
        pd.testing.assert_frame_equal(first, again)
        for part in ("val", "test"):
            assert ((parts_of(first) == part) != (parts_of(other) == part)).any()


def test_global_random_state_is_neither_used_nor_touched():
    np.random.seed(1)  # noqa: NPY002 (the global generator is what is tested)
    first = folds.draw_folds(make_cohort([0, 1] * 15), 3, 0.2, 0)
    drawn = np.random.rand()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert drawn == np.random.rand()  # noqa: NPY002
    pd.testing.assert_frame_equal(first, folds.draw_folds(make_cohort([0, 1] * 15), 3, 0.2, 0))


def test_folds_do_not_depend_on_the_working_directory(cohort_csv, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    elsewhere = folds.draw_folds(dataset.read_cohort(cohort_csv), 4, 0.2, 0)
    monkeypatch.chdir(cohort_csv.parent)
    here = folds.draw_folds(dataset.read_cohort(Path(cohort_csv.name)), 4, 0.2, 0)
    pd.testing.assert_frame_equal(here, elsewhere)


@pytest.mark.parametrize(
    ("cohort", "message"),
    [
        (make_cohort([0] * 20 + [1] * 4), "label 1 has 4 scans, fewer than the 5 folds"),
        (make_cohort([1] * 20), "label 0 has 0 scans, fewer than the 5 folds"),
        (make_cohort([0, 1] * 10, list("abcd") * 5), "4 subjects cannot be split into 5 folds"),
        (
            make_cohort([0] * 20 + [1] * 9, [*range(20), *[99] * 9]),
            r"fold \d leaves no train .*more subjects",
        ),
    ],
    ids=["class", "one-class", "subjects", "one-subject-in-a-class"],
)
def test_too_few_scans_or_subjects(cohort, message):
    with pytest.raises(InputError, match=message):
        folds.draw_folds(cohort, 5, 0.2, 0)


def test_validation_fraction_too_small_for_the_cohort():
    with pytest.raises(InputError, match="fold 0 cannot set validation scans aside"):
        folds.draw_folds(make_cohort([0, 1] * 10), 2, 0.05, 0)


def test_a_small_validation_fraction_of_subjects_is_a_scan_of_each_label():
    splits = folds.draw_folds(make_cohort([0, 1] * 10, range(20)), 2, 0.05, 0)
    assert splits.loc[splits["fold_0"] == "val", "label"].value_counts().tolist() == [1, 1]


# Reading back


@pytest.fixture(params=["scans", "subjects"])
def drawn(request, tmp_path) -> tuple[dataset.Cohort, pd.DataFrame, Path]:
    """Return a cohort, its folds, and the splits.csv that holds them."""
    cohort = make_cohort([0, 1] * 12) if request.param == "scans" else repeated_scans(30)
    splits = folds.draw_folds(cohort, 3, 0.2, 0)
    files.write_csv(tmp_path / "splits.csv", splits)
    return cohort, splits, tmp_path / "splits.csv"


def with_table(cohort: dataset.Cohort, table: pd.DataFrame) -> dataset.Cohort:
    """Return the cohort with another table."""
    return dataset.Cohort(table.reset_index(drop=True), cohort.volume_shape, cohort.like_img)


def test_splits_round_trip(drawn):
    cohort, splits, splits_path = drawn
    pd.testing.assert_frame_equal(
        folds.read_splits(splits_path, cohort), splits, check_dtype=False, check_column_type=False
    )


def test_order_of_a_shuffled_csv_is_regained(drawn):
    cohort, splits, splits_path = drawn
    order = np.random.default_rng(3).permutation(len(splits))
    found = folds.read_splits(splits_path, with_table(cohort, cohort.table.iloc[order]))
    assert found["path"].tolist() == splits["path"].iloc[order].tolist()
    np.testing.assert_array_equal(parts_of(found), parts_of(splits)[order])


def test_splits_of_other_scans_are_refused(drawn):
    cohort, _, splits_path = drawn
    fewer = with_table(cohort, cohort.table.drop(index=[2, 3]))
    with pytest.raises(InputError, match=r"2 are not in the CSV, such as 'scan002.nii.gz'"):
        folds.read_splits(splits_path, fewer)
    extra = cohort.table.iloc[[0]].assign(path="new.nii.gz")
    more = with_table(cohort, pd.concat([cohort.table, extra]))
    with pytest.raises(InputError, match=r"1 are not in splits.csv, such as 'new.nii.gz'"):
        folds.read_splits(splits_path, more)


def test_changed_label_is_refused(drawn):
    cohort, _, splits_path = drawn
    table = cohort.table.copy()
    table.loc[4, "label"] = 1 - table.loc[4, "label"]
    with pytest.raises(InputError, match=r"'scan004.nii.gz' has another label in .*splits.csv"):
        folds.read_splits(splits_path, with_table(cohort, table))


def test_missing_splits_name_the_way_round(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*splits\.csv.*heatmap\.py --subjects all"):
        folds.read_splits(tmp_path / "splits.csv", make_cohort([0, 1]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe",
        b"path,label\nscan000.nii.gz,0\nscan001.nii.gz,1\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,1,maybe\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan000.nii.gz,0,train\n",
        b"file,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,1,train\n",
        b"path,fold_0\nscan000.nii.gz,test\nscan001.nii.gz,train\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test,a\nscan001.nii.gz,1,train,b,c\n",
    ],
    ids=[
        "empty", "binary", "no-folds", "unknown-part", "scan-twice", "no-path", "no-label", "ragged"
    ],
)  # fmt: skip
def test_garbage_is_no_table_of_folds(tmp_path, content):
    (tmp_path / "splits.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"splits.csv is not a table of folds"):
        folds.read_splits(tmp_path / "splits.csv", make_cohort([0, 1]))
