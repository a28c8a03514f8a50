"""Shared set-up: shapes and types of the whole package are checked at run time while the tests run."""

import hypothesis
import torch
from jaxtyping import install_import_hook

install_import_hook("kcdcache", "typechecking.check")
torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")
