#include "matrix.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "threads.h"

kbs_matrix::~kbs_matrix() { std::free(owned); }

namespace kbs {
namespace {

bool by_rows(const Header& h, int64_t rows) { return h.dtype == KBS_INT8 || rows <= kMaxRows; }

size_t scratch_bytes(const Header& h) {
  // The longest strip: every row, twice as long at most where runs are filled up to tiles.
  return h.dtype == KBS_BFLOAT16 ? 2 * row_stride(h) * kTile * sizeof(float) : 0;
}

}  // namespace

int panel_lanes(int64_t rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : 32; }

size_t row_stride(const Header& h) { return round_up(h.padded_rows + kSlack, 64); }

size_t operand_bytes(const View& view, int64_t rows) {
  const Header& h = *view.header;
  rows = std::min<int64_t>(rows, kBlockRows);
  if (by_rows(h, rows)) return (size_t)rows * row_stride(h) * (h.dtype == KBS_INT8 ? 1 : sizeof(float));
  return row_stride(h) * panel_lanes(rows) * sizeof(float) + scratch_bytes(h);
}

void make_operand(const Kernels& k, const View& view, const float* const* x, int rows, char* workspace, Operand* out) {
  const Header& h = *view.header;
  const size_t stride = row_stride(h);
  out->rows = rows, out->stride = stride, out->data = workspace, out->lanes = 0, out->scratch = nullptr;
  if (h.dtype == KBS_INT8) {
    for (int b = 0; b < rows; b++)
      out->scales[b] = k.quantize(x[b], h.rows, stride, (uint8_t*)workspace + b * stride);
  } else if (by_rows(h, rows)) {
    for (int b = 0; b < rows; b++) {
      float* row = (float*)workspace + b * stride;
      std::memcpy(row, x[b], h.rows * sizeof(float));
      std::memset(row + h.rows, 0, (stride - h.rows) * sizeof(float));
    }
  } else {
    out->lanes = panel_lanes(rows);
    k.make_panel(x, rows, h.rows, stride, out->lanes, (float*)workspace);
    out->scratch = (float*)(workspace + stride * out->lanes * sizeof(float));
  }
}

void multiply(const Kernels& k, const View& view, const Operand& x, size_t begin, size_t end, const Output& out) {
  if (x.lanes) {
    k.matmul_panel(view, begin, end, (const float*)x.data, x.lanes, x.rows, x.scratch, out);
    return;
  }
  // More than kMaxRows rows (int8): a few strips at a time, so that their values are still in cache for the next rows.
  const size_t group = x.rows > kMaxRows ? 8 : end - begin;
  for (size_t s = begin; s < end; s += group) {
    const size_t last = std::min(s + group, end);
    for (int b = 0; b < x.rows; b += kMaxRows) {
      const int n = std::min(x.rows - b, kMaxRows);
      const Output part{out.y + b * out.stride, out.stride, out.bias, out.accumulate};
      if (view.header->dtype == KBS_INT8) {
        k.matmul_rows_i8(view, s, last, (const uint8_t*)x.data + b * x.stride, x.stride, x.scales + b, n, part);
      } else {
        const float* rows = (const float*)x.data + b * x.stride;
        (view.header->dtype == KBS_FLOAT32 ? k.matmul_rows_f32 : k.matmul_rows_bf16)(view, s, last, rows, x.stride, n, part);
      }
    }
  }
}

size_t split_strips(const View& view, size_t begin, size_t end, int index, int parts) {
  if (index <= 0) return begin;
  if (index >= parts) return end;
  const auto first_tile = [&](size_t s) { return s < view.header->strips ? view.strips[s].first_tile : view.header->tiles; };
  const uint64_t before = first_tile(begin), tiles = first_tile(end) - before;
  const Strip* at = std::lower_bound(view.strips + begin, view.strips + end,
                                     before + tiles / parts * index + tiles % parts * index / parts,
                                     [](const Strip& strip, uint64_t t) { return strip.first_tile < t; });
  return (size_t)(at - view.strips);
}

size_t split_strips(const View& view, int index, int parts) {
  return split_strips(view, 0, view.header->strips, index, parts);
}

double estimated_us(const View& view, int64_t rows) {
  const double bytes = (double)view.header->tiles * kTileBytes;
  const double weights = bytes / (view.header->dtype == KBS_FLOAT32 ? 4 : view.header->dtype == KBS_BFLOAT16 ? 2 : 1);
  return std::max(bytes / 80e3, weights * 2 * (double)rows / 120e3);
}

namespace {

kbs_status check_matmul(const float* x, int64_t x_stride, int64_t x_cols, const float* y, int64_t y_stride,
                        int64_t y_cols, int64_t batch) {
  if (batch < 0) return fail(KBS_INVALID_ARGUMENT, "a batch of %lld rows", (long long)batch);
  if (batch > 0 && (!x || !y)) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  if (batch > 1 && (x_stride < x_cols || y_stride < y_cols))
    return fail(KBS_INVALID_ARGUMENT, "strides of %lld and %lld are shorter than rows of %lld and %lld",
                (long long)x_stride, (long long)y_stride, (long long)x_cols, (long long)y_cols);
  return KBS_OK;
}

// Threads for a product, and the parts that strips are cut into where there are `chunks` of rows: enough pieces for
// threads to end at about the same time.
int threads_for(const View& view, int64_t batch) {
  return estimated_us(view, batch) >= kWorthThreadsUs ? num_threads() : 1;
}
int strip_parts(int threads, int64_t chunks) {
  return threads > 1 ? (int)((8 * threads + chunks - 1) / chunks) : 1;
}

void matmul(const Kernels& k, const View& view, const float* x, size_t x_stride, int64_t batch, const float* bias,
            bool accumulate, float* y, size_t y_stride) {
  const int threads = threads_for(view, batch);
  const int64_t chunks = (batch + kBlockRows - 1) / kBlockRows;
  const int parts = strip_parts(threads, chunks);
  struct Made {
    int64_t chunk;
    Operand operand;
  };
  // Before the operand's own memory, for a product must not allocate: real-time audio calls it.
  const size_t head = round_up(sizeof(Made), 64), bytes = head + operand_bytes(view, batch);
  char* workspace = thread_workspace(bytes * threads);
  for (int i = 0; i < threads; i++) (new (workspace + bytes * i) Made)->chunk = -1;
  share_out(threads, chunks * parts, [&](int64_t piece, int thread) {
    const int64_t chunk = piece / parts, first = chunk * kBlockRows;
    Made& mine = *(Made*)(workspace + bytes * thread);
    if (mine.chunk != chunk) {
      const int n = (int)std::min<int64_t>(batch - first, kBlockRows);
      const float* at[kBlockRows];
      for (int b = 0; b < n; b++) at[b] = x + (first + b) * x_stride;
      make_operand(k, view, at, n, workspace + bytes * thread + head, &mine.operand);
      mine.chunk = chunk;
    }
    const int part = (int)(piece % parts);
    multiply(k, view, mine.operand, split_strips(view, part, parts), split_strips(view, part + 1, parts),
             {y + first * y_stride, y_stride, bias, accumulate});
  });
}

}  // namespace

void matmul_transposed(const Kernels& k, const View& view, const float* dy, size_t dy_stride, int64_t batch, float* dx,
                       size_t dx_stride) {
  const Header& h = *view.header;
  int threads = threads_for(view, batch);
  int lanes = panel_lanes(batch);
  while (lanes > 8 && (batch + lanes - 1) / lanes < threads) lanes /= 2;
  const int64_t chunks = (batch + lanes - 1) / lanes;
  threads = (int)std::min<int64_t>(threads, chunks);
  const size_t dy_floats = (size_t)h.cols * lanes, dx_floats = row_stride(h) * lanes;
  const size_t bytes = round_up((dy_floats + dx_floats) * sizeof(float) + scratch_bytes(h), 64);
  char* workspace = thread_workspace(bytes * threads);
  share_out(threads, chunks, [&](int64_t chunk, int thread) {
    float* dy_panel = (float*)(workspace + bytes * thread);
    float* dx_panel = dy_panel + dy_floats;
    const int64_t first = chunk * lanes;
    const int n = (int)std::min<int64_t>(batch - first, lanes);
    const float* at[kMaxLanes];
    for (int b = 0; b < n; b++) at[b] = dy + (first + b) * dy_stride;
    k.make_panel(at, n, h.cols, h.cols, lanes, dy_panel);
    std::memset(dx_panel, 0, dx_floats * sizeof(float));
    k.matmul_panel_transposed(view, 0, h.strips, dy_panel, lanes, dx_panel + dx_floats, dx_panel);
    k.read_panel(dx_panel, lanes, h.rows, n, dx + first * dx_stride, dx_stride);
  });
}

void sampled_product(const Kernels& k, const View& view, size_t begin, size_t end, const float* x, size_t x_stride,
                     const float* dy, size_t dy_stride, int64_t batch, bool accumulate, float* dvalues) {
  constexpr int64_t kRows = 64;  // as many as the kernel takes
  const Header& h = *view.header;
  const int threads = threads_for(view, batch), parts = strip_parts(threads, 1);
  const size_t stride = row_stride(h);
  float* padded = (float*)thread_workspace((size_t)std::min(batch, kRows) * stride * sizeof(float));
  if (batch == 0 && !accumulate) std::memset(dvalues, 0, values_bytes(h));
  for (int64_t first = 0; first < batch; first += kRows) {
    const int n = (int)std::min(batch - first, kRows);
    for (int b = 0; b < n; b++) {
      std::memcpy(padded + b * stride, x + (first + b) * x_stride, h.rows * sizeof(float));
      std::memset(padded + b * stride + h.rows, 0, (stride - h.rows) * sizeof(float));
    }
    share_out(threads, parts, [&](int64_t part, int) {
      k.sampled_product(view, split_strips(view, begin, end, (int)part, parts),
                        split_strips(view, begin, end, (int)part + 1, parts), padded, stride, dy + first * dy_stride,
                        dy_stride, n, accumulate || first > 0, dvalues);
    });
  }
}

bool lacks_values(const View& view) { return !view.values && values_bytes(*view.header) > 0; }
kbs_status no_values() { return fail(KBS_INVALID_ARGUMENT, "the matrix is a structure without values, and none were given"); }

}  // namespace kbs

using kbs::fail;
using kbs::guarded;

kbs_status kbs_matrix_create(const void* packed, int64_t bytes, int32_t flags, kbs_matrix** out) {
  return guarded([&]() -> kbs_status {
    if (!out) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    *out = nullptr;
    if (!packed || bytes < 1) return fail(KBS_INVALID_ARGUMENT, "no packed buffer was given");
    std::unique_ptr<kbs_matrix> matrix(new kbs_matrix);
    if (flags & KBS_COPY) {
      const size_t rounded = ((size_t)bytes + 63) / 64 * 64;
      matrix->owned = (char*)std::aligned_alloc(64, rounded);
      if (!matrix->owned) return fail(KBS_OUT_OF_MEMORY, "no memory for a matrix of %lld bytes", (long long)bytes);
      std::memcpy(matrix->owned, packed, (size_t)bytes);
      packed = matrix->owned;
    }
    if (kbs_status status = kbs::open_packed(packed, bytes, flags & KBS_STRUCTURE, &matrix->view)) return status;
    *out = matrix.release();
    return KBS_OK;
  });
}

kbs_status kbs_matrix_from_columns(const kbs_columns* columns, int64_t block_rows, int64_t block_cols, int32_t dtype,
                                   kbs_matrix** out) {
  return guarded([&]() -> kbs_status {
    if (!columns || !out) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    *out = nullptr;
    std::unique_ptr<kbs_matrix> matrix(new kbs_matrix);
    const auto allocate = [](size_t bytes, void* owner) {
      return ((kbs_matrix*)owner)->owned = (char*)std::aligned_alloc(64, kbs::round_up(bytes, 64));
    };
    size_t bytes = 0;
    if (kbs_status status = kbs::pack_columns(*columns, block_rows, block_cols, dtype, allocate, matrix.get(), &bytes))
      return status;
    if (kbs_status status = kbs::open_packed(matrix->owned, (int64_t)bytes, false, &matrix->view)) return status;
    *out = matrix.release();
    return KBS_OK;
  });
}

void kbs_matrix_destroy(kbs_matrix* matrix) { delete matrix; }

kbs_status kbs_matrix_info(const kbs_matrix* matrix, kbs_info* info) {
  if (!matrix || !info) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  *info = kbs::describe(*matrix->view.header);
  return KBS_OK;
}

kbs_status kbs_matmul(const kbs_matrix* matrix, const void* values, const float* x, int64_t x_stride, int64_t batch,
                      const float* bias, int32_t accumulate, float* y, int64_t y_stride) {
  return guarded([&]() -> kbs_status {
    if (!matrix) return fail(KBS_INVALID_ARGUMENT, "no matrix was given");
    const kbs::Header& h = *matrix->view.header;
    if (kbs_status status = kbs::check_matmul(x, x_stride, h.rows, y, y_stride, h.cols, batch)) return status;
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    const kbs::View view = kbs::with_values(matrix->view, values);
    if (kbs::lacks_values(view)) return kbs::no_values();
    if (batch > 0) kbs::matmul(*k, view, x, (size_t)x_stride, batch, bias, accumulate != 0, y, (size_t)y_stride);
    return KBS_OK;
  });
}

kbs_status kbs_matmul_transposed(const kbs_matrix* matrix, const void* values, const float* dy, int64_t dy_stride,
                                 int64_t batch, float* dx, int64_t dx_stride) {
  return guarded([&]() -> kbs_status {
    if (!matrix) return fail(KBS_INVALID_ARGUMENT, "no matrix was given");
    const kbs::Header& h = *matrix->view.header;
    if (kbs_status status = kbs::check_matmul(dy, dy_stride, h.cols, dx, dx_stride, h.rows, batch)) return status;
    if (h.dtype == KBS_INT8) return fail(KBS_UNSUPPORTED, "int8 matrices have no transposed product");
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    const kbs::View view = kbs::with_values(matrix->view, values);
    if (kbs::lacks_values(view)) return kbs::no_values();
    if (batch > 0) kbs::matmul_transposed(*k, view, dy, (size_t)dy_stride, batch, dx, (size_t)dx_stride);
    return KBS_OK;
  });
}

kbs_status kbs_sampled_product(const kbs_matrix* matrix, const float* x, int64_t x_stride, const float* dy,
                               int64_t dy_stride, int64_t batch, int32_t accumulate, float* dvalues) {
  return guarded([&]() -> kbs_status {
    if (!matrix) return fail(KBS_INVALID_ARGUMENT, "no matrix was given");
    const kbs::Header& h = *matrix->view.header;
    if (kbs_status status = kbs::check_matmul(x, x_stride, h.rows, dy, dy_stride, h.cols, batch)) return status;
    if (!dvalues && kbs::values_bytes(h) > 0) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    if (h.dtype != KBS_FLOAT32) return fail(KBS_UNSUPPORTED, "gradients are those of float32 values");
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    kbs::sampled_product(*k, matrix->view, 0, h.strips, x, (size_t)x_stride, dy, (size_t)dy_stride, batch,
                         accumulate != 0, dvalues);
    return KBS_OK;
  });
}

kbs_status kbs_activate(int32_t activation, float limit, const float* x, int64_t n, float* y) {
  return guarded([&]() -> kbs_status {
    if (activation < KBS_LINEAR || activation > KBS_CLIPPED_RELU)
      return fail(KBS_INVALID_ARGUMENT, "unknown activation %d", activation);
    if (n < 0 || (n > 0 && (!x || !y))) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    const kbs::Kernels* k = kbs::kernels();
    if (!k) return KBS_UNSUPPORTED;
    k->activate({activation, limit}, x, (size_t)n, y);
    return KBS_OK;
  });
}
