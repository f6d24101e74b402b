"""Export to TFLite / LiteRT: `export_tflite`, what it returns and raises, and our delegate to run files with.

Follow a weight: `convert.py` has TensorFlow write the model as a dense file, `fuse.py` makes recurrent layers one
operator each where that is asked for, `sparsify.py` decides how each weight is stored, `encode.py` cuts it into blocks,
`flatbuffer.py` writes them, `validation.py` runs the result before it is kept. `delegate.py` loads what runs it fast;
`benchmark.py` measures how fast, against the dense file that `twin.py` makes of it.
"""

from keras_blocksparse.lite.benchmark import BenchmarkReport, BenchmarkRow, benchmark
from keras_blocksparse.lite.delegate import Interpreter, delegate_path, load_delegate
from keras_blocksparse.lite.errors import ExportError
from keras_blocksparse.lite.export import export_tflite
from keras_blocksparse.lite.report import ExportReport, WeightRecord

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "ExportError",
    "ExportReport",
    "Interpreter",
    "WeightRecord",
    "benchmark",
    "delegate_path",
    "export_tflite",
    "load_delegate",
]
