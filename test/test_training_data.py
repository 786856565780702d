"""Training data: transforms, targets, datasets, loaders, splits and their verification."""

import itertools
import pickle
import warnings

import h5py
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from torch_em.data import ConcatDataset, ImageCollectionDataset, SegmentationDataset, TensorDataset
from torch_em.data.sampler import MinInstanceSampler

from micro_sam.core.errors import InvalidInputError, InvalidTypeError, MissingFileError, NoObjectsError
from micro_sam.core.normalize import to_image
from micro_sam.training.data import default_sam_dataset, default_sam_loader
from micro_sam.training.pairs import find_pairs
from micro_sam.training.raw_transforms import (
    ResizeLabelTrafo,
    ResizeRawTrafo,
    get_raw_transform,
    identity,
    normalize_image,
    normalize_to_8bit,
    require_8bit,
)
from micro_sam.training.splits import check_disjoint, split_data
from micro_sam.training.targets import DecoderTarget, InstanceTarget, label_instances
from micro_sam.training.verify import verify_loader

TARGETS = {"with_segmentation_decoder": True}
PLAIN = {"with_segmentation_decoder": False}


@pytest.fixture
def pair_files(tmp_path, cells_image, cells_labels):
    """Paths of the cells as tif files, image and labels."""
    imageio.imwrite(tmp_path / "image.tif", cells_image)
    imageio.imwrite(tmp_path / "labels.tif", cells_labels)
    return str(tmp_path / "image.tif"), str(tmp_path / "labels.tif")


def _dataset(raw, labels, patch_shape=(64, 64), keys=(None, None), **kwargs):
    return default_sam_dataset(raw, keys[0], labels, keys[1], patch_shape, **(PLAIN | kwargs))


# ---------------------------------------------------------------- transforms of images


def test_require_8bit_decides_by_the_values():
    floats = np.linspace(0, 1, 12, dtype="float32").reshape(3, 4)
    assert require_8bit(floats * 0.5).max() == pytest.approx(127.5)
    assert require_8bit(floats * 0.999).max() == pytest.approx(254.745)
    assert require_8bit(floats).max() == 255  # a maximum of exactly 1 is scaled
    dark = np.array([[0, 1]], "uint8")
    assert require_8bit(dark) is dark  # 8 bit is never touched
    assert np.array_equal(require_8bit(np.array([[300, 4096]], "uint16")), [[0, 255]])
    assert np.array_equal(require_8bit(np.array([[-2.0, 0, 2]])), [[0, 127.5, 255]])
    with pytest.raises(InvalidInputError, match="1 NaN"):
        require_8bit(np.array([np.nan, 1.0]))


def test_named_raw_transforms(cells_image):
    for name in ("normalize_minmax", "normalize_percentile", "normalize_image"):
        out = get_raw_transform(name)(cells_image)
        assert (out.min(), out.max(), out.dtype) == (0, 255, np.float32)
    assert get_raw_transform() is require_8bit
    low, high = np.percentile(cells_image, [1, 99])
    expected = np.clip((cells_image - low) / (high - low), 0, 1) * 255
    assert np.allclose(get_raw_transform("normalize_percentile")(cells_image), expected, atol=1e-3)
    assert np.array_equal(normalize_to_8bit(np.full((2, 2), 7)), np.zeros((2, 2)))
    with pytest.raises(InvalidInputError, match="normalize_minmax"):
        get_raw_transform("normalise_minmax")


def test_normalization_is_that_of_inference(rgb_image):
    image = (rgb_image.astype("float32") * [1, 0.3, 5] + 40).astype("uint16")
    ours = normalize_image(np.moveaxis(image, -1, 0))
    assert np.abs(np.moveaxis(ours, 0, -1) - to_image(image).astype(float)).max() <= 1


@pytest.mark.parametrize("name", [None, "normalize_image"])
def test_images_are_normalized_as_a_whole(name, cells_image, cells_labels):
    image = (cells_image.astype("uint16") * 100) + 300
    dataset = _dataset([image], [cells_labels], (32, 32), raw_transform=get_raw_transform(name), is_train=False)
    whole = get_raw_transform(name)(image)
    for x, _ in (dataset[n] for n in range(4)):
        windows = np.lib.stride_tricks.sliding_window_view(whole, (32, 32))
        assert np.isclose(windows, x[0].numpy(), atol=1e-3).all(axis=(2, 3)).any()


def test_resize_transforms_pad_around_the_center(cells_labels, rgb_image):
    padded = ResizeRawTrafo((133, 165))(rgb_image)
    assert padded.shape == (3, 133, 165)
    assert np.array_equal(padded[:, 3:131, 3:163], np.moveaxis(rgb_image, -1, 0))  # 5 pixels: 3 first
    assert ResizeRawTrafo((130, 160), ensure_rgb=True)(rgb_image[..., 0]).shape == (3, 130, 160)
    assert ResizeRawTrafo((3, 130, 160), valid_channels=1, ensure_rgb=False)(rgb_image).shape == (1, 130, 160)
    assert ResizeRawTrafo((130, 160), do_rescaling=True)(rgb_image // 4).max() == 255
    target = ResizeLabelTrafo((133, 165), min_size=25)(cells_labels)  # not square
    assert target.shape == (4, 133, 165)
    assert np.array_equal(target[:, 3:131, 3:163], DecoderTarget(25)(cells_labels))
    assert (target[:, 0].T == [0, 0, 1, 1]).all()
    with pytest.raises(InvalidInputError, match="larger shape"):
        ResizeRawTrafo((100, 200))(rgb_image)


# ---------------------------------------------------------------- targets


def test_target_of_a_square():
    labels = np.zeros((21, 21), "int16")
    labels[5:16, 5:16] = 9
    ids, foreground, center, boundary = DecoderTarget()(labels)
    half = [0.71, 0.57, 0.42, 0.28, 0.14, 0]
    assert np.allclose(center[10, 5:16], half + half[-2::-1], atol=0.01)
    assert np.allclose(boundary[10, 5:16], [1, .8, .6, .4, .2, 0, .2, .4, .6, .8, 1], atol=1e-5)
    assert np.array_equal(ids, labels == 9)
    assert np.array_equal(foreground, ids)
    assert (center[labels == 0] == 1).all()
    assert (boundary[labels == 0] == 1).all()
    assert boundary[5, 5:16].tolist() == [1.0] * 11
    assert center[5, 5] == pytest.approx(1)


def test_target_distances_agree_with_scipy(cells_labels):
    ids, _, center, boundary = DecoderTarget(25)(cells_labels)
    ids = ids.astype(int)
    rim = np.zeros(ids.shape, bool)  # 4-neighbours of another id; the edge of the image is no rim
    for axis in (0, 1):
        differs = np.diff(ids, axis=axis) != 0
        first, second = [slice(None)] * 2, [slice(None)] * 2
        first[axis], second[axis] = slice(0, -1), slice(1, None)
        rim[tuple(first)] |= differs
        rim[tuple(second)] |= differs
    depth = distance_transform_edt(~(rim & (ids > 0)))
    n_checked = 0
    for i in range(1, ids.max() + 1):
        mask = ids == i
        d = depth[mask].max() - depth[mask]
        # Rims outside of the bounding box of a cut object are not seen, hence only objects inside.
        if d.max() == 0 or mask[[0, -1]].any() or mask[:, [0, -1]].any():
            continue
        assert np.allclose(boundary[mask], d / d.max(), atol=1e-5)
        y, x = np.argwhere(mask).mean(axis=0).round()
        distance = np.hypot(*(np.argwhere(mask) - [y, x]).T)
        if mask[int(y), int(x)]:
            assert np.allclose(center[mask], distance / distance.max(), atol=1e-5)
        n_checked += 1
    assert n_checked > 3


def test_small_parts_vanish_and_pieces_become_objects():
    labels = np.zeros((30, 30), "uint16")
    labels[0:5, 0:5] = 3  # 25 pixels
    labels[10:14, 0:6] = 4  # 24 pixels
    labels[20:25, 0:5] = labels[20:25, 10:15] = 7  # one id, two pieces
    labels[25:30, 15:20] = 7  # touches the second piece at a corner: one object
    ids = InstanceTarget(25)(labels)
    assert ids.dtype == np.float32
    assert np.unique(ids).tolist() == [0, 1, 2, 3]
    assert ids[12, 3] == 0
    assert ids[22, 12] == ids[27, 17] != ids[22, 2]
    with pytest.raises(InvalidInputError, match="fractions"):
        label_instances(labels / 2)
    with pytest.raises(InvalidInputError, match="negative"):
        label_instances(labels.astype("int32") - 1)


def test_targets_without_inside_or_without_rim():
    thin = np.zeros((12, 12), int)
    thin[3:5, 2:10] = 1
    assert (DecoderTarget(1)(thin)[3] == 1).all()  # nothing but rim is not deep inside
    assert (DecoderTarget(1)(np.ones((12, 12), int))[3] == 0).all()  # no rim in sight
    empty = DecoderTarget()(np.zeros((12, 12), int))
    assert (empty.T == [0, 0, 1, 1]).all()
    cut = np.zeros((12, 12), int)
    cut[:, 0:5] = 1
    assert np.allclose(DecoderTarget(1)(cut)[3][6, :5], [0, 0.25, 0.5, 0.75, 1], atol=1e-5)


# ---------------------------------------------------------------- datasets


def _all_patches(image, shape):
    return np.lib.stride_tricks.sliding_window_view(image, shape)


@pytest.mark.parametrize(("options", "n_channels"), [
    (PLAIN, 1), (TARGETS, 4), (TARGETS | {"train_instance_segmentation_only": True}, 3),
])
def test_kinds_of_data(options, n_channels, tmp_path, pair_files, cells_image, cells_labels, rgb_image):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["raw"], file["labels"] = np.stack([cells_image] * 4), np.stack([cells_labels] * 4)
        file["rgb"] = np.moveaxis(rgb_image, -1, 0)
    data = str(tmp_path / "data.h5")
    imageio.imwrite(tmp_path / "rgb.png", rgb_image)
    rgb, (raw, labels) = str(tmp_path / "rgb.png"), pair_files
    cases = [
        (SegmentationDataset, 1, raw, labels, None, None),
        (SegmentationDataset, 1, data, data, "raw", "labels"),
        (SegmentationDataset, 3, data, labels, "rgb", None),
        (ConcatDataset, 1, [raw, raw], [labels, labels], None, None),
        (ImageCollectionDataset, 3, rgb, labels, None, None),  # a single path as string
        (ImageCollectionDataset, 3, [rgb], [labels], None, None),
        (TensorDataset, 1, [cells_image], [cells_labels], None, None),
        (TensorDataset, 1, [torch.from_numpy(cells_image)], [torch.from_numpy(cells_labels)], None, None),
        (TensorDataset, 3, [rgb_image], [cells_labels], None, None),  # channels last, found without help
        (TensorDataset, 3, [np.moveaxis(rgb_image, -1, 0)], [cells_labels], None, None),
        (TensorDataset, 1, [np.stack([cells_image] * 5)], [np.stack([cells_labels] * 5)], None, None),
    ]
    for kind, n_raw, raw_paths, label_paths, raw_key, label_key in cases:
        dataset = default_sam_dataset(raw_paths, raw_key, label_paths, label_key, (512, 512), **options)
        x, y = dataset[0]
        assert isinstance(dataset, kind), (kind, type(dataset))
        assert dataset._ndim == dataset.ndim == 2
        assert (tuple(x.shape), tuple(y.shape)) == ((n_raw, 512, 512), (n_channels, 512, 512))
        assert x.dtype == y.dtype == torch.float32
        assert x.max() > 50


def test_rgb_and_grey_images_in_one_batch(cells_image, cells_labels, rgb_image):
    loader = default_sam_loader(
        raw_paths=[cells_image, rgb_image], raw_key=None, label_paths=[cells_labels] * 2, label_key=None,
        patch_shape=(64, 64), batch_size=2, is_train=False, **PLAIN,
    )
    assert all(x.shape[1:] == (3, 64, 64) for x, _ in loader)


def test_patches_match_their_labels(cells_image, cells_labels):
    dataset = _dataset([cells_image], [cells_labels], (40, 48), n_samples=20, seed=3, transform=lambda x, y: (x, y),
                       label_dtype=torch.int64)
    images, labels = _all_patches(cells_image, (40, 48)), _all_patches(cells_labels, (40, 48))
    for x, y in dataset:
        (found,) = np.argwhere((images == x[0].numpy()).all(axis=(2, 3)))
        assert np.array_equal(y[0], label_instances(labels[tuple(found)], 25))
        assert y.dtype == torch.int64


def test_every_position_is_drawn():
    image = np.arange(16, dtype="uint8").reshape(4, 4)
    dataset = _dataset([image], [np.ones((4, 4), int)], (3, 3), min_size=1, n_samples=60, is_train=False)
    assert {int(x[0, 0, 0]) for x, _ in dataset} == {0, 1, 4, 5}  # the last valid offset too


def test_folders_and_regions(tmp_path, cells_image, cells_labels, rgb_image):
    for folder, image in (("images", cells_image), ("labels", cells_labels), ("rgb", rgb_image)):
        (tmp_path / folder).mkdir()
        for n in range(6):
            imageio.imwrite(tmp_path / folder / f"{n}.tif", image + np.asarray(n, image.dtype) * (folder == "images"))
    folders = [str(tmp_path / name) for name in ("images", "labels", "rgb")]
    stack = _dataset(folders[0], folders[1], (1, 128, 160), ("*.tif", "*.tif"), rois=np.s_[:2, :, :], n_samples=40,
                     is_train=False)
    assert isinstance(stack, SegmentationDataset)
    assert {int(x.min()) - int(cells_image.min()) for x, _ in stack} == {0, 1}
    colour = _dataset(folders[2], folders[1], (32, 32), ("*.tif", "*.tif"), rois=slice(0, 3), is_train=False)
    assert isinstance(colour, ImageCollectionDataset)
    assert len(colour.pairs) == 3
    part = _dataset([cells_image], [cells_labels], (100, 100), rois=np.s_[78:, 20:80], is_train=False)
    x, _ = part[0]
    assert np.array_equal(x[0, :50, :60], cells_image[78:, 20:80])  # smaller than the patch: padded at the end
    assert not x[0, 50:].any()
    assert not x[0, :, 60:].any()
    (tmp_path / "images" / "5.tif").unlink()
    with pytest.raises(InvalidInputError, match="5 images, but 6 labels.*Without partner: 5"):
        _dataset(folders[0], folders[1], (32, 32), ("*.tif", "*.tif"))


def test_length(cells_image, cells_labels, pair_files):
    volume, labels = np.stack([cells_image] * 9), np.stack([cells_labels] * 9)
    assert len(_dataset([volume], [labels])) == 100
    assert len(_dataset([volume] * 7, [labels] * 7, is_train=False)) == 7
    assert len(_dataset(*pair_files, (16, 10), is_train=False)) == 128  # 8 x 16 patches cover the image
    assert len(_dataset(*pair_files, n_samples=3)) == 3
    with pytest.raises(IndexError):
        _dataset(*pair_files, n_samples=3)[3]


# ---------------------------------------------------------------- random choices


def _draw(dataset, epoch=0):
    dataset.set_epoch(epoch)
    return [torch.cat([x, y]) for x, y in dataset]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


def test_validation_is_the_same_in_each_epoch_and_not_augmented(cells_image, cells_labels):
    def loader(**kwargs):
        return default_sam_loader(
            raw_paths=[cells_image], raw_key=None, label_paths=[cells_labels], label_key=None, patch_shape=(48, 48),
            batch_size=1, shuffle=True, is_train=False, n_samples=8, **TARGETS, **kwargs,
        )
    one, same, workers = loader(), loader(), loader(num_workers=2)
    first = [x for x, _ in one]
    one.dataset.set_epoch(4)
    for other in (one, same, workers):
        assert _equal(first, [x for x, _ in other])
    patches = _all_patches(cells_image, (48, 48))
    assert all((patches == x[0, 0].numpy()).all(axis=(2, 3)).any() for x in first)  # no flips
    assert not _equal(first, [x for x, _ in loader(seed=1)])


def test_seeded_training_is_a_function_of_seed_epoch_and_index(cells_image, cells_labels):
    def dataset(**kwargs):
        return _dataset([cells_image] * 3, [cells_labels] * 3, n_samples=6, **kwargs)
    noise = {"transform": lambda x, y: (x + np.random.rand() + torch.rand(1).item(), y)}
    for options in ({}, noise):
        a, b = dataset(seed=5, **options), dataset(seed=5, **options)
        state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
        epoch_2 = _draw(a, 2)
        assert not _equal(epoch_2, _draw(a, 3))
        assert _equal(epoch_2, _draw(b, 2))  # as after a resume
        assert torch.equal(epoch_2[4], torch.cat(b[4]))  # whichever items were drawn before
        assert not _equal(epoch_2, _draw(dataset(seed=6, **options), 2))
        assert torch.equal(state, torch.random.get_rng_state())  # nobody else's numbers are used up
        assert np.array_equal(numpy_state, np.random.get_state()[1])
    free = dataset()
    torch.manual_seed(0)
    first = _draw(free)
    assert not _equal(first, _draw(free))
    torch.manual_seed(0)
    assert _equal(first, _draw(free))


def test_training_is_flipped_along_both_axes(cells_labels):
    image = np.zeros_like(cells_labels, dtype="uint8")
    image[:64, :80], image[:64, 80:], image[64:, :80] = 50, 100, 150
    dataset = _dataset([image], [cells_labels], (128, 160), n_samples=60, seed=0, **TARGETS)
    corners = []
    for x, y in dataset:
        corners.append(int(x[0, 0, 0]))
        axes = [a for a, flipped in ((-2, corners[-1] in (150, 0)), (-1, corners[-1] in (100, 0))) if flipped]
        assert torch.equal(y, torch.from_numpy(np.flip(DecoderTarget()(cells_labels), axes).copy()))
    assert all(corners.count(value) > 5 for value in (50, 100, 150, 0))


def test_all_images_are_used(cells_labels):
    images = [np.full(cells_labels.shape, n + 10, "uint8") for n in range(6)]
    dataset = _dataset(images, [cells_labels] * 6, n_samples=4, seed=0)
    assert {int(x.max()) - 10 for x, _ in dataset} == {0, 1, 2, 3}
    dataset.set_epoch(1)
    assert {int(x.max()) - 10 for x, _ in dataset} == {4, 5, 0, 1}


def test_worker_processes_and_pickling(tmp_path, cells_image, cells_labels):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file.create_dataset("raw", data=cells_image, chunks=(32, 32), compression="gzip")
        file.create_dataset("labels", data=cells_labels, chunks=(32, 32), compression="gzip")
    path = str(tmp_path / "data.h5")
    loader = default_sam_loader(
        raw_paths=path, raw_key="raw", label_paths=path, label_key="labels", patch_shape=(64, 64), batch_size=2,
        num_workers=2, n_samples=8, seed=1, **TARGETS,
    )
    here = [y for _, y in loader.dataset]
    assert torch.equal(torch.stack(here), torch.cat([y for _, y in loader]))
    assert _equal(here, [y for _, y in pickle.loads(pickle.dumps(loader.dataset))])


# ---------------------------------------------------------------- which patches are taken


def test_patches_that_objects_fill_are_taken():
    one, two = np.ones((64, 64), int), np.repeat([[1, 2]], 32, axis=1).repeat(64, axis=0)
    for labels, n in ((one, 1), (two, 2)):
        _, y = _dataset([np.ones((64, 64), "uint8")], [labels])[0]
        assert y.unique().tolist() == list(range(1, n + 1))


def test_no_objects_is_an_error_that_says_what_was_found(cells_image):
    fragments = np.zeros_like(cells_image)
    for y, x in itertools.product(range(10, 100, 20), range(10, 140, 20)):
        fragments[y:y + 3, x:x + 3] = 1  # one id, 9 pixels per piece
    for labels, message in (
        (fragments, r"60 attempts.*60 with parts of less than min_size=25 pixels \(at most 9\)"),
        (np.zeros_like(cells_image), "60 without any label"),
    ):
        dataset = _dataset([cells_image], [labels], max_sampling_attempts=60)
        with pytest.raises(NoObjectsError, match=message):
            dataset[0]
        assert issubclass(NoObjectsError, RuntimeError)
        assert not _dataset([cells_image], [labels], max_sampling_attempts=2, allow_empty=True)[0][1].any()
        decoder_only = _dataset([cells_image], [labels], **TARGETS, train_instance_segmentation_only=True)
        assert (decoder_only[0][1][1:] == 1).all()


def test_images_without_objects_are_passed_over(pair_files, cells_image, cells_labels):
    empty = np.zeros_like(cells_labels)
    dataset = _dataset([cells_image] * 3, [empty, empty, cells_labels], n_samples=3, seed=0)
    assert all(y.any() for _, y in dataset)


def test_sampler_sees_objects_after_the_transform(cells_image):
    labels = np.zeros(cells_image.shape, int)
    labels[:, :20] = labels[:, 40:60] = 5  # one id, two objects
    seen = []

    def sampler(x, y):
        seen.append((x.shape, int(y.max())))
        return len(seen) > 3
    _, y = _dataset([cells_image], [labels], (128, 160), sampler=sampler)[0]
    assert seen == [((128, 160), 2)] * 4
    assert MinInstanceSampler(3, min_size=25)(None, y.numpy())
    with pytest.raises(NoObjectsError, match="7 with objects that the sampler refused"):
        _dataset([cells_image], [labels], (128, 160), sampler=lambda x, y: False, max_sampling_attempts=7)[0]


def test_label_transforms_are_applied_in_order(cells_image):
    labels = np.zeros(cells_image.shape, "uint8")
    labels[10:40, 10:40], labels[60:100, 60:100] = 1, 2

    def first(y):
        return np.where(y == 2, 0, y)

    def second(y):
        assert y.max() == 1
        return (y * 7,)
    dataset = _dataset(
        [cells_image], [labels], (128, 160), pre_label_transform=first, label_transform=second,
        label_transform2=lambda y: y * 3,
    )
    assert dataset[0][1].unique().tolist() == [0, 3]


def test_bad_arguments(pair_files, tmp_path, cells_image, cells_labels, rgb_image):
    raw, labels = pair_files
    cases = [
        (ValueError, "trains the decoder alone", {"train_instance_segmentation_only": True}),
        (InvalidTypeError, "'with_paddin'.*'with_padding'", {"with_paddin": True}),
        (InvalidInputError, "on planes", {"patch_shape": (8, 64, 64)}),
        (InvalidInputError, "ndim must be 2", {"ndim": 3}),
        (InvalidInputError, "positive integer", {"n_samples": 0}),
        (InvalidInputError, "seed", {"seed": -1}),
        (InvalidInputError, "one slice", {"rois": np.s_[:2, :2, :2]}),
        (InvalidInputError, "with_channels=True was given", {"with_channels": True}),
    ]
    for error, message, options in cases:
        with pytest.raises(error, match=message):
            _dataset(raw, labels, **options)
    with pytest.raises(MissingFileError, match="gone.tif"):
        _dataset(str(tmp_path / "gone.tif"), labels)
    with pytest.raises(InvalidInputError, match=r"\(100, 160\).*same order"):
        _dataset([cells_image[:100]], [cells_labels])
    with pytest.raises(InvalidInputError, match="colour picture"):
        _dataset([cells_image], [rgb_image])
    with pytest.raises(InvalidInputError, match="7 channels"):
        _dataset([np.zeros((7, 128, 160), "uint8")], [cells_labels])
    with pytest.raises(InvalidInputError, match="fractions.*labels.tif|labels of shape"):
        _dataset([cells_image], [cells_labels / 7])[0]
    with pytest.raises(InvalidTypeError, match="batch_size"):
        default_sam_loader(raw_paths=raw)
    with pytest.raises(InvalidTypeError, match="'num_worker'.*'num_workers'"):
        default_sam_loader(num_worker=1, batch_size=1)


def test_any_transform_of_patches(cells_labels):
    image = np.random.default_rng(0).integers(0, 200, (7, *cells_labels.shape)).astype("uint8")
    dataset = _dataset([image], [cells_labels], raw_transform=lambda x: x[[5, 2]], is_train=False, seed=0)
    x, _ = dataset[0]
    assert x.shape == (3, 64, 64)
    assert not x[2].any()  # two channels become three as at inference
    untouched = image.copy()

    def in_place(x):
        x[...] = 1
        return x[:1]
    _dataset([image], [cells_labels], raw_transform=in_place)[0]
    assert np.array_equal(image, untouched)
    assert _dataset([image[0] / 300], [cells_labels], raw_transform=identity)[0][0].max() < 1


# ---------------------------------------------------------------- splits


def test_split_by_file(tmp_path, cells_image, cells_labels):
    paths = []
    for n in range(12):
        content = cells_image if n in (3, 8) else cells_image + np.uint8(n + 1)
        paths.append(tmp_path / f"{n}.{'png' if n == 8 else 'tif'}")  # equal pixels in another format
        imageio.imwrite(paths[-1], content)
        imageio.imwrite(tmp_path / f"label{n}.tif", cells_labels)
    labels = [tmp_path / f"label{n}.tif" for n in range(12)]
    for seed in range(12):
        split = split_data(paths, None, labels, None, seed=seed)
        train, val = set(split.train.raw_paths), set(split.val.raw_paths)
        assert not train & val
        assert train | val == {str(p) for p in paths}
        assert len(val) in (1, 2)
        twins = {str(paths[3]), str(paths[8])}
        assert twins <= train or twins <= val
        assert split.duplicates == ((str(paths[3]), str(paths[8])),)
        again = split_data(paths, None, labels, None, seed=seed)
        assert again == split
    assert len({split_data(paths, None, labels, None, seed=s).val.raw_paths for s in range(5)}) > 1
    assert len(split_data(paths, None, labels, None, fraction=0.5).val.raw_paths) == 6
    loader = default_sam_loader(**split.val.arguments(), patch_shape=(64, 64), batch_size=1, **PLAIN)
    assert next(iter(loader))[0].shape == (1, 1, 64, 64)
    pairs = find_pairs(paths, None, labels, None).pairs
    with pytest.raises(InvalidInputError, match="8.png"):
        check_disjoint(pairs[:6], pairs[6:])
    check_disjoint(pairs[:8], pairs[9:])


@pytest.mark.parametrize("n_planes", [1, 20])
def test_split_of_one_image(n_planes, cells_image, cells_labels):
    image = np.stack([cells_image] * n_planes) if n_planes > 1 else np.tile(cells_image, (2, 1))
    labels = np.stack([cells_labels] * n_planes) if n_planes > 1 else np.tile(cells_labels, (2, 1))
    for seed in range(4):
        split = split_data([image], None, [labels], None, seed=seed)
        used = np.zeros(labels.shape, int)
        for part in (split.train, split.val):
            used[part.rois[0]] += 1
            assert labels[part.rois[0]].any()
        assert used.max() == 1
        assert used[split.train.rois[0]].size > used[split.val.rois[0]].size > 0
        check_disjoint(*(find_pairs([image], None, [labels], None, rois=list(p.rois)).pairs
                         for p in (split.train, split.val)))
    corner = np.zeros_like(labels)
    corner[..., :8, :8] = 1
    if n_planes == 1:
        with pytest.raises(NoObjectsError, match="cannot be divided"):
            split_data([image], None, [corner], None)
        with pytest.raises(InvalidInputError, match="too small"):
            split_data([image[:60, :60]], None, [labels[:60, :60]], None)


# ---------------------------------------------------------------- verification


class _Loader(list):
    """Batches that are counted when they are taken."""

    n_taken = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.n_taken += 1
            yield batch


def _batch(n_channels=4, **changes):
    x, y = torch.full((2, 1, 8, 8), 200.0), torch.zeros(2, n_channels, 8, 8)
    y[:, 0, :4] = 1
    for (tensor, *index), value in changes.get("set", []):
        {"x": x, "y": y}[tensor][tuple(index)] = value
    return x, y


def test_verification_inspects_exactly_the_batches_asked_for():
    for n_batches, expected in ((3, 3), (50, 5)):
        loader = _Loader([_batch()] * 5)
        assert verify_loader(loader, n_batches, with_segmentation_decoder=True, verbose=False) == expected
        assert loader.n_taken == expected
    with pytest.raises(InvalidInputError, match="no batches"):
        verify_loader([], with_segmentation_decoder=True, verbose=False)


@pytest.mark.parametrize(("change", "message"), [
    ((("x", 0, 0, 0, 0), -1.0), "values from -1"), ((("x", 0, 0, 0, 0), 256.0), "to 256"),
    ((("x", 0, 0, 0, 0), float("nan")), "finite"), ((("y", 1, 0, 0, 0), 0.5), "whole numbers"),
    ((("y", 1, 0, 0, 0), -1.0), "negative"), ((("y", 1, 0), 0.0), "no object in sample 1"),
    ((("y", 1, 2, 0, 0), 1.5), "to 1.5"),
])
def test_verification_finds_faults_in_later_batches(change, message):
    loader = [_batch(), _batch(set=[change])]
    with pytest.raises(ValueError, match=f"Batch 1 of the loader.*{message}"):
        verify_loader(loader, 2, with_segmentation_decoder=True, verbose=False)
    assert verify_loader(loader, 1, with_segmentation_decoder=True, verbose=False) == 1


def test_verification_knows_the_kinds_of_training():
    for n_channels, options in ((1, (False, False)), (4, (True, False)), (3, (True, True))):
        kinds = dict(zip(("with_segmentation_decoder", "train_instance_segmentation_only"), options))
        assert verify_loader([_batch(n_channels)], 1, **kinds, verbose=False) == 1
        with pytest.raises(InvalidInputError, match=f"{n_channels}, 8, 8.* is expected"):
            verify_loader([_batch(2)], 1, **kinds, verbose=False)
    only = {"with_segmentation_decoder": True, "train_instance_segmentation_only": True, "verbose": False}
    with pytest.raises(InvalidInputError, match="0 to 1 is expected"):
        verify_loader([_batch(3, set=[(("y", 0, 0, 0, 0), 2.0)])], 1, **only)
    one_object = _batch(1, set=[(("y", slice(None)), 1.0)])  # fills the patch
    assert verify_loader([one_object], 1, with_segmentation_decoder=False, verbose=False) == 1
    unscaled = [(x / 255, y) for x, y in [_batch()] * 2]
    with pytest.raises(InvalidInputError, match="up to 0.78"):
        verify_loader(unscaled, 2, with_segmentation_decoder=True, verbose=False)


def test_our_loaders_pass_the_verification(cells_image, cells_labels):
    for options in (PLAIN, TARGETS, TARGETS | {"train_instance_segmentation_only": True}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = default_sam_loader(
                raw_paths=[cells_image.astype("uint16") * 50], raw_key=None, label_paths=[cells_labels],
                label_key=None, patch_shape=(64, 64), batch_size=2, n_samples=6, shuffle=True, **options,
            )
            assert loader.shuffle is True
            assert verify_loader(loader, 5, verbose=False, **options) == 3
