"""Folders that are searched for images: which files count, in which order, and what is said of the others."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlvision.data.images import SUFFIXES
from mlvision.data.limits import MAX_PIXELS
from mlvision.data.manifest import Manifest, first_repeat, true_paths
from mlvision.data.records import Record
from mlvision.errors import InputError, printable


@dataclass
class FolderSearch:
    """What lies below a folder.

    Attributes:
        images: path relative to the folder, with `/`, of each image, sorted.
        others: what was passed over, as kind: names.
    """

    images: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)

    def note(self) -> str:
        """One line of what was passed over, with an example of each kind; "" for nothing."""
        parts = [f"{len(names):,} {kind} ({printable(min(names))})" for kind, names in sorted(self.others.items())]
        return f"left out: {', '.join(parts)}" if parts else ""


def find_images(folder: str | os.PathLike[str]) -> FolderSearch:
    """Searches a folder and those below it.

    Links to files and folders are followed; of a folder that can be reached in several ways, the way without links counts,
    else the first, so that links cannot run in circles. Names that begin with a dot are hidden files, which systems and
    tools leave behind (`._photo.jpg`, `.ipynb_checkpoints`).

    Raises:
        InputError: a folder cannot be listed.
    """
    search = FolderSearch()
    seen: set[tuple[int, int]] = set()
    waiting = [""]  # folders by their own names; linked ones come after all others
    linked: list[str] = []
    while waiting or linked:
        prefix = waiting.pop() if waiting else linked.pop(0)
        path = os.path.join(folder, prefix)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            _pass_over(search, "links to a folder that is read already", prefix)
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in list_folder(path):
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            kind = kind_of(entry)
            if kind == "folder":
                (linked if entry.is_symlink() else waiting).append(name)
            elif kind == "image":
                search.images.append(name)
            else:
                _pass_over(search, kind, name)
    search.images.sort()
    return search


def list_folder(path: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """The entries of a folder by name.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{printable(os.fspath(path))}: cannot be listed: {error.strerror or error}") from error


def kind_of(entry: os.DirEntry[str]) -> str:
    """ "folder" or "image" for what is used; else what it is, in the plural, for `FolderSearch.others`."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        # Asks the file system for links alone: a stat for each of a million files takes minutes on network storage.
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "pipes, sockets or devices" if os.path.exists(entry.path) else "links that lead nowhere"
    except OSError:  # a link to itself
        return "links that lead nowhere"
    return "image" if os.path.splitext(entry.name)[1].lower() in SUFFIXES else "files of other kinds"


def _pass_over(search: FolderSearch, kind: str, name: str) -> None:
    search.others.setdefault(kind, []).append(name)


def folder_manifest(folder: Path, classes: tuple[str, ...], max_pixels: int = MAX_PIXELS) -> Manifest:
    """The images below a folder, of whose labels nothing is known; the protocol says what was passed over.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"images: {folder} is not a folder")
    search = find_images(folder)
    if not search.images:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise InputError(
            "; ".join(filter(None, (f"images: no image below {folder}", search.note(), f"looked for {suffixes}")))
        )
    unknown = tuple(range(len(classes)))
    records = tuple(Record(name, os.path.join(folder, name), labels=(), unknown=unknown) for name in search.images)
    note = "; ".join(filter(None, (f"{len(records):,} images below {folder}", search.note())))
    return Manifest(classes, records, split=str(folder), protocol=note, max_pixels=max_pixels)


def images_manifest(paths: Sequence[str], classes: tuple[str, ...], max_pixels: int = MAX_PIXELS) -> Manifest:
    """Images of whose labels nothing is known: files, and those below folders.

    The key of an image below the only folder is its path from there; otherwise keys begin with the path as it was given.

    Raises:
        InputError: as `folder_manifest`, no such file, or an image that is given twice.
    """
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return folder_manifest(Path(paths[0]), classes, max_pixels)
    files: list[str] = []
    notes = []
    for path in paths:
        if os.path.isdir(path):
            below = folder_manifest(Path(path), classes, max_pixels)
            files += [os.path.join(path, record.key) for record in below.records]
            notes.append(below.protocol)
        elif os.path.isfile(path):
            files.append(path)
        else:
            raise InputError(f"images: {printable(path)}: no such file or folder")
    pair = first_repeat(true_paths(files))
    if pair is not None:
        first, again = (printable(os.path.normpath(files[i])) for i in pair)
        raise InputError(f"images: {first} is given twice{'' if again == first else f', the second time as {again}'}")
    unknown = tuple(range(len(classes)))
    records = tuple(Record(Path(path).as_posix(), path, labels=(), unknown=unknown) for path in files)
    notes = notes or [f"{len(files):,} image files"]
    return Manifest(classes, records, split="images", protocol="; ".join(notes), max_pixels=max_pixels)
