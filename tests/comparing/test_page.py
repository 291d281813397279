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

import compare
from comparing import page
from comparing.maps import Map
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
    save = {"IG_map_all": make_volume(0, 1), "<b>odd & map_all": make_volume(1, 0),
            "reference": reference, "atlas": 3 * reference}  # fmt: skip
    paths = [save_scan(folder / f"{name}.nii.gz", data) for name, data in save.items()]
    (folder / "labels.csv").write_text("index,name\n3,hippocampus\n")
    argv = ["--maps", *paths[:2], "--reference", paths[2], "--atlas", paths[3], "--atlas-labels",
            folder / "labels.csv", "--run", run_path, "--outpath", folder / "out"]  # fmt: skip
    compare.main(compare.parse_args(list(map(str, argv))))
    return folder / "out" / "report.html"


def test_page_is_self_contained_and_escaped(page_path):
    text = page_path.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert "&lt;b&gt;odd &amp; map" in text and "<b>odd" not in text.split('id="data"')[0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert [m["name"] for m in data["maps"]] == ["IG", "<b>odd & map"]
    assert "hippocampus" in text and "losses per epoch" in text and "modelT8" in text
    assert page_path.stat().st_size < 25e6


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_in_a_browser(page_path, tmp_path, width):
    """It loads without an error or a request, the viewers move, nothing overlaps or is cut off."""
    probe_path, frame_path = tmp_path / "probe.html", tmp_path / "frame.html"
    probe_path.write_text(page_path.read_text().replace("<body>", "<body>" + PROBE))
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
    assert found["canvases"] == 6 and found["moved"] and found["read"]
    assert found["requests"] == 0
    assert found["wide"] == [] and found["overlaps"] == 0


def test_warnings(tmp_path):
    """Of degenerate maps, folds below chance, and IG whose sums are far off."""
    table = pd.DataFrame({"map": ["LRP", "IG"], "degenerate": [True, False]})
    metrics = pd.DataFrame({"roc_auc": [0.4, 0.6, 0.3]}, index=["0", "1", "mean"])
    runs = [Run("net", tmp_path, metrics, pd.DataFrame(), None, [])]
    maps = {}
    for name, error in (("IG", 0.2), ("close", 0.01)):
        maps[name] = Map(tmp_path / f"{name}.nii.gz", None, [])
        sidecar = {"method": "IG", "median_completeness_error": error}
        (tmp_path / f"{name}.json").write_text(json.dumps(sidecar))
    found = page.warnings_of(table, runs, maps)
    assert [text.split(":")[0] for text in found] == ["LRP", "net", "IG"]
    assert "fold 0" in found[1] and "0.2" in found[2]
    assert page.warnings_of(table.iloc[1:], [], {"close": maps["close"]}) == []


def test_shrink_keeps_places_and_means():
    """Axes are turned to RAS; blocks of voxels become one at their middle."""
    data = np.random.default_rng(0).random((8, 9, 10)).astype(np.float32)
    affine = np.diag([-1.0, 1, 0.5, 1])
    affine[:3, 3] = 3, 4, 5
    found = page.shrink(nib.Nifti1Image(data, affine))
    assert found.shape == (4, 4, 2)  # 2 mm: blocks of 2 × 2 × 4, the rest is cut off
    expected = data[6:8, 0:2, 0:4].mean()
    assert found.get_fdata()[0, 0, 0] == pytest.approx(expected, rel=1e-5)
    centre = nib.affines.apply_affine(affine, [6.5, 0.5, 1.5])
    assert found.affine[:3, 3] == pytest.approx(centre)
