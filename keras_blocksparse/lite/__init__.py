"""Export to TFLite / LiteRT: `export_tflite` and what it returns and raises.

Follow a weight: `convert.py` has TensorFlow write the model as a dense file, `sparsify.py` decides how each weight is
stored, `encode.py` cuts it into blocks, `flatbuffer.py` writes them, `validation.py` runs the result before it is kept.
"""

from keras_blocksparse.lite.errors import ExportError
from keras_blocksparse.lite.export import export_tflite
from keras_blocksparse.lite.report import ExportReport, WeightRecord

__all__ = ["ExportError", "ExportReport", "WeightRecord", "export_tflite"]
