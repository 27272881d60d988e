// What a call says when it refuses its arguments.
#pragma once

#include <stdexcept>
#include <string>

namespace hybrid {

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

}  // namespace hybrid
