"""Many commands, in order or side by side."""
