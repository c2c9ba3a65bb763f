"""folder.py on trees with links, hidden names, pipes and names that are not UTF-8."""

import os
from pathlib import Path

import pytest

from mlvision.data.folder import find_images, folder_manifest
from mlvision.errors import InputError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_everything_that_is_decoded_is_found_and_the_rest_is_named(tmp_path):
    names = ["a.JPG", "b.jfif", "c.jpe", "deep/er/d.avif", "deep/e.ppm", "f.pgm", "g.jp2", "h.tga", "i.webp", "j.mpo"]
    touch(tmp_path, *names, "._a.jpg", ".cache/x.jpg", "deep/notes.txt", "k.svg", "l.eps", "m.pdf", "Thumbs.db")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")

    manifest = folder_manifest(tmp_path, ("cat", "dog"))

    assert [record.key for record in manifest.records] == sorted(names)
    assert all((record.labels, record.unknown) == ((), (0, 1)) for record in manifest.records)
    assert manifest.protocol == (
        f"10 images below {tmp_path}; left out: 5 files of other kinds (Thumbs.db), 2 hidden (._a.jpg), "
        "2 links that lead nowhere (gone.jpg), 1 pipes, sockets or devices (pipe.jpg)"
    )


def test_links_are_followed_once(tmp_path):
    images, other = tmp_path / "images", tmp_path / "other"
    touch(images, "z/1.jpg", "z/2.jpg")
    touch(other, "3.jpg", "deep/4.jpg")
    (images / "a").symlink_to(images / "z")  # comes first by name; the folder itself counts
    (images / "b").symlink_to(other)
    (images / "c").symlink_to(other / "deep")
    (images / "z" / "up").symlink_to(images)
    (other / "round").symlink_to(images / "z")
    (images / "one.png").symlink_to(other / "3.jpg")

    search = find_images(images)

    assert search.images == ["b/3.jpg", "b/deep/4.jpg", "one.png", "z/1.jpg", "z/2.jpg"]
    assert sorted(search.others.pop("links to a folder that is read already")) == ["a", "b/round", "c", "z/up"]
    assert not search.others


def test_names_that_are_not_utf_8_have_visible_keys_and_open(tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    for name in (b"/\xff.jpg", b"/plain.jpg", b"/\xe9.txt"):
        with open(odd + name, "wb") as file:
            file.write(name)

    manifest = folder_manifest(tmp_path, ())

    assert [record.key for record in manifest.records] == ["caf\\udce9/plain.jpg", "caf\\udce9/\\udcff.jpg"]
    assert [Path(record.path).read_bytes() for record in manifest.records] == [b"/plain.jpg", b"/\xff.jpg"]
    (manifest.protocol + manifest.hash).encode()


def test_a_folder_without_images_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match="images: .*nowhere is not a folder"):
        folder_manifest(tmp_path / "nowhere", ())
    touch(tmp_path, "a.heic", "b.heic")
    with pytest.raises(InputError, match=r"no image below .*; left out: 2 files of other kinds \(a.heic\); looked for"):
        folder_manifest(tmp_path, ())


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may read everything")
def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path):
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    (tmp_path / "locked").chmod(0)
    with pytest.raises(InputError, match="locked: cannot be listed: Permission denied"):
        find_images(tmp_path)
