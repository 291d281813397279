"""The file of scaled volumes: made once, gone on with, shared, checked, removed."""

import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import N_FOLDS, N_SCANS, SHAPE, make_volume, save_scan, train_arguments, write_cohort
from test_train_cv import contents

import dataset
import loading
import scan_files
import svm
import train_cv
import utils
import volume_cache
import volume_file
from errors import RunError
from teams import Team

PROCESSES = multiprocessing.get_context("fork")  # real ones, without the seconds of importing torch
load_volume = scan_files.load_volume


@pytest.fixture
def cohort(tmp_path) -> dataset.Cohort:
    """Return a cohort of eight scans that a test may change."""
    return dataset.read_cohort(write_cohort(tmp_path / "cohort", 8))


@pytest.fixture
def folder(cohort, tmp_path) -> Path:
    return volume_cache.locate(cohort, tmp_path / "out", None)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Return the names of the scans that this process decodes, as it goes."""
    names = []
    monkeypatch.setattr(
        scan_files, "load_volume", lambda file: names.append(Path(file).name) or load_volume(file)
    )
    return names


def train(csv_path: Path, outpath: Path, *more: str) -> int:
    args = train_cv.parse_args(train_arguments(csv_path, outpath, *more))
    return utils.run_script(train_cv.main, args)


def caches_below(folder: Path) -> list[Path]:
    return list(folder.rglob("volumes.f32"))


# What is in it


@pytest.mark.parametrize("n_workers", [0, 2])
def test_volumes_are_those_of_load_volume(cohort, folder, n_workers):
    with volume_cache.opened(cohort, folder, n_workers) as volumes:
        volumes = pickle.loads(pickle.dumps(volumes))
        expected = np.stack([load_volume(file)[0] for file in cohort.table["file"]])
        np.testing.assert_array_equal(np.stack([volumes[row] for row in range(8)]), expected)
        flat = expected.reshape(8, -1)
        np.testing.assert_array_equal(volumes.read(1000, 3000), flat[:, 1000:3000])
        assert volumes[3].dtype == np.float32


def test_writing_to_a_volume_leaves_the_file_alone(cohort, folder):
    with volume_cache.opened(cohort, folder, 0) as volumes:
        volumes[3][:] = 7
        assert volumes[3].max() == 1


def test_nonfinite_voxels_are_counted_as_without_a_cache(tmp_path, caplog):
    csv_path = write_cohort(tmp_path / "cohort")
    data = make_volume(1, 1)
    data[12, 13, :2] = np.nan
    save_scan(csv_path.parent / "scan01.nii.gz", data)
    warnings = []
    for more in ((), ("--no-cache",)):
        caplog.clear()
        assert train(csv_path, tmp_path / f"run{len(warnings)}", "--epochs", "1", *more) == 0
        found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        warnings.append(found)
    assert warnings[0] == warnings[1]
    assert warnings[0] == [
        f"fold {fold}: 2 non-finite voxels in 1 scans were set to 0" for fold in range(N_FOLDS)
    ]


# Training and the SVM


def test_results_are_the_same_without_a_cache(run_path, cohort_csv, tmp_path):
    assert train(cohort_csv, tmp_path, "--no-cache") == 0
    assert contents(tmp_path) == contents(run_path)


def test_no_scan_is_opened_once_all_are_decoded(cohort_csv, tmp_path, monkeypatch):
    opened = []
    load = nib.load
    monkeypatch.setattr(nib, "load", lambda file: opened.append(str(file)) or load(file))
    cohort = dataset.read_cohort(cohort_csv)
    monkeypatch.setattr(dataset, "read_cohort", lambda _: cohort)
    opened.clear()
    assert train(cohort_csv, tmp_path, "--epochs", "3") == 0
    assert sorted(opened) == sorted(cohort.table["file"])


def test_removed_at_the_end_and_shared_with_the_svm(
    run_path, cohort_csv, tmp_path, decoded, monkeypatch
):
    """While another process uses it, neither training nor the SVM decodes or removes anything."""
    monkeypatch.setattr(svm.pictures, "plot_mosaic", lambda *_: None)
    monkeypatch.setattr(svm.report, "write_viewer", lambda *_: None)
    cohort, cache_dir = dataset.read_cohort(cohort_csv), tmp_path / "cache"
    more = ("--cache-dir", str(cache_dir))
    folder = volume_cache.locate(cohort, tmp_path, cache_dir)
    with volume_cache.opened(cohort, folder, 0):
        assert train(cohort_csv, tmp_path / "run", *more) == 0
        arguments = ["--path", str(cohort_csv), "--outpath", str(tmp_path / "svm"), *more]
        svm.main(svm.parse_args([*arguments, "--modelpath", str(run_path), "--workers", "0"]))
        assert len(decoded) == N_SCANS
        assert caches_below(cache_dir)
    assert train(cohort_csv, tmp_path / "run", *more) == 0
    assert len(decoded) == N_SCANS
    assert list(cache_dir.iterdir()) == []
    assert contents(tmp_path / "run") == contents(run_path)


def test_kept_after_an_error_for_the_next_run(cohort_csv, run_path, tmp_path, decoded):
    assert train(cohort_csv, tmp_path, "--lr", "1e30") == 1
    assert len(caches_below(tmp_path)) == 1
    assert train(cohort_csv, tmp_path, "--overwrite") == 0
    assert len(decoded) == N_SCANS
    assert contents(tmp_path) == contents(run_path)  # the cache's folder would be one entry more


def test_two_cohorts_have_two_caches(cohort, tmp_path):
    other = dataset.read_cohort(write_cohort(tmp_path / "other", 8))
    assert volume_cache.locate(cohort, tmp_path, None) != volume_cache.locate(other, tmp_path, None)


# Going on


def decode_and_hang(
    cohort: dataset.Cohort, folder: Path, n_scans: int, save_seconds: float
) -> None:
    """Decode some scans, then never end."""
    volume_file.SAVE_SECONDS = save_seconds
    n_begun = 0

    def load_some(file):
        nonlocal n_begun
        n_begun += 1
        if n_begun > n_scans:
            (folder / "hangs").touch()
            time.sleep(1000)
        return load_volume(file)

    scan_files.load_volume = load_some
    with volume_cache.opened(cohort, folder, 0):
        pass


def start(function, *args) -> multiprocessing.Process:
    process = PROCESSES.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def wait_until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_while_decoding(*args) -> None:
    builder = start(decode_and_hang, *args)
    wait_until((args[1] / "hangs").exists)
    builder.kill()
    builder.join()


def test_a_killed_build_is_gone_on_with(cohort, folder, decoded):
    kill_while_decoding(cohort, folder, 5, 0)
    with volume_cache.opened(cohort, folder, 0) as volumes:
        assert decoded == ["scan05.nii.gz", "scan06.nii.gz", "scan07.nii.gz"]
        for row, file in enumerate(cohort.table["file"]):
            np.testing.assert_array_equal(volumes[row], load_volume(file)[0])


def test_a_scan_that_has_changed_is_decoded_anew(cohort, folder, decoded):
    with volume_cache.opened(cohort, folder, 0):
        pass
    decoded.clear()
    save_scan(Path(cohort.table["file"][6]), make_volume(60, 0))
    with volume_cache.opened(cohort, folder, 0) as volumes:
        assert decoded == ["scan06.nii.gz"]
        np.testing.assert_array_equal(volumes[6], make_volume(60, 0) / make_volume(60, 0).max())


def test_a_scan_put_back_as_it_was_is_decoded_anew(cohort, folder, decoded):
    """A process decodes the changed scan, and is killed before the index says so."""
    with volume_cache.opened(cohort, folder, 0):
        pass
    path = Path(cohort.table["file"][6])
    before, kept = path.stat(), path.rename(path.with_name("kept.nii.gz"))
    save_scan(path, make_volume(60, 0))
    os.utime(cohort.table["file"][7], ns=(0, 0))
    kill_while_decoding(cohort, folder, 1, 1000)
    kept.rename(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with volume_cache.opened(cohort, folder, 0) as volumes:
        np.testing.assert_array_equal(volumes[6], load_volume(str(path))[0])


@pytest.mark.parametrize("listed", [0, 1])
@pytest.mark.parametrize(
    "names",
    [("x.hdr", "x.img"), ("x.hdr.gz", "x.img.gz"), ("x.HDR", "x.IMG"), ("x+orig.HEAD",
     "x+orig.BRIK"), ("x+orig.HEAD", "x+orig.BRIK.gz"), ("x.PAR", "x.REC"), ("x.par", "x.rec")],
)  # fmt: skip
def test_voxels_in_a_file_of_their_own_are_watched_too(tmp_path, names, listed):
    """Either half, also where an older one of the same size takes its place."""
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, ns=(0, 10**18))
    file = str(tmp_path / names[listed])
    before = scan_files.stamp(file)
    for name in names:
        os.utime(tmp_path / name, ns=(0, 10**17))
        assert scan_files.stamp(file) != before, name
        os.utime(tmp_path / name, ns=(0, 10**18))
        (tmp_path / name).write_bytes(b"more than half")
        os.utime(tmp_path / name, ns=(0, 10**18))
        assert scan_files.stamp(file) != before, name
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, ns=(0, 10**18))


@pytest.mark.parametrize("name", ["index.npy", "volumes.f32"])
@pytest.mark.parametrize("n_bytes", [0, 100, 10_000])
def test_a_cache_with_a_damaged_file_is_made_anew(cohort, folder, decoded, name, n_bytes):
    with volume_cache.opened(cohort, folder, 0):
        pass
    content = (folder / name).read_bytes()
    (folder / name).write_bytes((content + bytes(n_bytes))[-n_bytes:] if n_bytes else b"")
    with volume_cache.opened(cohort, folder, 0) as volumes:
        assert len(decoded) == 16
        np.testing.assert_array_equal(volumes[6], load_volume(cohort.table["file"][6])[0])


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_scan_that_cannot_be_decoded_is_named(cohort, folder, decoded, n_workers):
    path = Path(cohort.table["file"][5])
    content = path.read_bytes()
    path.write_bytes(content[:2000])
    with (
        pytest.raises(RunError, match=rf"{path} cannot be read: .*\n.* is kept in") as error,
        volume_cache.opened(cohort, folder, n_workers),
    ):
        pass
    assert "Traceback" not in str(error.value)
    path.write_bytes(content)
    decoded.clear()
    with volume_cache.opened(cohort, folder, 0):
        assert decoded == ["scan05.nii.gz", "scan06.nii.gz", "scan07.nii.gz"]


def test_a_scan_of_another_shape_by_now_is_named(cohort, folder):
    save_scan(Path(cohort.table["file"][2]), make_volume(2, 0, (24, 27, 25)))
    with (
        pytest.raises(RunError, match=r"scan02.nii.gz now has shape \(24, 27, 25\)"),
        volume_cache.opened(cohort, folder, 0),
    ):
        pass


def test_a_killed_worker_process_stops_the_run(cohort, folder, monkeypatch):
    def die(file):
        if "scan03" in file:
            os.kill(os.getpid(), signal.SIGKILL)
        return load_volume(file)

    monkeypatch.setattr(scan_files, "load_volume", die)
    with (
        pytest.raises(RunError, match=r"worker \(pid.* exited unexpectedly.*fewer --workers"),
        volume_cache.opened(cohort, folder, 1),
    ):
        pass


# Sharing


def decode_slowly(cohort: dataset.Cohort, folder: Path) -> None:
    """Decode with a pause after each scan."""
    scan_files.load_volume = lambda file: (time.sleep(0.1), load_volume(file))[1]
    with volume_cache.opened(cohort, folder, 0):
        pass


def test_of_two_processes_one_decodes_and_one_waits(cohort, folder, decoded, caplog):
    caplog.set_level(logging.INFO, "heatmaps")
    builder = start(decode_slowly, cohort, folder)
    wait_until((folder / "volumes.f32").exists)
    with volume_cache.opened(cohort, folder, 0) as volumes:
        assert decoded == []
        np.testing.assert_array_equal(volumes[7], load_volume(cohort.table["file"][7])[0])
    builder.join()
    assert caplog.text.count(f"waiting for process {builder.pid}") == 1


def test_a_scan_that_changes_under_another_user_stops_the_newcomer(cohort, folder):
    with volume_cache.opened(cohort, folder, 0) as volumes:
        save_scan(Path(cohort.table["file"][6]), make_volume(60, 0))
        with (
            pytest.raises(RunError, match=r"scan06.nii.gz has changed while another process"),
            volume_cache.opened(cohort, folder, 0),
        ):
            pass
        assert volumes[6].max() == 1
    with volume_cache.opened(cohort, folder, 0):
        pass


def test_removed_between_opening_the_lock_and_holding_it(cohort, folder, monkeypatch):
    """The lock that counts is that of the folder as it is now."""
    try_lock = volume_cache.try_lock

    def leave_first(lock, kind):
        monkeypatch.setattr(volume_cache, "try_lock", try_lock)
        volume_cache.remove(folder)
        return try_lock(lock, kind)

    monkeypatch.setattr(volume_cache, "try_lock", leave_first)
    with volume_cache.opened(cohort, folder, 0) as volumes:
        volume_cache.remove(folder)
        assert volumes[7].max() == 1


def test_many_come_and_go_at_once(cohort, folder):
    """Each finds the volumes whole, though each removes what it can on leaving."""

    def come_and_go() -> None:
        for _ in range(5):
            with volume_cache.opened(cohort, folder, 0) as volumes:
                assert all(volumes[row].max() == 1 for row in range(8))
            volume_cache.remove(folder)

    volume_cache.POLL_SECONDS, before = 0.001, volume_cache.POLL_SECONDS
    users = [start(come_and_go) for _ in range(4)]
    volume_cache.POLL_SECONDS = before
    for user in users:
        user.join(60)
    assert [user.exitcode for user in users] == [0, 0, 0, 0]
    assert not folder.parent.exists()


# The disk


def test_too_little_room_is_said_before_anything_is_written(cohort_csv, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    n_bytes = 4 * N_SCANS * int(np.prod(SHAPE))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes - 1))
    args = train_cv.parse_args(train_arguments(cohort_csv, tmp_path / "out"))
    with pytest.raises(utils.InputError, match=r"0\.0 GB below .*--cache-dir .*--no-cache"):
        train_cv.main(args)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes))
    cohort = dataset.read_cohort(cohort_csv)
    volume_cache.check_room(cohort, tmp_path / "out" / "key")


def test_gigabytes_are_said(cohort, folder, monkeypatch):
    usage = shutil.disk_usage(folder.parents[2])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 10**9))
    large = dataset.Cohort(cohort.table, (193, 229, 2000), cohort.like_img)
    with pytest.raises(utils.InputError, match=r"need 2\.8 GB below .*, 2\.0 GB are free"):
        volume_cache.check_room(large, folder)


def test_only_what_is_missing_needs_room(cohort, folder, monkeypatch):
    with volume_cache.opened(cohort, folder, 0):
        pass
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    volume_cache.check_room(cohort, folder)


def test_decoding_anew_needs_no_room_of_its_own(cohort, folder, monkeypatch):
    """The file is as large as it will be when scans were copied once more, with new times."""
    with volume_cache.opened(cohort, folder, 0):
        pass
    for file in cohort.table["file"]:
        os.utime(file, (1, 1))
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    volume_cache.check_room(cohort, folder)


def test_a_disk_that_is_full_midway_is_said_with_the_room_that_is_needed(
    cohort, folder, monkeypatch
):
    """The index does not fit any more either."""
    decode_row, save_index = volume_file.Decoder.__getitem__, volume_file.save_index

    def fill_disk(decoder, row):
        if row < 3:
            return decode_row(decoder, row)
        decoder.path = Path("/dev/full")
        monkeypatch.setattr(volume_file, "save_index", refuse)
        return decode_row(decoder, row)

    def refuse(*_):
        raise RunError("index.npy cannot be written")

    monkeypatch.setattr(volume_file.Decoder, "__getitem__", fill_disk)
    with (
        pytest.raises(RunError, match=r"the disk is full: up to [\d.]+ MB are needed"),
        volume_cache.opened(cohort, folder, 0),
    ):
        pass
    monkeypatch.setattr(volume_file, "save_index", save_index)
    monkeypatch.setattr(volume_file.Decoder, "__getitem__", decode_row)
    with volume_cache.opened(cohort, folder, 0) as volumes:
        assert volumes[7].max() == 1


def test_somebody_elses_cache(cohort, folder, monkeypatch):
    """Said in one sentence, and left."""

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    folder.mkdir(parents=True)
    (folder / "lock").write_text("")
    monkeypatch.setattr(Path, "open", refuse)
    with (
        pytest.raises(RunError, match=r"Permission denied\): give another --cache-dir"),
        volume_cache.opened(cohort, folder, 0),
    ):
        pass
    volume_cache.remove(folder)
    assert (folder / "lock").exists()


def test_a_run_without_cache_leaves_the_cache(cohort_csv, tmp_path):
    cache_dir = tmp_path / "cache"
    cohort = dataset.read_cohort(cohort_csv)
    with volume_cache.opened(cohort, volume_cache.locate(cohort, tmp_path, cache_dir), 0):
        pass
    assert train(cohort_csv, tmp_path / "out", "--cache-dir", str(cache_dir), "--no-cache") == 0
    assert caches_below(cache_dir)


def test_reading_processes_hand_on_decoded_scans(cohort, folder):
    """As they do for a GPU; for a CPU the main process reads."""
    rows = np.arange(8)
    with volume_cache.opened(cohort, folder, 0) as volumes:
        scans = dataset.ScanDataset(cohort.table, rows, volumes)
        loader = loading.training_loader(scans, 3, False, 2, SHAPE, torch.device("meta"), Team())
        batches = list(loading.batches(loader))
        assert loader.num_workers == 2
        assert torch.cat([batch[2] for batch in batches]).tolist() == rows.tolist()
        found = torch.cat([batch[0] for batch in batches])[:, 0]
        assert all(np.array_equal(found[row], volumes[row]) for row in rows)


def test_a_full_disk_stops_the_run(cohort, tmp_path):
    decoder = volume_file.Decoder(cohort, tmp_path)
    decoder.path = Path("/dev/full")
    assert re.search(
        r"the disk is full: up to [\d.]+ MB are needed, [\d.]+ MB are free", decoder[0][-1]
    )


def test_the_last_task_of_an_array_removes_what_all_hosts_left(cohort_csv, tmp_path):
    """Until then a host's tasks share what the first one decoded."""
    other = tmp_path / ".cache-other" / "0123"
    other.mkdir(parents=True)
    for name in ("lock", "volumes.f32"):
        (other / name).write_bytes(b"")
    assert train(cohort_csv, tmp_path, "--only-fold", "0") == 0
    assert len(list(tmp_path.glob(".cache-*/*/volumes.f32"))) == 2
    assert train(cohort_csv, tmp_path, "--only-fold", "1") == 0
    assert not list(tmp_path.glob(".cache-*"))


def test_cache_dir_is_a_file(cohort_csv, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(cohort_csv, tmp_path / "out", "--cache-dir", str(tmp_path / "file")) == 2
    assert f"--cache-dir {tmp_path / 'file'} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
