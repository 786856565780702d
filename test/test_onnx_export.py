"""ONNX files against the networks they come from, run by onnxruntime; the layout of the BioEngine."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.onnx import SamOnnxModel
from segment_anything.utils.transforms import ResizeLongestSide
from skimage.measure import regionprops

from micro_sam.bioimageio import bioengine_export, onnx_export
from micro_sam.bioimageio.bioengine_export import export_bioengine_model, export_image_encoder, export_onnx_model
from micro_sam.bioimageio.onnx_export import export_onnx, export_steps, open_session, write_onnx
from micro_sam.bioimageio.onnx_graphs import (
    Graph,
    MaskDecoderOptions,
    encoder_graph,
    instance_decoder_graph,
    mask_decoder_graph,
)
from micro_sam.core.errors import (
    CheckpointError,
    DecoderMissingError,
    InvalidInputError,
    MissingFileError,
    MissingPackageError,
    ModelError,
    OutputExistsError,
    UnknownModelError,
)
from micro_sam.core.normalize import to_image
from micro_sam.models.decoder import DecoderAdapter
from micro_sam.models.loading import get_predictor_and_decoder

ROOT = Path(__file__).parent.parent
IMAGE = Path(__file__).parent / "data" / "nuclei.png"
LABELS = IMAGE.with_name("nuclei_labels.tif")
SIZE = 128  # canvas of the small network


def iou(one, two):
    return (one & two).sum() / (one | two).sum()


@pytest.fixture(scope="module")
def small_sam():
    """A SAM with the layers of vit_b, but few and narrow, and windows that need padding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        grid, width = SIZE // 16, 32
        sam = Sam(
            ImageEncoderViT(img_size=SIZE, embed_dim=width, depth=2, num_heads=2, out_chans=width, use_rel_pos=True,
                            window_size=3, global_attn_indexes=(1,)),
            PromptEncoder(width, (grid, grid), (SIZE, SIZE), 16),
            MaskDecoder(transformer_dim=width, transformer=TwoWayTransformer(1, width, 2, 32)),
        )
        for name, value in sam.named_parameters():
            if name.endswith(("bias", "pos_embed", "rel_pos_h", "rel_pos_w")):
                torch.nn.init.normal_(value, std=0.05)
    return sam.eval().requires_grad_(False)


class _Model:
    """What `load_parts` gives, for a network that is not one of the registered architectures."""

    def __init__(self, sam):
        self.predictor = self
        self.model = sam


@pytest.fixture
def loads_small_sam(small_sam, monkeypatch):
    """The BioEngine exports the small network, whatever model is named."""
    monkeypatch.setattr(bioengine_export, "load_parts", lambda *_: (_Model(small_sam), ()))


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """The shipped model as ONNX, and what it was exported from with an image set."""
    folder = tmp_path_factory.mktemp("onnx") / "lite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROSAM_CACHEDIR", str(folder.parent / "cache"))
        files = export_onnx("vit_t_lite", folder, quantize=True, verbose=False)
        predictor, decoder = get_predictor_and_decoder("vit_t_lite", device="cpu")
    predictor.set_image(to_image(imageio.imread(IMAGE)))
    return files, predictor, decoder


def run(path, **inputs):
    session = open_session(path)
    values = {name: np.asarray(value, dtype="float32") for name, value in inputs.items()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, values)))


def canvas_image(predictor):
    return predictor.transform.apply_image(to_image(imageio.imread(IMAGE))).transpose(2, 0, 1)[None]


def object_prompts():
    """Centre (x, y) and box (x0, y0, x1, y1) of three objects."""
    objects = sorted(regionprops(imageio.imread(LABELS)), key=lambda o: -o.area)[:3]
    return np.array([o.centroid[::-1] for o in objects]), np.array([[*o.bbox[1::-1], *o.bbox[:1:-1]] for o in objects])


def decode(path, predictor, points, labels, logits=None, embeddings=None):
    """Segment objects with points in pixels of the image."""
    side = predictor.model.prompt_encoder.mask_input_size[0]
    return run(
        path, image_embeddings=predictor.features if embeddings is None else embeddings,
        point_coords=predictor.transform.apply_coords(points, predictor.original_size), point_labels=labels,
        mask_input=np.zeros((len(points), 1, side, side)) if logits is None else logits,
        has_mask_input=[logits is not None], orig_im_size=predictor.original_size,
    )


def padded(points):
    """Points of one per object, with the padding that SAM adds where there is no box."""
    return np.stack([points, np.zeros_like(points)], axis=1), np.tile([1, -1], (len(points), 1))


@torch.no_grad()
def predict(predictor, points=None, boxes=None, logits=None):
    """What segment_anything predicts: all masks for the prompts, as logits."""
    to_canvas = partial(torch.as_tensor, dtype=torch.float32)
    size = predictor.original_size
    masks, ious, low_res = predictor.predict_torch(
        None if points is None else to_canvas(predictor.transform.apply_coords(points[:, None], size)),
        None if points is None else torch.ones(len(points), 1),
        None if boxes is None else to_canvas(predictor.transform.apply_boxes(boxes, size)),
        logits, multimask_output=points is None or boxes is None, return_logits=True,
    )
    best = ious.argmax(1)
    rows = torch.arange(len(ious))
    return masks[rows, best].numpy(), ious[rows, best].numpy(), low_res[rows, best][:, None]


@pytest.mark.slow
def test_encoder_of_the_shipped_model_on_a_real_image(lite):
    files, predictor, _ = lite
    image = canvas_image(predictor)
    found = run(files["encoder"], image=np.concatenate([image, image[..., ::-1]]))["image_embeddings"]
    assert np.abs(found[:1] - predictor.features.numpy()).max() < 1e-3
    assert found.shape[0] == 2
    assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.slow
def test_masks_of_the_shipped_model_on_a_real_image(lite):
    files, predictor, _ = lite
    centres, boxes = object_prompts()
    points, labels = padded(centres)
    expected, ious, low_res = predict(predictor, centres)
    found = decode(files["mask_decoder"], predictor, points, labels)
    assert found["masks"].shape == (3, 1, *predictor.original_size)
    assert np.abs(found["masks"][:, 0] - expected).max() < 1e-3
    assert np.abs(found["low_res_masks"] - low_res.numpy()).max() < 1e-3
    assert np.abs(found["iou_predictions"][:, 0] - ious).max() < 1e-4
    assert min(iou(m > 0, e > 0) for m, e in zip(found["masks"][:, 0], expected)) >= 0.999
    assert expected.max() > 1  # there is something to find

    # A box with a point are three points: the output for unambiguous prompts. Masks of before refine it.
    corners = np.concatenate([centres[:, None], boxes.reshape(-1, 2, 2)], axis=1)
    expected, _, _ = predict(predictor, centres, boxes, low_res)
    found = decode(files["mask_decoder"], predictor, corners, np.tile([1, 2, 3], (3, 1)), low_res)
    assert np.abs(found["masks"][:, 0] - expected).max() < 1e-3
    without = decode(files["mask_decoder"], predictor, corners, np.tile([1, 2, 3], (3, 1)))
    assert np.abs(found["masks"] - without["masks"]).max() > 0.1


@pytest.mark.slow
def test_instance_maps_of_the_shipped_model_on_a_real_image(lite):
    files, predictor, decoder = lite
    assert decoder.normalization == "running"
    maps = decoder(predictor.features, predictor.input_size, predictor.original_size)[0].numpy()
    found = run(files["instance_decoder"], image_embeddings=predictor.features, orig_im_size=predictor.original_size)
    assert list(found) == ["foreground", "center_distances", "boundary_distances"]
    assert max(np.abs(a[0] - b).max() for a, b in zip(found.values(), maps)) < 1e-3
    assert iou(found["foreground"][0] > 0.5, imageio.imread(LABELS) > 0) > 0.7


@pytest.mark.slow
def test_quantised_files_are_smaller_and_nearly_as_good(lite):
    files, predictor, _ = lite
    for part in ("encoder", "mask_decoder"):
        assert files[f"{part}_quantized"].stat().st_size < 0.5 * files[part].stat().st_size
    centres, _ = object_prompts()
    exact = decode(files["mask_decoder"], predictor, *padded(centres))["masks"][:, 0] > 0
    embeddings = run(files["encoder_quantized"], image=canvas_image(predictor))["image_embeddings"]
    found = decode(files["mask_decoder_quantized"], predictor, *padded(centres), embeddings=embeddings)
    found = found["masks"][:, 0] > 0
    assert min(iou(a, b) for a, b in zip(exact, found)) > 0.9
    assert not np.array_equal(exact, found)


@pytest.mark.slow
def test_description_tells_what_is_there(lite):
    files, predictor, _ = lite
    folder = files["encoder"].parent
    description = json.loads((folder / "model.json").read_text())
    assert description["canvas"] == predictor.model.image_encoder.img_size
    assert description["hash"] == predictor._hash
    named = {part[key] for part in description["parts"].values() for key in ("file", "quantized_file") if key in part}
    assert {path.name for path in files.values()} == named == {p.name for p in folder.iterdir()} - {"model.json"}
    assert description["parts"]["encoder"]["inputs"]["image"]["shape"][1] == 3


@pytest.mark.slow
def test_example_of_the_documentation_needs_no_torch(lite, tmp_path):
    files, predictor, _ = lite
    text = (ROOT / "doc" / "onnx.md").read_text(encoding="utf-8")
    example = next(b for b in re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL) if "InferenceSession" in b)
    (tmp_path / "onnx").symlink_to(files["encoder"].parent)
    shutil.copy(ROOT / "micro_sam" / "data" / "nuclei.tif", tmp_path / "image.tif")
    block = "import sys\nsys.modules.update(torch=None, micro_sam=None)\n"
    code = block + example + "\nnp.save('mask.npy', mask)\nnp.save('point.npy', [x, y])\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mask, point = np.load(tmp_path / "mask.npy"), np.load(tmp_path / "point.npy")
    other = SamPredictor(predictor.model)
    other.set_image(to_image(imageio.imread(tmp_path / "image.tif")))
    expected = predict(other, point[None])[0][0] > 0
    assert iou(mask, expected) > 0.99
    assert mask[point[1], point[0]]


@pytest.mark.parametrize(("options", "opset"), [
    (MaskDecoderOptions(), 17),
    (MaskDecoderOptions(return_single_mask=False, return_extra_metrics=True), 17),
    (MaskDecoderOptions(use_stability_score=True, return_extra_metrics=True), 17),
    (MaskDecoderOptions(return_single_mask=False, gelu_approximate=True), 12),
], ids=["single-17", "all-17", "stability-17", "gelu-12"])
def test_options_of_the_mask_decoder(small_sam, options, opset, tmp_path):
    """03-33: approximate GELU works, and each output has a name of its own."""
    graph = mask_decoder_graph(small_sam, options)
    write_onnx(graph, tmp_path / "a.onnx", opset)
    reference = SamOnnxModel(
        small_sam, options.return_single_mask, options.use_stability_score, options.return_extra_metrics
    )
    for example in graph.examples:
        expected = reference(**example)
        found = run(tmp_path / "a.onnx", **example)
        names = ["masks", "iou_predictions", "low_res_masks"]
        names[2:2] = ["stability_scores", "areas"] if options.return_extra_metrics else []
        assert list(found) == names
        tolerance = {"areas": 3, "stability_scores": 1e-2}
        for name, value in zip(names, expected, strict=True):
            difference = np.abs(found[name] - value.numpy()).max()
            if options.gelu_approximate:  # it equals the network with this GELU, or it were refused
                assert difference < 0.1, name
                assert difference > 1e-5 or name == "iou_predictions"
            else:
                assert difference < tolerance.get(name, 1e-3), name


def test_stability_of_an_empty_mask_is_zero(small_sam):
    graph = mask_decoder_graph(small_sam, MaskDecoderOptions(use_stability_score=True))
    assert graph.module._stability(torch.full((1, 2, 4, 4), -5.0)).tolist() == [[0, 0]]


def test_resizing_equals_that_of_segment_anything(small_sam):
    graph = mask_decoder_graph(small_sam, MaskDecoderOptions())
    logits = torch.randn(2, 1, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(3)) * 10
    for size in ((50, 61), (128, 128), (1000, 333), (7, 300)):
        inner = ResizeLongestSide.get_preprocess_shape(*size, SIZE)
        found = graph.module.to_image(logits, torch.tensor(size))
        torch.testing.assert_close(found, small_sam.postprocess_masks(logits, inner, size), rtol=0, atol=1e-3)


def test_encoder_with_weights_in_a_file_of_their_own(small_sam, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_FILE_LIMIT", 1000)
    path = tmp_path / "encoder.onnx"
    assert write_onnx(encoder_graph(small_sam), path, 18)["image_embeddings"] < 1e-4
    assert path.with_name("encoder.onnx.data").stat().st_size > path.stat().st_size / 2
    onnx_export.quantize_onnx("encoder", path, tmp_path / "q.onnx")
    image = np.random.default_rng(0).uniform(0, 255, (4, 3, SIZE, 100))
    exact, found = (run(p, image=image)["image_embeddings"] for p in (path, tmp_path / "q.onnx"))
    assert exact.shape == (4, 32, SIZE // 16, SIZE // 16)
    assert 1e-4 < np.abs(exact - found).mean() < 0.1 * exact.std()


def test_instance_decoder_with_statistics_of_each_sample(tiny_decoder, tmp_path):
    """The published decoders normalise by the sample, so results must not depend on what shares a batch."""
    assert tiny_decoder.normalization == "instance"
    assert max(write_onnx(instance_decoder_graph(tiny_decoder), tmp_path / "a.onnx", 18).values()) < 1e-4
    one, other = np.random.default_rng(0).normal(size=(2, 1, 256, 16, 16))
    maps = tiny_decoder(torch.tensor(one).float(), (256, 192), (40, 30))[0].numpy()
    for batch in ([one], [one, other * 5]):
        found = run(tmp_path / "a.onnx", image_embeddings=np.concatenate(batch), orig_im_size=[40, 30])
        assert max(np.abs(a[0] - b).max() for a, b in zip(found.values(), maps)) < 1e-4
    running = DecoderAdapter.__new__(DecoderAdapter)
    running.__dict__.update(tiny_decoder.__dict__, normalization="running")
    assert np.abs(running(torch.tensor(one).float(), (256, 192), (40, 30))[0].numpy() - maps).max() > 1e-3


class _Frozen(torch.nn.Module):
    """A network that the former exporter gets wrong: the sum becomes a constant."""

    def forward(self, x):
        return x + x.sum().item()


@pytest.mark.parametrize(("values", "difference"), [((1.0, 2.0), "2"), ((1.0, 1.0, float("nan"), 1.0), "nan")])
def test_a_file_that_differs_from_the_network_is_refused(values, difference, tmp_path):
    examples = tuple({"x": torch.full((2,), value)} for value in values)
    graph = Graph("encoder", _Frozen(), ("y",), {}, examples)
    with pytest.raises(ModelError, match=rf"differs from the network by {difference} in 'y'"):
        write_onnx(graph, tmp_path / "a.onnx", 17)


def test_another_version_of_the_operators_than_asked_for_is_refused(tmp_path, monkeypatch):
    """The current exporter only logs it if it cannot convert."""
    former = onnx_export._with_former_exporter
    monkeypatch.setattr(onnx_export, "_with_current_exporter", lambda graph, path, opset: former(graph, path, 17))
    graph = Graph("encoder", torch.nn.ReLU(), ("y",), {}, ({"x": torch.ones(2)}, {"x": torch.ones(2)}))
    with pytest.raises(ModelError, match="cannot be exported with opset 20 by torch .*: it writes version 17"):
        write_onnx(graph, tmp_path / "a.onnx", 20)


def test_nothing_is_left_after_a_failure_or_a_cancellation(tiny_checkpoint, tmp_path, monkeypatch):
    """03-33: no empty model file."""
    def fail(*args, **kwargs):
        Path(tmp_path / "seen").touch()
        raise RuntimeError("no such operator\nmore")

    steps = export_steps(tiny_checkpoint, tmp_path / "a" / "onnx")
    assert next(steps).total == 3
    steps.close()
    assert not any((tmp_path / "a").iterdir())

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match="encoder cannot be exported with opset 18.*no such operator. Try"):
        export_onnx(tiny_checkpoint, tmp_path / "a" / "onnx", verbose=False)
    with pytest.raises(ModelError, match="mask_decoder cannot be exported with opset 17"):
        export_onnx_model("vit_t", tmp_path / "a", checkpoint_path=tiny_checkpoint)
    assert (tmp_path / "seen").exists()
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.usefixtures("loads_small_sam")
def test_nothing_is_replaced_silently(tiny_checkpoint, tmp_path):
    folder = tmp_path / "sam-x-encoder"
    export = partial(export_image_encoder, "vit_b", tmp_path, "x")
    export()
    with pytest.raises(OutputExistsError, match="Pass overwrite=True"):
        export()
    (folder / "config.pbtxt").write_text("old")
    export(overwrite=True)
    assert (folder / "config.pbtxt").read_text() != "old"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="notes.txt exists and is not part of an export"):
        export(overwrite=True)
    for target in (folder, folder / "notes.txt"):
        with pytest.raises(OutputExistsError, match="Choose another folder"):
            export_onnx(tiny_checkpoint, target, overwrite=True)
    # Both models are looked at before the first is written.
    with pytest.raises(OutputExistsError):
        export_bioengine_model("vit_b", tmp_path, 17, "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]


def test_wrong_arguments_are_named(tiny_checkpoint, tmp_path):
    bare = tmp_path / "bare.pt"
    content = torch.load(tiny_checkpoint, weights_only=True)
    torch.save({"model_state": content["model_state"], "settings": content["settings"]}, bare)
    cases = [
        (UnknownModelError, "Did you mean 'vit_t_lite'", ("vit_t_light",), {}),
        (MissingFileError, "no_such.pt", ("no_such.pt",), {}),
        (InvalidInputError, "Unknown part 'decoder'", (tiny_checkpoint,), {"parts": ["decoder"]}),
        (InvalidInputError, "no part to export", (tiny_checkpoint,), {"parts": []}),
        (InvalidInputError, "opset must be an integer from 18 to", (tiny_checkpoint,), {"opset": 17}),
        (InvalidInputError, "but is 1000", (tiny_checkpoint,), {"opset": 1000}),
        (DecoderMissingError, "no instance decoder", (bare,), {"parts": ["instance_decoder"]}),
    ]
    for error, message, args, options in cases:
        with pytest.raises(error, match=message):
            export_onnx(*args, tmp_path / "a", **options)
    encoder_only = {k: v for k, v in content["model_state"].items() if k.startswith("image_encoder.")}
    torch.save(content | {"model_state": encoder_only}, bare)
    with pytest.warns(UserWarning, match="no weights for prompts"), \
            pytest.raises(CheckpointError, match="no weights for prompts. Leave 'mask_decoder' out"):
        export_onnx(bare, tmp_path / "a", parts=["mask_decoder"])
    with pytest.raises(InvalidInputError, match="Leave out slashes"):
        export_image_encoder("vit_t", tmp_path, "a/b", tiny_checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["bare.pt"]


def test_missing_packages_are_named_with_their_extra(tmp_path, monkeypatch):
    """03-33: what the exporter needs is declared."""
    find = onnx_export.importlib.util.find_spec
    monkeypatch.setattr(onnx_export.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else find(n))
    for export in (partial(export_onnx, "vit_t_lite", tmp_path / "a"), partial(export_onnx_model, "vit_t", tmp_path)):
        with pytest.raises(MissingPackageError, match=r"needs onnxscript, which is not .*\"micro_sam\[export\]\""):
            export()
    assert list(tmp_path.iterdir()) == []


def _model_config():
    """The fields of Triton's `ModelConfig` (github.com/triton-inference-server/common) that an export uses."""
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="triton", syntax="proto3")
    kinds = {"string": 9, "int32": 5, "int64": 3, "enum": 14, "message": 11}

    def message(parent, title, **fields):
        proto = parent.add(name=title)
        for field, (number, kind, repeated, type_name) in fields.items():
            proto.field.add(name=field, number=number, type=kinds[kind], label=3 if repeated else 1,
                            **({"type_name": f".triton.{type_name}"} if type_name else {}))
        return proto

    file.enum_type.add(name="DataType").value.add(name="TYPE_INVALID", number=0)
    for name, number in (("TYPE_INT64", 5), ("TYPE_FP32", 11)):
        file.enum_type[0].value.add(name=name, number=number)
    file.enum_type.add(name="Kind").value.add(name="KIND_AUTO", number=0)
    file.enum_type[1].value.add(name="KIND_CPU", number=2)
    tensor = {"name": (1, "string", False, ""), "data_type": (2, "enum", False, "DataType")}
    message(file.message_type, "Input", **tensor, dims=(4, "int64", True, ""))
    message(file.message_type, "Output", **tensor, dims=(3, "int64", True, ""))
    message(file.message_type, "Group", kind=(4, "enum", False, "Kind"), count=(2, "int32", False, ""))
    message(file.message_type, "Parameter", string_value=(1, "string", False, ""))
    config = message(
        file.message_type, "ModelConfig", name=(1, "string", False, ""), platform=(2, "string", False, ""),
        max_batch_size=(4, "int32", False, ""), input=(5, "message", True, "Input"),
        output=(6, "message", True, "Output"), instance_group=(7, "message", True, "Group"),
        parameters=(14, "message", True, "ModelConfig.ParametersEntry"), backend=(17, "string", False, ""),
    )
    entry = message(config.nested_type, "ParametersEntry", key=(1, "string", False, ""),
                    value=(2, "message", False, "Parameter"))
    entry.options.map_entry = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


def test_layout_of_the_bioengine(tiny_checkpoint, tiny_sam, tmp_path):
    export_bioengine_model("vit_t", tmp_path, opset=12, checkpoint_path=tiny_checkpoint, return_extra_metrics=True)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    encoder, decoder = "sam-vit_t-encoder", "sam-vit_t-decoder"
    assert files == [f"{decoder}/1/model.onnx", f"{decoder}/config.pbtxt",
                     f"{encoder}/1/model.pt", f"{encoder}/config.pbtxt"]
    config = _model_config()
    text = (tmp_path / encoder / "config.pbtxt").read_text()
    found = text_format.Parse(text, config())
    assert (found.name, found.backend, found.platform) == (encoder, "pytorch", "pytorch_libtorch")
    assert found.max_batch_size == 1
    assert found.parameters["INFERENCE_MODE"].string_value == "true"
    assert [(t.name, t.data_type, list(t.dims)) for t in found.input] == [("input0__0", 11, [3, -1, -1])]
    assert [(t.name, t.data_type, list(t.dims)) for t in found.output] == [("output0__0", 11, [256, 16, 16])]
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(5))
    with pytest.warns(FutureWarning, match="deprecated"):
        traced = torch.jit.load(tmp_path / encoder / "1" / "model.pt")
    torch.testing.assert_close(traced(image), tiny_sam.image_encoder(image), rtol=0, atol=1e-4)

    found = text_format.Parse((tmp_path / decoder / "config.pbtxt").read_text(), config())
    assert (found.name, found.backend, found.max_batch_size) == (decoder, "onnxruntime", 0)
    assert [(g.kind, g.count) for g in found.instance_group] == [(2, 1)]
    session = open_session(tmp_path / decoder / "1" / "model.onnx")
    for declared, actual in ((found.input, session.get_inputs()), (found.output, session.get_outputs())):
        assert [t.name for t in declared] == [t.name for t in actual]
        assert [len(t.dims) for t in declared] == [len(t.shape) for t in actual]
    assert list(found.input[1].dims) == [-1, -1, 2]
    assert [t.data_type for t in found.output] == [11, 11, 11, 5, 11]


@pytest.mark.usefixtures("loads_small_sam")
def test_quantised_model_of_the_bioengine(small_sam, tmp_path):
    export_onnx_model("vit_b", tmp_path, export_name="x", quantize_model=True)
    path = tmp_path / "sam-x-decoder" / "1" / "model_quantized.onnx"
    example = mask_decoder_graph(small_sam, MaskDecoderOptions()).examples[0]
    exact, found = (run(p, **example)["low_res_masks"] for p in (path.with_name("model.onnx"), path))
    assert 1e-5 < np.abs(exact - found).max() < 0.5
