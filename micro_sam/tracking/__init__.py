"""Objects over time: which object of a frame becomes which of the next one, as tracks with divisions."""
