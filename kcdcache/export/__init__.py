"""A condensed set for use elsewhere."""
