#!/bin/sh
# The native tests on sanitized builds of libkbs: addresses and undefined behaviour, then threads.
#   keras_blocksparse/native/sanitize.sh [python]        from the root of the repository
# Python itself is not sanitized, so the sanitizer's runtime is loaded before it; its leaks are Python's own.
set -eu
python=${1:-python}
build=${TMPDIR:-/tmp}/kbs-sanitize
compiler=${CXX:-g++}

run() {  # name, -fsanitize=, runtime, tests
    cmake -S keras_blocksparse/native -B "$build/$1" -DKBS_SANITIZE="$2" -DKBS_OUTPUT="$build/$1/lib" >/dev/null
    cmake --build "$build/$1" -j2 >/dev/null
    shift 2
    runtime=$($compiler -print-file-name="$1")
    shift
    KBS_LIBRARY="$build/$name/lib/libkbs.so" LD_PRELOAD="$runtime" PYTHONMALLOC=malloc \
        "$python" -m pytest -q -p no:cacheprovider -p no:xdist "$@"
}

export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS="suppressions=$PWD/keras_blocksparse/native/tsan.supp:report_signal_unsafe=0:exitcode=66"

name=address
run address address,undefined libasan.so \
    tests/native/test_packed.py tests/native/test_kernels.py tests/native/test_threads.py tests/native/test_rnn.py \
    -k "not as_keras and not keras_does"
name=thread
run thread thread libtsan.so tests/native/test_threads.py tests/native/test_rnn.py -k "not keras_does and not fork"
