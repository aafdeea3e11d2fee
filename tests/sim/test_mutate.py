"""Are the tests of the CUDA kernels able to fail? A fixed sample of broken kernels; mutate.py runs larger ones."""

import pytest

import sim
from sim import mutate


@pytest.mark.parametrize("kernel", mutate.CASES)
def test_broken_kernels_are_noticed(kernel):
    """What survives does the same in another way: a tail that takes the slow path, a mask over bits that are zero, a
    start value for rows that nobody reads. mutate.py lists them."""
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    verdicts, survivors = mutate.run(kernel, 40, seed=3)
    assert sum(verdicts.values()) == 40
    assert len(survivors) <= 7, survivors
    assert len(verdicts) >= 4, verdicts  # wrong results, and findings of several kinds


def test_the_unbroken_kernels_are_left_behind():
    if isinstance(sim.cuda_ops(), str):
        pytest.skip(sim.cuda_ops())
    for kernel, f in mutate.CASES.items():
        with sim.on_cpu_tensors():
            first = mutate.observe(f)
        mutate.run(kernel, 1, seed=1)
        with sim.on_cpu_tensors():
            assert mutate.judge(f, first) == "SURVIVED"
