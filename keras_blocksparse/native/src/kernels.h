// The functions that exist once for each instruction set, and the table that picks them.
#ifndef KBS_KERNELS_H_
#define KBS_KERNELS_H_

#include "format.h"

namespace kbs {

// Where a product goes: y (+)= product (+ bias).
struct Output {
  float* y;
  size_t stride;
  const float* bias;  // may be null
  bool accumulate;
};

struct Activation {
  int32_t kind;  // kbs_activation
  float limit;
};

constexpr int kMaxLanes = 32;     // widest panel
constexpr int kMaxRows = 4;       // most rows of x that a *_rows kernel takes

struct Kernels {
  const char* name;

  // y = x W for strips [begin, end) and n <= kMaxRows rows of x, vectors over the outputs. Rows of x are padded:
  // padded_rows + kSlack readable, zero behind the last row.
  void (*matmul_rows_f32)(const View&, size_t begin, size_t end, const float* x, size_t stride, int n, const Output&);
  void (*matmul_rows_bf16)(const View&, size_t begin, size_t end, const float* x, size_t stride, int n, const Output&);
  // The same for int8: x is quantized, `offset` was added to it; scale[i] is row i's step.
  void (*matmul_rows_i8)(const View&, size_t begin, size_t end, const uint8_t* x, size_t stride, const float* scale,
                         int n, const Output&);
  // One row to 8 bits (signed value + offset), zeros up to padded; returns the step.
  float (*quantize)(const float* x, size_t n, size_t padded, uint8_t* out);

  // A panel holds `lanes` (8, 16 or 32) rows of x side by side: panel[row * lanes + lane].
  void (*make_panel)(const float* const* x, int n, size_t length, size_t padded, int lanes, float* panel);
  void (*read_panel)(const float* panel, int lanes, size_t length, int n, float* y, size_t stride);
  // y = x W, vectors over the lanes. `scratch` holds a strip of bfloat16 widened: 4 * padded_rows * 16 bytes.
  void (*matmul_panel)(const View&, size_t begin, size_t end, const float* panel, int lanes, int n, float* scratch,
                       const Output&);
  // dx += dy W^T, both as panels.
  void (*matmul_panel_transposed)(const View&, size_t begin, size_t end, const float* dy, int lanes, float* scratch,
                                  float* dx);
  // dvalues (+)= x^T dy for strips [begin, end), n <= 64 rows, x padded.
  void (*sampled_product)(const View&, size_t begin, size_t end, const float* x, size_t x_stride, const float* dy,
                          size_t dy_stride, int n, bool accumulate, float* dvalues);

  void (*activate)(Activation, const float* x, size_t n, float* y);
  // One step of a cell for n units of one sample; x and a hold the gates `units` apart. `record`, if not null, is filled
  // for the step's gradients: see Record.
  void (*simple_step)(Activation f, size_t n, const float* a, float* h, float* record);
  void (*gru_step)(Activation f, Activation g, size_t n, size_t units, const float* x, const float* a,
                   const float* h_before, float* h, float* record);
  // reset_after = False comes in two halves: r * h for the product with the candidate's matrix, then the rest.
  void (*gru_reset)(Activation g, size_t n, size_t units, const float* x, const float* h_before, float* rh, float* record);
  void (*gru_update)(Activation f, Activation g, size_t n, size_t units, const float* x, const float* h_before, float* h,
                     float* record);
  void (*lstm_step)(Activation f, Activation g, size_t n, size_t units, const float* a, float* c, float* h, float* record);

  // Gradients of a step for all units of one sample. dh is that of h' and becomes what h gets past the products; da gets
  // those of the activations' arguments, `units` apart.
  void (*simple_step_backward)(Activation f, size_t units, const float* record, float* dh, float* da);
  // da has a fourth part: the candidate's where h U_h + b_h is concerned.
  void (*gru_step_backward)(Activation f, Activation g, size_t units, const float* record, float* dh, float* da);
  // reset_after = False in two halves: drh, the gradient of r * h, is a product with what the first one leaves.
  void (*gru_update_backward)(Activation f, Activation g, size_t units, const float* record, float* dh, float* da);
  void (*gru_reset_backward)(Activation g, size_t units, const float* record, const float* drh, float* dh, float* da);
  void (*lstm_step_backward)(Activation f, Activation g, size_t units, const float* record, float* dh, float* dc, float* da);
};

// What an instruction set does in its own way if all it adds is a dot product of bytes.
struct Int8Kernels {
  const char* name;
  decltype(Kernels::matmul_rows_i8) matmul_rows_i8;
  decltype(Kernels::quantize) quantize;
};

// Null, with the error set, if KBS_ISA asks for what this CPU cannot run.
const Kernels* kernels();

}  // namespace kbs
#endif  // KBS_KERNELS_H_
