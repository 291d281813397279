"""Runs side by side: sorted by validation, compared in pairs of the same scans."""

import numpy as np
import pandas as pd
import pytest

import compare
from comparing import runs
from reporting import bootstrap, metrics

N = 40


def write_run(folder, separation: float, losses=(0.2, 0.4), seed: int = 0, subjects: bool = False):
    """Write what a run leaves: scores of two folds' networks, on one cohort."""
    rng = np.random.default_rng(seed)
    label, fold = np.arange(N) % 2, np.arange(N) // 2 % 2
    score = separation * label + rng.standard_normal(N)
    table = pd.DataFrame({"path": [f"{i}.nii" for i in range(N)], "label": label, "fold": fold,
                          "probability": score, "predicted": (score > 0).astype(int)})  # fmt: skip
    of_training = losses and pd.DataFrame(
        {"valid_loss": losses, "valid_roc_auc": 0.8, "learned": 1}
    )
    folder.mkdir()
    subject = pd.Series([f"s{i // 4}" for i in range(N)]) if subjects else None
    if subjects:
        splits = table[["path"]].assign(subject=subject)
        splits.to_csv(folder / "splits.csv", index=False)
    found = metrics.metrics_table(table, subject, 0, of_training)
    found.to_csv(folder / "metrics.csv", index=False)
    table.sample(frac=1, random_state=seed).to_csv(folder / "predictions.csv", index=False)
    return folder


def test_runs_are_sorted_by_validation_loss(tmp_path, capsys):
    folders = [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "svm", 3.0, losses=None),
               write_run(tmp_path / "b", 2.0, losses=(0.1, 0.2), seed=1)]  # fmt: skip
    args = ["--run", *map(str, folders), "--outpath", str(tmp_path / "out")]
    compare.main(compare.parse_args(args))
    table = pd.read_csv(tmp_path / "out" / "runs.csv")
    assert table["run"].tolist() == ["b", "a", "svm"]
    assert table["valid_loss"].tolist()[:2] == pytest.approx([0.15, 0.3])
    assert np.isnan(table["valid_loss"][2]) and table["learned"].tolist()[:2] == [1, 1]
    pairs = pd.read_csv(tmp_path / "out" / "run_differences.csv")
    assert pairs[["run", "other"]].to_numpy().tolist() == [["a", "svm"], ["a", "b"], ["svm", "b"]]
    shown = capsys.readouterr().out
    assert "never by the columns test_" in shown and shown.index("b ") < shown.index("svm")


def test_a_difference_is_that_of_the_means_and_its_draws_are_paired(tmp_path):
    folders = [write_run(tmp_path / "a", 1.0, seed=0), write_run(tmp_path / "b", 1.1, seed=0)]
    (row,) = runs.differences(runs.load_runs(folders), 0).to_dict("records")
    auc = [pd.read_csv(f / "metrics.csv").set_index("fold")["roc_auc"]["mean"] for f in folders]
    assert row["difference"] == pytest.approx(auc[0] - auc[1]) and row["same_folds"]
    assert row["low"] <= row["difference"] <= row["high"]
    # of nearly the same scores: unpaired draws would differ by tenths
    assert row["high"] - row["low"] < 0.1


def test_whole_subjects_are_drawn(tmp_path):
    folders = [write_run(tmp_path / name, d, seed=s, subjects=True)
               for name, d, s in (("a", 1.0, 0), ("b", 0.5, 1))]  # fmt: skip
    (row,) = runs.differences(runs.load_runs(folders), 0).to_dict("records")
    assert (row["n_scans"], row["n_subjects"]) == (N, N // 4)


def test_runs_of_other_scans_are_no_pair(tmp_path):
    folders = [write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0)]
    table = pd.read_csv(folders[1] / "predictions.csv")
    table["path"] = "other/" + table["path"]
    table.to_csv(folders[1] / "predictions.csv", index=False)
    assert runs.differences(runs.load_runs(folders), 0).empty


def test_bad_input(tmp_path, refusal):
    folder = write_run(tmp_path / "a", 1.0)
    out = ["--outpath", tmp_path / "out"]
    assert "a folder is given twice" in refusal(compare, ["--run", folder, folder, *out])
    assert "--maps are needed, or --run" in refusal(compare, out)
    assert "--maps are needed" in refusal(compare, ["--run", folder, "--reference", "a.nii", *out])
    assert not (tmp_path / "out").exists()


def test_many_runs_are_drawn_once_each(tmp_path, monkeypatch):
    """The 32 published models have 496 pairs."""
    folders = [write_run(tmp_path / str(i), 1.0, seed=i) for i in range(5)]
    loaded, draw, drawn = runs.load_runs(folders), bootstrap.draws, []

    def count(*arguments):
        drawn.append(1)
        return draw(*arguments)

    monkeypatch.setattr(bootstrap, "draws", count)
    assert len(runs.differences(loaded, 0)) == 10 and len(drawn) == 5
