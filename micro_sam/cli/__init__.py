"""Console scripts: argument parsing only; heavy imports happen inside the functions."""
