// A reader for as much of the FlexBuffers format as our attributes use. The bytes come from a file that anybody may have
// written: every position and every length is checked against the buffer.
#include "attributes.h"

#include <cstring>

namespace kbs {
namespace tflite {
namespace {

// Types of values; their low two bits, the width, are not counted.
enum Kind { kInt = 1, kUint = 2, kFloat = 3, kIndirectInt = 6, kIndirectUint = 7, kIndirectFloat = 8, kMap = 9,
            kVector = 10, kVectorInt = 11, kVectorUint = 12, kVectorInt2 = 16, kVectorFloat4 = 24, kBool = 26 };

constexpr size_t kMostEntries = 64;     // of a map
constexpr size_t kMostElements = 4096;  // of a vector

bool is_number(int kind) {
  return kind == kInt || kind == kUint || kind == kFloat || kind == kIndirectInt || kind == kIndirectUint ||
         kind == kIndirectFloat || kind == kBool;
}

bool is_vector(int kind) {
  return kind == kVector || kind == kVectorInt || kind == kVectorUint || (kind >= kVectorInt2 && kind <= kVectorFloat4);
}

// Positions in the bytes, checked. All of it returns false where they lead outside.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool unsigned_at(size_t at, size_t width, uint64_t* out) const {
    if ((width != 1 && width != 2 && width != 4 && width != 8) || at > size_ || size_ - at < width) return false;
    *out = 0;
    std::memcpy(out, data_ + at, width);  // little endian, as the machines are
    return true;
  }
  bool signed_at(size_t at, size_t width, int64_t* out) const {
    uint64_t bits;
    if (!unsigned_at(at, width, &bits)) return false;
    const int unused = 64 - 8 * (int)width;
    *out = (int64_t)(bits << unused) >> unused;
    return true;
  }
  bool float_at(size_t at, size_t width, double* out) const {
    uint64_t bits;
    if (width < 4 || !unsigned_at(at, width, &bits)) return false;
    if (width == 8) {
      std::memcpy(out, &bits, 8);
    } else {
      float value;
      std::memcpy(&value, &bits, 4);
      *out = value;
    }
    return true;
  }
  // Where the offset at `at` points: backwards, by as many bytes as it says.
  bool target(size_t at, size_t width, size_t* out) const {
    uint64_t offset;
    if (!unsigned_at(at, width, &offset) || offset > at) return false;
    *out = at - (size_t)offset;
    return true;
  }
  // Elements of a vector that begins at `at`: their number lies before it.
  bool length(size_t at, size_t width, size_t* out) const {
    uint64_t n;
    if (at < width || !unsigned_at(at - width, width, &n) || n > kMostElements || n * width > size_ - at) return false;
    *out = (size_t)n;
    return true;
  }
  bool vector(int kind, size_t at, size_t width, std::vector<int64_t>* out) const {
    size_t n;
    int same = kind == kVectorInt ? kInt : kUint;  // the kind of all elements, where they have no types of their own
    if (kind >= kVectorInt2) {  // of 2, 3 or 4 integers, unsigned ones or floats, without a length
      n = 2 + (size_t)(kind - kVectorInt2) / 3;
      same = kInt + (kind - kVectorInt2) % 3;
      if (at > size_ || n * width > size_ - at) return false;
    } else if (!length(at, width, &n)) {
      return false;
    }
    for (size_t i = 0; i < n; i++) {
      uint64_t type = (uint64_t)same << 2;
      if (kind == kVector && !unsigned_at(at + n * width + i, 1, &type)) return false;
      Attribute value;
      if (!is_number((int)type >> 2) || !number((int)type, at + i * width, width, &value) || !value.is_integer) return false;
      out->push_back(value.integer);
    }
    return true;
  }
  bool text(size_t at, std::string* out) const {
    const void* end = at < size_ ? std::memchr(data_ + at, 0, size_ - at) : nullptr;
    if (!end) return false;
    out->assign((const char*)data_ + at, (const char*)end);
    return true;
  }
  // A number of the type whose byte is `type`, stored at `at` in `width` bytes.
  bool number(int type, size_t at, size_t width, Attribute* out) const {
    const int kind = type >> 2;
    if (kind == kIndirectInt || kind == kIndirectUint || kind == kIndirectFloat) {
      if (!target(at, width, &at)) return false;
      width = size_t{1} << (type & 3);
    }
    out->is_integer = kind != kFloat && kind != kIndirectFloat;
    if (!out->is_integer) return float_at(at, width, &out->number);
    if (kind == kInt || kind == kIndirectInt) {
      if (!signed_at(at, width, &out->integer)) return false;
    } else {
      uint64_t value;
      if (!unsigned_at(at, width, &value) || value > INT64_MAX) return false;
      out->integer = (int64_t)value;
    }
    out->number = (double)out->integer;
    return true;
  }

 private:
  const uint8_t* data_;
  const size_t size_;
};

}  // namespace

bool Attributes::read(const uint8_t* data, size_t size) {
  entries_.clear();
  // The last byte is the width of the root, the one before its type; the root itself, an offset, lies before them.
  if (!data || size < 3 || size > (size_t{1} << 24)) return false;
  const Reader reader(data, size - 2);
  const size_t root_width = data[size - 1];
  const int root_type = data[size - 2];
  size_t map;
  if (root_type >> 2 != kMap || root_width > size - 2 || !reader.target(size - 2 - root_width, root_width, &map)) return false;
  const size_t width = size_t{1} << (root_type & 3);

  // Before a map's values: where its keys are, how wide they are, and how many there are.
  size_t n, keys;
  uint64_t key_width;
  if (map < 3 * width || !reader.length(map, width, &n) || n > kMostEntries) return false;
  if (!reader.target(map - 3 * width, width, &keys) || !reader.unsigned_at(map - 2 * width, width, &key_width)) return false;
  if (key_width != 1 && key_width != 2 && key_width != 4 && key_width != 8) return false;
  const size_t types = map + n * width;
  for (size_t i = 0; i < n; i++) {
    size_t key;
    uint64_t type;
    Attribute entry;
    if (!reader.target(keys + i * key_width, key_width, &key) || !reader.text(key, &entry.name)) return false;
    if (!reader.unsigned_at(types + i, 1, &type)) return false;
    const int kind = (int)type >> 2;
    const size_t at = map + i * width;
    if (is_number(kind)) {
      if (!reader.number((int)type, at, width, &entry)) return false;
    } else if (is_vector(kind)) {
      entry.is_vector = true;
      const size_t element = size_t{1} << (type & 3);
      size_t vector;
      if (!reader.target(at, width, &vector) || !reader.vector(kind, vector, element, &entry.vector)) return false;
    } else {
      continue;
    }
    entries_.push_back(std::move(entry));
  }
  return true;
}

const Attribute* Attributes::find(const char* name) const {
  for (const Attribute& entry : entries_)
    if (entry.name == name) return &entry;
  return nullptr;
}

bool Attributes::integer(const char* name, int64_t* out) const {
  const Attribute* entry = find(name);
  if (!entry || entry->is_vector || !entry->is_integer) return false;
  *out = entry->integer;
  return true;
}

bool Attributes::number(const char* name, float* out) const {
  const Attribute* entry = find(name);
  if (!entry || entry->is_vector) return false;
  *out = (float)entry->number;
  return true;
}

bool Attributes::vector(const char* name, std::vector<int64_t>* out) const {
  const Attribute* entry = find(name);
  if (!entry || !entry->is_vector) return false;
  *out = entry->vector;
  return true;
}

}  // namespace tflite
}  // namespace kbs
