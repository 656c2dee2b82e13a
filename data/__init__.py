"""Data sets: how to get them, and tools that make or convert them. Not part of the installed package."""
