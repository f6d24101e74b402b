// TFLite keeps a sparse tensor as a tree over its dimensions: level by level, either all indices (dense) or those that
// segments and indices name (CSR). The first two levels are the tensor's own dimensions, cut into blocks where the block
// map says so, the others the insides of blocks. See schema.fbs, SparsityParameters.
#include "weights.h"

#include <cmath>
#include <cstring>

namespace kbs {
namespace tflite {
namespace {

// Outputs take memory whether they have elements or not; no layer comes near this.
constexpr int64_t kMaxSide = int64_t{1} << 22;
constexpr int64_t kMaxInt8Inputs = int64_t{1} << 17;  // below what libkbs can add up

size_t size_of(TfLiteType type) { return type == kTfLiteFloat32 ? 4 : type == kTfLiteFloat16 ? 2 : 1; }

// One level of the tree. stride: what an index adds to the coordinate of dimension `dim`.
struct Level {
  int dim;
  int64_t stride;
  const TfLiteDimensionMetadata* meta;
};

struct Tree {
  int levels = 0;
  Level level[4];
};

// The levels from the outermost, with every array checked against the others, so that a walk needs no more checks. Returns
// what is wrong, "" if nothing is.
std::string read_tree(const TfLiteSparsity& s, const int64_t (&dims)[2], int64_t stored, Tree* out) {
  if (!s.traversal_order || !s.dim_metadata || s.dim_metadata_size < 2) return "its sparsity is incomplete";
  const int blocks = s.block_map ? s.block_map->size : 0;
  const int levels = s.dim_metadata_size;
  if (blocks < 0 || blocks > 2 || levels != 2 + blocks || s.traversal_order->size != levels)
    return "its sparsity has " + std::to_string(levels) + " levels, of 2 dimensions and " + std::to_string(blocks) +
           " of blocks";
  int64_t block[2] = {1, 1};
  for (int i = 0; i < blocks; i++) {
    const int dim = s.block_map->data[i];
    if (dim < 0 || dim > 1 || (i == 1 && dim == s.block_map->data[0])) return "its block map names no dimension of it";
  }
  bool seen[4] = {};
  for (int i = 0; i < levels; i++) {
    const int which = s.traversal_order->data[i];
    const bool inside = i >= 2;
    if (which < 0 || which >= levels || seen[which] || (which >= 2) != inside) return "its traversal order makes no sense";
    seen[which] = true;
    const TfLiteDimensionMetadata& meta = s.dim_metadata[i];
    if (inside) {
      const int dim = s.block_map->data[which - 2];
      if (meta.format != kTfLiteDimDense || meta.dense_size < 1 || dims[dim] % meta.dense_size)
        return "its blocks do not divide it";
      block[dim] = meta.dense_size;
      out->level[i] = {dim, 1, &meta};
    } else {
      out->level[i] = {which, 0, &meta};
    }
  }
  out->levels = levels;

  int64_t positions = 1;
  for (int i = 0; i < levels; i++) {
    Level& level = out->level[i];
    const TfLiteDimensionMetadata& meta = *level.meta;
    const int64_t size = i < 2 ? dims[level.dim] / block[level.dim] : block[level.dim];
    if (i < 2) level.stride = block[level.dim];
    if (meta.format == kTfLiteDimDense) {
      if (meta.dense_size != size) return "a dimension of its sparsity has another size";
      if (__builtin_mul_overflow(positions, size, &positions)) return "its sparsity is too large";
    } else if (meta.format == kTfLiteDimSparseCSR) {
      const TfLiteIntArray *segments = meta.array_segments, *indices = meta.array_indices;
      if (!segments || !indices || segments->size < 1 || indices->size < 0 || segments->size - 1 != positions)
        return "its segments do not fit its dimensions";
      if (segments->data[0] != 0 || segments->data[positions] != indices->size) return "its segments do not fit its indices";
      for (int64_t p = 0; p < positions; p++) {
        const int begin = segments->data[p], end = segments->data[p + 1];
        if (begin > end || end > indices->size) return "its segments do not rise";
        int last = -1;
        for (int j = begin; j < end; j++) {
          if (indices->data[j] <= last || indices->data[j] >= size) return "its indices do not rise, or leave it";
          last = indices->data[j];
        }
      }
      positions = indices->size;
    } else {
      return "a dimension of its sparsity has an unknown format";
    }
    // Every position has something below it in the levels that follow, which are checked against what is stored.
    if (positions > stored && i >= 1) return "its sparsity tells of more elements than it has";
  }
  if (positions != stored)
    return "its sparsity tells of " + std::to_string(positions) + " elements, and it has " + std::to_string(stored);
  return "";
}

// Calls f(output, input, element) for every stored element.
template <class F>
void walk(const Tree& tree, int depth, int64_t position, const int64_t (&at)[2], const F& f) {
  if (depth == tree.levels) {
    f(at[0], at[1], position);
    return;
  }
  const Level& level = tree.level[depth];
  const auto go = [&](int64_t index, int64_t below) {
    int64_t next[2] = {at[0], at[1]};
    next[level.dim] += index * level.stride;
    walk(tree, depth + 1, below, next, f);
  };
  if (level.meta->format == kTfLiteDimDense) {
    const int64_t size = level.meta->dense_size;
    for (int64_t i = 0; i < size; i++) go(i, position * size + i);
  } else {
    const TfLiteIntArray *segments = level.meta->array_segments, *indices = level.meta->array_indices;
    for (int i = segments->data[position]; i < segments->data[position + 1]; i++) go(indices->data[i], i);
  }
}

template <class F>
void each_element(const Constant& c, const F& f) {
  if (c.sparsity) {
    Tree tree;
    const int64_t dims[2] = {c.outputs, c.inputs}, origin[2] = {0, 0};
    if (read_tree(*c.sparsity, dims, c.stored, &tree).empty()) walk(tree, 0, 0, origin, f);
  } else {
    for (int64_t o = 0; o < c.outputs; o++)
      for (int64_t i = 0; i < c.inputs; i++) f(o, i, o * c.inputs + i);
  }
}

float from_float16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {
    value = (float)mantissa * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    std::memcpy(&value, &bits, 4);
  }
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The element as float32; of int8, as the number that is stored.
float element(const Constant& c, int64_t i) {
  if (c.type == kTfLiteInt8) return (float)((const int8_t*)c.data)[i];
  if (c.type == kTfLiteFloat16) {
    uint16_t half;
    std::memcpy(&half, (const char*)c.data + 2 * i, 2);
    return from_float16(half);
  }
  float value;
  std::memcpy(&value, (const char*)c.data + 4 * i, 4);
  return value;
}

std::string read_scales(const TfLiteTensor& tensor, Constant* out) {
  const auto is_scale = [](float scale) { return scale >= 0 && std::isfinite(scale); };
  const TfLiteQuantization& quantization = tensor.quantization;
  if (quantization.type != kTfLiteNoQuantization && quantization.type != kTfLiteAffineQuantization)
    return "it is quantized in an unknown way";
  const auto* affine = (const TfLiteAffineQuantization*)quantization.params;
  if (quantization.type == kTfLiteAffineQuantization && affine && affine->scale && affine->scale->size > 0) {
    const int n = affine->scale->size;
    if (n != 1 && (n != out->outputs || affine->quantized_dimension != 0)) return "its scales do not fit its outputs";
    for (int i = 0; affine->zero_point && i < affine->zero_point->size; i++)
      if (affine->zero_point->data[i] != 0) return "its zero point is not 0";
    for (int i = 0; i < n; i++)
      if (!is_scale(affine->scale->data[i])) return "its scale is no positive number";
    out->scales.assign(affine->scale->data, affine->scale->data + n);
  } else {
    const float scale = tensor.params.scale;
    if (!is_scale(scale) || scale == 0) return "it is int8 and has no scale";
    out->scales.assign(1, scale);
    if (tensor.params.zero_point != 0) return "its zero point is not 0";
  }
  // Our kernels rely on symmetric values, as TFLite's own do; its converter writes nothing else.
  if (out->stored > 0 && std::memchr(out->data, -128, (size_t)out->stored)) return "it is int8 and holds -128";
  return "";
}

}  // namespace

std::string read_constant(const TfLiteTensor& tensor, Constant* out) {
  *out = Constant();
  if (tensor.allocation_type != kTfLiteMmapRo) return "it is no constant";
  if (tensor.type != kTfLiteFloat32 && tensor.type != kTfLiteFloat16 && tensor.type != kTfLiteInt8)
    return "it is of type " + std::to_string(tensor.type) + ", not float32, float16 or int8";
  if (!tensor.dims || tensor.dims->size != 2) return "it is no matrix";
  out->type = tensor.type;
  out->outputs = tensor.dims->data[0], out->inputs = tensor.dims->data[1];
  if (out->outputs < 1 || out->inputs < 1 || out->outputs > kMaxSide || out->inputs > kMaxSide)
    return "it is a matrix of " + std::to_string(out->outputs) + " x " + std::to_string(out->inputs);
  if (out->type == kTfLiteInt8 && out->inputs > kMaxInt8Inputs)
    return "it is int8 and has " + std::to_string(out->inputs) + " inputs";
  out->data = tensor.data.raw;
  out->sparsity = tensor.sparsity;
  const size_t size = size_of(tensor.type);
  if (tensor.bytes % size || tensor.bytes > (size_t)INT64_MAX) return "it has " + std::to_string(tensor.bytes) + " bytes";
  if (tensor.bytes > 0 && !tensor.data.raw) return "it has no data";
  out->stored = (int64_t)(tensor.bytes / size);
  if (tensor.sparsity) {
    Tree tree;
    const int64_t dims[2] = {out->outputs, out->inputs};
    std::string reason = read_tree(*tensor.sparsity, dims, out->stored, &tree);
    if (!reason.empty()) return reason;
  } else if (out->stored != out->outputs * out->inputs) {
    return "it has " + std::to_string(out->stored) + " elements, not " + std::to_string(out->outputs * out->inputs);
  }
  return tensor.type == kTfLiteInt8 ? read_scales(tensor, out) : "";
}

Columns::Columns(const std::vector<Constant>& constants, bool bfloat16)
    : rows_(constants.front().inputs),
      dtype_(bfloat16 ? KBS_BFLOAT16 : constants.front().type == kTfLiteInt8 ? KBS_INT8 : KBS_FLOAT32) {
  int64_t columns = 0;
  for (const Constant& c : constants) columns += c.outputs;
  // How many elements each column has, then where it begins, then where its next element goes. A zero in a kept block
  // is left out: if it costs nothing it comes back when libkbs chooses blocks.
  std::vector<int64_t> next((size_t)columns + 1, 0);
  int64_t first = 0;
  for (const Constant& c : constants) {
    each_element(c, [&](int64_t output, int64_t, int64_t i) { next[(size_t)(first + output)] += element(c, i) != 0; });
    first += c.outputs;
  }
  int64_t total = 0;
  for (int64_t& n : next) {
    const int64_t elements = n;
    n = total;
    total += elements;
  }
  starts_ = next;
  row_.resize((size_t)total);
  if (dtype_ == KBS_INT8) quantized_.resize((size_t)total); else values_.resize((size_t)total);
  first = 0;
  for (const Constant& c : constants) {
    each_element(c, [&](int64_t output, int64_t input, int64_t i) {
      const float value = element(c, i);
      if (value == 0) return;
      // Whatever the order of the levels, the inputs of one output come rising.
      const size_t at = (size_t)next[(size_t)(first + output)]++;
      row_[at] = (int32_t)input;
      if (dtype_ == KBS_INT8) {
        quantized_[at] = (int8_t)value;
      } else {
        values_[at] = c.type == kTfLiteInt8 ? value * c.scale_of(output) : value;
      }
    });
    if (dtype_ == KBS_INT8)
      for (int64_t o = 0; o < c.outputs; o++) scales_.push_back(c.scale_of(o));
    first += c.outputs;
  }
}

kbs_status Columns::make_matrix(int64_t gates, kbs_matrix** out) const {
  // An empty vector has no address, and a matrix of zeros no elements.
  static const float no_values = 0;
  static const int8_t no_quantized = 0;
  kbs_columns columns{rows_, (int64_t)starts_.size() - 1, gates, starts_.data(), row_.data(), nullptr, nullptr, nullptr};
  if (dtype_ == KBS_INT8) {
    columns.quantized = quantized_.empty() ? &no_quantized : quantized_.data();
    columns.scales = scales_.data();
  } else {
    columns.values = values_.empty() ? &no_values : values_.data();
  }
  return kbs_matrix_from_columns(&columns, 0, 0, dtype_, out);
}

}  // namespace tflite
}  // namespace kbs
