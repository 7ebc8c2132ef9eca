"""Networks of the tests are tiny: a team of threads would only wait for each other, longest where cores are busy."""

import torch

torch.set_num_threads(1)
