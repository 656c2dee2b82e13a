"""Metrics of tracks, one file each."""
