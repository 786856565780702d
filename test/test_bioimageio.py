"""Packages for bioimage.io: what is in them, that others can run them, and that they come back unchanged."""

import io
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import yaml
from segment_anything.utils.transforms import ResizeLongestSide

from micro_sam import segment
from micro_sam.bioimageio import PredictorAdaptor, export_sam_model, import_model, model_export
from micro_sam.bioimageio.compatibility import load_bioimageio
from micro_sam.bioimageio.model_import import PackageError
from micro_sam.bioimageio.predictor_adaptor import PromptError
from micro_sam.cli.export_model import main, main_import
from micro_sam.core.errors import (
    CheckpointError,
    DecoderMissingError,
    InvalidInputError,
    InvalidTypeError,
    MissingFileError,
    MissingPackageError,
    ModelError,
    NoObjectsError,
    NotInitializedError,
    OutputExistsError,
)
from micro_sam.models.build_sam import build_sam
from micro_sam.models.loading import get_predictor_and_decoder, get_sam_model
from micro_sam.models.registry import list_models
from micro_sam.segmentation.ais import InstanceSegmentationWithDecoder
from micro_sam.segmentation.workflow import load_model

FILES = {
    "rdf.yaml", "vit_t.pt", "predictor_adaptor.py", "environment.yaml", "documentation.md", "cover.jpeg", "input.npy",
    "box_prompts.npy", "point_prompts.npy", "point_labels.npy", "mask_prompts.npy", "embeddings.npy", "mask.npy",
    "scores.npy", "sample_image.png", "sample_mask.png",
}


# bioimageio.core leaves files open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something asked for the network")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def local_models(tmp_path, monkeypatch):
    path = tmp_path / "own" / "models.toml"
    monkeypatch.setenv("MICROSAM_MODELS", str(path))
    return path


@pytest.fixture
def without_checks(monkeypatch):
    """Leaves out running the package, which takes most of the time."""
    monkeypatch.setattr(model_export, "_checks", lambda *args: iter(()))


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint):
    return model_export._load_model("vit_t", tiny_checkpoint)


@pytest.fixture
def loaded_once(tiny_model, monkeypatch, without_checks):
    """Exports take the tiny model that is loaded already."""
    monkeypatch.setattr(model_export, "_load_model", lambda *args: tiny_model)


@pytest.fixture(scope="module")
def package(tiny_checkpoint, tmp_path_factory):
    """The package of the tiny model with decoder."""
    image, labels = _scene()
    path = tmp_path_factory.mktemp("package") / "tiny.zip"
    export_sam_model(image, labels, "vit_t", "Tiny (test)", path, tiny_checkpoint, license="CC0-1.0", **PEOPLE)
    return path


PEOPLE = {"authors": [{"name": "Ada", "github_user": "nobody-of-that-name"}], "cite": [
    {"text": "a page", "url": "https://example.org/a"}, {"text": "a paper", "doi": "10.1038/s41592-024-02580-4"}
]}


def _scene():
    """An image (60, 80) and three objects with the ids 1, 2 and 7."""
    rng = np.random.default_rng(3)
    labels = np.zeros((60, 80), dtype=np.uint16)
    for i, (y, x) in {7: (5, 5), 2: (10, 40), 1: (35, 20)}.items():
        labels[y:y + 20, x:x + 20] = i
    return (rng.integers(0, 60, labels.shape) + 120 * (labels > 0)).astype(np.uint16), labels


def _read(path, name):
    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        return np.load(file) if name.endswith(".npy") else file.read()


def _description(path):
    return yaml.safe_load(_read(path, "rdf.yaml"))


def _example(path):
    names = ("input", "box_prompts", "point_prompts", "point_labels", "mask_prompts", "embeddings")
    return [torch.from_numpy(_read(path, f"{name}.npy")) for name in names]


@pytest.fixture
def adaptor(tiny_checkpoint):
    adaptor = PredictorAdaptor("vit_t")
    adaptor.load_state_dict(torch.load(tiny_checkpoint, weights_only=True))
    return adaptor


def test_tensors_are_those_of_earlier_packages(package):
    """Names, order, axes, types and files, as programs that read such packages know them; sizes follow the canvas.

    Only the names of the four values of a box differ: they were called h, w, x, y, which they are not.
    """
    def channel(*names):
        return "channel", list(names)

    batch, pixels = ("batch", 1), (1, 3, 60, 80)
    free, found = {"min": 1, "step": 1}, {"min": 1}
    objects, points = ("object", free), ("point", free)
    embedding = (batch, channel(*(f"c{k}" for k in range(256))), ("y", 16), ("x", 16))
    expected_inputs = [
        ("image", "uint8", "input.npy", False, (batch, channel("R", "G", "B"), ("y", free), ("x", free)), pixels),
        ("box_prompts", "int64", "box_prompts.npy", True,
         (batch, objects, channel("x_min", "y_min", "x_max", "y_max")), (1, 2, 4)),
        ("point_prompts", "int64", "point_prompts.npy", True,
         (batch, objects, points, channel("x", "y")), (1, 2, 3, 2)),
        ("point_labels", "int64", "point_labels.npy", True, (batch, objects, points), (1, 2, 3)),
        ("mask_prompts", "float32", "mask_prompts.npy", True,
         (batch, objects, channel("channel"), ("y", 64), ("x", 64)), (1, 2, 1, 64, 64)),
        ("embeddings", "float32", "embeddings.npy", True, embedding, (1, 256, 16, 16)),
    ]
    size = [(axis, {"tensor_id": "image", "axis_id": axis}) for axis in "yx"]
    expected_outputs = [
        ("masks", "uint8", "mask.npy", None, (batch, ("object", found), channel("mask"), *size), (1, 2, 1, 60, 80)),
        ("scores", "float32", "scores.npy", None, (batch, ("object", found), channel("mask")), (1, 2, 1)),
        ("embeddings", "float32", "embeddings.npy", None, embedding, (1, 256, 16, 16)),
    ]

    def rows(tensors):
        for tensor in tensors:
            axes = tuple(
                (axis["type"], axis["channel_names"]) if axis["type"] == "channel" else
                (axis.get("id", axis["type"]), axis["size"]) for axis in tensor["axes"]
            )
            file = tensor["test_tensor"]["source"]
            array = _read(package, file)
            assert array.dtype.name == tensor["data"]["type"]
            yield tensor["id"], tensor["data"]["type"], file, tensor.get("optional"), axes, array.shape

    description = _description(package)
    assert list(rows(description["inputs"])) == expected_inputs
    assert list(rows(description["outputs"])) == expected_outputs


def test_example_is_made_of_the_objects(package):
    image, boxes, points, labels, masks, _ = (tensor.numpy() for tensor in _example(package))
    _, truth = _scene()
    assert (image.min(), image.max()) == (0, 255)
    np.testing.assert_array_equal(boxes[0], [[20, 35, 40, 55], [40, 10, 60, 30]])
    np.testing.assert_array_equal(labels[0], [[1, 0, 0]] * 2)
    for k, i in enumerate((1, 2)):
        x, y = points[0, k].T
        np.testing.assert_array_equal(truth[y, x] == i, [True, False, False])
    logit = np.log(0.999 / 0.001)
    np.testing.assert_allclose(np.unique(masks), [-logit, logit], rtol=1e-6)
    # 80 pixels become 64: the mask is that of the object, scaled, and what is below the image is background.
    np.testing.assert_array_equal(masks[0, 0, 0] > 0, np.pad(_scaled(truth == 1), ((0, 16), (0, 0))))


def _scaled(mask):
    """Each pixel of 48 x 64 takes the value of that of 60 x 80 in which its centre is; edges lie on a grid of 5."""
    y, x = (((np.arange(n) + 0.5) * 1.25).astype(int) for n in (48, 64))
    return mask[y][:, x]


def test_files_and_provenance(package, tiny_checkpoint):
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == sorted(FILES)
    assert len(FILES) == 16
    description = _description(package)
    assert (description["name"], description["license"]) == ("Tiny (test)", "CC0-1.0")
    assert [author["name"] for author in description["authors"]] == ["Ada"]  # and nobody else
    assert description["weights"]["pytorch_state_dict"]["architecture"]["kwargs"] == {"model_type": "vit_t"}
    assert description["config"]["micro_sam"]["image_size"] == 256
    environment = yaml.safe_load(_read(package, "environment.yaml"))
    assert all(any(sign in d for sign in ("==", ">=")) for d in environment["dependencies"])
    assert str(tiny_checkpoint.parent) not in _read(package, "rdf.yaml").decode()
    assert "decoder_state" in torch.load(io.BytesIO(_read(package, "vit_t.pt")), weights_only=True)


def test_settings_of_a_training_stay_private(tiny_checkpoint, tmp_path):
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["settings"] |= {"data": {"images": "/home/ada/secret/patients"}}
    torch.save(content, tmp_path / "trained.pt")
    model = model_export._load_model("vit_t", tmp_path / "trained.pt")
    assert model.weights["settings"] == {"model_type": "vit_t", "image_size": 256}
    assert "secret" not in str(model.source)
    assert str(tmp_path) not in str(model.source)


def test_bioimageio_accepts_and_runs_the_package(package):
    """With addresses that cannot be looked up: those are warnings there, and nothing is asked for while exporting."""
    spec, core = load_bioimageio()
    found = spec.load_description(package, perform_io_checks=False)
    assert found.validation_summary.status == "valid-format"
    # Pictures of the tensors are recommended, but boxes and points have none.
    warnings = [w for detail in found.validation_summary.details for w in detail.warnings]
    assert {str(w.loc[-1]) for w in warnings} <= {"sample_tensor", "tags"}
    assert sum(w.loc[-1] == "sample_tensor" for w in warnings) == 7

    content = {k: v for k, v in _description(package).items() if k not in ("authors", "cite")}
    with zipfile.ZipFile(package) as archive, spec.ValidationContext(root=archive, log_warnings=False) as context:
        summary = core.test_model(spec.build_description(content, context=context), devices=["cpu"])
    assert summary.status == "passed", summary.format()
    names = [detail.name for detail in summary.details]
    assert sum("size parameter n" in name for name in names) == 3  # images of one to three pixels, too


class TestAdaptor:
    def test_prompts_equal_segment_anything(self, adaptor, package, tiny_predictor):
        image, boxes, points, labels, masks, _ = _example(package)
        found, scores, embeddings = adaptor(image, boxes, points, labels, masks)
        tiny_predictor.set_image(image[0].permute(1, 2, 0).numpy())
        transform, size = ResizeLongestSide(256), (60, 80)
        expected, ious, _ = tiny_predictor.predict_torch(
            transform.apply_coords_torch(points[0], size), labels[0], transform.apply_boxes_torch(boxes[0], size),
            masks[0], multimask_output=False,
        )
        assert (found[0] != expected).float().mean() < 1e-3
        assert found.dtype == torch.uint8
        torch.testing.assert_close(scores[0], ious, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(embeddings, tiny_predictor.features)

    def test_embedding_belongs_to_the_image(self, adaptor, package, monkeypatch):
        image, boxes = _example(package)[:2]
        other = image.flip(-1).contiguous()
        fresh = adaptor(other, boxes)
        first = adaptor(image, boxes)
        assert not torch.equal(first[2], fresh[2])
        for expected, found in zip(fresh, adaptor(other, boxes)):
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
        with pytest.raises(InvalidInputError):
            adaptor(image, boxes, embeddings=torch.zeros(1, 256, 2, 2))
        assert torch.equal(adaptor(image, boxes)[2], first[2])
        adaptor(other, boxes)
        monkeypatch.setattr(adaptor.sam.image_encoder, "forward", None)  # the same image is not encoded again
        assert torch.equal(adaptor(other.clone(), boxes)[0], fresh[0])
        # Embeddings that are passed are used, and are not taken for those of the image afterwards.
        assert torch.equal(adaptor(other, boxes, embeddings=first[2])[2], first[2])
        with pytest.raises(TypeError):
            adaptor(other, boxes)

    def test_automatic_segmentation(self, package, tiny_checkpoint, tiny_predictor, tiny_decoder):
        image = _example(package)[0]
        tiny_predictor.set_image(image[0].permute(1, 2, 0).numpy())
        segmenter = InstanceSegmentationWithDecoder(tiny_predictor, tiny_decoder)
        names = ("features", "input_size", "original_size")
        segmenter.initialize(image[0, 0].numpy(), {name: getattr(tiny_predictor, name) for name in names})
        maps = segmenter.get_state()
        options = {  # with which the random decoder finds something
            "foreground_threshold": float(np.median(maps["foreground"])),
            "center_distance_threshold": float(np.median(maps["center_distances"])),
            "boundary_distance_threshold": float(np.median(maps["boundary_distances"])),
        }
        expected = segmenter.generate(**options)
        ids = np.unique(expected[expected > 0])
        assert len(ids) > 1

        state = torch.load(tiny_checkpoint, weights_only=True)
        state["settings"] |= {"automatic_segmentation": options}
        adaptor = PredictorAdaptor("vit_t")
        adaptor.load_state_dict(state)
        masks, scores, embeddings = adaptor(image)
        np.testing.assert_array_equal(masks[0, :, 0].numpy(), expected == ids[:, None, None])
        np.testing.assert_array_equal(scores.numpy(), np.ones((1, len(ids), 1)))
        np.testing.assert_array_equal(adaptor.instance_labels(image, embeddings), expected)

    def test_many_objects_in_batches(self, adaptor, package):
        image, boxes = _example(package)[:2]
        many = adaptor(image, boxes[:, :1].repeat(1, 40, 1))[0]
        assert many.shape == (1, 40, 1, 60, 80)
        assert (many != many[:, :1]).float().mean() < 1e-3

    def test_without_decoder_and_prompts(self, tiny_sam, package):
        adaptor = PredictorAdaptor("vit_t")
        state = {"model_state": tiny_sam.state_dict(), "settings": {"image_size": 256}}
        result = adaptor.load_state_dict(state, strict=True)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        image = _example(package)[0]
        masks, scores, embeddings = adaptor(image)
        assert (masks.shape, scores.shape, embeddings.shape) == ((1, 1, 1, 60, 80), (1, 1, 1), (1, 256, 16, 16))
        with pytest.raises(DecoderMissingError):
            adaptor.instance_labels(image)

    def test_nothing_is_found_in_a_blank_image(self, adaptor):
        masks, scores, _ = adaptor(torch.zeros(1, 3, 20, 30, dtype=torch.uint8))
        assert (masks.shape, scores.shape) == ((1, 0, 1, 20, 30), (1, 0, 1))
        assert adaptor.instance_labels(torch.zeros(1, 3, 20, 30, dtype=torch.uint8)).max() == 0

    def test_evaluation_mode_stays(self, adaptor):
        assert not any(module.training for module in adaptor.train().modules())

    def test_mistakes(self, adaptor, package):
        image, boxes, points, labels, masks, _ = _example(package)
        with pytest.raises(ValueError, match="batch size must be 1"):
            adaptor(image.repeat(2, 1, 1, 1))
        with pytest.raises(AssertionError, match="belong together"):
            adaptor(image, point_prompts=points)
        with pytest.raises(PromptError, match="same objects"):
            adaptor(image, boxes[:, :1], points, labels)
        with pytest.raises(PromptError, match="box_prompts must have"):
            adaptor(image, boxes[..., :3])
        with pytest.raises(PromptError, match="64, 64"):
            adaptor(image, mask_prompts=torch.zeros(1, 2, 1, 256, 256))
        with pytest.raises(InvalidInputError, match="values from 0 to 255"):
            adaptor(image / 255.0)
        with pytest.raises(InvalidInputError, match="features have the shape"):
            adaptor(image, embeddings=torch.zeros(1, 256, 64, 64))
        with pytest.raises(NotInitializedError):
            PredictorAdaptor("vit_t")(image)
        with pytest.raises(InvalidInputError, match="vit_t"):
            PredictorAdaptor("vit_tiny"[:4])
        with pytest.raises(CheckpointError, match="vit_t"):
            PredictorAdaptor("vit_b").load_state_dict(adaptor.sam.state_dict())
        with pytest.raises(InvalidInputError, match="strict"):
            adaptor.load_state_dict(adaptor.sam.state_dict(), strict=False)


class TestExport:
    @pytest.mark.slow
    def test_plain_weights_of_a_vit_b(self, tmp_path, without_checks):
        """A ViT-B without decoder: weights that any program for Segment Anything reads; canvas from the weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sam = build_sam("vit_b", image_size=64)
        torch.save(sam.state_dict(), tmp_path / "b.pt")
        image, labels = (array[:40, :40] for array in _scene())
        export_sam_model(image, labels > 0, "vit_b", "Random B", tmp_path / "b.zip", tmp_path / "b.pt")
        with zipfile.ZipFile(tmp_path / "b.zip") as archive:
            assert set(archive.namelist()) == FILES - {"vit_t.pt"} | {"vit_b.pt"}
            with archive.open("vit_b.pt") as file:
                weights = torch.load(file, weights_only=True)
        assert set(weights) == set(sam.state_dict())
        # One object is enough. Mask prompts and embeddings are as large as the canvas makes them.
        assert _read(tmp_path / "b.zip", "mask_prompts.npy").shape == (1, 1, 1, 16, 16)
        assert _read(tmp_path / "b.zip", "embeddings.npy").shape == (1, 256, 4, 4)

    def test_what_is_given_is_taken(self, tiny_decoder_state, tmp_path, loaded_once, caplog):
        (tmp_path / "mine.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (tmp_path / "text.md").write_text("# Mine\n\n## How we did the validation\n\nWell.", encoding="utf-8")
        path = tmp_path / "a.zip"
        export_sam_model(
            *_scene(), "vit_t", "Tiny model", path, documentation=tmp_path / "text.md",
            covers=[tmp_path / "mine.png"], description="Mine.", tags=["mine"], version="1.2", id="ada/mine",
            maintainers=[{"github_user": "nobody-of-that-name"}], uploader={"email": "ada@example.org"},
            attach_decoder=True,
        )
        description = _description(path)
        assert [cover["source"] for cover in description["covers"]] == ["mine.png"]
        assert (description["description"], description["tags"], description["id"]) == ("Mine.", ["mine"], "ada/mine")
        text = _read(path, "documentation.md").decode()
        assert text.startswith("# Mine\n\n## How we did the validation")
        assert "## Validation" not in text
        assert "states no license" in caplog.text
        assert "states no authors" in caplog.text
        assert not {"license", "authors"} & set(description)
        with zipfile.ZipFile(path) as archive:
            assert set(archive.namelist()) == FILES - {"cover.jpeg"} | {"mine.png", "vit_t_decoder.pt"}
            with archive.open("vit_t_decoder.pt") as file:
                assert set(torch.load(file, weights_only=True)) == set(tiny_decoder_state)

    def test_refused_before_or_without_writing(self, tmp_path, monkeypatch, loaded_once):
        image, labels = _scene()
        path = tmp_path / "a.zip"

        def export(*args, **kwargs):
            export_sam_model(*args[:2], "vit_t", kwargs.pop("name", "Tiny model"), path, **kwargs)

        with pytest.raises(InvalidTypeError, match="'documentation'"):
            export(image, labels, documentatio="x")
        with pytest.raises(NoObjectsError):
            export(image, np.zeros_like(labels))
        with pytest.raises(InvalidInputError, match="same shape"):
            export(image, labels[:-1])
        with pytest.raises(InvalidInputError, match="constant"):
            export(np.ones_like(image), labels)
        with pytest.raises(MissingFileError, match="missing.png"):
            export(image, labels, covers=["missing.png"])
        with pytest.raises(MissingFileError, match="missing.md"):
            export(image, labels, documentation="missing.md")
        with pytest.raises(InvalidInputError, match="name"):
            export(image, labels, name="a/b")
        with pytest.raises(InvalidInputError, match="license"):
            export(image, labels, license="my own")
        monkeypatch.setattr(PredictorAdaptor, "_segment_prompts", lambda self, **kwargs: (
            torch.zeros(2, 1, 60, 80, dtype=torch.bool), torch.zeros(2, 1)
        ))
        with pytest.raises(NoObjectsError, match="finds nothing"):
            export(image, labels)
        assert list(tmp_path.iterdir()) == []
        path.write_bytes(b"mine")
        with pytest.raises(OutputExistsError, match="overwrite"):
            export(image, labels)
        assert path.read_bytes() == b"mine"

    def test_package_that_gives_other_masks_is_not_written(self, tiny_model, tmp_path, monkeypatch):
        original = model_export._make_example
        monkeypatch.setattr(model_export, "_load_model", lambda *args: tiny_model)

        def other(*args):
            example = original(*args)
            return example | {"masks": 1 - example["masks"]}

        monkeypatch.setattr(model_export, "_make_example", other)
        with pytest.raises(ModelError, match="other masks"):
            export_sam_model(*_scene(), "vit_t", "Tiny model", tmp_path / "a.zip")
        assert list(tmp_path.iterdir()) == []

    def test_decoder_only_checkpoint_says_what_to_do(self, tiny_checkpoint, tmp_path):
        content = torch.load(tiny_checkpoint, weights_only=True)
        content["model_state"] = {k: v for k, v in content["model_state"].items() if k.startswith("image_encoder.")}
        torch.save(content, tmp_path / "encoder.pt")
        with pytest.raises(CheckpointError, match="export_instance_segmentation_model"):
            export_sam_model(*_scene(), "vit_t", "Tiny model", tmp_path / "a.zip", tmp_path / "encoder.pt")

    def test_bioimageio_is_optional(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "bioimageio.core", None)
        with pytest.raises(MissingPackageError, match=r"micro_sam\[bioimageio\]"):
            export_sam_model(*_scene(), "vit_t_lite", "Tiny model", tmp_path / "a.zip")


class TestImport:
    def test_masks_come_back_bit_for_bit(self, package, tiny_checkpoint, local_models):
        spec = import_model(package)
        assert (spec.name, spec.modes) == ("Tiny_test", ("ais", "apg", "amg"))
        assert "Tiny_test" in list_models()
        folder = local_models.parent / "imported" / "Tiny_test"
        assert {p.name for p in folder.iterdir()} == {"vit_t.pt", "rdf.yaml", "documentation.md"}
        image, _ = _scene()
        image = np.repeat(image[..., None], 3, axis=2).astype(np.uint8)
        results = []
        for model in (("Tiny_test",), ("vit_t", tiny_checkpoint)):
            predictor, decoder = get_predictor_and_decoder(*model, device="cpu")
            predictor.set_image(image)
            masks, scores, logits = predictor.predict(box=np.array([20, 35, 40, 55]))
            maps = decoder(predictor.features, predictor.input_size, predictor.original_size).numpy()
            results.append((masks, scores, logits, maps))
        for found, expected in zip(*results):
            np.testing.assert_array_equal(found, expected)

    def test_a_folder_and_a_description_are_packages_too(self, package, tmp_path, local_models):
        with zipfile.ZipFile(package) as archive:
            archive.extractall(tmp_path / "folder")
        assert import_model(tmp_path / "folder", "one").name == "one"
        assert import_model(tmp_path / "folder" / "rdf.yaml", "two").name == "two"

    def test_existing_models_are_kept(self, package, local_models):
        first = import_model(package, "mine")
        with pytest.raises(OutputExistsError, match="overwrite"):
            import_model(package, "mine")
        assert import_model(package, "mine", overwrite=True) == first
        with pytest.raises(InvalidInputError, match="published"):
            import_model(package, "vit_t_lite")
        with pytest.raises(InvalidInputError, match="not allowed"):
            import_model(package, "../mine")
        assert get_sam_model("mine", device="cpu").model.image_encoder.img_size == 256

    def test_earlier_packages(self, tiny_sam, tiny_decoder_state, tmp_path, local_models):
        """Plain weights with the decoder as attachment, in the notation of the formats 0.4 and 0.5."""
        torch.save({"model_state": tiny_sam.state_dict(), "settings": {"image_size": 256}}, tmp_path / "vit_t.pt")
        torch.save(tiny_decoder_state, tmp_path / "vit_t_decoder.pt")
        for number, attachments in enumerate((["vit_t_decoder.pt"], {"files": ["vit_t_decoder.pt"]})):
            content = {"type": "model", "name": "Old", "attachments": attachments,
                       "weights": {"pytorch_state_dict": {"source": "vit_t.pt"}}}
            (tmp_path / "rdf.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
            spec = import_model(tmp_path, f"old{number}")
            assert spec.decoder_path is not None
            get_predictor_and_decoder(spec.name, device="cpu")

    def test_packages_that_cannot_be_used(self, package, tmp_path, local_models):
        with zipfile.ZipFile(package) as archive:
            archive.extractall(tmp_path / "p")
        good = yaml.safe_load((tmp_path / "p" / "rdf.yaml").read_bytes())
        entry = good["weights"]["pytorch_state_dict"]

        def refuse(error, match, **changes):
            (tmp_path / "p" / "rdf.yaml").write_text(yaml.safe_dump(good | changes), encoding="utf-8")
            with pytest.raises(error, match=match):
                import_model(tmp_path / "p", "refused")

        def weights(**changes):
            return {"weights": {"pytorch_state_dict": entry | changes}}

        refuse(PackageError, "not a model", type="dataset")
        refuse(PackageError, "onnx", weights={"onnx": {"source": "a.onnx"}})
        refuse(PackageError, "whole package", **weights(source="https://example.org/vit_t.pt"))
        refuse(PackageError, "outside", **weights(source="../vit_t.pt"))
        refuse(PackageError, "no file", **weights(source="vit_b.pt"))
        refuse(PackageError, "damaged", **weights(sha256="0" * 64))
        torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "p" / "unet.pt")
        refuse(PackageError, "no Segment Anything model", **weights(source="unet.pt", sha256=None))
        (tmp_path / "p" / "rdf.yaml").write_text("a: [", encoding="utf-8")
        with pytest.raises(PackageError, match="cannot be read"):
            import_model(tmp_path / "p")
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
            archive.writestr("a.txt", "")
        with pytest.raises(PackageError, match="checkpoint need not"):
            import_model(tmp_path / "other.zip")
        (tmp_path / "cut.zip").write_bytes(package.read_bytes()[:5000])
        with pytest.raises(PackageError, match="neither a zip"):
            import_model(tmp_path / "cut.zip")
        with pytest.raises(MissingFileError):
            import_model(tmp_path / "nothing.zip")
        assert not local_models.exists()
        assert not any((local_models.parent / "imported").glob("*"))

    def test_damaged_archive(self, package, tmp_path, local_models):
        content = bytearray(package.read_bytes())
        with zipfile.ZipFile(package) as archive:
            info = archive.getinfo("vit_t.pt")
        position = info.header_offset + 200 + info.compress_size // 2
        content[position:position + 100] = bytes(100)
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(PackageError, match="damaged"):
            import_model(tmp_path / "a.zip", "damaged")
        assert not local_models.exists()


def test_commands(tiny_checkpoint, package, tmp_path, local_models, loaded_once, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, array in zip(("image.tif", "labels.tif"), _scene()):
        tifffile.imwrite(name, array)
    out = Path("a.zip")
    command = [
        "-c", str(tiny_checkpoint), "-i", "image.tif", "--labels", "labels.tif",
        "--name", "From the shell", "-o", str(out), "--license", "MIT", "--author", "Ada", "--maintainer", "nobody",
    ]

    def run(function, arguments, code, text):
        assert function(arguments) == code
        assert text in "".join(capsys.readouterr())

    run(main, command, 0, str(out))
    run(main, command, 1, "--overwrite")
    run(main, [*command, "--overwrite"], 0, str(out))
    run(main, ["-o", str(out)], 2, "--image and --labels and --name")
    run(main_import, [str(out)], 0, "From_the_shell (ais, apg, amg)")
    run(main_import, [str(out)], 1, "overwrite")
    run(main_import, ["image.tif"], 2, "neither a zip")
    np.testing.assert_array_equal(_read(out, "mask.npy"), _read(package, "mask.npy"))
    assert _description(out)["license"] == "MIT"


@pytest.mark.slow
def test_the_model_that_ships(cells_image, cells_labels, tmp_path, local_models):
    path = tmp_path / "lite.zip"
    export_sam_model(cells_image, cells_labels, "vit_t_lite", "Nuclei (vit_t_lite)", path)
    description = _description(path)
    assert description["license"] == "MIT"
    assert description["config"]["micro_sam"]["source_model"] == "vit_t_lite"
    text = _read(path, "documentation.md").decode()
    assert text.startswith("# vit_t_lite")
    assert "BBBC038v1" in text
    assert "![" not in text
    side = get_sam_model("vit_t_lite", device="cpu").model.image_encoder.img_size
    assert _read(path, "mask_prompts.npy").shape[-1] == side // 4
    truth = cells_labels == 2
    assert _iou(_read(path, "mask.npy")[0, 1, 0] > 0, truth) > 0.5

    # Another name has other default thresholds, so they are passed; and the canvas is always that of the weights.
    import_model(path, "lite_again")
    options = {
        "min_size": 25, "center_distance_threshold": 0.6, "boundary_distance_threshold": 0.6, "distance_smoothing": 1.0,
    }
    found = segment(cells_image, model="lite_again", mode="ais", **options)
    segmenter = load_model("vit_t_lite", device="cpu", mode="ais").segmenter(False)
    segmenter.initialize(cells_image)
    expected = segmenter.generate(**options)
    assert expected.max() > 10
    np.testing.assert_array_equal(found, expected)
    adaptor = PredictorAdaptor("vit_t")
    adaptor.load_state_dict(torch.load(io.BytesIO(_read(path, "vit_t.pt")), weights_only=True))
    np.testing.assert_array_equal(adaptor.instance_labels(torch.from_numpy(_read(path, "input.npy"))), expected)


def _iou(a, b):
    return (a & b).sum() / (a | b).sum()
