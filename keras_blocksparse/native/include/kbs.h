/* libkbs: block-sparse matrix products and fused recurrent layers.
 *
 * A plain C interface. It knows nothing of TensorFlow, TFLite or Python; all three use it.
 *
 * Matrices are Keras weights: `rows` inputs by `cols` outputs, and a product is y = x W with x (batch, rows).
 * A recurrent layer's matrix holds `gates` equal parts beside each other (GRU: z r h; LSTM: i f c o), each cut into
 * blocks of its own, as `keras_blocksparse/blocks.py` does.
 *
 * Every function returns a kbs_status; kbs_last_error() then says what was wrong, for the calling thread. No function
 * throws, and none keeps a pointer to caller memory except where it says so. Functions that take a handle as `const`
 * may be called from many threads at once with the same handle.
 */
#ifndef KBS_H_
#define KBS_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KBS_API __attribute__((visibility("default")))

/* Raised when a signature or a struct below changes in a way that old callers would not survive. */
#define KBS_ABI_VERSION 3

typedef enum {
  KBS_OK = 0,
  KBS_INVALID_ARGUMENT = 1, /* sizes, pointers or settings that make no sense */
  KBS_CORRUPT = 2,          /* a packed buffer that is truncated, tampered with, or none at all */
  KBS_UNSUPPORTED = 3,      /* sensible, but not offered: a gradient of int8 weights, an ISA the CPU lacks */
  KBS_OUT_OF_MEMORY = 4,
  KBS_INTERNAL = 5
} kbs_status;

typedef enum { KBS_FLOAT32 = 0, KBS_BFLOAT16 = 1, KBS_INT8 = 2 } kbs_dtype;

typedef enum {
  KBS_LINEAR = 0,
  KBS_TANH = 1,
  KBS_SIGMOID = 2,
  KBS_RELU = 3,
  KBS_HARD_SIGMOID = 4, /* relu6(x + 3) / 6 */
  KBS_CLIPPED_RELU = 5  /* min(max(x, 0), limit) */
} kbs_activation;

typedef enum { KBS_SIMPLE_RNN = 0, KBS_GRU = 1, KBS_LSTM = 2 } kbs_cell;

KBS_API int32_t kbs_abi_version(void);
/* The last error of the calling thread, "" if there was none. Valid until the thread's next call. */
KBS_API const char* kbs_last_error(void);

/* ---- the machine ---------------------------------------------------------------------------------------------- */

/* The instruction set in use: "baseline", "avx2", "avx512", "avx512vnni", "neon", "neondot". Chosen once, when the
 * library is first used; the environment variable KBS_ISA forces one, and one the CPU lacks is KBS_UNSUPPORTED from
 * every function that would compute. */
KBS_API kbs_status kbs_get_isa(const char** name);
/* Comma-separated names of those this CPU runs, best last. */
KBS_API const char* kbs_available_isas(void);
/* Threads for one call, including the caller's: 0 is one for each core. Never more than there are cores. The
 * environment variable KBS_NUM_THREADS sets the start value. */
KBS_API kbs_status kbs_set_num_threads(int32_t threads);
KBS_API int32_t kbs_get_num_threads(void);
/* Calls that the calling thread makes use no more threads than this; 0: no limit of their own. Returns the limit before. */
KBS_API int32_t kbs_limit_threads(int32_t threads);

/* ---- packed buffers ------------------------------------------------------------------------------------------- */

typedef struct {
  int32_t dtype; /* kbs_dtype */
  int64_t rows, cols, gates, block_rows, block_cols;
  int64_t blocks;        /* kept */
  int64_t elements;      /* in kept blocks, those that really exist (ragged edges) */
  int64_t bytes;         /* of the whole buffer */
  int64_t values_offset; /* what lies before depends on shape and kept blocks only: the *structure* */
  int64_t values_bytes;  /* all that depends on the weights (int8: with its scales); a multiple of 64. float32 values
                            may be trained, their padding must stay zero */
} kbs_info;

/* What kbs_pack will write. `keep`, if not NULL, says for each block of (gates, block rows, block columns) whether to
 * keep it; otherwise blocks that hold a non-zero are kept. With `keep`, `w` may be NULL: all values are zero. */
KBS_API kbs_status kbs_packed_bytes(const float* w, int64_t rows, int64_t cols, int64_t gates, int64_t block_rows,
                                    int64_t block_cols, int32_t dtype, const uint8_t* keep, int64_t* bytes);
/* Packs row-major `w` (rows, cols) into `out`, which must hold what kbs_packed_bytes said. int8: symmetric, one scale
 * for each output; w must be finite. */
KBS_API kbs_status kbs_pack(const float* w, int64_t rows, int64_t cols, int64_t gates, int64_t block_rows,
                            int64_t block_cols, int32_t dtype, const uint8_t* keep, void* out, int64_t out_bytes);
/* Checks all that kernels rely on: sizes, offsets, every index. */
KBS_API kbs_status kbs_validate(const void* packed, int64_t bytes);
/* Validates, then tells. */
KBS_API kbs_status kbs_inspect(const void* packed, int64_t bytes, kbs_info* info);
/* Validates, then writes the dense matrix. */
KBS_API kbs_status kbs_unpack(const void* packed, int64_t bytes, float* w);
/* Validates, then writes 1 for each kept block and 0 for the others: (gates, block rows, block columns). */
KBS_API kbs_status kbs_kept_blocks(const void* packed, int64_t bytes, uint8_t* keep);
/* Validates, then writes where each float32 value belongs: values_bytes / 4 positions in the flat dense matrix, -1 for
 * padding. For gathering trained weights and checking gradients. */
KBS_API kbs_status kbs_positions(const void* packed, int64_t bytes, int64_t* positions);

/* ---- one matrix ----------------------------------------------------------------------------------------------- */

typedef struct kbs_matrix kbs_matrix;

enum {
  KBS_COPY = 1,     /* without it the handle keeps using `packed`, which must outlive it and not change (values may) */
  KBS_STRUCTURE = 2 /* `packed` ends at values_offset: whatever computes must be given `values` */
};

/* Validates. `flags` is a sum of the above. */
KBS_API kbs_status kbs_matrix_create(const void* packed, int64_t bytes, int32_t flags, kbs_matrix** out);

/* A matrix given by the elements of its columns that are not zero. */
typedef struct {
  int64_t rows, cols, gates;
  const int64_t* starts;   /* cols + 1: where each column's elements begin */
  const int32_t* row;      /* of each element; increasing within a column */
  const float* values;     /* one of these two; the other is NULL */
  const int8_t* quantized; /* with `scales`: packed as they are, not rounded again */
  const float* scales;     /* cols */
} kbs_columns;

/* Packs and prepares; the handle owns all its memory. Time and memory go with the elements, not with rows times columns.
 * A block of 0 x 0 lets the library choose the one that makes products quickest. Quantized values need KBS_INT8. */
KBS_API kbs_status kbs_matrix_from_columns(const kbs_columns* columns, int64_t block_rows, int64_t block_cols,
                                           int32_t dtype, kbs_matrix** out);
KBS_API void kbs_matrix_destroy(kbs_matrix* matrix);
KBS_API kbs_status kbs_matrix_info(const kbs_matrix* matrix, kbs_info* info);

/* y (batch, cols) = x (batch, rows) W + bias, or y += ... if accumulate. Row strides in elements. `bias` may be NULL.
 * `values`, if not NULL, stands in for the packed values (values_bytes of them, aligned to 4): weights in training.
 * float32 and bfloat16 weights compute in float32; int8 quantizes each row of x to 8 bits and adds in int32.
 * y must not overlap x. */
KBS_API kbs_status kbs_matmul(const kbs_matrix* matrix, const void* values, const float* x, int64_t x_stride,
                              int64_t batch, const float* bias, int32_t accumulate, float* y, int64_t y_stride);
/* dx (batch, rows) = dy (batch, cols) W^T. float32 and bfloat16. */
KBS_API kbs_status kbs_matmul_transposed(const kbs_matrix* matrix, const void* values, const float* dy,
                                         int64_t dy_stride, int64_t batch, float* dx, int64_t dx_stride);
/* dvalues = x^T dy where W has blocks, in the order of the packed values, zero in the padding. float32 only. */
KBS_API kbs_status kbs_sampled_product(const kbs_matrix* matrix, const float* x, int64_t x_stride, const float* dy,
                                       int64_t dy_stride, int64_t batch, int32_t accumulate, float* dvalues);

/* ---- activations ---------------------------------------------------------------------------------------------- */

/* y = f(x), n floats; x and y may be the same. For every float, tanh is within 2 ulp of the true value,
 * sigmoid within 2.5. */
KBS_API kbs_status kbs_activate(int32_t activation, float limit, const float* x, int64_t n, float* y);

/* ---- recurrent layers ----------------------------------------------------------------------------------------- */

typedef struct {
  int32_t cell;                 /* kbs_cell */
  int32_t activation;           /* kbs_activation of the candidate / output */
  int32_t recurrent_activation; /* of the gates; not used by KBS_SIMPLE_RNN */
  int32_t reset_after;          /* GRU only */
  float activation_limit;       /* for KBS_CLIPPED_RELU */
  float recurrent_limit;
  const kbs_matrix* kernel;     /* (inputs, gates * units); not owned, must outlive the layer */
  const kbs_matrix* recurrent;  /* (units, gates * units) */
  const float* bias;            /* NULL, (gates * units), or (2, 3 * units) for a GRU with reset_after; copied */
} kbs_rnn_config;

typedef struct {
  int64_t batch, steps;
  const float* x;               /* (batch, steps, inputs) */
  const uint8_t* mask;          /* NULL, or (batch, steps): a step that is 0 is skipped */
  const float* initial_h;       /* NULL for zeros, or (batch, units) */
  const float* initial_c;       /* LSTM */
  int32_t go_backwards;         /* read x from its end; outputs are in the order they were computed, as in Keras */
  int32_t return_sequences;
  int32_t zero_output_for_mask;
  int32_t reserved;
  const void* kernel_values;    /* NULL, or values that stand in for the packed ones, as in kbs_matmul */
  const void* recurrent_values;
  const float* bias;            /* NULL for the layer's own */
  float* y;                     /* (batch, steps, units), or (batch, units) without return_sequences */
  float* final_h;               /* NULL, or (batch, units) */
  float* final_c;               /* NULL, or (batch, units), LSTM */
  void* reserve;                /* NULL, or kbs_rnn_reserve_bytes of memory aligned to 4: what kbs_rnn_backward needs of
                                   this run */
} kbs_rnn_call;

typedef struct kbs_rnn kbs_rnn;

KBS_API kbs_status kbs_rnn_create(const kbs_rnn_config* config, kbs_rnn** out);
KBS_API void kbs_rnn_destroy(kbs_rnn* rnn);
KBS_API kbs_status kbs_rnn_run(const kbs_rnn* rnn, const kbs_rnn_call* call);

/* ---- their gradients: float32 matrices only -------------------------------------------------------------------- */

KBS_API kbs_status kbs_rnn_reserve_bytes(const kbs_rnn* rnn, int64_t batch, int64_t steps, int64_t* bytes);

typedef struct {
  const float* dy;         /* like kbs_rnn_call.y; NULL for zeros */
  const float* dfinal_h;   /* NULL for zeros, or (batch, units) */
  const float* dfinal_c;   /* LSTM */
  float* dx;               /* (batch, steps, inputs); each result may be NULL: not wanted */
  float* dinitial_h;       /* (batch, units) */
  float* dinitial_c;       /* LSTM */
  float* dkernel_values;   /* in the order of the packed values, zero in the padding */
  float* drecurrent_values;
  float* dbias;            /* in the shape of the bias that the call had; NULL if there was none */
} kbs_rnn_gradients;

/* Gradients of the run that `call` describes. call->reserve is what that run wrote, and is left as it is; NULL runs it
 * again. The call's outputs are not used. */
KBS_API kbs_status kbs_rnn_backward(const kbs_rnn* rnn, const kbs_rnn_call* call, const kbs_rnn_gradients* gradients);

#ifdef __cplusplus
}
#endif
#endif /* KBS_H_ */
