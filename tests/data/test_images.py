"""Image folders, the crop rule, and every kind of image that Pillow hands over."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.images import ImageDataset, ImageFolder, center_crop, load_image


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    "size",
    [(7, 7), (7, 5), (16, 16), (17, 16), (31, 33), (32, 64), (63, 200), (500, 37), (129, 65)],
)
def test_crop_is_square_for_any_size(size):
    assert center_crop(noise(*size), 16).size == (16, 16)


def test_crop_of_exact_size_changes_nothing():
    image = noise(16, 16)
    assert np.array_equal(center_crop(image, 16), image)


def test_crop_takes_the_middle():
    image = noise(21, 16)
    assert np.array_equal(center_crop(image, 16), np.asarray(image)[:, 2:18])
    image = noise(16, 19)
    assert np.array_equal(center_crop(image, 16), np.asarray(image)[1:17])


def test_small_image_is_enlarged_bicubically():
    image = noise(8, 8)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, 16), expected)


def test_image_below_twice_the_size_is_resized_at_once():
    image = noise(31, 31)
    expected = image.resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(center_crop(image, 16), expected)


def test_large_image_is_halved_by_box_average():
    pixels = np.asarray(noise(64, 64)).astype(np.float64)
    expected = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    got = np.asarray(center_crop(noise(64, 64), 16)).astype(np.float64)
    # Two halvings of two passes each, and every pass rounds to whole grey levels.
    assert np.abs(got - expected).max() <= 2.0


def test_halving_drops_odd_pixels_before_the_bicubic_step():
    image = noise(65, 71)
    halved = image.resize((32, 35), Image.Resampling.BOX).resize((16, 17), Image.Resampling.BOX)
    assert np.array_equal(center_crop(image, 16), np.asarray(halved)[:16])


def save(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return load_image(path, image.width)


def test_load_gives_rgb_channels_first(tmp_path):
    image = noise(6, 6)
    loaded = save(tmp_path, image)
    assert loaded.dtype == torch.uint8
    assert np.array_equal(loaded.permute(1, 2, 0), image)


def test_grey_palette_and_bilevel(tmp_path):
    grey = noise(6, 6).convert("L")
    expected = torch.from_numpy(np.array(grey)).expand(3, 6, 6)
    assert torch.equal(save(tmp_path, grey), expected)
    palette = noise(6, 6).convert("P")
    assert np.array_equal(save(tmp_path, palette).permute(1, 2, 0), palette.convert("RGB"))
    assert set(save(tmp_path, grey.convert("1")).unique().tolist()) <= {0, 255}


def test_sixteen_bit_keeps_the_high_byte(tmp_path):
    values = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    loaded = save(tmp_path, Image.fromarray(values))
    assert np.array_equal(loaded[1].numpy(), values // 256)


def test_cmyk(tmp_path):
    loaded = save(tmp_path, Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "x.tif")
    assert loaded[0].min() > 200
    assert loaded[1:].max() < 60


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_white(tmp_path, mode):
    color = (9,) * (len(mode) - 1)
    image = Image.new(mode, (6, 6), (*color, 0))
    image.putpixel((0, 0), (*color, 255))
    loaded = save(tmp_path, image)
    assert loaded[:, 0, 0].tolist() == [9, 9, 9]
    assert loaded[:, 1:].min() == 255


def test_transparent_palette_colour_shows_white(tmp_path):
    image = Image.new("P", (6, 6), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    loaded = save(tmp_path, image, transparency=0)
    assert loaded[:, 0, 0].tolist() == [200, 100, 50]
    assert loaded[:, 1:].min() == 255


@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
def test_unreadable_image_is_named(tmp_path, damage):
    path = tmp_path / "bad.jpg"
    noise(64, 64).save(path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"no image")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        load_image(path, 16)


def test_folder_is_sorted_recursive_and_ignores_other_files(tmp_path):
    for place in ("b/2.PNG", "b/1.png", "a/deep/er/x.JPeG", "a/y.webp", "b/notes.txt", "b/._1.png"):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.md").write_text("")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ["a", "b"]
    names = [path.removeprefix(f"{tmp_path}/") for path in folder.paths]
    assert names == ["a/deep/er/x.JPeG", "a/y.webp", "b/1.png", "b/2.PNG"]
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert folder.labels.dtype == np.int64


def test_no_folder_is_entered_twice_in_a_class(tmp_path, caplog):
    for place in ("a/1.png", "a/deep/2.png", "b/3.png"):
        path = tmp_path / "root" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    root = tmp_path / "root"
    (root / "a" / "deep" / "up").symlink_to(root / "a")  # around and around
    (root / "a" / "deep" / "top").symlink_to(tmp_path)
    (root / "a" / "again").symlink_to(root / "a" / "deep")
    (root / "a" / "itself").symlink_to(root / "a" / "itself")
    (root / "everything").symlink_to(root)
    (root / "c").symlink_to(root / "b")  # another class of the same images
    folder = ImageFolder(root)
    assert folder.class_names == ["a", "b", "c"]
    names = [path.removeprefix(f"{root}/") for path in folder.paths]
    assert len(names) == 4
    assert names[0] == "a/1.png"
    assert names[1] in ("a/again/2.png", "a/deep/2.png")
    assert names[2:] == ["b/3.png", "c/3.png"]
    (warning,) = caplog.records
    assert "4 link(s) lead to folders that are there already, first" in warning.getMessage()


def test_images_beside_the_class_folders_are_named(tmp_path, caplog):
    for place in ("a/1.png", "x.png", "w.jpg", "notes.txt"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    folder = ImageFolder(tmp_path)
    assert (folder.class_names, len(folder)) == (["a"], 1)
    (warning,) = caplog.records
    assert f"2 image(s) lie beside the class folders, first {tmp_path}/w.jpg" in warning.message
    caplog.clear()
    (tmp_path / "a" / "1.png").unlink()
    (tmp_path / "a").rmdir()
    assert ImageFolder(tmp_path).class_names == ["all"]
    assert not caplog.records


def test_folder_errors_name_the_place(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        ImageFolder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        ImageFolder(tmp_path)


def test_dataset_gives_image_label_and_index(image_root):
    folder = ImageFolder(image_root)
    image, label, index = ImageDataset(folder, 16)[20]
    assert (label, index) == (2, 20)
    assert image.shape == (3, 16, 16)
    expected = load_image(folder.paths[20], 16).double() / 127.5 - 1
    assert torch.allclose(image.double(), expected, atol=1e-6)
    assert -1 <= image.min() < image.max() <= 1
