"""The exception of this subpackage."""


class ExportError(RuntimeError):
    """A model could not be exported: the converter refused it, or the file does not compute what the model does."""
