// Constant tensors of a file as the columns of a Keras weight.
#ifndef KBS_TFLITE_WEIGHTS_H_
#define KBS_TFLITE_WEIGHTS_H_

#include <string>
#include <vector>

#include "kbs.h"
#include "tflite_api.h"

namespace kbs {
namespace tflite {

// A constant of (outputs, inputs), dense or sparse, that was checked. What it points to lives as long as the interpreter.
// Scales are copied, for they do not: XNNPACK gives dense weights others.
struct Constant {
  TfLiteType type = 0;
  int64_t outputs = 0, inputs = 0;
  const void* data = nullptr;
  int64_t stored = 0;                      // elements in `data`
  const TfLiteSparsity* sparsity = nullptr;
  std::vector<float> scales;               // int8: one, or one for each output

  float scale_of(int64_t output) const { return scales[scales.size() == 1 ? 0 : (size_t)output]; }
};

// Checks a tensor and all that it points to. Returns why it cannot be used, "" if it can.
std::string read_constant(const TfLiteTensor& tensor, Constant* out);

// Constants beside each other, as the columns of one matrix. Time and memory go with what is stored, and the outputs.
class Columns {
 public:
  // They must have been checked, and agree in inputs and in whether they are int8. bfloat16: what they are held as,
  // whatever they are in the file; otherwise that is float32, or int8 if they are int8.
  Columns(const std::vector<Constant>& constants, bool bfloat16);
  kbs_status make_matrix(int64_t gates, kbs_matrix** out) const;

 private:
  int64_t rows_;
  int32_t dtype_;
  std::vector<int64_t> starts_;
  std::vector<int32_t> row_;
  std::vector<float> values_;
  std::vector<int8_t> quantized_;
  std::vector<float> scales_;
};

}  // namespace tflite
}  // namespace kbs
#endif  // KBS_TFLITE_WEIGHTS_H_
