"""Sample data: what comes with the package, and downloads from a local server."""

import hashlib
import http.server
import io
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile
import yaml

from micro_sam import sample_data
from micro_sam.core.errors import DownloadError, HashMismatchError, InvalidInputError, OutputWriteError

MANIFEST = yaml.safe_load((Path(sample_data.__file__).parent / "napari.yaml").read_text())
_TIMES_OUT = "http://127.0.0.1:9/nobody"  # the port "discard": nobody listens there


def _encode(write, suffix, image) -> bytes:
    buffer = io.BytesIO()
    write(buffer, image, **({"extension": suffix} if suffix == ".png" else {}))
    return buffer.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def server(monkeypatch):
    """Serves small files in place of the samples; `requests` lists what was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path[1:])
            content = server.files.get(self.path[1:])
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.files = [], {}
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def publish(name: str, content: bytes, **changes) -> None:
        sample = sample_data._SAMPLES[name]
        server.files[sample.file] = content
        url = f"http://127.0.0.1:{server.server_port}/{sample.file}"
        new = replace(sample, urls=(url,), sha256=hashlib.sha256(content).hexdigest(), **changes)
        monkeypatch.setitem(sample_data._SAMPLES, name, new)

    server.publish = publish
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_file_is_downloaded_once(server, tmp_path, rgb_image):
    server.publish("livecell", _encode(imageio.imwrite, ".png", rgb_image))
    path = sample_data.fetch_livecell_example_data(tmp_path / "new" / "folder")
    assert path == str(tmp_path / "new" / "folder" / "livecell-2d-image.png")
    np.testing.assert_array_equal(imageio.imread(path), rgb_image)
    assert sample_data.fetch_livecell_example_data(tmp_path / "new" / "folder") == path
    assert server.requests == ["livecell-2d-image.png"]
    Path(path).write_bytes(b"damaged")
    sample_data.fetch_livecell_example_data(tmp_path / "new" / "folder")
    np.testing.assert_array_equal(imageio.imread(path), rgb_image)


def test_archive_is_unpacked_and_repaired(server, tmp_path, monkeypatch, cells_labels):
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
    frames = [np.roll(cells_labels, n, 0) for n in range(3)]
    content = {f"masks/mask_{n:04}.tif": _encode(tifffile.imwrite, ".tif", f) for n, f in enumerate(frames)}
    members = tuple(f"mask_{n:04}.tif" for n in range(3))
    server.publish("tracking_segmentation", _zip({**content, "masks/other.tif": b"x"}), members=members)
    ((labels, properties, kind),) = sample_data.sample_data_segmentation()
    np.testing.assert_array_equal(labels, np.stack(frames))
    assert (properties, kind) == ({"name": "segmentation"}, "labels")
    folder = Path(sample_data.fetch_tracking_segmentation_data(tmp_path / "sample_data"))
    assert folder == tmp_path / "sample_data" / "hela-ctc-01-gt.zip.unzip" / "masks"
    assert sorted(p.name for p in folder.iterdir()) == list(members)

    size = (folder / members[0]).stat().st_size
    (folder / members[0]).write_bytes(b"\0" * size)
    (folder / members[1]).unlink()
    np.testing.assert_array_equal(sample_data.sample_data_segmentation()[0][0], labels)
    assert len(server.requests) == 1


def test_series_and_stacks_become_layers(server, cells_image, rgb_image):
    images = [cells_image, cells_image[:20], rgb_image]
    files = {f"series/im{n}.tif": _encode(tifffile.imwrite, ".tif", image) for n, image in enumerate(images)}
    server.publish("image_series", _zip(files))
    layers = sample_data.sample_data_image_series()
    assert [properties["name"] for _, properties in layers] == ["img-0", "img-1", "img-2"]
    assert all(np.array_equal(a, b) for (a, _), b in zip(layers, images))

    planes = {f"Lucchi++/Test_In/mask{n:04}.png": _encode(imageio.imwrite, ".png", cells_image) for n in range(165)}
    server.publish("lucchi", _zip(planes))
    ((volume, properties),) = sample_data.sample_data_3d()
    assert (volume.shape, properties["name"]) == ((165, 128, 160), "lucchi++")


def test_offline_says_where_to_put_the_file(server, monkeypatch, tmp_path, rgb_image):
    content = _encode(imageio.imwrite, ".png", rgb_image)
    server.publish("hela_2d", content)
    url = sample_data._SAMPLES["hela_2d"].urls[0]
    server.files.clear()
    with pytest.raises(DownloadError) as error:
        sample_data.fetch_hela_2d_example_data(tmp_path)
    for text in ("hela-2d-image.png", url, "404", f"put the file at {tmp_path / 'hela-2d-image.png'}"):
        assert text in str(error.value)
    assert list(tmp_path.iterdir()) == [], "nothing incomplete is left"

    (tmp_path / "hela-2d-image.png").write_bytes(content)  # by hand, without a network
    monkeypatch.setitem(sample_data._SAMPLES, "hela_2d", replace(sample_data._SAMPLES["hela_2d"], urls=(_TIMES_OUT,)))
    assert sample_data.fetch_hela_2d_example_data(tmp_path)

    (tmp_path / "hela-2d-image.png").unlink()
    with pytest.raises(DownloadError, match="nobody"):
        sample_data.fetch_hela_2d_example_data(tmp_path)
    monkeypatch.setitem(
        sample_data._SAMPLES, "hela_2d", replace(sample_data._SAMPLES["hela_2d"], urls=(_TIMES_OUT, url))
    )
    server.files["hela-2d-image.png"] = content
    assert sample_data.fetch_hela_2d_example_data(tmp_path), "the second address is tried"


def test_another_file_is_refused(server, tmp_path):
    server.publish("wholeslide", b"the slide")
    server.files["whole-slide-example-image.tif"] = b"<html>please log in</html>"
    with pytest.raises(HashMismatchError, match=r"login page.*put the file at"):
        sample_data.fetch_wholeslide_example_data(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputWriteError, match="MICROSAM_CACHEDIR"):
        sample_data.fetch_wholeslide_example_data(tmp_path / "file")


def test_table_of_samples():
    assert len(sample_data._SAMPLES) == 9
    for sample in sample_data._SAMPLES.values():
        assert len(bytes.fromhex(sample.sha256)) == 32
        assert sample.urls[0].startswith("https://")
        assert bool(sample.members) == sample.file.endswith(".zip")


def test_shipped_samples_need_no_network(monkeypatch):
    monkeypatch.setattr(sample_data, "_download", lambda *args: pytest.fail("asked the network"))
    expected = {"nuclei": (400, 512), "nuclei_3d": (36, 100, 100), "cells_tracking": (10, 216, 216)}
    for name, shape in expected.items():
        ((image, properties),) = getattr(sample_data, f"sample_data_{name}")()
        assert (image.shape, properties["name"]) == (shape, name)
        assert np.ptp(image) > 100
    folder = Path(sample_data.__file__).parent / "data"
    readme = (folder / "README.md").read_text()
    for file in folder.iterdir():
        assert file.stat().st_size < 320_000
        assert file.name == "README.md" or f"`{file.name}`" in readme, "provenance and licence of each file"


def test_manifest_offers_all_samples_but_the_series():
    commands = {c["id"]: c["python_name"] for c in MANIFEST["contributions"]["commands"]}
    offered = {s["command"]: s["key"] for s in MANIFEST["contributions"]["sample_data"]}
    functions = {n for n in vars(sample_data) if n.startswith("sample_data_")} - {"sample_data_image_series"}
    assert {c.removeprefix("micro_sam.") for c in offered} == functions
    assert all(commands[c] == f"micro_sam.sample_data:{c.removeprefix('micro_sam.')}" for c in offered)
    keys = {f"micro_sam-{k}" for k in ("wholeslide", "livecell", "hela2d", "lucchi", "tracking", "segmentation")}
    assert keys <= set(offered.values())
    assert {w["command"] for w in MANIFEST["contributions"]["widgets"]} | set(offered) == set(commands)


def test_synthetic_data():
    image, labels = sample_data.synthetic_data((96, 128), seed=1)
    assert (image.shape, image.dtype, labels.dtype) == ((96, 128), "uint8", "uint64")
    assert set(np.unique(image)) == {0, 255}
    assert labels.max() > 5
    np.testing.assert_array_equal(labels > 0, image > 0)
    np.testing.assert_array_equal(image, sample_data.synthetic_data((96, 128), seed=1)[0])
    volume, ids = sample_data.synthetic_data((3, 96, 128), seed=1)
    assert all(np.array_equal(plane, image) for plane in volume)
    assert all(np.array_equal(plane, labels) for plane in ids)
    with pytest.raises(InvalidInputError, match=r"\(Y, X\)"):
        sample_data.synthetic_data((5,))
