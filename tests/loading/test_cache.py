"""The decoded scans: made once by whoever comes, gone on with, read in batches, removed."""

import errno
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import SHAPE, make_volume, save_scan
from processes import ENVIRONMENT, finish, wait_for

from loading import image
from loading.cache import HEADER_BYTES, Volumes
from run_folder import files
from utils import InputError, RunError

CPU = torch.device("cpu")
N_SCANS = 8
LABELS = np.arange(N_SCANS) % 2
N_BYTES = HEADER_BYTES + 4 * int(np.prod(SHAPE))


@pytest.fixture
def scans(tmp_path) -> list[str]:
    """Return eight scans that a test may change."""
    paths = [tmp_path / f"scan{index}.nii.gz" for index in range(N_SCANS)]
    return [str(save_scan(path, make_volume(i, i % 2))) for i, path in enumerate(paths)]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Return the names of the scans that this process decodes, as it goes."""
    names, load_volume = [], image.load_volume
    monkeypatch.setattr(
        image, "load_volume", lambda scan: names.append(Path(scan).stem) or load_volume(scan)
    )
    return names


def cached(scans: list[str], tmp_path: Path, n_workers: int = 2) -> Volumes:
    """Return volumes that are kept in a folder."""
    return Volumes(scans, LABELS[: len(scans)], SHAPE, tmp_path / "cache", n_workers)


def expected_of(scans: list[str]) -> np.ndarray:
    """Return what the volumes must be."""
    return np.stack([image.load_volume(scan)[0] for scan in scans])


def assert_right(volumes: Volumes) -> None:
    """Hold volumes that are decoded to what their scans hold, and their folder to them alone."""
    assert volumes.missing() == []
    np.testing.assert_array_equal(np.stack([*volumes]), expected_of(volumes.scans))
    expected = {path.with_suffix(s) for path in volumes.paths for s in (".npy", ".json")}
    assert expected == set(volumes.folder.iterdir())


# What is in it


@pytest.mark.parametrize("n_workers", [0, 3])
def test_volumes_are_those_of_load_volume(scans, tmp_path, decoded, n_workers):
    volumes = cached(scans, tmp_path, n_workers)
    assert (len(volumes), volumes.gb) == (N_SCANS, N_SCANS * N_BYTES / 1e9)
    volumes.fill()
    volumes.fill()
    assert len(decoded) == N_SCANS
    volumes[3][:] = 7  # changes no file
    assert_right(volumes)
    flat = expected_of(scans).reshape(N_SCANS, -1)
    for start, stop in ((0, 10), (1000, 3000), (flat.shape[1] - 7, flat.shape[1])):
        np.testing.assert_array_equal(volumes.read(start, stop), flat[:, start:stop])


@pytest.mark.parametrize("shape", [(1, 1, 1), SHAPE, (193, 229, 193), (99999, 99999, 99999)])
def test_header_bytes_are_what_numpy_writes(shape):
    buffer = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    assert buffer.tell() == HEADER_BYTES


def test_without_a_folder_every_scan_is_decoded_each_time(scans, decoded):
    volumes = Volumes(scans, LABELS, SHAPE)
    volumes.check_room()
    volumes.fill()
    assert decoded == []
    for _ in range(2):
        np.testing.assert_array_equal(volumes[5], expected_of(scans[5:6])[0])
    assert len(decoded) == 4
    volumes.remove(is_own=True)


def test_no_scan_is_opened_once_all_are_decoded(scans, tmp_path, monkeypatch):
    cached(scans, tmp_path).fill()
    monkeypatch.setattr(nib, "load", lambda path: pytest.fail(f"{path} was opened"))
    volumes = cached(scans, tmp_path)
    volumes.fill()
    assert sum(len(labels) for _, labels in volumes.batches(np.arange(N_SCANS), 3, CPU)) == 8


@pytest.mark.parametrize("is_kept", [True, False])
def test_nonfinite_voxels_are_warned_of_once(scans, tmp_path, caplog, is_kept):
    data = make_volume(1, 1)
    data[12, 13, :2] = np.nan
    save_scan(Path(scans[1]), data)
    volumes = Volumes(scans, LABELS, SHAPE, tmp_path / "cache" if is_kept else None)
    volumes.fill()
    for _ in range(2):
        for batch, _ in volumes.batches(np.arange(N_SCANS), 4, CPU):
            assert torch.isfinite(batch).all()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warnings == [f"2 non-finite voxels in 1 scans were set to 0: {scans[1]}"]


# Names


def test_a_changed_scan_gets_another_name(scans, tmp_path, decoded):
    cached(scans, tmp_path).fill()
    decoded.clear()
    before = cached(scans, tmp_path).paths
    save_scan(Path(scans[6]), make_volume(60, 0))
    volumes = cached(scans, tmp_path)
    assert [row for row in range(N_SCANS) if volumes.paths[row] != before[row]] == [6]
    volumes.fill()
    assert decoded == ["scan6.nii"]
    np.testing.assert_array_equal(volumes[6], make_volume(60, 0) / make_volume(60, 0).max())
    shutil.copy2(scans[0], tmp_path / "copy.nii.gz")
    assert cached([str(tmp_path / "copy.nii.gz")], tmp_path).paths[0] not in volumes.paths


@pytest.mark.parametrize("listed", [0, 1])
@pytest.mark.parametrize(
    "names", [("x.hdr", "x.img"), ("x.hdr.gz", "x.img.gz"), ("x.HDR", "x.IMG")]
)
def test_either_half_of_a_pair_changes_the_name(tmp_path, names, listed):
    for name in names:
        (tmp_path / name).write_bytes(b"half")

    def path_of(name: str, content: bytes, seconds: int) -> Path:
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (0, seconds))
        return cached([str(tmp_path / names[listed])], tmp_path).paths[0]

    for name in names:
        found = {path_of(name, b"half", 9), path_of(name, b"half", 5), path_of(name, b"more", 9)}
        assert len(found) == 2, name  # the third has size and time of the first
        assert path_of(name, b"longer", 9) not in found, name
        path_of(name, b"half", 9)


# Going on


@pytest.mark.parametrize("n_bytes", [0, N_BYTES // 2, N_BYTES - 1])
def test_a_cut_file_is_decoded_anew(scans, tmp_path, decoded, n_bytes):
    volumes = cached(scans, tmp_path)
    volumes.fill()
    decoded.clear()
    os.truncate(volumes.paths[5], n_bytes)
    assert volumes.missing() == [5]
    volumes.fill()
    assert decoded == ["scan5.nii"]
    assert_right(volumes)


def test_temporary_files_are_ignored_and_old_ones_removed(scans, tmp_path):
    volumes = cached(scans, tmp_path)
    volumes.folder.mkdir()
    young, old, renamed = (
        volumes.folder / f"{files.TEMPORARY_PREFIX}host-{pid}-1-{volumes.paths[0].name}"
        for pid in range(3)
    )
    for path in (young, old):
        path.write_bytes(bytes(1000))
    os.utime(old, (0, 0))
    renamed.symlink_to("gone")  # listed, and gone when looked at
    assert volumes.missing() == list(range(N_SCANS))
    volumes.fill()
    assert not old.exists()
    young.unlink()
    renamed.unlink()
    assert_right(volumes)


def test_a_scan_that_cannot_be_decoded_is_named_and_the_rest_kept(scans, tmp_path, decoded):
    content = Path(scans[5]).read_bytes()
    Path(scans[5]).write_bytes(content[:2000])
    with pytest.raises(RunError, match=r"a scan cannot be read: .*scan5\.nii\.gz"):
        cached(scans, tmp_path).fill()
    save_scan(Path(scans[5]), make_volume(5, 1, (24, 27, 25)))
    with pytest.raises(RunError, match=r"scan5\.nii\.gz now has shape \(24, 27, 25\), not"):
        cached(scans, tmp_path).fill()
    Path(scans[5]).write_bytes(content)
    volumes = cached(scans, tmp_path)
    n_missing = len(volumes.missing())
    decoded.clear()
    volumes.fill()
    assert len(decoded) == n_missing
    assert_right(volumes)


# Several processes

FILLING = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from loading import image
from loading.cache import Volumes

scans, shape, folder, n_processes, n_whole = json.loads(sys.argv[1])
names, load_volume, replace = [], image.load_volume, Path.replace

def load(scan):
    names.append(scan)
    time.sleep(0.05)
    return load_volume(scan)

def hang(path, target):
    if len(names) > n_whole:
        Path(folder + "-hangs").touch()
        time.sleep(1000)
    replace(path, target)

image.load_volume, Path.replace = load, hang
volumes = Volumes(scans, np.zeros(len(scans)), tuple(shape), Path(folder))
others = []
while len(others) < n_processes - 1 and (pid := os.fork()):
    others.append(pid)
volumes.fill()
os.write(1, f"{len(names)}\\n".encode())
if len(others) == n_processes - 1:
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in others)
"""


def start_filling(
    scans: list[str], tmp_path: Path, n_processes: int = 1, n_whole: int = N_SCANS
) -> subprocess.Popen:
    """Start processes that fill the folder; each hangs in writing after so many scans."""
    facts = json.dumps([scans, SHAPE, str(tmp_path / "cache"), n_processes, n_whole])
    return subprocess.Popen(
        [sys.executable, "-c", FILLING, facts], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=ENVIRONMENT,
    )  # fmt: skip


def test_three_processes_fill_one_folder_together(scans, tmp_path):
    output, _ = finish(start_filling(scans, tmp_path, n_processes=3))
    n_decoded = list(map(int, output.split()))
    assert len(n_decoded) == 3
    assert N_SCANS <= sum(n_decoded) < 3 * N_SCANS  # they shared the work
    assert_right(cached(scans, tmp_path))


def test_a_process_killed_while_it_writes_is_gone_on_with(scans, tmp_path, decoded):
    process = start_filling(scans, tmp_path, n_whole=5)
    wait_for((tmp_path / "cache-hangs").exists, process)
    process.kill()
    process.communicate()
    volumes = cached(scans, tmp_path)
    (temporary_path,) = volumes.folder.glob(f"{files.TEMPORARY_PREFIX}*")
    assert len(volumes.missing()) == 3
    volumes.fill()
    assert len(decoded) == 3
    temporary_path.unlink()
    assert_right(volumes)


def test_scans_stay_on_a_gpu_only_beside_the_work(scans, tmp_path, monkeypatch):
    """They take at most 40 % of what is free there, and leave what the work needs."""
    volumes, gpu = cached(scans, tmp_path), torch.device("cuda:0")
    for free, needed, fits in ((2.6, 0, True), (2.4, 0, False), (4, 2.9, True), (4, 3.1, False)):
        n_bytes = int(free * volumes.gb * 1e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, n=n_bytes: (n, 10**12))
        assert volumes.gb_on(gpu, needed * volumes.gb) == (volumes.gb if fits else 0)
    assert volumes.gb_on(torch.device("cpu"), 0.0) == 0


# The disk


def test_too_little_room_is_said_before_anything_is_written(scans, tmp_path, monkeypatch):
    volumes, usage = cached(scans, tmp_path), shutil.disk_usage(tmp_path)
    n_free = N_SCANS * N_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_free))
    volumes.check_room()
    n_free -= 1
    with pytest.raises(InputError, match=r"--cache-dir\) need 0\.000478 GB below .*cache, .*free"):
        volumes.check_room()
    assert not volumes.folder.exists()
    n_free = N_BYTES  # only what is missing needs room
    volumes.fill()
    volumes.paths[0].unlink()
    volumes.check_room()
    volumes.paths[1].unlink()
    with pytest.raises(InputError, match="are free"):
        volumes.check_room()


def test_a_disk_that_is_full_midway_keeps_what_was_decoded(scans, tmp_path, monkeypatch, decoded):
    names, replace = [], Path.replace

    def fill_disk(path, target):
        names.append(path)
        if len(names) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, target)

    monkeypatch.setattr(Path, "replace", fill_disk)
    with pytest.raises(RunError, match=r"disk is full: up to 0\.1 MB are needed, [\d.]+ MB are"):
        cached(scans, tmp_path, 0).fill()
    monkeypatch.setattr(Path, "replace", replace)
    volumes = cached(scans, tmp_path)
    assert (len(volumes.missing()), len(list(volumes.folder.glob("*.npy")))) == (5, 3)
    decoded.clear()
    volumes.fill()
    assert len(decoded) == 5
    assert_right(volumes)


def test_what_the_system_says_of_a_write_is_handed_on(scans, tmp_path):
    """numpy alone would say how many items it wrote, not why no more."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (N_BYTES // 2, limits[1]))
    try:
        with pytest.raises(RunError, match=r"\.npy cannot be written: File too large"):
            cached(scans, tmp_path).fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_is_a_file(scans, tmp_path):
    (tmp_path / "cache").write_text("")
    for refused in (Volumes.check_room, Volumes.fill):
        with pytest.raises(InputError, match=r"--cache-dir .*cache cannot be used as a folder"):
            refused(cached(scans, tmp_path))


def test_remove_takes_the_runs_own_folder_only(scans, tmp_path, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    volumes = cached(scans, tmp_path)
    volumes.remove(is_own=True)
    volumes.fill()
    volumes.remove(is_own=False)
    assert f"0.00 GB of decoded scans stay in --cache-dir {volumes.folder}" in caplog.text
    assert_right(volumes)
    volumes.remove(is_own=True)
    assert not volumes.folder.exists()


# Batches


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU"))],
)  # fmt: skip
@pytest.mark.parametrize("n_workers", [0, 3])
@pytest.mark.parametrize("is_kept", [True, False])
def test_batches_hold_the_scans_in_order(scans, tmp_path, device, n_workers, is_kept):
    volumes = Volumes(scans, LABELS, SHAPE, tmp_path / "cache" if is_kept else None, n_workers)
    volumes.fill()
    rows = np.array([6, 1, 4, 7, 0, 3, 2])
    batches = list(volumes.batches(rows, 3, torch.device(device)))
    assert [tuple(found.shape) for found, _ in batches] == [(n, 1, *SHAPE) for n in (3, 3, 1)]
    found, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert found.device.type == labels.device.type == device
    assert (found.dtype, labels.dtype) == (torch.float32, torch.int64)
    np.testing.assert_array_equal(found[:, 0].cpu(), expected_of(scans)[rows])
    assert labels.tolist() == LABELS[rows].tolist()
    assert list(volumes.batches(rows[:0], 3, torch.device(device))) == []


def test_batches_end_their_threads_when_left_or_failed(scans, decoded):
    Path(scans[5]).unlink()
    volumes, n_threads = Volumes(scans, LABELS, SHAPE, n_workers=2), threading.active_count()
    for _ in volumes.batches(np.arange(N_SCANS), 1, CPU):
        assert threading.active_count() > n_threads
        break
    assert threading.active_count() == n_threads
    assert len(decoded) < 5
    n_batches = 0
    with pytest.raises(RunError, match=r"a scan cannot be read: .*scan5\.nii\.gz"):
        for _ in volumes.batches(np.arange(N_SCANS), 1, CPU):
            n_batches += 1
    assert n_batches == 5  # where its batch comes
    assert threading.active_count() == n_threads


def spoil(path: str, change) -> None:
    """Change a scan's voxels."""
    img = nib.load(path)
    data = img.get_fdata(dtype=np.float32)
    change(data)
    nib.save(nib.Nifti1Image(data, img.affine), path)


def set_hot(data: np.ndarray) -> None:
    data[12, 12, 12] = 1e5


def set_below_0(data: np.ndarray) -> None:
    data[0, 0, 0] = -1


def set_z_scores(data: np.ndarray) -> None:
    inside = data > 0
    data[inside] = (data[inside] - data[inside].mean()) / data[inside].std()
    data[~inside] = np.nan


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_hot, "have an outlier"),
        (set_below_0, "have a background"),
        (set_z_scores, "have a background"),
    ],
)
def test_scans_that_scaling_spoils_are_named(scans, tmp_path, caplog, change, message, is_kept):
    """Also in a second run, which finds them decoded."""
    spoil(scans[1], change)
    for _ in range(2):
        caplog.clear()
        volumes = cached(scans, tmp_path) if is_kept else Volumes(scans, LABELS, SHAPE)
        volumes.fill()
        list(volumes.batches(np.arange(len(scans)), 2, torch.device("cpu")))
        lines = [r.getMessage() for r in caplog.records if message in r.getMessage()]
        assert len(lines) == 1 and lines[0].startswith("1 of ") and lines[0].endswith(scans[1])
    assert not any("copies" in record.getMessage() for record in caplog.records)


def test_a_clean_cohort_is_no_warning(scans, tmp_path, caplog):
    cached(scans, tmp_path).fill()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_copies_of_a_scan_are_named(scans, tmp_path, caplog):
    """They have the same voxels once scaled, whatever their file, gain and name."""
    spoil(scans[2], lambda data: None)
    data = nib.load(scans[2]).get_fdata(dtype=np.float32)
    nib.save(nib.Nifti1Image(4 * data, nib.load(scans[0]).affine), scans[0])
    cached(scans, tmp_path).fill()
    assert f"are copies of each other, voxel by voxel: {scans[0]}, {scans[2]}" in caplog.text


def test_table_of_what_was_decoded(scans, tmp_path):
    volumes = cached(scans, tmp_path)
    volumes.fill()
    table = volumes.table()
    assert table["bytes"].tolist() == [Path(scan).stat().st_size for scan in scans]
    assert table["crc32"].tolist() == [
        zlib.crc32(volume.tobytes()) for volume in expected_of(scans)
    ]
    for path in volumes.folder.glob("*.json"):
        path.write_text("{")
    again = cached(scans, tmp_path)
    again.fill()
    assert again.table().equals(table)
