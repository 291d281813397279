"""Files that appear whole or not at all, what is read back from them, and room on disks."""

import collections
import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from run_folder import files
from utils import InputError, RunError

Usage = collections.namedtuple("Usage", "total used free")


# Writing


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(error), files.whole_file(path) as temporary_path:
        assert temporary_path != path and temporary_path.parent == tmp_path
        temporary_path.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Or a crash of the machine could leave an empty one."""
    calls, fsync, rename = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("flush") or fsync(fd))
    monkeypatch.setattr(
        Path, "replace", lambda path, target: calls.append("rename") or rename(path, target)
    )
    files.write_bytes(tmp_path / "a", b"content")
    assert calls == ["flush", "rename"] and (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("when", ["write", "flush", "rename"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"the disk is full: up to 5\.0 MB are needed, 1\.5 MB are free\. No file "
                       "was damaged; with more space the same command, without --over.*, resumes"),
        (errno.EDQUOT, r"the disk is full: up to 5\.0 MB are needed"),
        (errno.EIO, "Input/output error"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written(tmp_path, monkeypatch, when, number, message):
    path = tmp_path / "table.csv"
    path.write_text("before")

    def fail(*args):
        raise OSError(number, os.strerror(number))

    owner, name = {"write": (Path, "write_bytes"), "flush": (os, "fsync"),
                   "rename": (Path, "replace")}[when]  # fmt: skip
    monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1_500_000))
    with pytest.raises(RunError, match=f"^{re.escape(str(path))} cannot be written[:,] {message}"):
        files.write_bytes(path, bytes(5_000_000))
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_tables_numbers_and_records(tmp_path):
    """Missing values are empty cells; names that are no UTF-8 are escaped."""
    files.write_csv(tmp_path / "t.csv", pd.DataFrame({"a": [1, 2], "b": [np.nan, 0.5]}))
    assert (tmp_path / "t.csv").read_text() == "a,b\n1,\n2,0.5\n"
    files.write_csv(tmp_path / "t.csv", pd.DataFrame({"ü": ["\udcff"]}))
    assert (tmp_path / "t.csv").read_text(encoding="utf-8") == "ü\n\\udcff\n"
    files.write_json(tmp_path / "t.json", {"path": Path("ü"), "name": "\udcff"})
    assert files.read_json(tmp_path / "t.json") == {"path": "ü", "name": "\udcff"}
    files.write_npy(tmp_path / "t.npy", [1, 2.5])
    assert np.load(tmp_path / "t.npy").dtype == np.float64


# Reading


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": "\xff"}']
)
def test_what_is_no_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    message = r"run\.json (cannot be read as JSON|holds no JSON object)"
    with pytest.raises(InputError, match=message):
        files.read_json(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"cannot be read as JSON"):
        files.read_json(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n\x00\xff", b"path\na\n", b"path,fold\na,x\n", b"path,fold\na,\n",
     b"path,fold\na,1.5\n", b"path,fold\na,99999999999999999999\n",
     b'path,fold\n"a,1\n', b"path,fold\na,1,2,3\nb,1,2,3,4\n", b"path,fold\n\xff,1\n"],
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.csv is not a table of path, fold: "):
        files.read_csv(tmp_path / "t.csv", {"path": str, "fold": int})


def test_a_table_is_read_with_its_types(tmp_path):
    (tmp_path / "t.csv").write_text("path,more,fold\n001,2,3\n")
    table = files.read_csv(tmp_path / "t.csv", {"path": str, "fold": int})
    assert table.to_dict("records") == [{"path": "001", "more": 2, "fold": 3}]
    with pytest.raises(InputError, match=r"missing\.csv is not a table"):
        files.read_csv(tmp_path / "missing.csv", {"path": str})


# Folders and disks


@pytest.fixture
def closed_folder(tmp_path):
    """Return a folder that this user may not write in: for root one on a read-only disk."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    if os.getuid():
        yield folder
        return
    mounting = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("root may write everywhere, and mounting a read-only disk is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", ["", "new/folder"])
def test_a_folder_that_cannot_be_written_or_is_a_file(tmp_path, closed_folder, below):
    path = closed_folder / below
    (tmp_path / "file").write_text("mine")
    for refused in (files.check_outpath, files.make_outpath):
        with pytest.raises(InputError, match=r"--outpath .*file.* cannot be used as a folder: "):
            refused(tmp_path / "file" / below)
        message = f"--cache-dir {path} cannot be used as a folder: (Permission|Read-only)"
        with pytest.raises(InputError, match=message):
            refused(path, "--cache-dir")
    assert not list(closed_folder.iterdir())


def test_what_goes_to_one_disk_must_fit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(3e9)))
    needs = {"weights": (1.0, tmp_path), "scans": (1.9, tmp_path / "new" / "cache")}
    assert files.check_room(needs) == [
        f"disk: at most 1 GB of weights; free: 3 GB below {tmp_path}",
        f"disk: at most 1.9 GB of scans; free: 3 GB below {tmp_path / 'new' / 'cache'}",
    ]
    message = f"weights and scans need 3.1 GB below {tmp_path}, 3 GB are free"
    with pytest.raises(InputError, match=message):
        files.check_room(needs | {"scans": (2.1, tmp_path)})
