"""What train_cv.py left, as heatmap.py sees it: the run of other scans or models is refused."""

import json
from pathlib import Path

import pandas as pd
import pytest

from run_folder import files, trained_run
from utils import InputError

TABLE = pd.DataFrame({"path": [f"{i}.nii" for i in range(6)], "label": [0, 1] * 3})
FACTS = {"model": "modelA24", "volume_shape": [4, 5, 6], "affine": [[2.0, 0.0], [0.0, 1.0]]}
PARTS = {
    "fold_0": ["test", "test", "train", "val", "train", "val"],
    "fold_1": ["train", "val", "test", "train", "test", "test"],
    "fold_2": ["train", "train", "val", "test", "val", "train"],
}


@pytest.fixture
def modelpath(tmp_path) -> Path:
    """Return the folder of a run of three folds, with what heatmap.py reads before weights."""
    files.write_json(tmp_path / "run.json", FACTS | {"n_folds": 3})
    files.write_csv(tmp_path / "splits.csv", TABLE.assign(**PARTS))
    for fold in range(3):
        (tmp_path / f"state_dict_f{fold}.pth").write_bytes(b"weights %d" % fold)
    return tmp_path


def plan_of(path: Path, facts: dict, n_folds: int | None, table: pd.DataFrame, held_out: bool):
    """Return the plan for scans whose files are spelled as in the table."""
    return trained_run.plan(path, facts, n_folds, table, table["path"].tolist(), held_out)


def rows_of(plan: list) -> list[list[int]]:
    return [fold.rows.tolist() for fold in plan]


def test_each_fold_explains_its_test_scans(modelpath):
    plan = trained_run.plan(modelpath, FACTS, None, TABLE, TABLE["path"].tolist(), subjects="test")
    assert rows_of(plan) == [[0, 1], [2, 4, 5], [3]]
    assert [fold.number for fold in plan] == [0, 1, 2]
    assert plan[2].checkpoint_path == modelpath / "state_dict_f2.pth"
    shuffled = TABLE.iloc[[5, 3, 0, 1, 4, 2]].reset_index(drop=True)
    assert rows_of(plan_of(modelpath, FACTS, 3, shuffled, "test")) == [
        [2, 3], [0, 4, 5], [1],
    ]  # fmt: skip


def test_every_fold_explains_all_scans_without_splits(modelpath):
    (modelpath / "splits.csv").unlink()
    facts = FACTS | {"affine": [[2.0004, 0.0], [0.0, 1.0]]}  # but for rounding
    plan = trained_run.plan(modelpath, facts, None, TABLE, TABLE["path"].tolist(), subjects="all")
    assert rows_of(plan) == [[0, 1, 2, 3, 4, 5]] * 3
    with pytest.raises(InputError, match=r"there is no .*splits\.csv.* --subjects all"):
        plan_of(modelpath, FACTS, None, TABLE, "test")
    (modelpath / "run.json").unlink()  # as published checkpoints have none
    for n_folds, expected in ((None, 5), (2, 2)):
        plan = trained_run.plan(
            modelpath, FACTS, n_folds, TABLE, TABLE["path"].tolist(), subjects="all"
        )
        assert len(plan) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "modelB8", "model is modelB8, not modelA24"),
        ("model", None, "model is None, not modelA24"),
        ("volume_shape", [4, 6, 5], r"volume_shape is \[4, 6, 5\], not \[4, 5, 6\]"),
        ("volume_shape", [4, 5], r"volume_shape is \[4, 5\], not"),
        ("volume_shape", "45", "volume_shape is 45, not"),
        ("affine", [[2.0, 0.0], [0.0, 1.01]], r"affine is .*1\.01.*, not"),
        ("affine", [[2.0, 0.0], [0.0]], "affine is .*, not"),
        ("affine", [[2.0, 0.0], [0.0, None]], "affine is .*, not"),
        ("affine", [[2.0, 0.0], [0.0, 10**400]], "affine is .*, not"),
        ("n_folds", 2, r"splits\.csv has 3 folds, not 2"),
        ("n_folds", 10**9, "1000000000 folds are more than there are scans"),
        ("n_folds", 0, r"does not say how many folds there are \(n_folds\)"),
        ("n_folds", "3", "does not say how many folds there are"),
        ("n_folds", True, "does not say how many folds there are"),
    ],
)
def test_the_record_of_another_run_is_refused(modelpath, key, value, message):
    record = json.loads((modelpath / "run.json").read_text())
    files.write_json(modelpath / "run.json", record | {key: value})
    with pytest.raises(InputError, match=message):
        plan_of(modelpath, FACTS, None, TABLE, "test")


def test_other_folds_scans_and_folders_are_refused(modelpath):
    def refused(message: str, path: Path = modelpath, n_folds=None, table=TABLE) -> None:
        with pytest.raises(InputError, match=message):
            trained_run.plan(path, FACTS, n_folds, table, table["path"].tolist(), subjects="test")

    refused(r"run\.json says that the run has 3 folds, not 2", n_folds=2)
    refused("1 are not in the CSV, such as '5.nii'", table=TABLE[:5])
    refused("'0.nii' has another label", table=TABLE.assign(label=1))
    refused("there is no folder --modelpath", path=modelpath / "elsewhere")
    refused("there is no folder --modelpath", path=modelpath / "run.json")
    without_test = PARTS | {"fold_1": ["train", "val", "train", "val", "train", "val"]}
    files.write_csv(modelpath / "splits.csv", TABLE.assign(**without_test))
    refused(r"splits\.csv is not a table of folds")


def test_checksums_are_those_of_all_that_maps_depend_on(modelpath):
    plan = trained_run.plan(modelpath, FACTS, None, TABLE, TABLE["path"].tolist(), subjects="test")
    found = trained_run.checksums(modelpath, plan, only_held_out=True)
    assert list(found) == [f"state_dict_f{fold}.pth" for fold in range(3)] + ["splits.csv"]
    assert len(set(found.values())) == 4 and all(len(value) == 64 for value in found.values())
    assert trained_run.checksums(modelpath, plan, only_held_out=False).keys() == set(found) - {
        "splits.csv"
    }
    (modelpath / "state_dict_f1.pth").write_bytes(b"others")
    after = trained_run.checksums(modelpath, plan, only_held_out=True)
    assert {name for name in found if found[name] != after[name]} == {"state_dict_f1.pth"}
    (modelpath / "state_dict_f1.pth").unlink()
    with pytest.raises(InputError, match=r"state_dict_f1\.pth cannot be read any more"):
        trained_run.checksums(modelpath, plan, only_held_out=True)
