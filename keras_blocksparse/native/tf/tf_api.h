// The part of TensorFlow's C API that the ops use, found at run time in the TensorFlow that loads us: one binary serves
// every version, and none is needed to build it.
//
// tests/native/tf_headers.cc compiles this beside TensorFlow's own headers, so a signature that changed is an error.
#ifndef KBS_TF_API_H_
#define KBS_TF_API_H_

#include <cstddef>
#include <cstdint>

#ifndef KBS_TF_HEADERS
extern "C" {
struct TF_Status;
struct TF_Tensor;
struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_DimensionHandle;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
enum TF_Code { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_RESOURCE_EXHAUSTED = 8, TF_UNIMPLEMENTED = 12, TF_INTERNAL = 13, TF_DATA_LOSS = 15 };
enum TF_DataType { TF_FLOAT = 1 };
}
#endif

namespace kbs {

// X(result, name, arguments)
#define KBS_TF_FUNCTIONS(X)                                                                                           \
  X(TF_Status*, TF_NewStatus, (void))                                                                                 \
  X(void, TF_DeleteStatus, (TF_Status*))                                                                              \
  X(void, TF_SetStatus, (TF_Status*, TF_Code, const char*))                                                           \
  X(TF_Code, TF_GetCode, (const TF_Status*))                                                                          \
  X(const char*, TF_Message, (const TF_Status*))                                                                      \
  X(void*, TF_TensorData, (const TF_Tensor*))                                                                         \
  X(size_t, TF_TensorByteSize, (const TF_Tensor*))                                                                    \
  X(int64_t, TF_TensorElementCount, (const TF_Tensor*))                                                               \
  X(int, TF_NumDims, (const TF_Tensor*))                                                                              \
  X(int64_t, TF_Dim, (const TF_Tensor*, int))                                                                         \
  X(void, TF_DeleteTensor, (TF_Tensor*))                                                                              \
  X(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char*))                                                \
  X(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                                      \
  X(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                                     \
  X(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))                                    \
  X(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                                            \
    (TF_OpDefinitionBuilder*, void (*)(TF_ShapeInferenceContext*, TF_Status*)))                                       \
  X(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                             \
  X(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                                           \
  X(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                                                    \
  X(TF_DimensionHandle*, TF_NewDimensionHandle, ())                                                                   \
  X(void, TF_DeleteDimensionHandle, (TF_DimensionHandle*))                                                            \
  X(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))            \
  X(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))           \
  X(TF_ShapeHandle*, TF_ShapeInferenceContextVectorFromSize, (TF_ShapeInferenceContext*, size_t))                     \
  X(void, TF_ShapeInferenceContextWithRank,                                                                           \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))                               \
  X(void, TF_ShapeInferenceContextWithRankAtLeast,                                                                    \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))                               \
  X(void, TF_ShapeInferenceContextDim, (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_DimensionHandle*))    \
  X(int64_t, TF_DimensionHandleValue, (TF_DimensionHandle*))                                                          \
  X(void, TF_ShapeInferenceContextSubshape,                                                                           \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, int64_t, TF_ShapeHandle*, TF_Status*))                      \
  X(void, TF_ShapeInferenceContextConcatenateShapes,                                                                  \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle*, TF_Status*))                       \
  X(TF_KernelBuilder*, TF_NewKernelBuilder,                                                                           \
    (const char*, const char*, void* (*)(TF_OpKernelConstruction*), void (*)(void*, TF_OpKernelContext*),             \
     void (*)(void*)))                                                                                                \
  X(void, TF_RegisterKernelBuilder, (const char*, TF_KernelBuilder*, TF_Status*))                                     \
  X(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                                    \
  X(void, TF_OpKernelConstruction_GetAttrSize, (TF_OpKernelConstruction*, const char*, int32_t*, int32_t*, TF_Status*)) \
  X(void, TF_OpKernelConstruction_GetAttrString, (TF_OpKernelConstruction*, const char*, char*, size_t, TF_Status*))  \
  X(void, TF_OpKernelConstruction_GetAttrInt32, (TF_OpKernelConstruction*, const char*, int32_t*, TF_Status*))        \
  X(void, TF_OpKernelConstruction_GetAttrFloat, (TF_OpKernelConstruction*, const char*, float*, TF_Status*))          \
  X(void, TF_OpKernelConstruction_GetAttrBool, (TF_OpKernelConstruction*, const char*, unsigned char*, TF_Status*))         \
  X(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                              \
  X(void, TF_GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                           \
  X(TF_Tensor*, TF_AllocateOutput,                                                                                    \
    (TF_OpKernelContext*, int, TF_DataType, const int64_t*, int, size_t, TF_Status*))

struct TfApi {
#define KBS_TF_MEMBER(result, name, arguments) result(*name) arguments;
  KBS_TF_FUNCTIONS(KBS_TF_MEMBER)
#undef KBS_TF_MEMBER
};

}  // namespace kbs
#endif  // KBS_TF_API_H_
