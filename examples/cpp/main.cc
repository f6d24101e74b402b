// Runs a .tflite file on LiteRT without Python, with keras_blocksparse's delegate and without, and prints outputs and times.
//
//   run_tflite MODEL.tflite LIBKBS_TFLITE.so|none [INPUT.f32 ...]
//
// Inputs are files of raw float32, in the order of the signature; without them, inputs are filled with sin(0.1 i).
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "litert_api.h"

namespace {

constexpr int kRuns = 50;

void check(LiteRtStatus status, const char* what) {
  if (status == 0) return;
  std::fprintf(stderr, "%s failed: LiteRT status %d\n", what, status);
  std::exit(1);
}

// ---- our delegate, as an accelerator of LiteRT

void* (*create_delegate)(char** keys, char** values, size_t count, void (*report_error)(const char*));
void (*destroy_delegate)(void*);

void load_delegate(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library) {
    create_delegate = (decltype(create_delegate))dlsym(library, "tflite_plugin_create_delegate");
    destroy_delegate = (decltype(destroy_delegate))dlsym(library, "tflite_plugin_destroy_delegate");
  }
  if (!create_delegate || !destroy_delegate) {
    std::fprintf(stderr, "cannot load %s: %s\n", path, dlerror());
    std::exit(1);
  }
}

LiteRtStatus name(LiteRtAccelerator, const char** out) { return *out = "keras_blocksparse", 0; }
LiteRtStatus version(LiteRtAccelerator, LiteRtApiVersion* out) { return *out = {1, 0, 0}, 0; }
LiteRtStatus hardware(LiteRtAccelerator, int* out) { return *out = kLiteRtHwAcceleratorCpu, 0; }
LiteRtStatus make(void*, LiteRtEnvironment, LiteRtAccelerator, LiteRtOptions, LiteRtDelegateWrapper* out) {
  char key[] = "num_threads", value[] = "1";
  char *keys[] = {key}, *values[] = {value};
  void* delegate = create_delegate(keys, values, 1, [](const char* message) { std::fprintf(stderr, "%s\n", message); });
  return delegate ? LiteRtWrapDelegate(delegate, destroy_delegate, out) : 1;
}

void register_delegate(LiteRtEnvironment environment, const char* path) {
  load_delegate(path);
  LiteRtAccelerator accelerator;
  check(LiteRtCreateAccelerator(&accelerator), "LiteRtCreateAccelerator");
  check(LiteRtSetAcceleratorGetName(accelerator, name), "LiteRtSetAcceleratorGetName");
  check(LiteRtSetAcceleratorGetVersion(accelerator, version), "LiteRtSetAcceleratorGetVersion");
  check(LiteRtSetAcceleratorGetHardwareSupport(accelerator, hardware), "LiteRtSetAcceleratorGetHardwareSupport");
  check(LiteRtSetDelegateFunction(accelerator, make), "LiteRtSetDelegateFunction");
  check(LiteRtRegisterAccelerator(environment, accelerator, nullptr, nullptr), "LiteRtRegisterAccelerator");
}

// ---- tensors

struct Tensor {
  std::string name;
  LiteRtTensorBuffer buffer;
  size_t elements;
};

Tensor make_tensor(LiteRtEnvironment environment, const char* name, LiteRtTensor tensor,
                   LiteRtTensorBufferRequirements requirements) {
  LiteRtRankedTensorType type;
  check(LiteRtGetRankedTensorType(tensor, &type), "LiteRtGetRankedTensorType");
  if (type.element_type != kLiteRtElementTypeFloat32) {
    std::fprintf(stderr, "%s is no float32 tensor\n", name);
    std::exit(1);
  }
  Tensor out{name, nullptr, 1};
  for (unsigned i = 0; i < type.layout.rank; i++) out.elements *= (size_t)type.layout.dimensions[i];
  check(LiteRtCreateManagedTensorBufferFromRequirements(environment, &type, requirements, &out.buffer),
        "LiteRtCreateManagedTensorBufferFromRequirements");
  return out;
}

void fill(const Tensor& tensor, const char* path) {
  std::vector<float> values(tensor.elements);
  for (size_t i = 0; i < values.size(); i++) values[i] = (float)std::sin(0.1 * (double)i);
  if (path) {
    FILE* file = std::fopen(path, "rb");
    if (!file || std::fread(values.data(), sizeof(float), values.size(), file) != values.size()) {
      std::fprintf(stderr, "%s does not hold the %zu floats of %s\n", path, values.size(), tensor.name.c_str());
      std::exit(1);
    }
    std::fclose(file);
  }
  void* memory;
  check(LiteRtLockTensorBuffer(tensor.buffer, &memory, kLiteRtTensorBufferLockModeWrite), "LiteRtLockTensorBuffer");
  std::memcpy(memory, values.data(), values.size() * sizeof(float));
  check(LiteRtUnlockTensorBuffer(tensor.buffer), "LiteRtUnlockTensorBuffer");
}

void print(const Tensor& tensor) {
  void* memory;
  check(LiteRtLockTensorBuffer(tensor.buffer, &memory, kLiteRtTensorBufferLockModeRead), "LiteRtLockTensorBuffer");
  std::printf("%s", tensor.name.c_str());
  for (size_t i = 0; i < tensor.elements; i++) std::printf(" %.9g", ((const float*)memory)[i]);
  std::printf("\n");
  check(LiteRtUnlockTensorBuffer(tensor.buffer), "LiteRtUnlockTensorBuffer");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s MODEL.tflite LIBKBS_TFLITE.so|none [INPUT.f32 ...]\n", argv[0]);
    return 2;
  }
  LiteRtEnvironment environment;
  check(LiteRtCreateEnvironment(0, nullptr, &environment), "LiteRtCreateEnvironment");
  if (std::strcmp(argv[2], "none")) register_delegate(environment, argv[2]);

  LiteRtModel model;
  check(LiteRtCreateModelFromFile(environment, argv[1], &model), argv[1]);
  LiteRtSignature signature;
  check(LiteRtGetModelSignature(model, 0, &signature), "LiteRtGetModelSignature");
  LiteRtOptions options;
  check(LiteRtCreateOptions(&options), "LiteRtCreateOptions");
  check(LiteRtSetOptionsHardwareAccelerators(options, kLiteRtHwAcceleratorCpu), "LiteRtSetOptionsHardwareAccelerators");
  LiteRtCompiledModel compiled;
  check(LiteRtCreateCompiledModel(environment, model, options, &compiled), "LiteRtCreateCompiledModel");

  std::vector<Tensor> inputs, outputs;
  LiteRtParamIndex count;
  check(LiteRtGetNumSignatureInputs(signature, &count), "LiteRtGetNumSignatureInputs");
  for (LiteRtParamIndex i = 0; i < count; i++) {
    const char* name;
    LiteRtTensor tensor;
    LiteRtTensorBufferRequirements requirements;
    check(LiteRtGetSignatureInputName(signature, i, &name), "LiteRtGetSignatureInputName");
    check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), "LiteRtGetSignatureInputTensorByIndex");
    check(LiteRtGetCompiledModelInputBufferRequirements(compiled, 0, i, &requirements), "input requirements");
    inputs.push_back(make_tensor(environment, name, tensor, requirements));
    fill(inputs.back(), argc > 3 + (int)i ? argv[3 + i] : nullptr);
  }
  check(LiteRtGetNumSignatureOutputs(signature, &count), "LiteRtGetNumSignatureOutputs");
  for (LiteRtParamIndex i = 0; i < count; i++) {
    const char* name;
    LiteRtTensor tensor;
    LiteRtTensorBufferRequirements requirements;
    check(LiteRtGetSignatureOutputName(signature, i, &name), "LiteRtGetSignatureOutputName");
    check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "LiteRtGetSignatureOutputTensorByIndex");
    check(LiteRtGetCompiledModelOutputBufferRequirements(compiled, 0, i, &requirements), "output requirements");
    outputs.push_back(make_tensor(environment, name, tensor, requirements));
  }

  std::vector<LiteRtTensorBuffer> in, out;
  for (const Tensor& t : inputs) in.push_back(t.buffer);
  for (const Tensor& t : outputs) out.push_back(t.buffer);
  std::vector<double> times;
  for (int i = 0; i < kRuns; i++) {
    const auto start = std::chrono::steady_clock::now();
    check(LiteRtRunCompiledModel(compiled, 0, in.size(), in.data(), out.size(), out.data()), "LiteRtRunCompiledModel");
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  for (const Tensor& t : outputs) print(t);
  std::sort(times.begin(), times.end());
  std::fprintf(stderr, "%.3f ms (median of %d)\n", times[times.size() / 2], kRuns);

  for (LiteRtTensorBuffer buffer : in) LiteRtDestroyTensorBuffer(buffer);
  for (LiteRtTensorBuffer buffer : out) LiteRtDestroyTensorBuffer(buffer);
  LiteRtDestroyCompiledModel(compiled);
  LiteRtDestroyOptions(options);
  LiteRtDestroyModel(model);
  LiteRtDestroyEnvironment(environment);
  return 0;
}
