"""What the controls of the panels are for, by panel and name of the control."""

from collections.abc import Mapping
from types import MappingProxyType

_PATH = "Where the record of what you commit is written. Leave it empty to keep everything in the session only."
_AUTO = {
    "center_distance_threshold": "Lower finds more objects and merges less; higher finds fewer. 0 to 1.",
    "boundary_distance_threshold": "How far from the boundary an object must begin. Higher splits touching objects.",
    "foreground_threshold": "How sure the model must be that a pixel belongs to an object. 0 to 1.",
    "distance_smoothing": "Smoothing of the distance maps in pixels. More smoothing splits objects less.",
    "mode": "How objects are found. It follows from the model and from the embedding settings.",
    "points_per_side": "Points that are tried per row and column. More points find smaller objects and take longer.",
    "min_size": "Objects with fewer pixels are left out.",
    "nms_threshold": "Of two masks that overlap more than this, only the better one is kept. 0 to 1.",
    "pred_iou_thresh": "Masks that the model itself scores lower are left out. 0 to 1.",
    "stability_score_thresh": "Masks that change more when the threshold is shifted are left out. 0 to 1.",
    "box_nms_thresh": "Of two masks whose boxes overlap more than this, only the better one is kept. 0 to 1.",
    "min_object_size": "Objects with fewer pixels are left out.",
    "gap_closing": "Objects that are missing in up to this many slices or frames in between are joined. 0 is off.",
    "min_extent": "Objects in fewer slices or frames are left out.",
    "min_z_extent": "Objects in fewer slices or frames are left out.",
    "beta": "Above 0.5, objects of neighbouring slices are joined more readily, below less. 0 to 1.",
    "apply_to_volume": "Segment all slices and join them to objects in 3D, instead of the present slice.",
    "track_timeseries": "Segment and track all frames, instead of segmenting the present one.",
    "run_button": "Find all objects without prompts. They are shown in auto_segmentation until you commit them.",
}
_ND = {
    "projection": "What is handed on from one slice or frame to the next: the box of the object, its mask, or points.",
    "iou_threshold": "Stop where the object overlaps less than this with that of the slice or frame before. 0 to 1.",
    "box_extension": "By how much boxes are enlarged before they are handed on, as a fraction of their size.",
    "motion_smoothing": "How much of the earlier movement of an object is kept. 0 to 1; higher is smoother.",
    "run_button": "Carry the object through all slices or frames, from those that have prompts.",
}

_LABEL = "Whether the next point is inside the object (positive) or outside (negative)."
_TRACKING = {
    "track_id": "The track that new prompts belong to.",
    "track_state": "division: the object divides in this frame, and two new tracks begin after it.",
}

_TOOLTIPS: Mapping[str, Mapping[str, str]] = MappingProxyType({
    "embedding": {
        "image": "The image to annotate.",
        "image_layer": "The image to annotate.",
        "model": "What the model was trained for. Choose the one nearest to your images.",
        "model_family": "What the model was trained for. Choose the one nearest to your images.",
        "model_size": "Larger models are more accurate and slower. Start with base, or tiny without a GPU.",
        "device": "Where the model runs. auto takes a GPU if there is one.",
        "embeddings_save_path": "A folder that keeps the embeddings. Empty uses the automatic cache, which finds them "
        "again by the content of the image.",
        "custom_weights": "Your own checkpoint, for example best.pt of a finetuning. Its type is read from the file.",
        "tile_shape": "Large images are cut into tiles of this height (Y) and width (X) in pixels. 0 is off.",
        "halo": "By how much tiles overlap in Y and X, in pixels: more than half the size of the largest object.",
        "automatic_segmentation_mode": "How objects are found without prompts. auto takes the decoder if the model has "
        "one, else a grid of points.",
        "run_button": "Compute what the model sees in the image, once. Then each click gives a mask at once.",
    },
    "prompt_menu": {"labels": _LABEL},
    "prompts": {"label": _LABEL, **_TRACKING},
    "segment": {
        "live": "Segment as soon as a point or shape is placed. Without it, press S.",
        "drop_specks": "Leave out parts that no positive point lies on and that are outside of the box.",
        "batched": "Each positive point and each box is an object of its own.",
        "run_button": "Segment the object from the points and shapes.",
    },
    "segmentnd": _ND,
    "segment_nd": _ND,
    "autosegment": _AUTO,
    "annotator_tracking": _TRACKING,
    "commit": {
        "layer": "Which result becomes part of the committed objects.",
        "preserve_mode": "What happens where a new object meets committed ones. objects: a committed object that is "
        "mostly covered is kept and the new one left out. pixels: only background is filled. none: new ones win.",
        "preservation_threshold": "How much of a committed object must be covered for it to be kept. 0 to 1.",
        "commit_path": _PATH,
        "run_button": "Add the result to the committed objects under new ids.",
    },
    "clear": {
        "all_slices": "Clear the prompts and the current object in all slices, or only in the present one.",
        "all_frames": "Clear the prompts and the current tracks in all frames, or only in the present one.",
        "run_button": "Remove the prompts and the current object. Committed objects stay.",
        "undo": "Take back the last action: a prompt, a commit, a stroke, a deletion.",
        "redo": "Repeat what was undone.",
        "save": "Write the committed objects to a file (tif or zarr).",
    },
    "objects": {
        "next_worst": "Go to the object with the lowest confidence that was not looked at yet.",
        "correct": "Copy the selected object to current_object. Add prompts, then commit to replace it under its id.",
        "delete": "Remove the selected objects.",
        "merge": "Make one object of the selected ones.",
        "measure": "Measure size, shape and intensity of all objects, as more columns of the table.",
        "export": "Write the table to a file (csv, parquet or xlsx).",
        "id": "The number of the object in committed_objects.",
        "size": "Pixels or voxels of the object.",
        "confidence": "How sure the model is of the object, 0 to 1; a dash where it was not asked.",
    },
    "image_series_annotator": {
        "folder": "The folder with the images.",
        "output_folder": "Where the segmentations are written; another folder than that of the images.",
        "pattern": "Which files are taken, for example *.tif.",
        "is_volumetric": "Whether the images are volumes (Z, Y, X).",
        "skip_segmented": "Whether images that have a segmentation already are passed over.",
        "embedding_folder": "A folder that keeps the embeddings of all images. Empty uses the automatic cache.",
        "initial_folder": "A folder with segmentations to begin with, named like the images.",
        "run_button": "Open the first image that has no segmentation yet.",
        "previous": "Save this image and show the one before [Shift + N].",
        "next": "Save this image and show the next one [N].",
    },
    "settings": {
        "cache_directory": "Where models, sample data and automatic embeddings are kept.",
        "cache_size": "Above this size the embeddings that were not used for longest are deleted.",
        "precision": "How models compute that are loaded from now on. Half precision changes masks a little. It is "
        "faster on GPUs and on some processors.",
        "clear_cache": "Delete all embeddings in the automatic cache. Those in folders of your own stay.",
        "run_button": "Keep these settings, also for the next start.",
    },
})


def get_tooltip(widget_type: str, name: str) -> str | None:
    """Return the tooltip of a control, or None if there is no such panel or control."""
    return _TOOLTIPS.get(widget_type, {}).get(name)
