"""`python -m kcdcache` is the command `kcdcache`."""

from kcdcache.cli import main

main()
