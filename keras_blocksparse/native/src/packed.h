// Reading a packed buffer that nobody has checked yet.
#ifndef KBS_PACKED_H_
#define KBS_PACKED_H_

#include "error.h"
#include "format.h"

namespace kbs {

// Checks the whole buffer, then fills the view, which points into it.
kbs_status open_packed(const void* packed, int64_t bytes, View* view);

size_t values_bytes(const Header& header);

}  // namespace kbs
#endif  // KBS_PACKED_H_
