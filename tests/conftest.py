import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores: nested parallelism makes the suite crawl

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """The folder with real data, or a skip: it cannot be shipped."""
    from pathlib import Path

    root = os.environ.get("LESIONBENCH_REAL_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("needs real data: set LESIONBENCH_REAL_DATA to a folder that holds brats18/")
    return Path(root)
