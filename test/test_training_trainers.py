"""The trainers of SAM: losses go down, one iteration is what its definition says, and the weaknesses are gone."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, ReduceLROnPlateau, StepLR
from training_helpers import SIZE, Patches, make_trainer, trainable_model

from micro_sam.core.errors import InvalidInputError, ModelError
from micro_sam.core.progress import Step
from micro_sam.models.build_sam import build_sam
from micro_sam.models.checkpoints import read_checkpoint
from micro_sam.models.decoder import get_unetr
from micro_sam.prompt_generators import IterativePromptGenerator
from micro_sam.training.base_trainer import BaseTrainer
from micro_sam.training.convert import ConvertToSamInputs, ConvertToSemanticSamInputs
from micro_sam.training.joint_sam_trainer import JointSamTrainer
from micro_sam.training.logger import JointSamLogger, PredictionLogger, normalized
from micro_sam.training.losses import DecoderLoss
from micro_sam.training.semantic_sam_trainer import CustomDiceLoss, SemanticMapsSamTrainer, SemanticSamTrainer
from micro_sam.training.simple_sam_trainer import MedSAMTrainer, SimpleSamTrainer
from micro_sam.training.trainable_sam import TrainableSAM
from micro_sam.util import get_sam_model


@pytest.fixture
def files():
    """Asked for by tests of what is written; the others are faster without."""


@pytest.fixture(autouse=True)
def _no_files(request, monkeypatch):
    if "files" not in request.fixturenames:
        monkeypatch.setattr("micro_sam.training.saving.save_checkpoint", lambda content, path: None)


EVERYTHING = ("image_encoder", "prompt_encoder", "mask_decoder")


class Classes(Patches):
    """Background, and two classes of nuclei by their id."""

    def __getitem__(self, index):
        image, labels = super().__getitem__(index)
        return image, torch.where(labels > 0, 1 + labels % 2, 0)


def semantic(folder, trainer_class=SemanticSamTrainer, n_classes=3, dataset=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TrainableSAM(build_sam("vit_t", image_size=SIZE, num_multimask_outputs=n_classes))
    model.requires_grad_(False)
    model.sam.mask_decoder.requires_grad_(True)
    options = {"loss": None, "metric": None, **options}
    return make_trainer(
        folder, model=model, trainer_class=trainer_class, convert_inputs=ConvertToSemanticSamInputs(),
        num_classes=n_classes, dataset=dataset or Classes(2), n_images=2, **options,
    )


class Maps(Patches):
    def __getitem__(self, index):
        image, labels = super().__getitem__(index)
        return image, torch.cat([labels > 0, labels == 0, labels > 5]).float()


TRAINERS = {
    "interactive": lambda folder: make_trainer(folder, n_images=2, lr=3e-3),
    "joint": lambda folder: make_trainer(folder, n_images=2, lr=3e-3, joint=True),
    "two_steps": lambda folder: make_trainer(folder, n_images=2, lr=3e-3, joint=True, two_steps=True),
    "simple": lambda folder: make_trainer(folder, n_images=2, n_val_images=2, lr=3e-3, trainer_class=SimpleSamTrainer),
    "medsam": lambda folder: make_trainer(folder, n_images=2, n_val_images=2, lr=3e-3, trainer_class=MedSAMTrainer),
    "semantic": lambda folder: semantic(folder, lr=3e-3),
    "maps": lambda folder: semantic(
        folder, SemanticMapsSamTrainer, dataset=Maps(2), loss=torch.nn.MSELoss(), lr=1e-2
    ),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_metric_and_loss_go_down_on_two_images(kind, tmp_path):
    trainer = TRAINERS[kind](tmp_path)
    trainer.fit(epochs=8, verbose=False)
    losses = np.array([entry[1] for entry in trainer.remembered.train])
    metrics = np.array([metric for _, metric, _ in trainer.remembered.validation])
    assert losses[-4:].mean() < 0.95 * losses[:4].mean()
    assert metrics[-3:].mean() < 0.97 * metrics[0]
    assert trainer.best_metric == metrics.min()


# --- one iteration, from its definition ---


class Spy:
    """Calls something and keeps what it gave."""

    def __init__(self, function):
        self.function, self.results = function, []

    def __call__(self, *args, **kwargs):
        self.results.append(self.function(*args, **kwargs))
        return copy.deepcopy(self.results[-1])


def by_definition(model, unetr, x, y, records, ids, corrections, n_sub_iteration, multimask):
    """Interactive and decoder loss of one iteration with mask prompts, written down from the method's description."""
    sam, scale, shape = model.sam, SIZE / max(x.shape[-2:]), tuple(x.shape[-2:])
    resized = F.interpolate(x, tuple(round(s * scale) for s in shape), mode="bilinear", antialias=True)
    normalised = (resized - sam.pixel_mean) / sam.pixel_std
    canvas = F.pad(normalised, (0, SIZE - normalised.shape[-1], 0, SIZE - normalised.shape[-2]))
    embeddings = sam.image_encoder(canvas)
    total = []
    for b, (record, own_ids) in enumerate(zip(records, ids)):
        truth = torch.stack([(y[b, 0] == k).float() for k in own_ids.tolist()])
        points, labels, masks_in = record.get("point_coords"), record.get("point_labels"), None
        for k in range(n_sub_iteration):
            sparse, dense = sam.prompt_encoder(
                points=None if points is None else (points, labels), boxes=record.get("boxes"), masks=masks_in
            )
            low, iou = sam.mask_decoder(
                image_embeddings=embeddings[b:b + 1], image_pe=sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=multimask and k == 0,
            )
            full = F.interpolate(low, (SIZE, SIZE), mode="bilinear", align_corners=False)
            full = full[..., :resized.shape[-2], :resized.shape[-1]]
            full = F.interpolate(full, shape, mode="bilinear", align_corners=False)
            p, t = torch.sigmoid(full), truth[:, None]
            dice = 1 - 2 * (p * t).sum((2, 3)) / ((p * p).sum((2, 3)) + (t * t).sum((2, 3)))
            hard = (p > 0.5).float()
            true_iou = (hard * t).sum((2, 3)) / (((hard + t) > 0).float().sum((2, 3)) + 1e-7)
            total.append((dice.min(dim=1)[0].mean() + ((iou - true_iou) ** 2).mean()) / n_sub_iteration / len(x))
            if k < n_sub_iteration - 1:
                new_points, new_labels = corrections[b * (n_sub_iteration - 1) + k][:2]
                new_points = new_points * scale
                points = new_points if points is None else torch.cat([points, new_points], dim=1)
                labels = new_labels if labels is None else torch.cat([labels, new_labels], dim=1)
                rows = torch.arange(len(iou))
                masks_in = low[rows, iou.argmax(dim=1)][:, None].detach()
    maps = unetr(x)
    inside, decoder_loss = y[:, 1:2], 0
    for channel in range(3):
        p, t = maps[:, channel:channel + 1], y[:, channel + 1:channel + 2]
        if channel:
            p, t = p * inside, t * inside
        decoder_loss = decoder_loss + 1 - 2 * (p * t).sum() / ((p * p).sum() + (t * t).sum())
    return sum(total), decoder_loss


@pytest.mark.parametrize("iteration", [0, 1], ids=["points", "boxes"])
def test_joint_iteration_is_its_definition(iteration, tmp_path):
    model = trainable_model(EVERYTHING)
    trainer = make_trainer(
        tmp_path, joint=True, model=model, n_images=2, shuffle=False, mask_prob=1.0, n_sub_iteration=3, lr=1.0,
        optimizer=torch.optim.SGD, n_objects_per_batch=2, prompt_generator=Spy(IterativePromptGenerator()),
    )
    trainer.convert_inputs = Spy(trainer.convert_inputs)
    trainer._iteration = iteration
    before = {
        name: p.detach().clone() for net in (model, trainer.unetr) for name, p in net.named_parameters()
    }
    reference, reference_unetr = copy.deepcopy((model, trainer.unetr))
    x, y = (torch.stack(part) for part in zip(*(trainer.train_loader.dataset[k] for k in range(2))))
    trainer.fit(iterations=1, verbose=False, save_every_minutes=None)

    # The first batches are those of the training; the others are those of the validation.
    n_images, n_corrections = 2, 2 * 2
    converted = trainer.convert_inputs.results[:n_images]
    records, ids = [records[0] for records, _ in converted], [ids[0] for _, ids in converted]
    reference.train(), reference_unetr.train()
    loss, decoder_loss = by_definition(
        reference, reference_unetr, x, y, records, ids, trainer.prompt_generator.results[:n_corrections], 3,
        multimask=iteration == 0,
    )
    _, logged, _, mask_loss, iou_loss, _, logged_decoder = trainer.remembered.train[0]
    assert logged == pytest.approx(loss.item(), abs=1e-5)
    assert mask_loss + iou_loss == pytest.approx(logged, abs=1e-6)
    assert logged_decoder == pytest.approx(decoder_loss.item(), abs=1e-5)

    (loss + decoder_loss).backward()
    compared = 0
    for net, own in ((reference, model), (reference_unetr, trainer.unetr)):
        for (name, p), q in zip(net.named_parameters(), own.parameters()):
            if p.grad is not None:
                compared += 1
                difference = (before[name] - q - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-2)
                assert difference < 1e-2, name
    assert compared > 300


def test_one_encoding_and_one_step_unless_two_are_asked_for(tmp_path):
    for two_steps, expected in ((False, 1), (True, 2)):
        trainer = make_trainer(tmp_path, joint=True, n_images=2, two_steps=two_steps)
        calls = []
        trainer.optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("step"))
        trainer.model.sam.image_encoder.register_forward_hook(
            lambda module, *_, calls=calls, trainer=trainer: calls.append("encode") if trainer.iteration == 0 else None
        )
        trainer.fit(iterations=1, verbose=False)
        assert calls.count("step") == expected
        assert calls.count("encode") == expected


def test_two_steps_are_the_two_updates_in_turn(tmp_path):
    """The second loss sees weights that the first has changed: with a rate of 0 for it, both are as with one step."""
    losses = {}
    for two_steps in (False, True):
        for lr in (0.0, 1e-2):
            model = trainable_model(EVERYTHING)
            trainer = make_trainer(tmp_path, joint=True, model=model, n_images=2, two_steps=two_steps, lr=lr)
            trainer.fit(iterations=1, verbose=False)
            losses[two_steps, lr] = trainer.remembered.train[0]
    assert losses[True, 0.0][6] == pytest.approx(losses[False, 0.0][6], abs=1e-5)
    assert abs(losses[True, 1e-2][6] - losses[False, 1e-2][6]) > 1e-4
    assert losses[True, 1e-2][1] == losses[False, 1e-2][1]


# --- the optimisation ---


def test_frozen_parts_do_not_change(tmp_path):
    trainer = make_trainer(tmp_path, n_images=2, joint=True)
    before = copy.deepcopy(trainer.model.state_dict())
    decoder_before = copy.deepcopy(trainer.unetr.state_dict())
    trainer.fit(epochs=2, verbose=False)
    assert not trainer.model.sam.image_encoder.training
    assert any("running_mean" in key for key in before)
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not [key for key in changed if ".image_encoder." in key]
    changed = [k for k, v in trainer.unetr.state_dict().items() if not torch.equal(v, decoder_before[k])]
    assert any(key.endswith("running_mean") for key in changed)
    assert not [key for key in changed if key.startswith("encoder.")]


def rates(folder, scheduler, **options):
    trainer = make_trainer(folder, n_images=1, n_sub_iteration=1, scheduler=scheduler, **options)
    trainer.fit(epochs=3, verbose=False)
    return [entry[2] for entry in trainer.remembered.train]


class Growing(torch.nn.Module):
    """A metric that is always worse than the last."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, prediction, target):
        self.n += 1
        return torch.tensor(float(self.n))


def test_any_scheduler_works(tmp_path):
    assert rates(tmp_path, lambda o: StepLR(o, 1, gamma=0.5)) == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert rates(tmp_path, lambda o: MultiStepLR(o, [1], gamma=0.1)) == pytest.approx([1e-3, 1e-4, 1e-4])
    assert rates(tmp_path, lambda o: LambdaLR(o, lambda k: 1 / (1 + k))) == pytest.approx([1e-3, 5e-4, 1e-3 / 3])
    trainer = semantic(tmp_path, metric=Growing(), scheduler=lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0))
    trainer.fit(epochs=3, verbose=False)
    assert [entry[2] for entry in trainer.remembered.train] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_early_stopping_after_as_many_bad_epochs_as_asked(tmp_path, files):
    trainer = semantic(tmp_path, metric=Growing(), early_stopping=2)
    trainer.fit(epochs=9, verbose=False)
    assert len(trainer.remembered.validation) == 3
    assert trainer.stopped_early
    assert torch.load(tmp_path / "checkpoints/run/latest.pt", weights_only=True)["completed"]


def gradients(folder, **options):
    trainer = make_trainer(folder, lr=0.0, n_images=3, shuffle=False, batch_size=1, n_sub_iteration=1, **options)
    found = []
    trainer.optimizer.register_step_pre_hook(lambda *_: found.append(torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten().clone() for p in trainer._trained_parameters()]
    )))
    trainer.fit(epochs=1, verbose=False)
    return found


def test_gradient_accumulation_and_clipping(tmp_path):
    one, two, three = gradients(tmp_path)
    mean, rest = gradients(tmp_path, gradient_accumulation_steps=2)
    torch.testing.assert_close(mean, (one + two) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rest, three, rtol=1e-4, atol=1e-6)
    clipped = gradients(tmp_path, gradient_clipping=0.01)[0]
    torch.testing.assert_close(clipped, one * 0.01 / one.norm(), rtol=1e-3, atol=1e-7)


def test_checkpointed_networks_give_the_same_training(tmp_path):
    states = []
    for checkpoint_encoder in (False, True):
        trainer = make_trainer(
            tmp_path, model=trainable_model(EVERYTHING), joint=True, n_images=2, checkpoint_encoder=checkpoint_encoder,
            optimizer=torch.optim.SGD,
        )
        unetr, forward_calls = trainer.unetr, []
        blocks = [unetr.encoder.layers[1].blocks[0], unetr.deconv1, unetr.decoder.blocks[0], unetr.decoder_head]
        for block in blocks:
            part = next(m for m in block.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
            part.register_forward_pre_hook(lambda *_, calls=forward_calls: calls.append(torch.is_grad_enabled()))
        trainer.fit(epochs=1, verbose=False)
        assert forward_calls.count(True) == len(blocks) * (1 + checkpoint_encoder)
        assert not any("forward" in vars(block) for block in blocks)
        states.append({**trainer.model.state_dict(), **unetr.state_dict()})
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_mixed_precision_trains_with_full_precision_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("micro_sam.training.base_trainer.gains_from_half_precision", lambda device: True)
    mixed = make_trainer(tmp_path, joint=True, n_images=2, mixed_precision=True)
    types = []
    mixed.model.sam.mask_decoder.transformer.register_forward_hook(lambda m, i, out: types.append(out[0].dtype))
    mixed.fit(epochs=1, verbose=False)
    assert mixed.mixed_precision_dtype == "bfloat16"
    full = make_trainer(tmp_path, joint=True, n_images=2)
    full.fit(epochs=1, verbose=False)
    assert mixed.remembered.train[0][1] == pytest.approx(full.remembered.train[0][1], rel=0.05)
    assert mixed.remembered.train[0][1] != full.remembered.train[0][1]
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    monkeypatch.setattr("micro_sam.training.base_trainer.gains_from_half_precision", lambda device: False)
    assert not make_trainer(tmp_path, mixed_precision=True).mixed_precision


def test_mask_loss_of_torch_em(tmp_path):
    from torch_em.loss import DiceLoss
    found = []
    for mask_loss in (None, DiceLoss(reduce_channel=None)):
        trainer = make_trainer(tmp_path, n_images=2, mask_loss=mask_loss)
        trainer.fit(epochs=1, verbose=False)
        found.append(trainer.remembered.train[0][1:])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    with pytest.raises(InvalidInputError, match="one value per channel"):
        make_trainer(tmp_path, n_images=2, mask_loss=DiceLoss()).fit(epochs=1, verbose=False)


def test_not_finite_loss_is_an_error(tmp_path):
    trainer = make_trainer(tmp_path, n_images=2)
    with torch.no_grad():
        trainer.model.sam.mask_decoder.iou_token.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite in iteration 0"):
        trainer.fit(epochs=1, verbose=False)


# --- data ---


class SomeEmpty(Patches):
    """Every image whose index is in `empty` has no objects."""

    def __init__(self, n, empty):
        super().__init__(n)
        self.empty = empty

    def __getitem__(self, index):
        image, labels = super().__getitem__(index)
        return image, labels * (index not in self.empty)


def test_batches_without_objects_are_skipped_and_counted(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    options = {"batch_size": 1, "val_dataset": Patches(1)}
    trainer = make_trainer(tmp_path, dataset=SomeEmpty(3, {1}), **options)
    trainer.fit(epochs=1, verbose=False)
    assert len(trainer.remembered.train) == 2
    assert trainer.iteration == 3
    assert "1 of 3 training batches of epoch 1 had no object and were skipped" in caplog.text
    with pytest.raises(InvalidInputError, match="3 of 3 training batches of epoch 1 had no object"):
        make_trainer(tmp_path, dataset=SomeEmpty(3, {0, 1, 2}), **options).fit(epochs=1, verbose=False)
    with pytest.raises(InvalidInputError, match="1 of 1 validation batches"):
        make_trainer(tmp_path, dataset=Patches(2), val_dataset=SomeEmpty(1, {0})).fit(epochs=1, verbose=False)


def test_image_without_objects_takes_no_part(tmp_path):
    """The loss is the mean over images with objects, whatever the others in the batch."""
    found = []
    for dataset in (SomeEmpty(2, {1}), Patches(1)):
        trainer = make_trainer(tmp_path, dataset=dataset, val_dataset=Patches(1), shuffle=False)
        trainer.fit(epochs=1, verbose=False)
        found.append(trainer.remembered.train[0][1:])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_wrong_targets_and_values(tmp_path):
    with pytest.raises(InvalidInputError, match="with_segmentation_decoder=False"):
        make_trainer(tmp_path, dataset=Patches(2, maps=True)).fit(epochs=1, verbose=False)
    with pytest.raises(InvalidInputError, match="with_segmentation_decoder=True"):
        make_trainer(tmp_path, joint=True, dataset=Patches(2)).fit(epochs=1, verbose=False)
    dark = Patches(2)
    dark.image = dark.image / 256
    with pytest.warns(UserWarning, match=r"should be in \[0, 255\]"):
        make_trainer(tmp_path, dataset=dark).fit(epochs=1, verbose=False)
    dark.maps = True
    with pytest.raises(InvalidInputError, match=r"values in \[0, 255\]"):
        make_trainer(tmp_path, joint=True, dataset=dark).fit(epochs=1, verbose=False)


@pytest.mark.parametrize(("options", "message"), [
    ({"n_sub_iteration": 0}, "n_sub_iteration"), ({"mask_prob": 1.5}, "mask_prob"),
    ({"n_objects_per_batch": 0}, "n_objects_per_batch"), ({"gradient_accumulation_steps": 0}, "accumulation"),
    ({"gradient_clipping": -1.0}, "gradient_clipping"), ({"seed": -1}, "seed"), ({"early_stopping": 0}, "early"),
    ({"settings": {"data": Patches(1)}}, r"settings\['data'\] holds training_helpers.Patches"),
    ({"joint": True, "two_steps": True, "gradient_accumulation_steps": 2}, "two_steps"),
    ({"joint": True, "instance_loss_weight": 0}, "instance_loss_weight"),
    ({"trainer_class": SimpleSamTrainer, "use_points": False, "use_box": False}, "Neither"),
])
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(InvalidInputError, match=message):
        make_trainer(tmp_path, **options)


def test_wrong_decoder_or_optimizer(tmp_path):
    trainer = make_trainer(tmp_path, joint=True)
    options = {"instance_loss": trainer.instance_loss, "instance_metric": trainer.instance_loss, "name": "run",
               "train_loader": trainer.train_loader, "val_loader": trainer.val_loader, "device": "cpu",
               "convert_inputs": trainer.convert_inputs, "n_sub_iteration": 1, "unetr": trainer.unetr}
    with pytest.raises(InvalidInputError, match="around the encoder of the model"):
        JointSamTrainer(model=trainable_model(), optimizer=trainer.optimizer, **options)
    optimizer = torch.optim.SGD(trainer.model.sam.mask_decoder.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="lacks .* parameters of the decoder"):
        JointSamTrainer(model=trainer.model, optimizer=optimizer, **options)
    with pytest.raises(InvalidInputError, match="Exactly one"):
        trainer.fit(epochs=1, iterations=2)


def test_prompts_of_the_simple_trainers(tmp_path):
    kinds = {}
    for name, options in {"points": {"use_box": False}, "box": {"use_points": False}, "both": {}}.items():
        trainer = make_trainer(tmp_path, trainer_class=SimpleSamTrainer, n_images=1, **options)
        trainer.convert_inputs = Spy(ConvertToSamInputs(trainer.model.transform))
        trainer.fit(epochs=5, verbose=False)
        kinds[name] = {
            ("boxes" in records[0], tuple(records[0].get("point_coords", torch.zeros(0)).shape[1:]))
            for records, _ in trainer.convert_inputs.results
        }
    box, point = (True, ()), (False, (1, 2))
    assert kinds == {"points": {point}, "box": {box}, "both": {point, box}}


# --- without prompts ---


def test_dice_loss_of_classes():
    torch.manual_seed(0)
    scores, ids = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    p, expected = scores.softmax(1), 0.0
    for c in range(3):
        t = (ids[:, 0] == c).float()
        expected += 1 - 2 * (p[:, c] * t).sum() / ((p[:, c] ** 2).sum() + t.sum())
    assert float(CustomDiceLoss(3)(scores, ids)) == pytest.approx(float(expected), abs=1e-6)
    assert float(CustomDiceLoss(3, softmax=False)(p, ids)) == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(InvalidInputError, match="must be in 0…2"):
        CustomDiceLoss(3)(scores, ids + 1)
    with pytest.raises(InvalidInputError, match="num_multimask_outputs=4"):
        CustomDiceLoss(4)(scores, ids)


def test_semantic_loss_weights_and_metric(tmp_path):
    losses = {}
    for weight in (None, 0.0, 0.25, 1.0):
        trainer = semantic(tmp_path, dice_weight=weight)
        trainer.fit(epochs=1, verbose=False)
        losses[weight] = trainer.remembered.train[0][1]
        step, metric, loss = trainer.remembered.validation[0]
        assert metric == pytest.approx(loss, abs=1e-6)  # the loss is the metric by default
    assert losses[None] == pytest.approx(losses[0.0] + losses[1.0], abs=1e-5)
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], abs=1e-5)
    trainer = semantic(tmp_path, metric=CustomDiceLoss(3))
    trainer.fit(epochs=1, verbose=False)
    assert trainer.best_metric < trainer.remembered.validation[0][2]
    for wrong in ({"dice_weight": 1.5}, {"n_classes": 1}):
        with pytest.raises(InvalidInputError):
            semantic(tmp_path, **wrong)


def test_regression_loss_gets_prediction_then_target(tmp_path):
    seen = []

    class Asymmetric(torch.nn.Module):
        def forward(self, prediction, target):
            seen.append((prediction.requires_grad, set(target.unique().tolist())))
            return (prediction - target).square().mean()

    semantic(tmp_path, SemanticMapsSamTrainer, dataset=Maps(2), loss=Asymmetric()).fit(iterations=1, verbose=False)
    assert seen[0] == (True, {0.0, 1.0})
    with pytest.raises(InvalidInputError, match="needs a loss"):
        semantic(tmp_path, SemanticMapsSamTrainer)


# --- checkpoints and logs ---


class OnlyMaps(Patches):
    def __getitem__(self, index):
        image, target = super().__getitem__(index)
        return image, target[1:]


def test_decoder_alone(tmp_path, files):
    sam = trainable_model().sam
    unetr = get_unetr(sam.image_encoder, device="cpu", initial_features=4)
    before = copy.deepcopy(sam.image_encoder.state_dict())
    trainer = make_trainer(
        tmp_path, model=unetr, trainer_class=BaseTrainer, dataset=OnlyMaps(2, maps=True), loss=DecoderLoss(),
        metric=DecoderLoss(), lr=1e-2, decoder_settings={"normalization": "instance"},
    )
    trainer.fit(epochs=3, verbose=False)
    losses = [entry[1] for entry in trainer.remembered.train]
    assert losses[-1] < losses[0]
    checkpoint = read_checkpoint(tmp_path / "checkpoints/run/latest.pt")
    assert checkpoint.normalization == "instance"
    assert checkpoint.image_size == SIZE
    assert set(checkpoint.decoder_state) == {key for key in unetr.state_dict() if not key.startswith("encoder.")}
    for name, value in before.items():
        assert torch.equal(checkpoint.model_state[f"image_encoder.{name}"], value), name


def test_checkpoint_is_plain_and_loads_as_model(tmp_path, files):
    trainer = make_trainer(
        tmp_path, joint=True, n_images=2, settings={"training_data": ["a.tif"]},
        decoder_settings={"normalization": "instance"}, scheduler=lambda o: ReduceLROnPlateau(o),
    )
    trainer.fit(epochs=2, save_every_kth_epoch=1, verbose=False)
    folder = tmp_path / "checkpoints" / "run"
    assert {path.name for path in folder.iterdir()} == {"best.pt", "latest.pt", "epoch-1.pt", "epoch-2.pt"}
    content = torch.load(folder / "latest.pt", weights_only=True)
    assert content["epoch"] == 1
    assert content["iteration"] == 2
    assert content["settings"]["model_type"] == "vit_t"
    assert content["settings"]["image_size"] == SIZE
    assert content["settings"]["training_data"] == ["a.tif"]
    assert content["decoder_settings"] == {"normalization": "instance", "initial_features": 4}
    init = content["init"]
    assert init["trainer_class"].endswith("JointSamTrainer")
    expected = {"n_sub_iteration": 2, "mask_prob": 0.5, "n_objects_per_batch": 3, "seed": 3, "two_steps": False}
    assert {key: init[key] for key in expected} == expected
    assert init["train_loader"]["batch_size"] == 2
    assert set(content["decoder_state"]) == {k for k in trainer.unetr.state_dict() if not k.startswith("encoder.")}

    predictor, state = get_sam_model("vit_t", "cpu", folder / "latest.pt", return_state=True)
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, trainer.model.sam.state_dict()[name]), name
    assert set(state["decoder_state"]) == set(content["decoder_state"])


def test_logs(tmp_path):
    trainer = make_trainer(tmp_path, joint=True, n_images=2, logger=JointSamLogger, log_image_interval=1)
    trainer.fit(epochs=2, verbose=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "logs" / "run"))
    events.Reload()
    names = ("loss", "mask_loss", "iou_loss", "model_iou", "instance_loss")
    expected = {f"{kind}/{n}" for kind in ("train", "validation") for n in names}
    assert set(events.Tags()["scalars"]) == expected | {"train/learning_rate", "validation/metric"}
    assert len(events.Scalars("train/loss")) == 2
    images = {f"{kind}/{n}" for kind in ("train", "validation") for n in ("input", "target", "samples")}
    assert set(events.Tags()["images"]) == images


def test_constant_images_are_logged_without_nan():
    assert torch.equal(normalized(torch.full((1, 4, 4), 7.0)), torch.zeros(1, 4, 4))
    image = torch.tensor([[[1.0, 3.0]]])
    assert normalized(image).tolist() == [[[0.0, 1.0]]]
    assert image.tolist() == [[[1.0, 3.0]]]  # not in place


def test_training_without_tensorboard(tmp_path, monkeypatch, caplog):
    import sys
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    semantic(tmp_path, logger=PredictionLogger).fit(iterations=1, verbose=False)
    assert "pip install tensorboard" in caplog.text
    assert not (tmp_path / "logs").exists()


class Signals:
    """Records what a widget would get."""

    def __init__(self):
        self.emitted = []
        for name in ("pbar_total", "pbar_update", "pbar_description"):
            setattr(self, name, type("Signal", (), {"emit": lambda _, v, name=name: self.emitted.append((name, v))})())


def test_progress_of_widgets_and_steps(tmp_path):
    signals = Signals()
    make_trainer(tmp_path).fit(epochs=2, progress=signals)
    totals = [value for name, value in signals.emitted if name == "pbar_total"]
    assert totals == [4]
    assert sum(value for name, value in signals.emitted if name == "pbar_update") == 4
    assert any("metric" in value and "left" in value for name, value in signals.emitted if name == "pbar_description")
    steps = list(make_trainer(tmp_path).fit_steps(epochs=1))
    assert all(isinstance(step, Step) for step in steps)
    assert [step.done for step in steps] == [0, 1, 2, 2], "the last one tells the metric"
    assert "loss" in steps[1].text
    assert "metric" not in steps[2].text
    assert "metric" in steps[3].text
