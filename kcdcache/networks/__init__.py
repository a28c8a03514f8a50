"""Architectures, weights and feature taps."""
