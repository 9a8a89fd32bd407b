"""For all tests."""

import torch

# Tests are small: torch's threads would only wait for each other, minutes long on a busy machine.
torch.set_num_threads(1)
