// Products with float32 and bfloat16 weights. See vector-inl.h for how this file is compiled, format.h for strips,
// tiles and runs.
#ifndef KBS_MATMUL_INL_H_
#define KBS_MATMUL_INL_H_

#include "rows-inl.h"

namespace kbs {
namespace KBS_ISA {
namespace {

// ---- vectors over the outputs: a few rows of x ------------------------------------------------------------------

struct Float32 {
  using Sum = V;
  static constexpr int size = 4;  // bytes of x in a row
  static KBS_INLINE V add(V sum, const char* w, V x) { return sum + load(w) * x; }
};

template <int W, int B>
KBS_NOINLINE void strip_rows_f32(const View& view, const Strip& strip, const float* x, size_t stride,
                                 const Output& out) {
  RowSums<Float32, W, B, in_flight(B)> sums;
  strip_rows(view, strip, (const char*)x, stride * 4, sums);
#pragma GCC unroll 4
  for (int b = 0; b < B; b++) {
    float y[W];
    sums.fold(b, y);
    emit<W>(out, b, strip.col, y);
  }
}

// Two zipped tiles at a time; each half is a float32 whose lower bits are gone.
template <int W, int B>
KBS_NOINLINE void strip_rows_bf16(const View& view, const Strip& strip, const float* x, size_t stride,
                                  const Output& out) {
  constexpr uint32_t q = kTile / W;
  constexpr int kUnroll = in_flight(2 * B);
  const int32_t* index = view.index + strip.first_run;
  const char* w = (const char*)view.values + strip.first_tile * kTileBytes;
  RowSums<Float32, W, B, 2 * kUnroll> sums;
  const auto pair = [&](int u, const char* w, auto operand) KBS_INLINE_LAMBDA {
    for (int part = 0; part < kParts; part++) {
      const U both = load<U>(w + part * L * 4);
      const V first = (V)(both << 16), second = (V)(both & 0xffff0000u);
      for (int b = 0; b < B; b++) {
        sums.sum[b][2 * u][part] += first * operand(0, b, part);
        sums.sum[b][2 * u + 1][part] += second * operand(1, b, part);
      }
    }
  };
  const auto rows_at = [&](int u, const char* w, const float* first, const float* second) KBS_INLINE_LAMBDA {
    pair(u, w, [&](int half, int b, int part) KBS_INLINE_LAMBDA {
      return expand<W>((const char*)((half ? second : first) + b * stride + part * L / W));
    });
  };
  const uint32_t run_tiles = strip.run / q;
  uint32_t i = 0;
  if (run_tiles == 0) {
    const auto gathered = [&](int u, const char* w, const int32_t* rows) KBS_INLINE_LAMBDA {
      pair(u, w, [&](int half, int b, int part) KBS_INLINE_LAMBDA {
        return expand_gathered<W, 4, false>((const char*)(x + b * stride), rows + half * q + part * L / W);
      });
    };
    for (; i < strip.runs; i += 2 * q, w += kTileBytes) gathered(0, w, index + i);
  } else if (run_tiles == 1) {
    for (; i + 2 * kUnroll <= strip.runs; i += 2 * kUnroll, w += kUnroll * kTileBytes)
      for (int u = 0; u < kUnroll; u++)
        rows_at(u, w + u * kTileBytes, x + index[i + 2 * u], x + index[i + 2 * u + 1]);
    for (; i < strip.runs; i += 2, w += kTileBytes) rows_at(0, w, x + index[i], x + index[i + 1]);
  } else if (run_tiles % 2 == 0) {
    for (; i < strip.runs; i++) {
      const float* at = x + index[i];
      uint32_t t = 0;
      for (; t + 2 * kUnroll <= run_tiles; t += 2 * kUnroll, w += kUnroll * kTileBytes, at += 2 * kUnroll * q)
        for (int u = 0; u < kUnroll; u++) rows_at(u, w + u * kTileBytes, at + 2 * u * q, at + (2 * u + 1) * q);
      for (; t < run_tiles; t += 2, w += kTileBytes, at += 2 * q) rows_at(0, w, at, at + q);
    }
  } else {
    // With an odd number of tiles in a run, the middle one of two runs' pairs crosses from one into the other.
    for (; i < strip.runs; i += 2) {
      const auto tile = [&](uint32_t t) KBS_INLINE_LAMBDA {
        return t < run_tiles ? x + index[i] + t * q : x + index[i + 1] + (t - run_tiles) * q;
      };
      for (uint32_t t = 0; t < 2 * run_tiles; t += 2, w += kTileBytes) rows_at(0, w, tile(t), tile(t + 1));
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; b++) {
    float y[W];
    sums.fold(b, y);
    emit<W>(out, b, strip.col, y);
  }
}

void matmul_rows_f32(const View& view, size_t begin, size_t end, const float* x, size_t stride, int n,
                     const Output& out) {
  each_strip<4>(view, begin, end, n, [&](auto width, auto rows, const Strip& strip, int b) KBS_INLINE_LAMBDA {
    strip_rows_f32<width.value, rows.value>(view, strip, x + b * stride, stride, shifted(out, b));
  });
}

void matmul_rows_bf16(const View& view, size_t begin, size_t end, const float* x, size_t stride, int n,
                      const Output& out) {
  each_strip<2>(view, begin, end, n, [&](auto width, auto rows, const Strip& strip, int b) KBS_INLINE_LAMBDA {
    strip_rows_bf16<width.value, rows.value>(view, strip, x + b * stride, stride, shifted(out, b));
  });
}

// ---- vectors over the batch: panels -----------------------------------------------------------------------------

constexpr int kSums = KBS_REGISTERS / 2;  // registers that may hold sums

// S rows of x side by side: rows of the panel are S wide parts of `lanes`.
template <int S>
KBS_INLINE void panel_part(const float* const* x, int n, size_t length, size_t padded, int lanes, float* panel) {
  size_t i = 0;
  for (; i + L <= length; i += L) {
    V v[S];
    for (int b = 0; b < S; b++) v[b] = b < n ? load(x[b] + i) : V{};
    transpose<L, S>(v);
    float flat[L * S];
    for (int b = 0; b < S; b++) store(flat + b * L, v[b]);
    for (int r = 0; r < L; r++) store(panel + (i + r) * lanes, load<Floats<S>>(flat + r * S));
  }
  for (; i < padded; i++)
    for (int b = 0; b < S; b++) panel[i * lanes + b] = i < length && b < n ? x[b][i] : 0.f;
}

void make_panel(const float* const* x, int n, size_t length, size_t padded, int lanes, float* panel) {
  constexpr int S = L < 8 ? L : 8;
  for (int b = 0; b < lanes; b += S)
    panel_part<S>(n > b ? x + b : x, n > b ? n - b : 0, length, padded, lanes, panel + b);
}

void read_panel(const float* panel, int lanes, size_t length, int n, float* y, size_t stride) {
  for (int b = 0; b < n; b++)
    for (size_t i = 0; i < length; i++) y[b * stride + i] = panel[i * lanes + b];
}

// A strip's values as float32, in the order of float32 tiles.
KBS_INLINE const float* widened(const View& view, const Strip& strip, float* scratch) {
  const char* w = (const char*)view.values + strip.first_tile * kTileBytes;
  if (view.header->dtype == KBS_FLOAT32) return (const float*)w;
  const size_t pairs = (size_t)strip.runs * strip.run * strip.width / kTile / 2;
  for (size_t p = 0; p < pairs; p++)
    for (int part = 0; part < kParts; part++) {
      const U both = load<U>(w + p * kTileBytes + part * L * 4);
      store(scratch + (2 * p) * kTile + part * L, both << 16);
      store(scratch + (2 * p + 1) * kTile + part * L, both & 0xffff0000u);
    }
  return scratch;
}

// Weights come in order, but so slowly at a large batch that the CPU's own prefetcher stays near; if they are not in its
// caches any more, that is too late.
KBS_INLINE void ask_for_weights(const float* w) { __builtin_prefetch((const char*)w + 4096); }

// Sums for C columns (of W, from w) and P registers of N lanes.
template <int N, int W, int C, int P>
KBS_INLINE void panel_sums(const Strip& strip, const int32_t* index, const float* w, const float* panel, int lanes,
                           Floats<N> (&sum)[C][P]) {
  constexpr int rows = W * P >= 8 || C < W ? 1 : 2;  // rows under way at once
  Floats<N> part[rows][C][P] = {};
  const auto row = [&](int u, const float* w, const float* x) KBS_INLINE_LAMBDA {
    Floats<N> v[P];
    for (int p = 0; p < P; p++) v[p] = load<Floats<N>>(x + p * N);
    for (int c = 0; c < C; c++)
      for (int p = 0; p < P; p++) part[u][c][p] += w[c] * v[p];
  };
  // The panel is larger than the first cache, and its rows come in no order: ask for those of the next runs. It pays
  // where a row of x is used long enough.
  constexpr bool ask = P == 2 || W == 16;
  const uint32_t ahead = strip.run >= 8 ? 1 : 4;
  for (uint32_t i = 0; i < strip.runs; i++) {
    const float* x = panel + (size_t)index[i] * lanes;
    const float* next = panel + (size_t)index[i + ahead < strip.runs ? i + ahead : i] * lanes;
    uint32_t r = 0;
    for (; r + rows <= strip.run; r += rows, w += rows * W, x += rows * lanes)
      for (int u = 0; u < rows; u++) {
        if (W == 16) ask_for_weights(w + u * W);
        for (int p = 0; ask && p < P; p++) __builtin_prefetch(next + (r + u) * lanes + p * N);
        row(u, w + u * W, x + u * lanes);
      }
    for (; r < strip.run; r++, w += W, x += lanes) row(0, w, x);
  }
  for (int c = 0; c < C; c++)
    for (int p = 0; p < P; p++) {
      sum[c][p] = part[0][c][p];
      for (int u = 1; u < rows; u++) sum[c][p] += part[u][c][p];
    }
}

// Sums of C columns, N lanes each, to rows of y.
template <int N, int C>
KBS_INLINE void emit_lanes(Floats<N> (&sum)[C], int n, int first, uint32_t col, const Output& out) {
  transpose<N, C>(sum);
  float flat[N * C];
  for (int c = 0; c < C; c++) store(flat + c * N, sum[c]);
  for (int b = 0; b < N && first + b < n; b++) emit<C>(out, first + b, col, flat + b * C);
}

template <int N, int W>
KBS_NOINLINE void strip_panel(const View& view, const Strip& strip, const float* w, const float* panel, int lanes,
                              int n, const Output& out) {
  constexpr int C = W < kSums ? W : kSums;
  const int32_t* index = view.index + strip.first_run;
  for (int c0 = 0; c0 < W; c0 += C) {
    int first = 0;
    if constexpr (2 * C <= kSums && 2 * N <= kMaxLanes) {
      for (; first + 2 * N <= lanes && first + N < n; first += 2 * N) {
        Floats<N> sum[C][2], half[C];
        panel_sums<N, W, C, 2>(strip, index, w + c0, panel + first, lanes, sum);
        for (int p = 0; p < 2; p++) {
          for (int c = 0; c < C; c++) half[c] = sum[c][p];
          emit_lanes<N, C>(half, n, first + p * N, strip.col + c0, out);
        }
      }
    }
    for (; first < n; first += N) {
      Floats<N> sum[C][1], whole[C];
      panel_sums<N, W, C, 1>(strip, index, w + c0, panel + first, lanes, sum);
      for (int c = 0; c < C; c++) whole[c] = sum[c][0];
      emit_lanes<N, C>(whole, n, first, strip.col + c0, out);
    }
  }
}

#if KBS_LANES == 16
// Four lanes of the panel are a quad. A tile's quarters hold four columns each, of 16 / W rows; with a quad of its row
// in each quarter of another register, column k of all quarters takes one shuffle, and a product for each quad.
template <int K, int... Lane>
KBS_INLINE V column_of_quarters(V tile, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(tile, tile, (Lane / 4 * 4 + K)...);
}

// Quarters A and B of one register, C and D of another.
template <int A, int B, int C, int D, int... Lane>
KBS_INLINE V quarters(V a, V b, std::integer_sequence<int, Lane...>) {
  constexpr int from[] = {A, B, L / 4 + C, L / 4 + D};
  return __builtin_shufflevector(a, b, (from[Lane / 4] * 4 + Lane % 4)...);
}

// quads[i] gets quad i of the rows that the tile's quarters belong to. Narrow tiles take panels of 8 lanes only.
template <int W, int Q>
KBS_INLINE void load_quads(const float* x, V (&quads)[Q]) {
  using Lanes = std::make_integer_sequence<int, L>;
  if constexpr (W == 16) {
    for (int i = 0; i < Q; i++) quads[i] = repeat_quad(x + 4 * i);
  } else if constexpr (W == 8) {
    const V rows = load(x);
    quads[0] = quarters<0, 0, 2, 2>(rows, rows, Lanes{});
    quads[1] = quarters<1, 1, 3, 3>(rows, rows, Lanes{});
  } else {
    const V a = load(x), b = load(x + L);
    quads[0] = quarters<0, 2, 0, 2>(a, b, Lanes{});
    quads[1] = quarters<1, 3, 1, 3>(a, b, Lanes{});
  }
}

// zip_low and zip_high within each quarter.
template <int First, int... Lane>
KBS_INLINE V zip_quarters(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % 2 * L + Lane / 4 * 4 + First + Lane % 4 / 2)...);
}

// Column k of each quarter for the four rows of a quad, in a to d, goes to rows of y. Not inlined, and its caller
// unrolls: what is indexed with a variable would have to be in memory, and was cleared there before every strip.
template <int W>
KBS_NOINLINE void emit_quad(V a, V b, V c, V d, int first, int n, uint32_t col, const Output& out) {
  using Lanes = std::make_integer_sequence<int, L>;
  V y[4] = {a, b, c, d};
  for (int round = 0; round < 2; round++) {
    const V even[] = {zip_quarters<0>(y[0], y[2], Lanes{}), zip_quarters<2>(y[0], y[2], Lanes{})};
    const V odd[] = {zip_quarters<0>(y[1], y[3], Lanes{}), zip_quarters<2>(y[1], y[3], Lanes{})};
    y[0] = even[0], y[1] = even[1], y[2] = odd[0], y[3] = odd[1];
  }
  for (int b = 0; b < 4 && first + b < n; b++) {
    float flat[W];
    store(flat, folded<W, float, L>(y[b]));
    emit<W>(out, first + b, col, flat);
  }
}

template <int W, int Q>
KBS_NOINLINE void strip_quads(const View& view, const Strip& strip, const float* w, const float* panel, int lanes,
                              int first, int n, const Output& out) {
  using Lanes = std::make_integer_sequence<int, L>;
  constexpr uint32_t q = kTile / W;
  constexpr int U = 4 / Q;
  const int32_t* index = view.index + strip.first_run;
  V sum[U][Q][4] = {};
  const auto tile = [&](int u, const float* w, const float* x) KBS_INLINE_LAMBDA {
    ask_for_weights(w);
    V quads[Q];
    load_quads<W>(x, quads);
    const V columns = load(w);
    const V column[4] = {column_of_quarters<0>(columns, Lanes{}), column_of_quarters<1>(columns, Lanes{}),
                         column_of_quarters<2>(columns, Lanes{}), column_of_quarters<3>(columns, Lanes{})};
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < Q; i++) sum[u][i][k] += column[k] * quads[i];
  };
  uint32_t i = 0;
  if (strip.run == q) {
    for (; i + U <= strip.runs; i += U, w += U * kTile)
      for (int u = 0; u < U; u++) tile(u, w + u * kTile, panel + (size_t)index[i + u] * lanes + first);
  }
  for (; i < strip.runs; i++) {
    const float* x = panel + (size_t)index[i] * lanes + first;
    uint32_t r = 0;
    for (; r + U * q <= strip.run; r += U * q, w += U * kTile, x += U * q * lanes)
      for (int u = 0; u < U; u++) tile(u, w + u * kTile, x + u * q * lanes);
    if (U > 1 && r < strip.run) {
      tile(0, w, x);
      w += kTile;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; i++) {
    if constexpr (U == 2)
      for (int k = 0; k < 4; k++) sum[0][i][k] += sum[1][i][k];
    emit_quad<W>(sum[0][i][0], sum[0][i][1], sum[0][i][2], sum[0][i][3], first + 4 * i, n, strip.col, out);
  }
}
#endif

void matmul_panel(const View& view, size_t begin, size_t end, const float* panel, int lanes, int n, float* scratch,
                  const Output& out) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    const float* w = widened(view, strip, scratch);
    for_width(strip.width, [&](auto width) KBS_INLINE_LAMBDA {
      constexpr int W = width.value;
#if KBS_LANES == 16
      if (lanes > 8) {
        if constexpr (W == 16) {
          for (int first = 0; first < n; first += 16) strip_quads<W, 4>(view, strip, w, panel, lanes, first, n, out);
        } else {
          strip_panel<16, W>(view, strip, w, panel, lanes, n, out);
        }
        return;
      }
      if constexpr (W >= 4) {
        if (strip.run % (kTile / W) == 0) return strip_quads<W, 2>(view, strip, w, panel, 8, 0, n, out);
      }
      if constexpr (W < 16) strip_panel<8, W>(view, strip, w, panel, 8, n, out);
#else
      strip_panel<L, W>(view, strip, w, panel, lanes, n, out);
#endif
    });
  }
}

// dx += w dy, N lanes at a time, four rows under way.
template <int N, int W>
KBS_NOINLINE void strip_transposed(const View& view, const Strip& strip, const float* weights, const float* dy,
                                   int lanes, float* dx) {
  const int32_t* index = view.index + strip.first_run;
  for (int first = 0; first < lanes; first += N) {
    Floats<N> d[W];
    for (int c = 0; c < W; c++) d[c] = load<Floats<N>>(dy + ((size_t)strip.col + c) * lanes + first);
    const float* w = weights;
    for (uint32_t i = 0; i < strip.runs; i++) {
      float* at = dx + (size_t)index[i] * lanes + first;
      uint32_t r = 0;
      for (; r + 4 <= strip.run; r += 4, w += 4 * W, at += 4 * lanes) {
        Floats<N> sum[4];
        for (int u = 0; u < 4; u++) sum[u] = load<Floats<N>>(at + u * lanes);
        for (int c = 0; c < W; c++)
          for (int u = 0; u < 4; u++) sum[u] += w[u * W + c] * d[c];
        for (int u = 0; u < 4; u++) store(at + u * lanes, sum[u]);
      }
      for (; r < strip.run; r++, w += W, at += lanes) {
        auto sum = load<Floats<N>>(at);
        for (int c = 0; c < W; c++) sum += w[c] * d[c];
        store(at, sum);
      }
    }
  }
}

void matmul_panel_transposed(const View& view, size_t begin, size_t end, const float* dy, int lanes, float* scratch,
                             float* dx) {
  constexpr int N = L < 8 ? L : 8;
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    const float* w = widened(view, strip, scratch);
    for_width(strip.width, [&](auto width) KBS_INLINE_LAMBDA {
      if (lanes % L) {
        strip_transposed<N, width.value>(view, strip, w, dy, lanes, dx);
      } else {
        strip_transposed<L, width.value>(view, strip, w, dy, lanes, dx);
      }
    });
  }
}

// ---- the gradient of the kept blocks ----------------------------------------------------------------------------

template <int W>
KBS_NOINLINE void strip_sampled(const View& view, const Strip& strip, const float* x, size_t x_stride, const float* dy,
                                size_t dy_stride, int n, bool accumulate, float* dvalues) {
  constexpr uint32_t q = kTile / W;
  constexpr int kTiles = 8 / kParts;
  const int32_t* index = view.index + strip.first_run;
  float* out = dvalues + strip.first_tile * kTile;
  // dy of the strip's columns, as often as a tile has rows. Copied by memcpy: GCC 12 makes vectors of single elements
  // that it reads behind the last row for.
  float wide[64][kTile];
  for (int b = 0; b < n; b++)
    for (uint32_t i = 0; i < kTile; i += W) std::memcpy(&wide[b][i], dy + b * dy_stride + strip.col, W * sizeof(float));
  const uint32_t run_tiles = strip.run / q;
  const uint32_t tiles = run_tiles ? strip.runs * run_tiles : strip.runs / q;
  for (uint32_t t = 0; t < tiles; t += kTiles) {
    const int some = tiles - t < kTiles ? (int)(tiles - t) : kTiles;
    V sum[kTiles][kParts] = {};
    if (run_tiles) {
      const float* rows[kTiles];
      for (int u = 0; u < kTiles; u++) {
        const uint32_t tile = u < some ? t + u : t;
        rows[u] = x + index[tile / run_tiles] + tile % run_tiles * q;
      }
      for (int b = 0; b < n; b++)
        for (int part = 0; part < kParts; part++) {
          const V d = load(&wide[b][part * L]);
          for (int u = 0; u < kTiles; u++)
            sum[u][part] += d * expand<W>((const char*)(rows[u] + b * x_stride + part * L / W));
        }
    } else {
      for (int b = 0; b < n; b++)
        for (int part = 0; part < kParts; part++) {
          const V d = load(&wide[b][part * L]);
          for (int u = 0; u < some; u++)
            sum[u][part] += d * expand_gathered<W, 4, false>((const char*)(x + b * x_stride), index + (t + u) * q + part * L / W);
        }
    }
    for (int u = 0; u < some; u++)
      for (int part = 0; part < kParts; part++) {
        float* at = out + (size_t)(t + u) * kTile + part * L;
        store(at, accumulate ? sum[u][part] + load(at) : sum[u][part]);
      }
  }
}

void sampled_product(const View& view, size_t begin, size_t end, const float* x, size_t x_stride, const float* dy,
                     size_t dy_stride, int n, bool accumulate, float* dvalues) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    for_width(strip.width, [&](auto width) KBS_INLINE_LAMBDA {
      strip_sampled<width.value>(view, strip, x, x_stride, dy, dy_stride, n, accumulate, dvalues);
    });
  }
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
