"""Prompts that are drawn as maps: against a drawing pixel by pixel, and the network against SAM's own code."""

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from micro_sam.bioimageio.onnx_graphs import MaskDecoderOptions, mask_decoder_graph
from micro_sam.models import adapters
from micro_sam.models.build_sam import build_sam
from micro_sam.models.loading import get_sam_model
from micro_sam.models.mask_decoder import predict_low_res
from micro_sam.models.prompt_maps import draw_prompts
from micro_sam.training.trainable_sam import TrainableSAM

SIZE = 96


@pytest.fixture
def sam():
    """With random weights, also where they start at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sam = build_sam("vit_t", image_size=SIZE, prompt_maps=True)
        torch.nn.init.normal_(sam.prompt_encoder.prompt_maps[-1].weight, std=0.3)
    return sam.requires_grad_(False)


@pytest.fixture
def predictor(sam):
    predictor = SamPredictor(sam)
    predictor.set_image(np.random.default_rng(0).integers(0, 255, (60, SIZE, 3), dtype="uint8"))
    return predictor


def prompts(n):
    """Points (N, 3, 2) with labels, boxes and masks."""
    rng = np.random.default_rng(n)
    corners = np.sort(rng.uniform(0, 60, (n, 2, 2)), axis=1).reshape(n, 4)
    points, labels = rng.uniform(0, 60, (n, 3, 2)), rng.integers(-1, 2, (n, 3))
    masks = rng.normal(size=(n, 1, SIZE // 4, SIZE // 4))
    return [torch.tensor(values, dtype=torch.float32) for values in (points, labels, corners, masks)]


def draw_slowly(coords, labels, shape, cell):
    """The definition, one grid cell and one prompt at a time."""
    maps = np.zeros((6, *shape))
    box = [c for c, label in zip(coords, labels) if label >= 2]
    for i, j in np.ndindex(*shape):
        x, y = (j + 0.5) * cell[1], (i + 0.5) * cell[0]
        for (px, py), label in zip(coords, labels):
            for k, width in enumerate((8, 32)):
                if label in (0, 1):
                    value = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * width**2))
                    row = k if label == 1 else 2 + k
                    maps[row, i, j] = max(maps[row, i, j], value)
        if box:
            (x0, y0), (x1, y1) = box
            # Finely sampled instead of computed from the sides.
            steps = (np.arange(200) + 0.5) / 200
            inside_x = (x0 <= (j + steps) * cell[1]) & ((j + steps) * cell[1] < x1)
            inside_y = (y0 <= (i + steps) * cell[0]) & ((i + steps) * cell[0] < y1)
            maps[4, i, j] = inside_x.mean() * inside_y.mean()
            u, v = (2 * x - x0 - x1) / max(x1 - x0, 1), (2 * y - y0 - y1) / max(y1 - y0, 1)
            maps[5, i, j] = max(1 - u**2 - v**2, -1)
    return maps


def test_drawing_equals_its_definition():
    coords = torch.tensor([
        [[10.0, 3.5], [30.2, 17.0], [5.0, 5.0], [0.0, 0.0]],
        [[3.3, 2.5], [21.0, 14.1], [8.0, 8.0], [28.0, 2.0]],
        [[7.0, 7.0], [7.0, 7.0], [0.0, 0.0], [0.0, 0.0]],  # a box without area
    ])
    labels = torch.tensor([[1.0, 1.0, 0.0, -1.0], [2.0, 3.0, 1.0, 0.0], [2.0, 3.0, -1.0, -1.0]])
    found = draw_prompts(coords, labels, (5, 8), (20, 32)).numpy()
    for maps, points, kinds in zip(found, coords.numpy(), labels.numpy()):
        np.testing.assert_allclose(maps, draw_slowly(points, kinds, (5, 8), (4, 4)), atol=6e-3)
    assert found[1, 4].sum() * 16 == pytest.approx((21.0 - 3.3) * (14.1 - 2.5), rel=1e-5)
    assert not found[0, 4:].any()
    assert not found[2, :5].any()


def test_maps_start_without_effect():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = build_sam("vit_t", image_size=SIZE).prompt_encoder
        drawn = build_sam("vit_t", image_size=SIZE, prompt_maps=True).prompt_encoder
    drawn.load_state_dict(plain.state_dict(), strict=False)
    points, labels, boxes, masks = prompts(3)
    for given in (((points, labels), None, None), (None, boxes, None), ((points, labels), boxes, masks),
                  (None, None, masks), (None, None, None)):
        for found, expected in zip(drawn(*given), plain(*given)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["points", "boxes", "both", "masks"])
def test_all_decoders_agree_with_segment_anything(sam, predictor, kind):
    n = 11  # more than are computed together
    points, labels, boxes, masks = prompts(n)
    if kind == "boxes":
        points = labels = None
    if kind == "points":
        boxes = None
    if kind != "masks":
        masks = None
    with torch.no_grad():
        _, ious, logits = predictor.predict_torch(points, labels, boxes, masks, multimask_output=True)
        found, found_ious = predict_low_res(predictor, points, labels, boxes, True, masks)
        record = {"input_size": predictor.input_size, "original_size": predictor.original_size}
        record |= {"point_coords": points, "point_labels": labels} if points is not None else {}
        record |= {"boxes": boxes} if boxes is not None else {}
        record |= {"mask_inputs": masks} if masks is not None else {}
        trained = TrainableSAM(sam)([record], predictor.features, multimask_output=True)[0]
    scale = float(logits.abs().max())
    for low_res, rated in ((found, found_ious), (trained["low_res_masks"], trained["iou_predictions"])):
        torch.testing.assert_close(low_res, logits, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(rated, ious, rtol=0, atol=1e-4)
    # The maps matter, for each object by itself.
    sam.prompt_encoder.prompt_maps[-1].weight.zero_()
    without, _ = predict_low_res(predictor, points, labels, boxes, True, masks)
    assert ((without - found).abs().amax((1, 2, 3)) > 1e-2 * scale).all()


def test_exported_graph_draws_as_well(sam, predictor):
    """Its interface has corners of boxes as points, and always a mask."""
    points, labels, boxes, masks = prompts(5)
    graph = mask_decoder_graph(sam, MaskDecoderOptions(return_single_mask=False)).module
    corners = torch.cat([points, boxes.reshape(-1, 2, 2)], 1)
    kinds = torch.cat([labels, torch.tensor([[2.0, 3.0]]).expand(5, -1)], 1)
    with torch.no_grad():
        _, _, low_res = graph(predictor.features, corners, kinds, masks, torch.ones(1), torch.tensor([60.0, SIZE]))
        for multimask, part in ((True, slice(1, None)), (False, slice(1))):
            expected, _ = predict_low_res(predictor, points, labels, boxes, multimask, masks)
            torch.testing.assert_close(low_res[:, part], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_files_tell_that_there_are_maps(sam, predictor, tmp_path):
    points, labels, boxes, _ = prompts(2)
    expected, _ = predict_low_res(predictor, points, labels, boxes)
    torch.save(sam.state_dict(), tmp_path / "sam.pt")
    for flexible in (False, True):
        loaded = get_sam_model("vit_t", "cpu", tmp_path / "sam.pt", flexible_load_checkpoint=flexible,
                               image_size=SIZE)
        loaded.features, loaded.is_image_set = predictor.features, True
        torch.testing.assert_close(predict_low_res(loaded, points, labels, boxes)[0], expected, rtol=0, atol=0)

    # Adapters keep only what they add to a model with maps.
    base = get_sam_model("vit_t", "cpu", tmp_path / "sam.pt", image_size=SIZE)
    adapted = get_sam_model("vit_t", "cpu", tmp_path / "sam.pt", image_size=SIZE, peft_kwargs={"rank": 2})
    with torch.no_grad():
        for name, value in adapted.model.named_parameters():
            if "w_b_linear" in name:
                value.normal_()
    adapters.save_adapter(adapted, tmp_path / "adapter.pt")
    image = np.random.default_rng(1).integers(0, 255, (40, 50, 3), dtype="uint8")
    results = []
    for model in (adapted, adapters.load_adapter(base, tmp_path / "adapter.pt")):
        model.set_image(image)
        results.append(predict_low_res(model, points, labels, boxes)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
