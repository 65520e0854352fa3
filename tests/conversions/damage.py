"""How a checkpoint that cannot be read must fail."""

import pytest

from lordjax.conversions.readers.checkpoint import open_checkpoint


def fails(directory, *parts, kind=ValueError, then=lambda c: None):
    with pytest.raises(kind) as error:
        then(open_checkpoint(directory))
    for part in (str(directory), *parts):
        assert part in str(error.value)
