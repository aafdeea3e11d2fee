import os
import shutil

import pytest

from sim import resources

# Compiling all kernels for an architecture takes minutes. These two have the machine code that test_sass.py looks at;
# `make resources` compiles for all.
ARCHITECTURES = ("80", "90") if os.environ.get("CI") else tuple(resources.LIMITS)


@pytest.mark.slow
@pytest.mark.timeout(2400)  # a busy machine makes many minutes of a few
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_kernels_compile_without_warnings_or_spills_and_the_table_is_theirs():
    log = resources.logs(ARCHITECTURES)
    assert not resources.faults(log)
    entries = resources.parse(log)
    assert {e["arch"] for e in entries} == set(ARCHITECTURES)
    others = {at: cell for at, cell in resources.written().items() if at[1] not in ARCHITECTURES}
    assert resources.table(entries, others) == resources.TABLE.read_text(), "run make resources"
