"""Reports without a GPU: kernels are compiled or interpreted, networks run on fake tensors."""
