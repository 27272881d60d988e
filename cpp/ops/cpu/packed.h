// Where weight[n][k] lies in a packed weight on a CPU: panels of 32 outputs, k in pairs for 16-bit types (see
// PackWeight).
#pragma once

#include <cstdint>

namespace hybrid::cpu {

constexpr int64_t panel_columns = 32;

constexpr int64_t padded_k(int64_t k) { return (k + 31) / 32 * 32; }

// Offset inside a panel.
template <class T>
constexpr int64_t packed_offset(int64_t column, int64_t k) {
  constexpr int64_t group = sizeof(T) == 2 ? 2 : 1;
  return (k / group * panel_columns + column) * group + k % group;
}

}  // namespace hybrid::cpu
