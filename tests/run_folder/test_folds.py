"""Drawing the folds, and reading them back from splits.csv."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from run_folder import files, folds
from utils import InputError


def read(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Read splits.csv for scans whose files are spelled as in the table."""
    return folds.read(path, table, table["path"].tolist())


def make_table(labels: list[int], subjects: list | None = None) -> pd.DataFrame:
    """Return the table of a cohort whose scans need not exist."""
    paths = [f"scan{i:03d}.nii.gz" for i in range(len(labels))]
    table = pd.DataFrame({"path": paths, "label": labels})
    return table if subjects is None else table.assign(subject=subjects)


def repeated_scans(n_subjects: int) -> pd.DataFrame:
    """Return 1 to 3 scans a subject, in mixed order, labels alternating by subject."""
    scans = [(f"{i:03d}", i % 2) for i in range(n_subjects) for _ in range(1 + i % 3)]
    scans = [scans[i] for i in np.random.default_rng(0).permutation(len(scans))]
    return make_table([label for _, label in scans], [subject for subject, _ in scans])


def parts_of(splits: pd.DataFrame) -> np.ndarray:
    """Return the fold columns, shape (n_scans, n_folds)."""
    return splits.filter(regex=r"^fold_\d+$").to_numpy()


# Drawing


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n_folds=st.integers(2, 6),
    n_controls=st.integers(12, 60),
    n_patients=st.integers(12, 60),
    val_fraction=st.sampled_from([0.1, 0.2, 0.35, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_folds_are_disjoint_cover_and_are_stratified(
    n_folds, n_controls, n_patients, val_fraction, seed
):
    labels = np.random.default_rng(1).permutation([0] * n_controls + [1] * n_patients)
    parts = parts_of(folds.draw(make_table(labels), n_folds, val_fraction, seed))
    assert parts.shape == (n_controls + n_patients, n_folds)
    assert set(parts.flat) == set(folds.PARTS)
    assert ((parts == "test").sum(axis=1) == 1).all()  # every scan is tested once
    for label in (0, 1):
        assert np.ptp((parts[labels == label] == "test").sum(axis=0)) <= 1
    for part in parts.T:
        rest, val = part != "test", part == "val"
        assert abs(val.sum() - val_fraction * rest.sum()) < 1
        assert abs(labels[val].sum() - labels[rest].mean() * val.sum()) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_subjects_are_kept_whole(seed):
    table = repeated_scans(40)
    splits = folds.draw(table, 4, 0.5, seed)
    parts = parts_of(splits)
    assert set(parts.flat) == set(folds.PARTS) and ((parts == "test").sum(axis=1) == 1).all()
    for _, rows in splits.groupby("subject"):
        assert (rows.filter(like="fold_").nunique() == 1).all()
    for part in parts.T:
        assert set(table["label"][part == "test"]) == {0, 1}
        share_of_val = (part == "val").sum() / (part != "test").sum()
        assert share_of_val == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (make_table([0, 1] * 6), ["rraaereeeere", "eeeereaarrer"]),
        (make_table([0, 1] * 10, [*"abcdefghij"] * 2),
         ["aeereareeraeereareer", "errereeareerrereeare"]),
    ],
    ids=["scans", "subjects"],
)  # fmt: skip
def test_draws_are_those_of_earlier_versions(table, expected):
    """The second letters of train, val and test, scan by scan, as they always were for seed 7."""
    parts = parts_of(folds.draw(table, 2, 0.2, 7))
    assert ["".join(name[1] for name in part) for part in parts.T] == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (make_table([0] * 20 + [1] * 4), "label 1 has 4 scans, fewer than the 5 folds"),
        (make_table([1] * 20), "label 0 has 0 scans, fewer than the 5 folds"),
        (make_table([0, 1] * 10, [*"abcd"] * 5), "4 subjects cannot be split into 5 folds"),
        (make_table([0] * 20 + [1] * 9, [*range(20), *[99] * 9]),
         r"fold \d leaves no train .*more subjects"),
    ],
    ids=["class", "one-class", "subjects", "one-subject-in-a-class"],
)  # fmt: skip
def test_too_few_scans_or_subjects(table, message):
    with pytest.raises(InputError, match=message):
        folds.draw(table, 5, 0.2, 0)


def test_a_validation_fraction_too_small_for_the_cohort():
    with pytest.raises(InputError, match="fold 0 cannot set validation scans aside"):
        folds.draw(make_table([0, 1] * 10), 2, 0.05, 0)
    splits = folds.draw(make_table([0, 1] * 10, range(20)), 2, 0.05, 0)  # of subjects one a label
    assert splits.loc[splits["fold_0"] == "val", "label"].value_counts().tolist() == [1, 1]


# Reading back


@pytest.fixture(params=["scans", "subjects"])
def drawn(request, tmp_path):
    """Return a cohort's table, its folds, and the splits.csv that holds them."""
    table = make_table([0, 1] * 12) if request.param == "scans" else repeated_scans(30)
    splits = folds.draw(table, 3, 0.2, 0)
    files.write_csv(tmp_path / "splits.csv", splits)
    return table, splits, tmp_path / "splits.csv"


def test_splits_are_read_in_the_order_of_the_csv(drawn):
    table, splits, path = drawn
    columns = ["path", "label", "fold_0", "fold_1", "fold_2"]
    found = read(path, table)[columns]
    pd.testing.assert_frame_equal(found, splits[columns], check_dtype=False)
    assert folds.count(splits) == 3
    order = np.random.default_rng(3).permutation(len(splits))
    found = read(path, table.iloc[order].reset_index(drop=True))
    assert found["path"].tolist() == splits["path"].iloc[order].tolist()
    np.testing.assert_array_equal(parts_of(found), parts_of(splits)[order])


def test_splits_of_other_scans_or_labels_are_refused(drawn):
    table, _, path = drawn
    with pytest.raises(InputError, match=r"2 are not in the CSV, such as 'scan002.nii.gz'"):
        read(path, table.drop(index=[2, 3]))
    extra = table.iloc[[0]].assign(path="new.nii.gz")
    with pytest.raises(InputError, match=r"1 are not in .*splits.csv, such as 'new.nii.gz'"):
        read(path, pd.concat([table, extra], ignore_index=True))
    changed = table.assign(label=np.where(table.index == 4, 1 - table["label"], table["label"]))
    with pytest.raises(InputError, match=r"'scan004.nii.gz' has another label in .*splits.csv"):
        read(path, changed)


def test_missing_splits_name_the_way_round(tmp_path):
    with pytest.raises(InputError, match=r"there is no .*splits\.csv.*heatmap\.py --subjects all"):
        read(tmp_path / "splits.csv", make_table([0, 1]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,1,maybe\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,1,\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,,train\n",
        b"path,label,fold_0,fold_2\nscan000.nii.gz,0,test,train\nscan001.nii.gz,1,train,test\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test\nscan000.nii.gz,0,train\n",
        b"file,label,fold_0\nscan000.nii.gz,0,test\nscan001.nii.gz,1,train\n",
        b"path,label,fold_0\nscan000.nii.gz,0,test,a\nscan001.nii.gz,1,train,b,c\n",
    ],
    ids=["empty", "binary", "unknown-part", "no-part", "no-label-of-a-scan",
         "a-fold-left-out", "scan-twice", "no-path", "ragged"],
)  # fmt: skip
def test_a_damaged_table_of_folds_is_refused(tmp_path, content):
    (tmp_path / "splits.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"splits\.csv"):
        read(tmp_path / "splits.csv", make_table([0, 1]))


# --only-fold


def test_folds_asked_for():
    assert folds.asked_for(3, None, overwrite=True) == [0, 1, 2]
    assert folds.asked_for(3, 2, overwrite=False) == [2]
    with pytest.raises(InputError, match="--only-fold 3: the folds are 0 to 2"):
        folds.asked_for(3, 3, overwrite=False)
    with pytest.raises(InputError, match=r"--overwrite .* does not go with --only-fold"):
        folds.asked_for(3, 0, overwrite=True)


# Scans that have moved, or are spelled otherwise


def save_splits(folder: Path, paths: list[str], csv_folder: str | None = None) -> Path:
    """Write the splits.csv of a run on these scans, labels 0 and 1 in turn."""
    table = pd.DataFrame({"path": paths, "label": [i % 2 for i in range(len(paths))]})
    files.write_csv(folder / "splits.csv", folds.draw(table, 2, 0.4, 0))
    if csv_folder:
        files.write_json(folder / "run.json", {"csv_folder": csv_folder})
    return folder / "splits.csv"


NAMES = [f"sub-{i}/anat/T1w.nii" for i in range(8)]
MOVES = {
    "another-disk": ("/data/adni/{}", "/scratch/me/adni/{}", "/scratch/me/adni/{}"),
    "relative-then": ("{}", "/scratch/{}", "/scratch/{}"),
    "relative-now": ("/data/{}", "scans/{}", "/home/me/scans/{}"),
    "with-a-dot": ("./{}", "{}", "/home/me/{}"),
    "windows-none": ("/data//{}", "/data/{}", "/data/{}"),
}


@pytest.mark.parametrize(("then", "now", "file"), MOVES.values(), ids=MOVES)
def test_moved_scans_are_known_by_their_names(tmp_path, caplog, then, now, file):
    caplog.set_level("INFO", "heatmaps")
    path = save_splits(tmp_path, [then.format(name) for name in NAMES])
    order = [3, 1, 0, 2, 7, 6, 5, 4]
    table = pd.DataFrame(
        {"path": [now.format(NAMES[i]) for i in order], "label": [i % 2 for i in order]}
    )
    found = folds.read(path, table, [file.format(NAMES[i]) for i in order])
    assert found["path"].tolist() == [then.format(NAMES[i]) for i in order]
    assert caplog.text.count("have moved") == 1
    table.loc[2, "label"] = 1
    with pytest.raises(InputError, match="has another label in"):
        folds.read(path, table, [file.format(NAMES[i]) for i in order])
    other = [file.format(NAMES[i].replace("sub-3", "sub-9")) for i in order]
    with pytest.raises(InputError, match=r"are not those of .*, wherever they were moved"):
        folds.read(path, table, other)


def test_the_same_files_are_the_same_however_spelled(tmp_path, caplog):
    """In part relative, with a link, from the folder where the CSV was; nothing is said of it."""
    caplog.set_level("INFO", "heatmaps")
    files_there = [tmp_path / "scans" / name for name in NAMES]
    for file in files_there:
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / "link").symlink_to("scans")
    spelled = [str(files_there[0]), f"scans/{NAMES[1]}", f"./link/{NAMES[2]}",
               f"scans/../scans/{NAMES[3]}", *(f"scans/{name}" for name in NAMES[4:])]  # fmt: skip
    path = save_splits(tmp_path, spelled, str(tmp_path))
    table = pd.DataFrame({"path": [str(file) for file in files_there], "label": [0, 1] * 4})
    assert read(path, table)["path"].tolist() == spelled
    assert "moved" not in caplog.text
