"""Labelled images by index."""
