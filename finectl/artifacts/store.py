"""The workspace: where artifacts lie, how an INPUT argument finds one, and what is checked when one is opened."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finectl.artifacts.files import path_inside, sha256_file
from finectl.artifacts.kinds import KINDS, way_to
from finectl.artifacts.manifest import NAME, Manifest, digest_of, read_manifest
from finectl.artifacts.tensors import check_header
from finectl.errors import FinectlError, InputError, UsageError
from finectl.registry import nearest

ENVIRONMENT_VARIABLE = "FINECTL_WORKSPACE"
LATEST = "latest"
REPLACED_SUFFIX = ".replaced"
SHOWN_CHARACTERS = 300
HASHED_AT_ONCE = 4
REPLACEMENT_ATTEMPTS = 50
REPLACEMENT_PAUSE_S = 0.02


@dataclass(frozen=True)
class Artifact:
    """A published artifact: its directory and its checked manifest."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        """The artifact's kind, a key of `KINDS`."""
        return self.manifest.kind

    @property
    def name(self) -> str:
        """The directory's name, `<slug>-<recipe8>` inside a workspace."""
        return self.path.name

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises:
            InputError: the artifact has no such file, or its path leads out of the artifact.
        """
        if not self.has(name):
            raise InputError(
                f"{self.path} has no file {name!r}",
                expected=f"one of: {', '.join(file.path for file in self.manifest.files)}",
            )
        return path_inside(self.path, name)

    def has(self, name: str) -> bool:
        """Tell whether the manifest lists a file of this name."""
        return any(file.path == name for file in self.manifest.files)


def open_artifact(path: Path, kinds: Sequence[str] = ()) -> Artifact:
    """Open an artifact and check its schema, its kind, the sizes of its files and their safetensors headers.

    Args:
        path: The artifact's directory.
        kinds: The kinds that will do; any when empty.

    Raises:
        InputError: it is none, it is of another kind, or a file is missing, truncated or outside of it.
    """
    for _ in range(REPLACEMENT_ATTEMPTS):
        before = _identity(path)
        try:
            return _open(path, kinds)
        except (FinectlError, FileNotFoundError):
            # `--force` may have put another directory here in the middle of the checks: then look at that one.
            if before == _identity(path):
                break
    return _open(path, kinds)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _open(path: Path, kinds: Sequence[str]) -> Artifact:
    if path.name.startswith(".") and path.name.endswith(".partial"):
        raise InputError(f"{path} is unfinished work, not an artifact", fix="run the command that makes it again")
    if not path.is_dir():
        raise InputError(
            f"there is no artifact at {path}", expected="a directory", fix="list what there is: finectl ls"
        )
    artifact = Artifact(path, read_manifest(path))
    if kinds and artifact.kind not in kinds:
        raise InputError(
            f"{path} is of kind {artifact.kind!r}",
            expected=f"kind {' or '.join(repr(kind) for kind in kinds)}",
            fix=way_to(kinds[0], artifact.kind, path),
        )
    for record in artifact.manifest.files:
        file = path_inside(path, record.path)
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            raise InputError(
                f"{file} is missing" if size is None else f"{file} has {size:,} bytes",
                expected=f"{record.bytes:,} bytes, as the manifest says",
                fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
            )
        if file.suffix == ".safetensors":
            check_header(file)
    return artifact


def require_no_number(name: str) -> None:
    """Check that an input is none of the numbers of an option's list that was written with spaces.

    Raises:
        InputError: it is.
    """
    numbers = name.replace(" ", "").strip(",").split(",")
    try:
        list(map(float, numbers))
    except ValueError:
        return
    if not Path(name).exists():
        raise InputError(
            f"{name!r} was read as an INPUT, and is a number",
            expected="a path, kind/name, 'latest' or '-'",
            fix="write the numbers of an option without spaces between them, such as 0.1,0.1,0.2,0.5",
        )


def verify_artifacts(artifacts: Sequence[Artifact], sha256: Callable[[Path], str] = sha256_file) -> None:
    """Hash every file of artifacts again, several at a time.

    Args:
        artifacts: Open ones.
        sha256: Returns the digest of a file; `remembered_sha256` reads no large file twice that did not change.

    Raises:
        InputError: a file's content is not what the manifest says, or a manifest's digest is not that of its files.
    """
    from concurrent.futures import ThreadPoolExecutor  # which takes its time to import

    records = [(artifact, record) for artifact in artifacts for record in artifact.manifest.files]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        digests = pool.map(lambda item: sha256(path_inside(item[0].path, item[1].path)), records)
        for (artifact, record), found in zip(records, digests, strict=True):
            if found != record.sha256:
                raise InputError(
                    f"{artifact.path / record.path} is corrupt: its SHA-256 is {found[:16]}...",
                    expected=f"{record.sha256[:16]}..., as the manifest says",
                    fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
                )
    for artifact in artifacts:
        if digest_of(artifact.manifest.files) != artifact.manifest.digest:
            raise InputError(
                f"the digest in {artifact.path / NAME} is not that of its files",
                fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
            )


def is_locked(directory: Path) -> bool:
    """Tell whether a process at work holds a staging directory."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _is_dir(path: Path) -> bool:
    """Tell whether a directory is there; text that cannot be a path is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _named(path: Path) -> Path:
    """Return the path under the artifact's own name: `latest` is followed by one step, `.` and `..` are spelled out."""
    if path.is_symlink():
        return path.parent / os.readlink(path)
    return path.resolve() if path.name in ("", "..") else path


class Workspace:
    """A directory of artifacts, one folder a kind.

    Args:
        root: The directory; by default `$FINECTL_WORKSPACE`, else `./artifacts`. It need not exist.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(os.environ.get(ENVIRONMENT_VARIABLE) or "artifacts")

    def directory(self, kind: str, name: str) -> Path:
        """Return where the artifact of this kind and name lies, or would lie."""
        return self.root / kind / name

    def paths(self, kind: str) -> list[Path]:
        """Return the directories of all published artifacts of a kind, sorted by name."""
        folder = self.root / kind
        self.recover(folder)
        if not folder.is_dir():
            return []
        return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and not p.is_symlink() and p.is_dir())

    def artifacts(self) -> Iterator[Artifact | tuple[Path, FinectlError]]:
        """Yield every artifact of the workspace in order of kind and name, or its path and what is wrong with it."""
        for kind in KINDS:
            for path in self.paths(kind):
                try:
                    yield open_artifact(path)
                except FinectlError as error:
                    yield path, error

    def recover(self, folder: Path) -> None:
        """Put back an artifact that a crash caught between being set aside and being replaced.

        A process at work needs an instant between the two; that is waited for.
        """
        for old in sorted(folder.glob(f".*{REPLACED_SUFFIX}")):
            final = folder / old.name[1 : -len(REPLACED_SUFFIX)]
            for _ in range(REPLACEMENT_ATTEMPTS):
                if final.exists():
                    break
                if not is_locked(final.with_name(f".{final.name}.partial")):
                    with contextlib.suppress(OSError):  # another process was first, or this one may only read
                        os.rename(old, final)
                    break
                time.sleep(REPLACEMENT_PAUSE_S)

    def newest(self, kinds: Sequence[str]) -> Artifact:
        """Return the newest published artifact of the first of `kinds` that has one.

        Where `latest` is gone, a damaged artifact does not hide the whole ones.

        Raises:
            InputError: there is none, and the message names the command that makes one; or the newest is damaged.
        """
        for kind in kinds:
            self.recover(self.root / kind)
            link = self.root / kind / LATEST
            if link.is_symlink() and link.exists():
                return open_artifact(self.directory(kind, os.readlink(link)), kinds)
            whole: list[Artifact] = []
            damage: FinectlError | None = None
            for path in self.paths(kind):
                try:
                    whole.append(open_artifact(path, kinds))
                except FinectlError as error:
                    damage = error
            if whole:
                return max(whole, key=lambda a: (a.manifest.created, a.name))
            if damage is not None:
                raise damage
        raise InputError(
            f"there is no {' or '.join(kinds)} artifact in the workspace {self.root}",
            expected=f"{KINDS[kinds[0]].help}",
            fix=KINDS[kinds[0]].made_by,
        )

    def newest_of_all(self) -> Artifact:
        """Return the newest published artifact of any kind.

        Raises:
            InputError: there is none, or the newest of a kind is damaged.
        """
        newest = [self.newest([kind]) for kind in KINDS if self.paths(kind)]
        return max(newest, key=lambda a: a.manifest.created) if newest else self.newest(list(KINDS))

    def find(self, text: str, kinds: Sequence[str]) -> Artifact:
        """Return the artifact that an INPUT argument names: a path, `kind/name`, a bare name, or `latest`.

        Raises:
            InputError: nothing is there, or it is not one of `kinds` (all kinds when empty), or it is damaged.
            UsageError: the text is empty.
        """
        if not text:
            raise UsageError("INPUT is empty", expected="a path, kind/name, 'latest' or '-'", fix="finectl ls")
        wanted = tuple(kinds) or tuple(KINDS)
        if text == LATEST:
            return self.newest(kinds) if kinds else self.newest_of_all()
        path = Path(text)
        if path.name == NAME:
            path = path.parent
        if _is_dir(path):
            return open_artifact(_named(path), kinds)
        kind, _, name = text.rstrip("/").rpartition("/")
        if kind in KINDS and name == LATEST:
            return self.newest([kind])
        for candidate in [kind] if kind in KINDS else ([] if kind else wanted):
            self.recover(self.root / candidate)
            if name and _is_dir(self.directory(candidate, name)):
                return open_artifact(self.directory(candidate, name), kinds)
        names = [f"{k}/{p.name}" for k in wanted for p in self.paths(k)]
        raise InputError(
            f"there is no artifact {text[:SHOWN_CHARACTERS]!r} in the workspace {self.root}{nearest(text, names)}",
            expected="a path, kind/name, 'latest' or '-'",
            fix="finectl ls",
        )

    def parent(self, artifact: Artifact, recorded: str, digest: str) -> Artifact | None:
        """Return a parent of `artifact` by its recorded relative path; None when it is gone or was made anew.

        The path may climb out of the artifact, but not out of the workspace; an absolute one is refused.

        Raises:
            InputError: the recorded path is absolute.
        """
        if Path(recorded).is_absolute():
            raise InputError(
                f"the manifest of {artifact.path} names its parent by the absolute path {recorded!r}",
                expected="a path relative to the artifact",
            )
        target = Path(os.path.normpath(artifact.path.absolute() / recorded))
        if not target.is_relative_to(Path(os.path.normpath(self.root.absolute()))):
            return None
        try:
            parent = open_artifact(target)
        except FinectlError:
            return None
        return parent if parent.manifest.digest == digest else None
