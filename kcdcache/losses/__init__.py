"""Distillation losses as pure functions."""
