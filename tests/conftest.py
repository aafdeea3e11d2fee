import collections
import os
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, settings

import arm
import sim
from peftops import _C

# Processes of tests that each ask for every core would wait for each other. Programs that a test starts follow.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed says that, into the output of examples
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, os.cpu_count() // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

# The fixture below is set up once per test and not per example, which is what is wanted.
every_device = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.register_profile("dev", max_examples=40, **every_device)
settings.register_profile("ci", max_examples=80, derandomize=True, **every_device)
settings.register_profile("sanitize", max_examples=8, derandomize=True, **every_device)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


CUDA_DEVICES = ["cuda-sim"]
if torch.cuda.is_available():
    CUDA_DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))
ARM_WHOLE = os.environ.get("PEFTOPS_TEST_ARM", "").split()  # builds for AArch64 whose tests all run; see arm/README.md
ARM_DEVICES = [f"arm-{build}" for build in ARM_WHOLE or ["neon"]]
ARM_SLICE = 60  # tests, evenly spread, where not all are asked for
# Variants of one test in the simulator, which takes seconds for some: in CI a sample of them, by `make test-sim` all.
SIM_VARIANTS = 24 if os.environ.get("CI") and not os.environ.get("PEFTOPS_TEST_SIM") else None
DEVICES = [*(f"cpu-{isa}" for isa in _C.isas()), *CUDA_DEVICES, *ARM_DEVICES]


@pytest.fixture(params=DEVICES)
def device(request):
    """Each test that takes ``device`` runs on every build of every CPU kernel, on the CUDA kernels in the simulator
    (on CPU tensors; see sim/README.md), and on CUDA where there is one."""
    if request.param == "cuda":
        with sim.nf4_library("never"):  # each way has tests of its own, on every GPU
            yield "cuda"
        return
    if request.param == "cuda-sim":
        if isinstance(sim.cuda_ops(), str):
            pytest.skip(sim.cuda_ops())
        with sim.on_cpu_tensors():
            yield "cpu"
        return
    if request.param in ARM_DEVICES:
        if isinstance(arm.operators(), str):
            pytest.skip(arm.operators())
        with arm.on_cpu_tensors(request.param.removeprefix("arm-")):
            yield "cpu"
        return
    isa, old = request.param.removeprefix("cpu-"), _C.isa_limit()
    _C.set_isa_limit(isa)
    try:
        if _C.isa() != isa:  # never report a rung as tested that this CPU lacks
            pytest.skip(f"this CPU has no {isa}")
        yield "cpu"
    finally:
        _C.set_isa_limit(old)


def pytest_collection_modifyitems(items):
    """The simulator has the operators with a CUDA kernel, tested in ``test_<op>.py`` and ``test_<op>_<part>.py``; for
    all others it would only repeat a CPU rung. The number of CPU threads is nothing to it either:
    sim/test_budgets.py runs its kernels under several schedules instead."""
    of_kernel = re.compile(rf"test_({'|'.join(path.stem for path in sim.KERNELS)})(_|$)")
    is_sim = lambda item: hasattr(item, "callspec") and item.callspec.params.get("device") == "cuda-sim"
    wanted = lambda item: of_kernel.match(item.path.stem) and "threads" not in item.fixturenames
    is_arm = lambda item: hasattr(item, "callspec") and item.callspec.params.get("device") in ARM_DEVICES
    items[:] = [item for item in items if not is_sim(item) or wanted(item)]
    variants = collections.defaultdict(list)
    for item in filter(is_sim, items):
        variants[item.path, item.originalname].append(item)
    left_out = set()
    for (_, name), found in variants.items():
        random.Random(name).shuffle(found)
        left_out.update(found[SIM_VARIANTS:] if SIM_VARIANTS else ())
    items[:] = [item for item in items if item not in left_out]
    on_arm = [item for item in items if is_arm(item) and "threads" not in item.fixturenames]
    chosen = set(on_arm if ARM_WHOLE else on_arm[:: len(on_arm) // ARM_SLICE or 1])
    items[:] = [item for item in items if not is_arm(item) or item in chosen]


@pytest.fixture
def threads():
    """Restores the number of threads that a test changes."""
    old = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(old)
