"""Sources of images: class folders, list files, tars; what is found and what is refused."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset as wds
from cache_making import plan_of, write_cache
from PIL import Image

from detok_pipe.latents.cache import open_cache
from detok_pipe.latents.errors import ConfigError, InputError
from detok_pipe.pipelines.images import open_images


def picture(value: int = 0, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, form)
    return file.getvalue()


def tree(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def levels(source) -> list[int]:
    return [np.asarray(source.load(index))[0, 0, 0] for index in range(len(source))]


# ---------------------------------------------------------------- class folders


def test_class_folders_are_sorted_and_searched_at_any_depth(tmp_path):
    tree(
        tmp_path,
        {
            "zebra/a.png": picture(1),
            "ape/deep/er/b.JPEG": picture(2),  # a PNG named .JPEG
            "ape/c d é 画.Png": picture(3),
            "ape/notes.txt": b"no image",
            "ape/.hidden.png": picture(9),
            ".git/d.png": picture(9),
            "LICENSE": b"text beside the classes is passed over",
        },
    )
    source = open_images(tmp_path)
    assert source.class_names == ["ape", "zebra"]
    assert [source.name(i) for i in range(3)] == [
        "ape/c d é 画.Png",
        "ape/deep/er/b.JPEG",
        "zebra/a.png",
    ]
    assert source.labels.tolist() == [0, 0, 1]
    assert source.labels.dtype == np.int32
    assert levels(source) == [3, 2, 1]


def test_a_flat_folder_is_unlabelled(tmp_path):
    source = open_images(tree(tmp_path, {"b.png": picture(2), "a.png": picture(1)}))
    assert levels(source) == [1, 2]
    assert source.labels.tolist() == [-1, -1]
    assert source.class_names == []


def test_symbolic_links_are_followed_and_loops_end(tmp_path):
    real = tree(tmp_path / "elsewhere", {"x.png": picture(5)})
    root = tree(tmp_path / "root", {"a/y.png": picture(6)})
    (root / "linked").symlink_to(real, target_is_directory=True)
    (root / "a" / "loop").symlink_to(root / "a", target_is_directory=True)
    source = open_images(root)
    assert [source.name(i) for i in range(2)] == ["a/y.png", "linked/x.png"]


def test_names_that_are_no_unicode(tmp_path):
    folder = os.fsencode(tmp_path) + b"/c\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff\xfe.png", "wb") as file:
        file.write(picture(4))
    source = open_images(tmp_path)
    assert levels(source) == [4]
    assert source.class_names == ["c\\xe9"]
    assert source.name(0) == "c\\xe9/\\xff\\xfe.png"
    assert len(source.identity["hash"]) == 64


def test_many_classes(tmp_path):
    for number in range(2000):
        tree(tmp_path, {f"c{number:05d}/x.png": b""})
    assert len(open_images(tmp_path).class_names) == 2000


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no images and no class folders"),
        ({"full/a.png": b"", "empty/readme.txt": b""}, "class folder .*empty has no images"),
        ({"a/b.png": b"", "loose.png": b""}, "images beside them"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        open_images(tree(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("b/deep/1.png", r"tars \(a\.tar, \.\.\.\) and class folders \(b"),
        ("1.png", "images \\(1.png"),
    ],
)
def test_images_beside_tars_are_refused(tmp_path, name, message):
    tar(tmp_path / "a.tar", [("1.png", picture(7))])
    tree(tmp_path, {"logs/notes.txt": b"", "README": b"", ".cache/2.png": b"", ".b.tar": b""})
    assert levels(open_images(tmp_path)) == [7]
    tree(tmp_path, {name: picture()})
    with pytest.raises(InputError, match=message):
        open_images(tmp_path)


def test_what_can_be_no_image_file_is_passed_over(tmp_path):
    tree(tmp_path, {"a/image.png": picture(1)})
    os.mkfifo(tmp_path / "a" / "fifo.png")
    (tmp_path / "a" / "linked.png").symlink_to(tmp_path / "a" / "fifo.png")
    (tmp_path / "a" / "device.png").symlink_to("/dev/null")
    (tmp_path / "a" / "nowhere.png").symlink_to("nowhere")
    source = open_images(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a/image.png", "a/nowhere.png"]
    with pytest.raises(InputError, match=r"nowhere\.png: the file cannot be read"):
        source.load(1)


def test_a_root_is_for_lists_alone(tmp_path):
    tree(tmp_path, {"a/1.png": picture()})
    one = tar(tmp_path / "one.tar", [("1.png", picture())])
    for path, kind in ((tmp_path, "folder"), (one, "tar")):
        with pytest.raises(ConfigError, match=f"--data-root .*{path} is a {kind}; leave it out"):
            open_images(path, root=tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")


def test_an_unreadable_image_is_named(tmp_path):
    source = open_images(tree(tmp_path, {"a/bad.png": b"no", "a/gone.png": b"x"}))
    with pytest.raises(InputError, match=r"a/bad\.png: it is no image"):
        source.load(0)
    (tmp_path / "a/gone.png").unlink()
    with pytest.raises(InputError, match=r"a/gone\.png: the file cannot be read: No such file"):
        source.load(1)


# ---------------------------------------------------------------- list files


def test_list_file(tmp_path):
    tree(tmp_path, {"n02/b c.png": picture(2), "n01/a.png": picture(1)})
    listing = tmp_path / "train.txt"
    listing.write_bytes("\ufeffn02/b c.png 1\n\nn01/a.png   0\n".encode())
    source = open_images(listing)
    assert levels(source) == [2, 1]
    assert source.labels.tolist() == [1, 0]
    assert source.class_names == ["n01", "n02"]
    away = tmp_path / "lists" / "train.txt"
    away.parent.mkdir()
    away.write_text(listing.read_text())
    assert levels(open_images(away, root=tmp_path)) == [2, 1]
    assert open_images(away, root=tmp_path).identity == source.identity


def test_a_list_from_a_pipe_is_read_once(tmp_path):
    tree(tmp_path, {"a/1.png": picture(1), "b/2.png": picture(2)})
    reading, writing = os.pipe()
    os.write(writing, b"a/1.png 0\nb/2.png 1\n")
    os.close(writing)
    source = open_images(f"/dev/fd/{reading}", root=tmp_path)
    os.close(reading)
    assert levels(source) == [1, 2]
    with pytest.raises(InputError, match="/dev/null lists no images"):
        open_images("/dev/null")


def test_a_hundred_thousand_classes(tmp_path):
    count = 100_000
    tree(tmp_path, {"n00000/a.png": picture()})
    lines = "".join(f"n{label:05d}/a.png {label}\n" for label in range(count))
    (tmp_path / "list.txt").write_text(lines)
    source = open_images(tmp_path / "list.txt")
    assert len(source.class_names) == count
    assert source.class_names[-1] == "n99999"
    assert source.labels.tolist() == list(range(count))
    # A cache keeps them all: labels are checked against names whenever it is opened.
    plan = plan_of(8, class_names=tuple(source.class_names))
    write_cache(tmp_path / "c", plan)
    assert open_cache(tmp_path / "c").num_classes == count


def test_class_names_of_a_list_without_class_folders_are_numbers(tmp_path):
    tree(tmp_path, {"a.png": picture(), "b.png": picture()})
    listing = tmp_path / "list.txt"
    listing.write_text(f"a.png 0\n{tmp_path}/b.png 2\na.png -1\n")
    source = open_images(listing)
    assert source.class_names == ["0", "1", "2"]
    assert source.labels.tolist() == [0, 2, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no images"),
        ("a.png 0\nb.png\n", r"list\.txt, line 2: 'b.png' is no path and class number"),
        ("a.png 0\nb.png x\n", "line 2"),
        ("a.png -2\n", "line 1: class number -2 is outside"),
        ("a.png 1000000\n", "line 1: class number 1000000 is outside"),
        ("gone.png 0\n", r"first image .*gone\.png does not exist"),
        ("\x00\x01\x02\n", "line 1"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    tree(tmp_path, {"a.png": picture(), "list.txt": text.encode()})
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "list.txt")


# ---------------------------------------------------------------- tars


def test_tars_as_webdataset_writes_them(tmp_path):
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"train-{shard}.tar")) as sink:
            for number in range(3):
                value = 10 * shard + number
                pixels = np.full((8, 8, 3), value, np.uint8)
                sink.write({"__key__": f"{value:04d}", "png": pixels, "cls": value % 4})
    source = open_images(tmp_path)
    assert levels(source) == [0, 1, 2, 10, 11, 12]
    assert source.labels.tolist() == [0, 1, 2, 2, 3, 0]
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.name(4) == "train-1.tar/0011.png"
    assert len(open_images(tmp_path / "train-1.tar")) == 3


def test_a_tar_without_class_numbers_is_unlabelled(tmp_path):
    path = tar(tmp_path / "x.tar", [("d/a.png", picture(1)), ("d/a.json", b"{}"), ("._b.png", b"")])
    source = open_images(path)
    assert levels(source) == [1]
    assert source.labels.tolist() == [-1]


def test_nothing_in_a_tar_is_run_or_unpickled(tmp_path):
    trap = tmp_path / "sprung"
    payload = b"cos\nsystem\n(S'touch " + os.fsencode(trap) + b"'\ntR."
    members = [
        (f"pipe:touch {trap}.png", picture(1)),
        ("a.pyd", payload),
        ("a.png", picture(2)),
        ("../../b.png", picture(3)),
        ("c.png.pickle", payload),
    ]
    source = open_images(tar(tmp_path / "x.tar", members))
    assert levels(source) == [1, 2, 3]
    assert not trap.exists()


def test_links_and_sparse_members_of_a_tar_are_not_followed(tmp_path):
    secret = tree(tmp_path, {"secret.png": picture(7)}) / "secret.png"
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("h.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        info = tarfile.TarInfo("ok.png")
        info.size = len(picture(1))
        archive.addfile(info, io.BytesIO(picture(1)))
    assert levels(open_images(tmp_path / "x.tar")) == [1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"")], "has no images"),
        ([("a.png", b""), ("a.jpg", b"")], r"a\.png and a\.jpg have the same key"),
        ([("a.png", b""), ("a.cls", b"cat")], r"a\.cls holds b'cat', not a class number"),
        ([("a.png", b""), ("a.cls", b"99999999")], "class number 99999999 is outside"),
        ([("a.png", b""), ("a.cls", b"1"), ("b.png", b"")], "1 of 2 images have no class number"),
    ],
)
def test_bad_tars(tmp_path, members, message):
    with pytest.raises(InputError, match=message):
        open_images(tar(tmp_path / "x.tar", members))


def test_damaged_tars(tmp_path):
    path = tar(tmp_path / "x.tar", [(f"{n}.png", picture(n)) for n in range(9)])
    data = path.read_bytes()
    path.write_bytes(data[: 512 * 9 + 100])
    with pytest.raises(InputError, match=r"x\.tar cannot be read .*cut short"):
        open_images(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match="cannot be read as an uncompressed tar"):
        open_images(path)


# ---------------------------------------------------------------- identity


def test_identity_follows_names_labels_and_order_not_the_place(tmp_path):
    files = {"a/1.png": picture(1), "b/2.png": picture(2)}
    first = open_images(tree(tmp_path / "x", files)).identity
    assert first["count"] == 2
    assert open_images(tree(tmp_path / "y", files)).identity == first
    # The same names and labels with files of another size: known by the sizes alone.
    assert open_images(tmp_path / "x").sizes_hash() == open_images(tmp_path / "y").sizes_hash()
    tree(tmp_path / "y", {"a/1.png": picture(1) + b"more"})
    assert open_images(tmp_path / "y").identity == first
    assert open_images(tmp_path / "x").sizes_hash() != open_images(tmp_path / "y").sizes_hash()
    (tmp_path / "y" / "a" / "1.png").unlink()
    (tmp_path / "y" / "a" / "1.png").symlink_to("nowhere.png")
    assert open_images(tmp_path / "y").sizes_hash() != open_images(tmp_path / "x").sizes_hash()
    more = open_images(tree(tmp_path / "y", {"b/3.png": picture(3)})).identity
    assert more["count"] == 3
    assert more["hash"] != first["hash"]
    renamed = {"a/1.png": picture(1), "c/2.png": picture(2)}
    assert open_images(tree(tmp_path / "z", renamed)).identity != first
    for labels in ("0 1", "1 0"):
        one, two = labels.split()
        tree(tmp_path / "x", {f"{one}.txt": f"a/1.png {one}\nb/2.png {two}\n".encode()})
    lists = [open_images(tmp_path / "x" / name).identity for name in ("0.txt", "1.txt")]
    assert lists[0] != lists[1]
