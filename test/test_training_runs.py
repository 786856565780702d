"""Finetuning as users call it: presets, models and decoders for training, train_sam and its relatives, the outcome."""

import copy
import functools
import warnings
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from micro_sam.automatic_segmentation import get_predictor_and_segmenter
from micro_sam.core.errors import (
    CheckpointError,
    DecoderMissingError,
    InvalidInputError,
    InvalidTypeError,
)
from micro_sam.core.progress import Cancelled, drain
from micro_sam.evaluation.metrics import segmentation_scores
from micro_sam.models.checkpoints import read_checkpoint
from micro_sam.models.decoder import DecoderAdapter
from micro_sam.training import configurations, outcome, runs, training
from micro_sam.training.configurations import CONFIGURATIONS, choose_configuration, configuration_options
from micro_sam.training.export import export_instance_segmentation_model, export_trained_model
from micro_sam.training.model_setup import get_trainable_decoder, get_trainable_sam_model
from micro_sam.training.training import train_instance_segmentation, train_sam, train_sam_for_configuration

QUICK = {"n_sub_iteration": 2, "n_objects_per_batch": 2, "device": "cpu", "verbose": False}


@pytest.fixture
def loaders(cells_image, cells_labels):
    def make(decoder=True, only=False, n=2):
        common = {
            "raw_paths": [cells_image], "raw_key": None, "label_paths": [cells_labels], "label_key": None,
            "patch_shape": (96, 96), "batch_size": 1, "n_samples": n, "with_segmentation_decoder": decoder,
            "train_instance_segmentation_only": only,
        }
        return (training.default_sam_loader(**common, seed=0), training.default_sam_loader(**common, is_train=False))
    return make


@pytest.fixture
def never_loaded(monkeypatch):
    monkeypatch.setattr(training, "get_trainable_sam_model", lambda *a, **k: pytest.fail("the model was loaded"))


# --- presets ---


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        CONFIGURATIONS["CPU"]["model_type"] = "vit_h"
    with pytest.raises(TypeError):
        CONFIGURATIONS["gtx3080"]["peft_kwargs"]["rank"] = 4
    options = configuration_options("gtx3080")
    options["peft_kwargs"]["attention_layers_to_update"].append(3)
    assert configuration_options("gtx3080")["peft_kwargs"] == {
        "attention_layers_to_update": [11], "peft_module": "ClassicalSurgery",
    }
    with pytest.raises(InvalidInputError, match="'A100'"):
        configuration_options("A10")


def test_only_explicit_values_override_a_preset():
    kept = configuration_options("gtx3080", {"peft_kwargs": None, "n_objects_per_batch": 7, "lr": None})
    assert kept["peft_kwargs"]["attention_layers_to_update"] == [11]
    assert (kept["n_objects_per_batch"], kept["lr"]) == (7, None)
    assert configuration_options("gtx3080", {"peft_kwargs": {}})["peft_kwargs"] == {}
    last = configuration_options("gtx3080", {"model_type": "vit_l_lm"})["peft_kwargs"]
    assert last["attention_layers_to_update"] == [23], "the last block of the larger encoder"
    assert "peft_kwargs" not in configuration_options("gtx3080", {"model_type": "vit_t_lm"})


@pytest.mark.parametrize(("memory", "expected"), [
    (85.1e9, "A100"), (80e9, "V100"), (34e9, "V100"), (17e9, "rtx5000"), (8.5e9, "gtx3080"), (8e9, "gtx1080"),
    (6.2e9, "gtx1080"), (4.2e9, "Minimal"),
])
def test_every_card_gets_a_preset_that_fits_it(monkeypatch, memory, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(memory)))
    assert choose_configuration("cuda:0") == expected
    assert choose_configuration("cpu") in ("CPU", "Minimal"), "the device that trains decides"


def test_the_same_preset_twice(monkeypatch):
    calls, before = [], repr(CONFIGURATIONS)
    monkeypatch.setattr(training, "train_sam", functools.wraps(train_sam)(lambda **kwargs: calls.append(kwargs)))
    for n_objects in (3, None):
        train_sam_for_configuration("x", None, None, "gtx3080", n_objects_per_batch=n_objects)
    assert [call["n_objects_per_batch"] for call in calls] == [3, 5], "the first call leaves no trace"
    assert all(call["model_type"] == "vit_b" for call in calls)
    assert repr(CONFIGURATIONS) == before
    with pytest.warns(UserWarning, match="made for vit_b, but vit_t_lm"):
        train_sam_for_configuration("x", None, None, "CPU", model_type="vit_t_lm")


def test_unknown_options_are_refused(loaders, never_loaded):
    pair = loaders()
    with pytest.raises(InvalidTypeError, match="'n_objects_per_batch'"):
        train_sam("x", "vit_t", *pair, n_objets_per_batch=3)
    with pytest.raises(InvalidTypeError, match="'early_stopping'"):
        train_sam_for_configuration("x", *pair, "CPU", early_stoping=3, train_instance_segmentation_only=True)
    with pytest.raises(InvalidInputError, match="'image_encoder'"):
        train_sam("x", "vit_t", *pair, freeze=["image_encodr"])
    with pytest.raises(InvalidInputError, match="adapted layers"):
        train_sam("x", "vit_t", *pair, freeze="image_encoder", peft_kwargs={"rank": 4})
    with pytest.raises(InvalidInputError, match="StepLR|lr must be positive"):
        train_sam("x", "vit_t", *pair, lr=0)


def test_loaders_are_checked_before_anything_is_loaded(loaders, never_loaded):
    with pytest.raises(InvalidInputError, match=r"\(1, 3, 96, 96\)"):
        train_instance_segmentation("x", "vit_t", *loaders(), device="cpu", verbose=False)
    with pytest.raises(InvalidInputError, match=r"\(1, 4, 96, 96\)"):
        train_sam("x", "vit_t", *loaders(decoder=False), device="cpu", verbose=False)


# --- models and decoders for training ---


def test_checkpoints_of_several_processes_and_with_adapters(tiny_checkpoint, tmp_path):
    state = torch.load(tiny_checkpoint, weights_only=True)
    distributed = {f"module.sam.{key}": value for key, value in state["model_state"].items()}
    torch.save({**state, "model_state": distributed}, tmp_path / "distributed.pt")
    plain = get_trainable_sam_model("vit_t", "cpu", tmp_path / "distributed.pt")
    assert torch.equal(plain.sam.mask_decoder.iou_token.weight, state["model_state"]["mask_decoder.iou_token.weight"])

    adapted = get_trainable_sam_model("vit_t", "cpu", tiny_checkpoint, peft_kwargs={"rank": 2})
    for name, value in adapted.sam.named_parameters():
        if "w_b_linear" in name:
            torch.nn.init.normal_(value.data)
    saved = {f"sam.{key}": value for key, value in adapted.sam.state_dict().items()}
    torch.save({"model_state": saved, "settings": {"image_size": 256}}, tmp_path / "adapted.pt")
    further = get_trainable_sam_model("vit_t", "cpu", tmp_path / "adapted.pt")
    expected, found = adapted.state_dict(), further.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    trained = [n for n, p in further.sam.image_encoder.named_parameters() if p.requires_grad]
    assert trained
    assert all("_linear_" in name for name in trained), "only the adapters of the encoder are trained further"


@pytest.mark.parametrize("normalization", ["instance", "running"])
def test_the_decoder_is_trained_as_it_is_used(tiny_sam, tiny_decoder_state, normalization):
    encoder = copy.deepcopy(tiny_sam.image_encoder)
    state = {"decoder_state": tiny_decoder_state, "decoder_settings": {"normalization": normalization}}
    unetr = get_trainable_decoder(encoder, state, "cpu").train()
    assert unetr.normalization == normalization
    features = torch.randn(2, 256, 16, 16, generator=torch.Generator().manual_seed(0))
    found = unetr.decode((features, None, None), (256, 256), (256, 256))
    assert found.requires_grad
    expected = DecoderAdapter(unetr, normalization=normalization)(features, (256, 256), (256, 256))
    torch.testing.assert_close(found.detach(), expected, atol=1e-4, rtol=0)
    after = unetr.state_dict()
    assert all(torch.equal(after[key], value) for key, value in tiny_decoder_state.items()), "no statistics moved"


def test_decoder_that_does_not_fit(tiny_checkpoint, loaders, tmp_path):
    state = torch.load(tiny_checkpoint, weights_only=True)
    del state["decoder_state"]["deconv1.block.1.block.weight"]
    torch.save(state, tmp_path / "broken.pt")
    arguments = ("x", "vit_t", *loaders())
    options = {**QUICK, "checkpoint_path": tmp_path / "broken.pt", "save_root": tmp_path, "n_iterations": 1}
    with pytest.raises(CheckpointError, match=r"deconv1\.block\.1\.block\.weight"):
        train_sam(*arguments, **options)
    with pytest.warns(UserWarning, match="keep their initial values"):  # though those of others are ignored
        train_sam(*arguments, **options, strict_decoder_loading=False, should_stop=None)


def test_warnings_of_others_are_hidden_and_ours_are_not():
    with warnings.catch_warnings(record=True) as caught, runs.quiet_libraries(True):
        warnings.warn_explicit("theirs", UserWarning, "x.py", 1, module="torch.nn")
        warnings.warn_explicit("ours", UserWarning, "y.py", 1, module="micro_sam.models.decoder")
    assert [str(w.message) for w in caught] == ["ours"]


def test_shared_parameters_are_optimised_once_and_schedulers_get_their_arguments():
    encoder, head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    for scheduler_class, kwargs in ((torch.optim.lr_scheduler.StepLR, {"step_size": 2}), (None, None)):
        made = runs.Optimization.create(
            [encoder, torch.nn.Sequential(encoder, head)], 0.1, torch.optim.AdamW, scheduler_class, kwargs
        )
        assert len(made.optimizer.param_groups[0]["params"]) == 4
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    made = runs.Optimization.create([encoder], 0.1, torch.optim.AdamW, plateau, None).scheduler
    assert (made.mode, made.factor, made.patience) == ("min", 0.9, 3)
    with pytest.raises(InvalidTypeError, match="step_size"):
        runs.Optimization.create([encoder], 0.1, torch.optim.AdamW, torch.optim.lr_scheduler.StepLR, None)
    with pytest.raises(InvalidInputError, match="nothing to train"):
        runs.Optimization.create([encoder.requires_grad_(False)], 0.1, torch.optim.AdamW, None, None)


# --- runs ---


def test_a_frozen_encoder_stays_and_a_stopped_training_goes_on(tiny_checkpoint, loaders, tmp_path):
    folder = tmp_path / "checkpoints" / "a" / "b"
    arguments = ("a/b", "vit_t", *loaders(decoder=False))
    options = {
        **QUICK, "checkpoint_path": tiny_checkpoint, "with_segmentation_decoder": False, "freeze": ["image_encoder"],
        "save_root": tmp_path, "n_iterations": 3, "lr": 1e-3, "settings": {"data": ["cells"]},
    }
    bar = Mock(spec=["total", "update", "set_description"], total=0)
    with pytest.raises(Cancelled, match=r"latest\.pt"):
        train_sam(*arguments, **options, progress=bar, should_stop=lambda: bar.update.call_count == 2)
    assert torch.load(folder / "latest.pt", weights_only=True)["iteration"] == 2, "the third was given up"
    train_sam(*arguments, **options, resume=True)
    content = torch.load(folder / "latest.pt", weights_only=True)
    assert (content["iteration"], content["completed"]) == (3, True)
    assert content["settings"]["data"] == ["cells"]
    assert content["settings"]["image_size"] == 256

    best, start = read_checkpoint(folder / "best.pt").model_state, read_checkpoint(tiny_checkpoint).model_state
    moved = {key.split(".")[0] for key, value in start.items() if not torch.equal(best[key], value)}
    assert "image_encoder" not in moved, "neither weights nor statistics"
    assert "mask_decoder" in moved
    written = (folder / "latest.pt").stat().st_mtime_ns
    train_sam(*arguments, **options, overwrite_training=False)
    assert (folder / "latest.pt").stat().st_mtime_ns == written, "a complete training is left alone"


def test_automatic_segmentation_only(tiny_checkpoint, loaders, tmp_path, cells_image):
    class Signals:
        def __init__(self):
            self.seen = {name: [] for name in ("pbar_total", "pbar_update", "pbar_description")}
            for name, values in self.seen.items():
                setattr(self, name, SimpleNamespace(emit=values.append))

    signals = Signals()
    with pytest.warns(UserWarning, match="mask_prob"):  # what does not apply is said
        train_sam_for_configuration(
            "only", *loaders(only=True), "Minimal", tiny_checkpoint, train_instance_segmentation_only=True,
            save_root=tmp_path, n_iterations=2, device="cpu", pbar_signals=signals, mask_prob=0.5,
        )
    assert sum(signals.seen["pbar_update"]) == 2
    trained = tmp_path / "checkpoints" / "only" / "best.pt"
    with pytest.raises(CheckpointError, match="export_instance_segmentation_model"):
        export_trained_model(trained, tmp_path / "wrong.pt")
    export_instance_segmentation_model(trained, tmp_path / "model.pt", "vit_t", tiny_checkpoint)
    exported, start, found = (read_checkpoint(p) for p in (tmp_path / "model.pt", tiny_checkpoint, trained))
    for key, value in exported.model_state.items():
        source = found if key.startswith("image_encoder.") else start
        assert torch.equal(value, source.model_state[key]), key
    _, segmenter = get_predictor_and_segmenter("vit_t", tmp_path / "model.pt", "cpu")
    segmenter.initialize(cells_image)
    assert segmenter.generate().shape == cells_image.shape


def test_decoder_that_is_not_there_cannot_be_exported(tiny_sam, tmp_path):
    torch.save({"model_state": tiny_sam.state_dict(), "settings": {"image_size": 256}}, tmp_path / "best.pt")
    with pytest.raises(DecoderMissingError):
        export_trained_model(tmp_path / "best.pt", tmp_path / "x.pt", with_segmentation_decoder=True)
    export_trained_model(tmp_path / "best.pt", tmp_path / "x.pt", settings={"note": "mine"})
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert set(content) == {"model_state", "settings"}
    assert content["settings"]["note"] == "mine"
    assert (content["settings"]["model_type"], content["settings"]["image_size"]) == ("vit_t", 256)


# --- the outcome ---


def scores(automatic, point=(0.5, None), images=("a", "b"), mode="ais"):
    return outcome.Scores("m", list(images), {"automatic": list(automatic), "point": list(point)}, 3, mode)


def test_verdicts():
    before = scores([0.4, 0.6])
    assert outcome.compare(before, scores([0.5, 0.7]), ["automatic"]).verdict == "better"
    assert outcome.compare(before, scores([0.4, 0.601]), ["automatic"]).verdict == "same"
    worse = outcome.compare(before, scores([0.5, 0.3]), ["automatic", "point"])
    assert worse.change == pytest.approx((-0.1 + 0) / 2)
    text = worse.describe(False, "best.pt")
    assert "WORSE" in text
    assert "better in 1 of 2 images" in text
    assert "--promote_worse" in text
    fell = outcome.compare(before, scores([0.9, 0.9], point=(0.2, None)), ["automatic"]).describe(True, "best.pt")
    assert "became worse for: objects from one point" in fell
    assert "this was not trained" in fell
    with pytest.raises(InvalidInputError, match="same images"):
        outcome.compare(before, scores([1, 1], images=("a", "c")), ["automatic"])


def test_scores_of_a_real_model(tiny_checkpoint, cells_image, cells_labels):
    sample = (cells_image[None].astype("float32"), cells_labels[None].astype("float32"))
    held_out = outcome.held_out_images([sample, sample, (sample[0], sample[1] * 0)])
    assert len(held_out) == 1, "equal images count once, and those without objects not at all"
    steps = outcome.score_steps("vit_t", tiny_checkpoint, held_out, device="cpu")
    found = drain(steps, verbose=False)
    predictor, segmenter = get_predictor_and_segmenter("vit_t", tiny_checkpoint, "cpu")
    segmenter.initialize(cells_image.astype("float32"))
    labels = segmenter.generate()
    assert found.tasks["automatic"] == [segmentation_scores(labels, cells_labels)["mSA"]]
    assert np.array_equal(found.labels[0], labels)
    # The box of one object, predicted by hand.
    one = np.where(cells_labels == 5, 5, 0)
    single = [outcome.HeldOut("one", cells_image, one.astype("int64"))]
    found = drain(outcome.score_steps("vit_t", tiny_checkpoint, single, device="cpu", tasks=["box"]), verbose=False)
    rows, columns = np.nonzero(one)
    predictor.set_image(np.repeat(segmenter_input(cells_image)[..., None], 3, axis=-1))
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    mask = predictor.predict(box=box, multimask_output=False)[0][0]
    expected = (mask & (one > 0)).sum() / (mask | (one > 0)).sum()
    assert found.tasks == {"box": [pytest.approx(expected, abs=0.01)]}
    assert found.mode is None


def segmenter_input(image):
    """The stretch of contrast that inference does."""
    image = image.astype("float32")
    return ((image - image.min()) / (image.max() - image.min()) * 255).astype("uint8")


def test_the_names_of_presets_need_no_torch():
    assert set(configurations.CONFIGURATIONS) == {"Minimal", "CPU", "gtx1080", "gtx3080", "rtx5000", "V100", "A100"}
