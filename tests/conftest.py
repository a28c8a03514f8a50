"""Shared set-up: shapes and types of the whole package are checked at run time while the tests run."""

import torch
from jaxtyping import install_import_hook

install_import_hook("kcdcache", "beartype.beartype")
torch.set_num_threads(1)
