#!/bin/sh
# Sanitized builds of libkbs, and tests/native/check.cc on each instruction set that this machine runs; the same for the
# TensorFlow ops and the TFLite delegate. Without Python: TensorFlow does not survive the address sanitizer. From the root
# of the repository:
#   keras_blocksparse/native/sanitize.sh [build folder]
set -eu
folder=${1:-/tmp/kbs-sanitize}
compiler=${CXX:-g++}

build() {  # name, -fsanitize=
    cmake -S keras_blocksparse/native -B "$folder/$1" -DKBS_SANITIZE="$2" -DKBS_OUTPUT="$folder/$1" >/dev/null
    cmake --build "$folder/$1" -j2 >/dev/null
    $compiler -std=c++17 -g -O1 -pthread "-fsanitize=$2" -fno-sanitize-recover=all -Ikeras_blocksparse/native/include \
        tests/native/check.cc -o "$folder/$1/check" -L"$folder/$1" -lkbs "-Wl,-rpath,$folder/$1"
}

build_ops() {  # the same, for the TensorFlow ops
    fake=$folder/$1/libtensorflow_framework.so.2
    options="-std=c++17 -g -O1 -fsanitize=$2 -fno-sanitize-recover=all"
    $compiler $options -shared -fPIC -Wl,-soname,libtensorflow_framework.so.2 -Ikeras_blocksparse/native/include \
        -Ikeras_blocksparse/native/tf tests/native/check_ops.cc -o "$fake" -L"$folder/$1" -lkbs "-Wl,-rpath,$folder/$1"
    $compiler $options -DKBS_MAIN tests/native/check_ops.cc -o "$folder/$1/check_ops" "$fake" "-Wl,-rpath,$folder/$1"
}

build_delegate() {  # the same, for the TFLite delegate: its sources, so that their allocations can be made to fail
    $compiler -std=c++17 -g -O1 -pthread "-fsanitize=$2" -fno-sanitize-recover=all -Ikeras_blocksparse/native/include \
        -Ikeras_blocksparse/native/tflite tests/native/check_delegate.cc keras_blocksparse/native/tflite/*.cc \
        -Wl,--wrap=malloc -o "$folder/$1/check_delegate" -L"$folder/$1" -lkbs "-Wl,-rpath,$folder/$1"
}

build address address,undefined
for isa in $("$folder/address/check" isas); do
    echo "address, undefined behaviour: $isa"
    for what in results hostile threads; do KBS_ISA=$isa "$folder/address/check" $what; done
done

build_ops address address,undefined
echo "address, undefined behaviour: TensorFlow ops"
"$folder/address/check_ops" "$folder/address/libkbs_tf.so"

build_delegate address address,undefined
echo "address, undefined behaviour: TFLite delegate"
for what in results hostile memory threads; do "$folder/address/check_delegate" $what; done

build thread thread
build_delegate thread thread
echo "threads:"
"$folder/thread/check" threads
"$folder/thread/check_delegate" threads
