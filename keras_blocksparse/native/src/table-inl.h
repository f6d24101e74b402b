// One instruction set's table of kernels. Included last by each kernels_*.cc.
#include "int8-inl.h"
#include "matmul-inl.h"
#include "pointwise-inl.h"

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
    KBS_ISA::matmul_panel_transposed,
    KBS_ISA::sampled_product,
    KBS_ISA::activate,
    KBS_ISA::simple_step,
    KBS_ISA::gru_step,
    KBS_ISA::gru_reset,
    KBS_ISA::gru_update,
    KBS_ISA::lstm_step,
    KBS_ISA::simple_step_backward,
    KBS_ISA::gru_step_backward,
    KBS_ISA::gru_update_backward,
    KBS_ISA::gru_reset_backward,
    KBS_ISA::lstm_step_backward,
};
}  // namespace kbs
