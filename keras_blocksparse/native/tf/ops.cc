// libkbs_tf: libkbs as TensorFlow ops, over TensorFlow's C API.
//
// A matrix comes in two parts. Its structure, which blocks are kept, is an attribute: it is checked once, when the
// kernel is made, and a saved graph carries it. Its values are an input: they may be a variable that is being trained.
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "kbs.h"
#include "tf_api.h"

namespace kbs {
namespace {

TfApi tf;
std::string load_error;  // why there are no ops, empty if there are

// ---- errors: thrown here, a TF_Status outside ------------------------------------------------------------------------

struct Failure {
  TF_Code code;
  std::string message;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void invalid(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  throw Failure{TF_INVALID_ARGUMENT, text};
}

void must(kbs_status status) {
  switch (status) {
    case KBS_OK: return;
    case KBS_INVALID_ARGUMENT: throw Failure{TF_INVALID_ARGUMENT, kbs_last_error()};
    case KBS_CORRUPT: throw Failure{TF_DATA_LOSS, kbs_last_error()};
    case KBS_UNSUPPORTED: throw Failure{TF_UNIMPLEMENTED, kbs_last_error()};
    case KBS_OUT_OF_MEMORY: throw Failure{TF_RESOURCE_EXHAUSTED, kbs_last_error()};
    case KBS_INTERNAL: break;
  }
  throw Failure{TF_INTERNAL, kbs_last_error()};
}

class Status {
 public:
  Status() : status_(tf.TF_NewStatus()) {}
  Status(const Status&) = delete;
  ~Status() { tf.TF_DeleteStatus(status_); }
  operator TF_Status*() { return status_; }
  void check() const {
    if (tf.TF_GetCode(status_) != TF_OK) throw Failure{tf.TF_GetCode(status_), tf.TF_Message(status_)};
  }

 private:
  TF_Status* status_;
};

// Runs `body`; what it throws goes to `report(status)`.
template <class Body, class Report>
void guarded(const Body& body, const Report& report) noexcept {
  Failure failure{TF_OK, {}};
  try {
    body();
    return;
  } catch (const Failure& thrown) {
    failure = thrown;
  } catch (const std::bad_alloc&) {
    failure = {TF_RESOURCE_EXHAUSTED, "out of memory"};
  } catch (...) {
    failure = {TF_INTERNAL, "unexpected exception"};
  }
  Status status;
  tf.TF_SetStatus(status, failure.code, failure.message.c_str());
  report(status);
}

// ---- tensors and attributes ------------------------------------------------------------------------------------------

class Tensor {
 public:
  explicit Tensor(TF_Tensor* tensor) : tensor_(tensor) {}
  Tensor(const Tensor&) = delete;
  ~Tensor() { tf.TF_DeleteTensor(tensor_); }
  template <class T>
  T* data() const { return (T*)tf.TF_TensorData(tensor_); }
  // Null if there are no elements, as an input has that was left out.
  template <class T>
  T* data_if_any() const { return size() ? data<T>() : nullptr; }
  // An address even if there are no elements: values of a matrix without blocks.
  const void* values() const { return size() ? data<void>() : this; }
  int64_t size() const { return tf.TF_TensorElementCount(tensor_); }
  size_t bytes() const { return tf.TF_TensorByteSize(tensor_); }
  int rank() const { return tf.TF_NumDims(tensor_); }
  int64_t dim(int i) const { return tf.TF_Dim(tensor_, i); }
  std::vector<int64_t> shape() const {
    std::vector<int64_t> dims((size_t)rank());
    for (int i = 0; i < rank(); i++) dims[(size_t)i] = dim(i);
    return dims;
  }
  std::string shape_text() const {
    std::string text = "(";
    for (int64_t side : shape()) text += (text.size() > 1 ? ", " : "") + std::to_string(side);
    return text + ")";
  }

 private:
  TF_Tensor* tensor_;
};

class Context {
 public:
  explicit Context(TF_OpKernelContext* context) : context_(context) {}
  Tensor input(int i) {
    TF_Tensor* tensor = nullptr;
    tf.TF_GetInput(context_, i, &tensor, status_);
    status_.check();
    return Tensor(tensor);
  }
  Tensor output(int i, const std::vector<int64_t>& shape) {
    size_t elements = 1;
    for (int64_t side : shape) elements *= (size_t)side;
    TF_Tensor* tensor =
        tf.TF_AllocateOutput(context_, i, TF_FLOAT, shape.data(), (int)shape.size(), elements * sizeof(float), status_);
    status_.check();
    return Tensor(tensor);
  }

 private:
  TF_OpKernelContext* context_;
  Status status_;
};

class Attributes {
 public:
  explicit Attributes(TF_OpKernelConstruction* construction) : construction_(construction) {}
  std::string text(const char* name) {
    int32_t list, size;
    tf.TF_OpKernelConstruction_GetAttrSize(construction_, name, &list, &size, status_);
    status_.check();
    std::string value((size_t)size, '\0');
    tf.TF_OpKernelConstruction_GetAttrString(construction_, name, value.data(), value.size(), status_);
    status_.check();
    return value;
  }
  int32_t integer(const char* name) {
    int32_t value;
    tf.TF_OpKernelConstruction_GetAttrInt32(construction_, name, &value, status_);
    status_.check();
    return value;
  }
  float real(const char* name) {
    float value;
    tf.TF_OpKernelConstruction_GetAttrFloat(construction_, name, &value, status_);
    status_.check();
    return value;
  }
  bool flag(const char* name) {
    unsigned char value;
    tf.TF_OpKernelConstruction_GetAttrBool(construction_, name, &value, status_);
    status_.check();
    return value != 0;
  }

 private:
  TF_OpKernelConstruction* construction_;
  Status status_;
};

// ---- matrices --------------------------------------------------------------------------------------------------------

// A structure from an attribute.
class Matrix {
 public:
  Matrix(Attributes& attributes, const char* name) {
    const std::string structure = attributes.text(name);
    must(kbs_matrix_create(structure.data(), (int64_t)structure.size(), KBS_COPY | KBS_STRUCTURE, &matrix_));
    must(kbs_matrix_info(matrix_, &info_));
  }
  Matrix(const Matrix&) = delete;
  ~Matrix() { kbs_matrix_destroy(matrix_); }
  operator const kbs_matrix*() const { return matrix_; }
  const kbs_info* operator->() const { return &info_; }
  void check_values(const Tensor& values, const char* name) const {
    if ((int64_t)values.bytes() != info_.values_bytes)
      invalid("`%s` must hold the %lld bytes that the matrix's structure has room for. Received: shape=%s, %zu bytes", name,
              (long long)info_.values_bytes, values.shape_text().c_str(), values.bytes());
  }

 private:
  kbs_matrix* matrix_ = nullptr;
  kbs_info info_;
};

// ---- ops -------------------------------------------------------------------------------------------------------------

// y = x W + bias, or x W^T + bias
class Matmul {
 public:
  explicit Matmul(Attributes& attributes)
      : matrix_(attributes, "structure"), transposed_(attributes.flag("transposed")) {}

  void compute(Context& context) const {
    const Tensor x = context.input(0), values = context.input(1), bias = context.input(2);
    const int64_t rows = transposed_ ? matrix_->cols : matrix_->rows, cols = transposed_ ? matrix_->rows : matrix_->cols;
    matrix_.check_values(values, "values");
    if (x.rank() < 1 || x.dim(x.rank() - 1) != rows)
      invalid("`x` must end with the matrix's %lld rows. Received: shape=%s", (long long)rows, x.shape_text().c_str());
    if (bias.rank() != 1 || (bias.size() != 0 && bias.size() != cols))
      invalid("`bias` must have the matrix's %lld columns. Received: shape=%s", (long long)cols, bias.shape_text().c_str());
    std::vector<int64_t> shape = x.shape();
    shape.back() = cols;
    const Tensor y = context.output(0, shape);
    const int64_t batch = x.size() / rows;
    const float* add = bias.data_if_any<float>();
    if (!transposed_) {
      must(kbs_matmul(matrix_, values.values(), x.data<float>(), rows, batch, add, 0, y.data<float>(), cols));
      return;
    }
    must(kbs_matmul_transposed(matrix_, values.values(), x.data<float>(), rows, batch, y.data<float>(), cols));
    if (!add) return;
    for (int64_t i = 0; i < batch; i++)
      for (int64_t c = 0; c < cols; c++) y.data<float>()[i * cols + c] += add[c];
  }

 private:
  const Matrix matrix_;
  const bool transposed_;
};

// x^T dy where the structure has blocks
class SampledProduct {
 public:
  explicit SampledProduct(Attributes& attributes) : matrix_(attributes, "structure") {}

  void compute(Context& context) const {
    const Tensor x = context.input(0), dy = context.input(1);
    const int64_t rows = matrix_->rows, cols = matrix_->cols;
    if (x.rank() < 1 || x.dim(x.rank() - 1) != rows || dy.rank() < 1 || dy.dim(dy.rank() - 1) != cols ||
        x.size() / rows != dy.size() / cols)
      invalid("`x` (..., %lld) and `dy` (..., %lld) must agree in all but the last dimension. Received: shapes %s and %s",
              (long long)rows, (long long)cols, x.shape_text().c_str(), dy.shape_text().c_str());
    const Tensor dvalues = context.output(0, {matrix_->values_bytes / (int64_t)sizeof(float)});
    if (dvalues.size() == 0) return;
    must(kbs_sampled_product(matrix_, x.data<float>(), rows, dy.data<float>(), cols, x.size() / rows, 0,
                             dvalues.data<float>()));
  }

 private:
  const Matrix matrix_;
};

// A recurrent layer over a whole sequence; what Rnn and RnnGrad have in common.
class Layer {
 public:
  explicit Layer(Attributes& attributes)
      : kernel_(attributes, "kernel"),
        recurrent_(attributes, "recurrent"),
        cell_(attributes.integer("cell")),
        reset_after_(attributes.flag("reset_after")),
        go_backwards_(attributes.flag("go_backwards")),
        return_sequences_(attributes.flag("return_sequences")),
        zero_output_for_mask_(attributes.flag("zero_output_for_mask")) {
    kbs_rnn_config config{};
    config.cell = cell_;
    config.activation = attributes.integer("activation");
    config.recurrent_activation = attributes.integer("recurrent_activation");
    config.reset_after = reset_after_;
    config.activation_limit = attributes.real("activation_limit");
    config.recurrent_limit = attributes.real("recurrent_limit");
    config.kernel = kernel_;
    config.recurrent = recurrent_;
    must(kbs_rnn_create(&config, &rnn_));
  }
  Layer(const Layer&) = delete;
  ~Layer() { kbs_rnn_destroy(rnn_); }

 protected:
  // The inputs that both ops begin with, checked.
  struct Inputs {
    Tensor x, mask, initial_h, initial_c, kernel_values, recurrent_values, bias;
    explicit Inputs(Context& context)
        : x(context.input(0)), mask(context.input(1)), initial_h(context.input(2)), initial_c(context.input(3)),
          kernel_values(context.input(4)), recurrent_values(context.input(5)), bias(context.input(6)) {}
  };

  kbs_rnn_call call(const Inputs& in) const {
    const int64_t units = recurrent_->rows;
    if (in.x.rank() != 3 || in.x.dim(2) != kernel_->rows)
      invalid("`x` must have shape (batch, steps, %lld). Received: shape=%s", (long long)kernel_->rows,
              in.x.shape_text().c_str());
    const int64_t batch = in.x.dim(0), steps = in.x.dim(1);
    if (in.mask.size() && (in.mask.rank() != 2 || in.mask.dim(0) != batch || in.mask.dim(1) != steps))
      invalid("`mask` must have shape (%lld, %lld). Received: shape=%s", (long long)batch, (long long)steps,
              in.mask.shape_text().c_str());
    check_state(in.initial_h, "initial_h", batch);
    if (cell_ == KBS_LSTM) check_state(in.initial_c, "initial_c", batch);
    kernel_.check_values(in.kernel_values, "kernel_values");
    recurrent_.check_values(in.recurrent_values, "recurrent_values");
    const int64_t biases = recurrent_->cols * (cell_ == KBS_GRU && reset_after_ ? 2 : 1);
    if (in.bias.size() && in.bias.size() != biases)
      invalid("`bias` must hold %lld numbers for %lld units. Received: shape=%s", (long long)biases, (long long)units,
              in.bias.shape_text().c_str());
    kbs_rnn_call call{};
    call.batch = batch;
    call.steps = steps;
    call.x = in.x.data<float>();
    call.mask = in.mask.data_if_any<uint8_t>();
    call.initial_h = in.initial_h.data_if_any<float>();
    call.initial_c = cell_ == KBS_LSTM ? in.initial_c.data_if_any<float>() : nullptr;
    call.go_backwards = go_backwards_;
    call.return_sequences = return_sequences_;
    call.zero_output_for_mask = zero_output_for_mask_;
    call.kernel_values = in.kernel_values.values();
    call.recurrent_values = in.recurrent_values.values();
    call.bias = in.bias.data_if_any<float>();
    return call;
  }

  const Matrix kernel_, recurrent_;
  const int32_t cell_;
  const bool reset_after_, go_backwards_, return_sequences_, zero_output_for_mask_;
  kbs_rnn* rnn_ = nullptr;

 private:
  void check_state(const Tensor& state, const char* name, int64_t batch) const {
    if (state.rank() != 2 || state.dim(0) != batch || state.dim(1) != recurrent_->rows)
      invalid("`%s` must have shape (%lld, %lld). Received: shape=%s", name, (long long)batch,
              (long long)recurrent_->rows, state.shape_text().c_str());
  }
};

class Rnn : Layer {
 public:
  explicit Rnn(Attributes& attributes) : Layer(attributes), reserve_(attributes.flag("reserve")) {}

  void compute(Context& context) const {
    const Inputs in(context);
    kbs_rnn_call call = this->call(in);
    int64_t reserved = 0;
    if (reserve_) must(kbs_rnn_reserve_bytes(rnn_, call.batch, call.steps, &reserved));
    const Tensor y = context.output(0, {call.batch, return_sequences_ ? call.steps : 1, recurrent_->rows});
    const Tensor final_h = context.output(1, in.initial_h.shape()), final_c = context.output(2, in.initial_c.shape());
    const Tensor reserve = context.output(3, {reserved / (int64_t)sizeof(float)});
    call.y = y.data<float>();
    call.final_h = final_h.data_if_any<float>();
    call.final_c = call.initial_c ? final_c.data<float>() : nullptr;
    call.reserve = reserve.data_if_any<void>();
    must(kbs_rnn_run(rnn_, &call));
  }

 private:
  const bool reserve_;
};

class RnnGrad : Layer {
 public:
  explicit RnnGrad(Attributes& attributes) : Layer(attributes) {}

  void compute(Context& context) const {
    const Inputs in(context);
    kbs_rnn_call call = this->call(in);
    const Tensor reserve = context.input(7), dy = context.input(8), dfinal_h = context.input(9), dfinal_c = context.input(10);
    int64_t reserved = 0;
    must(kbs_rnn_reserve_bytes(rnn_, call.batch, call.steps, &reserved));
    if (reserve.size() && (int64_t)reserve.bytes() != reserved)
      invalid("`reserve` must hold the %lld bytes of this run. Received: %zu bytes", (long long)reserved, reserve.bytes());
    if (dy.size() != call.batch * (return_sequences_ ? call.steps : 1) * recurrent_->rows ||
        dfinal_h.shape() != in.initial_h.shape() || dfinal_c.shape() != in.initial_c.shape())
      invalid("gradients of shapes %s, %s and %s do not fit the outputs", dy.shape_text().c_str(),
              dfinal_h.shape_text().c_str(), dfinal_c.shape_text().c_str());
    const Tensor dx = context.output(0, in.x.shape()), dh = context.output(1, in.initial_h.shape()),
                 dc = context.output(2, in.initial_c.shape()), dkernel = context.output(3, in.kernel_values.shape()),
                 drecurrent = context.output(4, in.recurrent_values.shape()), dbias = context.output(5, in.bias.shape());
    call.reserve = reserve.data_if_any<void>();
    kbs_rnn_gradients gradients{};
    gradients.dy = dy.data_if_any<float>();
    gradients.dfinal_h = dfinal_h.data_if_any<float>();
    gradients.dfinal_c = cell_ == KBS_LSTM ? dfinal_c.data_if_any<float>() : nullptr;
    gradients.dx = dx.data_if_any<float>();
    gradients.dinitial_h = dh.data_if_any<float>();
    gradients.dinitial_c = cell_ == KBS_LSTM ? dc.data_if_any<float>() : nullptr;
    gradients.dkernel_values = dkernel.data_if_any<float>();
    gradients.drecurrent_values = drecurrent.data_if_any<float>();
    gradients.dbias = dbias.data_if_any<float>();
    must(kbs_rnn_backward(rnn_, &call, &gradients));
  }
};

// ---- shapes ----------------------------------------------------------------------------------------------------------

class Shapes {
 public:
  Shapes(TF_ShapeInferenceContext* context, TF_Status* status) : context_(context), status_(status) {}
  ~Shapes() {
    for (TF_ShapeHandle* handle : handles_) tf.TF_DeleteShapeHandle(handle);
  }
  TF_ShapeHandle* input(int i) {
    TF_ShapeHandle* handle = make();
    tf.TF_ShapeInferenceContextGetInput(context_, i, handle, status_);
    return check(handle);
  }
  TF_ShapeHandle* with_rank(TF_ShapeHandle* shape, int64_t rank) {
    TF_ShapeHandle* handle = make();
    tf.TF_ShapeInferenceContextWithRank(context_, shape, rank, handle, status_);
    return check(handle);
  }
  TF_ShapeHandle* with_rank_at_least(TF_ShapeHandle* shape, int64_t rank) {
    TF_ShapeHandle* handle = make();
    tf.TF_ShapeInferenceContextWithRankAtLeast(context_, shape, rank, handle, status_);
    return check(handle);
  }
  TF_ShapeHandle* part(TF_ShapeHandle* shape, int64_t begin, int64_t end) {
    TF_ShapeHandle* handle = make();
    tf.TF_ShapeInferenceContextSubshape(context_, shape, begin, end, handle, status_);
    return check(handle);
  }
  TF_ShapeHandle* joined(TF_ShapeHandle* first, TF_ShapeHandle* second) {
    TF_ShapeHandle* handle = make();
    tf.TF_ShapeInferenceContextConcatenateShapes(context_, first, second, handle, status_);
    return check(handle);
  }
  TF_ShapeHandle* unknown_vector() {
    handles_.push_back(tf.TF_ShapeInferenceContextVectorFromSize(context_, (size_t)-1));
    return handles_.back();
  }
  bool empty_vector(TF_ShapeHandle* vector) {
    TF_DimensionHandle* size = tf.TF_NewDimensionHandle();
    tf.TF_ShapeInferenceContextDim(context_, vector, 0, size);
    const bool empty = tf.TF_DimensionHandleValue(size) == 0;  // -1 if it is not known
    tf.TF_DeleteDimensionHandle(size);
    return empty;
  }
  void set_output(int i, TF_ShapeHandle* shape) {
    tf.TF_ShapeInferenceContextSetOutput(context_, i, shape, status_);
    check(shape);
  }

 private:
  TF_ShapeHandle* make() {
    handles_.push_back(tf.TF_NewShapeHandle());
    return handles_.back();
  }
  TF_ShapeHandle* check(TF_ShapeHandle* handle) const {
    if (tf.TF_GetCode(status_) != TF_OK) throw Failure{tf.TF_GetCode(status_), tf.TF_Message(status_)};
    return handle;
  }
  TF_ShapeInferenceContext* context_;
  TF_Status* status_;
  std::vector<TF_ShapeHandle*> handles_;
};

// The C API shows shape functions no attributes: how wide a result is follows from the other inputs.
void matmul_shape(Shapes& s) {
  TF_ShapeHandle* bias = s.with_rank(s.input(2), 1);
  TF_ShapeHandle* x = s.with_rank_at_least(s.input(0), 1);
  s.set_output(0, s.joined(s.part(x, 0, -1), s.empty_vector(bias) ? s.unknown_vector() : bias));
}

void sampled_product_shape(Shapes& s) { s.set_output(0, s.unknown_vector()); }

void rnn_shape(Shapes& s) {
  s.with_rank(s.input(0), 3);
  TF_ShapeHandle* h = s.with_rank(s.input(2), 2);
  s.set_output(0, s.joined(s.joined(s.part(h, 0, 1), s.unknown_vector()), s.part(h, 1, 2)));
  s.set_output(1, h);
  s.set_output(2, s.input(3));
  s.set_output(3, s.unknown_vector());
}

void rnn_grad_shape(Shapes& s) {
  const int inputs[] = {0, 2, 3, 4, 5, 6};
  for (int i = 0; i < 6; i++) s.set_output(i, s.input(inputs[i]));
}

// ---- registration ----------------------------------------------------------------------------------------------------

template <class Op>
void* create(TF_OpKernelConstruction* construction) {
  void* op = nullptr;
  guarded(
      [&] {
        Attributes attributes(construction);
        op = new Op(attributes);
      },
      [&](Status& status) { tf.TF_OpKernelConstruction_Failure(construction, status); });
  return op;
}

template <class Op>
void compute(void* op, TF_OpKernelContext* context) {
  guarded(
      [&] {
        Context tensors(context);
        ((const Op*)op)->compute(tensors);
      },
      [&](Status& status) { tf.TF_OpKernelContext_Failure(context, status); });
}

template <class Op>
void destroy(void* op) {
  delete (Op*)op;
}

template <void (*shape)(Shapes&)>
void infer(TF_ShapeInferenceContext* context, TF_Status* status) {
  guarded(
      [&] {
        Shapes shapes(context, status);
        shape(shapes);
      },
      [&](Status& failed) { tf.TF_SetStatus(status, tf.TF_GetCode(failed), tf.TF_Message(failed)); });
}

using Specs = std::vector<const char*>;

template <class Op, void (*shape)(Shapes&)>
void add_op(const char* name, const Specs& inputs, const Specs& outputs, const Specs& attributes) {
  // The name is what TensorFlow shows to those who load a saved model without the package.
  const std::string full = std::string("KerasBlocksparse>") + name;
  TF_OpDefinitionBuilder* definition = tf.TF_NewOpDefinitionBuilder(full.c_str());
  for (const char* spec : inputs) tf.TF_OpDefinitionBuilderAddInput(definition, spec);
  for (const char* spec : outputs) tf.TF_OpDefinitionBuilderAddOutput(definition, spec);
  for (const char* spec : attributes) tf.TF_OpDefinitionBuilderAddAttr(definition, spec);
  tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(definition, infer<shape>);
  Status status;
  tf.TF_RegisterOpDefinition(definition, status);
  status.check();
  TF_KernelBuilder* kernel = tf.TF_NewKernelBuilder(full.c_str(), "CPU", create<Op>, compute<Op>, destroy<Op>);
  tf.TF_RegisterKernelBuilder(full.c_str(), kernel, status);
  status.check();
}

void add_ops() {
  add_op<Matmul, matmul_shape>("Matmul", {"x: float", "values: T", "bias: float"}, {"y: float"},
                               {"T: {float, uint8}", "structure: string", "transposed: bool"});
  add_op<SampledProduct, sampled_product_shape>("SampledProduct", {"x: float", "dy: float"}, {"dvalues: float"},
                                                {"structure: string"});
  const Specs inputs{"x: float",          "mask: bool",          "initial_h: float", "initial_c: float",
                     "kernel_values: K",  "recurrent_values: R", "bias: float"};
  const Specs attributes{"K: {float, uint8}",       "R: {float, uint8}",      "kernel: string",
                         "recurrent: string",       "cell: int",              "activation: int",
                         "recurrent_activation: int", "activation_limit: float", "recurrent_limit: float",
                         "reset_after: bool",       "go_backwards: bool",     "return_sequences: bool",
                         "zero_output_for_mask: bool"};
  Specs forward = attributes, grad_inputs = inputs;
  forward.push_back("reserve: bool");
  add_op<Rnn, rnn_shape>("Rnn", inputs, {"y: float", "final_h: float", "final_c: float", "reserved: float"}, forward);
  for (const char* spec : {"reserved: float", "dy: float", "dfinal_h: float", "dfinal_c: float"}) grad_inputs.push_back(spec);
  add_op<RnnGrad, rnn_grad_shape>("RnnGrad", grad_inputs,
                                  {"dx: float", "dinitial_h: float", "dinitial_c: float", "dkernel_values: float",
                                   "drecurrent_values: float", "dbias: float"},
                                  attributes);
}

void find_functions() {
  // TensorFlow has loaded it long before it loads us; where it has not, we are not in TensorFlow.
  void* library = dlopen("libtensorflow_framework.so.2", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) throw Failure{TF_INTERNAL, "libtensorflow_framework.so.2 is not loaded in this process"};
#define KBS_TF_FIND(result, name, arguments) \
  if (!(tf.name = (result(*) arguments)dlsym(library, #name))) throw Failure{TF_INTERNAL, "this TensorFlow lacks " #name};
  KBS_TF_FUNCTIONS(KBS_TF_FIND)
#undef KBS_TF_FIND
}

__attribute__((constructor)) void load() {
  try {
    if (kbs_abi_version() != KBS_ABI_VERSION) throw Failure{TF_INTERNAL, "libkbs.so is of another version than libkbs_tf.so"};
    find_functions();
    add_ops();
  } catch (const Failure& failure) {
    load_error = failure.message;
  } catch (...) {
    load_error = "unexpected exception";
  }
}

}  // namespace
}  // namespace kbs

// Why loading added no ops, "" if it did.
extern "C" __attribute__((visibility("default"))) const char* kbs_tf_error() { return kbs::load_error.c_str(); }
