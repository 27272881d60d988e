// Two kinds of check: the caller's mistake throws std::invalid_argument with the numbers in it, a broken invariant of
// ours throws InternalError with its place in the source.
#pragma once

#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>

namespace hybrid {

struct InternalError : std::logic_error {
  using std::logic_error::logic_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The caller's mistake: `require(n > 0, "n is ", n, ", must be positive")`.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    throw std::invalid_argument(concat(parts...));
}

// Our mistake. The location is the caller's.
inline void invariant(bool condition, const char* what, std::source_location at = std::source_location::current()) {
  if (!condition) [[unlikely]]
    throw InternalError(concat(at.file_name(), ":", at.line(), " (", at.function_name(), "): ", what));
}

}  // namespace hybrid
