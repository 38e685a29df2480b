"""csrc/cuda/logprob.h for ctypes: the part of ``fastrl._C`` that kernels/logprob/cuda.py calls.

No torch here: AddressSanitizer's processes import it too.
"""

import ctypes

P, L, F, E = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int


def address(array) -> int:
    return array.ctypes.data if array.size else 0


def _struct(name: str, *kinds: type) -> type:
    fields = [(f"field{i}", kind) for i, kind in enumerate(kinds)]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


class Host:
    """The functions of a library that gpu_proof.build_on_host made, under their names in _C."""

    class Float:
        float32, bfloat16, float16 = range(3)

    tile_args = _struct("TileArgs", L, L, L, P, L, P, P, P, F, F)
    kept_args = _struct("KeptArgs", P, E, L, P, L, F)
    linear_logprob_fold_args = _struct("FoldArgs", tile_args, kept_args, P, P, P, P)
    linear_logprob_gradient_args = _struct(
        "GradientArgs", tile_args, kept_args, P, P, P, P, P, P, P, E, L
    )

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))

    def linear_logprob_fold_cuda(self, args, stream: int) -> int:
        return self._library.fold(ctypes.byref(args))

    def linear_logprob_gradient_cuda(self, args, stream: int) -> int:
        return self._library.gradient(ctypes.byref(args))
