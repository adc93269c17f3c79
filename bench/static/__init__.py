"""Reports without a GPU: kernels are compiled or interpreted, networks counted on fake tensors."""
