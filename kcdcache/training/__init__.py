"""The distillation step and Algorithm 1."""
