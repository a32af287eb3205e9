"""Settings of the whole test run."""

import torch

torch.set_num_threads(1)  # the tensors of tests are tiny: more threads only wait for each other
