"""Arrays as users have them: of numpy, of torch, or what numpy makes one of."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(content: Any) -> np.ndarray:
    """The array behind `content`, in the byte order of this machine.

    Torch is not imported: its tensors are told by their methods. bfloat16 becomes float32, which
    numpy has, and sparse tensors become dense.

    Raises:
        ValueError: there is none; the message says why.
    """
    try:
        array: np.ndarray = np.asarray(_of_torch(content))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    if array.dtype.byteorder in "=|" or array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))


def _of_torch(content: Any) -> Any:
    if not hasattr(content, "detach"):
        return content
    tensor = content.detach()
    if tensor.is_meta:
        raise ValueError("it is on the device 'meta' and has no data")
    if tensor.is_sparse or str(tensor.layout) != "torch.strided":
        tensor = tensor.to_dense()
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
