"""Metrics of masks and boxes that text names, one file each."""
