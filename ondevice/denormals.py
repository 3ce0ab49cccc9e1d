"""Numbers under 1.2e-38 count as 0 while a training step runs, and only then.

Values that fade to denormals in training are slow on x86: the processor takes many
times as long for each. ONNX Runtime has a setting against it, but it holds only in the thread that
makes the first session of a process, and goes on there after the session. Payloads that are encoded
in that thread would then differ from those of a simulation. So a step sets it and takes it back.

Elsewhere than on x86 with glibc nothing is changed.
"""

import ctypes
import platform
from types import TracebackType

# MXCSR is the last 32-bit word of glibc's fenv_t; its bits 15 and 6 are FTZ and DAZ.
_WORDS, _MXCSR, _ZERO = 8, 7, 1 << 15 | 1 << 6
_Environment = ctypes.c_uint32 * _WORDS


def _glibc() -> ctypes.CDLL | None:
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")


_LIBM = _glibc()


class Denormals:
    """A context in which this thread takes denormals for 0, or keeps them.

    Args:
        flush: whether they are taken for 0.
    """

    def __init__(self, *, flush: bool) -> None:
        self._flush = flush
        self._outside, self._inside = _Environment(), _Environment()

    def __enter__(self) -> None:
        if _LIBM is None:
            return
        _LIBM.fegetenv(self._outside)
        ctypes.memmove(self._inside, self._outside, ctypes.sizeof(_Environment))
        self._inside[_MXCSR] &= ~_ZERO
        if self._flush:
            self._inside[_MXCSR] |= _ZERO
        _LIBM.fesetenv(self._inside)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _LIBM is not None:
            _LIBM.fesetenv(self._outside)
