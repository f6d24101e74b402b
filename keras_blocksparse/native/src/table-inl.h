// One instruction set's table of kernels. Included last by each kernels_*.cc.
#include "int8-inl.h"
#include "matmul-inl.h"
#include "pointwise-inl.h"

// A library for devices only runs: it has no kernels for gradients.
#ifdef KBS_INFERENCE_ONLY
#define KBS_GRADIENT(function) nullptr
#else
#define KBS_GRADIENT(function) KBS_ISA::function
#endif

namespace kbs {
extern const Kernels KBS_TABLE;
const Kernels KBS_TABLE = {
    KBS_NAME,
    KBS_ISA::matmul_rows_f32,
    KBS_ISA::matmul_rows_bf16,
    KBS_ISA::matmul_rows_i8,
    KBS_ISA::quantize,
    KBS_ISA::make_panel,
    KBS_ISA::read_panel,
    KBS_ISA::matmul_panel,
    KBS_GRADIENT(matmul_panel_transposed),
    KBS_GRADIENT(sampled_product),
    KBS_ISA::activate,
    KBS_ISA::simple_step,
    KBS_ISA::gru_step,
    KBS_ISA::gru_reset,
    KBS_ISA::gru_update,
    KBS_ISA::lstm_step,
    KBS_GRADIENT(simple_step_backward),
    KBS_GRADIENT(gru_step_backward),
    KBS_GRADIENT(gru_update_backward),
    KBS_GRADIENT(gru_reset_backward),
    KBS_GRADIENT(lstm_step_backward),
};
}  // namespace kbs
#undef KBS_GRADIENT
