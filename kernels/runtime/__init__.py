"""What the operators share: which code runs, launches of kernels, tiles on a CPU."""
