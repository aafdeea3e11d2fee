import shutil

import pytest

from sim import resources


@pytest.mark.slow
@pytest.mark.timeout(2400)  # each kernel for each architecture: minutes, of which a busy machine makes many
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_kernels_compile_without_warnings_or_spills_and_the_table_is_theirs():
    log = resources.logs(tuple(resources.LIMITS))
    assert "warning" not in log
    entries = resources.parse(log)
    assert {e["arch"] for e in entries} == set(resources.LIMITS)
    assert all(e["stores"] == e["loads"] == e["stack"] == 0 for e in entries)
    assert all(resources.resident_warps(e) >= 8 for e in entries)
    assert resources.table(entries) == resources.TABLE.read_text(), "run python tests/sim/resources.py"
