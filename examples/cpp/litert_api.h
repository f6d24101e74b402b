// The part of LiteRT's C interface that this example uses. The ai-edge-litert wheel brings the library and no headers; names
// and layouts are those of litert/c in LiteRT 2.3. (Earlier releases have other arguments here and there.)
#ifndef LITERT_API_H_
#define LITERT_API_H_

#include <stddef.h>
#include <stdint.h>

extern "C" {

typedef int LiteRtStatus;  // 0 is fine
typedef struct LiteRtEnvironmentT* LiteRtEnvironment;
typedef struct LiteRtModelT* LiteRtModel;
typedef struct LiteRtOptionsT* LiteRtOptions;
typedef struct LiteRtCompiledModelT* LiteRtCompiledModel;
typedef struct LiteRtSignatureT* LiteRtSignature;
typedef struct LiteRtTensorT* LiteRtTensor;
typedef struct LiteRtTensorBufferT* LiteRtTensorBuffer;
typedef struct LiteRtTensorBufferRequirementsT* LiteRtTensorBufferRequirements;
typedef struct LiteRtAcceleratorT* LiteRtAccelerator;
typedef struct LiteRtDelegateWrapperT* LiteRtDelegateWrapper;
typedef size_t LiteRtParamIndex;

enum { kLiteRtHwAcceleratorCpu = 1 };
enum { kLiteRtElementTypeFloat32 = 1 };
enum { kLiteRtTensorBufferLockModeRead = 0, kLiteRtTensorBufferLockModeWrite = 1 };

typedef struct {
  unsigned rank : 7;
  bool has_strides : 1;
  int32_t dimensions[8];
  uint32_t strides[8];
} LiteRtLayout;

typedef struct {
  int32_t element_type;
  LiteRtLayout layout;
} LiteRtRankedTensorType;

typedef struct {
  int32_t major, minor, patch;
} LiteRtApiVersion;

LiteRtStatus LiteRtCreateEnvironment(int, const void* options, LiteRtEnvironment*);
void LiteRtDestroyEnvironment(LiteRtEnvironment);
LiteRtStatus LiteRtCreateModelFromFile(LiteRtEnvironment, const char*, LiteRtModel*);
void LiteRtDestroyModel(LiteRtModel);
LiteRtStatus LiteRtGetModelSignature(LiteRtModel, LiteRtParamIndex, LiteRtSignature*);
LiteRtStatus LiteRtGetNumSignatureInputs(LiteRtSignature, LiteRtParamIndex*);
LiteRtStatus LiteRtGetNumSignatureOutputs(LiteRtSignature, LiteRtParamIndex*);
LiteRtStatus LiteRtGetSignatureInputName(LiteRtSignature, LiteRtParamIndex, const char**);
LiteRtStatus LiteRtGetSignatureOutputName(LiteRtSignature, LiteRtParamIndex, const char**);
LiteRtStatus LiteRtGetSignatureInputTensorByIndex(LiteRtSignature, LiteRtParamIndex, LiteRtTensor*);
LiteRtStatus LiteRtGetSignatureOutputTensorByIndex(LiteRtSignature, LiteRtParamIndex, LiteRtTensor*);
LiteRtStatus LiteRtGetRankedTensorType(LiteRtTensor, LiteRtRankedTensorType*);

LiteRtStatus LiteRtCreateOptions(LiteRtOptions*);
void LiteRtDestroyOptions(LiteRtOptions);
LiteRtStatus LiteRtSetOptionsHardwareAccelerators(LiteRtOptions, int set);
LiteRtStatus LiteRtCreateCompiledModel(LiteRtEnvironment, LiteRtModel, LiteRtOptions, LiteRtCompiledModel*);
void LiteRtDestroyCompiledModel(LiteRtCompiledModel);
LiteRtStatus LiteRtGetCompiledModelInputBufferRequirements(LiteRtCompiledModel, LiteRtParamIndex signature,
                                                           LiteRtParamIndex, LiteRtTensorBufferRequirements*);
LiteRtStatus LiteRtGetCompiledModelOutputBufferRequirements(LiteRtCompiledModel, LiteRtParamIndex signature,
                                                            LiteRtParamIndex, LiteRtTensorBufferRequirements*);
LiteRtStatus LiteRtRunCompiledModel(LiteRtCompiledModel, LiteRtParamIndex signature, size_t, LiteRtTensorBuffer* inputs,
                                    size_t, LiteRtTensorBuffer* outputs);

LiteRtStatus LiteRtCreateManagedTensorBufferFromRequirements(LiteRtEnvironment, const LiteRtRankedTensorType*,
                                                             LiteRtTensorBufferRequirements, LiteRtTensorBuffer*);
LiteRtStatus LiteRtLockTensorBuffer(LiteRtTensorBuffer, void** memory, int mode);
LiteRtStatus LiteRtUnlockTensorBuffer(LiteRtTensorBuffer);
void LiteRtDestroyTensorBuffer(LiteRtTensorBuffer);

// An accelerator is how LiteRT's compiled models are given a TFLite delegate.
LiteRtStatus LiteRtCreateAccelerator(LiteRtAccelerator*);
LiteRtStatus LiteRtRegisterAccelerator(LiteRtEnvironment, LiteRtAccelerator, void* data, void (*release)(void*));
LiteRtStatus LiteRtSetAcceleratorGetName(LiteRtAccelerator, LiteRtStatus (*)(LiteRtAccelerator, const char**));
LiteRtStatus LiteRtSetAcceleratorGetVersion(LiteRtAccelerator, LiteRtStatus (*)(LiteRtAccelerator, LiteRtApiVersion*));
LiteRtStatus LiteRtSetAcceleratorGetHardwareSupport(LiteRtAccelerator, LiteRtStatus (*)(LiteRtAccelerator, int* set));
LiteRtStatus LiteRtSetDelegateFunction(LiteRtAccelerator,
                                       LiteRtStatus (*)(void* runtime, LiteRtEnvironment, LiteRtAccelerator, LiteRtOptions,
                                                        LiteRtDelegateWrapper*));
LiteRtStatus LiteRtWrapDelegate(void* tflite_delegate, void (*destroy)(void* tflite_delegate), LiteRtDelegateWrapper*);

}  // extern "C"
#endif  // LITERT_API_H_
