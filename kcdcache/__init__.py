"""kcdcache: run the teacher once, keep what matters, teach any student."""

__version__ = "0.1.0.dev0"
