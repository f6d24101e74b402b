"""Our delegate for TFLite and LiteRT: where it is, and interpreters that run with it.

It is a shared library with TFLite's plain C interface for external delegates. It takes the recurrent operators of files
that `export_tflite(target="fast")` wrote, and fully connected operators with sparse weights of any file.
"""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from keras_blocksparse.sparse._native import installed_library

# Where `Interpreter` and `load_delegate` are, the preferred first.
_MODULES = {
    "ai_edge_litert": "ai_edge_litert.interpreter",
    "tf.lite": "tensorflow",
    "tflite_runtime": "tflite_runtime.interpreter",
}


def delegate_path() -> Path:
    """Where the delegate is, for programs in C++ or Java, and for TFLite's `benchmark_model --external_delegate_path`.

    `libkbs.so` lies beside it and must stay there.

    Raises:
        ImportError: it was not built.
    """
    return installed_library("libkbs_tflite.so")


def load_delegate(num_threads: int = 1, *, runtime: str | None = None) -> Any:
    """Loads the delegate for an interpreter of your own making.

    Example:

    ```python
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter("model.tflite", experimental_delegates=[kbs.lite.load_delegate()])
    ```

    Args:
        num_threads: threads that one operator may use, the caller's included; never more than there are cores.
        runtime: `"ai_edge_litert"`, `"tf.lite"` or `"tflite_runtime"`; None for the first of these that is installed.

    Returns:
        The runtime's own delegate object. It may be given to several interpreters, and must outlive them.

    Raises:
        ValueError: `num_threads` is no positive integer, or there is no such runtime.
        ImportError: the runtime is not installed, or the delegate was not built.
    """
    if not isinstance(num_threads, int) or isinstance(num_threads, bool) or num_threads < 1:
        raise ValueError(f"num_threads must be a positive integer. Received: num_threads={num_threads!r}")
    _, load = _runtime(runtime)
    return load(os.fspath(delegate_path()), {"num_threads": str(num_threads)})


def Interpreter(
    model_path: str | os.PathLike[str] | None = None,
    num_threads: int = 1,
    *,
    model_content: bytes | None = None,
    runtime: str | None = None,
    **options: Any,
) -> Any:
    """An interpreter of the runtime that is installed, with our delegate.

    Example:

    ```python
    interpreter = kbs.lite.Interpreter("model.tflite")
    run = interpreter.get_signature_runner()
    y = run(x=x)["y"]
    ```

    Args:
        model_path: the file.
        num_threads: threads for the runtime's operators and for ours.
        model_content: the file's bytes, instead of `model_path`.
        runtime: `"ai_edge_litert"`, `"tf.lite"` or `"tflite_runtime"`; None for the first of these that is installed.
        **options: further arguments of the runtime's `Interpreter`.

    Returns:
        `ai_edge_litert.interpreter.Interpreter`, `tf.lite.Interpreter` or `tflite_runtime.interpreter.Interpreter`.

    Raises:
        ValueError: `num_threads` is no positive integer, there is no such runtime, or the file is none it can load.
        ImportError: the runtime is not installed, or the delegate was not built.
    """
    delegate = load_delegate(num_threads, runtime=runtime)
    interpreter, _ = _runtime(runtime)
    return interpreter(
        model_path=None if model_path is None else os.fspath(model_path),
        model_content=model_content,
        num_threads=num_threads,
        experimental_delegates=[*(options.pop("experimental_delegates", None) or ()), delegate],
        **options,
    )


def _runtime(name: str | None) -> tuple[Any, Any]:
    """The Interpreter and the load_delegate of a runtime."""
    if name is not None and name not in _MODULES:
        raise ValueError(f"runtime must be None or one of {sorted(_MODULES)}. Received: runtime={name!r}")
    for candidate in [name] if name else _MODULES:
        if importlib.util.find_spec(_MODULES[candidate].split(".")[0]) is None:
            continue
        module = importlib.import_module(_MODULES[candidate])
        if candidate == "tf.lite":
            return module.lite.Interpreter, module.lite.experimental.load_delegate
        return module.Interpreter, module.load_delegate
    what = f"Runtime {name!r} is not installed" if name else "No TFLite runtime is installed"
    raise ImportError(f"{what}: pip install ai-edge-litert")
