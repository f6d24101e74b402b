// A prepared matrix, and products with a few rows at a time: what kbs_matmul and the recurrent loops are made of.
#ifndef KBS_MATRIX_H_
#define KBS_MATRIX_H_

#include "kernels.h"
#include "packed.h"

struct kbs_matrix {
  kbs::View view{};
  char* owned = nullptr;  // the copy of the packed buffer, if it was copied

  kbs_matrix() = default;
  kbs_matrix(const kbs_matrix&) = delete;
  kbs_matrix& operator=(const kbs_matrix&) = delete;
  ~kbs_matrix();
};

namespace kbs {

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr int kBlockRows = kMaxLanes;  // rows of x in one go

// Up to kBlockRows rows of x in the form that the kernels for this matrix take.
struct Operand {
  int rows;
  int lanes;       // of a panel, 0 for padded rows
  size_t stride;   // of padded rows
  const void* data;
  float* scratch;
  float scales[kBlockRows];  // int8
};

// Workspace that an operand needs, a multiple of 64 bytes.
size_t operand_bytes(const View& view, int64_t rows);
void make_operand(const Kernels& k, const View& view, const float* const* x, int rows, char* workspace, Operand* out);
// y (+)= x W (+ bias) for strips [begin, end).
void multiply(const Kernels& k, const View& view, const Operand& x, size_t begin, size_t end, const Output& out);

// dx (batch, rows) = dy W^T for any number of rows, on all threads.
void matmul_transposed(const Kernels& k, const View& view, const float* dy, size_t dy_stride, int64_t batch, float* dx,
                       size_t dx_stride);
// dvalues (+)= x^T dy for strips [begin, end) and any number of rows, on all threads.
void sampled_product(const Kernels& k, const View& view, size_t begin, size_t end, const float* x, size_t x_stride,
                     const float* dy, size_t dy_stride, int64_t batch, bool accumulate, float* dvalues);

// Rows of x that one panel takes; fewer are padded.
int panel_lanes(int64_t rows);
// Floats of a row of x that kernels read, zero behind its end.
size_t row_stride(const Header& header);
// The first strip of part `index` of `parts` with equal work, of strips [begin, end) or of all.
size_t split_strips(const View& view, size_t begin, size_t end, int index, int parts);
size_t split_strips(const View& view, int index, int parts);
// Whether a structure was given no values, though it has blocks; and the error.
bool lacks_values(const View& view);
kbs_status no_values();
// What a product with so many rows takes one thread, roughly; decides whether threads are worth waking.
double estimated_us(const View& view, int64_t rows);
constexpr double kWorthThreadsUs = 50;

}  // namespace kbs
#endif  // KBS_MATRIX_H_
