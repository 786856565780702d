"""Prompts and losses of interactive training: against segment_anything and their definitions."""

import numpy as np
import pytest
import torch
from skimage.filters import gaussian

from micro_sam.core.errors import InvalidInputError, NoObjectsError
from micro_sam.prompt_generators import IterativePromptGenerator
from micro_sam.training.convert import ConvertToSamInputs, ConvertToSemanticSamInputs
from micro_sam.training.interactive import (
    ONE_BOX,
    ONE_POINT,
    correction_points,
    interactive_losses,
    prompt_batch,
    training_choice,
    validation_choice,
)
from micro_sam.training.losses import DecoderLoss, dice_per_object, iou_per_object
from micro_sam.training.trainable_sam import TrainableSAM


@pytest.fixture
def model(tiny_sam):
    return TrainableSAM(tiny_sam)


@pytest.fixture
def batch():
    """Images (2, 3, 200, 230) and labels (2, 1, 200, 230) with 2 and 3 objects; ids have gaps."""
    labels = torch.zeros(2, 1, 200, 230)
    labels[0, 0, 10:40, 20:60], labels[0, 0, 60:100, 20:60] = 3, 70
    labels[1, 0, 5:50, 5:50], labels[1, 0, 100:150, 100:170], labels[1, 0, 160:190, 5:90] = 1, 2, 9
    return torch.rand(2, 3, 200, 230, generator=torch.Generator().manual_seed(0)) * 255, labels


def test_boxes_and_points_are_scaled_to_what_sam_sees():
    labels = torch.zeros(1, 1, 64, 64)
    labels[0, 0, 5:20, 5:20], labels[0, 0, 30:50, 30:50] = 1, 2
    from segment_anything.utils.transforms import ResizeLongestSide

    convert = ConvertToSamInputs(ResizeLongestSide(1024), rng=0)
    (record,), (ids,) = convert(torch.zeros(1, 1, 64, 64), labels, n_pos=2, n_neg=1, get_boxes=True)
    assert record["boxes"].tolist() == [[80, 80, 320, 320], [480, 480, 800, 800]]
    assert ids.tolist() == [1, 2]
    assert record["point_labels"].tolist() == [[1, 1, 0]] * 2
    for points, i in zip((record["point_coords"] / 16).long(), ids):
        inside = labels[0, 0, points[:, 1], points[:, 0]] == i
        assert inside.tolist() == [True, True, False]
    plain, _ = ConvertToSamInputs(None, rng=0)(torch.zeros(1, 1, 64, 64), labels, 0, 0, get_boxes=True)
    assert plain[0]["boxes"].tolist() == [[5, 5, 20, 20], [30, 30, 50, 50]]


def test_boxes_are_distorted_outwards_only():
    labels = torch.zeros(1, 1, 100, 100)
    labels[0, 0, 40:60, 20:60] = 1
    convert = ConvertToSamInputs(None, box_distortion_factor=0.5, rng=1)
    boxes = torch.cat([convert(labels, labels, 0, 0, get_boxes=True)[0][0]["boxes"] for _ in range(300)]).numpy()
    shift = (boxes - [20, 40, 60, 60]) * [-1, -1, 1, 1]
    assert shift.min(0).tolist() == [0, 0, 0, 0]
    assert shift.max(0).tolist() == [20, 10, 20, 10]


def test_samples_of_objects_and_images_without(batch):
    x, labels = batch
    labels[0] = 0
    convert = ConvertToSamInputs(None, rng=0)
    prompts = prompt_batch(convert, x, labels, ONE_POINT, 2)
    assert prompts.images == [1]
    assert prompts.targets.shape == (1, 2, 1, 200, 230)
    assert prompt_batch(convert, x, torch.zeros_like(labels), ONE_POINT, 2) is None
    with pytest.raises(NoObjectsError, match="no object"):
        convert(x, labels, 1, 0)
    with pytest.raises(InvalidInputError, match="No prompt"):
        convert(x, labels, 0, 0)
    with pytest.raises(InvalidInputError, match="shapes"):
        convert(x, labels[:, 0], 1, 0)
    (record, _) = ConvertToSemanticSamInputs()(x, labels)
    assert set(record) == {"image", "original_size"}


def test_schedules():
    assert [training_choice(i) for i in range(3)] == [ONE_POINT, ONE_BOX, ONE_POINT]
    rng = np.random.default_rng(0)
    choices = [[validation_choice(i, rng) for _ in range(200)] for i in range(4)]
    assert choices[0][0] == ONE_POINT
    assert choices[1][0] == ONE_BOX
    for kind, with_box in ((2, False), (3, True)):
        assert {c.n_pos for c in choices[kind]} == {1, 2, 3, 4}
        assert {c.n_neg for c in choices[kind]} == {0, 1, 2, 3, 4}
        assert {(c.box, c.multimask) for c in choices[kind]} == {(with_box, False)}
    assert all(c.n_neg for c in choices[2] if c.n_pos == 1)


@pytest.mark.parametrize("choice", [ONE_POINT, ONE_BOX, validation_choice(3, np.random.default_rng(0))])
@pytest.mark.parametrize("with_masks", [False, True])
def test_masks_are_those_of_segment_anything(model, batch, choice, with_masks):
    prompts = prompt_batch(ConvertToSamInputs(model.transform, rng=0), *batch, choice, None)
    assert prompts.targets.shape[:2] == (2, 2)
    embeddings, records = model.image_embeddings_oft(prompts.inputs)
    sam = model.sam
    if with_masks:
        for record in records:
            record["mask_inputs"] = torch.randn(2, 1, 64, 64)
    for record, output, embedding in zip(records, model(records, embeddings, choice.multimask), embeddings):
        points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
        sparse, dense = sam.prompt_encoder(points, record.get("boxes"), record.get("mask_inputs"))
        low_res, iou = sam.mask_decoder(
            embedding[None], sam.prompt_encoder.get_dense_pe(), sparse, dense, choice.multimask
        )
        masks = sam.postprocess_masks(low_res, record["input_size"], record["original_size"])
        for found, expected in ((output["low_res_masks"], low_res), (output["masks"], masks),
                                (output["iou_predictions"], iou)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    square = model([record | {"input_size": (256, 256), "original_size": (128, 128)} for record in records], embeddings)
    expected = sam.postprocess_masks(square[0]["low_res_masks"], (256, 256), (128, 128))
    torch.testing.assert_close(square[0]["masks"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(200, 230), (300, 40), (64, 64)])
def test_images_are_embedded_as_at_inference(model, tiny_predictor, shape):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    # Smooth, as the two ways of resizing round differently.
    images = np.stack([gaussian(image, 8, channel_axis=-1, preserve_range=True).astype(np.uint8) for image in images])
    records = [{"image": torch.from_numpy(image).permute(2, 0, 1).float()} for image in images]
    with torch.no_grad():
        embeddings, _ = model.image_embeddings_oft(records)
    for image, record, embedding in zip(images, records, embeddings):
        tiny_predictor.set_image(image)
        assert record["input_size"] == tuple(tiny_predictor.input_size)
        spread = float(tiny_predictor.features.std())
        assert float((embedding - tiny_predictor.features[0]).abs().mean()) < 0.02 * spread


def test_images_of_several_shapes(model):
    with pytest.raises(InvalidInputError, match="one shape"):
        model.image_embeddings_oft([{"image": torch.zeros(1, 64, 64)}, {"image": torch.zeros(1, 64, 60)}])
    with pytest.raises(InvalidInputError, match="1 or 3"):
        model.preprocess(torch.zeros(1, 2, 64, 64))


def test_corrections_are_where_the_mask_is_wrong_and_gradients_add_up(tiny_sam, batch):
    model = TrainableSAM(tiny_sam)
    seen = []

    class Generator(IterativePromptGenerator):
        def __call__(self, segmentation, prediction, **kwargs):
            result = super().__call__(segmentation, prediction, **kwargs)
            seen.append((segmentation, prediction, result[0]))
            return result

    prompts = prompt_batch(ConvertToSamInputs(model.transform, rng=0), *batch, ONE_POINT, None)
    with torch.no_grad():
        embeddings, _ = model.image_embeddings_oft(prompts.inputs)

    def run(accumulate):
        leaf = embeddings.clone().requires_grad_()
        losses = interactive_losses(
            model, prompts.inputs, prompts.targets, leaf, n_sub_iteration=3, multimask=True, mask_prob=0.5,
            prompt_generator=Generator(rng=1), rng=np.random.default_rng(2),
            accumulate=(lambda loss: loss.backward()) if accumulate else None,
        )
        if not accumulate:
            losses.loss.backward()
        return losses.loss.detach(), leaf.grad

    (loss, gradient), (loss_of_parts, gradient_of_parts) = run(False), run(True)
    torch.testing.assert_close(loss_of_parts, loss)
    torch.testing.assert_close(gradient_of_parts, gradient)
    assert gradient.abs().sum() > 0
    assert "mask_inputs" not in prompts.inputs[0]
    assert prompts.inputs[0]["point_coords"].shape[1] == 1
    assert len(seen) == 2 * 2 * 2
    for truth, prediction, points in seen:
        for k in range(len(truth)):
            wrong = (truth[k, 0] > 0) & ~(prediction[k, 0] > 0)
            (x, y) = points[k, 0].tolist()
            assert wrong[y, x] or not wrong.any()


def test_objects_that_fill_the_image_get_padding():
    target = torch.ones(2, 1, 8, 8)
    target[1, 0, :4] = 0
    points, labels = correction_points(IterativePromptGenerator(rng=0), target, target.bool())
    assert labels.tolist() == [[1, -1], [1, 0]]
    assert points.shape == (2, 2, 2)


def test_losses_by_hand():
    prediction, target = torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 4, 4)
    target[0, 0, :2], target[1, 0, 0, 0] = 1, 1
    prediction[0, 0, :2], prediction[0, 1, :] = 1.0, 0.5
    expected = [[0, 1 - 2 * 4 / (16 * 0.25 + 8)], [1, 1]]
    torch.testing.assert_close(dice_per_object(prediction, target), torch.tensor(expected))
    torch.testing.assert_close(iou_per_object(prediction, target), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    loss = DecoderLoss()
    maps = torch.rand(2, 3, 4, 4)
    empty = maps.clone()
    empty[:, 0] = 0
    assert loss(maps, empty) == 3
    assert loss(empty, empty) == 3
    maps[:, 0] = 1
    torch.testing.assert_close(loss(maps, maps), torch.tensor(0.0), rtol=0, atol=1e-6)
    outside = maps.clone()
    maps[:, 0, :2] = outside[:, 0, :2] = 0
    outside[:, 1:, :2] = 0.7  # distances count inside of objects only
    torch.testing.assert_close(loss(outside, maps), torch.tensor(0.0), rtol=0, atol=1e-6)
