"""What every test starts from."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

import offload_trainer.run  # noqa: F401  all that a run imports

gc.freeze()  # what is imported by now is never garbage; each run collects twice, and would walk all of it
torch.set_num_threads(1)  # for tensors this small threads cost more than they give
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and in the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts in the background


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def a_new_accelerator() -> Iterator[None]:
    """Accelerate remembers the first Accelerator of a process; a run in a test is a process of its own otherwise."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
