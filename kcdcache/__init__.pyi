"""The Python API for type checkers, see `__init__.py`."""

from kcdcache.commands.api import (
    Run as Run,
)
from kcdcache.commands.api import (
    condense as condense,
)
from kcdcache.commands.api import (
    data as data,
)
from kcdcache.commands.api import (
    evaluate as evaluate,
)
from kcdcache.commands.api import (
    fit as fit,
)
from kcdcache.commands.api import (
    loader as loader,
)
from kcdcache.commands.api import (
    open_condensed as open_condensed,
)
from kcdcache.commands.api import (
    open_run as open_run,
)
from kcdcache.commands.api import (
    open_store as open_store,
)
from kcdcache.commands.api import (
    points as points,
)
from kcdcache.commands.api import (
    precompute as precompute,
)
from kcdcache.commands.api import (
    train as train,
)

__version__: str
__all__: list[str]
