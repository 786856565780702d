"""How long the hot paths take: small inputs, random weights, one line of the table per path. See doc/performance.md."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from segment_anything import SamPredictor
from skimage.draw import disk

from micro_sam.core.labels import apply_nms, get_centers_and_bounding_boxes, mask_data_to_segmentation
from micro_sam.core.progress import drain
from micro_sam.embeddings.encode import precompute_image_embeddings
from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import DecoderAdapter, get_unetr
from micro_sam.models.mask_decoder import predict_low_res
from micro_sam.segmentation.amg import AutomaticMaskGenerator
from micro_sam.segmentation.watershed import watershed_from_center_and_boundary_distances
from micro_sam.tracking.motile_linker import MotileLinker
from micro_sam.tracking.workflow import tracking_steps
from micro_sam.volume.merge import merge_instance_segmentation_3d

SIDE = 256


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    predictor = SamPredictor(build_sam("vit_t", image_size=SIDE).requires_grad_(False))
    predictor.model_type, predictor.model_name, predictor._hash = "vit_t", "random", f"xxh128:{0:032}"
    return predictor


@pytest.fixture(scope="module")
def image(rng):
    values = gaussian_filter(rng.standard_normal((SIDE, SIDE)), 4)
    return ((values - values.min()) / np.ptp(values) * 255).astype("uint8")


@pytest.fixture(scope="module")
def embeddings(predictor, image):
    return precompute_image_embeddings(predictor, image, ndim=2, verbose=False)


@pytest.fixture(scope="module")
def masks():
    rng, masks = np.random.default_rng(1), []
    for _ in range(60):
        mask = np.zeros((SIDE, SIDE), dtype=bool)
        mask[disk(rng.integers(20, SIDE - 20, 2), rng.integers(8, 20), shape=mask.shape)] = True
        masks.append(mask)
    return masks


@pytest.fixture(scope="module")
def slices(masks):
    """Discs that stay where they are, with other ids in each slice."""
    labels = np.zeros((6, SIDE, SIDE), dtype="uint32")
    for z, plane in enumerate(labels):
        for i, mask in enumerate(masks, 1):
            plane[mask] = z * len(masks) + i
    return labels


@pytest.mark.parametrize("kind", ["window", "global"])
def test_encoder_block(benchmark, kind):
    torch.manual_seed(0)
    block = build_sam("vit_b", image_size=SIDE).image_encoder.blocks[{"window": 0, "global": 2}[kind]]
    x = torch.randn(1, SIDE // 16, SIDE // 16, 768)
    with torch.no_grad():
        benchmark(block, x)


def test_tiny_encoder(benchmark, predictor):
    with torch.no_grad():
        benchmark(predictor.model.image_encoder, torch.randn(1, 3, SIDE, SIDE))


def test_instance_decoder(benchmark, predictor):
    torch.manual_seed(0)
    decoder = DecoderAdapter(get_unetr(predictor.model.image_encoder, device="cpu", initial_features=32))
    benchmark(decoder, torch.randn(1, 256, SIDE // 16, SIDE // 16), (SIDE, SIDE), (SIDE, SIDE))


def test_mask_decoder(benchmark, predictor, embeddings, rng):
    points = torch.from_numpy(rng.uniform(0, SIDE, (32, 1, 2)).astype("float32"))
    benchmark(predict_low_res, predictor, points, torch.ones(32, 1))


def test_amg_initialize(benchmark, predictor, image, embeddings):
    generator = AutomaticMaskGenerator(predictor, points_per_side=4)
    benchmark(generator.initialize, image, image_embeddings=embeddings)


def test_amg_generate(benchmark, predictor, image, embeddings):
    def prepare():
        generator = AutomaticMaskGenerator(predictor, points_per_side=4)
        generator.initialize(image, image_embeddings=embeddings)
        return (generator,), {}

    benchmark.pedantic(lambda g: g.generate(pred_iou_thresh=-10, stability_score_thresh=0), setup=prepare, rounds=5)


def test_watershed(benchmark, image):
    maps = image.astype("float32") / 255
    benchmark(watershed_from_center_and_boundary_distances, maps, maps, 1 - maps, foreground_smoothing=1.0)


def test_nms(benchmark, masks):
    records = [
        {"segmentation": m, "predicted_iou": 0.5 + i % 50 / 100, "stability_score": 0.9} for i, m in enumerate(masks)
    ]
    benchmark(apply_nms, records, min_size=10, nms_thresh=0.7)


def test_masks_to_labels(benchmark, masks):
    records = [{"segmentation": m, "area": int(m.sum())} for m in masks]
    benchmark(mask_data_to_segmentation, records, min_object_size=20)


def test_centers_and_boxes(benchmark, slices):
    benchmark(get_centers_and_bounding_boxes, slices[0])


def test_merge_slices(benchmark, slices):
    benchmark(merge_instance_segmentation_3d, slices, verbose=False)


def test_tracking(benchmark, slices):
    benchmark.pedantic(lambda: drain(tracking_steps(slices, slices, MotileLinker())), rounds=3)


def test_cache_of_embeddings(benchmark, predictor, image, tmp_path):
    stack = np.stack([image, image[::-1]])
    precompute_image_embeddings(predictor, stack, tmp_path / "e.zarr", ndim=3, verbose=False)
    embeddings = benchmark(precompute_image_embeddings, predictor, stack, tmp_path / "e.zarr", ndim=3, verbose=False)
    assert embeddings["features"].shape[0] == 2
