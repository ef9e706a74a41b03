"""Pictures in folders and archives: what comes in, and what is refused in one line."""

import io
import os
import struct
import sys
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta.tasks.read import DataWarning, _archive, folder
from fastmeta.tasks.read._archive import open_archive

reader = sys.modules["fastmeta.tasks.read.folder"]  # the function of that name hides the module


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))


def png(colour=(200, 100, 50), size=(9, 9), mode="RGB", **more) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "png", **more)
    return file.getvalue()


def write(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def packed(path, files: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


PETS = {
    "cat/a.png": png((255, 0, 0)), "cat/b.png": png((0, 255, 0)), "dog/c.png": png((0, 0, 255)),
    "readme.txt": b"", "cat/.hidden.png": b"", "__MACOSX/cat/a.png": b"",
}  # fmt: skip


def test_a_folder_and_an_archive_of_it_are_the_same(tmp_path):
    plain = folder(write(tmp_path / "pets", PETS), image_size=4)
    assert plain.names == ("cat", "dog") and plain.groups is None and plain.counts.tolist() == [2, 1]
    assert plain.rows.dtype == torch.uint8 and plain.input_shape == (3, 4, 4)
    assert plain.of_class(1).float().mean((0, 2, 3)).tolist() == [0, 0, 255]
    for prefix in ("", "pets/"):  # an archive often holds the folder itself
        archived = folder(
            packed(tmp_path / f"{len(prefix)}.zip", {prefix + k: v for k, v in PETS.items()}), image_size=4
        )
        assert torch.equal(archived.rows, plain.rows) and archived.names == plain.names
    assert folder(tmp_path / "pets", image_size=4, grey=True).input_shape == (1, 4, 4)


def test_super_classes_are_groups(tmp_path):
    found = folder(write(tmp_path / "x", {"pet/cat/a.png": png(), "pet/dog/b.png": png(), "farm/cat/c.png": png()}))
    assert found.names == ("farm/cat", "pet/cat", "pet/dog") and found.groups == ("farm", "pet", "pet")
    assert found.input_shape == (3, 84, 84)


def test_what_is_done_to_a_picture(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255  # the middle square
    turned = Image.new("RGB", (8, 8))
    turned.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    turned.save(file, "png", exif=exif)
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(deep, "png")
    fine = np.indices((8, 8)).sum(0) % 2 * 255  # a board of single pixels, which only an average makes grey
    board = io.BytesIO()
    Image.fromarray(fine.astype(np.uint8)).save(board, "png")
    crop = io.BytesIO()
    Image.fromarray(wide).save(crop, "png")
    files = {
        "x/1.png": crop.getvalue(), "x/2.png": file.getvalue(), "x/3.png": deep.getvalue(),
        "x/4.png": png((9, 9, 9, 0), mode="RGBA"), "x/5.png": png(0, mode="P", transparency=0),
        "x/6.png": board.getvalue(),
    }  # fmt: skip
    rows = folder(write(tmp_path / "data", files), image_size=4, grey=True).rows[:, 0].int()
    assert (rows[0] == 255).all()
    assert (rows[1, :, 2:] > 230).all() and (rows[1, :, :2] < 25).all()  # what was above lies to the right
    assert (rows[2] == 40000 // 257).all()
    assert (rows[3:5] == 255).all()
    assert (rows[5, 1:3, 1:3] - 128).abs().max() < 20
    black = folder(tmp_path / "data", image_size=4, grey=True, background="black").rows[3:5]
    assert not black.any()


def test_sixteen_bits_that_come_out_dark_are_told(tmp_path):
    files = {}
    for i, brightest in enumerate((4095, 4096)):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4), brightest, np.uint16)).save(file, "png")
        files[f"x/{i}.png"] = file.getvalue()
    root = write(tmp_path / "data", files)
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(DataWarning, match="1 pictures of 16 bits, such as x/0.png, use only the lowest 12"):
            rows = folder(root, image_size=4).rows
    assert rows.unique().tolist() == [15]  # 4095 and 4096 of 65535: neither is made brighter than it was


def test_decoded_once_and_anew_where_something_changes(tmp_path, monkeypatch):
    count = 0

    def counting(*arguments):
        nonlocal count
        count += 1
        return square(*arguments)

    square = reader.square
    monkeypatch.setattr(reader, "square", counting)
    root = write(tmp_path / "pets", PETS)
    first = folder(root, image_size=4).rows.clone()  # what is mapped changes with the file
    assert torch.equal(folder(root, image_size=4).rows, first) and count == 3
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    damaged = bytearray(cached.read_bytes())
    damaged[-30] ^= 255
    cached.write_bytes(damaged)
    assert torch.equal(folder(root, image_size=4).rows, first) and count == 6
    cached.write_bytes(cached.read_bytes()[:50])
    assert torch.equal(folder(root, image_size=4).rows, first) and count == 9
    (root / "dog" / "c.png").write_bytes(png((1, 2, 3)))
    assert folder(root, image_size=4).of_class(1)[0, :, 0, 0].tolist() == [1, 2, 3] and count == 12
    folder(root, image_size=5)
    folder(root, image_size=4, cache=False)
    assert count == 18 and len(list((tmp_path / "cache").iterdir())) == 3


def test_what_was_left_half_written_is_swept_away(tmp_path):
    place = tmp_path / "cache"
    place.mkdir()
    for name, age in (("old.7.partial", 100_000), ("new.8.partial", 10)):
        (place / name).write_bytes(b"half")
        os.utime(place / name, (time.time() - age,) * 2)
    folder(write(tmp_path / "pets", PETS), image_size=4)
    assert [path.name for path in place.glob("*.partial")] == ["new.8.partial"]


BOMB = zlib.compress(bytes(100))


def huge_png(side: int) -> bytes:
    """A small file that says it is `side` by `side`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", BOMB) + chunk(b"IEND", b"")


def test_files_that_cannot_be_read_are_named_and_counted(tmp_path):
    bad = {"cat/cut.png": png(size=(50, 50))[:-40], "cat/text.jpg": b"no picture", "dog/huge.png": huge_png(60_000)}
    bad |= {"bird/only.png": b"", "dog/large.png": huge_png(10_000)}  # Pillow only warns of the second
    root = write(tmp_path / "pets", PETS | bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ValueError, match=r"5 of 8 pictures cannot be read: bird/only.png \(no picture that"
        ) as told:
            folder(root)
    assert "cat/cut.png (" in str(told.value) and "\n" not in str(told.value)
    assert "dog/large.png (10000 x 10000 pixels are more than the 89,478,485 allowed)" in str(told.value)
    assert "dog/huge.png (60000 x 60000" in str(told.value) or "dog/huge.png (Image size (3600000000" in str(told.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]  # nothing half-written
    for _ in range(2):
        with pytest.warns(DataWarning, match="5 of 8 pictures cannot be read: .*; skipped"):
            found = folder(root, image_size=4, on_error="skip")
        assert found.names == ("cat", "dog") and found.counts.tolist() == [2, 1]
        assert found.of_class(1)[0, :, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="1 of 1 pictures cannot be read"):
        folder(write(tmp_path / "none", {"x/y.png": b""}), on_error="skip")


def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(tmp_path):
    root = write(tmp_path / "pets", {"dog/1.png": png()})
    (root / "dog" / "2.png").symlink_to("1.png")
    (root / "dog" / "3.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"1 of 3 pictures cannot be read: dog/3.png \(.*No such file"):
        folder(root)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"a.png": png()}, "'a.png' lies in no class: pictures must lie at class/instance.png or"),
        ({"a/b/c/d.png": png()}, "'a/b/c/d.png' lies too deep"),
        ({"a/b.png": png(), "a/b/c.png": png()}, "'a/b.png' and 'a/b/c.png' lie at different depths"),
        ({"a/b.txt": b""}, "holds no picture that Pillow can read"),
    ],
)
def test_layouts_that_are_refused(tmp_path, files, text):
    with pytest.raises(ValueError, match=text):
        folder(write(tmp_path / "data", files))


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder, and no .zip archive of one"):
        folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere.zip: no such file"):
        folder(tmp_path / "nowhere.zip")


def patched(path, at: int, value: int):
    """The archive with 16 bits of its one member's headers changed: those of the local header at `at`, of the central
    one two bytes on."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    for place in (at, central + at + 2):
        data[place : place + 2] = struct.pack("<H", value)
    path.write_bytes(data)
    return path


def test_evil_archives_end_in_one_line(tmp_path, monkeypatch):
    def refused(path, text):
        with pytest.raises(ValueError, match=text) as told:
            folder(path)
        assert "\n" not in str(told.value) and str(path) in str(told.value)
        assert not list((tmp_path / "cache").glob("*"))

    good = {"x/a.png": png()}
    for name in ("../a.png", "/x/a.png", "x/../../a.png", "C:/x/a.png", "x\\..\\a.png"):
        refused(packed(tmp_path / "out.zip", good | {name: png()}), "member .* leads out of the archive's folder")
    refused(patched(packed(tmp_path / "locked.zip", good), 6, 1), "member 'x/a.png' is encrypted")
    refused(
        patched(packed(tmp_path / "odd.zip", good), 8, 97), "compressed by method 97; allowed are stored and deflated"
    )
    whole = packed(tmp_path / "cut.zip", good).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.zip", "cut.zip is damaged")
    flipped = bytearray(whole)
    flipped[whole.index(b"IDAT") + 6] ^= 255
    (tmp_path / "flipped.zip").write_bytes(flipped)
    refused(tmp_path / "flipped.zip", "x/a.png .*Bad CRC-32")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/a.png", bytes(3_000_000))
    with open_archive(tmp_path / "bomb.zip", largest=2_999_999 + 1):
        pass
    monkeypatch.setattr(_archive, "_PLENTY", 1_000_000)
    refused(tmp_path / "bomb.zip", "would be 3,000,000 bytes unpacked, more than the 1,000,000")
    with pytest.raises(ValueError, match="'x/a.png' would be 3,000,000 bytes, more than the 2,000,000 allowed"):
        with open_archive(tmp_path / "bomb.zip", largest=2_000_000):
            pass


def test_an_archive_cannot_say_less_than_it_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "liar.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/a.png", bytes(1_000_000))
    data = bytearray((tmp_path / "liar.zip").read_bytes())
    for place in (22, data.index(b"PK\x01\x02") + 24):
        data[place : place + 4] = struct.pack("<I", 1000)
    (tmp_path / "liar.zip").write_bytes(data)
    with open_archive(tmp_path / "liar.zip") as archive, pytest.raises(ValueError, match="is damaged: x/a.png"):
        archive.read("x/a.png")


def test_larger_than_memory_is_decoded_into_a_file(tmp_path, monkeypatch):
    root = write(tmp_path / "pets", PETS | {"cat/0.png": b""})
    with pytest.warns(DataWarning):
        plain = folder(root, image_size=4, on_error="skip", cache=False)
    monkeypatch.setattr(reader, "_IN_MEMORY", 10)
    with pytest.warns(DataWarning):
        mapped = folder(root, image_size=4, on_error="skip")
    assert torch.equal(mapped.rows, plain.rows)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_real_archives(data_root):
    emoji = folder(data_root / "emoji" / "noto.zip", image_size=32)
    assert len(emoji.order) == 1852 and len(emoji) == 97 and len(set(emoji.groups)) > 5
    assert int(emoji.counts.min()) == 1 and int(emoji.counts.max()) == 245
    fonts = folder(data_root / "fonts" / "glyphs.zip", image_size=28, grey=True)
    assert len(fonts.order) == 5064 and sorted(set(fonts.groups)) == ["Cyrillic", "Greek", "Latin", "Thai"]
    assert fonts.input_shape == (1, 28, 28)
