"""The folder of a run: what may be replaced in it, who may work in it, what damage is said."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import N_FOLDS, SHAPE, save_scan, train_arguments, write_cohort

import checkpoints
import heatmap
import heatmap_run
import locks
import pictures
import report
import run_record
import runs
import svm
import train_cv
import training_run
import utils
from errors import InputError, RunError

SCRIPTS = [train_cv, heatmap, svm]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Leave out the pictures, which take seconds each."""
    monkeypatch.setattr(heatmap_run, "draw_map", lambda *_: [])
    monkeypatch.setattr(pictures, "plot_mosaic", lambda *_: None)
    monkeypatch.setattr(report, "write_viewer", lambda *_: None)


@pytest.fixture
def modelpath(run_path, tmp_path) -> Path:
    """Return a copy of the run's folder that a test may spoil."""
    return Path(shutil.copytree(run_path, tmp_path / "run"))


@pytest.fixture
def arguments(cohort_csv, run_path):
    """Return a function that gives a script's arguments for the tiny cohort and run."""

    def of(script, outpath: Path, *more: str, modelpath: Path = run_path):
        cohort = ["--path", str(cohort_csv), "--outpath", str(outpath), "--workers", "0"]
        run = ["--modelpath", str(modelpath)]
        method = ["--model", "modelT8", "--method", "LRP", "--device", "cpu"]
        argv = {
            train_cv: train_arguments(cohort_csv, outpath),
            heatmap: [*cohort, *run, *method],
            svm: [*cohort, *run],
        }[script]
        return script.parse_args([*argv, *more])

    return of


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a script, expects exit status 2 and returns its message."""

    def run(script, args, status: int = 2) -> str:
        assert utils.run_script(script.main, args) == status
        message = capsys.readouterr().err
        assert message.count("error: ") == 1
        return message

    return run


def contents(outpath: Path) -> dict[str, bytes]:
    """Return every file's bytes, but for locks."""
    return {
        str(path.relative_to(outpath)): path.read_bytes()
        for path in outpath.rglob("*")
        if path.is_file() and ".locks" not in path.parts
    }


def names_in(outpath: Path) -> set[str]:
    return {path.name for path in outpath.rglob("*") if path.suffix not in (".lock", ".owner")}


# What may be replaced

OWN_FILES = {  # that resemble a run's
    train_cv: ["predictions_old.csv", "state_dict_f0_mine.pth", "history_fx.csv", "my_roc.png"],
    heatmap: ["LRP_map_mine.nii.gz", "LRP_predictions_old.csv", "IG_map_f0.nii.gz", "roc.png"],
    svm: ["SVM_notes.txt", "predictions_old.csv", "SVM_weights_f0_mine.nii.gz", "metrics.csv.bak"],
}
PARTS = {train_cv: "state_dict_f0.pth", heatmap: "LRP_map_f0.nii.gz", svm: "SVM_pattern_f1.nii.gz"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_without_a_record_are_not_replaced(arguments, refusal, tmp_path, script):
    """As published weights are; with --overwrite they are, and with them nothing else."""
    for name in (PARTS[script], *OWN_FILES[script]):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    message = refusal(script, arguments(script, tmp_path))
    assert f"and no {'LRP_' * (script is heatmap)}run.json of the run that made them" in message
    assert f"{PARTS[script]}. Choose another --outpath" in message and "--overwrite" in message
    assert contents(tmp_path) == before
    script.main(arguments(script, tmp_path, "--overwrite"))
    assert (tmp_path / PARTS[script]).read_bytes() != b"mine"
    assert all((tmp_path / name).read_text() == "mine" for name in OWN_FILES[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_ones_own_files_stay(arguments, tmp_path, script):
    for name in OWN_FILES[script]:
        (tmp_path / name).write_text("mine")
    script.main(arguments(script, tmp_path))
    assert all((tmp_path / name).read_text() == "mine" for name in OWN_FILES[script])


@pytest.mark.parametrize("script", [heatmap, svm])
def test_ones_own_mean_scan_is_not_replaced(arguments, refusal, tmp_path, script):
    """But for that of another run in the folder, which is the same."""
    (tmp_path / "mean_scan.nii.gz").write_text("mine")
    assert "replaced, and no " in (message := refusal(script, arguments(script, tmp_path)))
    assert "mean_scan.nii.gz" in message
    assert contents(tmp_path) == {"mean_scan.nii.gz": b"mine"}
    script.main(arguments(script, tmp_path, "--overwrite"))
    assert (tmp_path / "mean_scan.nii.gz").read_bytes() != b"mine"
    if script is heatmap:
        heatmap.main(arguments(heatmap, tmp_path, "--method", "GGC"))


@pytest.mark.parametrize("script", [train_cv, svm])
def test_ones_own_table_of_folds_is_not_replaced(arguments, refusal, run_path, tmp_path, script):
    """But for the very same table, as a run leaves it that is killed before its record."""
    (tmp_path / "splits.csv").write_text("mine")
    assert "splits.csv" in refusal(script, arguments(script, tmp_path))
    assert contents(tmp_path) == {"splits.csv": b"mine"}
    shutil.copy(run_path / "splits.csv", tmp_path)
    script.main(arguments(script, tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_writes_is_what_another_one_removes(arguments, tmp_path, script):
    """But for what is written over at once, or shared by methods."""
    more = ["--by-outcome", "--save-subjects"] if script is heatmap else []
    args = arguments(script, tmp_path, *more)
    script.main(args)
    kind = heatmap_run.kind_of(args, "LRP") if script is heatmap else script_kind(script)
    left = names_in(tmp_path) - {path.name for path in kind.results_in(tmp_path)}
    kept = {kind.record_name, "splits.csv", ".locks", "LRP_subjects", "mean_scan.nii.gz"}
    kept |= {f"mean_scan_f{fold}.nii.gz" for fold in range(N_FOLDS)}
    assert left <= kept | {f"{script.__name__}.log"}


def script_kind(script) -> runs.RunKind:
    return {train_cv: training_run, svm: svm}[script].RUN


def test_more_folds_than_before_leave_nothing(arguments, modelpath, run_path):
    for name in ("history_f2.csv", "train_loss_f2.npy", "valid_loss_f2.npy", "checkpoint_f2.pt"):
        (modelpath / name).write_text("of a third fold")
    train_cv.main(arguments(train_cv, modelpath, "--overwrite"))
    assert names_in(modelpath) == names_in(run_path)


def test_a_run_half_removed_claims_nothing(arguments, modelpath, run_path, monkeypatch):
    """Killed on the way: no record vouches for folds without weights; typed again, it goes on."""
    removed, unlink = [], Path.unlink

    def stop_midway(path, missing_ok=False):
        if path.parent == modelpath:
            removed.append(path.name)
        if path.suffix == ".pth":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    args = arguments(train_cv, modelpath, "--overwrite")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", stop_midway)
        train_cv.main(args)
    of_folds = [f"predictions_f{fold}.csv" for fold in range(N_FOLDS)]
    assert removed[:4] == ["run.json", "predictions.csv", *of_folds]
    with pytest.raises(InputError, match=r"holds files .* and no run\.json"):
        train_cv.main(arguments(train_cv, modelpath))
    train_cv.main(args)
    for name in ("predictions.csv", "state_dict_f1.pth", "splits.csv"):
        assert (modelpath / name).read_bytes() == (run_path / name).read_bytes()


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_advice_never_starts_anew(arguments, tmp_path, more):
    for script in SCRIPTS:
        expected = f"the same command{' without --overwrite' if more else ''} goes on"
        assert runs.how_to_go_on(arguments(script, tmp_path, *more)) == expected


# Who may work in it


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_started_anew_meanwhile_stops_the_first(
    arguments, refusal, tmp_path, monkeypatch, script
):
    """The first has not yet begun a fold, as while it decodes; it writes none into the new run."""
    room = {train_cv: training_run, heatmap: heatmap_run, svm: svm}[script]
    name = "start_methods" if script is heatmap else "start_run"
    option = {train_cv: "--lr", heatmap: "--beta", svm: "--C"}[script]
    start = getattr(room, name)

    def start_both(args, *more):
        first = start(args, *more)
        start(arguments(script, tmp_path, option, "0.25", "--overwrite"), *more)
        return first

    monkeypatch.setattr(room, name, start_both)
    assert "has started the run in" in refusal(script, arguments(script, tmp_path))
    assert not list(tmp_path.glob("*_f*.*"))
    record = json.loads(next(tmp_path.glob("*run.json")).read_text())
    assert record["arguments"][option.strip("-")] == 0.25 and record["end"] is None


def test_a_run_started_anew_keeps_its_record(arguments, tmp_path, monkeypatch):
    """The first has finished all folds and puts them together."""
    assemble = training_run.assemble

    def start_another(args, cohort):
        table = assemble(args, cohort)
        record = run_record.new_record(args, cohort, "train_cv.py", args.model)
        args.overwrite = True
        runs.start_run(args, cohort, record, training_run.RUN)
        return table

    monkeypatch.setattr(training_run, "assemble", start_another)
    with pytest.raises(InputError, match="has started the run in"):
        train_cv.main(arguments(train_cv, tmp_path))
    assert json.loads((tmp_path / "run.json").read_text())["end"] is None


def test_a_writer_on_a_fold_of_the_old_run_is_respected(arguments, modelpath):
    """The new run has fewer folds than the old one."""
    before = contents(modelpath)
    with (
        locks.one_writer(modelpath, "run_fold_4"),
        pytest.raises(InputError, match=r"is at work on .*run_fold_4"),
    ):
        train_cv.main(arguments(train_cv, modelpath, "--seed", "1", "--overwrite"))
    assert contents(modelpath) == before


def test_the_checkpoint_of_a_finished_fold_goes(arguments, modelpath, run_path):
    """A process killed between a fold's predictions and its checkpoint's removal leaves it."""
    (modelpath / "checkpoint_f1.pt").write_bytes(b"of no more use")
    train_cv.main(arguments(train_cv, modelpath))
    assert names_in(modelpath) == names_in(run_path)


# What it was made from


def test_weights_that_change_while_they_are_explained(
    arguments, refusal, modelpath, tmp_path, monkeypatch
):
    explain_fold = heatmap.explain_fold

    def train_meanwhile(*args):
        weights = checkpoints.load(modelpath / "state_dict_f1.pth")
        weights["classifier.3.bias"] += 1
        checkpoints.save(modelpath / "state_dict_f1.pth", weights)
        return explain_fold(*args)

    monkeypatch.setattr(heatmap, "explain_fold", train_meanwhile)
    args = arguments(heatmap, tmp_path / "maps", modelpath=modelpath)
    message = refusal(heatmap, args, status=1)
    assert f"{modelpath / 'state_dict_f1.pth'} has changed since" in message
    assert (tmp_path / "maps" / "LRP_map_f0.nii.gz").is_file()
    assert not (tmp_path / "maps" / "LRP_map_f1.nii.gz").exists()
    (modelpath / "state_dict_f1.pth").unlink()
    fold = heatmap_run.Fold(1, modelpath / "state_dict_f1.pth", np.arange(2))
    with pytest.raises(RunError, match="has changed since"):
        heatmap_run.check_weights(fold, {"LRP": {"modelpath_sha256": {"state_dict_f1.pth": "0"}}})


@pytest.mark.parametrize("script", [heatmap, svm])
def test_folds_that_change_are_refused(arguments, refusal, modelpath, tmp_path, script):
    args = arguments(script, tmp_path / "out", modelpath=modelpath)
    script.main(args)
    splits = pd.read_csv(modelpath / "splits.csv")
    splits[["fold_0", "fold_1"]] = splits[["fold_1", "fold_0"]]
    splits.to_csv(modelpath / "splits.csv", index=False)
    assert f"--modelpath {modelpath} (its files have changed)" in refusal(script, args)


@pytest.mark.parametrize("script", [heatmap, svm])
def test_another_modelpath(arguments, refusal, run_path, modelpath, tmp_path, script):
    """A run that was moved is accepted; of another one both paths are named."""
    script.main(arguments(script, tmp_path / "out"))
    args = arguments(script, tmp_path / "out", modelpath=modelpath)
    script.main(args)
    with (modelpath / "splits.csv").open("a") as file:
        file.write("\n")
    assert f"--modelpath {modelpath} (the run has {run_path})" in refusal(script, args)


@pytest.mark.parametrize("name", ["scan03.nii.gz", "data.csv"])
def test_a_file_deleted_after_the_check(refusal, tmp_path, monkeypatch, name):
    csv_path = write_cohort(tmp_path / "cohort")
    build_model = train_cv.models.build_model

    def delete(*args):
        (csv_path.parent / name).unlink()
        return build_model(*args)

    monkeypatch.setattr(train_cv.models, "build_model", delete)
    args = train_cv.parse_args(train_arguments(csv_path, tmp_path / "out", "--no-cache"))
    assert f"{csv_path.parent / name} cannot be read any more" in refusal(train_cv, args)
    assert not (tmp_path / "out").exists()


# Damage


def test_folds_fewer_than_the_runs(arguments, refusal, modelpath):
    args = arguments(train_cv, modelpath, "--fold", "3", "--overwrite")
    train_cv.main(args)
    splits = pd.read_csv(modelpath / "splits.csv")
    splits.loc[splits["fold_2"] == "test", "fold_1"] = "test"
    splits.drop(columns="fold_2").to_csv(modelpath / "splits.csv", index=False)
    (modelpath / "predictions_f2.csv").unlink()
    args.overwrite = False
    assert "splits.csv has 2 folds, the run has 3" in refusal(train_cv, args)


@pytest.mark.parametrize("n_folds", [5, 10**9, None, "2"])
def test_a_record_of_other_folds(arguments, tmp_path, n_folds):
    """The folds are those of splits.csv."""
    svm.main(arguments(svm, tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"n_folds": n_folds}))
    (tmp_path / "metrics.csv").unlink()
    svm.main(arguments(svm, tmp_path))
    assert (tmp_path / "metrics.csv").is_file()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def enlarge(path: Path) -> None:
    save_scan(path, np.ones((50, 50, 50), dtype=np.float32))


def spoil_voxels(path: Path) -> None:
    """Damage what is compressed and leave header, length and its check as they are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : -8] = bytes(len(content) - len(content) // 2 - 8)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("spoil", [cut, enlarge, spoil_voxels, Path.unlink])
@pytest.mark.parametrize(
    ("script", "name"),
    [
        (heatmap, "LRP_map_f1.nii.gz"),
        (heatmap, "mean_scan_f0.nii.gz"),
        (svm, "SVM_pattern_f0.nii.gz"),
        (svm, "mean_scan.nii.gz"),
    ],
)
def test_a_finished_folds_map_is_damaged(arguments, refusal, tmp_path, script, name, spoil):
    args = arguments(script, tmp_path)
    script.main(args)
    spoil(tmp_path / name)
    message = refusal(script, args)
    assert f"error: {tmp_path / name} " in message and "--overwrite" in message
    if spoil is enlarge:
        assert f"has shape (50, 50, 50), the scans have {SHAPE}" in message


def test_a_scans_map_is_damaged(arguments, refusal, tmp_path):
    args = arguments(heatmap, tmp_path, "--save-subjects")
    heatmap.main(args)
    path = min((tmp_path / "LRP_subjects").iterdir())
    cut(path)
    (tmp_path / f"LRP_predictions_f{path.name[-8]}.csv").unlink()
    assert f"error: {path} " in refusal(heatmap, args)


def test_no_more_is_read_than_a_map_has(tmp_path, monkeypatch):
    path = save_scan(tmp_path / "map.nii.gz", np.ones((60, 60, 60), dtype=np.float32))
    monkeypatch.setattr(nib.Nifti1Image, "get_fdata", None)
    with pytest.raises(InputError, match=r"has shape \(60, 60, 60\)"):
        heatmap_run.map_files.read_map(path, SHAPE)
