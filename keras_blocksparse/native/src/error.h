// Status codes with a message for the calling thread.
#ifndef KBS_ERROR_H_
#define KBS_ERROR_H_

#include <new>

#include "kbs.h"

namespace kbs {

// Remembers the message, returns the status.
kbs_status fail(kbs_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Runs the body of an ABI function; what is thrown becomes a status.
template <class Body>
kbs_status guarded(Body body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(KBS_OUT_OF_MEMORY, "out of memory");
  } catch (...) {
    return fail(KBS_INTERNAL, "unexpected exception");
  }
}

}  // namespace kbs
#endif  // KBS_ERROR_H_
