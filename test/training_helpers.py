"""What the tests of the trainers share: a tiny model, small labelled images and a logger that remembers.

As a program it trains, for tests that kill it or start several processes:

    python test/training_helpers.py OUTPUT.json SAVE_ROOT [--batch-size 2] [--epochs 2] [--resume] [--kill-after N]
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from micro_sam.models.build_sam import build_sam
from micro_sam.models.decoder import get_unetr
from micro_sam.training import processes
from micro_sam.training.convert import ConvertToSamInputs
from micro_sam.training.joint_sam_trainer import JointSamTrainer
from micro_sam.training.losses import DecoderLoss
from micro_sam.training.sam_trainer import SamTrainer
from micro_sam.training.trainable_sam import TrainableSAM

DATA = Path(__file__).parent / "data"
SIZE = 64


class Patches(Dataset):
    """Patches of the nuclei image with their labels, and maps if asked for; with `noise` drawn from global state."""

    def __init__(self, n: int, maps: bool = False, noise: float = 0.0):
        self.n, self.maps, self.noise = n, maps, noise
        self.image = torch.from_numpy(imageio.imread(DATA / "nuclei.png").astype("float32"))
        self.labels = torch.from_numpy(imageio.imread(DATA / "nuclei_labels.tif").astype("float32"))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int):
        y, x = 48 + 16 * (index % 2), 32 + 16 * (index // 2 % 4)  # all hold several nuclei
        window = (slice(y, y + SIZE), slice(x, x + SIZE))
        image = self.image[window][None].clone()
        if self.noise:
            image = (image + self.noise * torch.rand(image.shape)).clamp(0, 255)
        labels = self.labels[window][None]
        if self.maps:
            foreground = (labels > 0).float()
            labels = torch.cat([labels, foreground, 1 - 0.8 * foreground, 1 - 0.6 * foreground])
        return image, labels


class PointsOfObjects:
    """Corrections that do not depend on the prediction, in which rounding could change single pixels."""

    def __call__(self, target, prediction):
        points = []
        for mask in target[:, 0].numpy() > 0:
            inside, outside = np.argwhere(mask)[:, ::-1], np.argwhere(~mask)[:, ::-1]
            points.append([candidates[np.random.randint(len(candidates))] for candidates in (inside, outside)])
        return torch.tensor(np.array(points)), torch.tensor([[1, 0]]).repeat(len(points), 1), None, None


class Remember:
    """A logger that keeps what it is given."""

    def __init__(self, trainer, save_root, **kwargs):
        trainer.remembered = self
        self.train, self.validation = [], []

    def log_train(self, step, loss, lr, x, y, samples, *more):
        self.train.append((step, float(loss), lr, *[float(m) for m in more]))

    def log_validation(self, step, metric, loss, *more):
        self.validation.append((step, metric, loss))


def trainable_model(trainable: tuple[str, ...] = ("prompt_encoder", "mask_decoder"), seed: int = 0) -> TrainableSAM:
    """A tiny SAM of random weights, of which some parts are trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TrainableSAM(build_sam("vit_t", image_size=SIZE)).requires_grad_(False)
    for part in trainable:
        getattr(model.sam, part).requires_grad_(True)
    return model


def make_trainer(
    folder, *, model=None, joint=False, batch_size=2, n_images=4, n_val_images=1, n_workers=0, noise=0.0, lr=1e-3,
    scheduler=None, trainer_class=None, shuffle=True, optimizer=torch.optim.AdamW, **options
):
    """A trainer of the tiny model on patches of one image."""
    model = trainable_model() if model is None else model
    parameters = dict.fromkeys(p for p in model.parameters() if p.requires_grad)
    if joint:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            unetr = get_unetr(model.sam.image_encoder, device="cpu", initial_features=4)
        frozen = {id(p) for p in model.sam.image_encoder.parameters() if not p.requires_grad}
        parameters |= dict.fromkeys(p for p in unetr.parameters() if id(p) not in frozen)
        options = {"unetr": unetr, "instance_loss": DecoderLoss(), "instance_metric": DecoderLoss(), **options}
    optimizer = optimizer(list(parameters), lr=lr)
    if trainer_class is None:
        trainer_class = JointSamTrainer if joint else SamTrainer
    if issubclass(trainer_class, SamTrainer):
        options = {"convert_inputs": ConvertToSamInputs(model.transform, box_distortion_factor=0.025),
                   "n_objects_per_batch": 3, **options}
        if trainer_class in (SamTrainer, JointSamTrainer):
            options = {"n_sub_iteration": 2, **options}
    data = options.pop("dataset", None) or Patches(n_images, maps=joint, noise=noise)
    val_data = options.pop("val_dataset", None) or Subset(data, range(n_val_images))
    return trainer_class(**{
        "name": "run", "model": model, "device": "cpu", "optimizer": optimizer, "mixed_precision": False, "seed": 3,
        "train_loader": DataLoader(data, batch_size=batch_size, shuffle=shuffle, num_workers=n_workers),
        "val_loader": DataLoader(val_data, batch_size=1), "logger": Remember,
        "lr_scheduler": None if scheduler is None else scheduler(optimizer), "save_root": str(folder), **options,
    })


def main(arguments: list[str] | None = None, **environment: str) -> None:
    """Train as the command line says, after some environment variables were set."""
    os.environ.update(environment)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("save_root", type=Path)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--noise", type=float, default=20.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-after", type=int, help="end this process with SIGKILL after so many iterations")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    processes.setup_distributed("cpu")
    trainer = make_trainer(
        options.save_root, batch_size=options.batch_size, n_images=options.images,
        n_val_images=3, noise=options.noise, optimizer=torch.optim.SGD, lr=0.1,
        prompt_generator=PointsOfObjects(),
    )

    def die():
        if options.kill_after is not None and trainer.iteration == options.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    trainer.fit(epochs=options.epochs, load_from_checkpoint="latest" if options.resume else None, verbose=False,
                save_every_n_iterations=2, should_stop=die)
    if processes.rank() == 0:
        options.output.write_text(json.dumps(
            {"train": trainer.remembered.train, "validation": trainer.remembered.validation}
        ))
    processes.finish_distributed()


if __name__ == "__main__":
    sys.exit(main())
