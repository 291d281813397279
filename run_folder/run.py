"""A run in an output folder: begun or resumed, one process a fold, ended once."""

import functools
import json
import os
import platform
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from run_folder import files
from utils import InputError, log, now, some_of, versions

LOCK_FOLDER = ".locks"
MAX_WAIT_SECONDS = 24 * 3600.0  # for another process to start a run or to end it
POLL_SECONDS = 0.25


@contextmanager
def locked(folder: Path, name: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of one piece of work in a folder; wait for another process, or refuse.

    The system takes a lock back when its process ends, and carries flock to other hosts over NFS.
    """
    lock_path = folder / LOCK_FOLDER / f"{name}.lock"
    owner_path = lock_path.with_suffix(".owner")
    lock_path.parent.mkdir(exist_ok=True)
    lock = FileLock(lock_path, fallback_to_soft=False)  # a soft one outlives a node that dies
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = owner_path.read_text() if owner_path.is_file() else "another process"
            if wait:
                log.info("waiting for %s (%s in %s)", owner, name, folder)
            try:
                lock.acquire(MAX_WAIT_SECONDS if wait else 0, POLL_SECONDS)
            except Timeout:  # an OSError, too
                work = f"{owner} works on {folder} ({name})"
                raise InputError(f"{work}; wait until it is done, or stop it") from None
        with suppress(OSError):  # a full disk
            owner_path.write_text(f"process {os.getpid()} on host {platform.node()}")
    except (OSError, NotImplementedError) as error:
        warn_without_locks(folder, str(error))
    try:
        yield
    finally:
        lock.release()


@functools.cache
def warn_without_locks(folder: Path, reason: str) -> None:
    """Say once that nothing keeps a second process away."""
    log.warning("%s cannot be locked (%s): start no second process on it", folder, reason)


def new_record(script: str, arguments: dict, **facts: object) -> dict:
    """Return what a record says of a run that begins now; it equals what is read from its file."""
    record = {"run_id": uuid.uuid4().hex, "script": script, "arguments": arguments, **facts}
    record |= {"versions": versions(), "start": now(), "end": None}
    return json.loads(json.dumps(record, default=str))


@dataclass(frozen=True)
class RunFolder:
    """A run of some folds below --outpath; a command that would write this record resumes it."""

    path: Path  # --outpath
    name: str  # "run" (its record is run.json), or a method of heatmap.py ("LRP": LRP_run.json)
    record: dict  # what it says of a run that begins now, see `new_record`; it needs "n_folds"
    compared: tuple[str, ...]  # keys of the record, or of its "arguments", results depend on
    results: tuple[str, ...]  # globs of all that it writes; * in the first is a finished fold's
    shared: tuple[str, ...] = ()  # globs of what other runs in the folder write alike, too

    @property
    def record_path(self) -> Path:
        """The file of the record."""
        return self.path / ("run.json" if self.name == "run" else f"{self.name}_run.json")

    def check(self, overwrite: bool) -> bool:
        """Return whether there is a run to resume; write nothing.

        An InputError if the folder cannot be written, holds another run (naming each differing key
        with both values), or results without a record. With `overwrite`: another script's run only.
        """
        files.check_outpath(self.path)
        if not self.record_path.is_file():
            self._refuse_strangers(overwrite)
            return False
        before = files.read_json(self.record_path)
        if (script := before.get("script")) != self.record["script"]:
            raise InputError(f"{self.path} holds a run of {script}: choose another --outpath")
        if overwrite:
            return False
        if not isinstance(before.get("arguments"), dict):
            raise InputError(f"{self.record_path} does not say what the run's arguments were")
        differing = [self._difference(key, before) for key in self.compared]
        if differing := "; ".join(filter(None, differing)):
            advice = "Choose another --outpath, or start anew with --overwrite"
            raise InputError(f"{self.path} holds a run with other options: {differing}. {advice}")
        return True

    def _refuse_strangers(self, overwrite: bool) -> None:
        """Raise an InputError if files would be replaced that no record tells of."""
        has_other_runs = any(self.path.glob("*run.json"))
        globs = self.results if has_other_runs else (*self.results, *self.shared)
        paths = [] if overwrite else self._matching(globs)
        if paths:
            raise InputError(
                f"{self.path} holds files that would be replaced, and no {self.record_path.name} "
                f"of the run that made them: {some_of(p.relative_to(self.path) for p in paths)}. "
                "Choose another --outpath, or replace them with --overwrite"
            )

    def _difference(self, key: str, before: dict) -> str:
        """Return how a run's record differs in a key from this one, "" if it does not."""
        is_option = key in self.record["arguments"]
        then, now = (r["arguments"].get(key) if is_option else r.get(key)
                     for r in (before, self.record))  # fmt: skip
        if then == now:
            return ""
        if is_option:
            texts = ("left out" if value is None else value for value in (now, then))
            return "--{} {} (the run has {})".format(key.replace("_", "-"), *texts)
        if isinstance(then, dict) and isinstance(now, dict):
            now = some_of(name for name in then | now if then.get(name) != now.get(name))
            return f"{key.removesuffix('_sha256')}: other content of {now}"
        return f"{key} {str(now)[:12]} (the run has {str(then)[:12]})"

    def _matching(self, globs: Iterable[str]) -> list[Path]:
        """Return the files in the folder that match, in the order of the globs."""
        globs = [glob.replace("_f*", "_f[0-9]*") for glob in globs]  # of a fold, not one's own
        return [path for glob in globs for path in sorted(self.path.glob(glob)) if path.is_file()]

    def start(
        self, overwrite: bool = False, tables: dict[str, pd.DataFrame] | None = None
    ) -> "RunFolder":
        """Resume, or remove what is replaced and begin, `tables` first, the record last."""
        self.check(overwrite)
        files.make_outpath(self.path)
        with self._lock("start", wait=True), ExitStack() as others:
            if self.check(overwrite):
                return replace(self, record=files.read_json(self.record_path))
            for lock_path in (self.path / LOCK_FOLDER).glob(f"{self.name}_f*.lock"):
                others.enter_context(locked(self.path, lock_path.stem))
            self.record_path.unlink(missing_ok=True)
            for path in self._matching(self.results):
                path.unlink()
            for name, table in (tables or {}).items():
                files.write_csv(self.path / name, table)
            files.write_json(self.record_path, self.record)
        return self

    def unfinished(self, folds: Iterable[int]) -> list[int]:
        """Return those of the folds that are not done."""
        done = {fold: self.path / self.results[0].replace("*", str(fold)) for fold in folds}
        return [fold for fold, path in done.items() if not path.is_file()]

    @contextmanager
    def hold(self, fold: int) -> Iterator[bool]:
        """Be the only process on a fold, or raise an InputError; yield whether it is to be done."""
        with ExitStack() as stack:
            with self._lock("start", wait=True):
                stack.enter_context(self._lock(f"fold_{fold}"))
                self._check_current()
            yield bool(self.unfinished([fold]))

    @contextmanager
    def finish(self) -> Iterator[bool]:
        """Yield, to one process at a time, whether all folds are done; then enter `end`."""
        with self._lock("finish", wait=True):
            missing = self.unfinished(range(self.record["n_folds"]))
            if missing:
                log.info("%s: folds %s are still to be done", self.name, missing)
            yield not missing
            if not missing:
                with self._lock("start", wait=True):
                    self._check_current()
                    files.write_json(self.record_path, self.record | {"end": now()})

    def _lock(self, work: str, wait: bool = False) -> AbstractContextManager:
        """Hold the lock of a piece of this run's work."""
        return locked(self.path, f"{self.name}_{work}", wait)

    def _check_current(self) -> None:
        """Raise an InputError if the folder's run is another than when this process began."""
        record = files.read_json(self.record_path) if self.record_path.is_file() else {}
        if record.get("run_id") != self.record["run_id"]:
            rule = f"another process has started the run in {self.path} anew since this one began"
            raise InputError(f"{rule}; choose another --outpath")
