"""Evaluation on LIVECell (Edlund et al. 2021, 10.1038/s41592-021-01249-6), with the folders of its distribution.

`<input>/images/livecell_test_images` and `<input>/images/livecell_train_val_images` hold the images, either all in one
folder or in one per cell type; `<input>/annotations/livecell_test_images/<cell type>` and
`<input>/annotations/livecell_train_val_images/<cell type>` the label images, named like the images; and
`<input>/val.json` lists the images of the validation split, in the format of COCO. Nothing is downloaded.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from segment_anything import SamPredictor

from ..core.errors import InvalidInputError, MissingFileError, require_positive_int
from ..core.output import read_record
from ..models.loading import get_sam_model
from .automatic import run_amg, run_instance_segmentation_with_decoder
from .evaluation import run_evaluation, run_evaluation_for_iterative_prompting
from .experiments import get_experiment_setting_name
from .grid_values import (
    default_grid_search_values_amg,
    default_grid_search_values_instance_segmentation_with_decoder,
)
from .inference import (
    precompute_all_embeddings,
    run_inference_with_iterative_prompting,
    run_inference_with_prompts,
)

CELL_TYPES = ("A172", "BT474", "BV2", "Huh7", "MCF7", "SHSY5Y", "SkBr3", "SKOV3")
_FOLDERS = {"test": "livecell_test_images", "val": "livecell_train_val_images"}
_HELP = (
    "Get images.zip, livecell_coco_test.json and livecell_coco_val.json from https://sartorius-research.github.io/"
    "LIVECell, unpack the images to <input>/images, and put livecell_coco_val.json to <input>/val.json. "
    "torch_em.data.datasets.light_microscopy.livecell.get_livecell_paths(<input>, split) writes the label images from "
    "<input>/test.json and <input>/val.json."
)


def _get_livecell_paths(
    input_folder: str | os.PathLike, split: str = "test", n_val_per_cell_type: int | None = None
) -> tuple[list[str], list[str]]:
    """Return the paths of the images of a split and of their label images, by cell type and name.

    Args:
        input_folder: The folder of the dataset, see above.
        split: `test` or `val`.
        n_val_per_cell_type: How many images per cell type to take of the validation split; None takes all.

    Raises:
        MissingFileError: If something is missing; says what to place where.
        InvalidInputError: If the split is unknown.
    """
    if split not in _FOLDERS:
        raise InvalidInputError(f"split must be 'test' or 'val', but is {split!r}.")
    folder = Path(input_folder).expanduser()
    images, annotations = folder / "images" / _FOLDERS[split], folder / "annotations" / _FOLDERS[split]
    for needed in (images, annotations, *([folder / "val.json"] if split == "val" else [])):
        if not needed.exists():
            raise MissingFileError(f"The LIVECell dataset is not complete: there is no {needed}. {_HELP}")
    image_paths, gt_paths = [], []
    names = _names_of_split(folder, annotations, split)
    for cell_type in CELL_TYPES:
        of_type = sorted(name for name in names if name.split("_")[0] == cell_type)
        if split == "val" and n_val_per_cell_type is not None:
            require_positive_int("n_val_per_cell_type", n_val_per_cell_type)
            of_type = of_type[:n_val_per_cell_type]
        image_paths += [_existing(images / name, images / cell_type / name) for name in of_type]
        gt_paths += [_existing(annotations / cell_type / name) for name in of_type]
    if not image_paths:
        raise MissingFileError(
            f"There are no images of the cell types {', '.join(CELL_TYPES)} for the {split} split in {folder}. {_HELP}"
        )
    return image_paths, gt_paths


def _names_of_split(folder: Path, annotations: Path, split: str) -> list[str]:
    if split == "test":
        return [path.name for cell_type in CELL_TYPES for path in (annotations / cell_type).glob("*.tif")]
    path = folder / "val.json"
    try:
        return [image["file_name"] for image in json.loads(path.read_text(encoding="utf-8"))["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is not a list of images in the format of COCO. {_HELP}") from error


def _existing(*paths: Path) -> str:
    for path in paths:
        if path.is_file():
            return str(path)
    raise MissingFileError(f"The LIVECell dataset is not complete: there is no {paths[0]}. {_HELP}")


def livecell_inference(
    checkpoint: str | os.PathLike | None,
    input_folder: str | os.PathLike,
    model_type: str,
    experiment_folder: str | os.PathLike,
    use_points: bool,
    use_boxes: bool,
    n_positives: int | None = None,
    n_negatives: int | None = None,
    prompt_folder: str | os.PathLike | None = None,
    predictor: SamPredictor | None = None,
) -> None:
    """Segment the test images from points or boxes of their truth.

    The labels are written to `<experiment>/<name of the setting>`, see `get_experiment_setting_name`, and the
    embeddings to `<experiment>/embeddings`.

    Args:
        checkpoint: A checkpoint; None takes the published model.
        input_folder: The folder of the dataset.
        model_type: The name of the model, or the architecture of the checkpoint.
        experiment_folder: Where to write the results.
        use_points: Whether to use points.
        use_boxes: Whether to use boxes.
        n_positives: Positive points per object; needed with points.
        n_negatives: Negative points per object; needed with points.
        prompt_folder: Where prompts are kept, so that models are compared with the same ones; None derives them anew.
        predictor: A predictor that is loaded already, in place of the model.

    Raises:
        MissingFileError: If data is missing; says what to place where.
        InvalidInputError: If numbers of points are missing, or there are no prompts.
    """
    if use_points and (n_positives is None or n_negatives is None):
        raise InvalidInputError("Points need n_positives and n_negatives. Pass both.")
    setting = {
        "use_points": use_points, "use_boxes": use_boxes, "n_positives": n_positives or 0,
        "n_negatives": n_negatives or 0,
    }
    prediction_dir = Path(experiment_folder) / get_experiment_setting_name(setting)
    image_paths, gt_paths = _get_livecell_paths(input_folder)
    predictor = get_sam_model(model_type, checkpoint_path=checkpoint) if predictor is None else predictor
    run_inference_with_prompts(
        predictor, image_paths, gt_paths, Path(experiment_folder) / "embeddings", prediction_dir, **setting,
        prompt_save_dir=prompt_folder,
    )


def run_livecell_precompute_embeddings(
    checkpoint: str | os.PathLike | None,
    input_folder: str | os.PathLike,
    model_type: str,
    experiment_folder: str | os.PathLike,
    n_val_per_cell_type: int = 25,
) -> None:
    """Compute the embeddings of the validation and test images, in `<experiment>/embeddings`.

    Args:
        checkpoint: See `livecell_inference`, also for the following.
        input_folder: .
        model_type: .
        experiment_folder: .
        n_val_per_cell_type: How many validation images per cell type to take.

    Raises:
        MissingFileError: If data is missing; says what to place where.
    """
    val_paths, _ = _get_livecell_paths(input_folder, "val", n_val_per_cell_type)
    test_paths, _ = _get_livecell_paths(input_folder, "test")
    predictor = get_sam_model(model_type, checkpoint_path=checkpoint)
    precompute_all_embeddings(predictor, val_paths + test_paths, Path(experiment_folder) / "embeddings")


def run_livecell_iterative_prompting(
    checkpoint: str | os.PathLike | None,
    input_folder: str | os.PathLike,
    model_type: str,
    experiment_folder: str | os.PathLike,
    start_with_box: bool = False,
    use_masks: bool = False,
) -> str:
    """Segment the test images from a first prompt and corrections, see `run_inference_with_iterative_prompting`.

    Args:
        checkpoint: See `livecell_inference`, also for the following.
        input_folder: .
        model_type: .
        experiment_folder: .
        start_with_box: Whether the first prompt is a box, else a point.
        use_masks: Whether the logits of the last prediction are a prompt for the next, too.

    Returns:
        The folder with the labels of all iterations, `<experiment>/start_with_box` or `<experiment>/start_with_point`.

    Raises:
        MissingFileError: If data is missing; says what to place where.
    """
    image_paths, gt_paths = _get_livecell_paths(input_folder)
    prediction_dir = Path(experiment_folder) / f"start_with_{'box' if start_with_box else 'point'}"
    predictor = get_sam_model(model_type, checkpoint_path=checkpoint)
    run_inference_with_iterative_prompting(
        predictor, image_paths, gt_paths, Path(experiment_folder) / "embeddings", prediction_dir,
        start_with_box_prompt=start_with_box, use_masks=use_masks,
    )
    return str(prediction_dir)


def run_livecell_amg(
    checkpoint: str | os.PathLike | None,
    input_folder: str | os.PathLike,
    model_type: str,
    experiment_folder: str | os.PathLike,
    iou_thresh_values: list[float] | None = None,
    stability_score_values: list[float] | None = None,
    verbose_gs: bool = False,
    n_val_per_cell_type: int = 25,
) -> str:
    """Segment the test images by AMG, with the settings that are best on the validation images; see `run_amg`.

    Args:
        checkpoint: See `livecell_inference`, also for the following.
        input_folder: .
        model_type: .
        experiment_folder: .
        iou_thresh_values: See `default_grid_search_values_amg`.
        stability_score_values: Likewise.
        verbose_gs: Whether to show progress.
        n_val_per_cell_type: How many validation images per cell type to take.

    Returns:
        The folder with the labels.

    Raises:
        MissingFileError: If data is missing; says what to place where.
    """
    return run_amg(
        checkpoint, model_type, experiment_folder, *_get_livecell_paths(input_folder, "val", n_val_per_cell_type),
        _get_livecell_paths(input_folder, "test")[0], cache_embeddings=True, verbose=verbose_gs,
        grid_search_values=default_grid_search_values_amg(iou_thresh_values, stability_score_values),
    )


def run_livecell_instance_segmentation_with_decoder(
    checkpoint: str | os.PathLike | None,
    input_folder: str | os.PathLike,
    model_type: str,
    experiment_folder: str | os.PathLike,
    center_distance_threshold_values: list[float] | None = None,
    boundary_distance_threshold_values: list[float] | None = None,
    distance_smoothing_values: list[float] | None = None,
    min_size_values: list[float] | None = None,
    verbose_gs: bool = False,
    n_val_per_cell_type: int = 25,
) -> str:
    """Segment the test images by AIS, with the settings that are best on the validation images.

    Args:
        checkpoint: See `livecell_inference`, also for the following.
        input_folder: .
        model_type: .
        experiment_folder: .
        center_distance_threshold_values: See `default_grid_search_values_instance_segmentation_with_decoder`.
        boundary_distance_threshold_values: Likewise.
        distance_smoothing_values: Likewise.
        min_size_values: Likewise.
        verbose_gs: Whether to show progress.
        n_val_per_cell_type: How many validation images per cell type to take.

    Returns:
        The folder with the labels.

    Raises:
        MissingFileError: If data is missing; says what to place where.
    """
    grid = default_grid_search_values_instance_segmentation_with_decoder(
        center_distance_threshold_values, boundary_distance_threshold_values, distance_smoothing_values,
        min_size_values,
    )
    return run_instance_segmentation_with_decoder(
        checkpoint, model_type, experiment_folder, *_get_livecell_paths(input_folder, "val", n_val_per_cell_type),
        _get_livecell_paths(input_folder, "test")[0], cache_embeddings=True, verbose=verbose_gs,
        grid_search_values=grid,
    )


def _inference_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Segment LIVECell with a model: automatically, from prompts, or from prompts and corrections."
    )
    parser.add_argument("-c", "--ckpt", help="a checkpoint; default: the published model")
    parser.add_argument("-i", "--input", required=True, help="the folder of the dataset")
    parser.add_argument("-e", "--experiment_folder", required=True, help="where to write the results")
    parser.add_argument("-m", "--model", required=True, help="name of the model, or architecture of the checkpoint")
    parser.add_argument("-p", "--precompute_embeddings", action="store_true", help="compute the embeddings only")
    parser.add_argument("-ip", "--iterative_prompting", action="store_true", help="segment from prompt and corrections")
    parser.add_argument("-amg", "--amg", action="store_true", help="segment automatically, with a grid of points")
    parser.add_argument("-ais", "--ais", action="store_true", help="segment automatically, with the decoder")
    parser.add_argument("-b", "--start_with_box", action="store_true", help="start from boxes, not from points")
    parser.add_argument("--use_masks", action="store_true", help="use the last mask as prompt for the next one")
    parser.add_argument("--n_val_per_cell_type", type=int, default=25, help="validation images per cell type")
    return parser


def run_livecell_inference(argv: Sequence[str] | None = None) -> None:
    """Run the inference that the arguments of the command line ask for (`--help` lists them).

    Args:
        argv: The arguments; None takes those of the process.

    Raises:
        InvalidInputError: If nothing is asked for.
        MissingFileError: If data is missing; says what to place where.
    """
    args = _inference_parser().parse_args(argv)
    common = (args.ckpt, args.input, args.model, args.experiment_folder)
    if not (args.precompute_embeddings or args.iterative_prompting or args.amg or args.ais):
        raise InvalidInputError("There is nothing to do. Pass -p, -ip, -amg or -ais.")
    if args.precompute_embeddings:
        run_livecell_precompute_embeddings(*common, n_val_per_cell_type=args.n_val_per_cell_type)
    if args.iterative_prompting:
        run_livecell_iterative_prompting(*common, start_with_box=args.start_with_box, use_masks=args.use_masks)
    if args.amg:
        run_livecell_amg(*common, verbose_gs=True, n_val_per_cell_type=args.n_val_per_cell_type)
    if args.ais:
        run_livecell_instance_segmentation_with_decoder(
            *common, verbose_gs=True, n_val_per_cell_type=args.n_val_per_cell_type
        )


def run_livecell_evaluation(argv: Sequence[str] | None = None) -> None:
    """Score the results of `run_livecell_inference`: automatic ones and those of iterative prompting, as far as there.

    The tables are written to `<experiment>/results`, and printed.

    Args:
        argv: The arguments; None takes those of the process.

    Raises:
        MissingFileError: If there are no results, or data is missing; says what to place where.
    """
    parser = argparse.ArgumentParser(description="Score the results of the inference on LIVECell.")
    parser.add_argument("-i", "--input", required=True, help="the folder of the dataset")
    parser.add_argument("-e", "--experiment_folder", required=True, help="the folder with the results")
    parser.add_argument("-f", "--force", action="store_true", help="replace tables of earlier results")
    args = parser.parse_args(argv)
    image_paths, gt_paths = _get_livecell_paths(args.input)
    experiment, found = Path(args.experiment_folder), False
    for mode in ("amg", "instance_segmentation_with_decoder"):
        folder = experiment / mode / "inference"
        if folder.is_dir():
            predictions = [str(folder / f"{Path(path).stem}.tif") for path in image_paths]
            table = run_evaluation(gt_paths, predictions, experiment / "results" / f"{mode}.csv")
            print(f"{mode}:\n{table.to_string(index=False)}")
            found = True
    for start in ("box", "point"):
        folder = experiment / f"start_with_{start}"
        if folder.is_dir():
            record = read_record(folder / "iteration00" / f"{Path(image_paths[0]).stem}.tif") or {}
            table = run_evaluation_for_iterative_prompting(
                gt_paths, folder, experiment, start_with_box_prompt=start == "box", overwrite_results=args.force,
                use_masks=record.get("settings", {}).get("use_masks", False),
            )
            print(f"start with {start}:\n{table.to_string()}")
            found = True
    if not found:
        raise MissingFileError(f"There are no results in {experiment}. Run run_livecell_inference first.")
