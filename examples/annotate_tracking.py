"""Track cells in napari: tick "Track time series", press "Automatic Tracking", then correct the tracks in the list."""

import argparse

from micro_sam.sam_annotator import annotator_tracking
from micro_sam.sample_data import sample_data_cells_tracking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=10, help="how many frames of the sample to take; default: all 10")
    parser.add_argument("-m", "--model", default="vit_t_lite")
    parser.add_argument("--embeddings", help="a zarr folder that keeps the embeddings; default: the automatic cache")
    args = parser.parse_args()

    movie = sample_data_cells_tracking()[0][0][:args.frames]
    annotator_tracking(movie, embedding_path=args.embeddings, model_type=args.model)


if __name__ == "__main__":
    main()
