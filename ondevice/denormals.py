"""Treats numbers under 1.2e-38 as 0 while a graph runs, and only then.

In training, some values shrink to denormals. An x86 processor takes many times as long for each of
them. ONNX Runtime has a setting against this, but it applies only to the thread that makes the
first session of a process, and it stays on after the session. Payloads that this thread encodes
would then differ from those of a simulation. So each run of a graph sets the mode and resets it.

On other machines than x86 with glibc, nothing is changed.
"""

import ctypes
import platform

# MXCSR is the last 32-bit word of glibc's fenv_t; its bits 15 and 6 are FTZ and DAZ.
_WORDS, _MXCSR, _ZERO = 8, 7, 1 << 15 | 1 << 6
_Environment = ctypes.c_uint32 * _WORDS


def _glibc() -> ctypes.CDLL | None:
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")


_LIBM = _glibc()


class Denormals:
    """A context in which this thread treats denormals as 0, or keeps them.

    Args:
        flush: whether denormals are treated as 0.
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

    def __exit__(self, *_: object) -> None:
        if _LIBM is not None:
            _LIBM.fesetenv(self._outside)
