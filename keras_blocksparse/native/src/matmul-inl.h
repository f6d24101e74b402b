// Products with a packed matrix. See vector-inl.h for how this file is compiled, format.h for strips, tiles and runs.
#ifndef KBS_MATMUL_INL_H_
#define KBS_MATMUL_INL_H_

#include "vector-inl.h"

namespace kbs {
namespace KBS_ISA {
namespace {

template <int... Lane>
KBS_INLINE V halves(V a, V b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane < L / 2 ? Lane : L + Lane)...);
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

// The same, from units at p + index[i] * size.
template <int W, int size>
KBS_INLINE V expand_gathered(const char* p, const int32_t* index) {
  using Lanes = std::make_integer_sequence<int, L>;
  const auto at = [&](int i) KBS_INLINE_LAMBDA { return unit(p + (ptrdiff_t)index[i] * size); };
  if constexpr (W >= L) {
    return broadcast(at(0));
  } else if constexpr (W * 2 == L) {
    return halves(broadcast(at(0)), broadcast(at(1)), Lanes{});
  } else if constexpr (L / W == 4) {
    const Floats<L / W> v = {at(0), at(1), at(2), at(3)};
    return repeat_each<W>(in_low_lanes(v), Lanes{});
  } else if constexpr (L / W == 8) {
    const Floats<L / W> v = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
    return repeat_each<W>(in_low_lanes(v), Lanes{});
  } else {
    return Floats<L / W>{at(0), at(1), at(2),  at(3),  at(4),  at(5),  at(6),  at(7),
                         at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15)};
  }
}

// ---- vectors over the outputs: a few rows of x ------------------------------------------------------------------

struct Float32 {
  using Sum = V;
  static constexpr int size = 4;  // bytes of x in a row
  static KBS_INLINE V add(V sum, const char* w, V x) { return sum + load(w) * x; }
};

struct Int8 {
  using Sum = I;
  static constexpr int size = 1;
  static KBS_INLINE I add(I sum, const char* w, V x) { return dot4(sum, load<I>(w), (I)x); }
};

template <class T, int W, int B, int U>
struct RowSums {
  typename T::Sum sum[B][U][kParts] = {};

  KBS_INLINE void tile(int u, const char* w, const char* x, size_t stride) {
    for (int b = 0; b < B; b++)
      for (int part = 0; part < kParts; part++)
        sum[b][u][part] = T::add(sum[b][u][part], w + part * L * 4, expand<W>(x + b * stride + part * L / W * 4));
  }
  KBS_INLINE void gathered_tile(int u, const char* w, const char* x, size_t stride, const int32_t* rows) {
    for (int b = 0; b < B; b++)
      for (int part = 0; part < kParts; part++)
        sum[b][u][part] = T::add(sum[b][u][part], w + part * L * 4,
                                 expand_gathered<W, T::size>(x + b * stride, rows + part * L / W));
  }
  // Adds everything that belongs to one output.
  template <class Lane>
  KBS_INLINE void fold(int b, Lane* out) {
    for (int u = 1; u < U; u++)
      for (int part = 0; part < kParts; part++) sum[b][0][part] += sum[b][u][part];
    for (int part = 0; part < kParts; part++) store(out + part * L, sum[b][0][part]);
    for (int half = kTile / 2; half >= W; half /= 2)
      for (int i = 0; i < half; i++) out[i] += out[i + half];
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

// The sums of one strip for B rows of x. U tiles are under way at once, to hide the latency of the additions.
template <class T, int W, int B, int U>
KBS_INLINE void strip_rows(const Strip& strip, const int32_t* index, const char* w, const char* x, size_t stride,
                           RowSums<T, W, B, U>& sums) {
  constexpr uint32_t q = kTile / W;
  const uint32_t run_tiles = strip.run / q;
  if (run_tiles == 0) {
    uint32_t i = 0;
    for (; i + U * q <= strip.runs; i += U * q, w += U * kTileBytes)
      for (int u = 0; u < U; u++) sums.gathered_tile(u, w + u * kTileBytes, x, stride, index + i + u * q);
    for (; i < strip.runs; i += q, w += kTileBytes) sums.gathered_tile(0, w, x, stride, index + i);
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

template <int W, int B>
void strip_rows_f32(const View& view, const Strip& strip, const float* x, size_t stride, const Output& out) {
  RowSums<Float32, W, B, in_flight(B)> sums;
  strip_rows(strip, view.index + strip.first_run, (const char*)view.values + strip.first_tile * kTileBytes,
             (const char*)x, stride * 4, sums);
  for (int b = 0; b < B; b++) {
    float y[kTile];
    sums.fold(b, y);
    emit<W>(out, b, strip.col, y);
  }
}

template <int W, int B>
void strip_rows_i8(const View& view, const Strip& strip, const uint8_t* x, size_t stride, const float* scale,
                   const Output& out) {
  RowSums<Int8, W, B, in_flight(B)> sums;
  strip_rows(strip, view.index + strip.first_run, (const char*)view.values + strip.first_tile * kTileBytes,
             (const char*)x, stride, sums);
  for (int b = 0; b < B; b++) {
    uint32_t sum[kTile];  // wraps on the way, the true sum fits: see kMaxInt8Rows
    sums.fold(b, sum);
    float y[W];
    for (int i = 0; i < W; i++) {
      const uint32_t zero = (uint32_t)kZeroPoint * (uint32_t)view.sums[strip.col + i];
      y[i] = (float)(int32_t)(sum[i] - zero) * (scale[b] * view.scales[strip.col + i]);
    }
    emit<W>(out, b, strip.col, y);
  }
}

// Two zipped tiles at a time; each half is a float32 whose lower bits are gone.
template <int W, int B>
void strip_rows_bf16(const View& view, const Strip& strip, const float* x, size_t stride, const Output& out) {
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
        return expand_gathered<W, 4>((const char*)(x + b * stride), rows + half * q + part * L / W);
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
  for (int b = 0; b < B; b++) {
    float y[kTile];
    sums.fold(b, y);
    emit<W>(out, b, strip.col, y);
  }
}

Output shifted(const Output& out, int rows) { return {out.y + rows * out.stride, out.stride, out.bias, out.accumulate}; }

// Kernels take 4, 2 or 1 rows.
void matmul_rows_f32(const View& view, size_t begin, size_t end, const float* x, size_t stride, int n,
                     const Output& out) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    int b = 0;
#define CALL4(W) strip_rows_f32<W, 4>(view, strip, x, stride, out)
#define CALL2(W) strip_rows_f32<W, 2>(view, strip, x, stride, out)
#define CALL1(W) strip_rows_f32<W, 1>(view, strip, x + b * stride, stride, shifted(out, b))
    if (n == 4) {
      KBS_FOR_WIDTH(strip.width, CALL4);
      continue;
    }
    if (n >= 2) {
      KBS_FOR_WIDTH(strip.width, CALL2);
      b = 2;
    }
    if (n > b) KBS_FOR_WIDTH(strip.width, CALL1);
#undef CALL4
#undef CALL2
#undef CALL1
  }
}

void matmul_rows_bf16(const View& view, size_t begin, size_t end, const float* x, size_t stride, int n,
                      const Output& out) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    int b = 0;
#define CALL2(W) strip_rows_bf16<W, 2>(view, strip, x + b * stride, stride, shifted(out, b))
#define CALL1(W) strip_rows_bf16<W, 1>(view, strip, x + b * stride, stride, shifted(out, b))
    for (; b + 2 <= n; b += 2) KBS_FOR_WIDTH(strip.width, CALL2);
    if (b < n) KBS_FOR_WIDTH(strip.width, CALL1);
#undef CALL2
#undef CALL1
  }
}

void matmul_rows_i8(const View& view, size_t begin, size_t end, const uint8_t* x, size_t stride, const float* scale,
                    int n, const Output& out) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    int b = 0;
#define CALL4(W) strip_rows_i8<W, 4>(view, strip, x, stride, scale, out)
#define CALL2(W) strip_rows_i8<W, 2>(view, strip, x, stride, scale, out)
#define CALL1(W) strip_rows_i8<W, 1>(view, strip, x + b * stride, stride, scale + b, shifted(out, b))
    if (n == 4) {
      KBS_FOR_WIDTH(strip.width, CALL4);
      continue;
    }
    if (n >= 2) {
      KBS_FOR_WIDTH(strip.width, CALL2);
      b = 2;
    }
    if (n > b) KBS_FOR_WIDTH(strip.width, CALL1);
#undef CALL4
#undef CALL2
#undef CALL1
  }
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
void strip_panel(const View& view, const Strip& strip, const float* w, const float* panel, int lanes, int n,
                 const Output& out) {
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
// Eight lanes are half a register here. Blocks 16 wide take their vectors over the outputs instead; narrower ones put
// two rows of x in a register and the two weights that go with them beside each other.
void strip_panel8_wide(const View& view, const Strip& strip, const float* w, const float* panel, int n,
                       const Output& out) {
  V sum[2][8] = {};  // even and odd rows: with eight sums alone, one late load would hold up everything behind it
  const int32_t* index = view.index + strip.first_run;
  for (uint32_t i = 0; i < strip.runs; i++) {
    const float* x = panel + (size_t)index[i] * 8;
    const float* next = panel + (size_t)index[i + 1 < strip.runs ? i + 1 : i] * 8;
    uint32_t r = 0;
    for (; r + 2 <= strip.run; r += 2, w += 32, x += 16) {
      __builtin_prefetch(next + r * 8);
      for (int u = 0; u < 2; u++) {
        ask_for_weights(w + u * 16);
        const V row = load(w + u * 16);
        for (int b = 0; b < 8; b++) sum[u][b] += row * x[u * 8 + b];
      }
    }
    if (r < strip.run) {
      const V row = load(w);
      for (int b = 0; b < 8; b++) sum[0][b] += row * x[b];
      w += 16;
    }
  }
  for (int b = 0; b < n; b++) {
    float y[16];
    store(y, sum[0][b] + sum[1][b]);
    emit<16>(out, b, strip.col, y);
  }
}

template <int A, int B, int... Lane>
KBS_INLINE V two_weights(V tile, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(tile, tile, (Lane < 8 ? A : B)...);
}

template <int W, int... Column>
KBS_INLINE void row_pair(V tile, V x, V* sum, std::integer_sequence<int, Column...>, std::integer_sequence<int, 0>) {
  ((sum[Column] += two_weights<Column, W + Column>(tile, std::make_integer_sequence<int, 16>{}) * x), ...);
}
template <int W, int... Column>
KBS_INLINE void row_pair(V tile, V x, V* sum, std::integer_sequence<int, Column...>, std::integer_sequence<int, 0, 1>) {
  ((sum[Column] += two_weights<2 * W + Column, 3 * W + Column>(tile, std::make_integer_sequence<int, 16>{}) * x), ...);
}

template <int W>
void strip_panel8_narrow(const View& view, const Strip& strip, const float* w, const float* panel, int n,
                         const Output& out) {
  constexpr int q = kTile / W;
  V sum[2][W] = {};
  const int32_t* index = view.index + strip.first_run;
  using Columns = std::make_integer_sequence<int, W>;
  for (uint32_t i = 0; i < strip.runs; i++) {
    const float* x = panel + (size_t)index[i] * 8;
    for (uint32_t r = 0; r < strip.run; r += q, w += kTile, x += q * 8) {
      const V tile = load(w);
      row_pair<W>(tile, load(x), sum[0], Columns{}, std::integer_sequence<int, 0>{});
      if constexpr (W == 4) row_pair<W>(tile, load(x + 16), sum[1], Columns{}, std::integer_sequence<int, 0, 1>{});
    }
  }
  Floats<8> y[W];
  for (int c = 0; c < W; c++) {
    const V both = sum[0][c] + sum[1][c];
    y[c] = __builtin_shufflevector(both, both, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(both, both, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  emit_lanes<8, W>(y, n, 0, strip.col, out);
}
#endif

void matmul_panel(const View& view, size_t begin, size_t end, const float* panel, int lanes, int n, float* scratch,
                  const Output& out) {
  for (size_t s = begin; s < end; s++) {
    const Strip& strip = view.strips[s];
    const float* w = widened(view, strip, scratch);
#if KBS_LANES == 16
    if (lanes == 8) {
      if (strip.width == 16) {
        strip_panel8_wide(view, strip, w, panel, n, out);
      } else if (strip.width == 8 && strip.run % 2 == 0) {
        strip_panel8_narrow<8>(view, strip, w, panel, n, out);
      } else if (strip.width == 4 && strip.run % 4 == 0) {
        strip_panel8_narrow<4>(view, strip, w, panel, n, out);
      } else {
#define CALL(W) strip_panel<8, W>(view, strip, w, panel, 8, n, out)
        KBS_FOR_WIDTH(strip.width, CALL);
#undef CALL
      }
      continue;
    }
#endif
#define CALL(W) strip_panel<L, W>(view, strip, w, panel, lanes, n, out)
    KBS_FOR_WIDTH(strip.width, CALL);
#undef CALL
  }
}

// dx += w dy, N lanes at a time, four rows under way.
template <int N, int W>
void strip_transposed(const View& view, const Strip& strip, const float* weights, const float* dy, int lanes,
                      float* dx) {
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
#define CALL(W) strip_transposed<L, W>(view, strip, w, dy, lanes, dx)
#define CALL8(W) strip_transposed<N, W>(view, strip, w, dy, lanes, dx)
    if (lanes % L) {
      KBS_FOR_WIDTH(strip.width, CALL8);
    } else {
      KBS_FOR_WIDTH(strip.width, CALL);
    }
#undef CALL
#undef CALL8
  }
}

// ---- the gradient of the kept blocks ----------------------------------------------------------------------------

template <int W>
void strip_sampled(const View& view, const Strip& strip, const float* x, size_t x_stride, const float* dy,
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
            sum[u][part] += d * expand_gathered<W, 4>((const char*)(x + b * x_stride), index + (t + u) * q + part * L / W);
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
#define CALL(W) strip_sampled<W>(view, strip, x, x_stride, dy, dy_stride, n, accumulate, dvalues)
    KBS_FOR_WIDTH(strip.width, CALL);
#undef CALL
  }
}

}  // namespace
}  // namespace KBS_ISA
}  // namespace kbs
#endif
