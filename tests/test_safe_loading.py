"""Files from elsewhere run no code, lead to no other place, and put no markup into pages."""

import ast
import json
import os
import pickle
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    SHAPE,
    contents_below,
    exit_status,
    explain,
    explain_arguments,
    make_volume,
    save_scan,
    train_arguments,
)

import compare
import heatmap
import svm
import train_cv
from comparing import page, runs
from loading.cache import Volumes
from reporting import map_pictures
from reporting.metrics import SUMMARY_ROWS

ROOT = Path(train_cv.__file__).parent
PACKAGES = ("attribution", "run_folder", "loading", "reporting", "comparing")
PRODUCT = [*ROOT.glob("*.py"), *(path for p in PACKAGES for path in (ROOT / p).rglob("*.py"))]
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&<!--"
FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|(pickle|marshal|shelve|dill)\.(loads?|Unpickler|open)|joblib\..*"
    r"|(np|numpy)\.fromfile|pd\.(read_pickle|eval|read_hdf)|yaml\..*|subprocess\..*"
    r"|os\.(system|popen|exec.*|spawn.*)|importlib\..*|.*\.(query|eval_expr))"
)


# Code


def test_no_module_calls_what_can_run_a_file():
    """`torch.load` only with weights_only, `np.load` without pickles; nothing else unpickles."""
    names = {str(path.relative_to(ROOT)) for path in PRODUCT}
    assert len(names) >= 29 and {"loading/image.py", "attribution/lrp.py"} <= names
    n_loads = 0
    for path in PRODUCT:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            assert not FORBIDDEN.fullmatch(name), f"{path.name}:{call.lineno} {name}"
            if name in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in ast.unparse(call)
            if name == "torch.load":
                n_loads += 1
                assert path.name == "checkpoints.py" and "weights_only=True" in ast.unparse(call)
    assert n_loads == 1


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
        with path.open("wb") as file:
            np.save(file, np.array([SideEffect(trace)], dtype=object), allow_pickle=True)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    return trace


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy archive", "npy"])
def test_weights_run_no_code(cohort_csv, modelpath, tmp_path, refusal, kind):
    trace = save_poison(modelpath / "state_dict_f0.pth", kind)
    message = refusal(heatmap, explain_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert "state_dict_f0.pth holds no weights of this model" in message
    assert not trace.exists()
    if kind == "npy":  # the poison works, or the lines above would show nothing
        np.load(modelpath / "state_dict_f0.pth", allow_pickle=True)
    else:
        load = pickle.load if kind == "pickle" else partial(torch.load, weights_only=False)
        with (modelpath / "state_dict_f0.pth").open("rb") as file:
            load(file)
    assert trace.is_dir()


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy archive"])
def test_an_unfinished_folds_checkpoint_runs_no_code(cohort_csv, modelpath, capsys, kind):
    (modelpath / "predictions_f0.csv").unlink()
    trace = save_poison(modelpath / "checkpoint_f0.pt", kind)
    assert exit_status(train_cv, train_arguments(cohort_csv, modelpath)) == 2
    message = capsys.readouterr().err
    assert "checkpoint_f0.pt cannot resume this fold; start anew with --overwrite" in message
    assert not trace.exists()


def test_a_decoded_scan_runs_no_code(tmp_path):
    """A --cache-dir may lie where others write."""
    volumes = Volumes([str(tmp_path / "scan.nii")], np.zeros(1, int), SHAPE, tmp_path)
    trace = save_poison(volumes.paths[0], "npy")
    n_bytes = round(1e9 * volumes.gb)  # of a file that is taken for a whole one
    volumes.paths[0].write_bytes(volumes.paths[0].read_bytes().ljust(n_bytes, b"\0"))
    assert volumes.missing() == []
    with pytest.raises(ValueError, match="Python objects"):
        volumes[0]
    assert not trace.exists()


# Records and tables of a run, of which tests/run_folder has more

RECORDS = {
    "folds": ({"n_folds": float("inf")}, "how many folds"),
    "shape": ({"volume_shape": [[24], [27], [23]]}, "volume_shape is [[24]"),
    "affine": ({"affine": [[10**400] * 4] * 4}, "says that affine is"),
    "model": ({"model": ["modelT8"]}, "not modelT8"),
    "terminal codes": ({"model": "\x1b[2J\x1b]0;x\x07\u202e"}, r"model is \x1b[2J"),
}


@pytest.mark.parametrize(("values", "fragment"), RECORDS.values(), ids=RECORDS.keys())
def test_hostile_record(cohort_csv, modelpath, tmp_path, refusal, values, fragment):
    run = json.loads((modelpath / "run.json").read_text())
    (modelpath / "run.json").write_text(json.dumps(run | values))
    message = refusal(heatmap, explain_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert fragment in message and "\x1b" not in message and "\u202e" not in message


SPLITS = {
    "path outside": (lambda text: text + "../../../etc/passwd,1,test,train\n", "not in the CSV"),
    "label huge": (lambda text: text.replace(",1,", ",1" + "0" * 400 + ","), "is not a table of"),
    "part unknown": (lambda text: text.replace("train", "<b>"), "is not a table of folds"),
    "nul": (lambda text: "\0" * 100, "is not a table of"),
}


@pytest.mark.parametrize(("change", "fragment"), SPLITS.values(), ids=SPLITS.keys())
def test_hostile_splits(cohort_csv, modelpath, tmp_path, refusal, change, fragment):
    path = modelpath / "splits.csv"
    path.write_text(change(path.read_text()))
    message = refusal(heatmap, explain_arguments(cohort_csv, modelpath, tmp_path / "out"))
    assert fragment in message and "splits.csv" in message
    arguments = ["--path", cohort_csv, "--modelpath", modelpath, "--outpath", tmp_path / "svm"]
    assert fragment in refusal(svm, arguments)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions_f0.csv", "path,label,fold,probability,predicted\n../x,1,0,0.5,1\n"),
        ("predictions_f0.csv", "path,label,fold,probability,predicted\nscan00.nii.gz,a,b,c,d\n"),
        ("history_f0.csv", "epoch,train_loss,valid_loss\n1,<b>,2\n"),
    ],
)
def test_hostile_results_of_a_finished_fold(cohort_csv, modelpath, capsys, name, content):
    (modelpath / name).write_text(content)
    assert exit_status(train_cv, train_arguments(cohort_csv, modelpath)) == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and name.split("0")[0] in message


# Runs, sidecars and names in compare.py


@pytest.fixture
def inputs(tmp_path) -> list:
    """Return compare.py's arguments for a map of a method and a reference in one folder."""
    folder = tmp_path / "maps"
    folder.mkdir()
    save_scan(folder / "IG_map_all.nii.gz", make_volume(3, 0))
    save_scan(folder / "reference.nii.gz", make_volume(0, 1) * (np.indices(SHAPE)[0] > 12))
    return ["--maps", folder / "IG_map_all.nii.gz", "--reference", folder / "reference.nii.gz"]


COLUMNS = ("n", *runs.METRICS_SHOWN, "tp", "tn", "fp", "fn")
PREDICTIONS = "path,label,fold,probability,predicted\na,1,0,0.5,1\nb,0,0,0.5,0\n"
METRICS = "".join(
    f"{row},{','.join(values)}\n"
    for row, values in [
        ("fold", COLUMNS), *((row, len(COLUMNS) * ["0.5"]) for row in ("0", *SUMMARY_ROWS))
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", METRICS.replace("0.5", "<b>", 1)),
        ("metrics.csv", METRICS + "pooled" + len(COLUMNS) * ",0.5" + "\n"),
        ("predictions.csv", PREDICTIONS.replace(",1,", "9" * 400, 1)),
        ("predictions.csv", PREDICTIONS + "a,1,0,0.5,1\n"),
    ],
)
def test_hostile_tables_of_a_run(inputs, tmp_path, refusal, name, content):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.csv").write_text(METRICS)
    (run / "predictions.csv").write_text(PREDICTIONS)
    (loaded,) = runs.load_runs([run])
    assert loaded.predictions["label"].sum() == 1
    (run / name).write_text(content)
    message = refusal(compare, [*inputs, "--run", run, "--outpath", tmp_path / "out"])
    assert f"--run {run} is no finished run" in message and name in message


@pytest.mark.parametrize("value", ["much", [], 10**400], ids=["text", "list", "huge"])
def test_hostile_sidecar(inputs, tmp_path, refusal, value):
    sidecar = {"method": "IG", "median_completeness_error": value}
    inputs[1].with_name("IG_map_all.json").write_text(json.dumps(sidecar))
    message = refusal(compare, [*inputs, "--outpath", tmp_path / "out"])
    assert "IG_map_all.json: median_completeness_error must be a number" in message


def test_a_map_that_claims_more_voxels_than_its_file_can_hold(inputs, tmp_path, refusal):
    header = nib.Nifti1Header()
    header["dim"] = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    header["magic"], header["vox_offset"] = b"n+1", 352
    (tmp_path / "x.nii").write_bytes(header.binaryblock + bytes(1000))
    arguments = ["--maps", tmp_path / "x.nii", *inputs[2:], "--outpath", tmp_path / "out"]
    assert "x.nii is truncated or damaged" in refusal(compare, arguments)


def test_what_files_name_is_not_followed(inputs, modelpath, tmp_path, monkeypatch):
    """A sidecar's background and a record's paths are not opened; a text is no picture."""
    secret_path = save_scan(tmp_path / "secret.nii.gz", make_volume(9, 1))
    sidecar = {"method": "IG", "background": "../secret.nii.gz", "median_completeness_error": 0.0}
    inputs[1].with_name("IG_map_all.json").write_text(json.dumps(sidecar))
    record = json.loads((modelpath / "run.json").read_text())
    record["arguments"] |= {"path": str(secret_path), "outpath": str(tmp_path / "elsewhere")}
    (modelpath / "run.json").write_text(json.dumps(record))
    (tmp_path / "password.txt").write_text("hunter2")
    (modelpath / "roc.png").unlink()
    (modelpath / "roc.png").symlink_to(tmp_path / "password.txt")
    opened, load = [], nib.load
    monkeypatch.setattr(nib, "load", lambda path: opened.append(str(path)) or load(path))
    argv = [*inputs, "--run", modelpath, "--outpath", tmp_path / "out"]
    assert exit_status(compare, argv) == 0
    assert opened and str(secret_path) not in map(os.path.realpath, opened)
    assert not (tmp_path / "elsewhere").exists()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "losses per epoch" in text and "ROC curves of held-out" not in text


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


def check_page(text: str) -> Tags:
    """Hold a page to having no tag, script or handler that its template does not have."""
    template_tags = Tags(page.TEMPLATE_PATH.read_text()).tags
    found = Tags(text)
    allowed = {tag for tag, _ in template_tags} | {
        "dt", "dd", "li", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "img",
        "figcaption", "small", "span", "b", "i", "u",
    }  # fmt: skip
    assert {tag for tag, _ in found.tags} <= allowed
    assert len(found.scripts) == sum(tag == "script" for tag, _ in template_tags)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
    return found


def test_page_of_hostile_names(modelpath, tmp_path):
    """Markup in the names of files, folders, regions and runs is text on the page."""
    record = json.loads((modelpath / "run.json").read_text())
    record["model"] = MARKUP + "\ud800" + "x" * 9999
    (modelpath / "run.json").write_text(json.dumps(record))
    paths = []
    for folder in ("<", "<!--<script>"):  # with it, the first map's name is "</script><img …>"
        (tmp_path / folder).mkdir()
        name = "script><img src=x onerror=alert(1)>$\\frac$_all.nii.gz"
        paths.append(save_scan(tmp_path / folder / name, make_volume(3, 0)))
    reference_path = save_scan(tmp_path / "<i>\udcff.nii.gz", (make_volume(0, 1) > 1.05) * 1.0)
    atlas_path = save_scan(tmp_path / "atlas.nii.gz", (make_volume(0, 0) > 0) * 1.0)
    pd.DataFrame({"number": [1], "name": [MARKUP]}).to_csv(tmp_path / "<u>.csv", index=False)
    argv = [
        "--maps", *paths, "--reference", reference_path, "--run", modelpath, "--atlas", atlas_path,
        "--atlas-labels", tmp_path / "<u>.csv", "--outpath", tmp_path / "out",
    ]  # fmt: skip
    assert exit_status(compare, argv) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    data = json.loads(check_page(text).scripts[0])
    assert data["maps"][0]["name"].startswith("</script><img src=x onerror=")
    assert data["maps"][1]["name"].startswith("<!--<script>/script>")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script>alert" not in text and "<img src=x" not in text


def test_viewer_of_a_hostile_title(tmp_path):
    path = save_scan(tmp_path / "m.nii.gz", make_volume(0, 1))
    *_, html_path = map_pictures.draw_map(tmp_path / "m", path, MARKUP, MARKUP)
    text = html_path.read_text()
    assert not [tag for tag, attributes in Tags(text).tags if "onerror" in attributes]
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


# Names of scans and subjects

NAMES = [
    "<script>alert(1)<_script>.nii.gz", "脑" * 80 + ".nii.gz", "x" * 248 + ".nii.gz",
    "..hidden..nii.gz", "a\nb.nii.gz", "sub-01 $HOME `id` ;rm.nii.gz", "-rf.nii.gz", "🧠\u202e.nii",
]  # fmt: skip
SUBJECTS = ["../../etc", "/etc/passwd", "<script>alert(1)</script>", "脑" * 100, "a\nb", "~", "..",
            "x" * 300]  # fmt: skip


def test_scans_and_subjects_with_hostile_names(run_path, tmp_path):
    """Training and heatmaps write below --outpath only, and tables keep the names."""
    folder = tmp_path / "in" / "scans"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"path": [f"../scans/{name}" for name in NAMES],
                          "label": np.arange(len(NAMES)) % 2, "subject": SUBJECTS})  # fmt: skip
    table.to_csv(folder / "data.csv", index=False)
    for index, name in enumerate(NAMES):
        save_scan(folder / name, make_volume(index, index % 2))
    before = contents_below(tmp_path)
    more = ["--epochs", "1", "--seed", "1"]
    arguments = train_arguments(folder / "data.csv", tmp_path / "out", *more)
    train_cv.main(train_cv.parse_args(arguments))
    more = ["--subjects", "all", "--save-subjects", "--only-fold", "0"]
    explain(folder / "data.csv", tmp_path / "out", tmp_path / "out" / "maps", *more)
    written = contents_below(tmp_path).items() - before.items()
    assert all(Path(name).parts[0] == "out" for name, _ in written)
    for name in ("splits.csv", "predictions.csv"):
        found = pd.read_csv(tmp_path / "out" / name, keep_default_na=False)
        assert found["path"].tolist() == table["path"].tolist()
    assert pd.read_csv(tmp_path / "out" / "splits.csv")["subject"].tolist() == SUBJECTS
    maps = pd.read_csv(tmp_path / "out" / "maps" / "GGC_predictions_f0.csv")["map"]
    assert len(maps) == len(NAMES) and maps.is_unique
    for name in maps:
        assert re.fullmatch(r"GGC_subjects/\d{5}_[\w-]*_f0\.nii\.gz", name)
        assert (tmp_path / "out" / "maps" / name).is_file() and len(name.encode()) < 150
