"""Files from elsewhere run no code, lead to no other place, and put no markup into pages."""

import ast
import copy
import functools
import json
import os
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import AFFINE, SHAPE, make_volume, save_scan, train_arguments

import checkpoints
import compare
import fold_state
import heatmap
import models
import page_data
import report
import svm
import train_cv
import utils
from errors import InputError

REPOSITORY = Path(train_cv.__file__).parent
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!--"
FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|(pickle|marshal|shelve|dill)\.(loads?|Unpickler|open)|joblib\..*"
    r"|(np|numpy)\.fromfile|pd\.(read_pickle|eval|read_hdf)|yaml\..*|subprocess\..*"
    r"|os\.(system|popen|exec.*|spawn.*)|importlib\..*|.*\.(query|eval_expr))"
)


@pytest.fixture
def modelpath(run_path, tmp_path) -> Path:
    """Return a copy of the run's folder that a test may spoil."""
    return Path(shutil.copytree(run_path, tmp_path / "run"))


@pytest.fixture
def refusal(capsys):
    """Return a function that runs a script, expects exit status 2 and returns its message."""

    def run(script, arguments: list) -> str:
        status = utils.run_script(script.main, script.parse_args(list(map(str, arguments))))
        message = capsys.readouterr().err
        assert status == 2, message
        assert len(re.findall("^error: ", message, re.MULTILINE)) == 1
        assert len(message) < 20_000
        return message

    return run


def heatmap_arguments(csv_path: Path, modelpath: Path, outpath: Path, *more: str) -> list:
    """Return the arguments of the cheapest heatmaps."""
    return [
        "--path", csv_path, "--modelpath", modelpath, "--outpath", outpath, "--model", "modelT8",
        "--method", "GGC", "--device", "cpu", "--workers", "0", *more,
    ]  # fmt: skip


# Code


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("*.py")), ids=lambda path: path.name)
def test_no_module_calls_what_can_run_a_file(path):
    """`torch.load` only with weights_only, `np.load` without pickles; nothing else unpickles."""
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        assert not FORBIDDEN.fullmatch(name), f"{path.name}:{call.lineno} {name}"
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle=False" in ast.unparse(call)
        if name == "torch.load":
            assert path.name == "checkpoints.py" and "weights_only=True" in ast.unparse(call)


class SideEffect:
    """Unpickled without care, it creates a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def save_poison(path: Path, kind: str) -> Path:
    """Write a file that creates a folder when it is loaded without care; return the folder."""
    trace = path.with_name("code-ran")
    content = dict.fromkeys(("model", "features.0.weight"), SideEffect(trace))
    if kind == "npy":
        np.save(path, np.array([SideEffect(trace)], dtype=object), allow_pickle=True)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    return trace


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy archive", "npy"])
def test_the_poison_works(tmp_path, kind):
    """Else the tests below would show nothing."""
    trace = save_poison(tmp_path / "w.npy", kind)
    if kind == "npy":
        np.load(tmp_path / "w.npy", allow_pickle=True)
    elif kind == "pickle":
        pickle.loads((tmp_path / "w.npy").read_bytes())
    else:
        torch.load(tmp_path / "w.npy", weights_only=False)
    assert trace.is_dir()


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy archive"])
def test_weights_run_no_code(cohort_csv, modelpath, tmp_path, refusal, kind):
    trace = save_poison(modelpath / "state_dict_f0.pth", kind)
    message = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert "state_dict_f0.pth is not a checkpoint that can be loaded safely" in message
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy archive"])
def test_an_unfinished_folds_checkpoint_runs_no_code(cohort_csv, modelpath, refusal, kind):
    (modelpath / "predictions_f0.csv").unlink()
    trace = save_poison(modelpath / "checkpoint_f0.pt", kind)
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath))
    assert "checkpoint_f0.pt is not a checkpoint that can be loaded safely" in message
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        {}, {"model": 1, "optimizer": 2, "state": 3}, {"model": {}, "optimizer": {}, "state": {}},
        {"model": {"features.0.weight": torch.zeros(2)}, "optimizer": {}, "state": {}},
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(cohort_csv, modelpath, refusal, content):
    (modelpath / "predictions_f0.csv").unlink()
    torch.save(content, modelpath / "checkpoint_f0.pt")
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath))
    assert "checkpoint_f0.pt cannot continue this fold; start anew with --overwrite" in message


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> dict:
    """Return a checkpoint that training would go on from."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint_f0.pt"
    model = models.build_model("modelT8", SHAPE)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 1, *SHAPE)).sum().backward()
    optimizer.step()
    state = fold_state.FoldState()
    state.update(dict(zip(fold_state.EPOCH_RECORD, (1, 0.7, 0.6, 0.5, 0.1), strict=True)), model, 0)
    fold_state.save_fold(path, model, optimizer, state)
    return checkpoints.load(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("optimizer", "state"), {}),
        (("optimizer", "state"), [1]),
        (("optimizer", "state", 0), {}),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3)),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(8, 1, 3, 3, 3).to_sparse()),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(8, 1, 3, 3, 3, device="meta")),
        (("optimizer", "state", 0, "exp_avg_sq"), "text"),
        (("optimizer", "state", 0, "step"), torch.zeros(2)),
        (("optimizer", "state", 0, "step"), 1j),
        (("state", "history"), 5),
        (("state", "history"), [1]),
        (("state", "history", 0), {"epoch": 1}),
        (("state", "history", 0, "epoch"), 7),
        (("state", "history", 0, "valid_loss"), "0"),
        (("state", "best_loss"), None),
        (("state", "n_stale_epochs"), 0.5),
        (("state", "best_weights"), {}),
        (("state", "best_weights", "features.0.weight"), torch.zeros(3)),
        (("state", "best_weights", "features.0.bias"), [0.0] * 8),
        (("state", "more"), 1),
        (("model",), [1]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_checkpoint_with_one_odd_part_is_refused(
    cohort_csv, modelpath, refusal, whole_checkpoint, place, value
):
    (modelpath / "predictions_f0.csv").unlink()
    content = copy.deepcopy(whole_checkpoint)
    *outer, last = place
    part = functools.reduce(lambda found, key: found[key], outer, content)
    part[last] = value
    torch.save(content, modelpath / "checkpoint_f0.pt")
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath))
    assert "checkpoint_f0.pt cannot continue this fold; start anew with --overwrite" in message


def test_a_checkpoints_options_do_not_count(cohort_csv, modelpath, whole_checkpoint):
    """Those of the command do; and the checkpoint of the tests above is one that goes on."""
    (modelpath / "predictions_f0.csv").unlink()
    content = copy.deepcopy(whole_checkpoint)
    content["optimizer"]["param_groups"] = [{"lr": "much"}]
    torch.save(content, modelpath / "checkpoint_f0.pt")
    train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, modelpath)))
    assert len(pd.read_csv(modelpath / "history_f0.csv")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to_sparse(), "does not hold plain weights"),
        (lambda weight: weight.to("meta"), "does not hold plain weights"),
        (lambda weight: weight[:1, :1, :1, :1, :1].expand(10**6, *weight.shape[1:]), "has shape"),
        (lambda weight: [1.0], "has shape ()"),
    ],
    ids=["sparse", "meta", "a-million-times-itself", "list"],
)  # fmt: skip
def test_weights_that_are_none(cohort_csv, modelpath, tmp_path, refusal, change, message):
    path = modelpath / "state_dict_f1.pth"
    weights = torch.load(path, weights_only=True)
    weights["features.0.weight"] = change(weights["features.0.weight"])
    torch.save(weights, path)
    found = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert message in found and "state_dict_f1.pth" in found


def test_losses_of_a_run_are_never_unpickled(cohort_csv, modelpath):
    """The .npy files are written for the user; no script reads them."""
    trace = save_poison(modelpath / "train_loss_f0.npy", "npy")
    save_poison(modelpath / "valid_loss_f0.npy", "npy")
    train_cv.main(train_cv.parse_args(train_arguments(cohort_csv, modelpath)))
    assert not trace.exists()


# Records and tables of a run

HUGE = 10**9
RECORDS = {
    "folds-10^9": ({"n_folds": HUGE}, "how many folds"),
    "folds-negative": ({"n_folds": -2}, "how many folds"),
    "folds-true": ({"n_folds": True}, "how many folds"),
    "folds-nan": ({"n_folds": float("nan")}, "how many folds"),
    "folds-infinite": ({"n_folds": float("inf")}, "how many folds"),
    "folds-text": ({"n_folds": "2"}, "how many folds"),
    "folds-list": ({"n_folds": [2]}, "how many folds"),
    "shape-number": ({"volume_shape": 5}, "scans have shape 5"),
    "shape-text": ({"volume_shape": "a" * 3}, "scans have shape aaa"),
    "shape-nested": ({"volume_shape": [[24], [27], [23]]}, "scans have shape [[24]"),
    "shape-nan": ({"volume_shape": [24, 27, float("nan")]}, "scans have shape"),
    "shape-huge": ({"volume_shape": [HUGE, HUGE, HUGE]}, "scans have shape"),
    "affine-text": ({"affine": "eye"}, "another affine"),
    "affine-object": ({"affine": {"0": 1}}, "another affine"),
    "affine-ragged": ({"affine": [[1, 2], [3]]}, "another affine"),
    "affine-huge": ({"affine": [[10**400] * 4] * 4}, "another affine"),
    "affine-number": ({"affine": 1.5}, "another affine"),
    "affine-nan": ({"affine": [[float("nan")] * 4] * 4}, "another affine"),
    "affine-null": ({"affine": None}, "another affine"),
    "model-list": ({"model": ["modelT8"]}, "not modelT8"),
    "model-terminal-codes": ({"model": "\x1b[2J\x1b]0;x\x07\u202e"}, r"trained \x1b[2J"),
}


@pytest.mark.parametrize(("values", "fragment"), RECORDS.values(), ids=RECORDS.keys())
def test_hostile_record(cohort_csv, modelpath, tmp_path, refusal, values, fragment):
    run = json.loads((modelpath / "run.json").read_text())
    (modelpath / "run.json").write_text(json.dumps(run | values))
    message = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert fragment in message and "run.json" in message
    assert "\x1b" not in message and "\u202e" not in message


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"n_folds": 1' + "0" * 5000 + "}", "NaN", b"\xff", b"\0"],
    ids=["nested-lists", "nested-objects", "endless-number", "nan", "no-utf-8", "nul"],
)
@pytest.mark.parametrize("script", [heatmap, train_cv, compare])
def test_record_that_is_no_json_object(
    cohort_csv, modelpath, inputs, tmp_path, refusal, content, script
):
    content = content.encode() if isinstance(content, str) else content
    (modelpath / "run.json").write_bytes(content)
    arguments = {
        heatmap: heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"),
        train_cv: train_arguments(cohort_csv, modelpath),
        compare: [*inputs, "--run", modelpath, "--outpath", tmp_path / "out"],
    }[script]
    assert "run.json" in refusal(script, arguments)


@pytest.mark.parametrize("value", [None, [], ["model"], "model", 5, {}, {"model": {"a": 1}}])
def test_hostile_arguments_of_a_run_to_continue(cohort_csv, modelpath, refusal, value):
    run = json.loads((modelpath / "run.json").read_text())
    (modelpath / "run.json").write_text(json.dumps(run | {"arguments": value}))
    assert str(modelpath) in refusal(train_cv, train_arguments(cohort_csv, modelpath))


def test_more_folds_than_scans_without_a_record(cohort_csv, modelpath, tmp_path, refusal):
    (modelpath / "run.json").unlink()
    more = ["--subjects", "all", "--fold", str(HUGE)]
    message = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out", *more))
    assert f"--fold {HUGE} is more than there are scans" in message


def change_splits(**columns):
    """Return a function that sets columns of splits.csv."""

    def change(path: Path) -> None:
        pd.read_csv(path).assign(**columns).to_csv(path, index=False)

    return change


def add_line(line: str):
    """Return a function that adds a line to splits.csv."""
    return lambda path: path.write_text(path.read_text() + line + "\n")


def rename_fold(path: Path) -> None:
    path.write_text(path.read_text().replace("fold_1", f"fold_{HUGE}"))


SPLITS = {
    "path-outside": (add_line("../../../etc/passwd,1,test,train"), "are not in the CSV"),
    "path-absolute": (add_line("/etc/passwd,0,train,test"), "are not in the CSV"),
    "path-markup": (add_line("<script>,1,test,train"), "are not in the CSV"),
    "path-missing": (add_line(",1,test,train"), "are not in the CSV"),
    "scan-twice": (add_line("scan00.nii.gz,0,test,train"), "a scan listed twice"),
    "ragged": (add_line("x,1,test,train,test,train,test"), "not a table of folds"),
    "label-markup": (change_splits(label="<b>"), "another label"),
    "label-huge": (change_splits(label="1" + "0" * 400), "another label"),
    "label-nan": (change_splits(label=np.nan), "another label"),
    "part-unknown": (change_splits(fold_0="<b>"), "no fold columns"),
    "all-test": (change_splits(fold_0="test", fold_1="test"), "exactly one fold"),
    "none-test": (change_splits(fold_0="train", fold_1="train"), "exactly one fold"),
    "one-tests-all": (change_splits(fold_0="test", fold_1="train"), "fold_0 tests no scan, or"),
    "fold-numbers": (rename_fold, "not numbered from 0: fold_0, fold_1000000000"),
    "one-fold-more": (change_splits(fold_2="train"), "fold_2 tests no scan"),
    "nul": (lambda path: path.write_bytes(b"\0" * 100), "not a table of folds"),
    "no-rows": (lambda path: path.write_text("path,label,fold_0,fold_1\n"), "16 are not in"),
    "quote": (lambda path: path.write_text('"' + path.read_text()), "not a table of folds"),
}


@pytest.mark.parametrize(("change", "fragment"), SPLITS.values(), ids=SPLITS.keys())
def test_hostile_splits(cohort_csv, modelpath, tmp_path, refusal, change, fragment):
    change(modelpath / "splits.csv")
    message = refusal(heatmap, heatmap_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert fragment in message and "splits.csv" in message
    arguments = ["--path", cohort_csv, "--modelpath", modelpath, "--outpath", tmp_path / "svm"]
    assert fragment in refusal(svm, [*arguments, "--workers", "0"])
    assert not (tmp_path / "out").exists() and not (tmp_path / "svm").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions_f0.csv", "path,label,fold,probability,predicted\n../x,1,0,0.5,1\n"),
        ("predictions_f0.csv", "path,label,fold,probability,predicted\nscan00.nii.gz,a,b,c,d\n"),
        ("predictions_f0.csv", "path\nscan00.nii.gz\n"),
        ("predictions_f0.csv", ""),
        ("history_f0.csv", "epoch,train_loss,valid_loss\n1,<b>,2\n"),
        ("history_f0.csv", "epoch\n1\n"),
    ],
)
def test_hostile_results_of_a_finished_fold(cohort_csv, modelpath, refusal, name, content):
    (modelpath / name).write_text(content)
    message = refusal(train_cv, train_arguments(cohort_csv, modelpath))
    assert "predictions_f" in message or name in message


# Runs, sidecars and names in compare.py


@pytest.fixture
def inputs(tmp_path) -> list:
    """Return compare.py's arguments for a map of a method and a reference in one folder."""
    folder = tmp_path / "maps"
    folder.mkdir()
    save_scan(folder / "IG_map_all.nii.gz", make_volume(3, 0))
    save_scan(folder / "reference.nii.gz", make_volume(0, 1) * (np.indices(SHAPE)[0] > 12))
    return ["--maps", folder / "IG_map_all.nii.gz", "--reference", folder / "reference.nii.gz"]


METRICS_HEAD = "fold," + ",".join(page_data.METRICS_SHOWN) + "\n"
METRICS = METRICS_HEAD + "".join(
    f"{row},0.5,0.5,0.5,0.5,0.5\n" for row in ("0", *page_data.SUMMARY_ROWS)
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", METRICS.replace("0.5", "<b>", 1)),
        ("metrics.csv", METRICS + "pooled,0.5,0.5,0.5,0.5,0.5\n"),
        ("metrics.csv", METRICS_HEAD),
        ("metrics.csv", METRICS.replace("accuracy", "x")),
        ("metrics.csv", "\0"),
        ("predictions.csv", "label\n<b>\n"),
        ("predictions.csv", "label\n" + "9" * 400 + "\n"),
        ("predictions.csv", "x\n1\n"),
    ],
)
def test_hostile_tables_of_a_run(inputs, tmp_path, refusal, name, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text(METRICS)
    (run / "predictions.csv").write_text("label\n1\n0\n")
    page_data.load_run(run)
    (run / name).write_text(content)
    message = refusal(compare, [*inputs, "--run", run, "--outpath", tmp_path / "out"])
    assert f"--run {run} is no finished run" in message and name in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["much", [], {}, "1" * 500, 10**400])
def test_hostile_sidecar(inputs, tmp_path, refusal, value):
    sidecar = {"method": "IG", "median_completeness_error": value}
    inputs[1].with_name("IG_map_all.json").write_text(json.dumps(sidecar))
    if value == "1" * 500:  # a number too large for a float is infinite
        path = {"IG": inputs[1]}
        assert page_data.completeness_errors(path) == {"IG": float("inf")}
        return
    message = refusal(compare, [*inputs, "--outpath", tmp_path / "out"])
    assert "IG_map_all.json: median_completeness_error must be a number" in message
    assert not (tmp_path / "out").exists()


def save_huge(path: Path) -> None:
    """Write a small NIfTI file that claims 32767³ voxels."""
    header = nib.Nifti1Header()
    header["dim"] = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(header.binaryblock + bytes(1000))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_huge, "holds fewer voxels than its header says"),
        (lambda path: nib.save(nib.gifti.GiftiImage(), path), "is not a volume but a GiftiImage"),
        (lambda path: save_scan(path, np.ones((*SHAPE, 2))), "is not a 3D volume but has shape"),
        (lambda path: save_scan(path, make_volume(0, 0) * 1j), "voxels of type complex"),
    ],
    ids=["huge", "surface", "4d", "complex"],
)
def test_hostile_maps(inputs, tmp_path, refusal, save, message):
    path = tmp_path / ("x.gii" if "Gifti" in message else "x.nii")
    save(path)
    arguments = ["--maps", path, *inputs[2:], "--outpath", tmp_path / "out"]
    assert f"map {path} " in (found := refusal(compare, arguments)) and message in found


def test_what_files_name_is_not_followed(inputs, run_path, tmp_path, monkeypatch):
    """A sidecar's background and a record's paths are not opened; a text is no picture."""
    secret_path = tmp_path / "secret.nii.gz"
    save_scan(secret_path, make_volume(9, 1))
    sidecar = {"method": "IG", "background": "../secret.nii.gz", "median_completeness_error": 0.0}
    inputs[1].with_name("IG_map_all.json").write_text(json.dumps(sidecar))
    run = Path(shutil.copytree(run_path, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    record["arguments"] |= {"path": str(secret_path), "outpath": str(tmp_path / "elsewhere")}
    (run / "run.json").write_text(json.dumps(record))
    (tmp_path / "password.txt").write_text("hunter2")
    (run / "roc.png").unlink()
    (run / "roc.png").symlink_to(tmp_path / "password.txt")
    opened = []
    load = nib.load
    monkeypatch.setattr(nib, "load", lambda path: opened.append(str(path)) or load(path))
    argv = [*inputs, "--run", run, "--outpath", tmp_path / "out"]
    compare.main(compare.parse_args(list(map(str, argv))))
    assert opened and str(secret_path) not in map(os.path.realpath, opened)
    assert not (tmp_path / "elsewhere").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "losses per epoch" in page and "ROC curves of held-out" not in page


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the content of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.scripts, self.open = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts.append(data)
        self.open = ""


def hold_page(text: str) -> Tags:
    """Hold a page to having no tag, script or handler that its template does not have."""
    template_tags = Tags(report.TEMPLATE_PATH.read_text()).tags
    found = Tags(text)
    allowed = {tag for tag, _ in template_tags} | {
        "dt", "dd", "li", "div", "table", "tr", "th", "td", "figure", "img", "figcaption",
    }  # fmt: skip
    assert {tag for tag, _ in found.tags} <= allowed
    assert len(found.scripts) == sum(tag == "script" for tag, _ in template_tags)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
    return found


def test_page_of_hostile_names(run_path, tmp_path):
    """Markup in the names of files, folders, regions and runs is text on the page."""
    run = Path(shutil.copytree(run_path, tmp_path / "run"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"model": MARKUP + "\ud800" + "x" * 9999}))
    paths = []
    # with its folder, the first map's name is "</script><img …>"
    for folder in ("<", "<!--<script>"):
        (tmp_path / folder).mkdir()
        name = "script><img src=x onerror=alert(1)>$\\frac$_all.nii.gz"
        paths.append(save_scan(tmp_path / folder / name, make_volume(3, 0)))
    reference_path = save_scan(tmp_path / "<i>\udcff.nii.gz", (make_volume(0, 1) > 1.05) * 1.0)
    atlas_path = save_scan(tmp_path / "atlas.nii.gz", (make_volume(0, 0) > 0) * 1.0)
    pd.DataFrame({"number": [1], "name": [MARKUP]}).to_csv(tmp_path / "<u>.csv", index=False)
    argv = [
        "--maps", *paths, "--reference", reference_path, "--run", run, "--atlas", atlas_path,
        "--atlas-labels", tmp_path / "<u>.csv", "--outpath", tmp_path / "out",
    ]  # fmt: skip
    compare.main(compare.parse_args(list(map(str, argv))))
    text = (tmp_path / "out" / "report.html").read_text()
    data = json.loads(hold_page(text).scripts[0])
    assert data["maps"][0]["name"].startswith("</script><img src=x onerror=")
    assert data["maps"][1]["name"].startswith("<!--<script>/script>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script>alert" not in text and "<img src=x" not in text


def test_viewer_of_a_hostile_title(tmp_path):
    img = nib.Nifti1Image(make_volume(0, 1), AFFINE)
    report.write_viewer(tmp_path / "v.html", img, img, MARKUP)
    text = (tmp_path / "v.html").read_text()
    assert not [tag for tag, attributes in Tags(text).tags if "onerror" in attributes]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


# Names of scans and subjects

NAMES = [
    "<script>alert(1)<_script>.nii.gz", "脑" * 80 + ".nii.gz", "x" * 248 + ".nii.gz",
    "..hidden..nii.gz", "a\nb.nii.gz", "sub-01 $HOME `id` ;rm.nii.gz", "-rf.nii.gz", "🧠\u202e.nii",
]  # fmt: skip
SUBJECTS = ["../../etc", "/etc/passwd", "<script>alert(1)</script>", "脑" * 100, "a\nb", "~", "..",
            "x" * 300]  # fmt: skip


@pytest.fixture
def odd_csv(tmp_path) -> Path:
    """Return the data.csv of scans and subjects with hostile names, in a folder of their own."""
    folder = tmp_path / "in" / "scans"
    folder.mkdir(parents=True)
    rows = []
    for index, (name, subject) in enumerate(zip(NAMES, SUBJECTS, strict=True)):
        save_scan(folder / name, make_volume(index, index % 2))
        rows.append({"path": f"../scans/{name}", "label": index % 2, "subject": subject})
    pd.DataFrame(rows).to_csv(folder / "data.csv", index=False)
    return folder / "data.csv"


def files_below(folder: Path) -> set[str]:
    """Return all paths below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_maps_of_scans_with_hostile_names(odd_csv, run_path, tmp_path):
    modelpath = tmp_path / "weights"
    modelpath.mkdir()
    for fold in range(2):
        shutil.copy(run_path / f"state_dict_f{fold}.pth", modelpath)
    before = files_below(tmp_path)
    more = ["--subjects", "all", "--fold", "2", "--save-subjects"]
    argv = heatmap_arguments(odd_csv, modelpath, tmp_path / "out", *more)
    heatmap.main(heatmap.parse_args(list(map(str, argv))))
    assert all(path.startswith("out") for path in files_below(tmp_path) - before)
    table = pd.read_csv(tmp_path / "out" / "GGC_predictions.csv")
    assert len(table) == 2 * len(NAMES) and table["map"].is_unique
    for name in table["map"]:
        assert re.fullmatch(r"GGC_subjects/\d{5}_[\w-]*_f\d\.nii\.gz", name)
        assert (tmp_path / "out" / name).is_file() and len(name.encode()) < 150


def test_a_run_of_subjects_with_hostile_names(odd_csv, tmp_path):
    before = files_below(tmp_path)
    arguments = train_arguments(odd_csv, tmp_path / "out", "--epochs", "1", "--seed", "1")
    train_cv.main(train_cv.parse_args(arguments))
    assert all(path.startswith("out") for path in files_below(tmp_path) - before)
    for name in ("splits.csv", "predictions.csv"):
        table = pd.read_csv(tmp_path / "out" / name, keep_default_na=False)
        assert table["path"].tolist() == [f"../scans/{name}" for name in NAMES]
    splits = pd.read_csv(tmp_path / "out" / "splits.csv")
    assert splits["subject"].tolist() == SUBJECTS


def test_logs_carry_no_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(utils.log, "propagate", False)  # pytest's own log could not be sent on
    utils.start_log(tmp_path / "x.log")
    utils.log.warning("both labels: %s", "ä\x1b[2J\udcff\u202e")
    utils.start_log()
    for text in (capsys.readouterr().err, (tmp_path / "x.log").read_text()):
        assert r"both labels: ä\x1b[2J\udcff\u202e" in text


@pytest.mark.parametrize("outpath", ["x" * 300, "file/below"])
def test_an_outpath_that_cannot_be(tmp_path, outpath):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"):
        utils.make_outpath(tmp_path / outpath)
