"""The command `micro_sam.train`: finetune a model on own images, and say honestly whether that helped."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.errors import (
    DeviceError,
    InvalidInputError,
    MicroSamError,
    ModelError,
    NoObjectsError,
    OutputExistsError,
    nearest_names,
)
from ._common import FAILED, INTERRUPTED, OK, SETUP, USAGE, Console, Parser, print_error, run_command

_PACKAGE = ".zip"
_PREPROCESS = ("normalize_image", "normalize_minmax", "normalize_percentile", "none")
_PEFT = {
    "lora": "LoRASurgery", "fact": "FacTSurgery", "ssf": "SSFSurgery", "adaptformer": "AdaptFormer",
    "attention": "AttentionSurgery", "bias": "BiasSurgery", "layernorm": "LayerNormSurgery",
    "classical": "ClassicalSurgery",
}


def get_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        "Finetune a model on images with labels. Data are checked first; the model is scored on held-out images "
        "before and after; a model that became worse is not exported. See doc/finetuning.md.",
        "exit codes: 0 done (also if the model became worse and was not exported); 1 the training or the export "
        "failed; 2 the command cannot be run as given (options, data, unknown model); 3 the model or the device cannot "
        "be used; 130 stopped with Ctrl-C, and can go on with --resume",
    )
    _add_data_options(parser)
    _add_model_options(parser)
    _add_training_options(parser)
    _add_output_options(parser)
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--images", nargs="+", required=True, metavar="PATH", help="image files, or folders of them")
    group.add_argument("--labels", nargs="+", required=True, metavar="PATH", help="their labels, in the same order")
    group.add_argument("--image_key", help="name of the image in hdf5 or zarr files; for folders a pattern, '*.tif'")
    group.add_argument("--label_key", help="the same for the labels")
    group.add_argument(
        "--val_images", nargs="+", metavar="PATH",
        help="held-out images; default: a tenth of the files, or a part of the image if there is only one",
    )
    group.add_argument("--val_labels", nargs="+", metavar="PATH", help="the labels of the held-out images")
    group.add_argument("--val_image_key", help="like --image_key, which is the default")
    group.add_argument("--val_label_key", help="like --label_key, which is the default")
    group.add_argument(
        "--patch_shape", nargs="+", type=int, default=(512, 512), metavar="N",
        help="shape of the training patches in pixels: Y X; default: 512 512",
    )
    group.add_argument(
        "--preprocess", choices=_PREPROCESS, default="normalize_image",
        help="how to normalise the images; default: normalize_image, which is what segmentation does later",
    )
    group.add_argument("--batch_size", type=int, default=1, help="patches per training step; default: 1")
    group.add_argument("--num_workers", type=int, default=1, help="processes that load data; default: 1")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--configuration", metavar="PRESET", help="preset for your hardware; default: chosen by the device's memory"
    )
    group.add_argument(
        "-m", "--model_type", help="the model to start from, see micro_sam.info; default: that of the preset"
    )
    group.add_argument("-c", "--checkpoint_path", "--checkpoint", metavar="FILE", help="start from a checkpoint")
    group.add_argument(
        "--segmentation_decoder", choices=("instances", "instances_only", "none"), default="instances", type=str.lower,
        help="instances: train prompts and automatic segmentation (default); instances_only: automatic segmentation "
        "only; none: prompts only",
    )
    group.add_argument(
        "--freeze", nargs="+", metavar="PART", help="what not to train: image_encoder, prompt_encoder, mask_decoder"
    )
    group.add_argument(
        "--peft", metavar="METHOD[:RANK]",
        help=f"train few parameters of the encoder, for example lora:4; methods: {', '.join(_PEFT)}; none switches off "
        "that of a preset",
    )
    group.add_argument("--peft_layers", nargs="+", type=int, metavar="N", help="which blocks to adapt; default: all")
    group.add_argument("-d", "--device", help="cuda, cuda:1, mps or cpu; default: the best one")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--n_epochs", type=int, default=100, help="default: 100")
    group.add_argument("--n_iterations", type=int, help="number of steps, instead of --n_epochs")
    group.add_argument("--learning_rate", "--lr", type=float, default=1e-5, help="default: 1e-5")
    group.add_argument("--n_objects", type=int, help="objects per image and step; fewer need less memory")
    group.add_argument("--n_sub_iteration", type=int, help="rounds of correction per step; default: 8")
    group.add_argument(
        "--early_stopping", default="10", metavar="N", help="epochs without improvement to stop after, or none; "
        "default: 10",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of all random choices; default: 0")
    group.add_argument(
        "--mixed_precision", action=argparse.BooleanOptionalAction, default=True,
        help="compute in half precision where possible; default: yes",
    )
    group.add_argument("--gradient_clipping", type=float, metavar="NORM", help="largest norm of the gradients")
    group.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, metavar="N", help="batches per update; default: 1"
    )
    group.add_argument(
        "--checkpoint_encoder", action=argparse.BooleanOptionalAction, default=None,
        help="compute encoder and decoder twice, to need less memory; default: on a CPU, except for vit_t",
    )
    group.add_argument(
        "--save_every", type=int, metavar="N", help="also save every N steps, so that less is lost if it is stopped"
    )
    group.add_argument(
        "--two_steps", action="store_true", help="update for the two losses in turn, as micro_sam 1 did (slower)"
    )
    group.add_argument("--resume", action="store_true", help="go on with a training of the same name that was stopped")
    group.add_argument("--overwrite", action="store_true", help="start anew although there is a training of this name")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-s", "--save_root", metavar="FOLDER", help="folder for checkpoints and logs; default: here")
    group.add_argument("--trained_model_name", default="sam_model", metavar="NAME", help="default: sam_model")
    group.add_argument(
        "-o", "--output_path", metavar="FILE",
        help="where to export the finetuned model: .pt, or .zip for a package for bioimage.io, with the .pt next to it",
    )
    group.add_argument("--promote_worse", action="store_true", help="export the model even if it became worse")
    group.add_argument("--dry_run", action="store_true", help="check the data and options, report, and stop")
    group.add_argument(
        "--report", "--json", dest="json", nargs="?", const="-", metavar="FILE",
        help="write a JSON report; without FILE to the standard output",
    )
    group.add_argument("-v", "--verbose", action="store_true", help="show news and tracebacks of errors")
    group.add_argument("--version", action="version", version=__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = get_parser().parse_args(argv)
    return run_command(lambda: _run(args), args.verbose)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything heavy is imported and any data is read."""
    for name in ("batch_size", "n_epochs", "n_iterations", "n_objects", "n_sub_iteration",
                 "gradient_accumulation_steps", "save_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidInputError(f"--{name} must be a positive integer, but is {value}.")
    if args.num_workers < 0:
        raise InvalidInputError(f"--num_workers must not be negative, but is {args.num_workers}.")
    if not 0 < args.learning_rate < 1:
        raise InvalidInputError(f"--learning_rate must be between 0 and 1, but is {args.learning_rate}.")
    if len(args.patch_shape) not in (2, 3) or min(args.patch_shape) < 1:
        raise InvalidInputError(f"--patch_shape takes two positive integers (Y X), but got {args.patch_shape}.")
    if (args.val_images is None) != (args.val_labels is None):
        raise InvalidInputError("--val_images and --val_labels belong together. Pass both or none.")
    if args.val_images is None and (args.val_image_key or args.val_label_key):
        raise InvalidInputError("--val_image_key and --val_label_key need --val_images and --val_labels.")
    if args.resume and args.overwrite:
        raise InvalidInputError("--resume goes on with a training and --overwrite starts anew. Pass one of them.")
    if args.seed < 0:
        raise InvalidInputError(f"--seed must not be negative, but is {args.seed}.")
    if args.segmentation_decoder == "instances_only":
        for name in ("n_objects", "n_sub_iteration", "two_steps"):
            if getattr(args, name):
                raise InvalidInputError(f"--{name} is for training with prompts, not for instances_only. Leave it out.")
    if args.output_path is not None:
        _check_output(Path(args.output_path), args)


def _check_output(output: Path, args: argparse.Namespace) -> None:
    if output.suffix.lower() not in (".pt", ".pth", _PACKAGE):
        raise InvalidInputError(f"{output} must end with .pt or .pth, or with .zip for a package for bioimage.io.")
    if output.suffix.lower() == _PACKAGE:
        if args.segmentation_decoder == "instances_only":
            raise InvalidInputError(
                "A package for bioimage.io needs a model for prompts, which instances_only does not train. Choose an "
                "output that ends with .pt."
            )
        if output.exists() and not args.overwrite:
            raise OutputExistsError(f"{output} exists. Choose another output, or remove it.")


def _early_stopping(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdigit() or int(text) < 1:
        raise InvalidInputError(f"--early_stopping takes a positive integer or none, but got {text!r}.")
    return int(text)


def _peft(text: str | None, layers: Sequence[int] | None) -> dict[str, Any] | None:
    """The options that `lora:4` stands for; None leaves the preset's, an empty dict switches it off."""
    if text is None:
        if layers is not None:
            raise InvalidInputError("--peft_layers belongs to a method. Pass --peft as well, for example lora:4.")
        return None
    method, colon, rank = text.lower().partition(":")
    if method == "none" and not colon:
        return {}
    if method not in _PEFT:
        raise InvalidInputError(f"There is no method {method!r} for --peft. {nearest_names(method, _PEFT)}")
    if colon and not rank.isdigit():
        raise InvalidInputError(f"--peft takes METHOD or METHOD:RANK with an integer, but got {text!r}.")
    options = {"peft_module": _PEFT[method], "attention_layers_to_update": layers}
    return {**options, "rank": int(rank)} if colon else options


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the training function, with those of the preset."""
    from ..training.configurations import check_configuration, choose_configuration, configuration_options
    from ..training.job import choose_model
    from ..training.model_setup import check_freeze

    if args.configuration is not None:
        check_configuration(args.configuration)
    model_type = choose_model(args.model_type, args.checkpoint_path)
    peft_kwargs = _peft(args.peft, args.peft_layers)
    check_freeze(args.freeze, peft_kwargs)
    options = {
        "model_type": model_type, "peft_kwargs": peft_kwargs, "n_objects_per_batch": args.n_objects,
        "n_sub_iteration": args.n_sub_iteration,
    }
    options = configuration_options(args.configuration or choose_configuration(args.device), options)
    options = {name: value for name, value in options.items() if value is not None}
    options |= {
        "checkpoint_path": args.checkpoint_path, "freeze": args.freeze, "device": args.device,
        "n_epochs": args.n_epochs, "n_iterations": args.n_iterations, "lr": args.learning_rate,
        "early_stopping": _early_stopping(args.early_stopping), "seed": args.seed,
        "mixed_precision": args.mixed_precision, "gradient_clipping": args.gradient_clipping,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "checkpoint_encoder": args.checkpoint_encoder, "save_every_n_iterations": args.save_every,
    }
    if args.segmentation_decoder == "instances_only":
        return {n: v for n, v in options.items() if n not in ("n_objects_per_batch", "n_sub_iteration")}
    return {**options, "two_steps": args.two_steps}


def _run(args: argparse.Namespace) -> int:
    _check_arguments(args)
    console = Console(args)
    report = {"command": "train", "version": __version__, "arguments": vars(args), "status": "failed"}
    code = FAILED
    try:
        code = _finetune(args, console, report)
        return code
    except MicroSamError as error:
        report["error"], report["error_type"] = str(error), type(error).__name__
        code = SETUP if isinstance(error, ModelError | DeviceError) else USAGE
        raise
    except KeyboardInterrupt:
        report["status"], code = "stopped", INTERRUPTED
        raise
    finally:
        _write_report(args.json, report, code)


def _write_report(target: str | None, report: dict[str, Any], code: int) -> None:
    if target == "-":
        print(json.dumps({**report, "exit_code": code}, indent=2))
    elif target is not None:
        from ..core.output import write_json
        write_json(target, {**report, "exit_code": code})


def _finetune(args: argparse.Namespace, console: Console, report: dict[str, Any]) -> int:
    from ..core.progress import Cancelled, drain
    from ..core.settings import get_device
    from ..training.job import ExportError, FinetuneJob, find_data

    get_device(args.device)
    weights = package = None if args.output_path is None else Path(args.output_path)
    if package is not None and package.suffix.lower() == _PACKAGE:
        from ..bioimageio.compatibility import load_bioimageio
        load_bioimageio()  # what is missing is missed now, not after the training
        weights = package.with_suffix(".pt")
    options = _options(args)
    data = find_data(
        args.images, args.labels, args.image_key, args.label_key, args.val_images, args.val_labels,
        args.val_image_key, args.val_label_key, patch_shape=args.patch_shape, seed=args.seed,
    )
    job = FinetuneJob(
        data=data, options=options, mode=args.segmentation_decoder, name=args.trained_model_name,
        save_root=args.save_root, output_path=weights, patch_shape=tuple(args.patch_shape),
        batch_size=args.batch_size, num_workers=args.num_workers,
        preprocess=None if args.preprocess == "none" else args.preprocess, resume=args.resume,
        overwrite=args.overwrite, promote_worse=args.promote_worse,
    )
    console.say(f"Model: {job.model_type}{f', from {args.checkpoint_path}' if args.checkpoint_path else ''}")
    console.say(f"Data: {data.description}")
    found = drain(job.preflight_steps(), verbose=console.show_bars)
    report["preflight"] = json.loads(found.to_json())
    console.say(found.summary())
    found.raise_if_not_ok()
    if args.dry_run:
        report["status"] = "checked"
        console.say("This was a dry run: nothing was trained.")
        return OK
    try:
        result = job.run(say=console.say, verbose=console.show_bars)
    except Cancelled as error:
        report["status"] = "stopped"
        console.say(f"{error} Pass --resume to the same command to go on.")
        return INTERRUPTED
    except ExportError as error:
        report["error"], report["error_type"] = str(error), "ExportError"
        print_error(error, args.verbose)
        return FAILED
    report |= {
        "status": "done", "outcome": result.report, "checkpoint": str(result.checkpoint),
        "output": None if result.output is None else str(result.output),
    }
    console.say(f"Report and picture: {job.folder / 'outcome.json'}, {job.folder / 'outcome.png'}")
    console.say(_where(result, args.output_path))
    if result.output is None or weights == package:
        return OK
    try:
        _write_package(job, result.output, package, console)
    except MicroSamError as error:
        report["error"], report["error_type"] = str(error), type(error).__name__
        print_error(error, args.verbose)
        console.say(f"There is no {package}. Remove the cause and make it with micro_sam.export_model -c {weights}.")
        return FAILED
    report["package"] = str(package)
    console.say(f"Package for bioimage.io: {package}")
    return OK


def _write_package(job: Any, weights: Path, package: Path, console: Console) -> None:
    """Make a package of the finetuned model; its example is the first held-out image in which it finds something."""
    from ..bioimageio.model_export import export_sam_model
    from ..models.checkpoints import read_checkpoint

    architecture = read_checkpoint(weights, mmap=True).architecture
    name = f"micro_sam {job.name.replace('.', '-')}"
    for example in job.held_out():
        try:
            export_sam_model(
                example.image, example.labels, architecture, name, package, weights, overwrite=job.overwrite,
                verbose=console.show_bars,
            )
            return
        except NoObjectsError as error:
            found_nothing = error
    raise found_nothing


def _where(result: Any, output_path: str | None) -> str:
    if result.output is not None:
        return f"The finetuned model is exported to {result.output}. Use it with -c {result.output}."
    if output_path is not None:
        return f"Nothing was exported. The finetuned model is kept in {result.checkpoint}."
    return f"The finetuned model is {result.checkpoint}. Use it with -c {result.checkpoint}."


if __name__ == "__main__":
    sys.exit(main())
