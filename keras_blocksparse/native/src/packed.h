// Reading a packed buffer that nobody has checked yet.
#ifndef KBS_PACKED_H_
#define KBS_PACKED_H_

#include "error.h"
#include "format.h"

namespace kbs {

// Checks the whole buffer, then fills the view, which points into it. A structure ends where the values would begin, and
// its view has none.
kbs_status open_packed(const void* packed, int64_t bytes, bool structure, View* view);

// Packs into memory that `allocate` gives, a multiple of 64 bytes; see kbs_matrix_from_columns.
kbs_status pack_columns(const kbs_columns& columns, int64_t block_rows, int64_t block_cols, int32_t dtype,
                        char* (*allocate)(size_t bytes, void* argument), void* argument, size_t* bytes);

// Scales, sums and values: all that depends on the weights.
size_t values_bytes(const Header& header);
kbs_info describe(const Header& header);
// The view with other values, or as it is if they are null.
View with_values(const View& view, const void* values);

}  // namespace kbs
#endif  // KBS_PACKED_H_
