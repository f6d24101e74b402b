"""libkbs through ctypes: finding it, its signatures, its errors as Python's.

A call costs about ten microseconds: right for packing and for tests, not for a step of a network.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

ABI_VERSION = 3

DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {"linear": 0, "tanh": 1, "sigmoid": 2, "relu": 3, "hard_sigmoid": 4, "clipped_relu": 5}
COPY, STRUCTURE = 1, 2  # kbs_matrix_create
CELLS = {"simple_rnn": 0, "gru": 1, "lstm": 2}

FloatPointer = POINTER(c_float)
BytePointer = POINTER(c_uint8)

_UNSUPPORTED, _OUT_OF_MEMORY, _INTERNAL = 3, 4, 5


class Info(ctypes.Structure):
    """`kbs_info`."""

    _fields_ = [
        ("dtype", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("gates", c_int64),
        ("block_rows", c_int64),
        ("block_cols", c_int64),
        ("blocks", c_int64),
        ("elements", c_int64),
        ("bytes", c_int64),
        ("values_offset", c_int64),
        ("values_bytes", c_int64),
    ]


class Columns(ctypes.Structure):
    """`kbs_columns`."""

    _fields_ = [
        ("rows", c_int64),
        ("cols", c_int64),
        ("gates", c_int64),
        ("starts", POINTER(c_int64)),
        ("row", POINTER(c_int32)),
        ("values", FloatPointer),
        ("quantized", POINTER(c_int8)),
        ("scales", FloatPointer),
    ]


class RNNConfig(ctypes.Structure):
    """`kbs_rnn_config`."""

    _fields_ = [
        ("cell", c_int32),
        ("activation", c_int32),
        ("recurrent_activation", c_int32),
        ("reset_after", c_int32),
        ("activation_limit", c_float),
        ("recurrent_limit", c_float),
        ("kernel", c_void_p),
        ("recurrent", c_void_p),
        ("bias", FloatPointer),
    ]


class RNNCall(ctypes.Structure):
    """`kbs_rnn_call`."""

    _fields_ = [
        ("batch", c_int64),
        ("steps", c_int64),
        ("x", FloatPointer),
        ("mask", BytePointer),
        ("initial_h", FloatPointer),
        ("initial_c", FloatPointer),
        ("go_backwards", c_int32),
        ("return_sequences", c_int32),
        ("zero_output_for_mask", c_int32),
        ("reserved", c_int32),
        ("kernel_values", c_void_p),
        ("recurrent_values", c_void_p),
        ("bias", FloatPointer),
        ("y", FloatPointer),
        ("final_h", FloatPointer),
        ("final_c", FloatPointer),
        ("reserve", c_void_p),
    ]


class RNNGradients(ctypes.Structure):
    """`kbs_rnn_gradients`."""

    _fields_ = [
        ("dy", FloatPointer),
        ("dfinal_h", FloatPointer),
        ("dfinal_c", FloatPointer),
        ("dx", FloatPointer),
        ("dinitial_h", FloatPointer),
        ("dinitial_c", FloatPointer),
        ("dkernel_values", FloatPointer),
        ("drecurrent_values", FloatPointer),
        ("dbias", FloatPointer),
    ]


Signatures = dict[str, tuple[Any, list[Any]]]

_SIGNATURES: Signatures = {
    "kbs_last_error": (c_char_p, []),
    "kbs_get_isa": (c_int32, [POINTER(c_char_p)]),
    "kbs_available_isas": (c_char_p, []),
    "kbs_set_num_threads": (c_int32, [c_int32]),
    "kbs_get_num_threads": (c_int32, []),
    "kbs_limit_threads": (c_int32, [c_int32]),
    "kbs_packed_bytes": (
        c_int32,
        [FloatPointer, c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, BytePointer, POINTER(c_int64)],
    ),
    "kbs_pack": (
        c_int32,
        [FloatPointer, c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, BytePointer, c_void_p, c_int64],
    ),
    "kbs_validate": (c_int32, [c_void_p, c_int64]),
    "kbs_inspect": (c_int32, [c_void_p, c_int64, POINTER(Info)]),
    "kbs_unpack": (c_int32, [c_void_p, c_int64, FloatPointer]),
    "kbs_kept_blocks": (c_int32, [c_void_p, c_int64, BytePointer]),
    "kbs_positions": (c_int32, [c_void_p, c_int64, POINTER(c_int64)]),
    "kbs_matrix_create": (c_int32, [c_void_p, c_int64, c_int32, POINTER(c_void_p)]),
    "kbs_matrix_from_columns": (c_int32, [POINTER(Columns), c_int64, c_int64, c_int32, POINTER(c_void_p)]),
    "kbs_matrix_info": (c_int32, [c_void_p, POINTER(Info)]),
    "kbs_matrix_destroy": (None, [c_void_p]),
    "kbs_matmul": (
        c_int32,
        [c_void_p, c_void_p, FloatPointer, c_int64, c_int64, FloatPointer, c_int32, FloatPointer, c_int64],
    ),
    "kbs_matmul_transposed": (
        c_int32,
        [c_void_p, c_void_p, FloatPointer, c_int64, c_int64, FloatPointer, c_int64],
    ),
    "kbs_sampled_product": (
        c_int32,
        [c_void_p, FloatPointer, c_int64, FloatPointer, c_int64, c_int64, c_int32, FloatPointer],
    ),
    "kbs_activate": (c_int32, [c_int32, c_float, FloatPointer, c_int64, FloatPointer]),
    "kbs_rnn_create": (c_int32, [POINTER(RNNConfig), POINTER(c_void_p)]),
    "kbs_rnn_destroy": (None, [c_void_p]),
    "kbs_rnn_run": (c_int32, [c_void_p, POINTER(RNNCall)]),
    "kbs_rnn_reserve_bytes": (c_int32, [c_void_p, c_int64, c_int64, POINTER(c_int64)]),
    "kbs_rnn_backward": (c_int32, [c_void_p, POINTER(RNNCall), POINTER(RNNGradients)]),
}


def library_path() -> Path:
    """Where libkbs is: in `native/lib` of the installed package, or what `KBS_LIBRARY` names.

    Raises:
        ImportError: it was not built.
    """
    named = os.environ.get("KBS_LIBRARY")
    return Path(named) if named else installed_library("libkbs.so")


def installed_library(name: str) -> Path:
    """A library of the package.

    Raises:
        ImportError: it was not built.
    """
    import keras_blocksparse

    places = [Path(folder, "native", "lib", name) for folder in keras_blocksparse.__path__]
    for path in places:
        if path.is_file():
            return path
    raise ImportError(
        f"keras_blocksparse's native library {name} is missing: this installation was not built for this machine. "
        "Reinstall the package (it needs g++ and CMake where there is no wheel). Looked for "
        + ", ".join(map(str, places))
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The package's library, loaded once."""
    return open_library(library_path())


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a libkbs and declares its functions.

    Raises:
        ImportError: it cannot be loaded, or is another library.
        RuntimeError: it is another version than this package's.
    """
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"keras_blocksparse's native library cannot be loaded: {error}") from error
    try:
        found = lib.kbs_abi_version()
    except AttributeError:
        raise ImportError(f"{path} is not keras_blocksparse's native library") from None
    if found != ABI_VERSION:
        raise RuntimeError(
            f"{path} speaks version {found} of the native interface, this package speaks {ABI_VERSION}. "
            "Remove the old file and reinstall keras_blocksparse"
        )
    declare(lib, _SIGNATURES)
    return lib


def declare(lib: ctypes.CDLL, signatures: Signatures) -> None:
    """Tells ctypes what the functions of a library take and return."""
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the library that returns a status.

    Raises:
        ValueError: it was given something it cannot work with.
        MemoryError: there was not enough memory.
        RuntimeError: this machine or this library cannot do it.
    """
    lib = library()
    status = getattr(lib, name)(*arguments)
    if status == 0:
        return
    message = lib.kbs_last_error().decode()
    if status == _OUT_OF_MEMORY:
        raise MemoryError(message)
    if status in (_UNSUPPORTED, _INTERNAL):
        raise RuntimeError(message)
    raise ValueError(message)


def set_num_threads(threads: int) -> None:
    """Sets how many threads one call of the native kernels may use, for the whole process.

    Args:
        threads: number of threads, the caller's included; 0 is one for each core. There are never more than cores.
    """
    call("kbs_set_num_threads", c_int32(threads))


def get_num_threads() -> int:
    """How many threads one call of the native kernels may use."""
    return int(library().kbs_get_num_threads())


def get_isa() -> str:
    """The instruction set that the native kernels use here, for example "avx512vnni" or "neon".

    The best that the CPU has; the environment variable `KBS_ISA`, read when the library is first used, forces another.

    Raises:
        RuntimeError: `KBS_ISA` names one that this CPU lacks.
    """
    name = c_char_p()
    call("kbs_get_isa", ctypes.byref(name))
    return (name.value or b"").decode()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this CPU can run, the best last."""
    return tuple(library().kbs_available_isas().decode().split(","))
