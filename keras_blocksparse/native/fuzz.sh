#!/bin/sh
# Fuzzes the delegate's reading of graphs and the loader of packed buffers, with clang's libFuzzer under address and
# undefined-behaviour sanitizers. From the root of the repository:
#   keras_blocksparse/native/fuzz.sh [seconds for each target] [build folder]
# A finding ends it with 1; the input then lies in the build folder.
set -eu
seconds=${1:-60}
folder=${2:-build/fuzz}
if ! command -v clang++ >/dev/null; then
    echo "fuzzing needs clang and its runtime: apt-get install clang libclang-rt-14-dev (or the version of your clang)" >&2
    exit 1
fi
native=keras_blocksparse/native
mkdir -p "$folder"
flags="-std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi -pthread
    -I$native/include -I$native/src -I$native/tflite -Itests/native -DKBS_INFERENCE_ONLY"
sources="$native/src/error.cc $native/src/isa.cc $native/src/matrix.cc $native/src/packed.cc $native/src/rnn.cc
    $native/src/rnn_backward.cc $native/src/threads.cc $native/src/kernels_baseline.cc"
case $(uname -m) in
    x86_64)
        avx512="-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
        isas="avx2:-mavx2,-mfma avx512:$(echo "$avx512" | tr ' ' ,) avx512vnni:$(echo "$avx512 -mavx512vnni" | tr ' ' ,)" ;;
    *) isas="neon:-march=armv8-a neondot:-march=armv8.2-a+dotprod" ;;
esac

objects=""
compile() {  # source, object, further flags
    objects="$objects $2"
    [ "$2" -nt "$1" ] && [ -z "$(find $native/src $native/include $native/tflite -name '*.h' -newer "$2")" ] && return
    # Kernels are not what is searched for ways through: they run sanitized, and quicker.
    case $1 in */kernels_*) covered="-O2" ;; *) covered=-fsanitize=fuzzer-no-link ;; esac
    # shellcheck disable=SC2086
    clang++ $flags $covered $3 -c "$1" -o "$2"
}
for source in $sources; do compile "$source" "$folder/$(basename "$source" .cc).o" ""; done
for isa in $isas; do
    compile "$native/src/kernels_${isa%%:*}.cc" "$folder/kernels_${isa%%:*}.o" "$(echo "${isa#*:}" | tr , ' ')"
done
library=$objects
for source in attributes weights delegate; do compile "$native/tflite/$source.cc" "$folder/$source.o" ""; done
# shellcheck disable=SC2086
clang++ $flags -fsanitize=fuzzer tests/native/fuzz_delegate.cc $objects -o "$folder/fuzz_delegate"
# It includes packed.cc.
# shellcheck disable=SC2086
clang++ $flags -fsanitize=fuzzer tests/native/fuzz_packed.cc $(echo "$library" | sed "s#$folder/packed.o##") -o "$folder/fuzz_packed"

for target in delegate packed; do
    mkdir -p "$folder/corpus_$target"
    echo "fuzz_$target, $seconds s"
    # Memory is bounded: an input that makes the library ask for more than a device has is a finding.
    KBS_NUM_THREADS=1 "$folder/fuzz_$target" -max_total_time="$seconds" -max_len=1024 -timeout=10 -rss_limit_mb=2048 \
        -print_final_stats=1 -verbosity=0 -artifact_prefix="$folder/finding_${target}_" \
        "$folder/corpus_$target" "tests/native/corpus/$target" 2>"$folder/$target.log" || {
        tail -40 "$folder/$target.log" >&2
        found=$(find "$folder" -name "finding_${target}_*" -newer "$folder/fuzz_$target" | head -1)
        if [ -n "$found" ]; then echo "a finding; its input: $found"; else echo "ended early, without a finding"; fi >&2
        exit 1
    }
    grep -E "number_of_executed_units|new_units_added|peak_rss_mb" "$folder/$target.log"
done
