// Packing, unpacking and checking. Plain loops: a matrix is packed once.
#include "packed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

namespace kbs {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 28;  // padded, it still fits an int32
// |w| <= 127 and |x| <= 127: a longer sum could leave int32.
constexpr int64_t kMaxInt8Rows = 131072;

static_assert(sizeof(Header) == 144 && sizeof(Strip) == 32, "the format has no hidden padding");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed buffers are little endian");

uint64_t round_up(uint64_t value, uint64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

bool add(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_add_overflow(a, b, out); }
bool multiply(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_mul_overflow(a, b, out); }

struct Shape {
  int64_t rows, cols, gates, block_rows, block_cols;
  int32_t dtype;

  int64_t gate_cols() const { return cols / gates; }
  int64_t down() const { return (rows + block_rows - 1) / block_rows; }
  int64_t across() const { return (gate_cols() + block_cols - 1) / block_cols; }
  uint32_t unit_rows() const { return dtype == KBS_INT8 ? 4 : 1; }
};

kbs_status check_shape(const Shape& s) {
  if (s.dtype < KBS_FLOAT32 || s.dtype > KBS_INT8) return fail(KBS_INVALID_ARGUMENT, "unknown dtype %d", s.dtype);
  if (s.rows < 1 || s.cols < 1)
    return fail(KBS_INVALID_ARGUMENT, "the matrix is empty: %lld x %lld", (long long)s.rows, (long long)s.cols);
  if (s.rows > kMaxSide || s.cols > kMaxSide)
    return fail(KBS_INVALID_ARGUMENT, "a matrix of %lld x %lld is too large", (long long)s.rows, (long long)s.cols);
  if (s.gates < 1 || s.cols % s.gates)
    return fail(KBS_INVALID_ARGUMENT, "%lld gates do not divide %lld columns", (long long)s.gates, (long long)s.cols);
  if (s.block_rows < 1 || s.block_cols < 1 || s.block_rows > s.rows || s.block_cols > s.gate_cols())
    return fail(KBS_INVALID_ARGUMENT, "a block of %lld x %lld does not fit one gate of the matrix, %lld x %lld",
                (long long)s.block_rows, (long long)s.block_cols, (long long)s.rows, (long long)s.gate_cols());
  if (s.dtype == KBS_INT8 && s.rows > kMaxInt8Rows)
    return fail(KBS_UNSUPPORTED, "int8 sums over more than %lld rows could overflow; received %lld",
                (long long)kMaxInt8Rows, (long long)s.rows);
  return KBS_OK;
}

// Where runs point that only fill up, and where the rows end that kernels may read. A bfloat16 strip may be filled up
// with a whole run.
uint64_t padding_row(const Shape& s) { return (uint64_t)s.down() * round_up((uint64_t)s.block_rows, s.unit_rows()); }
uint64_t padded_rows(const Shape& s) {
  const uint64_t fill = std::max<uint64_t>(kTile * s.unit_rows(), s.dtype == KBS_BFLOAT16 ? s.block_rows : 0);
  return round_up(padding_row(s) + fill, kTile);
}

// Unit rows in one run of a strip of this width.
uint32_t run_length(int64_t block_rows, uint32_t unit_rows, uint32_t width) {
  const uint32_t q = kTile / width;
  const uint32_t units = (uint32_t)round_up((uint64_t)block_rows, unit_rows) / unit_rows;
  return units % q ? 1 : units;
}

uint32_t widest(uint32_t cols) {
  uint32_t width = kTile;
  while (width > cols) width /= 2;
  return width;
}

// Header and strips of what will be packed, and the kept blocks of each block column.
struct Plan {
  Header header{};
  std::vector<Strip> strips;
  std::vector<std::vector<int32_t>> kept;  // block rows, for each gate and block column
};

// Where a matrix comes from. A source tells the kept block rows of a block column, in order, and values: value(row, col)
// is asked for rows in order within a column; rewind() begins again.

// A row-major matrix; w may be null, which stands for zeros.
class DenseSource {
 public:
  DenseSource(const float* w, const uint8_t* keep, const Shape& s) : w_(w), keep_(keep), s_(s) {}
  bool has_values() const { return w_; }
  void kept(int64_t gate, int64_t across, std::vector<int32_t>* out) const {
    const int64_t col0 = across * s_.block_cols, col1 = std::min(col0 + s_.block_cols, s_.gate_cols());
    for (int64_t d = 0; d < s_.down(); d++) {
      const int64_t row0 = d * s_.block_rows, row1 = std::min(row0 + s_.block_rows, s_.rows);
      bool wanted = keep_ && keep_[(gate * s_.down() + d) * s_.across() + across];
      for (int64_t r = row0; !keep_ && !wanted && r < row1; r++)
        for (int64_t c = col0; c < col1; c++) wanted |= !(w_[r * s_.cols + gate * s_.gate_cols() + c] == 0);
      if (wanted) out->push_back((int32_t)d);
    }
  }
  void rewind() {}
  float value(uint32_t row, uint32_t col) { return w_[(uint64_t)row * s_.cols + col]; }
  const float* scales() const { return nullptr; }

 private:
  const float* w_;
  const uint8_t* keep_;
  const Shape& s_;
};

// The elements of each column.
class ColumnsSource {
 public:
  ColumnsSource(const kbs_columns& c, const Shape& s) : c_(c), s_(s), at_(c.starts, c.starts + c.cols) {}
  bool has_values() const { return true; }
  void kept(int64_t gate, int64_t across, std::vector<int32_t>* out) const {
    const int64_t col0 = across * s_.block_cols, col1 = std::min(col0 + s_.block_cols, s_.gate_cols());
    for (int64_t c = gate * s_.gate_cols() + col0; c < gate * s_.gate_cols() + col1; c++) {
      int32_t last = -1;
      for (int64_t i = c_.starts[c]; i < c_.starts[c + 1]; i++) {
        const int32_t d = (int32_t)(c_.row[i] / s_.block_rows);
        if (d != last) out->push_back(d);
        last = d;
      }
    }
    std::sort(out->begin(), out->end());
    out->erase(std::unique(out->begin(), out->end()), out->end());
  }
  void rewind() { at_.assign(c_.starts, c_.starts + c_.cols); }
  float value(uint32_t row, uint32_t col) {
    int64_t& i = at_[col];
    const int64_t end = c_.starts[col + 1];
    while (i < end && (uint32_t)c_.row[i] < row) i++;
    if (i == end || (uint32_t)c_.row[i] != row) return 0;
    return c_.values ? c_.values[i] : (float)c_.quantized[i];
  }
  // Of quantized values, which are packed as they are.
  const float* scales() const { return c_.scales; }

 private:
  const kbs_columns& c_;
  const Shape& s_;
  std::vector<int64_t> at_;  // the next element of each column
};

template <class Source>
kbs_status make_plan(const Source& source, const Shape& s, Plan* plan) {
  const int64_t across = s.across(), gate_cols = s.gate_cols();
  const uint32_t unit_rows = s.unit_rows();
  Header& h = plan->header;
  h.magic = kMagic, h.version = kFormatVersion, h.dtype = (uint32_t)s.dtype, h.unit_rows = unit_rows;
  h.rows = (uint32_t)s.rows, h.cols = (uint32_t)s.cols, h.gates = (uint32_t)s.gates;
  h.block_rows = (uint32_t)s.block_rows, h.block_cols = (uint32_t)s.block_cols;
  h.padding_row = (uint32_t)padding_row(s), h.padded_rows = (uint32_t)padded_rows(s);

  plan->kept.resize((size_t)(s.gates * across));
  for (int64_t gate = 0; gate < s.gates; gate++) {
    for (int64_t a = 0; a < across; a++) {
      auto& kept = plan->kept[(size_t)(gate * across + a)];
      const int64_t col0 = a * s.block_cols, col1 = std::min(col0 + s.block_cols, gate_cols);
      source.kept(gate, a, &kept);
      h.blocks += kept.size();
      for (int32_t d : kept)
        h.elements += (uint64_t)((std::min((d + 1) * s.block_rows, s.rows) - d * s.block_rows) * (col1 - col0));
      for (int64_t col = col0; col < col1;) {
        Strip strip{};
        strip.col = (uint32_t)(gate * gate_cols + col);
        strip.width = widest((uint32_t)(col1 - col));
        strip.run = run_length(s.block_rows, unit_rows, strip.width);
        const uint32_t q = kTile / strip.width;
        const uint64_t units = round_up((uint64_t)s.block_rows, unit_rows) / unit_rows;
        uint64_t runs = kept.size() * (strip.run == 1 ? units : 1);
        if (strip.run < q) runs = round_up(runs, q);
        uint64_t tiles = runs * strip.run / q;
        if (s.dtype == KBS_BFLOAT16) {  // tiles go in pairs
          if (tiles % 2) runs += strip.run < q ? q : 1;
          tiles = (runs * strip.run / q) / 2;
        }
        if (runs > UINT32_MAX) return fail(KBS_INVALID_ARGUMENT, "the matrix is too large to pack");
        strip.runs = (uint32_t)runs;
        strip.first_run = h.runs, strip.first_tile = h.tiles;
        h.runs += runs, h.tiles += tiles;
        plan->strips.push_back(strip);
        col += strip.width;
      }
    }
  }
  h.strips = plan->strips.size();
  const bool scaled = s.dtype == KBS_INT8;
  h.strips_offset = round_up(sizeof(Header), 64);
  h.index_offset = round_up(h.strips_offset + h.strips * sizeof(Strip), 64);
  h.scales_offset = round_up(h.index_offset + h.runs * sizeof(int32_t), 64);
  h.sums_offset = round_up(h.scales_offset + (scaled ? h.cols * sizeof(float) : 0), 64);
  h.values_offset = round_up(h.sums_offset + (scaled ? h.cols * sizeof(int32_t) : 0), 64);
  h.bytes = h.values_offset + h.tiles * kTileBytes;
  return KBS_OK;
}

uint64_t mix(uint64_t hash, const void* data, size_t bytes) {
  const char* p = (const char*)data;
  for (; bytes; ) {
    uint64_t word = 0;
    const size_t n = std::min<size_t>(bytes, 8);
    std::memcpy(&word, p, n);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
    p += n, bytes -= n;
  }
  return hash;
}

uint64_t checksum(const Header& header, const void* strips, const void* index) {
  Header h = header;
  h.checksum = 0;
  uint64_t hash = mix(0x6b6273u, &h, sizeof(h));
  hash = mix(hash, strips, h.strips * sizeof(Strip));
  return mix(hash, index, h.runs * sizeof(int32_t));
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);  // rounding could turn a NaN into infinity
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Calls f(row, col, byte offset in the values) for every element of every kept block.
template <class F>
void for_each_element(const View& view, F f) {
  const Header& h = *view.header;
  const size_t size = h.dtype == KBS_FLOAT32 ? 4 : h.dtype == KBS_BFLOAT16 ? 2 : 1;
  for (uint64_t i = 0; i < h.strips; i++) {
    const Strip& strip = view.strips[i];
    for (uint64_t unit = 0; unit < (uint64_t)strip.runs * strip.run; unit++) {
      const uint32_t first = (uint32_t)view.index[strip.first_run + unit / strip.run];
      if (first >= h.padding_row || first >= h.rows) continue;
      const uint32_t block_end = std::min((first / h.block_rows + 1) * h.block_rows, h.rows);
      const uint32_t row0 = first + (uint32_t)(unit % strip.run) * h.unit_rows;
      for (uint32_t row = row0; row < std::min(row0 + h.unit_rows, block_end); row++) {
        for (uint32_t c = 0; c < strip.width; c++) {
          const uint64_t in_strip = unit * strip.width + c;
          uint64_t offset = strip.first_tile * kTileBytes;
          if (h.dtype == KBS_BFLOAT16) {
            const uint64_t tile = in_strip / kTile;
            offset += tile / 2 * kTileBytes + in_strip % kTile * 4 + tile % 2 * 2;
          } else {
            offset += in_strip * 4 + (row - row0) * size;
          }
          f(row, strip.col + c, offset);
        }
      }
    }
  }
}

template <class Source>
kbs_status pack(Source& source, const Shape& s, Plan& plan, char* out) {
  Header& h = plan.header;
  std::memset(out, 0, h.bytes);

  std::vector<int32_t> index;
  index.reserve(h.runs);
  const uint32_t units = (uint32_t)(round_up(h.block_rows, h.unit_rows) / h.unit_rows);
  const int64_t across = s.across(), gate_cols = s.gate_cols();
  for (const Strip& strip : plan.strips) {
    const int64_t gate = strip.col / gate_cols, a = strip.col % gate_cols / s.block_cols;
    for (int32_t d : plan.kept[(size_t)(gate * across + a)])
      for (uint32_t unit = 0; unit < units; unit += strip.run)
        index.push_back(d * (int32_t)h.block_rows + (int32_t)(unit * h.unit_rows));
    index.resize(strip.first_run + strip.runs, (int32_t)h.padding_row);
  }

  std::memcpy(out + h.strips_offset, plan.strips.data(), h.strips * sizeof(Strip));
  if (h.runs) std::memcpy(out + h.index_offset, index.data(), h.runs * sizeof(int32_t));
  h.checksum = checksum(h, plan.strips.data(), index.data());
  std::memcpy(out, &h, sizeof(h));
  if (!source.has_values()) return KBS_OK;
  char* values = out + h.values_offset;
  const View view{&h, plan.strips.data(), index.data(), nullptr, nullptr, values};
  if (h.dtype == KBS_FLOAT32) {
    for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t at) {
      const float value = source.value(r, c);
      std::memcpy(values + at, &value, 4);
    });
  } else if (h.dtype == KBS_BFLOAT16) {
    for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t at) {
      const uint16_t value = to_bfloat16(source.value(r, c));
      std::memcpy(values + at, &value, 2);
    });
  } else {
    std::vector<float> scales(h.cols, 0.f);
    std::vector<int32_t> sums(h.cols, 0);
    bool finite = true;
    const bool quantized = source.scales();
    if (quantized) {
      scales.assign(source.scales(), source.scales() + h.cols);
    } else {
      for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t) {
        const float magnitude = std::fabs(source.value(r, c));
        finite &= magnitude <= 3.4028234e38f;  // false for NaN too
        scales[c] = std::max(scales[c], magnitude);
      });
      if (!finite) return fail(KBS_INVALID_ARGUMENT, "int8 needs finite weights; the matrix holds NaN or infinity");
      for (float& scale : scales) scale /= 127.f;
      source.rewind();
    }
    for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t at) {
      // The quotient may exceed 127 where the scale is subnormal and coarse. And nothing is -128: kernels rely on it.
      const float w = source.value(r, c);
      const float q = quantized ? w : scales[c] > 0 ? std::nearbyint(w / scales[c]) : 0.f;
      const int8_t value = (int8_t)std::max(-127.f, std::min(127.f, q));
      values[at] = value;
      sums[c] += value;
    });
    std::memcpy(out + h.scales_offset, scales.data(), h.cols * sizeof(float));
    std::memcpy(out + h.sums_offset, sums.data(), h.cols * sizeof(int32_t));
  }
  return KBS_OK;
}

kbs_status check_columns(const kbs_columns& c, int32_t dtype) {
  if (!c.starts || (!c.values && !c.quantized)) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
  if (c.values && c.quantized) return fail(KBS_INVALID_ARGUMENT, "columns have values or quantized values, not both");
  if (c.quantized && (dtype != KBS_INT8 || !c.scales))
    return fail(KBS_INVALID_ARGUMENT, "quantized values need scales, and are packed as int8");
  if (c.values && c.scales) return fail(KBS_INVALID_ARGUMENT, "only quantized values have scales");
  // All sizes but the block's, which is not chosen yet.
  if (kbs_status status = check_shape({c.rows, c.cols, c.gates, 1, 1, dtype})) return status;
  if (c.starts[0] != 0) return fail(KBS_INVALID_ARGUMENT, "columns begin at element %lld, not 0", (long long)c.starts[0]);
  for (int64_t col = 0; col < c.cols; col++) {
    const int64_t begin = c.starts[col], end = c.starts[col + 1];
    if (end < begin || end - begin > c.rows)
      return fail(KBS_INVALID_ARGUMENT, "column %lld has elements %lld to %lld, of %lld rows", (long long)col,
                  (long long)begin, (long long)end, (long long)c.rows);
    if (end > begin && !c.row) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    int64_t last = -1;
    for (int64_t i = begin; i < end; i++) {
      if (c.row[i] <= last || c.row[i] >= c.rows)
        return fail(KBS_INVALID_ARGUMENT, "column %lld has row %d after row %lld, of %lld rows", (long long)col, c.row[i],
                    (long long)last, (long long)c.rows);
      last = c.row[i];
    }
    if (c.scales && !(c.scales[col] >= 0 && c.scales[col] <= 3.4028234e38f))
      return fail(KBS_INVALID_ARGUMENT, "column %lld has a scale of %g", (long long)col, c.scales[col]);
  }
  return KBS_OK;
}

// What a product takes for a stored element, by the width of its strips (1, 2, 4, 8, 16), and for an index, in the time
// of an element in a strip of 16. Fitted to kbs_matmul at batch 1 on AVX-512 (VNNI); with 32 rows narrow strips cost more.
struct Cost {
  double element[5], index;
};
constexpr Cost kCostFloat{{2.1, 1.4, 1.15, 1.15, 1}, 2.6}, kCostInt8{{5, 2.4, 1.45, 1.22, 1}, 8};

// Chooses the block with which a product of the elements is quickest, of the widths and heights that kernels know.
void choose_block(const kbs_columns& c, int32_t dtype, int64_t* block_rows, int64_t* block_cols) {
  const int64_t gate_cols = c.cols / c.gates;
  const Cost& costs = dtype == KBS_INT8 ? kCostInt8 : kCostFloat;
  // Rows that hold an element, for each block column of the width under consideration; at first columns themselves.
  std::vector<std::vector<int32_t>> rows((size_t)c.cols), merged;
  for (int64_t col = 0; col < c.cols; col++) rows[col].assign(c.row + c.starts[col], c.row + c.starts[col + 1]);
  double best = -1;
  int64_t count = gate_cols;  // block columns in a gate
  for (int64_t width = 1;; width *= 2) {
    for (int64_t height = 1; height <= 32 && (height == 1 || height <= c.rows); height *= 2) {
      const Shape s{c.rows, c.cols, c.gates, height, width, dtype};
      const uint64_t units = round_up((uint64_t)height, s.unit_rows()) / s.unit_rows();
      double cost = 0;
      for (size_t i = 0; i < rows.size(); i++) {
        const int64_t actual = std::min(width, gate_cols - (int64_t)(i % count) * width);
        uint64_t blocks = 0;
        int32_t last = -1;
        for (int32_t r : rows[i]) blocks += r / height != last, last = (int32_t)(r / height);
        const uint32_t strip = widest((uint32_t)actual);
        const double elements = (double)(units * s.unit_rows() * (uint64_t)actual);
        const double indices = (double)(run_length(height, s.unit_rows(), strip) == 1 ? units : 1);
        cost += (double)blocks * (costs.element[__builtin_ctz(strip)] * elements + costs.index * indices);
      }
      // The larger block if it costs no more: fewer indices.
      if (best < 0 || cost <= best) best = cost, *block_rows = height, *block_cols = std::min(width, gate_cols);
    }
    if (width == 16 || width >= gate_cols) return;
    const int64_t next = (count + 1) / 2;
    merged.assign((size_t)(next * c.gates), {});
    for (int64_t gate = 0; gate < c.gates; gate++) {
      for (int64_t i = 0; i < count; i++) {
        auto& into = merged[(size_t)(gate * next + i / 2)];
        auto& from = rows[(size_t)(gate * count + i)];
        if (i % 2 == 0) {
          into.swap(from);
        } else {
          std::vector<int32_t> both;
          both.reserve(std::max(into.size(), from.size()));
          std::set_union(into.begin(), into.end(), from.begin(), from.end(), std::back_inserter(both));
          into.swap(both);
        }
      }
    }
    rows.swap(merged);
    count = next;
  }
}

kbs_status corrupt(const char* what) { return fail(KBS_CORRUPT, "not a usable packed matrix: %s", what); }

}  // namespace

size_t values_bytes(const Header& header) { return header.bytes - header.scales_offset; }

kbs_status pack_columns(const kbs_columns& columns, int64_t block_rows, int64_t block_cols, int32_t dtype,
                        char* (*allocate)(size_t, void*), void* argument, size_t* bytes) {
  if (kbs_status status = check_columns(columns, dtype)) return status;
  if (block_rows == 0 && block_cols == 0) choose_block(columns, dtype, &block_rows, &block_cols);
  const Shape shape{columns.rows, columns.cols, columns.gates, block_rows, block_cols, dtype};
  if (kbs_status status = check_shape(shape)) return status;
  ColumnsSource source(columns, shape);
  Plan plan;
  if (kbs_status status = make_plan(source, shape, &plan)) return status;
  *bytes = plan.header.bytes;
  char* out = allocate(*bytes, argument);
  if (!out) return fail(KBS_OUT_OF_MEMORY, "no memory for a matrix of %llu bytes", (unsigned long long)*bytes);
  return pack(source, shape, plan, out);
}

kbs_info describe(const Header& h) {
  return {(int32_t)h.dtype,    h.rows, h.cols, h.gates, h.block_rows, h.block_cols, (int64_t)h.blocks,
          (int64_t)h.elements, (int64_t)h.bytes, (int64_t)h.scales_offset, (int64_t)values_bytes(h)};
}

View with_values(const View& view, const void* values) {
  View out = view;
  if (!values) return out;
  const Header& h = *view.header;
  const char* base = (const char*)values;
  out.scales = (const float*)base;
  out.sums = (const int32_t*)(base + (h.sums_offset - h.scales_offset));
  out.values = base + (h.values_offset - h.scales_offset);
  return out;
}

kbs_status open_packed(const void* packed, int64_t bytes, bool structure, View* view) {
  if (!packed || bytes < 0) return fail(KBS_INVALID_ARGUMENT, "no packed buffer was given");
  if ((uint64_t)bytes < sizeof(Header)) return corrupt("it is shorter than a header");
  if ((uintptr_t)packed % 8) return fail(KBS_INVALID_ARGUMENT, "a packed buffer must be aligned to 8 bytes");
  const char* base = (const char*)packed;
  const Header& h = *(const Header*)packed;
  if (h.magic != kMagic) return corrupt("it does not begin with the format's mark");
  if (h.version != kFormatVersion) return fail(KBS_CORRUPT, "packed format version %u is not %u", h.version, kFormatVersion);
  const Shape s{h.rows, h.cols, h.gates, h.block_rows, h.block_cols, (int32_t)h.dtype};
  if (h.dtype > KBS_INT8 || check_shape(s) != KBS_OK) return corrupt("its shape makes no sense");
  if (h.unit_rows != s.unit_rows()) return corrupt("its units do not fit its dtype");
  if (h.padding_row != padding_row(s) || h.padded_rows != padded_rows(s)) return corrupt("its padding is wrong");

  // Parts follow each other; with every count and offset checked against the size, nothing below can overflow.
  struct Part { uint64_t offset, count, size; };
  const uint64_t scaled = h.dtype == KBS_INT8 ? h.cols : 0;
  const Part parts[] = {{h.strips_offset, h.strips, sizeof(Strip)}, {h.index_offset, h.runs, 4},
                        {h.scales_offset, scaled, 4},               {h.sums_offset, scaled, 4},
                        {h.values_offset, h.tiles, kTileBytes}};
  if (h.bytes > (uint64_t)INT64_MAX) return corrupt("its size is wrong");
  uint64_t end = sizeof(Header);
  for (const Part& part : parts) {
    uint64_t length;
    if (part.offset != round_up(end, 64)) return corrupt("an offset is out of range");
    if (!multiply(part.count, part.size, &length) || !add(part.offset, length, &end) || end > h.bytes)
      return corrupt("its size is wrong");
  }
  if (h.bytes != end) return corrupt("its size is wrong");
  if ((uint64_t)bytes < (structure ? h.scales_offset : h.bytes)) return corrupt("it is truncated");

  const Strip* strips = (const Strip*)(base + h.strips_offset);
  const int32_t* index = (const int32_t*)(base + h.index_offset);
  if (h.checksum != checksum(h, strips, index)) return corrupt("the checksum does not match");

  // A checksum keeps accidents out; that every index is in range is checked all the same.
  uint64_t run = 0, tile = 0, col = 0;
  for (uint64_t i = 0; i < h.strips; i++) {
    const Strip& strip = strips[i];
    if (col >= h.cols) return corrupt("it has too many strips");
    const uint64_t in_gate = col % (h.cols / h.gates), in_block = in_gate % h.block_cols;
    const uint64_t left = std::min(h.block_cols - in_block, h.cols / h.gates - in_gate);
    if (strip.col != col || strip.width != widest((uint32_t)left)) return corrupt("a strip is out of place");
    col += strip.width;
    const uint32_t q = kTile / strip.width;
    if (strip.run != run_length(h.block_rows, h.unit_rows, strip.width)) return corrupt("a run has a wrong length");
    if (strip.first_run != run || strip.first_tile != tile) return corrupt("strips do not follow each other");
    if (strip.run < q && strip.runs % q) return corrupt("a strip does not end with a tile");
    uint64_t tiles = (uint64_t)strip.runs * strip.run / q;
    if (h.dtype == KBS_BFLOAT16) {
      if (tiles % 2) return corrupt("a strip does not end with a tile");
      tiles /= 2;
    }
    // Every row once, and the last tiles filled up: kernels size their scratch by this.
    if ((uint64_t)strip.runs * strip.run * h.unit_rows > 2 * (uint64_t)h.padded_rows) return corrupt("a strip is too long");
    run += strip.runs, tile += tiles;
    if (run > h.runs || tile > h.tiles) return corrupt("a strip is longer than the buffer");
    const int64_t last = (int64_t)h.padded_rows - (int64_t)strip.run * h.unit_rows;
    for (uint64_t r = strip.first_run; r < run; r++)
      if (index[r] < 0 || index[r] > last) return corrupt("an index is out of range");
  }
  if (run != h.runs || tile != h.tiles || col != h.cols) return corrupt("its counts do not add up");
  *view = with_values({&h, strips, index, nullptr, nullptr, nullptr}, structure ? nullptr : base + h.scales_offset);
  return KBS_OK;
}

}  // namespace kbs

using kbs::fail;
using kbs::guarded;

namespace {

// For what is told of a whole packed buffer: checks it, then calls body(view).
template <class Body>
kbs_status tell(const void* packed, int64_t bytes, const void* out, const Body& body) {
  return guarded([&]() -> kbs_status {
    if (!out) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    kbs::View view;
    if (kbs_status status = kbs::open_packed(packed, bytes, false, &view)) return status;
    return body(view);
  });
}

}  // namespace

kbs_status kbs_packed_bytes(const float* w, int64_t rows, int64_t cols, int64_t gates, int64_t block_rows,
                            int64_t block_cols, int32_t dtype, const uint8_t* keep, int64_t* bytes) {
  return guarded([&]() -> kbs_status {
    if ((!w && !keep) || !bytes) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    const kbs::Shape shape{rows, cols, gates, block_rows, block_cols, dtype};
    if (kbs_status status = check_shape(shape)) return status;
    kbs::Plan plan;
    if (kbs_status status = make_plan(kbs::DenseSource(w, keep, shape), shape, &plan)) return status;
    *bytes = (int64_t)plan.header.bytes;
    return KBS_OK;
  });
}

kbs_status kbs_pack(const float* w, int64_t rows, int64_t cols, int64_t gates, int64_t block_rows, int64_t block_cols,
                    int32_t dtype, const uint8_t* keep, void* out, int64_t out_bytes) {
  return guarded([&]() -> kbs_status {
    if ((!w && !keep) || !out) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    const kbs::Shape shape{rows, cols, gates, block_rows, block_cols, dtype};
    if (kbs_status status = check_shape(shape)) return status;
    kbs::DenseSource source(w, keep, shape);
    kbs::Plan plan;
    if (kbs_status status = make_plan(source, shape, &plan)) return status;
    if (out_bytes < 0 || (uint64_t)out_bytes < plan.header.bytes)
      return fail(KBS_INVALID_ARGUMENT, "the packed matrix needs %llu bytes, the buffer has %lld",
                  (unsigned long long)plan.header.bytes, (long long)out_bytes);
    return kbs::pack(source, shape, plan, (char*)out);
  });
}

kbs_status kbs_validate(const void* packed, int64_t bytes) {
  return guarded([&] {
    kbs::View view;
    return kbs::open_packed(packed, bytes, false, &view);
  });
}

kbs_status kbs_inspect(const void* packed, int64_t bytes, kbs_info* info) {
  return tell(packed, bytes, info, [&](const kbs::View& view) -> kbs_status {
    *info = kbs::describe(*view.header);
    return KBS_OK;
  });
}

kbs_status kbs_unpack(const void* packed, int64_t bytes, float* w) {
  return tell(packed, bytes, w, [&](const kbs::View& view) -> kbs_status {
    const kbs::Header& h = *view.header;
    const char* values = (const char*)view.values;
    std::fill(w, w + (uint64_t)h.rows * h.cols, 0.f);
    kbs::for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t at) {
      float value;
      if (h.dtype == KBS_FLOAT32) {
        std::memcpy(&value, values + at, 4);
      } else if (h.dtype == KBS_BFLOAT16) {
        uint16_t bits;
        std::memcpy(&bits, values + at, 2);
        value = kbs::from_bfloat16(bits);
      } else {
        value = (float)(int8_t)values[at] * view.scales[c];
      }
      w[(uint64_t)r * h.cols + c] = value;
    });
    return KBS_OK;
  });
}

kbs_status kbs_kept_blocks(const void* packed, int64_t bytes, uint8_t* keep) {
  return tell(packed, bytes, keep, [&](const kbs::View& view) -> kbs_status {
    const kbs::Header& h = *view.header;
    const uint64_t down = (h.rows + h.block_rows - 1) / h.block_rows, gate_cols = h.cols / h.gates;
    const uint64_t across = (gate_cols + h.block_cols - 1) / h.block_cols;
    std::fill(keep, keep + h.gates * down * across, uint8_t{0});
    kbs::for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t) {
      keep[(c / gate_cols * down + r / h.block_rows) * across + c % gate_cols / h.block_cols] = 1;
    });
    return KBS_OK;
  });
}

kbs_status kbs_positions(const void* packed, int64_t bytes, int64_t* positions) {
  return guarded([&]() -> kbs_status {
    kbs::View view;
    if (kbs_status status = kbs::open_packed(packed, bytes, false, &view)) return status;
    const kbs::Header& h = *view.header;
    if (!positions && h.tiles > 0) return fail(KBS_INVALID_ARGUMENT, "a null pointer was given");
    if (h.dtype != KBS_FLOAT32) return fail(KBS_UNSUPPORTED, "positions are those of float32 values");
    std::fill(positions, positions + h.tiles * kbs::kTile, int64_t{-1});
    kbs::for_each_element(view, [&](uint32_t r, uint32_t c, uint64_t at) { positions[at / 4] = (int64_t)r * h.cols + c; });
    return KBS_OK;
  });
}
