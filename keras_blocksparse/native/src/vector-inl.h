// Vectors of the instruction set that this translation unit is compiled for.
//
// Included by one kernels_*.cc for each instruction set, after it has defined KBS_ISA (a namespace), KBS_LANES (floats
// in a register) and KBS_REGISTERS (16 or 32). Nothing here may be shared between those units: the linker would keep
// one copy of a function, perhaps one that this CPU cannot run. So everything is in an unnamed namespace, and of the
// standard library only types that hold no code are used.
#ifndef KBS_VECTOR_INL_H_
#define KBS_VECTOR_INL_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kbs.h"
#include "kernels.h"

#define KBS_INLINE inline __attribute__((always_inline))
// A strip's kernel is a function of its own: inlined beside others it was up to 15 % slower.
#define KBS_NOINLINE __attribute__((noinline))
#define KBS_INLINE_LAMBDA __attribute__((always_inline))

namespace kbs {
namespace KBS_ISA {
namespace {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <int N>
using Floats = typename VectorOf<float, N>::type;
template <int N>
using Ints = typename VectorOf<int32_t, N>::type;
template <int N>
using Words = typename VectorOf<uint32_t, N>::type;

constexpr int L = KBS_LANES;
constexpr int kParts = kTile / L;  // registers in a tile
using V = Floats<L>;
using I = Ints<L>;
using U = Words<L>;

template <class T = V>
KBS_INLINE T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
KBS_INLINE void store(void* p, T v) {
  std::memcpy(p, &v, sizeof(v));
}

template <int N = L>
KBS_INLINE Floats<N> broadcast(float x) {
  return x - Floats<N>{};
}

template <int... Lane, class T>
KBS_INLINE T zip_low(T a, T b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % 2 ? (int)sizeof...(Lane) : 0) + Lane / 2 ...);
}
template <int... Lane, class T>
KBS_INLINE T zip_high(T a, T b, std::integer_sequence<int, Lane...>) {
  constexpr int n = sizeof...(Lane);
  return __builtin_shufflevector(a, b, (Lane % 2 ? n : 0) + n / 2 + Lane / 2 ...);
}

// R registers of N lanes, read as a matrix (R, N), become (N, R): the perfect shuffle, log2(R) times.
template <int N, int R>
KBS_INLINE void transpose(Floats<N> (&a)[R]) {
  using Lanes = std::make_integer_sequence<int, N>;
  for (int round = 1; round < R; round *= 2) {
    Floats<N> b[R];
    for (int i = 0; i < R / 2; i++) {
      b[2 * i] = zip_low(a[i], a[i + R / 2], Lanes{});
      b[2 * i + 1] = zip_high(a[i], a[i + R / 2], Lanes{});
    }
    for (int i = 0; i < R; i++) a[i] = b[i];
  }
}

// y (+)= values (+ bias), W of them.
template <int W>
KBS_INLINE void emit(const Output& out, size_t row, uint32_t col, const float* values) {
  float* y = out.y + row * out.stride + col;
  constexpr int n = W < L ? W : L;
  for (int i = 0; i < W; i += n) {
    auto v = load<Floats<n>>(values + i);
    if (out.bias) v += load<Floats<n>>(out.bias + col + i);
    if (out.accumulate) v += load<Floats<n>>(y + i);
    store(y + i, v);
  }
}

// Calls f(std::integral_constant<int, width>) for a strip's width: kernels are compiled for each.
template <class F>
KBS_INLINE void for_width(uint32_t width, const F& f) {
  switch (width) {
    case 16: return f(std::integral_constant<int, 16>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
