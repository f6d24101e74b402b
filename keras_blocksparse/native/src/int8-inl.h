// Products with int8 weights, and x in 8 bits for them. Instruction sets that add a dot product of bytes and nothing
// else compile this file alone. See vector-inl.h for how.
#ifndef KBS_INT8_INL_H_
#define KBS_INT8_INL_H_

#include "rows-inl.h"

namespace kbs {
namespace KBS_ISA {
namespace {

struct Int8 {
  using Sum = I;
  static constexpr int size = 1;
  static KBS_INLINE I add(I sum, const char* w, V x) { return dot4(sum, load<I>(w), (I)x); }
};

template <int W, int B>
KBS_NOINLINE void strip_rows_i8(const View& view, const Strip& strip, const uint8_t* x, size_t stride,
                                const float* scale, const Output& out) {
  RowSums<Int8, W, B, in_flight(B)> sums;
  strip_rows(view, strip, (const char*)x, stride, sums);
#pragma GCC unroll 4
  for (int b = 0; b < B; b++) {
    uint32_t sum[W];  // wraps on the way, the true sum fits: see kMaxInt8Rows
    sums.fold(b, sum);
    float y[W];
    constexpr int n = W < L ? W : L;
    for (int i = 0; i < W; i += n) {
      const auto zero = load<Words<n>>(view.sums + strip.col + i) * (uint32_t)kZeroPoint;
      const auto total = __builtin_convertvector((Ints<n>)(load<Words<n>>(sum + i) - zero), Floats<n>);
      store(y + i, total * (scale[b] * load<Floats<n>>(view.scales + strip.col + i)));
    }
    emit<W>(out, b, strip.col, y);
  }
}

void matmul_rows_i8(const View& view, size_t begin, size_t end, const uint8_t* x, size_t stride, const float* scale,
                    int n, const Output& out) {
  each_strip<4>(view, begin, end, n, [&](auto width, auto rows, const Strip& strip, int b) KBS_INLINE_LAMBDA {
    strip_rows_i8<width.value, rows.value>(view, strip, x + b * stride, stride, scale + b, shifted(out, b));
  });
}

// Symmetric: the largest magnitude becomes 127. A row with NaN or infinity has the step NaN, and so has the result.
float quantize(const float* x, size_t n, size_t padded, uint8_t* out) {
  V largest = {}, bad = {};
  size_t i = 0;
  for (; i + L <= n; i += L) {
    const V v = load(x + i), magnitude = (V)((U)v & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    bad += v * 0.f;
  }
  float max = 0, broken = 0;
  for (int lane = 0; lane < L; lane++) max = largest[lane] > max ? largest[lane] : max, broken += bad[lane];
  for (; i < n; i++) {
    const float magnitude = x[i] < 0 ? -x[i] : x[i];
    max = magnitude > max ? magnitude : max;
    broken += x[i] * 0.f;
  }
  std::memset(out + n, kZeroPoint, padded - n);
  if (broken != 0 || max < 1e-36f) {
    std::memset(out, kZeroPoint, n);
    return broken != 0 ? broken : 0.f;
  }
  const float inverse = 127.f / max;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits.
  const float magic = 12582912.f;
  typedef typename VectorOf<uint8_t, L>::type Bytes;
  for (i = 0; i + L <= n; i += L) {
    const U rounded = (U)(load(x + i) * inverse + magic) + (uint32_t)kZeroPoint;
    store(out + i, __builtin_convertvector(rounded, Bytes));
  }
  for (; i < n; i++) {
    const float sum = x[i] * inverse + magic;
    uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    out[i] = (uint8_t)(bits + (uint32_t)kZeroPoint);
  }
  return max / 127.f;
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
