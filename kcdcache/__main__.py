"""`python -m kcdcache` is the command `kcdcache`."""

from kcdcache.cli.main import main

main()
