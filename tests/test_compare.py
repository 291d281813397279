"""compare.py: grids, masks, references, folds, the table, and the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

import compare
import files
import utils

SHAPE = (13, 16, 11)
AFFINE = np.array([[-2.0, 0, 0, 12], [0, 2, 0, -16], [0, 0, 2, -10], [0, 0, 0, 1]])
BROWSER = shutil.which("chromium")
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine), path)
    return path


def run(*argv, outpath: Path) -> pd.DataFrame:
    compare.main(compare.parse_args([*map(str, argv), "--outpath", str(outpath)]))
    return pd.read_csv(outpath / "comparison.csv").set_index("map")


def blob(start: tuple) -> np.ndarray:
    data = np.zeros(SHAPE)
    data[tuple(slice(s, s + 3) for s in start)] = 1
    return data


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """Return a map with two fold maps, a reference, a mask and an atlas, all on one grid."""
    rng = np.random.default_rng(0)
    reference = blob((2, 3, 4))
    found = {
        "map": save(tmp_path / "IG_map_all.nii.gz", reference + 0.5 * rng.random(SHAPE)),
        "f0": save(tmp_path / "IG_map_f0.nii.gz", reference),
        "f1": save(tmp_path / "IG_map_f1.nii.gz", reference[::-1]),
        "reference": save(tmp_path / "reference.nii.gz", reference),
        "mask": save(tmp_path / "mask.nii.gz", np.ones(SHAPE)),
        "atlas": save(tmp_path / "atlas.nii.gz", reference * 3),
        "labels": tmp_path / "labels.csv",
    }
    found["labels"].write_text("index,name\n3,hippocampus\n")
    return found


def test_a_map_against_itself(inputs, tmp_path):
    table = run("--maps", inputs["reference"], "--reference", inputs["reference"],
                "--mask", inputs["mask"], outpath=tmp_path / "out")  # fmt: skip
    row = table.loc["reference"]
    assert row["dice_matched"] == row["average_precision"] == row["roc_auc"] == row["mass"] == 1
    assert row["n_reference"] == 27 and row["n_mask"] == np.prod(SHAPE)
    assert row["p"] == pytest.approx(27 / np.prod(SHAPE))


def test_what_a_killed_run_left_is_removed(inputs, tmp_path):
    leftover = tmp_path / f"{files.TEMPORARY_PREFIX}{os.uname().nodename}@999999999@x.csv"
    leftover.write_text("half")
    run("--maps", inputs["map"], "--reference", inputs["reference"], outpath=tmp_path)
    assert not leftover.exists()


def test_a_map_against_its_mirror_image(inputs, tmp_path):
    """Mirrored, the blob lies at x 8…10 instead of 2…4: nothing overlaps.

    27 voxels rank first, all wrong; all others tie, so the one step left has precision p.
    """
    mirrored = save(tmp_path / "mirrored.nii.gz", blob((2, 3, 4))[::-1])
    row = run("--maps", mirrored, "--reference", inputs["reference"], "--mask", inputs["mask"],
              outpath=tmp_path / "out").loc["mirrored"]  # fmt: skip
    n_voxels = np.prod(SHAPE)
    assert row["dice_matched"] == row["mass"] == 0
    assert row["average_precision"] == pytest.approx(27 / n_voxels)
    assert row["roc_auc"] == pytest.approx(0.5 * (n_voxels - 54) / (n_voxels - 27))


def test_fold_maps_beside_the_map(inputs, tmp_path):
    row = run("--maps", inputs["map"], "--reference", inputs["reference"], "--mask",
              inputs["mask"], outpath=tmp_path / "out").loc["IG"]  # fmt: skip
    assert row["n_folds"] == 2
    assert row["dice_matched_folds_mean"] == 0.5  # 1 and 0
    assert row["dice_matched_folds_sd"] == pytest.approx(np.sqrt(0.5))


def test_reference_in_another_space_is_resampled(inputs, tmp_path):
    """The same blob at 1 mm, stored with other axes, gives the same voxels at 2 mm."""
    fine = blob((2, 3, 4)).repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = nib.affines.apply_affine(AFFINE, [-0.25] * 3)
    turned = nib.as_closest_canonical(nib.Nifti1Image(fine, affine))
    fine_path = save(tmp_path / "fine.nii.gz", turned.get_fdata(), turned.affine)
    expected, found = (
        run("--maps", inputs["map"], "--reference", path, "--mask", inputs["mask"],
            outpath=tmp_path / path.stem)
        for path in (inputs["reference"], fine_path)
    )  # fmt: skip
    assert found["n_reference"].item() == 27
    assert found["dice_matched"].item() == expected["dice_matched"].item()


def test_reference_threshold(inputs, tmp_path):
    """Of a statistical map only what is above the threshold counts."""
    z_map = save(tmp_path / "z.nii.gz", 4 * blob((2, 3, 4)) + 2 * blob((8, 3, 4)))
    more = ["--maps", inputs["map"], "--reference", z_map, "--mask", inputs["mask"]]
    assert run(*more, outpath=tmp_path / "a")["n_reference"].item() == 54
    more += ["--reference-threshold", "3.1"]
    assert run(*more, outpath=tmp_path / "b")["n_reference"].item() == 27


def test_default_mask_is_the_mean_scan_or_any_map(inputs, tmp_path):
    brain = np.zeros(SHAPE)
    brain[1:9] = 1
    save(tmp_path / "mean_scan.nii.gz", brain)
    sparse = save(tmp_path / "sparse.nii.gz", blob((8, 3, 4)))
    more = ["--maps", sparse, "--reference", inputs["reference"]]
    row = run(*more, outpath=tmp_path / "out").loc["sparse"]
    assert row["n_mask"] == 8 * 16 * 11 + 2 * 9
    assert "mean scan or any map" in (tmp_path / "out" / "compare.log").read_text()


def test_sign_and_smoothing(inputs, tmp_path):
    """A negative blob on the reference counts for abs, not for pos; smoothing spreads it."""
    negative = save(tmp_path / "negative.nii.gz", -blob((2, 3, 4)))
    more = ["--maps", negative, "--reference", inputs["reference"], "--mask", inputs["mask"]]
    assert run(*more, outpath=tmp_path / "a")["mass"].item() == 1
    assert np.isnan(run(*more, "--sign", "pos", outpath=tmp_path / "b")["mass"].item())
    assert 0.1 < run(*more, "--fwhm", "6", outpath=tmp_path / "c")["mass"].item() < 0.9


def test_regions(inputs, tmp_path, caplog):
    more = ["--maps", inputs["f0"], "--reference", inputs["reference"], "--mask", inputs["mask"],
            "--atlas", inputs["atlas"], "--atlas-labels", inputs["labels"]]  # fmt: skip
    run(*more, outpath=tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "regions.csv")
    assert table.to_dict("records") == [
        {"map": "IG_map_f0", "region": 3, "name": "hippocampus", "n_voxels": 27, "sum": 27.0,
         "share": 1.0, "mean": 1.0, "dice": 1.0}
    ]  # fmt: skip
    inputs["labels"].write_text("index,name\n4,amygdala\n")
    with caplog.at_level("WARNING", logger="heatmaps"):
        run(*more, outpath=tmp_path / "out2")
    assert "without a name" in caplog.text and "[3]" in caplog.text


def test_the_same_command_twice_gives_identical_tables(inputs, tmp_path):
    more = ["--maps", inputs["map"], inputs["f0"], "--reference", inputs["reference"]]
    tables = []
    for name in ("a", "b"):
        run(*more, outpath=tmp_path / name)
        tables.append((tmp_path / name / "comparison.csv").read_bytes())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map": None}, "there is no map"),
        ({"map": b"no image"}, "not a readable image"),
        ({"reference": np.zeros(SHAPE)}, "has no voxel above 0"),
        ({"reference": np.ones(SHAPE)}, "fills the whole analysis mask"),
        ({"mask": np.ones((5, 6, 7))}, "are not on one grid"),
        ({"f1": np.ones((5, 6, 7))}, "are not on one grid"),
        ({"labels": b"one column\n1\n"}, "number and name"),
        ({"labels": None}, "number and name"),
        (["--fwhm", "-1"], "--fwhm: must be at least 0"),
        (["--sign", "square"], "invalid choice"),
        (["--run", "nowhere"], "is no finished run"),
    ],
)
def test_bad_input(inputs, tmp_path, capsys, change, message):
    more = change if isinstance(change, list) else []
    for name, content in {} if more else change.items():
        if content is None:
            inputs[name].unlink()
        elif isinstance(content, bytes):
            inputs[name].write_bytes(content)
        else:
            save(inputs[name], content)
    argv = ["--maps", inputs["map"], "--reference", inputs["reference"], "--mask", inputs["mask"],
            "--atlas", inputs["atlas"], "--atlas-labels", inputs["labels"], "--outpath",
            tmp_path / "out", *more]  # fmt: skip
    try:
        status = utils.run_script(compare.main, compare.parse_args(list(map(str, argv))))
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_maps_on_other_grids_show_both_affines(inputs, tmp_path, capsys):
    shifted = AFFINE.copy()
    shifted[0, 3] = 77
    other = save(tmp_path / "other.nii.gz", np.ones(SHAPE), shifted)
    argv = ["--maps", inputs["map"], other, "--reference", inputs["reference"]]
    args = compare.parse_args([*map(str, argv), "--outpath", str(tmp_path / "out")])
    assert utils.run_script(compare.main, args) == 2
    message = capsys.readouterr().err
    assert "77." in message and "12." in message


@pytest.fixture
def page(inputs, run_path, tmp_path) -> Path:
    """Return a report.html with runs, regions, two maps, and a file name that must be escaped."""
    odd_path = tmp_path / "<b>odd & map_all.nii.gz"
    shutil.copy(inputs["f1"], odd_path)
    run("--maps", inputs["map"], odd_path, "--reference", inputs["reference"], "--run", run_path,
        "--atlas", inputs["atlas"], "--atlas-labels", inputs["labels"],
        outpath=tmp_path / "out")  # fmt: skip
    return tmp_path / "out" / "report.html"


def test_page_is_self_contained_and_escaped(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "&lt;b&gt;odd &amp; map" in text and "<b>odd" not in text.split('id="data"')[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [m["name"] for m in data["maps"]] == ["IG", "<b>odd & map"]
    assert page.stat().st_size < 25e6


PROBE = """
<script>
window.addEventListener("error", event => document.title = "ERROR " + event.message);
window.addEventListener("load", () => {
  const canvases = [...document.querySelectorAll("canvas")];
  const seen = () => canvases.map(c => c.toDataURL()).join();
  const before = seen(), reading = document.querySelector(".reading").textContent;
  const frame = canvases[0].getBoundingClientRect();
  canvases[0].dispatchEvent(new MouseEvent("click",
    {clientX: frame.left + frame.width * .2, clientY: frame.top + frame.height * .2}));
  const wide = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".wide") && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const boxes = [...document.body.children].map(e => e.getBoundingClientRect())
    .filter(b => b.height);
  const overlaps = boxes.slice(1).filter((b, i) => b.top < boxes[i].bottom - 1).length;
  document.body.innerHTML = "<pre id=found>" + JSON.stringify({
    error: document.title.startsWith("ERROR") ? document.title : "", canvases: canvases.length,
    moved: before !== seen(), wide, overlaps, width: innerWidth,
    requests: performance.getEntriesByType("resource")
      .filter(e => !e.name.startsWith("data:")).length,
    read: reading !== "" }) + "</pre>";
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(page, tmp_path, width):
    """It loads without an error or a request, the viewers move, nothing overlaps or is cut off."""
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text().replace("<body>", "<body>" + PROBE))
    frame = page.with_name("frame.html")  # headless windows are not narrower than 500 pixels
    frame.write_text(
        f'<iframe src="probe.html" width="{width}" height="4000" frameborder=0></iframe>'
    )
    command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1400,4200", "--virtual-time-budget=5000",
               "--enable-logging=stderr", "--allow-file-access-from-files"]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{probe}"] if width > 500
        else [*command, "--dump-dom", f"file://{frame_with_result(frame, width)}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = json.loads(
        re.search(r'id="found">(.*?)</pre>', done.stdout, re.S)[1].replace("&quot;", '"')
    )
    assert found["error"] == "" and "CONSOLE" not in done.stderr, done.stderr
    assert found["canvases"] == 6 and found["moved"] and found["read"]
    assert found["requests"] == 0
    assert found["wide"] == [] and found["overlaps"] == 0


def frame_with_result(frame: Path, width: int) -> Path:
    """Return a page that shows the probe in a frame of this width and then copies its result."""
    frame.write_text(
        f'<iframe id=f src="probe.html" width="{width}" height="4000" frameborder=0></iframe>'
        "<script>f.onload = () => setTimeout(() => document.body.innerHTML = "
        "f.contentDocument.body.innerHTML, 500);</script>"
    )
    return frame
