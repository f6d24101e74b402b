"""Bytes and latency of exported GRUs on the stock interpreters: dense float32 against sparse float32, int8 and float16.

    python benchmarks/export_size_latency.py
    python benchmarks/export_size_latency.py --units 256 --sparsity 0.8 --block 4 4 --json out.json

Each file is run on every TFLite runtime that is installed, one thread, in turns with the dense float32 file of the same
model, so that both see the same machine; the figures are medians over --repeats exports. The zero blocks are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

QUANTIZE = {"float32": None, "int8": "int8", "float16": "float16"}
# GRU(1024), 90 % zero in blocks of 16x16: how many times smaller and faster than dense float32.
BARS = {"float32": (8.5, 3.5), "int8": (25.0, 10.0)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--units", type=int, nargs="+", default=[512, 1024], help="sizes of the GRU (default: 512 1024)"
    )
    parser.add_argument("--timesteps", type=int, default=32, help="length of the sequence (default: 32)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zero blocks (default: 0.9)")
    parser.add_argument("--block", type=int, nargs=2, default=[16, 16], metavar=("ROWS", "COLS"), help="default: 16 16")
    parser.add_argument("--quantize", nargs="+", choices=QUANTIZE, default=list(QUANTIZE), help="number formats")
    parser.add_argument("--repeats", type=int, default=3, help="exports per row; medians are shown (default: 3)")
    parser.add_argument("--runtimes", nargs="+", help="default: all that are installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--quick", action="store_true", help="a smoke run: --units 256 --repeats 1")
    options = parser.parse_args()
    if options.quick:
        options.units, options.repeats = [256], 1
    return options


def block_sparse_gru(units: int, timesteps: int, block: list[int], sparsity: float, seed: int):
    """GRU(units) on as many features, with a share of random blocks of both weights set to zero."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((timesteps, units)), keras.layers.GRU(units, return_sequences=True)])
    rng = np.random.default_rng(seed)
    kernel, recurrent, bias = model.get_weights()
    masked = []
    for weight in (kernel, recurrent):
        grid = (weight.shape[0] // block[0], weight.shape[1] // block[1])
        mask = np.arange(grid[0] * grid[1]) >= round(sparsity * grid[0] * grid[1])
        masked.append(weight * np.kron(rng.permutation(mask).reshape(grid), np.ones(block, np.float32)))
    model.set_weights([*masked, rng.normal(0, 0.1, bias.shape)])
    return model


def measure(options: argparse.Namespace) -> tuple[list[dict], dict[str, str], str]:
    """One row per size, format and runtime; the versions of the runtimes; the processor."""
    from keras_blocksparse.lite import export_tflite

    rows, versions, cpu = [], {}, ""
    with tempfile.TemporaryDirectory() as directory:
        for units in options.units:
            model = block_sparse_gru(units, options.timesteps, options.block, options.sparsity, options.seed)
            for name in options.quantize:
                reports = []
                for repeat in range(options.repeats):
                    progress(f"GRU({units}) {name}, export {repeat + 1} of {options.repeats}")
                    path = Path(directory) / "model.tflite"
                    reports.append(export_tflite(model, path, quantize=QUANTIZE[name], runtimes=options.runtimes))
                report = reports[0]
                versions, cpu = report.runtimes, report.cpu
                for runtime in report.runtimes:
                    rows.append(
                        {
                            "units": units,
                            "format": name,
                            "runtime": runtime,
                            "bytes": report.bytes,
                            "bytes_dense": report.bytes_dense,
                            "smaller": report.ratio,
                            "latency_ms": statistics.median(r.latency_ms[runtime] for r in reports),
                            "latency_dense_ms": statistics.median(r.latency_dense_ms[runtime] for r in reports),
                            "faster": statistics.median(r.speedup[runtime] for r in reports),
                            "max_error": report.max_error[runtime],
                        }
                    )
    progress("")
    return rows, versions, cpu


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main() -> None:
    options = arguments()
    rows, versions, cpu = measure(options)
    print(
        f"GRU on as many features, T={options.timesteps}, batch 1, {options.sparsity:.0%} zero in blocks of "
        f"{options.block[0]}x{options.block[1]}; 1 thread; medians of {options.repeats} exports of up to 40 calls each"
    )
    print(f"{cpu}; " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    header = ("units", "format", "runtime", "MB", "smaller", "ms", "dense ms", "faster", "max error")
    table = [
        (
            str(r["units"]),
            r["format"],
            r["runtime"],
            f"{r['bytes'] / 1e6:.3f}",
            f"{r['smaller']:.1f}x",
            f"{r['latency_ms']:.2f}",
            f"{r['latency_dense_ms']:.2f}",
            f"{r['faster']:.1f}x",
            f"{r['max_error']:.0e}",
        )
        for r in rows
    ]
    widths = [max(len(row[i]) for row in [header, *table]) for i in range(len(header))]
    for row in [header, *table]:
        print(
            "  ".join(
                cell.ljust(n) if i in (1, 2) else cell.rjust(n)
                for i, (cell, n) in enumerate(zip(row, widths, strict=True))
            )
        )
    if options.sparsity == 0.9 and options.block == [16, 16]:
        print("\nbars for GRU(1024), and what was seen:")
        for r in rows:
            if r["units"] == 1024 and r["format"] in BARS:
                smaller, faster = BARS[r["format"]]
                met = "met" if r["smaller"] >= smaller and r["faster"] >= faster else "MISSED"
                print(
                    f"  {r['format']} on {r['runtime']}: {r['smaller']:.1f}x smaller (bar {smaller:g}x), "
                    f"{r['faster']:.1f}x faster (bar {faster:g}x): {met}"
                )
    if options.json:
        options.json.write_text(json.dumps({"cpu": cpu, "versions": versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
