#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace kbs {
namespace {
thread_local char message[512];
}

kbs_status fail(kbs_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace kbs

int32_t kbs_abi_version(void) { return KBS_ABI_VERSION; }

const char* kbs_last_error(void) { return kbs::message; }
