"""Omniglot: the real archives where they are, and what happens with bad ones."""

import shutil
import sys
import zipfile
from importlib import resources

import pytest
import torch

from fastmeta.tasks import make_tasks, omniglot
from fastmeta.tasks.omniglot import ARCHIVES

loader = sys.modules["fastmeta.tasks.omniglot"]  # the function of that name hides the module


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    loader._load.cache_clear()
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    loader._load.cache_clear()


def archive(path, alphabets: int, drawings: int = 20) -> None:
    from io import BytesIO

    from PIL import Image

    png = BytesIO()
    Image.new("1", (105, 105), 1).save(png, "png")
    with zipfile.ZipFile(path, "w") as file:
        for character in range(alphabets):
            for drawing in range(drawings):
                file.writestr(f"{path.stem}/Alphabet/character{character:02d}/0001_{drawing:02d}.png", png.getvalue())


def test_real_counts_and_splits(data_root):
    sizes = {split: omniglot(split, data_root=data_root).shape for split in ("train", "val", "test")}
    assert sizes == {"train": (1028, 20, 1, 28, 28), "val": (172, 20, 1, 28, 28), "test": (423, 20, 1, 28, 28)}
    images = omniglot("test", data_root=data_root)
    assert images.dtype == torch.uint8 and 0.03 < float(images.float().mean()) / 255 < 0.15  # ink is bright, and little
    sizes = {split: len(omniglot(split, "1200", data_root)) for split in ("train", "val", "test")}
    assert sizes == {"train": 1100, "val": 100, "test": 423}


@pytest.mark.parametrize("partition", ["vinyals", "1200"])
def test_splits_share_no_character(data_root, partition):
    rows = [omniglot(s, partition, data_root).flatten(1).numpy() for s in ("train", "val", "test")]
    seen = [row.tobytes() for part in rows for row in part]
    assert len(set(seen)) == len(seen) == 1623


def test_rotations_make_four_classes_of_one(data_root):
    assert len(make_tasks("omniglot", "test", data_root=data_root).examples) == 4 * 423


def test_second_load_comes_from_a_checked_cache(data_root, fresh_cache, monkeypatch):
    decoded, splits = [], resources.files("fastmeta.tasks").joinpath("splits")
    names = [n for split in ("train", "val", "test") for n in (splits / f"vinyals_{split}.txt").read_text().split()]

    def decode(archives):  # which takes seconds; others see to it
        decoded.append(archives)
        images = torch.arange(1623 * 20 * 28 * 28, dtype=torch.uint8).view(1623, 20, 28, 28)
        return {"images": images}, {"names": "\n".join(names)}

    monkeypatch.setattr(loader, "_decode", decode)

    def load():
        loader._load.cache_clear()
        return omniglot("val", data_root=data_root)

    images = load()
    (cached,) = fresh_cache.glob("*.safetensors")
    assert torch.equal(load(), images) and len(decoded) == 1
    damaged = bytearray(cached.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    cached.write_bytes(damaged)
    assert torch.equal(load(), images) and len(decoded) == 2  # noticed, and made anew
    assert cached.read_bytes() != bytes(damaged)
    loader._load.cache_clear()


def test_missing_folder_archive_or_file(tmp_path):
    with pytest.raises(ValueError, match=r"data_root '.*nowhere' is not a folder"):
        omniglot(data_root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no Omniglot in .*images_background.zip and images_evaluation.zip must lie"):
        omniglot(data_root=tmp_path)
    archive(tmp_path / ARCHIVES[0], 1)
    with pytest.raises(ValueError, match="images_evaluation.zip is missing"):
        omniglot(data_root=tmp_path)


def test_incomplete_archives_are_refused_by_name(tmp_path, fresh_cache):
    for name in ARCHIVES:
        archive(tmp_path / name, 2)
    with pytest.raises(
        ValueError, match=r"images_background.zip and .* are not complete: 2 characters, should be 1623"
    ):
        omniglot(data_root=tmp_path)


def test_damaged_archive_is_refused_by_name(tmp_path, fresh_cache, data_root):
    for name in ARCHIVES:
        shutil.copy(data_root / "omniglot" / name, tmp_path / name)
    whole = (tmp_path / ARCHIVES[1]).read_bytes()
    (tmp_path / ARCHIVES[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="images_evaluation.zip is damaged"):
        omniglot(data_root=tmp_path)


def test_environment_names_the_folder(monkeypatch, data_root):
    monkeypatch.setenv("FASTMETA_DATA", str(data_root))
    assert len(omniglot("val")) == 172
    assert loader.is_local()


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(6, 1, "is encrypted"), (8, 97, "is compressed by method 97"), (22, 0x7FFFFFFF, "would be 2,147,483,647 bytes")],
)
def test_harmful_archives_end_in_one_line(tmp_path, fresh_cache, at, value, text):
    for name in ARCHIVES:
        archive(tmp_path / name, 1, 1)
    data = bytearray((tmp_path / ARCHIVES[1]).read_bytes())
    central, size = data.index(b"PK\x01\x02"), 4 if at == 22 else 2
    for place in (at, central + at + 2):  # of a member's two headers
        data[place : place + size] = value.to_bytes(size, "little")
    (tmp_path / ARCHIVES[1]).write_bytes(data)
    with pytest.raises(ValueError, match=f"{ARCHIVES[1]}: member .* {text}") as told:
        omniglot(data_root=tmp_path)
    assert "\n" not in str(told.value) and not list(fresh_cache.glob("*"))
