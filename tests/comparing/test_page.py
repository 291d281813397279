"""report.html: self-contained, escaped, with its warnings, and working in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SHAPE, make_volume, save_scan
from nilearn.image import smooth_img

import compare
from comparing import finding, page_tables, viewer
from comparing.maps import Map
from comparing.measures import Settings
from comparing.runs import Run

BROWSER = shutil.which("chromium")
BROWSER_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr",
    "--window-size=1400,4200", "--virtual-time-budget=5000",
]  # fmt: skip
PROBE = """
<script>
window.addEventListener("error", event => document.title = "ERROR " + event.message);
window.addEventListener("load", () => {
  const canvases = [...document.querySelectorAll("canvas.slice")];
  const seen = () => canvases.map(c => c.toDataURL()).join();
  const first = seen(), reading = document.querySelector(".reading").textContent;
  const moves = [];
  const moved = what => { const before = seen(); what(); moves.push(before !== seen()); };
  const frame = canvases[0].getBoundingClientRect();
  moved(() => canvases[0].dispatchEvent(new PointerEvent("pointerdown",
    {clientX: frame.left + frame.width * .2, clientY: frame.top + frame.height * .2})));
  moved(() => canvases[0].dispatchEvent(new WheelEvent("wheel", {deltaY: 1})));
  moved(() => canvases[0].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp"})));
  moved(() => document.querySelector("button").click());
  moved(() => { const slider = document.querySelector("input[type=range]");
    slider.value = 80; slider.dispatchEvent(new Event("input")); });
  moved(() => document.querySelector("input[type=checkbox]").click());
  const values = maps.map(map => [map.peak, ...PLACES].map(voxel => valueAt(map, voxel)));
  const wide = [...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const boxes = [...document.body.children].map(e => e.getBoundingClientRect())
    .filter(b => b.height);
  const overlaps = boxes.slice(1).filter((b, i) => b.top < boxes[i].bottom - 1).length;
  document.body.innerHTML = "<pre id=found>" + JSON.stringify({
    error: document.title.startsWith("ERROR") ? document.title : "", canvases: canvases.length,
    moves, values, peaks: maps.map(map => map.peak), wide, overlaps, reading,
    requests: performance.getEntriesByType("resource")
      .filter(e => !e.name.startsWith("data:")).length }) + "</pre>";
});
</script>
"""
# headless windows are not narrower than 500 pixels: a frame is, and its result is copied out
FRAME = """<iframe id=f src="probe.html" width="{}" height="4000" frameborder=0></iframe>
<script>f.onload = () => setTimeout(() =>
  document.body.innerHTML = f.contentDocument.body.innerHTML, 500);</script>
"""


@pytest.fixture(scope="module")
def page_path(run_path, tmp_path_factory) -> Path:
    """Return a page with a run, regions, two maps, and a file name that must be escaped."""
    folder = tmp_path_factory.mktemp("page")
    reference = np.zeros(SHAPE, dtype=np.float32)
    reference[4:10, 10:16, 5:12] = 1
    save = {"IG_map_all": make_volume(0, 1) - 0.5, "<b>odd & map_all": make_volume(1, 0),
            "IG_random_map_all": make_volume(2, 0), "reference": reference,
            "atlas": 3 * reference}  # fmt: skip
    paths = [save_scan(folder / f"{name}.nii.gz", data) for name, data in save.items()]
    sidecar = {"method": "IG", "parameters": {"n_steps": 20}, "target": "1", "model": "modelT8",
               "unit": "contribution to <the> logit", "scans_per_fold": {"0": 8, "1": 8},
               "verdict_short": "ROC AUC 0.50: explains nothing"}  # fmt: skip
    (folder / "IG_map_all.json").write_text(json.dumps(sidecar))
    (folder / "labels.csv").write_text("index,name\n3,hippocampus\n")
    argv = ["--maps", *paths[:2], "--reference", paths[3], "--atlas", paths[4], "--atlas-labels",
            folder / "labels.csv", "--run", run_path, "--fwhm", "4", "0", "--outpath",
            folder / "out"]  # fmt: skip
    compare.main(compare.parse_args(list(map(str, argv))))
    return folder / "out" / "report.html"


def test_page_is_self_contained_and_escaped(page_path):
    text = page_path.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "&lt;b&gt;odd &amp; map" in text and "<b>odd" not in text.split('id="data"')[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [m["name"] for m in data["maps"]] == ["IG", "IG_random", "<b>odd & map"]
    title = "IG (20 steps) of the patients' logit · modelT8 · 2 folds, 16 scans"
    assert data["maps"][0]["title"] == title
    assert data["maps"][0]["unit"] == "contribution to <the> logit"
    assert "hippocampus" in text and "losses per epoch" in text and "modelT8" in text
    assert page_path.stat().st_size < 25e6


def test_the_page_begins_with_the_finding_and_ends_with_how_it_was_made(page_path):
    text = page_path.read_text().split('id="data"')[0]
    heads = re.findall(r"<h[12]>(.*?)</h[12]>", text)
    assert heads == ["What the maps show", "The maps", "How stable the maps are",
                     "How well the maps overlap the reference", "How well the classifiers did",
                     "Regions", "Methods, to copy", "How this page was made"]  # fmt: skip
    beginning = text.split("<h2>")[0]
    assert "ROC AUC" in beginning and "maps overlap the reference" in beginning
    assert 'class="bar ' in beginning and "data:image/png" in beginning
    methods = re.search(r'class="methods">(.*?)</p>', text, re.S)[1]
    assert "integrated gradients (Sundararajan et al. 2017" in methods and "n steps 20" in methods
    assert "16 T1-weighted scans (8 of patients, 8 of controls) in 2-fold" in methods


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(page_path, tmp_path, width):
    """It loads without an error or a request, the viewers move, nothing overlaps or is cut off.

    Values under the cursor are those of the maps, at their peaks and at ten voxels of the mask.
    """
    probe_path, frame_path = tmp_path / "probe.html", tmp_path / "frame.html"
    paths = [page_path.parents[1] / f"{name}.nii.gz" for name in
             ("IG_map_all", "IG_random_map_all", "<b>odd & map_all")]  # fmt: skip
    maps_data = [
        nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32) for path in paths
    ]
    in_mask = np.argwhere(np.any([data != 0 for data in maps_data], axis=0))
    places = np.random.default_rng(0).choice(in_mask, 10).tolist()
    probe = PROBE.replace("PLACES", json.dumps(places))
    probe_path.write_text(page_path.read_text().replace("<body>", "<body>" + probe))
    frame_path.write_text(FRAME.format(width))
    shown_path = probe_path if width > 500 else frame_path
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [BROWSER, *BROWSER_FLAGS, profile, "--dump-dom", shown_path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'id="found">(.*?)</pre>', done.stdout, re.S)[1].replace("&quot;", '"')
    found = json.loads(found)
    assert found["error"] == "" and "CONSOLE" not in done.stderr, done.stderr
    assert found["canvases"] == 9 and found["moves"] == [True] * 6
    assert "value" in found["reading"] and "smoothed by 4 mm" in found["reading"]
    assert found["requests"] == 0
    assert found["wide"] == [] and found["overlaps"] == 0
    for data, peak, values in zip(maps_data, found["peaks"], found["values"], strict=True):
        expected = [data[tuple(voxel)] for voxel in (peak, *places)]
        assert values == pytest.approx(expected, rel=2e-5)


def test_peaks_are_those_of_the_evidence(page_path):
    """Smoothed with the first width; the first peak is the largest magnitude."""
    table = pd.read_csv(page_path.parent / "IG_peaks.csv")
    img = nib.load(page_path.parents[1] / "IG_map_all.nii.gz")
    values = smooth_img(img, 4).get_fdata()
    largest = np.unravel_index(np.abs(values).argmax(), SHAPE)
    place = nib.affines.apply_affine(img.affine, largest)
    assert table.loc[0, ["x", "y", "z"]].tolist() == pytest.approx(place)
    assert table.loc[0, "value"] == pytest.approx(values[largest], rel=2e-5)
    assert set(table["region"].dropna()) <= {"hippocampus"}


def test_bars_and_sentence_of_maps_that_find_or_fail():
    """By two errors above chance and the untrained networks, unless degenerate."""
    paths = [Path(f"{name}_map_all.nii.gz") for name in ("A", "A_random", "B", "C", "D")]
    maps = {path.name.split("_map")[0]: Map(path, None, []) for path in paths}
    table = pd.DataFrame({
        "map": list(maps), "dice_matched": [0.3, 0.25, 0.3, 0.14, 0.9],
        "dice_matched_se": [0.02, 0.03, np.nan, 0.03, 0.0], "p": 0.1,
        "dice_matched_folds_sd": [np.nan, np.nan, 0.05, np.nan, np.nan],
        "degenerate": [False, False, False, False, True],
    })  # fmt: skip
    judged = finding.judge(table, maps)
    assert judged["fails"].to_dict() == {
        "A": "not surely above untrained networks' 0.25", "B": "", "C": "not surely above chance",
        "D": "fewer voxels than the reference",
    }  # fmt: skip
    assert judged.loc["A", "untrained"] == 0.25 and np.isnan(judged.loc["B", "untrained"])
    said = finding.sentence_of(judged, Settings(["neg"], [10.0], 99, 0), is_void=True)
    assert (
        "1 of 4 maps overlap" in said
        and "B 0.30" in said
        and "Not so: D 0.90 (fewer voxels than the reference), A" in said
    )
    assert "the networks are at chance: do not read" in said
    bars = page_tables.bars_html(judged)
    assert bars.count("bar finds") == 1 and bars.count("bar fails") == 3
    assert bars.index("D") < bars.index("A") and "left:25.0%" in bars


def test_warnings(tmp_path):
    """Of folds below chance, and IG whose sums are far off."""
    metrics = pd.DataFrame({"roc_auc": [0.4, 0.6, 0.3]}, index=["0", "1", "mean"])
    runs = [Run("net", tmp_path, metrics, pd.DataFrame(), None, [])]
    sidecars = {
        "IG": {"method": "IG", "median_completeness_error": 0.2},
        "close": {"method": "IG", "median_completeness_error": 0.01},
        "control": {"method": "IG", "median_completeness_error": 0.2, "random_weights": True},
    }
    found = finding.warnings_of(runs, sidecars)
    assert [text.split(":")[0] for text in found] == ["net", "IG"]
    assert "fold 0" in found[0] and "0.2" in found[1]
    assert finding.warnings_of([], {"close": sidecars["close"]}) == []


def test_shrink_keeps_places_and_means():
    """Axes are turned to RAS; blocks of voxels become one at their middle."""
    data = np.random.default_rng(0).random((8, 9, 10)).astype(np.float32)
    affine = np.diag([-1.0, 1, 0.5, 1])
    affine[:3, 3] = 3, 4, 5
    found = viewer.shrink(nib.Nifti1Image(data, affine))
    assert found.shape == (4, 4, 2)  # 2 mm: blocks of 2 × 2 × 4, the rest is cut off
    expected = data[6:8, 0:2, 0:4].mean()
    assert found.get_fdata()[0, 0, 0] == pytest.approx(expected, rel=2e-5)
    centre = nib.affines.apply_affine(affine, [6.5, 0.5, 1.5])
    assert found.affine[:3, 3] == pytest.approx(centre)
