"""Interrupted trainings continue exactly, and several processes train as one does."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import training_helpers
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, WeightedRandomSampler
from training_helpers import Patches, PointsOfObjects, make_trainer

from micro_sam.core.errors import CheckpointError, InvalidInputError, MissingFileError, UnsupportedError
from micro_sam.core.progress import Cancelled
from micro_sam.prompt_generators import IterativePromptGenerator
from micro_sam.training.data_order import EpochLoader
from micro_sam.training.seeding import preserved_random_states


def stop_at(trainer, iteration):
    return lambda: trainer.iteration == iteration


def weights(trainer):
    networks = [trainer.model, *([trainer.unetr] if hasattr(trainer, "unetr") else [])]
    return {f"{k}.{name}": v.clone() for k, net in enumerate(networks) for name, v in net.state_dict().items()}


def assert_same_weights(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


CASES = {
    "joint_after_epoch": ({"joint": True}, 2),
    "accumulation": ({"gradient_accumulation_steps": 2, "n_images": 6, "batch_size": 1}, 4),
    "workers": ({"n_workers": 2, "noise": 20.0}, 3), "drawn_items": ({"noise": 20.0}, 3),
    "scheduler": ({"scheduler": lambda o: ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.5)}, 5),
    "own_generator": (lambda: {"prompt_generator": IterativePromptGenerator(rng=np.random.default_rng(5))}, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_cancelled_training_continues_exactly(case, tmp_path):
    options, iteration = CASES[case]
    make = options if callable(options) else lambda: dict(options)
    epochs = 3 if case == "scheduler" else 2
    whole = make_trainer(tmp_path / "whole", **make())
    whole.fit(epochs=epochs, verbose=False)

    first = make_trainer(tmp_path / "parts", **make())
    with pytest.raises(Cancelled, match="latest.pt"):
        first.fit(epochs=epochs, verbose=False, should_stop=stop_at(first, iteration))
    # The continued trainer has another seed and other weights; the checkpoint replaces them.
    second = make_trainer(tmp_path / "parts", **make(), seed=99)
    with torch.no_grad():
        second.model.sam.mask_decoder.iou_token.weight += 1
    second.fit(epochs=epochs, load_from_checkpoint="latest", verbose=False)

    assert first.remembered.train + second.remembered.train == whole.remembered.train
    assert first.remembered.validation + second.remembered.validation == whole.remembered.validation
    assert_same_weights(weights(second), weights(whole))
    assert second.best_metric == whole.best_metric
    assert second.train_time > first.train_time


@pytest.mark.parametrize("options", [{"joint": True}, {"checkpoint_encoder": True, "gradient_accumulation_steps": 2}])
def test_stopping_within_an_iteration(options, tmp_path):
    """In forward and backward passes of training and validation, also where BatchNorm has seen the batch already."""
    options = {"n_images": 4, "batch_size": 1, "n_val_images": 1, **options}
    whole, asked = make_trainer(tmp_path / "whole", **options), []

    def note():
        in_backward = torch._C._current_graph_task_id() >= 0
        asked.append("backward" if in_backward else "training" if torch.is_grad_enabled() else "validation")

    whole.fit(epochs=1, verbose=False, should_stop=note)
    last = {kind: n for n, kind in enumerate(asked)}
    assert sorted(last) == ["backward", "training", "validation"]
    for number in [*last.values(), len(asked) // 2]:
        folder, answers = tmp_path / str(number), iter([*[False] * number, True, True])
        first = make_trainer(folder, **options)
        with pytest.raises(Cancelled):
            first.fit(epochs=1, verbose=False, should_stop=answers.__next__)  # it stops at once, or has no answer
        second = make_trainer(folder, **options)
        second.fit(epochs=1, load_from_checkpoint="latest", verbose=False)
        assert_same_weights(weights(second), weights(whole))
        assert second.best_metric == whole.best_metric


def test_closing_or_interrupting_leaves_a_checkpoint(tmp_path):
    whole = make_trainer(tmp_path, name="whole", gradient_accumulation_steps=2, batch_size=1)
    whole.fit(epochs=1, verbose=False)

    def close(trainer):
        steps = trainer.fit_steps(epochs=1)
        for step in steps:
            if step.done == 3:  # in the middle of an accumulation
                steps.close()

    def interrupt(trainer):
        encode = trainer.model.image_embeddings_oft

        def interrupted(records):
            if trainer.iteration == 3:
                raise KeyboardInterrupt
            return encode(records)
        trainer.model.image_embeddings_oft = interrupted
        with pytest.raises(Cancelled):
            trainer.fit(epochs=1, verbose=False)

    def press_ctrl_c(trainer):
        with pytest.raises(Cancelled):
            trainer.fit(epochs=1, verbose=False,
                        should_stop=lambda: trainer.iteration == 2 and bool(os.kill(os.getpid(), signal.SIGINT)))

    handler = signal.getsignal(signal.SIGINT)
    for cancel in (close, interrupt, press_ctrl_c):
        name = cancel.__name__
        trainer = make_trainer(tmp_path, name=name, gradient_accumulation_steps=2, batch_size=1)
        cancel(trainer)
        content = torch.load(tmp_path / "checkpoints" / name / "latest.pt", weights_only=True)
        assert (content["iteration"], content["epoch"], content["epoch_position"]) == (2, -1, 2)
        assert not content["completed"]
        again = make_trainer(tmp_path, name=name, gradient_accumulation_steps=2, batch_size=1)
        again.fit(epochs=1, load_from_checkpoint="latest", verbose=False)
        assert_same_weights(weights(again), weights(whole))
    assert signal.getsignal(signal.SIGINT) is handler


def test_best_metric_survives_and_completed_runs_stay(tmp_path, caplog):
    trainer = make_trainer(tmp_path, n_images=2)
    trainer.fit(epochs=2, verbose=False)
    best = tmp_path / "checkpoints/run/best.pt"
    written = best.stat().st_mtime_ns

    again = make_trainer(tmp_path, n_images=2)
    again.fit(epochs=2, load_from_checkpoint="latest", verbose=False)
    assert "is complete" in caplog.text
    assert again.remembered.train == []
    assert again.best_metric == trainer.best_metric

    worse = make_trainer(tmp_path, n_images=2, lr=0.0)
    worse.fit(epochs=3, overwrite_training=False, verbose=False)  # asks for one more
    assert len(worse.remembered.validation) == 1
    if worse.current_metric >= trainer.best_metric:
        assert best.stat().st_mtime_ns == written
    with pytest.raises(InvalidInputError, match="exclude each other"):
        worse.fit(epochs=4, overwrite_training=False, load_from_checkpoint="latest")


def test_early_stopped_run_is_complete(tmp_path, caplog):
    options = {"n_images": 2, "lr": 0.0, "early_stopping": 1}
    make_trainer(tmp_path, **options).fit(epochs=5, verbose=False)
    latest = tmp_path / "checkpoints/run/latest.pt"
    content = torch.load(latest, weights_only=True)
    assert content["stopped_early"]
    assert content["epoch"] == 1
    again = make_trainer(tmp_path, **options)
    again.fit(epochs=5, overwrite_training=False, verbose=False)
    assert again.remembered.train == []
    assert "stopped early" in caplog.text
    more = make_trainer(tmp_path, **{**options, "early_stopping": None})
    more.fit(epochs=3, load_from_checkpoint="latest", verbose=False)
    assert len(more.remembered.validation) == 1


def test_counts_of_iterations(tmp_path):
    trainer = make_trainer(tmp_path)  # 2 batches per epoch
    trainer.fit(iterations=3, verbose=False)
    assert trainer.iteration == 3
    assert [step for step, _, _ in trainer.remembered.validation] == [2, 3]
    trainer.fit(epochs=1, verbose=False)  # a trainer that has trained goes on
    assert trainer.iteration == 5


def test_what_cannot_be_continued(tmp_path):
    trainer = make_trainer(tmp_path, n_images=2)
    with pytest.raises(MissingFileError, match="latest.pt"):
        trainer.fit(epochs=1, load_from_checkpoint="latest")
    trainer.fit(epochs=1, verbose=False)
    with pytest.raises(CheckpointError, match="no decoder"):
        make_trainer(tmp_path, joint=True).fit(epochs=2, load_from_checkpoint="latest")
    path = tmp_path / "weights.pt"
    torch.save(trainer.model.state_dict(), path)
    with pytest.raises(CheckpointError, match="no training checkpoint"):
        trainer.load_checkpoint(path)
    with pytest.raises(UnsupportedError, match="load_from_checkpoint"):
        type(trainer).from_checkpoint(tmp_path)
    content = torch.load(tmp_path / "checkpoints/run/latest.pt", weights_only=True)
    del content["model_state"]["sam.mask_decoder.iou_token.weight"]
    with pytest.raises(CheckpointError, match="does not fit this training"):
        make_trainer(tmp_path, n_images=2).load_checkpoint(content)


def test_distributed_prefix_is_understood(tmp_path):
    trainer = make_trainer(tmp_path, n_images=2)
    trainer.fit(epochs=1, verbose=False)
    content = torch.load(tmp_path / "checkpoints/run/latest.pt", weights_only=True)
    content["model_state"] = {f"module.{key}": value for key, value in content["model_state"].items()}
    other = make_trainer(tmp_path, n_images=2)
    other.load_checkpoint(content)
    assert_same_weights(weights(other), weights(trainer))


def test_validation_is_the_same_in_each_epoch(tmp_path):
    trainer = make_trainer(tmp_path, lr=0.0, noise=20.0, val_dataset=Patches(4, noise=20.0))
    trainer.fit(epochs=2, verbose=False)
    first, second = (entry[1:] for entry in trainer.remembered.validation)
    assert first == second


def test_random_numbers_of_the_program_are_left_alone(tmp_path):
    np.random.seed(7)
    torch.manual_seed(7)
    expected = np.random.rand(), torch.rand(1).item()
    np.random.seed(7)
    torch.manual_seed(7)
    make_trainer(tmp_path, n_images=2).fit(iterations=1, verbose=False)
    assert (np.random.rand(), torch.rand(1).item()) == expected


# --- the order of data ---


class Numbers(Patches):
    """Items (index, drawn number, epoch)."""

    def __init__(self, n):
        self.n, self.epoch = n, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(1).item(), self.epoch]), torch.zeros(1)


def drawn(loader, epoch, skip=0):
    with preserved_random_states():
        return [x.tolist() for x, _ in loader.batches(epoch, skip)]


class Own:
    """A loader of the user's own, without any torch."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


class Stream(IterableDataset):
    def __len__(self):
        return 5

    def __iter__(self):
        for k in range(5):
            yield torch.tensor([k, torch.rand(1).item()]), torch.zeros(1)


LOADERS = {
    "shuffled": lambda: DataLoader(Numbers(7), batch_size=2, shuffle=True),
    "workers": lambda: DataLoader(Numbers(7), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True),
    "generator": lambda: DataLoader(Numbers(7), batch_size=2, shuffle=True, generator=torch.Generator()),
    "weighted": lambda: DataLoader(Numbers(7), batch_size=2, sampler=WeightedRandomSampler([1.0] * 7, 9)),
    "batches": lambda: DataLoader(Numbers(7), batch_sampler=BatchSampler(range(7), 3, drop_last=True)),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "own": lambda: Own(DataLoader(Numbers(7), batch_size=2, shuffle=True)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_from_any_position(kind):
    make = LOADERS[kind]
    loader = EpochLoader(make(), seed=1)
    if kind == "own":
        loader.loader.dataset = loader.loader.loader.dataset
    first = drawn(loader, 0)
    drawn(loader, 2)
    assert len(first) == len(loader)
    assert drawn(loader, 0) == first
    assert drawn(loader, 0, skip=2) == first[2:]
    assert drawn(loader, 1) != first
    assert drawn(EpochLoader(make(), seed=2), 0) != first if kind != "own" else True
    if kind not in ("stream", "weighted", "batches"):
        assert sorted(item[0] for batch in first for item in batch) == list(range(7))
        assert {item[2] for batch in first for item in batch} == {0}


def test_loaders_that_cannot_be_used():
    with pytest.raises(InvalidInputError, match="no batches"):
        EpochLoader(DataLoader(Numbers(1), batch_size=2, drop_last=True), 0)
    with pytest.raises(InvalidInputError, match="must have a length"):
        EpochLoader(iter([]), 0)


# --- processes ---


def start(folder: Path, *options, **environment):
    """Train in a process that is forked from a server which has imported what it needs."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["training_helpers"])
    arguments = [str(folder / "out.json"), str(folder), *options]
    process = context.Process(target=training_helpers.main, args=(arguments,), kwargs=environment)
    process.start()
    return process


def finish(process, folder: Path) -> dict:
    process.join(timeout=300)
    assert process.exitcode == 0
    return json.loads((folder / "out.json").read_text())


def test_killed_training_continues_exactly(tmp_path):
    """SIGKILL after an iteration that was not saved: it and the rest are repeated to the same losses."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, killed = start(folders[0]), start(folders[1], "--kill-after", "5")
    killed.join(timeout=300)
    assert killed.exitcode == -signal.SIGKILL
    saved = torch.load(folders[1] / "checkpoints/run/latest.pt", weights_only=True)
    assert (saved["iteration"], saved["epoch_position"]) == (4, 1)
    assert not [p for p in (folders[1] / "checkpoints/run").iterdir() if "partial" in p.name]
    resumed = finish(start(folders[1], "--resume"), folders[1])
    expected = finish(whole, folders[0])
    assert [entry[0] for entry in resumed["train"]] == [4, 5]
    assert resumed["train"] == expected["train"][4:]
    assert resumed["validation"] == expected["validation"][1:]
    last = [torch.load(f / "checkpoints/run/latest.pt", weights_only=True)["model_state"] for f in folders]
    assert_same_weights(*last)


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path):
    """The mean of gradients, the order of images, prompts and mask prompts are those of one process."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun sets, without the time that it takes to start.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    two = [start(folders[1], "--batch-size", "1", "--images", "4", **shared, RANK=str(k), LOCAL_RANK=str(k))
           for k in range(2)]
    one = make_trainer(folders[0], n_images=4, n_val_images=3, noise=20.0, optimizer=torch.optim.SGD, lr=0.1,
                       prompt_generator=PointsOfObjects())
    before = weights(one)
    one.fit(epochs=2, verbose=False)
    result = finish(two[0], folders[1])
    two[1].join(timeout=300)
    assert two[1].exitcode == 0
    states = [torch.load(f / "checkpoints/run/latest.pt", weights_only=True)["model_state"] for f in folders]
    moved = max(float((value - before[f"0.{name}"]).abs().max()) for name, value in states[0].items())
    apart = max(float((value - states[1][name]).abs().max()) for name, value in states[0].items())
    assert moved > 1e-3
    assert apart < 1e-3 * moved
    metrics = [entry[1] for entry in result["validation"]]
    assert metrics == pytest.approx([entry[1] for entry in one.remembered.validation], abs=1e-5)
