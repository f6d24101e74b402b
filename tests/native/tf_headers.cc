// Compiles if our declarations of TensorFlow's C API are those of the TensorFlow that is installed.
#include <type_traits>

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_datatype.h"
#include "tensorflow/c/tf_status.h"
#include "tensorflow/c/tf_tensor.h"

namespace ours {
#include "tf_api.h"
}
#undef KBS_TF_API_H_
#define KBS_TF_HEADERS
#include "tf_api.h"

#define SAME(result, name, arguments) \
  static_assert(std::is_same_v<decltype(kbs::TfApi::name), decltype(&::name)>, #name " has another signature");
KBS_TF_FUNCTIONS(SAME)

#define SAME_NUMBER(name) static_assert((int)ours::name == (int)::name, #name " is another number");
SAME_NUMBER(TF_OK)
SAME_NUMBER(TF_INVALID_ARGUMENT)
SAME_NUMBER(TF_RESOURCE_EXHAUSTED)
SAME_NUMBER(TF_UNIMPLEMENTED)
SAME_NUMBER(TF_INTERNAL)
SAME_NUMBER(TF_DATA_LOSS)
SAME_NUMBER(TF_FLOAT)
