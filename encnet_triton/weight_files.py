"""Now `encnet_triton.weights.reading` and `encnet_triton.files`; imports from here stay valid."""

from encnet_triton.files import write_tensors as write_plain
from encnet_triton.weights.reading import listed, read_document, read_tensors
from encnet_triton.weights.reading import state_dict_of as tensors_in

__all__ = ["listed", "read_document", "read_tensors", "tensors_in", "write_plain"]
