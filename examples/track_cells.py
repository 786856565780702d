"""Track cells through a short movie, and write the tracks in two formats that other programs read."""

import argparse
from pathlib import Path

from micro_sam.automatic_segmentation import automatic_tracking, get_predictor_and_segmenter
from micro_sam.measurements import measure_tracks, write_table
from micro_sam.sample_data import sample_data_cells_tracking
from micro_sam.tracking.geff import write_geff

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10, help="how many frames of the movie; default: all 10")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "example_output/track_cells")
    args = parser.parse_args()

    movie = sample_data_cells_tracking()[0][0][:args.frames]
    predictor, segmenter = get_predictor_and_segmenter("vit_t_lite")
    # motile links the cells of neighbouring frames; it is installed and needs no model of its own.
    tracks, lineages = automatic_tracking(
        predictor, segmenter, movie, args.output / "ctc", tracking_model="motile", min_size=150, overwrite=True
    )
    write_geff(args.output / "tracks.zarr", tracks, lineages, overwrite=True)
    table = measure_tracks(tracks, movie, lineages, verbose=False)
    write_table(table, args.output / "tracks.csv", overwrite=True)
    print(f"{tracks.max()} tracks in {len(movie)} frames, {len(lineages)} trees")
    print(f"Cell Tracking Challenge files, GEFF and a table of the tracks are in {args.output}")


if __name__ == "__main__":
    main()
