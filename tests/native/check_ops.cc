// The TensorFlow ops without TensorFlow, which does not survive sanitizers: this plays its part of the C API.
//   check_ops libkbs_tf.so
// Compiled twice: as the libtensorflow_framework.so.2 that the ops look for, and with KBS_MAIN as the program.
#ifdef KBS_MAIN
extern "C" int check_ops(const char* library);
int main(int argc, char** argv) { return check_ops(argc > 1 ? argv[1] : "libkbs_tf.so"); }
#else
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kbs.h"
#include "tf_api.h"

using Dims = std::vector<int64_t>;

struct TF_Status {
  TF_Code code = TF_OK;
  std::string message;
};
struct TF_Tensor {
  Dims dims;
  size_t elements, bytes;
  std::shared_ptr<char> data;  // exactly as many bytes, so that sanitizers see what is read behind them
};
struct TF_ShapeHandle {
  bool known = false;
  Dims dims;
};
struct TF_DimensionHandle {
  int64_t size = -1;
};
struct TF_ShapeInferenceContext {
  std::vector<TF_ShapeHandle> inputs;
  std::map<int, TF_ShapeHandle> outputs;
};
struct TF_OpDefinitionBuilder {
  std::string name;
  std::vector<std::string> inputs, outputs, attributes;
  void (*shape)(TF_ShapeInferenceContext*, TF_Status*) = nullptr;
};
struct TF_KernelBuilder {
  void* (*create)(TF_OpKernelConstruction*);
  void (*compute)(void*, TF_OpKernelContext*);
  void (*destroy)(void*);
};
struct TF_OpKernelConstruction {
  std::map<std::string, std::string> texts;
  std::map<std::string, double> numbers;
  TF_Status failure;
};
struct TF_OpKernelContext {
  std::vector<TF_Tensor> inputs;
  std::map<int, TF_Tensor> outputs;
  TF_Status failure;
};

namespace {

std::map<std::string, std::unique_ptr<TF_OpDefinitionBuilder>> definitions;
std::map<std::string, std::unique_ptr<TF_KernelBuilder>> kernels;
bool failing = false;        // whether one of the functions that may fail will
int calls_until_failure = 0;

bool fails(TF_Status* status) {
  if (!failing || calls_until_failure-- != 0) {
    status->code = TF_OK;
    return false;
  }
  *status = {TF_RESOURCE_EXHAUSTED, "made to fail"};
  return true;
}

TF_Tensor make_tensor(const Dims& dims, size_t item) {
  size_t elements = 1;
  for (int64_t side : dims) elements *= (size_t)side;
  const size_t bytes = elements * item;
  void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
  if (data) std::memset(data, 0, bytes);
  return {dims, elements, bytes, std::shared_ptr<char>((char*)data, std::free)};
}

}  // namespace

#define FAKE __attribute__((visibility("default")))
extern "C" {
FAKE TF_Status* TF_NewStatus() { return new TF_Status; }
FAKE void TF_DeleteStatus(TF_Status* s) { delete s; }
FAKE void TF_SetStatus(TF_Status* s, TF_Code code, const char* message) { *s = {code, message}; }
FAKE TF_Code TF_GetCode(const TF_Status* s) { return s->code; }
FAKE const char* TF_Message(const TF_Status* s) { return s->message.c_str(); }

FAKE void* TF_TensorData(const TF_Tensor* t) { return t->data.get(); }
FAKE size_t TF_TensorByteSize(const TF_Tensor* t) { return t->bytes; }
FAKE int64_t TF_TensorElementCount(const TF_Tensor* t) { return (int64_t)t->elements; }
FAKE int TF_NumDims(const TF_Tensor* t) { return (int)t->dims.size(); }
FAKE int64_t TF_Dim(const TF_Tensor* t, int i) { return t->dims.at((size_t)i); }
FAKE void TF_DeleteTensor(TF_Tensor* t) { delete t; }

FAKE TF_OpDefinitionBuilder* TF_NewOpDefinitionBuilder(const char* name) { return new TF_OpDefinitionBuilder{name, {}, {}, {}}; }
FAKE void TF_OpDefinitionBuilderAddAttr(TF_OpDefinitionBuilder* b, const char* spec) { b->attributes.push_back(spec); }
FAKE void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder* b, const char* spec) { b->inputs.push_back(spec); }
FAKE void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder* b, const char* spec) { b->outputs.push_back(spec); }
FAKE void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder* b,
                                                          void (*f)(TF_ShapeInferenceContext*, TF_Status*)) {
  b->shape = f;
}
FAKE void TF_RegisterOpDefinition(TF_OpDefinitionBuilder* b, TF_Status*) { definitions[b->name].reset(b); }

FAKE TF_ShapeHandle* TF_NewShapeHandle() { return new TF_ShapeHandle; }
FAKE void TF_DeleteShapeHandle(TF_ShapeHandle* h) { delete h; }
FAKE TF_DimensionHandle* TF_NewDimensionHandle() { return new TF_DimensionHandle; }
FAKE void TF_DeleteDimensionHandle(TF_DimensionHandle* h) { delete h; }
FAKE int64_t TF_DimensionHandleValue(TF_DimensionHandle* h) { return h->size; }
FAKE void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext* c, int i, TF_ShapeHandle* h, TF_Status* s) {
  if (!fails(s)) *h = c->inputs.at((size_t)i);
}
FAKE void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext* c, int i, TF_ShapeHandle* h, TF_Status* s) {
  if (!fails(s)) c->outputs[i] = *h;
}
FAKE TF_ShapeHandle* TF_ShapeInferenceContextVectorFromSize(TF_ShapeInferenceContext*, size_t size) {
  return new TF_ShapeHandle{true, {(int64_t)size}};
}
FAKE void TF_ShapeInferenceContextWithRank(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t rank, TF_ShapeHandle* out,
                                           TF_Status* s) {
  if (fails(s)) return;
  if (h->known && (int64_t)h->dims.size() != rank) {
    *s = {TF_INVALID_ARGUMENT, "another rank"};
    return;
  }
  *out = h->known ? *h : TF_ShapeHandle{true, Dims((size_t)rank, -1)};
}
FAKE void TF_ShapeInferenceContextWithRankAtLeast(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t rank,
                                                  TF_ShapeHandle* out, TF_Status* s) {
  if (fails(s)) return;
  if (h->known && (int64_t)h->dims.size() < rank) {
    *s = {TF_INVALID_ARGUMENT, "too low a rank"};
    return;
  }
  *out = *h;
}
FAKE void TF_ShapeInferenceContextDim(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t i, TF_DimensionHandle* out) {
  out->size = h->known ? h->dims.at((size_t)i) : -1;
}
FAKE void TF_ShapeInferenceContextSubshape(TF_ShapeInferenceContext*, TF_ShapeHandle* h, int64_t begin, int64_t end,
                                           TF_ShapeHandle* out, TF_Status* s) {
  if (fails(s)) return;
  *out = {h->known, {}};
  if (!h->known) return;
  if (end < 0) end += (int64_t)h->dims.size();
  out->dims.assign(h->dims.begin() + begin, h->dims.begin() + end);
}
FAKE void TF_ShapeInferenceContextConcatenateShapes(TF_ShapeInferenceContext*, TF_ShapeHandle* a, TF_ShapeHandle* b,
                                                    TF_ShapeHandle* out, TF_Status* s) {
  if (fails(s)) return;
  *out = {a->known && b->known, a->dims};
  out->dims.insert(out->dims.end(), b->dims.begin(), b->dims.end());
}

FAKE TF_KernelBuilder* TF_NewKernelBuilder(const char*, const char*, void* (*create)(TF_OpKernelConstruction*),
                                           void (*compute)(void*, TF_OpKernelContext*), void (*destroy)(void*)) {
  return new TF_KernelBuilder{create, compute, destroy};
}
FAKE void TF_RegisterKernelBuilder(const char* name, TF_KernelBuilder* b, TF_Status*) { kernels[name].reset(b); }
FAKE void TF_OpKernelConstruction_Failure(TF_OpKernelConstruction* c, TF_Status* s) { c->failure = *s; }
FAKE void TF_OpKernelConstruction_GetAttrSize(TF_OpKernelConstruction* c, const char* name, int32_t* list, int32_t* size,
                                              TF_Status* s) {
  if (fails(s)) return;
  *list = -1;
  *size = (int32_t)c->texts.at(name).size();
}
FAKE void TF_OpKernelConstruction_GetAttrString(TF_OpKernelConstruction* c, const char* name, char* value, size_t size,
                                                TF_Status* s) {
  if (!fails(s)) std::memcpy(value, c->texts.at(name).data(), std::min(size, c->texts.at(name).size()));
}
FAKE void TF_OpKernelConstruction_GetAttrInt32(TF_OpKernelConstruction* c, const char* name, int32_t* value, TF_Status* s) {
  if (!fails(s)) *value = (int32_t)c->numbers.at(name);
}
FAKE void TF_OpKernelConstruction_GetAttrFloat(TF_OpKernelConstruction* c, const char* name, float* value, TF_Status* s) {
  if (!fails(s)) *value = (float)c->numbers.at(name);
}
FAKE void TF_OpKernelConstruction_GetAttrBool(TF_OpKernelConstruction* c, const char* name, unsigned char* value,
                                              TF_Status* s) {
  if (!fails(s)) *value = c->numbers.at(name) != 0;
}
FAKE void TF_OpKernelContext_Failure(TF_OpKernelContext* c, TF_Status* s) { c->failure = *s; }
FAKE void TF_GetInput(TF_OpKernelContext* c, int i, TF_Tensor** tensor, TF_Status* s) {
  if (!fails(s)) *tensor = new TF_Tensor(c->inputs.at((size_t)i));
}
FAKE TF_Tensor* TF_AllocateOutput(TF_OpKernelContext* c, int i, TF_DataType, const int64_t* dims, int rank, size_t,
                                  TF_Status* s) {
  if (fails(s)) return nullptr;
  c->outputs[i] = make_tensor(Dims(dims, dims + rank), sizeof(float));
  return new TF_Tensor(c->outputs[i]);
}
}  // extern "C"

namespace {

int failures = 0;

void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("wrong: %s\n", what.c_str());
  failures++;
}

TF_Tensor floats(const Dims& dims) {
  TF_Tensor tensor = make_tensor(dims, sizeof(float));
  for (size_t i = 0; i < tensor.elements; i++) ((float*)tensor.data.get())[i] = (float)std::rand() / (float)RAND_MAX - 0.5f;
  return tensor;
}

// A matrix as the ops take it.
struct Parts {
  std::string structure;
  TF_Tensor values;

  Parts(int64_t rows, int64_t cols, int64_t gates, int64_t side, int dtype = KBS_FLOAT32) {
    std::vector<float> w((size_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++) w[(size_t)i] = i / cols / side % 3 == 0 ? (float)(i % 7) * 0.1f : 0.f;
    int64_t bytes;
    kbs_packed_bytes(w.data(), rows, cols, gates, side, side, dtype, nullptr, &bytes);
    std::vector<char> packed((size_t)bytes);
    kbs_pack(w.data(), rows, cols, gates, side, side, dtype, nullptr, packed.data(), bytes);
    kbs_info info;
    kbs_inspect(packed.data(), bytes, &info);
    structure.assign(packed.data(), (size_t)info.values_offset);
    const bool whole = dtype == KBS_FLOAT32;
    values = make_tensor({info.values_bytes / (whole ? 4 : 1)}, whole ? 4 : 1);
    std::memcpy(values.data.get(), packed.data() + info.values_offset, (size_t)info.values_bytes);
  }
};

struct Case {
  std::string op;
  TF_OpKernelConstruction attributes;
  std::vector<TF_Tensor> inputs;
};

// Makes the kernel, runs it, and compares the shapes of its outputs with what its shape function said.
bool run(const Case& c, std::map<int, TF_Tensor>* outputs = nullptr) {
  const std::string name = "KerasBlocksparse>" + c.op;
  TF_OpKernelConstruction construction = c.attributes;
  void* op = kernels.at(name)->create(&construction);
  if (!op) {
    expect(construction.failure.code != TF_OK, name + " was not made, without a word");
    return false;
  }
  TF_OpKernelContext context{c.inputs, {}, {}};
  kernels.at(name)->compute(op, &context);
  kernels.at(name)->destroy(op);
  if (context.failure.code != TF_OK) return false;
  TF_ShapeInferenceContext shapes;
  for (const TF_Tensor& input : c.inputs) shapes.inputs.push_back({true, input.dims});
  TF_Status status;
  definitions.at(name)->shape(&shapes, &status);
  if (!failing) expect(status.code == TF_OK, name + ": shapes: " + status.message);
  for (const auto& [i, shape] : shapes.outputs) {
    const Dims& real = context.outputs.at(i).dims;
    bool same = !shape.known || shape.dims.size() == real.size();
    for (size_t d = 0; same && shape.known && d < real.size(); d++) same = shape.dims[d] == -1 || shape.dims[d] == real[d];
    expect(same, name + ": the shape of output " + std::to_string(i));
  }
  if (outputs) *outputs = context.outputs;
  return true;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (int dtype : {KBS_FLOAT32, KBS_BFLOAT16, KBS_INT8}) {
    const Parts m(20, 27, 3, 4, dtype);
    for (bool transposed : {false, true}) {
      if (dtype == KBS_INT8 && transposed) continue;
      for (bool biased : {false, true})
        cases.push_back({"Matmul",
                         {{{"structure", m.structure}}, {{"transposed", transposed}}, {}},
                         {floats({2, 5, transposed ? 27 : 20}), m.values, floats({biased ? (transposed ? 20 : 27) : 0})}});
    }
  }
  const Parts m(20, 27, 3, 4);
  cases.push_back({"SampledProduct", {{{"structure", m.structure}}, {}, {}}, {floats({2, 5, 20}), floats({2, 5, 27})}});
  for (int cell : {KBS_SIMPLE_RNN, KBS_GRU, KBS_LSTM})
    for (int options = 0; options < 16; options++) {
      const bool reset_after = options & 1, sequences = options & 2, masked = options & 4, biased = options & 8;
      const int64_t gates = cell == KBS_SIMPLE_RNN ? 1 : cell == KBS_GRU ? 3 : 4, units = 9, batch = 3, steps = 4;
      const Parts kernel(7, gates * units, gates, 4), recurrent(units, gates * units, gates, 4);
      Case forward{"Rnn", {{{"kernel", kernel.structure}, {"recurrent", recurrent.structure}}, {}, {}}, {}};
      forward.attributes.numbers = {
          {"cell", cell},       {"activation", KBS_TANH}, {"recurrent_activation", KBS_SIGMOID}, {"activation_limit", 0},
          {"recurrent_limit", 0}, {"reset_after", reset_after}, {"go_backwards", masked}, {"return_sequences", sequences},
          {"zero_output_for_mask", biased}, {"reserve", 1}};
      const Dims c = cell == KBS_LSTM ? Dims{batch, units} : Dims{0};
      const Dims bias = !biased ? Dims{0} : cell == KBS_GRU && reset_after ? Dims{2, gates * units} : Dims{gates * units};
      TF_Tensor mask = make_tensor(masked ? Dims{batch, steps} : Dims{0, 0}, 1);
      for (size_t i = 0; i < mask.elements; i++) mask.data.get()[i] = i % 3 != 0;
      forward.inputs = {floats({batch, steps, 7}), mask, floats({batch, units}), floats(c), kernel.values, recurrent.values,
                        floats(bias)};
      std::map<int, TF_Tensor> outputs;
      expect(run(forward, &outputs), "Rnn");
      Case backward = forward;
      backward.op = "RnnGrad";
      for (const TF_Tensor& input : {outputs[3], floats(outputs[0].dims), floats({batch, units}), floats(c)})
        backward.inputs.push_back(input);
      cases.push_back(forward);
      cases.push_back(backward);
      backward.inputs[7] = floats({0});  // nothing was kept: the run is repeated
      cases.push_back(backward);
    }
  return cases;
}

// y = x W + b and its transpose, by loops over the dense matrix.
void check_products() {
  const int64_t rows = 20, cols = 27, batch = 5;
  const Parts m(rows, cols, 3, 4);
  for (bool transposed : {false, true}) {
    const int64_t in = transposed ? cols : rows, out = transposed ? rows : cols;
    const TF_Tensor x = floats({batch, in}), bias = floats({out});
    std::map<int, TF_Tensor> outputs;
    expect(run({"Matmul", {{{"structure", m.structure}}, {{"transposed", transposed}}, {}}, {x, m.values, bias}}, &outputs),
           "Matmul");
    const float *X = (float*)x.data.get(), *B = (float*)bias.data.get(), *y = (float*)outputs[0].data.get();
    for (int64_t b = 0; b < batch; b++)
      for (int64_t o = 0; o < out; o++) {
        double sum = B[o];
        for (int64_t i = 0; i < in; i++) {
          const int64_t at = transposed ? o * cols + i : i * cols + o;
          sum += (double)X[b * in + i] * (at / cols / 4 % 3 == 0 ? (float)(at % 7) * 0.1f : 0.f);
        }
        expect(std::fabs(sum - y[b * out + o]) < 1e-4, "a product's number");
      }
  }
}

int random_below(int n) { return std::rand() % n; }

// Inputs of other shapes and structures with other bytes: an error, or a result, and never a wild read.
void check_hostile(const std::vector<Case>& cases) {
  int refused = 0;
  for (int i = 0; i < 4000; i++) {
    Case c = cases[(size_t)random_below((int)cases.size())];
    if (random_below(3)) {
      TF_Tensor& input = c.inputs[(size_t)random_below((int)c.inputs.size())];
      const size_t item = input.elements ? input.bytes / input.elements : sizeof(float);
      Dims dims = input.dims;
      switch (random_below(3)) {
        case 0: if (!dims.empty()) dims.pop_back(); break;
        case 1: dims.push_back(random_below(3)); break;
        default: if (!dims.empty()) dims[(size_t)random_below((int)dims.size())] = random_below(12);
      }
      input = make_tensor(dims, item);
    } else {
      auto text = c.attributes.texts.begin();
      std::advance(text, random_below((int)c.attributes.texts.size()));
      if (random_below(2)) {
        text->second.resize((size_t)random_below((int)text->second.size()));
      } else {
        text->second[(size_t)random_below((int)text->second.size())] ^= (char)(1 << random_below(8));
      }
    }
    const bool done = run(c);
    refused += !done;
  }
  expect(refused > 1000, "most nonsense is refused");
}

// Whatever TensorFlow refuses, at any call, comes back as an error.
void check_failing_calls(const std::vector<Case>& cases) {
  for (size_t i = 0; i < cases.size(); i += 7)
    for (int calls = 0; calls < 40; calls++) {
      failing = true;
      calls_until_failure = calls;
      run(cases[i]);
      failing = false;
    }
}

}  // namespace

extern "C" FAKE int check_ops(const char* library) {
  if (!dlopen(library, RTLD_NOW)) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  expect(kernels.size() == 4 && definitions.size() == 4, "four ops are registered");
  if (failures) return 1;
  const std::vector<Case> cases = all_cases();
  for (const Case& c : cases) expect(run(c), c.op + " runs");
  check_products();
  check_hostile(cases);
  check_failing_calls(cases);
  std::printf("TensorFlow ops: %d wrong\n", failures);
  return failures != 0;
}
#endif
