"""The report on training data before a training, and the estimates of its costs."""

import itertools
import json

import imageio.v3 as imageio
import numpy as np
import pytest

from micro_sam.core.errors import InvalidInputError, UnknownModelError
from micro_sam.core.progress import Step
from micro_sam.training.costs import computes_twice, estimate_costs, measure_speed
from micro_sam.training.preflight import preflight, preflight_steps

MACHINE = {"gflop_per_second": 100.0, "available_bytes": 64e9, "device": "cpu", "verbose": False}


@pytest.fixture
def files(tmp_path, cells_image, cells_labels):
    """Six pairs of different images of cells, as lists of paths."""
    raw, labels = [], []
    for n in range(6):
        raw.append(str(tmp_path / f"cell{n}.tif"))
        labels.append(str(tmp_path / f"cell{n}_labels.tif"))
        imageio.imwrite(raw[-1], np.roll(cells_image, n, axis=0))
        imageio.imwrite(labels[-1], np.roll(cells_labels, n, axis=0))
    return raw, labels


def _report(raw, labels, **options):
    return preflight(raw, None, labels, None, **(MACHINE | options))


def test_report_on_good_data(files, cells_image, cells_labels):
    raw, labels = files
    report = _report(raw[:4], labels[:4], val_raw_paths=raw[4:], val_label_paths=labels[4:])
    assert report.ok, report.problems
    report.raise_if_not_ok()
    assert (report.count("train"), report.count("val")) == (4, 2)
    first = report.pairs[0]
    assert (first.shape, first.dtype, first.label_dtype, first.n_channels) == ((128, 160), "uint8", "uint16", 1)
    assert (first.minimum, first.maximum) == (cells_image.min(), cells_image.max())
    _, sizes = np.unique(cells_labels[cells_labels > 0], return_counts=True)
    assert first.n_objects == (sizes >= 25).sum()
    assert first.n_small == (sizes < 25).sum()
    assert np.allclose(sorted(first.diameters), sorted(2 * np.sqrt(sizes[sizes >= 25] / np.pi)), atol=0.01)
    everything = np.concatenate([p.diameters for p in report.pairs])
    assert report.diameters == pytest.approx(np.percentile(everything, [5, 50, 95]), abs=0.1)
    text = report.summary()
    for part in ("4 images (128 x 160, uint8 grey", "Validation: 2 images", f"{report.n_objects('val')} objects",
                 "Patches: 256 x 256", "per epoch of 100 iterations"):
        assert part in text
    content = json.loads(report.to_json())
    assert content["ok"] is True
    assert content["pairs"][0]["n_objects"] == first.n_objects


def test_each_problem_is_named(tmp_path, files, cells_image, cells_labels, rgb_image):
    raw, labels = files
    bad = {
        "shape": (cells_image[:100], cells_labels, "must agree in Z, Y and X"),
        "swapped": (cells_labels, cells_image, "interchanged"),
        "fractions": (cells_image, cells_labels.astype("float32") / 3, "fractions"),
        "nan": (np.where(cells_image > 100, np.nan, cells_image.astype("float32")), cells_labels, "NaN"),
        "colour": (cells_image, rgb_image, "colour picture"),
    }
    for name, (image, label, _) in bad.items():
        raw.append(str(tmp_path / f"{name}.tif"))
        labels.append(str(tmp_path / f"{name}_labels.tif"))
        imageio.imwrite(raw[-1], image)
        imageio.imwrite(labels[-1], label)
    raw += [str(tmp_path / "gone.tif"), str(tmp_path / "broken.tif")]
    labels += labels[:2]
    (tmp_path / "broken.tif").write_bytes(b"II*\0 no image")
    expected = {**{name: message for name, (*_, message) in bad.items()}, "gone": "no file", "broken": "holds no image"}
    report = _report(raw, labels)
    assert not report.ok
    for name, message in expected.items():
        (found,) = [p.problems for p in report.pairs if f"/{name}.tif" in p.name]
        assert any(message in problem for problem in found), (name, found)
    assert all(not p.problems for p in report.pairs[:6])
    assert len(report.problems) == len(expected)
    assert report.seconds_per_epoch is None
    assert "interchanged" in report.summary()
    with pytest.raises(InvalidInputError, match="The training data have problems"):
        report.raise_if_not_ok()


def test_images_without_objects(files, cells_image, cells_labels):
    empty, dots = np.zeros_like(cells_labels), np.zeros_like(cells_labels)
    dots[::8, ::8] = 3
    report = _report([cells_image] * 3, [cells_labels, empty, dots])
    assert report.ok
    assert [w for w in report.pairs[1].warnings if "no object to learn from" in w]
    assert "320 objects have fewer than min_size=25" in report.pairs[2].warnings[0]
    assert report.pairs[2].n_small == 320
    report = _report([cells_image], [cells_labels], val_raw_paths=[cells_image.T], val_label_paths=[empty.T])
    assert report.problems == ("None of the 1 images for validation has an object.",)
    report = _report([cells_image], [(cells_labels > 0).astype("uint8")])
    assert "have one id" in report.pairs[0].warnings[0]


def test_images_in_both_splits(tmp_path, files, cells_image):
    raw, labels = files
    copy = str(tmp_path / "copy.png")
    imageio.imwrite(copy, cells_image)  # the pixels of the first file, in another format
    report = _report(raw, labels, val_raw_paths=[copy], val_label_paths=labels[:1])
    (problem,) = report.problems
    assert raw[0] in problem
    assert copy in problem
    report = _report([*raw, copy], [*labels, labels[0]])
    assert report.ok
    assert any("are equal" in w and copy in w for w in report.warnings)


def test_partners_are_checked(tmp_path, files):
    raw, labels = files
    report = _report(raw, labels[:-1])
    assert report.problems[0].startswith("The training data: There are 6 images, but 5 labels")
    for n in range(3):
        (tmp_path / "labels").mkdir(exist_ok=True)
        imageio.imwrite(tmp_path / "labels" / f"cell{n}.tif", imageio.imread(labels[n]))
    turned = [str(tmp_path / "labels" / f"cell{n}.tif") for n in (1, 2, 0)]
    assert any("labels with its own name" in w for w in _report(raw[:3], turned).warnings)
    assert not _report(raw[:3], sorted(turned)).warnings


def test_folder_is_reported_file_by_file(tmp_path, files):
    report = preflight(
        str(tmp_path), "cell?.tif", str(tmp_path), "cell?_labels.tif", rois=np.s_[:4, 10:90], **MACHINE
    )
    assert [(p.split, p.shape) for p in report.pairs] == [("train", (80, 160))] * 4


def test_contrast_and_range(cells_image, cells_labels):
    dark = cells_image // 8
    assert "normalize_image" in _report([dark], [cells_labels]).warnings[0]
    assert not _report([dark], [cells_labels], raw_transform=lambda x: x).warnings
    assert not _report([dark.astype("uint16") * 300], [cells_labels]).warnings
    constant = _report([np.full_like(cells_image, 7)], [cells_labels])
    assert any("All pixels of the image have the value 7" in w for w in constant.warnings)


@pytest.mark.parametrize(("diameter", "side", "expected"), [
    (20, 1200, 256), (60, 1200, 480), (60, 300, 320), (200, 2000, 1024),
])
def test_suggested_patch_shape(diameter, side, expected):
    labels = np.zeros((side, side), int)
    yx = np.mgrid[:side, :side]
    centers = range(diameter, side - diameter, diameter * 2)
    for n, (y, x) in enumerate(itertools.product(centers, centers), 1):
        r = diameter // 2 + 1
        box = (slice(y - r, y + r + 1), slice(x - r, x + r + 1))
        labels[box][np.hypot(yx[0][box] - y, yx[1][box] - x) <= diameter / 2] = n
    report = _report([np.indices((side, side)).sum(axis=0).astype("uint16")], [labels], patch_shape=(32, 32))
    assert report.suggested_patch_shape == (expected, expected)
    assert report.patch_shape == (32, 32)
    assert ("do not fit into patches" in str(report.warnings)) == (diameter > 32)


def test_costs_follow_the_counted_operations():
    # 972 encoder + 750 prompts + 822 decoder, and a backward pass of twice that
    costs = estimate_costs("vit_b_lm", 1, 25, 8)
    assert costs.training_gflop == pytest.approx(3 * (972 + 25 * 8 * 3.7 + 822))
    assert costs.training_gflop == pytest.approx(10500 - 3 * 972, rel=0.02)  # published, without the second encoding
    only = estimate_costs("vit_t", 1, train_instance_segmentation_only=True)
    assert only.forward_gflop == 78 + 822
    assert estimate_costs("vit_b", 2, 25, 8).memory_bytes == estimate_costs("vit_b", 2, 25, 1).memory_bytes
    small = estimate_costs("vit_t", 1, 5, 4, image_size=512, decoder_features=16)
    assert small.forward_gflop == pytest.approx((78 + 20 * 3.7 + 822 / 16) / 4)
    assert estimate_costs("vit_b", 2, 10).memory_bytes < estimate_costs("vit_b", 2, 25).memory_bytes
    plain, twice = (estimate_costs("vit_b", 1, 5, 4, checkpoint_encoder=twice) for twice in (False, True))
    assert twice.training_gflop - plain.training_gflop == 972 + 822  # prompts are not computed again
    # Measured: 5.4 GB less, in a ViT-B with one image.
    assert plain.memory_bytes - twice.memory_bytes == pytest.approx(5.4e9, rel=0.05)
    with pytest.raises(UnknownModelError, match="vit_x"):
        estimate_costs("vit_x")
    choices = [(None, "vit_b_lm", "cpu"), (None, "vit_t_lite", "cpu"), (None, "vit_b", "cuda"),
               (False, "vit_b", "cpu"), (True, "vit_t", "cuda")]
    assert [computes_twice(*choice) for choice in choices] == [True, False, False, False, True]
    assert measure_speed("cpu") > 0.1


def test_time_and_memory_in_the_report(files):
    raw, labels = files
    options = {"batch_size": 2, "n_samples": 40, "model_type": "vit_t", "n_objects_per_batch": 5, "n_sub_iteration": 4}
    report = _report(raw, labels, val_raw_paths=raw[:1], val_label_paths=labels[:1], **options)
    costs = estimate_costs("vit_t", 2, 5, 4)
    assert report.seconds_per_iteration == pytest.approx(2 * costs.training_gflop / 100)
    assert report.n_batches == 20
    assert report.seconds_per_epoch == pytest.approx(
        20 * report.seconds_per_iteration + 5 * costs.forward_gflop / 100
    )
    assert report.memory_bytes == costs.memory_bytes
    small = _report(raw, labels, **(options | {"available_bytes": 1e9}))
    (warning,) = (w for w in small.warnings if "but 1 GB are free" in w)
    twice = _report(raw, labels, **(options | {"available_bytes": 1e9, "checkpoint_encoder": True}))
    assert f"With checkpoint_encoder it takes longer and needs about {twice.memory_bytes / 1e9:.0f} GB." in warning
    (warning,) = (w for w in twice.warnings if "but 1 GB are free" in w)
    assert "checkpoint_encoder" not in warning
    assert twice.seconds_per_iteration > report.seconds_per_iteration


def test_progress_and_cancelling(files):
    raw, labels = files
    options = {name: value for name, value in MACHINE.items() if name != "verbose"}
    steps = list(preflight_steps(raw, None, labels, None, **options))
    assert steps[:7] == [Step(n, 6, "Read training data") for n in range(7)]
    cancelled = preflight_steps(raw, None, labels, None, **options)
    next(cancelled)
    cancelled.close()
    with pytest.raises(TypeError, match="bath_size"):
        _report(raw, labels, bath_size=1)
