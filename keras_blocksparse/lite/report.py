"""What an export did, as data and as a table."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from keras_blocksparse._text import bytes_text, text_table


@dataclass(frozen=True)
class WeightRecord:
    """How one weight is stored in the file.

    Attributes:
        name: path of the Keras weight, with the columns if only some are meant; else the name of the tensor in the
            file.
        shape: shape in the file; for a matrix `(outputs, inputs)`, the transpose of Keras'.
        dtype: dtype of the stored elements.
        encoding: `"sparse 1x4"`, `"sparse 1x16"` (a kernel that skips zero blocks), `"densify ..."` (unpacked when
            loaded) or `"dense"`.
        sparsity: share of zero elements.
        bytes: bytes of the elements and the block index in the file.
        bytes_dense: bytes of the weight as dense float32.
        why: reason, where the encoding is not the sparse kernel of the file's number format.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    sparsity: float
    bytes: int
    bytes_dense: int
    why: str = ""


@dataclass(frozen=True)
class ExportReport:
    """Result of `export_tflite`. `str(report)` is a table, `report.to_dict()` goes into JSON.

    Dicts of runs are keyed by runtime: `"tf.lite"`, `"ai_edge_litert"`, and `"tf.lite with delegate"` and so on for
    runs with our delegate. They are empty if the file was not run.

    Attributes:
        path: the file.
        target: `"stock"` or `"fast"`.
        quantize: None, `"int8"`, `"float16"` or `"bfloat16"`.
        streaming: whether states are inputs and outputs.
        bytes: size of the file.
        bytes_dense: size of the same model as a dense float32 file, converted in the same call.
        compat: None or `"custom"`.
        fused: paths of the recurrent layers that are one operator each.
        not_fused: with `target="fast"`, paths of those that are not, and why.
        weights: one record per weight.
        inputs: signature inputs, name to `(shape, dtype)`; states included.
        outputs: signature outputs, name to `(shape, dtype)`; states included.
        states: name of each state that comes out to the name under which it goes into the next call.
        max_error: largest absolute difference from the Keras model's outputs.
        tolerance: what `max_error` was checked against.
        latency_ms: median milliseconds of one call, one thread.
        latency_dense_ms: the same for the dense float32 file, in turns with this one.
        runtimes: version of each runtime.
        cpu: model name of the processor.
    """

    path: str
    target: str
    quantize: str | None
    streaming: bool
    bytes: int
    bytes_dense: int
    weights: tuple[WeightRecord, ...]
    inputs: dict[str, tuple[tuple[int, ...], str]]
    outputs: dict[str, tuple[tuple[int, ...], str]]
    compat: str | None = None
    fused: tuple[str, ...] = ()
    not_fused: dict[str, str] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    max_error: dict[str, float] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    latency_dense_ms: dict[str, float] = field(default_factory=dict)
    runtimes: dict[str, str] = field(default_factory=dict)
    cpu: str = ""

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the dense float32 one."""
        return self.bytes_dense / self.bytes

    @property
    def speedup(self) -> dict[str, float]:
        """How many times faster a call is than with the dense float32 file, per runtime."""
        return {name: self.latency_dense_ms[name] / ms for name, ms in self.latency_ms.items()}

    def to_dict(self) -> dict[str, Any]:
        """The fields and both ratios, in types JSON knows."""
        return json.loads(json.dumps({**asdict(self), "ratio": self.ratio, "speedup": self.speedup}))

    def __str__(self) -> str:
        lines = [
            f"{self.path}: target {self.target}, {self.quantize or 'float32'}{', streaming' if self.streaming else ''}",
            f"  {bytes_text(self.bytes)}, {self.ratio:.1f}x smaller than dense float32 "
            f"({bytes_text(self.bytes_dense)})",
        ]
        if self.target == "fast":
            lines.append(f"  one operator each: {', '.join(self.fused) or 'no layer'}")
            lines += [f"  left as it was: {layer}, for {why}" for layer, why in self.not_fused.items()]
        if self.compat == "custom":
            lines.append("  runs with our delegate only")
        runs = self.max_error or self.latency_ms
        for name in runs:
            line = f"  {name} ({self.runtimes[name.split(' ')[0]]}):"
            if name in self.max_error:
                line += f" max error {self.max_error[name]:.1e} (tolerance {self.tolerance[name]:.1e})"
            if name in self.latency_ms:
                line += f" {self.latency_ms[name]:.3f} ms, dense float32 {self.latency_dense_ms[name]:.3f} ms"
                line += f", {self.speedup[name]:.1f}x faster, 1 thread"
            lines.append(line)
        if self.cpu:
            lines.append(f"  on {self.cpu}")
        for title, tensors in (("in", self.inputs), ("out", self.outputs)):
            lines.append(f"  {title:3} " + ", ".join(f"{n} {s} {d}" for n, (s, d) in tensors.items()))
        for outgoing, incoming in self.states.items():
            lines.append(f"  state {outgoing} of one call is {incoming} of the next")
        rows = [("weight", "shape (out, in)", "encoding", "zeros", "bytes", "of dense", "")]
        for w in self.weights:
            kind = f"{w.encoding} {w.dtype}"
            rows.append(
                (
                    w.name,
                    str(w.shape),
                    kind,
                    f"{w.sparsity:.1%}",
                    f"{w.bytes:,}",
                    f"{w.bytes / w.bytes_dense:.1%}",
                    w.why,
                )
            )
        lines += ["  " + line for line in text_table(rows, 3, 6)]
        return "\n".join(lines)
