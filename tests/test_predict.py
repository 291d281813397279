"""New scans through all folds of a run: probabilities, metrics, grids, and what was trained on."""

import gzip
import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    AFFINE,
    N_FOLDS,
    SHAPE,
    exit_status,
    explain,
    explain_arguments,
    make_volume,
    save_scan,
    stop_at_call,
)
from processes import finish, torchrun

import dataset
import heatmap
import models
import predict
import svm
from reporting import metrics
from run_folder import files

N_NEW = 9


@pytest.fixture(scope="module")
def new_csv(tmp_path_factory):
    """Return the CSV of a cohort with a header that the run has not seen; not to be changed."""
    folder = tmp_path_factory.mktemp("new")
    rows = ["path,label,subject"]
    for index in range(N_NEW):
        save_scan(folder / f"new{index}.nii.gz", make_volume(100 + index, index % 2))
        rows.append(f"new{index}.nii.gz,{index % 2},n{index // 2 % 3}_{index % 2}")
    (folder / "data.csv").write_text("\n".join(rows))
    return folder / "data.csv"


def arguments(csv_path, modelpath, outpath, *more) -> list[str]:
    argv = ["--path", csv_path, "--modelpath", modelpath, "--outpath", outpath, "--model",
            "modelT8", "--device", "cpu", "--workers", "0", "--batch", "4", *more]  # fmt: skip
    return list(map(str, argv))


def classify(*argv) -> None:
    predict.main(predict.parse_args(arguments(*argv)))


@pytest.fixture(scope="module")
def predicted_path(new_csv, run_path, tmp_path_factory):
    outpath = tmp_path_factory.mktemp("predicted")
    classify(new_csv, run_path, outpath)
    return outpath


def test_probabilities_are_those_of_every_fold(predicted_path, new_csv, run_path):
    cohort = dataset.read_cohort(new_csv)
    volumes = torch.stack([torch.from_numpy(cohort.volumes(None, 0)[i]) for i in range(N_NEW)])
    expected = []
    for fold in range(N_FOLDS):
        model = models.build_model("modelT8", SHAPE).eval()
        model.load_state_dict(torch.load(run_path / f"state_dict_f{fold}.pth", weights_only=True))
        with torch.no_grad():
            expected.append(torch.softmax(model(volumes[:, None]).double(), 1)[:, 1].numpy())
    table = pd.read_csv(predicted_path / "predictions.csv")
    assert list(table["path"]) == list(cohort.table["path"])
    for fold, probabilities in enumerate(expected):
        assert table[f"probability_f{fold}"].to_numpy() == pytest.approx(probabilities, rel=1e-5)
    mean = np.mean(expected, axis=0)
    assert table["probability"].to_numpy() == pytest.approx(mean, rel=1e-5)
    assert table["probability_sd"].to_numpy() == pytest.approx(
        np.std(expected, 0, ddof=1), rel=1e-4
    )
    assert (table["predicted"] == (mean > 0.5)).all()


def test_metrics_are_of_the_mean_probability_and_of_each_fold(predicted_path):
    table = pd.read_csv(predicted_path / "predictions.csv")
    found = pd.read_csv(predicted_path / "metrics.csv").set_index("fold")
    ones = np.ones((1, N_NEW))
    for row, column in (
        ("mean", "probability"),
        ("pooled", "probability"),
        ("1", "probability_f1"),
    ):
        auc = metrics.roc_auc(table["label"].to_numpy(), table[column].to_numpy(), ones)[0]
        assert found.loc[row, "roc_auc"] == pytest.approx(auc)
    assert found.loc["mean_low", "roc_auc"] <= found.loc["mean", "roc_auc"]
    assert (predicted_path / "roc.png").is_file() and (predicted_path / "cohort.png").is_file()
    assert not (predicted_path / ".cache").exists()


def test_the_svms_decide_as_svm_py_does(cohort_csv, run_path, tmp_path):
    """Of scans that it tested, with the intercept and the mean scan that it left."""
    argv = ["--path", cohort_csv, "--modelpath", run_path, "--outpath", tmp_path / "svm"]
    svm.main(svm.parse_args(list(map(str, [*argv, "--workers", "0"]))))
    more = ["--svm", tmp_path / "svm", "--allow-trained"]
    classify(cohort_csv, run_path, tmp_path / "out", *more)
    expected = pd.read_csv(tmp_path / "svm" / "predictions.csv").set_index("path")
    found = pd.read_csv(tmp_path / "out" / "svm_predictions.csv").set_index("path")
    for path, row in expected.iterrows():
        probability = found.loc[path, f"probability_f{int(row['fold'])}"]
        assert probability == pytest.approx(row["probability"], abs=1e-5)
    assert (tmp_path / "out" / "svm_metrics.csv").is_file()


@pytest.mark.parametrize("content", ["path,label\n{0},\n{1},\n{2},1\n", "{0}\n{1}\n{2}\n"])
def test_labels_may_be_left_empty(new_csv, run_path, tmp_path, caplog, content):
    scans = [new_csv.parent / f"new{i}.nii.gz" for i in range(3)]
    (tmp_path / "data.csv").write_text(content.format(*scans))
    classify(tmp_path / "data.csv", run_path, tmp_path / "out")
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 3
    assert not (tmp_path / "out" / "metrics.csv").exists()
    assert "no metrics, since the CSV does not label scans of both classes" in caplog.text


def test_scans_on_another_grid(new_csv, run_path, tmp_path, refusal):
    """Refused with both grids; --resample brings them to the run's."""
    affine = AFFINE @ np.diag([0.5, 1, 1, 1])
    for index in range(4):
        data = np.repeat(make_volume(200 + index, index % 2), 2, axis=0)
        save_scan(tmp_path / f"fine{index}.nii.gz", data, affine)
    rows = "".join(f"fine{i}.nii.gz,{i % 2}\n" for i in range(4))
    (tmp_path / "data.csv").write_text(rows)
    argv = arguments(tmp_path / "data.csv", run_path, tmp_path / "out")
    message = refusal(predict, argv)
    assert "(48, 27, 23)" in message and "--resample brings them there" in message
    assert exit_status(predict, [*argv, "--resample"]) == 0
    table = pd.read_csv(tmp_path / "out" / "resampled" / "data.csv")
    img = nib.load(tmp_path / "out" / "resampled" / table["path"][1])
    assert img.shape == SHAPE and np.allclose(img.affine, AFFINE)
    expected = make_volume(201, 1)
    resampled = img.get_fdata()
    assert resampled.min() == 0 and (resampled == 0).mean() > 0.9 * (expected == 0).mean()
    inner = np.corrcoef(img.get_fdata().ravel(), expected.ravel())[0, 1]
    assert inner > 0.9
    assert pd.read_csv(tmp_path / "out" / "predictions.csv")["probability"].notna().all()


def test_scans_of_the_training_are_found_by_content(
    cohort_csv, run_path, tmp_path, refusal, caplog
):
    """Under another name; a subject of the same name is a warning."""
    shutil.copy(cohort_csv.parent / "scan03.nii.gz", tmp_path / "other.nii.gz")
    save_scan(tmp_path / "new.nii.gz", make_volume(300, 0))
    (tmp_path / "data.csv").write_text("other.nii.gz,1\nnew.nii.gz,0\n")
    argv = arguments(tmp_path / "data.csv", run_path, tmp_path / "out")
    message = refusal(predict, argv)
    assert "was trained on 1 of these scans: other.nii.gz; --allow-trained" in message
    assert exit_status(predict, [*argv, "--allow-trained"]) == 0
    assert "was trained on 1 of these scans: other.nii.gz" in caplog.text


def test_scans_of_the_training_with_other_axes_are_found(cohort_csv, run_path, tmp_path, capsys):
    """Interpolation gives the same voxels, and predictions are those of the scans."""
    turn = nib.orientations.axcodes2ornt(("P", "I", "R"))
    for name in ("scan03.nii.gz", "scan04.nii.gz"):
        img = nib.load(cohort_csv.parent / name)
        axes = nib.orientations.ornt_transform(nib.io_orientation(img.affine), turn)
        nib.save(img.as_reoriented(axes), tmp_path / name)
    (tmp_path / "data.csv").write_text("scan03.nii.gz,1\nscan04.nii.gz,0\n")
    argv = [*arguments(tmp_path / "data.csv", run_path, tmp_path / "out"), "--resample"]
    assert exit_status(predict, argv) == 2
    assert "was trained on 2 of these scans" in capsys.readouterr().err
    assert exit_status(predict, [*argv, "--allow-trained"]) == 0
    found = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("path")
    expected = pd.read_csv(run_path / "predictions.csv").set_index("path")
    for name in found.index:
        of_fold = found.loc[name, f"probability_f{expected.loc[name, 'fold']}"]
        assert of_fold == pytest.approx(expected.loc[name, "probability"], abs=1e-6)


def test_a_run_that_is_not_finished(new_csv, modelpath, tmp_path, refusal):
    (modelpath / f"state_dict_f{N_FOLDS - 1}.pth").unlink()
    message = refusal(predict, arguments(new_csv, modelpath, tmp_path / "out"))
    assert f"state_dict_f{N_FOLDS - 1}.pth" in message


def test_it_resumes_with_the_folds_that_are_left(
    new_csv, run_path, predicted_path, tmp_path, monkeypatch
):
    argv = arguments(new_csv, run_path, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(predict, "predict_fold", stop_at_call(2, predict.predict_fold))
        with pytest.raises(KeyboardInterrupt):
            predict.main(predict.parse_args(argv))
    first = (tmp_path / "out" / "predictions_f0.csv").stat().st_mtime_ns
    assert not (tmp_path / "out" / "predictions.csv").exists()
    assert exit_status(predict, argv) == 0
    assert (tmp_path / "out" / "predictions_f0.csv").stat().st_mtime_ns == first
    expected = pd.read_csv(predicted_path / "predictions.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "predictions.csv"), expected)


def test_two_processes_share_the_scans(new_csv, run_path, predicted_path, tmp_path):
    finish(torchrun(2, "predict.py", *arguments(new_csv, run_path, tmp_path / "out")))
    found, expected = (
        pd.read_csv(path / "predictions.csv") for path in (tmp_path / "out", predicted_path)
    )
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)


# A new cohort explained


def test_new_subjects_are_explained_by_every_fold(new_csv, run_path, predicted_path, tmp_path):
    """The mean map is the mean over folds of each scan's map, and of these over the scans."""
    more = ["--subjects", "new", "--save-subjects", "--by-outcome", "--target", "1"]
    explain(new_csv, run_path, tmp_path, *more)
    table = pd.read_csv(tmp_path / "GGC_predictions.csv")
    assert len(table) == N_FOLDS * N_NEW and set(table["part"]) == {"new"}
    maps_data = [nib.load(tmp_path / name).get_fdata() for name in table["map"]]
    found = nib.load(tmp_path / "GGC_map_all.nii.gz").get_fdata()
    expected = np.mean(maps_data, axis=0)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    sidecar = json.loads((tmp_path / "GGC_map_all.json").read_text())
    assert sidecar["held_out"] is True and sidecar["subjects"] == "new"
    page = (tmp_path / "GGC_map_all.html").read_text()
    assert f"{N_FOLDS} folds, {N_NEW} scans" in page  # each of them explained by every fold
    predicted = pd.read_csv(predicted_path / "predictions.csv").set_index("path")
    for row in table.itertuples():
        expected = predicted.loc[row.path, f"probability_f{row.fold}"]
        assert row.probability == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("target", ["1", "predicted"])
def test_new_scans_without_labels_are_explained(new_csv, run_path, tmp_path, capsys, target):
    """As predict.py leaves them, resampled; but not their own class, and without a contrast."""
    for index in range(2):
        shutil.copy(new_csv.parent / f"new{index}.nii.gz", tmp_path)
    (tmp_path / "data.csv").write_text("path\nnew0.nii.gz\nnew1.nii.gz\n")
    classify(tmp_path / "data.csv", run_path, tmp_path / "out", "--resample")
    csv_path = tmp_path / "out" / "resampled" / "data.csv"
    more = ["--subjects", "new", "--by-outcome", "--target", target]
    explain(csv_path, run_path, tmp_path / "maps", *more)
    table = pd.read_csv(tmp_path / "maps" / "GGC_predictions.csv")
    assert len(table) == N_FOLDS * 2 and (table["label"] == -1).all()
    assert table["outcome"].isna().all() and table["completeness_error"].isna().all()
    names = {path.name for path in (tmp_path / "maps").glob("GGC_*_all.nii.gz")}
    assert names == {"GGC_map_all.nii.gz"}
    argv = explain_arguments(csv_path, run_path, tmp_path / "own", *more[:2])
    assert exit_status(heatmap, argv) == 2
    assert "label must be 0 or 1, got ''" in capsys.readouterr().err


def test_the_training_cohort_is_not_new(cohort_csv, run_path, tmp_path, refusal):
    argv = ["--path", cohort_csv, "--modelpath", run_path, "--outpath", tmp_path / "out", "--model",
            "modelT8", "--method", "GGC", "--subjects", "new", "--device", "cpu"]  # fmt: skip
    message = refusal(heatmap, argv)
    assert "--subjects new is for a cohort that the run has not seen" in message


def test_a_copy_in_a_file_of_another_size_is_not_new(cohort_csv, run_path, tmp_path, capsys):
    """Its voxels tell, when it is decoded."""
    data = gzip.decompress((cohort_csv.parent / "scan03.nii.gz").read_bytes())
    (tmp_path / "other.nii").write_bytes(data)
    (tmp_path / "data.csv").write_text("other.nii,1\n")
    argv = explain_arguments(tmp_path / "data.csv", run_path, tmp_path / "out", "--subjects", "new")
    assert exit_status(heatmap, argv) == 2
    assert "trained on 1 of these scans: other.nii" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_names_of_another_cohort_do_not_matter(new_csv, modelpath, tmp_path):
    """Though the run has predictions of scans of these names."""
    table = files.read_csv(modelpath / "predictions.csv", {"path": str})
    save_scan(tmp_path / table["path"][0], make_volume(400, 1))
    (tmp_path / "data.csv").write_text(f"{table['path'][0]},1\n")
    explain(tmp_path / "data.csv", modelpath, tmp_path / "out", "--subjects", "new")
    assert (tmp_path / "out" / "GGC_map_all.nii.gz").is_file()
