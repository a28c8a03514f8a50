"""The networks of the paper, other networks by name, their weights, input transforms and feature taps."""
