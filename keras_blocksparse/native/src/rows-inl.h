// A strip's sums with vectors over the outputs, for a few rows of x: the part that does not depend on the dtype. See
// vector-inl.h for how this file is compiled, format.h for strips, tiles and runs.
#ifndef KBS_ROWS_INL_H_
#define KBS_ROWS_INL_H_

#include "vector-inl.h"

namespace kbs {
namespace KBS_ISA {
namespace {

template <int... Lane>
KBS_INLINE V halves(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane < L / 2 ? Lane : L + Lane)...);
}
template <int First, int... Lane, class T>
KBS_INLINE auto lanes_from(T v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (First + Lane)...);
}
template <int W, int... Lane>
KBS_INLINE V repeat_each(V v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane / W)...);
}

KBS_INLINE float unit(const char* p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}

// L / W units of 4 bytes beginning at p, each repeated in W lanes. in_low_lanes() is the instruction set's own.
template <int W>
KBS_INLINE V expand(const char* p) {
  using Lanes = std::make_integer_sequence<int, L>;
  if constexpr (W >= L) {
    return broadcast(unit(p));
  } else if constexpr (W * 2 == L) {
    return halves(broadcast(unit(p)), broadcast(unit(p + 4)), Lanes{});
  } else if constexpr (W == 1) {
    return load(p);
  } else {
    return repeat_each<W>(in_low_lanes(load<Floats<L / W>>(p)), Lanes{});
  }
}

// n units at p + index[i] * size. Of those that come in pairs, each second index is not read.
template <int n, int size, bool paired, int... Unit>
KBS_INLINE Floats<n> gathered(const char* p, const int32_t* index, std::integer_sequence<int, Unit...>) {
  if constexpr (paired) {
    typedef typename VectorOf<double, n / 2>::type Pairs;
    return (Floats<n>)Pairs{load<double>(p + (ptrdiff_t)index[2 * Unit] * size)...};
  } else {
    return Floats<n>{unit(p + (ptrdiff_t)index[Unit] * size)...};
  }
}

// As expand(), from units at p + index[i] * size.
template <int W, int size, bool paired>
KBS_INLINE V expand_gathered(const char* p, const int32_t* index) {
  using Lanes = std::make_integer_sequence<int, L>;
  const auto at = [&](int i) KBS_INLINE_LAMBDA { return p + (ptrdiff_t)index[i] * size; };
  if constexpr (W >= L) {
    return broadcast(unit(at(0)));
  } else if constexpr (W * 2 == L && paired) {
    return expand<W>(at(0));
  } else if constexpr (W * 2 == L) {
    return halves(broadcast(unit(at(0))), broadcast(unit(at(1))), Lanes{});
  } else {
    constexpr int n = L / W;
    const auto v = gathered<n, size, paired>(p, index, std::make_integer_sequence<int, paired ? n / 2 : n>{});
    if constexpr (W == 1) {
      return v;
    } else {
      return repeat_each<W>(in_low_lanes(v), Lanes{});
    }
  }
}

// Adds the lanes that are W apart.
template <int W, class T, int N>
KBS_INLINE auto folded(typename VectorOf<T, N>::type v) {
  if constexpr (N == W) {
    return v;
  } else {
    using Half = std::make_integer_sequence<int, N / 2>;
    return folded<W, T, N / 2>(lanes_from<0>(v, Half{}) + lanes_from<N / 2>(v, Half{}));
  }
}

template <class T, int W, int B, int U>
struct RowSums {
  typename T::Sum sum[B][U][kParts] = {};

  KBS_INLINE void tile(int u, const char* w, const char* x, size_t stride) {
    for (int b = 0; b < B; b++)
      for (int part = 0; part < kParts; part++)
        sum[b][u][part] = T::add(sum[b][u][part], w + part * L * 4, expand<W>(x + b * stride + part * L / W * 4));
  }
  template <bool paired>
  KBS_INLINE void gathered_tile(int u, const char* w, const char* x, size_t stride, const int32_t* rows) {
    for (int b = 0; b < B; b++)
      for (int part = 0; part < kParts; part++)
        sum[b][u][part] = T::add(sum[b][u][part], w + part * L * 4,
                                 expand_gathered<W, T::size, paired>(x + b * stride, rows + part * L / W));
  }
  // Adds everything that belongs to one output.
  template <class Lane>
  KBS_INLINE void fold(int b, Lane* out) {
    typename VectorOf<Lane, L>::type total[kParts];
    for (int part = 0; part < kParts; part++) {
      for (int u = 1; u < U; u++) sum[b][0][part] += sum[b][u][part];
      total[part] = (typename VectorOf<Lane, L>::type)sum[b][0][part];
    }
    for (int half = kParts / 2; half * L >= W && half > 0; half /= 2)
      for (int part = 0; part < half; part++) total[part] += total[part + half];
    constexpr int n = W < L ? W : L;
    for (int i = 0; i < W; i += n) store(out + i, folded<n, Lane, L>(total[i / L]));
  }
};

// Runs of R tiles, several at a time.
template <class T, int W, int B, int U, int R>
KBS_INLINE void short_runs(const Strip& strip, const int32_t* index, const char* w, const char* x, size_t stride,
                           RowSums<T, W, B, U>& sums) {
  constexpr uint32_t q = kTile / W;
  constexpr int runs = U / R > 0 ? U / R : 1;
  const auto run = [&](int u, const char* w, const char* at) KBS_INLINE_LAMBDA {
    for (int t = 0; t < R; t++) sums.tile((u + t) % U, w + t * kTileBytes, at + t * q * 4, stride);
  };
  uint32_t i = 0;
  for (; i + runs <= strip.runs; i += runs, w += runs * R * kTileBytes)
    for (int u = 0; u < runs; u++) run(u * R, w + u * R * kTileBytes, x + (ptrdiff_t)index[i + u] * T::size);
  for (; i < strip.runs; i++, w += R * kTileBytes) run(0, w, x + (ptrdiff_t)index[i] * T::size);
}

// Runs of one unit row, q of them in a tile.
template <bool paired, class T, int W, int B, int U>
KBS_INLINE void gathered_runs(const Strip& strip, const int32_t* index, const char* w, const char* x, size_t stride,
                              RowSums<T, W, B, U>& sums) {
  constexpr uint32_t q = kTile / W;
  uint32_t i = 0;
  for (; i + U * q <= strip.runs; i += U * q, w += U * kTileBytes)
    for (int u = 0; u < U; u++)
      sums.template gathered_tile<paired>(u, w + u * kTileBytes, x, stride, index + i + u * q);
  for (; i < strip.runs; i += q, w += kTileBytes) sums.template gathered_tile<paired>(0, w, x, stride, index + i);
}

// The sums of one strip for B rows of x. U tiles are under way at once, to hide the latency of the additions.
template <class T, int W, int B, int U>
KBS_INLINE void strip_rows(const View& view, const Strip& strip, const char* x, size_t stride,
                           RowSums<T, W, B, U>& sums) {
  constexpr uint32_t q = kTile / W;
  const int32_t* index = view.index + strip.first_run;
  const char* w = (const char*)view.values + strip.first_tile * kTileBytes;
  const uint32_t run_tiles = strip.run / q;
  if (q > 1 && run_tiles == 0) {
    // A block whose number of unit rows is even has them in pairs, one behind the other.
    constexpr uint32_t unit_rows = 4 / T::size;
    if (q > 2 && (view.header->block_rows + unit_rows - 1) / unit_rows % 2 == 0) {
      gathered_runs<true>(strip, index, w, x, stride, sums);
    } else {
      gathered_runs<false>(strip, index, w, x, stride, sums);
    }
  } else if (run_tiles == 1) {
    short_runs<T, W, B, U, 1>(strip, index, w, x, stride, sums);
  } else if (run_tiles == 2) {
    short_runs<T, W, B, U, 2>(strip, index, w, x, stride, sums);
  } else {
    for (uint32_t i = 0; i < strip.runs; i++) {
      const char* at = x + (ptrdiff_t)index[i] * T::size;
      uint32_t t = 0;
      for (; t + U <= run_tiles; t += U, w += U * kTileBytes, at += U * q * 4)
        for (int u = 0; u < U; u++) sums.tile(u, w + u * kTileBytes, at + u * q * 4, stride);
      for (; t < run_tiles; t++, w += kTileBytes, at += q * 4) sums.tile(0, w, at, stride);
    }
  }
}

// How many tiles to have under way for B rows: about eight sums in all.
constexpr int in_flight(int rows) {
  const int u = 8 / (rows * kParts);
  return u < 1 ? 1 : u > 4 ? 4 : u;
}

Output shifted(const Output& out, int rows) { return {out.y + rows * out.stride, out.stride, out.bias, out.accumulate}; }

// Calls f(W, rows, strip, first row) for strips [begin, end) and n <= kMaxRows rows of x, 4, 2 or 1 at once.
template <int most, class F>
KBS_INLINE void each_strip(const View& view, size_t begin, size_t end, int n, const F& f) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    for_width(strip.width, [&](auto width) KBS_INLINE_LAMBDA {
      int b = 0;
      if constexpr (most == 4) {
        if (n == 4) return f(width, std::integral_constant<int, 4>{}, strip, 0);
      }
      for (; b + 2 <= n; b += 2) f(width, std::integral_constant<int, 2>{}, strip, b);
      if (b < n) f(width, std::integral_constant<int, 1>{}, strip, b);
    });
  }
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
