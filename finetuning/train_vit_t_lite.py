"""Train `vit_t_lite`, the model that ships with micro_sam, on CPU or GPU: prompts and instance decoder jointly.

A ViT-T encoder, SAM's prompt encoder and mask decoder, and a slim UNETR decoder (torch-em) learn together on crops of
224 or 512 pixels: the decoder to predict foreground, centre distance and boundary distance, the mask decoder to follow
points and boxes with corrections (Archit et al. 2025, 10.1038/s41592-024-02580-4). The losses are those of
`micro_sam.training`. TinyViT has no absolute position embedding, so it runs at any image size; the position encoding
of prompts is shifted at random, so that a crop stands for any part of the canvas, or of a larger one for larger images
(`--largest-canvas`).

    python finetuning/train_vit_t_lite.py --data DATA/nuclei_dsb2018/train DATA/phase_t98g/train --iterations 4000

Each folder holds `images/*` and `labels/*` with the same file names. The learning rate follows a cosine over the
iterations, or only over the last of them (`--hold`). Crops and prompts are those of the iteration's number, so a run
that was interrupted and continued with --resume sees what an uninterrupted one sees; a run that starts from the weights
of another sees new ones if it counts on from there (`--first-crop`).
"""

import argparse
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from torch_em.trainer import DefaultTrainer
from torch_em.transform.label import PerObjectDistanceTransform

from micro_sam.core.allocator import reusing_memory
from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_unetr
from micro_sam.models.precision import gains_from_half_precision
from micro_sam.prompt_generators import IterativePromptGenerator
from micro_sam.training.convert import ConvertToSamInputs
from micro_sam.training.interactive import ONE_BOX, ONE_POINT, interactive_losses, prompt_batch
from micro_sam.training.losses import DecoderLoss
from micro_sam.training.trainable_sam import TrainableSAM

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
# Pixels of a crop: crops per batch, objects with prompts per crop. The windows of TinyViT fit into 224 pixels without
# the padding that makes 256 a fifth slower; it occurs at 512, as at inference.
SIZES = {224: (10, 6), 512: (2, 10)}
UNKNOWN = -1.0  # foreground of images whose labels are good enough for prompts only
# Factor from pixels of the image to pixels that the encoder sees at inference, where the image fills the canvas of
# 1024 pixels, per modality (first part of the file name).
NOMINAL_ZOOM = {
    "fluo_256": 4.0, "fluo_360": 2.84, "purple_256x320": 3.2, "fluo_large": 1.45, "graytissue_1024": 1.0, "set": 2.0,
    "ec": 3.0,
}
ZOOM_RANGE = {"fluo_large": (0.5, 2.2), "graytissue_1024": (0.8, 2.2)}
DEFAULT_ZOOM_RANGE = (0.65, 1.35)
# Some crops are drawn from this range instead: prompts come at any scale, also from small images of large objects.
ANY_ZOOM_RANGE, ANY_ZOOM_SHARE = (0.4, 3.5), 0.2
PROMPTS_ONLY = ("ec",)


class Lite(torch.nn.Module):
    """SAM and the instance decoder around one encoder, for crops."""

    def __init__(self, features: int, canvas: int, largest_canvas: int, prompt_maps: bool):
        super().__init__()
        self.canvas, self.reach = canvas, largest_canvas / canvas
        sam = build_sam("vit_t", image_size=canvas, prompt_maps=prompt_maps)
        self.sam = TrainableSAM(sam)
        self.unetr = get_unetr(sam.image_encoder, device="cpu", initial_features=features)
        positions = sam.prompt_encoder.pe_layer
        self.scale, self.start, encode = 1.0, torch.zeros(2), positions._pe_encoding
        positions._pe_encoding = lambda coords: encode(coords * self.scale + self.start.to(coords))
        self.frozen_statistics = self.prompts_only = False

    def train_prompts_only(self) -> None:
        """Leave the encoder and the instance decoder as they are, with their automatic segmentation."""
        self.prompts_only = True
        self.unetr.requires_grad_(False)

    def place(self, size: int, rng: np.random.Generator) -> None:
        """Prepare for crops of `size` pixels somewhere on the canvas, in every other batch on the largest one."""
        self.scale = size / self.canvas
        is_large = self.training and self.reach > 1 and rng.random() < 0.5
        end = self.reach if is_large else 1
        self.start = torch.from_numpy(rng.uniform(0, end - self.scale, 2).astype("float32"))
        sam = self.sam.sam
        sam.image_encoder.img_size = self.sam.transform.target_length = size
        sam.prompt_encoder.input_image_size = size, size
        sam.prompt_encoder.image_embedding_size = size // 16, size // 16

    def train(self, mode: bool = True):
        """Also keeps the statistics of BatchNorm as they are at inference, once they are frozen."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x):
        """Encode normalised crops; returns the embeddings and the decoder's maps, None where those are not trained."""
        if self.prompts_only:
            with torch.no_grad():
                return self.unetr.encoder(x), None
        embeddings = self.unetr.encoder(x)
        shape = tuple(x.shape[-2:])
        return embeddings, self.unetr.decode((embeddings, None, x), shape, shape)


def load_weights(model: Lite, path: Path, with_prompts: bool) -> None:
    """Start from a checkpoint that `export_vit_t_lite.py` wrote."""
    saved = torch.load(path, weights_only=True)
    state = {k: v.float() for k, v in saved["model_state"].items()}
    if with_prompts:
        unknown = model.sam.sam.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise SystemExit(f"{path} does not fit: {unknown}. Weights of prompt maps need --prompt-maps.")
        positions = model.sam.sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
        positions *= model.canvas / saved["settings"]["image_size"]  # the same positions in pixels
    else:
        encoder = {k[14:]: v for k, v in state.items() if k.startswith("image_encoder.")}
        model.sam.sam.image_encoder.load_state_dict(encoder)
    decoder = {k: v.float() for k, v in saved["decoder_state"].items()}
    missing, unexpected = model.unetr.load_state_dict(decoder, strict=False)
    if unexpected or any(not name.startswith("encoder.") for name in missing):
        raise SystemExit(f"{path} does not fit: {unexpected or missing}")


def read_pairs(folder: Path, cache: Path) -> list[dict]:
    """Read all images and compute their targets once: image (H, W[, 3]), labels (H, W) and maps (3, H, W) float16."""
    cache.mkdir(parents=True, exist_ok=True)
    to_distances = PerObjectDistanceTransform(apply_label=True, min_size=5)
    entries = []
    for path in sorted((folder / "images").iterdir()):
        modality = next(m for m in NOMINAL_ZOOM if path.name.startswith(m))
        stored = cache / f"{path.stem}.npz"
        if not stored.exists():
            read = tifffile.imread if path.suffix == ".tif" else imageio.imread
            (label_path,) = (folder / "labels").glob(f"{path.stem}.*")
            read_labels = tifffile.imread if label_path.suffix == ".tif" else imageio.imread
            labels = read_labels(label_path)
            maps = to_distances(labels.astype("int64"))
            np.savez(stored, image=read(path), labels=labels.astype("uint16"), maps=np.asarray(maps, "float16"))
        with np.load(stored) as data:
            entry = {"name": path.stem, "modality": modality, **data}
        if modality in PROMPTS_ONLY:
            entry["maps"][0] = UNKNOWN
        entries.append(entry)
    return entries


def normalise(image: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    """Contrast stretch of the whole image to float32 0…255 (H, W, 3), as at inference; sometimes by percentiles."""
    image = image.astype("float32")
    if image.ndim == 2:
        image = image[..., None]
    if rng is not None and image.shape[2] == 3 and rng.random() < 0.3:
        image = image @ rng.dirichlet(np.ones(3)).astype("float32")[:, None]
    if rng is not None and rng.random() < 0.3:
        low, high = np.percentile(image[::3, ::3], (rng.uniform(0, 2), rng.uniform(98, 100)), axis=(0, 1))
    else:
        low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    image = np.clip((image - low) / np.maximum(high - low, 1e-6), 0, 1)
    image = image.astype("float32")
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


class Crops(torch.utils.data.Dataset):
    """Batches of random crops, the same ones for the same index; with or without photometric augmentation."""

    def __init__(self, entries: list[dict], n_samples: int, photometric: bool, canvas: int):
        self.n_samples, self.photometric, self.zoom = n_samples, photometric, canvas / 1024
        self.groups = {}
        for entry in entries:
            self.groups.setdefault(entry["modality"], []).append(entry)
        self.modalities = sorted(self.groups)
        weights = np.sqrt([len(self.groups[m]) for m in self.modalities])
        self.probabilities = weights / weights.sum()

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, index: int):
        rng = np.random.default_rng((0 if self.photometric else 1, index))
        size = list(SIZES)[index % len(SIZES)]
        crops = [self._filled_crop(size, rng) for _ in range(SIZES[size][0])]
        return tuple(torch.stack(part) for part in zip(*crops))

    def _filled_crop(self, size, rng):
        for _ in range(10):
            image, targets = self._crop(size, rng)
            if (targets[0] > 0).float().mean() > 0.02 or rng.random() < 0.1:
                break
        return image, targets

    def _crop(self, crop_size, rng):
        modality = self.modalities[rng.choice(len(self.modalities), p=self.probabilities)]
        entry = self.groups[modality][rng.integers(len(self.groups[modality]))]
        wide = self.photometric and rng.random() < ANY_ZOOM_SHARE
        low, high = ANY_ZOOM_RANGE if wide else ZOOM_RANGE.get(modality, DEFAULT_ZOOM_RANGE)
        zoom = self.zoom * NOMINAL_ZOOM[modality] * math.exp(rng.uniform(math.log(low), math.log(high)))
        stretch = math.exp(rng.uniform(-0.12, 0.12))
        size = [max(16, round(crop_size / z)) for z in (zoom * stretch, zoom / stretch)]
        start = [int(rng.integers(0, max(n - s, 0) + 1)) for n, s in zip(entry["maps"].shape[1:], size)]
        window = tuple(slice(b, b + s) for b, s in zip(start, size))

        image = torch.from_numpy(normalise(entry["image"], rng if self.photometric else None)[window]).permute(2, 0, 1)
        maps = torch.from_numpy(entry["maps"][(slice(None), *window)].astype("float32"))
        # An image smaller than the window covers only a part of the crop; the rest is padding, as at inference.
        inside = [min(crop_size, round(crop_size * n / s)) for n, s in zip(image.shape[1:], size)]
        image = F.interpolate(image[None], inside, mode="bilinear", antialias=True)[0].clamp(0, 1)
        maps = F.interpolate(maps[None], inside, mode="bilinear")[0]
        labels = torch.from_numpy(entry["labels"][window].astype("float32"))
        labels = F.interpolate(labels[None, None], inside, mode="nearest-exact")[0]
        if self.photometric:
            image = self._photometric(image, rng)
        image = (image * 255 - MEAN) / STD
        foreground = maps[0] if entry["modality"] in PROMPTS_ONLY else (maps[0] > 0.5).float()
        maps = torch.stack([foreground, maps[1], maps[2]])
        padding = (0, crop_size - inside[1], 0, crop_size - inside[0])
        image = F.pad(image, padding)
        maps = torch.cat([F.pad(labels, padding), F.pad(maps[:1], padding), F.pad(maps[1:], padding, value=1.0)])
        turns, flip = int(rng.integers(4)), rng.random() < 0.5
        image, maps = (torch.rot90(a, turns, (1, 2)) for a in (image, maps))
        return (image.flip(2), maps.flip(2)) if flip else (image, maps)

    @staticmethod
    def _photometric(image, rng):
        if rng.random() < 0.5:
            image = image ** float(math.exp(rng.uniform(-0.7, 0.7)))
        if rng.random() < 0.3:
            image = (image * rng.uniform(0.5, 1.1) + rng.uniform(-0.1, 0.2)).clamp(0, 1)
        if rng.random() < 0.25:
            kernel = int(rng.integers(1, 3)) * 2 + 1
            image = F.avg_pool2d(image[None], kernel, 1, kernel // 2, count_include_pad=False)[0]
        if rng.random() < 0.4:
            noise = torch.from_numpy(rng.standard_normal(image.shape[1:], dtype="float32"))
            image = (image + noise * float(rng.uniform(0.005, 0.06))).clamp(0, 1)
        if rng.random() < 0.15:
            image = 1 - image
        return image


class Schedule:
    """Learning rate by the share of the iterations that are done: short warm-up, `hold`, then cosine to zero."""

    def __init__(self, optimizer, iterations: int, hold: float, warmup: float = 0.02):
        self.optimizer, self.iterations, self.warmup, self.done = optimizer, iterations, warmup, 0
        self.hold = hold
        self.base = [group["lr"] for group in optimizer.param_groups]
        optimizer.register_step_pre_hook(lambda *_: self._update())

    def _update(self) -> None:
        self.done += 1
        share = min(self.done / self.iterations, 1.0)
        falling = max(share - self.hold, 0) / (1 - self.hold)
        factor = min(share / self.warmup, 0.5 * (1 + math.cos(math.pi * falling)))
        for group, base in zip(self.optimizer.param_groups, self.base):
            group["lr"] = base * max(factor, 1e-3)

    def step(self, metric: float) -> None:
        """Called by the trainer after each epoch; the schedule itself follows the iterations."""
        print(f"  {self.done} iterations, metric {metric:.4f}", flush=True)

    def state_dict(self) -> dict:
        return {"done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]


class MuonWithAdamW:
    """Muon for the weights of linear and convolution layers, AdamW for all other parameters, in one optimizer.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; for learning rates of AdamW: Liu et al. 2025,
    arXiv:2502.16982) takes matrices: kernels are passed as views of shape (out, height * width * in), which share
    memory with the parameters. Build it on the final device, with weights in channels-last format.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float):
        weights = {
            module.weight: None for module in model.modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and module.weight.requires_grad
            and min(module.weight.shape[:2]) >= 16  # without depthwise, first and last convolutions
        }
        self.views = []
        for weight in weights:
            view = torch.nn.Parameter(self._as_matrix(weight.detach()))
            if view.data_ptr() != weight.data_ptr():
                raise ValueError(f"The kernel of shape {tuple(weight.shape)} is not in channels-last format.")
            self.views.append((weight, view))
        others = [p for p in model.parameters() if p.requires_grad and p not in weights]
        self.muon = torch.optim.Muon(
            [view for _, view in self.views], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = adamw(others, lr, weight_decay)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def register_step_pre_hook(self, hook):
        return self.muon.register_step_pre_hook(hook)

    @staticmethod
    def _as_matrix(weight: torch.Tensor) -> torch.Tensor:
        return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for weight, view in self.views:
            weight.grad = view.grad = None

    def step(self) -> None:
        for weight, view in self.views:
            view.grad = None if weight.grad is None else self._as_matrix(weight.grad)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def adamw(parameters, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW without decay of biases and the parameters of norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


class FromIteration(torch.utils.data.Sampler):
    """Numbers of the batches of an epoch that starts at the iteration `start`."""

    def __init__(self, n: int):
        self.n, self.start = n, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self):
        return iter(range(self.start, self.start + self.n))


class Average:
    """Exponential moving average of the weights, swapped in for validation and export."""

    def __init__(self, model: torch.nn.Module, decay: float = 0.998):
        self.model, self.decay, self.steps = model, decay, 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in self.model.state_dict().items():
            if value.dtype.is_floating_point:
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)


class LiteTrainer(DefaultTrainer):
    """torch-em's trainer with both losses, gradient clipping and averaged weights."""

    average: Average
    prompt_share: float  # of the iterations; the others train the instance decoder alone, in less time
    first_crop: int  # number of the first batch
    decoder_loss = DecoderLoss()

    def _forward_and_loss(self, x, y):
        number = self.first_crop + self._iteration
        rng = np.random.default_rng((0, number) if self.model.training else (1, self._iteration))
        size = x.shape[-1]
        self.model.place(size, rng)
        embeddings, maps = self.model(x)
        known = y[:, 1].amin((1, 2)) != UNKNOWN
        if self.model.prompts_only:
            loss = torch.zeros(())
        else:
            loss = self.decoder_loss(maps[known].float(), y[known, 1:]) if known.any() else maps.sum() * 0
        parts = [float(loss.detach())]
        self.parts.append(parts)
        if self.model.training and rng.random() > self.prompt_share and not self.model.prompts_only:
            return maps, loss
        n_sub_iteration = int(rng.integers(2, 6)) if self.model.training else 8
        # Single masks and several masks are learnt in one pass over the images, as both start from the same crops.
        for part, choice in ((slice(0, None, 2), ONE_POINT), (slice(1, None, 2), ONE_BOX)):
            convert = ConvertToSamInputs(self.model.sam.transform, box_distortion_factor=0.05, rng=rng)
            batch = prompt_batch(convert, x[part], self._some_objects(y[part, :1], SIZES[size][1]), choice, None)
            if batch is None:
                continue
            inputs = [record | {"input_size": (size, size)} for record in batch.inputs]
            losses = interactive_losses(
                self.model.sam, inputs, batch.targets, embeddings[part][batch.images],
                n_sub_iteration=n_sub_iteration, multimask=choice.multimask, mask_prob=0.5,
                prompt_generator=IterativePromptGenerator(rng=rng), rng=rng,
            )
            loss = loss + losses.loss
            parts.append(float(losses.mask_loss.detach()))
        return maps, loss

    def _some_objects(self, labels, n_objects):
        """Keep up to `n_objects` random objects of at least 30 pixels in each image."""
        kept = torch.zeros_like(labels)
        for k, image in enumerate(labels):
            ids, counts = image.unique(return_counts=True)
            ids = ids[(ids != 0) & (counts >= 30)].numpy()
            ids = np.random.default_rng((self._iteration, k)).permutation(ids)[:n_objects]
            kept[k] = torch.where(torch.isin(image, torch.from_numpy(ids)), image, 0)
        return kept

    def _backprop_mixed(self, loss):
        if not loss.requires_grad:  # only prompts are trained, and no crop has an object
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update()

    _backprop = _backprop_mixed

    def _train_epoch_impl(self, *args):
        torch.manual_seed(self._iteration)
        self.train_loader.sampler.start = self.first_crop + self._iteration
        self.parts = []
        result = super()._train_epoch_impl(*args)
        print("  train: decoder, point, box:", self._means(), flush=True)
        return result

    def _means(self):
        prompted = [p for p in self.parts if len(p) == 3]
        return np.mean(prompted, axis=0).round(4).tolist() if prompted else []

    def _validate_impl(self, *args):
        raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.state)
        self.parts, iteration = [], self._iteration
        self._iteration = 0  # the same prompts each time
        self.metric = lambda pred, y: torch.tensor(sum(self.parts[-1]))
        metric = super()._validate_impl(*args)
        self._iteration = iteration
        print("  held out:", self._means(), flush=True)
        self.model.load_state_dict(raw)
        return metric

    def _build_init(self):
        return {}

    def save_checkpoint(self, name, *args, **kwargs):
        kwargs["average_state"] = self.average.state
        kwargs["average_steps"] = self.average.steps
        super().save_checkpoint(name, *args, **kwargs)

    def load_checkpoint(self, *args, **kwargs):
        saved = super().load_checkpoint(*args, **kwargs)
        self.average.state, self.average.steps = saved["average_state"], saved["average_steps"]
        return saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--init", type=Path, help="start from the encoder and decoder of this micro_sam checkpoint")
    parser.add_argument("--init-prompts", action="store_true", help="start from its prompt parts, too")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--name", default="vit_t_lite")
    parser.add_argument("--iterations", type=int, default=4000, help="of the whole run, before and after --resume")
    parser.add_argument("--frozen-statistics", action="store_true", help="keep BatchNorm's statistics of --init")
    parser.add_argument("--prompt-share", type=float, default=0.7, help="of the iterations; the others train only maps")
    parser.add_argument("--prompts-only", action="store_true", help="leave encoder and decoder of --init alone")
    parser.add_argument("--canvas", type=int, default=1024, help="pixels of the side that an image fills at inference")
    parser.add_argument("--largest-canvas", type=int, help="for large images, at the same scale; default: --canvas")
    parser.add_argument("--features", type=int, default=16, help="features of the finest decoder level")
    parser.add_argument("--prompt-maps", action="store_true", help="also draw points and boxes for the mask decoder")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--hold", type=float, default=0.0, help="share of the iterations before the rate falls (0…1)")
    parser.add_argument("--first-crop", type=int, default=0, help="number of the first batch of crops")
    parser.add_argument("--epoch-length", type=int, default=100, help="iterations between validations")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.largest_canvas is not None and args.largest_canvas < args.canvas:
        parser.error(f"--largest-canvas is at least --canvas ({args.canvas}), but is {args.largest_canvas}.")
    if not 0 <= args.hold < 1:
        parser.error(f"--hold is a share from 0 to below 1, but is {args.hold}.")

    torch.manual_seed(0)
    entries = [entry for folder in args.data for entry in read_pairs(folder, args.output / "targets2")]
    # Every tenth image of each modality is held out; checkpoints and thresholds are chosen on these.
    seen, train, held_out = {}, [], []
    for entry in entries:
        seen[entry["modality"]] = seen.get(entry["modality"], 0) + 1
        (held_out if seen[entry["modality"]] % 10 == 5 else train).append(entry)
    (args.output / "held_out.txt").write_text("\n".join(e["name"] for e in held_out) + "\n")
    print(f"{len(train)} images for training, {len(held_out)} held out", flush=True)

    model = Lite(args.features, args.canvas, args.largest_canvas or args.canvas, args.prompt_maps)
    if args.init is not None:
        load_weights(model, args.init, args.init_prompts)
    model.frozen_statistics = args.frozen_statistics
    if args.prompts_only:
        model.train_prompts_only()
    model = model.to(args.device, memory_format=torch.channels_last)
    if args.optimizer == "muon":
        optimizer = MuonWithAdamW(model, args.lr, weight_decay=0.05)
    else:
        optimizer = adamw([p for p in model.parameters() if p.requires_grad], args.lr, weight_decay=0.05)
    train_crops = Crops(train, args.epoch_length, True, args.canvas)
    val_crops = Crops(held_out, 12, False, args.canvas)
    workers = {"batch_size": None, "num_workers": args.workers, "persistent_workers": args.workers > 0}
    loader = torch.utils.data.DataLoader(train_crops, sampler=FromIteration(args.epoch_length), **workers)
    val_loader = torch.utils.data.DataLoader(val_crops, **workers)
    trainer = LiteTrainer(
        name=args.name, train_loader=loader, val_loader=val_loader, model=model, loss=DecoderLoss(),
        optimizer=optimizer, metric=DecoderLoss(), device=args.device,
        lr_scheduler=Schedule(optimizer, args.iterations, args.hold), logger=None,
        mixed_precision=gains_from_half_precision(args.device), mixed_precision_dtype="bfloat16",
        save_root=str(args.output), compile_model=False,
    )
    trainer.average, trainer.prompt_share, trainer.first_crop = Average(model), args.prompt_share, args.first_crop
    saved = args.output / "checkpoints" / args.name / "latest.pt"
    if saved.exists() != args.resume:
        remedy = "exists: pass --resume, or another --name" if saved.exists() else "is missing: leave out --resume"
        raise SystemExit(f"{saved} {remedy}.")
    # The trainer counts from where it is.
    done = torch.load(saved, map_location="cpu", weights_only=False)["iteration"] if args.resume else 0
    with reusing_memory():
        trainer.fit(iterations=args.iterations - done, load_from_checkpoint="latest" if args.resume else None)


if __name__ == "__main__":
    main()
