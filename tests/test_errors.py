import pytest

from kcdcache import errors
from kcdcache.errors import InterruptedRunError, KcdcacheError

LEAVES = [error for error in vars(errors).values() if isinstance(error, type) and KcdcacheError in error.__mro__[1:]]


def test_every_leaf_has_its_own_exit_code():
    codes = [error.exit_code for error in (KcdcacheError, *LEAVES)]
    assert sorted(codes) == [*range(1, 12), 130]


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_ours_and_a_builtin_and_keeps_its_message(leaf):
    builtin = leaf.__mro__[2]
    assert builtin.__module__ == "builtins"
    with pytest.raises(builtin, match="what went wrong") as caught:
        raise leaf("what went wrong")
    assert isinstance(caught.value, KcdcacheError)
    assert str(caught.value) == "what went wrong"


def test_an_interruption_carries_the_code_of_its_signal():
    assert InterruptedRunError("stopped", 143).exit_code == 143
    assert InterruptedRunError("stopped").exit_code == 130
