// What an operator's bytes say of it: a FlexBuffer map of numbers and vectors of integers.
#ifndef KBS_TFLITE_ATTRIBUTES_H_
#define KBS_TFLITE_ATTRIBUTES_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kbs {
namespace tflite {

// One entry of the map. Integers are exact in both.
struct Attribute {
  std::string name;
  bool is_vector = false, is_integer = false;
  int64_t integer = 0;
  double number = 0;
  std::vector<int64_t> vector;
};

class Attributes {
 public:
  // False if the bytes are no such map. Entries of other types are left out.
  bool read(const uint8_t* data, size_t size);
  // False if there is no such entry, or it is of another type.
  bool integer(const char* name, int64_t* out) const;
  bool number(const char* name, float* out) const;
  bool vector(const char* name, std::vector<int64_t>* out) const;

 private:
  const Attribute* find(const char* name) const;
  std::vector<Attribute> entries_;
};

}  // namespace tflite
}  // namespace kbs
#endif  // KBS_TFLITE_ATTRIBUTES_H_
