"""Networks of the tests are tiny: a team of threads would only wait for each other, longest where cores are busy.

Around each module, because engines that other tests open set the number for the whole process, and sums of a team of
threads round differently.
"""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
