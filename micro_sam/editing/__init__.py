"""Correct label images and tracks: every edit is one sparse change that can be undone, redone and kept in a journal."""
