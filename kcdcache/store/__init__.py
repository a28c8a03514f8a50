"""The teacher's outputs on disk."""
