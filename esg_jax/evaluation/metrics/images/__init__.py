"""Metrics of single images, one file each."""
