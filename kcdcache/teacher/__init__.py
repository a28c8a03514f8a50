"""A frozen network and what it fills a store with."""
