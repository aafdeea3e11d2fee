import pytest

import sim


@pytest.fixture
def chip():
    """The interpreter as it is at first: for tests that bring PTX of their own."""
    chip = sim.simulator()
    if isinstance(chip, str):
        pytest.skip(chip)
    chip.options()
    chip.forbid_all()
    yield chip
    chip.options()
