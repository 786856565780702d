"""Models compared object by object: the files, who leads where, the pictures, and the view in napari."""

import h5py
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from micro_sam.core.errors import (
    ImageReadError,
    InvalidInputError,
    MissingFileError,
    MissingPackageError,
    NoObjectsError,
    OutputExistsError,
)
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.evaluation import model_comparison as comparison
from micro_sam.evaluation.comparison_figures import SEGMENTATION, TRUTH, window_of
from micro_sam.evaluation.model_comparison import (
    ComparedObject,
    _enhance_image,
    _overlay_mask,
    _overlay_outline,
    generate_data_for_model_comparison,
    model_comparison,
    model_comparison_with_napari,
    rank_objects,
    read_sample,
)
from micro_sam.inference import batched_inference

IDS = (3, 8)


@pytest.fixture
def scene():
    """Objects 3 and 8; the loader gives them as floats, in a batch with an empty image."""
    labels = np.zeros((64, 96), dtype=np.int64)
    labels[10:30, 10:40], labels[40:60, 50:90] = IDS
    image = (labels > 0) * 180.0 + np.random.default_rng(0).integers(0, 40, labels.shape)
    return image.astype(np.float32), labels


@pytest.fixture
def loader(scene):
    image, labels = scene
    x = torch.from_numpy(np.stack([image, image]))[:, None]
    y = torch.from_numpy(np.stack([np.zeros_like(labels), labels]).astype(np.float32))[:, None]
    return [(x, y)]


@pytest.fixture
def generate(loader, tiny_predictor, monkeypatch, tmp_path):
    loaded = []

    def load(model_type, **kwargs):
        loaded.append((model_type, kwargs["checkpoint_path"]))
        return tiny_predictor

    monkeypatch.setattr(comparison, "get_sam_model", load)

    def run(n_samples=1, **options):
        generate_data_for_model_comparison(
            loader, tmp_path, "vit_t", "vit_b", n_samples, verbose=False, **options
        )
        return loaded
    return run


def write_sample(path, ious=((0.9, 0.5), (0.25, 0.75)), image=None):
    """A sample with squares of 16 pixels, of which the models found as many as the IoUs say."""
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=np.arange(40 * 85).reshape(40, 85) if image is None else image)
        file.attrs["model_names"] = ["one", "two"]
        for n, of_object in enumerate(ious):
            truth = np.zeros((40, 85), dtype=np.uint8)
            truth[10:20, 5 + 25 * n:25 + 25 * n] = 1
            group = file.create_group(str(n + 1))
            group.attrs["box"], group.attrs["point_coords"] = (10, 5 + 25 * n, 20, 25 + 25 * n), [[15, 15 + 25 * n]]
            group.attrs["point_labels"] = [1]
            group.create_dataset("gt_mask", data=truth)
            for prompt in ("points", "box"):
                for k, iou in enumerate(of_object, 1):
                    mask = np.zeros_like(truth)
                    mask[10:20, 5 + 25 * n:5 + 25 * n + int(20 * iou)] = 1
                    group.create_dataset(f"{prompt}/mask{k}", data=mask)
    return path


def test_files_hold_what_the_models_made_of_the_prompts(generate, scene, tiny_predictor, tmp_path):
    assert generate(checkpoint2="b.pt", model_names=["one", "two"]) == [("vit_t", None), ("vit_b", "b.pt")]
    image, labels = scene
    precompute_image_embeddings(tiny_predictor, image, ndim=2, verbose=False)
    with h5py.File(tmp_path / "sample_0.h5") as file:
        np.testing.assert_array_equal(file["image"], image)
        assert {*file} == {"image", "3", "8"}
        assert file["8"].attrs["box"].tolist() == [40, 50, 60, 90]
        (y, x), = file["3"].attrs["point_coords"]
        assert file["3"].attrs["point_labels"].tolist() == [1]
        assert labels[y, x] == 3, "the order is y, x"
        for id_, box, point in ((3, [10, 10, 40, 30], [x, y]), (8, [50, 40, 90, 60], None)):
            group = file[str(id_)]
            np.testing.assert_array_equal(group["gt_mask"][...] > 0, labels == id_)
            (record,) = batched_inference(
                tiny_predictor, None, 1, boxes=np.array([box]), return_instance_segmentation=False
            )
            for k in (1, 2):
                np.testing.assert_array_equal(group[f"box/mask{k}"][...] > 0, record["segmentation"].numpy())
            if point is not None:
                (record,) = batched_inference(
                    tiny_predictor, None, 1, points=np.array([[point]]), point_labels=np.array([[1]]),
                    multimasking=True, return_instance_segmentation=False,
                )
                np.testing.assert_array_equal(group["points/mask1"][...] > 0, record["segmentation"].numpy())
            assert group["box/mask1"].dtype == np.uint8
            assert group["box/mask1"].compression == "gzip"


def test_samples_are_kept_and_never_mixed(generate, tmp_path, tiny_predictor, monkeypatch):
    generate()
    before = (tmp_path / "sample_0.h5").stat().st_mtime_ns
    generate()
    assert (tmp_path / "sample_0.h5").stat().st_mtime_ns == before
    with pytest.raises(NoObjectsError, match="1 images with objects, but n_samples is 2"):
        generate(2)
    tiny_predictor._hash = "xxh128:" + "1" * 32
    with pytest.raises(OutputExistsError, match="other models"):
        generate()
    generate(overwrite=True)
    assert (tmp_path / "sample_0.h5").stat().st_mtime_ns != before
    with pytest.raises(InvalidInputError, match="belong to model_type3"):
        generate(checkpoint3="c.pt")


def test_names_of_models():
    names = comparison._default_names
    assert names([("vit_b", None, None), ("vit_b_lm", None, None)]) == ["vit_b", "vit_b_lm"]
    assert names([("vit_b", "a/best.pt", None), ("vit_b", "b/best.pt", None)]) == ["a/best", "b/best"]
    assert names([("vit_b", None, None), ("vit_b", None, None)]) == ["vit_b (1)", "vit_b (2)"]


def test_objects_are_ranked_by_the_lead_of_a_model(tmp_path):
    objects = read_sample(write_sample(tmp_path / "sample_0.h5", [(0.9, 0.5), (0.25, 0.75), (0.5, 0.5)])).objects
    assert [item.ious["box"] for item in objects] == [
        pytest.approx([0.9, 0.5]), pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5]),
    ]
    assert [item.id for item in rank_objects(objects, "box", 1)] == [1]
    assert [item.id for item in rank_objects(objects, "points", 2)] == [2]
    assert rank_objects(objects, "box", 1, min_size=201) == []


def test_pictures_are_written_where_they_belong(tmp_path):
    write_sample(tmp_path / "sample_0.h5")
    write_sample(tmp_path / "sample_10.h5", [(0.9, 0.8)])
    model_comparison(tmp_path, 3, 10, tmp_path / "plots", have_model3=False)
    found = sorted(str(path.relative_to(tmp_path / "plots")) for path in (tmp_path / "plots").rglob("*.*"))
    assert found == [
        f"{prompt}/advantage{k}/{name}.svg" for prompt in ("box", "points") for k, name in
        ((1, "sample_0_0"), (1, "sample_10_0"), (2, "sample_0_0"))
    ]
    text = (tmp_path / "plots/box/advantage1/sample_0_0.svg").read_text()
    assert "<svg" in text
    with pytest.raises(InvalidInputError, match="made with 2 models, but have_model3"):
        model_comparison(tmp_path, 1, 10, tmp_path / "plots", have_model3=True)
    with pytest.raises(MissingFileError, match="no sample_0.h5"):
        model_comparison(tmp_path / "plots", 1, 10)
    (tmp_path / "sample_1.h5").write_bytes(b"damaged")
    with pytest.raises(ImageReadError, match=r"sample_1.h5 cannot be read.*Delete it"):
        model_comparison(tmp_path, 1, 10, tmp_path / "plots")


def test_pictures_on_screen(tmp_path, monkeypatch):
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(plt.get_fignums())))
    write_sample(tmp_path / "sample_0.h5", image=np.zeros((40, 85, 3), dtype=np.uint8))
    model_comparison(tmp_path, 1, 10)
    assert shown == [4], "one lead of each model, from points and from boxes"


def test_window_is_a_square_that_shows_the_object_and_its_masks():
    truth, mask = np.zeros((100, 200), dtype=bool), np.zeros((100, 200), dtype=bool)
    truth[2:12, 0:10] = True
    mask[2:12, 0:18] = True
    item = ComparedObject(
        1, (2, 0, 12, 10), np.zeros((1, 2)), np.ones(1), truth, {"box": [truth, mask]}, {"box": [1.0, 0.5]}
    )
    y, x = window_of(item, "box")
    assert y.stop - y.start == x.stop - x.start
    assert y.start == x.start == 0
    assert x.stop >= 18


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float32"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 3)])
def test_enhanced_images(dtype, shape):
    """Weakness 03-44: integers failed, and floats were changed in place."""
    image = np.random.default_rng(0).integers(0, 60, shape).astype(dtype)
    image[:32] = image[:32] // 4
    before = image.copy()
    for do_norm in (True, False):
        enhanced = _enhance_image(image, do_norm=do_norm)
        np.testing.assert_array_equal(image, before)
        assert enhanced.shape == shape
        assert enhanced.dtype == np.uint8
        assert enhanced.max() > 200
    # The dark half has gained contrast.
    assert enhanced[:32].std() / enhanced[32:].std() > before[:32].std() / before[32:].std()


def test_images_without_contrast_or_shape():
    assert not _enhance_image(np.zeros((8, 8))).any()
    with pytest.raises(InvalidInputError, match=r"\(Y, X\) or \(Y, X, 3\), but has \(8,\)"):
        _enhance_image(np.zeros(8))


def test_overlays():
    image = np.full((9, 9, 3), 100, dtype=np.uint8)
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    outlined = _overlay_outline(image, mask)
    ring = mask.copy()
    ring[3:6, 3:6] = False
    np.testing.assert_array_equal((outlined != 100).any(axis=-1), ring)
    np.testing.assert_array_equal(outlined[2, 2], np.round(255 * np.array(to_rgb(TRUTH))))
    assert (_overlay_outline(image, mask, 1) != 100).any(axis=-1).sum() > ring.sum()
    tinted = _overlay_mask(image, mask, alpha=0.5)
    np.testing.assert_allclose(tinted[4, 4], 50 + 127.5 * np.array(to_rgb(SEGMENTATION)), atol=0.51)
    assert (tinted[~mask] == 100).all()
    assert (image == 100).all(), "the input is not changed"


def test_without_napari(tmp_path, monkeypatch):
    write_sample(tmp_path / "sample_0.h5")

    def missing(name):
        raise ModuleNotFoundError("no napari", name="napari")

    monkeypatch.setattr(comparison.importlib, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"napari is not installed: pip install \"micro_sam\[gui\]\""):
        model_comparison_with_napari(tmp_path)


@pytest.mark.gui
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_view_in_napari(tmp_path):
    """Weakness 03-44: the image was looked for in the wrong group, and options of the viewer were outdated."""
    napari = pytest.importorskip("napari")
    from micro_sam.sam_annotator.comparison_view import show_comparison

    paths = [write_sample(tmp_path / "sample_0.h5"), write_sample(tmp_path / "sample_1.h5", [(0.9, 0.8)])]
    viewer = napari.Viewer(show=True)
    try:
        view = show_comparison(paths, "points", viewer)
        layers = viewer.layers
        assert np.unique(layers["one"].data).tolist() == [0, 1, 2]
        assert len(layers["points"].data) == 4, "two objects in two panels"
        assert len(layers["boxes"].data) == 0
        assert view.table.item(0, 0).text() == "1", "the largest lead of the first model comes first"
        assert view.table.item(0, 3).text() == "0.40"
        view.table.selectRow(1)
        assert view.chosen.id == 2
        assert np.unique(layers["two"].data).tolist() == [0, 2]
        assert layers["two"].data.shape == layers["image (two)"].data.shape != (40, 85), "cut out around the object"
        assert layers["two"].translate[1] > layers["one"].translate[1] + layers["one"].data.shape[1]
        point = layers["points"].data[1] - layers["two"].translate
        assert layers["ground truth (two)"].data[tuple(point.astype(int))] == 2, "prompts lie on their objects"
        view._prompts.setCurrentIndex(1)
        assert view.chosen is None
        assert len(layers["boxes"].data) == 4
        view._samples.setCurrentIndex(1)
        assert np.unique(viewer.layers["ground truth (one)"].data).tolist() == [0, 1]
    finally:
        viewer.close()
