"""View replay: the augmentation as a pure function of (seed, index, view)."""
