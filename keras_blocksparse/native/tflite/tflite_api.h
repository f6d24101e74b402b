// The part of TFLite's plain C interface for delegates that we use. Runtimes ship no headers, so the layouts are declared
// here, under the names they have there. Unless a comment says otherwise they come from core/c/common.h, and are the same
// from TensorFlow 2.14 and tflite-runtime 2.14 to LiteRT 2.3: in between fields were only added at the end.
#ifndef KBS_TFLITE_API_H_
#define KBS_TFLITE_API_H_

#include <stddef.h>
#include <stdint.h>

// A TfLiteRegistration goes by value, and ours is larger than the runtime's: on 64-bit machines no other argument moves.
static_assert(sizeof(void*) == 8, "the delegate is for 64-bit machines");

extern "C" {

// ---- c_api_types.h

typedef int TfLiteStatus;
constexpr TfLiteStatus kTfLiteOk = 0, kTfLiteError = 1, kTfLiteDelegateError = 2;

typedef int TfLiteType;
constexpr TfLiteType kTfLiteFloat32 = 1, kTfLiteBool = 6, kTfLiteInt8 = 9, kTfLiteFloat16 = 10;

// ---- common.h
constexpr int kTfLiteMmapRo = 1;             // TfLiteAllocationType: constants
constexpr int kTfLiteNoQuantization = 0, kTfLiteAffineQuantization = 1;  // TfLiteQuantizationType
constexpr int kTfLiteOptionalTensor = -1;
constexpr int kTfLiteDimDense = 0, kTfLiteDimSparseCSR = 1;
constexpr int64_t kTfLiteDelegateFlagsAllowDynamicTensors = 1;

// ---- builtin_ops.h, builtin_op_data.h
enum { kTfLiteBuiltinFullyConnected = 9, kTfLiteBuiltinCustom = 32, kTfLiteBuiltinStablehloComposite = 206 };
enum { kTfLiteActNone = 0, kTfLiteActRelu = 1, kTfLiteActRelu6 = 3, kTfLiteActTanh = 4 };

// ---- common.h again

typedef struct TfLiteIntArray {
  int size;
  int data[];
} TfLiteIntArray;

typedef struct TfLiteFloatArray {
  int size;
  float data[];
} TfLiteFloatArray;

typedef struct {
  float scale;
  int32_t zero_point;
} TfLiteQuantizationParams;

typedef struct {
  int type;
  void* params;  // TfLiteAffineQuantization
} TfLiteQuantization;

typedef struct {
  TfLiteFloatArray* scale;
  TfLiteIntArray* zero_point;
  int32_t quantized_dimension;
} TfLiteAffineQuantization;

typedef struct {
  int format;
  int dense_size;
  TfLiteIntArray* array_segments;
  TfLiteIntArray* array_indices;
} TfLiteDimensionMetadata;

typedef struct {
  TfLiteIntArray* traversal_order;
  TfLiteIntArray* block_map;
  TfLiteDimensionMetadata* dim_metadata;
  int dim_metadata_size;
} TfLiteSparsity;

struct TfLiteDelegate;
struct TfLiteContext;

typedef struct TfLiteTensor {
  TfLiteType type;
  union {
    void* raw;
    float* f;
    uint8_t* uint8;
  } data;
  TfLiteIntArray* dims;
  TfLiteQuantizationParams params;
  int allocation_type;
  size_t bytes;
  const void* allocation;
  const char* name;
  struct TfLiteDelegate* delegate;
  int buffer_handle;
  bool data_is_stale;
  bool is_variable;
  TfLiteQuantization quantization;
  TfLiteSparsity* sparsity;
  const TfLiteIntArray* dims_signature;
} TfLiteTensor;

typedef struct TfLiteNode {
  TfLiteIntArray* inputs;
  TfLiteIntArray* outputs;
  TfLiteIntArray* intermediates;
  TfLiteIntArray* temporaries;
  void* user_data;
  void* builtin_data;
  const void* custom_initial_data;
  int custom_initial_data_size;
  struct TfLiteDelegate* delegate;
  bool might_have_side_effect;
} TfLiteNode;

typedef struct {
  struct TfLiteDelegate* delegate;
  TfLiteIntArray* nodes_to_replace;
  TfLiteIntArray* input_tensors;
  TfLiteIntArray* output_tensors;
} TfLiteDelegateParams;

// What newer runtimes added behind `version`, and may add, is read from a delegate's registration too: `later` keeps it zero.
typedef struct TfLiteRegistration {
  void* (*init)(struct TfLiteContext*, const char* buffer, size_t length);
  void (*free)(struct TfLiteContext*, void* user_data);
  TfLiteStatus (*prepare)(struct TfLiteContext*, TfLiteNode*);
  TfLiteStatus (*invoke)(struct TfLiteContext*, TfLiteNode*);
  const char* (*profiling_string)(const struct TfLiteContext*, const TfLiteNode*);
  int32_t builtin_code;
  const char* custom_name;
  int version;
  void* later[16];
} TfLiteRegistration;

typedef struct TfLiteContext {
  size_t tensors_size;
  TfLiteStatus (*GetExecutionPlan)(struct TfLiteContext*, TfLiteIntArray**);
  TfLiteTensor* tensors;
  void* impl_;
  TfLiteStatus (*ResizeTensor)(struct TfLiteContext*, TfLiteTensor*, TfLiteIntArray* takes_ownership);
  void (*ReportError)(struct TfLiteContext*, const char* format, ...);
  TfLiteStatus (*AddTensors)(struct TfLiteContext*, int, int*);
  TfLiteStatus (*GetNodeAndRegistration)(struct TfLiteContext*, int, TfLiteNode**, TfLiteRegistration**);
  TfLiteStatus (*ReplaceNodeSubsetsWithDelegateKernels)(struct TfLiteContext*, TfLiteRegistration,
                                                        const TfLiteIntArray* nodes, struct TfLiteDelegate*);
  int recommended_num_threads;
  void* (*GetExternalContext)(struct TfLiteContext*, int);
  void (*SetExternalContext)(struct TfLiteContext*, int, void*);
  bool allow_fp32_relax_to_fp16;
  void* profiler;
  void* (*AllocatePersistentBuffer)(struct TfLiteContext*, size_t);
  TfLiteStatus (*AllocateBufferForEval)(struct TfLiteContext*, size_t, void**);
  TfLiteStatus (*RequestScratchBufferInArena)(struct TfLiteContext*, size_t, int*);
  void* (*GetScratchBuffer)(struct TfLiteContext*, int);
  TfLiteStatus (*ResizeTensorExplicit)(struct TfLiteContext*, TfLiteTensor*, int, const int*);
  TfLiteStatus (*PreviewDelegatePartitioning)(struct TfLiteContext*, const TfLiteIntArray*, TfLiteDelegateParams**, int*);
  TfLiteTensor* (*GetTensor)(const struct TfLiteContext*, int);
  void* (*GetEvalTensor)(const struct TfLiteContext*, int);
  TfLiteStatus (*GetModelMetadata)(const struct TfLiteContext*, const char*, const char**, size_t*);
  // Both work while a delegate prepares only, and must come in pairs.
  TfLiteStatus (*AcquireSubgraphContext)(struct TfLiteContext*, int subgraph, struct TfLiteContext** acquired);
  TfLiteStatus (*ReleaseSubgraphContext)(struct TfLiteContext*, int subgraph);
} TfLiteContext;

typedef struct TfLiteDelegate {
  void* data_;
  TfLiteStatus (*Prepare)(TfLiteContext*, struct TfLiteDelegate*);
  TfLiteStatus (*CopyFromBufferHandle)(TfLiteContext*, struct TfLiteDelegate*, int, TfLiteTensor*);
  TfLiteStatus (*CopyToBufferHandle)(TfLiteContext*, struct TfLiteDelegate*, int, TfLiteTensor*);
  void (*FreeBufferHandle)(TfLiteContext*, struct TfLiteDelegate*, int*);
  int64_t flags;
  void* opaque_delegate_builder;
  void* later[8];
} TfLiteDelegate;

// ---- builtin_op_data.h; more may follow in both
typedef struct {
  int activation;
  int weights_format;
  bool keep_num_dims;
} TfLiteFullyConnectedParams;

typedef struct {
  const char* name;
  int32_t subgraph_index;
  int32_t version;  // not in the first runtimes, which had padding here
  const uint8_t* attributes;
  size_t attributes_size;
} TfLiteStablehloCompositeParams;

}  // extern "C"
#endif  // KBS_TFLITE_API_H_
