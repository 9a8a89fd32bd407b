"""For all tests."""

import signal

import torch

# A shell's background job, and so all of its children, ignores the interruptions that some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests are small: torch's threads would only wait for each other, minutes long on a busy machine.
torch.set_num_threads(1)
