"""Downloads from a local server that breaks off, and checkpoints of all formats, damaged and hostile ones included."""

import http.server
import os
import pickle
import threading
import types
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from micro_sam.core.errors import (
    CheckpointError,
    DownloadError,
    HashMismatchError,
    MissingFileError,
    OutputWriteError,
    UnsafeCheckpointError,
)
from micro_sam.models import download as download_module
from micro_sam.models import registry
from micro_sam.models.build_sam import build_sam
from micro_sam.models.checkpoints import detect_architecture, load_checkpoint, read_checkpoint, read_decoder
from micro_sam.models.download import ModelRegistry, download
from micro_sam.models.hashing import compute_hash
from micro_sam.models.specs import get_spec

CONTENT = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` with byte ranges; `server.cuts` says after how many bytes each answer breaks off."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        requested = self.headers.get("Range")
        server.requests.append(requested)
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(requested.split("=")[1].rstrip("-")) if requested and server.ranges else 0
        if start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "CHUNK", 1 << 14)
    monkeypatch.setattr(download_module, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.cuts, server.requests, server.ranges, server.status = CONTENT, [], [], True, 200
    server.url = f"http://127.0.0.1:{server.server_port}/weights"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def content_hash(tmp_path_factory):
    path = tmp_path_factory.mktemp("content") / "weights"
    path.write_bytes(CONTENT)
    return compute_hash(path)


class Bar:
    def __init__(self):
        self.total, self.n, self.closed = None, 0, False

    def update(self, n):
        self.n += n

    def close(self):
        self.closed = True


def files_of(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_download(server, content_hash, tmp_path):
    bar, path = Bar(), tmp_path / "models" / "weights"
    assert download(server.url, path, content_hash, bar) == path
    assert path.read_bytes() == CONTENT
    assert (bar.total, bar.n, bar.closed) == (len(CONTENT), len(CONTENT), False)
    assert files_of(path.parent) == ["weights"]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_within_a_call(server, content_hash, tmp_path, ranges):
    server.cuts, server.ranges, bar = [1_000_000, 700_000], ranges, Bar()
    path = tmp_path / "weights"
    download(server.url, path, content_hash, bar)
    assert path.read_bytes() == CONTENT
    assert bar.n == len(CONTENT)
    assert len(server.requests) == 3
    assert int(server.requests[1].removeprefix("bytes=").rstrip("-")) >= 900_000


def test_download_goes_on_in_a_later_call(server, content_hash, tmp_path):
    path = tmp_path / "weights"
    server.cuts = [1_500_000] + [0] * 10
    with pytest.raises(DownloadError) as error:
        download(server.url, path, content_hash)
    for text in ("the next call goes on", server.url, str(path), "put the file at"):
        assert text in str(error.value)
    assert not path.exists()
    (part,) = [name for name in files_of(tmp_path) if name.endswith(".part")]
    kept = (tmp_path / part).stat().st_size
    assert 1_400_000 < kept <= 1_500_000

    server.cuts, server.requests = [], []
    download(server.url, path, content_hash)
    assert server.requests == [f"bytes={kept}-"]
    assert path.read_bytes() == CONTENT
    assert files_of(tmp_path) == ["weights"]


@pytest.mark.parametrize("size", [100_000, len(CONTENT), len(CONTENT) + 5])
def test_damaged_piece_of_an_earlier_call(server, content_hash, tmp_path, size):
    part = tmp_path / f"weights.{content_hash[7:15]}.part"
    part.write_bytes(bytes(size))
    download(server.url, tmp_path / "weights", content_hash)
    assert (tmp_path / "weights").read_bytes() == CONTENT


def test_complete_piece_of_an_earlier_call(server, content_hash, tmp_path):
    (tmp_path / f"weights.{content_hash[7:15]}.part").write_bytes(CONTENT)
    (tmp_path / "weights.01234567.part").write_bytes(b"of an older version")
    download(server.url, tmp_path / "weights", content_hash)
    assert (tmp_path / "weights").read_bytes() == CONTENT
    assert len(server.requests) == 1
    assert files_of(tmp_path) == ["weights"]


def test_wrong_hash(server, content_hash, tmp_path):
    wrong = "xxh128:" + "0" * 32
    with pytest.raises(HashMismatchError, match=f"{content_hash} instead of {wrong}"):
        download(server.url, tmp_path / "weights", wrong)
    assert files_of(tmp_path) == []


def test_no_network(tmp_path, content_hash, server):
    url = server.url
    server.shutdown()
    server.server_close()
    path = tmp_path / "weights"
    with pytest.raises(DownloadError, match="Check the network and proxy") as error:
        download(url, path, content_hash)
    assert f"put the file at {path}" in str(error.value)
    assert isinstance(error.value, ConnectionError)


def test_server_error(server, tmp_path, content_hash):
    server.status = 404
    with pytest.raises(DownloadError, match="answered 404"):
        download(server.url, tmp_path / "weights", content_hash)


def test_folder_that_cannot_be_written(server, tmp_path, content_hash):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputWriteError, match="MICROSAM_CACHEDIR"):
        download(server.url, tmp_path / "file" / "weights", content_hash)


def test_two_downloads_at_once(server, tmp_path, content_hash):
    path, threads, errors = tmp_path / "weights", [], []

    def run():
        try:
            download(server.url, path, content_hash)
        except Exception as error:
            errors.append(error)

    for _ in range(4):
        threads.append(threading.Thread(target=run))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_registry_fetches_keeps_and_replaces(server, tmp_path, content_hash, caplog):
    pooch = ModelRegistry(tmp_path, {"weights": (server.url, content_hash)})
    assert pooch.fetch("weights") == str(tmp_path / "weights")
    assert pooch.fetch("weights", progressbar=True) == str(tmp_path / "weights")
    assert len(server.requests) == 1
    (tmp_path / "weights").write_bytes(b"another version")
    assert pooch.fetch("weights") == str(tmp_path / "weights")
    assert (tmp_path / "weights").read_bytes() == CONTENT
    assert "does not have the hash" in caplog.text


def test_progress_factory_is_called_for_missing_files_only(server, tmp_path, content_hash, monkeypatch):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    keys = {"vit_b_lm": (server.url, content_hash), "vit_b_lm_decoder": (server.url, content_hash)}
    monkeypatch.setattr(registry, "_file_keys", lambda: keys)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "vit_b_lm").write_bytes(CONTENT)  # placed by hand
    bars = {}
    paths = registry.download_sam_model("vit_b_lm", lambda name: bars.setdefault(name, Bar()))
    assert paths == (
        str(tmp_path / "models" / "vit_b_lm"), get_spec("vit_b_lm").hash, str(tmp_path / "models" / "vit_b_lm_decoder"),
    )
    assert list(bars) == ["vit_b_lm_decoder"]
    assert bars["vit_b_lm_decoder"].closed
    assert bars["vit_b_lm_decoder"].n == len(CONTENT)


@pytest.fixture(scope="module")
def plain_state(tiny_sam):
    return tiny_sam.state_dict()


class Foreign:
    """Stands for a class of a trainer: pickled by reference, by instance with state, and as a list or dict."""

    def __init__(self):
        self.loaded = True


class ForeignList(list):
    pass


class ForeignDict(dict):
    pass


def trainer_content(model_state):
    weights = OrderedDict((f"sam.{k}", v) for k, v in model_state.items())
    weights._metadata = OrderedDict(version=1)
    return {
        "iteration": 3, "epoch": 1, "best_metric": np.float64(0.5), "current_metric": 0.5, "train_time": 1.0,
        "model_state": weights, "timestamp": "now", "scheduler_state": {"milestones": Counter([3])},
        "init": {
            "instance": Foreign(), "class": Foreign, "list": ForeignList([1]), "dict": ForeignDict(a=1),
            "method": Foreign().__init__, "dtype": torch.float16, "array": np.arange(3), "bytes": b"\xff",
        },
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_trainer_checkpoint_without_running_its_code(plain_state, tmp_path, legacy):
    path = tmp_path / "best.pt"
    torch.save(trainer_content(plain_state), path, _use_new_zipfile_serialization=not legacy)
    original = pickle.Unpickler
    checkpoint = read_checkpoint(path)
    assert pickle.Unpickler is original
    assert checkpoint.architecture == "vit_t"
    assert list(checkpoint.model_state) == list(plain_state)
    assert all(torch.equal(checkpoint.model_state[k], v) for k, v in plain_state.items())
    assert f"{__name__}.Foreign" in checkpoint.refused
    init = checkpoint.state["init"]
    assert not isinstance(init["instance"], Foreign)
    assert "Foreign" in repr(init["instance"])
    assert init["dtype"] is torch.float16
    assert (init["array"] == np.arange(3)).all()
    assert init["bytes"] == b"\xff"
    assert checkpoint.state["best_metric"] == 0.5
    state, weights = load_checkpoint(path)
    assert state["iteration"] == 3
    assert list(weights) == list(plain_state)


class Command:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def danger():
    raise AssertionError("code from a checkpoint was run")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["top", "init", "model_state"])
@pytest.mark.parametrize(("function", "arguments", "name"), [
    (os.system, ("touch {marker}",), "system"),
    (eval, ("open('{marker}', 'w')",), "eval"),
    (danger, (), "danger"),
])
def test_malicious_checkpoint(plain_state, tmp_path, legacy, place, function, arguments, name):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    attack = Command(function, *(a.format(marker=marker) for a in arguments))
    content = {
        "top": attack, "init": trainer_content(plain_state) | {"init": attack}, "model_state": {"model_state": attack},
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    if place == "init" and function is danger:  # an unknown function is replaced like an unknown class
        assert read_checkpoint(path).refused == (f"{__name__}.danger",)
    else:
        with pytest.raises(UnsafeCheckpointError, match=name):
            read_checkpoint(path)
        if place != "init":
            with pytest.raises(UnsafeCheckpointError, match=name):
                read_decoder(path)
    assert not marker.exists()


def test_state_of_functions_is_never_set(tmp_path):
    # GLOBAL torch._utils _rebuild_tensor_v2; BUILD with the slot state {"broken": True}; in a zip like torch's.
    stream = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x06\x00\x00\x00broken\x88s\x86b."
    torch.save({"a": torch.zeros(1)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for name in good.namelist():
            evil.writestr(name, stream if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "evil.pt")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "broken")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_truncated_checkpoint(plain_state, tmp_path, legacy, fraction):
    path = tmp_path / "cut.pt"
    torch.save(dict(plain_state), path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * fraction)])
    with pytest.raises(CheckpointError, match="incomplete or damaged.*again"):
        read_checkpoint(path)


@pytest.mark.parametrize(("content", "match"), [
    (b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
    (b"II*\x00" + bytes(50), "not a checkpoint"),
])
def test_file_that_is_no_checkpoint(tmp_path, content, match):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(path)


def test_missing_checkpoint_and_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone\.pt"):
        read_checkpoint(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="folder"):
        read_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("image.tif", b"x")
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "archive.zip")


@pytest.mark.parametrize(("content", "match"), [
    ([1, 2], "holds list"), ({}, "no weights"), ({"model_state": {}}, "no weights"), ({"a": 1}, "'a' is int"),
    ({"model_state": {"a": torch.zeros(1)}, "decoder_state": 3}, "decoder_state.*int"),
])
def test_content_that_is_no_checkpoint(tmp_path, content, match):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(tmp_path / "file.pt")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"script/{name}", b"\x80\x02cposix\nsystem\n.")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize(("name", "size"), [("vit_b", 256), ("vit_l", 64), ("vit_h", 128)])
def test_architecture_and_image_size_from_the_weights(name, size, tmp_path, tiny_checkpoint):
    with torch.device("meta"):
        shapes = build_sam(name, image_size=size, num_multimask_outputs=2).state_dict()
    assert detect_architecture(shapes) == name
    state = {k: torch.zeros(1, dtype=torch.uint8).expand(v.shape) for k, v in shapes.items()}
    torch.save(state, tmp_path / "weights.pt")
    checkpoint = read_checkpoint(tmp_path / "weights.pt")
    assert (checkpoint.architecture, checkpoint.image_size, checkpoint.num_multimask_outputs) == (name, size, 2)
    assert read_checkpoint(tiny_checkpoint).image_size == 256


@pytest.mark.parametrize(("state", "match"), [
    ({"conv1.weight": torch.zeros(1)}, "no SAM image encoder .*conv1.weight"),
    ({"image_encoder.stem.weight": torch.zeros(1)}, "architecture that is not known"),
    ({"image_encoder.patch_embed.proj.weight": torch.zeros(512, 3, 16, 16)}, "width 512 and 0 blocks"),
    ({"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16), "image_encoder.blocks.0.a": 0},
     "width 768 and 1 blocks"),
    ({"image_encoder.trunk.pos_embed": torch.zeros(1), "memory_encoder.x": 0}, "architecture|SAM 2"),
])
def test_unknown_architecture(state, match):
    with pytest.raises(CheckpointError, match=match):
        detect_architecture(state)


def test_decoder_is_found_in_every_format(tiny_checkpoint, tiny_decoder_state, plain_state, tmp_path):
    def same(state):
        return set(state) == set(tiny_decoder_state) and all(
            torch.equal(v, tiny_decoder_state[k]) for k, v in state.items()
        )

    assert same(read_checkpoint(tiny_checkpoint).decoder_state)
    assert same(read_decoder(tiny_checkpoint)[0])
    torch.save(tiny_decoder_state, tmp_path / "decoder.pt")
    assert same(read_decoder(tmp_path / "decoder.pt")[0])

    # torch-em's UNETR: encoder and decoder under one roof, as its trainer saves them.
    unetr = {f"encoder.{k[14:]}": v for k, v in plain_state.items() if k.startswith("image_encoder.")}
    torch.save({"model_state": unetr | tiny_decoder_state, "init": Foreign()}, tmp_path / "unetr.pt")
    checkpoint = read_checkpoint(tmp_path / "unetr.pt")
    assert same(checkpoint.decoder_state)
    assert checkpoint.architecture == "vit_t"
    assert not checkpoint.is_complete
    assert same(read_decoder(tmp_path / "unetr.pt")[0])

    torch.save(plain_state, tmp_path / "plain.pt")
    assert read_checkpoint(tmp_path / "plain.pt").decoder_state is None
    with pytest.raises(CheckpointError, match="no segmentation decoder"):
        read_decoder(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="Pass it as decoder_path"):
        read_checkpoint(tmp_path / "decoder.pt")
